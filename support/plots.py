"""
Every picture, where matplotlib is there: of one run, of several side by side, of an evaluation.

    python plots.py runs/manager-grpo runs/manager-ppo --out curves.png    # also prints what each run ended with

Colours are Okabe and Ito's, told apart by the colour-blind, and in print by how dark they are.
"""
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import UsageError
from support.cli import Parser, exit_cleanly
from support.report import NAMES
from support.run import note, read_config, read_rows, writing

BLUE, SKY, VERMILION, GREY = "#0072B2", "#56B4E9", "#D55E00", "#DDDDDD"
EVENTS = {"ADD": BLUE, "UPDATE": SKY, "DELETE": VERMILION, "NOOP": GREY}
ALGORITHMS = {"grpo": (BLUE, "-"), "ppo": (VERMILION, "--"), "sft": ("#000000", ":")}
ABOVE = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 4, "frameon": False, "borderaxespad": 0}
ENDS = ("em", "f1", "bank_size", "agreement", "selected", "evidence")  # of a run, for the table


def new_figure(name: str | Path, width: float, height: float):
    """An empty picture, sizes in inches. Without matplotlib: a note that says so, and None."""
    try:
        from matplotlib.figure import Figure  # here: an extra, slow to load, and it writes into the home folder
    except ImportError:
        note(f"no {name} without matplotlib: pip install matplotlib")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: str | Path) -> None:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    with writing(Path(path).parent):
        figure.savefig(path, dpi=150)


def column(rows, key, missing=math.nan):
    return np.array([missing if row.get(key) is None else row[key] for row in rows], dtype=float)


def smooth(values):
    """The mean over a window around each step, a tenth of the run, of the values that are there."""
    window, is_there = np.ones(max(1, len(values) // 10)), np.isfinite(values)
    with np.errstate(invalid="ignore"):  # 0 / 0 where none is
        return (np.convolve(np.where(is_there, values, 0), window, "same")
                / np.convolve(is_there, window, "same"))


# ------------------------------------------------------------------------------------------------ one run

def plot_run(folder: str | Path) -> Path | None:
    """Draws metrics.jsonl into curve.png: reward or loss, KL, and the Manager's operations and bank."""
    rows = read_rows(Path(folder) / "metrics.jsonl")
    held_out = [row for row in rows if row.get("eval") in ("untrained", "trained")]
    rows = [row for row in rows if "eval" not in row]
    labels = {"reward": "reward", "loss": "loss\n(nats per token)", "kl": "KL to reference\n(nats per token)",
              "ops": "operations\n(share)", "bank_size": "bank size\n(memories)"}
    panels = [key for key in labels if any(row.get(key) is not None for row in rows)]
    figure = new_figure("curve.png", 7, 0.6 + 2 * len(panels)) if panels else None
    if figure is None:
        return None
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, key in zip(axes, panels, strict=True):
        draw_shares(ax, rows) if key == "ops" else draw_curve(ax, rows, key)
        ax.set_ylabel(labels[key])
    if held_out and panels[0] == "reward":
        steps, em = column(held_out, "step"), column(held_out, "em")
        axes[0].plot(steps, em, "kD", clip_on=False, label="held-out EM")
    axes[0].legend(**ABOVE)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels(axes)
    save(figure, Path(folder) / "curve.png")
    return Path(folder) / "curve.png"


def draw_curve(ax, rows, key):
    """The values as measured, thin, and smoothed, thick."""
    ax.plot(column(rows, "step"), column(rows, key), color=SKY, linewidth=0.8, label="each step")
    ax.plot(column(rows, "step"), smooth(column(rows, key)), color=BLUE, linewidth=2, label="smoothed")
    ax.margins(x=0.01)


def draw_shares(ax, rows):
    """How the operations divide, smoothed and stacked to 1."""
    ops = [row.get("ops") or {} for row in rows]
    counts = [smooth(column(ops, event, missing=0)) for event in EVENTS]
    shares = np.stack(counts) / np.maximum(np.sum(counts, axis=0), 1e-9)
    ax.stackplot(column(rows, "step"), shares, colors=EVENTS.values(), labels=EVENTS, edgecolor="white")
    ax.set_ylim(0, 1)
    ax.legend(**ABOVE)


# ------------------------------------------------------------------------------------------------ several runs

def read_run(folder: str) -> dict:
    """A run's name, what it trained, its training rows and its held-out results."""
    config, rows = read_config(folder), read_rows(Path(folder, "metrics.jsonl"))
    about = {"name": Path(folder).name, "agent": config["agent"], "algo": config["algo"]}
    return {**about, "steps": [row for row in rows if "eval" not in row],
            "results": {row["eval"]: row for row in rows if "eval" in row}}


def table_of_runs(runs: Sequence[dict]) -> str:
    """Every held-out result of every run, as Markdown."""
    shown = [key for key in ENDS if any(result.get(key) is not None for run in runs
                                        for result in run["results"].values())]
    heads = ["run", *shown, "minutes", "explained variance"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in runs:
        minutes = sum(row["seconds"] for row in run["steps"]) / 60
        last = [row["explained_variance"] for row in run["steps"][-10:] if row.get("explained_variance") is not None]
        results = run["results"] if "trained" in run["results"] else {**run["results"], "trained": {}}
        for name, result in results.items():
            numbers = ["" if result.get(key) is None else f"{result[key]:.3f}" for key in shown]
            ends = (f"{minutes:.1f}", f"{np.mean(last):.2f}" if last else "") if name == "trained" else ("", "")
            lines.append(f"| {run['name']}: {name} | " + " | ".join((*numbers, *ends)) + " |")
    return "\n".join(lines)


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of several curves (x, y), up to where the shortest ends."""
    x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
    return x, np.mean([np.interp(x, *curve) for curve in curves], axis=0)


def plot_runs(runs: Sequence[dict], path: str | Path) -> None:
    """Rewards over steps and over seconds: each run smoothed and thin, the mean over an algorithm's runs thick."""
    runs = [run for run in runs if any(row.get("reward") is not None for row in run["steps"])]
    agents = sorted({run["agent"] for run in runs}, reverse=True)
    figure = new_figure(path, 8, 2.8 * len(agents)) if runs else None
    if figure is None:
        return
    axes = figure.subplots(len(agents), 2, sharey="row", squeeze=False)
    for row, agent in zip(axes, agents, strict=True):
        for ax, over in zip(row, ("step", "seconds"), strict=True):
            for algo, (color, style) in ALGORITHMS.items():
                curves = []
                for run in (run for run in runs if (run["agent"], run["algo"]) == (agent, algo)):
                    x, y = column(run["steps"], over), smooth(column(run["steps"], "reward"))
                    curves.append((np.cumsum(x) if over == "seconds" else x, y))
                    ax.plot(*curves[-1], color=color, linewidth=0.7, alpha=0.5)
                if curves:
                    ax.plot(*mean_curve(curves), color=color, linewidth=2.2, linestyle=style,
                            label=f"{algo.upper()}, {len(curves)} run{'s' * (len(curves) > 1)}")
            ax.set_xlabel("step" if over == "step" else "seconds of training")
        row[0].set_ylabel(f"reward, {'Memory Manager' if agent == 'manager' else 'Answer Agent'}")
        row[0].set_ylim(bottom=0)
        row[0].legend(frameon=False, loc="lower right")
    save(figure, path)


# ------------------------------------------------------------------------------------------------ an evaluation

def plot_evaluation(path: str | Path, tables: Sequence[Sequence[dict]]) -> None:
    """F1 by category as bars, a panel for every table; F1 by memories shown as curves, where several were tried."""
    panels = [(draw_bars, rows) for rows in tables]
    panels += [(draw_lines, rows) for rows in tables if len({row["memories"] for row in rows}) > 1]
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
    save(figure, path)


def draw_bars(ax, rows: Sequence[dict]) -> None:
    """A group of bars for every category, a bar for every system, with its interval."""
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        parts = [*row["by_category"].values(), row["overall"]]
        values, low, high = np.array([(part["f1"], *part["interval"]["f1"]) for part in parts]).T
        ax.bar(np.arange(len(parts)) + width * i, values, width, label=row["system"], align="edge",
               yerr=np.maximum([values - low, high - values], 0), ecolor="grey")
    names = [f"{number} {NAMES[number][0]}".replace(" ", "\n", 1) for number in rows[0]["by_category"]]
    ax.set_xticks(np.arange(len(names) + 1) + 0.4, [*names, "overall"])


def draw_lines(ax, rows: Sequence[dict]) -> None:
    """A line for every system that was shown several numbers of memories."""
    for source, agent in dict.fromkeys((row["source"], row["answer"]) for row in rows):
        same = sorted((row for row in rows if (row["source"], row["answer"]) == (source, agent)),
                      key=lambda row: row["memories"])
        if len(same) > 1:
            ax.plot([row["memories"] for row in same], [row["overall"]["f1"] for row in same], "o-",
                    label=same[0]["system"].split(",")[0])
    ax.set_xticks(sorted({row["memories"] for row in rows}))
    ax.set_xlabel("memories shown")


# ------------------------------------------------------------------------------------------------ on a terminal

def main(argv=None) -> None:
    """Compares runs."""
    parser = Parser(description="What several runs learned: a table of their held-out results, and one picture of "
                    "their rewards over steps and over seconds.",
                    epilog="example: python plots.py runs/manager-grpo runs/manager-ppo --out curves.png")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", default="curves.png", metavar="FILE.png", help="the picture (curves.png)")
    args = parser.parse_args(argv)
    if Path(args.out).suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--out {args.out}: give a name that ends in .png, .pdf or .svg")
    runs = [read_run(folder) for folder in args.runs]
    print(table_of_runs(runs))
    plot_runs(runs, args.out)


if __name__ == "__main__":
    exit_cleanly(main, go_on="nothing is lost")
