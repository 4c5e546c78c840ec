"""
The Answer Agent of Memory-R1 (arXiv 2508.19828, Alg. 4): it retrieves memories for a question, writes down which of
them matter (memory distillation) and answers, all in one generation.

    question: Which car does Jon drive?
    memories of Jon:
    1 (8 May 2023) Jon has a dog named Buddy.
    2 (3 June 2023) Jon drives a Kia car.
    question: Which car does Jon drive?
    relevant memories, then the answer:
                                          1 none          or          relevant: 2
                                          2 Kia                       answer: Kia
                                          answer: Kia

The paper re-prints the selected memories; a number, or a verdict of a word or two a line, costs a fraction of that.
How an answer is scored (exact match, F1, BLEU-1) stands here too; `judge.py` asks a language model instead.
"""
import math
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date

from data import TINY, Turn
from manager import BOLD, chat, fit_prompt, folded, memory_lines, one_line, read_turn, screen, show_bank
from memory import Memory, MemoryBank, make_embedder

RULES = """You answer a question about two people from memories of their conversations. Each memory has a number and \
the date on which it was told.
Read the memories of both people carefully and do not mix the people up. The question's matter may be put in other \
words in a memory. Where memories contradict each other, the newest is right. Turn relative times in a memory ("last \
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

LONGEST_OUTPUT = 20_000  # characters of a completion that are read at all
LONGEST_ANSWER = 1_000


@dataclass(frozen=True)
class Answer:
    text: str  # "" if the output was invalid
    selected: tuple[int, ...]  # numbers of the memories, as in the prompt
    is_valid: bool


# ------------------------------------------------------------------------------------------------ retrieval, prompt

def speakers_asked(question: str, speakers: Sequence[str]) -> tuple[str, ...]:
    """The speakers a question names; all of them if it names none. ("Where is Jon?", ("Jon", "Gina")) -> ("Jon",)"""
    named = tuple(name for name in speakers if re.search(rf"\b{re.escape(name)}\b", question, re.IGNORECASE))
    return named or tuple(speakers)


def retrieve(bank: MemoryBank, question: str, speakers: Sequence[str], k: int, named_only: bool = False,
             floor: float | None = None) -> list[tuple[Memory, float]]:
    """
    The k most similar memories of each speaker (the paper: 30 each), best first, with their similarity.
    `named_only`: only of the speakers the question names; `floor`: none below this similarity.
    """
    searched = speakers_asked(question, speakers) if named_only else speakers
    found = [pair for speaker in searched for pair in bank.search_scored(question, k, speaker=speaker, floor=floor)]
    return sorted(found, key=lambda pair: (-pair[1], pair[0].id))


def by_speaker(memories: Sequence[Memory], speakers: Sequence[str]) -> dict[str, list[Memory]]:
    """Memories as a prompt shows them: under their speaker, oldest first. Speakers without any are left out."""
    shown = {speaker: sorted((memory for memory in memories if memory.speaker == speaker), key=lambda m: m.id)
             for speaker in speakers}
    return {speaker: own for speaker, own in shown.items() if own}


def case_text(shown: dict[str, Sequence], question: str, distill: bool = True) -> str:
    """
    The user message: memories numbered through under their speakers' headings, and the question before and after them.
    Who knows the question reads the memories for it (arXiv 2307.03172): with the question last alone, the tiny model
    never learned to tell one person's memories from another's.
    """
    parts, start = [], 1
    for speaker, own in shown.items():
        parts.append(f"{one_line(f'memories of {speaker}:')}\n{memory_lines(own, start)}")
        start += len(own)
    asked = f"question: {one_line(question)}"
    wanted = "relevant memories, then the answer:" if distill else "the answer alone:"
    return "\n".join([asked, *(parts or ["memories:\nnone"]), asked, wanted])


def messages(memories: Sequence[Memory], speakers: Sequence[str], question: str, distill: bool = True) -> list[dict]:
    return chat(SYSTEM if distill else SYSTEM_PLAIN, case_text(by_speaker(memories, speakers), question, distill))


# ------------------------------------------------------------------------------------------------ parsing

def parse(completion: str) -> Answer:
    """
    Reads both ways of selecting: 'relevant: 2, 5' by number, or a verdict a line where 'none' means not selected.
    '1 none\\n2 Kia\\nanswer: Kia' -> Answer("Kia", (2,), True). Without an 'answer:' line the output is invalid.
    """
    text = completion[:LONGEST_OUTPUT].replace("*", "")
    found = list(re.finditer(r"(?im)^[ \t]*(?:final )?answer[ \t]*:[ \t]*(.*)$", text))
    if not found:
        return Answer("", (), False)
    before, selected = text[:found[-1].start()], []
    for line in before.splitlines():
        listed = re.match(r"(?i)\s*relevant(?: memories)?\s*:(.*)", line)
        verdict = re.match(r"\s*(\d{1,4})\s*[.:)]?\s+(\S.*)", line)
        if listed:
            undated = re.sub(r"\([^()]*\)", lambda part: "" if re.search("[a-zA-Z]", part[0]) else part[0], listed[1])
            selected += re.findall(r"\d{1,4}", undated)  # "2 (8 May 2023)" is 2
        elif verdict and verdict[2].strip().lower().rstrip(".") != "none":
            selected.append(verdict[1])
    answer = folded(found[-1][1][:LONGEST_ANSWER])
    return Answer(answer, tuple(dict.fromkeys(map(int, selected))), bool(answer))


# ------------------------------------------------------------------------------------------------ the agent

@dataclass(frozen=True)
class Asked:
    """One question to one bank, ready for the model: prompt, the memories shown in their order, how many dropped."""
    prompt: list[int]
    shown: list[Memory]
    dropped: int


def ask(policy, bank: MemoryBank, question: str, speakers: Sequence[str], k: int, distill: bool = True,
        named_only: bool = False, floor: float | None = None, max_prompt_tokens: int | None = None) -> Asked:
    """Retrieves for a question and writes the prompt."""
    ranked = [memory for memory, _ in retrieve(bank, question, speakers, k, named_only, floor)]
    return ask_about(policy, ranked, question, speakers, distill, max_prompt_tokens)


def ask_about(policy, ranked: Sequence[Memory], question: str, speakers: Sequence[str], distill: bool = True,
              max_prompt_tokens: int | None = None) -> Asked:
    """Writes the prompt that shows these memories, given best first: of what does not fit, the last are dropped."""
    ids, kept, dropped = fit_prompt(policy, lambda memories: messages(memories, speakers, question, distill), ranked,
                                    max_prompt_tokens)
    return Asked(ids, [memory for own in by_speaker(kept, speakers).values() for memory in own], dropped)


def answer_all(policy, asked: Sequence[Asked], adapter: str | None, max_new_tokens: int) -> list[Answer]:
    """The agent's greedy answers in one batch; identical prompts are answered once (`Policy.sample` sees to that)."""
    if not asked:
        return []
    with policy.using(adapter):
        groups = policy.sample([one.prompt for one in asked], 1, max_new_tokens, temperature=0)
    return [parse(group[0].text) for group in groups]


# ------------------------------------------------------------------------------------------------ metrics

def normalize(text: str) -> str:
    """
    What exact match compares (the paper does not say): Unicode NFKC, lower case, hyphens and slashes to spaces, other
    punctuation to nothing, articles dropped, white space folded. "7 May, 2023." -> "7 may 2023"
    """
    text = unicodedata.normalize("NFKC", str(text)).lower()
    text = re.sub(r"[-/\u2010-\u2015\u2212]", " ", text)
    text = "".join(char for char in text if not unicodedata.category(char).startswith(("P", "S", "Cf")))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both normalize to the same string that is not empty, else 0.0."""
    return float(normalize(prediction) == normalize(reference) != "")


def f1(prediction: str, reference: str) -> float:
    """Token F1 in Mem0's definition: lower case, '.,!?' to spaces, SETS of words. ("dog dog cat", "cat") -> 2/3"""
    words = [set(re.sub(r"[.,!?]", " ", str(text).lower()).split()) for text in (prediction, reference)]
    common = len(words[0] & words[1])
    return 2 * common / (len(words[0]) + len(words[1])) if common else 0.0


def tokens(text: str) -> list[str]:
    """Words and single marks, lower case: close to nltk's word_tokenize on short answers. "It's 5." -> it 's 5 ."""
    return re.findall(r"n't|'\w+|\w+(?=n't)|\w+(?:[-.,:/]\w+)*|[^\w\s]", str(text).lower())


def bleu1(prediction: str, reference: str, tokenize=tokens) -> float:
    """
    BLEU-1 = min(1, e^(1 - r/c)) * matched / c for one reference of r tokens and a prediction of c (Papineni et al.,
    2002): matches are clipped to the reference's counts. No match gives 0, as nltk's smoothing method 1 does.
    """
    predicted, expected = tokenize(prediction), tokenize(reference)
    matched = sum((Counter(predicted) & Counter(expected)).values())
    if not matched:
        return 0.0
    brevity = min(1.0, math.exp(1 - len(expected) / len(predicted)))
    return brevity * matched / len(predicted)


def composite(prediction: str, reference: str) -> float:
    """
    max(0, EM + F1 - (1 - r/c)/2 if c > r), for c words of the prediction and r of the reference, as `normalize` leaves
    them: from 0 to 2. A reward for training that pays for partly right answers, and less the longer they ramble. Not
    below 0, which an output that cannot be read gets: no answer may pay better than a wrong one.
    """
    c, r = len(normalize(prediction).split()), len(normalize(reference).split())
    penalty = (1 - r / c) / 2 if c > r else 0.0
    return max(0.0, exact_match(prediction, reference) + f1(prediction, reference) - penalty)


METRICS = {"em": exact_match, "f1": f1, "composite": composite}


def mean_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Of (prediction, reference) pairs: how many, mean EM and mean F1."""
    count = max(1, len(pairs))
    return {"n": len(pairs), "em": sum(exact_match(*pair) for pair in pairs) / count,
            "f1": sum(f1(*pair) for pair in pairs) / count}


# ------------------------------------------------------------------------------------------------ on a terminal

def reply(policy, bank: MemoryBank, question: str, adapter: str | None, settings: dict) -> None:
    """Prints what is retrieved for a question, what of it is selected, and the answer. `settings`: of `flags.usual`."""
    speakers = tuple(dict.fromkeys(memory.speaker for memory in bank))
    search = bank, question, speakers, max(1, settings["memories"] // 2)
    scores = {memory.id: score for memory, score in retrieve(*search, named_only=settings["named_only"])}
    asked = ask(policy, *search, named_only=settings["named_only"], max_prompt_tokens=settings["max_prompt_tokens"])
    given, = answer_all(policy, [asked], adapter, settings["max_answer_tokens"])
    print(f"    retrieved: {'similarity, * selected, memory' if asked.shown else 'nothing'}")
    for i, memory in enumerate(asked.shown, 1):
        is_selected = i in given.selected
        line = f"    {scores[memory.id]:.2f} {'*' if is_selected else ' '} {memory_lines([memory], i)}"
        print(screen(line, 13, BOLD if is_selected else 0))
    print(screen(f"    answer: {given.text if given.is_valid else '(the output could not be read)'}", 12, BOLD))


def typed(prompt: str):
    """The lines that a person types, or a file holds, which are then printed as if they had been typed."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (here: it gives `input` arrow keys and a history)
    is_person = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = " ".join(input(prompt if is_person else "").split())
        except EOFError:
            return print()
        if not is_person:
            print(screen(f"{prompt}{line}"))
        yield line


def main(argv=None) -> None:
    """Answers one question to a bank, or talks with its owner."""
    from policy import Policy  # here: nothing above needs a model of its own, and these come after this file
    from support.cli import Parser, usual
    from support.run import check_distill
    parser = Parser(description="Asks a memory bank a question. Without one: a chat, in which the Memory Manager reads "
                    "what you say, the Answer Agent answers what ends in a question mark, and the bank is kept.",
                    epilog='example: python answer.py bank.json "Which car does Jon drive?"')
    add = parser.add_argument
    add("bank", metavar="BANK", help="a bank's file; a chat begins it if there is none")
    add("question", nargs="?", help="in quotes (none: a chat)")
    add("--answer", metavar="DIR", help="an Answer Agent's run or adapter (none: the base model)")
    add("--manager", metavar="DIR", help="of the chat: a Manager's run or adapter (none: the base model)")
    add("--model", default=str(TINY), help="hub id or folder of a causal language model (data/tiny)")
    add("--name", default="Alex", help="of the chat: yours (Alex)")
    args = parser.parse_args(argv)
    embedder, is_there = make_embedder("hash"), args.question or os.path.exists(args.bank)
    bank = MemoryBank.load(args.bank, embedder) if is_there else MemoryBank(embedder)
    policy, settings = Policy.load(args.model), usual(args.model)
    if args.answer:
        check_distill(args.answer)
    for role in ("manager", "answer"):
        if getattr(args, role):
            policy.load_adapter(role, getattr(args, role))
            setattr(args, role, role)  # from here on the adapter goes by that name
    if args.question:
        return reply(policy, bank, args.question, args.answer, settings)
    show_bank(bank)
    print(screen(f'Say something ("I have a dog named Buddy."), or ask by name ("Which dogs does {args.name} have?"). '
                 "An empty line shows the bank, Ctrl-D ends."))
    today = f"{date.today():%d %B %Y}".lstrip("0")
    for number, line in enumerate(typed(f"{args.name}> "), 1):
        if line.endswith("?"):
            reply(policy, bank, line, args.answer, settings)
        elif line:
            read_turn(policy, bank, Turn(str(number), 1, args.name, line, today), args.manager, settings)
            bank.save(args.bank)
        else:
            show_bank(bank)


if __name__ == "__main__":
    from support.cli import exit_cleanly
    exit_cleanly(main, less="the size of --model", go_on="the same command goes on")
