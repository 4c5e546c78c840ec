"""
LoRA adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors, with the keys
`base_model.model.<path of the linear layer>.lora_A.weight`. PEFT, transformers and vLLM load them.
"""
import json
from pathlib import Path

from safetensors.torch import load_file, save

from data import UsageError
from support.run import write_file

UNDERSTOOD = {  # fields of adapter_config.json with the values of plain LoRA; () stands for any value
    "peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM"), "bias": ("none",), "use_rslora": (True, False),
    "init_lora_weights": (True, False, "gaussian"),  # the others, such as "pissa", change the base weights
    "megatron_core": ("megatron.core",), "qalora_group_size": (16,),  # defaults without an effect
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "base_model_name_or_path", "revision", "peft_version",
                     "inference_mode", "auto_mapping"), ()),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), ()),  # see the keys
}
OFF = (None, False, {}, [])  # values of any other field: PEFT adds fields that are off by default
PEFT_KEY = "base_model.model.{}.lora_{}.weight"


def write_adapter(folder, base_model: str, matrices: dict, shape: dict) -> None:
    """Write {path: (A, B)} and r, lora_alpha, use_rslora. A kill never leaves a partly written file."""
    folder = Path(folder)
    weights = {PEFT_KEY.format(path, part): x.detach().cpu() for path, pair in matrices.items()
               for part, x in zip("AB", pair, strict=True)}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, **shape,
              "target_modules": sorted({path.split(".")[-1] for path in matrices}),
              "lora_dropout": 0.0, "bias": "none", "modules_to_save": None, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "adapter_model.safetensors", save(weights, metadata={"format": "pt"}))
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2).encode() + b"\n")


def read_adapter(folder):
    """Return (config, weights, scale) from an adapter's or a run's folder. UsageError if it is not plain LoRA."""
    folder = Path(folder, "adapter") if Path(folder, "adapter").is_dir() else Path(folder)
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        weights = load_file(Path(folder, "adapter_model.safetensors"))
        unsupported = [f"{key} {value}" for key, value in {"peft_type": None, **config}.items()
                       if (allowed := UNDERSTOOD.get(key, OFF)) and value not in allowed]
        scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"adapter {folder}: cannot be read ({reason}); give a folder that PEFT saved") from None
    if unsupported:
        raise UsageError(f"adapter {folder}: {unsupported[0]} is not supported; train plain LoRA without bias")
    return config, weights, scale


def match_layers(folder, model_name: str, config: dict, weights: dict, layers: dict) -> dict:
    """{path: (A, B)} for the policy's linear layers. UsageError if the adapter belongs to another model."""
    rank, trained_on, matrices = config["r"], config.get("base_model_name_or_path"), {}
    mismatch = f"adapter {folder} is not for model {model_name} (load the model it was trained on):"
    if len({model_stem(x) for x in (trained_on, model_name) if x}) > 1:
        raise UsageError(f"{mismatch} it names {trained_on}; if the model was only renamed, edit adapter_config.json")
    for path, layer in layers.items():
        pair = [weights.pop(key) for key in (PEFT_KEY.format(path, part) for part in "AB") if key in weights]
        expected = [(rank, layer.base.in_features), (layer.base.out_features, rank)]
        shapes = [tuple(x.shape) for x in pair]
        if shapes not in ([], expected):
            raise UsageError(f"{mismatch} A, B of {path} are {shapes}, but with rank {rank} must be {expected}")
        if pair:
            matrices[path] = pair
    if weights or not matrices:
        raise UsageError(f"{mismatch} it has no linear layer for {min(weights, default='any of its tensors')}")
    return matrices


def model_stem(name: str) -> str:
    """models/Qwen2.5-3B and QWEN2.5-3b.gguf are the same model."""
    return Path(name).resolve().name.lower().removesuffix(".gguf")
