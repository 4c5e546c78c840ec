"""Text that people and models write, in the form in which it is stored, scored and shown in prompts."""
import re
from collections.abc import Sequence

MAX_OUTPUT_CHARS = 20_000  # parsers ignore the rest of a completion
MAX_ANSWER_CHARS = 1_000
# The first character of a role marker or end token: <|im_end|>, </s>, <｜User｜>, [/INST]. No match: "<3", "[a photo]".
ROLE_MARKER = re.compile(r"[<＜﹤](?=[|｜/]?[^\W\d])|\[(?=/?\w*[A-Z]{2}\w*\])")


def normalize_whitespace(text: str) -> str:
    """Text as one line of valid Unicode, the form in which it is stored and scored. " a\\n b" -> "a b" """
    return " ".join(text.encode("utf-8", "replace").decode().split())


def sanitize_for_prompt(text: str) -> str:
    """
    Text as one line without role markers, so that it cannot pose as another part of the prompt. A tokenizer would
    read "<|im_end|>" inside a memory as the end of the message; "< |im_end|>" is plain text.
    """
    return ROLE_MARKER.sub(r"\g<0> ", normalize_whitespace(text))


def date_suffix(time: str) -> str:
    """"3 May 2023" -> " (3 May 2023)"; "" where a transcript has no dates."""
    return f" ({time})" if time else ""


def memory_lines(memories: Sequence, start: int = 1) -> str:
    """Memories as numbered lines: "1 (3 May 2023) Jon has a dog named Buddy.", or "none" if there are none."""
    lines = [f"{i}{date_suffix(memory.time)} {memory.text}" for i, memory in enumerate(memories, start)]
    return "\n".join(map(sanitize_for_prompt, lines)) or "none"


def chat_messages(system: str, user: str) -> list[dict]:
    """A system and a user message, as chat templates take them."""
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
