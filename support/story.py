"""
One page that shows what training changed: a held-out conversation, the memory bank after each turn, and the questions,
for two systems side by side. The page is one file without network access, and can be read without JavaScript.

    python -m support.story runs/manager-grpo                 # writes runs/manager-grpo/story.html
    python -m support.story runs/answer-grpo --dialogue test-seen-1-100-3
    python -m support.story runs/2x2.json --systems "base + base" "manager-grpo + answer-grpo"

The page shows records that training and evaluate.py have written (support/held_out.py); nothing is generated here.
story.css and story.js are copied into it. The script replays the edits in the table of turns to show a bank.
"""
import base64
import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from data import UsageError
from support import held_out
from support.cli import Parser, exit_cleanly
from support.held_out import Pair
from support.run import disk_errors, write_file

MAX_BYTES = 1_000_000
MAX_CHARS = (2_000, 500, 300, 200, 150, 100, 50, 20)  # length of texts: the first that keeps the page below MAX_BYTES
MAX_RETRIEVED = 3_000  # a page with more retrieved memories quotes only the selected ones
LEGEND = {"add": "added", "update": "rewritten", "delete": "deleted", "invalid": "invalid output"}  # signs: story.css


def clean(value, limit: int):
    """A record with strings cut to `limit` characters, and "\\ufffd" for control characters and lone surrogates."""
    if isinstance(value, dict):
        return {key: clean(one, limit) for key, one in value.items()}
    if isinstance(value, list):
        return [clean(one, limit) for one in value]
    if not isinstance(value, str):
        return value
    shown = "".join(char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else "\ufffd"
                    for char in value[:limit])
    return shown + " \u2026" * (len(value) > limit)


def tag(name: str, /, *children: str | Element, **attributes) -> Element:
    """An HTML element. ElementTree escapes all strings: tag("p", "a < b", class_="x") is <p class="x">a &lt; b</p>."""
    element = Element(name, {key.strip("_").replace("_", "-"): str(value) for key, value in attributes.items()})
    for child in children:
        if not isinstance(child, str):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element


def table(heads: Sequence[str], rows: Sequence[Element], **attributes) -> Element:
    return tag("table", tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads))), tag("tbody", *rows),
               **attributes)


def change_item(change: dict) -> Element:
    """One edit: its name, the id of its memory, the old text struck out, the new text."""
    texts = [tag(name, text) for name, text in (("del", change["old"]), ("ins", change["text"])) if text]
    if len(texts) == 2:
        texts.insert(1, " \u2192 ")
    target = {"data_id": change["id"]} if change.get("id") is not None else {}
    return tag("li", tag("i", change["event"]), " ", *texts, class_=change["event"].lower(), **target)


def edits_cell(source: str, changes: Sequence[dict] | None, turn: dict) -> Element:
    """
    The changes of a bank in a turn; its output if this was invalid, or if operations in it could not be applied;
    whether the changes are the reference operation.
    """
    items, skipped = [change_item(one) for one in changes or ()], turn.get("skipped", 0)
    if changes is None or skipped:
        lost = "invalid output" if changes is None else f"{skipped} of the operations could not be applied"
        items.append(tag("li", tag("i", lost), tag("pre", turn.get("output") or "(empty)"), class_="invalid"))
    cell = tag("td", tag("ul", *items), class_="edits", data_of=source)
    if turn["known"]:
        is_same = held_out.is_reference(changes, turn["known"])
        verdict, kind = ("= the reference", "right") if is_same else ("\u2260 the reference", "wrong")
        cell.append(tag("p", verdict, class_=kind))
    return cell


def turn_row(number: int, turn: dict, cells: Sequence[Element]) -> Element:
    said = tag("td", tag("p", tag("b", turn["speaker"]), " ", tag("time", turn["time"])), tag("p", turn["text"]),
               class_="said")
    if (facts := turn.get("facts", [])) not in ([], [turn["text"]]):
        said.append(tag("ul", *(tag("li", fact) for fact in facts), class_="facts"))
    if known := turn["known"]:
        said.append(tag("ul", change_item({**known, "old": known["old_memory"]}), class_="known"))
    link = tag("a", str(number), href=f"#turn-{number}")
    return tag("tr", tag("th", link, scope="row"), said, *cells, id=f"turn-{number}")


def bank_panel(source: str, bank: dict[int, dict]) -> Element:
    """The bank after the last turn. story.js replaces the list when it shows another turn."""
    items = [tag("li", tag("ins", memory["text"]), " ", tag("time", memory["time"]), value=id)
             for id, memory in sorted(bank.items())]
    return tag("section", tag("h3", f"{source}: ", tag("span", str(len(bank)), class_="size"), " memories"),
               tag("div", class_="now"), tag("ol", *items, class_="memories"), class_="bank", data_of=source)


def view(turns: dict[str, list[dict]], replayed: dict[str, tuple]) -> Element:
    """The conversation, with the changes of each bank in each turn, and the banks. `turns`, `replayed` by source."""
    columns = [[edits_cell(source, changes, turn) for changes, turn in zip(replayed[source][0], own, strict=True)]
               for source, own in turns.items()]
    rows = [turn_row(i, turn, cells) for i, (turn, cells) in
            enumerate(zip(next(iter(turns.values())), zip(*columns, strict=True), strict=True), 1)]
    panels = [bank_panel(source, bank) for source, (_, bank) in replayed.items()]
    talk = tag("section", tag("h2", "Conversation"), tag("div", table(("turn", "said", *turns), rows), id="talk"))
    shown = tag("section", tag("h2", "Memory bank ", tag("span", "after the last turn", id="when")),
                tag("div", id="now"), tag("div", *panels, class_="panels"), id="banks")
    return tag("div", talk, shown, id="view")


def controls(num_turns: int) -> Element:
    return tag("nav", tag("button", "\u25c0", id="back", aria_label="previous turn"),
               tag("input", id="slider", type="range", min=1, max=num_turns, aria_label="turn"),
               tag("button", "\u25b6", id="forward", aria_label="next turn"), tag("output", id="where"),
               id="steps", aria_label="turns of the conversation", hidden="")


def answer_cell(system: str, question: dict, bank: dict[int, dict], quotes_all: bool) -> Element:
    """An answer, whether it is right, the raw output if it was invalid, and the retrieved memories."""
    is_right, found = question["em"] == 1, held_out.memories_of(question, bank)
    verdict = "\u2713 right" if is_right else f"\u2717 wrong, F1 {question['f1']:.2f}"
    cell = tag("td", tag("p", tag("b", question["answer"] or "(no answer)"), " ",
                         tag("span", verdict, class_="right" if is_right else "wrong")), data_of=system)
    if not question.get("is_valid", True):
        cell.append(tag("pre", question.get("output") or "(empty)"))
    items = [tag("li", text, value=id, **{"class_": "selected"} if chosen else {})
             for id, text, chosen in found if quotes_all or chosen]
    cell.append(tag("ol", *items, class_="retrieved"))
    if others := [str(id) for id, _, chosen in found if not chosen and not quotes_all]:
        numbers = " ".join(others) if len(found) < len(bank) else "all others"
        cell.append(tag("p", f"also retrieved: {numbers}", class_="others"))
    return cell


def question_section(records: dict[str, dict], banks: dict[str, dict]) -> Element:
    """The questions with both systems' answers. `records` by system, `banks` by source."""
    questions = {system: record["questions"] for system, record in records.items()}
    count = sum(len(question.get("retrieved", ())) for own in questions.values() for question in own)
    columns = [[answer_cell(system, question, banks[records[system]["source"]], count <= MAX_RETRIEVED)
                for question in own] for system, own in questions.items()]
    asked = [tag("th", tag("p", question["text"]), tag("p", "gold: ", tag("b", question["gold"])), scope="row")
             for question in next(iter(questions.values()))]
    rows = [tag("tr", *cells) for cells in zip(asked, *columns, strict=True)]
    return tag("section", tag("h2", "Questions after the last turn"),
               tag("p", "Right: exact match with the gold answer. Below an answer are the retrieved memories, with "
                   "their number in the bank, and * if the Answer Agent selected them."),
               table(("question", *questions), rows), id="questions")


def summary(pair: Pair, dialogue: str, banks: dict[str, dict]) -> Element:
    """The scores of both systems. `banks` by source."""
    rows = []
    for system, records in pair.systems.items():
        scores = [question["em"] == 1 for question in records[dialogue]["questions"]]
        size = str(len(banks[records[dialogue]["source"]])) if records[dialogue]["turns"] else "not recorded"
        cells = (f"{sum(scores)} of {len(scores)}", size,
                 *(f"{held_out.mean_score(records.values(), metric):.3f}" for metric in ("em", "f1")))
        rows.append(tag("tr", tag("th", system, scope="row"), *(tag("td", cell) for cell in cells)))
    return table(("", "right here", "memories", "EM", "F1"), rows, id="summary")


def page_body(pair: Pair, dialogue: str, note: str) -> Element:
    records = {system: own[dialogue] for system, own in pair.systems.items()}
    turns = {record["source"]: record["turns"] for record in records.values()}  # one, if both systems share a bank
    replayed = {source: held_out.replay(own) for source, own in turns.items()}
    banks = {source: bank for source, (_, bank) in replayed.items()}
    first = next(iter(records.values()))
    turns_said = f": {' and '.join(first['speakers'])}, {len(first['turns'])} turns" if first["turns"] else ""
    about = f"Conversation {dialogue}{turns_said}. {note}"
    legend = tag("ul", *(tag("li", word, class_=event) for event, word in LEGEND.items()), id="legend")
    parts = [controls(len(first["turns"])), view(turns, replayed)] if first["turns"] else []
    return tag("body", tag("header", tag("h1", pair.title), tag("p", about), summary(pair, dialogue, banks), legend),
               tag("main", *parts, question_section(records, banks)))


def render(pair: Pair, dialogue: str, note: str) -> bytes:
    """The HTML of a page. Its content security policy allows its own style and script, and nothing else."""
    style, script = ((Path(__file__).parent / file).read_text(encoding="utf-8") for file in ("story.css", "story.js"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'".format(*hashes)
    head = tag("head", tag("meta", charset="utf-8"), tag("title", pair.title),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("meta", http_equiv="Content-Security-Policy", content=policy), tag("style", style))
    body = page_body(pair, dialogue, note)
    body.append(tag("script", script))
    html = ElementTree.tostring(tag("html", head, body, lang="en"), encoding="unicode", method="html")
    return f"<!DOCTYPE html>\n{html}\n".encode()


def make_page(pair: Pair, dialogue: str, note: str) -> bytes:
    """`render` with texts as long as MAX_BYTES permits."""
    for limit in MAX_CHARS:
        systems = {system: {**own, dialogue: clean(own[dialogue], limit)} for system, own in pair.systems.items()}
        cut = f" Texts are cut after {limit} characters." if limit < MAX_CHARS[0] else ""
        page = render(Pair(pair.title, systems), dialogue, note + cut)
        if len(page) < MAX_BYTES:
            return page
    raise UsageError(f"--dialogue {dialogue}: the page would have {len(page) / 1e6:.1f} MB; choose a shorter one")


def read_pair(path: str, names: Sequence[str], dialogue: str | None) -> tuple[Pair, str, str]:
    """The two systems, the conversation to show, and a note on it."""
    if names and names[0] == names[1]:
        raise UsageError(f"--systems {' '.join(names)}: give two different ones")
    read = held_out.read_run if Path(path).is_dir() else held_out.read_evaluation
    pair = read(path, names)
    known = next(iter(pair.systems.values()))
    if dialogue and dialogue not in known:
        raise UsageError(f"--dialogue {dialogue}: {path} has {', '.join(known)}")
    choice = "" if dialogue or len(known) == 1 else "Its gain in exact match (EM) is the closest to the mean gain. "
    note = f"{choice}EM and F1 are means over all {len(known)} conversations."
    return pair, dialogue or held_out.typical_dialogue(pair), note


def main(argv=None) -> None:
    parser = Parser(prog="-m support.story", usage="python -m support.story RUN [flags]",
                    description="Write a page that shows two systems on a held-out conversation, turn by turn.")
    parser.add_argument("run", metavar="RUN", help="folder of a run, or FILE.json of evaluate.py --out")
    parser.add_argument("--dialogue", metavar="ID", help="conversation (one whose gain is close to the mean gain)")
    parser.add_argument("--systems", nargs=2, metavar="NAME", default=(), help="two evaluations of a run, such as "
                        "oracle (untrained trained), or two systems of FILE.json (the first and the last)")
    parser.add_argument("--out", metavar="FILE.html", help="the page (RUN/story.html, or FILE.html)")
    args = parser.parse_args(argv)
    run = Path(args.run)
    path = Path(args.out or (run / "story.html" if run.is_dir() else run.with_suffix(".html")))
    try:
        pair, dialogue, note = read_pair(args.run, args.systems, args.dialogue)
        page = make_page(pair, dialogue, note)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{args.run}: its conversations cannot be read ({error!r}): run it again") from None
    with disk_errors(path.parent):
        write_file(path, page)
    print(f"conversation {dialogue} is in {path} ({len(page) / 1e3:.0f} kB)")


if __name__ == "__main__":
    exit_cleanly(main, resume_hint="nothing is lost")
