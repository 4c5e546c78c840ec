"""
Trains the Memory Manager (Memory-R1, arXiv 2508.19828, Alg. 1 and sec. 3.1) from one signal: are the questions that a
turn is linked to answered rightly once the bank has been edited?

    python train_manager.py --algo grpo                       # tiny model, synthetic talk, two CPU cores, minutes
    python train_manager.py --algo grpo --seed 1 --out runs/seed-1
    python train_manager.py --algo grpo --model Qwen/Qwen2.5-3B-Instruct --data locomo --lr 1e-5 --steps 200
    torchrun --nproc_per_node=4 train_manager.py --model ...  # a process for each of four GPUs: see distributed.py
    python train_manager.py --algo sft                        # the baseline Memory-SFT: clones the known operations

An episode is one turn: the bank as it was before the turn, the facts of the turn, the questions linked to it. Each of
G sampled outputs is carried out on a fork of the bank, a frozen answerer reads the fork, and the score of its answers
is the reward: their mean, or the lowest (`--linked`). All members of a group are asked the same questions.
"""
import argparse
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
from support.cli import Parser, add_shared_flags, exit_cleanly, fill_defaults
from support.distributed import GO_ON, divide, gather, is_main, on_main, share, together
from support.judge import Endpoint, Hosted, Kept, make_scorer
from support.plots import plot_run
from support.run import check_distill, check_out, seed_everything, train

REPLIES = "~/.cache/memory-r1/teacher.jsonl"  # of a hosted teacher


@dataclass(frozen=True)
class Episode:
    prompt: list[int]
    case: manager.Case
    bank: MemoryBank  # before the turn
    turn: Turn
    questions: tuple[Question, ...]
    speakers: tuple[str, str]
    dropped: int = 0  # memories left out of the prompt for want of room


def linked_questions(dialogue: Dialogue) -> dict[str, tuple[Question, ...]]:
    """
    {turn id: the questions its edit is judged by}. Where questions say when they are asked, those asked right after
    the turn; else (LoCoMo) those whose evidence the turn is. Turns without any are left out.
    """
    is_timed = any(question.asked for question in dialogue.questions)
    linked: dict[str, list[Question]] = {}
    for question in dialogue.questions:
        for turn in ([question.asked] if question.asked else [] if is_timed else question.evidence):
            linked.setdefault(turn, []).append(question)
    return {turn: tuple(questions) for turn, questions in linked.items()}


class ManagerTask:
    """The Manager's episodes, rewards and held-out evaluation (see `grpo.Task`); demonstrations (see `sft.Task`)."""

    def __init__(self, policy: Policy, args: argparse.Namespace):
        self.policy, self.args = policy, args
        self.embedder = make_embedder(args.embedder, str(policy.device))
        self.answer_adapter = "answer" if args.answer_adapter else None
        self.score = self.teacher = None
        if args.algo != "sft":
            self.score = make_scorer(args.reward, args.judge, policy, device=args.device, dtype=args.dtype)
        if args.algo == "sft" and args.teacher == "endpoint":
            self.teacher = Hosted(Kept(Endpoint.from_environment("MANAGER"), REPLIES))
        self.fixed = None if args.data == "synthetic" else data.load(args.data, "train")
        self.held_out = self.load_held_out("seen")
        self.facts: manager.Facts = {}
        self.histories: dict = {}  # banks after every turn, kept where no training will change them
        self.pool: list[Episode] = []
        self.state: dict = {}  # what the pool's banks hold: a Manager that has learned since would build others
        if args.algo != "sft" and self.fixed is not None and not any(map(linked_questions, self.fixed)):
            raise UsageError(f"--data {args.data}: no question names a turn as evidence, so no turn can be judged")

    def load_held_out(self, phrasing: str) -> list[Dialogue]:
        if self.args.data == "synthetic":
            return data.load("synthetic", "test", count=self.args.eval, seed=1, phrasing=phrasing)
        return data.load(self.args.data, "val")[:self.args.eval] if self.args.eval else []

    # -------------------------------------------------------------------------------------------- episodes

    def batch(self, step: int) -> list[Episode]:
        """`--batch-size` episodes. Every `--refresh` steps new ones are prepared, with banks of the current Manager."""
        first = (step - 1) // self.args.refresh * self.args.refresh + 1
        if step == first or not self.pool:
            self.pool = self.prepare(first)
        P = self.args.batch_size
        return self.pool[(step - first) * P:(step - first + 1) * P]

    def prepare(self, first: int) -> list[Episode]:
        """The episodes of the steps `first`, ..., `first + refresh - 1` (or the last), in the order they are used."""
        wanted = self.args.batch_size * max(1, min(self.args.refresh, self.args.steps - first + 1))
        rng = random.Random(f"{self.args.seed} {first}")
        chosen: list[tuple[Dialogue, int]] = []
        if self.fixed is None:  # some four turns of every conversation
            self.facts = {}
            dialogues = data.load("synthetic", "train", count=-(-wanted // 4), seed=self.args.seed * 100_000 + first)
        else:
            dialogues = self.fixed
        linked = {dialogue.id: linked_questions(dialogue) for dialogue in dialogues}
        places = [(dialogue, i) for dialogue in dialogues for i, turn in enumerate(dialogue.turns)
                  if turn.id in linked[dialogue.id]]
        while len(chosen) < wanted:  # a small data set is gone through again
            chosen += rng.sample(places, min(len(places), wanted - len(chosen)))
        manager.read_facts(self.policy, share(dialogues), self.args.extract, self.facts, self.args.max_new_tokens)
        self.facts = dict(gather([*self.facts.items()]))
        pool = [first, *([dialogue.id, i] for dialogue, i in chosen)]
        if self.state.get("pool") != pool:  # else the run is resumed between two refreshes
            self.state = {"pool": pool, "memories": self.memories_before(chosen)}
        return [self.episode(dialogue, i, memories, linked[dialogue.id][dialogue.turns[i].id])
                for (dialogue, i), memories in zip(chosen, self.state["memories"], strict=True)]

    def memories_before(self, places: list[tuple[Dialogue, int]]) -> list[list[tuple[str, str, str]]]:
        """
        What the bank holds before turn i of each dialogue, built from the `--window` turns before it (Alg. 1's temporal
        memory bank): by the Manager as it is (`--bank self`), the base model, or the known operations (`oracle`).
        """
        needed: dict[tuple[str, int], Dialogue] = {}  # (dialogue, first turn) -> the turns to read
        for dialogue, i in places:
            begin = max(0, i - self.args.window)
            longest = needed.get((dialogue.id, begin))
            if longest is None or len(longest.turns) < i - begin:
                needed[dialogue.id, begin] = Dialogue(dialogue.id, dialogue.speakers, dialogue.turns[begin:i], ())
        histories = self.histories if self.fixed is not None and self.args.bank == "base" else {}
        needed = {key: one for key, one in needed.items() if len(histories.get(key, ())) <= len(one.turns)}
        own = share(list(needed))
        adapter = {"self": "manager", "base": None, "oracle": None}[self.args.bank]
        built = self.build([needed[key] for key in own], adapter,
                           "oracle" if self.args.bank == "oracle" else "model", keep_history=True)
        histories.update(gather([(key, [*one.history, tuple(one.bank)]) for key, one in zip(own, built, strict=True)]))
        found = []
        for dialogue, i in places:
            begin = max(0, i - self.args.window)
            found.append([(one.text, one.speaker, one.time) for one in histories[dialogue.id, begin][i - begin]])
        return found

    def build(self, dialogues: Sequence[Dialogue], adapter: str | None, how: str = "model", **options):
        args = self.args
        return manager.build_banks(self.policy, dialogues, self.embedder, how, adapter, args.top_k, args.extract,
                                   args.max_prompt_tokens, args.max_new_tokens, cache=self.facts, **options)

    def episode(self, dialogue: Dialogue, i: int, memories, questions: tuple[Question, ...]) -> Episode:
        turn, bank = dialogue.turns[i], MemoryBank(self.embedder)
        for memory in memories:
            bank.add(*memory)
        facts = self.facts[dialogue.id, turn.id] or (turn.text,)  # a linked turn matters, whatever the extractor thinks
        case = manager.case_of(bank, turn, facts, self.args.top_k)
        ids, case, dropped = manager.fit_case(self.policy, case, self.args.max_prompt_tokens)
        return Episode(ids, case, bank, turn, questions, dialogue.speakers, dropped)

    # -------------------------------------------------------------------------------------------- demonstrations

    def demonstrations(self):
        """The teacher's decisions as prompts and completions; what cannot be carried out as shown is left out."""
        args, prompts, completions, ops = self.args, [], [], Counter()
        decisions = on_main(self.hosted_decisions) if self.teacher else self.known_decisions()
        for case, edits in decisions:
            ids, case, _ = manager.fit_case(self.policy, case, args.max_prompt_tokens)
            shown = {None, *(memory.id for memory in case.memories)}
            if edits and all(edit.id in shown for edit in edits):
                text = manager.write(edits, case, by_text=is_tiny(args.model))
                prompts.append(ids)
                completions.append(self.policy.encode_reply(text))
                ops.update(edit.event for edit in edits)
        if not prompts:
            raise UsageError(f"nothing to clone: none of the teacher's {len(decisions)} outputs can be carried out")
        return prompts, completions, {"invalid_rate": 1 - len(prompts) / len(decisions), "ops": dict(ops)}

    def known_decisions(self) -> list[tuple[manager.Case, list[manager.Edit]]]:
        """The known operations of the very episodes that reinforcement would see."""
        firsts = range(1, self.args.steps + 1, self.args.refresh)
        return [(episode.case, manager.known_edits(episode.bank, episode.turn))
                for first in firsts for episode in self.prepare(first)]

    def hosted_decisions(self) -> list[tuple[manager.Case, list[manager.Edit] | None]]:
        """What a hosted Manager does with every turn, on the banks that it makes itself."""
        args = self.args
        dialogues = self.fixed or data.load("synthetic", "train", seed=args.seed,
                                            count=-(-args.steps * args.batch_size // 20))  # of twenty turns each
        manager.read_facts(self.policy, dialogues, args.extract, self.facts, args.max_new_tokens)
        built = manager.build_banks(self.teacher, dialogues, self.embedder, "model", None, args.top_k, cache=self.facts,
                                    max_new_tokens=args.max_new_tokens, progress=f"teacher: {self.teacher.name}")
        return [decision for one in built for decision in one.decisions]

    # -------------------------------------------------------------------------------------------- rewards

    def rewards(self, episodes, groups):
        """The score of the frozen answerer on each candidate's bank; 0 for an output that cannot be carried out."""
        candidates, rewards, parts = [], torch.zeros(len(episodes), len(groups[0])), {}
        for i, (episode, group) in enumerate(zip(episodes, groups, strict=True)):
            for g, completion in enumerate(group):
                edits = manager.parse(completion.text, episode.case)
                if edits is not None:
                    candidates.append((i, g, edits))
        answers, sizes = self.answers([(episodes[i], edits) for i, _, edits in candidates])
        scored = iter(divide(self.score, [(question.text, text, question.answer)
                                          for (i, _, _), given in zip(candidates, answers, strict=True)
                                          for text, question in zip(given, episodes[i].questions, strict=True)]))
        for (i, g, _), given in zip(candidates, answers, strict=True):
            scores = [next(scored) for _ in given]
            rewards[i, g] = sum(scores) / len(scores) if self.args.linked == "mean" else min(scores)
            parts[i, g] = [{"question": question.text, "answer": text, "gold": question.answer, self.args.reward: one}
                           for question, text, one in zip(episodes[i].questions, given, scores, strict=True)]
        num_outputs = rewards.numel()
        ops = Counter(edit.event for _, _, edits in candidates for edit in edits)
        extra = {"invalid_rate": 1 - len(candidates) / num_outputs,
                 "dropped": sum(episode.dropped for episode in episodes) / len(episodes),
                 "ops": {event: ops[event] for event in manager.EVENTS}, "bank_size": sum(sizes) / max(1, len(sizes))}
        samples = [{"prompt": manager.case_text(episode.case.speaker, episode.case.time, episode.case.shown(),
                                                episode.case.facts), "completion": group[0].text,
                    "reward": rewards[i, 0].item(), "parts": parts.get((i, 0), "invalid")}
                   for i, (episode, group) in enumerate(zip(episodes[:4], groups, strict=False))]
        return rewards, extra, samples

    def answers(self, candidates) -> tuple[list[list[str]], list[int]]:
        """The frozen answerer's answers to all linked questions on every candidate's bank, and the banks' sizes."""
        candidates = share(candidates)
        sizes, asked = {}, {}  # by episode and edits: siblings that edit alike share bank and answers
        keys = [(id(episode), tuple(edits)) for episode, edits in candidates]
        for key, (episode, edits) in zip(keys, candidates, strict=True):
            if key not in asked:
                fork = episode.bank.fork()
                manager.apply(fork, edits, episode.turn.speaker, episode.turn.time)
                sizes[key] = len(fork)
                asked[key] = [self.ask(fork, question, episode.speakers) for question in episode.questions]
        flat = iter(answer.answer_all(self.policy, [one for some in asked.values() for one in some],
                                      self.answer_adapter, self.args.max_answer_tokens))
        texts = {key: [next(flat).text for _ in some] for key, some in asked.items()}
        return gather([texts[key] for key in keys]), gather([sizes[key] for key in keys])

    def ask(self, bank: MemoryBank, question: Question, speakers) -> answer.Asked:
        args = self.args
        return answer.ask(self.policy, bank, question.text, speakers, max(1, args.memories // 2), True,
                          args.named_only, args.floor, args.max_prompt_tokens)

    # -------------------------------------------------------------------------------------------- held out

    def evaluate(self, when: str, step: int) -> list[dict]:
        """Banks built from empty on held-out conversations, all asked at the end; baselines with "untrained"."""
        if not self.held_out:
            return []
        adapter = "manager" if when == "trained" else None
        results = [self.held_out_result(when, step, "model", adapter)]
        if self.args.data == "synthetic":
            unseen = self.held_out_result(when, step, "model", adapter, self.load_held_out("unseen"))
            results[0]["em_unseen"] = unseen["em"]
        if when == "untrained":
            baselines = ["add-all", "noop", *(["oracle"] if self.args.data == "synthetic" else [])]
            results += [self.held_out_result(name, step, how=name) for name in baselines]
        return results

    def held_out_result(self, name: str, step: int, how: str, adapter: str | None = None, dialogues=None) -> dict:
        dialogues = dialogues or self.held_out
        built = self.build(dialogues, adapter, how, progress=f"held out: {name}")
        questions = [(one.bank, question, dialogue.speakers) for one, dialogue in zip(built, dialogues, strict=True)
                     for question in dialogue.final_questions()]
        answers = answer.answer_all(self.policy, [self.ask(*item) for item in questions], self.answer_adapter,
                                    self.args.max_answer_tokens)
        pairs = [(given.text, question.answer) for given, (_, question, _) in zip(answers, questions, strict=True)]
        return {"step": step, "eval": name, **answer.mean_scores(pairs), **manager.bank_report(built)}


def arguments(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0].strip(), usage="python %(prog)s [flags]",
                    epilog="example: python train_manager.py --algo grpo --steps 40 --out runs/mine")
    add_shared_flags(parser, "manager")
    own = parser.add_argument_group("the Manager's task")
    own.add_argument("--window", type=int, default=50, help="turns the bank before a turn is built from (50)")
    own.add_argument("--top-k", type=int, help="related memories shown to the Manager (4; real data 10)")
    own.add_argument("--bank", choices=("self", "base", "oracle"),
                     help="who builds the bank before a turn: the Manager as it is, the base model, or the known "
                          "operations (synthetic: oracle, real data: base)")
    own.add_argument("--answer-adapter", metavar="DIR", help="adapter of the frozen answerer (none: the base model)")
    own.add_argument("--max-answer-tokens", type=int, help="of its answers (48; other models 256)")
    own.add_argument("--linked", choices=("mean", "all"),
                     help="reward: the mean of the linked questions' scores, or for all the lowest: 1 only if all are "
                          "right (synthetic: all, real data: mean)")
    own.add_argument("--refresh", type=int, default=5, help="steps until banks are built anew (5)")
    own.add_argument("--teacher", choices=("known", "endpoint"), default="known",
                     help="sft: whom to clone: the known operations, or a hosted model as Manager (MANAGER_URL, "
                          "MANAGER_MODEL, MANAGER_API_KEY in the environment; its replies are kept) (known)")
    args = fill_defaults(parser.parse_args(argv))
    if args.algo == "sft" and args.teacher == "known" and args.data != "synthetic":
        raise UsageError(f"--algo sft: --data {args.data} has no known operations to clone; add --teacher endpoint")
    if args.bank == "oracle" and args.data != "synthetic":
        parser.error("--bank oracle needs known operations, which only --data synthetic has")
    return args


def main(argv=None) -> None:
    args = arguments(argv)
    on_main(check_out, args)
    seed_everything(args.seed)
    policy = Policy.load(args.model, args.device, args.dtype, args.gradient_checkpointing)
    if args.answer_adapter:
        check_distill(args.answer_adapter)
        policy.load_adapter("answer", args.answer_adapter)
    policy.add_adapter("manager", args.rank, args.alpha)
    train({"grpo": grpo, "ppo": ppo, "sft": sft}[args.algo], policy, ManagerTask(policy, args), args)
    if is_main():
        plot_run(args.out)


if __name__ == "__main__":
    exit_cleanly(together(main), go_on=GO_ON)
