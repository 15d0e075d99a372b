"""The simulators as the scripts for control call them: EnvPool's tasks and games, mjlab's and Isaac Lab's interface."""

import math
import os
import re
import subprocess
import sys
from ctypes.util import find_library
from types import SimpleNamespace

import envpool
import numpy as np
import probe_envs  # noqa: F401 (registers tasks)
import pytest
import torch
from common import ATARI, BPO, CONTINUOUS, ROBOTS, ROOT, column, each, read, train

bpo, ppo = ROBOTS
NAN = math.nan
GO1 = "Go1JoystickRoughTerrain-v1"
close = np.testing.assert_allclose


# --- all scripts


TASKS = dict.fromkeys(CONTINUOUS, dict(env_id="Hopper-v4", env_backend="envpool"))
TASKS |= dict.fromkeys(ATARI, dict(env_id="Breakout-v5", device="cpu"))
TASKS |= dict.fromkeys(ROBOTS, dict(env_id="Hopper-v4", device="cpu"))


@each(CONTINUOUS[0], ATARI[0], ROBOTS[0])  # siblings make and step simulators by the same text
def test_neighbouring_seeds_and_parts_of_a_run_share_no_simulator(script):
    starts = []
    for key in ([1, 0], [2, 0], [1, 512], [1, 0]):
        envs, _, action_space = script.make_envs(script.Args(**TASKS[script]), 2, key)
        obs = envs.reset()[0]
        for _ in range(30 if script in ATARI else 0):  # games begin with one picture
            obs = envs.step(np.array([2, 3]))[0]
        starts.append(np.asarray(obs))
    distinct = len(np.unique(np.concatenate(starts), axis=0))
    assert distinct == 6 or script in ATARI and distinct > 3  # few different starts: pictures may coincide
    np.testing.assert_array_equal(starts[0], starts[3])


SAME = [CONTINUOUS[0], ROBOTS[0], pytest.param(ATARI[0], marks=pytest.mark.slow)]


@pytest.mark.parametrize("script", SAME, ids=[x[0].__name__ for x in (CONTINUOUS, ROBOTS, ATARI)])
def test_same_seed_same_episodes(script, tmp_path):
    sizes = dict(num_envs=4, num_steps=64) if script in ATARI else {}
    settings = TASKS[script] | sizes | dict(total_timesteps=1000 if script in ATARI else 500)
    runs = [train(script, tmp_path / str(i), **settings, seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, same, other = ((run_dir / "episodes.csv").read_bytes() for run_dir in runs)
    assert first == same != other and first.count(b"\n") > 2
    assert all(math.isfinite(x) for x in read(runs[0] / "metrics.csv")[-1].values())


@each(*CONTINUOUS)
def test_backends_play_hopper_and_neighbouring_seeds_differ(script, tmp_path):
    rows = read(train(script, tmp_path, env_id="Hopper-v4", num_envs=2, total_timesteps=500) / "episodes.csv")
    assert 5 < column(rows, "length").mean() < 60 and 3 < column(rows, "return").mean() < 100
    starts = []
    for key in ([1, 0], [2, 0], [1, 512], [1, 0]):
        starts.append(script.make_envs(script.Args(env_backend="gymnasium"), 4, key)[0].reset()[0])
    assert len(np.unique(np.concatenate(starts), axis=0)) == 12
    np.testing.assert_array_equal(starts[0], starts[3])


@pytest.mark.slow
@each(BPO[0])
def test_hopper_improves_and_its_episodes_fill_the_steps(script, tmp_path):
    settings = dict(env_id="Hopper-v4", env_backend="envpool", hidden_size=64, num_steps=512, minibatch_size=64)
    run_dir = train(script, tmp_path, **settings, update_epochs=10, total_timesteps=25_000, checkpoint_seconds=30)
    rows, last = read(run_dir / "episodes.csv"), read(run_dir / "metrics.csv")[-1]["step"]
    returns, steps, lengths = (column(rows, name) for name in ("return", "step", "length"))
    assert returns[-20:].mean() > 3 * returns[:20].mean() and (returns > 0).all()
    assert (np.diff(steps) >= 0).all() and steps[-1] <= last
    assert lengths.sum() <= last < lengths.sum() + 4 * lengths.max() * 2  # the rest: four unfinished episodes


@pytest.mark.slow
def test_clip_coef_near_zero_keeps_the_policy(tmp_path):
    """The target is then the old policy itself, whatever the advantages."""
    runs = {}
    for clip_coef in (1e-6, 0.4):
        settings = dict(env_backend="envpool", num_steps=256, update_epochs=4, total_timesteps=4000)
        rows = read(train(BPO[0], tmp_path / str(clip_coef), **settings, clip_coef=clip_coef) / "metrics.csv")
        runs[clip_coef] = column(rows, "losses/kl").mean(), column(rows, "ratio/high_mean").mean() - 1
    assert runs[1e-6][0] < runs[0.4][0] / 100 and runs[1e-6][1] < runs[0.4][1] / 10, runs


# --- games


@each(*ATARI)
@pytest.mark.slow
def test_another_name_of_a_game_is_the_same_game(script):
    seen = []
    for env_id in ("Breakout-v5", "BreakoutNoFrameskip-v4"):
        envs, obs_space, action_space = script.make_envs(script.Args(env_id=env_id, device="cpu"), 2, [1, 0, 0])
        assert (obs_space.shape, action_space.n) == ((4, 84, 84), 4)
        envs.reset()
        seen.append([envs.step(np.array([2, 3]))[0] for _ in range(20)][-1])
    np.testing.assert_array_equal(*seen)


def breakout_score(ram):
    """The score that Breakout keeps for its own display, as decimal digits in two bytes."""
    return sum(10**place * int(digit) for place, digit in enumerate(f"{ram[76]:02x}{ram[77]:02x}"[::-1]))


@pytest.mark.slow
def test_episodes_hold_breakouts_own_score(tmp_path, monkeypatch):
    """Over lost lives and over timeouts, which are made to come after 170 steps; read from the console's memory."""
    script, ends = BPO[1], []
    make = envpool.make

    def make_recorded(*args, **kwargs):
        envs = make(*args, **kwargs, max_episode_steps=170)
        step = envs.step

        def recorded(actions):
            result = step(actions)
            _, _, _, truncated, info = result
            for n in range(len(truncated)):
                if truncated[n] or info["terminated"][n]:
                    ends.append((breakout_score(info["ram"][n]), bool(truncated[n]), int(info["lives"][n])))
            return result

        envs.step = recorded
        return envs

    monkeypatch.setattr(envpool, "make", make_recorded)
    sizes = dict(num_envs=8, num_steps=128, minibatch_size=1024, total_timesteps=3000, checkpoint_seconds=30)
    rows = read(train(script, tmp_path, env_id="BreakoutNoFrameskip-v4", **sizes) / "episodes.csv")
    assert column(rows, "return").tolist() == [score for score, *_ in ends]
    assert len(rows) > 10 and len(set(column(rows, "return"))) > 2
    timeouts = [row["length"] for row, (_, truncated, _) in zip(rows, ends) if truncated]
    assert timeouts and set(timeouts) == {170} and any(not truncated for _, truncated, _ in ends)
    assert any(lives > 0 for _, _, lives in ends) and column(rows, "length").min() > 5 * 15  # five lives, not one


# --- robots


@each(*ROBOTS)
def test_a_run_on_a_robot_is_complete(script, tmp_path):
    run_dir = train(script, tmp_path, env_id=GO1, num_steps=12, total_timesteps=90)
    rows = read(run_dir / "metrics.csv")
    assert {"rewards/tracking_lin_vel", "rewards/feet_slip", "rewards/orientation"} <= set(rows[0])
    finite = [name for name in rows[0] if not name.startswith("charts/mean_")]
    assert all(math.isfinite(row[name]) for row in rows for name in finite)
    assert 0 < rows[-1]["rewards/tracking_lin_vel"] <= 1 and rows[-1]["step"] >= 90
    agent = torch.load(run_dir / "agent.pt")["agent"]
    assert agent["policy.0.weight"].shape == (16, 48) and agent["value.0.weight"].shape == (16, 123)


def make_envs(task, num_envs, key=3, **options):
    return bpo.make_envs(bpo.Args(env_id=task, device="cpu"), num_envs, key, **options)


def make_raw(task, num_envs, key=3):
    seeds = (np.random.SeedSequence(key).generate_state(num_envs) & 0x7FFFFFFF).tolist()
    return envpool.make(task, env_type="gymnasium", num_envs=num_envs, seed=seeds)


def test_logged_rewards_are_means_over_real_steps():
    """Against EnvPool itself, across resets, whose dummy steps must not count."""
    envs, obs_space, action_space = make_envs(GO1, 6)
    raw = make_raw(GO1, 6)
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


@each(*ROBOTS)
def test_cut_episodes_do_not_count_as_episodes(script, tmp_path):
    run_dir = train(script, tmp_path, env_id="Pendulum-v1", num_steps=60, total_timesteps=1600)
    rows = read(run_dir / "episodes.csv")
    assert len(rows) >= 4 and set(column(rows, "length")) == {200}
    assert read(run_dir / "metrics.csv")[-1]["charts/mean_length_100"] == 200


@pytest.mark.parametrize(
    "task, seen",
    [
        ("Hopper-v4", 1.0),
        pytest.param("H1JoystickGaitTracking-v1", 4.0, marks=pytest.mark.slow),
        ("MuJoCoPlayground/BarkourJoystick-v1", 4.0),
    ],
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


@pytest.mark.slow
def test_memory_is_checked_before_making_environments(tmp_path):
    """In a process of its own, as users run it: in this one, what earlier tests left would disturb the measurement."""
    code = MEMORY_CHECK.format(root=str(ROOT), out=str(tmp_path / "out"))
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


@pytest.mark.slow
def test_robots_are_drawn(tmp_path):
    if sys.platform == "linux" and find_library("EGL") is None:
        pytest.skip("drawing needs EGL")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bpo_locomotion as bpo, torch; "
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


@each(*ROBOTS)
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
    train(script, tmp_path, **sizes, env_id="Mjlab-X")
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
@each(*ROBOTS)
def test_mjlab_cartpole_learns_to_balance(script, tmp_path):
    pytest.importorskip("mjlab")
    with pytest.raises(script.BadInput, match="follows a recorded motion, which this script cannot load"):
        train(script, tmp_path / "out", env_id="Mjlab-Tracking-Flat-Unitree-G1", num_envs=2)
    settings = dict(env_id="Mjlab-Cartpole-Balance", num_envs=256, num_steps=24, init_std=1.0, update_epochs=10)
    run_dir = train(script, tmp_path, **settings | dict(hidden_sizes=(64, 64), total_timesteps=200_000))
    rows = read(run_dir / "metrics.csv")
    assert rows[-1]["rewards/smooth_reward"] > 2 * rows[5]["rewards/smooth_reward"] > 0
