"""Curves of locomotion runs from their metrics.csv: return, tracking, learning rate (Figure 8), ratios (Figure 7).

    python benchmark/locomotion_curves.py runs/paper_locomotion/*__Go1JoystickRoughTerrain-v1__*/*/ --output OUTPUT

writes curves.csv, a column per metric, a row per run and point; curves.png, a light line per run, and a line per script
for the mean of its runs, which ends where the shortest does; and table.md, a row per run: its last return, the
evaluation after training, where it has one, and the commit. Unfinished runs are drawn as far as they are. Runs of one
script with different settings are kept apart, by the settings that differ.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from run import HARMLESS, RUNNERS

METRICS = {
    "charts/mean_return_100": "return, last 100 episodes",
    "charts/mean_length_100": "episode length",
    "rewards/tracking_lin_vel": "tracking of the velocity",
    "rewards/tracking_ang_vel": "tracking of the turning rate",
    "charts/learning_rate": "learning rate",
    "losses/kl": "KL divergence, nats",
    "ratio/high_mean": "mean ratio above 1",
    "ratio/low_mean": "mean ratio below 1",
    "ratio/out_of_bounds": "ratios out of bounds",
    "charts/std": "standard deviation of actions",
}
SAME_LEARNING = (*RUNNERS, *HARMLESS, "total_timesteps", "eval_episodes")  # do not tell groups of runs apart


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of one task"""
    output: Path
    """folder for curves.png, curves.csv and table.md"""
    points: int = 200
    """points per curve, at most: each is the mean of the iterations around it"""


def bad_input(line):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def read_run(run_dir):
    """The run's args.json, its metrics as columns, an array [iterations] each, and its evaluation.json or {}."""
    try:
        about = json.loads((run_dir / "args.json").read_text())
        complete_lines = (run_dir / "metrics.csv").read_text().rpartition("\n")[0]
        names, *lines = complete_lines.split("\n")
        values = np.array([line.split(",") for line in lines], float)
        metrics = dict(zip(names.split(","), values.T, strict=True))
        evaluation = run_dir / "evaluation.json"
        return about, metrics, json.loads(evaluation.read_text()) if evaluation.exists() else {}
    except (OSError, ValueError) as error:
        bad_input(f"{run_dir} is not a readable run, leave it out: {error}")


def label(about, runs):
    """The run's script, with those of its settings that other runs of that script have otherwise."""
    others = [x["args"] for x, *_ in runs if x["script"] == about["script"]]
    names = [x for x in about["args"] if x not in SAME_LEARNING]
    differing = [f"{x}={about['args'][x]}" for x in names if any(o.get(x) != about["args"][x] for o in others)]
    return " ".join([about["script"], *differing]).replace(",", "")  # a cell of curves.csv


def smooth(steps, values, edges):
    """Mean of the values between neighbouring edges; NaN where there is none."""
    which, known = np.digitize(steps, edges) - 1, np.isfinite(values)
    bins = [values[known & (which == i)] for i in range(len(edges) - 1)]
    return np.array([x.mean() if len(x) else np.nan for x in bins])


def main(args):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [read_run(folder) for folder in args.runs]
    if len({about["args"]["env_id"] for about, *_ in runs}) != 1:
        bad_input("give runs of one task")
    runs = sorted(runs, key=lambda run: (label(run[0], runs), run[0]["args"]["seed"]))
    labels = [label(about, runs) for about, *_ in runs]
    panels = {metric: title for metric, title in METRICS.items() if any(metric in x for _, x, _ in runs)}
    points = min(args.points, max(len(x["step"]) for _, x, _ in runs))
    edges = np.linspace(0, max(x["step"][-1] for _, x, _ in runs) + 1, points + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    curves = [{m: smooth(x["step"], x[m], edges) for m in panels if m in x} for _, x, _ in runs]
    height = math.ceil(len(panels) / 3)
    figure, axes = plt.subplots(height, 3, figsize=(13, 3 * height), sharex=True, squeeze=False, layout="constrained")
    for axis, (metric, title) in zip(axes.flat, panels.items()):
        axis.set_title(title)
        axis.set_yscale("log" if metric == "charts/learning_rate" else "linear")
        for color, group in enumerate(sorted(set(labels))):
            each = [curve[metric] for curve, of in zip(curves, labels) if of == group and metric in curve]
            if not each:
                continue
            for values in each:
                known = np.isfinite(values)  # a few are not where there are hardly more iterations than points
                axis.plot(middles[known], values[known], color=f"C{color}", alpha=0.25, linewidth=0.8)
            mean = np.mean(each, axis=0)
            known = np.isfinite(mean)
            axis.plot(middles[known], mean[known], color=f"C{color}", label=f"{group} ({len(each)})")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(len(panels) - 3, 0) : len(panels)]:
        axis.set_xlabel("environment steps")
        axis.tick_params(labelbottom=True)
    figure.suptitle(runs[0][0]["args"]["env_id"])
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "curves.png", dpi=80)
    rows = [",".join(["script", "seed", "step", *panels])]
    for (about, *_), group, curve in zip(runs, labels, curves):
        for i, step in enumerate(middles):
            values = [curve[metric][i] if metric in curve else math.nan for metric in panels]
            if np.isfinite(values).any():
                cells = [f"{x:.5g}" if math.isfinite(x) else "" for x in values]
                rows.append(",".join([group, str(about["args"]["seed"]), f"{step:.0f}", *cells]))
    (args.output / "curves.csv").write_text("\n".join(rows) + "\n")

    table = ["| script | seed | steps | return, last 100 episodes | deterministic | stochastic | commit |"]
    table += ["|-|-|-|-|-|-|-|"]
    for (about, metrics, evaluation), group in zip(runs, labels):
        row = [f"`{group}`", about["args"]["seed"], f"{metrics['step'][-1]:.0f}"]
        row += [f"{metrics['charts/mean_return_100'][-1]:.1f}"]
        for kind in ("deterministic", "stochastic"):
            result = evaluation.get(kind)
            row += [f"{result['mean']:.1f} +- {result['std']:.1f}" if result else "-"]
        commit = about["commit"][:7] + "-dirty" * about["commit"].endswith("-dirty")
        table += [f"| {' | '.join(map(str, row))} | `{commit}` |"]
    (args.output / "table.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
