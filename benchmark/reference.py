"""TRPO, PPO, SAC and DQN from their libraries, with RL-Zoo's settings for the task, to compare ours with.

    pip install -r benchmark/requirements.txt
    python benchmark/reference.py --algo trpo --env-id Hopper-v4 --seed 1 --total-timesteps 1000000

SBX (SAC), sb3-contrib (TRPO) and Stable-Baselines3 train. Their runs are folders for run.py and report.py.
A checkpoint is a pickle file, which can run code: resume only your own.
"""

import io
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections import deque
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

try:
    import sb3_contrib
    import sbx
    import stable_baselines3 as sb3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
except ImportError:
    sb3, BaseCallback = None, object

HEADERS = {"episodes.csv": "step,return,length\n"}
HEADERS["metrics.csv"] = "step,charts/mean_return_100,charts/mean_length_100,charts/SPS\n"
os.environ["PYDANTIC_ERRORS_INCLUDE_URL"] = "0"


class BadInput(ValueError):
    """One line, exit status 2."""


@dataclass(config=dict(extra="forbid", hide_input_in_errors=True))
class Args:
    algo: Literal["trpo", "ppo", "sac", "dqn"] = "trpo"
    env_id: str = "Hopper-v4"  # a task in reference_settings.toml; dqn: a game, Pong-v5 or PongNoFrameskip-v4
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # of all random numbers
    total_timesteps: PositiveInt = 1_000_000  # steps, all environments together
    output_dir: str = "runs"  # parent of the run's folder
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 300  # between checkpoints; DQN's have 2.8 GB
    resume: str | None = None  # RUN_DIR: go on with this run; no other options


def make_envs(args, *_):
    """The task as the library makes it, and RL-Zoo's settings; BadInput if there are none."""
    known = tomllib.loads(Path(__file__).with_name("reference_settings.toml").read_text())[args.algo]
    common, name = known.pop("all"), args.env_id.replace("-v5", "NoFrameskip-v4")
    if (task := "Atari" if "NoFrameskip" in name else name) not in known:
        raise BadInput(f"RL-Zoo has no settings of {args.algo} for {args.env_id}, only for {', '.join(known)}")
    if sb3 is None:
        raise BadInput("first: pip install -r benchmark/requirements.txt")
    settings = common | known[task]
    gym.logger.min_level = gym.logger.ERROR  # old task versions are asked for on purpose
    try:
        if task != "Atari":
            return make_vec_env(name, settings.pop("n_envs", 1)), settings
        import ale_py  # noqa: F401 (registers the games)

        return VecFrameStack(make_atari_env(name), 4), settings
    except Exception as error:  # Gymnasium raises many
        raise BadInput(f"cannot make {args.env_id}: {error}") from None


def make_model(args, saved):
    """The library's model, new or as saved."""
    envs, settings = make_envs(args)
    if settings.pop("normalize", False):
        envs = VecNormalize(envs, gamma=settings.get("gamma", 0.99))
        envs.obs_rms, envs.ret_rms = saved.get("normalizer", (envs.obs_rms, envs.ret_rms))
    library = {"trpo": sb3_contrib, "sac": sbx}.get(args.algo, sb3)
    algorithm = getattr(library, args.algo.upper())
    if saved:
        model = algorithm.load(io.BytesIO(saved["model"]), envs, device="cpu")
        if buffer := saved["replay_buffer"]:
            model.replay_buffer = buffer
            if buffer.optimize_memory_usage:  # the frames that follow will be another episode's
                buffer.dones[buffer.pos - 1] = True
    else:
        if "activation_fn" in (network := settings.get("policy_kwargs", {})):
            network["activation_fn"] = getattr(torch.nn, network["activation_fn"])
        model = algorithm(env=envs, seed=args.seed, device="cpu", **settings)
    # No simulator gets the random numbers of one with another seed, or from before the restart.
    model.set_random_seed(int(np.random.default_rng([args.seed, model.num_timesteps]).integers(2**31)))
    return model


class Run(BaseCallback):
    """Logs, progress, checkpoints and stop signals, for the library to call as it trains."""

    def __init__(self, args, folder, saved, model):
        super().__init__()
        self.args, self.dir, self.stopping, self.stopped = args, folder, False, False
        self.episodes, self.lengths = saved.get("episodes", deque(maxlen=100)), np.zeros(model.n_envs, int)
        self.first_step = self.row_step = model.num_timesteps
        self.start_time, self.save_time = time.time(), 0
        for name, size in saved.get("log_sizes", {}).items():
            os.truncate(folder / name, size)  # drops rows written after the checkpoint
        self.logs = {name: (folder / name).open("a") for name in HEADERS}
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request_stop)

    def request_stop(self, number, frame):
        """The first signal ends the run after the iteration, the next one at once."""
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)

    def _on_rollout_start(self):
        """After an update: the moment to save."""
        self.stopped = self.stopping
        if self.num_timesteps >= self.row_step + 2000:
            self.log()
        if self.stopped or time.time() >= self.save_time + self.args.checkpoint_seconds:
            self.save("checkpoint.pt", replay_buffer=getattr(self.model, "replay_buffer", None))

    def _on_step(self):
        if self.stopped:
            return False  # the checkpoint is from before this step
        self.lengths += 1
        for n, info in enumerate(self.locals["infos"]):
            if "episode" in info:  # with the sum of the simulator's own rewards, until the game is over
                self.episodes.append((info["episode"]["r"], int(self.lengths[n])))
                print(self.num_timesteps, *self.episodes[-1], sep=",", file=self.logs["episodes.csv"])
                self.lengths[n] = 0
        return True

    def _on_training_end(self):
        if not self.stopped:
            self.log()
            self.save("agent.pt")
            (self.dir / "checkpoint.pt").unlink()  # it may hold gigabytes

    def log(self):
        step = self.num_timesteps
        means = np.mean(self.episodes or [(np.nan, np.nan)], axis=0)
        sps, self.row_step = (step - self.first_step) / (time.time() - self.start_time), step
        print(step, *means, sps, sep=",", file=self.logs["metrics.csv"])
        left = max(self.args.total_timesteps - step, 0) / sps
        print(f"step {step}, {sps:.0f} steps/s, mean return {means[0]:.4g}, {left:.0f} s left", flush=True)

    def save(self, name, **state):
        """Writes all that a run needs to go on, so that there is never half a file."""
        for file in self.logs.values():
            file.flush()
            os.fsync(file.fileno())
        self.model.save(model := io.BytesIO())
        state |= dict(model=model.getvalue(), episodes=self.episodes)
        state["log_sizes"] = {x: file.tell() for x, file in self.logs.items()}
        if normalizer := self.model.get_vec_normalize_env():
            state["normalizer"] = normalizer.obs_rms, normalizer.ret_rms
        temporary = self.dir / f"{name}.tmp"
        with temporary.open("wb") as file:
            pickle.dump(state, file, protocol=5)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.dir / name)
        self.save_time = time.time()


def make_dir(args):
    """Makes the run's folder, with args.json."""
    folder = Path(args.output_dir, f"{args.env_id}__{args.algo}__{args.seed}__{time.time():.6f}")
    git = "git --no-optional-locks describe --always --dirty --abbrev=40"
    asked = subprocess.run(git, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    about = {"script": Path(__file__).stem, "commit": asked.stdout.strip(), "args": vars(args)}
    about["versions"] = {x.__name__: x.__version__ for x in (torch, gym, np, sb3, sb3_contrib, sbx)}
    folder.mkdir(parents=True)
    for name, text in (HEADERS | {"args.json": json.dumps(about, indent=2)}).items():
        (folder / name).write_text(text)
    return folder


def load_run(args):
    """The run to resume: folder, settings, checkpoint. BadInput if it cannot be."""
    folder = Path(args.resume)
    try:
        if args != Args(resume=args.resume):
            raise ValueError("--resume has other options beside it")
        settings = json.loads((folder / "args.json").read_bytes())["args"]
        with (folder / "checkpoint.pt").open("rb") as file:
            return folder, Args(**settings), pickle.load(file)
    except Exception as error:  # damaged files raise many kinds
        raise BadInput(f"cannot use the run {folder}: {error}") from None


def train(args):
    """Trains and returns the run's folder. BadInput before anything is created, SystemExit if stopped."""
    torch.set_num_threads(1)
    folder, args, saved = load_run(args) if args.resume else (None, args, {})
    model = make_model(args, saved)
    folder = folder or make_dir(args)
    run = Run(args, folder, saved, model)
    print(folder, flush=True)
    model.learn(args.total_timesteps - model.num_timesteps, run, None, reset_num_timesteps=False)
    if run.stopped:
        raise SystemExit(f"stopped; go on with: {shlex.join([sys.executable, __file__, '--resume', str(folder)])}")
    return folder


if __name__ == "__main__":
    try:
        train(tyro.cli(Args))
    except (BadInput, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
