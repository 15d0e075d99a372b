"""Real runs of bpo_locomotion.py and ppo_locomotion.py: both kinds of reset, logs, resuming, filming, bad input."""

import dataclasses
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bpo_locomotion as bpo
import ppo_locomotion as ppo

BOTH = {"bpo": bpo, "ppo": ppo}
SCRIPTS = pytest.mark.parametrize("script", BOTH.values(), ids=BOTH)
SMALL = dict(device="cpu", num_envs=4, num_steps=12, hidden_sizes=(16,), eval_episodes=2)
HOPPER = SMALL | dict(env_id="Hopper-v4", total_timesteps=400)  # a flat observation, no privileged one
NAN = math.nan
GO1 = SMALL | dict(env_id="Go1JoystickRoughTerrain-v1", total_timesteps=90)


@pytest.fixture(autouse=True)
def no_signals_left(monkeypatch):
    """A script run as __main__ in this process leaves its handlers behind, and a stopped one its list of signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for script in BOTH.values():
        script.STOP.clear()


def train(script, folder, **settings):
    return Path(script.train(script.Args(**{**settings, "output_dir": str(folder)})))


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


# -------------------------------------------------------------------------------------------------------- simulators


def simulator(num_envs, episode, next_step, action_size=1, privileged_size=1):
    """A simulator of whatever `episode` plays; see make_envs for its interface.

    episode(e, k, action) gives step k (from 0) of an environment's e-th episode: the observation before it, its reward,
    and how it ends: "terminated", "truncated", both or "". The true last observation is 1000.
    """
    at = [[0, 0] for _ in range(num_envs)]  # episode, step
    dummy = [False] * num_envs

    def observe(done=()):
        seen = [1000.0 if n in done else episode(*at[n], 0.0)[0] for n in range(num_envs)]
        obs = torch.tensor(seen)[:, None]
        return obs, obs.expand(-1, privileged_size) + 0.5

    def step(actions):
        rewards, ends, done = [0.0] * num_envs, [""] * num_envs, set()
        for n in range(num_envs):
            if dummy[n]:
                dummy[n] = False
                continue
            _, rewards[n], ends[n] = episode(*at[n], actions[n, 0].item())
            at[n] = [at[n][0] + 1, 0] if ends[n] else [at[n][0], at[n][1] + 1]
            if ends[n] and next_step:
                dummy[n] = True
                done.add(n)
        terminated, truncated = (torch.tensor([name in x for x in ends]) for name in ("terminated", "truncated"))
        return (
            observe(done),
            torch.tensor(rewards),
            terminated,
            truncated,
            {"rewards/pay": torch.tensor(rewards).mean()},
        )

    calls = dict(reset=lambda **_: (observe(), {"rewards/pay": 0.0}), step=step, close=lambda: None)
    return SimpleNamespace(**calls, next_step=next_step)


def use(script, monkeypatch, episode, next_step=False):
    """The list that this returns receives, whenever training starts, the simulator's seed, the global generator's, and
    the steps made before."""
    resets = []

    def make_envs(args, num_envs, seed, render=False):
        envs = simulator(num_envs, episode, next_step)
        reset = envs.reset

        def recorded(stagger=False, steps=0):
            if stagger:
                resets.append((seed, torch.initial_seed(), steps))
            return reset()

        envs.reset = recorded
        return envs, 1, 1, 1

    monkeypatch.setattr(script, "make_envs", make_envs)
    return resets


LENGTHS = (1, 4, 2, 7)


def marked(e, k, action):
    """Shows its step, pays 3, 4, 5, ...; lengths go 1, 4, 2, 7, 1, ...; it ends, is cut by a time limit, or both."""
    last = k + 1 == LENGTHS[e % 4]
    return k + 1.0, 3.0 + k, ("terminated", "truncated", "terminated, truncated")[e % 3] if last else ""


@SCRIPTS
@pytest.mark.parametrize("next_step", [True, False], ids=["next-step", "same-step"])
def test_returns_and_rows_under_both_kinds_of_reset(script, next_step, tmp_path, monkeypatch):
    """Dummy rows reach nothing; a time limit bootstraps from the true last observation, or from the one before."""
    use(script, monkeypatch, marked, next_step)
    batches, minibatches, gamma, lam = [], [], 0.9, 0.8
    prepare, gradient = script.prepare_batch, script.minibatch_gradient

    def record_batch(batch, args):
        prepare(batch, args)
        batches.append({name: x.clone() for name, x in batch.items()})

    def record(agent, parameters, batch, *rest):
        inputs = {x: agent.normalize_privileged(torch.tensor([[x + 0.5]])) for x in (1.0, 2, 3, 4, 5, 6, 7, 1000)}
        values = {x: agent.value(privileged).item() for x, privileged in inputs.items()}
        minibatches.append((batch, values))
        return gradient(agent, parameters, batch, *rest)

    monkeypatch.setattr(script, "prepare_batch", record_batch)
    monkeypatch.setattr(script, "minibatch_gradient", record)
    monkeypatch.setattr(script, "report", lambda *_: {})
    settings = SMALL | dict(
        num_envs=3, num_minibatches=3, update_epochs=2, total_timesteps=80, gamma=gamma, gae_lambda=lam
    )
    run_dir = train(script, tmp_path, **settings, norm_obs=True, checkpoint_interval=1)

    rows, episodes = [], []  # one environment's rows, None for a dummy; all three are alike
    for e in range(40):
        for k in range(LENGTHS[e % 4]):
            rows.append(marked(e, k, 0.0))
        episodes.append((sum(3.0 + k for k in range(LENGTHS[e % 4])), LENGTHS[e % 4], len(rows)))
        rows += [None] * next_step
    metrics = read(run_dir / "metrics.csv")
    played = rows[: 12 * len(metrics)]
    real = np.array([row[0] for row in played if row is not None])
    assert metrics[-1]["step"] == 3 * len(real) >= 80
    finished = [(total, length) for total, length, end in episodes if end <= len(played)]
    found = [(row["return"], row["length"]) for row in read(run_dir / "episodes.csv")]
    assert found == [episode for episode in finished for _ in range(3)]
    state = torch.load(run_dir / "checkpoint.pt")["agent"]
    for stats, shift in (("obs_stats", 0.0), ("privileged_stats", 0.5)):
        assert state[f"{stats}.count"] == 3 * len(real)
        assert state[f"{stats}.mean"].item() == pytest.approx(real.mean() + shift)
        assert state[f"{stats}.var"].item() == pytest.approx(real.var())

    # The first iteration's batch against the sum of discounted errors. The normaliser still passes values through.
    batch, (_, values) = batches[0], minibatches[0]
    first, nexts = rows[:12], [row[0] if row else 1000 for row in rows[1:13]]
    errors = []
    for row, following in zip(first, nexts):
        if row is None:
            errors.append(None)
            continue
        obs, reward, end = row
        after = None if "terminated" in end else (1000 if next_step else obs) if end else following
        errors.append(reward + (gamma * values[after] if after else 0) - values[obs])
    expected = []
    for t, row in enumerate(first):
        if row is not None:
            total, weight = 0.0, 1.0
            for k in range(t, 12):
                total, weight = total + weight * errors[k], weight * gamma * lam
                if first[k][2]:
                    break
            expected.append(total + values[row[0]])
    found = batch["returns"].view(-1, 3)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    torch.testing.assert_close(found, found[:, :1].expand(-1, 3))
    assert batch["obs"].max() <= 7

    # Every real row, known by its action, is in each epoch; both epochs use one order.
    epochs = [torch.cat([x["actions"] for x, _ in minibatches[i : i + 3]]).flatten() for i in (0, 3)]
    assert torch.equal(*epochs) and set(epochs[0].tolist()) == set(batch["actions"].flatten().tolist())
    assert len(epochs[0]) == 36


@SCRIPTS
def test_policy_moves_to_the_best_action(script, tmp_path, monkeypatch):
    use(script, monkeypatch, lambda e, k, action: (0.0, -((action - 0.5) ** 2), "terminated"))
    settings = SMALL | dict(num_envs=16, init_std=1.0, total_timesteps=12_000)
    run_dir = train(script, tmp_path, **settings)
    results = json.loads((run_dir / "evaluation.json").read_text())
    assert results["deterministic"]["mean"] > -0.02
    rows = read(run_dir / "metrics.csv")
    assert rows[-1]["charts/std"] < 0.9 and len(set(column(rows, "charts/learning_rate"))) > 3


@SCRIPTS
def test_a_compiled_run_equals_a_plain_one(script, tmp_path, monkeypatch):
    use(script, monkeypatch, lambda e, k, action: (0.0, -((action - 0.5) ** 2), "terminated"))
    plain, compiled = (
        read(train(script, tmp_path / str(x), **SMALL, total_timesteps=200, compile=x) / "metrics.csv")
        for x in (False, True)
    )
    for row, other in zip(plain, compiled, strict=True):
        assert [row[x] for x in row if x.startswith(("losses/", "charts/l"))] == pytest.approx(
            [other[x] for x in row if x.startswith(("losses/", "charts/l"))], rel=1e-3, abs=1e-5
        )


def test_compiling_without_a_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for script, gpu in itertools.product(BOTH.values(), (False, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(script.BadInput, match="--compile needs a C.. compiler"):
            train(script, tmp_path / "out", **HOPPER | dict(device="auto"), compile=True)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- EnvPool


@SCRIPTS
def test_a_run_on_a_robot_is_complete(script, tmp_path):
    run_dir = train(script, tmp_path, **GO1)
    rows = read(run_dir / "metrics.csv")
    page = (Path(script.__file__).parent / "docs" / "bpo_locomotion.md").read_text()
    names = [x for x in rows[0] if not x.startswith("rewards/")]
    assert len(names) > 20 and all(f"`{x}`" in page for x in names if x != "step"), [x for x in names if x not in page]
    assert {"rewards/tracking_lin_vel", "rewards/feet_slip", "rewards/orientation"} <= set(rows[0])
    finite = [name for name in rows[0] if not name.startswith("charts/mean_")]
    assert all(math.isfinite(row[name]) for row in rows for name in finite)
    assert 0 < rows[-1]["rewards/tracking_lin_vel"] <= 1 and rows[-1]["step"] >= 90
    assert {"agent.pt", "checkpoint.pt", "args.json", "evaluation.json"} <= {x.name for x in run_dir.iterdir()}
    agent = torch.load(run_dir / "agent.pt")["agent"]
    assert agent["policy.0.weight"].shape == (16, 48) and agent["critic.0.weight"].shape == (16, 123)
    about = json.loads((run_dir / "args.json").read_text())
    assert about["device"] == "cpu" and {"torch", "envpool"} <= set(about["versions"])
    assert set(about["args"]) == {x.name for x in dataclasses.fields(script.Args)}


@SCRIPTS
@pytest.mark.parametrize("bf16, most", [(False, 1e-9), (True, 1e-6)], ids=["float32", "bfloat16"])
def test_the_update_starts_from_the_policy_that_acted(script, bf16, most, tmp_path):
    """With one gradient step per iteration nothing has moved when the divergence from the rollout's means is taken."""
    settings = GO1 | dict(num_minibatches=1, update_epochs=1, bf16=bf16, learning_rate=0.01, lr_schedule="constant")
    settings |= dict(matmul_precision="highest")  # "medium" is bfloat16 on processors with AMX
    rows = read(train(script, tmp_path, **settings) / "metrics.csv")
    assert len(rows) > 1 and rows[0]["ratio/high_std"] > 1e-3  # the step itself does move it
    assert np.abs(column(rows, "losses/kl")).max() < most and np.abs(column(rows, "losses/approx_kl")).max() < most


def test_logged_rewards_are_means_over_real_steps():
    """Against EnvPool itself, across resets, whose dummy steps must not count."""
    import envpool

    args = bpo.Args(env_id=GO1["env_id"], device="cpu")
    envs, *sizes = bpo.make_envs(args, 6, 3)
    raw = envpool.make(args.env_id, env_type="gymnasium", num_envs=6, seed=3)
    (obs, privileged), _ = envs.reset()
    state, _ = raw.reset()
    assert sizes == [48, 123, 12] and obs.dtype == torch.float32
    np.testing.assert_allclose(privileged, state["privileged_state"], rtol=1e-6)
    torch.manual_seed(0)
    mixed = 0
    for _ in range(80):
        actions = 3 * torch.randn(6, 12)
        (obs, _), reward, terminated, truncated, logs = envs.step(actions)
        state, raw_reward, *ends, info = raw.step(actions.numpy().astype(np.float64))  # not clipped, as in Playground
        np.testing.assert_allclose(obs, state["state"], rtol=1e-6)
        np.testing.assert_allclose(reward, raw_reward)
        np.testing.assert_array_equal(terminated | truncated, ends[0] | ends[1])
        real = info["elapsed_step"] > 0
        mixed += real.any() and not real.all()
        if real.any():
            assert logs["rewards/pose"] == pytest.approx(info["reward_pose"][real].mean())
    assert mixed > 0, "some robots must be reset while others walk"
    alone, *_ = bpo.make_envs(args, 1, 3)
    _, logs = alone.reset()
    ended = False
    while not ended:
        _, _, terminated, truncated, seen = alone.step(actions[:1])
        assert seen.keys() == logs.keys() and len(logs) > 10
        ended = terminated | truncated
    assert alone.step(actions[:1])[-1] == {}, "a dummy step alone has no rewards to log"


def test_envpools_first_episodes_end_at_random_lengths():
    """Pendulum's episodes end at their time limit alone, of 200 steps."""
    args = bpo.Args(env_id="Pendulum-v1", device="cpu")
    envs, *_ = bpo.make_envs(args, 60, 3)
    torch.manual_seed(0)
    for stagger in (False, True):
        envs.reset(stagger=stagger)
        truncated = torch.stack([envs.step(torch.zeros(60, 1))[3] for _ in range(402)])
        ends = [x.nonzero().flatten().tolist() for x in truncated.T]
        if stagger:
            first = torch.tensor([x[0] + 1 for x in ends])
            assert len(set(first.tolist())) > 40 and first.min() < 20 and first.max() > 180
            assert all(x[1] - x[0] == 201 for x in ends), "later episodes are whole, after a dummy step"
        else:
            assert ends == [[199, 400]] * 60


def stand_in_for_randint(lengths):
    return lambda low, high, size: torch.tensor(lengths) if (low, high, size) == (1, 1001, (len(lengths),)) else None


def test_an_episode_that_is_cut_is_followed_by_a_dummy_step_and_a_new_one(monkeypatch):
    """Against EnvPool itself on Hopper, some of which fall before they are cut, when they are, or in the dummy step."""
    import envpool

    envs, *_ = bpo.make_envs(bpo.Args(env_id="Hopper-v4", device="cpu"), 40, 3)
    raw = envpool.make("Hopper-v4", env_type="gymnasium", num_envs=40, seed=3)
    lengths = [n % 20 + 10 for n in range(40)]
    monkeypatch.setattr(torch, "randint", stand_in_for_randint(lengths))
    envs.reset(stagger=True), raw.reset()
    generator, kinds, first_end = torch.Generator().manual_seed(0), set(), [None] * 40
    for t in range(1, 60):
        actions = torch.randn(40, 3, generator=generator).clamp(-1, 1)
        (obs, _), reward, terminated, truncated, _ = envs.step(actions)
        raw_obs, raw_reward, fell, *_ = raw.step(actions.numpy())
        for n in range(40):
            if first_end[n] is None:
                np.testing.assert_allclose(obs[n], raw_obs[n], rtol=1e-6)
                assert (reward[n], terminated[n]) == (pytest.approx(raw_reward[n]), fell[n])
                assert truncated[n] == (t == lengths[n] and not fell[n])
                if terminated[n] or truncated[n]:
                    first_end[n] = t
                    kinds.add("cut" if truncated[n] else "fell when cut" if t == lengths[n] else "fell before")
            elif t == first_end[n] + 1:
                assert (reward[n], terminated[n], truncated[n]) == (0, False, False)
                assert obs[n, 0] == pytest.approx(1.25, abs=0.006) and obs[n, 5:].abs().max() < 0.006, "a new episode"
                kinds |= {"fell in the dummy step"} if fell[n] else set()
            else:
                assert not truncated[n], "only first episodes are cut"
                assert t > first_end[n] + 2 or reward[n] != 0 and obs[n, 0] == pytest.approx(1.25, abs=0.1)
    assert None not in first_end and kinds == {"cut", "fell when cut", "fell before", "fell in the dummy step"}


def test_the_dummy_step_after_a_cut_is_not_logged(monkeypatch):
    import envpool

    envs, *_ = bpo.make_envs(bpo.Args(env_id="HalfCheetah-v4", device="cpu"), 3, 3)
    raw = envpool.make("HalfCheetah-v4", env_type="gymnasium", num_envs=3, seed=3)
    monkeypatch.setattr(torch, "randint", stand_in_for_randint([1, 9, 2]))
    envs.reset(stagger=True), raw.reset()
    for rows in ([0, 1, 2], [1, 2]):
        logs, info = envs.step(torch.ones(3, 6))[-1], raw.step(np.ones((3, 6), np.float32))[-1]
        assert logs["rewards/run"] == pytest.approx(info["reward_run"][rows].mean())
    assert len(set(info["reward_run"])) == 3, "the test could not tell"
    envs.reset()
    assert (envs.step(torch.ones(3, 6))[1] != 0).all(), "no dummy step follows the reset of all"


@pytest.mark.parametrize(
    "task, seen",
    [("Hopper-v4", 1.0), ("H1JoystickGaitTracking-v1", 4.0), ("MuJoCoPlayground/BarkourJoystick-v1", 4.0)],
)
def test_actions_are_clipped_but_for_playgrounds_tasks(task, seen):
    import envpool

    envs, _, _, size = bpo.make_envs(bpo.Args(env_id=task, device="cpu"), 2, 3)
    raws = [envpool.make(task, env_type="gymnasium", num_envs=2, seed=3) for _ in range(2)]
    envs.reset(), [raw.reset() for raw in raws]
    (obs, _), reward, *_ = envs.step(torch.full((2, size), 4.0))
    same, other = (raw.step(np.full((2, size), x)) for raw, x in zip(raws, (seen, 5.0 - seen)))
    np.testing.assert_allclose(obs, same[0], rtol=1e-5)
    np.testing.assert_allclose(reward, same[1])
    assert not (np.allclose(obs, other[0]) and np.allclose(reward, other[1])), "the test could not tell"


MEMORY_CHECK = """
import sys; sys.path.insert(0, {root!r})
import envpool, bpo_locomotion as bpo

def make(*args, num_envs, **options):
    assert num_envs < 10, "this would take all of the machine's memory"
    return original(*args, num_envs=num_envs, **options)

original, envpool.make = envpool.make, make
try:
    bpo.train(bpo.Args(output_dir={out!r}, num_envs=40_000, device="cpu"))
except bpo.BadInput as error:
    print(error)
"""


def test_memory_is_checked_before_making_environments(tmp_path):
    """In a process of its own, as users run it: in this one, what earlier tests left would disturb the measurement."""
    code = MEMORY_CHECK.format(root=str(Path(bpo.__file__).parent), out=str(tmp_path / "out"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    found = re.search(r"need .* GB, but ([\d.]+) GB are free: pass --num-envs (\d+) or less", run.stdout)
    free, fits = map(float, found.groups())
    assert 0.02 < free / fits < 0.1  # a robot takes 40 to 60 MB
    assert not (tmp_path / "out").exists()


def test_limits_of_memory_are_those_of_every_group_above_the_process(tmp_path):
    def group(path, limit, used, **statistics):
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        old = "memory/" in f"{path}/"
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
        for name, x in zip(files, (limit, used)):
            (folder / name).write_text(f"{x}\n")
        (folder / "memory.stat").write_text("".join(f"{name} {x}\n" for name, x in {"anon": 3, **statistics}.items()))

    group("slurm/job", "max", 10, inactive_file=4)
    group("slurm/job/step", 1000, 100, inactive_file=50)
    group("slurm/other", 1, 1, inactive_file=0)
    group("", 500, 300, inactive_file=7)
    group("memory/jobs/one", 2000, 500, inactive_file=9, total_inactive_file=20)
    group("memory", 2**63 - 4096, 700, inactive_file=9, total_inactive_file=30)
    for script in BOTH.values():
        for lines, expected in (
            ("0::/slurm/job/step\n", [950, 207]),
            ("0::/\n", [207]),
            ("5:devices:/jobs\n4:cpu,memory:/jobs/one/there/is/none\n", [1520, 2**63 - 4096 - 670]),
            ("4:cpu:/slurm\n", []),
        ):
            (tmp_path / "groups").write_text(lines)
            assert list(script.free_in_groups(tmp_path / "groups", tmp_path)) == expected


def test_film_is_a_video(tmp_path):
    if bpo.ctypes.util.find_library("EGL") is None and sys.platform == "linux":
        pytest.skip("filming needs EGL")
    code = f"import sys; sys.path.insert(0, {str(Path(bpo.__file__).parent)!r}); import bpo_locomotion as bpo, torch; "
    code += "args = bpo.Args(env_id='Hopper-v4', device='cpu', hidden_sizes=(8,)); torch.manual_seed(0); "
    code += "agent = bpo.Agent(11, 11, 3, args); agent.policy[-1].bias.data.fill_(1.0); "  # falls over soon
    code += f"bpo.film(agent, args, bpo.Path({str(tmp_path)!r}))"
    environment = {name: x for name, x in os.environ.items() if name != "MUJOCO_GL"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    import imageio

    reader = imageio.get_reader(tmp_path / "episode.mp4")
    assert reader.get_meta_data()["fps"] == 25
    frames = [frame for frame in reader]  # noqa: C416 (list() asks its length)
    assert len(frames) > 3 and frames[0].shape == (384, 512, 3)
    assert np.abs(frames[0].astype(float) - frames[-1]).mean() > 0.5 and frames[0].std() > 5  # something moves


# ------------------------------------------------------------------------------------------------ mjlab and Isaac Lab


class ManagerBased:
    """The interface of mjlab and Isaac Lab, played by a stand-in."""

    max_episode_length, episode_length_buf = 1000, torch.zeros(500, dtype=torch.long)
    single_action_space, step_dt = SimpleNamespace(shape=(3,)), 0.05

    def __init__(self, *_, **__):
        print("| table |\n[WARNING] CUDA Graphs disabled: driver 12.2 < 12.4\n| table |")

    def reset(self):
        self.episode_length_buf = torch.zeros(500, dtype=torch.long)
        return {"actor": torch.zeros(500, 5)}, {"log": {"Episode_Reward/alive": torch.tensor(1.0)}}

    def step(self, actions):
        return {"actor": torch.zeros(500, 5)}, torch.ones(500), *torch.zeros(2, 500, dtype=bool), {"log": {}}

    render = close = None


def test_manager_based_simulators_start_episodes_at_random_lengths():
    env = ManagerBased()
    envs = bpo.manager_envs(bpo.Args(env_id="Mjlab-X"), env, "actor")
    assert (envs.obs_size, envs.privileged_size, envs.action_size, envs.next_step, envs.fps) == (5, 5, 3, False, 20)
    _, logs = envs.reset()
    assert (env.episode_length_buf == 0).all() and list(logs) == ["rewards/alive"]
    envs.reset(stagger=True, steps=77)
    assert env.common_step_counter == 77
    assert 0 <= env.episode_length_buf.min() < 100 and 900 < env.episode_length_buf.max() < 1000
    env.reset = lambda: ({"actor": {"camera": torch.zeros(500, 8, 8)}}, {})
    with pytest.raises(bpo.BadInput, match="Mjlab-X has no flat observation"):
        bpo.manager_envs(bpo.Args(env_id="Mjlab-X"), env, "actor")
    groups = dict.fromkeys(("actor", "critic", "camera"), torch.zeros(500, 5))
    env.reset = lambda: (groups, {})
    with pytest.raises(bpo.BadInput, match=r"Mjlab-X has observations that this script cannot use \(camera\)"):
        bpo.manager_envs(bpo.Args(env_id="Mjlab-X"), env, "actor")


@SCRIPTS
def test_mjlabs_warnings_are_shown_and_its_tables_are_not(script, monkeypatch, capsys):
    cfg = SimpleNamespace(scene=SimpleNamespace(), commands={})
    modules = {"mjlab": {}, "mjlab.tasks": {}, "mjlab.envs": {"ManagerBasedRlEnv": ManagerBased}}
    modules["mjlab.tasks.registry"] = {"list_tasks": lambda: ["Mjlab-X"], "load_env_cfg": lambda _: cfg}
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    script.make_envs(script.Args(env_id="Mjlab-X", device="cpu"), 500, 7)
    assert capsys.readouterr() == ("", "[WARNING] CUDA Graphs disabled: driver 12.2 < 12.4\n")
    assert (cfg.scene.num_envs, cfg.seed) == (500, 7)


@SCRIPTS
def test_logs_of_steps_are_kept_and_those_of_episodes_are_nan_where_none_ends(script, tmp_path, monkeypatch):
    """As in mjlab, whose rewards log something in every step, and whose episodes when they end."""
    use(script, monkeypatch, lambda e, k, action: (0.0, 1.0, "terminated" if k == 29 else ""))
    make_envs, count = script.make_envs, itertools.count()

    def make(*args, **options):
        envs, *sizes = make_envs(*args, **options)
        reset, step = envs.reset, envs.step

        def logging_step(actions):
            *results, terminated, truncated, _ = step(actions)
            logs = {"Metrics/slip": next(count)} | ({"rewards/alive": torch.tensor(7.0)} if terminated.any() else {})
            return *results, terminated, truncated, logs

        envs.reset, envs.step = lambda **x: (reset(**x)[0], {"rewards/alive": 0.0}), logging_step
        return envs, *sizes

    monkeypatch.setattr(script, "make_envs", make)
    run_dir = train(script, tmp_path, **SMALL, total_timesteps=4 * 12 * 5)  # episodes end in iterations 3 and 5
    alive, slip = (column(read(run_dir / "metrics.csv"), name) for name in ("rewards/alive", "Metrics/slip"))
    np.testing.assert_array_equal(alive, [NAN, NAN, 7, NAN, 7])
    assert slip.tolist() == [5.5, 17.5, 29.5, 41.5, 53.5]


@pytest.mark.slow
@SCRIPTS
def test_mjlab_tasks_that_cannot_be_trained_are_one_line(script, tmp_path):
    pytest.importorskip("mjlab")
    with pytest.raises(script.BadInput, match="follows a recorded motion, which this script cannot load"):
        train(script, tmp_path / "out", env_id="Mjlab-Tracking-Flat-Unitree-G1", num_envs=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@SCRIPTS
def test_mjlab_cartpole_learns_to_balance(script, tmp_path):
    pytest.importorskip("mjlab")
    settings = SMALL | dict(env_id="Mjlab-Cartpole-Balance", num_envs=256, num_steps=24, init_std=1.0)
    run_dir = train(script, tmp_path, **settings | dict(hidden_sizes=(64, 64), total_timesteps=200_000))
    rows = read(run_dir / "metrics.csv")
    assert rows[-1]["rewards/smooth_reward"] > 2 * rows[5]["rewards/smooth_reward"] > 0


# ----------------------------------------------------------------------------------------------------------- resuming


def comparable(rows):
    """Without what a clock says."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "charts/SPS"))} for row in rows]


@SCRIPTS
def test_resumed_run_equals_an_unbroken_one(script, tmp_path, monkeypatch):
    """Episodes of one step, so that simulators which start anew change nothing: every later row must be the same."""
    resets = use(script, monkeypatch, lambda e, k, action: (0.0, -((action - 0.5) ** 2), "terminated"))
    settings = SMALL | dict(total_timesteps=500, update_epochs=2, norm_obs=True, checkpoint_interval=2)
    unbroken = train(script, tmp_path / "unbroken", **settings)
    calls, gradient = [], script.minibatch_gradient

    def stop_in_the_fourth_iteration(*args):
        calls.append(1)
        if len(calls) == 3 * 8 + 1:
            script.STOP.append(signal.SIGTERM)
        return gradient(*args)

    monkeypatch.setattr(script, "minibatch_gradient", stop_in_the_fourth_iteration)
    with pytest.raises(SystemExit, match="stopped at step 192; go on with: python .* --resume"):
        train(script, tmp_path / "broken", **settings)
    script.STOP.clear()
    (run_dir,) = (tmp_path / "broken").iterdir()
    assert not (run_dir / "agent.pt").exists() and torch.load(run_dir / "checkpoint.pt")["step"] == 192
    with (run_dir / "metrics.csv").open("a") as metrics, (run_dir / "episodes.csv").open("a") as episodes:
        metrics.write("197" + ",1" * (run_dir / "metrics.csv").read_text().split("\n")[0].count(",") + "\n191,0.5")
        episodes.write("195,7,7\n191,7,3")
    for purpose in ("resume", "evaluate"):
        with pytest.raises(script.BadInput, match="leave out --gamma"):
            script.main(script.Args(**{purpose: str(run_dir)}, gamma=0.5))
    assert script.train(script.Args(resume=str(run_dir))) == str(run_dir)
    for file in ("metrics.csv", "episodes.csv"):
        resumed, whole = read(run_dir / file), read(unbroken / file)
        assert comparable(resumed) == comparable(whole) and len(whole) > 9
    ours, theirs = (torch.load(x / "checkpoint.pt") for x in (run_dir, unbroken))
    assert all(torch.equal(x, theirs["agent"][name]) for name, x in ours["agent"].items())
    assert torch.equal(ours["rng_state"], theirs["rng_state"])
    # Each start has random numbers of its own; that of a resumed run also knows how far its curriculum is.
    assert resets == [(2 * 4, 2 * 4, 0)] * 2 + [(2 * 4 + 192, 2 * 4 + 192, 192 / 4)]


@SCRIPTS
def test_seeds_share_no_simulator(script, tmp_path, monkeypatch):
    """EnvPool gives environment i the seed `seed + i`."""
    resets = use(script, monkeypatch, lambda e, k, action: (0.0, 1.0, "terminated"))
    for seed in (0, 1, 2):
        train(script, tmp_path / str(seed), **SMALL, total_timesteps=20, seed=seed)
    streams = [set(range(first, first + SMALL["num_envs"])) for first, *_ in resets]
    assert len(set.union(*streams)) == 3 * SMALL["num_envs"]


@SCRIPTS
def test_standard_deviation_has_a_floor_and_leaves_it_again(script, tmp_path, monkeypatch):
    use(script, monkeypatch, lambda e, k, action: (0.0, 1.0, "terminated"))
    seen, gradient = [], script.minibatch_gradient

    def downwards_then_upwards(agent, *rest):
        seen.append(agent.std.item())
        flat, stats, names = gradient(agent, *rest)
        return torch.full_like(flat, 1.0 if len(seen) < 20 else -1.0), stats, names

    monkeypatch.setattr(script, "minibatch_gradient", downwards_then_upwards)
    settings = SMALL | dict(total_timesteps=1000, update_epochs=2, init_std=0.1, norm_obs=False)
    train(script, tmp_path, **settings, lr_schedule="constant", learning_rate=0.01)
    assert min(seen) == pytest.approx(0.01) and seen[0] == pytest.approx(0.1) and seen[-1] > 0.02


def test_a_signal_ends_a_real_process_with_a_checkpoint(tmp_path):
    settings = ["--env-id", "Hopper-v4", "--device", "cpu", "--num-envs", "4", "--hidden-sizes", "16"]
    command = [sys.executable, bpo.__file__, *settings, "--output-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not any(x.stat().st_size for x in tmp_path.glob("*/metrics.csv")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    (run_dir,) = tmp_path.iterdir()
    assert process.returncode == 1 and len(err.splitlines()) == 1 and "stopped at step" in err, err
    step = torch.load(run_dir / "checkpoint.pt")["step"]
    assert read(run_dir / "metrics.csv")[-1]["step"] == step > 0


@SCRIPTS
def test_same_seed_same_run_and_saved_agent_evaluates_the_same(script, tmp_path, capsys):
    runs = [train(script, tmp_path / str(i), **HOPPER, seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, same, other = ((run_dir / "episodes.csv").read_bytes() for run_dir in runs)
    assert first == same != other and first.count(b"\n") > 5
    trained = json.loads((runs[0] / "evaluation.json").read_text())
    capsys.readouterr()
    torch.set_float32_matmul_precision("highest")  # as in a new process
    script.main(script.Args(evaluate=str(runs[0]), eval_episodes=2, seed=3))
    assert capsys.readouterr().out.count("over 2 episodes") == 2
    again = json.loads((runs[0] / "evaluation.json").read_text())
    assert again["deterministic"] == trained["deterministic"] and len(again["stochastic"]["returns"]) == 2
    assert torch.get_float32_matmul_precision() == script.Args().matmul_precision


# ------------------------------------------------------------------------------------------------------ broken numbers


@SCRIPTS
def test_nan_stops_the_run_names_its_source_and_keeps_the_checkpoint(script, tmp_path, monkeypatch):
    use(script, monkeypatch, lambda e, k, action: (0.0, math.nan if e > 30 else 1.0, "terminated"))
    with pytest.raises(SystemExit, match="error: .* returned a reward that is not finite, step .*--resume"):
        train(script, tmp_path / "reward", **SMALL, checkpoint_interval=1)
    use(script, monkeypatch, lambda e, k, action: (math.nan if e > 30 else 0.0, 1.0, "terminated"))
    with pytest.raises(SystemExit, match="error: .* returned a observation that is not finite"):
        train(script, tmp_path / "obs", **SMALL, checkpoint_interval=1)
    use(script, monkeypatch, lambda e, k, action: (0.0, 1.0, "terminated"))
    monkeypatch.setattr(script, "policy_loss", lambda ratio, *_: ratio * math.nan)
    with pytest.raises(SystemExit, match="error: losses/policy_loss is nan at step .*--resume"):
        train(script, tmp_path / "loss", **SMALL)
    for name, step in (("reward", 96), ("obs", 96), ("loss", 0)):
        (run_dir,) = (tmp_path / name).iterdir()
        checkpoint = torch.load(run_dir / "checkpoint.pt")
        assert checkpoint["step"] == step and all(x.isfinite().all() for x in checkpoint["agent"].values())


# ---------------------------------------------------------------------------------------------------------- bad input

BAD = [
    ({"env_id": "Go2JoystickRoughTerrain-v1"}, "EnvPool has no task .* did you mean Go1JoystickRoughTerrain-v1"),
    ({"env_id": "CartPole-v1"}, "has no flat Box action"),
    ({"env_id": "Pong-v5"}, "has no flat Box observation"),
    ({"env_id": "Isaac-Velocity-Rough-G1-v0"}, "Isaac Lab is not installed"),
    ({"num_envs": 5, "num_steps": 5}, "25 samples do not divide into --num-minibatches 4"),
    ({"num_envs": 1, "num_steps": 4}, "4 samples do not divide into --num-minibatches 4 of 2 or more"),
    ({"hidden_sizes": ()}, "--hidden-sizes must be"),
    ({"num_steps": 1}, "--num-steps must be"),
    ({"init_std": 0.0}, "--init-std must be"),
    ({"clip_coef": 1.5}, "--clip-coef must be"),
    ({"gamma": NAN}, "--gamma must be"),
    ({"desired_kl": 0.0}, "--desired-kl must be"),
    ({"ent_coef": -1.0}, "--ent-coef must be"),
]


@pytest.mark.parametrize(
    "script, settings, words",
    [(script, *case) for script in (bpo, ppo) for case in BAD] + [(bpo, {"temperature": NAN}, "--temperature must be")],
    ids=lambda x: getattr(x, "SCRIPT", "")[:3] or str(x),
)
def test_bad_settings_are_one_line_before_anything_is_created(script, settings, words, tmp_path):
    with pytest.raises(script.BadInput, match=words) as error:
        train(script, tmp_path / "out", **{"device": "cpu", **settings})
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@SCRIPTS
def test_a_simulator_that_is_not_installed_is_named_with_its_command(script, monkeypatch, tmp_path):
    for module, env_id, words in (
        ("envpool", "Go1JoystickRoughTerrain-v1", "EnvPool is not installed: pip install -r requirements.txt"),
        ("mjlab", "Mjlab-Cartpole-Balance", "mjlab is not installed .*pip install -r requirements-mjlab.txt"),
    ):
        monkeypatch.setitem(sys.modules, module, None)  # import then raises ImportError
        monkeypatch.setitem(sys.modules, f"{module}.tasks", None)
        with pytest.raises(script.BadInput, match=words):
            train(script, tmp_path / "out", env_id=env_id)
    assert not (tmp_path / "out").exists()


@SCRIPTS
def test_a_gpu_where_there_is_none(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(script.BadInput, match="--device cuda needs a GPU"):
        train(script, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists() and script.find_device(script.Args()).type == "cpu"


@SCRIPTS
def test_bad_input_on_the_command_line(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.__file__, "--num-envs", "5", "--num-minibatches", "7"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: num_envs * num_steps = 120 samples")
    assert not list(tmp_path.iterdir())


def edit(path, **settings):
    about = json.loads(path.read_text())
    about["args"] |= settings
    path.write_text(json.dumps(about))


DAMAGES = {
    "missing folder": lambda run: shutil.rmtree(run),
    "no checkpoint": lambda run: [x.unlink() for x in run.glob("*.pt")],
    "truncated checkpoint": lambda run: [x.write_bytes(x.read_bytes()[:500]) for x in run.glob("*.pt")],
    "half args.json": lambda run: (run / "args.json").write_text((run / "args.json").read_text()[:99]),
    "unknown setting": lambda run: edit(run / "args.json", no_such_setting=1),
    "wrong type": lambda run: edit(run / "args.json", hidden_sizes=7),
    "other task": lambda run: edit(run / "args.json", env_id="Ant-v4"),
    "other size": lambda run: edit(run / "args.json", hidden_sizes=[32]),
}


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {script: train(script, folder, **HOPPER | dict(total_timesteps=40)) for script in BOTH.values()}


@SCRIPTS
@pytest.mark.parametrize("purpose", ["resume", "evaluate"])
@pytest.mark.parametrize("damage", [*DAMAGES, "sibling's run"])
def test_unusable_run_is_one_line(script, purpose, damage, tiny_runs, tmp_path):
    run_dir = shutil.copytree(
        tiny_runs[{bpo: ppo, ppo: bpo}[script] if "sibling" in damage else script], tmp_path / "run"
    )
    DAMAGES.get(damage, lambda run: None)(run_dir)
    before = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")}
    with pytest.raises(script.BadInput) as error:
        script.main(script.Args(**{purpose: str(run_dir)}))
    assert "\n" not in str(error.value) and not any(x in str(error.value) for x in ("leave out", "BadInput"))
    assert {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")} == before


@SCRIPTS
def test_a_run_of_another_device_can_be_evaluated_but_not_resumed(script, tiny_runs, tmp_path):
    run_dir = shutil.copytree(tiny_runs[script], tmp_path / "run")
    edit(run_dir / "args.json", device="cuda")
    torch.save(torch.load(run_dir / "checkpoint.pt") | {"device": "cuda"}, run_dir / "checkpoint.pt")
    with pytest.raises(script.BadInput, match="was trained on cuda: it can be resumed there only"):
        script.main(script.Args(resume=str(run_dir), device="cpu"))
    (run_dir / "evaluation.json").unlink()
    script.main(script.Args(evaluate=str(run_dir), device="cpu", eval_episodes=1))
    assert (run_dir / "evaluation.json").exists()
    with pytest.raises(script.BadInput, match="--device cuda needs a GPU"):
        script.main(script.Args(evaluate=str(run_dir), device="cuda"))


@SCRIPTS
def test_a_run_that_goes_on_is_not_complete(script, tiny_runs, tmp_path, monkeypatch):
    run_dir = shutil.copytree(tiny_runs[script], tmp_path / "run")
    edit(run_dir / "args.json", total_timesteps=10**6)
    gradient = script.minibatch_gradient
    monkeypatch.setattr(script, "minibatch_gradient", lambda *args: script.STOP.append(1) or gradient(*args))
    with pytest.raises(SystemExit, match="stopped at step"):
        script.train(script.Args(resume=str(run_dir)))
    assert not any((run_dir / name).exists() for name in ("agent.pt", "evaluation.json"))


@SCRIPTS
def test_a_run_of_the_cpu_goes_on_there_though_there_is_a_gpu(script, tiny_runs, tmp_path, monkeypatch):
    run_dir = shutil.copytree(tiny_runs[script], tmp_path / "run")
    (run_dir / "evaluation.json").unlink()  # as if it had been killed before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script.find_device(script.Args()).type == "cuda"
    assert script.train(script.Args(resume=str(run_dir))) == str(run_dir)
