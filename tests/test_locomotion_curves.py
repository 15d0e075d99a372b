"""benchmark/locomotion_curves.py on run folders written by hand."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmark" / "locomotion_curves.py"


def write_run(folder, script, seed, returns, task="Go1JoystickRoughTerrain-v1", evaluation=None, **settings):
    """A run of one row per 100 steps, whose rates of learning are 1 + the return."""
    folder.mkdir()
    about = {"script": script, "commit": f"{seed}abcdef0123", "args": {"env_id": task, "seed": seed, **settings}}
    (folder / "args.json").write_text(json.dumps(about))
    rows = [f"{100 * (i + 1)},{x},{1 + x}" for i, x in enumerate(returns)]
    header = "step,charts/mean_return_100,charts/learning_rate"
    (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    if evaluation:
        result = {"mean": evaluation, "std": 0.5}
        (folder / "evaluation.json").write_text(json.dumps({"deterministic": result, "stochastic": result}))
    return folder


def draw(*words):
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)


def test_curves_and_table_have_every_run(tmp_path):
    runs = [
        write_run(tmp_path / "a", "bpo_locomotion", 2, [3, 5, 7, 9], evaluation=8.25),
        write_run(tmp_path / "b", "bpo_locomotion", 1, [1, 1, 1]),  # unfinished
        write_run(tmp_path / "c", "ppo_locomotion", 1, [2, 2, 2, 2]),
    ]
    with (runs[1] / "metrics.csv").open("a") as file:
        file.write("400,9")  # half written
    done = draw(*runs, "--output", tmp_path / "out", "--points", 4)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "curves.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["script", "seed", "step", "charts/mean_return_100", "charts/learning_rate"]
    found = {}
    for program, seed, _, value, rate in rows:
        assert float(rate) == 1 + float(value)
        found.setdefault((program, seed), []).append(float(value))
    assert found == {
        ("bpo_locomotion", "1"): [1, 1, 1],
        ("bpo_locomotion", "2"): [3, 5, 7, 9],
        ("ppo_locomotion", "1"): [2, 2, 2, 2],
    }
    assert (tmp_path / "out" / "curves.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "out" / "table.md").read_text().splitlines()[2:] == [
        "| `bpo_locomotion` | 1 | 300 | 1.0 | - | - | `1abcdef` |",
        "| `bpo_locomotion` | 2 | 400 | 9.0 | 8.2 +- 0.5 | 8.2 +- 0.5 | `2abcdef` |",
        "| `ppo_locomotion` | 1 | 400 | 2.0 | - | - | `1abcdef` |",
    ]


def test_few_iterations_make_few_points_without_gaps(tmp_path):
    run = write_run(tmp_path / "a", "bpo_locomotion", 1, range(81))
    about = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(about | {"commit": "1abcdef0123-dirty"}))
    assert draw(run, "--output", tmp_path / "out").returncode == 0
    with (tmp_path / "out" / "curves.csv").open() as file:
        returns = [float(x["charts/mean_return_100"]) for x in csv.DictReader(file)]
    assert returns == list(range(81))
    assert "| `1abcdef-dirty` |" in (tmp_path / "out" / "table.md").read_text()


def test_runs_of_one_script_with_other_settings_are_groups_of_their_own(tmp_path):
    runs = [
        write_run(tmp_path / "a", "bpo_locomotion", 1, [4, 4], ent_coef=0.01, hidden_sizes=[8, 8], compile=True),
        write_run(tmp_path / "b", "bpo_locomotion", 2, [2, 2], ent_coef=0.003, hidden_sizes=[8, 8], compile=False),
        write_run(tmp_path / "c", "bpo_locomotion", 1, [1, 1], ent_coef=0.003, hidden_sizes=[8], compile=True),
        write_run(tmp_path / "d", "ppo_locomotion", 1, [3, 3], ent_coef=0.01, hidden_sizes=[8, 8], compile=True),
    ]
    done = draw(*runs, "--output", tmp_path / "out", "--points", 1)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "curves.csv").open() as file:
        found = {(x["script"], x["seed"]): float(x["charts/mean_return_100"]) for x in csv.DictReader(file)}
    assert found == {
        ("bpo_locomotion ent_coef=0.003 hidden_sizes=[8 8]", "2"): 2,
        ("bpo_locomotion ent_coef=0.003 hidden_sizes=[8]", "1"): 1,
        ("bpo_locomotion ent_coef=0.01 hidden_sizes=[8 8]", "1"): 4,
        ("ppo_locomotion", "1"): 3,
    }
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| `bpo_locomotion ent_coef=0.003 hidden_sizes=[8]` | 1 | 200 |" in table


@pytest.mark.parametrize("fault", ["task", "missing", "damaged"])
def test_unusable_runs_are_one_line(fault, tmp_path):
    first = write_run(tmp_path / "a", "bpo_locomotion", 1, [1, 2])
    second = write_run(tmp_path / "b", "ppo_locomotion", 1, [1, 2], task="Ant-v4" if fault == "task" else None)
    if fault == "missing":
        (second / "metrics.csv").unlink()
    if fault == "damaged":
        (second / "metrics.csv").write_text("step,charts/mean_return_100\n100,1\n200,x\n")
    done = draw(first, second, "--output", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert ("one task" if fault == "task" else str(second)) in done.stderr
