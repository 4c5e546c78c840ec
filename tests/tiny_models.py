"""Tiny random models of several families, their tokenizer, and prompts and completions of token ids for them."""
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

V, EOS = 61, [2, 7, 11, 13]  # several EOS tokens, so that random completions are short
TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
            "{% if add_generation_prompt %}<assistant> {% endif %}")
SIZE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, eos_token_id=2,
            pad_token_id=0)
CONFIGS = {  # Qwen2 has biases on q, k, v. Two key heads serve four query heads, except in llama-untied.
    "qwen2": Qwen2Config(**SIZE, tie_word_embeddings=True),
    "qwen2-untied": Qwen2Config(**SIZE, tie_word_embeddings=False),
    "llama": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SIZE | dict(num_key_value_heads=4), tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZE, sliding_window=None),
    "qwen3": Qwen3Config(**SIZE, head_dim=8),
    "mistral-window": MistralConfig(**SIZE, sliding_window=6),
    "qwen2-window": Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "granite": GraniteConfig(**SIZE, logits_scaling=4.0),
}
PACKED = ["qwen2", "qwen2-untied", "llama", "llama-untied", "mistral", "qwen3"]
WINDOWED = ["mistral-window", "qwen2-window"]
PROMPTS = [[5, 9, 31, 4, 8, 20, 33], [40, 41], [6, 12, 55, 3, 17]]
COMPLETIONS = [[[14, 15, 16, 2], [20]], [[21, 22, 23], [24] * 20, [25, 2]],
               [[30, 31], [32, 33, 34, 35, 2], [], [36]]]


def make_tokenizer():
    words = ["<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>", *(f"w{i}" for i in range(6, V))]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=TEMPLATE, pad_token="<pad>",
                                   unk_token="<unk>", eos_token="<end>")


def save_models(root):
    """Write a random model of each family into root/KIND."""
    for i, (kind, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(i)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in a new model, which would hide a lost bias
                torch.nn.init.normal_(parameter, std=0.5)
        model.generation_config.eos_token_id = EOS
        model.save_pretrained(root / kind)
        make_tokenizer().save_pretrained(root / kind)


def base_model(folders, kind="qwen2"):
    return AutoModelForCausalLM.from_pretrained(folders / kind, dtype=torch.float32).eval()


def logits_of(model, ids=(5, 9, 31, 4, 8)):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def wake_adapter(policy, name, std=0.2):
    """Draw B, which is 0 in a new adapter, as if the adapter had been trained."""
    for parameter in policy.parameters(name)[1::2]:
        torch.nn.init.normal_(parameter, std=std)
