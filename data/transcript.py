"""
Your own data: one conversation of two people, as plain text or as JSON.

    # 8 May 2023                                  the date of the following sessions; optional
    Jon: I have a dog named Buddy.
    Gina: Lovely! I bought
        a Kia car.                                an indented line, or one without a name, continues the turn

    Jon: I adopted another dog, Scout.            a blank line or a date begins a session

    [{"speaker": "Jon", "text": "I have a dog named Buddy.", "time": "8 May 2023"}, ...]
    {"turns": [{"speaker": "Jon", ...}, ...],
     "questions": [{"question": "Which dogs does Jon have?", "answer": "Buddy and Scout", "evidence": [1, 3]}, ...]}

In JSON, "time" is optional and a session ends where it changes. "evidence" numbers, from 1, the turns that contain the
answer: the Manager is trained on those. A file may have several objects with "turns", in a list or one per line.

`python manager.py FILE` reads it, `--data FILE` trains and evaluates on it. Every split is the whole file: held-out
scores are then scores on training data. The tiny model understands one plain statement per turn: use `--no-extract`.
"""
import re
from collections import Counter
from pathlib import Path

from data.dialogue import Dialogue, Question, Turn, UsageError
from data.files import clean, member, member_as_text, optional

KEYS = {"turns", "speaker", "text"}  # keys of an entry, which identify the format
CATEGORIES = {31: "your own"}  # the only category; no benchmark has its number


def load(split: str = "train", path: str | Path = "", entries: list | None = None) -> list[Dialogue]:
    """Load all conversations of a file, for any split. `entries`: its content if it is JSON; without, it is text."""
    if entries is None:
        return [make_dialogue(Path(path).stem, plain_turns(path), {}, str(path))]
    entries = entries if "turns" in entries[0] else [{"turns": entries}]
    places = [f"{path}: entry {i}" for i in range(len(entries))]
    return [make_dialogue(f"{Path(path).stem}-{i}", json_turns(entry, where), entry, where)
            for i, (entry, where) in enumerate(zip(entries, places, strict=True))]


def is_plain_text(path: str | Path) -> bool:
    """Return whether a file does not begin like JSON, so that it can only be a transcript in plain text."""
    try:
        with open(path, "rb") as file:
            return file.read(4096).decode("utf-8-sig", "ignore").lstrip()[:1] not in ("", "[", "{")
    except OSError:
        return False  # reading the whole file will report the error


def plain_turns(path) -> list[list]:
    """Return [where, session, speaker, time, text] of each turn of a text file."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as text in UTF-8 ({error})") from None
    turns, session, time, is_new = [], 0, "", True
    for number, line in enumerate(lines, 1):
        where, date = f"{path}: line {number}", re.match(r"#\s(.*)", line)
        named = re.match(r"([^\s:#][^:]{0,39}):(?!\S)(.*)", line)
        if date or not line.strip():
            time, is_new = clean(date[1]) if date else time, True
        elif named:
            session, is_new = session + is_new, False
            turns.append([where, session, clean(named[1]), time, clean(named[2])])
        elif is_new:
            raise UsageError(f'{where} begins a session, so it must read "Name: what was said"')
        else:
            turns[-1][-1] = f"{turns[-1][-1]} {clean(line)}".strip()
    return turns


def json_turns(entry, where: str) -> list[list]:
    """Return [where, session, speaker, time, text] of each turn of an entry."""
    turns = []
    for number, raw in enumerate(member(entry, "turns", list, where), 1):
        place = f"{where}: turn {number}"
        speaker, text = member(raw, "speaker", str, place), member(raw, "text", str, place)
        time = optional(raw, "time", str, place, "")
        session = turns[-1][1] + (turns[-1][3] != time) if turns else 1
        turns.append([place, session, speaker, time, text])
    return turns


def make_dialogue(name: str, raws: list[list], entry: dict, where: str) -> Dialogue:
    """Return the turns, numbered within their sessions, and the questions of the entry. UsageError unless two speak."""
    speakers, turns, sizes = list(dict.fromkeys(raw[2] for raw in raws)), [], Counter()
    for place, session, speaker, time, text in raws:
        if not speaker or not text:
            raise UsageError(f"{place}: {'a text' if speaker else 'the name of a speaker'} is missing")
        if speaker not in speakers[:2]:
            raise UsageError(f'{place}: "{speaker}" is a third speaker besides {" and ".join(speakers[:2])} '
                             "(in plain text, indent lines that continue a turn)")
        sizes[session] += 1
        turns.append(Turn(f"D{session}:{sizes[session]}", session, speaker, text, time))
    if len(speakers) < 2:
        raise UsageError(f"{where}: {f'only {speakers[0]} speaks' if speakers else 'nobody speaks'}, but two must")
    questions = [make_question(raw, f"{name}:{i}", turns, f"{where}: question {i}")
                 for i, raw in enumerate(optional(entry, "questions", list, where, []), 1)]
    return Dialogue(name, tuple(speakers), tuple(turns), tuple(questions))


def make_question(raw, name: str, turns: list[Turn], where: str) -> Question:
    text, answer = member(raw, "question", str, where), member_as_text(raw, "answer", where)
    evidence = optional(raw, "evidence", list, where, [])
    for number in evidence:
        if type(number) is not int or not 1 <= number <= len(turns):
            raise UsageError(f'{where}: "evidence" has {number!r}, not the number of a turn, 1 to {len(turns)}')
    return Question(name, text, answer, next(iter(CATEGORIES)), tuple(turns[number - 1].id for number in evidence))
