"""SFT by hand, against a plain forward pass; a toy that learns, resumes; what a Manager's teachers demonstrate."""
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

import data
import manager
import sft
import train_answer
import train_manager
from data import UsageError
from memory import Memory
from policy import Policy
from sft import Config, batch_of, cross_entropy, update
from support.run import Run, read_rows, seed_everything

PAIRS = [("Hi", "abc"), ("What is it?", "e"), ("Spell a word", "word, spelled")]


def test_cross_entropy_by_hand():
    """Four tokens of probabilities 1/2, 1/4, 1/8, 1; what stands at a masked place does not count."""
    logp = torch.tensor([[1 / 2, 1 / 4, 0.9], [1 / 8, 1, 0.1]]).log()
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert cross_entropy(logp, mask, 4).item() == pytest.approx(6 * math.log(2) / 4)
    assert cross_entropy(logp, mask, 8).item() == pytest.approx(6 * math.log(2) / 8), "a part of a batch of eight"


def encoded(policy):
    prompts = [policy.encode(manager.chat("", prompt)[1:]) for prompt, _ in PAIRS]
    return prompts, [policy.encode_reply(text) for _, text in PAIRS]


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_an_update_is_the_gradient_of_a_plain_forward_pass_on_one_adapter(tiny, tokens):
    policy, optimizer = tiny(), SimpleNamespace(zero_grad=lambda set_to_none: None, step=lambda: None)
    policy.add_adapter("other", 4, 8)
    prompts, completions = encoded(policy)
    assert [(policy.decode(ids), ids[-1]) for ids in completions] == [(text, int(policy.eos)) for _, text in PAIRS]
    found = update(policy, optimizer, prompts, completions, "agent", Config(micro_batch_tokens=tokens, grad_clip=1e9))
    slopes = [parameter.grad for parameter in policy.parameters("agent")]
    assert all(one.grad is None for one in [*policy.parameters("other"), *policy.model.parameters()])
    loss, total = 0.0, sum(map(len, completions))
    with policy.using("agent"):
        for prompt, ids in zip(prompts, completions, strict=True):
            logits = policy.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum") / total
    wanted = torch.autograd.grad(loss, policy.parameters("agent"))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5) and found["skipped"] == 0
    torch.testing.assert_close(slopes, list(wanted), atol=1e-5, rtol=1e-4)
    assert found["grad_norm"] == pytest.approx(math.sqrt(sum((slope ** 2).sum().item() for slope in slopes)), rel=1e-4)


@pytest.mark.parametrize("count", [1, 5, 24, 100])
def test_all_come_up_once_before_any_comes_up_again(count):
    order = [i for step in range(1, 30) for i in batch_of(step, count, Config(batch_size=8))]
    passes = [order[start:start + count] for start in range(0, len(order) - count + 1, count)]
    assert all(sorted(one) == list(range(count)) for one in passes) and (count < 24 or passes[0] != passes[1])


def run_toy(tiny, folder, resume=False):
    policy = tiny(b=0.0)
    seed_everything(5)
    task = SimpleNamespace(demonstrations=lambda: (*encoded(policy), {"invalid_rate": 0.25}),
                           evaluate=lambda when, step: [{"step": step, "eval": when}])
    config = Config(steps=80, batch_size=2, lr=0.03, warmup=2, checkpoint_every=40)
    sft.train(policy, task, Run(folder, vars(config), resume=resume), "agent", config)
    return policy, [{**row, "seconds": 0} for row in read_rows(folder / "metrics.jsonl")]


def test_a_toy_is_learned_and_a_run_that_was_stopped_goes_on_with_the_same_numbers(tiny, tmp_path, monkeypatch):
    base = tiny().model.state_dict()
    policy, whole = run_toy(tiny, tmp_path / "whole")
    assert whole[0] == {"step": 0, "eval": "teacher", "n": 3, "invalid_rate": 0.25, "seconds": 0}
    assert [row.get("eval") for row in whole[1:]] == ["untrained", *[None] * 80, "trained"]
    assert whole[2]["loss"] > 3 and whole[-2]["loss"] < 0.7 and whole[2]["lr"] == pytest.approx(0.015)
    with policy.using("agent"):
        written = [group[0] for group in policy.sample(encoded(policy)[0], 1, 20, temperature=0)]
    assert [(one.text, one.finished) for one in written] == [(text, True) for _, text in PAIRS]
    assert all(torch.equal(weight, base[name]) for name, weight in policy.model.state_dict().items())
    monkeypatch.setattr(sft, "batch_of", lambda step, *rest: batch_of(step, *rest) if step < 43 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_toy(tiny, tmp_path / "stopped")
    monkeypatch.undo()
    again, resumed = run_toy(tiny, tmp_path / "stopped", resume=True)
    assert resumed == whole and all(map(torch.equal, policy.parameters("agent"), again.parameters("agent")))


def task(*flags):
    args = train_manager.arguments(["--algo", "sft", "--eval", "0", "--steps", "2", "--batch-size", "10", *flags])
    return train_manager.ManagerTask(Policy.load(data.TINY), args)


@pytest.mark.parametrize("model, word", [(str(data.TINY), '"old_memory":" '), ("another", '"id": ')])
def test_known_operations_in_the_way_of_each_model(model, word):
    made = task("--model", model)
    prompts, completions, about = made.demonstrations()
    texts, known = [made.policy.decode(ids) for ids in completions], made.known_decisions()
    assert about["invalid_rate"] == 0 and sum(about["ops"].values()) == len(prompts) == 20 and word in "".join(texts)
    for prompt, text, (case, edits) in zip(prompts, texts, known, strict=True):
        assert prompt == made.policy.encode(manager.messages(case)) and manager.parse(text, case) == edits


def test_what_names_a_memory_that_is_not_shown_is_left_out():
    made, memories = task("--max-prompt-tokens", "40"), [Memory(i, f"Jon likes Rex{i}.", "Jon", "") for i in range(5)]
    case = manager.Case("Jon", "", ("x",), tuple(memories))  # the best match first: there is no room for the last
    made.known_decisions = lambda: [(case, [manager.Edit("DELETE", i)]) for i in (0, 4)]
    (prompt,), (completion,), about = made.demonstrations()
    assert about["invalid_rate"] == 0.5 and "Rex0" in made.policy.decode(completion) and len(prompt) <= 40


def test_a_hosted_teacher_is_asked_once_and_makes_its_own_banks(serve, tmp_path, monkeypatch):
    """It stores every fact but those with an "s", of which it says nothing that can be carried out."""
    def teach(chat):
        fact = re.search("- (.*)\noperations:", chat[1]["content"])[1]
        return "I would not." if "s" in fact[:9] else f'Of course: [{{"event": "ADD", "text": "{fact}"}}] Done.'
    server = serve(rule=teach)
    monkeypatch.setenv("MANAGER_URL", server.url)
    monkeypatch.setenv("MANAGER_MODEL", "big")
    monkeypatch.setattr(train_manager, "REPLIES", str(tmp_path / "new/teacher.jsonl"))
    prompts, completions, about = (made := task("--teacher", "endpoint")).demonstrations()
    texts = [json.loads(made.policy.decode(ids)) for ids in completions]
    assert len(server.requests) == 20 and 0 < len(texts) < 20
    assert about == {"invalid_rate": pytest.approx(1 - len(texts) / 20), "ops": {"ADD": len(texts)}}
    shown = "".join(map(made.policy.decode, prompts))
    assert any(f") {item['text'].strip()}\n" in shown for item, in texts), "what it stored is in its next prompts"
    again = task("--teacher", "endpoint").demonstrations()
    assert again == (prompts, completions, about) and len(server.requests) == 20
    server.rule = (401, {}, b"")
    monkeypatch.setenv("MANAGER_MODEL", "bigger")
    with pytest.raises(UsageError, match="MANAGER_URL"):
        task("--teacher", "endpoint").demonstrations()


def test_refusals(monkeypatch):
    monkeypatch.setenv("MANAGER_MODEL", "")
    with pytest.raises(UsageError, match="--data locomo has no known operations.*--teacher endpoint"):
        train_manager.arguments(["--algo", "sft", "--data", "locomo"])
    with pytest.raises(UsageError, match="set MANAGER_URL"):
        task("--teacher", "endpoint")
    with pytest.raises(UsageError, match="--algo sft.*train_manager.py"):
        train_answer.arguments(["--algo", "sft"])
    made = task()
    made.known_decisions = lambda: [(manager.Case("Jon", "", ("x",), ()), None)] * 3
    with pytest.raises(UsageError, match="none of the teacher's 3 outputs"):
        made.demonstrations()
