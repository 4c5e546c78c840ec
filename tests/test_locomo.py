"""LoCoMo's loader: irregular entries are read, malformed files give a one-line error, downloads are checked."""
import functools
import hashlib
import http.server
import json
import socket
import threading
import time
from collections import Counter

import pytest
from hypothesis import given
from mutations import FUZZ, edited, mutated, real_file

from data import UsageError, files, locomo

ENTRY = {
    "sample_id": "conv-7",
    "conversation": {
        "speaker_a": "Ann", "speaker_b": "Bob",
        "session_10_date_time": "9:00 am on 2 June, 2023",
        "session_10": [{"speaker": "Bob", "dia_id": "D10:1", "text": "Back from  Rome. "}],
        "session_2_date_time": "1:56 pm on 8 May, 2023",
        "session_2": [
            {"speaker": "Ann", "dia_id": "D2:1", "text": " A day\nat sea!", "blip_caption": "a boat"},
            {"speaker": "Bob", "dia_id": "D2:2", "text": "Nice", "img_url": ["u"], "blip_caption": "a hat"},
        ],
        "session_3_date_time": "a date without a session",
    },
    "qa": [
        {"question": "When? ", "answer": 2022, "category": 2, "evidence": ["D2:1; D10:01", "D:2:2", "D2:1"]},
        {"question": "Who?", "answer": " Ro\u200bme", "category": 4, "evidence": ["D2:9", "D", "D2:2 D10:1"]},
        {"question": "Why?", "answer": "a; b", "category": 3, "evidence": []},
        {"question": "Where?", "adversarial_answer": "Oslo", "category": 5, "evidence": ["D2:1"]},
        {"question": "Really?", "answer": "No", "adversarial_answer": "Yes", "category": 5},
        {"question": "Where?", "answer": "Rome", "category": 4},
    ],
    "event_summary": {}, "session_summary": {}, "observation": {
        "session_2_observation": {"Ann": [["Ann  was at sea.", "D2:1"], ["Ann liked it.", ["D2:2", "D2:1"]],
                                          ["Bob has a hat.", "D2:2"]], "Bob": [["Bob is polite.", "D2:02"]]},
        "session_10_observation": {"Bob": [["Bob was in Rome.", "D10:9"], ["?"], 3]}},
}
changed = functools.partial(edited, ENTRY)


@pytest.fixture
def write(tmp_path):
    def writer(*entries):
        path = tmp_path / "locomo.json"
        path.write_text(json.dumps(list(entries)))
        return path
    return writer


def test_turns(write):
    dialogue, = locomo.load(path=write(ENTRY))
    assert (dialogue.id, dialogue.speakers) == ("conv-7", ("Ann", "Bob"))
    assert [(turn.id, turn.session, turn.speaker, turn.text) for turn in dialogue.turns] == [
        ("D2:1", 2, "Ann", "A day at sea! [shares a photo: a boat]"),
        ("D2:2", 2, "Bob", "Nice [shares a photo: a hat]"),
        ("D10:1", 10, "Bob", "Back from Rome."),
    ]
    assert dialogue.turns[0].time == "1:56 pm on 8 May, 2023"


def test_observations_about_the_speaker_of_their_last_turn(write):
    dialogue, = locomo.load(path=write(ENTRY))
    assert [turn.observations for turn in dialogue.turns] == [
        ("Ann was at sea.", "Ann liked it."), ("Bob is polite.",), ()]
    dialogue, = locomo.load(path=write(changed("observation", remove=True)))
    assert not any(turn.observations for turn in dialogue.turns)


def test_a_turn_without_text_and_caption_is_left_out(write):
    dialogue, = locomo.load(path=write(changed("conversation", "session_10", 0, "text", value=" ")))
    assert [turn.id for turn in dialogue.turns] == ["D2:1", "D2:2"] and dialogue.questions[0].evidence == (
        "D2:1", "D2:2")


def test_questions(write):
    dialogue, = locomo.load(path=write(ENTRY), adversarial=True)
    assert [(question.id, question.answer, question.evidence) for question in dialogue.questions] == [
        ("conv-7:0", "2022", ("D2:1", "D10:1", "D2:2")),
        ("conv-7:1", "Rome", ("D2:2", "D10:1")),
        ("conv-7:2", "a; b", ()),
        ("conv-7:3", locomo.UNANSWERABLE, ("D2:1",)),
        ("conv-7:4", "No", ()),
        ("conv-7:5", "Rome", ()),
    ]
    dialogue, = locomo.load(path=write(ENTRY))
    assert [question.id[-1] for question in dialogue.questions] == ["0", "1", "2", "5"]


def test_splits_of_a_file(write):
    known = [changed("sample_id", value=name) for name in ("conv-50", "conv-26")]
    assert [dialogue.id for dialogue in locomo.load("test", write(*known))] == ["conv-50"]
    assert [dialogue.id for dialogue in locomo.load("all", write(*known))] == ["conv-50", "conv-26"]
    with pytest.raises(UsageError, match='no conversation of the split "val"'):
        locomo.load("val", write(*known))
    assert len(locomo.load("val", write(*known, ENTRY))) == 3  # a name LoCoMo does not have: no splits
    with pytest.raises(UsageError, match='no split "dev"'):
        locomo.load("dev", write(*known))


@pytest.mark.parametrize("entry, message", [
    (changed("conversation", "speaker_a", remove=True),
     'entry 1 (conv-7): "conversation" has no key "speaker_a"'),
    (changed("sample_id", remove=True), 'entry 1 has no key "sample_id"'),
    (changed("sample_id", value="conv-1"), 'entry 1: an earlier entry has the "sample_id" "conv-1"'),
    (changed("qa", value={}), 'entry 1 (conv-7): "qa" is not a list'),
    (changed("qa", 1, value="?"), "entry 1 (conv-7): question 1 is not an object"),
    (changed("qa", 1, "question", value=" "), 'entry 1 (conv-7): question 1: "question" is empty'),
    (changed("qa", 1, "answer", remove=True), 'entry 1 (conv-7): question 1 has no key "answer"'),
    (changed("qa", 1, "answer", value=[]), 'entry 1 (conv-7): question 1: "answer" is not text or a number'),
    (changed("qa", 1, "answer", value=float("nan")),
     'entry 1 (conv-7): question 1: "answer" is nan, not text or a finite number'),
    (changed("qa", 4, "answer", value=float("-inf")),
     'entry 1 (conv-7): question 4: "answer" is -inf, not text or a finite number'),
    (changed("qa", 1, "category", value=9),
     'entry 1 (conv-7): question 1: "category" is 9, not one of 1 to 5'),
    (changed("conversation", "session_2_date_time", remove=True),
     'entry 1 (conv-7): "conversation" has no key "session_2_date_time"'),
    (changed("conversation", "session_2", 1, "text", remove=True),
     'entry 1 (conv-7): session_2, turn 1 (D2:2) has no key "text"'),
    (changed("conversation", "session_2", 1, "speaker", value="Eve"),
     'entry 1 (conv-7): session_2, turn 1 (D2:2): the speaker "Eve" is neither "Ann" nor "Bob"'),
    (changed("conversation", "session_2", 1, "dia_id", value="D2:1"),
     'entry 1 (conv-7): session_2, turn 1: an earlier turn has the "dia_id" "D2:1"'),
    (changed("conversation", value={"speaker_a": "Ann", "speaker_b": "Bob", "session_1_date_time": "today"}),
     'entry 1 (conv-7): "conversation" has no turn'),
    (changed("conversation", "speaker_b", value=" Ann"),
     'entry 1 (conv-7): "conversation": "speaker_a" and "speaker_b" are both "Ann"'),
    (changed("observation", "session_2_observation", "Ann", value="?"),
     'entry 1 (conv-7): "observation": session_2_observation: "Ann" is not a list'),
    (3, "entry 1 is not an object"),
])
def test_malformed_entries_are_named(write, entry, message):
    path = write(changed("sample_id", value="conv-1"), entry)
    with pytest.raises(UsageError) as error:
        locomo.load(path=path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_malformed_files(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    for path in (tmp_path / "x.json", tmp_path, tmp_path / "absent.json"):
        with pytest.raises(UsageError, match="^" + str(path)):
            locomo.load(path=path)


@FUZZ
@given(mutated(ENTRY, "conv-26", "D2:1", "Ann"))
def test_any_file_gives_dialogues_or_a_usage_error(tmp_path_factory, entry):
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(json.dumps([entry]))
    try:
        dialogue, = locomo.load(path=path, adversarial=True)
        assert all(turn.speaker in dialogue.speakers for turn in dialogue.turns)
        assert all(question.text and question.answer for question in dialogue.questions)
        "".join([turn.text for turn in dialogue.turns] + [q.answer for q in dialogue.questions]).encode()
    except UsageError as error:
        assert str(error).startswith(f"{path}: entry 0") and "\n" not in str(error)


REAL = real_file("locomo10.json")


@pytest.mark.skipif(REAL is None, reason="LoCoMo itself is not here (CC BY-NC, not in the repository)")
def test_the_published_file():
    dialogues = {split: locomo.load(split, REAL) for split in locomo.SPLITS}
    num = {split: sum(len(dialogue.questions) for dialogue in found) for split, found in dialogues.items()}
    assert num == {"train": 152, "val": 81, "test": 1307, "all": 1540}
    assert [len(dialogue.turns) for dialogue in dialogues["all"]] == [
        419, 369, 663, 629, 680, 675, 689, 681, 509, 568]
    assert sum(len({turn.session for turn in dialogue.turns}) for dialogue in dialogues["all"]) == 272
    categories = Counter(question.category for d in dialogues["test"] for question in d.questions)
    assert categories == {1: 239, 2: 258, 3: 83, 4: 727}
    everything = locomo.load("all", REAL, adversarial=True)
    questions = [question for dialogue in everything for question in dialogue.questions]
    assert Counter(question.category for question in questions) == {1: 282, 2: 321, 3: 96, 4: 841, 5: 446}
    assert len({question.id for question in questions}) == 1986
    assert sum(not question.evidence for question in questions) == 4
    assert [sum(len(turn.observations) for d in dialogues[split] for turn in d.turns) for split in locomo.SPLITS] == [
        182, 164, 2132, 2478]
    assert sum("[shares a photo: " in turn.text for d in dialogues["all"] for turn in d.turns) == 1226


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server in place of GitHub; `server(content)` sets its reply."""
    class Handler(http.server.BaseHTTPRequestHandler):
        content, length, pause = b"", None, 0

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(self.length))
            self.end_headers()
            time.sleep(self.pause)
            self.wfile.write(self.content)

        def log_message(self, *_):
            pass

    def give(content, length=None, pause=0):
        Handler.content, Handler.length, Handler.pause = content, length or len(content), pause

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    published = json.dumps([changed("sample_id", value="conv-26")]).encode()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEMORY_R1_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(locomo, "ADDRESS", f"http://127.0.0.1:{server.server_port}/locomo10.json")
    monkeypatch.setattr(locomo, "SHA256", hashlib.sha256(published).hexdigest())
    monkeypatch.setattr(files, "TIMEOUT", 0.5)
    give.published, give.cache = published, tmp_path / "cache"
    yield give
    server.shutdown()
    server.server_close()


def test_fetched_once(server):
    server(server.published)
    assert not server.cache.exists()
    assert locomo.load("train")[0].id == "conv-26"
    assert [path.name for path in server.cache.iterdir()] == ["locomo10.json"]
    server(b"gone")
    assert len(locomo.load("train")) == 1  # from the cache


@pytest.mark.parametrize("spoil", [
    lambda content: (content[:-1], None),  # a short file
    lambda content: (content[:-9], len(content)),  # a connection that breaks off
    lambda content: (content + b" ", None),
    lambda content: (content.replace(b"Rome", b"Oslo"), None),
    lambda content: (content, None, 1),  # a server that stops replying
])
def test_a_wrong_file_leaves_nothing_behind(server, spoil):
    server(*spoil(server.published))
    with pytest.raises(UsageError) as error:
        locomo.load("train")
    assert locomo.ADDRESS in str(error.value) and str(server.cache / "locomo10.json") in str(error.value)
    assert "\n" not in str(error.value) and list(server.cache.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_offline(server, monkeypatch):
    monkeypatch.setattr(locomo, "ADDRESS", "http://127.0.0.1:1/locomo10.json")
    with pytest.raises(UsageError, match="could not be fetched.*refused.*put http://127.0.0.1:1/"):
        locomo.load("train")
    assert list(server.cache.iterdir()) == []
