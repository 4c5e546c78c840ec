"""
A Hugging Face causal language model as a policy: LoRA adapters, sampling, log-probs of completions.

    policy = Policy.load("Qwen/Qwen2.5-0.5B-Instruct")
    policy.add_adapter("manager", rank=16, alpha=32)
    with policy.using("manager"):  # using(None) is the base model: our reference policy
        groups = policy.sample(prompts, n=8)
        logp, entropy, mask = policy.score(prompts, [[c.ids for c in group] for group in groups])

Both agents of Memory-R1 (arXiv 2508.19828, sec. 3) are such policies. The paper fine-tunes all weights of two models;
here one set of frozen weights plays every role, and a role is a LoRA adapter (arXiv 2106.09685, eq. 3) on every
linear layer except the head:  h = W x + (alpha / r) B A x.  B = 0 at the start, so a new adapter changes nothing.

Prompts are long, completions short, and G completions share a prompt. One batch of `sample` and one call of `score`
therefore compute a prompt only once, where the model allows it (`PACKABLE`; `sample` else copies the prompt's cache):
  - `sample` lets the completions attend to the prompt's one key-value cache (support/attention.py).
  - `score` packs a group into one row, [prompt | c_1 | ... | c_G] (support/packing.py).
There is no top-p or top-k: training needs log-probs under the distribution that was sampled from, and that is
softmax(logits / temperature) in `sample` and in `score`.

Shapes: P prompts, G completions each, N = P*G rows in prompt-major order, C tokens in the longest completion, T
completion tokens in all (without padding), H hidden size, V vocabulary, r rank.
`mask` (N, C) is True where a token was sampled, including the EOS, and False on padding.
"""
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from data import TINY, UsageError
from support import packing
from support.attention import Decoder
from support.chat import ChatTemplate
from support.cli import Parser, exit_cleanly
from support.distributed import all_gather, all_reduce_sum, local_shard
from support.packing import PackedBatch, scatter_to_mask
from support.peft_format import match_layers, read_adapter, write_adapter
from support.pretrained import load_pretrained
from support.rollouts import group_rows

# Model families whose packed scores are tested against unpacked ones; others are scored unpacked. A 4-D mask is
# silently wrong with a sliding window, linear attention, or positions derived from the mask (ALiBi).
PACKABLE = ("llama", "mistral", "qwen2", "qwen3")


class LoRALinear(nn.Module):
    """h = W x + (alpha / r) B A x: one frozen W (out, in), and A (r, in), B (out, r) for each adapter."""

    def __init__(self, base, policy):
        super().__init__()
        self.base, self.policy = base, policy  # policy.active selects the adapter of all layers at once
        self.adapters = {}  # name -> (A, B, scale); a plain dict keeps A, B out of the base model's own parameters

    def add_adapter(self, name, A, B, scale):
        # float32 even on a bfloat16 base: with 8 bits of precision most optimizer steps would be rounded away
        A, B = (nn.Parameter(x.float().to(self.base.weight.device)) for x in (A, B))
        self.adapters[name] = A, B, scale

    def forward(self, x):
        y = self.base(x)
        if self.policy.active not in self.adapters:  # LoRA off, or an adapter without this layer
            return y
        A, B, scale = self.adapters[self.policy.active]
        low = x.flatten(0, -2) @ A.to(x.dtype).T  # (tokens, r), in the base's dtype
        return torch.addmm(y.flatten(0, -2), low, B.to(x.dtype).T, alpha=scale).view_as(y)


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # including the EOS if one was sampled
    logps: list[float]  # log pi(token) at the sampling temperature; at temperature 1 for greedy decoding
    finished: bool  # False: cut off at max_new_tokens
    text: str  # without the EOS


class Scores(NamedTuple):
    logp: torch.Tensor  # (N, C) float32, 0 where masked
    entropy: torch.Tensor  # (N, C) float32, without gradient
    mask: torch.Tensor  # (N, C) bool


def rows_at_once(x, V):
    """Return how many rows of V float32 logits to compute at a time: with V = 150,000 not all rows fit into memory."""
    return max(1, 2 ** (25 if x.is_cuda else 22) // V)  # large enough for a GPU, small enough for a CPU's cache


def sample_token(logits, temperature):
    """Draw one token per row, with its log-prob: (N, V) -> (N,), (N,). Temperature 0 takes the most likely token."""
    u = (1 - torch.rand(len(logits), 1, device=logits.device) if temperature  # in (0, 1]
         else logits.new_zeros(len(logits), 1))  # greedy: not used
    size = rows_at_once(logits, logits.shape[1])
    parts = [draw_token(*part, temperature) for part in zip(logits.split(size), u.split(size), strict=True)]
    return [torch.cat(column).squeeze(1) for column in zip(*parts, strict=True)]


def draw_token(logits, u, temperature):
    """The token at the quantile u of softmax(logits / temperature), and its log-prob: (n, V), (n, 1) -> 2 x (n, 1)"""
    logp = (logits.float() / (temperature or 1)).log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1, keepdim=True)
    else:  # inverse transform sampling: on a CPU 8 times as fast as torch.multinomial
        cdf = logp.exp().cumsum(-1)
        token = torch.searchsorted(cdf, u * cdf[:, -1:]).clamp(max=cdf.shape[1] - 1)  # the clamp guards against NaN
    return token, logp.gather(1, token)


class TokenScores(torch.autograd.Function):
    """
    log pi(y) and the entropy of pi = softmax(W h / temperature). h (t, H), y (t,) -> (t,), (t,)
    W (V, H) is frozen, so only h needs a gradient. The forward pass computes it, because pi is available there:
        d log pi(y) / d h = (W_y - sum_v pi(v) W_v) / temperature
    Autograd would keep the (t, V) probabilities until the backward pass instead.
    """
    @staticmethod
    def forward(ctx, h, y, head, temperature):
        logpi = head(h).float().div_(temperature).log_softmax(-1)  # (t, V)
        logp, pi = logpi.gather(1, y[:, None]).squeeze(1), logpi.exp()
        entropy = -logpi.mul_(pi).sum(-1)
        if ctx.needs_input_grad[0]:
            difference = pi.neg_().scatter_add_(1, y[:, None], torch.ones_like(pi[:, :1]))  # [v = y] - pi(v)
            ctx.save_for_backward(difference.to(h.dtype) @ head.weight / temperature)  # (t, H)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        slope, = ctx.saved_tensors
        return grad_logp[:, None].to(slope.dtype) * slope, None, None, None


def token_scores(hidden, head, targets, temperature):
    """log pi(target) and the entropy of pi for all tokens, some at a time. (T, H), (T,) -> (T,), (T,)"""
    size = rows_at_once(hidden, head.out_features)
    parts = [TokenScores.apply(h, y, head, temperature)
             for h, y in zip(hidden.split(size), targets.split(size), strict=True)]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def with_checkpoint(forward):
    """A layer's forward with gradient checkpointing. transformers' own needs training mode, which turns dropout on."""
    def checkpointed_forward(*args, **inputs):
        if torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **inputs)
        return forward(*args, **inputs)
    return checkpointed_forward


class Policy:
    """One base model with named LoRA adapters."""

    def __init__(self, model, tokenizer, name="", gradient_checkpointing=False):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.device, self.head = model.device, model.get_output_embeddings()
        self.window = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # tokens, or None
        self.chat = ChatTemplate(tokenizer, name)
        eos = getattr(model.generation_config, "eos_token_id", None)
        eos = {self.chat.end_of_turn, tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.eos = torch.tensor(sorted(eos), dtype=torch.long, device=self.device)
        self.active, self.adapters = None, {}  # a name or None; name -> r, lora_alpha, use_rslora
        decoder = {*model.get_decoder().modules()}  # the language model of a multimodal model
        self.layers = {path: LoRALinear(linear, self) for path, linear in model.named_modules()
                       if isinstance(linear, nn.Linear) and linear in decoder and linear is not self.head}
        if not self.layers:
            raise UsageError(f"model {name}: LoRA needs nn.Linear layers, and {model.config.model_type} has none; "
                             f"choose one of {', '.join(PACKABLE)}")
        self.packs = self._can_pack()
        if self.packs:
            model.config._attn_implementation = "shared"  # registered by support/attention.py
        for path, layer in self.layers.items():
            model.set_submodule(path, layer)
        self.checkpointed_layers = self._checkpoint_layers() if gradient_checkpointing else None  # None: not tried
        if gradient_checkpointing and not self.checkpointed_layers:
            raise UsageError(f"model {name}: does not support --gradient-checkpointing; leave the flag out")

    @classmethod
    def load(cls, name, device=None, dtype=None, gradient_checkpointing=False):
        """A policy from a hub id, a folder or a .gguf file. Defaults of device and dtype: support/pretrained.py."""
        return cls(*load_pretrained(name, device, dtype), str(name), gradient_checkpointing)

    def _can_pack(self):
        """Whether a 4-D mask describes this model's attention. If not, warns; UsageError if it cannot be scored."""
        config, ids = self.model.config, torch.arange(4, device=self.device)[None]
        kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        is_full = set(kinds) == {"full_attention"} if kinds else window is None
        if config.model_type in PACKABLE and is_full and config._attn_implementation == "sdpa":
            return True
        with torch.no_grad():  # some families scale or cap the head's logits, which `score` would not do
            logits, plain = self.model(ids).logits, self.head(self.model.base_model(ids).last_hidden_state)
        if not torch.allclose(logits, plain, rtol=0.01, atol=0.01):
            raise UsageError(f"model {self.name}: {config.model_type} changes its head's logits and cannot "
                             f"be scored; choose one of {', '.join(PACKABLE)}")
        logging.warning("model %s: %s is scored without packing, which is slower", self.name, config.model_type)
        return False

    def _checkpoint_layers(self):
        """Let the decoder's layers keep only their input for the backward pass, which computes the rest again."""
        layers = [one for one in self.model.get_decoder().modules() if isinstance(one, GradientCheckpointingLayer)]
        for layer in layers:
            layer.forward = with_checkpoint(layer.forward)
        return layers

    @contextmanager
    def using(self, name: str | None):
        """Activate an adapter inside the `with` block; None turns LoRA off, which gives exactly the base model."""
        assert name is None or name in self.adapters, f"no adapter {name!r}, only {sorted(self.adapters)}"
        before, self.active = self.active, name
        try:
            yield self
        finally:
            self.active = before

    def add_adapter(self, name: str, rank: int = 16, alpha: float = 32):
        """Add an adapter that changes nothing yet: A uniform in +-1/sqrt(in), as in PEFT, and B = 0."""
        assert name not in self.adapters, f"adapter {name} exists already"
        for layer in self.layers.values():
            A = torch.empty(rank, layer.base.in_features).uniform_(-1, 1) * layer.base.in_features ** -0.5
            layer.add_adapter(name, A, torch.zeros(layer.base.out_features, rank), alpha / rank)
        self.adapters[name] = {"r": rank, "lora_alpha": alpha, "use_rslora": False}

    def named_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """One adapter's tensors with names such as "model.layers.0.self_attn.q_proj.lora_A", in a fixed order."""
        return [(f"{path}.lora_{part}", x) for path, layer in self.layers.items()
                for part, x in zip("AB", layer.adapters.get(name, ())[:2], strict=False)]

    def parameters(self, name: str) -> list[nn.Parameter]:
        return [x for _, x in self.named_parameters(name)]

    def save_adapter(self, name: str, folder):
        """Write an adapter in PEFT's format."""
        matrices = {path: layer.adapters[name][:2] for path, layer in self.layers.items() if name in layer.adapters}
        write_adapter(folder, self.name, matrices, self.adapters[name])

    def load_adapter(self, name: str, folder):
        """Read an adapter in PEFT's format and give it this name. UsageError if it does not fit the model."""
        config, weights, scale = read_adapter(folder)
        matrices = match_layers(folder, self.name, config, weights, self.layers)
        for path, layer in self.layers.items():
            layer.adapters.pop(name, None)
            if path in matrices:
                layer.add_adapter(name, *matrices[path], scale)
        self.adapters[name] = {key: config.get(key, False) for key in ("r", "lora_alpha", "use_rslora")}

    def encode(self, messages: list[dict]) -> list[int]:
        """Chat messages as token ids, up to the beginning of the assistant's reply."""
        return self.chat.render(messages, add_generation_prompt=True)

    def encode_reply(self, text: str) -> list[int]:
        """An assistant's reply as token ids with its end of turn, as `sample` would return them."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.chat.end_of_turn]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], n=1, max_new_tokens=64, temperature=1.0) -> list[list[Completion]]:
        """
        Sample n completions for each prompt. Temperature 0 is greedy; equal prompts are then decoded only once.
        Under torchrun each process samples for its shard of the prompts, and every process receives all completions.
        """
        assert all(prompts) and max_new_tokens > 0, "an empty prompt, or nothing to sample"
        longest = max(map(len, prompts), default=0) + max_new_tokens
        if self.window and longest > self.window:
            raise UsageError(f"a prompt with its completion has up to {longest} tokens, but the window of model "
                             f"{self.name} only {self.window}: lower --max-prompt-tokens or --max-new-tokens")
        rows = [tuple(prompt) for prompt in local_shard(prompts) for _ in range(n)]
        keys = rows if temperature == 0 else range(len(rows))  # greedy: equal prompts have equal keys
        rows, done = dict(zip(keys, rows, strict=True)), {}
        waiting = sorted(rows, key=lambda key: (len(rows[key]), rows[key]), reverse=True)  # equal prompts adjacent
        while waiting:
            size = self._batch_size([rows[key] for key in waiting], max_new_tokens)
            batch, waiting = waiting[:size], waiting[size:]
            completions = self._sample_batch([rows[key] for key in batch], max_new_tokens, temperature)
            done.update(zip(batch, completions, strict=True))
            packing.return_freed_memory(self.device)
        return all_gather([[done[key] for key in keys[i:i + n]] for i in range(0, len(keys), n)])

    def _batch_size(self, rows, max_new_tokens):
        """Number of rows, longest first, that fit into one batch. A shared prompt counts once."""
        budget = packing.max_sampling_tokens(self)
        costs = [max_new_tokens + len(rows[0]) * (not self.packs or row != before)
                 for row, before in zip(rows, [None, *rows], strict=False)]
        return max(1, sum(total <= budget for total in accumulate(costs)))

    def _sample_batch(self, rows, max_new_tokens, temperature) -> list[Completion]:
        """Sample a completion for each row, token by token. Finished rows leave the batch."""
        decoder = Decoder(self.model, rows, max_new_tokens, self.packs)
        alive = torch.arange(len(rows), device=self.device)  # indices of the rows that are not finished
        tokens = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=self.device)
        logps, lengths = tokens.float(), torch.zeros_like(alive)
        logits = decoder.read_prompts()  # (N, V)
        for t in range(max_new_tokens):
            token, logp = sample_token(logits, temperature)
            tokens[alive, t], logps[alive, t], lengths[alive] = token, logp, t + 1
            unfinished = (~torch.isin(token, self.eos)).nonzero().squeeze(1)
            if len(unfinished) == 0 or t + 1 == max_new_tokens:
                break
            if len(unfinished) < len(alive):
                alive, token = alive[unfinished], token[unfinished]
                decoder.keep(unfinished)
            logits = decoder.read_tokens(token)
        if logps.isnan().any():
            raise UsageError("the model gives nan for the next token: its weights have diverged or do not fit the "
                             "--dtype; start again with a lower --lr, or give --dtype float32")
        finished = torch.isin(tokens.gather(1, lengths[:, None] - 1).squeeze(1), self.eos)
        columns = zip(*(x.tolist() for x in (tokens, logps, lengths, finished)), strict=True)
        return [Completion(ids[:length], logp[:length], is_finished, self.decode(ids[:length - is_finished]))
                for ids, logp, length, is_finished in columns]

    def pack_batch(self, prompts, completions) -> PackedBatch:
        """Groups as rows: packed where the model allows it, else one row per completion."""
        return (packing.pack_groups if self.packs else packing.pad_groups)(prompts, completions, self.device)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """The last hidden states that predict the completion tokens, (T, H)."""
        states = self.model.base_model(input_ids=batch.ids, attention_mask=batch.attention,
                                       position_ids=batch.positions, use_cache=False).last_hidden_state
        return states.flatten(0, 1).index_select(0, batch.predictors)

    def score(self, prompts, completions, temperature=1.0) -> Scores:
        """
        The log-prob of every token of completions[p][g] after prompts[p], and the policy's entropy there. Call
        backward inside the same `using` block: gradient checkpointing recomputes the layers.
        """
        batch = self.pack_batch(prompts, completions)
        logp, entropy = token_scores(self.hidden(batch), self.head, batch.targets, temperature)
        return Scores(scatter_to_mask(logp, batch.mask), scatter_to_mask(entropy, batch.mask), batch.mask)

    def micro_batches(self, prompts, completions, max_tokens: int = 0) -> list[list[int]]:
        """
        Split this process's shard of the groups into lists of indices, one for each call of `score`: at most max_tokens
        including padding (0: as many as fit into memory), or a single group. If that group does not fit, gradient
        checkpointing is turned on where the model supports it; a warning says once whether that is enough.
        """
        own = local_shard(range(len(prompts)))
        shapes = [(1, len(prompts[i]) + sum(map(len, completions[i]))) if self.packs
                  else (len(completions[i]), len(prompts[i]) + max(map(len, completions[i]))) for i in own]
        largest = max((rows * width for rows, width in shapes), default=0)  # tokens
        if self.checkpointed_layers is None and not packing.fits_backward(self, largest):
            self.checkpointed_layers = self._checkpoint_layers()
            advice = ["gradient checkpointing is on, which takes a third more time"] if self.checkpointed_layers else []
            if not packing.fits_backward(self, largest):
                advice.append("lower --max-prompt-tokens, --max-new-tokens or --group-size")
            logging.warning("model %s: a prompt with its completions (%d tokens) would not fit into memory: %s",
                            self.name, largest, "; this may not be enough: ".join(advice))
        return [[own[i] for i in batch]
                for batch in packing.batches_within(shapes, max_tokens or packing.max_train_tokens(self))]

    @torch.no_grad()
    def map_groups(self, function, prompts, completions, max_tokens: int = 0) -> torch.Tensor:
        """Apply function(prompts, completions) -> (n, c) to micro-batches, without gradient; return all rows (N, C)."""
        rows, width = group_rows(completions), max(len(ids) for group in completions for ids in group)
        result = torch.zeros(rows[-1].stop, width, device=self.device)
        for indices in self.micro_batches(prompts, completions, max_tokens):
            values = function([prompts[i] for i in indices], [completions[i] for i in indices])
            result[[row for i in indices for row in rows[i]], :values.shape[1]] = values
        return all_reduce_sum(result)  # the rows of other processes are 0 here


def main(argv=None) -> None:
    Parser(description="Shows samples of the tiny model, their log-probs, and the effect of LoRA.").parse_args(argv)
    torch.manual_seed(0)
    policy = Policy.load(TINY)
    question = "question: Which car does Jon drive?\n"
    text = f"{question}memories of Jon:\n1 (8 May 2023) Jon has a dog named Buddy.\n" \
           f"2 (3 June 2023) Jon drives a Kia car.\n{question}relevant memories, then the answer:"
    prompt = policy.encode([{"role": "user", "content": text}])
    num_weights = sum(x.numel() for x in policy.model.parameters())
    print(f"{text}\n\n{num_weights:,} weights on {policy.device}; a prompt of {len(prompt)} tokens;\n"
          "four completions at temperature 2, each with its log-prob at temperature 1:")
    group, = policy.sample([prompt], n=4, max_new_tokens=16, temperature=2.0)
    completions = [[completion.ids for completion in group]]
    base = policy.score([prompt], completions).logp.sum(1)
    for completion, logp in zip(group, base, strict=True):
        print(f"  {logp:7.2f}  {completion.text!r}")
    policy.add_adapter("mine", rank=4, alpha=8)
    for parameter in policy.parameters("mine"):
        torch.nn.init.normal_(parameter, std=0.1)  # stands for training
    for role in ("mine", None):
        with policy.using(role), torch.no_grad():
            logp = policy.score([prompt], completions).logp.sum(1)
        print(f"LoRA {'off' if role is None else 'on'}: log-probs change by up to {(logp - base).abs().max():.2f}")


if __name__ == "__main__":
    exit_cleanly(main)
