"""Reports: scores by hand and by the public scripts, intervals, rows, tables, and comparisons of two results."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from mutations import real_file

import evaluate
from data import UsageError
from evaluate import scores
from support import report
from support.report import bootstrap_interval

ORACLE = real_file("metric_oracle.json")


# ------------------------------------------------------------------------------------------------ statistics, tables

def test_a_manager_whose_outputs_are_lost_shows_it():
    ops = {"ADD": 2, "NOOP": 1, "invalid": 2, "skipped": 1, "unread_facts": 4, "cut_texts": 9}
    assert report.lost_rate(ops) == 0.7 and report.lost_rate({"invalid": 3}) == 1 and report.lost_rate({}) == 0


@pytest.mark.parametrize("prediction, reference, category, expected", [
    ("7 May, 2023", "7 May 2023", 2, (1, 1, 0.75, 1)), ("the beach", "Beach.", 4, (1, 2 / 3, 0.5, 1)),
    ("dogs", "dog", 4, (0, 0, 0, 1)), ("Buddy and Scout", "Scout and Buddy", 4, (0, 1, 1, 1)),
    ("pottery, camping", "pottery, camping, painting, swimming", 1, (0, 2 / 3, math.exp(-4 / 3), 1 / 2)),
    ("Yes", "Yes; she said so", 3, (0, 0, math.exp(-4), 1)), ("Yes", "Yes; she said", 4, (0, 0, math.exp(-3), 0.5)),
    ("It is not mentioned.", "Not mentioned in the conversation", 5, (1, 1, 1, 1)),
    ("No information available on Oslo", "No", 5, (1, 1, 1, 1)), ("No", "No", 5, (0, 0, 0, 0)),
    ("", "", None, (0, 0, 0, 0)), (2022, "2022", None, (1, 1, 1, 1))])
def test_scores_by_hand(prediction, reference, category, expected):
    found = scores(prediction, reference, category)
    assert list(found) == ["em", "f1", "bleu1", "f1_locomo"]
    assert tuple(found.values()) == pytest.approx(expected, abs=1e-6)


def test_scores_agree_with_the_public_scripts():
    """EM is our own, and f1_locomo depends on the category."""
    if not ORACLE:
        pytest.skip("the results of the public scripts are not part of the repository")
    rows = json.loads(ORACLE.read_text())["rows"]
    for row in rows:
        prediction, reference, oracle = str(row["prediction"]), str(row["reference"]), row["oracle"]
        found = scores(row["prediction"], row["reference"])
        assert found["f1"] == pytest.approx(oracle["mem0_f1"], abs=1e-9), row
        assert found["f1_locomo"] == pytest.approx(oracle["locomo_f1"], abs=1e-9), row
        assert found["em"] >= oracle["mem0_em"] or row["tag"] == "punct-only-same", row
        for category in range(1, 6):
            assert scores(prediction, reference, category)["f1_locomo"] == pytest.approx(
                oracle[f"locomo_cat{category}"], abs=1e-9), (category, row)
        assert found["bleu1"] == pytest.approx(oracle["mem0_bleu1"], abs=1e-9), row
    assert len(rows) >= 58


def test_intervals_cover_a_known_mean_95_times_in_100():
    rng = np.random.default_rng(0)
    ends = [bootstrap_interval(rng.random(80) < 0.3, seed=i, resamples=400) for i in range(200)]
    assert 0.9 <= np.mean([low <= 0.3 <= high for low, high in ends]) <= 0.98
    values = rng.random(400)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == [low, high] and bootstrap_interval([0.5] * 7) == [0.5, 0.5]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_a_row_by_hand():
    def line(dialogue, question, category, em, **more):
        return {"dialogue": dialogue, "question": question, "category": category, "em": em, "f1": em, "bleu1": em,
                "is_valid": True, "dropped": 0, "seconds": {"search": 0.001, "answer": 0.1}, "at_once": 64,
                "settings": {"system": "s"},
                "bank": {"size": 4 if dialogue == "a" else 8, "ops": {"ADD": 2, "NOOP": 1},
                         "num_matching": 2, "num_labeled": 3,
                         "seconds": 0.2 if dialogue == "a" else 0.4,
                         "calls": {"p50": 0.2 if dialogue == "a" else 0.4, "p95": 0.5}}, **more}
    lines = [line("a", "1", 4, 1.0), line("a", "2", 4, 0.0), line("a", "3", 1, 1.0), line("b", "1", 4, 1.0, dropped=2)]
    row = report.make_row(lines, 0)
    assert row["system"] == "s" and row["at_once"] == 64
    assert {key: row["overall"][key] for key in ("n", "em", "f1", "bleu1", "judge")} == {
        "n": 4, "em": 0.75, "f1": 0.75, "bleu1": 0.75, "judge": None}
    assert [(number, part["n"], part["names"]) for number, part in row["by_category"].items()] == [
        (1, 1, ("multi-hop", "Single Hop")), (4, 3, ("single-hop", "Open Domain"))]
    assert row["by_category"][4]["em"] == pytest.approx(2 / 3)
    assert (row["bank_size"], row["ops"], row["agreement"]) == (6, {"ADD": 4, "NOOP": 2}, pytest.approx(2 / 3))
    assert (row["cut_rate"], row["invalid_rate"], row["seconds"]) == (0.25, 0, pytest.approx(0.6 + 4 * 0.101))
    assert row["latency"] == {"manager": pytest.approx({"p50": 0.3, "p95": 0.5}),
                              "search": pytest.approx({"p50": 0.001, "p95": 0.001}),
                              "answer": pytest.approx({"p50": 0.1, "p95": 0.1})}
    marked = [{**one, "judge a": 0.0, "reason of a": "No.", "judge b": 1.0} for one in lines]
    part = report.summarize(marked, 0)
    assert (part["judge a"], part["judge b"], part["judge"], part["interval"]["judge"]) == (0, 1, 1, [1, 1])
    assert report.summarize(marked[:3] + lines[3:], 0)["judge"] is None
    typed = [one | {"category": 11 + one["category"] // 4, "judge b": one["em"]} for one in marked]
    whole = report.make_row(typed, 0)["task_averaged"]  # the mean of 1 and 2/3
    assert whole["judge"] == whole["em"] == pytest.approx(5 / 6) and whole["n"] == 4


def test_the_numbers_of_the_paper_agree_with_their_overall():
    """"Overall" is the mean over the 239, 83, 727 and 258 questions of the categories."""
    rows = [re.findall(r"[\d.]+/[\d.]+/[\d.]+", line) for line in report.PAPER.read_text().splitlines()]
    whole = [[[float(number) for number in cell.split("/")] for cell in row] for row in rows if len(row) == 5]
    assert len(whole) == 17 and sum(len(row) == 1 for row in rows) == 6
    for *parts, overall in whole:
        weighted = np.average(parts, axis=0, weights=[239, 83, 727, 258])
        assert weighted == pytest.approx(overall, abs=0.02), (parts, overall)


def test_categories_have_both_names():
    part = {"n": 2, "f1": 0.5, "bleu1": 0.25, "judge": None, "interval": {"f1": (0, 1), "bleu1": (0, 1)}}
    rows = [{"system": "rag", "overall": part, "by_category": {
        13: {"names": report.CATEGORY_NAMES[13], **part}, 2: {"names": report.CATEGORY_NAMES[2], **part}}}]
    assert report.category_table(rows).splitlines() == [
        "F1/BLEU-1      13 assistant  2 temporal    overall",
        "  the paper's            OD    Temporal    Overall",
        "  questions               2           2          2",
        "rag               50.0/25.0   50.0/25.0  50.0/25.0"]


# ------------------------------------------------------------------------------------------------ comparisons

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_result(name, ems, system="s", **more):
    """Write a result with the EM of questions 0, 1, ... of categories 4, 5, 4, ...; F1 and BLEU-1 are a tenth of it."""
    lines = [{"system": system, "dialogue": "d", "question": str(i), "text": "?", "gold": "x", "em": em, "f1": em / 10,
              "bleu1": em / 10, "category": 4 + i % 2, "settings": {"system": system}, **more}
             for i, em in enumerate(ems)]
    report.beside(name, "predictions").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_compare_by_hand(capsys):
    write_result("a.json", [0, 0, 1, 1])
    write_result("b.json", [1, 0, 1, 1], system="t")
    evaluate.main(["--compare", "a.json", "b.json"])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["t", "minus", "s", "questions", "EM", "F1", "BLEU-1"]
    assert re.sub(r"\s+", " ", table[1]).startswith("overall 4 +25.0 [+0.0, +75.0] +2.5 [+0.0, +7.5]")
    assert re.sub(r"\s+", " ", table[2]).startswith("4 single-hop 2 +50.0 [+0.0, +100.0]")
    assert re.sub(r"\s+", " ", table[3]).startswith("5 adversarial 2 +0.0 [+0.0, +0.0]")
    evaluate.main(["--compare", "b.json:t", "a.json:s"])
    assert re.search(r"overall +4 +-25.0 \[-75.0, ", capsys.readouterr().out)


def test_compare_takes_the_questions_and_systems_of_both(capsys):
    write_result("a.json", [0, 0, 1], **{"judge one": 1.0})
    write_result("b.json", [1, 0, 1, 1, 1], **{"judge one": 0.0})
    evaluate.main(["--compare", "a.json", "b.json"])
    assert re.search(r"overall +3 .*-100.0 \[-100.0, -100.0\]", capsys.readouterr().out)


@pytest.mark.parametrize("case, words", [
    ("dialogue", "a.json and c.json share no question"), ("question", "a.json and c.json share no question"),
    ("system", "c.json:z: there are no answers"), ("garbage", "c.json: there are no answers"),
    ("missing", "c.json: there are no answers"), ("systems", "share no question: name one system of each")])
def test_compare_refuses(case, words):
    write_result("a.json", [0, 1])
    write_result("c.json", [0, 1], **{"dialogue": {"dialogue": "e"}, "question": {"text": "another?"}}.get(case, {}))
    if case == "systems":
        lines = Path("c.predictions.jsonl").read_text()
        Path("c.predictions.jsonl").write_text("".join(lines.replace('"s"', f'"{name}"') for name in "tu"))
    if case == "garbage":
        Path("c.predictions.jsonl").write_text("{\n")
    if case == "missing":
        Path("c.predictions.jsonl").unlink()
    with pytest.raises(UsageError) as error:
        report.compare("a.json", "c.json:z" if case == "system" else "c.json")
    assert words in str(error.value)


def test_verdicts_of_two_judges_are_not_compared(capsys):
    write_result("a.json", [0, 1], **{"judge one": 1.0, "judge both": 1.0})
    write_result("b.json", [1, 1], **{"judge another": 0.0, "judge both": 0.5})
    evaluate.main(["--compare", "a.json", "b.json"])
    shown = capsys.readouterr().out
    assert re.findall(r"judge (\w+)", shown) == ["both"] and re.search(r"overall +2 .*-50.0 \[-50.0, -50.0\]", shown)
