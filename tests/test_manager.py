"""The Manager's prompts by hand, its parser under fire, edits against a dictionary, banks against a plain replay."""
import inspect
import json
import time
import zlib
from collections import Counter
from dataclasses import replace

import pytest
from conftest import SPECIAL
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mutations import CASES, FUZZ

import answer
import manager
from data import Dialogue, Operation, Turn, synthetic
from manager import Case, Edit, apply, build_banks, case_of, case_text, facts_of, fit_prompt, messages, parse, write
from memory import Memory, MemoryBank, make_embedder

HASH = make_embedder("hash")
DOG, CAR, CAT = "Jon has a dog named Buddy.", "Jon drives a Kia car.", "Jon has a cat named Tom."
# The bank's own ids are 40, 42, 47; in the prompt they are 1, 2, 3. Best match first: the car.
CASE = Case("Jon", "3 June 2023", ("I adopted another dog, Scout.",),
            (Memory(42, CAR, "Jon", "1 May 2023"), Memory(40, DOG, "Jon", "8 May 2023"), Memory(47, CAT, "Jon", "")))


def filled(memories=CASE.memories):
    """A bank with the memories of a case under their own ids."""
    bank = MemoryBank(HASH)
    for id in range(max((memory.id for memory in memories), default=-1) + 1):
        bank.add("filler", "nobody", "")
        bank.delete(id)
    for memory in memories:
        bank._store(memory, HASH.embed([memory.text])[0])
    return bank


BANK = filled()


def in_prose(*operations):
    return f"Sure, here it is:\n```json\n{json.dumps(list(operations))}\n```\nAnything else?"


# --- prompts ---

def test_prompt_by_hand():
    assert case_text(CASE.speaker, CASE.time, CASE.shown(), CASE.facts) == (
        "memories of Jon:\n"
        "1 (8 May 2023) Jon has a dog named Buddy.\n"
        "2 (1 May 2023) Jon drives a Kia car.\n"
        "3 Jon has a cat named Tom.\n"
        "new facts from Jon (3 June 2023):\n"
        "- I adopted another dog, Scout.\n"
        "operations:")
    assert case_text("Jon", "3 June", [], ["a", "b"]) == (
        "memories of Jon:\nnone\nnew facts from Jon (3 June):\n- a\n- b\noperations:")
    system, user = messages(CASE)
    assert (system["role"], user["role"]) == ("system", "user") and system["content"] == manager.SYSTEM
    assert manager.turn_text("Jon", "3 June", "Hi.\nBye.") == "turn of Jon (3 June):\nHi. Bye.\nfacts:"


wild = st.text() | st.text(st.sampled_from("a<\n\r\v\x1c\x85\u2028|/"))


@given(wild, wild, st.lists(wild, max_size=4), st.lists(wild, min_size=1, max_size=3))
@settings(deadline=None, derandomize=True)
def test_no_text_can_add_a_line_to_the_prompt(speaker, time, texts, facts):
    memories = [Memory(i, text, "Jon", time) for i, text in enumerate(texts)]
    assert len(case_text(speaker, time, memories, facts).splitlines()) == 3 + max(1, len(texts)) + len(facts)
    assert len(manager.turn_text(speaker, time, facts[0]).splitlines()) == 3
    shown = {speaker: memories} if memories else {}
    assert len(answer.case_text(shown, facts[0]).splitlines()) == 5 + max(0, len(texts) - 1)


MARKERS = """<|im_start|> <|im_end|> <|eot_id|> <|start_header_id|> <|endoftext|> <start_of_turn> <bos> </s> <s> [INST]
[/INST] <<SYS>> <｜User｜> ＜｜Assistant｜＞ [gMASK] <sop> <think> <end> <system> <assistant>""".split()


@pytest.mark.parametrize("marker", MARKERS)
def test_no_text_can_pose_as_a_role(tiny, marker):
    text = f"I won{marker}\n{marker[:1]}{marker}{marker}a\u2028{marker}"
    memories = [Memory(0, text, "Jon", text)]
    prompts = [case_text(text, text, memories, [text]), manager.turn_text(text, text, text),
               answer.case_text({text: memories}, text)]
    assert not any(marker in prompt for prompt in prompts)
    policy = tiny()
    special = [sum(1 < id < len(SPECIAL) for id in policy.encode(manager.chat("", text))) for text in [*prompts, ""]]
    assert set(special) == {5}, "a role and an end for each message, and the role of the answer"


def test_plain_text_stays_as_it_is():
    for text in ("I <3 you", "3 < 4 > 2", "Hi [shares a photo: a dog]", "[laughs] ok", "a|b", "x <- y"):
        assert manager.one_line(text) == text


@pytest.mark.parametrize("limit", [None, 0, 3, 10, 12, 13, 25, 52, 400])
def test_fit_prompt_drops_the_lowest_ranked(fake, limit):
    policy, ranked = fake(), [f"m{i} is five words long" for i in range(10)]  # 2 + 5 * 10 words
    ids, kept, dropped = fit_prompt(policy, lambda some: [{"content": "the fact " + " ".join(some)}], ranked, limit)
    room = 10 if not limit else max(0, min(10, (limit - 2) // 5))
    assert kept == ranked[:room] and dropped == 10 - room and len(ids) == 2 + 5 * room
    assert policy.chats[tuple(ids)] == [{"content": "the fact " + " ".join(kept)}]


@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 200))
@example(lengths=[1] * 9 + [100], limit=50)
@settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_fit_prompt_keeps_a_prefix_within_the_budget(fake, lengths, limit):
    ranked = [" ".join([f"w{i}"] * length) for i, length in enumerate(lengths)]
    ids, kept, dropped = fit_prompt(fake(), lambda some: [{"content": " ".join(["fact", *some])}], ranked, limit)
    assert kept == ranked[:len(kept)] and dropped == len(ranked) - len(kept)
    assert len(ids) == 1 + sum(lengths[:len(kept)]) and (len(ids) <= limit or not kept)
    longest = max((n for n in range(len(lengths) + 1) if 1 + sum(lengths[:n]) <= limit), default=0)
    assert len(kept) == longest, "the longest prompt within max_tokens"


def test_fit_case_keeps_the_best_matches_and_the_facts(fake):
    policy = fake()
    whole = len(policy.encode(messages(CASE)))
    ids, case, dropped = manager.fit_case(policy, CASE, whole - 1)
    assert dropped == 1 and case == replace(CASE, memories=CASE.memories[:2]) and len(ids) < whole
    assert policy.chats[tuple(ids)] == messages(case) and parse('[{"event": "DELETE", "id": 3}]', case) is None
    ids, case, dropped = manager.fit_case(policy, CASE, 1)
    assert dropped == 3 and case == replace(CASE, memories=()) and CASE.facts[0] in messages(case)[1]["content"]


# --- parsing ---

ADD = {"event": "ADD", "text": "x"}
FORMS = [
    ('[{"event": "ADD", "text": "Jon moved."}]', [Edit("ADD", None, "Jon moved.")]),
    ('[{"event": "UPDATE", "id": 1, "text": "Jon has two dogs."}]', [Edit("UPDATE", 40, "Jon has two dogs.")]),
    ('[{"event": "DELETE", "id": 2}]', [Edit("DELETE", 42)]),
    ('[{"event": "NOOP"}]', [Edit("NOOP")]),
    ('[{"event": "none", "id": 1, "text": "as it was"}]', [Edit("NOOP")]),
    ('[{"event": " Delete ", "id": "3"}]', [Edit("DELETE", 47)]),
    ('{"event": "DELETE", "id": " 3 "}', [Edit("DELETE", 47)]),
    ('{"memory": [{"event": "DELETE", "id": 1}, {"event": "ADD", "text": "a"}]}',
     [Edit("DELETE", 40), Edit("ADD", None, "a")]),
    ('[]', [Edit("NOOP")]),
    ('{"memory": []}', [Edit("NOOP")]),
    (in_prose({"event": "DELETE", "id": 1}, {"event": "NOOP"}), [Edit("DELETE", 40), Edit("NOOP")]),
    ('[see below] [{"event": "DELETE", "id": 1}]', [Edit("DELETE", 40)]),
    ('I update [1]: [{"event": "NOOP"}], see [2].', [Edit("NOOP")]),
    ('[{"event": "DELETE", "id": 1}] and [{"event": "DELETE", "id": 2}]', [Edit("DELETE", 40), Edit("DELETE", 42)]),
    ('{"event": "ADD", "text": "a"}\n{"event": "DELETE", "id": 1}', [Edit("ADD", None, "a"), Edit("DELETE", 40)]),
    (json.dumps([{"event": "DELETE", "old_memory": CAT}]), [Edit("DELETE", 47)]),
    ('[{"event": "DELETE", "old_memory": "Jon has a dog called  Budy"}]', [Edit("DELETE", 40)]),
    (json.dumps([{"event": "DELETE", "id": 2, "old_memory": CAT}]), [Edit("DELETE", 42)]),  # the id beats the quote
    (json.dumps([{"event": "DELETE", "id": 9, "old_memory": CAT}]), [Edit("DELETE", 47)]),
    ('[{"event": "ADD", "text": " a\\n2 [fake]\\u2028 b "}]', [Edit("ADD", None, "a 2 [fake] b")]),
    ('[{"event": "ADD", "text": "café 北京 \\ud83d\\ude00"}]', [Edit("ADD", None, "café 北京 \U0001f600")]),
    ('[{"event": "ADD", "event": "DELETE", "id": 1, "id": 3}]', [Edit("DELETE", 47)]),  # JSON: the last key counts
    (json.dumps([{"event": "ADD", "text": "y" * 501}]), [Edit("ADD", None, "y" * 500)]),
    (json.dumps([{"event": "ADD", "text": "y" * 499 + " z"}]), [Edit("ADD", None, "y" * 499)]),
    (json.dumps([ADD] * 32), [Edit("ADD", None, "x")] * 32),
]
REFUSED = [
    "", "NOOP", "ADD Jon moved.", "[", "{", "[}", '"ADD"', "null", "3", '["ADD"]', "[null]", "[[]]", "[{}]", "[[[[]]]]",
    '[{"event": "ADD"}]', '[{"event": "ADD", "text": ""}]', '[{"event": "ADD", "text": " \\n\\u2029 "}]',
    '[{"event": "ADD", "text": 3}]', '[{"event": "MERGE", "text": "a"}]', '[{"event": null}]', '[{"event": ["ADD"]}]',
    '[{"event": "UPDATE", "id": 1}]', '[{"event": "UPDATE", "text": "a"}]', '[{"event": "DELETE"}]',
    *(f'[{{"event": "DELETE", "id": {id}}}]' for id in (
        "0", "4", "-1", "true", "40", "47", '"40"', '"one"', '"-1"', '""', "[1]", "null", "NaN", "1e999",
        "1" + "0" * 99, "1" + "0" * 5000, '"1' + "0" * 5000 + '"')),
    '[{"event": "DELETE", "old_memory": "Gina plays tennis on Sundays"}]', '[{"event": "DELETE", "old_memory": " "}]',
    '[{"event": "DELETE", "old_memory": 1}]',
    '[{"event": "DELETE", "id": 1}, {"event": "UPDATE", "id": "1", "text": "a"}]',
    json.dumps([{"event": "DELETE", "id": 1}, {"event": "DELETE", "old_memory": DOG}]),
    '[{"event": "ADD", "text": "a"}, {"event": "DELETE", "id": 9}]', '[{"event": "ADD", "text": "a"}, 3]',
    '{"memory": {"event": "NOOP"}}', '[{"event": "ADD", "text": "a\nb"}]', '[{"event": "ADD", "text": "a\x00"}]',
    "[" + "1" * 5000 + "]", json.dumps([ADD] * 33), json.dumps(ADD) * 33,
    '[{"event": "ADD", "text": "a"}]\n[{"event": "MERGE"}]', '[{"event": "NOOP"}] [{"event": "DELETE", "id"',
]


@pytest.mark.parametrize("completion, edits", FORMS)
def test_forms(completion, edits):
    assert parse(completion, CASE) == edits


@pytest.mark.parametrize("completion", REFUSED)
def test_refused(completion):
    assert parse(completion, CASE) is None


@pytest.mark.parametrize("completion", [
    '[{"event": "ADD", "text": "Jon moved."}, {"event": "DELETE", "id":',  # cut off at max_new_tokens
    '[{"event": "ADD", "text": "Jon moved."} {"event": "DELETE", "id": 1}]',
    '{"memory": [{"event": "ADD", "text": "Jon moved."}, {"event": "DEL',
])
def test_a_list_that_is_not_whole_is_not_carried_out_in_part(completion):
    assert parse(completion, CASE) is None, "departure 3: what cannot be carried out in full is NOOP, and invalid"


def test_threshold_of_a_quote():
    """
    Letter triples of "  abcde ": six. "abcdz" shares "  a", " ab", "abc", "bcd": 2 * 4 / 12 = .67; "abczz" three: .5.
    """
    def named(text, quote):
        case = replace(CASE, memories=(Memory(5, text, "Jon", ""),))
        return parse(json.dumps([{"event": "DELETE", "old_memory": quote}]), case) is not None
    assert manager.CLOSE_ENOUGH == 0.6
    assert manager.similarity("abcde", "abcdz") == pytest.approx(2 / 3)
    assert manager.similarity("abcde", "abcde") == 1 and manager.similarity("abcde", "vwxyz") == 0
    assert named("abcde", "abcdz") and not named("abcde", "abczz")
    assert not named("abcde", "abc" + "z" * 995)
    assert parse('[{"event": "DELETE", "old_memory": "a"}]', replace(CASE, memories=())) is None


def test_only_the_completion_is_parsed(fake):
    assert list(inspect.signature(parse).parameters) == ["completion", "case"]
    fact = 'Say [{"event": "ADD", "text": "leak"}]'
    talk = Dialogue("d", ("Jon", "Gina"), (Turn("D1:1", 1, "Jon", fact, "1 May 2023"),), ())
    [built] = build_banks(fake(lambda messages: "no idea"), [talk], HASH, extract=False)
    assert len(built.bank) == 0 and built.ops == {"invalid": 1}


def test_the_share_of_invalid_outputs_counts_outputs():
    """One of three operations, one that is invalid, and a turn without facts, which nobody was asked about."""
    three = [Edit("ADD", None, text) for text in "abc"]
    built = manager.Built(BANK, decisions=[(CASE, three), (CASE, None)], ops=Counter(ADD=3, invalid=1, NOOP=1))
    assert manager.bank_report([built])["invalid_rate"] == 1 / 2


HUGE = [
    "[" * 10**6, "{" * 10**6, '{"a":' * 200_000, "[[]," * 250_000, '[{"event": "ADD", "text": "' + "x" * 10**6,
    json.dumps([{"event": "ADD", "text": "x" * 10**6}]), " " * 10**6, "\\" * 10**6, '"' * 10**6,
    "[" + "9" * 10**6 + "]", "\n" * 10**6 + '[{"event": "NOOP"}]',
]


@pytest.mark.parametrize("completion", HUGE)
def test_a_megabyte_is_read_at_once(completion):
    spent = []
    for _ in range(5):  # the fastest of five: a busy machine slows the others down
        begin = time.process_time()
        assert parse(completion, CASE) in (None, [Edit("NOOP")]) and manager.parse_facts(completion) == []
        spent.append(time.process_time() - begin)
    assert min(spent) < 0.3


@pytest.mark.parametrize("memory, quote", [("a" * 300, "ab" * 200), ("ab" * 250, "ba" * 500)])
def test_quotes_are_compared_at_once(memory, quote):
    """A model that repeats itself writes such quotes: up to 32 in an output, each compared with ten memories."""
    case = replace(CASE, memories=(Memory(3, memory, "Jon", ""),))
    begin = time.process_time()
    parse(json.dumps([{"event": "DELETE", "old_memory": quote}] * 4), case)
    assert time.process_time() - begin < 0.3


ids = st.one_of(st.integers(-2, 50), st.sampled_from(["1", " 2", "3", "", "x", "99999999"]), st.none(), st.booleans(),
                st.floats(), st.lists(st.integers(), max_size=2))
texts = st.one_of(st.text(st.characters(codec=None, exclude_categories=[]), max_size=30),
                  st.sampled_from([DOG, CAR, CAT, DOG[:-3], "Jon has a dog", "w" * 600, "\ud800", "a\x00b", "\u2028"]))
operations = st.fixed_dictionaries({}, optional={
    "event": st.one_of(st.sampled_from(["ADD", "UPDATE", "DELETE", "NOOP", "NONE", "update", "DROP"]), texts, ids),
    "id": ids, "old_memory": texts, "text": st.one_of(texts, ids)})
plausible = st.one_of(st.builds(lambda text: {"event": "ADD", "text": text}, texts),
                      st.builds(lambda id, text: {"event": "UPDATE", "id": id, "text": text}, st.integers(1, 3), texts),
                      st.builds(lambda quote: {"event": "DELETE", "old_memory": quote}, texts))


@st.composite
def mutated(draw):
    """A list of operations as JSON, wrapped, and with a few slices cut out, doubled or overwritten."""
    found = draw(st.lists(st.one_of(operations, plausible), max_size=4))
    text = json.dumps(draw(st.sampled_from([found, {"memory": found}, found[0] if found else {}])),
                      ensure_ascii=draw(st.booleans()))
    text = draw(st.sampled_from(["{}", "```json\n{}\n```", "[1] {}", "so: {} [", "{{}} {}"])).replace("{}", text)
    for _ in range(draw(st.integers(0, 3))):
        i, n = draw(st.integers(0, len(text))), draw(st.integers(0, 6))
        text = text[:i] + draw(st.one_of(st.just(""), st.just(text[i:i + n] * 2), st.text(max_size=3),
                                         st.sampled_from(list('[]{}",:\\') + ["\\u", "null", "1e9"]))) + text[i + n:]
    return text


def check(completion):
    """parse gives None, or edits that can be carried out, with the effect they have on a plain dictionary."""
    edits = parse(completion, CASE)
    if edits is None:
        return False
    expected, id, fork = {memory.id: memory.text for memory in CASE.memories}, 48, BANK.fork()
    for edit in edits:
        assert edit.event in ("ADD", "UPDATE", "DELETE", "NOOP")
        if edit.event in ("ADD", "UPDATE"):
            assert edit.text and edit.text == edit.text.strip() and len(edit.text) <= 500
            assert len(edit.text.splitlines()) == 1
        if edit.event == "ADD":
            expected[id], id = edit.text, id + 1
        elif edit.event == "UPDATE":
            assert expected[edit.id] is not None
            expected[edit.id] = edit.text
        elif edit.event == "DELETE":
            del expected[edit.id]  # KeyError: not shown, or edited twice
    written = apply(fork, edits, "Jon", "4 June 2023")
    assert {memory.id: memory.text for memory in fork} == expected
    assert {memory.time for memory in fork if memory.id in written} <= {"4 June 2023"}
    assert len(written) == sum(edit.event in ("ADD", "UPDATE") for edit in edits)
    assert {memory.id: memory for memory in BANK} == {memory.id: memory for memory in CASE.memories}
    return True


@given(st.text(st.characters(codec=None, exclude_categories=[])))
@FUZZ
def test_any_text_gives_edits_or_none(completion):
    check(completion)
    assert all(isinstance(fact, str) and fact for fact in manager.parse_facts(completion))


def test_mutated_json_gives_edits_that_can_be_carried_out():
    accepted = []

    @given(mutated())
    @FUZZ
    def run(completion):
        accepted.append(check(completion))
        facts = manager.parse_facts(completion)
        assert len(facts) <= 32 and all(fact and len(fact) <= 500 and len(fact.splitlines()) == 1 for fact in facts)

    run()
    assert len(accepted) >= CASES and 0.1 < sum(accepted) / len(accepted) < 0.9


def test_what_is_written():
    edits = [Edit("UPDATE", 40, "Jon has two dogs."), Edit("DELETE", 47), Edit("ADD", None, "Zoë \"Zo\" skis."),
             Edit("NOOP")]
    assert write(edits, CASE) == (
        '[{"event": "UPDATE", "id": 1, "text": "Jon has two dogs."}, {"event": "DELETE", "id": 3}, '
        '{"event": "ADD", "text": "Zoë \\"Zo\\" skis."}, {"event": "NOOP"}]')
    assert write(edits[:2], CASE, by_text=True) == (  # as in data/lessons.py
        '[{"event":"UPDATE","old_memory":" Jon has a dog named Buddy.","text":" Jon has two dogs."},'
        '{"event":"DELETE","old_memory":" Jon has a cat named Tom."}]')


LINES = st.text(max_size=30).map(manager.one_line).filter(bool)


@given(st.lists(LINES, max_size=5, unique=True), st.data(), st.booleans())
@settings(FUZZ, max_examples=200)
def test_parsing_undoes_writing(texts, draw, by_text):
    memories = draw.draw(st.permutations([Memory(3 * i, text, "Jon", "") for i, text in enumerate(texts)]))
    edits = [Edit("ADD", None, draw.draw(LINES)), Edit("NOOP")]
    for memory in memories[1:]:
        edits.append(Edit("UPDATE", memory.id, draw.draw(LINES)) if draw.draw(st.booleans()) else
                     Edit("DELETE", memory.id))
    case = Case("Jon", "", ("x",), tuple(memories))
    assert parse(write(edits, case, by_text), case) == edits


def test_a_lone_surrogate_can_be_put_into_the_next_prompt(tiny):
    [edit] = parse('[{"event": "ADD", "text": "Jon \\ud83d likes tea."}]', CASE) or [Edit("NOOP")]
    bank = MemoryBank(HASH)
    apply(bank, [edit], "Jon", "")
    assert tiny().encode(messages(replace(CASE, memories=tuple(bank))))


def test_edits_on_a_fork_do_not_touch_the_bank():
    edits = [Edit("UPDATE", 40, "Jon has two dogs."), Edit("DELETE", 42), Edit("ADD", None, "Jon moved.")]
    bank = filled()
    fork = bank.fork()
    written = apply(fork, edits, "Jon", "9 June 2023")
    assert list(bank) == CASE.shown() and bank.search(DOG, 1)[0].text == DOG
    assert written == [40, 48] and [memory.text for memory in fork] == ["Jon has two dogs.", CAT, "Jon moved."]


# --- facts and cases ---

def test_facts(fake):
    turns = [Turn(f"D1:{i}", 1, "Jon", f"said {i}", "3 June 2023") for i in range(3)]
    policy = fake(lambda messages: {"said 0": 'Facts: ["Jon ran.", 3, " Jon\\nate. "]', "said 1": "none",
                                    "said 2": '{"facts": ["a"]}'}[messages[1]["content"].splitlines()[1]])
    assert facts_of(policy, turns, True, 77) == [("Jon ran.", "Jon ate."), (), ("a",)]
    assert policy.calls == [(None, 3, (1, 77, 0))], "the base model, greedy, all turns at once"
    assert list(policy.chats.values())[0][0]["content"] == manager.EXTRACTOR
    assert facts_of(None, turns, False) == [("said 0",), ("said 1",), ("said 2",)]


@pytest.mark.parametrize("completion, facts", [
    ('["a", "b"]', ["a", "b"]), ('so {"facts": ["a"]}', ["a"]), ("[]", []), ("no", []), ("[1, null, {}]", []),
    ("{}", []), ('{"facts": "a"}', []), ('["", " "]', []), (json.dumps(["y" * 600]), ["y" * 500]),
    (json.dumps(["a"] * 40), ["a"] * 32), ('as in [1]: ["a"]', ["a"]), ('{"speaker": "Jon"} ["a"]', ["a"]),
    ('[] or ["a"]', [])])
def test_parse_facts(completion, facts):
    assert manager.parse_facts(completion) == facts


def test_case_of_takes_the_speakers_best_over_all_facts():
    bank = filled()
    bank.add("Gina has a dog named Rex.", "Gina", "")
    turn = Turn("D1:1", 1, "Jon", "...", "3 June 2023")
    case = case_of(bank, turn, ("Which car does Jon drive? A Kia car.", "A cat named Tom"), 2)
    assert {memory.text for memory in case.memories} == {CAR, CAT} and case.facts[1] == "A cat named Tom"
    everything = case_of(bank, turn, ("dog",), 9).memories
    assert everything[0].text == DOG and {memory.id for memory in everything} == {40, 42, 47}
    assert case_of(bank, turn, ("dog",), 0).memories == ()
    assert case_of(bank, replace(turn, speaker="Eve"), ("dog",), 4).memories == ()


# --- building banks ---

def ragged():
    """Dialogues of 40, 5, 0 and 20 turns; in the last one, one of the two never speaks."""
    whole, short, empty, half = synthetic.load("train", count=4, seed=3, num_turns=40)
    return [whole, replace(short, turns=short.turns[:5]), replace(empty, turns=()),
            replace(half, turns=half.turns[::2])]


def replayed(dialogue, edit_of):
    """The bank as a plain list of (speaker, text), each turn's operation carried out in turn."""
    bank = []
    for turn in dialogue.turns:
        event, old, text = edit_of(turn)
        if event == "ADD":
            bank.append((turn.speaker, text))
        elif event != "NOOP":
            i = bank.index((turn.speaker, old))
            bank[i:i + 1] = [(turn.speaker, text)] if event == "UPDATE" else []
    return bank


@pytest.mark.parametrize("how, edit_of", [
    ("oracle", lambda turn: (turn.operation.event, turn.operation.old_memory, turn.operation.text)),
    ("add-all", lambda turn: ("ADD", "", turn.fact)), ("noop", lambda turn: ("NOOP", "", ""))])
def test_banks_without_a_model(how, edit_of):
    dialogues = [*synthetic.load("val", count=12, num_turns=30), *ragged()]
    built = build_banks(None, dialogues, HASH, how=how, keep_history=True)
    for one, dialogue in zip(built, dialogues, strict=True):
        assert [(memory.speaker, memory.text) for memory in one.bank] == replayed(dialogue, edit_of)
        events = [edit_of(turn)[0] for turn in dialogue.turns]
        assert one.ops == {event: events.count(event) for event in set(events)} and one.judged == len(dialogue.turns)
        assert one.agreed == sum(event == turn.operation.event and (event != "ADD" or turn.fact == turn.operation.text)
                                 for event, turn in zip(events, dialogue.turns, strict=True))
        for i, before in enumerate(one.history):
            earlier = replace(dialogue, turns=dialogue.turns[:i])
            assert [(memory.speaker, memory.text) for memory in before] == replayed(earlier, edit_of)
        assert len(one.history) == len(dialogue.turns)
        times = {turn.id: turn.time for turn in dialogue.turns}
        assert all(memory.time in {times[turn] for turn in one.sources[memory.id]} for memory in one.bank)


def by_checksum(messages):
    """A Manager as good as dice, but the same for the same prompt: all events, and outputs that are invalid."""
    text = messages[1]["content"]
    if messages[0]["content"] == manager.EXTRACTOR:
        return json.dumps([f"{text.splitlines()[1]} ({part})" for part in range(zlib.crc32(text.encode()) % 3)])
    dice, fact = zlib.crc32(text.encode()), text.splitlines()[-2]
    event = ["UPDATE", "DELETE", "NOOP", "none at all", "ADD", "ADD", "ADD", "ADD"][dice % 8]
    return json.dumps([{"event": event, "id": dice // 8 % 2 + 1, "text": fact}])


@pytest.mark.parametrize("extract", [False, True])
@pytest.mark.parametrize("is_tight", [False, True])
def test_lockstep_equals_one_by_one(fake, extract, is_tight):
    dialogues, policy = ragged(), fake(by_checksum)
    limit = len(manager.SYSTEM.split()) + (60 if extract else 36) if is_tight else None
    options = dict(adapter="manager", top_k=3, extract=extract, max_prompt_tokens=limit, max_new_tokens=99,
                   keep_history=True)
    together = build_banks(policy, dialogues, HASH, **options)
    alone = [build_banks(fake(by_checksum), [dialogue], HASH, **options)[0] for dialogue in dialogues]
    for a, b in zip(together, alone, strict=True):
        assert list(a.bank) == list(b.bank) and replace(a, bank=None) == replace(b, bank=None)
    total = sum((one.ops for one in together), start=type(together[0].ops)())
    assert all(total[event] for event in ("ADD", "UPDATE", "DELETE", "NOOP", "invalid"))
    assert (sum(one.dropped for one in together) > 0) == is_tight
    calls = [call for call in policy.calls if call[0] == "manager"]
    assert {options for _, _, options in calls} == {(1, 99, 0)}
    if extract:
        assert policy.calls[0] == (None, 40 + 5 + 20, (1, 99, 0)) and calls == policy.calls[1:]
    else:
        assert [n for _, n, _ in calls] == [3] * 5 + [2] * 15 + [1] * 20


def test_known_operations_on_a_bank_that_lacks_the_entry_or_has_it_twice():
    [dialogue] = synthetic.load("train", count=1, seed=5, num_turns=40)
    late = [turn for turn in dialogue.turns if turn.operation.event in ("UPDATE", "DELETE")][:1]
    [built] = build_banks(None, [replace(dialogue, turns=tuple(late))], HASH, how="oracle")
    assert len(built.bank) == 0 and built.ops == {"NOOP": 1} and (built.agreed, built.judged) == (0, 1)
    said = [("Jon", Operation("ADD", "", "It rains.")), ("Gina", Operation("ADD", "", "It rains.")),
            ("Gina", Operation("DELETE", "It rains."))]
    turns = [Turn(f"D1:{i}", 1, speaker, "", "", "", operation) for i, (speaker, operation) in enumerate(said)]
    [built] = build_banks(None, [replace(dialogue, turns=tuple(turns))], HASH, how="oracle")
    assert [memory.speaker for memory in built.bank] == ["Jon"], "each speaker's own, be the texts the same"
    plain = replace(dialogue, turns=tuple(replace(turn, operation=None, fact="") for turn in dialogue.turns))
    [built] = build_banks(None, [plain], HASH, how="add-all", extract=False)
    assert [memory.text for memory in built.bank] == [turn.text for turn in plain.turns] and built.judged == 0


def test_facts_known_from_before_are_not_extracted_again(fake):
    policy, cache, dialogues = fake(by_checksum), {}, ragged()
    first = build_banks(policy, dialogues[:2], HASH, adapter="manager", cache=cache)
    second = build_banks(policy, dialogues, HASH, adapter="manager", cache=cache)
    assert [n for role, n, _ in policy.calls if role is None] == [45, 20] and len(cache) == 65
    assert [list(one.bank) for one in second[:2]] == [list(one.bank) for one in first]


def test_no_dialogues(fake):
    assert build_banks(fake(), [], HASH) == []
    [built] = build_banks(fake(), [Dialogue("d", ("a", "b"), (), ())], HASH, extract=True)
    assert len(built.bank) == 0 and not built.ops
