"""
The experiments of docs/experiments.md: each diff is small, applies, edits the function that the page names, and has the
described effect. `python tests/test_experiments.py FOLDER` runs the checks on the edited and on the original files.
"""
import ast
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import traceback
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DIFFS = sorted((ROOT / "tests/experiments").glob("*.diff"))
PAGE = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
SMALL = "--steps 1 --batch-size 2 --group-size 2 --max-new-tokens 16 --eval 0".split()
ALL_TOGETHER = """
import train_answer, train_manager
train_answer.NUM_TURNS, train_answer.NUM_DIALOGUES = 12, 2
for script, algo in ((train_manager, "grpo"), (train_manager, "ppo"), (train_answer, "grpo")):
    script.main([*{small}, "--algo", algo])
"""


def file_of(diff):
    return re.match(r"--- a/(.*)\n\+\+\+ b/\1\n", diff.read_text(encoding="utf-8"))[1]


# ------------------------------------------------------------------------------------------------ checks of the effects

def check_confirm(manager):
    """A repeated fact updates the date of its memory, and nothing else."""
    from conftest import Fake

    from data import Turn
    from memory import Memory, MemoryBank, make_embedder
    bank = MemoryBank(make_embedder("hash"))
    bank.add("Jon drives a Kia.", "Jon", "1 May 2023")
    dog = bank.add("Jon has a dog named Buddy.", "Jon", "8 May 2023")
    case = manager.Case("Jon", "3 June 2023", ("Jon still has Buddy.",), tuple(bank))
    edits = manager.parse('[{"event": "CONFIRM", "id": 2}]', case)
    assert edits == [manager.Edit("CONFIRM", dog)] and "CONFIRM" in manager.SYSTEM
    assert all(manager.parse(manager.format_edits(edits, case, by_text), case) == edits for by_text in (False, True))
    trial, keeper = bank.fork(), manager.Manager(Fake(lambda messages: '[{"event": "CONFIRM", "id": 1}]'))
    with redirect_stdout(io.StringIO()) as printed:
        manager.read_turn(keeper, trial, Turn("1", 1, "Jon", "Jon has a dog.", "3 June 2023"))
    assert "= CONFIRM" in printed.getvalue()
    assert manager.apply_edits(bank, edits, "Jon", "3 June 2023") == [dog]
    assert list(bank) == [Memory(0, "Jon drives a Kia.", "Jon", "1 May 2023"),
                          Memory(1, "Jon has a dog named Buddy.", "Jon", "3 June 2023")]


def check_small_bank(train_manager):
    """A correct answer is worth 2 % less for each additional memory; a wrong answer is worth 0."""
    from conftest import Fake

    import answer
    import manager
    from data import Question, Turn
    from memory import MemoryBank, make_embedder
    from policy import Completion
    policy = Fake(lambda messages: f"answer: {'Buddy' if 'Buddy' in messages[-1]['content'] else 'none'}")
    task = object.__new__(train_manager.ManagerTask)
    task.policy, task.played = policy, None
    task.score = lambda triples: [answer.exact_match(given, gold) for _, given, gold in triples]
    task.args = Namespace(linked="all", reward="em", memories=8, named_only=False, floor=None, max_prompt_tokens=None,
                          max_answer_tokens=8, answer_adapter=None, compression_penalty=0)
    bank = MemoryBank(make_embedder("hash"))
    bank.add("Jon drives a Kia.", "Jon", "1 May 2023")
    turn = Turn("D1:2", 1, "Jon", "I have a dog named Buddy.", "8 May 2023")
    case = manager.Case("Jon", turn.time, (turn.text,), tuple(bank))
    episode = train_manager.Episode([1], case, bank, turn, (Question("q", "Which pet?", "Buddy", 4),), ("Jon", "Gina"))
    dog, tea = ({"event": "ADD", "text": text} for text in ("Jon has a dog named Buddy.", "Jon likes tea."))
    both = {"event": "UPDATE", "id": 1, "text": "Jon drives a Kia and has a dog named Buddy."}
    outputs = [json.dumps(edits) for edits in ([both], [dog], [dog, tea], [tea], [{"event": "NOOP"}])] + ["?"]
    rewards, _, samples = task.rewards([episode], [[Completion([1], [0.0], True, text) for text in outputs]])
    assert [round(reward, 4) for reward in rewards[0].tolist()] == [1, 0.98, 0.9604, 0, 0, 0]
    assert samples[0]["reward"] == 1


def check_leave_one_out(grpo):
    """The baseline of a completion is the mean reward of the others, and no standard deviation divides the rest."""
    import torch
    found = grpo.group_advantages(torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]]))
    by_hand = torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3], [-1 / 3, -1 / 3, -1 / 3, 1], [0, 0, 0, 0]])
    assert torch.allclose(found, by_hand)


def check_sequence_ratio(grpo):
    """One ratio per completion: tokens twice and half as likely as before give 1. Padding has no effect."""
    import torch
    up = math.log(2)
    logp = torch.tensor([[up, -up, 9.0], [up, up, up]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    losses, _, is_clipped = grpo.grpo_loss(logp, torch.zeros(2, 3), None, torch.ones(2), mask, 0.2, 0.0)
    assert torch.allclose(losses, torch.tensor([-1.0, -1.2]))  # with a ratio per token: -(1.2 + 0.5) / 2 and -1.2
    assert is_clipped.tolist() == [[False] * 3, [True] * 3]
    losses.sum().backward()
    assert torch.allclose(logp.grad, torch.tensor([[-0.5, -0.5, 0], [0, 0, 0]]))


def check_words_only(memory):
    """Different words have no common features, even if they share letters."""
    ox, oxen, both = memory.hashed_vectors(["ox", "oxen", "ox oxen"])
    assert (ox > 0).sum() == 1 and ox @ oxen == 0
    assert round(float(ox @ both), 4) == round(0.5 ** 0.5, 4)
    bank = memory.MemoryBank(memory.make_embedder("hash"))
    for text in ("Jon has two oxen.", "Jon has an ox."):
        bank.add(text, "Jon", "")
    assert [score > 0 for _, score in bank.search_scored("ox", k=2)] == [True, False]


def check_recency(answer):
    """Of equally similar memories the newest comes first: a score decays by 0.1 % for each memory added later."""
    from memory import MemoryBank, make_embedder
    bank = MemoryBank(make_embedder("hash"))
    for speaker, time in (("Jon", "1 May 2023"), ("Gina", "2 May 2023"), ("Jon", "3 May 2023")):
        bank.add("I drive a Kia.", speaker, time)
    similarity = bank.search_scored("Who drives?", 1)[0][1]
    found = answer.retrieve(bank, "Who drives?", ("Jon", "Gina"), 2)
    assert [memory.id for memory, _ in found] == [2, 1, 0]
    assert [round(score / similarity, 6) for _, score in found] == [1, 0.999, 0.998001]
    assert [memory.id for memory, _ in answer.retrieve(bank, "Who drives?", ("Jon",), 1)] == [2]
    assert answer.retrieve(MemoryBank(bank.embedder), "Who drives?", ("Jon",), 1) == []


def check_curriculum(train_answer):
    """Four memories at first; two more after each successful step, up to --memories. A resumed run continues there."""
    from answer import Settings
    from data import Question
    from policy import Completion
    task = object.__new__(train_answer.AnswerTask)
    task.args, task.settings = Namespace(model="real", memories=9, grow=0), Settings()
    item = train_answer.BankQuestion(Question("q", "?", "x", 4), None, ("Jon", "Gina"), {})
    episode = train_answer.Episode([1], [], 0, item)
    shown = [task.num_memories(1)]
    for correct in ("ac", "abd", "", "abcd", "abcd"):
        task.score = lambda triples, correct=correct: [float(given in correct) for _, given, _ in triples]
        task.rewards([episode], [[Completion([1], [0.0], True, f"answer: {letter}") for letter in "abcd"]])
        shown.append(task.num_memories(1))
    assert shown == [4, 4, 6, 6, 8, 9]
    resumed = object.__new__(train_answer.AnswerTask)
    resumed.args, resumed.state = task.args, json.loads(json.dumps(task.state))
    assert resumed.num_memories(1) == 9 and train_answer.AnswerTask.state == {}


def check_siblings_mean(ppo):
    """The baseline of the actor is the mean reward of the group, not the critic's value. The critic still trains."""
    import torch

    from policy import Completion

    def critic(prompts, completions):
        return torch.full((4, 2), 0.3)

    def map_groups(function, prompts, completions, max_tokens):
        return function(prompts, completions)

    policy = Namespace(device="cpu", map_groups=map_groups)
    groups = [[Completion([5] * n, [0.0] * n, True, "") for n in lengths] for lengths in ((2, 1), (1, 1))]
    found = ppo.make_rollouts(policy, critic, [[1], [2]], groups, torch.tensor([1.0, 0, 1, 1]), ppo.Config(beta=0))
    deviation = 0.14 ** 0.5 + 1e-4  # of .5 .5 -.5 0 0, whose mean is .1
    by_hand = torch.tensor([[0.4, 0.4], [-0.6, 0], [-0.1, 0], [-0.1, 0]]) / deviation
    assert torch.allclose(found.advantages, by_hand, atol=1e-5)
    assert torch.allclose(found.returns[found.mask], torch.tensor([1.0, 1, 0, 1, 1]))
    assert found.values_old[found.mask].unique().tolist() == [pytest.approx(0.3)]


CHECKS = {diff.stem: globals()[f"check_{diff.stem[2:].replace('-', '_')}"] for diff in DIFFS}


def run_checks(folder):
    """Write results.json: the errors of each check, on the edited file and on the original."""
    results = {}
    for diff in DIFFS:
        for root in (folder / diff.stem, ROOT):
            spec = importlib.util.spec_from_file_location(f"edited_{diff.stem[2:]}", root / file_of(diff))
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
                CHECKS[diff.stem](module)
                error = ""
            except Exception:
                error = traceback.format_exc()
            results.setdefault(diff.stem, []).append(error)
    (folder / "results.json").write_text(json.dumps(results))


# ------------------------------------------------------------------------------------------------ the tests

@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with a copy of our files for each diff, which is applied there, and a copy with all of them."""
    tool = ["git", "apply"] if shutil.which("git") else ["patch", "-p1", "-i"] if shutil.which("patch") else None
    if tool is None:
        pytest.skip("needs git or patch")
    folder = tmp_path_factory.mktemp("experiments")
    for name, diffs in {**{diff.stem: [diff] for diff in DIFFS}, "all": DIFFS}.items():
        (folder / name).mkdir()
        for file in ROOT.glob("*.py"):
            shutil.copy(file, folder / name)
        for diff in diffs:
            subprocess.run([*tool, str(diff)], cwd=folder / name, check=True, capture_output=True, text=True,
                           env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder)})
    return folder


@pytest.fixture(scope="module")
def results(copies):
    subprocess.run([sys.executable, __file__, str(copies)], check=True, cwd=copies, timeout=300,
                   env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return json.loads((copies / "results.json").read_text())


def test_there_are_eight_diffs():
    assert [diff.stem[:2] for diff in DIFFS] == [f"{n}-" for n in range(1, 9)]


@pytest.mark.parametrize("name", CHECKS)
def test_a_diff_has_its_effect(results, name):
    edited, original = results[name]
    assert not edited, edited
    assert original.endswith("AssertionError\n"), f"the original file must fail the check by an assertion: {original}"


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_a_diff_is_small(diff):
    lines = diff.read_text(encoding="utf-8").splitlines()
    changed = [line for line in lines if re.match(r"[+-](?![+-]{2} )", line)]
    assert len([line for line in lines if line.startswith("+++ ")]) == 1 and 1 <= len(changed) <= 15
    assert all(len(line) <= 121 and line == line.rstrip() for line in changed)


def source_of(path, name):
    """The source of a function, or of a method `Class.name`."""
    text = path.read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return ast.get_source_segment(text, node)


def test_the_page_names_the_function_that_is_edited(copies):
    rows = re.findall(r"^\| \[(\d)\]\((\S+)\) \| `(\S+)` in `(\S+)` \|", PAGE, re.MULTILINE)
    assert [(int(row[0]), (ROOT / "docs" / row[1]).resolve()) for row in rows] == list(enumerate(DIFFS, 1))
    for diff, (_, _, function, file) in zip(DIFFS, rows, strict=True):
        assert file == file_of(diff)
        assert source_of(ROOT / file, function) != source_of(copies / diff.stem / file, function)
    shown, = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    assert shown in [diff.read_text(encoding="utf-8") for diff in DIFFS]


def test_all_diffs_together_train(copies):
    folder, code = copies / "all", ALL_TOGETHER.format(small=SMALL)
    for name in ("data", "support"):
        (folder / name).symlink_to(ROOT / name)
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."})
    assert ran.returncode == 0, ran.stderr
    for run in ("manager-grpo", "manager-ppo", "answer-grpo"):
        row, = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        assert row["step"] == 1 and (set(row.get("ops", {"CONFIRM": 0})) >= {"CONFIRM"})


if __name__ == "__main__":
    run_checks(Path(sys.argv[1]))
