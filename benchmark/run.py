"""Runs a sweep: every variant, task and seed, in parallel processes; what is complete is skipped, the rest resumed.

    python benchmark/run.py benchmark/suites/smoke.toml
    python benchmark/run.py --tasks Hopper-v4 Ant-v4 --seeds 5 --flags clip_coef=0.2,0.4 --name clip

A run lives in OUTPUT_DIR/SUITE/VARIANT__TASK__SEED/: the script's own run folder, log.txt and lock. The state of a
sweep is these files alone: the same command goes on after any interruption. docs/benchmark.md says what survives what.
The exit status is 0 if all runs are complete, 1 if not, 2 for bad input, which is found before anything starts.
"""

import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
SUITE_KEYS = dict(script=(str,), tasks=(list,), seeds=(int, list), total_timesteps=(int,), flags=(dict,))
SUITE_KEYS |= dict(task_flags=(dict,), variants=(list,))
VARIANT_KEYS = dict(name=(str,), script=(str,), flags=(dict,), task_flags=(dict,))
# Imported by the reports as well:
RUNNERS = ("env_id", "seed", "output_dir", "resume", "evaluate")  # flags that the runner sets
STATES = ("waiting", "running", "elsewhere", "complete", "failed")
HARMLESS = (
    "compile",
    "cuda_graphs",
    "device",
    "checkpoint_interval",
    "capture_video",
    "track",
    "wandb_project",
)  # do not change what is learned


class BadInput(ValueError):
    """Input that cannot work: printed as one line, exit status 2."""


@dataclass
class Args:
    suite: Annotated[Path | None, tyro.conf.Positional] = None
    """suite file (TOML); without one, the next six settings describe the sweep"""
    tasks: tuple[str, ...] = ()
    """task names; with a suite: only these of its tasks"""
    seeds: int | None = None
    """number of seeds, from 1 (default: 3); with a suite: only its seeds up to this one"""
    name: str = "sweep"
    """name of the sweep, the folder of its runs"""
    scripts: tuple[str, ...] = ("bpo_continuous_action.py",)
    """training scripts, relative to the project"""
    total_timesteps: int | None = None
    """environment steps per run; default: the script's"""
    flags: tuple[str, ...] = ()
    """flags of the scripts: name=value or name=value,value,...; each combination is a variant"""
    workers: int = os.cpu_count()
    """runs at a time"""
    output_dir: Path = Path("runs")
    """folder that receives the sweep's folder"""
    dry_run: bool = False
    """print the commands that would be started, and start nothing"""
    cluster: Literal["slurm", "local"] | None = None
    """submit the runs as a job array through submitit; local: as its processes on this machine"""
    cluster_options: tuple[str, ...] = ()
    """submitit's parameters as name=value: timeout_min=600 slurm_partition=cpu mem_gb=4"""


@dataclass
class Run:
    """One training run. advance() moves it on; called as a function, it trains to the end (a job on a cluster)."""

    name: str
    folder: Path
    script: Path
    settings: dict  # all of the script's settings
    defaults: dict  # the script's
    words: list[str]  # the command's words after the script
    state: str = "waiting"  # one of STATES; elsewhere: another runner has it
    attempts: int = 0
    process: subprocess.Popen | None = None
    lock: int | None = None

    def folders(self, *holding):
        """The script's run folders that hold all these files, the oldest first."""
        found = sorted(self.folder.glob(f"*__{self.settings['seed']}__*/"))
        return [path for path in found if all((path / name).exists() for name in holding)]

    def complete(self):
        return any(self.folders(agent, "evaluation.json") for agent in ("agent.pt", "model"))

    def command(self):
        """The command that starts the run, or that resumes it if there is a checkpoint."""
        words = self.words
        if folders := self.folders("checkpoint.pt"):
            machine = {"--compile", "--no-compile", "--cuda-graphs", "--no-cuda-graphs", "--device", "cpu", "cuda"}
            kept = [word for word in words if word in machine]
            words = [*kept, "--resume", str(folders[-1])]  # all else is in the run's args.json
        return [sys.executable, str(self.script), *words]

    def check_settings(self):
        """BadInput if the folder holds a run with other settings, which must be neither resumed nor taken for this."""
        for folder in self.folders("args.json", "checkpoint.pt"):
            about = json.loads((folder / "args.json").read_text())
            wanted = {"script": self.script.stem, **json.loads(json.dumps(self.settings))}
            found = {**json.loads(json.dumps(self.defaults)), "script": about["script"], **about["args"]}
            differing = [f"{k}={found[k]}" for k in wanted if found[k] != wanted[k] and k not in RUNNERS + HARMLESS]
            if differing:
                raise BadInput(f"{folder} has other settings ({', '.join(differing)}): move it or rename the sweep")

    def advance(self, may_start=True, stopping=False):
        """Starts, retries or closes the run if it is time to; returns a line to print, or None."""
        if self.process and self.process.poll() is not None:
            status, self.process = self.process.returncode, None
            if self.complete():
                return self.close("complete")
            if stopping:
                self.close("waiting")
                return f"stopped: {self.name}"
            if self.attempts == 2:
                return self.close("failed", f" again (exit status {status})")
            return f"crashed: {self.name} (exit status {status}), {self.start() or 'retrying'}"
        if not self.process and self.state in ("waiting", "elsewhere") and may_start:
            return self.start()

    def start(self):
        """Locks the run and starts its process; returns a line to print if it turns out complete or impossible."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.lock is None:
                self.lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.complete():  # another runner may have finished it before the lock was ours
                return self.close("complete")
            for folder in self.folders():
                if not (folder / "checkpoint.pt").exists():
                    shutil.rmtree(folder)  # killed within its first iteration: nothing to resume
            threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
            with (self.folder / "log.txt").open("a") as log:
                print("$", shlex.join(self.command()), file=log, flush=True)
                self.process = subprocess.Popen(
                    self.command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | dict.fromkeys(threads, "1"),
                    pass_fds=[self.lock],  # the training process holds the lock too: it lives as long as either of us
                    start_new_session=True,  # Ctrl-C reaches the runner only, which passes it on
                    preexec_fn=tie_to_runner,
                )
        except BlockingIOError:
            os.close(self.lock)
            self.lock, self.state = None, "elsewhere"
            return
        except OSError as error:
            return self.close("failed", f": {error}")
        self.state, self.attempts = "running", self.attempts + 1

    def close(self, state, why=""):
        """Sets the final state and unlocks the run; returns the line that reports it."""
        self.state = state
        if self.lock is not None:
            os.close(self.lock)
        self.lock = None
        return f"{state}: {self.name}{why}" + (f"\n{self.log_end()}" if state == "failed" else "")

    def log_end(self):
        """The last lines of the run's log, indented."""
        log = self.folder / "log.txt"
        lines = log.read_text(errors="replace").splitlines()[-10:] if log.exists() else ["(empty)"]
        return "\n    ".join([f"    the last lines of {log}:", *lines])

    def progress(self):
        """(step, steps per second, mean return) of the last iteration in metrics.csv; zeros before the first."""
        try:
            with (self.folders("metrics.csv")[-1] / "metrics.csv").open("rb") as file:
                names = file.readline().decode().strip().split(",")
                file.seek(max(file.tell(), file.seek(0, os.SEEK_END) - 4096))
                row = dict(zip(names, file.read().split(b"\n")[-2].decode().split(",")))
            mean_return = row["charts/mean_return_100"] if "charts/mean_return_100" in row else row["reward"]
            return int(row["step"]), float(row["charts/SPS"]), float(mean_return)
        except (OSError, IndexError, KeyError, ValueError):
            return 0, 0.0, math.nan

    def __call__(self):
        """Trains to the end, within a job of submitit; RuntimeError if that fails."""
        while self.state not in ("complete", "failed"):
            if line := self.advance():
                print(line, flush=True)
            time.sleep(0.5)
        if self.state == "failed":
            raise RuntimeError(f"{self.name} failed: see {self.folder / 'log.txt'}")

    def checkpoint(self):
        """submitit calls this before the job's time is up: saves the training, and asks for another turn."""
        import submitit

        if self.process:
            self.process.terminate()
            self.process.wait()
        return submitit.helpers.DelayedSubmission(
            dataclasses.replace(self, process=None, lock=None, state="waiting", attempts=0)
        )


def tie_to_runner():
    """In a new training process: Linux will end it as Ctrl-C does (with a checkpoint) when the runner dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm warns all of a job's processes: submitit's is to act


def words(flags):
    """Flags as words of a command: {"norm_obs": False, "gamma": 0.9} -> ["--no-norm-obs", "--gamma", "0.9"]"""
    named = [(name.replace("_", "-"), value) for name, value in flags.items()]
    each = [[f"--{'' if x else 'no-'}{name}"] if isinstance(x, bool) else [f"--{name}", str(x)] for name, x in named]
    return list(itertools.chain.from_iterable(each))


@functools.cache
def load_script(script):
    """The script as a module, which runs nothing; BadInput if it is none that can be run here."""
    path = ROOT / script
    if path.suffix != ".py" or not path.is_file():
        raise BadInput(f"there is no script {script}")
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BadInput(f"cannot import {script}: {type(error).__name__}: {error}") from None
    if not (dataclasses.is_dataclass(getattr(module, "Args", None)) and hasattr(module, "check_args")):
        raise BadInput(f"{script} is no training script: it has no Args and check_args")
    return module


def read_flags(script, flags):
    """The script's Args with these flags; BadInput if it does not take them."""
    module = load_script(script)
    known = [field.name for field in dataclasses.fields(module.Args)]
    for name in flags:
        if name in RUNNERS:
            raise BadInput(f"the runner sets {name} itself")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise BadInput(f"{script} has no flag {name}" + f": did you mean {close[0]}?" * bool(close))

    def parse(some):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # tyro explains itself in a box of many lines
                return tyro.cli(module.Args, args=words(some))
        except SystemExit:
            return None

    if (parsed := parse(flags)) is None:
        wrong = next({name: value} for name, value in flags.items() if parse({name: value}) is None)
        raise BadInput(f"{script} does not take {shlex.join(words(wrong))}")
    return parsed


@functools.cache
def check_task(script, env_id, env_backend):
    """BadInput if the script cannot train on this task."""
    module = load_script(script)
    if hasattr(module, "make_envs"):
        backend = {"env_backend": env_backend} if env_backend else {}
        module.make_envs(module.Args(env_id=env_id, **backend), 1, 0)[0].close()


def check_table(table, keys, where):
    """BadInput if the table has a key that is not in keys, or a value that is of none of the types keys gives it."""
    if not isinstance(table, dict):
        raise BadInput(f"{where} must be a table, got {table!r}")
    for key, value in table.items():
        if key not in keys:
            raise BadInput(f"{where} has the unknown key {key}: known are {', '.join(keys)}")
        if type(value) not in keys[key]:
            kinds = {str: "a string", int: "a whole number", list: "a list", dict: "a table"}
            raise BadInput(f"{where}: {key} must be {' or '.join(kinds[x] for x in keys[key])}, got {value!r}")


def plan(suite, name, output_dir):
    """The runs of a suite, all variants and tasks of a seed before the next seed; BadInput if something is wrong."""
    check_table(suite, SUITE_KEYS, name)
    tasks, seeds, runs = suite.get("tasks"), suite.get("seeds", 1), {}
    if not tasks or not all(isinstance(task, str) for task in tasks):
        raise BadInput(f"{name}: tasks must name at least one task")
    seeds = list(range(1, seeds + 1)) if isinstance(seeds, int) else seeds
    if not seeds or any(type(seed) is not int for seed in seeds):
        raise BadInput(f"{name}: seeds must be a number of seeds, at least 1, or a list of seeds, got {suite['seeds']}")
    for variant in suite.get("variants") or [{}]:
        check_table(variant, VARIANT_KEYS, f"{name}: a variant")
        script = variant.get("script", suite.get("script"))
        if script is None:
            raise BadInput(f"{name}: no script is given")
        label = variant.get("name", Path(script).stem)
        if not re.fullmatch(r"[\w.+=-]*\w[\w.+=-]*", label):
            raise BadInput(f"{name}: a variant's name takes letters, digits and _.+=- and not {label!r}")
        task_tables = suite.get("task_flags", {}), variant.get("task_flags", {})
        for table in task_tables:
            check_table(table, dict.fromkeys(tasks, (dict,)), f"{name}, {label}: task_flags")
        for task in tasks:
            flags = {"checkpoint_interval": 1}  # after every iteration, so that kill -9 costs no more than that
            flags |= {"total_timesteps": suite["total_timesteps"]} if "total_timesteps" in suite else {}
            flags |= suite.get("flags", {}) | task_tables[0].get(task, {})
            flags |= variant.get("flags", {}) | task_tables[1].get(task, {})
            try:
                parsed = dataclasses.replace(read_flags(script, flags), env_id=task)
                check_task(script, task, getattr(parsed, "env_backend", None))
                for seed in seeds:
                    settings = dataclasses.replace(parsed, seed=seed)
                    load_script(script).check_args(settings)
                    run_name = f"{label}__{task.replace('/', '-')}__{seed}"
                    if run_name in runs:
                        raise BadInput(f"two runs have the name {run_name}")
                    folder = output_dir / name / run_name
                    start = words({"env_id": task, "seed": seed} | flags | {"output_dir": folder})
                    defaults = dataclasses.asdict(load_script(script).Args())  # of flags younger than a run
                    run = Run(run_name, folder, ROOT / script, dataclasses.asdict(settings), defaults, start)
                    run.check_settings()
                    runs[run_name] = run
            except ValueError as error:  # the script's own BadInput, too
                raise BadInput(f"{name}, {label}, {task}: {error}") from None
    return sorted(runs.values(), key=lambda run: seeds.index(run.settings["seed"]))


def narrow(runs, args):
    """The runs of --tasks and of --seeds; BadInput if there are none."""
    known = sorted({run.settings["env_id"] for run in runs})
    for task in args.tasks:
        if task not in known:
            raise BadInput(f"the suite has no task {task}: it has {', '.join(known)}")
    chosen = [run for run in runs if not args.tasks or run.settings["env_id"] in args.tasks]
    chosen = [run for run in chosen if args.seeds is None or run.settings["seed"] <= args.seeds]
    if not chosen:
        raise BadInput(f"the suite has no seed up to {args.seeds}")
    return chosen


def read_suite(args):
    """The suite as a table, from the file or from the command line, and its name; BadInput if it cannot be read."""
    described = [x.name for x in dataclasses.fields(Args)[3:7] if getattr(args, x.name) != x.default]
    if args.suite and described:
        raise BadInput(f"give a suite file or --{described[0].replace('_', '-')}, not both")
    if args.suite:
        try:
            return tomllib.loads(args.suite.read_text()), args.suite.stem
        except OSError as error:
            raise BadInput(f"cannot read {args.suite}: {error.strerror}") from None
        except ValueError as error:
            raise BadInput(f"{args.suite} is not TOML: {error}") from None
    if not re.fullmatch(r"[\w.+=-]*\w[\w.+=-]*", args.name):
        raise BadInput(f"--name takes letters, digits and _.+=- and not {args.name!r}")
    suite = {"tasks": list(args.tasks), "seeds": 3 if args.seeds is None else args.seeds, "variants": []}
    suite |= {"total_timesteps": args.total_timesteps} if args.total_timesteps is not None else {}
    named = [split_option(text) for text in args.flags]
    if twice := next((name for name, count in Counter(name for name, _ in named).items() if count > 1), None):
        raise BadInput(f"--flags gives {twice} more than once: write {twice}=value,value")
    choices = [[(name, value) for value in values.split(",")] for name, values in named]
    for script, *chosen in itertools.product(args.scripts, *choices):
        label = "+".join([Path(script).stem, *(f"{name}={value}" for name, value in chosen)])
        flags = {name: {"true": True, "false": False}.get(value, value) for name, value in chosen}
        suite["variants"].append({"name": label, "script": script, "flags": flags})
    return suite, args.name


def split_option(text):
    """("name", "value") from "name=value"; BadInput if it is not that."""
    name, equals, value = text.partition("=")
    if not equals:
        raise BadInput(f"options are written name=value, got {text}")
    return name.replace("-", "_"), value


class Board:
    """The table of running runs, redrawn in place on a terminal; elsewhere a line now and then."""

    def __init__(self, runs):
        self.runs, self.start_time, self.drawn = runs, time.time(), 0
        self.first_steps, self.next_time, self.live = self.steps(), 0.0, sys.stdout.isatty()

    def steps(self):
        """Steps made so far by all runs that have not failed."""
        runs = [(x, x.settings["total_timesteps"]) for x in self.runs if x.state != "failed"]
        return sum(n if x.state == "complete" else min(x.progress()[0], n) for x, n in runs)

    def say(self, text):
        try:
            if self.drawn:
                print(f"\x1b[{self.drawn}F\x1b[J", end="")  # back to the table's first line, and clear from there
                self.drawn = 0
            print(text, flush=True)
        except OSError:  # the terminal or the pipe is gone, but the runs must still be seen to
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def draw(self, last=False):
        if time.time() < self.next_time and not last:
            return
        self.next_time = time.time() + (1 if self.live else 30)
        counts = {state: sum(run.state == state for run in self.runs) for state in STATES}
        total = sum(x.settings["total_timesteps"] for x in self.runs if x.state != "failed")
        steps = self.steps()
        rate = (steps - self.first_steps) / (time.time() - self.start_time)
        summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        lines = [f"{len(self.runs)} runs: {summary}; {duration((total - steps) / rate) if rate else '?'} left"]
        if self.live and not last:
            lines.append(f"{'run':<36}{'step':>11}{'done':>6}{'return':>9}{'steps/s':>9}{'left':>8}")
            for run in (x for x in self.runs if x.state in ("running", "elsewhere")):
                (step, speed, mean_return), end = run.progress(), run.settings["total_timesteps"]
                left = duration((end - step) / speed) if speed else "?"
                lines.append(f"{run.name:<36.36}{step:>11,}{step / end:>6.0%}{mean_return:>9.1f}{speed:>9.0f}{left:>8}")
            size = shutil.get_terminal_size()  # a line that wraps, or a table that scrolls, could not be redrawn
            lines = [line[: size.columns - 1] for line in lines[: size.lines - 1]]
        self.say("\n".join(lines))
        self.drawn = len(lines) if self.live and not last else 0


def duration(seconds):
    minutes = max(int(seconds), 0) // 60
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{max(int(seconds), 0) % 60:02}s"


def submit(runs, suite_name, args):
    """Submits the runs as one job array: submitit's jobs, in the order of the runs. BadInput if submitit refuses."""
    try:
        import submitit
    except ImportError:
        raise BadInput("submitit is not installed") from None
    options = dict(map(split_option, args.cluster_options))
    options = {name: int(x) if x.isdecimal() else x for name, x in options.items()}
    # A job whose time is up resumes in a new turn, so that its limit need not cover a run.
    limits = {"timeout_min": 240, "cpus_per_task": 1, "slurm_array_parallelism": args.workers}
    try:
        folder = args.output_dir / suite_name / ".submitit"
        executor = submitit.AutoExecutor(folder, cluster=args.cluster, slurm_max_num_timeout=1000)
        executor.update_parameters(name=suite_name, **limits | options)
    except (RuntimeError, NameError, ValueError, AssertionError) as error:
        raise BadInput(f"submitit: {str(error).splitlines()[0]}") from None
    with executor.batch():
        return [executor.submit(run) for run in runs]


def main(args):
    """Runs the sweep or prints its commands; returns the exit status."""
    if args.workers < 1:
        raise BadInput(f"--workers must be at least 1, got {args.workers}")
    if args.cluster_options and not args.cluster:
        raise BadInput("--cluster-options needs --cluster")
    suite, suite_name = read_suite(args)
    # In a process of its own: the scripts' libraries would leave threads behind, and Linux sends the signal that
    # tie_to_runner asks for when each of the runner's threads dies, but the second SIGTERM ends a script unsaved.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        runs = pool.submit(plan, suite, suite_name, args.output_dir).result()
    runs = narrow(runs, args)
    for run in runs:
        if run.complete():
            run.state = "complete"
    todo = [run for run in runs if run.state != "complete"]
    resumable = sum(bool(run.folders("checkpoint.pt")) for run in todo)
    about = (
        f"{len(runs)} runs, {len(runs) - len(todo)} complete, {resumable} to resume, {len(todo) - resumable} to start"
    )
    if args.dry_run:
        print("\n".join(shlex.join(run.command()) for run in todo))
        print(about, file=sys.stderr)
        return 0
    try:
        (args.output_dir / suite_name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make {args.output_dir / suite_name}: {error.strerror}") from None
    print(f"{suite_name}: {about}; {args.output_dir / suite_name}", flush=True)
    jobs = submit(todo, suite_name, args) if args.cluster and todo else []
    signals, passed_on = [], 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: signals.append(number))
    board = Board(runs)
    while True:
        for run, job in itertools.zip_longest(todo, jobs):
            if not args.cluster:
                free = sum(bool(x.process) for x in todo) < args.workers
                line = run.advance(may_start=free and not signals, stopping=bool(signals))
            else:
                line = watch(run, job)
            if line:
                board.say(line)
        if len(signals) > passed_on:
            passed_on = len(signals)
            for run in (x for x in todo if x.process):
                run.process.send_signal(signal.SIGTERM if passed_on == 1 else signal.SIGKILL)
        if all(x.state in ("complete", "failed") for x in todo) or (signals and not any(x.process for x in todo)):
            break
        board.draw()
        time.sleep(0.2 if not args.cluster else 2)
    board.draw(last=True)
    failed = [run.name for run in runs if run.state == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}")
    if signals:
        jobs_go_on = f"; {len(jobs)} jobs go on ({jobs[0].job_id}, ...)" if jobs else ""
        print(f"stopped: the same command goes on from here{jobs_go_on}")
    return 0 if all(run.state == "complete" for run in runs) else 1


def watch(run, job):
    """Takes the run's state from its job and files; returns a line to print if it has ended, else None."""
    if run.state in ("complete", "failed"):
        return
    if job.done():  # its answer first: a shared disk may show the files late
        done = job.exception() is None or run.complete()
        return run.close("complete") if done else run.close("failed", f" (job {job.job_id}, {job.state})")
    run.state = "running" if run.folders("checkpoint.pt") else "waiting"


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except BadInput as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped before anything was started")
