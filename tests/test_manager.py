"""The Manager's prompts and cases by hand; banks built in lockstep against a plain replay."""
import json
import re
import zlib
from collections import Counter
from dataclasses import replace

import pytest
from conftest import SPECIAL
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import answer
import manager
from data import Dialogue, Operation, Turn, synthetic
from manager import (
    Case,
    Edit,
    Manager,
    Settings,
    add_all_banks,
    bank_report,
    build_banks,
    case_text,
    make_case,
    messages,
    noop_banks,
    oracle_banks,
    parse,
)
from memory import Memory, MemoryBank, make_embedder
from support.prompts import FACTS_SHOWN, OPERATIONS_SHOWN, fit_prompt
from support.text import chat_messages, sanitize_for_prompt

HASH = make_embedder("hash")
DOG, CAR, CAT = "Jon has a dog named Buddy.", "Jon drives a Kia car.", "Jon has a cat named Tom."
# The bank's own ids are 40, 42, 47; in the prompt they are 1, 2, 3. Best match first: the car.
CASE = Case("Jon", "3 June 2023", ("I adopted another dog, Scout.",),
            (Memory(42, CAR, "Jon", "1 May 2023"), Memory(40, DOG, "Jon", "8 May 2023"), Memory(47, CAT, "Jon", "")))


def filled(memories=CASE.memories):
    """A bank with the memories of a case under their own ids."""
    bank, by_id = MemoryBank(HASH), {memory.id: memory for memory in memories}
    for id in range(max(by_id, default=-1) + 1):
        memory = by_id.get(id, Memory(id, "filler", "nobody", ""))
        assert bank.add(memory.text, memory.speaker, memory.time) == id
        if id not in by_id:
            bank.delete(id)
    return bank


BANK = filled()


def test_prompt_by_hand():
    assert case_text(CASE.speaker, CASE.time, CASE.shown(), CASE.facts) == (
        "memories of Jon:\n"
        "1 (8 May 2023) Jon has a dog named Buddy.\n"
        "2 (1 May 2023) Jon drives a Kia car.\n"
        "3 Jon has a cat named Tom.\n"
        "new facts from Jon (3 June 2023):\n"
        "- I adopted another dog, Scout.\n"
        "operations:")
    assert case_text("Jon", "1:56 pm on 3 June, 2023", [], ["a", "b"]) == (
        "memories of Jon:\nnone\nnew facts from Jon (3 June, 2023):\n- a\n- b\noperations:")
    system, user = messages(CASE, tiny=True)
    assert (system["role"], user["role"]) == ("system", "user") and system["content"] == manager.SYSTEM
    assert manager.turn_text("Jon", "3 June", "Hi.\nBye.") == "turn of Jon (3 June):\nHi. Bye.\nfacts:"


def test_demonstrations_are_earlier_turns_of_the_chat_in_the_format_of_the_case():
    system, *turns, last = messages(CASE)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * len(OPERATIONS_SHOWN)
    assert last["content"] == case_text(CASE.speaker, CASE.time, CASE.shown(), CASE.facts)
    events = set()
    for user, reply in zip(turns[::2], turns[1::2], strict=True):
        speaker, stored, day, facts = re.fullmatch(
            r"memories of (\w+):\n(.*)\nnew facts from \1 \((.*)\):\n(.*)\noperations:", user["content"], re.S).groups()
        memories = [Memory(90 + int(i), text, "", then) for i, then, text in re.findall(r"(\d) \((.*?)\) (.*)", stored)]
        case = Case(speaker, day, tuple(line.removeprefix("- ") for line in facts.splitlines()), tuple(memories))
        edits = parse(reply["content"], case)
        assert user["content"] == case_text(speaker, day, case.shown(), case.facts)
        assert manager.format_edits(edits, case) == reply["content"] and len(edits) == len(case.facts)
        events |= {edit.event for edit in edits}
    assert events == set(manager.EVENTS), "each operation is shown"
    for turn, facts in FACTS_SHOWN:
        told = re.fullmatch(r"turn of (\w+) \((.*)\):\n(.*)\nfacts:", turn).groups()
        assert turn == manager.turn_text(*told) and json.dumps(manager.parse_facts(facts)) == facts


wild = st.text() | st.text(st.sampled_from("a<\n\r\v\x1c\x85\u2028|/"))


@given(wild, wild, st.lists(wild, max_size=4), st.lists(wild, min_size=1, max_size=3))
@settings(deadline=None, derandomize=True)
def test_no_text_can_add_a_line_to_the_prompt(speaker, time, texts, facts):
    memories = [Memory(i, text, "Jon", time) for i, text in enumerate(texts)]
    assert len(case_text(speaker, time, memories, facts).splitlines()) == 3 + max(1, len(texts)) + len(facts)
    assert len(manager.turn_text(speaker, time, facts[0]).splitlines()) == 3
    shown = {speaker: memories} if memories else {}
    assert len(answer.case_text(shown, facts[0], tiny=True).splitlines()) == 5 + max(0, len(texts) - 1)
    assert len(answer.case_text(shown, facts[0]).splitlines()) == 4 + len(texts)


MARKERS = """<|im_start|> <|im_end|> <|eot_id|> <|start_header_id|> <|endoftext|> <start_of_turn> <bos> </s> <s> [INST]
[/INST] <<SYS>> <｜User｜> ＜｜Assistant｜＞ [gMASK] <sop> <think> <end> <system> <assistant>""".split()


@pytest.mark.parametrize("marker", MARKERS)
def test_no_text_can_pose_as_a_role(tiny, marker):
    text = f"I won{marker}\n{marker[:1]}{marker}{marker}a\u2028{marker}"
    memories = [Memory(0, text, "Jon", text)]
    prompts = [case_text(text, text, memories, [text]), manager.turn_text(text, text, text),
               answer.case_text({text: memories}, text), answer.case_text({text: memories}, text, tiny=True)]
    assert not any(marker in prompt for prompt in prompts)
    policy = tiny()
    special = [sum(1 < id < len(SPECIAL) for id in policy.encode(chat_messages("", text))) for text in [*prompts, ""]]
    assert set(special) == {5}, "a role and an end for each message, and the role of the answer"


def test_plain_text_stays_as_it_is():
    for text in ("I <3 you", "3 < 4 > 2", "Hi [shares a photo: a dog]", "[laughs] ok", "a|b", "x <- y"):
        assert sanitize_for_prompt(text) == text


@pytest.mark.parametrize("limit", [None, 0, 3, 10, 12, 13, 25, 52, 400])
def test_fit_prompt_drops_the_lowest_ranked(fake, limit):
    policy, ranked = fake(), [f"m{i} is five words long" for i in range(10)]  # 2 + 5 * 10 words
    ids, kept, dropped = fit_prompt(policy, lambda some: [{"content": "the fact " + " ".join(some)}], ranked, limit, 9)
    room = 10 if not limit else max(0, min(10, (limit - 2) // 5))
    assert kept == ranked[:room] and dropped == 10 - room and len(ids) == 2 + 5 * room
    assert policy.chats[tuple(ids)] == [{"content": "the fact " + " ".join(kept)}]


@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 200))
@example(lengths=[1] * 9 + [100], limit=50)
@settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_fit_prompt_keeps_a_prefix_within_the_budget(fake, lengths, limit):
    ranked = [" ".join([f"w{i}"] * length) for i, length in enumerate(lengths)]
    ids, kept, dropped = fit_prompt(fake(), lambda some: [{"content": " ".join(["fact", *some])}], ranked, limit, 9)
    assert kept == ranked[:len(kept)] and dropped == len(ranked) - len(kept)
    assert len(ids) == 1 + sum(lengths[:len(kept)]) and (len(ids) <= limit or not kept)
    longest = max((n for n in range(len(lengths) + 1) if 1 + sum(lengths[:n]) <= limit), default=0)
    assert len(kept) == longest, "the longest prompt within max_tokens"


def test_fit_case_keeps_the_best_matches_and_the_facts(fake):
    policy = fake()
    whole = len(policy.encode(messages(CASE)))
    ids, case, dropped = manager.fit_case(policy, CASE, Settings(max_prompt_tokens=whole - 1))
    assert dropped == 1 and case == replace(CASE, memories=CASE.memories[:2]) and len(ids) < whole
    assert policy.chats[tuple(ids)] == messages(case) and parse('[{"event": "DELETE", "id": 3}]', case) is None
    ids, case, dropped = manager.fit_case(policy, CASE, Settings(max_prompt_tokens=1))
    assert dropped == 3 and case == replace(CASE, memories=()) and CASE.facts[0] in messages(case)[-1]["content"]


@pytest.mark.parametrize("new", [1, 80, 300, 512])
def test_a_case_leaves_room_for_the_operations_in_the_models_window(fake, new):
    policy, whole = fake(), len(fake().encode(messages(CASE)))
    for room, kept in ((whole, 3), (whole - 1, 2), (1, 0)):
        policy.window = new + room
        ids, case, dropped = manager.fit_case(policy, CASE, Settings(max_prompt_tokens=None, max_new_tokens=new))
        assert len(case.memories) == kept == 3 - dropped and (len(ids) <= room or not kept)


def test_facts(fake):
    turns = [Turn(f"D1:{i}", 1, "Jon", f"said {i}", "3 June 2023") for i in range(3)]
    policy = fake(lambda messages: {"0": 'Facts: ["Jon ran.", 3, " Jon\\nate. ", "Jon ran."]', "1": "none",
                                    "2": '{"facts": ["a"]}'}[messages[-1]["content"].splitlines()[1][-1]])
    extracting = Manager(policy, "manager", Settings(extract=True, max_new_tokens=77))
    found = extracting.extract(turns)
    assert found == [["Jon ran.", "Jon ate."], [], ["a"]] and [facts.skipped for facts in found] == [1, 1, 0]
    assert policy.calls == [(None, 3, (1, 77, 0))], "the base model, greedy, all turns at once"
    system, *shown, last = list(policy.chats.values())[0]
    assert system["content"] == manager.EXTRACTOR and len(shown) == 2 * len(FACTS_SHOWN)
    assert last["content"] == manager.turn_text("Jon", "3 June 2023", "said 0")
    assert Manager(None).extract(turns) == [["said 0"], ["said 1"], ["said 2"]]


@pytest.mark.parametrize("completion, facts", [
    ('["a", "b"]', ["a", "b"]), ('so {"facts": ["a"]}', ["a"]), ("[]", []), ("{}", []), ('["", " "]', []),
    ('as in [1]: ["a"]', ["a"]), ('{"speaker": "Jon"} ["a"]', ["a"]), ('["a"] ["b"]', ["a"]),
    ('[] and then ["a"]', ["a"]), ('{"facts": []}\n{"facts": ["a"]}', ["a"]), ("[]\n1. a\n2. b", ["a", "b"]),
    ('{"facts": [{"text": "a"}, {"memory": "b"}]}', ["a", "b"]), ('{"memories": [{"content": "a"}]}', ["a"]),
    ('[{"fact": "a", "date": "3 June"}, "b"]', ["a", "b"]), ('{"fact": "a"}\n{"fact": "b"}', ["a", "b"]),
    ('{"Jon": ["a", "b"]}', ["a", "b"]), ('{"data": {"facts": ["a"]}}', ["a"]),
    ("['Jon\\'s a', \"b\"]", ["Jon's a", "b"]), ("['Jon's a', 'b']", ["Jon's a", "b"]),
    ('["a [photo]", "b",]', ["a [photo]", "b"]), ("{'facts': ['a',], }", ["a"]), ('["a" "b"\n"c"]', ["a", "b", "c"]),
    ("Here:\n- a\n* **b**\n• c", ["a", "b", "c"]), ("1) a\n(2) 'b'\n 10. c: d", ["a", "b", "c: d"]),
    ('{"facts": "a"}', ["a"]), ('{"Facts": [{"Fact": "a"}]}', ["a"]), ('{"text": "said", "facts": ["a"]}', ["a"]),
    ('[{"speaker": "Jon", "Statement": "a"}]', ["a"]), ("Fact 1: a\nfact 2. b", ["a", "b"]),
    ('Sure!\n```json\n{"facts": ["a", "b"\n```', ["a", "b"]), ('```\n- a\n- b\n```', ["a", "b"]),
    ('```json\n["a"]\n```', ["a"]), (json.dumps("a [shares a photo]") + ', ["b"]', ["b"])])
def test_facts_that_are_read_whole(completion, facts):
    found = manager.parse_facts(completion)
    assert (found, found.skipped, found.cut) == (facts, 0, 0)


@pytest.mark.parametrize("completion, facts, skipped, cut", [
    ('["a", "b', ["a"], 1, 0), ('{"facts": ["a", "b", "', ["a", "b"], 0, 0), ('["a", "b", {"fa', ["a", "b"], 1, 0),
    ('[{"fact": "a"}, {"fact": "b"}, {"fact": "c', ["a", "b"], 1, 0), ("['a', 'b', 'c", ["a", "b"], 1, 0),
    ('[]\n["a", "b', ["a"], 1, 0), ('["a", 3, null, {}]', ["a"], 2, 0), ("[1, null]", [], 1, 0),
    ("no", [], 1, 0), ("", [], 1, 0),
    ("[see above]", [], 1, 0), ('{"speaker": "Jon"}', [], 1, 0), ('"a"', [], 1, 0), ("[" * 5000 + "]" * 5000, [], 1, 0),
    (json.dumps(["y" * 600, "y" * 500, "y" * 499 + " z"]), ["y" * 500, "y" * 500, "y" * 499], 0, 2),
    (json.dumps(["a"] * 40), ["a"] * 32, 8, 0)])
def test_what_a_list_of_facts_loses_is_counted(completion, facts, skipped, cut):
    found = manager.parse_facts(completion)
    assert (found, found.skipped, found.cut) == (facts, skipped, cut)


def test_case_of_takes_the_speakers_best_over_all_facts():
    bank = filled()
    bank.add("Gina has a dog named Rex.", "Gina", "")
    turn = Turn("D1:1", 1, "Jon", "...", "3 June 2023")
    case = make_case(bank, turn, ("Which car does Jon drive? A Kia car.", "A cat named Tom"), 2)
    assert {memory.text for memory in case.memories} == {CAR, CAT} and case.facts[1] == "A cat named Tom"
    everything = make_case(bank, turn, ("dog",), 9).memories
    assert everything[0].text == DOG and {memory.id for memory in everything} == {40, 42, 47}
    assert make_case(bank, turn, ("dog",), 0).memories == ()
    assert make_case(bank, replace(turn, speaker="Eve"), ("dog",), 4).memories == ()


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


@pytest.mark.parametrize("build, edit_of", [
    (oracle_banks, lambda turn: (turn.operation.event, turn.operation.old_memory, turn.operation.text)),
    (add_all_banks, lambda turn: ("ADD", "", turn.fact)), (noop_banks, lambda turn: ("NOOP", "", ""))])
def test_banks_without_a_model(build, edit_of):
    dialogues = [*synthetic.load("val", count=12, num_turns=30), *ragged()]
    builds = build(dialogues, HASH)
    for one, dialogue in zip(builds, dialogues, strict=True):
        assert [(memory.speaker, memory.text) for memory in one.bank] == replayed(dialogue, edit_of)
        events = [edit_of(turn)[0] for turn in dialogue.turns]
        assert one.ops == {event: events.count(event) for event in set(events)}
        assert one.num_labeled == len(dialogue.turns)
        assert one.num_matching == sum(
            event == turn.operation.event and (event != "ADD" or turn.fact == turn.operation.text)
            for event, turn in zip(events, dialogue.turns, strict=True))
        times = {turn.id: turn.time for turn in dialogue.turns}
        assert all(memory.time in {times[turn] for turn in one.sources[memory.id]} for memory in one.bank)
        assert not one.decisions


def test_the_bank_before_every_turn():
    for dialogue in ragged():
        beginnings = [replace(dialogue, turns=dialogue.turns[:i]) for i in range(len(dialogue.turns))]
        for one, earlier in zip(oracle_banks(beginnings, HASH), beginnings, strict=True):
            assert [(memory.speaker, memory.text) for memory in one.bank] == replayed(
                earlier, lambda turn: (turn.operation.event, turn.operation.old_memory, turn.operation.text))


def by_checksum(messages):
    """A Manager as good as dice, but the same for the same prompt: all events, and outputs that are invalid."""
    text = messages[-1]["content"]
    if messages[0]["content"] == manager.EXTRACTOR:
        return json.dumps([f"{text.splitlines()[1]} ({part})" for part in range(zlib.crc32(text.encode()) % 3)])
    dice, fact = zlib.crc32(text.encode()), text.splitlines()[-2]
    event = ["UPDATE", "DELETE", "NOOP", "none at all", "ADD", "ADD", "ADD", "ADD"][dice % 8]
    return json.dumps([{"event": event, "id": dice // 8 % 2 + 1, "text": fact}])


@pytest.mark.parametrize("extract", [False, True])
@pytest.mark.parametrize("is_tight", [False, True])
def test_lockstep_equals_one_by_one(fake, monkeypatch, extract, is_tight):
    dialogues, policy, dropped, fit = ragged(), fake(by_checksum), [], manager.fit_case
    monkeypatch.setattr(manager, "fit_case", lambda *args: dropped.append((found := fit(*args))[2]) or found)
    words = sum(len(one["content"].split()) for one in messages(CASE)[:-1]) + (60 if extract else 36)
    options = Settings(top_k=3, extract=extract, max_prompt_tokens=words if is_tight else None, max_new_tokens=99)
    together = build_banks(Manager(policy, "manager", options), dialogues, HASH)
    alone = [build_banks(Manager(fake(by_checksum), "manager", options), [dialogue], HASH)[0]
             for dialogue in dialogues]
    for a, b in zip(together, alone, strict=True):
        assert list(a.bank) == list(b.bank)
        assert replace(a, bank=None, outputs=[]) == replace(b, bank=None, outputs=[])
        assert [case for case, *_ in a.outputs] == [case for case, *_ in b.outputs]
        assert not any(manager.fit_case(policy, case, options)[2] for case, prompt, _ in a.outputs if prompt)
        assert [completion and completion.text for *_, completion in a.outputs] == [
            completion and completion.text for *_, completion in b.outputs]
    total = sum((one.ops for one in together), start=type(together[0].ops)())
    assert all(total[event] for event in ("ADD", "UPDATE", "DELETE", "NOOP", "invalid"))
    assert any(dropped) == is_tight
    calls = [call for call in policy.calls if call[0] == "manager"]
    assert {options for *_, options in calls} == {(1, 99, 0)}
    if extract:
        assert policy.calls[0] == (None, 40 + 5 + 20, (1, 99, 0)) and calls == policy.calls[1:]
    else:
        assert [n for _, n, _ in calls] == [3] * 5 + [2] * 15 + [1] * 20


def test_known_operations_on_a_bank_that_lacks_the_entry_or_has_it_twice():
    [dialogue] = synthetic.load("train", count=1, seed=5, num_turns=40)
    late = [turn for turn in dialogue.turns if turn.operation.event in ("UPDATE", "DELETE")][:1]
    [build] = oracle_banks([replace(dialogue, turns=tuple(late))], HASH)
    assert len(build.bank) == 0 and build.ops == {"NOOP": 1} and (build.num_matching, build.num_labeled) == (0, 1)
    said = [("Jon", Operation("ADD", "", "It rains.")), ("Gina", Operation("ADD", "", "It rains.")),
            ("Gina", Operation("DELETE", "It rains."))]
    turns = [Turn(f"D1:{i}", 1, speaker, "", "", "", operation) for i, (speaker, operation) in enumerate(said)]
    [build] = oracle_banks([replace(dialogue, turns=tuple(turns))], HASH)
    assert [memory.speaker for memory in build.bank] == ["Jon"], "an entry is found by speaker and text"


def test_add_all_on_data_without_reference_operations(fake):
    [dialogue] = synthetic.load("train", count=1, seed=5, num_turns=40)
    plain = replace(dialogue, turns=tuple(replace(turn, operation=None, fact="") for turn in dialogue.turns))
    [build] = add_all_banks([plain], HASH)
    assert [memory.text for memory in build.bank] == [turn.text for turn in plain.turns] and build.num_labeled == 0
    extracting = Manager(fake(by_checksum), settings=Settings(extract=True))
    extracting.read_facts([plain])
    [build] = add_all_banks([plain], HASH, extracting.facts)
    facts = [fact for turn in plain.turns for fact in extracting.facts[plain.id, turn.id]]
    assert [memory.text for memory in build.bank] == facts and build.ops == {"ADD": len(facts)}
    assert [] in extracting.facts.values() and len(facts) > 20


def test_facts_known_from_before_are_not_extracted_again(fake):
    policy, dialogues = fake(by_checksum), ragged()
    agent = Manager(policy, "manager", Settings(extract=True, max_prompt_tokens=None))
    first, second = build_banks(agent, dialogues[:2], HASH), build_banks(agent, dialogues, HASH)
    assert [n for role, n, _ in policy.calls if role is None] == [45, 20] and len(agent.facts) == 65
    assert [list(one.bank) for one in second[:2]] == [list(one.bank) for one in first]


def test_the_same_turn_of_another_conversation_has_its_own_facts(fake):
    one, other = synthetic.load("train", count=2, seed=3, num_turns=5)
    agent = Manager(fake(by_checksum), "manager", Settings(extract=True))
    agent.read_facts([one, other])
    assert len(agent.facts) == 10 and len(Manager(None).facts) == 0


def test_no_dialogues(fake):
    assert build_banks(Manager(fake()), [], HASH) == [] == oracle_banks([], HASH)
    agent = Manager(fake(), settings=Settings(extract=True))
    [build] = build_banks(agent, [Dialogue("d", ("a", "b"), (), ())], HASH)
    assert len(build.bank) == 0 and not build.ops and agent.policy.calls == []


def test_a_case_without_facts_is_not_sent_to_the_model(fake):
    policy = fake(lambda messages: '[{"event": "DELETE", "id": 1}]')
    silent, delete = replace(CASE, facts=()), ([Edit("DELETE", 40)], CASE)
    found = [output[:2] for output in Manager(policy, "manager").sample_edits([silent, CASE, silent])]
    assert found == [([Edit("NOOP")], silent), delete, ([Edit("NOOP")], silent)]
    assert policy.calls == [("manager", 1, (1, 80, 0))]


def test_a_report_of_some_banks():
    three = [Edit("ADD", None, text) for text in "abc"]
    builds = [manager.BankBuild(BANK, Counter(ADD=3, invalid=1, NOOP=1), edits=[three, None],
                                outputs=[(CASE, [1], None)] * 2),
              manager.BankBuild(MemoryBank(HASH), ops=Counter(ADD=1, skipped=1, unread_facts=2, cut_texts=3),
                                num_matching=1, num_labeled=4)]
    report = bank_report(builds)
    ops = {"ADD": 4, "invalid": 1, "NOOP": 1, "skipped": 1, "unread_facts": 2, "cut_texts": 3}
    assert report == {"bank_size": 3 / 2, "ops": ops, "agreement": 1 / 4,
                      "unread_facts": 2, "cut_texts": 3,
                      "invalid_rate": 1 / 2}, "one of two completions; the turn without facts had none"
    assert bank_report(builds[:1])["agreement"] is None


def test_what_is_lost_while_a_bank_is_built_is_counted(fake):
    """Per turn: facts unread 1, 0, 1, 0; texts cut 0, 1 + 1, 0, 0; operations skipped 0, 2, -, 0. Turn 3 is invalid."""
    long = "Jon " + "x" * 600
    replies = {"said 0": ('["Jon ran.", "Jon a', [{"event": "ADD", "text": "Jon ran."}]),
               "said 1": (json.dumps([long]), [{"event": "ADD", "text": long}, {"event": "DELETE", "id": 7}, "no"]),
               "said 2": ('["Jon sat.", 3]', [{"event": "MERGE"}]), "said 3": ("[]", [])}
    said = {"Jon ran.": replies["said 0"][1], long[:500]: replies["said 1"][1], "Jon sat.": replies["said 2"][1]}

    def rule(messages):
        system, *_, last = [message["content"] for message in messages]
        if system == manager.EXTRACTOR:
            return replies[last.splitlines()[1]][0]
        return json.dumps(said[last.splitlines()[-2].removeprefix("- ")])

    turns = tuple(Turn(f"D1:{i}", 1, "Jon", text, "") for i, text in enumerate(replies))
    talk, agent = Dialogue("d", ("Jon", "Gina"), turns, ()), Manager(fake(rule), settings=Settings(extract=True))
    [build] = build_banks(agent, [talk], HASH)
    assert build.ops == {"ADD": 2, "NOOP": 1, "invalid": 1, "skipped": 2, "unread_facts": 2, "cut_texts": 2}
    [stored] = add_all_banks([talk], HASH, agent.facts)
    assert stored.ops == {"ADD": 3, "unread_facts": 2, "cut_texts": 1}
    [raw] = add_all_banks([replace(talk, turns=(replace(turns[0], text=long), turns[1]))], HASH)
    assert raw.ops == {"ADD": 2, "cut_texts": 1} and [len(memory.text) for memory in raw.bank] == [500, 6]
