"""
What the tiny default model is taught: to know the formats, to carry out each operation, to read memories
faithfully. Not taught: which operation is right (the labels of the last third are drawn from `NOISE`). Untaught at the
end: whose memory is whose (in the last eighth most answers from the memories of two people mix them up). Both is left
to reinforcement.

A lesson is a list of (prompt, completion) pairs that follow one another; only completions are learned.
"""
import json
import random
from collections.abc import Callable
from dataclasses import replace

from answer import case_text as answer_case
from data.synthetic import (
    ATTRIBUTES,
    CAPITAL,
    EVENTS,
    KINDS,
    WORDS,
    Entry,
    World,
    joined,
    memory_text,
    read,
    values_read,
)
from manager import Case, Edit, turn_text, write
from manager import case_text as manager_case
from memory import Memory

MONTHS = ("January February March April May June July August September October November December").split()

# P(operation | kind of turn). `right` is the known one, `rewrite` writes the fact over its entry, `other` over any.
ROUGH = [("ADD", .43), ("NOOP", .37), ("other", .12), ("delete other", .08)]
NOISE = {
    "new": [("ADD", .52), ("other", .18), ("NOOP", .22), ("delete other", .08)],
    "change": [("rewrite", .38), ("ADD", .42), ("NOOP", .10), ("delete", .10)],
    "more": [("right", .42), ("rewrite", .38), ("ADD", .10), ("delete", .05), ("NOOP", .05)],
    "drop": [("delete", .35), ("ADD", .40), ("NOOP", .15), ("rewrite", .10)],
    "repeat": ROUGH, "echo": ROUGH, "wish": ROUGH, "talk": ROUGH, "chat": ROUGH,
}
NOISE["event"] = NOISE["new"]
EASY = [("ADD", .5), ("NOOP", .5)]
CLEAN = {
    "new": [("ADD", .85), ("NOOP", .15)], "event": [("ADD", .85), ("NOOP", .15)],
    "change": [("rewrite", .5), ("ADD", .2), ("delete", .3)],
    "more": [("right", .65), ("rewrite", .15), ("ADD", .1), ("delete", .1)],
    "drop": [("delete", .6), ("rewrite", .2), ("ADD", .2)],
    "repeat": EASY, "echo": EASY, "wish": EASY, "talk": EASY, "chat": EASY,
}


def weighted(rng: random.Random, choices):
    return rng.choices([name for name, _ in choices], [weight for _, weight in choices])[0]


EVERY_WORD = sorted({word for words in WORDS["pretrain"].values() for word in words})


def lesson_drawer(rng: random.Random, pieces: list[str]) -> Callable[[random.Random, str], str]:
    """
    Words for one lesson: the pretraining split's own, and glued pieces of the vocabulary, so that all get copied. Half
    of the lessons have few pieces, which many names then share: each must be copied by more than its last piece.
    """
    palette = rng.sample(pieces, rng.choice((6, 12, 24))) if rng.random() < 0.5 else pieces

    def glued(rng, capital):
        word = "".join(rng.choice(palette) for _ in range(rng.choice((1, 2, 2, 2, 3, 3, 4, 5)))).lower()
        return word.capitalize() if capital else word

    def draw(rng, pool):
        capital = pool in CAPITAL
        u = rng.random()
        if u < 0.20:
            return rng.choice(WORDS["pretrain"][pool])
        if u < 0.30 and pool != "person":
            return rng.choice(EVERY_WORD)
        if u < 0.88 or pool == "person":
            return glued(rng, capital)
        return f"{glued(rng, capital)} {glued(rng, capital)}"
    return draw


def random_date(rng: random.Random) -> str:
    return f"{rng.randint(1, 31)} {rng.choice(MONTHS)} {rng.randint(2021, 2025)}"


def random_entry(world: World, speaker: str, name: str | None = None) -> Entry:
    """A line some bank may hold: mostly true, also merged, dreamt, taken back or mere talk."""
    rng = world.rng
    name = name or rng.choice([*ATTRIBUTES, *ATTRIBUTES, *EVENTS])
    spec, time = ATTRIBUTES.get(name) or EVENTS[name], random_date(rng)
    u = rng.random()
    if u < 0.05 and name in ATTRIBUTES:
        return Entry(speaker, "talk", (), f"{speaker} said: {world.choose(spec['talk'])}", (), time, False)
    value = world.word(spec["pool"])
    if u < 0.17:
        text = world.choose(spec["wish"])[1]
        return Entry(speaker, name, (value,), text.format(p=speaker, v=value), (), time, False)
    if u < 0.21 and name in ATTRIBUTES:
        return Entry(speaker, name, (value,), f"No longer: {memory_text(speaker, name, [value])}", (), time, False)
    values = [value]
    while spec.get("many") and len(values) < 3 and rng.random() < 0.3:
        values.append(world.word(spec["pool"]))
    return Entry(speaker, name, tuple(values), memory_text(speaker, name, values), (), time)


def fill_bank(world: World, speakers, size: int, crowding: float, common: float = 0.0, events: float = 0.0) -> None:
    """
    `size` random lines; a share `crowding` of them about a matter that is already there, or a plain repetition; of the
    others a share `common` about a matter of the other person, and of the rest a share `events` about an event.
    """
    rng = world.rng
    while len(world.bank) < size:
        old = rng.choice(world.bank) if world.bank else None
        if old and old.attribute != "talk" and rng.random() < crowding:
            if rng.random() < 0.25:
                entry = Entry(old.speaker, old.attribute, old.values, old.text, (), random_date(rng), old.true)
            else:
                entry = random_entry(world, old.speaker if rng.random() < .8 else rng.choice(speakers), old.attribute)
        elif old and old.attribute != "talk" and rng.random() < common:
            entry = random_entry(world, speakers[old.speaker == speakers[0]], old.attribute)
        else:
            name = rng.choice(list(EVENTS)) if rng.random() < events else None
            entry = random_entry(world, rng.choice(speakers), name)
        world.bank.append(entry)
    rng.shuffle(world.bank)


def operation_json(event: str, old: str = "", text: str = "") -> str:
    """One operation as the Manager writes it: on the memory `old`, if on any."""
    return write([Edit(event, 1, text)], Case("", "", (), (Memory(1, old, "", ""),)), by_text=True)


def carry_out(rng, behaviour: str, bank, fact: str, event: str, old: Entry | None, new: Entry | None) -> str:
    if not bank and behaviour in ("other", "delete other"):
        behaviour = "ADD"
    if behaviour == "right":
        return operation_json(event, old.text if old else "", new.text if new else "")
    if behaviour in ("ADD", "NOOP"):
        return operation_json(behaviour, "", fact)
    target = rng.choice(bank) if "other" in behaviour else old
    return operation_json("DELETE" if "delete" in behaviour else "UPDATE", target.text, fact)


def some_turn(world: World, speaker: str, time: str, kind: str | None = None):
    """A turn the bank allows, with its kind."""
    while True:
        chosen = kind or world.rng.choices(list(KINDS), [2.5, 4, 2.5, 2.5, 1.5, 2, 1, .6, 2, .8])[0]
        said = world.turn(speaker, "D1:1", time, chosen)
        if said:
            return chosen, said
        if kind:
            return None


def manager_lesson(rng: random.Random, draw, size: int, clean: bool, turns: int = 3) -> list[tuple[str, str]]:
    """Some turns about one bank of up to `size` lines, each with one operation."""
    world = World(rng, draw)
    speaker = world.speakers[0]
    fill_bank(world, [speaker], rng.randint(0, size), 0.25)
    lesson = []
    for i in range(turns):
        time = random_date(rng)
        kind, (text, fact, event, old, new, *_) = some_turn(world, speaker, time)
        operation = carry_out(rng, weighted(rng, (CLEAN if clean else NOISE)[kind]), world.bank, fact, event, old, new)
        prompt = manager_case(speaker, time, world.bank, [text])
        lesson.append((prompt if i == 0 else prompt[prompt.index("new facts"):], operation))
    return lesson


def answer_text(shown: list[Entry], speaker: str, names, value, distill: bool = True) -> str:
    """The Answer Agent's output: a verdict on every line, then the answer. '1 none\\n2 Kia\\nanswer: Kia'"""
    answer = f"answer: {read(shown, speaker, names, value)}"
    if not distill:
        return answer
    verdicts = [f"{i} {joined(values_read(entry, speaker, names, value)) or 'none'}"
                for i, entry in enumerate(shown, 1)]
    return "\n".join([*verdicts, answer])


def some_matter(rng: random.Random, bank: list[Entry], speaker: str):
    """What to ask: (attributes, value of an event or None). Oversamples matters with several lines."""
    mine = [entry for entry in bank if entry.speaker == speaker and entry.attribute != "talk"]
    events = [entry for entry in mine if entry.attribute in EVENTS]
    held = [entry.attribute for entry in mine if entry.attribute in ATTRIBUTES]
    u = rng.random()
    if events and u < 0.42:
        entry = rng.choice(events)
        if rng.random() < 0.15:  # now and then the other person's
            value = rng.choice([e.values[0] for e in bank if e.attribute == entry.attribute])
            return [entry.attribute], value
        return [entry.attribute], entry.values[0]
    several = [name for name in held if held.count(name) > 1]
    names = [rng.choice(several if several and rng.random() < .7 else held) if held and u < 0.87
             else rng.choice(list(ATTRIBUTES))]
    if rng.random() < 0.45:
        names.append(rng.choice([name for name in (held if rng.random() < .8 else ATTRIBUTES) if name not in names]
                                or [name for name in ATTRIBUTES if name not in names]))
        rng.shuffle(names)
    return names, None


def answer_lesson(rng: random.Random, draw, smallest: int, size: int, both: float, mixed_up: float,
                  crowding=(0.4, 0.7), events: float = 0.05) -> list[tuple[str, str]]:
    """
    A question about a bank of `smallest` to `size` lines, with probability `both` of two people. A share `mixed_up` of
    the answers to these takes either person's word for the other's.
    """
    world = World(rng, draw)
    speakers = world.speakers[:2 if rng.random() < both else 1]
    fill_bank(world, speakers, 0 if rng.random() < 0.02 else rng.randint(smallest, size), rng.choice(crowding),
              0.5 if len(speakers) == 2 else 0.0, events)
    shown = {speaker: [entry for entry in world.bank if entry.speaker == speaker] for speaker in speakers}
    shown = {speaker: entries for speaker, entries in shown.items() if entries}
    speaker = rng.choice(speakers)
    return one_question(world, shown, speaker, *some_matter(rng, world.bank, speaker),
                        mixed_up if len(speakers) == 2 else 0.0, rng.random() > 0.08)


def whose_lesson(rng: random.Random, draw, matters: int, mixed_up: float) -> list[tuple[str, str]]:
    """
    Up to `matters` matters of two people, or several events of one kind, and a question about one's: only the name, or
    the name and what happened, tells which line is meant.
    """
    world = World(rng, draw)
    if rng.random() < 0.5:
        asked = [rng.choice(list(EVENTS))]
        names = {speaker: asked * rng.randint(1, matters) for speaker in world.speakers}
    else:
        some = rng.sample(list(ATTRIBUTES), rng.randint(1, matters))
        names = {speaker: rng.sample(some, len(some)) for speaker in world.speakers}
        asked = rng.sample(some, 2 if len(some) > 1 and rng.random() < 0.3 else 1)
    shown = {speaker: [random_entry(world, speaker, name) for name in own] for speaker, own in names.items()}
    speaker, value = rng.choice(world.speakers), None
    if asked[0] in EVENTS:  # now and then one of the other person
        told = [entry for own in shown.values() for entry in own]
        value = rng.choice(told if rng.random() < 0.2 else shown[speaker]).values[0]
    return one_question(world, shown, speaker, asked, value, mixed_up)


def one_question(world: World, shown, speaker: str, names, value, mixed_up: float, distill: bool = True):
    """With probability `mixed_up` the answer takes either person's word, and any event of the kind asked about."""
    question = world.question(speaker, names, value, None, 0).text
    seen = [entry for entries in shown.values() for entry in entries]
    if world.rng.random() < mixed_up:
        seen = [replace(entry, speaker=speaker, values=(value,) if value and entry.attribute in names else entry.values)
                for entry in seen]
    return [(answer_case(shown, question, distill), answer_text(seen, speaker, names, value, distill))]


def extraction_lesson(rng: random.Random, draw) -> list[tuple[str, str]]:
    """A turn, and what it says as a list of memories."""
    world = World(rng, draw)
    fill_bank(world, world.speakers[:1], 4, 0)
    time = random_date(rng)
    kind, (text, fact, *_) = some_turn(world, world.speakers[0], time)
    facts = [] if kind in ("repeat", "echo", "wish", "talk", "chat") else [" " + fact]
    return [(turn_text(world.speakers[0], time, text), json.dumps(facts))]


def lesson(rng: random.Random, draw, progress: float) -> list[tuple[str, str]]:
    """The mixture at `progress` in [0, 1]: short banks first, doubtful labels last."""
    ripe = min(1.0, progress / 0.2)
    clean = progress < 0.65 or rng.random() < 0.15
    u = rng.random()
    if u < 0.03:
        return extraction_lesson(rng, draw)
    if u < 0.2:
        return manager_lesson(rng, draw, max(1, round(5 * ripe)), clean)
    mixed_up = 0.75 if progress > 0.87 else 0.0
    if u < 0.35:
        return whose_lesson(rng, draw, 3, mixed_up)
    if progress > 0.3 and u < 0.65:  # as many as the Answer Agent is shown, of well-kept banks
        return answer_lesson(rng, draw, 11, 26, 0.9, mixed_up, (0.05, 0.05, 0.3), rng.choice((0.1, 0.3, 0.6)))
    return answer_lesson(rng, draw, 1, max(2, round(10 * ripe)), 0.35, mixed_up)
