"""
Makes the tiny default model from nothing: tokenizer, weights, model card. An hour or more of one CPU core.

    python -m support.tiny_model.pretrain                          # writes data/tiny
    python -m support.tiny_model.pretrain --tokens 1e6 --out /tmp/tiny     # a quick look
    python -m support.tiny_model.pretrain --init /tmp/tiny --tokens 20e6   # go on from a finished model
    torchrun --nproc_per_node=2 -m data.pretrain             # two processes, twice the tokens a step

The model is a Llama of 1.5M parameters. Three things make copying possible at this size (nothing else did):
1. Heads that look 1, 2 and 3 tokens back are there from the start, set by the biases of layer 0's queries and keys.
2. A few hundred steps of copying random tokens come first, and some such sequences stay in the mixture.
3. Names and values are glued from pieces of the vocabulary, so that every piece has been copied.
`data/lessons.py` says what it is taught; the gate below measures it, and the model card quotes the gate.
"""
import argparse
import copy
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.synthetic import ATTRIBUTES, WORDS, drawer
from support.tiny_model import lessons

CHAT_TEMPLATE = ("{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] + '\n' }}"
                 "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}")
# Pieces of the JSON the Manager writes, one token each: an operation is then decided by two tokens.
CHUNKS = ['[{"event":"', '","old_memory":"', '","text":"', '"}]']
WORD_PATTERN = Regex(r"'s| ?[A-Za-z]+| ?[0-9]+|\n| ?[^\sA-Za-z0-9]+|\s")


# ---------------------------------------------------------------------------------------------- tokenizer

def letters_like(rng: random.Random, words: list[str]):
    """Draws made-up words with the letter triples of `words`: the tokenizer should learn pieces, not names."""
    follow = {}
    for word in words:
        padded = f"^^{word.lower()}$"
        for i in range(len(padded) - 2):
            follow.setdefault(padded[i:i + 2], []).append(padded[i + 2])

    def draw(rng, pool):
        while True:
            word = "^^"
            while not word.endswith("$") and len(word) < 14:
                word += rng.choice(follow[word[-2:]])
            word = word.strip("^$")
            if len(word) > 2:
                return word.capitalize() if rng.random() < 0.6 else word
    return draw


def make_tokenizer(vocab_size: int, rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE over lessons about made-up words: template words become tokens, names become pieces."""
    words = [part for pool in WORDS["pretrain"].values() for word in pool for part in word.split()]
    draw = letters_like(rng, words)
    corpus = ["".join(f"\n{i} ({i % 31 + 1} May {2021 + i % 5})" for i in range(65))] * 200
    for _ in range(12000):
        corpus += [prompt + "\n" + completion for prompt, completion in lessons.lesson(rng, draw, 0.9)]
    corpus += [" " + draw(rng, "") for _ in range(60000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(WORD_PATTERN, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(CHUNKS), special_tokens=["<pad>", "<eos>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    chunk = re.compile("|".join(map(re.escape, CHUNKS)))
    tokenizer.train_from_iterator((part for text in corpus for part in chunk.split(text)), trainer)
    tokenizer.add_tokens(CHUNKS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>",
                                   chat_template=CHAT_TEMPLATE, model_max_length=4096,
                                   clean_up_tokenization_spaces=False)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """A tokenizer folder that AutoTokenizer loads, under the class name that every release of transformers knows."""
    tokenizer.save_pretrained(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>",
              "model_max_length": tokenizer.model_max_length, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_model(model, folder: Path) -> None:
    """In float16; the copy in training stays as it is. `eager` attention was only for training's backward pass."""
    saved = copy.deepcopy(model).half().cpu()
    saved.config._attn_implementation = "sdpa"
    saved.save_pretrained(folder)


def name_pieces(tokenizer) -> list[str]:
    """The vocabulary's short alphabetic pieces, which glued names are made of."""
    found = {token.replace("Ġ", "").lower() for token in tokenizer.get_vocab()
             if re.fullmatch("Ġ?[A-Za-z]{1,4}", token)}
    return sorted(found - {"none", "and"})  # these two mean something in an answer


# ---------------------------------------------------------------------------------------------- model

def make_model(vocab_size: int) -> LlamaForCausalLM:
    """Llama with biases in its attention, which is Qwen2 but in name; that name would get it Qwen's tokenizer."""
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
                         rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, attention_bias=True,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
                         attn_implementation="eager")
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = math.sqrt(2 * config.num_hidden_layers) if residual else 1
                p.normal_(std=0.6 / math.sqrt(p.shape[1]) / depth)
        look_back(model, 1000.0)
    return model


def look_back(model, theta: float) -> None:
    """
    Makes head h of layer 0 attend to the token h + 1 places back, for h = 0, 1, 2, by biases alone.
    Rotary embedding turns pair j of a query at position t by the angle t * theta^(-2j/d). A constant key bias b_k and
    a query bias that is b_k turned by -(h + 1) * theta^(-2j/d) agree best where the distance is h + 1.
    """
    attention = model.model.layers[0].self_attn
    d = attention.head_dim
    angle = theta ** (-torch.arange(0, d, 2).float() / d)  # (d/2,)
    for head in range(3):
        rows = slice(head * d, (head + 1) * d)
        turn = -(head + 1) * angle
        attention.k_proj.bias[rows] = torch.cat([torch.full((d // 2,), 3.0), torch.zeros(d // 2)])
        attention.q_proj.bias[rows] = 3.0 * torch.cat([turn.cos(), turn.sin()])
        attention.q_proj.weight[rows] *= 0.3
        attention.k_proj.weight[rows] *= 0.3


def make_optimizers(model, lr: float, muon_lr: float):
    """Muon on the matrices, AdamW on embeddings, biases and norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed" in name]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
                  torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.02, momentum=0.95)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["peak"] = optimizer.param_groups[0]["lr"]
    return optimizers


# ---------------------------------------------------------------------------------------------- lessons to tensors

def copy_lesson(rng: random.Random, kinds, longest: int):
    """Random tokens out of `kinds`, a gap, the same tokens again: (ids, learned)."""
    tokens = [rng.choice(kinds) for _ in range(rng.randint(4, longest))]
    gap = [rng.choice(kinds) for _ in range(rng.randint(0, longest))]
    return tokens + gap + tokens, [False] * (len(tokens) + len(gap) + 1) + [True] * (len(tokens) - 1)


def encode_lessons(tokenizer, batch):
    """Lists of (prompt, completion) pairs -> lists of (ids, learned); EOS ends every completion."""
    texts = [text for pairs in batch for prompt, completion in pairs for text in (prompt + "\n", completion)]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
    rows = []
    for pairs in batch:
        ids, learned = [], []
        for _ in pairs:
            prompt, completion = next(encoded).ids, [*next(encoded).ids, tokenizer.eos_token_id]
            ids += prompt + completion
            learned += [False] * len(prompt) + [True] * len(completion)
        rows.append((ids, learned))
    return rows


def batches(rng, tokenizer, pieces, progress: float, tokens: int, longest: int = 1024):
    """Some hundred lessons cut into batches of at most `tokens` padded tokens: tensors ids, learned (B, T)."""
    rows = encode_lessons(tokenizer, [lessons.lesson(rng, lessons.lesson_drawer(rng, pieces), progress)
                                      for _ in range(366)])
    every = range(2, len(tokenizer))  # and, in half of the copying, few kinds of token: alike but for their order
    rows += [copy_lesson(rng, kinds, 24) for _ in range(9) for kinds in (every, rng.sample(every, 12))]
    rows = sorted((row for row in rows if len(row[0]) <= longest), key=lambda row: len(row[0]))
    groups = [[]]
    for row in rows:
        if (len(groups[-1]) + 1) * len(row[0]) > tokens:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    for group in filter(None, groups):
        yield padded(group)


def padded(rows):
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    learned = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, mask) in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
        learned[i, :len(row)] = torch.tensor(mask)
    return ids, learned


def predictions(model, ids, learned):
    """Logits at the places that predict a learned token, and those tokens: (N, V), (N,)."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return model.lm_head(hidden[learned[:, 1:]]), ids[:, 1:][learned[:, 1:]]


# ---------------------------------------------------------------------------------------------- training

def step(model, optimizers, ids, learned, scale: float):
    """One update at `scale` times the peak learning rates. Returns loss and accuracy of the learned tokens."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits, targets = predictions(model, ids, learned)
    loss = F.cross_entropy(logits.float(), targets)
    loss.backward()
    if dist.is_initialized():
        for p in model.parameters():
            dist.all_reduce(p.grad.div_(dist.get_world_size()))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = scale * optimizer.param_groups[0]["peak"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item(), (logits.argmax(-1) == targets).float().mean().item()


def learn_to_copy(model, optimizers, rng, vocab_size: int, device: str) -> None:
    """400 batches of random tokens to be repeated."""
    for i in range(400):
        ids, learned = padded([copy_lesson(rng, range(2, vocab_size), 8 if i < 130 else 20) for _ in range(64)])
        loss, accuracy = step(model, optimizers, ids.to(device), learned.to(device), min(1.0, (i + 1) / 50))
        if i % 100 == 99:
            print(f"copying {i + 1:4d}  loss {loss:.3f}  accuracy {accuracy:.3f}", flush=True)


def pretrain(model, tokenizer, args, begin: float) -> None:
    """
    `args.tokens` tokens of lessons, from progress `begin` (0: from scratch) to 1. The learning rate is flat until
    progress 0.3, then falls linearly to 1 %; the lessons follow the same progress.
    """
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rng, start, seen, steps, smooth = random.Random(args.seed + 1000 * rank), time.time(), 0, 0, None
    optimizers, device = make_optimizers(model, 2e-3, 0.02), args.device
    if begin == 0:
        learn_to_copy(model, optimizers, rng, len(tokenizer), device)

    def progress() -> float:
        return min(1.0, begin + (1 - begin) * seen / args.tokens)

    pieces, next_gate = name_pieces(tokenizer), 0.1
    rounds = (batches(rng, tokenizer, pieces, progress(), args.batch_tokens) for _ in itertools.count())
    for ids, learned in itertools.chain.from_iterable(rounds):
        scale = min(1.0, (steps + 1) / 50) * (1.0 if progress() < 0.3 else max(0.01, (1 - progress()) / 0.7))
        loss, _ = step(model, optimizers, ids.to(device), learned.to(device), scale)
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        count = (ids != 0).sum()
        if num_ranks > 1:
            dist.all_reduce(count)  # all stop at the same step
        seen, steps = seen + int(count), steps + 1
        if rank == 0 and steps % 250 == 0:
            spent = time.time() - start
            print(f"step {steps:6d}  {seen / 1e6:6.2f}M tokens  loss {smooth:.4f}  {seen / spent:.0f} tokens/s  "
                  f"{spent:.0f} s", flush=True)
        if rank == 0 and seen / args.tokens > next_gate:
            next_gate += 0.1
            print("  gate", json.dumps(gate(model, tokenizer, "test", 60)), flush=True)
            save_model(model, args.out / "unfinished")
        if seen >= args.tokens:
            return


# ---------------------------------------------------------------------------------------------- gate

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


# ---------------------------------------------------------------------------------------------- main

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--out", default=Path(__file__).parent / "tiny", type=Path)
    parser.add_argument("--init", type=Path, help="folder of a finished model to go on from")
    parser.add_argument("--begin", type=float, help="progress to begin at, 0 to 1 (0; with --init 0.55)")
    parser.add_argument("--tokens", default=30e6, type=float, help="tokens of lessons (30e6)")
    parser.add_argument("--batch-tokens", default=4096, type=int, help="padded tokens a step (4096)")
    parser.add_argument("--vocabulary", default=2048, type=int)
    parser.add_argument("--seed", default=7, type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init)
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32, attn_implementation="eager")
    else:
        tokenizer = make_tokenizer(args.vocabulary, random.Random(args.seed))
        model = make_model(len(tokenizer))
    model.to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}, "
          f"{len(name_pieces(tokenizer))} name pieces, seed {args.seed}", flush=True)
    pretrain(model, tokenizer, args, (0.55 if args.init else 0.0) if args.begin is None else args.begin)
    if dist.is_initialized() and dist.get_rank():
        return
    results = {split: gate(model.eval(), tokenizer, split, 300) for split in ("test", "pseudo")}
    save_tokenizer(tokenizer, args.out)
    save_model(model, args.out)
    shutil.rmtree(args.out / "unfinished", ignore_errors=True)
    (args.out / "README.md").write_text(model_card(model, results, args))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
