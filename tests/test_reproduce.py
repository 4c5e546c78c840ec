"""The commands of docs/reproduce.md, run as they are printed, with small models and files instead of large ones."""
import json
import re
import shlex
from argparse import Namespace
from pathlib import Path
from string import Template

import pytest
import torch
from mutations import edited
from test_locomo import ENTRY as LOCOMO
from test_longmemeval import ENTRY as LONGMEMEVAL
from test_msc import ENTRY as MSC
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import evaluate
import train_answer
import train_manager
from data import TINY, longmemeval
from policy import Policy
from support import plots, report
from support.run import read_rows

PAGE = Path(__file__).parents[1] / "docs/reproduce.md"
SECTION = PAGE.read_text(encoding="utf-8").split("\n## Commands\n")[1].split("\n## ")[0]
BLOCK = SECTION.split("```sh\n")[1].split("```")[0].replace("\\\n", " ").strip().splitlines()
TABLE = [line.strip("| ").split(" | ") for line in SECTION[SECTION.index("| in the paper"):].splitlines()
         if line.startswith("| ")]
SCRIPTS = {"train_manager.py": train_manager, "train_answer.py": train_answer, "evaluate.py": evaluate,
           "support.plots": plots}
SMALL = {  # flags that are added to those of a command; the last of two equal flags counts
    "train_manager.py": "--steps 1 --batch-size 2 --rank 2 --max-new-tokens 24 --max-answer-tokens 8 --no-extract",
    "train_answer.py": "--steps 1 --batch-size 2 --rank 2 --max-new-tokens 8 --max-operation-tokens 24",
    "evaluate.py": "--limit 2 --max-new-tokens 24 --max-answer-tokens 8 --out x.json", "support.plots": ""}


def commands() -> dict[str, str]:
    """{row of the table: command}, with `...` and the beginning from the table's heading filled in."""
    found = {f"training {i}": line for i, line in enumerate(BLOCK) if line.startswith("python ")}
    evaluation, *added = re.findall("`([^`]+)`", TABLE[0][1])
    for name, cell in TABLE[1:]:
        for part in re.findall("`([^`]+)`", cell):
            if part.endswith(" ..."):
                begin = " ".join(part.split()[:4])  # python SCRIPT --algo NAME
                part = part[:-4] + next(line for line in BLOCK if line.startswith(begin)).removeprefix(begin)
            if part.startswith("--data"):
                found[f"{name} {len(found)}"] = f"{evaluation} {part}"
            elif part.startswith("python "):
                found[f"{name} {len(found)}"] = part
            elif part.startswith("--"):
                added.append(part)
    some = next(command for command in found.values() if command.startswith(evaluation))
    return found | {flags: f"{some} {flags}" for flags in added}


COMMANDS = commands()
FOLDERS = set(re.findall(r"runs/[\w-]+", SECTION))


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """Files for the commands: benchmarks of a few turns, a run for every name, an untrained cross-encoder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("around")
    (folder / "data").mkdir()
    conversations = [edited(LOCOMO, "sample_id", value=name) for name in ("conv-26", "conv-30", "conv-41")]
    (folder / "data/locomo10.json").write_text(json.dumps(conversations))
    questions = [edited(LONGMEMEVAL, "question_type", value="multi-session"),
                 edited(LONGMEMEVAL, "question_id", value="1a2b")]
    for file, *_ in longmemeval.FILES.values():
        (folder / "data" / file).write_text(json.dumps(questions))
    chats = [edited(MSC, "metadata", "initial_data_id", value=f"valid_{i}") for i in range(3)]
    (folder / "data/msc_self_instruct.jsonl").write_text("\n".join(map(json.dumps, chats)))
    policy = Policy.load(TINY)
    policy.add_adapter("fresh", 2, 4)
    for run in FOLDERS:
        policy.save_adapter("fresh", folder / run / "adapter")
        agent, algo = run.removeprefix("runs/").split("-")[:2]
        (folder / run / "config.json").write_text(json.dumps({"agent": agent, "algo": algo}))
        (folder / run / "metrics.jsonl").write_text("".join(
            json.dumps({"step": step, "reward": step / 4, "seconds": 1}) + "\n" for step in (1, 2, 3)))
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1)).save_pretrained(folder / "cross")
    tokenizer.save_pretrained(folder / "cross")
    return folder


@pytest.fixture
def server(serve, monkeypatch):
    """A server whose model extracts every turn as a fact, adds every fact, and marks every answer as right."""
    def rule(messages):
        *_, text, wanted = messages[-1]["content"].splitlines()
        return {"facts:": json.dumps([text]), "operations:": json.dumps([{"event": "ADD", "text": text}]),
                "reason, then label:": 'The same. {"label": "CORRECT"}'}[wanted]
    server = serve(rule=rule)
    for name in ("JUDGE", "MANAGER"):
        monkeypatch.setenv(f"{name}_URL", server.url)
        monkeypatch.setenv(f"{name}_MODEL", "big")
    return server


def arguments(command: str, around: Path) -> tuple[str, list[str]]:
    """The script and its flags, with small values in the place of large ones."""
    assert set(re.findall(r"(\w+)=", BLOCK[0])) == {"M", "E"}
    _, script, *flags = shlex.split(Template(command).substitute(M=TINY, E=f"hash+{around / 'cross'}"))
    if script == "-m":
        script, *flags = flags
    if script.startswith("train_") and "sft" not in flags:  # sft has no groups
        flags += ["--group-size", "2"]
    if script == "train_answer.py" and "sft" in flags:
        flags += ["--no-distill"]  # the tiny model's bank of LoCoMo lacks the evidence to select
    if "--reranker" in flags:
        flags[flags.index("--reranker") + 1] = str(around / "cross")
    return script, [*flags, *SMALL[script].split()]


@pytest.mark.parametrize("place", COMMANDS)
def test_a_command_does_what_it_promises(place, around, server, tmp_path, monkeypatch, capsys):
    script, flags = arguments(COMMANDS[place], around)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MEMORY_R1_DATA", str(around / "data"))
    args = SCRIPTS[script].arguments(flags) if script != "support.plots" else Namespace(out=None)
    Path("runs").mkdir()
    for run in FOLDERS - {args.out}:
        Path(run).symlink_to(around / run)
    SCRIPTS[script].main(flags)
    check = {"evaluate.py": check_report, "support.plots": check_plot}.get(script, check_run)
    check(args, capsys.readouterr().out, server)


def check_run(args, printed, server):
    folder = Path(args.out)
    rows = read_rows(folder / "metrics.jsonl")
    assert f"adapter, metrics and samples are in {folder}" in printed and str(folder) in FOLDERS
    assert [row.get("eval") for row in rows][-2:] == [None, "trained"] and rows[-1]["n"] == 4
    assert all((folder / name).is_file() for name in ("adapter/adapter_config.json", "config.json", "samples.jsonl",
                                                      "adapter/adapter_model.safetensors", "curve.png"))


def check_report(args, printed, server):
    found, lines = json.loads(Path("x.json").read_text()), report.read_predictions("x.json")
    num_systems = len([*(args.system or []), *(args.manager or [])]) * len(args.answer or ["base"])
    assert len(found["rows"]) == num_systems and len(lines) == 2 * num_systems
    for row in found["rows"]:
        assert row["overall"]["n"] == 2 and (row["overall"]["judge"] is None) == (args.judge is None)
        assert {"p50", "p95"} == set(row["latency"]["search"]) == set(row["latency"]["answer"])
    assert ("Memory-R1-GRPO     35.73/27.70/59.83" in printed) == args.paper
    assert {row["at_once"] for row in found["rows"]} == {args.at_once} and "ms to answer" in printed
    hosted = [row for row in found["rows"] if row["source"] == "endpoint"]
    assert all(row["ops"] == {"ADD": 3} for row in hosted) and (server.requests or not hosted)


def check_plot(args, printed, server):
    assert Path("curves.png").is_file() and printed.startswith("| run |")


def test_every_row_has_a_command_and_every_run_a_command_that_makes_it(around):
    without = [name for name, _ in TABLE[1:] if not any(place.startswith(name) for place in COMMANDS)]
    assert without == ["table 3, model sizes", "latency (appendix G)"]
    assert [place for place in COMMANDS if place.startswith("--")] == ["--judge endpoint", "--at-once 1"]
    called = [arguments(command, around) for command in COMMANDS.values()]
    assert FOLDERS == {SCRIPTS[script].arguments(flags).out for script, flags in called if script.startswith("train")}
