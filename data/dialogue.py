"""The classes that all loaders return: a dialogue of dated turns by two speakers, and the questions about it."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TINY = Path(__file__).parent / "tiny"  # the default model; tiny/README.md says how it was made


class UsageError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, and what to do."""


def is_tiny(model: str | Path) -> bool:
    """Return whether a hub id or folder is the tiny default model, which has its own default settings."""
    return Path(model).resolve() == TINY.resolve()


def banks_of(speakers: Sequence[str]) -> tuple[str | None, ...]:
    """The banks of some speakers: one each. The roles of a chat with an assistant share one, None (all memories)."""
    return (None,) if {*speakers} <= {"user", "assistant"} else tuple(speakers)


@dataclass(frozen=True)
class Operation:
    """The correct edit of the memory bank after a turn. `old_memory` and `text` are complete memory texts or ''."""
    event: str  # ADD, UPDATE, DELETE or NOOP
    old_memory: str = ""  # the entry that UPDATE rewrites or DELETE removes
    text: str = ""  # the text that ADD or UPDATE writes


@dataclass(frozen=True)
class Turn:
    id: str  # unique in its dialogue: "D3:12" is turn 12 of session 3
    session: int  # counted from 1
    speaker: str
    text: str  # an image is replaced by its caption
    time: str  # in the format of the benchmark: "1:56 pm on 8 May, 2023"
    fact: str = ""  # synthetic data only: the memory that storing every turn, even small talk, would add
    operation: Operation | None = None  # synthetic data only: for baselines, agreement and `--bank oracle`
    observations: tuple[str, ...] = ()  # LoCoMo only: facts of this turn, noted by GPT: they take the operation's place


@dataclass(frozen=True)
class Question:
    id: str  # unique in its dialogue
    text: str
    answer: str
    category: int  # the number that the benchmark gives it
    evidence: tuple[str, ...] = ()  # ids of the turns that contain the answer
    asked_after: str | None = None  # id of the turn after which it is asked; None: after the last turn
    preface: str = ""  # precedes the question in a prompt, but retrieval does not search for it: "Current date: ..."


@dataclass(frozen=True)
class Dialogue:
    id: str
    speakers: tuple[str, str]
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]

    def final_questions(self) -> list[Question]:
        """Return the questions asked after the last turn, which test the whole bank."""
        return [question for question in self.questions if question.asked_after is None]
