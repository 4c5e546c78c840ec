"""Models from .gguf files; default dtype and device; chat templates; window; layers for LoRA; full memory."""
import json
import logging
import re
from datetime import date

import numpy as np
import pytest
import torch
from gguf_file import IDS, random_model, write_gguf
from tiny_models import COMPLETIONS, PROMPTS, SIZE, V, logits_of, make_tokenizer
from toys import run_letters
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import answer
import evaluate
import grpo
import train_answer
import train_manager
from data import TINY, UsageError
from policy import Policy
from support import pretrained
from support.chat import ChatTemplate
from support.cli import exit_cleanly
from support.prompts import fit_prompt
from support.run import read_rows

CHAT = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "hi the"}]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    torch.set_num_threads(1)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Random-0.1M.gguf", random_model())


# ------------------------------------------------------------------------------------------------ .gguf files

def test_a_gguf_file_is_the_model_it_was_made_of(gguf):
    policy, expected = Policy.load(gguf, device="cpu"), random_model()
    torch.testing.assert_close(logits_of(policy.model), logits_of(expected), atol=1e-5, rtol=1e-5)
    start, end, newline = IDS["<|im_start|>"], IDS["<|im_end|>"], IDS["Ċ"]
    text = {"system": ["the", "Ġ", *"cat"], "user": [*"hi", "Ġthe"]}
    turns = [[start, *(IDS[char] for char in role), newline, *(IDS[token] for token in tokens), end, newline]
             for role, tokens in text.items()]
    assert policy.encode(CHAT) == [*turns[0], *turns[1], start, *(IDS[char] for char in "assistant"), newline]
    assert policy.encode_reply("the") == [IDS["the"], end] and policy.eos.tolist() == [end]
    assert (policy.packs, policy.window, len(policy.layers)) == (True, 4096, 14)
    count = sum(x.numel() for x in expected.parameters())
    assert pretrained.num_parameters(gguf) == count == policy.model.num_parameters()


def test_an_adapter_trained_on_a_gguf_file_fits_the_folder_of_the_same_model(gguf, tmp_path):
    policy = Policy.load(gguf, device="cpu")
    policy.add_adapter("answer", 4, 8)
    policy.save_adapter("answer", tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(gguf)
    for name, fits in (("elsewhere/random-0.1m", True), ("Org/Random-0.2M", False)):
        policy.name = name
        if fits:
            policy.load_adapter("copy", tmp_path / "adapter")
        else:
            with pytest.raises(UsageError, match="Random-0.1M.gguf"):
                policy.load_adapter("copy", tmp_path / "adapter")


def test_training_and_evaluation_on_a_gguf_file(gguf, tmp_path, monkeypatch, capsys):
    """With the defaults of small models: SFT, then RL from there, of both agents, and all four pairs of agents."""
    monkeypatch.chdir(tmp_path)
    turns = [{"speaker": speaker, "text": text, "time": "8 May 2023"} for speaker, text in (
        ("Jon", "I have a dog named Buddy."), ("Gina", "I bought a Kia car."), ("Jon", "I moved to Rome."))]
    questions = [{"question": "Which dog does Jon have?", "answer": "Buddy", "evidence": [1]},
                 {"question": "Where does Jon live?", "answer": "Rome", "evidence": [3]}]
    (tmp_path / "me.json").write_text(json.dumps({"turns": turns, "questions": questions}))
    shared = ["--model", str(gguf), "--data", "me.json", "--device", "cpu"]
    monkeypatch.setitem(answer.REWARDS, "f1", lambda text, _: len(text) % 5 / 5)  # a random model is never right
    short = [*shared, "--steps", "1", "--batch-size", "2"]
    train_answer.main([*short, "--algo", "sft", "--out", "sft"])
    for algo in ("grpo", "ppo"):
        train_answer.main([*short, "--algo", algo, "--group-size", "2", "--init-adapter", "sft", "--out", algo])
        rows = read_rows(f"{algo}/metrics.jsonl")
        assert [row["step"] for row in rows if "eval" not in row] == [1] and rows[1]["reward"] > 0
        assert {row["eval"]: row["n"] for row in rows if "eval" in row} == {"untrained": 2, "trained": 2}
    train_manager.main([*short, "--trajectories", "0", "--bank", "base", "--group-size", "2", "--max-new-tokens", "8",
                        "--answer-adapter", "sft", "--eval", "0", "--out", "manager"])
    said = capsys.readouterr().out
    assert said.count("--no-extract") == 4 and said.count("--bank turns") == 3
    for flags in ([], ["--extract"]):
        evaluate.main([*shared, *flags, "--system", "rag", "--manager", "base", "manager", "--answer", "base", "grpo",
                       "--max-new-tokens", "8", "--max-answer-tokens", "8", "--out", f"x{len(flags)}.json"])
        rows = json.loads((tmp_path / f"x{len(flags)}.json").read_text())["rows"]
        assert [row["overall"]["n"] for row in rows] == 6 * [2]
        outputs = [line["output"] for line in read_rows(f"x{len(flags)}.predictions.jsonl")]
        assert len(outputs) == 12 and any(outputs)
        assert re.search(r"^rag .*\n(.*\n)*memory .*lost", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("content, words", [
    (None, "no such file"), (b"", "cannot be"), (b"GGUF", "cannot be"), (b"PK" + bytes(99), "magic"),
    (b"GGUF" + bytes([9, 0, 0, 0]) + bytes(99), "v9")])
def test_a_bad_gguf_file_is_one_line(tmp_path, content, words):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    for function in (Policy.load, pretrained.num_parameters):
        with pytest.raises(UsageError, match=words) as error:
            function(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("metadata", [{"qwen2.rope.scaling.type": "yarn"}, {"qwen2.rope.scaling.type": "linear"}])
def test_scaled_positions_that_would_be_lost_are_refused(tmp_path, metadata):
    path = write_gguf(tmp_path / "long.gguf", random_model(), **metadata)
    with pytest.raises(UsageError, match="scaled rotary positions"):
        Policy.load(path, device="cpu")


@pytest.mark.parametrize("missing", [["gguf"], ["accelerate"], ["gguf", "accelerate"]])
def test_missing_packages_are_named(gguf, monkeypatch, missing):
    monkeypatch.setattr(pretrained, "find_spec", lambda package: None if package in missing else package)
    with pytest.raises(UsageError, match=f"pip install {' '.join(missing)}$"):
        Policy.load(gguf)


# ------------------------------------------------------------------------------------------------ size, dtype, device

@pytest.mark.parametrize("kind", ["qwen2", "qwen2-untied", "llama", "qwen3"])
def test_the_number_of_parameters_needs_no_weights(load, model_folders, kind, tmp_path):
    (tmp_path / "config.json").write_bytes((model_folders / kind / "config.json").read_bytes())
    assert pretrained.num_parameters(tmp_path) == sum(x.numel() for x in load(kind).model.parameters())


@pytest.mark.parametrize("name, words", [
    ("/no/such/folder", "no config.json"), ("not a hub id at all", "not a hub id"), ("none.gguf", "no such file")])
def test_the_number_of_parameters_of_no_model_is_one_line(name, words):
    with pytest.raises(UsageError, match=words) as error:
        pretrained.num_parameters(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device, features, size, dtype", [
    ("cuda", {}, 1, "bfloat16"), ("cuda:1", {}, 10**9, "bfloat16"), ("mps", {}, 10**9, "bfloat16"),
    ("cpu", {}, 10**9, "float32"), ("cpu", {"avx512_bf16": True}, 10**9, "bfloat16"),
    ("cpu", {"amx_bf16": True, "avx512_bf16": False}, 60 * 10**6, "bfloat16"),
    ("cpu", {"avx512_bf16": True, "amx_bf16": True}, 1_544_832, "float32")])
def test_default_dtype(monkeypatch, device, features, size, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(pretrained, "num_parameters", lambda name: size)
    assert pretrained.default_dtype("any", device) == dtype


@pytest.mark.parametrize("cuda, mps, device", [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_default_device(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert pretrained.default_device() == device


# ------------------------------------------------------------------------------------------------ chat templates

USER_ONLY = "{% for m in messages %}{% if m.role == 'user' %}U {{ m.content }} E {% endif %}{% endfor %}"
REFUSES = ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
           "{% for m in messages %}{{ m.role }} {{ m.content | trim }} E {% endfor %}")
PARTS = ("{% for m in messages %}{{ m.role }} {% for part in m.content %}{% if part.type == 'text' %}"
         "{{ part.text }}{% endif %}{% endfor %} E {% endfor %}")
PARTS_ONLY_USER = PARTS.replace("{{ m.role }}", "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}")
CONCATENATED = "{% for m in messages %}{{ m.role + ' ' + m.content[0]['text'] + ' E ' }}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role + ' ' + m.content + ' E ' }}{% endfor %}"


def rendered(template, name="some/model", messages=None):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    chat = messages or [{"role": "system", "content": "w9 w10"}, {"role": "user", "content": "w11"}]
    return ChatTemplate(tokenizer, name).render(chat, tokenize=False)


@pytest.mark.parametrize("template, text", [
    (PLAIN, "system w9 w10 E user w11 E "), (USER_ONLY, "U w9 w10\n\nw11 E "), (REFUSES, "user w9 w10\n\nw11 E "),
    (PARTS, "system w9 w10 E user w11 E "), (PARTS_ONLY_USER, "user w9 w10\n\nw11 E "),
    (CONCATENATED, "system w9 w10 E user w11 E ")])
def test_all_words_arrive_in_the_prompt(caplog, template, text):
    with caplog.at_level(logging.WARNING):
        assert rendered(template) == text
    assert sum("head of the user's message" in line for line in caplog.messages) == ("\n\n" in text)


def test_only_the_tiny_model_may_drop_the_system_message(caplog):
    assert rendered(USER_ONLY, str(TINY)) == "U w11 E " and not caplog.messages


def test_a_template_is_tried_as_a_prompt_is_written():
    """This one refuses to render a chat that no reply follows."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN + "{% if not add_generation_prompt %}{{ raise_exception('Go on') }}{% endif %}"
    chat = ChatTemplate(tokenizer, "some/model")
    assert chat.render(CHAT, tokenize=False, add_generation_prompt=True) == "system the cat E user hi the E "
    assert chat.end_of_turn == tokenizer.eos_token_id


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no chats, please') }}", "always the same", "{{ messages.x.y }}"])
def test_a_template_that_loses_messages_is_one_line(template):
    with pytest.raises(UsageError, match="some/model: its chat template fails") as error:
        rendered(template)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [["rag", "tool_use"], ["tool_use"], ["Default", "chat", "b"], ["default", "rag"]])
def test_of_several_named_templates_the_default_one_is_taken(names):
    templates = {name: PLAIN if name == "default" else "the other one" for name in names}
    if "default" in names:
        assert rendered(templates) == "system w9 w10 E user w11 E "
        return
    with pytest.raises(UsageError, match=f"some/model: .* {', '.join(sorted(names))}; name one .*default") as error:
        rendered(templates)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template, today", [
    ("{{ date_string if date_string is defined else 'none' }} ", "26 Jul 2024"),
    ("\n{{ strftime_now('%Y-%m-%d') }} ", "\n2024-07-26"),
    ("{{ strftime_now('%-d %b') }} ", "26 Jul "), ("{{ strftime_now('%B %d, %Y') }} ", "July 26, 2024"),
    ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}{{ date_string }} ",
     "26 Jul 2024")])
def test_a_template_never_writes_todays_date(template, today):
    assert rendered(template + PLAIN).startswith(today) and date.today().isoformat() != "2024-07-26"


@pytest.mark.parametrize("after, end", [
    ("w10 \n", 10), (" \n w12", 12), ("w13", 13), ("<end>", 2), ("", 2), ("\n\n### User:", 2)])
def test_a_reply_ends_with_the_templates_own_end_of_turn(model_folders, tmp_path, after, end):
    """w10, w12 and w13 are special tokens of the tokenizer, whose EOS is <end>, 2."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w10", "w12", "w13"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + repr(after)[1:-1].join(["{{ '", "' }}"]) \
        + "{% endfor %}"
    model = Policy.load(model_folders / "qwen2", device="cpu").model
    model.generation_config.eos_token_id = 7
    policy = Policy(model, tokenizer, "some/base")
    assert policy.encode_reply("w20 w21") == [20, 21, end]
    assert policy.eos.tolist() == sorted({2, 7, end})
    groups = policy.sample([[i] for i in range(3, 50)], n=2, max_new_tokens=12)
    assert all(c.finished == (c.ids[-1] in policy.eos) and not {*c.ids[:-1]} & {2, 7, end}
               for group in groups for c in group)


# ------------------------------------------------------------------------------------------------ window

@pytest.mark.parametrize("window, max_tokens, max_new_tokens, kept", [
    (None, None, 9, 5), (None, 30, 9, 2), (60, None, 9, 5), (59, None, 9, 4), (60, 30, 9, 2), (40, 50, 9, 3),
    (40, 50, 20, 1), (40, 50, 500, 0)])
def test_prompts_fit_into_the_models_window(fake, window, max_tokens, max_new_tokens, kept):
    """A prompt of one word and 10 more for each of five memories: 51 tokens at most."""
    policy, memories = fake(), [" ".join(f"{i}-{j}" for j in range(10)) for i in range(5)]
    policy.window = window
    ids, shown, dropped = fit_prompt(policy, lambda some: [{"content": " ".join(["fact", *some])}], memories,
                                     max_tokens, max_new_tokens)
    assert (len(ids), len(shown), dropped) == (1 + 10 * kept, kept, 5 - kept)


@pytest.mark.parametrize("length, new, fits", [(250, 6, True), (251, 6, False), (1, 255, True), (1, 256, False)])
def test_a_row_longer_than_the_window_is_refused(load, length, new, fits):
    policy = load()  # its window has 256 tokens
    prompts = [[20], [5 + i % 50 for i in range(length)]]
    if fits:
        assert len(policy.sample(prompts, max_new_tokens=new)) == 2
    else:
        with pytest.raises(UsageError, match=f"{length + new} tokens, but the window.* only 256: lower --max-prompt"):
            policy.sample(prompts, max_new_tokens=new)


# ------------------------------------------------------------------------------------------------ layers

def saved(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def multimodal():
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)
    return Gemma3ForConditionalGeneration(Gemma3Config(
        text_config=dict(SIZE, head_dim=8, sliding_window=64), vision_config=vision, mm_tokens_per_image=4,
        image_token_index=50, boi_token_index=51, eoi_token_index=52))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_of_a_multimodal_model_is_on_its_language_model(tmp_path, checkpointing):
    policy = Policy.load(saved(multimodal(), tmp_path), device="cpu", gradient_checkpointing=checkpointing)
    assert len(policy.layers) == 14 and all(path.startswith("model.language_model.") for path in policy.layers)
    assert len(policy.checkpointed_layers or ()) == 2 * checkpointing
    policy.add_adapter("answer", 4, 8)
    with policy.using("answer"):
        policy.score(PROMPTS, COMPLETIONS).logp.sum().backward()
    assert all(x.grad is not None for x in policy.parameters("answer"))


def test_dropout_stays_off_with_gradient_checkpointing(tmp_path):
    config = OPTConfig(vocab_size=V, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                       dropout=0.5, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.2)
    folder, scores = saved(OPTForCausalLM(config), tmp_path), []
    for checkpointing in (False, True):
        policy = Policy.load(folder, device="cpu", gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        policy.add_adapter("answer", 4, 8)
        with policy.using("answer"):
            scores.append(policy.score(PROMPTS, COMPLETIONS).logp)
            scores[-1].sum().backward()
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=0)


def test_a_model_without_linear_layers_is_one_line(tmp_path, caplog):
    config = GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    with pytest.raises(UsageError, match="nn.Linear layers, and gpt2 has none") as error:
        Policy.load(saved(GPT2LMHeadModel(config), tmp_path), device="cpu")
    assert "\n" not in str(error.value) and not caplog.messages


# ------------------------------------------------------------------------------------------------ full memory

CPU = "[enforce fail at alloc_cpu:9] err == 0. DefaultCPUAllocator: {}: you tried to allocate 9 bytes. Error code 12"


@pytest.mark.parametrize("error, words", [
    (RuntimeError(CPU.format("can't allocate memory")), "can't allocate memory: you tried to allocate 9 bytes"),
    (RuntimeError(CPU.format("not enough memory")), "not enough memory: you tried to allocate 9 bytes"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)."), "MPS backend out of memory (MPS allocated: "),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "error: out of memory"),
    (RuntimeError("could not create a primitive"), "out of memory (could not create a primitive)"),  # oneDNN
    (MemoryError("std::bad_alloc"), "out of memory (std::bad_alloc)"),
    (MemoryError(), "out of memory"), (
        MemoryError("Unable to allocate 7.11 PiB"), "out of memory (Unable to allocate 7.11 PiB)")])
def test_a_full_machine_costs_one_step_and_prints_one_line(tiny, tmp_path, capsys, error, words):
    def fail(_):
        raise error
    with pytest.raises(SystemExit) as stop:
        exit_cleanly(lambda: run_letters(tiny(b=0.0), tmp_path, grpo, {("rewards", 4): fail}, checkpoint_every=100))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and f"error: {words}" in line and ": lower --micro-batch-tokens" in line
    assert "--resume" in line and "alloc_cpu" not in line
    assert run_letters(tiny(b=0.0), tmp_path, grpo, resume=True, checkpoint_every=100).seen == [4, 5, 6]


@pytest.mark.parametrize("allocate", [lambda: torch.empty(10**15), lambda: np.empty(10**15), lambda: bytearray(2**62)])
def test_real_errors_of_full_memory_are_recognized(capsys, allocate):
    with pytest.raises(SystemExit) as stop:
        exit_cleanly(allocate)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_other_errors_are_not_taken_for_full_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        exit_cleanly(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


@pytest.mark.parametrize("dtype, words", [
    ("float32", "choose a smaller model or --dtype bfloat16"), ("bfloat16", "choose a smaller model$")])
def test_a_model_that_does_not_fit_is_one_line(model_folders, monkeypatch, dtype, words):
    def fail(*_, **__):
        raise RuntimeError(CPU.format("can't allocate memory"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(UsageError, match=f"you tried to allocate 9 bytes; {words}"):
        Policy.load(model_folders / "qwen2", device="cpu", dtype=dtype)
