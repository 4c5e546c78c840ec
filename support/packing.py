"""
Prompts and completions as rows of one forward pass, and the number of tokens that fits into memory.

A group shares its prompt in one row, `[prompt | c_1 | ... | c_G | padding]`. This is exact: tokens after the prompt do
not change the prompt's states; a mask lets c_g attend to the prompt and to itself, not to its siblings; and positions
restart at the prompt's length for each completion.

Shapes: P prompts, G completions each, N = P*G completions in prompt-major order, C tokens in the longest one, T
completion tokens in all (without padding), R packed rows of L tokens.
"""
import ctypes
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from support.distributed import world_size

MAX_FRACTION = 0.7  # fraction of the free memory; the estimates leave out attention masks, logits, and fragments
MAX_CPU_BYTES = 3 * 2**30  # memory of one batch: on a CPU larger ones are no faster


class PackedBatch(NamedTuple):
    """Rows for one forward pass, and the positions that predict each completion token."""
    ids: torch.Tensor  # (R, L)
    positions: torch.Tensor  # (R, L)
    attention: torch.Tensor  # (R, 1, S, L), True = one of the last S tokens may attend; or (R, L), True = no padding
    predictors: torch.Tensor  # (T,) index into the flattened (R*L) states
    targets: torch.Tensor  # (T,) the completion tokens, row by row
    mask: torch.Tensor  # (N, C) True where there is a completion token


def pad_right(rows, fill=0, dtype=None):
    """Stack lists of different lengths: [[7, 8], [9]] -> [[7, 8], [9, fill]]"""
    width = max(map(len, rows), default=0)
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows], dtype=dtype)


def scatter_to_mask(values, mask):
    """Put T values where the mask is True: [1., 2., 3.] and [[1, 1], [1, 0]] -> [[1., 2.], [3., 0.]]"""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def pack_groups(prompts, completions, device="cpu"):
    """
    Pack each group into one row. Prompt [5, 6] and completions [[7, 8], [9]] become
        ids       5 6 7 8 9    predictors 1 2 1    7 and 9 are both predicted by the prompt's last token, 8 by 7
        positions 0 1 2 3 2    targets    7 8 9
        segments  0 0 1 1 2    mask       [[1, 1], [1, 0]]
    """
    ids, positions, segments = [], [], []
    for prompt, group in zip(prompts, completions, strict=True):
        parts = [prompt, *group]
        ids.append([token for part in parts for token in part])
        positions.append([*range(len(prompt)), *(len(prompt) + i for c in group for i in range(len(c)))])
        segments.append([g for g, part in enumerate(parts) for _ in part])
    ids, positions, segments = pad_right(ids), pad_right(positions), pad_right(segments, fill=-1)
    R, L = ids.shape
    prompt_lengths = (segments == 0).sum(1, keepdim=True)  # (R, 1)
    assert prompt_lengths.all(), "an empty prompt: nothing predicts the first token"
    is_sampled = segments > 0
    # The predictor is the token before; for the first token of a completion it is the prompt's last token.
    before = torch.where(positions == prompt_lengths, prompt_lengths, torch.arange(L)) - 1
    predictors = (before + L * torch.arange(R)[:, None])[is_sampled]
    mask = pad_right([[True] * len(c) for group in completions for c in group], False, torch.bool)
    # All rows start with n prompt tokens, whose attention is causal: they need no mask (see `shared_attention`).
    n = int(prompt_lengths.min())
    queries, keys = segments.to(device)[:, n:, None], segments.to(device)[:, None, :]
    # Padding attends to the prompt too, because a row without any visible token can give NaN.
    causal = torch.ones(L - n, L, dtype=torch.bool, device=device).tril(n)
    attention = ((queries == keys) | (keys == 0)) & causal
    return PackedBatch(*(x.to(device) for x in (
        ids, positions, attention[:, None], predictors, ids[is_sampled], mask)))


def pad_groups(prompts, completions, device="cpu"):
    """One row `[prompt | completion | padding]` for each completion: correct for every model, but slower."""
    pairs = [(prompt, c) for prompt, group in zip(prompts, completions, strict=True) for c in group]
    batch = pack_groups([prompt for prompt, _ in pairs], [[c] for _, c in pairs], device)
    real = pad_right([[True] * (len(prompt) + len(c)) for prompt, c in pairs], False, torch.bool)
    return batch._replace(attention=real.to(device))


def batches_within(shapes: list[tuple[int, int]], max_tokens: int) -> list[list[int]]:
    """
    Split groups of these (rows, width) into batches of at most max_tokens, padding included; a larger group gets its
    own batch. Groups of similar width share a batch: [(1, 2), (1, 9), (2, 3)], 10 -> [[1], [2, 0]]
    """
    batches = []
    for i in sorted(range(len(shapes)), key=lambda i: shapes[i][1], reverse=True):  # the widest first
        if not batches or sum(shapes[j][0] for j in [*batches[-1], i]) * shapes[batches[-1][0]][1] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def train_token_bytes(policy) -> float:
    """Memory that the backward pass needs for each token of a batch (a cautious estimate)."""
    # The input of every linear layer and three times its output; 2.05 times were measured on Qwen2.5 0.5B in bfloat16.
    size = sum(layer.base.in_features + 3 * layer.base.out_features for layer in policy.layers.values())
    itemsize, depth = policy.head.weight.itemsize, policy.model.config.get_text_config().num_hidden_layers
    if policy.checkpointed_layers:  # one layer at a time, with its gradient, and the input of every layer
        size = 2 * size / depth + policy.head.in_features * depth
    return itemsize * size


def fits_backward(policy, tokens: int) -> bool:
    """Whether one forward and backward pass over so many tokens should fit into the free memory."""
    return tokens * train_token_bytes(policy) <= MAX_FRACTION * free_memory(policy.device)


def max_train_tokens(policy) -> int:
    """Tokens of one forward and backward pass that should fit into memory; on a CPU at most 2^12."""
    return tokens_within(policy, train_token_bytes(policy), cpu=2**12)


def max_sampling_tokens(policy) -> int:
    """Tokens of one sampling batch that should fit: keys and values, and the widest layer's activations."""
    config = policy.model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    widest = max(layer.base.out_features for layer in policy.layers.values())
    size = policy.head.weight.itemsize * (2 * config.num_hidden_layers * key_heads * head_dim + 3 * widest)
    return tokens_within(policy, size, cpu=2**15, gpu=2**16)


def tokens_within(policy, size: float, cpu: int, gpu: int = sys.maxsize) -> int:
    """Number of tokens of `size` bytes each for one batch; `cpu`, `gpu`: the most on each kind of device."""
    free = MAX_FRACTION * free_memory(policy.device)
    if policy.device.type == "cuda":
        return min(gpu, int(free / size))
    return min(cpu, int(min(free, MAX_CPU_BYTES) / size))


def free_memory(device) -> int:
    """Free bytes of a GPU, including memory that torch has reserved but does not use; else of the machine."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    try:
        free = int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except OSError:  # macOS: half of its memory; Windows: 4 GiB
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 2**32
    return min(free, *control_group_memory()) // world_size()  # the processes of torchrun share the machine


def return_freed_memory(device) -> None:
    """
    On a CPU, let Linux's C library return freed memory to the system, also between memory in use. Sampling and training
    free tensors of ever different sizes, and the gaps would add up to gigabytes.
    """
    if device.type == "cpu":
        call_glibc("malloc_trim", 0)


def keep_freed_memory() -> None:
    """
    Let Linux's C library keep freed memory until `return_freed_memory`: on a CPU, clearing new memory is a quarter of a
    real model's time.
    """
    call_glibc("mallopt", -4, 0)  # M_MMAP_MAX: large tensors come from the heap
    call_glibc("mallopt", -1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap returns its end only if 2 GiB of it are free


def call_glibc(function: str, *arguments: int) -> None:
    with suppress(OSError, AttributeError):  # another C library
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)


def control_group_memory(root: str = "") -> list[int]:
    """Bytes that are left below each memory limit of this process's control groups, as in a container (Linux)."""
    left = [sys.maxsize]
    with suppress(OSError):
        for _, kind, path in (line.split(":", 2) for line in Path(f"{root}/proc/self/cgroup").read_text().splitlines()):
            # Version 2 has no kind, version 1 one kind for each resource. Inside a container the path may not exist.
            limit, used = ("memory.limit_in_bytes", "rss") if kind else ("memory.max", "anon")
            for folder in (f"{root}/sys/fs/cgroup/{kind}{path}", f"{root}/sys/fs/cgroup/{kind}"):
                with suppress(OSError, ValueError, KeyError):  # no such file, or the limit is "max"
                    statistics = dict(map(str.split, Path(folder, "memory.stat").read_text().splitlines()))
                    left.append(int(Path(folder, limit).read_text()) - int(statistics[used]))
    return left


def describe_out_of_memory(error: BaseException) -> str:
    """The part of an error's text that says that a GPU or the machine is out of memory; "" for other errors."""
    found = re.search(r"(MPS )?[\w:]+ out of memory.*?(?=\. GPU|$)|(?<=DefaultCPUAllocator: )[^.]*|Unable to allocate.*"
                      r"|Cannot allocate memory|std::bad_alloc|CUBLAS_STATUS_ALLOC_FAILED|could not create a primitive",
                      " ".join(str(error).split()))
    if not found:
        return "out of memory" if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else ""
    return found[0] if "memory" in found[0] else f"out of memory ({found[0]})"
