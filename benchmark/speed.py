"""Training speed of the scripts beside their peers, measured in turn on the same cores.

    pip install -r requirements-dev.txt -r benchmark/requirements.txt
    python benchmark/speed.py --pair continuous

All programs of a pair (see speed.toml) run round by round, pinned to the same cores. A figure is steps (llm: completion
tokens) per second of wall time after the warm-up: acting, simulation, learning and logging. A ratio is to the peer in
the same round. Imports, compilation and the end are given apart.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pandas as pd
import tyro
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from report import markdown, stop

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {x: SimpleNamespace(**y) for x, y in tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).items()}


@dataclass
class Args:
    pair: Literal[*PAIRS]  # what to measure beside its peer
    programs: tuple[str, ...] = ()  # scripts with flags, each in quotes, in place of the pair's own choice
    rounds: PositiveInt = 3  # measurements of each
    iterations: PositiveInt | None = None  # of each measurement, warm-up included
    env_id: str | None = None  # task
    num_envs: int | None = None  # locomotion, mjlab: environments stepped in parallel
    hidden_sizes: tuple[int, ...] | None = None  # continuous: widths to measure; mjlab: widths of the layers
    device: Literal["cpu", "cuda"] | None = None  # mjlab: where all of it runs
    cores: tuple[int, ...] = (0,)  # processor cores that all are pinned to, one thread each
    output: Path = Path("runs/speed")  # folder for speed.json and speed.md


def steady_rate(points, warm_up):
    """Work per second after the warm-up, from (work done, time) at the start and after each iteration."""
    (work, start), (total, end) = points[warm_up], points[-1]
    return (total - work) / (end - start)


def take_turns(programs, peer, rounds, measure):
    """[(run, the peer's rate in the same round)] of each program and the peer, which is one, by measure(program)."""
    found = {program: [] for program in programs}
    for _ in range(rounds):
        runs = {program: measure(program) for program in programs}
        for program, run in runs.items():
            found[program].append((run, runs[peer]["rate"]))
    return found


def summarise(found, rate):
    """Medians over [(run, the peer's rate)], that of the rates under the name rate, and the ratios' range."""
    ratios = [run["rate"] / beside for run, beside in found]
    row = {rate: statistics.median(run["rate"] for run, _ in found)}
    row |= dict(ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios))
    return row | dict(other_seconds=statistics.median(run["other_seconds"] for run, _ in found))


def table(rows, pair):
    """The Markdown of speed.md from the rows of speed.json."""
    lines = []
    for row in rows:
        cells = {x: row[x] for x in pair.columns}
        cells |= {"program": f"`{row['program']}`", f"{pair.unit}/s": f"{row[pair.rate]:.0f}"}
        cells[f"{pair.ratio} (min to max)"] = "{ratio:.2f} ({ratio_min:.2f} to {ratio_max:.2f})".format(**row)
        lines.append(cells | {"start-up and end, s": f"{row['other_seconds']:.0f}"})
    return markdown(lines) + "\n"


def read_metrics(folder, pair):
    """What the peers return, for a run of ours."""
    rows = pd.read_csv(next(Path(folder).glob("*/metrics.csv")))
    tokens = pair.unit == "completion tokens"
    work = (512 * rows["completions/mean_length"]).cumsum() if tokens else rows["step"]
    return [(0, 0), *zip(work, rows["step"] / rows["charts/SPS"])]


def run_pinned(words, cores):
    options = dict(capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(len(cores))})
    pin = partial(os.sched_setaffinity, 0, cores)
    done = subprocess.run([sys.executable, *words], preexec_fn=pin, **options)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise SystemExit(f"error: {shlex.join(words)} failed: {last}")
    return done.stdout


def measure(program, pair, case, cores):
    """Runs one program: its steady rate, and its seconds besides."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if program == pair.peer:
            # It prints (work done, time) at the start and after each iteration.
            output = run_pinned([str(ROOT / "benchmark" / "peers" / pair.script), json.dumps(case)], cores)
            points = json.loads(output.splitlines()[-1])
        else:
            script, *flags = shlex.split(program)
            steps = pair.steps * case["iterations"] * case.get("num_envs", 1)
            common = [*pair.flags.format(**case).split(), f"--total-timesteps={steps}", f"--output-dir={folder}"]
            run_pinned([str(ROOT / f"{script}.py"), *common, *flags], cores)
            points = read_metrics(folder, pair)
    if len(points) < pair.warm_up + 2:
        raise SystemExit(f"error: {program} had only {len(points) - 1} iterations: raise --iterations")
    rate = steady_rate(points, pair.warm_up)
    other = time.perf_counter() - start - points[-1][0] / rate
    print(f"{program}: {rate:.0f} {pair.unit}/s, {other:.1f} s besides", flush=True)
    return dict(rate=rate, other_seconds=other)


def make_cases(args, pair, folder):
    """What to measure, a dict each: one, or for continuous one for each width."""
    given = {name: x for name, x in vars(args).items() if name in pair.defaults and x is not None}
    case = dict(cores=len(args.cores), warm_up=pair.warm_up) | pair.defaults | given
    if args.pair == "continuous":
        return [case | dict(hidden_size=width) for width in case["hidden_sizes"]]
    if args.pair == "llm":  # one model for all
        script = str(ROOT / "gbpo_llm.py")
        run_pinned([script, f"--output-dir={folder}", "--total-timesteps=0", "--device=cpu"], args.cores)
        case["model"] = str(next(Path(folder).glob("*/model")))
    if args.pair == "mjlab":
        os.environ["MUJOCO_GL"] = "disable"
        import mjlab.tasks  # noqa: F401 (registers the tasks)
        from mjlab.tasks.registry import list_tasks, load_rl_cfg

        if case["env_id"] not in list_tasks():
            stop(f"mjlab has no task {case['env_id']}: it has {', '.join(list_tasks())}")
        case["norm_obs"] = "norm-obs" if load_rl_cfg(case["env_id"]).actor.obs_normalization else "no-norm-obs"
        case["layers"] = " ".join(map(str, case["hidden_sizes"]))
    return [case]


def check(args, pair):
    for name in ("env_id", "num_envs", "hidden_sizes", "device"):
        if getattr(args, name) is not None and name not in pair.defaults:
            stop(f"--{name.replace('_', '-')} does not belong to --pair {args.pair}")
    if not all(map(find_spec, pair.needs)):
        stop(f"{' or '.join(pair.needs)} is not installed: see the top of {__file__}")
    if not args.cores or not {*args.cores} <= (cores := os.sched_getaffinity(0)):
        stop(f"--cores must be among {cores}")


def main(args):
    pair = PAIRS[args.pair]
    programs = args.programs or pair.programs
    check(args, pair)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in make_cases(args, pair, folder):
            columns = {name: case[name] for name in pair.columns}
            print(columns, flush=True)
            run = partial(measure, pair=pair, case=case, cores=args.cores)
            for program, found in take_turns([*programs, pair.peer], pair.peer, args.rounds, run).items():
                rows.append(columns | dict(program=program) | summarise(found, pair.rate))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.output / "speed.md").write_text(table(rows, pair))
    print(table(rows, pair), end="")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
