"""Proximal Policy Optimization (PPO) for continuous actions, in one file.

Schulman et al., 2017, https://arxiv.org/abs/1707.06347. All else is its sibling's text: the diff is the algorithm.

    python ppo_continuous_action.py --env-id Hopper-v4
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes during the slow imports below

import argparse
import difflib
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
from contextlib import ExitStack, suppress
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
    env_id: str = "Hopper-v4"  # task with a flat Box observation and a Box action
    env_backend: Literal["envpool", "gymnasium"] = "envpool"  # EnvPool is fast, Gymnasium has more tasks
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # of simulators, initial weights, actions and minibatches
    total_timesteps: Steps = 1_000_000  # environment steps, all environments together
    num_envs: Size = 4  # environments in parallel, N
    num_steps: Size = 512  # steps per environment and iteration, T
    minibatch_size: Size = 64  # samples per gradient step
    update_epochs: Size = 10  # passes over the rollout per iteration
    learning_rate: Positive = 3e-4  # Adam's step size, at the start if it is scheduled
    # linear: to 0 at the last step; adaptive: by --desired-kl, as RSL-RL does (the paper's "ADP")
    lr_schedule: Literal["constant", "linear", "adaptive"] = "linear"
    desired_kl: Positive = 0.01  # KL divergence from the old policy that adaptive aims at, in nats
    target_kl: Positive | None = None  # no further epoch above this approximate KL, in nats
    gamma: Fraction = 0.995  # discount factor
    gae_lambda: Fraction = 0.95  # lambda of generalised advantage estimation
    clip_coef: Positive = 0.3  # epsilon: the ratio's bounds are 1 -+ epsilon
    objective: Literal["clip", "spo"] = "clip"  # PPO's, or Simple Policy Optimization's quadratic penalty
    norm_adv: bool = True  # divide advantages by the minibatch's standard deviation; PPO centres them as well
    norm_obs: bool = True  # standardise observations with running statistics
    min_obs_std: NonNegative = 0.3  # least standard deviation to divide by: an input that hardly varies is not blown up
    norm_reward: bool = True  # divide rewards by the running standard deviation of the discounted return
    vf_coef: NonNegative = 0.5  # w_1, weight of the value loss
    clip_vloss: bool = False  # clip the value's change by --clip-coef, too
    ent_coef: NonNegative = 0.0  # weight of the entropy bonus
    max_grad_norm: Positive = 0.5  # largest norm of the gradient over all networks
    hidden_size: Size = 64  # width of each network's two hidden layers
    activation: Literal["tanh", "relu", "elu"] = "tanh"  # nonlinearity of the hidden layers
    log_std_init: float = -0.5  # initial logarithm of the policy's standard deviation
    compile: bool = True  # torch.compile the gradient step, if there is a C++ compiler
    exp_name: str = SCRIPT  # a part of the run's name
    output_dir: str = "runs"  # parent of the run's folder
    checkpoint_seconds: NonNegative = 30  # between checkpoints; 0: one after every iteration
    resume: str | None = None  # RUN_DIR: go on with this run; --total-timesteps may differ
    track: bool = False  # log to Weights & Biases, too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "bounded-ratio-rl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team

    @model_validator(mode="after")
    def check(self):
        if not 2 <= self.minibatch_size <= self.num_envs * self.num_steps:
            raise ValueError("--minibatch-size must be from 2 to num_envs * num_steps")
        return self


# --- the algorithm


def ratio_bounds(args):
    """Bounds (c_l, c_h) of the ratio between new and old policy."""
    return 1 - args.clip_coef, 1 + args.clip_coef


def policy_loss(ratio, advantage, clip_coef):
    """The negative clipped surrogate, Eq. 17 of the BRRL paper: [B], [B] -> [B]"""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage)


def spo_loss(ratio, advantage, clip_coef):
    """Simple Policy Optimization (Xie et al., 2024): [B], [B] -> [B]. Least where the ratio is 1 +- clip_coef."""
    return advantage.abs() * (ratio - 1).square() / (2 * clip_coef) - ratio * advantage


def minibatch_loss(agent, batch, args):
    """The objective on samples, tensors [B, ...]: the loss [] and a dict of statistics []."""
    obs, returns = batch["obs"], batch["returns"]
    policy, value = agent(obs), agent.value(obs)
    log_ratio = policy.log_prob(batch["actions"]).sum(-1) - batch["log_probs"]
    advantage = returns - batch["values"]
    if args.norm_adv:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    pg_loss = {"clip": policy_loss, "spo": spo_loss}[args.objective](log_ratio.exp(), advantage, args.clip_coef).mean()
    v_loss = value_loss(value, batch, args)
    entropy = policy.entropy().sum(-1).mean()
    loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy
    stats = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
    return loss, stats | policy_change(log_ratio, policy, batch, args)


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


def mlp(inputs, outputs, output_gain, args):
    size, activation = args.hidden_size, {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}[args.activation]
    layers = nn.Linear(inputs, size), activation(), nn.Linear(size, size), activation(), nn.Linear(size, outputs)
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), output_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def critic(inputs, args):
    return mlp(inputs, 1, 1.0, args).append(nn.Flatten(-2))  # [..., 1] -> [...]


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
    """Networks of normalised observations, and what belongs to them. Actions -1 to 1 span the task's bounds, if any."""

    def __init__(self, obs_size, action_low, action_high, args):
        super().__init__()
        self.policy = mlp(obs_size, len(action_low), 0.01, args)
        self.log_std = nn.Parameter(torch.full((len(action_low),), args.log_std_init))
        self.value = critic(obs_size, args)
        self.norm_obs = args.norm_obs
        self.obs_stats, self.return_stats = RunningNormalizer(obs_size, args.min_obs_std), RunningNormalizer(1)
        self.register_buffer("discounted_return", torch.zeros(args.num_envs, dtype=torch.float64))
        low, high = torch.as_tensor(action_low), torch.as_tensor(action_high)
        bounded = torch.maximum(low.abs(), high.abs()) < 1000  # some tasks write a huge number for no bound
        offset, scale = torch.where(bounded, (low + high) / 2, 0.0), torch.where(bounded, (high - low) / 2, 1.0)
        self.register_buffer("action_map", torch.stack([offset, scale, low, high]))

    def forward(self, obs):
        """The Gaussian policy: obs[..., O] -> Normal[..., A]"""
        return Normal(self.policy(obs), self.log_std.exp(), validate_args=False)

    def normalize(self, obs):
        return self.obs_stats(obs) if self.norm_obs else obs

    def scale_rewards(self, rewards, valid, gamma):
        """Rewards [T, N] over the running standard deviation of the discounted return."""
        history = []
        for reward, real in zip(rewards, valid):  # a dummy step, whose reward is 0, starts the sum anew
            self.discounted_return = reward + gamma * self.discounted_return * real
            history.append(self.discounted_return)
        if valid.any():
            self.return_stats.update(torch.stack(history)[valid][:, None])
        return (rewards / self.return_stats.std()).clamp(-10, 10)

    def to_env(self, action):
        """The policy's action as the simulator takes it: [..., A] -> array [..., A]"""
        offset, scale, low, high = self.action_map.numpy()
        return np.clip(offset + scale * action.numpy(), low, high)


# --- the environment


def make_envs(args, num_envs, key):
    """Environments with seeds drawn from key, their observation and action space; BadInput if the task does not fit.

    They reset on the step after the one that ended an episode.
    """
    seeds = (np.random.SeedSequence(key).generate_state(num_envs) & 0x7FFFFFFF).tolist()  # EnvPool wants int32
    gym.logger.min_level = gym.logger.ERROR  # old task versions are asked for on purpose
    try:
        if args.env_backend == "envpool":
            import envpool

            if args.env_id not in (known := envpool.list_all_envs()):
                close = difflib.get_close_matches(args.env_id, known, 3) or ["--env-backend gymnasium"]
                raise ValueError(f"it has no such task, did you mean {', '.join(close)}?")
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            envs = envpool.make_gymnasium(args.env_id, num_envs=num_envs, num_threads=min(num_envs, cores), seed=seeds)
        else:
            envs = gym.make_vec(args.env_id, num_envs, vectorization_mode="sync")
            envs.reset(seed=seeds)
    except Exception as error:  # whatever a simulator, or what it imports, raises
        raise BadInput(f"{args.env_backend} cannot make {args.env_id}: {one_line(error)}") from None
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    for name, space in (("observation", obs_space), ("action", action_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise BadInput(f"{args.env_id} has no flat Box {name}, which this script needs, but {space}")
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    return envs, obs_space, action_space


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
    if not np.abs(x).max() < 3e38:
        raise BrokenRun(f"{args.env_id} returned {name} that is no finite float32")


@torch.inference_mode()
def collect(agent, envs, state, args):
    """T steps from state, which is updated: the rollout, tensors [T, N, ...], and rows of the finished episodes.

    The step after an episode's end is a dummy that only resets the simulator: valid is False there. obs has T + 1 rows.
    """
    shape, episodes = (args.num_steps, args.num_envs), []
    obs = torch.zeros(args.num_steps + 1, *state.obs.shape)
    actions = torch.zeros(*shape, len(agent.log_std))
    noise = agent.log_std.exp() * torch.randn_like(actions)  # at once: Normal.sample would double the time of acting
    rewards, (valid, terminated, truncated) = np.zeros(shape), np.zeros((3, *shape), bool)
    for t in range(args.num_steps):
        valid[t] = ~state.done
        obs[t] = torch.from_numpy(state.obs)
        actions[t] = agent.policy(agent.normalize(obs[t])) + noise[t]
        state.obs, reward, terminated[t], truncated[t], _ = envs.step(agent.to_env(actions[t]))
        rewards[t] = reward * valid[t]
        state.done = terminated[t] | truncated[t]
        state.step += int(valid[t].sum())
        state.totals += rewards[t], valid[t]
        for n in state.done.nonzero()[0]:
            episodes.append((state.step, *state.totals[:, n].tolist()))
            state.totals[:, n] = 0
        require_finite(reward, "a reward", args)
        require_finite(state.obs, "an observation", args)
    obs[-1] = torch.from_numpy(state.obs)
    rollout = dict(obs=obs, actions=actions, rewards=rewards, valid=valid, terminated=terminated, truncated=truncated)
    return {name: torch.as_tensor(x) for name, x in rollout.items()}, episodes


@torch.no_grad()
def prepare(agent, rollout, args):
    """The rollout as samples, tensors [B, ...], without dummies. They stay as they are for all epochs."""
    obs, rewards, valid = agent.normalize(rollout["obs"]), rollout["rewards"].float(), rollout["valid"]
    if args.norm_reward:
        rewards = agent.scale_rewards(rewards, valid, args.gamma)
    values, terminated, truncated = agent.value(obs), rollout["terminated"], rollout["truncated"]
    _, returns = compute_gae(rewards, values, terminated, truncated, args.gamma, args.gae_lambda)
    obs, actions = obs[:-1], rollout["actions"]
    policy = agent(obs)
    batch = dict(obs=obs, actions=actions, returns=returns, values=values[:-1])  # advantages: returns - values
    batch |= dict(means=policy.mean, stds=policy.stddev, log_probs=policy.log_prob(actions).sum(-1))
    return {name: x[valid] for name, x in batch.items()}


def make_optimizer(agent, args):
    lr = torch.tensor(args.learning_rate)  # a tensor: schedules change it in place
    return torch.optim.Adam(agent.parameters(), lr=lr, eps=1e-5, fused=True)


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
    # The last minibatch is topped up from the first, so that all have one size.
    places = torch.arange(math.ceil(samples / args.minibatch_size) * args.minibatch_size) % samples
    for _ in range(args.update_epochs):
        for rows in torch.randperm(samples)[places].split(args.minibatch_size):
            minibatch = {name: x[rows] for name, x in batch.items()}
            gradients, stats = gradient_function(agent, minibatch, args)
            for parameter, gradient in zip(group["params"], gradients):
                parameter.grad = gradient
            if args.lr_schedule == "adaptive":
                group["lr"].copy_(adaptive_learning_rate(group["lr"], stats["kl"], args.desired_kl))
            optimizer.step()
            history.append(stats)
        if args.target_kl and stats["approx_kl"] > args.target_kl:
            break
    return {f"losses/{name}": torch.stack([x[name] for x in history]).mean().item() for name in stats}


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
    stats |= {"losses/explained_variance": 1 - unexplained, "charts/log_std": agent.log_std.mean()}
    return {name: x.item() for name, x in stats.items()}


def train(args):
    """Trains an agent; returns its run's folder. Raises BadInput before it creates anything, BrokenRun, SystemExit."""
    torch.set_num_threads(1)  # faster than two for networks of this size
    with Run(args) as run:
        run.load()
        torch.manual_seed(args.seed)
        envs, obs_space, action_space = make_envs(args, args.num_envs, [args.seed, run.step])
        obs, _ = envs.reset()
        require_finite(obs, "an observation", args)
        agent = Agent(obs_space.shape[0], action_space.low, action_space.high, args)
        optimizer = make_optimizer(agent, args)
        run.begin(agent=agent, optimizer=optimizer)  # restores both, or makes the folder: all is known to fit by now
        lr, gradient_function = optimizer.param_groups[0]["lr"], compiled(minibatch_gradient, args)
        state = SimpleNamespace(step=run.step, obs=obs, done=np.zeros(args.num_envs, bool))
        state.totals = np.zeros((2, args.num_envs))  # returns and lengths of the episodes under way
        while state.step < args.total_timesteps and not run.stopping:
            if args.lr_schedule == "linear":
                lr.fill_(args.learning_rate * (1 - state.step / args.total_timesteps))
            rollout, episodes = collect(agent, envs, state, args)
            batch = prepare(agent, rollout, args)
            if len(batch["obs"]) == 0:
                continue  # --num-steps 1, and every environment has just been reset
            metrics = update(agent, optimizer, gradient_function, batch, args) | measure(agent, batch, args)
            agent.obs_stats.update(rollout["obs"][:-1][rollout["valid"]])  # only now: the update sees what acting saw
            run.log(state.step, episodes, metrics | {"charts/learning_rate": lr.item()})
        envs.close()
        return run.finish()


# --- running: folders, logs and checkpoints; no algorithm below

FORMAT = 2  # of args.json and checkpoints
KEYS = {"agent.pt": {"agent"}, "checkpoint.pt": {"agent", "optimizer", "step", "episodes", "rng_state", "log_sizes"}}
MAY_VARY = "resume total_timesteps compile output_dir checkpoint_seconds track wandb_project_name wandb_entity".split()


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
    """torch.compile, if that was asked for and the machine can."""
    can = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
    if not args.compile or not can:
        say("not compiled" if can else "not compiled: there is no C++ compiler, or no Python.h")
        return function
    say("the first update compiles the gradient step: 10 to 40 s")
    torch._dynamo.config.trace_autograd_ops = True
    torch.compiler.reset()  # drops the graph of an earlier run in this process
    # Every call has the same shapes and settings, so the checks that they still fit the graph are left out.
    options = {"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    return torch.compile(function, fullgraph=True, options=options)


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
