"""Attention in chunks against PyTorch's, and scores and samples in bfloat16 against float32."""
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from support import attention
from support.attention import chunked_attention


def inputs(S, t, seed=0):
    torch.manual_seed(seed)
    shapes = (6, S), (2, t), (2, t)
    return [torch.randn(2, heads, n, 8, dtype=torch.float64, requires_grad=True) for heads, n in shapes]


def reference(query, key, value, visible):
    return scaled_dot_product_attention(query, key, value, visible, scale=0.3, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("S, t, masked", [
    (13, 13, False), (4, 13, False), (1, 6, False), (13, 13, True), (7, 13, True)])
def test_chunks_equal_one_softmax(monkeypatch, chunk, S, t, masked):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    causal = torch.ones(S, t, dtype=torch.bool).tril(t - S)
    keep = torch.rand(2, 1, S, t, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[..., 0] = True  # every query sees something
    visible = causal & keep if masked else causal
    ours, theirs = inputs(S, t), inputs(S, t)
    found = chunked_attention(*ours, visible if masked else None, 0.3)
    expected = reference(*theirs, visible)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_query_that_sees_nothing_is_finite():
    query, key, value = inputs(3, 3)
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    mask[:, :, 0] = False
    assert chunked_attention(query, key, value, mask, 0.3).isfinite().all()


@pytest.mark.parametrize("kind", ["qwen2", "llama-untied"])
def test_scores_in_bfloat16_are_close_to_float32(load, kind, monkeypatch):
    """Packed rows and sampling of a bfloat16 model on a CPU, in chunks of 4 queries."""
    monkeypatch.setattr(attention, "CHUNK", 4)
    exact, rounded = load(kind), load(kind)
    rounded.model.to(torch.bfloat16)
    prompts = [list(range(3, 30)), list(range(3, 20)), [5, 6, 7]]
    with rounded.using("manager"), exact.using("manager"):
        groups = rounded.sample(prompts, 5, 6)
        completions = [[one.ids for one in group] for group in groups]
        expected, found = exact.score(prompts, completions), rounded.score(prompts, completions)
    sampled = torch.tensor([logp for group in groups for one in group for logp in one.logps])
    assert (found.logp - expected.logp)[found.mask].abs().max() < 0.06
    assert (sampled - expected.logp[expected.mask]).abs().max() < 0.06
