"""
The Answer Agent of Memory-R1 (arXiv 2508.19828, Alg. 4): it retrieves memories for a question, selects the relevant
ones (memory distillation) and answers, all in one completion.

    prompt of the tiny model                              completion      of a real model
    question: Which car does Jon drive?                   1 none          {"relevant": [2], "answer": "Kia"}
    memories of Jon:                                      2 Kia
    1 (8 May 2023) Jon has a dog named Buddy.             answer: Kia
    2 (3 June 2023) Jon drives a Kia car.
    question: Which car does Jon drive?
    relevant memories, then the answer:

Difference from the paper: a completion gives the numbers of the selected memories; the paper's repeats the memories.
This file also defines the metrics EM, F1 and BLEU-1; support/judge.py asks a language model instead.
"""
import support.installed  # noqa: F401  # isort: skip  names missing packages
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date

from data import TINY, Turn, banks_of, is_tiny
from manager import load_manager, print_safely, read_turn
from memory import Memory, MemoryBank, make_embedder
from support.cli import Parser, exit_cleanly, model_size
from support.prompts import fit_prompt, generate, memory_lines
from support.run import trained_settings
from support.text import (
    MAX_ANSWER_CHARS,
    MAX_OUTPUT_CHARS,
    after_reasoning,
    chat_messages,
    json_values,
    lowered,
    normalize_whitespace,
    sanitize_for_prompt,
)
from support.word_tokens import word_tokens


@dataclass(frozen=True)
class Settings:
    """How the Answer Agent sees a question. The defaults suit the tiny model."""
    memories: int = 20  # half of this number is retrieved from each speaker's bank that is searched
    distill: bool = True  # the completion selects memories before it answers
    named_only: bool = False  # retrieve only memories of the speakers that the question names
    floor: float | None = None  # lowest similarity of a retrieved memory
    max_prompt_tokens: int | None = 1024  # longer prompts lose their least similar memories; None: no limit
    max_new_tokens: int = 200


CHAT = {  # by the model's size; small models answer worse from many memories, and if they have to select first
    "tiny": Settings(4, named_only=True), "small": Settings(8, distill=False, max_prompt_tokens=4096),
    "large": Settings(60, max_prompt_tokens=4096)}

# Prompts of real models, chosen on LoCoMo's val conversation (docs/results.md). They show no example answer,
# because small models repeat it. The tiny model's chat template drops system messages.
SYSTEM = """You answer questions about two people from numbered notes of their conversations. Answer in as few \
words as possible: a name, a thing, a date or a short list. Do not write a sentence."""
END_PLAIN = "Answer in at most six words."
END = """Reply with JSON: the keys "relevant" (a list of the numbers of the notes that matter) and "answer" (at most \
six words)."""

ANSWER = re.compile(r"(?i)(?:\banswer(?: is)?[ \t]*[:：]|<answer>|^#+ *(?:final )?answer *$)\s*(.*)", re.MULTILINE)

# A date or words: "(2023-05-08)", "(8 May 2023)", "(2023/05/20 (Sat))"
IN_PARENTHESES = re.compile(r"\((?=[^()]*(?:[a-zA-Z]|\d{4}))(?:[^()]|\([^()]*\))*\)")


@dataclass(frozen=True)
class Answer:
    text: str  # "" if the completion is invalid
    selected: tuple[int, ...]  # numbers of memories in the prompt
    is_valid: bool
    output: str = ""  # the whole completion, from `generate_answers`


@dataclass(frozen=True)
class AnswerPrompt:
    prompt: list[int]
    shown: list[Memory]  # memory i of the prompt is shown[i - 1]
    dropped: int  # number of retrieved memories that did not fit into the prompt

    def selected_by(self, given: Answer) -> tuple[int, ...]:
        """The numbers that an answer selects, without those of no memory in the prompt."""
        return tuple(i for i in given.selected if 1 <= i <= len(self.shown))


def speakers_asked(question: str, speakers: Sequence[str]) -> tuple[str, ...]:
    """The speakers that a question names, or all if it names none. ("Where is Jon?", ("Jon", "Gina")) -> ("Jon",)"""
    named = [name for name in speakers if re.search(rf"\b{re.escape(name)}\b", question, re.IGNORECASE)]
    return tuple(named or speakers)


def banks_searched(question: str, speakers: Sequence[str], named_only: bool) -> tuple[str | None, ...]:
    """The speakers whose memories are searched; None for all of a bank."""
    return banks_of(speakers_asked(question, speakers) if named_only else speakers)


def retrieve(bank: MemoryBank, question: str, speakers: Sequence[str], k: int, named_only: bool = False,
             floor: float | None = None) -> list[tuple[Memory, float]]:
    """The k most similar memories of each bank (30 in the paper) with their similarity, best first. See Settings."""
    banks = banks_searched(question, speakers, named_only)
    found = [pair for speaker in banks for pair in bank.search_scored(question, k, speaker=speaker, floor=floor)]
    return sorted(found, key=lambda pair: (-pair[1], pair[0].id))


def by_speaker(memories: Sequence[Memory], speakers: Sequence[str]) -> dict[str, list[Memory]]:
    """Memories in the order of a prompt: grouped by speaker, the oldest first. Speakers without any are left out."""
    ordered = sorted(memories, key=lambda memory: memory.id)
    shown = {speaker: [memory for memory in ordered if memory.speaker == speaker] for speaker in speakers}
    return {speaker: own for speaker, own in shown.items() if own}


def case_text(shown: dict[str, Sequence[Memory]], question: str, distill: bool = True, tiny: bool = False,
              preface: str = "") -> str:
    """The user message: the memories of each speaker, then the question. `tiny`: in the tiny model's own words."""
    blocks, start = [], 1
    for speaker, own in shown.items():
        heading = sanitize_for_prompt(f"{'memories' if tiny else 'Memories'} of {speaker}:")
        blocks.append(f"{heading}\n{memory_lines(own, start)}")
        start += len(own)
    asked = sanitize_for_prompt(f"{preface} {question}")
    if tiny:  # the question first too: a causal model then reads the memories with it (2307.03172)
        wanted = "relevant memories, then the answer:" if distill else "the answer alone:"
        return "\n".join([f"question: {asked}", *(blocks or ["memories:\nnone"]), f"question: {asked}", wanted])
    return "\n".join([*(blocks or ["Memories: none"]), "", "Each date above says when the words were spoken. "
                      f"Question: {asked}", END if distill else END_PLAIN])


def prompt_for(policy, ranked: Sequence[Memory], question: str, speakers: Sequence[str], settings: Settings,
               preface: str = "") -> AnswerPrompt:
    """The prompt with the memories `ranked`, best first; the last are dropped if it is too long."""
    def messages(memories):
        text = case_text(by_speaker(memories, speakers), question, settings.distill, is_tiny(policy.name), preface)
        return chat_messages(SYSTEM, text)

    ids, kept, dropped = fit_prompt(policy, messages, ranked, settings.max_prompt_tokens, settings.max_new_tokens)
    return AnswerPrompt(ids, [memory for own in by_speaker(kept, speakers).values() for memory in own], dropped)


def build_prompt(policy, bank: MemoryBank, question: str, speakers: Sequence[str], settings: Settings,
                 preface: str = "") -> AnswerPrompt:
    """Retrieve memories for a question and show them in a prompt (Alg. 4: M_ret = TopK(q, M)); see Question.preface."""
    found = retrieve(bank, question, speakers, max(1, settings.memories // 2), settings.named_only, settings.floor)
    return prompt_for(policy, [memory for memory, _ in found], question, speakers, settings, preface)


def from_json(text: str) -> str:
    """
    '{"relevant": [2], "Answer": ["Kia", "VW"]}' -> 'relevant: [2]\\nanswer: Kia, VW', also if its end is cut
    off. Another text stays as it is.
    """
    values = (value for end in ("", '"}', "}", '"]}', "]}") for value in json_values(text.rstrip() + end))
    objects = [lowered(value) for value in values if isinstance(value, dict)]
    found = next((one for key in ("answer", "relevant") for one in objects if key in one), None)
    if not found:
        return text
    if "answer" not in found:
        return f"relevant: {found['relevant']}"
    answers = found["answer"] if isinstance(found["answer"], list) else [found["answer"]]
    answer = ", ".join(str(one) for one in answers if one is not None)
    return f"relevant: {found.get('relevant')}\nanswer: {answer}"


def parse(completion: str) -> Answer:
    """
    '{"relevant": [2], "answer": "Kia"}', '1 none\\n2 Kia\\nanswer: Kia' -> Answer("Kia", (2,), True). If nothing marks
    the answer, it is all of the text, except lines "relevant: ...", as in the authors' code. Invalid: no answer, or
    reasoning that does not end. Never raises.
    """
    text = after_reasoning(completion)[:MAX_OUTPUT_CHARS]
    text = re.sub(r"`|(?<!\w)\*|\*(?!\w)", "", text)  # Markdown, but not the asterisks of "M*A*S*H"
    text = text if ANSWER.search(text) else from_json(text)
    marker = ANSWER.search(text)  # the first, as in the authors' code
    selected, rest, listed = [], [], None  # numbers, as text; lines that select nothing; match in the previous line
    for line in (text[:marker.start()] if marker else text).splitlines():
        below = marker and listed and re.match(r"[\s•-]*(\d{1,4})[\s.)]*$", line)  # "- 5" in a list
        listed = re.match(r"(?i)\s*relevant(?: \w+)?\s*:(.*)", line) or below
        verdict = marker and re.match(r"\s*(\d{1,4})\s*[.:)]?\s+(\S.*)", line)
        if listed:  # "2 (2023-05-08), (5)" selects 2 and 5
            selected += re.findall(r"\d{1,4}", IN_PARENTHESES.sub("", listed[1]))
        elif not verdict:
            rest.append(line)
        elif verdict[2].strip().lower().rstrip(".") != "none":
            selected.append(verdict[1])
    found = re.sub(r"(?i)</answer>.*", "", marker[1]) if marker else " ".join(rest)
    found = re.sub(r"^\$*\\boxed\{(.*)\}\$*$", r"\1", normalize_whitespace(found))
    answer = found[:MAX_ANSWER_CHARS].strip("\"\u201c\u201d ")
    return Answer(answer, tuple(dict.fromkeys(map(int, selected))), bool(answer))


def format_answer(given: Answer, shown: Sequence[Memory], distill: bool = True, tiny: bool = False) -> str:
    """An answer as a completion, the inverse of `parse`. `tiny`: a verdict per memory, as the tiny model writes it."""
    if not tiny:
        found = {"relevant": given.selected, "answer": given.text}
        return json.dumps(found, ensure_ascii=False) if distill else given.text
    verdicts, words = [], given.text.split(" and ")
    for i, memory in enumerate(shown if distill else (), 1):
        found_here = [word for word in words if i in given.selected and word in f"{memory.time} {memory.text}"]
        verdicts.append(f"{i} {' and '.join(found_here) or 'none'}")
    return "\n".join([*verdicts, f"answer: {given.text}"])


def generate_answers(policy, prompts: Sequence[AnswerPrompt], adapter: str | None, max_new_tokens: int) -> list[Answer]:
    """Greedy answers to a batch of prompts. `Policy.sample` computes identical prompts once."""
    outputs = generate(policy, adapter, [one.prompt for one in prompts], max_new_tokens)
    return [replace(parse(text), output=text) for text in outputs]


def normalize(text: str) -> str:
    """NFKC, lower case, hyphens and slashes as spaces, no punctuation, no articles. "7 May." -> "7 may" """
    text = unicodedata.normalize("NFKC", str(text)).lower()
    text = re.sub(r"[-/\u2010-\u2015\u2044\u2212]", " ", text)
    text = "".join(char for char in text if not unicodedata.category(char).startswith(("P", "S", "Cf")))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both normalize to the same non-empty string, else 0.0."""
    return float(normalize(prediction) == normalize(reference) != "")


def f1(prediction: str, reference: str) -> float:
    """Token F1 as Mem0 defines it: lower case, '.,!?' as spaces, SETS of words. ("dog dog cat", "cat") -> 2/3"""
    predicted, expected = (set(re.sub(r"[.,!?]", " ", str(text).lower()).split()) for text in (prediction, reference))
    common = len(predicted & expected)
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def bleu1(prediction: str, reference: str, tokenize=word_tokens) -> float:
    """BLEU-1 = min(1, e^(1 - r/c)) * matched / c (Papineni et al., 2002), for r reference and c predicted tokens."""
    predicted, expected = tokenize(str(prediction)), tokenize(str(reference))
    matched = (Counter(predicted) & Counter(expected)).total()  # clipped to the counts in the reference
    if not matched:
        return 0.0  # as in nltk's smoothing method 1
    return min(1.0, math.exp(1 - len(expected) / len(predicted))) * matched / len(predicted)


def composite(prediction: str, reference: str) -> float:
    """max(0, EM + F1 - penalty); penalty = (1 - r/c)/2 if the prediction has c words and the reference only r < c."""
    c, r = len(normalize(prediction).split()), len(normalize(reference).split())
    penalty = (1 - r / c) / 2 if c > r else 0.0
    return max(0.0, exact_match(prediction, reference) + f1(prediction, reference) - penalty)


REWARDS = {"em": exact_match, "f1": f1, "composite": composite}


def mean_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Number, mean EM and mean F1 of (prediction, reference) pairs."""
    means = {name: sum(REWARDS[name](*pair) for pair in pairs) / max(1, len(pairs)) for name in ("em", "f1")}
    return {"n": len(pairs), **means}


def main(argv=None) -> None:
    parser = Parser(description="Answers a question to a memory bank, or chats: reads statements, answers questions.",
                    epilog='example: python answer.py bank.json "Which car does Jon drive?"')
    parser.add_argument("bank", metavar="BANK", help="file of a bank; a chat creates it if it does not exist")
    parser.add_argument("question", nargs="?", help="in quotes (none: a chat, which an empty line ends)")
    parser.add_argument("--answer", metavar="DIR", help="an Answer Agent's run or adapter (none: the base model)")
    parser.add_argument("--manager", metavar="DIR", help="chat: a Manager's run or adapter (none: the base model)")
    parser.add_argument("--model", default=str(TINY), help="hub id, folder or .gguf file of a causal model (data/tiny)")
    parser.add_argument("--name", default="Alex", help="chat: your name (Alex)")
    args = parser.parse_args(argv)
    embedder, exists = make_embedder("hash"), os.path.exists(args.bank)
    bank = MemoryBank.load(args.bank, embedder) if exists or args.question else MemoryBank(embedder)
    manager = load_manager(args.model, args.manager)
    settings = CHAT[model_size(args.model)]
    if args.answer:
        settings = replace(settings, distill=trained_settings(args.answer).get("distill", settings.distill))
        manager.policy.load_adapter("answer", args.answer)
    lines = [args.question] if args.question else iter(lambda: input(f"{args.name}> ").strip(), "")
    with suppress(EOFError):  # Ctrl-D ends a chat, as an empty line does
        for line in lines:
            if args.question or line.endswith("?"):
                speakers = list(dict.fromkeys(memory.speaker for memory in bank))
                prompt = build_prompt(manager.policy, bank, line, speakers, settings)
                [answer] = generate_answers(manager.policy, [prompt], args.answer and "answer", settings.max_new_tokens)
                for i, memory in enumerate(prompt.shown, 1):
                    print_safely(f"    {'*' if i in answer.selected else ' '} {memory_lines([memory], i)}")
                print_safely(f"    answer: {answer.text or '(the output could not be read)'}")
            else:
                read_turn(manager, bank, Turn("", 1, args.name, line, f"{date.today():%d %B %Y}".lstrip("0")))
                bank.save(args.bank)


if __name__ == "__main__":
    exit_cleanly(main, less="the size of --model", resume_hint="to continue: the same command")
