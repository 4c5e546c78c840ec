"""
Where the time of a default training step goes. The agent (manager), the algorithm (grpo), flags of the training script:

    OMP_NUM_THREADS=1 python tests/benchmarks/profile_step.py manager grpo

Of seven steps the first warms up, five are run bare, for the seconds of each stage (one refresh of the Manager's
episodes among them), and one under torch's profiler, for those of each kind of operation. What no operation accounts
for is Python: transformers' forward, the loop of sampling, tokenizing, parsing, the bank. With `--plain` no completions
share a prompt: each has a row, and a copy of the prompt's cache, of its own.
"""
import argparse
import sys
import tempfile
import time
from collections import Counter
from functools import wraps
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo  # noqa: E402
import policy  # noqa: E402
import ppo  # noqa: E402
import train_answer  # noqa: E402
import train_manager  # noqa: E402
from memory import MemoryBank  # noqa: E402

AGENTS = {"manager": (train_manager, train_manager.ManagerTask), "answer": (train_answer, train_answer.AnswerTask)}
ALGORITHMS = {"grpo": grpo, "ppo": ppo}
KINDS = {"linear layers": ("aten::mm", "aten::addmm"),
         "attention": ("aten::_scaled_dot_product", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
         "cache, gathers": ("aten::cat", "aten::index", "aten::gather")}
spent, inside = Counter(), [0.0]  # seconds of each stage; of the stages inside each stage that is running


def watch(owner, method, stage):
    """Has `owner.method` add its time to `stage`, without that of the stages inside it."""
    before = getattr(owner, method)

    @wraps(before)
    def call(*args, **kwargs):
        start = time.perf_counter()
        inside.append(0.0)
        try:
            return before(*args, **kwargs)
        finally:
            total = time.perf_counter() - start
            spent[stage] += total - inside.pop()
            inside[-1] += total
    setattr(owner, method, call)


def watch_steps(algorithm, profiler):
    """Reports the stages of steps 2 to 6, and has `profiler` see the seventh and last."""
    before, number = algorithm.train_step, [0]

    def train_step(*args, **kwargs):
        number[0] += 1
        if number[0] == 7:
            profiler.start()
        result = before(*args, **kwargs)
        if number[0] in (1, 6):
            report("stage, of five bare steps", spent) if number[0] == 6 else None
            spent.clear()
        if number[0] == 7:
            profiler.stop()
        return result
    algorithm.train_step = train_step


def report(title, seconds):
    print(f"\n{title:34} {'s':>7}  share")
    for name, value in [*seconds.most_common(), ("all", seconds.total())]:
        print(f"{name:34} {value:7.2f}  {value / seconds.total():5.1%}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("agent", nargs="?", choices=AGENTS, default="manager")
    parser.add_argument("algo", nargs="?", choices=ALGORITHMS, default="grpo")
    parser.add_argument("--plain", action="store_true", help="every completion has a row and a prompt of its own")
    args, flags = parser.parse_known_args(argv)
    (script, task), algorithm = AGENTS[args.agent], ALGORITHMS[args.algo]
    if args.plain:
        policy.PACKABLE = ()
    profiler = profile(activities=[ProfilerActivity.CPU])
    for owner, method, stage in ((policy.Policy, "sample", "sampling"), (algorithm, "update", "update"),
                                 (task, "batch", "episodes"), (task, "rewards", "rewards but sampling"),
                                 (algorithm, "train_step", "rest")):
        watch(owner, method, stage)
    for method in ("add", "update", "delete", "search_scored", "fork"):
        watch(MemoryBank, method, "bank")
    watch_steps(algorithm, profiler)
    with tempfile.TemporaryDirectory() as folder:
        script.main(["--algo", args.algo, "--steps", "7", "--eval", "0", "--out", f"{folder}/run", *flags])
    kinds = Counter()
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "other operations")
        kinds[kind] += event.self_cpu_time_total / 1e6
    kinds["Python"] = spent.total() - kinds.total()
    report("kind, of one profiled step", kinds)
    linear, attention = kinds["linear layers"], kinds["attention"]
    print(f"\nmatrix products, attention among them: {(linear + attention) / spent.total():.1%}")


if __name__ == "__main__":
    main()
