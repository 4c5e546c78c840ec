"""GRPO by hand, against a double loop and autograd; a toy that learns; runs that are killed and resumed."""
import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
from grpo import Config, group_advantages, grpo_loss, kl_k3, rollouts_of, train, update
from support.run import Run, read_rows, seed_everything

PROMPTS = ["Hi", "What is it?", "Spell a word"]
G = 4
FREE = dict(grad_clip=1e9, group_size=G, max_new_tokens=7, temperature=0.8)  # no gradient is cut


# --- the pure functions ---

def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 1], [3, 1, 2, 2]])
    found = group_advantages(rewards)
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (math.sqrt(2 / 3) + 1e-4)  # standard deviations over G - 1
    torch.testing.assert_close(found, torch.tensor([[a, -a, -a, a], [b, -b, 0, 0]]), atol=1e-6, rtol=0)
    assert torch.equal(found[1], group_advantages(rewards[1:])[0]), "each group for itself"


@given(st.floats(0, 1, width=32), st.integers(2, 16))
@settings(deadline=None, derandomize=True)
def test_equal_rewards_teach_nothing(reward, group_size):
    assert not group_advantages(torch.full((1, group_size), reward)).any()


def test_equal_rewards_that_no_float_hits():
    """A mean over three questions, or an F1: eight times 1/3 is no lesson either."""
    assert not group_advantages(torch.full((2, 8), 1 / 3)).any()
    assert not group_advantages(torch.full((2, 8), 0.1)).any()


@pytest.mark.parametrize("A, rho, value, slope", [
    (1, 0.5, 0.5, 0.5), (1, 2.0, 1.2, 0.0), (-1, 0.5, -0.8, 0.0), (-1, 2.0, -2.0, -2.0),
    (1, 1.1, 1.1, 1.1), (-1, 0.9, -0.9, -0.9)])
def test_sign_table_of_the_clip(A, rho, value, slope):
    """J and its slope in log pi: a good token is not pushed beyond 1.2, a bad one not below 0.8; all else is."""
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
    """Log-probs whose ratios leave the band on both sides, advantages of both signs, rows of all lengths."""
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


def test_masked_positions_change_nothing_and_rows_may_change_places():
    logp, logp_old, logp_ref, advantages, mask = numbers()
    losses, slopes, *_ = loss_and_slope(logp, logp_old, logp_ref, advantages, mask)
    noise = 5 * torch.randn(3, *mask.shape, generator=torch.Generator().manual_seed(9)) * (1 - mask)
    others = loss_and_slope(logp + noise[0], logp_old + noise[1], logp_ref + noise[2], advantages, mask)
    assert torch.equal(others[0], losses) and torch.equal(others[1], slopes) and not (slopes * (1 - mask)).any()
    order = torch.tensor([3, 0, 5, 4, 1, 2])
    moved = loss_and_slope(logp[order], logp_old[order], logp_ref[order], advantages[order], mask[order])
    assert torch.equal(moved[0], losses[order]) and torch.equal(moved[1], slopes[order])


# --- the update ---

class Catch:
    """An optimizer that keeps the gradients it is given and moves nothing: the ratio stays 1."""

    def __init__(self, parameters):
        self.parameters, self.slopes = parameters, []

    def zero_grad(self, set_to_none=True):
        for parameter in self.parameters:
            parameter.grad = None

    def step(self):
        self.slopes.append(torch.cat([parameter.grad.flatten().clone() for parameter in self.parameters]))


def sampled(policy, rewards):
    """Rollouts of the tiny policy with given rewards (P, G)."""
    prompts = [policy.encode([{"role": "user", "content": text}]) for text in PROMPTS[:len(rewards)]]
    torch.manual_seed(3)
    with policy.using("agent"):
        groups = policy.sample(prompts, G, FREE["max_new_tokens"], FREE["temperature"])
    return rollouts_of(prompts, groups, rewards, policy.device)


def slope_of(policy, rollouts, **options):
    catch = Catch(policy.parameters("agent"))
    stats = update(policy, catch, rollouts, "agent", Config(**FREE | options), random.Random(0))
    return torch.stack(catch.slopes).mean(0), stats


def plain_logps(policy, prompt, completion):
    """One completion by transformers' own forward, every token's log-prob with autograd through everything."""
    logits = policy.model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1:-1]
    return (logits / FREE["temperature"]).log_softmax(-1)[range(len(completion)), completion]


REWARDS = torch.tensor([[1.0, 0, 0.5, 0], [0, 0, 1, 0], [0.2, 0.4, 0.6, 0.9]])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_with_ratio_1_the_gradient_is_that_of_reinforce_with_a_group_baseline(tiny, beta):
    policy = tiny()
    rollouts = sampled(policy, REWARDS)
    J = 0
    for p, prompt in enumerate(rollouts.prompts):
        for g, completion in enumerate(rollouts.completions[p]):
            A = (REWARDS[p, g] - REWARDS[p].mean()) / (REWARDS[p].std() + 1e-4)
            with torch.no_grad():
                logp_ref = plain_logps(policy, prompt, completion)  # LoRA is off outside `using`
            with policy.using("agent"):
                logp = plain_logps(policy, prompt, completion)
            kl = (logp_ref - logp).exp() - (logp_ref - logp) - 1
            J = J + (A * logp - beta * kl).mean() / REWARDS.numel()
    expected = torch.cat([slope.flatten() for slope in torch.autograd.grad(-J, policy.parameters("agent"))])
    found, stats = slope_of(policy, rollouts, beta=beta)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)
    assert stats["clip_rate"] == 0 and (stats["kl"] > 0) == (beta > 0) and stats["entropy"] > 0
    assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 60, 120])
def test_micro_batches_change_nothing(tiny, tokens):
    weights = []
    for budget in (10**6, tokens):
        policy = tiny()
        rollouts = sampled(policy, REWARDS)
        count = len(policy.micro_batches(rollouts.prompts, rollouts.completions, budget))
        config = Config(**FREE | dict(micro_batch_tokens=budget, beta=0.1))
        update(policy, torch.optim.SGD(policy.parameters("agent"), lr=0.1), rollouts, "agent", config, random.Random(0))
        weights.append((count, [parameter.detach().clone() for parameter in policy.parameters("agent")]))
    assert weights[0][0] == 1 < weights[1][0] == {1: 3, 60: 3, 120: 2}[tokens]
    for a, b, start in zip(weights[0][1], weights[1][1], tiny().parameters("agent"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert (a - start).abs().max() > 1e-4


def test_groups_with_equal_rewards_count_and_do_nothing(tiny):
    policy = tiny()
    everything = sampled(policy, REWARDS)
    rewards = REWARDS.clone()
    rewards[1] = 1.0
    mixed = sampled(policy, rewards)
    some, _ = slope_of(policy, mixed, beta=0.0)
    alone, _ = slope_of(policy, grpo.pick(mixed, [0, 2]), beta=0.0)
    torch.testing.assert_close(some, alone * 2 / 3, atol=1e-6, rtol=1e-5)  # the mean is over all three groups
    parts, _ = slope_of(policy, mixed, beta=0.3, minibatch=1)
    torch.testing.assert_close(parts, slope_of(policy, mixed, beta=0.3)[0], atol=1e-6, rtol=1e-5)
    parts, _ = slope_of(policy, everything, beta=0.3, minibatch=1)
    torch.testing.assert_close(parts, slope_of(policy, everything, beta=0.3)[0], atol=1e-6, rtol=1e-5)
    before = [parameter.detach().clone() for parameter in policy.parameters("agent")]
    optimizer = torch.optim.AdamW(policy.parameters("agent"), lr=0.1)
    stats = update(policy, optimizer, sampled(policy, torch.ones(3, G)), "agent", Config(**FREE), random.Random(0))
    assert all(map(torch.equal, before, policy.parameters("agent"))) and stats["grad_norm"] == 0


def test_a_step_without_a_lesson_is_no_collapse(tiny):
    """The policy is almost uniform, whatever the rewards; an entropy of 0 would be that of a collapsed one."""
    policy = tiny()
    _, usual = slope_of(policy, sampled(policy, REWARDS))
    stats = update(policy, Catch([]), sampled(policy, torch.ones(3, G)), "agent", Config(**FREE), random.Random(0))
    assert usual["entropy"] > 2 and (stats.get("entropy") is None or stats["entropy"] > 2)


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_ratio_leaves_1_in_the_second_epoch(tiny, epochs, monkeypatch):
    policy, far = tiny(), []

    def watched(logp, logp_old, logp_ref, advantages, mask, *rest):
        far.append(((logp - logp_old).exp() - 1)[mask.bool()].abs().max().item())
        return grpo_loss(logp, logp_old, logp_ref, advantages, mask, *rest)

    monkeypatch.setattr(grpo, "grpo_loss", watched)
    optimizer, config = torch.optim.SGD(policy.parameters("agent"), lr=1.0), Config(**FREE, epochs=epochs)
    stats = update(policy, optimizer, sampled(policy, REWARDS), "agent", config, random.Random(0))
    assert len(far) == epochs and far[0] < 1e-5 and all(distance > 0.3 for distance in far[1:])
    assert (stats["clip_rate"] > 0) == (epochs > 1)



# --- the loop ---

class Letters:
    """A toy task: the reward is the share of the letter e. `stop` is a (name, step) at which it is killed."""
    state = {}

    def __init__(self, policy, stop=None, letter="e"):
        self.policy, self.stop, self.seen = policy, stop, []
        self.letter = policy.encode([{"role": "user", "content": letter}])[1]

    def at(self, *place):
        if place == self.stop:
            raise KeyboardInterrupt

    def batch(self, step):
        self.at("batch", step)
        self.seen.append(step)
        rng = random.Random(step)
        texts = ["".join(rng.choices("abc ", k=rng.randint(1, 9))) for _ in range(4)]
        return [SimpleNamespace(prompt=self.policy.encode([{"role": "user", "content": text}])) for text in texts]

    def rewards(self, episodes, groups):
        shares = [[c.ids.count(self.letter) / len(c.ids) for c in group] for group in groups]
        self.at("rewards", self.seen[-1])
        return torch.tensor(shares), {"invalid_rate": 0.0}, [{"prompt": "p", "completion": groups[0][0].text}]

    def evaluate(self, when, step):
        self.at("evaluate", step)
        return [{"step": step, "eval": when, "n": 1, "em": 0.0, "drawn": torch.rand(1).item()}]


TOY = Config(steps=6, lr=1e-2, warmup=2, max_new_tokens=8, epochs=2, minibatch=3, checkpoint_every=1)


def run_toy(tiny, folder, stop=None, resume=False, config=TOY):
    """A run from the start as a script does it. Returns its policy, task and lines of metrics."""
    policy = tiny(b=0.0)
    seed_everything(5)
    task = Letters(policy, stop)
    run = Run(folder, vars(config), resume=resume)
    if stop:
        with pytest.raises(KeyboardInterrupt):
            train(policy, task, run, "agent", config)
    else:
        train(policy, task, run, "agent", config)
    rows = read_rows(folder / "metrics.jsonl")
    return policy, task, [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_toy_is_learned_and_the_base_stays(tiny, tmp_path):
    base = {name: weight.clone() for name, weight in tiny().model.state_dict().items()}
    policy, task, rows = run_toy(tiny, tmp_path, config=Config(
        steps=24, lr=3e-2, warmup=2, beta=0.001, temperature=0.5, max_new_tokens=8, checkpoint_every=100))
    steps = [row for row in rows if "eval" not in row]
    assert [row["step"] for row in steps] == list(range(1, 25)) == task.seen
    assert [row.get("eval") for row in rows] == ["untrained", *[None] * 24, "trained"]
    first, last = (sum(row["reward"] for row in some) / 3 for some in (steps[:3], steps[-3:]))
    assert first < 0.1 and last > 0.5, (first, last)
    expected = [0.015, *(0.03 * left / 24 for left in range(23, 0, -1))]  # two steps of warm-up, then down in a line
    assert [row["lr"] for row in steps] == pytest.approx(expected, rel=1e-5)
    assert {"reward", "reward_std", "zero_std_rate", "kl", "clip_rate", "entropy", "grad_norm", "lr",
            "completion_tokens", "invalid_rate"} <= steps[0].keys()
    assert abs(steps[0]["kl"] or 0) < 1e-6 and steps[-1]["kl"] > 0.1 and steps[-1]["entropy"] < 1
    after = policy.model.state_dict()
    assert base.keys() == after.keys() and all(torch.equal(base[name], after[name]) for name in base)
    policy.load_adapter("again", tmp_path / "adapter")
    assert all(map(torch.equal, policy.parameters("agent"), policy.parameters("again")))
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == list(range(1, 25))


def adapter_files(folder):
    return {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()}


def test_a_run_stopped_in_its_last_evaluation_still_has_one(tiny, tmp_path):
    _, _, whole = run_toy(tiny, tmp_path / "whole")
    run_toy(tiny, tmp_path / "stopped", ("evaluate", 6))
    for _ in range(2):  # a run that is complete stays as it is
        _, task, resumed = run_toy(tiny, tmp_path / "stopped", resume=True)
        assert task.seen == [] and resumed == whole
        assert adapter_files(tmp_path / "stopped") == adapter_files(tmp_path / "whole")


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(tiny, tmp_path):
    _, _, whole = run_toy(tiny, tmp_path / "whole")
    run_toy(tiny, tmp_path / "stopped", ("rewards", 1))
    _, task, resumed = run_toy(tiny, tmp_path / "stopped", resume=True)
    assert task.seen == [1, 2, 3, 4, 5, 6] and resumed == whole


# --- departures that are flags ---

def test_a_mean_over_tokens_weighs_long_completions_more():
    """Ratio 1 and A = 1: a row of 1 token and one of 3 give -1 each by the published mean; by tokens -1/2 and -3/2."""
    logp, mask = torch.zeros(2, 3), torch.tensor([[1., 0, 0], [1, 1, 1]])
    published, _, _ = grpo_loss(logp, logp, None, torch.ones(2), mask, 0.2, 0.0)
    by_tokens, _, _ = grpo_loss(logp, logp, None, torch.ones(2), mask, 0.2, 0.0, mean_length=2.0)
    assert published.tolist() == [-1, -1] and by_tokens.tolist() == [-0.5, -1.5]


def test_the_learning_rate_rises_and_falls():
    linear, constant = (Config(steps=10, warmup=2, schedule=schedule) for schedule in ("linear", "constant"))
    assert [grpo.learning_rate_share(step, linear) for step in (1, 2, 6, 10)] == pytest.approx([0.5, 0.9, 0.5, 0.1])
    assert [grpo.learning_rate_share(step, constant) for step in (1, 2, 6, 10)] == [0.5, 1, 1, 1]
