"""
Train the Memory Manager (Memory-R1, arXiv 2508.19828, Alg. 1 and sec. 3.1). The signal of reinforcement learning
is whether questions are answered correctly from the edited bank.

    python train_manager.py --algo grpo                       # tiny model, synthetic data, minutes on a CPU
    python train_manager.py --algo grpo --model Qwen/Qwen2.5-3B-Instruct --data locomo --steps 50
    python train_manager.py --algo sft                        # the baseline Memory-SFT: clone reference operations
    python train_manager.py --algo grpo --init-adapter runs/manager-sft      # start from what SFT has learned
    torchrun --nproc_per_node=4 train_manager.py --model ...  # one process per GPU: see support/distributed.py

One episode is one turn of a dialogue:
1. take the bank before the turn: from a sampled trajectory of the whole
   dialogue (Memory-R2), or from other builders (--bank)                        ManagerTask.play, banks_before
2. prompt the Manager with the facts of the turn and the related memories       ManagerTask.make_episode
3. sample G outputs                                                             Policy.sample
4. apply each output's edits to its own fork of the bank, and let the frozen
   Answer Agent answer the linked questions from the fork                       ManagerTask.apply_and_answer
5. reward each output by the scores of its answers                              ManagerTask.rewards
6. train on the outputs of trajectories too, rewarded by their final banks      support/trajectories.py

Differences from the paper: GPT-4o-mini builds the banks of step 1 there, and GPT-5 is the teacher of Memory-SFT. Here
`--bank` and `--teacher` choose.
"""
import support.installed  # noqa: F401  # isort: skip  names missing packages
import argparse
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

import answer
import data
import grpo
import manager
import ppo
import sft
from data import Dialogue, Question, Turn, UsageError, is_tiny
from memory import Memory, MemoryBank, make_embedder
from policy import Policy
from support import cli
from support.cli import flag, from_args
from support.distributed import RESUME_HINT, distributed_main, rank0_result
from support.held_out import held_out_records
from support.judge import make_scorer
from support.links import describe_links, linked_questions
from support.loop import make_adapter, run_training
from support.rollouts import Played
from support.run import check_adapter, check_out
from support.trajectories import TrajectoryFlags, cut, draw, excess, num_words, outcomes

ALGORITHMS = {"grpo": grpo, "ppo": ppo, "sft": sft}
REAL_DATA = {  # defaults of flags where they differ from those of synthetic data
    **cli.REAL_DATA,
    "bank": "base",  # there are no reference operations
    "linked": "mean",  # a turn may have many linked questions, and all are rarely right at once
    "named_only": False,  # as in the paper
}
SMALL_MODEL = {  # for real models below 1e9 parameters
    **cli.SMALL_MODEL,
    "window": 3,  # LoCoMo: 117 of the 127 questions that 50 turns allow, with banks that cost a sixteenth
    "max_new_tokens": 256,  # operations for all facts of a turn
    "max_answer_tokens": 40,  # six words, with room for a sentence
    "group_size": 8,  # also for PPO, so that both learn from equally many outputs
    "batch_size": 8,  # 64 outputs, each with answers to its linked questions: minutes on a CPU
    "steps": 30,  # 240 turns: every turn that questions score appears twice on average
}
LARGE_MODEL = {  # for larger models; not measured here, for want of a GPU
    "reward": "em",  # as in the paper
    "max_prompt_tokens": 4096,  # 60 memories and the instruction
    "max_new_tokens": 512,  # operations for all facts of a turn
    "max_answer_tokens": 256,  # the selection comes before the answer
    "group_size": 8,  # also for PPO, so that both see as many
    "batch_size": 24,  # a quarter of the training conversation's turns with questions; 192 outputs
    "steps": {"grpo": 50, "ppo": 50, "sft": 60},  # the authors evaluated their Managers after 8 to 55, SFT 50 to 60
    "lr": {"grpo": 2e-5, "ppo": 2e-5, "sft": 1e-4},  # larger models need smaller steps
}


@dataclass(frozen=True)
class EpisodeFlags:
    window: int = flag(50, "number of turns before a turn that its bank is built from (in a trajectory: all), and, in "
                       "real data, that must hold the other evidence of its questions", least=0)
    bank: str | None = flag(None, "builder of that bank: the Manager in a trajectory from turn 1 (trajectory; default)"
                            ", the Manager being trained (self), the base model (base; default for real data), or the "
                            "reference operations of synthetic data or LoCoMo's observations (oracle; default of "
                            "synthetic data without trajectories)",
                            choices=("trajectory", "self", "base", "oracle"))
    refresh: int | None = flag(None, "steps after which turns are drawn, their banks built, and trajectories sampled "
                               "(3 with --bank trajectory, else 5)", least=1)
    answer_adapter: str | None = flag(None, "run or adapter of the Answer Agent (none: base model)", metavar="DIR")
    max_answer_tokens: int = flag(48, "longest output of the Answer Agent in tokens", least=1)
    distill: bool = flag(True, "let the Answer Agent select the relevant memories before it answers")


@dataclass(frozen=True)
class ManagerRewardFlags(TrajectoryFlags):
    linked: str = flag("all", "reward of an output: mean score of the linked questions, or all for the lowest score, "
                       "which is 1 only if all answers are right", choices=("mean", "all"))


@dataclass(frozen=True)
class Episode:
    prompt: list[int]
    case: manager.Case
    bank: MemoryBank  # before the turn
    turn: Turn
    questions: tuple[Question, ...]  # linked to the turn, the same for all outputs of a group
    speakers: tuple[str, str]
    dropped: int = 0  # memories that the prompt dropped because of its length
    words: int = 0  # number of words of the turns that the edited bank is made from


def contents(memories: Iterable[Memory]) -> list[tuple[str, str, str]]:
    return [(memory.text, memory.speaker, memory.time) for memory in memories]


class ManagerTask:
    """Episodes, rewards, held-out evaluation and demonstrations of the Manager. See Task in support/loop.py."""

    def __init__(self, policy: Policy, args: argparse.Namespace):
        self.policy, self.args = policy, args
        self.embedder = make_embedder(args.embedder, str(policy.device))
        self.base = manager.Manager(policy, None, from_args(manager.Settings, args))
        self.trained = replace(self.base, adapter="manager")  # shares the cache of extracted facts
        self.dialogues = None if args.data == "synthetic" else data.load(args.data, "train")
        self.held_out = cli.held_out_dialogues(args)
        self.played: Played | None = None  # the trajectories' outputs of this step
        self.trajectories: list[tuple[Dialogue, manager.BankBuild]] = []
        self.banks: dict = {}  # memories before turn i; only for --bank base on real data, where they stay the same
        self.pool: list[Episode] = []
        self.state: dict = {}  # memories of the pool's banks; a resumed run needs them, as the Manager has changed
        if args.algo == "sft":
            self.teacher = cli.make_teacher(args)
            return
        self.score = make_scorer(policy, args, answer.REWARDS)
        if self.dialogues:
            print(describe_links(self.dialogues, args), flush=True)

    def batch(self, step: int) -> list[Episode]:
        """The `--batch-size` episodes of a step. A pool holds the episodes of `--refresh` steps."""
        first = step - (step - 1) % self.args.refresh
        self.played = self.as_played([])
        if step == first or not self.pool:
            self.pool = self.make_pool(first, step == first)
        start = (step - first) * self.args.batch_size
        return self.pool[start:start + self.args.batch_size]

    def make_pool(self, first: int, is_new: bool = True) -> list[Episode]:
        """
        The episodes of the steps `first`, ..., `first + refresh - 1`, drawn from the dialogues at random. A resumed run
        finds their banks in its checkpoint, but not the trajectories: step `first` (`is_new`) samples them again.
        """
        if self.args.bank == "trajectory":
            num_episodes, dialogues = self.args.batch_size * self.args.refresh, self.copies(first)
        else:
            num_episodes = self.args.batch_size * min(self.args.refresh, self.args.steps - first + 1)
            dialogues = self.training_dialogues(first, math.ceil(num_episodes / 4))  # about four turns per dialogue
        linked = [linked_questions(dialogue, self.args.window) for dialogue in dialogues]
        turns = [(n, i) for n, dialogue in enumerate(dialogues)
                 for i, turn in enumerate(dialogue.turns) if turn.id in linked[n]]
        drawn = draw(random.Random(f"{self.args.seed} {first}"), turns, num_episodes)
        self.base.read_facts(dialogues)
        key = [first, *([dialogues[n].id, n, i] for n, i in drawn)]
        if is_new or self.state.get("pool") != key:
            if self.args.trajectories:
                self.play(dialogues if self.args.bank == "trajectory" else self.copies(first))
            self.state = {"pool": key, "memories": self.banks_before(dialogues, drawn)}
        return [self.make_episode(dialogues[n], i, memories, linked[n][dialogues[n].turns[i].id])
                for (n, i), memories in zip(drawn, self.state["memories"], strict=True)]

    def training_dialogues(self, first: int, count: int) -> list[Dialogue]:
        """All dialogues of real data, or `count` synthetic ones, with a seed for step `first`."""
        return self.dialogues or data.load("synthetic", "train", count=count, seed=self.args.seed * 100_000 + first)

    def copies(self, first: int) -> list[Dialogue]:
        """The conversations that get trajectories, up to `--horizon`: each one N times in a row."""
        args, rng = self.args, random.Random(f"trajectories {self.args.seed} {first}")
        found = [cut(dialogue, args.horizon) for dialogue in self.training_dialogues(first, args.conversations)]
        found = [dialogue for dialogue in found if linked_questions(dialogue, args.window)]
        return [dialogue for dialogue in draw(rng, found, args.conversations) for _ in range(args.trajectories)]

    def play(self, copies: Sequence[Dialogue]) -> None:
        """Sample a trajectory of each dialogue and score its final bank: the global part."""
        args = self.args
        builds = manager.build_banks(self.trained, copies, self.embedder, temperature=args.temperature)
        self.trajectories = list(zip(copies, builds, strict=True))
        asked = [(n, question) for n, dialogue in enumerate(copies) for question in dialogue.final_questions()]
        found = self.scored_answers([(builds[n].bank, question, copies[n].speakers) for n, question in asked])
        rows = []  # (prompt, completion, reward, label)
        for n, (dialogue, build) in enumerate(self.trajectories):
            own = [(question, score) for (m, question), (_, score) in zip(asked, found, strict=True) if m == n]
            penalty = self.penalty(build.bank, num_words(dialogue.turns))
            for i, score in outcomes(dialogue, own, args.outcome == "whole").items():
                _, prompt, completion = build.outputs[i]
                if prompt:
                    rows.append((prompt, completion, score - penalty, (n // args.trajectories, i)))
        self.played = self.as_played(rows)

    def as_played(self, rows: Sequence[tuple]) -> Played | None:
        """Trajectories' outputs from (prompt, completion, reward, label) rows; without rows for the weights alone."""
        if not self.args.trajectories:
            return None
        prompts, completions, rewards, labels = map(list, zip(*rows, strict=True)) if rows else [[]] * 4
        return Played(prompts, completions, torch.tensor(rewards), labels,
                      (self.args.local_weight, self.args.global_weight))

    def penalty(self, bank: MemoryBank, words: int) -> float:
        return self.args.compression_penalty and self.args.compression_penalty * excess(bank, words)

    def banks_before(self, dialogues: Sequence[Dialogue], drawn: Sequence[tuple[int, int]]) -> list[list[tuple]]:
        """
        The memories (text, speaker, time) before turn i of dialogue n, for each (n, i) of `drawn`: those of trajectory
        n, or built from the `--window` turns before.
        """
        if self.args.bank == "trajectory":
            return [contents(self.trajectories[n][1].history[i]) for n, i in drawn]
        turns = [(dialogues[n], i) for n, i in drawn]
        banks = self.banks if self.dialogues and self.args.bank == "base" else {}
        missing = {(dialogue.id, i): replace(dialogue, turns=dialogue.turns[max(0, i - self.args.window):i])
                   for dialogue, i in turns if (dialogue.id, i) not in banks}
        if self.args.bank == "oracle":
            builds = manager.oracle_banks([*missing.values()], self.embedder)
        else:
            builder = self.trained if self.args.bank == "self" else self.base
            builds = manager.build_banks(builder, [*missing.values()], self.embedder)
        banks |= {key: contents(build.bank) for key, build in zip(missing, builds, strict=True)}
        return [banks[dialogue.id, i] for dialogue, i in turns]

    def make_episode(self, dialogue: Dialogue, i: int, memories: Sequence[tuple], questions: tuple) -> Episode:
        turn, bank = dialogue.turns[i], MemoryBank(self.embedder)
        for memory in memories:
            bank.add(*memory)
        facts = self.base.facts[dialogue.id, turn.id] or (turn.text,)  # the base model may find none
        case = manager.make_case(bank, turn, facts, self.args.top_k)
        prompt, case, dropped = manager.fit_case(self.policy, case, self.base.settings)
        start = 0 if self.args.bank == "trajectory" else max(0, i - self.args.window)
        words = num_words(dialogue.turns[start:i + 1])
        return Episode(prompt, case, bank, turn, questions, dialogue.speakers, dropped, words)

    def rewards(self, episodes: list[Episode], groups: list) -> tuple[torch.Tensor, dict, list[dict]]:
        """Rewards (P, G), before the penalty 0 for invalid outputs; metrics of the step; readable samples."""
        outputs = {(i, g): tuple(edits) for i, (episode, group) in enumerate(zip(episodes, groups, strict=True))
                   for g, completion in enumerate(group)
                   if (edits := manager.parse(completion.text, episode.case)) is not None}
        banks, records = self.apply_and_answer(episodes, outputs)
        rewards = torch.tensor([[0.0 - self.penalty(one.bank, one.words)] * len(groups[0]) for one in episodes])
        for (i, g), edits in outputs.items():
            scores = [one[self.args.reward] for one in records[i, edits]]
            score = min(scores) if self.args.linked == "all" else sum(scores) / len(scores)
            rewards[i, g] = score - self.penalty(banks[i, edits], episodes[i].words)
        ops = Counter(edit.event for edits in outputs.values() for edit in edits)
        metrics = {"invalid_rate": 1 - len(outputs) / rewards.numel(),
                   "dropped": sum(episode.dropped for episode in episodes) / len(episodes),
                   "ops": {event: ops[event] for event in manager.EVENTS},
                   "bank_size": sum(len(banks[i, edits]) for (i, _), edits in outputs.items()) / max(1, len(outputs))}
        if self.played and self.played.prompts:
            sizes = [len(build.bank) for _, build in self.trajectories]
            metrics |= {"outcome": self.played.rewards.mean().item(), "final_bank_size": sum(sizes) / len(sizes)}
        samples = [{"prompt": manager.case_text(one.case.speaker, one.case.time, one.case.shown(), one.case.facts),
                    "completion": groups[i][0].text, "reward": rewards[i, 0].item(),
                    "parts": records.get((i, outputs.get((i, 0))), "invalid")} for i, one in enumerate(episodes[:4])]
        return rewards, metrics, samples

    def apply_and_answer(self, episodes: list[Episode], outputs: dict) -> tuple[dict, dict]:
        """
        Apply the edits of each output, {(episode i, output g): edits}, to a fork of the episode's bank, and score the
        answers from it. Return {(i, edits): fork} and {(i, edits): records of the answers}: equal edits share a fork.
        """
        forks = {}
        for i, edits in dict.fromkeys((i, edits) for (i, _), edits in outputs.items()):
            forks[i, edits] = episodes[i].bank.fork()
            manager.apply_edits(forks[i, edits], edits, episodes[i].turn.speaker, episodes[i].turn.time)
        asked = [(key, question) for key in forks for question in episodes[key[0]].questions]
        found = self.scored_answers([(forks[key], question, episodes[key[0]].speakers) for key, question in asked])
        records = {key: [] for key in forks}
        for (key, question), (text, score) in zip(asked, found, strict=True):
            records[key].append({"question": question.text, "answer": text, "gold": question.answer,
                                 self.args.reward: score})
        return forks, records

    def scored_answers(self, asked: Sequence[tuple[MemoryBank, Question, tuple[str, str]]]) -> list[tuple[str, float]]:
        """The answers to (bank, question, speakers) triples, with their scores."""
        texts = [given.text for _, given in self.answers(asked)]
        return [*zip(texts, self.score([(question.text, text, question.answer) for (_, question, _), text
                                        in zip(asked, texts, strict=True)]), strict=True)]

    def answers(self, asked: Sequence[tuple[MemoryBank, Question, tuple[str, str]]]) -> list[tuple]:
        """The frozen Answer Agent on (bank, question, speakers) triples, in one batch: (AnswerPrompt, Answer) pairs."""
        settings = from_args(answer.Settings, self.args, max_new_tokens=self.args.max_answer_tokens)
        prompts = [answer.build_prompt(self.policy, bank, question.text, speakers, settings, question.preface)
                   for bank, question, speakers in asked]
        adapter = "answer" if self.args.answer_adapter else None
        return [*zip(prompts, answer.generate_answers(self.policy, prompts, adapter, settings.max_new_tokens),
                     strict=True)]

    def evaluate(self, when: str, step: int) -> list[dict]:
        """Build banks of held-out dialogues and ask the final questions. "untrained" also evaluates the baselines."""
        if not self.held_out:
            return []
        dialogues, is_synthetic = self.held_out, self.args.data == "synthetic"
        agent = self.trained if when == "trained" or self.args.init_adapter else self.base
        build = partial(manager.build_banks, agent, embedder=self.embedder, progress=f"held out: {when}")
        builds = {when: build(dialogues)}
        if when == "untrained":
            builds["add-all"] = manager.add_all_banks(dialogues, self.embedder, self.base.facts)
            builds["noop"] = manager.noop_banks(dialogues, self.embedder)
            if is_synthetic:
                builds["oracle"] = manager.oracle_banks(dialogues, self.embedder)
        results = {name: self.ask_finally(dialogues, own) for name, own in builds.items()}
        if is_synthetic:
            unseen = cli.held_out_dialogues(self.args, phrasing="unseen")
            results[when]["em_unseen"] = self.ask_finally(unseen, build(unseen))["em"]
        return [{"step": step, "eval": name, **result} for name, result in results.items()]

    def ask_finally(self, dialogues: Sequence[Dialogue], builds: Sequence[manager.BankBuild]) -> dict:
        """The scores of the final questions, a report on the banks, and records for held_out.jsonl."""
        asked = [(build.bank, question, dialogue.speakers) for build, dialogue in zip(builds, dialogues, strict=True)
                 for question in dialogue.final_questions()]
        answers = self.answers(asked)
        pairs = [(given.text, question.answer) for (_, given), (_, question, _) in zip(answers, asked, strict=True)]
        return {**answer.mean_scores(pairs), **manager.bank_report(builds),
                "dialogues": held_out_records(dialogues, builds, answers, answer.REWARDS)}

    def demonstrations(self) -> tuple[list[list[int]], list[list[int]], dict]:
        """Prompts, the teacher's completions, a report. Left out: invalid edits, edits of dropped memories."""
        prompts, completions, ops = [], [], Counter()
        decisions = self.teacher_decisions()
        for case, edits in decisions:
            prompt, case, _ = manager.fit_case(self.policy, case, self.base.settings)
            if edits and {edit.id for edit in edits} <= {None, *(memory.id for memory in case.memories)}:
                text = manager.format_edits(edits, case, by_text=is_tiny(self.args.model))
                prompts.append(prompt)
                completions.append(self.policy.encode_reply(text))
                ops.update(edit.event for edit in edits)
        if not prompts:
            raise UsageError(f"nothing to clone: none of the teacher's {len(decisions)} outputs can be applied")
        return prompts, completions, {"invalid_rate": 1 - len(prompts) / len(decisions), "ops": dict(ops)}

    def teacher_decisions(self) -> list[tuple[manager.Case, list[manager.Edit] | None]]:
        """
        Cases and edits to clone: the reference operations for the episodes of reinforcement learning, or those of every
        turn, with the banks that they build: LoCoMo's observations, or the edits of a hosted Manager.
        """
        if not self.teacher and not self.dialogues:
            return [(episode.case, manager.oracle_edits(episode.bank, episode.turn))
                    for first in range(1, self.args.steps + 1, self.args.refresh) for episode in self.make_pool(first)]
        count = math.ceil(self.args.steps * self.args.batch_size / 20)  # synthetic dialogues of 20 turns
        dialogues = self.dialogues or data.load("synthetic", "train", seed=self.args.seed, count=count)
        self.base.read_facts(dialogues)
        if self.teacher:
            teacher = replace(self.base, policy=self.teacher)
            builds = manager.build_banks(teacher, dialogues, self.embedder, progress=f"teacher: {self.teacher.name}")
        else:
            builds = manager.oracle_banks(dialogues, self.embedder, self.base)
        return [decision for build in builds for decision in build.decisions]


def arguments(argv=None) -> argparse.Namespace:
    """The settings of a run, from the command line and the presets above."""
    groups = cli.flag_groups(ALGORITHMS, EpisodeFlags, ManagerRewardFlags)
    presets = {"data": REAL_DATA, "small": SMALL_MODEL, "large": LARGE_MODEL}
    args = cli.parse_training_flags("manager", "Train the Memory Manager.", groups, presets, argv)
    if args.data not in data.WITH_OPERATIONS and args.algo == "sft" and args.teacher == "known":
        raise UsageError(f"--algo sft: --data {args.data} has no reference operations to clone (synthetic and locomo "
                         "have): add --teacher endpoint")
    given = getattr(args, "trajectories", 0)  # SFT has none
    args.bank = args.bank or ("oracle" if given == 0 else "trajectory")
    trajectories, refresh = (4, 3) if args.bank == "trajectory" else (0, 5)
    args.trajectories, args.refresh = trajectories if given is None else given, args.refresh or refresh
    if args.bank == "trajectory" and not args.trajectories:
        raise UsageError("--bank trajectory needs --trajectories 1 or more, and --algo grpo or ppo")
    if args.data not in data.WITH_OPERATIONS and args.bank == "oracle":
        raise UsageError("--bank oracle needs reference operations, which only --data synthetic and locomo have")
    return args


def main(argv=None) -> None:
    args = arguments(argv)
    rank0_result(check_out, args)
    cli.seed_everything(args.seed)
    policy = Policy.load(args.model, args.device, args.dtype, args.gradient_checkpointing)
    if args.answer_adapter:
        check_adapter(args.answer_adapter, "answer", args.distill)
        policy.load_adapter("answer", args.answer_adapter)
    make_adapter(policy, args)
    cli.announce(args)
    run_training(ALGORITHMS[args.algo], policy, ManagerTask(policy, args), args)


if __name__ == "__main__":
    cli.exit_cleanly(distributed_main(main), resume_hint=RESUME_HINT)
