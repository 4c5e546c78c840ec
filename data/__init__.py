"""
What every stage reads: a dialogue of dated turns by two speakers, and the questions asked about it.

One module beside this one per benchmark (`synthetic.py`, `locomo.py`, `longmemeval.py`, `msc.py`), and `transcript.py`
for conversations of your own, each with `load(split, ...) -> list[Dialogue]`; `load` below finds the right one. Nothing
here knows of models or of memory.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path

TINY = Path(__file__).parent / "tiny"  # the default model; its README.md says how it was made


class UsageError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do."""


def is_tiny(model: str | Path) -> bool:
    """Whether a hub id or folder is the tiny default model, whose usual settings are others than a real model's."""
    return Path(model).resolve() == TINY.resolve()


@dataclass(frozen=True)
class Operation:
    """The edit of the memory bank a turn calls for. `old_memory` and `text` are whole memory texts or ''."""
    event: str  # ADD, UPDATE, DELETE or NOOP
    old_memory: str = ""  # the entry that UPDATE rewrites or DELETE removes
    text: str = ""  # what ADD or UPDATE writes


@dataclass(frozen=True)
class Turn:
    id: str  # unique in its dialogue: "D3:12" is turn 12 of session 3
    session: int  # from 1
    speaker: str
    text: str  # an image is rendered into it by its caption
    time: str  # as the benchmark writes it: "1:56 pm on 8 May, 2023"
    fact: str = ""  # synthetic only: what one who keeps everything would store, small talk too
    operation: Operation | None = None  # synthetic only: for baselines, agreement, and `--bank oracle`


@dataclass(frozen=True)
class Question:
    id: str  # unique in its dialogue
    text: str
    answer: str
    category: int  # the benchmark's own number
    evidence: tuple[str, ...] = ()  # ids of the turns that hold the answer
    asked: str | None = None  # id of the turn right after which it is asked; None: after the last


@dataclass(frozen=True)
class Dialogue:
    id: str
    speakers: tuple[str, str]
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]

    def final_questions(self) -> list[Question]:
        """Those asked at the end, which judge the whole bank."""
        return [question for question in self.questions if question.asked is None]


def load(name: str, split: str, **options) -> list[Dialogue]:
    """
    The dialogues of a split: of a benchmark, or of a file in the format of LoCoMo, LongMemEval, MSC or a transcript,
    told apart by the keys of the first entry; what is not JSON is a transcript. `options` go to the benchmark's own
    loader. UsageError for what cannot be read.
    """
    from data import locomo, longmemeval, msc, synthetic, transcript  # here: they import the classes above
    named = {"synthetic": synthetic.load, "locomo": locomo.load, "longmemeval": longmemeval.load,
             "longmemeval-s": partial(longmemeval.load, variant="s"), "msc": msc.load}
    if name in named:
        return named[name](split, **options)
    if not Path(name).is_file():
        raise UsageError(f"--data {name}: neither a benchmark ({', '.join(named)}) nor a file that is there")
    if transcript.is_plain(name):
        return transcript.load(split, name, **options)
    entries = locomo.read(name)
    keys = set(entries[0]) if isinstance(entries[0], dict) else locomo.KEYS
    benchmark = max(locomo, longmemeval, msc, transcript, key=lambda one: len(one.KEYS & keys))
    if not benchmark.KEYS & keys:
        raise UsageError(f'{name}: entry 0 has neither the "conversation" of LoCoMo, nor the "haystack_sessions" of '
                         'LongMemEval, nor the "previous_dialogs" of MSC, nor the "turns" or "text" of a transcript')
    return benchmark.load(split, path=name, entries=entries, **options)
