"""LoRA adapters against their equation and the base model; text; models that cannot be loaded."""
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import COMPLETIONS, PACKED, PROMPTS, V, base_model, logits_of, make_tokenizer
from transformers import AutoModelForCausalLM

from data import UsageError
from policy import Policy


@pytest.mark.parametrize("kind", PACKED)
def test_new_adapter_changes_nothing_and_lora_off_is_the_base(load, model_folders, kind):
    policy, expected = load(kind, adapters=()), logits_of(base_model(model_folders, kind))
    policy.add_adapter("new", rank=4, alpha=8)
    with policy.using("new"):
        assert torch.equal(logits_of(policy.model), expected)
    for x in policy.parameters("new"):
        torch.nn.init.normal_(x)
    with policy.using("new"):
        assert not torch.allclose(logits_of(policy.model), expected, atol=0.1)
        with policy.using(None):
            assert torch.equal(logits_of(policy.model), expected)
    assert torch.equal(logits_of(policy.model), expected)
    assert len(policy.layers) == 14 and not any("lm_head" in path for path in policy.layers)


def test_lora_is_its_equation(load):
    layer = next(iter(load().layers.values()))
    x, (A, B, scale) = torch.randn(3, 32), layer.adapters["manager"]
    layer.policy.active = "manager"
    W = layer.base.weight + 8 / 4 * B @ A
    assert scale == 2
    torch.testing.assert_close(layer(x), x @ W.T + layer.base.bias, atol=1e-5, rtol=1e-5)


def test_using_nests_and_restores_after_an_exception(load):
    policy = load(adapters=("manager", "answer"))
    with pytest.raises(KeyError), policy.using("manager"):
        with policy.using(None), policy.using("answer"):
            raise KeyError
    assert policy.active is None
    with policy.using("manager"):
        with policy.using("answer"):
            pass
        assert policy.active == "manager"
    with pytest.raises(AssertionError, match="critic"), policy.using("critic"):
        pass


def test_training_one_adapter_moves_only_that_one(load):
    policy = load(adapters=("manager", "answer"))
    base = {name: x.clone() for name, x in policy.model.named_parameters()}
    frozen = [x.clone() for x in policy.parameters("answer")]
    with policy.using("answer"):
        answer = policy.score(PROMPTS, COMPLETIONS).logp
    optimizer = torch.optim.AdamW(policy.parameters("manager"), lr=0.1)
    with policy.using("manager"):
        manager = policy.score(PROMPTS, COMPLETIONS).logp
        assert not torch.allclose(manager, answer, atol=0.1)
        manager.sum().backward()
    assert all(x.grad is None for x in policy.parameters("answer"))
    assert all(x.grad.abs().max() > 0 for x in policy.parameters("manager"))
    assert len(policy.parameters("manager")) == 2 * 14
    optimizer.step()
    for name, x in policy.model.named_parameters():
        assert torch.equal(x, base[name]) and not x.requires_grad and x.grad is None, name
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters("answer"), frozen, strict=True))
    with policy.using("answer"):
        assert torch.equal(policy.score(PROMPTS, COMPLETIONS).logp, answer)


def test_bfloat16_base_keeps_float32_adapters(load):
    policy = load(dtype="bfloat16")
    with policy.using("manager"):
        scores = policy.score(PROMPTS, COMPLETIONS)
        scores.logp.sum().backward()
        assert logits_of(policy.model).dtype == torch.bfloat16 and scores.logp.dtype == torch.float32
        assert all(x.dtype == x.grad.dtype == torch.float32 for x in policy.parameters("manager"))
        sampled = policy.sample(PROMPTS, n=4, max_new_tokens=10)
    assert all(len(c.ids) == len(c.logps) for group in sampled for c in group)


def test_chat_template_and_text(load):
    policy = load()
    messages = [{"role": "system", "content": "w9 w10"}, {"role": "user", "content": "w11"}]
    assert policy.encode(messages) == [3, 9, 10, 2, 4, 11, 2, 5]
    assert policy.decode([9, 10, 2]) == "w9 w10"
    policy.eos = torch.tensor([2, 9])  # 9 is an EOS of the model that the tokenizer does not know
    groups = policy.sample([[i] for i in range(3, 40)], max_new_tokens=6)
    assert any(c.ids[-1] == 9 for [c] in groups)
    words = ["", "", "", "<system>", "<user>", "<assistant>", *(f"w{i}" for i in range(6, V))]
    for [c] in groups:
        assert c.text.split() == [words[i] for i in c.ids[:len(c.ids) - c.finished] if words[i]]


def no_template(folder):
    slow = make_tokenizer()
    slow.chat_template = None
    (folder / "chat_template.jinja").unlink()
    slow.save_pretrained(folder)


def lose_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("spoil, names", [
    (lambda f: (f / "config.json").unlink(), ["config.json"]),
    (lambda f: (f / "config.json").write_text("{"), []),
    (lambda f: (f / "config.json").write_text('{"model_type": "none-such"}'), []),
    (lambda f: (f / "model.safetensors").unlink(), ["safetensors"]),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 20), []),
    (lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], ["tokenizer"]),
    (no_template, ["chat template"]),
    (lose_weights, ["model.layers.1.mlp.up_proj.weight"]),
])
def test_a_bad_model_is_one_line(model_folders, tmp_path, spoil, names):
    AutoModelForCausalLM.from_pretrained(model_folders / "qwen2").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    Policy.load(tmp_path, device="cpu")
    spoil(tmp_path)
    with pytest.raises(UsageError) as error:
        Policy.load(tmp_path, device="cpu")
    for part in [str(tmp_path), *names]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, names", [
    (dict(name="/no/such/folder"), ["/no/such/folder", "config.json"]),
    (dict(name="not a hub id at all"), ["not a hub id at all"]),
    (dict(dtype="float99"), ["float99"]),
    (dict(dtype="int8"), ["int8"]),
    (dict(dtype="load"), ["load"]),
    (dict(device="cuda:99"), ["cuda:99"]),
    (dict(device="toaster"), ["toaster"]),
    (dict(kind="granite"), ["granite", "logits"]),
])
def test_a_wrong_argument_is_one_line(model_folders, options, names):
    name = options.pop("name", model_folders / options.pop("kind", "qwen2"))
    with pytest.raises(UsageError) as error:
        Policy.load(name, **dict(device="cpu") | options)
    for part in names:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
