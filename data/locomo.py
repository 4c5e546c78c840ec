"""
LoCoMo (arXiv 2402.17753): ten long conversations of two people over months, and questions about them.

    load("train")                         # conv-26, 152 questions; the file is downloaded on first use
    load("test", path="my_locomo.json")   # any file of the same schema

The paper (arXiv 2508.19828) splits by conversation: one for training, one for validation, eight for testing, all
without category 5. Categories: 1 multi-hop, 2 temporal, 3 open-domain, 4 single-hop, 5 adversarial.
The data is CC BY-NC 4.0 and not part of this repository. A turn with a photo contains its caption:
    What a day! [shares a photo: a photo of a dog on a beach]
"""
import re
from dataclasses import replace
from pathlib import Path

from data.dialogue import Dialogue, Question, Turn, UsageError
from data.files import cached_file, clean, member, member_as_text, optional, read_dialogues, read_entries

ADDRESS = "https://raw.githubusercontent.com/snap-research/locomo/main/data/locomo10.json"
SHA256 = "79fa87e90f04081343b8c8debecb80a9a6842b76a7aa537dc9fdf651ea698ff4"
KEYS = {"sample_id", "conversation", "qa"}  # keys of an entry, which identify the format
SPLITS = {"train": ("conv-26",), "val": ("conv-30",),
          "test": ("conv-41", "conv-42", "conv-43", "conv-44", "conv-47", "conv-48", "conv-49", "conv-50")}
SPLITS["all"] = SPLITS["train"] + SPLITS["val"] + SPLITS["test"]
UNANSWERABLE = "Not mentioned in the conversation"  # the correct answer in category 5, in LoCoMo's words


def load(split: str = "train", path: str | Path | None = None, adversarial: bool = False,
         entries: list | None = None) -> list[Dialogue]:
    """
    Load the dialogues of a split, in file order. Without a path: the published file. A file with a sample_id that
    LoCoMo does not have is your own: every split is the whole file. `adversarial` adds category 5. `entries`: the
    content of the file if it has been read already.
    """
    if split not in SPLITS:
        raise UsageError(f'LoCoMo has no split "{split}": choose one of {", ".join(SPLITS)}')
    path = path or cached_file("locomo10.json", "LoCoMo", ADDRESS, SHA256)
    dialogues = read_dialogues(entries or read_entries(path), path, "sample_id",
                               lambda entry, where: make_dialogue(entry, where, adversarial))
    if not {dialogue.id for dialogue in dialogues} <= set(SPLITS["all"]):
        return dialogues
    chosen = [dialogue for dialogue in dialogues if dialogue.id in SPLITS[split]]
    if not chosen:
        wanted = ", ".join(SPLITS[split])
        raise UsageError(f'{path}: no conversation of the split "{split}" ({wanted}): choose another split')
    return chosen


def make_dialogue(entry, where, adversarial):
    """Return one entry of the file as a Dialogue. Error messages begin with `where`."""
    name = member(entry, "sample_id", str, where)
    where = f"{where} ({name})"
    conversation = member(entry, "conversation", dict, where)
    inside = f'{where}: "conversation"'
    speakers = tuple(member(conversation, key, str, inside) for key in ("speaker_a", "speaker_b"))
    if speakers[0] == speakers[1]:
        raise UsageError(f'{inside}: "speaker_a" and "speaker_b" are both "{speakers[0]}"')
    # conv-26 has dates of 16 sessions that do not exist, so sessions are found by their own keys
    keys = [key for key in conversation if re.fullmatch(r"session_[0-9]{1,6}", key)]
    turns = {}
    for key in sorted(keys, key=lambda key: int(key[8:])):
        time = member(conversation, f"{key}_date_time", str, inside)
        for i, raw in enumerate(member(conversation, key, list, inside)):
            turn = make_turn(raw, int(key[8:]), time, speakers, f"{where}: {key}, turn {i}")
            if turn.id in turns:
                raise UsageError(f'{where}: {key}, turn {i}: an earlier turn has the "dia_id" "{turn.id}"')
            if turn.text:
                turns[turn.id] = turn
    add_observations(turns, optional(entry, "observation", dict, where, {}), f'{where}: "observation"')
    if not turns:
        raise UsageError(f"{inside} has no turn")
    questions = [make_question(raw, f"{name}:{i}", turns, f"{where}: question {i}")
                 for i, raw in enumerate(member(entry, "qa", list, where))]
    questions = [question for question in questions if adversarial or question.category != 5]
    return Dialogue(name, speakers, tuple(turns.values()), tuple(questions))


def make_turn(raw, session, time, speakers, where):
    """Return a turn. A photo is recognised by its caption: 316 turns have a caption but no address."""
    name = member(raw, "dia_id", str, where)
    where = f"{where} ({name})"
    speaker = member(raw, "speaker", str, where)
    if speaker not in speakers:
        raise UsageError(f'{where}: the speaker "{speaker}" is neither "{speakers[0]}" nor "{speakers[1]}"')
    text = member(raw, "text", str, where, may_be_empty=True)
    caption = optional(raw, "blip_caption", str, where, "")
    return Turn(name, session, speaker, f"{text} [shares a photo: {caption}]".strip() if caption else text, time)


def add_observations(turns, sessions, where):
    """Add to `turns` what was observed about their speakers: {session: {speaker: [[text, turn id or ids], ...]}}"""
    rows = [(speaker, row) for name in sessions for speaker in member(sessions, name, dict, where)
            for row in member(sessions[name], speaker, list, f"{where}: {name}")]
    for speaker, row in rows:
        text, ids = row if isinstance(row, list) and len(row) == 2 else ("", [])
        text = clean(text) if isinstance(text, str) else ""
        turn = turns.get("".join(find_evidence(ids if isinstance(ids, list) else [ids], turns)[-1:]))
        if text and turn and turn.speaker == speaker:
            turns[turn.id] = replace(turn, observations=(*turn.observations, text))


def make_question(raw, name, turns, where):
    """Return a question. Its name counts all questions of the conversation, adversarial ones included."""
    text, category = member(raw, "question", str, where), member(raw, "category", int, where)
    if not 1 <= category <= 5:
        raise UsageError(f'{where}: "category" is {category}, not one of 1 to 5')
    if category == 5 and raw.get("answer") is None:
        answer = UNANSWERABLE  # the key `adversarial_answer` holds a wrong answer
    else:
        answer = member_as_text(raw, "answer", where)
    return Question(name, text, answer, category, find_evidence(optional(raw, "evidence", list, where, []), turns))


def find_evidence(evidence, turns):
    """Return ids of turns: ["D8:6; D9:17", "D:11:26", "D30:05", "D"] -> ("D8:6", "D9:17", "D11:26", "D30:5")"""
    texts = " ".join(item for item in evidence if isinstance(item, str))
    pairs = re.findall(r"D:?([0-9]{1,6}):([0-9]{1,6})", texts)
    ids = (f"D{int(session)}:{int(turn)}" for session, turn in pairs)
    return tuple(dict.fromkeys(id for id in ids if id in turns))
