"""Mistakes on the command line: one line that says what is wrong, where, and what to do; exit code 2."""
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutations import edited
from safetensors.torch import load_file
from test_locomo import ENTRY
from test_longmemeval import ENTRY as CHATS
from test_msc import ENTRY as MSC
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

import answer
import data.locomo
import evaluate
import train_answer
import train_manager
from data import TINY
from policy import Policy
from support import plots
from support.cli import exit_cleanly
from support.run import read_rows

ROOT = Path(__file__).parents[1]
TALK = {"turns": [{"speaker": "Ann", "text": "a"}, {"speaker": "Bob", "text": "b"}]}
SCRIPTS = {"train_manager": train_manager, "train_answer": train_answer, "evaluate": evaluate, "plots": plots,
           "answer": answer}
SFT_QUICK = "--steps 1 --eval 0 --batch-size 2 --max-new-tokens 8"
QUICK = f"{SFT_QUICK} --group-size 2"

# Commands, given in a folder with the files of `around`, and words of their error message.
TABLE = [line.split(" => ") for line in """
train_manager --stepz 3 => unrecognized arguments: --stepz 3
train_manager --steps 0 => --steps 0: must be at least 1
train_manager --steps 1.5 => argument --steps: invalid int value: '1.5'
train_manager --step-size 3 => did you mean --steps? python train_manager.py --help lists all
train_manager --critic-lr 1 => unrecognized arguments: --critic-lr 1; --critic-lr needs --algo ppo; python
train_manager --teacher endpoint => --teacher needs --algo sft;
train_manager --algo sft --clip=1 => --clip needs --algo grpo or ppo;
train_manager --algo dpo => argument --algo: invalid choice: 'dpo'
train_manager --reward vibes => argument --reward: invalid choice: 'vibes'
train_manager --lr fast => argument --lr: invalid float value: 'fast'
train_manager --lr nan => --lr nan: must be a finite number
train_manager --lr -1 => --lr -1.0: must be at least 0
train_manager --beta inf => --beta inf: must be a finite number
train_manager --temperature 0 => --temperature 0.0: must be above 0
train_manager --group-size 1 => --group-size 1: must be at least 2
train_manager --rank 0 => --rank 0: must be at least 1
train_manager --seed -1 => --seed -1: must be from 0 to 4294967295
train_manager --algo ppo --gamma 7 => --gamma 7.0: must be at most 1
train_manager --algo ppo --value-clip -1 => --value-clip -1.0: must be at least 0
train_manager --floor 7 => --floor 7.0: must be at most 1
train_manager --max-prompt-tokens 1 => --max-prompt-tokens 1: must be at least 16
train_manager --bank oracle --data locomo.json => --bank oracle needs reference operations
train_manager --resume --overwrite => --resume continues the run in --out and --overwrite replaces it: give one
train_manager --out locomo.json => the folder locomo.json cannot be written (File exists): fix this or choose another
train_manager --out locomo.json/x => cannot be written (Not a directory)
train_manager --device abacus => abacus: cannot be loaded
train_manager --model ./nowhere => nowhere: no config.json there; give a hub id, a model's folder or a .gguf file
train_manager --model nowhere.gguf => nowhere.gguf: no such file; give a hub id, a folder with config.json
train_manager --model text.gguf => text.gguf
train_manager --model deaf => deaf: its chat template fails (it drops the user's message); choose a model whose
train_manager --model empty => no config.json there
train_manager --model truncated => model truncated as float32 on cpu: cannot be loaded
train_manager --model pickled => no file named model.safetensors
train_manager --model plain => no chat template; choose an instruct model
train_manager --model strict => its chat template fails (no system, please); choose a model whose template
train_manager --model foreign => custom code
train_manager --embedder ./nowhere => embedder './nowhere' cannot be loaded as an encoder
train_manager --embedder pickled => embedder 'pickled' cannot be loaded as an encoder
train_manager --answer-adapter nowhere => adapter nowhere: cannot be read
train_manager --answer-adapter of-another => it names Qwen/Qwen2.5-3B-Instruct
train_manager --answer-adapter of-rank-8 => with rank 8 must be
train_manager --answer-adapter unselective => unselective was trained without distillation, but is used with it here
train_manager --algo sft --teacher endpoint => set MANAGER_URL (or OPENAI_BASE_URL) and MANAGER_MODEL
train_manager --algo sft --data locomo.json => --data locomo.json has no reference operations to clone (synth
train_manager --reward judge => set JUDGE_URL (or OPENAI_BASE_URL) and JUDGE_MODEL
train_manager --data nowhere => --data nowhere: neither a benchmark (synthetic, locomo
train_manager --data empty => --data empty: neither a benchmark
train_manager --data torn.json => torn.json: is neither JSON nor one JSON object a line
train_manager --data null.json => error: null.json:
train_manager --data strange.json => strange.json: entry 0 has neither the "conversation" of LoCoMo
train_manager --data mistaken.json => mistaken.json: entry 0 (conv-7): session_2, turn 0 (D2:1) has no key "speaker"
train_manager --data unlinked.json => no question names a turn as evidence, so no turn can be scored
train_manager --data locomo => locomo10.json there, or name a file with --data
train_manager --data longmemeval => LongMemEval has no split "train": it is for evaluation
train_manager --out done => done already holds a run: choose another --out, continue it with --resume, or replace it
train_manager --out finished => finished already holds a run
train_manager --out done --resume --algo ppo => done was started with algo grpo, not ppo: resume it with that
train_manager --out done --resume --init-adapter finished => done was started with init_adapter None, not finished:
train_manager --out done --resume --rank 8 => done was started with rank 16, not 8: resume it with that
train_manager --out done --resume --model letters => tiny, not letters: resume it with that
train_manager --out further --resume => further has 7 steps already: resume it with --steps 7 or more
train_manager --out damaged --resume => and no other is intact: start again with another --out
train_answer --algo sft --reward f1 => --reward needs --algo grpo or ppo;
train_answer --algo sft --teacher endpoint => set ANSWER_URL
train_answer --init-adapter nowhere => adapter nowhere: cannot be read
train_answer --gae-lambda 1 => --gae-lambda needs --algo ppo;
train_answer --manager-adapter nowhere => adapter nowhere: cannot be read
train_answer --memories 0 => --memories 0: must be at least 1
train_answer --grow 4 => unrecognized arguments: --grow 4
train_answer --max-new 4 => unrecognized arguments: --max-new 4
train_answer --bank turns --manager-adapter finished => --bank turns has no Manager: leave it out, or --manager-adapter
train_answer --max-operation-tokens 0 => --max-operation-tokens 0: must be at least 1
train_answer --reward judge --judge ./nowhere => nowhere: no config.json there
train_answer --data silent.json => --data silent.json: there is no question to train on
train_answer --data msc => MSC has no split "train": it is for evaluation
train_answer --out done => done already holds a run
evaluate --split dev => synthetic data has no split 'dev'
evaluate --category 7 => --category 7: synthetic, split test, has 1, 2, 3, 4
evaluate --limit 0 => --limit 0: must be at least 1
evaluate --top-k -3 => --top-k -3: must be at least 0
evaluate --floor nan => --floor nan: must be a finite number
evaluate --floor 7 => --floor 7.0: must be at most 1
evaluate --memories 4,x => argument --memories: '4,x' must be positive numbers
evaluate --system magic => argument --system: invalid choice: 'magic'
evaluate --system oracle --data locomo.json => --system oracle needs reference operations
evaluate --answer of-pissa => of-pissa: init_lora_weights pissa is not supported; train plain LoRA without bias
evaluate --manager nowhere => adapter nowhere: cannot be read
evaluate --answer unselective/adapter => unselective/adapter was trained without distillation
evaluate --manager endpoint => set MANAGER_URL (or OPENAI_BASE_URL) and MANAGER_MODEL
evaluate --answer endpoint => --answer endpoint: only a Manager can be hosted
evaluate --answer rag => --answer rag is a baseline: give --system rag
evaluate --manager base oracle => --manager oracle is a baseline: give --system oracle
evaluate --compare a.json b.json --seed -1 => --seed -1: must be from 0 to
answer nowhere.json why? => nowhere.json: cannot be read as a memory bank
plots nowhere --out c.foo => --out c.foo: give a name that ends in .png, .pdf or .svg
plots nowhere => nowhere is not a run's folder
evaluate --reranker ./nowhere => --reranker ./nowhere: cannot be loaded
evaluate --judge endpoint => set JUDGE_URL (or OPENAI_BASE_URL) and JUDGE_MODEL
evaluate --paper => --paper has the numbers of LoCoMo's test split: add --data locomo
evaluate --data silent.json => there is no question; take another split or file
evaluate --data nowhere => --data nowhere: neither a benchmark
evaluate --data nan.json => entry 0 (gpt4_1a2b3c4d_abs): "answer" is nan, not text or a finite number
evaluate --data listed.json => entry 0 (gpt4_1a2b3c4d_abs): "answer" is not text or a number
evaluate --data twice.json => twice.json: entry 1: an earlier entry has the "question_id" "gpt4_1a2b3c4d_abs"
evaluate --data narrated.json => session 0, turn 0: "role" is "narrator", neither "user" nor "assistant"
evaluate --data undated.json => "haystack_dates" has 1 dates for 5 of "haystack_sessions"
evaluate --data quiet.json => quiet.json: entry 0 (gpt4_1a2b3c4d_abs): "haystack_sessions" has no turn
evaluate --data untyped.json => "question_type" is "trivia", not one of single-session-user, single-session-preference
evaluate --data crowd.json => session 1, turn 0: "id" is "Speaker 3", neither "Speaker 1" nor "Speaker 2"
evaluate --data short.json => short.json: entry 0 (valid_0): "previous_dialogs" have no turn
evaluate --data null-gold.json => question 0: "answer" is not text or a number
evaluate --data category.json => question 0: "category" is 6, not one of 1 to 5
evaluate --data third.txt => third.txt: line 3: "Eve" is a third speaker besides Ann and Bob
evaluate --data monologue.txt => monologue.txt: only Ann speaks, but two must
evaluate --data evidence.json => "evidence" has 3, not the number of a turn, 1 to 2
evaluate --data latin.txt => latin.txt: cannot be read as text in UTF-8
evaluate --adversarial => --data synthetic has no adversarial questions: only LoCoMo has
evaluate --adversarial --data narrated.json => --data narrated.json has no adversarial questions
evaluate --export mem0 => --export mem0 needs --out FILE.json, next to which it writes
evaluate --export locomo --out x.json => --export locomo: synthetic has other questions; give --export mem0
evaluate --export longmemeval --data locomo.json --out x.json => --export longmemeval: locomo.json has other questions
evaluate --export dpr => argument --export: invalid choice: 'dpr'
evaluate --model templates => has the chat templates rag, tool_use; name one of them 'default'
evaluate --model conv1d => model conv1d: LoRA needs nn.Linear layers, and gpt2 has none; choose one of llama, mistral
evaluate --model scaled => model scaled: granite changes its head's logits and cannot be scored
evaluate --embedder weighted => embedder 'weighted' cannot be loaded as an encoder (ValueError: it needs weightedmean
evaluate --embedder dense => 'dense' cannot be loaded as an encoder (ValueError: it needs Dense, which is not supported)
evaluate --embedder unprompted => its pooling leaves out the prompt, which is not supported
evaluate --limit 1 --manager base --max-new-tokens 4090 => but the window of model
evaluate --limit 1 --system rag --max-answer-tokens 5000 => but the window of model
evaluate --judge-tokens 0 => --judge-tokens 0: must be at least 1
evaluate --model ./nowhere => nowhere: no config.json there
evaluate --out x.txt => --out x.txt: give a name that ends in .json
evaluate --out locomo.json => locomo.json: cannot be continued, as it holds no results
evaluate --out torn.json/x.json => cannot be written (File exists)
evaluate --compare a.json b.json => a.json: there are no answers of evaluate.py --out; give FILE.json
evaluate --compare locomo.json locomo.json => locomo.json: there are no answers
""".strip().splitlines()]


def copied(name, edit):
    shutil.copytree(TINY, name)
    edit(Path(name))


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def foreign(folder):
    (folder / "foreign.py").write_text(f"open({str(folder.parent / 'OWNED')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "foreign", "auto_map": names}))


def write_models():
    """Folders of models and encoders that lack something."""
    copied("templates", lambda to: (to / "chat_template.jinja").unlink())
    Path("templates/additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        Path(f"templates/additional_chat_templates/{name}.jinja").write_text("{{ messages }}")
    size = {"vocab_size": len(AutoTokenizer.from_pretrained(TINY)), "bos_token_id": 1, "eos_token_id": 2}
    for name, model in (("conv1d", GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=64, **size))),
                        ("scaled", GraniteForCausalLM(GraniteConfig(
                            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                            num_key_value_heads=2, logits_scaling=4.0, **size)))):
        copied(name, model.save_pretrained)
    for name, file, content in (
            ("weighted", "1_Pooling/config.json", {"pooling_mode": "weightedmean"}),
            ("unprompted", "1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "include_prompt": False}),
            ("dense", "modules.json", [{"type": "sentence_transformers.models.Dense"}])):
        shutil.copytree(TINY, name)
        Path(name, file).parent.mkdir(exist_ok=True)
        Path(name, file).write_text(json.dumps(content))


def misfit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def around(tmp_path_factory, tiny_folder):
    """The folder in which the commands are given."""
    folder, before, threads = tmp_path_factory.mktemp("around"), os.getcwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    Path("empty").mkdir()
    copied("truncated", lambda to: (to / "model.safetensors").write_bytes(b"\x10" + bytes(99)))
    copied("pickled", pickled)
    copied("plain", lambda to: (to / "chat_template.jinja").unlink())
    copied("strict", lambda to: (to / "chat_template.jinja").write_text("{{ raise_exception('no system, please') }}"))
    copied("deaf", lambda to: (to / "chat_template.jinja").write_text("Answer:"))
    copied("foreign", foreign)
    write_models()
    Path("text.gguf").write_text("a text")
    shutil.copytree(tiny_folder, "letters")
    policy = Policy.load(TINY)
    policy.add_adapter("manager", 4, 8)
    for name, changes in (("of-another", {"base_model_name_or_path": "Qwen/Qwen2.5-3B-Instruct"}),
                          ("of-rank-8", {"r": 8}), ("of-pissa", {"init_lora_weights": "pissa"})):
        policy.save_adapter("manager", name)
        misfit(Path(name), **changes)
    for name, content in {
            "locomo": [ENTRY], "null": None, "strange": [{"name": "x"}], "silent": [edited(ENTRY, "qa", value=[])],
            "mistaken": [edited(ENTRY, "conversation", "session_2", 0, "speaker", remove=True)],
            "unlinked": [edited(ENTRY, "qa", value=[ENTRY["qa"][2]])],
            "null-gold": [edited(ENTRY, "qa", 0, "answer")], "category": [edited(ENTRY, "qa", 0, "category", value=6)],
            "nan": [CHATS | {"answer": math.nan}], "listed": [CHATS | {"answer": [2, 3]}], "twice": [CHATS, CHATS],
            "narrated": [edited(CHATS, "haystack_sessions", 0, 0, "role", value="narrator")],
            "undated": [CHATS | {"haystack_dates": ["today"]}], "untyped": [CHATS | {"question_type": "trivia"}],
            "quiet": [CHATS | {"haystack_sessions": [[]] * 5}], "short": [MSC | {"previous_dialogs": []}],
            "crowd": [edited(MSC, "previous_dialogs", 0, "dialog", 0, "id", value="Speaker 3")],
            "evidence": [TALK | {"questions": [{"question": "?", "answer": "a", "evidence": [1, 3]}]}]}.items():
        Path(f"{name}.json").write_text(json.dumps(content))
    for name, text in (("third", "Ann: a\nBob: b\nEve: c\n"), ("monologue", "Ann: a\nAnn: b\n"),
                       ("latin", "Ann: caf\xe9\n")):
        Path(f"{name}.txt").write_bytes(text.encode("latin-1"))
    Path("torn.json").write_text(json.dumps([ENTRY])[:-9])
    train_manager.main([*QUICK.split(), "--out", "done"])
    shutil.copytree("done", "unselective")
    Path("unselective/config.json").write_text('{"agent": "answer", "algo": "grpo", "distill": false}')
    Path("finished").mkdir()  # only the adapter of a run was kept
    shutil.copytree("done/adapter", "finished/adapter")
    for name in ("further", "damaged"):
        shutil.copytree("done", name)
        [checkpoint] = Path(name, "checkpoint").iterdir()
        if name == "further":
            torch.save({**torch.load(checkpoint, weights_only=True), "step": 7}, checkpoint)
        else:
            checkpoint.write_bytes(checkpoint.read_bytes()[:-99])
    yield folder
    os.chdir(before)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, no hosted model, no cache, and dialogues of a tenth of the usual length."""
    for name in ("JUDGE_URL", "OPENAI_BASE_URL", "JUDGE_MODEL", "MANAGER_URL", "MANAGER_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEMORY_R1_DATA", str(tmp_path / "no-data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(data.locomo, "ADDRESS", "http://127.0.0.1:1/locomo10.json")
    monkeypatch.setattr(train_answer, "NUM_TURNS", 10)
    monkeypatch.setattr(train_answer, "NUM_DIALOGUES", 2)


def run_and_fail(script, flags, monkeypatch, capsys):
    """The output of a command that must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        exit_cleanly(lambda: SCRIPTS[script].main(flags))
    assert stop.value.code == 2
    return capsys.readouterr()


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "lock" not in path.name}


@pytest.mark.parametrize("command, words", TABLE, ids=[command for command, _ in TABLE])
def test_one_line_and_exit_code_2(around, monkeypatch, capsys, command, words):
    script, *flags = shlex.split(command)
    quick = SFT_QUICK if "sft" in flags else QUICK
    start = [*quick.split(), "--out", "run"] if script.startswith("train") else []
    before = files(around)
    shown = run_and_fail(script, [*start, *flags], monkeypatch, capsys)  # if a flag is given twice, the last counts
    lines = [line for line in shown.err.splitlines() if not line.startswith(("note: ", "fetching "))]
    assert len(lines) == 1 and f"{script}.py: error: " in lines[0] and words in lines[0]
    assert files(around) == before, "no file was written or lost"


def test_the_table_is_long_enough():
    assert len(TABLE) >= 40 and {command.split()[0] for command, _ in TABLE} == set(SCRIPTS)


@pytest.mark.parametrize("command, words", [row for row in TABLE if row[0] in (
    "train_manager --steps 0", "train_answer --manager-adapter nowhere", "evaluate --split dev")])
def test_from_the_shell_too(tmp_path, command, words):
    script, *flags = shlex.split(command)
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("reply, code", [
    ("label: correct", 0), ((401, {}, b"the key sk-secret is not welcome"), 2), ("I cannot say.", 2),
    ((200, {}, b'{"error": {"message": "the key sk-secret has expired"}}'), 2)])
def test_the_key_of_a_judge_is_written_nowhere(around, tmp_path, serve, monkeypatch, capfd, reply, code):
    server = serve(rule=reply)
    for name, value in {"URL": server.url, "MODEL": "m", "API_KEY": "sk-secret"}.items():
        monkeypatch.setenv(f"JUDGE_{name}", value)
    flags = [*QUICK.split(), "--max-new-tokens", "40", "--reward", "judge", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train_manager.py", *flags])
    try:
        exit_cleanly(lambda: train_manager.main(flags))
        assert code == 0 and [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [1]
    except SystemExit as stop:
        assert stop.code == code == 2
    shown = capfd.readouterr()
    assert server.requests[0]["headers"]["Authorization"] == "Bearer sk-secret"
    written = b"".join(path.read_bytes() for path in files(tmp_path)) + shown.out.encode() + shown.err.encode()
    assert b"sk-secret" not in written and b'"judge"' in written


def test_a_url_with_a_password_is_refused_without_showing_it(around, monkeypatch, capsys):
    for name, value in {"URL": "http://me:sk-word@127.0.0.1/v1", "MODEL": "m"}.items():
        monkeypatch.setenv(f"JUDGE_{name}", value)
    shown = run_and_fail("train_manager", [*QUICK.split(), "--reward", "judge", "--out", "run"], monkeypatch, capsys)
    assert "sk-word" not in shown.out + shown.err and "JUDGE_URL" in shown.err and not Path("run").exists()
