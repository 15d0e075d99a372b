"""Curves, intervals and tables of runs: control, legged robots, language models.

    python benchmark/report.py runs/mujoco --output benchmark/results/mujoco
    python benchmark/report.py benchmark/results/mujoco runs/mujoco --output benchmark/results/mujoco

The second adds new runs to an earlier report's, whose run folders may be gone. Runs of a suite are grouped by task and
variant, language models by method, clip ratio and epochs, others by script and the flags in which they differ.
Intervals are 95% bootstrap intervals over runs; some statistics are rliable's (Agarwal et al., 2021).
"""

import contextlib
import io
import json
import math
import re
import sys
import tempfile
import tomllib
import warnings
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.ticker import EngFormatter
from rliable import library, metrics
from run import HARMLESS, RUNNERS
from scipy.stats import DegenerateDataWarning, bootstrap, ttest_1samp

WINDOW = 100  # episodes
DRAWS = 2000  # of rliable's bootstrap
MANY = 4  # groups of a task besides references, above which curves could not be told apart
FEW = 5  # runs of a group, up to which each is drawn in place of an interval
KEYS = ["task", "group", "seed"]  # of a run
CONFIG = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
COLOURS, PANELS = CONFIG["colours"], CONFIG["panels"]


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders of runs, or that hold such, or of earlier reports
    output: Path = Path("benchmark/results")  # folder of the report
    baseline: str | None = None  # the group that others are compared with; default: the one named default, else PPO's
    without_noise: bool = False  # compare returns that enjoy.py recorded, not training's


def stop(line):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


# --- reading


def find_folders(paths):
    """The run folders in the paths, and paths that hold none: earlier reports."""
    for path in paths:
        yield from sorted(x.parent for x in path.glob("**/args.json")) or [path]


def read_run(folder):
    """args.json and the tables of a run: metrics, and episodes or evaluations."""
    about = json.loads((folder / "args.json").read_text())
    if not any((folder / name).exists() for name in ("agent.pt", "model")):
        raise ValueError("the run is not finished")
    kind, tables = about["script"].split("_")[-1], {}
    for name in ["metrics", *{"locomotion": [], "llm": ["evaluations"]}.get(kind, ["episodes"])]:
        tables[name] = pd.read_csv(folder / f"{name}.csv").astype(float)
        if tables[name].empty:
            raise ValueError("no episode has ended" if name == "episodes" else f"{name}.csv is empty")
        if name != "metrics" and tables[name].isna().any(axis=None):
            raise ValueError(f"{name}.csv is damaged")
    if (path := folder / "evaluations.csv").exists() and kind != "llm":
        tables["played"] = pd.read_csv(path)
    return about, tables


def summarise(about, tables):
    """Figures of a run besides its curves: name -> number."""
    table, task = tables["metrics"], about["args"]["env_id"]
    summary = {name: table[name].mean() for name in ("ratio/out_of_bounds", "losses/kl") if name in table}
    if "charts/SPS" in table:
        summary["training_seconds"] = (table["step"] / table["charts/SPS"]).iloc[-1]
    if "episodes" in tables and task.startswith("Hopper"):  # it can stand still and collect the survival bonus
        last = tables["episodes"][-WINDOW:].mean()
        summary["caught"] = float(last["return"] < 1500 and last["length"] > 900)
    if "played" in tables:
        x, steps = tables["played"], about["args"]["total_timesteps"]
        own = x[(x["agent"] == "agent.pt") & (x["env_id"] == task) & ~x["stochastic"] & (x["cut"] == 0)]
        summary["without_noise"] = own["mean"][~(own["step"] < steps)].tail(1).mean()
    if "evaluations" in tables:
        summary["largest_ratio"] = table["ratio/max"].max()
    return summary


def read_report(folder):
    """Curves and summary of an earlier report, tables, and settings, which some lack."""
    curves, summary = (pd.read_csv(folder / name, dtype={"group": str}) for name in ("curves.csv", "summary.csv"))
    if set(curves[KEYS].itertuples(index=False)) != set(summary[KEYS].itertuples(index=False)):
        raise ValueError("curves.csv and summary.csv hold different runs")
    settings = folder / "settings.json"
    return curves, summary, json.loads(settings.read_text()) if settings.exists() else {}


# --- curves


def choose_interval(lengths):
    """Steps between points: the largest 1, 2 or 5 x 10^n that gives each run 100 points, or 1."""
    return max(x * 10**n for n in range(12) for x in (1, 2, 5) if x * 10**n <= max(1, min(lengths, default=1) / 100))


def make_grid(known, interval, end):
    """Steps of a curve up to its end: those of earlier curves, and on from there."""
    known = sorted(set(known))
    start, gap = (known[-1], known[-1] - known[-2]) if known[1:] else (0, interval)
    return np.array([*(x for x in known if x <= end), *range(start + gap, int(end) + 1, gap)])


def curve(steps, returns, grid):
    """Mean return of the last WINDOW episodes that had ended by each step of the grid[K]; NaN before the first: [K]"""
    means = pd.Series(returns).rolling(WINDOW, min_periods=1).mean().to_numpy()
    ended = np.searchsorted(steps, grid, side="right")
    return np.where(ended > 0, means[ended - 1], np.nan)


def make_curves(tables, grid):
    """A run's points: a table of steps and figures. A language model's are its evaluations or its votes."""
    table = tables["metrics"]
    if "ttrl/label_accuracy" in table:  # labels by majority: every iteration measures them
        names = {f"ttrl/{x}": x for x in ("ground_truth_ratio", "label_accuracy")} | {"ratio/max": "ratio_max"}
        return table[["step", *names]].rename(columns=names).astype({"step": int})
    if "evaluations" in tables:
        points = tables["evaluations"][["step", "pass@1"]].astype({"step": int})
        then = table.iloc[np.searchsorted(table["step"], points["step"])].reset_index().where(points["step"] > 0)
        return points.assign(ratio_max=then["ratio/max"], out_of_bounds=then["ratio/out_of_bounds"])
    if len(grid) == 0 or grid[-1] < tables.get("episodes", table)["step"].iloc[0]:
        raise ValueError("nothing had ended by a point of the curve")
    if "episodes" in tables:
        steps, returns = tables["episodes"][["step", "return"]].to_numpy().T
        return pd.DataFrame({"step": grid, "return": curve(steps, returns, grid)})
    nearest = np.searchsorted((grid[:-1] + grid[1:]) / 2, table["step"], side="right")
    means = table[[name for name in PANELS if name in table]].groupby(nearest).mean()
    return means.reindex(range(len(grid))).assign(step=grid)


# --- groups


def variant(folder, about):
    """The run's variant in a suite, or None."""
    end = f"__{about['args']['env_id'].replace('/', '-')}__{about['args']['seed']}"
    name = folder.resolve().parent.name
    return name.removesuffix(end) if name.endswith(end) else None


def differ(args, others, name):
    """Whether two runs differ in a setting that both have and that matters."""
    return name not in RUNNERS + HARMLESS and args[name] != others.get(name, args[name])


def label(folder, about, others):
    """The group of a run, of whose others args.json is given."""
    args, name = about["args"], about["script"].split("_")[0].upper()
    if about["script"].endswith("_llm"):
        epochs = f"{args['update_epochs']} epoch" + "s" * (args["update_epochs"] > 1)
        name = args.get("objective", name) + " exact" * (args.get("baseline") == "exact")
        rate = f", {args.get('learning_rate')}" * (len({x["args"].get("learning_rate") for x in others}) > 1)
        return f"{name.upper().replace('_', ' ')} ({args['clip_coef']}, {epochs}{rate})"
    peers = [other["args"] for other in others if other["script"] == about["script"]]
    flags = (f"{k}={args[k]}" for k in args if any(differ(args, peer, k) for peer in peers))
    return " ".join([name, *flags]) if (own := variant(folder, about)) is None else own


def check_settings(folder, args, group, settings):
    """Adds a run's settings to its task's, group -> settings, or stops if they do not fit."""
    own = {name: x for name, x in args.items() if name not in RUNNERS + HARMLESS}
    known = settings.setdefault(group, own)
    other = [x for x in own if (x != "total_timesteps" or "algo" in own) and differ(own, known, x)]
    ours = [x for x in (own, *settings.values()) if "algo" not in x]
    scheduled = any("group_size" in x or x.get("lr_schedule") == "linear" for x in ours)
    if scheduled and len({x.get("total_timesteps") for x in ours}) > 1:
        other.append("total_timesteps, on which the learning rate depends")
    if other:
        stop(f"{folder} has other settings than other runs: {', '.join(other)}; make a report of each")


@contextlib.contextmanager
def skipping(folder):
    """Skips a run that cannot be read, or stops if it is an earlier report: --output may be the same folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        if (folder / "curves.csv").exists():
            stop(f"no report to extend: {folder}: {error}")
        print(f"skipped {folder}: {'it has no ' * isinstance(error, KeyError)}{error}", file=sys.stderr)


def collect(args):
    """Curves and summary, tables with a row per point and per run, and settings by task and group."""
    curves, summaries, settings, new = [], [], {}, []
    for folder in find_folders(args.runs):
        with skipping(folder):
            if not (folder / "curves.csv").exists():
                new.append((folder, *read_run(folder)))
                continue
            points, runs, theirs = read_report(folder)
            curves, summaries = [*curves, points], [*summaries, runs]
            for task, groups in theirs.items():
                for group, own in groups.items():
                    check_settings(folder, own, group, settings.setdefault(task, {}))
    earlier = pd.concat([pd.DataFrame(columns=[*KEYS, "step"]), *curves])
    interval = choose_interval([about["args"]["total_timesteps"] for _, about, _ in new])
    for folder, about, tables in new:
        task, commit = about["args"]["env_id"], about.get("commit") or ""
        if len(earlier) and variant(folder, about) is None:
            stop(f"{folder} is not of a suite: give it and the runs it belongs with, no report")
        with skipping(folder):
            grid = make_grid(earlier["step"][earlier["task"] == task], interval, tables["metrics"]["step"].iloc[-1])
            points, figures = make_curves(tables, grid), summarise(about, tables)
            run = {"task": task, "group": label(folder, about, [x for _, x, _ in new]), "seed": about["args"]["seed"]}
            script = {"script": about["script"]}
            check_settings(folder, about["args"] | script, run["group"], settings.setdefault(task, {}))
            curves.append(points.assign(**run)[[*KEYS, "step", *points.columns.drop("step")]])
            made_by = script | {"commit": commit[:12] + "-dirty" * commit.endswith("-dirty")}
            summaries.append(pd.DataFrame([run | made_by | figures]))
    if not curves:
        stop("no finished run in these folders")
    summary = pd.concat(summaries).sort_values(KEYS).fillna({"script": "", "commit": ""})
    if len(twice := summary[summary.duplicated(KEYS)]):
        stop(f"two runs of {twice['group'].iloc[0]} with seed {twice['seed'].iloc[0]}: leave one out")
    return pd.concat(curves).sort_values([*KEYS, "step"]), summary, settings


# --- intervals


def mean_interval(*sides):
    """Mean of a side [S, ...], or of one less another's, and its interval: point, low, high."""

    def statistic(ours, *theirs, axis=0):
        return ours.mean(axis) - sum(x.mean(axis) for x in theirs)

    point = statistic(*sides)
    if min(map(len, sides)) < 2:
        return point, point, point
    drawn = bootstrap(sides, statistic, method="percentile", rng=0)
    return point, *drawn.confidence_interval


def rliable_interval(statistic, *sides):
    """A statistic of rliable and its interval, stratified by task: sides [S, tasks] -> point, low, high."""
    point = statistic(*sides)
    if max(map(len, sides)) < 2:
        return point, point, point
    np.random.seed(0)  # rliable draws from it, whatever random_state it has
    scores = {"": sides if len(sides) > 1 else sides[0]}
    drawn = library.get_interval_estimates(scores, lambda *x: np.array([statistic(*x)]), reps=DRAWS)[1][""][:, 0]
    return point, *drawn


# --- tables


def estimate(digits, point, low, high, runs=2):
    """A cell: a figure and its interval, if there are runs enough for one."""
    interval = f" ({low:.{digits}f} to {high:.{digits}f})" if runs > 1 else ""
    return "-" if np.isnan(point) else f"{point:.{digits}f}{interval}"


def probability(ours, theirs):
    """A cell: P(a run of ours [S, tasks] is better than one of theirs)."""
    return estimate(2, *rliable_interval(metrics.probability_of_improvement, ours, theirs), min(len(ours), len(theirs)))


def read_published():
    """Published figures, strings: the paper's, ((task, algorithm), step) -> return, and a table of the others."""
    table = pd.read_csv(Path(__file__).with_name("published.csv"), comment="#", dtype=str)
    ours = table["source"] == "paper"
    paper = {((task, algorithm), step): x for task, algorithm, step, x, _ in table[ours].itertuples(index=False)}
    return paper, table[~ours]


def method(group, script):
    """The first word with a colour: "lambda=1", "bpo_continuous_action" -> "bpo"."""
    return next((word for word in re.split(r"[\W_]", f"{group} {script}".lower()) if word in COLOURS), "")


def figure(runs, name):
    """A column of summary.csv, NaN where it has none."""
    return runs.get(name, pd.Series(np.nan, runs.index))


def complete_table(table, runs, references):
    """A task's curves with the step at which runs are compared, end, and hours, if there are references.

    The end is the last step that all runs have; references do not shorten ours, and may end before.
    """
    lasts = table.groupby(["group", "seed"])["step"].max()
    ends = lasts.groupby("group").min()
    reference = ends.index.isin(references)
    if not reference.all():
        ours = ends[~reference].min()
        ends = ends.clip(upper=ours).where(reference, ours)
    table = table.assign(end=table["group"].map(ends))
    if reference.any():  # rates of a resumed run are its last process's
        pace = figure(runs.set_index(["group", "seed"]), "training_seconds") / lasts
        table["hours"] = table["step"] * pace.loc[[*zip(table["group"], table["seed"])]].to_numpy() / 3600
    return table


def ends_of(table, name):
    """Figures of a task's runs at their end (language models: each one's last), by group and seed."""
    runs = table.groupby(["group", "seed"])
    if "ratio_max" in table:
        return runs[name].last()
    ends = table[table["step"] == table["end"]].set_index(["group", "seed"])[name].reindex(runs.size().index)
    if name == "return" and ends.isna().any():
        late = ", ".join(f"{group} {seed}" for group, seed in ends.index[ends.isna()])
        task, end = table[["task", "end"]].iloc[0]
        stop(f"{task}: the shortest run ends at step {end}, where no episode had ended in {late}")
    return ends


def llm_cells(curves, runs):
    """Cells that only language models have, of a group's curves [S, K]."""
    cells = {"start": f"{curves.iloc[:, 0].mean():.3f}", "best": f"{curves.max(axis=1).mean():.3f}"}
    largest = figure(runs, "largest_ratio").to_numpy()
    cells["largest ratio (95%)"] = estimate(2, *mean_interval(largest), len(runs))
    return cells | {"out of bounds": f"{figure(runs, 'ratio/out_of_bounds').mean(skipna=False):.1%}"}


def group_rows(task, table, runs, baseline, tables, without_noise):
    """Adds a task's groups to the tables, rows by name; returns the ends, of groups as long as the baseline."""
    name, llm = next(name for name in PANELS if name in table), "ratio_max" in table
    ends, curves = ends_of(table, name), table.pivot(index=["group", "seed"], columns="step", values=name)
    digits = 3 if llm else int(ends.abs().max() < 100)
    show, steps = f"{{:.{digits}f}}".format, table.groupby("group")["step" if without_noise else "end"].max()
    (paper, elsewhere), game = read_published(), task.replace("NoFrameskip-v4", "-v5")
    if without_noise:
        ends, paper = runs.set_index(["group", "seed"])["without_noise"].dropna(), {}
    for group, last in ends.groupby("group"):
        last, own, row = last.to_numpy(), runs[runs["group"] == group], {"task": task, "group": group}
        count, step, script = len(last), steps[group], own["script"].iloc[0]
        cells = {"seeds": count, "steps": step, "mean (95%)": estimate(digits, *mean_interval(last), count)}
        iqm = rliable_interval(metrics.aggregate_iqm, last[:, None])
        cells["IQM (95%)"] = estimate(digits, *iqm, count)
        worst = np.sort(last)[: math.ceil(count / 4)].mean() if count >= 4 else np.nan
        cells |= {"worst quarter": show(worst), "caught": f"{figure(own, 'caught').mean(skipna=False):.0%}"}
        cells |= llm_cells(curves.loc[group].dropna(axis=1), own) if llm else {}
        if "hours" in table:
            cells["hours of one core"] = f"{ends_of(table, 'hours')[group].mean():.2f}"
        tables["groups"].append(row | cells | {"each": ", ".join(map(show, last))})
        comparable = group != baseline and not llm and steps.get(baseline) == step and baseline in ends.index
        base = ends[baseline].to_numpy() if comparable else last[:0]
        if min(count, len(base)) > 1:
            less = {f"mean less that of {baseline} (95%)": estimate(digits, *mean_interval(last, base))}
            better = {f"P(better than {baseline}) (95%)": probability(last[:, None], base[:, None])}
            tables["against"].append(row | less | better)
        if script != "reference" and (key := (game, method(group, script)), str(step)) in paper:
            row |= {"steps": step, "ours": show(last.mean()), "authors' curve at as many": paper[key, str(step)]}
            tables["published"].append(row | {"paper's Table 1, converged": paper.get((key, "end"), "-")})
    if "hours" in table:
        tables["elsewhere"] += elsewhere[elsewhere["task"].str.startswith(game.split("-")[0])].to_dict("records")
    return ends[ends.index.get_level_values(0).map(steps) == steps.get(baseline, steps.max())]


def seed_rows(ends):
    """Rows that compare language models' ends with GBPO's at equal settings, seed by seed: t-intervals."""
    groups = sorted(ends.index.unique("group"), key=lambda x: not x.startswith("GBPO"))
    for gbpo, group in combinations(groups, 2):
        alike = gbpo.startswith("GBPO") and gbpo.split(" (")[1] == group.split(" (")[1]
        less = (ends[gbpo] - ends[group]).dropna() if alike else ()
        if len(less) > 1:
            cell = estimate(3, less.mean(), *ttest_1samp(less, 0).confidence_interval())
            row = {f"{ends.name} at the end, seed by seed": f"{gbpo} less {group}", "seeds": len(less)}
            yield row | {"mean (95%)": cell, "each": ", ".join(f"{x:.2f}" for x in less)}


def markdown(rows):
    """A table, without columns that say nothing."""
    table = pd.DataFrame(rows).astype(str).replace({"nan": "-", "nan%": "-"})
    table = table.loc[:, (table != "-").any()]
    lines = [f"| {' | '.join(row)} |" for row in (table.columns, *table.to_numpy())]
    return "\n".join([lines[0], "|-" * table.shape[1] + "|", *lines[1:]])


# --- pictures


def looks_of(methods, references=()):
    """Group -> method to group -> the method's colour, how many groups had it before, whether it is a reference."""
    names, looks = [*methods.values()], {}
    for place, (group, name) in enumerate(methods.items()):
        looks[group] = COLOURS.get(name, "#777777"), names[:place].count(name), group in references
    return looks


def line(colour, place, reference=False):
    """Style of a line: the method's colour, for its other groups darker or paler, and broken. References are dashed."""
    dark, pale = [(1, 0), (0.4, 0), (0.5, 0.5), (0.3, 0.3)][place % MANY]
    style = "--" if reference else ("-", "--", "-.", ":")[place % MANY]
    return {"color": tuple(np.array(to_rgb(colour)) * dark + pale), "linestyle": style}


def by_setting(table):
    """The table with a language model's setting moved from its group's name to its task's: each has its own panels."""
    names = table["group"].str.extract(r"(?P<group>.*) (?P<task>\(\d.*\))$")
    names["task"] = table["task"] + " " + names["task"]
    return table.assign(**names.fillna(table))


def draw_curves(axis, table, name, looks, x):
    """Mean of each group's runs, and its interval, or up to FEW runs each."""
    for group, runs in table.groupby("group"):
        runs = runs.assign(point=runs.groupby("seed").cumcount())  # language models have points at different steps
        wide = runs.pivot(index="seed", columns="point", values=[x, name])
        steps, values = wide[x].mean().to_numpy(), wide[name].to_numpy()  # [K], [S, K]
        style, (mean, *sides) = line(*looks[group]), mean_interval(values)
        if len(values) > FEW:
            axis.fill_between(steps, *sides, color=style["color"], alpha=0.2, linewidth=0)
        for each in values if len(values) <= FEW else ():
            known = np.isfinite(each)
            axis.plot(steps[known], each[known], color=style["color"], alpha=0.35, linewidth=0.7)
        known = np.isfinite(mean)
        axis.plot(steps[known], mean[known], label=group, **style)
    steps = "completions" if "ratio_max" in table else "environment steps"
    axis.set(xlabel=steps if x == "step" else "hours of one core", ylabel=PANELS[name])
    if x == "step":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_ends(axis, figures, title, looks):
    """A row per group of its runs, mean and interval: group -> (values [S], mean, low, high)."""
    for place, (group, (values, mean, low, high)) in enumerate(figures.items()):
        axis.plot([low, high], [place, place], color=looks[group][0], linewidth=5, alpha=0.4, solid_capstyle="butt")
        axis.plot(values, [place] * len(values), ".", color="0.35", markersize=3)
        axis.plot(mean, place, "o", color=looks[group][0])
    axis.set_yticks(range(len(figures)), figures)
    axis.set(xlabel=title, ylim=(-0.6, len(figures) - 0.4))


def draw_task(axes, names, many, table, runs, looks, x):
    """A panel per curve of a task, or of many groups per figure at the end, the best on top."""
    order = ends_of(table, names[0]).groupby("group").mean().sort_values().index
    for axis, name in zip(axes, names):
        if many:
            ends = ends_of(table, name) if name != "ratio_max" else runs.set_index(["group", "seed"])["largest_ratio"]
            figures = {x: (ends[x], *mean_interval(ends[x].to_numpy())) for x in order}
            draw_ends(axis, figures, PANELS[name], looks)
        else:
            draw_curves(axis, table, name, looks, x)
        if name in ("ratio_max", "charts/learning_rate"):
            axis.set(**{"xscale" if many else "yscale": "log"})
    axes[0].set_title(table["task"].iloc[0])


def draw_all(curves, summary, looks, x="step", more=0):
    """The picture of all tasks' curves against x, or of their ends, and so many empty axes."""
    runs = dict([*by_setting(summary).groupby("task")])
    tasks = {task: table.dropna(axis=1, how="all") for task, table in by_setting(curves).groupby("task", sort=False)}
    panels = {task: [name for name in PANELS if name in table] for task, table in tasks.items()}
    each, groups = max(map(len, panels.values())), {task: table["group"].unique() for task, table in tasks.items()}
    many = {task: sum(not looks[group][-1] for group in names) > MANY for task, names in groups.items()}
    rows = max(map(len, groups.values())) * any(many.values())
    picture, axes = make_figure(sum(map(len, panels.values())) + more, rows, each)
    for task, table in tasks.items():
        draw_task(axes, panels[task], many[task], table, runs[task], looks, x)
        axes = axes[len(panels[task]) :]
    return picture, axes


def make_figure(panels, rows=0, each=1):
    """A figure and its axes, for curves or for so many rows each; so many panels belong together."""
    columns = 2 if panels in (2, 4) or each == 2 else min(panels, 3)
    lines = math.ceil(panels / columns)
    size = (6.5 * columns, (0.9 + 0.25 * rows) * lines) if rows else (4.8 * columns, 3.3 * lines + 0.4)
    picture, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[panels:]:
        axis.remove()
    return picture, axes.flat[:panels]


def save(figure):
    """The figure as a PNG file's bytes, with one legend for all its curves."""
    lines = {name: line for axis in figure.axes for line, name in zip(*axis.get_legend_handles_labels())}
    if lines:
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=MANY, frameon=False)
    figure.savefig(buffer := io.BytesIO(), dpi=100, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def normalise(ends, looks):
    """Normalised scores [S, tasks] of the groups that all tasks have, if there are several, and the tasks."""
    scales, scores = {task: CONFIG["normal"].get(re.sub(r"-v\d+$", "", task)) for task in ends}, {}
    ends = {task: values / scales[task] for task, values in ends.items() if scales[task]}
    for group in looks:
        if len(ends) > 1 and all(group in values.index for values in ends.values()):
            least = min(len(values[group]) for values in ends.values())
            scores[group] = np.stack([values[group].to_numpy()[:least] for values in ends.values()], axis=1)
    return scores, ", ".join(ends)


def aggregate(axes, scores, tasks, baseline, looks):
    """Draws the comparison over tasks on two axes; yields the table's rows."""
    figures = {x: (y.mean(1), *rliable_interval(metrics.aggregate_iqm, y)) for x, y in scores.items()}
    draw_ends(axes[0], figures, "IQM of normalised scores (dots: a run of each task)", looks)
    grid = np.linspace(0, max(x.max() for x in scores.values()), 101)
    profiles, sides = library.create_performance_profile(scores, grid, reps=DRAWS)
    for group, ours in scores.items():
        style = line(*looks[group])
        axes[1].fill_between(grid, *sides[group], color=style["color"], alpha=0.2, linewidth=0)
        axes[1].plot(grid, profiles[group], label=group, **style)
        row = {"group": group, "runs of each task": len(ours), "tasks": tasks, "mean, normalised": f"{ours.mean():.3f}"}
        row["IQM, normalised (95%)"] = estimate(3, *figures[group][1:], len(ours))
        if baseline in scores:
            row[f"P(better than {baseline}) (95%)"] = probability(ours, scores[baseline]) if group != baseline else "-"
        yield row
    axes[0].set_title("all tasks")
    axes[1].set(xlabel="normalised score", ylabel="share of runs above it")


# --- the report


def write_all(folder, files):
    """Writes files, name -> bytes, all or none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            for name, content in files.items():
                Path(new, name).write_bytes(content)
            for name in files:
                Path(new, name).replace(folder / name)
    except OSError as error:
        stop(f"cannot write to {folder}, which is as before: {error.strerror}")


def to_csv(table, digits):
    return table.dropna(axis=1, how="all").to_csv(index=False, float_format=f"%.{digits}g").encode()


def main(args):
    """Makes the report."""
    matplotlib.use("Agg")
    warnings.simplefilter("ignore", DegenerateDataWarning)
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    curves, summary, settings = collect(args)
    if args.without_noise and "without_noise" not in summary.dropna(axis=1, how="all"):
        stop("no agent was evaluated: python enjoy.py RUN_DIRS")
    methods = {x: method(x, script) for x, script in summary.groupby("group")["script"].first().items()}
    references = {*summary["group"][summary["script"] == "reference"]}
    usual = ["default"] * ("default" in methods) + [x for x in methods if methods[x] == "ppo" and x not in references]
    baseline = args.baseline or next(iter(usual), "none")
    if args.baseline and baseline not in methods:
        stop(f"no group {baseline}: there are {', '.join(methods)}")
    runs = dict([*summary.groupby("task")])
    tasks = {
        x: complete_table(table.dropna(axis=1, how="all"), runs[x], references) for x, table in curves.groupby("task")
    }
    tables, ends = {name: [] for name in ("groups", "against", "pairs", "aggregate", "published", "elsewhere")}, {}
    for task, table in tasks.items():
        ends[task] = group_rows(task, table, runs[task], baseline, tables, args.without_noise)
        tables["pairs"] += seed_rows(ends[task]) if "ratio_max" in table else []
    looks = looks_of({x: methods[y] for x, y in zip(by_setting(summary)["group"], summary["group"])}, references)
    points = pd.concat(tasks.values())
    scores, compared = normalise(ends, looks)
    picture, axes = draw_all(points, summary, looks, more=2 * bool(scores))
    if scores:
        tables["aggregate"] += aggregate(axes, scores, compared, baseline, looks)
    files = {
        "curves.png": save(picture),
        "curves.csv": to_csv(curves, 6),
        "summary.csv": to_csv(summary, 8),
    }
    if "hours" in points:  # at equal steps: paces differ
        timed = points[points["step"] <= points["end"]].dropna(subset="hours")
        files["hours.png"] = save(draw_all(timed, summary, looks, "hours")[0])
    if settings:
        files["settings.json"] = (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode()
    commits = summary["commit"].replace("", "unknown").value_counts()
    made_by = f"Commits: {', '.join(f'{commit} ({count} runs)' for commit, count in commits.items())}."
    text = "\n\n".join([*(markdown(rows) for rows in tables.values() if rows), made_by]) + "\n"
    write_all(args.output, files | {"table.md": text.encode()})
    print(text, end="")


if __name__ == "__main__":
    main(tyro.cli(Args))
