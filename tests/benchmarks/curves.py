"""
What several runs learned, side by side: a table of their held-out results, and one picture of their rewards over steps
and over seconds, each algorithm's seeds smoothed and averaged. Run by hand on the folders of finished runs:

    python tests/benchmarks/curves.py runs/manager-grpo-* runs/manager-ppo-* --out curves.png
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from run import BLUE, VERMILION, read_rows, smooth

COLORS = {"grpo": BLUE, "ppo": VERMILION}
COLUMNS = ("em", "f1", "bank_size", "agreement", "selected", "evidence")


def read(folder: str) -> dict:
    """A run's name, what it trained, its training rows and its held-out results."""
    config = json.loads(Path(folder, "config.json").read_text())
    rows = read_rows(Path(folder, "metrics.jsonl"))
    return {"name": Path(folder).name, "agent": config["agent"], "algo": config["algo"],
            "steps": [row for row in rows if "eval" not in row],
            "results": {row["eval"]: row for row in rows if "eval" in row}}


def print_table(runs: list[dict]) -> None:
    shown = [column for column in COLUMNS if any(column in run["results"].get("trained", {}) for run in runs)]
    print("| run | " + " | ".join(shown) + " | minutes | explained variance |")
    print("|---" * (len(shown) + 3) + "|")
    for run in runs:
        minutes = sum(row["seconds"] for row in run["steps"]) / 60
        last = [row["explained_variance"] for row in run["steps"][-10:] if row.get("explained_variance") is not None]
        explained = f"{np.mean(last):.2f}" if last else ""
        for name, result in run["results"].items():
            numbers = ["" if result.get(column) is None else f"{result[column]:.3f}" for column in shown]
            ends = (f"{minutes:.1f}", explained) if name == "trained" else ("", "")
            print(f"| {run['name']}: {name} | " + " | ".join((*numbers, *ends)) + " |")


def mean_curve(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of several curves (x, y), up to where the shortest ends."""
    x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
    return x, np.mean([np.interp(x, *curve) for curve in curves], axis=0)


def draw(runs: list[dict], path: str) -> None:
    from matplotlib.figure import Figure
    agents = sorted({run["agent"] for run in runs}, reverse=True)
    figure = Figure(figsize=(8, 2.8 * len(agents)), layout="constrained")
    axes = figure.subplots(len(agents), 2, sharey="row", squeeze=False)
    for row, agent in zip(axes, agents, strict=True):
        for ax, over in zip(row, ("step", "seconds"), strict=True):
            for algo, color in COLORS.items():
                curves = []
                for run in (run for run in runs if (run["agent"], run["algo"]) == (agent, algo)):
                    y = smooth(np.array([one["reward"] for one in run["steps"]]))
                    x = np.array([one[over] for one in run["steps"]], dtype=float)
                    curves.append((np.cumsum(x) if over == "seconds" else x, y))
                    ax.plot(*curves[-1], color=color, linewidth=0.7, alpha=0.5)
                if curves:
                    name = f"{algo.upper()}, {len(curves)} seeds"
                    ax.plot(*mean_curve(curves), color=color, linewidth=2.2, label=name,
                            linestyle="-" if algo == "grpo" else "--")
            ax.set_xlabel("step" if over == "step" else "seconds of training")
            ax.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"reward, {'Memory Manager' if agent == 'manager' else 'Answer Agent'}")
        row[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("folders", nargs="+", metavar="RUN")
    parser.add_argument("--out", default="curves.png", help="the picture (curves.png)")
    args = parser.parse_args()
    runs = [read(folder) for folder in args.folders]
    print_table(runs)
    draw(runs, args.out)


if __name__ == "__main__":
    main()
