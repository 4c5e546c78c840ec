"""Exported predictions, read back as the other projects' scripts read them; adversarial and dated questions."""
import json
import re
import string
from collections import Counter, defaultdict
from itertools import cycle
from pathlib import Path
from statistics import fmean

import pytest
from mutations import edited
from test_locomo import ENTRY as LOCOMO
from test_longmemeval import ENTRY as LONGMEMEVAL
from test_msc import ENTRY as MSC

import answer
import evaluate
from data import UsageError
from memory import MemoryBank

REPLIES = ["In 2022, or 2023", "Rome.", "the b", "It is not mentioned.", "no", "Oslo", ""]


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch):
    """Evaluate on entries, with the replies above as answers; -> (row of the system, queries, questions in prompts)."""
    monkeypatch.chdir(tmp_path)
    searched, asked, search, write = [], [], MemoryBank.search_scored, answer.case_text
    monkeypatch.setattr(MemoryBank, "search_scored",
                        lambda bank, query, *rest, **more: searched.append(query) or search(bank, query, *rest, **more))
    monkeypatch.setattr(answer, "case_text", lambda *args:
                        asked.append(write(*args).splitlines()[0].removeprefix("question: ")) or write(*args))
    replies = cycle(REPLIES)
    monkeypatch.setattr(answer, "generate_answers", lambda policy, prompts, *_: [
        answer.Answer(text, (), bool(text)) for text, _ in zip(replies, prompts, strict=False)])

    def evaluated(entries, *flags):
        Path("data.json").write_text(json.dumps(entries))
        evaluate.main(["--data", "data.json", "--out", "x.json", "--system", "rag", *flags])
        return json.loads(Path("x.json").read_text())["rows"][0], searched, asked
    return evaluated


def mem0_f1(prediction, reference):
    """Set F1, written from Mem0's description of it."""
    a, b = (set(re.sub("[.,!?]", " ", str(text).lower()).split()) for text in (prediction, reference))
    return 2 * len(a & b) / (len(a) + len(b)) if a & b else 0


def locomo_f1(item):
    """The score of an item by the rules of LoCoMo's task_eval, for its default key "prediction"."""
    stem = pytest.importorskip("nltk.stem").PorterStemmer().stem

    def words(text):
        kept = "".join(char for char in text.replace(",", "").lower() if char not in string.punctuation)
        return Counter(map(stem, re.sub(r"\b(a|an|the|and)\b", " ", kept).split()))

    def score(prediction, reference):
        one, other = words(prediction), words(reference)
        same = (one & other).total()
        return 2 * same / (one.total() + other.total()) if same else 0

    reference = str(item["answer"]).split(";")[0].strip() if item["category"] == 3 else str(item["answer"])
    if item["category"] == 5:
        return float(any(text in item["prediction"].lower() for text in ("no information available", "not mentioned")))
    if item["category"] == 1:
        return fmean(max(score(part, one) for part in item["prediction"].split(",")) for one in reference.split(","))
    return score(item["prediction"], reference)


CONVERSATIONS = [LOCOMO, edited(edited(LOCOMO, "sample_id", value="conv-8"), "qa", 0, "category", value=1)]


def test_locomo_reads_its_export(run):
    row, *_ = run(CONVERSATIONS, "--export", "locomo", "--adversarial", "--memories", "2")
    samples = json.loads(Path("x.rag.locomo.json").read_text())
    assert [sample["sample_id"] for sample in samples] == ["conv-7", "conv-8"]
    items = [item for sample in samples for item in sample["qa"]]
    assert len(items) == 12 and [item["question"] for item in items[:6]] == [
        "When?", "Who?", "Why?", "Where?", "Really?", "Where?"]
    scores = [locomo_f1(item) for item in items]
    assert row["overall"]["f1_locomo"] == pytest.approx(fmean(scores), abs=1e-6) and len(set(scores)) > 2
    adversarial = [locomo_f1(item) for item in items if item["category"] == 5]
    assert row["by_category"]["5"]["em"] == row["by_category"]["5"]["f1"] == pytest.approx(fmean(adversarial), abs=1e-6)
    turns = {turn["dia_id"] for key in ("session_2", "session_10") for turn in LOCOMO["conversation"][key]}
    for item in items:  # recall as in task_eval: the first element tells dialogue ids from session ids
        context = item["prediction_context"]
        assert context[0].startswith("D") and {*context} <= turns and len(context) == 2
    assert items[0]["evidence"] == ["D2:1", "D10:1", "D2:2"] and items[2]["evidence"] == []


def test_mem0_reads_its_export(run):
    row, *_ = run(CONVERSATIONS, "--export", "mem0")
    conversations = json.loads(Path("x.rag.mem0.json").read_text())
    assert [*conversations] == ["conv-7", "conv-8"] and "5" not in row["by_category"]
    items = [item for group in conversations.values() for item in group if str(item["category"]) != "5"]
    assert {*items[0]} == {"question", "answer", "category", "response"} and len(items) == 8
    scores = defaultdict(list)
    for item in items:
        scores[str(item["category"])].append(mem0_f1(item["response"], item["answer"]))
    assert {number: part["f1"] for number, part in row["by_category"].items()} == pytest.approx(
        {number: fmean(some) for number, some in scores.items()}, abs=1e-6)
    assert len({score for some in scores.values() for score in some}) > 2


QUESTIONS = [edited(edited(LONGMEMEVAL, "question_id", value=name), "question_type", value=kind) | {"answer": gold}
             for name, kind, gold in [
                 ("q1", "multi-session", "in 2022"), ("q2", "multi-session", "Oslo"), ("q3_abs", "multi-session", "b"),
                 ("q4", "knowledge-update", "It is a hat"), ("q5_abs", "temporal-reasoning", "no answer")]]


def test_longmemeval_reads_its_export(run, capsys):
    row, searched, asked = run(QUESTIONS, "--export", "longmemeval", "--memories", "4")
    references = {entry["question_id"]: entry["answer"] for entry in QUESTIONS}
    found = [json.loads(line) for line in Path("x.rag.longmemeval.jsonl").read_text().splitlines()]
    assert [{*one} for one in found] == [{"question_id", "hypothesis"}] * 5
    scores = {one["question_id"]: mem0_f1(one["hypothesis"], references[one["question_id"]]) for one in found}
    assert {*scores} == {*references} and row["overall"]["f1"] == pytest.approx(fmean(scores.values()), abs=1e-6)
    types = [fmean([scores["q1"], scores["q2"], scores["q3_abs"]]), scores["q4"], scores["q5_abs"]]
    assert row["task_averaged"]["f1"] == pytest.approx(fmean(types), abs=1e-6) and fmean(types) != row["overall"]["f1"]
    assert row["abstention"]["n"] == 2
    assert row["abstention"]["f1"] == pytest.approx(fmean([scores["q3_abs"], scores["q5_abs"]]), abs=1e-6)
    printed = capsys.readouterr().out
    assert "for longmemeval: x.rag.longmemeval.jsonl" in printed
    heading, _, questions = printed[printed.index("F1/BLEU-1"):].splitlines()[:3]
    assert heading.endswith("overall  task-averaged  abstention") and questions.split()[-3:] == ["5", "5", "2"]


def test_dates_are_shown_but_not_searched_for_and_both_roles_share_a_bank(run):
    run(QUESTIONS[:2], "--memories", "4")
    _, searched, asked = run(QUESTIONS[:2], "--memories", "6", "--out", "y.json")
    assert {*searched} == {"How many days ago?"}
    assert {*asked} == {"Current date: 2023/05/30 (Tue) 23:40. How many days ago?"}
    shown = [json.loads(line)["shown"] for name in "xy" for line in Path(f"{name}.predictions.jsonl").open()]
    assert shown == [2, 2, 3, 3]  # half of --memories in all, not for each role


def test_the_speakers_of_msc_are_named_but_not_searched_for(run):
    _, searched, asked = run([MSC])
    assert {*searched} == {"Which artist was it?"}
    assert asked == ["Speaker 2 asks Speaker 1: Which artist was it?"]


@pytest.mark.parametrize("entries, flags, words", [
    (QUESTIONS, ["--export", "locomo"], "--export locomo: data.json has other questions"),
    (CONVERSATIONS, ["--export", "longmemeval"], "--export longmemeval: data.json has other questions"),
    ([MSC], ["--export", "locomo"], "--export locomo: data.json has other questions"),
    (QUESTIONS, ["--adversarial"], "--data data.json has no adversarial questions: only LoCoMo has"),
    ([MSC], ["--adversarial"], "--data data.json has no adversarial questions"),
    (CONVERSATIONS, ["--adversarial", "--data", "synthetic"], "--data synthetic has no adversarial questions"),
    (CONVERSATIONS, ["--adversarial", "--paper"], "no other --split, nor --adversarial"),
    (CONVERSATIONS, ["--data", "synthetic", "--export", "locomo"], "synthetic has other questions")])
def test_what_does_not_fit_is_refused_before_any_answer(run, entries, flags, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        run(entries, *flags)
    assert not list(Path().glob("x.rag.*"))


def test_an_export_needs_a_file(tmp_path):
    with pytest.raises(UsageError, match="--export mem0 needs --out FILE.json"):
        evaluate.main(["--system", "none", "--limit", "1", "--export", "mem0"])
