"""
Trains the Answer Agent (Memory-R1, arXiv 2508.19828, Alg. 4 and sec. 3.2): it is shown the memories retrieved for a
question, many of them beside the point, selects those that matter and answers, in one generation.

    python train_answer.py --algo grpo --manager-adapter runs/manager-grpo     # banks kept by that Manager
    python train_answer.py --algo grpo                                         # banks kept by the base model
    python train_answer.py --algo grpo --no-distill --out runs/answer-plain    # answers without selecting

An episode is one question to the finished bank of a conversation. The Manager is frozen: every bank is built once,
before the first step. The reward judges the answer alone; nothing rewards the selection but what it does for that.
"""
import argparse
from dataclasses import dataclass
from functools import cached_property

import torch

import answer
import data
import grpo
import manager
import ppo
from data import Dialogue, Question, UsageError
from memory import MemoryBank, make_embedder
from policy import Policy
from support.cli import Parser, add_shared_flags, exit_cleanly, fill_defaults
from support.distributed import GO_ON, divide, is_main, on_main, together
from support.judge import make_scorer
from support.plots import plot_run
from support.run import batch_of, check_out, seed_everything, train

NUM_TURNS = 100  # of a synthetic conversation: about fifteen memories of each speaker
NUM_DIALOGUES = 24  # of them to train on, with some fifty questions each


@dataclass(frozen=True)
class Place:
    """A question, and the bank that is to answer it."""
    question: Question
    bank: MemoryBank
    speakers: tuple[str, str]
    sources: dict[int, set[str]]  # memory id -> the turns it was written from


@dataclass(frozen=True)
class Episode:
    prompt: list[int]
    place: Place
    asked: answer.Asked

    @cached_property
    def evidence(self) -> frozenset[int]:
        """Numbers of the memories shown that were written from a turn the question rests on."""
        turns = set(self.place.question.evidence)
        return frozenset(i for i, memory in enumerate(self.asked.shown, 1) if turns & self.place.sources[memory.id])


def selection(episodes, answers) -> dict[str, float]:
    """What was shown and selected on average, and the share of the selected memories that are evidence."""
    chosen = [{i for i in given.selected if 1 <= i <= len(episode.asked.shown)}
              for episode, given in zip(episodes, answers, strict=True)]
    num_selected = sum(map(len, chosen))
    hits = sum(len(one & episode.evidence) for one, episode in zip(chosen, episodes, strict=True))
    return {"shown": sum(len(episode.asked.shown) for episode in episodes) / len(episodes),
            "selected": num_selected / len(episodes), "evidence": hits / num_selected if num_selected else None}


class AnswerTask:
    """The Answer Agent's episodes, rewards and held-out evaluation (see `grpo.Task`)."""
    state: dict = {}  # a batch depends on seed and step alone

    def __init__(self, policy: Policy, args: argparse.Namespace):
        self.policy, self.args = policy, args
        self.embedder = make_embedder(args.embedder, str(policy.device))
        self.manager_adapter = "manager" if args.manager_adapter else None
        self.score = make_scorer(args.reward, args.judge, policy, device=args.device, dtype=args.dtype)
        if args.data == "synthetic":
            train = data.load("synthetic", "train", count=NUM_DIALOGUES, seed=args.seed, num_turns=NUM_TURNS)
            held_out = data.load("synthetic", "test", count=args.eval, seed=1, num_turns=NUM_TURNS)
        else:
            train = data.load(args.data, "train")
            held_out = data.load(args.data, "val")[:args.eval] if args.eval else []
        self.places = self.build(train, "train")[0]
        self.held_out, built = self.build(held_out, "held out")
        self.about_banks = manager.bank_report(built) if built else {}
        if not self.places:
            raise UsageError(f"--data {args.data}: there is no question to train on")

    def build(self, dialogues: list[Dialogue], name: str) -> tuple[list[Place], list[manager.Built]]:
        """The finished banks of the frozen Manager, and every question that is asked of them at the end."""
        args = self.args
        built = manager.build_banks(
            self.policy, dialogues, self.embedder, "model", self.manager_adapter, args.top_k, args.extract,
            args.max_prompt_tokens, args.max_operation_tokens, progress=f"{name}: reading {len(dialogues)} dialogues")
        return [Place(question, one.bank, dialogue.speakers, one.sources)
                for one, dialogue in zip(built, dialogues, strict=True)
                for question in dialogue.final_questions()], built

    # -------------------------------------------------------------------------------------------- episodes

    def batch(self, step: int) -> list[Episode]:
        """`--batch-size` questions; all come up once before any comes up again."""
        return [self.episode(self.places[i], self.num_shown(step))
                for i in batch_of(step, len(self.places), self.args)]

    def num_shown(self, step: int) -> int:
        """Memories shown: over the first `--grow` steps from four up to `--memories`."""
        share = min(1.0, step / self.args.grow) if self.args.grow else 1.0
        return round(4 + share * (self.args.memories - 4)) if self.args.memories > 4 else self.args.memories

    def episode(self, place: Place, memories: int) -> Episode:
        args = self.args
        asked = answer.ask(self.policy, place.bank, place.question.text, place.speakers, max(1, memories // 2),
                           args.distill, args.named_only, args.floor, args.max_prompt_tokens)
        return Episode(asked.prompt, place, asked)

    # -------------------------------------------------------------------------------------------- rewards

    def rewards(self, episodes, groups):
        """The score of each answer; 0 for an output without one."""
        given = [[answer.parse(completion.text) for completion in group] for group in groups]
        asked = [(episode, one) for episode, group in zip(episodes, given, strict=True) for one in group]
        scores = divide(self.score, [(episode.place.question.text, one.text, episode.place.question.answer)
                                     for episode, one in asked])
        rewards = torch.tensor(scores).reshape(len(groups), -1)
        invalid = sum(not one.is_valid for _, one in asked) / len(asked)
        extra = {"invalid_rate": invalid, "dropped": sum(episode.asked.dropped for episode in episodes) / len(episodes),
                 **selection([episode for episode, _ in asked], [one for _, one in asked])}
        samples = [{"prompt": answer.case_text(answer.by_speaker(episode.asked.shown, episode.place.speakers),
                                               episode.place.question.text, self.args.distill),
                    "completion": group[0].text, "reward": rewards[i, 0].item(),
                    "parts": {"answer": given[i][0].text, "gold": episode.place.question.answer,
                              "selected": given[i][0].selected, "evidence": sorted(episode.evidence)}}
                   for i, (episode, group) in enumerate(zip(episodes[:4], groups, strict=False))]
        return rewards, extra, samples

    # -------------------------------------------------------------------------------------------- held out

    def evaluate(self, when: str, step: int) -> list[dict]:
        """Every question about the held-out banks, greedily, with all `--memories`."""
        if not self.held_out:
            return []
        args, episodes = self.args, [self.episode(place, self.args.memories) for place in self.held_out]
        answers = answer.answer_all(self.policy, [episode.asked for episode in episodes],
                                    "answer" if when == "trained" else None, args.max_new_tokens)
        pairs = [(given.text, place.question.answer) for given, place in zip(answers, self.held_out, strict=True)]
        return [{"step": step, "eval": when, **answer.mean_scores(pairs), **self.about_banks,
                 "invalid_rate": sum(not given.is_valid for given in answers) / len(answers),
                 **selection(episodes, answers)}]


def arguments(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0].strip(), usage="python %(prog)s [flags]",
                    epilog="example: python train_answer.py --manager-adapter runs/manager-grpo")
    add_shared_flags(parser, "answer")
    own = parser.add_argument_group("the Answer Agent's task")
    own.add_argument("--manager-adapter", metavar="DIR",
                     help="a Manager's run or adapter; it builds the banks (none: the base model)")
    own.add_argument("--distill", action=argparse.BooleanOptionalAction, default=True,
                     help="write down which memories matter before the answer (yes)")
    own.add_argument("--grow", type=int, default=0, metavar="STEPS",
                     help="show four memories at first and all of them from this step on (0: all from the first)")
    own.add_argument("--top-k", type=int, help="related memories shown to the Manager (4; real data 10)")
    own.add_argument("--max-operation-tokens", type=int,
                     help="of the frozen Manager's output (80; other models 512)")
    parser.set_defaults(steps=40, batch_size=16, minibatch=4)
    args = parser.parse_args(argv)
    if args.algo == "sft":
        raise UsageError("--algo sft clones a Manager, as the paper does: give it to train_manager.py")
    return fill_defaults(
        args, by_data={"memories": (20, 60), "named_only": (False, False), "eval": (8, 1)},
        by_model={"max_new_tokens": (200, 256), "max_operation_tokens": (80, 512), "lr": (1e-3, 2e-5)})


def main(argv=None) -> None:
    args = arguments(argv)
    on_main(check_out, args)
    seed_everything(args.seed)
    policy = Policy.load(args.model, args.device, args.dtype, args.gradient_checkpointing)
    if args.manager_adapter:
        policy.load_adapter("manager", args.manager_adapter)
    policy.add_adapter("answer", args.rank, args.alpha)
    train({"grpo": grpo, "ppo": ppo}[args.algo], policy, AnswerTask(policy, args), args)
    if is_main():
        plot_run(args.out)


if __name__ == "__main__":
    exit_cleanly(together(main), go_on=GO_ON)
