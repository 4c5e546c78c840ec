"""
The command line of the scripts: the flags that training shares, what they are worth if not given, and mistakes
that cost a user one line and exit code 2.
"""
import argparse
import difflib
import math
import os
import re
import shlex
import sys
from dataclasses import field
from pathlib import Path

import torch

from data import TINY, UsageError, is_tiny

# What a flag is worth if it is not given: on synthetic talk, on real benchmarks; with the tiny model, with others; by
# algorithm. The learning rate is the algorithm's, for the tiny model and for others.
BY_DATA = {"top_k": (4, 10), "memories": (4, 60), "extract": (False, True), "named_only": (True, False),
           "eval": (32, 1), "linked": ("all", "mean"), "loss_mean": ("token", "completion"), "bank": ("oracle", "base")}
BY_MODEL = {"max_prompt_tokens": (1024, 4096), "max_new_tokens": (80, 512), "max_answer_tokens": (48, 256)}
ALGORITHMS = ("grpo", "ppo", "sft")
BY_ALGORITHM = {"group_size": (8, 4, 1), "minibatch": (0, 6, 0)}
LR = {"grpo": (3e-3, 2e-5), "ppo": (1e-3, 2e-5), "sft": (3e-3, 1e-4)}


def flag(default, help="", **options):
    return field(default=default, metadata={"help": help, **options})


class Help(argparse.HelpFormatter):
    """Help for a terminal: numbers are N or X, whatever their flags are called; examples stay as they are."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30)

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type) or super()._get_default_metavar_for_optional(action)

    def _fill_text(self, text, width, indent):
        return text if "\n  " in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """The flags of a script. A mistake costs one line, which names the flag or choice that was probably meant."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)

    def error(self, message):
        known = [*self._option_string_actions, *(word for one in self._actions for word in one.choices or ())]
        wrong = re.findall(r"--[\w-]+", message.partition("arguments: ")[2]) or re.findall(r"choice: '(.*?)'", message)
        near = [word for one in wrong for word in difflib.get_close_matches(one, known, n=1)]
        hint = f"did you mean {' and '.join(near)}? " if near else ""
        self.exit(2, f"{self.prog}: error: {message}; {hint}python {self.prog} --help lists all\n")


def add_shared_flags(parser: argparse.ArgumentParser, agent: str) -> None:
    """The flags that both training scripts have. None as a default: `fill_defaults` knows."""
    parser.set_defaults(agent=agent)
    add = parser.add_argument_group("the run").add_argument
    add("--algo", choices=ALGORITHMS, default="grpo", help="the algorithm; sft for the Manager alone (grpo)")
    add("--model", default=str(TINY), help="hub id or folder of a causal language model (data/tiny)")
    add("--data", default="synthetic", help="synthetic, locomo, a file in its format, or a transcript of your own with "
        "questions: see data/transcript.py (synthetic)")
    add("--out", metavar="DIR", help="the run's folder (runs/AGENT-ALGO)")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--seed", type=int, default=0, help="of everything random (0)")
    add("--device", help="cpu, cuda, cuda:1 ... (a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the base model (GPU: bfloat16, CPU: float32)")
    add("--eval", type=int, metavar="N", help="held-out conversations, 0 for none (Manager 32, Answer "
        "Agent 8; real data 1)")
    add = parser.add_argument_group("reinforcement").add_argument
    add("--steps", type=int, default=90, help="batches of rollouts (Manager 90, Answer Agent 40)")
    add("--batch-size", type=int, default=24, help="prompts a step (Manager 24, Answer Agent 16)")
    add("--group-size", type=int, help="completions of each prompt (grpo 8, ppo 4)")
    add("--reward", choices=("em", "f1", "judge", "composite"), default="em",
        help="how an answer is scored; em is the paper's (em)")
    add("--judge", default="endpoint", help="of --reward judge: endpoint (JUDGE_URL, JUDGE_MODEL, JUDGE_API_KEY in the "
        "environment), base (this run's own model), or a model's hub id or folder (endpoint)")
    add("--epochs", type=int, default=1, help="passes over a step's completions (1)")
    add("--minibatch", type=int, help="prompts per optimizer step, 0 for all (Manager: grpo 0, ppo 6; Answer Agent 4)")
    add("--lr", type=float,
        help="peak learning rate (tiny model: Manager by grpo or sft 3e-3, else 1e-3; others: grpo and ppo 2e-5, "
             "sft 1e-4)")
    add("--warmup", type=int, default=5, help="steps over which the learning rate rises (5)")
    add("--schedule", choices=("linear", "constant"), default="linear", help="the rate then falls, or stays (linear)")
    add("--clip", type=float, default=0.2, help="the ratio is clipped to 1 +- this (0.2)")
    add("--beta", type=float, default=0.01, help="weight of the KL penalty towards the base model (0.01)")
    add("--loss-mean", choices=("completion", "token"),
        help="mean over a completion's tokens, then over completions, as published, or over all tokens (synthetic: "
             "token, real data: completion)")
    add("--temperature", type=float, default=1.0, help="of sampling in training; evaluation is greedy (1.0)")
    add("--critic-lr", type=float, help="ppo: peak learning rate of the critic (twice --lr)")
    add("--gamma", type=float, default=1.0, help="ppo: discount (1.0)")
    add("--lam", type=float, default=1.0, help="ppo: lambda of GAE (1.0)")
    add("--value-clip", type=float, default=0.2, help="ppo: values move at most this far in a step, 0: no limit (0.2)")
    add("--grad-clip", type=float, default=1.0, help="largest norm of a gradient, 0 for no limit (1.0)")
    add("--checkpoint-every", type=int, default=10, metavar="STEPS", help="steps between checkpoints (10)")
    add = parser.add_argument_group("model and memory").add_argument
    add("--rank", type=int, default=16, help="of LoRA (16)")
    add("--alpha", type=float, default=32.0, help="of LoRA; updates are scaled by alpha / rank (32)")
    add("--max-prompt-tokens", type=int,
        help="longer prompts lose their least similar memories (1024; other models 4096)")
    add("--max-new-tokens", type=int, help="of a trained agent's output, and of a list of facts (Manager 80, Answer "
        "Agent 200; other models 512, 256)")
    add("--micro-batch-tokens", type=int, default=0,
        help="of one forward and backward pass (0: what a GPU's free memory should hold; on a CPU 4096)")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time; for big models")
    add("--embedder", default="hash", help="hash, an encoder's hub id or folder, or hash+ENCODER (hash)")
    add("--memories", type=int, help="memories an answer may draw on, half for each speaker (Manager's "
        "reward 4, Answer Agent 20; real data 60)")
    add("--named-only", action=argparse.BooleanOptionalAction, default=None,
        help="search only the memories of the speaker a question names (Manager's reward on synthetic "
             "talk: yes, else no)")
    add("--floor", type=float, help="show no memory less similar to the question than this, 0 to 1 (none)")
    add("--extract", action=argparse.BooleanOptionalAction, default=None,
        help="let the base model list the facts of a turn first (synthetic: no, real data: yes)")


def fill_defaults(args: argparse.Namespace, by_data=(), by_model=()) -> argparse.Namespace:
    """Fills what depends on other flags, first from an agent's own tables; refuses numbers that make no sense."""
    for defaults, column in ((BY_DATA | dict(by_data), args.data != "synthetic"),
                             (BY_MODEL | {"lr": LR[args.algo]} | dict(by_model), not is_tiny(args.model)),
                             (BY_ALGORITHM, ALGORITHMS.index(args.algo))):
        for name, values in defaults.items():
            if getattr(args, name, 0) is None:
                setattr(args, name, values[column])
    args.critic_lr = 2 * args.lr if args.critic_lr is None else args.critic_lr
    args.out = args.out or f"runs/{args.agent}-{args.algo}"
    siblings = 2 if args.algo == "grpo" else 1  # GRPO alone compares a sample with its siblings
    least = {"steps": 1, "batch_size": 1, "group_size": siblings, "epochs": 1, "minibatch": 0, "warmup": 0, "clip": 0,
             "beta": 0, "grad_clip": 0, "checkpoint_every": 1, "rank": 1, "max_prompt_tokens": 16, "max_new_tokens": 1,
             "max_answer_tokens": 1, "micro_batch_tokens": 0, "memories": 1, "eval": 0, "lr": 0, "top_k": 0,
             "window": 0, "refresh": 1, "grow": 0, "max_operation_tokens": 1, "critic_lr": 0, "value_clip": 0,
             "gamma": 0, "lam": 0, "floor": 0}
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be a finite number")
        if value is not None and value < least.get(name, value):
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {least[name]}")
        if name in ("gamma", "lam", "floor") and value is not None and value > 1:
            raise UsageError(f"--{name} {value}: must be at most 1")
    if args.temperature <= 0:
        raise UsageError(f"--temperature {args.temperature}: must be above 0, or all samples of a group are the same")
    return args


def usual(model: str) -> dict:
    """The settings that suit a model in conversation: those of synthetic talk for the tiny one, of real data else."""
    return {name: values[not is_tiny(model)] for name, values in (BY_DATA | BY_MODEL).items()}


def exit_cleanly(main, less="--micro-batch-tokens, --batch-size or --max-prompt-tokens, or add "
                 "--gradient-checkpointing", go_on="") -> None:
    """
    Runs a script's `main`: what the user can mend is one line and exit code 2, Ctrl-C is exit code 130. `less`: what to
    lower if the GPU's memory does not suffice; `go_on`: how to go on, if not by --resume.
    """
    again = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
    go_on, name = go_on or f"to go on: {shlex.join(['python', *again, '--resume'])}", Path(sys.argv[0]).name
    try:
        main()
    except UsageError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"{name}: error: {str(error).split('. GPU')[0]}: lower {less}; {go_on}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # who read the output, `head` for one, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print(f"\nstopped; {go_on}", file=sys.stderr)
        sys.exit(130)
