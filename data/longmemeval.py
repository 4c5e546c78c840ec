"""
LongMemEval (arXiv 2410.10813): 500 questions of a user, each with its own dated chats between user and assistant.

    load("test")                    # the oracle file, only chats that matter; fetched on first use (15 MB)
    load("test", variant="s")       # some 48 chats a question (277 MB)
    load("test", path="mine.json")  # any file of the same schema

The benchmark is for evaluation alone: there is no other split. The paper (arXiv 2508.19828) takes the oracle file and
all of its questions, those without an answer included: their ids end in `_abs`, their answers say what is not known.
For a preference the answer is a description of a good reply. Ids and labels tell much (`answer_...` is a session with
the answer), so they stay out of every text; sessions and turns are numbered anew. A question reads
    Current date: 2023/04/10 (Mon) 23:07. What was the first issue I had with my new car after its first service?
"""
import re
from pathlib import Path

from data import Dialogue, Question, Turn, UsageError
from data.locomo import by_id, cached_file, member, read

ADDRESS = ("https://huggingface.co/datasets/xiaowu0162/longmemeval-cleaned/resolve/"
           "98d7416c24c778c2fee6e6f3006e7a073259d48f/")
FILES = {  # name, SHA-256, bytes
    "oracle": ("longmemeval_oracle.json", "821a2034d219ab45846873dd14c14f12cfe7776e73527a483f9dac095d38620c",
               15_388_478),
    "s": ("longmemeval_s_cleaned.json", "d6f21ea9d60a0d56f34a05b609c79c88a451d2ae03597821ea3d5a9678c3a442",
          277_383_467),
}
KEYS = {"question_id", "question_type", "question_date", "haystack_dates", "haystack_sessions"}
SPEAKERS = ("user", "assistant")
CATEGORIES = {  # LongMemEval names its types only; the numbers keep clear of LoCoMo's, the order is the paper's
    11: "single-session-user", 12: "single-session-preference", 13: "single-session-assistant",
    14: "multi-session", 15: "knowledge-update", 16: "temporal-reasoning",
}
NUMBERS = {name: number for number, name in CATEGORIES.items()}
DATE = re.compile(r"([0-9]{4})/([0-9]{2})/([0-9]{2}) \(\w+\) ([0-9]{2}):([0-9]{2})")  # 2023/04/10 (Mon) 23:07


def load(split: str = "test", path: str | Path | None = None, variant: str = "oracle",
         entries: list | None = None) -> list[Dialogue]:
    """
    All dialogues, one for each question, in the order of the file. Without a path: the published file of the variant,
    from the cache. `entries`: what the file at `path` holds, if it has been read already; the list is emptied.
    """
    if split != "test":
        raise UsageError(f'LongMemEval has no split "{split}": it is for evaluation, all of it is "test"')
    if path is None:
        file, sha256, size = FILES[variant]
        path = cached_file(file, f"LongMemEval ({variant})", ADDRESS + file, sha256, size)
    entries = entries or read(path)
    one_by_one = (entries.pop(0) for _ in range(len(entries)))  # and let go when read: S holds 280 MB of text
    return list(by_id(one_by_one, path, "question_id", dialogue_of).values())


def dialogue_of(entry, where):
    """
    One entry of the file as a Dialogue with one question. `where` begins the line of every error. The sessions come in
    the order of their dates, which the file does not keep; those dated after the question stay, as answers are in them.
    """
    name = member(entry, "question_id", str, where)
    where = f"{where} ({name})"
    turns, evidence = [], []
    for number, (date, raws, inside) in enumerate(sorted(sessions_of(entry, where), key=lambda one: one[0]), 1):
        for i, raw in enumerate(raws):
            turn = turn_of(raw, i, number, date, f"{inside}, turn {i}")
            if turn.text:  # S has 12 turns that say nothing
                turns.append(turn)
                evidence += [turn.id] if raw.get("has_answer") is True else []
    if not turns:
        raise UsageError(f'{where}: "haystack_sessions" has no turn')
    return Dialogue(name, SPEAKERS, tuple(turns), (question_of(entry, name, tuple(evidence), where),))


def sessions_of(entry, where):
    """[(date, raw turns, place)] in the order of the file. Found by place: the ids of S are not unique."""
    dates, sessions = (member(entry, key, list, where) for key in ("haystack_dates", "haystack_sessions"))
    if len(dates) != len(sessions):
        raise UsageError(f'{where}: "haystack_dates" has {len(dates)} dates for {len(sessions)} of "haystack_sessions"')
    found = []
    for i, (date, raws) in enumerate(zip(dates, sessions, strict=True)):
        inside = f"{where}: session {i}"
        pair = {"haystack_dates": date, "haystack_sessions": raws}
        date = member(pair, "haystack_dates", str, inside)
        if not DATE.fullmatch(date):  # of this form, earlier dates come first in the order of the alphabet
            raise UsageError(f'{inside}: "haystack_dates" has "{date}", not the like of "2023/04/10 (Mon) 23:07"')
        found.append((date, member(pair, "haystack_sessions", list, inside), inside))
    return found


def turn_of(raw, i, session, date, where):
    """A turn. Either side may open a session, and speak twice in a row."""
    role = member(raw, "role", str, where)
    if role not in SPEAKERS:
        raise UsageError(f'{where}: "role" is "{role}", neither "user" nor "assistant"')
    return Turn(f"D{session}:{i + 1}", session, role, member(raw, "content", str, where, may_be_empty=True), date)


def question_of(entry, name, evidence, where):
    """The question with the day it is asked on, before which "last month" or "ago" mean nothing."""
    kind = member(entry, "question_type", str, where)
    if kind not in NUMBERS:
        raise UsageError(f'{where}: "question_type" is "{kind}", not one of {", ".join(NUMBERS)}')
    text = f"Current date: {member(entry, 'question_date', str, where)}. {member(entry, 'question', str, where)}"
    answer = str(member(entry, "answer", (str, int, float), where))
    return Question(name, text, answer, NUMBERS[kind], evidence)
