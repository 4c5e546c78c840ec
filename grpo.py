"""
GRPO: policy-gradient fine-tuning without a value network (DeepSeekMath, arXiv 2402.03300, sec. 4.1; Memory-R1, arXiv
2508.19828, eq. 3). The baseline of a completion is the mean reward of its group: the completions of the same prompt.

One training step, with the function that does it:
1. take a batch of P prompts                                                  task.batch
2. sample a group of G completions for each prompt                            policy.sample
3. compute their rewards                                                      task.rewards
4. compute advantages inside each group, and the log-probs of the reference   group_advantages, make_rollouts
   (groups of trajectories' outputs: those with equal labels)                 labelled_advantages
5. compute the clipped surrogate and the KL penalty, and their gradients      grpo_loss, accumulate_gradients
6. update the adapter with AdamW, in `epochs` passes over the rollouts        update
7. write one line to metrics.jsonl                                            loop.log

Differences from Memory-R1:
1. Its eq. 3 has no clip. Here the ratio is clipped, as GRPO was published.
2. Its ratio is "per action". Here it is per token, as in the published GRPO and in VERL, which Memory-R1 used.
3. A group with equal rewards has no policy gradient. Here the update skips it, including its KL term; it still counts
   in the mean over completions.
4. loss_mean="token" (the default except for large models on real data) divides by the step's mean |o_i|, not by |o_i|.

Shapes: P prompts, G completions each, N = P*G rows, C tokens in the longest completion.
`mask` (N, C) is True where a token was sampled, including the EOS. `_old`: at sampling. `_ref`: the reference, which is
the initial policy: LoRA off, because a new adapter changes nothing, or a frozen copy of --init-adapter.
"""
from collections import Counter
from dataclasses import dataclass, replace

import torch

from policy import Policy
from support.cli import exit_cleanly, flag
from support.loop import mean_per_token, optimizer_step, rollout_metrics, update_metrics
from support.rollouts import group_rows, minibatches, sampled_tensors, select_groups
from support.toy import show_toy


@dataclass(frozen=True)
class Config:
    """The defaults train the tiny model's Manager; train_manager.py and train_answer.py have the presets for others."""
    steps: int = flag(90, "training steps; each samples one batch of rollouts", least=1)
    group_size: int = flag(8, "completions of each prompt, G", least=2)
    batch_size: int = flag(24, "prompts in a step, P", least=1)
    epochs: int = flag(1, "passes over the rollouts of a step", least=1)
    minibatch: int = flag(0, "groups per optimizer step; 0: all, so that with --epochs 1 the ratio stays 1", least=0)
    lr: float = flag(3e-3, "peak learning rate", least=0)
    warmup: int = flag(5, "steps over which the learning rate rises", least=0)
    schedule: str = flag("linear", "learning rate after the warmup", choices=("linear", "constant"))
    clip: float = flag(0.2, "the ratio is clipped to 1 +- this", above=0)
    beta: float = flag(0.01, "weight of the KL penalty toward the reference policy", least=0)
    loss_mean: str = flag("token", "token: mean over all tokens; completion: mean over each completion, then over all "
                          "completions, as published", choices=("completion", "token"))
    temperature: float = flag(1.0, "sampling temperature in training; evaluation is greedy", above=0)
    max_new_tokens: int = flag(80, "longest completion in tokens", least=1)
    grad_clip: float = flag(1.0, "maximum norm of the gradient; 0: no limit", least=0)
    micro_batch_tokens: int = flag(0, "tokens of one forward and backward pass; 0: as many as fit", least=0)
    checkpoint_every: int = flag(10, "steps between checkpoints", least=1)
    seed: int = flag(0, "random seed")


@dataclass(frozen=True)
class Rollouts:
    """The input of the update. Groups whose advantages are all 0 are left out, so P may be below --batch-size."""
    prompts: list[list[int]]  # P
    completions: list[list[list[int]]]  # P x G token ids (trajectories: groups of one)
    logp_old: torch.Tensor  # (N, C)
    advantages: torch.Tensor  # (N,)
    kept_fraction: float  # fraction of the step's completions that are in these groups
    mean_length: float  # tokens per completion, over all groups of the step
    logp_ref: torch.Tensor | None = None  # (N, C); None if beta = 0


NO_UPDATE = {"kl": None, "clip_rate": None, **update_metrics([])}  # metrics of a step whose advantages are all 0


def group_advantages(rewards: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """
    A = (r - mean) / (std + eps), with mean and (unbiased) std over each group. (P, G) -> (P, G)
    [[1., 0., 0., 1.]] -> [[.87, -.87, -.87, .87]]; equal rewards give 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = centred / (rewards.std(dim=1, keepdim=True) + eps)
    is_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # rounding: the mean of eight 1/3 is not 1/3
    return advantages.masked_fill(is_equal, 0.0)


def labelled_advantages(rewards: torch.Tensor, labels: list) -> torch.Tensor:
    """
    `group_advantages` where equal labels make a group, whatever the prompts are. (N,) -> (N,)
    [1., 5., 0.], ["a", "b", "a"] -> [.71, 0., -.71]
    """
    advantages = torch.zeros_like(rewards)
    for label in dict.fromkeys(labels):
        rows = [i for i, own in enumerate(labels) if own == label]
        if len(rows) > 1:  # nothing to compare a single output with
            advantages[rows] = group_advantages(rewards[None, rows])[0]
    return advantages


def kl_k3(logp: torch.Tensor, logp_ref: torch.Tensor) -> torch.Tensor:
    """
    KL(pi | pi_ref) per token by the k3 estimator, ref/pi - log(ref/pi) - 1: never negative, and its mean under pi is
    the KL (http://joschu.net/blog/kl-approx.html). As a loss, its mean gradient is that of KL(pi_ref | pi).
    """
    gap = logp_ref - logp
    return gap.exp() - gap - 1


def grpo_loss(logp, logp_old, logp_ref, advantages, mask, clip, beta, mean_length=None):
    """
    J = 1/N sum_i 1/|o_i| sum_t { min[ rho A, clip(rho, 1 - eps, 1 + eps) A ] - beta KL(pi | pi_ref) }
    (arXiv 2402.03300, eq. 3). `mean_length` replaces every |o_i|, which gives the mean over all tokens (arXiv
    2503.14476, eq. 8): tokens of long completions then weigh as much as tokens of short ones.
    logp, logp_old, logp_ref, mask (N, C), advantages (N,). logp_ref None: no KL term. Returns -J per row (N,), before
    the mean over rows, and per token (N, C) the KL and whether the clip removed the surrogate's gradient.
    """
    A = advantages[:, None]  # the same number for every token of a row
    rho = (logp - logp_old).exp()  # 1 up to rounding until the first optimizer step
    clipped = rho.clamp(1 - clip, 1 + clip) * A
    kl = kl_k3(logp, logp_ref) if logp_ref is not None else torch.zeros_like(logp)
    objective = torch.min(rho * A, clipped) - beta * kl  # min for both signs of A
    per_row = (objective * mask).sum(dim=1) / (mean_length or mask.sum(dim=1).clamp(min=1))
    return -per_row, kl.detach(), (clipped < rho * A).detach()


def make_rollouts(policy: Policy, prompts, groups, rewards, config: Config, reference=None, played=None):
    """
    Advantages and reference log-probs of a step's completions, and of the outputs of trajectories (`played`) as groups
    of one. Groups whose advantages are all 0 are left out; None if no group remains.
    """
    advantages = group_advantages(rewards).flatten()  # (P, G) -> (N,)
    if played:
        parts = (advantages, labelled_advantages(played.rewards, played.labels))
        advantages = torch.cat([weight * part for weight, part in zip(played.weights, parts, strict=True)])
        prompts, groups = played.append_to(prompts, groups)
    rows = group_rows(groups)
    informative = [i for i, own in enumerate(rows) if advantages[own.start:own.stop].any()]  # indices of groups
    if not informative:
        return None
    mask, logp_old = sampled_tensors(groups, policy.device)
    rollouts = Rollouts(prompts, [[completion.ids for completion in group] for group in groups], logp_old,
                        advantages.to(policy.device), sum(len(rows[i]) for i in informative) / len(mask),
                        mean_length=mask.sum().item() / len(mask))
    rollouts = select_groups(rollouts, informative)
    if config.beta == 0:
        return rollouts
    with policy.using(reference):
        logp_ref = policy.map_groups(lambda *batch: policy.score(*batch, config.temperature).logp, rollouts.prompts,
                                     rollouts.completions, config.micro_batch_tokens)  # without gradient
    return replace(rollouts, logp_ref=logp_ref)


def update(policy: Policy, optimizer, rollouts: Rollouts, adapter: str, config: Config, step: int) -> dict:
    """`epochs` passes over the rollouts, one optimizer step per minibatch. Returns means over the tokens used."""
    sums, updates = Counter(kl=0.0, clip_rate=0.0, tokens=0), []
    for epoch in range(config.epochs):
        for minibatch in minibatches(rollouts, config.minibatch, f"{config.seed} {step} {epoch}"):
            optimizer.zero_grad(set_to_none=True)
            for indices in policy.micro_batches(minibatch.prompts, minibatch.completions, config.micro_batch_tokens):
                part = select_groups(minibatch, indices)
                sums.update(accumulate_gradients(policy, part, len(minibatch.advantages), adapter, config))  # adds
            updates.append(optimizer_step(optimizer, config.grad_clip, minibatch))
    return mean_per_token(sums) | update_metrics(updates)


def accumulate_gradients(policy: Policy, part: Rollouts, num_rows: int, adapter: str, config: Config) -> Counter:
    """Backward pass for some groups of a minibatch of `num_rows` completions. Returns sums over their tokens."""
    with policy.using(adapter):  # also for backward, where gradient checkpointing recomputes the layers
        logp, _, mask = policy.score(part.prompts, part.completions, config.temperature)
        losses, kl, is_clipped = grpo_loss(logp, part.logp_old, part.logp_ref, part.advantages, mask, config.clip,
                                           config.beta, part.mean_length if config.loss_mean == "token" else None)
        # With one minibatch, kept_fraction / num_rows is the 1/N of eq. 3, where N counts all completions of the step.
        (part.kept_fraction * losses.sum() / num_rows).backward()
    return Counter(kl=(kl * mask).sum().item(), clip_rate=(is_clipped * mask).sum().item(), tokens=mask.sum().item())


def make_optimizer(policy: Policy, adapter: str, config: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.named_parameters(adapter), config.lr, betas=(0.9, 0.95), weight_decay=0.0)


def train_step(policy: Policy, optimizer, task, adapter: str, config: Config, step: int, reference=None):
    """Steps 1 to 6 of the list at the top. Returns the step's metrics and some rollouts in readable form."""
    episodes = task.batch(step)
    prompts = [episode.prompt for episode in episodes]
    with policy.using(adapter):
        groups = policy.sample(prompts, config.group_size, config.max_new_tokens, config.temperature)
    rewards, task_metrics, samples = task.rewards(episodes, groups)  # (P, G)
    rollouts = make_rollouts(policy, prompts, groups, rewards, config, reference, task.played)
    metrics = update(policy, optimizer, rollouts, adapter, config, step) if rollouts else NO_UPDATE
    return rollout_metrics(rewards, groups) | metrics | task_metrics, samples


def train(policy: Policy, task, loop, adapter: str, config: Config) -> None:
    """`config.steps` training steps. `loop` (support/loop.py) resumes, seeds, evaluates, saves and stops."""
    optimizer = make_optimizer(policy, adapter, config)
    for step in loop.steps(optimizer):
        loop.log(step, *train_step(policy, optimizer, task, adapter, config, step, loop.reference))


def main(argv=None) -> None:
    show_toy("GRPO", train, Config(steps=12, max_new_tokens=4), Policy.load, argv)


if __name__ == "__main__":
    exit_cleanly(main)
