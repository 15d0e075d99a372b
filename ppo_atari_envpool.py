"""Proximal Policy Optimization (PPO) for Atari games, in one file.

PPO (Schulman et al., 2017) with the details that make it strong. All else is the text of its sibling,
bpo_atari_envpool.py, so that comparing the two compares the algorithms.

    python ppo_atari_envpool.py --env-id Breakout-v5
    torchrun --nproc-per-node 4 ppo_atari_envpool.py --env-id Breakout-v5
"""

import dataclasses
import difflib
import io
import json
import math
import os
import re
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

import envpool
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
STOP = []  # signals received: a first Ctrl-C or SIGTERM ends the run after the iteration, with a checkpoint
RANK, LOCAL_RANK = (int(os.environ.get(x, 0)) for x in ("RANK", "LOCAL_RANK"))
WORLD_SIZE, LOCAL_WORLD_SIZE = (int(os.environ.get(x, 1)) for x in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))


class BadInput(ValueError):
    """Input that cannot work: printed as one line, exit status 2."""


def can_compile():
    """Whether torch.compile finds what it needs on a CPU: a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return shutil.which(compiler) is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


@dataclass
class Args:
    env_id: str = "Breakout-v5"
    """game: any of EnvPool's Atari games; BreakoutNoFrameskip-v4 is another name of Breakout-v5"""
    seed: int = 1
    """seed of the simulators, the network's initial weights, the actions and the minibatches"""
    total_timesteps: int = 10_000_000
    """environment steps to train for, all environments together; a step is four frames of the game"""
    num_envs: int = 8
    """environments stepped in parallel, all processes together"""
    num_steps: int = 128
    """steps per environment and iteration"""
    minibatch_size: int = 256
    """samples per gradient step, all processes together"""
    update_epochs: int = 4
    """passes over the rollout per iteration"""
    learning_rate: float = 2.5e-4
    """Adam's step size (the initial one if it is scheduled)"""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """linear: to 0 at the last step"""
    gamma: float = 0.98
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip_coef: float = 0.2
    """epsilon: the ratio's bounds are 1 - epsilon and 1 + epsilon"""
    norm_adv: bool = True
    """scale the minibatch's advantages to a standard deviation of 1 (PPO centres them as well, BPO does not)"""
    value_coef: float = 0.5
    """weight of the value loss (R - V)^2, w_1 in the paper"""
    clip_value_loss: bool = False
    """clip the change of the value by --clip-coef as well"""
    target_kl: float | None = None
    """end the iteration's epochs when the approximate KL divergence exceeds this, in nats"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    max_grad_norm: float = 0.5
    """the gradient is scaled down to this norm, over all networks jointly"""
    heads: Literal["linear", "mlp"] = "linear"
    """what is on the shared trunk: linear layers, or hidden layers of 256 before them as in the authors' BPO"""
    device: Literal["cpu", "cuda"] = dataclasses.field(
        default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu"
    )
    """where the network and a rollout's frames are; by default on a GPU if there is one"""
    bf16: bool = False
    """compute the trunk in bfloat16: faster on processors that have it (avx512_bf16, AMX) and on GPUs"""
    compile: bool = False
    """torch.compile the loss and its gradient: meant for GPUs, does not pay on a CPU"""
    cuda_graphs: bool = False
    """replay the compiled loss and its gradient as CUDA graphs (with --compile)"""
    output_dir: str = "runs"
    """folder that receives this run's folder"""
    checkpoint_interval: int = 20
    """iterations between checkpoints"""
    eval_episodes: int = 10
    """games of each evaluation (deterministic and stochastic), at the end of training and with --evaluate"""
    resume: str | None = None
    """RUN_DIR: continue this interrupted run with the settings it was started with"""
    evaluate: str | None = None
    """RUN_DIR: evaluate this run's agent instead of training"""
    capture_video: bool = False
    """film one deterministic game after training or evaluation"""
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
        ("total_timesteps num_envs num_steps update_epochs", lambda x: x >= 1, "at least 1"),
        ("checkpoint_interval eval_episodes", lambda x: x >= 1, "at least 1"),
        ("learning_rate max_grad_norm", lambda x: 0 < x < math.inf, "positive and finite"),
        ("clip_coef target_kl", lambda x: 0 < x < math.inf, "positive and finite"),
        ("value_coef ent_coef", lambda x: 0 <= x < math.inf, "finite and not negative"),
        ("gamma gae_lambda", lambda x: 0 <= x <= 1, "within [0, 1]"),
        ("seed", lambda x: 0 <= x < 2**31, "within [0, 2^31)"),
        ("minibatch_size", lambda x: 2 <= x <= args.num_envs * args.num_steps, "from 2 to num_envs * num_steps"),
        ("num_envs minibatch_size", lambda x: x % WORLD_SIZE == 0, f"a multiple of the {WORLD_SIZE} processes"),
    ):
        for name in names.split():
            if (value := getattr(args, name)) is not None and not holds(value):
                raise BadInput(f"--{name.replace('_', '-')} must be {rule}, got {value}")
    low, high = ratio_bounds(args)
    if not 0 <= low < 1 < high < math.inf:
        raise BadInput(f"the ratio's bounds must satisfy 0 <= low < 1 < high, got {low} and {high}")
    if args.compile and not can_compile():
        raise BadInput("--compile needs a C++ compiler (CXX or g++) and Python's headers: install them or --no-compile")
    if args.device == "cuda" and torch.cuda.device_count() <= LOCAL_RANK:
        count = torch.cuda.device_count()
        raise BadInput(f"--device cuda needs a GPU per process, and PyTorch finds {count}: pass --device cpu")
    if args.cuda_graphs and not (args.compile and args.device == "cuda"):
        raise BadInput("--cuda-graphs needs --compile and --device cuda")


def make_envs(args, num_envs, seed, render_mode=None):
    """Vector environments, their observation space [C, H, W] and action space; BadInput if the task does not fit.

    They reset on the step after the one that ended an episode: that step is a dummy, its action is ignored. For
    learning, a lost life ends an episode and rewards are -1, 0 or 1; the infos hold the game's own reward and end.
    """
    name = re.sub("NoFrameskip-v4$", "-v5", args.env_id)
    if name not in (known := envpool.list_all_envs()):
        close = ", ".join(difflib.get_close_matches(name, known, 3))
        raise BadInput(f"EnvPool has no game {args.env_id}" + f": did you mean {close}?" * bool(close))
    gym.logger.min_level = gym.logger.ERROR
    if not hasattr(envpool.make_spec(name).config, "episodic_life"):
        raise BadInput(f"{args.env_id} is no Atari game, which this script needs: it has no stacks of frames")
    options = dict(episodic_life=True, reward_clip=True, render_mode=render_mode)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, min(num_envs, cores // LOCAL_WORLD_SIZE))
    envs = envpool.make(name, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=seed, **options)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    return envs, envs.observation_space, envs.action_space


def orthogonal(layer, gain=2**0.5):
    """The layer with orthogonal weights and zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Nature CNN (Mnih et al., 2015) and its heads."""

    def __init__(self, channels, num_actions, args):
        super().__init__()
        self.bf16 = args.bf16
        self.first = orthogonal(nn.Conv2d(channels, 32, 8, stride=4))
        self.convolutions = nn.Sequential(
            nn.ReLU(inplace=True),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(inplace=True),
            orthogonal(nn.Conv2d(64, 64, 3)),
            nn.ReLU(inplace=True),
        )
        self.dense = nn.Sequential(orthogonal(nn.Linear(7 * 7 * 64, 512)), nn.ReLU(inplace=True))
        mlp = args.heads == "mlp"
        width = 256 if mlp else 512

        def hidden(inputs):
            return nn.Sequential(orthogonal(nn.Linear(inputs, 256)), nn.ReLU()) if mlp else nn.Identity()

        self.policy_branch, self.value_branch = hidden(512), hidden(512)
        self.policy, self.value = orthogonal(nn.Linear(width, num_actions), 0.01), orthogonal(nn.Linear(width, 1), 1.0)

    def forward(self, frames):
        """The heads' outputs for frames[B, H, W, C] of bytes: a dict of logits[B, A], values[B] and so on."""
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            # Bytes are exact in bfloat16, and dividing the weights by 255 is cheaper than dividing the frames.
            images = frames.permute(0, 3, 1, 2).to(torch.bfloat16 if self.bf16 else torch.float32)
            features = nn.functional.conv2d(images, self.first.weight / 255, self.first.bias, stride=4)
            # Flattened channels last, as they lie in memory: neither the features nor their gradient are rearranged.
            features = self.dense(self.convolutions(features).permute(0, 2, 3, 1).flatten(1))
        features = features.float()
        value_features = self.value_branch(features)
        outputs = dict(logits=self.policy(self.policy_branch(features)), values=self.value(value_features).squeeze(-1))
        return outputs


def log_prob(logits, actions):
    """Log-probability of the actions: logits[..., A], actions[...] -> [...]"""
    return logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)


def kl_divergence(old_logits, logits):
    """KL(old || new) in nats: logits[..., A] -> [...]"""
    old, new = old_logits.log_softmax(-1), logits.log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1)


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


def policy_loss(ratio, advantage, clip_coef):
    """The negative clipped surrogate, Eq. 17 of the BRRL paper: [B], [B] -> [B]"""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage)


def minibatch_moments(advantages):
    """Mean, mean size and standard deviation of each minibatch over all processes: advantages[..., B] -> [..., 3]"""
    x, count = advantages.double(), advantages.shape[-1] * WORLD_SIZE
    mean, size, square = (sum_over_ranks(torch.stack([x, x.abs(), x.square()]).sum(-1)) / count).unbind()
    deviation = ((square - mean.square()).clamp(min=0) * count / (count - 1)).sqrt()
    return torch.stack([mean, size, deviation], -1).float()


def minibatch_loss(agent, batch, moments, args):
    """The objective on batch, a dict of tensors [B, ...], whose advantages have these moments[3].

    Returns the loss [] and a dict of statistics []. A pure tensor program, so it compiles into one graph.
    """
    outputs = agent(batch["obs"])
    log_ratio = log_prob(outputs["logits"], batch["actions"]) - batch["log_probs"]
    ratio = log_ratio.exp()
    log_policy = outputs["logits"].log_softmax(-1)
    entropy = -(log_policy.exp() * log_policy).sum(-1).mean()
    returns, values = batch["returns"], outputs["values"]
    value_loss = (returns - values).square()  # Eq. 14
    if args.clip_value_loss:
        clipped_values = batch["values"] + (values - batch["values"]).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.maximum(value_loss, (returns - clipped_values).square())
    value_loss = value_loss.mean()
    low, high = ratio_bounds(args)
    advantages = batch["advantages"]
    if args.norm_adv:
        mean, _, deviation = moments
        advantages = (advantages - mean) / (deviation + 1e-8)
    pg_loss = policy_loss(ratio, advantages, args.clip_coef).mean()
    loss = pg_loss + args.value_coef * value_loss - args.ent_coef * entropy
    stats = {
        "losses/policy_loss": pg_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": (ratio - 1 - log_ratio).mean(),
        "losses/kl": kl_divergence(batch["logits"], outputs["logits"]).mean(),
        "losses/clipfrac": ((ratio < low) | (ratio > high)).float().mean(),
    }
    return loss, {name: x.detach() for name, x in stats.items()}


def minibatch_gradient(loss_function, agent, parameters, batch, indices, moments, args):
    """The clipped gradient of all parameters as one vector, the statistics stacked, and their names.

    indices[B] choose this process's part of the minibatch from batch, a dict of tensors [T * N, ...]; moments[3] are
    the whole minibatch's. Gradient and statistics are means over all processes.
    """
    minibatch = {name: x.index_select(0, indices) for name, x in batch.items()}
    loss, stats = loss_function(agent, minibatch, moments, args)
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, parameters)] + [torch.stack([*stats.values()])]
    )
    gradient, values = (sum_over_ranks(gradient) / WORLD_SIZE).split([len(gradient) - len(stats), len(stats)])
    norm = gradient.norm()
    clipped = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    return clipped, torch.cat([values, norm[None]]), [*stats, "losses/grad_norm"]


def sum_over_ranks(x):
    """The sum of a tensor over all processes, in place; x itself if there is but one."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather(arrays):
    """Arrays [K, T, n] of all processes' environments side by side, in their order: [K, T, N]"""
    if not dist.is_initialized():
        return arrays
    parts = [torch.empty(arrays.shape, dtype=torch.float64) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, torch.from_numpy(arrays))
    return torch.cat(parts, -1).numpy()


def ratio_statistics(ratio, low, high):
    """Figure 7: mean and standard deviation of the ratios [B] above and below 1, and the fraction out of bounds."""
    stats = {"ratio/out_of_bounds": ((ratio < low) | (ratio > high)).float().mean().item()}
    for name, side in (("high", ratio[ratio >= 1]), ("low", ratio[ratio <= 1])):
        stats[f"ratio/{name}_mean"] = side.mean().item() if len(side) else 1.0
        stats[f"ratio/{name}_std"] = side.std(correction=0).item() if len(side) else 0.0
    return stats


def to_frames(obs):
    """EnvPool's observations, bytes [N, C, H, W], as [N, H, W, C], the layout that convolutions like best."""
    return obs.movedim(1, -1)


def act(agent, args, obs, deterministic):
    """Actions [N] for EnvPool's observations [N, C, H, W]."""
    with torch.inference_mode():
        logits = agent(to_frames(torch.from_numpy(obs).to(args.device)))["logits"]
        noise = 0 if deterministic else -torch.empty_like(logits).exponential_().log()  # Gumbel
        return (logits + noise).argmax(-1).cpu().numpy()


def evaluate(agent, args, deterministic, seed):
    """Scores [args.eval_episodes] of one game, over all its lives, in each of as many environments."""
    envs, _, _ = make_envs(args, args.eval_episodes, seed)
    obs, _ = envs.reset()
    scores, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool)
    while running.any():
        obs, _, _, truncated, info = envs.step(act(agent, args, obs, deterministic))
        scores += info["reward"] * running
        running &= ~(info["terminated"].astype(bool) | truncated)
    envs.close()
    return scores


def film(agent, args, folder):
    """Films one deterministic game, as the simulator shows it, as MP4 into the folder."""
    try:
        import imageio

        envs, _, _ = make_envs(args, 1, args.seed, render_mode="rgb_array")
        folder.mkdir(exist_ok=True)
        with imageio.get_writer(folder / f"{args.env_id}.mp4", fps=15, macro_block_size=2) as video:
            (obs, _), over = envs.reset(), False
            while not over:
                video.append_data(envs.render()[0])
                obs, _, _, truncated, info = envs.step(act(agent, args, obs, True))
                over = info["terminated"][0] or truncated[0]
        envs.close()
    except Exception as error:  # codecs and disks: many kinds, none of which may hide the evaluation
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
        args = Args(**json.loads((run_dir / "args.json").read_text())["args"])
        args.device, args.compile, args.cuda_graphs = "cpu", False, False  # the machine's, not the run's
        check_args(args)
        checkpoint = torch.load(run_dir / name, map_location="cpu", weights_only=True)
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
    # Large tensors in huge pages, which are quick to map (Linux). PyTorch reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    checkpoint = None
    if args.resume is not None:
        asked, run_dir = args, Path(args.resume)
        args, checkpoint = load_run(run_dir, "checkpoint.pt")
        args.device, args.compile, args.cuda_graphs = asked.device, asked.compile, asked.cuda_graphs
        if checkpoint["step"] >= args.total_timesteps and (run_dir / "evaluation.json").exists():
            raise BadInput(f"{run_dir} is complete: to train on, raise total_timesteps in its args.json")
        check_same_settings(asked, args)
    check_args(args)
    if args.track:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise BadInput("--track needs an account: type wandb login first, or set WANDB_MODE=offline")
    step = checkpoint["step"] if checkpoint else 0
    num_steps, num_envs, device = args.num_steps, args.num_envs // WORLD_SIZE, args.device
    envs, obs_space, action_space = make_envs(args, num_envs, (args.seed + step + RANK * num_envs) % 2**31)
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    # oneDNN's products on a CPU, TF32 on a GPU. On a CPU with bfloat16 that would be bfloat16, unless it is asked for.
    medium = on_gpu or args.bf16 or not torch.cpu._is_avx512_bf16_supported()
    torch.set_float32_matmul_precision("medium" if medium else "highest")
    torch.manual_seed(args.seed)
    agent = Agent(obs_space.shape[0], action_space.n, args).to(device)

    # All parameters are views of one vector, so that averaging, clipping and Adam are one operation each.
    parameters = list(agent.parameters())
    flat = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(flat, parameters)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam([flat], lr=learning_rate, eps=1e-5, fused=True)
    if checkpoint:
        load_agent(agent, checkpoint, run_dir)
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["lr"] = learning_rate
        torch.set_rng_state(checkpoint["rng_state"])
    if RANK:
        torch.manual_seed(args.seed + step + RANK)
    loss_function = minibatch_loss
    if args.compile:
        mode = "reduce-overhead" if args.cuda_graphs else "default"
        loss_function = torch.compile(minibatch_loss, fullgraph=True, mode=mode)

    if RANK == 0:
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
        print(f"{SCRIPT} on {args.env_id}, seed {args.seed}, {device} x {WORLD_SIZE}: {run_dir}", flush=True)
        kept = f"go on with: python {SCRIPT}.py --resume {run_dir}"

    def save_checkpoint():
        writer.flush()
        state = {"script": SCRIPT, "env_id": args.env_id, "step": step, "agent": agent.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "rng_state": torch.get_rng_state()}
        state["recent_returns"] = list(map(float, recent_returns))
        write_atomically(run_dir / "checkpoint.pt", to_bytes(state))

    recent_returns = deque(checkpoint["recent_returns"] if checkpoint else (), maxlen=100)
    if RANK == 0 and not checkpoint:
        save_checkpoint()
    shape = num_steps, num_envs
    channels, height, width = obs_space.shape
    # The frames of one step wait here, page-locked for a GPU, so that their transfer need not wait for anything.
    staging = torch.empty(num_envs, channels, height, width, dtype=torch.uint8, pin_memory=on_gpu)
    obs = torch.empty(num_steps, num_envs, height, width, channels, dtype=torch.uint8, device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    rewards, scores, valid = np.zeros(shape, np.float32), np.zeros(shape), np.zeros(shape, bool)
    terminated, truncated, game_over = np.zeros_like(valid), np.zeros_like(valid), np.zeros_like(valid)
    next_obs, _ = envs.reset()
    done = np.zeros(num_envs, bool)
    episode_return, episode_length = np.zeros((2, args.num_envs))
    iteration, first_step, start_time, last_line, stop = 0, step, time.time(), time.time(), False
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=RANK > 0 or not sys.stderr.isatty())

    while step < args.total_timesteps and not stop:
        iteration += 1
        if args.lr_schedule == "linear":
            learning_rate.fill_(args.learning_rate * (1 - step / args.total_timesteps))

        rollout_start, simulation_seconds, outputs = time.perf_counter(), 0.0, []
        with torch.inference_mode():
            noise = -torch.empty(*shape, action_space.n).exponential_().log().to(device)  # Gumbel
            for t in range(num_steps):
                valid[t] = ~done  # the step after an episode's end is a dummy that only resets the simulator
                staging.copy_(torch.from_numpy(next_obs))
                obs[t] = to_frames(staging.to(device, non_blocking=True))  # the device rearranges them
                outputs.append(agent(obs[t]))
                actions[t] = (outputs[-1]["logits"] + noise[t]).argmax(-1)
                action = actions[t].cpu().numpy()
                simulation_start = time.perf_counter()
                next_obs, rewards[t], terminated[t], truncated[t], info = envs.step(action)
                simulation_seconds += time.perf_counter() - simulation_start
                scores[t], game_over[t] = info["reward"], info["terminated"].astype(bool) | truncated[t]
                done = terminated[t] | truncated[t]
            outputs.append(agent(to_frames(torch.from_numpy(next_obs).to(device))))
        update_start = time.perf_counter()

        all_scores, all_valid, all_over = gather(np.stack([scores, valid, game_over]))
        steps = step + all_valid.sum(1).cumsum().astype(int)  # real transitions up to each row
        step = int(steps[-1])
        rows_per_rank = all_valid.reshape(num_steps, WORLD_SIZE, num_envs).sum((0, 2))
        return_sums, length_sums = all_scores.cumsum(0), all_valid.cumsum(0)
        for t, n in zip(*all_over.nonzero()):
            episode = episode_return[n] + return_sums[t, n], int(episode_length[n] + length_sums[t, n])
            episode_return[n], episode_length[n] = -return_sums[t, n], -length_sums[t, n]
            recent_returns.append(episode[0])
            if RANK == 0:
                episodes_file.write(f"{steps[t]},{episode[0]:.8g},{episode[1]}\n")
                writer.add_scalar("charts/episodic_return", episode[0], steps[t])
                writer.add_scalar("charts/episodic_length", episode[1], steps[t])
        episode_return, episode_length = episode_return + return_sums[-1], episode_length + length_sums[-1]
        if rows_per_rank.min() == 0:
            continue

        with torch.no_grad():
            batch = {name: torch.stack([x[name] for x in outputs]) for name in outputs[0]}
            values = batch["values"].cpu()
            advantages, returns = compute_gae(rewards, values, terminated, truncated, args.gamma, args.gae_lambda)
            batch = {name: x[:-1] for name, x in batch.items()}
            batch |= dict(obs=obs, actions=actions, log_probs=log_prob(batch["logits"], actions))
            batch |= dict(advantages=advantages.to(device), returns=returns.to(device))
            batch = {name: x.flatten(0, 1) for name, x in batch.items()}

        rows = torch.from_numpy(valid.ravel()).nonzero().squeeze(-1)
        size = args.minibatch_size // WORLD_SIZE
        minibatches = math.ceil(rows_per_rank.max() / size)
        # The last minibatch is topped up from the front of the permutation: all have one size, so one graph serves all.
        places = torch.arange(minibatches * size) % len(rows)
        order = torch.stack([rows[torch.randperm(len(rows))][places] for _ in range(args.update_epochs)])
        order = order.view(args.update_epochs, minibatches, size).to(device)
        moments = minibatch_moments(batch["advantages"][order])
        updates, totals = 0, 0
        for epoch in range(args.update_epochs):
            for indices, x in zip(order[epoch], moments[epoch]):
                flat.grad, stats, names = minibatch_gradient(loss_function, agent, parameters, batch, indices, x, args)
                optimizer.step()
                updates, totals = updates + 1, totals + stats
            if args.target_kl and stats[names.index("losses/approx_kl")] > args.target_kl:
                break
        metrics = dict(zip(names, (totals / updates).tolist()))
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise SystemExit(f"error: {name} is {value} at step {step}; {kept}" if RANK == 0 else 1)

        with torch.no_grad():
            batch = {name: x.index_select(0, order[-1, 0]) for name, x in batch.items()}
            ratio = (log_prob(agent(batch["obs"])["logits"], batch["actions"]) - batch["log_probs"]).exp()
            metrics |= ratio_statistics(ratio, *ratio_bounds(args))
            unexplained = advantages[valid].var() / returns[valid].var()
        mean_return = np.mean(recent_returns) if recent_returns else math.nan
        sps = (step - first_step) / (time.time() - start_time)
        metrics |= {
            "losses/explained_variance": 1 - unexplained.item(),
            "charts/mean_return_100": mean_return,
            "charts/learning_rate": learning_rate.item(),
            "charts/SPS": sps,
            "time/rollout": update_start - rollout_start,
            "time/simulation": simulation_seconds,
            "time/update": time.perf_counter() - update_start,
        }
        # One vector for all processes: the means of their metrics, and whether one of them is to stop.
        *means, stop = (sum_over_ranks(torch.tensor([*metrics.values(), len(STOP)])) / WORLD_SIZE).tolist()
        if RANK:
            continue
        metrics = dict(zip(metrics, means))
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

    if RANK == 0:
        save_checkpoint()
    bar.close()
    envs.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    if RANK:
        return
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
        run_dir = train(args)
        if RANK:
            os._exit(0)  # an orderly exit has been seen to abort, while threads of the libraries were still ending
        return run_dir
    run_dir = Path(args.evaluate)
    run_args, checkpoint = load_run(run_dir, "agent.pt" if (run_dir / "agent.pt").exists() else "checkpoint.pt")
    run_args = dataclasses.replace(run_args, eval_episodes=args.eval_episodes, capture_video=args.capture_video)
    run_args.device, run_args.compile, run_args.cuda_graphs = args.device, args.compile, args.cuda_graphs
    check_same_settings(args, run_args)
    check_args(run_args)
    torch.manual_seed(run_args.seed)
    envs, obs_space, action_space = make_envs(run_args, 1, run_args.seed)
    envs.close()
    agent = Agent(obs_space.shape[0], action_space.n, run_args)
    load_agent(agent, checkpoint, run_dir)
    report(agent.to(run_args.device), run_args, run_dir)
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
