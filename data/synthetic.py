"""
A synthetic world: two people talk about their lives, and the right edit of a memory bank is known for every turn.

A turn states something new, adds a value beside an old one ("another dog, Scout"), changes a value, takes one
back, repeats one, tells of somebody else's ("my cousin drives a Kia"), chats, or reports a dated event.
`world.json` holds the attributes, their phrasings and the pools of names and values. Every pool is dealt out to
four splits, so the words of `train`, `val` and `test` are not those the tiny model was pretrained on; `pseudo`
draws made-up words. The last phrasing of every list is kept from all of them: `load(..., phrasing="unseen")`.

    Jon, D1:1: I have a dog named Buddy.        ADD    "Jon has a dog named Buddy."
    Jon, D2:3: I adopted another dog, Scout.    UPDATE "Jon has a dog named Buddy and Scout."
    Jon, D2:5: My cousin drives a Kia car.      NOOP

Questions are asked after every turn (`Question.asked`: they judge that turn's edit) and at the end (`asked` is
None: they judge the whole bank). Categories carry LoCoMo's numbers: 1 several turns, 2 dates, 3 open, 4 one turn.
"""
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from zlib import crc32

from data import Dialogue, Operation, Question, Turn, UsageError

WORLD = json.loads((Path(__file__).parent / "world.json").read_text())
ATTRIBUTES, EVENTS, FRAMES, CHAT = (WORLD[key] for key in ("attributes", "events", "frames", "chat"))
SPLITS = ("pretrain", "train", "val", "test")
# How often a turn is of each kind.
KINDS = {"new": 3.0, "more": 3.0, "change": 2.0, "drop": 1.3, "repeat": 1.6, "wish": 2.0, "talk": 1.0,
         "chat": 0.8, "event": 1.5, "echo": 0.8}
PAIR_FRAMES = ["Tell me {a} and {b}.", "I want to know {a} and {b}.", "Can you say {a} and also {b}?",
               "Please recall for me {a} and {b}."]
SYLLABLES = ("b d f g k l m n p r s t v z br dr gr kr st tr sh ch th".split(), "a e i o u ee ai ou".split(),
             " n r s l th x ck m nd rt".split(" "))


@dataclass(frozen=True)
class Entry:
    """A memory of the known bank, with what it says. `text` is what the bank holds."""
    speaker: str
    attribute: str
    values: tuple[str, ...]
    text: str
    turns: tuple[str, ...] = ()  # the turns it rests on
    time: str = ""
    true: bool = True  # False: a line that should not have been kept (a wish, somebody else's)


def deal_words() -> dict[str, dict[str, list[str]]]:
    """
    Deals every pool out to the four splits: {split: {pool: values}}. A value in two pools stays in one split, and one
    that shares a word with an earlier split is left out: where "milk" is another's, so is "almond milk".
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
CAPITAL = {"person", "city", "car", "pet", "language"}  # pools of proper names


def pseudo_word(rng: random.Random, capital: bool) -> str:
    """A made-up word of one to three syllables: 'Braistoun'."""
    onset, vowel, end = SYLLABLES
    word = "".join(rng.choice(onset) + rng.choice(vowel) for _ in range(rng.choice((1, 2, 2, 2, 3)))) + rng.choice(end)
    return word.capitalize() if capital else word


def drawer(split: str) -> Callable[[random.Random, str], str]:
    """How a world of this split draws a word from a pool."""
    if split == "pseudo":
        return lambda rng, pool: pseudo_word(rng, pool in CAPITAL)
    return lambda rng, pool: rng.choice(WORDS[split][pool])


def fresh(rng: random.Random, draw, pool: str, taken) -> str:
    """A word that is not `taken` yet; two words glued where the pool has run dry."""
    for attempt in range(60):
        word = draw(rng, pool) if attempt < 40 else f"{draw(rng, pool)} {draw(rng, pool)}"
        if word not in taken:
            return word
    raise ValueError(f"no free word in pool {pool}")


def phrase(rng: random.Random, options: list, phrasing: str):
    """One of a list of phrasings; the last is the unseen one."""
    return options[-1] if phrasing == "unseen" else rng.choice(options[:-1])


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def joined(values) -> str:
    return " and ".join(values)


def memory_text(person: str, attribute: str, values) -> str:
    spec = ATTRIBUTES.get(attribute) or EVENTS[attribute]
    return spec["memory"].format(p=person, v=joined(values))


def values_read(entry: Entry, speaker: str, attributes, value: str | None = None) -> tuple[str, ...]:
    """What a reader who believes every line takes from this one: its values, the date of an event, or nothing."""
    if entry.speaker != speaker or entry.attribute not in attributes or value not in (None, *entry.values):
        return ()
    return (entry.time,) if entry.attribute in EVENTS else entry.values


def read(entries: list[Entry], speaker: str, attributes, value: str | None = None) -> str:
    """
    The answer over all lines, in their order.
    read([Jon has a dog named Buddy., Jon has a dog named Scout.], "Jon", ["dog"]) -> "Buddy and Scout"
    """
    return joined(word for entry in entries for word in values_read(entry, speaker, attributes, value)) or "none"


class World:
    """The state of one conversation while it is made: who speaks, what is known, which words are taken."""

    def __init__(self, rng: random.Random, draw, phrasing: str = "seen"):
        self.rng, self.draw, self.phrasing = rng, draw, phrasing
        self.taken: set[str] = set()
        self.speakers = (self.word("person"), self.word("person"))
        self.bank: list[Entry] = []  # the known bank, oldest first
        self.gone: dict[tuple[str, str], str] = {}  # (speaker, attribute) -> the turn that took the value back

    def word(self, pool: str) -> str:
        word = fresh(self.rng, self.draw, pool, self.taken)
        self.taken.add(word)
        return word

    def choose(self, options: list):
        return phrase(self.rng, options, self.phrasing)

    def known(self, speaker: str, test=lambda spec, entry: True) -> list[Entry]:
        """This speaker's entries about attributes (no events) that pass the test."""
        return [entry for entry in self.bank if entry.speaker == speaker and entry.true
                and entry.attribute in ATTRIBUTES and test(ATTRIBUTES[entry.attribute], entry)]

    def turn(self, speaker: str, turn_id: str, time: str, kind: str):
        """
        What a turn of this kind says and does: (text, the memory a naive keeper would store, event, old entry, new
        entry, attribute asked about, value asked about), or None where the conversation so far does not allow it.
        """
        rng = self.rng
        mine = self.known(speaker)
        lacking = [name for name in ATTRIBUTES if name not in {entry.attribute for entry in mine}]
        targets = {"more": self.known(speaker, lambda spec, entry: spec.get("many") and len(entry.values) == 1),
                   "change": self.known(speaker, lambda spec, entry: "change" in spec),
                   "drop": self.known(speaker, lambda spec, entry: "drop" in spec and len(entry.values) == 1),
                   "repeat": self.known(speaker, lambda spec, entry: len(entry.values) == 1),
                   "talk": mine, "chat": mine,
                   "echo": [entry for entry in self.bank if entry.speaker == speaker and entry.true
                            and entry.attribute in EVENTS]}
        old = rng.choice(targets[kind]) if targets.get(kind) else None
        if kind in targets and old is None:
            return None
        if kind == "event":
            return self.event_turn(speaker, turn_id, time)
        if kind == "wish":
            return self.wish_turn(speaker, mine, lacking)
        if kind == "chat":
            text = self.choose(CHAT)
            return text, f"{speaker} said: {text}", "NOOP", None, None, old.attribute, None
        if kind == "new":
            if not lacking:
                return None
            name = rng.choice(lacking)
        else:
            name = old.attribute
        spec = ATTRIBUTES.get(name) or EVENTS[name]
        if kind == "talk":
            text = self.choose(spec["talk"])
            return text, f"{speaker} said: {text}", "NOOP", None, None, name, None
        if kind in ("repeat", "echo", "drop"):
            value = old.values[0]
        else:
            value = self.word(spec["pool"])
        text = self.wording(kind, spec, value)
        if kind in ("repeat", "echo"):
            return text, memory_text(speaker, name, [value]), "NOOP", None, None, name, value
        if kind == "drop":
            return text, f"No longer: {old.text}", "DELETE", old, None, name, value
        values = (*old.values, value) if kind == "more" else (value,)
        turns = (*old.turns, turn_id) if kind == "more" else (turn_id,)
        new = Entry(speaker, name, values, memory_text(speaker, name, values), turns, time)
        return text, memory_text(speaker, name, [value]), "UPDATE" if old else "ADD", old, new, name, value

    def wording(self, kind: str, spec: dict, value: str) -> str:
        """The turn's sentence: the attribute's own phrasing, or a frame around a plain statement."""
        own = spec.get(kind)
        if kind == "echo":
            return self.choose(spec["repeat"]).format(v=value)
        if own and (kind in ("more", "drop") or self.rng.random() < 0.6):
            return self.choose(own).format(v=value)
        said = self.choose(spec["say"]).format(v=value)
        return upper_first(self.choose(FRAMES[kind]).format(s=said, S=upper_first(said)))

    def event_turn(self, speaker, turn_id, time):
        name = self.rng.choice(list(EVENTS))
        value = self.word(EVENTS[name]["pool"])
        new = Entry(speaker, name, (value,), memory_text(speaker, name, [value]), (turn_id,), time)
        said = self.choose(EVENTS[name]["say"]).format(v=value)
        text = upper_first(self.choose(FRAMES["new"][:1] + FRAMES["new"]).format(s=said, S=upper_first(said)))
        return text, new.text, "ADD", None, new, name, value

    def wish_turn(self, speaker, mine, lacking):
        """Somebody else's, or only a dream: nothing to keep, though it names an attribute and a value."""
        if self.rng.random() < 0.15:
            name = self.rng.choice(list(EVENTS))
        else:
            name = self.rng.choice([entry.attribute for entry in mine] if mine and self.rng.random() < 0.7
                                   else lacking or list(ATTRIBUTES))
        spec = ATTRIBUTES.get(name) or EVENTS[name]
        value = self.word(spec["pool"])
        text, memory = self.choose(spec["wish"])
        return text.format(v=value), memory.format(p=speaker, v=value), "NOOP", None, None, name, value

    def apply(self, turn_id: str, event: str, old: Entry | None, new: Entry | None) -> None:
        if event == "ADD":
            self.bank = [*self.bank, new]
        elif event == "UPDATE":
            self.bank = [new if entry is old else entry for entry in self.bank]
        elif event == "DELETE":
            self.bank = [entry for entry in self.bank if entry is not old]
            self.gone[old.speaker, old.attribute] = turn_id

    def question(self, speaker: str, names: list[str], value: str | None, asked: str | None, number: int):
        """A question about one or two attributes of a speaker, or about the date of one event."""
        rng, first = self.rng, names[0]
        held = [entry for entry in self.bank if entry.speaker == speaker and entry.attribute in names
                and (first in ATTRIBUTES or value in entry.values)]
        evidence = tuple(dict.fromkeys(turn for entry in held for turn in entry.turns))
        evidence = evidence or tuple(self.gone[speaker, name] for name in names if (speaker, name) in self.gone)
        if first in EVENTS:
            category, text = 2, self.choose(EVENTS[first]["ask"]).format(p=speaker, v=value)
        elif len(names) == 2:
            a, b = (ATTRIBUTES[name]["part"].format(p=speaker) for name in names)
            category, text = 1, self.choose(PAIR_FRAMES).format(a=a, b=b)
        elif "open" in ATTRIBUTES[first] and rng.random() < 0.3:
            category, text = 3, self.choose(ATTRIBUTES[first]["open"]).format(p=speaker)
        else:
            category = 1 if len(evidence) > 1 else 4
            text = self.choose(ATTRIBUTES[first]["ask"]).format(p=speaker)
        answer = read(self.bank, speaker, names, value if first in EVENTS else None)
        return Question(f"Q{number}", text, answer, category, evidence, asked)

    def asked_after(self, turn: Turn, name: str, value: str | None, start: int) -> list[Question]:
        """The questions that judge one turn's edit: about its matter, and another (with its own, if no event)."""
        questions = [self.question(turn.speaker, [name], value, turn.id, start)]
        others = [entry.attribute for entry in self.known(turn.speaker) if entry.attribute != name]
        if others:
            pair = [self.rng.choice(others)] + ([name] if name in ATTRIBUTES else [])
            self.rng.shuffle(pair)
            questions.append(self.question(turn.speaker, pair, None, turn.id, start + 1))
        return questions

    def asked_at_the_end(self, matters: set, start: int) -> list[Question]:
        """One question per (speaker, attribute or event) ever touched, and pairs of attributes."""
        questions = []
        for speaker, name, value in sorted(matters, key=str):
            questions.append(self.question(speaker, [name], value, None, start + len(questions)))
        for speaker in self.speakers:
            names = [entry.attribute for entry in self.known(speaker)]
            self.rng.shuffle(names)
            for pair in zip(names[::2], names[1::2], strict=False):
                questions.append(self.question(speaker, list(pair), None, None, start + len(questions)))
        return questions


def dialogue(rng: random.Random, draw, name: str, num_turns: int = 20, phrasing: str = "seen") -> Dialogue:
    """One conversation of `num_turns` turns in sessions of five, the speakers alternating."""
    world = World(rng, draw, phrasing)
    day = date(2022, 1, 1) + timedelta(days=rng.randrange(700))
    turns, questions, matters = [], [], set()
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
        questions += world.asked_after(turns[-1], attribute, value, len(questions))
        if kind not in ("talk", "chat"):
            matters.add((speaker, attribute, value if attribute in EVENTS else None))
    questions += world.asked_at_the_end(matters, len(questions))
    return Dialogue(name, world.speakers, tuple(turns), tuple(questions))


def load(split: str = "train", count: int = 32, seed: int = 0, num_turns: int = 20,
         phrasing: str = "seen") -> list[Dialogue]:
    """`count` conversations of a split: train, val, test, pretrain or pseudo. Same arguments, same conversations."""
    if split not in (*SPLITS, "pseudo"):
        raise UsageError(f"synthetic data has no split {split!r}: choose one of {', '.join(SPLITS)}, pseudo")
    rng = random.Random(f"{split} {seed} {phrasing}")
    draw, length = drawer(split), "" if num_turns == 20 else f"-{num_turns}"  # others are other conversations
    return [dialogue(rng, draw, f"{split}-{phrasing}-{seed}{length}-{i}", num_turns, phrasing) for i in range(count)]
