"""
Predictions in the files that the evaluation scripts of other projects read: `evaluate.py --out x.json --export FORMAT`.

    mem0         x.SYSTEM.mem0.json         evaluation/evals.py of mem0ai/mem0
                 {conversation: [{"question", "answer", "category", "response"}]}
    locomo       x.SYSTEM.locomo.json       eval_question_answering in task_eval/evaluation.py of snap-research/locomo
                 [{"sample_id", "qa": [{"question", "answer", "category", "evidence",
                                        "prediction", "prediction_context": [dia_id of the memories, ...]}]}]
    longmemeval  x.SYSTEM.longmemeval.jsonl src/evaluation/evaluate_qa.py of xiaowu0162/LongMemEval
                 {"question_id", "hypothesis"} on each line
"""
import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from data import Dialogue, UsageError, longmemeval
from support.run import disk_errors, write_file

SUFFIXES = {"mem0": ".mem0.json", "locomo": ".locomo.json", "longmemeval": ".longmemeval.jsonl"}


def check_export(form: str, out: str | None, data: str, dialogues: Sequence[Dialogue]) -> None:
    """UsageError if predictions about these dialogues cannot be exported in this format."""
    categories = {question.category for dialogue in dialogues for question in dialogue.questions}
    fits = {"mem0": True, "locomo": data != "synthetic" and max(categories) <= 5,
            "longmemeval": categories <= longmemeval.CATEGORIES.keys()}
    if not out:
        raise UsageError(f"--export {form} needs --out FILE.json, next to which it writes")
    if not fits[form]:
        raise UsageError(f"--export {form}: {data} has other questions; give --export mem0 or another --data")


def mem0_item(line: dict, evidence: tuple) -> dict:
    return {"question": line["text"], "answer": line["gold"], "category": line["category"],
            "response": line["prediction"]}


def locomo_item(line: dict, evidence: tuple) -> dict:
    """The context is left out if it is empty, because LoCoMo's script looks at its first element."""
    context = {"prediction_context": line["context"]} if line.get("context") else {}
    return {"question": line["text"], "answer": line["gold"], "category": line["category"], "evidence": [*evidence],
            "prediction": line["prediction"], **context}


def export_predictions(form: str, out: str, dialogues: Sequence[Dialogue], lines: Sequence[dict]) -> Path:
    """Write the lines of one system, grouped by dialogue, next to the file `out`; return the path."""
    evidence = {(one.id, question.id): question.evidence for one in dialogues for question in one.questions}
    item = mem0_item if form == "mem0" else locomo_item
    groups = {name: [item(line, evidence[name, line["question"]]) for line in group]
              for name, group in groupby(lines, key=lambda line: line["dialogue"])}
    if form == "longmemeval":
        found = [{"question_id": line["question"], "hypothesis": line["prediction"]} for line in lines]
        content = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found)
    else:
        found = groups if form == "mem0" else [{"sample_id": name, "qa": items} for name, items in groups.items()]
        content = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
    system = re.sub(r"[^\w.]+", "-", lines[0]["system"]).strip("-")
    path = Path(out).with_suffix(f".{system}{SUFFIXES[form]}")
    with disk_errors(path.parent):
        write_file(path, content.encode("utf-8", "replace"))
    return path
