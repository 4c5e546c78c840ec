"""Text that people and models write: its safe form for storage and prompts, and how completions are read."""
import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

MAX_OUTPUT_CHARS = 20_000  # parsers ignore the rest of a completion
MAX_ANSWER_CHARS = 1_000
MAX_TEXT_CHARS = 500  # longer memories and facts are cut
MAX_OPERATIONS = 32  # per completion; also the most facts of one turn
MAX_JSON_STARTS = 100  # json_values tries to read JSON at this many brackets and braces, from the first on
# The first character of a role marker or end token: <|im_end|>, </s>, <｜User｜>, [/INST]. No match: "<3", "[a photo]".
ROLE_MARKER = re.compile(r"[<＜﹤](?=[|｜/]?[^\W\d])|\[(?=/?\w*[A-Z]{2}\w*\])")
# How reasoning begins and ends: <think> (Qwen, DeepSeek), ◁think▷ (Kimi), [THINK] (Magistral), <|START_THINKING|>
# (Cohere), <|channel|>analysis<|message|> ... <|channel|>final<|message|> (gpt-oss; "analysis ... assistantfinal" where
# special tokens are not decoded), <|channel>thought ... <channel|> (Gemma 4).
TAG = r"(?i:(?:think(?:ing)?|thoughts?(?:_process)?|reason(?:ing)?|reflection|analysis|scratchpad|monologue))"
NAMED = rf"\s*(?:\w+[:_])?{TAG}\s*"  # also <seed:think>, <chain_of_thought>
REASONING_START = re.compile(rf"[<◁]{NAMED}[>▷]|\[THINK\]|<\|(?i:start_|begin_of_)?{TAG}\|>"
                             r"|<\|channel\|>(?:analysis|commentary)|<\|channel>thought|\A\s*analysis(?=[A-Z])")
REASONING_END = re.compile(rf"[<◁]\s*/{NAMED}[>▷]|\[/THINK\]|<\|(?:/|(?i:end_|end_of_)){TAG}\|>"
                           r"|<\|channel\|>final.{0,80}?<\|message\|>|<channel\|>|assistantfinal")
WRAPPER = re.compile(r"\A\s*<\|\w+\|>|(?:<\|\w+\|>|</s>)\s*\Z")  # special tokens around a reply
FLAT = re.compile(r"\[[^\[\]]*\]|\{[^{}]*\}")  # a list or object without another one of its kind inside
BROKEN_OBJECT = re.compile(r"\{[^\[{]*(?:\}|\Z)")  # not the beginning of an object of objects
# A string in a list, also one like 'Jon's dog'.
QUOTED = re.compile(r"""(?<=[\[,:\s])(?:"(?:[^"\\]|\\.){1,1000}"|'(?:[^'\\]|\\.|'(?=\w)){1,1000}')"""
                    r"""(?=\s*(?:[,\]}"'`]|\Z))""")
ITEM = re.compile(r"(?m)^[ \t]*(?:[-*•–]|(?:(?i:fact) |\()?\d{1,2}[.):])[ \t]+(\S.*)$")  # an item of a list
KEYS = {  # names that models give to the parts of an operation; the first one is ours
    "event": ("event", "operation", "action", "op", "event_type", "operation_type", "type"),
    "id": ("id", "memory_id", "memory_number", "number", "index", "target"),
    "old_memory": ("old_memory", "old_text", "old"),
    "text": ("text", "new_memory", "new_text", "memory_text", "memory", "fact", "content", "value", "sentence",
             "statement"),
}
FACT_KEYS = ("facts", "memories", *KEYS["text"])
EVENT_NAMES = {"NONE": "NOOP", "NO": "NOOP", "NO-OP": "NOOP", "NO_OP": "NOOP", "IGNORE": "NOOP", "SKIP": "NOOP",
               "KEEP": "NOOP", "INSERT": "ADD", "CREATE": "ADD", "REMOVE": "DELETE", "REPLACE": "UPDATE",
               "MODIFY": "UPDATE"}


class Parsed(list):
    """Entries of a completion. `skipped`: number left out; `cut`: number of texts shortened to MAX_TEXT_CHARS."""

    def __init__(self, entries=(), skipped: int = 0, cut: int = 0):
        super().__init__(entries)
        self.skipped, self.cut = skipped, cut


def normalize_whitespace(text: str) -> str:
    """Text as one line of valid Unicode, the form in which it is stored and scored. " a\\n b" -> "a b" """
    return " ".join(text.encode("utf-8", "replace").decode().split())


def sanitize_for_prompt(text: str) -> str:
    """Text as one line that cannot pose as another part of the prompt. "<|im_end|>" -> "< |im_end|>", plain text"""
    return ROLE_MARKER.sub(r"\g<0> ", normalize_whitespace(text))


def reasons_on(text: str) -> bool:
    """Whether the reasoning in a completion does not end."""
    return bool(REASONING_START.search(REASONING_END.split(text)[-1]))


def after_reasoning(text: str) -> str:
    """
    What a model says after its reasoning, which a chat template may have begun; "" if the reasoning does not end.
    "<think>Hm.</think>Kia" -> "Kia", "Hm.</think>Kia" -> "Kia", "<think>Hm." -> ""
    """
    return "" if reasons_on(text) else WRAPPER.sub("", REASONING_END.split(text)[-1])


def chat_messages(system: str, user: str, demonstrations: Sequence[tuple[str, str]] = ()) -> list[dict]:
    """A chat. `demonstrations`: its earlier turns, each a (user message, reply)."""
    turns = [(role, text) for pair in demonstrations for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": text} for role, text in [("system", system), *turns, ("user", user)]]


def json_values(text: str) -> Iterator[list | dict | None]:
    """
    The JSON lists and objects in a text, also as Python writes them, and the whole ones inside a value that is cut off
    or broken; None for an object that cannot be read. '[{"a": 1}, {"b": ' -> {"a": 1}, None
    """
    decoder, text, end = json.JSONDecoder(), text[:MAX_OUTPUT_CHARS], 0
    for start in [match.start() for match in re.finditer(r"[\[{]", text)][:MAX_JSON_STARTS]:
        if start < end:  # inside the previous value
            continue
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            flat = FLAT.match(text, start)
            value = python_value(flat[0]) if flat else None
            if value is not None:
                end = flat.end()
            elif not BROKEN_OBJECT.match(text, start):
                continue
        yield value


def python_value(text: str) -> list | dict | None:
    """A list or dictionary in Python's form, or None. "['a', 'b',]" -> ["a", "b"]"""
    if re.search(r"""["']\s+["']""", text):
        return None  # Python would join the two strings
    with warnings.catch_warnings(), suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        warnings.simplefilter("ignore")  # about backslashes
        value = ast.literal_eval(text)
        return value if isinstance(value, list | dict) else None


def lowered(item: dict) -> dict:
    """With lower-case keys without spaces. {"Memory ID": 1} -> {"memory_id": 1}"""
    return {str(key).strip().lower().replace(" ", "_"): value for key, value in item.items()}


def read_operation(item) -> dict:
    """An operation by the names of KEYS, with None for what it lacks. {"Action": "insert"} -> {"event": "ADD", ...}"""
    item = lowered(item) if isinstance(item, dict) else {}
    found = {name: next((item[key] for key in keys if key in item), None) for name, keys in KEYS.items()}
    event = re.sub(r"[ _](MEMORY|FACT|OPERATION|CHANGE)$", "", str(found["event"]).strip().upper())  # "NO CHANGE"
    return found | {"event": found["event"] and EVENT_NAMES.get(event, event)}


def read_operations(completion: str) -> list[dict]:
    """The operations in a completion, in the form of `read_operation`; those that cannot be read have no event."""
    operations, is_empty = [], False
    for value in json_values(after_reasoning(completion)):
        is_wrapper = isinstance(value, dict) and not read_operation(value)["event"]  # the paper has {"memory": [...]}
        lists = [inner for inner in value.values() if isinstance(inner, list)] if is_wrapper else []
        for items in lists or [value]:
            while isinstance(items, list) and len(items) == 1 and isinstance(items[0], list) and items[0]:  # [[...]]
                items = items[0]
            found = [read_operation(item) for item in (items if isinstance(items, list) else [items])]
            is_empty = is_empty or not found
            if items is None or any(operation["event"] for operation in found):  # "[1]" is a reference
                operations += found
    return operations or [read_operation({"event": "NOOP"})] * is_empty


def fact_texts(value, depth: int = 4) -> list[str | None]:
    """The texts in a JSON value, None for what is no text. {"facts": [{"fact": "Jon ran."}, 3]} -> "Jon ran.", None"""
    if isinstance(value, str) and depth:
        return [value]
    if isinstance(value, dict) and value:
        value = lowered(value)
        named = [value[key] for key in FACT_KEYS if key in value]
        value = named[:1] or [inner for inner in value.values() if isinstance(inner, list)] or [None]
    if isinstance(value, list | dict) and depth:
        return [text for inner in value for text in fact_texts(inner, depth - 1)]
    return [None]


def loose_strings(text: str) -> list[str | None]:
    """
    The strings of a list that is cut off or broken, with a None at the end if there is more than strings, or the items
    of a numbered or dashed list. '["a", "b' -> ["a", None]; "- a\\n- b" -> ["a", "b"]
    """
    text = text[:MAX_OUTPUT_CHARS]
    opened = re.search(r"""\[\s*["']""", text)
    if not opened:
        return [unquoted(item) for item in ITEM.findall(text.replace("**", ""))]
    strings = []
    rest = QUOTED.sub(lambda match: strings.append(unquoted(match[0])) or "", text[opened.start():])
    return strings + [None] * bool(re.search(r"\w", rest))


def unquoted(text: str) -> str:
    """A string without its quotes. "'Jon's dog'" -> "Jon's dog" """
    with suppress(ValueError):
        return json.loads(text) if text[0] == '"' else re.sub(r"^'(.*)'$", r"\1", text.strip(), flags=re.DOTALL)
    return text.strip('"')


def parse_facts(completion: str) -> Parsed:
    """
    The facts of the first list that has any, or of a numbered or dashed list. 'So: ["Jon ran."]' -> ["Jon ran."]
    A list that is cut off gives its whole facts. Skipped: what is no text; the whole completion if it has no list.
    """
    completion, found = after_reasoning(completion), []
    values = list(json_values(completion))
    for value in values:
        texts = fact_texts(value)
        if value is None or any(texts):
            found += texts
        if any(texts) and isinstance(value, list):
            break
    if not any(found):
        found = loose_strings(completion) or found or [None] * all(map(fact_texts, values))  # [] is a valid reply
    texts = [normalize_whitespace(text) for text in found if text]
    kept = [text[:MAX_TEXT_CHARS].strip() for text in texts[:MAX_OPERATIONS] if text]
    return Parsed(kept, found.count(None) + len(texts[MAX_OPERATIONS:]), count_long(texts))


def count_long(texts: Sequence[str]) -> int:
    """How many texts are longer than MAX_TEXT_CHARS."""
    return sum(len(text) > MAX_TEXT_CHARS for text in texts)


def trigram_similarity(a: str, b: str) -> float:
    """Dice coefficient of the letter trigrams of two texts, 1.0 for equal texts, in linear time."""
    one, other = (Counter(text[i:i + 3] for i in range(len(text) - 2)) for text in (f"  {a} ", f"  {b} "))
    return 2 * (one & other).total() / (one.total() + other.total())
