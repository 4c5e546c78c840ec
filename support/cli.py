"""
The command line of the scripts: flags, one-line errors, exit codes. A dataclass field made by `flag` is both a setting
and a flag. Defaults that differ by algorithm, data or the model's size are presets: dicts here and at the top of each
training script.

    steps: int = flag(90, "training steps", least=1)       # --steps N   training steps (90)
"""
import argparse
import difflib
import math
import os
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import get_args

import transformers

import data
from data import TINY, UsageError, is_tiny
from support.endpoint import Endpoint
from support.packing import describe_out_of_memory
from support.pretrained import num_parameters

SMALL_BELOW = 10**9  # models with fewer parameters are small; the tiny model has presets of its own
TEACHER_REPLIES = "~/.cache/memory-r1/teacher.jsonl"  # cache of a hosted teacher
BOUNDS = {"least": "at least", "most": "at most", "above": "above"}
REAL_DATA = {  # defaults of flags for real data, where they differ from those of synthetic data
    "extract": True,  # a real turn holds several facts and small talk
    "top_k": 10,  # several facts have more related memories than one
    "memories": 60,  # as in the paper: 30 of each speaker
    "loss_mean": "completion",  # as published
    "eval": 1,  # one LoCoMo dialogue has more than 100 questions
}
SMALL_MODEL = {  # for real models below 1e9 parameters, measured with one of 0.5e9 on LoCoMo (docs/results.md)
    "extract": False,  # its lists of facts lose much: stored, they give F1 .20, raw turns .32
    "memories": 8,  # more distract it: untrained F1 .32 with 8, .31 with 12, .22 with 30; 12 take 1.5 times as long
    "distill": False,  # untrained it selects most memories and answers worse: F1 .18, without a selection .32
    "reward": "f1",  # EM is nearly always 0 at the start; composite shortens answers first: more EM, the same F1
    "max_prompt_tokens": 2048,  # 8 turns take about 540; longer prompts do not fit into 8 GB with their gradients
    "minibatch": 4,  # two optimizer steps on a batch
    "lr": 1e-4,  # LoRA tolerates larger steps on small models
    "warmup": 3,  # a tenth of the steps
    "beta": 0.005,  # few steps do not move far
    "loss_mean": "token",  # else each token of a short output (NOOP, one word) weighs more than those of a long one
}


def flag(default, help: str, **options):
    """A dataclass field for `add_flags`. `options`: bounds (least=1, most=1, above=0) and options of add_argument."""
    return field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class RunFlags:
    algo: str = flag("grpo", "training algorithm; sft clones a teacher", choices=("grpo", "ppo", "sft"))
    model: str = flag(str(TINY), "causal language model: hub id, folder or .gguf file (data/tiny)")
    data: str = flag("synthetic", "synthetic, locomo, a file in LoCoMo's format, or a transcript with questions")
    out: str | None = flag(None, "folder of the run", metavar="DIR")
    resume: bool = flag(False, "continue the run in --out from its last checkpoint", action="store_true")
    overwrite: bool = flag(False, "replace the run in --out", action="store_true")
    device: str | None = flag(None, "cpu, cuda, cuda:1, mps ... (a GPU if there is one)")
    dtype: str | None = flag(None, "base weights (bfloat16 on a GPU and, above 50M parameters, on a CPU with AMX or "
                             "AVX512-BF16; else float32)", choices=("float32", "bfloat16"))
    eval: int = flag(32, "number of held-out conversations, 0 for no evaluation", least=0)


@dataclass(frozen=True)
class RewardFlags:
    reward: str = flag("em", "score of an answer; the paper uses em", choices=("em", "f1", "judge", "composite"))
    judge: str = flag("endpoint", "model for --reward judge: endpoint (set JUDGE_URL, JUDGE_MODEL and, if needed, "
                      "JUDGE_API_KEY), base (this run's model without adapters), or a model as for --model")
    judge_tokens: int = flag(512, "length of a judge's reply", least=1)


@dataclass(frozen=True)
class TeacherFlags:
    teacher: str = flag("known", "what to clone: what the data knows (reference operations, LoCoMo's observations, "
                        "correct answers), or the outputs of a hosted model (endpoint: set MANAGER_URL, MANAGER_MODEL "
                        "and MANAGER_API_KEY, or ANSWER_URL ...)", choices=("known", "endpoint"))


@dataclass(frozen=True)
class ModelFlags:
    init_adapter: str | None = flag(None, "run or adapter to start from: it gives --rank and --alpha, and the KL "
                                    "penalty pulls towards it (none: a new adapter)", metavar="DIR")
    rank: int = flag(16, "rank of LoRA", least=1)
    alpha: float = flag(32.0, "scale of LoRA: updates are multiplied by alpha / rank")
    gradient_checkpointing: bool = flag(False, "less memory, a third more time; turns itself on if a prompt with its "
                                        "completions would not fit", action="store_true")
    max_prompt_tokens: int = flag(1024, "longer prompts drop their least similar memories", least=16)
    embedder: str = flag("hash", "hash, hub id or folder of an encoder, or hash+ENCODER")
    extract: bool = flag(False, "let the base model list the facts of each turn; if not, the turn is its only fact")
    top_k: int = flag(4, "related memories shown to the Manager", least=0)
    memories: int = flag(4, "memories shown with a question, half of them of each speaker", least=1)
    named_only: bool = flag(True, "retrieve only memories of the speakers that the question names")
    floor: float | None = flag(None, "lowest similarity of a retrieved memory, from 0 to 1 (none)", least=0, most=1)


class Help(argparse.HelpFormatter):
    """Help that shows numbers as N or X and keeps the line breaks of examples."""

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type) or super()._get_default_metavar_for_optional(action)

    def _fill_text(self, text, width, indent):
        return text if "\n  " in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that suggests the flag or choice that was probably meant."""
    by_algorithm: dict = {}  # {algo: parser}, so that an error can name the --algo that a flag needs

    def __init__(self, **options):
        super().__init__(formatter_class=partial(Help, max_help_position=30), allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        """Parse, and refuse numbers that are not finite or exceed the bounds of their flag."""
        found = super().parse_args(args, namespace)
        for action in self._actions:
            value, bounds = getattr(found, action.dest, None), getattr(action, "bounds", {})
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{action.option_strings[0]} {value}: must be a finite number")
            for kind, bound in bounds.items() if value is not None else ():
                if {"least": value < bound, "most": value > bound, "above": value <= bound}[kind]:
                    raise UsageError(f"{action.option_strings[0]} {value}: must be {BOUNDS[kind]} {bound}")
        return found

    def error(self, message):
        known = [*self._option_string_actions, *(word for one in self._actions for word in one.choices or ())]
        wrong = re.findall(r"--[\w-]+", message.partition("arguments: ")[2]) or re.findall(r"choice: '(.*?)'", message)
        near = [word for one in wrong for word in difflib.get_close_matches(one, known, n=1)]
        hint = f"did you mean {' and '.join(near)}? " if near else ""
        for word in wrong:
            owners = [algo for algo, parser in self.by_algorithm.items() if word in parser._option_string_actions]
            hint = f"{word} needs --algo {' or '.join(owners)}; " if owners else hint
        self.exit(2, f"{self.prog}: error: {message}; {hint}python {self.prog} --help lists all\n")


def add_flags(parser: Parser, title: str, dataclass_type: type, presets: dict) -> None:
    """Add a flag for every field, under a title in the help. `presets` ({name: default}) replace defaults."""
    group = parser.add_argument_group(title)
    for one in fields(dataclass_type):
        default, options = presets.get(one.name, one.default), dict(one.metadata)
        bounds = {kind: options.pop(kind) for kind in BOUNDS if kind in options}
        if default is not None and "action" not in options and not options["help"].endswith(")"):
            options["help"] += f" ({ {'True': 'yes', 'False': 'no'}.get(str(default), default)})"
        type_ = (get_args(one.type) or [one.type])[0]  # int | None -> int
        options = ({"action": argparse.BooleanOptionalAction} if type_ is bool else {"type": type_}) | options
        action = group.add_argument(f"--{one.name.replace('_', '-')}", **options)
        action.default, action.bounds = default, bounds


def flag_groups(algorithms: dict, episode_flags: type, reward_flags: type = RewardFlags) -> dict[str, dict[str, type]]:
    """{algo: {title: dataclass}}, for {algo: module}. SFT has a teacher in place of a reward."""
    return {algo: {f"algorithm: {algo}": algorithm.Config, "episodes": episode_flags,
                   **({"teacher": TeacherFlags} if algo == "sft" else {"reward": reward_flags})}
            for algo, algorithm in algorithms.items()}


def model_size(model: str) -> str:
    """tiny, small or large. A model that cannot be read counts as large: the error comes when it is loaded."""
    if is_tiny(model):
        return "tiny"
    with suppress(UsageError):
        return "small" if num_parameters(model) < SMALL_BELOW else "large"
    return "large"


def parse_training_flags(agent: str, description: str, groups: dict, presets: dict, argv=None) -> argparse.Namespace:
    """
    Parse RunFlags, ModelFlags and groups[algo] (see flag_groups). Defaults depend on --algo, --data and --model:
    `presets` are {name: default or {algo: default}} for the "agent", real "data", and a "small" or "large" model.
    `args.presets` holds those of the data and the model, `args.size` the model's size.
    """
    first = Parser(add_help=False)
    add_flags(first, "run", RunFlags, {})
    chosen, _ = first.parse_known_args(argv)
    size = model_size(chosen.model)
    own = {**(presets["data"] if chosen.data != "synthetic" else {}), **presets.get(size, {})}
    defaults = {"out": f"runs/{agent}-{chosen.algo}", **presets.get("agent", {}), **own}
    defaults = {name: value[chosen.algo] if isinstance(value, dict) else value for name, value in defaults.items()}
    description += f" The flags of --algo {chosen.algo}; their defaults are those for the given --data and --model."
    parsers = {algo: Parser(description=description, usage="python %(prog)s [flags]") for algo in groups}
    for algo, parser in parsers.items():
        for title, dataclass_type in {"run": RunFlags, **groups[algo], "model and memory": ModelFlags}.items():
            add_flags(parser, title, dataclass_type, defaults)
    parsers[chosen.algo].by_algorithm = parsers
    args = parsers[chosen.algo].parse_args(argv, argparse.Namespace(agent=agent, size=size))
    args.presets = {name: defaults[name] for name in own if name in args}
    return args


def describe_presets(args: argparse.Namespace) -> str:
    """The defaults that --data and --model have chosen, as flags: "--memories 12 --no-distill"."""
    return " ".join(f"--{'' if value is not False else 'no-'}{name.replace('_', '-')}"
                    f"{'' if isinstance(value, bool) else f' {value}'}"
                    for name, value in args.presets.items() if getattr(args, name) == value)


def announce(args: argparse.Namespace, *agents: argparse.Namespace) -> None:
    """Print what a run is and which defaults were chosen, before banks are built. `agents`: those of a joint run."""
    print(f"{args.agent} by {args.algo}, seed {args.seed}, into {Path(args.out)}", flush=True)
    for own in agents or [args]:
        if chosen := describe_presets(own):
            whose = f" of the {own.agent} agent" if agents else ""
            print(f"defaults{whose} for this model and data: {chosen}", flush=True)


def make_teacher(args: argparse.Namespace) -> Endpoint | None:
    """The hosted model of --teacher endpoint; None for --teacher known."""
    return Endpoint.from_environment(args.agent.upper(), cache=TEACHER_REPLIES) if args.teacher == "endpoint" else None


def from_args(dataclass_type: type, args: argparse.Namespace, **others):
    """Make the dataclass from the flags named like its fields, and from `others`."""
    names = {one.name for one in fields(dataclass_type)}
    return dataclass_type(**{name: value for name, value in vars(args).items() if name in names} | others)


def held_out_dialogues(args: argparse.Namespace, **options) -> list[data.Dialogue]:
    """The first `--eval` held-out dialogues. `options` are passed to data/synthetic.py."""
    if args.data == "synthetic":
        return data.load("synthetic", "test", count=args.eval, seed=1, **options)
    return data.load(args.data, "val")[:args.eval] if args.eval else []


def seed_everything(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed {seed}: must be from 0 to {2**32 - 1}")
    transformers.set_seed(seed)


def exit_cleanly(main, less="--micro-batch-tokens (such as 2000), --max-prompt-tokens or --max-new-tokens, or add "
                 "--gradient-checkpointing", resume_hint="") -> None:
    """
    Run a script's `main`: an error the user can fix is one line and exit code 2, Ctrl-C is exit code 130. `less`: what
    to lower if memory runs out; `resume_hint`: how to continue, if not with --resume.
    """
    name, command = Path(sys.argv[0]).name, [word for word in sys.argv if word not in ("--resume", "--overwrite")]
    resume_hint = resume_hint or f"to continue: {shlex.join(['python', *command, '--resume'])}"
    try:
        return main()
    except UsageError as error:
        code, line = 2, f"{name}: error: {error}"
    except (RuntimeError, MemoryError) as error:
        if not (reason := describe_out_of_memory(error)):
            raise
        code, line = 2, f"{name}: error: {reason}: lower {less}; {resume_hint}"
    except KeyboardInterrupt:
        code, line = 130, f"\nstopped; {resume_hint}"
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    print(line, file=sys.stderr)
    sys.exit(code)
