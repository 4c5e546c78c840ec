"""Load a causal language model and its tokenizer; every failure becomes a one-line UsageError."""
from pathlib import Path

import torch
import transformers

from data import UsageError


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def num_parameters(name) -> int:
    """The number of parameters of a model, from its configuration alone. UsageError if that cannot be read."""
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(name))
    except Exception as error:
        raise UsageError(f"model {name}: its configuration cannot be read ({error})") from None
    return model.num_parameters()


def load_pretrained(name, device=None, dtype=None):
    """(model, tokenizer) from a hub id or folder. Default dtype: bfloat16 on a GPU, float32 on a CPU."""
    name, device = str(name), str(device or default_device())
    dtype = str(dtype or ("bfloat16" if device.startswith("cuda") else "float32")).removeprefix("torch.")
    if name.startswith((".", "/", "~")) or Path(name).is_dir():
        name = str(Path(name).expanduser())
        if not Path(name, "config.json").is_file():  # for example an adapter's folder
            raise UsageError(f"model {name}: no config.json there; give a hub id or a model's folder")
    transformers.utils.logging.disable_progress_bar()
    try:
        # Follow tokenizer.json: AutoTokenizer would give every Qwen2 model Qwen's own pre-tokenizer.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), attn_implementation="sdpa", use_safetensors=True,
            trust_remote_code=False, output_loading_info=True)
        model.to(device)
    except Exception as error:  # many kinds: no such model, no network, no GPU, a truncated file
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"model {name} as {dtype} on {device}: cannot be loaded ({reason}); give a hub "
                         "id or a folder with config.json, safetensors, tokenizer.json") from None
    if loading["missing_keys"]:  # transformers would initialize them at random
        raise UsageError(f"model {name}: no weights for {min(loading['missing_keys'])}; save the model again")
    check_chat_template(name, tokenizer)
    return model, tokenizer


def check_chat_template(name: str, tokenizer) -> None:
    if not tokenizer.chat_template:
        raise UsageError(f"model {name}: its tokenizer has no chat template; choose an instruct model")
    try:
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}])
    except Exception as error:  # whatever a template raises; some refuse system messages
        raise UsageError(f"model {name}: its chat template fails ({error}); choose a model whose template "
                         "accepts a system message") from None
