"""The synthetic world, checked by replaying it on a dictionary, by a second reader, and against its docstring."""
import random
import re
from collections import Counter
from datetime import datetime

import pytest

from data import UsageError, load, synthetic
from data.synthetic import SPLITS, WORDS, WORLD, Entry, World, deal_words, memory_text, pseudo_word, read

TEMPLATES = {name: spec["memory"] for key in ("attributes", "events") for name, spec in WORLD[key].items()}


@pytest.fixture(scope="module")
def talks():
    return load("synthetic", "train", count=200, seed=7, num_turns=20)


def said(dialogues):
    """Return every text of the dialogues: turns, memories, questions and answers."""
    turns = [text for dialogue in dialogues for turn in dialogue.turns
             for text in (turn.text, turn.fact, turn.operation.old_memory, turn.operation.text)]
    return turns + [text for dialogue in dialogues for q in dialogue.questions for text in (q.text, q.answer)]


def words(text):
    return re.findall(r"[^\W_]+", text.casefold())


# --- words and phrasings ---

def test_same_arguments_same_dialogues():
    assert synthetic.load("train", 3, seed=4, num_turns=9) == synthetic.load("train", 3, seed=4, num_turns=9)
    assert synthetic.load("train", 5, seed=4, num_turns=9)[:3] == synthetic.load("train", 3, seed=4, num_turns=9)
    assert deal_words() == WORDS
    found = [synthetic.load(split, 2, seed, 9, phrasing)[i] for split in (*SPLITS, "pseudo") for seed in (0, 1)
             for phrasing in ("seen", "unseen") for i in (0, 1)]
    assert len({dialogue.turns for dialogue in found}) == len({dialogue.id for dialogue in found}) == len(found) == 40


def test_unknown_split_is_one_line():
    with pytest.raises(UsageError, match="no split 'dev'.*train") as error:
        load("synthetic", "dev")
    assert "\n" not in str(error.value)


def test_every_word_belongs_to_one_split():
    home = {}
    for split in SPLITS:
        for pool, dealt in WORDS[split].items():
            assert len(dealt) == len(set(dealt)) >= 4, (split, pool)
            for word in (word for value in dealt for word in words(value)):
                assert home.setdefault(word, split) == split, word
    for pool, every in WORLD["pools"].items():
        every = every.split() if pool == "person" else every.split(",")
        dealt = [value for split in SPLITS for value in WORDS[split][pool]]
        assert set(dealt) <= set(every) and len(dealt) == len(set(dealt)) > 0.7 * len(every)
        for value in set(every) - set(dealt):
            assert home.keys() & set(words(value)), f"{value} shares no word with any split, and is left out"


@pytest.mark.parametrize("split", SPLITS)
def test_dialogues_say_no_value_of_another_split(split):
    """Every name and value belongs to the split; two joined where a pool is used up."""
    own = {word.casefold() for pool in WORDS[split].values() for word in pool}
    patterns = [re.compile(re.escape(template).replace(r"\{p\}", "(.+?)").replace(r"\{v\}", "(.+)") + "$")
                for template in TEMPLATES.values()]
    for dialogue in synthetic.load(split, 60, num_turns=30):
        values = set(dialogue.speakers)
        for turn in dialogue.turns:
            if turn.operation.text:
                [found] = {pattern.match(turn.operation.text).groups() for pattern in patterns
                           if pattern.match(turn.operation.text)}
                values |= {found[0], *found[1].split(" and ")}
        for value in values:
            halves = [(value[:i], value[i + 1:]) for i, char in enumerate(value) if char == " "]
            assert value.casefold() in own or any({a.casefold(), b.casefold()} <= own for a, b in halves), value


@pytest.mark.parametrize("split", SPLITS)
def test_words_of_other_splits_do_not_occur(split):
    """Not even as a part of a longer value or in a phrasing."""
    heard = {word for text in said(synthetic.load(split, 100, num_turns=30)) for word in words(text)}
    foreign = {word.casefold() for other in SPLITS if other != split for pool in WORDS[other].values() for word in pool}
    assert heard & foreign == set()


def phrasings():
    """Yield (name, list) of every list of phrasings in the world."""
    yield from WORLD["frames"].items()
    yield "chat", WORLD["chat"]
    yield "pair", synthetic.PAIR_FRAMES
    for key in ("attributes", "events"):
        for name, spec in WORLD[key].items():
            for kind, options in spec.items():
                if isinstance(options, list) and kind != "open":  # only "seen" dialogues have open questions
                    yield f"{name} {kind}", [option[0] if kind == "wish" else option for option in options]


def lines_like(option, lines):
    """Return the lines that contain a phrasing: '{v} is my sister' finds 'As I said, Ann is my sister.'"""
    parts = [part.casefold() for part in re.split(r"\{\w\}", option)]
    longest, pattern = max(parts, key=len), re.compile(r"(?<!\w)" + r"\w.*".join(map(re.escape, parts)) + r"(?!\w)")
    return [line for line in lines if longest in line and pattern.search(line)]


def heard(phrasing):
    talks = [talk for split in ("train", "pretrain") for talk in synthetic.load(split, 200, 0, 30, phrasing)]
    lines = [turn.text for talk in talks for turn in talk.turns]
    return {line.casefold() for line in lines + [question.text for talk in talks for question in talk.questions]}


def test_the_last_phrasings_are_heard_only_unseen():
    seen, unseen = heard("seen"), heard("unseen")
    assert not {name for name, options in phrasings() if not lines_like(options[-1], unseen)}, "never used"
    assert not {option for _, options in phrasings() for option in options[:-1] if not lines_like(option, seen)}
    sentences = ("ask", "talk", "more", "drop", "chat", "pair")  # no phrasing of these kinds is a part of another
    whole = [options for name, options in phrasings() if name.split()[-1] in sentences]
    assert not {option for options in whole for option in options[:-1] if lines_like(option, unseen)}
    assert {name for name, options in phrasings() if lines_like(options[-1], seen)} == set(), "a last one was used"


# --- turns and operations ---

def replay(dialogue):
    """Return the reference bank after every turn, as a dict {(speaker, text): time}."""
    bank, banks = {}, []
    for turn in dialogue.turns:
        old, new = (turn.speaker, turn.operation.old_memory), (turn.speaker, turn.operation.text)
        if turn.operation.event in ("UPDATE", "DELETE"):
            assert old in bank, "an operation on an entry that does not exist"
        if turn.operation.event in ("ADD", "UPDATE"):
            assert new not in bank, "an entry twice"
        if turn.operation.event == "UPDATE":  # keeps its place
            bank = dict((new, turn.time) if item[0] == old else item for item in bank.items())
        elif turn.operation.event == "DELETE":
            bank = {key: time for key, time in bank.items() if key != old}
        elif turn.operation.event == "ADD":
            bank = {**bank, new: turn.time}
        banks.append(bank)
    return banks


def test_operations_are_consistent(talks):
    for dialogue in talks:
        assert len(replay(dialogue)) == 20
        for turn in dialogue.turns:
            event, old, text = turn.operation.event, turn.operation.old_memory, turn.operation.text
            assert (bool(old), bool(text)) == {"ADD": (False, True), "UPDATE": (True, True), "DELETE": (True, False),
                                               "NOOP": (False, False)}[event]
            assert turn.speaker in text or not text
            assert turn.speaker in turn.fact, "a memory that can be understood alone"
        assert {turn.speaker for turn in dialogue.turns} == set(dialogue.speakers) and len(set(dialogue.speakers)) == 2


def test_turns_are_numbered_and_dated(talks):
    for dialogue in talks:
        assert [turn.id for turn in dialogue.turns] == [f"D{i // 5 + 1}:{i % 5 + 1}" for i in range(20)]
        assert [turn.session for turn in dialogue.turns] == [i // 5 + 1 for i in range(20)]
        days = [datetime.strptime(turn.time, "%d %B %Y") for turn in dialogue.turns]  # ValueError: no such day
        assert days == sorted(days) and len(set(days)) == 4


def test_every_kind_occurs_and_two_values_at_most_are_merged(recorded, talks):
    kinds = Counter(kind for world in recorded for *_, kind, _ in world.log)
    assert kinds.keys() == synthetic.KINDS.keys() and min(kinds.values()) > 0.01 * sum(kinds.values())
    events = {kind: {said[2] for world in recorded for *_, one, said in world.log if one == kind} for kind in kinds}
    assert events == {"new": {"ADD"}, "event": {"ADD"}, "more": {"UPDATE"}, "change": {"UPDATE"}, "drop": {"DELETE"},
                      **dict.fromkeys(("repeat", "wish", "talk", "chat", "echo"), {"NOOP"})}
    for world, dialogue in zip(recorded, talks, strict=True):
        assert [(entry.speaker, entry.text) for entry in world.bank] == list(replay(dialogue)[-1])
    sizes = Counter(len(entry.values) for world in recorded for entry in world.bank)
    assert sizes.keys() == {1, 2} and min(sizes.values()) >= 20
    for world in recorded:
        for *_, kind, (text, fact, _, old, new, _, value) in world.log:
            assert kind in ("talk", "chat") or value in text, (kind, text)
            assert kind != "more" or new.values == (*old.values, value) and old.turns == new.turns[:-1]
            assert kind != "change" or new.values == (value,) != old.values
            assert kind not in ("repeat", "echo") or any(fact == entry.text for entry in world.seen)


# --- questions and answers ---

def test_questions_name_turns_that_were_said(talks):
    for dialogue in talks:
        order = {turn.id: i for i, turn in enumerate(dialogue.turns)}
        assert len({question.id for question in dialogue.questions}) == len(dialogue.questions)
        for question in dialogue.questions:
            last = order[question.asked_after] if question.asked_after else 99
            assert all(order[turn] <= last for turn in question.evidence)
            assert question.evidence or question.answer == "none"
            assert question.category in (1, 2, 3, 4) and question.text and question.answer
            assert sum(speaker in question.text for speaker in dialogue.speakers) == 1
        asked = [question.asked_after for question in dialogue.questions]
        assert set(asked) == {None, *order} and asked == sorted(asked, key=lambda turn: order.get(turn, 99))


READER = {  # question -> the memory that answers it
    r"\blives?\b": r"{p} lives in (.+)\.", r"\bcar\b": r"{p} drives a (.+) car\.",
    r"\bdog\b": r"{p} has a dog named (.+)\.", r"\bspeaks?\b": r"{p} speaks (.+)\.",
    r"\bsister\b": r"{p} has a sister named (.+)\.", r"\ballergic\b": r"{p} is allergic to (.+)\.",
    r"\bboss\b": r"{p} has a boss named (.+)\."}


def read_by_pattern(question, person, bank):
    """Return the answer by regular expressions over one person's {text: time}; None for topics without a pattern."""
    event = re.search(rf"{person} (?:visit|visited) (.+)\?", question)
    if event:
        return "".join(time for text, time in bank.items() if text == f"{person} visited {event[1]}.") or "none"
    hits = [READER[key] for key in READER if re.search(key, question.replace(person, "X"))]
    is_pair = question.endswith(".") or question.startswith("Can you say")
    if len(hits) != 1 + is_pair:
        return None
    found = [re.fullmatch(pattern.format(p=person), text) for text in bank for pattern in hits]
    return " and ".join(one[1] for one in found if one) or "none"


def test_answers_follow_from_the_reference_bank(talks):
    counts = Counter()
    for dialogue in talks:
        banks = dict(zip([turn.id for turn in dialogue.turns], replay(dialogue), strict=True))
        for question in dialogue.questions:
            bank = banks[question.asked_after or dialogue.turns[-1].id]
            [person] = [speaker for speaker in dialogue.speakers if speaker in question.text]
            mine = {text: time for (speaker, text), time in bank.items() if speaker == person}
            expected = read_by_pattern(question.text, person, mine)
            if expected is not None:
                assert question.answer == expected, (question, mine)
                counts[question.category, expected == "none", " and " in expected] += 1
    assert {category for category, _, _ in counts} == {1, 2, 3, 4} and sum(counts.values()) > 1500
    assert sum(n for (_, is_none, _), n in counts.items() if is_none) > 100
    assert counts[1, False, True] > 300 and not counts[4, False, True], "several turns are category 1"


class Recorder(World):
    """A world that records its turns and questions."""

    def __init__(self, *args):
        super().__init__(*args)
        self.log, self.asks, self.seen = [], [], []

    def turn(self, speaker, turn_id, time, kind):
        said = super().turn(speaker, turn_id, time, kind)
        self.log += [(speaker, turn_id, time, kind, said)] if said else []
        return said

    def apply(self, *edit):
        super().apply(*edit)
        self.seen += self.bank

    def question(self, speaker, names, value, asked_after, number):
        self.asks.append((super().question(speaker, names, value, asked_after, number), speaker, names, value))
        return self.asks[-1][0]


@pytest.fixture(scope="module")
def recorded(talks):
    worlds = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "World", lambda *args: worlds.append(Recorder(*args)) or worlds[-1])
        assert load("synthetic", "train", count=200, seed=7, num_turns=20) == talks
    return worlds


def fraction_correct(worlds, bank_of):
    right = []
    for world in worlds:
        bank = bank_of(world)
        right += [read(bank, speaker, names, value if names[0] in WORLD["events"] else None) == question.answer
                  for question, speaker, names, value in world.asks if question.asked_after is None]
    assert len(right) > 2000
    return sum(right) / len(right)


def everything(world, kinds):
    """Return a bank that stores the fact of every turn of some kinds, but no text twice."""
    bank = {}
    for speaker, turn_id, time, kind, (_, fact, _, _, _, name, value) in world.log:
        if kind in kinds:
            bank.setdefault(fact, Entry(speaker, name, (value,), fact, (turn_id,), time))
    return list(bank.values())


def test_only_the_right_edits_answer_the_questions(recorded):
    """The reference bank answers every question; an empty bank, and always ADD (even without wishes), at most 85 %."""
    said_kinds = synthetic.KINDS.keys() - {"talk", "chat"}
    assert fraction_correct(recorded, lambda world: world.bank) == 1.0
    assert fraction_correct(recorded, lambda world: []) <= 0.85
    assert fraction_correct(recorded, lambda world: everything(world, said_kinds)) <= 0.85
    assert fraction_correct(recorded, lambda world: everything(world, said_kinds - {"wish", "drop"})) <= 0.85


def test_read_by_hand():
    bank = [Entry("Jon", "dog", ("Buddy",), "Jon has a dog named Buddy.", (), "1 May 2023"),
            Entry("Gina", "dog", ("Rex",), "Gina has a dog named Rex.", (), "2 May 2023"),
            Entry("Jon", "dog", ("Scout", "Tom"), "Jon has a dog named Scout and Tom.", (), "3 May 2023"),
            Entry("Jon", "visit", ("Rome",), "Jon visited Rome.", (), "4 May 2023")]
    assert read(bank, "Jon", ["dog"]) == "Buddy and Scout and Tom" and read(bank, "Gina", ["dog", "cat"]) == "Rex"
    assert read(bank, "Jon", ["visit"], "Rome") == "4 May 2023" and read(bank, "Jon", ["visit"], "Oslo") == "none"
    assert read([], "Jon", ["dog"]) == "none"
    assert memory_text("Jon", "dog", ["Rex", "Tom"]) == "Jon has a dog named Rex and Tom."


def test_pseudo_words():
    rng = random.Random(0)
    made = [pseudo_word(rng, True) for _ in range(500)]
    assert all(re.fullmatch("[A-Z][a-z]{1,20}", word) for word in made) and len(set(made)) > 400
    assert pseudo_word(rng, False).islower()


def test_conversations_of_other_lengths_have_other_ids():
    """The second dialogue of 100 turns differs from the second of 20, so that facts cached by id are not mixed up."""
    short, long = (synthetic.load("test", 2, seed=1, num_turns=n) for n in (20, 100))
    assert short[1].turns[0] != long[1].turns[0]
    assert not {one.id for one in short} & {one.id for one in long}


def test_no_question_is_adversarial():
    assert load("synthetic", "test", adversarial=False, count=1) == load("synthetic", "test", count=1)
    with pytest.raises(UsageError, match="synthetic has no adversarial questions: only LoCoMo has"):
        load("synthetic", "test", adversarial=True)
