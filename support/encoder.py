"""
Text encoders. An encoder pools the last hidden states of a text into one vector: their mean, the first (BGE) or the
last (Qwen3-Embedding). Some put a prompt before queries. Both are in the files that sentence-transformers saves.
"""
import json

import numpy as np
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from data import UsageError
from support.run import warn_once

# hidden (batch, T, dim), mask (batch, T, 1) with 0 = padding, which is on the right -> (batch, dim)
POOLINGS = {"mean": lambda hidden, mask: (hidden * mask).sum(dim=1) / mask.sum(dim=1),
            "mean_sqrt_len": lambda hidden, mask: (hidden * mask).sum(dim=1) / mask.sum(dim=1).sqrt(),
            "max": lambda hidden, mask: hidden.masked_fill(mask == 0, -torch.inf).amax(dim=1),
            "cls": lambda hidden, mask: hidden[:, 0],
            "lasttoken": lambda hidden, mask: hidden.take_along_dim(mask.sum(dim=1, keepdim=True) - 1, dim=1)[:, 0]}


def encoder_json(name, file):
    """Return the content of a JSON file next to an encoder (hub id or folder), {} if there is none, or none offline."""
    try:
        path = cached_file(name, file)
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            warn_once(f"{name}: {file} is not cached and cannot be fetched; if it exists, vectors differ without it")
        elif error.__cause__:  # such as an error of the server
            raise
        return {}
    with open(path, encoding="utf-8") as content:
        return json.load(content)


def read_pooling(name):
    """The keys of POOLINGS that 1_Pooling/config.json names; ["mean"] without it. ValueError if not supported."""
    modules = {module["type"].rpartition(".")[2]: module.get("path") for module in encoder_json(name, "modules.json")}
    config = encoder_json(name, f"{modules.get('Pooling') or '1_Pooling'}/config.json")
    flags = np.atleast_1d(config.get("pooling_mode", [])).tolist()  # older files have a flag for each mode
    flags += [key.removeprefix("pooling_mode_") for key, is_set in config.items() if is_set is True and "_mode_" in key]
    modes = [flag.removesuffix("_tokens").removesuffix("_token") for flag in flags] or ["mean"]
    if unknown := {*modules} - {"Transformer", "Pooling", "Normalize"} | {*modes} - {*POOLINGS}:
        raise ValueError(f"it needs {min(unknown)}, which is not supported")
    if config.get("include_prompt") is False:
        raise ValueError("its pooling leaves out the prompt, which is not supported")
    return modes


class Encoder:
    """
    An encoder (hub id or folder) with its pooling, the mean if it names none, and the prompts before texts and queries.
    UsageError if it cannot be loaded.
    """

    def __init__(self, name, device="cpu"):
        try:
            # Follow tokenizer.json: AutoTokenizer gives some families a pre-tokenizer of its own.
            tokenizer = PreTrainedTokenizerFast if encoder_json(name, "tokenizer.json") else AutoTokenizer
            self.tokenizer = tokenizer.from_pretrained(name, padding_side="right", trust_remote_code=False)
            self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
            self.model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
            self.model = self.model.float().to(device).eval().requires_grad_(False)
            self.poolings = [POOLINGS[mode] for mode in read_pooling(name)]
            saved = encoder_json(name, "config_sentence_transformers.json")
            texts = {kind: text or "" for kind, text in (saved.get("prompts") or {}).items()}
            default = texts.get(saved.get("default_prompt_name"), "")
            self.query_prompt = texts.get("query", default)
            self.text_prompt = next((texts[key] for key in ("document", "passage", "corpus") if key in texts), default)
            positions = getattr(self.model.config, "max_position_embeddings", 256)
            self.max_tokens = min(256, positions, self.tokenizer.model_max_length)
            self.dim = self.encode(["a word"]).shape[1]
        except Exception as error:  # a wrong folder or a missing network can raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(f"embedder {name!r} cannot be loaded as an encoder ({reason}); "
                             "give an encoder's hub id or folder, 'hash' or 'hash+ENCODER'") from error

    def encode(self, texts, prompt="", batch_size=64):
        """Embed texts, each after the prompt. n > 0 texts -> (n, dim) of unit length"""
        # JSON written by a language model may hold a lone surrogate, which the tokenizer cannot read: it becomes "?".
        texts = [prompt + (text.encode("utf-8", "replace").decode().strip() or ".") for text in texts]
        order = np.argsort([len(text) for text in texts], kind="stable")  # similar lengths need little padding
        vectors = []
        for start in range(0, len(texts), batch_size):
            batch = [texts[i] for i in order[start:start + batch_size]]
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=self.max_tokens,
                                    return_tensors="pt").to(self.model.device)
            hidden = self.model(**tokens).last_hidden_state  # (batch, T, dim)
            mask = tokens["attention_mask"][:, :, None]
            pooled = torch.cat([pool(hidden, mask) for pool in self.poolings], dim=1)
            vectors.append(normalize(pooled).cpu().numpy())
        return np.concatenate(vectors)[np.argsort(order)]
