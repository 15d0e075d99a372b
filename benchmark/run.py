"""Runs a sweep: every variant, task and seed, in parallel processes; what is complete is skipped, the rest resumed.

    python benchmark/run.py benchmark/suites/smoke.toml
    python benchmark/run.py --tasks Hopper-v4 Ant-v4 --seeds 5 --flags clip_coef=0.2,0.4 --name clip

All state is in OUTPUT_DIR/SUITE/VARIANT__TASK__SEED/ (the script's run folder, log.txt, lock): after any interruption
the same command goes on. Exit status: 0 if all runs are complete, 1 if not, 2 for bad input, found before any start.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import io
import itertools
import json
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
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from filelock import lock_descriptor
from pydantic import BaseModel, Field
from rich.live import Live
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
RUNNERS = ("env_id", "seed", "output_dir", "resume")  # flags that the runner sets
MACHINE = ("compile", "cuda_graphs", "device")  # flags of the suite for resumed runs
HARMLESS = (*MACHINE, "checkpoint_seconds", "exp_name", "track", "wandb_project_name", "wandb_entity")
os.environ["PYDANTIC_ERRORS_INCLUDE_URL"] = "0"


class BadInput(ValueError):
    """One line, exit status 2."""


@dataclass
class Args:
    suite: Annotated[Path | None, tyro.conf.Positional] = None  # TOML; without it, the next six describe the sweep
    tasks: tuple[str, ...] = ()  # task names; with a suite: only these
    seeds: int | None = None  # how many (default: 3); with a suite: those up to this one
    name: str = "sweep"  # folder of the sweep
    scripts: tuple[str, ...] = ("bpo_continuous_action.py",)  # training scripts
    total_timesteps: int | None = None  # steps per run
    flags: tuple[str, ...] = ()  # flags of the scripts, name=value,value,...: each combination is a variant
    workers: int = os.cpu_count()  # runs at a time
    output_dir: Path = Path("runs")  # receives the sweep's folder
    dry_run: bool = False  # print the commands left to do, start nothing
    cluster: Literal["slurm", "local"] | None = None  # through submitit; local: processes here
    cluster_options: tuple[str, ...] = ()  # submitit's parameters: timeout_min=600 slurm_partition=cpu mem_gb=4
    allow_script: tuple[Path, ...] = ()  # other scripts that may be run


class Variant(BaseModel, extra="forbid", strict=True, hide_input_in_errors=True):
    name: str | None = Field(None, pattern=r"^[\w.+=-]*\w[\w.+=-]*$")
    script: str = ""
    tasks: list[str] = []  # of the suite's, only these; seeds alike
    seeds: list[int] = []
    flags: dict[str, Any] = {}
    task_flags: dict[str, dict[str, Any]] = {}


class Suite(Variant):
    tasks: list[str] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1, max_length=10_000)
    total_timesteps: int | None = None
    variants: list[Variant] = Field([Variant()], min_length=1)


@dataclass
class Run:
    """One training run. advance() moves it on; called as a function, it trains to the end (a job on a cluster)."""

    name: str
    folder: Path
    script: Path
    flags: dict  # of its first command
    settings: dict  # all of the script's
    # running, stopped, complete, failed; elsewhere: another runner has it. No fields: replace() makes them new.
    state, attempts, process, lock, job, cores = "waiting", 0, None, None, None, ()

    def folders(self, holding=""):
        """The script's run folders that hold this file, the oldest first."""
        found = sorted(self.folder.glob(f"*__{self.settings['seed']}__*/"))
        return [path for path in found if (path / holding).exists()]

    def complete(self):
        return any(self.folders(agent) for agent in ("agent.pt", "model"))

    def ended(self):
        return self.state in ("complete", "failed")

    def command(self):
        flags = self.flags
        if folders := self.folders("checkpoint.pt"):
            kept = MACHINE + ("env_id",) * (":" in flags["env_id"])  # code must be named again
            flags = {x: flags[x] for x in kept if x in flags} | {"resume": folders[-1]}
        return [sys.executable, str(self.script), *words(flags)]

    def check_settings(self, defaults):
        """BadInput if the folder holds a run with other settings, which must not be taken for this one."""
        for folder in self.folders("args.json"):
            try:
                about = json.loads((folder / "args.json").read_bytes())
                found = defaults | about["args"] | {"script": about["script"], "format": about.get("format")}
                pairs = [(x, found[x], y) for x, y in self.settings.items() if x not in RUNNERS + HARMLESS]
                wrong = [f"{name}={value}, not {wanted}" for name, value, wanted in pairs if value != wanted]
            except (ValueError, LookupError, TypeError, AttributeError):
                wrong = ["a damaged args.json"]
            if wrong:
                raise BadInput(f"{folder} has {wrong[0]}: move it or rename the sweep")

    def advance(self, stopping=False):
        """Starts, retries or closes the run if it is time to; returns a line to print, or None."""
        if self.job and self.job.done():  # its answer counts, too: a shared disk may show the files late
            done = self.job.exception() is None or self.complete()
            return self.close("complete" if done else "failed", f" (job {self.job.job_id})")
        if self.job or self.process and self.process.poll() is None:
            return None
        crash, self.process = f" (exit status {self.process.returncode})" if self.process else "", None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.lock is None:
                self.lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
            if not lock_descriptor(self.lock, blocking=False):
                self.close("elsewhere")
            elif self.complete():
                return self.close("complete")
            elif stopping or self.attempts == 2:
                return self.close("stopped" if stopping else "failed", crash)
            else:
                self.start()
        except OSError as error:
            return self.close("failed", f": {error}")
        return f"crashed: {self.name}{crash}, retrying" if crash else None

    def start(self):
        """Starts the process. It inherits the open lock, which is thus held until both it and the runner are gone."""
        for folder in set(self.folders()) - set(self.folders("checkpoint.pt")):
            shutil.rmtree(folder)  # killed before its first checkpoint
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
        options = dict(stdin=subprocess.DEVNULL, env=os.environ | threads, pass_fds=[self.lock])
        options |= dict(preexec_fn=lambda: prepare_process(self.cores))
        options["start_new_session"] = True  # Ctrl-C reaches the runner only
        with (self.folder / "log.txt").open("a") as log:
            print("$", shlex.join(self.command()), file=log, flush=True)
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, **options)
        self.state, self.attempts = "running", self.attempts + 1

    def close(self, state, why=""):
        """Sets the state and unlocks the run; returns the line that reports it, for a failed run with its log's end."""
        if self.lock is not None:
            os.close(self.lock)
        self.state, self.lock = state, None
        end = [f"{why}, the end of {self.folder}/log.txt:", *self.log()[-10:]] if state == "failed" else []
        return f"{state}: {self.name}" + "\n    ".join(end)

    def log(self):
        path = self.folder / "log.txt"
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def __call__(self):
        while not self.ended():
            if line := self.advance():
                print(line, flush=True)
            time.sleep(1)
        if self.state == "failed":
            raise RuntimeError(self.name)

    def checkpoint(self):
        """submitit calls this before the job's time is up: saves the training, and asks for another turn."""
        import submitit

        if self.process:
            self.process.terminate()
            self.process.wait()
        return submitit.helpers.DelayedSubmission(dataclasses.replace(self))


def prepare_process(cores):
    """In a new training process: Linux will end it as Ctrl-C does (with a checkpoint) when the runner dies."""
    if cores:
        os.sched_setaffinity(0, cores)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm warns all of a job's processes: submitit's is to act


def words(flags):
    """{"norm_obs": False, "gamma": 0.9, "sizes": [8, 8]} -> --no-norm-obs --gamma 0.9 --sizes 8 8"""
    result = []
    for name, value in flags.items():
        name, switch = name.replace("_", "-"), {"True": "--", "False": "--no-"}.get(str(value).title())
        values = value if isinstance(value, list) else [value]
        result += [switch + name] if switch else [f"--{name}", *map(str, values)]
    return result


def read_flags(kind, flags):
    """Args with these flags, read as the script will; BadInput if it does not take them."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return tyro.cli(kind, args=words(flags), prog="the script")
    except SystemExit:
        raise BadInput(re.sub(r"[─│╭╮╰╯|]|\+?-{4,}\+?", " ", said.getvalue()).split("For full")[0]) from None


def load_script(script, allowed):
    """The script as a module, which runs nothing; BadInput if it may not be imported."""
    path = (ROOT / script).resolve()
    own = path.parent == ROOT and re.fullmatch(r"(bpo|ppo|gbpo|grpo)_\w+\.py", path.name)
    if not own and path not in [ROOT / "benchmark" / "reference.py", *(other.resolve() for other in allowed)]:
        raise BadInput(f"{script or 'no script'} is none of the project's: --allow-script lets others run")
    sys.path.insert(0, str(path.parent))
    try:
        return importlib.import_module(path.stem)
    except Exception as error:
        raise BadInput(f"cannot import {script}: {error}") from None


@functools.cache
def check_task(module, **settings):
    if hasattr(module, "make_envs"):
        module.make_envs(module.Args(**settings), 1, 0)[0].close()


def plan(suite, args):
    """The runs of a suite, all variants and tasks of a seed before the next seed; or BadInput."""
    runs = {}
    for variant, task in itertools.product(suite.variants, suite.tasks):
        if task not in (variant.tasks or [task]):
            continue
        script = variant.script or suite.script
        label = variant.name or Path(script).stem
        try:
            module = load_script(script, args.allow_script)
            flags = {} if suite.total_timesteps is None else {"total_timesteps": suite.total_timesteps}
            for part in (suite, variant):
                flags |= part.flags | part.task_flags.get(task, {})
            parsed, default = read_flags(module.Args, flags), module.Args()
            if any(x in flags or getattr(parsed, x, 0) != getattr(default, x, 0) for x in RUNNERS):
                raise BadInput(f"the runner itself sets {', '.join(RUNNERS)}")
            check_task(module, env_id=task, **{x: y for x, y in vars(parsed).items() if x in ("env_backend", "algo")})
            for seed in [x for x in suite.seeds if x in (variant.seeds or [x])]:
                settings = dataclasses.replace(parsed, env_id=task, seed=seed)
                name = f"{label}__{task.replace('/', '-')}__{seed}"
                if name in runs:
                    raise BadInput(f"two runs have the name {name}")
                folder = args.output_dir / suite.name / name
                command = {"env_id": task, "seed": seed} | flags | {"output_dir": folder}
                settings, defaults = (json.loads(json.dumps(vars(x))) for x in (settings, default))
                settings |= {"script": Path(script).stem, "format": getattr(module, "FORMAT", None)}
                runs[name] = Run(name, folder, ROOT / script, command, settings)
                runs[name].check_settings(defaults)
        except ValueError as error:  # the script's own BadInput and pydantic's ValidationError, too
            raise BadInput(f"{suite.name}, {label}, {task}: {error}") from None
    return sorted(runs.values(), key=lambda run: suite.seeds.index(run.settings["seed"]))


def read_suite(args):
    """The sweep that the arguments ask for."""
    if args.suite and (args.flags or args.total_timesteps or (args.name, args.scripts) != (Args.name, Args.scripts)):
        raise BadInput("a suite file has its own name, scripts, total_timesteps and flags")
    try:
        table = {"name": args.suite.stem} | tomllib.loads(args.suite.read_text()) if args.suite else describe(args)
        if type(seeds := table.setdefault("seeds", 1)) is int:
            table["seeds"] = list(range(1, min(seeds, 10_001) + 1))
        suite = Suite.model_validate(table)
    except (OSError, ValueError) as error:
        raise BadInput(f"{args.suite or 'command line'}: {error}") from None
    named = {*args.tasks}.union(*([*part.tasks, *part.task_flags] for part in (suite, *suite.variants)))
    for task in named - {*suite.tasks}:
        raise BadInput(f"the suite has no task {task}: it has {', '.join(suite.tasks)}")
    for seed in {x for part in suite.variants for x in part.seeds} - {*suite.seeds}:
        raise BadInput(f"the suite has no seed {seed}, which a variant names")
    suite.tasks = [task for task in suite.tasks if not args.tasks or task in args.tasks]
    suite.seeds = [seed for seed in suite.seeds if args.seeds is None or seed <= args.seeds]
    if not suite.seeds:
        raise BadInput(f"the suite has no seed up to {args.seeds}")
    return suite


def describe(args):
    """The sweep of the command line, as a suite file has it."""
    named, variants = [option.partition("=") for option in args.flags], []
    for script, *flags in itertools.product(args.scripts, *([(x, y) for y in z.split(",")] for x, _, z in named)):
        label = "+".join([Path(script).stem, *map("=".join, flags)])
        variants.append({"name": label, "script": script, "flags": dict(flags)})
    suite = dict(name=args.name, tasks=list(args.tasks), total_timesteps=args.total_timesteps, variants=variants)
    return suite | dict(seeds=3 if args.seeds is None else args.seeds)


def board(runs, ended_before, start_time):
    """A line that sums up the sweep, and one of each run under way."""
    ended = sum(run.ended() for run in runs)
    each = (time.time() - start_time) / max(ended - ended_before, 1)
    left = timedelta(seconds=round(each * (len(runs) - ended))) if ended > ended_before else "?"
    states = sorted(Counter(run.state for run in runs).items(), reverse=True)
    active = [run for run in runs if run.state in ("running", "elsewhere")]
    width = max((len(run.name) for run in active), default=0)
    lines = [f"{run.name:{width}}  {''.join(run.log()[-1:])}" for run in active]
    return f"{len(runs)} runs: {', '.join(f'{n} {state}' for state, n in states)}; {left} left", lines


def submit(runs, suite, args):
    """Submits the runs as one job array, in their order. BadInput if submitit refuses."""
    import submitit

    # A job whose time is up resumes in a new turn, so that its limit need not cover a run.
    options = dict(timeout_min=240, cpus_per_task=1, slurm_array_parallelism=args.workers, name=suite.name)
    for name, _, value in (option.partition("=") for option in args.cluster_options):
        options[name] = int(value) if value.isdecimal() else value
    try:
        folder = args.output_dir / suite.name / ".submitit"
        executor = submitit.AutoExecutor(folder, cluster=args.cluster, slurm_max_num_timeout=1000)
        executor.update_parameters(**options)
    except Exception as error:
        raise BadInput(f"submitit: {error}") from None
    with executor.batch():
        jobs = [executor.submit(run) for run in runs]
    for run, job in zip(runs, jobs):
        run.state, run.job = "elsewhere", job


def follow(runs, workers):
    """Moves the runs on until all have ended, or signals have stopped them; returns the signals."""
    signals, passed_on, next_time, start = [], 0, 0, (sum(run.ended() for run in runs), time.time())
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    shares = [cores[i::workers] for i in range(workers)] if workers <= len(cores) else []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # which nohup sets
            signal.signal(number, lambda number, _: signals.append(number))
    live = Live(auto_refresh=False, transient=True) if sys.stdout.isatty() else None  # auto_refresh is a thread
    with live or contextlib.nullcontext():
        while left := [run for run in runs if not run.ended()]:
            for run in left:
                taken = [x.cores for x in left if x.process]
                may_start = not signals and len(taken) < workers
                if may_start and not run.process:
                    run.cores = next((share for share in shares if share not in taken), ())
                if (run.job or run.process or may_start) and (line := run.advance(bool(signals))):
                    print(line, flush=True)
            running = [run for run in left if run.process]
            if signals and not running:
                break
            if len(signals) > passed_on:  # the first one saves, the second one kills
                if signals[-1] == signal.SIGHUP:  # the terminal is gone: printing would fail
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                for run in running:
                    run.process.send_signal(signal.SIGKILL if passed_on else signal.SIGTERM)
            passed_on = len(signals)
            if time.time() > next_time:
                next_time, (line, lines) = time.time() + (1 if live else 30), board(runs, *start)
                live.update(Text("\n".join([line, *lines])), refresh=True) if live else print(line, flush=True)
            time.sleep(0.2)
    print(board(runs, *start)[0])
    return signals


def main(args):
    """Runs the sweep or prints its commands; returns the exit status."""
    if args.workers < 1 or args.cluster_options and not args.cluster:
        raise BadInput("--workers must be at least 1, and --cluster-options needs --cluster")
    suite, fork = read_suite(args), multiprocessing.get_context("fork")
    # In a process of its own: the scripts' libraries leave threads behind, and Linux sends the signal that
    # prepare_process asks for when each of the runner's threads dies, but the second SIGTERM ends a script unsaved.
    with ProcessPoolExecutor(1, fork, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        runs = pool.submit(plan, suite, args).result()
    for run in runs:
        run.state = "complete" if run.complete() else "waiting"
    todo, folder = [run for run in runs if not run.ended()], args.output_dir / suite.name
    resumable, done = sum(bool(run.folders("checkpoint.pt")) for run in todo), len(runs) - len(todo)
    about = f"{len(runs)} runs, {done} complete, {resumable} to resume, {len(todo) - resumable} to start"
    if args.dry_run:
        print("\n".join(shlex.join(run.command()) for run in todo))
        print(about, file=sys.stderr)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{about}; {folder}", flush=True)
    if args.cluster and todo:
        submit(todo, suite, args)
    signals = follow(runs, args.workers)
    if failed := [run.name for run in runs if run.state == "failed"]:
        print("failed:", ", ".join(failed))
    if signals:
        print("stopped: the same command goes on from here" + "; the jobs go on" * bool(args.cluster))
    return 0 if all(run.state == "complete" for run in runs) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except (BadInput, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped before anything was started")
