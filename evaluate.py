r"""
Evaluates memory agents: systems -> banks -> answers -> scores -> reports.

    python evaluate.py        # tiny model, synthetic talk, all that is in runs/
    python evaluate.py --manager base runs/manager-grpo \
        --answer base runs/answer-grpo --out runs/2x2.json
    python evaluate.py --data locomo --model Qwen/Qwen2.5-3B-Instruct \
        --system rag full-context --paper
    python evaluate.py --compare runs/2x2.json:"base + base" \
        runs/2x2.json:"manager-grpo + answer-grpo"

A system is a source of memories (a baseline or a Manager), an Answer Agent, and how many memories it is shown. With
--out FILE.json every answer is a line of FILE.predictions.jsonl as soon as it is there; `report.py` computes all that
is reported from these lines alone, and an evaluation that was stopped goes on after them.
"""
import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from tqdm import tqdm

import answer
import data
import manager
from data import TINY, Dialogue, Question, UsageError, is_tiny
from memory import Memory, MemoryBank, make_embedder
from policy import Policy
from support import report
from support.cli import BY_DATA, BY_MODEL, Parser, exit_cleanly
from support.judge import Endpoint, Hosted, gold_of, make_judge
from support.plots import plot_evaluation
from support.report import scores
from support.run import append, check_distill, note, read_config, seed_everything, tidy

BASELINES = ("none", "full-context", "rag", "add-all", "oracle")  # sources of memories without a Manager
# What the training scripts test with: Managers in short synthetic talk, Answer Agents in long one, both in real data.
SHORT = {"count": 32, "num_turns": 20, "memories": 4, "named_only": True, "max_answer_tokens": 48}
LONG = {"count": 8, "num_turns": 100, "memories": 20, "named_only": False, "max_answer_tokens": 200}
REAL = {"memories": 60, "named_only": False, "max_answer_tokens": 256}
LONG_LIMIT = 150  # questions to the Answer Agents in runs/, which take longer
RERANK_FROM = 3  # the reranker chooses among three times as many memories as are shown
SETTINGS = ("data", "split", "seed", "model", "dtype", "embedder", "top_k", "extract", "distill", "floor", "reranker",
            "max_prompt_tokens", "max_new_tokens")  # the answers hang on these


# ------------------------------------------------------------------------------------------------ systems

@dataclass(frozen=True)
class System:
    system: str  # its name
    source: str  # of its memories: a baseline, "base", "endpoint", or a Manager's folder
    answer: str  # the Answer Agent: "base" or a folder
    memories: int  # shown to it, half of each speaker
    named_only: bool
    max_answer_tokens: int


def label(agent: str) -> str:
    """./runs/manager-grpo/adapter -> manager-grpo"""
    return os.path.relpath(agent).removesuffix("/adapter").removeprefix("runs/")


def systems_of(args, setting: dict, sources, answers) -> list[System]:
    """Every source with every Answer Agent and every number of memories; a name says no more than it must."""
    counts, systems = args.memories or [setting["memories"]], []
    named_only = setting["named_only"] if args.named_only is None else args.named_only
    longest = (setting if is_tiny(args.model) else REAL)["max_answer_tokens"]
    if max(counts) > setting["memories"]:  # the selection grows with what is shown
        longest = max(longest, LONG["max_answer_tokens"])
    longest = args.max_answer_tokens or longest
    for count, agent, source in product(counts, answers, sources):
        is_swept = len(counts) > 1 and source not in ("none", "full-context")
        if is_swept or count == counts[0]:
            name = label(source) + (f" + {label(agent)}" if set(answers) != {"base"} else "")
            name += f", {count} memories" if is_swept else ""
            systems.append(System(name, source, agent, count, named_only, longest))
    systems = list(dict.fromkeys(systems))
    if len({system.system for system in systems}) < len(systems):
        raise UsageError(f"two folders of {', '.join([*sources, *answers])} have the same name: rename one")
    return systems


def in_runs(policy, agent: str, distill: bool = True) -> dict[str, dict]:
    """The runs in runs/ that trained this agent on this model: {folder: settings}. Their adapters are loaded."""
    found = {}
    for path in sorted(Path("runs").glob("*/adapter/adapter_config.json")):
        folder = str(path.parents[1])
        try:
            config = read_config(folder)
            if config["agent"] != agent:
                continue
            check_distill(folder, distill)
            policy.load_adapter(folder, folder)
            found[folder] = config
        except UsageError as error:
            note(f"left out: {error}")
    return found


def plan(policy, args) -> list[tuple[list[Dialogue], list[System]]]:
    """
    What is to be evaluated: tables of systems that are asked the same questions. On synthetic talk a Manager meets the
    setting it is trained in; an Answer Agent meets its own, and the Manager it was trained with.
    """
    answers, is_synthetic = args.answer or ["base"], args.data == "synthetic"
    setting = REAL if not is_synthetic else LONG if set(answers) != {"base"} else SHORT
    if args.system or args.manager or args.answer:
        sources = [*(args.system or []), *(args.manager or [])] or ["base"]
        return [(asked(args, setting, args.limit), systems_of(args, setting, sources, answers))]
    managers = ["base", *(in_runs(policy, "manager") if is_synthetic else [])]
    sources = ["none", "rag", "add-all", *managers, *(["oracle"] if is_synthetic else [])]
    planned = [(asked(args, setting, args.limit), systems_of(args, setting, sources, answers))]
    systems = {}
    for agent, config in (in_runs(policy, "answer", args.distill) if is_synthetic else {}).items():
        built_by = [one for one in managers if label(one) == label(config.get("manager_adapter") or "base")]
        systems |= dict.fromkeys(systems_of(args, LONG, ["base", *built_by], ["base", agent]))
    if systems:
        planned.append((asked(args, LONG, min(LONG_LIMIT, args.limit or LONG_LIMIT)), list(systems)))
    return planned


def asked(args, setting: dict, limit: int | None) -> list[Dialogue]:
    """The dialogues with those questions that are wanted, `limit` of them, and no other dialogues or questions."""
    options = {"count": setting["count"], "num_turns": setting["num_turns"], "seed": args.seed} \
        if args.data == "synthetic" else {}
    dialogues = data.load(args.data, args.split, **options)
    final = [(one.id, question) for one in dialogues for question in one.final_questions()]
    known = sorted({question.category for _, question in final})
    if not final:
        raise UsageError(f"--data {args.data} --split {args.split}: there is no question; take another split or file")
    if args.paper and (args.data == "synthetic" or known[-1] > 5 or args.split != "test"):
        raise UsageError("--paper has the numbers of LoCoMo's test split: add --data locomo, and no other --split")
    for number in args.category or []:
        if number not in known:
            raise UsageError(f"--category {number}: {args.data}, split {args.split}, has {', '.join(map(str, known))}")
    chosen = [pair for pair in final if pair[1].category in (args.category or known)]
    n, is_spread = len(chosen), len(final) == len(dialogues)  # one question each, sorted by category: take some of all
    count = min(limit or n, n)
    chosen = [chosen[i * n // count if is_spread else i] for i in range(count)]
    wanted: dict[str, list[Question]] = {}
    for dialogue, question in chosen:
        wanted.setdefault(dialogue, []).append(question)
    return [replace(one, questions=tuple(wanted[one.id])) for one in dialogues if one.id in wanted]


# ------------------------------------------------------------------------------------------------ models

class Meter:
    """A policy that counts the tokens it generates, and the seconds for each prompt of a batch."""

    def __init__(self, policy):
        self.policy, self.encode, self.using = policy, policy.encode, policy.using
        self.tokens, self.seconds = 0, []

    def sample(self, prompts, *args, **options):
        start = time.perf_counter()
        groups = self.policy.sample(prompts, *args, **options)
        self.seconds += [(time.perf_counter() - start) / len(prompts)] * len(prompts)
        self.tokens += sum(len(completion.ids) for group in groups for completion in group)
        return groups


class Reranker:
    """A cross-encoder, hub id or folder: it reads question and memory together and says how well they match."""

    def __init__(self, name, device):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer  # here: few need it
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.model, found = AutoModelForSequenceClassification.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
            if found["missing_keys"]:  # transformers would go on with random numbers in their place
                raise ValueError(f"no weights for {min(found['missing_keys'])}")
            self.model.to(device).eval().requires_grad_(False)
        except Exception as error:  # whatever a foreign folder or a missing network raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UsageError(f"--reranker {name}: cannot be loaded ({reason}); give a cross-encoder") from error
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def best(self, question: str, memories: list[Memory], k: int) -> list[Memory]:
        """The k memories that match the question best, best first."""
        if not memories:
            return []
        pairs = self.tokenizer([question] * len(memories), [memory.text for memory in memories], padding=True,
                               truncation=True, max_length=256, return_tensors="pt").to(self.model.device)
        match = self.model(**pairs).logits[:, -1].tolist()  # one label, or the second of (no match, match)
        return [memories[i] for i in sorted(range(len(match)), key=lambda i: (-match[i], i))[:k]]


# ------------------------------------------------------------------------------------------------ evaluation

def raw_bank(dialogue: Dialogue, source: str, embedder) -> MemoryBank | list[Memory]:
    """No memory, every turn as it is, or (full-context) a list to be read from end to end under one heading."""
    lines = [(f"{turn.speaker}: {turn.text}", turn.speaker, turn.time) for turn in dialogue.turns]
    if source == "full-context":
        return [Memory(i, text, " and ".join(dialogue.speakers), when) for i, (text, _, when) in enumerate(lines)]
    bank = MemoryBank(embedder)
    if source == "rag":
        embedder.embed([text for text, *_ in lines])  # in one batch: `add` then finds them computed
        for line in lines:
            bank.add(*line)
    return bank


def sha(content) -> str:
    """A checksum of what JSON makes of something."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def digest(tensors) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.detach().float().cpu().numpy().tobytes())
    return content.hexdigest()[:16]


def batches(items: Sequence, size: int) -> list:
    """[1, 2, 3], 2 -> [[1, 2], [3]]"""
    return [items[start:start + size] for start in range(0, len(items), size)]


class Evaluation:
    """The models, what is known of the dialogues, and the lines so far: the answers, and how they came about."""

    def __init__(self, policy, args, planned: list[tuple[list[Dialogue], list[System]]]):
        self.policy, self.args, systems = policy, args, [system for _, some in planned for system in some]
        policy.tokenizer.model_max_length = 1 << 30  # prompts are cut to --max-prompt-tokens here: it need not warn
        self.embedder = make_embedder(args.embedder, str(policy.device))
        self.reranker = Reranker(args.reranker, policy.device) if args.reranker else None
        self.judge = make_judge(args.judge, policy, device=args.device, dtype=args.dtype) if args.judge else None
        self.facts: dict[str, manager.Facts] = {}  # by the name of the model that lists them
        self.hosted = None
        for agent in dict.fromkeys(agent for system in systems for agent in (system.source, system.answer)):
            if agent == "endpoint":
                self.hosted = Hosted(Endpoint.from_environment("MANAGER"))
            elif agent not in (*BASELINES, "base", *policy.adapters):
                check_distill(agent, args.distill)
                policy.load_adapter(agent, agent)
        self.settings = {name: getattr(args, name) for name in SETTINGS} | {
            "dtype": str(policy.model.dtype), "weights": digest(one[:64] for one in policy.model.parameters())}
        self.fingerprints = {}  # of all that an answer hangs on: {(system, dialogue): checksum}
        for dialogues, some in planned:
            turns = {one.id: sha([asdict(turn) for turn in one.turns]) for one in dialogues}
            for system in some:
                about = self.about(system)
                self.fingerprints |= {(system.system, id): sha([about, said]) for id, said in turns.items()}
        kept, self.rows = report.kept(args.out, self.fingerprints, self.settings) if args.out else ([], {})
        self.lines = {report.key_of(line): line for line in kept}

    def about(self, system: System) -> list:
        """All that a system's answers hang on but the dialogue, trained weights included."""
        weights = [digest(self.policy.parameters(agent)) for agent in (system.source, system.answer)]
        return [self.settings, asdict(system), weights, self.hosted.name if system.source == "endpoint" else ""]

    def agent(self, name: str):
        """The model that plays an agent, and its adapter: None for LoRA off."""
        is_adapter = name in self.policy.adapters
        return (self.hosted, None) if name == "endpoint" else (self.policy, name if is_adapter else None)

    def places(self, system: System, dialogues: list[Dialogue]) -> dict[tuple, tuple[int, Question]]:
        """Every question to a system: {key of its line: (number of the dialogue, question)}"""
        return {(system.system, one.id, question.id, question.text, question.answer): (i, question)
                for i, one in enumerate(dialogues) for question in one.questions}

    def fill(self, dialogues: list[Dialogue], systems: list[System]) -> None:
        """Asks whatever has no line yet, one source of memories after the other: their systems share the banks."""
        for source in dict.fromkeys(system.source for system in systems):
            for some in batches(dialogues, self.args.at_once):
                waiting = {system: [place for key, place in self.places(system, some).items() if key not in self.lines]
                           for system in systems if system.source == source}
                banks = self.banks(source, some) if any(waiting.values()) else []
                for system, places in waiting.items():
                    self.answer(system, [(some[i], *banks[i], question) for i, question in places])

    def banks(self, source: str, dialogues: list[Dialogue]) -> list[tuple]:
        """(bank, what is reported of it) for each dialogue. Listing the facts counts for no Manager."""
        if source in ("none", "rag", "full-context"):
            banks = [raw_bank(dialogue, source, self.embedder) for dialogue in dialogues]
            return [(bank, {"size": len(bank)}) for bank in banks]
        args, (policy, adapter), n = self.args, self.agent(source), len(dialogues)
        meter, facts = Meter(policy), self.facts.setdefault(policy.name, {})
        how = source if source in ("oracle", "add-all") else "model"
        if how != "oracle":
            manager.read_facts(policy, dialogues, args.extract, facts, args.max_new_tokens)
        built = manager.build_banks(
            meter, dialogues, self.embedder, how, adapter, args.top_k, args.extract,
            None if policy is self.hosted else args.max_prompt_tokens, args.max_new_tokens, cache=facts,
            progress=f"{label(source)}: reading {n} dialogues")
        cost = {"tokens": meter.tokens / n, "seconds": sum(meter.seconds) / n,
                "calls": report.percentiles(meter.seconds)}
        return [(one.bank, {"size": len(one.bank), "ops": dict(one.ops), "agreed": one.agreed, "judged": one.judged,
                            "dropped": one.dropped, **cost}) for one in built]

    def ask(self, system: System, dialogue: Dialogue, bank, question: Question) -> tuple[answer.Asked, float]:
        """
        Retrieves and writes the prompt; also the seconds that the search took. A whole dialogue needs none, and loses
        its oldest turns first.
        """
        k, speakers, text = max(1, system.memories // 2), dialogue.speakers, question.text
        start = time.perf_counter()
        if system.source == "full-context":
            ranked, speakers = bank[::-1], (bank[0].speaker,)
        else:
            wider = RERANK_FROM if self.reranker else 1
            searched = answer.speakers_asked(text, speakers) if system.named_only else speakers
            ranked = [memory for memory, _ in answer.retrieve(bank, text, searched, k * wider, floor=self.args.floor)]
            ranked = self.reranker.best(text, ranked, k * len(searched)) if self.reranker else ranked
        seconds = time.perf_counter() - start
        return answer.ask_about(self.policy, ranked, text, speakers, self.args.distill,
                                self.args.max_prompt_tokens), seconds

    def answer(self, system: System, questions: list[tuple]) -> None:
        """Answers (dialogue, bank, what is reported of it, question) tuples, and writes the lines as they come."""
        progress = f"{system.system}: answering"
        for batch in tqdm(batches(questions, self.args.at_once), progress, disable=None, leave=False):
            prompts = [self.ask(system, dialogue, bank, question) for dialogue, bank, _, question in batch]
            start, (policy, adapter) = time.perf_counter(), self.agent(system.answer)
            with policy.using(adapter):
                groups = policy.sample([one.prompt for one, _ in prompts], 1, system.max_answer_tokens, temperature=0)
            seconds = (time.perf_counter() - start) / len(batch)
            lines = [tidy(self.line(system, *asked, prompt, group[0], {"search": search, "answer": seconds}))
                     for asked, (prompt, search), group in zip(batch, prompts, groups, strict=True)]
            if self.args.out:
                append(report.predictions_of(self.args.out), lines)
            self.lines |= {report.key_of(line): line for line in lines}

    def line(self, system: System, dialogue, bank, about, question, prompt, completion, seconds) -> dict:
        given = answer.parse(completion.text)
        return {"system": system.system, "fingerprint": self.fingerprints[system.system, dialogue.id],
                "dialogue": dialogue.id, "question": question.id, "category": question.category, "text": question.text,
                "gold": question.answer, "prediction": given.text, "is_valid": given.is_valid,
                **scores(given.text, question.answer, question.category),
                "selected": [prompt.shown[i - 1].text for i in given.selected if 1 <= i <= len(prompt.shown)],
                "shown": len(prompt.shown), "dropped": prompt.dropped, "tokens": len(completion.ids),
                "seconds": seconds, "at_once": self.args.at_once, "bank": about}

    def mark(self, lines: list[dict]) -> None:
        """Adds the judge's verdicts. It keeps them as they come, so that one who falls silent costs nothing twice."""
        for line in lines:
            line.pop("judge", None)  # it may be another's
        verdicts = self.judge([(line["text"], line["prediction"], gold_of(line)) for line in lines])
        for line, verdict in zip(lines, verdicts, strict=True):
            line |= {"judge": verdict, "judge_model": self.judge.model}
        if self.args.out:
            report.write_lines(self.args.out, self.lines.values())


# ------------------------------------------------------------------------------------------------ command line

def numbers(text: str) -> list[int]:
    """60,30,10 -> [60, 30, 10]"""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def add_task_flags(parser: Parser) -> None:
    """What is evaluated, and on which questions."""
    add = parser.add_argument_group("systems (none named: baselines, base, and all that is in runs/)").add_argument
    add("--manager", nargs="+", metavar="DIR", help="who keeps the bank: runs or adapters, base, or endpoint "
        "(MANAGER_URL, MANAGER_MODEL, MANAGER_API_KEY in the environment)")
    add("--answer", nargs="+", metavar="DIR", help="who answers: runs or adapters, or base (base)")
    add("--system", nargs="+", choices=BASELINES, metavar="NAME", help=f"baselines: {', '.join(BASELINES)}")
    add("--memories", type=numbers, metavar="N,N", help="memories shown, half of each speaker (synthetic: 4, and 20 to "
        "a trained Answer Agent and its rivals; real data: 60)")
    add("--reranker", metavar="DIR", help=f"a cross-encoder, to choose them out of {RERANK_FROM} times as many")
    add("--distill", action=argparse.BooleanOptionalAction, default=True, help="select memories, then answer (yes)")
    add = parser.add_argument_group("questions").add_argument
    add("--data", default="synthetic", help="synthetic, locomo, longmemeval, longmemeval-s, msc, a file of one, or a "
        "transcript of your own: see data/transcript.py (synthetic)")
    add("--split", default="test", help="train, val or test (test)")
    add("--category", type=int, nargs="+", metavar="N", help="only questions of these categories")
    add("--limit", type=int, metavar="N",
        help="only N of them: the first, or spread evenly where each has its own dialogue")
    add("--seed", type=int, default=1, help="of synthetic conversations and of intervals (1, as in training)")


def add_other_flags(parser: Parser) -> None:
    """With which model, and what becomes of the answers."""
    add = parser.add_argument_group("model and memory").add_argument
    add("--model", default=str(TINY), help="hub id or folder of a causal language model (data/tiny)")
    add("--device", help="cpu, cuda, cuda:1 ... (a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model (GPU: bfloat16, CPU: float32)")
    add("--embedder", default="hash", help="hash, an encoder's hub id or folder, or hash+ENCODER (hash)")
    add("--top-k", type=int, help="related memories shown to the Manager (4; real data 10)")
    add("--named-only", action=argparse.BooleanOptionalAction, default=None,
        help="search only the memories of the speaker a question names (yes where 4 are shown)")
    add("--floor", type=float, help="show no memory less similar to the question than this, 0 to 1 (none)")
    add("--extract", action=argparse.BooleanOptionalAction, default=None,
        help="let the base model list the facts of a turn first (synthetic: no, real data: yes)")
    add("--max-prompt-tokens", type=int,
        help="longer prompts lose the least similar memories, full-context the oldest turns (1024; other models 4096)")
    add("--max-new-tokens", type=int, help="of a Manager's output (80; other models 512)")
    add("--max-answer-tokens", type=int, help="of an answer and its selection (48, 200 with a trained Answer Agent; "
        "other models and real data 256)")
    add("--at-once", type=int, default=64, metavar="N",
        help="dialogues and questions in a batch; 1 to learn how long a single call takes (64)")
    add = parser.add_argument_group("reports").add_argument
    add("--judge", metavar="MODEL", help="a language model marks the answers: endpoint (JUDGE_URL, JUDGE_MODEL, "
        "JUDGE_API_KEY in the environment), base, or a model's hub id or folder")
    add("--out", metavar="FILE.json", help="keep results, predictions and a plot; goes on if it was stopped")
    add("--paper", action="store_true", help="print the paper's numbers on LoCoMo beside ours")
    add("--compare", nargs=2, metavar=("A.json", "B.json"),
        help="only compare two results, or two systems: A.json:SYSTEM")


def arguments(argv=None) -> argparse.Namespace:
    """What depends on data and model is filled in as the training scripts do; what makes no sense is refused."""
    parser = Parser(description=__doc__.split("\n\n")[0].strip(), usage="python %(prog)s [flags]",
                    epilog="examples:\n" + __doc__.split("\n\n")[1])
    add_task_flags(parser)
    add_other_flags(parser)
    args = parser.parse_args(argv)
    is_other, is_real = not is_tiny(args.model), args.data != "synthetic"
    for name, value in {"top_k": BY_DATA["top_k"][is_real], "extract": BY_DATA["extract"][is_real],
                        "max_prompt_tokens": BY_MODEL["max_prompt_tokens"][is_other],
                        "max_new_tokens": BY_MODEL["max_new_tokens"][is_other]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("limit", "at_once", "max_prompt_tokens", "max_new_tokens", "max_answer_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.top_k < 0:
        raise UsageError(f"--top-k {args.top_k}: must be at least 0")
    if args.floor is not None and not 0 <= args.floor <= 1:
        raise UsageError(f"--floor {args.floor}: must be from 0 to 1")
    for flag in ("manager", "answer"):
        for name in sorted({*BASELINES} & {*(getattr(args, flag) or [])}):
            raise UsageError(f"--{flag} {name} is a baseline: give --system {name}")
    if "oracle" in (args.system or []) and is_real:
        raise UsageError("--system oracle needs known operations, which only --data synthetic has")
    if "endpoint" in (args.answer or []):
        raise UsageError("--answer endpoint: only a Manager can be hosted; give base or an adapter's folder")
    if args.out and Path(args.out).suffix != ".json":
        raise UsageError(f"--out {args.out}: give a name that ends in .json")
    return args


def save(args, evaluation: Evaluation, rows: list[dict]) -> None:
    """FILE.json, replaced as a whole, with these rows beside those that it has of other systems."""
    if args.out:
        judge = evaluation.judge
        evaluation.rows |= {row["system"]: row for row in rows}
        about = {"judge": {"model": judge.model, "unreadable": judge.unreadable}} if judge else {}
        report.write_report(args.out, {"data": args.data, "split": args.split, "settings": evaluation.settings,
                                       "rows": list(evaluation.rows.values()), **about})


def main(argv=None) -> None:
    args = arguments(argv)
    seed_everything(args.seed)
    if args.compare:
        return print(report.comparison(*args.compare, args.seed))
    policy = Policy.load(args.model, args.device, args.dtype)
    planned = plan(policy, args)
    evaluation, tables = Evaluation(policy, args, planned), []
    save(args, evaluation, [])
    for dialogues, systems in planned:
        evaluation.fill(dialogues, systems)
    for dialogues, systems in planned:
        lines = {system: [evaluation.lines[key] for key in evaluation.places(system, dialogues)] for system in systems}
        try:
            if args.judge:
                evaluation.mark([line for some in lines.values() for line in some])
        finally:  # a judge that falls silent costs its column alone
            tables.append([report.row_of(asdict(system), lines[system], args.seed) for system in systems])
            save(args, evaluation, tables[-1])
            print(report.headline(args.data, args.split, dialogues, tables[-1]))
            print(report.tables(tables[-1], args.paper))
    print(report.LEGEND)
    if args.out:
        plot_evaluation(Path(args.out).with_suffix(".png"), tables)
        print(f"results are in {args.out}, every answer in {report.predictions_of(args.out)}")


if __name__ == "__main__":
    exit_cleanly(main, less="--at-once or --max-prompt-tokens",
                 go_on="with --out the same command goes on from here")
