"""
SFT: supervised fine-tuning (behaviour cloning) on a teacher's outputs, for the baseline Memory-SFT (Memory-R1, arXiv
2508.19828, table 1), or before reinforcement learning (`--init-adapter`). There is no reward and no sampling.

One training step, with the function that does it:
1. take a batch of P prompts, each with the teacher's completion              epoch_indices
2. compute the cross-entropy of the completions' tokens                       cross_entropy
3. update the adapter with AdamW                                              update
4. write one line to metrics.jsonl                                            loop.log

Differences from the paper:
1. Its teacher is GPT-5. Here the task provides the demonstrations: reference operations, correct answers, or outputs
   of a hosted model.
2. It gives no settings. Here they are those of grpo.py and ppo.py, so that the three can be compared.

Shapes: P prompts, one completion each, C tokens in the longest. `mask` (P, C) is False on padding.
"""
from collections import Counter
from dataclasses import dataclass

import torch

from policy import Policy
from support.cli import flag
from support.loop import epoch_indices, mean_per_token, optimizer_step, update_metrics


@dataclass(frozen=True)
class Config:
    """The defaults train the tiny model's Manager; train_manager.py and train_answer.py have the presets for others."""
    steps: int = flag(90, "training steps", least=1)
    batch_size: int = flag(24, "demonstrations in a step, P", least=1)
    lr: float = flag(3e-3, "peak learning rate", least=0)
    warmup: int = flag(5, "steps over which the learning rate rises", least=0)
    schedule: str = flag("linear", "learning rate after the warmup", choices=("linear", "constant"))
    max_new_tokens: int = flag(80, "longest output in tokens: of the agent in evaluation, of a hosted teacher", least=1)
    grad_clip: float = flag(1.0, "maximum norm of the gradient; 0: no limit", least=0)
    micro_batch_tokens: int = flag(0, "tokens of one forward and backward pass; 0: as many as fit", least=0)
    checkpoint_every: int = flag(10, "steps between checkpoints", least=1)
    seed: int = flag(0, "random seed")


def cross_entropy(logp: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """L = -1/T sum_i sum_t log pi(o_i,t | q_i, o_i,<t), T = `num_tokens` of the whole batch. logp, mask (P, C) -> ()"""
    return -(logp * mask).sum() / num_tokens


def update(policy: Policy, optimizer, prompts, completions, adapter: str, config: Config) -> dict:
    """One optimizer step on a batch of demonstrations. Returns means over its completion tokens."""
    num_tokens, sums = sum(map(len, completions)), Counter(loss=0.0, entropy=0.0, tokens=0)
    groups = [[completion] for completion in completions]
    optimizer.zero_grad(set_to_none=True)
    for indices in policy.micro_batches(prompts, groups, config.micro_batch_tokens):
        with policy.using(adapter):
            logp, entropy, mask = policy.score([prompts[i] for i in indices], [groups[i] for i in indices])
            cross_entropy(logp, mask, num_tokens).backward()
        sums.update(loss=-(logp * mask).sum().item(), entropy=(entropy * mask).sum().item(), tokens=mask.sum().item())
    return mean_per_token(sums) | update_metrics([optimizer_step(optimizer, config.grad_clip)])


def train(policy: Policy, task, loop, adapter: str, config: Config) -> None:
    """`config.steps` training steps. `task.demonstrations()` returns prompts, completions (token ids) and a report."""
    optimizer = torch.optim.AdamW(policy.named_parameters(adapter), config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    prompts, completions, report = task.demonstrations()
    teacher = {"step": 0, "eval": "teacher", "n": len(prompts), **report}
    for step in loop.steps(optimizer, [teacher]):
        batch = epoch_indices(step, len(prompts), config.batch_size, config.seed)
        chosen = [prompts[i] for i in batch], [completions[i] for i in batch]
        metrics = update(policy, optimizer, *chosen, adapter, config)
        metrics["completion_tokens"] = sum(map(len, chosen[1])) / len(batch)
        samples = [{"prompt": policy.decode(prompts[i]), "completion": policy.decode(completions[i])}
                   for i in batch[:4]]
        loop.log(step, metrics, samples)
