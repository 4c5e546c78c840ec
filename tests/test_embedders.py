"""The embedders: features and idf by hand, retrieval in tiny banks, encoders against transformers."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

import memory
from data import Dialogue, Turn, UsageError
from manager import turn_banks
from memory import MemoryBank, make_embedder, word_features
from support.encoder import POOLINGS, Encoder


def test_idf_by_hand():
    """Each word has six features that no other has; df is 2 for cat, 1 for fox; there are 3 entries."""
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


RETRIEVAL = """ question | memory with the answer | other memories
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


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "cat", "red", "sleeps", "here", "jon", ".", "query", ":"]


def save_encoder(folder, is_causal=False, **files):
    """Save a tiny random encoder: BERT with [CLS] and [SEP], or Qwen2 with padding on the left; and JSON files."""
    size = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]" if is_causal else "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                            padding_side="left" if is_causal else "right").save_pretrained(folder)
    torch.manual_seed(0)
    model = (Qwen2Model(Qwen2Config(**size, num_key_value_heads=1)) if is_causal
             else BertModel(BertConfig(**size, max_position_embeddings=16)))
    model.save_pretrained(folder)
    for name, content in files.items():
        path = folder / {"pooling": "1_Pooling/config.json", "prompts": "config_sentence_transformers.json",
                         "modules": "modules.json"}[name]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return str(folder)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


TEXTS = ["a dog", "jon", "a red cat sleeps here with a dog", "red red red", "", "a dog " * 40, "cat . dog"]


def test_encoder_is_the_mean_over_real_tokens_alone(encoder_folder):
    embedder = make_embedder(encoder_folder)
    together = embedder.embed(TEXTS)
    alone = np.concatenate([make_embedder(encoder_folder).embed([text]) for text in TEXTS])
    assert together.dtype == np.float32 and together.shape == (7, embedder.dim) == (7, 32)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    encoder = Encoder(encoder_folder)
    tokens = encoder.tokenizer("a red cat sleeps here with a dog", return_tensors="pt")
    mean = encoder.model(**tokens).last_hidden_state[0].numpy().mean(axis=0)
    np.testing.assert_allclose(together[2], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS, batch_size=2), together, atol=1e-5)


def flags(**modes):
    return {"word_embedding_dimension": 32, **{f"pooling_mode_{name}": value for name, value in modes.items()}}


def states_of(folder, text):
    """The last hidden states (T, 32) of one text: no padding, tokens by hand."""
    words = text.split() + ["[SEP]"]
    words = words if "qwen2" in (Path(folder) / "config.json").read_text() else ["[CLS]", *words]
    ids = torch.tensor([[WORDS.index(word) for word in words]])
    return AutoModel.from_pretrained(folder).eval()(ids).last_hidden_state[0].detach().numpy()


@pytest.mark.parametrize("is_causal", [False, True], ids=["bert", "causal"])
@pytest.mark.parametrize("pooling, by_hand", [
    (None, lambda states: states.mean(axis=0)),
    (flags(cls_token=False, mean_tokens=True, max_tokens=False), lambda states: states.mean(axis=0)),
    (flags(cls_token=True, mean_tokens=False), lambda states: states[0]),
    ({**flags(mean_tokens=False, lasttoken=True), "include_prompt": True}, lambda states: states[-1]),
    (flags(max_tokens=True), lambda states: states.max(axis=0)),
    (flags(mean_sqrt_len_tokens=True), lambda states: states.mean(axis=0)),
    (flags(cls_token=True, mean_tokens=True), lambda states: np.concatenate([states[0], states.mean(axis=0)])),
    ({"pooling_mode": "lasttoken"}, lambda states: states[-1]), ({"pooling_mode": "cls"}, lambda states: states[0])])
def test_an_encoder_pools_as_its_files_say(tmp_path, is_causal, pooling, by_hand):
    modules = [{"idx": i, "path": "", "type": f"sentence_transformers.models.{name}"}
               for i, name in enumerate(["Transformer", "Pooling", "Normalize"])]
    folder = save_encoder(tmp_path, is_causal, **({"pooling": pooling, "modules": modules} if pooling else {}))
    texts = ["a dog", "jon", "a red cat sleeps here . a dog", "red red red"]
    vectors = make_embedder(folder).embed(texts)  # one batch, so shorter texts have padding
    for text, vector in zip(texts, vectors, strict=True):
        expected = by_hand(states_of(folder, text))
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)


@pytest.mark.parametrize("path, place", [("2_Pooling", -1), ("Pooling", -1), ("1_Pooling", 0), ("", 0), (None, 0)])
def test_the_pooling_is_in_the_folder_that_the_modules_name(tmp_path, path, place):
    folder = save_encoder(tmp_path, pooling=flags(cls_token=True), modules=[
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", **({} if path is None else {"path": path})}])
    if place == -1:
        (Path(folder) / path).mkdir()
        (Path(folder) / path / "config.json").write_text(json.dumps(flags(lasttoken=True)))
    expected = states_of(folder, "a red cat")[place]
    np.testing.assert_allclose(make_embedder(folder).embed(["a red cat"])[0], expected / np.linalg.norm(expected),
                               atol=1e-5)


@pytest.mark.parametrize("saved, query, text", [
    ({"prompts": {"query": "query : ", "document": ""}}, "query : ", ""),
    ({"prompts": {"query": "query : ", "passage": "here : "}, "default_prompt_name": None}, "query : ", "here : "),
    ({"prompts": {"short": "red : ", "other": "cat "}, "default_prompt_name": "short"}, "red : ", "red : "),
    ({"prompts": {"short": "red : "}}, "", ""), ({"prompts": None, "similarity_fn_name": "cosine"}, "", ""),
    ({"prompts": {"query": None, "document": "here : "}}, "", "here : ")])
def test_queries_and_texts_begin_with_their_prompts(tmp_path, saved, query, text):
    folder = save_encoder(tmp_path, pooling=flags(cls_token=True), prompts=saved)
    for name in (folder, f"hash+{folder}"):
        bank = MemoryBank(make_embedder(name))
        stored, asked = bank.embedder.embed(["a dog"])[0], bank.embedder.embed_query("a dog", bank._df, 0)
        for vector, prompt in ((stored, text), (asked, query)):
            first = states_of(folder, f"{prompt}a dog")[0]
            expected = first / np.linalg.norm(first) * (1 if name == folder else (1 / 3) ** 0.5)
            np.testing.assert_allclose(vector[:32], expected, atol=1e-5)
        np.testing.assert_array_equal(bank.embedder.embed(["a dog"])[0], stored)  # not the cached query


@pytest.mark.parametrize("files, reason", [
    ({"pooling": flags(weightedmean_tokens=True)}, "it needs weightedmean, which is not supported"),
    ({"pooling": {"pooling_mode": "attention"}}, "it needs attention, which is not supported"),
    ({"pooling": {"pooling_mode_mean_tokens": True, "include_prompt": False}}, "leaves out the prompt"),
    ({"modules": [{"type": "sentence_transformers.models.Transformer"},
                  {"type": "sentence_transformers.models.Dense"}]}, "it needs Dense, which is not supported"),
    ({"prompts": ["query: "]}, "cannot be loaded")])
def test_files_that_ask_for_more_are_refused_in_one_line(tmp_path, files, reason):
    with pytest.raises(UsageError, match=reason) as error:
        make_embedder(save_encoder(tmp_path, **files))
    assert "cannot be loaded as an encoder" in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_missing_offline_are_named_and_errors_of_the_hub_shown(tmp_path, monkeypatch, capsys):
    snapshot = tmp_path / "models--ann--bert" / "snapshots" / ("0" * 40)
    for path, content in ((snapshot.parents[1] / "refs/main", "0" * 40), (snapshot / "modules.json", "[]")):
        path.parent.mkdir(parents=True)
        path.write_text(content)
    save_encoder(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Encoder("ann/bert").poolings == [POOLINGS["mean"]]
    notes = capsys.readouterr().err
    assert "ann/bert: 1_Pooling/config.json is not cached" in notes and "modules.json" not in notes

    def refuse(*_):
        raise OSError("HTTP 503") from ConnectionError()
    monkeypatch.setattr("support.encoder.cached_file", refuse)
    with pytest.raises(UsageError, match="cannot be loaded as an encoder .OSError: HTTP 503"):
        Encoder("ann/bert")


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


def test_banks_of_turns_embed_each_text_once_even_beyond_the_cache(monkeypatch):
    computed, compute = [], memory.hashed_vectors
    monkeypatch.setattr(memory, "hashed_vectors", lambda texts: computed.append(len(texts)) or compute(texts))
    monkeypatch.setattr(memory, "RECENT_TEXTS", 4)
    dialogues = [Dialogue(name, ("Jon", "Gina"), tuple(Turn(str(i), 1, "Jon", f"{name} {i}", "") for i in range(5)), ())
                 for name in "abc"]
    assert [len(build.bank) for build in turn_banks(dialogues, make_embedder("hash"))] == [5] * 3
    assert computed == [3] * 5, "the turns of all dialogues in one call"


@pytest.mark.parametrize("name", ["no/such-folder/at-all", "hash+", "", "{folder}", "hash+{folder}"])
def test_an_encoder_that_cannot_be_loaded_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text('{"model_type": "bert"')
    with pytest.raises(UsageError, match="cannot be loaded") as error:
        make_embedder(name.format(folder=tmp_path))
    assert "\n" not in str(error.value)
