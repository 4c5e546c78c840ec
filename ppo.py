"""
PPO: policy-gradient fine-tuning with a value network (arXiv 1707.06347, eq. 7; Memory-R1, arXiv 2508.19828, eq. 2),
token by token. The baseline of a token is what a critic expected of the completion before that token was written.

One step: 1. a batch of P prompts   2. G completions of each   3. their rewards   4. advantages by GAE over the critic's
values, whitened over the batch   5. clipped surrogate with a KL penalty towards the reference, which is the same network
with LoRA switched off   6. AdamW on the adapter, and on the critic towards the returns, `epochs` passes over the step's
completions   7. a line in metrics.jsonl

What differs from the paper and why:
1. Its ratio is "per action"; here it is per token, as in VERL, which the paper used. A token is an action, the prompt
   and the tokens so far are the state.
2. Its critic is a second model; here it is a second adapter on the same weights, with a linear head. It starts at V = 0,
   and whitening then leaves reward minus mean reward: before the critic knows anything, the batch is the baseline.
3. It prints no KL term. Here k3 is in the loss, as in grpo.py, and not in the reward, as in InstructGPT: the critic has
   one thing to foresee, the outcome, and its explained variance says how well; and whitening cannot blow the penalty up
   to full size in a batch whose outcomes hardly differ. The price: no token is blamed for the KL of those after it.
4. Its learning rates (actor 1e-6, critic 1e-5) are for full fine-tuning; LoRA needs some 10 to 100 times as much.
5. GAE's parameters are not given. gamma = 1: no reason to hurry in a completion of some 30 tokens. lam = 1: the return
   of every token is the reward itself, no matter how wrong the critic still is; with 0.95 only a fifth of the outcome
   reaches a token 30 tokens before the end, the rest is hearsay.

Shapes: P prompts, G completions each, N = P*G rows, C tokens in the longest completion.
`mask` (N, C) is 1 where a token was sampled: its EOS yes, padding no. `_old`: at sampling, `_ref`: LoRA off.
"""
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from policy import Completion, Policy, spread


@dataclass(frozen=True)
class Config:
    steps: int = 60
    group_size: int = 8  # G; to PPO they are independent rollouts, and 1 will do
    batch_size: int = 16  # P, prompts a step
    epochs: int = 2  # passes over a step's completions; with 1 the ratio stays 1 and nothing is clipped
    minibatch: int = 0  # groups per optimizer step; 0: all of them at once
    lr: float = 2e-3  # for LoRA on the tiny model; 1e-5 to 1e-4 on a model of billions
    critic_lr: float = 5e-3  # a few times lr: the critic has to keep up with a policy that moves
    warmup: int = 5  # steps until the learning rates are reached
    clip: float = 0.2
    value_clip: float = 0.2  # a value may gain this much in a step; 0: no limit
    gamma: float = 1.0  # discount
    lam: float = 1.0  # GAE's lambda: 1 trusts the outcome, 0 the critic's next value
    beta: float = 0.01  # weight of the KL penalty
    temperature: float = 1.0
    max_new_tokens: int = 128
    grad_clip: float = 1.0
    micro_batch_tokens: int = 16384  # of one forward and backward pass; lower it if memory runs out
    checkpoint_every: int = 10  # steps
    seed: int = 0


class Task(Protocol):
    """What is to be learned. `ppo.py` sees prompts, completions and rewards, and nothing of what they are about."""

    def batch(self, step: int) -> list:
        """The episodes of a step, each with a `prompt` of token ids."""

    def rewards(self, episodes: list, groups: list[list[Completion]]) -> tuple[torch.Tensor, dict, list[dict]]:
        """Rewards (P, G), further numbers for the step's line, and rollouts as a person would read them."""

    def evaluate(self, when: str, step: int) -> list[dict]:
        """Held-out results, `when` = "untrained" or "trained"."""


@dataclass
class Rollouts:
    """One step's completions, and all that is known of them before the update."""
    prompts: list[list[int]]  # P
    completions: list[list[list[int]]]  # P x G token ids
    logp_old: torch.Tensor  # (N, C), like all below
    logp_ref: torch.Tensor
    values_old: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


class Critic(nn.Module):
    """
    V(s) = w . h(s) / sqrt(H) + b: what reward will this completion get? h is the last state under an adapter of the
    critic's own. w = b = 0 at the start. 1 / sqrt(H), as Adam moves each of the H weights by about its learning rate.
    """

    def __init__(self, policy: Policy, like: str):
        super().__init__()
        self.policy, shape = policy, policy.adapters[like]
        policy.add_adapter("critic", shape["r"], shape["lora_alpha"])
        self.adapter = nn.ParameterList(policy.parameters("critic"))
        self.w = nn.Parameter(torch.zeros(policy.head.in_features, device=policy.device))  # float32, as the adapter
        self.b = nn.Parameter(torch.zeros(1, device=policy.device))

    def forward(self, prompts, completions):
        """
        V before every completion token, (N, C). The state that predicts token t is the one in which t is chosen: the
        first value belongs to the prompt's last token, and none to the EOS. One place on, and a value would have seen
        the action whose baseline it is.
        """
        layout = self.policy.layout(prompts, completions)
        with self.policy.using("critic"):
            hidden = self.policy.hidden(layout).float()
        return spread(hidden @ self.w / len(self.w) ** 0.5 + self.b, layout.mask)


# ------------------------------------------------------------------------------------------------ the algorithm

def terminal_rewards(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each completion's reward at its last sampled token, its EOS: [1.], [[1, 1, 0]] -> [[0., 1., 0.]]. (N,) -> (N, C)"""
    # A completion that was cut off ends here too, without a bootstrap: it is judged as it stands, nothing is to come.
    per_token = torch.zeros(mask.shape, device=mask.device)
    return per_token.scatter(1, mask.sum(dim=1, keepdim=True) - 1, rewards[:, None])


def gae(rewards, values, mask, gamma, lam):
    """
    A_t = delta_t + gamma lam A_t+1,   delta_t = r_t + gamma V_t+1 - V_t   (1506.02438, eq. 16, from the end backwards)
    All (N, C). lam = 1: what was earned from t on, minus V_t. lam = 0: delta_t.
    """
    advantages = torch.zeros_like(values)
    value_after = advantage_after = torch.zeros_like(values[:, 0])  # V = 0 after the end: no state follows the EOS
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        advantages[:, t] = (delta + gamma * lam * advantage_after).where(mask[:, t], 0)
        value_after, advantage_after = values[:, t].where(mask[:, t], 0), advantages[:, t]
    return advantages


def whiten(values: torch.Tensor, mask: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """Mean 0 and deviation 1 over all sampled tokens of the batch; padding neither counts nor is changed from 0."""
    real = values[mask]
    return ((values - real.mean()) / (real.std(correction=0) + eps)).where(mask, 0)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for a critic that foresees all, 0 for a constant one, below for a misleading one."""
    variance = returns[mask].var(correction=0)
    return (1 - (returns - values)[mask].var(correction=0) / variance).item() if variance > 0 else float("nan")


def kl_k3(logp: torch.Tensor, logp_ref: torch.Tensor) -> torch.Tensor:
    """
    KL(pi | pi_ref) per token by the k3 estimator, ref/pi - log(ref/pi) - 1: never negative, and unbiased under samples
    of pi (http://joschu.net/blog/kl-approx.html). k1 as a loss would have a gradient of mean zero.
    """
    gap = logp_ref - logp
    return gap.exp() - gap - 1


def ppo_loss(logp, logp_old, logp_ref, advantages, mask, clip, beta):
    """
    J = 1/N sum_i 1/|o_i| sum_t { min[ rho A, clip(rho, 1 - eps, 1 + eps) A ] - beta KL(pi | pi_ref) }  (1707.06347, eq. 7)
    logp, logp_old, logp_ref, advantages, mask (N, C). Returns -J per row (N,), and per token (N, C) the KL and whether
    the clip took the gradient away. The mean over a completion first, as in grpo.py: long ones do not weigh more.
    """
    A = advantages  # one number for each token
    rho = (logp - logp_old).exp()  # 1 until the first optimizer step
    clipped = rho.clamp(1 - clip, 1 + clip) * A
    kl = kl_k3(logp, logp_ref)
    objective = torch.min(rho * A, clipped) - beta * kl  # min for both signs of A
    return -row_means(objective, mask), kl.detach(), (clipped < rho * A).detach()


def value_loss(values, values_old, returns, mask, clip):
    """
    1/2 1/|o_i| sum_t max[ (V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2 ]: the gradient ends where V has left the
    band towards R (or beyond). Not in the paper of PPO but in OpenAI's code of it. (N, C) x 4 -> (N,)
    """
    error = (values - returns) ** 2
    if clip > 0:
        clipped = torch.clamp(values, values_old - clip, values_old + clip)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * row_means(error, mask)


def row_means(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N, C) -> (N,)"""
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
