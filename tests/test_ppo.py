"""PPO against double loops and sums by hand, and on a tiny random model that must learn within seconds."""
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from toys import rows_of

import ppo
from ppo import Config, Critic, explained_variance, gae, ppo_loss, terminal_rewards, value_loss, whiten
from support.loop import fit
from support.run import Run

PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [14, 15, 16]]
COMPLETIONS = [[[20, 21, 22, 2], [23]], [[24, 25, 26], [27] * 9], [[28, 2], [29, 30, 31, 32, 2]]]
STAR, GOOD, BAD = 40, 41, 42  # the rewarded token, and tokens that mark a prompt with and without rewards


def ragged(seed, N=5, C=7):
    """Random numbers, also on padding, and at least one real token per row."""
    torch.manual_seed(seed)
    lengths = torch.randint(1, C + 1, (N,))
    return torch.randn(N, C), torch.randn(N, C), torch.arange(C) < lengths[:, None]


# --- rewards, advantages ---

def test_the_reward_sits_on_the_last_sampled_token():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    assert terminal_rewards(torch.tensor([1., 2., 3.]), mask).tolist() == [[0, 0, 1], [2, 0, 0], [0, 3, 0]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.8, 0.0), (0.7, 1.0)])
def test_gae_equals_a_double_loop(seed, gamma, lam):
    rewards, values, mask = ragged(seed)
    found = gae(rewards, values, mask, gamma, lam)
    for n, length in enumerate(mask.sum(1).tolist()):
        V = [*values[n, :length].tolist(), 0.0]  # nothing after the end
        delta = [rewards[n, t].item() + gamma * V[t + 1] - V[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert found[n, t].item() == pytest.approx(expected, abs=1e-5)
    assert not found[~mask].any()


def test_gae_in_closed_form():
    _, values, mask = ragged(0)
    outcome = torch.randn(5)
    rewards = terminal_rewards(outcome, mask)
    monte_carlo = gae(rewards, values, mask, 1.0, 1.0)  # the return of every token is the outcome
    torch.testing.assert_close(monte_carlo, (outcome[:, None] - values) * mask)
    one_step = gae(rewards, values, mask, 1.0, 0.0)
    after = torch.cat([values * mask, torch.zeros(5, 1)], dim=1)[:, 1:]
    torch.testing.assert_close(one_step, (rewards + after - values) * mask)


def test_whitening_is_over_sampled_tokens_only():
    values, mask = torch.tensor([[1., 2., 99.], [6., -50., 7.]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    deviation = math.sqrt((4 + 1 + 9) / 3)  # of 1, 2, 6, whose mean is 3
    expected = torch.tensor([[-2., -1., 0.], [3., 0., 0.]]) / (deviation + 1e-4)
    torch.testing.assert_close(whiten(values, mask), expected)
    assert not whiten(torch.full((2, 3), 0.7), mask).any()


def test_explained_variance_by_hand():
    mask, returns = torch.tensor([[1, 1, 0], [1, 1, 0]]).bool(), torch.tensor([[0., 0., 5.], [1., 1., 5.]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((2, 3), 0.3), returns, mask) == pytest.approx(0)
    assert explained_variance(torch.tensor([[0.25, 0.25, 9], [0.75, 0.75, 8]]), returns, mask) == pytest.approx(0.75)
    assert explained_variance(1 - returns, returns, mask) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, torch.ones(2, 3), mask))


# --- losses ---

@pytest.mark.parametrize("A, rho, objective, slope", [
    (1, 0.5, 0.5, 0.5), (1, 0.9, 0.9, 0.9), (1, 1.1, 1.1, 1.1), (1, 2.0, 1.2, 0),
    (-1, 0.5, -0.8, 0), (-1, 0.9, -0.9, -0.9), (-1, 1.1, -1.1, -1.1), (-1, 2.0, -2.0, -2.0)])
def test_policy_loss_by_hand(A, rho, objective, slope):
    logp, one = torch.tensor([[math.log(rho)]], requires_grad=True), torch.ones(1, 1)
    loss, kl, is_clipped = ppo_loss(logp, 0 * one, None, A * one, one, 0.2, 0.1)
    loss.sum().backward()
    assert (-loss.item(), -logp.grad.item()) == pytest.approx((objective, slope), abs=1e-6)
    assert is_clipped.item() == (slope == 0) and kl.item() == 0


def test_policy_loss_is_a_mean_over_each_completion_with_a_kl_penalty():
    logp = torch.tensor([[-1., -2., 0.], [-3., 0., 0.]], requires_grad=True)
    mask, A = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[1., -2., 9.], [3., 9., 9.]])
    gap = torch.tensor([[0.5, 0, 0], [-1, 0, 0]])
    loss, kl, _ = ppo_loss(logp, logp.detach(), logp.detach() + gap, A, mask, 0.2, 0.1)
    k3 = [math.exp(0.5) - 1.5, math.exp(-1)]
    assert kl[:, 0].tolist() == pytest.approx(k3)
    assert loss.tolist() == pytest.approx([-(1 - 2 - 0.1 * k3[0]) / 2, -(3 - 0.1 * k3[1])])
    loss.sum().backward()
    expected = [[-(1 - 0.1 * (1 - math.exp(0.5))) / 2, 1, 0], [-(3 - 0.1 * (1 - math.exp(-1))), 0, 0]]
    torch.testing.assert_close(logp.grad, torch.tensor(expected))


@pytest.mark.parametrize("V, R, loss, slope", [  # V_old = 0, clip 0.2
    (0.1, 1, 0.5 * 0.81, -0.9),  # inside the band
    (0.5, 1, 0.5 * 0.64, 0), (-0.5, -1, 0.5 * 0.64, 0),  # far enough towards R
    (-0.5, 1, 0.5 * 2.25, -1.5), (0.5, -1, 0.5 * 2.25, 1.5)])  # away from R: must come back
def test_value_loss_by_hand(V, R, loss, slope):
    values, one = torch.tensor([[V]], requires_grad=True), torch.ones(1, 1)
    found = value_loss(values, 0 * one, R * one, one, 0.2)
    found.sum().backward()
    assert (found.item(), values.grad.item()) == pytest.approx((loss, slope))
    assert value_loss(values, 0 * one, R * one, one, 0).item() == pytest.approx(0.5 * (V - R) ** 2)


def test_padding_changes_nothing():
    x, y, mask = ragged(1)
    spoil = [torch.where(mask, part, 1e3 * torch.randn(mask.shape)) for part in (x, y, x, y)]
    for function in (lambda a, b, c, d: gae(a, b, mask, 0.9, 0.9), lambda a, b, c, d: whiten(a, mask),
                     lambda a, b, c, d: torch.tensor(explained_variance(a, b, mask)),
                     lambda a, b, c, d: value_loss(a, b, c + d, mask, 0.2),
                     lambda a, b, c, d: ppo_loss(a / 1e3, b / 1e3, c / 1e3, d, mask, 0.2, 0.1)[0]):
        found = []
        for parts in ((x, y, x, y), spoil):
            first = parts[0].clone().requires_grad_()
            out = function(first, *parts[1:])
            slope = torch.autograd.grad(out.sum(), first)[0] if out.requires_grad else torch.zeros_like(first)
            assert not slope[~mask].any()
            found.append((out.detach(), slope))
        torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)


# --- the critic ---

def wake(critic):
    """Draw all weights, as if the critic had been trained."""
    torch.manual_seed(2)
    for _, parameter in critic.named_trainable():
        torch.nn.init.normal_(parameter, std=0.3)
    return critic


def test_values_belong_to_the_states_before_each_token_and_start_small(tiny):
    policy = tiny()
    critic = Critic(policy, like="agent")
    assert 0 < critic(PROMPTS, COMPLETIONS).abs().max() < 0.2
    assert policy.adapters["critic"] == policy.adapters["agent"]
    values, row = wake(critic)(PROMPTS, COMPLETIONS), 0
    with policy.using("critic"):
        for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True):
            for c in group:  # alone, without padding: from the prompt's last state to the one before the EOS
                states = policy.model.base_model(torch.tensor([prompt + c[:-1]])).last_hidden_state[0, len(prompt) - 1:]
                expected = states @ critic.w / 32 ** 0.5 + critic.b
                torch.testing.assert_close(values[row, :len(c)], expected, atol=1e-4, rtol=0)
                assert not values[row, len(c):].any()
                row += 1


def test_a_value_does_not_depend_on_its_own_token(tiny):
    critic = wake(Critic(tiny(), like="agent"))
    before, after = critic([PROMPTS[0]], [[[20, 21, 22]]])[0], critic([PROMPTS[0]], [[[20, 33, 22]]])[0]
    torch.testing.assert_close(before[:2], after[:2])
    assert (before[2] - after[2]).abs() > 1e-3


def rollouts(policy, critic, config=None):
    """Sampled completions of different lengths, some cut off, with random rewards."""
    config = config or Config(group_size=2, max_new_tokens=12)
    torch.manual_seed(3)
    with policy.using("agent"):
        groups = policy.sample(PROMPTS, config.group_size, config.max_new_tokens, config.temperature)
    rewards = torch.rand(len(PROMPTS) * config.group_size)
    return ppo.make_rollouts(policy, critic, PROMPTS, groups, rewards, config), groups


def gradients(parameters):
    return [None if x.grad is None else x.grad.clone() for x in parameters]


def test_rollouts_hold_values_returns_and_a_ratio_of_1(tiny):
    policy = tiny()
    critic, config = wake(Critic(policy, like="agent")), Config(group_size=8, max_new_tokens=24, micro_batch_tokens=1)
    found, groups = rollouts(policy, critic, config)
    flat = [completion for group in groups for completion in group]
    assert {completion.finished for completion in flat} == {True, False}  # cut-off ones have a reward too
    with policy.using("agent"), torch.no_grad():
        scores = policy.score(PROMPTS, found.completions)
    assert torch.equal(found.mask, scores.mask) and found.mask.sum(1).tolist() == [len(x.ids) for x in flat]
    torch.testing.assert_close((scores.logp - found.logp_old).exp(), torch.ones(found.mask.shape), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.values_old, critic(PROMPTS, found.completions).detach(), atol=1e-4, rtol=0)
    torch.manual_seed(3)
    with policy.using("agent"):
        policy.sample(PROMPTS, 8, 24)
    rewards = torch.rand(3, 8).flatten()  # returns come from the rewards, not from whitened advantages
    torch.testing.assert_close(found.returns, rewards[:, None] * found.mask, atol=1e-5, rtol=1e-5)
    assert found.advantages[found.mask].mean().abs() < 1e-5


def test_each_loss_reaches_its_own_adapter_only(tiny):
    policy = tiny()
    critic = wake(Critic(policy, like="agent"))
    agent, judge = policy.parameters("agent"), [x for _, x in critic.named_trainable()]
    found, _ = rollouts(policy, critic)

    def slopes(**changes):
        for x in agent + judge:
            x.grad = None
        ppo.accumulate_gradients(policy, critic, replace(found, **changes), 6, "agent", Config(value_clip=0))
        return gradients(agent), gradients(judge)

    (actor, judged), (same, moved), (changed, kept) = (
        slopes(), slopes(returns=found.returns + 1), slopes(advantages=-found.advantages))
    assert all(x.abs().max() > 0 for x in actor + judged)
    assert all(map(torch.equal, actor, same)) and all(map(torch.equal, judged, kept))
    assert not any(map(torch.equal, actor, changed)) and not any(map(torch.equal, judged, moved))
    assert all(x.grad is None for x in policy.model.parameters() if not any(x is y for y in agent + judge))


@pytest.mark.parametrize("loss_mean", ["completion", "token"])
@pytest.mark.parametrize("tokens", [1, 10**6])
def test_an_update_follows_the_mean_of_its_setting(tiny, tokens, loss_mean):
    policy, config = tiny(), Config(beta=0.5, grad_clip=1e9, temperature=0.7, micro_batch_tokens=tokens,
                                    loss_mean=loss_mean)
    critic = wake(Critic(policy, like="agent"))
    agent, judge = policy.parameters("agent"), [x for _, x in critic.named_trainable()]
    found, _ = rollouts(policy, critic, Config(group_size=2, max_new_tokens=12, temperature=0.7))
    optimizer = torch.optim.SGD([{"params": policy.named_parameters("agent")},
                                 {"params": critic.named_trainable()}], lr=0)
    numbers = ppo.update(policy, critic, optimizer, found, "agent", config, 1)
    slopes = gradients(agent + judge)
    with policy.using("agent"):
        logp = policy.score(PROMPTS, found.completions, 0.7).logp
    logp_ref = policy.score(PROMPTS, found.completions, 0.7).logp
    values = critic(PROMPTS, found.completions)
    assert found.mean_length == pytest.approx(found.mask.sum().item() / 6)
    losses, kl, _ = ppo_loss(logp, found.logp_old, logp_ref, found.advantages, found.mask, 0.2, 0.5,
                             found.mean_length if loss_mean == "token" else None)
    errors = value_loss(values, found.values_old, found.returns, found.mask, 0.2)
    expected = torch.autograd.grad(losses.mean() + errors.mean(), agent + judge)
    torch.testing.assert_close(slopes, list(expected), atol=1e-4, rtol=1e-3)
    assert numbers["kl"] == pytest.approx(kl[found.mask].mean().item(), rel=1e-3) and numbers["clip_rate"] == 0
    half_squares = 0.5 * (found.values_old - found.returns)[found.mask] ** 2
    assert numbers["value_loss"] == pytest.approx(half_squares.mean().item(), rel=1e-3)


# --- learning ---

class Toy:
    """The reward is the fraction of STAR among the tokens; if prompts matter, only after prompts that hold GOOD."""
    state, played = {}, None

    def __init__(self, num_prompts=8, prompts_matter=False, reward=None):
        self.num_prompts, self.prompts_matter, self.reward = num_prompts, prompts_matter, reward

    def batch(self, step):
        rng = random.Random(step)
        return [SimpleNamespace(prompt=[5, rng.choice([GOOD, BAD]), *rng.choices(range(50, 90), k=rng.randint(1, 5))])
                for _ in range(self.num_prompts)]

    def rewards(self, episodes, groups):
        rewards = [[0.0 if self.prompts_matter and BAD in episode.prompt else
                    completion.ids.count(STAR) / len(completion.ids) if self.reward is None else self.reward
                    for completion in group] for episode, group in zip(episodes, groups, strict=True)]
        return torch.tensor(rewards), {"invalid_rate": 0.0}, [{"completion": str(groups[0][0].ids)}]

    def evaluate(self, when, step):
        return [{"step": step, "eval": when, "n": 0}]


def trained(policy, toy, folder, **changes):
    """The lines of the steps, without the seconds."""
    config = Config(**dict(steps=20, batch_size=8, group_size=8, epochs=2, max_new_tokens=8, minibatch=0, lr=1e-2,
                           critic_lr=1e-2, loss_mean="completion") | changes)
    transformers.set_seed(config.seed)
    fit(ppo.train, policy, toy, Run(folder, {"steps": config.steps}), "agent", config)
    return [row for row in rows_of(folder) if "eval" not in row]


@pytest.mark.parametrize("group_size", [8, 1])
def test_it_learns(tiny, tmp_path, group_size):
    policy = tiny(b=0)
    base = {name: x.clone() for name, x in policy.model.named_parameters()}
    rows = trained(policy, Toy(64 // group_size), tmp_path, steps=30, group_size=group_size)
    assert rows[0]["reward"] < 0.1 and rows[-1]["reward"] > 0.5
    assert rows[0]["kl"] < 1e-3
    assert (rows[0]["reward_std"] > 0) == (group_size > 1)
    assert (rows[0]["lr"], rows[-1]["lr"]) == pytest.approx((1e-2 / 5, 1e-2 / 30))
    assert {"step", "reward", "reward_std", "zero_std_rate", "kl", "clip_rate", "entropy", "grad_norm", "lr",
            "value_loss", "explained_variance", "completion_tokens", "invalid_rate", "unfinished_rate"} <= set(rows[0])
    assert all(torch.equal(x, base[name]) for name, x in policy.model.named_parameters())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_critic_learns_the_value_of_a_prompt(tiny, tmp_path):
    rows = trained(tiny(b=0), Toy(prompts_matter=True), tmp_path, steps=32)
    assert sum(row["explained_variance"] for row in rows[-5:]) / 5 > 0.3


def test_in_one_pass_the_ratio_is_1_at_any_temperature(tiny, tmp_path):
    [row] = trained(tiny(b=0), Toy(), tmp_path, steps=1, epochs=1, temperature=1.5, clip=1e-4)
    assert row["clip_rate"] == 0 and row["kl"] < 1e-6 and row["grad_norm"] > 0


def test_equal_rewards_give_the_actor_no_gradient_while_the_critic_is_constant(tiny, tmp_path, monkeypatch):
    policy = tiny()
    before = [x.clone() for x in policy.parameters("agent")]
    monkeypatch.setattr(torch, "randn", torch.zeros)  # w = 0: the same value everywhere
    [row] = trained(policy, Toy(reward=1.0), tmp_path, steps=1, beta=0)
    assert all(map(torch.equal, before, policy.parameters("agent")))
    assert row["grad_norm"] == 0 and row["zero_std_rate"] == 1 and row["explained_variance"] is None
