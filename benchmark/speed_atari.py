"""Training speed on Atari beside Stable-Baselines3's PPO (CnnPolicy, make_atari_env) on the same cores and settings.

    pip install -r benchmark/requirements.txt
    python benchmark/speed_atari.py

All run in turn, round by round, pinned to the same cores, so that they share whatever else the machine is doing. All
have 8 environments, 128 steps, minibatches of 256 and 4 epochs. A figure is steps per second of wall time after the
warm-up: acting, simulation, learning and logging. The seconds that our scripts spend on each are given as well.
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
WARM_UP = 2  # iterations
PEER = "stable-baselines3"
PROGRAMS = (
    "bpo_atari_envpool",
    "ppo_atari_envpool",
    "bpo_atari_envpool --bf16",
    "ppo_atari_envpool --bf16",
    PEER,
)


@dataclass
class Args:
    game: str = "Breakout"
    """game"""
    rounds: int = 3
    """measurements of each"""
    iterations: int = 12
    """iterations of 1024 steps of each measurement"""
    cores: tuple[int, ...] = (0,)
    """processor cores that all are pinned to; PyTorch gets as many threads"""
    output: str = "benchmark/results/atari_speed"
    """folder for speed.json and speed.md"""
    peer: bool = False
    """run Stable-Baselines3 once and print its figures (used by the script itself)"""


def steady_rate(steps, seconds):
    """Steps per second after the warm-up, from the cumulative steps and seconds at the end of each iteration."""
    return (steps[-1] - steps[WARM_UP]) / (seconds[-1] - seconds[WARM_UP])


def run_peer(args):
    """Trains Stable-Baselines3's PPO and prints its steady rate."""
    import ale_py
    import gymnasium as gym
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    class Clock(BaseCallback):
        def __init__(self):
            super().__init__()
            self.steps, self.seconds = [], []

        def _on_step(self):
            return True

        def _on_rollout_start(self):
            self.steps.append(self.num_timesteps)
            self.seconds.append(time.perf_counter())

    gym.register_envs(ale_py)
    torch.set_num_threads(len(args.cores))
    envs = VecFrameStack(make_atari_env(f"{args.game}NoFrameskip-v4", n_envs=8, seed=1), 4)
    settings = dict(n_steps=128, n_epochs=4, batch_size=256, gamma=0.98, learning_rate=2.5e-4, ent_coef=0.01)
    clock = Clock()
    PPO("CnnPolicy", envs, **settings, device="cpu").learn((args.iterations + 1) * 1024, callback=clock)
    print(json.dumps({"rate": steady_rate(clock.steps, clock.seconds)}))


def measure(name, args):
    """Runs one program on the cores; its steady steps per second, and seconds per 1000 steps in each phase."""
    script, *flags = name.split()
    with tempfile.TemporaryDirectory() as folder:
        if name == PEER:
            settings = ["--peer", f"--game={args.game}", f"--iterations={args.iterations}"]
            settings += ["--cores", *map(str, args.cores)]
            command = [sys.executable, __file__, *settings]
        else:
            settings = [f"--env-id={args.game}-v5", f"--total-timesteps={args.iterations * 1024}", "--update-epochs=4"]
            settings += ["--eval-episodes=1", "--device=cpu", f"--output-dir={folder}", *flags]
            command = [sys.executable, str(ROOT / f"{script}.py"), *settings]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(len(args.cores))},
            preexec_fn=lambda: os.sched_setaffinity(0, args.cores),
        )
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
        if name == PEER:
            return json.loads(done.stdout.splitlines()[-1])["rate"], None
        lines = next(Path(folder).glob("*/metrics.csv")).read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), map(float, line.split(",")))) for line in lines[1:]]
    rate = steady_rate([row["step"] for row in rows], [row["step"] / row["charts/SPS"] for row in rows])
    late = rows[WARM_UP + 1 :]
    seconds = {name: sum(row[f"time/{name}"] for row in late) for name in ("simulation", "rollout", "update")}
    scale = 1000 / (rows[-1]["step"] - rows[WARM_UP]["step"])
    phases = (seconds["simulation"], seconds["rollout"] - seconds["simulation"], seconds["update"])
    return rate, [x * scale for x in phases]


def bad_input(line):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def main(args):
    if not all(map(importlib.util.find_spec, ("stable_baselines3", "ale_py", "cv2"))):
        bad_input("Stable-Baselines3, ale-py or OpenCV is not installed: pip install -r benchmark/requirements.txt")
    if args.iterations < WARM_UP + 2 or args.rounds < 1:
        bad_input(f"--iterations must be at least {WARM_UP + 2}, --rounds at least 1")
    figures = {name: [] for name in PROGRAMS}
    for _ in range(args.rounds):
        for name in PROGRAMS:
            figures[name].append(measure(name, args))
            print(name, f"{figures[name][-1][0]:.0f} steps/s", flush=True)
    results, table = (
        [],
        ["| program | steps/s | times SB3 (min to max) | simulation | acting | update |", "|-|-|-|-|-|-|"],
    )
    for name, runs in figures.items():
        ratios = [run[0] / peer[0] for run, peer in zip(runs, figures[PEER])]
        row = dict(program=name, game=args.game, cores=len(args.cores))
        row["steps_per_second"] = statistics.median(run[0] for run in runs)
        row["ratio"], row["ratio_min"], row["ratio_max"] = statistics.median(ratios), min(ratios), max(ratios)
        phases = ["-"] * 3
        if name != PEER:
            medians = [statistics.median(x) for x in zip(*(run[1] for run in runs))]
            row |= dict(zip(("simulation", "acting", "update"), medians))
            phases = [f"{x:.2f}" for x in medians]
        results.append(row)
        ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        table.append("| " + " | ".join([f"`{name}`", f"{row['steps_per_second']:.0f}", ratio, *phases]) + " |")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "speed.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    run_peer(arguments) if arguments.peer else main(arguments)
