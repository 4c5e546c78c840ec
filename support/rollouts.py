"""
Batches of rollouts: dataclasses with `prompts` (P), `completions` (P x G token ids) and tensors of N rows, (N,) or
(N, C), padded to C tokens. grpo.py and ppo.py each define their own. N is the number of completions: P*G, or the sum of
the groups' sizes, because the outputs of trajectories are groups of one.
"""
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch

from support.packing import pad_right


@dataclass(frozen=True)
class Played:
    """
    The outputs of whole trajectories. Each output has its own prompt, because earlier outputs of its trajectory changed
    the bank. Outputs with equal labels are compared with each other.
    """
    prompts: list[list[int]]  # N
    completions: list  # N policy.Completion
    rewards: torch.Tensor  # (N,) from the final bank of its trajectory
    labels: list  # N hashable values
    weights: tuple[float, float] = (1.0, 1.0)  # factors of the advantages: the step's groups, these outputs

    def append_to(self, prompts: list, groups: list[list]) -> tuple[list, list]:
        """The prompts and groups of a step, and then these outputs as groups of one."""
        return [*prompts, *self.prompts], [*groups, *([one] for one in self.completions)]


def group_rows(completions: list[list]) -> list[range]:
    """The rows of each group: groups of 2 and 3 completions have the rows 0, 1 and 2, 3, 4."""
    ends = [*accumulate(map(len, completions))]
    return [range(end - len(group), end) for group, end in zip(completions, ends, strict=True)]


def sampled_tensors(groups, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask, logp_old) of sampled completions, both (N, C): nothing is scored twice."""
    flat = [completion for group in groups for completion in group]
    mask = pad_right([[True] * len(completion.ids) for completion in flat], False, torch.bool)
    logp_old = pad_right([completion.logps for completion in flat], 0.0, torch.float32)
    return mask.to(device), logp_old.to(device)


def select_groups(rollouts, groups: list[int]):
    """The same dataclass with some groups only, padded to the longest completion among them."""
    completions, places = [rollouts.completions[i] for i in groups], group_rows(rollouts.completions)
    width = max(len(ids) for group in completions for ids in group)
    rows = [row for i in groups for row in places[i]]
    values = {field.name: getattr(rollouts, field.name) for field in fields(rollouts)}
    tensors = {name: x[rows, :width] if x.dim() == 2 else x[rows]
               for name, x in values.items() if isinstance(x, torch.Tensor)}
    return replace(rollouts, prompts=[rollouts.prompts[i] for i in groups], completions=completions, **tensors)


def minibatches(rollouts, size: int, seed: str) -> Iterator:
    """
    Shuffle the groups, alike in every process, and yield minibatches. A minibatch has at least as many rows as `size`
    groups of the largest size; the last may have fewer. `size` 0: all groups at once.
    """
    order = random.Random(seed).sample(range(len(rollouts.prompts)), len(rollouts.prompts))
    sizes = [len(group) for group in rollouts.completions]
    least, chosen, num_rows = size * max(sizes) or sum(sizes), [], 0
    for i in order:
        chosen.append(i)
        num_rows += sizes[i]
        if num_rows >= least or i == order[-1]:
            yield select_groups(rollouts, chosen)
            chosen, num_rows = [], 0
