"""
Compares one GRPO step with TRL's GRPOTrainer: same model, LoRA, prompts, completion length and KL penalty.

    python -m venv trl && trl/bin/pip install -r requirements.txt peft==0.21.2 trl==1.16
    OMP_NUM_THREADS=1 trl/bin/python tests/benchmarks/step.py --size tiny --prompt 1024
    trl/bin/python tests/benchmarks/step.py --size 3b --prompt 2048 --completion 128 --rounds 5     # on a GPU
    python tests/benchmarks/step.py --trainers ours ours-2G                                         # without TRL

A step samples G completions of each of two prompts (no EOS), draws random rewards, scores them, and makes one optimizer
step.

trainer      meaning
ours         this project
ours-2G      this project with groups twice as large
trl          TRL as installed. On a CPU it applies the head to all positions, prompts included.
trl-compact  TRL with the head on completion positions only, as on a GPU: the fair comparison on a CPU

Each trainer runs in a process of its own, so that its peak of memory can be measured, and they take turns. Seconds are
medians, on a CPU of CPU time. Memory is the increase from before the first step to the peak.
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

NUM_PROMPTS = 2  # per step
SIZES = {  # vocabulary, hidden, feed-forward, layers, heads, key heads
    "tiny": (2048, 128, 512, 4, 4, 2), "small": (32000, 512, 2048, 8, 8, 4),
    "3b": (151936, 2048, 11008, 36, 16, 2), "8b": (151936, 4096, 12288, 36, 32, 8)}


# ------------------------------------------------------------------------------------------------ the trainers

def build(args):
    """The model of --model in bfloat16, or a random Qwen2 of --size and a tokenizer whose words are w0, w1, ..."""
    if args.model:
        from support.pretrained import load_pretrained
        return load_pretrained(args.model, dtype="bfloat16")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")
    sizes = dict(zip(names, SIZES[args.size], strict=True))
    config = Qwen2Config(**sizes, max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=1,
                         pad_token_id=0, attn_implementation="sdpa")
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(sizes["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0")


def random_prompts(args, tokenizer):
    """A text of random words for each prompt of each step. A word is a token: of the first ones, " " and letters."""
    words = [word for word in map(tokenizer.decode, range(10000)) if re.fullmatch(" [a-z]+", word)
             and len(tokenizer.encode(word, add_special_tokens=False)) == 1] or [f" w{i}" for i in range(2, 2000)]
    return ["".join(random.Random(seed).choices(words, k=args.prompt))
            for seed in range((args.rounds + 2) * NUM_PROMPTS)]


def ours(args, model, tokenizer):
    import torch

    import grpo
    from policy import Policy
    policy = Policy(model, tokenizer, gradient_checkpointing=args.checkpointing)
    policy.eos = policy.eos[:0]  # completions never end early
    policy.add_adapter("agent", rank=16, alpha=32)
    config = grpo.Config(beta=args.beta, group_size=args.group, max_new_tokens=args.completion)
    optimizer = torch.optim.AdamW(policy.named_parameters("agent"), lr=1e-5)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in random_prompts(args, tokenizer)]
    for step in steps(args):
        prompts = ids[step * NUM_PROMPTS:(step + 1) * NUM_PROMPTS]
        with policy.using("agent"):
            groups = policy.sample(prompts, args.group, args.completion)
        rollouts = grpo.make_rollouts(policy, prompts, groups, torch.rand(NUM_PROMPTS, args.group), config)
        grpo.update(policy, optimizer, rollouts, "agent", config, step)


def trl(args, model, tokenizer):
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils
    if args.child == "trl-compact":
        assert "compact = _use_triton(" in Path(utils.__file__).read_text(), "this release of TRL decides elsewhere"
        utils._use_triton = lambda device: True  # in this module it decides nothing else
    turns = steps(args)

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            next(turns)

    on_cpu = model.device.type == "cpu"
    config = GRPOConfig(
        output_dir="/tmp/trl-step", use_cpu=on_cpu, bf16=not on_cpu, beta=args.beta, num_generations=args.group,
        per_device_train_batch_size=args.group, gradient_accumulation_steps=NUM_PROMPTS, learning_rate=1e-5,
        max_completion_length=args.completion, generation_kwargs={"min_new_tokens": args.completion}, report_to="none",
        gradient_checkpointing=args.checkpointing, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        max_steps=args.rounds + 2, shuffle_dataset=False)
    rows = [{"prompt": text} for text in random_prompts(args, tokenizer)]
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    GRPOTrainer(model, reward_funcs=lambda completions, **_: [random.random() for _ in completions], args=config,
                train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Turns()],
                peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=targets)).train()


def steps(args):
    """Yield a step number for each line of stdin. Print its cost, [seconds, MB], when the next one is requested."""
    base = memory_bytes(peak=False)
    for step in range(args.rounds + 2):
        input()
        start = clock()
        yield step
        print(json.dumps([clock() - start, (memory_bytes(peak=True) - base) / 2 ** 20]), flush=True)


def clock():
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def memory_bytes(peak):
    """Return the memory in use now, or its peak so far."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    used = re.search(r"VmHWM:\s+(\d+)" if peak else r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(used[1]) * 1024


# ------------------------------------------------------------------------------------------------ the comparison

def measure(trainers, rounds):
    """Run one process per trainer. Return {trainer: [(seconds, MB) of each step, the warmup first]}"""
    children = {name: subprocess.Popen([sys.executable, *sys.argv, "--child", name], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True) for name in trainers}
    costs = {name: [] for name in children}
    for _ in range(rounds + 1):
        for name, child in children.items():
            print(file=child.stdin, flush=True)
            costs[name].append(json.loads(next(line for line in child.stdout if line.startswith("["))))
    for child in children.values():
        child.kill()
    return costs


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    add = parser.add_argument
    add("--size", choices=SIZES, default="tiny", help="shape of a random model (tiny)")
    add("--model", help="a real model in place of a random one")
    add("--prompt", type=int, default=1024, help="tokens of a prompt (1024)")
    add("--completion", type=int, default=64, help="tokens of a completion (64)")
    add("--group", type=int, default=8, help="completions per prompt (8)")
    add("--beta", type=float, default=0.04, help="weight of the KL penalty (0.04)")
    add("--rounds", type=int, default=3, help="measured steps, after one to warm up (3)")
    add("--checkpointing", action="store_true", help="gradient checkpointing")
    add("--trainers", nargs="+", default=["ours", "trl", "trl-compact"], help="see above")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        args.group *= 2 if args.child == "ours-2G" else 1
        return (ours if args.child.startswith("ours") else trl)(args, *build(args))
    if any(name.startswith("trl") for name in args.trainers) and not find_spec("trl"):
        sys.exit("step.py: trl is not installed: pip install trl==1.16 in a virtual environment of its own, or give "
                 "--trainers ours")
    print(f"{args.model or args.size}, "
          f"P = {args.prompt}, G = {args.group}, C = {args.completion}, beta {args.beta}", flush=True)
    costs = measure(args.trainers, args.rounds)
    medians = {name: (statistics.median(seconds for seconds, _ in cost[1:]), cost[-1][1])
               for name, cost in costs.items()}
    first = args.trainers[0]
    print(f"{'':12} {'seconds':>8} {'MB':>6}  time / time of {first}  memory of {first} / memory")
    for name, (seconds, memory) in medians.items():
        print(f"{name:12} {seconds:8.2f} {memory:6.0f}  {seconds / medians[first][0]:{14 + len(first)}.2f}  "
              f"{medians[first][1] / memory:{19 + len(first)}.2f}")


if __name__ == "__main__":
    main()
