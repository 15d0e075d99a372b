"""Real runs of bpo_continuous_action.py and ppo_continuous_action.py: learning, log files, resuming, bad input."""

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import probe_envs
import pydantic
import pytest
import torch
from filelock import Timeout
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bpo_continuous_action as bpo
import ppo_continuous_action as ppo

BOTH = {"bpo": bpo, "ppo": ppo}
SCRIPTS = pytest.mark.parametrize("script", BOTH.values(), ids=BOTH)
PROBE = dict(env_backend="gymnasium", compile=False, num_envs=4, num_steps=64, hidden_size=16)
# One episode a step, a reward that tells rows apart, an iteration of 32 steps in some ten milliseconds.
TINY = PROBE | dict(env_id="Target-v0", num_steps=16, minibatch_size=32, update_epochs=1, seed=5, checkpoint_seconds=0)
STOPS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}


@pytest.fixture(params=BOTH.values(), ids=BOTH, scope="module")
def each_script(request):
    return request.param


@pytest.fixture(autouse=True)
def signal_handlers():
    """A script run as __main__ in this process leaves its own handlers behind."""
    handlers = {number: signal.getsignal(number) for number in STOPS.values()}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train(script, folder, **settings):
    return Path(script.train(script.Args(**{"compile": False, "output_dir": str(folder), **settings})))


def resume(script, run_dir, *words):
    return script.train(script.read_args(["--resume", str(run_dir), *words]))


def load(script, run_dir, name="agent.pt"):
    """The agent of a run, through the script's own functions, and what it makes of the observation 0."""
    args, saved = script.load_run(run_dir, name)
    envs, obs_space, action_space = script.make_envs(args, 1, 0)
    envs.close()
    agent = script.Agent(obs_space.shape[0], action_space.low, action_space.high, args)
    agent.load_state_dict(saved["agent"])
    return agent, agent.normalize(torch.zeros(1, obs_space.shape[0]))


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


def comparable(rows, last=math.inf):
    """Rows up to a step, without what a clock says."""
    return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows if row["step"] <= last]


def contents(folder):
    """All files but the lock, which every attempt may create."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def options(**settings):
    """Settings as command-line options."""
    names = {name: "--" + name.replace("_", "-") for name in settings}
    flags = [x.replace("--", "--no-") if settings[n] is False else x for n, x in names.items()]
    values = [[] if isinstance(x, bool) else [str(x)] for x in settings.values()]
    return [word for flag, value in zip(flags, values) for word in (flag, *value)]


def command_line(script, words, monkeypatch, capsys):
    """Runs the script as __main__ in this process: its exit status and the lines it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    return (
        (1, [*lines, *stop.value.code.splitlines()]) if isinstance(stop.value.code, str) else (stop.value.code, lines)
    )


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


def end_of(pid, folder, timeout=60):
    """The exit status of a fork, negative if a signal ended it, and the lines it wrote to stderr."""
    deadline = time.time() + timeout
    while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.time() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(status[1]), (folder / "stderr").read_text().splitlines()


def rows_on_disk(folder):
    """The only run in a folder and how many lines its metrics have; (None, 0) before its first checkpoint."""
    found = list(folder.glob("*/checkpoint.pt"))
    return (found[0].parent, (found[0].parent / "metrics.csv").read_text().count("\n")) if found else (None, 0)


def wait_for_rows(folder, lines, pid, timeout=60):
    deadline = time.time() + timeout
    while rows_on_disk(folder)[1] < lines:
        assert time.time() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0), (folder / "stderr").read_text()
        time.sleep(0.002)
    return rows_on_disk(folder)[0]


# --- probes with known right answers


@SCRIPTS
def test_value_of_one_step_with_constant_reward_is_the_reward(script, tmp_path):
    settings = dict(env_id="Probe-v0", norm_reward=False, learning_rate=3e-3, total_timesteps=4000)
    agent, obs = load(script, train(script, tmp_path, **PROBE, **settings))
    assert agent.value(obs).item() == pytest.approx(2, abs=0.05)


def test_median_of_a_skewed_reward_is_far_from_its_mean(tmp_path):
    """Rewards 0 (70%) and 10 (30%): the value must go to 3, the median to 0, in units of the raw reward."""
    settings = dict(norm_reward=False, norm_adv=False, temperature=0.05, learning_rate=1e-2, total_timesteps=6000)
    run_dir = train(bpo, tmp_path, **PROBE | dict(num_steps=128), env_id="Skewed-v0", update_epochs=5, **settings)
    agent, obs = load(bpo, run_dir)
    assert agent.value(obs).item() == pytest.approx(3, abs=0.8)
    assert agent.median(obs).item() == pytest.approx(0, abs=0.2)


@SCRIPTS
@pytest.mark.parametrize("env_id, best, unit", [("Target-v0", 0.5, 0.1), ("Inner-v0", 0.3, -0.4)])
def test_policy_moves_to_the_best_action(script, env_id, best, unit, tmp_path):
    """Also within bounds 0 and 1. The policy's own units are half the width of the bounds, from their middle."""
    run_dir = train(script, tmp_path, **PROBE, env_id=env_id, learning_rate=3e-3, total_timesteps=6000)
    agent, obs = load(script, run_dir)
    action = agent.policy(obs).detach()
    width = best / unit if env_id == "Target-v0" else 0.5
    assert action.item() == pytest.approx(unit, abs=0.1)
    assert agent.to_env(action).item() == pytest.approx(best, abs=0.1 * width)
    assert agent.log_std.item() < -0.8
    returns = column(read(run_dir / "episodes.csv"), "return")
    assert returns[-300:].mean() > returns[:300].mean() / 2


@SCRIPTS
def test_value_bootstraps_through_truncation(script, tmp_path):
    """Reward 1 for ever, cut every five steps: 1 / (1 - 0.9). Taken for termination, the cuts would leave about 3."""
    settings = dict(env_id="Endless-v0", gamma=0.9, norm_reward=False, learning_rate=3e-3, total_timesteps=6000)
    run_dir = train(script, tmp_path, **PROBE, **settings, lr_schedule="constant", update_epochs=4)
    agent, obs = load(script, run_dir)
    assert agent.value(obs).item() == pytest.approx(10, abs=0.3)


# --- dummy rows and seeds


@SCRIPTS
def test_dummy_rows_reach_neither_loss_nor_statistics_nor_step_count(script, tmp_path, monkeypatch):
    """The observation 1000 is only theirs, as is a reward of a million."""
    samples, gradient, make_vec = [], script.minibatch_gradient, gym.make_vec

    def record(agent, batch, args):
        samples.append(batch)
        return gradient(agent, batch, args)

    monkeypatch.setattr(script, "minibatch_gradient", record)
    monkeypatch.setattr(gym, "make_vec", lambda *args, **options: probe_envs.PayingResets(make_vec(*args, **options)))
    settings = dict(PROBE, num_envs=3, num_steps=11, minibatch_size=8, norm_obs=False, update_epochs=1, gamma=0.5)
    run_dir = train(script, tmp_path, **settings, env_id="Marked-v0", total_timesteps=100)

    # One environment's rows, written out from the episode lengths; all three are alike.
    rows, episodes = [], []  # rows: (observation, reward, discounted return) or None for a dummy
    for lengths in range(20):
        length = probe_envs.Marked.lengths[lengths % 4]
        rewards = [3.0 + k for k in range(length)]
        rows += [(k + 1, rewards[k], sum(0.5 ** (k - j) * rewards[j] for j in range(k + 1))) for k in range(length)]
        rows.append(None)
        episodes.append((sum(rewards), length, len(rows) - 1))

    metrics = read(run_dir / "metrics.csv")
    played = rows[: 11 * len(metrics)]
    real = np.array([row for row in played if row is not None])
    expected_steps = [3 * sum(row is not None for row in rows[: 11 * (i + 1)]) for i in range(len(metrics))]
    assert column(metrics, "step").tolist() == expected_steps and expected_steps[-1] == 3 * len(real) >= 100
    finished = [(total, length) for total, length, end in episodes if end <= len(played)]
    found = [(row["return"], row["length"]) for row in read(run_dir / "episodes.csv")]
    assert found == [episode for episode in finished for _ in range(3)]

    agent, _ = load(script, run_dir)
    assert agent.obs_stats.count == agent.return_stats.count == 3 * len(real)
    for stats, values in ((agent.obs_stats, real[:, 0]), (agent.return_stats, real[:, 2])):
        assert stats.mean.item() == pytest.approx(values.mean())
        assert stats.var.item() == pytest.approx(values.var())

    # Every real row is in some minibatch, no dummy in any. A Gaussian's actions tell rows apart.
    assert max(batch["obs"].max() for batch in samples) <= 7 and max(batch["returns"].max() for batch in samples) < 20
    for size in np.diff([0, *expected_steps]):
        iteration, samples = samples[: math.ceil(size / 8)], samples[math.ceil(size / 8) :]
        assert len({action for batch in iteration for action in batch["actions"].flatten().tolist()}) == size
    assert not samples


@SCRIPTS
@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_neighbouring_seeds_and_parts_of_a_run_share_no_simulator(script, backend):
    starts = []
    for entropy in ([1, 0], [2, 0], [1, 512], [1, 0]):
        envs, _, _ = script.make_envs(script.Args(env_backend=backend), 4, entropy)
        starts.append(envs.reset()[0])
        envs.close()
    assert len(np.unique(np.concatenate(starts), axis=0)) == 12
    np.testing.assert_array_equal(starts[0], starts[3])


@SCRIPTS
def test_rewards_are_scaled_within_an_episode_also_with_rollouts_of_one_step(script, tmp_path, monkeypatch):
    """All episodes then end at once, and the rollout after that has dummy rows only."""
    seen, update = [], script.RunningNormalizer.update

    def record(self, samples):
        if samples.any():  # the observations are all 0
            seen.append(samples.flatten().tolist())
        update(self, samples)

    monkeypatch.setattr(script.RunningNormalizer, "update", record)
    settings = PROBE | dict(num_envs=2, num_steps=1, minibatch_size=2, update_epochs=1, gamma=0.5, norm_obs=False)
    train(script, tmp_path, **settings, env_id="Endless-v0", total_timesteps=20)
    episode = [[x, x] for x in (1.0, 1.5, 1.75, 1.875, 1.9375)]
    assert seen == episode * 2


# --- runs on Hopper


@pytest.fixture(scope="module")
def hopper(each_script, tmp_path_factory):
    """A short run with the default settings."""
    return each_script, train(each_script, tmp_path_factory.mktemp("hopper"), total_timesteps=25_000)


def test_hopper_improves(hopper):
    returns = column(read(hopper[1] / "episodes.csv"), "return")
    assert returns[-20:].mean() > 3 * returns[:20].mean()


def test_metrics_are_complete_and_finite(hopper):
    script, run_dir = hopper
    rows = read(run_dir / "metrics.csv")
    names = "step losses/policy_loss losses/value_loss losses/entropy losses/approx_kl losses/kl losses/clipfrac "
    names += "losses/grad_norm losses/explained_variance charts/mean_return_100 charts/mean_length_100 charts/SPS "
    names += "charts/learning_rate charts/log_std ratio/out_of_bounds ratio/high_mean ratio/high_std ratio/low_mean "
    names += "ratio/low_std "
    if script is bpo:
        names += "losses/median_loss theory/guaranteed_gain theory/atv_divergence theory/improvement_bound"
    assert set(rows[0]) == set(names.split())
    assert all(math.isfinite(x) for row in rows for x in row.values())
    steps = column(rows, "step")
    assert (np.diff(steps) > 0).all() and steps[-1] >= 25_000
    # Each iteration's rate is what is left of the run when it starts.
    expected = 3e-4 * (1 - np.array([0, *steps[:-1]]) / 25_000)
    np.testing.assert_allclose(column(rows, "charts/learning_rate"), expected, rtol=1e-4)
    assert expected[-1] < 3e-5
    high, low = column(rows, "ratio/high_mean"), column(rows, "ratio/low_mean")
    assert (high > 1).all() and (low < 1).all() and high.max() < 2 and low.min() > 0.3
    assert (column(rows, "losses/approx_kl") > 0).all() and (column(rows, "losses/kl") > 0).all()
    for name in ("return", "length"):
        mean = np.mean(column(read(run_dir / "episodes.csv"), name)[-100:])
        assert rows[-1][f"charts/mean_{name}_100"] == pytest.approx(mean, rel=1e-4)


def test_episodes_fill_the_steps(hopper):
    rows = read(hopper[1] / "episodes.csv")
    steps, lengths = column(rows, "step"), column(rows, "length")
    last = read(hopper[1] / "metrics.csv")[-1]["step"]
    assert (np.diff(steps) >= 0).all() and steps[-1] <= last
    assert lengths.sum() <= last < lengths.sum() + 4 * lengths.max() * 2  # the rest: four unfinished episodes
    assert (column(rows, "return") > 0).all()


def test_args_json_carries_commit_and_versions(hopper):
    script, run_dir = hopper
    about = json.loads((run_dir / "args.json").read_text())
    assert (about["script"], about["format"]) == (script.SCRIPT, script.FORMAT)
    assert script.Args(**about["args"]) == script.Args(
        total_timesteps=25_000, compile=False, output_dir=str(run_dir.parent)
    )
    assert set(about["args"]) == {x.name for x in dataclasses.fields(script.Args)}
    versions = {x.__name__: x.__version__ for x in (torch, gym, np, sys.modules["envpool"])}
    assert about["versions"] == versions
    git = ["git", "-C", str(Path(script.__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert about["commit"].startswith(commit) if len(commit) == 40 else "commit" in about


def test_tensorboard_shows_every_episode_and_metric(hopper):
    _, run_dir = hopper
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    episodes, metrics = read(run_dir / "episodes.csv"), read(run_dir / "metrics.csv")
    scalars = events.Scalars("charts/episodic_return")
    assert [x.step for x in scalars] == column(episodes, "step").tolist()
    np.testing.assert_allclose([x.value for x in scalars], column(episodes, "return"), rtol=1e-5)
    assert set(events.Tags()["scalars"]) == {"charts/episodic_return", "charts/episodic_length", *metrics[0]} - {"step"}
    kl = [x.value for x in events.Scalars("losses/approx_kl")]
    np.testing.assert_allclose(kl, column(metrics, "losses/approx_kl"), rtol=1e-4)


@SCRIPTS
def test_same_seed_same_episodes(script, tmp_path):
    settings = dict(num_steps=256, update_epochs=2, total_timesteps=6000, lr_schedule="constant")
    runs = [train(script, tmp_path / str(i), **settings, seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, same, other = ((run_dir / "episodes.csv").read_bytes() for run_dir in runs)
    assert first == same != other and first.count(b"\n") > 100
    rates = column(read(runs[0] / "metrics.csv"), "charts/learning_rate")
    assert rates == pytest.approx(3e-4)


@SCRIPTS
def test_gymnasium_backend_runs_hopper(script, tmp_path):
    settings = PROBE | dict(num_envs=2, update_epochs=1)
    rows = read(train(script, tmp_path, **settings, env_id="Hopper-v4", total_timesteps=500) / "episodes.csv")
    assert 5 < column(rows, "length").mean() < 60 and 3 < column(rows, "return").mean() < 100


def test_clip_coef_near_zero_keeps_the_policy(tmp_path):
    """The target is then the old policy itself, whatever the advantages."""
    runs = {}
    for clip_coef in (1e-6, 0.4):
        settings = dict(num_steps=256, update_epochs=4, total_timesteps=4000)
        rows = read(train(bpo, tmp_path / str(clip_coef), **settings, clip_coef=clip_coef) / "metrics.csv")
        runs[clip_coef] = column(rows, "losses/kl").mean(), column(rows, "ratio/high_mean").mean() - 1
    assert runs[1e-6][0] < runs[0.4][0] / 100 and runs[1e-6][1] < runs[0.4][1] / 10, runs


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_other_divergences_train(divergence, tmp_path):
    settings = dict(median_network="mlp-head", recompute_advantages=True, target_kl=0.05, lr_schedule="adaptive")
    settings |= dict(num_steps=128, update_epochs=3, total_timesteps=3000)
    rows = read(train(bpo, tmp_path, divergence=divergence, **settings) / "metrics.csv")
    assert len(set(column(rows, "charts/learning_rate"))) > 1
    assert 0 < column(rows, "losses/kl").mean() < 0.2


# --- folders, names and what is printed


@SCRIPTS
def test_runs_started_in_one_second_get_their_own_folders(script, tmp_path, monkeypatch):
    moments = itertools.count()
    monkeypatch.setattr(script.time, "time", lambda: 1_900_000_000 + next(moments) / 10_000)
    runs = {train(script, tmp_path, **TINY, total_timesteps=60) for _ in range(3)}
    assert len(runs) == len(list(tmp_path.iterdir())) == 3 and all((run / "agent.pt").exists() for run in runs)


@SCRIPTS
def test_names_stay_legal_and_a_run_can_be_resumed_from_inside(script, tmp_path, monkeypatch):
    """Weights & Biases refuses names with a colon or a slash, and a run named "." would not be this one's."""
    began = []
    wandb = types.SimpleNamespace(init=lambda **options: began.append(options), finish=lambda: began.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = TINY | dict(env_id="probe_envs:Target-v0", exp_name="a/../b c?", track=True)
    run_dir = train(script, tmp_path, **settings, total_timesteps=60)
    assert run_dir.parent == tmp_path and re.fullmatch(r"probe_envs-Target-v0__[\w.-]+__5__[\d.]+", run_dir.name)
    monkeypatch.chdir(run_dir)
    assert resume(script, ".", "--total-timesteps", "120") == "."
    assert len(read(run_dir / "episodes.csv")) == 128 and (run_dir / "agent.pt").exists()
    assert began[1::2] == ["finish"] * 2 and [x["id"] for x in began[::2]] == [run_dir.name] * 2
    assert began[0]["sync_tensorboard"] and began[0]["config"]["seed"] == 5 and "wandb" not in os.listdir()


@SCRIPTS
def test_progress_line_shows_small_returns(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    train(script, tmp_path, **TINY | dict(env_id="Small-v0"), total_timesteps=60)
    assert "step 32, " in (out := capsys.readouterr().out) and "mean return 0.01, " in out


# --- resuming


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    """One complete run of 320 steps, ten iterations, per script."""
    folder = tmp_path_factory.mktemp("tiny")
    return {script: train(script, folder, **TINY, total_timesteps=320) for script in BOTH.values()}


@pytest.fixture
def tiny(tiny_runs, tmp_path):
    return lambda script: Path(shutil.copytree(tiny_runs[script], tmp_path / "run"))


def settings_of(run_dir):
    return json.loads((run_dir / "args.json").read_text())["args"]


@pytest.mark.slow
@SCRIPTS
def test_twenty_kills_lose_and_double_no_row(script, tmp_path):
    """Every kill comes at a random moment: while the run starts, trains or writes."""
    rng, words, step = random.Random(1), [], None
    settings, total = TINY | dict(lr_schedule="constant", checkpoint_seconds=0.02), 12_800
    for kill in range(20):
        lines = rows_on_disk(tmp_path)[1]
        words = words or options(**settings, total_timesteps=total, output_dir=tmp_path)
        pid = fork(script, words, tmp_path)
        if kill % 3 == 0:
            run_dir = wait_for_rows(tmp_path, lines + rng.randrange(2, 8), pid)
        time.sleep(rng.uniform(0, 0.03 if kill % 3 == 0 else 0.2))
        os.kill(pid, signal.SIGKILL)
        assert end_of(pid, tmp_path) == (-signal.SIGKILL, []), f"kill {kill} came too late"
        words, step = ["--resume", run_dir], step or torch.load(run_dir / "checkpoint.pt")["step"]
    assert end_of(fork(script, words, tmp_path), tmp_path) == (0, [])
    assert (run_dir / "agent.pt").exists() and not list(run_dir.glob("*.tmp"))
    agent, _ = load(script, run_dir)
    assert agent.obs_stats.count == agent.return_stats.count == total
    undisturbed = train(script, tmp_path / "undisturbed", **settings, total_timesteps=step)
    ends = {"metrics.csv": range(32, total + 1, 32), "episodes.csv": np.repeat(range(4, total + 1, 4), 4)}
    for name, steps in ends.items():
        rows = read(run_dir / name)
        assert column(rows, "step").tolist() == list(steps)
        assert step > 0 and comparable(rows, step) == comparable(read(undisturbed / name))


@SCRIPTS
@pytest.mark.parametrize("name", STOPS)
def test_first_signal_ends_a_run_with_a_checkpoint(script, name, tmp_path):
    settings = TINY | dict(env_id="probe_envs:Target-v0", checkpoint_seconds=0.05, output_dir=tmp_path)
    words = options(**settings, total_timesteps=10**7)
    pid = fork(script, words, tmp_path)
    run_dir = wait_for_rows(tmp_path, 4, pid)
    os.kill(pid, STOPS[name])
    code, (message,) = end_of(pid, tmp_path)
    step = torch.load(run_dir / "checkpoint.pt")["step"]
    assert code == 1 and message.startswith(f"stopped at step {step}; go on with: ")
    command = message.split("go on with: ")[1]
    assert shlex.split(command) == [sys.executable, os.path.abspath(script.__file__), "--resume", str(run_dir)]
    assert read(run_dir / "metrics.csv")[-1]["step"] == step == len(read(run_dir / "episodes.csv"))
    assert not (run_dir / "agent.pt").exists()
    if (script, name) == (bpo, "SIGHUP"):  # pasted into a shell that stands elsewhere
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        pasted = f"{command} --total-timesteps {step + 64}"
        subprocess.run(pasted, shell=True, cwd="/", env=environment, check=True, capture_output=True, timeout=120)
        assert (run_dir / "agent.pt").exists() and len(read(run_dir / "episodes.csv")) == step + 64


def test_second_signal_ends_the_process_at_once(tmp_path):
    settings = PROBE | dict(env_id="Sleepy-v0", checkpoint_seconds=0, output_dir=tmp_path)
    pid = fork(bpo, options(**settings), tmp_path)
    wait_for_rows(tmp_path, 5, pid)
    time.sleep(0.5)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the first one waits for the iteration"
    os.kill(pid, signal.SIGINT)
    assert end_of(pid, tmp_path, timeout=5) == (-signal.SIGINT, [])


def test_nohup_keeps_a_run_alive(tmp_path):
    ignore = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    pid = fork(bpo, options(**TINY | dict(output_dir=tmp_path), total_timesteps=3200), tmp_path, ignore)
    run_dir = wait_for_rows(tmp_path, 4, pid)
    os.kill(pid, signal.SIGHUP)
    assert end_of(pid, tmp_path) == (0, []) and (run_dir / "agent.pt").exists()


@SCRIPTS
def test_two_processes_never_own_one_run(script, tiny, tmp_path, monkeypatch, capsys):
    """Neither a new run nor a resumed one can be resumed while it trains."""
    collect, refused = script.collect, []

    def intrude(*args):
        (run_dir,) = (x.parent for x in tmp_path.rglob("checkpoint.pt"))
        before, handlers = contents(run_dir), [signal.getsignal(x) for x in STOPS.values()]
        with pytest.raises(Timeout):
            resume(script, run_dir, "--total-timesteps", "9999")
        refused.append(command_line(script, ["--resume", run_dir], monkeypatch, capsys))
        assert contents(run_dir) == before and [signal.getsignal(x) for x in STOPS.values()] == handlers
        return collect(*args)

    monkeypatch.setattr(script, "collect", intrude)
    run_dir = train(script, tmp_path, **TINY, total_timesteps=30)
    resume(script, run_dir, "--total-timesteps", "60")
    assert len(refused) == 2
    for code, lines in refused:
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and "lock" in lines[0]


@SCRIPTS
def test_resuming_restores_every_tensor(script, tiny, monkeypatch):
    made, make_optimizer, checkpoint = {}, script.make_optimizer, torch.load((run := tiny(script)) / "checkpoint.pt")

    def stop(agent, *rest):  # when all is loaded
        made.update(agent=agent, rng_state=torch.get_rng_state())
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "make_optimizer", lambda *args: made.setdefault("optimizer", make_optimizer(*args)))
    monkeypatch.setattr(script, "collect", stop)
    with pytest.raises(KeyboardInterrupt):
        resume(script, run, "--total-timesteps", "640")
    agent, optimizer = made["agent"].state_dict(), made["optimizer"].state_dict()
    assert agent.keys() == checkpoint["agent"].keys() and checkpoint["step"] == 320
    assert all(torch.equal(agent[name], checkpoint["agent"][name]) for name in agent)
    assert agent["obs_stats.count"] == agent["return_stats.count"] == checkpoint["step"]
    (state,), (saved,) = optimizer["state"].values(), checkpoint["optimizer"]["state"].values()
    assert state.keys() == saved.keys() == {"step", "exp_avg", "exp_avg_sq"} and saved["step"] == 10
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    (group,) = optimizer["param_groups"]
    assert {x: group[x] for x in ("betas", "eps", "weight_decay")} == dict(betas=(0.9, 0.999), eps=1e-5, weight_decay=0)
    assert group["lr"] == pytest.approx(3e-4 / 2) and torch.equal(made["rng_state"], checkpoint["rng_state"])
    # The optimizer's vector is still what the networks read.
    (flat,), parameters = made["optimizer"].param_groups[0]["params"], list(made["agent"].parameters())
    assert torch.equal(flat, torch.nn.utils.parameters_to_vector(parameters))
    assert all(p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in parameters)


@SCRIPTS
def test_a_complete_run_goes_on_if_asked_for_more_steps(script, tiny, monkeypatch):
    run_dir, gradient, complete = tiny(script), script.minibatch_gradient, []
    before, episodes = contents(run_dir), read(run_dir / "episodes.csv")
    for words in ([], ["--total-timesteps", "320"], ["--total-timesteps", "7"]):
        with pytest.raises(script.BadInput, match="is complete: to go on, add a larger --total-timesteps"):
            resume(script, run_dir, *words)
    assert contents(run_dir) == before

    def watched(*args):
        complete.append((run_dir / "agent.pt").exists())
        return gradient(*args)

    monkeypatch.setattr(script, "minibatch_gradient", watched)
    # Rows past the checkpoint, then half a row, as a kill leaves them.
    for name in ("episodes.csv", "metrics.csv"):
        with (run_dir / name).open("a") as file:
            file.write((run_dir / name).read_text().splitlines()[-1] + "\n352,0.")
    resume(script, run_dir, "--total-timesteps", "640", "--output-dir", "elsewhere", "--checkpoint-seconds", "7")
    assert complete and not any(complete) and (run_dir / "agent.pt").exists(), "a run that goes on is not complete"
    changed = dict(total_timesteps=640, output_dir="elsewhere", checkpoint_seconds=7.0)
    old = json.loads(before[run_dir / "args.json"])
    assert json.loads((run_dir / "args.json").read_text()) == old | {"args": old["args"] | changed}
    after, metrics = read(run_dir / "episodes.csv"), read(run_dir / "metrics.csv")
    assert after[:320] == episodes and len(after) == 640 and len(metrics) == 20
    mean_return = [np.mean(column(after, "return")[max(0, 32 * n - 100) : 32 * n]) for n in range(1, 21)]
    np.testing.assert_allclose(column(metrics, "charts/mean_return_100"), mean_return, rtol=1e-4)
    assert column(metrics, "charts/learning_rate")[[9, 10]] == pytest.approx([3e-5, 1.5e-4], rel=1e-4)


@SCRIPTS
@pytest.mark.parametrize(
    "words",
    ["--seed 1", "--num-envs 128", "--seed 1 --num-envs 128", "--gamma 0.5", "--hidden-size 64", "--norm-obs False"],
)
def test_typed_settings_of_a_run_cannot_change(script, words, tiny, monkeypatch, capsys):
    """Some equal the script's defaults, which the run's settings (seed 5, 16 units) do not."""
    run_dir = tiny(script)
    before = contents(run_dir)
    words = words.replace("--norm-obs False", "--no-norm-obs").split()
    arguments = ["--resume", run_dir, "--total-timesteps", "640", *words]
    code, lines = command_line(script, arguments, monkeypatch, capsys)
    assert code == 2 and lines == [f"error: a run keeps its settings: leave out --{words[0][2:].replace('no-', '')}"]
    assert contents(run_dir) == before


class Malicious:
    """Would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cut(path, part):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def edit(run_dir, drop=(), **changes):
    about = json.loads((run_dir / "args.json").read_text())
    about["args"] = {name: x for name, x in (about["args"] | changes).items() if name not in drop}
    (run_dir / "args.json").write_text(json.dumps({name: x for name, x in about.items() if name not in drop}))


def drop_from_checkpoint(run, name):
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    del checkpoint[name]
    torch.save(checkpoint, run / "checkpoint.pt")


def tensor_bytes(path):
    """Where the stored tensors lie in a checkpoint: [(start, end)]"""
    places, data = [], path.read_bytes()
    for entry in zipfile.ZipFile(path).infolist():
        if "/data/" in entry.filename:
            header = entry.header_offset
            start = header + 30 + sum(int.from_bytes(data[header + k : header + k + 2], "little") for k in (26, 28))
            places.append((start, start + entry.file_size))
    return places


def flip(path, seed):
    rng, data = random.Random(seed), bytearray(path.read_bytes())
    start, end = rng.choice(tensor_bytes(path))
    data[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def all_checkpoints(damage):
    return lambda run: [damage(path) for path in run.glob("*.pt")]


DAMAGES = {
    "no checkpoint": all_checkpoints(Path.unlink),
    "empty checkpoint": all_checkpoints(lambda path: cut(path, 0)),
    "half a checkpoint": all_checkpoints(lambda path: cut(path, 0.5)),
    "almost a checkpoint": all_checkpoints(lambda path: cut(path, 0.99)),
    "text for a checkpoint": all_checkpoints(lambda path: path.write_text("hello\n")),
    "code for a checkpoint": all_checkpoints(lambda path: torch.save(Malicious(path.parent / "executed"), path)),
    "no args.json": lambda run: (run / "args.json").unlink(),
    "empty args.json": lambda run: cut(run / "args.json", 0),
    "half args.json": lambda run: cut(run / "args.json", 0.5),
    "list for args.json": lambda run: (run / "args.json").write_text("[]"),
    "bytes for args.json": lambda run: (run / "args.json").write_bytes(b"\xff\x00"),
    "missing setting": lambda run: edit(run, drop=["gamma"]),
    "unknown setting": lambda run: edit(run, no_such_setting=1),
    "text for a number": lambda run: edit(run, num_envs="4"),
    "fraction for a count": lambda run: edit(run, num_envs=4.5),
    "number for a switch": lambda run: edit(run, norm_obs=1),
    "null for a number": lambda run: edit(run, gamma=None),
    "unknown choice": lambda run: edit(run, lr_schedule="cosine"),
    "out of range": lambda run: edit(run, gamma=7),
    "not finite": lambda run: edit(run, gamma=math.nan),
    "earlier version": lambda run: edit(run, drop=["format"]),
    "no settings": lambda run: edit(run, drop=["args"]),
    "no script": lambda run: edit(run, drop=["script"]),
    **{f"bit {n}": all_checkpoints(lambda path, seed=n: flip(path, seed)) for n in range(8)},
}
RESUME_DAMAGES = DAMAGES | {
    "other task": lambda run: edit(run, env_id="Hopper-v4"),
    "other size": lambda run: edit(run, hidden_size=32),
    "other number of environments": lambda run: edit(run, num_envs=3),
    "no such task": lambda run: edit(run, env_id="Nothing-v0"),
    "agent for a checkpoint": lambda run: torch.save(
        {"agent": {}, "optimizer": {}, "step": 320}, run / "checkpoint.pt"
    ),
    "list for a checkpoint": lambda run: torch.save([1, 2], run / "checkpoint.pt"),
    "empty dictionary for a checkpoint": lambda run: torch.save({}, run / "checkpoint.pt"),
    "checkpoint without random state": lambda run: drop_from_checkpoint(run, "rng_state"),
    "checkpoint without sizes": lambda run: drop_from_checkpoint(run, "log_sizes"),
    "episodes lost": lambda run: cut(run / "episodes.csv", 0.9),
    "no metrics.csv": lambda run: (run / "metrics.csv").unlink(),
}


@SCRIPTS
@pytest.mark.parametrize("damage", [*RESUME_DAMAGES, "sibling's run"])
def test_damaged_run_is_refused_in_one_line_and_stays_as_it_is(script, damage, tiny, tmp_path, monkeypatch, capsys):
    run_dir = tiny(script if damage in RESUME_DAMAGES else {bpo: ppo, ppo: bpo}[script])
    RESUME_DAMAGES.get(damage, lambda run: None)(run_dir)
    monkeypatch.chdir(tmp_path)  # an output would land here
    before = contents(tmp_path)
    words = ["--resume", "run", "--total-timesteps", "640"]
    code, lines = command_line(script, words, monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and contents(tmp_path) == before
    if damage in DAMAGES or damage == "sibling's run":  # what enjoy.py reads
        with pytest.raises(script.BadInput, match="cannot use the run ") as error:
            script.load_run(run_dir, "agent.pt")
        assert "\n" not in str(error.value) and contents(tmp_path) == before


@SCRIPTS
def test_a_refused_run_can_be_tried_again_in_the_same_process(script, tiny, tmp_path):
    run_dir = tiny(script)
    for _ in range(2):
        with pytest.raises(script.BadInput, match="is complete: to go on, add a larger --total-timesteps"):
            resume(script, run_dir)
    with pytest.raises(script.BadInput, match="cannot use the run"):
        script.train(script.Args(resume=str(tmp_path / "missing")))
    assert not (tmp_path / "missing").exists()


@SCRIPTS
def test_typing_a_runs_own_setting_is_fine(script, tmp_path):
    """Also where it would not fit the script's other defaults."""
    sizes = dict(num_steps=1024, minibatch_size=4096, update_epochs=1, total_timesteps=4096)
    run_dir = train(script, tmp_path, **PROBE | sizes, env_id="Target-v0")
    args = script.read_args(["--resume", str(run_dir), "--minibatch-size", "4096", "--total-timesteps", "9000"])
    assert (args.minibatch_size, args.num_steps, args.total_timesteps) == (4096, 1024, 9000)


@SCRIPTS
def test_undamaged_run_is_resumed(script, tiny, tmp_path, monkeypatch):
    """Else the test above would say nothing."""
    assert resume(script, tiny(script), "--total-timesteps", "640") == str(tmp_path / "run")
    script.load_run(tmp_path / "run", "agent.pt")


# --- broken numbers


def check_last_checkpoint(script, folder):
    (run_dir,) = folder.iterdir()
    agent, _ = load(script, run_dir, "checkpoint.pt")
    assert all(torch.isfinite(x).all() for x in agent.state_dict().values())
    metrics = read(run_dir / "metrics.csv")
    assert torch.load(run_dir / "checkpoint.pt")["step"] == metrics[-1]["step"] == agent.obs_stats.count > 0
    assert not (run_dir / "agent.pt").exists()


@SCRIPTS
@pytest.mark.parametrize("task", ["NanReward", "HugeReward", "NanObservation", "HugeObservation"])
def test_task_that_breaks_is_named_and_the_checkpoint_kept(script, task, tmp_path):
    word = "a reward" if task.endswith("Reward") else "an observation"
    with pytest.raises(script.BrokenRun, match=f"{task}-v0 returned {word} that is no finite float32"):
        train(script, tmp_path, **PROBE, env_id=f"{task}-v0", total_timesteps=4000, checkpoint_seconds=0)
    check_last_checkpoint(script, tmp_path)


@SCRIPTS
def test_first_observation_that_is_not_finite_is_named_before_anything_is_created(script, tmp_path):
    with pytest.raises(script.BrokenRun, match="NanReset-v0 returned an observation that is no finite float32"):
        train(script, tmp_path / "out", **PROBE, env_id="NanReset-v0")
    assert not list(tmp_path.iterdir())


@SCRIPTS
def test_rollouts_of_one_sample_count(script, tmp_path):
    """Two steps of one environment whose episodes last one: a sample and a dummy."""
    sizes = dict(num_envs=1, num_steps=2, minibatch_size=2, total_timesteps=50)
    run_dir = train(script, tmp_path, **PROBE | sizes, env_id="Probe-v0")
    metrics = read(run_dir / "metrics.csv")
    assert len(metrics) == len(read(run_dir / "episodes.csv")) == 50
    assert all(math.isfinite(x) for row in metrics for x in row.values())


@SCRIPTS
def test_loss_that_breaks_is_named_and_the_checkpoint_kept(script, tmp_path, monkeypatch):
    calls, policy_loss = [], script.policy_loss

    def broken(*args):
        calls.append(1)
        return policy_loss(*args) * (math.nan if len(calls) > 30 else 1)

    monkeypatch.setattr(script, "policy_loss", broken)
    with pytest.raises(script.BrokenRun, match="losses/policy_loss is nan at step (160|192)$"):
        train(script, tmp_path, **TINY | dict(update_epochs=3, minibatch_size=16), total_timesteps=9000)
    check_last_checkpoint(script, tmp_path)


@SCRIPTS
@pytest.mark.parametrize("minibatch_size, what", [(16, "losses/policy_loss is nan"), (256, "a weight is not finite")])
def test_weights_that_break_are_not_saved(script, minibatch_size, what, tmp_path, monkeypatch, capsys):
    """Two steps of 1e38 per iteration: the second one's loss tells, or, with one step of everything, the weights."""
    settings = PROBE | dict(env_id="Target-v0", learning_rate=1e38, update_epochs=1, minibatch_size=minibatch_size)
    words = options(**settings, total_timesteps=100, output_dir=tmp_path)
    code, (line,) = command_line(script, words, monkeypatch, capsys)
    assert code == 1 and line.startswith(f"error: {what} at step 128. ")
    assert "The last good checkpoint is kept; resumed with the same settings it ends here again" in line
    (run_dir,) = tmp_path.iterdir()
    agent, _ = load(script, run_dir, "checkpoint.pt")
    assert all(torch.isfinite(x).all() for x in agent.state_dict().values()) and agent.obs_stats.count == 0
    assert not (run_dir / "agent.pt").exists()


# --- bad input

NAN, INF = math.nan, math.inf
BAD_VALUES = dict(total_timesteps=[0, -5, 1.5], num_envs=[0, -1, 10**18], num_steps=[0, 10**18])
BAD_VALUES |= dict(update_epochs=[0, 10**18], hidden_size=[0, 10**18], seed=[-1, 2**31], env_backend=["mujoco"])
BAD_VALUES |= dict(minibatch_size=[0, -64, 1, 4 * 512 + 1, 10**18], checkpoint_seconds=[-1.0, NAN])
BAD_VALUES |= dict(learning_rate=[0.0, -1.0, NAN, INF], clip_coef=[0.0, -0.2, NAN], max_grad_norm=[0.0, NAN])
BAD_VALUES |= dict(gamma=[1.1, -0.1, NAN], gae_lambda=[1.1, NAN], ent_coef=[-1.0, NAN], vf_coef=[-1.0, INF])
BAD_VALUES |= dict(target_kl=[0.0, NAN], desired_kl=[0.0, NAN], log_std_init=[NAN, INF], lr_schedule=["cosine"])
BAD_VALUES |= dict(activation=["gelu"], no_such_setting=[1])
BAD_BPO_VALUES = dict(ratio_low=[1.0, 1.2, -0.1, NAN], ratio_high=[1.0, 0.9, INF, NAN], temperature=[0.0, -1.0, NAN])
BAD_BPO_VALUES |= dict(median_temperature=[0.0, NAN], median_coef=[-1.0, NAN], tv_coef=[-1.0, NAN], clip_coef=[1.5])
BAD_BPO_VALUES |= dict(divergence=["js"], median_network=["head"])
BAD_TOGETHER = [{"divergence": "kl", "clip_coef": 1.0}, {"divergence": "kl", "tv_coef": 0.1}]
CASES = [(script, {name: x}) for script in BOTH.values() for name, values in BAD_VALUES.items() for x in values]
CASES += [(bpo, {name: x}) for name, values in BAD_BPO_VALUES.items() for x in values] + [
    (bpo, x) for x in BAD_TOGETHER
]
TYPED_CASES = [(script, {name: values[-1]}) for script in BOTH.values() for name, values in BAD_VALUES.items()]
TYPED_CASES += [(bpo, {name: values[-1]}) for name, values in BAD_BPO_VALUES.items()] + [(bpo, BAD_TOGETHER[1])]


@pytest.mark.parametrize("script, settings", CASES, ids=lambda x: getattr(x, "SCRIPT", "")[:3] or str(x))
def test_bad_settings_are_refused(script, settings):
    with pytest.raises(pydantic.ValidationError):
        script.Args(**settings)


@pytest.mark.parametrize("script, settings", TYPED_CASES, ids=lambda x: getattr(x, "SCRIPT", "")[:3] or str(x))
def test_bad_settings_on_the_command_line_are_a_box(script, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, lines = command_line(script, options(**settings), monkeypatch, capsys)
    assert code == 2 and not list(tmp_path.iterdir())
    assert lines and not any("Traceback" in line for line in lines)
    names = {*settings, *(word for word in options(**settings) if word[:2] == "--"), "0 <= low < 1 < high"}
    assert any(name in line for name in names for line in lines), lines


GYM = ["--env-backend", "gymnasium", "--env-id"]
BAD_WORDS = {
    "typing error": (["--env-id", "Hoper-v4"], "envpool cannot make Hoper-v4: .*did you mean Hopper-v4"),
    "unknown to Gymnasium": ([*GYM, "Nothing-v0"], "gymnasium cannot make Nothing-v0: "),
    "no task's name": ([*GYM, "not a name"], "cannot make not a name: "),
    "missing module": ([*GYM, "no_such_module:Hopper-v4"], "cannot make no_such_module:Hopper-v4: ModuleNotFoundError"),
    "broken module": ([*GYM, "broken_tasks:Hopper-v4"], "cannot make broken_tasks:Hopper-v4: OSError: libGL.so.1 miss"),
    "Atari": (["--env-id", "Pong-v5"], "no flat Box observation"),
    "discrete": (["--env-id", "CartPole-v1"], "no flat Box action"),
    "discrete in Gymnasium": ([*GYM, "Choice-v0"], "no flat Box action"),
    "dictionary": ([*GYM, "Dictionary-v0"], "no flat Box observation"),
    "image": ([*GYM, "Image-v0"], "no flat Box observation"),
    "missing run": (["--resume", "missing"], "cannot use the run missing: FileNotFoundError"),
    "run without a name": (["--resume", ""], "cannot use the run "),  # as in --resume "$RUN" where RUN is not set
    "file for a run": (["--resume", "/dev/null"], "cannot use the run /dev/null: "),
    "folder that cannot be": (["--output-dir", "/proc/out"], "cannot make /proc/out/.*; choose another --output-dir"),
    "file for a folder": (["--output-dir", "/dev/null/out"], "cannot make /dev/null/out/.*choose another --output-dir"),
    "evaluate": (["--evaluate", "runs/some"], "python enjoy.py RUN_DIR --video"),
    "film": (["--capture-video"], "python enjoy.py RUN_DIR --video"),
}


@SCRIPTS
@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_input_is_one_line_before_anything_is_created(script, case, monkeypatch, capsys, tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "broken_tasks.py").write_text("raise OSError('libGL.so.1\\n missing. Sorry')")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    words, message = BAD_WORDS[case]
    code, lines = command_line(script, [*words, "--no-compile"], monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and re.match(f"error: .*{message}", lines[0]), lines
    assert not list((tmp_path / "work").iterdir())


@SCRIPTS
def test_simulator_that_cannot_be_imported_is_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "envpool", None)
    code, lines = command_line(script, ["--output-dir", tmp_path / "out"], monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: envpool cannot make Hopper-v4: ModuleNotFound")
    assert not list(tmp_path.iterdir())


@SCRIPTS
def test_torchrun_is_refused_in_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, lines = command_line(script, ["--output-dir", tmp_path / "out"], monkeypatch, capsys)
    assert code == 2 and lines == ["error: this script trains in one process: start it without torchrun"]
    assert not list(tmp_path.iterdir())


@SCRIPTS
def test_what_does_not_fit_into_memory_is_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "")  # as some schedulers leave it
    words = ["--hidden-size", "1000000", "--no-compile", "--output-dir", tmp_path / "out"]
    code, lines = command_line(script, words, monkeypatch, capsys)
    assert code == 1 and len(lines) == 1 and "allocate memory" in lines[0] and not list(tmp_path.iterdir())


@SCRIPTS
def test_tracking_without_an_account_is_one_line(script, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    asked = []
    monkeypatch.setattr("wandb.login", lambda **options: asked.append(options))  # returns None: no key is known
    with pytest.raises(script.BadInput, match="--track needs an account: .* WANDB_MODE=offline"):
        train(script, tmp_path / "out", track=True)
    assert asked == [{"prompt": False}] and not list(tmp_path.iterdir())


# --- real processes


@SCRIPTS
@pytest.mark.parametrize("room", [2000, 20_000])
def test_full_disk_ends_with_one_line(script, room, tmp_path):
    """Files may grow to some bytes, as on a disk with that much left: args.json fits, then only the logs do."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit is then an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    words = options(compile=False, num_steps=64, update_epochs=1, checkpoint_seconds=0, output_dir=tmp_path / "out")
    process = start(script, words, cwd=tmp_path, preexec_fn=limit)  # no fork: EnvPool's threads do not survive one
    code, lines = process.wait(120), process.stderr.read().splitlines()
    assert code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not list(tmp_path.rglob("checkpoint.pt"))


def start(script, words, **kwargs):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent)} | kwargs.pop("env", {})
    command = [sys.executable, script.__file__, *words]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, text=True, env=environment, **pipes | kwargs)


def test_closed_pipe_does_not_end_a_run(tmp_path):
    """As in `python bpo_continuous_action.py | head -c 1`, but closed for certain before the run prints."""
    settings = TINY | dict(env_id="probe_envs:Target-v0", output_dir=tmp_path)
    process = start(bpo, options(**settings, total_timesteps=320), cwd=tmp_path)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "") and len(list(tmp_path.glob("*/agent.pt"))) == 1


def test_interrupt_during_the_imports_prints_nothing(tmp_path):
    process = start(bpo, ["--num-envs", "2"], cwd=tmp_path)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():  # torch takes seconds
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "") and not list(tmp_path.iterdir())


def test_bad_input_ends_a_real_process_with_status_two(tmp_path):
    process = start(bpo, ["--env-id", "CartPole-v1"], cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, len(err.splitlines())) == (2, "", 1) and err.startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_track_writes_an_offline_wandb_run(tmp_path):
    pytest.importorskip("wandb")
    settings = TINY | dict(env_id="probe_envs:Target-v0", track=True, total_timesteps=300, output_dir=tmp_path)
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(tmp_path)}
    process = start(bpo, options(**settings), cwd=tmp_path, env=environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (offline,) = tmp_path.glob("probe_envs-Target-v0__*/wandb/offline-run-*/*.wandb")
    assert b"charts/episodic_return" in offline.read_bytes()
