"""
A run's folder: settings, metrics, samples, and the checkpoints to resume from. It knows no algorithm.

    run = Run("runs/answer-grpo", config, resume=config["resume"])
    step, state = run.load() or (0, {})
    run.log({"step": 1, "reward": 0.7})        # a line of metrics.jsonl
    run.samples([{"step": 1, "prompt": ...}])  # lines of samples.jsonl
    run.save(1, state)                         # checkpoint/step-00001.pt, after everything that belongs to step 1

After a kill, `--resume` drops the lines that are newer than the last checkpoint and continues from it. Generators are
seeded from (seed, step, rank), so a resumed run writes the same numbers as an uninterrupted one.
"""
import functools
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm import tqdm

from data import UsageError
from support.distributed import is_rank0, world_size

LOGS = ("metrics.jsonl", "samples.jsonl", "held_out.jsonl")
FIXED_SETTINGS = ("agent", "algo", "model", "init_adapter", "rank", "alpha")  # a resumed run cannot change them
COLUMNS = {  # parts of a line on the terminal
    "eval": "{:9}", "loss": "loss {:.3f}", "reward": "reward {:5.2f}", "manager_reward": "manager {:.2f}",
    "answer_reward": "answer {:.2f}", "outcome": "outcome {:5.2f}", "zero_std_rate": "zero-std {:.2f}",
    "kl": "kl {:.3f}", "clip_rate": "clip {:.2f}", "entropy": "entropy {:.2f}", "value_loss": "value {:.3f}",
    "explained_variance": "explained {:5.2f}", "completion_tokens": "tokens {:3.0f}",
    "invalid_rate": "invalid {:.2f}", "n": "n {:4.0f}", "em": "em {:.2f}", "f1": "f1 {:.2f}",
    "selected": "selected {:4.1f}", "evidence": "evidence {:.2f}",
    "agreement": "agreement {:.2f}", "bank_size": "bank {:5.1f}", "seconds": "{:5.1f} s",
}


@contextmanager
def disk_errors(folder):
    """Turn a full disk or missing permissions into a one-line error."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be written ({error.strerror or error}): fix this or choose "
                         "another place; files that are already written stay") from None


def write_file(path, content: bytes) -> None:
    """Replace a file atomically: the content is on the disk before the file gets its name."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def append_rows(path, rows):
    """Append lines to a .jsonl file in one write: lines of several processes stay whole. Ends a torn line first."""
    lines = "".join(json.dumps(to_json_safe(row), ensure_ascii=False, default=str) + "\n" for row in rows)
    with disk_errors(path.parent), open(path, "ab+") as file:
        file.seek(-min(1, file.tell()), os.SEEK_END)
        is_torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * is_torn + lines.encode("utf-8", "replace"))


def read_rows(path: str | Path) -> list[dict]:
    """Read the objects of a .jsonl file, without a line that a kill has torn; [] if there is no file."""
    rows = []
    for line in Path(path).read_bytes().splitlines(keepends=True) if os.path.exists(path) else []:
        with suppress(ValueError):
            rows.append(json.loads(line) if line.endswith(b"\n") else None)
    return [row for row in rows if isinstance(row, dict)]


def read_checkpoint(path) -> tuple[int, dict]:
    """(step, state) of a file that `Run.save` wrote. Raises an exception of any kind if a byte of it has changed."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # torch.load does not verify the checksums that torch.save wrote
            raise ValueError(f"the checksum of {damaged} is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.pop("step"), state


def to_json_safe(value):
    """{"kl": nan, "reward": tensor(0.12345678)} -> {"kl": None, "reward": 0.123457, "not_finite": ["kl"]}"""
    if isinstance(value, dict):
        row = {key: to_json_safe(item) for key, item in value.items()}
        lost = [key for key, item in row.items() if item is None and value[key] is not None]
        return {**row, "not_finite": lost} if lost else row
    if isinstance(value, (list, tuple)):
        return [to_json_safe(item) for item in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return to_json_safe(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


@functools.cache
def warn_once(text):
    """Print a note once, above the progress bar."""
    tqdm.write(f"note: {text}", file=sys.stderr)


@contextmanager
def folder_lock(folder: Path, file: str = ""):
    """Keep other processes from training in the folder, or evaluating into its `file`. Ends with this process."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f"{file}.lock".lstrip("."))  # filelock is installed with torch
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"{folder / file} is in use by another process: stop it, or choose another --out") from None
    except (OSError, NotImplementedError) as error:  # some file systems have no locks
        warn_once(f"{folder / file} cannot be locked ({error}): do not start a second run there")
    try:
        yield
    finally:
        lock.release()


def check_out(args) -> None:
    """Refuse an --out that is in use or would be overwritten, before models are loaded and banks are built."""
    if args.resume and args.overwrite:
        raise UsageError("--resume continues the run in --out and --overwrite replaces it: give one of them")
    if Path(args.out, "lock").exists():
        with folder_lock(Path(args.out)):
            pass
    if not args.resume and not args.overwrite:
        refuse_existing_run(Path(args.out))


def refuse_existing_run(folder: Path) -> None:
    if holds_run(folder):
        raise UsageError(f"{folder} already holds a run: choose another --out, "
                         "continue it with --resume, or replace it with --overwrite")


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoint", "adapter"))


def read_config(folder: str | Path) -> dict:
    """Read the settings of a run. UsageError if there is no run."""
    try:
        config = json.loads(Path(folder, "config.json").read_text())
        if not {"agent", "algo"} <= set(config):
            raise ValueError("no agent, no algorithm")
        return config
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{folder} is not a run's folder: its config.json cannot be read ({error!r})") from None


def trained_settings(folder: str | Path) -> dict:
    """The settings of the run that an adapter belongs to; {} for an adapter without its run."""
    folder = Path(os.path.abspath(folder))
    for place in (folder, *folder.parents[:2 if folder.parent.name == "adapter" else 1]):
        with suppress(UsageError):  # adapter/answer is from a joint run
            return read_config(place)
    return {}


def check_adapter(folder: str | Path, agent: str, distill: bool | None = None) -> None:
    """Refuse an adapter of the other agent, or an Answer Agent that was trained with the other prompt (`distill`)."""
    config = trained_settings(folder)
    if config.get("agent", agent) not in (agent, "joint"):
        raise UsageError(f"{folder} was trained as {config['agent']} agent, but is used as {agent} agent here")
    if distill not in (None, config.get("distill", distill)):
        raise UsageError(f"{folder} was trained {'without' if distill else 'with'} distillation, but is used "
                         f"{'with' if distill else 'without'} it here")


def check_resumed_config(path, settings):
    """Warn about settings that differ from those the run started with; refuse changes of FIXED_SETTINGS."""
    try:
        old = json.loads(path.read_bytes())
        changes = {key: f"{key} {old[key]} -> {value}" for key, value in settings.items()
                   if key not in ("resume", "overwrite") and key in old and old[key] != value}
    except (OSError, ValueError, TypeError):
        return  # a first start, or an unreadable file
    for key in changes:
        if key.split(".")[-1] in FIXED_SETTINGS and last_name(old[key]) != last_name(settings[key]):
            raise UsageError(f"{path.parent} was started with {key} {old[key]}, not {settings[key]}: resume it with "
                             "that value, or choose another --out")
    if changes:
        warn_once(f"{path.parent} is resumed with other settings: {', '.join(changes.values())}")


def last_name(path) -> str:
    """/models/a -> a, runs/b and runs/b/adapter -> b: the name suffices, as the folder may have moved"""
    return Path(re.split("/adapter(?:/|$)", str(path))[0]).name


class Run:
    """The folder of one run: config.json, metrics.jsonl, samples.jsonl and checkpoint/. Only rank 0 writes."""

    def __init__(self, folder: str | Path, config: dict, resume: bool = False, overwrite: bool = False):
        self.folder, self.config = Path(folder), dict(config)
        self.intact = None  # the newest checkpoint known to be intact; kept until there is a newer one
        self.is_interrupted = False  # Ctrl-C was pressed
        versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name)
                                                            for name in ("torch", "transformers", "numpy")}}
        settings = json.dumps({**self.config, "versions": versions, "processes": world_size()}, indent=2, default=str)
        if not is_rank0():
            return
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                self.clear()
            if not resume:
                refuse_existing_run(self.folder)
            elif holds_run(self.folder):
                check_resumed_config(self.folder / "config.json", json.loads(settings))
                self.rewind()
            else:
                warn_once(f"{self.folder} holds no run to resume: starting one")
            write_file(self.folder / "config.json", settings.encode() + b"\n")

    def clear(self):
        """Remove the files of an earlier run, and no others."""
        for name in ("checkpoint", "adapter"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("config.json", *LOGS, "curve.png", "story.html"):
            (self.folder / name).unlink(missing_ok=True)

    def rewind(self):
        """Drop the log lines that are newer than the last checkpoint (all lines if there is none)."""
        step, _ = self.load() or (-1, {})
        if step > self.config.get("steps", step):
            raise UsageError(f"{self.folder} has {step} steps already: resume it with --steps {step} or more")
        for name in LOGS:
            rows = [row for row in read_rows(self.folder / name) if row.get("step", 0) <= step]
            if (self.folder / name).exists():
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_file(self.folder / name, lines.encode())

    def log(self, metrics: dict):
        """Append a line to metrics.jsonl: six digits; nan and inf become null, `not_finite` lists their keys."""
        if is_rank0():
            append_rows(self.folder / "metrics.jsonl", [metrics])

    def report(self, results: list[dict]):
        """Log held-out results and print them; the records in "dialogues" go to held_out.jsonl."""
        for row in results:
            dialogues = row.pop("dialogues", [])
            if is_rank0():
                append_rows(self.folder / "held_out.jsonl", [
                    {key: row[key] for key in ("step", "eval", "agent") if key in row} | one for one in dialogues])
            self.log(row)
            tqdm.write(self.line(row["step"], row))

    def samples(self, rows: list[dict]):
        """Append readable rollouts to samples.jsonl, each with its `step`."""
        if is_rank0():
            append_rows(self.folder / "samples.jsonl", rows)

    @contextmanager
    def finish_step_on_interrupt(self):
        """Let Ctrl-C set `is_interrupted`, so that the step can end. A second Ctrl-C stops at once."""
        def interrupt(*_):
            self.is_interrupted = True
            signal.signal(signal.SIGINT, before)
            if is_rank0():  # not print, which may have been interrupted itself
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def is_complete(self, steps: int) -> bool:
        """Whether the run was evaluated after its last step."""
        rows = read_rows(self.folder / "metrics.jsonl")
        return any(row.get("eval") == "trained" and row["step"] == steps for row in rows)

    def line(self, step: int, metrics: dict) -> str:
        """One step on the terminal: `step  12/60  reward  0.71  zero-std 0.12  ...    1.4 s`"""
        steps = self.config.get("steps")
        parts = [f"step {step:{max(3, len(str(steps)))}}/{steps}" if steps else f"step {step:5}"]
        parts += [form.format(metrics[key]) for key, form in COLUMNS.items() if metrics.get(key) is not None]
        return "  ".join(parts)

    def save(self, step: int, state: dict):
        """
        Write checkpoint/step-00012.pt and keep the previous one. Call it after everything of the step was logged. The
        file gets its name only when it is complete, so a kill leaves the older checkpoints as they were.
        """
        if not is_rank0():
            return
        path = self.folder / "checkpoint" / f"step-{step:05}.pt"
        content = io.BytesIO()
        torch.save({"step": step, **state}, content)
        with disk_errors(self.folder):
            path.parent.mkdir(exist_ok=True)
            write_file(path, content.getvalue())
            if path != self.intact:  # saving a step again must keep the older checkpoint
                for other in {*self.checkpoints()} - {path, self.intact}:
                    other.unlink(missing_ok=True)
        self.intact = path

    def load(self) -> tuple[int, dict] | None:
        """(step, state) of the newest intact checkpoint; None if there is no checkpoint."""
        damaged = []
        for path in reversed(self.checkpoints()):
            try:
                step, state = read_checkpoint(path)
            except Exception as error:  # many kinds, depending on which byte is wrong
                damaged.append(f"{path} is damaged ({' '.join(str(error).split())[:200]})")
                continue
            for text in damaged:
                warn_once(f"{text}: going back to {path.name}")
            self.intact = path
            return step, state
        if damaged:
            raise UsageError(f"{damaged[0]} and no other is intact: start again with another --out")
        return None

    def checkpoints(self) -> list[Path]:
        """All checkpoints, the oldest first."""
        paths = [path for path in self.folder.glob("checkpoint/step-*.pt") if re.fullmatch(r"step-\d+", path.stem)]
        return sorted(paths, key=lambda path: int(path.stem[5:]))
