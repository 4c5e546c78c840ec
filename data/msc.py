"""
Multi-Session Chat (arXiv 2107.07567) with the questions of MSC-Self-Instruct, the deep memory retrieval task of MemGPT
(arXiv 2310.08560): two strangers chat in five sessions, then one asks about an earlier statement. 500 dialogues.

    load("test")                                   # with questions; downloaded on first use (8.6 MB)
    load("test", path="msc_self_instruct.jsonl")   # a file of the same schema
    load("test", path="msc_dialogue/session_5/valid.txt")  # a file of MSC itself, without questions

For evaluation only, as in the paper (arXiv 2508.19828, zero-shot): `test` is the only split. Personas and summaries
contain the answers and are not read. The questions call the speakers A and B; the text says who asks whom:
    Speaker 2 asks Speaker 1: Hey, remember that time we talked about music? What was the artist ...?
MSC has no dates, only distances ("5 days 1 hour ago"): the last session is dated `LAST`.
"""
import re
from datetime import datetime, timedelta
from pathlib import Path

from data.dialogue import Dialogue, Question, Turn, UsageError
from data.files import cached_file, member, member_as_text, optional, read_dialogues, read_entries

ADDRESS = ("https://huggingface.co/datasets/MemGPT/MSC-Self-Instruct/resolve/5138f416f8fa76b75b2e080da87e8a8e346e1500/"
           "msc_self_instruct.jsonl")
SHA256 = "d3dbea36848b41dc46c0f1548d0ebf74eeaf6390d6f3fe9318e8480dc984495e"
KEYS = {"previous_dialogs", "dialog", "metadata", "self_instruct"}
SPEAKERS = ("Speaker 1", "Speaker 2")  # A and B in the questions
CATEGORIES = {21: "deep memory retrieval"}  # the only category; no other benchmark has its number
LAST = datetime(2021, 7, 1, 12)


def load(split: str = "test", path: str | Path | None = None, entries: list | None = None) -> list[Dialogue]:
    """
    Load all dialogues, in file order. Without a path: the published questions. `entries`: the content of the file if it
    has been read already.
    """
    if split != "test":
        raise UsageError(f'MSC has no split "{split}": it is for evaluation, all of it is "test"')
    path = path or cached_file("msc_self_instruct.jsonl", "MSC-Self-Instruct", ADDRESS, SHA256)
    return read_dialogues(entries or read_entries(path), path, "initial_data_id", make_dialogue)


def make_dialogue(entry, where):
    """Return one entry, which is also its own last session, as a Dialogue. Error messages begin with `where`."""
    name = member(member(entry, "metadata", dict, where), "initial_data_id", str, f'{where}: "metadata"')
    where = f"{where} ({name})"
    turns = []
    for number, session in enumerate([*member(entry, "previous_dialogs", list, where), entry], 1):
        inside = f"{where}: session {number}"
        raws = member(session, "dialog", list, inside)
        time = format_time(LAST if session is entry else LAST - time_back(session, inside))
        found = (make_turn(raw, i, number, time, f"{inside}, turn {i}") for i, raw in enumerate(raws))
        turns += [turn for turn in found if turn.text]  # one turn of the training set has no text
    if not turns:
        raise UsageError(f'{where}: "dialog" and "previous_dialogs" have no turn')
    return Dialogue(name, SPEAKERS, tuple(turns), make_questions(entry, name, where))


def make_turn(raw, i, session, time, where):
    """Return a turn. Only the last session names its speakers; in all sessions they alternate, Speaker 1 first."""
    text = member(raw, "text", str, where, may_be_empty=True)
    speaker = optional(raw, "id", str, where, SPEAKERS[i % 2])
    if speaker not in SPEAKERS:
        raise UsageError(f'{where}: "id" is "{speaker}", neither "Speaker 1" nor "Speaker 2"')
    return Turn(f"D{session}:{i + 1}", session, speaker, text, time)


def time_back(session, where):
    """Return the time between a session and the last: {"time_back": "5 days 1 hour ago"} -> 5 days, 1 hour"""
    text = member(session, "time_back", str, where)
    found = {f"{unit}s": int(number) for number, unit in re.findall(r"\b([0-9]{1,4}) (hour|day|week)s?\b", text)}
    if not found:
        raise UsageError(f'{where}: "time_back" is "{text}", not a time like "5 days 1 hour ago"')
    return timedelta(**found)


def format_time(time):
    """Write a time in LoCoMo's format: "1:56 pm on 8 May, 2023" """
    return f"{time:%I:%M %p}".lstrip("0").lower() + f" on {time.day} {time:%B}, {time.year}"


def make_questions(entry, name, where):
    """Return the question of B to A, {"B": "Who?", "A": "Taylor Swift!"}; none in files of MSC itself."""
    pair, inside = optional(entry, "self_instruct", dict, where, None), f'{where}: "self_instruct"'
    if pair is None:
        return ()
    text = f"{SPEAKERS[1]} asks {SPEAKERS[0]}: {member(pair, 'B', str, inside)}"
    return (Question(f"{name}:0", text, member_as_text(pair, "A", inside), 21),)
