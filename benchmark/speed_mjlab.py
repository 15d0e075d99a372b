"""Training speed of the locomotion scripts beside RSL-RL's own PPO, on one of mjlab's tasks.

    pip install -r requirements-mjlab.txt
    python benchmark/speed_mjlab.py
    python benchmark/speed_mjlab.py --device cuda --env-id Mjlab-Velocity-Rough-Unitree-G1 --num-envs 4096

All have the same environments, networks, normalisation of observations (mjlab's choice for the task), learning rate
schedule, 24 steps and 4 minibatches; PPO has 5 epochs, BPO, as in the paper, 10 and a third network. They run in turn,
round by round, pinned to the same cores, so that they share whatever else the machine is doing. A figure is steps per
second of wall time after the warm-up: acting, simulation, learning and, for our scripts, logging; RSL-RL's is off.
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
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 5  # iterations
PEER = "RSL-RL PPO"
PROGRAMS = tuple(
    script + flags
    for script in ("ppo_locomotion", "bpo_locomotion")
    for flags in ("", " --compile", " --bf16 --compile")
)


@dataclass
class Args:
    env_id: str = "Mjlab-Cartpole-Balance"
    """mjlab's task"""
    num_envs: int = 512
    """environments stepped in parallel"""
    hidden_sizes: tuple[int, ...] = (512, 256, 128)
    """widths of the hidden layers of every network"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where all of it runs"""
    programs: tuple[Literal[PROGRAMS], ...] = PROGRAMS
    """what to measure beside RSL-RL: scripts with flags"""
    rounds: int = 3
    """measurements of each"""
    iterations: int = 20
    """iterations of each measurement after 5 of warm-up, of 24 steps per environment"""
    cores: tuple[int, ...] = (0,)
    """processor cores that all are pinned to, one thread each"""
    output: str = "benchmark/results/mjlab_speed"
    """folder for speed.json and speed.md"""
    peer: bool = False
    """run RSL-RL once and print its figure (used by the script itself)"""


def run_peer(args):
    """Trains RSL-RL's PPO with mjlab's settings for the task, but for --hidden-sizes and 24 steps; prints steps/s."""
    import dataclasses

    import mjlab.tasks  # noqa: F401 (registers the tasks)
    from mjlab.envs import ManagerBasedRlEnv
    from mjlab.rl import RslRlVecEnvWrapper
    from mjlab.rl.runner import MjlabOnPolicyRunner
    from mjlab.tasks.registry import load_env_cfg, load_rl_cfg
    from mjlab.utils.torch import configure_torch_backends

    configure_torch_backends()
    env_cfg = load_env_cfg(args.env_id)
    env_cfg.scene.num_envs = args.num_envs
    envs = RslRlVecEnvWrapper(ManagerBasedRlEnv(env_cfg, args.device))
    cfg = load_rl_cfg(args.env_id)
    cfg.num_steps_per_env = 24
    cfg.actor.hidden_dims = cfg.critic.hidden_dims = args.hidden_sizes
    # Ours look for NaN once per iteration; RSL-RL would in every step, and wait for a GPU each time.
    cfg = dataclasses.asdict(cfg) | {"check_for_nan": False}
    runner = MjlabOnPolicyRunner(envs, cfg, None, args.device)
    runner.learn(WARM_UP, init_at_random_ep_len=True)
    start = time.perf_counter()
    runner.learn(args.iterations)  # ends with the losses on the CPU
    print(args.iterations * 24 * args.num_envs / (time.perf_counter() - start))


def measure(program, args, norm_obs):
    """Steps per second of one program, pinned to the cores; norm_obs: whether ours normalise observations."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(args.cores))}
    sizes = [f"--env-id={args.env_id}", f"--num-envs={args.num_envs}", f"--device={args.device}", "--hidden-sizes"]
    sizes += map(str, args.hidden_sizes)
    with tempfile.TemporaryDirectory() as folder:
        if program == PEER:
            words = [__file__, *sizes, "--peer", f"--iterations={args.iterations}"]
        else:
            name, *flags = program.split()
            flags += ["--init-std=1.0", "--learning-rate=1e-3", "--eval-episodes=1"]
            flags += ["--norm-obs" if norm_obs else "--no-norm-obs"]
            steps = 24 * args.num_envs * (WARM_UP + args.iterations)
            words = [str(ROOT / f"{name}.py"), *sizes, *flags, f"--total-timesteps={steps}", f"--output-dir={folder}"]
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, args.cores),
        )
        if done.returncode:
            raise SystemExit(f"error: {' '.join(words)} failed: {done.stderr.strip().splitlines()[-1]}")
        if program == PEER:
            return float(done.stdout.splitlines()[-1])
        lines = next(Path(folder).glob("*/metrics.csv")).read_text().splitlines()
        rows = [dict(zip(lines[0].split(","), map(float, line.split(",")))) for line in lines[1:]]
        first, last = rows[WARM_UP - 1], rows[-1]
        return (last["step"] - first["step"]) / (
            last["step"] / last["charts/SPS"] - first["step"] / first["charts/SPS"]
        )


def bad_input(line):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def main(args):
    if not importlib.util.find_spec("rsl_rl"):
        bad_input("RSL-RL is not installed, it comes with mjlab: pip install -r requirements-mjlab.txt")
    if args.iterations < 1 or args.rounds < 1:
        bad_input("--iterations and --rounds must be at least 1")
    os.environ["MUJOCO_GL"] = "disable"
    import mjlab.tasks  # noqa: F401 (registers the tasks)
    import torch
    from mjlab.tasks.registry import list_tasks, load_rl_cfg

    if args.env_id not in list_tasks():
        bad_input(f"mjlab has no task {args.env_id}: it has {', '.join(list_tasks())}")
    if args.device == "cuda" and not torch.cuda.is_available():
        bad_input("--device cuda needs a GPU and a CUDA build of PyTorch: there is none here, pass --device cpu")
    norm_obs = load_rl_cfg(args.env_id).actor.obs_normalization
    figures = {program: [] for program in (PEER, *args.programs)}
    for _ in range(args.rounds):
        for program, found in figures.items():
            found.append(measure(program, args, norm_obs))
            print(f"{program}: {found[-1]:.0f} steps/s", flush=True)
    results, table = [], ["| program | steps/s | times RSL-RL (min to max) |", "|-|-|-|"]
    for program, found in figures.items():
        ratios = [speed / peer for speed, peer in zip(found, figures[PEER])]
        row = dict(env_id=args.env_id, num_envs=args.num_envs, hidden_sizes=args.hidden_sizes, device=args.device)
        row |= dict(cores=len(args.cores), program=program, steps_per_second=statistics.median(found))
        row |= dict(ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios))
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
    run_peer(arguments) if arguments.peer else main(arguments)
