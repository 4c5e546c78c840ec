"""
A newcomer's own data: one conversation of two people, as plain text or as JSON.

    # 8 May 2023                                  the date of all sessions from here on; may be left out
    Jon: I have a dog named Buddy.
    Gina: Lovely! I bought
        a Kia car.                                a line that is indented or has no name goes on with the turn before

    Jon: I adopted another dog, Scout.            a blank line, or one with a date, begins a session

    [{"speaker": "Jon", "text": "I have a dog named Buddy.", "time": "8 May 2023"}, ...]
    {"turns": [{"speaker": "Jon", ...}, ...],
     "questions": [{"question": "Which dogs does Jon have?", "answer": "Buddy and Scout", "evidence": [1, 3]}, ...]}

In JSON a session ends where "time" changes; "time" may be left out. "evidence" numbers, from 1, the turns that hold the
answer: the Manager is trained on those. Several objects with "turns" may stand in a list, or one to a line.

`python manager.py FILE` reads it, `--data FILE` trains and evaluates on it. Every split is the whole file: training has
seen what it calls held out, so measure with another. The tiny model follows one plain statement a turn: `--no-extract`.
"""
import re
from collections import Counter
from pathlib import Path

from data import Dialogue, Question, Turn, UsageError
from data.locomo import clean, member

KEYS = {"turns", "speaker", "text"}  # of an entry, to tell the format from others
CATEGORIES = {31: "your own"}  # one for all; the number keeps clear of the benchmarks'


def load(split: str = "train", path: str | Path = "", entries: list | None = None) -> list[Dialogue]:
    """The conversations of a file, whatever the split. `entries`: what it holds if it is JSON; without, it is text."""
    if entries is None:
        return [dialogue_of(Path(path).stem, plain_turns(path), {}, str(path))]
    entries = entries if "turns" in entries[0] else [{"turns": entries}]
    return [dialogue_of(f"{Path(path).stem}-{i}", json_turns(entry, f"{path}: entry {i}"), entry, f"{path}: entry {i}")
            for i, entry in enumerate(entries)]


def is_plain(path: str | Path) -> bool:
    """Whether a file is no JSON of objects or lists, so that it can only be a transcript in plain text."""
    try:
        with open(path, "rb") as file:
            return file.read(4096).decode("utf-8-sig", "ignore").lstrip()[:1] not in ("", "[", "{")
    except OSError:
        return False  # whoever reads it all will say so


def plain_turns(path) -> list[list]:
    """[place, session, speaker, time, text] of each turn of a text."""
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
    """[place, session, speaker, time, text] of each turn of an entry."""
    turns = []
    for number, raw in enumerate(member(entry, "turns", list, where), 1):
        place = f"{where}: turn {number}"
        speaker, text = member(raw, "speaker", str, place), member(raw, "text", str, place)
        time = "" if raw.get("time") is None else member(raw, "time", str, place, may_be_empty=True)
        session = turns[-1][1] + (turns[-1][3] != time) if turns else 1
        turns.append([place, session, speaker, time, text])
    return turns


def dialogue_of(name: str, raws: list[list], entry: dict, where: str) -> Dialogue:
    """The turns, numbered in their sessions, and the questions of the entry. Exactly two people speak."""
    speakers, turns, sizes = list(dict.fromkeys(speaker for _, _, speaker, _, _ in raws)), [], Counter()
    for place, session, speaker, time, text in raws:
        if not speaker or not text:
            raise UsageError(f"{place}: {'a text' if speaker else 'the name of a speaker'} is missing")
        if speaker not in speakers[:2]:
            others = " and ".join(speakers[:2])
            raise UsageError(f'{place}: "{speaker}" is a third speaker beside {others} (in plain text, indent what is '
                             "no turn)")
        sizes[session] += 1
        turns.append(Turn(f"D{session}:{sizes[session]}", session, speaker, text, time))
    if len(speakers) < 2:
        raise UsageError(f"{where}: {f'only {speakers[0]} speaks' if speakers else 'nobody speaks'}, but two must")
    raws = member(entry, "questions", list, where) if entry.get("questions") is not None else []
    questions = [question_of(raw, f"{name}:{i}", turns, f"{where}: question {i}") for i, raw in enumerate(raws, 1)]
    return Dialogue(name, tuple(speakers), tuple(turns), tuple(questions))


def question_of(raw, name: str, turns: list[Turn], where: str) -> Question:
    text, answer = member(raw, "question", str, where), str(member(raw, "answer", (str, int, float), where))
    evidence = member(raw, "evidence", list, where) if raw.get("evidence") is not None else []
    for number in evidence:
        if type(number) is not int or not 1 <= number <= len(turns):
            raise UsageError(f'{where}: "evidence" has {number!r}, not the number of a turn, 1 to {len(turns)}')
    return Question(name, text, answer, next(iter(CATEGORIES)), tuple(turns[number - 1].id for number in evidence))
