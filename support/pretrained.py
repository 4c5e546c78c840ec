"""Load a causal language model and its tokenizer; every failure becomes a one-line UsageError."""
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
import transformers
from transformers.integrations.gguf import reader

from data import UsageError
from support.packing import describe_out_of_memory
from support.text import normalize_whitespace

SOURCES = "give a hub id, a folder with config.json, safetensors, tokenizer.json, or a .gguf file"
SMALL = 50_000_000  # parameters; smaller models are fast enough in float32


def locate(name) -> tuple[str, dict]:
    """The arguments of `from_pretrained` for a hub id, a folder or a .gguf file. UsageError if it is not there."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"model {name}: no such file; {SOURCES}")
        if missing := [package for package in ("gguf", "accelerate") if not find_spec(package)]:
            raise UsageError(f"model {name}: a .gguf file needs optional packages: pip install {' '.join(missing)}")
        return str(path.parent), {"gguf_file": path.name}
    if str(name).startswith((".", "/", "~")) or path.is_dir():
        if not Path(path, "config.json").is_file():  # such as an adapter's folder
            raise UsageError(f"model {name}: no config.json there; give a hub id, a model's folder or a .gguf file")
        return str(path), {}
    return str(name), {}


def num_parameters(name) -> int:
    """
    Number of parameters of a model, tied weights counted once. Reads only its config, or the header of a .gguf file.
    UsageError if it is not there.
    """
    source, options = locate(name)
    try:
        if options:
            return sum(prod(shape) for _, shape, *_ in gguf_header(source, **options)[1])
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
    except Exception as error:  # many kinds, as below
        reason = normalize_whitespace(str(error))[:300]
        raise UsageError(f"model {name}: its size cannot be read ({reason}); {SOURCES}") from None


def gguf_header(folder: str, gguf_file: str) -> tuple[dict, list]:
    """Metadata and tensors [(name, shape, ...)] of a .gguf file. The gguf package's own reader takes seconds."""
    path = str(Path(folder, gguf_file))
    content = reader._mapped(path)
    metadata, count, start = reader._read_metadata(content, path)
    return metadata, reader._read_tensor_table(content, count, start)[0]


def check_rotary(metadata: dict, tensors: list) -> None:
    """ValueError if a .gguf file has scaled rotary positions (Llama 3.1, YaRN), which transformers 5.23 drops."""
    if metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none") != "none" or any(
            name.startswith("rope_f") for name, *_ in tensors):
        raise ValueError("transformers does not read the scaled rotary positions of this .gguf file; take its folder")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(name, device: str) -> str:
    """bfloat16 on a GPU, and for models that are not small on a CPU with bfloat16 matrix products; else float32."""
    cpu = torch.cpu.get_capabilities()
    if device.startswith("cpu") and not (cpu.get("amx_bf16") or cpu.get("avx512_bf16")):
        return "float32"
    return "bfloat16" if not device.startswith("cpu") or num_parameters(name) > SMALL else "float32"


def load_pretrained(name, device=None, dtype=None):
    """(model, tokenizer) from a hub id, a folder or a .gguf file, whose weights are unpacked to `dtype`."""
    (source, options), device = locate(name), str(device or default_device())
    dtype = str(dtype or default_dtype(name, device)).removeprefix("torch.")
    transformers.utils.logging.disable_progress_bar()
    try:
        # Follow tokenizer.json: AutoTokenizer would give every Qwen2 model Qwen's own pre-tokenizer.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(source, **options)
        if options:
            check_rotary(*gguf_header(source, **options))
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), attn_implementation="sdpa", use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, **options)
        model.to(device)
    except Exception as error:  # many kinds: no such model, no network, no GPU, a truncated file
        if reason := describe_out_of_memory(error):
            raise UsageError(f"model {name} as {dtype} on {device}: {reason}; choose a smaller model"
                             f"{' or --dtype bfloat16' * (dtype == 'float32')}") from None
        raise UsageError(f"model {name} as {dtype} on {device}: cannot be loaded "
                         f"({normalize_whitespace(str(error))[:300]}); {SOURCES}") from None
    if loading["missing_keys"]:  # transformers would initialize them at random
        raise UsageError(f"model {name}: no weights for {min(loading['missing_keys'])}; save the model again")
    if not tokenizer.chat_template:
        raise UsageError(f"model {name}: its tokenizer has no chat template; choose an instruct model")
    return model, tokenizer
