"""The evaluation: systems, questions, every flag, baselines and the reranker."""
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import answer
import data
import evaluate
import train_answer
import train_manager
from data import Dialogue, Question, Turn, UsageError
from evaluate import System, scores
from memory import Memory
from policy import Policy
from support import cli, report
from support.evaluation import Reranker, agent_name, select_questions

ROOT = Path(__file__).parent.parent
LOCOMO = next((path for path in (ROOT.parent / "shared/data/locomo10.json",
                                 Path(os.environ.get("MEMORY_R1_DATA", "~/.cache/memory-r1")).expanduser()
                                 / "locomo10.json") if path.is_file()), None)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*flags):
    """Runs in this process and returns (results, lines) where --out names a file."""
    flags = [str(flag) for flag in flags]
    evaluate.main(flags)
    if "--out" in flags:
        return read(flags[flags.index("--out") + 1])


def read(path):
    return json.loads(Path(path).read_text()), list(report.read_predictions(path).values())


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(one) for key, one in value.items() if key not in ("seconds", "latency", "calls")}
    return [without_seconds(one) for one in value] if isinstance(value, list) else value


def adapter(folder, seed=1):
    """An adapter of the tiny model that changes something."""
    policy = Policy.load(data.TINY)
    policy.add_adapter("agent", 2, 4)
    torch.manual_seed(seed)
    for B in policy.parameters("agent")[1::2]:
        torch.nn.init.normal_(B, std=0.02)
    policy.save_adapter("agent", folder)
    return folder


def test_without_nltk_its_column_is_absent_with_a_note(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nltk.stem", None)
    report.porter_stemmer.cache_clear()
    try:
        assert list(scores("a dog", "dogs", 1)) == ["em", "f1", "bleu1"]
        assert "pip install nltk" in capsys.readouterr().err
        run("--system", "none", "--limit", "2")
        assert "F1 LoCoMo" not in capsys.readouterr().out.split("EM:")[0]
    finally:
        report.porter_stemmer.cache_clear()


@pytest.mark.skipif(LOCOMO is None, reason="locomo10.json was not found")
def test_locomo_has_the_questions_of_the_paper(tmp_path):
    counts = {}
    for split in ("train", "val", "test"):
        args = evaluate.arguments(["--data", str(LOCOMO), "--split", split])
        dialogues, _ = select_questions(args, evaluate.REAL, None)
        categories = Counter(question.category for one in dialogues for question in one.questions)
        counts[split] = {report.CATEGORY_NAMES[number][1]: count for number, count in categories.items()}
    assert [sum(count.values()) for count in counts.values()] == [152, 81, 1307]
    assert counts["test"] == {"Single Hop": 239, "Multi-Hop": 83, "Open Domain": 727, "Temporal": 258}
    found, lines = run("--data", LOCOMO, "--system", "none", "--limit", "3", "--max-answer-tokens", "8",
                       "--paper", "--out", tmp_path / "x.json")
    assert found["rows"][0]["overall"]["n"] == 3 and {line["dialogue"] for line in lines} == {"conv-41"}


def test_longmemeval_has_its_types_and_its_judge_their_rubrics():
    path = ROOT.parent / "shared/data/longmemeval_oracle.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    args = evaluate.arguments(["--data", str(path), "--limit", "40"])
    dialogues, _ = select_questions(args, evaluate.REAL, None)
    lines = [{"dialogue": one.id, "category": question.category, "gold": question.answer} for one in dialogues
             for question in one.questions]
    parts = report.summarize_by_category(lines, 0).values()
    counts = [(part["names"][1], part["n"]) for part in parts]
    assert counts == [("SSU", 70), ("SSP", 30), ("OD", 56), ("MS", 133), ("KU", 78), ("TR", 133)]
    rubrics = [evaluate.gold_of(line)[len(line["gold"]):] for line in lines]
    assert sum("cannot be answered" in rubric for rubric in rubrics) == 30
    assert sum("off by one" in rubric for rubric in rubrics) == 133 - 6
    assert sum(not rubric for rubric in rubrics) == 70 + 56 + 133 - 18
    some, _ = select_questions(args, evaluate.REAL, args.limit)
    assert len(some) == 40 and len({question.category for one in some for question in one.questions}) == 6
    with pytest.raises(UsageError, match="--data locomo"):
        select_questions(evaluate.arguments(["--data", str(path), "--paper"]), evaluate.REAL, None)


def test_settings_are_those_of_the_training_scripts():
    args = train_manager.arguments([])
    assert evaluate.SHORT == {"count": args.eval, "num_turns": 20, "memories": args.memories,
                              "named_only": args.named_only, "max_answer_tokens": args.max_answer_tokens}
    own = evaluate.arguments([])
    assert (own.top_k, own.extract, own.max_prompt_tokens, own.max_new_tokens) == (
        args.top_k, args.extract, args.max_prompt_tokens, args.max_new_tokens)
    args = train_answer.arguments([])
    assert evaluate.LONG == {"count": args.eval, "num_turns": train_answer.NUM_TURNS, "memories": args.memories,
                             "named_only": args.named_only, "max_answer_tokens": args.max_new_tokens}


def test_without_flags_every_run_in_runs_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "LONG", {**evaluate.LONG, "count": 1, "num_turns": 8})
    monkeypatch.setattr(evaluate, "SHORT", {**evaluate.SHORT, "count": 1, "num_turns": 8})
    monkeypatch.setattr(evaluate, "LONG_LIMIT", 3)  # only without --limit
    for name, agent, about in (
            ("manager-grpo", "manager", {"distill": False}), ("seven", "manager", {}),
            ("answer-lone", "answer", {"distill": True}),
            ("answer-grpo", "answer", {"distill": True, "manager_adapter": "runs/manager-grpo/adapter"}),
            ("answer-plain", "answer", {"distill": False}), ("manager-bad", "manager", {})):
        adapter(tmp_path / "runs" / name / "adapter", seed=len(name))
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps({"agent": agent, "algo": "grpo", **about}))
    (tmp_path / "runs/manager-bad/adapter/adapter_config.json").write_text("{}")
    found, lines = run("--limit", "5", "--out", "runs/x.json")
    shown = capsys.readouterr()
    assert "skipped: adapter runs/manager-bad" in shown.err
    assert "skipped: runs/answer-plain was trained without distillation" in shown.err
    short, long = ["none", "rag", "add-all", "base", "manager-grpo", "seven", "oracle"], [
        "base + base", "manager-grpo + base", "base + answer-grpo", "manager-grpo + answer-grpo", "base + answer-lone"]
    assert sorted(row["system"] for row in found["rows"]) == sorted(short + long)
    tables = [table for table in shown.out.split("\n\n") if table.startswith("system ")]
    printed = [[re.split("  +", line)[0] for line in table.splitlines()[1:]] for table in tables]
    assert printed == [short, long]
    assert len(lines) == 5 * 12 and shown.out.count("5 questions") == 2 and shown.out.count("EM: ") == 1
    assert all(len(line) <= 80 for line in shown.out.split("5 questions")[1].splitlines())  # a terminal's width
    for row in found["rows"]:
        assert {"system", "overall", "by_category", "bank_size", "ops", "seconds", "latency"} <= set(row)
        assert {"n", "em", "f1", "bleu1", "judge"} <= set(row["overall"]) and row["overall"]["n"] == 5
        assert sum(part["n"] for part in row["by_category"].values()) == 5
    assert {(found["data"], found["split"])} | {(row["data"], row["split"]) for row in found["rows"]} == {
        ("synthetic", "test")}
    by_name = {row["system"]: row for row in found["rows"]}
    assert by_name["oracle"]["overall"]["em"] > by_name["none"]["overall"]["em"] and by_name["none"]["bank_size"] == 0
    assert by_name["add-all"]["ops"] == {"ADD": 8} and by_name["oracle"]["agreement"] == 1
    assert by_name["base"]["latency"]["manager"]["p95"] > 0 and by_name["base + base"]["memories"] == 20


def test_the_two_by_two_by_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "LONG", {**evaluate.LONG, "count": 1, "num_turns": 8})
    adapter(tmp_path / "runs/m/adapter", 3)
    adapter(tmp_path / "runs/a/adapter", 4)
    found, _ = run("--manager", "base", "runs/m", "--answer", "base", "runs/a", "--limit", "2", "--out", "x.json")
    assert {(row["system"], row["source"], row["answer"]) for row in found["rows"]} == {
        ("base + base", "base", "base"), ("m + base", "runs/m", "base"), ("base + a", "base", "runs/a"),
        ("m + a", "runs/m", "runs/a")} and len(found["rows"]) == 4


def rag(*flags):
    return run("--system", "rag", "--limit", "4", "--out", "x.json", *flags)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "x.json"
    return run("--system", "rag", "--limit", "4", "--out", path)


FLAGS = {  # flags of a `rag` system, and a property that the lines have only with them
    "memories": (["--memories", "2"], lambda lines: {line["shown"] for line in lines} == {1}),
    "named only": (["--no-named-only"], lambda lines: min(line["shown"] for line in lines) == 4),
    "floor": (["--floor", "0.99"], lambda lines: not any(line["shown"] for line in lines)),
    "distill": (["--no-distill"], lambda lines: not any(line["selected"] for line in lines)),
    "category": (["--category", "2", "1"], lambda lines: {line["category"] for line in lines} == {1, 2}),
    "seed": (["--seed", "5"], lambda lines: lines[0]["dialogue"] == "test-seen-5-0"),
    "split": (["--split", "val"], lambda lines: lines[0]["dialogue"].startswith("val")),
    "prompt": (["--max-prompt-tokens", "40"], lambda lines: all(line["dropped"] for line in lines)),
    "answer": (["--max-answer-tokens", "1"], lambda lines: all(len(line["output"].split()) < 2 for line in lines)),
    "limit": (["--limit", "2"], lambda lines: len(lines) == 2),
}


@pytest.mark.parametrize("case", FLAGS)
def test_every_flag_does_something(plain, case):
    flags, is_so = FLAGS[case]
    assert is_so(rag(*flags)[1]) and not is_so(plain[1])


def test_flags_of_the_manager():
    def row(*flags):
        return run("--manager", "base", "--limit", "2", "--out", f"{len(flags)}{flags[:1]}.json", *flags)[0]["rows"][0]
    plain, alone, cut = row(), row("--top-k", "0"), row("--max-new-tokens", "1")
    assert "UPDATE" not in alone["ops"] and "DELETE" not in alone["ops"] and alone["ops"] != plain["ops"]
    assert cut["ops"] == {"invalid": 20} and cut["agreement"] == 0 and cut["bank_size"] == 0 < plain["bank_size"]
    assert row("--extract")["ops"] != plain["ops"]


def test_flags_of_the_model(plain, tiny_folder):
    found, lines = rag("--model", tiny_folder, "--dtype", "bfloat16", "--device", "cpu", "--at-once", "1",
                       "--max-prompt-tokens", "900")
    assert found["rows"][0]["dtype"] == "torch.bfloat16" and found["rows"][0]["model"] == str(tiny_folder)
    assert lines[0]["prediction"] != plain[1][0]["prediction"]
    Path("x.predictions.jsonl").unlink()
    found, lines = rag("--embedder", tiny_folder)
    assert found["rows"][0]["embedder"] == str(tiny_folder) and without_seconds(lines) != without_seconds(plain[1])


def test_the_whole_output_is_kept_next_to_the_answer():
    found, lines = run("--system", "oracle", "--limit", "3", "--out", "x.json")
    assert [answer.parse(line["output"]).text for line in lines] == [line["prediction"] for line in lines]
    assert all(re.fullmatch(r"relevant: .*\nanswer: .*|(?s:.*)\nanswer: .*", line["output"]) for line in lines)


def test_memories_are_swept():
    found, lines = run("--system", "none", "oracle", "--memories", "8,2,8", "--limit", "3", "--out", "x.json")
    assert [row["system"] for row in found["rows"]] == ["none", "oracle, 8 memories", "oracle, 2 memories"]
    assert [row["memories"] for row in found["rows"]] == [8, 8, 2] and len(lines) == 9


def test_full_context_loses_its_oldest_turns():
    policy, args = Policy.load(data.TINY), evaluate.arguments(["--max-prompt-tokens", "150"])
    (dialogue,), _ = select_questions(args, evaluate.SHORT, 1)
    system = System("full-context", "full-context", "base", 4, True, 8)
    evaluator = evaluate.Evaluator(policy, args, [system])
    speakers, bank, _ = evaluator.build_banks("full-context", [dialogue])[dialogue.id]
    question = dialogue.questions[0].text
    memories, heading = evaluator.find_memories(system, question, speakers, bank)
    settings = answer.Settings(max_prompt_tokens=150)
    prompt = answer.prompt_for(policy, memories, question, heading, settings)
    assert heading == (" and ".join(speakers),)
    assert len(prompt.prompt) <= 150 and 0 < len(prompt.shown) == 20 - prompt.dropped < 20
    assert [memory.text for memory in prompt.shown] == [f"{turn.speaker}: {turn.text}"
                                                        for turn in dialogue.turns[prompt.dropped:]]


def test_a_reranker_chooses_the_memories(tmp_path, plain):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(data.TINY)
    LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=0)).save_pretrained(tmp_path / "cross")
    tokenizer.save_pretrained(tmp_path / "cross")
    reranker = Reranker(str(tmp_path / "cross"), "cpu")
    memories = [Memory(i, f"Jon likes {what}.", "Jon", "") for i, what in enumerate("tea cats ice jazz".split())]
    best = reranker.best("What does Jon like?", memories, 4)
    assert sorted(best, key=lambda memory: memory.id) == memories
    assert reranker.best("What does Jon like?", memories[::-1], 2) == best[:2] and reranker.best("?", [], 2) == []
    found, lines = rag("--reranker", tmp_path / "cross")
    assert [line["shown"] for line in lines] == [2] * 4 and found["rows"][0]["reranker"]  # as many as without
    with pytest.raises(UsageError, match="--reranker .*no weights|--reranker .*cannot be loaded"):
        Reranker(str(data.TINY), "cpu")


def test_an_agent_has_the_name_of_its_run_however_its_path_is_written():
    for path in ("runs/m", "./runs/m", "runs/m/", "runs/m/adapter", str(Path("runs/m").absolute())):
        assert agent_name(path) == "m"
    assert [agent_name(one) for one in ("base", "rag", "other/m")] == ["base", "rag", "other/m"]


def test_names_are_short_and_differ():
    args = evaluate.arguments([])
    sources = ["base", "runs/manager-grpo/adapter", "runs/s1/manager-ppo/"]
    systems = evaluate.make_systems(args, evaluate.SHORT, [(source, "base") for source in sources], "")
    assert [one.system for one in systems] == ["base", "manager-grpo", "s1/manager-ppo"]
    assert evaluate.make_systems(args, evaluate.SHORT, [("base", "base")] * 2, "") == systems[:1]
    with pytest.raises(UsageError, match="same name"):
        evaluate.make_systems(args, evaluate.SHORT, [("m", "base"), ("runs/m", "base")], "")
    assert replace(systems[0], system="") == System("", "base", "base", 4, True, 48)


@pytest.mark.parametrize("model, flags, memories, tokens", [
    ("Qwen/X", [], 60, 256), ("Qwen/S", [], 8, 40),
    ("Qwen/S", ["--memories", "12", "--max-answer-tokens", "9"], 12, 9)])
def test_small_models_are_evaluated_as_they_are_trained(monkeypatch, model, flags, memories, tokens):
    monkeypatch.setattr(cli, "num_parameters", {"Qwen/X": 3e9, "Qwen/S": 5e8}.get)
    given = ["--data", "locomo", "--model", model]
    args, trained = evaluate.arguments([*given, *flags]), train_answer.arguments(given)
    system, = evaluate.make_systems(args, evaluate.REAL, [("rag", "base")], "")
    assert (system.memories, system.max_answer_tokens) == (memories, tokens)
    assert (args.distill, args.extract, args.top_k) == (trained.distill, trained.extract, trained.top_k)
    assert flags or (memories, tokens) == (trained.memories, trained.max_new_tokens)


def test_a_limit_takes_some_of_every_category(monkeypatch):
    """If each question has its own dialogue and they are sorted by category, also with a limit above half of them."""
    turn = Turn("D1:1", 1, "user", "Hi", "today")
    dialogues = [Dialogue(str(i), ("user", "assistant"), (turn,), (Question(str(i), "?", "x", 11 + i // 4),))
                 for i in range(12)]
    monkeypatch.setattr(data, "load", lambda *_, **options: dialogues)
    args = evaluate.arguments(["--data", "x"])
    for limit, categories in ((2, [11, 12]), (3, [11, 12, 13]), (7, [11, 11, 11, 12, 12, 13, 13]), (99, None)):
        chosen = [one.questions[0].category for one in select_questions(args, evaluate.REAL, limit)[0]]
        assert chosen == (categories or sorted([11, 12, 13] * 4))


def test_the_report_names_the_batch_size_of_the_timed_answers():
    rag()
    found, _ = rag("--at-once", "1")  # every question has been answered already
    assert found["rows"][0]["at_once"] == 64


def test_the_papers_numbers_are_those_of_the_test_split(capsys):
    with pytest.raises(UsageError, match="no other --split"):
        run("--data", "locomo.json", "--paper", "--split", "val")


@pytest.fixture(autouse=True)
def a_locomo_file(in_an_empty_folder):  # noqa: F811
    from test_locomo import ENTRY
    Path("locomo.json").write_text(json.dumps([ENTRY]))


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt of glibc")
def test_freed_memory_is_reused():
    code = """if True:
        import resource
        import torch
        from support.packing import keep_freed_memory
        def page_faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(2**24)  # 64 MiB
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        before = page_faults()
        keep_freed_memory()
        print(before, page_faults())"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, after = map(int, found.split())
    assert after < before / 5
