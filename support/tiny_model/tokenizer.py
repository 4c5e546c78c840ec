"""The tokenizer of the tiny model: byte-level BPE, trained on lessons about made-up words."""
import json
import random
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.synthetic import WORDS
from support.tiny_model import lessons

CHAT_TEMPLATE = ("{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] + '\n' }}"
                 "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}")
# Parts of the Manager's JSON, one token each. The choice of an operation then takes two tokens.
CHUNKS = ['[{"event":"', '","old_memory":"', '","text":"', '"}]']
WORD_PATTERN = Regex(r"'s| ?[A-Za-z]+| ?[0-9]+|\n| ?[^\sA-Za-z0-9]+|\s")


def trigram_drawer(rng: random.Random, words: list[str]):
    """
    Return a `draw` function (see lessons.py) for made-up words with the letter trigrams of `words`. Trained on them,
    the tokenizer learns pieces of names, not names.
    """
    follow = {}  # two letters -> letters that follow them; ^^ begins and $ ends a word
    for word in words:
        marked = f"^^{word.lower()}$"
        for i in range(len(marked) - 2):
            follow.setdefault(marked[i:i + 2], []).append(marked[i + 2])

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
    """Train the tokenizer. Words of the prompt formats become tokens; names consist of several tokens."""
    words = [part for pool in WORDS["pretrain"].values() for word in pool for part in word.split()]
    draw = trigram_drawer(rng, words)
    corpus = ["".join(f"\n{i} ({i % 31 + 1} May {2021 + i % 5})" for i in range(65))] * 200  # numbers of memories
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
    """Save the tokenizer under a class name that AutoTokenizer knows in every release of transformers."""
    tokenizer.save_pretrained(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>",
              "model_max_length": tokenizer.model_max_length, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def name_pieces(tokenizer) -> list[str]:
    """Return the short alphabetic pieces of the vocabulary, from which lessons form names and values."""
    found = {token.replace("Ġ", "").lower() for token in tokenizer.get_vocab()
             if re.fullmatch("Ġ?[A-Za-z]{1,4}", token)}
    return sorted(found - {"none", "and"})  # these have a meaning in answers
