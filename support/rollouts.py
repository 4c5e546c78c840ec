"""
Batches of rollouts: dataclasses with `prompts` (P), `completions` (P x G token ids) and tensors of N = P*G rows, (N,)
or (N, C), padded to C tokens. grpo.py and ppo.py each define their own.
"""
import random
from collections.abc import Iterator
from dataclasses import fields, replace

import torch

from support.packing import pad_right


def sampled_tensors(groups, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask, logp_old) of sampled completions, both (N, C): nothing is scored twice."""
    flat = [completion for group in groups for completion in group]
    mask = pad_right([[True] * len(completion.ids) for completion in flat], False, torch.bool)
    logp_old = pad_right([completion.logps for completion in flat], 0.0, torch.float32)
    return mask.to(device), logp_old.to(device)


def select_groups(rollouts, groups: list[int]):
    """The same dataclass with some groups only, padded to the longest completion among them."""
    completions = [rollouts.completions[i] for i in groups]
    G, width = len(completions[0]), max(len(ids) for group in completions for ids in group)
    rows = [i * G + g for i in groups for g in range(G)]
    values = {field.name: getattr(rollouts, field.name) for field in fields(rollouts)}
    tensors = {name: x[rows, :width] if x.dim() == 2 else x[rows]
               for name, x in values.items() if isinstance(x, torch.Tensor)}
    return replace(rollouts, prompts=[rollouts.prompts[i] for i in groups], completions=completions, **tensors)


def minibatches(rollouts, size: int, seed: str) -> Iterator:
    """Shuffle the groups and yield `size` of them at a time; 0: all at once. The same order in every process."""
    order = random.Random(seed).sample(range(len(rollouts.prompts)), len(rollouts.prompts))
    size = size or len(order)
    for start in range(0, len(order), size):
        yield select_groups(rollouts, order[start:start + size])
