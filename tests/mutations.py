"""Helpers of the fuzz tests: number of cases, random changes to the entries of a file, folders of published files."""
import copy
import functools
import os
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from data import Dialogue

CASES = int(os.environ.get("FUZZ_CASES", 2000))  # cases per test; the same ones in every run unless FUZZ_CASES is set
FUZZ = settings(max_examples=CASES, derandomize="FUZZ_CASES" not in os.environ, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))


def edited(entry: dict, *keys: str | int, value=None, remove: bool = False) -> dict:
    """Return a copy of the entry in which the value at the path `keys` is replaced or removed."""
    entry = copy.deepcopy(entry)
    node = functools.reduce(lambda node, key: node[key], keys[:-1], entry)
    if remove:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    return entry


def places(node, path: tuple = ()) -> list[tuple]:
    """Return the path of keys of everything inside a JSON value. {"a": [5]} -> [("a",), ("a", 0)]"""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in items for place in [(*path, key), *places(child, (*path, key))]]


def mutated(entry: dict, *words: str) -> st.SearchStrategy[dict]:
    """Entries in which one to three places are removed or replaced by any JSON value; its texts may be `words`."""
    text = st.text(max_size=5) | st.sampled_from(["\ud800", "\n", *words])
    value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | text,
                         lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2))
    mutation = st.tuples(st.sampled_from(places(entry)), st.booleans(), value)
    return st.lists(mutation, min_size=1, max_size=3).map(lambda mutations: functools.reduce(mutate, mutations, entry))


def mutate(entry: dict, mutation: tuple) -> dict:
    """Apply one mutation (place, remove, value). The entry stays as it is if an earlier mutation removed the place."""
    place, remove, value = mutation
    try:
        return edited(entry, *place, value=value, remove=remove)
    except (KeyError, IndexError, TypeError):
        return entry


def said(dialogue: Dialogue) -> list[str]:
    """Return all texts of a dialogue that a model may see."""
    return [turn.text for turn in dialogue.turns] + [turn.time for turn in dialogue.turns] + [
        text for question in dialogue.questions for text in (question.text, question.answer)]


@functools.cache
def real_file(name: str) -> Path | None:
    """Return the path of a published file, or None if this machine does not have it."""
    neighbour = Path(__file__).parents[2] / "shared/data"
    folders = [os.environ.get("MEMORY_R1_DATA"), "~/.cache/memory-r1", neighbour]
    paths = [Path(folder).expanduser() / name for folder in folders if folder]
    return next((path for path in paths if path.exists()), None)
