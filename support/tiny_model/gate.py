"""
The gate: how often the greedy completion of the tiny model is correct, token for token, for each kind of task on clean
banks of 2 to 9 memories. Pretraining prints it, and the model card reports it.
"""
import random
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from data.synthetic import ATTRIBUTES, Entry, Utterance, World, drawer, memory_text
from support.tiny_model.batches import encode_lessons, pad_rows, predictions
from support.tiny_model.lessons import answer_case, answer_text, manager_case, operation_json, random_date

TASKS = {
    "add": "the operation is given; write the text",
    "update": "the operation is given; write entry and text",
    "delete": "the operation is given; write the entry",
    "merge": "operation and known values are given; write the additional value",
    "clean": "one matching line",
    "duplicate": "a second line repeats the first",
    "wish": "a second line is only a wish",
    "conflict": "a second line contradicts the first",
    "missing": "no matching line",
    "pair": "two topics in one question",
    "when": "the date of an event",
    "whose": "another person has a line on the same topic",
}


class GateCase(NamedTuple):
    task: str
    prompt: str
    given: str  # the beginning of the completion
    accepted: list[str]  # correct continuations


def gate_cases(rng: random.Random, draw, count: int) -> Iterator[GateCase]:
    """Yield the cases of `count` banks. `draw`: see lessons.py."""
    for _ in range(count):
        world = World(rng, draw)
        speaker = world.speakers[0]
        for _ in range(rng.randint(2, 5)):
            extend_bank(world, speaker)
        for kind in ("new", "change", "more", "drop"):
            said = world.turn(speaker, "D1:1", random_date(rng), kind)
            if said:
                yield from operation_cases(world, speaker, kind, said)
        for _ in range(rng.randint(0, 4)):
            extend_bank(world, speaker)
        yield from answer_cases(world, speaker)


def extend_bank(world: World, speaker: str) -> None:
    """Add a random attribute or event to the bank."""
    time = random_date(world.rng)
    said = world.turn(speaker, "D1:1", time, "event" if world.rng.random() < .2 else "new")
    world.apply("D1:1", said.event, said.old, said.new)


def operation_cases(world: World, speaker: str, kind: str, said: Utterance) -> Iterator[GateCase]:
    """Yield cases that give the operation for a turn and ask for the rest of it."""
    old, shown = said.old, world.bank[-5:]
    prompt = manager_case(speaker, random_date(world.rng), shown, [said.text])
    if old and old not in shown:
        return
    correct = operation_json(said.event, old.text if old else "", said.new.text if said.new else "")
    accepted = [correct]
    if kind == "more":  # UPDATE may merge or overwrite: that choice is left to reinforcement learning
        accepted.append(operation_json("UPDATE", old.text, said.fact))
        given = correct[:correct.rindex(" and ") + 4]
        yield GateCase("merge", prompt, given, [correct[len(given):]])
    given = correct[:correct.index(said.event) + len(said.event)]
    yield GateCase(said.event.lower(), prompt, given, [text[len(given):] for text in accepted])


def answer_cases(world: World, speaker: str) -> Iterator[GateCase]:
    """Yield questions to a clean bank, to the bank with one line added or removed, and to a bank of two people."""
    rng, bank = world.rng, list(world.bank)
    held = [entry for entry in bank if entry.attribute in ATTRIBUTES]
    if not held:
        return
    entry = rng.choice(held)
    names, value = [entry.attribute], world.word(ATTRIBUTES[entry.attribute]["pool"])
    cases = [(task, lines, names, None) for task, lines in changed_banks(rng, bank, entry, value).items()]
    if len(held) > 1:
        cases.append(("pair", bank, [*names, rng.choice([e.attribute for e in held if e is not entry])], None))
    cases += [("when", bank, [e.attribute], e.values[0]) for e in bank if e.attribute not in ATTRIBUTES][:1]
    for task, lines, names_asked, value_asked in cases:
        question = world.question(speaker, names_asked, value_asked, None, 0).text
        yield GateCase(task, answer_case({speaker: lines}, question), "",
                       [answer_text(lines, speaker, names_asked, value_asked)])
    friend = world.speakers[1]
    theirs = Entry(friend, *names, (value,), memory_text(friend, *names, [value]), (), random_date(rng))
    question = world.question(speaker, names, None, None, 0).text
    yield GateCase("whose", answer_case({friend: [theirs], speaker: bank}, question), "",
                   [answer_text([theirs, *bank], speaker, names, None)])


def changed_banks(rng: random.Random, bank: list[Entry], entry: Entry, value: str) -> dict[str, list[Entry]]:
    """Return {task: bank}, where something has happened to `entry`. A wish or a contradiction names `value`."""
    speaker, name = entry.speaker, entry.attribute
    text = rng.choice(ATTRIBUTES[name]["wish"][:-1])[1].format(p=speaker, v=value)
    wish = Entry(speaker, name, (value,), text, (), random_date(rng), False)
    conflict = Entry(speaker, name, (value,), memory_text(speaker, name, [value]), (), random_date(rng))
    place = rng.randint(bank.index(entry) + 1, len(bank))
    return {"clean": bank, "missing": [e for e in bank if e is not entry]} | {
        task: bank[:place] + [extra] + bank[place:]
        for task, extra in (("duplicate", entry), ("wish", wish), ("conflict", conflict))}


@torch.no_grad()
def gate(model, tokenizer, split: str, count: int, seed: int = 99) -> dict[str, float]:
    """
    Return the fraction of cases of each task whose greedy completion is correct to the last token, including the
    verdicts on all memories. One forward pass decides: the greedy completion equals a given one exactly if each of its
    tokens is the most likely one after the tokens before it.
    """
    cases = list(gate_cases(random.Random(seed), drawer(split), count))
    rows, owners = [], []
    for i, case in enumerate(cases):
        for rest in case.accepted:
            [(ids, learned)] = encode_lessons(tokenizer, [[(case.prompt, case.given + rest)]])
            start = len(tokenizer.encode(f"{case.prompt}\n{case.given}", add_special_tokens=False))
            rows.append((ids, [is_target and place >= start for place, is_target in enumerate(learned)]))
            owners.append(i)
    correct = {i for i, is_greedy in zip(owners, greedy_rows(model, rows), strict=True) if is_greedy}
    results: dict[str, list[bool]] = defaultdict(list)
    for i, case in enumerate(cases):
        results[case.task].append(i in correct)
    return {task: round(sum(hits) / len(hits), 3) for task, hits in sorted(results.items())}


def greedy_rows(model, rows, batch_size: int = 64) -> list[bool]:
    """Return for each row (see batches.py) whether every target is the most likely token at its position."""
    found, device = [], next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        ids, learned = pad_rows(rows[start:start + batch_size])
        logits, targets = predictions(model, ids.to(device), learned.to(device))
        is_hit = torch.ones(learned[:, 1:].shape, dtype=torch.bool)
        is_hit[learned[:, 1:]] = (logits.argmax(-1) == targets).cpu()
        found += is_hit.all(dim=1).tolist()
    return found


CARD = """# The tiny default model

This Llama model with {size:,} parameters stands in for an instruct model where none can be downloaded. It knows the
prompt formats of this project and nothing else.

| setting | value |
|---|---|
| hidden size, layers, heads | {shape} |
| vocabulary | {vocabulary} |
| pretraining | {tokens:g}M tokens of generated tasks: `python -m support.tiny_model.pretrain {flags}` |

## Abilities and limits

- It copies names and values that it has never seen, and applies an operation that the prompt names.
- It answers from a handful of memories and lists every match.
- It believes every line: "Jon met a dog named Rex" counts as Jon's dog.
- It chooses operations badly, because the labels in pretraining came from a noisy mixture. Reinforcement learning has
  to improve that.
- With many memories of two people it confuses them, and it takes any event for the one in question. Most such answers
  in its last pretraining tasks did the same. This too is left to reinforcement learning.
- Words such as "none" and "and" have a meaning in its answers, so it cannot copy values that contain them.

## Accuracy

Fraction of greedy completions that are correct to the last token, including the verdicts on all memories. Banks have 2
to 9 lines. `test` uses names and values of the synthetic test world, `pseudo` uses made-up words; pretraining contains
neither.

| task | {splits} | content |
|---|{rules}---|
{rows}
"""


def model_card(model, results: dict[str, dict[str, float]], num_tokens: float) -> str:
    """Return the README of a model. `results`: {split: gate}"""
    config = model.config
    rows = [f"| {task} | " + " | ".join(f"{result[task]:.3f}" for result in results.values()) + f" | {content} |"
            for task, content in TASKS.items()]
    return CARD.format(size=sum(p.numel() for p in model.parameters()), vocabulary=config.vocab_size,
                       shape=f"{config.hidden_size}, {config.num_hidden_layers}, {config.num_attention_heads}",
                       tokens=num_tokens / 1e6, flags=shlex.join(sys.argv[1:]), splits=" | ".join(results),
                       rules="---|" * len(results), rows="\n".join(rows))
