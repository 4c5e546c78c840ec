"""The README keeps its word: files, flags and functions exist, its code runs, its tables are complete."""
import contextlib
import glob
import importlib
import io
import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import evaluate
import grpo
import policy
import train_answer
import train_manager
from data import TINY
from policy import Policy
from support import plots, run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCED.sub("", README)
CODE = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)] + [
    line for language, block in FENCED.findall(README) if language != "diff"
    for line in block.replace("\\\n", " ").splitlines()]
SCRIPTS = ("train_manager", "train_answer", "evaluate", "manager", "answer", "plots", "tests.benchmarks.step",
           "tests.benchmarks.profile_step")
OTHERS = {"git", "pip", "torchrun", "pytest"}  # their flags are not ours
QUICK = "--steps 1 --batch-size 4 --group-size 4 --max-new-tokens 40 --eval".split()
NUMBERED = re.compile(r"^(\d)\. .*?\(`([\w.]+)`\)", re.MULTILINE)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


# ------------------------------------------------------------------------------------------------ files, flags, lines

def test_every_line_is_short_and_every_link_leads_somewhere():
    long = [line for line in PROSE.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long, long[0]
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PROSE) if not link.startswith("http")]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_every_file_of_ours_exists():
    words = {word.strip("'\",:;()") for span in CODE for word in span.split()}
    pattern = r"[\w./-]+\.(py|diff)|(data|tests)/[\w./-]+|requirements[\w-]*\.txt"
    ours = {word for word in words if re.fullmatch(pattern, word)}
    missing = [word for word in ours if not (ROOT / word).exists() and not (ROOT / "data" / word).exists()]
    assert len(ours) > 20 and not missing


def flags_of(script):
    """Every flag in the help of one of our scripts."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        importlib.import_module(script).main(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", printed.getvalue()))


def test_every_flag_exists():
    """A flag behind the name of a script is a flag of that script; one that stands alone, of any."""
    flags = {script.rpartition(".")[2]: flags_of(script) for script in SCRIPTS}
    flags_anywhere = set().union(*flags.values())
    asked = 0
    for span in CODE:
        first, *rest = re.split(r"(?<![\w/])(?:[\w/]+/)?(\w+)\.py\b", span)
        parts = list(zip(rest[::2], rest[1::2], strict=True))
        if not OTHERS & set(first.split()):
            parts.append(("", first))
        for script, text in parts:
            known = flags.get(script, flags_anywhere)
            found = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
            assert set(found) <= known, f"{script or 'no script'} has no {set(found) - known}: {span}"
            asked += len(found)
    assert asked > 60


# ------------------------------------------------------------------------------------------------ code

@pytest.fixture
def a_place_with_runs(tmp_path, monkeypatch):
    """A folder where both agents have been trained, if for no step at all."""
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(ROOT / "data")
    agents = Policy.load(TINY)
    for name in ("manager", "answer"):
        agents.add_adapter(name, rank=1, alpha=2)
        agents.save_adapter(name, f"runs/{name}-grpo/adapter")


def test_its_code_runs(a_place_with_runs, capsys):
    ours, peft = [block for language, block in FENCED.findall(section("Use it in your own program"))
                  if language == "python"]
    names = {}
    exec(ours, names)
    told = " ".join(memory.text for memory in names["bank"])  # by agents that have learned for a step
    assert capsys.readouterr().out.strip() and ("Buddy" in told or "Scout" in told)
    assert {memory.speaker for memory in names["bank"]} == {"Alex"} and Path("alex.json").exists()
    pytest.importorskip("peft")
    exec(peft, names)
    assert "default" in names["model"].peft_config and len(peft.splitlines()) == 3


def test_its_runs_are_what_it_then_evaluates_and_draws(tmp_path, monkeypatch, capsys):
    """Every run of the chapters on results, seeds and all, of a single step; the picture; the table of all in runs/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_answer, "NUM_TURNS", 8)
    monkeypatch.setattr(train_answer, "NUM_DIALOGUES", 1)
    for name in ("SHORT", "LONG"):
        monkeypatch.setattr(evaluate, name, {**getattr(evaluate, name), "count": 1, "num_turns": 8})
    chapters = section("Run it") + section("Does it learn?")
    spans = re.findall(r"^(python train_.*)$|`((?:for|python) [^`]+)`", FENCED.sub(r"\2", chapters), re.MULTILINE)
    said = "python() { echo \"$@\"; }\n" + "\n".join(" ".join("".join(span).split()) for span in spans)
    commands = subprocess.run(["bash", "-c", said], capture_output=True, text=True, check=True).stdout.splitlines()
    scripts = {"train_manager.py": train_manager, "train_answer.py": train_answer, "plots.py": plots}
    done = set()
    for script, *argv in map(shlex.split, sorted(commands, key=lambda command: command.startswith("plots"))):
        if script in scripts and "endpoint" not in argv:
            done.add(script)
            if script == "plots.py":
                scripts[script].main([path for name in argv for path in sorted(glob.glob(name)) or [name]])
            else:
                scripts[script].main([*argv, *QUICK, "0", "--overwrite"])
    assert done == set(scripts) and Path("learning.png").stat().st_size > 10_000
    capsys.readouterr()
    evaluate.main(["--limit", "2"])
    shown, left_out = capsys.readouterr()  # the latter: an agent without distillation is not asked with it
    runs = list(Path("runs").iterdir())
    assert all(path.name in shown or f"{path} was trained without" in left_out for path in runs) and len(runs) >= 10


# ------------------------------------------------------------------------------------------------ a step, its numbers

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny runs of every algorithm and agent: {(agent, algorithm): rows}; what was called in the first, in order."""
    patch, folder, calls = pytest.MonkeyPatch(), tmp_path_factory.mktemp("runs"), []

    def record(owner, name, label):
        function = getattr(owner, name)

        def recorded(*args, **options):
            result = function(*args, **options)
            calls.append(label)
            return result

        patch.setattr(owner, name, recorded)

    for name in [name for _, name in NUMBERED.findall(section("One step of training, in seven"))]:
        record(*owner_of(name), name)
    patch.setattr(train_answer, "NUM_TURNS", 12)
    patch.setattr(train_answer, "NUM_DIALOGUES", 2)
    found, first = {}, []
    for script, algo, held_out in ((train_manager, "grpo", 1), (train_manager, "ppo", 0), (train_manager, "sft", 0),
                                   (train_answer, "grpo", 1), (train_answer, "ppo", 0)):
        out = folder / f"{script.__name__}-{algo}"
        script.main([*QUICK, str(held_out), "--algo", algo, "--out", str(out)])
        found[script.__name__.removeprefix("train_"), algo] = run.read_rows(out / "metrics.jsonl")
        first = first or list(calls)
    patch.undo()
    return found, first


def owner_of(name):
    """Where a function of the README's seven steps lives: a method by its class, else in grpo.py."""
    *of, function = name.split(".")
    modules = [module for module in (train_manager, policy, run) if of and hasattr(module, of[0])]
    return getattr(modules[0], of[0]) if of else grpo, function


def test_seven_steps_are_seven_functions_called_in_that_order(runs):
    steps = NUMBERED.findall(section("One step of training, in seven"))
    assert [number for number, _ in steps] == list("1234567") and len(dict(map(reversed, steps))) == 7
    assert all(callable(getattr(*owner_of(name))) for _, name in steps)
    _, calls = runs
    begun = calls[calls.index("ManagerTask.batch"):]
    assert list(dict.fromkeys(begun)) == [name for _, name in steps]  # in the order in which they first came back


class Broken(grpo.Toy):
    """A task whose reward is not a number."""

    def rewards(self, episodes, groups):
        return torch.full((len(groups), len(groups[0])), math.nan), {}, []


@pytest.fixture(scope="module")
def keys_of_a_broken_step(tmp_path_factory):
    toy = Policy.load(TINY)
    toy.add_adapter("toy", rank=1)
    out = run.Run(tmp_path_factory.mktemp("broken"), {})
    grpo.train(toy, Broken(toy), out, "toy", grpo.Config(steps=1, max_new_tokens=2, group_size=2))
    return set(run.read_rows(out.folder / "metrics.jsonl")[0])


def test_the_glossary_has_every_key_that_is_logged(runs, keys_of_a_broken_step):
    table = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section("What the numbers mean"), re.MULTILINE)
    keys = [key for key, _ in table]
    found, _ = runs
    steps = {who: {key for row in rows if "eval" not in row for key in row} for who, rows in found.items()}
    held_out = {key for rows in found.values() for row in rows if "eval" in row for key in row}
    assert len(keys) == len(set(keys)) and set(keys) == set().union(held_out, keys_of_a_broken_step, *steps.values())
    for key, words in table:
        named = set(words.split(", "))
        assert named <= {"all", "grpo", "ppo", "sft", "Manager", "Answer Agent", "held-out"}, words
        assert ("held-out" in named) == (key in held_out), key
        if key in ("not_finite_in", "not_finite"):  # where something goes wrong
            continue
        logged = {who for who in steps if key in steps[who]}
        meant = {(agent, algo) for agent, algo in steps if "all" in named or algo in named
                 or algo != "sft" and {"manager": "Manager", "answer": "Answer Agent"}[agent] in named}
        assert logged == meant, f"{key}: {words}"
