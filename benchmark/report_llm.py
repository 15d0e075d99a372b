"""Held-out accuracy and ratios of runs of the language model scripts: a compact CSV, a picture and a table.

    python benchmark/report_llm.py runs/paper_figure6_small/*/*/ --output benchmark/results/llm_figure6

Runs are grouped by objective, clip ratio and epochs. Intervals are 95% bootstrap intervals of the mean over seeds.
Groups of the same clip ratio and epochs are compared with GBPO seed by seed, as runs of a seed share their first model
and their prompts; those are t-intervals of the mean difference.
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
from run import HARMLESS
from scipy.stats import ttest_1samp

SAME_GROUP = {"seed", "output_dir", "resume", "evaluate", *HARMLESS}  # settings in which runs of a group may differ


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of finished runs"""
    output: Path = Path("benchmark/results/llm")
    """folder for curves.csv, curves.png and table.md"""


def read_csv(path):
    with path.open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def read_run(folder):
    """Group, settings, evaluations and metrics of a run; ValueError if it is not finished."""
    if not (folder / "evaluation.json").exists():
        raise ValueError("the run is not finished")
    about = json.loads((folder / "args.json").read_text())
    args, name = about["args"], about["script"].split("_")[0]
    epochs = f"{args['update_epochs']} epoch" + "s" * (args["update_epochs"] > 1)
    group = f"{args.get('objective', name).upper().replace('_', ' ')} ({args['clip_coef']}, {epochs})"
    return group, args, read_csv(folder / "evaluations.csv"), read_csv(folder / "metrics.csv")


def interval_of_mean(values, rng):
    """95% bootstrap interval of the mean over axis 0: values[S, K] -> low[K], high[K]."""
    draws = rng.integers(len(values), size=(2000, len(values)))
    return np.quantile(values[draws].mean(1), [0.025, 0.975], axis=0)


def main(args):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups, settings = {}, {}
    for folder in args.runs:
        try:
            group, own, *tables = read_run(folder)
            seed, first = own["seed"], settings.setdefault(group, own)
        except (OSError, ValueError, KeyError, IndexError) as error:
            print(f"skipped {folder}: {error}", file=sys.stderr)
            continue
        if seed in groups.setdefault(group, {}):
            print(f"error: two runs of {group} with seed {seed}: leave one out", file=sys.stderr)
            sys.exit(2)
        if other := [x for x in own if x not in SAME_GROUP and own[x] != first.get(x, own[x])]:
            print(
                f"error: {folder} has other settings ({', '.join(other)}) than another {group}: make a report of each",
                file=sys.stderr,
            )
            sys.exit(2)
        groups[group][seed] = tables
    if not groups:
        print("error: no finished run among the folders given", file=sys.stderr)
        sys.exit(2)

    args.output.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.4))
    rng, rows = np.random.default_rng(0), ["group,seed,step,pass@1,ratio_max,out_of_bounds"]
    table = ["| group | seeds | start | pass@1 at the end | 95% | best | largest ratio | 95% | out of bounds | each |"]
    table.append("|-|-|-|-|-|-|-|-|-|-|")
    ends = {}
    for group, runs in sorted(groups.items()):
        runs = dict(sorted(runs.items()))
        length = min(len(e["step"]) for e, _ in runs.values())  # dynamic sampling takes more completions a step
        steps = np.mean([e["step"][:length] for e, _ in runs.values()], 0)
        accuracy = np.array([e["pass@1"][:length] for e, _ in runs.values()])
        width = min(len(m["step"]) for _, m in runs.values())
        ratios = np.array([m["ratio/max"][:width] for _, m in runs.values()])
        metric_steps = np.mean([m["step"][:width] for _, m in runs.values()], 0)
        for seed, (e, m) in runs.items():
            for step, value in zip(e["step"], e["pass@1"]):
                at = np.searchsorted(m["step"], step)
                tail = f"{m['ratio/max'][at]:.4g},{m['ratio/out_of_bounds'][at]:.4g}" if step else ","
                rows.append(f"{group},{seed},{step:.0f},{value:.4f},{tail}".replace(f"{group},", f'"{group}",', 1))
        for axis, x, values in ((axes[0], steps, accuracy), (axes[1], metric_steps, ratios)):
            low, high = interval_of_mean(values, rng)
            (line,) = axis.plot(x, values.mean(0), label=f"{group}, {len(runs)} seeds")
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        last, largest = np.array([e["pass@1"][-1] for e, _ in runs.values()]), ratios.max(1)
        outside = np.mean([m["ratio/out_of_bounds"].mean() for _, m in runs.values()])
        (low, high), (rlow, rhigh) = interval_of_mean(last, rng), interval_of_mean(largest, rng)
        intervals = (f"{low:.3f} to {high:.3f}", f"{rlow:.2f} to {rhigh:.2f}") if len(runs) > 1 else ("-", "-")
        cells = [group, len(runs), f"{accuracy[:, 0].mean():.3f}", f"{last.mean():.3f}", intervals[0]]
        cells += [f"{accuracy.max(1).mean():.3f}", f"{largest.mean():.2f}", intervals[1]]
        cells += [f"{outside:.1%}", ", ".join(f"{x:.2f}" for x in last)]
        table.append("| " + " | ".join(map(str, cells)) + " |")
        ends[group] = dict(zip(runs, last))
    pairs = []
    for group, theirs in ends.items():
        gbpo = "GBPO" + group[group.index(" (") :]
        seeds = [seed for seed in theirs if seed in ends.get(gbpo, {})]
        if group != gbpo and len(seeds) > 1:
            less = np.array([ends[gbpo][seed] - theirs[seed] for seed in seeds])
            low, high = ttest_1samp(less, 0).confidence_interval()
            cells = [f"{gbpo} less {group}", len(seeds), f"{less.mean():.3f}", f"{low:.3f} to {high:.3f}"]
            pairs.append("| " + " | ".join(map(str, [*cells, ", ".join(f"{x:.2f}" for x in less)])) + " |")
    if pairs:
        table += ["", "| pass@1 at the end, seed by seed | seeds | mean | 95% | each |", "|-|-|-|-|-|", *pairs]
    axes[0].set(title="held-out pass@1", xlabel="completions")
    axes[1].set(title="largest ratio in the last epoch", xlabel="completions", yscale="log")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(args.output / "curves.png", dpi=110)
    (args.output / "curves.csv").write_text("\n".join(rows) + "\n")
    (args.output / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main(tyro.cli(Args))
