"""Two processes do what one does: steps, rewards, runs that are stopped and resumed; scripts under torchrun."""
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
import ppo
import sft
import train_manager
from data import TINY
from policy import Completion, Policy
from support.distributed import (
    divide,
    gather,
    is_main,
    on_main,
    rank,
    seed_apart,
    share,
    sum_over_ranks,
    together,
    world,
)
from support.run import Run, read_rows, seed_everything

ROOT = Path(__file__).parents[1]
TEXTS, G = ["Hi", "What is it?", "Spell a word"], 4  # three prompts: of two processes one has two
REWARDS = [[1.0, 0, 0.5, 0], [0, 0, 1, 0], [0.2, 0.4, 0.6, 0.9]]
SAME = [[1.0] * G]
PLAIN = dict(steps=1, lr=0.1, warmup=0, group_size=G, max_new_tokens=7, temperature=0.8, beta=0.1, minibatch=0)
MANY = dict(epochs=2, minibatch=2, micro_batch_tokens=60, loss_mean="token")
CASES = {  # name: algorithm, rewards, settings
    "grpo": (grpo, REWARDS, {}),
    "grpo in many parts": (grpo, REWARDS, MANY),
    "grpo, nothing to learn from one process's prompts": (grpo, REWARDS[:1] + SAME * 2, {}),
    "grpo, nothing to learn": (grpo, SAME * 3, {}),
    "grpo, one gradient is not finite": (grpo, REWARDS, {"spoiled": True}),
    "ppo": (ppo, REWARDS, {}),
    "ppo in many parts": (ppo, REWARDS, MANY),
    "ppo, minibatches of one": (ppo, REWARDS, {"minibatch": 1}),
    "ppo, one gradient is not finite": (ppo, REWARDS, {"spoiled": True}),
}
MANAGER = ["--eval", "0", "--steps", "2", "--batch-size", "5", "--refresh", "1", "--bank", "base", "--window", "3",
           "--max-new-tokens", "24"]


def torchrun(*command, **options):
    """Starts a script in two processes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             *map(str, command)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **options)


def finished(process):
    out, err = process.communicate(timeout=900)
    return SimpleNamespace(returncode=process.returncode, out=out, err=err)


# ------------------------------------------------------------------------------------------------ what both do

def policy_of(folder):
    torch.set_num_threads(1)
    policy = Policy.load(folder, device="cpu")
    torch.manual_seed(1)
    policy.add_adapter("agent", rank=4, alpha=8)
    for parameter in policy.parameters("agent")[1::2]:
        torch.nn.init.normal_(parameter, std=0.2)
    return policy


def encoded(policy, texts=TEXTS):
    return [policy.encode([{"role": "user", "content": text}]) for text in texts]


class Fixed:
    """Given prompts, completions and rewards."""
    state = {}

    def __init__(self, policy, groups, rewards, spoiled):
        self.prompts, self.given = encoded(policy), rewards
        if spoiled:  # a ratio of e^1000, in the last group alone
            one = groups[-1][0]
            groups = [*groups[:-1], [Completion(one.ids, [-1000.0] * len(one.ids), True, ""), *groups[-1][1:]]]
        self.groups = dict(zip(map(tuple, self.prompts), groups, strict=True))
        policy.sample = lambda prompts, *_: [self.groups[tuple(prompt)] for prompt in prompts]

    def batch(self, step):
        return [SimpleNamespace(prompt=prompt) for prompt in self.prompts]

    def rewards(self, episodes, groups):
        assert groups == list(self.groups.values()), "of all prompts, in their order"
        return torch.tensor(self.given), {}, []


def step(folder, groups, algorithm, rewards, settings):
    """(adapters, gradients, metrics) after one step."""
    settings = dict(settings)
    policy, spoiled = policy_of(folder), settings.pop("spoiled", False)
    task, parameters = Fixed(policy, groups, rewards, spoiled), policy.parameters("agent")
    config = algorithm.Config(**PLAIN | settings)
    if algorithm is ppo:
        critic = ppo.Critic(policy, like="agent")
        for parameter in critic.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        optimizer = torch.optim.SGD([{"params": parameters}, {"params": list(critic.parameters())}])
        parameters = [*parameters, *critic.parameters()]
        found = ppo.train_step(policy, critic, task, optimizer, "agent", config, 1, random.Random(0))
    else:
        optimizer = torch.optim.SGD(parameters)
        found = grpo.train_step(policy, task, optimizer, "agent", config, 1, random.Random(0))
    gradients = [x.new_zeros(x.shape) if x.grad is None else x.grad for x in parameters]
    return [x.detach() for x in parameters], gradients, {**found[0], "seconds": 0}


def sft_step(folder, groups):
    policy = policy_of(folder)
    parameters, completions = policy.parameters("agent"), [group[0].ids for group in groups]
    found = sft.update(policy, torch.optim.SGD(parameters, lr=0.1), encoded(policy), completions, "agent",
                       sft.Config(micro_batch_tokens=1))
    return [x.detach() for x in parameters], [x.grad for x in parameters], found


def rewarded():
    """A batch of the Manager's on banks that the model builds, and what its outputs would earn."""
    args = train_manager.arguments(MANAGER)
    policy = Policy.load(TINY, device="cpu")
    policy.add_adapter("manager", 4, 8)
    task = train_manager.ManagerTask(policy, args)
    asked = task.score
    task.score = lambda triples: shared.extend(triples) or asked(triples)
    shared, episodes = [], task.batch(1)
    texts = ['[{"event": "NOOP"}]', "nonsense"]
    groups = [[Completion([5], [0.0], True, text) for text in (json.dumps([{"event": "ADD", "text": one.turn.text}]),
                                                               *texts)] for one in episodes]
    rewards, extra, samples = task.rewards(episodes, groups)
    return shared, [[one.prompt for one in episodes], rewards.tolist(), extra, samples, task.state]


def drawn():
    """Random numbers in steps 1, 1 and 2."""
    torch.manual_seed(7)
    return [seed_apart(3, number) or torch.rand(1).item() for number in (1, 1, 2)]


class Letters:
    """A toy task: the reward is the share of the letter e. At step `stop` one process alone hears Ctrl-C."""

    def __init__(self, policy, stop=None):
        self.policy, self.stop, self.state = policy, stop, {"passed": []}
        self.letter = policy.encode([{"role": "user", "content": "e"}])[1]

    def batch(self, number):
        self.state = {"passed": [*self.state["passed"], number]}
        if number == self.stop and rank() == 1:
            signal.raise_signal(signal.SIGINT)
        texts = ["".join(random.Random(f"{number} {i}").choices("abc ", k=i + 2)) for i in range(3)]
        return [SimpleNamespace(prompt=prompt) for prompt in encoded(self.policy, texts)]

    def rewards(self, episodes, groups):
        return torch.tensor([[c.ids.count(self.letter) / len(c.ids) for c in group] for group in groups]), {}, [
            {"completion": group[0].text} for group in groups]

    def evaluate(self, when, number):
        assert is_main()
        return [{"step": number, "eval": when, "drawn": torch.rand(1).item()}]


def run_toy(folder, algorithm, out, stop=None, resume=False):
    policy = policy_of(folder)
    seed_everything(5)
    task = Letters(policy, stop)
    if rank() == 1:  # starts from other weights, and is given those of main
        torch.nn.init.ones_(policy.parameters("agent")[0])
    config = algorithm.Config(steps=4, group_size=G, max_new_tokens=6, minibatch=2, warmup=0, checkpoint_every=10)
    algorithm.train(policy, task, Run(out, vars(config), resume=resume), "agent", config)
    return task.state["passed"], policy.parameters("agent")


def main(folder):
    """What each of two processes does for the tests below."""
    groups = [[Completion(**one) for one in group] for group in json.loads((folder / "groups").read_text())]
    found = {name: step(folder / "model", groups, *case) for name, case in CASES.items()}
    found["sft"] = sft_step(folder / "model", groups)
    found["rewarded"], found["drawn"] = rewarded(), drawn()
    found["helpers"] = [share([5, 6, 7]), gather(share([5, 6, 7])), on_main(rank), divide(lambda x: x, [3, 1, 3, 2]),
                        sum_over_ranks({"a": rank() + 0.5}), sum_over_ranks(torch.ones(2)).tolist(), world()]
    for algorithm in (grpo, ppo):
        whole, stopped = (folder / f"{name}-{algorithm.__name__}" for name in ("whole", "stopped"))
        passed, weights = run_toy(folder / "model", algorithm, whole)
        with pytest.raises(KeyboardInterrupt):
            run_toy(folder / "model", algorithm, stopped, stop=2)
        again, resumed = run_toy(folder / "model", algorithm, stopped, resume=True)
        found[f"runs of {algorithm.__name__}"] = [passed, again, [x.detach() for x in weights + resumed]]
    torch.save(found, folder / f"found-{rank()}")


# ------------------------------------------------------------------------------------------------ the tests

@pytest.fixture(scope="module")
def both(tiny_folder, tmp_path_factory):
    """(the folder, completions, what each of two processes found)."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "model").symlink_to(tiny_folder)
    policy = policy_of(tiny_folder)
    with policy.using("agent"):
        groups = policy.sample(encoded(policy), G, 7, 0.8)
    (folder / "groups").write_text(json.dumps(groups, default=vars))
    done = finished(torchrun(__file__, folder))
    assert done.returncode == 0, done.err
    return folder, groups, [torch.load(folder / f"found-{i}", weights_only=True) for i in (0, 1)]


def assert_same(alone, first, second):
    """The tensors and numbers of one process and of two."""
    for mine, ours, theirs in zip(alone[0] + alone[1], first[0] + first[1], second[0] + second[1], strict=True):
        torch.testing.assert_close(ours, mine, atol=1e-6, rtol=0, equal_nan=True)
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)
    for name, value in alone[2].items():
        close = pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True) if isinstance(value, float) else value
        assert first[2][name] == close and second[2][name] == close, name


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_two_processes_is_that_of_one(both, name):
    folder, groups, found = both
    alone = step(folder / "model", groups, *CASES[name])
    assert_same(alone, found[0][name], found[1][name])
    assert alone[2]["skipped"] == ("finite" in name)
    before = policy_of(folder / "model").parameters("agent")
    moved = max((a - b).abs().max() for a, b in zip(alone[0], before, strict=False))  # the critic's come after
    assert (moved > 1e-3) == (alone[2]["grad_norm"] > 0) == (name[5:] != " nothing to learn" and "finite" not in name)


def test_a_step_of_supervised_learning_too(both):
    folder, groups, found = both
    assert_same(sft_step(folder / "model", groups), found[0]["sft"], found[1]["sft"])


def test_rewards_are_worked_out_together_and_known_to_all(both):
    _, _, found = both
    asked, known = rewarded()
    (first, ours), (second, theirs) = (one["rewarded"] for one in found)
    assert ours == theirs == known and known[2]["bank_size"] > 0 and 0 < known[2]["invalid_rate"] < 1
    assert first and second and set(first) | set(second) == set(asked) and not set(first) & set(second)


def test_the_helpers(both):
    _, _, found = both
    same = [[5, 6, 7], 0, [3, 1, 3, 2], {"a": 2.0}, [2.0, 2.0], 2]
    assert [one["helpers"] for one in found] == [[[5], *same], [[6, 7], *same]]
    assert [share([5, 6]), gather([5]), on_main(rank), divide(list, [3, 3]), world()] == [[5, 6], [5], 0, [3, 3], 1]
    assert sum_over_ranks({"a": 0.1}) == {"a": 0.1} and together(main) is main


def test_each_process_draws_numbers_of_its_own_and_main_those_of_one_alone(both):
    _, _, (main_found, other) = both
    assert main_found["drawn"] == drawn() and len({*drawn(), *other["drawn"]}) == 5
    assert other["drawn"][0] == other["drawn"][1], "they follow from seed, step and rank"


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_run_that_one_process_was_told_to_stop_goes_on_as_if_it_had_not(both, algorithm):
    folder, _, found = both
    for passed, again, weights in (one[f"runs of {algorithm}"] for one in found):
        assert passed == again == [1, 2, 3, 4], "the state of the task came back"
        assert all(map(torch.equal, weights, found[0][f"runs of {algorithm}"][2]))
        assert all(map(torch.equal, weights[:len(weights) // 2], weights[len(weights) // 2:]))
    left = []
    for name in ("whole", "stopped"):
        out = folder / f"{name}-{algorithm}"
        rows = [{**row, "seconds": 0} for row in read_rows(out / "metrics.jsonl")]
        left.append([rows, (out / "samples.jsonl").read_bytes(), *((path.name, path.read_bytes())
                                                                   for path in sorted((out / "adapter").iterdir()))])
    assert left[0] == left[1] and [row["step"] for row in left[0][0]] == [0, 1, 2, 3, 4, 4]
    samples = read_rows(folder / f"whole-{algorithm}" / "samples.jsonl")
    assert len(samples) == 12 and all(math.isfinite(row["reward"]) for row in left[0][0] if "eval" not in row)


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


def test_a_mistake_is_told_once_and_ends_all(tmp_path):
    done = finished(torchrun(ROOT / "train_manager.py", "--model", "./nowhere", "--out", tmp_path / "run"))
    assert done.returncode != 0 and done.err.count("train_manager.py: error:") == 1 and "Traceback" not in done.out
    assert "no config.json there" in done.err and not (tmp_path / "run").exists()


if __name__ == "__main__":
    together(lambda: main(Path(sys.argv[1])))()
