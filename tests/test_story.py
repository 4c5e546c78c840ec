"""Records of held-out conversations, and the page that shows them; in a real browser where there is one."""
import html
import html.parser
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import Browser, missing

import answer
import data
import evaluate
import manager
import train_answer
import train_manager
from data import UsageError
from manager import Case, Edit
from memory import make_embedder
from policy import Completion
from support import held_out, story
from support.run import Run, append_rows, read_rows

HOSTILE = ("<script>window.hit = 1</script>", '" onmouseover="window.hit = 1', "</td></table><b>x", "</script>",
           "<img src=x onerror='window.hit=1'>", "\u202ereversed", "a\x00b", "lone \ud800", "]]> -->", "&lt;b&gt; ${1}")
QUICK = "--steps 1 --batch-size 4 --group-size 2 --minibatch 4 --eval 2".split()
EMBEDDER = make_embedder("hash")


# ------------------------------------------------------------------------------------------------ random builds

def random_builds(dialogues, seed):
    """Builds with random edits, one in seven turns invalid; (id, text) of the bank after every turn, by dialogue."""
    rng, history = random.Random(seed), {dialogue.id: [] for dialogue in dialogues}

    def decide(batch):
        return [decide_one(*one) for one in batch]

    def decide_one(build, dialogue, turn):
        if dialogue.turns[0] is not turn:
            history[dialogue.id].append([(memory.id, memory.text) for memory in build.bank])
        ids = [memory.id for memory in build.bank]
        edits = [Edit("ADD", None, f"{turn.text} {rng.choice(HOSTILE)}") for _ in range(rng.randrange(3))]
        edits += [Edit("UPDATE", id, f"{rng.choice(HOSTILE)} again") if rng.random() < 0.6 else Edit("DELETE", id)
                  for id in rng.sample(ids, min(len(ids), rng.randrange(3)))]
        rng.shuffle(edits)
        is_valid = rng.random() > 1 / 7
        build.outputs.append((Case(turn.speaker, turn.time, (turn.text, HOSTILE[0]), ()), [1],
                              Completion([1], [0.0], True, f"{HOSTILE[2]} {HOSTILE[0]}")))
        return (edits or [Edit("NOOP")]) if is_valid else None

    builds = manager.build_in_lockstep(dialogues, EMBEDDER, decide)
    for dialogue, build in zip(dialogues, builds, strict=True):
        history[dialogue.id].append([(memory.id, memory.text) for memory in build.bank])
    return builds, history


def random_answers(dialogues, builds, seed):
    """An AnswerPrompt and an Answer for every final question; some are invalid, some selections do not exist."""
    rng = random.Random(seed)
    for dialogue, build in zip(dialogues, builds, strict=True):
        for question in dialogue.final_questions():
            shown = rng.sample(list(build.bank), min(len(build.bank), 3))
            text = rng.choice([question.answer, "", *HOSTILE])
            yield answer.AnswerPrompt([], shown, 0), answer.Answer(text, (1, 3, 99), bool(text), HOSTILE[0])


def write_run(folder, pairs, agent="manager"):
    """A run's folder with records of random builds: {evaluation: (dialogues, builds)}."""
    Path(folder, "config.json").write_text(json.dumps({"agent": agent, "algo": "grpo", "steps": 3}))
    for name, (dialogues, builds) in pairs.items():
        records = held_out.held_out_records(dialogues, builds, random_answers(dialogues, builds, name), answer.REWARDS)
        append_rows(Path(folder, "held_out.jsonl"), [{"step": 0, "eval": name, **record} for record in records])
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of random builds, its banks after every turn, and its page."""
    dialogues = data.load("synthetic", "test", count=3, seed=5)
    turns = tuple(replace(turn, text=f"{HOSTILE[i % len(HOSTILE)]} said {turn.id}") for i, turn in
                  enumerate(dialogues[0].turns))
    dialogues[0] = replace(dialogues[0], turns=turns, speakers=(HOSTILE[0], HOSTILE[1]))
    untrained, trained = random_builds(dialogues, 0), random_builds(dialogues, 1)
    folder = write_run(tmp_path_factory.mktemp("run"), {"untrained": (dialogues, untrained[0]),
                                                        "trained": (dialogues, trained[0])})
    story.main([folder, "--dialogue", dialogues[0].id])
    return SimpleNamespace(folder=folder, page=Path(folder, "story.html"), dialogue=dialogues[0],
                           banks=[untrained[1][dialogues[0].id], trained[1][dialogues[0].id]])


# ------------------------------------------------------------------------------------------------ records

def test_a_record_replays_to_the_same_bank_after_every_turn(made):
    for name, own in held_out.read_run(made.folder).systems.items():
        record, banks = own[made.dialogue.id], made.banks[name == "trained"]
        assert any(turn["edits"] is None for turn in record["turns"])
        for i, bank in enumerate(banks):
            _, replayed = held_out.replay(record["turns"][:i + 1])
            expected = [(id, text.encode("utf-8", "replace").decode()) for id, text in bank]
            assert sorted((id, memory["text"]) for id, memory in replayed.items()) == expected


SKIPPED = [("ADD", 0), ("ADD UPDATE", 1), ("UPDATE DELETE ADD nonsense", 3), ("nonsense", None)]  # number skipped


@pytest.mark.parametrize("events, skipped", SKIPPED)
def test_operations_that_were_skipped_are_shown_with_the_others_of_their_turn(fake, tmp_path, events, skipped):
    """The bank is empty, so only ADD can be applied."""
    dialogues = data.load("synthetic", "test", count=1, num_turns=1)
    output = json.dumps([{"event": event, "id": 1, "text": "a < b"} for event in events.split()])
    builds = manager.build_banks(manager.Manager(fake(lambda chat: output)), dialogues, EMBEDDER)
    story.main([write_run(tmp_path, {"untrained": (dialogues, builds), "trained": (dialogues, builds)}, "answer")])
    page = html.unescape((tmp_path / "story.html").read_text())
    [cell] = re.findall('<td class="edits".*?</td>', page, re.DOTALL)
    assert cell.count('<li class="add"') == ("ADD" in events) and cell.count('<li class="noop"') == 0
    words = {0: [], None: ["invalid output"]}.get(skipped, [f"{skipped} of the operations could not be applied"])
    assert re.findall('<li class="invalid"><i>(.*?)</i>', cell) == words and (output in cell) == bool(words)
    assert manager.bank_report(builds)["ops"].get("skipped", 0) == (skipped or 0)


def test_changes_by_hand():
    events = [[Edit("ADD", None, "a")], None, [Edit("UPDATE", 0, "b"), Edit("ADD", None, "c")],
              [Edit("DELETE", 0), Edit("NOOP")]]
    steps, bank = held_out.replay([{"time": f"{i} May", "edits": edits and [vars(edit) for edit in edits]}
                                   for i, edits in enumerate(events, 1)])
    assert [one and [(change["event"], change["id"], change["old"]) for change in one] for one in steps] == [
        [("ADD", 0, "")], None, [("UPDATE", 0, "a"), ("ADD", 1, "")], [("DELETE", 0, "b"), ("NOOP", None, "")]]
    assert bank == {1: {"text": "c", "time": "3 May"}}
    known = {"event": "ADD", "old_memory": "", "text": "a"}
    assert held_out.is_reference(steps[0], known) and not any(held_out.is_reference(one, known) for one in steps[1:])
    question = {"selected": ["c"], "retrieved": [0, 1]}  # 0 is gone: a file that does not belong to the bank
    assert held_out.memories_of(question, bank) == [(1, "c", True)]
    assert held_out.memories_of({"selected": ["x", 1]}, bank) == [(0, "x", True)]


def check_against_metrics(folder, agent, names):
    """The records of a run give the numbers that its metrics.jsonl has."""
    metrics = {row["eval"]: row for row in read_rows(Path(folder, "metrics.jsonl")) if "eval" in row}
    rows = read_rows(Path(folder, "held_out.jsonl"))
    assert {row["eval"] for row in rows} == set(names) == set(metrics) and "dialogues" not in metrics["trained"]
    for name, expected in metrics.items():
        records = [row for row in rows if row["eval"] == name]
        replayed = [held_out.replay(record["turns"]) for record in records]
        questions = [question for record in records for question in record["questions"]]
        assert len(records) == 2 and len(questions) == expected["n"]
        for metric in ("em", "f1"):
            assert held_out.mean_score(records, metric) == pytest.approx(expected[metric], rel=1e-5)
        assert sum(len(bank) for _, bank in replayed) / 2 == expected["bank_size"]
        steps = [changes for own, _ in replayed for changes in own]
        turns = [turn for record in records for turn in record["turns"]]
        same = [held_out.is_reference(changes, turn["known"]) for changes, turn in zip(steps, turns, strict=True)]
        assert sum(same) / len(same) == pytest.approx(expected["agreement"], rel=1e-5)
        if agent == "answer":
            for key, metric in (("retrieved", "shown"), ("selected", "selected")):
                assert sum(len(one[key]) for one in questions) / len(questions) == pytest.approx(expected[metric])
    return rows


def test_the_managers_training_records_what_its_metrics_count(tmp_path, capsys):
    out = str(tmp_path / "run")
    train_manager.main([*QUICK, "--out", out])
    rows = check_against_metrics(out, "manager", ["untrained", "add-all", "noop", "oracle", "trained"])
    read = [turn for row in rows for turn in row["turns"] if row["eval"] == "trained"]
    assert all(turn["facts"] == [turn["text"]] and turn["output"] for turn in read) and any(
        turn["related"] for turn in read)
    case = manager.Case("", "", (), ())
    assert all(turn["edits"] == [{"event": "NOOP", "id": None, "text": ""}] for turn in read
               if manager.parse(turn["output"], case) == [Edit("NOOP")])
    story.main([out])
    story.main([out, "--systems", "oracle", "trained", "--out", str(tmp_path / "other.html")])
    assert "oracle and trained" in (tmp_path / "other.html").read_text()
    assert "untrained and trained" in Path(out, "story.html").read_text()


def test_a_page_of_the_answer_agent_has_one_bank(tmp_path, monkeypatch):
    monkeypatch.setattr(train_answer, "NUM_TURNS", 10)
    monkeypatch.setattr(train_answer, "NUM_DIALOGUES", 1)
    out = str(tmp_path / "run")
    train_answer.main([*QUICK, "--max-new-tokens", "60", "--out", out])
    check_against_metrics(out, "answer", ["untrained", "trained"])
    story.main([out])
    page = Path(out, "story.html").read_text()
    assert page.count('class="bank"') == 1 and "bank of the base model" in page and "Answer Agent, GRPO" in page


def test_a_page_of_an_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluate.main("--system rag none oracle --limit 14 --at-once 4 --out x.json".split())
    banks = {(row["source"], row["dialogue"]): row for row in read_rows("x.banks.jsonl")}
    pair = held_out.read_evaluation("x.json", ["rag", "oracle"])
    dialogues = {one.id: one for one in data.load("synthetic", "test", count=32, seed=1)}
    for (source, name), record in banks.items():
        _, bank = held_out.replay(record["turns"])
        [expected] = evaluate.BUILDERS[source]([dialogues[name]], EMBEDDER)
        assert [memory["text"] for _, memory in sorted(bank.items())] == [memory.text for memory in expected.bank]
        if source != "none":
            for question in pair.systems[source][name]["questions"]:
                found = held_out.memories_of(question, bank)
                assert len(found) == question["shown"]
                assert {text for _, text, chosen in found if chosen} == {*question["selected"]}
    story.main(["x.json", "--systems", "rag", "oracle"])
    assert Path("x.html").read_text().count('class="bank"') == 2
    Path("x.banks.jsonl").unlink()  # an evaluation by an earlier version: questions without the conversation
    story.main(["x.json", "--dialogue", "test-seen-1-0"])
    page = Path("x.html").read_text()
    assert "rag and oracle" in page and 'class="bank"' not in page and page.count("gold: ") > 8


def test_a_resumed_run_drops_later_records_and_counts_repeated_ones_once(tmp_path):
    run = Run(tmp_path, {"agent": "manager", "algo": "grpo", "steps": 2})
    run.save(1, {})
    for step in (0, 2):
        run.report([{"step": step, "eval": ("untrained", "trained")[step // 2], "dialogues": [
            {"dialogue": "d", "questions": [{"em": step / 2}], "turns": []}]}])
    resumed = Run(tmp_path, {"agent": "manager", "algo": "grpo", "steps": 2}, resume=True)
    assert [row["step"] for row in read_rows(tmp_path / "held_out.jsonl")] == [0]
    for em in (0.25, 0.75):
        resumed.report([{"step": 2, "eval": "trained", "dialogues": [{"dialogue": "d", "questions": [{"em": em}]}]}])
    assert held_out.read_run(tmp_path).systems["trained"]["d"]["questions"] == [{"em": 0.75}]
    Run(tmp_path, {"agent": "manager", "algo": "grpo"}, overwrite=True)
    assert not (tmp_path / "held_out.jsonl").exists()
    Run(tmp_path, {"agent": "joint", "algo": "grpo"}, overwrite=True)
    with pytest.raises(UsageError, match="has trained both agents: give FILE.json"):
        held_out.read_run(tmp_path)


def test_the_conversation_shown_is_the_typical_one():
    def records(*scores):
        return {f"d{i}": {"questions": [{"em": em}]} for i, em in enumerate(scores)}
    pair = held_out.Pair("", {"a": records(0, 0, 1), "b": records(1, 0, 1)})  # gains 1, 0, 0: the mean is 1/3
    assert held_out.typical_dialogue(pair) == "d1"
    assert held_out.typical_dialogue(held_out.Pair("", {"a": records(0, 0, 0), "b": records(1, 1, 0)})) == "d0"


# ------------------------------------------------------------------------------------------------ the page

class Texts(html.parser.HTMLParser):
    """The tags and attributes of a page, and its texts outside of style and script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.attributes = [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, text):
        if self.tags and self.tags[-1] not in ("style", "script"):
            self.texts.append(text)


def test_every_text_is_escaped_and_the_page_needs_nothing_else(made):
    page = made.page.read_text()
    found = Texts(page)
    assert found.tags.count("script") == found.tags.count("style") == 1 and "img" not in found.tags
    assert not {"onmouseover", "onerror", "src", "style", "onclick"} & found.attributes
    assert not re.search(r"https?://|url\(|@import|fetch\(|innerHTML|\x00|\u2028", page)
    shown = "".join(found.texts)
    for text in HOSTILE:
        assert text.replace("\x00", "\ufffd").replace("\ud800", "?") in shown, text
    assert made.page.stat().st_size < story.MAX_BYTES


@pytest.mark.parametrize("num_turns, length", [(700, 150), (300, 3000)])
def test_a_long_conversation_stays_below_a_megabyte(tmp_path, num_turns, length):
    [dialogue] = data.load("synthetic", "test", count=1, num_turns=100)
    questions = dialogue.final_questions() * 4
    turns = tuple(replace(dialogue.turns[i % 100], id=str(i), text=f"{i} {'word ' * (length // 5)}")
                  for i in range(num_turns))
    dialogue = replace(dialogue, turns=turns, questions=tuple(questions))
    builds = manager.turn_banks([dialogue], EMBEDDER)
    prompt = answer.AnswerPrompt([], list(builds[0].bank)[:60], 0)
    answers = [(prompt, answer.Answer("x", (1,), True))] * len(questions)
    records = held_out.held_out_records([dialogue], builds, answers, answer.REWARDS)
    pair = held_out.Pair("t", {name: {dialogue.id: {**records[0], "source": name}} for name in "ab"})
    page = story.make_page(pair, dialogue.id, "")
    assert 200_000 < len(page) < story.MAX_BYTES and page.count(b'id="turn-') == num_turns
    assert min(map(int, re.findall(rb"Texts are cut after (\d+)", page)), default=2000) >= 100
    assert page.count(b"also retrieved: 1 2 3") == 2 * len(questions)


@pytest.mark.parametrize("flags, message", [
    (["missing"], "missing has no answers"), (["x.json"], "x.json has no answers"),
    (["."], "not a run's folder"), (["run", "--dialogue", "d9"], "--dialogue d9: run has test-"),
    (["run", "--systems", "untrained", "ppo"], "no held-out conversations of ppo; it has untrained"),
    (["run", "--systems", "trained", "trained"], "--systems trained trained: give two different ones"),
    (["half"], "half has no held-out conversations of trained; it has untrained: finish"),
    (["damaged"], "damaged: its conversations cannot be read")])
def test_errors_are_one_line(made, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(made.folder)
    rows = read_rows("run/held_out.jsonl")
    damaged = [{**row, "turns": [{"edits": [{"event": "UPDATE"}]}]} for row in rows]
    for name, kept in (("half", rows[:3]), ("damaged", damaged)):
        Path(name).mkdir()
        Path(name, "config.json").write_text(Path("run/config.json").read_text())
        append_rows(Path(name, "held_out.jsonl"), kept)
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        story.main(flags)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ the browser

@pytest.fixture(scope="module")
def browser():
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}: apt install chromium chromium-driver")
    browser = Browser()
    yield browser
    browser.close()


BANKS = """return [...document.querySelectorAll(".bank")].map(bank => [...bank.querySelectorAll(".memories li")]
    .filter(item => item.className !== "delete")
    .map(item => [item.value, item.querySelector("ins").textContent]))"""


def stored(bank):
    return [[id, story.clean(text.encode("utf-8", "replace").decode(), 2000)] for id, text in bank]


def test_the_keyboard_steps_through_all_turns(made, browser):
    browser.show(made.page.as_uri())
    num_turns = len(made.dialogue.turns)
    systems = held_out.read_run(made.folder).systems.values()
    steps = [held_out.replay(own[made.dialogue.id]["turns"])[0] for own in systems]
    for i in range(num_turns):
        said = browser.run("return document.getElementById('where').textContent")
        assert said.startswith(f"turn {i + 1} of {num_turns}") and f"said {made.dialogue.turns[i].id}" in said
        assert browser.run(BANKS) == [stored(banks[i]) for banks in made.banks], i
        assert browser.run("return document.querySelectorAll('[aria-current]')[0].rowIndex") == i + 1
        marked = browser.run("return document.querySelectorAll('.memories :is(.add, .update, .delete)').length")
        assert marked == sum(change["event"] != "NOOP" for own in steps for change in own[i] or ())
        browser.press("right")
    browser.press("right")  # stays at the last turn
    browser.press("left", times=3)
    assert browser.run(BANKS) == [stored(banks[num_turns - 4]) for banks in made.banks]
    browser.run("document.getElementById('slider').focus()")
    browser.press("home")
    assert browser.run(BANKS) == [stored(banks[0]) for banks in made.banks]
    browser.run("document.getElementById('forward').click()")
    assert browser.run(BANKS) == [stored(banks[1]) for banks in made.banks]
    assert browser.run("return window.hit === undefined && document.querySelectorAll('script, img').length === 1")
    assert browser.console() == []


def test_without_scripts_all_edits_and_the_last_bank_are_there(made, browser):
    browser.show(made.page.as_uri(), scripts=False)
    assert browser.run(BANKS) == [stored(banks[-1]) for banks in made.banks]
    assert browser.run("return document.getElementById('steps').hidden")
    assert browser.run("return [...document.querySelectorAll('.edits li')].every(item => item.checkVisibility())")
    assert browser.console() == []


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_and_texts_have_contrast(made, browser, width, scheme):
    for scripts in (True, False):
        browser.show(made.page.as_uri(), width=width, scheme=scheme, scripts=scripts)
        assert browser.run("return document.documentElement.scrollWidth") <= width
    low = browser.run("""
        const rgb = color => color.match(/[\\d.]+/g).map(Number);
        const light = color => rgb(color).slice(0, 3).map(c => c / 255)
            .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const back = e => { const color = e ? getComputedStyle(e).backgroundColor : "rgb(255, 255, 255)";
                            return rgb(color)[3] === 0 ? back(e.parentElement) : color; };
        return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && [...e.childNodes].some(
            n => n.nodeType === 3 && n.textContent.trim())).map(e => {
                const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
                return [(a + 0.05) / (b + 0.05), e.className || e.tagName]; }).filter(([ratio]) => ratio < 4.5)""")
    assert low == []  # WCAG 2: 4.5 to 1


def test_it_prints_all_turns(made, browser):
    browser.show(made.page.as_uri())
    browser.devtools("Emulation.setEmulatedMedia", media="print")
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.run(BANKS) == [stored(banks[-1]) for banks in made.banks]
    assert browser.run("return [...document.querySelectorAll('#talk .edits li')].every(item => item.checkVisibility())")
    assert not browser.run("return document.getElementById('steps').checkVisibility()")
    browser.devtools("Emulation.setEmulatedMedia", media="")
    browser.run("window.dispatchEvent(new Event('afterprint'))")
    assert browser.run(BANKS) == [stored(banks[0]) for banks in made.banks]
