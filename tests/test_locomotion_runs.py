"""Real runs of bpo_locomotion.py and ppo_locomotion.py: both kinds of reset, simulators, logs, resuming, bad input."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import bpo_locomotion as bpo
import ppo_locomotion as ppo

SCRIPTS = pytest.mark.parametrize("script", [bpo, ppo], ids=["bpo", "ppo"])
SMALL = dict(device="cpu", num_envs=4, num_steps=12, hidden_sizes=(16,), checkpoint_seconds=0)
NAN = math.nan
GO1 = SMALL | dict(env_id="Go1JoystickRoughTerrain-v1", total_timesteps=90)
close = np.testing.assert_allclose


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


# --- a simulator of whatever a test needs


def simulator(num_envs, episode, next_step):
    """See make_envs for its interface. episode(e, k, action) gives step k (from 0) of an environment's e-th episode:
    the observation before it, its reward, and how it ends: "terminated", "truncated", both or "". The true last
    observation is 1000."""
    at = [[0, 0] for _ in range(num_envs)]  # episode, step
    dummy = [False] * num_envs

    def observe(done, rewards):
        seen = [1000.0 if n in done else episode(*at[n], 0.0)[0] for n in range(num_envs)]
        obs = torch.tensor(seen)[:, None]
        return obs, {"privileged": obs + 0.5, "logs": {"rewards/pay": torch.tensor(rewards).mean()}}

    def step(actions):
        rewards, ends, done = [0.0] * num_envs, [""] * num_envs, set()
        for n in range(num_envs):
            if dummy[n]:
                dummy[n], rewards[n] = False, 1e6  # a dummy's reward, which some simulators pay, counts nowhere
                continue
            _, rewards[n], ends[n] = episode(*at[n], actions[n, 0].item())
            at[n] = [at[n][0] + 1, 0] if ends[n] else [at[n][0], at[n][1] + 1]
            if ends[n] and next_step:
                dummy[n] = True
                done.add(n)
        terminated, truncated = (torch.tensor([name in x for x in ends]) for name in ("terminated", "truncated"))
        obs, info = observe(done, rewards)
        return obs, torch.tensor(rewards), terminated, truncated, info

    calls = dict(reset=lambda **_: observe((), [0.0]), step=step, close=lambda: None)
    return SimpleNamespace(**calls, next_step=next_step, privileged_size=1)


def use(script, monkeypatch, episode, next_step=False):
    """Lets the script train on such episodes. The list that this returns receives each simulator's key and the steps
    made before."""
    starts, space = [], gym.spaces.Box(-np.inf, np.inf, (1,))

    def make_envs(args, num_envs, key, render=False):
        envs = simulator(num_envs, episode, next_step)
        reset = envs.reset
        envs.reset = lambda stagger, steps: starts.append((key, steps)) or reset()
        return envs, space, space

    monkeypatch.setattr(script, "make_envs", make_envs)
    return starts


def one_step(e, k, action):
    return 0.0, -((action - 0.5) ** 2), "terminated"


LENGTHS = (1, 4, 2, 7)


def marked(e, k, action):
    """Shows its step, pays 3, 4, 5, ...; lengths go 1, 4, 2, 7, 1, ...; it ends, is cut by a time limit, or both."""
    last = k + 1 == LENGTHS[e % 4]
    return k + 1.0, 3.0 + k, ("truncated", "terminated", "terminated, truncated")[e % 3] if last else ""


@SCRIPTS
@pytest.mark.parametrize("next_step", [True, False], ids=["next-step", "same-step"])
def test_dummy_rows_reach_nothing_and_cut_first_episodes_are_none(script, next_step, tmp_path, monkeypatch):
    use(script, monkeypatch, marked, next_step)
    samples, gradient = [], script.minibatch_gradient
    monkeypatch.setattr(script, "minibatch_gradient", lambda *args: samples.append(args[1]) or gradient(*args))
    settings = SMALL | dict(num_envs=3, num_minibatches=3, update_epochs=2, total_timesteps=80)
    run_dir = train(script, tmp_path, **settings)
    rows, episodes = [], []  # one environment's rows, None for a dummy; all three are alike
    for e in range(40):
        rows += [marked(e, k, 0.0) for k in range(LENGTHS[e % 4])]
        episodes.append((sum(3.0 + k for k in range(LENGTHS[e % 4])), LENGTHS[e % 4], len(rows)))
        rows += [None] * next_step
    metrics = read(run_dir / "metrics.csv")
    played = rows[: 12 * len(metrics)]
    real = np.array([row[0] for row in played if row is not None])
    assert metrics[-1]["step"] == 3 * len(real) >= 80
    finished = [(total, length) for total, length, end in episodes[1:] if end <= len(played)]
    found = [(row["return"], row["length"]) for row in read(run_dir / "episodes.csv")]
    assert found == [episode for episode in finished for _ in range(3)]
    state = torch.load(run_dir / "checkpoint.pt")["agent"]
    for stats, shift in (("obs_stats", 0.0), ("privileged_stats", 0.5)):
        assert state[f"{stats}.count"] == 3 * len(real)
        assert state[f"{stats}.mean"].item() == pytest.approx(real.mean() + shift)
    assert all(x["obs"].max() <= 7 and x["returns"].max() < 100 for x in samples)


@SCRIPTS
def test_policy_moves_to_the_best_action(script, tmp_path, monkeypatch):
    use(script, monkeypatch, one_step)
    settings = SMALL | dict(num_envs=16, init_std=1.0, total_timesteps=12_000, checkpoint_seconds=30)
    run_dir = train(script, tmp_path, **settings)
    args, saved = script.load_run(run_dir, "agent.pt")
    agent = script.Agent(1, 1, [-np.inf], [np.inf], args)
    agent.load_state_dict(saved["agent"])
    assert agent(agent.normalize(torch.zeros(1, 1))).mode.item() == pytest.approx(0.5, abs=0.15)
    rows = read(run_dir / "metrics.csv")
    assert rows[-1]["charts/std"] < 0.9 and len(set(column(rows, "charts/learning_rate"))) > 3


@SCRIPTS
def test_a_rollout_with_one_sample_counts(script, tmp_path, monkeypatch):
    """Of its two rows one is a dummy."""
    use(script, monkeypatch, one_step, next_step=True)
    settings = SMALL | dict(num_envs=1, num_steps=2, num_minibatches=1, total_timesteps=5)
    rows = read(train(script, tmp_path, **settings) / "metrics.csv")
    assert column(rows, "step").tolist() == [1, 2, 3, 4, 5]
    assert all(math.isfinite(x) for x in rows[-1].values())


@SCRIPTS
def test_linear_schedule_falls_to_zero_with_the_steps(script, tmp_path, monkeypatch):
    use(script, monkeypatch, one_step)
    settings = SMALL | dict(lr_schedule="linear", learning_rate=0.01, total_timesteps=192, update_epochs=1)
    rates = column(read(train(script, tmp_path, **settings) / "metrics.csv"), "charts/learning_rate")
    assert rates.tolist() == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


@SCRIPTS
def test_logs_of_steps_are_kept_and_those_of_episodes_are_nan_where_none_ends(script, tmp_path, monkeypatch, capsys):
    """As in mjlab, whose rewards log something in every step, and whose episodes when they end."""
    use(script, monkeypatch, lambda e, k, action: (0.0, 1.0, "terminated" if k == 29 else ""))
    make_envs, count = script.make_envs, itertools.count()

    def make(*args, **options):
        envs, *spaces = make_envs(*args, **options)
        step = envs.step

        def logging_step(actions):
            *results, info = step(actions)
            info["logs"] = {"Metrics/slip": next(count)}
            if results[2].any():
                info["logs"] |= {"rewards/pay": torch.tensor(7.0), "Metrics/new": 1.0}
            return *results, info

        reset, envs.step = envs.reset, logging_step

        def first(**options):
            obs, info = reset(**options)
            return obs, info | {"logs": {"rewards/pay": 0.0, "Metrics/slip": 0.0}}

        envs.reset = first
        return envs, *spaces

    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    monkeypatch.setattr(script, "make_envs", make)
    rows = read(train(script, tmp_path, **SMALL, total_timesteps=4 * 12 * 5) / "metrics.csv")  # ends in 3 and 5
    np.testing.assert_array_equal(column(rows, "rewards/pay"), [NAN, NAN, 7, NAN, 7])
    assert column(rows, "Metrics/slip").tolist() == [5.5, 17.5, 29.5, 41.5, 53.5] and "Metrics/new" not in rows[0]
    live = capsys.readouterr().out.split("\r")[-2]
    assert live.startswith("step 240, ") and "pay" not in live and len(live) < 80  # it must not wrap


@pytest.mark.slow
def test_a_compiled_run_equals_a_plain_one(tmp_path, monkeypatch):
    use(bpo, monkeypatch, one_step)
    settings = SMALL | dict(total_timesteps=96, update_epochs=2)
    folders = [train(bpo, tmp_path / str(x), **settings, compile=x) for x in (False, True)]
    for row, other in zip(*(read(x / "metrics.csv") for x in folders), strict=True):
        names = [x for x in row if x.startswith(("losses/", "charts/l"))]
        assert [row[x] for x in names] == pytest.approx([other[x] for x in names], rel=1e-3, abs=1e-5)


# --- EnvPool


@SCRIPTS
def test_a_run_on_a_robot_is_complete(script, tmp_path):
    run_dir = train(script, tmp_path, **GO1)
    rows = read(run_dir / "metrics.csv")
    page = (Path(script.__file__).parent / "docs" / "bpo_locomotion.md").read_text()
    names = [x for x in rows[0] if not x.startswith("rewards/")]
    assert len(names) > 18 and not [x for x in names if f"`{x}`" not in page and x != "step"]
    assert {"rewards/tracking_lin_vel", "rewards/feet_slip", "rewards/orientation"} <= set(rows[0])
    finite = [name for name in rows[0] if not name.startswith("charts/mean_")]
    assert all(math.isfinite(row[name]) for row in rows for name in finite)
    assert 0 < rows[-1]["rewards/tracking_lin_vel"] <= 1 and rows[-1]["step"] >= 90
    agent = torch.load(run_dir / "agent.pt")["agent"]
    assert agent["policy.0.weight"].shape == (16, 48) and agent["value.0.weight"].shape == (16, 123)
    about = json.loads((run_dir / "args.json").read_text())
    assert {"torch", "envpool"} <= set(about["versions"])


@SCRIPTS
@pytest.mark.parametrize("bf16, most", [(False, 1e-9), (True, 1e-6)], ids=["float32", "bfloat16"])
def test_the_update_starts_from_the_policy_that_acted(script, bf16, most, tmp_path):
    """With one gradient step per iteration nothing has moved when the divergence from the rollout's means is taken."""
    settings = GO1 | dict(num_minibatches=1, update_epochs=1, bf16=bf16, learning_rate=0.01, lr_schedule="constant")
    settings |= dict(matmul_precision="highest")  # "medium" is bfloat16 on processors with AMX
    rows = read(train(script, tmp_path, **settings) / "metrics.csv")
    assert len(rows) > 1 and rows[0]["ratio/high_std"] > 1e-3  # the step itself does move it
    assert np.abs(column(rows, "losses/kl")).max() < most and np.abs(column(rows, "losses/approx_kl")).max() < most


def make_envs(task, num_envs, key=3, **options):
    return bpo.make_envs(bpo.Args(env_id=task, device="cpu"), num_envs, key, **options)


def make_raw(task, num_envs, key=3):
    import envpool

    seeds = (np.random.SeedSequence(key).generate_state(num_envs) & 0x7FFFFFFF).tolist()
    return envpool.make(task, env_type="gymnasium", num_envs=num_envs, seed=seeds)


def test_logged_rewards_are_means_over_real_steps():
    """Against EnvPool itself, across resets, whose dummy steps must not count."""
    envs, obs_space, action_space = make_envs(GO1["env_id"], 6)
    raw = make_raw(GO1["env_id"], 6)
    (obs, info), (state, _) = envs.reset(), raw.reset()
    assert (obs_space.shape, envs.privileged_size, action_space.shape) == ((48,), 123, (12,))
    assert obs.dtype == torch.float32
    close(info["privileged"], state["privileged_state"], rtol=1e-6)
    torch.manual_seed(0)
    mixed, names = 0, info["logs"].keys()
    for _ in range(80):
        actions = 3 * torch.randn(6, 12)
        obs, reward, terminated, truncated, info = envs.step(actions)
        state, raw_reward, *ends, raw_info = raw.step(actions.numpy().astype(np.float64))  # not clipped
        close(obs, state["state"], rtol=1e-6)
        close(reward, raw_reward)
        np.testing.assert_array_equal(terminated | truncated, ends[0] | ends[1])
        real = raw_info["elapsed_step"] > 0
        mixed += real.any() and not real.all()
        if real.any():
            assert info["logs"].keys() == names and len(names) > 10
            assert info["logs"]["rewards/pose"] == pytest.approx(raw_info["reward_pose"][real].mean())
    assert mixed > 0, "some robots must be reset while others walk"


def test_envpools_first_episodes_end_at_random_lengths():
    """Pendulum's episodes end at their time limit alone, of 200 steps."""
    envs, *_ = make_envs("Pendulum-v1", 60)
    for stagger in (False, True):
        envs.reset(stagger=stagger)
        truncated = torch.stack([envs.step(torch.zeros(60, 1))[3] for _ in range(402)])
        ends = [x.nonzero().flatten().tolist() for x in truncated.T]
        if stagger:
            first = np.array([x[0] + 1 for x in ends])
            assert len(set(first.tolist())) > 40 and first.min() < 20 and 180 < first.max() < 200
            assert all(x[1] - x[0] == 201 for x in ends), "later episodes are whole, after a dummy step"
        else:
            assert ends == [[199, 400]] * 60


def test_an_episode_that_is_cut_is_followed_by_a_dummy_step_and_a_new_one():
    """Against EnvPool itself on Hopper, some of which fall before they are cut, when they are, or in the dummy step."""
    envs, raw = make_envs("Hopper-v4", 40)[0], make_raw("Hopper-v4", 40)
    lengths = [n % 20 + 10 for n in range(40)]
    envs.rng = SimpleNamespace(integers=lambda low, high, size: np.array(lengths))
    envs.reset(stagger=True), raw.reset()
    generator, kinds, first_end = torch.Generator().manual_seed(0), set(), [None] * 40
    for t in range(1, 60):
        actions = torch.randn(40, 3, generator=generator).clamp(-1, 1)
        obs, reward, terminated, truncated, _ = envs.step(actions)
        raw_obs, raw_reward, fell, *_ = raw.step(actions.numpy())
        for n in range(40):
            if first_end[n] is None:
                close(obs[n], raw_obs[n], rtol=1e-6)
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


def test_the_dummy_step_after_a_cut_is_not_logged():
    envs, raw = make_envs("HalfCheetah-v4", 3)[0], make_raw("HalfCheetah-v4", 3)
    envs.rng = SimpleNamespace(integers=lambda *_: np.array([1, 9, 2]))
    envs.reset(stagger=True), raw.reset()
    for rows in ([0, 1, 2], [1, 2]):
        logs, info = envs.step(torch.ones(3, 6))[-1]["logs"], raw.step(np.ones((3, 6)))[-1]
        assert logs["rewards/run"] == pytest.approx(info["reward_run"][rows].mean())
    assert len(set(info["reward_run"])) == 3, "the test could not tell"
    envs.reset()
    assert (envs.step(torch.ones(3, 6))[1] != 0).all(), "no dummy step follows the reset of all"


@SCRIPTS
def test_cut_episodes_do_not_count_as_episodes(script, tmp_path):
    settings = SMALL | dict(env_id="Pendulum-v1", num_steps=60, update_epochs=1, total_timesteps=1600)
    run_dir = train(script, tmp_path, **settings)
    rows = read(run_dir / "episodes.csv")
    assert len(rows) >= 4 and set(column(rows, "length")) == {200}
    assert read(run_dir / "metrics.csv")[-1]["charts/mean_length_100"] == 200


@pytest.mark.parametrize(
    "task, seen",
    [("Hopper-v4", 1.0), ("H1JoystickGaitTracking-v1", 4.0), ("MuJoCoPlayground/BarkourJoystick-v1", 4.0)],
)
def test_actions_are_clipped_but_for_playgrounds_tasks(task, seen):
    envs, obs_space, space = make_envs(task, 2)
    agent = bpo.Agent(*obs_space.shape, envs.privileged_size, space.low, space.high, bpo.Args())
    raws = [make_raw(task, 2) for _ in range(2)]
    envs.reset(), [raw.reset() for raw in raws]
    obs, reward, *_ = envs.step(agent.to_env(torch.full((2, *space.shape), 4.0)))
    same, other = (raw.step(np.full((2, *space.shape), x)) for raw, x in zip(raws, (seen, 5.0 - seen)))
    states = [x[0]["state"] if isinstance(x[0], dict) else x[0] for x in (same, other)]
    close(obs, states[0], rtol=1e-5)
    close(reward, same[1])
    assert not (np.allclose(obs, states[1]) and np.allclose(reward, other[1])), "the test could not tell"


@SCRIPTS
def test_neighbouring_seeds_and_parts_of_a_run_share_no_simulator(script):
    args, starts = script.Args(env_id="Hopper-v4", device="cpu"), []
    for key in ([1, 0], [2, 0], [1, 512], [1, 0]):
        envs, *_ = script.make_envs(args, 4, key)
        starts.append(envs.reset()[0])
    assert len(np.unique(np.concatenate(starts), axis=0)) == 12
    assert torch.equal(starts[0], starts[3])


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
    def group(path, limit, used, cache):
        folder = tmp_path / "groups" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, x in (("max", limit), ("current", used), ("stat", f"anon 3\ninactive_file {cache}")):
            (folder / f"memory.{name}").write_text(f"{x}\n")

    group("slurm/job", "max", 10, 4)
    group("slurm/job/step", 1000, 100, 50)
    group("slurm/other", 1, 1, 0)
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:    2 kB\n")
    for lines, parent, expected in (
        ("0::/slurm/job/step\n", None, 950),
        ("5:devices:/jobs\n0::/slurm/job/step\n", (500, 300, 7), 207),
        ("0::/\n", (5000, 300, 7), 2048),
        ("4:cpu,memory:/slurm/other\n", None, 2048),
    ):
        if parent:
            group("", *parent)
        (tmp_path / "self" / "cgroup").write_text(lines)
        for script in (bpo, ppo):
            assert script.free_memory(tmp_path, tmp_path / "groups") == expected


def test_robots_are_drawn(tmp_path):
    if sys.platform == "linux" and find_library("EGL") is None:
        pytest.skip("drawing needs EGL")
    code = f"import sys; sys.path.insert(0, {str(Path(bpo.__file__).parent)!r}); import bpo_locomotion as bpo, torch; "
    code += "envs, _, _ = bpo.make_envs(bpo.Args(env_id='Hopper-v4', device='cpu'), 1, 0, render=True); envs.reset(); "
    code += "pictures = []\nfor _ in range(30): envs.step(torch.ones(1, 3)); pictures.append(envs.render())\n"
    code += "first, last = pictures[0], pictures[-1]; moved = abs(1.0 * first - last).mean(); "
    code += "print(first.shape, first.std() > 5, moved > 0.5)"
    environment = {"MUJOCO_GL": "egl"} | os.environ
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0 and run.stdout.endswith("(384, 512, 3) True True\n"), run.stderr


# --- mjlab and Isaac Lab


class ManagerBasedStandIn:
    """The interface of mjlab and Isaac Lab, whose buffers it overwrites in every step, as they do."""

    max_episode_length, episode_length_buf = 1000, torch.zeros(500, dtype=torch.long)
    single_action_space, step_dt = SimpleNamespace(shape=(3,)), 0.05

    def __init__(self, *_, **__):
        print("| table |\n[WARNING] CUDA Graphs disabled: driver 12.2 < 12.4\n| table |")
        self.buffers, self.steps = [torch.zeros(500, 5), torch.zeros(500), *torch.zeros(2, 500, dtype=bool)], 0

    def reset(self):
        self.episode_length_buf = torch.zeros(500, dtype=torch.long)
        return {"actor": self.buffers[0]}, {"log": {"Episode_Reward/alive": torch.tensor(1.0)}}

    def step(self, actions):
        obs, rewards, terminated, truncated = self.buffers
        self.steps += 1
        obs += 1
        rewards += 1
        terminated[:] = self.steps == 2
        return {"actor": obs}, rewards, terminated, truncated, {"log": {}}

    render = close = None


def test_manager_based_simulators_start_episodes_at_random_lengths():
    args, env = bpo.Args(env_id="Mjlab-X"), ManagerBasedStandIn()
    envs = bpo.ManagerBased(args, env, "actor")
    assert (envs.obs_space.shape, envs.privileged_size, envs.action_space.shape) == ((5,), 5, (3,))
    assert (envs.next_step, envs.fps) == (False, 20)
    _, info = envs.reset()
    assert (env.episode_length_buf == 0).all() and list(info["logs"]) == ["rewards/alive"]
    envs.reset(stagger=True, steps=77)
    assert env.common_step_counter == 77
    assert 0 < env.episode_length_buf.min() < 100 and 900 < env.episode_length_buf.max() < 1000
    env.reset = lambda: ({"actor": {"camera": torch.zeros(500, 8, 8)}}, {})
    with pytest.raises(bpo.BadInput, match="Mjlab-X has no flat observation"):
        bpo.ManagerBased(args, env, "actor")
    env.reset = lambda: (dict.fromkeys(("actor", "critic", "camera"), torch.zeros(500, 5)), {})
    with pytest.raises(bpo.BadInput, match=r"Mjlab-X has observations that this script cannot use \(camera\)"):
        bpo.ManagerBased(args, env, "actor")


@SCRIPTS
def test_rollouts_keep_what_a_simulator_overwrites(script, tmp_path, monkeypatch, capsys):
    """mjlab's warnings are shown, its tables are not; its one seed is of the key."""
    cfg, rollouts, prepare = SimpleNamespace(scene=SimpleNamespace(), commands={}), [], script.prepare
    modules = {"mjlab": {}, "mjlab.tasks": {}, "mjlab.envs": {"ManagerBasedRlEnv": ManagerBasedStandIn}}
    modules["mjlab.tasks.registry"] = {"list_tasks": lambda: ["Mjlab-X"], "load_env_cfg": lambda _: cfg}
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    monkeypatch.setattr(script, "prepare", lambda *args: rollouts.append(args[1]) or prepare(*args))
    monkeypatch.setattr(ManagerBasedStandIn, "close", lambda self: None)
    monkeypatch.setattr(script, "version", lambda name: "of a package that is not installed")
    sizes = dict(num_envs=500, num_steps=4, update_epochs=1, total_timesteps=2000)
    train(script, tmp_path, **SMALL | sizes, env_id="Mjlab-X")
    (rollout,) = rollouts
    assert rollout["obs"][:, 0, 0].tolist() == [0, 1, 2, 3] and rollout["privileged"][:, 0, 0].tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert rollout["rewards"][:, 0].tolist() == [1, 2, 3, 4]
    assert rollout["terminated"][:, 0].tolist() == [False, True, False, False]

    out, err = capsys.readouterr()
    assert "table" not in out and err == "[WARNING] CUDA Graphs disabled: driver 12.2 < 12.4\n"
    assert cfg.scene.num_envs == 500 and cfg.seed == np.random.SeedSequence([1, 0]).generate_state(500)[0] & 0x7FFFFFFF


@pytest.mark.slow
@SCRIPTS
def test_mjlab_cartpole_learns_to_balance(script, tmp_path):
    pytest.importorskip("mjlab")
    with pytest.raises(script.BadInput, match="follows a recorded motion, which this script cannot load"):
        train(script, tmp_path / "out", env_id="Mjlab-Tracking-Flat-Unitree-G1", num_envs=2)
    settings = SMALL | dict(env_id="Mjlab-Cartpole-Balance", num_envs=256, num_steps=24, init_std=1.0)
    run_dir = train(script, tmp_path, **settings | dict(hidden_sizes=(64, 64), total_timesteps=200_000))
    rows = read(run_dir / "metrics.csv")
    assert rows[-1]["rewards/smooth_reward"] > 2 * rows[5]["rewards/smooth_reward"] > 0


# --- resuming


@SCRIPTS
def test_resumed_run_equals_an_unbroken_one(script, tmp_path, monkeypatch):
    """Episodes of one step, so that simulators which start anew change nothing: every later row must be the same."""
    starts = use(script, monkeypatch, one_step)
    settings = SMALL | dict(total_timesteps=480, update_epochs=2)
    unbroken = train(script, tmp_path / "unbroken", **settings)
    run_dir = train(script, tmp_path / "broken", **settings | dict(total_timesteps=192))
    torch.manual_seed(99)  # a resumed run has the state of its checkpoint, on another device, too
    resumed = script.read_args(["--resume", str(run_dir), "--total-timesteps", "480", "--device", "auto"])
    assert resumed.device == "auto" and script.train(resumed) == str(run_dir)
    for file in ("metrics.csv", "episodes.csv"):
        for row, other in zip(read(run_dir / file), read(unbroken / file), strict=True):
            assert row | {"charts/SPS": 0} == other | {"charts/SPS": 0}
    ours, theirs = (torch.load(x / "checkpoint.pt") for x in (run_dir, unbroken))
    assert all(torch.equal(x, theirs["agent"][name]) for name, x in ours["agent"].items())
    assert torch.equal(ours["rng_state"], theirs["rng_state"])
    # Each start has random numbers of its own, and a curriculum goes on.
    assert starts == [([1, 0], 0), ([1, 0], 0), ([1, 192], 48)]


@SCRIPTS
def test_same_seed_same_run(script, tmp_path):
    settings = SMALL | dict(env_id="Hopper-v4", total_timesteps=400)
    runs = [train(script, tmp_path / str(i), **settings, seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, same, other = ((run_dir / "episodes.csv").read_bytes() for run_dir in runs)
    assert first == same != other and first.count(b"\n") > 5


# --- what goes wrong


@SCRIPTS
def test_nan_stops_the_run_names_its_source_and_keeps_the_checkpoint(script, tmp_path, monkeypatch):
    def broken(reward, obs):
        return lambda e, k, action: (obs if e > 30 else 0.0, reward if e > 30 else 1.0, "terminated")

    for name, episode in (("rewards", broken(NAN, 0.0)), ("obs", broken(1.0, NAN))):
        use(script, monkeypatch, episode)
        with pytest.raises(script.BrokenRun, match=f"returned {name} that are no finite float32"):
            train(script, tmp_path / name, **SMALL)
    use(script, monkeypatch, one_step)
    monkeypatch.setattr(script, "policy_loss", lambda ratio, *_: ratio * NAN)
    with pytest.raises(script.BrokenRun, match="losses/policy_loss is nan at step"):
        train(script, tmp_path / "loss", **SMALL)
    for name, step in (("rewards", 96), ("obs", 96), ("loss", 0)):
        (run_dir,) = (tmp_path / name).iterdir()
        checkpoint = torch.load(run_dir / "checkpoint.pt")
        assert checkpoint["step"] == step and all(
            x.isfinite().all() for name, x in checkpoint["agent"].items() if name != "action_bounds"
        )


@SCRIPTS
@pytest.mark.parametrize(
    "settings, words",
    [
        ({"env_id": "Go2JoystickRoughTerrain-v1"}, "EnvPool has no task .* did you mean Go1JoystickRoughTerrain-v1"),
        ({"env_id": "go1"}, "did you mean .*Go1JoystickRoughTerrain-v1"),
        ({"env_id": "g1joystickroughterrain"}, "did you mean .*G1JoystickRoughTerrain-v1"),
        ({"env_id": "CartPole-v1"}, "has no flat Box action"),
        ({"env_id": "Pong-v5"}, "has no flat Box observation"),
        ({"env_id": "Isaac-Velocity-Rough-G1-v0"}, r"is not installed \(No module .*isaac-sim.github.io"),
        ({"compile": True, "env_id": "Hopper-v4", "num_envs": 4}, "--compile needs a C.. compiler"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line_before_anything_is_created(script, settings, words, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(script.BadInput, match=words) as error:
        train(script, tmp_path / "out", **{"device": "cpu", **settings})
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


BAD = [dict(num_envs=5, num_steps=5), dict(num_envs=1, num_steps=4), dict(hidden_sizes=()), dict(hidden_sizes=(0,))]
BAD += [dict(num_steps=1), dict(num_steps=10**9), dict(init_std=0.0), dict(gamma=NAN), dict(desired_kl=0.0)]
BAD += [dict(ent_coef=-1.0), dict(num_minibatches=7), dict(no_such_option=1)]
BAD_BPO = [dict(temperature=NAN), dict(clip_coef=1.5), dict(ratio_low=1.0), dict(median_network="mlp-head")]
CASES = [(script, x) for script in (bpo, ppo) for x in BAD] + [(bpo, x) for x in BAD_BPO]


@pytest.mark.parametrize("script, settings", CASES, ids=str)
def test_bad_settings_are_refused(script, settings):
    with pytest.raises(ValueError):
        script.Args(**settings)


@SCRIPTS
def test_simulators_and_devices_that_are_missing_are_named(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(script.BadInput, match="--device cuda needs a GPU"):
        train(script, tmp_path / "out", device="cuda", env_id="Pendulum-v1")
    assert script.find_device(script.Args()).type == "cpu"
    for module, env_id, words in (
        ("envpool", "Go1JoystickRoughTerrain-v1", "is not installed .*: pip install -r requirements.txt"),
        ("mjlab", "Mjlab-Cartpole-Balance", "is not installed .*: pip install -r requirements-mjlab.txt"),
    ):
        monkeypatch.setitem(sys.modules, module, None)  # import then raises ImportError
        monkeypatch.setitem(sys.modules, f"{module}.tasks", None)
        with pytest.raises(script.BadInput, match=words):
            train(script, tmp_path / "out", env_id=env_id)
    assert not (tmp_path / "out").exists()


@SCRIPTS
def test_simulators_that_do_not_fit_into_memory_are_one_line(script, monkeypatch):
    for error in (
        MemoryError(),
        RuntimeError("CUDA out of memory"),
        RuntimeError("Failed to allocate 9 bytes"),
        OSError("else"),
    ):
        monkeypatch.setattr(script, "EnvPool", lambda *_, error=error: (_ for _ in ()).throw(error))
        kind, words = (OSError, "else") if isinstance(error, OSError) else (script.BadInput, "do not fit into memory")
        with pytest.raises(kind, match=words):
            script.make_envs(script.Args(), 4, 0)


@pytest.mark.parametrize(
    "script, words, status, line",
    [
        (bpo, ["--hidden-sizes", "1000000", "1000000"], 1, "error: .*allocate memory"),
        (ppo, ["--num-steps", "1000000", "--num-envs", "1000000"], 2, "error: .*pass --num-envs .* or less"),
        (ppo, ["--num-steps", "1000000000"], 2, None),  # a box, which names the option
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_one_message(script, words, status, line, tmp_path):
    command = [sys.executable, script.__file__, "--env-id", "Pendulum-v1", "--device", "cpu", *words]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert run.returncode == status and "Traceback" not in run.stderr and not list(tmp_path.iterdir()), run.stderr
    assert re.fullmatch(line + ".*\n", run.stderr) if line else "num_steps" in run.stderr, run.stderr
