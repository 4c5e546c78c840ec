"""Text that people and models write: its safe form for storage and prompts, and the JSON inside it."""
import json
import re
from collections import Counter
from collections.abc import Iterator

MAX_OUTPUT_CHARS = 20_000  # parsers ignore the rest of a completion
MAX_ANSWER_CHARS = 1_000
MAX_JSON_STARTS = 100  # json_values tries to read JSON at this many brackets and braces, from the first on
# The first character of a role marker or end token: <|im_end|>, </s>, <｜User｜>, [/INST]. No match: "<3", "[a photo]".
ROLE_MARKER = re.compile(r"[<＜﹤](?=[|｜/]?[^\W\d])|\[(?=/?\w*[A-Z]{2}\w*\])")

REASONING_START = re.compile(r"(?i)<(think|thinking|reasoning|thought)>")
REASONING_END = re.compile(r"(?i)</(?:think|thinking|reasoning|thought)>")


def normalize_whitespace(text: str) -> str:
    """Text as one line of valid Unicode, the form in which it is stored and scored. " a\\n b" -> "a b" """
    return " ".join(text.encode("utf-8", "replace").decode().split())


def sanitize_for_prompt(text: str) -> str:
    """Text as one line that cannot pose as another part of the prompt. "<|im_end|>" -> "< |im_end|>", plain text"""
    return ROLE_MARKER.sub(r"\g<0> ", normalize_whitespace(text))


def after_reasoning(text: str) -> str:
    """What a model says after its reasoning: "<think>Hm.</think>Kia" -> "Kia"; "" if the reasoning does not end."""
    text = REASONING_END.split(text)[-1]  # a chat template may have opened the reasoning, so only its end is here
    return "" if REASONING_START.search(text) else text


def chat_messages(system: str, user: str) -> list[dict]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def json_values(text: str) -> Iterator[list | dict | None]:
    """The JSON lists and objects in a text; None for a truncated one. 'Sure: [1], [{"a": 2}, {' -> [1], None"""
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
                return  # the parts of a broken value must not be taken for complete values


def trigram_similarity(a: str, b: str) -> float:
    """Dice coefficient of the letter trigrams of two texts, 1.0 for equal texts, in linear time."""
    one, other = (Counter(text[i:i + 3] for i in range(len(text) - 2)) for text in (f"  {a} ", f"  {b} "))
    return 2 * (one & other).total() / (one.total() + other.total())
