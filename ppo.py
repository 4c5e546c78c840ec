"""
PPO: policy-gradient fine-tuning with a value network (arXiv 1707.06347, eq. 7; Memory-R1, arXiv 2508.19828, eq. 2),
token by token. The baseline of a token is what a critic expected of the completion before that token was written.

One step: 1. a batch of P prompts   2. G completions of each   3. their rewards   4. advantages by GAE from the
critic's values, whitened over the batch   5. clipped surrogate with a KL penalty towards the reference, which is the
same network with LoRA switched off; the critic's squared error   6. AdamW on both adapters, `epochs` passes over the
step's completions   7. a line in metrics.jsonl

What differs from the paper and why:
1. Its ratio is "per action"; here it is per token, as in VERL, which the paper used. A token is an action, the prompt
   and the tokens so far are the state.
2. Its critic is a second model; here it is a second adapter on the same weights, with a linear head. It starts at
   V near 0, of which whitening makes reward minus mean reward: until the critic knows more, the batch is the baseline.
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
import math
import random
import tempfile
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm

from data import TINY
from grpo import Toy
from policy import Completion, Policy, pad_right, spread
from support.cli import Parser, exit_cleanly
from support.distributed import (
    gather,
    is_main,
    on_main,
    own_batches,
    seed_apart,
    share,
    sum_gradients,
    sum_over_ranks,
    wait,
)
from support.run import Run, first_not_finite, num_updates, restore, save, seed_everything, writing


@dataclass(frozen=True)
class Config:
    steps: int = 90
    group_size: int = 4  # G; to PPO they are independent rollouts, and 1 will do
    batch_size: int = 24  # P, prompts a step
    epochs: int = 1  # passes over a step's completions
    minibatch: int = 6  # groups per optimizer step; 0: all of them at once. A critic needs many steps
    lr: float = 1e-3  # for LoRA on the tiny model; 1e-5 to 1e-4 on a model of billions
    critic_lr: float = 2e-3  # a few times lr: the critic has to keep up with a policy that moves
    warmup: int = 5  # steps over which the learning rates rise
    schedule: str = "linear"  # "linear" below 1 - (step - 1) / steps of them, or "constant", as in the paper
    clip: float = 0.2
    value_clip: float = 0.2  # a value may come this much closer to its return in a step; 0: no limit
    gamma: float = 1.0  # discount
    lam: float = 1.0  # GAE's lambda: 1 trusts the outcome, 0 the critic's next value
    beta: float = 0.01  # weight of the KL penalty
    loss_mean: str = "completion"  # "completion": over its tokens, then over completions; "token": over all tokens
    temperature: float = 1.0
    max_new_tokens: int = 128
    grad_clip: float = 1.0
    micro_batch_tokens: int = 0  # of one forward and backward pass; 0: what fits, see `Policy.room`
    checkpoint_every: int = 10  # steps
    seed: int = 0


class Task(Protocol):
    """What is to be learned. `ppo.py` sees prompts, completions and rewards, and nothing of what they are about."""
    state: dict  # what the task has to find again when a run is resumed, fit for JSON

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
    mask: torch.Tensor  # (N, C), like all below
    logp_old: torch.Tensor
    logp_ref: torch.Tensor  # 0 everywhere if beta = 0
    values_old: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


class Critic(nn.Module):
    """
    V(s) = w . h(s) / sqrt(H) + b: what reward will this completion get? h is the last state under an adapter of the
    critic's own. b = 0 and w is small at the start, but not 0: with w = 0 the adapter gets no gradient, and on the
    tiny model it never began to learn. 1 / sqrt(H), as Adam moves each of the H weights by about its learning rate.
    """

    def __init__(self, policy: Policy, like: str):
        super().__init__()
        self.policy, shape = policy, policy.adapters[like]
        policy.add_adapter("critic", shape["r"], shape["lora_alpha"])
        self.adapter = nn.ParameterList(policy.parameters("critic"))
        self.w = nn.Parameter(0.03 * torch.randn(policy.head.in_features, device=policy.device))  # float32
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
    """The reward of each completion at its last sampled token: [1.], [[1, 1, 0]] -> [[0., 1., 0.]]. (N,) -> (N, C)"""
    # That is the EOS, or where a completion was cut off. No bootstrap there: it is judged as it stands.
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
    """Mean 0 and deviation 1 over all sampled tokens of the batch; padding does not count, and is 0."""
    # If all outcomes are alike, what is left is the critic's error, now of full size; GRPO leaves such groups out.
    real = values[mask]
    return ((values - real.mean()) / (real.std(correction=0) + eps)).where(mask, 0)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for a critic that foresees all, 0 for a constant one, below for a misleading one."""
    variance = returns[mask].var(correction=0)
    return (1 - (returns - values)[mask].var(correction=0) / variance).item() if variance > 1e-9 else float("nan")


def kl_k3(logp: torch.Tensor, logp_ref: torch.Tensor) -> torch.Tensor:
    """
    KL(pi | pi_ref) per token by the k3 estimator, ref/pi - log(ref/pi) - 1: never negative, and unbiased under samples
    of pi (http://joschu.net/blog/kl-approx.html). k1 as a loss would have a gradient of mean zero.
    """
    gap = logp_ref - logp
    return gap.exp() - gap - 1


def ppo_loss(logp, logp_old, logp_ref, advantages, mask, clip, beta, mean_length=None):
    """
    J = 1/N sum_i 1/|o_i| sum_t { min[ rho A, clip(rho, 1 - eps, 1 + eps) A ] - beta KL(pi | pi_ref) }
    (1707.06347, eq. 7, with a mean over a completion before that over completions, as in grpo.py.) With `mean_length`
    that number stands for every |o_i|, which makes it a mean over tokens.
    logp, logp_old, logp_ref, advantages, mask (N, C). logp_ref None: no KL term. Returns -J per row (N,), and
    per token (N, C) the KL and whether the clip took the gradient away.
    """
    A = advantages  # one number for each token
    rho = (logp - logp_old).exp()  # 1 until the first optimizer step
    clipped = rho.clamp(1 - clip, 1 + clip) * A
    kl = kl_k3(logp, logp_ref) if logp_ref is not None else torch.zeros_like(logp)
    objective = torch.min(rho * A, clipped) - beta * kl  # min for both signs of A
    per_row = (objective * mask).sum(dim=1) / (mean_length or mask.sum(dim=1).clamp(min=1))
    return -per_row, kl.detach(), (clipped < rho * A).detach()


def value_loss(values, values_old, returns, mask, clip):
    """
    1/2 1/|o_i| sum_t max[ (V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2 ]: the gradient ends where V has left
    the band towards R. Not in the paper of PPO but in OpenAI's code of it. (N, C) x 4 -> (N,)
    """
    error = (values - returns) ** 2
    if clip > 0:
        clipped = torch.clamp(values, values_old - clip, values_old + clip)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * row_means(error, mask)


def row_means(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N, C) -> (N,)"""
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def rows_of(groups: list[int], G: int) -> list[int]:
    """Groups are blocks of G rows: [0, 2], 3 -> [0, 1, 2, 6, 7, 8]"""
    return [i * G + g for i in groups for g in range(G)]


def pick(rollouts: Rollouts, groups: list[int]) -> Rollouts:
    """Some groups of the rollouts, padded to the longest completion among them."""
    completions = [rollouts.completions[i] for i in groups]
    rows, width = rows_of(groups, len(completions[0])), max(len(ids) for group in completions for ids in group)
    tensors = (rollouts.mask, rollouts.logp_old, rollouts.logp_ref, rollouts.values_old, rollouts.advantages,
               rollouts.returns)
    return Rollouts([rollouts.prompts[i] for i in groups], completions, *(tensor[rows, :width] for tensor in tensors))


def backward(policy: Policy, critic: Critic, part: Rollouts, num_rows: int, mean_length, adapter: str, config: Config):
    """Adds the gradients of some groups' share in both losses over `num_rows` completions; returns sums over tokens."""
    with policy.using(adapter):
        logp, entropy, mask = policy.score(part.prompts, part.completions, config.temperature)
    logp_ref = part.logp_ref if config.beta > 0 else None
    losses, kl, is_clipped = ppo_loss(logp, part.logp_old, logp_ref, part.advantages, mask, config.clip, config.beta,
                                      mean_length)
    (losses.sum() / num_rows).backward()
    values = critic(part.prompts, part.completions)
    errors = value_loss(values, part.values_old, part.returns, mask, config.value_clip)
    (errors.sum() / num_rows).backward()  # a coefficient would do nothing: Adam divides the critic's scale out
    per_token = {"kl": kl, "clip_rate": is_clipped, "entropy": entropy, "value_loss": errors.detach()[:, None],
                 "tokens": torch.ones_like(logp)}  # a row's mean error at each of its tokens adds up to its sum
    return {name: (numbers * mask).sum().item() for name, numbers in per_token.items()}


def update(policy: Policy, critic: Critic, optimizer, rollouts: Rollouts, adapter: str, config: Config,
           rng: random.Random) -> dict[str, float]:
    """`epochs` passes of clipped gradient steps over one batch of rollouts. Returns means over its tokens."""
    groups = list(range(len(rollouts.prompts)))
    mean_length = rollouts.mask.sum().item() / len(rollouts.mask) if config.loss_mean == "token" else None
    sums, norms, skips = dict.fromkeys(("kl", "clip_rate", "entropy", "value_loss", "tokens"), 0.0), [], []
    parameters = dict(zip(policy.names(adapter), policy.parameters(adapter), strict=True))
    parameters |= {f"critic.{name}": parameter for name, parameter in critic.named_parameters()}
    for _ in range(config.epochs):
        rng.shuffle(groups)
        size = config.minibatch or len(groups)
        for at in range(0, len(groups), size):
            batch = pick(rollouts, groups[at:at + size])
            num_rows = len(batch.mask)
            optimizer.zero_grad(set_to_none=True)
            for indices in own_batches(policy, batch.prompts, batch.completions, config.micro_batch_tokens):
                part = pick(batch, indices)
                for name, value in backward(policy, critic, part, num_rows, mean_length, adapter, config).items():
                    sums[name] += value
            sum_gradients(parameters.values())
            bad = first_not_finite({name: getattr(batch, name) for name in ("logp_old", "values_old", "advantages")} | {
                f"the gradient of {name}": parameter.grad for name, parameter in parameters.items()})
            if bad:  # a loss that is not finite has such gradients too
                skips.append(bad)
                continue
            norm, _ = (torch.nn.utils.clip_grad_norm_(group["params"], config.grad_clip or math.inf)
                       for group in optimizer.param_groups)
            norms.append(norm.item())
            optimizer.step()
    sums = sum_over_ranks(sums)
    count = max(1.0, sums.pop("tokens"))
    return {name: value / count for name, value in sums.items()} | {
        "grad_norm": sum(norms) / max(1, len(norms)), "skipped": len(skips)} | (
        {"not_finite_in": skips[0]} if skips else {})


# ------------------------------------------------------------------------------------------------ the loop

@torch.no_grad()
def rollouts_of(critic: Critic, prompts, groups: list[list[Completion]], rewards: torch.Tensor,
                config: Config) -> Rollouts:
    """Completions, rewards, values as tensors. The log-probs of sampling are logp_old; logp_ref serves all epochs."""
    flat = [completion for group in groups for completion in group]
    completions = [[completion.ids for completion in group] for group in groups]
    policy, G = critic.policy, len(groups[0])
    mask = pad_right([[True] * len(completion.ids) for completion in flat], False, torch.bool).to(policy.device)
    logp_old = pad_right([completion.logps for completion in flat], 0.0, torch.float32).to(policy.device)
    values, logp_ref = torch.zeros_like(logp_old), torch.zeros_like(logp_old)
    for indices in own_batches(policy, prompts, completions, config.micro_batch_tokens):
        some = [prompts[i] for i in indices], [completions[i] for i in indices]
        rows, width = rows_of(indices, G), max(len(ids) for group in some[1] for ids in group)
        values[rows, :width] = critic(*some)
        if config.beta > 0:
            with policy.using(None):
                logp_ref[rows, :width] = policy.score(*some, config.temperature).logp
    values, logp_ref = sum_over_ranks(values), sum_over_ranks(logp_ref)  # each process has left the others' rows 0
    per_token = terminal_rewards(rewards.flatten().to(policy.device), mask)
    advantages = gae(per_token, values, mask, config.gamma, config.lam)
    returns = advantages + values  # before whitening: the critic is to learn rewards, not z-scores
    return Rollouts(prompts, completions, mask, logp_old, logp_ref, values, whiten(advantages, mask), returns)


def learning_rate_share(step: int, config: Config) -> float:
    """Of the peak learning rate, at steps 1, 2, ..., `steps`."""
    left = (config.steps - step + 1) / config.steps if config.schedule == "linear" else 1.0
    return min(1.0, step / max(1, config.warmup), left)


def train_step(policy: Policy, critic: Critic, task: Task, optimizer, adapter: str, config: Config, step: int, rng):
    """Steps 1 to 6 of the list above. Returns the step's metrics and its rollouts as a person would read them."""
    start = time.time()
    for group, lr in zip(optimizer.param_groups, (config.lr, config.critic_lr), strict=True):
        group["lr"] = lr * learning_rate_share(step, config)
    episodes = task.batch(step)
    seed_apart(config.seed, step)
    with policy.using(adapter):
        groups = gather(policy.sample([episode.prompt for episode in share(episodes)], config.group_size,
                                      config.max_new_tokens, config.temperature))
    rewards, extra, samples = task.rewards(episodes, groups)  # (P, G)
    rollouts = rollouts_of(critic, [episode.prompt for episode in episodes], groups, rewards, config)
    learned = update(policy, critic, optimizer, rollouts, adapter, config, rng)
    flat = [completion for group in groups for completion in group]
    deviations = rewards.std(dim=1, correction=min(1, config.group_size - 1))  # 0 in groups of one
    metrics = {"step": step, "reward": rewards.mean().item(), "reward_std": deviations.mean().item(),
               "zero_std_rate": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(), **learned,
               "explained_variance": explained_variance(rollouts.values_old, rollouts.returns, rollouts.mask),
               "lr": optimizer.param_groups[0]["lr"],
               "completion_tokens": sum(len(completion.ids) for completion in flat) / len(flat),
               "unfinished_rate": sum(not completion.finished for completion in flat) / len(flat),
               **extra, "seconds": time.time() - start}
    return metrics, [{"step": step, **sample} for sample in samples]


def train(policy: Policy, task: Task, run: Run, adapter: str, config: Config) -> None:
    """The whole run: held-out before, `steps` steps, held-out after. Continues from a checkpoint if there is one."""
    rng = random.Random(config.seed)
    critic = Critic(policy, like=adapter)
    both = [{"params": policy.parameters(adapter)}, {"params": list(critic.parameters())}]  # each has its learning rate
    parameters = [parameter for group in both for parameter in group["params"]]
    optimizer = torch.optim.AdamW(both, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    done = restore(run, task, parameters, optimizer, rng)
    if done is None:
        done = 0
        run.report(on_main(task.evaluate, "untrained", 0))
    steps = tqdm(range(done + 1, config.steps + 1), initial=done, total=config.steps, desc=adapter, disable=None)
    with run.ending_steps():
        for step in steps:
            before = num_updates(optimizer)
            try:
                metrics, samples = train_step(policy, critic, task, optimizer, adapter, config, step, rng)
            except torch.OutOfMemoryError:
                if num_updates(optimizer) == before:  # else the step is half done
                    save(run, step - 1, task, parameters, optimizer, rng)
                raise
            run.log(metrics)
            run.samples(samples)
            tqdm.write(run.line(step, metrics))
            reason = run.reason_to_stop(metrics)
            if reason or step % config.checkpoint_every == 0 or step == config.steps:
                save(run, step, task, parameters, optimizer, rng)
            if reason:
                wait()  # for main to have written: the first process to end ends all
                raise reason
    if is_main() and not run.is_complete(config.steps):
        with writing(run.folder):
            policy.save_adapter(adapter, run.folder / "adapter")
        run.report(task.evaluate("trained", config.steps))


# ------------------------------------------------------------------------------------------------ a toy

def main(argv=None) -> None:
    """Learns the toy."""
    Parser(description="PPO learns a toy on the tiny model, in seconds: to begin with a capital letter.",
           epilog="For the real thing see train_manager.py and train_answer.py.").parse_args(argv)
    seed_everything(0)
    policy = Policy.load(TINY)
    policy.add_adapter("toy")
    task, config = Toy(policy), Config(steps=12, group_size=8, minibatch=2, lr=3e-3, critic_lr=6e-3, max_new_tokens=4)
    before = policy.sample([task.prompt], 4, config.max_new_tokens)[0]
    with tempfile.TemporaryDirectory() as folder:
        train(policy, task, Run(folder, vars(config)), "toy", config)
    with policy.using("toy"):
        after = policy.sample([task.prompt], 4, config.max_new_tokens)[0]
    for name, group in (("untrained", before), ("trained", after)):
        print(f"{name:9}  {'   '.join(repr(' '.join(one.text.split())) for one in group)}")


if __name__ == "__main__":
    exit_cleanly(main)
