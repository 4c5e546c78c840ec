"""Figures of a run and of several runs; the table of runs."""
import json
import math
import sys
from pathlib import Path

import pytest

from data import UsageError
from support import plots
from support.plots import plot_run, plot_runs, read_runs, table_of_runs
from support.run import warn_once

PNG = b"\x89PNG"


def write_run(folder, rows, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"agent": "manager", "algo": "grpo", **config}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_one_run(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"step": 0, "eval": "untrained", "em": 0.1}]
    assert plot_run(write_run(tmp_path, rows)) is None  # nothing to draw
    for step in range(1, 5):
        rows.append({"step": step, "reward": step / 5, "kl": None, "ops": {"ADD": step}, "bank_size": 9})
        assert plot_run(write_run(tmp_path, rows)).read_bytes().startswith(PNG)
    losses = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    assert plot_run(write_run(tmp_path / "sft", losses)).read_bytes().startswith(PNG)


def test_without_matplotlib_there_is_one_warning_and_no_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    warn_once.cache_clear()
    write_run(tmp_path, [{"step": 1, "reward": 1.0}])
    assert plot_run(tmp_path) is None and plot_run(tmp_path) is None
    assert capsys.readouterr().err.count("pip install matplotlib") == 1


def test_smooth_ignores_what_is_not_finite():
    assert plots.smooth(plots.column([{"x": 1}, {"x": None}, {"x": 3}], "x")).tolist()[::2] == [1, 3]
    values = plots.smooth(plots.column([{"x": i} if i != 15 else {} for i in range(30)], "x"))
    assert values[10] == 10 and values[15] == pytest.approx(15) and math.isfinite(values.sum())


@pytest.fixture
def two_runs(tmp_path):
    for name, algo, em in (("a", "grpo", 0.5), ("b", "ppo", 0.75)):
        rows = [{"step": step, "reward": step / 12, "seconds": 30,
                 **({"explained_variance": step / 20} if algo == "ppo" else {})} for step in range(1, 13)]
        write_run(tmp_path / name, [*rows, {"step": 12, "eval": "trained", "em": em, "bank_size": 8.5}], algo=algo)
    return [tmp_path / "a", tmp_path / "b"]


def test_several_runs(two_runs, tmp_path):
    found = [run for folder in two_runs for run in read_runs(folder)]
    assert table_of_runs(found).splitlines()[2:] == [  # 12 steps of half a minute; the mean of .15, .20, ... .60
        "| a: trained | 0.500 | 8.500 | 6.0 |  |", "| b: trained | 0.750 | 8.500 | 6.0 | 0.38 |"]
    with pytest.raises(UsageError, match="is not a run's folder"):
        read_runs(tmp_path)
    pytest.importorskip("matplotlib")
    plot_runs(found, tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)


def test_a_run_in_progress_has_a_row(tmp_path):
    steps = [{"step": 1, "reward": 0.5, "seconds": 6}, {"step": 0, "eval": "untrained", "em": 0.25}]
    assert table_of_runs(read_runs(write_run(tmp_path / "c", steps))).splitlines() == [
        "| run | em | minutes | explained variance |", "| --- | --- | --- | --- |",
        "| c: untrained | 0.250 |  |  |", "| c: trained |  | 0.1 |  |"]


def test_a_joint_run_is_a_run_of_each_agent(tmp_path):
    rows = [{"step": 0, "eval": "untrained", "agent": "manager", "em": .5},
            {"step": 0, "eval": "untrained", "agent": "answer", "em": .25},
            {"step": 1, "reward": .5, "manager_reward": .75, "answer_reward": .25, "answer_selected": 3, "seconds": 6}]
    found = read_runs(write_run(tmp_path / "j", rows, agent="joint"))
    assert [(run["name"], run["agent"], run["algo"]) for run in found] == [
        ("j: manager", "manager", "joint"), ("j: answer", "answer", "joint")]
    assert [run["steps"][0]["reward"] for run in found] == [.75, .25]
    assert [run["steps"][0].get("selected") for run in found] == [None, 3]
    assert [run["results"]["untrained"]["em"] for run in found] == [.5, .25]
    pytest.importorskip("matplotlib")
    assert plot_run(tmp_path / "j").read_bytes().startswith(PNG)
    plot_runs(found, tmp_path / "joint.png")
    assert (tmp_path / "joint.png").read_bytes().startswith(PNG)


def test_the_command(two_runs, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    plots.main(["a", "b"])
    assert capsys.readouterr().out.startswith("| run | em | bank_size |")
    write_run(Path("sft"), [{"step": 1, "loss": 1.0, "seconds": 6}], algo="sft")
    plots.main(["sft", "--out", "sft.png"])
    assert capsys.readouterr().out.endswith("\nno figure: no run has a reward\n") and not Path("sft.png").exists()
    pytest.importorskip("matplotlib")
    plots.main(["a", "sft"])
    assert capsys.readouterr().out.endswith("\nfigure: curves.png\n")
    assert Path("curves.png").read_bytes().startswith(PNG)
    with pytest.raises(UsageError, match="ends in .png, .pdf or .svg"):
        plots.main(["a", "--out", "c.foo"])
