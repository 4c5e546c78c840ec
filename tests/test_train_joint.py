"""Both agents together: each step is one of the Manager's script and one of the Answer Agent's."""
import json
import re

import pytest
import torch
from toys import rows_of

import answer
import grpo
import manager
import train_answer
import train_joint
import train_manager
from data import UsageError
from policy import Policy
from support import cli
from support.loop import Loop
from support.run import Run, read_rows, warn_once

MANAGER = ["--batch-size", "3", "--group-size", "3", "--trajectories", "0"]
ANSWER = ["--batch-size", "2", "--group-size", "2", "--minibatch", "0", "--max-new-tokens", "40"]
QUICK = ["--eval", "0", "--dialogues", "1", "--checkpoint-every", "1", "--manager", " ".join(MANAGER),
         "--answer", " ".join(ANSWER)]


@pytest.fixture(autouse=True, scope="module")
def short_conversations():
    patch, before = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.setattr(train_answer, "NUM_TURNS", 8)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    patch.undo()


def test_the_first_step_of_the_manager_is_that_of_its_own_script(tmp_path):
    """At first the other agent's adapter changes nothing, so its answers are those of the base model."""
    train_joint.main([*QUICK, "--steps", "1", "--out", str(tmp_path / "joint")])
    train_manager.main([*MANAGER, "--eval", "0", "--steps", "1", "--out", str(tmp_path / "alone")])
    joint, alone = rows_of(tmp_path / "joint")[0], rows_of(tmp_path / "alone")[0]
    own = {key: value for key, value in alone.items() if key not in ("step", "lr", "seconds")}
    assert own == {key: joint[f"manager_{key}"] for key in own}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "joint/adapter/manager" / name).read_bytes() == (
            tmp_path / "alone/adapter" / name).read_bytes()
    assert joint["reward"] == pytest.approx((joint["manager_reward"] + joint["answer_reward"]) / 2, abs=1e-5)
    agents = [row["agent"] for row in read_rows(tmp_path / "joint/samples.jsonl")]
    assert agents == ["manager"] * 3 + ["answer"] * 2
    policy = Policy.load(train_joint.arguments([])[0].model)
    for name in ("manager", "answer"):
        policy.load_adapter(name, tmp_path / "joint/adapter" / name)


def test_each_agent_is_rewarded_by_the_other_as_it_is(tmp_path, monkeypatch):
    """The Manager's rewards come from the adapter "answer", and the banks of the Answer Agent from "manager"."""
    calls, generate, build, step = [], answer.generate_answers, manager.build_banks, grpo.train_step
    monkeypatch.setattr(answer, "generate_answers", lambda policy, prompts, adapter, length: calls.append(
        ("answers", adapter)) or generate(policy, prompts, adapter, length))
    monkeypatch.setattr(manager, "build_banks", lambda agent, *rest, **options: calls.append(
        ("banks", agent.adapter)) or build(agent, *rest, **options))
    monkeypatch.setattr(grpo, "train_step", lambda policy, optimizer, task, name, *rest: calls.append(
        ("step", name)) or step(policy, optimizer, task, name, *rest))
    train_joint.main([*QUICK, "--steps", "3", "--refresh", "2", "--out", str(tmp_path / "run")])
    during = [call for call in calls[calls.index(("step", "manager")):] if call != ("banks", None)]
    first, second = [("step", "manager"), ("answers", "answer"), ("step", "answer")], [("banks", "manager")]
    assert during[:3 * 3 + 2] == [*first, *second, *first, *first, *second]
    moved = [sum(x.abs().sum() for x in torch.load(path, weights_only=True)["parameters"])
             for path in sorted((tmp_path / "run/checkpoint").glob("*.pt"))]
    assert len(moved) == 2 and moved[0] != moved[1]


def test_the_first_step_tells_which_agent_cannot_learn(tmp_path, capsys):
    warn_once.cache_clear()
    train_joint.main([*QUICK, "--manager", " ".join([*MANAGER, "--max-new-tokens", "2"]), "--steps", "1",
                      "--out", str(tmp_path / "run")])
    notes = capsys.readouterr().err
    assert "note: step 1, manager: 100% of the completions were cut off at --max-new-tokens 2" in notes
    assert "step 1, answer: 100% of the completions" not in notes


@pytest.mark.parametrize("stopped_after", [1, 2])
def test_a_resumed_run_continues_with_the_same_numbers(tmp_path, monkeypatch, stopped_after):
    """Banks of a refresh are kept, although the Manager has changed since."""
    flags = [*QUICK, "--refresh", "2", "--steps", "4", "--out"]
    train_joint.main([*flags, str(tmp_path / "whole")])
    step, done = grpo.train_step, []

    def interrupted(policy, optimizer, task, name, config, number, *rest):
        done.append(number)
        if len(done) == 2 * stopped_after + 2:  # between the two agents of the next step
            raise KeyboardInterrupt
        return step(policy, optimizer, task, name, config, number, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_joint.main([*flags, str(tmp_path / "parts")])
    train_joint.main([*flags, str(tmp_path / "parts"), "--resume"])
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    for name in ("samples.jsonl", "adapter/manager/adapter_model.safetensors",
                 "adapter/answer/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_held_out_results_of_both_agents_use_both(tmp_path):
    args, settings = train_joint.arguments([*QUICK, "--eval", "1"])
    policy = Policy.load(args.model)
    for name in ("manager", "answer"):
        policy.add_adapter(name, 4, 8)
    task = train_joint.JointTask(policy, settings, args)
    rows = task.evaluate("untrained", 0)
    assert [(row["agent"], row["eval"]) for row in rows] == [
        ("manager", "untrained"), ("manager", "add-all"), ("manager", "noop"), ("manager", "oracle"),
        ("answer", "untrained")]
    for layer in policy.layers.values():  # a Manager that writes noise: the banks of the next evaluation are others
        torch.nn.init.normal_(layer.adapters["manager"][1], std=0.5)
    after = task.evaluate("trained", 1)
    assert after[-1]["agent"] == "answer" and after[-1]["bank_size"] != rows[-1]["bank_size"]
    Run(tmp_path, {}).report(after)
    assert [row["agent"] for row in read_rows(tmp_path / "held_out.jsonl")] == ["manager", "answer"]
    state = json.loads(json.dumps(task.state))
    task.state = {"manager": {"pool": [1]}, "answer": {"first": 3}}
    assert task.agents["manager"].state == {"pool": [1]} and task.agents["answer"].state == {"first": 3}
    assert set(state) == {"manager", "answer"}


def test_the_flags_of_each_script():
    args, settings = train_joint.arguments(["--steps", "7", "--seed", "2", "--manager", "--lr 0.5 --bank trajectory "
                                            "--trajectories 4", "--answer", "--memories 9"])
    own, other = settings["manager"], settings["answer"]
    assert (own.steps, own.seed, own.lr, own.trajectories, own.eval) == (7, 2, 0.5, 4, 32)
    assert (other.steps, other.seed, other.memories, other.eval, other.lr) == (7, 2, 9, 8, 1e-3)
    assert own.answer_adapter and other.manager_adapter and other.bank == "manager" and args.out == "runs/joint"
    real = train_joint.arguments(["--model", "Qwen/X", "--data", "locomo", "--eval", "2"])[1]
    assert real["manager"].bank == "base" and real["manager"].memories == real["answer"].memories == 60
    assert real["answer"].bank == "manager" and {one.eval for one in real.values()} == {2}


def test_a_joint_run_tells_the_defaults_of_each_agent(capsys):
    args, settings = train_joint.arguments(["--data", "locomo"])
    cli.announce(args, *settings.values())
    first, own, other = capsys.readouterr().out.splitlines()
    assert first == "joint by grpo, seed 0, into runs/joint"
    assert own.startswith("defaults of the manager agent for this model and data: --") and "--linked mean" in own
    assert other.startswith("defaults of the answer agent for") and "--linked" not in other


@pytest.mark.parametrize("flags, message", [
    (["--algo", "ppo"], "--algo ppo: train_joint.py trains with grpo"),
    (["--manager", "--lr '1"], "--manager --lr '1: "),
    (["--manager", "--steps 3"], "--steps: not inside --manager or --answer"),
    (["--answer", "--algo sft"], "--algo: not inside"),
    (["--manager", "--bank trajectory --trajectories 0"], "--bank trajectory needs --trajectories 1"),
    (["--answer", "--init-adapter x"], "--init-adapter: train_joint.py trains two new adapters"),
    (["--manager", "--answer-adapter x"], "--answer-adapter: train_joint.py trains two new adapters"),
    (["--answer", "--lr 1 --manager-adapter=x"], "--manager-adapter: train_joint.py trains two new adapters"),
    (["--answer", "--bank turns"], "--bank turns has no Manager: leave it out"),
    (["--answer=--no-distill"], "--manager and --answer differ in --distill"),
    (["--manager", "--lr 1 --no-distill", "--answer=--distill"], "--manager and --answer differ in --distill"),
    (["--refresh", "0"], "--refresh 0: must be")])
def test_wrong_flags(flags, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        train_joint.arguments(flags)


def test_an_abbreviation_cannot_give_the_agents_different_steps(capsys):
    with pytest.raises(SystemExit):
        train_joint.arguments(["--manager", "--step 3"])
    assert "unrecognized arguments: --step 3; did you mean --steps?" in capsys.readouterr().err


def test_each_agent_has_its_own_schedule(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(grpo, "train_step", lambda policy, optimizer, *_: found.append(
        optimizer.param_groups[0]["lr"]) or ({"reward": 0.0, "skipped": 0}, []))
    train_joint.main(["--eval", "0", "--steps", "4", "--manager", "--lr 1 --warmup 2", "--answer",
                      "--lr 8 --warmup 0 --schedule constant", "--out", str(tmp_path / "run")])
    assert found == pytest.approx([0.5, 8, 0.75, 8, 0.5, 8, 0.25, 8])


@pytest.mark.parametrize("updated", [0, 1])
def test_an_update_of_either_agent_is_counted(updated):
    """Else a run that ends in the middle of a step would save half a step: one agent has made more updates before."""
    parts = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]) for _ in range(2)]
    loop = Loop(None, None, None, None)
    loop.optimizer = train_joint.Optimizers(parts)
    counts = []
    for i in (0, 1, 1, 1, updated):
        parts[i].param_groups[0]["params"][0].grad = torch.ones(2)
        parts[i].step()
        counts.append(loop.num_updates())
    assert counts == [1, 2, 3, 4, 5]


def test_optimizers_as_one():
    """Learning rates that the loop sets reach both, also after a checkpoint was loaded."""
    def make():
        own = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 2)]
        return own, [torch.optim.AdamW([x], lr=1.0) for x in own]
    parameters, parts = make()
    both = train_joint.Optimizers(parts)
    parameters[1].grad = torch.ones(2)
    parts[1].step()
    _, others = make()
    again = train_joint.Optimizers(others)
    again.load_state_dict(both.state_dict())
    for group in again.param_groups:
        group["lr"] = 0.25
    assert [one.param_groups[0]["lr"] for one in others] == [0.25, 0.25]
    assert [int(moments["step"]) for moments in again.state.values()] == [1]
