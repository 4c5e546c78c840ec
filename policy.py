"""
A Hugging Face causal language model as a policy: LoRA adapters, sampling, log-probs of what was sampled.

    policy = Policy.load("Qwen/Qwen2.5-0.5B-Instruct")
    policy.add_adapter("manager", rank=16, alpha=32)
    with policy.using("manager"):  # using(None) is the base model: our reference policy
        groups = policy.sample(prompts, n=8)
        logp, entropy, mask = policy.score(prompts, [[c.ids for c in group] for group in groups])

One set of weights plays every role. A role is a LoRA adapter (arXiv 2106.09685, eq. 3) on every linear layer
but the head:  h = W x + (alpha / r) B A x,  W frozen, B = 0 at the start, so that a new one changes nothing.

Prompts are long, completions short, and G of them share a prompt, so neither half computes one twice:
  - `sample` reads each distinct prompt once, and what all of them begin with once for all. A group's completions
    attend to that one key-value cache, each to its own besides, and leave the batch when they end.
  - `score` packs a group into one row, `[prompt | c_1 | ... | c_G | padding]`. That is exact: what follows a
    prompt does not change its states; a mask lets c_g see the prompt and itself, no sibling; and positions
    restart at the prompt's length for each, as if it stood there alone.

Shapes: P prompts, G completions each, N = P*G rows in prompt-major order, C tokens in the longest completion,
T completion tokens in all (padding left out), R packed rows of L tokens, H hidden size, V vocabulary, r rank.
`mask` (N, C) is 1 where a token was sampled: its EOS yes, padding no.
No top-p, no top-k: training needs log-probs under the distribution that was sampled from, and that is
softmax(logits / temperature), in `sample` and `score` alike.
"""
import json
import logging
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import TINY, UsageError
from support.attention import SharedPrompts

# Families whose packed scores the tests compare with plain ones; others are scored unpacked. A 4-D mask is
# silently wrong with a sliding window, linear attention, or positions read off the mask (ALiBi).
PACKABLE = ("llama", "mistral", "qwen2", "qwen3")
PEFT_KEY = "base_model.model.{}.lora_{}.weight"


class LoRALinear(nn.Module):
    """h = W x + (alpha / r) B A x: one frozen W (out, in), and A (r, in), B (out, r) for each adapter."""

    def __init__(self, base, policy):
        super().__init__()
        self.base, self.policy = base, policy  # policy.active names the adapter, for all layers at once
        self.adapters = {}  # name -> (A, B, alpha / r)

    def put(self, name, A, B, scale):
        # kept in float32 even on a bfloat16 base, whose 7 bits of fraction would swallow most steps of an optimizer
        A, B = (nn.Parameter(x.float().to(self.base.weight.device)) for x in (A, B))
        self.adapters[name] = A, B, scale

    def forward(self, x):
        y = self.base(x)
        if self.policy.active not in self.adapters:  # LoRA off, or an adapter that leaves this layer alone
            return y
        A, B, scale = self.adapters[self.policy.active]
        low = x.flatten(0, -2) @ A.to(x.dtype).T  # (tokens, r), in the base's dtype
        return torch.addmm(y.flatten(0, -2), low, B.to(x.dtype).T, alpha=scale).view_as(y)


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # with the EOS if one was sampled
    logps: list[float]  # log pi(token) at the sampling temperature; at temperature 1 if decoding was greedy
    finished: bool  # False: cut off at max_new_tokens
    text: str  # without the EOS


class Layout(NamedTuple):
    """Rows for one forward pass, and where in them each completion token is predicted."""
    ids: torch.Tensor  # (R, L)
    positions: torch.Tensor  # (R, L)
    attention: torch.Tensor  # (R, 1, S, L) what the last S tokens may attend to, or (R, L) True = no padding
    where: torch.Tensor  # (T,) index into the flattened (R*L) states
    targets: torch.Tensor  # (T,) the completion tokens, row after row
    mask: torch.Tensor  # (N, C)


class Scores(NamedTuple):
    logp: torch.Tensor  # (N, C) float32, 0 where masked
    entropy: torch.Tensor  # (N, C) float32, without gradient
    mask: torch.Tensor  # (N, C) bool


def pad_right(rows, fill=0, dtype=None):
    """Lists as one tensor: [[7, 8], [9]] -> [[7, 8], [9, fill]]"""
    width = max(map(len, rows), default=0)
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows], dtype=dtype)


def spread(values, mask):
    """The T tokens' values in their places: [1., 2., 3.] and [[1, 1], [1, 0]] -> [[1., 2.], [3., 0.]]"""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def pack(prompts, completions, device="cpu"):
    """
    A group as one row. Prompt [5, 6] and completions [[7, 8], [9]] become
        ids       5 6 7 8 9    where    1 2 1    7 and 9 are both predicted by the prompt's last token, 8 by 7
        positions 0 1 2 3 2    targets  7 8 9
        segments  0 0 1 1 2    mask     [[1, 1], [1, 0]]
    """
    ids, positions, segments = [], [], []
    for prompt, group in zip(prompts, completions, strict=True):
        parts = [prompt, *group]
        ids.append([token for part in parts for token in part])
        positions.append([*range(len(prompt)), *(len(prompt) + i for c in group for i in range(len(c)))])
        segments.append([g for g, part in enumerate(parts) for _ in part])
    ids, positions, segments = pad_right(ids), pad_right(positions), pad_right(segments, fill=-1)
    (R, L), lengths = ids.shape, (segments == 0).sum(1, keepdim=True)  # lengths of the prompts (R, 1)
    assert lengths.all(), "an empty prompt: nothing predicts the first token"
    is_sampled = segments > 0
    # A token is predicted by the one before it; the first of a completion, at position `lengths`, by the prompt's last.
    before = torch.where(positions == lengths, lengths, torch.arange(L)) - 1
    where = (before + L * torch.arange(R)[:, None])[is_sampled]
    mask = pad_right([[True] * len(c) for group in completions for c in group], False, torch.bool)
    n = int(lengths.min())  # what stands before is prompt in every row: see `shared_attention`
    queries, keys = segments.to(device)[:, n:, None], segments.to(device)[:, None, :]
    # Padding looks at the prompt as well, since a row that sees nothing at all can give NaN.
    attention = ((queries == keys) | (keys == 0)) & torch.ones(L - n, L, dtype=torch.bool, device=device).tril(n)
    return Layout(*(x.to(device) for x in (ids, positions, attention[:, None], where, ids[is_sampled], mask)))


def pad(prompts, completions, device="cpu"):
    """The plain layout, a row `[prompt | completion | padding]` each: right for every model, and slower."""
    pairs = [(prompt, c) for prompt, group in zip(prompts, completions, strict=True) for c in group]
    layout = pack([prompt for prompt, _ in pairs], [[c] for _, c in pairs], device)
    real = pad_right([[True] * (len(prompt) + len(c)) for prompt, c in pairs], False, torch.bool)
    return layout._replace(attention=real.to(device))


def token_scores(hidden, head, targets, temperature, chunk=None):
    """
    log pi(target) and entropy of pi = softmax(head(hidden) / temperature). (T, H), (T,) -> (T,), (T,)
    T x V logits would not fit for V = 150,000: only `chunk` of them exist at a time. The head W (V, H) is
    frozen, so they need no backward pass: all it would give, the hidden state's slope, is known on the spot,
        d log pi(y) / d h = (W_y - sum_v pi(v) W_v) / temperature
    """
    chunk = chunk or 2 ** (25 if hidden.is_cuda else 22)  # what fills a GPU; what a CPU's cache holds
    logps, entropies, size = [], [], max(1, chunk // head.out_features)
    for h, y in zip(hidden.split(size), targets[:, None].split(size), strict=True):
        with torch.no_grad():
            logpi = head(h).float().div_(temperature).log_softmax(-1)  # (t, V)
            logp, pi = logpi.gather(1, y).squeeze(1), logpi.exp()
            entropies.append(-logpi.mul_(pi).sum(-1))
            if hidden.requires_grad:
                slope = pi.neg_().scatter_add_(1, y, torch.ones_like(pi[:, :1]))  # [v = y] - pi(v)
                slope = slope.to(h.dtype) @ head.weight / temperature  # (t, H)
        if hidden.requires_grad:
            logp = logp + ((h - h.detach()) * slope).sum(-1)  # adds 0, and the gradient
        logps.append(logp)
    return torch.cat(logps), torch.cat(entropies)


def draw(logits, temperature):
    """One token a row and its log-prob, (N, V) -> (N,), (N,). Temperature 0 takes the likeliest token."""
    logp = (logits.float() / (temperature or 1)).log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1, keepdim=True)
    else:  # where a uniform number falls in the cumulative distribution: on a CPU 8x faster than multinomial
        cdf = logp.exp().cumsum(-1)
        u = 1 - torch.rand(len(cdf), 1, device=cdf.device)  # in (0, 1]
        token = torch.searchsorted(cdf, u * cdf[:, -1:]).clamp(max=cdf.shape[1] - 1)  # beyond it only if NaN
    return token.squeeze(1), logp.gather(1, token).squeeze(1)


class Policy:
    def __init__(self, model, tokenizer, name="", gradient_checkpointing=False, max_batch_tokens=None):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.device, self.head = model.device, model.get_output_embeddings()
        self.max_batch_tokens = max_batch_tokens  # of `sample`; None: what fits
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.eos = torch.tensor(sorted(ends), dtype=torch.long, device=self.device)
        self.packs = self._can_pack()
        if self.packs:
            model.config._attn_implementation = "shared"
        self.active, self.adapters = None, {}  # a name or None; name -> r, lora_alpha, use_rslora
        self.layers = {path: LoRALinear(linear, self) for path, linear in model.named_modules()
                       if isinstance(linear, nn.Linear) and linear is not self.head}
        for path, layer in self.layers.items():
            model.set_submodule(path, layer)
        self.checkpoints = gradient_checkpointing
        if gradient_checkpointing:
            self._checkpoint_layers()

    @classmethod
    def load(cls, name, device=None, dtype=None, gradient_checkpointing=False, **options):
        """A policy from a hub id or a folder. Unless told otherwise bfloat16 on a GPU, float32 on a CPU."""
        name, device = str(name), str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = str(dtype or ("bfloat16" if device.startswith("cuda") else "float32")).removeprefix("torch.")
        if name.startswith((".", "/", "~")) or Path(name).is_dir():
            name = str(Path(name).expanduser())
            if not Path(name, "config.json").is_file():  # an adapter's folder, for one
                raise UsageError(f"model {name}: no config.json there; give a hub id or a model's folder")
        transformers.utils.logging.disable_progress_bar()
        try:
            # As tokenizer.json says. AutoTokenizer gives any Qwen2 model Qwen's own pre-tokenizer instead.
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name)
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=getattr(torch, dtype), attn_implementation="sdpa", use_safetensors=True,
                trust_remote_code=False, output_loading_info=True)
            model.to(device)
        except Exception as error:  # of a dozen kinds: no such model, no network, no GPU, a file cut short
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"model {name} as {dtype} on {device}: cannot be loaded ({reason}); give a hub "
                             "id or a folder with config.json, safetensors, tokenizer.json") from None
        if found["missing_keys"]:  # transformers would go on with random numbers in their place
            raise UsageError(f"model {name}: no weights for {min(found['missing_keys'])}; save it again")
        if not tokenizer.chat_template:
            raise UsageError(f"model {name}: its tokenizer has no chat template; choose an instruct model")
        policy = cls(model, tokenizer, name, gradient_checkpointing, **options)
        try:
            policy.encode([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}])
        except Exception as error:  # whatever a template raises; some refuse system messages
            raise UsageError(f"model {name}: its chat template fails ({error}); choose a model whose template "
                             "takes a system message") from None
        return policy

    def _can_pack(self):
        """Whether a 4-D mask says all there is to say about the attention. If not, says so once."""
        config, ids = self.model.config, torch.arange(4, device=self.device)[None]
        kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        is_full = set(kinds) == {"full_attention"} if kinds else window is None
        if config.model_type in PACKABLE and is_full and config._attn_implementation == "sdpa":
            return True
        with torch.no_grad():  # some families scale or cap the head's logits, which `score` would not
            logits, plain = self.model(ids).logits, self.head(self.model.base_model(ids).last_hidden_state)
        if not torch.allclose(logits, plain, rtol=0.01, atol=0.01):
            raise UsageError(f"model {self.name}: {config.model_type} changes its head's logits, and cannot "
                             f"be scored; choose one of {', '.join(PACKABLE)}")
        logging.warning("model %s: its attention is not plain, so scores come unpacked: slower", self.name)
        return False

    def _checkpoint_layers(self):
        """Keeps only each layer's input for the backward pass, which computes the rest again."""
        def run(forward, *args, **kwargs):
            if not torch.is_grad_enabled():  # sampling, for one, whose cache a checkpoint would write twice
                return forward(*args, **kwargs)
            # The backward pass may come when `using` has ended, and needs the adapter of the forward pass.
            contexts = nullcontext(), self.using(self.active)
            return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)

        layers = getattr(self.model.base_model, "layers", None)
        if layers is None:
            raise UsageError(f"model {self.name}: --gradient-checkpointing cannot find its layers; leave that out")
        for layer in layers:
            layer.forward = partial(run, layer.forward)

    @contextmanager
    def using(self, name: str | None):
        """Inside the `with` this adapter is active; None: LoRA off, bit for bit the base model."""
        assert name is None or name in self.adapters, f"no adapter {name!r}, only {sorted(self.adapters)}"
        before, self.active = self.active, name
        try:
            yield self
        finally:
            self.active = before

    def add_adapter(self, name: str, rank: int = 16, alpha: float = 32):
        """A new adapter that changes nothing yet: A uniform in +-1/sqrt(in), as in PEFT, and B = 0."""
        assert name not in self.adapters, f"adapter {name} exists already"
        for layer in self.layers.values():
            A = torch.empty(rank, layer.base.in_features).uniform_(-1, 1) * layer.base.in_features ** -0.5
            layer.put(name, A, torch.zeros(layer.base.out_features, rank), alpha / rank)
        self.adapters[name] = {"r": rank, "lora_alpha": alpha, "use_rslora": False}

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The trainable tensors of one adapter, always in the same order."""
        return [x for layer in self.layers.values() for x in layer.adapters.get(name, ())[:2]]

    def names(self, name: str) -> list[str]:
        """What `parameters` are called: "model.layers.0.self_attn.q_proj.lora_A" and so on."""
        return [f"{path}.lora_{part}" for path, layer in self.layers.items() if name in layer.adapters for part in "AB"]

    def save_adapter(self, name: str, folder):
        """Writes PEFT's format. Each file is replaced whole, so that no kill leaves half a file."""
        folder, layers = Path(folder), {path: x for path, x in self.layers.items() if name in x.adapters}
        weights = {PEFT_KEY.format(path, part): x.detach().cpu() for path, layer in layers.items()
                   for part, x in zip("AB", layer.adapters[name], strict=False)}
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self.name,
                  **self.adapters[name], "target_modules": sorted({path.split(".")[-1] for path in layers}),
                  "lora_dropout": 0.0, "bias": "none", "modules_to_save": None, "inference_mode": True}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "adapter_model.safetensors.tmp", metadata={"format": "pt"})
        (folder / "adapter_config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / f"{file}.tmp").replace(folder / file)

    def load_adapter(self, name: str, folder):
        """Reads an adapter that we or PEFT saved, and calls it `name`; one of that name is replaced."""
        config, weights, scale = read_adapter(folder)
        rank, trained_on, pairs = config["r"], config.get("base_model_name_or_path"), {}
        misfit = f"adapter {folder} is not for model {self.name} (load the model it was trained on):"
        if len({Path(x).resolve().name.lower() for x in (trained_on, self.name) if x}) > 1:
            raise UsageError(f"{misfit} it names {trained_on}; if only renamed, mend adapter_config.json")
        for path, layer in self.layers.items():
            keys = [PEFT_KEY.format(path, part) for part in "AB"]
            pairs[path] = [weights.pop(key) for key in keys if key in weights]
            fit = [(rank, layer.base.in_features), (layer.base.out_features, rank)]
            shapes = [tuple(x.shape) for x in pairs[path]]
            if shapes not in ([], fit):
                raise UsageError(f"{misfit} A, B of {path} are {shapes}, but with rank {rank} must be {fit}")
        if weights or not any(pairs.values()):
            raise UsageError(f"{misfit} it has no linear layer for {min(weights, default='any of it')}")
        for path, layer in self.layers.items():
            layer.adapters.pop(name, None)
            if pairs[path]:
                layer.put(name, *pairs[path], scale)
        self.adapters[name] = {key: config.get(key, False) for key in ("r", "lora_alpha", "use_rslora")}

    def encode(self, messages: list[dict]) -> list[int]:
        """Chat messages as token ids, up to where the assistant's reply begins."""
        return self.tokenizer.apply_chat_template(  # enable_thinking is read by Qwen3's template only
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=False)

    def encode_reply(self, text: str) -> list[int]:
        """An assistant's reply as token ids, with its EOS: as `sample` would give them."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], n=1, max_new_tokens=64, temperature=1.0):
        """
        A list of n Completions for each prompt, in order. Temperature 0 is greedy: a distinct prompt is then
        decoded once, its completion shared. Runs in batches of similar length within `max_batch_tokens`, in which a
        row counts with its prompt (a shared one counts once) and with max_new_tokens.
        """
        assert all(prompts) and max_new_tokens > 0, "an empty prompt, or nothing to sample"
        rows = [tuple(prompt) for prompt in prompts for _ in range(n)]
        keys = rows if temperature == 0 else range(len(rows))
        rows, done, room = dict(zip(keys, rows, strict=True)), {}, self.max_batch_tokens or self.sampling_room()
        order = sorted(rows, key=lambda key: (len(rows[key]), rows[key]), reverse=True)  # equals side by side
        while order:
            texts = [rows[key] for key in order]
            costs = [max_new_tokens + len(texts[0]) * (not self.packs or text != before)  # a shared prompt counts once
                     for text, before in zip(texts, [None, *texts], strict=False)]
            size = max(1, sum(total <= room for total in accumulate(costs)))
            batch, order = order[:size], order[size:]
            generated = self._generate([rows[key] for key in batch], max_new_tokens, temperature)
            done.update(zip(batch, generated, strict=True))
        return [[done[key] for key in keys[i:i + n]] for i in range(0, len(keys), n)]

    def _generate(self, rows, max_new_tokens, temperature):
        """
        One batch. Padding follows what all prompts begin with, so that all rows write in one column. Of two prompts
        whose first c tokens are alike (c = 2; `gap`: the padding of each row, from column c on):
            ids  1 2 3 4 5 6    positions  0 1 2 3 4 5    gap  0
                 1 2 0 0 7 8               0 1 - - 2 3         2
        """
        distinct = list(dict.fromkeys(rows))  # the longest first
        number, P = {prompt: i for i, prompt in enumerate(distinct)}, len(distinct[0])
        c = min(len(commonprefix(distinct)), len(distinct[-1]) - 1) if self.packs and len(distinct) > 1 else 0
        c *= c >= 16  # shorter ones are not worth a pass of their own
        ids = torch.tensor([[*p[:c], *[0] * (P - len(p)), *p[c:]] for p in distinct], device=self.device)
        columns = torch.arange(P + max_new_tokens, device=self.device)
        gap = torch.tensor([[P - len(p)] for p in distinct], device=self.device) * (columns >= c)
        positions, visible = (columns - gap).clamp(min=0), (columns < c) | (columns >= c + gap)
        owners = torch.tensor([number[p] for p in rows], device=self.device)  # the prompt of each row
        alive = torch.arange(len(rows), device=self.device)  # the rows still being written
        tokens = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=self.device)
        logps, lengths = tokens.float(), torch.zeros_like(alive)
        cache, shared = transformers.DynamicCache(config=self.model.config), {}
        if c:
            self.model.base_model(input_ids=ids[:1, :c], past_key_values=cache, use_cache=True)
            cache.reorder_cache(torch.zeros_like(ids[:, 0]))
        ids, positions = ids[:, c:], positions[:, c:P]
        for t in range(max_new_tokens):
            attention = shared["prompts"].visible[:, None, None] if shared else visible[:, :P + t]
            logits = self.model(input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache,
                                use_cache=True, logits_to_keep=1, **shared).logits[:, -1]
            if t == 0:  # from here on one row a completion
                logits, positions = logits[owners], positions[owners]
                if self.packs:
                    shared["prompts"] = SharedPrompts(cache, visible[:, :P], owners)
                    cache = transformers.DynamicCache(config=self.model.config)
                else:
                    visible = visible[owners]
                    cache.reorder_cache(owners)
            token, logp = draw(logits, temperature)
            tokens[alive, t], logps[alive, t], lengths[alive] = token, logp, t + 1
            keep = (~torch.isin(token, self.eos)).nonzero().squeeze(1)
            if len(keep) == 0:
                break
            if len(keep) < len(alive):
                alive, token, positions = alive[keep], token[keep], positions[keep]
                cache.reorder_cache(keep)
                if self.packs:
                    shared["prompts"].assign(shared["prompts"].owners[keep])
                else:
                    visible = visible[keep]
            ids, positions = token[:, None], positions[:, -1:] + 1
        if logps.isnan().any():
            raise UsageError("the model gives nan for the next token: its weights have diverged, or do not fit its "
                             "--dtype; lower --lr and start anew, or give --dtype float32")
        finished = torch.isin(tokens.gather(1, lengths[:, None] - 1).squeeze(1), self.eos)
        rows = zip(*(x.tolist() for x in (tokens, logps, lengths, finished)), strict=True)
        return [Completion(ids[:n], logp[:n], end, self.decode(ids[:n - end])) for ids, logp, n, end in rows]

    def layout(self, prompts, completions, padded=False) -> Layout:
        """Groups as rows: packed where this model allows it, else (or if `padded`) a row a completion."""
        return (pack if self.packs and not padded else pad)(prompts, completions, self.device)

    def hidden(self, layout: Layout) -> torch.Tensor:
        """The last states that predict a completion token, (T, H). `spread` puts their values in place."""
        states = self.model.base_model(input_ids=layout.ids, attention_mask=layout.attention,
                                       position_ids=layout.positions, use_cache=False).last_hidden_state
        return states.flatten(0, 1).index_select(0, layout.where)

    def score(self, prompts, completions, temperature=1.0, padded=False) -> Scores:
        """Log-prob of every token of completions[p][g] after prompts[p], and the policy's entropy there."""
        layout = self.layout(prompts, completions, padded)
        logp, entropy = token_scores(self.hidden(layout), self.head, layout.targets, temperature)
        return Scores(spread(logp, layout.mask), spread(entropy, layout.mask), layout.mask)

    def room(self) -> int:
        """Tokens of one forward and backward pass: those a GPU's free memory should hold, by a cautious guess."""
        if self.device.type != "cuda":
            return 2**12
        # Of a token, backward needs the input of each linear layer and about three times its output.
        size = sum(layer.base.in_features + 3 * layer.base.out_features for layer in self.layers.values())
        size *= self.head.weight.itemsize
        if self.checkpoints:  # of one layer at a time, with its gradient, and the input of every layer
            depth = self.model.config.num_hidden_layers
            size = 2 * size / depth + self.head.weight.itemsize * self.head.in_features * depth
        return int(0.7 * self.free_memory() / size)

    def sampling_room(self) -> int:
        """Tokens of one batch of `sample`, likewise: keys and values, and the widest layer's activations."""
        if self.device.type != "cuda":
            return 2**15
        config = self.model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        widest = max(layer.base.out_features for layer in self.layers.values())
        size = self.head.weight.itemsize * (2 * config.num_hidden_layers * heads * width + 3 * widest)
        return min(2**16, int(0.7 * self.free_memory() / size))

    def free_memory(self) -> int:
        """Bytes that a GPU has left for us, what torch holds but does not use among them."""
        return (torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
                - torch.cuda.memory_allocated(self.device))

    def micro_batches(self, prompts, completions, max_tokens: int = 0) -> list[list[int]]:
        """Indices of groups for calls of `score` within max_tokens, padding counted, or of one group. 0: what fits."""
        max_tokens = max_tokens or self.room()
        sizes = [len(p) + sum(map(len, cs)) if self.packs else len(cs) * (len(p) + max(map(len, cs)))
                 for p, cs in zip(prompts, completions, strict=True)]
        batches = []
        for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
            if not batches or (len(batches[-1]) + 1) * sizes[batches[-1][0]] > max_tokens:
                batches.append([])
            batches[-1].append(i)
        return batches


def read_adapter(folder):
    """The config, tensors and scale of an adapter's folder or a run's, or a UsageError that says why not."""
    folder = Path(folder, "adapter") if Path(folder, "adapter").is_dir() else Path(folder)
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        weights = load_file(Path(folder, "adapter_model.safetensors"))
        plain = dict(peft_type="LORA", bias="none", use_dora=None, rank_pattern=None, alpha_pattern=None)
        odd = [f"{key} {config.get(key)}" for key in plain if (config.get(key) or None) != plain[key]]
        scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"adapter {folder}: cannot be read ({reason}); give one that PEFT saved") from None
    if odd:
        raise UsageError(f"adapter {folder}: {odd[0]} is not supported; train plain LoRA without bias")
    return config, weights, scale


def main(argv=None) -> None:
    """Shows what the tiny model writes, how likely it finds that, and what LoRA changes: nothing while it is off."""
    from support.cli import Parser  # here: flags.py comes after this file
    Parser(description="Shows samples of the tiny model, their log-probs, and what LoRA changes.").parse_args(argv)
    torch.manual_seed(0)
    policy = Policy.load(TINY)
    question = "question: Which car does Jon drive?\n"
    text = f"{question}memories of Jon:\n1 (8 May 2023) Jon has a dog named Buddy.\n" \
           f"2 (3 June 2023) Jon drives a Kia car.\n{question}relevant memories, then the answer:"
    prompt = policy.encode([{"role": "user", "content": text}])
    print(f"{text}\n\n{sum(x.numel() for x in policy.model.parameters()):,} weights on {policy.device}; a prompt of "
          f"{len(prompt)} tokens; four completions at temperature 2,\neach with its log pi at temperature 1:")
    group, = policy.sample([prompt], n=4, max_new_tokens=16, temperature=2.0)
    completions = [[completion.ids for completion in group]]
    base = policy.score([prompt], completions).logp.sum(1)
    for completion, logp in zip(group, base, strict=True):
        print(f"  {logp:7.2f}  {completion.text!r}")
    policy.add_adapter("mine", rank=4, alpha=8)
    for parameter in policy.parameters("mine"):
        torch.nn.init.normal_(parameter, std=0.1)  # as if it had been trained
    for role in ("mine", None):
        with policy.using(role), torch.no_grad():
            logp = policy.score([prompt], completions).logp.sum(1)
        print(f"{'LoRA off' if role is None else 'LoRA on'}: log pi moves by up to {(logp - base).abs().max():.2f}")


if __name__ == "__main__":
    from support.cli import exit_cleanly
    exit_cleanly(main)
