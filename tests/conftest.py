"""What several tests share: a policy that answers by a rule, and a tiny random Qwen2 that spells letter by letter."""
import string
from contextlib import contextmanager

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from policy import Completion, Policy

SPECIAL = ["<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>"]
TEMPLATE = ("{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


class Fake:
    """A policy whose completions are rule(messages), its tokens words. It remembers what it was asked, and as whom."""

    def __init__(self, rule=lambda messages: ""):
        self.rule, self.words, self.chats, self.role = rule, {}, {}, "nobody"
        self.calls = []  # (role, number of prompts, options) of each `sample`

    def encode(self, messages):
        words = "\n".join(message["content"] for message in messages).split()
        ids = [self.words.setdefault(word, len(self.words)) for word in words]
        self.chats[tuple(ids)] = messages
        return ids

    @contextmanager
    def using(self, name):
        before, self.role = self.role, name
        try:
            yield self
        finally:
            self.role = before

    def sample(self, prompts, n=1, max_new_tokens=64, temperature=1.0):
        self.calls.append((self.role, len(prompts), (n, max_new_tokens, temperature)))
        texts = [self.rule(self.chats[tuple(prompt)]) for prompt in prompts]
        return [[Completion([0], [0.0], True, text)] * n for text in texts]


@pytest.fixture
def fake():
    return Fake


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    letters = [*SPECIAL, *(char for char in string.printable if char not in "\t\r\x0b\x0c")]
    spelled = Tokenizer(models.WordLevel({word: i for i, word in enumerate(letters)}, unk_token="<unk>"))
    spelled.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    spelled.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spelled, pad_token="<pad>", unk_token="<unk>", eos_token="<end>",
        additional_special_tokens=SPECIAL[3:], chat_template=TEMPLATE)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=len(letters), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2, eos_token_id=2, pad_token_id=0))
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder):
    """A fresh policy with one adapter, "agent", that already changes something."""
    def load(b=0.2):
        policy = Policy.load(tiny_folder, device="cpu")
        torch.manual_seed(1)
        policy.add_adapter("agent", rank=4, alpha=8)
        for parameter in policy.parameters("agent")[1::2]:
            torch.nn.init.normal_(parameter, std=b)
        return policy
    torch.set_num_threads(1)
    return load
