"""
Figures of a run, of several runs and of an evaluation. They need matplotlib, an optional extra.

    python -m support.plots runs/manager-grpo runs/manager-ppo --out curves.png    # also prints a table of the results

The colours are from Okabe and Ito's palette, which colour-blind readers can tell apart.
"""
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import UsageError
from support.cli import Parser, exit_cleanly
from support.report import CATEGORY_NAMES, OPERATIONS
from support.run import disk_errors, read_config, read_rows, warn_once

BLUE, SKY, VERMILION, GREY = "#0072B2", "#56B4E9", "#D55E00", "#DDDDDD"
STYLES = {"grpo": (BLUE, "-"), "ppo": (VERMILION, "--"), "sft": ("#000000", ":")}
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


def column(rows, key, missing=math.nan):
    return np.array([missing if row.get(key) is None else row[key] for row in rows], dtype=float)


def smooth(values):
    """Moving average of the finite values over a tenth of the run."""
    window, is_finite = np.ones(max(1, len(values) // 10)), np.isfinite(values)
    with np.errstate(invalid="ignore"):  # 0 / 0 where no value is finite
        return np.convolve(np.where(is_finite, values, 0), window, "same") / np.convolve(is_finite, window, "same")


# ------------------------------------------------------------------------------------------------ one run

def plot_run(folder: str | Path) -> Path | None:
    """Draw curve.png from metrics.jsonl: reward or loss, KL, and the Manager's operations and bank size."""
    rows, path = read_rows(Path(folder) / "metrics.jsonl"), Path(folder) / "curve.png"
    held_out = [row for row in rows if row.get("eval") in ("untrained", "trained")]
    rows = [row for row in rows if "eval" not in row]
    panels = [key for key in PANELS if any(row.get(key) is not None for row in rows)]
    figure = new_figure(path.name, 7, 0.6 + 2 * len(panels)) if panels else None
    if figure is None:
        return None
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, key in zip(axes, panels, strict=True):
        draw_operations(ax, rows) if key == "ops" else draw_curve(ax, rows, key)
        ax.set_ylabel(PANELS[key])
    if held_out and panels[0] == "reward":
        axes[0].plot(column(held_out, "step"), column(held_out, "em"), "kD", clip_on=False, label="held-out EM")
    axes[0].legend(**ABOVE)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels(axes)
    save_figure(figure, path)
    return path


def draw_curve(ax, rows, key):
    ax.plot(column(rows, "step"), column(rows, key), color=SKY, linewidth=0.8, label="each step")
    ax.plot(column(rows, "step"), smooth(column(rows, key)), color=BLUE, linewidth=2, label="smoothed")
    ax.margins(x=0.01)


def draw_operations(ax, rows):
    """The fraction of each operation, smoothed and stacked."""
    ops = [row.get("ops") or {} for row in rows]
    counts = [smooth(column(ops, event, missing=0)) for event in OPERATIONS]
    fractions = np.stack(counts) / np.maximum(np.sum(counts, axis=0), 1e-9)
    ax.stackplot(column(rows, "step"), fractions, colors=(BLUE, SKY, VERMILION, GREY), labels=OPERATIONS,
                 edgecolor="white")
    ax.set_ylim(0, 1)
    ax.legend(**ABOVE)


# ------------------------------------------------------------------------------------------------ several runs

def read_run(folder: str) -> dict:
    """Name, agent and algorithm of a run, its training rows and its held-out results."""
    config, rows = read_config(folder), read_rows(Path(folder, "metrics.jsonl"))
    return {"name": Path(folder).name, "agent": config["agent"], "algo": config["algo"],
            "steps": [row for row in rows if "eval" not in row],
            "results": {row["eval"]: row for row in rows if "eval" in row}}


def table_of_runs(runs: Sequence[dict]) -> str:
    """Every held-out result of every run, as Markdown."""
    every = [result for run in runs for result in run["results"].values()]
    shown = [key for key in RESULTS if any(result.get(key) is not None for result in every)]
    heads = ["run", *shown, "minutes", "explained variance"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in runs:
        variances = [row["explained_variance"] for row in run["steps"][-10:]
                     if row.get("explained_variance") is not None]
        totals = [f"{sum(row['seconds'] for row in run['steps']) / 60:.1f}",
                  f"{np.mean(variances):.2f}" if variances else ""]
        for name, result in {**run["results"], "trained": run["results"].get("trained", {})}.items():
            numbers = ["" if result.get(key) is None else f"{result[key]:.3f}" for key in shown]
            cells = [f"{run['name']}: {name}", *numbers, *(totals if name == "trained" else ["", ""])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of several curves (x, y) over the range of x that all have."""
    x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
    return x, np.mean([np.interp(x, *curve) for curve in curves], axis=0)


def plot_runs(runs: Sequence[dict], path: str | Path) -> None:
    """Reward over steps and over seconds: thin curves are smoothed runs, thick ones the mean of an algorithm's runs."""
    runs = [run for run in runs if any(row.get("reward") is not None for row in run["steps"])]
    agents = sorted({run["agent"] for run in runs}, reverse=True)
    figure = new_figure(path, 8, 2.8 * len(agents)) if runs else None
    if figure is None:
        return
    for axes, agent in zip(figure.subplots(len(agents), 2, sharey="row", squeeze=False), agents, strict=True):
        for ax, unit in zip(axes, ("step", "seconds"), strict=True):
            draw_rewards(ax, [run for run in runs if run["agent"] == agent], unit)
        axes[0].set_ylabel(f"reward, {'Memory Manager' if agent == 'manager' else 'Answer Agent'}")
        axes[0].set_ylim(bottom=0)
        axes[0].legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def draw_rewards(ax, runs: Sequence[dict], unit: str) -> None:
    for algo, (color, style) in STYLES.items():
        curves = []
        for steps in (run["steps"] for run in runs if run["algo"] == algo):
            x = column(steps, unit)
            curves.append((np.cumsum(x) if unit == "seconds" else x, smooth(column(steps, "reward"))))
            ax.plot(*curves[-1], color=color, linewidth=0.7, alpha=0.5)
        if curves:
            label = f"{algo.upper()}, {len(curves)} run{'s' * (len(curves) > 1)}"
            ax.plot(*mean_curve(curves), color=color, linewidth=2.2, linestyle=style, label=label)
    ax.set_xlabel("step" if unit == "step" else "seconds of training")


# ------------------------------------------------------------------------------------------------ an evaluation

def plot_evaluation(path: str | Path, tables: Sequence[Sequence[dict]]) -> None:
    """F1 by category as bars, one panel per table; F1 by number of memories where several numbers were evaluated."""
    panels = [(draw_bars, rows) for rows in tables]
    panels += [(draw_sweeps, rows) for rows in tables if len({row["memories"] for row in rows}) > 1]
    figure = new_figure(path, 10, 0.5 + 3.5 * len(panels))
    if figure is None:
        return
    from matplotlib import colormaps
    for ax, (draw, rows) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        ax.set_prop_cycle(color=colormaps["tab20"].colors)
        draw(ax, rows)
        ax.set_ylabel("F1")
        ax.set_ylim(bottom=0)
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save_figure(figure, path)


def draw_bars(ax, rows: Sequence[dict]) -> None:
    """A group of bars per category, a bar with its interval per system."""
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        parts = [*row["by_category"].values(), row["overall"]]
        values, low, high = np.array([(part["f1"], *part["interval"]["f1"]) for part in parts]).T
        ax.bar(np.arange(len(parts)) + width * i, values, width, label=row["system"], align="edge",
               yerr=np.maximum([values - low, high - values], 0), ecolor="grey")
    names = [f"{number} {CATEGORY_NAMES[number][0]}".replace(" ", "\n", 1) for number in rows[0]["by_category"]]
    ax.set_xticks(np.arange(len(names) + 1) + 0.4, [*names, "overall"])


def draw_sweeps(ax, rows: Sequence[dict]) -> None:
    """A curve per system that was shown several numbers of memories."""
    for agents in dict.fromkeys((row["source"], row["answer"]) for row in rows):
        sweep = [row for row in rows if (row["source"], row["answer"]) == agents]
        sweep.sort(key=lambda row: row["memories"])
        if len(sweep) > 1:
            ax.plot([row["memories"] for row in sweep], [row["overall"]["f1"] for row in sweep], "o-",
                    label=sweep[0]["system"].split(",")[0])
    ax.set_xticks(sorted({row["memories"] for row in rows}))
    ax.set_xlabel("memories shown")


def main(argv=None) -> None:
    parser = Parser(prog="-m support.plots", usage="python -m support.plots RUN [RUN ...] [--out FILE.png]",
                    description="Compare runs: their held-out results as a table, their rewards as a figure.",
                    epilog="example: python -m support.plots runs/manager-grpo runs/manager-ppo --out curves.png")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", default="curves.png", metavar="FILE.png", help="the figure (curves.png)")
    args = parser.parse_args(argv)
    if Path(args.out).suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--out {args.out}: give a name that ends in .png, .pdf or .svg")
    runs = [read_run(folder) for folder in args.runs]
    print(table_of_runs(runs))
    plot_runs(runs, args.out)


if __name__ == "__main__":
    exit_cleanly(main, resume_hint="nothing is lost")
