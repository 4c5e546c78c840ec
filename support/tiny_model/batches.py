"""Lessons as padded batches of token ids, and the model's predictions on them. B rows, T tokens, V vocabulary."""
import random

import torch

from support.tiny_model import lessons


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
