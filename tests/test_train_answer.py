"""The Answer Agent's episodes, rewards and defaults on small cases, and the files that the script writes."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import answer
import data
import train_answer
from data import Question, UsageError
from memory import MemoryBank, make_embedder
from policy import Completion, Policy
from support import cli

ROOT = Path(__file__).parent.parent
TRAINING_KEYS = {"step", "reward", "reward_std", "zero_std_rate", "kl", "clip_rate", "entropy", "grad_norm", "lr",
                 "completion_tokens", "invalid_rate", "dropped", "seconds", "shown", "selected", "evidence"}
EVAL_KEYS = {"step", "eval", "n", "em", "f1", "bank_size", "ops", "agreement", "shown", "selected", "evidence"}
QUICK = ["--steps", "2", "--eval", "1", "--batch-size", "4", "--group-size", "3", "--memories", "4",
         "--max-new-tokens", "24"]


@pytest.fixture(scope="module", autouse=True)
def short_conversations():
    """Dialogues of a fifth of the usual length, so that banks are built in a second."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train_answer, "NUM_TURNS", 20)
    patch.setattr(train_answer, "NUM_DIALOGUES", 3)
    yield
    patch.undo()


def task(**flags):
    argv = [part for name, value in {"eval": 1, "seed": 3, **flags}.items()
            for part in (f"--{name.replace('_', '-')}", str(value))]
    args = train_answer.arguments(argv)
    policy = Policy.load(args.model)
    policy.add_adapter("answer", 4, 8)
    return train_answer.AnswerTask(policy, args)


@pytest.fixture(scope="module")
def made(short_conversations):
    return task(batch_size=6)


def run_script(*args, env=None, timeout=400):
    """Run the script in its own process, on short dialogues."""
    code = ("import sys, train_answer; from support.cli import exit_cleanly; "
            "train_answer.NUM_TURNS, train_answer.NUM_DIALOGUES = 12, 2; exit_cleanly(train_answer.main)")
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, text=True, capture_output=True,
                          timeout=timeout, env={**os.environ, **(env or {})})


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def output(text):
    return Completion([5], [0.0], True, text)


# ------------------------------------------------------------------------------------------------ episodes

def test_every_question_comes_up_once_before_any_comes_up_again(made):
    count = len(made.questions)
    items = [episode.item for step in range(1, count // 6 + 2) for episode in made.batch(step)]
    assert len({id(item) for item in items[:count]}) == count
    assert all(episode.item.question.asked_after is None for episode in made.batch(1))


def test_a_batch_depends_on_seed_and_step_alone(made):
    later = made.batch(3)
    made.batch(1)
    assert [episode.prompt for episode in made.batch(3)] == [episode.prompt for episode in later]
    assert [episode.prompt for episode in made.batch(2)] != [episode.prompt for episode in later]


def test_all_memories_are_shown_from_the_first_step(made):
    assert [made.num_memories(step) for step in (1, 9)] == [20, 20]


def hand_made():
    """Four memories of two people; the evidence of the question is in turns D1:1 and D1:3."""
    bank = MemoryBank(make_embedder("hash", "cpu"))
    told = [("Ann", "Ann has a dog named Rex.", {"D1:1"}), ("Ann", "Ann drives a Kia.", {"D1:2"}),
            ("Bob", "Bob has a dog named Tom.", {"D1:4"}), ("Ann", "Ann met Rex and a dog.", {"D1:3", "D2:1"})]
    sources = {bank.add(text, speaker, ""): turns for speaker, text, turns in told}
    question = Question("Q", "Which dog does Ann have?", "Rex", 4, ("D1:1", "D1:3"))
    item = train_answer.BankQuestion(question, bank, ("Ann", "Bob"), sources)
    return train_answer.Episode([1, 2], [bank[id] for id in (0, 1, 3, 2)], 0, item)


def test_evidence_are_the_memories_written_from_the_questions_turns():
    assert hand_made().evidence() == {1, 3}


def test_banks_of_turns_hold_every_turn_with_its_speaker(tmp_path):
    turns = [{"speaker": "Ann", "text": "My dog is Rex."}, {"speaker": "Bob", "text": "Hi!"}]
    asked = [{"question": "Which dog does Ann have?", "answer": "Rex", "evidence": [1]}]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"turns": turns, "questions": asked}]))
    made = task(bank="turns", data=path, eval=0)
    [item] = made.questions
    assert [memory.speaker for memory in item.bank] == ["Ann", "Bob"]
    assert [memory.text for memory in item.bank] == ["Ann: My dog is Rex.", "Bob: Hi!"]
    episode = made.make_episode(item, 4)
    assert [episode.shown[i - 1].text for i in episode.evidence()] == ["Ann: My dog is Rex."]


@pytest.mark.parametrize("preface", ["", "Current date: 2023/05/30 (Tue) 23:40.", "Speaker 2 asks Speaker 1:"])
def test_episodes_samples_and_a_hosted_teacher_show_the_preface_of_a_question(made, monkeypatch, preface):
    item, encoded, encode = hand_made().item, [], made.policy.encode
    monkeypatch.setattr(made.policy, "encode", lambda chat: encoded.append(chat[-1]["content"]) or encode(chat))
    monkeypatch.setattr(made, "teacher", made.policy, raising=False)
    taught, given = [], answer.parse("relevant: 1\nanswer: Rex")
    monkeypatch.setattr(answer, "generate_answers", lambda policy, prompts, *_: taught.extend(prompts) or [given])
    episode = made.make_episode(replace(item, question=replace(item.question, preface=preface)), 4)
    assert made.teacher_answers([episode]) == [given]
    texts = {*encoded, made.sample(episode, answer.parse("answer: Rex"), 1.0)["prompt"]}
    assert len(texts) == 1 and taught[0].prompt == episode.prompt
    assert texts.pop().startswith(f"question: {preface} Which dog does Ann have?\n".replace(":  ", ": "))


def test_selection_counts_numbers_that_were_shown():
    episode = hand_made()
    answers = [answer.parse("relevant: 0, 1, 2, 9\nanswer: Rex"),
               answer.parse("1 Rex\n2 none\n3 Rex\n4 none\nanswer: Rex")]
    assert train_answer.output_metrics([episode, episode], answers) == {
        "shown": 4, "selected": 2.0, "evidence": 3 / 4, "invalid_rate": 0}
    nothing = train_answer.output_metrics([episode], [answer.parse("<think>nothing")])
    assert nothing == {"shown": 4, "selected": 0, "evidence": None, "invalid_rate": 1}


# ------------------------------------------------------------------------------------------------ rewards

def test_the_reward_depends_on_the_answer_alone(made):
    """1 for a right answer with any selection or none, 0 for a wrong one with the right selection or without one."""
    episodes = made.batch(1)
    groups = [[output(f"relevant: 99\nanswer: {episode.item.question.answer}"), output("relevant: 1\nanswer: so-so"),
               output(episode.item.question.answer), output(f"<think>{episode.item.question.answer}")]
              for episode in episodes]
    rewards, extra, samples = made.rewards(episodes, groups)
    assert rewards.tolist() == [[1, 0, 1, 0]] * len(episodes)
    assert extra["invalid_rate"] == 1 / 4
    assert samples[0]["parts"]["gold"] == episodes[0].item.question.answer and "question:" in samples[0]["prompt"]


def test_every_member_of_a_group_is_judged_by_the_same_gold(made, monkeypatch):
    seen = []
    monkeypatch.setattr(made, "score", lambda triples: [seen.append(triple) or 0.0 for triple in triples])
    episodes = made.batch(1)[:2]
    made.rewards(episodes, [[output("answer: a"), output("answer: b")], [output("answer: c"), output("answer: d")]])
    assert [prediction for _, prediction, _ in seen] == ["a", "b", "c", "d"]
    assert [gold for *_, gold in seen] == [e.item.question.answer for e in episodes for _ in range(2)]


def test_held_out_questions_are_answered_by_the_untrained_and_the_trained_agent(made):
    (result,) = made.evaluate("untrained", 0)
    assert EVAL_KEYS <= set(result) and result["n"] == len(made.held_out) > 5
    assert made.evaluate("trained", 9)[0] == {**result, "step": 9, "eval": "trained"}  # an adapter that changes nothing


# ------------------------------------------------------------------------------------------------ defaults

TINY = {"out": "runs/answer-grpo", "steps": 40, "batch_size": 16, "group_size": 8, "minibatch": 4, "lr": 1e-3,
        "loss_mean": "token", "max_new_tokens": 200, "max_operation_tokens": 80, "max_prompt_tokens": 1024, "top_k": 4,
        "memories": 20, "named_only": False, "extract": False, "distill": True, "eval": 8, "bank": "manager",
        "reward": "em", "warmup": 5, "beta": 0.01}
REAL_DATA = {"top_k": 10, "memories": 60, "extract": True, "eval": 1, "loss_mean": "completion"}
LARGE = {"max_new_tokens": 256, "max_operation_tokens": 512, "max_prompt_tokens": 4096, "lr": 2e-5,
         "steps": 100}
SMALL = {"extract": False, "bank": "turns", "memories": 8, "distill": False, "reward": "f1", "max_prompt_tokens": 2048,
         "max_new_tokens": 40, "max_operation_tokens": 256, "group_size": 16, "batch_size": 8, "minibatch": 4,
         "steps": 40, "lr": 1e-4, "warmup": 3, "beta": 0.005, "loss_mean": "token"}


@pytest.mark.parametrize("argv, wanted", [
    ("", {}), ("--data locomo", REAL_DATA), ("--model Qwen/X", LARGE), ("--model Qwen/S", SMALL),
    ("--data locomo --model Qwen/X --no-distill --steps 7", REAL_DATA | LARGE | {"distill": False, "steps": 7}),
    ("--data locomo --model Qwen/S --memories 5", REAL_DATA | SMALL | {"memories": 5}),
    ("--data locomo --model Qwen/S --manager-adapter DIR", REAL_DATA | SMALL | {"bank": "manager"}),
    ("--algo ppo --model Qwen/S", SMALL | {"out": "runs/answer-ppo"}),
    ("--algo ppo", {"out": "runs/answer-ppo", "group_size": 4})])
def test_defaults_depend_on_algorithm_data_and_model(argv, wanted, monkeypatch):
    monkeypatch.setattr(cli, "num_parameters", {"Qwen/X": 3e9, "Qwen/S": 5e8}.get)
    settings = vars(train_answer.arguments(argv.split()))
    assert {name: settings[name] for name in TINY} == TINY | wanted


@pytest.mark.parametrize("model", ["Qwen/X", "Qwen/S"])  # raw turns are the default of the latter
def test_a_manager_cannot_be_given_with_a_bank_of_turns(monkeypatch, model):
    monkeypatch.setattr(cli, "num_parameters", {"Qwen/X": 3e9, "Qwen/S": 5e8}.get)
    with pytest.raises(UsageError, match="--bank turns has no Manager"):
        train_answer.arguments(["--model", model, "--bank", "turns", "--manager-adapter", "DIR"])


# ------------------------------------------------------------------------------------------------ from the shell

def test_sft_clones_correct_answers_and_an_agent_of_the_other_prompt_is_refused_as_a_start(tmp_path):
    done = run_script("--algo", "sft", "--steps", "2", "--eval", "1", "--batch-size", "4", "--out", tmp_path / "run")
    assert done.returncode == 0 and "note:" not in done.stderr, done.stderr
    teacher, untrained, first, second, trained = rows(tmp_path / "run/metrics.jsonl")
    assert (teacher["eval"], teacher["n"]) == ("teacher", round(8 * (1 - teacher["invalid_rate"])))
    assert EVAL_KEYS <= set(untrained) & set(trained) and first["loss"] > 0 and second["step"] == 2
    assert "\nanswer: " in rows(tmp_path / "run/samples.jsonl")[0]["completion"]
    other = run_script(*QUICK, "--no-distill", "--init-adapter", tmp_path / "run", "--out", tmp_path / "next")
    assert other.returncode == 2 and "was trained with distillation" in other.stderr


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_a_run_writes_its_files_and_trains_no_adapter_but_its_own(tmp_path, algo):
    policy = Policy.load(data.TINY)
    torch.manual_seed(0)
    policy.add_adapter("manager", 4, 8)
    policy.save_adapter("manager", tmp_path / "manager/adapter")
    before = (tmp_path / "manager/adapter/adapter_model.safetensors").read_bytes()
    done = run_script("--algo", algo, *QUICK, "--manager-adapter", tmp_path / "manager", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = rows(tmp_path / "run/metrics.jsonl")
    assert [line["eval"] for line in lines if "eval" in line] == ["untrained", "trained"]
    assert all(EVAL_KEYS <= set(line) for line in lines if "eval" in line)
    steps = [line for line in lines if "eval" not in line]
    wanted = TRAINING_KEYS | ({"value_loss", "explained_variance"} if algo == "ppo" else set())
    assert [line["step"] for line in steps] == [1, 2] and all(wanted <= set(line) for line in steps)
    assert {"prompt", "completion", "reward", "parts"} <= set(rows(tmp_path / "run/samples.jsonl")[0])
    assert (tmp_path / "manager/adapter/adapter_model.safetensors").read_bytes() == before
    assert Policy.load(data.TINY).load_adapter("answer", tmp_path / "run") is None  # the run's folder is accepted


def test_without_distillation_nothing_is_selected(tmp_path):
    done = run_script(*QUICK, "--steps", "1", "--no-distill", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "the answer alone:" in rows(tmp_path / "run/samples.jsonl")[0]["prompt"]
    assert rows(tmp_path / "run/metrics.jsonl")[-1]["selected"] == 0
