r"""
Evaluation of memory agents: systems -> banks -> answers -> scores -> report.

    python evaluate.py        # tiny model, synthetic data, all runs in runs/
    python evaluate.py --manager base runs/manager-grpo \
        --answer base runs/answer-grpo --out runs/2x2.json
    python evaluate.py --data locomo --model Qwen/Qwen2.5-3B-Instruct \
        --system rag full-context --paper
    python evaluate.py --compare runs/2x2.json:"base + base" \
        runs/2x2.json:"manager-grpo + answer-grpo"

A system is a source of memories (a baseline or a Memory Manager), an Answer Agent, and a number of memories to show.
With --out FILE.json every answer is appended to FILE.predictions.jsonl as soon as it exists. `support/report.py`
computes the report from these lines alone, and the same command continues a stopped evaluation. Difference from the
paper (arXiv 2508.19828): `rag` retrieves as many raw turns as other systems retrieve memories; the RAG baseline in the
authors' code shows one chunk of 500 tokens.
"""
import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from tqdm import tqdm

import answer
import manager
from data import TINY, Dialogue, UsageError, is_tiny
from memory import Memory, MemoryBank, make_embedder
from policy import Policy
from support import report
from support.cli import Parser, exit_cleanly, seed_everything
from support.endpoint import Endpoint
from support.evaluation import Reranker, TimedPolicy, agent_name, batches, find_runs, select_questions
from support.judge import gold_of, make_judge
from support.plots import plot_evaluation
from support.run import append_rows, check_distill, to_json_safe

# Held-out data of the training scripts: Managers are tested on short synthetic dialogues, Answer Agents on long ones.
SHORT = {"count": 32, "num_turns": 20, "memories": 4, "named_only": True, "max_answer_tokens": 48}
LONG = {"count": 8, "num_turns": 100, "memories": 20, "named_only": False, "max_answer_tokens": 200}
REAL = {"memories": 60, "named_only": False, "max_answer_tokens": 256}
BY_DATA = {"top_k": (4, 10), "extract": (False, True)}  # defaults for (synthetic, real data)
BY_MODEL = {"max_prompt_tokens": (1024, 4096), "max_new_tokens": (80, 512)}  # defaults for (tiny model, others)
LONG_LIMIT = 150  # questions about long dialogues if --limit is not given
RERANK_FROM = 3  # the reranker chooses among three times as many memories as are shown
SETTINGS = ("data", "split", "seed", "model", "embedder", "top_k", "extract", "distill", "floor", "reranker",
            "max_prompt_tokens", "max_new_tokens")  # flags that change the answers of all systems


def scores(prediction, reference, category: int | None = None) -> dict[str, float]:
    """
    Score one answer for a report: {"em", "f1", "bleu1", "f1_locomo"}, the last only if nltk is installed. EM is ours
    (`answer.normalize`), F1 and BLEU-1 are Mem0's. `category` is LoCoMo's number; only f1_locomo depends on it.
    """
    pair = str(prediction), str(reference)
    found = {"em": answer.exact_match(*pair), "f1": answer.f1(*pair), "bleu1": answer.bleu1(*pair)}
    return found | ({"f1_locomo": report.locomo_f1(*pair, category)} if report.porter_stemmer() else {})


# ------------------------------------------------------------------------------------------------ systems

@dataclass(frozen=True)
class System:
    system: str  # name in the report
    source: str  # of the memories: a baseline, "base", "endpoint", or a Manager's folder
    answer: str  # the Answer Agent: "base" or a folder
    memories: int  # shown with a question, half of each speaker
    named_only: bool  # only memories of the speakers that the question names
    max_answer_tokens: int
    turns: str = ""  # checksum of the dialogues


def make_systems(args, preset: dict, sources: Sequence[str], answers: Sequence[str], turns: str) -> list[System]:
    """Every source with every Answer Agent and every number of memories, under the shortest names that differ."""
    counts, systems = args.memories or [preset["memories"]], []
    named_only = preset["named_only"] if args.named_only is None else args.named_only
    max_tokens = (preset if is_tiny(args.model) else REAL)["max_answer_tokens"]
    if max(counts) > preset["memories"]:  # the selection grows with the number of memories
        max_tokens = max(max_tokens, LONG["max_answer_tokens"])
    for count, agent, source in product(counts, answers, sources):
        is_swept = len(counts) > 1 and source not in ("none", "full-context")
        if is_swept or count == counts[0]:
            name = agent_name(source) + (f" + {agent_name(agent)}" if set(answers) != {"base"} else "")
            name += f", {count} memories" if is_swept else ""
            systems.append(System(name, source, agent, count, named_only, args.max_answer_tokens or max_tokens, turns))
    systems = list(dict.fromkeys(systems))
    if len({system.system for system in systems}) < len(systems):
        raise UsageError(f"two folders of {', '.join([*sources, *answers])} have the same name: rename one")
    return systems


def plan_tables(policy, args) -> list[tuple[list[Dialogue], list[System]]]:
    """
    Tables of systems that are asked the same questions: the systems that the flags name, or else the baselines, the
    base model and all that is in runs/. Then an Answer Agent is tested with the Manager that it was trained with.
    """
    answers, is_synthetic = args.answer or ["base"], args.data == "synthetic"
    preset = REAL if not is_synthetic else LONG if set(answers) != {"base"} else SHORT
    sources = [*(args.system or []), *(args.manager or [])]
    dialogues, turns = select_questions(args, preset, args.limit)
    if sources or args.answer:
        return [(dialogues, make_systems(args, preset, sources or ["base"], answers, turns))]
    managers = ["base", *(find_runs(policy, "manager") if is_synthetic else [])]
    sources = ["none", "rag", "add-all", *managers, *(["oracle"] if is_synthetic else [])]
    tables = [(dialogues, make_systems(args, preset, sources, answers, turns))]
    if agents := find_runs(policy, "answer", args.distill) if is_synthetic else {}:
        (dialogues, turns), systems = select_questions(args, LONG, min(LONG_LIMIT, args.limit or LONG_LIMIT)), []
        for agent, config in agents.items():
            used = [one for one in managers if agent_name(one) == agent_name(config.get("manager_adapter") or "base")]
            systems += make_systems(args, LONG, ["base", *used], ["base", agent], turns)
        tables.append((dialogues, list(dict.fromkeys(systems))))
    return tables


# ------------------------------------------------------------------------------------------------ banks and answers

def rag_bank(dialogue: Dialogue, embedder) -> MemoryBank:
    """A bank of the raw turns."""
    bank, texts = MemoryBank(embedder), [f"{turn.speaker}: {turn.text}" for turn in dialogue.turns]
    embedder.embed(texts)  # one batch; `add` then finds the vectors in the embedder's cache
    for turn, text in zip(dialogue.turns, texts, strict=True):
        bank.add(text, turn.speaker, turn.time)
    return bank


def full_context(dialogue: Dialogue, embedder) -> list[Memory]:
    """All turns as one list, to be shown under one heading without a search."""
    heading = " and ".join(dialogue.speakers)
    return [Memory(i, f"{turn.speaker}: {turn.text}", heading, turn.time) for i, turn in enumerate(dialogue.turns)]


RAW = {"none": lambda dialogue, embedder: MemoryBank(embedder), "rag": rag_bank, "full-context": full_context}
BASELINES = (*RAW, "add-all", "oracle")


def questions_to(system: System, dialogues: Sequence[Dialogue]) -> list[dict]:
    """The lines of FILE.predictions.jsonl before the questions are answered."""
    return [{"system": system.system, "dialogue": dialogue.id, "question": question.id, "category": question.category,
             "text": question.text, "gold": question.answer}
            for dialogue in dialogues for question in dialogue.questions]


class Evaluator:
    """The models, the answers so far (`lines` by key), and the content of FILE.json (`results`)."""

    def __init__(self, policy, args, systems: Sequence[System]):
        self.policy, self.args = policy, args
        policy.tokenizer.model_max_length = 1 << 30  # no warning: prompts are cut to --max-prompt-tokens
        self.embedder = make_embedder(args.embedder, str(policy.device))
        self.reranker = Reranker(args.reranker, policy.device) if args.reranker else None
        options = {"device": args.device, "dtype": args.dtype}
        self.judge = make_judge(args.judge, policy, **options) if args.judge else None
        self.facts: dict[str, dict] = {}  # by the name of the model that extracted them
        self.models = {}  # agent -> (policy, adapter, checksum); without adapter it is the base model
        for agent in dict.fromkeys(agent for system in systems for agent in (system.source, system.answer)):
            self.models[agent] = policy, None, ""
            if agent == "endpoint":
                hosted = Endpoint.from_environment("MANAGER", cache="~/.cache/memory-r1/manager.jsonl")
                self.models[agent] = hosted, None, hosted.name
            elif agent not in (*BASELINES, "base"):
                if agent not in policy.adapters:  # `find_runs` has loaded some
                    check_distill(agent, args.distill)
                    policy.load_adapter(agent, agent)
                self.models[agent] = policy, agent, report.checksum(policy.parameters(agent))
        settings = {name: getattr(args, name) for name in SETTINGS} | {
            "dtype": str(policy.model.dtype), "weights": report.checksum(one[:64] for one in policy.model.parameters())}
        checked = {one.system: asdict(one) | {"manager weights": self.models[one.source][2],
                                              "answer weights": self.models[one.answer][2]} for one in systems}
        self.results = {"data": args.data, "split": args.split, "settings": settings, "systems": checked, "rows": []}
        self.lines = report.load_previous_predictions(args.out, self.results)

    def run_missing(self, dialogues: Sequence[Dialogue], systems: Sequence[System]) -> None:
        """Answer the questions that have no line yet. Systems with the same source share its banks."""
        for source in dict.fromkeys(system.source for system in systems):
            for some in batches(dialogues, self.args.at_once):
                missing = {system: [line for line in questions_to(system, some)
                                    if report.line_key(line) not in self.lines]
                           for system in systems if system.source == source}
                banks = self.build_banks(source, some) if any(missing.values()) else {}
                for system, lines in missing.items():
                    self.answer_questions(system, lines, banks)

    def build_banks(self, source: str, dialogues: Sequence[Dialogue]) -> dict[str, tuple]:
        """{dialogue id: (speakers, bank, its description)}. The Manager's cost excludes the extraction of facts."""
        args, (policy, adapter, _), n = self.args, self.models[source], len(dialogues)
        if source in RAW:
            banks = [RAW[source](dialogue, self.embedder) for dialogue in dialogues]
            return {one.id: (one.speakers, bank, {"size": len(bank)})
                    for one, bank in zip(dialogues, banks, strict=True)}
        settings = manager.Settings(args.top_k, args.extract, None if source == "endpoint" else args.max_prompt_tokens,
                                    args.max_new_tokens)
        agent = manager.Manager(policy, adapter, settings, self.facts.setdefault(policy.name, {}))
        if source != "oracle":
            agent.read_facts(dialogues)
        agent.policy = timed = TimedPolicy(policy)
        if source == "oracle":
            builds = manager.oracle_banks(dialogues, self.embedder)
        elif source == "add-all":
            builds = manager.add_all_banks(dialogues, self.embedder, agent.facts)
        else:
            builds = manager.build_banks(agent, dialogues, self.embedder,
                                         progress=f"{agent_name(source)}: reading {n} dialogues")
        cost = {"tokens": sum(timed.tokens) / n, "seconds": sum(timed.seconds) / n,
                "calls": report.percentiles(timed.seconds)}
        return {one.id: (one.speakers, build.bank, {
            "size": len(build.bank), "ops": dict(build.ops), "num_matching": build.num_matching,
            "num_labeled": build.num_labeled, "dropped": build.dropped, **cost})
            for one, build in zip(dialogues, builds, strict=True)}

    def build_prompt(self, system: System, question: str, speakers, bank) -> tuple[answer.AnswerPrompt, float]:
        """
        Search and write the prompt of a question. Also returns the seconds that the search took. A whole dialogue is
        not searched, and a prompt that is too long drops its oldest turns.
        """
        start, k = time.perf_counter(), max(1, system.memories // 2)
        if system.source == "full-context":
            ranked, speakers = bank[::-1], (bank[0].speaker,)
        else:
            searched = answer.speakers_asked(question, speakers) if system.named_only else speakers
            wider = k * RERANK_FROM if self.reranker else k
            ranked = [one for one, _ in answer.retrieve(bank, question, searched, wider, floor=self.args.floor)]
            ranked = self.reranker.best(question, ranked, k * len(searched)) if self.reranker else ranked
        seconds = time.perf_counter() - start
        settings = answer.Settings(distill=self.args.distill, max_prompt_tokens=self.args.max_prompt_tokens)
        return answer.prompt_for(self.policy, ranked, question, speakers, settings), seconds

    def answer_questions(self, system: System, questions: Sequence[dict], banks: dict[str, tuple]) -> None:
        """Answer in batches: complete the lines of `questions_to`, score them and append them to the file."""
        progress = f"{system.system}: answering"
        for batch in tqdm(batches(questions, self.args.at_once), progress, disable=None, leave=False):
            prompts, searches = zip(*[self.build_prompt(system, line["text"], *banks[line["dialogue"]][:2])
                                      for line in batch], strict=True)
            policy, adapter, _ = self.models[system.answer]
            timed, lines = TimedPolicy(policy), []
            answers = answer.generate_answers(timed, prompts, adapter, system.max_answer_tokens)
            for i, (line, prompt, found) in enumerate(zip(batch, prompts, answers, strict=True)):
                selected = [prompt.shown[n - 1].text for n in found.selected if 1 <= n <= len(prompt.shown)]
                lines.append(to_json_safe({
                    **line, "prediction": found.text, "is_valid": found.is_valid,
                    **scores(found.text, line["gold"], line["category"]), "selected": selected,
                    "shown": len(prompt.shown), "dropped": prompt.dropped, "tokens": timed.tokens[i],
                    "seconds": {"search": searches[i], "answer": timed.seconds[i]}, "at_once": self.args.at_once,
                    "bank": banks[line["dialogue"]][2]}))
            if self.args.out:
                append_rows(report.predictions_path(self.args.out), lines)
            self.lines |= {report.line_key(line): line for line in lines}

    def add_judge_scores(self, lines: Sequence[dict]) -> None:
        """Add the judge's verdicts. The judge caches them: a second call after a failure pays for none twice."""
        for line in lines:
            line.pop("judge", None)  # an earlier verdict may be another judge's
        verdicts = self.judge([(line["text"], line["prediction"], gold_of(line)) for line in lines])
        for line, verdict, reason in zip(lines, verdicts, self.judge.reasons, strict=True):
            line |= {"judge": verdict, "judge_model": self.judge.model, "judge_reason": reason}
        self.results["judge"] = {"model": self.judge.model, "unreadable": self.judge.unreadable}
        report.write_predictions(self.args.out, self.lines.values())

    def report_table(self, dialogues: Sequence[Dialogue], systems: Sequence[System]) -> list[dict]:
        """Judge, save and print the rows of a table. If the judge fails, only its column is missing."""
        lines = {system: [self.lines[report.line_key(line)] for line in questions_to(system, dialogues)]
                 for system in systems}
        try:
            if self.judge:
                self.add_judge_scores([line for some in lines.values() for line in some])
        finally:
            rows = [report.make_row(asdict(system), some, self.args.seed) for system, some in lines.items()]
            self.results["rows"] = list({row["system"]: row for row in (*self.results["rows"], *rows)}.values())
            report.write_report(self.args.out, self.results)
            print(report.headline(self.args.data, self.args.split, dialogues, rows))
            print(report.format_tables(rows, self.args.paper))
        return rows


# ------------------------------------------------------------------------------------------------ command line

def parse_counts(text: str) -> list[int]:
    """60,30,10 -> [60, 30, 10]"""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must be positive numbers such as 60,30,10")
    return [int(part) for part in text.split(",")]


def add_flags(parser: Parser) -> None:
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("systems (none named: baselines, base, and all that is in runs/)").add_argument
    add("--manager", nargs="+", metavar="DIR", help="Managers: runs, adapters, base, or endpoint (MANAGER_URL, "
        "MANAGER_MODEL, MANAGER_API_KEY in the environment)")
    add("--answer", nargs="+", metavar="DIR", help="Answer Agents: runs, adapters, or base (base)")
    add("--system", nargs="+", choices=BASELINES, metavar="NAME", help=f"baselines: {', '.join(BASELINES)}")
    add("--memories", type=parse_counts, metavar="N,N", help="memories shown, half of each speaker (synthetic: "
        "4, with trained Answer Agents 20; real data: 60)")
    add("--reranker", metavar="DIR", help=f"cross-encoder that chooses them out of {RERANK_FROM} times as many")
    add("--distill", action=yes_no, default=True, help="select memories, then answer (yes)")
    add = parser.add_argument_group("questions").add_argument
    add("--data", default="synthetic", help="synthetic, locomo, longmemeval, longmemeval-s, msc, a file in one of "
        "these formats, or a transcript: see data/transcript.py (synthetic)")
    add("--split", default="test", help="train, val or test (test)")
    add("--category", type=int, nargs="+", metavar="N", help="only questions of these categories")
    add("--limit", type=int, help="only N questions: the first, or evenly spread if each has its own dialogue")
    add("--seed", type=int, default=1, help="seed of synthetic dialogues and of intervals (1, as in training)")
    add = parser.add_argument_group("model and memory").add_argument
    add("--model", default=str(TINY), help="hub id or folder of a causal language model (data/tiny)")
    add("--device", help="cpu, cuda, cuda:1 ... (a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the model (GPU: bfloat16, CPU: float32)")
    add("--embedder", default="hash", help="hash, an encoder's hub id or folder, or hash+ENCODER (hash)")
    add("--top-k", type=int, help="related memories shown to the Manager (synthetic: 4, real data: 10)")
    add("--named-only", action=yes_no, help="search only the memories of speakers that the question names "
        "(synthetic data without trained Answer Agents: yes)")
    add("--floor", type=float, help="lowest similarity of a memory that is shown, 0 to 1 (none)")
    add("--extract", action=yes_no, help="the base model lists the facts of a turn (synthetic: no, real data: yes)")
    add("--max-prompt-tokens", type=int, help="longer prompts drop memories (tiny model: 1024, others: 4096)")
    add("--max-new-tokens", type=int, help="length of a Manager's output (tiny model: 80, others: 512)")
    add("--max-answer-tokens", type=int, help="length of an answer with its selection (synthetic: 48, with trained "
        "Answer Agents 200; other models and real data: 256)")
    add("--at-once", type=int, default=64, help="dialogues and questions per batch; 1 times single calls (64)")
    add = parser.add_argument_group("reports").add_argument
    add("--judge", metavar="MODEL", help="a language model also marks the answers: endpoint (JUDGE_URL, JUDGE_MODEL, "
        "JUDGE_API_KEY in the environment), base, or a hub id or folder")
    add("--out", metavar="FILE.json", help="write results, predictions and a plot; continue if it was stopped")
    add("--paper", action="store_true", help="print the paper's results on LoCoMo next to these")
    add("--compare", nargs=2, metavar=("A.json", "B.json"), help="only compare two results or systems, A.json:SYSTEM")


def arguments(argv=None) -> argparse.Namespace:
    """Parse the flags, fill in the defaults that depend on data and model, and refuse what makes no sense."""
    parser = Parser(description=__doc__.split("\n\n")[0].strip(), usage="python %(prog)s [flags]",
                    epilog="examples:\n" + __doc__.split("\n\n")[1])
    add_flags(parser)
    args = parser.parse_args(argv)
    for defaults, column in ((BY_DATA, args.data != "synthetic"), (BY_MODEL, not is_tiny(args.model))):
        for name, values in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, values[column])
    for name in ("limit", "at_once", "max_prompt_tokens", "max_new_tokens", "max_answer_tokens", "top_k"):
        value, least = getattr(args, name), int(name != "top_k")
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.floor is not None and not 0 <= args.floor <= 1:
        raise UsageError(f"--floor {args.floor}: must be from 0 to 1")
    for flag in ("manager", "answer"):
        for name in sorted({*BASELINES} & {*(getattr(args, flag) or [])}):
            raise UsageError(f"--{flag} {name} is a baseline: give --system {name}")
    if "oracle" in (args.system or []) and args.data != "synthetic":
        raise UsageError("--system oracle needs known operations, which only --data synthetic has")
    if "endpoint" in (args.answer or []):
        raise UsageError("--answer endpoint: only a Manager can be hosted; give base or an adapter's folder")
    if args.out and Path(args.out).suffix != ".json":
        raise UsageError(f"--out {args.out}: give a name that ends in .json")
    return args


def main(argv=None) -> None:
    args = arguments(argv)
    seed_everything(args.seed)
    if args.compare:
        return print(report.compare(*args.compare, args.seed))
    policy = Policy.load(args.model, args.device, args.dtype)
    tables = plan_tables(policy, args)
    evaluator = Evaluator(policy, args, [system for _, systems in tables for system in systems])
    report.write_report(args.out, evaluator.results)  # the settings, before the first answer
    for table in tables:
        evaluator.run_missing(*table)
    rows = [evaluator.report_table(*table) for table in tables]
    print(report.LEGEND)
    if args.out:
        plot_evaluation(Path(args.out).with_suffix(".png"), rows)
        print(f"results are in {args.out}, every answer in {report.predictions_path(args.out)}")


if __name__ == "__main__":
    exit_cleanly(main, less="--at-once or --max-prompt-tokens",
                 resume_hint="with --out the same command continues from here")
