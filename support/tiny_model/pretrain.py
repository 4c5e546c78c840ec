"""
Pretrains the tiny default model: tokenizer, weights, model card. It takes an hour or more of one CPU core.

    python -m support.tiny_model.pretrain                                  # writes data/tiny
    python -m support.tiny_model.pretrain --tokens 1e6 --out /tmp/tiny     # a quick look
    python -m support.tiny_model.pretrain --init /tmp/tiny --tokens 20e6   # continue from a finished model
    torchrun --nproc_per_node=2 -m support.tiny_model.pretrain             # two processes, twice the tokens per step

The model is a Llama with 1.5M parameters. At this size, it learned to copy only with these three measures:
1. From the start, heads of layer 0 attend to the tokens 1, 2 and 3 places back, by the biases of queries and keys.
2. Training begins with a few hundred steps of copying random tokens; some such rows stay in the mixture.
3. Names and values are joined from pieces of the vocabulary, so that every piece has been copied.
lessons.py defines the pretraining tasks, gate.py measures the result.
"""
import argparse
import copy
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data import TINY
from support.tiny_model.batches import batches, copy_lesson, pad_rows, predictions
from support.tiny_model.gate import gate, model_card
from support.tiny_model.tokenizer import make_tokenizer, name_pieces, save_tokenizer


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """
    Make an untrained Llama with biases in its attention. That is Qwen2's architecture, but transformers loads a model
    of type "qwen2" with Qwen's own tokenizer class.
    """
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
                         rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, attention_bias=True,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
                         attn_implementation="eager")  # in training only, see save_model
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = math.sqrt(2 * config.num_hidden_layers) if residual else 1
                p.normal_(std=0.6 / math.sqrt(p.shape[1]) / depth)
        look_back(model, 1000.0)
    return model


def look_back(model, theta: float) -> None:
    """
    Make head h of layer 0 attend to the token h + 1 places back, for h = 0, 1, 2, by biases alone.
    Rotary embedding rotates pair j of a query at position t by the angle t * theta^(-2j/d). Let the key bias be a
    constant b_k, and the query bias b_k rotated by -(h + 1) * theta^(-2j/d): their inner product is then largest at
    distance h + 1.
    """
    attention = model.model.layers[0].self_attn
    d = attention.head_dim
    angle = theta ** (-torch.arange(0, d, 2).float() / d)  # (d/2,)
    for head in range(3):
        rows = slice(head * d, (head + 1) * d)
        rotation = -(head + 1) * angle
        attention.k_proj.bias[rows] = torch.cat([torch.full((d // 2,), 3.0), torch.zeros(d // 2)])
        attention.q_proj.bias[rows] = 3.0 * torch.cat([rotation.cos(), rotation.sin()])
        attention.q_proj.weight[rows] *= 0.3
        attention.k_proj.weight[rows] *= 0.3


def make_optimizers(model, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings, biases and norms. `peak` holds the peak learning rate of each."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed" in name]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
                  torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.02, momentum=0.95)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["peak"] = optimizer.param_groups[0]["lr"]
    return optimizers


def save_model(model, folder: Path) -> None:
    """Save a float16 copy that loads with "sdpa" attention; the model itself does not change."""
    saved = copy.deepcopy(model).half().cpu()
    saved.config._attn_implementation = "sdpa"
    saved.save_pretrained(folder)


def update(model, optimizers, ids, learned, lr_scale: float) -> tuple[float, float]:
    """Train on one batch at `lr_scale` times the peak learning rates. Return loss and accuracy of the targets."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits, targets = predictions(model, ids, learned)
    loss = F.cross_entropy(logits.float(), targets)
    loss.backward()
    if dist.is_initialized():
        for p in model.parameters():
            dist.all_reduce(p.grad.div_(dist.get_world_size()))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr_scale * optimizer.param_groups[0]["peak"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item(), (logits.argmax(-1) == targets).float().mean().item()


def learn_to_copy(model, optimizers, rng, vocab_size: int, device: str) -> None:
    """Train on 400 batches of copied random tokens."""
    for i in range(400):
        ids, learned = pad_rows([copy_lesson(rng, range(2, vocab_size), 8 if i < 130 else 20) for _ in range(64)])
        loss, accuracy = update(model, optimizers, ids.to(device), learned.to(device), min(1.0, (i + 1) / 50))
        if i % 100 == 99:
            print(f"copying {i + 1:4d}  loss {loss:.3f}  accuracy {accuracy:.3f}", flush=True)


def lr_scale_at(step: int, progress: float) -> float:
    """The learning rate as a fraction of its peak: a short warmup, flat, from progress 0.3 on linear decay to 0.01."""
    decay = 1.0 if progress < 0.3 else max(0.01, (1 - progress) / 0.7)
    return min(1.0, step / 50) * decay


def lesson_batches(rng, tokenizer, batch_tokens: int, progress) -> Iterator:
    """Yield batches of lessons without end. Each round of lessons is drawn at the current `progress()`."""
    pieces = name_pieces(tokenizer)
    while True:
        yield from batches(rng, tokenizer, pieces, progress(), batch_tokens)


def pretrain(model, tokenizer, args, begin: float) -> None:
    """Train on `args.tokens` tokens of lessons, while progress rises from `begin` (0: from scratch) to 1."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    rng, optimizers = random.Random(args.seed + 1000 * rank), make_optimizers(model, lr=2e-3, muon_lr=0.02)
    start, num_tokens, smooth_loss, next_gate = time.time(), 0, None, 0.1
    if begin == 0:
        learn_to_copy(model, optimizers, rng, len(tokenizer), args.device)

    def progress() -> float:
        return min(1.0, begin + (1 - begin) * num_tokens / args.tokens)

    for step, (ids, learned) in enumerate(lesson_batches(rng, tokenizer, args.batch_tokens, progress), 1):
        lr_scale = lr_scale_at(step, progress())
        loss, _ = update(model, optimizers, ids.to(args.device), learned.to(args.device), lr_scale)
        smooth_loss = loss if smooth_loss is None else 0.98 * smooth_loss + 0.02 * loss
        count = (ids != 0).sum()
        if dist.is_initialized():
            dist.all_reduce(count)  # all processes stop at the same step
        num_tokens += int(count)
        if rank == 0 and step % 250 == 0:
            seconds = time.time() - start
            print(f"step {step:6d}  {num_tokens / 1e6:6.2f}M tokens  loss {smooth_loss:.4f}  "
                  f"{num_tokens / seconds:.0f} tokens/s  {seconds:.0f} s", flush=True)
        if rank == 0 and num_tokens / args.tokens > next_gate:
            next_gate += 0.1
            print("  gate", json.dumps(gate(model, tokenizer, "test", 60)), flush=True)
            save_model(model, args.out / "unfinished")
        if num_tokens >= args.tokens:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--out", default=TINY, type=Path, help="folder to write (data/tiny)")
    parser.add_argument("--init", type=Path, help="folder of a finished model to continue from")
    parser.add_argument("--begin", type=float, help="progress at the start, from 0 to 1 (0; with --init 0.55)")
    parser.add_argument("--tokens", default=30e6, type=float, help="tokens of lessons, of all processes (30e6)")
    parser.add_argument("--batch-tokens", default=4096, type=int, help="tokens per step, padding included (4096)")
    parser.add_argument("--vocabulary", default=2048, type=int, help="tokens of the vocabulary (2048)")
    parser.add_argument("--seed", default=7, type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init)
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32, attn_implementation="eager")
    else:
        tokenizer = make_tokenizer(args.vocabulary, random.Random(args.seed))
        model = make_model(len(tokenizer))
    model.to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}, "
          f"{len(name_pieces(tokenizer))} name pieces, seed {args.seed}", flush=True)
    pretrain(model, tokenizer, args, (0.55 if args.init else 0.0) if args.begin is None else args.begin)
    if dist.is_initialized() and dist.get_rank():
        return
    results = {split: gate(model.eval(), tokenizer, split, 300) for split in ("test", "pseudo")}
    save_tokenizer(tokenizer, args.out)
    save_model(model, args.out)
    shutil.rmtree(args.out / "unfinished", ignore_errors=True)
    (args.out / "README.md").write_text(model_card(model, results, args.tokens))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
