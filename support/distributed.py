"""
Data parallelism under torchrun: every process holds the whole model and runs the same program.

    torchrun --nproc_per_node=4 train_manager.py --algo grpo --model ...

Expensive work is sharded: sampling by prompts (`Policy.sample`), scoring and the backward pass by groups
(`Policy.micro_batches`). The results are gathered, so every process computes rewards, advantages and minibatches of the
whole batch. A loss is divided by the size of the whole minibatch, so the sum of the processes' gradients is the
gradient of a single process (up to rounding). All take the same optimizer step.

Only rank 0 writes files and prints. Without torchrun there is one process, and every function returns its input.

Ctrl-C: torchrun forwards it and kills processes that have not ended after 30 seconds. If a step takes longer, set
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600.
"""
import os
import random
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers

TIMEOUT = timedelta(days=1)  # the longest wait for another process
IS_DISTRIBUTED = int(os.environ.get("WORLD_SIZE", 1)) > 1  # set by torchrun
RESUME_HINT = "to continue: the same torchrun command with --resume" if IS_DISTRIBUTED else ""


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_rank0() -> bool:
    return rank() == 0


def seed_step(seed: int, step: int) -> None:
    """Seed all generators from (seed, step, rank): a resumed run draws the same numbers as an uninterrupted one."""
    transformers.set_seed(random.Random(f"{seed} {step} {rank()}").getrandbits(32))


def local_shard(items):
    """Return this process's part of a list: of [a, b, c], rank 0 of 2 gets [a] and rank 1 gets [b, c]."""
    return items[len(items) * rank() // world_size():len(items) * (rank() + 1) // world_size()]


def all_gather(items: list) -> list:
    """Concatenate the lists of all processes in rank order: [a] and [b, c] -> [a, b, c]. Inverse of `local_shard`."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def rank0_result(function, *args):
    """Call the function on rank 0 only and return its result everywhere. The function must not communicate."""
    if world_size() == 1:
        return function(*args)
    result = [function(*args) if is_rank0() else None]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def barrier() -> None:
    all_gather([])


def all_reduce_sum(x):
    """Sum a tensor, or each number of a dict, over all processes."""
    if world_size() == 1:
        return x
    if isinstance(x, dict):
        return dict(zip(x, all_reduce_sum(torch.tensor([*x.values()], dtype=torch.double)).tolist(), strict=True))
    total = x.clone()
    dist.all_reduce(total)
    return total


def all_reduce_gradients(parameters) -> None:
    """Replace each gradient by its sum over all processes. A process without work contributes zeros."""
    if world_size() == 1:
        return
    parameters = list(parameters)
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in parameters]
    total = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))  # one tensor, one message
    for x, gradient in zip(parameters, total.split([x.numel() for x in parameters]), strict=True):
        x.grad = gradient.view_as(x)


def broadcast_parameters(parameters) -> None:
    """Copy rank 0's weights to all processes."""
    for x in parameters if world_size() > 1 else []:
        dist.broadcast(x.data, src=0)


def distributed_main(main):
    """
    Wrap `main` for torchrun: assign the GPU, join the process group, silence all ranks but 0. If a process fails,
    torchrun ends the others; only the first failure is reported.
    """
    if not IS_DISTRIBUTED:
        return main

    def run():
        store = join_process_group()
        try:
            with open(os.devnull, "w") as devnull, ExitStack() as stack:
                if not is_rank0():
                    stack.enter_context(redirect_stdout(devnull))
                    stack.enter_context(redirect_stderr(devnull))
                main()
                barrier()
        except SystemExit:  # main has reported the reason
            raise
        except BaseException:
            if not is_first_failure(store):
                sys.exit(1)
            raise
        dist.destroy_process_group()

    return run


def join_process_group():
    """Initialize torch.distributed from torchrun's environment variables. Returns the key-value store."""
    num_gpus, num_local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if num_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % num_gpus)
    # Python objects and CPU tensors use gloo, whose waiting processes do not occupy a GPU.
    backend = "cpu:gloo,cuda:nccl" if 0 < num_local <= num_gpus and dist.is_nccl_available() else "gloo"
    store, number, count = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    return store


def is_first_failure(store) -> bool:
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:  # the process that held the store has ended
        return False
