"""
Shows where the time of a default training step goes, for an agent, an algorithm, and flags of the training script:

    OMP_NUM_THREADS=1 python tests/benchmarks/profile_step.py manager grpo

The first of seven steps warms up. Steps 2 to 6 run without the profiler and give the seconds of each stage; they
contain one refresh of the Manager's episodes. Step 7 runs under torch.profiler and gives the seconds of each kind of
operation. The time outside of operations is Python: the model's forward, the sampling loop, tokenizing, parsing, the
bank. `--plain` switches shared prompts off: each completion has its own row and its own copy of the prompt.
"""
import argparse
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
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
from support.loop import Loop  # noqa: E402

AGENTS = {"manager": (train_manager, train_manager.ManagerTask), "answer": (train_answer, train_answer.AnswerTask)}
ALGORITHMS = {"grpo": grpo, "ppo": ppo}
NUM_BARE_STEPS = 5
KINDS = {"linear layers": ("aten::mm", "aten::addmm"),
         "attention": ("aten::_scaled_dot_product", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
         "cache, gathers": ("aten::cat", "aten::index", "aten::gather")}
spent, inner_seconds = Counter(), [0.0]  # seconds per stage; a stack: seconds of the stages inside each running stage


@contextmanager
def stage(name):
    """Add the time of the block to a stage, without the time of the stages inside it."""
    start = time.perf_counter()
    inner_seconds.append(0.0)
    try:
        yield
    finally:
        total = time.perf_counter() - start
        spent[name] += total - inner_seconds.pop()
        inner_seconds[-1] += total


def watch(owner, method, name):
    """Make every call of `owner.method` a stage."""
    original = getattr(owner, method)

    @wraps(original)
    def call(*args, **kwargs):
        with stage(name):
            return original(*args, **kwargs)
    setattr(owner, method, call)


def watch_steps(profiler):
    """Report the stages of the bare steps, and let `profiler` record the last step."""
    original = Loop.steps

    def steps(*args, **kwargs):
        for number, step in enumerate(original(*args, **kwargs), 1):
            is_last = number == NUM_BARE_STEPS + 2
            if is_last:
                profiler.start()
            with stage("rest"):
                yield step
            if is_last:
                profiler.stop()
            if number == NUM_BARE_STEPS + 1:
                report(f"stage, {NUM_BARE_STEPS} bare steps", spent)
            if number in (1, NUM_BARE_STEPS + 1):
                spent.clear()
    Loop.steps = steps


def report(title, seconds):
    print(f"\n{title:34} {'s':>7}  fraction")
    for name, value in [*seconds.most_common(), ("total", seconds.total())]:
        print(f"{name:34} {value:7.2f}  {value / seconds.total():5.1%}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("agent", nargs="?", choices=AGENTS, default="manager")
    parser.add_argument("algo", nargs="?", choices=ALGORITHMS, default="grpo")
    parser.add_argument("--plain", action="store_true", help="no shared prompts")
    args, flags = parser.parse_known_args(argv)
    (script, task), algorithm = AGENTS[args.agent], ALGORITHMS[args.algo]
    if args.plain:
        policy.PACKABLE = ()
    profiler = profile(activities=[ProfilerActivity.CPU])
    for owner, method, name in ((policy.Policy, "sample", "sampling"), (algorithm, "update", "update"),
                                (algorithm, "make_rollouts", "reference, values, advantages"),
                                (task, "batch", "episodes"), (task, "rewards", "rewards without sampling")):
        watch(owner, method, name)
    for method in ("add", "update", "delete", "search_scored", "fork"):
        watch(MemoryBank, method, "bank")
    watch_steps(profiler)
    with tempfile.TemporaryDirectory() as folder:
        script.main(["--algo", args.algo, "--steps", str(NUM_BARE_STEPS + 2), "--eval", "0", "--out", f"{folder}/run",
                     *flags])
    kinds = Counter()
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "other operations")
        kinds[kind] += event.self_cpu_time_total / 1e6
    kinds["Python"] = spent.total() - kinds.total()
    report("kind of operation, one profiled step", kinds)
    linear, attention = kinds["linear layers"], kinds["attention"]
    print(f"\nmatrix products, attention included: {(linear + attention) / spent.total():.1%}")


if __name__ == "__main__":
    main()
