"""GRPO by hand, against a double loop and autograd; a toy that learns; runs that are stopped and resumed."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import encode_texts, files_of, letter_policy, rows_of, run_letters, stop

import grpo
from grpo import Config, group_advantages, grpo_loss, kl_k3, make_rollouts, update
from support.run import read_rows

TEXTS = ["Hi", "What is it?", "Spell a word"]
G = 4
FREE = dict(grad_clip=1e9, group_size=G, max_new_tokens=7, temperature=0.8, loss_mean="completion")  # no clipped norm


# --- the pure functions ---

def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 1], [3, 1, 2, 2]])
    found = group_advantages(rewards)
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (math.sqrt(2 / 3) + 1e-4)  # standard deviations over G - 1
    torch.testing.assert_close(found, torch.tensor([[a, -a, -a, a], [b, -b, 0, 0]]), atol=1e-6, rtol=0)
    assert torch.equal(found[1], group_advantages(rewards[1:])[0]), "groups do not influence each other"


@given(st.floats(0, 1, width=32), st.integers(2, 16))
@settings(deadline=None, derandomize=True)
def test_equal_rewards_give_no_advantage(reward, group_size):
    assert not group_advantages(torch.full((1, group_size), reward)).any()


def test_equal_rewards_whose_float_mean_differs():
    """The mean of eight times 1/3 is not 1/3 in floats."""
    assert not group_advantages(torch.full((2, 8), 1 / 3)).any()
    assert not group_advantages(torch.full((2, 8), 0.1)).any()


@pytest.mark.parametrize("A, rho, value, slope", [
    (1, 0.5, 0.5, 0.5), (1, 2.0, 1.2, 0.0), (-1, 0.5, -0.8, 0.0), (-1, 2.0, -2.0, -2.0),
    (1, 1.1, 1.1, 1.1), (-1, 0.9, -0.9, -0.9)])
def test_sign_table_of_the_clip(A, rho, value, slope):
    """J and its gradient in log pi: 0 if the ratio of a good token exceeds 1.2 or that of a bad one is below 0.8."""
    logp = torch.tensor([[math.log(rho)]], requires_grad=True)
    advantages, mask = torch.tensor([float(A)]), torch.ones(1, 1)
    losses, kl, is_clipped = grpo_loss(logp, torch.zeros(1, 1), None, advantages, mask, 0.2, 0.5)
    losses.sum().backward()
    assert losses.item() == pytest.approx(-value) and logp.grad.item() == pytest.approx(-slope) and kl.item() == 0
    assert bool(is_clipped) == (slope == 0)


def test_k3_is_zero_at_equality_never_negative_and_unbiased():
    logp, logp_ref = (torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert not kl_k3(logp, logp).any() and (kl_k3(logp, logp_ref) >= 0).all()
    assert kl_k3(torch.tensor(0.0), torch.tensor(math.log(2))) == pytest.approx(2 - math.log(2) - 1)
    pi, ref = torch.tensor([[0.4, 0.25, 0.2, 0.1, 0.05], [0.3, 0.3, 0.1, 0.2, 0.1]], dtype=torch.double)
    exact = (pi * (pi / ref).log()).sum()
    estimates = kl_k3(pi.log(), ref.log())
    torch.testing.assert_close((pi * estimates).sum(), exact, atol=1e-12, rtol=0)
    drawn = torch.multinomial(pi, 400_000, replacement=True, generator=torch.Generator().manual_seed(2))
    error = estimates[drawn].std() / drawn.numel() ** 0.5
    assert error < 5e-4 and abs(estimates[drawn].mean() - exact) < 3 * error
    assert abs((ref * estimates).sum() - exact) > 0.01, "under samples of another policy it is biased"


def numbers(seed=0, N=6, C=5):
    """Log-probs with ratios outside the clip range on both sides, advantages of both signs, rows of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    logp_old, logp_ref = (-3 * torch.rand(N, C, generator=generator) for _ in range(2))
    logp = logp_old + 0.4 * torch.randn(N, C, generator=generator)
    lengths = torch.arange(N) % C + 1
    mask = (torch.arange(C) < lengths[:, None]).float()
    return logp, logp_old, logp_ref, torch.randn(N, generator=generator), mask


def loss_and_slope(logp, *rest):
    logp = logp.clone().requires_grad_()
    losses, kl, is_clipped = grpo_loss(logp, *rest, 0.2, 0.3)
    losses.mean().backward()
    return losses.detach(), logp.grad, kl, is_clipped


def test_loss_and_slope_equal_a_double_loop():
    logp, logp_old, logp_ref, advantages, mask = numbers()
    losses, slopes, _, is_clipped = loss_and_slope(logp, logp_old, logp_ref, advantages, mask)
    cut = 0
    for i, A in enumerate(advantages.tolist()):
        length, J = int(mask[i].sum()), 0.0
        for t in range(length):
            old, ref, new = logp_old[i, t].item(), logp_ref[i, t].item(), logp[i, t].item()
            rho = math.exp(new - old)
            has_slope = rho <= 1.2 if A > 0 else rho >= 0.8
            J += (rho * A if has_slope else (1.2 if A > 0 else 0.8) * A) - 0.3 * (math.exp(ref - new) - (ref - new) - 1)
            slope = has_slope * rho * A - 0.3 * (1 - math.exp(ref - new))
            assert slopes[i, t].item() == pytest.approx(-slope / length / len(advantages), abs=1e-6)
            assert bool(is_clipped[i, t]) != has_slope
            cut += not has_slope
        assert losses[i].item() == pytest.approx(-J / length, abs=1e-6)
    assert cut > 3


def test_masked_positions_and_the_order_of_rows_change_nothing():
    logp, logp_old, logp_ref, advantages, mask = numbers()
    losses, slopes, *_ = loss_and_slope(logp, logp_old, logp_ref, advantages, mask)
    noise = 5 * torch.randn(3, *mask.shape, generator=torch.Generator().manual_seed(9)) * (1 - mask)
    others = loss_and_slope(logp + noise[0], logp_old + noise[1], logp_ref + noise[2], advantages, mask)
    assert torch.equal(others[0], losses) and torch.equal(others[1], slopes) and not (slopes * (1 - mask)).any()
    order = torch.tensor([3, 0, 5, 4, 1, 2])
    moved = loss_and_slope(logp[order], logp_old[order], logp_ref[order], advantages[order], mask[order])
    assert torch.equal(moved[0], losses[order]) and torch.equal(moved[1], slopes[order])


def test_a_mean_over_tokens_weighs_long_completions_more():
    """Ratio 1 and A = 1: rows of 1 and 3 tokens give -1 each by the published mean; over tokens -1/2 and -3/2."""
    logp, mask = torch.zeros(2, 3), torch.tensor([[1., 0, 0], [1, 1, 1]])
    published, _, _ = grpo_loss(logp, logp, None, torch.ones(2), mask, 0.2, 0.0)
    over_tokens, _, _ = grpo_loss(logp, logp, None, torch.ones(2), mask, 0.2, 0.0, mean_length=2.0)
    assert published.tolist() == [-1, -1] and over_tokens.tolist() == [-0.5, -1.5]


# --- the update ---

REWARDS = torch.tensor([[1.0, 0, 0.5, 0], [0, 0, 1, 0], [0.2, 0.4, 0.6, 0.9]])
ONE_EQUAL = torch.tensor([[1.0, 0, 0.5, 0], [1, 1, 1, 1], [0.2, 0.4, 0.6, 0.9]])


def sampled(policy, rewards=REWARDS, **options):
    """Rollouts of the tiny policy with given rewards (P, G)."""
    prompts, config = encode_texts(policy, TEXTS), Config(**FREE | options)
    torch.manual_seed(3)
    with policy.using("agent"):
        groups = policy.sample(prompts, G, config.max_new_tokens, config.temperature)
    return make_rollouts(policy, prompts, groups, rewards, config)


def gradient_of(policy, rollouts, **options):
    """The mean gradient of an update's optimizer steps, which change nothing, so the ratio stays 1; its metrics."""
    gradients, optimizer = [], torch.optim.SGD(policy.named_parameters("agent"), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([x.grad.flatten() for x in policy.parameters("agent")])))
    metrics = update(policy, optimizer, rollouts, "agent", Config(**FREE | options), 1)
    return torch.stack(gradients).mean(0), metrics


def plain_logps(policy, prompt, completion):
    """Log-probs of one completion's tokens by transformers' own forward pass, with autograd through everything."""
    logits = policy.model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1:-1]
    return (logits / FREE["temperature"]).log_softmax(-1)[range(len(completion)), completion]


@pytest.mark.parametrize("loss_mean", ["completion", "token"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_with_ratio_1_the_gradient_is_that_of_reinforce_with_a_group_baseline(tiny, beta, loss_mean):
    policy, options = tiny(), dict(beta=beta, loss_mean=loss_mean)
    rollouts = sampled(policy, **options)
    lengths = [len(completion) for group in rollouts.completions for completion in group]
    assert rollouts.kept_fraction == 1 and rollouts.mean_length == pytest.approx(sum(lengths) / len(lengths))
    J = 0
    for p, prompt in enumerate(rollouts.prompts):
        for g, completion in enumerate(rollouts.completions[p]):
            A = (REWARDS[p, g] - REWARDS[p].mean()) / (REWARDS[p].std() + 1e-4)
            with torch.no_grad():
                logp_ref = plain_logps(policy, prompt, completion)  # LoRA is off outside `using`
            with policy.using("agent"):
                logp = plain_logps(policy, prompt, completion)
            kl = (logp_ref - logp).exp() - (logp_ref - logp) - 1
            length = len(completion) if loss_mean == "completion" else rollouts.mean_length
            J = J + (A * logp - beta * kl).sum() / length / REWARDS.numel()
    expected = torch.cat([x.flatten() for x in torch.autograd.grad(-J, policy.parameters("agent"))])
    found, metrics = gradient_of(policy, rollouts, **options)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)
    assert metrics["clip_rate"] == 0 and (metrics["kl"] > 0) == (beta > 0) and metrics["skipped"] == 0
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 60, 120])
def test_micro_batches_change_nothing(tiny, tokens):
    weights = []
    for budget in (10**6, tokens):
        policy, options = tiny(), dict(micro_batch_tokens=budget, beta=0.1)
        rollouts = sampled(policy, **options)
        count = len(policy.micro_batches(rollouts.prompts, rollouts.completions, budget))
        optimizer = torch.optim.SGD(policy.named_parameters("agent"), lr=0.1)
        update(policy, optimizer, rollouts, "agent", Config(**FREE | options), 1)
        weights.append((count, [parameter.detach().clone() for parameter in policy.parameters("agent")]))
    assert weights[0][0] == 1 < weights[1][0] == {1: 3, 60: 3, 120: 2}[tokens]
    for a, b, start in zip(weights[0][1], weights[1][1], tiny().parameters("agent"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert (a - start).abs().max() > 1e-4


def test_groups_with_equal_rewards_have_no_gradient_but_count_in_the_mean(tiny):
    policy = tiny()
    everything, mixed = sampled(policy), sampled(policy, ONE_EQUAL)
    prompts = encode_texts(policy, TEXTS)
    assert mixed.prompts == [prompts[0], prompts[2]] and mixed.kept_fraction == pytest.approx(2 / 3)
    assert mixed.completions == [everything.completions[0], everything.completions[2]]
    assert mixed.mean_length == everything.mean_length, "the mean length is that of all groups"
    some, _ = gradient_of(policy, mixed, beta=0.0)
    alone, _ = gradient_of(policy, replace(mixed, kept_fraction=1.0), beta=0.0)
    torch.testing.assert_close(some, alone * 2 / 3, atol=1e-6, rtol=1e-5)  # the mean is over all three groups
    for rollouts in (mixed, everything):
        parts, _ = gradient_of(policy, rollouts, beta=0.3, minibatch=1)
        torch.testing.assert_close(parts, gradient_of(policy, rollouts, beta=0.3)[0], atol=1e-6, rtol=1e-5)
    assert sampled(policy, torch.ones(3, G)) is None


def test_a_step_with_equal_rewards_changes_nothing(tiny, tmp_path):
    """The policy is almost uniform, whatever the rewards; an entropy of 0 would be that of a collapsed policy."""
    policy = tiny()
    run_letters(policy, tmp_path, grpo, {("rewards", 1): torch.ones_like}, steps=1)
    _, row, _ = rows_of(tmp_path)
    assert all(map(torch.equal, policy.parameters("agent"), tiny().parameters("agent")))
    assert row["zero_std_rate"] == 1 and row["grad_norm"] == row["skipped"] == 0 and row["kl"] is None
    assert row["entropy"] > 2


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_ratio_differs_from_1_in_the_second_epoch(tiny, epochs, monkeypatch):
    policy, distances = tiny(), []

    def watched(logp, logp_old, logp_ref, advantages, mask, *rest):
        distances.append(((logp - logp_old).exp() - 1)[mask.bool()].abs().max().item())
        return grpo_loss(logp, logp_old, logp_ref, advantages, mask, *rest)

    monkeypatch.setattr(grpo, "grpo_loss", watched)
    optimizer = torch.optim.SGD(policy.named_parameters("agent"), lr=1.0)
    metrics = update(policy, optimizer, sampled(policy), "agent", Config(**FREE, epochs=epochs), 1)
    assert len(distances) == epochs and distances[0] < 1e-5 and all(distance > 0.3 for distance in distances[1:])
    assert (metrics["clip_rate"] > 0) == (epochs > 1)


# --- whole runs ---

TOY = dict(group_size=8, max_new_tokens=8, epochs=2, minibatch=3)


def test_a_toy_is_learned_and_the_base_stays(tiny, tmp_path):
    policy = tiny(b=0.0)
    base = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    task = run_letters(policy, tmp_path, grpo, steps=24, lr=3e-2, beta=0.001, temperature=0.5, group_size=8,
                       max_new_tokens=8, minibatch=0, checkpoint_every=100, loss_mean="completion")
    rows = rows_of(tmp_path)
    steps = [row for row in rows if "eval" not in row]
    assert [row["step"] for row in steps] == list(range(1, 25)) == task.seen
    assert [row.get("eval") for row in rows] == ["untrained", *[None] * 24, "trained"]
    first, last = (sum(row["reward"] for row in some) / 3 for some in (steps[:3], steps[-3:]))
    assert first < 0.1 and last > 0.5, (first, last)
    expected = [0.015, *(0.03 * left / 24 for left in range(23, 0, -1))]  # two steps of warmup, then linear decay
    assert [row["lr"] for row in steps] == pytest.approx(expected, rel=1e-5)
    assert {"reward", "reward_std", "zero_std_rate", "kl", "clip_rate", "entropy", "grad_norm", "lr",
            "completion_tokens", "unfinished_rate", "invalid_rate"} <= steps[0].keys()
    assert abs(steps[0]["kl"] or 0) < 1e-6 and steps[-1]["kl"] > 0.1 and steps[-1]["entropy"] < 1
    after = policy.model.state_dict()
    assert base.keys() == after.keys() and all(torch.equal(base[name], after[name]) for name in base)
    policy.load_adapter("again", tmp_path / "adapter")
    assert all(map(torch.equal, policy.parameters("agent"), policy.parameters("again")))
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == [i for i in range(1, 25) for _ in range(4)]


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_letters(letter_policy(tiny_folder, 0.0), folder, grpo, **TOY)
    return files_of(folder)


@pytest.mark.parametrize("place, left", [(("evaluate", 6), []), (("rewards", 4), [4, 5, 6]),
                                         (("rewards", 1), [1, 2, 3, 4, 5, 6]), (("evaluate", 0), [1, 2, 3, 4, 5, 6])])
def test_a_stopped_run_is_resumed_as_if_it_had_not_been(tiny, tmp_path, whole, place, left):
    """In an evaluation, in a step, before the first checkpoint. A complete run stays as it is."""
    with pytest.raises(KeyboardInterrupt):
        run_letters(tiny(b=0.0), tmp_path, grpo, {place: stop}, **TOY)
    for steps in (left, []):
        task = run_letters(tiny(b=0.0), tmp_path, grpo, resume=True, **TOY)
        assert task.seen == steps and files_of(tmp_path) == whole
