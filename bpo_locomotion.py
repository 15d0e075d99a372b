"""Bounded Policy Optimization (BPO) for legged robots, with thousands of environments at once, in one file.

The best ratio of new to old policy within bounds has a formula. BPO regresses onto it; PPO climbs until a clip.
Ao et al., "Bounded Ratio Reinforcement Learning", https://arxiv.org/abs/2604.18578

The rest is what made PPO walk (RSL-RL): short rollouts of many robots, few large minibatches, a learning rate that
follows the KL divergence, and critics that see what the robot cannot. The task's name chooses the simulator:

    python bpo_locomotion.py --env-id Go1JoystickRoughTerrain-v1                                       # EnvPool, CPU
    python bpo_locomotion.py --env-id Mjlab-Velocity-Rough-Unitree-G1 --num-envs 4096 --init-std 1.0   # mjlab, GPU

What differs from the sibling, ppo_locomotion.py:
1. target_ratio: the best ratio pi*/pi_0, a sigmoid of return - median (Theorem 4.1, Corollary 4.7).
2. policy_loss: the distance from it, weighted by abs(advantage) (Eq. 16), in place of the clipped surrogate (Eq. 17).
3. median_loss and a median network: the baseline that makes the target average 1 (Eq. 15).
4. measure_advantages: two kinds, divided by one standard deviation; that of the targets is centred on its median.
5. Defaults: Table 2's, where the sibling has Table 3's.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes during the slow imports below

import argparse
import ctypes
import difflib
import functools
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from contextlib import ExitStack, redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).stem
Steps = Annotated[int, Field(ge=1, le=10**15)]
Size = Annotated[int, Field(ge=1, le=10**6)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e38)]
NonNegative = Annotated[float, Field(ge=0, le=1e38)]


@dataclass(config=dict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True))
class Args:
    env_id: str = "Go1JoystickRoughTerrain-v1"  # task of EnvPool, mjlab (Mjlab-...) or Isaac Lab (Isaac-...)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of networks and GPU simulators; auto: a GPU if there is one
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # of simulators, initial weights, actions and minibatches
    total_timesteps: Steps = 10_000_000  # environment steps, all environments together
    num_envs: Size = 128  # environments in parallel, N: 4096 in the paper; EnvPool's take 41 MB (Go1) and more
    num_steps: Annotated[int, Field(ge=2, le=10**6)] = 24  # steps per environment and iteration, T
    num_minibatches: Size = 4  # gradient steps per pass over the rollout
    update_epochs: Size = 10  # passes over the rollout per iteration
    learning_rate: Positive = 1e-4  # Adam's step size, at the start if it is scheduled
    # linear: to 0 at the last step; adaptive: by --desired-kl, as RSL-RL does (the paper's "ADP")
    lr_schedule: Literal["constant", "linear", "adaptive"] = "adaptive"
    desired_kl: Positive = 0.01  # KL divergence from the old policy that adaptive aims at, in nats
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # lambda of generalised advantage estimation
    clip_coef: Positive = 0.3  # epsilon: the ratio's bounds are 1 -+ epsilon
    ratio_low: float | None = None  # c_l, in place of 1 - epsilon
    ratio_high: float | None = None  # c_h, in place of 1 + epsilon
    temperature: Positive = 0.001  # lambda of Eq. 9, width of target_ratio's step; in stds of the advantage if norm_adv
    median_temperature: Positive | None = None  # lambda of Eq. 15; default: --temperature
    median_network: Literal["separate", "none"] = "separate"  # its own network, or the value in its place
    median_coef: NonNegative = 0.5  # w_2, weight of the median loss
    tv_coef: NonNegative = 0.0  # alpha_1, weight of the plain total variation beside the weighted one (Eq. 16)
    recompute_advantages: bool = False  # old returns less current values and medians (authors' code)
    norm_adv: bool = True  # centre the rollout's advantages and divide them by their standard deviation
    norm_obs: bool = True  # standardise observations with running statistics; Isaac Lab, and so the paper, does not
    vf_coef: NonNegative = 0.5  # w_1, weight of the value loss
    clip_vloss: bool = False  # clip the value's change by --clip-coef, too
    ent_coef: NonNegative = 0.001  # weight of the entropy bonus
    max_grad_norm: Positive = 1.0  # largest norm of the gradient over all networks
    hidden_sizes: Annotated[tuple[Size, ...], Field(min_length=1)] = (512, 256, 128)  # widths of every network's layers
    # initial standard deviation of the actions: 1.0 for mjlab and Isaac Lab, where actions are scaled down
    init_std: Annotated[float, Field(ge=0.01, le=1e38)] = 0.35
    # of float32 matrix products: medium is TF32 on a GPU, bfloat16 on a CPU with AMX, else float32 by oneDNN
    matmul_precision: Literal["highest", "high", "medium"] = "medium"
    bf16: bool = False  # hidden layers in bfloat16: faster on GPUs and processors that have it (avx512_bf16, AMX)
    compile: bool = False  # torch.compile the gradient step
    exp_name: str = SCRIPT  # a part of the run's name
    output_dir: str = "runs"  # parent of the run's folder
    checkpoint_seconds: NonNegative = 30  # between checkpoints; 0: one after every iteration
    resume: str | None = None  # RUN_DIR: go on with this run; --total-timesteps may differ
    track: bool = False  # log to Weights & Biases, too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "bounded-ratio-rl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team

    @model_validator(mode="after")
    def check(self):
        low, high = ratio_bounds(self)
        if not 0 <= low < 1 < high:
            raise ValueError(f"the ratio's bounds must have 0 <= low < 1 < high, not {low} and {high}")
        samples = self.num_envs * self.num_steps
        if samples % self.num_minibatches or samples < 2 * self.num_minibatches:
            raise ValueError("num_envs * num_steps must divide into --num-minibatches of 2 samples or more")
        return self


# --- the algorithm


def ratio_bounds(args):
    """Bounds (c_l, c_h) of the ratio between new and old policy."""
    low = 1 - args.clip_coef if args.ratio_low is None else args.ratio_low
    return low, (1 + args.clip_coef if args.ratio_high is None else args.ratio_high)


def target_ratio(median_advantage, ratio_low, ratio_high, temperature):
    """The best ratio pi*/pi_0, Corollary 4.7: [...] -> [...]. It is 1 where median_advantage is 0, a bound far off.

    For bounds 1 -+ epsilon it is Theorem 4.1, 1 + epsilon * tanh(median_advantage / (2 * temperature)).
    """
    c = (ratio_high - 1) / (1 - ratio_low)
    return ratio_low + (ratio_high - ratio_low) * torch.sigmoid(median_advantage / temperature - math.log(c))


def policy_loss(ratio, target, advantage, tv_coef):
    """Advantage-weighted total variation plus tv_coef times the plain one, Eq. 16, elementwise: [...] -> [...]"""
    return (target - ratio).abs() * (advantage.abs() + tv_coef)


def median_loss(returns, median_values, ratio_low, ratio_high, temperature):
    """Eq. 15: [B], [B] -> [B]. Its gradient in the median is (1 - target_ratio) / (ratio_high - ratio_low)."""
    x, c = returns - median_values, (ratio_high - 1) / (1 - ratio_low)
    return c / (1 + c) * x + temperature * nn.functional.softplus(math.log(c) - x / temperature)


def minibatch_loss(agent, batch, args):
    """The objective on samples, tensors [B, ...]: the loss [] and a dict of statistics []."""
    obs, privileged, returns = batch["obs"], batch["privileged"], batch["returns"]
    policy, value = agent(obs), agent.value(privileged)
    log_ratio = policy.log_prob(batch["actions"]).sum(-1) - batch["log_probs"]
    median, (low, high) = agent.median(privileged), ratio_bounds(args)
    if args.recompute_advantages:
        batch = batch | measure_advantages(returns, value.detach(), median.detach(), args)
    advantage, median_advantage, scale = batch["advantages"], batch["median_advantages"], batch["scales"]
    target = target_ratio(median_advantage, low, high, args.temperature * scale)
    pg_loss = policy_loss(log_ratio.exp(), target, advantage / scale, args.tv_coef).mean()
    v_loss = value_loss(value, batch, args)
    entropy = policy.entropy().sum(-1).mean()
    loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy
    stats = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
    if args.median_network != "none":  # else it would train the value
        temperature = (args.median_temperature or args.temperature) * scale
        stats["median_loss"] = median_loss(returns, median, low, high, temperature).mean()
        loss = loss + args.median_coef * stats["median_loss"]
    return loss, stats | policy_change(log_ratio, policy, batch, args)


def measure_advantages(returns, value, median, args):
    """Advantages over value and median, and the scales to divide both by: [B], [B], [B] -> a dict of tensors [B]."""
    advantage, median_advantage = returns - value, returns - median
    # Floored: nearly equal advantages, blown up, would take all of --max-grad-norm from the critics.
    std = advantage.std(correction=min(1, len(advantage) - 1))
    scale = torch.maximum(std, 0.1 * advantage.abs().mean()) + 1e-8 if args.norm_adv else torch.ones_like(std)
    if args.norm_adv:
        # Value and median lag behind growing returns. Uncentred, most targets would then lie above 1, and raising the
        # probability of nearly all actions shrinks their deviation long before the mean is right.
        advantage, median_advantage = advantage - advantage.mean(), median_advantage - median_advantage.median()
    return dict(advantages=advantage, median_advantages=median_advantage, scales=scale.expand_as(advantage))


def value_loss(value, batch, args):
    """Eq. 14, with PPO's clipping on demand: [B] -> []"""
    loss, old = (batch["returns"] - value).square(), batch["values"]
    if args.clip_vloss:
        clipped = old + (value - old).clamp(-args.clip_coef, args.clip_coef)
        loss = torch.maximum(loss, (batch["returns"] - clipped).square())
    return loss.mean()


def policy_change(log_ratio, policy, batch, args):
    """How far the policy is from the one that acted: statistics []."""
    low, high = ratio_bounds(args)
    ratio, relative_var = log_ratio.exp(), (batch["stds"] / policy.stddev).square()
    # Written out: torch.compile cannot trace kl_divergence in a fresh process.
    kl = 0.5 * (((batch["means"] - policy.mean) / policy.stddev).square() + relative_var - 1 - relative_var.log())
    clipfrac = ((ratio < low) | (ratio > high)).float().mean()
    return {"approx_kl": (ratio - 1 - log_ratio).mean(), "kl": kl.sum(-1).mean(), "clipfrac": clipfrac}


# --- the agent


class InBfloat16(nn.Sequential):
    """Layers that compute in bfloat16; weights, input and output keep their type."""

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x).to(x.dtype)


def mlp(inputs, outputs, args):
    """Layers with ELU between them, as in RSL-RL; the output starts near 0, and is in float32."""
    sizes, layers = [inputs, *args.hidden_sizes], []
    for before, after in zip(sizes, sizes[1:]):
        layers += [nn.Linear(before, after), nn.ELU()]
    output = nn.Linear(sizes[-1], outputs)
    nn.init.orthogonal_(output.weight, 0.01)
    nn.init.zeros_(output.bias)
    return nn.Sequential(*([InBfloat16(*layers)] if args.bf16 else layers), output)


def critic(inputs, args):
    return mlp(inputs, 1, args).append(nn.Flatten(-2))  # [..., 1] -> [...]


class RunningNormalizer(nn.Module):
    """Mean and variance of all samples seen so far, merged batch by batch (Chan et al., 1983)."""

    def __init__(self, size, min_std=0.0):
        super().__init__()
        self.min_std = min_std
        for name, value in (("mean", 0.0), ("var", 1.0), ("count", 0.0)):
            self.register_buffer(name, torch.full((size,), value, dtype=torch.float64))

    def update(self, samples):
        """samples[B, size], B >= 1"""
        samples, share = samples.double(), len(samples) / (self.count + len(samples))
        delta = samples.mean(0) - self.mean
        self.var += share * (samples.var(0, correction=0) - self.var + (1 - share) * delta**2)
        self.mean += share * delta
        self.count += len(samples)

    def std(self):
        return (self.var + 1e-8).sqrt().clamp(min=self.min_std).float()

    def forward(self, x):
        return ((x - self.mean.float()) / self.std()).clamp(-10, 10)


class Agent(nn.Module):
    """A policy of normalised observations, critics of normalised privileged ones, and what belongs to them."""

    def __init__(self, obs_size, privileged_size, action_low, action_high, args):
        super().__init__()
        self.policy = mlp(obs_size, len(action_low), args)
        self.std = nn.Parameter(torch.full((len(action_low),), args.init_std))  # not its logarithm, as in RSL-RL
        self.value = critic(privileged_size, args)
        self.median = critic(privileged_size, args) if args.median_network == "separate" else self.value
        self.norm_obs = args.norm_obs
        self.obs_stats, self.privileged_stats = RunningNormalizer(obs_size), RunningNormalizer(privileged_size)
        bounds = torch.as_tensor(action_low), torch.as_tensor(action_high)
        self.register_buffer("action_bounds", torch.stack(bounds).float())

    def forward(self, obs):
        """The Gaussian policy: obs[..., O] -> Normal[..., A]"""
        return Normal(self.policy(obs), self.std, validate_args=False)

    def normalize(self, obs):
        return self.obs_stats(obs) if self.norm_obs else obs

    def normalize_privileged(self, privileged):
        return self.privileged_stats(privileged) if self.norm_obs else privileged

    def to_env(self, action):
        """The policy's action as the simulator takes it, a tensor on the same device: [..., A] -> [..., A]"""
        return action.clamp(*self.action_bounds)


# --- the simulators


def find_device(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda needs a GPU and a CUDA build of PyTorch: there is none here, pass --device cpu")
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def make_envs(args, num_envs, key, render=False):
    """A simulator with seeds drawn from key, its observation and action space; BadInput if the task does not fit.

    It is called as Gymnasium's vector environments are, with tensors on find_device(args). info has privileged[N, P],
    what the critics see, and logs, name -> number or tensor[]. reset(stagger=True) lets time limits cut first episodes
    at random lengths. next_step tells when it resets: on the step after an episode's end, a dummy whose action is
    ignored, or, if False, within the step that ended it, whose observation is then the next episode's.
    """
    seeds = (np.random.SeedSequence(key).generate_state(num_envs) & 0x7FFFFFFF).tolist()  # EnvPool wants int32
    simulators = {
        "Mjlab-": (mjlab_envs, "pip install -r requirements-mjlab.txt"),
        "Isaac-": (isaac_envs, "see isaac-sim.github.io/IsaacLab"),
        "": (EnvPool, "pip install -r requirements.txt"),
    }
    make, install = next(x for prefix, x in simulators.items() if args.env_id.startswith(prefix))
    try:
        envs = make(args, seeds, render)
    except ImportError as error:
        raise BadInput(f"the simulator of {args.env_id} is not installed ({error}): {install}") from None
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate|out of memory", str(error)):
            raise
        raise BadInput(f"{num_envs} environments of {args.env_id} do not fit into memory: lower --num-envs") from None
    return envs, envs.obs_space, envs.action_space


def unknown_task(args, simulator, known):
    """A BadInput with the names that hold what was typed, shorter ones first, else those spelt like it."""
    typed, names = args.env_id.lower(), {x.lower(): x for x in known}
    found = sorted((x for x in names if typed in x), key=lambda x: (not x.startswith(typed), len(x)))
    close = ", ".join(names[x] for x in found[:8] or difflib.get_close_matches(typed, names, 3))
    return BadInput(f"{simulator} has no task {args.env_id}" + f": did you mean {close}?" * bool(close))


class EnvPool:
    """EnvPool's tasks, MuJoCo Playground's robots among them, on the CPU. They have no curriculum."""

    next_step, fps = True, 50  # Playground's robots act every 0.02 s

    def __init__(self, args, seeds, render):
        import envpool

        gym.logger.min_level = gym.logger.ERROR  # old task versions are asked for on purpose
        if args.env_id not in (known := envpool.list_all_envs()):
            raise unknown_task(args, "EnvPool", known)
        spec = envpool.make_spec(args.env_id)
        obs_space, self.action_space = spec.gymnasium_observation_space, spec.gymnasium_action_space
        self.obs_space, privileged = states(dict(obs_space) if isinstance(obs_space, gym.spaces.Dict) else obs_space)
        for x, name in ((self.obs_space, "observation"), (privileged, "observation"), (self.action_space, "action")):
            if not isinstance(x, gym.spaces.Box) or len(x.shape) != 1:
                raise BadInput(f"{args.env_id} has no flat Box {name}, which this script needs")
        if f"MuJoCoPlayground/{args.env_id.removeprefix('MuJoCoPlayground/')}" in known:
            # Playground itself clips no action. If they were clipped, a policy would be rid of its noise by aiming far
            # beyond the bounds, and stand as stiff as a statue.
            self.action_space = gym.spaces.Box(-np.inf, np.inf, self.action_space.shape, self.action_space.dtype)
        picture = dict(render_mode="rgb_array", render_width=512, render_height=384, render_camera_id=0)

        def make(num_envs):
            options = dict(num_envs=num_envs, num_threads=min(num_envs, torch.get_num_threads()))
            options |= dict(env_type="gymnasium", seed=seeds[:num_envs]) | (picture if render else {})
            return envpool.make(args.env_id, **options)

        check_memory(args, len(seeds), make)
        self.envs, self.device, self.privileged_size = make(len(seeds)), find_device(args), privileged.shape[0]
        assert self.envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
        self.time_limit, self.rng = spec.config.max_episode_steps, np.random.default_rng(seeds)
        self.close, self.render = self.envs.close, lambda: self.envs.render()[0]
        if render:
            import mujoco

            self.gl_context = mujoco.GLContext(512, 384)  # EnvPool draws into the current one
            self.gl_context.make_current()

    def reset(self, stagger=False, steps=0):
        obs, info = self.envs.reset()
        size = len(info["elapsed_step"])
        # Nobody can set EnvPool's clocks, so first episodes are cut: truncated, and reset after the dummy step.
        self.cut, self.cut_at = np.zeros(size, bool), np.full(size, -1)
        if stagger:
            self.cut_at = self.rng.integers(1, max(self.time_limit, 2), size)
        return self.observe(states(obs), info, ~self.cut)

    def step(self, action):
        action = action.cpu().numpy().astype(self.action_space.dtype)
        obs, rewards, terminated, truncated, info = self.envs.step(action)
        obs, real = states(obs), (info["elapsed_step"] > 0) & ~self.cut  # not the dummy step that resets
        if self.cut.any():
            first, _ = self.envs.reset(self.cut.nonzero()[0].astype(np.int32))
            for x, new in zip(obs, states(first)):
                x[self.cut] = new
            rewards[self.cut] = terminated[self.cut] = truncated[self.cut] = 0
        self.cut = (info["elapsed_step"] == self.cut_at) & ~terminated & ~truncated
        self.cut_at[self.cut | terminated | truncated] = -1
        results = (torch.from_numpy(x).to(self.device) for x in (rewards, terminated, truncated | self.cut))
        obs, info = self.observe(obs, info, real)
        return obs, *results, info

    def observe(self, obs, info, rows):
        state, privileged = (torch.from_numpy(x).to(self.device, torch.float32) for x in obs)
        terms = [name for name in info if name.startswith("reward_")] if rows.any() else []
        logs = {name.replace("_", "s/", 1): info[name][rows].mean() for name in terms}
        return state, {"privileged": privileged, "logs": logs}


def states(obs):
    """What EnvPool's observation, or its space, holds for the policy and for the critics."""
    obs = obs if isinstance(obs, dict) else {"state": obs}
    return obs.get("state"), obs.get("privileged_state", obs.get("state"))


def check_memory(args, num_envs, make):
    """BadInput if num_envs environments need more memory than is free, judged by making five (Linux only)."""
    if sys.platform != "linux" or num_envs <= 16:
        return

    def used():
        ctypes.CDLL(None).malloc_trim(0)  # hands back what was only needed to load the task
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    shared = make(1)  # what all environments share comes with the first
    before = used()
    more = make(4)
    each = max(used() - before, 4) / 4
    del shared, more
    used()
    free = free_memory()
    if num_envs > (fits := max(int(0.9 * free / each), 1)):
        needed = f"{num_envs} environments of {args.env_id} need {num_envs * each / 1e9:.1f} GB"
        raise BadInput(f"{needed}, but {free / 1e9:.1f} GB are free: pass --num-envs {fits} or less")


def free_memory(proc="/proc", groups="/sys/fs/cgroup"):
    """Bytes free on the machine and within the limits that a container, Slurm or systemd has set (Linux, cgroup v2)."""
    free = [1024 * int(re.search(r"MemAvailable: *(\d+)", Path(proc, "meminfo").read_text())[1])]
    for path in re.findall("^0::/(.*)", Path(proc, "self/cgroup").read_text(), re.MULTILINE):
        for folder in (Path(groups, path), *Path(groups, path).parents):
            limit = (folder / "memory.max").read_text() if (folder / "memory.max").exists() else "max"
            if limit.strip() != "max":
                cache = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)[1]
                free.append(int(limit) - int((folder / "memory.current").read_text()) + int(cache))
    return min(free)


def mjlab_envs(args, seeds, render):
    """mjlab's tasks (MuJoCo-Warp)."""
    if sys.platform == "linux":  # read when mujoco is imported, which needs no OpenGL if it is disabled
        os.environ.setdefault("MUJOCO_GL", "egl" if render else "disable")
    import mjlab.tasks  # noqa: F401 (registers the tasks)
    from mjlab.envs import ManagerBasedRlEnv
    from mjlab.tasks.registry import list_tasks, load_env_cfg

    if args.env_id not in list_tasks():
        raise unknown_task(args, "mjlab", list_tasks())
    cfg = load_env_cfg(args.env_id)
    cfg.scene.num_envs, cfg.seed = len(seeds), seeds[0]
    if any(getattr(command, "motion_file", None) == "" for command in cfg.commands.values()):
        raise BadInput(f"{args.env_id} follows a recorded motion, which this script cannot load: pass another task")
    with redirect_stdout(io.StringIO()) as printed:  # pages of tables
        env = ManagerBasedRlEnv(cfg, str(find_device(args)), render_mode="rgb_array" if render else None)
        envs = ManagerBased(args, env, "actor")
    for line in printed.getvalue().splitlines():
        if line.startswith("[WARNING]"):  # of a driver too old for CUDA graphs, which would be slow
            print(line, file=sys.stderr)
    return envs


@functools.cache
def launch_isaac(device, cameras):
    """Starts Isaac Sim, which a process can do once."""
    from isaaclab.app import AppLauncher

    return AppLauncher(headless=True, device=device, enable_cameras=cameras)


def isaac_envs(args, seeds, render):
    """Isaac Lab's tasks, by its published interface. Untested: it needs Isaac Sim."""
    device = str(find_device(args))
    launch_isaac(device, render)
    import isaaclab_tasks  # noqa: F401 (registers the tasks)
    import omni.usd
    from isaaclab_tasks.utils import parse_env_cfg

    if args.env_id not in gym.registry:
        raise unknown_task(args, "Isaac Lab", gym.registry)
    cfg = parse_env_cfg(args.env_id, device=device, num_envs=len(seeds))
    cfg.seed = seeds[0]
    omni.usd.get_context().new_stage()  # without what an earlier simulator left
    env = gym.make(args.env_id, cfg=cfg, render_mode="rgb_array" if render else None).unwrapped
    return ManagerBased(args, env, "policy")


class ManagerBased:
    """The interface that mjlab shares with Isaac Lab, as make_envs describes it; group: the policy's observations."""

    next_step = False

    def __init__(self, args, env, group):
        self.env, self.group, self.fps = env, group, round(1 / env.step_dt)
        self.render, self.close = env.render, env.close
        obs, _ = env.reset()
        if more := ", ".join(obs.keys() - {group, "critic"}):
            raise BadInput(f"{args.env_id} has observations that this script cannot use ({more}): pass another task")
        state, privileged = obs[group], obs.get("critic", obs[group])
        if not all(isinstance(x, torch.Tensor) and x.ndim == 2 for x in (state, privileged)):
            raise BadInput(f"{args.env_id} has no flat observation, which this script needs")
        self.obs_space = gym.spaces.Box(-np.inf, np.inf, (state.shape[1],))
        self.privileged_size = privileged.shape[1]
        self.action_space = gym.spaces.Box(-np.inf, np.inf, env.single_action_space.shape)

    def reset(self, stagger=False, steps=0):
        self.env.common_step_counter = steps
        obs, extras = self.env.reset()
        if stagger:
            clocks, limit = self.env.episode_length_buf, int(self.env.max_episode_length)
            self.env.episode_length_buf = torch.randint_like(clocks, 1, max(limit, 2))
        return self.observe(obs, extras)

    def step(self, action):
        obs, *results, extras = self.env.step(action)  # rewards, terminated, truncated
        obs, info = self.observe(obs, extras)
        return obs, *results, info

    def observe(self, obs, extras):
        logs = {name.replace("Episode_Reward/", "rewards/"): x for name, x in extras.get("log", {}).items()}
        return obs[self.group], {"privileged": obs.get("critic", obs[self.group]), "logs": logs}


# --- training


def compute_gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al., 2015), bootstrapping through truncation.

    rewards[T, N], values[T+1, N], terminated[T, N], truncated[T, N] -> advantages[T, N], returns[T, N].
    values[t+1] must be the value of the observation that step t returned, also where an episode ended. A dummy step's
    own advantage is meaningless; the decay of 0 before it keeps it out of all others.
    """
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decay = gamma * gae_lambda * (~(terminated | truncated)).to(values)
    advantages, trace = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = trace = deltas[t] + decay[t] * trace
    return advantages, advantages + values[:-1]


def require_finite(x, name, args):
    if not x.isfinite().all():
        raise BrokenRun(f"{args.env_id} returned {name} that are no finite float32")


@torch.inference_mode()
def collect(agent, envs, state, args):
    """T steps from state, which is updated: the rollout, tensors [T, N, ...], and the means of the simulator's logs.

    valid is False where a step is a dummy, see make_envs. privileged has T + 1 rows.
    """
    device, rows, history = state.obs.device, [], []
    # Drawn on the CPU, whose generator is in the checkpoint, so that a run may go on elsewhere.
    noise = agent.std * torch.randn(args.num_steps, args.num_envs, len(agent.std)).to(device)
    for t in range(args.num_steps):
        means, valid = agent.policy(agent.normalize(state.obs)), ~state.done
        row = dict(obs=state.obs.clone(), privileged=state.privileged.clone(), means=means, actions=means + noise[t])
        state.obs, rewards, terminated, truncated, info = envs.step(agent.to_env(row["actions"]))
        state.privileged, state.done = info["privileged"], (terminated | truncated) & envs.next_step
        row |= dict(rewards=rewards.float() * valid, terminated=terminated & valid, truncated=truncated & valid)
        rows.append(row | dict(valid=valid))
        history.append(info["logs"])
    rollout = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    rollout["privileged"] = torch.cat([rollout["privileged"], state.privileged[None]])
    for name in ("rewards", "obs", "privileged"):
        require_finite(rollout[name], name, args)
    return rollout, {name: mean_log(name, history, device) for name in state.log_names}


def mean_log(name, history, device):
    """Mean over the steps that have logged it; NaN if none has, as where no episode ended."""
    found = [torch.as_tensor(logs[name], dtype=torch.float32, device=device) for logs in history if name in logs]
    return torch.stack(found).mean().item() if found else math.nan


def finished_episodes(rollout, state):
    """Rows (step, return, length) of the episodes that ended in the rollout; state, which is updated, has their begin.

    A first one that its time limit ended is none: it was cut, see make_envs.
    """
    names = "rewards", "valid", "terminated", "truncated"
    rewards, valid, terminated, truncated = (rollout[name].cpu().numpy() for name in names)
    steps, episodes = state.step + valid.sum(1).cumsum(), []
    returns, lengths = state.returns + rewards.cumsum(0, dtype=np.float64), state.lengths + valid.cumsum(0)
    for t, n in zip(*(terminated | truncated).nonzero()):
        if terminated[t, n] or not state.cut[n]:
            episodes.append((int(steps[t]), float(returns[t, n]), int(lengths[t, n])))
        returns[t:, n] -= returns[t, n]
        lengths[t:, n] -= lengths[t, n]
        state.cut[n] = False
    state.step, state.returns, state.lengths = int(steps[-1]), returns[-1], lengths[-1]
    return episodes


@torch.no_grad()
def prepare(agent, rollout, next_step, args):
    """The rollout as samples, tensors [B, ...], without dummies. They stay as they are for all epochs."""
    obs, privileged = agent.normalize(rollout["obs"]), agent.normalize_privileged(rollout["privileged"])
    rewards, values = rollout["rewards"], agent.value(privileged)
    terminated, truncated = rollout["terminated"], rollout["truncated"]
    if not next_step:  # the next row is another episode's: as in RSL-RL V(s_t) stands in for V(s_t+1) at a time limit
        rewards = rewards + args.gamma * values[:-1] * (truncated & ~terminated)
        terminated = terminated | truncated
    _, returns = compute_gae(rewards, values, terminated, truncated, args.gamma, args.gae_lambda)
    privileged, actions, means = privileged[:-1], rollout["actions"], rollout["means"]
    policy = Normal(means, agent.std, validate_args=False)
    batch = dict(obs=obs, privileged=privileged, actions=actions, returns=returns, values=values[:-1])
    batch |= dict(means=means, stds=policy.stddev, log_probs=policy.log_prob(actions).sum(-1))
    batch["medians"] = agent.median(privileged)
    batch = {name: x[rollout["valid"]] for name, x in batch.items()}
    return batch | measure_advantages(batch["returns"], batch["values"], batch["medians"], args)


def make_optimizer(agent, args):
    lr = torch.tensor(args.learning_rate, device=agent.std.device)  # a tensor: schedules change it in place
    return torch.optim.Adam(agent.parameters(), lr=lr, fused=True)


def minibatch_gradient(agent, batch, args):
    """The clipped gradients of all parameters, and the statistics. It compiles into one graph."""
    loss, stats = minibatch_loss(agent, batch, args)
    gradients = torch.autograd.grad(loss, list(agent.parameters()))
    norm = torch.stack([x.norm() for x in gradients]).norm()
    clip = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    stats = {name: x.detach() for name, x in stats.items()} | {"grad_norm": norm}
    return [x * clip for x in gradients], stats


def update(agent, optimizer, gradient_function, batch, args):
    """Epochs of gradient steps; returns the mean of each statistic over all minibatches."""
    (group,), history, samples = optimizer.param_groups, [], len(batch["obs"])
    # The same minibatches in all epochs, as in RSL-RL. The last is topped up from the first, so that all have one size.
    places = torch.arange(args.num_envs * args.num_steps) % samples
    order = torch.randperm(samples)[places].to(agent.std.device).view(args.num_minibatches, -1)
    minibatches = [{name: x[part] for name, x in batch.items()} for part in order]
    for _ in range(args.update_epochs):
        for minibatch in minibatches:
            gradients, stats = gradient_function(agent, minibatch, args)
            for parameter, gradient in zip(group["params"], gradients):
                parameter.grad = gradient
            if args.lr_schedule == "adaptive":
                group["lr"].copy_(adaptive_learning_rate(group["lr"], stats["kl"], args.desired_kl))
            optimizer.step()
            agent.std.data.clamp_(min=0.01)
            history.append(stats | {"lr": group["lr"].clone()})
    means = {name: torch.stack([x[name] for x in history]).mean().item() for name in history[0]}
    lr = means.pop("lr")
    return {f"losses/{name}": x for name, x in means.items()} | {"charts/learning_rate": lr}


def adaptive_learning_rate(lr, kl, desired_kl):
    """RSL-RL's rule, tensors []: KL above twice the goal slows down by 1.5, KL below half of it speeds up by 1.5."""
    slower, faster = (lr / 1.5).clamp(min=1e-5), (lr * 1.5).clamp(max=1e-2)
    return torch.where(kl > 2 * desired_kl, slower, torch.where(kl < desired_kl / 2, faster, lr))


@torch.no_grad()
def measure(agent, batch, args):
    """Statistics of all samples [B]: the ratios after the update (Figure 7), the fit of the values before it."""
    low, high = ratio_bounds(args)
    ratio = (agent(batch["obs"]).log_prob(batch["actions"]).sum(-1) - batch["log_probs"]).exp()
    stats = {"ratio/out_of_bounds": ((ratio < low) | (ratio > high)).float().mean()}
    for name, chosen in (("high", ratio >= 1), ("low", ratio <= 1)):
        side = ratio[chosen] if chosen.any() else torch.ones(1)
        stats |= {f"ratio/{name}_mean": side.mean(), f"ratio/{name}_std": side.std(correction=0)}
    returns = batch["returns"]
    unexplained = (returns - batch["values"]).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
    stats |= {"losses/explained_variance": 1 - unexplained, "charts/std": agent.std.mean()}
    advantage, median_advantage, scale = batch["advantages"], batch["median_advantages"], batch["scales"]
    target = target_ratio(median_advantage, low, high, args.temperature * scale)
    # Corollary 4.4: the policy improves by at least the gain of the target less the distance from it.
    gain = ((target - 1) * median_advantage).mean()
    atv = policy_loss(ratio, target, advantage, 0.0).mean()
    stats |= {"theory/guaranteed_gain": gain, "theory/atv_divergence": atv, "theory/improvement_bound": gain - atv}
    return {name: x.item() for name, x in stats.items()}


def train(args):
    """Trains an agent; returns its run's folder. Raises BadInput before it creates anything, BrokenRun, SystemExit."""
    torch.set_float32_matmul_precision(args.matmul_precision)
    with Run(args) as run:
        run.load()
        envs, obs_space, action_space = make_envs(args, args.num_envs, [args.seed, run.step])
        torch.default_generator.manual_seed(args.seed)  # the CPU's alone, and only now: mjlab has seeded all
        sizes = obs_space.shape[0], envs.privileged_size
        agent = Agent(*sizes, action_space.low, action_space.high, args).to(find_device(args))
        optimizer, gradient_function = make_optimizer(agent, args), compiled(minibatch_gradient, args)
        obs, info = envs.reset(stagger=True, steps=run.step // args.num_envs)
        require_finite(obs, "obs", args)
        run.begin(agent=agent, optimizer=optimizer)  # restores both, or makes the folder: all is known to fit by now
        group = optimizer.param_groups[0]
        group["lr"] = group["lr"].to(obs.device)  # restored on the CPU; the adaptive schedule would wait for it
        state = SimpleNamespace(step=run.step, obs=obs, privileged=info["privileged"], log_names=list(info["logs"]))
        state.done = torch.zeros(args.num_envs, dtype=bool, device=obs.device)
        state.cut, (state.returns, state.lengths) = np.ones(args.num_envs, bool), np.zeros((2, args.num_envs))
        while state.step < args.total_timesteps and not run.stopping:
            if args.lr_schedule == "linear":
                group["lr"].fill_(args.learning_rate * (1 - state.step / args.total_timesteps))
            rollout, logs = collect(agent, envs, state, args)
            episodes = finished_episodes(rollout, state)
            batch = prepare(agent, rollout, envs.next_step, args)
            metrics = update(agent, optimizer, gradient_function, batch, args) | measure(agent, batch, args)
            agent.obs_stats.update(rollout["obs"][rollout["valid"]])  # only now: the update sees what acting saw
            agent.privileged_stats.update(rollout["privileged"][:-1][rollout["valid"]])
            run.log(state.step, episodes, metrics | logs)
        envs.close()
        return run.finish()


# --- running: folders, logs and checkpoints; no algorithm below

FORMAT = 2  # of args.json and checkpoints
KEYS = {"agent.pt": {"agent"}, "checkpoint.pt": {"agent", "optimizer", "step", "episodes", "rng_state", "log_sizes"}}
MAY_VARY = "resume total_timesteps compile output_dir checkpoint_seconds track wandb_project_name wandb_entity".split()
MAY_VARY.append("device")


class BadInput(ValueError):
    """One line, exit status 2."""


class BrokenRun(RuntimeError):
    """One line, exit status 1."""


class Run(ExitStack):
    """A run's folder, new or resumed: lock, settings, logs and checkpoints; the progress line; stop signals."""

    def __init__(self, args):
        super().__init__()
        self.args, self.step, self.stopping, self.saved = args, 0, False, {}

    def load(self):
        """Locks the folder and reads the checkpoint, if this is to resume a run."""
        if self.args.resume is not None:
            self.dir = Path(self.args.resume)
            settings, _ = load_run(self.dir, "checkpoint.pt")
            for name, value in vars(settings).items():
                if getattr(self.args, name) != value and name not in MAY_VARY:
                    raise BadInput(f"a run keeps its settings: leave out --{name.replace('_', '-')}")
            self.enter_context(FileLock(self.dir / "lock", timeout=0))
            _, self.saved = load_run(self.dir, "checkpoint.pt")  # again: only now nobody else writes it
            self.step = self.saved["step"]
            if self.step >= self.args.total_timesteps and (self.dir / "agent.pt").exists():
                raise BadInput(f"{self.dir} is complete: to go on, add a larger --total-timesteps")

    def __exit__(self, kind, error, traceback):
        super().__exit__(kind, error, traceback)
        if self.stopping and isinstance(error, Exception) and not isinstance(error, BrokenRun | OSError):
            # It is a compiler's, say, which Ctrl-C has reached as well.
            raise SystemExit(self.stop_message()) from None

    def begin(self, **parts):
        """Restores the parts (modules, optimizers) that checkpoints hold, or makes the folder; opens the logs."""
        self.parts, args = parts, self.args
        about = self.restore() if self.saved else self.make_dir()
        if args.track:
            names = dict(project=args.wandb_project_name, entity=args.wandb_entity, id=self.dir.resolve().name)
            try:
                import wandb

                wandb.init(**names, config=vars(args), dir=self.dir, resume="allow", sync_tensorboard=True)
            except Exception as error:  # it has many kinds
                if not self.saved:
                    shutil.rmtree(self.dir)
                    with suppress(OSError):  # other runs are in it
                        self.dir.parent.rmdir()
                raise BadInput(f"--track: {one_line(error)}; WANDB_MODE=offline needs no account") from None
            self.callback(wandb.finish)
        # All that may be refused is behind; a kill from here on leaves no longer run that looks complete.
        (self.dir / "agent.pt").unlink(missing_ok=True)
        about["args"] = vars(args) | {"resume": None}
        write_atomically(self.dir / "args.json", json.dumps(about, indent=2).encode())
        self.logs = {x: self.enter_context((self.dir / x).open("a")) for x in ("episodes.csv", "metrics.csv")}
        self.writer = self.enter_context(SummaryWriter(self.dir, purge_step=self.step + 1))
        self.catch_signals()
        self.episodes, self.first_step = self.saved.get("episodes", []), self.step
        self.start_time = self.line_time = time.time()
        say(f"{args.env_id}, seed {args.seed}: {self.dir}")
        self.save()

    def make_dir(self):
        """Makes the folder; returns what args.json is to say besides the settings."""
        name = f"{self.args.env_id}__{self.args.exp_name}__{self.args.seed}__{time.time():.6f}"
        self.dir = Path(self.args.output_dir, re.sub(r"[^\w.-]", "-", name))
        try:
            self.dir.mkdir(parents=True)
        except OSError as error:
            raise BadInput(f"cannot make {self.dir}: {error.strerror}; choose another --output-dir") from None
        self.enter_context(FileLock(self.dir / "lock", timeout=0))
        git = "git --no-optional-locks describe --always --dirty --abbrev=40 2>/dev/null || true"
        commit = subprocess.check_output(git, shell=True, text=True, cwd=Path(__file__).resolve().parent).strip()
        modules = {"torch", "gymnasium", "numpy", "envpool", "mjlab", "isaaclab"} & set(sys.modules)
        about = {"format": FORMAT, "script": SCRIPT, "commit": commit, "python": sys.version.split()[0]}
        return about | {"versions": {name: version(name) for name in sorted(modules)}}

    def restore(self):
        """Reads all, then changes: the parts, the random state, the logs as they were. Returns args.json."""
        try:
            for name, part in self.parts.items():
                part.load_state_dict(self.saved[name])
            torch.set_rng_state(self.saved["rng_state"])
        except Exception:  # damaged checkpoints raise many kinds
            raise BadInput(f"{self.dir}'s checkpoint does not fit its args.json, the task or this version") from None
        sizes = {self.dir / Path(name).name: size for name, size in self.saved["log_sizes"].items()}
        if lost := [path for path, size in sizes.items() if not path.exists() or path.stat().st_size < size]:
            raise BadInput(f"{lost[0]} has lost rows that it had when the checkpoint was made")
        about = json.loads((self.dir / "args.json").read_bytes())
        for path, size in sizes.items():
            os.truncate(path, size)  # drops rows written after the checkpoint
        return about

    def catch_signals(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # which nohup sets
                self.callback(signal.signal, number, signal.signal(number, self.request_stop))

    def request_stop(self, number, frame):
        """The first signal ends the run after the iteration, a second one ends the process at once."""
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)

    def log(self, step, episodes, metrics):
        """Writes an iteration: rows (step, return, length) and metrics. BrokenRun if a loss is not finite."""
        for name, value in metrics.items():
            if name.startswith("losses/") and not math.isfinite(value):
                raise BrokenRun(f"{name} is {value} at step {step}")
        self.step = step
        for end, total, length in episodes:
            self.write("episodes.csv", end, {"return": total, "length": length})
        for end, total, length in episodes[-100:]:  # a point takes 0.1 ms, and thousands of robots may fall at once
            self.writer.add_scalar("charts/episodic_return", total, end)
            self.writer.add_scalar("charts/episodic_length", length, end)
        self.episodes = (self.episodes + [row[1:] for row in episodes])[-100:]
        mean_return, mean_length = np.mean(self.episodes or [(math.nan, math.nan)], axis=0)
        sps = (step - self.first_step) / (time.time() - self.start_time)
        metrics |= {"charts/mean_return_100": mean_return, "charts/mean_length_100": mean_length, "charts/SPS": sps}
        self.write("metrics.csv", step, metrics)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        left = max(self.args.total_timesteps - step, 0) / sps
        line = f"step {step}, {sps:.0f} steps/s, mean return {mean_return:.4g}, {left:.0f} s left"
        if os.isatty(1):
            say(f"{line}    ", end="\r")
        elif time.time() - self.line_time > 30:  # no terminal, which would wrap a robot's terms of the reward
            terms = "".join(f", {name[8:]} {x:.3g}" for name, x in metrics.items() if name.startswith("rewards/"))
            say(line + terms)
            self.line_time = time.time()
        if time.time() - self.save_time >= self.args.checkpoint_seconds:
            self.save()

    def write(self, log, step, row):
        """Adds a row to a CSV file, after a header if it is the first."""
        file = self.logs[log]
        if file.tell() == 0:
            print("step", *row, sep=",", file=file)
        print(step, *(f"{x:.8g}" for x in row.values()), sep=",", file=file)

    def save(self):
        """Writes the checkpoint. BrokenRun, and the last one stays, if a weight is not finite."""
        if not all(x.isfinite().all() for x in self.parts["agent"].parameters()):
            raise BrokenRun(f"a weight is not finite at step {self.step}")
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.step, "episodes": self.episodes, "rng_state": torch.get_rng_state(), "log_sizes": {}}
        self.writer.flush()
        for name, file in self.logs.items():
            file.flush()
            os.fsync(file.fileno())
            state["log_sizes"][name] = file.tell()
        write_atomically(self.dir / "checkpoint.pt", state)
        self.save_time = time.time()

    def finish(self):
        """Saves the last checkpoint and, if the run is complete, agent.pt; returns the folder."""
        self.save()
        if self.step < self.args.total_timesteps:
            raise SystemExit(self.stop_message())
        write_atomically(self.dir / "agent.pt", {"agent": self.parts["agent"].state_dict(), "step": self.step})
        say(f"complete at step {self.step}; to see it: python enjoy.py {shlex.quote(str(self.dir))} --video")
        return str(self.dir)

    def stop_message(self):
        words = [sys.executable, __file__, "--resume", str(self.dir.resolve()), "--env-id", self.args.env_id]
        return f"stopped at step {self.step}; go on with: {shlex.join(words)}"


def say(text, end="\n"):
    """Prints a line; a reader that went away (as in `| head`) does not end the run."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def write_atomically(path, content):
    """Writes bytes, or a dict as torch.save does, so that path never holds half a file."""
    if isinstance(content, dict):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getbuffer()
    temporary = Path(f"{path}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else a power cut could leave the new name without the content
    temporary.replace(path)


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0]}"


def load_run(run_dir, name):
    """The settings of a run, read strictly, and one of its checkpoints; BadInput if they are missing or damaged."""
    try:
        about = json.loads(Path(run_dir, "args.json").read_bytes())
        if (about["script"], about.get("format")) != (SCRIPT, FORMAT):
            raise ValueError(f"it was made by another script or version, {about['script']}.py")
        args = TypeAdapter(Args).validate_json(json.dumps(about["args"]), strict=True)  # strict takes JSON only
        if missing := vars(args).keys() - about["args"].keys():
            raise ValueError(f"args.json lacks {', '.join(sorted(missing))}")
        if zipfile.ZipFile(Path(run_dir, name)).testzip():  # compares checksums
            raise ValueError(f"{name} is damaged")
        checkpoint = torch.load(Path(run_dir, name), weights_only=True, map_location="cpu", mmap=True)
        if missing := KEYS[name] - set(checkpoint):
            raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
        return args, checkpoint
    except Exception as error:  # damaged files raise many kinds
        raise BadInput(f"cannot use the run {run_dir}: {one_line(error)}") from None


def compiled(function, args):
    """torch.compile, if that was asked for; BadInput if the machine cannot."""
    if not args.compile:
        return function
    if not shutil.which(os.environ.get("CXX", "g++")) or not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise BadInput("--compile needs a C++ compiler (CXX or g++) and Python's headers: install them or --no-compile")
    torch._dynamo.config.trace_autograd_ops = True
    torch.compiler.reset()  # drops the graph of an earlier run in this process
    return torch.compile(function, fullgraph=True)


def read_args(words):
    """Args from the command line. With --resume the run's settings are the defaults."""
    os.environ["PYDANTIC_ERRORS_INCLUDE_URL"] = "0"
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise BadInput("this script trains in one process: start it without torchrun")
    if any(word.startswith(("--evaluate", "--capture")) for word in words):
        raise BadInput("to evaluate and film a run: python enjoy.py RUN_DIR --video")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?")
    parser.add_argument("--env-id", "--env_id", nargs="?")
    typed = parser.parse_known_args(words)[0]
    if typed.resume is None:
        return tyro.cli(Args, args=words)
    saved, _ = load_run(typed.resume, "checkpoint.pt")
    saved.resume = typed.resume
    if ":" in saved.env_id and typed.env_id is None:  # module:task, code that a file names is not run
        raise BadInput(f"the task is code of your own: if it is yours, add --env-id {shlex.quote(saved.env_id)}")
    return tyro.cli(Args, args=words, default=saved)


if __name__ == "__main__":
    try:
        train(read_args(sys.argv[1:]))
    except (BadInput, Timeout) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenRun as error:
        sys.exit(f"error: {error}. Checkpoints made before are kept; resumed with the same settings it ends here again")
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(allocate|out of) memory", str(error)):
            raise
        sys.exit(f"error: {error}")
