"""
Banks of a Memory Manager on LoCoMo's validation conversation, and answers from them: docs/results.md, by hand.

    python tests/benchmarks/session_banks.py --model $QWEN --manager base --answer base runs/both-qwen

Each session starts with an empty bank, so that all sessions advance in one batch; evaluate.py builds one bank of the
whole conversation, turn by turn, which takes hours on a CPU. Questions are answered from the union of the banks.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import answer
import data
import manager
from memory import MemoryBank, make_embedder
from policy import Policy
from support.cli import model_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--manager", default="base", help="a Manager's run, or base")
    parser.add_argument("--answer", nargs="+", default=["base"], help="runs of Answer Agents, or base")
    parser.add_argument("--memories", type=int, default=8)
    parser.add_argument("--sessions", type=int, help="the first sessions only (all)")
    args = parser.parse_args()
    policy, embedder = Policy.load(args.model, dtype="bfloat16"), make_embedder("hash")
    for folder in {args.manager, *args.answer} - {"base"}:
        policy.load_adapter(folder, folder)
    adapter = {"base": None}

    conversation, = data.load("locomo", "val")
    numbers = sorted({turn.session for turn in conversation.turns})[:args.sessions]
    sessions = [replace(conversation, id=f"{conversation.id}-{number}",
                        turns=tuple(turn for turn in conversation.turns if turn.session == number))
                for number in numbers]
    extract = model_size(args.model) == "large"
    settings = manager.Settings(top_k=10, extract=extract, max_prompt_tokens=2048, max_new_tokens=256)
    agent = manager.Manager(policy, adapter.get(args.manager, args.manager), settings)
    builds = manager.build_banks(agent, sessions, embedder, progress="banks")
    bank = MemoryBank(embedder)
    for memory in (memory for build in builds for memory in build.bank):
        bank.add(memory.text, memory.speaker, memory.time)
    texts = [memory.text for memory in bank]
    print(f"{len(texts)} memories, {len(set(texts))} distinct, {sum(len(text.split()) for text in texts)} words;",
          manager.bank_report(builds))

    written, inside = {}, {turn.id for session in sessions for turn in session.turns}
    for session, build in zip(sessions, builds, strict=True):
        for turn, edits in zip(session.turns, build.edits, strict=True):  # {text: the turn that first wrote it}
            written |= {edit.text: turn.id for edit in edits or [] if edit.text and edit.text not in written}
    questions = [one for one in conversation.final_questions() if {*one.evidence} <= inside]
    evidence = {id for question in questions for id in question.evidence}
    print(f"{len(evidence & {*written.values()})} of {len(evidence)} turns with evidence wrote a new text")

    shown = answer.Settings(args.memories, distill=False, max_prompt_tokens=4096, max_new_tokens=40)
    prompts = [answer.build_prompt(policy, bank, question.text, conversation.speakers, shown, question.preface)
               for question in questions]
    found = [(set(question.evidence), {written[memory.text] for memory in prompt.shown})
             for question, prompt in zip(questions, prompts, strict=True)]
    some, whole = sum(bool(own & turns) for own, turns in found), sum(own <= turns for own, turns in found)
    print(f"of {len(found)} questions {some} have evidence in the prompt, {whole} have all of it")
    for folder in args.answer:
        given = answer.generate_answers(policy, prompts, adapter.get(folder, folder), shown.max_new_tokens)
        print(folder, answer.mean_scores([(one.text, question.answer)
                                          for one, question in zip(given, questions, strict=True)]))


if __name__ == "__main__":
    main()
