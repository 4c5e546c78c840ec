"""
The memory bank of Memory-R1 (arXiv 2508.19828): what the speakers said, one short text per entry, found by
similarity. The Memory Manager edits it (add, update, delete), the Answer Agent searches it.

    bank = MemoryBank(make_embedder("hash"))
    bank.add("Jon has a dog named Buddy.", "Jon", "8 May, 2023")
    bank.search("What is Jon's dog called?", k=1)[0].text

Not in the paper: forks, so that eight candidate edits can be tried on one bank, and the `hash` embedder, that
needs no download. Vectors lie in hnswlib, one index per speaker: its exact `BFIndex` up to EXACT_UP_TO, its
HNSW graph beyond. The exact scan of 20,000 hashed texts takes 2.5 ms, a write 8 us; so far apart do they lie
that the graph needs 2.3 ms for a recall of .99, and 1.2 ms for a write (tests/benchmarks/bank.py).

n texts, k results asked for; a score is an inner product in [-1, 1] (`hash`: [0, 1]).
N entries in the bank, df_d of them with a feature in hashed dimension d, idf_d = log(1 + N / df_d).
"""
import argparse
import json
import os
import re
import zlib
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import hnswlib
import numpy as np

from data import UsageError

EXACT_UP_TO = 20_000  # entries of one speaker: 0.1 ms a search of 1,000, 1 ms of 10,000
HASHED_DIM = 1024
HASHED_SHARE = 2 / 3  # of the score of `hash+ENCODER`: on LoCoMo the best sum is encoder + 2 x hashed
RECENT_TEXTS = 8192  # vectors an embedder remembers: forks and questions embed the same texts again and again
FUNCTION_WORD_COUNT = 0.1  # of a word: idf alone cannot tell in a small bank; on LoCoMo it adds .03 to recall
FUNCTION_WORDS = frozenset("""
a an the and or but if of to in on at by for from with about as into is are was were be been being am do does
did done has have had i you he she it we they me him her us them my your his its our their this that these
those what which who whom whose when where why how there here not no so than then too very can could will
would shall should may might must just s t d m re ve ll""".split())
FILE_FORMAT = "memory-r1 bank, version 1"


@dataclass(frozen=True)
class Memory:
    id: int  # stable, never given out twice by one bank
    text: str
    speaker: str  # whose memory it is: the paper keeps one bank per participant
    time: str  # of the turn that wrote it, as the benchmark writes it


def unit(vectors):
    """Rows of length 1; a zero row stays zero. (..., d) -> (..., d)"""
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
    """Roots of the feature counts, unit length; zero for a text without words. n texts -> (n, HASHED_DIM)"""
    vectors = np.zeros((len(texts), HASHED_DIM), dtype=np.float32)
    for row, text in zip(vectors, texts, strict=True):
        features = [word_features(word) for word in re.findall(r"\w+", text.casefold())]
        dims = [dim for word_dims, _ in features for dim in word_dims]
        counts = [count for _, word_counts in features for count in word_counts]
        row[:] = np.sqrt(np.bincount(np.array(dims, dtype=np.intp), counts, HASHED_DIM))
    return unit(vectors)


class Encoder:
    """A Hugging Face encoder, hub id or folder: the mean of its last hidden states over the real tokens."""

    def __init__(self, name, device="cpu"):
        from transformers import AutoModel, AutoTokenizer  # here: `hash` does without them and starts at once
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
            self.model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
            self.model = self.model.float().to(device).eval().requires_grad_(False)
            positions = getattr(self.model.config, "max_position_embeddings", 256)
            self.max_tokens = min(256, positions, self.tokenizer.model_max_length)
            self.dim = self.encode(["a word"]).shape[1]
        except Exception as error:  # whatever a foreign folder or a missing network raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(f"embedder {name!r} cannot be loaded as an encoder ({reason}); "
                             "give an encoder's hub id or folder, 'hash' or 'hash+ENCODER'") from error

    def encode(self, texts, batch_size=64):
        """Unit vectors. n > 0 texts -> (n, dim)"""
        order = np.argsort([len(text) for text in texts], kind="stable")  # little padding in a batch
        vectors = []
        for start in range(0, len(texts), batch_size):
            batch = [texts[i].strip() or "." for i in order[start:start + batch_size]]
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=self.max_tokens,
                                    return_tensors="pt").to(self.model.device)
            hidden = self.model(**tokens).last_hidden_state  # (batch, T, dim)
            mask = tokens["attention_mask"][:, :, None]  # (batch, T, 1), 1 = a real token
            vectors.append(((hidden * mask).sum(dim=1) / mask.sum(dim=1)).cpu().numpy())
        return unit(np.concatenate(vectors))[np.argsort(order)]


class Embedder:
    """
    Text -> [a * encoder ; b * hashed], parts of unit length, a^2 + b^2 = 1, b^2 = `hashed_share`: an inner
    product is the weighted mean of the two cosines. The idf sits on the question alone, squared (a cosine of
    tf-idf has it on both sides): stored vectors stay while df change. Any object of this shape will do.
    """

    def __init__(self, name, encoder=None, hashed_share=1.0):
        encoder_dim = encoder.dim if encoder else 0
        self.name = name  # written into saved banks
        self.dim = encoder_dim + (HASHED_DIM if hashed_share else 0)
        self.hashed = slice(encoder_dim, self.dim)  # the dimensions whose df a bank counts
        self._encoder, self._a, self._b = encoder, (1 - hashed_share) ** 0.5, hashed_share ** 0.5
        self._recent = {}  # text -> vector, the latest last

    def embed(self, texts):
        """Vectors to store. n texts -> (n, dim) float32"""
        missing = [text for text in dict.fromkeys(texts) if text not in self._recent]
        if missing:
            self._recent.update(zip(missing, self._computed(missing), strict=True))
        vectors = np.array([self._recent[text] for text in texts], dtype=np.float32).reshape(-1, self.dim)
        while len(self._recent) > RECENT_TEXTS:
            del self._recent[next(iter(self._recent))]
        return vectors

    def embed_query(self, text, df, total):
        """The vector of a question to a bank of `total` entries with document frequencies df -> (dim,)"""
        vector = self.embed([text])[0]
        idf = np.log1p(total / np.maximum(df, 1))
        vector[self.hashed] = self._b * unit(vector[self.hashed] * idf ** 2)
        return vector

    def _computed(self, texts):
        # A lone surrogate, which JSON written by a language model may hold, is not UTF-8: it becomes "?".
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        parts = [self._a * self._encoder.encode(texts)] if self._encoder else []
        if self._b:
            parts.append(self._b * hashed_vectors(texts))
        return np.concatenate(parts, axis=1)


def make_embedder(name, device="cpu"):
    """The embedder called `hash`, `hash+ENCODER` or ENCODER, a hub id or folder; UsageError if it is none."""
    if name == "hash":
        return Embedder(name)
    share = HASHED_SHARE if name.startswith("hash+") else 0.0
    return Embedder(name, Encoder(name.removeprefix("hash+"), device), share)


class SpeakerIndex:
    """The vectors of one speaker in hnswlib. One thread, a fixed seed: same writes, same answers."""

    def __init__(self, dim):
        self.dim = dim
        self.vectors = {}  # id -> (dim,): a rebuild needs them, and BFIndex does not hand them back
        self._build()

    def _build(self):
        """Starts a fresh index over `vectors`, with room for as many again."""
        self.is_graph = len(self.vectors) > EXACT_UP_TO
        self.num_stale = 0  # entries deleted or moved since
        room = max(8, 2 * len(self.vectors))
        if self.is_graph:
            self.index = hnswlib.Index("ip", self.dim)
            self.index.init_index(room, M=32, ef_construction=200, random_seed=0)
            self.index.set_ef(500)  # entries a walk keeps in view, k if that is more
        else:
            self.index = hnswlib.BFIndex("ip", self.dim)
            self.index.init_index(min(room, max(8, EXACT_UP_TO)))
        self.index.set_num_threads(1)
        for id, vector in self.vectors.items():
            self.index.add_items(vector, [id])

    def put(self, id, vector):
        """Adds an entry, or moves it to another vector."""
        is_new = id not in self.vectors
        self.vectors[id] = vector
        self.num_stale += not is_new
        if is_new and self.index.get_current_count() == self.index.get_max_elements():
            if self.is_graph:
                self.index.resize_index(2 * self.index.get_max_elements())
            else:
                self._build()
        self.index.add_items(vector, [id])

    def remove(self, id):
        """Removes an entry. Its id must not come back: BFIndex may write it where no search looks."""
        del self.vectors[id]
        self.num_stale += 1
        (self.index.mark_deleted if self.is_graph else self.index.delete_vector)(id)

    def nearest(self, query, k):
        """(score, id) of the k best, or of all if there are fewer: best first, among equals the lowest id."""
        if self.is_graph and self.num_stale > len(self.vectors):
            self._build()
        k = min(k, len(self.vectors))
        if k < 1:
            return []
        try:
            ids, distances = self.index.knn_query(query, k, num_threads=1)
        except RuntimeError:  # the walk over the graph met fewer than k entries: scan them all
            hits = [(float(vector @ query), id) for id, vector in self.vectors.items()]
            return sorted(hits, key=lambda hit: (-hit[0], hit[1]))[:k]
        return list(zip((1 - distances[0]).tolist(), ids[0].tolist(), strict=True))


def read_bank(path):
    """What a saved bank holds: the next id to give out, and the memories in the order of their ids."""
    try:
        with open(path, encoding="utf-8", errors="surrogatepass") as file:
            content = json.load(file)
        found = content.get("format") if isinstance(content, dict) else None
        if found != FILE_FORMAT:
            raise ValueError(f"its format is {found!r}, this program reads {FILE_FORMAT!r}")
        next_id, memories = content["next_id"], [Memory(**entry) for entry in content["memories"]]
        ids = {memory.id for memory in memories}
        are_sound = type(next_id) is int and all(type(id) is int and 0 <= id < next_id < 1 << 62 for id in ids)
        if not are_sound or len(ids) < len(memories):
            raise ValueError("its ids are damaged")
        if not all(type(part) is str for memory in memories for part in list(asdict(memory).values())[1:]):
            raise ValueError("a text, speaker or time is not a string")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: cannot be read as a memory bank ({reason}); "
                         "give a file that MemoryBank.save wrote, or build the bank again") from error
    return next_id, sorted(memories, key=lambda memory: memory.id)


class MemoryBank:
    """
    Memories by id and by similarity. A fork is an overlay over the bank below it, its own entries and the ids
    it hides: it costs its changes, not the bank, and writes nothing there before `commit`. Writing to a bank
    makes the forks it has unusable: they raise RuntimeError. For one thread at a time.
    """

    def __init__(self, embedder):
        self.embedder = embedder
        self._base, self._base_version = None, 0  # a fork: the bank below, and its version as forked
        self._memories = {}  # id -> Memory; a fork: its own
        self._hidden = set()  # a fork: ids of the bank below that it deleted or rewrote
        self._indexes = {}  # speaker -> SpeakerIndex of self._memories
        self._df = np.zeros(embedder.dim, dtype=int)[embedder.hashed]  # a fork: the difference it makes
        self._next_id, self._version = 0, 0  # the version counts the writes
        self._found = {}  # recent results: forks ask the bank below the same questions

    def add(self, text, speaker, time):
        """Stores an entry and returns its id. Sibling forks, unaware of each other, give the same ids."""
        self._store(Memory(self._next_id, text, speaker, time), self.embedder.embed([text])[0])
        self._next_id += 1
        return self._next_id - 1

    def update(self, id, text, time):
        """Rewrites an entry, its id and speaker stay. KeyError if there is none."""
        memory = replace(self[id], text=text, time=time)
        self._store(memory, self.embedder.embed([text])[0])

    def delete(self, id):
        """Removes an entry, its id never comes back. KeyError if there is none."""
        speaker = self[id].speaker
        self._forget(id)
        if self._memories.pop(id, None):
            self._indexes[speaker].remove(id)

    def get(self, id):
        """The memory with this id. KeyError if there is none."""
        if id not in self:
            raise KeyError(f"no memory with id {id!r} in this bank")
        return self._memories[id] if id in self._memories else self._base.get(id)

    __getitem__ = get

    def __contains__(self, id):
        below = self._below()
        return id in self._memories or below is not None and id not in self._hidden and id in below

    def __len__(self):
        below = self._below()
        return len(self._memories) + (0 if below is None else len(below) - len(self._hidden))

    def __iter__(self):
        """Memories in the order of their ids."""
        below = self._below()
        shown = [] if below is None else [memory for memory in below if memory.id not in self._hidden]
        return iter(sorted([*shown, *self._memories.values()], key=lambda memory: memory.id))

    def search(self, query, k, speaker=None, floor=None):
        """The k memories most similar to the text `query`, of one speaker or of all, best first."""
        return [memory for memory, _ in self.search_scored(query, k, speaker, floor)]

    def search_scored(self, query, k, speaker=None, floor=None):
        """`search` as (memory, score) pairs; both leave out what scores below `floor`."""
        df, total = self._statistics()
        found = self._nearest(self.embedder.embed_query(query, df, total), speaker, k)
        return [(self[id], score) for score, id in found if floor is None or score >= floor]

    def fork(self):
        """An overlay over this bank, to try edits on. A fork can be forked."""
        self._below()
        fork = MemoryBank(self.embedder)
        fork._base, fork._base_version, fork._next_id = self, self._version, self._next_id
        return fork

    def commit(self):
        """Writes this fork's edits into the bank below, ids kept, and returns that bank, to go on with."""
        below = self._below()
        if below is None:
            raise RuntimeError("only a fork can be committed")
        for id in sorted(self._hidden - self._memories.keys()):
            below.delete(id)
        for id, memory in sorted(self._memories.items()):
            below._store(memory, self._vector(id))
        below._next_id = max(below._next_id, self._next_id)
        return below

    def save(self, path):
        """Writes all that is seen here into one JSON file; a kill leaves the old file or the new."""
        content = {"format": FILE_FORMAT, "embedder": self.embedder.name,
                   "next_id": self._next_id, "memories": [asdict(memory) for memory in self]}
        try:
            with open(f"{path}.tmp", "w", encoding="utf-8", errors="surrogatepass") as file:
                json.dump(content, file, ensure_ascii=False, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
        except OSError as error:
            raise UsageError(f"{path}: the memory bank cannot be written ({error.strerror}); "
                             "give a file in a folder that exists and has room") from error

    @classmethod
    def load(cls, path, embedder):
        """The bank `save` wrote; any embedder computes its vectors. UsageError if the file is no bank."""
        next_id, memories = read_bank(path)
        bank = cls(embedder)
        for memory, vector in zip(memories, embedder.embed([m.text for m in memories]), strict=True):
            bank._store(memory, vector)
        bank._next_id = next_id
        return bank

    def _below(self):
        """The bank a fork lies over, None for no fork; RuntimeError if it was written to since the fork."""
        if self._base is not None:
            self._base._below()
            if self._base._version != self._base_version:
                raise RuntimeError("the bank below this fork was written to since: fork it again")
        return self._base

    def _store(self, memory, vector):
        """Adds an entry, or puts it in the place of the one with its id."""
        if memory.id in self:
            self._forget(memory.id)
        if memory.speaker not in self._indexes:
            self._indexes[memory.speaker] = SpeakerIndex(self.embedder.dim)
        self._indexes[memory.speaker].put(memory.id, vector)
        self._memories[memory.id] = memory
        self._df += vector[self.embedder.hashed] > 0
        self._version += 1

    def _forget(self, id):
        """Takes an entry out of df and out of the view below; the caller takes it out of this bank."""
        self._df -= self._vector(id)[self.embedder.hashed] > 0
        if id not in self._memories:
            self._hidden.add(id)
        self._version += 1

    def _vector(self, id):
        memory = self._memories.get(id)
        return self._indexes[memory.speaker].vectors[id] if memory else self._base._vector(id)

    def _statistics(self):
        """df and N. A fork that changed less than one entry in 100 keeps those below, hence the same question
        vectors and, from the bank below, the same results: eight such forks cost it one search."""
        below = self._below()
        if below is None:
            return self._df, len(self)
        df, total = below._statistics()
        if 100 * (len(self._memories) + len(self._hidden)) < total:
            return df, total
        return df + self._df, total + len(self._memories) - len(self._hidden)

    def _nearest(self, query, speaker, k):
        """(score, id) of the k best here and below, best first."""
        key = query.tobytes(), speaker, k, self._version
        if key not in self._found:
            found = [hit for name, index in self._indexes.items() if speaker in (None, name)
                     for hit in index.nearest(query, k)]
            if self._base is not None:
                enough = 1 << (k + len(self._hidden)).bit_length()  # a power of two: siblings ask alike
                below = self._base._nearest(query, speaker, enough)
                found += [(score, id) for score, id in below if id not in self._hidden]
            if len(self._found) >= 256:
                self._found.clear()
            self._found[key] = sorted(found, key=lambda hit: (-hit[0], hit[1]))[:max(k, 0)]
        return self._found[key]


def main(argv=None) -> None:
    """Shows a bank, a search and a fork."""
    argparse.ArgumentParser(description="Shows a memory bank, a search in it, and an edit on a fork.").parse_args(argv)
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
    print(f"\nan update on a fork: {fork[buddy].text}\nthe bank is as it was: {bank[buddy].text}")
    fork.commit()
    print(f"after the commit:      {bank[buddy].text}")


if __name__ == "__main__":
    main()
