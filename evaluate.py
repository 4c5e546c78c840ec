r"""
Evaluation of memory agents: systems -> banks -> answers -> scores -> report.

    python evaluate.py        # tiny model, synthetic data, runs of one agent
    python evaluate.py --manager base runs/manager-grpo \
        --answer base runs/answer-grpo --out runs/2x2.json
    python evaluate.py --data locomo --model Qwen/Qwen2.5-3B-Instruct \
        --system rag full-context --paper
    python evaluate.py --compare runs/2x2.json:"base + base" \
        runs/2x2.json:"manager-grpo + answer-grpo"

A system is a source of memories (a baseline or a Memory Manager), an Answer Agent, and a number of memories to show.
With --out FILE.json every answer is appended to FILE.predictions.jsonl as soon as it exists, and every reply from which
banks are built to FILE.replies.jsonl, so the same command continues a stopped evaluation. Difference from the paper
(arXiv 2508.19828): `rag` retrieves as many raw turns as other systems retrieve memories; the RAG baseline in the
authors' code shows one chunk of 500 tokens.
"""
import support.installed  # noqa: F401  # isort: skip  names missing packages
import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

import answer
import manager
from data import TINY, WITH_OPERATIONS, Dialogue, UsageError, is_tiny
from memory import Memory, MemoryBank, make_embedder
from policy import Policy
from support import report
from support.cli import Parser, add_flags, exit_cleanly, flag, from_args, model_size, seed_everything
from support.endpoint import Endpoint
from support.evaluation import RecordedPolicy, Reranker, agent_name, batches, find_runs, select_questions, weights_of
from support.export import SUFFIXES, check_export, export_predictions
from support.held_out import append_banks
from support.judge import gold_of, make_judge
from support.packing import keep_freed_memory
from support.run import append_rows, check_adapter, folder_lock, to_json_safe

# Held-out data of the training scripts: Managers are tested on short synthetic dialogues, Answer Agents on long ones.
SHORT = {"count": 32, "num_turns": 20, "memories": 4, "named_only": True, "max_answer_tokens": 48}
LONG = {"count": 8, "num_turns": 100, "memories": 20, "named_only": False, "max_answer_tokens": 200}
REAL = {"memories": 60, "named_only": False, "max_answer_tokens": 256}
LONG_LIMIT = 150  # questions about long dialogues in the default evaluation without --limit
REAL_DATA = {"top_k": 10, "extract": True}  # defaults of flags where they differ from those of synthetic data
REAL_MODEL = {"max_prompt_tokens": 4096, "max_new_tokens": 512}  # defaults if the model is not tiny
SMALL_MODEL = REAL_MODEL | {  # below 1e9 parameters; as in train_answer.py
    "distill": False, "extract": False, "memories": [8], "max_answer_tokens": 40}
MODELS = {"tiny": {}, "large": REAL_MODEL, "small": SMALL_MODEL}
BUILDERS = {"none": manager.noop_banks, "rag": manager.turn_banks, "full-context": manager.turn_banks,
            "oracle": manager.oracle_banks}  # baselines that need no model
RAW = ("none", "rag", "full-context")  # no operations to report
BASELINES = (*RAW, "add-all", "oracle")
RECORDED_AT_ONCE = 64  # replies that a stopped evaluation may lose while it extracts facts
RERANK_FROM = 3  # the reranker chooses among three times as many memories as are shown


def scores(prediction, reference, category: int | None = None) -> dict[str, float]:
    """
    {"em", "f1", "bleu1", "f1_locomo"}, the last only with nltk. `category`: LoCoMo's number. An adversarial question
    (category 5) has no reference: all metrics are 1 or 0, as in LoCoMo's own evaluation.
    """
    pair = str(prediction), str(reference)
    if category == 5:
        return dict.fromkeys(("em", "f1", "bleu1", "f1_locomo"), report.locomo_f1(*pair, category))
    found = {"em": answer.exact_match(*pair), "f1": answer.f1(*pair), "bleu1": answer.bleu1(*pair)}
    return found | ({"f1_locomo": report.locomo_f1(*pair, category)} if report.porter_stemmer() else {})


@dataclass(frozen=True)
class System:
    system: str  # name in the report
    source: str  # source of the memories: a baseline, "base", "endpoint", or a Manager's folder
    answer: str  # the Answer Agent: "base" or a folder
    memories: int  # half are shown from each bank that is searched: both speakers', or the only one
    named_only: bool  # only memories of the speakers that the question names
    max_answer_tokens: int
    turns: str = ""  # checksum of the dialogues


def make_systems(args, preset: dict, pairs: Sequence[tuple[str, str]], turns: str) -> list[System]:
    """A system for every pair (source, Answer Agent) and number of memories. UsageError if two have the same name."""
    counts, systems = args.memories or [preset["memories"]], []
    named_only = preset["named_only"] if args.named_only is None else args.named_only
    is_short = is_tiny(args.model) and max(counts) <= preset["memories"]  # more memories have longer selections
    max_tokens = args.max_answer_tokens or (preset if is_short else REAL)["max_answer_tokens"]
    for source, agent in dict.fromkeys(pairs):
        name = agent_name(source) + (f" + {agent_name(agent)}" if {agent for _, agent in pairs} != {"base"} else "")
        is_swept = len(counts) > 1 and source not in ("none", "full-context")
        for count in counts if is_swept else counts[:1]:
            title = f"{name}, {count} memories" if is_swept else name
            systems.append(System(title, source, agent, count, named_only, max_tokens, turns))
    if len({one.system for one in systems}) < len(systems):
        folders = ", ".join(dict.fromkeys(folder for pair in pairs for folder in pair))
        raise UsageError(f"two folders of {folders} have the same name: rename one")
    return systems


def plan_tables(policy, args) -> list[tuple[list[Dialogue], list[System]]]:
    """
    Tables of systems that answer the same questions: the systems that the flags name, or else the baselines, the base
    model and the runs of one agent in runs/, each Answer Agent with the base model and the Manager of its training.
    """
    def table(preset, pairs, limit=args.limit):
        dialogues, turns = select_questions(args, preset, limit)
        return dialogues, make_systems(args, preset, pairs, turns)

    answers, is_synthetic = args.answer or ["base"], args.data == "synthetic"
    preset = REAL if not is_synthetic else LONG if set(answers) != {"base"} else SHORT
    sources = [*(args.system or []), *(args.manager or [])]
    if sources or args.answer:
        return [table(preset, [(source, agent) for agent in answers for source in sources or ["base"]])]
    if not is_synthetic:
        return [table(preset, [(source, "base") for source in ("none", "rag", "add-all", "base")])]
    managers, pairs = ["base", *find_runs(policy, "manager")], []
    tables = [table(SHORT, [(source, "base") for source in ("none", "rag", "add-all", *managers, "oracle")])]
    for agent, config in find_runs(policy, "answer", args.distill).items():
        trained_with = agent_name(config.get("manager_adapter") or "base")
        used = ["base", *(source for source in managers if agent_name(source) == trained_with)]
        pairs += [(source, either) for either in ("base", agent) for source in used]
    return tables + ([table(LONG, pairs, args.limit or LONG_LIMIT)] if pairs else [])


def questions_to(system: System, dialogues: Sequence[Dialogue]) -> list[dict]:
    """The lines of FILE.predictions.jsonl, still without answers."""
    return [{"system": system.system, "dialogue": dialogue.id, "question": question.id, "category": question.category,
             "text": question.text, "gold": question.answer, "preface": question.preface}
            for dialogue in dialogues for question in dialogue.questions]


def load_agent(policy, agent: str, distill: bool | None) -> tuple:
    """(policy, name of its adapter). The name is None for the base model, a baseline or an endpoint."""
    if agent == "endpoint":
        return Endpoint.from_environment("MANAGER", cache="~/.cache/memory-r1/manager.jsonl"), None
    if agent in (*BASELINES, "base"):
        return policy, None
    if agent not in policy.adapters:  # `find_runs` has loaded some
        check_adapter(agent, "manager" if distill is None else "answer", distill)
        policy.load_adapter(agent, agent)
    return policy, agent


class Evaluator:
    """The models and the answers so far: `lines` by key."""

    def __init__(self, policy, args, systems: Sequence[System]):
        self.policy, self.args = policy, args
        policy.tokenizer.model_max_length = 1 << 30  # no warning: prompts are cut to --max-prompt-tokens
        replies = report.beside(args.out, "replies") if args.out else None
        self.recorded = cache(lambda one: RecordedPolicy(one, replies, max(args.at_once, RECORDED_AT_ONCE)))
        self.embedder = make_embedder(args.embedder, str(policy.device))
        self.reranker = Reranker(args.reranker, policy.device) if args.reranker else None
        options = {"device": args.device, "dtype": args.dtype}
        self.judge = make_judge(args.judge, policy, args.judge_tokens, **options) if args.judge else None
        if self.judge and args.judge != "endpoint":  # the replies of hosted judges have a cache of their own
            self.judge.policy = self.recorded(self.judge.policy)
        self.facts = defaultdict(dict)  # by the name of the model that extracted them
        wanted = {one.source: None for one in systems} | {one.answer: args.distill for one in systems}
        self.agents = {agent: load_agent(policy, agent, distill) for agent, distill in wanted.items()}
        self.settings = to_json_safe(self.describe(systems))
        self.lines = report.load_previous(args.out, self.settings)
        report.write_results(args, self.lines)

    def describe(self, systems: Sequence[System]) -> dict[str, dict]:
        """{name of a system: everything that its answers depend on}"""
        shared = asdict(from_args(SharedFlags, self.args)) | {"dtype": str(self.policy.model.dtype)}
        shared["weights"] = weights_of(self.policy)
        adapters = {agent: weights_of(policy, adapter) if adapter else policy.name
                    for agent, (policy, adapter) in self.agents.items()}
        return {one.system: {**asdict(one), **shared, "manager weights": adapters[one.source],
                             "answer weights": adapters[one.answer]} for one in systems}

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
        """{dialogue id: (speakers, bank, its description)}. The times do not include the extraction of facts."""
        args, (policy, adapter) = self.args, self.agents[source]
        settings = manager.Settings(args.top_k, args.extract, args.max_prompt_tokens, args.max_new_tokens)
        recorded = self.recorded(policy)
        agent = manager.Manager(recorded, adapter, settings, self.facts[policy.name])
        if source not in BUILDERS:
            agent.read_facts(dialogues)
        start, recorded.seconds, recorded.saved = time.perf_counter(), [], 0.0
        if source in BUILDERS:
            builds = BUILDERS[source](dialogues, self.embedder)
        elif source == "add-all":
            builds = manager.add_all_banks(dialogues, self.embedder, agent.facts)
        else:
            progress = f"{agent_name(source)}: reading {len(dialogues)} dialogues"
            builds = manager.build_banks(agent, dialogues, self.embedder, progress=progress)
        seconds = (time.perf_counter() - start + recorded.saved) / len(dialogues)
        self.sources = {dialogue.id: build.sources for dialogue, build in zip(dialogues, builds, strict=True)}
        append_banks(args.out, source, dialogues, builds)
        return {dialogue.id: (dialogue.speakers, build.bank, {
            "size": len(build.bank), "ops": {} if source in RAW else dict(build.ops),
            "num_matching": build.num_matching, "num_labeled": build.num_labeled, "seconds": seconds,
            "calls": report.percentiles(recorded.seconds)})
            for dialogue, build in zip(dialogues, builds, strict=True)}

    def find_memories(self, system: System, question: str, speakers, bank: MemoryBank) -> tuple[list[Memory], tuple]:
        """
        (Memories for a question, best first; their speakers). "full-context" does not search: the newest turns come
        first, so a prompt that is too long drops the oldest turns.
        """
        if system.source == "full-context":
            both = " and ".join(speakers)
            return [replace(memory, speaker=both) for memory in bank][::-1], (both,)
        k, wider = max(1, system.memories // 2), RERANK_FROM if self.reranker else 1
        found = answer.retrieve(bank, question, speakers, k * wider, system.named_only, self.args.floor)
        ranked = [memory for memory, _ in found]
        if self.reranker:
            banks = answer.banks_searched(question, speakers, system.named_only)
            ranked = self.reranker.best(question, ranked, k * len(banks))
        return ranked, speakers

    def sources_of(self, dialogue: str, memories: Sequence[Memory]) -> list[str]:
        """Ids of the turns that wrote some memories, in the order of the memories."""
        return list(dict.fromkeys(id for one in memories for id in sorted(self.sources[dialogue].get(one.id, ()))))

    def answer_questions(self, system: System, lines: Sequence[dict], banks: dict[str, tuple]) -> None:
        """Answer in batches: complete the lines of `questions_to` and append them to the file."""
        policy, adapter = self.agents[system.answer]
        settings = answer.Settings(distill=self.args.distill, max_prompt_tokens=self.args.max_prompt_tokens,
                                   max_new_tokens=system.max_answer_tokens)
        for batch in tqdm(batches(lines, self.args.at_once), f"{system.system}: answering", disable=None, leave=False):
            times = [time.perf_counter()]
            ranked = [self.find_memories(system, line["text"], *banks[line["dialogue"]][:2]) for line in batch]
            times.append(time.perf_counter())
            prompts = [answer.prompt_for(self.policy, memories, line["text"], speakers, settings, line["preface"])
                       for line, (memories, speakers) in zip(batch, ranked, strict=True)]
            answers = answer.generate_answers(policy, prompts, adapter, settings.max_new_tokens)
            search, reply = np.diff([*times, time.perf_counter()]) / len(batch)
            for line, prompt, found in zip(batch, prompts, answers, strict=True):
                selected = [prompt.shown[i - 1].text for i in prompt.selected_by(found)]
                line |= to_json_safe({
                    "prediction": found.text, "output": found.output,
                    "context": self.sources_of(line["dialogue"], prompt.shown), "is_valid": found.is_valid,
                    **scores(found.text, line["gold"], line["category"]), "selected": selected,
                    "retrieved": [memory.id for memory in prompt.shown],
                    "shown": len(prompt.shown), "dropped": prompt.dropped, "at_once": self.args.at_once,
                    "seconds": {"search": search, "answer": reply}, "bank": banks[line["dialogue"]][2],
                    "settings": self.settings[system.system]})
            if self.args.out:
                append_rows(report.beside(self.args.out, "predictions"), batch)
            self.lines |= {report.line_key(line): line for line in batch}

    def add_verdicts(self, lines: Sequence[dict]) -> None:
        """Add the judge's verdicts and reasons, next to those of other judges. Its replies are kept after a failure."""
        verdicts = self.judge([(line["text"], line["prediction"], gold_of(line)) for line in lines])
        for line, verdict, reason in zip(lines, verdicts, self.judge.reasons, strict=True):
            line.pop(report.JUDGE + self.judge.model, None)  # the last judge comes last
            line |= {report.JUDGE + self.judge.model: verdict, f"reason of {self.judge.model}": reason}

    def report_tables(self, tables: Sequence[tuple]) -> None:
        """Judge, save, print and export all answers. If the judge fails, only its column is missing."""
        args, answered = self.args, [
            (dialogues, [[self.lines[report.line_key(line)] for line in questions_to(system, dialogues)]
                         for system in systems]) for dialogues, systems in tables]
        try:
            for _, groups in answered if self.judge else []:
                self.add_verdicts(sum(groups, []))
        finally:
            report.write_results(args, self.lines)
            for dialogues, groups in answered:
                rows = [report.make_row(lines, args.seed) for lines in groups]
                print(report.format_report(f"{args.data}, split {args.split}", dialogues, rows, args.paper))
                for lines in groups if args.export else []:
                    print(f"for {args.export}: {export_predictions(args.export, args.out, dialogues, lines)}")
            print(report.LEGEND)
            if args.out:
                print(f"results are in {args.out}, every answer in {report.beside(args.out, 'predictions')}")


def parse_counts(text: str) -> list[int]:
    """60,30,10 -> [60, 30, 10]"""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must be positive numbers such as 60,30,10")
    return list(dict.fromkeys(map(int, text.split(","))))


@dataclass(frozen=True)
class SharedFlags:
    """Flags that change the answers of all systems. FILE.json records them."""
    data: str = flag("synthetic", "synthetic, locomo, longmemeval, longmemeval-s, msc, or a file (data/transcript.py)")
    split: str = flag("test", "train, val or test")
    seed: int = flag(1, "seed of synthetic dialogues and of intervals (1, as in held-out runs)")
    model: str = flag(str(TINY), "causal language model: hub id, folder or .gguf file (data/tiny)")
    dtype: str | None = flag(None, "base weights (bfloat16 on a GPU and, above 50M parameters, on a CPU with AMX or "
                             "AVX512-BF16; else float32)", choices=("float32", "bfloat16", "float16"))
    embedder: str = flag("hash", "hash, an encoder's hub id or folder, or hash+ENCODER")
    extract: bool = flag(False, "the base model lists the facts of a turn")
    top_k: int = flag(4, "related memories shown to the Manager", least=0)
    max_new_tokens: int = flag(80, "length of a Manager's output", least=1)
    max_prompt_tokens: int = flag(1024, "longer prompts drop memories", least=1)
    distill: bool = flag(True, "select memories, then answer")
    floor: float | None = flag(None, "lowest similarity of a memory that is shown, 0 to 1 (none)", least=0, most=1)
    reranker: str | None = flag(None, f"cross-encoder that chooses the best memories, of whichever bank, out of "
                               f"{RERANK_FROM} times as many")


@dataclass(frozen=True)
class SystemFlags:
    manager: str | None = flag(None, "Managers: runs, adapters, base, or endpoint ($MANAGER_URL, ...)", nargs="+")
    answer: str | None = flag(None, "Answer Agents: runs, adapters, or base (base)", nargs="+")
    system: str | None = flag(None, f"baselines: {', '.join(BASELINES)}", nargs="+", choices=BASELINES, metavar="NAME")
    memories: int | None = flag(None, "memories shown: half from each speaker's bank (one bank: only this half); 60,30 "
                                "compares several (4; trained Answer Agents 20; real data 60; models "
                                "below 1e9 parameters 8)", type=parse_counts, metavar="N,N")
    named_only: bool | None = flag(None, "search only memories of the speakers that a question names (yes; trained "
                                   "Answer Agents and real data: no)")
    max_answer_tokens: int | None = flag(None, "length of an answer with its selection (48; trained Answer Agents "
                                         "200; other models, real data or more memories 256; models "
                                         "below 1e9 parameters 40)", least=1)
    category: int | None = flag(None, "only questions of these categories", nargs="+")
    limit: int | None = flag(None, "only N questions: the first, or evenly spread if each has its own dialogue",
                              least=1)
    at_once: int = flag(64, "dialogues and questions per batch; 1 times single calls", least=1)
    device: str | None = flag(None, "cpu, cuda, cuda:1, mps ... (a GPU if there is one)")
    judge: str | None = flag(None, "a model that also marks answers: endpoint ($JUDGE_URL, ...), base, or a model; "
                              "each judge of the same --out has its own column")
    judge_tokens: int = flag(512, "length of a judge's reply", least=1)
    out: str | None = flag(None, "write results and predictions; continue if it was stopped", metavar="FILE.json")
    adversarial: bool = flag(False, "LoCoMo: also category 5, right if an answer says that nothing is mentioned",
                             action="store_true")
    export: str | None = flag(None, "also write the predictions for another project's evaluation (support/export.py)",
                              choices=tuple(SUFFIXES))
    paper: bool = flag(False, "print the paper's results on LoCoMo next to these", action="store_true")
    compare: str | None = flag(None, "only compare two results, or systems (A.json:SYSTEM)",
                               nargs=2, metavar=("A.json", "B.json"))


def arguments(argv=None) -> argparse.Namespace:
    """The flags, with defaults for the given data and model. UsageError if they contradict each other."""
    first = Parser(add_help=False)
    add_flags(first, "", SharedFlags, {})
    chosen, _ = first.parse_known_args(argv)
    presets = (REAL_DATA if chosen.data != "synthetic" else {}) | MODELS[model_size(chosen.model)]
    parser = Parser(description=__doc__.split("\n\n")[0].strip(), usage="python %(prog)s [flags]",
                    epilog="examples:\n" + __doc__.split("\n\n")[1])
    add_flags(parser, "systems and reports (none named: baselines, base, and all in runs/)", SystemFlags, presets)
    add_flags(parser, "data, models and memory (defaults for the given --data and --model)", SharedFlags, presets)
    args = parser.parse_args(argv)
    for flag_name, agents in (("--manager", args.manager), ("--answer", args.answer)):
        for agent in {*BASELINES} & {*(agents or [])}:
            raise UsageError(f"{flag_name} {agent} is a baseline: give --system {agent}")
    if "oracle" in (args.system or []) and args.data not in WITH_OPERATIONS:
        raise UsageError("--system oracle needs reference operations, which only --data synthetic and locomo have")
    if "endpoint" in (args.answer or []):
        raise UsageError("--answer endpoint: only a Manager can be hosted; give base or an adapter's folder")
    if args.out and not args.out.endswith(".json"):
        raise UsageError(f"--out {args.out}: give a name that ends in .json")
    return args


def main(argv=None) -> None:
    args = arguments(argv)
    seed_everything(args.seed)
    if args.compare:
        return print(report.compare(*args.compare, args.seed))
    keep_freed_memory()
    policy = Policy.load(args.model, args.device, args.dtype)
    tables = plan_tables(policy, args)
    for dialogues, _ in tables if args.export else []:
        check_export(args.export, args.out, args.data, dialogues)
    with folder_lock(Path(args.out).parent, Path(args.out).name) if args.out else nullcontext():
        evaluator = Evaluator(policy, args, [system for _, systems in tables for system in systems])
        for table in tables:
            evaluator.run_missing(*table)
        evaluator.report_tables(tables)


if __name__ == "__main__":
    exit_cleanly(main, less="--at-once or --max-prompt-tokens",
                 resume_hint="with --out the same command continues from here")
