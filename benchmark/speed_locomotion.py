"""Training speed of the locomotion scripts over that of the bare simulator, on the same cores.

    python benchmark/speed_locomotion.py

Both step the same EnvPool task with as many environments and threads. The simulator alone gets random actions with the
scripts' initial standard deviation. It is measured before and after every program, so that they share what else the
machine is doing. A program's figure is steps per second of wall time after the warm-up: acting, simulation, learning,
logging. The dummy steps that reset the simulator are counted in neither.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 5  # iterations
PROGRAMS = tuple(
    script + flags
    for script in ("bpo_locomotion", "ppo_locomotion")
    for flags in (" --matmul-precision highest", "", " --compile", " --bf16", " --bf16 --compile")
)


@dataclass
class Args:
    env_id: str = "Go1JoystickRoughTerrain-v1"
    """EnvPool's task"""
    num_envs: int = 128
    """environments stepped in parallel"""
    programs: tuple[Literal[PROGRAMS], ...] = PROGRAMS
    """what to measure: scripts with flags"""
    rounds: int = 3
    """measurements of each"""
    iterations: int = 25
    """iterations of each measurement, of 24 steps per environment"""
    cores: tuple[int, ...] = (0,)
    """processor cores that all are pinned to, one thread each"""
    output: str = "benchmark/results/locomotion_speed"
    """folder for speed.json and speed.md"""
    bare: bool = False
    """measure the simulator once and print its figure (used by the script itself)"""


def run_bare(args):
    """Steps the simulator alone and prints its steps per second."""
    import envpool
    import numpy as np

    envs = envpool.make(args.env_id, env_type="gymnasium", num_envs=args.num_envs, num_threads=len(args.cores), seed=1)
    rng, size = np.random.default_rng(1), envs.action_space.shape[0]
    actions = rng.normal(0, 0.35, (24, args.num_envs, size)).clip(-1, 1)
    envs.reset()
    steps = 0
    for iteration in range(args.iterations):
        if iteration == WARM_UP:
            steps, start = 0, time.perf_counter()
        for action in actions:
            *_, info = envs.step(action)
            steps += (info["elapsed_step"] > 0).sum()
    print(steps / (time.perf_counter() - start))


def measure(program, args):
    """Steps per second of one program, pinned to the cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(args.cores))}
    common = [f"--env-id={args.env_id}", f"--num-envs={args.num_envs}"]
    with tempfile.TemporaryDirectory() as folder:
        if program == "simulator":
            words = [__file__, *common, "--bare", f"--iterations={args.iterations}", "--cores", *map(str, args.cores)]
        else:
            name, *flags = program.split()
            steps = f"--total-timesteps={23 * args.num_envs * args.iterations}"  # without dummy steps
            words = [str(ROOT / f"{name}.py"), *common, *flags, steps, f"--output-dir={folder}", "--eval-episodes=1"]
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, args.cores),
        )
        if done.returncode:
            raise SystemExit(f"error: {' '.join(words)} failed: {done.stderr.strip().splitlines()[-1]}")
        if program == "simulator":
            return float(done.stdout.splitlines()[-1])
        lines = next(Path(folder).glob("*/metrics.csv")).read_text().splitlines()
        rows = [dict(zip(lines[0].split(","), map(float, line.split(",")))) for line in lines[1:]]
        first, last = rows[WARM_UP], rows[-1]
        seconds = last["step"] / last["charts/SPS"] - first["step"] / first["charts/SPS"]
        return (last["step"] - first["step"]) / seconds


def main(args):
    if args.iterations < WARM_UP + 2 or args.rounds < 1:
        print(f"error: --iterations must be at least {WARM_UP + 2}, --rounds at least 1", file=sys.stderr)
        sys.exit(2)
    pairs, before = {program: [] for program in args.programs}, measure("simulator", args)
    for _ in range(args.rounds):
        for program, found in pairs.items():
            speed, after = measure(program, args), measure("simulator", args)
            found.append(((before + after) / 2, speed))
            before = after
            print(program, "{1:.0f} of {0:.0f}".format(*found[-1]), flush=True)
    results, table = [], ["| program | steps/s | over the bare simulator (min to max) |", "|-|-|-|"]
    simulator = [(bare, bare) for found in pairs.values() for bare, _ in found]
    for program, found in {"simulator": simulator, **pairs}.items():
        ratios = [speed / bare for bare, speed in found]
        row = dict(env_id=args.env_id, num_envs=args.num_envs, cores=len(args.cores), program=program)
        row |= dict(steps_per_second=statistics.median(speed for _, speed in found), ratio=statistics.median(ratios))
        row |= dict(ratio_min=min(ratios), ratio_max=max(ratios))
        results.append(row)
        spread = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        table.append(f"| `{program}` | {row['steps_per_second']:.0f} | {spread} |")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "speed.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    run_bare(arguments) if arguments.bare else main(arguments)
