"""
Attention for completions that share a prompt, registered in transformers as `_attn_implementation = "shared"`, and the
decoder for sampling. Exact up to rounding: a token's softmax runs over the same keys as for its completion alone.

Shapes: P prompts of up to L tokens, N rows that continue them, t tokens so far, H query heads, K key heads of size D,
V vocabulary. Rows are ordered by their prompt.
"""
from functools import partial
from os.path import commonprefix

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CHUNK = 128  # queries; their scores should stay in a CPU's cache
MIN_PREFIX = 16  # tokens; a shorter common prefix is not worth its own forward pass


class SharedPrompts:
    """The prompts' key-value cache while rows continue them: a grid of P x W cells, up to W rows per prompt."""

    def __init__(self, cache, visible, owners):
        self.cache, self.visible = cache, visible  # visible (P, L): False = padding
        self.assign(owners)

    def assign(self, owners):
        """Give each row its prompt: owners (N,), ascending. Prompts without a row are dropped."""
        used, self.owners, counts = owners.unique_consecutive(return_inverse=True, return_counts=True)
        if len(used) < len(self.visible):
            self.cache.reorder_cache(used)
            self.visible = self.visible[used]
        self.grid, number = (len(used), int(counts.max())), torch.arange(len(owners), device=owners.device)
        self.cells = self.owners * self.grid[1] + number - (counts.cumsum(0) - counts)[self.owners]

    def attend(self, module, query, key, value, scaling):
        """One softmax over a row's prompt and its own tokens so far. query (N, H, 1, D); key, value (N, K, t, D)"""
        def to_grid(x):  # (N, K, H / K, X) -> (P, K, W * H / K, X): a prompt's keys meet all their queries at once
            cells = x.new_zeros(self.grid[0] * self.grid[1], *x.shape[1:]).index_copy_(0, self.cells, x)
            return cells.unflatten(0, self.grid).transpose(1, 2).flatten(2, 3)

        def to_rows(x):  # the inverse of to_grid
            return x.unflatten(2, (self.grid[1], -1)).transpose(1, 2).flatten(0, 1)[self.cells]

        prompt, L = self.cache.layers[module.layer_idx], self.visible.shape[1]
        query = query.squeeze(2).unflatten(1, (key.shape[1], -1)) * scaling
        scores = (to_grid(query) @ prompt.keys.mT).masked_fill_(~self.visible[:, None, None], -torch.inf)
        weights = torch.cat([scores, to_grid(query @ key.mT)], -1).softmax(-1, torch.float32).to(value.dtype)
        states = to_rows(weights[..., :L] @ prompt.values) + to_rows(weights[..., L:]) @ value
        return states.flatten(1, 2)[:, None]  # (N, 1, H, D)


def chunked_attention(query, key, value, mask, scaling):
    """
    Causal attention in plain matrix products, CHUNK queries at a time: on a CPU in bfloat16 three times as fast as
    PyTorch's own, with backward. query (B, H, S, D) are the last S of t tokens; key, value (B, K, t, D); mask
    (B, 1, S, t) is True where a token may attend, None: to itself and all before it. Returns (B, S, H, D).
    """
    (S, _), (num_heads, t) = query.shape[2:], key.shape[1:3]
    query, chunks = (query * scaling).unflatten(1, (num_heads, -1)), []  # (B, K, H / K, S, D)
    mask = torch.ones(S, t, dtype=torch.bool, device=query.device).tril(t - S) if mask is None else mask[:, :, None]
    for start in range(0, S, CHUNK):
        stop = min(S, start + CHUNK)
        seen = t - S + stop  # later keys are invisible to all queries of the chunk
        some = query[:, :, :, start:stop]
        scores = (some.flatten(2, 3) @ key[:, :, :seen].mT).view(*some.shape[:-1], seen)
        scores = scores.masked_fill(~mask[..., start:stop, :seen], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).flatten(2, 3)
        chunks.append((weights @ value[:, :, :seen]).view(some.shape).flatten(1, 2))
    return torch.cat(chunks, dim=2).transpose(1, 2)


def shared_attention(module, query, key, value, attention_mask, scaling=None, prompts=None, **kwargs):
    """
    While sampling, `prompts` holds the prompts' part of the cache. In packed rows the mask covers the last tokens only:
    the tokens before are prompt tokens in every row, and causal attention is faster without a mask.
    """
    if prompts is not None:
        return prompts.attend(module, query, key, value, scaling), None
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        attend = partial(chunked_attention, scaling=scaling)
    else:
        attend = lambda *states: sdpa_attention_forward(module, *states, scaling=scaling, **kwargs)[0]  # noqa: E731
    n = query.shape[2] - attention_mask.shape[2] if attention_mask is not None else 0
    before = [attend(query[:, :, :n], key[:, :, :n], value[:, :, :n], None)] if n else []
    return torch.cat([*before, attend(query[:, :, n:], key, value, attention_mask)], dim=1), None


AttentionInterface.register("shared", shared_attention)
AttentionMaskInterface.register("shared", sdpa_mask)


class Decoder:
    """
    Next-token logits for N rows. Each distinct prompt is read once; with `shares_prompts` all rows attend to that
    cache, else it is copied for each row. Padding follows the common prefix of c tokens, so all rows write to the same
    column. Two prompts with c = 2 (MIN_PREFIX ignored); `gap` is the padding of each, from column c on:
        ids  1 2 3 4 5 6    positions  0 1 2 3 4 5    gap  0
             1 2 0 0 7 8               0 1 - - 2 3         2
    """

    def __init__(self, model, rows: list[tuple[int, ...]], max_new_tokens: int, shares_prompts: bool):
        self.model, self.shares_prompts, device = model, shares_prompts, model.device
        prompts = list(dict.fromkeys(rows))  # the longest first
        self.width = L = len(prompts[0])
        c = min(len(commonprefix(prompts)), len(prompts[-1]) - 1) if shares_prompts and len(prompts) > 1 else 0
        self.num_common = c = c if c >= MIN_PREFIX else 0
        self.ids = torch.tensor([[*p[:c], *[0] * (L - len(p)), *p[c:]] for p in prompts], device=device)
        columns = torch.arange(L + max_new_tokens, device=device)
        gap = torch.tensor([[L - len(p)] for p in prompts], device=device) * (columns >= c)
        self.positions, self.visible = (columns - gap).clamp(min=0), (columns < c) | (columns >= c + gap)
        number = {p: i for i, p in enumerate(prompts)}
        self.owners = torch.tensor([number[p] for p in rows], device=device)
        self.cache, self.shared = DynamicCache(config=model.config), {}

    def read_prompts(self):
        """The logits after each row's prompt, (N, V)."""
        c, L = self.num_common, self.width
        if c:
            self.model.base_model(input_ids=self.ids[:1, :c], past_key_values=self.cache, use_cache=True)
            self.cache.reorder_cache(torch.zeros_like(self.ids[:, 0]))
        logits = self._forward(self.ids[:, c:], self.positions[:, c:L], self.visible[:, :L])
        if self.shares_prompts:
            self.shared["prompts"] = SharedPrompts(self.cache, self.visible[:, :L], self.owners)
            self.cache = DynamicCache(config=self.model.config)
        else:
            self.cache.reorder_cache(self.owners)
            self.visible = self.visible[self.owners]
        self.positions = self.positions[self.owners]
        return logits[self.owners]

    def read_tokens(self, tokens):
        """Append one token to each row, (N,); return the logits after it, (N, V)."""
        column = self.width
        self.width += 1
        visible = (self.shared["prompts"].visible[:, None, None] if self.shares_prompts
                   else self.visible[:, :self.width])
        return self._forward(tokens[:, None], self.positions[:, column:self.width], visible)

    def keep(self, rows):
        """Continue with these rows only: indices, ascending."""
        self.cache.reorder_cache(rows)
        self.positions = self.positions[rows]
        if self.shares_prompts:
            self.shared["prompts"].assign(self.shared["prompts"].owners[rows])
        else:
            self.visible = self.visible[rows]

    def _forward(self, ids, positions, attention):
        states = self.model.base_model(input_ids=ids, attention_mask=attention, position_ids=positions,
                                       past_key_values=self.cache, use_cache=True, **self.shared).last_hidden_state
        # (N, H): for (N, 1, H) a CPU would copy the (V, H) weight once per row
        return self.model.get_output_embeddings()(states[:, -1])
