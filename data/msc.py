"""
Multi-Session Chat (arXiv 2107.07567) with the questions of MSC-Self-Instruct, the deep memory retrieval task of MemGPT
(arXiv 2310.08560): two strangers chat in five sessions, then one asks about an earlier statement. 500 dialogues.

    load("test")                                   # with questions; downloaded on first use (8.6 MB)
    load("test", path="msc_self_instruct.jsonl")   # a file of the same schema
    load("test", path="msc_dialogue/session_5/valid.txt")  # a file of MSC itself, without questions

For evaluation only, as in the paper (arXiv 2508.19828, zero-shot): `test` is the only split. Personas and summaries
contain the answers and are not read. As in the authors' pipeline, the last session is not read if there is a question
(it asks about the earlier ones), and the time of a session is its distance, "5 days 1 hour ago". The questions call the
speakers A and B; a prompt says who asks whom:
    Speaker 2 asks Speaker 1: Hey, remember that time we talked about music? What was the artist ...?
"""
from pathlib import Path

from data.dialogue import Dialogue, Question, Turn, UsageError
from data.files import cached_file, member, member_as_text, optional, read_dialogues, read_entries

ADDRESS = ("https://huggingface.co/datasets/MemGPT/MSC-Self-Instruct/resolve/5138f416f8fa76b75b2e080da87e8a8e346e1500/"
           "msc_self_instruct.jsonl")
SHA256 = "d3dbea36848b41dc46c0f1548d0ebf74eeaf6390d6f3fe9318e8480dc984495e"
KEYS = {"previous_dialogs", "dialog", "metadata", "self_instruct"}
SPEAKERS = ("Speaker 1", "Speaker 2")  # A and B in the questions
CATEGORIES = {21: "deep memory retrieval"}  # the only category; no other benchmark has its number


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
    """Return an entry, which without a question is also its own last session. Error messages begin with `where`."""
    name = member(member(entry, "metadata", dict, where), "initial_data_id", str, f'{where}: "metadata"')
    where = f"{where} ({name})"
    turns, questions = [], make_questions(entry, name, where)
    sessions = [*member(entry, "previous_dialogs", list, where), *([] if questions else [entry])]
    for number, session in enumerate(sessions, 1):
        inside = f"{where}: session {number}"
        raws = member(session, "dialog", list, inside)
        time = "today" if session is entry else member(session, "time_back", str, inside)
        found = (make_turn(raw, i, number, time, f"{inside}, turn {i}") for i, raw in enumerate(raws))
        turns += [turn for turn in found if turn.text]  # one turn of the training set has no text
    if not turns:
        raise UsageError(f'{where}: "previous_dialogs" have no turn')
    return Dialogue(name, SPEAKERS, tuple(turns), questions)


def make_turn(raw, i, session, time, where):
    """Return a turn. Only the last session names its speakers; in all sessions they alternate, Speaker 1 first."""
    text = member(raw, "text", str, where, may_be_empty=True)
    speaker = optional(raw, "id", str, where, SPEAKERS[i % 2])
    if speaker not in SPEAKERS:
        raise UsageError(f'{where}: "id" is "{speaker}", neither "Speaker 1" nor "Speaker 2"')
    return Turn(f"D{session}:{i + 1}", session, speaker, text, time)


def make_questions(entry, name, where):
    """Return the question of B to A, {"B": "Who?", "A": "Taylor Swift!"}; none in files of MSC itself."""
    pair, inside = optional(entry, "self_instruct", dict, where, None), f'{where}: "self_instruct"'
    if pair is None:
        return ()
    text, answer = member(pair, "B", str, inside), member_as_text(pair, "A", inside)
    return (Question(f"{name}:0", text, answer, 21, preface=f"{SPEAKERS[1]} asks {SPEAKERS[0]}:"),)
