"""
Statistics, tables, files and comparisons of an evaluation, computed from one line per answer. No model runs here.

A line of FILE.predictions.jsonl:

    {"system": "base", "dialogue": "conv-41", "question": "conv-41:7", "category": 2, "text": "When did ...",
     "gold": "7 May 2023", "prediction": "May 2023", "em": 0.0, "f1": 0.8, ..., "bank": {"size": 211, "ops": ...}}

`make_row` turns the lines of one system into its row of FILE.json, and the tables print rows. The paper (arXiv
2508.19828, Table 1) permutes the names of LoCoMo's categories, and so does its authors' code. The reports here use the
numbers and print both names.
"""
import hashlib
import json
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import numpy as np

from data import Dialogue, UsageError, longmemeval, msc, transcript
from support.run import disk_errors, read_rows, to_json_safe, warn_once, write_file

METRICS = {"em": "EM", "f1": "F1", "bleu1": "BLEU-1", "f1_locomo": "F1 LoCoMo"}
JUDGE = "judge "  # begins the names of the metrics that judges add to the lines, such as "judge gpt-4o-mini"
OPERATIONS = ("ADD", "UPDATE", "DELETE", "NOOP")
# Category number -> (name in the benchmark, name in the paper), in the order of the paper's table. Synthetic data uses
# the numbers of LoCoMo.
CATEGORY_NAMES = {
    1: ("multi-hop", "Single Hop"), 3: ("open-domain", "Multi-Hop"), 4: ("single-hop", "Open Domain"),
    2: ("temporal", "Temporal"), 5: ("adversarial", ""),
    **{number: (name.removeprefix("single-session-"), paper) for (number, name), paper in zip(
        longmemeval.CATEGORIES.items(), ("SSU", "SSP", "OD", "MS", "KU", "TR"), strict=True)},
    **{number: (name, "MSC") for number, name in msc.CATEGORIES.items()},
    **{number: (name, "") for number, name in transcript.CATEGORIES.items()}}
PAPER = Path(__file__).parents[1] / "data/paper.txt"  # the paper's Tables 1 and 3, with the columns of `category_table`
LEGEND = """\
EM: exact match, case and punctuation ignored. F1, BLEU-1: word overlap with the
reference answer (Mem0's definitions); F1 LoCoMo: that benchmark's own F1.
Brackets: 95 % bootstrap intervals over questions. bank: memories at the end.
ADD/UPD/DEL/NOOP: operations of the Manager. agree: turns whose edit equals the
reference operation. lost: facts, operations and outputs of the Manager that
cannot be used. invalid: outputs without a readable answer. cut: prompts that
dropped memories to fit. All numbers but bank and times are in percent.
ms: median/95th percentile; each prompt counts as its batch's time divided
equally, so give --at-once 1 to time single calls. Fact extraction is not timed."""


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
        return fmean(max(locomo_f1(part, wanted) for part in prediction.split(",")) for wanted in reference.split(","))
    predicted, expected = map(locomo_words, (prediction, reference.split(";")[0] if category == 3 else reference))
    common = (predicted & expected).total()
    return 2 * common / (predicted.total() + expected.total()) if common else 0.0


def bootstrap_interval(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean. (n,) -> [low, high]"""
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))  # with replacement
    return np.percentile(np.asarray(values, dtype=float)[drawn].mean(axis=1), [2.5, 97.5]).tolist()


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile; 0 without values."""
    return {f"p{q}": float(np.percentile(seconds or [0], q)) for q in (50, 95)}


def metrics_in(line: dict) -> dict[str, str]:
    """{metric: its name in a table} of the metrics in a line or a summary, those of judges last."""
    return {metric: METRICS.get(metric, metric) for metric in (*METRICS, *line)
            if metric in line and (metric in METRICS or metric.startswith(JUDGE))}


def summarize(lines: Sequence[dict], seed: int) -> dict:
    """Number of questions, mean and interval of each metric that all lines have; "judge" repeats the last judge's."""
    part = {"n": len(lines), "judge": None, "interval": {}}
    for metric in metrics_in(lines[0]):
        values = [line.get(metric) for line in lines]
        if None not in values:
            part[metric], part["interval"][metric] = fmean(values), bootstrap_interval(values, seed)
            if metric.startswith(JUDGE):
                part["judge"], part["interval"]["judge"] = part[metric], part["interval"][metric]
    return part


def summarize_by_category(lines: Sequence[dict], seed: int) -> dict[int, dict]:
    """{category number: summary}, in the order of `CATEGORY_NAMES`."""
    groups = {number: [line for line in lines if line["category"] == number] for number in CATEGORY_NAMES}
    return {number: {"names": CATEGORY_NAMES[number], **summarize(group, seed)}
            for number, group in groups.items() if group}


def longmemeval_parts(lines: Sequence[dict], by_category: dict, seed: int) -> dict[str, dict]:
    """LongMemEval also reports the mean over its types, and the questions that cannot be answered (ids in _abs)."""
    if not by_category.keys() <= longmemeval.CATEGORIES.keys():
        return {}
    parts = by_category.values()
    means = {metric: fmean(part[metric] for part in parts) for metric in (*METRICS, "judge")
             if all(part.get(metric) is not None for part in parts)}
    unanswerable = [line for line in lines if line["question"].endswith("_abs")]
    return {"task_averaged": {"n": len(lines), "judge": None, **means},
            **({"abstention": summarize(unanswerable, seed)} if unanswerable else {})}


def make_row(lines: Sequence[dict], seed: int) -> dict:
    """The row of one system in FILE.json; its settings come first."""
    by_category = summarize_by_category(lines, seed)
    banks = list({line["dialogue"]: line["bank"] for line in lines}.values())
    num_labeled = sum(bank["num_labeled"] for bank in banks)
    return {**lines[0]["settings"],
            "overall": summarize(lines, seed), "by_category": by_category,
            **longmemeval_parts(lines, by_category, seed),
            "bank_size": fmean(bank["size"] for bank in banks),
            "ops": dict(sum((Counter(bank["ops"]) for bank in banks), Counter())),
            "agreement": sum(bank["num_matching"] for bank in banks) / num_labeled if num_labeled else None,
            "invalid_rate": fmean(not line["is_valid"] for line in lines),
            "cut_rate": fmean(line["dropped"] > 0 for line in lines),
            "at_once": max(line["at_once"] for line in lines),
            "seconds": sum(bank["seconds"] for bank in banks) + sum(sum(line["seconds"].values()) for line in lines),
            "latency": {"manager": {q: fmean(bank["calls"][q] for bank in banks) for q in ("p50", "p95")},
                        "search": percentiles([line["seconds"]["search"] for line in lines]),
                        "answer": percentiles([line["seconds"]["answer"] for line in lines])}}


def format_table(cells: Sequence[Sequence[str]]) -> str:
    """Align the first column left and the others right. Columns that hold only '-' are left out."""
    columns = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    lines = [[first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
             for first, *others in zip(*columns, strict=True)]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def format_score(part: dict, metric: str, with_interval: bool = True, form: str = ".1f") -> str:
    """'50.4 [45.6, 55.1]' in percent; '-' if it was not measured."""
    if part.get(metric) is None:
        return "-"
    if not with_interval:
        return f"{100 * part[metric]:{form}}"
    low, high = (f"{100 * end:{form}}" for end in part["interval"][metric])
    return f"{100 * part[metric]:{form}} [{low}, {high}]"


def format_rate(rate: float | None) -> str:
    """0.43 -> '43'; '-' for 0 as well as for None, so that columns without any event can be left out."""
    return f"{100 * rate:.0f}" if rate else "-"


def format_ops(ops: dict[str, int]) -> str:
    """{"ADD": 3, "NOOP": 1} -> '75/0/0/25'"""
    total = sum(ops.get(event, 0) for event in OPERATIONS)
    return "/".join(f"{100 * ops.get(event, 0) / total:.0f}" for event in OPERATIONS) if total else "-"


def lost_rate(ops: dict[str, int]) -> float:
    """{"ADD": 3, "NOOP": 1, "invalid": 1} -> 0.2; see `manager.bank_report`"""
    lost = sum(ops.get(kind, 0) for kind in ("invalid", "skipped", "unread_facts"))
    return lost / max(1, lost + sum(ops.get(event, 0) for event in OPERATIONS))


def format_latency(latency: dict[str, float]) -> str:
    return f"{1000 * latency['p50']:.1f}/{1000 * latency['p95']:.1f}"


def category_table(rows: Sequence[dict]) -> str:
    """F1/BLEU-1, and the judge's score if there is one, by category and overall, in the layout of the paper."""
    overall, totals = rows[0]["overall"], [key for key in ("overall", "task_averaged", "abstention") if key in rows[0]]
    metrics = [metric for metric in ("f1", "bleu1", "judge") if overall[metric] is not None]
    heads = [("/".join(METRICS.get(metric, metric) for metric in metrics), "  the paper's", "  questions"),
             *((f"{number} {part['names'][0]}", part["names"][1], str(part["n"]))
               for number, part in rows[0]["by_category"].items()),
             *((key.replace("_", "-"), "Overall" if key == "overall" else "", str(rows[0][key]["n"]))
               for key in totals)]
    parts = [[*row["by_category"].values(), *(row[key] for key in totals)] for row in rows]
    cells = [[row["system"], *("/".join(format_score(part, metric, False) for metric in metrics) for part in some)]
             for row, some in zip(rows, parts, strict=True)]
    return format_table([*zip(*heads, strict=True), *cells])


def format_report(source: str, dialogues: Sequence[Dialogue], rows: Sequence[dict], with_paper: bool) -> str:
    """All tables of systems that were asked the same questions. `source`: the names of data and split."""
    num_turns, num_questions = fmean(len(one.turns) for one in dialogues), rows[0]["overall"]["n"]
    metrics = METRICS | {metric: name for row in rows for metric, name in metrics_in(row["overall"]).items()}
    scores = [[row["system"], *(format_score(row["overall"], metric, metric in ("em", "f1")) for metric in metrics)]
              for row in rows]
    memory = [[row["system"], f"{row['bank_size']:.1f}", format_ops(row["ops"]), format_rate(row["agreement"]),
               format_rate(lost_rate(row["ops"])), format_rate(row["invalid_rate"]), format_rate(row["cut_rate"])]
              for row in rows]
    latency = [[row["system"], *map(format_latency, row["latency"].values())] for row in rows]
    return "\n\n".join([
        f"{source}: {num_questions} questions about {len(dialogues)} x {num_turns:.0f} turns",
        format_table([["system", *metrics.values()], *scores]),
        category_table(rows), *([PAPER.read_text()] if with_paper else []),
        format_table([["memory", "bank", "ADD/UPD/DEL/NOOP", "agree", "lost", "invalid", "cut"], *memory]),
        format_table([["latency", "ms a turn", "ms to search", "ms to answer"], *latency])]) + "\n"


def beside(path: str | Path, kind: str) -> Path:
    """runs/x.json, "banks" -> runs/x.banks.jsonl"""
    return Path(path).with_suffix(f".{kind}.jsonl")


def line_key(line: dict) -> tuple:
    """The system and the question of a line."""
    return line["system"], line["dialogue"], line["question"], line["text"], line["gold"]


def checksum(parts) -> str:
    """A short SHA-256 of byte strings or tensors."""
    content = hashlib.sha256()
    for part in parts:
        content.update(part if isinstance(part, bytes) else part.detach().float().cpu().numpy().tobytes())
    return content.hexdigest()[:16]


def read_predictions(path: str | Path) -> dict[tuple, dict]:
    """The lines of FILE.json's predictions, by `line_key`. A line that a kill cut short is skipped."""
    predictions = beside(path, "predictions")
    try:
        return {line_key(line): line for line in read_rows(predictions) if line["settings"]}
    except KeyError:
        raise UsageError(f"{predictions} has lines that are no predictions: choose another file") from None


def write_results(args, lines: dict[tuple, dict]) -> None:
    """Replace FILE.json, which has a row for every system that has answers, and FILE.predictions.jsonl."""
    if args.out:
        systems = {system: [line for line in lines.values() if line["system"] == system] for system, *_ in lines}
        results = {"data": args.data, "split": args.split,
                   "rows": [make_row(some, args.seed) for some in systems.values()]}
        predictions = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
        with disk_errors(Path(args.out).parent):
            write_file(Path(args.out), json.dumps(to_json_safe(results), indent=1).encode() + b"\n")
            write_file(beside(args.out, "predictions"), predictions.encode("utf-8", "replace"))


def load_previous(path: str | None, settings: dict[str, dict]) -> dict[tuple, dict]:
    """
    The lines of an earlier evaluation into FILE.json, which this one continues. UsageError if a system has lines with
    other settings, which include checksums of weights and data, or if other systems have lines about other data.
    """
    if path and Path(path).is_file() and b'"rows": [' not in Path(path).read_bytes():
        raise UsageError(f"{path}: cannot be continued, as it holds no results: choose another --out")
    lines = read_predictions(path) if path else {}
    shared = {key: next(iter(settings.values()))[key] for key in ("data", "split")}
    for line in lines.values():
        before, now = line["settings"], settings.get(line["system"], shared)
        if changed := [f"{key} was {before.get(key)}" for key, value in now.items() if before.get(key) != value]:
            raise UsageError(f"{beside(path, 'predictions')}: {line['system']!r} was evaluated with other settings "
                             f"({', '.join(changed)}): choose another --out, or delete that file")
    return lines


def read_systems(name: str) -> dict[str, dict]:
    """FILE.json or FILE.json:SYSTEM -> {system: {question: line}}"""
    path, _, wanted = name.partition(".json:")
    systems = {}
    for (system, *question), line in read_predictions(path.removesuffix(".json") + ".json").items():
        if wanted in ("", system):
            systems.setdefault(system, {})[tuple(question)] = line
    if not systems:
        raise UsageError(f"{name}: there are no answers of evaluate.py --out; give FILE.json or FILE.json:SYSTEM")
    return systems


def compare(first: str, second: str, seed: int = 0) -> str:
    """Second result minus first, on the questions that both have, per system, overall and by category."""
    ours, theirs = read_systems(first), read_systems(second)
    pairs = [(*ours, *theirs)] if len(ours) == len(theirs) == 1 else [(name, name) for name in ours if name in theirs]
    tables = [paired_table(f"{b} minus {a}", [(ours[a][key], theirs[b][key]) for key in shared], seed)
              for a, b in pairs if (shared := [key for key in ours[a] if key in theirs[b]])]
    if not tables:
        raise UsageError(f"{first} and {second} share no question: name one system of each, as FILE.json:SYSTEM, and "
                         "evaluate both with the same --data, --split, --seed and --category")
    return "\n\n".join([*tables, "in percentage points, with 95 % bootstrap intervals over the shared questions"])


def paired_table(title: str, pairs: Sequence[tuple[dict, dict]], seed: int) -> str:
    """Differences of the metrics that both have. Verdicts of two different judges are not compared."""
    lines = [{"category": a["category"], **{metric: b[metric] - a[metric] for metric in metrics_in(a) if metric in b}}
             for a, b in pairs]
    metrics = METRICS | metrics_in(lines[0])
    parts = {"overall": summarize(lines, seed)}
    parts |= {f"{number} {part['names'][0]}": part for number, part in summarize_by_category(lines, seed).items()}
    return format_table([[title, "questions", *metrics.values()], *(
        [name, str(part["n"]), *(format_score(part, metric, form="+.1f") for metric in metrics)]
        for name, part in parts.items())])
