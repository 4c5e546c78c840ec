"""
LongMemEval (arXiv 2410.10813): 500 questions of a user, each with its own dated chats between user and assistant.

    load("test")                    # the oracle file: chats with evidence only; downloaded on first use (15 MB)
    load("test", variant="s")       # about 48 chats per question (277 MB)
    load("test", path="mine.json")  # any file of the same schema

The benchmark is for evaluation only: `test` is the only split. The paper (arXiv 2508.19828) uses the oracle file with
all questions. Those without an answer have ids that end in `_abs`; their answer says which information is missing. The
answer of a preference question describes a good reply. The ids in the file reveal the evidence ("answer_..."), so no
text contains them, and sessions and turns are numbered again. As in the authors' pipeline, sessions keep the order of
the file, and both roles share one bank (`banks_of`). Theirs does not show the date of a question; here a prompt reads
    Current date: 2023/04/10 (Mon) 23:07. What was the first issue I had with my new car after its first service?
"""
from pathlib import Path

from data.dialogue import Dialogue, Question, Turn, UsageError
from data.files import cached_file, member, member_as_text, read_dialogues, read_entries

ADDRESS = ("https://huggingface.co/datasets/xiaowu0162/longmemeval-cleaned/resolve/"
           "98d7416c24c778c2fee6e6f3006e7a073259d48f/")
FILES = {  # name, SHA-256
    "oracle": ("longmemeval_oracle.json", "821a2034d219ab45846873dd14c14f12cfe7776e73527a483f9dac095d38620c"),
    "s": ("longmemeval_s_cleaned.json", "d6f21ea9d60a0d56f34a05b609c79c88a451d2ae03597821ea3d5a9678c3a442"),
}
KEYS = {"question_id", "question_type", "question_date", "haystack_dates", "haystack_sessions"}
SPEAKERS = ("user", "assistant")
CATEGORIES = {  # LongMemEval only names its types; these numbers differ from LoCoMo's and follow the paper's order
    11: "single-session-user", 12: "single-session-preference", 13: "single-session-assistant",
    14: "multi-session", 15: "knowledge-update", 16: "temporal-reasoning",
}
NUMBERS = {name: number for number, name in CATEGORIES.items()}


def load(split: str = "test", path: str | Path | None = None, variant: str = "oracle",
         entries: list | None = None) -> list[Dialogue]:
    """
    Load all dialogues, one per question, in file order. Without a path: the published file of the variant.
    `entries`: the content of the file if it has been read already; the list is emptied.
    """
    if split != "test":
        raise UsageError(f'LongMemEval has no split "{split}": it is for evaluation, all of it is "test"')
    if path is None:
        file, sha256 = FILES[variant]
        path = cached_file(file, f"LongMemEval ({variant})", ADDRESS + file, sha256)
    entries = entries or read_entries(path)
    one_by_one = (entries.pop(0) for _ in range(len(entries)))  # frees each entry when it is read: S has 280 MB of text
    return read_dialogues(one_by_one, path, "question_id", make_dialogue)


def make_dialogue(entry, where):
    """
    Return one entry of the file as a Dialogue with one question. Error messages begin with `where`. Sessions after the
    date of the question are kept, as some contain evidence.
    """
    name = member(entry, "question_id", str, where)
    where = f"{where} ({name})"
    turns, evidence = [], []
    for number, (date, raws, inside) in enumerate(read_sessions(entry, where), 1):
        for i, raw in enumerate(raws):
            turn = make_turn(raw, f"D{number}:{i + 1}", number, date, f"{inside}, turn {i}")
            if turn.text:  # S has 12 turns without text
                turns.append(turn)
                evidence += [turn.id] if raw.get("has_answer") is True else []
    if not turns:
        raise UsageError(f'{where}: "haystack_sessions" has no turn')
    return Dialogue(name, SPEAKERS, tuple(turns), (make_question(entry, name, tuple(evidence), where),))


def read_sessions(entry, where):
    """Return [(date, turns, where)] in file order. Sessions are matched by position: the ids in S are not unique."""
    dates, sessions = (member(entry, key, list, where) for key in ("haystack_dates", "haystack_sessions"))
    if len(dates) != len(sessions):
        raise UsageError(f'{where}: "haystack_dates" has {len(dates)} dates for {len(sessions)} of "haystack_sessions"')
    found = []
    for i, (date, session) in enumerate(zip(dates, sessions, strict=True)):
        inside, pair = f"{where}: session {i}", {"haystack_dates": date, "haystack_sessions": session}
        date = member(pair, "haystack_dates", str, inside)
        found.append((date, member(pair, "haystack_sessions", list, inside), inside))
    return found


def make_turn(raw, name, session, date, where):
    """Return a turn. Either speaker may begin a session or speak twice in a row."""
    role = member(raw, "role", str, where)
    if role not in SPEAKERS:
        raise UsageError(f'{where}: "role" is "{role}", neither "user" nor "assistant"')
    return Turn(name, session, role, member(raw, "content", str, where, may_be_empty=True), date)


def make_question(entry, name, evidence, where):
    """Return the question with its date: "last month" or "ago" depend on it."""
    kind = member(entry, "question_type", str, where)
    if kind not in NUMBERS:
        raise UsageError(f'{where}: "question_type" is "{kind}", not one of {", ".join(NUMBERS)}')
    text, answer = member(entry, "question", str, where), member_as_text(entry, "answer", where)
    preface = f"Current date: {member(entry, 'question_date', str, where)}."
    return Question(name, text, answer, NUMBERS[kind], evidence, preface=preface)
