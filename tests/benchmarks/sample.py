"""
Sampling groups, ours against transformers' generate: the same model, LoRA on, prompts, number of new tokens (no EOS).

    OMP_NUM_THREADS=1 python tests/benchmarks/sample.py --size tiny --prompt 1024
    python tests/benchmarks/sample.py --size 3b --prompt 2048 --completion 128 --prompts 16      # on a GPU

The two take turns; printed are medians, CPU seconds on a CPU. `bound` is what reading the weights and the key-value
cache once per token would take at the bandwidth this machine copies memory with.
"""
import argparse
import statistics
import time

import torch
from step import SIZES, build, prompt_ids

from policy import Policy


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(call):
    start = clock()
    call()
    return clock() - start


def bandwidth(device):
    """Bytes a second, read and written, of a copy that no cache holds."""
    x = torch.empty(2 ** 28, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * len(x) / statistics.median(seconds(lambda: y.copy_(x)) for _ in range(10))


def bytes_read(policy, args):
    """Of all decoding steps together: the weights, every prompt's cache once, every completion's so far."""
    config, weights = policy.model.config, sum(x.numel() * x.itemsize for x in policy.model.parameters())
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * policy.head.weight.itemsize
    own = args.prompts * args.group * args.completion / 2  # on average half written
    return args.completion * (weights + per_token * (args.prompts * args.prompt + own))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    add = parser.add_argument
    add("--size", choices=SIZES, default="tiny")
    add("--prompts", type=int, default=2)
    add("--prompt", type=int, default=1024, help="tokens of each")
    add("--completion", type=int, default=64)
    add("--group", type=int, default=8)
    add("--rounds", type=int, default=3, help="after one to warm up")
    args = parser.parse_args()
    policy = Policy(*build(args.size))
    policy.eos = policy.eos[:0]
    policy.add_adapter("agent", 16, 32)

    def ours():
        policy.sample(prompts, args.group, args.completion)

    @torch.no_grad()
    def generate():
        policy.model.generate(torch.tensor(prompts, device=policy.device), do_sample=True, top_k=0,
                              num_return_sequences=args.group, min_new_tokens=args.completion,
                              max_new_tokens=args.completion)

    spent = {ours: [], generate: []}
    with policy.using("agent"):
        for turn in range(args.rounds + 1):
            prompts = [prompt_ids(args, turn * args.prompts + i) for i in range(args.prompts)]
            for call, values in spent.items():
                values.append(seconds(call))
    tokens = args.prompts * args.group * args.completion
    median = {call: statistics.median(values[1:]) for call, values in spent.items()}
    print(f"{args.size}, {args.prompts} prompts of {args.prompt} tokens, G = {args.group}, C = {args.completion}")
    for call, value in median.items():
        print(f"{call.__name__:9} {value:7.2f} s  {tokens / value:8.0f} tokens/s  {value / median[ours]:5.2f} x ours")
    bound = bytes_read(policy, args) / bandwidth(policy.device)
    print(f"bound     {bound:7.2f} s  {tokens / bound:8.0f} tokens/s, without reading the prompts")


if __name__ == "__main__":
    main()
