"""benchmark/run.py with real processes: kills, crashes, resuming, two runners at once, bad input, submitit.

Most tests sweep STUB, a script with the files and manners of the training scripts that starts in no time.
"""

import contextlib
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
import tyro

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
from typing import Annotated, Literal

import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass

STOP, FORMAT = [], 2


@dataclass(config=dict(extra="forbid", hide_input_in_errors=True))
class Args:
    env_id: str = "A"
    seed: int = 1
    total_timesteps: int = 100
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.5
    sizes: tuple[int, ...] = (1,)
    seconds: float = 0.05
    crash: Literal["never", "once", "always"] = "never"
    obstinate: bool = False
    compile: bool = True
    checkpoint_seconds: float = 0
    output_dir: str = "runs"
    resume: str | None = None


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
    signal.signal(signal.SIGTERM, signal.SIG_IGN if args.obstinate else request_stop)
    if asked.resume:
        run_dir = Path(asked.resume)
        step = int((run_dir / "checkpoint.pt").read_text())
        header, *rows = (run_dir / "episodes.csv").read_text().splitlines(keepends=True)
        rows = [row for row in rows if row.endswith("\\n") and int(row.split(",")[0]) <= step]
        write(run_dir / "episodes.csv", "".join([header, *rows]))
    else:
        run_dir, step = folder / f"{args.env_id}__stub__{args.seed}__{time.time_ns()}", 0
        run_dir.mkdir(parents=True)
        write(run_dir / "args.json", json.dumps({"format": 2, "script": "stub", "args": dataclasses.asdict(args)}))
        (run_dir / "episodes.csv").write_text("step,value\\n")
    while step < args.total_timesteps and not STOP:
        time.sleep(args.seconds)
        step += 10
        with (run_dir / "episodes.csv").open("a") as file:
            file.write(f"{step},{random.Random(f'{args.seed} {args.env_id} {step}').random()}\\n")
        print(f"step {step}, 7 s left [/]", flush=True)
        if (args.crash == "once" and starts == 1 or args.crash == "always") and step >= 30:
            raise RuntimeError(f"seed {args.seed} blew up")
        write(run_dir / "checkpoint.pt", str(step))
    write(run_dir / "checkpoint.pt", str(step))
    if step < args.total_timesteps:
        sys.exit(f"stopped at step {step}")
    write(run_dir / "agent.pt", "")


if __name__ == "__main__":
    main(tyro.cli(Args))
'''


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return path


def write_suite(path, raw="", **keys):
    """Writes a suite of top-level keys, tables inline, and raw as it is."""

    def toml(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
        return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)

    path.write_text("".join(f"{name} = {toml(value)}\n" for name, value in keys.items()) + raw)
    return path


def stub_suite(stub, raw="", **keys):
    return write_suite(stub.parent / "s.toml", raw, **{"script": str(stub), "tasks": ["a"]} | keys)


def allow(suite):
    """The option that lets the stub beside this suite be run."""
    stub = Path(suite).parent / "stub.py"
    return ["--allow-script", str(stub)] if stub.exists() else []


def start(suite, out, *options, **kwargs):
    """Starts the runner in a process of its own."""
    words = [str(suite), "--output-dir", str(out.parent), *map(str, options), *allow(suite)]
    kwargs = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) | kwargs
    return subprocess.Popen([sys.executable, str(RUNNER), *words], stdin=subprocess.DEVNULL, **kwargs)


def finish(runner):
    """Exit status and output of a runner."""
    output, _ = runner.communicate(timeout=300)
    return runner.returncode, output


@pytest.fixture
def here(monkeypatch, capsys):
    """Calls the runner as __main__ in this process: exit status, standard output, lines of standard error."""

    def call(*arguments):
        gc.collect()  # simulators that earlier tests left would crash the process that the runner forks when they end
        monkeypatch.setattr(sys, "argv", [str(RUNNER), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(RUNNER), run_name="__main__")
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err.splitlines()

    return call


def until(condition, seconds=120):
    """Waits until the condition holds and returns its value."""
    deadline = time.time() + seconds
    while not (value := condition()):
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def rows_of(out, name="episodes.csv"):
    """{run: its rows of that file} of a sweep; fails on a second folder of a run and on a half-written row."""
    paths = {path.parent.parent.name: path.with_name(name) for path in out.glob("*/*/args.json")}
    assert len(paths) == len(list(out.glob("*/*/args.json")))
    assert all(path.read_text().endswith("\n") for path in paths.values())
    found = {run: [line.split(",") for line in path.read_text().splitlines()] for run, path in paths.items()}
    assert all(len(row) == len(rows[0]) for rows in found.values() for row in rows)
    return found


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
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            status = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            places = [word for word in words if word.startswith(f"{out}/")]
            own = str(RUNNER) in words or any(word.startswith("submitit.") for word in words)
            if places and not own and status != "Z":
                found[int(folder.name)] = Path(places[0]).relative_to(out).parts[0]
    return found


# --- suites and what is started

RUNS = dict(ablation=63, fair_mujoco=80, fair_hopper=80, paper_mujoco=80, smoke=12, paper_atari=80, smoke_atari=4)
RUNS |= dict(
    paper_locomotion=18,
    fair_locomotion=12,
    paper_figure6_small=40,
    llm_objectives=30,
    released_mujoco=12,
    rebuilt_hopper=20,
    tune_mujoco=96,
    mujoco=120,
    caught_hopper=20,
    reference_mujoco=26,
    reference_atari=1,
    paper_figure6_ttrl=60,
    paper_figure6_border=27,
    exact_baseline=30,
)


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.toml")), ids=lambda path: path.stem)
@pytest.mark.slow
def test_every_suite_is_valid(path, tmp_path, here):
    needs = {"reference_mujoco": ["sb3_contrib"], "reference_atari": ["sb3_contrib", "ale_py", "cv2"]}
    for name in needs.get(path.stem, []):
        pytest.importorskip(name, reason=f"{name} is missing: benchmark/requirements.txt")
    status, output, errors = here(path, "--dry-run", "--output-dir", tmp_path / "runs")
    runs = RUNS[path.stem]
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


@pytest.mark.slow
def test_paper_suite_holds_the_tables(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)  # away from a sweep under way in runs/, which would be resumed
    _, output, _ = here(SUITES / "paper_mujoco.toml", "--dry-run")
    columns = (
        "minibatch_size clip_coef ent_coef gamma learning_rate update_epochs num_steps num_envs gae_lambda".split()
    )
    found = {}
    for line in output.splitlines():
        _, script, *words = shlex.split(line)
        algorithm = Path(script).stem[:3]
        args = tyro.cli({"bpo": bpo, "ppo": ppo}[algorithm].Args, args=words)
        row = tuple(float(getattr(args, name)) for name in columns)
        assert found.setdefault((algorithm, args.env_id), row) == row
        assert (args.lr_schedule, args.hidden_size, args.activation, args.vf_coef) == ("constant", 256, "relu", 0.5)
        assert (args.norm_obs, args.norm_reward, args.norm_adv) == (False, False, algorithm == "ppo")
        assert args.max_grad_norm == (2 if args.env_id == "Humanoid-v4" else 1) and not args.clip_vloss
        if algorithm == "bpo":
            assert (args.temperature, args.tv_coef, args.median_coef) == (0.001, 0, 0.5)
            assert (args.median_network, args.median_temperature) == ("separate", None)
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


def test_dry_run_prints_the_commands_of_what_is_left(stub, tmp_path, here):
    raw = """
    [task_flags."X/b"]
    rate = 0.2
    [[variants]]
    name = "one"
    flags = { compile = false, rate = 0.3, sizes = [64, 32] }
    [[variants]]
    name = "two"
    task_flags = { a = { total_timesteps = 50 } }
    [[variants]]
    name = "few"
    tasks = ["X/b"]
    seeds = [4]
    """
    suite = stub_suite(stub, raw, tasks=["a", "X/b"], seeds=[7, 4], total_timesteps=40, flags={"seconds": 0.1})
    out, options = tmp_path / "runs", [suite, "--dry-run", "--output-dir", tmp_path / "runs", *allow(suite)]
    status, output, errors = here(*options)
    assert status == 0 and errors == ["9 runs, 0 complete, 0 to resume, 9 to start"] and not out.exists()
    lines = output.splitlines()
    folders = [line.split(f" --output-dir {out}/s/")[1] for line in lines]
    by_seed = [f"{variant}__{task}" for variant in ("one", "two") for task in ("a", "X-b")]
    assert folders[:8] == [f"{name}__{seed}" for seed in (7, 4) for name in by_seed]  # all of a seed before the next
    assert folders[8:] == ["few__X-b__4"]
    common, ours = f"{sys.executable} {stub} --env-id", "--no-compile --rate 0.3 --sizes 64 32 "
    assert lines[0].startswith(f"{common} a --seed 7 --total-timesteps 40 --seconds 0.1 {ours}")
    assert lines[1].startswith(f"{common} X/b --seed 7 --total-timesteps 40 --seconds 0.1 --rate 0.3 --no-compile ")
    assert lines[2].startswith(f"{common} a --seed 7 --total-timesteps 50 --seconds 0.1 ")
    assert lines[7].startswith(f"{common} X/b --seed 4 --total-timesteps 40 --seconds 0.1 --rate 0.2 ")
    named = [
        re.search(r"--env-id (\S+) --seed (\d)", x).groups() for x in here(*options, "--tasks", "a")[1].splitlines()
    ]
    assert named == [("a", "7"), ("a", "7"), ("a", "4"), ("a", "4")]
    assert len(here(*options, "--seeds", 5)[1].splitlines()) == 5
    for part, message in ((["--tasks", "d"], "no task d: it has a, X/b"), (["--seeds", 0], "no seed up to 0")):
        status, _, errors = here(*options, *part)
        assert status == 2 and len(errors) == 1 and message in errors[0]
    for run, file in (("one__a__7", "agent.pt"), ("one__a__4", "checkpoint.pt")):
        folder = out / "s" / run / f"a__stub__{run[-1]}__1"
        folder.mkdir(parents=True)
        (folder / file).touch()
    _, output, errors = here(*options)
    assert errors == ["9 runs, 1 complete, 1 to resume, 7 to start"]
    resumed = f"{sys.executable} {stub} --no-compile --resume {folder}\n"
    assert len(output.splitlines()) == 8 and resumed in output


def test_sweep_of_the_command_line(stub, tmp_path, here):
    options = ["--scripts", stub, "--tasks", "a", "b", "--seeds", 2, "--name", "mine", "--total-timesteps", 20]
    options += ["--flags", "rate=0.2,0.3", "compile=false", "--output-dir", tmp_path / "runs", "--allow-script", stub]
    _, output, _ = here(*options, "--dry-run")
    assert len(output.splitlines()) == 8
    assert "--rate 0.3 --no-compile" in output and "runs/mine/stub+rate=0.3+compile=false__b__2" in output


GOOD = dict(script="stub.py", tasks=["a"])
BPO = dict(script="bpo_continuous_action.py", tasks=["Hopper-v4"])
BAD_SUITES = {
    "unknown key": (GOOD | {"task": ["a"]}, "task Extra inputs are not permitted"),
    "unknown key of a variant": (GOOD | {"variants": [{"name": "x", "seed": 3}]}, "variants.0.seed Extra"),
    "unknown task of a variant": (GOOD | {"variants": [{"name": "x", "tasks": ["b"]}]}, "no task b"),
    "unknown script": (GOOD | {"script": "bpo_nowhere.py"}, "cannot import bpo_nowhere.py"),
    "no training script": (GOOD | {"script": "benchmark/report.py"}, "none of the project's"),
    "foreign script": (GOOD | {"script": "/tmp/bpo_foreign.py"}, "none of the project's"),
    "script with a mistake": (GOOD | {"script": "broken.py"}, "No module named 'nothing_of_this_name'"),
    "no script": (dict(tasks=["a"]), "no script"),
    "unknown flag": (GOOD | {"flags": {"rtae": 0.5}}, "--rtae, 0.5 Perhaps you meant: --rate"),
    "unknown flag like no other": (BPO | {"flags": {"foo": 1}}, "Unrecognized options: --foo, 1"),
    "flag of the runner": (GOOD | {"flags": {"seed": 3}}, "the runner itself sets env_id, seed"),
    "flag of the runner, hidden": (GOOD | {"flags": {"sizes": [1, "--resume", "x"]}}, "the runner itself sets"),
    "flag of another type": (GOOD | {"flags": {"rate": "high"}}, "could not convert string to float: 'high'"),
    "number for a switch": (GOOD | {"flags": {"compile": 1}}, "Unrecognized options: 1"),
    "value the script refuses": (GOOD | {"flags": {"rate": 1.5}}, "rate Input should be less than 1"),
    "values that do not fit": (BPO | {"flags": {"minibatch_size": 4096}}, "--minibatch-size must be from 2 to"),
    "a seed the script refuses": (BPO | {"seeds": [-1]}, "seed Input should be greater than or equal to 0"),
    "flags for an unknown task": (GOOD | {"task_flags": {"b": {}}}, "no task b"),
    "zero seeds": (GOOD | {"seeds": 0}, "seeds List should have at least 1 item"),
    "no seeds": (GOOD | {"seeds": []}, "seeds List should have at least 1 item"),
    "too many seeds": (GOOD | {"seeds": 10**12}, "seeds List should have at most 10000 items"),
    "seeds of another type": (GOOD | {"seeds": "three"}, "seeds Input should be a valid list"),
    "no tasks": (dict(script="stub.py"), "tasks Field required"),
    "a seed twice": (GOOD | {"seeds": [1, 1]}, "two runs have the name stub__a__1"),
    "a variant twice": (GOOD | {"variants": [{"name": "x"}, {"name": "x"}]}, "two runs have the name x__a__1"),
    "a name that is a path": (GOOD | {"variants": [{"name": "../x"}]}, "name String should match"),
    "a variant's unknown seed": (GOOD | {"variants": [{}, {"name": "x", "seeds": [7]}]}, "the suite has no seed 7"),
    "unknown task": (BPO | {"tasks": ["Hoper-v4"]}, "did you mean Hopper-v4"),
    "unfit task": (BPO | {"tasks": ["CartPole-v1"]}, "no flat Box action"),
    "not TOML": (GOOD | {"raw": "flags = "}, "Invalid value"),
}


@pytest.mark.parametrize("keys, message", BAD_SUITES.values(), ids=BAD_SUITES)
def test_bad_suite_is_one_line_before_anything_starts(keys, message, stub, tmp_path, here):
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    if (tmp_path / keys.get("script", "")).is_file():
        keys = keys | {"script": str(tmp_path / keys["script"])}
    suite = write_suite(tmp_path / "bad.toml", **keys)
    status, output, errors = here(suite, "--output-dir", tmp_path / "runs", "--allow-script", stub, broken)
    assert status == 2 and output == "" and len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_other_bad_input(stub, tmp_path, here):
    suite, task = stub_suite(stub), ["--tasks", "Hopper-v4"]
    for options, message in (
        ([tmp_path / "none.toml"], "No such file"),
        ([], "tasks List should have at least 1 item"),
        ([suite, "--flags", "gamma=0.9"], "a suite file has its own"),
        ([suite, "--workers", 0], "--workers must be at least 1"),
        ([*task, "--flags", "foo=1"], "Unrecognized options: --foo, 1"),
        ([*task, "--flags", "gamma"], "gamma"),
        ([*task, "--seeds", 10**12], "seeds List should have at most 10000 items"),
        ([*task, "--name", "../x"], "name String should match"),
        ([suite, "--cluster-options", "hours=3"], "--cluster-options needs --cluster"),
        ([suite, "--output-dir", "/dev/null/runs"], "Not a directory: '/dev/null/runs"),
        ([suite, "--cluster", "local", "--cluster-options", "hours=3"], "submitit: "),
        ([suite, "--cluster", "slurm"], "submitit: "),
    ):
        status, _, errors = here("--output-dir", tmp_path / "runs", *options, *allow(suite))
        assert status == 2 and len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
        assert not list(tmp_path.glob("runs/*/*__*"))


def test_a_suite_imports_only_what_it_may(tmp_path, here):
    """A file is no training script by being named in a suite: it is not even imported for --dry-run."""
    foreign = tmp_path / "bpo_foreign.py"
    foreign.write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n{STUB}")
    for script in (foreign, "tests/conftest.py", "enjoy.py", "brrl_tabular.py", "./bpo_continuous_action.py/../x.py"):
        suite = write_suite(tmp_path / "s.toml", script=str(script), tasks=["a"])
        status, _, errors = here(suite, "--dry-run")
        assert status == 2 and len(errors) == 1 and "none of the project's: --allow-script" in errors[0]
    assert not (tmp_path / "imported").exists()
    suite = write_suite(tmp_path / "s.toml", script=str(foreign), tasks=["a"])
    assert here(suite, "--dry-run", "--allow-script", foreign)[0] == 0 and (tmp_path / "imported").exists()


@pytest.mark.slow
def test_run_with_other_settings_is_neither_skipped_nor_resumed(stub, tmp_path, here):
    out, keys = tmp_path / "runs" / "s", {"total_timesteps": 10}
    suite = stub_suite(stub, **keys)
    options = [suite, "--output-dir", out.parent, "--dry-run", *allow(suite)]
    assert finish(start(suite, out))[0] == 0
    (path,) = out.glob("*/*/args.json")
    for other, told in (
        ({"flags": {"rate": 0.7}}, "has rate=0.5, not 0.7: move it"),
        ({"flags": {"sizes": [2]}}, "has sizes=[1], not [2]"),
        ({"total_timesteps": 20}, "has total_timesteps=10, not 20"),
    ):
        stub_suite(stub, **keys | other)
        status, _, errors = here(*options)
        assert status == 2 and len(errors) == 1 and str(path.parent) in errors[0] and told in errors[0]
    stub_suite(stub, **keys, flags={"compile": False, "checkpoint_seconds": 3})
    assert here(*options)[::2] == (0, ["1 runs, 1 complete, 0 to resume, 0 to start"])
    about = json.loads(path.read_text())
    for damaged in ("", "[]", "{}", '{"args": 3, "script": "stub"}', json.dumps(about | {"format": 1})):
        path.write_text(damaged)
        status, _, errors = here(*options)
        assert status == 2 and len(errors) == 1 and str(path.parent) in errors[0]
        assert "format=1" in errors[0] or "a damaged args.json" in errors[0]


# --- crashes and kills


@NEEDS_PROC
@pytest.mark.slow
def test_runs_are_saved_when_the_terminal_is_closed(stub, tmp_path):
    """A runner that died of its own output would leave its runs to a second signal, which ends them unsaved."""
    out = tmp_path / "runs" / "s"
    suite = stub_suite(stub, total_timesteps=10_000, flags={"seconds": 1.0})
    near, far = pty.openpty()

    def claim():  # makes the terminal that of the new process, so that closing it sends SIGHUP
        fcntl.ioctl(far, termios.TIOCSCTTY, 0)

    runner = start(suite, out, stdout=far, stderr=far, start_new_session=True, preexec_fn=claim)
    os.close(far)
    until(lambda: made(out) > 0)
    os.close(near)
    runner.wait(timeout=60)
    until(lambda: not workers(out))
    assert "stopped at step" in (out / "stub__a__1" / "log.txt").read_text()
    assert list(out.glob("*/*/checkpoint.pt"))


@pytest.mark.slow
def test_complete_runs_are_skipped(stub, tmp_path):
    out = tmp_path / "runs" / "s"
    suite = stub_suite(stub, seeds=3)
    status, output = finish(start(suite, out, "--workers", 3))
    assert status == 0 and output.count("complete: ") == 3
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    status, output = finish(start(suite, out))
    assert status == 0 and "3 complete, 0 to resume, 0 to start" in output
    assert starts(out) == dict.fromkeys(("stub__a__1", "stub__a__2", "stub__a__3"), 1)
    assert written == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_stopping_saves_and_the_same_command_goes_on(number, stub, tmp_path):
    out = tmp_path / "runs" / "s"
    suite = stub_suite(stub, seeds=2, total_timesteps=800)
    runner = start(suite, out, "--workers", 2)
    until(lambda: made(out) > 20 and len(list(out.glob("*/*/checkpoint.pt"))) == 2)
    runner.send_signal(number)
    status, output = finish(runner)
    assert status == 1 and "stopped: the same command goes on" in output and "crashed" not in output
    before = rows_of(out)
    assert not list(out.glob("*/*/agent.pt"))
    status, output = finish(start(suite, out, "--workers", 2))
    assert status == 0 and "2 to resume" in output
    after = rows_of(out)
    assert all(after[run][: len(rows)] == rows for run, rows in before.items())  # every finished episode is still there
    assert all([int(row[0]) for row in rows[1:]] == list(range(10, 801, 10)) for rows in after.values())


@pytest.mark.slow
def test_second_signal_kills(stub, tmp_path):
    out = tmp_path / "runs" / "s"
    runner = start(stub_suite(stub, total_timesteps=10_000, flags={"obstinate": True}), out)  # ignores the first one
    until(lambda: made(out) > 2)
    runner.send_signal(signal.SIGINT)
    time.sleep(1)
    assert runner.poll() is None
    runner.send_signal(signal.SIGINT)
    assert finish(runner)[0] == 1 and not list(out.glob("*/*/agent.pt"))


@pytest.mark.slow
def test_crash_is_retried_once_then_reported_and_the_others_go_on(stub, tmp_path):
    raw = "\n".join(f'[[variants]]\nname = "{x}"\nflags = {{ crash = "{x}" }}' for x in ("always", "never", "once"))
    out = tmp_path / "runs" / "s"
    status, output = finish(start(stub_suite(stub, raw, seeds=2, total_timesteps=60), out, "--workers", 2))
    runs = [(name, seed) for name in ("always", "never", "once") for seed in (1, 2)]
    assert status == 1
    assert starts(out) == {f"{name}__a__{seed}": 1 if name == "never" else 2 for name, seed in runs}
    complete = {path.parent.parent.name for path in out.glob("*/*/agent.pt")}
    assert complete == {f"{name}__a__{seed}" for name, seed in runs if name != "always"}
    for seed in (1, 2):
        assert output.count(f"crashed: always__a__{seed} (exit status 1), retrying") == 1
        assert output.count(f"failed: always__a__{seed} (exit status 1), the end of ") == 1
        assert f"    RuntimeError: seed {seed} blew up" in output
    assert "\nfailed: always__a__1, always__a__2\n" in output
    assert "6 runs: 2 failed, 4 complete" in output


@pytest.mark.slow
def test_run_killed_before_its_first_checkpoint_starts_afresh(stub, tmp_path):
    out = tmp_path / "runs" / "s"
    left = out / "stub__a__1" / "a__stub__1__1"
    left.mkdir(parents=True)
    (left / "episodes.csv").write_text("step,value\n10,1")
    assert finish(start(stub_suite(stub), out))[0] == 0
    assert not left.exists() and len(rows_of(out)["stub__a__1"]) == 11


@NEEDS_PROC
@pytest.mark.slow
def test_sweep_with_five_kills_equals_an_undisturbed_one(stub, tmp_path):
    """Twelve runs; kill -9 of the runner three times and of a worker twice, after fixed numbers of rows."""
    suite = stub_suite(stub, tasks=["a", "b"], seeds=6, total_timesteps=200, flags={"seconds": 0.02})
    undisturbed, out = tmp_path / "undisturbed" / "s", tmp_path / "disturbed" / "s"
    assert finish(start(suite, undisturbed, "--workers", 3))[0] == 0
    runner = start(suite, out, "--workers", 3)
    for rows, victim in ((15, "runner"), (50, "worker"), (90, "runner"), (130, "worker"), (170, "runner")):
        until(lambda rows=rows: made(out) >= rows)
        if victim == "worker":
            os.kill(until(lambda: list(workers(out)))[0], signal.SIGKILL)
            continue
        runner.kill()
        runner.wait()
        runner = start(suite, out, "--workers", 3)
    status, output = finish(runner)
    assert status == 0 and "12 runs: 12 complete" in output
    assert not list(out.glob("*/not_alone"))  # no run was ever trained by two processes at once
    assert sum(starts(out).values()) >= 12 + 5
    assert len(rows_of(out)) == 12 and rows_of(out) == rows_of(undisturbed)
    assert not workers(out) and not list(out.rglob("*.tmp"))


@NEEDS_PROC
@pytest.mark.slow
def test_worker_that_outlives_its_runner_keeps_its_run(stub, tmp_path):
    """As on a system that does not end the children of a killed process: these ignore SIGTERM."""
    out = tmp_path / "runs" / "s"
    suite = stub_suite(stub, seeds=2, total_timesteps=600, flags={"obstinate": True})
    runner = start(suite, out, "--workers", 2)
    until(lambda: len(starts(out)) == 2 and made(out) > 4)
    runner.kill()
    runner.wait()
    assert len(workers(out)) == 2
    status, _ = finish(start(suite, out, "--workers", 2))
    assert status == 0 and starts(out) == {"stub__a__1": 1, "stub__a__2": 1}
    assert not list(out.glob("*/not_alone"))


@pytest.mark.slow
def test_two_runners_at_once_share_the_runs(stub, tmp_path):
    suite, out = stub_suite(stub, seeds=6), tmp_path / "runs" / "s"
    runners = [start(suite, out, "--workers", 2) for _ in range(2)]
    assert [finish(runner)[0] for runner in runners] == [0, 0]
    assert starts(out) == {f"stub__a__{seed}": 1 for seed in range(1, 7)}
    assert not list(out.glob("*/not_alone"))


@pytest.mark.slow
def test_live_table_on_a_terminal(stub, tmp_path):
    suite = stub_suite(stub, seeds=2, total_timesteps=400)
    ours, theirs = pty.openpty()
    terminal = dict(stdout=theirs, stderr=theirs, text=False, env=os.environ | {"TERM": "xterm", "COLUMNS": "90"})
    runner = start(suite, tmp_path / "runs" / "s", "--workers", 1, **terminal)
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while chunk := os.read(ours, 65536):
            output += chunk
    os.close(ours)
    assert runner.wait() == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", output.decode())
    assert "2 runs: 1 waiting, 1 running; ? left" in text and "2 runs: 2 complete; 0:00:00 left" in text
    assert re.search(r"stub__a__1 +step \d+, 7 s left \[/\]", text)
    assert re.search(r"2 runs: 1 running, 1 complete; 0:00:\d\d left", text)
    assert "\x1b[1A\x1b[2K" in text  # it was redrawn in place


# --- the training scripts


def untimed(rows):
    """The rows of metrics.csv without the column that measures time."""
    kept = [i for i, name in enumerate(rows[0]) if name != "charts/SPS"]
    return [[row[i] for i in kept] for row in rows]


@NEEDS_PROC
@pytest.mark.slow
def test_killed_training_equals_an_undisturbed_one_up_to_the_restart(tmp_path):
    """BPO and PPO: kill -9 of the runner, then of a run. Each run's rows are those of the script by itself up to
    the step from which it was resumed first (the simulators start anew there)."""
    flags = dict(compile=False, num_steps=64, update_epochs=4, hidden_size=32, checkpoint_seconds=0.3)
    raw = "".join(f'[[variants]]\nname = "{x}"\nscript = "{x}_continuous_action.py"\n' for x in ("bpo", "ppo"))
    suite = write_suite(tmp_path / "s.toml", raw, tasks=["Hopper-v4"], seeds=1, total_timesteps=8000, flags=flags)
    out, restarts = tmp_path / "runs" / "s", {}

    def note(runs):
        for run in runs:
            for path in [] if list(out.glob(f"{run}/*/agent.pt")) else out.glob(f"{run}/*/checkpoint.pt"):
                restarts.setdefault(run, torch.load(path, weights_only=True)["step"])

    def until_they_go_on():
        def rows():
            return sum(path.read_text().count("\n") for path in out.glob("*/*/metrics.csv"))

        before = rows()
        until(lambda: rows() > before + 2)
        return workers(out)

    runner = start(suite, out, "--workers", 2)
    running = until_they_go_on()
    begun = [run for run in running.values() if list(out.glob(f"{run}/*/checkpoint.pt"))]  # so they act on signals
    assert len(list(Path(f"/proc/{runner.pid}/task").iterdir())) == 1  # the death of each would signal the workers
    runner.kill()
    runner.wait()
    until(lambda: not workers(out))
    note(running.values())
    if sys.platform == "linux":  # which passes the death of a process on to its children
        logs = [(out / run / "log.txt").read_text() for run in begun]
        assert logs and all(re.search("(stopped|complete) at step", log) for log in logs)
    runner = start(suite, out, "--workers", 2)
    running = until_they_go_on()
    os.kill(min(running), signal.SIGKILL)
    note([running[min(running)]])
    status, output = finish(runner)
    assert status == 0 and "2 runs: 2 complete" in output and restarts
    for script in (bpo, ppo):
        run = f"{script.__name__[:3]}__Hopper-v4__1"
        args = dict(env_id="Hopper-v4", total_timesteps=8000, output_dir=str(tmp_path / "alone" / run))
        script.train(script.Args(**args, **flags))
        for name, view in (("episodes.csv", list), ("metrics.csv", untimed)):
            found, alone = (view(rows_of(folder, name)[run]) for folder in (out, tmp_path / "alone"))
            steps = [int(row[0]) for row in found[1:]]
            assert found[0] == alone[0] and steps == sorted(steps) and (name[0] == "e" or len(set(steps)) == len(steps))
            expected = [row for row in alone[1:] if int(row[0]) <= restarts.get(run, 8000)]
            assert found[1 : 1 + len(expected)] == expected
        assert int(found[-1][0]) >= 8000 and list(out.glob(f"{run}/*/agent.pt"))
    assert not list(out.rglob("*.tmp"))


# --- submitit


@NEEDS_PROC
@pytest.mark.slow
def test_submitit_runs_the_suite(stub, tmp_path):
    """Through its local executor: one run fails; one is told that its time is up, and completes in another turn, in
    which its crash is the first."""
    raw = "\n".join(f'[[variants]]\nname = "{x}"\nflags = {{ crash = "{x}" }}' for x in ("always", "never"))
    suite, out = stub_suite(stub, raw, seeds=1, total_timesteps=300), tmp_path / "runs" / "s"
    runner = start(suite, out, "--cluster", "local", "--cluster-options", "timeout_min=5")
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
