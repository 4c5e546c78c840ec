"""
Pretraining tasks of the tiny default model. They teach the prompt formats, how to apply each operation, and how to read
memories faithfully. They do not teach which operation is correct: in the last third, labels are drawn from `NOISE`.
Finally the model partly unlearns to distinguish speakers: in the last eighth, most answers about two people mix up
their memories. Both abilities are left to reinforcement learning.

A lesson is a list of (prompt, completion) pairs that follow one another. Only completions are learned.
A `draw` function, draw(rng, pool) -> word, supplies the names and values of a lesson.
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
    TOPICS,
    WORDS,
    Entry,
    Utterance,
    World,
    joined,
    memory_text,
    read,
    values_read,
)
from manager import Case, Edit, format_edits, turn_text
from manager import case_text as manager_case
from memory import Memory

MONTHS = ("January February March April May June July August September October November December").split()
ALL_WORDS = sorted({word for words in WORDS["pretrain"].values() for word in words})

# P(operation | kind of turn), noisy and clean. "right" is the reference operation. "rewrite" and "delete" change the
# entry that the turn is about, "other" and "delete other" change any entry.
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


def lesson_drawer(rng: random.Random, pieces: list[str]) -> Callable[[random.Random, str], str]:
    """
    Return a `draw` function for one lesson. It draws words of the pretraining split, and words joined from pieces of
    the vocabulary, so that every piece gets copied. Half of the lessons use few pieces, which many of their words
    share: a word can then be copied only by all its pieces, not by its last one.
    """
    palette = rng.sample(pieces, rng.choice((6, 12, 24))) if rng.random() < 0.5 else pieces

    def joined_pieces(rng, capital):
        word = "".join(rng.choice(palette) for _ in range(rng.choice((1, 2, 2, 2, 3, 3, 4, 5)))).lower()
        return word.capitalize() if capital else word

    def draw(rng, pool):
        capital = pool in CAPITAL
        u = rng.random()
        if u < 0.20:
            return rng.choice(WORDS["pretrain"][pool])
        if u < 0.30 and pool != "person":
            return rng.choice(ALL_WORDS)
        if u < 0.88 or pool == "person":
            return joined_pieces(rng, capital)
        return f"{joined_pieces(rng, capital)} {joined_pieces(rng, capital)}"
    return draw


def random_date(rng: random.Random) -> str:
    return f"{rng.randint(1, 31)} {rng.choice(MONTHS)} {rng.randint(2021, 2025)}"


def random_entry(world: World, speaker: str, name: str | None = None) -> Entry:
    """Return a memory that a bank might hold: usually true, sometimes merged, a wish, revoked, or small talk."""
    rng = world.rng
    name = name or rng.choice([*ATTRIBUTES, *ATTRIBUTES, *EVENTS])
    topic, time = TOPICS[name], random_date(rng)
    u = rng.random()
    if u < 0.05 and name in ATTRIBUTES:
        return Entry(speaker, "talk", (), f"{speaker} said: {world.choose(topic['talk'])}", (), time, False)
    value = world.word(topic["pool"])
    if u < 0.17:
        text = world.choose(topic["wish"])[1]
        return Entry(speaker, name, (value,), text.format(p=speaker, v=value), (), time, False)
    if u < 0.21 and name in ATTRIBUTES:
        return Entry(speaker, name, (value,), f"No longer: {memory_text(speaker, name, [value])}", (), time, False)
    values = [value]
    while topic.get("many") and len(values) < 3 and rng.random() < 0.3:
        values.append(world.word(topic["pool"]))
    return Entry(speaker, name, tuple(values), memory_text(speaker, name, values), (), time)


def fill_bank(world: World, speakers, size: int, crowding: float, common: float = 0.0, events: float = 0.0) -> None:
    """
    Fill the bank with random memories. P(the topic of a memory is in the bank already, or the memory repeats another)
    is `crowding`; otherwise P(a topic of the other speaker) is `common`; otherwise P(an event) is `events`.
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


def random_turn(world: World, speaker: str, time: str) -> tuple[str, Utterance]:
    """Return a turn that the bank allows, with its kind."""
    while True:
        kind = world.rng.choices(list(KINDS), [2.5, 4, 2.5, 2.5, 1.5, 2, 1, .6, 2, .8])[0]
        said = world.turn(speaker, "D1:1", time, kind)
        if said:
            return kind, said


def operation_json(event: str, old: str = "", text: str = "") -> str:
    """Return one operation as the Manager writes it. `old`: the text of the memory that it changes."""
    return format_edits([Edit(event, 1, text)], Case("", "", (), (Memory(1, old, "", ""),)), by_text=True)


def noisy_operation(rng: random.Random, bank: list[Entry], said: Utterance, choices) -> str:
    """Draw an operation for a turn from `choices`, the list of (operation, weight) of its kind."""
    choice = rng.choices([name for name, _ in choices], [weight for _, weight in choices])[0]
    if not bank and choice in ("other", "delete other"):
        choice = "ADD"
    if choice == "right":
        return operation_json(said.event, said.old.text if said.old else "", said.new.text if said.new else "")
    if choice in ("ADD", "NOOP"):
        return operation_json(choice, "", said.fact)
    target = rng.choice(bank) if "other" in choice else said.old
    return operation_json("DELETE" if "delete" in choice else "UPDATE", target.text, said.fact)


def manager_lesson(rng: random.Random, draw, size: int, clean: bool, turns: int = 3) -> list[tuple[str, str]]:
    """Return some turns on one bank of up to `size` memories, each with one operation."""
    world = World(rng, draw)
    speaker = world.speakers[0]
    fill_bank(world, [speaker], rng.randint(0, size), 0.25)
    lesson = []
    for i in range(turns):
        time = random_date(rng)
        kind, said = random_turn(world, speaker, time)
        operation = noisy_operation(rng, world.bank, said, (CLEAN if clean else NOISE)[kind])
        prompt = manager_case(speaker, time, world.bank, [said.text])
        lesson.append((prompt if i == 0 else prompt[prompt.index("new facts"):], operation))
    return lesson


def extraction_lesson(rng: random.Random, draw) -> list[tuple[str, str]]:
    """Return a turn and the list of its facts."""
    world = World(rng, draw)
    fill_bank(world, world.speakers[:1], 4, 0)
    time = random_date(rng)
    kind, said = random_turn(world, world.speakers[0], time)
    facts = [] if kind in ("repeat", "echo", "wish", "talk", "chat") else [" " + said.fact]
    return [(turn_text(world.speakers[0], time, said.text), json.dumps(facts))]


def answer_text(shown: list[Entry], speaker: str, names, value, distill: bool = True) -> str:
    """Return the output of the Answer Agent: a verdict per memory, then the answer. '1 none\\n2 Kia\\nanswer: Kia'"""
    answer = f"answer: {read(shown, speaker, names, value)}"
    if not distill:
        return answer
    verdicts = [f"{i} {joined(values_read(entry, speaker, names, value)) or 'none'}"
                for i, entry in enumerate(shown, 1)]
    return "\n".join([*verdicts, answer])


def choose_topic(rng: random.Random, bank: list[Entry], speaker: str) -> tuple[list[str], str | None]:
    """Choose what to ask: (attributes, value of an event or None). Topics with several memories are preferred."""
    own = [entry for entry in bank if entry.speaker == speaker and entry.attribute != "talk"]
    events = [entry for entry in own if entry.attribute in EVENTS]
    held = [entry.attribute for entry in own if entry.attribute in ATTRIBUTES]
    u = rng.random()
    if events and u < 0.42:
        entry = rng.choice(events)
        if rng.random() < 0.15:  # an event of this kind, possibly the other speaker's
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


def question_pair(world: World, shown, speaker: str, names, value, mixed_up: float, distill: bool = True):
    """
    Return a question about the memories `shown`, {speaker: entries}, and its answer. With probability `mixed_up` the
    answer ignores who a memory is about, and takes any event for the one in question.
    """
    question = world.question(speaker, names, value, None, 0).text
    seen = [entry for entries in shown.values() for entry in entries]
    if world.rng.random() < mixed_up:
        seen = [replace(entry, speaker=speaker, values=(value,) if value and entry.attribute in names else entry.values)
                for entry in seen]
    return answer_case(shown, question, distill, tiny=True), answer_text(seen, speaker, names, value, distill)


def answer_lesson(rng: random.Random, draw, sizes: tuple[int, int], both: float, mixed_up: float,
                  crowding=(0.4, 0.7), events: float = 0.05) -> list[tuple[str, str]]:
    """
    Return a question to a bank whose size lies in the range `sizes`. P(the bank is about two people) is `both`; answers
    are then mixed up with probability `mixed_up`. `crowding`: choices for fill_bank.
    """
    world = World(rng, draw)
    speakers = world.speakers[:2 if rng.random() < both else 1]
    fill_bank(world, speakers, 0 if rng.random() < 0.02 else rng.randint(*sizes), rng.choice(crowding),
              0.5 if len(speakers) == 2 else 0.0, events)
    shown = {speaker: [entry for entry in world.bank if entry.speaker == speaker] for speaker in speakers}
    shown = {speaker: entries for speaker, entries in shown.items() if entries}
    speaker = rng.choice(speakers)
    names, value = choose_topic(rng, world.bank, speaker)
    return [question_pair(world, shown, speaker, names, value, mixed_up if len(speakers) == 2 else 0.0,
                          rng.random() > 0.08)]


def whose_lesson(rng: random.Random, draw, topics: int, mixed_up: float) -> list[tuple[str, str]]:
    """
    Return a question about one of two people who share up to `topics` topics, or tell several events of one kind. Only
    the name, or the name and the event's value, identifies the relevant memory.
    """
    world = World(rng, draw)
    if rng.random() < 0.5:
        asked = [rng.choice(list(EVENTS))]
        names = {speaker: asked * rng.randint(1, topics) for speaker in world.speakers}
    else:
        shared = rng.sample(list(ATTRIBUTES), rng.randint(1, topics))
        names = {speaker: rng.sample(shared, len(shared)) for speaker in world.speakers}
        asked = rng.sample(shared, 2 if len(shared) > 1 and rng.random() < 0.3 else 1)
    shown = {speaker: [random_entry(world, speaker, name) for name in own] for speaker, own in names.items()}
    speaker, value = rng.choice(world.speakers), None
    if asked[0] in EVENTS:  # in one of five cases possibly an event of the other person
        told = [entry for own in shown.values() for entry in own]
        value = rng.choice(told if rng.random() < 0.2 else shown[speaker]).values[0]
    return [question_pair(world, shown, speaker, asked, value, mixed_up)]


def lesson(rng: random.Random, draw, progress: float) -> list[tuple[str, str]]:
    """Draw a lesson from the mixture at `progress` in [0, 1]: small banks at first, noisy labels at the end."""
    growth = min(1.0, progress / 0.2)
    clean = progress < 0.65 or rng.random() < 0.15
    u = rng.random()
    if u < 0.03:
        return extraction_lesson(rng, draw)
    if u < 0.2:
        return manager_lesson(rng, draw, max(1, round(5 * growth)), clean)
    mixed_up = 0.75 if progress > 0.87 else 0.0
    if u < 0.35:
        return whose_lesson(rng, draw, 3, mixed_up)
    if progress > 0.3 and u < 0.65:  # as many memories as the Answer Agent sees, from banks with few repetitions
        return answer_lesson(rng, draw, (11, 26), 0.9, mixed_up, (0.05, 0.05, 0.3), rng.choice((0.1, 0.3, 0.6)))
    return answer_lesson(rng, draw, (1, max(2, round(10 * growth))), 0.35, mixed_up)
