"""The tiny model's tokenizer: byte-level BPE over lessons about made-up words."""
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
# Parts of the Manager's JSON that are one token each, so that two tokens decide an operation.
CHUNKS = ['[{"event":"', '","old_memory":"', '","text":"', '"}]']
WORD_PATTERN = Regex(r"'s| ?[A-Za-z]+| ?[0-9]+|\n| ?[^\sA-Za-z0-9]+|\s")


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


def name_pieces(tokenizer) -> list[str]:
    """The vocabulary's short alphabetic pieces, which glued names are made of."""
    found = {token.replace("Ġ", "").lower() for token in tokenizer.get_vocab()
             if re.fullmatch("Ġ?[A-Za-z]{1,4}", token)}
    return sorted(found - {"none", "and"})  # these two mean something in an answer
