"""Learning curves from run folders: compact CSVs, a picture and tables.

    python benchmark/report.py runs/fair_mujoco --output benchmark/results/fair_mujoco
    python benchmark/report.py benchmark/results/fair_mujoco runs/fair_mujoco --output benchmark/results/fair_mujoco

The second adds new runs to those of an earlier report, whose run folders may be gone.

Runs of a suite are grouped by task and variant; others by task, script and the flags in which runs of one script
differ, which an earlier report does not hold: only runs of a suite can be added to one. The figure at a step is the
mean return of the last 100 episodes that had ended by then. Intervals are 95% bootstrap intervals over seeds. The
interquartile mean (IQM) and the probability of improvement, P(a run of the group is better than one of the baseline),
are rliable's (Agarwal et al., "Deep RL at the Edge of the Statistical Precipice").
"""

import csv
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro
from rliable import library, metrics
from run import HARMLESS, RUNNERS

WINDOW = 100  # episodes
DRAWS = 2000  # of a bootstrap
MANY = 6  # groups of a task, above which curves could not be told apart
SAME_GROUP = {*RUNNERS, *HARMLESS, "eval_episodes"}  # settings in which runs of a group may differ
PUBLISHED = Path(__file__).resolve().parent / "published.csv"


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of finished runs, folders that hold such, and folders of earlier reports"""
    output: Path = Path("benchmark/results")
    """folder for curves.csv, summary.csv, settings.json, table.md, and curves.png or, of many groups, groups.png"""
    baseline: str | None = None
    """the group that others are compared with; default: the one named default, else PPO's"""
    interval: int = 10_000
    """steps between the points of a curve"""


@dataclass
class Run:
    """A finished run, from its folder or from an earlier report."""

    task: str
    group: str  # "" until label_runs has named it
    seed: int
    script: str
    commit: str
    points: np.ndarray  # of the learning curve, one each args.interval steps
    summary: dict


def read_run(folder):
    """Settings and curve of a run: (args.json as a dict, steps[K], returns[K]); OSError or ValueError if unreadable."""
    if (folder / "model").exists():
        raise ValueError("a language model's run, for report_llm.py")
    about = json.loads((folder / "args.json").read_text())
    episodes = np.loadtxt(folder / "episodes.csv", delimiter=",", skiprows=1, ndmin=2)
    if not (folder / "agent.pt").exists():
        raise ValueError("the run is not finished")
    if len(episodes) == 0 or episodes.shape[1] != 3 or not np.isfinite(episodes).all():
        raise ValueError("episodes.csv is damaged")
    return about, episodes[:, 0], episodes[:, 1]


def summarise(folder):
    """Figures of a run besides its curve: means of logged metrics over the iterations, and the final evaluation."""
    with (folder / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise ValueError("metrics.csv is empty")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    means = {name: np.mean([row[name] for row in rows]) for name in ("ratio/out_of_bounds", "losses/kl")}
    bounds = [row["theory/improvement_bound"] > 0 for row in rows if "theory/improvement_bound" in row]
    means["improvement_bound_positive"] = np.mean(bounds) if bounds else np.nan  # PPO has none
    means |= {f"{name}_{x}": evaluation[name][x] for name in ("deterministic", "stochastic") for x in ("mean", "std")}
    return means | {"training_seconds": sum(row["time/rollout"] + row["time/update"] for row in rows)}


def read_report(folder, interval):
    """The runs of an earlier report, and their settings by task and group, {} if it is of a time that kept none.

    ValueError if its points lie at other steps or its files do not fit.
    """
    points = {}
    with (folder / "curves.csv").open() as file:
        for row in csv.DictReader(file):
            points.setdefault((row["task"], row["group"], row["seed"]), []).append((int(row["step"]), row["return"]))
    runs = []
    with (folder / "summary.csv").open() as file:
        for row in csv.DictReader(file):
            about = [row.pop(name) for name in ("task", "group", "seed", "script", "commit")]
            steps, returns = zip(*points.pop(tuple(about[:3])))
            if steps != tuple(range(interval, interval * len(steps) + 1, interval)):
                raise ValueError(f"the points of its curves are not {interval} steps apart: see --interval")
            task, group, seed, script, commit = about
            summary = {name: float(value) for name, value in row.items()}
            runs.append(Run(task, group, int(seed), script, commit, np.array(returns, float), summary))
    if points:
        raise ValueError("curves.csv and summary.csv hold different runs")
    settings = folder / "settings.json"
    return runs, json.loads(settings.read_text()) if settings.exists() else {}


def curve(steps, returns, grid):
    """Mean return of the last WINDOW episodes that had ended by each step of the grid; NaN before the first."""
    sums = np.concatenate([[0.0], np.cumsum(returns)])
    ended = np.searchsorted(steps, grid, side="right")
    first = np.maximum(ended - WINDOW, 0)
    return np.where(ended > 0, (sums[ended] - sums[first]) / np.maximum(ended - first, 1), np.nan)


def interval_of_mean(values, rng):
    """95% bootstrap interval of the mean over axis 0: values[S, K] -> low[K], high[K]."""
    draws = rng.integers(len(values), size=(DRAWS, len(values)))
    return np.quantile(values[draws].mean(1), [0.025, 0.975], axis=0)


def interquartile_mean(returns):
    """The IQM of returns[S] and its interval: (point, low, high)."""
    points, intervals = library.get_interval_estimates(
        {"": returns[:, None]},
        lambda scores: np.array([metrics.aggregate_iqm(scores)]),
        reps=DRAWS,
    )
    return points[""][0], *intervals[""][:, 0]


def probability_of_improvement(returns, baseline):
    """P(return > baseline's), ties half, averaged over tasks: returns[S, K], baseline[R, K] -> (point, low, high)."""
    points, intervals = library.get_interval_estimates(
        {"": (returns, baseline)},
        lambda x, y: np.array([metrics.probability_of_improvement(x, y)]),
        reps=DRAWS,
    )
    return points[""][0], *intervals[""][:, 0]


def difference_of_means(returns, baseline, rng):
    """Mean of returns[S] less that of baseline[R]: (point, low, high)."""
    draws = (x[rng.integers(len(x), size=(DRAWS, len(x)))].mean(1) for x in (returns, baseline))
    return returns.mean() - baseline.mean(), *np.quantile(np.subtract(*draws), [0.025, 0.975])


def variant(folder, about):
    """The run's variant in a suite, or None."""
    end = f"__{about['args']['env_id'].replace('/', '-')}__{about['args']['seed']}"
    name = folder.resolve().parent.name
    return name.removesuffix(end) if name.endswith(end) else None


def differ(args, others, name):
    """Whether two runs' settings differ in this one, which both have and which matters."""
    return name not in SAME_GROUP and args[name] != others.get(name, args[name])


def label_runs(folders, runs):
    """A name per run: its variant in a suite; else its script, and the flags in which runs of that script differ."""
    labels = []
    for folder, about in zip(folders, runs):
        if (name := variant(folder, about)) is not None:
            labels.append(name)
            continue
        peers = [other["args"] for other in runs if other["script"] == about["script"]]
        differing = [k for k in about["args"] if any(differ(about["args"], p, k) for p in peers)]
        name = about["script"].split("_")[0].upper()
        labels.append(" ".join([name, *(f"{k}={about['args'][k]}" for k in differing)]))
    return labels


def read_published():
    """The paper's Table 1, at step "end", and its authors' curves: {(task, algorithm, step): return}, all strings."""
    with PUBLISHED.open() as file:
        rows = csv.DictReader(x for x in file if not x.startswith("#"))
        return {(row["task"], row["algorithm"], row["step"]): row["return"] for row in rows}


def draw_curves(axis, curves, grid, colors, rng):
    """Mean and interval of each group, curves[label][S, K], over the steps grid[K], in the label's colour."""
    for label, values in curves.items():
        low, high = interval_of_mean(values, rng)
        axis.plot(grid, values.mean(0), color=colors[label], label=f"{label} ({len(values)} seeds)")
        axis.fill_between(grid, low, high, color=colors[label], alpha=0.2, linewidth=0)
    axis.set(xlabel="environment steps", ylabel=f"return, mean of the last {WINDOW} episodes")
    axis.legend(loc="best", frameon=False)


def draw_groups(axis, curves, baseline, rng):
    """Mean, interval and seeds of each group at the end, the best on top; the baseline's mean as a line."""
    ends = {label: values[:, -1] for label, values in curves.items()}
    order = sorted(ends, key=lambda label: ends[label].mean())
    for place, label in enumerate(order):
        low, high = interval_of_mean(ends[label][:, None], rng)
        color = "C1" if label == baseline else "C0"
        axis.plot([low[0], high[0]], [place, place], color=color, linewidth=4, alpha=0.4)
        axis.plot(ends[label], [place] * len(ends[label]), ".", color="0.5", markersize=4)
        axis.plot(ends[label].mean(), place, "o", color=color)
    if baseline in ends:
        axis.axvline(ends[baseline].mean(), color="C1", linewidth=0.8)
    axis.set_yticks(range(len(order)), order)
    axis.set(xlabel=f"return, mean of the last {WINDOW} episodes")


def find_folders(paths):
    """The run folders among the paths and below them, and the paths that hold none: earlier reports."""
    for path in paths:
        if (path / "args.json").exists() or not (below := sorted(x.parent for x in path.glob("**/args.json"))):
            yield path
        else:
            yield from below


def main(args):
    if args.interval < 1 or args.output.is_file():
        wrong = "--interval must be at least 1" if args.interval < 1 else f"--output {args.output} is a file"
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(2)
    matplotlib.use("Agg")
    np.random.seed(0)  # rliable draws from this generator, whatever random_state it is given
    import matplotlib.pyplot as plt

    found, new, settings = [], [], {}  # settings: task -> group -> those of its first run
    for folder in find_folders(args.runs):
        if (folder / "curves.csv").exists():  # is never skipped: --output may be the same folder
            try:
                earlier, theirs = read_report(folder, args.interval)
                found += earlier
                for task, groups in theirs.items():
                    settings[task] = settings.get(task, {}) | groups
            except (OSError, ValueError, KeyError) as error:
                print(f"error: no report to extend: {folder}: {error}", file=sys.stderr)
                sys.exit(2)
            continue
        try:
            (about, steps, returns), summary = read_run(folder), summarise(folder)
            grid = np.arange(args.interval, about["args"]["total_timesteps"] + 1, args.interval)
            if len(grid) == 0 or steps[0] > grid[-1]:
                raise ValueError("no episode had ended by a point of the curve: see --interval")
            commit = about.get("commit", "")
            made_by = about["script"], commit[:12] + "-dirty" * commit.endswith("-dirty")
            run = Run(
                about["args"]["env_id"], "", about["args"]["seed"], *made_by, curve(steps, returns, grid), summary
            )
            new.append((folder, about, run))
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            missing = isinstance(error, KeyError)
            print(f"skipped {folder}: {'it has no ' * missing}{error}", file=sys.stderr)
    if found and (other := next((folder for folder, about, _ in new if variant(folder, about) is None), None)):
        print(f"error: {other} is not of a suite: give it and the runs it belongs with, no report", file=sys.stderr)
        sys.exit(2)
    for label, (folder, about, run) in zip(label_runs([x[0] for x in new], [x[1] for x in new]), new):
        run.group = label
        found.append(run)
        own = {name: x for name, x in about["args"].items() if name not in SAME_GROUP}
        groups = settings.setdefault(run.task, {})
        other = [x for x in own if x != "total_timesteps" and differ(own, groups.setdefault(label, own), x)]
        beside = (own, *groups.values())
        one_length = len({x["total_timesteps"] for x in beside}) == 1
        if not one_length and any(x.get("lr_schedule") == "linear" for x in beside):
            other.append("total_timesteps, on which the learning rate depends")
        if other:
            print(
                f"error: {folder} has other settings than other runs: {', '.join(other)}; make a report of each",
                file=sys.stderr,
            )
            sys.exit(2)
    if not found:
        print("error: no finished run among the folders given", file=sys.stderr)
        sys.exit(2)
    groups = {}
    for run in found:
        group = groups.setdefault(run.task, {}).setdefault(run.group, {})
        if run.seed in group:
            print(f"error: two runs of {run.group} with seed {run.seed}: leave one out", file=sys.stderr)
            sys.exit(2)
        group[run.seed] = run
    algorithms = {run.group: run.script.split("_")[0] for run in found}
    baseline = args.baseline or next((x for x in algorithms if x == "default"), None)
    baseline = baseline or next((x for x in sorted(algorithms) if algorithms[x] == "ppo"), None)
    if args.baseline and args.baseline not in algorithms:
        print(f"error: no group {args.baseline}: there are {', '.join(sorted(algorithms))}", file=sys.stderr)
        sys.exit(2)

    tasks = sorted(groups)
    many = max(map(len, groups.values())) > MANY
    size = (8, 0.5 + 0.28 * max(map(len, groups.values()))) if many else (6.4, 4)
    figure, axes = plt.subplots(1, len(tasks), figsize=(size[0] * len(tasks), size[1]), squeeze=False)
    rows, summaries = ["task,group,seed,step,return"], [",".join(["task,group,seed,script,commit", *found[0].summary])]
    table = ["| task | group | seeds | steps | mean | 95% | IQM | 95% | std | each |", "|-|-|-|-|-|-|-|-|-|-|"]
    against = [
        f"| task | group | mean less that of {baseline} | 95% | P(better than {baseline}) | 95% |",
        "|-|-|-|-|-|-|",
    ]
    beside = [
        "| task | group | steps | ours | authors' curve at as many | paper's Table 1, converged |",
        "|-|-|-|-|-|-|",
    ]
    rng, published, ends = np.random.default_rng(0), read_published(), {}
    colors = {label: f"C{i}" for i, label in enumerate(sorted({x for task in tasks for x in groups[task]}))}
    for axis, task in zip(axes[0], tasks):
        runs = {label: dict(sorted(group.items())) for label, group in sorted(groups[task].items())}
        length = min(len(run.points) for group in runs.values() for run in group.values())
        late = [f"{x} {s}" for x, group in runs.items() for s, run in group.items() if np.isnan(run.points[length - 1])]
        if late:
            print(
                f"error: {task}: no episode had ended by step {length * args.interval} in {', '.join(late)}: "
                "the shortest run ends there, leave out one or the other",
                file=sys.stderr,
            )
            sys.exit(2)
        grid = args.interval * np.arange(1, length + 1)
        end = grid[-1]
        curves = {label: np.array([x.points[:length] for x in group.values()]) for label, group in runs.items()}
        ends[task] = {label: values[:, -1] for label, values in curves.items()}
        digits = 1 if all(abs(x).max() < 100 for x in ends[task].values()) else 0
        for label, group in runs.items():
            for seed, run in group.items():
                steps = args.interval * np.arange(1, len(run.points) + 1)
                rows += [f"{task},{label},{seed},{step},{value:.6g}" for step, value in zip(steps, run.points)]
                figures = [f"{x:.5g}" for x in run.summary.values()]
                summaries.append(",".join([task, label, str(seed), run.script, run.commit, *figures]))
            last = ends[task][label]
            low, high = interval_of_mean(last[:, None], rng)
            iqm, iqm_low, iqm_high = interquartile_mean(last)
            each = ", ".join(f"{x:.{digits}f}" for x in last)
            cells = f"{last.mean():.{digits}f} | - | {iqm:.{digits}f} | - | -"
            if len(last) > 1:
                figures = last.mean(), low[0], high[0], iqm, iqm_low, iqm_high, last.std(ddof=1)
                cells = "{} | {} to {} | {} | {} to {} | {}".format(*(f"{x:.{digits}f}" for x in figures))
            table.append(f"| {task} | {label} | {len(last)} | {end} | {cells} | {each} |")
            theirs = task.replace("NoFrameskip-v4", "-v5"), algorithms[label]
            if (at := published.get((*theirs, str(end)))) is not None:
                converged = published.get((*theirs, "end"), "-")
                beside.append(f"| {task} | {label} | {end} | {last.mean():.{digits}f} | {at} | {converged} |")
            if label != baseline and len(last) > 1 and len(ends[task].get(baseline, ())) > 1:
                difference = difference_of_means(last, ends[task][baseline], rng)
                improvement = probability_of_improvement(last[:, None], ends[task][baseline][:, None])
                figures = [f"{x:.{digits}f}" for x in difference] + [f"{x:.2f}" for x in improvement]
                cells = "{} | {} to {} | {} | {} to {}".format(*figures)
                against.append(f"| {task} | {label} | {cells} |")
        draw_groups(axis, curves, baseline, rng) if many else draw_curves(axis, curves, grid, colors, rng)
        axis.set_title(f"{task}, {end} steps" if many else task)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    for label in sorted(set.intersection(*map(set, ends.values())) - {baseline}) if len(tasks) > 1 else ():
        if all(baseline in x for x in ends.values()):  # rliable takes as many runs of every task
            pairs = [[x[name] for x in ends.values()] for name in (label, baseline)]
            scores = [np.stack([x[: min(map(len, each))] for x in each], axis=1) for each in pairs]
            cells = "{:.2f} | {:.2f} to {:.2f}".format(*probability_of_improvement(*scores))
            seeds = " and ".join(str(len(x)) for x in scores)
            against.append(f"| all, first {seeds} runs of each | {label} | - | - | {cells} |")

    commits = Counter(run.commit or "unknown" for run in found)
    made_by = ", ".join(f"{commit} ({count} runs)" for commit, count in commits.most_common())
    parts = [table] + [x for x in (against, beside) if len(x) > 2] + [[f"Commits: {made_by}."]]
    text = "\n\n".join("\n".join(part) for part in parts) + "\n"
    args.output.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(args.output / ("groups.png" if many else "curves.png"), dpi=110)
    plt.close(figure)
    (args.output / "curves.csv").write_text("\n".join(rows) + "\n")
    (args.output / "summary.csv").write_text("\n".join(summaries) + "\n")
    (args.output / "settings.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    (args.output / "table.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main(tyro.cli(Args))
