"""
One GRPO step of ours against TRL's GRPOTrainer: the same model, LoRA, prompts, completion length and KL penalty.

    python -m venv trl && trl/bin/pip install -r requirements.txt peft==0.21.2 trl==1.16
    OMP_NUM_THREADS=1 trl/bin/python tests/benchmarks/step.py --size tiny --prompt 1024
    trl/bin/python tests/benchmarks/step.py --size 3b --prompt 2048 --completion 128 --rounds 5     # on a GPU

`trl` is TRL as installed. On a CPU it runs the head over every position, prompts too; `trl-compact` has that switched
to completion positions, as on a GPU, and is the fair comparison. A step: sample G completions of each of two prompts
(no EOS), random rewards, score, one optimizer step. Each trainer is a process of its own, for its peak of memory; they
take turns. Seconds are CPU seconds on a CPU. Memory is the peak above what was there before the first step. With
`--trainers ours ours-2G` the second has groups twice as large.
"""
import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PROMPTS = 2  # of a step
SIZES = {  # vocabulary, hidden, feed-forward, layers, heads, key heads
    "tiny": (2048, 128, 512, 4, 4, 2), "small": (32000, 512, 2048, 8, 8, 4),
    "3b": (151936, 2048, 11008, 36, 16, 2), "8b": (151936, 4096, 12288, 36, 32, 8)}


def build(size):
    """A random Qwen2 of that size and a tokenizer whose words are w0, w1, ..."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")
    sizes = dict(zip(names, SIZES[size], strict=True))
    config = Qwen2Config(**sizes, max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=1,
                         pad_token_id=0, attn_implementation="sdpa")
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(sizes["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0")


def prompt_ids(args, number):
    return random.Random(number).choices(range(2, 2000), k=args.prompt)


def ours(args, model, tokenizer):
    import torch

    import grpo
    from policy import Policy
    policy = Policy(model, tokenizer, gradient_checkpointing=args.checkpointing)
    policy.eos = policy.eos[:0]
    policy.add_adapter("agent", 16, 32)
    config = grpo.Config(beta=args.beta, group_size=args.group, max_new_tokens=args.completion)
    optimizer = torch.optim.AdamW(policy.parameters("agent"), lr=1e-5)
    for step in steps(args):
        prompts = [prompt_ids(args, step * PROMPTS + i) for i in range(PROMPTS)]
        with policy.using("agent"):
            groups = policy.sample(prompts, args.group, args.completion)
        rollouts = grpo.rollouts_of(prompts, groups, torch.rand(PROMPTS, args.group), policy.device)
        grpo.update(policy, optimizer, rollouts, "agent", config, random.Random(0))


def trl(args, model, tokenizer):
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils
    if args.child == "trl-compact":
        assert "compact = _use_triton(" in Path(utils.__file__).read_text(), "this TRL decides it elsewhere"
        utils._use_triton = lambda device: True  # in this module it decides that alone
    turns = steps(args)

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            next(turns)

    on_cpu = model.device.type == "cpu"
    config = GRPOConfig(
        output_dir="/tmp/trl-step", use_cpu=on_cpu, bf16=not on_cpu, beta=args.beta, num_generations=args.group,
        per_device_train_batch_size=args.group, gradient_accumulation_steps=PROMPTS, learning_rate=1e-5,
        max_completion_length=args.completion, generation_kwargs={"min_new_tokens": args.completion}, report_to="none",
        gradient_checkpointing=args.checkpointing, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        max_steps=args.rounds + 2, shuffle_dataset=False)
    rows = [{"prompt": " ".join(f"w{i}" for i in prompt_ids(args, n))} for n in range((args.rounds + 2) * PROMPTS)]
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    GRPOTrainer(model, reward_funcs=lambda completions, **_: [random.random() for _ in completions], args=config,
                train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Turns()],
                peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=targets)).train()


def steps(args):
    """0, 1, ... whenever the parent says so. What a step cost is printed when the next one is asked for."""
    import torch
    on_gpu = torch.cuda.is_available()

    def clock():
        torch.cuda.synchronize() if on_gpu else None
        return time.perf_counter() if on_gpu else time.process_time()

    def memory(peak):
        if on_gpu:
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        used = re.search(r"VmHWM:\s+(\d+)" if peak else r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(used[1]) * 1024
    base = memory(peak=False)
    for step in range(args.rounds + 2):
        input()
        start = clock()
        yield step
        print(json.dumps([clock() - start, (memory(peak=True) - base) / 2 ** 20]), flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    add = parser.add_argument
    add("--size", choices=SIZES, default="tiny")
    add("--prompt", type=int, default=1024)
    add("--completion", type=int, default=64)
    add("--group", type=int, default=8)
    add("--beta", type=float, default=0.04)
    add("--rounds", type=int, default=3, help="after one to warm up")
    add("--checkpointing", action="store_true")
    add("--trainers", nargs="+", default=["ours", "trl", "trl-compact"])
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        args.group *= 2 if args.child == "ours-2G" else 1
        return (ours if args.child.startswith("ours") else trl)(args, *build(args.size))
    if not find_spec("trl"):
        sys.exit("step.py: trl is not installed here: pip install trl==1.16, in a virtual environment of its own")
    print(f"{args.size}, P = {args.prompt}, G = {args.group}, C = {args.completion}, beta {args.beta}", flush=True)
    children = {name: subprocess.Popen([sys.executable, *sys.argv, "--child", name], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True) for name in args.trainers}
    costs = {name: [] for name in children}
    for _ in range(args.rounds + 1):
        for name, child in children.items():
            print(file=child.stdin, flush=True)
            costs[name].append(json.loads(next(line for line in child.stdout if line.startswith("["))))
    for child in children.values():
        child.kill()
    medians = {name: (statistics.median(seconds for seconds, _ in cost[1:]), cost[-1][1])
               for name, cost in costs.items()}
    print(f"{'':12} {'seconds':>8} {'MB':>6}  x ours  our share of its memory")
    for name, (seconds, memory) in medians.items():
        ratios = seconds / medians[args.trainers[0]][0], medians[args.trainers[0]][1] / memory
        print(f"{name:12} {seconds:8.2f} {memory:6.0f}  {ratios[0]:6.2f}  {ratios[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
