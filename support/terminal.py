"""Reads lines from a terminal or a file; prints dialogues, edits and memories so that they fit the terminal."""
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress

from support.text import memory_lines

BOLD = 1
SIGNS = {"ADD": ("+", 32), "UPDATE": ("~", 36), "DELETE": ("-", 31), "NOOP": (".", 0)}  # with their ANSI colours


def wrap_for_terminal(text: str, indent: int = 0, colour: int = 0) -> str:
    """Printable text, wrapped. `colour`: an ANSI code, ignored if stdout is no terminal or NO_COLOR is set."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    text = textwrap.fill(text, max(40, shutil.get_terminal_size().columns), subsequent_indent=" " * indent)
    is_coloured = colour and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[{colour}m{text}\033[0m" if is_coloured else text


def print_turns(turns) -> Iterator:
    """Prints each turn, with a heading for its session, and yields it."""
    session = None
    for turn in turns:
        if turn.session != session:
            print("" if session is None else "\n", end="")
            session = turn.session
            print(wrap_for_terminal(f"session {session}: {turn.time or 'no date'}", colour=BOLD))
        print(wrap_for_terminal(f"{turn.speaker}: {turn.text}", 4))
        yield turn


def print_edits(edits, bank) -> None:
    """Prints the edits that are about to be applied to a memory bank; None stands for an invalid output."""
    if edits is None:
        print("    ! the output cannot be carried out: nothing changes")
    for edit in edits or []:
        sign, colour = SIGNS[edit.event]
        old = "" if edit.id is None else bank[edit.id].text
        print(wrap_for_terminal(f"    {sign} {edit.event:6}  {old or edit.text}", 14, colour).rstrip())
        if old and edit.text:
            print(wrap_for_terminal(f"           -> {edit.text}", 14, colour))


def print_bank(bank) -> None:
    """Prints the memories of each speaker, numbered as in a prompt."""
    print(f"the bank: {len(bank)} {'memory' if len(bank) == 1 else 'memories'}")
    for speaker in dict.fromkeys(memory.speaker for memory in bank):
        print(wrap_for_terminal(f"memories of {speaker}:", colour=BOLD))
        for line in memory_lines([memory for memory in bank if memory.speaker == speaker]).split("\n"):
            print(wrap_for_terminal(f"  {line}", 4))


def print_answer(answer, scored) -> None:
    """Prints an answer and the (memory, similarity) pairs of its prompt, those in bold that it selects."""
    print(f"    retrieved: {'similarity, * selected, memory' if scored else 'nothing'}")
    for i, (memory, score) in enumerate(scored, 1):
        mark, colour = ("*", BOLD) if i in answer.selected else (" ", 0)
        print(wrap_for_terminal(f"    {score:.2f} {mark} {memory_lines([memory], i)}", 13, colour))
    text = answer.text if answer.is_valid else "(the output could not be read)"
    print(wrap_for_terminal(f"    answer: {text}", 12, BOLD))


def typed_lines(prompt: str) -> Iterator[str]:
    """Yields the lines of stdin. If it is no terminal, each is printed after the prompt, as if it had been typed."""
    with suppress(ImportError):  # not available on Windows
        import readline  # noqa: F401 (gives `input` arrow keys and a history)
    is_terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = " ".join(input(prompt if is_terminal else "").split())
        except EOFError:
            return print()
        if not is_terminal:
            print(wrap_for_terminal(f"{prompt}{line}"))
        yield line
