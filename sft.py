"""
SFT: supervised fine-tuning on what a teacher wrote, which makes the baseline Memory-SFT (Memory-R1, arXiv 2508.19828,
table 1): behaviour cloning. No reward, no samples: a completion becomes likelier because the teacher wrote it.

One step: 1. a batch of P prompts, each with the teacher's completion   2. the cross-entropy of the completions' tokens
3. AdamW on the adapter   4. a line in metrics.jsonl

What differs from the paper and why:
1. Its teacher is GPT-5. Here that is the task's affair: known operations, or any hosted model.
2. It prints no settings. Here all are as in grpo.py and ppo.py, so that the three can be compared.

Shapes: P prompts, a completion each, C tokens in the longest. `mask` (P, C) is 1 on its tokens and EOS, not on padding.
"""
import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from tqdm import tqdm

from policy import Policy
from support.distributed import copy_from_main, is_main, on_main, own_batches, sum_gradients, sum_over_ranks, wait
from support.run import (
    Run,
    batch_of,
    first_not_finite,
    optimizer_tensors,
    restore_optimizer,
    restore_parameters,
    writing,
)


@dataclass(frozen=True)
class Config:
    steps: int = 90
    batch_size: int = 24  # P, demonstrations a step
    lr: float = 3e-3  # for LoRA on the tiny model; 1e-4 on a model of billions
    warmup: int = 5  # steps over which the learning rate rises
    schedule: str = "linear"  # "linear" below 1 - (step - 1) / steps of it, or "constant"
    grad_clip: float = 1.0
    micro_batch_tokens: int = 0  # of one forward and backward pass; 0: what fits, see `Policy.room`
    checkpoint_every: int = 10  # steps
    seed: int = 0  # of the order


class Task(Protocol):
    """What is to be cloned. `sft.py` sees prompts and completions, and nothing of what they are about."""

    def demonstrations(self) -> tuple[list[list[int]], list[list[int]], dict]:
        """Prompts, what the teacher wrote after each with its EOS, both as token ids; what to report of the teacher."""

    def evaluate(self, when: str, step: int) -> list[dict]:
        """Held-out results, `when` = "untrained" or "trained"."""


# ------------------------------------------------------------------------------------------------ the algorithm

def cross_entropy(logp: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """L = -1/T sum_i sum_t log pi(o_i,t | q_i, o_i,<t), T = `num_tokens` of the whole batch. logp, mask (P, C) -> ()"""
    return -(logp * mask).sum() / num_tokens


def update(policy: Policy, optimizer, prompts, completions, adapter: str, config: Config) -> dict:
    """One gradient step over a batch of demonstrations. Returns means over its completion tokens."""
    parameters = dict(zip(policy.names(adapter), policy.parameters(adapter), strict=True))
    num_tokens, norm, sums = sum(map(len, completions)), 0.0, dict.fromkeys(("loss", "entropy"), 0.0)
    optimizer.zero_grad(set_to_none=True)
    groups = [[completion] for completion in completions]
    for part in own_batches(policy, prompts, groups, config.micro_batch_tokens):
        with policy.using(adapter):
            logp, entropy, mask = policy.score([prompts[i] for i in part], [groups[i] for i in part])
        loss = cross_entropy(logp, mask, num_tokens)
        loss.backward()
        sums["loss"] += loss.item()
        sums["entropy"] += (entropy * mask).sum().item() / num_tokens
    sum_gradients(parameters.values())
    sums = sum_over_ranks(sums)
    bad = first_not_finite({f"the gradient of {name}": parameter.grad for name, parameter in parameters.items()})
    if not bad:
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.grad_clip or math.inf).item()
        optimizer.step()
    return {**sums, "grad_norm": norm, "skipped": int(bool(bad))} | ({"not_finite_in": bad} if bad else {})


# ------------------------------------------------------------------------------------------------ the loop

def learning_rate_share(step: int, config: Config) -> float:
    """Of the peak learning rate, at steps 1, 2, ..., `steps`."""
    left = (config.steps - step + 1) / config.steps if config.schedule == "linear" else 1.0
    return min(1.0, step / max(1, config.warmup), left)


def train_step(policy: Policy, prompts, completions, optimizer, adapter: str, config: Config, step: int):
    """Steps 1 to 3 of the list above. Returns the step's metrics and four demonstrations to be read by a person."""
    start = time.time()
    optimizer.param_groups[0]["lr"] = config.lr * learning_rate_share(step, config)
    batch = batch_of(step, len(prompts), config)
    prompts, completions = [prompts[i] for i in batch], [completions[i] for i in batch]
    learned = update(policy, optimizer, prompts, completions, adapter, config)
    metrics = {"step": step, **learned, "lr": optimizer.param_groups[0]["lr"],
               "completion_tokens": sum(map(len, completions)) / len(completions), "seconds": time.time() - start}
    return metrics, [{"step": step, "prompt": policy.decode(prompts[i]), "completion": policy.decode(completions[i])}
                     for i in range(min(4, len(batch)))]


def train(policy: Policy, task: Task, run: Run, adapter: str, config: Config) -> None:
    """The whole run: held-out before, `steps` steps, held-out after. Continues from a checkpoint if there is one."""
    parameters = policy.parameters(adapter)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    copy_from_main(parameters)
    prompts, completions, about = task.demonstrations()
    begun = on_main(run.load)
    if begun:
        done, tensors, _ = begun
        restore_parameters(parameters, tensors)
        restore_optimizer(optimizer, tensors)
    else:
        done = 0
        held_out = on_main(task.evaluate, "untrained", 0)
        run.report([{"step": 0, "eval": "teacher", "n": len(prompts), **about}, *held_out])
    steps = tqdm(range(done + 1, config.steps + 1), initial=done, total=config.steps, desc=adapter, disable=None)
    with run.ending_steps():
        for step in steps:
            try:
                metrics, samples = train_step(policy, prompts, completions, optimizer, adapter, config, step)
            except torch.OutOfMemoryError:
                save(run, step - 1, parameters, optimizer)
                raise
            run.log(metrics)
            run.samples(samples)
            tqdm.write(run.line(step, metrics))
            reason = run.reason_to_stop(metrics)
            if reason or step % config.checkpoint_every == 0 or step == config.steps:
                save(run, step, parameters, optimizer)
            if reason:
                wait()  # for main to have written: the first process to end ends all
                raise reason
    if is_main() and not run.is_complete(config.steps):
        with writing(run.folder):
            policy.save_adapter(adapter, run.folder / "adapter")
        run.report(task.evaluate("trained", config.steps))


def save(run: Run, step: int, parameters, optimizer) -> None:
    """All there is to restore: nothing here is drawn at random but the order, and that from the seed."""
    adapter = {f"adapter.{i}": parameter for i, parameter in enumerate(parameters)}
    run.save(step, adapter | optimizer_tensors(optimizer), {})
