"""The parts of the training loop that the algorithms share: learning rates, batches, optimizer steps, checkpoints."""
import math
import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import wake_adapter
from toys import encode_texts, files_of, rows_of, run_letters, stop

import grpo
import ppo
from data import UsageError
from policy import Completion, Policy
from support.distributed import seed_step
from support.loop import (
    REFERENCE,
    Loop,
    Update,
    advice,
    epoch_indices,
    lr_multiplier,
    make_adapter,
    mean_per_token,
    optimizer_step,
    rollout_metrics,
    update_metrics,
)
from support.rollouts import minibatches, select_groups
from support.run import Run, warn_once


def test_the_learning_rate_rises_and_falls():
    linear, constant = (SimpleNamespace(steps=10, warmup=2, schedule=name) for name in ("linear", "constant"))
    assert [lr_multiplier(step, linear) for step in (1, 2, 6, 10)] == pytest.approx([0.5, 0.9, 0.5, 0.1])
    assert [lr_multiplier(step, constant) for step in (1, 2, 6, 10)] == [0.5, 1, 1, 1]
    assert lr_multiplier(1, SimpleNamespace(steps=10, warmup=0, schedule="constant")) == 1


@pytest.mark.parametrize("count", [1, 5, 24, 100])
def test_all_items_appear_once_before_any_appears_again(count):
    order = [i for step in range(1, 30) for i in epoch_indices(step, count, batch_size=8, seed=0)]
    passes = [order[start:start + count] for start in range(0, len(order) - count + 1, count)]
    assert all(sorted(one) == list(range(count)) for one in passes) and (count < 24 or passes[0] != passes[1])
    assert count < 24 or order[:8] != epoch_indices(1, count, 8, seed=1)


def test_a_step_draws_the_same_numbers_whatever_was_drawn_before():
    def draw(seed, step):
        seed_step(seed, step)
        return random.random(), np.random.rand(), torch.rand(1).item()
    first, _, other = draw(7, 1), draw(7, 2), draw(8, 1)
    assert draw(7, 1) == first and len({*first, *other, *draw(7, 2)}) == 9


# --- metrics ---

def completion(length, logp, finished=True, text=""):
    return Completion([5] * length, [logp] * length, finished, text)


def test_rollout_metrics_by_hand():
    rewards = torch.tensor([[1., 0., 0., 1.], [0.5, 0.5, 0.5, 0.5]])
    groups = [[completion(1, -1.0)] * 4, [completion(3, -2.0, False)] * 4]
    assert rollout_metrics(rewards, groups) == pytest.approx({
        "reward": 0.5, "reward_std": math.sqrt(1 / 3) / 2, "zero_std_rate": 0.5, "completion_tokens": 2,
        "entropy": (4 * 1 + 12 * 2) / 16, "unfinished_rate": 0.5})  # tokens of long completions count as much
    assert rollout_metrics(rewards[:, :1], [group[:1] for group in groups])["reward_std"] == 0


def test_reasoning_that_does_not_end_counts_as_unfinished():
    texts = ["<think>a</think>Kia", "<think>a", "a</think>", "analysisHm.", "<think>a</think>[THINK]", "Kia", ""]
    metrics = rollout_metrics(torch.zeros(1, 7), [[completion(1, -1.0, text=text) for text in texts]])
    assert metrics["unfinished_rate"] == pytest.approx(3 / 7)


def test_means_per_token():
    assert mean_per_token(Counter(kl=6.0, clip_rate=0.0, tokens=4)) == {"kl": 1.5, "clip_rate": 0}
    assert mean_per_token({"kl": 0.0, "tokens": 0}) == mean_per_token({"kl": 0.0}) == {"kl": None}


def test_update_metrics_leave_refused_updates_out_of_the_mean():
    assert update_metrics([]) == {"grad_norm": 0, "skipped": 0}
    assert update_metrics([Update(1.0), Update(0.0, "a"), Update(2.0), Update(0.0, "b")]) == {
        "grad_norm": 1.5, "skipped": 2, "not_finite_in": "a"}


FINE = {"unfinished_rate": 0.5, "invalid_rate": 0.5, "zero_std_rate": 0.99, "reward": 0.1}


@pytest.mark.parametrize("algo, reward", [("grpo", "em"), ("grpo", "f1"), ("ppo", "em")])
@pytest.mark.parametrize("metrics, words", [
    ({}, []), (FINE, []), ({"loss": 2.0, "entropy": 1.0}, []),
    (FINE | {"unfinished_rate": 0.51}, [r"51% .* cut off at --max-new-tokens 7: raise it"]),
    (FINE | {"invalid_rate": 1.0}, [r"100% .* invalid .* --algo sft .* --init-adapter"]),
    (FINE | {"zero_std_rate": 1.0}, [r"every group are equal \(mean 0.10\).* --group-size"]),
    ({"unfinished_rate": 0.9, "invalid_rate": 0.8, "zero_std_rate": 1, "reward": 1.0}, ["90%", "80%", "mean 1.00"])])
def test_advice_after_the_first_step(metrics, words, algo, reward):
    """Groups of equal rewards stop GRPO only. A joint run cannot start with SFT."""
    settings, is_stuck = {"max_new_tokens": 7, "algo": algo, "reward": reward}, metrics.get("zero_std_rate") == 1
    found, words = advice(metrics, settings, True), words[:-1] if algo == "ppo" and is_stuck else words
    assert len(found) == len(words) and all(map(re.search, words, found)) and not any("\n" in text for text in found)
    assert ("--reward f1" in " ".join(found)) == (is_stuck and (algo, reward) == ("grpo", "em"))
    assert not re.search("sft|init", " ".join(advice(metrics, settings, False)))


@pytest.mark.parametrize("settings, noted", [
    ({"algo": "grpo", "agent": "answer", "max_new_tokens": 9}, True), ({}, False)])
def test_a_script_says_after_step_1_how_long_the_run_takes_and_what_looks_wrong(tmp_path, capsys, settings, noted):
    """Once, and not for a toy, which has no flags."""
    warn_once.cache_clear()
    loop = Loop(None, None, Run(tmp_path, settings), SimpleNamespace(steps=31))
    loop.optimizer = two_groups()[2]
    for step in (1, 2):
        loop.start = time.time() - 90.2
        loop.log(step, {"unfinished_rate": 0.75}, [])
    out, err = capsys.readouterr()
    assert out.count("90.2 s a step; 30 more like this one would take 0:45:0") == out.count("like this one") == noted
    assert err.count("note: step 1: 75% of the completions were cut off at --max-new-tokens 9") == noted
    assert err.count("note") == noted


@pytest.mark.parametrize("agent, data, advised", [
    ("answer", "me.txt", True), ("manager", "locomo", True), ("manager", "me.txt", False)])
def test_sft_is_advised_where_there_is_something_to_clone(tmp_path, capsys, agent, data, advised):
    """A run of one step does not say how long the others take."""
    warn_once.cache_clear()
    loop = Loop(None, None, Run(tmp_path, {"algo": "grpo", "agent": agent, "data": data}), SimpleNamespace(steps=1))
    loop.optimizer = two_groups()[2]
    loop.log(1, {"invalid_rate": 1.0}, [])
    out, err = capsys.readouterr()
    assert ("--algo sft" in err) == advised and "choose a larger model" in err and "like this one" not in out


# --- optimizer steps ---

@dataclass
class Inputs:
    prompts: list
    advantages: torch.Tensor


def two_groups(lr=1.0):
    """An optimizer with two parameter groups, as in PPO, and gradients of norm 5 and 10."""
    first, second = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    first.grad, second.grad = torch.tensor([3., 4.]), torch.tensor([6., 8.])
    return first, second, torch.optim.SGD([{"params": [("a", first)]}, {"params": [("b", second)]}], lr=lr)


@pytest.mark.parametrize("grad_clip, factors", [(0, (1, 1)), (5, (1, 0.5)), (1, (0.2, 0.1)), (100, (1, 1))])
def test_each_parameter_group_is_clipped_to_the_norm(grad_clip, factors):
    first, second, optimizer = two_groups()
    assert optimizer_step(optimizer, grad_clip) == Update(5.0)
    torch.testing.assert_close(first.data, -factors[0] * torch.tensor([3., 4.]), atol=1e-5, rtol=0)
    torch.testing.assert_close(second.data, -factors[1] * torch.tensor([6., 8.]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_with_numbers_that_are_not_finite_is_refused(value):
    first, second, optimizer = two_groups()
    inputs = Inputs([math.nan], torch.tensor([1.0, value]))  # only tensors are checked
    assert optimizer_step(optimizer, 1.0, inputs) == Update(0.0, "advantages")
    inputs.advantages = torch.ones(2)
    second.grad[1] = value
    assert optimizer_step(optimizer, 1.0, inputs) == Update(0.0, "the gradient of b")
    assert not first.any() and not second.any()
    second.grad = None  # a parameter without a gradient is left as it is
    assert optimizer_step(optimizer, 0, inputs) == Update(5.0) and first.any() and not second.any()


# --- rollouts ---

@dataclass
class Numbers:
    prompts: list
    completions: list
    per_token: torch.Tensor  # (N, C)
    per_row: torch.Tensor  # (N,)
    mean_length: float = 2.0


def test_selected_groups_are_padded_to_their_longest_completion():
    rollouts = Numbers(["a", "b", "c"], [[[1], [1, 2]], [[1, 2, 3], [1]], [[1, 2], [1]]],
                       torch.arange(18.).reshape(6, 3), torch.arange(6.))
    some = select_groups(rollouts, [2, 0])
    assert some.prompts == ["c", "a"] and some.completions == [[[1, 2], [1]], [[1], [1, 2]]] and some.mean_length == 2
    assert some.per_row.tolist() == [4, 5, 0, 1] and some.per_token.tolist() == [[12, 13], [15, 16], [0, 1], [3, 4]]
    [whole] = minibatches(rollouts, 0, "seed")
    assert sorted(whole.prompts) == ["a", "b", "c"]
    sizes = [len(part.prompts) for part in minibatches(rollouts, 2, "seed")]
    again = [part.prompts for part in minibatches(rollouts, 2, "seed")]
    assert sizes == [2, 1] and again == [whole.prompts[:2], whole.prompts[2:]]
    assert len({str([part.prompts for part in minibatches(rollouts, 1, str(i))]) for i in range(20)}) > 3


# --- checkpoints ---

def learner(size=4):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, size)
    return model, torch.optim.AdamW(model.named_parameters(), lr=0.1)


def update(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 5)).square().mean().backward()
    optimizer.step()


def loop_of(folder, optimizer, resume=False):
    loop = Loop(None, SimpleNamespace(state={"passed": [1]}), Run(folder, {}, resume=resume), None)
    loop.optimizer = optimizer
    loop.parameters = [x for group in optimizer.param_groups for x in group["params"]]
    return loop


def test_resumed_updates_are_bit_equal(tmp_path):
    """Weights and moments went through a checkpoint: the next updates are the same."""
    model, optimizer = learner()
    update(model, optimizer)
    loop_of(tmp_path, optimizer).save(1)
    weights = []
    for _ in range(2):
        for step in (2, 3):
            seed_step(0, step)
            update(model, optimizer)
        weights.append([model.weight.tolist(), model.bias.tolist()])
        model, optimizer = learner()
        torch.nn.init.ones_(model.weight)
        loop = loop_of(tmp_path, optimizer, resume=True)
        loop.task.state = {}
        assert loop.restore() == 1 and loop.task.state == {"passed": [1]}
    assert weights[0] == weights[1]


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    loop_of(tmp_path, learner()[1]).save(1)
    model, optimizer = learner(3)
    before = model.weight.clone()
    with pytest.raises(UsageError, match="tensors of other shapes: resume with the model and the rank"):
        loop_of(tmp_path, optimizer, resume=True).restore()
    assert model.weight.equal(before) and not optimizer.state
    assert loop_of(tmp_path / "new", optimizer).restore() is None


# --- training that starts from an adapter ---

RANDOM = {("rewards", step): torch.rand_like for step in range(1, 5)}  # groups with equal rewards would have no KL

@pytest.fixture
def started(tiny_folder, tmp_path):
    """started() is a policy whose "agent" starts from a hand-made adapter of rank 3, `made`, with its flags."""
    torch.set_num_threads(1)
    made = Policy.load(tiny_folder, device="cpu")
    torch.manual_seed(4)
    made.add_adapter("made", rank=3, alpha=9)
    wake_adapter(made, "made", 0.3)
    made.save_adapter("made", tmp_path / "made/adapter")

    def start():
        policy = Policy.load(tiny_folder, device="cpu")
        args = SimpleNamespace(agent="agent", algo="grpo", init_adapter=tmp_path / "made", rank=16, alpha=32.0)
        make_adapter(policy, args)
        assert (args.rank, args.alpha) == (3, 9) and set(policy.adapters) == {"agent", REFERENCE}
        return policy
    start.made = made
    return start


def test_the_agent_starts_as_the_adapter_and_its_kl_has_no_value_and_no_gradient(started):
    policy, made = started(), started.made
    prompts = encode_texts(policy, ["Hi", "What is it?", "Spell a word"])
    with policy.using("agent"), made.using("made"):
        assert policy.sample(prompts, 1, 12, 0) == made.sample(prompts, 1, 12, 0) != policy.sample(prompts, 1, 12, 1.0)
        groups = policy.sample(prompts, 4, 8)
    config = grpo.Config(group_size=4, temperature=1.0)
    rollouts = grpo.make_rollouts(policy, prompts, groups, torch.rand(3, 4), config, REFERENCE)
    with policy.using("agent"):
        logp, _, mask = policy.score(rollouts.prompts, rollouts.completions)
    losses, kl, _ = grpo.grpo_loss(logp, rollouts.logp_old, rollouts.logp_ref, torch.zeros(12), mask, 0.2, 1.0)
    losses.sum().backward()
    assert not kl.any() and not any(x.grad.any() for x in policy.parameters("agent"))
    base = grpo.make_rollouts(policy, prompts, groups, torch.rand(3, 4), config)
    assert grpo.kl_k3(logp, base.logp_ref)[mask].mean() > 0.1, "the base model would be another reference"


@pytest.mark.parametrize("algorithm", [grpo, ppo])
def test_the_reference_stays_and_the_policy_moves_away_from_it(started, tmp_path, algorithm):
    policy = started()
    run_letters(policy, tmp_path / "run", algorithm, RANDOM, steps=4, lr=0.05, warmup=0, minibatch=0)
    kl = [row["kl"] for row in rows_of(tmp_path / "run") if "kl" in row]
    assert abs(kl[0]) < 1e-6 and kl[-1] > 0.02
    pairs = zip(policy.parameters(REFERENCE), policy.parameters("agent"), started.made.parameters("made"), strict=True)
    assert all(torch.equal(reference, start) and not torch.equal(agent, start) for reference, agent, start in pairs)


@pytest.mark.parametrize("algorithm", [grpo, ppo])
def test_with_a_learning_rate_of_0_nothing_changes(started, tmp_path, algorithm):
    policy = started()
    run_letters(policy, tmp_path / "run", algorithm, RANDOM, steps=2, lr=0.0)
    assert all(abs(row["kl"]) < 1e-6 for row in rows_of(tmp_path / "run") if "kl" in row)
    assert all(map(torch.equal, policy.parameters("agent"), started.made.parameters("made")))
    assert policy.load_adapter("saved", tmp_path / "run") is None
    assert all(map(torch.equal, policy.parameters("saved"), started.made.parameters("made")))


@pytest.mark.parametrize("algorithm", [grpo, ppo])
def test_a_run_that_started_from_an_adapter_resumes(started, tmp_path, algorithm):
    run_letters(started(), tmp_path / "whole", algorithm, RANDOM, steps=4)
    with pytest.raises(KeyboardInterrupt):
        run_letters(started(), tmp_path / "stopped", algorithm, RANDOM | {("rewards", 3): stop}, steps=4)
    run_letters(started(), tmp_path / "stopped", algorithm, RANDOM, resume=True, steps=4)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
