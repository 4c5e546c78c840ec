"""Demonstrations for real models, memories in prompts, prompts that fit a token limit, and their greedy completions."""
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

from support.text import sanitize_for_prompt

# What real models see as earlier turns of the chat, about made-up people. The tiny model has learned the format.
OPERATIONS_SHOWN = [  # (case, operations)
    ("memories of Nina:\n1 (2 May 2021) Nina works as a nurse.\n2 (2 May 2021) Nina has a cat named Tom.\n"
     "new facts from Nina (9 July 2021):\n- Nina got a second cat, Kit.\noperations:",
     '[{"event": "UPDATE", "id": 2, "text": "Nina has two cats, Tom and Kit."}]'),
    ("memories of Nina:\n1 (2 May 2021) Nina lives in Leeds.\n2 (2 May 2021) Nina works as a nurse.\n"
     "3 (2 May 2021) Nina has a cat named Tom.\nnew facts from Nina (9 July 2021):\n- Nina is a nurse.\n"
     "- Nina plays chess.\noperations:", '[{"event": "NOOP"}, {"event": "ADD", "text": "Nina plays chess."}]'),
    ("memories of Nina:\n1 (2 May 2021) Nina lives in Leeds.\n2 (9 July 2021) Nina wants to run a marathon.\n"
     "new facts from Nina (1 October 2021):\n- Nina gave up on the marathon.\noperations:",
     '[{"event": "DELETE", "id": 2}]'),
    ("memories of Nina:\nnone\nnew facts from Nina (2 May 2021):\n- Nina works as a nurse.\n"
     "- Nina has a cat named Tom.\noperations:",
     '[{"event": "ADD", "text": "Nina works as a nurse."}, {"event": "ADD", "text": "Nina has a cat named Tom."}]'),
    ("memories of Nina:\n1 (2 May 2021) Nina works as a nurse.\n2 (2 May 2021) Nina has a cat named Tom.\n"
     "new facts from Nina (9 July 2021):\n- Nina wants to run a marathon.\n- Nina lives in Leeds.\n"
     "operations:",
     '[{"event": "ADD", "text": "Nina wants to run a marathon."}, {"event": "ADD", "text": "Nina lives in Leeds."}]'),
]
FACTS_SHOWN = [  # (turn, facts)
    ("turn of Tom (9 July 2021):\nWow, Nina, well done! I'd like to take piano lessons next month, since my sister Ada "
     "says it helps her relax. [shares a photo: a photo of a red bicycle]\nfacts:",
     '["Tom wants to take piano lessons next month, because his sister Ada says it helps her relax.", '
     '"Tom shared a photo of a red bicycle."]'),
    ("turn of Nina (2 May 2021):\nThanks, Tom! Last week I moved into a small flat in Leeds, because I found work as a "
     "nurse there. My cat loves the view! How about you?\nfacts:",
     '["Nina moved into a small flat in Leeds last week.", "Nina found work as a nurse in Leeds.", '
     '"Nina has a cat that loves the view."]'),
]


NAMES_SHOWN = re.compile(r"\b(?:Nina|Tom|Ada|Kit|Leeds)\b")


def is_copied(text: str, known: str) -> bool:
    """Whether a text has a name from the demonstrations that the case (its texts: `known`) has not in any spelling."""
    return any(name.lower() not in known.lower() for name in NAMES_SHOWN.findall(text))


def date_suffix(time: str) -> str:
    """The day: "3 May 2023" or "1:56 pm on 3 May 2023" -> " (3 May 2023)"; "" where a transcript has no dates."""
    hour = r"\d{1,2}:\d\d(?::\d\d)?(?: *[ap]m)?"
    day = re.sub(rf"(?i)^{hour} on |(?:,| at)? {hour}$|(?<=\d)T{hour}.*$", "", time)
    return f" ({day})" if day else ""


def memory_lines(memories: Sequence, start: int = 1) -> str:
    """Memories as numbered lines: "1 (3 May 2023) Jon has a dog named Buddy.", or "none" if there are none."""
    lines = [f"{i}{date_suffix(memory.time)} {memory.text}" for i, memory in enumerate(memories, start)]
    return "\n".join(map(sanitize_for_prompt, lines)) or "none"


def fit_prompt(policy, render: Callable, ranked: Sequence, max_tokens: int | None, max_new_tokens: int):
    """
    (ids of render(memories), memories, number dropped); memories: the first of `ranked`, as many as fit into max_tokens
    and, with max_new_tokens after them, into the model's window. If the prompt exceeds the limit even without memories,
    its ids are returned as they are.
    """
    def encode_best(n):
        return policy.encode(render(ranked[:n]))

    if window := getattr(policy, "window", None):  # a hosted model's window is unknown
        max_tokens = min(max_tokens or window, max(1, window - max_new_tokens))
    n, ids = len(ranked), encode_best(len(ranked))
    if max_tokens and len(ids) > max_tokens:
        n = bisect_right(range(1, n), max_tokens, key=lambda n: len(encode_best(n)))  # as many as fit, possibly 0
        ids = encode_best(n)
    return ids, ranked[:n], len(ranked) - n


def generate(policy, adapter: str | None, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy completions of a batch of prompts, with a LoRA adapter or, for None, with the base model."""
    with policy.using(adapter):
        groups = policy.sample(prompts, 1, max_new_tokens, temperature=0) if prompts else []
    return [group[0].text for group in groups]
