"""Your own transcripts: plain text and JSON give the same dialogue; malformed files give a one-line error."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import CASES, FUZZ, edited, mutated, said

import data
from data import Question, Turn, UsageError, transcript
from support import report
from train_manager import linked_questions

TEXT = """\
\ufeff# 8 May 2023
Jon: I have a dog named Buddy.
Gina: Lovely!   I bought
a Kia car: it is\u200b red.
    Note: it is used.

Jon: I adopted another dog.\tAt 10:30!
# 3 June 2023

Gina:
  I sold it.
"""
TURNS = (
    Turn("D1:1", 1, "Jon", "I have a dog named Buddy.", "8 May 2023"),
    Turn("D1:2", 1, "Gina", "Lovely! I bought a Kia car: it is red. Note: it is used.", "8 May 2023"),
    Turn("D2:1", 2, "Jon", "I adopted another dog. At 10:30!", "8 May 2023"),
    Turn("D3:1", 3, "Gina", "I sold it.", "3 June 2023"),
)
ENTRY = {"turns": [{"speaker": turn.speaker, "text": turn.text, "time": turn.time} for turn in TURNS],
         "questions": [{"question": "Which car does Gina have?", "answer": "none", "evidence": [2, 4]},
                       {"question": "How many dogs does Jon have?", "answer": 2}]}


@pytest.fixture
def load(tmp_path):
    def loader(content, split="train"):
        path = tmp_path / "talk.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return data.load(str(path), split)
    return loader


def test_plain_text(load):
    for text in (TEXT, TEXT.replace("\n", "\r\n"), TEXT + "\n\n"):
        dialogue, = load(text.replace("a Kia car: it", "  a Kia car: it"))
        assert dialogue == data.Dialogue("talk", ("Jon", "Gina"), TURNS, ())


def test_json_as_a_list_as_an_object_and_as_lines(load):
    one_session = TURNS[:2], [Turn("D1:3", 1, *list(vars(TURNS[2]).values())[2:5])], [
        Turn("D2:1", 2, *list(vars(TURNS[3]).values())[2:5])]  # in JSON a session ends where the time changes
    turns = tuple(turn for some in one_session for turn in some)
    asked = (Question("talk-0:1", "Which car does Gina have?", "none", 31, ("D1:2", "D2:1")),
             Question("talk-0:2", "How many dogs does Jon have?", "2", 31))
    for content, questions in ((ENTRY["turns"], ()), (ENTRY, asked)):
        for indent in (None, 2):
            dialogue, = load(json.dumps(content, indent=indent))
            assert dialogue == data.Dialogue("talk-0", ("Jon", "Gina"), turns, questions)
    lines = load(f"{json.dumps(ENTRY)}\n{json.dumps(ENTRY)}\n")
    assert [dialogue.id for dialogue in lines] == ["talk-0", "talk-1"] and lines[0].turns == lines[1].turns == turns


def test_every_split_is_the_whole_file_and_the_time_may_be_missing(load):
    text = "Jon: Hi.\nGina: Hi.\nJon: Bye."
    dialogues = [load(text, split)[0] for split in ("train", "val", "test")]
    assert dialogues[0] == dialogues[1] == dialogues[2]
    assert [(turn.id, turn.time) for turn in dialogues[0].turns] == [("D1:1", ""), ("D1:2", ""), ("D1:3", "")]
    bare = [{"speaker": turn.speaker, "text": turn.text, "time": None} for turn in dialogues[0].turns]
    assert load(json.dumps(bare))[0].turns == dialogues[0].turns


def test_evidence_links_questions_to_turns_and_their_category_has_a_name(load):
    dialogue, = load(json.dumps(ENTRY))
    assert {turn: [one.text for one in questions] for turn, questions in linked_questions(dialogue, 2).items()} == {
        "D2:1": ["Which car does Gina have?"]}
    assert dialogue.final_questions() == list(dialogue.questions)
    assert set(transcript.CATEGORIES) <= set(report.CATEGORY_NAMES)


@pytest.mark.parametrize("content, message", [
    ("Hello there.\nJon: Hi.", 'line 1 begins a session, so it must read "Name: what was said"'),
    ("Jon: Hi.\nGina: Hi.\n\nand more", 'line 4 begins a session, so it must read "Name: what was said"'),
    ("Jon: Hi.\n# 8 May\nhttp://x.org/", 'line 3 begins a session, so it must read "Name: what was said"'),
    ("Jon: Hi.\nGina: Hi.\nNote: Hi.",
     'line 3: "Note" is a third speaker besides Jon and Gina (in plain text, indent lines that continue a turn)'),
    ("Jon: Hi.\nGina:\n\nJon: Hi.", "line 2: a text is missing"),
    ("Jon: Hi.\n\u200b: Hi.", "line 2: the name of a speaker is missing"),
    ("Jon: Hi.\nJon: Hi.", "only Jon speaks, but two must"),
    ("# 8 May 2023\n", "nobody speaks, but two must"),
    (json.dumps([]), "is not a list of conversations"),
    (json.dumps({"turns": []}), "entry 0: nobody speaks, but two must"),
    (json.dumps(edited(ENTRY, "turns", 2, "speaker", value="Eve")),
     'entry 0: turn 3: "Eve" is a third speaker besides Jon and Gina '
     "(in plain text, indent lines that continue a turn)"),
    (json.dumps([{"speaker": "Jon", "text": "Hi."}, "Hi."]), "entry 0: turn 2 is not an object"),
    (json.dumps([{"speaker": "Jon"}]), 'entry 0: turn 1 has no key "text"'),
    (json.dumps(edited(ENTRY, "turns", 1, "time", value=7)), 'entry 0: turn 2: "time" is not text'),
    (json.dumps(edited(ENTRY, "questions", value={})), 'entry 0: "questions" is not a list'),
    (json.dumps(edited(ENTRY, "questions", 1, "answer", value=None)),
     'entry 0: question 2: "answer" is not text or a number'),
    (json.dumps(edited(ENTRY, "questions", 0, "evidence", value=[5])),
     'entry 0: question 1: "evidence" has 5, not the number of a turn, 1 to 4'),
    (json.dumps(edited(ENTRY, "questions", 0, "evidence", value=[0])),
     'entry 0: question 1: "evidence" has 0, not the number of a turn, 1 to 4'),
    (json.dumps(edited(ENTRY, "questions", 0, "evidence", value=[True])),
     'entry 0: question 1: "evidence" has True, not the number of a turn, 1 to 4'),
])
def test_malformed_files_are_named(load, tmp_path, content, message):
    with pytest.raises(UsageError) as error:
        load(content)
    assert str(error.value) == f"{tmp_path / 'talk.txt'}: {message}"


SOME = settings(FUZZ, max_examples=max(1, CASES // 4))


def outcome(load, content):
    """Assert that a file gives dialogues of two speakers, or a one-line UsageError."""
    try:
        dialogues = load(content)
    except UsageError as error:
        assert "\n" not in str(error) and "talk.txt" in str(error)
        return
    for dialogue in dialogues:
        assert {turn.speaker for turn in dialogue.turns} == set(dialogue.speakers) and len(dialogue.speakers) == 2
        assert len({turn.id for turn in dialogue.turns}) == len(dialogue.turns)
        assert all(turn.text and turn.speaker for turn in dialogue.turns)
        assert {name for question in dialogue.questions for name in question.evidence} <= {
            turn.id for turn in dialogue.turns}
        assert all(text == " ".join(text.split()) and text.encode() is not None for text in said(dialogue))


@SOME
@given(mutated(ENTRY, "Jon", "Gina"), st.booleans())
def test_any_json_gives_dialogues_or_a_usage_error(load, entry, as_list):
    outcome(load, json.dumps(entry["turns"] if as_list and "turns" in entry else entry))


PIECES = ["Jon: ", "Gina: ", "Eve:", "# ", "#", "\n", "\n\n", "\r", "  ", ":", "\u200b", "\u2028", "\0", "[", "{", "Hi"]


@SOME
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join) | st.binary(max_size=20))
def test_any_text_gives_a_dialogue_or_a_usage_error(load, content):
    outcome(load, content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
