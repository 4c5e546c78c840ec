"""
Train the Answer Agent (Memory-R1, arXiv 2508.19828, Alg. 4 and sec. 3.2). Most memories retrieved for a question are
irrelevant. In one completion the agent names the relevant ones (memory distillation) and answers.

    python train_answer.py --algo grpo --manager-adapter runs/manager-grpo     # banks built by that Manager
    python train_answer.py --algo grpo                                         # banks built by the base model
    python train_answer.py --algo grpo --no-distill --out runs/answer-plain    # answers without distillation
    python train_answer.py --algo grpo --model Qwen/Qwen2.5-0.5B-Instruct --data locomo      # raw turns as memories
    python train_answer.py --algo sft                                          # clone correct answers
    python train_answer.py --algo grpo --init-adapter runs/answer-sft          # start from what SFT has learned

One episode is one question about a dialogue, answered from its finished bank:
1. build the banks of all dialogues once, before training, with the frozen Manager      AnswerTask.build
2. retrieve memories for a question and write them into the prompt                      AnswerTask.make_episode
3. sample G outputs                                                                     Policy.sample
4. reward each output by the score of its answer, whatever it selected                  AnswerTask.rewards
"""
import support.installed  # noqa: F401  # isort: skip  names missing packages
import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import answer
import data
import grpo
import manager
import ppo
import sft
from data import Dialogue, Question, UsageError, is_tiny
from memory import MemoryBank, make_embedder
from policy import Policy
from support import cli
from support.cli import flag, from_args
from support.distributed import RESUME_HINT, distributed_main, rank0_result
from support.held_out import held_out_records
from support.judge import make_scorer
from support.loop import epoch_indices, make_adapter, run_training
from support.run import check_adapter, check_out

ALGORITHMS = {"grpo": grpo, "ppo": ppo, "sft": sft}
NUM_DIALOGUES = 24  # synthetic dialogues to train on, with about 50 questions each
NUM_TURNS = 100  # turns of a synthetic dialogue, which give about 15 memories of each speaker
ANSWER_AGENT = {  # defaults of flags where they differ from those of the Manager
    "steps": 40,  # enough for the reward to level off
    "batch_size": 16,  # longer prompts and completions
    "minibatch": 4,  # four optimizer steps on a batch
    "lr": {"grpo": 1e-3, "ppo": 1e-3, "sft": 3e-4},  # more steps, so smaller ones; SFT at 1e-3 selects nothing
    "memories": 20,  # most of them irrelevant, so that selecting is worth learning
    "named_only": False,  # as in the paper
    "max_new_tokens": 200,  # a verdict on each memory, then the answer
    "eval": 8,  # about 400 questions
}
SMALL_MODEL = {  # for real models below 1e9 parameters
    **cli.SMALL_MODEL,
    "max_new_tokens": 40,  # six words, with room for a sentence
    "max_operation_tokens": 256,  # operations for all facts of a turn
    "group_size": 16,  # short answers cost little next to their prompt; also for PPO, so that both see as many
    "batch_size": 8,  # 128 answers: about a minute a step on one CPU core
    "steps": 40,  # two passes through the 152 questions of the training conversation
}
LARGE_MODEL = {  # for larger models; not measured here, for want of a GPU
    "reward": "em",  # as in the paper
    "max_prompt_tokens": 4096,  # 60 memories and the instruction
    "max_new_tokens": 256,  # the numbers of the relevant memories, then the answer
    "max_operation_tokens": 512,  # operations for all facts of a turn
    "group_size": 8,  # answers cost little next to their prompt; also for PPO, so that both see as many
    "batch_size": 16,  # 128 answers, from a tenth of the training conversation's questions
    "minibatch": 4,  # four optimizer steps on a batch
    "steps": {"grpo": 100, "ppo": 100, "sft": 50},  # the authors evaluated their agents after 30 to 120, SFT 50 to 60
    "lr": 2e-5,  # larger models need smaller steps
}


@dataclass(frozen=True)
class EpisodeFlags:
    bank: str | None = flag(None, "what builds the banks: a Manager (manager; default), or turns: the raw turns are "
                            "the memories (default for small models without --manager-adapter)",
                            choices=("manager", "turns"))
    manager_adapter: str | None = flag(None, "run or adapter of the frozen Manager (none: base model)", metavar="DIR")
    max_operation_tokens: int = flag(80, "longest output of the Manager in tokens", least=1)
    distill: bool = flag(True, "select the relevant memories before answering")


@dataclass(frozen=True)
class BankQuestion:
    """A question and the bank to answer it from."""
    question: Question
    bank: MemoryBank
    speakers: tuple[str, str]
    sources: dict[int, set[str]]  # memory id -> ids of the turns that it was written from


@dataclass(frozen=True)
class Episode(answer.AnswerPrompt):
    item: BankQuestion

    def evidence(self) -> set[int]:
        """Numbers of the shown memories that were written from a turn with evidence for the answer."""
        turns = set(self.item.question.evidence)
        return {i for i, memory in enumerate(self.shown, 1) if turns & self.item.sources[memory.id]}

    def implies_answer(self, literally: bool) -> bool:
        """Whether all turns with evidence are in shown memories and, `literally`, each part of the answer too."""
        question, found = self.item.question, [self.shown[i - 1] for i in self.evidence()]
        if question.answer == "none":  # in synthetic data: the absence of a memory is the evidence
            return True
        turns, told = [self.item.sources[memory.id] for memory in found], [f"{one.time} {one.text}" for one in found]
        parts = question.answer.split(" and ") if literally else []
        return set() < set(question.evidence) <= set().union(*turns) and all(part in " ".join(told) for part in parts)


def output_metrics(episodes: Sequence[Episode], answers: Sequence[answer.Answer]) -> dict[str, float | None]:
    """Mean numbers of shown and selected memories; fractions of the selected that are evidence, of invalid outputs."""
    selected = [{*episode.selected_by(given)} for episode, given in zip(episodes, answers, strict=True)]
    num_selected, count = sum(map(len, selected)), len(answers)
    num_evidence = sum(len(own & episode.evidence()) for own, episode in zip(selected, episodes, strict=True))
    return {"shown": sum(len(episode.shown) for episode in episodes) / count, "selected": num_selected / count,
            "evidence": num_evidence / num_selected if num_selected else None,
            "invalid_rate": sum(not given.is_valid for given in answers) / count}


class AnswerTask:
    """Episodes, rewards and held-out evaluation of the Answer Agent. See Task in support/loop.py."""
    state: dict = {}  # a batch depends on nothing but seed and step
    played = None  # an output has no trajectory: the bank does not change

    def __init__(self, policy: Policy, args: argparse.Namespace):
        self.policy, self.args, self.settings = policy, args, from_args(answer.Settings, args)
        if args.algo == "sft":
            self.teacher = cli.make_teacher(args)
        else:
            self.score = make_scorer(policy, args, answer.REWARDS)
        self.read_dialogues()

    def read_dialogues(self) -> None:
        """Collect the questions about all dialogues, and the banks to answer them from."""
        args, sizes = self.args, {"count": NUM_DIALOGUES, "seed": self.args.seed, "num_turns": NUM_TURNS}
        self.questions, _ = self.build(data.load(args.data, "train", **sizes if args.data == "synthetic" else {}),
                                       "train")
        self.read_held_out()
        if not self.questions:
            raise UsageError(f"--data {args.data}: there is no question to train on")

    def read_held_out(self) -> None:
        self.dialogues = cli.held_out_dialogues(self.args, num_turns=NUM_TURNS)
        self.held_out, self.builds = self.build(self.dialogues, "held out")
        self.bank_report = manager.bank_report(self.builds) if self.builds else {}

    def build(self, dialogues: list[Dialogue], name: str) -> tuple[list[BankQuestion], list[manager.BankBuild]]:
        """The frozen Manager's banks, and all questions that are asked at the end of the dialogues."""
        embedder = make_embedder(self.args.embedder, str(self.policy.device))
        if self.args.bank == "turns":
            builds = manager.turn_banks(dialogues, embedder)
        else:
            settings = from_args(manager.Settings, self.args, max_new_tokens=self.args.max_operation_tokens)
            agent = manager.Manager(self.policy, "manager" if self.args.manager_adapter else None, settings)
            builds = manager.build_banks(agent, dialogues, embedder, f"{name}: reading {len(dialogues)} dialogues")
        return [BankQuestion(question, build.bank, dialogue.speakers, build.sources)
                for build, dialogue in zip(builds, dialogues, strict=True)
                for question in dialogue.final_questions()], builds

    def batch(self, step: int) -> list[Episode]:
        """The `--batch-size` episodes of a step. Every question appears once before any appears again."""
        indices = epoch_indices(step, len(self.questions), batch_size=self.args.batch_size, seed=self.args.seed)
        return [self.make_episode(self.questions[i], self.num_memories(step)) for i in indices]

    def num_memories(self, step: int) -> int:
        """The number of memories to show in a training step. A curriculum would start with few."""
        return self.args.memories

    def make_episode(self, item: BankQuestion, memories: int) -> Episode:
        settings, question = replace(self.settings, memories=memories), item.question
        prompt = answer.build_prompt(self.policy, item.bank, question.text, item.speakers, settings, question.preface)
        return Episode(**vars(prompt), item=item)

    def rewards(self, episodes: list[Episode], groups: list) -> tuple[torch.Tensor, dict, list[dict]]:
        """Rewards (P, G): the scores of the answers, 0 without one; metrics of the step; readable samples."""
        repeated = [episode for episode, group in zip(episodes, groups, strict=True) for _ in group]
        answers = [replace(answer.parse(one.text), output=one.text) for group in groups for one in group]
        scores = self.score([(episode.item.question.text, given.text, episode.item.question.answer)
                             for episode, given in zip(repeated, answers, strict=True)])
        rewards = torch.tensor(scores).reshape(len(groups), -1)
        metrics = {"dropped": sum(episode.dropped for episode in episodes) / len(episodes),
                   **output_metrics(repeated, answers)}
        firsts = [*zip(episodes, answers[::rewards.shape[1]], rewards[:, 0].tolist(), strict=True)]
        return rewards, metrics, [self.sample(*first) for first in firsts[:4]]

    def sample(self, episode: Episode, given: answer.Answer, reward: float) -> dict:
        """A readable record of an output, for samples.jsonl."""
        question = episode.item.question
        memories = answer.by_speaker(episode.shown, episode.item.speakers)
        return {"prompt": answer.case_text(memories, question.text, self.settings.distill, is_tiny(self.args.model),
                                           question.preface),
                "completion": given.output, "reward": reward,
                "parts": {"answer": given.text, "gold": question.answer, "selected": given.selected,
                          "evidence": sorted(episode.evidence())}}

    def demonstrations(self) -> tuple[list[list[int]], list[list[int]], dict]:
        """Prompts, the teacher's completions, a report. Left out: answers that are invalid."""
        count = min(len(self.questions), self.args.steps * self.args.batch_size)
        chosen = epoch_indices(1, len(self.questions), batch_size=count, seed=self.args.seed)
        episodes = [self.make_episode(self.questions[i], self.args.memories) for i in chosen]
        form = {"distill": self.args.distill, "tiny": is_tiny(self.args.model)}
        pairs = [(episode.prompt, answer.format_answer(given, episode.shown, **form))
                 for episode, given in zip(episodes, self.teacher_answers(episodes), strict=True) if given.is_valid]
        if not pairs:
            raise UsageError(f"nothing to clone: none of the teacher's {count} answers can be used")
        report = {"invalid_rate": 1 - len(pairs) / count}
        return [prompt for prompt, _ in pairs], [self.policy.encode_reply(text) for _, text in pairs], report

    def teacher_answers(self, episodes: Sequence[Episode]) -> list[answer.Answer]:
        """
        Answers to clone: a hosted model's, or the correct ones, which select the memories with evidence. With
        distillation, answers without a selection are invalid, and correct ones if some evidence is not shown.
        """
        if self.teacher:
            settings = replace(self.settings, max_prompt_tokens=None)
            prompts = [answer.prompt_for(self.teacher, episode.shown, episode.item.question.text,
                                         episode.item.speakers, settings, episode.item.question.preface)
                       for episode in episodes]
            answers = answer.generate_answers(self.teacher, prompts, None, settings.max_new_tokens)
            selections = [episode.selected_by(given) for episode, given in zip(episodes, answers, strict=True)]
            return [replace(given, selected=own, is_valid=given.is_valid and (bool(own) or not settings.distill))
                    for given, own in zip(answers, selections, strict=True)]
        literally = self.args.data == "synthetic"  # only there answers consist of words of the memories
        return [answer.Answer(episode.item.question.answer, tuple(sorted(episode.evidence())),
                              not self.args.distill or episode.implies_answer(literally)) for episode in episodes]

    def evaluate(self, when: str, step: int) -> list[dict]:
        """Answer all questions about the held-out dialogues greedily, with all `--memories`."""
        if not self.held_out:
            return []
        episodes = [self.make_episode(item, self.args.memories) for item in self.held_out]
        adapter = "answer" if when == "trained" or self.args.init_adapter else None
        answers = answer.generate_answers(self.policy, episodes, adapter, self.settings.max_new_tokens)
        pairs = [(given.text, item.question.answer) for given, item in zip(answers, self.held_out, strict=True)]
        return [{"step": step, "eval": when, **answer.mean_scores(pairs), **self.bank_report,
                 **output_metrics(episodes, answers),
                 "dialogues": held_out_records(self.dialogues, self.builds, zip(episodes, answers, strict=True),
                                               answer.REWARDS)}]


def arguments(argv=None) -> argparse.Namespace:
    """The settings of a run, from the command line and the presets above."""
    presets = {"agent": ANSWER_AGENT, "data": cli.REAL_DATA, "small": SMALL_MODEL, "large": LARGE_MODEL}
    groups = cli.flag_groups(ALGORITHMS, EpisodeFlags)
    args = cli.parse_training_flags("answer", "Train the Answer Agent.", groups, presets, argv)
    if args.bank == "turns" and args.manager_adapter:
        raise UsageError("--bank turns has no Manager: leave it out, or --manager-adapter")
    if not args.bank and not args.manager_adapter and args.size == "small":
        args.bank = args.presets["bank"] = "turns"  # banks of an untrained small Manager are no better: F1 .29, not .32
    args.bank = args.bank or "manager"
    return args


def main(argv=None) -> None:
    args = arguments(argv)
    rank0_result(check_out, args)
    cli.seed_everything(args.seed)
    policy = Policy.load(args.model, args.device, args.dtype, args.gradient_checkpointing)
    if args.manager_adapter:
        check_adapter(args.manager_adapter, "manager")
        policy.load_adapter("manager", args.manager_adapter)
    make_adapter(policy, args)
    cli.announce(args)
    run_training(ALGORITHMS[args.algo], policy, AnswerTask(policy, args), args)


if __name__ == "__main__":
    cli.exit_cleanly(distributed_main(main), resume_hint=RESUME_HINT)
