"""
Data parallelism: the work of every step divided among several processes, one for each GPU or for some cores of a CPU.

    torchrun --nproc_per_node=4 train_manager.py --algo grpo --model ...

Every process has the whole model and goes through the same steps. It samples for its share of the prompts; then all
are told all completions, so that rewards, advantages, whitening and minibatches are those of the whole batch, computed
alike everywhere. Only what takes long is divided again: answers for the rewards, values, forward and backward passes.
A loss is divided by what the whole minibatch holds, so the sum of the processes' gradients is the gradient of one
process alone, to rounding; all take the same optimizer step, and no process ever sends its weights again.

Process 0, "main", alone writes, prints and evaluates. Where torchrun has started none, there is one process, main, and
every function here gives back what it was given.

Ctrl-C: torchrun passes it on and kills what has not ended 30 seconds later. Where a step may take longer, have it wait:
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun ...
"""
import os
import random
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from datetime import timedelta
from zlib import crc32

import torch
import torch.distributed as dist

TIMEOUT = timedelta(days=1)  # for one process to wait for another: main may evaluate for hours
SEVERAL = int(os.environ.get("WORLD_SIZE", 1)) > 1  # as torchrun says
GO_ON = "to go on: the same torchrun command with --resume" if SEVERAL else ""


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is: 0, 1, ..."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    return rank() == 0


# ------------------------------------------------------------------------------------------------ work

def share(items):
    """This process's part of a list: of [a, b, c] and two processes [a] and [b, c]. `gather` is the inverse."""
    return items[len(items) * rank() // world():len(items) * (rank() + 1) // world()]


def gather(items: list) -> list:
    """The lists of all processes as one, in every process: [a] and [b, c] -> [a, b, c]"""
    if world() == 1:
        return items
    parts = [None] * world()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def divide(work, items: list) -> list:
    """`work(items)`, a list. An item always falls to the same process: one that is paid for is paid for once."""
    if world() == 1:
        return work(items)
    own = sorted({item for item in items if crc32(repr(item).encode()) % world() == rank()})
    found = dict(gather(list(zip(own, work(own), strict=True))))
    return [found[item] for item in items]


def own_batches(policy, prompts, completions, max_tokens: int) -> list[list[int]]:
    """`Policy.micro_batches` of this process's share of the groups."""
    own = share(range(len(prompts)))
    batches = policy.micro_batches([prompts[i] for i in own], [completions[i] for i in own], max_tokens)
    return [[own[i] for i in batch] for batch in batches]


def on_main(function, *args):
    """`function(*args)` as main finds it, in every process. The function itself may not gather or sum."""
    if world() == 1:
        return function(*args)
    found = [function(*args) if is_main() else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def wait() -> None:
    gather([])


# ------------------------------------------------------------------------------------------------ tensors

def sum_over_ranks(x):
    """The sum over all processes of a tensor, or of each number of a dict."""
    if world() == 1:
        return x
    if isinstance(x, dict):
        return dict(zip(x, sum_over_ranks(torch.tensor([*x.values()], dtype=torch.double)).tolist(), strict=True))
    total = x.clone()
    dist.all_reduce(total)
    return total


def sum_gradients(parameters) -> None:
    """Makes each gradient the sum over all processes. One that had nothing to score adds 0."""
    if world() == 1:
        return
    parameters = list(parameters)
    own = [torch.zeros_like(x) if x.grad is None else x.grad for x in parameters]
    total = sum_over_ranks(torch.cat([grad.flatten() for grad in own]))  # as one tensor: one message
    for x, grad in zip(parameters, total.split([x.numel() for x in parameters]), strict=True):
        x.grad = grad.view_as(x)


def copy_from_main(parameters) -> None:
    """Every process starts from the weights of main."""
    for x in parameters if world() > 1 else []:
        dist.broadcast(x.data, src=0)


def seed_apart(seed: int, step: int) -> None:
    """
    Has every process but main draw its own random numbers in this step. They follow from seed, step and rank, and
    main's random state is in the checkpoint: a resumed run draws what it would have drawn.
    """
    if rank() > 0:
        torch.manual_seed(random.Random(f"{seed} {step} {rank()}").getrandbits(63))


# ------------------------------------------------------------------------------------------------ start and end

def together(main):
    """
    `main` as one of torchrun's processes: each takes its GPU and joins the others. An error in one ends all, since
    torchrun ends them, or since a process that waits for one that has gone gets an error too; only the first is told.
    """
    if not SEVERAL:
        return main

    def run():
        gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % gpus)  # what "cuda" means from here on
        # What is no tensor of a GPU goes by gloo, in which a process waits without keeping a GPU busy.
        backend = "cpu:gloo,cuda:nccl" if 0 < here <= gpus and dist.is_nccl_available() else "gloo"
        store, number, count = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
        try:
            with open(os.devnull, "w") as nowhere, ExitStack() as stack:
                if not is_main():
                    stack.enter_context(redirect_stdout(nowhere))
                    stack.enter_context(redirect_stderr(nowhere))
                main()
                wait()
        except SystemExit:  # main has said why
            raise
        except BaseException:
            if not is_first_failure(store):
                sys.exit(1)
            raise
        dist.destroy_process_group()

    return run


def is_first_failure(store) -> bool:
    """Whether no other process has failed before this one."""
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:  # the process that kept the store has gone
        return False
