"""Training speed beside Stable-Baselines3's PPO: the same task, network, batch, epochs and environments on one core.

    pip install -r benchmark/requirements.txt
    python benchmark/speed.py

All run in turn, round by round, pinned to one core, so that they share whatever else the machine is doing. A figure is
steps per second of wall time after the warm-up: acting, simulation, learning and logging. Imports, compilation and the
final evaluation are given apart, in seconds.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 5  # iterations


@dataclass
class Args:
    env_id: str = "Hopper-v4"
    """task"""
    hidden_sizes: tuple[int, ...] = (64, 256)
    """widths of the two hidden layers to measure"""
    minibatch_sizes: tuple[int, ...] = (32, 64)
    """minibatch sizes to measure"""
    rounds: int = 3
    """measurements of each"""
    total_timesteps: int = 40_960
    """steps of each measurement"""
    core: int = 0
    """processor core that all are pinned to"""
    output: str = "benchmark/results/speed"
    """folder for speed.json and speed.md"""
    peer: bool = False
    """run Stable-Baselines3 once and print its figures (used by the script itself)"""


def steady_rate(steps, seconds):
    """Steps per second after the warm-up, from the cumulative steps and seconds at the end of each iteration."""
    return (steps[-1] - steps[WARM_UP]) / (seconds[-1] - seconds[WARM_UP])


def run_peer(args):
    """Trains Stable-Baselines3's PPO and prints its steady rate."""
    import gymnasium as gym
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Clock(BaseCallback):
        def __init__(self):
            super().__init__()
            self.steps, self.seconds = [], []

        def _on_step(self):
            return True

        def _on_rollout_start(self):
            self.steps.append(self.num_timesteps)
            self.seconds.append(time.perf_counter())

    gym.logger.min_level = gym.logger.ERROR
    torch.set_num_threads(1)
    size = args.hidden_sizes[0]
    network = dict(net_arch=dict(pi=[size, size], vf=[size, size]))
    envs = make_vec_env(args.env_id, n_envs=4)
    settings = dict(n_steps=512, n_epochs=10, batch_size=args.minibatch_sizes[0], device="cpu", policy_kwargs=network)
    clock = Clock()
    PPO("MlpPolicy", envs, **settings).learn(args.total_timesteps, callback=clock)
    print(json.dumps({"rate": steady_rate(clock.steps, clock.seconds)}))


def measure(name, hidden_size, minibatch_size, args):
    """Runs one program pinned to the core; its steady steps per second and its seconds besides."""
    sizes = [f"--total-timesteps={args.total_timesteps}", f"--env-id={args.env_id}"]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if name == "stable-baselines3":
            sizes += ["--peer", "--hidden-sizes", str(hidden_size), "--minibatch-sizes", str(minibatch_size)]
            command = [sys.executable, __file__, *sizes]
        else:
            sizes += [f"--hidden-size={hidden_size}", f"--minibatch-size={minibatch_size}", f"--output-dir={folder}"]
            command = [
                sys.executable,
                str(ROOT / f"{name.split()[0]}.py"),
                "--eval-episodes=1",
                *sizes,
                *name.split()[1:],
            ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, {args.core}),
        )
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
        wall = time.perf_counter() - start
        if name == "stable-baselines3":
            rate = json.loads(done.stdout.splitlines()[-1])["rate"]
        else:
            lines = next(Path(folder).glob("*/metrics.csv")).read_text().splitlines()
            rows = [dict(zip(lines[0].split(","), map(float, line.split(",")))) for line in lines[1:]]
            steps = [row["step"] for row in rows]
            rate = steady_rate(steps, [row["step"] / row["charts/SPS"] for row in rows])
    return rate, wall - args.total_timesteps / rate


def bad_input(line):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def main(args):
    if not importlib.util.find_spec("stable_baselines3"):
        bad_input("Stable-Baselines3 is not installed: pip install -r benchmark/requirements.txt")
    if args.total_timesteps < 2048 * (WARM_UP + 2) or args.rounds < 1:
        bad_input(f"--total-timesteps must be at least {2048 * (WARM_UP + 2)}, --rounds at least 1")
    programs = (
        "bpo_continuous_action",
        "ppo_continuous_action",
        "bpo_continuous_action --no-compile",
        "stable-baselines3",
    )
    results = []
    for hidden_size in args.hidden_sizes:
        for minibatch_size in args.minibatch_sizes:
            figures = {name: [] for name in programs}
            for _ in range(args.rounds):
                for name in programs:
                    figures[name].append(measure(name, hidden_size, minibatch_size, args))
                    print(hidden_size, minibatch_size, name, *(f"{x:.1f}" for x in figures[name][-1]), flush=True)
            for name, runs in figures.items():
                ratios = [run[0] / peer[0] for run, peer in zip(runs, figures["stable-baselines3"])]
                row = dict(hidden_size=hidden_size, minibatch_size=minibatch_size, program=name)
                row["steps_per_second"] = statistics.median(run[0] for run in runs)
                row["ratio"], row["ratio_min"], row["ratio_max"] = statistics.median(ratios), min(ratios), max(ratios)
                row["other_seconds"] = statistics.median(run[1] for run in runs)
                results.append(row)
    table = [
        "| network | minibatch | program | steps/s | times SB3 (min to max) | start-up and end, s |",
        "|-|-|-|-|-|-|",
    ]
    for row in results:
        size, ratio = row["hidden_size"], f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        cells = [f"{size}-{size}", row["minibatch_size"], f"`{row['program']}`", f"{row['steps_per_second']:.0f}"]
        table.append("| " + " | ".join(str(x) for x in [*cells, ratio, f"{row['other_seconds']:.0f}"]) + " |")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "speed.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    run_peer(arguments) if arguments.peer else main(arguments)
