"""
Statistics, tables, files and comparisons of an evaluation, computed from one line per answer. No model runs here.

A line of FILE.predictions.jsonl:

    {"system": "base", "dialogue": "conv-41", "question": "conv-41:7", "category": 2, "text": "When did ...",
     "gold": "7 May 2023", "prediction": "May 2023", "em": 0.0, "f1": 0.8, ..., "bank": {"size": 211, "ops": ...}}

`make_row` turns the lines of one system into its row of FILE.json, and the tables print rows.

The paper (arXiv 2508.19828, Table 1) permutes the names of LoCoMo's categories, and so does its authors' code. The
reports here use the numbers and print both names. F1 and BLEU-1 follow Mem0, as in the authors' code. `locomo_f1` is
the benchmark's own F1.
"""
import hashlib
import json
import string
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import Dialogue, UsageError, longmemeval, msc, transcript
from support.run import disk_errors, read_rows, to_json_safe, warn_once, write_file

METRICS = ("em", "f1", "bleu1", "f1_locomo", "judge")
OPERATIONS = ("ADD", "UPDATE", "DELETE", "NOOP")
LINE_KEYS = {"system", "dialogue", "question", "text", "gold", "category", "em", "bank", "seconds"}
# Category number -> (name in the benchmark, name in the paper), in the order of the paper's table. Synthetic data uses
# the numbers of LoCoMo.
CATEGORY_NAMES = {
    1: ("multi-hop", "Single Hop"), 3: ("open-domain", "Multi-Hop"), 4: ("single-hop", "Open Domain"),
    2: ("temporal", "Temporal"), 5: ("adversarial", ""),
    **{number: (name, paper) for (number, name), paper in zip(
        longmemeval.CATEGORIES.items(), ("SSU", "SSP", "OD", "MS", "KU", "TR"), strict=True)},
    **{number: (name, "MSC") for number, name in msc.CATEGORIES.items()},
    **{number: (name, "") for number, name in transcript.CATEGORIES.items()}}
PAPER = Path(__file__).parents[1] / "data/paper.txt"  # the paper's Tables 1 and 3, with the columns of `category_table`
LEGEND = """\
EM: exact match, case and punctuation ignored. F1, BLEU-1: word overlap with the
reference answer (Mem0's definitions); F1 LoCoMo: that benchmark's own F1.
Brackets: 95 % bootstrap intervals over questions. bank: memories at the end.
ADD/UPD/DEL/NOOP: operations of the Manager. agree: turns whose edit equals the
reference operation. invalid: outputs without a readable answer. cut: prompts
that dropped memories to fit. All but bank, tokens and times are in percent.
ms: median/95th percentile. seconds in all: building banks and answering."""


# ------------------------------------------------------------------------------------------------ statistics

@lru_cache(maxsize=1)
def porter_stemmer():
    """Return nltk's Porter stemmer with a cache, or None without nltk, which is an optional extra."""
    try:
        from nltk.stem import PorterStemmer
    except ImportError:
        warn_once("the column F1 LoCoMo needs nltk's Porter stemmer: pip install nltk")
        return None
    return lru_cache(maxsize=1 << 16)(PorterStemmer().stem)


def locomo_words(text: str) -> Counter:
    """Count stems in lower case, without punctuation and articles: "The dogs, and 1,000" -> {dog: 1, 1000: 1}"""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return Counter(porter_stemmer()(word) for word in text.split() if word not in ("a", "an", "the", "and"))


def locomo_f1(prediction: str, reference: str, category: int | None = None) -> float:
    """
    F1 over multisets of stems, as in LoCoMo's task_eval/evaluation.py. Category 1: every comma-separated part of the
    reference is matched with the best part of the prediction, and the mean is returned. Category 3: only the reference
    before ';' counts. Category 5: 1.0 if the prediction says that there is no information.
    """
    if category == 5:
        return float(any(phrase in prediction.lower() for phrase in ("no information available", "not mentioned")))
    if category == 1:
        best = [max(locomo_f1(part, wanted) for part in prediction.split(",")) for wanted in reference.split(",")]
        return sum(best) / len(best)
    predicted, expected = map(locomo_words, (prediction, reference.split(";")[0] if category == 3 else reference))
    common = (predicted & expected).total()
    return 2 * common / (predicted.total() + expected.total()) if common else 0.0


@lru_cache(maxsize=32)
def resample_counts(n: int, seed: int, resamples: int) -> np.ndarray:
    """Draw n questions with replacement, `resamples` times. Returns how often each was drawn, (resamples, n)."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)])


def bootstrap_interval(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean. (n,) -> [low, high]"""
    means = resample_counts(len(values), seed, resamples) @ np.asarray(values, dtype=float) / len(values)
    return np.percentile(means, [2.5, 97.5]).tolist()


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median and 95th percentile; None without values."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95)} if len(values) else None


# ------------------------------------------------------------------------------------------------ from lines to rows

def group_by_category(lines: Sequence[dict]) -> dict[int, list[dict]]:
    """Group lines by category number, in the order of `CATEGORY_NAMES`."""
    groups = {number: [line for line in lines if line["category"] == number] for number in CATEGORY_NAMES}
    return {number: group for number, group in groups.items() if group}


def summarize(lines: Sequence[dict], seed: int) -> dict:
    """Number of questions, and mean and interval of each metric that all lines have."""
    values = {metric: [line.get(metric) for line in lines] for metric in METRICS}
    values = {metric: found for metric, found in values.items() if None not in found}
    return {"n": len(lines), "judge": None, **{metric: sum(found) / len(found) for metric, found in values.items()},
            "interval": {metric: bootstrap_interval(found, seed) for metric, found in values.items()}}


def make_row(system: dict, lines: Sequence[dict], seed: int) -> dict:
    """Report of one system, whose own fields come first. The Manager's percentiles are means over banks."""
    banks = list({line["dialogue"]: line["bank"] for line in lines}.values())
    calls = [bank["calls"] for bank in banks if bank.get("calls")]
    num_labeled = sum(bank.get("num_labeled", 0) for bank in banks)
    seconds = {part: [line["seconds"][part] for line in lines] for part in ("search", "answer")}
    latency = {"manager": {key: float(np.mean([call[key] for call in calls])) for key in calls[0]} if calls else None}
    return {**system, "overall": summarize(lines, seed),
            "by_category": {number: {"names": CATEGORY_NAMES[number], **summarize(group, seed)}
                            for number, group in group_by_category(lines).items()},
            "bank_size": sum(bank["size"] for bank in banks) / len(banks),
            "ops": dict(sum((Counter(bank.get("ops", {})) for bank in banks), Counter())),
            "agreement": sum(bank["num_matching"] for bank in banks) / num_labeled if num_labeled else None,
            "invalid_rate": sum(not line["is_valid"] for line in lines) / len(lines),
            "cut_rate": sum(line["dropped"] > 0 for line in lines) / len(lines),
            "manager_tokens": sum(bank.get("tokens", 0) for bank in banks),
            "answer_tokens": sum(line["tokens"] for line in lines),
            "at_once": max(line.get("at_once", 1) for line in lines),
            "latency": latency | {part: percentiles(values) for part, values in seconds.items()},
            "seconds": sum(bank.get("seconds", 0) for bank in banks) + sum(map(sum, seconds.values()))}


# ------------------------------------------------------------------------------------------------ tables

def format_score(part: dict, metric: str, with_interval: bool = True, form: str = ".1f") -> str:
    """'50.4 [45.6, 55.1]' in percent; '-' if it was not measured."""
    if part.get(metric) is None:
        return "-"
    low, high = (f"{100 * end:{form}}" for end in part["interval"][metric])
    return f"{100 * part[metric]:{form}}" + (f" [{low}, {high}]" if with_interval else "")


def format_rate(rate: float | None) -> str:
    """0.43 -> '43'; '-' for 0 as well as for None, so that columns without any event can be left out."""
    return f"{100 * rate:.0f}" if rate else "-"


def format_ops(ops: dict[str, int]) -> str:
    """{"ADD": 3, "NOOP": 1} -> '75/0/0/25'"""
    total = sum(ops.get(event, 0) for event in OPERATIONS)
    return "/".join(f"{100 * ops.get(event, 0) / total:.0f}" for event in OPERATIONS) if total else "-"


def format_latency(latency: dict[str, float] | None) -> str:
    return f"{1000 * latency['p50']:.1f}/{1000 * latency['p95']:.1f}" if latency else "-"


SCORE_COLUMNS = {
    "system": lambda row: row["system"],
    "EM": lambda row: format_score(row["overall"], "em"),
    "F1": lambda row: format_score(row["overall"], "f1"),
    "BLEU-1": lambda row: format_score(row["overall"], "bleu1", False),
    "F1 LoCoMo": lambda row: format_score(row["overall"], "f1_locomo", False),
    "judge": lambda row: format_score(row["overall"], "judge")}
MEMORY_COLUMNS = {
    "memory": lambda row: row["system"],
    "bank": lambda row: f"{row['bank_size']:.1f}",
    "ADD/UPD/DEL/NOOP": lambda row: format_ops(row["ops"]),
    "agree": lambda row: format_rate(row["agreement"]),
    "tokens": lambda row: f"{row['manager_tokens']:.0f}" if row["manager_tokens"] else "-",
    "ms a turn": lambda row: format_latency(row["latency"]["manager"])}
ANSWER_COLUMNS = {
    "answers": lambda row: row["system"],
    "invalid": lambda row: format_rate(row["invalid_rate"]),
    "cut": lambda row: format_rate(row["cut_rate"]),
    "tokens each": lambda row: f"{row['answer_tokens'] / row['overall']['n']:.1f}",
    "ms to search": lambda row: format_latency(row["latency"]["search"]),
    "ms to answer": lambda row: format_latency(row["latency"]["answer"]),
    "seconds in all": lambda row: f"{row['seconds']:.0f}"}


def align_columns(cells: Sequence[Sequence[str]]) -> str:
    """Align the first column left and the others right. Columns that hold only '-' are left out."""
    first, *others = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"-"}]
    columns = [[cell.ljust(max(map(len, first))) for cell in first],
               *([cell.rjust(max(map(len, column))) for cell in column] for column in others)]
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def format_table(rows: Sequence[dict], columns: dict) -> str:
    return align_columns([list(columns), *([show(row) for show in columns.values()] for row in rows)])


def category_table(rows: Sequence[dict]) -> str:
    """F1/BLEU-1, and the judge's score if there is one, by category and overall, in the layout of the paper."""
    metrics = [metric for metric in ("f1", "bleu1", "judge") if rows[0]["overall"][metric] is not None]
    heads = [("F1/BLEU-1/judge" if "judge" in metrics else "F1/BLEU-1", "  the paper's", "  questions"),
             *((*textwrap.wrap(f"{number} {part['names'][0]}", 14), part["names"][1], str(part["n"]))
               for number, part in rows[0]["by_category"].items()),
             ("overall", "Overall", str(rows[0]["overall"]["n"]))]
    height = max(map(len, heads))
    heads = [("",) * (height - len(head)) + head for head in heads]
    cells = [[row["system"], *("/".join(format_score(part, metric, False) for metric in metrics)
                               for part in (*row["by_category"].values(), row["overall"]))] for row in rows]
    return align_columns([*zip(*heads, strict=True), *cells])


def headline(benchmark: str, split: str, dialogues: Sequence[Dialogue], rows: Sequence[dict]) -> str:
    """Questions, dialogues and number of memories shown, printed above the tables."""
    num_turns = sum(len(dialogue.turns) for dialogue in dialogues) / len(dialogues)
    counts = " or ".join(dict.fromkeys(str(max(1, row["memories"] // 2)) for row in rows))
    named = " that the question names" if rows[0]["named_only"] else ""
    return (f"{benchmark}, split {split}: {rows[0]['overall']['n']} questions about {len(dialogues)} x {num_turns:.0f} "
            f"turns\nmemories shown: {counts} of each speaker{named}\n")


def format_tables(rows: Sequence[dict], with_paper: bool = False) -> str:
    """Every table of systems that were asked the same questions."""
    parts = [format_table(rows, SCORE_COLUMNS), category_table(rows), *([PAPER.read_text()] if with_paper else []),
             format_table(rows, MEMORY_COLUMNS), format_table(rows, ANSWER_COLUMNS)]
    at_once = max(row["at_once"] for row in rows)  # as recorded: answers may come from an earlier start
    note = f"(times are per item in batches of up to {at_once}; --at-once 1 times single calls)\n"
    return "\n\n".join(parts) + "\n" + (note if at_once > 1 else "")


# ------------------------------------------------------------------------------------------------ files

def predictions_path(path: str | Path) -> Path:
    """runs/x.json -> runs/x.predictions.jsonl"""
    return Path(path).with_suffix(".predictions.jsonl")


def line_key(line: dict) -> tuple:
    """The system and the question of a line."""
    return line["system"], line["dialogue"], line["question"], line["text"], line["gold"]


def checksum(parts) -> str:
    """A short SHA-256 of byte strings or tensors."""
    content = hashlib.sha256()
    for part in parts:
        content.update(part if isinstance(part, bytes) else part.detach().float().cpu().numpy().tobytes())
    return content.hexdigest()[:16]


def read_report(path: str | Path) -> dict:
    """Read FILE.json."""
    try:
        report = json.loads(Path(path).read_bytes())
        if all(row["overall"]["n"] and row["system"] for row in report["rows"]) and {"data", "split"} <= report.keys():
            return report
        reason = "it holds no results"
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "it holds no results"
    raise UsageError(f"{path}: cannot be read ({reason}); give a file that evaluate.py --out wrote")


def read_predictions(path: str | Path) -> list[dict]:
    """Read FILE.predictions.jsonl; a line that a kill cut short is skipped."""
    lines = read_rows(path)
    if any(not LINE_KEYS <= set(line) for line in lines):
        raise UsageError(f"{path} has lines that are no predictions: delete them, or the file")
    return lines


def replace_file(path: Path, text: str) -> None:
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode("utf-8", "replace"))


def write_report(path: str | None, report: dict) -> None:
    """Replace FILE.json, if the user named one."""
    if path:
        replace_file(Path(path), json.dumps(to_json_safe(report), indent=1, ensure_ascii=False) + "\n")


def write_predictions(path: str | None, lines: Iterable[dict]) -> None:
    """Replace FILE.predictions.jsonl, if the user named a file."""
    if path:
        replace_file(predictions_path(path), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def load_previous_predictions(path: str | None, report: dict) -> dict[tuple, dict]:
    """
    The lines of an earlier evaluation into FILE.json, by `line_key`. Their rows and settings are added to `report`.

    One rule keeps a file consistent: every system that has lines must have been evaluated with the settings of this
    evaluation. FILE.json records the shared "settings" and the "systems" {name: settings}, with checksums of weights
    and data. If they differ, the evaluation is refused and nothing is changed.
    """
    if not path:
        return {}
    previous = read_report(path) if Path(path).exists() else {}
    lines, recorded = read_predictions(predictions_path(path)), previous.get("systems", {})
    answered = list(dict.fromkeys(line["system"] for line in lines))
    for name in answered:
        before = previous.get("settings", {}) | recorded.get(name, {})
        wanted = to_json_safe(report["settings"] | report["systems"].get(name, recorded.get(name, {})))
        changed = [f"{key} was {before.get(key)}" for key, value in wanted.items() if before.get(key) != value]
        if changed:
            reason = ", ".join(changed) if name in recorded else f"{path} does not record them"
            raise UsageError(f"{predictions_path(path)}: {name!r} was evaluated with other settings ({reason}): "
                             "choose another --out, or delete that file")
    report["systems"] = recorded | report["systems"]
    report["rows"] = [row for row in previous.get("rows", []) if row["system"] in answered]
    if predictions_path(path).exists() and not predictions_path(path).read_bytes().endswith(b"\n"):
        write_predictions(path, lines)
    return {line_key(line): line for line in lines}


# ------------------------------------------------------------------------------------------------ comparison

def read_result(name: str) -> tuple[dict, dict[str, dict]]:
    """FILE.json or FILE.json:SYSTEM -> (report, {system: {question: line}})"""
    path, is_named, wanted = name.partition(".json:")
    path = f"{path}.json" if is_named else name
    report = read_report(path)
    sizes = {row["system"]: row["overall"]["n"] for row in report["rows"]}
    systems: dict[str, dict] = {system: {} for system in sizes if wanted in ("", system)}
    for line in read_predictions(predictions_path(path)):
        if line["system"] in systems:
            systems[line["system"]][line_key(line)[1:]] = line
    if not systems:
        there = ", ".join(sizes) or "none, because the evaluation was stopped early"
        raise UsageError(f"{path} has no system {wanted!r}: there is {there}")
    for system, lines in systems.items():
        if len(lines) < sizes[system]:
            raise UsageError(f"{predictions_path(path)} has {len(lines)} of the {sizes[system]} answers of {system}: "
                             "run that evaluation again, it continues from there")
    return report, systems


def compare(first: str, second: str, seed: int = 0) -> str:
    """Second result minus first, on the questions that both have, per system, overall and by category."""
    (report, ours), (other, theirs) = read_result(first), read_result(second)
    for key in ("data", "split"):
        if report[key] != other[key]:
            raise UsageError(f"{first} has {key} {report[key]}, {second} has {other[key]}: give two with the same")
    pairs = [(*ours, *theirs)] if len(ours) == len(theirs) == 1 else [(name, name) for name in ours if name in theirs]
    if not pairs:
        raise UsageError(f"{first} and {second} share no system: name one of each, as FILE.json:SYSTEM")
    tables = [paired_table(f"{b} minus {a}", ours[a], theirs[b], seed)
              for a, b in pairs if ours[a].keys() & theirs[b].keys()]
    if not tables:
        raise UsageError(f"{first} and {second} share no question: evaluate both with the same --seed and --category")
    return "\n\n".join([*tables, "in percentage points, with 95 % bootstrap intervals over the shared questions"])


def difference(line: dict, other: dict) -> dict:
    """The other line's metrics minus this line's. Verdicts of two different judges are not compared."""
    metrics = [metric for metric in METRICS if None not in (line.get(metric), other.get(metric))
               and (metric != "judge" or line.get("judge_model") == other.get("judge_model"))]
    return {"category": line["category"], **{metric: other[metric] - line[metric] for metric in metrics}}


def paired_table(title: str, ours: dict, theirs: dict, seed: int) -> str:
    lines = [difference(line, theirs[key]) for key, line in ours.items() if key in theirs]
    cells = [[title, "questions", "EM", "F1", "BLEU-1", "F1 LoCoMo", "judge"]]
    for number, group in {"overall": lines, **group_by_category(lines)}.items():
        part = summarize(group, seed)
        cells.append([f"{number} {CATEGORY_NAMES.get(number, ('',))[0]}".strip(), str(len(group)),
                      *(format_score(part, metric, form="+.1f") for metric in METRICS)])
    return align_columns(cells)
