"""A run's folder: whole after a kill at any moment, and the same numbers after resuming."""
import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch

from data import UsageError
from support import run as runs
from support.plots import plot_run, plot_runs, read_run, table_of_runs
from support.run import Run, append, optimizer_tensors, read_rows, restore_optimizer

CONFIG = {"steps": 60, "lr": 1e-5, "seed": 3}


class Killed(BaseException):
    """Passes through every `except` and `finally` that a kill would not reach either."""


def checkpoint(step):
    return {"weight": torch.full((7, 3), float(step))}, {"prompts": [step, step + 1]}


def save(run, step):
    run.save(step, *checkpoint(step))


def assert_loads(found, *steps):
    step, tensors, state = found
    assert step in steps
    assert tensors["weight"].equal(checkpoint(step)[0]["weight"]) and state == checkpoint(step)[1]


def test_config_and_an_existing_run(tmp_path):
    run = Run(tmp_path / "new" / "run", CONFIG)
    config = json.loads((run.folder / "config.json").read_text())
    assert config.items() >= CONFIG.items()
    assert set(config["versions"]) == {"python", "torch", "transformers", "numpy"}
    with pytest.raises(UsageError, match="already holds a run.*--out.*--resume.*--overwrite"):
        Run(run.folder, CONFIG)
    (run.folder / "mine.txt").touch()
    Run(run.folder, CONFIG, overwrite=True)
    assert {path.name for path in run.folder.iterdir()} == {"config.json", "mine.txt"}
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file/x cannot be written .Not a directory"):
        Run(tmp_path / "file" / "x", CONFIG)


def test_resuming_tells_what_changed(tmp_path, capsys):
    Run(tmp_path / "none", CONFIG, resume=True)
    assert "holds no run to resume" in capsys.readouterr().err
    Run(tmp_path / "none", {**CONFIG, "lr": 2e-5, "resume": True}, resume=True)
    assert "other settings: lr 1e-05 -> 2e-05\n" in capsys.readouterr().err


def test_log(tmp_path):
    run = Run(tmp_path, CONFIG)
    third, lr = torch.tensor(1 / 3), np.float64(1e-5)
    run.log({"step": 1, "reward": third, "kl": math.nan, "lr": lr, "ops": {"ADD": 2}})
    run.samples([{"step": 1, "prompt": "é\n\ud800", "reward": {"em": 1.0, "judge": math.inf}}] * 2)
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward": 0.333333, "kl": None, "lr": 1e-5, "ops": {"ADD": 2}, "not_finite": ["kl"]}]
    rows = read_rows(tmp_path / "samples.jsonl")
    assert len(rows) == 2 and rows[0]["reward"] == {"em": 1.0, "judge": None, "not_finite": ["judge"]}


def test_line(tmp_path):
    metrics = {"reward": 0.7123, "zero_std_rate": 0.12, "kl": 0.0131, "completion_tokens": 21.2,
               "seconds": 1.41, "invalid_rate": 0.03, "ops": {}, "entropy": math.nan, "value_loss": None}
    assert Run(tmp_path, CONFIG).line(12, metrics) == (
        "step  12/60  reward  0.71  zero-std 0.12  kl 0.013  entropy nan  tokens  21  invalid 0.03    1.4 s")


def test_a_line_fits_a_narrow_terminal(tmp_path, monkeypatch):
    every = {key: 0.12 for key in runs.COLUMNS if key not in ("eval", "loss", "n", "em", "f1", "agreement")}
    run = Run(tmp_path, CONFIG)
    monkeypatch.setenv("COLUMNS", "80")
    for agent in ({"selected", "evidence"}, {"bank_size"}):  # the other agent's are absent
        line = run.line(12, {key: value for key, value in every.items() if key not in agent})
        assert len(line) <= 80 and "reward  0.12" in line and "explained  0.12" in line and "0.1 s" in line
    monkeypatch.setenv("COLUMNS", "100")  # what is worth least goes first
    assert run.line(12, {"reward": 0.7, "zero_std_rate": 0.1, "kl": 0.01, "clip_rate": 0.0, "entropy": 0.1,
                         "completion_tokens": 21, "bank_size": 6, "seconds": 1}) == (
        "step  12/60  reward  0.70  zero-std 0.10  kl 0.010  entropy 0.10  tokens  21  bank   6.0    1.0 s")


def test_resuming_gives_the_files_of_a_run_that_was_not_killed(tmp_path):
    def train(run, first, last):
        for step in range(first, last):
            run.log({"step": step, "reward": 1 / step})
            run.samples([{"step": step, "text": f"é {step}"}] * 2)
            if step % 3 == 0:
                save(run, step)

    train(Run(tmp_path / "a", CONFIG), 1, 10)
    train(Run(tmp_path / "b", CONFIG), 1, 6)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / "b" / name, "ab") as file:
            file.write(b'{"step": 2, "torn\xc3')
    run = Run(tmp_path / "b", CONFIG, resume=True)
    assert_loads(run.load(), 3)
    train(run, 4, 10)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    path = tmp_path / "x.jsonl"
    append(path, [{"a": 1}])
    with open(path, "ab") as file:
        file.write(b'{"a": 2')
    append(path, [{"a": 3}, {"a": 4}])
    append(path, [{"a": 5}])
    assert [row["a"] for row in read_rows(path)] == [1, 3, 4, 5] and len(path.read_text().splitlines()) == 5


def test_another_number_of_processes_is_told(tmp_path, capsys):
    run = Run(tmp_path, CONFIG)
    save(run, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"processes": 2}))
    Run(tmp_path, CONFIG, resume=True)
    assert "processes 2 -> 1" in capsys.readouterr().err


def test_without_a_checkpoint_resuming_starts_anew(tmp_path):
    run = Run(tmp_path, CONFIG)
    run.log({"step": 0, "eval": "untrained"})
    run = Run(tmp_path, CONFIG, resume=True)
    assert run.load() is None and read_rows(tmp_path / "metrics.jsonl") == []


def test_two_checkpoints_are_kept(tmp_path):
    run = Run(tmp_path, CONFIG)
    for step in (1, 2, 3, 3, 3):
        save(run, step)
        assert_loads(run.load(), step)
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2


def killed_at(n, function, calls):
    """The function, which raises Killed as the n-th call of those that share the list `calls`."""
    def wrapper(*args, **kwargs):
        calls.append(function)
        if len(calls) == n:
            raise Killed
        return function(*args, **kwargs)
    return wrapper


def test_killed_before_every_change_on_disk(tmp_path, monkeypatch):
    n, calls = 0, []
    while n == len(calls):  # so many calls as it takes to be killed, until one save takes fewer
        n, calls = n + 1, []
        shutil.rmtree(tmp_path)
        run = Run(tmp_path, CONFIG)
        save(run, 1)
        save(run, 2)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name in ("mkdir", "replace", "fsync", "unlink", "rmdir"):
                patch.setattr(os, name, killed_at(n, getattr(os, name), calls))
            save(run, 3)
        run = Run(tmp_path, CONFIG, resume=True)
        assert_loads(run.load(), 2, 3)
        save(run, 4)
        assert_loads(run.load(), 4)
    assert n > 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_sigkill_at_random_moments(tmp_path):
    seen, config = set(), CONFIG | {"steps": 10**6}
    for trial in range(12):
        before = set(tmp_path.glob("checkpoint/step-*"))
        child = os.fork()
        if child == 0:
            try:
                run = Run(tmp_path, config, resume=True)
                for step in range(run.load()[0] + 1 if run.load() else 1, 10**6):
                    run.log({"step": step})
                    save(run, step)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 30
        while not set(tmp_path.glob("checkpoint/step-*")) - before and time.monotonic() < deadline:
            time.sleep(0.005)  # however slow the machine: the first new checkpoint at least
        time.sleep(random.Random(trial).random() / 10)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        found = Run(tmp_path, config, resume=True).load()
        if found:
            assert_loads(found, found[0])
            steps = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
            assert steps == list(range(1, found[0] + 1))
            seen.add(found[0])
    assert len(seen) > 1


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [
    lambda folder: (folder / "tensors.safetensors").write_bytes(b""),
    lambda folder: (folder / "state.json").write_text("[]"),
    lambda folder: (folder / "state.json").unlink(),
    lambda folder: flip(folder / "tensors.safetensors"),
    lambda folder: flip(folder / "state.json"),
])
def test_a_damaged_checkpoint(tmp_path, capsys, harm):
    run = Run(tmp_path, CONFIG)
    for step in (3, 6):
        run.log({"step": step})
        save(run, step)
    harm(tmp_path / "checkpoint" / "step-00006")
    run = Run(tmp_path, CONFIG, resume=True)
    assert_loads(run.load(), 3)
    assert capsys.readouterr().err.count("step-00006 is damaged") == 1
    save(run, 6)
    assert_loads(run.load(), 6)
    for folder in (tmp_path / "checkpoint").iterdir():
        harm(folder)
    with pytest.raises(UsageError, match="is damaged.*no other is whole"):
        Run(tmp_path, CONFIG, resume=True)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1  # what was written stays


def learner():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def update(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 5)).square().mean().backward()
    optimizer.step()


def test_resumed_updates_are_bit_equal(tmp_path):
    """Model, optimizer and random states went through a checkpoint: the next update is the same."""
    model, optimizer = learner()
    rng = random.Random(5)
    rng.gauss(0, 1), np.random.normal()  # each keeps the second of a pair for later
    update(model, optimizer)
    run = Run(tmp_path, CONFIG)
    run.save(1, {**model.state_dict(), **optimizer_tensors(optimizer)},
             {"random": runs.random_state(rng=rng)})
    draws = []
    for _ in range(2):
        update(model, optimizer)
        draws.append([model.weight.tolist(), rng.gauss(0, 1), rng.random(), random.random(),
                      np.random.normal(), torch.rand(1).item()])
        model, optimizer = learner()
        rng = random.Random()
        _, tensors, state = Run(tmp_path, CONFIG, resume=True).load()
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
        restore_optimizer(optimizer, tensors)
        runs.restore_random_state(state["random"], rng=rng)
    assert draws[0] == draws[1]


def test_an_optimizer_of_another_shape(tmp_path):
    model, optimizer = learner()
    assert optimizer_tensors(optimizer) == {}
    update(model, optimizer)
    other = torch.optim.AdamW(torch.nn.Linear(5, 3).parameters())
    with pytest.raises(UsageError, match=r"optimizer.0.exp_avg \(4, 5\) fits no parameter"):
        restore_optimizer(other, optimizer_tensors(optimizer))
    for tensors in ({"adapter.0": torch.zeros(4, 5)}, {}):
        with pytest.raises(UsageError, match=r"checkpoint's adapter.0 is not of shape \(3, 5\)"):
            runs.restore_parameters([torch.nn.Parameter(torch.zeros(3, 5))], tensors)
    restore_optimizer(other, {"critic.0.step": torch.ones(())})  # not its own: nothing to restore
    assert not other.state


def test_seed_everything():
    def draw():
        runs.seed_everything(7)
        return random.random(), np.random.rand(), torch.rand(1).item()
    assert draw() == draw()


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    run = Run(tmp_path, CONFIG)
    assert plot_run(tmp_path) is None  # nothing to draw
    run.log({"step": 0, "eval": "untrained", "em": 0.1})
    for step in range(1, 5):
        run.log({"step": step, "reward": step / 5, "kl": math.nan, "ops": {"ADD": step}, "bank_size": 9})
        assert plot_run(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    runs.note.cache_clear()
    Run(tmp_path, CONFIG).log({"step": 1, "reward": 1.0})
    assert plot_run(tmp_path) is None and plot_run(tmp_path) is None
    assert capsys.readouterr().err.count("pip install matplotlib") == 1


def test_runs_side_by_side(tmp_path):
    for name, algorithm, em in (("a", "grpo", 0.5), ("b", "ppo", 0.75)):
        run = Run(tmp_path / name, CONFIG | {"agent": "manager", "algo": algorithm})
        for step in range(1, 13):
            run.log({"step": step, "reward": step / 12, "seconds": 30,
                     **({"explained_variance": step / 20} if algorithm == "ppo" else {})})
        run.log({"step": 12, "eval": "trained", "em": em, "bank_size": 8.5})
    found = [read_run(tmp_path / name) for name in "ab"]
    assert table_of_runs(found).splitlines()[2:] == [  # 12 steps of half a minute; the mean of .15, .20, ... .60
        "| a: trained | 0.500 | 8.500 | 6.0 |  |", "| b: trained | 0.750 | 8.500 | 6.0 | 0.38 |"]
    with pytest.raises(UsageError, match="is not a run's folder"):
        read_run(tmp_path)
    pytest.importorskip("matplotlib")
    plot_runs(found, tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
