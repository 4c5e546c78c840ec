"""The Manager's episodes, rewards and defaults on small cases, and the files that the script writes."""
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_longmemeval import ENTRY as LONGMEMEVAL
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import answer
import data.locomo
import manager
import train_manager
from answer import Answer
from data import Dialogue, Question, Turn, UsageError, longmemeval
from policy import Completion, Policy
from support import cli

ROOT = Path(__file__).parent.parent
LOCOMO = next((path for path in (ROOT.parent / "shared/data/locomo10.json",
                                 Path(os.environ.get("MEMORY_R1_DATA", "~/.cache/memory-r1")).expanduser()
                                 / "locomo10.json") if path.is_file()), None)
TRAINING_KEYS = {"step", "reward", "reward_std", "zero_std_rate", "kl", "clip_rate", "entropy", "grad_norm", "lr",
                 "completion_tokens", "invalid_rate", "dropped", "seconds", "ops", "bank_size"}
EVAL_KEYS = {"step", "eval", "n", "em", "f1", "bank_size", "ops", "agreement"}
QUICK = ["--steps", "2", "--eval", "2", "--batch-size", "4", "--group-size", "4", "--refresh", "2"]


def run_script(*args, env=None, timeout=400):
    return subprocess.run([sys.executable, ROOT / "train_manager.py", *map(str, args)], cwd=ROOT, text=True,
                          capture_output=True, timeout=timeout, env={**os.environ, **(env or {})})


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def task(**flags):
    argv = [part for name, value in {"eval": 0, "seed": 3, **flags}.items()
            for part in (f"--{name.replace('_', '-')}", str(value))]
    args = train_manager.arguments(argv)
    policy = Policy.load(args.model)
    policy.add_adapter("manager", 4, 8)
    return train_manager.ManagerTask(policy, args)


@pytest.fixture(scope="module")
def made():
    """A task and one batch of its episodes, on banks of reference operations."""
    made = task(bank="oracle", batch_size=8, refresh=1)
    return made, made.batch(1)


# ------------------------------------------------------------------------------------------------ the task

def evidence_dialogue(**evidence):
    """Six turns, "t0" to "t5", and a question of each name with this evidence: a="52" names t5 and t2."""
    turns = tuple(Turn(f"t{i}", 1, "Ann", f"text {i}", "1 May 2023") for i in range(6))
    return Dialogue("d", ("Ann", "Bob"), turns, tuple(
        Question(name, "?", "x", 4, tuple(f"t{i}" for i in numbers)) for name, numbers in evidence.items()))


@pytest.mark.parametrize("window, wanted", [
    (0, {"t3": "b", "t0": "d"}), (2, {"t3": "be", "t0": "d"}), (3, {"t5": "a", "t3": "be", "t0": "d"}),
    (4, {"t5": "a", "t3": "be", "t0": "d"}), (5, {"t5": "ac", "t3": "be", "t0": "d"})])
def test_a_question_judges_the_turn_of_its_last_evidence_if_the_window_holds_the_rest(window, wanted):
    """The order of the evidence in the file does not matter. A question without evidence judges no turn."""
    linked = train_manager.linked_questions(evidence_dialogue(a="52", b="3", c="50", d="0", e="213", f=""), window)
    assert {turn: "".join(question.id for question in questions) for turn, questions in linked.items()} == wanted


def test_synthetic_questions_judge_the_turn_after_which_they_are_asked():
    timed = evidence_dialogue(a="0", b="05")
    timed = replace(timed, questions=(replace(timed.questions[0], asked_after="t1"), timed.questions[1]))
    linked = train_manager.linked_questions(timed, 0)
    assert {turn: [question.id for question in questions] for turn, questions in linked.items()} == {"t1": ["a"]}


def test_longmemeval_has_the_same_rule():
    """The evidence is in the third and in the fourth of six turns."""
    dialogue = longmemeval.make_dialogue(LONGMEMEVAL, "x")
    found = [list(train_manager.linked_questions(dialogue, window)) for window in (0, 1)]
    assert found == [[], ["D3:2"]]


@pytest.mark.parametrize("window", [0, 1, 3])
def test_the_bank_of_the_window_holds_the_oldest_evidence_that_is_allowed(window, tmp_path, monkeypatch):
    made = task(data=small_file(tmp_path), bank="base", window=window)
    monkeypatch.setattr(manager, "build_banks", lambda agent, *rest: manager.turn_banks(*rest))
    memories, = made.banks_before([evidence_dialogue()], [(0, 4)])
    assert [text for text, *_ in memories] == [f"Ann: text {i}" for i in range(4 - window, 4)]


def test_a_line_counts_the_questions_that_judge_a_turn(capsys):
    args = SimpleNamespace(data="mine", window=3, bank="base")
    dialogues = [evidence_dialogue(a="52", b="50", c=""), evidence_dialogue(d="5", e="1", f="50")]
    assert train_manager.describe_links(dialogues, args) == (
        "--data mine: 3 of 6 questions score 3 turns; left out: 1 without evidence, 2 whose evidence is more than "
        "--window 3 turns apart")
    with pytest.raises(UsageError, match="--data mine: no question fits into --window 3, so no turn can be scored"):
        train_manager.describe_links([evidence_dialogue(a="50", b="")], args)
    args = SimpleNamespace(data="mine", window=3, bank="trajectory", horizon=4)
    assert train_manager.describe_links([evidence_dialogue(a="52", b="3", c="", d="1", e="5")], args) == (
        "--data mine: 2 of 5 questions score 2 turns; left out: 1 without evidence, 0 whose evidence is more than "
        "--window 3 turns apart, 2 with evidence after --horizon 4")
    with pytest.raises(UsageError, match="no question has its evidence within --horizon"):
        train_manager.describe_links([evidence_dialogue(a="5")], args)
    with pytest.raises(UsageError, match="no question names a turn as evidence"):
        train_manager.describe_links([evidence_dialogue(a="")], args)


@pytest.mark.parametrize("preface", ["", "Current date: 2023/05/30 (Tue) 23:40.", "Speaker 2 asks Speaker 1:"])
def test_the_answer_agent_reads_the_preface_of_a_question(made, monkeypatch, preface):
    the_task, (episode, *_) = made
    monkeypatch.setattr(answer, "generate_answers", lambda policy, prompts, *_: prompts)
    question = Question("q", "Which dog?", "Rex", 14, preface=preface)
    [(prompt, _)] = the_task.answers([(episode.bank, question, episode.speakers)])
    shown = the_task.policy.decode(prompt.prompt)
    assert shown.count(f"question: {preface} Which dog?\n".replace(":  ", ": ")) == 2


def test_every_episode_is_a_turn_with_its_bank_and_questions(made):
    _, episodes = made
    assert len(episodes) == 8
    for episode in episodes:
        assert episode.questions and all(question.asked_after == episode.turn.id for question in episode.questions)
        assert {memory.id for memory in episode.case.memories} <= {memory.id for memory in episode.bank}
        assert all(memory.speaker == episode.turn.speaker for memory in episode.case.memories)


def test_reference_operations_earn_more_than_noop(made):
    """The correct edit of a turn answers its questions; NOOP does so only where it is the correct edit."""
    the_task, episodes = made

    def output(episode, event):
        operation = episode.turn.operation
        item = {"event": event or operation.event, "old_memory": operation.old_memory, "text": operation.text}
        return Completion([5], [0.0], True, json.dumps([item]))

    groups = [[output(episode, None), output(episode, "NOOP"), Completion([5], [0.0], True, "nonsense")]
              for episode in episodes]
    rewards, extra, _ = the_task.rewards(episodes, groups)
    assert rewards.shape == (8, 3)
    assert rewards[:, 0].mean() > 0.8
    assert rewards[:, 0].mean() > rewards[:, 1].mean()
    assert torch.all(rewards[:, 2] == 0)
    assert extra["invalid_rate"] == pytest.approx(1 / 3)


def test_candidates_leave_the_bank_as_it_was(made):
    the_task, episodes = made
    before = [tuple(episode.bank) for episode in episodes]
    group = [Completion([5], [0.0], True, '[{"event": "DELETE", "id": 1}]'),
             Completion([5], [0.0], True, '[{"event": "ADD", "text": "x"}]')]
    the_task.rewards(episodes, [group] * len(episodes))
    assert [tuple(episode.bank) for episode in episodes] == before


def test_reward_is_the_mean_score_or_all_of_them(made, monkeypatch):
    the_task, episodes = made
    episode = next(episode for episode in episodes if len(episode.questions) == 2)
    given = [episode.questions[0].answer, "something else"]
    monkeypatch.setattr(the_task, "answers", lambda asked: [(None, Answer(text, (), True)) for text in given])
    noop = [[Completion([5], [0.0], True, '[{"event": "NOOP"}]')]]
    monkeypatch.setattr(the_task.args, "linked", "mean")
    assert the_task.rewards([episode], noop)[0].item() == 0.5
    monkeypatch.setattr(the_task.args, "linked", "all")
    assert the_task.rewards([episode], noop)[0].item() == 0.0
    monkeypatch.setattr(the_task, "score", lambda triples: [0.75, 0.5])  # scores between 0 and 1 are kept
    assert the_task.rewards([episode], noop)[0].item() == 0.5


def test_equal_edits_share_a_bank_and_its_answers(made, monkeypatch):
    the_task, episodes = made
    asked, answers = [], the_task.answers
    monkeypatch.setattr(the_task, "answers", lambda questions: asked.append(len(questions)) or answers(questions))
    group = [Completion([5], [0.0], True, text) for text in ('[{"event": "NOOP"}]', "nonsense",
                                                            'NOOP it is: [{"event": "noop"}]',
                                                            '[{"event": "ADD", "text": "x"}]')]
    rewards, metrics, samples = the_task.rewards(episodes[:2], [group, group])
    assert asked == [2 * sum(len(episode.questions) for episode in episodes[:2])]
    assert torch.equal(rewards[:, 0], rewards[:, 2])
    assert metrics["ops"] == {"ADD": 2, "UPDATE": 0, "DELETE": 0, "NOOP": 4}
    sizes = [len(episode.bank) for episode in episodes[:2]]
    assert metrics["bank_size"] == pytest.approx(sum(sizes) / 2 + 1 / 3), "a mean over the valid outputs"
    assert [part["question"] for part in samples[1]["parts"]] == [one.text for one in episodes[1].questions]


def test_same_seed_same_episodes_whatever_came_before():
    first, second = task(bank="oracle", batch_size=4, refresh=2), task(bank="oracle", batch_size=4, refresh=2)
    for step in (1, 2):
        first.batch(step)
    assert [e.prompt for e in first.batch(3)] == [e.prompt for e in second.batch(3)]
    assert [e.prompt for e in first.batch(4)] == [e.prompt for e in second.batch(4)]


# ------------------------------------------------------------------------------------------------ defaults

TINY = {"out": "runs/manager-grpo", "steps": 90, "batch_size": 24, "group_size": 8, "minibatch": 0, "lr": 3e-3,
        "loss_mean": "token", "max_new_tokens": 80, "max_answer_tokens": 48, "max_prompt_tokens": 1024, "top_k": 4,
        "memories": 4, "named_only": True, "extract": False, "bank": "trajectory", "linked": "all", "eval": 32,
        "trajectories": 4, "conversations": 3, "refresh": 3, "window": 50, "distill": True, "reward": "em"}
REAL_DATA = {"top_k": 10, "memories": 60, "named_only": False, "extract": True, "bank": "base", "trajectories": 0,
             "refresh": 5, "linked": "mean", "eval": 1, "loss_mean": "completion"}
LARGE = {"max_new_tokens": 512, "max_answer_tokens": 256, "max_prompt_tokens": 4096, "lr": 2e-5, "steps": 50}
SMALL = {"extract": False, "window": 3, "memories": 8, "distill": False, "reward": "f1", "max_prompt_tokens": 2048,
         "max_new_tokens": 256, "max_answer_tokens": 40, "group_size": 8, "batch_size": 8, "minibatch": 4, "steps": 30,
         "lr": 1e-4, "loss_mean": "token"}


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    """Of the models that are not there, S is below 1e9 parameters, X is not, and NONE cannot be read."""
    known = {"Qwen/S": 999_999_999, "Qwen/X": 1_000_000_000}

    def num_parameters(name):
        if name not in known:
            raise UsageError("not there")
        return known[name]
    monkeypatch.setattr(cli, "num_parameters", num_parameters)


@pytest.mark.parametrize("argv, wanted", [
    ("", {}), ("--data locomo", REAL_DATA), ("--model Qwen/X", LARGE), ("--model Qwen/NONE", LARGE),
    ("--model Qwen/S", SMALL), ("--data locomo --model Qwen/S", REAL_DATA | SMALL),
    ("--algo ppo --model Qwen/S", SMALL | {"out": "runs/manager-ppo"}),
    ("--data x.json --model Qwen/X", REAL_DATA | LARGE),
    ("--algo ppo", {"out": "runs/manager-ppo", "group_size": 4, "minibatch": 6, "lr": 1e-3}),
    ("--data locomo --memories 7 --no-extract --lr 0.5 --model Qwen/X",
     REAL_DATA | LARGE | {"memories": 7, "extract": False, "lr": 0.5}),
    ("--trajectories 0", {"bank": "oracle", "trajectories": 0, "refresh": 5}),
    ("--bank oracle", {"bank": "oracle", "trajectories": 0, "refresh": 5}),
    ("--bank self --trajectories 2", {"bank": "self", "trajectories": 2, "refresh": 5}),
    ("--trajectories 8 --refresh 1", {"trajectories": 8, "refresh": 1})])
def test_defaults_depend_on_algorithm_data_and_model(argv, wanted):
    settings = vars(train_manager.arguments(argv.split()))
    assert {name: settings[name] for name in TINY} == TINY | wanted


def test_every_preset_belongs_to_a_flag_and_gives_its_default():
    for algo in train_manager.ALGORITHMS:
        for model, own in (("Qwen/X", train_manager.LARGE_MODEL), ("Qwen/S", train_manager.SMALL_MODEL)):
            argv = f"--algo {algo} --data locomo --model {model}{' --teacher endpoint' * (algo == 'sft')}"
            settings = vars(train_manager.arguments(argv.split()))
            for name, value in (train_manager.REAL_DATA | own).items():
                wanted = value[algo] if isinstance(value, dict) else value
                assert settings.get(name, wanted) == wanted and (name in settings or algo == "sft")


def test_the_defaults_that_were_chosen_are_told_as_flags():
    assert cli.describe_presets(train_manager.arguments([])) == ""
    begin = ["--data", "locomo", "--model", "Qwen/X"]
    told = cli.describe_presets(train_manager.arguments([*begin, "--lr", "0.5", "--no-extract"]))
    assert told == ("--top-k 10 --memories 60 --loss-mean completion --eval 1 --bank base --linked mean "
                    "--no-named-only --reward em --max-prompt-tokens 4096 --max-new-tokens 512 "
                    "--max-answer-tokens 256 --group-size 8 --batch-size 24 --steps 50")
    again = train_manager.arguments([*begin, *told.split()])
    assert again == train_manager.arguments(begin), "they can be copied"


def test_the_help_shows_the_flags_and_defaults_of_one_algorithm(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    texts = {}
    for argv in ("--algo grpo", "--algo ppo --data locomo", "--algo sft --model Qwen/X"):
        with pytest.raises(SystemExit) as stop:
            train_manager.main([*argv.split(), "--help"])
        texts[stop.value.code, argv.split()[1]] = capsys.readouterr().out
    assert [code for code, _ in texts] == [0, 0, 0]
    grpo, ppo, sft = texts.values()
    assert "--critic-lr" in ppo and "--critic-lr" not in grpo + sft and "--teacher" in sft and "--reward" not in sft
    assert "(runs/manager-grpo)" in grpo and "(0.003)" in grpo and "(0.0001)" in sft
    for text, memories, extract in ((grpo, "4", "no"), (ppo, "60", "yes"), (sft, "4", "no")):
        assert re.search(rf"--memories N .*\({memories}\)", text)
        assert re.search(rf"--extract, --no-extract\s.*\({extract}\)", text)


# ------------------------------------------------------------------------------------------------ from the shell

def test_a_run_writes_its_files_and_resumes(tmp_path):
    out = tmp_path / "run"
    done = run_script("--algo", "grpo", *QUICK, "--out", out, "--checkpoint-every", "1")
    assert done.returncode == 0, done.stderr
    lines = rows(out / "metrics.jsonl")
    assert [line["eval"] for line in lines if "eval" in line] == ["untrained", "add-all", "noop", "oracle", "trained"]
    assert all(EVAL_KEYS <= set(line) for line in lines if "eval" in line)
    steps = [line for line in lines if "eval" not in line]
    assert [line["step"] for line in steps] == [1, 2] and all(TRAINING_KEYS <= set(line) for line in steps)
    assert set(steps[0]["ops"]) == {"ADD", "UPDATE", "DELETE", "NOOP"}
    sample = rows(out / "samples.jsonl")[0]
    assert {"step", "prompt", "completion", "reward", "parts"} <= set(sample)
    assert sample["prompt"].startswith("memories of ")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (out / "adapter").iterdir()}
    settings = json.loads((out / "config.json").read_text())
    assert settings["seed"] == 0 and settings["group_size"] == 4 and "torch" in settings["versions"]
    assert done.stdout.startswith(f"manager by grpo, seed 0, into {out}\n")

    more = run_script("--algo", "grpo", *QUICK, "--steps", "3", "--out", out, "--resume")
    assert more.returncode == 0, more.stderr
    assert [line["step"] for line in rows(out / "metrics.jsonl") if "eval" not in line] == [1, 2, 3]

    # Another run starts where this one ended; it takes the rank from it.
    run = run_script("--algo", "sft", *QUICK[:6], "--out", tmp_path / "next", "--init-adapter", out, "--rank", "3")
    assert run.returncode == 0, run.stderr
    ended = [line for line in rows(out / "metrics.jsonl") if line.get("eval") == "trained"][-1]
    begun = next(line for line in rows(tmp_path / "next/metrics.jsonl") if line.get("eval") == "untrained")
    assert {**begun, "step": 3, "eval": "trained"} == {**ended, "step": 3}
    settings = json.loads((tmp_path / "next/config.json").read_text())
    assert (settings["rank"], settings["alpha"], settings["init_adapter"]) == (16, 32, str(out))


def local_model(folder, config, kind):
    """A random model of a real family, whose chat template has system messages."""
    tokenizer = AutoTokenizer.from_pretrained(data.TINY)
    tokenizer.chat_template = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, eos_token_id=1,
                 pad_token_id=0, bos_token_id=None)
    kind(config(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.skipif(LOCOMO is None, reason="locomo10.json is not there")
@pytest.mark.parametrize("family", ["tiny", "qwen2", "llama"])
def test_locomo_runs_with_any_model(tmp_path, family):
    """Three steps on the real file, with real evidence turns and prompts; rewards may be 0."""
    model = data.TINY
    if family != "tiny":
        config, kind = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[family]
        model = local_model(tmp_path / family, config, kind)
    done = run_script("--algo", "grpo", "--data", "locomo", "--model", model, "--out", tmp_path / "run", "--eval", "0",
                      "--steps", "3", "--batch-size", "2", "--group-size", "2", "--window", "8", "--refresh", "3",
                      "--max-new-tokens", "16", "--max-answer-tokens", "8", "--max-prompt-tokens", "2000",
                      env={"MEMORY_R1_DATA": str(LOCOMO.parent)})
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in rows(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    assert "new facts from" in rows(tmp_path / "run/samples.jsonl")[0]["prompt"]


def test_links_of_locomos_training_conversation_equal_an_independent_count():
    """203 pairs of question and evidence; 53 have later evidence, 23 more have some over 50 turns back."""
    if LOCOMO is None:
        pytest.skip("locomo10.json is not there")
    dialogue, = data.locomo.load("train", path=LOCOMO)
    order = [turn.id for turn in dialogue.turns]
    pairs = [(question, order.index(turn)) for question in dialogue.questions for turn in question.evidence]
    seen = [[i - order.index(turn) for turn in question.evidence] for question, i in pairs]
    later, far = [min(gaps) < 0 for gaps in seen], [max(gaps) > 50 for gaps in seen]
    assert (len(pairs), sum(later), sum(map(any, zip(later, far, strict=True)))) == (203, 53, 53 + 23)
    kept = {(question.id, order[i]) for (question, i), *bad in zip(pairs, later, far, strict=True) if not any(bad)}
    linked = train_manager.linked_questions(dialogue, 50)
    assert kept == {(question.id, turn) for turn, questions in linked.items() for question in questions}
    assert len(kept) == sum(map(len, linked.values())) == 127 and len(linked) == 100


def small_file(tmp_path):
    turns = [{"speaker": "Ann", "dia_id": f"D1:{i}", "text": f"I have a dog named Rex{i}."} for i in range(1, 4)]
    question = {"question": "Which dog?", "answer": "Rex1", "category": 4, "evidence": ["D1:1"]}
    entry = {"sample_id": "mine", "qa": [question],
             "conversation": {"speaker_a": "Ann", "speaker_b": "Bob", "session_1": turns,
                              "session_1_date_time": "1:56 pm on 8 May, 2023"}}
    (tmp_path / "mine.json").write_text(json.dumps([entry]))
    return tmp_path / "mine.json"


@pytest.mark.parametrize("bank, read", [("base", [[2], []]), ("self", [[2], [2]])])
def test_banks_of_the_base_model_on_real_data_are_built_once(tmp_path, monkeypatch, bank, read):
    entry, = json.loads(small_file(tmp_path).read_text())
    entry["qa"][0]["evidence"] = ["D1:2", "D1:3"]
    (tmp_path / "mine.json").write_text(json.dumps([entry]))
    made, turns, build = task(data=tmp_path / "mine.json", bank=bank, batch_size=2, refresh=1), [], manager.build_banks

    def counted(builder, dialogues, *args, **options):
        assert builder.adapter == {"base": None, "self": "manager"}[bank]
        turns.append(sorted(len(dialogue.turns) for dialogue in dialogues))
        return build(builder, dialogues, *args, **options)

    monkeypatch.setattr(manager, "build_banks", counted)
    batches = [made.batch(step) for step in (1, 2)]
    assert turns == read
    first, second = ({one.turn.id: list(one.bank) for one in batch} for batch in batches)
    assert first == second and set(first) == {"D1:3"}


def test_a_speaker_who_never_speaks_is_no_trouble(tmp_path):
    done = run_script("--data", small_file(tmp_path), "--steps", "1", "--batch-size", "2",
                      "--group-size", "2", "--eval", "1", "--max-new-tokens", "24", "--max-answer-tokens", "8",
                      "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
