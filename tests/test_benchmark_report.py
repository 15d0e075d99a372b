"""benchmark/report.py on run folders written by hand: figures, skipped runs, bad input."""

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import submitit  # noqa: F401  configures logging, which would close the stream that rliable's absl takes hold of
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import report  # noqa: E402

METRICS = """step,ratio/out_of_bounds,losses/kl,theory/improvement_bound,time/rollout,time/update
50,0.1,0.01,-1,1,0.5
100,0.3,0.02,1,2,1.5
"""


def make_run(folder, script="bpo_continuous_action", rows="", **args):
    folder.mkdir(parents=True)
    settings = {"seed": 1, "env_id": "Task-v0", "total_timesteps": 100, "clip_coef": 0.3, **args}
    (folder / "args.json").write_text(json.dumps({"script": script, "args": settings, "commit": "abc"}))
    (folder / "episodes.csv").write_text("step,return,length\n" + (rows or "10,1,10\n60,3,50\n100,8,40\n"))
    (folder / "metrics.csv").write_text(METRICS)
    result = {"mean": 7.0, "std": 0.5, "returns": [6.5, 7.5]}
    (folder / "evaluation.json").write_text(json.dumps({"deterministic": result, "stochastic": result}))
    (folder / "agent.pt").touch()
    return folder


def run_report(*arguments):
    """What the command prints, and its exit status; in this process, as imports take longer than all else."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    few_draws = patch.object(report, "DRAWS", 100)
    with few_draws, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            report.main(tyro.cli(report.Args, args=["--interval", "50", *map(str, arguments)]))
        except SystemExit as end:
            status = end.code
    return SimpleNamespace(returncode=status, stdout=output.getvalue(), stderr=errors.getvalue())


def test_curve_is_the_mean_of_the_last_hundred_episodes():
    rng = np.random.default_rng(0)
    steps, returns = np.cumsum(rng.integers(1, 30, 500)), rng.normal(size=500)
    grid = np.arange(0, steps[-1] + 50, 37)
    for step, value in zip(grid, report.curve(steps, returns, grid)):
        ended = returns[steps <= step][-100:]
        assert np.isnan(value) if len(ended) == 0 else value == pytest.approx(ended.mean())


def test_a_group_has_one_colour_on_all_tasks(tmp_path, monkeypatch):
    """Also where another group is missing."""
    draw, lines = report.draw_curves, {}

    def record(axis, *rest):
        draw(axis, *rest)
        for line in axis.get_lines():
            lines.setdefault(line.get_label().split()[0], []).append(line.get_color())

    monkeypatch.setattr(report, "draw_curves", record)
    for task, groups in (("Ant-v4", "ac"), ("Hopper-v4", "abc")):
        for group in groups:
            make_run(tmp_path / "runs" / f"{group}__{task}__1" / "run", env_id=task)
    assert run_report(tmp_path / "runs", "--output", tmp_path / "out").returncode == 0
    assert {label: len(set(x)) for label, x in lines.items()} == {"a": 1, "b": 1, "c": 1} and len(lines["c"]) == 2


def test_interval_of_the_mean_covers_it_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    low, high = report.interval_of_mean(rng.normal(size=(40, 300)), rng)
    assert 0.88 < ((low < 0) & (high > 0)).mean() < 0.98


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    returns = np.random.default_rng(2).normal(size=12) ** 3
    point, low, high = report.interquartile_mean(returns)
    assert point == pytest.approx(np.sort(returns)[3:9].mean())
    assert low < point < high and returns.min() < low and high < returns.max()


def test_probability_of_improvement_counts_pairs():
    rng = np.random.default_rng(3)
    ours, theirs = rng.integers(0, 6, (9, 2)).astype(float), rng.integers(0, 5, (7, 2)).astype(float)
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for k in range(2) for x in ours[:, k] for y in theirs[:, k]]
    point, low, high = report.probability_of_improvement(ours, theirs)
    assert point == pytest.approx(np.mean(pairs))
    assert 0 <= low < point < high <= 1


def test_difference_of_means_has_the_normal_interval():
    rng = np.random.default_rng(4)
    ours, theirs = rng.normal(3, 1, 400), rng.normal(1, 2, 300)
    point, low, high = report.difference_of_means(ours, theirs, rng)
    assert point == pytest.approx(ours.mean() - theirs.mean())
    half = 1.96 * np.sqrt(ours.var() / 400 + theirs.var() / 300)
    assert (point - low, high - point) == (pytest.approx(half, rel=0.15), pytest.approx(half, rel=0.15))


def test_report_of_a_suite_compares_its_variants(tmp_path):
    """Two tasks, one of the paper's; unequal numbers of seeds; groups named by the suite's variants."""
    ends = {("mine", "Hopper-v4"): [30, 50, 70], ("base", "Hopper-v4"): [20, 40], ("mine", "B/c-v0"): [300, 100]}
    ends["base", "B/c-v0"] = [200, 200, 200, 200]
    for (variant, task), returns in ends.items():
        for seed, value in enumerate(returns, 1):
            script = {"mine": "bpo_x", "base": "ppo_x"}[variant]
            name = f"{variant}__{task.replace('/', '-')}__{seed}"
            args = dict(env_id=task, seed=seed, total_timesteps=1_000_000)
            make_run(tmp_path / "suite" / name / f"run{seed}", script, f"5,{value},5\n", **args)
    done = run_report(tmp_path / "suite", "--output", tmp_path / "out", "--interval", "500000")
    assert (done.returncode, done.stderr) == (0, "")
    table = (tmp_path / "out" / "table.md").read_text()
    assert table == done.stdout
    assert "| Hopper-v4 | mine | 3 | 1000000 | 50.0 | 30.0 to 70.0 | 50.0 |" in table
    assert "| Hopper-v4 | mine | 20.0 | " in table and "| 0.83 | " in table  # better in 5 of 6 pairs
    assert "| B/c-v0 | mine | 0 | " in table and "| 0.50 | " in table
    assert "| all, first 2 and 2 runs of each | mine | - | - | 0.62 | " in table  # (3 of 4 pairs + half of 4) / 2
    assert "| Hopper-v4 | mine | 1000000 | 50.0 | 2726 | 3505.1 |" in table
    assert "| Hopper-v4 | base | 1000000 | 30.0 | 853 | 2497.7 |" in table
    assert table.endswith("Commits: abc (11 runs).\n")
    curves = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    assert curves[1] == "B/c-v0,base,1,500000,200" and len(curves) == 1 + 2 * 11
    chosen = run_report(tmp_path / "suite", "--baseline", "mine", "--output", tmp_path / "out")
    assert "| Hopper-v4 | base | -20.0 | " in chosen.stdout
    unknown = run_report(tmp_path / "suite", "--baseline", "theirs", "--output", tmp_path / "new")
    assert (unknown.returncode, unknown.stderr) == (2, "error: no group theirs: there are base, mine\n")
    assert not (tmp_path / "new").exists()


def test_many_groups_are_drawn_beside_each_other(tmp_path):
    for k in range(7):
        make_run(tmp_path / f"v{k}__Task-v0__1" / "run")
    assert run_report(tmp_path, "--output", tmp_path / "out").returncode == 0
    assert {x.name for x in (tmp_path / "out").iterdir()} == {
        "curves.csv",
        "summary.csv",
        "settings.json",
        "table.md",
        "groups.png",
    }


def test_an_earlier_report_and_new_runs_make_the_report_of_all(tmp_path):
    """Also where the new runs are shorter or longer than the earlier ones, and the groups differ."""
    rng = np.random.default_rng(5)
    lengths = {1: 100, 2: 300, 3: 200}
    for variant, seed in ((v, s) for v in ("mine", "base", "late") for s in lengths if (v, s) != ("late", 1)):
        script, value = f"{'ppo' if variant == 'base' else 'bpo'}_x", 1000 * rng.normal()
        folder = tmp_path / ("old" if seed == 1 else "new") / f"{variant}__Task-v0__{seed}"
        make_run(folder / "run", script, f"5,{value},5\n70,{value / 3},5\n", seed=seed, total_timesteps=lengths[seed])
    run_report(tmp_path / "old", "--output", tmp_path / "first")
    together = run_report(tmp_path / "first", tmp_path / "new", "--output", tmp_path / "both")
    at_once = run_report(tmp_path / "old", tmp_path / "new", "--output", tmp_path / "all")
    assert (together.returncode, together.stderr, together.stdout) == (0, "", at_once.stdout)
    assert "| Task-v0 | mine | 3 | 100 |" in together.stdout and "| Task-v0 | late | 2 |" in together.stdout
    for name in ("curves.csv", "summary.csv"):
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
    run_report(tmp_path, "--output", tmp_path / "out")
    twice = run_report(tmp_path / "out", tmp_path / "a__Task-v0__1", "--output", tmp_path / "new")
    assert (twice.returncode, twice.stderr) == (2, "error: two runs of a with seed 1: leave one out\n")
    other = run_report(tmp_path / "out", "--interval", "20", "--output", tmp_path / "new")
    assert other.returncode == 2 and "not 20 steps apart" in other.stderr
    beside = run_report(tmp_path / "out", tmp_path / "a__Task-v0__1", "--interval", "20", "--output", tmp_path / "out")
    assert beside.returncode == 2 and "not 20 steps apart" in beside.stderr  # not overwritten by the new run alone
    curves = tmp_path / "out" / "curves.csv"
    curves.write_text(curves.read_text() + "Task-v0,b,1,50,3\n")
    foreign = run_report(tmp_path / "out", "--output", tmp_path / "new")
    assert foreign.returncode == 2 and "hold different runs" in foreign.stderr
    assert not (tmp_path / "new").exists()


def test_runs_whose_other_settings_are_unknown_cannot_be_added_to_a_report(tmp_path):
    make_run(tmp_path / "old")
    make_run(tmp_path / "new", seed=2, clip_coef=0.9)
    run_report(tmp_path / "old", "--output", tmp_path / "out")
    done = run_report(tmp_path / "out", tmp_path / "new", "--output", tmp_path / "both")
    assert done.returncode == 2 and "new is not of a suite" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "both").exists()


def test_runs_of_one_variant_with_other_settings_are_not_pooled(tmp_path):
    """As where two suites have a variant of the same name. What does not change learning may differ."""
    make_run(tmp_path / "one" / "bpo__Task-v0__1" / "run", device="cpu", gamma=0.9)
    make_run(tmp_path / "two" / "bpo__Task-v0__2" / "run", seed=2, device="cuda", eval_episodes=3)  # older: no gamma
    assert run_report(tmp_path, "--output", tmp_path / "out").returncode == 0
    make_run(tmp_path / "three" / "bpo__Task-v0__3" / "run", seed=3, clip_coef=0.9)
    done = run_report(tmp_path / "one", tmp_path / "two", tmp_path / "three", "--output", tmp_path / "new")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "new").exists()
    assert "run has other settings than other runs: clip_coef; make" in done.stderr
    run_report(tmp_path / "one", tmp_path / "two", "--output", tmp_path / "first")
    done = run_report(tmp_path / "first", tmp_path / "three", "--output", tmp_path / "new")
    assert done.returncode == 2 and "other runs: clip_coef; make" in done.stderr and not (tmp_path / "new").exists()
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


def test_a_run_without_an_episode_where_the_shortest_ends_is_named(tmp_path):
    make_run(tmp_path / "bpo__Task-v0__1" / "run")
    make_run(tmp_path / "ppo__Task-v0__7" / "run", "ppo_x", "150,5,150\n", seed=7, total_timesteps=200)
    done = run_report(tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists() and done.stderr.count("\n") == 1
    assert "no episode had ended by step 100 in ppo 7" in done.stderr


def test_runs_of_uncommitted_code_are_marked(tmp_path):
    run = make_run(tmp_path / "a")
    about = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(about | {"commit": "0123456789abcdef-dirty"}))
    assert "Commits: 0123456789ab-dirty (1 runs)." in run_report(run, "--output", tmp_path / "out").stdout


def test_published_figures_are_complete():
    published = report.read_published()
    assert len(published) == 8 * 2 * 5 and all(float(x) > 0 for x in published.values())
    assert published["Ant-v4", "bpo", "end"] == "4871.4" and published["Swimmer-v4", "ppo", "1000000"] == "298"


def test_a_game_has_the_papers_figures_under_both_of_its_names(tmp_path):
    for name in ("Breakout-v5", "BreakoutNoFrameskip-v4"):
        make_run(tmp_path / f"mine__{name}__1" / "run", "bpo_x", "5,3,5\n", env_id=name, total_timesteps=1_000_000)
    done = run_report(tmp_path, "--output", tmp_path / "out", "--interval", "500000")
    found = [line.split(" | ")[4] for line in done.stdout.splitlines() if line.startswith("| Breakout")][-2:]
    assert found == ["24", "24"]


def test_report_groups_runs_and_skips_what_it_cannot_read(tmp_path):
    make_run(tmp_path / "a", seed=2, rows="10,5,10\n100,7,90\n")
    make_run(tmp_path / "b", seed=1)
    make_run(tmp_path / "c", clip_coef=0.5)
    make_run(tmp_path / "half", seed=3, rows="10,5,10\n100,7")
    make_run(tmp_path / "nan", seed=4, rows="10,nan,10\n")
    make_run(tmp_path / "short", seed=6, total_timesteps=49)
    make_run(tmp_path / "late", seed=7, rows="101,5,101\n")
    (make_run(tmp_path / "unfinished", seed=5) / "agent.pt").unlink()
    for name, text in (("no column", "step\n50\n"), ("empty", "")):
        (make_run(tmp_path / name, seed=8) / "metrics.csv").write_text(text)
    done = run_report(*sorted(x for x in tmp_path.iterdir()), tmp_path / "missing", "--output", tmp_path / "out")
    assert done.returncode == 0
    skipped = [line for line in done.stderr.splitlines() if line.startswith("skipped")]
    names = ("half", "nan", "unfinished", "missing", "short", "late", "no column: it has no 'ratio", "empty")
    assert [sum(f"/{name}" in line for line in skipped) for name in names] == [1] * 8
    rows = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    assert rows[1:5] == [
        "Task-v0,BPO clip_coef=0.3,1,50,1",
        "Task-v0,BPO clip_coef=0.3,1,100,4",
        "Task-v0,BPO clip_coef=0.3,2,50,5",
        "Task-v0,BPO clip_coef=0.3,2,100,6",
    ]
    assert "| Task-v0 | BPO clip_coef=0.3 | 2 | 100 | 5.0 |" in (tmp_path / "out" / "table.md").read_text()
    summary = (tmp_path / "out" / "summary.csv").read_text().splitlines()
    assert summary[1] == "Task-v0,BPO clip_coef=0.3,1,bpo_continuous_action,abc,0.2,0.015,0.5,7,0.5,7,0.5,5"
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line_and_creates_nothing(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    (tmp_path / "file").touch()
    for words in (
        [tmp_path / "a", tmp_path / "b"],
        [],
        [tmp_path / "a", "--interval", 0],
        [tmp_path / "a", "--output", tmp_path / "file"],
    ):
        done = run_report("--output", tmp_path / "out", *words)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert not (tmp_path / "out").exists()
