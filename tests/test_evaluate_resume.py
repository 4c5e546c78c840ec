"""Stopped evaluations, files that cannot be continued, and judges and Managers that are hosted or fail."""
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import completion_of
from test_evaluate import adapter, in_an_empty_folder, rag, read, run, without_seconds  # noqa: F401, a fixture

import evaluate
from data import UsageError
from policy import Policy
from support import judge as judge_module
from support import report
from support.run import folder_lock, read_rows

TWO = ("--system", "rag", "oracle", "--limit", "14", "--at-once", "4", "--out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """FILE.json and FILE.predictions.jsonl of an evaluation that was not stopped."""
    path = tmp_path_factory.mktemp("whole") / "whole.json"
    run(*TWO, path)
    return path.read_text(), report.beside(path, "predictions").read_bytes()


@pytest.mark.parametrize("share", [0, 0.03, 0.3, 0.77, 0.999])
def test_a_killed_evaluation_continues_to_the_same_results(whole, share):
    Path("x.json").write_text(json.dumps({"rows": []}, indent=1))
    Path("x.predictions.jsonl").write_bytes(whole[1][:int(share * len(whole[1]))])
    found, lines = run(*TWO, "x.json")
    assert without_seconds(found) == without_seconds(json.loads(whole[0]))
    complete = [without_seconds(json.loads(line)) for line in whole[1].splitlines()]
    assert without_seconds(lines) == complete and len(lines) == 28
    assert len(Path("x.predictions.jsonl").read_bytes().splitlines()) == 28  # the torn line is gone


def test_ctrl_c_loses_nothing_that_was_answered(monkeypatch):
    written, append_rows = [], evaluate.append_rows

    def stop_after_two(path, lines):
        written.append(lines)
        if len(written) > 2:
            raise KeyboardInterrupt
        append_rows(path, lines)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "append_rows", stop_after_two)
        run(*TWO, "x.json")
    assert len(report.read_predictions("x.json")) == 8 and read("x.json")[0]["rows"] == []
    assert [row["overall"]["n"] for row in run(*TWO, "x.json")[0]["rows"]] == [14, 14]


def test_answered_questions_are_not_asked_again(monkeypatch):
    before, _ = rag()
    monkeypatch.setattr(Policy, "sample", None)
    assert rag()[0]["rows"] == before["rows"]


def test_more_questions_and_systems_may_join_a_file():
    run("--system", "rag", "--limit", "2", "--out", "x.json")
    first = Path("x.predictions.jsonl").read_bytes()
    found, lines = run("--system", "none", "rag", "--limit", "3", "--out", "x.json")
    assert Path("x.predictions.jsonl").read_bytes().startswith(first) and len(lines) == 6
    assert [row["overall"]["n"] for row in found["rows"]] == [3, 3]


def test_systems_reported_before_stay_in_the_report():
    before, _ = rag()
    found, lines = run("--system", "none", "--limit", "2", "--out", "x.json")
    assert found["rows"][0] == before["rows"][0] and [row["system"] for row in found["rows"]] == ["rag", "none"]
    assert len(lines) == 6 and [row["overall"]["n"] for row in found["rows"]] == [4, 2]
    with pytest.raises(UsageError, match="'none' was evaluated with other settings .*seed was 1"):
        run("--system", "none", "--limit", "2", "--seed", "2", "--out", "x.json")
    found, _ = run("--system", "oracle", "--limit", "2", "--seed", "2", "--out", "x.json")
    assert [(row["system"], row["seed"]) for row in found["rows"]] == [("rag", 1), ("none", 1), ("oracle", 2)]
    with pytest.raises(UsageError, match=r"'rag' was evaluated with other settings \(split was test\)"):
        run("--system", "add-all", "--limit", "2", "--split", "val", "--out", "x.json")


def test_a_second_evaluation_into_the_same_file_is_refused():
    before, _ = rag()
    with folder_lock(Path.cwd(), "x.json"), pytest.raises(UsageError, match="x.json is in use by another process"):
        run("--system", "none", "--limit", "2", "--out", "x.json")
    assert [row["system"] for row in read("x.json")[0]["rows"]] == ["rag"]
    with folder_lock(Path.cwd(), "y.json"), folder_lock(Path.cwd()):
        assert rag()[0]["rows"] == before["rows"]


# ------------------------------------------------------------------------------------------------ refused

def test_predictions_of_other_settings_are_refused(tmp_path):
    """Of all systems (--top-k), of one system (--memories), and by its weights; the files stay as they are."""
    flags = ("--manager", adapter(tmp_path / "m", 1), "--limit", "1", "--out", "x.json")
    run(*flags)
    before = {path.name: path.read_bytes() for path in Path().glob("x.*")}
    for more, changed in ((("--top-k", "3"), "top_k was 4"), (("--memories", "2"), "memories was 4"),
                          (("--no-named-only",), "named_only was True")):
        with pytest.raises(UsageError, match=rf"other settings \({changed}\)"):
            run(*flags, *more)
    weights = tmp_path / "m/adapter_model.safetensors"
    content = weights.read_bytes()
    adapter(tmp_path / "m", 2)
    with pytest.raises(UsageError, match=r"other settings \(manager weights was \w{16}\)"):
        run(*flags)
    assert {path.name: path.read_bytes() for path in Path().glob("x.*")} == before
    weights.write_bytes(content)
    run(*flags)


def test_answers_about_a_conversation_that_has_changed_are_refused():
    talk = {"turns": [{"speaker": "Jon", "text": "I have a dog named Buddy.", "time": "1 May 2023"},
                      {"speaker": "Gina", "text": "Nice.", "time": "1 May 2023"}],
            "questions": [{"question": "Which dog does Jon have?", "answer": "Buddy"}]}
    flags = ("--data", "talk.json", "--system", "rag", "--out", "x.json")
    Path("talk.json").write_text(json.dumps(talk))
    run(*flags)
    talk["turns"][0]["text"] = "I have a dog named Scout."
    Path("talk.json").write_text(json.dumps(talk))
    with pytest.raises(UsageError, match=r"other settings \(turns was \w{16}\)"):
        run(*flags)


def test_answers_without_recorded_settings_are_refused():
    found, lines = rag()
    content = "".join(json.dumps({key: line[key] for key in line if key != "settings"}) + "\n" for line in lines)
    Path("x.predictions.jsonl").write_text(content)
    with pytest.raises(UsageError, match="lines that are no predictions"):
        rag()
    assert Path("x.predictions.jsonl").read_text() == content


def test_a_report_without_answers_is_replaced():
    found, _ = rag()
    Path("x.predictions.jsonl").unlink()
    found, lines = rag("--top-k", "3")
    assert found["rows"][0]["top_k"] == 3 and len(lines) == 4 and len(found["rows"]) == 1


def test_another_json_file_is_not_overwritten():
    Path("x.json").write_text('{"a": 1}')
    with pytest.raises(UsageError, match="x.json: cannot be continued"):
        rag()
    assert Path("x.json").read_text() == '{"a": 1}' and not Path("x.predictions.jsonl").exists()


def test_foreign_files_are_refused():
    content = '{"a": 1}\nnonsense\n'
    Path("x.predictions.jsonl").write_text(content)
    with pytest.raises(UsageError, match="x.predictions.jsonl has lines that are no predictions"):
        rag()
    assert Path("x.predictions.jsonl").read_text() == content


# ------------------------------------------------------------------------------------------------ hosted models

class Judge:
    """A judge that compares exactly, or fails."""

    def __init__(self, is_available, model="judge"):
        self.is_available, self.model = is_available, model

    def __call__(self, triples):
        if not self.is_available:
            raise UsageError("no reply from http://judge")
        self.reasons = [f"{prediction} or {gold}" for _, prediction, gold in triples]
        return [float((prediction == gold) != (self.model == "strange")) for _, prediction, gold in triples]


def test_a_judge_that_fails_loses_its_column_only(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "make_judge", lambda *_, **options: Judge(is_available=False))
    with pytest.raises(UsageError, match="http://judge"):
        rag("--judge", "endpoint")
    found, lines = read("x.json")
    assert len(lines) == 4 and found["rows"][0]["overall"]["judge"] is None and "judge judge" not in lines[0]
    assert re.search(r"(?m)^rag ", capsys.readouterr().out)
    monkeypatch.setattr(evaluate, "make_judge", lambda *_, **options: Judge(is_available=True))
    monkeypatch.setattr(Policy, "sample", None)
    found, lines = rag("--judge", "endpoint")
    assert found["rows"][0]["overall"]["judge"] == np.mean([line["judge judge"] for line in lines])
    assert [line["judge judge"] for line in lines] == [float(line["prediction"] == line["gold"]) for line in lines]
    assert [line["reason of judge"] for line in lines] == [f"{line['prediction']} or {line['gold']}" for line in lines]


def test_a_judge_that_fails_does_not_stop_other_tables_and_exports(monkeypatch, capsys):
    def two_tables(policy, args):
        [(dialogues, [system])] = plan_tables(policy, args)
        return [(dialogues, [replace(system, system=name)]) for name in ("m.1", "m-1")]

    plan_tables = evaluate.plan_tables
    monkeypatch.setattr(evaluate, "plan_tables", two_tables)
    monkeypatch.setattr(evaluate, "make_judge", lambda *_, **options: Judge(is_available=False))
    with pytest.raises(UsageError, match="http://judge"):
        rag("--judge", "endpoint", "--export", "mem0")
    shown = capsys.readouterr().out
    assert [shown.count(text) for text in ("\nm.1 ", "\nm-1 ", "questions about", "EM: ")] == [4, 4, 2, 1]
    assert Path("x.m.1.mem0.json").read_text() == Path("x.m-1.mem0.json").read_text() != ""


def test_every_judge_has_a_column(monkeypatch, capsys):
    def judged(model, is_available=True):
        monkeypatch.setattr(evaluate, "make_judge", lambda *_, **options: Judge(is_available, model))
        found, lines = rag("--judge", "endpoint")
        return found["rows"][0]["overall"], [line.get("judge one") for line in lines]

    one, verdicts = judged("one")
    other, _ = judged("strange")
    assert None not in verdicts and other["judge one"] == one["judge one"] == one["judge"]
    assert other["judge strange"] == other["judge"] == 1 - one["judge"]
    headers = re.findall(r"(?m)^system .*", capsys.readouterr().out)
    assert [re.split("  +", header)[5:] for header in headers] == [["judge one"], ["judge one", "judge strange"]]
    with pytest.raises(UsageError, match="http://judge"):
        judged("one", is_available=False)
    again, same = judged("one")
    assert same == verdicts and again["judge"] == one["judge"] and again["judge strange"] == other["judge"]
    found, _ = rag()
    assert found["rows"][0]["overall"] == again, "verdicts stay without --judge"


def test_a_local_judge_is_not_asked_twice(monkeypatch, fake):
    judges = []

    def make(_, policy, max_new_tokens, **options):
        judges.append(fake(lambda chat: 'Yes. {"label": "CORRECT"}'))
        judges[-1].name, judges[-1].max_new_tokens = "local", max_new_tokens
        return judge_module.Judge(judges[-1], max_new_tokens)
    monkeypatch.setattr(evaluate, "make_judge", make)
    monkeypatch.setattr(evaluate, "weights_of", lambda *_: "w")
    for tokens in (50, 50, 60):
        found, _ = rag("--judge", "local", "--judge-tokens", tokens)
        assert found["rows"][0]["overall"]["judge local"] == 1
    assert [judge.max_new_tokens for judge in judges] == [50, 50, 60]
    assert [len(judge.calls) for judge in judges] == [1, 0, 1]


@pytest.fixture
def start_server(serve, monkeypatch):
    """
    start_server(calls, home, is_cut) starts a hosted Manager that adds every fact, and refuses requests after so many
    calls. `home`: where replies are cached. Operations on a text for which is_cut(text) are cut off.
    """
    def start(calls, home="home", is_cut=lambda text: False):
        replies = []

        def reply(messages):
            *_, text, wanted = messages[-1]["content"].splitlines()
            replies.append(text.removeprefix("- "))
            content = json.dumps(replies[-1:] if wanted == "facts:" else [{"event": "ADD", "text": replies[-1]}])
            if len(replies) > calls:
                return 403, {}, b"no credit"
            return (200, {}, completion_of(content[:-5], "length")) if is_cut(text) else content
        monkeypatch.setenv("HOME", str(Path(home).absolute()))
        server = serve(rule=reply)
        monkeypatch.setenv("MANAGER_URL", server.url)
        monkeypatch.setenv("MANAGER_MODEL", "big")
        return server
    return start


def test_a_hosted_manager(start_server):
    server = start_server(calls=99)
    found, _ = run("--manager", "endpoint", "--limit", "2", "--out", "x.json")
    assert found["rows"][0]["ops"] == {"ADD": 20} and found["rows"][0]["bank_size"] == 20
    assert len(server.requests) == 20
    run("--manager", "endpoint", "--limit", "2", "--out", "y.json")
    assert len(server.requests) == 20  # the replies were cached


def test_a_hosted_manager_that_fails_loses_no_answer_and_no_reply(start_server):
    start_server(calls=5)
    flags = ("--system", "rag", "--manager", "endpoint", "--limit", "2", "--out", "x.json")
    with pytest.raises(UsageError, match="MANAGER_URL"):
        run(*flags)
    assert len(report.read_predictions("x.json")) == 2
    server = start_server(calls=99)
    assert len(run(*flags)[1]) == 4 and len(server.requests) == 15


@pytest.mark.parametrize("calls, total, flags", [
    (15, 20, ()), (1, 20, ("--at-once", "1")), (15, 40, ("--extract",)), (33, 40, ("--extract",))])
def test_a_hosted_manager_that_stops_is_asked_the_rest_only(start_server, calls, total, flags):
    def is_cut(text):
        return total == 20 and len(text) % 3 == 0

    flags = ("--manager", "endpoint", "--limit", "2", *flags, "--out")
    server = start_server(999, "another", is_cut)
    whole = run(*flags, "whole.json")
    assert len(server.requests) == total
    with pytest.raises(UsageError, match="HTTP 403 no credit"):
        start_server(calls, is_cut=is_cut) and run(*flags, "x.json")
    server = start_server(999, is_cut=is_cut)
    assert without_seconds([*run(*flags, "x.json")]) == without_seconds([*whole])
    assert len(server.requests) == total - calls
    assert ("invalid" in whole[0]["rows"][0]["ops"]) == (total == 20)


def test_an_unnamed_server_is_reported_before_the_work(monkeypatch):
    for name in ("JUDGE_URL", "MANAGER_URL", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Policy, "sample", None)
    with pytest.raises(UsageError, match="JUDGE_URL"):
        rag("--judge", "endpoint")
    with pytest.raises(UsageError, match="MANAGER_URL"):
        run("--manager", "endpoint", "--limit", "1")


# ------------------------------------------------------------------------------------------------ local Managers

@pytest.fixture
def stop_after(monkeypatch):
    """
    stop_after(n): after n batches of prompts, Ctrl-C. The list that it returns has the size of every batch. Dialogues
    have 7 turns.
    """
    monkeypatch.setattr(evaluate, "SHORT", {**evaluate.SHORT, "num_turns": 7})
    sample = Policy.sample

    def start(limit):
        sizes = []

        def counted(self, prompts, *args, **options):
            if len(sizes) == limit:
                raise KeyboardInterrupt
            sizes.append(len(prompts))
            return sample(self, prompts, *args, **options)
        monkeypatch.setattr(Policy, "sample", counted)
        return sizes
    return start


@pytest.mark.parametrize("flags", [("--manager", "base"), ("--manager", "m", "base", "--no-extract")])
def test_a_local_manager_that_stops_computes_the_rest_only(tmp_path, stop_after, monkeypatch, flags):
    monkeypatch.setattr(evaluate, "RECORDED_AT_ONCE", 3)
    adapter(tmp_path / "m")
    flags = (*flags, "--limit", "2", "--max-new-tokens", "24", "--at-once", "1", "--out")
    flags = flags if "--no-extract" in flags else ("--extract", *flags)
    sizes = stop_after(None)
    whole = run(*flags, "whole.json")
    for i, limit in enumerate((1, len(sizes) - 4)):
        first, out = stop_after(limit), f"{i}.json"
        with pytest.raises(KeyboardInterrupt):
            run(*flags, out)
        rest = stop_after(None)
        assert without_seconds([*run(*flags, out)]) == without_seconds([*whole])
        assert first + rest == sizes, "no batch is computed twice"


def test_times_of_replies_that_were_kept_count(stop_after):
    sizes = stop_after(None)
    flags = ("--manager", "base", "--limit", "2", "--max-new-tokens", "24", "--out")
    found, _ = run(*flags, "x.json")
    Path("x.predictions.jsonl").unlink()
    before, sizes[:] = found["rows"][0], []
    after = run(*flags, "x.json")[0]["rows"][0]
    assert sum(sizes) == 2, "the answers only"
    assert after["latency"]["manager"] == pytest.approx(before["latency"]["manager"], rel=1e-4)
    assert after["seconds"] > 0.999 * sum(row["seconds"] for row in read_rows("x.replies.jsonl")) > 0


def test_replies_of_other_settings_or_weights_are_not_taken(tmp_path, stop_after):
    """Nor is a file of something else, or a line that a kill cut short."""
    def asked(*flags):
        sizes = stop_after(None)
        run("--manager", "m", "--limit", "1", "--out", "x.json", *flags)
        Path("x.predictions.jsonl").unlink()
        return sum(sizes) - 1

    adapter(tmp_path / "m", 1)
    Path("x.replies.jsonl").write_text('{"a": 1}\n[2]\n{"key": "x", "te')
    assert asked() == 7 and asked() == 0
    assert asked("--max-new-tokens", "24") == 7 and asked("--dtype", "bfloat16", "--device", "cpu") == 7
    adapter(tmp_path / "m", 2)
    assert asked() == 7
    adapter(tmp_path / "m", 1)
    assert asked() == 0
    content = Path("x.replies.jsonl").read_bytes().splitlines(keepends=True)
    Path("x.replies.jsonl").write_bytes(b"".join(content[:6]) + content[6][:-9])  # the first three are above
    assert asked() == 7 - 3 and asked() == 0
