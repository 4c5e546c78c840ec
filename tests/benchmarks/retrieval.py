"""
How much of LoCoMo's evidence the search finds: `OMP_NUM_THREADS=2 python tests/benchmarks/retrieval.py [ENCODER]`.
Every turn of the eight test dialogues is a memory; of a question's evidence turns, which share is among the K most
similar turns of each speaker? (K = 30 is the paper's 60.) LoCoMo is fetched on first use. With ENCODER, a hub id or
folder such as sentence-transformers/all-MiniLM-L6-v2: also that encoder and hash+ENCODER, some minutes on a CPU.
`context`: the turn before is stored in front of a turn, as one text.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import answer  # noqa: E402
from data import locomo  # noqa: E402
from memory import MemoryBank, make_embedder  # noqa: E402


def bank_of(dialogue, embedder, with_context):
    """A bank of the raw turns, the number of a memory that of its turn."""
    lines = [f"{turn.speaker}: {turn.text}" for turn in dialogue.turns]
    texts = [f"{before} {line}" for before, line in zip(["", *lines], lines, strict=False)] if with_context else lines
    embedder.embed(texts)  # in one batch
    bank = MemoryBank(embedder)
    for turn, text in zip(dialogue.turns, texts, strict=True):
        bank.add(text, turn.speaker, turn.time)
    return bank


def recalls(dialogues, embedder, with_context, k):
    """(category, share of the evidence turns found) of every question that has any"""
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
            of_k = {k: recalls(dialogues, embedder, with_context, k) for k in (5, 15, 30)}
            shares = "  ".join(f"{mean([share for _, share in found]):.3f}" for found in of_k.values())
            by_category = " / ".join(f"{mean([share for one, share in of_k[30] if one == number]):.2f}"
                                     for number in (1, 2, 3, 4))
            spent = time.perf_counter() - start
            print(f"{name + (', context' if with_context else ''):48} {shares}   {by_category}  {spent:4.0f} s",
                  flush=True)


if __name__ == "__main__":
    main()
