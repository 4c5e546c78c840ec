"""A run's folder: complete after a kill at any moment, and the same numbers after resuming."""
import contextlib
import json
import math
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from data import UsageError
from support.run import Run, append_rows, check_adapter, read_rows

CONFIG = {"steps": 60, "lr": 1e-5, "seed": 3}


class Killed(BaseException):
    """Passes through every `except Exception`, as a kill would."""


def state_of(step):
    return {"parameters": [torch.full((7, 3), float(step))], "task": {"prompts": [step, step + 1]}}


def save(run, step):
    run.save(step, state_of(step))


def assert_loads(found, *steps):
    step, state = found
    assert step in steps and state.keys() == {"parameters", "task"} and state["task"] == state_of(step)["task"]
    assert state["parameters"][0].equal(state_of(step)["parameters"][0])


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
    with pytest.raises(UsageError, match="folder .*file/x cannot be written .Not a directory"):
        Run(tmp_path / "file" / "x", CONFIG)


def test_resuming_warns_about_changed_settings(tmp_path, capsys):
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


def test_line_of_the_terminal(tmp_path):
    metrics = {"reward": 0.7123, "zero_std_rate": 0.12, "kl": 0.0131, "completion_tokens": 21.2,
               "seconds": 1.41, "invalid_rate": 0.03, "ops": {}, "entropy": math.nan, "value_loss": None}
    assert Run(tmp_path, CONFIG).line(12, metrics) == (
        "step  12/60  reward  0.71  zero-std 0.12  kl 0.013  entropy nan  tokens  21  invalid 0.03    1.4 s")


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
    append_rows(path, [{"a": 1}])
    with open(path, "ab") as file:
        file.write(b'{"a": 2')
    append_rows(path, [{"a": 3}, {"a": 4}])
    append_rows(path, [{"a": 5}])
    assert [row["a"] for row in read_rows(path)] == [1, 3, 4, 5] and len(path.read_text().splitlines()) == 5


def test_resuming_warns_about_another_number_of_processes(tmp_path, capsys):
    run = Run(tmp_path, CONFIG)
    save(run, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"processes": 2}))
    Run(tmp_path, CONFIG, resume=True)
    assert "processes 2 -> 1" in capsys.readouterr().err


@pytest.mark.parametrize("key, value", [("agent", "answer"), ("algo", "ppo"), ("model", "other"), ("rank", 8),
                                        ("alpha", 16.0), ("manager.alpha", 16.0), ("init_adapter", "runs/b/adapter"),
                                        ("answer.init_adapter", "j2/adapter/answer")])
def test_resuming_refuses_another_agent_algorithm_or_adapter(tmp_path, key, value):
    settings = CONFIG | {"agent": "manager", "algo": "grpo", "model": "/models/tiny", "rank": 16, "alpha": 32.0,
                         "manager.alpha": 32.0, "init_adapter": "runs/a/adapter",
                         "answer.init_adapter": "runs/j/adapter/answer"}
    run = Run(tmp_path, settings)
    save(run, 1)
    moved = {"model": "/elsewhere/tiny", "init_adapter": "/a/"}  # the name of a model or a run suffices
    Run(tmp_path, settings | moved, resume=True)
    Run(tmp_path, settings, resume=True)
    with pytest.raises(UsageError, match=f"was started with {key} "):
        Run(tmp_path, settings | {key: value}, resume=True)
    with pytest.raises(UsageError, match="has 9 steps already: resume it with --steps 9 or more"):
        save(run, 9)
        Run(tmp_path, settings | {"steps": 8}, resume=True)


@pytest.mark.parametrize("adapter, config, is_refused", [
    ("run", "run", True), ("run/adapter", "run", True), ("run/adapter/answer", "run", True),
    ("run/adapter", ".", False), ("lone/answer", ".", False), ("run/adapter/answer", ".", False)])
def test_an_answer_agent_of_the_other_prompt_is_refused(tmp_path, monkeypatch, adapter, config, is_refused):
    Run(tmp_path / config, {"agent": "joint", "algo": "grpo", "distill": False})
    with pytest.raises(UsageError, match="was trained without dist") if is_refused else contextlib.nullcontext():
        check_adapter(tmp_path / adapter, "answer", True)
    check_adapter(tmp_path / adapter, "answer", False)
    check_adapter(tmp_path / adapter, "manager")
    (tmp_path / adapter).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / adapter)
    with pytest.raises(UsageError, match="was trained without dist") if is_refused else contextlib.nullcontext():
        check_adapter(".", "answer", True)


@pytest.mark.parametrize("adapter", ["run", "run/adapter"])
def test_an_adapter_of_the_other_agent_is_refused(tmp_path, adapter):
    Run(tmp_path / "run", {"agent": "manager", "algo": "grpo"})
    check_adapter(tmp_path / adapter, "manager")
    with pytest.raises(UsageError, match="was trained as manager agent, but is used as answer agent"):
        check_adapter(tmp_path / adapter, "answer", True)


def test_resuming_without_a_checkpoint_starts_again(tmp_path):
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
    """Wrap a function so that the n-th call among those that share the list `calls` raises Killed."""
    def wrapper(*args, **kwargs):
        calls.append(function)
        if len(calls) == n:
            raise Killed
        return function(*args, **kwargs)
    return wrapper


def test_killed_before_every_change_on_disk(tmp_path, monkeypatch):
    n, calls = 0, []
    while n == len(calls):  # kill at the n-th call, until one save takes fewer calls
        n, calls = n + 1, []
        shutil.rmtree(tmp_path)
        run = Run(tmp_path, CONFIG)
        save(run, 1)
        save(run, 2)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name in ("mkdir", "replace", "fsync", "unlink"):
                patch.setattr(os, name, killed_at(n, getattr(os, name), calls))
            save(run, 3)
        run = Run(tmp_path, CONFIG, resume=True)
        assert_loads(run.load(), 2, 3)
        save(run, 4)
        assert_loads(run.load(), 4)
    assert n > 4  # mkdir, fsync, replace, unlink


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
            time.sleep(0.005)  # at least the first new checkpoint, however slow the machine
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


def flip_a_bit(path, place=-9):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"[]"),
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: torch.save([1, 2], path),
    lambda path: torch.save({"parameters": []}, path),
    lambda path: torch.save({"step": 6, "task": Killed}, path),
    lambda path: flip_a_bit(path, path.read_bytes().index(torch.full((2,), 6.0).numpy().tobytes())),
    lambda path: flip_a_bit(path, path.read_bytes().index(b"prompts")),
], ids=["empty", "text", "truncated", "a list", "no step", "a class", "a bit of a tensor", "a bit of a key"])
def test_a_damaged_checkpoint(tmp_path, capsys, damage):
    run = Run(tmp_path, CONFIG)
    for step in (3, 6):
        run.log({"step": step})
        save(run, step)
    damage(tmp_path / "checkpoint" / "step-00006.pt")
    run = Run(tmp_path, CONFIG, resume=True)
    assert_loads(run.load(), 3)
    assert capsys.readouterr().err.count("step-00006.pt is damaged") == 1
    save(run, 6)
    assert_loads(run.load(), 6)
    for path in (tmp_path / "checkpoint").iterdir():
        path.write_bytes(b"") if path.stem == "step-00003" else damage(path)
    with pytest.raises(UsageError, match="is damaged.*no other is intact"):
        Run(tmp_path, CONFIG, resume=True)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1  # the lines that were written stay


def test_a_flipped_bit_never_changes_what_is_loaded(tmp_path):
    run = Run(tmp_path, CONFIG)
    save(run, 3)
    path = tmp_path / "checkpoint" / "step-00003.pt"
    intact = path.read_bytes()
    for place in range(0, len(intact), 7):
        flip_a_bit(path, place)
        with contextlib.suppress(UsageError):
            assert_loads(run.load(), 3)
        path.write_bytes(intact)
