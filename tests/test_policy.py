"""The policy against transformers' own forward and generate, PEFT, and work by hand; tiny random models."""
import json
import logging
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
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

from data import UsageError
from policy import Policy, draw, pack, token_scores

torch.set_num_threads(1)  # of models this small, threads only wait for each other
V, EOS = 61, [2, 7, 11, 13]  # several ends, so that random completions are short
TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
            "{% if add_generation_prompt %}<assistant> {% endif %}")
SIZE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, eos_token_id=2,
            pad_token_id=0)
CONFIGS = {  # Qwen2 has biases on q, k, v; four query heads on two key heads but in llama-untied
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


def tokenizer():
    words = ["<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>", *(f"w{i}" for i in range(6, V))]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=TEMPLATE, pad_token="<pad>",
                                   unk_token="<unk>", eos_token="<end>")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for i, (kind, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(i)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in a fresh model, which would hide a lost bias
                torch.nn.init.normal_(parameter, std=0.5)
        model.generation_config.eos_token_id = EOS
        model.save_pretrained(root / kind)
        tokenizer().save_pretrained(root / kind)
    return root


@pytest.fixture
def load(folders):
    def load(kind="qwen2", adapters=("manager",), **options):
        policy = Policy.load(folders / kind, device="cpu", **options)
        for i, name in enumerate(adapters):
            torch.manual_seed(100 + i)
            policy.add_adapter(name, rank=4, alpha=8)
            for x in policy.parameters(name)[1::2]:
                torch.nn.init.normal_(x, std=0.2)  # B != 0, as after training
        return policy
    return load


def base_model(folders, kind="qwen2"):
    return AutoModelForCausalLM.from_pretrained(folders / kind, dtype=torch.float32).eval()


def logits_of(model, ids=(5, 9, 31, 4, 8)):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def plain_scores(policy, prompts, completions, temperature):
    """The reference: one completion at a time, no padding, no mask, autograd through everything."""
    logps, entropies = [], []
    for prompt, group in zip(prompts, completions, strict=True):
        for c in group:
            ids = torch.tensor([prompt + c])
            logp = (policy.model(ids, use_cache=False).logits[0] / temperature).log_softmax(-1)
            logp = logp[len(prompt) - 1:len(prompt) + len(c) - 1]
            logps += [logp[t, token] for t, token in enumerate(c)]
            entropies += list(-(logp.exp() * logp).sum(-1))
    return torch.stack(logps), torch.stack(entropies)


def gradients(policy, logp, name="manager"):
    for x in policy.parameters(name):
        x.grad = None
    (logp * torch.linspace(-1, 2, len(logp))).mean().backward()
    return [x.grad for x in policy.parameters(name)]


# --- LoRA ---

@pytest.mark.parametrize("kind", PACKED)
def test_new_adapter_changes_nothing_and_lora_off_is_the_base(load, folders, kind):
    policy, expected = load(kind, adapters=()), logits_of(base_model(folders, kind))
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


# --- PEFT's format ---

def test_peft_loads_ours(load, folders, tmp_path):
    policy = load()
    policy.save_adapter("manager", tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base_model(folders), tmp_path / "adapter").eval()
    with policy.using("manager"):
        torch.testing.assert_close(logits_of(policy.model), logits_of(theirs), atol=1e-5, rtol=0)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    assert len(saved) == 28 and len(list((tmp_path / "adapter").iterdir())) == 2


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_ours_loads_what_peft_saved_and_passes_it_on(load, folders, tmp_path, targets, rslora):
    theirs = peft.get_peft_model(base_model(folders), peft.LoraConfig(
        r=3, lora_alpha=9, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM"))
    for name, x in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.2)
    theirs.eval().save_pretrained(tmp_path)
    policy = load()  # whose "manager" has another rank and more layers
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
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        policy.save_adapter("answer", tmp_path)
    policy.load_adapter("copy", tmp_path)
    for a, b in zip(policy.parameters("copy"), policy.parameters("manager"), strict=True):
        assert torch.equal(a, b)


# --- scoring ---

def test_pack_by_hand():
    layout = pack([[5, 6], [3]], [[[7, 8], [9]], [[], [4]]])
    assert layout.ids.tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert layout.positions[0].tolist() == [0, 1, 2, 3, 2] and layout.positions[1, :2].tolist() == [0, 1]
    assert layout.attention[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]  # the first token is prompt in both rows
    assert layout.where.tolist() == [1, 2, 1, 5] and layout.targets.tolist() == [7, 8, 9, 4]
    assert layout.mask.int().tolist() == [[1, 1], [1, 0], [0, 0], [1, 0]]
    assert layout.attention.any(-1).all(), "a row that sees nothing gives NaN in some kernels"


@pytest.mark.parametrize("kind", PACKED + WINDOWED)
@pytest.mark.parametrize("options", [dict(), dict(gradient_checkpointing=True)], ids=["", "checkpoint"])
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_scores_and_gradients_equal_the_plain_forward(load, kind, options, padded):
    plain, policy, calls = load(kind), load(kind, **options), []
    assert policy.packs == (kind in PACKED)
    with plain.using("manager"):
        expected, entropy = plain_scores(plain, PROMPTS, COMPLETIONS, temperature=0.7)
    slopes = gradients(plain, expected)
    next(iter(policy.layers.values())).register_forward_hook(lambda *_: calls.append(1))
    with policy.using("manager"):
        scores = policy.score(PROMPTS, COMPLETIONS, temperature=0.7, padded=padded)
    found = gradients(policy, scores.logp[scores.mask])  # outside `using`, where a checkpoint computes again
    assert len(calls) == 1 + len(options)
    assert scores.mask.sum(1).tolist() == [len(c) for group in COMPLETIONS for c in group]
    torch.testing.assert_close(scores.logp[scores.mask], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.entropy[scores.mask], entropy, atol=1e-5, rtol=0)
    assert not scores.entropy.requires_grad and not scores.logp[~scores.mask].any()
    assert max(x.abs().max() for x in slopes) > 0.1
    for a, b in zip(found, slopes, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_windowed_models_say_so_once(load, caplog):
    with caplog.at_level(logging.WARNING):
        policy = load("mistral-window")
        policy.score(PROMPTS, COMPLETIONS), policy.score(PROMPTS, COMPLETIONS)
        load("mistral")
    assert sum("unpacked" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_chunks_change_nothing_and_the_slope_is_the_gradient(bias):
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(16, 50, bias=bias).requires_grad_(False), torch.randint(50, (23,))
    weights, results = torch.randn(23), []
    for chunk in (None, 50 * 23, 50 * 4, 1):
        hidden = torch.randn(23, 16, generator=torch.Generator().manual_seed(1)).mul_(3).requires_grad_()
        if chunk is None:
            every = (head(hidden) / 1.3).log_softmax(-1)
            logp, entropy = every[range(23), targets], -(every.exp() * every).sum(-1).detach()
        else:
            logp, entropy = token_scores(hidden, head, targets, 1.3, chunk)
        (logp * weights).sum().backward()
        results.append((logp.detach(), entropy, hidden.grad))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_packed_bfloat16_scores_are_as_close_as_padded_ones(load, kind):
    with load(kind).using("manager") as policy:
        exact = policy.score(PROMPTS, COMPLETIONS).logp
    with load(kind, dtype="bfloat16").using("manager") as policy:
        packed, padded = (policy.score(PROMPTS, COMPLETIONS, padded=way).logp for way in (False, True))
    assert (packed - exact).abs().mean() < 1.5 * (padded - exact).abs().mean() < 0.15


@pytest.mark.parametrize("checkpointing", [False, True])
def test_room_is_for_what_the_backward_pass_keeps(load, monkeypatch, checkpointing):
    policy, kept = load("llama", dtype="bfloat16", gradient_checkpointing=checkpointing), {}
    assert policy.room() == 4096
    weights = {x.untyped_storage().data_ptr() for x in [*policy.model.parameters(), *policy.parameters("manager")]}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x
    with policy.using("manager"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy.score([list(range(3, 60))], [[[5] * 30] * 2])
    num_bytes = sum(x.nbytes() for address, x in kept.items() if address not in weights)
    monkeypatch.setattr(policy, "device", torch.device("cuda"))
    of_torch = {"mem_get_info": (6 * 10**8, 10**9), "memory_reserved": 5 * 10**8, "memory_allocated": 10**8}
    for name, value in of_torch.items():  # a GB is free, as 0.4 of it are torch's but not in use
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    held = policy.room() * num_bytes / (57 + 60)
    assert (0 if checkpointing else 0.4) * 10**9 < held < 0.9 * 10**9  # checkpointing needs the rest to compute again


def test_sampling_room_is_for_keys_values_and_the_widest_layer(load, monkeypatch):
    """Keys and values of 2 layers, 2 heads, width 8, and three times 48 activations, 2 bytes each: 416 a token."""
    policy = load("llama", dtype="bfloat16")
    assert policy.sampling_room() == 2**15
    monkeypatch.setattr(policy, "device", torch.device("cuda"))
    monkeypatch.setattr(policy, "free_memory", lambda: 416 * 1000)
    assert policy.sampling_room() == 700
    monkeypatch.setattr(policy, "free_memory", lambda: 10**12)
    assert policy.sampling_room() == 2**16


@pytest.mark.parametrize("kind, budget, number", [
    ("qwen2", 30, 6), ("qwen2", 10**6, 1), ("qwen2", 1, 9), ("mistral-window", 70, 7)])
def test_micro_batches_hold_every_group_once_within_the_budget(load, kind, budget, number):
    policy = load(kind)
    prompts, completions = PROMPTS * 3, COMPLETIONS * 3
    batches = policy.micro_batches(prompts, completions, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    for batch in batches:
        ids = policy.layout([prompts[i] for i in batch], [completions[i] for i in batch]).ids
        assert ids.numel() <= budget or len(batch) == 1
    assert len(batches) == number


# --- sampling ---

@pytest.mark.parametrize("kind", PACKED + WINDOWED)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_sampling_equal_scoring(load, kind, temperature):
    policy = load(kind)
    torch.manual_seed(0)
    with policy.using("manager"):
        groups = policy.sample(PROMPTS, n=12, max_new_tokens=15, temperature=temperature)
        with torch.no_grad():
            scores = policy.score(PROMPTS, [[c.ids for c in group] for group in groups], temperature)
    flat = [c for group in groups for c in group]
    assert [len(group) for group in groups] == [12] * 3
    assert len({len(c.ids) for c in flat}) > 3 and 0 < sum(c.finished for c in flat) < 36
    for c, row, mask in zip(flat, scores.logp, scores.mask, strict=True):
        torch.testing.assert_close(torch.tensor(c.logps), row[mask], atol=1e-5, rtol=0)
        assert c.finished == (c.ids[-1] in EOS) and not set(c.ids[:-1]) & set(EOS)
        assert c.finished or len(c.ids) == 15


@pytest.mark.parametrize("kind", PACKED + WINDOWED)
def test_greedy_equals_generate(load, kind):
    policy = load(kind)
    prompts = [*PROMPTS, *([i, i + 1, i + 2] for i in range(20, 30))]
    with policy.using("manager"):
        groups = policy.sample(prompts, max_new_tokens=20, temperature=0)
        for prompt, [completion] in zip(prompts, groups, strict=True):
            ids = torch.tensor([prompt])
            theirs = policy.model.generate(ids, do_sample=False, max_new_tokens=20)
            assert completion.ids == theirs[0, len(prompt):].tolist()
    assert {completion.finished for [completion] in groups} == {True, False}


@pytest.mark.parametrize("kind", ["qwen2", "llama-untied", "mistral-window"])
def test_what_all_prompts_begin_with_is_read_once(load, kind):
    policy, begin = load(kind), list(range(3, 23))
    prompts = [[*begin, 40, 41, 42, 43], begin, [*begin, 40, 50]]  # one is the beginning of the others
    seen = watch(policy)
    policy.model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True)
    torch.manual_seed(0)
    with policy.using("manager"), torch.no_grad():
        groups = policy.sample(prompts, n=6, max_new_tokens=12)
        scores = policy.score(prompts, [[c.ids for c in group] for group in groups], padded=True)
    logps = [logp for group in groups for c in group for logp in c.logps]
    torch.testing.assert_close(torch.tensor(logps), scores.logp[scores.mask], atol=1e-5, rtol=0)
    passes = [shape for shape in seen if isinstance(shape[0], int)]
    assert passes[:2] == ([(1, 19), (3, 5)] if policy.packs else [(3, 24), (18, 1)])


def watch(policy):
    """The (shape of the ids, positions) of every forward pass of `sample` from here on."""
    seen, before = [], policy.model.forward

    def forward(**inputs):
        seen.append((tuple(inputs["input_ids"].shape), inputs["position_ids"].tolist()))
        if "prompts" in inputs:  # no other prompts are read than those that are still continued
            assert sorted(set(inputs["prompts"].owners.tolist())) == list(range(len(inputs["prompts"].visible)))
            assert inputs["prompts"].cache.layers[0].keys.shape[0] == len(inputs["prompts"].visible)
        return before(**inputs)
    policy.model.forward = forward
    return seen


def test_a_prompt_is_read_once_greedy_is_shared_and_ended_rows_leave(load):
    policy = load()
    seen, prompts = watch(policy), [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    greedy = policy.sample(prompts, n=4, max_new_tokens=5, temperature=0)
    assert seen[0][0] == (2, 7) and all(rows <= 2 for (rows, _), _ in seen)
    assert greedy[0] == greedy[2] == [greedy[0][0]] * 4 and greedy[0] != greedy[1]
    seen.clear()
    groups = policy.sample(prompts, n=4, max_new_tokens=30)
    assert seen[0] == ((2, 7), [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0, 1]])
    assert len({tuple(c.ids) for c in groups[0] + groups[2]}) > 4
    lengths = [len(c.ids) for group in groups for c in group]
    assert [shape for shape, _ in seen[1:]] == [
        (sum(length > t for length in lengths), 1) for t in range(1, max(lengths))]


def test_budget_splits_batches_and_keeps_the_order(load):
    policy = load()
    prompts = [[20 + i] * length for i, length in enumerate([3, 9, 1, 5, 5, 12, 2, 9, 1, 7, 3, 4])]
    whole = policy.sample(prompts, max_new_tokens=8, temperature=0)
    seen, policy.max_batch_tokens = watch(policy), 45
    split = policy.sample(prompts, max_new_tokens=8, temperature=0)
    assert [c.ids for [c] in split] == [c.ids for [c] in whole]
    prefills = [(rows, length) for (rows, length), _ in seen if length > 1]
    assert len(prefills) > 3 and all(rows * (length + 8) <= 45 for rows, length in prefills)
    groups = policy.sample(PROMPTS, n=7, max_new_tokens=8)  # here even a group is split
    scores = policy.score(PROMPTS, [[c.ids for c in group] for group in groups])
    logps = [logp for group in groups for c in group for logp in c.logps]
    torch.testing.assert_close(scores.logp[scores.mask], torch.tensor(logps), atol=1e-5, rtol=0)


def chi_square(tokens, probabilities):
    """Within 5 standard deviations of its mean, for counts of at least 5 expected."""
    expected = probabilities * len(tokens)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected))
    often = expected >= 5
    degrees = int(often.sum()) - 1
    return ((counts - expected)[often] ** 2 / expected[often]).sum() < degrees + 5 * (2 * degrees) ** 0.5


def test_tokens_come_as_often_as_the_softmax_says(load):
    policy, prompt = load(), PROMPTS[0]
    torch.manual_seed(0)
    with policy.using("manager"):
        [group] = policy.sample([prompt], n=6000, max_new_tokens=2, temperature=0.8)
        first = (logits_of(policy.model, prompt)[0, -1] / 0.8).softmax(-1)
        likely = next(i for i in first.argsort(descending=True).tolist() if i not in EOS)
        second = (logits_of(policy.model, [*prompt, likely])[0, -1] / 0.8).softmax(-1)
    tokens = [c.ids[0] for c in group]
    assert chi_square(tokens, first) and not chi_square(tokens, (first.log() * 0.8).softmax(-1))
    assert chi_square([c.ids[1] for c in group if c.ids[0] == likely], second)
    runs = [torch.manual_seed(seed) and policy.sample([prompt], 50, 3) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_draw_never_takes_an_impossible_token():
    logits = torch.full((5000, 6), -torch.inf)
    logits[:, 2], logits[:, 4] = 0.0, 1.0
    token, logp = draw(logits, 1.0)
    assert set(token.tolist()) == {2, 4} and logp.isfinite().all()


def test_nan_is_reported(load):
    policy = load()
    policy.parameters("manager")[1].data.fill_(torch.nan)
    with policy.using("manager"), pytest.raises(UsageError, match="nan for the next token"):
        policy.sample(PROMPTS, n=2, max_new_tokens=3)


def test_chat_template_and_text(load):
    policy = load()
    messages = [{"role": "system", "content": "w9 w10"}, {"role": "user", "content": "w11"}]
    assert policy.encode(messages) == [3, 9, 10, 2, 4, 11, 2, 5]
    assert policy.decode([9, 10, 2]) == "w9 w10"
    policy.eos = torch.tensor([2, 9])  # an end that the tokenizer does not know for one is no text either
    groups = policy.sample([[i] for i in range(3, 40)], max_new_tokens=6)
    assert any(c.ids[-1] == 9 for [c] in groups)
    words = ["", "", "", "<system>", "<user>", "<assistant>", *(f"w{i}" for i in range(6, V))]
    for [c] in groups:
        assert c.text.split() == [words[i] for i in c.ids[:len(c.ids) - c.finished] if words[i]]


# --- errors ---

def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


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


def test_the_same_base_by_another_path_is_the_same(load, folders, tmp_path, monkeypatch):
    policy = load()
    monkeypatch.chdir(folders)
    for name in ("qwen2", "./qwen2/", "Org/Qwen2", "", None):
        policy.save_adapter("manager", tmp_path)
        edit(tmp_path, base_model_name_or_path=name)
        policy.load_adapter("manager", tmp_path)


def no_template(folder):
    slow = tokenizer()
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
def test_a_bad_model_is_one_line(folders, tmp_path, spoil, names):
    AutoModelForCausalLM.from_pretrained(folders / "qwen2").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
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
def test_a_wrong_argument_is_one_line(folders, options, names):
    name = options.pop("name", folders / options.pop("kind", "qwen2"))
    with pytest.raises(UsageError) as error:
        Policy.load(name, **dict(device="cpu") | options)
    for part in names:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
