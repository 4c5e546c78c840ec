"""
PPO: policy-gradient fine-tuning with a value network (arXiv 1707.06347, eq. 7; Memory-R1, arXiv 2508.19828, eq. 2),
token by token. The baseline of a token is the critic's estimate of the reward before that token was written.

One training step, with the function that does it:
1. take a batch of P prompts                                                  task.batch
2. sample G completions for each prompt                                       policy.sample
3. compute their rewards                                                      task.rewards
4. compute advantages by GAE from the critic's values, whitened over the
   batch, and the log-probs of the reference                                  gae, whiten, make_rollouts
   (outputs of trajectories: support/trajectories.py)                         add_trajectories
5. compute the clipped surrogate, the KL penalty and the critic's error, and
   their gradients                                       ppo_loss, value_loss, accumulate_gradients
6. update both adapters with AdamW, in `epochs` passes over the rollouts      update
7. write one line to metrics.jsonl                                            loop.log

Differences from Memory-R1:
1. Its ratio is "per action". Here it is per token, as in VERL, which Memory-R1 used: a token is an action, the prompt
   and the tokens so far are the state.
2. Its critic is a second model. Here it is a second adapter on the same weights, with a linear head. V starts near 0.
   At first the baseline is therefore the mean reward over all tokens, which whitening subtracts. The critic is always a
   new adapter, also where the policy starts from a trained one.
3. It has no KL term. Here k3 is in the loss, as in grpo.py. InstructGPT has the KL in the reward, where the critic must
   predict it, and whitening enlarges it if all outcomes are similar (as it enlarges the critic's errors). A drawback of
   the loss: a token gets no gradient from the KL of later tokens.
4. Its learning rates (actor 1e-6, critic 1e-5) are for full fine-tuning. LoRA needs 10 to 100 times as much.
5. It gives no GAE parameters. gamma = 1: short completions need no discount. gae_lambda = 1: every token's return is
   the reward, however wrong the critic is. With 0.95, a token 30 steps before the end would get .95^30 = .21 of it.

Shapes: P prompts, G completions each, N = P*G rows, C tokens in the longest completion.
`mask` (N, C) is True where a token was sampled, including the EOS. `_old`: at sampling. `_ref`: the reference, which is
the initial policy: LoRA off, because a new adapter changes nothing, or a frozen copy of --init-adapter.
"""
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import nn

from policy import Policy
from support.cli import exit_cleanly, flag
from support.loop import mean_per_token, optimizer_step, rollout_metrics, update_metrics
from support.packing import scatter_to_mask
from support.rollouts import minibatches, sampled_tensors, select_groups
from support.toy import show_toy


@dataclass(frozen=True)
class Config:
    """The defaults train the tiny model's Manager; train_manager.py and train_answer.py have the presets for others."""
    steps: int = flag(90, "training steps; each samples one batch of rollouts", least=1)
    group_size: int = flag(4, "completions of each prompt, G; PPO treats them as independent", least=1)
    batch_size: int = flag(24, "prompts in a step, P", least=1)
    epochs: int = flag(1, "passes over the rollouts of a step", least=1)
    minibatch: int = flag(6, "groups per optimizer step; 0: all. The critic learns from several steps", least=0)
    lr: float = flag(1e-3, "peak learning rate", least=0)
    critic_lr: float | None = flag(None, "peak learning rate of the critic; by default twice --lr", least=0)
    warmup: int = flag(5, "steps over which the learning rates rise", least=0)
    schedule: str = flag("linear", "learning rates after the warmup", choices=("linear", "constant"))
    clip: float = flag(0.2, "the ratio is clipped to 1 +- this", above=0)
    value_clip: float = flag(0.2, "no gradient once a value has moved this far toward its return; 0: no limit", least=0)
    gamma: float = flag(1.0, "discount", least=0, most=1)
    gae_lambda: float = flag(1.0, "GAE's lambda: 1 trusts the outcome, 0 the critic's next value", least=0, most=1)
    beta: float = flag(0.01, "weight of the KL penalty toward the reference policy", least=0)
    loss_mean: str = flag("token", "token: mean over all tokens; completion: mean over each completion, then over all "
                          "completions, as published", choices=("completion", "token"))
    temperature: float = flag(1.0, "sampling temperature in training; evaluation is greedy", above=0)
    max_new_tokens: int = flag(80, "longest completion in tokens", least=1)
    grad_clip: float = flag(1.0, "maximum norm of each adapter's gradient; 0: no limit", least=0)
    micro_batch_tokens: int = flag(0, "tokens of one forward and backward pass; 0: as many as fit", least=0)
    checkpoint_every: int = flag(10, "steps between checkpoints", least=1)
    seed: int = flag(0, "random seed")


@dataclass(frozen=True)
class Rollouts:
    """The input of the update: the completions of a step, or some groups of them."""
    prompts: list[list[int]]  # P
    completions: list[list[list[int]]]  # P x G token ids (trajectories: groups of one)
    mask: torch.Tensor  # (N, C), like all tensors below
    logp_old: torch.Tensor
    values_old: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    mean_length: float  # tokens per completion, over all groups of the step
    logp_ref: torch.Tensor | None = None  # None if beta = 0


class Critic(nn.Module):
    """
    V(s) = w . h(s) / sqrt(H) + b: the expected reward of a completion. h is the last hidden state under the critic's
    own adapter. At the start b = 0 and w is small, but not 0: with w = 0 the adapter gets no gradient, and on the tiny
    model it never learned. 1 / sqrt(H), because Adam moves each of the H weights by about its learning rate.
    """

    def __init__(self, policy: Policy, like: str):
        super().__init__()
        self.policy, shape = policy, policy.adapters[like]
        policy.add_adapter("critic", shape["r"], shape["lora_alpha"])
        self.w = nn.Parameter(0.03 * torch.randn(policy.head.in_features, device=policy.device))  # float32
        self.b = nn.Parameter(torch.zeros(1, device=policy.device))

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        named = [*self.policy.named_parameters("critic"), *self.named_parameters()]
        return [(f"critic.{name}", parameter) for name, parameter in named]

    def forward(self, prompts, completions):
        """
        V before every completion token, (N, C), from the hidden state that predicts the token: the first value belongs
        to the prompt's last token. A value one position later would depend on the action whose baseline it is.
        """
        with self.policy.using("critic"):
            batch = self.policy.pack_batch(prompts, completions)
            hidden = self.policy.hidden(batch).float()  # (T, H)
        return scatter_to_mask(hidden @ self.w / len(self.w) ** 0.5 + self.b, batch.mask)


def terminal_rewards(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The reward of each completion at its last sampled token. ([1.], [[1, 1, 0]]) -> [[0., 1., 0.]]"""
    per_token = torch.zeros(mask.shape, device=mask.device)
    return per_token.scatter(1, mask.sum(dim=1, keepdim=True) - 1, rewards[:, None])


def add_trajectories(prompts, groups, rewards, played=None):
    """
    Append the outputs of trajectories (`played`) to a step's groups. Returns prompts, groups, rewards (N,) and the
    weight of each row's advantages (N, 1). `rewards` (P, G) are those of the groups; the reward of an output is its
    trajectory's outcome.
    """
    rewards = rewards.flatten()
    if not played:
        return prompts, groups, rewards, torch.ones(len(rewards), 1)
    weights = torch.cat([torch.full((len(part), 1), weight)
                         for part, weight in zip((rewards, played.rewards), played.weights, strict=True)])
    return *played.append_to(prompts, groups), torch.cat([rewards, played.rewards]), weights


def gae(rewards, values, mask, gamma, lam):
    """
    A_t = delta_t + gamma lam A_t+1,   delta_t = r_t + gamma V_t+1 - V_t   (1506.02438, eq. 16, backwards from the end)
    All (N, C). lam = 1: the discounted rewards from t on, minus V_t. lam = 0: delta_t.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # V = 0 after the end, even if cut off
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = (delta + gamma * lam * next_advantage).where(mask[:, t], 0)
        next_value, next_advantage = values[:, t].where(mask[:, t], 0), advantages[:, t]
    return advantages


def whiten(values: torch.Tensor, mask: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """Mean 0 and standard deviation 1 over all sampled tokens of the batch; padding does not count and becomes 0."""
    real = values[mask]
    return ((values - real.mean()) / (real.std(correction=0) + eps)).where(mask, 0)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one, negative for a misleading one."""
    variance = returns[mask].var(correction=0)
    return (1 - (returns - values)[mask].var(correction=0) / variance).item() if variance > 1e-9 else float("nan")


def kl_k3(logp: torch.Tensor, logp_ref: torch.Tensor) -> torch.Tensor:
    """
    KL(pi | pi_ref) per token by the k3 estimator, ref/pi - log(ref/pi) - 1: never negative, and its mean under pi is
    the KL (http://joschu.net/blog/kl-approx.html). As a loss, its mean gradient is that of KL(pi_ref | pi).
    """
    gap = logp_ref - logp
    return gap.exp() - gap - 1


def ppo_loss(logp, logp_old, logp_ref, advantages, mask, clip, beta, mean_length=None):
    """
    J = 1/N sum_i 1/|o_i| sum_t { min[ rho A, clip(rho, 1 - eps, 1 + eps) A ] - beta KL(pi | pi_ref) }
    (1707.06347, eq. 7, with the mean over each completion before the mean over completions, as in grpo.py).
    `mean_length` replaces every |o_i|, which gives the mean over all tokens.
    logp, logp_old, logp_ref, advantages, mask (N, C). logp_ref None: no KL term. Returns -J per row (N,),
    before the mean over rows, and per token (N, C) the KL and whether the clip removed the surrogate's gradient.
    """
    A = advantages  # a different number for every token
    rho = (logp - logp_old).exp()  # 1 up to rounding until the first optimizer step
    clipped = rho.clamp(1 - clip, 1 + clip) * A
    kl = kl_k3(logp, logp_ref) if logp_ref is not None else torch.zeros_like(logp)
    objective = torch.min(rho * A, clipped) - beta * kl  # min for both signs of A
    per_row = (objective * mask).sum(dim=1) / (mean_length or mask.sum(dim=1).clamp(min=1))
    return -per_row, kl.detach(), (clipped < rho * A).detach()


def value_loss(values, values_old, returns, mask, clip):
    """
    1/2 1/|o_i| sum_t max[ (V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2 ]: no gradient once V has moved
    toward R by eps. Not in the PPO paper, but in OpenAI's code. The mean is over each completion. (N, C) x 4 -> (N,)
    """
    error = (values - returns) ** 2
    if clip > 0:
        clipped = torch.clamp(values, values_old - clip, values_old + clip)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * (error * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def make_rollouts(policy: Policy, critic, prompts, groups, rewards, config: Config, reference=None) -> Rollouts:
    """Values, advantages, returns and reference log-probs of completions with rewards (N,), without gradient."""
    completions = [[completion.ids for completion in group] for group in groups]
    mask, logp_old = sampled_tensors(groups, policy.device)
    values = policy.map_groups(critic, prompts, completions, config.micro_batch_tokens)  # (N, C)
    per_token = terminal_rewards(rewards.to(policy.device), mask)
    advantages = gae(per_token, values, mask, config.gamma, config.gae_lambda)
    returns = advantages + values  # before whitening: the critic learns rewards, not z-scores
    rollouts = Rollouts(prompts, completions, mask, logp_old, values, whiten(advantages, mask), returns,
                        mean_length=mask.sum().item() / len(mask))
    if config.beta == 0:
        return rollouts
    with policy.using(reference):
        logp_ref = policy.map_groups(lambda *batch: policy.score(*batch, config.temperature).logp, prompts,
                                     completions, config.micro_batch_tokens)
    return replace(rollouts, logp_ref=logp_ref)


def update(policy, critic: Critic, optimizer, rollouts: Rollouts, adapter: str, config: Config, step: int) -> dict:
    """`epochs` passes over the rollouts, one optimizer step per minibatch. Returns means over the tokens used."""
    sums, updates = Counter(kl=0.0, clip_rate=0.0, value_loss=0.0, tokens=0), []
    for epoch in range(config.epochs):
        for minibatch in minibatches(rollouts, config.minibatch, f"{config.seed} {step} {epoch}"):
            optimizer.zero_grad(set_to_none=True)
            for indices in policy.micro_batches(minibatch.prompts, minibatch.completions, config.micro_batch_tokens):
                part = select_groups(minibatch, indices)
                sums.update(accumulate_gradients(policy, critic, part, len(minibatch.mask), adapter, config))  # adds
            updates.append(optimizer_step(optimizer, config.grad_clip, minibatch))
    return mean_per_token(sums) | update_metrics(updates)


def accumulate_gradients(policy, critic, part: Rollouts, num_rows: int, adapter: str, config: Config) -> Counter:
    """Backward passes for some groups of a minibatch of `num_rows` completions. Returns sums over their tokens."""
    with policy.using(adapter):  # also for backward, where gradient checkpointing recomputes the layers
        logp, _, mask = policy.score(part.prompts, part.completions, config.temperature)
        losses, kl, is_clipped = ppo_loss(logp, part.logp_old, part.logp_ref, part.advantages, mask, config.clip,
                                          config.beta, part.mean_length if config.loss_mean == "token" else None)
        (losses.sum() / num_rows).backward()
    with policy.using("critic"):
        errors = value_loss(critic(part.prompts, part.completions), part.values_old, part.returns, mask,
                            config.value_clip)
        (errors.sum() / num_rows).backward()  # no coefficient: but for clipping, Adam would cancel it
    return Counter(kl=(kl * mask).sum().item(), clip_rate=(is_clipped * mask).sum().item(), tokens=mask.sum().item(),
                   value_loss=(errors.detach() * mask.sum(dim=1)).sum().item())  # a row's mean for each of its tokens


def train(policy: Policy, task, loop, adapter: str, config: Config) -> None:
    """`config.steps` training steps. `loop` (support/loop.py) resumes, seeds, evaluates, saves and stops."""
    critic = Critic(policy, like=adapter)
    critic_lr = 2 * config.lr if config.critic_lr is None else config.critic_lr  # the critic follows a moving policy
    optimizer = torch.optim.AdamW([{"params": policy.named_parameters(adapter), "lr": config.lr},
                                   {"params": critic.named_trainable(), "lr": critic_lr}],
                                  betas=(0.9, 0.95), weight_decay=0.0)
    for step in loop.steps(optimizer):
        episodes = task.batch(step)
        prompts = [episode.prompt for episode in episodes]
        with policy.using(adapter):
            groups = policy.sample(prompts, config.group_size, config.max_new_tokens, config.temperature)
        rewards, task_metrics, samples = task.rewards(episodes, groups)  # (P, G)
        prompts, all_groups, all_rewards, weights = add_trajectories(prompts, groups, rewards, task.played)
        rollouts = make_rollouts(policy, critic, prompts, all_groups, all_rewards, config, loop.reference)
        rollouts = replace(rollouts, advantages=rollouts.advantages * weights.to(policy.device))
        metrics = update(policy, critic, optimizer, rollouts, adapter, config, step)
        metrics["explained_variance"] = explained_variance(rollouts.values_old, rollouts.returns, rollouts.mask)
        loop.log(step, rollout_metrics(rewards, groups) | metrics | task_metrics, samples)


def main(argv=None) -> None:
    config = Config(steps=12, group_size=8, minibatch=2, lr=3e-3, max_new_tokens=4, loss_mean="completion")
    show_toy("PPO", train, config, Policy.load, argv)


if __name__ == "__main__":
    exit_cleanly(main)
