"""
Train the Memory Manager (Memory-R1, arXiv 2508.19828, Alg. 1 and sec. 3.1). The only signal is whether the questions
linked to a turn are answered correctly from the edited bank.

    python train_manager.py --algo grpo                       # tiny model, synthetic data, two CPU cores, minutes
    python train_manager.py --algo grpo --seed 1 --out runs/seed-1
    python train_manager.py --algo grpo --model Qwen/Qwen2.5-3B-Instruct --data locomo --lr 1e-5 --steps 200
    python train_manager.py --algo sft                        # the baseline Memory-SFT: clone reference operations
    torchrun --nproc_per_node=4 train_manager.py --model ...  # one process per GPU: see support/distributed.py

One episode is one turn of a dialogue:
1. build the bank before the turn from the `--window` turns before it           ManagerTask.banks_before
2. prompt the Manager with the facts of the turn and the related memories       ManagerTask.make_episode
3. sample G outputs and apply the edits of each to its own fork of the bank     ManagerTask.apply_and_answer
4. let the frozen Answer Agent answer the linked questions from each fork       ManagerTask.apply_and_answer
5. reward each output by the scores of its answers                              reward_of

Differences from the paper: GPT-4o-mini builds the banks of step 1 there, and GPT-5 is the teacher of Memory-SFT. Here
`--bank` and `--teacher` choose.
"""
import argparse
import math
import random
from collections import Counter
from collections.abc import Sequence
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
from memory import MemoryBank, make_embedder
from policy import Policy
from support.cli import RewardFlags, exit_cleanly, flag, from_args, parse_training_flags, seed_everything
from support.distributed import RESUME_HINT, distributed_main, is_rank0, rank0_result
from support.endpoint import CachedEndpoint, Endpoint, EndpointPolicy
from support.judge import make_scorer
from support.loop import run_training
from support.plots import plot_run
from support.run import check_distill, check_out

ALGORITHMS = {"grpo": grpo, "ppo": ppo, "sft": sft}
REPLIES = "~/.cache/memory-r1/teacher.jsonl"  # cached replies of a hosted teacher
REAL_DATA = {  # defaults of flags where they differ from those of synthetic data
    "extract": True,  # a real turn holds several facts and small talk
    "top_k": 10,  # several facts have more related memories than one
    "bank": "base",  # there are no reference operations
    "linked": "mean",  # a turn may have many linked questions, of which all are seldom right
    "loss_mean": "completion",  # as in the paper
    "memories": 60,  # as in the paper: 30 of each speaker
    "named_only": False,  # as in the paper
    "eval": 1,  # one LoCoMo dialogue has more than 100 questions
}
REAL_MODEL = {  # defaults of flags where they differ from those of the tiny model
    "max_prompt_tokens": 4096,  # 60 memories and the instruction
    "max_new_tokens": 512,  # operations for all facts of a turn
    "max_answer_tokens": 256,  # the selection comes before the answer
    "lr": {"grpo": 2e-5, "ppo": 2e-5, "sft": 1e-4},  # larger models need smaller steps
}


@dataclass(frozen=True)
class EpisodeFlags:
    window: int = flag(50, "number of turns from which the bank before a turn is built", least=0)
    bank: str = flag("oracle", "builder of that bank: the Manager being trained (self), the base model (base), or the "
                     "reference operations that synthetic data has", choices=("self", "base", "oracle"))
    refresh: int = flag(5, "steps after which new turns are drawn and their banks built", least=1)
    answer_adapter: str | None = flag(None, "run or adapter of the frozen Answer Agent (none: the base model)",
                                      metavar="DIR")
    max_answer_tokens: int = flag(48, "longest output of the Answer Agent in tokens", least=1)


@dataclass(frozen=True)
class ManagerRewardFlags(RewardFlags):
    linked: str = flag("all", "reward of an output: mean score of the linked questions, or all for the lowest score, "
                       "which is 1 only if all answers are right", choices=("mean", "all"))


@dataclass(frozen=True)
class TeacherFlags:
    teacher: str = flag("known", "clone the reference operations that synthetic data has (known), or a hosted Manager "
                        "(endpoint: set MANAGER_URL, MANAGER_MODEL and, if needed, MANAGER_API_KEY), whose replies are "
                        "cached", choices=("known", "endpoint"))


@dataclass(frozen=True)
class Episode:
    prompt: list[int]
    case: manager.Case
    bank: MemoryBank  # before the turn
    turn: Turn
    questions: tuple[Question, ...]  # linked to the turn, the same for all outputs of a group
    speakers: tuple[str, str]
    dropped: int = 0  # memories that the prompt dropped because of its length


@dataclass(frozen=True)
class Outcome:
    """The effect of an output: the size of the edited bank; the score and a readable record of each answer from it."""
    bank_size: int
    scores: list[float]
    answers: list[dict]


def reward_of(scores: Sequence[float], linked: str) -> float:
    """The reward of an output from the scores of the linked questions: their mean or, for "all", the lowest."""
    return sum(scores) / len(scores) if linked == "mean" else min(scores)


def linked_questions(dialogue: Dialogue) -> dict[str, tuple[Question, ...]]:
    """
    {turn id: the questions that judge its edits}. In synthetic data these are the questions asked right after the
    turn; in LoCoMo, which asks all questions at the end, those whose evidence includes the turn.
    """
    is_timed = any(question.asked_after for question in dialogue.questions)
    linked: dict[str, tuple[Question, ...]] = {}
    for question in dialogue.questions:
        for turn in [question.asked_after] if is_timed else question.evidence:
            linked[turn] = (*linked.get(turn, ()), question)
    return {turn: questions for turn, questions in linked.items() if turn is not None}


def held_out_dialogues(args: argparse.Namespace, phrasing: str = "seen") -> list[Dialogue]:
    """The first `--eval` dialogues that are not for training. `phrasing`: the wording of synthetic turns."""
    if args.data == "synthetic":
        return data.load("synthetic", "test", count=args.eval, seed=1, phrasing=phrasing)
    return data.load(args.data, "val")[:args.eval] if args.eval else []


class ManagerTask:
    """Episodes, rewards, held-out evaluation and demonstrations of the Manager. See Task in support/loop.py."""

    def __init__(self, policy: Policy, args: argparse.Namespace):
        self.policy, self.args = policy, args
        self.embedder = make_embedder(args.embedder, str(policy.device))
        self.base = manager.Manager(policy, None, from_args(manager.Settings, args))
        self.trained = replace(self.base, adapter="manager")  # shares the cache of extracted facts
        self.dialogues = None if args.data == "synthetic" else data.load(args.data, "train")
        self.held_out = held_out_dialogues(args)
        self.histories: dict = {}  # on real data: memories before each turn of a window, by the base model
        self.pool: list[Episode] = []
        self.state: dict = {}  # memories of the pool's banks; a resumed run needs them, as the Manager has changed
        if args.algo == "sft":
            hosted = Endpoint.from_environment("MANAGER") if args.teacher == "endpoint" else None
            self.teacher = hosted and EndpointPolicy(CachedEndpoint(hosted, REPLIES))
            return
        self.score = make_scorer(args.reward, answer.REWARDS, args.judge, policy,
                                 load_policy=partial(Policy.load, device=args.device, dtype=args.dtype))
        if self.dialogues and not any(map(linked_questions, self.dialogues)):
            raise UsageError(f"--data {args.data}: no question names a turn as evidence, so no turn can be judged")

    # -------------------------------------------------------------------------------------------- episodes

    def batch(self, step: int) -> list[Episode]:
        """The `--batch-size` episodes of a step. A pool of episodes for `--refresh` steps is made at once."""
        first = step - (step - 1) % self.args.refresh
        if step == first or not self.pool:
            self.pool = self.make_pool(first)
        start = (step - first) * self.args.batch_size
        return self.pool[start:start + self.args.batch_size]

    def make_pool(self, first: int) -> list[Episode]:
        """The episodes of the steps `first`, ..., `first + refresh - 1`, drawn from the dialogues at random."""
        num_episodes = self.args.batch_size * max(1, min(self.args.refresh, self.args.steps - first + 1))
        count, seed = math.ceil(num_episodes / 4), self.args.seed * 100_000 + first  # about four turns of a dialogue
        dialogues = self.dialogues or data.load("synthetic", "train", count=count, seed=seed)
        turns = [(dialogue, i) for dialogue in dialogues for linked in [linked_questions(dialogue)]
                 for i, turn in enumerate(dialogue.turns) if turn.id in linked]
        rng, drawn = random.Random(f"{self.args.seed} {first}"), []
        while len(drawn) < num_episodes:  # a small data set is drawn repeatedly
            drawn += rng.sample(turns, min(len(turns), num_episodes - len(drawn)))
        self.base.read_facts(dialogues)
        drawn_ids = [first, *([dialogue.id, i] for dialogue, i in drawn)]
        if self.state.get("pool") != drawn_ids:  # equal in a run that is resumed between two refreshes
            self.state = {"pool": drawn_ids, "memories": self.banks_before(drawn)}
        return [self.make_episode(dialogue, i, memories)
                for (dialogue, i), memories in zip(drawn, self.state["memories"], strict=True)]

    def banks_before(self, turns: Sequence[tuple[Dialogue, int]]) -> list[list[tuple[str, str, str]]]:
        """The memories (text, speaker, time) before turn i of each dialogue, built from the `--window` turns before."""
        keys = [(dialogue.id, max(0, i - self.args.window)) for dialogue, i in turns]
        windows: dict[tuple[str, int], Dialogue] = {}  # {(dialogue id, first turn): the turns to read}
        for (dialogue, i), key in sorted(zip(turns, keys, strict=True), key=lambda pair: pair[0][1]):
            windows[key] = replace(dialogue, turns=dialogue.turns[key[1]:i], questions=())  # the longest comes last
        is_fixed = self.dialogues and self.args.bank == "base"  # training changes neither data nor base model
        histories = self.histories if is_fixed else {}
        missing = {key: window for key, window in windows.items() if len(histories.get(key, ())) <= len(window.turns)}
        if self.args.bank == "oracle":
            builds = manager.oracle_banks([*missing.values()], self.embedder, keep_history=True)
        else:
            builder = self.trained if self.args.bank == "self" else self.base
            builds = manager.build_banks(builder, [*missing.values()], self.embedder, keep_history=True)
        histories |= {key: [*build.history, build.bank] for key, build in zip(missing, builds, strict=True)}
        return [[(memory.text, memory.speaker, memory.time) for memory in histories[key][i - key[1]]]
                for (_, i), key in zip(turns, keys, strict=True)]

    def make_episode(self, dialogue: Dialogue, i: int, memories: Sequence[tuple[str, str, str]]) -> Episode:
        turn, bank = dialogue.turns[i], MemoryBank(self.embedder)
        for memory in memories:
            bank.add(*memory)
        facts = self.base.facts[dialogue.id, turn.id] or (turn.text,)  # the base model may overlook all of them
        case = manager.make_case(bank, turn, facts, self.args.top_k)
        prompt, case, dropped = manager.fit_case(self.policy, case, self.args.max_prompt_tokens)
        return Episode(prompt, case, bank, turn, linked_questions(dialogue)[turn.id], dialogue.speakers, dropped)

    # -------------------------------------------------------------------------------------------- rewards

    def rewards(self, episodes: list[Episode], groups: list) -> tuple[torch.Tensor, dict, list[dict]]:
        """Rewards (P, G), 0 for an invalid output; metrics of the step; readable samples."""
        outputs = {(i, g): edits for i, (episode, group) in enumerate(zip(episodes, groups, strict=True))
                   for g, completion in enumerate(group)
                   if (edits := manager.parse(completion.text, episode.case)) is not None}
        outcomes = self.apply_and_answer(episodes, outputs)
        rewards = torch.zeros(len(episodes), len(groups[0]))
        for place, outcome in outcomes.items():
            rewards[place] = reward_of(outcome.scores, self.args.linked)
        ops = Counter(edit.event for edits in outputs.values() for edit in edits)
        metrics = {"invalid_rate": 1 - len(outputs) / rewards.numel(),
                   "dropped": sum(episode.dropped for episode in episodes) / len(episodes),
                   "ops": {event: ops[event] for event in manager.EVENTS},
                   "bank_size": sum(outcome.bank_size for outcome in outcomes.values()) / max(1, len(outcomes))}
        samples = [{"prompt": manager.case_text(episode.case.speaker, episode.case.time, episode.case.shown(),
                                                episode.case.facts),
                    "completion": groups[i][0].text, "reward": rewards[i, 0].item(),
                    "parts": outcomes[i, 0].answers if (i, 0) in outcomes else "invalid"}
                   for i, episode in enumerate(episodes[:4])]
        return rewards, metrics, samples

    def apply_and_answer(self, episodes: list[Episode], outputs: dict) -> dict[tuple[int, int], Outcome]:
        """
        Apply the edits of each output, {(episode i, output g): edits}, to a fork of the episode's bank; answer the
        linked questions from it and score the answers. Equal edits of one episode share a fork.
        """
        forks = {}  # {(episode i, edits): bank}
        for (i, _), edits in outputs.items():
            if (i, tuple(edits)) not in forks:
                fork = forks[i, tuple(edits)] = episodes[i].bank.fork()
                manager.apply_edits(fork, edits, episodes[i].turn.speaker, episodes[i].turn.time)
        asked = [(key, question) for key in forks for question in episodes[key[0]].questions]
        answers = self.answers([(forks[key], question, episodes[key[0]].speakers) for key, question in asked])
        triples = [(question.text, text, question.answer) for (_, question), text in zip(asked, answers, strict=True)]
        outcomes = {key: Outcome(len(fork), [], []) for key, fork in forks.items()}
        for (key, _), (question, text, gold), score in zip(asked, triples, self.score(triples), strict=True):
            outcomes[key].scores.append(score)
            outcomes[key].answers.append({"question": question, "answer": text, "gold": gold, self.args.reward: score})
        return {(i, g): outcomes[i, tuple(edits)] for (i, g), edits in outputs.items()}

    def answers(self, asked: Sequence[tuple[MemoryBank, Question, tuple[str, str]]]) -> list[str]:
        """The frozen Answer Agent's answers to (bank, question, speakers) triples, in one batch."""
        args, adapter = self.args, "answer" if self.args.answer_adapter else None
        settings = answer.Settings(memories=args.memories, named_only=args.named_only, floor=args.floor,
                                   max_prompt_tokens=args.max_prompt_tokens, max_new_tokens=args.max_answer_tokens)
        prompts = [answer.build_prompt(self.policy, bank, question.text, speakers, settings)
                   for bank, question, speakers in asked]
        return [one.text for one in answer.generate_answers(self.policy, prompts, adapter, settings.max_new_tokens)]

    # -------------------------------------------------------------------------------------------- held-out evaluation

    def evaluate(self, when: str, step: int) -> list[dict]:
        """Build banks of held-out dialogues, then ask the final questions. Baselines are evaluated with "untrained"."""
        if not self.held_out:
            return []
        dialogues, is_synthetic = self.held_out, self.args.data == "synthetic"
        build = partial(manager.build_banks, self.trained if when == "trained" else self.base,
                        embedder=self.embedder, progress=f"held out: {when}")
        results = {when: self.ask_finally(dialogues, build(dialogues))}
        if is_synthetic:
            unseen = held_out_dialogues(self.args, "unseen")
            results[when]["em_unseen"] = self.ask_finally(unseen, build(unseen))["em"]
        if when == "untrained":
            baselines = {"add-all": manager.add_all_banks(dialogues, self.embedder, self.base.facts),
                         "noop": manager.noop_banks(dialogues, self.embedder)}
            if is_synthetic:
                baselines["oracle"] = manager.oracle_banks(dialogues, self.embedder)
            results |= {name: self.ask_finally(dialogues, builds) for name, builds in baselines.items()}
        return [{"step": step, "eval": name, **result} for name, result in results.items()]

    def ask_finally(self, dialogues: Sequence[Dialogue], builds: Sequence[manager.BankBuild]) -> dict:
        """The scores of the final questions, and a report on the banks that they were answered from."""
        asked = [(build.bank, question, dialogue.speakers) for build, dialogue in zip(builds, dialogues, strict=True)
                 for question in dialogue.final_questions()]
        pairs = [(text, question.answer) for text, (_, question, _) in zip(self.answers(asked), asked, strict=True)]
        return {**answer.mean_scores(pairs), **manager.bank_report(builds)}

    # -------------------------------------------------------------------------------------------- demonstrations (sft)

    def demonstrations(self) -> tuple[list[list[int]], list[list[int]], dict]:
        """Prompts, the teacher's completions, and a report. Edits of memories that a prompt dropped are left out."""
        prompts, completions, ops = [], [], Counter()
        decisions = self.teacher_decisions() if self.teacher else self.reference_decisions()
        for case, edits in decisions:
            prompt, case, _ = manager.fit_case(self.policy, case, self.args.max_prompt_tokens)
            if edits and {edit.id for edit in edits} <= {None, *(memory.id for memory in case.memories)}:
                text = manager.format_edits(edits, case, by_text=is_tiny(self.args.model))
                prompts.append(prompt)
                completions.append(self.policy.encode_reply(text))
                ops.update(edit.event for edit in edits)
        if not prompts:
            raise UsageError(f"nothing to clone: none of the teacher's {len(decisions)} outputs can be applied")
        return prompts, completions, {"invalid_rate": 1 - len(prompts) / len(decisions), "ops": dict(ops)}

    def reference_decisions(self) -> list[tuple[manager.Case, list[manager.Edit]]]:
        """The reference operations of the episodes that reinforcement learning would see."""
        return [(episode.case, manager.oracle_edits(episode.bank, episode.turn))
                for first in range(1, self.args.steps + 1, self.args.refresh) for episode in self.make_pool(first)]

    def teacher_decisions(self) -> list[tuple[manager.Case, list[manager.Edit] | None]]:
        """The edits of a hosted Manager for every turn, on the banks that it builds itself."""
        count = math.ceil(self.args.steps * self.args.batch_size / 20)  # synthetic dialogues of 20 turns
        dialogues = self.dialogues or data.load("synthetic", "train", seed=self.args.seed, count=count)
        self.base.read_facts(dialogues)
        teacher = replace(self.base, policy=self.teacher, settings=replace(self.base.settings, max_prompt_tokens=None))
        builds = manager.build_banks(teacher, dialogues, self.embedder, progress=f"teacher: {self.teacher.name}")
        return [decision for build in builds for decision in build.decisions]


def arguments(argv=None) -> argparse.Namespace:
    """The settings of a run, from the command line and the presets above."""
    groups = {algo: {f"algorithm: {algo}": algorithm.Config, "episodes": EpisodeFlags,
                     **({"teacher": TeacherFlags} if algo == "sft" else {"reward": ManagerRewardFlags})}
              for algo, algorithm in ALGORITHMS.items()}
    presets = {"data": REAL_DATA, "model": REAL_MODEL}
    args = parse_training_flags("manager", "Train the Memory Manager.", groups, presets, argv)
    if args.data != "synthetic" and args.algo == "sft" and args.teacher == "known":
        raise UsageError(f"--algo sft: --data {args.data} has no known operations to clone; add --teacher endpoint")
    if args.data != "synthetic" and args.bank == "oracle":
        raise UsageError("--bank oracle needs known operations, which only --data synthetic has")
    return args


def main(argv=None) -> None:
    args = arguments(argv)
    rank0_result(check_out, args)
    seed_everything(args.seed)
    policy = Policy.load(args.model, args.device, args.dtype, args.gradient_checkpointing)
    if args.answer_adapter:
        check_distill(args.answer_adapter, True)
        policy.load_adapter("answer", args.answer_adapter)
    policy.add_adapter("manager", args.rank, args.alpha)
    run_training(ALGORITHMS[args.algo], policy, ManagerTask(policy, args), args)
    if is_rank0():
        plot_run(args.out)


if __name__ == "__main__":
    exit_cleanly(distributed_main(main), resume_hint=RESUME_HINT)
