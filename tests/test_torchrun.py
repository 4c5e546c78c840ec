"""The Manager's episodes and rewards in two processes, and whole scripts under torchrun."""
import json
import sys

import torch
from processes import ROOT, finished, torchrun

import train_manager
from data import TINY
from policy import Completion, Policy
from support.distributed import distributed_main, rank
from support.run import read_rows

MANAGER = ["--eval", "0", "--steps", "2", "--batch-size", "5", "--refresh", "1", "--bank", "base", "--window", "3",
           "--max-new-tokens", "24"]


def rewarded():
    """A batch of the Manager's episodes on banks that the model builds, and the rewards of given outputs."""
    args = train_manager.arguments(MANAGER)
    policy = Policy.load(TINY, device="cpu")
    policy.add_adapter("manager", 4, 8)
    task = train_manager.ManagerTask(policy, args)
    episodes = task.batch(1)
    texts = ['[{"event": "NOOP"}]', "nonsense"]
    groups = [[Completion([5], [0.0], True, text) for text in (json.dumps([{"event": "ADD", "text": one.turn.text}]),
                                                               *texts)] for one in episodes]
    rewards, extra, samples = task.rewards(episodes, groups)
    return [[one.prompt for one in episodes], rewards.tolist(), extra, samples, task.state]


def test_episodes_and_rewards_are_the_same_in_all_processes(tmp_path):
    done = finished(torchrun(__file__, tmp_path))
    assert done.returncode == 0, done.err
    first, second = (torch.load(tmp_path / f"found-{i}", weights_only=True) for i in (0, 1))
    prompts, rewards, extra, samples, state = first
    assert first == second == json.loads(json.dumps(rewarded()))
    assert len(prompts) == 5 and samples and extra["bank_size"] > 0 and 0 < extra["invalid_rate"] < 1
    assert len({len(prompt) for prompt in prompts}) > 1 and {len(row) for row in rewards} == {3}


def test_a_script_in_two_processes_writes_one_run_and_resumes(tmp_path):
    flags = ["--steps", "2", "--eval", "0", "--batch-size", "3", "--group-size", "2", "--refresh", "1",
             "--max-new-tokens", "24", "--out", tmp_path / "run"]
    done = finished(torchrun(ROOT / "train_manager.py", *flags))
    assert done.returncode == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == f"manager by grpo, seed 0, into {tmp_path / 'run'}" and len(lines) == 4
    assert [line[:10] for line in lines[1:3]] == ["step   1/2", "step   2/2"]
    assert {path.name for path in (tmp_path / "run").iterdir()} - {"curve.png"} == {
        "adapter", "checkpoint", "config.json", "lock", "metrics.jsonl", "samples.jsonl"}
    assert json.loads((tmp_path / "run/config.json").read_text())["processes"] == 2
    more = finished(torchrun(ROOT / "train_manager.py", *flags, "--steps", "3", "--resume"))
    assert more.returncode == 0, more.err
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and len(read_rows(tmp_path / "run/samples.jsonl")) == 9


def test_an_error_is_printed_once_and_ends_all_processes(tmp_path):
    done = finished(torchrun(ROOT / "train_manager.py", "--model", "./nowhere", "--out", tmp_path / "run"))
    assert done.returncode != 0 and done.err.count("train_manager.py: error:") == 1 and "Traceback" not in done.out
    assert "no config.json there" in done.err and not (tmp_path / "run").exists()


if __name__ == "__main__":
    distributed_main(lambda: torch.save(json.loads(json.dumps(rewarded())), f"{sys.argv[1]}/found-{rank()}"))()
