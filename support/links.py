"""Links between turns and questions: the questions that score the edits of a turn."""
import argparse
from collections import defaultdict
from collections.abc import Sequence

from data import Dialogue, Question, UsageError
from support.trajectories import cut


def linked_questions(dialogue: Dialogue, window: int) -> dict[str, tuple[Question, ...]]:
    """
    {turn id: the questions that score its edits}. In synthetic data these are the questions asked right after the turn.
    Other data asks at the end: a question scores the turn of its last evidence, if the first is in the `window` turns
    before it. A bank made from these turns lacks older evidence, so no edit could make the answer right. (The bank of a
    trajectory may have it; the rule is the same.)
    """
    linked, is_timed = defaultdict(tuple), any(question.asked_after for question in dialogue.questions)
    places = {turn.id: i for i, turn in enumerate(dialogue.turns)}
    for question in dialogue.questions:
        evidence = sorted(question.evidence, key=places.__getitem__)
        is_inside = bool(evidence) and places[evidence[-1]] - places[evidence[0]] <= window
        turn = question.asked_after if is_timed else evidence[-1] if is_inside else None
        if turn is not None:
            linked[turn] += (question,)
    return dict(linked)


def describe_links(dialogues: Sequence[Dialogue], args: argparse.Namespace) -> str:
    """How many questions score a turn, and why the others do not. UsageError if none does."""
    asked = [question for dialogue in dialogues for question in dialogue.questions]
    without = sum(not question.evidence and not question.asked_after for question in asked)
    if args.bank == "trajectory":
        dialogues = [cut(dialogue, args.horizon) for dialogue in dialogues]
    beyond = len(asked) - without - sum(
        bool(one.evidence or one.asked_after) for dialogue in dialogues for one in dialogue.questions)
    linked = [questions for dialogue in dialogues for questions in linked_questions(dialogue, args.window).values()]
    num_linked = sum(map(len, linked))
    if not linked:
        reason = (f"fits into --window {args.window}" if without + beyond < len(asked) else
                  "has its evidence within --horizon" if beyond else "names a turn as evidence")
        raise UsageError(f"--data {args.data}: no question {reason}, so no turn can be scored")
    apart = len(asked) - num_linked - without - beyond
    return (f"--data {args.data}: {num_linked} of {len(asked)} questions score {len(linked)} turns; left out: "
            f"{without} without evidence, {apart} whose evidence is more than --window {args.window} turns apart"
            + (f", {beyond} with evidence after --horizon {args.horizon}" if beyond else ""))
