"""The memory bank: search against an exact reference, banks and forks against dictionaries, damaged files."""
import functools
import json
import os
import tempfile

import hnswlib
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from mutations import FUZZ

import memory
from data import UsageError
from memory import MemoryBank, hashed_vectors, make_embedder


class TableEmbedder:
    """Text "7" -> row 7 of a table of random unit vectors that form clusters; no idf."""
    name, hashed = "table", slice(0, 0)

    def __init__(self, num_rows, dim, seed=0):
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((30, dim))[rng.integers(30, size=num_rows)]
        self.rows = memory.unit(rows + rng.standard_normal((num_rows, dim))).astype(np.float32)
        self.dim = dim

    def embed(self, texts):
        return self.rows[[int(text) for text in texts]]

    def embed_query(self, text, df, total):
        return self.rows[int(text)]


def exact_ids(bank, query, k, speaker=None):
    """Reference: score every entry in double precision."""
    vector = bank.embedder.rows[int(query)].astype(float)
    scores = {m.id: float(bank.embedder.rows[int(m.text)].astype(float) @ vector)
              for m in bank if speaker in (None, m.speaker)}
    return sorted(scores, key=lambda id: -scores[id])[:k]


def recall(bank, queries, k=30, speaker=None):
    shares = []
    for query in map(str, queries):
        found, expected = [m.id for m in bank.search(query, k, speaker)], exact_ids(bank, query, k, speaker)
        assert len(found) == len(set(found)) == len(expected)
        shares.append(len(set(found) & set(expected)) / max(1, len(expected)))
    return np.mean(shares)


def filled(embedder, num_entries, speakers=("Ann", "Bob")):
    bank = MemoryBank(embedder)
    for row in range(num_entries):
        bank.add(str(row), speakers[row % len(speakers)], "")
    return bank


def shuffle_bank(bank, rng, num_deletes, num_updates, num_rows):
    ids = rng.permutation([m.id for m in bank])
    for id in ids[:num_deletes]:
        bank.delete(int(id))
    for id in ids[num_deletes:num_deletes + num_updates]:
        bank.update(int(id), str(rng.integers(num_rows)), "later")


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 17, 30, 31, 300])
def test_search_is_exact_in_small_banks_after_any_edits(size):
    bank, rng = filled(TableEmbedder(2 * size + 5, 8), size), np.random.default_rng(size)
    for _ in range(3):
        assert recall(bank, range(5)) == recall(bank, range(5), speaker="Ann") == 1
        assert [m.id for m in bank.search("0", 3)] == exact_ids(bank, "0", 3)  # best first
        shuffle_bank(bank, rng, len(bank) // 3, len(bank) // 3, 2 * size)
        bank.add(str(2 * size), "Bob", "")


def test_search_sees_every_edit_since_the_index_was_built():
    bank = filled(TableEmbedder(300, 8), 200, ["Ann"])
    for i in range(30):
        fork = bank.fork()
        first, second, *_ = exact_ids(bank, str(i), 2)
        bank.delete(first)
        bank.update(second, str(299 - i), "later")
        bank.add(str(200 + i), "Ann", "")
        assert recall(bank, [i, 299 - i, 200 + i], k=5) == recall(fork, [i, 299 - i, 200 + i], k=5) == 1


def test_search_in_ten_thousand_entries():
    bank, rng = filled(TableEmbedder(12_000, 64), 10_000), np.random.default_rng(0)
    assert recall(bank, rng.integers(12_000, size=5)) >= 0.99
    shuffle_bank(bank, rng, 4_000, 1_000, 12_000)
    assert recall(bank, rng.integers(12_000, size=5)) >= 0.99
    assert recall(bank, rng.integers(12_000, size=5), speaker="Bob") >= 0.99


def is_graph(bank, speaker):
    return isinstance(bank._indexes[speaker].main, hnswlib.Index)


def test_one_speaker_beyond_the_threshold_is_searched_by_the_graph(monkeypatch):
    monkeypatch.setattr(memory, "MAX_CHANGED", 0)  # every search after a write builds the index again
    bank = filled(TableEmbedder(memory.EXACT_UP_TO + 1_000, 16), memory.EXACT_UP_TO, ["Ann"])
    assert recall(bank, [3]) == 1 and not is_graph(bank, "Ann")
    bank.add("20500", "Ann", "")
    assert recall(bank, [3, 11_111, 20_500]) >= 0.99 and is_graph(bank, "Ann")


def test_graph_after_growth_updates_and_deletions(monkeypatch):
    monkeypatch.setattr(memory, "EXACT_UP_TO", 100)
    bank, rng = filled(TableEmbedder(4_000, 32), 3_000, ["Ann"]), np.random.default_rng(0)
    queries = rng.integers(4_000, size=10)
    assert recall(bank, queries) >= 0.99
    shuffle_bank(bank, rng, 1_300, 800, 4_000)
    assert recall(bank, queries) >= 0.99
    assert recall(bank, queries[:2], k=5_000) == 1  # all entries, which a search of the graph may not reach
    shuffle_bank(bank, rng, len(bank) - 40, 20, 4_000)
    assert recall(bank, queries) == 1 and not is_graph(bank, "Ann")  # built again


def test_graph_that_cannot_reach_enough_entries_is_scanned(monkeypatch):
    monkeypatch.setattr(memory, "EXACT_UP_TO", 100)
    bank = MemoryBank(TableEmbedder(5, 32))
    for row in [0] * 700 + [1] * 700 + [2]:
        bank.add(str(row), "Ann", "")
    assert recall(bank, [2, 1], k=1_401) == 1
    with pytest.raises(RuntimeError):  # otherwise the assertion above proves nothing
        bank._indexes["Ann"].main.knn_query(bank.embedder.rows[1], 1_300)


@pytest.mark.parametrize("exact_up_to", [20_000, 50])
def test_same_operations_same_answers(monkeypatch, exact_up_to):
    monkeypatch.setattr(memory, "EXACT_UP_TO", exact_up_to)
    answers = []
    for _ in range(2):
        bank = filled(TableEmbedder(600, 8), 400)
        shuffle_bank(bank, np.random.default_rng(1), 100, 100, 600)
        answers.append([bank.search_scored(str(row), 30) for row in range(20)])
    assert answers[0] == answers[1]


def test_ties_go_to_the_older_entry():
    bank = MemoryBank(make_embedder("hash"))
    for speaker in ("Bob", "Ann") * 10:
        bank.add("Jon has a dog.", speaker, "")
    assert [m.id for m in bank.search("a dog", 5)] == [0, 1, 2, 3, 4]
    bank.delete(1)
    bank.update(3, "Jon has a dog.", "later")
    assert [m.id for m in bank.search("a dog", 5)] == [0, 2, 3, 4, 5]
    assert [m.id for m in bank.search("a dog", 3, speaker="Ann")] == [3, 5, 7]


def test_small_and_odd_requests():
    bank = MemoryBank(make_embedder("hash"))
    assert bank.search("anything", 5) == [] and len(bank) == 0 and list(bank) == []
    assert bank.add("Jon has a dog.", "Jon", "May") == 0
    assert bank[0] == memory.Memory(0, "Jon has a dog.", "Jon", "May")
    assert bank.search("dog", 5) == [bank[0]]
    assert bank.search("dog", 0) == bank.search("dog", -1) == bank.fork().search("dog", -1) == []
    assert bank.search("dog", 5, speaker="Ann") == []
    bank.add("", "Jon", "")
    bank.add("!? \ud800", "Jon", "")  # JSON from a language model can contain a lone surrogate
    assert len(bank.search("", 5)) == 3
    score = bank.search_scored("dog", 1)[0][1]
    assert bank.search("dog", 5, floor=score) == [bank[0]] and bank.search("dog", 5, floor=score + 1e-6) == []
    for call in (bank.__getitem__, bank.delete, lambda id: bank.update(id, "", "")):
        with pytest.raises(KeyError, match="no memory with id 7"):
            call(7)


hashed_vector = functools.cache(lambda text: hashed_vectors([text])[0])


def hash_scores(bank, query):
    """Reference for `hash`, with document frequencies counted from the texts: {id: score}."""
    df = sum((hashed_vector(m.text) > 0 for m in bank), np.zeros(memory.HASHED_DIM))
    vector = bank.embedder.embed_query(query, df, len(bank))
    return {m.id: float(hashed_vector(m.text) @ vector) for m in bank}


class BankMachine(RuleBasedStateMachine):
    """Up to four banks, each with a dictionary of its expected entries. A bank and its forks change in any order."""
    texts = st.sampled_from(["a dog", "a red dog", "my cat", "cat and dog", "the blue car", "car", "tea", ""])
    picks = st.integers(0, 30)

    def __init__(self):
        super().__init__()
        bank = MemoryBank(make_embedder("hash"))
        for text in ("a dog", "my cat", "car", "tea", "a red dog"):
            bank.add(text, "Ann", "now")
        bank.search("dog", 1)  # builds the index
        self.banks = [[bank, {m.id: (m.text, "Ann", "now") for m in bank}, 4]]  # bank, expected entries, last id
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(memory, "MAX_CHANGED", 0.6)  # small banks then also search `main` and `recent` together

    def teardown(self):
        self.patch.undo()

    def pick(self, which, number):
        """Return a bank, its dictionary and one of its ids (None if it is empty)."""
        bank, model, _ = self.banks[which % len(self.banks)]
        return bank, model, list(model)[number % len(model)] if model else None

    @rule(which=picks, text=texts, speaker=st.sampled_from(["Ann", "Bob"]))
    def add(self, which, text, speaker):
        entry = self.banks[which % len(self.banks)]
        id = entry[0].add(text, speaker, "now")
        assert id > entry[2]
        entry[2] = id
        entry[1][id] = text, speaker, "now"

    @rule(which=picks, number=picks, text=texts)
    def update(self, which, number, text):
        bank, model, id = self.pick(which, number)
        if id is not None:
            bank.update(id, text, "later")
            model[id] = text, model[id][1], "later"

    @rule(which=picks, number=picks)
    def delete(self, which, number):
        bank, model, id = self.pick(which, number)
        if id is not None:
            bank.delete(id)
            del model[id]
            with pytest.raises(KeyError):
                bank.delete(id)

    @rule(which=picks, number=picks)
    def fork(self, which, number):
        bank, model, last_id = self.banks[which % len(self.banks)]
        fork = [bank.fork(), dict(model), last_id]
        if len(self.banks) < 4:
            self.banks.append(fork)
        else:
            self.banks[number % 4] = fork

    @rule(which=picks)
    def save_and_load(self, which):
        entry = self.banks[which % len(self.banks)]
        with tempfile.TemporaryDirectory() as folder:
            entry[0].save(os.path.join(folder, "bank.json"))
            entry[0] = MemoryBank.load(os.path.join(folder, "bank.json"), make_embedder("hash"))

    @rule(which=picks, query=texts, k=st.integers(1, 8), speaker=st.sampled_from([None, "Ann", "Bob"]))
    def search(self, which, query, k, speaker):
        bank, model, _ = self.banks[which % len(self.banks)]
        scores = {id: score for id, score in hash_scores(bank, query).items() if speaker in (None, model[id][1])}
        found = bank.search_scored(query, k, speaker)
        assert [score for _, score in found] == pytest.approx(sorted(scores.values())[::-1][:k], abs=1e-5)
        for m, score in found:
            assert score == pytest.approx(scores[m.id], abs=1e-5)
            assert (m.text, m.speaker, m.time) == model[m.id]

    @invariant()
    def every_bank_shows_its_dictionary(self):
        for bank, model, _ in self.banks:
            assert [(m.id, (m.text, m.speaker, m.time)) for m in bank] == sorted(model.items())
            assert len(bank) == len(model) and all(id in bank for id in model)


BankMachine.TestCase.settings = settings(FUZZ, stateful_step_count=10)
test_bank_against_dictionaries = BankMachine.TestCase


def test_a_fork_may_delete_or_rewrite_any_number_of_entries():
    bank = filled(TableEmbedder(300, 8), 200, ["Ann"])
    fork = bank.fork()
    for id in exact_ids(bank, "0", 150):
        fork.delete(id)
    for id in [m.id for m in fork][-20:]:  # the last entry is one of them
        fork.update(id, str(id + 50), "")
    for seen in (fork, fork.fork()):
        assert len(seen) == 50 and recall(seen, range(0, 300, 30), k=10) == recall(seen, range(5), k=60) == 1
    assert len(bank) == 200 and recall(bank, range(5), k=60) == 1


def test_eight_forks_cost_their_edits(monkeypatch):
    bank, built, build_index = MemoryBank(make_embedder("hash")), [], memory.build_index
    for number in range(1_000):
        bank.add(f"number {number}", "Ann", "")
        bank.add(f"number {number}", "Bob", "")
    bank.search("number 77", 30)
    monkeypatch.setattr(memory, "build_index", lambda vectors: built.append(len(vectors)) or build_index(vectors))
    for i in range(8):
        fork = bank.fork()
        fork.add(f"number 7{i}", "Ann", "")
        fork.delete(70 + 2 * i)
        fork.update(10, "number 77", "")
        for _ in range(3):
            found = [score for _, score in fork.search_scored("number 77", 30)]
        expected = hash_scores(fork, "number 77")
        assert found == pytest.approx(sorted(expected.values())[::-1][:30], abs=1e-5)
        assert all(fork._indexes[name].main is bank._indexes[name].main for name in ("Ann", "Bob"))
    assert sum(built) == 8 * 2  # the entries that each fork added or rewrote
    assert bank.search("number 77", 30)[0].text == "number 77" and len(bank) == 2_000


def test_a_save_that_is_killed_leaves_the_old_file(tmp_path, monkeypatch):
    path, bank = tmp_path / "bank.json", filled(make_embedder("hash"), 3)
    bank.save(path)
    bank.add("half a pair \ud800, \u4f60\u597d", "Ann", "")

    def kill(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", kill)
        bank.save(path)
    assert len(MemoryBank.load(path, make_embedder("hash"))) == 3
    bank.save(path)
    assert list(MemoryBank.load(path, make_embedder("hash"))) == list(bank)
    assert os.listdir(tmp_path) == ["bank.json"]
    with pytest.raises(UsageError, match="nowhere"):
        bank.save(tmp_path / "nowhere" / "bank.json")


def spoiled(**changes):
    def spoil(content):
        return json.dumps({**content, **changes})
    return spoil


ENTRY = {"id": 0, "text": "t", "speaker": "s", "time": "m"}


@pytest.mark.parametrize("spoil", [
    lambda content: "", lambda content: json.dumps(content)[:-20], lambda content: "[" * 100_000,
    lambda content: "[]", lambda content: "null", lambda content: "{}", lambda content: b"\xff\xfe\x00\x80PK",
    spoiled(format="memory-r1 bank, version 2"), spoiled(next_id="9"), spoiled(next_id=0),
    spoiled(next_id=None, memories=[]), spoiled(next_id=-5, memories=[]), spoiled(next_id=1 << 62, memories=[]),
    spoiled(memories=None),
    spoiled(memories=[1]), spoiled(memories=[{"id": 0}]), spoiled(memories=[ENTRY, ENTRY]),
    spoiled(memories=[{**ENTRY, "id": -1}]), spoiled(memories=[{**ENTRY, "id": True}]),
    spoiled(memories=[{**ENTRY, "id": [0]}]), spoiled(memories=[{**ENTRY, "text": None}]),
    spoiled(memories=[{**ENTRY, "more": 1}]),
    lambda content: json.dumps({key: value for key, value in content.items() if key != "memories"})])
def test_a_damaged_or_foreign_file_is_one_line(tmp_path, spoil):
    path = tmp_path / "bank.json"
    filled(make_embedder("hash"), 3).save(path)
    broken = spoil(json.loads(path.read_text()))
    path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    for place in (path, tmp_path, tmp_path / "missing.json"):
        with pytest.raises(UsageError, match="cannot be read as a memory bank") as error:
            MemoryBank.load(place, make_embedder("hash"))
        assert str(place) in str(error.value) and "\n" not in str(error.value)
