"""Prompts that fit a token limit, greedy completions of prompts, and the JSON inside completions."""
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from support.text import MAX_OUTPUT_CHARS

MAX_JSON_STARTS = 100  # the parser tries to read JSON at this many brackets and braces, from the first on


def fit_prompt(policy, render: Callable, ranked: Sequence, max_tokens: int | None) -> tuple[list[int], list, int]:
    """
    Encodes render(memories), the chat messages that show some memories, with as many of `ranked` (best first) as fit
    into `max_tokens`. Nothing else is shortened. Returns (token ids, memories kept, number dropped).
    """
    def encode_best(n):
        return policy.encode(render(list(ranked[:n])))

    n = len(ranked)
    ids = encode_best(n)
    if max_tokens and len(ids) > max_tokens:
        n = bisect_right(range(1, n), max_tokens, key=lambda n: len(encode_best(n)))  # as many as fit, possibly 0
        ids = encode_best(n)
    return ids, list(ranked[:n]), len(ranked) - n


def generate(policy, adapter: str | None, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy completions of a batch of prompts, with a LoRA adapter or, for None, with the base model."""
    if not prompts:
        return []
    with policy.using(adapter):
        return [group[0].text for group in policy.sample(prompts, 1, max_new_tokens, temperature=0)]


def json_values(text: str) -> Iterator[list | dict | None]:
    """
    The JSON lists and objects in a text; prose around them is skipped. One that breaks off gives None and is the
    last: its inner parts must not be taken for complete ones. 'Sure: [1] and [{"a": 2}, {' -> [1], None
    """
    decoder, text, end = json.JSONDecoder(), text[:MAX_OUTPUT_CHARS], 0
    for start in [match.start() for match in re.finditer(r"[\[{]", text)][:MAX_JSON_STARTS]:
        if start < end:  # inside the previous value
            continue
        try:
            value, end = decoder.raw_decode(text, start)
            yield value
        except (ValueError, RecursionError):
            if re.match(r"[\[{]\s*[\[{\"]", text[start:]):  # prose such as "[see below]" begins with a letter
                yield None
                return


def trigram_similarity(a: str, b: str) -> float:
    """Dice coefficient of the letter trigrams of two texts, 1.0 for equal texts, in linear time."""
    one, other = (Counter(text[i:i + 3] for i in range(len(text) - 2)) for text in (f"  {a} ", f"  {b} "))
    return 2 * (one & other).total() / (one.total() + other.total())
