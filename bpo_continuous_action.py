"""Bounded Policy Optimization (BPO) for continuous actions, in one file.

BPO (Ao et al., "Bounded Ratio Reinforcement Learning") keeps the ratio of new to old policy within bounds. The best
such ratio is a formula: the update regresses onto it, where PPO follows a gradient until a clip stops it.

    python bpo_continuous_action.py --env-id Hopper-v4

What differs from the sibling, ppo_continuous_action.py:
1. target_ratio: the optimal ratio pi*/pi_0, a sigmoid of the median advantage (Theorem 4.1, Corollary 4.7).
2. policy_loss: the distance of the ratio from that target, weighted by abs(advantage) (Eq. 16), not the clip (Eq. 17).
3. median_loss and a median head: the baseline that makes the target policy sum to one (Eq. 15).
4. Both advantages are divided by one standard deviation and not centred: the median head does that.
5. improvement_bound: the terms of Corollary 4.4, logged under theory/.
"""

import dataclasses
import difflib
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
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.optim.adam import adam
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
    env_id: str = "Hopper-v4"
    """task name: any with a flat Box observation and a Box action"""
    env_backend: Literal["envpool", "gymnasium"] = "envpool"
    """simulator: EnvPool (fast) or Gymnasium (more tasks and machines)"""
    seed: int = 1
    """seed of the simulators, the network's initial weights, the actions and the minibatches"""
    total_timesteps: int = 1_000_000
    """environment steps to train for, all environments together"""
    num_envs: int = 4
    """environments stepped in parallel"""
    num_steps: int = 512
    """steps per environment and iteration"""
    minibatch_size: int = 64
    """samples per gradient step"""
    update_epochs: int = 10
    """passes over the rollout per iteration"""
    learning_rate: float = 3e-4
    """Adam's step size (the initial one if it is scheduled)"""
    lr_schedule: Literal["constant", "linear", "adaptive"] = "linear"
    """linear: to 0 at the last step; adaptive: follows --desired-kl as RSL-RL does (the paper's "ADP")"""
    desired_kl: float = 0.01
    """the divergence between old and new policy that the adaptive schedule aims at, in nats"""
    gamma: float = 0.995
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip_coef: float = 0.3
    """epsilon: the ratio's bounds are 1 - epsilon and 1 + epsilon"""
    ratio_low: float | None = None
    """lower bound c_l of the ratio, in place of 1 - epsilon (Corollary 4.7)"""
    ratio_high: float | None = None
    """upper bound c_h of the ratio, in place of 1 + epsilon (Corollary 4.7)"""
    temperature: float = 0.1
    """lambda of Eq. 9; in standard deviations of the advantage if --norm-adv, else in units of return"""
    median_temperature: float | None = None
    """lambda of Eq. 15 for the median head, in the same units; default: --temperature"""
    use_median: bool = True
    """measure the target's advantage from the learned median; --no-use-median: from the value (no median head)"""
    median_network: Literal["separate", "head", "mlp-head"] = "separate"
    """median head: a network of its own (paper), or a linear layer or an MLP (authors' code) on the value trunk"""
    median_coef: float = 0.5
    """weight of the median loss, w_2 in the paper"""
    divergence: Literal["atv", "tv", "kl"] = "atv"
    """distance from the target policy: advantage-weighted total variation (Eq. 12), total variation (Eq. 11) or KL"""
    tv_coef: float = 0.0
    """alpha_1: weight of the plain total variation beside the advantage-weighted one (Eq. 16)"""
    recompute_advantages: bool = False
    """measure advantages anew in every minibatch, from the current value and median (authors' code)"""
    norm_adv: bool = True
    """scale the minibatch's advantages to a standard deviation of 1 (PPO centres them as well, BPO does not)"""
    norm_obs: bool = True
    """standardise observations with running statistics"""
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return"""
    value_coef: float = 0.5
    """weight of the value loss (R - V)^2, w_1 in the paper"""
    clip_value_loss: bool = False
    """clip the change of the value by --clip-coef as well"""
    target_kl: float | None = None
    """end the iteration's epochs when the approximate KL divergence exceeds this, in nats"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    max_grad_norm: float = 0.5
    """the gradient is scaled down to this norm, over all networks jointly"""
    hidden_size: int = 64
    """width of the two hidden layers of every network"""
    activation: Literal["tanh", "relu", "elu"] = "tanh"
    """nonlinearity of the hidden layers"""
    log_std_init: float = -0.5
    """initial logarithm of the policy's standard deviation"""
    compile: bool = dataclasses.field(default_factory=can_compile)
    """torch.compile the gradient step; by default if a C++ compiler and Python's headers are installed"""
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
    """film one deterministic episode (through Gymnasium) after training or evaluation"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline works without an account)"""
    wandb_project: str = "bounded-ratio-rl"
    """Weights & Biases project"""


def ratio_bounds(args):
    """Bounds (c_l, c_h) of the ratio between new and old policy."""
    low = 1 - args.clip_coef if args.ratio_low is None else args.ratio_low
    return low, 1 + args.clip_coef if args.ratio_high is None else args.ratio_high


def check_args(args):
    """Raises BadInput with one line that says what to change."""
    for names, holds, rule in (
        ("total_timesteps num_envs num_steps update_epochs hidden_size", lambda x: x >= 1, "at least 1"),
        ("checkpoint_interval eval_episodes", lambda x: x >= 1, "at least 1"),
        ("learning_rate desired_kl max_grad_norm", lambda x: 0 < x < math.inf, "positive and finite"),
        ("clip_coef target_kl", lambda x: 0 < x < math.inf, "positive and finite"),
        ("temperature median_temperature", lambda x: 0 < x < math.inf, "positive and finite"),
        ("value_coef ent_coef", lambda x: 0 <= x < math.inf, "finite and not negative"),
        ("median_coef tv_coef", lambda x: 0 <= x < math.inf, "finite and not negative"),
        ("tv_coef", lambda x: x == 0 or args.divergence == "atv", "0 unless --divergence is atv"),
        ("divergence", lambda x: x != "kl" or ratio_bounds(args)[0] > 0, "atv or tv if the ratio's lower bound is 0"),
        ("gamma gae_lambda", lambda x: 0 <= x <= 1, "within [0, 1]"),
        ("seed", lambda x: 0 <= x < 2**31, "within [0, 2^31)"),
        ("log_std_init", math.isfinite, "finite"),
        ("minibatch_size", lambda x: 2 <= x <= args.num_envs * args.num_steps, "from 2 to num_envs * num_steps"),
    ):
        for name in names.split():
            if (value := getattr(args, name)) is not None and not holds(value):
                raise BadInput(f"--{name.replace('_', '-')} must be {rule}, got {value}")
    low, high = ratio_bounds(args)
    if not 0 <= low < 1 < high < math.inf:
        raise BadInput(f"the ratio's bounds must satisfy 0 <= low < 1 < high, got {low} and {high}")
    if args.compile and not can_compile():
        raise BadInput("--compile needs a C++ compiler (CXX or g++) and Python's headers: install them or --no-compile")


def make_envs(args, num_envs, seed):
    """Vector environments, their observation space and their action space; BadInput if the task does not fit.

    They reset on the step after the one that ended an episode: that step is a dummy, its action is ignored.
    """
    gym.logger.min_level = gym.logger.ERROR  # old task versions are asked for on purpose
    if args.env_backend == "envpool":
        try:
            import envpool
        except ImportError:
            raise BadInput("EnvPool is not installed: install it or pass --env-backend gymnasium") from None
        if args.env_id not in (known := envpool.list_all_envs()):
            close = ", ".join(difflib.get_close_matches(args.env_id, known, 3))
            hint = f"did you mean {close}?" if close else "try --env-backend gymnasium"
            raise BadInput(f"EnvPool has no task {args.env_id}: {hint}")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = min(num_envs, cores)
        envs = envpool.make(args.env_id, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=seed)
        obs_space, action_space = envs.observation_space, envs.action_space
    else:
        mode = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        try:
            envs = gym.make_vec(args.env_id, num_envs, vectorization_mode="sync", vector_kwargs=mode)
        except (gym.error.Error, ImportError) as error:
            raise BadInput(f"Gymnasium cannot make {args.env_id}: {' '.join(str(error).split())}") from None
        envs.reset(seed=seed)
        obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        raise BadInput(f"{args.env_id} has no flat Box observation, which this script needs, but {obs_space}")
    if not isinstance(action_space, gym.spaces.Box) or len(action_space.shape) != 1:
        raise BadInput(
            f"{args.env_id} has no continuous (flat Box) action, which this script needs, but {action_space}"
        )
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    return envs, obs_space, action_space


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


class HiddenLayers(nn.Module):
    """The two hidden layers of K networks side by side, so that a layer of all of them is one batched product."""

    def __init__(self, networks, inputs, args):
        super().__init__()
        self.activation = {"tanh": torch.tanh, "relu": torch.relu, "elu": nn.functional.elu}[args.activation]
        size = args.hidden_size
        self.weight_1 = nn.Parameter(torch.zeros(networks, inputs, size))
        self.bias_1 = nn.Parameter(torch.zeros(networks, 1, size))
        self.weight_2 = nn.Parameter(torch.zeros(networks, size, size))
        self.bias_2 = nn.Parameter(torch.zeros(networks, 1, size))
        for matrix in (*self.weight_1.detach(), *self.weight_2.detach()):
            nn.init.orthogonal_(matrix, math.sqrt(2))

    def forward(self, x):
        """All K networks: x[B, I] -> [K, B, H]"""
        x = self.activation(torch.baddbmm(self.bias_1, x.expand(len(self.weight_1), -1, -1), self.weight_1))
        return self.activation(torch.baddbmm(self.bias_2, x, self.weight_2))

    def first(self, x):
        """The first network alone: x[B, I] -> [B, H]"""
        x = self.activation(torch.addmm(self.bias_1[0], x, self.weight_1[0]))
        return self.activation(torch.addmm(self.bias_2[0], x, self.weight_2[0]))


def output_layer(inputs, outputs, gain):
    """A linear layer with orthogonal weights and zero biases."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def scalar(layer, x):
    """A linear layer of one output, as a sum, which compiles better than a product: x[B, H] -> [B]"""
    return (x * layer.weight).sum(-1) + layer.bias


class Agent(nn.Module):
    """Gaussian policy with a state-independent standard deviation, and critics; observations come normalised."""

    def __init__(self, obs_size, action_size, args):
        super().__init__()
        self.obs_stats = RunningNormalizer(obs_size)
        self.return_stats = RunningNormalizer(1)
        self.norm_obs = args.norm_obs
        networks = 2  # policy, critic
        networks += args.use_median and args.median_network == "separate"  # median
        self.hidden = HiddenLayers(networks, obs_size, args)
        self.policy_head = output_layer(args.hidden_size, action_size, gain=0.01)
        self.log_std = nn.Parameter(torch.full((action_size,), args.log_std_init))
        self.value_head = output_layer(args.hidden_size, 1, gain=1.0)
        if args.use_median:
            self.median_head = output_layer(args.hidden_size, 1, gain=1.0)
            self.median_mlp = HiddenLayers(1, args.hidden_size, args) if args.median_network == "mlp-head" else None

    def normalize(self, obs):
        return self.obs_stats(obs) if self.norm_obs else obs

    def policy(self, obs):
        """The mean action: obs[B, O] -> [B, A]"""
        return self.policy_head(self.hidden.first(obs))

    def value(self, hidden):
        """V_phi: hidden[K, B, H] -> [B]"""
        return scalar(self.value_head, hidden[1])

    def median(self, hidden):
        """mu_psi: hidden[K, B, H] -> [B]"""
        return scalar(self.median_head, self.median_mlp.first(hidden[1]) if self.median_mlp else hidden[-1])


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
    values[t+1] must be the value of the observation that step t returned, also where an episode ended.
    """
    rewards, values, terminated, truncated = (np.asarray(x) for x in (rewards, values, terminated, truncated))
    deltas = rewards + gamma * values[1:] * ~terminated.astype(bool) - values[:-1]
    decay = gamma * gae_lambda * ~(terminated.astype(bool) | truncated.astype(bool))
    advantages = np.empty_like(deltas)
    trace = np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = trace = deltas[t] + decay[t] * trace
    return torch.from_numpy(advantages), torch.from_numpy(advantages + values[:-1])


def target_ratio(median_advantage, ratio_low, ratio_high, temperature):
    """Optimal ratio pi*/pi_0 within its bounds (Corollary 4.7; Theorem 4.1 if they are 1 -+ epsilon): [...] -> [...]"""
    odds = (ratio_high - 1) / (1 - ratio_low)
    return ratio_low + (ratio_high - ratio_low) * torch.sigmoid(median_advantage / temperature - math.log(odds))


def median_loss(returns, median_values, ratio_low, ratio_high, temperature):
    """Eq. 15 with the g' of Corollary 4.7: [B], [B] -> [B]. Its gradient in mu is (1 - target_ratio) / (c_h - c_l)."""
    x, odds = returns - median_values, (ratio_high - 1) / (1 - ratio_low)
    return odds / (1 + odds) * x + temperature * nn.functional.softplus(math.log(odds) - x / temperature)


def policy_loss(ratio, target, advantage, tv_coef):
    """Advantage-weighted total variation plus tv_coef times the plain one, Eq. 16: [B], [B], [B] -> [B]"""
    return (target - ratio).abs() * (advantage.abs() + tv_coef)


def minibatch_loss(agent, batch, args):
    """The objective on batch, a dict of tensors [B, ...]: the loss [] and a dict of statistics []."""
    hidden = agent.hidden(batch["obs"])
    mean = agent.policy_head(hidden[0])
    log_ratio = log_prob(mean, agent.log_std, batch["actions"]) - batch["log_probs"]
    ratio = log_ratio.exp()
    entropy = (agent.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
    returns, values = batch["returns"], agent.value(hidden)
    value_loss = (returns - values).square()  # Eq. 14
    if args.clip_value_loss:
        clipped_values = batch["values"] + (values - batch["values"]).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.maximum(value_loss, (returns - clipped_values).square())
    value_loss = value_loss.mean()
    low, high = ratio_bounds(args)
    advantages = returns - (values.detach() if args.recompute_advantages else batch["values"])
    # The floor keeps equal advantages, whose deviation is rounding, from drowning the critics' gradient.
    scale = torch.maximum(advantages.std(), 0.1 * advantages.abs().mean()) + 1e-8 if args.norm_adv else 1.0
    median_advantages, mean_median_loss = advantages, torch.zeros(())
    if args.use_median:
        medians = agent.median(hidden)
        median_advantages = returns - (medians.detach() if args.recompute_advantages else batch["medians"])
        temperature = args.median_temperature or args.temperature
        mean_median_loss = scale * median_loss(returns / scale, medians / scale, low, high, temperature).mean()
    target = target_ratio(median_advantages / scale, low, high, args.temperature)
    if args.divergence == "atv":
        pg_loss = policy_loss(ratio, target, advantages / scale, args.tv_coef)
    else:  # Eq. 11; KL(pi_theta || pi*), plus terms of mean zero that keep every sample's share >= 0
        pg_loss = (target - ratio).abs() if args.divergence == "tv" else ratio * (ratio / target).log() - ratio + target
    pg_loss = pg_loss.mean()
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


def minibatch_gradient(agent, parameters, batch, indices, learning_rate, args):
    """The clipped gradient of all parameters as one vector, the statistics stacked, and their names.

    indices[B] choose the minibatch from batch, a dict of tensors [T * N, ...]. The function is a pure tensor program,
    so it compiles into one graph. With the adaptive schedule it moves learning_rate[] as RSL-RL does.
    """
    loss, stats = minibatch_loss(agent, {name: x[indices] for name, x in batch.items()}, args)
    gradients = torch.autograd.grad(loss, parameters)
    stats["losses/grad_norm"] = norm = torch.stack([g.norm() for g in gradients]).norm()
    if args.lr_schedule == "adaptive":
        kl, lr = stats["losses/kl"].detach(), learning_rate
        lower, higher = (lr / 1.5).clamp(min=1e-5), (lr * 1.5).clamp(max=1e-2)
        lr = torch.where(kl > 2 * args.desired_kl, lower, torch.where(kl < args.desired_kl / 2, higher, lr))
        learning_rate.copy_(lr)
    scale = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    clipped = torch.cat([(g * scale).flatten() for g in gradients])
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
    advantages = batch["returns"] - batch["values"]
    median_advantages = batch["returns"] - batch["medians" if args.use_median else "values"]
    scale = torch.maximum(advantages.std(), 0.1 * advantages.abs().mean()) + 1e-8 if args.norm_adv else 1.0
    target = target_ratio(median_advantages / scale, *ratio_bounds(args), args.temperature)
    gain, divergence = ((target - 1) * median_advantages).mean(), ((target - ratio).abs() * advantages.abs()).mean()
    bound = {"guaranteed_gain": gain, "atv_divergence": divergence, "improvement_bound": gain - divergence}
    return {f"theory/{name}": value.item() for name, value in bound.items()}


def to_env(action, space):
    """The policy's output [N, A] as the simulator takes it: a NumPy array, clipped to the action space."""
    return np.clip(action.numpy(), space.low, space.high).astype(space.dtype)


def evaluate(agent, args, deterministic, seed):
    """Returns [args.eval_episodes], one episode in each of as many environments; the normaliser stays frozen."""
    envs, _, action_space = make_envs(args, args.eval_episodes, seed)
    obs, _ = envs.reset()
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool)
    while running.any():
        with torch.inference_mode():
            action = agent.policy(agent.normalize(torch.from_numpy(obs).float()))
            action += 0 if deterministic else agent.log_std.exp() * torch.randn_like(action)
        obs, reward, terminated, truncated, _ = envs.step(to_env(action, action_space))
        returns += reward * running
        running &= ~(terminated | truncated)
    envs.close()
    return returns


def film(agent, args, folder):
    """Films one deterministic episode as MP4 into the folder, through Gymnasium, which can render without a screen."""
    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
    gym.logger.min_level = gym.logger.ERROR
    try:
        env = gym.wrappers.RecordVideo(gym.make(args.env_id, render_mode="rgb_array"), str(folder))
        (obs, _), done = env.reset(seed=args.seed), False
        while not done:
            with torch.inference_mode():
                action = agent.policy(agent.normalize(torch.from_numpy(obs[None]).float()))
            obs, _, terminated, truncated, _ = env.step(to_env(action[0], env.action_space))
            done = terminated or truncated
        env.close()
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


def load_run(run_dir, name):
    """Args and checkpoint `name` of a run; BadInput if they are missing, damaged or not this script's."""
    try:
        args = dataclasses.replace(Args(**json.loads((run_dir / "args.json").read_text())["args"]), compile=False)
        check_args(args)
        checkpoint = torch.load(run_dir / name, weights_only=True)
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
    modules = [sys.modules[name] for name in ("torch", "gymnasium", "envpool", "numpy") if name in sys.modules]
    about = {"script": SCRIPT, "args": dataclasses.asdict(args), "commit": commit, "python": sys.version.split()[0]}
    about["versions"] = {module.__name__: module.__version__ for module in modules}
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
        args, checkpoint = load_run(run_dir, "checkpoint.pt")
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
    torch.set_num_threads(1)  # faster than two for networks of this size
    # oneDNN's products ("medium") are the faster ones for wide networks on AMD processors with AVX-512. This limit, set
    # before the first of them, keeps them in float32 on processors that would take bfloat16.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    wide = args.hidden_size >= 256 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    torch.manual_seed(args.seed)
    num_steps, num_envs = args.num_steps, args.num_envs
    envs, obs_space, action_space = make_envs(args, num_envs, (args.seed + step) % 2**31)
    agent = Agent(obs_space.shape[0], action_space.shape[0], args)

    # All parameters are views of one vector, so that clipping and Adam are one operation each.
    parameters = list(agent.parameters())
    flat = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(flat, parameters)
    # Adam as a function: for small networks the optimizer object would cost more time than the arithmetic.
    optimizer = {name: [torch.zeros_like(flat)] for name in ("exp_avgs", "exp_avg_sqs")}
    optimizer |= {"state_steps": [torch.zeros(())], "lr": torch.tensor(args.learning_rate)}
    adam_settings = dict(beta1=0.9, beta2=0.999, eps=1e-5, weight_decay=0.0, max_exp_avg_sqs=[], amsgrad=False)
    if checkpoint:
        load_agent(agent, checkpoint, run_dir)
        optimizer = checkpoint["optimizer"]
        torch.set_rng_state(checkpoint["rng_state"])
    learning_rate = optimizer["lr"]
    gradient_function = minibatch_gradient
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True
        torch.compiler.reset()  # drops the graph of an earlier run in this process
        # Every call has the same shapes and settings, so the checks that they still fit the graph are left out.
        options = {"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        gradient_function = torch.compile(minibatch_gradient, fullgraph=True, options=options)

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
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    writer.add_text("args", "\n".join(f"    {k}: {v}" for k, v in dataclasses.asdict(args).items()))
    kept = f"go on with: python {SCRIPT}.py --resume {run_dir}"

    def save_checkpoint():
        writer.flush()
        state = {"script": SCRIPT, "env_id": args.env_id, "step": step, "agent": agent.state_dict()}
        state |= {"optimizer": optimizer, "rng_state": torch.get_rng_state()}
        state["recent_returns"] = list(map(float, recent_returns))
        write_atomically(run_dir / "checkpoint.pt", to_bytes(state))

    recent_returns = deque(checkpoint["recent_returns"] if checkpoint else (), maxlen=100)
    if not checkpoint:
        save_checkpoint()
    obs = torch.zeros(num_steps + 1, num_envs, *obs_space.shape)
    actions, means = torch.zeros(2, num_steps, num_envs, *action_space.shape)
    rewards, valid = np.zeros((num_steps, num_envs)), np.zeros((num_steps, num_envs), bool)
    terminated, truncated = np.zeros_like(valid), np.zeros_like(valid)
    next_obs, _ = envs.reset()
    done = np.zeros(num_envs, bool)
    discounted_return, episode_return, episode_length = np.zeros((3, num_envs))
    iteration, first_step, start_time, last_line = 0, step, time.time(), time.time()
    compiled = "compiled" if args.compile else "not compiled"
    print(f"{SCRIPT} on {args.env_id}, seed {args.seed}, {compiled}: {run_dir}", flush=True)
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=not sys.stderr.isatty())

    while step < args.total_timesteps and not STOP:
        iteration += 1
        if args.lr_schedule == "linear":
            learning_rate.fill_(args.learning_rate * (1 - step / args.total_timesteps))

        rollout_start = time.perf_counter()
        with torch.inference_mode():
            noise = agent.log_std.exp() * torch.randn_like(actions)
            for t in range(num_steps):
                valid[t] = ~done  # the step after an episode's end is a dummy that only resets the simulator
                obs[t] = torch.from_numpy(next_obs)
                means[t] = agent.policy(agent.normalize(obs[t]))
                actions[t] = means[t] + noise[t]
                next_obs, rewards[t], terminated[t], truncated[t], _ = envs.step(to_env(actions[t], action_space))
                done = terminated[t] | truncated[t]
            obs[num_steps] = torch.from_numpy(next_obs)
        update_start = time.perf_counter()

        steps = step + valid.sum(1).cumsum()  # real transitions up to each row
        step = int(steps[-1])
        if not valid.any():
            discounted_return = np.zeros(num_envs)
            continue
        for name, array in (("reward", rewards), ("observation", obs.numpy())):
            if not np.isfinite(array).all():
                raise SystemExit(f"error: {args.env_id} returned a {name} that is not finite, step {step}; {kept}")
        return_sums, length_sums = rewards.cumsum(0), valid.cumsum(0)
        for t, n in zip(*(terminated | truncated).nonzero()):
            episode = episode_return[n] + return_sums[t, n], int(episode_length[n] + length_sums[t, n])
            episode_return[n], episode_length[n] = -return_sums[t, n], -length_sums[t, n]
            recent_returns.append(episode[0])
            episodes_file.write(f"{steps[t]},{episode[0]:.8g},{episode[1]}\n")
            writer.add_scalar("charts/episodic_return", episode[0], steps[t])
            writer.add_scalar("charts/episodic_length", episode[1], steps[t])
        episode_return, episode_length = episode_return + return_sums[-1], episode_length + length_sums[-1]

        scaled_rewards = torch.from_numpy(rewards).float()
        if args.norm_reward:
            discounted_returns = np.zeros_like(rewards)
            for t in range(num_steps):
                discounted_returns[t] = discounted_return = rewards[t] + args.gamma * discounted_return * valid[t]
            agent.return_stats.update(torch.from_numpy(discounted_returns[valid])[:, None])
            scaled_rewards = (scaled_rewards / agent.return_stats.std()).clamp(-10, 10)

        with torch.no_grad():
            inputs = agent.normalize(obs)
            hidden = agent.hidden(inputs.flatten(0, 1))
            values, log_stds = agent.value(hidden).view(-1, num_envs), agent.log_std.expand_as(actions)
            advantages, returns = compute_gae(
                scaled_rewards, values, terminated, truncated, args.gamma, args.gae_lambda
            )
            batch = dict(obs=inputs[:-1], actions=actions, means=means, log_stds=log_stds.clone())
            batch |= dict(log_probs=log_prob(means, agent.log_std, actions), values=values[:-1])
            batch |= dict(advantages=advantages, returns=returns)
            if args.use_median:
                batch["medians"] = agent.median(hidden).view_as(values)[:-1]
            batch = {name: x.flatten(0, 1) for name, x in batch.items()}

        rows = torch.from_numpy(valid.ravel()).nonzero().squeeze(-1)
        minibatches = math.ceil(len(rows) / args.minibatch_size)
        # The last minibatch is topped up from the front of the permutation: all have one size, so one graph serves all.
        places = torch.arange(minibatches * args.minibatch_size) % len(rows)
        updates, totals = 0, 0
        torch.set_float32_matmul_precision("medium" if wide else "highest")
        for _ in range(args.update_epochs):
            order = rows[torch.randperm(len(rows))][places]
            for indices in order.view(minibatches, args.minibatch_size):
                gradient, stats, names = gradient_function(agent, parameters, batch, indices, learning_rate, args)
                adam([flat], [gradient], **optimizer, **adam_settings, maximize=False, fused=True)
                updates, totals = updates + 1, totals + stats
            if args.target_kl and stats[names.index("losses/approx_kl")] > args.target_kl:
                break
        torch.set_float32_matmul_precision("highest")
        metrics = dict(zip(names, (totals / updates).tolist()))
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise SystemExit(f"error: {name} is {value} at step {step}; {kept}")

        with torch.no_grad():
            batch = {name: x[rows] for name, x in batch.items()}
            ratio = (log_prob(agent.policy(batch["obs"]), agent.log_std, batch["actions"]) - batch["log_probs"]).exp()
            metrics |= ratio_statistics(ratio, *ratio_bounds(args))
            metrics |= improvement_bound(ratio, batch, args)
            unexplained = batch["advantages"].var() / batch["returns"].var()
            agent.obs_stats.update(obs[:-1].flatten(0, 1)[rows])
        mean_return = np.mean(recent_returns) if recent_returns else math.nan
        sps = (step - first_step) / (time.time() - start_time)
        metrics |= {
            "losses/explained_variance": 1 - unexplained.item(),
            "charts/mean_return_100": mean_return,
            "charts/learning_rate": learning_rate.item(),
            "charts/log_std": agent.log_std.mean().item(),
            "charts/SPS": sps,
            "time/rollout": update_start - rollout_start,
            "time/update": time.perf_counter() - update_start,
        }
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        if metrics_file.tell() == 0:
            metrics_file.write(",".join(["step", *metrics]) + "\n")
        metrics_file.write(",".join([str(step), *(f"{value:.6g}" for value in metrics.values())]) + "\n")
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
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once


def main(args):
    """Trains an agent, or evaluates that of an earlier run."""
    if args.resume is not None and args.evaluate is not None:
        raise BadInput("--resume and --evaluate exclude each other: pass one of them")
    if args.evaluate is None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, request_stop)
        return train(args)
    run_dir = Path(args.evaluate)
    run_args, checkpoint = load_run(run_dir, "agent.pt" if (run_dir / "agent.pt").exists() else "checkpoint.pt")
    run_args = dataclasses.replace(run_args, eval_episodes=args.eval_episodes, capture_video=args.capture_video)
    run_args.compile = args.compile
    check_same_settings(args, run_args)
    check_args(run_args)
    torch.manual_seed(run_args.seed)
    envs, obs_space, action_space = make_envs(run_args, 1, run_args.seed)
    envs.close()
    agent = Agent(obs_space.shape[0], action_space.shape[0], run_args)
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
