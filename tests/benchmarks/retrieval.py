"""
Measure the recall of evidence on LoCoMo: `OMP_NUM_THREADS=2 python tests/benchmarks/retrieval.py [ENCODER]`.
Every turn of the eight test dialogues is a memory. Recall at K is the fraction of a question's evidence turns that are
among the K most similar turns of each speaker (K = 30 gives the paper's 60 memories). LoCoMo is downloaded on first
use. ENCODER is a hub id or folder, such as sentence-transformers/all-MiniLM-L6-v2: it is measured alone and as
hash+ENCODER, which takes some minutes on a CPU. `context`: the text of a memory begins with the turn before it.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import answer  # noqa: E402
from data import locomo  # noqa: E402
from memory import MemoryBank, make_embedder  # noqa: E402


def bank_of(dialogue, embedder, with_context):
    """Return a bank of the turns; the id of a memory is the position of its turn."""
    lines = [f"{turn.speaker}: {turn.text}" for turn in dialogue.turns]
    texts = [f"{before} {line}" for before, line in zip(["", *lines], lines, strict=False)] if with_context else lines
    embedder.embed(texts)  # in one batch
    bank = MemoryBank(embedder)
    for turn, text in zip(dialogue.turns, texts, strict=True):
        bank.add(text, turn.speaker, turn.time)
    return bank


def recalls(dialogues, embedder, with_context, k):
    """Return (category, recall at k) of every question that has evidence."""
    found = []
    for dialogue in dialogues:
        bank, number = bank_of(dialogue, embedder, with_context), {turn.id: i for i, turn in enumerate(dialogue.turns)}
        for question in dialogue.questions:
            evidence = {number[turn] for turn in question.evidence}
            if evidence:
                hits = {memory.id for memory, _ in answer.retrieve(bank, question.text, dialogue.speakers, k)}
                found.append((question.category, len(evidence & hits) / len(evidence)))
    return found


def mean(values):
    return sum(values) / len(values)


def main():
    dialogues = locomo.load("test")
    names = ["hash"] + [name for encoder in sys.argv[1:2] for name in (encoder, f"hash+{encoder}")]
    print(f"{'embedder':50}  K=5  K=15  K=30   K=30 by category 1 / 2 / 3 / 4")
    for name in names:
        embedder = make_embedder(name)
        for with_context in (False, True):
            start = time.perf_counter()
            at = {k: recalls(dialogues, embedder, with_context, k) for k in (5, 15, 30)}
            overall = "  ".join(f"{mean([recall for _, recall in found]):.3f}" for found in at.values())
            by_category = " / ".join(f"{mean([recall for category, recall in at[30] if category == number]):.2f}"
                                     for number in (1, 2, 3, 4))
            seconds = time.perf_counter() - start
            print(f"{name + (', context' if with_context else ''):48} {overall}   {by_category}  {seconds:4.0f} s",
                  flush=True)


if __name__ == "__main__":
    main()
