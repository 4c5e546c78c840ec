"""
A run's folder: its settings, what it measured, what it wrote, and the checkpoints to resume from.
Knows of no algorithm: a training loop hands it numbers, rows and tensors.

    run = Run("runs/answer-grpo", config, resume=config["resume"])
    step, tensors, state = run.load() or (0, {}, {})
    run.log({"step": 1, "reward": 0.7})        # a line of metrics.jsonl
    run.samples([{"step": 1, "prompt": ...}])  # lines of samples.jsonl
    run.save(1, tensors, state)                # checkpoint/step-00001, after all that belongs to step 1
    plot(run.folder)                           # curve.png

A kill at any moment costs what came after the last `save`: on resume the lines of later steps are dropped,
so a run that was killed and resumed leaves the same numbers as one that was not. Ctrl-C costs nothing: the step
ends, and a checkpoint is written.
"""
import argparse
import difflib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from tqdm import tqdm

from data import TINY, UsageError

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None

PATIENCE = 5  # steps in a row that may skip an update for a number that is not finite
LASTING = ("agent", "algo", "model", "rank", "alpha")  # settings that no run changes half way
COLUMNS = {  # of a line on the terminal
    "eval": "{:9}", "loss": "loss {:.3f}", "reward": "reward {:5.2f}", "zero_std_rate": "zero-std {:.2f}",
    "kl": "kl {:.3f}", "clip_rate": "clip {:.2f}", "entropy": "entropy {:.2f}", "value_loss": "value {:.3f}",
    "explained_variance": "explained {:5.2f}", "completion_tokens": "tokens {:3.0f}",
    "invalid_rate": "invalid {:.2f}", "n": "n {:4.0f}", "em": "em {:.2f}", "f1": "f1 {:.2f}",
    "selected": "selected {:4.1f}", "evidence": "evidence {:.2f}",
    "agreement": "agreement {:.2f}", "bank_size": "bank {:5.1f}", "seconds": "{:5.1f} s",
}
# Okabe and Ito's colours, told apart by the colour-blind, and in print by how dark they are
BLUE, SKY, VERMILION, GREY = "#0072B2", "#56B4E9", "#D55E00", "#DDDDDD"
EVENTS = {"ADD": BLUE, "UPDATE": SKY, "DELETE": VERMILION, "NOOP": GREY}
ABOVE = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 4, "frameon": False, "borderaxespad": 0}


# What a flag is worth if it is not given: on synthetic talk, on real benchmarks; with the tiny model, with others; by
# algorithm. The learning rate is the algorithm's, for the tiny model and for others.
BY_DATA = {"top_k": (4, 10), "memories": (4, 60), "extract": (False, True), "named_only": (True, False),
           "eval": (32, 1), "linked": ("all", "mean"), "loss_mean": ("token", "completion"), "bank": ("oracle", "base")}
BY_MODEL = {"max_prompt_tokens": (1024, 4096), "max_new_tokens": (80, 512), "max_answer_tokens": (48, 256),
            "micro_batch_tokens": (4096, 16384)}
ALGORITHMS = ("grpo", "ppo", "sft")
BY_ALGORITHM = {"group_size": (8, 4, 1), "minibatch": (0, 6, 0)}
LR = {"grpo": (3e-3, 2e-5), "ppo": (1e-3, 2e-5), "sft": (3e-3, 1e-4)}


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
    add("--data", default="synthetic", help="synthetic, locomo, longmemeval, longmemeval-s, msc, a file of one, or a "
        "transcript of your own: see data/transcript.py (synthetic)")
    add("--out", metavar="DIR", help="the run's folder (runs/AGENT-ALGO)")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--seed", type=int, default=0, help="of everything random (0)")
    add("--device", help="cpu, cuda, cuda:1 ... (a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the base model (GPU: bfloat16, CPU: float32)")
    add("--eval", type=int, metavar="N", help="held-out conversations, 0 for none (Manager 32, Answer "
        "Agent 8; real data 1)")
    add = parser.add_argument_group("reinforcement").add_argument
    add("--steps", type=int, default=90, help="batches of rollouts (90)")
    add("--batch-size", type=int, default=24, help="prompts a step (24)")
    add("--group-size", type=int, help="completions of each prompt (grpo 8, ppo 4)")
    add("--reward", choices=("em", "f1", "judge", "composite"), default="em",
        help="how an answer is scored; em is the paper's (em)")
    add("--judge", default="endpoint", help="of --reward judge: endpoint (JUDGE_URL, JUDGE_MODEL, JUDGE_API_KEY in the "
        "environment), base (this run's own model), or a model's hub id or folder (endpoint)")
    add("--epochs", type=int, default=1, help="passes over a step's completions (1)")
    add("--minibatch", type=int, help="prompts per optimizer step, 0 for all (grpo 0, ppo 6)")
    add("--lr", type=float,
        help="peak learning rate (tiny model: grpo and sft 3e-3, ppo 1e-3; others: grpo and ppo 2e-5, sft 1e-4)")
    add("--warmup", type=int, default=5, help="steps until the learning rate is reached (5)")
    add("--schedule", choices=("linear", "constant"), default="linear", help="of the learning rate afterwards (linear)")
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
    add("--grad-clip", type=float, default=1.0, help="largest norm of a gradient (1.0)")
    add("--checkpoint-every", type=int, default=10, metavar="STEPS", help="steps between checkpoints (10)")
    add = parser.add_argument_group("model and memory").add_argument
    add("--rank", type=int, default=16, help="of LoRA (16)")
    add("--alpha", type=float, default=32.0, help="of LoRA; updates are scaled by alpha / rank (32)")
    add("--max-prompt-tokens", type=int,
        help="longer prompts lose their least similar memories (1024; other models 4096)")
    add("--max-new-tokens", type=int, help="of a trained agent's output (Manager 80, Answer Agent 200; other "
        "models 512, 256)")
    add("--micro-batch-tokens", type=int, help="of one forward and backward pass (4096; other models 16384)")
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


def fill_defaults(args: argparse.Namespace, by_data=(), by_model=(), by_algorithm=()) -> argparse.Namespace:
    """Fills what depends on other flags, first from an agent's own tables; refuses numbers that make no sense."""
    is_other = Path(args.model).resolve() != TINY.resolve()
    for defaults, column in ((BY_DATA | dict(by_data), args.data != "synthetic"),
                             (BY_MODEL | {"lr": LR[args.algo]} | dict(by_model), is_other),
                             (BY_ALGORITHM | dict(by_algorithm), ALGORITHMS.index(args.algo))):
        for name, values in defaults.items():
            if getattr(args, name, 0) is None:
                setattr(args, name, values[column])
    args.critic_lr = 2 * args.lr if args.critic_lr is None else args.critic_lr
    args.out = args.out or f"runs/{args.agent}-{args.algo}"
    siblings = 2 if args.algo == "grpo" else 1  # GRPO alone compares a sample with its siblings
    least = {"steps": 1, "batch_size": 1, "group_size": siblings, "epochs": 1, "minibatch": 0, "warmup": 0, "clip": 0,
             "beta": 0, "grad_clip": 0, "checkpoint_every": 1, "rank": 1, "max_prompt_tokens": 16, "max_new_tokens": 1,
             "max_answer_tokens": 1, "micro_batch_tokens": 1, "memories": 1, "eval": 0, "lr": 0, "top_k": 0,
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
    is_other = Path(model).resolve() != TINY.resolve()
    return {name: values[is_other] for name, values in (BY_DATA | BY_MODEL).items()}


def train(algorithm, policy, task, args: argparse.Namespace) -> None:
    """A whole run in its folder, by `algorithm`: a module with a `Config` and a `train`."""
    with locked(Path(args.out)):
        run = Run(args.out, vars(args), args.resume, args.overwrite)
        print(f"{args.agent} by {args.algo}, seed {args.seed}, into {run.folder}", flush=True)
        config = algorithm.Config(**{name: getattr(args, name) for name in algorithm.Config.__dataclass_fields__})
        algorithm.train(policy, task, run, args.agent, config)
        plot(run.folder)
    print(f"adapter, metrics and samples are in {run.folder}")


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


def seed_everything(seed: int):
    """Seeds every generator that a library may draw from unasked; nothing else in the project does."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed {seed}: must be from 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA's too


def random_state(**generators) -> dict:
    """All random states, fit for JSON: the libraries' own and each `Random` or `torch.Generator` given."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    given = {name: as_hex(generator.get_state()) if isinstance(generator, torch.Generator) else
             generator.getstate() for name, generator in generators.items()}
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest],
            "torch": as_hex(torch.get_rng_state()), "cuda": [as_hex(one) for one in cuda], "given": given}


def restore_random_state(state: dict, **generators):
    """The inverse of `random_state`, also of what JSON made of it."""
    random.setstate(as_tuple(state["python"]))
    np.random.set_state(as_tuple(state["numpy"]))
    torch.set_rng_state(from_hex(state["torch"]))
    for device, one in enumerate(state["cuda"][:torch.cuda.device_count()]):
        torch.cuda.set_rng_state(from_hex(one), device)
    for name, generator in generators.items():
        if isinstance(generator, torch.Generator):
            generator.set_state(from_hex(state["given"][name]))
        else:
            generator.setstate(as_tuple(state["given"][name]))


def as_hex(tensor):
    return bytes(tensor.tolist()).hex()


def from_hex(text):
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def as_tuple(value):
    """[3, [1, 2], None] -> (3, (1, 2), None): JSON gives lists where `setstate` wants tuples."""
    return tuple(map(as_tuple, value)) if isinstance(value, (list, tuple)) else value


def optimizer_tensors(optimizer, prefix: str = "optimizer") -> dict[str, torch.Tensor]:
    """A copy of an optimizer's state: {"optimizer.0.step": ..., "optimizer.0.exp_avg": ...}"""
    return {f"{prefix}.{i}.{key}": value.detach().to("cpu", copy=True)
            for i, moments in optimizer.state_dict()["state"].items() for key, value in moments.items()}


def restore_parameters(parameters, tensors: dict[str, torch.Tensor]):
    """Copies the tensors {"adapter.0": ..., "adapter.1": ...} into the parameters."""
    for i, parameter in enumerate(parameters):
        found = tensors.get(f"adapter.{i}")
        if found is None or found.shape != parameter.shape:
            raise UsageError(f"the checkpoint's adapter.{i} is not of shape {tuple(parameter.shape)}: "
                             "resume with the model and the rank of the run's config.json")
        parameter.data.copy_(found)


def restore_optimizer(optimizer, tensors: dict[str, torch.Tensor], prefix: str = "optimizer"):
    """The inverse of `optimizer_tensors`. The learning rate and the like stay those of `optimizer`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(re.escape(prefix) + r"\.(\d+)\.(\w+)", name)
        if found is None:
            continue
        i = int(found[1])
        if i >= len(parameters) or tensor.dim() and tensor.shape != parameters[i].shape:
            raise UsageError(f"the checkpoint's {name} {tuple(tensor.shape)} fits no parameter here: "
                             "resume with the model and the rank of the run's config.json")
        moments.setdefault(i, {})[found[2]] = tensor.clone()
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def first_not_finite(named: dict[str, torch.Tensor | None]) -> str:
    """The name of the first tensor with a nan or an infinity in it; "" if there is none."""
    return next((name for name, tensor in named.items() if tensor is not None and not tensor.isfinite().all()), "")


@contextmanager
def writing(folder):
    """Full disks and missing rights, said in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"the run's folder {folder} cannot be written ({reason}): "
                         "mend that or choose another --out; what is written already stays") from None


@contextmanager
def locked(folder: Path):
    """Keeps other processes from training in the folder. However this one ends, the lock ends with it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+")
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(f"{folder} is in use by {file.read() or 'another process'}: "
                             "stop that first, or choose another --out") from None
        except OSError as error:  # some file systems have no locks
            note(f"{folder} cannot be locked ({error.strerror}): start no second run there")
        with writing(folder):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        yield


def check_out(args: argparse.Namespace) -> None:
    """Refuses an --out that is in use or would be overwritten, before the minutes that it takes to load and build."""
    if args.resume and args.overwrite:
        raise UsageError("--resume continues the run in --out and --overwrite replaces it: give one of them")
    if Path(args.out, "lock").exists():
        with locked(Path(args.out)):
            pass
    if not args.resume and not args.overwrite:
        refuse_run_in(Path(args.out))


def refuse_run_in(folder: Path) -> None:
    if holds_run(folder):
        raise UsageError(f"{folder} already holds a run: choose another --out, "
                         "continue it with --resume, or replace it with --overwrite")


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoint", "adapter"))


def write(path, content):
    """Replaces a file as a whole, and has it on the disk before this returns."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def sync(folder):
    """Has the names in a folder on the disk, as a rename alone does not."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def append(path, rows):
    lines = "".join(json.dumps(tidy(row), ensure_ascii=False, default=str) + "\n" for row in rows)
    with writing(path.parent), open(path, "ab") as file:
        file.write(lines.encode("utf-8", "replace"))


def tidy(value):
    """{"kl": nan, "reward": tensor(0.12345678)} -> {"kl": None, "reward": 0.123457, "not_finite": ["kl"]}"""
    if isinstance(value, dict):
        row = {key: tidy(one) for key, one in value.items()}
        lost = [key for key, one in row.items() if one is None and value[key] is not None]
        return {**row, "not_finite": lost} if lost else row
    if isinstance(value, (list, tuple)):
        return [tidy(one) for one in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return tidy(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_rows(path: str | Path) -> list[dict]:
    """The objects of a .jsonl file, without the line that a kill tore; [] if there is no file."""
    rows = []
    for line in Path(path).read_bytes().splitlines(keepends=True) if os.path.exists(path) else []:
        try:
            rows.append(json.loads(line) if line.endswith(b"\n") else None)
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def cut(path, last_step):
    """Drops from a .jsonl file the lines of later steps and those that a kill tore."""
    if path.exists():
        rows = [row for row in read_rows(path) if row.get("step", 0) <= last_step]
        write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def digest(step, state, blob):
    """The checksum of a checkpoint: of the tensors' bytes, and of the rest as JSON has it."""
    checksum = hashlib.sha256(blob)
    checksum.update(json.dumps([step, state]).encode())
    return checksum.hexdigest()


@functools.cache
def note(text):
    """Says something once, above the progress bar rather than through it."""
    tqdm.write(f"note: {text}", file=sys.stderr)


def tell_changes(path, settings):
    """Says in what a resumed run differs from the one begun, for then its numbers do too; refuses what cannot be."""
    try:
        old = json.loads(path.read_bytes())
        changes = {key: f"{key} {old[key]} -> {value}" for key, value in settings.items()
                   if key not in ("resume", "overwrite") and key in old and old[key] != value}
    except (OSError, ValueError, TypeError):
        return  # a first start, or a file that tells nothing
    for key in LASTING:  # a model's folder may have moved
        if key in changes and Path(str(old[key])).name != Path(str(settings[key])).name:
            raise UsageError(f"{path.parent} was begun with {key} {old[key]}, not {settings[key]}: resume it with "
                             "that, or choose another --out")
    if changes:
        note(f"{path.parent} is resumed with other settings: {', '.join(changes.values())}")


class Run:
    """The folder of one run: config.json, metrics.jsonl, samples.jsonl and checkpoint/."""

    def __init__(self, folder: str | Path, config: dict, resume: bool = False, overwrite: bool = False):
        self.folder, self.config = Path(folder), dict(config)
        self.whole = None  # the newest checkpoint known to be whole; it stays until there is a newer one
        self.is_interrupted, self.skips = False, []  # Ctrl-C was pressed; the tensors for which updates were skipped
        libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
        settings = {**self.config, "versions": {"python": platform.python_version(), **libraries}}
        settings = json.loads(json.dumps(settings, default=str))
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                self.clear()
            if not resume:
                refuse_run_in(self.folder)
            elif holds_run(self.folder):
                tell_changes(self.folder / "config.json", settings)
                self.rewind()
            else:
                note(f"{self.folder} holds no run to resume: starting one")
            write(self.folder / "config.json", json.dumps(settings, indent=2).encode() + b"\n")

    def clear(self):
        """Removes what an earlier run left here, and nothing else."""
        for name in ("checkpoint", "adapter"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("config.json", "metrics.jsonl", "samples.jsonl", "curve.png"):
            (self.folder / name).unlink(missing_ok=True)

    def rewind(self):
        """Takes the logs back to the newest checkpoint, or to their beginning where there is none."""
        found = self.load()
        if found and found[0] > self.config.get("steps", found[0]):
            raise UsageError(f"{self.folder} has {found[0]} steps already: resume it with --steps {found[0]} or more")
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut(self.folder / name, last_step=found[0] if found else -1)

    def log(self, metrics: dict):
        """Appends a line to metrics.jsonl: six digits; nan and inf as null, their keys in `not_finite`."""
        append(self.folder / "metrics.jsonl", [metrics])

    def samples(self, rows: list[dict]):
        """Appends rollouts as a person would read them. Each has its `step`, by which resuming drops it."""
        append(self.folder / "samples.jsonl", rows)

    @contextmanager
    def ending_steps(self):
        """Ctrl-C lets the step end: `reason_to_stop` knows of it. A second one stops at once."""
        def wait(*_):
            self.is_interrupted = True
            signal.signal(signal.SIGINT, before)
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print may be at work already

        before = signal.signal(signal.SIGINT, wait)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def reason_to_stop(self, metrics: dict) -> BaseException | None:
        """What to raise after this step and its checkpoint, if anything."""
        self.skips = [*self.skips, metrics["not_finite_in"]] if metrics.get("skipped") else []
        if self.is_interrupted:
            return KeyboardInterrupt()
        if len(self.skips) == PATIENCE:
            return UsageError(f"{PATIENCE} steps in a row skipped an update, as numbers were not finite, first in "
                              f"{self.skips[0]}: lower --lr or give --dtype float32, and continue with --resume")

    def line(self, step: int, metrics: dict) -> str:
        """One step on the terminal: `step  12/60  reward  0.71  zero-std 0.12  kl 0.013  ...    1.4 s`"""
        steps = self.config.get("steps")
        parts = [f"step {step:{max(3, len(str(steps)))}}/{steps}" if steps else f"step {step:5}"]
        parts += [form.format(metrics[key]) for key, form in COLUMNS.items() if metrics.get(key) is not None]
        return "  ".join(parts)

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict):
        """
        Writes checkpoint/step-00012 and keeps one older. Call it after all that was logged of the step.
        Only the rename makes it a checkpoint: a kill before it leaves the older ones as they were.
        """
        root = self.folder / "checkpoint"
        partial, target = root / "partial", root / f"step-{step:05}"
        blob = safetensors.save({name: tensor.detach().to("cpu", copy=True).contiguous()
                                 for name, tensor in tensors.items()})
        content = {"step": step, "sha256": digest(step, state, blob), "state": state}
        with writing(self.folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial / "tensors.safetensors", blob)
            write(partial / "state.json", json.dumps(content).encode())
            num_saved = 0
            while target.exists():  # a folder cannot be overwritten: the step's second save is step-00012-1
                num_saved += 1
                target = root / f"step-{step:05}-{num_saved}"
            os.replace(partial, target)
            sync(root)
            for folder in self.checkpoints():
                if folder not in (target, self.whole):
                    shutil.rmtree(folder, ignore_errors=True)
        self.whole = target

    def load(self) -> tuple[int, dict[str, torch.Tensor], dict] | None:
        """(step, tensors, state) of the newest whole checkpoint; None where none was written yet."""
        damage = []
        for folder in reversed(self.checkpoints()):
            try:
                content = json.loads((folder / "state.json").read_bytes())
                blob = (folder / "tensors.safetensors").read_bytes()
                step, state = content["step"], content["state"]
                if content["sha256"] != digest(step, state, blob):
                    raise ValueError("its checksum is wrong")
                tensors = safetensors.load(blob)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                damage.append(f"{folder} is damaged ({error})")
                continue
            for text in damage:
                note(f"{text}: going back to {folder.name}")
            self.whole = folder
            return step, tensors, state
        if damage:
            raise UsageError(f"{damage[0]} and no other is whole: start anew with another --out")
        return None

    def checkpoints(self):
        """The folders of checkpoints, oldest first."""
        folders = [path for path in self.folder.glob("checkpoint/step-*") if path.name[5:6].isdecimal()]
        return sorted(folders, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def save(run: Run, step: int, task, parameters, optimizer, rng) -> None:
    """A checkpoint of all that training goes on from; `restore` is the inverse."""
    tensors = {f"adapter.{i}": parameter for i, parameter in enumerate(parameters)}
    run.save(step, tensors | optimizer_tensors(optimizer), {"random": random_state(rng=rng), "task": task.state})


def restore(run: Run, task, parameters, optimizer, rng) -> int | None:
    """Brings everything to where the newest checkpoint was written, and returns its step; None without one."""
    begun = run.load()
    if begun is None:
        return None
    step, tensors, state = begun
    restore_parameters(parameters, tensors)
    restore_optimizer(optimizer, tensors)
    restore_random_state(state["random"], rng=rng)
    task.state = state.get("task", {})  # the first checkpoints had none
    return step


def plot(folder: str | Path) -> Path | None:
    """Draws metrics.jsonl into curve.png: reward or loss, KL, and the Manager's operations and bank."""
    try:
        from matplotlib.figure import Figure  # an extra, and slow to load
    except ImportError:
        note("no curve.png without matplotlib: pip install matplotlib")
        return None
    rows = read_rows(Path(folder) / "metrics.jsonl")
    held_out = [row for row in rows if row.get("eval") in ("untrained", "trained")]
    rows = [row for row in rows if "eval" not in row]
    labels = {"reward": "reward", "loss": "loss\n(nats per token)", "kl": "KL to reference\n(nats per token)",
              "ops": "operations\n(share)", "bank_size": "bank size\n(memories)"}
    panels = [key for key in labels if any(row.get(key) is not None for row in rows)]
    if not panels:
        return None
    figure = Figure(figsize=(7, 0.6 + 2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, key in zip(axes, panels, strict=True):
        draw_shares(ax, rows) if key == "ops" else draw_curve(ax, rows, key)
        ax.set_ylabel(labels[key])
        ax.spines[["top", "right"]].set_visible(False)
    if held_out and panels[0] == "reward":
        steps, em = column(held_out, "step"), column(held_out, "em")
        axes[0].plot(steps, em, "kD", clip_on=False, label="held-out EM")
    axes[0].legend(**ABOVE)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels(axes)
    with writing(folder):
        figure.savefig(Path(folder) / "curve.png", dpi=150)
    return Path(folder) / "curve.png"


def draw_curve(ax, rows, key):
    """The values as measured, thin, and smoothed over a tenth of the run, thick."""
    ax.plot(column(rows, "step"), column(rows, key), color=SKY, linewidth=0.8, label="each step")
    ax.plot(column(rows, "step"), smooth(column(rows, key)), color=BLUE, linewidth=2, label="smoothed")
    ax.margins(x=0.01)


def draw_shares(ax, rows):
    """How the operations divide, smoothed and stacked to 1."""
    ops = [row.get("ops") or {} for row in rows]
    counts = [smooth(column(ops, event, missing=0)) for event in EVENTS]
    shares = np.stack(counts) / np.maximum(np.sum(counts, axis=0), 1e-9)
    ax.stackplot(column(rows, "step"), shares, colors=EVENTS.values(), labels=EVENTS, edgecolor="white")
    ax.set_ylim(0, 1)
    ax.legend(**ABOVE)


def column(rows, key, missing=math.nan):
    return np.array([missing if row.get(key) is None else row[key] for row in rows], dtype=float)


def smooth(values):
    """The mean over a window around each step, of the values that are there."""
    window, is_there = np.ones(max(1, len(values) // 10)), np.isfinite(values)
    with np.errstate(invalid="ignore"):  # 0 / 0 where none is
        return (np.convolve(np.where(is_there, values, 0), window, "same")
                / np.convolve(is_there, window, "same"))
