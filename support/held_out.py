"""
Records of held-out conversations: the Manager's edits in each turn, and the final questions with their answers.
Training writes them to held_out.jsonl, evaluate.py writes FILE.banks.jsonl; support/story.py shows them.
"""
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data import UsageError
from support import report
from support.run import append_rows, read_config, read_rows

AGENTS = {"manager": "Memory Manager", "answer": "Answer Agent"}


def turn_records(dialogue, build) -> dict:
    """
    A conversation with the edits of each turn, None if the output was invalid. `build`: a manager.BankBuild. UPDATE and
    DELETE name a memory by its id; the memories of ADD have the ids 0, 1, ... "skipped": operations not applied.
    """
    turns = [{"id": turn.id, "speaker": turn.speaker, "time": turn.time, "text": turn.text,
              "known": turn.operation and asdict(turn.operation), "edits": edits and [asdict(edit) for edit in edits]}
             for turn, edits in zip(dialogue.turns, build.edits, strict=True)]
    for turn, one, (case, _, completion) in zip(turns, build.edits, build.outputs, strict=False):  # a baseline has none
        turn |= {"facts": case.facts, "related": [memory.id for memory in case.shown()],
                 "output": completion.text if completion else "", "skipped": getattr(one, "skipped", 0)}
    return {"dialogue": dialogue.id, "speakers": dialogue.speakers, "turns": turns}


def held_out_records(dialogues: Sequence, builds: Sequence, answers: Iterable, metrics: dict[str, Callable]) -> list:
    """
    Lines of held_out.jsonl: `turn_records` with the final questions. `answers`: (answer.AnswerPrompt, answer.Answer) of
    every question of every dialogue; `metrics`: answer.REWARDS. Retrieved memories are in the order of the prompt.
    """
    answers, records = iter(answers), []
    for dialogue, build in zip(dialogues, builds, strict=True):
        questions = []
        for question, (prompt, given) in zip(dialogue.final_questions(), answers, strict=False):
            ids = [memory.id for memory in prompt.shown]
            questions.append({
                "id": question.id, "text": question.text, "gold": question.answer, "retrieved": ids,
                "selected": [ids[i - 1] for i in prompt.selected_by(given)], "output": given.output,
                "answer": given.text, "is_valid": given.is_valid,
                **{name: metrics[name](given.text, question.answer) for name in ("em", "f1")}})
        records.append({**turn_records(dialogue, build), "questions": questions})
    return records


def append_banks(path: str | None, source: str, dialogues: Sequence, builds: Sequence) -> None:
    """Append the banks of a source of memories to FILE.banks.jsonl; nothing without FILE.json."""
    if path:
        append_rows(report.beside(path, "banks"), [{"source": source, **turn_records(dialogue, build)}
                                                   for dialogue, build in zip(dialogues, builds, strict=True)])


@dataclass(frozen=True)
class Pair:
    """Two systems on the same conversations: {system: {dialogue id: record}}. `source` of a record names its bank."""
    title: str
    systems: dict[str, dict[str, dict]]


def read_run(folder: str, names: Sequence[str] = ()) -> Pair:
    """Two held-out evaluations of a run, by default of the untrained and the trained agent. UsageError without them."""
    config, systems, names = read_config(folder), defaultdict(dict), names or ("untrained", "trained")
    if config["agent"] not in AGENTS:
        raise UsageError(f"{folder} has trained both agents: give FILE.json of evaluate.py --out with its adapters")
    frozen = f"bank of {config.get('manager_adapter') or 'the base model'}, for both"  # in training of the Answer Agent
    for row in read_rows(Path(folder, "held_out.jsonl")):  # the last line counts if a resumed run wrote it again
        source = row["eval"] if config["agent"] == "manager" else frozen
        systems[row["eval"]][row["dialogue"]] = row | {"source": source}
    if missing := [name for name in names if name not in systems]:
        raise UsageError(f"{folder} has no held-out conversations of {' and '.join(missing)}; it has "
                         f"{', '.join(systems) or 'none'}: finish the run with --resume, or train without --eval 0")
    title = f"{AGENTS[config['agent']]}, {config['algo'].upper()}, {config['steps']} steps: {' and '.join(names)}"
    return Pair(title, {name: systems[name] for name in names})


def read_evaluation(path: str, names: Sequence[str] = ()) -> Pair:
    """Two systems of FILE.json; by default the first and the last of those that answer the first one's questions."""
    banks = {(row["source"], row["dialogue"]): row for row in read_rows(report.beside(path, "banks"))}
    systems = defaultdict(dict)
    for line in report.read_predictions(path).values():
        key = (line["settings"]["source"], line["dialogue"])
        bank = banks.get(key, {"speakers": [], "turns": []})
        record = systems[line["system"]].setdefault(line["dialogue"], {**bank, "source": key[0], "questions": []})
        record["questions"].append(line | {"id": line["question"], "answer": line["prediction"]})
    if not systems:
        raise UsageError(f"{path} has no answers: give the folder of a run, or FILE.json of evaluate.py --out")
    if unknown := [name for name in names if name not in systems]:
        raise UsageError(f"--systems {' '.join(unknown)}: {path} has {', '.join(systems)}")
    first, *others = names or systems
    asked = {name: {dialogue: [question["id"] for question in record["questions"]] for dialogue, record in own.items()}
             for name, own in systems.items()}
    comparable = [name for name in others if asked[name] == asked[first]]
    if not comparable:
        raise UsageError(f"{path}: no other system was asked the questions of {first}; give two others with --systems")
    return Pair(f"{first} and {comparable[-1]}", {name: systems[name] for name in (first, comparable[-1])})


def mean_score(records: Iterable[dict], metric: str) -> float:
    scores = [question[metric] for record in records for question in record["questions"]]
    return sum(scores) / max(1, len(scores))


def typical_dialogue(pair: Pair) -> str:
    """The conversation whose difference in exact match between the systems is closest to the mean difference."""
    first, last = pair.systems.values()
    gains = {name: mean_score([last[name]], "em") - mean_score([first[name]], "em") for name in first}
    mean = sum(gains.values()) / len(gains)
    return min(gains, key=lambda name: abs(gains[name] - mean))


def replay(turns: Sequence[dict]) -> tuple[list[list[dict] | None], dict[int, dict]]:
    """
    The changes of each turn (None if invalid), and the bank after the last: {id: {"text", "time"}}. A change is an edit
    with the id of its memory, for ADD too, and with the `old` text.
    """
    bank, next_id, steps = {}, 0, []
    for turn in turns:
        steps.append(None if turn["edits"] is None else [])
        for edit in turn["edits"] or []:
            id = next_id if edit["event"] == "ADD" else edit["id"]
            steps[-1].append({**edit, "id": id, "old": bank[id]["text"] if id in bank else ""})
            next_id += edit["event"] == "ADD"
            if edit["event"] == "DELETE":
                del bank[id]
            elif edit["event"] != "NOOP":
                bank[id] = {"text": edit["text"], "time": turn["time"]}
    return steps, bank


def is_reference(changes: Sequence[dict] | None, known: dict) -> bool:
    """Whether the changes of a turn are exactly its reference operation, as BankBuild.num_matching counts it."""
    return [(one["event"], one["old"], one["text"]) for one in changes or ()] == [
        (known["event"], known["old_memory"], known["text"])]


def memories_of(question: dict, bank: dict[int, dict]) -> list[tuple[int, str, bool]]:
    """(id, text, whether it was selected) of each retrieved memory. Predictions name the selected ones by text."""
    selected = question["selected"]
    found = [(id, bank[id]["text"]) for id in question.get("retrieved", ()) if id in bank]
    return ([(id, text, id in selected or text in selected) for id, text in found]
            or [(i, text, True) for i, text in enumerate(selected) if isinstance(text, str)])
