"""SFT by hand and against a plain forward pass; a toy that learns and resumes."""
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from toys import encode_texts, rows_of

import sft
from sft import Config, cross_entropy, update
from support.loop import epoch_indices, fit
from support.run import Run

PAIRS = [("Hi", "abc"), ("What is it?", "e"), ("Spell a word", "word, spelled")]


def test_cross_entropy_by_hand():
    """Four tokens of probabilities 1/2, 1/4, 1/8, 1; masked positions do not count."""
    logp = torch.tensor([[1 / 2, 1 / 4, 0.9], [1 / 8, 1, 0.1]]).log()
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert cross_entropy(logp, mask, 4).item() == pytest.approx(6 * math.log(2) / 4)
    assert cross_entropy(logp, mask, 8).item() == pytest.approx(6 * math.log(2) / 8), "a part of a batch of eight"


def encoded(policy):
    return encode_texts(policy, [prompt for prompt, _ in PAIRS]), [policy.encode_reply(text) for _, text in PAIRS]


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_an_update_is_the_gradient_of_a_plain_forward_pass_on_one_adapter(tiny, tokens):
    policy = tiny()
    policy.add_adapter("other", 4, 8)
    optimizer = torch.optim.SGD(policy.named_parameters("agent"), lr=0.0)
    prompts, completions = encoded(policy)
    assert [(policy.decode(ids), ids[-1]) for ids in completions] == [(text, int(policy.eos)) for _, text in PAIRS]
    found = update(policy, optimizer, prompts, completions, "agent", Config(micro_batch_tokens=tokens, grad_clip=1e9))
    gradients = [parameter.grad for parameter in policy.parameters("agent")]
    assert all(one.grad is None for one in [*policy.parameters("other"), *policy.model.parameters()])
    loss, total = 0.0, sum(map(len, completions))
    with policy.using("agent"):
        for prompt, ids in zip(prompts, completions, strict=True):
            logits = policy.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum") / total
    expected = torch.autograd.grad(loss, policy.parameters("agent"))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5) and found["skipped"] == 0
    torch.testing.assert_close(gradients, list(expected), atol=1e-5, rtol=1e-4)
    assert found["grad_norm"] == pytest.approx(math.sqrt(sum((x ** 2).sum().item() for x in gradients)), rel=1e-4)


def run_toy(tiny, folder, resume=False):
    policy = tiny(b=0.0)
    transformers.set_seed(5)
    task = SimpleNamespace(state={}, demonstrations=lambda: (*encoded(policy), {"invalid_rate": 0.25}),
                           evaluate=lambda when, step: [{"step": step, "eval": when}])
    config = Config(steps=80, batch_size=2, lr=0.03, warmup=2, checkpoint_every=40)
    fit(sft.train, policy, task, Run(folder, vars(config), resume=resume), "agent", config)
    return policy, rows_of(folder)


def test_a_toy_is_learned_and_a_stopped_run_resumes_with_the_same_numbers(tiny, tmp_path, monkeypatch):
    base = tiny().model.state_dict()
    policy, whole = run_toy(tiny, tmp_path / "whole")
    assert whole[0] == {"step": 0, "eval": "teacher", "n": 3, "invalid_rate": 0.25, "seconds": 0}
    assert [row.get("eval") for row in whole[1:]] == ["untrained", *[None] * 80, "trained"]
    assert whole[2]["loss"] > 3 and whole[-2]["loss"] < 0.7 and whole[2]["lr"] == pytest.approx(0.015)
    with policy.using("agent"):
        written = [group[0] for group in policy.sample(encoded(policy)[0], 1, 20, temperature=0)]
    assert [(one.text, one.finished) for one in written] == [(text, True) for _, text in PAIRS]
    assert all(torch.equal(weight, base[name]) for name, weight in policy.model.state_dict().items())
    monkeypatch.setattr(sft, "epoch_indices", lambda step, *rest: epoch_indices(step, *rest) if step < 43 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_toy(tiny, tmp_path / "stopped")
    monkeypatch.undo()
    again, resumed = run_toy(tiny, tmp_path / "stopped", resume=True)
    assert resumed == whole and all(map(torch.equal, policy.parameters("agent"), again.parameters("agent")))
