"""benchmark/report.py on run folders written by hand: figures, skipped runs, bad input, earlier reports."""

import contextlib
import io
import itertools
import json
import re
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import submitit  # noqa: F401  configures logging, which would close the stream that rliable's absl takes hold of
import tyro
from matplotlib.colors import to_rgb

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import report  # noqa: E402

REPORTS = sorted(path.parent for path in (ROOT / "benchmark" / "results").glob("*/curves.csv"))
METRICS = """step,ratio/out_of_bounds,losses/kl,theory/improvement_bound,charts/SPS
50,0.1,0.01,-1,10
100,0.3,0.02,1,20
"""


def make_run(folder, script="bpo_continuous_action", rows="", **args):
    """A finished control run."""
    folder.mkdir(parents=True)
    settings = {"seed": 1, "env_id": "Task-v0", "total_timesteps": 100, "clip_coef": 0.3, **args}
    about = {"script": script, "args": settings, "commit": "abc", "format": 2, "versions": {}}
    (folder / "args.json").write_text(json.dumps(about))
    (folder / "episodes.csv").write_text("step,return,length\n" + (rows or "10,1,10\n60,3,50\n100,8,40\n"))
    end = settings["total_timesteps"]
    (folder / "metrics.csv").write_text(METRICS.replace("\n100,", f"\n{max(end, 51)},"))
    (folder / "agent.pt").touch()
    return folder


def make_llm_run(folder, script, seed, accuracy, ratio, **own):
    folder.mkdir(parents=True)
    args = {"env_id": "addition", "seed": seed, "clip_coef": 0.5, "update_epochs": 10, "total_timesteps": 20, **own}
    (folder / "args.json").write_text(json.dumps({"script": script, "args": args}))
    (folder / "evaluations.csv").write_text(f"step,pass@1\n0,0.5\n20,{accuracy}\n")
    rows = f"10,11.5,0.0\n20,{ratio},0.5\n"
    (folder / "metrics.csv").write_text("step,ratio/max,ratio/out_of_bounds\n" + rows)
    (folder / "model").mkdir()
    return folder


def make_robot_run(folder, script, seed, returns, task="Go1-v1", **settings):
    """A run of one row per 100 steps, whose rates of learning are 1 + the return."""
    folder.mkdir(parents=True)
    args = {"env_id": task, "seed": seed, "total_timesteps": 400, **settings}
    (folder / "args.json").write_text(json.dumps({"script": script, "commit": f"{seed}abcdef0123", "args": args}))
    rows = [f"{100 * (i + 1)},{x},{1 + x}" for i, x in enumerate(returns)]
    header = "step,charts/mean_return_100,charts/learning_rate"
    (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "agent.pt").touch()
    return folder


def run_report(*arguments, interval=50, draws=100):
    """What the command prints, and its exit status; in this process, as imports take longer than all else."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    few_draws = patch.multiple(report, DRAWS=draws, **{"choose_interval": lambda _: interval} if interval else {})
    with few_draws, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            report.main(tyro.cli(report.Args, args=list(map(str, arguments))))
        except SystemExit as end:
            status = end.code
    return SimpleNamespace(returncode=status, stdout=output.getvalue(), stderr=errors.getvalue())


def cells(output):
    """Rows of the tables by their first cells that tell them apart: task and group, or the first alone."""
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("| ")]
    return {tuple(row[:2]): row[2:] for row in reversed(rows)}


# --- curves and intervals


def test_curve_is_the_mean_of_the_last_hundred_episodes():
    rng = np.random.default_rng(0)
    steps, returns = np.cumsum(rng.integers(1, 30, 500)), rng.normal(size=500)
    grid = np.arange(0, steps[-1] + 50, 37)
    for step, value in zip(grid, report.curve(steps, returns, grid)):
        ended = returns[steps <= step][-100:]
        assert np.isnan(value) if len(ended) == 0 else value == pytest.approx(ended.mean())


@pytest.mark.slow
def test_intervals_of_three_runs_are_those_of_all_resamples():
    """Written as loops. A tenth of the 2.5% at either end may be chance."""
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(2, 3, 3), rng.normal(0, 2, 3)
    chosen = [*itertools.product(range(3), repeat=3)]
    means = [np.mean(ours[[*mine]]) - np.mean(theirs[[*other]]) for mine in chosen for other in chosen]
    wins = [np.mean([ours[i] > theirs[j] for i in mine for j in other]) for mine in chosen for other in chosen]
    won = report.rliable_interval(report.metrics.probability_of_improvement, ours[:, None], theirs[:, None])
    for (point, low, high), known in ((report.mean_interval(ours, theirs), means), (won, wins)):
        assert point == pytest.approx(np.mean(known))
        low_1, low_2, high_1, high_2 = np.quantile(known, [0.018, 0.032, 0.968, 0.982])
        assert low_1 - 1e-9 <= low <= low_2 + 1e-9 and high_1 - 1e-9 <= high <= high_2 + 1e-9
    assert report.mean_interval(ours[:1], theirs) == (ours[0] - theirs.mean(),) * 3


def test_intervals_of_many_runs_have_the_normal_ones():
    rng = np.random.default_rng(4)
    ours, theirs = rng.normal(3, 1, 400), rng.normal(1, 2, 300)
    point, low, high = report.mean_interval(ours, theirs)
    half = 1.96 * np.sqrt(ours.var() / 400 + theirs.var() / 300)
    assert point == pytest.approx(ours.mean() - theirs.mean())
    assert (point - low, high - point) == (pytest.approx(half, rel=0.15), pytest.approx(half, rel=0.15))


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    returns = np.random.default_rng(2).normal(size=12) ** 3
    point, low, high = report.rliable_interval(report.metrics.aggregate_iqm, returns[:, None])
    assert point == pytest.approx(np.sort(returns)[3:9].mean())
    assert low < point < high and returns.min() < low and high < returns.max()


# --- control


@pytest.mark.slow
def test_report_of_a_suite_compares_its_variants(tmp_path):
    """Two tasks, one of the paper's; unequal numbers of seeds; groups named by the suite's variants."""
    ends = {("mine", "Hopper-v4"): [30, 50, 70], ("base", "Hopper-v4"): [20, 40], ("mine", "B/c-v0"): [300, 100]}
    ends["base", "B/c-v0"] = [200, 200, 200, 160]
    for (variant, task), returns in ends.items():
        for seed, value in enumerate(returns, 1):
            script = {"mine": "bpo_x", "base": "ppo_x"}[variant]
            name = f"{variant}__{task.replace('/', '-')}__{seed}"
            args = dict(env_id=task, seed=seed, total_timesteps=1_000_000)
            make_run(tmp_path / "suite" / name / f"run{seed}", script, f"5,{value},5\n", **args)
    done = run_report(tmp_path / "suite", "--output", tmp_path / "out", interval=500_000, draws=report.DRAWS)
    assert (done.returncode, done.stderr) == (0, "")
    table = (tmp_path / "out" / "table.md").read_text()
    assert table == done.stdout
    assert "| Hopper-v4 | mine | 3 | 1000000 | 50.0 (30.0 to 70.0) | 50.0 (30.0 to 70.0) | - | 0% | 30.0, " in table
    assert (
        "| B/c-v0 | base | 4 | 1000000 | 190 (170 to 200) | 200 (" in table
        and " | 160 | - | 200, 200, 200, 160 |" in table
    )
    assert "| Hopper-v4 | mine | 20.0 (" in table and "| 0.83 (" in table  # better in 5 of 6 pairs
    assert "| B/c-v0 | mine | 10 (" in table and "| 0.50 (" in table
    assert "| Hopper-v4 | mine | 1000000 | 50.0 | 2726 | 3505.1 |" in table
    assert "| Hopper-v4 | base | 1000000 | 30.0 | 853 | 2497.7 |" in table
    assert table.endswith("Commits: abc (11 runs).\n")
    curves = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    assert curves[1] == "B/c-v0,base,1,500000,200" and len(curves) == 1 + 2 * 11
    chosen = run_report(tmp_path / "suite", "--baseline", "mine", "--output", tmp_path / "out")
    assert "| Hopper-v4 | base | -20.0 (" in chosen.stdout
    unknown = run_report(tmp_path / "suite", "--baseline", "theirs", "--output", tmp_path / "new")
    assert (unknown.returncode, unknown.stderr) == (2, "error: no group theirs: there are base, mine\n")
    assert not (tmp_path / "new").exists()


def test_runs_caught_standing_still_on_hopper_are_counted(tmp_path):
    for seed, (value, length) in enumerate([(1000, 1000), (3000, 1000), (1400, 800), (1400, 901)], 1):
        rows = "10,9000,10\n" + 100 * f"50,{value},{length}\n"
        make_run(tmp_path / f"a__Hopper-v4__{seed}" / "run", rows=rows, env_id="Hopper-v4", seed=seed)
    assert "| 1000 | 50% | 1000, 3000, 1400, 1400 |" in run_report(tmp_path, "--output", tmp_path / "out").stdout


def test_a_short_sweep_needs_no_interval(tmp_path):
    make_run(tmp_path / "a__Task-v0__1" / "run", total_timesteps=1200, rows="10,1,10\n")
    assert run_report(tmp_path, "--output", tmp_path / "out", interval=None).returncode == 0
    assert pd.read_csv(tmp_path / "out" / "curves.csv")["step"].diff().iloc[1:].eq(10).all()
    assert report.choose_interval([10_000_000, 1_000_000]) == 10_000


def test_a_run_without_an_episode_is_called_that(tmp_path):
    """None at all, or none by the end of the shortest run."""
    (make_run(tmp_path / "none") / "episodes.csv").write_text("step,return,length\n")
    done = run_report(tmp_path / "none", "--output", tmp_path / "out")
    assert "none: no episode has ended\n" in done.stderr and "damaged" not in done.stderr
    make_run(tmp_path / "bpo__Task-v0__1" / "run")
    make_run(tmp_path / "ppo__Task-v0__7" / "run", "ppo_x", "150,5,150\n", seed=7, total_timesteps=200)
    done = run_report(*tmp_path.glob("*__*"), "--output", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists() and done.stderr.count("\n") == 1
    assert "ends at step 100, where no episode had ended in ppo 7" in done.stderr


def test_report_groups_runs_and_skips_what_it_cannot_read(tmp_path):
    make_run(tmp_path / "a", seed=2, rows="10,5,10\n100,7,90\n")
    make_run(tmp_path / "b", seed=1)
    make_run(tmp_path / "c", clip_coef=0.5)
    make_run(tmp_path / "half", seed=3, rows="10,5,10\n100,7")
    make_run(tmp_path / "nan", seed=4, rows="10,nan,10\n")
    make_run(tmp_path / "late", seed=7, rows="101,5,101\n")
    (make_run(tmp_path / "unfinished", seed=5) / "agent.pt").unlink()
    for name, text in (("no column", "a\n50\n"), ("empty", "")):
        (make_run(tmp_path / name, seed=8) / "metrics.csv").write_text(text)
    done = run_report(*sorted(x for x in tmp_path.iterdir()), tmp_path / "missing", "--output", tmp_path / "out")
    assert done.returncode == 0
    skipped = [line for line in done.stderr.splitlines() if line.startswith("skipped")]
    names = ("half", "nan", "unfinished", "missing", "late", "no column: it has no 'step", "empty")
    assert [sum(f"/{name}" in line for line in skipped) for name in names] == [1] * 7
    rows = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    group = "Task-v0,BPO clip_coef=0.3"
    assert rows[1:5] == [f"{group},1,50,1", f"{group},1,100,4", f"{group},2,50,5", f"{group},2,100,6"]
    assert "| Task-v0 | BPO clip_coef=0.3 | 2 | 100 | 5.0 (" in (tmp_path / "out" / "table.md").read_text()
    summary = (tmp_path / "out" / "summary.csv").read_text().splitlines()
    assert summary[1] == "Task-v0,BPO clip_coef=0.3,1,bpo_continuous_action,abc,0.2,0.015,5"
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_uncommitted_code_are_marked(tmp_path):
    run = make_run(tmp_path / "a")
    about = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(about | {"commit": "0123456789abcdef-dirty"}))
    assert "Commits: 0123456789ab-dirty (1 runs)." in run_report(run, "--output", tmp_path / "out").stdout


def test_published_figures_are_complete():
    published, elsewhere = report.read_published()
    assert len(published) == 8 * 2 * 5 and all(float(x) > 0 for x in published.values())
    assert published[("Ant-v4", "bpo"), "end"] == "4871.4" and published[("Swimmer-v4", "ppo"), "1000000"] == "298"
    assert elsewhere.groupby("source").size().to_dict() == {"RL-Zoo": 18, "Tianshou": 18, "the paper's Table 1": 8}


def test_a_game_has_the_papers_figures_under_both_of_its_names(tmp_path):
    for name in ("Breakout-v5", "BreakoutNoFrameskip-v4"):
        make_run(tmp_path / f"mine__{name}__1" / "run", "bpo_x", "5,3,5\n", env_id=name, total_timesteps=1_000_000)
    done = run_report(tmp_path, "--output", tmp_path / "out", interval=500_000)
    found = [line.split(" | ")[4] for line in done.stdout.splitlines() if line.startswith("| Breakout")][-2:]
    assert found == ["24", "24"]


def test_bad_input_is_one_line_and_creates_nothing(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    (tmp_path / "file").touch()
    for words in (
        [tmp_path / "a", tmp_path / "b"],
        [],
        [tmp_path / "a", "--without-noise"],
        [tmp_path / "a", "--output", tmp_path / "file"],
    ):
        done = run_report("--output", tmp_path / "out", *words)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert not (tmp_path / "out").exists()


def test_agents_are_compared_by_what_enjoy_recorded_of_them_without_noise(tmp_path):
    """The last whole row of the finished run's agent.pt on its task, deterministic; runs without one take no part."""
    header, no_row = "agent,env_id,stochastic,mean,cut,step\n", "checkpoint.pt,Task-v0,False,1,0,90\n"
    no_row += "agent.pt,Task-v0,True,2,0,100\nagent.pt,Task-v0,False,5,1,100\nagent.pt,Task-v0,False,6,0,50\n"
    for seed, (ours, theirs) in enumerate([(70, 40), (80, 50), (None, None)]):
        for script, mean in (("bpo_continuous_action", ours), ("ppo_continuous_action", theirs)):
            run = make_run(tmp_path / f"{script[:3]}__Task-v0__{seed}" / "run", script, seed=seed)
            own = f"agent.pt,Task-v0,False,3,0,100\nagent.pt,Task-v0,False,{mean},0,\nagent.pt,Other-v0,False,4,0,100\n"
            (run / "evaluations.csv").write_text(header + (own if mean else "") + no_row)
    done = run_report(tmp_path, "--without-noise", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| bpo \| 2 \| 100 \| 75.0 .*\| 70.0, 80.0 \|", done.stdout)
    assert re.search(r"\| ppo \| 2 \| 100 \| 45.0 .*\| 40.0, 50.0 \|", done.stdout)
    assert "| bpo | 30.0 (" in done.stdout
    assert "| bpo | 3 | 100 | 4.0 (" in run_report(tmp_path, "--output", tmp_path / "out").stdout
    again = run_report(tmp_path / "out", "--without-noise", "--output", tmp_path / "again")
    assert again.stdout == done.stdout
    long = make_run(tmp_path / "bpo__Task-v0__3" / "run", seed=3, total_timesteps=200)
    (long / "evaluations.csv").write_text(f"{header}agent.pt,Task-v0,False,90,0,200\n")
    done = run_report(long, *tmp_path.glob("ppo__*"), "--without-noise", "--output", tmp_path / "longer")
    assert "| bpo | 1 | 200 | 90.0 |" in done.stdout and " less " not in done.stdout  # agents of other lengths
    for run in tmp_path.glob("ppo__*/run"):  # the baseline, which now was not played
        (run / "evaluations.csv").write_text(header + no_row)
    done = run_report(*tmp_path.glob("*__[012]"), "--without-noise", "--output", tmp_path / "ours")
    assert done.returncode == 0 and "| bpo | 2 | " in done.stdout and "| ppo |" not in done.stdout
    done = run_report(*tmp_path.glob("ppo__*"), "--without-noise", "--output", tmp_path / "none")
    assert done.returncode == 2 and "no agent was evaluated" in done.stderr and not (tmp_path / "none").exists()


# --- settings


def test_runs_of_one_variant_with_another_script_are_not_pooled(tmp_path):
    make_run(tmp_path / "one" / "default__Task-v0__1" / "run")
    make_run(tmp_path / "two" / "default__Task-v0__2" / "run", "ppo_continuous_action", seed=2)
    done = run_report(tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 2 and "other settings than other runs: script; make" in done.stderr


def test_runs_of_one_variant_with_other_settings_are_not_pooled(tmp_path):
    """As where two suites have a variant of the same name. What does not change learning may differ."""
    make_run(tmp_path / "one" / "bpo__Task-v0__1" / "run", device="cpu", gamma=0.9)
    make_run(tmp_path / "two" / "bpo__Task-v0__2" / "run", seed=2, device="cuda", exp_name="x")  # older: no gamma
    assert run_report(tmp_path, "--output", tmp_path / "out").returncode == 0
    make_run(tmp_path / "three" / "bpo__Task-v0__3" / "run", seed=3, clip_coef=0.9)
    done = run_report(tmp_path / "one", tmp_path / "two", tmp_path / "three", "--output", tmp_path / "new")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "new").exists()
    assert "run has other settings than other runs: clip_coef; make" in done.stderr
    run_report(tmp_path / "one", tmp_path / "two", "--output", tmp_path / "first")
    done = run_report(tmp_path / "first", tmp_path / "three", "--output", tmp_path / "new")
    assert done.returncode == 2 and "other runs: clip_coef; make" in done.stderr and not (tmp_path / "new").exists()
    run_report(tmp_path / "three", "--output", tmp_path / "third")
    done = run_report(tmp_path / "first", tmp_path / "third", "--output", tmp_path / "new")
    assert done.returncode == 2 and "third has other settings than other runs: clip_coef; make" in done.stderr
    (tmp_path / "first" / "settings.json").unlink()  # as in reports of earlier versions
    assert run_report(tmp_path / "first", tmp_path / "three", "--output", tmp_path / "new").returncode == 0


@pytest.mark.parametrize("schedule, status", [("linear", 2), ("constant", 0)])
def test_lengths_may_differ_only_if_nothing_is_scheduled_over_them(schedule, status, tmp_path):
    """A short run whose rate has fallen to 0 is not the first part of a long one."""
    make_run(tmp_path / "bpo__Task-v0__1" / "run", lr_schedule=schedule)
    make_run(tmp_path / "ppo__Task-v0__1" / "run", "ppo_x", lr_schedule=schedule, total_timesteps=200)
    done = run_report(tmp_path, "--output", tmp_path / "out")
    assert (done.returncode, (tmp_path / "out").exists()) == (status, status == 0)
    assert ("other settings than other runs: total_timesteps, on which the" in done.stderr) == (status == 2)


# --- earlier reports, and writing


@pytest.mark.parametrize("folder", REPORTS, ids=lambda path: path.name)
def test_a_published_report_gives_its_curves_again(folder):
    """Byte for byte; so a report that is extended keeps what it had."""
    curves, summary, _ = report.collect(report.Args(runs=(folder,)))
    assert report.to_csv(curves, 6) == (folder / "curves.csv").read_bytes()
    assert report.to_csv(summary, 8) == (folder / "summary.csv").read_bytes()
    assert folder.joinpath("table.md").exists() and folder.joinpath("curves.png").exists()


def test_a_report_whose_groups_have_numbers_for_names_is_extended(tmp_path):
    make_run(tmp_path / "runs" / "0.10__Task-v0__1" / "run")
    make_run(tmp_path / "more" / "0.10__Task-v0__2" / "run", seed=2)
    assert run_report(tmp_path / "runs", "--output", tmp_path / "out").returncode == 0
    done = run_report(tmp_path / "out", tmp_path / "more", "--output", tmp_path / "out")
    assert "| 0.10 | 2 | 100 |" in done.stdout


def test_an_earlier_report_and_new_runs_make_the_report_of_all(tmp_path):
    """Also where the new runs are shorter or longer than the earlier ones, and the groups differ."""
    rng = np.random.default_rng(5)
    lengths = {1: 100, 2: 300, 3: 200}
    for variant, seed in ((v, s) for v in ("mine", "base", "late") for s in lengths if (v, s) != ("late", 1)):
        script, value = f"{'ppo' if variant == 'base' else 'bpo'}_x", 1000 * rng.normal()
        folder = tmp_path / ("old" if seed == 1 else "new") / f"{variant}__Task-v0__{seed}"
        make_run(folder / "run", script, f"5,{value},5\n70,{value / 3},5\n", seed=seed, total_timesteps=lengths[seed])
    run_report(tmp_path / "old", "--output", tmp_path / "first")
    together = run_report(tmp_path / "first", tmp_path / "new", "--output", tmp_path / "both", interval=None)
    at_once = run_report(tmp_path / "old", tmp_path / "new", "--output", tmp_path / "all")
    assert (together.returncode, together.stderr, together.stdout) == (0, "", at_once.stdout)
    assert "| Task-v0 | mine | 3 | 100 |" in together.stdout and "| Task-v0 | late | 2 |" in together.stdout
    for name in ("curves.csv", "summary.csv", "settings.json"):
        assert (tmp_path / "both" / name).read_text() == (tmp_path / "all" / name).read_text()
    assert "Task-v0,mine,2,300," in (tmp_path / "both" / "curves.csv").read_text(), "no curve is cut"


def test_a_report_within_the_folder_of_its_runs_is_made_anew_from_them(tmp_path):
    make_run(tmp_path / "a__Task-v0__1" / "run")
    run_report(tmp_path, "--output", tmp_path)
    make_run(tmp_path / "a__Task-v0__2" / "run", seed=2)
    again = run_report(tmp_path, "--output", tmp_path)
    assert (again.returncode, again.stderr) == (0, "") and "| Task-v0 | a | 2 |" in again.stdout


def test_a_report_that_cannot_be_extended_is_named(tmp_path):
    make_run(tmp_path / "a__Task-v0__1" / "run")
    run_report(tmp_path / "a__Task-v0__1", "--output", tmp_path / "out")
    twice = run_report(tmp_path / "out", tmp_path / "a__Task-v0__1", "--output", tmp_path / "new")
    assert (twice.returncode, twice.stderr) == (2, "error: two runs of a with seed 1: leave one out\n")
    make_run(tmp_path / "b", seed=2)
    alone = run_report(tmp_path / "out", tmp_path / "b", "--output", tmp_path / "new")
    assert alone.returncode == 2 and "b is not of a suite" in alone.stderr and alone.stderr.count("\n") == 1
    curves = tmp_path / "out" / "curves.csv"
    curves.write_text(curves.read_text() + "Task-v0,b,1,50,3\n")
    foreign = run_report(tmp_path / "out", "--output", tmp_path / "new")
    assert foreign.returncode == 2 and "hold different runs" in foreign.stderr
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_the_old_report_whole(tmp_path):
    """Every file but the picture fits, which is written first or last."""
    make_run(tmp_path / "runs" / "a__Task-v0__1" / "run")
    run_report(tmp_path / "runs", "--output", tmp_path / "out")
    old = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    make_run(tmp_path / "runs" / "a__Task-v0__2" / "run", seed=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        done = run_report(tmp_path / "runs", "--output", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 2 and "cannot write" in done.stderr and done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == old
    assert run_report(tmp_path / "runs", "--output", tmp_path / "out").returncode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(old)


# --- pictures


def test_a_method_has_one_colour_everywhere_and_two_are_told_apart():
    methods = {"bpo": "bpo_x", "GBPO (0.2, 1 epoch)": "gbpo_llm", "ppo": "ppo_x", "GRPO (0.2, 1 epoch)": "grpo_llm"}
    methods |= {"spo": "ppo_x", "DR GRPO (0.2, 1 epoch)": "grpo_llm", "lambda=1": "bpo_x", "bpo-released": "bpo_x"}
    colours = [report.looks_of({x: report.method(x, script)})[x][0] for x, script in methods.items()]
    bpo, gbpo, ppo, grpo, spo, dr, *variants = colours
    assert bpo == gbpo and ppo == grpo and set(variants) == {bpo} and len({bpo, ppo, spo, dr}) == 4
    for one, other in itertools.combinations({*report.COLOURS.values()}, 2):
        assert np.linalg.norm(np.subtract(to_rgb(one), to_rgb(other))) > 0.35
    assert len({tuple(report.line(bpo, place).values()) for place in range(report.MANY)}) == report.MANY


@pytest.mark.parametrize("groups", [2, report.MANY, report.MANY + 1])
def test_many_groups_have_a_row_each_and_no_band(groups, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure: drawn.append(figure) or b"")
    for k, seed in itertools.product(range(groups), range(report.FEW + 1)):
        make_run(tmp_path / f"v{k}__Task-v0__{seed}" / "run", seed=seed)
    assert run_report(tmp_path, "--output", tmp_path / "out").returncode == 0
    (axis,) = drawn[0].axes
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert len(axis.collections) == (groups if groups <= report.MANY else 0)
    assert (set(labels) == {f"v{k}" for k in range(groups)}) == (groups > report.MANY)
    assert axis.get_xlabel() and (axis.get_ylabel() or groups > report.MANY)


def test_references_are_dashed_and_neither_shorten_ours_nor_are_cut(tmp_path, monkeypatch):
    """Five groups, three of them ours: TRPO is as long as ours and SAC ends at half of it, after four hours."""
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure: drawn.append(figure) or b"")
    for variant, script, end, value in (
        ("bpo", "bpo_x", 1_000_000, 20),
        ("ppo", "ppo_x", 1_000_000, 10),
        ("spo", "ppo_x", 1_000_000, 10),
        ("sac", "reference", 500_000, 40),
        ("trpo", "reference", 1_000_000, 30),
    ):
        for seed in (1, 2) if variant != "sac" else (1,):
            args = dict(env_id="Hopper-v4", seed=seed, total_timesteps=end)
            args |= dict(algo=variant) if script == "reference" else dict(lr_schedule="linear")
            folder = make_run(tmp_path / f"{variant}__Hopper-v4__{seed}" / "run", script, f"5,{value},5\n", **args)
            rows = f"step,charts/SPS\n{end},{end / (14_400 if variant == 'sac' else 3600)}\n"
            (folder / "metrics.csv").write_text(rows)
    done = run_report(tmp_path, "--output", tmp_path / "out", interval=250_000)
    assert (done.returncode, done.stderr) == (0, "")
    table = cells(done.stdout.split("\n\n")[0])
    assert [table["Hopper-v4", x][1] for x in ("bpo", "trpo", "sac")] == ["1000000", "1000000", "500000"]
    assert [float(table["Hopper-v4", x][-2]) for x in ("bpo", "trpo", "sac")] == [1, 1, 4]  # hours
    against = cells(done.stdout.split("\n\n")[1])
    assert ("Hopper-v4", "trpo") in against and ("Hopper-v4", "sac") not in against
    assert "| Hopper-v4 | bpo | 1000000 | 20.0 | 2726 | 3505.1 |" in done.stdout
    assert "| Hopper-v3 | trpo | 1000000 | 3618 | RL-Zoo |" in done.stdout and "Ant-v3" not in done.stdout
    steps, hours = ({x.get_label(): x for x in figure.axes[0].lines if x.get_label()[0] != "_"} for figure in drawn)
    styles = {x: line.get_linestyle() for x, line in steps.items()}
    assert styles == {"bpo": "-", "ppo": "-", "spo": "-", "sac": "--", "trpo": "--"}
    assert {x: line.get_xdata()[-1] for x, line in hours.items()} == {"bpo": 1, "ppo": 1, "spo": 1, "sac": 4, "trpo": 1}
    again = run_report(tmp_path / "out", "--output", tmp_path / "again")
    assert again.stdout == done.stdout


# --- legged robots


def test_robots_have_every_panel(tmp_path):
    runs = [
        make_robot_run(tmp_path / "a", "bpo_locomotion", 2, [3, 5, 7, 9]),
        make_robot_run(tmp_path / "b", "bpo_locomotion", 1, [1, 1, 1]),
        make_robot_run(tmp_path / "c", "ppo_locomotion", 1, [2, 2, 2, 2]),
    ]
    done = run_report(*runs, "--output", tmp_path / "out", interval=100)
    assert done.returncode == 0, done.stderr
    curves = pd.read_csv(tmp_path / "out" / "curves.csv")
    assert (curves["charts/learning_rate"] == 1 + curves["charts/mean_return_100"]).all()
    found = curves.groupby(["group", "seed"])["charts/mean_return_100"].agg(list).to_dict()
    assert found == {("BPO", 1): [1, 1, 1], ("BPO", 2): [3, 5, 7, 9], ("PPO", 1): [2, 2, 2, 2]}
    assert "| Go1-v1 | BPO | 2 | 300 | 4.0 (1.0 to 7.0) |" in done.stdout  # where the shortest ends


def test_points_of_robots_are_means_of_the_iterations_around_them(tmp_path):
    run = make_robot_run(tmp_path / "a", "bpo_locomotion", 1, range(8), ent_coef=0.1)
    other = make_robot_run(tmp_path / "b", "bpo_locomotion", 1, range(8), ent_coef=0.2)
    assert run_report(run, other, "--output", tmp_path / "out", interval=200).returncode == 0
    curves = pd.read_csv(tmp_path / "out" / "curves.csv")
    assert curves["group"].unique().tolist() == ["BPO ent_coef=0.1", "BPO ent_coef=0.2"]
    # the points are at 200, 400, 600 and 800, the iterations at 100, 200, ...
    assert curves["charts/mean_return_100"].tolist()[:4] == [0.5, 2.5, 4.5, 6.5]


# --- language models


def test_language_models_have_means_intervals_and_largest_ratios(tmp_path):
    runs = [make_llm_run(tmp_path / f"a{s}", "gbpo_llm", s, 0.6 + 0.1 * s, 12.0 + s) for s in (1, 2)]
    runs += [make_llm_run(tmp_path / "b", "grpo_llm", 1, 0.4, 9.0, objective="dr_grpo")]
    (tmp_path / "unfinished").mkdir()
    done = run_report(*runs, tmp_path / "unfinished", "--output", tmp_path / "out")
    assert done.returncode == 0 and "skipped" in done.stderr
    assert "seed by seed" not in done.stdout  # one seed in common
    ours = "| 2 | 20 | 0.750 (0.700 to 0.800) | 0.750 (0.700 to 0.800) | 0.500 | 0.750 | 13.50 (13.00 to 14.00) |"
    assert f"| addition | GBPO (0.5, 10 epochs) {ours} 25.0% | 0.700, 0.800 |" in done.stdout
    assert "| 1 | 20 | 0.400 | 0.400 | 0.500 | 0.500 | 11.50 | 25.0% | 0.400 |" in done.stdout
    rows = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    assert rows[0] == "task,group,seed,step,pass@1,ratio_max,out_of_bounds" and len(rows) == 7
    assert 'addition,"GBPO (0.5, 10 epochs)",2,20,0.8,14,0.5' in rows
    again = run_report(tmp_path / "out", "--output", tmp_path / "again")
    assert again.stdout == done.stdout, "the largest ratio is kept"


def test_models_of_one_setting_are_compared_seed_by_seed(tmp_path):
    """GBPO is 0.1, 0.2 and 0.3 ahead where seeds meet: t(0.975, 2) * 0.1 / sqrt(3) = 0.248 on either side of 0.2.

    Over the exact baseline it is so, too; one seed of other objectives is compared with nothing, and drawn.
    """
    runs = [make_llm_run(tmp_path / f"a{s}", "gbpo_llm", s, 0.4 + 0.1 * s, 2.0) for s in (1, 2, 3, 4)]
    exact = [make_llm_run(tmp_path / f"e{s}", "gbpo_llm", s, 0.4 + 0.1 * s, 2.0, baseline="exact") for s in (1, 2, 3)]
    runs += [make_llm_run(tmp_path / f"b{s}", "grpo_llm", s, 0.4, 2.0, objective="gspo") for s in (3, 1, 2)]
    runs += [make_llm_run(tmp_path / f"c{s}", "grpo_llm", s, 0.4, 2.0, objective="gspo", clip_coef=0.2) for s in (1, 2)]
    done = run_report(*runs, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    compared = [line for line in done.stdout.splitlines() if " less " in line]
    name = "GBPO (0.5, 10 epochs) less GSPO (0.5, 10 epochs)"
    assert compared == [f"| {name} | 3 | 0.200 (-0.048 to 0.448) | 0.10, 0.20, 0.30 |"]
    objectives = "grpo", "dapo", "sapo"
    runs += [make_llm_run(tmp_path / x, "grpo_llm", 9, 0.5, 2.0, objective=x) for x in objectives] + exact
    done = run_report(*runs, "--output", tmp_path / "out")
    compared = [line.split(" | ")[0] for line in done.stdout.splitlines() if " less " in line]
    exactly = name.replace("GBPO", "GBPO EXACT", 1)
    assert compared == [f"| {name.replace('GSPO', 'GBPO EXACT')}", f"| {name}", f"| {exactly}"]


def test_votes_are_drawn_in_a_row_for_each_setting(tmp_path, monkeypatch):
    """Labels by majority, exact baselines, two learning rates: a point per iteration, a colour or a dash per method."""
    drawn, save = [], report.save
    monkeypatch.setattr(report, "save", lambda figure: drawn.append(figure) or save(figure))
    monkeypatch.setattr(report.plt, "close", lambda figure: None)
    for rate, (name, script, own) in itertools.product(
        (1e-4, 1e-3),
        [("a", "gbpo_llm", {}), ("b", "gbpo_llm", {"baseline": "exact"}), ("c", "grpo_llm", {"objective": "grpo"})],
    ):
        run = make_llm_run(tmp_path / f"{name}{rate}", script, 1, 0.6, 2.0, learning_rate=rate, **own)
        columns = "step,ttrl/ground_truth_ratio,ttrl/label_accuracy,ratio/max,ratio/out_of_bounds\n"
        (run / "metrics.csv").write_text(columns + f"10,0.4,0.5,1.5,0\n20,{rate},0.75,2.5,0.1\n")
    done = run_report(tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "| addition | GBPO EXACT (0.5, 10 epochs, 0.0001) | 1 | 20 | 0.000 |" in done.stdout
    rows = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    assert rows[0] == "task,group,seed,step,ground_truth_ratio,label_accuracy,ratio_max" and len(rows) == 13
    axes = drawn[0].axes
    titles = [f"addition (0.5, 10 epochs, {rate})" for rate in (0.0001, 0.001)]
    assert [axis.get_title() for axis in axes] == [titles[0], "", "", titles[1], "", ""]
    for axis, end in ((axes[0], 1e-4), (axes[3], 1e-3)):
        lines = {x.get_label(): x for x in axis.lines if x.get_label()[0] != "_"}
        assert list(lines) == ["GBPO", "GBPO EXACT", "GRPO"]
        assert all(x.get_xydata().tolist() == [[10, 0.4], [20, end]] for x in lines.values())
        assert len({(x.get_color(), x.get_linestyle()) for x in lines.values()}) == 3
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000


def test_models_with_other_settings_are_not_pooled(tmp_path):
    runs = [make_llm_run(tmp_path / "a", "gbpo_llm", 1, 0.6, 2.0, group_size=8)]
    runs += [make_llm_run(tmp_path / "b", "gbpo_llm", 2, 0.6, 2.0, group_size=4)]
    done = run_report(*runs, "--output", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists() and done.stderr.count("\n") == 1
    assert "b has other settings than other runs: group_size" in done.stderr


# --- over tasks


def test_aggregate_normalises_by_published_scores(tmp_path):
    """Scores of a: 1, 2, 3, 4 on Hopper and 0, 1, 2, 9 on Ant, whose middle half is 1, 2, 2, 3; of b: 2 throughout.

    A reference is not the baseline, and takes no part if it is shorter.
    """
    for task, scale, scores in (("Hopper-v4", 2609, [1, 2, 3, 4]), ("Ant-v4", 3258, [0, 1, 2, 9])):
        for seed, score in enumerate(scores, 1):
            for group, script, value in (("a", "bpo_x", score), ("b", "ppo_x", 2)):
                folder = tmp_path / f"{group}__{task}__{seed}" / "run"
                make_run(folder, script, f"5,{value * scale},5\n", env_id=task, seed=seed)
        make_run(tmp_path / f"a-ppo__{task}__1" / "run", "reference", env_id=task, algo="ppo", total_timesteps=51)
    make_run(tmp_path / "a__Other-v0__1" / "run")
    done = run_report(tmp_path, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split(" | ")[0]: line for line in done.stdout.splitlines() if "Ant-v4, Hopper-v4" in line}
    assert rows.keys() == {"| a", "| b"} and "less that of b" in done.stdout
    assert rows["| a"].startswith("| a | 4 | Ant-v4, Hopper-v4 | 2.750 | 2.000 (")
    assert " | 0.50 (" in rows["| a"]  # Hopper: 2.5 of 4, Ant: 1.5 of 4
    assert rows["| b"] == "| b | 4 | Ant-v4, Hopper-v4 | 2.000 | 2.000 (2.000 to 2.000) | - |"
    assert report.plt.imread(tmp_path / "out" / "curves.png").shape[0] > 600  # pixels: the three tasks fill one line
    done = run_report(*tmp_path.glob("?__*-v4__1"), "--output", tmp_path / "of one seed")
    assert "| a | 1 | Ant-v4, Hopper-v4 | 0.500 | 0.500 | 0.00 |" in done.stdout  # one run has no interval
