"""Learning curves from run folders: a compact CSV, a picture and a table.

    python benchmark/report.py runs/*Hopper-v4* --output benchmark/results/hopper

Runs are grouped by task, script and the flags in which runs of one script differ. The figure at a step is the mean
return of the last 100 episodes that had ended by then. Intervals are 95% bootstrap intervals of the mean over seeds.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

WINDOW = 100  # episodes


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of finished runs"""
    output: Path = Path("benchmark/results")
    """folder for curves.csv, curves.png, summary.csv and table.md"""
    interval: int = 10_000
    """steps between the points of a curve"""


def read_run(folder):
    """Settings and curve of a run: (args.json as a dict, steps[K], returns[K]); ValueError if it cannot be read."""
    try:
        about = json.loads((folder / "args.json").read_text())
        episodes = np.loadtxt(folder / "episodes.csv", delimiter=",", skiprows=1, ndmin=2)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None
    if not (folder / "agent.pt").exists():
        raise ValueError(f"{folder}: the run is not finished")
    if len(episodes) == 0 or episodes.shape[1] != 3 or not np.isfinite(episodes).all():
        raise ValueError(f"{folder}: episodes.csv is damaged")
    return about, episodes[:, 0], episodes[:, 1]


def summarise(folder):
    """Figures of a run besides its curve: means of logged metrics over the iterations, and the final evaluation."""
    with (folder / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    means = {name: np.mean([row[name] for row in rows]) for name in ("ratio/out_of_bounds", "losses/kl")}
    bounds = [row["theory/improvement_bound"] > 0 for row in rows if "theory/improvement_bound" in row]
    means["improvement_bound_positive"] = np.mean(bounds) if bounds else np.nan  # PPO has none
    means |= {f"{name}_{x}": result[x] for name, result in evaluation.items() for x in ("mean", "std")}
    return means | {"training_seconds": rows[-1]["step"] / rows[-1]["charts/SPS"]}


def curve(steps, returns, grid):
    """Mean return of the last WINDOW episodes that had ended by each step of the grid; NaN before the first."""
    sums = np.concatenate([[0.0], np.cumsum(returns)])
    ended = np.searchsorted(steps, grid, side="right")
    first = np.maximum(ended - WINDOW, 0)
    return np.where(ended > 0, (sums[ended] - sums[first]) / np.maximum(ended - first, 1), np.nan)


def interval_of_mean(values, rng):
    """95% bootstrap interval of the mean over axis 0: values[S, K] -> low[K], high[K]."""
    draws = rng.integers(len(values), size=(2000, len(values)))
    return np.quantile(values[draws].mean(1), [0.025, 0.975], axis=0)


def label_runs(runs):
    """A name per run: its script, and the flags in which runs of that script differ."""
    labels = []
    for about in runs:
        peers = [other["args"] for other in runs if other["script"] == about["script"]]
        ignored = "seed env_id output_dir compile checkpoint_interval eval_episodes capture_video track".split()
        differing = [
            k
            for k in about["args"]
            if k not in ignored and any(p.get(k, about["args"][k]) != about["args"][k] for p in peers)
        ]
        name = about["script"].split("_")[0].upper()
        labels.append(" ".join([name, *(f"{k}={about['args'][k]}" for k in differing)]))
    return labels


def main(args):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = []
    for folder in args.runs:
        try:
            found.append((*read_run(folder), summarise(folder)))
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            print(f"skipped {error}", file=sys.stderr)
    if not found:
        print("error: no finished run among the folders given", file=sys.stderr)
        sys.exit(2)
    labels = label_runs([about for about, *_ in found])
    groups = {}
    for label, (about, steps, returns, summary) in zip(labels, found):
        group = groups.setdefault((about["args"]["env_id"], label), {})
        if about["args"]["seed"] in group:
            print(f"error: two runs of {label} with seed {about['args']['seed']}: leave one out", file=sys.stderr)
            sys.exit(2)
        group[about["args"]["seed"]] = about, steps, returns, summary

    args.output.mkdir(parents=True, exist_ok=True)
    tasks = sorted({task for task, _ in groups})
    figure, axes = plt.subplots(1, len(tasks), figsize=(6.4 * len(tasks), 4), squeeze=False)
    rows, table = ["task,group,seed,step,return"], ["| task | group | seeds | steps | mean | 95% | std | each |"]
    table.append("|-|-|-|-|-|-|-|-|")
    summaries = [",".join(["task,group,seed", *found[0][3]])]
    rng = np.random.default_rng(0)
    for (task, label), group in sorted(groups.items()):
        group = dict(sorted(group.items()))
        end = min(about["args"]["total_timesteps"] for about, *_ in group.values())
        grid = np.arange(args.interval, end + 1, args.interval)
        curves = np.array([curve(steps, returns, grid) for _, steps, returns, _ in group.values()])
        for seed, values in zip(group, curves):
            rows += [f"{task},{label},{seed},{step},{value:.1f}" for step, value in zip(grid, values)]
        for seed, (*_, summary) in group.items():
            summaries.append(",".join([task, label, str(seed), *(f"{x:.5g}" for x in summary.values())]))
        low, high = interval_of_mean(curves, rng)
        axis = axes[0, tasks.index(task)]
        (line,) = axis.plot(grid, curves.mean(0), label=f"{label} ({len(group)} seeds)")
        axis.fill_between(grid, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=task, xlabel="environment steps", ylabel=f"return, mean of the last {WINDOW} episodes")
        last = curves[:, -1]
        std = f"{last.std(ddof=1):.0f}" if len(last) > 1 else "-"
        each = ", ".join(f"{x:.0f}" for x in last)
        interval = f"{low[-1]:.0f} to {high[-1]:.0f}"
        table.append(f"| {task} | {label} | {len(last)} | {end} | {last.mean():.0f} | {interval} | {std} | {each} |")
    for axis in axes[0]:
        axis.legend(loc="lower right", frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.output / "curves.png", dpi=110)
    (args.output / "curves.csv").write_text("\n".join(rows) + "\n")
    (args.output / "summary.csv").write_text("\n".join(summaries) + "\n")
    (args.output / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main(tyro.cli(Args))
