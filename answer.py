"""
The Answer Agent of Memory-R1 (arXiv 2508.19828, Alg. 4): it retrieves memories for a question, selects the relevant
ones (memory distillation) and answers, all in one completion.

    question: Which car does Jon drive?
    memories of Jon:
    1 (8 May 2023) Jon has a dog named Buddy.
    2 (3 June 2023) Jon drives a Kia car.
    question: Which car does Jon drive?
    relevant memories, then the answer:
                                          1 none          or          relevant: 2
                                          2 Kia                       answer: Kia
                                          answer: Kia

Difference from the paper: the paper's completion repeats the selected memories, ours gives their numbers, or a verdict
of a word or two per memory, which takes far fewer tokens.
This file also defines the metrics EM, F1 and BLEU-1; support/judge.py asks a language model instead.
"""
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import manager
from data import TINY, Turn, is_tiny
from memory import Memory, MemoryBank, make_embedder
from policy import Policy
from support.cli import Parser, exit_cleanly
from support.completions import fit_prompt, generate
from support.run import check_distill
from support.terminal import print_answer, print_bank, typed_lines, wrap_for_terminal
from support.text import (
    MAX_ANSWER_CHARS,
    MAX_OUTPUT_CHARS,
    chat_messages,
    memory_lines,
    normalize_whitespace,
    sanitize_for_prompt,
)


@dataclass(frozen=True)
class Settings:
    """How the Answer Agent sees a question. The defaults suit the tiny model."""
    memories: int = 20  # retrieved in all, half of them for each speaker
    distill: bool = True  # the completion selects memories before it answers
    named_only: bool = False  # only the memories of the speakers that the question names
    floor: float | None = None  # lowest similarity of a retrieved memory
    max_prompt_tokens: int | None = 1024  # longer prompts lose their least similar memories; None: no limit
    max_new_tokens: int = 200


TINY_CHAT_SETTINGS = Settings(memories=4, named_only=True, max_new_tokens=48)  # short conversations
REAL_SETTINGS = Settings(memories=60, max_prompt_tokens=4096, max_new_tokens=256)  # pretrained models

RULES = """You answer a question about two people from memories of their conversations. Each memory has a number and \
the date on which it was told.
Read the memories of both people carefully and do not mix the people up. A memory may put the question's topic in \
other words. Where memories contradict each other, the newest is right. Turn relative times in a memory ("last \
year", "two months ago") into a date, month or year by the memory's date, and answer "when" with that date. If several \
memories answer the question together, give all their values. Do not explain; answer in fewer than six words."""
SYSTEM = RULES + """
First select: write "relevant:" and the numbers of the memories that matter for the question, and nothing else on that \
line. Then write the answer on its own line. Example:
relevant: 2, 5
answer: a beach in Spain"""
SYSTEM_PLAIN = RULES + """
Write the answer and nothing else, as in:
answer: a beach in Spain"""


@dataclass(frozen=True)
class Answer:
    text: str  # "" if the completion is invalid
    selected: tuple[int, ...]  # numbers of memories in the prompt
    is_valid: bool


@dataclass(frozen=True)
class AnswerPrompt:
    """A question to one bank as a prompt: memory i of the prompt is shown[i - 1]."""
    prompt: list[int]
    shown: list[Memory]
    dropped: int  # retrieved memories for which the prompt had no room


def speakers_asked(question: str, speakers: Sequence[str]) -> tuple[str, ...]:
    """The speakers that a question names, or all if it names none. ("Where is Jon?", ("Jon", "Gina")) -> ("Jon",)"""
    named = tuple(name for name in speakers if re.search(rf"\b{re.escape(name)}\b", question, re.IGNORECASE))
    return named or tuple(speakers)


def retrieve(bank: MemoryBank, question: str, speakers: Sequence[str], k: int, named_only: bool = False,
             floor: float | None = None) -> list[tuple[Memory, float]]:
    """
    The k most similar memories of each speaker (30 in the paper) with their similarity, best first.
    `named_only`, `floor`: see Settings.
    """
    searched = speakers_asked(question, speakers) if named_only else speakers
    found = [pair for speaker in searched for pair in bank.search_scored(question, k, speaker=speaker, floor=floor)]
    return sorted(found, key=lambda pair: (-pair[1], pair[0].id))


def by_speaker(memories: Sequence[Memory], speakers: Sequence[str]) -> dict[str, list[Memory]]:
    """Memories in the order of a prompt: grouped by speaker, the oldest first. Speakers without any are left out."""
    shown = {speaker: sorted((memory for memory in memories if memory.speaker == speaker), key=lambda m: m.id)
             for speaker in speakers}
    return {speaker: own for speaker, own in shown.items() if own}


def case_text(shown: dict[str, Sequence[Memory]], question: str, distill: bool = True) -> str:
    """
    The user message: the question, the numbered memories of each speaker, and the question again. A causal model that
    has seen the question reads the memories with it in mind (arXiv 2307.03172). With the question only at the end,
    the tiny model did not learn to tell one person's memories from another's.
    """
    blocks, start = [], 1
    for speaker, own in shown.items():
        blocks.append(f"{sanitize_for_prompt(f'memories of {speaker}:')}\n{memory_lines(own, start)}")
        start += len(own)
    asked = f"question: {sanitize_for_prompt(question)}"
    wanted = "relevant memories, then the answer:" if distill else "the answer alone:"
    return "\n".join([asked, *(blocks or ["memories:\nnone"]), asked, wanted])


def messages(memories: Sequence[Memory], speakers: Sequence[str], question: str, distill: bool = True) -> list[dict]:
    system = SYSTEM if distill else SYSTEM_PLAIN
    return chat_messages(system, case_text(by_speaker(memories, speakers), question, distill))


def prompt_for(policy, ranked: Sequence[Memory], question: str, speakers: Sequence[str], settings: Settings):
    """The AnswerPrompt that shows these memories, given best first; the last are dropped if it gets too long."""
    ids, kept, dropped = fit_prompt(policy, lambda memories: messages(memories, speakers, question, settings.distill),
                                    ranked, settings.max_prompt_tokens)
    return AnswerPrompt(ids, [memory for own in by_speaker(kept, speakers).values() for memory in own], dropped)


def build_prompt(policy, bank: MemoryBank, question: str, speakers: Sequence[str], settings: Settings) -> AnswerPrompt:
    """Retrieves memories for a question and shows them in a prompt (Alg. 4: M_ret = TopK(q, M))."""
    found = retrieve(bank, question, speakers, max(1, settings.memories // 2), settings.named_only, settings.floor)
    return prompt_for(policy, [memory for memory, _ in found], question, speakers, settings)


def parse(completion: str) -> Answer:
    """
    Reads both ways of selecting: 'relevant: 2, 5', or a line per memory, where 'none' means not selected. Never raises.
    '1 none\\n2 Kia\\nanswer: Kia' -> Answer("Kia", (2,), True). Without a line 'answer: ...' a completion is invalid.
    """
    text = completion[:MAX_OUTPUT_CHARS].replace("*", "")
    found = list(re.finditer(r"(?im)^[ \t]*(?:final )?answer[ \t]*:[ \t]*(.*)$", text))
    if not found:
        return Answer("", (), False)
    selected: list[str] = []
    for line in text[:found[-1].start()].splitlines():
        listed = re.match(r"(?i)\s*relevant(?: memories)?\s*:(.*)", line)
        verdict = re.match(r"\s*(\d{1,4})\s*[.:)]?\s+(\S.*)", line)
        if listed:  # without parentheses that contain letters: "2 (8 May 2023), (5)" selects 2 and 5
            undated = re.sub(r"\([^()]*\)", lambda part: "" if re.search("[a-zA-Z]", part[0]) else part[0], listed[1])
            selected += re.findall(r"\d{1,4}", undated)
        elif verdict and verdict[2].strip().lower().rstrip(".") != "none":
            selected.append(verdict[1])
    answer = normalize_whitespace(found[-1][1][:MAX_ANSWER_CHARS])
    return Answer(answer, tuple(dict.fromkeys(map(int, selected))), bool(answer))


def generate_answers(policy, prompts: Sequence[AnswerPrompt], adapter: str | None, max_new_tokens: int) -> list[Answer]:
    """Greedy answers to a batch of prompts. `Policy.sample` computes identical prompts once."""
    return [parse(text) for text in generate(policy, adapter, [one.prompt for one in prompts], max_new_tokens)]


def normalize(text: str) -> str:
    """
    The form that exact match compares (the paper does not define it): Unicode NFKC, lower case, hyphens and slashes as
    spaces, no other punctuation, no articles, single spaces. "7 May, 2023." -> "7 may 2023"
    """
    text = unicodedata.normalize("NFKC", str(text)).lower()
    text = re.sub(r"[-/\u2010-\u2015\u2212]", " ", text)
    text = "".join(char for char in text if not unicodedata.category(char).startswith(("P", "S", "Cf")))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both normalize to the same non-empty string, else 0.0."""
    return float(normalize(prediction) == normalize(reference) != "")


def f1(prediction: str, reference: str) -> float:
    """Token F1 as Mem0 defines it: lower case, '.,!?' as spaces, SETS of words. ("dog dog cat", "cat") -> 2/3"""
    words = [set(re.sub(r"[.,!?]", " ", str(text).lower()).split()) for text in (prediction, reference)]
    common = len(words[0] & words[1])
    return 2 * common / (len(words[0]) + len(words[1])) if common else 0.0


def tokens(text: str) -> list[str]:
    """Lower-case words and punctuation marks, close to nltk's word_tokenize on short answers. "It's 5." -> it 's 5 ."""
    return re.findall(r"n't|'\w+|\w+(?=n't)|\w+(?:[-.,:/]\w+)*|[^\w\s]", str(text).lower())


def bleu1(prediction: str, reference: str, tokenize=tokens) -> float:
    """
    BLEU-1 = min(1, e^(1 - r/c)) * matched / c, for r tokens of the reference and c of the prediction (Papineni et al.,
    2002). Matches are clipped to the counts in the reference. No match gives 0, as in nltk's smoothing method 1.
    """
    predicted, expected = tokenize(prediction), tokenize(reference)
    matched = sum((Counter(predicted) & Counter(expected)).values())
    if not matched:
        return 0.0
    brevity = min(1.0, math.exp(1 - len(expected) / len(predicted)))
    return brevity * matched / len(predicted)


def composite(prediction: str, reference: str) -> float:
    """
    max(0, EM + F1 - penalty) in [0, 2]; penalty = (1 - r/c)/2 if c > r, for c normalized words of the prediction and r
    of the reference. A reward for partly right answers that discourages long ones. It is never below 0, the reward of
    an invalid completion.
    """
    c, r = len(normalize(prediction).split()), len(normalize(reference).split())
    penalty = (1 - r / c) / 2 if c > r else 0.0
    return max(0.0, exact_match(prediction, reference) + f1(prediction, reference) - penalty)


REWARDS = {"em": exact_match, "f1": f1, "composite": composite}


def mean_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Number, mean EM and mean F1 of (prediction, reference) pairs."""
    count = max(1, len(pairs))
    return {"n": len(pairs), "em": sum(exact_match(*pair) for pair in pairs) / count,
            "f1": sum(f1(*pair) for pair in pairs) / count}


def answer_question(policy, bank: MemoryBank, question: str, adapter: str | None, settings: Settings) -> None:
    """Answers a question and prints the retrieved memories, the selected ones among them, and the answer."""
    speakers = tuple(dict.fromkeys(memory.speaker for memory in bank))
    found = retrieve(bank, question, speakers, max(1, settings.memories // 2), settings.named_only, settings.floor)
    prompt = prompt_for(policy, [memory for memory, _ in found], question, speakers, settings)
    [answer] = generate_answers(policy, [prompt], adapter, settings.max_new_tokens)
    print_answer(answer, [(memory, dict(found)[memory]) for memory in prompt.shown])


def main(argv=None) -> None:
    """Answers one question to a bank, or chats: the Manager reads statements, the Answer Agent answers questions."""
    parser = Parser(description="Asks a memory bank a question. Without one: a chat, in which the Memory Manager reads "
                    "what you say, the Answer Agent answers what ends in a question mark, and the bank is kept.",
                    epilog='example: python answer.py bank.json "Which car does Jon drive?"')
    add = parser.add_argument
    add("bank", metavar="BANK", help="file of a bank; a chat creates it if it does not exist")
    add("question", nargs="?", help="in quotes (default: none, a chat)")
    add("--answer", metavar="DIR", help="an Answer Agent's run or adapter (default: none, the base model)")
    add("--manager", metavar="DIR", help="chat: a Manager's run or adapter (default: none, the base model)")
    add("--model", default=str(TINY), help="hub id or folder of a causal language model (data/tiny)")
    add("--name", default="Alex", help="chat: your name (Alex)")
    args = parser.parse_args(argv)
    embedder, is_kept = make_embedder("hash"), args.question or os.path.exists(args.bank)
    bank = MemoryBank.load(args.bank, embedder) if is_kept else MemoryBank(embedder)
    policy, settings, manager_settings = Policy.load(args.model), REAL_SETTINGS, manager.REAL_SETTINGS
    if is_tiny(args.model):
        settings, manager_settings = TINY_CHAT_SETTINGS, manager.Settings()
    memory_manager = manager.Manager(policy, "manager" if args.manager else None, manager_settings)
    adapter = "answer" if args.answer else None
    if args.manager:
        policy.load_adapter("manager", args.manager)
    if args.answer:
        check_distill(args.answer)
        policy.load_adapter("answer", args.answer)
    if args.question:
        return answer_question(policy, bank, args.question, adapter, settings)
    print_bank(bank)
    print(wrap_for_terminal(f'Say something ("I have a dog named Buddy."), or ask by name ("Which dogs does {args.name}'
                            ' have?"). An empty line shows the bank, Ctrl-D ends.'))
    today = f"{date.today():%d %B %Y}".lstrip("0")
    for number, line in enumerate(typed_lines(f"{args.name}> "), 1):
        if line.endswith("?"):
            answer_question(policy, bank, line, adapter, settings)
        elif line:
            manager.read_turn(memory_manager, bank, Turn(str(number), 1, args.name, line, today))
            bank.save(args.bank)
        else:
            print_bank(bank)


if __name__ == "__main__":
    exit_cleanly(main, less="the size of --model", resume_hint="to continue: the same command")
