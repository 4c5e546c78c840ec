"""
Compares the stages of a GRPO step on a real model with the machine's own rate of matrix products:

    OMP_NUM_THREADS=1 python tests/benchmarks/roofline.py --model FOLDER --prompt 1000

Useful FLOPs of a token: 2 per weight of the linear layers, and 2 per weight of the head where logits are needed (one
token per prompt, and all completion tokens); the backward pass does as many again, for the gradient of the inputs
(adapters and attention are not counted). The machine's rate is that of the model's widest layer on as many tokens, in
the same dtype, measured in turn with every stage. Seconds are medians, on a CPU of CPU time.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from policy import Policy  # noqa: E402


def seconds(function, on_gpu):
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens")
    parser.add_argument("--completion", type=int, default=16, help="tokens")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    policy = Policy.load(args.model, dtype=args.dtype)
    policy.add_adapter("agent", 16, 32)
    policy.eos = policy.eos[:0]  # every completion has its full length
    shape = torch.randint(1000, policy.head.out_features // 2, (args.prompts, args.prompt))
    prompts, on_gpu = shape.tolist(), policy.device.type == "cuda"
    completions = torch.randint(1000, 2000, (args.prompts, args.group, args.completion)).tolist()
    layers, head = sum(layer.base.weight.numel() for layer in policy.layers.values()), policy.head.weight.numel()
    read, written = args.prompts * args.prompt, args.prompts * args.group * args.completion

    def sample():
        with policy.using("agent"):
            policy.sample(prompts, args.group, args.completion)

    def score():
        with policy.using(None), torch.no_grad():
            policy.score(prompts, completions)

    def update():
        with policy.using("agent"):
            policy.score(prompts, completions).logp.sum().backward()

    widest = max(policy.layers.values(), key=lambda layer: layer.base.weight.numel()).base
    x = torch.randn(read, widest.in_features, dtype=widest.weight.dtype, device=policy.device)

    def product():
        with torch.no_grad():
            for _ in range(10):
                widest(x)

    scoring = 2 * (layers * (read + written) + head * written)
    flops = {"sample": scoring + 2 * head * args.prompts, "score": scoring, "forward and backward": 2 * scoring}
    stages = {"sample": sample, "score": score, "forward and backward": update}
    rates = {name: [] for name in [*stages, "product"]}
    for round_ in range(args.rounds + 1):  # the first round warms up
        for name, stage in stages.items():
            rate = flops[name] / seconds(stage, on_gpu)
            product_rate = 20 * read * widest.weight.numel() / seconds(product, on_gpu)
            if round_:
                rates[name].append(rate)
                rates["product"].append(product_rate)
    peak = statistics.median(rates.pop("product"))
    print(f"matrix product of {tuple(widest.weight.shape)} and {read} tokens: {peak / 1e9:.0f} GFLOP/s")
    for name, found in rates.items():
        rate = statistics.median(found)
        print(f"{name:21} {rate / 1e9:8.0f} GFLOP/s  {rate / peak:.2f} of it  {flops[name] / rate:.2f} s")


if __name__ == "__main__":
    main()
