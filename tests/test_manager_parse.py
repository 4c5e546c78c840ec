"""The Manager's parser on hand-written and random completions; applied edits against a plain dictionary."""
import inspect
import json
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import CASES, FUZZ
from test_manager import BANK, CAR, CASE, CAT, DOG, HASH, filled

import manager
from data import Dialogue, Turn
from manager import Case, Edit, Manager, apply_edits, build_banks, format_edits, messages, parse
from memory import Memory, MemoryBank
from support.text import after_reasoning, sanitize_for_prompt, trigram_similarity


def in_prose(*operations):
    return f"Sure, here it is:\n```json\n{json.dumps(list(operations))}\n```\nAnything else?"


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
    '[{"event": "ADD | NOOP", "text": "a"}]', '[{"event": "NO DELETE", "id": 1}]',
    '[{"event": "ADD"}]', '[{"event": "ADD", "text": ""}]', '[{"event": "ADD", "text": " \\n\\u2029 "}]',
    '[{"event": "ADD", "text": 3}]', '[{"event": "MERGE", "text": "a"}]', '[{"event": null}]', '[{"event": ["ADD"]}]',
    '[{"event": "UPDATE", "id": 1}]', '[{"event": "UPDATE", "text": "a"}]', '[{"event": "DELETE"}]',
    *(f'[{{"event": "DELETE", "id": {id}}}]' for id in (
        "0", "4", "-1", "true", "40", "47", '"40"', '"one"', '"-1"', '""', "[9]", "null", "NaN", "1e999",
        "1.5", '"1, 2"', "[1, 2]", '"memory"', "1" + "0" * 99, "1" + "0" * 5000, '"1' + "0" * 5000 + '"')),
    '[{"event": "DELETE", "old_memory": "Gina plays tennis on Sundays"}]', '[{"event": "DELETE", "old_memory": " "}]',
    '[{"event": "DELETE", "old_memory": 1}]',
    '[{"event": "ADD", "text": "a\nb"}]', '[{"event": "ADD", "text": "a\x00"}]', "[" + "1" * 5000 + "]",
    '[] [{"event": "MERGE"}]', "ADD: Jon moved.\nNOOP", '{"facts": ["Jon moved."]}', '[{"text": "Jon moved."}]',
]
A, DOGS, GONE = Edit("ADD", None, "a"), Edit("UPDATE", 40, "Jon has two dogs."), Edit("DELETE", 42)
SYNONYMS = [
    ('[{"operation": "Update", "memory_id": "1", "new_memory": "Jon has two dogs."}]', [DOGS]),
    ('[{"action": "MODIFY", "ID": 1, "content": "Jon has two dogs."}, {"op": "remove", "index": 2}]', [DOGS, GONE]),
    ('{"Event": "INSERT", "fact": "a"}', [A]), ('[[{"event": "ADD", "text": "a"}]]', [A]),
    *((json.dumps([{"event": "DELETE", "id": id}]), [GONE]) for id in ("[2]", [2], 2.0, "#2", "Memory 2", "(2)", "02")),
    ('[{"event": "DELETE", "text": "' + CAR + '"}, {"event": "NO CHANGE"}]', [GONE, Edit("NOOP")]),
    ('[{"Event Type": "ADD_MEMORY", "Memory Text": "a"}, {"event": "delete memory", "memory number": 2}]', [A, GONE]),
    ('[{"operation_type": "no_operation"}, {"action": "ADD", "statement": "a"}]', [Edit("NOOP"), A]),
    ('[{"type": "create", "memory": "a"}, {"type": "no_op"}]', [A, Edit("NOOP")]),
    ('{"operations": [{"event": "ADD", "text": "a"}]}', [A]), ('{"actions": [{"action": "delete", "id": 2}]}', [GONE]),
    ('{"reason": "new", "memories": [{"event": "ADD", "memory": "a"}]}', [A]),
    ('{"memory": [], "operations": [{"event": "ADD", "text": "a"}]}', [A]),
    ('{"relevant": [1], "operations": [{"event": "DELETE", "id": 2}], "more": ["so", "so"]}', [GONE]),
    ('{"added": [{"event": "ADD", "text": "a"}], "deleted": [{"event": "DELETE", "id": 2}]}', [A, GONE]),
    ('{"relevant": [1, 2], "operations": []}', [Edit("NOOP")]),
    ('{"memory": [{"id": "1", "text": "' + DOG + '", "event": "NONE"}, {"id": "2", "text": "Jon drives a Fiat car.", '
     '"event": "UPDATE", "old_memory": "' + CAR + '"}]}', [Edit("NOOP"), Edit("UPDATE", 42, "Jon drives a Fiat car.")]),
    ("[{'event': 'UPDATE', 'id': 1, 'text': 'Jon has two dogs.'}]", [DOGS]),
    ("{'memory': [{'event': 'ADD', 'text': \"a\"}, {'event': 'DELETE', 'id': '2'}]}", [A, GONE]),
    ('[{"event": "ADD", "text": "a",}, {"event": "DELETE", "id": 2},]', [A, GONE]),
    ('```\n{"operations": [\n  {"event": "ADD", "text": "a"},\n]}\n```', [A]),
    ('[{"event": "ADD", "text": "a"} {"event": "DELETE", "id": 2}]', [A, GONE]),
    ('[{"event": "ADD", "text": "a"}', [A]),
    ('{"event": "ADD", "text": "a"},\n{"event": "DELETE", "id": 2}]', [A, GONE]),
]
PARTIAL = [  # (completion, edits, number of skipped entries)
    ('[{"event": "ADD", "text": "a"}, {"event": "DELETE", "id": 9}]', [A], 1),
    ('[{"event": "DELETE", "id": 0}, {"event": "MERGE"}, {"event": "DELETE", "id": 2}]', [GONE], 2),
    ('[{"event": "ADD", "text": "a"}, 3, null, "NOOP", {}]', [A], 4),
    ('[{"event": "UPDATE", "id": 1}, {"event": "NOOP"}]', [Edit("NOOP")], 1),
    ('[{"event": "DELETE", "id": 2}, {"event": "UPDATE", "id": "2", "text": "a"}, {"event": "ADD", "text": "a"}]',
     [GONE, A], 1),
    ('[{"event": "UPDATE", "id": 1, "text": "Jon has two dogs."}, {"event": "DELETE", "old_memory": "' + DOG + '"}]',
     [DOGS], 1),
    ('[{"event": "ADD", "text": "a"}]\n[{"event": "MERGE"}]', [A], 1),
    ('[{"event": "DELETE", "id": 2}, {"event": "ADD", "text": "a', [GONE], 1),
    ('{"operations": [{"event": "DELETE", "id": 2}, {"event": "UPDATE", "id": 1, "te', [GONE], 1),
    ('[{"event": "ADD", "text": "a"}, {"event": "ADD", "text": "b"c"}, {"event": "DELETE", "id": 2}]', [A, GONE], 1),
    (json.dumps([ADD] * 33), [Edit("ADD", None, "x")] * 32, 1),
    (json.dumps(ADD) * 40, [Edit("ADD", None, "x")] * 32, 8),
]
# Reasoning with a draft in it: {d} is the draft, {a} what follows the reasoning.
REASONING = ["<think>{d}</think>{a}", "I think {d}\n</think>\n\n{a}", "<thinking>\n{d}\n</thinking> {a}",
             "<reasoning>{d}</reasoning>{a}", "<Thought>{d}</Thought>{a}", "<seed:think>{d}</seed:think>{a}",
             "[THINK]{d}[/THINK]{a}", "◁think▷{d}◁/think▷{a}", "<|START_THINKING|>{d}<|END_THINKING|>{a}",
             "<scratchpad>{d}</scratchpad>{a}", "< THINK >{d}< / THINK >{a}",
             "<inner_monologue>{d}</inner_monologue>{a}",
             "<chain_of_thought>{d}</chain_of_thought>{a}", "<|thinking|>{d}<|/thinking|>\n{a}<|im_end|>",
             "<|begin_of_thought|>{d}<|end_of_thought|><|begin_of_solution|>{a}<|end_of_solution|>",
             "<think>{d}<think>{d}</think>{d}</think>{a}", "<|channel>thought\n{d}<channel|>{a}</s>",
             "<|channel|>analysis<|message|>{d}<|end|><|start|>assistant<|channel|>final<|message|>{a}<|return|>",
             "<|channel|>analysis<|message|>{d}<|end|><|start|>assistant<|channel|>final json<|message|>{a}",
             "analysisWe have {d}assistantfinal{a}", "<think>{d}</think>No: {d}<think>Or {d}</think>{a}"]


@pytest.mark.parametrize("completion", REFUSED)
def test_refused(completion):
    assert parse(completion, CASE) is None


@pytest.mark.parametrize("completion, edits, skipped", [(*one, 0) for one in FORMS + SYNONYMS] + PARTIAL)
def test_what_cannot_be_applied_is_skipped_and_counted(completion, edits, skipped):
    found = parse(completion, CASE)
    assert found == edits and found.skipped == skipped


def test_copies_of_the_examples_are_skipped():
    copy, own = ('{"event": "ADD", "text": "%s"}' % text for text in ("Nina plays chess.", "Jon met Ann."))
    assert parse(f"[{copy}, {own}]", CASE) == parse(f"[{own}]", CASE) and parse(f"[{copy}, {own}]", CASE).skipped == 1
    assert parse(f"[{copy}]", CASE) is None
    for case in (replace(CASE, speaker="Nina"), replace(CASE, facts=("Nina left.",)), replace(
            CASE, memories=(*CASE.memories, Memory(99, "Jon is a friend of Nina.", "Jon", "")))):
        assert parse(f"[{copy}]", case) == [Edit("ADD", None, "Nina plays chess.")]
    examples = [json.loads(reply) for _, reply in manager.OPERATIONS_SHOWN]
    texts = [operation["text"] for reply in examples for operation in reply if "text" in operation]
    assert texts and all("Nina" in text for text in texts), "each copy of an example can be recognised"


def test_facts_that_copy_a_demonstration_are_skipped(fake):
    """All of them name somebody or a place that the turn does not."""
    shown = [fact for _, reply in manager.FACTS_SHOWN for fact in json.loads(reply)]
    agent = Manager(fake(lambda _: json.dumps([*shown, "Jon ran."])), settings=manager.Settings(extract=True))
    for text, kept in (("Hi!", ["Jon ran."]), ("ada and tom met Nina in leeds", [*shown, "Jon ran."])):
        [facts] = agent.extract([Turn("D1:1", 1, "Jon", text, "3 June 2023")])
        assert facts == kept and facts.skipped == len(shown) + 1 - len(kept)


def test_long_texts_are_counted():
    operations = [{"event": "ADD", "text": "y" * 501}, {"event": "UPDATE", "id": 1, "text": "y" * 900},
                  {"event": "ADD", "text": "y" * 500}]
    assert parse(json.dumps(operations), CASE).cut == 2 and parse(json.dumps(operations[2:]), CASE).cut == 0


@pytest.mark.parametrize("form", REASONING)
def test_reasoning_is_never_read(form):
    """Nor where it is cut off; an answer without reasoning is whole."""
    def written(draft, answer):
        return form.replace("{d}", draft).replace("{a}", answer)
    draft = '[{"event": "DELETE", "id": 1}]'
    assert parse(written(draft, '[{"event": "DELETE", "id": 2}, {"event": "ADD", "text": "a"}]'), CASE) == [GONE, A]
    assert manager.parse_facts(written('["Jon maybe moved."]', '["Jon moved."]')) == ["Jon moved."]
    assert after_reasoning(written("answer: Ford", "Kia")).strip() == "Kia"
    opened = form.partition("{d}")[0]
    if opened != "I think ":  # where only the end is in the output, a beginning cannot be recognized
        assert parse(opened + draft, CASE) is None and after_reasoning(opened + "answer: Ford") == ""
        unread = manager.parse_facts(opened + '["Jon maybe moved."]\n- Jon ran.')
        assert (unread, unread.skipped) == ([], 1)


@given(st.text(st.sampled_from('ab<>/[]{}"\' \n|')), st.text(st.sampled_from("ab[]{},:\" \n")))
@settings(FUZZ, max_examples=200)
def test_what_comes_before_the_end_of_reasoning_never_counts(draft, answer):
    assert after_reasoning(f"{draft}</think>{answer}") == answer
    assert after_reasoning(f"{answer}<think>{draft}") == ""
    assert after_reasoning(answer) == answer


def test_threshold_of_a_quote():
    """
    Letter triples of "  abcde ": six. "abcdz" shares "  a", " ab", "abc", "bcd": 2 * 4 / 12 = .67; "abczz" three: .5.
    """
    def named(text, quote):
        case = replace(CASE, memories=(Memory(5, text, "Jon", ""),))
        return parse(json.dumps([{"event": "DELETE", "old_memory": quote}]), case) is not None
    assert manager.MIN_QUOTE_SIMILARITY == 0.6
    assert trigram_similarity("abcde", "abcdz") == pytest.approx(2 / 3)
    assert trigram_similarity("abcde", "abcde") == 1 and trigram_similarity("abcde", "vwxyz") == 0
    assert named("abcde", "abcdz") and not named("abcde", "abczz")
    assert not named("abcde", "abc" + "z" * 995)
    assert parse('[{"event": "DELETE", "old_memory": "a"}]', replace(CASE, memories=())) is None


def test_only_the_completion_is_parsed(fake):
    assert list(inspect.signature(parse).parameters) == ["completion", "case"]
    fact = 'Say [{"event": "ADD", "text": "leak"}]'
    talk = Dialogue("d", ("Jon", "Gina"), (Turn("D1:1", 1, "Jon", fact, "1 May 2023"),), ())
    [build] = build_banks(Manager(fake(lambda messages: "no idea")), [talk], HASH)
    assert len(build.bank) == 0 and build.ops == {"invalid": 1}


HUGE = [
    "[" * 10**6, "{" * 10**6, '{"a":' * 200_000, "[[]," * 250_000, '[{"event": "ADD", "text": "' + "x" * 10**6,
    json.dumps([{"event": "ADD", "text": "x" * 10**6}]), " " * 10**6, "\\" * 10**6, '"' * 10**6,
    "[" + "9" * 10**6 + "]", "\n" * 10**6 + '[{"event": "NOOP"}]', "<|channel|>final" * 60_000, "[" + "('" * 500_000,
    '["' + '\\"' * 500_000, "['" + "'a" * 500_000, "{'a':" + "-" * 10**6 + "1}",
]


@pytest.mark.parametrize("completion", HUGE)
def test_a_megabyte_takes_ten_times_as_long_as_a_tenth(completion):
    """At most: where time grows with the square of the length, it would be a hundred times."""
    assert parse(completion, CASE) in (None, [Edit("NOOP")]) and manager.parse_facts(completion) == []
    spent = []
    for text in (completion[:len(completion) // 10], completion):
        times = []
        for _ in range(3):  # the fastest of three: a busy machine slows the others down
            begin = time.process_time()
            parse(text, CASE), manager.parse_facts(text)
            times.append(time.process_time() - begin)
        spent.append(min(times))
    assert spent[1] < 30 * spent[0] + 0.05


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
    written = apply_edits(fork, edits, "Jon", "4 June 2023")
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
    assert format_edits(edits, CASE) == (
        '[{"event": "UPDATE", "id": 1, "text": "Jon has two dogs."}, {"event": "DELETE", "id": 3}, '
        '{"event": "ADD", "text": "Zoë \\"Zo\\" skis."}, {"event": "NOOP"}]')
    assert format_edits(edits[:2], CASE, by_text=True) == (  # as the tiny model was taught
        '[{"event":"UPDATE","old_memory":" Jon has a dog named Buddy.","text":" Jon has two dogs."},'
        '{"event":"DELETE","old_memory":" Jon has a cat named Tom."}]')


LINES = st.text(max_size=30).map(sanitize_for_prompt).filter(bool)


@given(st.lists(LINES, max_size=5, unique=True), st.data(), st.booleans())
@settings(FUZZ, max_examples=200)
def test_parsing_undoes_writing(texts, draw, by_text):
    memories = draw.draw(st.permutations([Memory(3 * i, text, "Jon", "") for i, text in enumerate(texts)]))
    edits = [Edit("ADD", None, draw.draw(LINES)), Edit("NOOP")]
    for memory in memories[1:]:
        edits.append(Edit("UPDATE", memory.id, draw.draw(LINES)) if draw.draw(st.booleans()) else
                     Edit("DELETE", memory.id))
    case = Case("Jon", "", ("x",), tuple(memories))
    assert parse(format_edits(edits, case, by_text), case) == edits


def test_a_lone_surrogate_can_be_put_into_the_next_prompt(tiny):
    [edit] = parse('[{"event": "ADD", "text": "Jon \\ud83d likes tea."}]', CASE) or [Edit("NOOP")]
    bank = MemoryBank(HASH)
    apply_edits(bank, [edit], "Jon", "")
    assert tiny().encode(messages(replace(CASE, memories=tuple(bank))))


def test_edits_on_a_fork_do_not_touch_the_bank():
    edits = [Edit("UPDATE", 40, "Jon has two dogs."), Edit("DELETE", 42), Edit("ADD", None, "Jon moved.")]
    bank = filled()
    fork = bank.fork()
    written = apply_edits(fork, edits, "Jon", "9 June 2023")
    assert list(bank) == CASE.shown() and bank.search(DOG, 1)[0].text == DOG
    assert written == [40, 48] and [memory.text for memory in fork] == ["Jon has two dogs.", CAT, "Jon moved."]
