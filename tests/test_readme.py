"""README.md and docs/ are correct: files, flags, functions and messages exist, code runs, tables are complete."""
import ast
import contextlib
import glob
import importlib
import io
import itertools
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import answer
import evaluate
import grpo
import policy
import train_answer
import train_manager
from data import TINY, UsageError, load
from policy import Policy
from support import loop, run

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
SCRIPTS = {"train_manager": "train_manager", "train_answer": "train_answer", "evaluate": "evaluate",
           "manager": "manager", "answer": "answer", "plots": "support.plots", "story": "support.story",
           "step": "tests.benchmarks.step",
           "profile_step": "tests.benchmarks.profile_step"}
ALGORITHMS = ("grpo", "ppo", "sft")
OTHERS = {"git", "pip", "torchrun", "pytest", "sudo", "xcode-select", "hf"}  # their flags are not ours
QUICK = "--steps 1 --batch-size 4 --max-new-tokens 40"
NUMBERED = re.compile(r"^(\d)\. .*?\(`([\w.]+)`\)", re.MULTILINE)
# Words that a reader who learns English does not know, and words that mean something else in this field.
ARCHAIC = re.compile(r"(?i)\b(anew|beside|mend|mends|dear|foretell\w*|foresee\w*|hearsay|likewise|seldom|whom"
                     r"|to the letter|by far|goes on|what is asked)\b")


def prose(page):
    """The text of a page without its fenced blocks and comments."""
    return COMMENT.sub("", FENCED.sub("", PAGES[page]))


def blocks(page, *languages):
    return [block for language, block in FENCED.findall(COMMENT.sub("", PAGES[page])) if language in languages]


def code(page):
    """Every code span, and every line of a fenced block that is no diff."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    lines = [line for language, block in FENCED.findall(PAGES[page]) if language != "diff"
             for line in block.replace("\\\n", " ").splitlines()]
    return spans + lines


def section(page, title):
    return re.split(rf"^##+ {re.escape(title)}\n", PAGES[page], flags=re.MULTILINE)[1].split("\n## ")[0]


pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ text and links

def test_the_readme_has_at_most_200_lines():
    assert len(PAGES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short_and_words_plain(page):
    long = [line for line in prose(page).splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long, long[0]
    assert not ARCHAIC.search(prose(page)), ARCHAIC.search(prose(page))


def anchors(text):
    """GitHub's anchors of a page's headings: "## Failed attempts" -> "failed-attempts"."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere_and_every_page_is_linked():
    linked = set()
    for page in PAGES:
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            target = (folder / path).resolve() if path else folder / page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {link}"
            if page == "README.md":
                linked.add(target.name)
    assert set(PAGES) <= linked | {"README.md"}


# ------------------------------------------------------------------------------------------------ files and flags

def test_every_file_of_ours_exists():
    words = {word.strip("'\",:;()") for page in PAGES for span in code(page) for word in span.split()}
    pattern = r"[\w./-]+\.(py|diff)|(data|tests|support|docs)/[\w./-]*|requirements[\w-]*\.txt|support\.[\w.]+"
    ours = {word for word in words if re.fullmatch(pattern, word)}
    missing = [word for word in ours if not (ROOT / word).exists() and not (ROOT / "data" / word).exists()
               and not (ROOT / f"{word.replace('.', '/')}.py").exists()]
    assert len(ours) > 20 and not missing, missing


def help_of(script, *flags):
    """Every flag in the help of one of our scripts; empty if it does not have that algorithm."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit, UsageError):
        importlib.import_module(SCRIPTS[script]).main([*flags, "--help"])
    return set(re.findall(r"--[a-z][\w-]*", printed.getvalue()))


def flags_of():
    """{script: flags, (script, algorithm): flags, "": all}. Training has the flags of one algorithm at a time."""
    flags = {}
    for script in SCRIPTS:
        if script.startswith("train_"):
            for algo in ALGORITHMS:
                flags[script, algo] = help_of(script, "--algo", algo)
            flags[script] = set().union(*(flags[script, algo] for algo in ALGORITHMS))
        else:
            flags[script] = help_of(script)
    return flags | {"": set().union(*flags.values())}


def test_every_flag_exists():
    """A flag after the name of a script is a flag of that script and its --algo; one that stands alone, of any."""
    flags, num_found = flags_of(), 0
    for page, span in ((name, span) for name in PAGES for span in code(name)):
        first, *rest = re.split(r"(?<![\w/])(?:[\w/]+/)?(\w+)\.py\b|-m support\.(\w+)", span)
        parts = [(name or module, text) for name, module, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True)]
        if not OTHERS & set(first.split()):
            parts.append(("", first))
        for script, text in parts:
            algo = re.search(r"--algo (\w+)", text)
            known = flags.get((script, algo[1] if algo else ""), flags.get(script, flags[""]))
            found = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
            assert set(found) <= known, f"{page}: {script or 'no script'} has no {set(found) - known}: {span}"
            num_found += len(found)
    assert num_found > 60


# ------------------------------------------------------------------------------------------------ messages

def messages():
    """Every string in our code, with "\\0" where a value is filled in. Adjacent literals are one string."""
    found = []
    for path in itertools.chain(ROOT.glob("*.py"), ROOT.glob("support/*.py"), ROOT.glob("data/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_that_troubleshooting_quotes_is_in_the_code():
    titles = ("Models and downloads", "Data", "Runs", "Memory and numerics")
    spans = [span for title in titles for span in re.findall(r"`([^`]+)`", "".join(
        re.findall(r"^\| (`.*?) \|", section("troubleshooting.md", title), re.MULTILINE)))]
    patterns = {span: ".*".join(re.escape(part.strip()) for part in span.replace("(...)", "...").split("..."))
                for span in spans if span != "CUDA out of memory"}  # PyTorch's
    ours = messages()
    lost = [span for span, pattern in patterns.items() if not any(re.search(pattern, text, re.S) for text in ours)]
    assert len(patterns) > 20 and not lost, lost


# ------------------------------------------------------------------------------------------------ code and commands

@pytest.fixture
def folder_with_runs(tmp_path, monkeypatch):
    """A folder with an untrained run of either agent."""
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(ROOT / "data")
    agents = Policy.load(TINY)
    for name in ("manager", "answer"):
        agents.add_adapter(name, rank=1, alpha=2)
        agents.save_adapter(name, f"runs/{name}-grpo/adapter")


def test_the_code_of_the_api_page_runs(folder_with_runs, capsys):
    ours, peft = blocks("api.md", "python")
    names = {}
    exec(ours, names)
    stored = " ".join(memory.text for memory in names["bank"])
    assert capsys.readouterr().out.strip() and ("Buddy" in stored or "Scout" in stored)
    assert {memory.speaker for memory in names["bank"]} == {"Alex"} and Path("alex.json").exists()
    pytest.importorskip("peft")
    exec(peft, names)
    assert "default" in names["model"].peft_config and len(peft.splitlines()) == 3


def test_the_transcripts_of_the_api_page_can_be_loaded(tmp_path):
    plain, = (block for block in blocks("api.md", "") if block.startswith("#"))
    for name, text in (("talk.txt", plain), ("talk.json", *blocks("api.md", "json"))):
        (tmp_path / name).write_text(text)
        dialogue, = load(str(tmp_path / name), "train")
        assert dialogue.speakers == ("Jon", "Gina") and dialogue.turns[0].time == "8 May 2023"
        assert dialogue.turns[1].text.endswith("a Kia car.")
    assert [turn.session for turn in load(str(tmp_path / "talk.txt"), "train")[0].turns] == [1, 1, 2]
    assert dialogue.questions[0].answer == "Buddy" and dialogue.questions[0].evidence == (dialogue.turns[0].id,)


def commands(page):
    """The arguments of every `python ...` in a page's shell blocks, loops unrolled; not those with --model, --data."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()
             if re.match(r"python |for ", line)]
    said = "set -f; python() { echo \"$@\"; }\n" + "\n".join(lines)  # set -f: runs/m-* stays as it is
    output = subprocess.run(["bash", "-c", said], capture_output=True, text=True, check=True).stdout
    return [argv for argv in map(shlex.split, output.splitlines()) if not {"--model", "--data"} & set(argv)]


def quick(argv, num_held_out):
    """The flags of a training script with those of a single small step added."""
    group_size = "" if "sft" in argv else "--group-size 4"  # sft has no groups
    return [*argv, *f"{QUICK} {group_size} --eval {num_held_out}".split()]


def train_once(script, argv, done):
    """One small step. A run that differs from an earlier one by seed and folders alone is a copy of that one."""
    agent, algo = script.__name__.removeprefix("train_"), argv[argv.index("--algo") + 1] if "--algo" in argv else "grpo"
    out = argv[argv.index("--out") + 1] if "--out" in argv else f"runs/{agent}-{algo}"
    kind = f"{agent} " + re.sub(r" --(seed|out) \S+|runs/\S+", "", " ".join(["", *argv]))
    if kind in done and done[kind] != out:
        shutil.copytree(done[kind], out, dirs_exist_ok=True)
    elif kind not in done:
        script.main([*quick(argv, int(out == "runs/manager-grpo")), "--overwrite"])  # its page shows a conversation
        done[kind] = out


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    """Training of README.md and docs/results.md, for a step; then pictures, evaluation and chat of what was trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_answer, "NUM_TURNS", 8)
    monkeypatch.setattr(train_answer, "NUM_DIALOGUES", 1)
    for name in ("SHORT", "LONG"):
        monkeypatch.setattr(evaluate, name, {**getattr(evaluate, name), "count": 1, "num_turns": 8})
    called = commands("README.md") + commands("results.md")
    training = {"train_manager.py": train_manager, "train_answer.py": train_answer}
    done, names = {}, {argv[0] if argv[0] != "-m" else argv[1] for argv in called}
    for script, *argv in sorted((argv for argv in called if argv[0] in training), key=lambda argv: argv[0],
                                reverse=True):  # Managers first
        train_once(training[script], argv, done)
    for _, module, *names_of_files in (argv for argv in called if argv[0] == "-m"):
        paths = [path for name in names_of_files for path in sorted(glob.glob(name)) or [name]]
        importlib.import_module(module).main(paths)
    assert {*training, "support.plots", "support.story", "evaluate.py", "answer.py"} <= names
    assert Path("learning.png").stat().st_size > 10_000 and Path("runs/manager-grpo/story.html").exists()
    capsys.readouterr()
    for argv in (argv for argv in called if argv[0] == "evaluate.py"):
        if len(argv) == 1 or "runs/m-grpo-0" in argv:  # of three seeds the first
            evaluate.main([*argv[1:], "--limit", "2"])
    shown, left_out = capsys.readouterr()  # the latter: an agent without distillation is not asked with it
    runs = [path for path in Path("runs").iterdir() if path.is_dir()]
    assert all(path.name in shown or f"{path} was trained without" in left_out for path in runs) and len(runs) >= 16
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"I have a dog named Buddy.\nWhich dog?\n")))
    for argv in (argv for argv in called if argv[0] == "answer.py"):
        answer.main(argv[1:])
    assert "answer: " in capsys.readouterr().out and Path("me.json").exists()


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

    for _, name in NUMBERED.findall(section("README.md", "How one step works")):
        record(*owner_of(name), name)
    patch.setattr(train_answer, "NUM_TURNS", 12)
    patch.setattr(train_answer, "NUM_DIALOGUES", 2)
    found, first = {}, []
    for script, algo, held_out in ((train_manager, "grpo", 1), (train_manager, "ppo", 0), (train_manager, "sft", 0),
                                   (train_answer, "grpo", 1), (train_answer, "ppo", 0)):
        out = folder / f"{script.__name__}-{algo}"
        script.main(quick(["--algo", algo, "--out", str(out)], held_out))
        found[script.__name__.removeprefix("train_"), algo] = run.read_rows(out / "metrics.jsonl")
        first = first or list(calls)
    patch.undo()
    return found, first


def owner_of(name):
    """Where a function of the README's seven steps lives: a method by its class, else in grpo.py."""
    *of, function = name.split(".")
    modules = [module for module in (train_manager, policy, loop) if of and hasattr(module, of[0])]
    return getattr(modules[0], of[0]) if of else grpo, function


def test_seven_steps_are_seven_functions_called_in_that_order(runs):
    steps = NUMBERED.findall(section("README.md", "How one step works"))
    assert [number for number, _ in steps] == list("1234567") and len(dict(map(reversed, steps))) == 7
    assert all(callable(getattr(*owner_of(name))) for _, name in steps)
    _, calls = runs
    begun = calls[calls.index("ManagerTask.batch"):]
    assert list(dict.fromkeys(begun)) == [name for _, name in steps]  # in the order in which they first returned


class Broken:
    """A task whose reward is not a number."""
    state: dict = {}
    played = None

    def __init__(self, policy):
        self.prompt = policy.encode([{"role": "user", "content": "Hello."}])

    def batch(self, step):
        return [self] * 4

    def rewards(self, episodes, groups):
        return torch.full((len(groups), len(groups[0])), math.nan), {}, []

    def evaluate(self, when, step):
        return []


@pytest.fixture(scope="module")
def keys_of_a_broken_step(tmp_path_factory):
    toy = Policy.load(TINY)
    toy.add_adapter("toy", rank=1)
    out = run.Run(tmp_path_factory.mktemp("broken"), {})
    loop.fit(grpo.train, toy, Broken(toy), out, "toy", grpo.Config(steps=1, max_new_tokens=2, group_size=2))
    return set(run.read_rows(out.folder / "metrics.jsonl")[0])


def test_the_glossary_has_every_key_that_is_logged(runs, keys_of_a_broken_step):
    table = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section("metrics.md", "Numbers of a step"), re.MULTILINE)
    keys = [key for key, _ in table]
    found, _ = runs
    steps = {who: {key for row in rows if "eval" not in row for key in row} for who, rows in found.items()}
    held_out = {key for rows in found.values() for row in rows if "eval" in row for key in row}
    assert len(keys) == len(set(keys)) and set(keys) == set().union(held_out, keys_of_a_broken_step, *steps.values())
    for key, words in table:
        named = set(words.split(", "))
        assert named <= {"all", *ALGORITHMS, "Manager", "Answer Agent", "held-out"}, words
        assert ("held-out" in named) == (key in held_out), key
        if key in ("not_finite_in", "not_finite"):  # where something goes wrong
            continue
        logged = {who for who in steps if key in steps[who]}
        meant = {(agent, algo) for agent, algo in steps if "all" in named or algo in named
                 or algo != "sft" and {"manager": "Manager", "answer": "Answer Agent"}[agent] in named}
        assert logged == meant, f"{key}: {words}"
