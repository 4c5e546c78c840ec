"""
Time the operations of a memory bank: `OMP_NUM_THREADS=1 python tests/benchmarks/bank.py [TEXTS]`, two minutes.
TEXTS is a file with one memory per line, at least 20,400. Without it the sentences are random words.

fork: fork the bank, update one entry of the fork, search the fork. (A training step of a real model has 192 of them,
8 candidates in 24 turns.) add, update, delete: the write and the search after it, which may build an index.
"""
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import hnswlib  # noqa: E402

import memory  # noqa: E402

K = 30  # memories to retrieve
QUERIES = 400
HEADS = ("entries", "index", "search", "fork", "add", "update", "delete")


def microseconds(call, arguments):
    """Return the median time of `call(argument)`."""
    times = []
    for argument in arguments:
        start = time.perf_counter()
        call(argument)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def random_sentences(num_texts):
    """Sentences of 12 random words; the word of rank r has a frequency proportional to 1 / r."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(8_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    return [" ".join(rng.choices(words, weights, k=12)) for _ in range(num_texts)]


def bank_of(texts, exact_up_to):
    memory.EXACT_UP_TO = exact_up_to
    bank = memory.MemoryBank(memory.make_embedder("hash"))
    for text in texts:
        bank.add(text, "Ann", "")
    return bank


def fork_edit_search(bank, query):
    fork = bank.fork()
    fork.update(0, query, "")
    fork.search(query, K)


def measure(texts, queries, exact_up_to):
    """Print one row of the table. Returns the ids that each query finds."""
    bank = bank_of(texts, exact_up_to)
    bank.embedder.embed(queries)
    bank.search("", K)  # builds the index
    found = [{hit.id for hit in bank.search(query, K)} for query in queries]
    kind = "graph" if isinstance(bank._indexes["Ann"].main, hnswlib.Index) else "exact"
    searches = (lambda query: bank.search(query, K), lambda query: fork_edit_search(bank, query))
    writes = (lambda i: bank.add(queries[i], "Ann", ""), lambda i: bank.update(i, queries[i], ""), bank.delete)
    row = [microseconds(search, queries) for search in searches]
    row += [microseconds(lambda i, write=write: (write(i), bank.search("", K)), range(len(texts) // 10)[:QUERIES])
            for write in writes]
    print(f"{len(texts):7} {kind:>7}", *(f"{spent:7.0f}" for spent in row), flush=True)
    return found


def main():
    texts = Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else random_sentences(20_000 + QUERIES)
    stored, queries = texts[:20_000], texts[20_000:20_000 + QUERIES]
    embedder = memory.make_embedder("hash")
    first = microseconds(lambda text: embedder.embed([text]), texts[:5_000])
    again = microseconds(lambda text: embedder.embed([text]), texts[:5_000])
    print(f"embed one text: {first:.0f} us, cached {again:.1f} us. Medians in us, k = {K}:")
    print(*(f"{head:>7}" for head in HEADS))
    for size in (100, 1_000, 10_000, 20_000):
        exact = measure(stored[:size], queries, 10 ** 9)
        if size >= 10_000:
            graph = measure(stored[:size], queries, 1_000)
            common = sum(len(a & b) for a, b in zip(exact, graph, strict=True))
            print(f"{'':7} recall of the graph {common / (K * len(queries)):.4f}")


if __name__ == "__main__":
    main()
