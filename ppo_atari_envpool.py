"""Proximal Policy Optimization (PPO) for Atari games, in one file.

Schulman et al., 2017, https://arxiv.org/abs/1707.06347. All else is its sibling's text: the diff is the algorithm.

    python ppo_atari_envpool.py --env-id Breakout-v5
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
from contextlib import ExitStack, redirect_stderr, suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).stem
RANK, LOCAL_RANK = (int(os.environ.get(x) or 0) for x in ("RANK", "LOCAL_RANK"))  # set by torchrun
WORLD_SIZE, LOCAL_WORLD_SIZE = (int(os.environ.get(x) or 1) for x in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
Steps = Annotated[int, Field(ge=1, le=10**15)]
Size = Annotated[int, Field(ge=1, le=10**6)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e38)]
NonNegative = Annotated[float, Field(ge=0, le=1e38)]


@dataclass(config=dict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True))
class Args:
    env_id: str = "Breakout-v5"  # a game; PongNoFrameskip-v4 is Pong-v5, too
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # of simulators, initial weights, actions and minibatches
    total_timesteps: Steps = 10_000_000  # steps, all environments together, of four frames
    num_envs: Size = 8  # environments in parallel, N, all processes together
    num_steps: Annotated[int, Field(ge=2, le=10**6)] = 128  # steps per environment and iteration, T
    minibatch_size: Size = 256  # samples per gradient step, all processes together
    update_epochs: Size = 4  # passes over the rollout per iteration
    learning_rate: Positive = 2.5e-4  # Adam's step size, at the start if it is scheduled
    lr_schedule: Literal["constant", "linear"] = "constant"  # linear: to 0 at the last step
    target_kl: Positive | None = None  # no further epoch above this approximate KL, in nats
    gamma: Fraction = 0.98  # discount factor
    gae_lambda: Fraction = 0.95  # lambda of generalised advantage estimation
    clip_coef: Positive = 0.2  # epsilon: the ratio's bounds are 1 -+ epsilon
    norm_adv: bool = True  # divide advantages by the minibatch's standard deviation; PPO centres them as well
    vf_coef: NonNegative = 0.5  # w_1, weight of the value loss
    clip_vloss: bool = False  # clip the value's change by --clip-coef, too
    ent_coef: NonNegative = 0.01  # weight of the entropy bonus
    max_grad_norm: Positive = 0.5  # largest norm of the gradient over all networks
    heads: Literal["linear", "mlp"] = "linear"  # of policy and value; mlp: with a hidden layer (authors' code)
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # of network and frames
    bf16: bool = False  # compute the trunk in bfloat16: for GPUs, avx512_bf16 and AMX
    compile: bool = False  # torch.compile the loss: does not pay on a CPU
    cuda_graphs: bool = False  # replay the compiled loss as CUDA graphs
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
        if not 2 <= self.minibatch_size <= self.num_envs * self.num_steps:
            raise ValueError("--minibatch-size must be from 2 to num_envs * num_steps")
        if self.num_envs % WORLD_SIZE or self.minibatch_size % WORLD_SIZE:
            raise ValueError(f"--num-envs and --minibatch-size must be multiples of the {WORLD_SIZE} processes")
        if self.cuda_graphs and not (self.compile and self.device == "cuda"):
            raise ValueError("--cuda-graphs needs --compile and --device cuda")
        return self


# --- the algorithm


def ratio_bounds(args):
    """Bounds (c_l, c_h) of the ratio between new and old policy."""
    return 1 - args.clip_coef, 1 + args.clip_coef


def policy_loss(ratio, advantage, clip_coef):
    """The negative clipped surrogate, Eq. 17 of the BRRL paper: [B], [B] -> [B]"""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage)


def minibatch_loss(agent, batch, args):
    """The objective on samples, tensors [B, ...]: the loss [] and a dict of statistics []."""
    features, returns = agent.features(batch["obs"]), batch["returns"]
    policy, value = agent(features), agent.value(features)
    log_ratio = policy.log_prob(batch["actions"]) - batch["log_probs"]
    advantage = returns - batch["values"]
    if args.norm_adv:
        mean, _, std = batch["moments"]
        advantage = (advantage - mean) / (std + 1e-8)
    pg_loss = policy_loss(log_ratio.exp(), advantage, args.clip_coef).mean()
    v_loss = value_loss(value, batch, args)
    entropy = policy.entropy().mean()
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
    ratio, old = log_ratio.exp(), batch["log_policy"]
    kl = old.exp() * (old - policy.logits)
    clipfrac = ((ratio < low) | (ratio > high)).float().mean()
    return {"approx_kl": (ratio - 1 - log_ratio).mean(), "kl": kl.sum(-1).mean(), "clipfrac": clipfrac}


# --- the agent


def orthogonal(layer, gain=2**0.5):
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def head(inputs, outputs, output_gain, hidden):
    """A linear layer, with a hidden one of 256 before it on demand."""
    if not hidden:
        return nn.Sequential(orthogonal(nn.Linear(inputs, outputs), output_gain))
    return nn.Sequential(orthogonal(nn.Linear(inputs, 256)), nn.ReLU(), *head(256, outputs, output_gain, False))


def critic(inputs, hidden):
    return head(inputs, 1, 1.0, hidden).append(nn.Flatten(-2))  # [..., 1] -> [...]


class Agent(nn.Module):
    """The Nature CNN (Mnih et al., 2015) and heads on its features."""

    def __init__(self, channels, num_actions, args):
        super().__init__()
        self.bf16, relu = args.bf16, nn.ReLU(inplace=True)
        self.first = orthogonal(nn.Conv2d(channels, 32, 8, stride=4))
        second, third = orthogonal(nn.Conv2d(32, 64, 4, stride=2)), orthogonal(nn.Conv2d(64, 64, 3))
        self.convolutions = nn.Sequential(relu, second, relu, third, relu)
        self.dense = nn.Sequential(orthogonal(nn.Linear(7 * 7 * 64, 512)), relu)
        mlp = args.heads == "mlp"
        self.policy, self.value = head(512, num_actions, 0.01, mlp), critic(512, mlp)

    def features(self, frames):
        """What the heads read: frames[B, H, W, C] -> [B, 512]"""
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            # Bytes are exact in bfloat16, and dividing the weights by 255 is cheaper than dividing the frames.
            images = frames.movedim(-1, 1).to(torch.bfloat16 if self.bf16 else torch.float32)
            maps = nn.functional.conv2d(images, self.first.weight / 255, self.first.bias, stride=4)
            # Flattened channels last, as they lie in memory: neither the maps nor their gradient are rearranged.
            return self.dense(self.convolutions(maps).movedim(1, -1).flatten(1)).float()

    def forward(self, features):
        """The policy: features[..., 512] -> Categorical[...]"""
        return Categorical(logits=self.policy(features), validate_args=False)

    def normalize(self, obs):
        """The simulator's frames as what the policy reads: [B, C, H, W] -> [B, 512]"""
        return self.features(obs.movedim(1, -1))

    def to_env(self, action):
        """Actions as the simulator takes them."""
        return action.cpu().numpy()


# --- the environment


def make_envs(args, num_envs, key, render=False):
    """Games with seeds drawn from key, their observation and action space; BadInput if there is no such game.

    They reset on the step after the one that ended an episode. For learning, a lost life ends one and rewards are
    clipped; infos hold the game's own reward and end.
    """
    seeds = (np.random.SeedSequence(key).generate_state(num_envs) & 0x7FFFFFFF).tolist()  # EnvPool wants int32
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sizes = dict(num_envs=num_envs, num_threads=max(1, min(num_envs, cores // LOCAL_WORLD_SIZE)))
    options = dict(env_type="gymnasium", episodic_life=True, reward_clip=True)
    options["render_mode"] = "rgb_array" if render else None
    game = find_game(args.env_id)
    import envpool

    envs = envpool.make(game, seed=seeds, **options, **sizes)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    return envs, envs.observation_space, envs.action_space


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


@torch.inference_mode()
def collect(agent, envs, state, args):
    """T steps from state, which is updated: the rollout, tensors [T, N, ...], and rows of the games that ended.

    The step after an episode's end is a dummy that only resets the simulator: valid is False there. features has T + 1
    rows. A row adds up the game's own rewards over all its lives.
    """
    shape, games, features = state.frames.shape[:2], [], []
    rewards, (valid, terminated, truncated) = np.zeros(shape, np.float32), np.zeros((3, *shape), bool)
    actions = torch.zeros(shape, dtype=torch.int64, device=args.device)
    noise = -torch.empty(*shape, agent.policy[-1].out_features).exponential_().log().to(args.device)  # Gumbel
    for t in range(args.num_steps):
        valid[t] = ~state.done
        state.staging.copy_(torch.from_numpy(state.obs))
        state.frames[t] = state.staging.to(args.device, non_blocking=True).movedim(1, -1)  # the device rearranges them
        features.append(agent.features(state.frames[t]))
        actions[t] = (agent.policy(features[t]) + noise[t]).argmax(-1)  # a sample
        state.obs, rewards[t], terminated[t], truncated[t], info = envs.step(agent.to_env(actions[t]))
        state.done = terminated[t] | truncated[t]
        state.returns += info["reward"] * valid[t]
        state.lengths += valid[t]
        for n in (info["terminated"].astype(bool) | truncated[t]).nonzero()[0]:
            games.append((t, float(state.returns[n]), int(state.lengths[n])))
            state.returns[n] = state.lengths[n] = 0
    features.append(agent.normalize(torch.from_numpy(state.obs).to(args.device)))
    state.step, rows = add_up(state.step, valid.sum(1), games)
    rollout = dict(rewards=rewards, valid=valid, terminated=terminated, truncated=truncated)
    rollout = {name: torch.from_numpy(x).to(args.device) for name, x in rollout.items()}
    rollout |= dict(obs=state.frames, actions=actions, features=torch.stack(features))
    return rollout, rows


@torch.no_grad()
def prepare(agent, rollout, args):
    """The rollout as samples, tensors [T * N, ...] (the frames are not copied), and the indices of the valid ones."""
    features, rewards, actions = rollout["features"], rollout["rewards"], rollout["actions"]
    values, terminated, truncated = agent.value(features), rollout["terminated"], rollout["truncated"]
    _, returns = compute_gae(rewards, values, terminated, truncated, args.gamma, args.gae_lambda)
    features, policy = features[:-1], agent(features[:-1])
    batch = dict(obs=rollout["obs"], actions=actions, returns=returns, values=values[:-1])
    batch |= dict(log_policy=policy.logits, log_probs=policy.log_prob(actions))
    return {name: x.flatten(0, 1) for name, x in batch.items()}, rollout["valid"].flatten().nonzero().squeeze(-1)


def minibatch_moments(advantages):
    """Mean, mean size and standard deviation of minibatches over all processes: [..., B] -> [..., 3]"""
    x, count = advantages.double(), advantages.shape[-1] * WORLD_SIZE
    mean, size, square = average(torch.stack([x, x.abs(), x.square()]).mean(-1))
    std = ((square - mean.square()).clamp(min=0) * count / (count - 1)).sqrt()
    return torch.stack([mean, size, std], -1).float()


def make_optimizer(agent, args):
    """Adam on one vector, which processes average at once; the parameters become views of it."""
    parameters = list(agent.parameters())
    flat = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    nn.utils.vector_to_parameters(flat.data, parameters)
    lr = torch.tensor(args.learning_rate)  # a tensor: schedules change it in place
    return torch.optim.Adam([flat], lr=lr, eps=1e-5, fused=True)


def minibatch_gradient(loss_function, agent, batch, args):
    """The clipped gradient of all parameters as one vector, the mean over all processes, and the statistics."""
    loss, stats = loss_function(agent, batch, args)
    gradients = torch.autograd.grad(loss, list(agent.parameters()))
    gradient = average(torch.cat([x.flatten() for x in gradients]))
    norm = gradient.norm()
    stats = {name: x.detach().clone() for name, x in stats.items()}  # a CUDA graph's outputs are overwritten
    return gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0), stats | {"grad_norm": norm}


def take(batch, indices, moments):
    """A minibatch: index_select, unlike batch[indices], copies a frame at once."""
    return {name: x.index_select(0, indices) for name, x in batch.items()} | {"moments": moments}


def update(agent, optimizer, loss_function, batch, rows, args):
    """Epochs of gradient steps; returns the mean of each statistic over all minibatches, and what measure says."""
    (parameters,), size, history = optimizer.param_groups[0]["params"], args.minibatch_size // WORLD_SIZE, []
    # The last minibatch is topped up from the first: all have one size, and all processes as many of them.
    places = torch.arange(math.ceil(max(gather(len(rows))) / size) * size) % len(rows)
    order = torch.stack([torch.randperm(len(rows))[places] for _ in range(args.update_epochs)]).to(args.device)
    order = rows[order].view(args.update_epochs, -1, size)
    moments = minibatch_moments((batch["returns"] - batch["values"])[order])
    for epoch in zip(order, moments):
        for indices, their_moments in zip(*epoch):
            minibatch = take(batch, indices, their_moments)
            parameters.grad, stats = minibatch_gradient(loss_function, agent, minibatch, args)
            optimizer.step()
            history.append(stats)
        if args.target_kl and average(stats["approx_kl"]) > args.target_kl:
            break
    metrics = {f"losses/{name}": torch.stack([x[name] for x in history]).mean().item() for name in stats}
    # Of one minibatch: the whole rollout would cost another pass.
    return metrics | measure(agent, take(batch, order[-1, 0], moments[-1, 0]), args)


@torch.no_grad()
def measure(agent, batch, args):
    """Statistics of samples [B]: the ratios after the update (Figure 7), the fit of the values before it."""
    low, high = ratio_bounds(args)
    ratio = (agent(agent.features(batch["obs"])).log_prob(batch["actions"]) - batch["log_probs"]).exp()
    stats = {"ratio/out_of_bounds": ((ratio < low) | (ratio > high)).float().mean()}
    for name, chosen in (("high", ratio >= 1), ("low", ratio <= 1)):
        side = ratio[chosen] if chosen.any() else torch.ones(1)
        stats |= {f"ratio/{name}_mean": side.mean(), f"ratio/{name}_std": side.std(correction=0)}
    returns = batch["returns"]
    unexplained = (returns - batch["values"]).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
    stats |= {"losses/explained_variance": 1 - unexplained}
    return {name: x.item() for name, x in stats.items()}


def train(args):
    """Trains an agent; returns its run's folder. Raises BadInput before it creates anything, BrokenRun, SystemExit."""
    set_up_torch(args)
    with (Follower if RANK else Run)(args) as run:
        run.load()
        buffers = make_buffers(args)
        num_envs = args.num_envs // WORLD_SIZE
        envs, obs_space, action_space = make_envs(args, num_envs, [args.seed, run.step, RANK])
        obs, _ = envs.reset()
        torch.manual_seed(args.seed)
        agent = Agent(obs_space.shape[0], action_space.n, args).to(args.device)
        optimizer = make_optimizer(agent, args)
        if WORLD_SIZE > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        run.begin(agent=agent, optimizer=optimizer)  # restores both, or makes the folder: all is known to fit by now
        lr, loss_function = optimizer.param_groups[0]["lr"], compiled(minibatch_loss, args)
        done, (returns, lengths) = np.zeros(num_envs, bool), np.zeros((2, num_envs))
        state = SimpleNamespace(step=run.step, obs=obs, done=done, returns=returns, lengths=lengths, **buffers)
        while state.step < args.total_timesteps and not any(gather(run.stopping)):
            if args.lr_schedule == "linear":
                lr.fill_(args.learning_rate * (1 - state.step / args.total_timesteps))
            rollout, games = collect(agent, envs, state, args)
            batch, rows = prepare(agent, rollout, args)
            metrics = update(agent, optimizer, loss_function, batch, rows, args)
            means = average(torch.tensor([*metrics.values()], dtype=torch.float64)).tolist()
            run.log(state.step, games, dict(zip(metrics, means)) | {"charts/learning_rate": lr.item()})
        envs.close()
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
        return run.finish()


# --- running: folders, logs and checkpoints; no algorithm below

FORMAT = 2  # of args.json and checkpoints
KEYS = {"agent.pt": {"agent"}, "checkpoint.pt": {"agent", "optimizer", "step", "episodes", "rng_state", "log_sizes"}}
MAY_VARY = "resume total_timesteps compile output_dir checkpoint_seconds track wandb_project_name wandb_entity".split()
MAY_VARY += ["device", "cuda_graphs"]


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


class Follower(Run):
    """For the other processes of torchrun: the first alone writes."""

    def load(self):
        if self.args.resume is not None:
            _, self.saved = load_run(self.args.resume, "checkpoint.pt")
            self.step = self.saved["step"]

    def begin(self, **parts):
        for name, part in parts.items() if self.saved else ():
            part.load_state_dict(self.saved[name])
        seed = np.random.SeedSequence([self.args.seed, self.step, RANK]).generate_state(1)
        torch.manual_seed(int(seed[0]))
        self.catch_signals()

    def log(self, step, episodes, metrics):
        pass

    def finish(self):
        pass

    def stop_message(self):
        return 1  # an exit status: the first process says it in words


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


def find_game(env_id):
    """EnvPool's name of a game; BadInput if there is none."""
    try:
        from envpool import registration
    except Exception as error:  # whatever a simulator, or what it imports, raises
        raise BadInput(f"cannot import EnvPool: {one_line(error)}") from None
    specs = registration.registry.specs.items()
    games = {x.removesuffix("-v5").lower(): x for x, spec in specs if spec[0] == "envpool.atari"}
    name = re.sub("NoFrameskip-v4$", "-v5", env_id)
    if name not in games.values():
        title = re.sub(r"^ALE/|(Deterministic|NoFrameskip)?(-v\d+)?$", "", env_id).lower()
        close = [games[x] for x in difflib.get_close_matches(title, games, 3)]
        raise BadInput(f"EnvPool has no game {env_id}" + f": did you mean {', '.join(close)}?" * bool(close))
    return name


def gather(x):
    """x of every process, in their order."""
    parts = [x] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(parts, x)
    return parts


def add_up(step, counts, games):
    """The step after a rollout and rows (step, return, length) of its games, from every process's counts and games."""
    parts = gather((counts, games))
    steps = step + sum(counts for counts, _ in parts).cumsum()
    games = sorted((game for _, games in parts for game in games), key=lambda game: game[0])
    return int(steps[-1]), [(int(steps[t]), *result) for t, *result in games]


def average(x):
    """The mean of a tensor over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
        x /= WORLD_SIZE
    return x


def set_up_torch(args):
    """Precision and devices; BadInput if the machine lacks what the settings need."""
    if args.device == "cuda" and (count := torch.cuda.device_count()) < LOCAL_WORLD_SIZE:
        raise BadInput(f"--device cuda needs a GPU per process, and PyTorch finds {count}: add --device cpu")
    can = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
    if args.compile and not can:
        raise BadInput("--compile needs a C++ compiler and Python.h: add --no-compile")
    # Large tensors in huge pages, which are quick to map (Linux). PyTorch reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # oneDNN's products on a CPU, TF32 on a GPU. On a CPU with bfloat16 that would be bfloat16, unless it is asked for.
    medium = args.device == "cuda" or args.bf16 or not torch.cpu._is_avx512_bf16_supported()
    torch.set_float32_matmul_precision("medium" if medium else "highest")
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)


def make_buffers(args):
    """Room for the frames of a rollout [T, N, H, W, C], and of a step [N, C, H, W], page-locked for a GPU."""
    num_envs, on_gpu = args.num_envs // WORLD_SIZE, args.device == "cuda"
    try:
        frames = torch.empty(args.num_steps, num_envs, 84, 84, 4, dtype=torch.uint8, device=args.device)
    except RuntimeError:
        size = args.num_steps * num_envs * 84 * 84 * 4 / 1e9
        raise BadInput(f"no memory for a rollout's frames, {size:.0f} GB: lower --num-steps or --num-envs") from None
    return dict(frames=frames, staging=torch.empty(num_envs, 4, 84, 84, dtype=torch.uint8, pin_memory=on_gpu))


def compiled(function, args):
    """torch.compile, if that was asked for."""
    if not args.compile:
        return function
    return torch.compile(function, fullgraph=True, mode="reduce-overhead" if args.cuda_graphs else "default")


def read_args(words):
    """Args from the command line. With --resume the run's settings are the defaults."""
    os.environ["PYDANTIC_ERRORS_INCLUDE_URL"] = "0"
    if any(word.startswith(("--evaluate", "--capture")) for word in words):
        raise BadInput("to evaluate and film a run: python enjoy.py RUN_DIR --video")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?")
    run_dir = parser.parse_known_args(words)[0].resume
    if run_dir is None:
        return tyro.cli(Args, args=words)
    saved, _ = load_run(run_dir, "checkpoint.pt")
    saved.resume = run_dir
    return tyro.cli(Args, args=words, default=saved)


if __name__ == "__main__":
    try:
        with redirect_stderr(open(os.devnull, "w") if RANK else sys.stderr):  # one process says what is wrong
            args = read_args(sys.argv[1:])
        train(args)
        if RANK:
            os._exit(0)  # an orderly exit has been seen to abort, while threads of the libraries were still ending
    except SystemExit:
        time.sleep(5 if RANK else 0)  # else torchrun might end the first process before it has said what is wrong
        raise
    except (BadInput, Timeout) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenRun as error:
        sys.exit(f"error: {error}. Checkpoints made before are kept; resumed with the same settings it ends here again")
    except (OSError, MemoryError, RuntimeError) as error:
        known = "(allocate|out of) memory|Connection (closed|reset)"  # the latter: another process has ended
        if isinstance(error, RuntimeError) and not re.search(known, str(error)):
            raise
        sys.exit(f"error: {error}")
