"""
LoCoMo (arXiv 2402.17753): ten long conversations of two people over months, and questions about them.

    load("train")                         # conv-26, 152 questions; the file is fetched on first use
    load("test", path="my_locomo.json")   # any file of the same schema

The paper (arXiv 2508.19828) splits by conversation: one trains, one validates, eight test, without
category 5. Categories: 1 multi-hop, 2 temporal, 3 open-domain, 4 single-hop, 5 adversarial.
The data is CC BY-NC 4.0, so it is no part of this repository. A turn with a photo reads
    What a day! [shares a photo: a photo of a dog on a beach]
The other benchmarks use `cached_file`, `read`, `by_id` and `member` too.
"""
import hashlib
import http.client
import json
import os
import re
import sys
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

from data import Dialogue, Question, Turn, UsageError

ADDRESS = "https://raw.githubusercontent.com/snap-research/locomo/main/data/locomo10.json"
SHA256 = "79fa87e90f04081343b8c8debecb80a9a6842b76a7aa537dc9fdf651ea698ff4"
SIZE = 2_805_274  # bytes
TIMEOUT = 20  # seconds without an answer until the network counts as absent

KEYS = {"sample_id", "conversation", "qa"}  # of an entry, to tell the format from others
SPLITS = {
    "train": ("conv-26",),
    "val": ("conv-30",),
    "test": ("conv-41", "conv-42", "conv-43", "conv-44", "conv-47", "conv-48", "conv-49", "conv-50"),
}
SPLITS["all"] = SPLITS["train"] + SPLITS["val"] + SPLITS["test"]
UNANSWERABLE = "Not mentioned in the conversation"  # the right reply in category 5, as LoCoMo words it


def load(split: str = "train", path: str | Path | None = None, adversarial: bool = False,
         entries: list | None = None) -> list[Dialogue]:
    """
    The dialogues of a split, in the order of the file. Without a path: the published file, from the cache.
    A file with any sample_id unknown to LoCoMo is the user's own: all of it belongs to every split.
    `adversarial` adds category 5, whose answer is `UNANSWERABLE` where the file gives none.
    `entries`: what the file at `path` holds, if it has been read already.
    """
    if split not in SPLITS:
        raise UsageError(f'LoCoMo has no split "{split}": choose one of {", ".join(SPLITS)}')
    path = path or cached_file("locomo10.json", "LoCoMo", ADDRESS, SHA256, SIZE)
    dialogues = by_id(entries or read(path), path, "sample_id",
                      lambda entry, where: dialogue_of(entry, where, adversarial))
    if not set(dialogues) <= set(SPLITS["all"]):
        return list(dialogues.values())
    chosen = [dialogue for name, dialogue in dialogues.items() if name in SPLITS[split]]
    if not chosen:
        wanted = ", ".join(SPLITS[split])
        raise UsageError(f'{path}: no conversation of the split "{split}" ({wanted}): choose another split')
    return chosen


def cached_file(file: str, title: str, address: str, sha256: str, size: int) -> Path:
    """A published file in the cache folder, fetched if it is not there."""
    folder = Path(os.environ.get("MEMORY_R1_DATA") or "~/.cache/memory-r1").expanduser()
    path = folder / file
    if not os.path.exists(path):
        fetch(path, title, address, sha256, size)
    return path


def fetch(path, title, address, sha256, size):
    """Downloads at most `size` bytes to `path`, which then holds the whole, checked file; else nothing is there."""
    print(f"fetching {title} ({size / 1e6:.1f} MB) to {path}", file=sys.stderr)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            content = response.read(size + 1)  # one byte more, to notice a longer file
        if hashlib.sha256(content).hexdigest() != sha256:
            raise OSError(f"{len(content)} bytes came that are not the published file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the content
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:
        reason = f"{title} is not at {path} and could not be fetched ({error})"
        raise UsageError(f"{reason}: put {address} there, or name a file with --data") from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def read(path: str | Path) -> list:
    """The entries of a file, a JSON list or one JSON object a line, not looked into yet."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        try:
            entries = json.loads(text)
            entries = [entries] if isinstance(entries, dict) else entries
        except ValueError:
            if not text.lstrip().startswith("{"):
                raise
            # one to a line: a JSON string has no line break inside
            entries = json.loads("[" + text.strip().replace("\n", ",\n") + "]")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is neither JSON nor one JSON object a line ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: is not a list of conversations")
    return entries


def by_id(entries: Iterable, path: str | Path, key: str, dialogue_of: Callable) -> dict[str, Dialogue]:
    """{id: dialogue} in the order of the file, by `dialogue_of(entry, place)`; refuses an id (its `key`) twice."""
    dialogues = {}
    for i, entry in enumerate(entries):
        dialogue = dialogue_of(entry, f"{path}: entry {i}")
        if dialogue.id in dialogues:  # the ids of questions, and whose memory is whose, hang on it
            raise UsageError(f'{path}: entry {i}: an earlier entry has the "{key}" "{dialogue.id}"')
        dialogues[dialogue.id] = dialogue
    return dialogues


def dialogue_of(entry, where, adversarial):
    """One entry of the file as a Dialogue. `where` begins the line of every error."""
    name = member(entry, "sample_id", str, where)
    where = f"{where} ({name})"
    conversation = member(entry, "conversation", dict, where)
    inside = f'{where}: "conversation"'
    speakers = tuple(member(conversation, key, str, inside) for key in ("speaker_a", "speaker_b"))
    # conv-26 has dates of 16 sessions that do not exist, so the sessions are found by their own keys
    keys = [key for key in conversation if re.fullmatch(r"session_[0-9]{1,6}", key)]
    turns = {}
    for key in sorted(keys, key=lambda key: int(key[8:])):
        time = member(conversation, f"{key}_date_time", str, inside)
        for i, raw in enumerate(member(conversation, key, list, inside)):
            turn = turn_of(raw, int(key[8:]), time, speakers, f"{where}: {key}, turn {i}")
            if turn.id in turns:
                raise UsageError(f'{where}: {key}, turn {i}: an earlier turn has the "dia_id" "{turn.id}"')
            turns[turn.id] = turn
    if not turns:
        raise UsageError(f"{inside} has no turn")
    questions = [question_of(raw, f"{name}:{i}", turns, f"{where}: question {i}")
                 for i, raw in enumerate(member(entry, "qa", list, where))]
    questions = [question for question in questions if adversarial or question.category != 5]
    return Dialogue(name, speakers, tuple(turns.values()), tuple(questions))


def turn_of(raw, session, time, speakers, where):
    """A turn, the photo in words: 316 turns have a caption and no address, so the caption is what counts."""
    name = member(raw, "dia_id", str, where)
    where = f"{where} ({name})"
    speaker = member(raw, "speaker", str, where)
    if speaker not in speakers:
        raise UsageError(f'{where}: the speaker "{speaker}" is neither "{speakers[0]}" nor "{speakers[1]}"')
    text = member(raw, "text", str, where, may_be_empty=True)
    if raw.get("blip_caption") is not None:
        caption = member(raw, "blip_caption", str, where, may_be_empty=True)
        text = f"{text} [shares a photo: {caption}]".strip() if caption else text
    return Turn(name, session, speaker, text, time)


def question_of(raw, name, turns, where):
    """A question, named by its place among all of the conversation's, adversarial ones included."""
    text = member(raw, "question", str, where)
    category = member(raw, "category", int, where)
    if not 1 <= category <= 5:
        raise UsageError(f'{where}: "category" is {category}, not one of 1 to 5')
    if category == 5 and raw.get("answer") is None:
        answer = UNANSWERABLE  # `adversarial_answer` is the trap, not the answer
    else:
        answer = str(member(raw, "answer", (str, int, float), where))
    evidence = member(raw, "evidence", list, where) if raw.get("evidence") is not None else []
    return Question(name, text, answer, category, evidence_of(evidence, turns))


def evidence_of(evidence, turns):
    """["D8:6; D9:17", "D:11:26", "D30:05", "D"] -> ("D8:6", "D9:17", "D11:26", "D30:5"), of the turns."""
    texts = " ".join(item for item in evidence if isinstance(item, str))
    found = re.findall(r"D:?([0-9]{1,6}):([0-9]{1,6})", texts)
    ids = (f"D{int(session)}:{int(turn)}" for session, turn in found)
    return tuple(dict.fromkeys(name for name in ids if name in turns))


def member(node, key, kind, where, may_be_empty=False):
    """node[key] of the kind that is due, text cleaned; else the error that names place and key."""
    if not isinstance(node, dict):
        raise UsageError(f"{where} is not an object")
    if key not in node:
        raise UsageError(f'{where} has no key "{key}"')
    value = node[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = {str: "text", int: "a whole number", list: "a list", dict: "an object"}
        raise UsageError(f'{where}: "{key}" is not {kinds.get(kind, "text or a number")}')
    value = clean(value) if isinstance(value, str) else value
    if value == "" and not may_be_empty:
        raise UsageError(f'{where}: "{key}" is empty')
    return value


def clean(text):
    """
    White space folded, and what nobody sees removed: zero-width spaces (joiners stay: emoji need them) and
    halves of surrogate pairs, which no tokenizer and no file takes.
    """
    if not text.isascii():
        text = re.sub("[\u200b\u2060\ufeff]", "", text.encode("utf-8", "ignore").decode())
    return " ".join(text.split())
