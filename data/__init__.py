"""
The data of every stage: dialogues and questions, from benchmarks or your own file. Each benchmark has a module with
`load(split, ...) -> list[Dialogue]`; the `load` below finds the right one. Nothing here depends on models or memory.
"""
from functools import partial
from pathlib import Path

from data import locomo, longmemeval, msc, synthetic, transcript
from data.dialogue import TINY, Dialogue, Operation, Question, Turn, UsageError, banks_of, is_tiny
from data.files import read_entries

__all__ = ["TINY", "WITH_OPERATIONS", "Dialogue", "Operation", "Question", "Turn", "UsageError", "banks_of", "is_tiny",
           "load"]

BENCHMARKS = {"synthetic": synthetic.load, "locomo": locomo.load, "longmemeval": longmemeval.load,
              "longmemeval-s": partial(longmemeval.load, variant="s"), "msc": msc.load}
WITH_OPERATIONS = ("synthetic", "locomo")  # whose turns have reference operations or observations


def load(name: str, split: str, adversarial: bool = False, **options) -> list[Dialogue]:
    """
    Load a split of a benchmark, or of a file in the format of LoCoMo, LongMemEval, MSC or a transcript. The keys of the
    first entry identify the format; a file that does not begin with [ or { is a transcript. `adversarial` adds LoCoMo's
    category 5; `options` are passed to the loader. UsageError if the data cannot be read.
    """
    if name in BENCHMARKS:
        loader = BENCHMARKS[name]
    elif not Path(name).is_file():
        raise UsageError(f"--data {name}: neither a benchmark ({', '.join(BENCHMARKS)}) nor a file that exists")
    elif transcript.is_plain_text(name):
        loader, options["path"] = transcript.load, name
    else:
        entries = read_entries(name)
        keys = set(entries[0]) if isinstance(entries[0], dict) else locomo.KEYS
        module = max(locomo, longmemeval, msc, transcript, key=lambda module: len(module.KEYS & keys))
        if not module.KEYS & keys:
            raise UsageError(f'{name}: entry 0 has neither the "conversation" of LoCoMo, nor the "haystack_sessions" '
                             'of LongMemEval, nor the "previous_dialogs" of MSC, nor the "turns" or "text" of a '
                             'transcript')
        loader, options = module.load, options | {"path": name, "entries": entries}
    if adversarial and loader is not locomo.load:
        raise UsageError(f"--data {name} has no adversarial questions: only LoCoMo has")
    return loader(split, **options, **({"adversarial": True} if adversarial else {}))
