"""
Compares sampling groups of completions with `generate` of transformers: same model, LoRA on, same prompts, same number
of tokens (no EOS).

    OMP_NUM_THREADS=1 python tests/benchmarks/sample.py --size tiny --prompt 1024
    python tests/benchmarks/sample.py --size 3b --prompt 2048 --completion 128 --prompts 16      # on a GPU

The two take turns. The output shows medians, on a CPU of CPU time. `bound` is the time for reading the weights and the
key-value cache once per token, at the speed with which this machine copies memory.
"""
import argparse
import statistics

import torch
from step import SIZES, build, clock, prompt_ids

from policy import Policy


def seconds_of(call):
    start = clock()
    call()
    return clock() - start


def bandwidth(device):
    """Return the bytes read and written per second by a copy that is too large for any cache."""
    x = torch.empty(2 ** 28, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * len(x) / statistics.median(seconds_of(lambda: y.copy_(x)) for _ in range(10))


def bytes_read(policy, args):
    """
    Return the bytes that all decoding steps read together. Each step reads the weights, the cache of every prompt once,
    and the cache of every completion so far.
    """
    config, weights = policy.model.config, sum(x.numel() * x.itemsize for x in policy.model.parameters())
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * policy.head.weight.itemsize
    completions = args.prompts * args.group * args.completion / 2  # half of their length on average
    return args.completion * (weights + per_token * (args.prompts * args.prompt + completions))


def measure(policy, args):
    """Return the seconds of each round, warmup included, by our sampler and by `generate`."""
    def ours():
        policy.sample(prompts, args.group, args.completion)

    @torch.no_grad()
    def generate():
        policy.model.generate(torch.tensor(prompts, device=policy.device), do_sample=True, top_k=0,
                              num_return_sequences=args.group, min_new_tokens=args.completion,
                              max_new_tokens=args.completion)

    spent = {"ours": [], "generate": []}
    with policy.using("agent"):
        for turn in range(args.rounds + 1):
            prompts = [prompt_ids(args.prompt, turn * args.prompts + i) for i in range(args.prompts)]
            spent["ours"].append(seconds_of(ours))
            spent["generate"].append(seconds_of(generate))
    return spent


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    add = parser.add_argument
    add("--size", choices=SIZES, default="tiny")
    add("--prompts", type=int, default=2, help="number of prompts (2)")
    add("--prompt", type=int, default=1024, help="tokens of a prompt (1024)")
    add("--completion", type=int, default=64, help="tokens of a completion (64)")
    add("--group", type=int, default=8, help="completions per prompt (8)")
    add("--rounds", type=int, default=3, help="measured rounds, after one to warm up (3)")
    args = parser.parse_args()
    policy = Policy(*build(args.size))
    policy.eos = policy.eos[:0]  # completions never end early
    policy.add_adapter("agent", rank=16, alpha=32)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in measure(policy, args).items()}
    num_tokens = args.prompts * args.group * args.completion
    print(f"{args.size}, {args.prompts} prompts of {args.prompt} tokens, G = {args.group}, C = {args.completion}")
    for name, seconds in medians.items():
        print(f"{name:9} {seconds:7.2f} s  {num_tokens / seconds:8.0f} tokens/s  "
              f"{seconds / medians['ours']:5.2f} times the time of ours")
    bound = bytes_read(policy, args) / bandwidth(policy.device)
    print(f"bound     {bound:7.2f} s  {num_tokens / bound:8.0f} tokens/s, without reading the prompts")


if __name__ == "__main__":
    main()
