"""
GRPO: policy-gradient fine-tuning without a value network (DeepSeekMath, arXiv 2402.03300, sec. 4.1; Memory-R1, arXiv
2508.19828, eq. 3). The baseline of a completion is the mean reward of its siblings, sampled from the same prompt.

One step: 1. a batch of P prompts   2. G completions of each   3. their rewards   4. advantages inside each group
5. clipped surrogate with a KL penalty towards the reference, which is the same network with LoRA switched off
6. AdamW on the adapter, `epochs` passes over the step's completions   7. a line in metrics.jsonl

What differs from the paper and why:
1. Memory-R1 prints no clip in eq. 3; here the ratio is clipped, as GRPO was published.
2. Its ratio is "per action"; here it is per token, as in the published GRPO and in VERL, which the paper used.
3. A group whose rewards are all equal has no policy gradient, so it is left out of the update altogether; its KL term
   goes too. It still counts in the mean over completions.

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
from tqdm import tqdm

from data import TINY
from policy import Completion, Policy, pad_right
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
    group_size: int = 8  # G; with G = 2 most groups of a binary reward teach nothing
    batch_size: int = 24  # P, prompts a step
    epochs: int = 1  # passes over a step's completions
    minibatch: int = 0  # groups per optimizer step; 0: all of them at once, and with 1 epoch the ratio stays 1
    lr: float = 3e-3  # for LoRA on the tiny model; 1e-5 to 1e-4 on a model of billions
    warmup: int = 5  # steps over which the learning rate rises
    schedule: str = "linear"  # "linear" below 1 - (step - 1) / steps of it, or "constant", as in the paper
    clip: float = 0.2
    beta: float = 0.01  # weight of the KL penalty
    loss_mean: str = "completion"  # "completion": over its tokens, then over completions; "token": over all tokens
    temperature: float = 1.0
    max_new_tokens: int = 128
    grad_clip: float = 1.0
    micro_batch_tokens: int = 0  # of one forward and backward pass; 0: what fits, see `Policy.room`
    checkpoint_every: int = 10  # steps
    seed: int = 0


class Task(Protocol):
    """What is to be learned. `grpo.py` sees prompts, completions and rewards, and nothing of what they are about."""
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
    logp_old: torch.Tensor  # (N, C)
    advantages: torch.Tensor  # (P, G)


# ------------------------------------------------------------------------------------------------ the algorithm

def group_advantages(rewards: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """
    A = (r - mean) / (std + eps), the statistics taken inside each group. (P, G) -> (P, G)
    [[1., 0., 0., 1.]] -> [[.87, -.87, -.87, .87]]; equal rewards give 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = centred / (rewards.std(dim=1, keepdim=True) + eps)
    return advantages.masked_fill(all_equal(rewards)[:, None], 0.0)  # eight times 1/3 has a mean that is not 1/3


def all_equal(rewards: torch.Tensor) -> torch.Tensor:
    """Which groups have nothing to teach. (P, G) -> (P,) bool"""
    return (rewards == rewards[:, :1]).all(dim=1)


def kl_k3(logp: torch.Tensor, logp_ref: torch.Tensor) -> torch.Tensor:
    """
    KL(pi | pi_ref) per token by the k3 estimator, ref/pi - log(ref/pi) - 1: never negative, and unbiased under samples
    of pi (http://joschu.net/blog/kl-approx.html). k1 as a loss would have a gradient of mean zero.
    """
    gap = logp_ref - logp
    return gap.exp() - gap - 1


def grpo_loss(logp, logp_old, logp_ref, advantages, mask, clip, beta, mean_length=None):
    """
    J = 1/N sum_i 1/|o_i| sum_t { min[ rho A, clip(rho, 1 - eps, 1 + eps) A ] - beta KL(pi | pi_ref) }
    (arXiv 2402.03300, eq. 3); with `mean_length` that number stands for every |o_i|, which makes it a mean over tokens
    (arXiv 2503.14476, eq. 8): a token of a long completion then weighs as much as one of a short.
    logp, logp_old, logp_ref, mask (N, C), advantages (N,). logp_ref None: no KL term. Returns -J per row (N,), and
    per token (N, C) the KL and whether the clip took the gradient away.
    """
    A = advantages[:, None]  # one number shared by every token of a row
    rho = (logp - logp_old).exp()  # 1 until the first optimizer step
    clipped = rho.clamp(1 - clip, 1 + clip) * A
    kl = kl_k3(logp, logp_ref) if logp_ref is not None else torch.zeros_like(logp)
    objective = torch.min(rho * A, clipped) - beta * kl  # min for both signs of A
    per_row = (objective * mask).sum(dim=1) / (mean_length or mask.sum(dim=1).clamp(min=1))
    return -per_row, kl.detach(), (clipped < rho * A).detach()


def pick(rollouts: Rollouts, groups: list[int]) -> Rollouts:
    """Some groups of the rollouts. Groups are blocks of G rows."""
    G = rollouts.advantages.shape[1]
    rows = [i * G + g for i in groups for g in range(G)]
    return Rollouts([rollouts.prompts[i] for i in groups], [rollouts.completions[i] for i in groups],
                    rollouts.logp_old[rows], rollouts.advantages[groups])


def backward(policy: Policy, part: Rollouts, num_rows: float, mean_length, adapter: str, config: Config):
    """Adds the gradient of some groups' share in the loss over `num_rows` completions; returns sums over tokens."""
    logp_ref = None
    if config.beta > 0:
        with torch.no_grad(), policy.using(None):
            logp_ref = policy.score(part.prompts, part.completions, config.temperature).logp
    with policy.using(adapter):
        logp, _, mask = policy.score(part.prompts, part.completions, config.temperature)
    logp_old = part.logp_old[:, :logp.shape[1]]  # padded to the longest of all groups, not of these
    losses, kl, is_clipped = grpo_loss(logp, logp_old, logp_ref, part.advantages.flatten(), mask, config.clip,
                                       config.beta, mean_length)
    (losses.sum() / num_rows).backward()
    return {name: (values * mask).sum().item() for name, values in
            {"kl": kl, "clip_rate": is_clipped, "tokens": torch.ones_like(logp)}.items()}


def update(policy: Policy, optimizer, rollouts: Rollouts, adapter: str, config: Config,
           rng: random.Random) -> dict[str, float | None]:
    """`epochs` passes of clipped gradient steps over one batch of rollouts. Returns means over the tokens it used."""
    P, G = rollouts.advantages.shape
    lessons = [i for i in range(P) if rollouts.advantages[i].any()]
    lengths = [len(completion) for group in rollouts.completions for completion in group]
    mean_length = sum(lengths) / len(lengths) if config.loss_mean == "token" else None
    sums, norms, skips = dict.fromkeys(("kl", "clip_rate", "tokens"), 0.0), [], []
    parameters = dict(zip(policy.names(adapter), policy.parameters(adapter), strict=True))
    for _ in range(config.epochs if lessons else 0):
        rng.shuffle(lessons)
        size = config.minibatch or len(lessons)
        for at in range(0, len(lessons), size):
            some = lessons[at:at + size]
            # Groups without a lesson have gradient 0 but count in the mean, in equal shares of the minibatches.
            num_rows = len(some) * G * P / len(lessons)
            batch = pick(rollouts, some)
            optimizer.zero_grad(set_to_none=True)
            for indices in own_batches(policy, batch.prompts, batch.completions, config.micro_batch_tokens):
                part = pick(batch, indices)
                for name, value in backward(policy, part, num_rows, mean_length, adapter, config).items():
                    sums[name] += value
            sum_gradients(parameters.values())
            bad = first_not_finite({"advantages": batch.advantages, "logp_old": batch.logp_old} | {
                f"the gradient of {name}": parameter.grad for name, parameter in parameters.items()})
            if bad:  # a loss that is not finite has such gradients too
                skips.append(bad)
                continue
            norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), config.grad_clip or math.inf).item())
            optimizer.step()
    # E[-log pi] over all that was sampled: the entropy also of groups that are not scored again.
    entropy = -rollouts.logp_old.sum().item() / sum(lengths)
    sums = sum_over_ranks(sums)
    count = sums.pop("tokens")
    return {name: value / count if count else None for name, value in sums.items()} | {
        "entropy": entropy, "grad_norm": sum(norms) / max(1, len(norms)), "skipped": len(skips)} | (
        {"not_finite_in": skips[0]} if skips else {})


# ------------------------------------------------------------------------------------------------ the loop

def rollouts_of(prompts, groups: list[list[Completion]], rewards: torch.Tensor, device) -> Rollouts:
    """Completions and rewards as tensors. The log-probs of sampling serve as logp_old: nothing is scored twice."""
    flat = [completion for group in groups for completion in group]
    logp_old = pad_right([completion.logps for completion in flat], 0.0, torch.float32)
    return Rollouts(prompts, [[completion.ids for completion in group] for group in groups], logp_old.to(device),
                    group_advantages(rewards).to(device))


def learning_rate_share(step: int, config: Config) -> float:
    """Of the peak learning rate, at steps 1, 2, ..., `steps`."""
    left = (config.steps - step + 1) / config.steps if config.schedule == "linear" else 1.0
    return min(1.0, step / max(1, config.warmup), left)


def train_step(policy: Policy, task: Task, optimizer, adapter: str, config: Config, step: int, rng):
    """Steps 1 to 6 of the list above. Returns the step's metrics and its rollouts as a person would read them."""
    start = time.time()
    optimizer.param_groups[0]["lr"] = config.lr * learning_rate_share(step, config)
    episodes = task.batch(step)
    seed_apart(config.seed, step)
    with policy.using(adapter):
        groups = gather(policy.sample([episode.prompt for episode in share(episodes)], config.group_size,
                                      config.max_new_tokens, config.temperature))
    rewards, extra, samples = task.rewards(episodes, groups)  # (P, G)
    rollouts = rollouts_of([episode.prompt for episode in episodes], groups, rewards, policy.device)
    learned = update(policy, optimizer, rollouts, adapter, config, rng)
    flat = [completion for group in groups for completion in group]
    metrics = {"step": step, "reward": rewards.mean().item(), "reward_std": rewards.std(dim=1).mean().item(),
               "zero_std_rate": all_equal(rewards).float().mean().item(), **learned,
               "lr": optimizer.param_groups[0]["lr"],
               "completion_tokens": sum(len(completion.ids) for completion in flat) / len(flat),
               "unfinished_rate": sum(not completion.finished for completion in flat) / len(flat),
               **extra, "seconds": time.time() - start}
    return metrics, [{"step": step, **sample} for sample in samples]


def train(policy: Policy, task: Task, run: Run, adapter: str, config: Config) -> None:
    """The whole run: held-out before, `steps` steps, held-out after. Continues from a checkpoint if there is one."""
    rng = random.Random(config.seed)
    parameters = policy.parameters(adapter)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    done = restore(run, task, parameters, optimizer, rng)
    if done is None:
        done = 0
        run.report(on_main(task.evaluate, "untrained", 0))
    steps = tqdm(range(done + 1, config.steps + 1), initial=done, total=config.steps, desc=adapter, disable=None)
    with run.ending_steps():
        for step in steps:
            before = num_updates(optimizer)
            try:
                metrics, samples = train_step(policy, task, optimizer, adapter, config, step, rng)
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

class Toy:
    """A greeting; the reward is 1 for a reply that begins with a capital letter, which the tiny model seldom writes."""
    state: dict = {}

    def __init__(self, policy: Policy):
        self.prompt = policy.encode([{"role": "user", "content": "Hello."}])

    def batch(self, step: int) -> list:
        return [self] * 4

    def rewards(self, episodes, groups):
        return torch.tensor([[float(one.text.strip()[:1].isupper()) for one in group] for group in groups]), {}, []

    def evaluate(self, when: str, step: int) -> list[dict]:
        return []


def main(argv=None) -> None:
    """Learns the toy."""
    Parser(description="GRPO learns a toy on the tiny model, in seconds: to begin with a capital letter.",
           epilog="For the real thing see train_manager.py and train_answer.py.").parse_args(argv)
    seed_everything(0)
    policy = Policy.load(TINY)
    policy.add_adapter("toy")
    task, config = Toy(policy), Config(steps=12, max_new_tokens=4)
    before = policy.sample([task.prompt], 4, config.max_new_tokens)[0]
    with tempfile.TemporaryDirectory() as folder:
        train(policy, task, Run(folder, vars(config)), "toy", config)
    with policy.using("toy"):
        after = policy.sample([task.prompt], 4, config.max_new_tokens)[0]
    for name, group in (("untrained", before), ("trained", after)):
        print(f"{name:9}  {'   '.join(repr(' '.join(one.text.split())) for one in group)}")


if __name__ == "__main__":
    exit_cleanly(main)
