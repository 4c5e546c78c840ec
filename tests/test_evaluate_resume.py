"""Stopped evaluations, files that cannot be continued, and judges and Managers that are hosted or fail."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import adapter, in_an_empty_folder, rag, read, run, without_seconds  # noqa: F401, a fixture

import evaluate
from data import UsageError
from policy import Policy
from support import report

TWO = ("--system", "rag", "oracle", "--limit", "14", "--at-once", "4", "--out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """FILE.json and FILE.predictions.jsonl of an evaluation that was not stopped."""
    path = tmp_path_factory.mktemp("whole") / "whole.json"
    run(*TWO, path)
    return path.read_text(), report.predictions_path(path).read_bytes()


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
    model = "judge"

    def __init__(self, is_available):
        self.is_available = is_available

    def __call__(self, triples):
        if not self.is_available:
            raise UsageError("no reply from http://judge")
        self.reasons = [f"{prediction} or {gold}" for _, prediction, gold in triples]
        return [float(prediction == gold) for _, prediction, gold in triples]


def test_a_judge_that_fails_loses_its_column_only(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "make_judge", lambda *_, **options: Judge(is_available=False))
    with pytest.raises(UsageError, match="http://judge"):
        rag("--judge", "endpoint")
    found, lines = read("x.json")
    assert len(lines) == 4 and found["rows"][0]["overall"]["judge"] is None and "judge" not in lines[0]
    assert re.search(r"(?m)^rag ", capsys.readouterr().out)
    monkeypatch.setattr(evaluate, "make_judge", lambda *_, **options: Judge(is_available=True))
    monkeypatch.setattr(Policy, "sample", None)
    found, lines = rag("--judge", "endpoint")
    assert found["rows"][0]["overall"]["judge"] == np.mean([line["judge"] for line in lines])
    assert {line["judge_model"] for line in lines} == {"judge"}
    assert [line["judge"] for line in lines] == [float(line["prediction"] == line["gold"]) for line in lines]
    assert [line["judge_reason"] for line in lines] == [f"{line['prediction']} or {line['gold']}" for line in lines]


@pytest.fixture
def start_server(serve, tmp_path, monkeypatch):
    """start_server(calls) starts a hosted Manager that adds every fact, and refuses requests after so many calls."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def start(calls):
        replies = []

        def reply(messages):
            replies.append(messages[1]["content"].split("- ")[-1].split("\n")[0])
            content = json.dumps([{"event": "ADD", "text": replies[-1]}])
            return content if len(replies) <= calls else (403, {}, b"no credit")
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


def test_an_unnamed_server_is_reported_before_the_work(monkeypatch):
    for name in ("JUDGE_URL", "MANAGER_URL", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Policy, "sample", None)
    with pytest.raises(UsageError, match="JUDGE_URL"):
        rag("--judge", "endpoint")
    with pytest.raises(UsageError, match="MANAGER_URL"):
        run("--manager", "endpoint", "--limit", "1")
