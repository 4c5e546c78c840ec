"""
The Memory Manager of Memory-R1 (arXiv 2508.19828, Alg. 3): it compares the facts of a turn with the related memories
of the speaker, and edits the memory bank with ADD, UPDATE, DELETE or NOOP. A prompt and its completion:

    memories of Jon:
    1 (8 May 2023) Jon has a dog named Buddy.
    new facts from Jon (3 June 2023):
    - I adopted another dog, Scout.
    operations:      [{"event": "UPDATE", "id": 1, "text": "Jon has a dog named Buddy and Scout."}]

The tiny model names a memory by its text ("old_memory") instead of its number.

Differences from the paper:
1. A completion contains operations for the new facts only. The paper's prompt asks for a list of all memories again.
2. UPDATE and DELETE change one entry, as in the paper's prompt. Its pseudo-code removes all retrieved memories.
As in the authors' code, an operation that cannot be applied is skipped and counted; the others are applied.
"""
import support.installed  # noqa: F401  # isort: skip  names missing packages
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from tqdm import tqdm

import data
from data import TINY, Dialogue, Operation, Turn, UsageError, banks_of, is_tiny
from memory import Memory, MemoryBank, make_embedder
from policy import Policy
from support.cli import Parser, exit_cleanly, model_size
from support.prompts import FACTS_SHOWN, OPERATIONS_SHOWN, date_suffix, fit_prompt, generate, is_copied, memory_lines
from support.text import (
    MAX_OPERATIONS,
    MAX_TEXT_CHARS,
    Parsed,
    chat_messages,
    count_long,
    normalize_whitespace,
    parse_facts,
    read_operations,
    sanitize_for_prompt,
    trigram_similarity,
)

EVENTS = {"ADD": "+", "UPDATE": "~", "DELETE": "-", "NOOP": "."}  # with the sign that a demo prints
MIN_QUOTE_SIMILARITY = 0.6  # lowest similarity between an "old_memory" and the memory that it names


@dataclass(frozen=True)
class Case:
    """Input of the Manager for one turn. `memories`: best match first; the prompt shows the oldest first."""
    speaker: str
    time: str
    facts: tuple[str, ...]
    memories: tuple[Memory, ...]

    def shown(self) -> list[Memory]:  # memory number 1 of the prompt is shown()[0]
        return sorted(self.memories, key=lambda memory: memory.id)


@dataclass(frozen=True)
class Edit:
    """One operation on a bank. `id`: the entry that UPDATE or DELETE changes; `text`: the text of ADD or UPDATE."""
    event: str
    id: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Settings:
    """How the Manager sees a turn. The defaults suit the tiny model and its short synthetic turns."""
    top_k: int = 4  # related memories in a prompt
    extract: bool = False  # the base model lists the facts of a turn; otherwise its text is its only fact
    max_prompt_tokens: int | None = 1024  # longer prompts lose their least similar memories; None: no limit
    max_new_tokens: int = 80  # length limit of a list of operations and of a list of facts


# Prompts of real models, chosen on LoCoMo's train and val conversations (docs/results.md): small models copy an example
# inside an instruction, but follow one that is a turn of the chat. The tiny model's template drops system messages.
SYSTEM = """You keep the memories of a person. You get the stored memories and new facts, and reply with a JSON list \
with one operation for each new fact: ADD a fact that is new; UPDATE the stored memory of that number, if the fact \
belongs to it; DELETE it, if the fact ends it; NOOP if the fact is already stored or is small talk."""
EXTRACTOR = """You turn what a person says into short facts about that person, in the third person. Keep names, \
places, things and times. Reply with a JSON list."""


def case_text(speaker: str, time: str, memories: Sequence[Memory], facts: Sequence[str]) -> str:
    """The user message of a case, as in the example at the top of this file."""
    return "\n".join([sanitize_for_prompt(f"memories of {speaker}:"), memory_lines(memories),
                      sanitize_for_prompt(f"new facts from {speaker}{date_suffix(time)}:"),
                      *(f"- {sanitize_for_prompt(fact)}" for fact in facts), "operations:"])


def turn_text(speaker: str, time: str, text: str) -> str:
    """The user message that asks for the facts of a turn."""
    return f"{sanitize_for_prompt(f'turn of {speaker}{date_suffix(time)}:')}\n{sanitize_for_prompt(text)}\nfacts:"


def messages(case: Case, tiny: bool = False) -> list[dict]:
    text = case_text(case.speaker, case.time, case.shown(), case.facts)
    return chat_messages(SYSTEM, text, () if tiny else OPERATIONS_SHOWN)


def fit_case(policy, case: Case, settings: Settings) -> tuple[list[int], Case, int]:
    """A case as a prompt: (token ids, the case with the memories that the prompt shows, number of memories dropped)."""
    tiny = is_tiny(policy.name)
    ids, kept, dropped = fit_prompt(policy, lambda memories: messages(replace(case, memories=memories), tiny),
                                    case.memories, settings.max_prompt_tokens, settings.max_new_tokens)
    return ids, replace(case, memories=kept), dropped


def find_memory(operation: dict, shown: list[Memory]) -> Memory | None:
    """The memory that an operation names: by its number in the prompt, else the one most similar to its quote."""
    number = re.fullmatch(r"(?i)(?:memory)?[\s#(\[]*(\d{1,5})(?:\.0)?[\s)\]]*", str(operation["id"]))
    quote = operation["old_memory"] or (operation["event"] == "DELETE" and operation["text"])
    if number and 1 <= int(number[1]) <= len(shown):
        return shown[int(number[1]) - 1]
    if not isinstance(quote, str) or not quote.strip() or not shown:
        return None
    quote = sanitize_for_prompt(quote[:2 * MAX_TEXT_CHARS])
    scores = [trigram_similarity(sanitize_for_prompt(memory.text), quote) for memory in shown]
    return shown[scores.index(max(scores))] if max(scores) >= MIN_QUOTE_SIMILARITY else None


def parse_edit(operation: dict, shown: list[Memory]) -> Edit | None:
    """The edit that an operation of `read_operations` describes, its text not yet cut; None if it cannot be applied."""
    event, text = operation["event"], operation["text"]
    text = normalize_whitespace(text) if isinstance(text, str) else ""
    memory = find_memory(operation, shown) if event in ("UPDATE", "DELETE") else None
    if event == "NOOP" or event == "DELETE" and memory:
        return Edit(event, memory and memory.id)
    return Edit(event, memory and memory.id, text) if text and (event == "ADD" or memory) else None


def parse(completion: str, case: Case) -> Parsed | None:
    """
    The edits of a completion, or None if none can be applied. '[{"event": "NOOP"}]' or '[]' -> [Edit("NOOP")]
    Skipped: what cannot be applied, copied examples, a second edit of a memory, all after the first MAX_OPERATIONS.
    """
    operations = read_operations(completion)
    known = " ".join([case.speaker, *case.facts, *(memory.text for memory in case.memories)])
    edits = {}  # by the memory's id, or for ADD and NOOP by their place
    for i, operation in enumerate(operations[:MAX_OPERATIONS]):
        edit = parse_edit(operation, case.shown())
        if edit and not is_copied(edit.text, known):
            edits.setdefault(("new", i) if edit.id is None else edit.id, edit)
    texts = [edit.text for edit in edits.values()]
    edits = [replace(edit, text=edit.text[:MAX_TEXT_CHARS].strip()) for edit in edits.values()]
    return Parsed(edits, len(operations) - len(edits), count_long(texts)) if edits else None


def format_edits(edits: Sequence[Edit], case: Case, by_text: bool = False) -> str:
    """Edits as a completion, the inverse of `parse`. `by_text`: for the tiny model, which quotes old memories."""
    shown = {memory.id: (i, memory.text) for i, memory in enumerate(case.shown(), 1)}
    space = " " if by_text else ""  # for the tiny model: after a space, a word always consists of the same tokens
    operations = [{"event": edit.event} for edit in edits]
    for edit, operation in zip(edits, operations, strict=True):
        if edit.event in ("UPDATE", "DELETE"):
            number, text = shown[edit.id]
            operation |= {"old_memory": space + text} if by_text else {"id": number}
        if edit.event in ("ADD", "UPDATE"):
            operation["text"] = space + edit.text
    return json.dumps(operations, ensure_ascii=False, separators=(",", ":") if by_text else None)


def apply_edits(bank: MemoryBank, edits: Sequence[Edit], speaker: str, time: str) -> list[int]:
    """Apply edits to a bank; return the ids of the memories that were written."""
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


def make_case(bank: MemoryBank, turn: Turn, facts: Sequence[str], top_k: int) -> Case:
    """The facts of a turn with the `top_k` memories of its speaker that are most related to any of them."""
    scores: dict[Memory, float] = {}
    for fact in facts:
        for memory, score in bank.search_scored(fact, top_k, speaker=banks_of([turn.speaker])[0]):
            scores[memory] = max(score, scores.get(memory, score))
    ranked = sorted(scores, key=lambda memory: (-scores[memory], memory.id))[:top_k]
    return Case(turn.speaker, turn.time, tuple(facts), tuple(ranked))


@dataclass
class Manager:
    """A model that builds memory banks."""
    policy: Policy  # or a hosted model with the same methods: support.endpoint.Endpoint
    adapter: str | None = None  # None: the base model, LoRA off
    settings: Settings = Settings()
    facts: dict[tuple[str, str], Parsed] = field(default_factory=dict)  # {(dialogue id, turn id): facts}

    def extract(self, turns: Sequence[Turn]) -> list[Parsed]:
        """The facts of each turn (LLMExtract in Alg. 3), in one batch of the base model; see Settings.extract."""
        if not self.settings.extract:
            return [Parsed([turn.text]) for turn in turns]
        shown = () if is_tiny(self.policy.name) else FACTS_SHOWN
        limit, max_tokens = self.settings.max_new_tokens, self.settings.max_prompt_tokens
        fitted = [fit_prompt(
            self.policy, lambda words, turn=turn: chat_messages(
                EXTRACTOR, turn_text(turn.speaker, turn.time, " ".join(words)), shown),
            turn.text.split(), max_tokens, limit) for turn in turns]  # a turn that is too long keeps its first words
        replies = map(parse_facts, generate(self.policy, None, [ids for ids, _, _ in fitted], limit))
        read = []
        for turn, (_, _, dropped), facts in zip(turns, fitted, replies, strict=True):
            own = [fact for fact in facts if not is_copied(fact, f"{turn.speaker} {turn.text}")]
            skipped = facts.skipped + len(facts) - len(own)
            read.append(Parsed(dict.fromkeys(own), skipped, facts.cut + (dropped > 0)))  # each fact once
        return read

    def read_facts(self, dialogues: Sequence[Dialogue]) -> None:
        """Extract the facts that are not in the cache. They do not depend on a bank, so all turns form one batch."""
        missing = {(dialogue.id, turn.id): turn for dialogue in dialogues for turn in dialogue.turns
                   if (dialogue.id, turn.id) not in self.facts}
        self.facts.update(zip(missing, self.extract(list(missing.values())), strict=True))

    def sample_edits(self, cases: Sequence[Case], temperature=0) -> list[tuple]:
        """
        For each case: (edits or None if invalid, the case with the memories that the prompt shows, prompt, completion),
        by default greedy. A case without facts has the edit NOOP, and no prompt.
        """
        fitted = [fit_case(self.policy, case, self.settings) for case in cases if case.facts]
        with self.policy.using(self.adapter):
            groups = self.policy.sample([ids for ids, _, _ in fitted], 1, self.settings.max_new_tokens,
                                        temperature=temperature) if fitted else []
        outputs = iter([(parse(completion.text, case), case, ids, completion)
                        for [completion], (ids, case, _) in zip(groups, fitted, strict=True)])
        return [next(outputs) if case.facts else (Parsed([Edit("NOOP")]), case, None, None) for case in cases]


@dataclass
class BankBuild:
    """A bank and the record of how it was built."""
    bank: MemoryBank
    ops: Counter = field(default_factory=Counter)  # edits by event, and what was lost: see `bank_report`
    num_matching: int = 0  # turns whose edit equals the reference operation
    num_labeled: int = 0  # turns that have a reference operation
    sources: dict[int, set[str]] = field(default_factory=dict)  # memory id -> ids of the turns that wrote it
    edits: list[list[Edit] | None] = field(default_factory=list)  # per turn; None if its output was invalid
    outputs: list[tuple] = field(default_factory=list)  # per turn: (case, prompt, Completion); see `sample_edits`
    history: list[list[Memory]] = field(default_factory=list)  # memories before each turn, if outputs were sampled

    @property
    def decisions(self) -> list[tuple[Case, list[Edit] | None]]:
        """(case, edits) of each completion."""
        return [(case, edits) for (case, *_), edits in zip(self.outputs, self.edits, strict=False) if case.facts]


def bank_report(builds: Sequence[BankBuild]) -> dict:
    """
    Return mean bank size, counts of edits by event, invalid rate, and agreement with the reference (None without one).
    `ops` also counts losses: invalid completions, skipped operations, unread facts, cut texts.
    """
    ops, num_labeled = sum((build.ops for build in builds), Counter()), sum(build.num_labeled for build in builds)
    return {"bank_size": sum(len(build.bank) for build in builds) / len(builds), "ops": dict(ops),
            "invalid_rate": ops["invalid"] / max(1, sum(len(build.decisions) for build in builds)),
            "unread_facts": ops["unread_facts"], "cut_texts": ops["cut_texts"],
            "agreement": sum(build.num_matching for build in builds) / num_labeled if num_labeled else None}


def build_in_lockstep(dialogues: Sequence[Dialogue], embedder, decide: Callable, progress=""):
    """Build all banks in parallel. For turn i of all, decide([(build, dialogue, turn), ...]) returns edits or None."""
    builds = [BankBuild(MemoryBank(embedder)) for _ in dialogues]
    columns = list(zip_longest(*(dialogue.turns for dialogue in dialogues)))  # turn i of each, None after its last
    for turns in tqdm(columns, desc=progress, disable=None if progress else True, leave=False):
        batch = [step for step in zip(builds, dialogues, turns, strict=True) if step[2]]
        for (build, _, turn), edits in zip(batch, decide(batch), strict=True):
            if turn.operation:
                named = [Operation(edit.event, "" if edit.id is None else build.bank[edit.id].text, edit.text)
                         for edit in edits or []]
                build.num_labeled += 1
                build.num_matching += named == [turn.operation]
            build.edits.append(edits)
            build.ops.update(["invalid"] if edits is None else [edit.event for edit in edits])
            for id in apply_edits(build.bank, edits or [], turn.speaker, turn.time):
                build.sources.setdefault(id, set()).add(turn.id)
    return builds


def build_banks(manager: Manager, dialogues, embedder, progress="", temperature=0) -> list[BankBuild]:
    """
    Alg. 3 for each dialogue: M = {}; for each turn t: f = LLMExtract(t), o = Manager(f, TopK(f, M)), M = o(M).
    With a temperature above 0 the outputs are sampled: each build is a trajectory, and records its outputs.
    """
    def decide(batch):
        cases = [make_case(build.bank, turn, manager.facts[dialogue.id, turn.id], manager.settings.top_k)
                 for build, dialogue, turn in batch]
        predicted = manager.sample_edits(cases, temperature)
        for (build, dialogue, turn), (edits, *output) in zip(batch, predicted, strict=True):
            if temperature:
                build.history.append(list(build.bank))
            facts, edited = manager.facts[dialogue.id, turn.id], edits or Parsed()
            build.ops += Counter(unread_facts=facts.skipped, skipped=edited.skipped, cut_texts=facts.cut + edited.cut)
            build.outputs.append(tuple(output))
        return [edits for edits, *_ in predicted]

    manager.read_facts(dialogues)
    return build_in_lockstep(dialogues, embedder, decide, progress)


def oracle_edits(bank: MemoryBank, turn: Turn) -> list[Edit]:
    """The reference operation, or NOOP if the bank lacks the entry that it names; in LoCoMo, ADD each observation."""
    operation = turn.operation
    if not operation:
        return [Edit("ADD", None, text[:MAX_TEXT_CHARS]) for text in turn.observations] or [Edit("NOOP")]
    if operation.event in ("ADD", "NOOP"):
        return [Edit(operation.event, None, operation.text)]
    ids = [memory.id for memory in bank if (memory.speaker, memory.text) == (turn.speaker, operation.old_memory)]
    return [Edit(operation.event, ids[0], operation.text) if ids else Edit("NOOP")]


def oracle_banks(dialogues: Sequence[Dialogue], embedder, manager: Manager | None = None) -> list[BankBuild]:
    """Banks built with the reference operations. With a Manager that has read the facts, its cases are recorded."""
    def decide(batch):
        for build, dialogue, turn in batch if manager else ():
            case = make_case(build.bank, turn, manager.facts[dialogue.id, turn.id], manager.settings.top_k)
            build.outputs.append((case, None, None))
        return [oracle_edits(build.bank, turn) for build, _, turn in batch]
    return build_in_lockstep(dialogues, embedder, decide)


def add_all_banks(dialogues: Sequence[Dialogue], embedder, facts: dict | None = None) -> list[BankBuild]:
    """Baseline: store every turn, as the fact of synthetic data, else the `facts` of a Manager, else the text."""
    def decide(batch):
        stored = [Parsed([turn.fact]) if turn.fact else (facts or {}).get((dialogue.id, turn.id), Parsed([turn.text]))
                  for _, dialogue, turn in batch]
        for (build, _, _), texts in zip(batch, stored, strict=True):
            build.ops += Counter(unread_facts=texts.skipped, cut_texts=texts.cut + count_long(texts))
        return [[Edit("ADD", None, text[:MAX_TEXT_CHARS]) for text in texts] for texts in stored]
    return build_in_lockstep(dialogues, embedder, decide)


def turn_banks(dialogues: Sequence[Dialogue], embedder) -> list[BankBuild]:
    """Baseline: banks of the raw turns, each with its speaker's name, as in retrieval-augmented generation."""
    def decide(batch):
        texts = [f"{turn.speaker}: {turn.text}" for _, _, turn in batch]
        embedder.embed(texts)  # in one call; `add` then finds the vectors in the cache
        return [[Edit("ADD", None, text)] for text in texts]
    return build_in_lockstep(dialogues, embedder, decide)


def noop_banks(dialogues: Sequence[Dialogue], embedder) -> list[BankBuild]:
    """Baseline: banks that stay empty."""
    return build_in_lockstep(dialogues, embedder, lambda batch: [[Edit("NOOP")] for _ in batch])


def print_safely(text: str) -> None:
    """Print a text of a model or a file, with "?" in place of control characters."""
    print("".join(char if char.isprintable() else "?" for char in text))


def load_manager(model: str, adapter: str | None) -> Manager:
    policy = Policy.load(model)
    if adapter:
        policy.load_adapter("manager", adapter)
    real = Settings(10, model_size(model) == "large", max_prompt_tokens=4096, max_new_tokens=512)
    return Manager(policy, adapter and "manager", Settings() if is_tiny(model) else real)


def read_turn(manager: Manager, bank: MemoryBank, turn: Turn) -> None:
    """Let the Manager read a turn: print its edits and apply them to the bank."""
    case = make_case(bank, turn, manager.extract([turn])[0], manager.settings.top_k)
    edits, *_ = manager.sample_edits([case])[0]
    if edits is None:
        return print("    ! the output cannot be carried out: nothing changes")
    for edit in edits:
        texts = [edit.text] if edit.id is None else [bank[edit.id].text, edit.text]
        print_safely(f"    {EVENTS[edit.event]} {edit.event:6}  {' -> '.join(filter(None, texts))}".rstrip())
    apply_edits(bank, edits, turn.speaker, turn.time)


def main(argv=None) -> None:
    parser = Parser(description="Reads a conversation turn by turn and prints the Memory Manager's edits.",
                    epilog="example: python manager.py talk.txt --adapter runs/manager-grpo --out bank.json")
    parser.add_argument("file", nargs="?", default="synthetic", help="see data/transcript.py (a synthetic dialogue)")
    parser.add_argument("--adapter", metavar="DIR", help="a Manager's run or adapter (none: the base model)")
    parser.add_argument("--model", default=str(TINY), help="hub id, folder or .gguf file of a causal model (data/tiny)")
    parser.add_argument("--out", metavar="BANK", help="save the bank to this file, for answer.py")
    args = parser.parse_args(argv)
    if args.out and Path(args.out).exists():
        raise UsageError(f"--out {args.out}: already exists; choose another name, or delete it")
    manager, bank = load_manager(args.model, args.adapter), MemoryBank(make_embedder("hash"))
    for turn in data.load(args.file, "test")[0].turns:
        print_safely(f"{turn.speaker}{date_suffix(turn.time)}: {turn.text}")
        read_turn(manager, bank, turn)
        if args.out:
            bank.save(args.out)


if __name__ == "__main__":
    exit_cleanly(main, less="the size of --model", resume_hint="to start again: the same command")
