"""Search against exact references, banks and forks against dictionaries, embedders by hand, damaged files."""
import json
import os
import tempfile

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from mutations import FUZZ

import memory
from data import UsageError
from memory import MemoryBank, hashed_vectors, make_embedder, word_features


class TableEmbedder:
    """Text "7" -> row 7 of a table of random unit vectors, crowded around a few centres; no idf."""
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
    """The reference: every pair scored one by one in double precision."""
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
def test_search_is_exact_in_small_banks_whatever_was_edited(size):
    bank, rng = filled(TableEmbedder(2 * size + 5, 8), size), np.random.default_rng(size)
    for _ in range(3):
        assert recall(bank, range(5)) == recall(bank, range(5), speaker="Ann") == 1
        assert [m.id for m in bank.search("0", 3)] == exact_ids(bank, "0", 3)  # best first
        shuffle_bank(bank, rng, len(bank) // 3, len(bank) // 3, 2 * size)
        bank.add(str(2 * size), "Bob", "")


def test_search_in_ten_thousand_entries():
    bank, rng = filled(TableEmbedder(12_000, 64), 10_000), np.random.default_rng(0)
    assert recall(bank, rng.integers(12_000, size=5)) >= 0.99
    shuffle_bank(bank, rng, 4_000, 1_000, 12_000)
    assert recall(bank, rng.integers(12_000, size=5)) >= 0.99
    assert recall(bank, rng.integers(12_000, size=5), speaker="Bob") >= 0.99


def test_one_speaker_beyond_the_threshold_is_searched_by_the_graph():
    bank = filled(TableEmbedder(memory.EXACT_UP_TO + 1_000, 16), memory.EXACT_UP_TO, ["Ann"])
    assert not bank._indexes["Ann"].is_graph
    bank.add("20500", "Ann", "")
    assert bank._indexes["Ann"].is_graph
    assert recall(bank, [3, 11_111, 20_500]) >= 0.99


def test_graph_after_growth_updates_and_deletions(monkeypatch):
    monkeypatch.setattr(memory, "EXACT_UP_TO", 100)
    bank, rng = filled(TableEmbedder(4_000, 32), 3_000, ["Ann"]), np.random.default_rng(0)
    queries = rng.integers(4_000, size=10)
    assert recall(bank, queries) >= 0.99
    shuffle_bank(bank, rng, 1_300, 800, 4_000)
    assert recall(bank, queries) >= 0.99
    assert recall(bank, queries[:2], k=5_000) == 1  # all of it, which the walk over the graph may not find
    shuffle_bank(bank, rng, len(bank) - 40, 20, 4_000)
    assert recall(bank, queries) == 1 and not bank._indexes["Ann"].is_graph  # worn out and rebuilt


def test_graph_that_cannot_reach_enough_entries_is_scanned(monkeypatch):
    monkeypatch.setattr(memory, "EXACT_UP_TO", 100)
    bank = MemoryBank(TableEmbedder(5, 32))
    for row in [0] * 700 + [1] * 700 + [2]:
        bank.add(str(row), "Ann", "")
    with pytest.raises(RuntimeError):  # else this test tests nothing
        bank._indexes["Ann"].index.knn_query(bank.embedder.rows[1], 1_300)
    assert recall(bank, [2, 1], k=1_401) == 1


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
    assert bank.get(0) == bank[0] == memory.Memory(0, "Jon has a dog.", "Jon", "May")
    assert bank.search("dog", 5) == [bank[0]]
    assert bank.search("dog", 0) == bank.search("dog", -1) == bank.fork().search("dog", -1) == []
    assert bank.search("dog", 5, speaker="Ann") == []
    bank.add("", "Jon", "")
    bank.add("!? \ud800", "Jon", "")  # JSON from a language model can hold half a surrogate pair
    assert len(bank.search("", 5)) == 3
    score = bank.search_scored("dog", 1)[0][1]
    assert bank.search("dog", 5, floor=score) == [bank[0]] and bank.search("dog", 5, floor=score + 1e-6) == []
    for call in (bank.get, bank.delete, lambda id: bank.update(id, "", "")):
        with pytest.raises(KeyError, match="no memory with id 7"):
            call(7)


def hash_scores(bank, query, statistics_of):
    """The reference for `hash`: df counted afresh, {id: score}."""
    df = sum((hashed_vectors([m.text])[0] > 0 for m in statistics_of), np.zeros(memory.HASHED_DIM))
    vector = bank.embedder.embed_query(query, df, len(statistics_of))
    return {m.id: float(hashed_vectors([m.text])[0] @ vector) for m in bank}


class BankMachine(RuleBasedStateMachine):
    """A bank and the forks over it, the last one in use, beside plain dictionaries."""
    texts = st.sampled_from(["a dog", "a red dog", "my cat", "cat and dog", "the blue car", "car", "tea", ""])
    picks = st.integers(0, 30)

    def __init__(self):
        super().__init__()
        self.stack = [(MemoryBank(make_embedder("hash")), {})]  # bank, {id: (text, speaker, time)}
        self.last_ids = [-1]  # given out by each of them

    def pick(self, number):
        ids = list(self.stack[-1][1])
        return ids[number % len(ids)] if ids else None

    @rule(text=texts, speaker=st.sampled_from(["Ann", "Bob"]))
    def add(self, text, speaker):
        bank, model = self.stack[-1]
        id = bank.add(text, speaker, "now")
        assert id > self.last_ids[-1]
        self.last_ids[-1] = id
        model[id] = text, speaker, "now"

    @rule(number=picks, text=texts)
    def update(self, number, text):
        bank, model = self.stack[-1]
        if (id := self.pick(number)) is not None:
            bank.update(id, text, "later")
            model[id] = text, model[id][1], "later"

    @rule(number=picks)
    def delete(self, number):
        bank, model = self.stack[-1]
        if (id := self.pick(number)) is not None:
            bank.delete(id)
            del model[id]
            with pytest.raises(KeyError):
                bank.delete(id)

    @rule()
    def fork(self):
        bank, model = self.stack[-1]
        self.stack.append((bank.fork(), dict(model)))
        self.last_ids.append(self.last_ids[-1])

    @rule(keep=st.booleans())
    def end_fork(self, keep):
        if len(self.stack) > 1:
            (bank, model), last_id = self.stack.pop(), self.last_ids.pop()
            if keep:
                assert bank.commit() is self.stack[-1][0]
                self.stack[-1], self.last_ids[-1] = (self.stack[-1][0], model), last_id

    @rule()
    def save_and_load(self):
        bank, model = self.stack[-1]
        with tempfile.TemporaryDirectory() as folder:
            bank.save(os.path.join(folder, "bank.json"))
            loaded = MemoryBank.load(os.path.join(folder, "bank.json"), make_embedder("hash"))
        self.stack, self.last_ids = [(loaded, model)], self.last_ids[-1:]

    @rule(query=texts, k=st.integers(1, 8), speaker=st.sampled_from([None, "Ann", "Bob"]))
    def search(self, query, k, speaker):
        bank, model = self.stack[-1]
        scores = hash_scores(bank, query, statistics_of=bank)
        scores = {id: score for id, score in scores.items() if speaker in (None, model[id][1])}
        found = bank.search_scored(query, k, speaker)
        assert [score for _, score in found] == pytest.approx(sorted(scores.values())[::-1][:k], abs=1e-5)
        for m, score in found:
            assert score == pytest.approx(scores[m.id], abs=1e-5)
            assert (m.text, m.speaker, m.time) == model[m.id]

    @invariant()
    def every_bank_shows_its_dictionary(self):
        for bank, model in self.stack:
            assert [(m.id, (m.text, m.speaker, m.time)) for m in bank] == sorted(model.items())
            assert len(bank) == len(model) and all(id in bank for id in model)


BankMachine.TestCase.settings = settings(FUZZ, stateful_step_count=10)
test_bank_against_dictionaries = BankMachine.TestCase


def test_a_fork_may_hide_or_rewrite_any_number_and_keep_it():
    bank = filled(TableEmbedder(300, 8), 200, ["Ann"])
    fork = bank.fork()
    for id in exact_ids(bank, "0", 150):
        fork.delete(id)
    for id in [m.id for m in fork][-20:]:  # the last of all among them
        fork.update(id, str(id + 50), "")
    for look in (lambda: fork, fork.fork, fork.commit):
        seen = look()
        assert len(seen) == 50 and recall(seen, range(0, 300, 30), k=10) == recall(seen, range(5), k=60) == 1


def test_a_fork_of_a_bank_that_was_written_to_is_refused():
    bank = filled(TableEmbedder(20, 4), 10)
    first, second = bank.fork(), bank.fork()
    grandchild = second.fork()
    first.add("11", "Ann", "")
    assert len(bank) == len(second) == 10
    first.commit()
    for stale in (first, second, grandchild):
        for use, arguments in ((stale.search, ("1", 1)), (stale.add, ("1", "Ann", "")), (stale.get, (0,)),
                               (stale.delete, (0,)), (stale.update, (0, "1", "")), (stale.__len__, ()),
                               (stale.__iter__, ()), (stale.fork, ()), (stale.commit, ())):
            with pytest.raises(RuntimeError, match="fork it again"):
                use(*arguments)
    assert len(bank) == 11
    with pytest.raises(RuntimeError, match="only a fork"):
        bank.commit()


def test_eight_forks_with_one_question_cost_the_bank_below_one_search(monkeypatch):
    bank, scanned, nearest = MemoryBank(make_embedder("hash")), [], memory.SpeakerIndex.nearest
    for number in range(1_000):
        bank.add(f"number {number}", "Ann", "")

    def counted(index, query, k):
        scanned.append(len(index.vectors))
        return nearest(index, query, k)
    monkeypatch.setattr(memory.SpeakerIndex, "nearest", counted)
    for i in range(8):
        fork = bank.fork()
        fork.add(f"number 7{i}", "Ann", "")
        fork.delete(70 + i)
        fork.update(5, "number 77", "")
        found = [score for _, score in fork.search_scored("number 77", 30)]
        expected = hash_scores(fork, "number 77", statistics_of=bank)  # so little has changed: the idf stays
        assert found == pytest.approx(sorted(expected.values())[::-1][:30], abs=1e-5)
    assert sorted(scanned) == [2] * 8 + [1_000]
    for number in range(10):
        fork.add(f"number {number}", "Bob", "")
    found = [score for _, score in fork.search_scored("number 77", 30)]
    expected = hash_scores(fork, "number 77", statistics_of=fork)
    assert found == pytest.approx(sorted(expected.values())[::-1][:30], abs=1e-5)


def test_idf_by_hand():
    """Each word has six features of its own; df is 2 for cat, 1 for fox; N = 3."""
    assert len({dim for word in ("cat", "dog", "fox") for dim in word_features(word)[0]}) == 18
    bank = MemoryBank(make_embedder("hash"))
    for text in ("cat", "cat dog", "fox"):
        bank.add(text, "Ann", "")
    cat, fox = np.log(1 + 3 / 2) ** 2, np.log(1 + 3 / 1) ** 2
    expected = {0: cat, 1: cat / np.sqrt(2), 2: fox}
    for m, score in bank.search_scored("Cat, fox!", 3):
        assert score == pytest.approx(expected.pop(m.id) / np.hypot(cat, fox), abs=1e-6)
    assert not expected


def test_features_are_the_same_in_every_process():
    assert word_features("ox") == ([439, 896, 858, 589], [1.0] * 4)
    assert word_features("the")[1][0] == memory.FUNCTION_WORD_COUNT


RETRIEVAL = """ the memory that answers comes right after the question
What is the name of Jon's dog? | Jon has a dog named Buddy. | Jon works as a nurse. | The cat is Tom. | \
The name of Jon's sister is Ann. | Jon has a cat named Tom.
Where does Ann live? | Ann lives in Lisbon. | Ann does yoga where she can. | Ann likes Bob.
When did Bob go to the doctor? | Bob went to a doctor. | Bob did go to the park. | Bob goes home.
What instrument does Mia play? | Mia plays the violin, an instrument. | Mia plays chess. | What is Mia?
Which car did Tim buy? | Tim bought a red car. | Tim did a course in which he met Ann. | Tim has carpets.
Does she have any allergies? | She is allergic to nuts. | She does have a sister. | She has any.
What did Eva paint? | Eva painted a sunrise. | Eva did what her father did. | Eva is a friend of Leo.
How many children does Leo have? | Leo has three children. | Leo does have many books. | Leo is old.
Who is Zoe's favourite singer? | Zoe's favourite singer is Adele. | Zoe's favourite is rice.
What are Sam's plans for the summer? | Sam plans to hike in the summer. | Sam's plans are for the best.
Is it the case that Ida moved to Rome? | Ida moved to Rome. | It is the case that Ida rests. | Ida is it.
Où habite Zoé ? | Zoé habite à Évreux. | Zoé aime le thé. | Paul habite à Paris.
""".splitlines()[1:]


@pytest.mark.parametrize("line", RETRIEVAL)
def test_the_memory_that_answers_comes_first_in_a_tiny_bank(line):
    question, best, *others = line.split(" | ")
    for texts in ([best, *others], [*others, best]):
        bank = MemoryBank(make_embedder("hash"))
        for text in texts:
            bank.add(text, "Ann", "")
        found = bank.search_scored(question, 9)
        assert found[0][0].text == best, found
        assert all(0 <= score <= 1 for _, score in found)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    folder = str(tmp_path_factory.mktemp("encoder"))
    words = ["[PAD]", "[UNK]", "a", "dog", "cat", "red", "sleeps", "here", "jon", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=16)).save_pretrained(folder)
    return folder


TEXTS = ["a dog", "jon", "a red cat sleeps here with a dog", "red red red", "", "a dog " * 40, "cat . dog"]


def test_encoder_is_the_mean_over_real_tokens_alone(encoder_folder):
    embedder = make_embedder(encoder_folder)
    together = embedder.embed(TEXTS)
    alone = np.concatenate([make_embedder(encoder_folder).embed([text]) for text in TEXTS])
    assert together.dtype == np.float32 and together.shape == (7, embedder.dim) == (7, 32)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    encoder = memory.Encoder(encoder_folder)
    tokens = encoder.tokenizer("a red cat sleeps here with a dog", return_tensors="pt")
    mean = encoder.model(**tokens).last_hidden_state[0].numpy().mean(axis=0)
    np.testing.assert_allclose(together[2], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS, batch_size=2), together, atol=1e-5)


def test_hash_and_encoder_is_the_weighted_mean_of_both_scores(encoder_folder):
    scores = {}
    for name in ("hash", encoder_folder, "hash+" + encoder_folder):
        bank = MemoryBank(make_embedder(name))
        for text in TEXTS:
            bank.add(text, "Ann", "")
        scores[name] = {m.id: score for m, score in bank.search_scored("a red dog", 9)}
        assert len(scores[name]) == len(TEXTS) and bank.embedder.name == name
    for id, score in scores["hash+" + encoder_folder].items():
        assert score == pytest.approx((scores[encoder_folder][id] + 2 * scores["hash"][id]) / 3, abs=1e-5)


def test_embedder_remembers_recent_texts_and_hands_out_copies(monkeypatch):
    computed = []
    compute = memory.hashed_vectors
    monkeypatch.setattr(memory, "hashed_vectors", lambda texts: computed.extend(texts) or compute(texts))
    monkeypatch.setattr(memory, "RECENT_TEXTS", 3)
    embedder = make_embedder("hash")
    first = embedder.embed(["a", "b", "a"])
    embedder.embed(["b"])[:] = 0
    np.testing.assert_array_equal(embedder.embed(["a", "b", "a"]), first)
    assert computed == ["a", "b"] and embedder.embed([]).shape == (0, embedder.dim)
    embedder.embed(list("cdefg"))
    embedder.embed(["a"])
    assert computed == list("abcdefga") and len(embedder._recent) == 3


@pytest.mark.parametrize("name", ["no/such-folder/at-all", "hash+", "", "{folder}", "hash+{folder}"])
def test_an_encoder_that_cannot_be_loaded_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text('{"model_type": "bert"')
    with pytest.raises(UsageError, match="cannot be loaded") as error:
        make_embedder(name.format(folder=tmp_path))
    assert "\n" not in str(error.value)


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
    spoiled(next_id=None, memories=[]),
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
