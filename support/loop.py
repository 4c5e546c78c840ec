"""
The training loop that grpo.py, ppo.py and sft.py share: resume, learning rates, logging, checkpoints, Ctrl-C, and the
held-out evaluation before and after. An algorithm iterates over `Loop.steps` and calls `Loop.log` once in each step.
"""
import math
import random
import time
import traceback
from contextlib import nullcontext, suppress
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from tqdm import tqdm

from data import WITH_OPERATIONS, UsageError
from support import distributed
from support.cli import from_args
from support.packing import describe_out_of_memory, return_freed_memory
from support.plots import plot_run
from support.rollouts import Played
from support.run import Run, check_adapter, disk_errors, folder_lock, warn_once
from support.text import reasons_on

REFERENCE = "reference"  # name of the frozen copy of --init-adapter
PATIENCE = 5  # a run ends after this many steps in a row with a refused update (a number was not finite)


class Task(Protocol):
    """The source of an algorithm's prompts and rewards. It returns the same on all processes."""
    state: dict  # plain Python values that a resumed run needs, saved in the checkpoint
    played: Played | None  # outputs of whole trajectories, which `batch` sampled for this step; None: no trajectories

    def batch(self, step: int) -> list:
        """The episodes of a step, each with a `prompt` of token ids."""

    def rewards(self, episodes: list, groups: list[list]) -> tuple[torch.Tensor, dict, list[dict]]:
        """Rewards (P, G) of the completions, the task's metrics, and some rollouts in readable form."""

    def evaluate(self, when: str, step: int) -> list[dict]:
        """Held-out results; `when` is "untrained" or "trained"."""


def fit(train, policy, task: Task, run: Run, adapter: str | tuple[str, ...], config) -> None:
    """
    A whole run by one algorithm, for example `grpo.train`. Saves and evaluates the adapter after the last step; several
    adapters (train_joint.py) have a folder each.
    """
    loop = Loop(policy, task, run, config)
    try:
        train(policy, task, loop, adapter, config)
    except (RuntimeError, MemoryError) as error:
        if describe_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # the frames hold the tensors of the step that did not fit
            with suppress(RuntimeError, MemoryError, UsageError):  # cannot be written: the last checkpoint stays
                loop.save_unfinished_step()
        raise
    if not distributed.rank0_result(run.is_complete, config.steps):
        if distributed.is_rank0():
            with disk_errors(run.folder):
                for name in [adapter] if isinstance(adapter, str) else adapter:
                    policy.save_adapter(name, run.folder / "adapter" / ("" if name == adapter else name))
        distributed.seed_step(config.seed, config.steps + 1)  # the same numbers if a run resumes here
        run.report(task.evaluate("trained", config.steps))


def run_training(algorithm, policy, task: Task, args, adapter=None) -> None:
    """`fit` in the folder args.out, locked against other processes, with the settings of the command line."""
    with folder_lock(Path(args.out)) if distributed.is_rank0() else nullcontext():
        run = Run(args.out, vars(args), args.resume, args.overwrite)
        fit(algorithm.train, policy, task, run, adapter or args.agent, from_args(algorithm.Config, args))
        if distributed.is_rank0():
            plot_run(args.out)
    print(f"adapter, metrics and samples are in {run.folder}")


def make_adapter(policy, args) -> None:
    """Add the adapter to train: a new one, or --init-adapter with its rank and alpha, and a frozen copy."""
    if not args.init_adapter:
        return policy.add_adapter(args.agent, args.rank, args.alpha)
    check_adapter(args.init_adapter, args.agent, args.distill if args.agent == "answer" else None)
    for name in [args.agent] if args.algo == "sft" else [args.agent, REFERENCE]:
        policy.load_adapter(name, args.init_adapter)
    args.rank, args.alpha = (policy.adapters[args.agent][name] for name in ("r", "lora_alpha"))


class Loop:
    def __init__(self, policy, task: Task, run: Run, config):
        self.policy, self.task, self.run, self.config = policy, task, run, config
        self.optimizer, self.parameters = None, []
        self.step, self.start, self.updates_before = 0, 0.0, 0  # of the step in progress
        self.refused = []  # of the last steps in a row that refused an update: the name of the first tensor

    @property
    def reference(self) -> str | None:
        """Adapter of the reference policy; None: the base model."""
        return REFERENCE if REFERENCE in self.policy.adapters else None

    def steps(self, optimizer, first_results=(), schedules=()):
        """
        Yield the step numbers that are left, after seeding the generators and setting the learning rates. `optimizer`
        holds everything that is trained; `schedules` are configurations, one for each of its parameter groups, if the
        run's does not suit all. A new run first reports `first_results` and the untrained agent's results.
        """
        self.optimizer, config = optimizer, self.config
        self.parameters = [x for group in optimizer.param_groups for x in group["params"]]
        peaks = [group["lr"] for group in optimizer.param_groups]
        distributed.broadcast_parameters(self.parameters)
        done = self.restore()
        if done is None:
            done = 0
            self.run.report([*first_results, *self.task.evaluate("untrained", 0)])
        progress = tqdm(range(done + 1, config.steps + 1), initial=done, total=config.steps,
                        desc=self.run.config.get("agent"), disable=None)
        with self.run.finish_step_on_interrupt():
            for step in progress:
                distributed.seed_step(config.seed, step)
                self.step, self.start, self.updates_before = step, time.time(), self.num_updates()
                for group, peak, own in zip(optimizer.param_groups, peaks, schedules or [config] * len(peaks),
                                            strict=True):
                    group["lr"] = peak * lr_multiplier(step, own)
                yield step
                self.finish_step()

    def log(self, step: int, metrics: dict, samples: list[dict]) -> None:
        """Write one line to metrics.jsonl and some rollouts to samples.jsonl; print the line."""
        self.refused = [*self.refused, metrics["not_finite_in"]] if metrics.get("skipped") else []
        metrics = {"step": step, **metrics, "lr": self.optimizer.param_groups[0]["lr"],
                   "seconds": time.time() - self.start}
        self.run.log(metrics)
        self.run.samples([{"step": step, **sample} for sample in samples])
        tqdm.write(self.run.line(step, metrics))
        if step == 1 and "algo" in self.run.config:  # a toy has no flags to change
            if left := self.config.steps - step:
                duration = timedelta(seconds=round(left * metrics["seconds"]))
                tqdm.write(f"{metrics['seconds']:.1f} s a step; {left} more like this one would take {duration}")
            can_clone = self.run.config["agent"] == "answer" or self.run.config["data"] in WITH_OPERATIONS
            for text in advice(metrics, self.run.config, can_clone):
                warn_once(f"step 1: {text}")

    def finish_step(self) -> None:
        """Write a checkpoint if one is due, and stop after Ctrl-C or too many refused updates."""
        return_freed_memory(self.policy.device)
        stop = None
        if any(distributed.all_gather([self.run.is_interrupted])):
            stop = KeyboardInterrupt()
        elif len(self.refused) == PATIENCE:
            stop = UsageError(f"{PATIENCE} steps in a row refused an update because of numbers that are not finite, "
                              f"first in {self.refused[0]}: lower --lr or give --dtype float32, and continue with "
                              "--resume")
        if stop or self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
            self.save(self.step)
        if stop:
            distributed.barrier()  # wait for rank 0 to write: the first process that ends makes torchrun end the others
            raise stop

    def save(self, step: int) -> None:
        self.run.save(step, {"parameters": [x.detach() for x in self.parameters],
                             "optimizer": self.optimizer.state_dict(), "task": self.task.state})

    def save_unfinished_step(self) -> None:
        """Save the state before the step in progress, unless an update of this step has changed it already."""
        if self.step and self.num_updates() == self.updates_before:
            self.save(self.step - 1)

    def restore(self) -> int | None:
        """Load the newest checkpoint and return its step; None if there is none."""
        found = distributed.rank0_result(self.run.load)
        if found is None:
            return None
        step, state = found
        if [x.shape for x in state["parameters"]] != [x.shape for x in self.parameters]:
            raise UsageError(f"the checkpoint in {self.run.folder} holds tensors of other shapes: resume with the "
                             "model and the rank of the run's config.json")
        for x, saved in zip(self.parameters, state["parameters"], strict=True):
            x.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.task.state = state["task"]
        return step

    def num_updates(self) -> int:
        return sum(int(moments["step"]) for moments in self.optimizer.state.values())  # rises if any agent is updated


class Update(NamedTuple):
    """The result of `optimizer_step`."""
    norm: float  # norm of the gradient before clipping
    not_finite_in: str = ""  # the tensor for which the update was refused


def optimizer_step(optimizer, grad_clip: float, inputs=None) -> Update:
    """
    Sum the gradients over all processes, clip each parameter group to this norm (0: no limit), and step. The update is
    refused if a gradient, or a tensor of the minibatch `inputs`, is not finite; minibatches are the same in all
    processes. Parameters must be named (see `Policy.named_parameters`). The norm is the first group's.
    """
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    distributed.all_reduce_gradients(parameters)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    tensors = {field.name: getattr(inputs, field.name) for field in fields(inputs)} if inputs is not None else {}
    tensors |= {f"the gradient of {name}": x.grad for name, x in zip(names, parameters, strict=True)}
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and not x.isfinite().all():
            return Update(0.0, name)
    norms = [torch.nn.utils.clip_grad_norm_(group["params"], grad_clip or math.inf) for group in optimizer.param_groups]
    optimizer.step()
    return Update(norms[0].item())


def update_metrics(updates: list[Update]) -> dict:
    """The mean gradient norm and the number of refused updates."""
    norms = [update.norm for update in updates if not update.not_finite_in]
    refused = [update.not_finite_in for update in updates if update.not_finite_in]
    return {"grad_norm": sum(norms) / max(1, len(norms)), "skipped": len(refused)} | (
        {"not_finite_in": refused[0]} if refused else {})


def mean_per_token(sums: dict[str, float]) -> dict[str, float | None]:
    """Divide sums over tokens by their count, `sums["tokens"]`, over all processes; None if there were none."""
    sums = distributed.all_reduce_sum({"tokens": 0.0, **sums})
    count = sums.pop("tokens")
    return {name: value / count if count else None for name, value in sums.items()}


def rollout_metrics(rewards: torch.Tensor, groups: list[list]) -> dict[str, float]:
    """Metrics of rewards (P, G) and completions that need no model. Entropy is E[-log pi] over all sampled tokens."""
    flat = [completion for group in groups for completion in group]
    num_tokens = sum(len(completion.ids) for completion in flat)
    deviations = rewards.std(dim=1, correction=min(1, rewards.shape[1] - 1))  # 0 in groups of one
    return {"reward": rewards.mean().item(), "reward_std": deviations.mean().item(),
            "zero_std_rate": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
            "entropy": -sum(sum(completion.logps) for completion in flat) / num_tokens,
            "completion_tokens": num_tokens / len(flat),
            "unfinished_rate": sum(not one.finished or reasons_on(one.text) for one in flat) / len(flat)}


def advice(metrics: dict, settings: dict, can_clone: bool) -> list[str]:
    """What will probably keep a run from learning, by its first step. `can_clone`: whether SFT could come first."""
    found, sft = [], "begin with --algo sft and continue with --init-adapter, or " if can_clone else ""
    if (rate := metrics.get("unfinished_rate", 0)) > 0.5:
        found.append(f"{rate:.0%} of the completions were cut off at --max-new-tokens {settings['max_new_tokens']}: "
                     "raise it, or choose an instruct model")
    if (rate := metrics.get("invalid_rate", 0)) > 0.5:
        found.append(f"{rate:.0%} of the outputs are invalid and score 0: see samples.jsonl; "
                     f"{sft}choose a larger model")
    if metrics.get("zero_std_rate") == 1 and settings["algo"] == "grpo":  # PPO compares with its critic
        graded = "--reward f1, " if settings["reward"] == "em" else ""
        found.append(f"the rewards of every group are equal (mean {metrics['reward']:.2f}), so there is nothing to "
                     f"learn from: {sft}try {graded}a larger --group-size")
    return found


def lr_multiplier(step: int, config) -> float:
    """The learning rate of steps 1, 2, ... as a fraction of its peak: the smaller of warmup and decay, both linear."""
    decay = (config.steps - step + 1) / config.steps if config.schedule == "linear" else 1.0
    return min(1.0, step / max(1, config.warmup), decay)


def epoch_indices(step: int, count: int, batch_size: int, seed: int) -> list[int]:
    """Indices of the items, 0 to `count` - 1, of a step: all appear once, in random order, before any appears again."""
    places = range((step - 1) * batch_size, step * batch_size)
    orders = {n: random.Random(f"{seed} {n}").sample(range(count), count) for n in {i // count for i in places}}
    return [orders[i // count][i % count] for i in places]
