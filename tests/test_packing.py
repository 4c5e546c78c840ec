"""Scores of packed and padded completions against transformers' own forward pass, one completion at a time."""
import logging
import subprocess
import sys

import pytest
import torch
from processes import ROOT
from tiny_models import COMPLETIONS, PACKED, PROMPTS, WINDOWED

from policy import token_scores
from support import packing
from support.packing import pack_groups, pad_groups, pad_right, scatter_to_mask


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


def test_pack_by_hand():
    batch = pack_groups([[5, 6], [3]], [[[7, 8], [9]], [[], [4]]])
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 2] and batch.positions[1, :2].tolist() == [0, 1]
    assert batch.attention[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]  # the first token is prompt in both rows
    assert batch.predictors.tolist() == [1, 2, 1, 5] and batch.targets.tolist() == [7, 8, 9, 4]
    assert batch.mask.int().tolist() == [[1, 1], [1, 0], [0, 0], [1, 0]]
    assert batch.attention.any(-1).all(), "a row without a visible token gives NaN in some kernels"


def test_padded_rows_by_hand():
    batch = pad_groups([[5, 6]], [[[7, 8], [9]]])
    assert batch.ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]] and batch.positions[:, :3].tolist() == [[0, 1, 2]] * 2
    assert batch.attention.tolist() == [[True] * 4, [True, True, True, False]]
    assert batch.predictors.tolist() == [1, 2, 5] and batch.targets.tolist() == [7, 8, 9]
    assert batch.mask.tolist() == [[True, True], [True, False]]
    with pytest.raises(AssertionError, match="empty prompt"):
        pack_groups([[5], []], [[[7]], [[8]]])


def test_values_are_scattered_row_by_row():
    mask = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 1]]).bool()
    assert scatter_to_mask(torch.tensor([1., 2., 3., 4.]), mask).tolist() == [[1, 2], [3, 0], [0, 0], [0, 4]]
    assert pad_right([[7, 8], [], [9]], fill=5).tolist() == [[7, 8], [5, 5], [9, 5]]


@pytest.mark.parametrize("kind", PACKED + WINDOWED)
@pytest.mark.parametrize("options", [dict(), dict(gradient_checkpointing=True)], ids=["", "checkpoint"])
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_scores_and_gradients_equal_the_plain_forward(load, kind, options, padded):
    plain, policy, calls = load(kind), load(kind, **options), []
    assert policy.packs == (kind in PACKED)
    policy.packs = policy.packs and not padded
    with plain.using("manager"):
        expected, entropy = plain_scores(plain, PROMPTS, COMPLETIONS, temperature=0.7)
    slopes = gradients(plain, expected)
    next(iter(policy.layers.values())).register_forward_hook(lambda *_: calls.append(1))
    with policy.using("manager"):  # for backward too, in which gradient checkpointing computes the layers again
        scores = policy.score(PROMPTS, COMPLETIONS, temperature=0.7)
        found = gradients(policy, scores.logp[scores.mask])
    assert len(calls) == 1 + len(options)
    assert scores.mask.sum(1).tolist() == [len(c) for group in COMPLETIONS for c in group]
    torch.testing.assert_close(scores.logp[scores.mask], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.entropy[scores.mask], entropy, atol=1e-5, rtol=0)
    assert not scores.entropy.requires_grad and not scores.logp[~scores.mask].any()
    assert max(x.abs().max() for x in slopes) > 0.1
    for a, b in zip(found, slopes, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_gradient_checkpointing_is_for_training_only(load):
    """Sampling needs the key-value cache, before and after an update; scores without gradient are computed once."""
    plain, policy = load(), load(gradient_checkpointing=True)
    calls = []
    for one in (plain, policy):
        with one.using("manager"):
            before = one.sample(PROMPTS, max_new_tokens=20, temperature=0)
            one.score(PROMPTS, COMPLETIONS).logp.sum().backward()
            assert one.sample(PROMPTS, max_new_tokens=20, temperature=0) == before
            one.layers["model.layers.0.mlp.up_proj"].register_forward_hook(lambda *_: calls.append(1))
            with torch.no_grad():
                one.score(PROMPTS, COMPLETIONS)
        calls.append(before)
    assert calls[:2] == calls[2:] and not any(layer.training for layer in policy.checkpointed_layers)
    assert len(policy.checkpointed_layers) >= 2


def test_windowed_models_say_so_once(load, caplog):
    with caplog.at_level(logging.WARNING):
        policy = load("mistral-window")
        policy.score(PROMPTS, COMPLETIONS), policy.score(PROMPTS, COMPLETIONS)
        load("mistral")
    assert sum("without packing" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_chunks_change_neither_scores_nor_gradients(bias, monkeypatch):
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(16, 50, bias=bias).requires_grad_(False), torch.randint(50, (23,))
    weights, results = torch.randn(23), []
    for size in (None, 23, 4, 1):
        hidden = torch.randn(23, 16, generator=torch.Generator().manual_seed(1)).mul_(3).requires_grad_()
        if size is None:
            every = (head(hidden) / 1.3).log_softmax(-1)
            logp, entropy = every[range(23), targets], -(every.exp() * every).sum(-1).detach()
        else:
            monkeypatch.setattr("policy.rows_at_once", lambda *_, size=size: size)
            logp, entropy = token_scores(hidden, head, targets, 1.3)
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
        packed = policy.score(PROMPTS, COMPLETIONS).logp
        policy.packs = False
        padded = policy.score(PROMPTS, COMPLETIONS).logp
    assert (packed - exact).abs().mean() < 1.5 * (padded - exact).abs().mean() < 0.15


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_covers_the_memory_of_the_backward_pass(load, monkeypatch, checkpointing):
    policy, kept = load("llama", dtype="bfloat16", gradient_checkpointing=checkpointing), {}
    assert packing.max_train_tokens(policy) == 4096
    weights = {x.untyped_storage().data_ptr() for x in [*policy.model.parameters(), *policy.parameters("manager")]}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x
    with policy.using("manager"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy.score([list(range(3, 60))], [[[5] * 30] * 2])
    num_bytes = sum(x.nbytes() for address, x in kept.items() if address not in weights)
    monkeypatch.setattr(policy, "device", torch.device("cuda"))
    of_torch = {"mem_get_info": (6 * 10**8, 10**9), "memory_reserved": 5 * 10**8, "memory_allocated": 10**8}
    for name, value in of_torch.items():  # 1 GB is free; torch holds 0.4 GB of it
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    held = packing.max_train_tokens(policy) * num_bytes / (57 + 60)
    assert (0 if checkpointing else 0.4) * 10**9 < held < 0.9 * 10**9  # the rest is for computing again


def test_the_estimate_for_sampling_covers_keys_values_and_the_widest_layer(load, monkeypatch):
    """Keys and values of 2 layers, 2 heads, width 8, and three times 48 activations of 2 bytes: 416 bytes per token."""
    policy = load("llama", dtype="bfloat16")
    assert packing.max_sampling_tokens(policy) == 2**15
    monkeypatch.setattr(policy, "device", torch.device("cuda"))
    monkeypatch.setattr(packing, "free_memory", lambda device: 416 * 1000)
    assert packing.max_sampling_tokens(policy) == 700
    monkeypatch.setattr(packing, "free_memory", lambda device: 10**12)
    assert packing.max_sampling_tokens(policy) == 2**16


@pytest.mark.parametrize("free, training, sampling", [
    (10**12, 2**12, 2**15), (10**9, 2**12, 2**15), (10**7, 959, 8413), (10**4, 0, 8)])
def test_batches_on_a_cpu_shrink_with_the_free_memory(load, monkeypatch, free, training, sampling):
    """
    float32, 2 layers, inputs of 6 x 32 + 48 and outputs of 224 numbers: 4 x 2 x (240 + 3 x 224) = 7296 bytes per token.
    Sampling: keys and values of 2 x 8 numbers, three times 48 activations: 4 x (2 x 2 x 16 + 144) = 832 bytes.
    """
    policy = load("llama")
    monkeypatch.setattr(packing, "free_memory", lambda device: free)
    assert (packing.max_train_tokens(policy), packing.max_sampling_tokens(policy)) == (training, sampling)


def test_a_batch_on_a_cpu_takes_3_gib_at_most(load, monkeypatch):
    policy = load("llama")
    monkeypatch.setattr(packing, "free_memory", lambda device: 10**15)
    monkeypatch.setattr(packing, "train_token_bytes", lambda policy: 2**22)
    assert packing.max_train_tokens(policy) == 768  # 3 * 2**30 / 2**22
    monkeypatch.setattr(policy, "device", torch.device("cuda"))
    assert packing.max_train_tokens(policy) == int(0.7 * 10**15 / 2**22)


V1 = "4:memory:/job/7\n0::/"
V2 = "0::/system.slice/run.service"


@pytest.mark.parametrize("groups, files, left", [
    (V2, {}, []), (V2, {"memory.max": "max", "memory.stat": "anon 5"}, []),
    (V2, {"memory.max": "9000", "memory.stat": "file 800\nanon 5000\nkernel 7"}, [4000]),
    (V2, {"system.slice/run.service/memory.max": "700", "system.slice/run.service/memory.stat": "anon 100"}, [600]),
    (V1, {"memory/job/7/memory.limit_in_bytes": "8000", "memory/job/7/memory.stat": "cache 1\nrss 3000"}, [5000]),
    (V1, {"memory/memory.limit_in_bytes": "8000", "memory/memory.stat": "cache 1\nrss 7000",
          "memory.max": "500", "memory.stat": "anon 100"}, [1000, 400]),
    (None, {"memory.max": "9000", "memory.stat": "anon 5000"}, [])])
def test_a_containers_limit_counts(tmp_path, groups, files, left):
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    if groups:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    assert {*packing.control_group_memory(str(tmp_path))} == {sys.maxsize, *left}


def test_free_memory_is_the_smallest_limit_shared_by_the_processes(monkeypatch):
    free = packing.free_memory(torch.device("cpu"))
    assert 10**7 < free < 10**13
    monkeypatch.setattr(packing, "control_group_memory", lambda: [10**15, 3000])
    assert packing.free_memory(torch.device("cpu")) == 3000
    monkeypatch.setattr(packing, "world_size", lambda: 4)
    assert packing.free_memory(torch.device("cpu")) == 750


@pytest.mark.parametrize("groups, turned_on", [([0, 2], False), ([1], True), ([2, 1, 0], True)])
def test_gradient_checkpointing_turns_itself_on(load, monkeypatch, caplog, groups, turned_on):
    """The groups have 12, 27 and 13 tokens. Memory is first for 27, then for 26."""
    plain, policy = load(), load()
    prompts, completions = ([some[i] for i in groups] for some in (PROMPTS, COMPLETIONS))
    size = packing.train_token_bytes(policy)
    for tokens in (27, 26, 26):
        monkeypatch.setattr(packing, "free_memory", lambda device, tokens=tokens: (tokens + 0.5) * size / 0.7)
        batches = policy.micro_batches(prompts, completions)
        assert len(policy.checkpointed_layers or ()) == (2 if tokens == 26 and turned_on else 0)
        assert sorted(sum(batches, [])) == list(range(len(groups)))
    assert sum("gradient checkpointing is on" in line for line in caplog.messages) == turned_on
    slopes = []
    for one in (plain, policy):
        with one.using("manager"):
            slopes.append(gradients(one, one.score(PROMPTS, COMPLETIONS).logp.flatten()))
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_model_without_gradient_checkpointing_says_once_what_to_lower(load, monkeypatch, caplog):
    policy = load()
    monkeypatch.setattr(policy, "_checkpoint_layers", lambda: [])
    monkeypatch.setattr(packing, "fits_backward", lambda policy, tokens: False)
    assert len([policy.micro_batches(PROMPTS, COMPLETIONS) for _ in range(3)]) == 3
    [line] = caplog.messages
    assert "(27 tokens) would not fit into memory: lower --max-prompt-tokens" in line and " is on" not in line


@pytest.mark.parametrize("fits", [True, False])
def test_a_group_that_does_not_fit_with_gradient_checkpointing_either(load, monkeypatch, caplog, fits):
    policy = load()
    monkeypatch.setattr(packing, "fits_backward", lambda policy, tokens: fits and bool(policy.checkpointed_layers))
    policy.micro_batches(PROMPTS, COMPLETIONS)
    [line] = caplog.messages
    assert "gradient checkpointing is on" in line
    assert ("this may not be enough: lower --max-prompt-tokens" in line) != fits


LONG = [[9] * 40], [[[8] * 10]]  # a group of one, as of a trajectory, wider than all others


@pytest.mark.parametrize("kind, budget, number, more", [
    ("qwen2", 30, 6, ([], [])), ("qwen2", 10**6, 1, ([], [])), ("qwen2", 1, 9, ([], [])), ("qwen2", 80, 4, LONG),
    ("mistral-window", 70, 7, ([], [])), ("mistral-window", 100, 7, LONG), ("mistral-window", 250, 3, LONG)])
def test_micro_batches_hold_every_group_once_within_the_budget(load, kind, budget, number, more):
    policy = load(kind)
    prompts, completions = PROMPTS * 3 + more[0], COMPLETIONS * 3 + more[1]
    batches = policy.micro_batches(prompts, completions, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
    for batch in batches:
        ids = policy.pack_batch([prompts[i] for i in batch], [completions[i] for i in batch]).ids
        assert ids.numel() <= budget or len(batch) == 1
    assert len(batches) == number


@pytest.mark.parametrize("kind", ["qwen2", "mistral-window"])
@pytest.mark.parametrize("tokens", [1, 60, 10**6])
def test_map_groups_equals_a_direct_call(load, kind, tokens):
    policy, sizes = load(kind), []

    def logp_and_count(prompts, completions):
        sizes.append(len(prompts))
        assert not torch.is_grad_enabled()
        return policy.score(prompts, completions, 0.7).logp
    prompts, completions = PROMPTS * 2, [group[:2] for group in COMPLETIONS * 2]  # groups of equal size
    with policy.using("manager"):
        found = policy.map_groups(logp_and_count, prompts, completions, tokens)
        expected = policy.score(prompts, completions, 0.7).logp
    assert sum(sizes) == 6 and len(sizes) == len(policy.micro_batches(prompts, completions, tokens))
    assert found.shape == expected.shape == (12, 20)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim of glibc")
def test_freed_memory_between_memory_in_use_is_returned():
    code = """if True:
        import torch
        from support.packing import return_freed_memory
        def resident():  # MiB
            return int(open("/proc/self/statm").read().split()[1]) * 4 // 1024
        before = resident()
        kept = [torch.ones(2**14) for _ in range(4000)][::10]  # of 64 KiB: 250 MiB, of which 25 stay
        freed = resident() - before
        return_freed_memory(torch.device("cpu"))
        print(freed, resident() - before)"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    freed, returned = map(int, found.split())
    assert freed > 150 and returned < 75
