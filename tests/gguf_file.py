"""Writes a random Qwen2 model with a byte-level tokenizer as a .gguf file, as converters of real models do."""
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the"]
TOKENS = [*bytes_to_unicode().values(), "th", "the", "Ġthe", *SPECIAL]
IDS = {token: i for i, token in enumerate(TOKENS)}
SIZES = dict(vocab_size=len(TOKENS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2, eos_token_id=IDS["<|im_end|>"],
             bos_token_id=None, pad_token_id=IDS["<|endoftext|>"], tie_word_embeddings=True)


def random_model():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1000.0}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero in a new model, which would hide a lost bias
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def write_gguf(path, model, **metadata):
    """`metadata`: further keys of the file, with their values as text."""
    gguf = pytest.importorskip("gguf", reason=".gguf files need the gguf package")
    pytest.importorskip("accelerate", reason="transformers needs accelerate for .gguf files")
    writer, config = gguf.GGUFWriter(path, "qwen2"), model.config
    for key, value in metadata.items():
        writer.add_string(key, value)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])  # 3: control token
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, x in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            stem, _, kind = name.rpartition(".")
            writer.add_tensor(f"{names.get_name(stem)}.{kind}", x.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
