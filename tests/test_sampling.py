"""Sampling against transformers' generate, the scores of the same tokens, and the softmax."""
import pytest
import torch
from tiny_models import EOS, PACKED, PROMPTS, WINDOWED, logits_of

from data import UsageError
from policy import sample_token
from support import packing


@pytest.mark.parametrize("kind", PACKED + WINDOWED)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_sampling_equal_scoring(load, kind, temperature):
    policy = load(kind)
    torch.manual_seed(0)
    with policy.using("manager"):
        groups = policy.sample(PROMPTS, n=12, max_new_tokens=15, temperature=temperature)
        with torch.no_grad():
            scores = policy.score(PROMPTS, [[c.ids for c in group] for group in groups], temperature)
    flat = [c for group in groups for c in group]
    assert [len(group) for group in groups] == [12] * 3
    assert len({len(c.ids) for c in flat}) > 3 and 0 < sum(c.finished for c in flat) < 36
    for c, row, mask in zip(flat, scores.logp, scores.mask, strict=True):
        torch.testing.assert_close(torch.tensor(c.logps), row[mask], atol=1e-5, rtol=0)
        assert c.finished == (c.ids[-1] in EOS) and not set(c.ids[:-1]) & set(EOS)
        assert c.finished or len(c.ids) == 15


@pytest.mark.parametrize("kind", PACKED + WINDOWED)
def test_greedy_equals_generate(load, kind):
    policy = load(kind)
    prompts = [*PROMPTS, *([i, i + 1, i + 2] for i in range(20, 30))]
    with policy.using("manager"):
        groups = policy.sample(prompts, max_new_tokens=20, temperature=0)
        for prompt, [completion] in zip(prompts, groups, strict=True):
            ids = torch.tensor([prompt])
            theirs = policy.model.generate(ids, do_sample=False, max_new_tokens=20)
            assert completion.ids == theirs[0, len(prompt):].tolist()
    assert {completion.finished for [completion] in groups} == {True, False}


@pytest.mark.parametrize("kind", ["qwen2", "llama-untied", "mistral-window"])
def test_the_common_beginning_of_prompts_is_read_once(load, kind):
    policy, begin = load(kind), list(range(3, 23))
    prompts = [[*begin, 40, 41, 42, 43], begin, [*begin, 40, 50]]  # one is the beginning of the others
    seen = watch(policy)
    policy.model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True)
    torch.manual_seed(0)
    with policy.using("manager"), torch.no_grad():
        groups = policy.sample(prompts, n=6, max_new_tokens=12)
        packs, policy.packs = policy.packs, False
        scores = policy.score(prompts, [[c.ids for c in group] for group in groups])
    logps = [logp for group in groups for c in group for logp in c.logps]
    torch.testing.assert_close(torch.tensor(logps), scores.logp[scores.mask], atol=1e-5, rtol=0)
    passes = [shape for shape in seen if isinstance(shape[0], int)]
    assert passes[:2] == ([(1, 19), (3, 5)] if packs else [(3, 24), (18, 1)])


def watch(policy):
    """Record (shape of the ids, positions) of every forward pass of `sample` from here on."""
    seen, before = [], policy.model.base_model.forward

    def forward(**inputs):
        if "position_ids" in inputs:  # not for the common beginning of prompts
            seen.append((tuple(inputs["input_ids"].shape), inputs["position_ids"].tolist()))
        if "prompts" in inputs:  # only prompts that are still continued
            assert sorted(set(inputs["prompts"].owners.tolist())) == list(range(len(inputs["prompts"].visible)))
            assert inputs["prompts"].cache.layers[0].keys.shape[0] == len(inputs["prompts"].visible)
        return before(**inputs)
    policy.model.base_model.forward = forward
    return seen


def test_a_prompt_is_read_once_and_finished_rows_leave(load):
    policy = load()
    seen, prompts = watch(policy), [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    greedy = policy.sample(prompts, n=4, max_new_tokens=5, temperature=0)
    assert seen[0][0] == (2, 7) and all(rows <= 2 for (rows, _), _ in seen)
    assert greedy[0] == greedy[2] == [greedy[0][0]] * 4 and greedy[0] != greedy[1]
    seen.clear()
    groups = policy.sample(prompts, n=4, max_new_tokens=30)
    assert seen[0] == ((2, 7), [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0, 1]])
    assert len({tuple(c.ids) for c in groups[0] + groups[2]}) > 4
    lengths = [len(c.ids) for group in groups for c in group]
    assert [shape for shape, _ in seen[1:]] == [
        (sum(length > t for length in lengths), 1) for t in range(1, max(lengths))]


def test_budget_splits_batches_and_keeps_the_order(load, monkeypatch):
    policy = load()
    prompts = [[20 + i] * length for i, length in enumerate([3, 9, 1, 5, 5, 12, 2, 9, 1, 7, 3, 4])]
    whole = policy.sample(prompts, max_new_tokens=8, temperature=0)
    monkeypatch.setattr(packing, "max_sampling_tokens", lambda policy: 45)
    seen = watch(policy)
    split = policy.sample(prompts, max_new_tokens=8, temperature=0)
    assert [c.ids for [c] in split] == [c.ids for [c] in whole]
    prefills = [(rows, length) for (rows, length), _ in seen if length > 1]
    assert len(prefills) > 3 and all(rows * (length + 8) <= 45 for rows, length in prefills)
    groups = policy.sample(PROMPTS, n=7, max_new_tokens=8)  # even a group is split
    scores = policy.score(PROMPTS, [[c.ids for c in group] for group in groups])
    logps = [logp for group in groups for c in group for logp in c.logps]
    torch.testing.assert_close(scores.logp[scores.mask], torch.tensor(logps), atol=1e-5, rtol=0)


def chi_square(tokens, probabilities):
    """Within 5 standard deviations of its mean, for counts of at least 5 expected."""
    expected = probabilities * len(tokens)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected))
    often = expected >= 5
    degrees = int(often.sum()) - 1
    return ((counts - expected)[often] ** 2 / expected[often]).sum() < degrees + 5 * (2 * degrees) ** 0.5


def test_token_frequencies_match_the_softmax(load):
    policy, prompt = load(), PROMPTS[0]
    torch.manual_seed(0)
    with policy.using("manager"):
        [group] = policy.sample([prompt], n=6000, max_new_tokens=2, temperature=0.8)
        first = (logits_of(policy.model, prompt)[0, -1] / 0.8).softmax(-1)
        likely = next(i for i in first.argsort(descending=True).tolist() if i not in EOS)
        second = (logits_of(policy.model, [*prompt, likely])[0, -1] / 0.8).softmax(-1)
    tokens = [c.ids[0] for c in group]
    assert chi_square(tokens, first) and not chi_square(tokens, (first.log() * 0.8).softmax(-1))
    assert chi_square([c.ids[1] for c in group if c.ids[0] == likely], second)
    runs = [torch.manual_seed(seed) and policy.sample([prompt], 50, 3) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_sample_token_never_takes_an_impossible_token():
    logits = torch.full((5000, 6), -torch.inf)
    logits[:, 2], logits[:, 4] = 0.0, 1.0
    token, logp = sample_token(logits, 1.0)
    assert set(token.tolist()) == {2, 4} and logp.isfinite().all()


def test_nan_is_reported(load):
    policy = load()
    policy.parameters("manager")[1].data.fill_(torch.nan)
    with policy.using("manager"), pytest.raises(UsageError, match="nan for the next token"):
        policy.sample(PROMPTS, n=2, max_new_tokens=3)
