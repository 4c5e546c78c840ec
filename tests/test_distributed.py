"""Two processes give the results of one: steps, rewards, runs that are stopped and resumed."""
import json
import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import finished, torchrun
from toys import encode_texts, files_of, letter_policy, run_letters

import grpo
import ppo
import sft
import train_manager
from data import TINY
from policy import Completion, Policy
from support.distributed import (
    all_gather,
    all_reduce_gradients,
    all_reduce_sum,
    distributed_main,
    is_rank0,
    local_shard,
    rank,
    rank0_result,
    seed_step,
    world_size,
)
from support.loop import Loop, mean_per_token
from support.rollouts import Played
from support.run import read_rows

TEXTS, G = ["Hi", "What is it?", "Spell a word"], 4  # three prompts: one of two processes has two
REWARDS = [[1.0, 0, 0.5, 0], [0, 0, 1, 0], [0.2, 0.4, 0.6, 0.9]]
SAME = [[1.0] * G]
PLAIN = dict(steps=1, lr=0.1, warmup=0, group_size=G, max_new_tokens=7, temperature=0.8, beta=0.1, minibatch=0,
             loss_mean="completion")
MANY = dict(epochs=2, minibatch=2, micro_batch_tokens=60, loss_mean="token")
CASES = {  # name: algorithm, rewards, settings
    "grpo": (grpo, REWARDS, {}),
    "grpo in many parts": (grpo, REWARDS, MANY),
    "grpo, equal rewards in one process": (grpo, REWARDS[:1] + SAME * 2, {}),
    "grpo, equal rewards": (grpo, SAME * 3, {}),
    "grpo, trajectories": (grpo, REWARDS, {"played": True, "minibatch": 2}),
    "ppo, trajectories": (ppo, REWARDS, {"played": True, "minibatch": 2}),
    "grpo, one gradient is not finite": (grpo, REWARDS, {"spoiled": True}),
    "ppo": (ppo, REWARDS, {}),
    "ppo in many parts": (ppo, REWARDS, MANY),
    "ppo, minibatches of one": (ppo, REWARDS, {"minibatch": 1}),
    "ppo, one gradient is not finite": (ppo, REWARDS, {"spoiled": True}),
}
MANAGER = ["--eval", "0", "--steps", "2", "--batch-size", "5", "--refresh", "1", "--bank", "base", "--window", "3",
           "--max-new-tokens", "24"]


# ------------------------------------------------------------------------------------------------ in each process

class Fixed:
    """Given prompts, completions and rewards."""
    state, played = {}, None

    def __init__(self, policy, groups, rewards, spoiled=False, is_played=False):
        self.prompts, self.given = encode_texts(policy, TEXTS), rewards
        if spoiled:  # a ratio of e^1000, in the last group only
            one = groups[-1][0]
            groups = [*groups[:-1], [Completion(one.ids, [-1000.0] * len(one.ids), True, ""), *groups[-1][1:]]]
        self.groups = groups
        if is_played:  # six outputs with prompts of different lengths
            prompts, some = [prompt + prompt[1:i] for i, prompt in enumerate(self.prompts * 2, 1)], sum(groups, [])
            self.played = Played(prompts, some[:6], torch.tensor([0.0, 1, 0.5, 1, 0, 0]), [*"abcabc"], (1.0, 0.5))
        policy.sample = lambda *_: groups

    def batch(self, step):
        return [SimpleNamespace(prompt=prompt) for prompt in self.prompts]

    def rewards(self, episodes, groups):
        assert groups == self.groups, "all groups, in the order of their prompts"
        return torch.tensor(self.given), {}, []

    def evaluate(self, when, step):
        return []


class FixedLoop(Loop):
    """
    A loop of one step without files; `metrics` holds the line of the log. It steps by SGD: Adam would turn rounding
    errors of small gradients into steps of full size.
    """

    def __init__(self, policy, task, config):
        super().__init__(policy, task, None, config)

    def steps(self, optimizer, first_results=()):
        self.optimizer = torch.optim.SGD([{"params": list(zip(group["param_names"], group["params"], strict=True))}
                                          for group in optimizer.param_groups], lr=0.1)
        if len(optimizer.param_groups) > 1:  # a critic that already estimates something
            torch.manual_seed(2)
            for parameter in optimizer.param_groups[1]["params"]:
                torch.nn.init.normal_(parameter, std=0.3)
        optimizer.step, optimizer.zero_grad = self.optimizer.step, self.optimizer.zero_grad
        yield 1

    def log(self, step, metrics, samples):
        self.metrics = metrics


def one_step(folder, groups, algorithm, rewards, settings):
    """(parameters, gradients, metrics) after one step."""
    settings = dict(settings)
    policy, kind = letter_policy(folder), (settings.pop("spoiled", False), settings.pop("played", False))
    config = algorithm.Config(**PLAIN | settings)
    loop = FixedLoop(policy, Fixed(policy, groups, rewards, *kind), config)
    algorithm.train(policy, loop.task, loop, "agent", config)
    parameters = [x for group in loop.optimizer.param_groups for x in group["params"]]
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in parameters]
    return [x.detach() for x in parameters], gradients, loop.metrics


def sft_step(folder, groups):
    policy = letter_policy(folder)
    parameters, completions = policy.parameters("agent"), [group[0].ids for group in groups]
    optimizer = torch.optim.SGD(policy.named_parameters("agent"), lr=0.1)
    metrics = sft.update(policy, optimizer, encode_texts(policy, TEXTS), completions, "agent",
                         sft.Config(micro_batch_tokens=1))
    return [x.detach() for x in parameters], [x.grad for x in parameters], metrics


def sampled(folder, num_prompts=5):
    """Greedy and random completions of several prompts, and a tensor computed for all of their groups."""
    policy = letter_policy(folder)
    prompts, num_computed = encode_texts(policy, ["a" * i for i in range(1, num_prompts + 1)]), []

    def logp(*some):
        num_computed.append(len(some[0]))
        return policy.score(*some).logp
    with policy.using("agent"):
        greedy = policy.sample(prompts, 2, 6, temperature=0)
        seed_step(3, 1)
        random = policy.sample(prompts[:1] * 4, 2, 6)  # two for each process
        scores = policy.map_groups(logp, prompts, [[one.ids for one in group] for group in greedy], 1)
    return [[[vars(one) for one in group] for group in groups] for groups in (greedy, random)], scores, num_computed


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


def drawn():
    """Random numbers in steps 1, 1 and 2."""
    return [seed_step(3, number) or torch.rand(1).item() for number in (1, 1, 2)]


def helpers():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad = torch.tensor([1.0, rank()])
    if rank() == 0:  # the other process has no gradient of it
        parameters[1].grad = torch.tensor([5.0, 6.0])
    all_reduce_gradients(parameters)
    return [local_shard([5, 6, 7]), all_gather(local_shard([5, 6, 7])), rank0_result(rank),
            all_reduce_sum({"a": rank() + 0.5}), all_reduce_sum(torch.ones(2)).tolist(),
            mean_per_token({"a": 3.0 + rank(), "tokens": 1 + 3 * rank()}), [x.grad.tolist() for x in parameters],
            world_size()]


def run_toy(folder, algorithm, out, stopped_at=None, resume=False):
    """A run on the toy. In the step `stopped_at`, one process only receives Ctrl-C."""
    policy = letter_policy(folder)
    if rank() == 1:  # it starts from other weights, and receives those of rank 0
        torch.nn.init.ones_(policy.parameters("agent")[0])
    events = {("batch", stopped_at): lambda _: signal.raise_signal(signal.SIGINT)} if rank() == 1 else {}
    task = run_letters(policy, out, algorithm, events, resume, steps=4, warmup=0, checkpoint_every=10)
    return task.state["passed"], [x.detach() for x in policy.parameters("agent")]


def main(folder):
    """The work of each of two processes, for the tests below."""
    groups = [[Completion(**one) for one in group] for group in json.loads((folder / "groups").read_text())]
    found = {name: one_step(folder / "model", groups, *case) for name, case in CASES.items()}
    found["sft"] = sft_step(folder / "model", groups)
    found["rewarded"] = rewarded()
    found["sampled"], found["drawn"], found["helpers"] = sampled(folder / "model"), drawn(), helpers()
    for algorithm in (grpo, ppo):
        whole, stopped = (folder / f"{name}-{algorithm.__name__}" for name in ("whole", "stopped"))
        passed, weights = run_toy(folder / "model", algorithm, whole)
        with pytest.raises(KeyboardInterrupt):
            run_toy(folder / "model", algorithm, stopped, stopped_at=2)
        again, resumed = run_toy(folder / "model", algorithm, stopped, resume=True)
        found[f"runs of {algorithm.__name__}"] = [passed, again, weights, resumed]
    torch.save(found, folder / f"found-{rank()}")


# ------------------------------------------------------------------------------------------------ the tests

@pytest.fixture(scope="module")
def both(tiny_folder, tmp_path_factory):
    """(the folder, completions, the results of each of two processes)."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "model").symlink_to(tiny_folder)
    policy = letter_policy(tiny_folder)
    with policy.using("agent"):
        groups = policy.sample(encode_texts(policy, TEXTS), G, 7, 0.8)
    (folder / "groups").write_text(json.dumps(groups, default=vars))
    done = finished(torchrun(__file__, folder))
    assert done.returncode == 0, done.err
    return folder, groups, [torch.load(folder / f"found-{i}", weights_only=True) for i in (0, 1)]


def assert_same(alone, first, second):
    """Compare the tensors and metrics of one process and of two."""
    for mine, ours, theirs in zip(alone[0] + alone[1], first[0] + first[1], second[0] + second[1], strict=True):
        torch.testing.assert_close(ours, mine, atol=1e-6, rtol=0, equal_nan=True)
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)
    for name, value in alone[2].items():
        close = pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True) if isinstance(value, float) else value
        assert first[2][name] == close and second[2][name] == close, name


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_two_processes_equals_that_of_one(both, name):
    folder, groups, found = both
    alone = one_step(folder / "model", groups, *CASES[name])
    assert_same(alone, found[0][name], found[1][name])
    assert alone[2]["skipped"] == ("finite" in name)
    before = letter_policy(folder / "model").parameters("agent")
    moved = max((a - b).abs().max() for a, b in zip(alone[0], before, strict=False))  # the critic's are last
    assert (moved > 1e-3) == (alone[2]["grad_norm"] > 0) == (name != "grpo, equal rewards" and "finite" not in name)


def test_a_step_of_supervised_learning_equals_that_of_one_process(both):
    folder, groups, found = both
    assert_same(sft_step(folder / "model", groups), found[0]["sft"], found[1]["sft"])


def texts(groups):
    return [[completion["text"] for completion in group] for group in groups]


def test_sampling_and_scores_are_sharded_and_gathered(both):
    folder, _, found = both
    (greedy, _), scores, counts = sampled(folder / "model")
    (first, first_scores, first_counts), (second, second_scores, second_counts) = (one["sampled"] for one in found)
    assert first == second, "all processes have all completions, in the order of the prompts"
    assert texts(first[0]) == texts(greedy)
    assert texts(first[1])[:2] != texts(first[1])[2:], "each process draws its own random numbers"
    torch.testing.assert_close(first_scores, scores, atol=1e-5, rtol=0)
    assert first_scores.equal(second_scores)
    assert counts == [1] * 5 and first_counts == [1] * 2 and second_counts == [1] * 3


def test_episodes_and_rewards_are_the_same_in_all_processes(both):
    _, _, (first, second) = both
    prompts, rewards, metrics, samples, _ = first["rewarded"]
    assert first["rewarded"] == second["rewarded"] == rewarded()
    assert metrics["bank_size"] > 0 and 0 < metrics["invalid_rate"] < 1 and len(samples) == 4
    assert len({len(prompt) for prompt in prompts}) > 1 and [len(row) for row in rewards] == [3] * 5


def test_the_helpers(both):
    _, _, found = both
    same = [[5, 6, 7], 0, {"a": 2.0}, [2.0, 2.0], {"a": 7 / 5}, [[2, 1], [5, 6]], 2]
    assert [one["helpers"] for one in found] == [[[5], *same], [[6, 7], *same]]
    assert helpers() == [[5, 6, 7], [5, 6, 7], 0, {"a": 0.5}, [1, 1], {"a": 3}, [[1, 0], [5, 6]], 1]
    assert is_rank0() and distributed_main(main) is main


def test_each_process_draws_its_own_numbers_and_rank_0_those_of_a_single_process(both):
    _, _, (first, second) = both
    assert first["drawn"] == drawn() and len({*drawn(), *second["drawn"]}) == 4
    assert second["drawn"][0] == second["drawn"][1], "they follow from seed, step and rank"


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_run_that_one_process_was_told_to_stop_resumes_as_if_it_had_not_been(both, algorithm):
    folder, _, found = both
    for passed, again, weights, resumed in (one[f"runs of {algorithm}"] for one in found):
        assert passed == again == [1, 2, 3, 4], "the checkpoint holds the task's state"
        assert all(map(torch.equal, weights, found[0][f"runs of {algorithm}"][2]))
        assert all(map(torch.equal, weights, resumed))
    whole, stopped = (files_of(folder / f"{name}-{algorithm}") for name in ("whole", "stopped"))
    assert whole == stopped and [row["step"] for row in whole[0]] == [0, 1, 2, 3, 4, 4]
    samples = read_rows(folder / f"whole-{algorithm}" / "samples.jsonl")
    assert len(samples) == 16 and all(math.isfinite(row["reward"]) for row in whole[0] if "eval" not in row)


if __name__ == "__main__":
    distributed_main(lambda: main(Path(sys.argv[1])))()
