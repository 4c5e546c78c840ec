"""
Lessons as padded batches of token ids, and the model's predictions for them. A row is a pair (ids, learned): `learned`
is True where a token is a target. B rows, T tokens in the longest row, N targets in all, V vocabulary.
"""
import random
from collections.abc import Iterator

import torch

from support.tiny_model import lessons

NUM_LESSONS, NUM_COPIES = 366, 18  # lessons and copy rows in a round of batches


def copy_lesson(rng: random.Random, kinds, longest: int) -> tuple[list[int], list[bool]]:
    """Return random tokens out of `kinds`, a gap, and the same tokens again, all but the first of them as targets."""
    tokens = [rng.choice(kinds) for _ in range(rng.randint(4, longest))]
    gap = [rng.choice(kinds) for _ in range(rng.randint(0, longest))]
    return tokens + gap + tokens, [False] * (len(tokens) + len(gap) + 1) + [True] * (len(tokens) - 1)


def encode_lessons(tokenizer, batch) -> list[tuple[list[int], list[bool]]]:
    """Lists of (prompt, completion) -> rows. The targets are the completions, each with an EOS."""
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


def batches(rng, tokenizer, pieces, progress: float, tokens: int, longest: int = 1024) -> Iterator:
    """
    Yield a round of lessons, in random order, as batches of at most `tokens` tokens, padding included. Rows of similar
    length share a batch; lessons of more than `longest` tokens are left out. -> ids, learned (B, T)
    """
    rows = encode_lessons(tokenizer, [lessons.lesson(rng, lessons.lesson_drawer(rng, pieces), progress)
                                      for _ in range(NUM_LESSONS)])
    vocabulary = range(2, len(tokenizer))
    # Half of the copies consist of few kinds of tokens: the order is then all that distinguishes them.
    rows += [copy_lesson(rng, kinds, 24) for _ in range(NUM_COPIES // 2)
             for kinds in (vocabulary, rng.sample(vocabulary, 12))]
    rows = sorted((row for row in rows if len(row[0]) <= longest), key=lambda row: len(row[0]))
    groups = [[]]
    for row in rows:
        if (len(groups[-1]) + 1) * len(row[0]) > tokens:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    for group in filter(None, groups):
        yield pad_rows(group)


def pad_rows(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows -> ids (B, T), padded with 0, and learned (B, T) bool."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    learned = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, mask) in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
        learned[i, :len(row)] = torch.tensor(mask)
    return ids, learned


def predictions(model, ids, learned) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits that predict the targets, and the targets. ids, learned (B, T) -> (N, V), (N,)"""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return model.lm_head(hidden[learned[:, 1:]]), ids[:, 1:][learned[:, 1:]]
