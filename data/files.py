"""Download of published files, and checked access to JSON: an error is one line that names file, entry and key."""
import http.client
import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from torch.hub import download_url_to_file

from data.dialogue import Dialogue, UsageError

TIMEOUT = 20  # seconds without a reply from the server


def cached_file(file: str, title: str, address: str, sha256: str) -> Path:
    """Return the path of a published file in the cache folder; download it if it is not there."""
    path = Path(os.environ.get("MEMORY_R1_DATA") or "~/.cache/memory-r1").expanduser() / file
    if os.path.exists(path):
        return path
    print(f"fetching {title} to {path}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(address, str(path), hash_prefix=sha256)  # a partial or wrong file never gets this name
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = f"{title} is not at {path} and could not be fetched ({error})"
        raise UsageError(f"{reason}: put {address} there, or name a file with --data") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def read_entries(path: str | Path) -> list:
    """Read a file that holds a JSON list or one JSON object per line. Returns its entries, unchecked."""
    try:
        text, entries, end = Path(path).read_bytes().decode("utf-8-sig"), [], 0
        while place := re.compile(r"\S").search(text, end):  # an error then has its true line and column
            entry, end = json.JSONDecoder().raw_decode(text, place.start())
            entries.append(entry)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is neither JSON nor one JSON object a line ({error})") from None
    if len(entries) == 1 and not isinstance(entries[0], dict):
        entries = entries[0]
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: is not a list of conversations")
    return entries


def read_dialogues(entries: Iterable, path: str | Path, key: str, make_dialogue: Callable) -> list[Dialogue]:
    """Return `make_dialogue(entry, where)` of each entry. UsageError if two dialogues have the same id."""
    dialogues = {}
    for i, entry in enumerate(entries):
        dialogue = make_dialogue(entry, f"{path}: entry {i}")
        if dialogue.id in dialogues:
            raise UsageError(f'{path}: entry {i}: an earlier entry has the "{key}" "{dialogue.id}"')
        dialogues[dialogue.id] = dialogue
    return list(dialogues.values())


KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object", (str, int, float): "text or a number"}


def member(node, key: str, kind, where: str, may_be_empty: bool = False):
    """Return node[key]; text is cleaned. UsageError, beginning with `where`, if missing, empty or not a `kind`."""
    if not isinstance(node, dict):
        raise UsageError(f"{where} is not an object")
    if key not in node:
        raise UsageError(f'{where} has no key "{key}"')
    value = node[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f'{where}: "{key}" is not {KINDS[kind]}')
    value = clean(value) if isinstance(value, str) else value
    if value == "" and not may_be_empty:
        raise UsageError(f'{where}: "{key}" is empty')
    return value


def optional(node: dict, key: str, kind, where: str, default):
    """Return node[key] like `member`, with empty text allowed, or `default` if it is missing or null."""
    return default if node.get(key) is None else member(node, key, kind, where, may_be_empty=True)


def member_as_text(node, key: str, where: str) -> str:
    """Return node[key], a text or a finite number, as text."""
    value = member(node, key, (str, int, float), where)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f'{where}: "{key}" is {value}, not text or a finite number')
    return str(value)


def clean(text: str) -> str:
    """Collapse white space; remove zero-width spaces (joiners stay, emoji need them) and unencodable surrogates."""
    if not text.isascii():
        text = re.sub("[\u200b\u2060\ufeff]", "", text.encode("utf-8", "ignore").decode())
    return " ".join(text.split())
