"""
Train both agents together. Memory-R1 (arXiv 2508.19828) trains one after the other, and names this as a limitation.

    python train_joint.py                                             # tiny model, synthetic data
    python train_joint.py --manager "--bank trajectory --trajectories 8" --answer "--lr 5e-4"
    python train_joint.py --model Qwen/Qwen2.5-0.5B-Instruct --data locomo --steps 30
    python evaluate.py --manager runs/joint/adapter/manager --answer runs/joint/adapter/answer

This is the sum of two scripts: both adapters are on one base model, and each step is a GRPO step of the Manager and
then one of the Answer Agent (`grpo.train_step`), with the task, the defaults and the flags of its own script.
1. The Manager's outputs are rewarded by the current Answer Agent             train_manager.ManagerTask
2. The Answer Agent's banks are built by the Manager at the last refresh      CurrentBanks
3. The held-out evaluation of each script uses both current agents; that of the Answer Agent is end to end: the Manager
   builds the banks of long conversations, from empty ones                    JointTask.evaluate
"""
import support.installed  # noqa: F401  # isort: skip  names missing packages
import argparse
import random
import shlex
from dataclasses import dataclass, fields
from types import SimpleNamespace

import data
import grpo
import train_answer
import train_manager
from data import UsageError
from memory import MemoryBank, make_embedder
from policy import Policy
from support import cli
from support.cli import flag, from_args
from support.distributed import RESUME_HINT, distributed_main, rank0_result
from support.loop import advice, run_training
from support.run import check_out, warn_once

AGENTS = {"manager": train_manager, "answer": train_answer}  # adapter: its script
OTHER = {"manager": "--answer-adapter", "answer": "--manager-adapter"}  # flag of a script that names the other agent
SHARED = ("steps", "seed", "model", "data", "algo", "checkpoint-every", "out", "device", "dtype", "resume", "overwrite")
REFUSED = {f"--{name}": "not inside --manager or --answer" for name in SHARED} | dict.fromkeys(
    ("--init-adapter", *OTHER.values()), "train_joint.py trains two new adapters with each other, and loads none")


@dataclass(frozen=True)
class JointFlags:
    steps: int = flag(60, "training steps, each one of both agents", least=1)
    refresh: int = flag(5, "steps after which the Manager builds new banks for the Answer Agent", least=1)
    dialogues: int = flag(2, "number of these banks: one for each dialogue", least=1)
    checkpoint_every: int = flag(10, "steps between checkpoints", least=1)
    seed: int = flag(0, "random seed")
    manager: str = flag("", 'more flags of train_manager.py: --manager "--batch-size 16 --lr 1e-3"', metavar="FLAGS")
    answer: str = flag("", 'more flags of train_answer.py; a single word needs =: --answer=--extract', metavar="FLAGS")


class CurrentBanks(train_answer.AnswerTask):
    """The Answer Agent's task, on banks that the Manager builds again every `refresh` steps."""
    def __init__(self, policy: Policy, args: argparse.Namespace, refresh: int, count: int):
        self.refresh, self.count, self.first = refresh, count, 0  # first: the step in which `questions` were collected
        super().__init__(policy, args)

    def read_dialogues(self) -> None:
        self.questions = []  # the first step reads

    def batch(self, step: int) -> list[train_answer.Episode]:
        """The `--batch-size` episodes of a step; the order of the questions continues across refreshes."""
        first = step - (step - 1) % self.refresh
        if self.first != first:
            dialogues = self.training_dialogues(first)
            if self.state.get("first") != first:  # equal in a run that is resumed between two refreshes
                _, builds = self.build(dialogues, "train")
                self.state = {"first": first, "banks": [[(memory.text, memory.speaker, memory.time,
                                                          sorted(build.sources[memory.id])) for memory in build.bank]
                                                        for build in builds]}
            self.first, self.questions = first, self.collect(dialogues)
        return super().batch(step)

    def training_dialogues(self, first: int) -> list[data.Dialogue]:
        seed = self.args.seed * 100_000 + first
        if self.args.data == "synthetic":
            return data.load("synthetic", "train", count=self.count, seed=seed, num_turns=train_answer.NUM_TURNS)
        asked = [dialogue for dialogue in data.load(self.args.data, "train") if dialogue.final_questions()]
        return random.Random(seed).sample(asked, min(self.count, len(asked)))

    def collect(self, dialogues: list[data.Dialogue]) -> list[train_answer.BankQuestion]:
        """The final questions of the dialogues, and the banks of `state` to answer them from."""
        found, embedder = [], make_embedder(self.args.embedder, str(self.policy.device))
        for dialogue, memories in zip(dialogues, self.state["banks"], strict=True):
            bank, sources = MemoryBank(embedder), {}
            for text, speaker, time, turns in memories:
                sources[bank.add(text, speaker, time)] = set(turns)
            found += [train_answer.BankQuestion(question, bank, dialogue.speakers, sources)
                      for question in dialogue.final_questions()]
        return found

    def evaluate(self, when: str, step: int) -> list[dict]:
        self.read_held_out()
        return super().evaluate(when, step)


class JointTask:
    """The two tasks as one, for the loop: its state, and the results of both on held-out dialogues."""
    def __init__(self, policy: Policy, settings: dict[str, argparse.Namespace], args: argparse.Namespace):
        self.agents = {"manager": train_manager.ManagerTask(policy, settings["manager"]),
                       "answer": CurrentBanks(policy, settings["answer"], args.refresh, args.dialogues)}

    @property
    def state(self) -> dict:
        return {name: task.state for name, task in self.agents.items()}

    @state.setter
    def state(self, state: dict) -> None:
        for name, task in self.agents.items():
            task.state = state[name]

    def evaluate(self, when: str, step: int) -> list[dict]:
        return [{**row, "agent": name} for name, task in self.agents.items() for row in task.evaluate(when, step)]


class Optimizers:
    """Several optimizers as one, for the loop: learning rates and checkpoints."""
    def __init__(self, optimizers: list):
        self.optimizers = optimizers
        self.param_groups = [group for one in optimizers for group in one.param_groups]

    @property
    def state(self) -> dict:
        return {x: moments for one in self.optimizers for x, moments in one.state.items()}

    def state_dict(self) -> dict:
        return {"optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        for one, own in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(own)
        self.param_groups[:] = [group for one in self.optimizers for group in one.param_groups]


def make_train(settings: dict[str, argparse.Namespace]):
    """The training function of a run, as `support.loop.fit` calls it."""
    configs = {name: from_args(grpo.Config, own) for name, own in settings.items()}

    def train(policy: Policy, task: JointTask, loop, adapters: tuple, config: grpo.Config) -> None:
        optimizers = {name: grpo.make_optimizer(policy, name, configs[name]) for name in adapters}
        for step in loop.steps(Optimizers([*optimizers.values()]), schedules=[configs[name] for name in adapters]):
            row, samples = {"reward": 0.0, "skipped": 0}, []
            for name in adapters:
                metrics, some = grpo.train_step(policy, optimizers[name], task.agents[name], name, configs[name], step)
                for text in advice(metrics, vars(settings[name]), can_clone=False) if step == 1 else ():
                    warn_once(f"step 1, {name}: {text}")
                row["reward"] += metrics["reward"] / len(adapters)
                row["skipped"] += metrics["skipped"]
                row |= {key if key == "not_finite_in" else f"{name}_{key}": value for key, value in metrics.items()}
                samples += [{"agent": name, **sample} for sample in some]
            loop.log(step, row, samples)
    return train


def arguments(argv=None) -> tuple[argparse.Namespace, dict[str, argparse.Namespace]]:
    """The settings of the run, and those of each agent by its own script."""
    parser = cli.Parser(description="Train the Memory Manager and the Answer Agent together, by GRPO. The defaults of "
                        "each are those of its own script for the given --data and --model.")
    cli.add_flags(parser, "run", cli.RunFlags, {"out": "runs/joint", "eval": None})
    cli.add_flags(parser, "both agents", JointFlags, {})
    args = parser.parse_args(argv, argparse.Namespace(agent="joint", presets={}))
    if args.algo != "grpo":
        raise UsageError(f"--algo {args.algo}: train_joint.py trains with grpo; the other scripts have ppo and sft")
    given = [one.name for one in fields(cli.RunFlags) if one.name not in ("algo", "out", "resume", "overwrite")]
    common = [word for name in (*given, "steps", "seed", "checkpoint_every") if getattr(args, name) is not None
              for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    settings = {}
    for name, script in AGENTS.items():
        try:
            own = shlex.split(getattr(args, name))
        except ValueError as error:
            raise UsageError(f"--{name} {getattr(args, name)}: {error}") from None
        for word in (one.partition("=")[0] for one in own):
            if word in REFUSED:
                raise UsageError(f"{word}: {REFUSED[word]}")
        settings[name] = script.arguments([*common, OTHER[name], "the one trained at the same time", *own])
    if len({own.distill for own in settings.values()}) > 1:
        raise UsageError("--manager and --answer differ in --distill: give both the same, for one Answer Agent")
    args.distill = settings["answer"].distill
    vars(args).update({f"{name}.{key}": value for name, own in settings.items() for key, value in vars(own).items()})
    return args, settings


def main(argv=None) -> None:
    args, settings = arguments(argv)
    rank0_result(check_out, args)
    cli.seed_everything(args.seed)
    policy = Policy.load(args.model, args.device, args.dtype,
                         any(own.gradient_checkpointing for own in settings.values()))
    for name, own in settings.items():
        policy.add_adapter(name, own.rank, own.alpha)
    cli.announce(args, *settings.values())
    algorithm = SimpleNamespace(train=make_train(settings), Config=grpo.Config)
    run_training(algorithm, policy, JointTask(policy, settings, args), args, tuple(AGENTS))


if __name__ == "__main__":
    cli.exit_cleanly(distributed_main(main), less="--max-prompt-tokens in --manager '...' and --answer '...'",
                     resume_hint=RESUME_HINT)
