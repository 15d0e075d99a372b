"""benchmark/run.py with real processes: kills, crashes, resuming, two runners at once, bad input, submitit.

Most tests sweep STUB, a script with the files and manners of the training scripts that starts in no time.
"""

import fcntl
import gc
import json
import os
import pty
import re
import runpy
import shlex
import signal
import subprocess
import sys
import termios
import time
import tomllib
from pathlib import Path

import pytest
import torch

import bpo_continuous_action as bpo
import ppo_continuous_action as ppo

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "benchmark" / "run.py"
SUITES = ROOT / "benchmark" / "suites"
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes through /proc")

STUB = '''
"""Trains nothing, as the scripts do: ten steps per iteration, whose rows depend on seed and step alone."""
import dataclasses, fcntl, json, os, random, signal, sys, time
from pathlib import Path
from typing import Literal

import tyro

STOP = []


@dataclasses.dataclass
class Args:
    env_id: str = "A"
    seed: int = 1
    total_timesteps: int = 100
    rate: float = 0.5
    seconds: float = 0.05
    crash: Literal["never", "once", "always"] = "never"
    obstinate: bool = False
    compile: bool = True
    checkpoint_interval: int = 5
    output_dir: str = "runs"
    resume: str | None = None
    evaluate: str | None = None


def check_args(args):
    if not 0 < args.rate < 1:
        raise ValueError(f"--rate must be within (0, 1), got {args.rate}")


def write(path, text):
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def request_stop(number, _):
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)


def main(asked):
    args = asked
    if asked.resume:
        args = Args(**json.loads((Path(asked.resume) / "args.json").read_text())["args"])
    folder = Path(args.output_dir)
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    starts = len((folder / "starts").read_text().splitlines())
    alone = (folder / "alone").open("w")
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (folder / "not_alone").touch()
    if not args.obstinate:
        signal.signal(signal.SIGTERM, request_stop)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if asked.resume:
        run_dir = Path(asked.resume)
        step = int((run_dir / "checkpoint.pt").read_text())
        for name in ("episodes.csv", "metrics.csv"):
            header, *rows = (run_dir / name).read_text().splitlines(keepends=True)
            rows = [row for row in rows if row.endswith("\\n") and int(row.split(",")[0]) <= step]
            write(run_dir / name, "".join([header, *rows]))
    else:
        run_dir, step = folder / f"{args.env_id}__stub__{args.seed}__{time.time_ns()}", 0
        run_dir.mkdir(parents=True)
        write(run_dir / "args.json", json.dumps({"script": "stub", "args": dataclasses.asdict(args)}))
        (run_dir / "episodes.csv").write_text("step,return,length\\n")
        (run_dir / "metrics.csv").write_text("step,charts/mean_return_100,charts/SPS\\n")
    while step < args.total_timesteps and not STOP:
        time.sleep(args.seconds)
        step += 10
        value = random.Random(f"{args.seed} {args.env_id} {step}").random()
        with (run_dir / "episodes.csv").open("a") as file:
            file.write(f"{step},{value},10\\n")
        with (run_dir / "metrics.csv").open("a") as file:
            file.write(f"{step},{value},100\\n")
        if (args.crash == "once" and starts == 1 or args.crash == "always") and step >= 30:
            raise RuntimeError(f"seed {args.seed} blew up")
        if step // 10 % args.checkpoint_interval == 0:
            write(run_dir / "checkpoint.pt", str(step))
    write(run_dir / "checkpoint.pt", str(step))
    if step < args.total_timesteps:
        sys.exit(f"stopped at step {step}")
    write(run_dir / "agent.pt", "")
    write(run_dir / "evaluation.json", "{}")


if __name__ == "__main__":
    main(tyro.cli(Args))
'''


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return path


def write_suite(path, **keys):
    """Writes a suite of top-level keys; a table is written inline, a string in keys["raw"] as it is."""
    raw = keys.pop("raw", "")

    def toml(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
        return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)

    path.write_text("".join(f"{name} = {toml(value)}\n" for name, value in keys.items()) + raw)
    return path


def start(suite, out, *options, **kwargs):
    """Starts the runner in a process of its own."""
    command = [sys.executable, str(RUNNER), str(suite), "--output-dir", str(out), *map(str, options)]
    kwargs = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) | kwargs
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **kwargs)


def finish(runner):
    """Exit status and output of a runner."""
    output, _ = runner.communicate(timeout=120)
    return runner.returncode, output


def here(arguments, monkeypatch, capsys):
    """The runner as __main__ in this process: exit status, standard output, lines of standard error."""
    gc.collect()  # simulators that earlier tests left: ending them in the process that the runner forks would crash it
    monkeypatch.setattr(sys, "argv", [str(RUNNER), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RUNNER), run_name="__main__")
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err.splitlines()


def until(condition, seconds=60):
    """Waits until the condition holds and returns its value."""
    deadline = time.time() + seconds
    while not (value := condition()):
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def table(path):
    """The header and rows of a CSV file; fails on a half-written one."""
    text = path.read_text()
    assert text.endswith("\n")
    rows = [line.split(",") for line in text.splitlines()]
    assert all(len(row) == len(rows[0]) for row in rows)
    return rows


def rows_of(out, name="episodes.csv"):
    """{run: rows of that file} of a sweep, each run with the one folder it must have."""
    folders = {path.parent.parent.name: path.parent for path in out.glob("*/*/args.json")}
    assert len(folders) == len(list(out.glob("*/*/args.json")))
    return {run: table(folder / name) for run, folder in folders.items()}


def starts(out):
    """{run: number of times that its script was started}, STUB only."""
    return {path.parent.name: len(path.read_text().splitlines()) for path in out.glob("*/starts")}


def made(out):
    """Rows written so far, all runs together."""
    return sum(path.read_text().count("\n") - 1 for path in out.glob("*/*/episodes.csv") if path.exists())


def workers(out):
    """The processes that train runs of this sweep: {process: run}."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            status = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        places = [word for word in words if word.startswith(f"{out}/")]
        own = str(RUNNER) in words or any(word.startswith("submitit.") for word in words)
        if places and not own and status != "Z":
            found[int(folder.name)] = Path(places[0]).relative_to(out).parts[0]
    return found


def is_complete(out, run):
    return any(out.glob(f"{run}/*/agent.pt")) and any(out.glob(f"{run}/*/evaluation.json"))


# ----------------------------------------------------------------------------------------- suites and what is started


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_suite_is_valid(path, tmp_path, monkeypatch, capsys):
    status, output, errors = here([path, "--dry-run", "--output-dir", tmp_path / "runs"], monkeypatch, capsys)
    runs = {
        "ablation": 63,
        "fair_mujoco": 80,
        "fair_hopper": 80,
        "paper_mujoco": 80,
        "smoke": 12,
        "paper_atari": 80,
        "smoke_atari": 4,
    }
    runs = (
        runs
        | {
            "paper_locomotion": 18,
            "fair_locomotion": 12,
            "paper_figure6_small": 40,
            "llm_objectives": 30,
            "released_mujoco": 12,
        }
    )[path.stem]
    assert (status, len(output.splitlines())) == (0, runs)
    assert errors == [f"{runs} runs, 0 complete, 0 to resume, {runs} to start"]
    assert not (tmp_path / "runs").exists()


# Tables 2 and 3, columns batch size to n_envs, then GAE lambda.
PAPER = """
bpo Ant-v4      256 0.3  0       0.99   1e-4     10 2048 1 0.95
bpo Humanoid-v4 128 0.2  0       0.99   1e-4     5  512  1 0.95
bpo Hopper-v4   32  0.25 0       0.999  9.808e-5 10 512  4 0.95
bpo Swimmer-v4  256 0.1  0       0.9999 3e-4     10 1024 4 0.98
ppo Ant-v4      32  0.1  4.96e-7 0.98   1.9e-5   10 512  1 0.8
ppo Humanoid-v4 256 0.3  0.00238 0.98   3.57e-5  5  512  1 0.9
ppo Hopper-v4   32  0.25 0       0.999  9.808e-5 10 512  4 0.99
ppo Swimmer-v4  256 0.1  0       0.9999 6e-4     10 1024 4 0.98
"""


def test_paper_suite_holds_the_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # away from a sweep under way in runs/, which would be resumed
    _, output, _ = here([SUITES / "paper_mujoco.toml", "--dry-run"], monkeypatch, capsys)
    columns = (
        "minibatch_size clip_coef ent_coef gamma learning_rate update_epochs num_steps num_envs gae_lambda".split()
    )
    found = {}
    for line in output.splitlines():
        _, script, *words = shlex.split(line)
        args = {"bpo": bpo, "ppo": ppo}[Path(script).stem[:3]]
        args = runpy.run_path(str(RUNNER))["tyro"].cli(args.Args, args=words)
        algorithm = Path(script).stem[:3]
        row = tuple(float(getattr(args, name)) for name in columns)
        assert found.setdefault((algorithm, args.env_id), row) == row
        assert (args.lr_schedule, args.hidden_size, args.activation, args.value_coef) == ("constant", 256, "relu", 0.5)
        assert (args.norm_obs, args.norm_reward, args.norm_adv) == (False, False, algorithm == "ppo")
        assert args.max_grad_norm == (2 if args.env_id == "Humanoid-v4" else 1)
        if algorithm == "bpo":
            assert (args.temperature, args.tv_coef, args.median_coef, args.use_median) == (0.001, 0, 0.5, True)
    expected = [line.split() for line in PAPER.strip().splitlines()]
    assert found == {(row[0], row[1]): tuple(map(float, row[2:])) for row in expected}


def test_released_suite_is_the_papers_but_for_what_the_authors_code_does():
    paper, released = (tomllib.loads((SUITES / f"{x}_mujoco.toml").read_text()) for x in ("paper", "released"))
    assert all(paper[name] == released[name] for name in ("tasks", "flags", "task_flags", "total_timesteps"))
    ours, theirs = paper["variants"][0], released["variants"][0]
    authors = dict(recompute_advantages=True, median_network="mlp-head", median_temperature=1.0)
    assert theirs["flags"] == ours["flags"] | authors
    lambdas = {"Hopper-v4": {"temperature": 10.0}, "Swimmer-v4": {"temperature": 0.01}}
    assert theirs["task_flags"] == {k: x | lambdas.get(k, {}) for k, x in ours["task_flags"].items()}


def test_dry_run_prints_the_commands_of_what_is_left(stub, tmp_path, monkeypatch, capsys):
    raw = """
    [task_flags."X/b"]
    rate = 0.2
    [[variants]]
    name = "one"
    flags = { compile = false, rate = 0.3 }
    [[variants]]
    name = "two"
    task_flags = { a = { total_timesteps = 50 } }
    """
    keys = dict(script=str(stub), tasks=["a", "X/b"], seeds=[7, 4], total_timesteps=40, flags={"seconds": 0.1})
    suite, out = write_suite(tmp_path / "some.toml", **keys, raw=raw), tmp_path / "runs"
    options = [suite, "--dry-run", "--output-dir", out]
    status, output, errors = here(options, monkeypatch, capsys)
    assert status == 0 and errors == ["8 runs, 0 complete, 0 to resume, 8 to start"] and not out.exists()
    lines = output.splitlines()
    folders = [line.split(f" --output-dir {out}/some/")[1] for line in lines]
    by_seed = [f"{variant}__{task}" for variant in ("one", "two") for task in ("a", "X-b")]
    assert folders == [f"{name}__{seed}" for seed in (7, 4) for name in by_seed]  # all of a seed before the next
    common = f"{sys.executable} {stub} --env-id"
    flags = "--checkpoint-interval 1 --total-timesteps"
    assert lines[0].startswith(f"{common} a --seed 7 {flags} 40 --seconds 0.1 --no-compile --rate 0.3 ")
    assert lines[1].startswith(f"{common} X/b --seed 7 {flags} 40 --seconds 0.1 --rate 0.3 --no-compile ")
    assert lines[2].startswith(f"{common} a --seed 7 {flags} 50 --seconds 0.1 ")
    assert lines[7].startswith(f"{common} X/b --seed 4 {flags} 40 --seconds 0.1 --rate 0.2 ")

    for run, files in (
        ("one__a__7", ["agent.pt", "evaluation.json", "checkpoint.pt"]),
        ("one__a__4", ["checkpoint.pt"]),
    ):
        folder = out / "some" / run / f"a__stub__{run[-1]}__1"
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).touch()
    _, output, errors = here(options, monkeypatch, capsys)
    assert errors == ["8 runs, 1 complete, 1 to resume, 6 to start"]
    assert len(output.splitlines()) == 7 and f"{sys.executable} {stub} --no-compile --resume {folder}\n" in output


def test_sweep_of_the_command_line(stub, tmp_path, monkeypatch, capsys):
    options = ["--scripts", stub, "--tasks", "a", "b", "--seeds", 2, "--name", "mine", "--total-timesteps", 20]
    flags = ["--flags", "rate=0.2,0.3", "compile=false"]
    options += [*flags, "--output-dir", tmp_path / "runs"]
    _, output, _ = here([*options, "--dry-run"], monkeypatch, capsys)
    assert len(output.splitlines()) == 8
    assert "--rate 0.3 --no-compile" in output and "runs/mine/stub+rate=0.3+compile=false__b__2" in output
    status, _, errors = here([SUITES / "smoke.toml", "--flags", "gamma=0.9"], monkeypatch, capsys)
    assert (status, errors) == (2, ["error: give a suite file or --flags, not both"])


def test_a_part_of_a_suite(stub, tmp_path, monkeypatch, capsys):
    suite = write_suite(tmp_path / "s.toml", script=str(stub), tasks=["a", "b", "c"], seeds=[1, 2, 3, 5])
    options = [suite, "--output-dir", tmp_path / "runs", "--dry-run"]
    assert len(here(options, monkeypatch, capsys)[1].splitlines()) == 12
    _, output, _ = here([*options, "--tasks", "a", "c", "--seeds", 2], monkeypatch, capsys)
    named = [re.search(r"--env-id (\w) --seed (\d)", line).groups() for line in output.splitlines()]
    assert named == [("a", "1"), ("c", "1"), ("a", "2"), ("c", "2")]
    for part, message in ((["--tasks", "d"], "no task d: it has a, b, c"), (["--seeds", 0], "no seed up to 0")):
        status, _, errors = here([*options, *part], monkeypatch, capsys)
        assert status == 2 and len(errors) == 1 and message in errors[0]


GOOD = dict(script="stub.py", tasks=["a"], seeds=1)
BAD_SUITES = {
    "unknown key": (GOOD | {"task": ["a"]}, "unknown key task"),
    "unknown key of a variant": (GOOD | {"variants": [{"name": "x", "seeds": 3}]}, "unknown key seeds"),
    "unknown script": (GOOD | {"script": "nowhere.py"}, "no script"),
    "no training script": (GOOD | {"script": "benchmark/report.py"}, "no training script"),
    "script with a mistake": (GOOD | {"script": "broken.py"}, "cannot import"),
    "no script": (dict(tasks=["a"], seeds=1), "no script is given"),
    "unknown flag": (GOOD | {"flags": {"rtae": 0.5}}, "no flag rtae: did you mean rate?"),
    "flag of the runner": (GOOD | {"flags": {"seed": 3}}, "the runner sets seed itself"),
    "flag of another type": (GOOD | {"flags": {"compile": False, "rate": "high"}}, "does not take --rate high"),
    "number for a switch": (GOOD | {"flags": {"compile": 1}}, "does not take --compile 1"),
    "value the script refuses": (GOOD | {"flags": {"rate": 1.5}}, "--rate must be within (0, 1), got 1.5"),
    "flags for an unknown task": (GOOD | {"task_flags": {"b": {}}}, "unknown key b"),
    "zero seeds": (GOOD | {"seeds": 0}, "at least 1"),
    "no seeds": (GOOD | {"seeds": []}, "at least 1"),
    "seeds of another type": (GOOD | {"seeds": "three"}, "seeds must be a whole number or a list"),
    "no tasks": (dict(script="stub.py", seeds=1), "at least one task"),
    "a seed twice": (GOOD | {"seeds": [1, 1]}, "two runs have the name stub__a__1"),
    "a variant twice": (GOOD | {"variants": [{"name": "x"}, {"name": "x"}]}, "two runs have the name x__a__1"),
    "a name that is a path": (GOOD | {"variants": [{"name": "../x"}]}, "a variant's name"),
    "unknown task": (dict(script="bpo_continuous_action.py", tasks=["Hoper-v4"]), "did you mean Hopper-v4"),
    "unfit task": (dict(script="bpo_continuous_action.py", tasks=["CartPole-v1"]), "no continuous"),
    "not TOML": (GOOD | {"raw": "flags = "}, "is not TOML"),
}


@pytest.mark.parametrize("keys, message", BAD_SUITES.values(), ids=BAD_SUITES)
def test_bad_suite_is_one_line_before_anything_starts(keys, message, stub, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    keys = dict(keys)
    if (tmp_path / keys.get("script", "")).is_file():
        keys["script"] = str(tmp_path / keys["script"])
    suite = write_suite(tmp_path / "bad.toml", **keys)
    status, output, errors = here([suite, "--output-dir", tmp_path / "runs"], monkeypatch, capsys)
    assert status == 2 and output == "" and len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "runs").exists()


def test_other_bad_input(stub, tmp_path, monkeypatch, capsys):
    suite = write_suite(tmp_path / "good.toml", **GOOD | {"script": str(stub)})
    for options, message in (
        ([tmp_path / "none.toml"], "cannot read"),
        ([], "at least one task"),
        ([suite, "--workers", 0], "--workers must be at least 1"),
        (["--tasks", "a", "--flags", "rate"], "options are written name=value"),
        (["--tasks", "a", "--flags", "rate=1", "rate=2"], "--flags gives rate more than once: write rate=value,value"),
        (["--tasks", "a", "--name", "../x"], "--name takes"),
        ([suite, "--cluster-options", "hours=3"], "--cluster-options needs --cluster"),
        ([suite, "--output-dir", "/dev/null/runs"], "cannot make /dev/null/runs/good: Not a directory"),
        ([suite, "--cluster", "local", "--cluster-options", "hours=3"], "submitit: "),
        ([suite, "--cluster", "slurm"], "submitit: "),
    ):
        status, _, errors = here(["--output-dir", tmp_path / "runs", *options], monkeypatch, capsys)
        assert status == 2 and len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
        assert not list(tmp_path.glob("runs/*/*__*"))


def test_run_with_other_settings_is_neither_skipped_nor_resumed(stub, tmp_path, monkeypatch, capsys):
    keys, out = GOOD | {"script": str(stub), "total_timesteps": 10}, tmp_path / "runs"
    suite = write_suite(tmp_path / "s.toml", **keys)
    assert finish(start(suite, out))[0] == 0
    write_suite(suite, **keys | {"flags": {"rate": 0.7}})
    status, _, errors = here([suite, "--output-dir", out], monkeypatch, capsys)
    assert status == 2 and len(errors) == 1 and "has other settings (rate=0.5)" in errors[0]
    write_suite(suite, **keys | {"flags": {"compile": False, "checkpoint_interval": 3}})  # harmless ones
    assert here([suite, "--output-dir", out, "--dry-run"], monkeypatch, capsys)[::2] == (
        0,
        ["1 runs, 1 complete, 0 to resume, 0 to start"],
    )


# ------------------------------------------------------------------------------------------------ crashes and kills


@NEEDS_PROC
def test_runs_are_saved_when_the_terminal_is_closed(stub, tmp_path):
    """A runner that died of its own output would leave its runs to a second signal, which ends them unsaved."""
    out = tmp_path / "runs"
    keys = GOOD | {"script": str(stub), "total_timesteps": 10_000, "flags": {"seconds": 1.0}}
    suite = write_suite(tmp_path / "s.toml", **keys)
    near, far = pty.openpty()
    runner = start(suite, out, stdout=far, stderr=far, start_new_session=True, preexec_fn=lambda: claim(far))
    os.close(far)
    sweep = out / "s"
    until(lambda: made(sweep) > 0)
    os.close(near)
    runner.wait(timeout=60)
    until(lambda: not workers(sweep))
    assert "stopped at step" in (sweep / "stub__a__1" / "log.txt").read_text()
    assert list(sweep.glob("*/*/checkpoint.pt"))


def claim(terminal):
    """Makes the terminal that of this process, so that closing it sends SIGHUP."""
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_complete_runs_are_skipped(stub, tmp_path):
    out = tmp_path / "runs"
    suite = write_suite(tmp_path / "s.toml", **GOOD | {"script": str(stub), "seeds": 3})
    status, output = finish(start(suite, out, "--workers", 3))
    assert status == 0 and output.count("complete: ") == 3
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (out / "s" / "stub__a__2" / "a__stub__2__1").mkdir()  # a folder without a checkpoint changes nothing
    written[out / "s" / "stub__a__2"] = (out / "s" / "stub__a__2").stat().st_mtime_ns
    status, output = finish(start(suite, out))
    assert status == 0 and "3 complete, 0 to resume, 0 to start" in output
    assert starts(out / "s") == dict.fromkeys(("stub__a__1", "stub__a__2", "stub__a__3"), 1)
    assert written.items() <= {path: path.stat().st_mtime_ns for path in out.rglob("*")}.items()


def test_ctrl_c_saves_and_the_same_command_goes_on(stub, tmp_path):
    out = tmp_path / "runs" / "s"
    suite = write_suite(tmp_path / "s.toml", **GOOD | {"script": str(stub), "seeds": 2, "total_timesteps": 800})
    runner = start(suite, out.parent, "--workers", 2)
    until(lambda: made(out) > 20)
    runner.send_signal(signal.SIGINT)
    status, output = finish(runner)
    assert status == 1 and "stopped: the same command goes on" in output and "crashed" not in output
    before = rows_of(out)
    assert not any(is_complete(out, run) for run in before)
    status, output = finish(start(suite, out.parent, "--workers", 2))
    assert status == 0 and "2 to resume" in output
    after = rows_of(out)
    assert all(after[run][: len(rows)] == rows for run, rows in before.items())  # every finished episode is still there
    assert all([int(row[0]) for row in rows[1:]] == list(range(10, 801, 10)) for rows in after.values())


def test_crash_is_retried_once_then_reported_and_the_others_go_on(stub, tmp_path):
    raw = "\n".join(f'[[variants]]\nname = "{x}"\nflags = {{ crash = "{x}" }}' for x in ("always", "never", "once"))
    keys = GOOD | {"script": str(stub), "seeds": 2, "total_timesteps": 60}
    suite, out = write_suite(tmp_path / "s.toml", **keys, raw=raw), tmp_path / "runs"
    status, output = finish(start(suite, out, "--workers", 2))
    assert status == 1
    assert starts(out / "s") == {
        f"{name}__a__{seed}": 1 if name == "never" else 2 for name in ("always", "never", "once") for seed in (1, 2)
    }
    assert {run for run in starts(out / "s") if is_complete(out / "s", run)} == {
        f"{name}__a__{seed}" for name in ("never", "once") for seed in (1, 2)
    }
    for seed in (1, 2):
        assert output.count(f"crashed: always__a__{seed} (exit status 1), retrying") == 1
        assert output.count(f"failed: always__a__{seed} again (exit status 1)") == 1
        assert f"    RuntimeError: seed {seed} blew up" in output
    assert "\nfailed: always__a__1, always__a__2\n" in output
    assert "6 runs: 4 complete, 2 failed" in output


def test_run_killed_before_its_first_checkpoint_starts_afresh(stub, tmp_path):
    suite, out = write_suite(tmp_path / "s.toml", **GOOD | {"script": str(stub)}), tmp_path / "runs" / "s"
    left = out / "stub__a__1" / "a__stub__1__1"
    left.mkdir(parents=True)
    (left / "episodes.csv").write_text("step,return,length\n10,1")
    status, _ = finish(start(suite, out.parent))
    assert status == 0 and not left.exists() and len(rows_of(out)["stub__a__1"]) == 11


@NEEDS_PROC
def test_sweep_with_five_kills_equals_an_undisturbed_one(stub, tmp_path):
    """Twelve runs; kill -9 of the runner three times and of a worker twice, after fixed numbers of rows."""
    keys = GOOD | {"script": str(stub), "tasks": ["a", "b"], "seeds": 6, "total_timesteps": 200}
    suite = write_suite(tmp_path / "s.toml", **keys, flags={"seconds": 0.02})
    status, _ = finish(start(suite, tmp_path / "undisturbed", "--workers", 3))
    assert status == 0
    out = tmp_path / "disturbed" / "s"
    runner = start(suite, out.parent, "--workers", 3)
    for rows, victim in ((15, "runner"), (50, "worker"), (90, "runner"), (130, "worker"), (170, "runner")):
        until(lambda rows=rows: made(out) >= rows)
        if victim == "worker":
            os.kill(until(lambda: list(workers(out)))[0], signal.SIGKILL)
            continue
        runner.kill()
        runner.wait()
        runner = start(suite, out.parent, "--workers", 3)
    status, output = finish(runner)
    assert status == 0 and "12 runs: 12 complete" in output
    assert not list(out.glob("*/not_alone"))  # no run was ever trained by two processes at once
    assert sum(starts(out).values()) >= 12 + 5
    assert len(rows_of(out)) == 12 and rows_of(out) == rows_of(tmp_path / "undisturbed" / "s")
    assert not workers(out) and not list(out.rglob("*.tmp"))


@NEEDS_PROC
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed process")
def test_workers_of_a_killed_runner_save_and_stop(stub, tmp_path):
    out = tmp_path / "runs" / "s"
    suite = write_suite(tmp_path / "s.toml", **GOOD | {"script": str(stub), "seeds": 2, "total_timesteps": 10_000})
    runner = start(suite, out.parent, "--workers", 2)
    until(lambda: len(starts(out)) == 2 and made(out) > 10)
    runner.kill()
    until(lambda: not workers(out), 10)
    assert all("stopped at step" in (out / run / "log.txt").read_text() for run in starts(out))


@NEEDS_PROC
def test_worker_that_outlives_its_runner_keeps_its_run(stub, tmp_path):
    """As on a system that does not end the children of a killed process: these ignore SIGTERM."""
    out, flags = tmp_path / "runs" / "s", {"obstinate": True}
    keys = GOOD | {"script": str(stub), "seeds": 2, "total_timesteps": 300, "flags": flags}
    suite = write_suite(tmp_path / "s.toml", **keys)
    runner = start(suite, out.parent, "--workers", 2)
    until(lambda: len(starts(out)) == 2 and made(out) > 4)
    runner.kill()
    runner.wait()
    assert len(workers(out)) == 2
    status, _ = finish(start(suite, out.parent, "--workers", 2))
    assert status == 0 and starts(out) == {"stub__a__1": 1, "stub__a__2": 1}
    assert not list(out.glob("*/not_alone"))


def test_two_runners_at_once_share_the_runs(stub, tmp_path):
    suite, out = write_suite(tmp_path / "s.toml", **GOOD | {"script": str(stub), "seeds": 6}), tmp_path / "runs"
    runners = [start(suite, out, "--workers", 2) for _ in range(2)]
    results = [finish(runner) for runner in runners]
    assert [status for status, _ in results] == [0, 0]
    assert starts(out / "s") == {f"stub__a__{seed}": 1 for seed in range(1, 7)}
    assert not list(out.glob("*/*/not_alone"))


def test_live_table_on_a_terminal(stub, tmp_path):
    suite = write_suite(tmp_path / "s.toml", **GOOD | {"script": str(stub), "seeds": 2, "total_timesteps": 400})
    ours, theirs = pty.openpty()
    runner = start(suite, tmp_path / "runs", "--workers", 1, stdout=theirs, stderr=theirs, text=False)
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert runner.wait() == 0
    text = output.decode()
    assert "2 runs: 1 waiting, 1 running; " in text and "2 runs: 2 complete; 0m00s left" in text
    assert re.search(r"stub__a__1 +\d+ +\d+% +[01]\.\d +100 +0m0\ds", text)
    assert re.search(r"\x1b\[3F\x1b\[J", text)  # summary, header and one run were redrawn


# ------------------------------------------------------------------------------------------------ the training scripts


def untimed(rows):
    """The rows of metrics.csv without the columns that measure time."""
    kept = [i for i, name in enumerate(rows[0]) if not name.startswith("time/") and name != "charts/SPS"]
    return [[row[i] for i in kept] for row in rows]


@NEEDS_PROC
def test_killed_training_equals_an_undisturbed_one_up_to_the_restart(tmp_path):
    """BPO and PPO: kill -9 of the runner, then of a worker. Each run's rows are those of the script by itself, up to
    the step from which it was resumed first (the simulators start anew there)."""
    raw = '[[variants]]\nname = "bpo"\n[[variants]]\nname = "ppo"\nscript = "ppo_continuous_action.py"\n'
    flags = {"compile": False, "num_steps": 64, "eval_episodes": 1, "hidden_size": 32}
    keys = dict(script="bpo_continuous_action.py", tasks=["Hopper-v4"], seeds=1, total_timesteps=6000, flags=flags)
    suite, out = write_suite(tmp_path / "s.toml", **keys, raw=raw), tmp_path / "runs" / "s"
    restarts = {}

    def note(runs):
        for run in runs:
            for path in [] if is_complete(out, run) else out.glob(f"{run}/*/checkpoint.pt"):
                restarts.setdefault(run, torch.load(path, weights_only=True)["step"])

    def enough(rows):
        counts = [path.read_text().count("\n") for path in out.glob("*/*/metrics.csv")]
        return len(counts) == 2 and min(counts) > rows

    runner = start(suite, out.parent, "--workers", 2)
    until(lambda: enough(3))
    assert len(list(Path(f"/proc/{runner.pid}/task").iterdir())) == 1  # each thread's death would signal the workers
    runner.kill()
    runner.wait()
    until(lambda: not workers(out))
    if sys.platform == "linux":
        assert all("stopped at step" in log.read_text() for log in out.glob("*/log.txt"))
    note(["bpo__Hopper-v4__1", "ppo__Hopper-v4__1"])
    assert len(restarts) == 2 and all(0 < step < 5000 for step in restarts.values())
    lengths = {run: len(rows) for run, rows in rows_of(out, "metrics.csv").items()}
    runner = start(suite, out.parent, "--workers", 2)
    until(lambda: any(len(rows) > lengths[run] for run, rows in rows_of(out, "metrics.csv").items()))
    os.kill(min(workers(out)), signal.SIGKILL)
    status, output = finish(runner)
    assert status == 0 and output.count("(exit status -9), retrying") == 1
    for script, run in ((bpo, "bpo__Hopper-v4__1"), (ppo, "ppo__Hopper-v4__1")):
        args = script.Args(env_id="Hopper-v4", total_timesteps=6000, output_dir=str(tmp_path / "alone" / run), **flags)
        script.train(args)
        for name, view in (("episodes.csv", list), ("metrics.csv", untimed)):
            rows, alone = (view(rows_of(folder, name)[run]) for folder in (out, tmp_path / "alone"))
            assert rows[0] == alone[0]
            before = [row for row in alone[1:] if int(row[0]) <= restarts[run]]
            assert before and rows[1 : 1 + len(before)] == before
            assert [int(row[0]) for row in rows[1:]] == sorted(int(row[0]) for row in rows[1:])
        assert int(rows[-1][0]) >= 6000 and json.loads(next(out.glob(f"{run}/*/evaluation.json")).read_text())
    assert not list(out.rglob("*.tmp"))


# ----------------------------------------------------------------------------------------------------------- submitit


@NEEDS_PROC
def test_submitit_runs_the_suite(stub, tmp_path):
    """Through its local executor: one run fails; one is told that its time is up, and completes in another turn, in
    which its crash is the first."""
    raw = "\n".join(f'[[variants]]\nname = "{x}"\nflags = {{ crash = "{x}" }}' for x in ("always", "never"))
    keys = GOOD | {"script": str(stub), "tasks": ["a"], "seeds": 1, "total_timesteps": 300}
    suite, out = write_suite(tmp_path / "s.toml", **keys, raw=raw), tmp_path / "runs" / "s"
    runner = start(suite, out.parent, "--cluster", "local", "--cluster-options", "timeout_min=5")
    until(lambda: any(out.glob("never__a__1/*/checkpoint.pt")))
    (worker,) = [process for process, run in workers(out).items() if run == "never__a__1"]
    job = int(Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(job, signal.SIGUSR2)
    status, output = finish(runner)
    assert status == 1
    assert "complete: never__a__1" in output and "failed: always__a__1 (job " in output
    assert "RuntimeError: seed 1 blew up" in output
    assert starts(out) == {"always__a__1": 2, "never__a__1": 2}
    log = (out / "never__a__1" / "log.txt").read_text()
    assert "stopped at step" in log and "--resume" in log
    rows = rows_of(out)["never__a__1"]
    assert [int(row[0]) for row in rows[1:]] == list(range(10, 301, 10))
