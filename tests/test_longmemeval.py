"""LongMemEval's loader: irregular entries are read, no text contains a label, malformed files give a one-line error."""
import functools
import json
from collections import Counter

import pytest
from hypothesis import given
from mutations import FUZZ, edited, mutated, real_file, said

import data
from data import UsageError, longmemeval

ENTRY = {
    "question_id": "gpt4_1a2b3c4d_abs",
    "question_type": "temporal-reasoning",
    "question": "How many days  ago? ",
    "answer": 2,
    "question_date": "2023/05/30 (Tue) 23:40",
    "haystack_dates": ["2023/05/30 (Tue) 09:00", "2023/06/02 (Fri) 10:00", "2023/05/09 (Tue) 23:00",
                       "2023/05/30 (Tue) 09:00", "2023/05/10 (Wed) 00:00"],
    "haystack_session_ids": ["answer_7_2", "answer_7_1", "ultra_1", "ultra_1", "share_2"],
    "haystack_sessions": [
        [{"role": "assistant", "content": "Hello\n\nyou"}, {"role": "user", "content": "C", "has_answer": False}],
        [{"role": "user", "content": "after the question", "has_answer": True}],
        [{"role": "user", "content": " "}, {"role": "assistant", "content": "A", "has_answer": True},
         {"role": "assistant", "content": "twi\u200bce \ud83d\ude00"}],
        [{"role": "user", "content": "the same day", "has_answer": None}],
        [],
    ],
    "answer_session_ids": ["answer_7_2", "answer_7_1"],
}
changed = functools.partial(edited, ENTRY)


@pytest.fixture
def write(tmp_path):
    def writer(*entries):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(list(entries)))
        return str(path)
    return writer


def test_turns_keep_the_order_of_the_file(write):
    dialogue, = data.load(write(ENTRY), "test")
    assert (dialogue.id, dialogue.speakers) == ("gpt4_1a2b3c4d_abs", ("user", "assistant"))
    assert [(turn.id, turn.session, turn.speaker, turn.text, turn.time) for turn in dialogue.turns] == [
        ("D1:1", 1, "assistant", "Hello you", "2023/05/30 (Tue) 09:00"),
        ("D1:2", 1, "user", "C", "2023/05/30 (Tue) 09:00"),
        ("D2:1", 2, "user", "after the question", "2023/06/02 (Fri) 10:00"),
        ("D3:2", 3, "assistant", "A", "2023/05/09 (Tue) 23:00"),
        ("D3:3", 3, "assistant", "twice \U0001f600", "2023/05/09 (Tue) 23:00"),
        ("D4:1", 4, "user", "the same day", "2023/05/30 (Tue) 09:00"),  # session 5 is empty
    ]


def test_the_question(write):
    dialogue, = data.load(write(ENTRY), "test")
    question, = dialogue.questions
    assert (question.preface, question.text) == ("Current date: 2023/05/30 (Tue) 23:40.", "How many days ago?")
    assert (question.id, question.answer, question.category) == ("gpt4_1a2b3c4d_abs", "2", 16)
    assert (question.evidence, question.asked_after) == (("D2:1", "D3:2"), None)


def test_labels_are_in_no_text_and_not_needed(write):
    dialogue, = longmemeval.load(path=write(ENTRY))
    for label in [ENTRY["question_id"], *ENTRY["haystack_session_ids"], "has_answer", "_abs", "temporal-reasoning"]:
        assert not any(label in text for text in said(dialogue))
    without = changed("haystack_session_ids", remove=True)
    del without["answer_session_ids"]
    assert longmemeval.load(path=write(without)) == [dialogue]


def test_there_is_only_a_test_split(write, capsys):
    for name in (write(ENTRY), "longmemeval", "longmemeval-s"):
        with pytest.raises(UsageError, match='LongMemEval has no split "train": it is for evaluation'):
            data.load(name, "train")
    assert capsys.readouterr().err == ""  # nothing fetched before that is said


@pytest.mark.parametrize("name, file", [("longmemeval", "longmemeval_oracle.json"),
                                        ("longmemeval-s", "longmemeval_s_cleaned.json")])
def test_the_cache_and_offline(tmp_path, monkeypatch, name, file):
    monkeypatch.setenv("MEMORY_R1_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(longmemeval, "ADDRESS", "http://127.0.0.1:1/")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(UsageError) as error:
        data.load(name, "test")
    assert f"put http://127.0.0.1:1/{file} there" in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path / "cache" / file) in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "cache" / file).write_text(json.dumps([ENTRY]))
    assert len(data.load(name, "test")) == 1


@pytest.mark.parametrize("entry, message", [
    (changed("question_id", remove=True), 'entry 1 has no key "question_id"'),
    (changed("question_id", value="q1"), 'entry 1: an earlier entry has the "question_id" "q1"'),
    (changed("question_type", value="trivia"), 'entry 1 (gpt4_1a2b3c4d_abs): "question_type" is "trivia", not one of '
     "single-session-user, single-session-preference, single-session-assistant, multi-session, knowledge-update, "
     "temporal-reasoning"),
    (changed("question", value=" "), 'entry 1 (gpt4_1a2b3c4d_abs): "question" is empty'),
    (changed("question_date", remove=True), 'entry 1 (gpt4_1a2b3c4d_abs) has no key "question_date"'),
    (changed("answer", value=[]), 'entry 1 (gpt4_1a2b3c4d_abs): "answer" is not text or a number'),
    (changed("answer", value=None), 'entry 1 (gpt4_1a2b3c4d_abs): "answer" is not text or a number'),
    (changed("answer", value="\u200b "), 'entry 1 (gpt4_1a2b3c4d_abs): "answer" is empty'),
    *((changed("answer", value=float(name)), f'entry 1 (gpt4_1a2b3c4d_abs): "answer" is {name}, not text or a finite '
       "number") for name in ("nan", "inf", "-inf")),
    (changed("haystack_sessions", value={}), 'entry 1 (gpt4_1a2b3c4d_abs): "haystack_sessions" is not a list'),
    (changed("haystack_dates", value=["2023/05/30 (Tue) 09:00"]),
     'entry 1 (gpt4_1a2b3c4d_abs): "haystack_dates" has 1 dates for 5 of "haystack_sessions"'),
    (changed("haystack_dates", 2, value=3), 'entry 1 (gpt4_1a2b3c4d_abs): session 2: "haystack_dates" is not text'),
    (changed("haystack_sessions", 0, value=3),
     'entry 1 (gpt4_1a2b3c4d_abs): session 0: "haystack_sessions" is not a list'),
    (changed("haystack_sessions", 0, 1, value=3), "entry 1 (gpt4_1a2b3c4d_abs): session 0, turn 1 is not an object"),
    (changed("haystack_sessions", 0, 1, "content", remove=True),
     'entry 1 (gpt4_1a2b3c4d_abs): session 0, turn 1 has no key "content"'),
    (changed("haystack_sessions", 0, 1, "role", value="system"),
     'entry 1 (gpt4_1a2b3c4d_abs): session 0, turn 1: "role" is "system", neither "user" nor "assistant"'),
    (changed("haystack_sessions", value=[[]] * 5), 'entry 1 (gpt4_1a2b3c4d_abs): "haystack_sessions" has no turn'),
    (3, "entry 1 is not an object"),
])
def test_malformed_entries_are_named(write, entry, message):
    path = write(changed("question_id", value="q1"), entry)
    with pytest.raises(UsageError) as error:
        data.load(path, "test")
    assert str(error.value) == f"{path}: {message}"


@FUZZ
@given(mutated(ENTRY, "user", "multi-session", "2023/05/30 (Tue) 23:40"))
def test_any_file_gives_dialogues_or_a_usage_error(tmp_path_factory, entry):
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(json.dumps([entry]))
    try:
        dialogue, = data.load(str(path), "test")
        assert all(turn.speaker in dialogue.speakers and turn.text for turn in dialogue.turns)
        assert all(question.text and question.answer for question in dialogue.questions)
        "".join(said(dialogue)).encode()
    except UsageError as error:
        assert str(error).startswith(f"{path}: entry 0") and "\n" not in str(error)


REAL = [pytest.param(name, *counts, marks=pytest.mark.skipif(
    real_file(name) is None, reason=f"{name} is not here (no part of the repository)")) for name, *counts in [
    ("longmemeval_oracle.json", range(1, 7), range(2, 73)),
    ("longmemeval_s_cleaned.json", range(38, 59), range(384, 617))]]


@pytest.mark.parametrize("name, num_sessions, num_turns", REAL)
def test_the_published_files(name, num_sessions, num_turns):
    dialogues = data.load(str(real_file(name)), "test")
    questions = [dialogue.questions[0] for dialogue in dialogues]
    assert Counter(question.category for question in questions) == {11: 70, 12: 30, 13: 56, 14: 133, 15: 78, 16: 133}
    abstained = [question for question in questions if question.id.endswith("_abs")]
    assert Counter(question.category for question in abstained) == {14: 12, 16: 6, 15: 6, 11: 6}
    assert sum(not question.evidence for question in questions) == 21 and len(abstained) == 30
    assert {dialogue.turns[-1].session for dialogue in dialogues} <= set(num_sessions)
    assert {len(dialogue.turns) for dialogue in dialogues} <= set(num_turns)
    assert sum(question.preface.startswith("Current date: 2") for question in questions) == 500
    for dialogue in dialogues:
        assert len({turn.id for turn in dialogue.turns}) == len(dialogue.turns)
        assert not any("answer_" in text or dialogue.id in text or "has_answer" in text for text in said(dialogue))


@pytest.mark.skipif(real_file("longmemeval_oracle.json") is None, reason="longmemeval_oracle.json is not here")
def test_the_oracle_file_to_the_number():
    dialogues = longmemeval.load(path=real_file("longmemeval_oracle.json"))
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    evidence = {(dialogue.id, name) for dialogue in dialogues for name in dialogue.questions[0].evidence}
    held = Counter(turn.speaker for dialogue in dialogues for turn in dialogue.turns
                   if (dialogue.id, turn.id) in evidence)
    assert len(turns) == 10_960 and held == {"user": 842, "assistant": 54}
    assert sum(len({turn.session for turn in dialogue.turns}) for dialogue in dialogues) == 948
    first = dialogues[0].questions[0]
    assert first.preface == "Current date: 2023/04/10 (Mon) 23:07."
    assert first.text == "What was the first issue I had with my new car after its first service?"
