"""
What a memory bank costs: `OMP_NUM_THREADS=1 python tests/benchmarks/bank.py [TEXTS]`, two minutes.
TEXTS holds one memory a line, 21,000 or more; without it sentences are made up, further apart than real ones.
"""
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import memory  # noqa: E402


def microseconds(call, arguments):
    """The median over the arguments."""
    spent = []
    for argument in arguments:
        start = time.perf_counter()
        call(argument)
        spent.append((time.perf_counter() - start) * 1e6)
    return statistics.median(spent)


def made_up(num_texts):
    """Sentences of 12 made-up words, word number r as often as 1 / r."""
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


def measure(texts, queries, exact_up_to):
    bank = bank_of(texts, exact_up_to)
    bank.embedder.embed(queries)
    index, df, total = bank._indexes["Ann"], *bank._statistics()
    vectors = [bank.embedder.embed_query(query, df, total) for query in queries]
    scan = microseconds(lambda vector: index.nearest(vector, 30), vectors)
    search = microseconds(lambda query: bank.search(query, 30), queries)
    again = microseconds(lambda query: bank.search(query, 30), queries)

    def eight_forks(query):
        for i in range(8):
            fork = bank.fork()
            fork.update(i, queries[i], "")
            fork.search(query, 30)
    forks = microseconds(eight_forks, queries)
    found = [{id for _, id in index.nearest(vector, 30)} for vector in vectors]
    add = microseconds(lambda query: bank.add(query, "Ann", ""), queries)
    update = microseconds(lambda i: bank.update(i, queries[i], ""), range(len(queries)))
    delete = microseconds(bank.delete, range(len(queries)))
    row = (scan, search, again, forks, add, update, delete)
    kind = "graph" if index.is_graph else "exact"
    print(f"{len(texts):7} {kind:>7}", *(f"{spent:7.0f}" for spent in row), flush=True)
    return found


def main():
    texts = Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else made_up(21_000)
    stored, queries = texts[:20_000], texts[20_000:20_200]
    embedder = memory.make_embedder("hash")
    first = microseconds(lambda text: embedder.embed([text]), texts[:5_000])
    again = microseconds(lambda text: embedder.embed([text]), texts[:5_000])
    print(f"embed one text: {first:.0f} us, again {again:.1f} us; search, forks, writes in us with k = 30:")
    heads = ("entries", "index", "scan", "search", "again", "8 forks", "add", "update", "delete")
    print(*(f"{head:>7}" for head in heads))
    for size in (100, 1_000, 10_000, 20_000):
        exact = measure(stored[:size], queries, 10 ** 9)
        if size >= 10_000:
            graph = measure(stored[:size], queries, 1_000)
            shared = sum(len(a & b) for a, b in zip(exact, graph, strict=True))
            print(f"{'':7} recall of the graph {shared / (30 * len(queries)):.4f}")


if __name__ == "__main__":
    main()
