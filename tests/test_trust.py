"""A run is killed, runs out of memory or disk, or gets NaN: nothing is lost, and resuming gives the same files."""
import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toys import files_of, letter_policy, run_letters

import grpo
import ppo
from data import UsageError
from memory import MemoryBank, make_embedder
from support import run as runs
from support.cli import exit_cleanly
from support.loop import Loop
from support.run import Run, folder_lock, read_rows

ROOT = Path(__file__).parents[1]
BOTH = pytest.mark.parametrize("algorithm", [grpo, ppo], ids=["grpo", "ppo"])


def stopped_run(policy, folder, algorithm, error, events=None, **options):
    with pytest.raises(error) as stopped:
        run_letters(policy, folder, algorithm, events, **options)
    return stopped.value


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder):
    """whole(algorithm): the files of a run that was never stopped."""
    found = {}

    def of(algorithm):
        if algorithm not in found:
            folder = tmp_path_factory.mktemp("whole")
            run_letters(letter_policy(tiny_folder, 0.0), folder, algorithm)
            found[algorithm] = files_of(folder)
        return found[algorithm]
    return of


# ------------------------------------------------------------------------------------------------ Ctrl-C

def ctrl_c(times):
    return {("rewards", 3): lambda rewards: [signal.raise_signal(signal.SIGINT) for _ in range(times)] and None}


@BOTH
@pytest.mark.parametrize("times, done", [(1, 3), (2, 2)])
def test_ctrl_c_lets_the_step_end_and_a_second_one_does_not(tiny, tmp_path, whole, capfd, algorithm, times, done):
    before = signal.getsignal(signal.SIGINT)
    stopped = stopped_run(tiny(b=0.0), tmp_path, algorithm, KeyboardInterrupt, ctrl_c(times), checkpoint_every=2)
    assert stopped.__traceback__  # the frames of the run are still alive here
    assert signal.getsignal(signal.SIGINT) is before and "Ctrl-C again stops at once" in capfd.readouterr().err
    assert Run(tmp_path, {}, resume=True).load()[0] == done and not (tmp_path / "adapter").exists()
    task = run_letters(tiny(b=0.0), tmp_path, algorithm, resume=True, checkpoint_every=2)
    assert task.seen == list(range(done + 1, 7)) and task.state == {"passed": [1, 2, 3, 4, 5, 6]}
    assert files_of(tmp_path) == whole(algorithm)


@pytest.mark.parametrize("argv, again", [
    (["train_manager.py", "--out", "a b", "--overwrite"], "python train_manager.py --out 'a b' --resume"),
    (["train_manager.py", "--resume", "--steps", "9"], "python train_manager.py --steps 9 --resume")])
def test_ctrl_c_says_how_to_continue(monkeypatch, capsys, argv, again):
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        exit_cleanly(lambda: signal.raise_signal(signal.SIGINT))
    assert stop.value.code == 130 and capsys.readouterr().err == f"\nstopped; to continue: {again}\n"


# ------------------------------------------------------------------------------------------------ numbers

def nan_at(*steps):
    return {("rewards", step): lambda rewards: rewards * float("nan") for step in steps}


@BOTH
def test_updates_that_are_not_finite_are_refused_and_the_fifth_in_a_row_ends_the_run(tiny, tmp_path, algorithm):
    error = stopped_run(tiny(), tmp_path, algorithm, UsageError, nan_at(*range(2, 20)), steps=20, checkpoint_every=100)
    assert "5 steps in a row" in str(error) and "advantages" in str(error) and "--lr" in str(error)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval" not in row]
    assert [row["skipped"] > 0 for row in rows] == [False] + [True] * 5
    assert {row["not_finite_in"] for row in rows[1:]} == {"advantages"}
    step, state = Run(tmp_path, {}, resume=True).load()
    assert step == 6 and state["optimizer"]["state"] and all(tensor.isfinite().all() for tensor in tensors_in(state))
    run_letters(tiny(), tmp_path / "four", algorithm, nan_at(2, 3, 4, 5, 7), steps=8)  # never five in a row
    skipped = [row["skipped"] > 0 for row in read_rows(tmp_path / "four/metrics.jsonl") if "eval" not in row]
    assert skipped == [False, True, True, True, True, False, True, False]


def tensors_in(state):
    """All tensors of a checkpoint: weights and the optimizer's moments."""
    return [*state["parameters"], *(x for moments in state["optimizer"]["state"].values() for x in moments.values())]


@BOTH
def test_a_refused_update_changes_nothing_and_names_the_tensor(tiny, tmp_path, algorithm):
    policy = tiny()
    names = [name for name, _ in policy.named_parameters("agent")]
    policy.parameters("agent")[4].register_hook(lambda gradient: gradient * float("inf"))
    run_letters(policy, tmp_path, algorithm, steps=2, events=dict.fromkeys(
        (("rewards", 1), ("rewards", 2)), lambda rewards: torch.linspace(0, 1, rewards.numel()).view_as(rewards)))
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval" not in row]
    assert names[4] == "model.layers.0.self_attn.v_proj.lora_A"
    assert [row["not_finite_in"] for row in rows] == [f"the gradient of {names[4]}"] * 2
    assert all(row["skipped"] >= 2 and row["grad_norm"] == 0 for row in rows)
    assert all(map(torch.equal, policy.parameters("agent"), tiny().parameters("agent")))
    assert not Run(tmp_path, {}, resume=True).load()[1]["optimizer"]["state"]


def out_of_memory(rewards):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


@BOTH
def test_a_full_gpu_costs_one_step_and_prints_one_line(tiny, tmp_path, capsys, algorithm):
    with pytest.raises(SystemExit) as stop:
        exit_cleanly(lambda: run_letters(tiny(b=0.0), tmp_path, algorithm, {("rewards", 4): out_of_memory},
                                         checkpoint_every=100))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error: CUDA out of memory. Tried to allocate 2.00 GiB: lower --micro-" in line
    assert "--resume" in line and "capacity" not in line
    task = run_letters(tiny(b=0.0), tmp_path, algorithm, resume=True, checkpoint_every=100)
    assert task.seen == [4, 5, 6] and [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [
        0, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("error", [None, RuntimeError("unexpected pos 64 vs 48"), UsageError("no space left")])
def test_a_checkpoint_is_written_when_the_step_that_did_not_fit_has_freed_its_tensors(
        tiny, tmp_path, monkeypatch, error):
    """If there is no room for it either, the error remains that of the step."""
    held, save = [], Loop.save

    def full(rewards):
        tensor = torch.zeros(9)
        held.append(weakref.ref(tensor))
        return out_of_memory(rewards)

    def save_if_free(self, step):
        held.append(held[0]() is None)
        if error:
            raise error
        save(self, step)
    monkeypatch.setattr(Loop, "save", save_if_free)
    stopped_run(tiny(b=0.0), tmp_path, grpo, torch.OutOfMemoryError, {("rewards", 2): full}, checkpoint_every=9)
    assert held[1:] == [True] and (tmp_path / "checkpoint").exists() == (error is None)


@pytest.mark.parametrize("algorithm", [grpo, ppo])
def test_a_gpu_that_is_full_between_two_updates_of_a_step_saves_no_half_step(tiny, tmp_path, monkeypatch, algorithm):
    """Otherwise the checkpoint would hold the first update under the name of the step before."""
    optimizer_step, calls = algorithm.optimizer_step, []

    def full(*args):
        calls.append(args)
        return out_of_memory(None) if len(calls) == 4 + 2 else optimizer_step(*args)  # in the second step
    monkeypatch.setattr(algorithm, "optimizer_step", full)
    random_rewards = {("rewards", step): torch.rand_like for step in (1, 2)}  # four groups: four updates in a step
    stopped_run(tiny(), tmp_path, algorithm, torch.OutOfMemoryError, random_rewards, minibatch=1, checkpoint_every=9)
    assert len(calls) == 6 and not (tmp_path / "checkpoint").exists()


# ------------------------------------------------------------------------------------------------ full disks

@pytest.fixture
def limit():
    """limit(n): from then on the system refuses to let a file grow beyond n bytes, as under a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@BOTH
@pytest.mark.parametrize("size, step", [(0, 3), (20_000, 3), (0, 6)])  # no room for a line, a checkpoint, the adapter
def test_a_disk_that_fills_up(tiny, tmp_path, whole, limit, monkeypatch, algorithm, size, step):
    save = Run.save

    def save_then_fill(run, done, state):
        save(run, done, state)
        if done == 6:
            limit(size)
    if step == 6:  # the last checkpoint is written; only the adapter does not fit
        monkeypatch.setattr(Run, "save", save_then_fill)
    events = {("rewards", 3): lambda rewards: limit(size)} if step == 3 else {}
    error = stopped_run(tiny(b=0.0), tmp_path, algorithm, UsageError, events)
    assert str(tmp_path) in str(error) and "cannot be written" in str(error) and "\n" not in str(error)
    assert "too large" in str(error).lower()
    limit(resource.RLIM_INFINITY)
    assert Run(tmp_path, {}, resume=True).load()[0] == (2 if step == 3 else 6)
    monkeypatch.setattr(Run, "save", save)
    run_letters(tiny(b=0.0), tmp_path, algorithm, resume=True)
    assert files_of(tmp_path) == whole(algorithm)


def test_a_small_disk(tiny, tmp_path, whole):
    """The same on a file system of 400 kB, where this process may mount one."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        ballast = tmp_path / "ballast"
        events = {("rewards", 3): lambda rewards: fill(ballast)}
        error = stopped_run(tiny(b=0.0), tmp_path / "run", grpo, UsageError, events)
        assert os.strerror(errno.ENOSPC) in str(error)
        ballast.unlink()
        assert Run(tmp_path / "run", {}, resume=True).load()[0] == 2
        run_letters(tiny(b=0.0), tmp_path / "run", grpo, resume=True)
        assert files_of(tmp_path / "run") == whole(grpo)
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

def test_a_second_run_in_the_same_folder_is_refused(tmp_path, capfd):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with folder_lock(tmp_path):
            os.write(tell, b"x")
            signal.pause()
    assert os.read(ready, 1) == b"x"
    with pytest.raises(UsageError, match="is in use by another process: stop it") as error, folder_lock(tmp_path):
        pass
    args = SimpleNamespace(out=str(tmp_path), resume=True, overwrite=False)
    with pytest.raises(UsageError, match="is in use"):
        runs.check_out(args)
    assert "\n" not in str(error.value)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    runs.check_out(args)  # the lock ended with the process
    for _ in range(2):
        with folder_lock(tmp_path), pytest.raises(UsageError, match="is in use"):
            runs.check_out(args)


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", refuse)
    with folder_lock(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ kills

@pytest.mark.parametrize("flags", [["--signals", "KILL"], ["--signals", "INT", "--algo", "ppo", "--bank", "self"]],
                         ids=["kill", "interrupt"])
def test_killed_at_random_moments(tmp_path, flags):
    """Two kills each; `python tests/benchmarks/kills.py` kills twenty runs of the default size."""
    small = "--batch-size 3 --group-size 3 --steps 3 --eval 0 --refresh 2 --max-new-tokens 20 --window 4".split()
    done = subprocess.run([sys.executable, ROOT / "tests/benchmarks/kills.py", "--kills", "2", "--folder", tmp_path,
                           *flags, *small], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["kills"] == last["equal"] == 2
