"""
Trajectories of the Memory Manager: whole conversations, as in Memory-R2 (LoGo-GRPO, arXiv 2605.21768). Their outputs
(global part) join the first step of each refresh; the episodes of train_manager.py (local part) are in every step.

1. sample N trajectories of a conversation in lockstep, each from an empty bank          ManagerTask.play
2. reward of an output at turn i by the final bank M of its trajectory                   outcomes
       r = mean of f(q, M) - lam max(0, W(M) / D - 0.7)
   f: score of an answer. W, D: words of the bank and of all turns. q: the questions whose last evidence is turn i
   (`--outcome turn`; an output at a turn without one is left out), or all (`--outcome whole`)
3. GRPO compares the outputs at turn i of one conversation; for PPO r is the terminal reward   grpo.labelled_advantages
4. multiply the advantages of each part by its weight; one update with all rows          grpo.make_rollouts

Trajectories differ in their earlier banks, so the edit at turn 2 may be credited for a difference at turn 1. The
outputs of an episode start from one bank and differ in one turn only. `--bank trajectory` takes it from a trajectory.

Memory-R2's code samples its local outputs greedily and asks all questions so far; here they are sampled, and the linked
questions are asked. Both concatenate the parts, so with --loss-mean token a part weighs as much as its share of the
tokens; in Memory-R2 the local part has an eighth of them. In Memory-R2 a turn without a question is rewarded by the
penalty alone; dividing by a small std amplifies it. An invalid output scores 0 before the penalty in an episode; in a
trajectory it is rewarded like any other.
"""
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from data import Dialogue, Question, UsageError
from support.cli import RewardFlags, flag

FREE = 0.7  # words of a bank without a penalty, per word of the turns, as in Memory-R2


@dataclass(frozen=True)
class TrajectoryFlags(RewardFlags):
    trajectories: int | None = flag(None, "samples of a whole conversation, which are compared with each other (4 "
                                    "with --bank trajectory, else 0)", least=0)
    conversations: int = flag(3, "conversations that are sampled in a refresh", least=1)
    horizon: int = flag(0, "turns of a trajectory, from the first one on; 0: all. For a curriculum, raise it in stages "
                        "with --resume", least=0)
    outcome: str = flag("turn", "reward of a trajectory's output: mean score of the questions whose last evidence is "
                        "its turn, or of the whole conversation", choices=("turn", "whole"))
    compression_penalty: float = flag(0.0, "lam: lam * max(0, W / D - 0.7) is subtracted from rewards; W, D: words "
                                      "of the bank and of the turns", least=0)
    local_weight: float = flag(1.0, "weight of the episodes' advantages, if there are trajectories", least=0)
    global_weight: float = flag(1.0, "weight of the trajectories' advantages", least=0)


def cut(dialogue: Dialogue, horizon: int) -> Dialogue:
    """The first `horizon` turns (0: all) and the questions whose evidence they hold."""
    if not 0 < horizon < len(dialogue.turns):
        return dialogue
    ids = {None, *(turn.id for turn in dialogue.turns[:horizon])}
    inside = [one for one in dialogue.questions if {None} < {None, one.asked_after, *one.evidence} <= ids]
    return replace(dialogue, turns=dialogue.turns[:horizon], questions=tuple(inside))


def num_words(items: Iterable) -> int:
    """Words of the turns of a dialogue or of the memories of a bank."""
    return sum(len(item.text.split()) for item in items)


def excess(bank: Iterable, words: int) -> float:
    """max(0, W / D - 0.7): W, D words of a bank, and of the turns that it was made from."""
    return max(0.0, num_words(bank) / words - FREE)


def outcomes(dialogue: Dialogue, scores: Sequence[tuple[Question, float]], is_whole: bool) -> dict[int, float]:
    """
    {index of a turn: mean score of the questions whose last evidence it is}; turns without such a question are missing.
    With `is_whole`: the mean of all scores, for every turn.
    """
    places, found = {turn.id: i for i, turn in enumerate(dialogue.turns)}, defaultdict(list)
    for question, score in scores:
        last = [max(places[id] for id in question.evidence)] if question.evidence else []
        for i in places.values() if is_whole else last:
            found[i].append(score)
    return {i: sum(own) / len(own) for i, own in sorted(found.items())}


def draw(rng: random.Random, items: Sequence, count: int) -> list:
    """Draw `count` items at random; those of a small data set are drawn repeatedly. UsageError if there are none."""
    if not items:
        raise UsageError("no question scores a turn of a trajectory: raise --horizon or --window")
    drawn = []
    while len(drawn) < count:
        drawn += rng.sample(items, min(len(items), count - len(drawn)))
    return drawn
