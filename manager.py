"""
The Memory Manager of Memory-R1 (arXiv 2508.19828, Alg. 3): it reads what a turn says beside the related memories
and edits the bank with ADD, UPDATE, DELETE or NOOP.

    memories of Jon:
    1 (8 May 2023) Jon has a dog named Buddy.
    new facts from Jon (3 June 2023):
    - I adopted another dog, Scout.
    operations:
                     [{"event": "UPDATE", "id": 1, "text": "Jon has a dog named Buddy and Scout."}]

Departures from the paper:
1. Only operations on the new facts are written; the paper's prompt re-lists every memory shown (long outputs).
2. UPDATE and DELETE touch the one entry they name, by its number here or by its text; the pseudo-code of the
   paper drops all that was retrieved, its prompt goes by id.
3. Any output that cannot be carried out in full is NOOP, and counted as invalid.
"""
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

import data
from data import TINY, Dialogue, Operation, Turn, UsageError
from memory import Memory, MemoryBank, make_embedder

SYSTEM = """You are the memory manager of an assistant. You keep a small, correct memory bank about a person. \
You are given memories that are already stored, each with its number and date, and new facts that the person has just \
told. Decide how the bank has to change so that later questions about the person can be answered from it.

There are four operations.
ADD: the fact is new, and no stored memory is about the same matter. Write it as one self-contained sentence with the \
person's name.
  stored: 1 Nina works as a nurse.   fact: Nina has a cat named Tom.
  [{"event": "ADD", "text": "Nina has a cat named Tom."}]
UPDATE: a stored memory is about the same matter, and the fact adds to it, makes it more precise or replaces it. Write \
the whole memory anew, keeping everything that is still true. Things that exist side by side belong in one memory. Do \
not update when the fact merely says the same in other words.
  stored: 1 Nina has a cat named Tom.   fact: Nina got another cat, Kit.
  [{"event": "UPDATE", "id": 1, "text": "Nina has two cats, Tom and Kit."}]
DELETE: the fact says that a stored memory is no longer true, and nothing takes its place.
  stored: 1 Nina has a gym membership.   fact: Nina cancelled the gym.
  [{"event": "DELETE", "id": 1}]
NOOP: nothing to keep. The fact is already stored, or is small talk, or is about somebody else or only imagined.
  stored: 1 Nina has a cat named Tom.   fact: Nina still has the cat Tom.
  [{"event": "NOOP"}]

Name a stored memory by its number as "id", or by its exact text as "old_memory". Turn relative dates ("yesterday") \
into calendar dates, using the date of the new facts. Answer with the JSON list of operations and nothing else."""

EXTRACTOR = """You turn what a person says into memories. Read the turn and list every fact in it that is worth \
remembering about the person who speaks: what happened, plans, preferences, relations, possessions, feelings that \
matter, shared photos. Each fact is one short self-contained sentence with the person's name, never a pronoun, and \
with the calendar date where time matters (turn "yesterday" into a date, using the date of the turn). Use only what \
this person says. Small talk gives no fact.
Answer with a JSON list of strings, [] if there is nothing, and nothing else."""

LONGEST_TEXT = 500  # characters of a stored memory; what a model writes beyond that is a fault, not a fact
LONGEST_OUTPUT = 20_000  # characters of a completion that are read at all
MOST_OPERATIONS = 32  # in one output
MOST_OPENINGS = 100  # brackets and braces that may begin one
CLOSE_ENOUGH = 0.6  # similarity from which a quoted text names a memory
EVENTS = ("ADD", "UPDATE", "DELETE", "NOOP")
# What models read as a role or an end: <|im_end|>, </s>, <｜User｜>, [/INST]; "<3" and "[shares a photo: a dog]" stay.
MARKER = re.compile(r"[<＜﹤](?=[|｜/]?[^\W\d])|\[(?=/?\w*[A-Z]{2}\w*\])")


@dataclass(frozen=True)
class Case:
    """What the Manager decides on. `memories` are the best matches first; a prompt shows them oldest first."""
    speaker: str
    time: str
    facts: tuple[str, ...]
    memories: tuple[Memory, ...]

    def shown(self) -> list[Memory]:
        return sorted(self.memories, key=lambda memory: memory.id)


@dataclass(frozen=True)
class Edit:
    """One operation, ready to be carried out: `id` is the bank's own (UPDATE, DELETE), `text` the new text."""
    event: str
    id: int | None = None
    text: str = ""


# ------------------------------------------------------------------------------------------------ prompts

def folded(text: str) -> str:
    """Text from people and models as one line of valid Unicode, as it is stored and scored."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def one_line(text: str) -> str:
    """
    Text as a prompt shows it: folded and without role markers, so that it cannot pose as another part of the prompt. A
    tokenizer would take "<|im_end|>" in a memory for the end of the message; "< |im_end|>" is text.
    """
    return MARKER.sub(r"\g<0> ", folded(text))


def dated(time: str) -> str:
    """' (3 May 2023)', or '' where a transcript has no dates."""
    return f" ({time})" if time else ""


def memory_lines(memories: Sequence, start: int = 1) -> str:
    """Memories numbered from `start`: '1 (3 May 2023) Jon has a dog named Buddy.', or 'none'."""
    lines = [one_line(f"{i}{dated(memory.time)} {memory.text}") for i, memory in enumerate(memories, start)]
    return "\n".join(lines) or "none"


def case_text(speaker: str, time: str, memories: Sequence, facts: Sequence[str]) -> str:
    """The user message that states a case."""
    listed = "\n".join(f"- {one_line(fact)}" for fact in facts)
    return (f"{one_line(f'memories of {speaker}:')}\n{memory_lines(memories)}\n"
            f"{one_line(f'new facts from {speaker}{dated(time)}:')}\n{listed}\noperations:")


def turn_text(speaker: str, time: str, text: str) -> str:
    """The user message that asks for the facts of a turn."""
    return f"{one_line(f'turn of {speaker}{dated(time)}:')}\n{one_line(text)}\nfacts:"


def chat(system: str, user: str) -> list[dict]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def messages(case: Case) -> list[dict]:
    return chat(SYSTEM, case_text(case.speaker, case.time, case.shown(), case.facts))


def fit_prompt(policy, render: Callable, ranked: Sequence, max_tokens: int | None):
    """
    The longest prompt within `max_tokens`: drops the lowest ranked memories, never anything else (so without any
    memory it may still be too long). render(memories) -> messages. Returns (ids, memories kept, number dropped).
    """
    ids, fits = policy.encode(render(list(ranked))), len(ranked)
    if max_tokens and len(ids) > max_tokens:
        fits = bisect_right(range(1, len(ranked)), max_tokens, key=lambda n: len(policy.encode(render(ranked[:n]))))
        ids = policy.encode(render(list(ranked[:fits])))
    return ids, list(ranked[:fits]), len(ranked) - fits


# ------------------------------------------------------------------------------------------------ parsing

def json_values(text: str) -> Iterator[list | dict | None]:
    """The JSON lists and objects in a text, whatever stands around them. Half of one is None, and the last."""
    decoder, text, end = json.JSONDecoder(), text[:LONGEST_OUTPUT], 0
    for opening in list(re.finditer(r"[\[{]", text))[:MOST_OPENINGS]:
        if opening.start() < end:  # inside what was read
            continue
        try:
            value, end = decoder.raw_decode(text, opening.start())
            yield value
        except (ValueError, RecursionError):
            if re.match(r"[\[{]\s*[\[{\"]", text[opening.start():]):  # no "[see below]" but a list that breaks off:
                yield None  # what stands inside is not to be carried out alone
                return


def similarity(a: str, b: str) -> float:
    """Dice coefficient of two texts' letter triples, 1 for equal texts; its time is linear, whatever a model quotes."""
    triples = [Counter(text[i:i + 3] for i in range(len(text) - 2)) for text in (f"  {a} ", f"  {b} ")]
    return 2 * (triples[0] & triples[1]).total() / (triples[0].total() + triples[1].total())


def named_memory(item: dict, shown: list[Memory]) -> Memory | None:
    """The memory an operation names: by its number in the prompt, else the one whose text is closest to the quote."""
    number = item.get("id")
    if isinstance(number, str) and number.strip().isdecimal() and len(number) < 6:
        number = int(number)
    if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= len(shown):
        return shown[number - 1]
    quote = item.get("old_memory")
    if not isinstance(quote, str) or not quote.strip() or not shown:
        return None
    quote = one_line(quote[:2 * LONGEST_TEXT])
    close, memory = max(((similarity(one_line(memory.text), quote), memory) for memory in shown),
                        key=lambda pair: pair[0])
    return memory if close >= CLOSE_ENOUGH else None


def parse_edit(item, shown: list[Memory]) -> Edit | None:
    """One element of the list, or None if it cannot be carried out."""
    if not isinstance(item, dict) or not isinstance(item.get("event"), str):
        return None
    event = {"NONE": "NOOP"}.get(item["event"].strip().upper(), item["event"].strip().upper())
    text = folded(item["text"])[:LONGEST_TEXT].strip() if isinstance(item.get("text"), str) else ""
    if event not in EVENTS or (event in ("ADD", "UPDATE") and not text):
        return None
    if event in ("ADD", "NOOP"):
        return Edit(event, None, text if event == "ADD" else "")
    memory = named_memory(item, shown)
    return memory and Edit(event, memory.id, text if event == "UPDATE" else "")


def parse(completion: str, case: Case) -> list[Edit] | None:
    """
    A completion as edits, in order; None if any of it cannot be carried out. NOOPs are kept, they are counted.
    '[{"event": "DELETE", "id": 1}]' -> [Edit("DELETE", id of the first memory shown)]
    """
    lists = []
    for value in json_values(completion):
        if isinstance(value, dict):
            value = value["memory"] if isinstance(value.get("memory"), list) else [value]
        if not value or any("event" in item for item in value if isinstance(item, dict)):  # no [1], a mere reference
            lists.append(value)
    found = [item for items in lists for item in items or ()]
    if not lists or None in lists or len(found) > MOST_OPERATIONS:
        return None
    edits = [parse_edit(item, case.shown()) for item in found]
    changed = [edit.id for edit in edits if edit and edit.id is not None]
    if None in edits or len(changed) != len(set(changed)):
        return None  # two edits of one entry contradict each other
    return edits or [Edit("NOOP")]


def write(edits: Sequence[Edit], case: Case, by_text: bool = False) -> str:
    """
    Edits as SYSTEM wants them, the inverse of `parse`:
    [Edit("DELETE", id of the first memory shown)] -> '[{"event": "DELETE", "id": 1}]'
    `by_text`: as the tiny model is taught, which quotes the memory it names. Its texts begin with a space: a word is
    then always the same tokens.
    """
    shown, items = case.shown(), []
    numbers = {memory.id: i for i, memory in enumerate(shown, 1)}
    for edit in edits:
        item = {"event": edit.event}
        if edit.event in ("UPDATE", "DELETE"):
            number = numbers[edit.id]
            item |= {"old_memory": f" {shown[number - 1].text}"} if by_text else {"id": number}
        if edit.event in ("ADD", "UPDATE"):
            item["text"] = f" {edit.text}" if by_text else edit.text
        items.append(item)
    return json.dumps(items, ensure_ascii=False, separators=(",", ":") if by_text else None)


def apply(bank: MemoryBank, edits: Sequence[Edit], speaker: str, time: str) -> list[int]:
    """Carries edits out on a bank (or a fork of it). Returns the ids of the memories written."""
    written = []
    for edit in edits:
        if edit.event == "ADD":
            written.append(bank.add(edit.text, speaker, time))
        elif edit.event == "UPDATE":
            bank.update(edit.id, edit.text, time)
            written.append(edit.id)
        elif edit.event == "DELETE":
            bank.delete(edit.id)
    return written


# ------------------------------------------------------------------------------------------------ facts and cases

def parse_facts(completion: str) -> list[str]:
    """
    The first JSON list of strings, or the empty one, bare or under "facts": '["Jon moved."]' -> ["Jon moved."]. A list
    of anything else is passed over ("as in [1]: ..."); no such list: no facts.
    """
    for found in json_values(completion):
        found = found.get("facts") if isinstance(found, dict) else found
        if isinstance(found, list) and (not found or any(isinstance(text, str) for text in found)):
            texts = [folded(text)[:LONGEST_TEXT] for text in found if isinstance(text, str)]
            return [text for text in texts if text][:MOST_OPERATIONS]
    return []


def facts_of(policy, turns: Sequence[Turn], extract: bool, max_new_tokens: int = 256) -> list[tuple[str, ...]]:
    """
    What each turn says, as facts. `extract`: the base model lists them (LoRA off, greedy, all turns in one call);
    otherwise the turn's own words are its one fact, which suits turns of one plain statement.
    """
    if not extract:
        return [(turn.text,) for turn in turns]
    prompts = [policy.encode(chat(EXTRACTOR, turn_text(turn.speaker, turn.time, turn.text))) for turn in turns]
    with policy.using(None):
        groups = policy.sample(prompts, 1, max_new_tokens, temperature=0) if prompts else []
    return [tuple(parse_facts(group[0].text)) for group in groups]


Facts = dict[tuple[str, str], tuple[str, ...]]  # (dialogue id, turn id) -> facts


def read_facts(policy, dialogues: Sequence[Dialogue], extract: bool, cache: Facts, max_new_tokens: int = 256) -> None:
    """Adds to `cache` the facts of all turns it lacks. They depend on no bank, so all dialogues go in one batch."""
    missing = {(dialogue.id, turn.id): turn for dialogue in dialogues for turn in dialogue.turns
               if (dialogue.id, turn.id) not in cache}
    cache.update(zip(missing, facts_of(policy, list(missing.values()), extract, max_new_tokens), strict=True))


def case_of(bank: MemoryBank, turn: Turn, facts: Sequence[str], top_k: int) -> Case:
    """The facts of a turn beside the `top_k` most related memories of its speaker (Alg. 3: TopK(f_i, M))."""
    scores: dict[Memory, float] = {}
    for fact in facts:
        for memory, score in bank.search_scored(fact, top_k, speaker=turn.speaker):
            scores[memory] = max(score, scores.get(memory, score))
    ranked = sorted(scores, key=lambda memory: (-scores[memory], memory.id))[:top_k]
    return Case(turn.speaker, turn.time, tuple(facts), tuple(ranked))


# ------------------------------------------------------------------------------------------------ building banks

@dataclass
class Built:
    """A bank, and how it came about."""
    bank: MemoryBank
    history: list[tuple[Memory, ...]] = field(default_factory=list)  # the memories before each turn
    decisions: list[tuple[Case, list[Edit] | None]] = field(default_factory=list)  # a model's; None: invalid
    ops: Counter = field(default_factory=Counter)  # by event, and "invalid"
    agreed: int = 0  # turns whose edit was the known one, to the letter
    judged: int = 0  # turns whose right edit is known
    dropped: int = 0  # memories left out of prompts for want of room
    sources: dict[int, set[str]] = field(default_factory=dict)  # memory id -> the turns it was written from


def bank_report(built: Sequence[Built]) -> dict:
    """
    Of some banks: memories in the mean, operations by event, the share of invalid ones among a model's outputs,
    agreement with the known operations (None: none known).
    """
    judged, ops = sum(one.judged for one in built), sum((one.ops for one in built), Counter())
    return {"bank_size": sum(len(one.bank) for one in built) / len(built), "ops": dict(ops),
            "invalid_rate": ops["invalid"] / max(1, sum(len(one.decisions) for one in built)),
            "agreement": sum(one.agreed for one in built) / judged if judged else None}


def known_edits(bank: MemoryBank, turn: Turn) -> list[Edit]:
    """The known operation of a synthetic turn on this bank; NOOP where the bank lacks the entry it names."""
    operation = turn.operation
    assert operation, f"turn {turn.id} has no known operation: only synthetic data has them"
    if operation.event in ("ADD", "NOOP"):
        return [Edit(operation.event, None, operation.text)]
    named = [memory.id for memory in bank if memory.speaker == turn.speaker and memory.text == operation.old_memory]
    return [Edit(operation.event, named[0], operation.text)] if named else [Edit("NOOP")]


def added_edits(turn: Turn, facts: Sequence[str]) -> list[Edit]:
    """Everything is stored: a synthetic turn's fact in the words of the known bank, else the facts as they are."""
    return [Edit("ADD", None, fact[:LONGEST_TEXT]) for fact in ([turn.fact] if turn.fact else facts)]


def same_edit(edits: Sequence[Edit], bank: MemoryBank, operation: Operation) -> bool:
    """Whether the edits, on the bank before them, are the known operation: event, entry and text."""
    if len(edits) != 1 or edits[0].event != operation.event:
        return False
    edit = edits[0]
    old = bank.get(edit.id).text if edit.id is not None else ""
    return (old, edit.text) == (operation.old_memory, operation.text)


def build_banks(policy, dialogues: Sequence[Dialogue], embedder, how: str = "model", adapter: str | None = None,
                top_k: int = 4, extract: bool = True, max_prompt_tokens: int | None = None, max_new_tokens: int = 128,
                keep_history: bool = False, progress: str = "", cache: Facts | None = None) -> list[Built]:
    """
    Reads every dialogue from its first turn and keeps a bank for each, in lockstep: turn i of all dialogues is one
    batch. `how`: "model" (greedy, with `adapter`, None: LoRA off), "oracle" (the known operations), "add-all" or
    "noop". `cache`: facts extracted before; new ones are put there too.
    """
    assert how in ("model", "oracle", "add-all", "noop"), how
    built = [Built(MemoryBank(embedder)) for _ in dialogues]
    cache = {} if cache is None else cache
    if how == "model" or (how == "add-all" and not all(turn.fact for dialogue in dialogues for turn in dialogue.turns)):
        read_facts(policy, dialogues, extract, cache, max_new_tokens)
    facts = [[cache.get((dialogue.id, turn.id), ()) for turn in dialogue.turns] for dialogue in dialogues]
    longest = max((len(dialogue.turns) for dialogue in dialogues), default=0)
    for i in tqdm(range(longest), desc=progress, disable=None if progress else True, leave=False):
        live = [d for d, dialogue in enumerate(dialogues) if i < len(dialogue.turns)]
        edits = {d: [Edit("NOOP")] for d in live}
        if how == "oracle":
            edits = {d: known_edits(built[d].bank, dialogues[d].turns[i]) for d in live}
        elif how == "add-all":
            edits = {d: added_edits(dialogues[d].turns[i], facts[d][i]) for d in live}
        elif how == "model":
            asked = [d for d in live if facts[d][i]]
            cases = [case_of(built[d].bank, dialogues[d].turns[i], facts[d][i], top_k) for d in asked]
            outputs = manage(policy, cases, adapter, max_prompt_tokens, max_new_tokens)
            for d, case, (parsed, dropped) in zip(asked, cases, outputs, strict=True):
                built[d].decisions.append((case, parsed))
                built[d].dropped += dropped
                edits[d] = parsed
        for d in live:
            step_bank(built[d], dialogues[d].turns[i], edits[d], keep_history)
    return built


def manage(policy, cases: Sequence[Case], adapter: str | None, max_prompt_tokens: int | None, max_new_tokens: int):
    """The Manager's greedy edits for a batch of cases: (edits, or None if invalid; memories dropped) for each."""
    fitted = [fit_case(policy, case, max_prompt_tokens) for case in cases]
    with policy.using(adapter):
        groups = policy.sample([ids for ids, _, _ in fitted], 1, max_new_tokens, temperature=0) if fitted else []
    return [(parse(group[0].text, case), dropped) for group, (_, case, dropped) in zip(groups, fitted, strict=True)]


def fit_case(policy, case: Case, max_prompt_tokens: int | None) -> tuple[list[int], Case, int]:
    """A case's prompt as token ids, the case as shown (fewer memories if there was no room), how many were dropped."""
    def with_memories(memories):
        return Case(case.speaker, case.time, case.facts, tuple(memories))

    ids, kept, dropped = fit_prompt(policy, lambda memories: messages(with_memories(memories)), case.memories,
                                    max_prompt_tokens)
    return ids, with_memories(kept), dropped


def step_bank(built: Built, turn: Turn, edits: list[Edit] | None, keep_history: bool) -> None:
    """Carries out the edits of a turn and counts them. None, an invalid output, leaves the bank as it is."""
    if keep_history:
        built.history.append(tuple(built.bank))
    if turn.operation:
        built.judged += 1
        built.agreed += edits is not None and same_edit(edits, built.bank, turn.operation)
    built.ops.update(["invalid"] if edits is None else [edit.event for edit in edits])
    for id in apply(built.bank, edits or [], turn.speaker, turn.time):
        built.sources.setdefault(id, set()).add(turn.id)


# ------------------------------------------------------------------------------------------------ on a terminal

SIGNS = {"ADD": ("+", 32), "UPDATE": ("~", 36), "DELETE": ("-", 31), "NOOP": (".", 0)}  # and ANSI colours
BOLD = 1


def screen(text: str, indent: int = 0, colour: int = 0) -> str:
    """
    Text wrapped to the terminal, without what would control it; coloured if a person looks who has not set NO_COLOR.
    """
    text = "".join(char if char.isprintable() else "?" for char in text)
    text = textwrap.fill(text, max(40, shutil.get_terminal_size().columns), subsequent_indent=" " * indent)
    is_wanted = colour and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[{colour}m{text}\033[0m" if is_wanted else text


def show(edits: Sequence[Edit] | None, bank: MemoryBank) -> None:
    """Prints what edits are going to do to a bank. None: an output that cannot be carried out."""
    if edits is None:
        print("    ! the output cannot be carried out: nothing changes")
    for edit in edits or []:
        sign, colour = SIGNS[edit.event]
        old = "" if edit.id is None else bank[edit.id].text
        print(screen(f"    {sign} {edit.event:6}  {old or edit.text}", 14, colour).rstrip())
        if old and edit.text:
            print(screen(f"           -> {edit.text}", 14, colour))


def show_bank(bank: MemoryBank) -> None:
    """Prints the memories of each speaker as a prompt shows them."""
    print(f"the bank: {len(bank)} {'memory' if len(bank) == 1 else 'memories'}")
    for speaker in dict.fromkeys(memory.speaker for memory in bank):
        print(screen(f"memories of {speaker}:", colour=BOLD))
        for line in memory_lines([memory for memory in bank if memory.speaker == speaker]).split("\n"):
            print(screen(f"  {line}", 4))


def read_turn(policy, bank: MemoryBank, turn: Turn, adapter: str | None, settings: dict) -> None:
    """Lets the Manager read one turn and edit the bank, and prints both. `settings`: of `flags.usual`."""
    facts = facts_of(policy, [turn], settings["extract"], settings["max_new_tokens"])[0]
    edits: list[Edit] | None = [Edit("NOOP")]
    if facts:
        case = case_of(bank, turn, facts, settings["top_k"])
        (edits, _), = manage(policy, [case], adapter, settings["max_prompt_tokens"], settings["max_new_tokens"])
    show(edits, bank)
    apply(bank, edits or [], turn.speaker, turn.time)


def main(argv=None) -> None:
    """Reads a conversation and prints, turn by turn, what the Manager does."""
    from policy import Policy  # here: nothing above needs a model of its own, and flags.py comes after this file
    from support.cli import Parser, usual
    parser = Parser(description="Reads a conversation turn by turn and shows what the Memory Manager does.",
                    epilog="example: python manager.py talk.txt --adapter runs/manager-grpo --out bank.json")
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="a transcript, see data/transcript.py (some synthetic talk)")
    add("--adapter", metavar="DIR", help="a Manager's run or adapter (none: the base model)")
    add("--model", default=str(TINY), help="hub id or folder of a causal language model (data/tiny)")
    add("--out", metavar="BANK", help="keep the bank in this file, for answer.py")
    args = parser.parse_args(argv)
    if args.out and os.path.exists(args.out):
        raise UsageError(f"--out {args.out}: is there already; choose another name, or delete it")
    options = {} if args.file else {"count": 1, "seed": 1}
    dialogue = data.load(args.file or "synthetic", "test", **options)[0]
    policy, bank, session = Policy.load(args.model), MemoryBank(make_embedder("hash")), 0
    if args.adapter:
        policy.load_adapter("manager", args.adapter)
    for turn in dialogue.turns:
        if turn.session != session:
            print("\n" * bool(session), end="")
            session = turn.session
            print(screen(f"session {session}: {turn.time or 'no date'}", colour=BOLD))
        print(screen(f"{turn.speaker}: {turn.text}", 4))
        read_turn(policy, bank, turn, "manager" if args.adapter else None, usual(args.model))
        if args.out:
            bank.save(args.out)
    print()
    show_bank(bank)
    if args.out:
        print(f"\nto ask it: python answer.py {shlex.quote(args.out)} 'Which ...?'")


if __name__ == "__main__":
    from support.cli import exit_cleanly
    exit_cleanly(main, less="the size of --model", go_on="the same command begins anew")
