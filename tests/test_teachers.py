"""Demonstrations for supervised learning: reference operations, correct answers and hosted teachers."""
import json
import re

import pytest

import answer
import data
import manager
import train_answer
import train_manager
from answer import Answer
from data import Dialogue, Turn, UsageError
from memory import Memory
from policy import Policy
from support import cli


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    """Models that are not there have 3e9 parameters."""
    monkeypatch.setattr(cli, "num_parameters", lambda name: 3e9)


def task(*flags):
    args = train_manager.arguments(["--algo", "sft", "--eval", "0", "--steps", "2", "--batch-size", "10", *flags])
    return train_manager.ManagerTask(Policy.load(data.TINY), args)


@pytest.mark.parametrize("model, word", [(str(data.TINY), '"old_memory":" '), ("another", '"id": ')])
def test_reference_operations_in_the_format_of_each_model(model, word):
    made = task("--model", model)
    prompts, completions, report = made.demonstrations()
    texts, known = [made.policy.decode(ids) for ids in completions], made.teacher_decisions()
    assert report["invalid_rate"] == 0 and sum(report["ops"].values()) == len(prompts) == 20 and word in "".join(texts)
    for prompt, text, (case, edits) in zip(prompts, texts, known, strict=True):
        assert prompt == made.policy.encode(manager.messages(case, tiny=True)) and manager.parse(text, case) == edits


def test_edits_of_memories_that_are_not_shown_are_left_out():
    made, memories = task("--max-prompt-tokens", "40"), [Memory(i, f"Jon likes Rex{i}.", "Jon", "") for i in range(5)]
    case = manager.Case("Jon", "", ("x",), tuple(memories))  # the best match comes first; the last one does not fit
    made.teacher_decisions = lambda: [(case, [manager.Edit("DELETE", i)]) for i in (0, 4)]
    (prompt,), (completion,), report = made.demonstrations()
    assert report["invalid_rate"] == 0.5 and "Rex0" in made.policy.decode(completion) and len(prompt) <= 40


def test_a_hosted_teacher_builds_its_own_banks_and_is_never_asked_twice(serve, tmp_path, monkeypatch):
    """It stores every fact; for facts with an "s" its output is invalid."""
    def teach(chat):
        fact = re.search("- (.*)\noperations:", chat[-1]["content"])[1]
        return "I would not." if "s" in fact[:9] else f'Of course: [{{"event": "ADD", "text": "{fact}"}}] Done.'
    server = serve(rule=teach)
    monkeypatch.setenv("MANAGER_URL", server.url)
    monkeypatch.setenv("MANAGER_MODEL", "big")
    monkeypatch.setattr(cli, "TEACHER_REPLIES", str(tmp_path / "new/teacher.jsonl"))
    prompts, completions, report = (made := task("--teacher", "endpoint")).demonstrations()
    texts = [json.loads(made.policy.decode(ids)) for ids in completions]
    assert len(server.requests) == 20 and 0 < len(texts) < 20
    assert report == {"invalid_rate": pytest.approx(1 - len(texts) / 20), "ops": {"ADD": len(texts)}}
    shown = "".join(map(made.policy.decode, prompts))
    assert any(f") {item['text'].strip()}\n" in shown for item, in texts), "its next prompts show what it stored"
    again = task("--teacher", "endpoint").demonstrations()
    assert again == (prompts, completions, report) and len(server.requests) == 20
    server.rule = (401, {}, b"")
    monkeypatch.setenv("MANAGER_MODEL", "bigger")
    with pytest.raises(UsageError, match="MANAGER_URL"):
        task("--teacher", "endpoint").demonstrations()


def test_the_observations_of_locomo(monkeypatch):
    """A turn without observations is cloned as NOOP, and later prompts show what earlier turns have stored."""
    said = [("Ann", "Hi!", ()), ("Ann", "I sold my car and I swim.", ("Ann sold her car.", "Ann swims.")),
            ("Bob", "I row.", ("Bob rows " * 99,)), ("Ann", "My car is gone.", ())]
    turns = tuple(Turn(f"D1:{i}", 1, speaker, text, "8 May 2023", observations=observations)
                  for i, (speaker, text, observations) in enumerate(said, 1))
    monkeypatch.setattr(data, "load", lambda *args, **options: [Dialogue("conv-26", ("Ann", "Bob"), turns, ())])
    made = task("--data", "locomo", "--model", "another", "--no-extract")
    prompts, completions, report = made.demonstrations()
    assert report == {"invalid_rate": 0, "ops": {"NOOP": 2, "ADD": 3}}
    assert [json.loads(made.policy.decode(ids)) for ids in completions] == [
        [{"event": "NOOP"}], [{"event": "ADD", "text": "Ann sold her car."}, {"event": "ADD", "text": "Ann swims."}],
        [{"event": "ADD", "text": ("Bob rows " * 99)[:500].strip()}], [{"event": "NOOP"}]]
    assert all(turn.text in made.policy.decode(prompt) for turn, prompt in zip(turns, prompts, strict=True))
    assert "Ann sold her car." in made.policy.decode(prompts[3]) and "Ann sold" not in made.policy.decode(prompts[2])


def test_refusals(monkeypatch):
    monkeypatch.setenv("MANAGER_MODEL", "")
    with pytest.raises(UsageError, match="--data msc has no reference operations.*--teacher endpoint"):
        train_manager.arguments(["--algo", "sft", "--data", "msc"])
    with pytest.raises(UsageError, match="set MANAGER_URL"):
        task("--teacher", "endpoint")
    made = task()
    made.teacher_decisions = lambda: [(manager.Case("Jon", "", ("x",), ()), None)] * 3
    with pytest.raises(UsageError, match="none of the teacher's 3 outputs"):
        made.demonstrations()


# ------------------------------------------------------------------------------------------------ the Answer Agent

SHOWN = [Memory(1, "Jon has a dog named Buddy.", "Jon", "8 May 2023"), Memory(2, "Jon is tired.", "Jon", "3 June 2023"),
         Memory(4, "Jon has a dog named Scout.", "Jon", "9 June 2023")]


@pytest.mark.parametrize("given, distill, tiny, text", [
    (Answer("Buddy and Scout", (1, 3), True), True, True, "1 Buddy\n2 none\n3 Scout\nanswer: Buddy and Scout"),
    (Answer("3 June 2023", (2,), True), True, True, "1 none\n2 3 June 2023\n3 none\nanswer: 3 June 2023"),
    (Answer("none", (), True), True, True, "1 none\n2 none\n3 none\nanswer: none"),
    (Answer("Buddy", (), True), False, True, "answer: Buddy"),
    (Answer("Buddy and Scout", (1, 3), True), True, False, '{"relevant": [1, 3], "answer": "Buddy and Scout"}'),
    (Answer("3 June 2023", (), True), False, False, "3 June 2023")])
def test_an_answer_as_a_completion_is_read_back(given, distill, tiny, text):
    assert answer.format_answer(given, SHOWN, distill, tiny) == text and answer.parse(text) == given


@pytest.fixture
def answer_task(monkeypatch):
    """answer_task(*flags): SFT of the Answer Agent on two short synthetic dialogues, with reference banks."""
    monkeypatch.setattr(train_answer, "NUM_TURNS", 24)
    monkeypatch.setattr(train_answer, "NUM_DIALOGUES", 2)
    monkeypatch.setattr(manager, "build_banks", lambda agent, dialogues, embedder, *rest:
                        manager.oracle_banks(dialogues, embedder))

    def make(*flags):
        args = train_answer.arguments(["--algo", "sft", "--eval", "0", *flags])
        return train_answer.AnswerTask(Policy.load(data.TINY), args)
    return make


@pytest.mark.parametrize("flags", ["", "--no-distill", "--model X", "--model X --no-distill"])
def test_correct_answers_in_the_format_of_each_model(answer_task, flags):
    made = answer_task(*flags.split())
    prompts, completions, report = made.demonstrations()
    texts, asked = [made.policy.decode(ids) for ids in completions], made.questions
    assert report == {"invalid_rate": 0} and len(prompts) == len(asked) > 10
    golds = {tuple(made.make_episode(item, 20).prompt): item for item in asked}
    for prompt, text in zip(prompts, texts, strict=True):
        item, given = golds[tuple(prompt)], answer.parse(text)
        assert given.text == item.question.answer and given.is_valid
        assert text.startswith('{"relevant"') == (made.args.distill and "X" in flags)
        if made.args.distill and given.text != "none":
            shown = made.make_episode(item, 20).shown
            told = " ".join(f"{shown[i - 1].time} {shown[i - 1].text}" for i in given.selected)
            assert all(word in told for word in given.text.split(" and "))
        else:
            assert not given.selected


def real_file(tmp_path):
    """Ann tells of a pet in each of 30 turns; of three questions one has evidence in a turn that is hard to find."""
    turns = [{"speaker": name, "text": f"My {animal} is called Rex{i}."} for i, (name, animal) in
             enumerate([("Ann", "dog"), ("Bob", "cat"), *[("Ann", "canary")] * 28])]
    asked = [("What is the dog of Ann called?", "Rex0", [1]), ("Which dog and which cat?", "Rex1", [2, 1]),
             ("Why?", "Rex29", [30])]
    content = {"turns": turns, "questions": [{"question": question, "answer": gold, "evidence": turns}
                                             for question, gold, turns in asked]}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    return str(tmp_path / "mine.json")


@pytest.mark.parametrize("flags, texts", [
    ("--distill", ['{"relevant": [1], "answer": "Rex0"}', '{"relevant": [1, 3], "answer": "Rex1"}']),
    ("--no-distill", ["Rex0", "Rex1", "Rex29"])])
def test_correct_answers_of_real_data_select_the_evidence_and_are_left_out_if_it_is_not_shown(
        answer_task, tmp_path, flags, texts):
    made = answer_task("--data", real_file(tmp_path), "--model", "X", "--bank", "turns", "--memories", "4", flags)
    prompts, completions, report = made.demonstrations()
    assert sorted(map(made.policy.decode, completions)) == sorted(texts) and len(prompts) == len(texts)
    assert report == {"invalid_rate": pytest.approx(1 - len(texts) / 3)}


def test_without_any_evidence_there_is_nothing_to_clone(answer_task, tmp_path):
    made = answer_task("--data", real_file(tmp_path), "--model", "X", "--bank", "turns", "--distill")
    for i, item in enumerate(made.questions):
        made.questions[i] = train_answer.replace(item, question=train_answer.replace(item.question, evidence=()))
    with pytest.raises(UsageError, match="none of the teacher's 3 answers can be used"):
        made.demonstrations()


def test_a_hosted_teacher_sees_the_same_memories_and_its_answers_are_put_into_our_format(
        answer_task, serve, tmp_path, monkeypatch):
    def teach(chat):
        question = chat[1]["content"].splitlines()[-2]
        return ("<think>1" if "cat" in question else "Answer: Rex" if "Why?" in question  # nothing is selected
                else "I see.\nRelevant: 1, 99.\n**Answer:** Rex")
    server = serve(rule=teach)
    monkeypatch.setenv("ANSWER_URL", server.url)
    monkeypatch.setenv("ANSWER_MODEL", "big")
    monkeypatch.setattr(cli, "TEACHER_REPLIES", str(tmp_path / "teacher.jsonl"))
    flags = ["--data", real_file(tmp_path), "--model", "X", "--bank", "turns", "--teacher", "endpoint"]
    prompts, completions, report = answer_task(*flags).demonstrations()
    made = answer_task(*flags)
    assert (prompts, completions, report) == made.demonstrations() and len(server.requests) == 3
    assert report == {"invalid_rate": pytest.approx(2 / 3)}
    assert [made.policy.decode(ids) for ids in completions] == ['{"relevant": [1], "answer": "Rex"}']
    shown, *_ = (re.findall(r"(?m)^\d+ .*$", made.policy.decode(prompt)) for prompt in prompts)
    assert len(shown) == 30 and all(re.findall(r"(?m)^\d+ .*$", request["messages"][1]["content"]) == shown
                                    for request in server.requests)


@pytest.mark.parametrize("gold, evidence, literally, implied", [
    ("Rex", ("D1:1", "D1:3"), True, True), ("Rex and Kia", ("D1:1", "D1:3"), True, False),
    ("Rex and Kia", ("D1:1", "D1:3"), False, True), ("Rex and Kia", ("D1:1", "D1:2"), True, True),
    ("8 May 2023", ("D1:4",), True, True), ("9 May 2023", ("D1:4",), True, False), ("none", ("D9:9",), True, True),
    ("Rex", ("D1:1", "D9:9"), False, False), ("Rex", (), False, False)])
def test_an_answer_is_implied_by_memories_of_all_its_evidence(gold, evidence, literally, implied):
    told = [("Ann has a dog named Rex.", {"D1:1"}), ("Ann drives a Kia.", {"D1:2"}), ("Ann met Rex.", {"D1:3", "D1:4"})]
    shown = [Memory(i, text, "Ann", "8 May 2023") for i, (text, _) in enumerate(told)]
    item = train_answer.BankQuestion(data.Question("Q", "?", gold, 4, evidence), None, ("Ann", "Bob"),
                                     {i: turns for i, (_, turns) in enumerate(told)})
    assert train_answer.Episode([1], shown, 0, item).implies_answer(literally) == implied
