"""
The memory bank of Memory-R1 (arXiv 2508.19828, Algorithm 3): short texts about the speakers of a dialogue, retrieved
by similarity. The Memory Manager edits the bank (add, update, delete), the Answer Agent searches it.

    bank = MemoryBank(make_embedder("hash"))
    bank.add("Jon has a dog named Buddy.", "Jon", "8 May, 2023")
    bank.search("What is Jon's dog called?", k=1)[0].text

The paper names neither an embedding model nor an index. The default embedder, `hash`, hashes words and character
n-grams and needs no download. Each speaker has an index in hnswlib: exact search (`BFIndex`) up to EXACT_UP_TO entries,
an HNSW graph above. Forks let training try several candidate edits on one bank: 0.16 ms for a fork of 1,000 entries
with one update and one search (tests/benchmarks/bank.py).

Shapes: n texts become vectors (n, dim) of unit length. A score is an inner product in [-1, 1], with `hash` in [0, 1].
"""
import support.installed  # noqa: F401  # isort: skip  names missing packages
import argparse
import json
import re
import zlib
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import hnswlib
import numpy as np

from data import UsageError
from support.encoder import Encoder
from support.run import write_file

EXACT_UP_TO = 20_000  # entries of one speaker; exact search takes 0.1 ms for 1,000 entries, 1 ms for 10,000
MAX_CHANGED = 1 / 8  # fraction of a speaker's entries that may change before a rebuild of the index (0.5 ms for 1,000)
HASHED_DIM = 1024
HASHED_SHARE = 2 / 3  # weight of the hashed part in `hash+ENCODER`; the best weight on LoCoMo
RECENT_TEXTS = 8192  # vectors that an embedder caches: forks and questions embed the same texts many times
FUNCTION_WORD_COUNT = 0.1  # not 1: idf does not detect function words in a small bank; adds 0.03 to recall on LoCoMo
FUNCTION_WORDS = frozenset("""
a an the and or but if of to in on at by for from with about as into is are was were be been being am do does
did done has have had i you he she it we they me him her us them my your his its our their this that these
those what which who whom whose when where why how there here not no so than then too very can could will
would shall should may might must just s t d m re ve ll""".split())
FILE_FORMAT = "memory-r1 bank, version 1"


@dataclass(frozen=True)
class Memory:
    id: int  # stable; a bank never uses an id twice
    text: str
    speaker: str  # the paper keeps one bank per participant
    time: str  # the time of the turn that wrote the text, in the format of the benchmark


def unit(vectors):
    """Scale vectors to length 1; a zero vector stays zero. (..., d) -> (..., d)"""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


@lru_cache(maxsize=1 << 16)
def word_features(word):
    """Dimensions and counts of a word's features, itself and its 3- and 4-grams: ox -> =ox, <ox, ox>, <ox>"""
    padded = f"<{word}>"
    grams = [padded[i:i + size] for size in (3, 4) for i in range(len(padded) - size + 1)]
    dims = [zlib.crc32(feature.encode()) % HASHED_DIM for feature in ["=" + word, *grams]]
    return dims, [FUNCTION_WORD_COUNT if word in FUNCTION_WORDS else 1.0] * len(dims)


def hashed_vectors(texts):
    """
    Embed texts by feature hashing. n texts -> (n, HASHED_DIM) of unit length, zero for a text without words.

    The features of a text are its words and, as in fastText (arXiv 1607.04606), their character n-grams: "dog" and
    "dogs" share some. A hash maps each feature to a dimension, so no vocabulary is stored. A row is sqrt(counts) scaled
    to unit length. The inner product of two rows is thus sum_d sqrt(p_d * q_d), where p and q are the feature
    frequencies of the texts: 1 if p = q. The square root damps repetitions, like a sublinear term frequency in tf-idf.
    """
    counts = np.zeros((len(texts), HASHED_DIM))
    for row, text in zip(counts, texts, strict=True):
        for word in re.findall(r"\w+", text.casefold()):
            np.add.at(row, *word_features(word))
    return unit(np.sqrt(counts).astype(np.float32))


class Embedder:
    """
    Text -> [a * encoder ; b * hashed], two parts of unit length with a^2 + b^2 = 1 and b^2 = `hashed_share`: the inner
    product of two texts is the weighted mean of two cosines. Any object with these attributes and methods works.
    """

    def __init__(self, name, encoder=None, hashed_share=1.0):
        encoder_dim = encoder.dim if encoder else 0
        self.name = name  # stored in saved banks
        self.dim = encoder_dim + (HASHED_DIM if hashed_share else 0)
        self.hashed = slice(encoder_dim, self.dim)  # the dimensions whose document frequencies a bank counts
        self._encoder, self._a, self._b = encoder, (1 - hashed_share) ** 0.5, hashed_share ** 0.5
        self._prompts = (encoder.text_prompt, encoder.query_prompt) if encoder else ("", "")
        self._recent = {}  # (prompt, text) -> vector, oldest first

    def embed(self, texts, are_queries=False):
        """Embed texts to store them, or queries. n texts -> (n, dim) float32"""
        prompt = self._prompts[are_queries]
        missing = [text for text in dict.fromkeys(texts) if (prompt, text) not in self._recent]
        if missing:
            parts = [self._a * self._encoder.encode(missing, prompt)] if self._encoder else []
            parts += [self._b * hashed_vectors(missing)] if self._b else []
            self._recent.update(zip([(prompt, text) for text in missing], np.concatenate(parts, axis=1), strict=True))
        vectors = np.array([self._recent[prompt, text] for text in texts], dtype=np.float32).reshape(-1, self.dim)
        while len(self._recent) > RECENT_TEXTS:
            del self._recent[next(iter(self._recent))]
        return vectors

    def embed_query(self, text, df, total):
        """
        Embed a query. The bank has `total` entries; df[d] of them have a feature in hashed dimension d. -> (dim,)

        The inner product of two tf-idf vectors has a factor idf[d] = log(1 + total / df[d]) from each side. Here only
        the query has a factor, idf^2, so stored vectors stay valid when document frequencies change.
        """
        vector = self.embed([text], are_queries=True)[0]
        idf = np.log1p(total / np.maximum(df, 1))
        vector[self.hashed] = self._b * unit(vector[self.hashed] * idf ** 2)
        return vector


def make_embedder(name, device="cpu"):
    """Make the embedder `hash`, `hash+ENCODER` or ENCODER (hub id or folder). UsageError if it cannot be loaded."""
    if name == "hash":
        return Embedder(name)
    share = HASHED_SHARE if name.startswith("hash+") else 0.0
    return Embedder(name, Encoder(name.removeprefix("hash+"), device), share)


def build_index(vectors):
    """Return an hnswlib index of {id: vector}, None for no vectors. One thread and a fixed seed: reproducible."""
    if not vectors:
        return None
    rows = np.stack(list(vectors.values()))  # (entries, dim)
    if len(rows) > EXACT_UP_TO:
        index = hnswlib.Index("ip", rows.shape[1])
        index.init_index(len(rows), M=32, ef_construction=200, random_seed=0)
        index.set_ef(500)  # candidates that a search keeps
    else:
        index = hnswlib.BFIndex("ip", rows.shape[1])
        index.init_index(len(rows))
    index.set_num_threads(1)
    index.add_items(rows, list(vectors))
    return index


def search_index(index, query, k):
    """Return (score, id) of the k nearest entries; ties go to the lowest ids."""
    k = min(k, index.get_current_count() if index else 0)
    if k < 1:
        return []
    ids, distances = index.knn_query(query, k, num_threads=1)
    return list(zip((1 - distances[0]).tolist(), ids[0].tolist(), strict=True))


@dataclass
class SpeakerIndex:
    """
    The vectors of one speaker. The index `main` holds all vectors of the time when it was built, `recent` those added
    or replaced since then. Neither is ever edited, so forks share both; a search rebuilds them if changes require it.
    """
    vectors: dict = field(default_factory=dict)  # id -> (dim,)
    changed: set = field(default_factory=set)  # ids added, replaced or removed since `main` was built
    main: hnswlib.BFIndex | hnswlib.Index | None = None
    recent: hnswlib.BFIndex | hnswlib.Index | None = None

    def copy(self):
        return replace(self, vectors=dict(self.vectors), changed=set(self.changed))

    def put(self, id, vector):
        """Add an entry, or replace its vector."""
        self.vectors[id] = vector
        self.changed.add(id)
        self.recent = None

    def remove(self, id):
        del self.vectors[id]
        self.changed.add(id)
        self.recent = None

    def nearest(self, query, k):
        """Return (score, id) of at least the k nearest entries, in any order."""
        if len(self.changed) > MAX_CHANGED * len(self.vectors):
            self.main, self.changed, self.recent = build_index(self.vectors), set(), None
        if self.recent is None:
            self.recent = build_index({id: self.vectors[id] for id in self.changed if id in self.vectors})
        try:
            hits = search_index(self.main, query, k + len(self.changed))
        except RuntimeError:  # the search of the graph reached fewer than k entries: scan all
            return [(float(vector @ query), id) for id, vector in self.vectors.items()]
        return [hit for hit in hits if hit[1] not in self.changed] + search_index(self.recent, query, k)


class MemoryBank:
    """
    Memories with stable ids and similarity search. A fork is an independent bank with the same entries; it shares their
    texts, vectors and indexes. Not thread-safe.
    """

    def __init__(self, embedder):
        self.embedder = embedder
        self._memories = {}  # id -> Memory
        self._indexes = {}  # speaker -> SpeakerIndex
        self._df = np.zeros(embedder.dim, dtype=int)[embedder.hashed]  # document frequencies
        self._next_id = 0

    def add(self, text, speaker, time):
        """Add an entry and return its id."""
        self._store(Memory(self._next_id, text, speaker, time), self.embedder.embed([text])[0])
        self._next_id += 1
        return self._next_id - 1

    def update(self, id, text, time):
        """Rewrite an entry; its id and speaker stay. KeyError if there is none."""
        self._store(replace(self[id], text=text, time=time), self.embedder.embed([text])[0])

    def delete(self, id):
        """Delete an entry; its id is never used again. KeyError if there is none."""
        index = self._indexes[self[id].speaker]
        self._df -= index.vectors[id][self.embedder.hashed] > 0
        index.remove(id)
        del self._memories[id]

    def __getitem__(self, id):
        """Return the memory with this id. KeyError if there is none."""
        if id not in self:
            raise KeyError(f"no memory with id {id!r} in this bank")
        return self._memories[id]

    def __contains__(self, id):
        return id in self._memories

    def __len__(self):
        return len(self._memories)

    def __iter__(self):
        """Iterate over the memories in the order of their ids."""
        return iter(sorted(self._memories.values(), key=lambda memory: memory.id))

    def search(self, query, k, speaker=None, floor=None):
        """Return the k memories most similar to the text `query`, of one speaker or of all, best first."""
        return [memory for memory, _ in self.search_scored(query, k, speaker, floor)]

    def search_scored(self, query, k, speaker=None, floor=None):
        """`search` with scores: (memory, score) pairs. Both leave out scores below `floor`."""
        vector = self.embedder.embed_query(query, self._df, len(self))
        hits = [hit for name, index in self._indexes.items() if speaker in (None, name)
                for hit in index.nearest(vector, k)]
        hits.sort(key=lambda hit: (-hit[0], hit[1]))  # equal scores: the lowest id first
        return [(self[id], score) for score, id in hits[:max(k, 0)] if floor is None or score >= floor]

    def fork(self):
        """Return an independent bank with the same entries."""
        fork = MemoryBank(self.embedder)
        fork._memories, fork._df, fork._next_id = dict(self._memories), self._df.copy(), self._next_id
        fork._indexes = {speaker: index.copy() for speaker, index in self._indexes.items()}
        return fork

    def save(self, path):
        """Write the bank to a JSON file atomically. UsageError if it cannot be written."""
        content = {"format": FILE_FORMAT, "embedder": self.embedder.name,
                   "next_id": self._next_id, "memories": [asdict(memory) for memory in self]}
        text = json.dumps(content, ensure_ascii=False, indent=1)
        try:
            write_file(Path(path), text.encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise UsageError(f"{path}: the memory bank cannot be written ({error.strerror}); "
                             "give a file in a folder that exists and has room") from error

    @classmethod
    def load(cls, path, embedder):
        """Read a file that `save` wrote; any embedder can embed its texts. UsageError if it is damaged."""
        bank = cls(embedder)
        next_id, memories = read_bank(path)
        for memory, vector in zip(memories, embedder.embed([m.text for m in memories]), strict=True):
            bank._store(memory, vector)
        bank._next_id = next_id
        return bank

    def _store(self, memory, vector):
        """Add an entry, or replace the entry with its id."""
        index = self._indexes.setdefault(memory.speaker, SpeakerIndex())
        if memory.id in self:
            self._df -= index.vectors[memory.id][self.embedder.hashed] > 0
        self._df += vector[self.embedder.hashed] > 0
        index.put(memory.id, vector)
        self._memories[memory.id] = memory


def read_bank(path):
    """Return the next free id and the memories in a file that MemoryBank.save wrote. UsageError if it is damaged."""
    try:
        with open(path, encoding="utf-8", errors="surrogatepass") as file:
            content = json.load(file)
        if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
            raise ValueError(f"its format is not {FILE_FORMAT!r}")
        next_id, memories = content["next_id"], [Memory(**entry) for entry in content["memories"]]
        ids = {memory.id for memory in memories}
        are_valid = type(next_id) is int and 0 <= next_id < 1 << 62 and all(
            type(id) is int and 0 <= id < next_id for id in ids)
        if not are_valid or len(ids) < len(memories):
            raise ValueError("its ids are damaged")
        if any(type(part) is not str for m in memories for part in (m.text, m.speaker, m.time)):
            raise ValueError("a text, speaker or time is not a string")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: cannot be read as a memory bank ({reason}); "
                         "give a file that MemoryBank.save wrote, or build the bank again") from error
    return next_id, memories


def main(argv=None) -> None:
    argparse.ArgumentParser(description="Show a memory bank, a search in it, and an edit on a fork.").parse_args(argv)
    bank = MemoryBank(make_embedder("hash"))
    buddy = bank.add("Jon has a dog, Buddy.", "Jon", "8 May 2023")
    bank.add("Jon works as a baker.", "Jon", "8 May 2023")
    bank.add("Gina drives a Kia.", "Gina", "3 June 2023")
    print("the bank:", *bank, sep="\n  ")
    print('\nsearch for "What is the name of Jon\'s dog?", similarity first:')
    for memory, score in bank.search_scored("What is the name of Jon's dog?", k=3):
        print(f"  {score:.2f}  {memory.text}")
    fork = bank.fork()
    fork.update(buddy, "Jon has two dogs, Buddy and Scout.", "3 June 2023")
    print(f"\nan update on a fork: {fork[buddy].text}\nthe bank is unchanged: {bank[buddy].text}")


if __name__ == "__main__":
    main()
