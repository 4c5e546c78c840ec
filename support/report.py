"""
What is reported of answers: scores, intervals, tables, comparisons. Knows of no model: everything here is
computed from lines, one for each answer a system gave, as they stand in FILE.predictions.jsonl:

    {"system": "base", "dialogue": "conv-41", "question": "conv-41:7", "category": 2, "text": "When did ...",
     "gold": "7 May 2023", "prediction": "May 2023", "em": 0.0, "f1": 0.8, ..., "bank": {"size": 211, "ops": ...}}

The names of LoCoMo's categories are permuted in the paper (arXiv 2508.19828, Table 1): here they go by number, with
both names. F1 and BLEU-1 are Mem0's, which the paper most likely uses; LoCoMo's own F1 stands beside them.
"""
import json
import string
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

import answer
import data
from data import Dialogue, UsageError, longmemeval, msc, transcript
from manager import EVENTS
from support.run import note, tidy, write, writing

METRICS = ("em", "f1", "bleu1", "f1_locomo", "judge")
NAMES = {  # the benchmark's name of a category and the paper's, in the paper's order; synthetic talk has LoCoMo's
    1: ("multi-hop", "Single Hop"), 3: ("open-domain", "Multi-Hop"), 4: ("single-hop", "Open Domain"),
    2: ("temporal", "Temporal"), 5: ("adversarial", ""),
    **{number: (name, paper) for (number, name), paper in zip(
        longmemeval.CATEGORIES.items(), ("SSU", "SSP", "OD", "MS", "KU", "TR"), strict=True)},
    **{number: (name, "MSC") for number, name in msc.CATEGORIES.items()},
    **{number: (name, "") for number, name in transcript.CATEGORIES.items()}}
PAPER = Path(data.__file__).parent / "paper.txt"  # its tables 1 and 3, columns as in `category_table`
LEGEND = """\
EM: answers right to the word; F1, BLEU-1: words shared with the right answer
(Mem0's definitions; F1 LoCoMo: that benchmark's); in percent, in brackets 95 %
intervals over questions. bank: memories at the end; ADD/UPD/DEL/NOOP: edits of
the Manager, in percent; agree: those that are the known ones. invalid: answers
that cannot be read; cut: prompts without room for all memories, in percent.
ms: median and 95th percentile; seconds: banks and answers together."""


# ------------------------------------------------------------------------------------------------ scores

@lru_cache(maxsize=1)
def stemmer():
    """nltk's Porter stemmer with a memory for words, or None: nltk is an extra."""
    try:
        from nltk.stem import PorterStemmer
    except ImportError:
        note("no F1 LoCoMo without nltk's Porter stemmer: pip install nltk")
        return None
    return lru_cache(maxsize=1 << 16)(PorterStemmer().stem)


def locomo_words(text: str) -> Counter:
    """As LoCoMo compares them: lower case, no punctuation, no articles, stems. "The dogs, and 1,000" -> dog 1000"""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return Counter(stemmer()(word) for word in text.split() if word not in ("a", "an", "the", "and"))


def locomo_f1(prediction: str, reference: str, category: int | None = None) -> float:
    """
    LoCoMo's F1 (snap-research/locomo, task_eval/evaluation.py), over multisets of stems. Category 1: the mean over the
    reference's comma-separated parts of the best F1 of any part of the prediction; 3: only what the reference has
    before ';'; 5: does the prediction say that nothing is known?
    """
    if category == 5:
        return float(any(phrase in prediction.lower() for phrase in ("no information available", "not mentioned")))
    if category == 1:
        parts = [[locomo_f1(part, one) for part in prediction.split(",")] for one in reference.split(",")]
        return sum(map(max, parts)) / len(parts)
    predicted, expected = map(locomo_words, (prediction, reference.split(";")[0] if category == 3 else reference))
    common = (predicted & expected).total()
    return 2 * common / (predicted.total() + expected.total()) if common else 0.0


def scores(prediction, reference, category: int | None = None) -> dict[str, float]:
    """
    {"em", "f1", "bleu1", "f1_locomo"} of one answer, the last only where nltk is there. em: ours (answer.normalize);
    f1, bleu1: Mem0's; `category`, LoCoMo's number, matters to f1_locomo alone.
    """
    prediction, reference = str(prediction), str(reference)
    found = {"em": answer.exact_match(prediction, reference), "f1": answer.f1(prediction, reference),
             "bleu1": answer.bleu1(prediction, reference)}
    return found | ({"f1_locomo": locomo_f1(prediction, reference, category)} if stemmer() else {})


@lru_cache(maxsize=32)
def resampled(n: int, seed: int, resamples: int) -> np.ndarray:
    """How often each of n questions comes up in each resample. -> (resamples, n)"""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)])


def interval(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> list[float]:
    """95 % bootstrap interval of a mean: questions are drawn anew with replacement. (n,) -> [low, high]"""
    means = resampled(len(values), seed, resamples) @ np.asarray(values, dtype=float) / len(values)
    return np.percentile(means, [2.5, 97.5]).tolist()


# ------------------------------------------------------------------------------------------------ from lines to rows

def by_category(lines: Sequence[dict]) -> dict[int, list[dict]]:
    """Lines by the number of their category, in the order of `NAMES`."""
    lines_of = {number: [line for line in lines if line["category"] == number] for number in NAMES}
    return {number: some for number, some in lines_of.items() if some}


def summary(lines: Sequence[dict], seed: int) -> dict:
    """Number of questions, means of the metrics that all have, and their intervals."""
    values = {metric: [line.get(metric) for line in lines] for metric in METRICS}
    values = {metric: some for metric, some in values.items() if None not in some}
    return {"n": len(lines), "judge": None, **{metric: sum(some) / len(some) for metric, some in values.items()},
            "interval": {metric: interval(some, seed) for metric, some in values.items()}}


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 95)} if len(values) else None


def row_of(system: dict, lines: Sequence[dict], seed: int) -> dict:
    """What is reported of a system, whose own fields come first. The Manager's percentiles are means over banks."""
    banks = list({line["dialogue"]: line["bank"] for line in lines}.values())
    judged, calls = sum(bank.get("judged", 0) for bank in banks), [bank["calls"] for bank in banks if bank.get("calls")]
    spent = {part: [line["seconds"][part] for line in lines] for part in ("search", "answer")}
    return {**system, "overall": summary(lines, seed),
            "by_category": {number: {"names": NAMES[number], **summary(some, seed)}
                            for number, some in by_category(lines).items()},
            "bank_size": sum(bank["size"] for bank in banks) / len(banks),
            "ops": dict(sum((Counter(bank.get("ops", {})) for bank in banks), Counter())),
            "agreement": sum(bank["agreed"] for bank in banks) / judged if judged else None,
            "invalid_rate": sum(not line["is_valid"] for line in lines) / len(lines),
            "cut_rate": sum(line["dropped"] > 0 for line in lines) / len(lines),
            "manager_tokens": sum(bank.get("tokens", 0) for bank in banks),
            "answer_tokens": sum(line["tokens"] for line in lines),
            "at_once": max(line.get("at_once", 1) for line in lines),
            "latency": {"manager": {name: float(np.mean([call[name] for call in calls])) for name in calls[0]}
                        if calls else None, **{part: percentiles(some) for part, some in spent.items()}},
            "seconds": sum(bank.get("seconds", 0) for bank in banks) + sum(map(sum, spent.values()))}


# ------------------------------------------------------------------------------------------------ tables

def percent(part: dict, metric: str, with_interval: bool = True, form: str = ".1f") -> str:
    """50.4 [45.6, 55.1], or - where it was not measured."""
    if part.get(metric) is None:
        return "-"
    low, high = (f"{100 * end:{form}}" for end in part["interval"][metric])
    return f"{100 * part[metric]:{form}}" + (f" [{low}, {high}]" if with_interval else "")


def share(value: float | None) -> str:
    """43; 0 reads -, like what was not measured: most are."""
    return f"{100 * value:.0f}" if value else "-"


def edits(row: dict) -> str:
    total = sum(row["ops"].get(event, 0) for event in EVENTS)
    return "/".join(f"{100 * row['ops'].get(event, 0) / total:.0f}" for event in EVENTS) if total else "-"


def milliseconds(row: dict, part: str) -> str:
    found = row["latency"][part]
    return f"{1000 * found['p50']:.1f}/{1000 * found['p95']:.1f}" if found else "-"


SCORES = {
    "system": lambda row: row["system"],
    "EM": lambda row: percent(row["overall"], "em"), "F1": lambda row: percent(row["overall"], "f1"),
    "BLEU-1": lambda row: percent(row["overall"], "bleu1", False),
    "F1 LoCoMo": lambda row: percent(row["overall"], "f1_locomo", False),
    "judge": lambda row: percent(row["overall"], "judge")}
MEMORY = {
    "memory": lambda row: row["system"], "bank": lambda row: f"{row['bank_size']:.1f}", "ADD/UPD/DEL/NOOP": edits,
    "agree": lambda row: share(row["agreement"]),
    "tokens": lambda row: f"{row['manager_tokens']:.0f}" if row["manager_tokens"] else "-",
    "ms a turn": lambda row: milliseconds(row, "manager")}
ANSWERS = {
    "answers": lambda row: row["system"], "invalid": lambda row: share(row["invalid_rate"]),
    "cut": lambda row: share(row["cut_rate"]),
    "tokens each": lambda row: f"{row['answer_tokens'] / row['overall']['n']:.1f}",
    "ms to search": lambda row: milliseconds(row, "search"), "ms to answer": lambda row: milliseconds(row, "answer"),
    "seconds in all": lambda row: f"{row['seconds']:.0f}"}


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right; without those that hold but "-"."""
    first, *others = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"-"}]
    columns = [[cell.ljust(max(map(len, first))) for cell in first],
               *([cell.rjust(max(map(len, column))) for cell in column] for column in others)]
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def table(rows: Sequence[dict], columns: dict) -> str:
    return aligned([list(columns), *([show(row) for show in columns.values()] for row in rows)])


def category_table(rows: Sequence[dict]) -> str:
    """F1/BLEU-1 and, where there is one, the judge's share, by category and overall, as the paper has it."""
    metrics = [metric for metric in ("f1", "bleu1", "judge") if rows[0]["overall"][metric] is not None]
    heads = [("F1/BLEU-1/judge" if "judge" in metrics else "F1/BLEU-1", "  the paper's", "  questions"),
             *((*textwrap.wrap(f"{number} {part['names'][0]}", 14), part["names"][1], str(part["n"]))
               for number, part in rows[0]["by_category"].items()),
             ("overall", "Overall", str(rows[0]["overall"]["n"]))]
    height = max(map(len, heads))  # of the longest name, "13 single-session-assistant"
    heads = [("",) * (height - len(head)) + head for head in heads]
    cells = [[row["system"], *("/".join(percent(part, metric, False) for metric in metrics)
                               for part in (*row["by_category"].values(), row["overall"]))] for row in rows]
    return aligned([*zip(*heads, strict=True), *cells])


def headline(benchmark: str, split: str, dialogues: Sequence[Dialogue], rows: Sequence[dict]) -> str:
    """What the tables below it are about."""
    num_turns = sum(len(dialogue.turns) for dialogue in dialogues) / len(dialogues)
    whole = not rows[0]["named_only"]  # else a question that names one person is shown half
    counts = " or ".join(dict.fromkeys(str(row["memories"] if whole else max(1, row["memories"] // 2)) for row in rows))
    whose = "half of each speaker" if whole else "of each person a question names"
    return (f"{benchmark}, split {split}: {rows[0]['overall']['n']} questions about {len(dialogues)} x {num_turns:.0f} "
            f"turns\nshown: {counts} memories, {whose}\n")


def tables(rows: Sequence[dict], with_paper: bool) -> str:
    """All of the terminal's tables for systems that were asked the same questions."""
    parts = [table(rows, SCORES), category_table(rows), *([PAPER.read_text()] if with_paper else []),
             *(table(rows, columns) for columns in (MEMORY, ANSWERS))]
    at_once = max(row["at_once"] for row in rows)  # as measured: answers may stem from an earlier start
    batches = "" if at_once == 1 else f"(shares of batches of up to {at_once}: --at-once 1 times single calls)\n"
    return "\n\n".join(parts) + "\n" + batches


# ------------------------------------------------------------------------------------------------ files

def predictions_of(path: str | Path) -> Path:
    """runs/x.json -> runs/x.predictions.jsonl"""
    return Path(path).with_suffix(".predictions.jsonl")


def read_report(path: str | Path) -> dict:
    try:
        report = json.loads(Path(path).read_bytes())
        if not ({"data", "split", "settings"} <= set(report)
                and all(row["system"] and row["overall"]["n"] for row in report["rows"])):
            raise ValueError
        return report
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "it holds no results"
        raise UsageError(f"{path}: cannot be read ({reason}); give a file that evaluate.py --out wrote") from None


def write_report(path: str | Path, report: dict) -> None:
    """FILE.json, replaced as a whole."""
    with writing(Path(path).parent):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(Path(path), (json.dumps(tidy(report), indent=1, ensure_ascii=False) + "\n").encode())


def read_lines(path: str | Path) -> list[dict]:
    """The lines of a predictions file, without the last if a kill tore it."""
    lines = []
    for number, text in enumerate(Path(path).read_bytes().split(b"\n")[:-1] if Path(path).exists() else [], 1):
        try:
            line = json.loads(text)
            key_of(line), line["category"], line["em"], line["bank"]["size"], line["seconds"]["answer"]
            lines.append(line)
        except (ValueError, LookupError, TypeError):
            raise UsageError(f"{path}: line {number} is no prediction; delete that line, or the file") from None
    return lines


def write_lines(path: str | Path, lines: Iterable[dict]) -> None:
    """FILE.predictions.jsonl, replaced as a whole."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with writing(Path(path).parent):
        write(predictions_of(path), text.encode("utf-8", "replace"))


def kept(path: str | Path, fingerprints: dict[tuple, str], settings: dict) -> tuple[list[dict], dict[str, dict]]:
    """
    The answers of an earlier evaluation into FILE.json, and what it reports of each system. A torn line is cut off.
    Answers whose fingerprint is another are refused, since they were given with other settings, and so is a report.
    """
    before = read_report(path) if Path(path).exists() else {"settings": settings, "rows": []}
    predictions, past = predictions_of(path), before["settings"]
    lines = read_lines(predictions)
    answered = {line["system"] for line in lines}
    rows = {row["system"]: row for row in before["rows"] if row["system"] in answered}
    others = [line["system"] for line in lines if line.get("fingerprint") != fingerprints.get(
        (line["system"], line["dialogue"]), line.get("fingerprint"))] or [*rows] * (past != settings)
    if others:
        changed = [f"{name} was {past.get(name)}" for name, value in settings.items()
                   if past.get(name) != value] or ["of what it was shown, of its adapters, or of the conversation"]
        raise UsageError(f"{predictions}: {others[0]!r} was evaluated with other settings ({', '.join(changed)}): "
                         "choose another --out, or delete that file")
    if predictions.exists() and not predictions.read_bytes().endswith(b"\n"):
        write_lines(path, lines)
    return lines, rows


def key_of(line: dict) -> tuple:
    """What was asked, and of whom."""
    return line["system"], line["dialogue"], line["question"], line["text"], line["gold"]


# ------------------------------------------------------------------------------------------------ comparison

def read_result(name: str) -> tuple[dict, dict[str, dict]]:
    """FILE.json or FILE.json:SYSTEM -> its report, and {system: {what was asked: line}}"""
    path, is_named, wanted = name.partition(".json:")
    path = f"{path}.json" if is_named else name
    report, systems = read_report(path), {}
    for line in read_lines(predictions_of(path)):
        systems.setdefault(line["system"], {})[key_of(line)[1:]] = line
    rows = {row["system"]: row["overall"]["n"] for row in report["rows"]}
    for system, n in rows.items():
        if (num_lines := len(systems.get(system, ()))) < n:
            raise UsageError(f"{predictions_of(path)} has {num_lines} of the {n} answers of {system}: start that "
                             "evaluation again, it goes on from there")
    if not rows or is_named and wanted not in rows:
        there = ", ".join(rows) or "none, for it did not come to an end"
        raise UsageError(f"{path} has no system {wanted!r}: there is {there}")
    return report, {system: systems[system] for system in rows if wanted in ("", system)}


def comparison(first: str, second: str, seed: int = 0) -> str:
    """The second result minus the first on the questions of both, system by system, overall and by category."""
    (report, ones), (other, others) = read_result(first), read_result(second)
    for key in ("data", "split"):
        if report[key] != other[key]:
            raise UsageError(f"{first} is of {key} {report[key]}, {second} of {other[key]}: give two of the same")
    pairs = [(*ones, *others)] if len(ones) == len(others) == 1 else [(name, name) for name in ones if name in others]
    if not pairs:
        raise UsageError(f"{first} and {second} share no system: name one of each, as FILE.json:SYSTEM")
    tables = [paired_table(f"{b} minus {a}", ones[a], others[b], seed)
              for a, b in pairs if ones[a].keys() & others[b].keys()]
    if not tables:
        raise UsageError(f"{first} and {second} share no question: evaluate both with the same --seed and --category")
    return "\n\n".join([*tables, "in percentage points, with 95 % bootstrap intervals over the questions of both"])


def both_have(metric: str, one: dict, other: dict) -> bool:
    """Two answers' scores can be compared: both are there, and a judge's are the same judge's."""
    is_same = metric != "judge" or one.get("judge_model") == other.get("judge_model")
    return is_same and None not in (one.get(metric), other.get(metric))


def paired_table(title: str, ones: dict, others: dict, seed: int) -> str:
    lines = [{"category": line["category"], **{metric: others[key][metric] - line[metric] for metric in METRICS
                                               if both_have(metric, line, others[key])}}
             for key, line in ones.items() if key in others]
    cells = [[title, "questions", "EM", "F1", "BLEU-1", "F1 LoCoMo", "judge"]]
    for number, some in {"overall": lines, **by_category(lines)}.items():
        part = summary(some, seed)
        cells.append([f"{number} {NAMES.get(number, ('',))[0]}".strip(), str(len(some)),
                      *(percent(part, metric, form="+.1f") for metric in METRICS)])
    return aligned(cells)
