"""
Attention where several completions share a prompt, for transformers' models to call: `_attn_implementation = "shared"`.
Exact: the softmax of every token runs over the same keys as if its completion stood there alone.

Shapes: P prompts of up to L tokens, N rows that continue them, t tokens so far, H heads, K heads of keys, D their size.
"""
from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class SharedPrompts:
    """The key-value cache of the prompts while rows continue them: a grid of P x W places, up to W rows to a prompt."""

    def __init__(self, cache, visible, owners):
        self.cache, self.visible = cache, visible  # (P, L) False = padding
        self.assign(owners)

    def assign(self, owners):
        """owners (N,): the prompt of each row, ascending. Prompts of which no row is left leave."""
        used, self.owners, counts = owners.unique_consecutive(return_inverse=True, return_counts=True)
        if len(used) < len(self.visible):
            self.cache.reorder_cache(used)
            self.visible = self.visible[used]
        self.grid, number = (len(used), int(counts.max())), torch.arange(len(owners), device=owners.device)
        self.places = self.owners * self.grid[1] + number - (counts.cumsum(0) - counts)[self.owners]

    def attend(self, module, query, key, value, scaling):
        """One softmax over a row's prompt and its completion so far. query (N, H, 1, D); key, value (N, K, t, D)"""
        def to_grid(x):  # (N, K, H / K, X) -> (P, K, W * H / K, X): the keys of a prompt meet all their queries at once
            places = x.new_zeros(self.grid[0] * self.grid[1], *x.shape[1:]).index_copy_(0, self.places, x)
            return places.unflatten(0, self.grid).transpose(1, 2).flatten(2, 3)

        def to_rows(x):  # and back
            return x.unflatten(2, (self.grid[1], -1)).transpose(1, 2).flatten(0, 1)[self.places]

        prompt, L = self.cache.layers[module.layer_idx], self.visible.shape[1]
        query = query.squeeze(2).unflatten(1, (key.shape[1], -1)) * scaling
        scores = (to_grid(query) @ prompt.keys.mT).masked_fill_(~self.visible[:, None, None], -torch.inf)
        weights = torch.cat([scores, to_grid(query @ key.mT)], -1).softmax(-1, torch.float32).to(value.dtype)
        states = to_rows(weights[..., :L] @ prompt.values) + to_rows(weights[..., L:]) @ value
        return states.flatten(1, 2)[:, None]  # (N, 1, H, D)


def shared_attention(module, query, key, value, attention_mask, scaling=None, prompts=None, **kwargs):
    """
    While sampling, `prompts` holds their part of the cache. In packed rows, `[prompt | c_1 | ... | c_G]`, the mask
    is for the last tokens only: all before are prompt in every row, and causal attention is faster without a mask.
    """
    if prompts is not None:
        return prompts.attend(module, query, key, value, scaling), None
    attend = partial(sdpa_attention_forward, module, scaling=scaling, **kwargs)
    n = query.shape[2] - attention_mask.shape[2] if attention_mask is not None else 0
    before = [attend(query[:, :, :n], key[:, :, :n], value[:, :, :n], None)[0]] if n else []
    return torch.cat([*before, attend(query[:, :, n:], key, value, attention_mask)[0]], dim=1), None


AttentionInterface.register("shared", shared_attention)
AttentionMaskInterface.register("shared", sdpa_mask)
