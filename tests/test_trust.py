"""A run is stopped, starved and fed numbers that are none: nothing is lost, and what is resumed equals what was not."""
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
import ppo
from data import UsageError
from memory import MemoryBank, make_embedder
from support import run as runs
from support.cli import exit_cleanly
from support.run import Run, locked, read_rows, seed_everything

ROOT = Path(__file__).parents[1]
BOTH = pytest.mark.parametrize("algorithm", [grpo, ppo], ids=["grpo", "ppo"])


class Letters:
    """A toy task: the reward is the share of the letter e. `events`: {step: what happens as it is rewarded}."""

    def __init__(self, policy, events):
        self.policy, self.events, self.seen, self.state = policy, events, [], {"passed": []}
        self.letter = policy.encode([{"role": "user", "content": "e"}])[1]

    def batch(self, step):
        self.seen.append(step)
        self.state = {"passed": [*self.state["passed"], step]}
        rng = random.Random(step)
        texts = ["".join(rng.choices("abc ", k=rng.randint(1, 9))) for _ in range(4)]
        return [SimpleNamespace(prompt=self.policy.encode([{"role": "user", "content": text}])) for text in texts]

    def rewards(self, episodes, groups):
        rewards = torch.tensor([[c.ids.count(self.letter) / len(c.ids) for c in group] for group in groups])
        changed = self.events.get(self.seen[-1], lambda rewards: None)(rewards)
        return rewards if changed is None else changed, {}, [{"completion": groups[0][0].text}]

    def evaluate(self, when, step):
        return [{"step": step, "eval": when, "n": 1, "em": 0.0, "drawn": torch.rand(1).item()}]


def run_toy(tiny, folder, algorithm, events=None, resume=False, spoil=lambda policy: None, **changes):
    """A run from the start, as a script does it. Returns its policy and its task, of which `seen` are the steps."""
    config = algorithm.Config(**{**dict(steps=6, lr=1e-2, warmup=2, group_size=4, max_new_tokens=6, minibatch=2,
                                        checkpoint_every=1), **changes})
    policy = tiny(b=0.0)
    seed_everything(5)
    task = Letters(policy, events or {})
    spoil(policy)
    algorithm.train(policy, task, Run(folder, vars(config), resume=resume), "agent", config)
    return policy, task


def stopped_toy(tiny, folder, algorithm, error, **options):
    tasks = []
    with pytest.raises(error) as stop:
        run_toy(tiny, folder, algorithm, spoil=lambda policy: tasks.append(policy), **options)
    return stop.value


def left(folder):
    """All that counts of a run: its lines without the seconds, its samples, its adapter to the byte."""
    rows = [{key: value for key, value in row.items() if key != "seconds"}
            for row in read_rows(folder / "metrics.jsonl")]
    return rows, *((folder / name).read_bytes() for name in (
        "samples.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder):
    """whole(tiny, algorithm): what a run that nobody disturbed leaves."""
    found = {}

    def of(tiny, algorithm):
        if algorithm not in found:
            folder = tmp_path_factory.mktemp("whole")
            run_toy(tiny, folder, algorithm)
            found[algorithm] = left(folder)
        return found[algorithm]
    return of


@pytest.fixture(autouse=True)
def hears_ctrl_c():
    """A process that a script starts in the background ignores Ctrl-C: here it is heard."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------ Ctrl-C

def ctrl_c(times):
    return lambda rewards: [signal.raise_signal(signal.SIGINT) for _ in range(times)] and None


@BOTH
@pytest.mark.parametrize("times, done", [(1, 3), (2, 2)])
def test_ctrl_c_lets_the_step_end_and_a_second_one_does_not(tiny, tmp_path, whole, capfd, algorithm, times, done):
    before = signal.getsignal(signal.SIGINT)
    stopped_toy(tiny, tmp_path, algorithm, KeyboardInterrupt, events={3: ctrl_c(times)}, checkpoint_every=2)
    assert signal.getsignal(signal.SIGINT) is before and "Ctrl-C again stops at once" in capfd.readouterr().err
    assert Run(tmp_path, {}, resume=True).load()[0] == done and not (tmp_path / "adapter").exists()
    _, task = run_toy(tiny, tmp_path, algorithm, resume=True, checkpoint_every=2)
    assert task.seen == list(range(done + 1, 7)) and task.state == {"passed": [1, 2, 3, 4, 5, 6]}
    assert left(tmp_path) == whole(tiny, algorithm)


@pytest.mark.parametrize("argv, again", [
    (["train_manager.py", "--out", "a b", "--overwrite"], "python train_manager.py --out 'a b' --resume"),
    (["train_manager.py", "--resume", "--steps", "9"], "python train_manager.py --steps 9 --resume")])
def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, argv, again):
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        exit_cleanly(ctrl_c_now)
    assert stop.value.code == 130 and capsys.readouterr().err == f"\nstopped; to go on: {again}\n"


def ctrl_c_now():
    signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------------------------------------ numbers

NAN = {step: lambda rewards: rewards * float("nan") for step in range(2, 20)}


@BOTH
def test_updates_that_are_not_finite_are_skipped_and_five_in_a_row_are_the_end(tiny, tmp_path, algorithm):
    error = stopped_toy(tiny, tmp_path, algorithm, UsageError, events=NAN, steps=20, checkpoint_every=100)
    assert "5 steps in a row" in str(error) and "advantages" in str(error) and "--lr" in str(error)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval" not in row]
    assert [row["skipped"] > 0 for row in rows] == [False] + [True] * 5
    assert {row["not_finite_in"] for row in rows[1:]} == {"advantages"}
    step, tensors, _ = Run(tmp_path, {}, resume=True).load()
    assert step == 6 and all(tensor.isfinite().all() for tensor in tensors.values())
    four = {step: NAN[step] for step in (2, 3, 4, 5, 7)}  # never five in a row
    run_toy(tiny, tmp_path / "four", algorithm, events=four, steps=8)
    skipped = [row["skipped"] > 0 for row in read_rows(tmp_path / "four/metrics.jsonl") if "eval" not in row]
    assert skipped == [False, True, True, True, True, False, True, False]


@BOTH
def test_a_skipped_update_changes_nothing_and_names_the_tensor(tiny, tmp_path, algorithm):
    names = tiny().names("agent")
    policy, _ = run_toy(
        tiny, tmp_path, algorithm, steps=2, events=dict.fromkeys(
            (1, 2), lambda rewards: torch.linspace(0, 1, rewards.numel()).reshape(rewards.shape)),
        spoil=lambda policy: policy.parameters("agent")[4].register_hook(lambda slope: slope * float("inf")))
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval" not in row]
    assert names[4] == "model.layers.0.self_attn.v_proj.lora_A"
    assert [row["not_finite_in"] for row in rows] == [f"the gradient of {names[4]}"] * 2
    assert all(row["skipped"] >= 2 and row["grad_norm"] == 0 for row in rows)
    assert all(map(torch.equal, policy.parameters("agent"), tiny(b=0.0).parameters("agent")))
    assert not any(name.startswith("optimizer") for name in Run(tmp_path, {}, resume=True).load()[1])


def out_of_memory(rewards):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


@BOTH
def test_a_full_gpu_costs_the_step_and_one_line(tiny, tmp_path, capsys, algorithm):
    with pytest.raises(SystemExit) as stop:
        exit_cleanly(lambda: run_toy(tiny, tmp_path, algorithm, events={4: out_of_memory}, checkpoint_every=100))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error: CUDA out of memory. Tried to allocate 2.00 GiB: lower --micro-" in line
    assert "--resume" in line and "capacity" not in line
    _, task = run_toy(tiny, tmp_path, algorithm, resume=True, checkpoint_every=100)
    assert task.seen == [4, 5, 6] and [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [
        0, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("algorithm", [grpo, ppo])
def test_a_gpu_that_is_full_between_two_updates_of_a_step_leaves_no_half_step(tiny, tmp_path, monkeypatch, algorithm):
    """Otherwise the checkpoint would hold the first of them, under the name of the step before."""
    before, calls, second = algorithm.first_not_finite, [], []

    def full(named):  # called once an update
        calls.extend(second)
        return out_of_memory(None) if len(calls) == 2 else before(named)
    monkeypatch.setattr(algorithm, "first_not_finite", full)
    with pytest.raises(torch.OutOfMemoryError):
        run_toy(tiny, tmp_path, algorithm, minibatch=1, events={
            2: lambda rewards: second.append(2) or torch.rand_like(rewards)})
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00001"]


# ------------------------------------------------------------------------------------------------ full disks

@pytest.fixture
def limit():
    """limit(n): from then on no file may grow beyond n bytes, as under a quota; the system itself refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@BOTH
@pytest.mark.parametrize("size, step", [(0, 3), (20_000, 3), (0, 6)])  # no line fits, no checkpoint, no adapter
def test_a_disk_that_fills_up(tiny, tmp_path, whole, limit, monkeypatch, algorithm, size, step):
    saved = algorithm.save

    def save_then_fill(run, done, *rest):
        saved(run, done, *rest)
        if done == 6:
            limit(size)
    if step == 6:  # the last checkpoint is there, and the adapter alone does not fit
        monkeypatch.setattr(algorithm, "save", save_then_fill)
    events = {3: lambda rewards: limit(size)} if step == 3 else {}
    error = stopped_toy(tiny, tmp_path, algorithm, UsageError, events=events)
    assert str(tmp_path) in str(error) and "cannot be written" in str(error) and "\n" not in str(error)
    assert "too large" in str(error).lower()
    limit(resource.RLIM_INFINITY)
    assert Run(tmp_path, {}, resume=True).load()[0] == (2 if step == 3 else 6)
    monkeypatch.setattr(algorithm, "save", saved)
    run_toy(tiny, tmp_path, algorithm, resume=True)
    assert left(tmp_path) == whole(tiny, algorithm)


def test_a_small_disk(tiny, tmp_path, whole):
    """The same on a file system of 400 kB, where this process may mount one."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        ballast = tmp_path / "ballast"
        error = stopped_toy(tiny, tmp_path / "run", grpo, UsageError, events={
            3: lambda rewards: fill(ballast)})
        assert os.strerror(errno.ENOSPC) in str(error)
        ballast.unlink()
        assert Run(tmp_path / "run", {}, resume=True).load()[0] == 2
        run_toy(tiny, tmp_path / "run", grpo, resume=True)
        assert left(tmp_path / "run") == whole(tiny, grpo)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def fill(path):
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


def test_a_bank_on_a_full_disk(tmp_path, limit):
    bank, path = MemoryBank(make_embedder("hash")), tmp_path / "bank.json"
    bank.add("Jon has a dog.", "Jon", "")
    bank.save(path)
    bank.add("Jon has a cat.", "Jon", "")
    limit(100)
    with pytest.raises(UsageError, match="bank.json: the memory bank cannot be written .File too large"):
        bank.save(path)
    limit(resource.RLIM_INFINITY)
    assert len(MemoryBank.load(path, make_embedder("hash"))) == 1


# ------------------------------------------------------------------------------------------------ one run, one folder

def test_a_second_run_is_refused_by_the_name_of_the_first(tmp_path, capfd):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.write(tell, b"x")
            signal.pause()
    assert os.read(ready, 1) == b"x"
    with pytest.raises(UsageError, match=f"is in use by process {child} on ") as error, locked(tmp_path):
        pass
    args = SimpleNamespace(out=str(tmp_path), resume=True, overwrite=False)
    with pytest.raises(UsageError, match=f"process {child}"):
        runs.check_out(args)
    assert "\n" not in str(error.value)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    runs.check_out(args)  # nothing is left to clear away
    for _ in range(2):
        with locked(tmp_path):
            assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_where_there_are_no_locks_one_is_told(tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(runs.fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ kills

@pytest.mark.parametrize("flags", [["--signals", "KILL"], ["--signals", "INT", "--algo", "ppo", "--bank", "self"]],
                         ids=["kill", "interrupt"])
def test_killed_at_random_moments(tmp_path, flags):
    """As many as there is time for; `python tests/benchmarks/kills.py` has twenty of each on runs of default size."""
    small = "--batch-size 3 --group-size 3 --steps 3 --eval 0 --refresh 2 --max-new-tokens 20 --window 4".split()
    done = subprocess.run([sys.executable, ROOT / "tests/benchmarks/kills.py", "--kills", "2", "--folder", tmp_path,
                           *flags, *small], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["kills"] == last["equal"] == 2
