"""
Multi-Session Chat (arXiv 2107.07567), with the questions of MSC-Self-Instruct, or deep memory retrieval (MemGPT, arXiv
2310.08560): 500 times two strangers chat in five sessions, then one asks the other about something said before.

    load("test")                                   # the questions; fetched on first use (8.6 MB)
    load("test", path="msc_self_instruct.jsonl")   # a file of the same schema
    load("test", path="msc_dialogue/session_5/valid.txt")  # the chats alone, of MSC itself

For evaluation alone, as in the paper (arXiv 2508.19828, zero-shot): there is no other split. Personas and summaries are
never read, as they hold the answers. The question set knows speakers as A and B, and who "you" is must be said:
    Speaker 2 asks Speaker 1: Hey, remember that time we talked about music? What was the artist ...?
MSC has no dates, only distances ("5 days 1 hour ago"): here the last session takes place at `LAST`.
"""
import re
from datetime import datetime, timedelta
from pathlib import Path

from data import Dialogue, Question, Turn, UsageError
from data.locomo import by_id, cached_file, member, read

ADDRESS = ("https://huggingface.co/datasets/MemGPT/MSC-Self-Instruct/resolve/5138f416f8fa76b75b2e080da87e8a8e346e1500/"
           "msc_self_instruct.jsonl")
SHA256 = "d3dbea36848b41dc46c0f1548d0ebf74eeaf6390d6f3fe9318e8480dc984495e"
SIZE = 8_600_000  # bytes, at most

KEYS = {"previous_dialogs", "dialog", "metadata", "self_instruct"}
SPEAKERS = ("Speaker 1", "Speaker 2")  # A and B of the question set
CATEGORIES = {21: "deep memory retrieval"}  # one for all; the number keeps clear of the other benchmarks'
LAST = datetime(2021, 7, 1, 12)


def load(split: str = "test", path: str | Path | None = None, entries: list | None = None) -> list[Dialogue]:
    """
    All dialogues, in the order of the file. Without a path: the question set, from the cache.
    `entries`: what the file at `path` holds, if it has been read already.
    """
    if split != "test":
        raise UsageError(f'MSC has no split "{split}": it is for evaluation, all of it is "test"')
    path = path or cached_file("msc_self_instruct.jsonl", "MSC-Self-Instruct", ADDRESS, SHA256, SIZE)
    return list(by_id(entries or read(path), path, "initial_data_id", dialogue_of).values())


def dialogue_of(entry, where):
    """One entry of the file, which is its own last session, as a Dialogue. `where` begins the line of every error."""
    name = member(member(entry, "metadata", dict, where), "initial_data_id", str, f'{where}: "metadata"')
    where = f"{where} ({name})"
    turns = []
    for number, session in enumerate([*member(entry, "previous_dialogs", list, where), entry], 1):
        inside = f"{where}: session {number}"
        raws = member(session, "dialog", list, inside)
        time = written(LAST if session is entry else LAST - distance(session, inside))
        found = (turn_of(raw, i, number, time, f"{inside}, turn {i}") for i, raw in enumerate(raws))
        turns += [turn for turn in found if turn.text]  # a turn of the training set says nothing
    if not turns:
        raise UsageError(f'{where}: "dialog" and "previous_dialogs" have no turn')
    return Dialogue(name, SPEAKERS, tuple(turns), questions_of(entry, name, where))


def turn_of(raw, i, session, time, where):
    """A turn. Only in the last session it says whose it is; everywhere the speakers alternate, Speaker 1 first."""
    text = member(raw, "text", str, where, may_be_empty=True)
    speaker = member(raw, "id", str, where) if raw.get("id") is not None else SPEAKERS[i % 2]
    if speaker not in SPEAKERS:
        raise UsageError(f'{where}: "id" is "{speaker}", neither "Speaker 1" nor "Speaker 2"')
    return Turn(f"D{session}:{i + 1}", session, speaker, text, time)


def distance(session, where):
    """The time from a session to the last. {"time_back": "5 days 1 hour ago"} -> timedelta(days=5, hours=1)"""
    text = member(session, "time_back", str, where)
    found = {unit: int(number) for number, unit in re.findall(r"\b([0-9]{1,4}) (hour|day|week)s?\b", text)}
    if not found:
        raise UsageError(f'{where}: "time_back" is "{text}", not the like of "5 days 1 hour ago"')
    return timedelta(**{f"{unit}s": number for unit, number in found.items()})


def written(time):
    """A moment as LoCoMo writes it: "1:56 pm on 8 May, 2023" """
    return f"{time:%I:%M %p}".lstrip("0").lower() + f" on {time.day} {time:%B}, {time.year}"


def questions_of(entry, name, where):
    """The question of B to A, or none in MSC itself. {"B": "Who?", "A": "Taylor Swift!"}"""
    if entry.get("self_instruct") is None:
        return ()
    pair, inside = member(entry, "self_instruct", dict, where), f'{where}: "self_instruct"'
    text = f"{SPEAKERS[1]} asks {SPEAKERS[0]}: {member(pair, 'B', str, inside)}"
    return (Question(f"{name}:0", text, str(member(pair, "A", (str, int, float), inside)), 21),)
