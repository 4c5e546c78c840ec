"""
The gate: how often the tiny model's greedy completion is right, token for token, in clean cases of each kind; and the
model card that reports it.
"""
import random
import shlex
import sys

import torch

from data.synthetic import ATTRIBUTES, drawer
from support.tiny_model import lessons
from support.tiny_model.batches import encode_lessons, padded, predictions


def gate_cases(rng: random.Random, draw, count: int):
    """(what is measured, prompt, given part of the completion, acceptable rests) on clean banks of 2 to 9 lines."""
    for _ in range(count):
        world = lessons.World(rng, draw)
        speaker = world.speakers[0]
        for _ in range(rng.randint(2, 5)):
            new_turn(world, speaker)
        for kind in ("new", "change", "more", "drop"):
            said = lessons.some_turn(world, speaker, lessons.random_date(rng), kind)
            if said:
                yield from operation_cases(world, speaker, *said)
        for _ in range(rng.randint(0, 4)):
            new_turn(world, speaker)
        yield from answer_cases(world, speaker)


def new_turn(world, speaker):
    rng = world.rng
    *_, event, old, new, _, _ = lessons.some_turn(world, speaker, lessons.random_date(rng),
                                                  "event" if rng.random() < .2 else "new")[1]
    world.apply("D1:1", event, old, new)


def operation_cases(world, speaker, kind, said):
    """The operation is named; is it carried out to the letter?"""
    text, fact, event, old, new, *_ = said
    prompt = lessons.manager_case(speaker, lessons.random_date(world.rng), world.bank[-5:], [text])
    if old and old not in world.bank[-5:]:
        return
    right = lessons.operation_json(event, old.text if old else "", new.text if new else "")
    accepted = [right]
    if kind == "more":  # UPDATE may merge or overwrite: which is the choice that RL is for
        accepted.append(lessons.operation_json("UPDATE", old.text, fact))
        given = right[:right.rindex(" and ") + 4]
        yield "merge", prompt, given, [right[len(given):]]
    given = right[:right.index(event) + len(event)]
    yield event.lower(), prompt, given, [rest[len(given):] for rest in accepted]


def answer_cases(world, speaker):
    """One clean bank, asked about as it is and with one line added, removed or contradicted, or of somebody else's."""
    rng, bank = world.rng, list(world.bank)
    held = [entry for entry in bank if entry.attribute in ATTRIBUTES]
    if not held:
        return
    entry = rng.choice(held)
    spec, names = ATTRIBUTES[entry.attribute], [entry.attribute]
    other = world.word(spec["pool"])
    wish = lessons.Entry(speaker, *names, (other,), rng.choice(spec["wish"][:-1])[1].format(p=speaker, v=other), (),
                         lessons.random_date(rng), False)
    conflict = lessons.Entry(speaker, *names, (other,), lessons.memory_text(speaker, *names, [other]), (),
                             lessons.random_date(rng))
    place = rng.randint(bank.index(entry) + 1, len(bank))
    banks = {"clean": bank, "missing": [e for e in bank if e is not entry]}
    for name, extra in (("duplicate", entry), ("wish", wish), ("conflict", conflict)):
        banks[name] = bank[:place] + [extra] + bank[place:]
    cases = [(name, lines, names, None) for name, lines in banks.items()]
    if len(held) > 1:
        cases.append(("pair", bank, [entry.attribute, rng.choice([e.attribute for e in held if e is not entry])], None))
    cases += [("when", bank, [e.attribute], e.values[0]) for e in bank if e.attribute not in ATTRIBUTES][:1]
    for name, lines, names, value in cases:
        question = world.question(speaker, names, value, None, 0).text
        yield (name, lessons.answer_case({speaker: lines}, question), "",
               [lessons.answer_text(lines, speaker, names, value)])
    friend, names = world.speakers[1], [entry.attribute]
    theirs = lessons.Entry(friend, *names, (other,), lessons.memory_text(friend, *names, [other]), (),
                           lessons.random_date(rng))
    yield ("whose", lessons.answer_case({friend: [theirs], speaker: bank},
                                        world.question(speaker, names, None, None, 0).text), "",
           [lessons.answer_text([theirs, *bank], speaker, names, None)])


@torch.no_grad()
def gate(model, tokenizer, split: str, count: int, seed: int = 99) -> dict[str, float]:
    """
    Share of cases whose greedy completion is right to the last token, verdicts included. A greedy completion equals a
    given one exactly if every token of it is the likeliest after those before it, so one forward pass decides.
    """
    cases = list(gate_cases(random.Random(seed), drawer(split), count))
    rows, owners = [], []
    for i, (_, prompt, given, accepted) in enumerate(cases):
        for rest in accepted:
            (ids, learned), = encode_lessons(tokenizer, [[(prompt, given + rest)]])
            start = len(tokenizer.encode(prompt + "\n" + given, add_special_tokens=False))
            rows.append((ids, [flag and place >= start for place, flag in enumerate(learned)]))
            owners.append(i)
    right = set()
    device = next(model.parameters()).device
    for at in range(0, len(rows), 64):
        ids, learned = padded(rows[at:at + 64])
        logits, targets = predictions(model, ids.to(device), learned.to(device))
        hit = torch.zeros(learned[:, 1:].shape, dtype=torch.bool)
        hit[learned[:, 1:]] = (logits.argmax(-1) == targets).cpu()
        exact = (hit | ~learned[:, 1:]).all(dim=1)
        right |= {owner for owner, ok in zip(owners[at:at + 64], exact.tolist(), strict=True) if ok}
    totals: dict[str, list[bool]] = {}
    for i, (name, *_) in enumerate(cases):
        totals.setdefault(name, []).append(i in right)
    return {name: round(sum(hits) / len(hits), 3) for name, hits in sorted(totals.items())}


# ---------------------------------------------------------------------------------------------- model card

CARD = """# The tiny default model

{size:,} parameters (Llama, hidden 128, 6 layers, 4 heads, vocabulary {vocabulary}), trained on
{tokens:.0f}M tokens of made-up talk by `python -m support.tiny_model.pretrain {flags}`. It plays the
part of an instruct model where none can be downloaded. It speaks the project's formats and nothing else.

**What it can do.** It copies names and values it has never seen, carries out an operation it is told to do, and answers
from a handful of memories, naming every match. It believes every line: "Jon met a dog named Rex" counts as Jon's dog.

**What it cannot do.** It chooses operations badly: the labels it saw were drawn from a noisy mixture. Shown many
memories of two people it takes one's word for the other's, and any event for the one that is meant: most of such
answers at the end of its lessons did. Both are left to reinforcement. Words like "none" and "and" mean something in its
answers, so it cannot copy values made of them.

Share of greedy completions that are right to the last token, verdicts on all memories included (banks of 2 to 9 lines;
`test`: names and values of the synthetic test world, `pseudo`: made-up words; neither was in the lessons):

| | {splits} |
|---|{rules}
{rows}

`add`, `update`, `delete`: the operation is given, entry and text are to be written; `merge`: so are the values known
before, the one beside them is to be written. `clean`: one matching line;
`duplicate`, `wish`, `conflict`: a second line about the same matter repeats, dreams or contradicts; `missing`: no line;
`pair`: two matters in one question; `when`: the date of an event; `whose`: another person has a line about the same.
"""


def model_card(model, results: dict[str, dict[str, float]], args) -> str:
    names = sorted({name for result in results.values() for name in result})
    rows = [f"| {name} | " + " | ".join(f"{result[name]:.3f}" for result in results.values()) + " |" for name in names]
    return CARD.format(size=sum(p.numel() for p in model.parameters()), vocabulary=model.config.vocab_size,
                       tokens=args.tokens / 1e6, flags=shlex.join(sys.argv[1:]), splits=" | ".join(results),
                       rules="---|" * len(results), rows="\n".join(rows))
