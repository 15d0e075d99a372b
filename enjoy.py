"""Evaluate and film what a control script has trained.

    python enjoy.py RUN_DIR [RUN_DIR ...] --video

A finished run is played with its agent.pt, an interrupted one with its checkpoint.pt. Training's files stay as they
are: each call adds a row to RUN_DIR/evaluations.csv and a film to RUN_DIR/videos. From Python:

    act = load_agent("examples/Hopper-v4__bpo_continuous_action")
    env = gymnasium.make("Hopper-v4")
    obs, _ = env.reset()
    obs, reward, terminated, truncated, _ = env.step(act(obs))
"""

import functools
import json
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C leaves no traceback

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
import tyro
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

import bpo_atari_envpool
import bpo_continuous_action
import bpo_locomotion
import ppo_atari_envpool
import ppo_continuous_action
import ppo_locomotion
from bpo_continuous_action import BadInput, one_line, say

CONTROL, ATARI = (bpo_continuous_action, ppo_continuous_action), (bpo_atari_envpool, ppo_atari_envpool)
ROBOTS = bpo_locomotion, ppo_locomotion
SCRIPTS = {x.SCRIPT: x for x in CONTROL + ATARI + ROBOTS}  # nothing else is ever imported


@dataclass(config=dict(extra="forbid", hide_input_in_errors=True))
class Options:
    # folders of runs
    run_dirs: Annotated[
        tuple[str, ...], Field(min_length=1), tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR ...")
    ]
    episodes: Annotated[int, Field(ge=1, le=10_000)] = 10  # environments; the first episode of each counts
    # seed of simulators and sampled actions; default: the run's own
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stochastic: bool = False  # sample actions, as training does, not the most probable ones
    env_id: str | None = None  # another task with the same observation and action sizes
    # film an episode: in Gymnasium's version of the task, of Atari games and legged robots in their simulator
    video: bool = False
    max_steps: PositiveInt = 10_000  # episodes are cut after so many steps
    # of a legged robot's film: velocity forwards and to the left (m/s) and of turning left (rad/s), kept throughout
    command: tuple[float, float, float] | None = None
    # of a legged robot: write its policy to RUN_DIR/policy.pt2 (torch.export), which needs no file of ours
    export: bool = False


def load_agent(run_dir, env_id=None):
    """A run's policy, a function: obs[..., O] -> action[..., A], arrays. ValueError if there is none."""
    return functools.partial(act, load(run_dir, env_id).agent)


@torch.no_grad()
def act(agent, obs, stochastic=False):
    """obs[..., O] -> action[..., A] as the simulator takes it, arrays"""
    policy = agent(agent.normalize(torch.as_tensor(obs, dtype=torch.float32)))
    return np.asarray(agent.to_env(policy.sample() if stochastic else policy.mode))


def load(run_dir, env_id=None):
    """A run, on its task or another: dir, script (a module), args, agent, its file and step; BadInput if damaged"""
    try:
        name = json.loads(Path(run_dir, "args.json").read_bytes())["script"]
    except Exception as error:  # damaged files raise many kinds
        raise BadInput(f"{run_dir} is no run: {one_line(error)}") from None
    if name not in list(SCRIPTS):  # a name that is no text has no hash
        raise BadInput(f"{run_dir} is a run of {name!r:.50}, not of {', '.join(SCRIPTS)}")
    script, file = SCRIPTS[name], "agent.pt" if Path(run_dir, "agent.pt").exists() else "checkpoint.pt"
    args, checkpoint = script.load_run(run_dir, file)
    if script not in CONTROL:
        args.device = "cpu"
    if ":" in args.env_id and not env_id:  # module:task, code that a file names is not run
        task = shlex.quote(args.env_id)
        raise BadInput(f"the task of {run_dir} is code of your own: if it is yours, add --env-id {task}")
    args.env_id = env_id or args.env_id
    step = checkpoint.get("step", args.total_timesteps)  # older agents have none
    weights = checkpoint["agent"]
    run = SimpleNamespace(dir=run_dir, script=script, args=args, weights=weights, file=file, step=step)
    envs, *spaces = script.make_envs(args, 1, 0)
    run.agent = make_agent(run, envs, *spaces)
    envs.close()
    return run


def make_agent(run, envs, obs_space, action_space):
    """The agent for a task of these sizes, with the run's weights; BadInput if they do not fit."""
    sizes = [obs_space.shape[0], *([envs.privileged_size] if run.script in ROBOTS else [])]
    sizes += [action_space.n] if run.script in ATARI else [action_space.low, action_space.high]
    try:
        agent = run.script.Agent(*sizes, run.args)
        agent.load_state_dict(run.weights)
    except Exception:
        task = f"{run.args.env_id}, which observes {obs_space} and is acted on by {action_space}"
        raise BadInput(f"{run.file} of {run.dir} does not fit its args.json or {task}") from None
    return agent


def check(run_dir, options):
    """The run, on its task or another one; BadInput if it cannot be played, or filmed, there."""
    run = load(run_dir, options.env_id)
    if options.export and run.script not in ROBOTS:
        raise BadInput(f"--export is for legged robots, and {run_dir} is none: load_agent() serves it from Python")
    if options.command and not options.video:
        raise BadInput("--command is for films: add --video")
    run.steer = functools.partial(steer, find_command(run), options.command) if options.command else lambda obs: obs
    if options.video:
        camera, *_ = open_camera(run, 0)
        if run.script in CONTROL:  # Gymnasium's version of the task
            make_agent(run, camera, camera.observation_space, camera.action_space)
        camera.close()  # two at a time leave one of them black
    return run


def find_command(run):
    """The first of the three observations that hold the commanded velocity; BadInput if the simulator tells none."""
    envs, *_ = run.script.make_envs(run.args, 8, 0)
    try:
        obs, info = envs.envs.reset()  # EnvPool's own, which has both
        state, command = obs["state"], info["command"]
        (first,) = (i for i in range(state.shape[1] - 2) if np.allclose(state[:, i : i + 3], command))
    except (AttributeError, TypeError, KeyError, IndexError, ValueError):
        raise BadInput(f"--command: {run.args.env_id} shows no command of velocity that could be replaced") from None
    finally:
        envs.close()
    return first


def steer(first, command, obs):
    """The observation [N, O] of a robot that is told to go elsewhere."""
    obs = obs.clone()
    obs[:, first : first + 3] = torch.tensor(command)
    return obs


def open_camera(run, seed):
    """A simulator that can render, its steps per second and observation; else BadInput, which says what to install."""
    env_id = run.args.env_id
    try:
        import imageio_ffmpeg  # noqa: F401, which writes the film

        if run.script in CONTROL:
            robot = str(gym.spec(env_id).entry_point).startswith("gymnasium.envs.mujoco")
            follow = {"camera_name": "track"} if robot else {}  # else Gymnasium 1.4.0 lets robots leave the picture
            env = gym.make(env_id, render_mode="rgb_array", **follow)
            fps = env.metadata.get("render_fps", 30)
        else:
            env, *_ = run.script.make_envs(run.args, 1, [seed, 2**64], render=True)
            fps = getattr(env, "fps", 15)  # Atari: four of 60 frames per step
        obs, _ = env.reset(**({"seed": seed} if run.script in CONTROL else {}))
        if np.ndim(picture(env)) != 3:
            raise ValueError("it renders no picture")
    except gym.error.UnregisteredEnv:
        raise BadInput(f"cannot film {env_id}: only EnvPool has this task, Gymnasium has not") from None
    except Exception as error:  # whatever a simulator, or what it imports, raises
        sys.unraisablehook = lambda _: None  # silences half-made viewers
        need = 'MuJoCo needs EGL (apt-get install libegl1 libgl1), others pip install "gymnasium[box2d]"'
        raise BadInput(f"cannot film {env_id}: {one_line(error)}. {need}") from None
    return env, fps, obs


def picture(env):
    """The next frame of a film, [H, W, 3]; some simulators give one per environment."""
    frame = np.asarray(env.render())
    return frame[0] if frame.ndim == 4 else frame


class LiveLine:
    """Shows the newest text ten times a second, or every 30 s in a log."""

    def __init__(self):
        self.live, self.time = os.isatty(1), time.time()

    def __call__(self, text):
        if time.time() - self.time > (0.1 if self.live else 30):
            say(f"{text:<60}", end="\r" if self.live else "\n")
            self.time = time.time()


def take_step(run, env, action):
    """Gymnasium's step: obs, rewards, whether the episode is over, and a robot's terms of the reward, name -> mean."""
    obs, rewards, terminated, truncated, info = env.step(torch.as_tensor(action) if run.script in ROBOTS else action)
    if run.script in ATARI:  # a game goes on after a lost life, and has its own reward
        rewards, terminated = info["reward"], info["terminated"].astype(bool)
    return obs, np.asarray(rewards), np.asarray(terminated | truncated), info.get("logs", {})


def evaluate(run, policy, envs, max_steps, terms):
    """Plays one episode in each environment, or max_steps of it: the returns [N] and how many were cut.

    Adds each step's rewards for following the command, means over all robots, and their number of steps, to terms: a
    robot that only stands may have a high return.
    """
    obs, _ = envs.reset()
    returns, running, step, show = np.zeros(len(obs)), np.ones(len(obs), bool), 0, LiveLine()
    while running.any() and step < max_steps:
        obs, rewards, over, logs = take_step(run, envs, policy(obs))
        terms.update({name: float(x) for name, x in logs.items() if "track" in name} | {"steps": 1})
        returns[running] += rewards[running]
        running &= ~over
        step += 1
        show(f"step {step}, {(~running).sum()} of {len(obs)} episodes finished")
    return returns, int(running.sum())


def film(run, policy, seed, max_steps):
    """Films an episode into a new file, with about 30 frames per simulated second."""
    (env, fps, obs), folder, show = open_camera(run, seed), Path(run.dir, "videos"), LiveLine()
    folder.mkdir(exist_ok=True)
    path = folder / re.sub(r"[^\w.-]", "-", f"{run.args.env_id}__{time.time():.6f}.mp4")
    unfinished = path.with_suffix(".unfinished.mp4")  # what Ctrl-C leaves cannot be played
    total, step, over, every = 0.0, 0, False, max(1, round(fps / 30))
    with imageio.get_writer(unfinished, fps=fps / every, macro_block_size=2) as video:
        while not over and step < max_steps:
            if step % every == 0:
                video.append_data(picture(env))
            obs, reward, over, _ = take_step(run, env, policy(run.steer(obs)))
            total, step = total + reward.item(), step + 1
            show(f"filming, step {step}")
    env.close()
    unfinished.rename(path)
    say(f"film of {step} steps, return {total:.5g}: {path}")


class Deterministic(torch.nn.Module):
    """The most probable action, with the normaliser and the bounds of actions: obs[N, O] -> action[N, A]"""

    def __init__(self, agent):
        super().__init__()
        self.agent = agent

    def forward(self, obs):
        return self.agent.to_env(self.agent(self.agent.normalize(obs)).mode)


def export(run):
    """Writes policy.pt2 into the run's folder: torch.export.load(path).module() maps obs[N, O] to action[N, A]."""
    example = torch.zeros(2, len(run.agent.obs_stats.mean))
    sizes = {"obs": {0: torch.export.Dim("N")}}
    program = torch.export.export(Deterministic(run.agent), (example,), dynamic_shapes=sizes)
    torch.export.save(program, path := Path(run.dir, "policy.pt2"))
    say(f"policy: {path}; torch.export.load(path).module() maps observations {list(example.shape[1:])} to actions")


def play(run, options):
    """Evaluates a run, prints and records the result; films and exports it on demand."""
    seed = run.args.seed if options.seed is None else options.seed
    torch.manual_seed(seed)
    policy = functools.partial(act, run.agent, stochastic=options.stochastic)
    returns, cut, terms = np.zeros(0), 0, Counter()
    while len(returns) < options.episodes:
        size = options.episodes - len(returns)
        if run.script in ROBOTS:  # which need much memory: as many as have fitted in training
            size = min(size, run.args.num_envs)
        key = [seed, 2**64 + len(returns)]  # training has [seed, step], step < 2**64
        envs, *_ = run.script.make_envs(run.args, size, key)
        more, cut_too = evaluate(run, policy, envs, options.max_steps, terms)
        returns, cut = np.append(returns, more), cut + cut_too
        envs.close()
    result = f"return {returns.mean():.5g} +- {returns.std():.5g} over {len(returns)} episodes"
    steps = terms.pop("steps")
    result += "".join(f", {name.removeprefix('rewards/')} {x / steps:.3g}" for name, x in terms.items())
    how = "stochastic" if options.stochastic else "deterministic"
    cuts = f", {cut} episodes cut after {options.max_steps} steps" if cut else ""
    say(f"{run.dir}, {run.file} of step {run.step}: {run.args.env_id}, seed {seed}, {how}, {result}{cuts}")
    row = dict(time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), agent=run.file, step=run.step, env_id=run.args.env_id)
    row |= dict(seed=seed, episodes=len(returns), stochastic=options.stochastic, max_steps=options.max_steps, cut=cut)
    record(run, row | {name: f"{getattr(returns, name)():.8g}" for name in ("mean", "std", "min", "max")})
    if options.video:
        film(run, policy, seed, options.max_steps)
    if options.export:
        export(run)


def record(run, row):
    """Adds a row to the run's evaluations.csv."""
    try:
        with Path(run.dir, "evaluations.csv").open("a") as file:
            file.write("" if file.tell() else ",".join(row) + "\n")
            file.write(",".join(map(str, row.values())) + "\n")
    except OSError as error:
        print(f"the result is not recorded: {error}", file=sys.stderr)


def main(words):
    os.environ["PYDANTIC_ERRORS_INCLUDE_URL"] = "0"
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # films without a screen
    torch.set_num_threads(1)
    options = tyro.cli(Options, args=words, description=__doc__)
    try:
        runs = [check(x, options) for x in options.run_dirs]  # all of them before any is played
        for run in runs:
            play(run, options)
    except tuple(x.BadInput for x in SCRIPTS.values()) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
