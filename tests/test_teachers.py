"""Demonstrations for supervised learning of the Manager: reference operations and a hosted teacher."""
import json
import re

import pytest

import data
import manager
import train_answer
import train_manager
from data import UsageError
from memory import Memory
from policy import Policy


def task(*flags):
    args = train_manager.arguments(["--algo", "sft", "--eval", "0", "--steps", "2", "--batch-size", "10", *flags])
    return train_manager.ManagerTask(Policy.load(data.TINY), args)


@pytest.mark.parametrize("model, word", [(str(data.TINY), '"old_memory":" '), ("another", '"id": ')])
def test_reference_operations_in_the_format_of_each_model(model, word):
    made = task("--model", model)
    prompts, completions, report = made.demonstrations()
    texts, known = [made.policy.decode(ids) for ids in completions], made.teacher_decisions()
    assert report["invalid_rate"] == 0 and sum(report["ops"].values()) == len(prompts) == 20 and word in "".join(texts)
    for prompt, text, (case, edits) in zip(prompts, texts, known, strict=True):
        assert prompt == made.policy.encode(manager.messages(case, tiny=True)) and manager.parse(text, case) == edits


def test_edits_of_memories_that_are_not_shown_are_left_out():
    made, memories = task("--max-prompt-tokens", "40"), [Memory(i, f"Jon likes Rex{i}.", "Jon", "") for i in range(5)]
    case = manager.Case("Jon", "", ("x",), tuple(memories))  # the best match comes first; the last one does not fit
    made.teacher_decisions = lambda: [(case, [manager.Edit("DELETE", i)]) for i in (0, 4)]
    (prompt,), (completion,), report = made.demonstrations()
    assert report["invalid_rate"] == 0.5 and "Rex0" in made.policy.decode(completion) and len(prompt) <= 40


def test_a_hosted_teacher_builds_its_own_banks_and_is_never_asked_twice(serve, tmp_path, monkeypatch):
    """It stores every fact; for facts with an "s" its output is invalid."""
    def teach(chat):
        fact = re.search("- (.*)\noperations:", chat[-1]["content"])[1]
        return "I would not." if "s" in fact[:9] else f'Of course: [{{"event": "ADD", "text": "{fact}"}}] Done.'
    server = serve(rule=teach)
    monkeypatch.setenv("MANAGER_URL", server.url)
    monkeypatch.setenv("MANAGER_MODEL", "big")
    monkeypatch.setattr(train_manager, "REPLIES", str(tmp_path / "new/teacher.jsonl"))
    prompts, completions, report = (made := task("--teacher", "endpoint")).demonstrations()
    texts = [json.loads(made.policy.decode(ids)) for ids in completions]
    assert len(server.requests) == 20 and 0 < len(texts) < 20
    assert report == {"invalid_rate": pytest.approx(1 - len(texts) / 20), "ops": {"ADD": len(texts)}}
    shown = "".join(map(made.policy.decode, prompts))
    assert any(f") {item['text'].strip()}\n" in shown for item, in texts), "its next prompts show what it stored"
    again = task("--teacher", "endpoint").demonstrations()
    assert again == (prompts, completions, report) and len(server.requests) == 20
    server.rule = (401, {}, b"")
    monkeypatch.setenv("MANAGER_MODEL", "bigger")
    with pytest.raises(UsageError, match="MANAGER_URL"):
        task("--teacher", "endpoint").demonstrations()


def test_refusals(monkeypatch):
    monkeypatch.setenv("MANAGER_MODEL", "")
    with pytest.raises(UsageError, match="--data locomo has no reference operations.*--teacher endpoint"):
        train_manager.arguments(["--algo", "sft", "--data", "locomo"])
    with pytest.raises(UsageError, match="set MANAGER_URL"):
        task("--teacher", "endpoint")
    with pytest.raises(UsageError, match="--algo sft.*train_manager.py"):
        train_answer.arguments(["--algo", "sft"])
    made = task()
    made.teacher_decisions = lambda: [(manager.Case("Jon", "", ("x",), ()), None)] * 3
    with pytest.raises(UsageError, match="none of the teacher's 3 outputs"):
        made.demonstrations()
