"""Adapters in PEFT's format, in both directions; adapters that cannot be loaded."""
import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import base_model, logits_of

from data import UsageError


def test_peft_loads_ours(load, model_folders, tmp_path):
    policy = load()
    policy.save_adapter("manager", tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base_model(model_folders), tmp_path / "adapter").eval()
    with policy.using("manager"):
        torch.testing.assert_close(logits_of(policy.model), logits_of(theirs), atol=1e-5, rtol=0)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    assert len(saved) == 28 and len(list((tmp_path / "adapter").iterdir())) == 2


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_and_save_adapters_of_peft(load, model_folders, tmp_path, targets, rslora):
    theirs = peft.get_peft_model(base_model(model_folders), peft.LoraConfig(
        r=3, lora_alpha=9, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM"))
    for name, x in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.2)
    theirs.eval().save_pretrained(tmp_path)
    policy = load()  # its own "manager" has another rank and more layers
    policy.load_adapter("manager", tmp_path)
    policy.save_adapter("manager", tmp_path / "again")
    policy.load_adapter("other", tmp_path / "again")
    for name in ("manager", "other"):
        with policy.using(name):
            torch.testing.assert_close(logits_of(policy.model), logits_of(theirs), atol=1e-5, rtol=0)
    assert len(policy.parameters("manager")) == sum("lora_" in name for name, _ in theirs.named_parameters())


def test_a_kill_while_saving_leaves_the_old_adapter(load, tmp_path, monkeypatch):
    policy = load(adapters=("manager", "answer"))
    policy.save_adapter("manager", tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        policy.save_adapter("answer", tmp_path)
    policy.load_adapter("copy", tmp_path)
    for a, b in zip(policy.parameters("copy"), policy.parameters("manager"), strict=True):
        assert torch.equal(a, b)


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("fields", [
    dict(init_lora_weights=True), dict(init_lora_weights=False), dict(init_lora_weights="gaussian"),
    dict(task_type=None, auto_mapping={"base_model_class": "Qwen2ForCausalLM"}), dict(revision="1", lora_dropout=0.1),
    dict(invented_tomorrow=None, off_by_default=False, patterns={}, names=[]), dict(layers_to_transform=[0, 1])])
def test_fields_without_an_effect_are_accepted(load, tmp_path, fields):
    policy = load()
    policy.save_adapter("manager", tmp_path)
    edit(tmp_path, **fields)
    policy.load_adapter("copy", tmp_path)
    for a, b in zip(policy.parameters("copy"), policy.parameters("manager"), strict=True):
        assert torch.equal(a, b)


def reshape(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {key: x[:, :-1].contiguous() for key, x in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")


def rename(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 32)
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("spoil, names", [
    (lambda f: (f / "adapter_config.json").unlink(), ["adapter_config.json"]),
    (lambda f: (f / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors"]),
    (lambda f: (f / "adapter_config.json").write_text("{"), ["cannot be read"]),
    (lambda f: (f / "adapter_config.json").write_text("[]"), ["cannot be read"]),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 20), ["cannot be read"]),
    (lambda f: edit(f, r="4"), ["cannot be read"]),
    (lambda f: edit(f, r=5), ["rank 5", "(4, 32)", "(5, 32)"]),
    (lambda f: edit(f, bias="all"), ["bias all"]),
    (lambda f: edit(f, use_dora=True), ["use_dora"]),
    (lambda f: edit(f, init_lora_weights="pissa"), ["init_lora_weights pissa"]),
    (lambda f: edit(f, init_lora_weights="pissa_niter_16"), ["init_lora_weights pissa_niter_16"]),
    (lambda f: edit(f, init_lora_weights="olora"), ["init_lora_weights olora"]),
    (lambda f: edit(f, init_lora_weights={"a": 1}), ["init_lora_weights"]),
    (lambda f: edit(f, bias="lora_only"), ["bias lora_only"]),
    (lambda f: edit(f, lora_bias=True), ["lora_bias True"]),
    (lambda f: edit(f, use_rslora="yes"), ["use_rslora yes"]),
    (lambda f: edit(f, task_type="SEQ_CLS"), ["task_type SEQ_CLS"]),
    (lambda f: edit(f, modules_to_save=["lm_head"]), ["modules_to_save"]),
    (lambda f: edit(f, alpha_pattern={"q_proj": 8}), ["alpha_pattern"]),
    (lambda f: edit(f, layer_replication=[[0, 2]]), ["layer_replication"]),
    (lambda f: edit(f, target_parameters=["mlp.experts"]), ["target_parameters"]),
    (lambda f: edit(f, fan_in_fan_out=True), ["fan_in_fan_out"]),
    (lambda f: edit(f, trainable_token_indices=[7]), ["trainable_token_indices"]),
    (lambda f: edit(f, use_qalora=True), ["use_qalora"]),
    (lambda f: edit(f, kasa_config={"k": 1}), ["kasa_config"]),
    (lambda f: edit(f, invented_tomorrow=0.5), ["invented_tomorrow"]),
    (lambda f: edit(f, peft_type=None), ["peft_type None"]),
    (lambda f: edit(f, rank_pattern={"q_proj": 8}), ["rank_pattern"]),
    (lambda f: edit(f, peft_type="LOHA"), ["LOHA"]),
    (lambda f: edit(f, base_model_name_or_path="Qwen/Qwen2.5-7B"), ["Qwen/Qwen2.5-7B", "qwen2"]),
    (reshape, ["(4, 31)", "(4, 32)"]),
    (rename, ["lm_head"]),
])
def test_a_bad_adapter_is_one_line(load, tmp_path, spoil, names):
    policy = load()
    policy.save_adapter("manager", tmp_path)
    spoil(tmp_path)
    before = policy.parameters("manager")
    with pytest.raises(UsageError) as error:
        policy.load_adapter("manager", tmp_path)
    for part in [str(tmp_path), *names]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert all(a is b for a, b in zip(policy.parameters("manager"), before, strict=True))


def test_the_same_base_model_under_another_path_is_accepted(load, model_folders, tmp_path, monkeypatch):
    policy = load()
    monkeypatch.chdir(model_folders)
    for name in ("qwen2", "./qwen2/", "Org/Qwen2", "", None):
        policy.save_adapter("manager", tmp_path)
        edit(tmp_path, base_model_name_or_path=name)
        policy.load_adapter("manager", tmp_path)
