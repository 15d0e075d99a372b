"""benchmark/report_llm.py on made-up runs with known figures."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmark" / "report_llm.py"


def make_run(folder, script, seed, accuracy, ratio, **own):
    folder.mkdir(parents=True)
    args = {"seed": seed, "clip_coef": 0.5, "update_epochs": 10, **own}
    (folder / "args.json").write_text(json.dumps({"script": script, "args": args}))
    (folder / "evaluations.csv").write_text(f"step,pass@1\n0,0.5\n20,{accuracy}\n")
    rows = f"10,1.5,0.0\n20,{ratio},0.5\n"
    (folder / "metrics.csv").write_text("step,ratio/max,ratio/out_of_bounds\n" + rows)
    (folder / "evaluation.json").write_text("{}")
    return str(folder)


def cells(output):
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("| ")]
    return {name: others for name, *others in rows}


def test_report_gives_means_intervals_and_each_seed(tmp_path):
    runs = [make_run(tmp_path / f"a{s}", "gbpo_llm", s, 0.6 + 0.1 * s, 2.0 + s) for s in (1, 2)]
    runs += [make_run(tmp_path / "b", "grpo_llm", 1, 0.4, 9.0, objective="dr_grpo")]
    (tmp_path / "unfinished").mkdir()
    command = [sys.executable, str(SCRIPT), *runs, str(tmp_path / "unfinished"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" in done.stderr and "not finished" in done.stderr
    assert "seed by seed" not in done.stdout  # one seed in common
    table = cells(done.stdout)
    ours = table["GBPO (0.5, 10 epochs)"]
    assert ours[:3] == ["2", "0.500", "0.750"] and ours[5:6] == ["3.50"] and ours[-2:] == ["25.0%", "0.70, 0.80"]
    theirs = table["DR GRPO (0.5, 10 epochs)"]
    assert theirs[2:4] == ["0.400", "-"] and theirs[5:7] == ["9.00", "-"]
    rows = (tmp_path / "out" / "curves.csv").read_text().splitlines()
    assert rows[0] == "group,seed,step,pass@1,ratio_max,out_of_bounds" and len(rows) == 7
    assert '"GBPO (0.5, 10 epochs)",2,20,0.8000,4,0.5' in rows
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_groups_of_one_setting_are_compared_seed_by_seed(tmp_path):
    """GBPO is 0.1, 0.2 and 0.3 ahead where seeds meet: t(0.975, 2) * 0.1 / sqrt(3) = 0.248 on either side of 0.2."""
    runs = [make_run(tmp_path / f"a{s}", "gbpo_llm", s, 0.4 + 0.1 * s, 2.0) for s in (1, 2, 3, 4)]
    runs += [make_run(tmp_path / f"b{s}", "grpo_llm", s, 0.4, 2.0, objective="gspo") for s in (3, 1, 2)]
    runs += [make_run(tmp_path / f"c{s}", "grpo_llm", s, 0.4, 2.0, objective="gspo", clip_coef=0.2) for s in (1, 2)]
    command = [sys.executable, str(SCRIPT), *runs, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = cells((tmp_path / "out" / "table.md").read_text())
    compared = {name: row for name, row in table.items() if " less " in name}
    name = "GBPO (0.5, 10 epochs) less GSPO (0.5, 10 epochs)"
    assert compared == {name: ["3", "0.200", "-0.048 to 0.448", "0.10, 0.20, 0.30"]}


def test_runs_with_other_settings_are_not_pooled(tmp_path):
    runs = [make_run(tmp_path / "a", "gbpo_llm", 1, 0.6, 2.0, learning_rate=1e-3)]
    runs += [make_run(tmp_path / "b", "gbpo_llm", 2, 0.6, 2.0, learning_rate=1e-4)]
    command = [sys.executable, str(SCRIPT), *runs, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "out").exists() and done.stderr.count("\n") == 1
    assert "b has other settings (learning_rate) than another GBPO (0.5, 10 epochs)" in done.stderr


def test_no_finished_run_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path)])
    monkeypatch.syspath_prepend(SCRIPT.parent)
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 2
    assert "no finished run" in capsys.readouterr().err
