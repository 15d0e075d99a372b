"""benchmark/report.py on run folders written by hand: figures, skipped runs, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import report  # noqa: E402

METRICS = """step,ratio/out_of_bounds,losses/kl,theory/improvement_bound,charts/SPS
50,0.1,0.01,-1,10
100,0.3,0.02,1,20
"""


def make_run(folder, script="bpo_continuous_action", rows="", **args):
    folder.mkdir(parents=True)
    settings = {"seed": 1, "env_id": "Task-v0", "total_timesteps": 100, "clip_coef": 0.3, **args}
    (folder / "args.json").write_text(json.dumps({"script": script, "args": settings}))
    (folder / "episodes.csv").write_text("step,return,length\n" + (rows or "10,1,10\n60,3,50\n100,8,40\n"))
    (folder / "metrics.csv").write_text(METRICS)
    result = {"mean": 7.0, "std": 0.5, "returns": [6.5, 7.5]}
    (folder / "evaluation.json").write_text(json.dumps({"deterministic": result, "stochastic": result}))
    (folder / "agent.pt").touch()
    return folder


def run_report(*arguments):
    command = [sys.executable, str(ROOT / "benchmark" / "report.py"), *map(str, arguments), "--interval", "50"]
    return subprocess.run(command, capture_output=True, text=True)


def test_curve_is_the_mean_of_the_last_hundred_episodes():
    rng = np.random.default_rng(0)
    steps, returns = np.cumsum(rng.integers(1, 30, 500)), rng.normal(size=500)
    grid = np.arange(0, steps[-1] + 50, 37)
    for step, value in zip(grid, report.curve(steps, returns, grid)):
        ended = returns[steps <= step][-100:]
        assert np.isnan(value) if len(ended) == 0 else value == pytest.approx(ended.mean())


def test_interval_of_the_mean_covers_it_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    low, high = report.interval_of_mean(rng.normal(size=(40, 300)), rng)
    assert 0.88 < ((low < 0) & (high > 0)).mean() < 0.98


def test_report_groups_runs_and_skips_what_it_cannot_read(tmp_path):
    make_run(tmp_path / "a", seed=2, rows="10,5,10\n100,7,90\n")
    make_run(tmp_path / "b", seed=1)
    make_run(tmp_path / "c", clip_coef=0.5)
    make_run(tmp_path / "half", seed=3, rows="10,5,10\n100,7")
    make_run(tmp_path / "nan", seed=4, rows="10,nan,10\n")
    (make_run(tmp_path / "unfinished", seed=5) / "agent.pt").unlink()
    done = run_report(*sorted(x for x in tmp_path.iterdir()), tmp_path / "missing", "--output", tmp_path / "out")
    assert done.returncode == 0
    skipped = [line for line in done.stderr.splitlines() if line.startswith("skipped")]
    assert [any(name in line for line in skipped) for name in ("half", "nan", "unfinished", "missing")] == [True] * 4
    rows = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    assert rows[1:5] == [
        "Task-v0,BPO clip_coef=0.3,1,50,1.0",
        "Task-v0,BPO clip_coef=0.3,1,100,4.0",
        "Task-v0,BPO clip_coef=0.3,2,50,5.0",
        "Task-v0,BPO clip_coef=0.3,2,100,6.0",
    ]
    assert "| Task-v0 | BPO clip_coef=0.3 | 2 | 100 | 5 |" in (tmp_path / "out" / "table.md").read_text()
    summary = (tmp_path / "out" / "summary.csv").read_text().splitlines()
    assert summary[1] == "Task-v0,BPO clip_coef=0.3,1,0.2,0.015,0.5,7,0.5,7,0.5,5"
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line_and_creates_nothing(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    for folders in ([tmp_path / "a", tmp_path / "b"], []):
        done = run_report(*folders, "--output", tmp_path / "out")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert not (tmp_path / "out").exists()
