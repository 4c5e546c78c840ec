"""
evaluate.py with banks that are filled session by session: docs/results.md, by hand.

    python tests/benchmarks/session_banks.py --data locomo --split val --model $QWEN --memories 8 --max-new-tokens 256 \
        --max-answer-tokens 40 --manager base runs/manager-qwen --answer base runs/both-qwen --out runs/banks.json

Takes evaluate.py's flags, of which --out is required, and --sessions N: only the first N, and the questions about them.
Each session starts with an empty bank, so that all sessions advance in one batch; evaluate.py fills the bank of a whole
conversation turn by turn, which takes hours on a CPU. Questions are answered from the union of the banks of a
conversation. At the end it prints for how many questions turns with evidence are behind the memories in the prompt. A
memory counts for the turn that first wrote its text.
"""
import argparse
import sys
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data
import evaluate
import manager
from support import report


def first_sessions(dialogue: data.Dialogue, count: int) -> data.Dialogue:
    """The first sessions of a conversation, with the questions whose evidence they hold."""
    numbers = sorted({turn.session for turn in dialogue.turns})[:count]
    turns = tuple(turn for turn in dialogue.turns if turn.session in numbers)
    inside = {turn.id for turn in turns}
    return replace(dialogue, turns=turns, questions=tuple(
        question for question in dialogue.final_questions() if {*question.evidence} <= inside))


def banks_by_session(agent, dialogues, embedder, progress="", build_banks=manager.build_banks):
    """`manager.build_banks` on each session alone, then the same edits again on one bank for each conversation."""
    sessions = [replace(dialogue, turns=tuple(turns)) for dialogue in dialogues
                for _, turns in groupby(dialogue.turns, key=lambda turn: turn.session)]
    parts, edits, added = build_banks(agent, sessions, embedder, progress), {}, Counter()
    for session, part in zip(sessions, parts, strict=True):
        first = added[session.id]  # the memories of a session have ids from here on
        for turn, some in zip(session.turns, part.edits, strict=True):
            edits[session.id, turn.id] = some and [
                edit if edit.id is None else replace(edit, id=first + edit.id) for edit in some]
            added[session.id] += sum(edit.event == "ADD" for edit in some or [])
    builds = manager.build_in_lockstep(dialogues, embedder, lambda batch: [
        edits[dialogue.id, turn.id] for _, dialogue, turn in batch])
    for dialogue, build in zip(dialogues, builds, strict=True):
        own = [part for session, part in zip(sessions, parts, strict=True) if session.id == dialogue.id]
        build.ops, build.outputs = sum((part.ops for part in own), Counter()), sum((part.outputs for part in own), [])
        writers = {}
        for turn in dialogue.turns:
            for edit in edits[dialogue.id, turn.id] or []:
                writers.setdefault(edit.text, turn.id)
        build.sources = {memory.id: {writers[memory.text]} for memory in build.bank}
    texts = [memory.text for build in builds for memory in build.bank]
    print(f"{len(texts)} memories, {sum(len({one.text for one in build.bank}) for build in builds)} distinct, "
          f"{sum(len(text.split()) for text in texts)} words;", manager.bank_report(builds))
    return builds


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--sessions", type=int)
    own, flags = parser.parse_known_args()
    args, load, systems = evaluate.arguments(flags), data.load, {}
    if not args.out:
        parser.error("give --out")
    if own.sessions:
        data.load = lambda *args, **options: [first_sessions(one, own.sessions) for one in load(*args, **options)]
    manager.build_banks = banks_by_session
    evaluate.main(flags)
    evidence = {(dialogue.id, question.id): {*question.evidence} for dialogue in data.load(args.data, args.split)
                for question in dialogue.final_questions()}
    for line in report.read_predictions(args.out).values():
        wanted = evidence[line["dialogue"], line["question"]]
        systems.setdefault(line["system"], []).append((wanted, {*line["context"]}))
    for system, pairs in systems.items():
        print(f"{system}: of {len(pairs)} questions {sum(bool(own & shown) for own, shown in pairs)} have evidence in "
              f"the prompt, {sum(bool(own) and own <= shown for own, shown in pairs)} have all of it")


if __name__ == "__main__":
    main()
