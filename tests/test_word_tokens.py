"""The tokens of BLEU-1 by hand, and against NLTK on random text."""
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import FUZZ

from support.word_tokens import ABBREVIATIONS, sentences, word_tokens


@pytest.mark.parametrize("text, expected", [
    ("It's 5.", "it 's 5 ."), ("Dr. No met Mr. Yes. They left at 9 p.m.", "dr. no met mr. yes . they left at 9 p.m ."),
    ("1. a dog 2. a cat", "1. a dog 2. a cat"), ("He has 3. Four left.", "he has 3. four left ."),
    ("He has 3. 4 left.", "he has 3 . 4 left ."), ("on 3 May, 2023, at 1,000:", "on 3 may , 2023 , at 1,000 :"),
    ('"Go." he said', "`` go . '' he said"), ("(Rome.) Yes", "( rome . ) yes"), ("Apple TV+", "apple tv+"),
    ("'Dune' by F. Herbert", "'dune ' by f. herbert"), ("wait... no", "wait ... no"), ("I cannot", "i can not"),
    ("don't, gonna", "do n't , gon na"), ("$5 & 50% #1", "$ 5 & 50 % # 1"), ("red--truly", "red -- truly"),
    ("https://a.b/c?d=1", "https : //a.b/c ? d=1"), ("2020\u20132022", "2020 \u2013 2022"), ("-5", "-5"), ("", "")])
def test_by_hand(text, expected):
    assert word_tokens(text) == expected.split()


def test_sentences_by_hand():
    assert sentences('he said "go." dr. who went! 2. go. b. x') == ['he said "go."', "dr. who went!", "2. go.", "b. x"]


@pytest.fixture(scope="module")
def reference():
    """NLTK's word_tokenize; its model for Punkt is not part of the package, but its abbreviations are in our file."""
    tokenize, punkt = pytest.importorskip("nltk.tokenize"), pytest.importorskip("nltk.tokenize.punkt")
    treebank, parameters = tokenize.NLTKWordTokenizer(), punkt.PunktParameters()
    if treebank.tokenize("'the\u2014x") != ["'the", "\u2014", "x"]:
        pytest.skip("this version of nltk has other rules: pip install nltk==3.10.0")
    parameters.abbrev_types = set(ABBREVIATIONS)
    split = punkt.PunktSentenceTokenizer(parameters).tokenize
    return lambda text: [word for sentence in split(text.lower()) for word in treebank.tokenize(sentence)]


pieces = st.one_of(st.text(max_size=4), st.sampled_from([
    *".,:;?!'\"`()[]{}<>-*@#$%&\u2013\u2014\u2018\u2019\u201c\u201d\u00ab\u2026\xa0\t\n\u00e9\u53171i",
    "..", "...", "--", "''", "``", " . . .", "n't", "'s", "'ll", "cannot", "wanna ", "gonna", "d'ye", " 'tis ", "'twas",
    "dr.", "u.s.", "p.m.", " b. ",
    "1.", " 2. ", "3.5", "1,000", "word", " go ", "x-st. y", " ", " ", ". ", "? ", ".) ", '." ', ", "]))


def test_any_text_has_the_tokens_of_nltk(reference):
    @FUZZ
    @given(st.lists(pieces, max_size=14).map(lambda found: "".join(found).strip()))
    def run(text):
        assert word_tokens(text) == reference(text)

    run()


@pytest.mark.parametrize("unit", [".", "a", "a.", "'", "\"", ". ", "!\"", "`", "-", "a'", " ", "a.)", "\n"])
def test_a_long_answer_is_read_at_once(unit):
    begin = time.process_time()
    word_tokens(unit * 1000)
    assert time.process_time() - begin < 0.3
