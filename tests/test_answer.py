"""The Answer Agent's retrieval, prompt and parser by hand and on random text; its metrics against Mem0's numbers."""
import json
import re
import time
from dataclasses import replace

import pytest
from conftest import Fake
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import CASES, FUZZ, real_file

import answer
from answer import (
    Answer,
    Settings,
    bleu1,
    build_prompt,
    by_speaker,
    exact_match,
    f1,
    generate_answers,
    normalize,
    parse,
    prompt_for,
    retrieve,
    speakers_asked,
)
from data import TINY
from memory import Memory, MemoryBank, make_embedder
from support.prompts import date_suffix

HASH = make_embedder("hash")
PAIR = ("Jon", "Gina")
ORACLE = real_file("metric_oracle.json")
PUBLISHED = real_file("memory_r1_eval_scores.json")


def talk(num_each):
    """Jon's and Gina's memories in turns; every third is about a dog."""
    bank = MemoryBank(HASH)
    for i in range(num_each):
        for speaker in PAIR:
            what = f"dog number {i}" if i % 3 == 0 else f"trip {i} to Rome"
            bank.add(f"{speaker} spoke of a {what}.", speaker, f"{i + 1} May 2023")
    return bank


def messages(memories, speakers, question, distill=True, name="real"):
    """The chat messages of a prompt that shows all of these memories, for the model `name`."""
    policy = Fake()
    policy.name = name
    made = prompt_for(policy, memories, question, speakers, Settings(distill=distill, max_prompt_tokens=None))
    return policy.chats[tuple(made.prompt)]


def test_prompt_by_hand():
    memories = [Memory(7, "Jon drives a Kia\ncar.", "Jon", "3 June 2023"), Memory(5, "Gina sings.", "Gina", ""),
                Memory(2, "Jon has a dog.", "Jon", "8 May 2023")]
    system, user = messages(memories, PAIR, "Which car\ndoes Jon drive?")
    assert system == {"role": "system", "content": answer.SYSTEM} and user == {"role": "user", "content": (
        "Memories of Jon:\n"
        "1 (8 May 2023) Jon has a dog.\n"
        "2 (3 June 2023) Jon drives a Kia car.\n"
        "Memories of Gina:\n"
        "3 Gina sings.\n"
        "\n"
        "Each date above says when the words were spoken. Question: Which car does Jon drive?\n"
        'Reply with JSON: the keys "relevant" (a list of the numbers of the notes that matter) and "answer" (at most '
        'six words).')}
    system, user = messages([], PAIR, "Why?", distill=False)
    assert system["content"] == answer.SYSTEM
    assert user["content"] == ("Memories: none\n\nEach date above says when the words were spoken. Question: Why?\n"
                               "Answer in at most six words.")


def test_prompt_of_the_tiny_model_by_hand():
    memories = [Memory(2, "Jon has a dog.", "Jon", "8 May 2023"), Memory(5, "Gina\nsings.", "Gina", "")]
    _, user = messages(memories, PAIR, "Does Jon\nrun?", name=TINY)
    assert user["content"] == ("question: Does Jon run?\nmemories of Jon:\n1 (8 May 2023) Jon has a dog.\n"
                               "memories of Gina:\n2 Gina sings.\nquestion: Does Jon run?\n"
                               "relevant memories, then the answer:")
    _, user = messages([], PAIR, "Why?", distill=False, name=TINY)
    assert user["content"] == "question: Why?\nmemories:\nnone\nquestion: Why?\nthe answer alone:"


@pytest.mark.parametrize("time, shown", [
    ("1:56 pm on 8 May, 2023", " (8 May, 2023)"), ("10:04 AM on 19 June, 2023", " (19 June, 2023)"),
    ("2023/05/20 (Sat) 02:21", " (2023/05/20 (Sat))"), ("2023-05-20 14:00", " (2023-05-20)"),
    ("2023-05-08 13:56:07", " (2023-05-08)"), ("2023-05-08T13:56", " (2023-05-08)"),
    ("2023-05-08T13:56:07+02:00", " (2023-05-08)"), ("8 May 2023, 1:56 PM", " (8 May 2023)"),
    ("8 May 2023 at 1:56 pm", " (8 May 2023)"), ("13:56 on 8 May 2023", " (8 May 2023)"),
    ("8 May 2023", " (8 May 2023)"), ("spring", " (spring)"), ("", "")])
def test_times_are_shown_as_days(time, shown):
    assert date_suffix(time) == shown


def test_by_speaker_is_in_the_order_of_the_speakers_and_of_time():
    one, two, three = Memory(9, "c", "Jon", ""), Memory(1, "a", "Jon", ""), Memory(3, "b", "Gina", "")
    shown = by_speaker([one, two, three], ("Gina", "Jon", "Eve"))
    assert list(shown.items()) == [("Gina", [three]), ("Jon", [two, one])]


@pytest.mark.parametrize("question, named", [
    ("Where is Jon?", ("Jon",)), ("What did Gina tell JON?", PAIR), ("Where is gina's cat?", ("Gina",)), ("Why?", PAIR),
    ("Who is Jonas?", PAIR), ("Is Regina here?", PAIR), ("", PAIR)])
def test_speakers_asked(question, named):
    assert speakers_asked(question, PAIR) == named


def test_speakers_whose_names_are_patterns_or_not_ascii():
    assert speakers_asked("Does A+ know Zoë?", ("A.", "Zoë")) == ("Zoë",)
    assert speakers_asked("Is it Ab?", ("A.", "(b")) == ("A.", "(b")


def test_retrieve_gives_the_best_of_each_speaker():
    bank, question = talk(45), "Which dog does Gina speak of?"
    found = retrieve(bank, question, PAIR, 30)
    scores = [score for _, score in found]
    assert len(found) == 60 and scores == sorted(scores, reverse=True)
    for speaker in PAIR:
        own = [(memory, score) for memory, score in found if memory.speaker == speaker]
        assert own == bank.search_scored(question, 30, speaker=speaker) and len(own) == 30
    dogs = {memory.text for memory, _ in found if "dog" in memory.text}
    assert len(dogs) == 30, "15 of each"
    assert {memory.speaker for memory, _ in retrieve(bank, question, PAIR, 30, named_only=True)} == {"Gina"}
    assert len(retrieve(bank, "Which dog?", PAIR, 30, named_only=True)) == 60
    floor = scores[29]
    assert retrieve(bank, question, PAIR, 30, floor=floor) == [pair for pair in found if pair[1] >= floor]
    assert retrieve(bank, question, PAIR, 30, floor=2.0) == [] == retrieve(MemoryBank(HASH), question, PAIR, 30)


def test_a_prompt_drops_the_lowest_ranked_and_shows_what_it_kept(fake):
    bank, question, policy = talk(6), "Which dog does Jon speak of?", fake()
    ranked = [memory for memory, _ in retrieve(bank, question, PAIR, 4)]
    whole = build_prompt(policy, bank, question, PAIR, Settings(memories=8, max_prompt_tokens=None))
    assert whole.dropped == 0 and len(whole.shown) == len(ranked) == 8
    for limit in range(0, len(whole.prompt) + 3, 7):
        prompt = build_prompt(policy, bank, question, PAIR, Settings(memories=8, max_prompt_tokens=limit))
        kept = ranked[:len(ranked) - prompt.dropped]
        assert prompt.shown == [memory for own in by_speaker(kept, PAIR).values() for memory in own]
        assert policy.chats[tuple(prompt.prompt)] == messages(kept, PAIR, question)
        assert not limit or len(prompt.prompt) <= limit or not kept
        assert f"Question: {question}\n" in policy.chats[tuple(prompt.prompt)][1]["content"]
    lines = policy.chats[tuple(whole.prompt)][1]["content"].splitlines()
    for number, memory in enumerate(whole.shown, 1):  # the numbers of the prompt are places in `shown`
        assert f"{number} ({memory.time}) {memory.text}" in lines


@pytest.mark.parametrize("name", ["real", str(TINY)])
@pytest.mark.parametrize("preface, shown", [
    ("", "Which dog?"), ("Current date: 2023/05/30.", "Current date: 2023/05/30. Which dog?"),
    ("Gina asks\nJon:", "Gina asks Jon: Which dog?"), ("</s>", "< /s> Which dog?")])
def test_a_preface_is_shown_but_not_searched(fake, monkeypatch, name, preface, shown):
    policy, searched, bank = fake(), [], talk(6)
    policy.name = name
    monkeypatch.setattr(bank, "search_scored", lambda query, k, **options: searched.append(query) or [])
    prompt = build_prompt(policy, bank, "Which dog?", PAIR, Settings(named_only=True), preface)
    assert searched == ["Which dog?"] * 2, "a name in the preface chooses no bank"
    text = policy.chats[tuple(prompt.prompt)][1]["content"]
    assert re.findall("uestion: (.*)", text) == [shown] * (1 + (name != "real"))


@pytest.mark.parametrize("window, max_new_tokens", [(400, 10), (400, 200), (300, 256), (250, 200)])
def test_a_prompt_leaves_room_for_the_answer_in_the_models_window(fake, window, max_new_tokens):
    policy, settings = fake(), Settings(memories=40, max_prompt_tokens=None, max_new_tokens=max_new_tokens)
    policy.window = window
    prompt, longer = (build_prompt(policy, talk(20), "Which dog?", PAIR, replace(settings, max_new_tokens=new))
                      for new in (max_new_tokens, max_new_tokens - 9))  # a memory takes 9 or 10 words
    assert prompt.dropped > 0 and (len(prompt.prompt) <= window - max_new_tokens or not prompt.shown)
    assert longer.dropped <= prompt.dropped


@pytest.mark.parametrize("memories, shown", [(1, 2), (2, 2), (3, 2), (7, 6), (60, 12)])
def test_half_of_the_memories_are_each_speakers(fake, memories, shown):
    prompt = build_prompt(fake(), talk(6), "Which dog?", PAIR, Settings(memories=memories, max_prompt_tokens=None))
    assert len(prompt.shown) == shown == 2 * sum(memory.speaker == "Jon" for memory in prompt.shown)


def test_the_settings_reach_retrieval_and_prompt(fake):
    bank, question, policy = talk(6), "Which dog does Jon speak of?", fake()
    floor = retrieve(bank, question, PAIR, 4)[2][1]
    settings = Settings(memories=8, distill=False, named_only=True, floor=floor)
    prompt = build_prompt(policy, bank, question, PAIR, settings)
    expected = [memory for memory, _ in retrieve(bank, question, PAIR, 4, named_only=True, floor=floor)]
    assert prompt.shown == sorted(expected, key=lambda memory: memory.id) and 0 < len(expected) < 4
    assert policy.chats[tuple(prompt.prompt)] == messages(expected, PAIR, question, distill=False)


def test_answers_in_order_by_the_named_role(fake):
    words = ["red", "blue", "red"]
    policy = fake(lambda messages: "relevant: 1\nanswer: " + messages[1]["content"].splitlines()[-2].split()[-1])
    prompts = [build_prompt(policy, talk(2), word, PAIR, Settings(memories=4)) for word in words]
    assert generate_answers(policy, prompts, "answer", 33) == [
        Answer(word, (1,), True, f"relevant: 1\nanswer: {word}") for word in words]
    assert policy.calls == [("answer", 3, (1, 33, 0))] and policy.role == "nobody"
    assert generate_answers(policy, [], "answer", 33) == [] and len(policy.calls) == 1


def test_identical_prompts_are_answered_once(tiny):
    policy, rows, settings = tiny(), [], Settings(memories=4, max_prompt_tokens=None)
    prompts = [build_prompt(policy, MemoryBank(HASH), question, PAIR, settings)
               for question in ("Why?", "How?", "Why?", "Why?")]
    forward = policy.model.base_model.forward
    policy.model.base_model.forward = lambda **inputs: (rows.append(len(inputs["input_ids"])), forward(**inputs))[1]
    answers = generate_answers(policy, prompts, "agent", 3)
    assert rows[:2] == [1, 2] and max(rows) == 2  # their common beginning, then what differs
    assert answers[0] == answers[2] == answers[3]


@pytest.mark.parametrize("completion, expected", [
    ("relevant: 2, 5\nanswer: a beach in Spain", Answer("a beach in Spain", (2, 5), True)),
    ("1 none\n2 Kia\nanswer: Kia", Answer("Kia", (2,), True)),
    ("1 Rex\n2 None.\n3: Kia\n4) none\n5. a, b\nanswer: x", Answer("x", (1, 3, 5), True)),
    ("relevant: none\nanswer: x", Answer("x", (), True)),
    ("relevant: 2 (8 May 2023), 5 (1 June)\nanswer: x", Answer("x", (2, 5), True)),  # dates are no numbers
    ("relevant: 2 (2023-05-08), (3), (4, 15)\nanswer: x", Answer("x", (2, 3, 4, 15), True)),
    ("relevant: 2 (2023/05/20 (Sat)), (3), 7 (7 (Sat) May)\nanswer: x", Answer("x", (2, 3, 7), True)),
    ("relevant: (2), (5)\nanswer: x", Answer("x", (2, 5), True)),
    ("Relevant memories: 12, 3, 12\nAnswer: x", Answer("x", (12, 3), True)),
    ("**Relevant memories:** 1 and 4\n\n**Answer:** beach", Answer("beach", (1, 4), True)),
    ("  ANSWER :  7 May,  2023 \n", Answer("7 May, 2023", (), True)),
    ("Final answer: 5", Answer("5", (), True)),
    ("answer: x\r\n", Answer("x", (), True)),
    ("answer: first\nNo, wait.\nrelevant: 3\nanswer: last", Answer("first", (), True)),
    ("answer: x\n2 Kia\nrelevant: 9", Answer("x", (), True)),  # what comes after the answer selects nothing
    ("answer: a:b: c", Answer("a:b: c", (), True)),
    ("answer: " + "y" * 1200, Answer("y" * 1000, (), True)),
    ("answer: x" + " " * 20_000 + "\nanswer: too far off", Answer("x", (), True)),
    ("answer: café 北京 \ud800", Answer("café 北京 ?", (), True)),
    ("answer:", Answer("", (), False)), ("answer:  * \n", Answer("", (), False)), ("``\n**", Answer("", (), False)),
    ("", Answer("", (), False)), ("relevant: 1, 2", Answer("", (1, 2), False)),
    ("relevant: 1\nanswer:\nKia", Answer("Kia", (1,), True)), ("The final answer is: Kia", Answer("Kia", (), True)),
    ("<answer>Kia</answer> as said", Answer("Kia", (), True)), ("```\nanswer: `Kia`\n```", Answer("Kia", (), True)),
    ("By dancing,\nand running.", Answer("By dancing, and running.", (), True)),  # no marker: all of it
    ("relevant: 4\n\u201cKia\u201d", Answer("Kia", (4,), True)), ("1. Kia\n2. VW", Answer("1. Kia 2. VW", (), True)),
    ("answering: Kia", Answer("answering: Kia", (), True)), ("答え answer：Kia", Answer("Kia", (), True)),
    ('{"relevant": [2, 5], "answer": "Kia"}', Answer("Kia", (2, 5), True)), ('{"answer": 7}', Answer("7", (), True)),
    ('```json\n{"reason": "{", "answer": "Kia"}\n```', Answer("Kia", (), True)),
    ('{"relevant": [2]}', Answer("", (2,), False)), ('{"relevant": [2, 3', Answer("", (2, 3), False)),
    ('{"relevant": [2], "answer": "Kia"', Answer("Kia", (2,), True)),
    ('{"relevant": [2], "answer": ["Kia", "V', Answer("Kia, V", (2,), True)),
    ('{"relevant": [2]}\n{"answer": "Kia"}', Answer("Kia", (), True)),
    ('{"answer": ""}', Answer("", (), False)), ('{"relevant": [], "answer": null}', Answer("", (), False)),
    ('{"Relevant": [3], "ANSWER": "Kia"}', Answer("Kia", (3,), True)),
    ('{"answer": ["Kia", "BMW"]}', Answer("Kia, BMW", (), True)), ('{"answer": []}', Answer("", (), False)),
    ("<think>" + "x " * 10_500 + "</think>answer: Kia", Answer("Kia", (), True)),
    ("answer: M*A*S*H", Answer("M*A*S*H", (), True)), ("*Answer:* *M*A*S*H*", Answer("M*A*S*H", (), True)),
    ("relevant:\n- 2\n- 5.\nanswer: Kia", Answer("Kia", (2, 5), True)),
    ("Relevant notes: 1\n• 12\nNote 7\n8\nanswer: 4", Answer("4", (1, 12), True)),
    ("relevant: 1\n7", Answer("7", (1,), True)),  # without "answer:"
    ('{"relevant": [2], "answer": "Kia Ri', Answer("Kia Ri", (2,), True)), ("# Answer \nKia", Answer("Kia", (), True)),
    ("relevant: 1\n### Final answer\n\nKia", Answer("Kia", (1,), True)),
    ("<Answer>Kia</ANSWER>!", Answer("Kia", (), True)),
    ("answer: $\\boxed{Kia}$", Answer("Kia", (), True)), ("\\boxed{a {b}}", Answer("a {b}", (), True)),
    ("answer: Kia<|im_end|>\n", Answer("Kia", (), True)),
    ("<|begin_of_box|>Kia<|end_of_box|>", Answer("Kia", (), True)),
    ("answer: Kia</s>", Answer("Kia", (), True)), ("<|channel>thought\nanswer: Ford", Answer("", (), False)),
    ("<think>answer: Ford</think>\nanswer: Kia", Answer("Kia", (), True)),
    ("relevant: 3\nanswer: Ford?</think>Kia", Answer("Kia", (), True)), ("<think>answer: Ford", Answer("", (), False))])
def test_parse(completion, expected):
    assert parse(completion) == expected


pieces = st.one_of(st.text(st.characters(codec=None, exclude_categories=[]), max_size=12),
                   st.sampled_from(["answer:", "Answer : ", "\n", "\n1 none", "\n2 Kia", "relevant: ", "1, 2", "**",
                                    "٣ x", "9" * 30, "final ", "\r", "\u2028", "none", " ", "\t"]))


@pytest.mark.parametrize("completions", [st.text(st.characters(codec=None, exclude_categories=[])),
                                         st.lists(pieces, max_size=9).map("".join)], ids=["any", "likely"])
def test_any_text_gives_an_answer(completions):
    seen = []

    @given(completions)
    @FUZZ
    def run(completion):
        found = parse(completion)
        assert found.is_valid == bool(found.text) and len(found.text) <= 1000 and len(found.text.splitlines()) <= 1
        written = re.sub(r"[*`]", "", completion).encode("utf-8", "replace").decode()
        assert all(word in written for word in found.text.replace("*", "").split()), "not a word that is not there"
        assert len(set(found.selected)) == len(found.selected) and all(0 <= n <= 9999 for n in found.selected)
        seen.append(found)

    run()
    assert len(seen) >= CASES


@pytest.mark.parametrize("unit", ["answer", "answer:", " ", "\t", "\n", "1 ", "1 none\n", "relevant: 1,", "*", "final ",
                                  "1", "\r", "answer: x\n", "\nanswer \t", " 1\n", "relevant:\n", "(a", "("])
def test_a_megabyte_is_read_at_once(unit):
    begin = time.process_time()
    parse(unit * (10**6 // len(unit)))
    parse(unit * (10**4 // len(unit)) + "\nanswer: x")
    parse("relevant: (" + unit * (10**4 // len(unit)) + ")\nanswer: x")
    assert time.process_time() - begin < 0.3


@pytest.mark.parametrize("text, expected", [
    ("7 May, 2023.", "7 may 2023"), ("  The Beach!  ", "beach"), ("a dog and an ox", "dog and ox"),
    ("theatre", "theatre"), ("“Nothing is Impossible”", "nothing is impossible"), ("Melanie’s kids", "melanies kids"),
    ("well-known", "well known"), ("2020–2022", "2020 2022"), ("yes—definitely", "yes definitely"), ("$5", "5"),
    ("−5", "5"), ("red/blue", "red blue"), ("ÉCOLE", "école"), ("e\u0301cole", "école"), ("ﬁre", "fire"),
    ("soft\u00adware", "software"), ("a\u00a0b\u3000c", "b c"), ("北京。", "北京"), ("２０２２", "2022"), ("", ""),
    ("The", ""), ("?!", ""), ("½ cup", "1 2 cup")])
def test_normalize(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize("one, other, expected", [
    ("7 May, 2023", "7 May 2023", 1), ("２０２２", "2022", 1), ("“Scout”", '"scout"', 1), ("2022", 2022, 1),
    ("well-known", "well known", 1), ("the beach", "Beach.", 1), ("Buddy and Scout", "Scout and Buddy", 0),
    ("", "", 0), ("?", "!", 0), ("the", "a", 0), ("", "beach", 0), ("7 May 2023", "8 May 2023", 0),
    ("beach", "beaches", 0)])
def test_exact_match(one, other, expected):
    assert exact_match(one, other) == exact_match(other, one) == expected and type(exact_match(one, other)) is float


def test_metrics_by_hand():
    assert f1("dog dog cat", "cat") == pytest.approx(2 / 3) and f1("Yes. She did!", "she did") == pytest.approx(4 / 5)
    assert f1("", "") == f1("", "a") == f1("a", "") == f1("...", "...") == f1("a", "b") == 0.0
    assert f1("A, b", "b a") == 1.0
    assert bleu1("the cat cat", "cat") == pytest.approx(1 / 3), "matches are clipped to the reference's counts"
    assert bleu1("beach", "the sandy beach in Hawaii") == pytest.approx(2.718281828459045 ** -4)
    assert bleu1("", "") == bleu1("a", "") == bleu1("", "a") == bleu1("a", "b") == 0.0
    assert bleu1("It's 5.", "it's 5.") == 1.0


@given(st.text(), st.text())
@settings(deadline=None, derandomize=True, max_examples=400)
def test_metrics_are_shares(one, other):
    for metric in (exact_match, f1, bleu1):
        assert 0 <= metric(one, other) <= 1
        assert metric(one, one) in (0, 1) and metric(one, one) == bool(metric(one, one))
    assert f1(one, other) == f1(other, one) and exact_match(one, other) == exact_match(other, one)


@pytest.fixture(scope="module")
def rows():
    if not ORACLE:
        pytest.skip("Mem0's own numbers are not part of the repository")
    found = json.loads(ORACLE.read_text())["rows"]
    assert len(found) > 50
    return [(row["tag"], str(row["prediction"]), str(row["reference"]), row["oracle"]) for row in found]


def test_f1_is_that_of_mem0(rows):
    for tag, prediction, reference, oracle in rows:
        assert f1(prediction, reference) == pytest.approx(oracle["mem0_f1"], abs=1e-9), tag


def test_exact_match_is_milder_than_that_of_mem0(rows):
    """Ours accepts what Mem0's accepts, except answers of punctuation alone, and these formats in addition."""
    ours = {tag for tag, prediction, reference, _ in rows if exact_match(prediction, reference)}
    theirs = {tag for tag, _, _, oracle in rows if oracle["mem0_em"]}
    assert theirs - ours == {"punct-only-same"}
    assert ours - theirs == {
        "article-the", "question-mark", "date-relative", "date-relative2", "date-quote", "float-comma",
        "negative-number", "apostrophe-curly", "curly-quotes", "parens", "em-dash", "en-dash-range", "fullwidth-digits",
        "german-ligature", "multi-sentence", "multi-sentence-abbrev", "mid-token-dot", "hash"}


def test_bleu1_is_that_of_mem0(rows):
    for tag, prediction, reference, oracle in rows:
        assert bleu1(prediction, reference) == pytest.approx(oracle["mem0_bleu1"], abs=1e-9), tag


@pytest.mark.skipif(PUBLISHED is None, reason="the authors' scores are not part of the repository")
def test_f1_and_bleu1_are_those_of_the_authors():
    """The scores of Memory-R1's answers on LongMemEval, MSC and MemBench, as the authors published them."""
    published = json.loads(PUBLISHED.read_text())
    assert len(published) == 1100
    for one in published:
        pair = one["response"], one["answer"]
        assert (f1(*pair), bleu1(*pair)) == pytest.approx((one["f1"], one["bleu1"]), abs=1e-9), pair
