"""Whole scripts in two processes under torchrun."""
import json

from processes import ROOT, finished, torchrun

from support.run import read_rows


def test_a_script_in_two_processes_writes_one_run_and_resumes(tmp_path):
    flags = ["--steps", "2", "--eval", "0", "--batch-size", "3", "--group-size", "2", "--refresh", "1",
             "--max-new-tokens", "24", "--out", tmp_path / "run"]
    done = finished(torchrun(ROOT / "train_manager.py", *flags))
    assert done.returncode == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == f"manager by grpo, seed 0, into {tmp_path / 'run'}" and len(lines) == 5
    assert [line[:10] for line in (lines[1], lines[3])] == ["step   1/2", "step   2/2"] and "s a step" in lines[2]
    assert {path.name for path in (tmp_path / "run").iterdir()} - {"curve.png"} == {
        "adapter", "checkpoint", "config.json", "lock", "metrics.jsonl", "samples.jsonl"}
    assert json.loads((tmp_path / "run/config.json").read_text())["processes"] == 2
    more = finished(torchrun(ROOT / "train_manager.py", *flags, "--steps", "3", "--resume"))
    assert more.returncode == 0, more.err
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and len(read_rows(tmp_path / "run/samples.jsonl")) == 9


def test_an_error_is_printed_once_and_ends_all_processes(tmp_path):
    done = finished(torchrun(ROOT / "train_manager.py", "--model", "./nowhere", "--out", tmp_path / "run"))
    assert done.returncode != 0 and done.err.count("train_manager.py: error:") == 1 and "Traceback" not in done.out
    assert "no config.json there" in done.err and not (tmp_path / "run").exists()
