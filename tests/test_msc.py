"""MSC's loader: it adds speakers, malformed files give a one-line error; detection of a file's format."""
import functools
import json

import pytest
from hypothesis import given
from mutations import FUZZ, edited, mutated, real_file, said

import data
from data import UsageError, msc

ENTRY = {
    "personas": [["A SECRET."], ["A SECRET."]], "init_personas": [["A SECRET."], []],
    "personas_update1": ["A SECRET."], "summary_speaker_1": [["A SECRET."]], "summary_speaker_2": [["A SECRET."]],
    "previous_dialogs": [
        {"personas": [["A SECRET."], []], "time_num": 5, "time_unit": "days", "time_back": "5 days 13 hours ago",
         "dialog": [{"text": "Hi!\n"}, {"text": " "}, {"text": "I could get into Taylor  Swift."}]},
        {"personas": [[], []], "time_num": 1, "time_unit": "hour", "time_back": " 1 hour ago",
         "dialog": [{"text": "Back"}]},
    ],
    "dialog": [{"text": "Hello", "id": "Speaker 1", "convai2_id": "valid_0"}, {"text": "Hey", "id": "Speaker 2"}],
    "metadata": {"initial_data_id": "valid_0", "session_id": 2},
    "self_instruct": {"B": "Which artist was\u200b it? ", "A": "Taylor Swift!"},
}
changed = functools.partial(edited, ENTRY)


@pytest.fixture
def write(tmp_path):
    def writer(*entries):
        path = tmp_path / "mine.jsonl"
        path.write_text("\r\n".join(json.dumps(entry) for entry in entries) + "\r\n")
        return str(path)
    return writer


def test_turns_alternate_and_the_last_session_is_left_out(write):
    dialogue, = data.load(write(ENTRY), "test")
    assert (dialogue.id, dialogue.speakers) == ("valid_0", ("Speaker 1", "Speaker 2"))
    assert [(turn.id, turn.session, turn.speaker, turn.text, turn.time) for turn in dialogue.turns] == [
        ("D1:1", 1, "Speaker 1", "Hi!", "5 days 13 hours ago"),
        ("D1:3", 1, "Speaker 1", "I could get into Taylor Swift.", "5 days 13 hours ago"),
        ("D2:1", 2, "Speaker 1", "Back", "1 hour ago"),
    ]
    assert data.load(write(changed("dialog", remove=True)), "test") == [dialogue]


def test_the_question_says_who_asks_whom(write):
    question, = data.load(write(ENTRY), "test")[0].questions
    assert question == data.Question("valid_0:0", "Which artist was it?", "Taylor Swift!", 21,
                                     preface="Speaker 2 asks Speaker 1:")
    assert question.category in msc.CATEGORIES


def test_personas_and_ids_are_in_no_text(write):
    dialogue, = data.load(write(ENTRY), "test")
    assert not any("SECRET" in text or "valid_0" in text for text in said(dialogue))


def test_msc_itself_has_no_questions(write):
    dialogues = data.load(write(changed("self_instruct", remove=True)), "test")
    assert [len(dialogue.questions) for dialogue in dialogues] == [0]
    assert [(turn.id, turn.speaker, turn.time) for turn in dialogues[0].turns[3:]] == [
        ("D3:1", "Speaker 1", "today"), ("D3:2", "Speaker 2", "today")]
    first = changed("previous_dialogs", value=[])
    del first["self_instruct"]
    assert [turn.id for turn in data.load(write(first), "test")[0].turns] == ["D1:1", "D1:2"]


def test_a_json_list_will_do(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([ENTRY, changed("metadata", "initial_data_id", value="valid_1")], indent=1))
    assert [dialogue.id for dialogue in data.load(str(path), "test")] == ["valid_0", "valid_1"]


def test_there_is_only_a_test_split(write, capsys):
    for name in (write(ENTRY), "msc"):
        with pytest.raises(UsageError, match='MSC has no split "val": it is for evaluation'):
            data.load(name, "val")
    assert capsys.readouterr().err == ""


def test_the_cache_and_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMORY_R1_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(msc, "ADDRESS", "http://127.0.0.1:1/q.jsonl")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(UsageError, match="msc_self_instruct.jsonl .*put http://127.0.0.1:1/q.jsonl there"):
        data.load("msc", "test")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "cache/msc_self_instruct.jsonl").write_text(json.dumps(ENTRY))
    assert len(data.load("msc", "test")) == 1


@pytest.mark.parametrize("entry, message", [
    (changed("metadata", remove=True), 'entry 1 has no key "metadata"'),
    (changed("metadata", value=3), 'entry 1: "metadata" is not an object'),
    (changed("metadata", "initial_data_id", remove=True), 'entry 1: "metadata" has no key "initial_data_id"'),
    (changed("metadata", "initial_data_id", value="a"), 'entry 1: an earlier entry has the "initial_data_id" "a"'),
    (changed("previous_dialogs", remove=True), 'entry 1 (valid_0) has no key "previous_dialogs"'),
    (changed("previous_dialogs", 1, value=3), "entry 1 (valid_0): session 2 is not an object"),
    (changed("previous_dialogs", 1, "dialog", value=3), 'entry 1 (valid_0): session 2: "dialog" is not a list'),
    (changed("previous_dialogs", 1, "time_back", remove=True), 'entry 1 (valid_0): session 2 has no key "time_back"'),
    (changed("previous_dialogs", 1, "time_back", value=5), 'entry 1 (valid_0): session 2: "time_back" is not text'),
    (changed("self_instruct", value=None) | {"dialog": 1}, 'entry 1 (valid_0): session 3: "dialog" is not a list'),
    (changed("previous_dialogs", 0, "dialog", 1, value="Hey"), "entry 1 (valid_0): session 1, turn 1 is not an object"),
    (changed("previous_dialogs", 0, "dialog", 1, "text", remove=True),
     'entry 1 (valid_0): session 1, turn 1 has no key "text"'),
    (changed("previous_dialogs", 0, "dialog", 1, "id", value="bot_1"),
     'entry 1 (valid_0): session 1, turn 1: "id" is "bot_1", neither "Speaker 1" nor "Speaker 2"'),
    (changed("self_instruct", value=[]), 'entry 1 (valid_0): "self_instruct" is not an object'),
    (changed("self_instruct", "B", value=""), 'entry 1 (valid_0): "self_instruct": "B" is empty'),
    (changed("self_instruct", "A", remove=True), 'entry 1 (valid_0): "self_instruct" has no key "A"'),
    (changed("self_instruct", "A", value=float("nan")),
     'entry 1 (valid_0): "self_instruct": "A" is nan, not text or a finite number'),
    (changed("previous_dialogs", value=[]), 'entry 1 (valid_0): "previous_dialogs" have no turn'),
    (3, "entry 1 is not an object"),
])
def test_malformed_entries_are_named(write, entry, message):
    path = write(changed("metadata", "initial_data_id", value="a"), entry)
    with pytest.raises(UsageError) as error:
        data.load(path, "test")
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("entry, message", [
    ({"sample_id": "conv-1"}, 'entry 0 (conv-1) has no key "conversation"'),
    ({"haystack_sessions": [], "question": "?"}, 'entry 0 has no key "question_id"'),
    ({"dialog": []}, 'entry 0 has no key "metadata"'),
    ({"name": "x"}, 'entry 0 has neither the "conversation" of LoCoMo, nor the "haystack_sessions" of LongMemEval, '
                    'nor the "previous_dialogs" of MSC, nor the "turns" or "text" of a transcript'),
    (["x"], "entry 0 is not an object"),
])
def test_the_keys_of_the_first_entry_tell_the_format(tmp_path, entry, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([entry]))
    with pytest.raises(UsageError) as error:
        data.load(str(path), "test")
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("text, place", [
    (f"{json.dumps(ENTRY)}\n{json.dumps(ENTRY)}\n{{]\n", "line 3 column 2"),
    (f"{json.dumps(ENTRY, indent=1)}\n\n]\n", f"line {json.dumps(ENTRY, indent=1).count(chr(10)) + 3} column 1"),
    ('\n{\n  "dialog": []\n  "metadata": {}\n}', "line 4 column 3"), ("[\n{},\n{]", "line 3 column 2")])
def test_a_broken_line_is_named_by_its_number(tmp_path, text, place):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"neither JSON nor one JSON object a line \(.*{place} "):
        data.load(str(path), "test")


def test_blank_lines_between_objects_do_not_count(tmp_path):
    path = tmp_path / "x.jsonl"
    other = changed("metadata", "initial_data_id", value="b")
    path.write_text("\n \n".join(["", json.dumps(ENTRY), json.dumps(other), ""]))
    assert [dialogue.id for dialogue in data.load(str(path), "test")] == ["valid_0", "b"]
    with pytest.raises(UsageError, match="nowhere: neither a benchmark .synthetic, locomo, longmemeval, "):
        data.load("nowhere", "test")


@FUZZ
@given(mutated(ENTRY, "Speaker 2", "9999 weeks", "9 days ٣ hours 0 hour", "id"))
def test_any_file_gives_dialogues_or_a_usage_error(tmp_path_factory, entry):
    path = tmp_path_factory.getbasetemp() / "mutated.jsonl"
    path.write_text(json.dumps(entry))
    try:
        dialogue, = data.load(str(path), "test")
        assert all(turn.speaker in dialogue.speakers and turn.text for turn in dialogue.turns)
        assert all(question.text and question.answer for question in dialogue.questions)
        "".join(said(dialogue)).encode()
    except UsageError as error:
        assert str(error).startswith(f"{path}: entry 0") and "\n" not in str(error)


SESSIONS, EXCERPTS = "msc_valid_sessions1to4.json", "msc_dmr_excerpts.json"


@pytest.mark.skipif(not (real_file(SESSIONS) and real_file(EXCERPTS)),
                    reason="real sessions and questions of MSC are not here (no part of the repository)")
def test_real_sessions_and_questions(write):
    """The first three sessions of MSC's validation set, with the questions that are known for them."""
    asked = {row["msc_valid_id"]: {"B": row["question"], "A": row["answer"]}
             for row in json.loads(real_file(EXCERPTS).read_text())["rows"] if row["question"]}
    entries = []
    for raw in json.loads(real_file(SESSIONS).read_text()):
        *before, last = raw["sessions"][:3]
        name = raw["initial_data_id"]
        entries.append({
            "metadata": {"initial_data_id": name, "session_id": 2}, "personas": raw["personas_session_3"],
            "previous_dialogs": [{"dialog": [{"text": turn["text"]} for turn in session["turns"]],
                                  **session["gap_before_session_3"]} for session in before],
            "dialog": [{"text": turn["text"], "id": turn["speaker"]} for turn in last["turns"]],
            **({"self_instruct": asked[name]} if name in asked else {})})
    dialogues = data.load(write(*entries), "test")
    known = [turn["speaker"] for raw in json.loads(real_file(SESSIONS).read_text())
             for session in raw["sessions"][:2 if raw["initial_data_id"] in asked else 3] for turn in session["turns"]]
    assert [turn.speaker for dialogue in dialogues for turn in dialogue.turns] == known  # alternation guesses right
    assert len(dialogues) == 500 and {turn.session for d in dialogues for turn in d.turns} == {1, 2, 3}
    questions = {question.id: question for dialogue in dialogues for question in dialogue.questions}
    assert {name: question.answer for name, question in questions.items()} == {
        "valid_1:0": "Taylor Swift!", "valid_2:0": "I eat a fresh and raw diet to save on groceries."}
    assert dialogues[0].turns[0].time == "6 days 3 hours ago"


@pytest.mark.skipif(real_file("msc_self_instruct.jsonl") is None, reason="msc_self_instruct.jsonl is not here")
def test_the_published_questions():
    dialogues = data.load(str(real_file("msc_self_instruct.jsonl")), "test")
    assert len(dialogues) == 500 and all(len(dialogue.questions) == 1 for dialogue in dialogues)
    assert all({turn.session for turn in dialogue.turns} == {1, 2, 3, 4} for dialogue in dialogues)
