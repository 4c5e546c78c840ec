"""Every file run on its own: its output says what it did; a chat continues its bank; help texts and wrong flags."""
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import answer
import evaluate
import grpo
import manager
import policy
import ppo
import train_answer
import train_manager
from data import UsageError
from memory import MemoryBank, make_embedder
from policy import Policy
from support.run import Run

ROOT = Path(__file__).parents[1]
TALK = """\
# 8 May 2023
Jon: I have a dog named Buddy.
Gina: I have a cat named Tom.
Jon: Good to hear from you, Gina, it has been such a long time since we sat down together like this!

Jon: I adopted another dog, Scout.
"""
SCRIPTS = {"train_manager": train_manager, "train_answer": train_answer, "evaluate": evaluate, "manager": manager,
           "answer": answer, "grpo": grpo, "ppo": ppo}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("talk.txt").write_text(TALK)


def shell(*command, stdin="", **options):
    return subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], input=stdin, text=True,
                          capture_output=True, timeout=300, **options)


def test_memory_shows_a_bank_a_search_and_a_fork():
    ran = shell("memory.py")
    assert (ran.returncode, ran.stderr) == (0, "")
    bank, found, fork = ran.stdout.split("\n\n")
    assert bank.count("Memory(id=") == 3
    scores = [float(score) for score in re.findall(r"^  (\d\.\d\d)  ", found, re.MULTILINE)]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and "Buddy" in found.splitlines()[1]
    on_the_fork, in_the_bank = fork.splitlines()
    assert "Scout" in on_the_fork and "Scout" not in in_the_bank
    assert all(len(line) <= 80 for line in ran.stdout.splitlines())


def test_policy_shows_that_lora_off_is_the_base(capsys):
    policy.main([])
    printed = capsys.readouterr().out
    on, off = (float(re.search(rf"LoRA {state}: log-probs change by up to (.*)", printed)[1])
               for state in ("on", "off"))
    assert on > 0.1 and off == 0
    assert len(re.findall(r"^ +-\d+\.\d\d  '", printed, re.MULTILINE)) == 4


@pytest.mark.parametrize("algorithm", [grpo, ppo])
def test_an_algorithm_learns_its_toy(algorithm, capsys):
    algorithm.main([])
    *lines, _, trained = capsys.readouterr().out.splitlines()
    rewards = [float(re.search(r"reward +(\S+)", line)[1]) for line in lines]
    assert len(rewards) == 12 and rewards[0] < 0.6 and sum(rewards[-3:]) / 3 > 0.9
    begins = [text[0].isupper() for text in re.findall(r"'([^']+)'(?:   |$)", trained)]
    assert trained.startswith("trained") and sum(begins) >= 3 == len(begins) - 1


def carried_out(printed):
    """The texts of a bank after the operations that were printed."""
    texts = []
    for event, text in re.findall(r"(?m)^    [-+~.] (ADD|UPDATE|DELETE|NOOP) *(.*)", printed):
        if event == "ADD":
            texts.append(text)
        elif event == "UPDATE":
            old, new = text.split(" -> ")
            texts[texts.index(old)] = new
        elif event == "DELETE":
            texts.remove(text)
    return texts


def saved(path):
    return MemoryBank.load(path, make_embedder("hash"))


def test_the_manager_reads_a_transcript(capsys):
    manager.main(["talk.txt", "--out", "bank.json"])
    printed = capsys.readouterr().out
    assert printed.startswith("Jon (8 May 2023): I have a dog named Buddy.\n    ")
    assert "\nJon (8 May 2023): I adopted another dog, Scout.\n    " in printed
    memories = list(saved("bank.json"))
    assert carried_out(printed) == [memory.text for memory in memories] and len(memories) >= 2
    with pytest.raises(UsageError, match="--out bank.json: already exists"):
        manager.main(["talk.txt", "--out", "bank.json"])


def test_a_synthetic_dialogue_without_a_file(capsys):
    manager.main([])
    printed = capsys.readouterr().out
    assert len(re.findall(r"(?m)^\w+ \(.*?\): ", printed)) == 20 and len(carried_out(printed)) > 4


@pytest.fixture
def agents(fake, monkeypatch):
    """A policy in place of every model: it adds what it is told and answers with what is selected, as its adapters."""
    def rule(messages):
        text = messages[-1]["content"]
        if text.endswith("operations:"):
            fact = text.splitlines()[-2].removeprefix("- ")
            return "?" if "mumble" in fact else json.dumps([{"event": "ADD", "text": f"Sam says: {fact}"}])
        return "relevant: 1\nanswer: \033[2Jyes" if "tea" in text else "nothing"

    policy = fake(rule)
    policy.loaded = []
    policy.load_adapter = lambda *adapter: policy.loaded.append(adapter)
    monkeypatch.setattr(Policy, "load", lambda name: policy)
    return policy


def chat(monkeypatch, lines, *flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    answer.main(["me.json", "--name", "Sam", *flags])


def test_a_chat_keeps_its_bank_between_sessions(agents, monkeypatch, capsys):
    chat(monkeypatch, "I drink tea. \nmumble\nWhat do I drink?\n\nnot read\n", "--manager", "M", "--answer", "A")
    first = capsys.readouterr().out
    assert "Sam>     + ADD     Sam says: I drink tea.\n" in first
    assert "Sam>     ! the output cannot be carried out: nothing changes\n" in first
    assert re.search(r"Sam>     \* 1 \(\d+ \w+ \d{4}\) Sam says: I drink tea\.\n    answer: \?\[2Jyes\nSam> $", first)
    assert agents.loaded == [("manager", "M"), ("answer", "A")]
    assert [role for role, *_ in agents.calls] == ["manager", "manager", "answer"]
    chat(monkeypatch, "rain\nIs it so?", "--name", "Eve")
    second = capsys.readouterr().out
    assert "Eve>     + ADD     Sam says: rain\nEve>     * 1 (" in second
    assert [(memory.speaker, memory.text) for memory in saved("me.json")] == [
        ("Sam", "Sam says: I drink tea."), ("Eve", "Sam says: rain")]
    assert [role for role, *_ in agents.calls[3:]] == [None, None]


def test_one_question_to_a_bank(agents, capsys):
    bank = MemoryBank(make_embedder("hash"))
    for text, speaker in (("Jon drinks tea.", "Jon"), ("Jon has a dog.", "Jon"), ("Gina drinks tea.", "Gina")):
        bank.add(text, speaker, "")
    bank.save("bank.json")
    answer.main(["bank.json", "Does Jon drink tea?"])
    printed = "    * 1 Jon drinks tea.\n      2 Jon has a dog.\n    answer: ?[2Jyes\n"
    assert capsys.readouterr().out == printed, "Gina's is left out: the question names Jon"
    answer.main(["bank.json", "Tell me if Jon drinks tea"])
    assert capsys.readouterr().out == printed and len(saved("bank.json")) == 3, "no question mark is needed"
    with pytest.raises(UsageError, match="nowhere.json: cannot be read as a memory bank"):
        answer.main(["nowhere.json", "Why?"])


@pytest.mark.parametrize("size, trained, memories, selects", [
    ("tiny", None, 4, True), ("small", None, 8, False), ("small", True, 8, True), ("large", False, 12, False),
    ("large", None, 12, True)])
def test_the_prompt_is_that_of_the_training(agents, capsys, monkeypatch, size, trained, memories, selects):
    monkeypatch.setattr(answer, "model_size", lambda model: size)
    bank = MemoryBank(make_embedder("hash"))
    for i in range(12):
        bank.add(f"tea number {i}", ("Jon", "Gina")[i % 2], "")
    bank.save("bank.json")
    if trained is not None:
        Run("run", {"agent": "answer", "algo": "grpo", "distill": trained})
    answer.main(["bank.json", "Is there tea?", *(["--answer", "run"] if trained is not None else [])])
    *lines, said = capsys.readouterr().out.splitlines()
    assert len(lines) == memories and said == "    answer: ?[2Jyes"
    assert ("relevant" in str(list(agents.chats.values())[-1])) == selects


def test_from_the_shell_with_the_tiny_model():
    ran = shell("answer.py", "me.json", stdin="I have a dog named Buddy.\nWhich dog does Alex have?\n")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Alex>     + ADD     Alex has a dog named Buddy.\n" in ran.stdout
    assert "answer: Buddy\n" in ran.stdout and [memory.text for memory in saved("me.json")] == [
        "Alex has a dog named Buddy."]
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does when it has seen enough
    ran = subprocess.run([sys.executable, str(ROOT / "manager.py"), "talk.txt"], stdout=writing, text=True,
                         stderr=subprocess.PIPE, timeout=300)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, "")


def test_control_characters_are_not_printed(capsys):
    manager.print_safely("\033[2Ja\ud800b\tc")
    assert capsys.readouterr().out == "?[2Ja?b?c\n"


def test_a_transcript_trains_and_evaluates(capsys):
    turns = [{"speaker": name, "text": text} for name, text in re.findall(r"(?m)^(\w+): (.*)", TALK)]
    asked = {"question": "Which dog does Jon have?", "answer": "Buddy", "evidence": [1]}
    for name, questions in (("mine.json", [asked]), ("bare.json", [{**asked, "evidence": []}])):
        Path(name).write_text(json.dumps({"turns": turns, "questions": questions}, indent=1))
    quick = "--no-extract --steps 1 --batch-size 2 --group-size 2 --max-new-tokens 16 --eval 1".split()
    train_manager.main(["--data", "mine.json", *quick])
    rows = [json.loads(line) for line in Path("runs/manager-grpo/metrics.jsonl").read_text().splitlines()]
    assert [row.get("eval") for row in rows] == ["untrained", "add-all", "noop", None, "trained"]
    assert {row["n"] for row in rows if "eval" in row} == {1}
    for data, message in (("bare.json", "no question names a turn as evidence"), ("talk.txt", "no question names")):
        with pytest.raises(UsageError, match=f"--data {data}: {message}"):
            train_manager.main(["--data", data, "--out", "x", *quick])
    with pytest.raises(UsageError, match="--data talk.txt: there is no question to train on"):
        train_answer.main(["--data", "talk.txt", "--out", "x", *quick])
    capsys.readouterr()
    evaluate.main(["--data", "bare.json", "--system", "rag", "--no-extract"])
    assert "1 questions about 1 x 4 turns" in (printed := capsys.readouterr().out) and "31 your own" in printed


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_fits_eighty_columns(name, capsys):
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[name].main(["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and max(map(len, printed.splitlines())) <= 80
    assert name not in ("evaluate", "manager", "answer") or re.search(r"(?m)^examples?:", printed)


@pytest.mark.parametrize("command, meant", [
    ("train_manager --stpes 3", "--steps"), ("train_manager --batchsize=3 --lrr 1", "--batch-size and --lr"),
    ("train_manager --algo grop", "grpo"), ("train_answer --reward emm", "em"), ("evaluate --managr base", "--manager"),
    ("evaluate --system ragg", "rag"), ("manager --adaptor x", "--adapter"), ("answer x --mangaer y", "--manager"),
    ("grpo --hepl", "--help"), ("ppo --zzzzzz", ""),
])
def test_a_wrong_flag_gives_one_line_with_a_suggestion(command, meant, capsys):
    script, *flags = command.split()
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[script].main(flags)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert (f"; did you mean {meant}? python" in said) if meant else "did you mean" not in said
