"""
A synthetic world: two people talk about their lives, and the correct edit of the memory bank is known for every turn.

A turn states a new fact, adds a second value ("another dog, Scout"), changes a value, takes it back, repeats it, tells
about somebody else ("my cousin drives a Kia"), is small talk, or reports a dated event. `world.json` holds attributes,
phrasings, and pools of names and values. Each pool is divided among four splits, so the words of `train`, `val` and
`test` are not those the tiny model was pretrained on; `pseudo` draws made-up words. The last phrasing of each list is
used by no split unless `load(..., phrasing="unseen")` asks for it.

    Jon, D1:1: I have a dog named Buddy.        ADD    "Jon has a dog named Buddy."
    Jon, D2:3: I adopted another dog, Scout.    UPDATE "Jon has a dog named Buddy and Scout."
    Jon, D2:5: My cousin drives a Kia car.      NOOP

Questions follow every turn (`Question.asked_after`: they test the edit of that turn) and the last turn (`asked_after`
is None: they test the whole bank). Categories as in LoCoMo: 1 several turns, 2 dates, 3 open, 4 one turn.
"""
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from data.dialogue import Dialogue, Operation, Question, Turn, UsageError

WORLD = json.loads((Path(__file__).parent / "world.json").read_text())
ATTRIBUTES, EVENTS, CHAT = WORLD["attributes"], WORLD["events"], WORLD["chat"]
TOPICS = ATTRIBUTES | EVENTS
FRAMES = WORLD["frames"] | {"event": WORLD["frames"]["new"][:1] + WORLD["frames"]["new"]}
SPLITS = ("pretrain", "train", "val", "test")
KINDS = {"new": 3.0, "more": 3.0, "change": 2.0, "drop": 1.3, "repeat": 1.6, "wish": 2.0, "talk": 1.0,
         "chat": 0.8, "event": 1.5, "echo": 0.8}  # kinds of turns and their relative frequencies
PAIR_FRAMES = ["Tell me {a} and {b}.", "I want to know {a} and {b}.", "Can you say {a} and also {b}?",
               "Please recall for me {a} and {b}."]
SYLLABLES = ("b d f g k l m n p r s t v z br dr gr kr st tr sh ch th".split(), "a e i o u ee ai ou".split(),
             " n r s l th x ck m nd rt".split(" "))
CAPITAL = {"person", "city", "car", "pet", "language"}  # pools of proper names


@dataclass(frozen=True)
class Entry:
    """A memory of the reference bank with its meaning. `text` is the text in the bank."""
    speaker: str
    attribute: str
    values: tuple[str, ...]
    text: str
    turns: tuple[str, ...] = ()  # ids of the turns that it is based on
    time: str = ""
    true: bool = True  # False: a memory that should not be in the bank (a wish, somebody else's value)


class Utterance(NamedTuple):
    text: str
    fact: str  # the memory that storing every turn would add
    event: str
    old: Entry | None  # the entry that the event changes
    new: Entry | None  # the entry that the event writes
    attribute: str  # the topic to ask about
    value: str | None


def deal_words() -> dict[str, dict[str, list[str]]]:
    """
    Divide every pool among the splits: {split: {pool: values}}. A value in two pools stays in one split. A value that
    shares a word with an earlier split is left out: if "milk" belongs to another split, "almond milk" is not used.
    """
    home, dealt = {}, {split: {pool: [] for pool in WORLD["pools"]} for split in SPLITS}
    for pool, values in WORLD["pools"].items():
        values = values.split() if pool == "person" else values.split(",")
        for i, value in enumerate(sorted(values, key=lambda value: crc32(value.encode()))):
            split = home.setdefault(value.lower(), SPLITS[i % len(SPLITS)])
            dealt[split][pool].append(value)
    owner: dict[str, str] = {}  # word -> split
    for split, pools in dealt.items():
        for pool, values in pools.items():
            pools[pool] = [value for value in values
                           if all(owner.get(word, split) == split for word in value.lower().split())]
            owner |= {word: split for value in pools[pool] for word in value.lower().split()}
    return dealt


WORDS = deal_words()


def pseudo_word(rng: random.Random, capital: bool) -> str:
    """Return a made-up word of one to three syllables: 'Braistoun'."""
    onset, vowel, end = SYLLABLES
    word = "".join(rng.choice(onset) + rng.choice(vowel) for _ in range(rng.choice((1, 2, 2, 2, 3)))) + rng.choice(end)
    return word.capitalize() if capital else word


def drawer(split: str) -> Callable[[random.Random, str], str]:
    """Return the function that draws a word of this split from a pool."""
    if split == "pseudo":
        return lambda rng, pool: pseudo_word(rng, pool in CAPITAL)
    return lambda rng, pool: rng.choice(WORDS[split][pool])


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def joined(values) -> str:
    return " and ".join(values)


def memory_text(person: str, attribute: str, values) -> str:
    return TOPICS[attribute]["memory"].format(p=person, v=joined(values))


def values_read(entry: Entry, speaker: str, attributes, value: str | None = None) -> tuple[str, ...]:
    """Return the part of the answer that an entry contributes: its values, the date of an event, or nothing."""
    if entry.speaker != speaker or entry.attribute not in attributes or value not in (None, *entry.values):
        return ()
    return (entry.time,) if entry.attribute in EVENTS else entry.values


def read(entries: list[Entry], speaker: str, attributes, value: str | None = None) -> str:
    """
    Return the answer of a reader who believes every entry, in the order of the entries.
    read([Jon has a dog named Buddy., Jon has a dog named Scout.], "Jon", ["dog"]) -> "Buddy and Scout"
    """
    return joined(word for entry in entries for word in values_read(entry, speaker, attributes, value)) or "none"


class World:
    """The state of a conversation while it is generated: its speakers, the reference bank, the words in use."""

    def __init__(self, rng: random.Random, draw, phrasing: str = "seen"):
        self.rng, self.draw, self.phrasing = rng, draw, phrasing
        self.taken: set[str] = set()
        self.speakers = (self.word("person"), self.word("person"))
        self.bank: list[Entry] = []  # the reference bank, oldest entry first
        self.gone: dict[tuple[str, str], str] = {}  # (speaker, attribute) -> id of the turn that took the value back

    def word(self, pool: str) -> str:
        """Draw an unused word; after 40 failures, two words joined."""
        for attempt in range(60):
            word = " ".join(self.draw(self.rng, pool) for _ in range(1 if attempt < 40 else 2))
            if word not in self.taken:
                self.taken.add(word)
                return word
        raise ValueError(f"no unused word in pool {pool}")

    def choose(self, options: list):
        """Choose a phrasing; the last one is the unseen one."""
        return options[-1] if self.phrasing == "unseen" else self.rng.choice(options[:-1])

    def known(self, speaker: str, topics=ATTRIBUTES) -> list[Entry]:
        """Return the true entries of a speaker about these topics."""
        return [entry for entry in self.bank if entry.speaker == speaker and entry.true and entry.attribute in topics]

    def subjects(self, speaker: str, kind: str) -> list[Entry]:
        """Return the entries that a turn of this kind can refer to."""
        if kind == "echo":
            return self.known(speaker, EVENTS)
        if kind in ("talk", "chat"):
            return self.known(speaker)
        if kind == "change":
            return [entry for entry in self.known(speaker) if "change" in ATTRIBUTES[entry.attribute]]
        single = [entry for entry in self.known(speaker) if len(entry.values) == 1]
        if kind == "repeat":
            return single
        return [entry for entry in single if ATTRIBUTES[entry.attribute].get("many" if kind == "more" else "drop")]

    def turn(self, speaker: str, turn_id: str, time: str, kind: str) -> Utterance | None:
        """Generate a turn of this kind. None if the conversation so far does not allow it."""
        known_names = [entry.attribute for entry in self.known(speaker)]
        missing_names = [name for name in ATTRIBUTES if name not in known_names]
        if kind == "wish":
            return self.wish(speaker, known_names, missing_names)
        if kind in ("new", "event"):
            old, options = None, list(EVENTS) if kind == "event" else missing_names
            name = self.rng.choice(options) if options else None
        else:
            subjects = self.subjects(speaker, kind)
            old = self.rng.choice(subjects) if subjects else None
            name = old.attribute if old else None
        if name is None:
            return None
        if kind in ("talk", "chat"):
            text = self.choose(CHAT if kind == "chat" else TOPICS[name]["talk"])
            return Utterance(text, f"{speaker} said: {text}", "NOOP", None, None, name, None)
        value = old.values[0] if kind in ("repeat", "echo", "drop") else self.word(TOPICS[name]["pool"])
        text, fact = self.sentence(kind, TOPICS[name], value), memory_text(speaker, name, [value])
        if kind in ("repeat", "echo"):
            return Utterance(text, fact, "NOOP", None, None, name, value)
        if kind == "drop":
            return Utterance(text, f"No longer: {old.text}", "DELETE", old, None, name, value)
        values, turns = (value,), (turn_id,)
        if kind == "more":
            values, turns = old.values + values, old.turns + turns
        new = Entry(speaker, name, values, memory_text(speaker, name, values), turns, time)
        return Utterance(text, fact, "UPDATE" if old else "ADD", old, new, name, value)

    def sentence(self, kind: str, topic: dict, value: str) -> str:
        """Return a phrasing of the topic for this kind of turn, or a plain statement in a general frame."""
        own = topic.get("repeat" if kind == "echo" else kind)
        if own and (kind in ("more", "drop", "echo") or self.rng.random() < 0.6):
            return self.choose(own).format(v=value)
        said = self.choose(topic["say"]).format(v=value)
        return upper_first(self.choose(FRAMES[kind]).format(s=said, S=upper_first(said)))

    def wish(self, speaker: str, known_names: list[str], missing_names: list[str]) -> Utterance:
        """Generate a turn about a dream or somebody else: nothing to store, although it has a topic and a value."""
        if self.rng.random() < 0.15:
            names = list(EVENTS)
        elif known_names and self.rng.random() < 0.7:
            names = known_names
        else:
            names = missing_names or list(ATTRIBUTES)
        name = self.rng.choice(names)
        value = self.word(TOPICS[name]["pool"])
        text, fact = self.choose(TOPICS[name]["wish"])
        return Utterance(text.format(v=value), fact.format(p=speaker, v=value), "NOOP", None, None, name, value)

    def apply(self, turn_id: str, event: str, old: Entry | None, new: Entry | None) -> None:
        if event == "ADD":
            self.bank = [*self.bank, new]
        elif event == "UPDATE":
            self.bank = [new if entry is old else entry for entry in self.bank]
        elif event == "DELETE":
            self.bank = [entry for entry in self.bank if entry is not old]
            self.gone[old.speaker, old.attribute] = turn_id

    def question(self, speaker: str, names: list[str], value: str | None, asked_after: str | None, number: int):
        """Return a question about one or two attributes of a speaker, or about the date of one event."""
        first = names[0]
        held = [entry for entry in self.bank if entry.speaker == speaker and entry.attribute in names
                and (first in ATTRIBUTES or value in entry.values)]
        evidence = tuple(dict.fromkeys(turn for entry in held for turn in entry.turns))
        evidence = evidence or tuple(self.gone[speaker, name] for name in names if (speaker, name) in self.gone)
        if first in EVENTS:
            category, text = 2, self.choose(EVENTS[first]["ask"]).format(p=speaker, v=value)
        elif len(names) == 2:
            a, b = (ATTRIBUTES[name]["part"].format(p=speaker) for name in names)
            category, text = 1, self.choose(PAIR_FRAMES).format(a=a, b=b)
        elif "open" in ATTRIBUTES[first] and self.rng.random() < 0.3:
            category, text = 3, self.choose(ATTRIBUTES[first]["open"]).format(p=speaker)
        else:
            category = 1 if len(evidence) > 1 else 4
            text = self.choose(ATTRIBUTES[first]["ask"]).format(p=speaker)
        answer = read(self.bank, speaker, names, value if first in EVENTS else None)
        return Question(f"Q{number}", text, answer, category, evidence, asked_after)

    def turn_questions(self, turn: Turn, name: str, value: str | None, start: int) -> list[Question]:
        """Return the questions that test the edit of one turn: about its topic, and about another one (or both)."""
        questions = [self.question(turn.speaker, [name], value, turn.id, start)]
        others = [entry.attribute for entry in self.known(turn.speaker) if entry.attribute != name]
        if others:
            pair = [self.rng.choice(others)] + ([name] if name in ATTRIBUTES else [])
            self.rng.shuffle(pair)
            questions.append(self.question(turn.speaker, pair, None, turn.id, start + 1))
        return questions

    def final_questions(self, topics: set, start: int) -> list[Question]:
        """Return one question about each (speaker, attribute or event) mentioned, and about pairs of attributes."""
        asked = [(speaker, [name], value) for speaker, name, value in sorted(topics, key=str)]
        questions = [self.question(*topic, None, start + i) for i, topic in enumerate(asked)]
        for speaker in self.speakers:
            names = [entry.attribute for entry in self.known(speaker)]
            self.rng.shuffle(names)
            for pair in zip(names[::2], names[1::2], strict=False):
                questions.append(self.question(speaker, list(pair), None, None, start + len(questions)))
        return questions


def make_dialogue(rng: random.Random, draw, name: str, num_turns: int = 20, phrasing: str = "seen") -> Dialogue:
    """Generate a conversation of `num_turns` turns in sessions of five; the speakers alternate."""
    world = World(rng, draw, phrasing)
    day = date(2022, 1, 1) + timedelta(days=rng.randrange(700))
    turns, questions, topics = [], [], set()
    while len(turns) < num_turns:
        i = len(turns)
        if i % 5 == 0:
            day += timedelta(days=rng.randint(2, 40))
        speaker, turn_id = world.speakers[i % 2], f"D{i // 5 + 1}:{i % 5 + 1}"
        time = f"{day.day} {day:%B} {day.year}"
        kind = "new" if i < 4 else rng.choices(list(KINDS), list(KINDS.values()))[0]
        said = world.turn(speaker, turn_id, time, kind)
        if said is None:
            continue
        text, fact, event, old, new, attribute, value = said
        if rng.random() < 0.15 and kind != "chat":
            text = f"{world.choose(CHAT)} {text}"
        operation = Operation(event, old.text if old else "", new.text if new else "")
        turns.append(Turn(turn_id, i // 5 + 1, speaker, text, time, fact, operation))
        world.apply(turn_id, event, old, new)
        questions += world.turn_questions(turns[-1], attribute, value, len(questions))
        if kind not in ("talk", "chat"):
            topics.add((speaker, attribute, value if attribute in EVENTS else None))
    questions += world.final_questions(topics, len(questions))
    return Dialogue(name, world.speakers, tuple(turns), tuple(questions))


def load(split: str = "train", count: int = 32, seed: int = 0, num_turns: int = 20,
         phrasing: str = "seen") -> list[Dialogue]:
    """Generate `count` conversations of a split (also: pseudo). The same arguments give the same conversations."""
    if split not in (*SPLITS, "pseudo"):
        raise UsageError(f"synthetic data has no split {split!r}: choose one of {', '.join(SPLITS)}, pseudo")
    rng = random.Random(f"{split} {seed} {phrasing}")
    draw, length = drawer(split), "" if num_turns == 20 else f"-{num_turns}"  # conversations of other lengths differ
    names = [f"{split}-{phrasing}-{seed}{length}-{i}" for i in range(count)]
    return [make_dialogue(rng, draw, name, num_turns, phrasing) for name in names]
