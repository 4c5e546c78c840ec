"""
A run's folder: its settings, what it measured, what it wrote, and the checkpoints to resume from.
Knows of no algorithm: a training loop hands it numbers, rows and tensors.

    run = Run("runs/answer-grpo", config, resume=config["resume"])
    step, tensors, state = run.load() or (0, {}, {})
    run.log({"step": 1, "reward": 0.7})        # a line of metrics.jsonl
    run.samples([{"step": 1, "prompt": ...}])  # lines of samples.jsonl
    run.save(1, tensors, state)                # checkpoint/step-00001, after all that belongs to step 1

A kill at any moment costs what came after the last `save`: on resume the lines of later steps are dropped,
so a run that was killed and resumed leaves the same numbers as one that was not. Ctrl-C costs nothing: the step
ends, and a checkpoint is written.
"""
import argparse
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import sys
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from tqdm import tqdm

from data import UsageError
from support.distributed import copy_from_main, gather, is_main, on_main, world

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
FIRST_TO_GO = (  # of them, where the terminal is too narrow for all
    "clip_rate", "invalid_rate", "entropy", "completion_tokens", "value_loss", "zero_std_rate", "selected")


def train(algorithm, policy, task, args: argparse.Namespace) -> None:
    """A whole run in its folder, by `algorithm`: a module with a `Config` and a `train`."""
    with locked(Path(args.out)) if is_main() else nullcontext():
        run = Run(args.out, vars(args), args.resume, args.overwrite)
        print(f"{args.agent} by {args.algo}, seed {args.seed}, into {run.folder}", flush=True)
        config = algorithm.Config(**{name: getattr(args, name) for name in algorithm.Config.__dataclass_fields__})
        algorithm.train(policy, task, run, args.agent, config)
    print(f"adapter, metrics and samples are in {run.folder}")


def seed_everything(seed: int):
    """Seeds every generator that a library may draw from unasked; nothing else in the project does."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed {seed}: must be from 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA's too


def batch_of(step: int, count: int, settings) -> list[int]:
    """
    Which of `count` items a step sees, by the `seed` and `batch_size` of the settings: all come up once, in random
    order, before any comes up again.
    """
    places = range((step - 1) * settings.batch_size, step * settings.batch_size)
    orders = {n: random.Random(f"{settings.seed} {n}").sample(range(count), count)
              for n in {i // count for i in places}}
    return [orders[i // count][i % count] for i in places]


def random_state(**generators) -> dict:
    """All random states, fit for JSON: the libraries' own and each `random.Random` given."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    given = {name: generator.getstate() for name, generator in generators.items()}
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
        generator.setstate(as_tuple(state["given"][name]))


def as_hex(tensor):
    return bytes(tensor.tolist()).hex()


def from_hex(text):
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def as_tuple(value):
    """[3, [1, 2], None] -> (3, (1, 2), None): JSON gives lists where `setstate` wants tuples."""
    return tuple(map(as_tuple, value)) if isinstance(value, (list, tuple)) else value


def num_updates(optimizer) -> int:
    """Steps that an AdamW has taken."""
    return max((int(moments["step"]) for moments in optimizer.state.values()), default=0)


def optimizer_tensors(optimizer) -> dict[str, torch.Tensor]:
    """A copy of an optimizer's state: {"optimizer.0.step": ..., "optimizer.0.exp_avg": ...}"""
    return {f"optimizer.{i}.{key}": value.detach().to("cpu", copy=True)
            for i, moments in optimizer.state_dict()["state"].items() for key, value in moments.items()}


def restore_parameters(parameters, tensors: dict[str, torch.Tensor]):
    """Copies the tensors {"adapter.0": ..., "adapter.1": ...} into the parameters."""
    for i, parameter in enumerate(parameters):
        found = tensors.get(f"adapter.{i}")
        if found is None or found.shape != parameter.shape:
            raise UsageError(f"the checkpoint's adapter.{i} is not of shape {tuple(parameter.shape)}: "
                             "resume with the model and the rank of the run's config.json")
        parameter.data.copy_(found)


def restore_optimizer(optimizer, tensors: dict[str, torch.Tensor]):
    """The inverse of `optimizer_tensors`. The learning rate and the like stay those of `optimizer`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"optimizer\.(\d+)\.(\w+)", name)
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
    with writing(path.parent):
        add_lines(path, rows)


def add_lines(path, rows):
    """Adds lines to a .jsonl file, in one write: those of several processes stay whole. Ends a torn line first."""
    lines = "".join(json.dumps(tidy(row), ensure_ascii=False, default=str) + "\n" for row in rows)
    with open(path, "ab+") as file:
        file.seek(-min(1, file.tell()), os.SEEK_END)
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + lines.encode("utf-8", "replace"))


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


def read_config(folder: str | Path) -> dict:
    """The settings of a run."""
    try:
        config = json.loads(Path(folder, "config.json").read_text())
        if not {"agent", "algo"} <= set(config):
            raise ValueError("no agent, no algorithm")
        return config
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{folder} is not a run's folder: its config.json cannot be read ({error!r})") from None


def check_distill(folder: str | Path, distill: bool = True) -> None:
    """Refuses an Answer Agent that was trained with the other prompt. An adapter without its run passes."""
    for place in (Path(folder), Path(folder).parent):
        found = {}
        with suppress(UsageError):
            found = read_config(place)
        if found.get("distill", distill) != distill:
            raise UsageError(f"{folder} was trained {'without' if distill else 'with'} distillation, and is asked "
                             f"{'with' if distill else 'without'} it here")


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
    """The folder of one run: config.json, metrics.jsonl, samples.jsonl and checkpoint/. Only main writes into it."""

    def __init__(self, folder: str | Path, config: dict, resume: bool = False, overwrite: bool = False):
        self.folder, self.config = Path(folder), dict(config)
        self.whole = None  # the newest checkpoint known to be whole; it stays until there is a newer one
        self.is_interrupted, self.skips = False, []  # Ctrl-C was pressed; the tensors for which updates were skipped
        libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
        settings = {**self.config, "versions": {"python": platform.python_version(), **libraries}}
        settings = json.loads(json.dumps(settings | {"processes": world()}, default=str))
        if not is_main():  # which alone writes
            return
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
        if is_main():
            append(self.folder / "metrics.jsonl", [metrics])

    def report(self, results: list[dict]):
        """Logs held-out results and prints their lines."""
        for result in results:
            self.log(result)
            tqdm.write(self.line(result["step"], result))

    def samples(self, rows: list[dict]):
        """Appends rollouts as a person would read them. Each has its `step`, by which resuming drops it."""
        if is_main():
            append(self.folder / "samples.jsonl", rows)

    @contextmanager
    def ending_steps(self):
        """Ctrl-C lets the step end: `reason_to_stop` knows of it. A second one stops at once."""
        def wait(*_):
            self.is_interrupted = True
            signal.signal(signal.SIGINT, before)
            if is_main():
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print may be at work already

        before = signal.signal(signal.SIGINT, wait)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def reason_to_stop(self, metrics: dict) -> BaseException | None:
        """What to raise after this step and its checkpoint, if anything."""
        self.skips = [*self.skips, metrics["not_finite_in"]] if metrics.get("skipped") else []
        if any(gather([self.is_interrupted])):
            return KeyboardInterrupt()
        if len(self.skips) == PATIENCE:
            return UsageError(f"{PATIENCE} steps in a row skipped an update, as numbers were not finite, first in "
                              f"{self.skips[0]}: lower --lr or give --dtype float32, and continue with --resume")

    def is_complete(self, steps: int) -> bool:
        """Whether the run was evaluated after its last step."""
        rows = read_rows(self.folder / "metrics.jsonl")
        return any(row.get("eval") == "trained" and row["step"] == steps for row in rows)

    def line(self, step: int, metrics: dict) -> str:
        """One step on the terminal, as much as fits: `step  12/60  reward  0.71  zero-std 0.12  ...    1.4 s`"""
        steps = self.config.get("steps")
        parts = {"step": f"step {step:{max(3, len(str(steps)))}}/{steps}" if steps else f"step {step:5}"}
        parts |= {key: form.format(metrics[key]) for key, form in COLUMNS.items() if metrics.get(key) is not None}
        for key in FIRST_TO_GO:
            if len("  ".join(parts.values())) > shutil.get_terminal_size((200, 0)).columns:
                parts.pop(key, None)
        return "  ".join(parts.values())

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict):
        """
        Writes checkpoint/step-00012 and keeps one older. Call it after all that was logged of the step.
        Only the rename makes it a checkpoint: a kill before it leaves the older ones as they were.
        """
        if not is_main():
            return
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
    begun = on_main(run.load)
    if begun is None:
        copy_from_main(parameters)
        return None
    step, tensors, state = begun
    restore_parameters(parameters, tensors)
    restore_optimizer(optimizer, tensors)
    restore_random_state(state["random"], rng=rng)
    task.state = state.get("task", {})  # the first checkpoints had none
    return step
