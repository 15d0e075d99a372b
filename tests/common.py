"""What tests of several scripts share: the scripts, a small agent and samples of each, runs, and what they wrote."""

import copy
import dataclasses
import math
import os
import re
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Normal

import bpo_atari_envpool
import bpo_continuous_action
import bpo_locomotion
import ppo_atari_envpool
import ppo_continuous_action
import ppo_locomotion

ROOT = Path(__file__).resolve().parent.parent
CONTINUOUS = bpo_continuous_action, ppo_continuous_action
ATARI = bpo_atari_envpool, ppo_atari_envpool
ROBOTS = bpo_locomotion, ppo_locomotion
CONTROL = CONTINUOUS + ATARI + ROBOTS
BPO, PPO = CONTROL[::2], CONTROL[1::2]
STOPS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}
# Settings of runs whose iterations take some ten milliseconds.
TINY = dict.fromkeys(CONTINUOUS, dict(env_backend="gymnasium", compile=False, hidden_size=16, minibatch_size=32))
TINY |= dict.fromkeys(ATARI, dict(device="cpu", num_envs=2, minibatch_size=16, checkpoint_seconds=30))
TINY |= dict.fromkeys(ROBOTS, dict(device="cpu", num_envs=4, hidden_sizes=(16,)))
TINY = {script: dict(num_steps=16, update_epochs=1, checkpoint_seconds=0) | x for script, x in TINY.items()}


def each(*scripts):
    """Runs a test for every script, under its name."""
    return pytest.mark.parametrize("script", scripts, ids=[x.__name__ for x in scripts])


# --- agents and samples


def make_agent(script, dtype=torch.float64, **settings):
    """Settings and a small agent: 3 observations, 4 privileged ones, 2 actions; for Atari the Nature CNN, 5 actions."""
    torch.manual_seed(1)
    if script in CONTINUOUS:
        args = script.Args(**dict(hidden_size=8, log_std_init=-0.3, compile=False) | settings)
        agent = script.Agent(3, -torch.ones(2), torch.ones(2), args)
    elif script in ROBOTS:
        sizes = dict(num_envs=8, num_steps=6, num_minibatches=2, hidden_sizes=(8, 6), init_std=0.7, device="cpu")
        args = script.Args(**sizes | settings)
        agent = script.Agent(3, 4, [-1.0, -2.0], [1.0, math.inf], args)
    else:
        args = script.Args(device="cpu", **settings)
        agent = script.Agent(4, 5, args)
        agent.policy[-1].weight.data *= 30  # away from the flat policy of a new network
    return args, agent.to(dtype)


def frames(size):
    return torch.randint(0, 256, (size, 84, 84, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def policy_of(agent, obs):
    """The policy through torch.distributions; a log-probability or entropy is of a whole action."""
    if hasattr(agent, "features"):
        return Categorical(logits=agent.policy(agent.features(obs)))
    return Independent(Normal(agent.policy(obs), agent.std if hasattr(agent, "std") else agent.log_std.exp()), 1)


def critics_input(agent, batch):
    return agent.features(batch["obs"]) if hasattr(agent, "features") else batch.get("privileged", batch["obs"])


def make_batch(script, dtype=torch.float64, **settings):
    """Settings, an agent, and 48 samples of an older policy: some ratios are beyond the bounds.

    Of Atari in float64, samples of features: the CNN is not what is tested then. In float32, 12 frames.
    """
    args, agent = make_agent(script, dtype, **settings)
    pixels, size, spread, batch = script in ATARI and dtype == torch.float32, 48, 0.15, {}
    if pixels:
        size, spread, batch["obs"] = 12, 0.005, frames(12)
    elif script in ATARI:
        agent.features, spread, batch["obs"] = lambda obs: obs, 0.3, torch.randn(size, 512, dtype=dtype) / 20
    else:
        batch["obs"] = torch.randn(size, 3, dtype=dtype)
    if script in ROBOTS:
        batch["privileged"] = torch.randn(size, 4, dtype=dtype)
    old = copy.deepcopy(agent)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += spread * torch.randn_like(parameter)
        policy, inputs = policy_of(old, batch["obs"]), critics_input(old, batch)
        actions, values = policy.sample(), old.value(inputs)
        batch |= dict(actions=actions, values=values, log_probs=policy.log_prob(actions))
        batch["returns"] = values + 2 * torch.randn(size, dtype=dtype) + 0.5
        batch |= dict(log_policy=policy.logits) if script in ATARI else dict(means=policy.mean, stds=policy.stddev)
        if script in BPO:
            batch["medians"] = old.median(inputs)
        return args, agent, batch | advantages_of(script, batch, args)


def advantages_of(script, batch, args):
    """What samples carry of their advantages: a minibatch's moments (Atari), the advantages (robots)."""
    if script in ATARI:
        return {"moments": script.minibatch_moments(batch["returns"] - batch["values"])}
    critics = [batch[name] for name in ("values", "medians") if name in batch]
    return script.measure_advantages(batch["returns"], *critics, args) if script in ROBOTS else {}


def set_gradients(optimizer, gradients):
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = gradient.clone()


def gradients_of(script, agent, batch, args):
    """A list like the parameters that the optimizer has, of Atari's scripts one vector."""
    if script not in ATARI:
        return script.minibatch_gradient(agent, batch, args)
    gradient, stats = script.minibatch_gradient(script.minibatch_loss, agent, batch, args)
    return [gradient], stats


# --- runs


def train(script, folder, **settings):
    """A run in this process, tiny but for its settings; its folder."""
    return Path(script.train(script.Args(**TINY.get(script, {}) | {"output_dir": str(folder)} | settings)))


def resume(script, run_dir, *words):
    return script.train(script.read_args(["--resume", str(run_dir), *map(str, words)]))


def read(path):
    """The rows of a CSV file; fails on a half-written one."""
    text = path.read_text()
    assert text.endswith("\n")
    header, *lines = text.splitlines()
    rows = [line.split(",") for line in lines]
    assert all(len(row) == len(header.split(",")) for row in rows)
    return [dict(zip(header.split(","), map(float, row))) for row in rows]


def column(rows, name):
    return np.array([row[name] for row in rows])


def without_clock(rows, last=math.inf):
    """Rows up to a step, without what depends on the clock."""
    timed = ("tokens_per_second", "charts/SPS", "time/rollout", "time/update")
    return [{name: x for name, x in row.items() if name not in timed} for row in rows if row["step"] <= last]


def contents(folder):
    """All files but the lock, which every attempt may create."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def options(**settings):
    """Settings as command-line options."""
    flags = {"--" + name.replace("_", "-"): x for name, x in settings.items()}
    flags = {flag.replace("--", "--no-") if x is False else flag: x for flag, x in flags.items()}
    return [flag if isinstance(x, bool) else f"{flag}={x}" for flag, x in flags.items()]


# --- scripts as __main__


def command_line(script, words, monkeypatch, capsys):
    """Runs the script as __main__ in this process: its exit status and the lines it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    lines, code = capsys.readouterr().err.splitlines(), stop.value.code
    return (1, [*lines, *code.splitlines()]) if isinstance(code, str) else (code, lines)


def fork(script, words, folder, before=lambda: None):
    """Runs the script as __main__ in a copy of this process, which spares the imports; stderr goes to a file."""
    if pid := os.fork():
        return pid
    code = 0
    try:
        for number in STOPS.values():
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", closefd=False)
        sys.argv = [script.__file__, *map(str, words)]
        before()
        runpy.run_path(script.__file__, run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else print(stop.code, file=sys.stderr) or 1
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    os._exit(code)


def end_of(pid, folder, timeout=120):
    """The exit status of a fork, negative if a signal ended it, and the lines it wrote to stderr."""
    deadline = time.time() + timeout
    while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.time() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(status[1]), (folder / "stderr").read_text().splitlines()


# --- text


def options_without_help(script, shown):
    """Comments on the options of Args that --help, as it is shown, does not repeat; every option has one."""
    source = Path(script.__file__).read_text().split("class Args:")[1].split("    @model_validator")[0]
    texts, shown = re.findall("# (.+)", source), re.sub(r"[│\s]+", " ", shown)
    assert len(texts) == len(dataclasses.fields(script.Args))
    return [text for text in texts if f" {text} (default: " not in shown]
