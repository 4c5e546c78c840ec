"""Parts of evaluate.py: find runs, select questions, record the replies of a policy, rerank memories."""
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import data
from data import Dialogue, UsageError
from support import report
from support.run import append_rows, check_adapter, read_config, read_rows, warn_once


def agent_name(agent: str) -> str:
    """./runs/manager-grpo/adapter -> manager-grpo"""
    return os.path.relpath(agent).removesuffix("/adapter").removeprefix("runs/")


def batches(items: Sequence, size: int) -> list:
    """[1, 2, 3], 2 -> [[1, 2], [3]]"""
    return [items[start:start + size] for start in range(0, len(items), size)]


def find_runs(policy, agent: str, distill: bool | None = None) -> dict[str, dict]:
    """Load the adapters in runs/ that were trained for this agent on this model: {folder: settings of the run}"""
    found = {}
    for path in sorted(Path("runs").glob("*/adapter/adapter_config.json")):
        folder = str(path.parents[1])
        try:
            config = read_config(folder)
            if config["agent"] == agent:
                check_adapter(folder, agent, distill)
                policy.load_adapter(folder, folder)
                found[folder] = config
        except UsageError as error:
            warn_once(f"skipped: {error}")
    return found


def select_questions(args, preset: dict, limit: int | None) -> tuple[list[Dialogue], str]:
    """Dialogues with only the selected final questions, at most `limit` in all; and a checksum of all turns."""
    is_synthetic = args.data == "synthetic"
    options = {"count": preset["count"], "num_turns": preset["num_turns"], "seed": args.seed} if is_synthetic else {}
    dialogues = data.load(args.data, args.split, args.adversarial, **options)
    final = [(dialogue, question) for dialogue in dialogues for question in dialogue.final_questions()]
    known = sorted({question.category for _, question in final})
    if not final:
        raise UsageError(f"--data {args.data} --split {args.split}: there is no question; take another split or file")
    if args.paper and (is_synthetic or known[-1] > 4 or args.split != "test"):
        raise UsageError("--paper has the numbers of LoCoMo's test split: add --data locomo, and no other --split, nor "
                         "--adversarial")
    for number in {*(args.category or [])} - {*known}:
        raise UsageError(f"--category {number}: {args.data}, split {args.split}, has {', '.join(map(str, known))}")
    chosen = [pair for pair in final if pair[1].category in (args.category or known)]
    n, count = len(chosen), min(limit or len(chosen), len(chosen))
    if len(final) == len(dialogues):  # one question per dialogue, sorted by category: take some of each
        chosen = [chosen[i * n // count] for i in range(count)]
    turns = report.checksum(repr((dialogue.id, dialogue.turns)).encode() for dialogue in dialogues)
    return [replace(dialogue, questions=tuple(question for _, question in pairs))
            for dialogue, pairs in groupby(chosen[:count], key=lambda pair: pair[0])], turns


def weights_of(policy, adapter: str | None = None) -> str:
    """What the replies of a model depend on: checksum and dtype of its weights; the name of a hosted model."""
    if adapter:
        return report.checksum(policy.parameters(adapter))
    if not hasattr(policy, "model"):
        return policy.name
    return f"{report.checksum(one[:64] for one in policy.model.parameters())} {policy.model.dtype}"


class RecordedPolicy:
    """
    A policy for greedy decoding whose replies are appended to a file as soon as `at_once` of them exist, so that a
    stopped evaluation continues without computing or paying for them again. Without a path nothing is written.
    `seconds` records the time of each prompt, now or when it was computed: the time of its batch, divided equally.
    `saved` sums the seconds that replies from the file took when they were computed.
    """

    def __init__(self, policy, path: Path | None, at_once: int):
        self.policy, self.path, self.at_once, self.seconds, self.saved = policy, path, at_once, [], 0.0
        self.replies = {str(row["key"]): row for row in (read_rows(path) if path else [])
                        if row.keys() >= {"key", "seconds", "finished", "text"}}
        self.weights = {None: weights_of(policy)}  # by adapter

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def key(self, prompt, max_new_tokens) -> str:
        adapter = getattr(self.policy, "active", None)  # hosted models have no adapters
        if adapter not in self.weights:
            self.weights[adapter] = f"{self.weights[None]} {weights_of(self.policy, adapter)}"
        return report.checksum([json.dumps([self.weights[adapter], max_new_tokens, prompt]).encode()])

    def sample(self, prompts, n=1, max_new_tokens=64, temperature=0):
        """One greedy completion per prompt, whatever `n` and `temperature` are."""
        keys = [self.key(prompt, max_new_tokens) for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self.replies}
        self.saved += sum(self.replies[key]["seconds"] for key in {*keys} - {*missing})
        longest_first = batches(sorted(missing, key=lambda key: len(missing[key]), reverse=True), self.at_once)
        for some in tqdm(longest_first, "batches", leave=False, disable=None if len(longest_first) > 1 else True):
            start = time.perf_counter()
            groups = self.policy.sample([missing[key] for key in some], 1, max_new_tokens, temperature=0)
            seconds = (time.perf_counter() - start) / len(some)
            rows = [{"key": key, "seconds": seconds, "finished": group[0].finished, "text": group[0].text}
                    for key, group in zip(some, groups, strict=True)]
            if self.path:
                append_rows(self.path, rows)
            self.replies |= {row["key"]: row for row in rows}
        found = [self.replies[key] for key in keys]
        self.seconds += [row["seconds"] for row in found]
        return [[SimpleNamespace(ids=[], logps=[], finished=row["finished"], text=row["text"])] for row in found]


class Reranker:
    """A cross-encoder (hub id or folder): it reads question and memory together and scores how well they match."""

    def __init__(self, name: str, device):
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.model, loading = AutoModelForSequenceClassification.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
            if loading["missing_keys"]:  # transformers would initialize these weights at random
                raise ValueError(f"no weights for {min(loading['missing_keys'])}")
        except Exception as error:  # a broken folder or a missing network can raise almost anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UsageError(f"--reranker {name}: cannot be loaded ({reason}); give a cross-encoder") from error
        self.model.to(device).eval().requires_grad_(False)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def best(self, question: str, memories: list, k: int) -> list:
        """The k memories that match the question best, best first."""
        if not memories:
            return []
        pairs = self.tokenizer([question] * len(memories), [memory.text for memory in memories], padding=True,
                               truncation=True, max_length=256, return_tensors="pt").to(self.model.device)
        scores = self.model(**pairs).logits[:, -1].tolist()  # the only label, or "match" of (no match, match)
        return [memories[i] for i in np.argsort(scores)[::-1][:k]]
