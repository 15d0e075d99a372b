"""Bounded Policy Optimization (BPO) for legged robots, with thousands of environments at once, in one file.

BPO (Ao et al., "Bounded Ratio Reinforcement Learning") keeps the ratio of new to old policy within bounds. The best
such ratio is a formula: the update regresses onto it, where PPO follows a gradient until a clip stops it. The rest is
what made PPO walk (RSL-RL): short rollouts of many robots, few large minibatches, a learning rate that follows the KL
divergence, and a critic that sees what the robot cannot. The task's name chooses the simulator:

    python bpo_locomotion.py --env-id Go1JoystickRoughTerrain-v1                                       # EnvPool, CPU
    python bpo_locomotion.py --env-id Mjlab-Velocity-Rough-Unitree-G1 --num-envs 4096 --init-std 1.0   # mjlab, GPU

What differs from the sibling, ppo_locomotion.py:
1. target_ratio: the optimal ratio pi*/pi_0, a sigmoid of the median advantage (Theorem 4.1, Corollary 4.7).
2. policy_loss: the distance of the ratio from that target, weighted by abs(advantage) (Eq. 16), not the clip (Eq. 17).
3. median_loss and a median head: the baseline that makes the target policy sum to one (Eq. 15).
4. Both advantages are divided by one standard deviation; the one of the targets is centred on its median.
5. improvement_bound: the terms of Corollary 4.4, logged under theory/.
6. Defaults: Table 2's, where the sibling has Table 3's.
"""

import contextlib
import ctypes
import ctypes.util
import dataclasses
import difflib
import functools
import importlib.metadata
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
STOP = []  # signals received: a first Ctrl-C or SIGTERM ends the run after the iteration, with a checkpoint


class BadInput(ValueError):
    """Input that cannot work: printed as one line, exit status 2."""


def can_compile():
    """Whether torch.compile finds what it needs on a CPU: a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return shutil.which(compiler) is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


@dataclass
class Args:
    env_id: str = "Go1JoystickRoughTerrain-v1"
    """task: EnvPool's, mjlab's (Mjlab-...) or Isaac Lab's (Isaac-...)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks, rollouts and GPU simulators live; auto: a GPU if there is one"""
    seed: int = 1
    """seed of the simulators, the network's initial weights, the actions and the minibatches"""
    total_timesteps: int = 10_000_000
    """environment steps to train for, all environments together"""
    num_envs: int = 128
    """environments stepped in parallel: 4096 in the paper, on a GPU; EnvPool's take 41 MB (Go1) and more"""
    num_steps: int = 24
    """steps per environment and iteration"""
    num_minibatches: int = 4
    """gradient steps per pass over the rollout; they share its num_envs * num_steps samples"""
    update_epochs: int = 10
    """passes over the rollout per iteration"""
    learning_rate: float = 1e-4
    """Adam's step size (the initial one if it is scheduled)"""
    lr_schedule: Literal["constant", "linear", "adaptive"] = "adaptive"
    """linear: to 0 at the last step; adaptive: follows --desired-kl as RSL-RL does (the paper's "ADP")"""
    desired_kl: float = 0.01
    """the divergence between old and new policy that the adaptive schedule aims at, in nats"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip_coef: float = 0.3
    """epsilon: the ratio's bounds are 1 - epsilon and 1 + epsilon"""
    temperature: float = 0.001
    """lambda of Eq. 9 and Eq. 15; in units of return, or in standard deviations of the advantage if --norm-adv"""
    use_median: bool = True
    """measure the target's advantage from the learned median; --no-use-median: from the value (no median head)"""
    median_coef: float = 0.5
    """weight of the median loss, w_2 in the paper"""
    tv_coef: float = 0.0
    """alpha_1: weight of the plain total variation beside the advantage-weighted one (Eq. 16)"""
    norm_adv: bool = True
    """standardise the rollout's advantages; those that give the targets are centred on their median"""
    norm_obs: bool = True
    """standardise observations with running statistics; Isaac Lab's own configurations, and so the paper, do not"""
    value_coef: float = 0.5
    """weight of the value loss (R - V)^2, w_1 in the paper"""
    clip_value_loss: bool = False
    """clip the change of the value by --clip-coef as well"""
    ent_coef: float = 0.001
    """weight of the entropy bonus"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm, over all networks jointly"""
    hidden_sizes: tuple[int, ...] = (512, 256, 128)
    """widths of the hidden layers (ELU) of every network"""
    init_std: float = 0.35
    """initial standard deviation of the actions: 1.0 for mjlab and Isaac Lab, where actions are scaled down"""
    matmul_precision: Literal["highest", "high", "medium"] = "medium"
    """of float32 matrix products: medium is TF32 on a GPU, bfloat16 on a CPU with AMX, else float32 by oneDNN"""
    bf16: bool = False
    """compute the hidden layers in bfloat16: faster on processors that have it (avx512_bf16, AMX) and on GPUs"""
    compile: bool = False
    """torch.compile the gradient step"""
    output_dir: str = "runs"
    """folder that receives this run's folder"""
    checkpoint_interval: int = 20
    """iterations between checkpoints"""
    eval_episodes: int = 10
    """episodes of each evaluation (deterministic and stochastic), at the end of training and with --evaluate"""
    resume: str | None = None
    """RUN_DIR: continue this interrupted run with the settings it was started with"""
    evaluate: str | None = None
    """RUN_DIR: evaluate this run's agent instead of training"""
    capture_video: bool = False
    """film one deterministic episode (through MuJoCo's renderer) after training or evaluation"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline works without an account)"""
    wandb_project: str = "bounded-ratio-rl"
    """Weights & Biases project"""


def ratio_bounds(args):
    """Bounds (c_l, c_h) of the ratio between new and old policy."""
    return 1 - args.clip_coef, 1 + args.clip_coef


def check_args(args):
    """Raises BadInput with one line that says what to change."""
    for names, holds, rule in (
        ("total_timesteps num_envs num_minibatches update_epochs", lambda x: x >= 1, "at least 1"),
        ("checkpoint_interval eval_episodes", lambda x: x >= 1, "at least 1"),
        ("num_steps", lambda x: x >= 2, "at least 2"),
        ("hidden_sizes", lambda x: len(x) > 0 and min(x) >= 1, "one or more sizes of at least 1"),
        ("learning_rate desired_kl max_grad_norm", lambda x: 0 < x < math.inf, "positive and finite"),
        ("init_std", lambda x: 0.01 <= x < math.inf, "at least 0.01 and finite"),
        ("clip_coef", lambda x: 0 < x <= 1, "within (0, 1]"),
        ("temperature", lambda x: 0 < x < math.inf, "positive and finite"),
        ("value_coef ent_coef", lambda x: 0 <= x < math.inf, "finite and not negative"),
        ("median_coef tv_coef", lambda x: 0 <= x < math.inf, "finite and not negative"),
        ("gamma gae_lambda", lambda x: 0 <= x <= 1, "within [0, 1]"),
        ("seed", lambda x: 0 <= x < 2**31, "within [0, 2^31)"),
    ):
        for name in names.split():
            if not holds(value := getattr(args, name)):
                raise BadInput(f"--{name.replace('_', '-')} must be {rule}, got {value}")
    samples, parts = args.num_envs * args.num_steps, args.num_minibatches
    if samples % parts or samples < 2 * parts:
        raise BadInput(
            f"num_envs * num_steps = {samples} samples do not divide into --num-minibatches {parts} of 2 or more"
        )
    if args.compile and not can_compile():
        raise BadInput("--compile needs a C++ compiler (CXX or g++) and Python's headers: install them or --no-compile")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda needs a GPU and a CUDA build of PyTorch: there is none here, pass --device cpu")


def find_device(args):
    """The torch.device that --device names."""
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


# -------------------------------------------------------------------------------------------------------- simulators


def make_envs(args, num_envs, seed, render=False):
    """Vector environments and the sizes of their observations, privileged observations and actions; BadInput if that
    is not possible. A simulator is a namespace of four calls, with all tensors on find_device(args):

    reset(stagger=False, steps=0) -> (obs[N, O], privileged[N, P]), logs
        stagger: first episodes start at random lengths; steps: each environment's before, on which a curriculum depends
    step(actions[N, A]) -> (obs, privileged), rewards[N], terminated[N], truncated[N], logs
    render() -> uint8[H, W, 3]; with render=True only
    close()

    next_step says when it resets: on the step after an episode's end, a dummy whose action is ignored, or, if False,
    within the step that ended it, whose observation is then the next episode's; fps: steps in a second of the robot's
    time. logs: name -> number or tensor[].
    """
    gym.logger.min_level = gym.logger.ERROR
    kinds = {"Mjlab-": mjlab_envs, "Isaac-": isaac_envs}
    make = next((kinds[prefix] for prefix in kinds if args.env_id.startswith(prefix)), envpool_envs)
    envs = make(args, num_envs, seed, render)
    return envs, envs.obs_size, envs.privileged_size, envs.action_size


def unknown_task(args, simulator, known):
    close = ", ".join(difflib.get_close_matches(args.env_id, known, 3))
    return BadInput(f"{simulator} has no task {args.env_id}" + f": did you mean {close}?" * bool(close))


def envpool_envs(args, num_envs, seed, render):
    """EnvPool's tasks, MuJoCo Playground's robots among them. They have no curriculum."""
    try:
        import envpool
    except ImportError:
        raise BadInput("EnvPool is not installed: pip install -r requirements.txt") from None
    if args.env_id not in (known := envpool.list_all_envs()):
        raise unknown_task(args, "EnvPool", known)
    spec = envpool.make_spec(args.env_id)
    space, action_space = spec.gymnasium_observation_space, spec.gymnasium_action_space
    spaces = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {"state": space}
    spaces = [spaces.get("state"), spaces.get("privileged_state", spaces.get("state")), action_space]
    for x, kind in zip(spaces, ("observation", "observation", "action")):
        if not isinstance(x, gym.spaces.Box) or len(x.shape) != 1:
            raise BadInput(f"{args.env_id} has no flat Box {kind}, which this script needs")
    options = dict(env_type="gymnasium", num_threads=min(num_envs, torch.get_num_threads()), seed=seed)
    if render:
        options |= dict(render_mode="rgb_array", render_width=512, render_height=384, render_camera_id=0)
    make = functools.partial(envpool.make, args.env_id, **options)
    check_memory(args, num_envs, make)
    envs, device = make(num_envs=num_envs), find_device(args)
    if render:
        import mujoco

        envs.gl_context = mujoco.GLContext(512, 384)  # EnvPool draws into the current one
        envs.gl_context.make_current()
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    if f"MuJoCoPlayground/{args.env_id.removeprefix('MuJoCoPlayground/')}" in known:
        # Playground itself clips no action. If they were clipped, a policy would be rid of its noise by aiming far
        # beyond the bounds, and stand as stiff as a statue.
        action_space = gym.spaces.Box(-np.inf, np.inf, action_space.shape, action_space.dtype)

    def tensors(obs):
        obs = obs if isinstance(obs, dict) else {"state": obs}
        both = obs["state"], obs.get("privileged_state", obs["state"])
        return tuple(torch.from_numpy(x).to(device, torch.float32) for x in both)

    def logs(info, rows):
        terms = [name for name in info if name.startswith("reward_")]
        if not terms or not rows.any():
            return {}
        means = np.stack([info[name] for name in terms])[:, rows].mean(1)
        return {name.replace("_", "s/", 1): x for name, x in zip(terms, means)}

    # Nobody can set EnvPool's clocks, so first episodes are cut: truncated, and reset after the dummy step.
    cut, first_lengths = np.zeros(num_envs, bool), np.zeros(num_envs, int)

    def reset(stagger=False, **_):
        obs, info = envs.reset()
        cut[:] = False
        first_lengths[:] = torch.randint(1, spec.config.max_episode_steps + 1, (num_envs,)) if stagger else -1
        return tensors(obs), logs(info, info["elapsed_step"] >= 0)

    def step(actions):
        obs, rewards, terminated, truncated, info = envs.step(to_env(actions.cpu(), action_space))
        obs, real = tensors(obs), (info["elapsed_step"] > 0) & ~cut  # not the dummy step that resets
        if cut.any():
            for x, first in zip(obs, tensors(envs.reset(np.flatnonzero(cut).astype(np.int32))[0])):
                x[cut] = first
            rewards[cut] = terminated[cut] = truncated[cut] = 0
        cut[:] = (info["elapsed_step"] == first_lengths) & ~terminated & ~truncated
        first_lengths[cut | terminated | truncated] = -1
        results = rewards, terminated, truncated | cut
        return obs, *(torch.from_numpy(x).to(device) for x in results), logs(info, real)

    sizes = dict(zip(("obs_size", "privileged_size", "action_size"), (x.shape[0] for x in spaces)))
    calls = dict(reset=reset, step=step, render=lambda: envs.render()[0], close=envs.close)
    return SimpleNamespace(**calls, **sizes, next_step=True, fps=50)  # Playground's robots act every 0.02 s


def check_memory(args, num_envs, make):
    """BadInput if num_envs environments need more memory than is free, judged by making five (Linux only)."""
    if sys.platform != "linux" or num_envs <= 16:
        return

    def used():
        ctypes.CDLL(None).malloc_trim(0)  # hands back what was only needed to load the task
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    shared = make(num_envs=1)  # what all environments share comes with the first
    before = used()
    more = make(num_envs=4)
    each = max(used() - before, 4) / 4
    del shared, more
    used()
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    free = min([free, *free_in_groups()])
    if num_envs > (fits := max(int(0.9 * free / each), 1)):
        needed = f"{num_envs} environments of {args.env_id} need {num_envs * each / 1e9:.1f} GB"
        raise BadInput(f"{needed}, but {free / 1e9:.1f} GB are free: pass --num-envs {fits} or less")


def free_in_groups(groups="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """Bytes left under each limit of memory that a container, Slurm or systemd has set for this process (Linux)."""
    for line in Path(groups).read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, names = Path(root), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = Path(root, "memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (folder / names[0]).exists():
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                if limit != "max":
                    yield int(limit) - int(used) + int(statistics[names[2]])


def mjlab_envs(args, num_envs, seed, render):
    """mjlab's tasks (MuJoCo-Warp)."""
    if sys.platform == "linux":  # read when mujoco is imported; disable: it then works without OpenGL
        os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "disable")
    try:
        import mjlab.tasks  # noqa: F401 (registers the tasks)
        from mjlab.envs import ManagerBasedRlEnv
        from mjlab.tasks.registry import list_tasks, load_env_cfg
    except ImportError as error:
        raise BadInput(f"mjlab is not installed ({error}): pip install -r requirements-mjlab.txt") from None
    if args.env_id not in list_tasks():
        raise unknown_task(args, "mjlab", list_tasks())
    cfg = load_env_cfg(args.env_id)
    cfg.scene.num_envs, cfg.seed = num_envs, seed
    if any(getattr(command, "motion_file", None) == "" for command in cfg.commands.values()):
        raise BadInput(f"{args.env_id} follows a recorded motion, which this script cannot load: pass another task")
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:  # pages of tables
            env = ManagerBasedRlEnv(cfg, str(find_device(args)), render_mode="rgb_array" if render else None)
            envs = manager_envs(args, env, "actor")
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
            raise
        raise BadInput(
            f"{num_envs} environments of {args.env_id} do not fit into memory: pass fewer --num-envs"
        ) from None
    for line in printed.getvalue().splitlines():
        if line.startswith("[WARNING]"):  # of a driver too old for CUDA graphs, which would be slow
            print(line, file=sys.stderr)
    return envs


@functools.cache
def launch_isaac(device, cameras):
    """Starts Isaac Sim, which a process can do once."""
    from isaaclab.app import AppLauncher

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    launcher = AppLauncher(headless=True, device=device, enable_cameras=cameras)
    for number, handler in handlers.items():  # the launcher has set its own, which would end a run without a checkpoint
        signal.signal(number, handler)
    return launcher


def isaac_envs(args, num_envs, seed, render):
    """Isaac Lab's tasks, by its published interface. Untested: it needs Isaac Sim."""
    device = str(find_device(args))
    try:
        launch_isaac(device, args.capture_video)
        import isaaclab_tasks  # noqa: F401 (registers the tasks)
        import omni.usd
        from isaaclab_tasks.utils import parse_env_cfg
    except ImportError as error:
        raise BadInput(f"Isaac Lab is not installed ({error}): see isaac-sim.github.io/IsaacLab") from None
    if args.env_id not in gym.registry:
        raise unknown_task(args, "Isaac Lab", gym.registry)
    cfg = parse_env_cfg(args.env_id, device=device, num_envs=num_envs)
    cfg.seed = seed
    omni.usd.get_context().new_stage()  # without what an earlier simulator left
    env = gym.make(args.env_id, cfg=cfg, render_mode="rgb_array" if render else None).unwrapped
    return manager_envs(args, env, "policy")


def manager_envs(args, env, policy):
    """The interface that mjlab shares with Isaac Lab; policy: the name of the policy's group of observations."""

    def tensors(obs):
        return obs[policy], obs.get("critic", obs[policy])

    def logs(extras):
        return {name.replace("Episode_Reward/", "rewards/"): x for name, x in extras.get("log", {}).items()}

    def reset(stagger=False, steps=0):
        env.common_step_counter = steps
        obs, extras = env.reset()
        if stagger:
            env.episode_length_buf = torch.randint_like(env.episode_length_buf, high=int(env.max_episode_length))
        return tensors(obs), logs(extras)

    def step(actions):
        obs, rewards, terminated, truncated, extras = env.step(actions)
        return tensors(obs), rewards, terminated, truncated, logs(extras)

    obs, _ = env.reset()
    if more := ", ".join(obs.keys() - {policy, "critic"}):
        raise BadInput(f"{args.env_id} has observations that this script cannot use ({more}): pass another task")
    sizes = [x.shape[1] for x in tensors(obs) if isinstance(x, torch.Tensor) and x.ndim == 2]
    if len(sizes) != 2:
        raise BadInput(f"{args.env_id} has no flat observation, which this script needs")
    sizes = dict(obs_size=sizes[0], privileged_size=sizes[1], action_size=env.single_action_space.shape[0])
    calls = dict(reset=reset, step=step, render=env.render, close=env.close)
    return SimpleNamespace(**calls, **sizes, next_step=False, fps=round(1 / env.step_dt))


# ---------------------------------------------------------------------------------------------------------- learning


class RunningNormalizer(nn.Module):
    """Mean and variance of all samples seen so far, merged batch by batch (Chan et al., 1983); saved with the agent."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, samples):
        """samples[B, size]."""
        samples = samples.double()
        delta, total = samples.mean(0) - self.mean, self.count + len(samples)
        m2 = self.var * self.count + samples.var(0, correction=0) * len(samples)
        self.var.copy_((m2 + delta**2 * self.count * len(samples) / total) / total)
        self.mean += delta * len(samples) / total
        self.count.copy_(total)

    def std(self):
        return (self.var + 1e-8).sqrt().float()

    def forward(self, x):
        return ((x - self.mean.float()) / self.std()).clamp(-10, 10)


class MLP(nn.Sequential):
    """Layers of --hidden-sizes with ELU between them, as in RSL-RL; the output starts near 0."""

    def __init__(self, inputs, outputs, args):
        sizes, layers = [inputs, *args.hidden_sizes], []
        for before, after in zip(sizes, sizes[1:]):
            layers += [nn.Linear(before, after), nn.ELU()]
        output = nn.Linear(sizes[-1], outputs)
        nn.init.orthogonal_(output.weight, 0.01)
        nn.init.zeros_(output.bias)
        super().__init__(*layers, output)
        self.bf16 = args.bf16

    def forward(self, x):
        *layers, output = self
        features = x
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for layer in layers:
                features = layer(features)
        return output(features.to(x.dtype))


class Agent(nn.Module):
    """Gaussian policy with a state-independent standard deviation, and critics that see the privileged observation."""

    def __init__(self, obs_size, privileged_size, action_size, args):
        super().__init__()
        self.obs_stats = RunningNormalizer(obs_size)
        self.privileged_stats = RunningNormalizer(privileged_size)
        self.norm_obs = args.norm_obs
        self.policy = MLP(obs_size, action_size, args)
        self.std = nn.Parameter(torch.full((action_size,), args.init_std))
        self.critic = MLP(privileged_size, 1, args)
        if args.use_median:
            self.median_head = MLP(privileged_size, 1, args)

    @property
    def log_std(self):
        return self.std.log()

    def normalize(self, obs):
        return self.obs_stats(obs) if self.norm_obs else obs

    def normalize_privileged(self, privileged):
        return self.privileged_stats(privileged) if self.norm_obs else privileged

    def value(self, privileged):
        """V_phi: privileged[..., P] -> [...]"""
        return self.critic(privileged).squeeze(-1)

    def median(self, privileged):
        """mu_psi: privileged[..., P] -> [...]"""
        return self.median_head(privileged).squeeze(-1)


def log_prob(mean, log_std, actions):
    """Log-density of a diagonal Gaussian in closed form: mean[..., A], log_std[A], actions[..., A] -> [...]"""
    return (-0.5 * ((actions - mean) * (-log_std).exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def kl_divergence(old_mean, old_log_std, mean, log_std):
    """KL(old || new) of two diagonal Gaussians in nats: means[..., A], log_stds[A] -> [...]"""
    var = (2 * log_std).exp()
    return (log_std - old_log_std + ((2 * old_log_std).exp() + (old_mean - mean) ** 2) / (2 * var) - 0.5).sum(-1)


def compute_gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al., 2015), bootstrapping through truncation.

    rewards[T, N], values[T+1, N], terminated[T, N], truncated[T, N] -> advantages[T, N], returns[T, N].
    """
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    goes_on = ~(terminated | truncated)
    advantages, trace = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = trace = deltas[t] + gamma * gae_lambda * trace * goes_on[t]
    return advantages, advantages + values[:-1]


def target_ratio(median_advantage, ratio_low, ratio_high, temperature):
    """The best ratio pi*/pi_0, Corollary 4.7: [...] -> [...]. It is 1 at the median, and the bounds far from it.

    For bounds 1 -+ epsilon it is Theorem 4.1, 1 + epsilon * tanh(median_advantage / (2 * temperature)).
    """
    odds = (ratio_high - 1) / (1 - ratio_low)
    return ratio_low + (ratio_high - ratio_low) * torch.sigmoid(median_advantage / temperature - math.log(odds))


def median_loss(returns, median_values, ratio_low, ratio_high, temperature):
    """Eq. 15 with the g' of Corollary 4.7: [B], [B] -> [B]. Its gradient in mu is (1 - target_ratio) / (c_h - c_l)."""
    x, odds = returns - median_values, (ratio_high - 1) / (1 - ratio_low)
    return odds / (1 + odds) * x + temperature * nn.functional.softplus(math.log(odds) - x / temperature)


def policy_loss(ratio, target, advantage, tv_coef):
    """Advantage-weighted total variation plus tv_coef times the plain one, Eq. 16: [B], [B], [B] -> [B]"""
    return (target - ratio).abs() * (advantage.abs() + tv_coef)


def prepare_batch(batch, args):
    """What the policy loss takes from the whole rollout, a dict of tensors [B, ...]: target ratios, their temperature,
    and the advantages that weigh them. --norm-adv standardises these and centres those of the targets."""
    advantages = batch["advantages"]
    # The floor keeps equal advantages, whose deviation is rounding, from drowning the critics' gradient.
    scale = torch.maximum(advantages.std(), 0.1 * advantages.abs().mean()) + 1e-8 if args.norm_adv else 1.0
    median_advantages = batch["returns"] - batch["medians" if args.use_median else "values"]
    if args.norm_adv:
        # Value and median lag behind growing returns. Uncentred, most targets would then lie above 1, and raising the
        # probability of nearly all actions shrinks their deviation long before the mean is right.
        advantages = advantages - advantages.mean()
        median_advantages = median_advantages - median_advantages.median()
    batch["temperatures"] = torch.ones_like(advantages) * args.temperature * scale
    batch["targets"] = target_ratio(median_advantages, *ratio_bounds(args), batch["temperatures"])
    batch["median_advantages"], batch["advantages"] = median_advantages, advantages / scale


def minibatch_loss(agent, batch, args):
    """The objective on batch, a dict of tensors [B, ...]: the loss [] and a dict of statistics []."""
    mean = agent.policy(batch["obs"])
    log_ratio = log_prob(mean, agent.log_std, batch["actions"]) - batch["log_probs"]
    ratio = log_ratio.exp()
    entropy = (agent.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
    returns, values = batch["returns"], agent.value(batch["privileged"])
    value_loss = (returns - values).square()  # Eq. 14
    if args.clip_value_loss:
        clipped_values = batch["values"] + (values - batch["values"]).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.maximum(value_loss, (returns - clipped_values).square())
    value_loss = value_loss.mean()
    low, high = ratio_bounds(args)
    pg_loss = policy_loss(ratio, batch["targets"], batch["advantages"], args.tv_coef).mean()
    mean_median_loss = torch.zeros_like(pg_loss)
    if args.use_median:
        medians = agent.median(batch["privileged"])
        mean_median_loss = median_loss(returns, medians, low, high, batch["temperatures"]).mean()
    loss = pg_loss + args.value_coef * value_loss + args.median_coef * mean_median_loss - args.ent_coef * entropy
    stats = {
        "losses/policy_loss": pg_loss,
        "losses/value_loss": value_loss,
        "losses/median_loss": mean_median_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": (ratio - 1 - log_ratio).mean(),
        "losses/kl": kl_divergence(batch["means"], batch["log_stds"], mean, agent.log_std).mean(),
        "losses/clipfrac": ((ratio < low) | (ratio > high)).float().mean(),
    }
    return loss, stats


def minibatch_gradient(agent, parameters, batch, learning_rate, args):
    """The clipped gradient of all parameters as one vector, the statistics stacked, and their names.

    batch is a dict of tensors [B, ...]. The function is a pure tensor program, so it compiles into one graph. With the
    adaptive schedule it moves learning_rate[] as RSL-RL does.
    """
    loss, stats = minibatch_loss(agent, batch, args)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    stats["losses/grad_norm"] = norm = gradient.norm()
    if args.lr_schedule == "adaptive":
        kl, lr = stats["losses/kl"].detach(), learning_rate
        lower, higher = (lr / 1.5).clamp(min=1e-5), (lr * 1.5).clamp(max=1e-2)
        lr = torch.where(kl > 2 * args.desired_kl, lower, torch.where(kl < args.desired_kl / 2, higher, lr))
        learning_rate.copy_(lr)
    clipped = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    return clipped, torch.stack([x.detach() for x in stats.values()]), list(stats)


def ratio_statistics(ratio, low, high):
    """Figure 7: mean and standard deviation of the ratios [B] above and below 1, and the fraction out of bounds."""
    stats = {"ratio/out_of_bounds": ((ratio < low) | (ratio > high)).float().mean().item()}
    for name, side in (("high", ratio[ratio >= 1]), ("low", ratio[ratio <= 1])):
        stats[f"ratio/{name}_mean"] = side.mean().item() if len(side) else 1.0
        stats[f"ratio/{name}_std"] = side.std(correction=0).item() if len(side) else 0.0
    return stats


def improvement_bound(ratio, batch, args):
    """Corollary 4.4 per step, over the samples [B] of pi_0: guaranteed gain, divergence left, and their difference."""
    target, advantages = batch["targets"], batch["advantages"] * batch["temperatures"] / args.temperature
    gain = ((target - 1) * batch["median_advantages"]).mean()
    divergence = ((target - ratio).abs() * advantages.abs()).mean()
    bound = {"guaranteed_gain": gain, "atv_divergence": divergence, "improvement_bound": gain - divergence}
    return {f"theory/{name}": value.item() for name, value in bound.items()}


def to_env(action, space):
    """The policy's output [N, A] as the simulator takes it: a NumPy array, clipped to the action space."""
    return np.clip(action.numpy(), space.low, space.high).astype(space.dtype)


def evaluate(agent, args, deterministic, seed):
    """Returns [args.eval_episodes], one episode in each of as many environments; the normaliser stays frozen."""
    envs, *_ = make_envs(args, args.eval_episodes, seed)
    (obs, _), _ = envs.reset()
    returns = torch.zeros(len(obs), dtype=torch.float64, device=obs.device)
    running = torch.ones(len(obs), dtype=bool, device=obs.device)
    while running.any():
        with torch.inference_mode():
            action = agent.policy(agent.normalize(obs))
            action += 0 if deterministic else agent.log_std.exp() * torch.randn_like(action)
        (obs, _), reward, terminated, truncated, _ = envs.step(action)
        returns += reward * running
        running &= ~(terminated | truncated)
    envs.close()
    return returns.cpu().numpy()


def film(agent, args, folder):
    """Films one deterministic episode as MP4 into the folder, through MuJoCo's renderer, which needs no screen."""
    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
    try:
        import imageio

        envs, *_ = make_envs(args, 1, args.seed, render=True)
        (obs, _), _ = envs.reset()
        folder.mkdir(exist_ok=True)
        every = max(envs.fps // 25, 1)  # steps per picture
        with imageio.get_writer(folder / "episode.mp4", fps=envs.fps / every) as video:
            done, frame = False, 0
            while not done:
                if frame % every == 0:
                    video.append_data(np.asarray(envs.render()))
                with torch.inference_mode():
                    (obs, _), _, terminated, truncated, _ = envs.step(agent.policy(agent.normalize(obs)))
                done, frame = bool(terminated | truncated), frame + 1
        envs.close()
    except Exception as error:  # drivers, codecs, unknown tasks: many kinds, none of which may hide the evaluation
        raise SystemExit(f"error: cannot film {args.env_id}: {' '.join(str(error).split())}") from None


def report(agent, args, run_dir):
    """Evaluates both ways, prints the returns and writes them to run_dir/evaluation.json."""
    results = {}
    for name in ("deterministic", "stochastic"):
        returns = evaluate(agent, args, name == "deterministic", (args.seed + 10_000) % 2**31)
        results[name] = {"mean": returns.mean(), "std": returns.std(), "returns": returns.tolist()}
        print(f"evaluation, {name}: {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes")
    write_atomically(run_dir / "evaluation.json", json.dumps(results, indent=2).encode())
    return results


def write_atomically(path, content):
    """Writes bytes to a temporary file, then renames it, so that path never holds half a file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name without the content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_bytes(state):
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_run(run_dir, name, device):
    """Args and checkpoint `name` of a run; BadInput if they are missing, damaged or not this script's."""
    try:
        about = json.loads((run_dir / "args.json").read_text())
        device = "cpu" if device == "auto" and about["device"] == "cpu" else device  # where the run was
        settings = about["args"] | {"compile": False, "device": device}
        settings["hidden_sizes"] = tuple(settings["hidden_sizes"])
        args = Args(**settings)
        check_args(args)
        checkpoint = torch.load(run_dir / name, weights_only=True, map_location=find_device(args))
        script, env_id = checkpoint["script"], checkpoint["env_id"]
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"cannot read {error.filename}: pass the folder of a run that has saved a checkpoint") from None
    except Exception as error:
        raise BadInput(f"{run_dir} holds no readable run of this script: {type(error).__name__}") from None
    if (script, env_id) != (SCRIPT, args.env_id):
        raise BadInput(f"{run_dir / name} was made by {script} on {env_id}: it does not belong here")
    return args, checkpoint


def check_same_settings(asked, args):
    """BadInput if a setting was asked for that the run does not have."""
    for field in dataclasses.fields(Args):
        value = getattr(asked, field.name)
        if field.name not in ("resume", "evaluate") and value not in (field.default, getattr(args, field.name)):
            raise BadInput(
                f"the settings are the run's, and cannot be changed: leave out --{field.name.replace('_', '-')}"
            )


def load_agent(agent, checkpoint, run_dir):
    """Loads the weights and normalisers into the agent; BadInput if they do not fit."""
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError:
        raise BadInput(f"the weights in {run_dir} do not fit its args.json or the task") from None


def trim(path, step):
    """Drops the rows of a CSV file that were written after `step`, or only half written."""
    lines = path.read_text().splitlines(keepends=True)
    rows = [x for x in lines[1:] if x.endswith("\n") and x.count(",") == lines[0].count(",")]
    rows = [x for x in rows if int(x.split(",", 1)[0]) <= step]
    write_atomically(path, "".join(lines[:1] + rows).encode())


def make_run_dir(args):
    """Makes the run's folder, with args.json; BadInput if that is not possible."""
    run_dir = Path(args.output_dir) / f"{args.env_id.replace('/', '-')}__{SCRIPT}__{args.seed}__{int(time.time())}"
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    modules = [x for x in ("torch", "gymnasium", "envpool", "mjlab", "isaaclab", "numpy") if x in sys.modules]
    about = {"script": SCRIPT, "args": dataclasses.asdict(args), "commit": commit, "python": sys.version.split()[0]}
    about["versions"] = {name: importlib.metadata.version(name) for name in modules}
    about["device"] = torch.cuda.get_device_name() if find_device(args).type == "cuda" else "cpu"
    try:
        run_dir.mkdir(parents=True)
        write_atomically(run_dir / "args.json", json.dumps(about, indent=2).encode())
    except OSError as error:
        raise BadInput(f"cannot write to {run_dir}: {error.strerror}; choose another --output-dir") from None
    return run_dir


def train(args):
    """Trains an agent and returns its run's folder; BadInput before anything is created."""
    checkpoint = None
    if args.resume is not None:
        asked, run_dir = args, Path(args.resume)
        args, checkpoint = load_run(run_dir, "checkpoint.pt", args.device)
        if checkpoint["device"] != find_device(args).type:
            raise BadInput(f"{run_dir} was trained on {checkpoint['device']}: it can be resumed there only")
        args.compile = asked.compile  # depends on the machine, not on the run
        if checkpoint["step"] >= args.total_timesteps and (run_dir / "evaluation.json").exists():
            raise BadInput(f"{run_dir} is complete: to train on, raise total_timesteps in its args.json")
        check_same_settings(asked, args)
    check_args(args)
    if args.track:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise BadInput("--track needs an account: type wandb login first, or set WANDB_MODE=offline")
    step = checkpoint["step"] if checkpoint else 0
    device = find_device(args)
    torch.set_float32_matmul_precision(args.matmul_precision)
    num_steps, num_envs = args.num_steps, args.num_envs
    simulator_seed = ((args.seed + 1) * num_envs + step) % 2**31  # EnvPool adds an environment's index
    envs, obs_size, privileged_size, action_size = make_envs(args, num_envs, simulator_seed)
    torch.manual_seed(args.seed)
    agent = Agent(obs_size, privileged_size, action_size, args).to(device)
    torch.manual_seed(simulator_seed)  # mjlab and Isaac Lab draw from the global generators
    generator = torch.Generator(device).manual_seed(args.seed)

    # All parameters are views of one vector, so that clipping and Adam are one operation each.
    parameters = list(agent.parameters())
    flat = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(flat, parameters)
    optimizer = torch.optim.Adam([flat], lr=torch.tensor(args.learning_rate, device=device), fused=True)
    if checkpoint:
        load_agent(agent, checkpoint, run_dir)
        optimizer.load_state_dict(checkpoint["optimizer"])
        generator.set_state(checkpoint["rng_state"].cpu())
    learning_rate = optimizer.param_groups[0]["lr"]
    gradient_function = minibatch_gradient
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True
        torch.compiler.reset()  # drops the graph of an earlier run in this process
        gradient_function = torch.compile(minibatch_gradient, fullgraph=True)

    if not checkpoint:
        run_dir = make_run_dir(args)
        (run_dir / "episodes.csv").write_text("step,return,length\n")
        (run_dir / "metrics.csv").touch()
    for name in ("agent.pt", "evaluation.json"):  # of a run that was complete, and goes on
        (run_dir / name).unlink(missing_ok=True)
    if args.track:
        settings = dict(config=dataclasses.asdict(args), dir=run_dir, id=run_dir.name, name=run_dir.name)
        wandb.init(project=args.wandb_project, resume="allow", sync_tensorboard=True, **settings)
    trim(run_dir / "episodes.csv", step)
    trim(run_dir / "metrics.csv", step)
    episodes_file, metrics_file = (run_dir / "episodes.csv").open("a"), (run_dir / "metrics.csv").open("a")
    columns = (run_dir / "metrics.csv").read_text().partition("\n")[0].split(",")[1:]
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    writer.add_text("args", "\n".join(f"    {k}: {v}" for k, v in dataclasses.asdict(args).items()))
    kept = f"go on with: python {SCRIPT}.py --resume {run_dir}"

    def save_checkpoint():
        writer.flush()
        state = {"script": SCRIPT, "env_id": args.env_id, "step": step, "agent": agent.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "rng_state": generator.get_state(), "device": device.type}
        state["recent_episodes"] = list(recent_episodes)
        write_atomically(run_dir / "checkpoint.pt", to_bytes(state))

    recent_episodes = deque(checkpoint["recent_episodes"] if checkpoint else (), maxlen=100)
    if not checkpoint:
        save_checkpoint()
    obs = torch.zeros(num_steps, num_envs, obs_size, device=device)
    privileged = torch.zeros(num_steps + 1, num_envs, privileged_size, device=device)
    actions, means = torch.zeros(2, num_steps, num_envs, action_size, device=device)
    rewards = torch.zeros(num_steps, num_envs, device=device)
    valid, terminated, truncated = torch.zeros(3, num_steps, num_envs, dtype=bool, device=device)
    (next_obs, next_privileged), logs = envs.reset(stagger=True, steps=step // num_envs)
    unlogged = dict.fromkeys(logs, math.nan)  # where no episode ends in an iteration
    done = torch.zeros(num_envs, dtype=bool, device=device)
    episode_return, episode_length = np.zeros((2, num_envs))
    iteration, first_step, start_time, last_line = 0, step, time.time(), time.time()
    print(f"{SCRIPT} on {args.env_id}, seed {args.seed}, {device}: {run_dir}", flush=True)
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=not sys.stderr.isatty())

    while step < args.total_timesteps and not STOP:
        iteration += 1
        if args.lr_schedule == "linear":
            learning_rate.fill_(args.learning_rate * (1 - step / args.total_timesteps))

        rollout_start, logged = time.perf_counter(), {}
        with torch.inference_mode():
            noise = agent.log_std.exp() * torch.randn(actions.shape, generator=generator, device=device)
            for t in range(num_steps):
                valid[t] = ~done  # where the step is a dummy that only resets the simulator, see make_envs
                obs[t], privileged[t] = next_obs, next_privileged
                means[t] = agent.policy(agent.normalize(next_obs))
                actions[t] = means[t] + noise[t]
                state, rewards[t], terminated[t], truncated[t], logs = envs.step(actions[t])
                next_obs, next_privileged = state
                done = (terminated[t] | truncated[t]) & envs.next_step
                for name, x in logs.items():
                    logged.setdefault(name, []).append(x)
            privileged[num_steps] = next_privileged
        real = valid.cpu().numpy()  # waits for the device, once per iteration
        update_start = time.perf_counter()

        steps = step + real.sum(1).cumsum()  # real transitions up to each row
        step = int(steps[-1])
        for name, x in (("reward", rewards), ("observation", obs), ("observation", privileged)):
            if not x.isfinite().all():
                raise SystemExit(f"error: {args.env_id} returned a {name} that is not finite, step {step}; {kept}")
        return_sums, length_sums = rewards.double().cumsum(0).cpu().numpy(), real.cumsum(0)
        for t, n in zip(*(terminated | truncated).cpu().numpy().nonzero()):
            episode = float(episode_return[n] + return_sums[t, n]), int(episode_length[n] + length_sums[t, n])
            episode_return[n], episode_length[n] = -return_sums[t, n], -length_sums[t, n]
            recent_episodes.append(episode)
            episodes_file.write(f"{steps[t]},{episode[0]:.8g},{episode[1]}\n")
        episode_return, episode_length = episode_return + return_sums[-1], episode_length + length_sums[-1]
        tensor = functools.partial(torch.as_tensor, dtype=torch.float32, device=device)
        means_of_logs = {name: torch.stack([*map(tensor, x)]).mean().item() for name, x in logged.items()}

        with torch.no_grad():
            inputs, privileged_inputs = agent.normalize(obs), agent.normalize_privileged(privileged)
            values, log_stds = agent.value(privileged_inputs), agent.log_std
            if envs.next_step:
                bootstrapped, ends = rewards, terminated
            else:  # the next row is another episode's: as in RSL-RL, V(s_t) stands in for V(s_t+1) at a time limit
                bootstrapped = rewards + args.gamma * values[:-1] * (truncated & ~terminated)
                ends = terminated | truncated
            advantages, returns = compute_gae(bootstrapped, values, ends, truncated, args.gamma, args.gae_lambda)
            batch = dict(obs=inputs, privileged=privileged_inputs[:-1], actions=actions, means=means)
            batch |= dict(log_stds=log_stds.expand_as(actions), log_probs=log_prob(means, log_stds, actions))
            batch |= dict(values=values[:-1], returns=returns, advantages=advantages)
            if args.use_median:
                batch["medians"] = agent.median(privileged_inputs[:-1])
            rows = valid.flatten().nonzero().squeeze(-1)
            batch = {name: x.flatten(0, 1)[rows] for name, x in batch.items()}
            prepare_batch(batch, args)

        # The same minibatches in all epochs, as in RSL-RL; the order is topped up from its front for the dummy rows.
        order = torch.randperm(len(rows), generator=generator, device=device)
        order = order[torch.arange(num_steps * num_envs, device=device) % len(rows)]
        minibatches = [{name: x[part] for name, x in batch.items()} for part in order.view(args.num_minibatches, -1)]
        totals, learning_rates = 0, 0
        for _ in range(args.update_epochs):
            for minibatch in minibatches:
                flat.grad, stats, names = gradient_function(agent, parameters, minibatch, learning_rate, args)
                optimizer.step()
                agent.std.data.clamp_(min=0.01)
                totals, learning_rates = totals + stats, learning_rates + learning_rate
        updates = args.update_epochs * args.num_minibatches
        metrics = dict(zip(names, (totals / updates).tolist()))
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise SystemExit(f"error: {name} is {value} at step {step}; {kept}")

        with torch.no_grad():
            ratio = (log_prob(agent.policy(batch["obs"]), agent.log_std, batch["actions"]) - batch["log_probs"]).exp()
            metrics |= ratio_statistics(ratio, *ratio_bounds(args))
            metrics |= improvement_bound(ratio, batch, args)
            unexplained = (batch["returns"] - batch["values"]).var() / batch["returns"].var()
            if args.norm_obs:
                agent.obs_stats.update(obs.flatten(0, 1)[rows])
                agent.privileged_stats.update(privileged[:-1].flatten(0, 1)[rows])
        mean_return, mean_length = np.mean(recent_episodes, axis=0) if recent_episodes else (math.nan, math.nan)
        sps = (step - first_step) / (time.time() - start_time)
        metrics |= {
            "losses/explained_variance": 1 - unexplained.item(),
            "charts/mean_return_100": mean_return,
            "charts/mean_length_100": mean_length,
            "charts/learning_rate": (learning_rates / updates).item(),
            "charts/std": agent.log_std.exp().mean().item(),
            "charts/SPS": sps,
            "time/rollout": update_start - rollout_start,
            "time/update": time.perf_counter() - update_start,
        }
        metrics |= unlogged | means_of_logs
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        if metrics_file.tell() == 0:
            columns = list(metrics)
            metrics_file.write(",".join(["step", *columns]) + "\n")
        row = (f"{metrics.get(name, math.nan):.6g}" for name in columns)
        metrics_file.write(",".join([str(step), *row]) + "\n")
        episodes_file.flush()
        metrics_file.flush()

        bar.set_postfix_str(f"return {mean_return:.1f}", refresh=False)
        bar.update(min(step, args.total_timesteps) - bar.n)
        if bar.disable and (time.time() - last_line > 30 or step >= args.total_timesteps):
            last_line, left = time.time(), max(args.total_timesteps - step, 0) / sps
            print(f"step {step}, {sps:.0f} steps/s, mean return {mean_return:.1f}, {left:.0f} s left", flush=True)
        if iteration % args.checkpoint_interval == 0:
            save_checkpoint()

    save_checkpoint()
    bar.close()
    envs.close()
    episodes_file.close()
    metrics_file.close()
    if step < args.total_timesteps:
        writer.close()
        raise SystemExit(f"stopped at step {step}; {kept}")
    state = {"script": SCRIPT, "env_id": args.env_id, "agent": agent.state_dict()}
    write_atomically(run_dir / "agent.pt", to_bytes(state))
    for name, result in report(agent, args, run_dir).items():
        writer.add_scalar(f"evaluation/{name}_return", result["mean"], step)
    writer.close()
    if args.track:
        wandb.finish()
    if args.capture_video:
        film(agent, args, run_dir / "videos")
    return str(run_dir)


def request_stop(number, _):
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)


def main(args):
    """Trains an agent, or evaluates that of an earlier run."""
    if args.resume is not None and args.evaluate is not None:
        raise BadInput("--resume and --evaluate exclude each other: pass one of them")
    if args.evaluate is None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, request_stop)
        return train(args)
    run_dir = Path(args.evaluate)
    name = "agent.pt" if (run_dir / "agent.pt").exists() else "checkpoint.pt"
    run_args, checkpoint = load_run(run_dir, name, args.device)
    run_args = dataclasses.replace(run_args, eval_episodes=args.eval_episodes, capture_video=args.capture_video)
    run_args.compile = args.compile
    check_same_settings(args, run_args)
    check_args(run_args)
    torch.set_float32_matmul_precision(run_args.matmul_precision)
    torch.manual_seed(run_args.seed)
    envs, *sizes = make_envs(run_args, 1, run_args.seed)
    envs.close()
    agent = Agent(*sizes, run_args).to(find_device(run_args))
    load_agent(agent, checkpoint, run_dir)
    report(agent, run_args, run_dir)
    if args.capture_video:
        film(agent, run_args, run_dir / "videos")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(f"error: cannot go on: {error}")
