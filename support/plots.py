"""
Figures of a run and of several runs. They need matplotlib, an optional extra.

    python -m support.plots runs/manager-grpo runs/manager-ppo --out curves.png    # also prints a table of the results

The colours are from Okabe and Ito's palette, which colour-blind readers can tell apart.
"""
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import UsageError
from support.cli import Parser, exit_cleanly
from support.held_out import AGENTS
from support.report import OPERATIONS
from support.run import disk_errors, read_config, read_rows, warn_once

BLUE, SKY, VERMILION, GREY = "#0072B2", "#56B4E9", "#D55E00", "#DDDDDD"
STYLES = {"grpo": (BLUE, "-"), "ppo": (VERMILION, "--"), "sft": ("#000000", ":"), "joint": ("#009E73", "-.")}
PANELS = {"reward": "reward", "loss": "loss\n(nats per token)", "kl": "KL to reference\n(nats per token)",
          "ops": "operations\n(fraction)", "bank_size": "bank size\n(memories)"}
ABOVE = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 4, "frameon": False, "borderaxespad": 0}
RESULTS = ("em", "f1", "bank_size", "agreement", "selected", "evidence")  # columns of the table of runs


def new_figure(name: str | Path, width: float, height: float):
    """An empty figure, size in inches; None and a warning without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warn_once(f"no {name} without matplotlib: pip install matplotlib")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: str | Path) -> None:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    with disk_errors(Path(path).parent):
        figure.savefig(path, dpi=150)


def column(rows: Sequence[dict], key: str, missing=math.nan) -> np.ndarray:
    return np.array([missing if row.get(key) is None else row[key] for row in rows], dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average of the finite values over a tenth of the run."""
    window, is_finite = np.ones(max(1, len(values) // 10)), np.isfinite(values)
    with np.errstate(invalid="ignore"):  # 0 / 0 where no value is finite
        return np.convolve(np.where(is_finite, values, 0), window, "same") / np.convolve(is_finite, window, "same")


def plot_run(folder: str | Path) -> Path | None:
    """Draw curve.png from metrics.jsonl: reward or loss, KL, and the Manager's operations and bank size."""
    runs, path = read_runs(folder), Path(folder) / "curve.png"
    panels = [key for key in PANELS if any(row.get(key) is not None for run in runs for row in run["steps"])]
    figure = new_figure(path.name, 7 * len(runs), 0.6 + 2 * len(panels)) if panels else None
    if figure is None:
        return None
    grid = figure.subplots(len(panels), len(runs), sharex=True, squeeze=False)
    for axes, run in zip(grid.T, runs, strict=True):
        plot_agent(axes, run, panels)
    save_figure(figure, path)
    return path


def plot_agent(axes, run: dict, panels: Sequence[str]) -> None:
    held_out = [result for when, result in run["results"].items() if when in ("untrained", "trained")]
    for ax, key in zip(axes, panels, strict=True):
        draw_operations(ax, run["steps"]) if key == "ops" else draw_curve(ax, run["steps"], key)
        ax.set_ylabel(PANELS[key])
    if held_out and panels[0] == "reward":
        axes[0].plot(column(held_out, "step"), column(held_out, "em"), "kD", clip_on=False, label="held-out EM")
    axes[0].legend(**ABOVE)
    axes[0].set_title(AGENTS[run["agent"]], loc="left")
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)


def draw_curve(ax, rows: Sequence[dict], key: str) -> None:
    ax.plot(column(rows, "step"), column(rows, key), color=SKY, linewidth=0.8, label="each step")
    ax.plot(column(rows, "step"), smooth(column(rows, key)), color=BLUE, linewidth=2, label="smoothed")


def draw_operations(ax, rows: Sequence[dict]) -> None:
    """The fraction of each operation, smoothed and stacked."""
    counts = [smooth(column([row.get("ops") or {} for row in rows], event, missing=0)) for event in OPERATIONS]
    fractions = np.stack(counts) / np.maximum(np.sum(counts, axis=0), 1e-9)
    ax.stackplot(column(rows, "step"), fractions, colors=(BLUE, SKY, VERMILION, GREY), labels=OPERATIONS)
    ax.set_ylim(0, 1)
    ax.legend(**ABOVE)


def read_runs(folder: str | Path) -> list[dict]:
    """
    A run's name, agent, algorithm, training rows and held-out results. A run of train_joint.py counts as two, with
    metrics such as `manager_reward`.
    """
    config, rows = read_config(folder), read_rows(Path(folder, "metrics.jsonl"))
    is_joint, name = config["agent"] == "joint", Path(folder).name
    return [{"name": f"{name}: {agent}" if is_joint else name, "agent": agent,
             "algo": "joint" if is_joint else config["algo"],
             "steps": [row | {key.removeprefix(f"{agent}_"): value for key, value in row.items()
                              if key.startswith(f"{agent}_")} for row in rows if "eval" not in row],
             "results": {row["eval"]: row for row in rows if "eval" in row and row.get("agent", agent) == agent}}
            for agent in (("manager", "answer") if is_joint else (config["agent"],))]


def table_of_runs(runs: Sequence[dict]) -> str:
    """Every held-out result of every run, as Markdown. The row "trained" also has the totals of the run."""
    every = [result for run in runs for result in run["results"].values()]
    shown = [key for key in RESULTS if any(result.get(key) is not None for result in every)]
    cells = [["run", *shown, "minutes", "explained variance"], ["---"] * (len(shown) + 3)]
    for run in runs:
        minutes = f"{sum(row['seconds'] for row in run['steps']) / 60:.1f}"
        variances = column(run["steps"][-10:], "explained_variance")
        explained = f"{np.nanmean(variances):.2f}" if np.isfinite(variances).any() else ""
        for name, result in {**run["results"], "trained": run["results"].get("trained", {})}.items():
            numbers = ["" if result.get(key) is None else f"{result[key]:.3f}" for key in shown]
            totals = [minutes, explained] if name == "trained" else ["", ""]
            cells.append([f"{run['name']}: {name}", *numbers, *totals])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def plot_runs(runs: Sequence[dict], path: str | Path) -> None:
    """Reward over steps and over seconds: thin curves are smoothed runs, thick ones the mean of an algorithm's runs."""
    runs = [run for run in runs if any(row.get("reward") is not None for row in run["steps"])]
    agents = sorted({run["agent"] for run in runs}, reverse=True)
    if not runs:
        return print("no figure: no run has a reward")
    figure = new_figure(path, 8, 2.8 * len(agents))
    if figure is None:
        return
    for axes, agent in zip(figure.subplots(len(agents), 2, sharey="row", squeeze=False), agents, strict=True):
        for ax, unit in zip(axes, ("step", "seconds"), strict=True):
            draw_rewards(ax, [run for run in runs if run["agent"] == agent], unit)
        axes[0].set_ylabel(f"reward, {AGENTS[agent]}")
        axes[0].set_ylim(bottom=0)
        axes[0].legend(frameon=False, loc="lower right")
    save_figure(figure, path)
    print(f"figure: {path}")


def draw_rewards(ax, runs: Sequence[dict], unit: str) -> None:
    """The runs of an agent, and the mean of each algorithm over the range of x that its runs share."""
    for algo, (color, style) in STYLES.items():
        curves = []
        for steps in (run["steps"] for run in runs if run["algo"] == algo):
            x = column(steps, unit)
            curves.append((np.cumsum(x) if unit == "seconds" else x, smooth(column(steps, "reward"))))
            ax.plot(*curves[-1], color=color, linewidth=0.7, alpha=0.5)
        if curves:
            x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
            label = f"{'joint' if algo == 'joint' else algo.upper()}, {len(curves)} run{'s' * (len(curves) > 1)}"
            ax.plot(x, np.mean([np.interp(x, *curve) for curve in curves], axis=0), color=color, linewidth=2.2,
                    linestyle=style, label=label)
    ax.set_xlabel("step" if unit == "step" else "seconds of training")


def main(argv=None) -> None:
    parser = Parser(prog="-m support.plots", usage="python -m support.plots RUN [RUN ...] [--out FILE.png]",
                    description="Compare runs: their held-out results as a table, their rewards as a figure.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", default="curves.png", metavar="FILE.png", help="the figure (curves.png)")
    args = parser.parse_args(argv)
    if Path(args.out).suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--out {args.out}: give a name that ends in .png, .pdf or .svg")
    runs = [run for folder in args.runs for run in read_runs(folder)]
    print(table_of_runs(runs))
    plot_runs(runs, args.out)


if __name__ == "__main__":
    exit_cleanly(main, resume_hint="nothing is lost")
