"""enjoy.py: what it plays, prints, records, films and refuses."""

import csv
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import probe_envs
import pytest
import torch

import bpo_atari_envpool as bpo_atari
import bpo_continuous_action as bpo
import bpo_locomotion
import enjoy
import ppo_atari_envpool as ppo_atari
import ppo_continuous_action as ppo
import ppo_locomotion

TINY = dict(env_backend="gymnasium", compile=False, num_steps=64, hidden_size=16, total_timesteps=256, update_epochs=1)
NAMES = {"bpo": bpo, "ppo": ppo}


class Forever(probe_envs.Probe):
    """Pays 0.001 a step and never ends."""

    def reward(self, action):
        return 0.001

    def end(self):
        return False, False


class OneOrNine(probe_envs.Probe):
    """Pays 1 a step; an episode lasts one step or nine, by chance."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.length = int(self.np_random.choice([1, 9]))
        return result

    def reward(self, action):
        return 1.0

    def end(self):
        return self.steps == self.length, False


class Painted(probe_envs.Probe):
    """Observes noise, pays the action, lasts nine steps and renders small pictures."""

    metadata = dict(render_modes=["rgb_array"], render_fps=60)
    action_space = gym.spaces.Box(-5, 3, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def observe(self):
        return self.np_random.normal(size=1).astype(np.float32)

    def reward(self, action):
        return action

    def end(self):
        return self.steps == 9, False

    def render(self):
        return np.full((64, 64, 3), 25 * self.steps, np.uint8)


class Unpainted(Painted):
    def render(self):
        return None


for task in (Forever, OneOrNine, Painted, Unpainted):
    gym.register(f"{task.__name__}-v0", entry_point=task, disable_env_checker=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that returns a run's folder, trained when it is first asked for."""
    made = {}

    def get(env_id="Painted-v0", script=bpo):
        if (env_id, script) not in made:
            folder = str(tmp_path_factory.mktemp("runs"))
            made[env_id, script] = script.train(script.Args(env_id=env_id, output_dir=folder, **TINY))
        return Path(made[env_id, script])

    return get


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run that nothing else has touched."""

    def get(env_id="Painted-v0", script=bpo):
        return shutil.copytree(trained(env_id, script), tmp_path / f"{script.SCRIPT}-{env_id}")

    return get


def interrupted(folder):
    (folder / "agent.pt").unlink()
    return folder


def play(*words):
    enjoy.main([str(x) for x in words])


def rows(folder):
    with (folder / "evaluations.csv").open() as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {x.relative_to(folder): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def refused(capsys, *words):
    """The line on stderr; the exit status must be 2 and nothing may be printed before."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        play(*words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


# --- playing


@pytest.mark.parametrize("script", NAMES.values(), ids=NAMES)
def test_finished_and_interrupted_runs_are_played_and_stay_as_they_were(script, run, capsys):
    folder = run(script=script)
    before = contents(folder)
    play(folder, "--episodes", 3)
    total = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")[0]  # an iteration is whole
    assert f"{folder}, agent.pt of step {total}: Painted-v0, seed 1, deterministic, return" in capsys.readouterr().out
    after = contents(folder)
    assert after.keys() - before.keys() == {Path("evaluations.csv")} and after | before == after
    step = script.load_run(interrupted(folder), "checkpoint.pt")[1]["step"]
    play(folder, "--episodes", 3, "--seed", 5, "--stochastic")
    assert f"checkpoint.pt of step {step}: Painted-v0, seed 5, stochastic, return" in capsys.readouterr().out
    first, second = rows(folder)
    steps = first["agent"], first["step"], second["agent"], second["step"]
    assert steps == ("agent.pt", str(total), "checkpoint.pt", str(step))
    assert (second["seed"], second["episodes"], second["stochastic"], second["cut"]) == ("5", "3", "True", "0")
    assert float(second["min"]) <= float(second["mean"]) <= float(second["max"]) and float(second["std"]) > 0


def test_results_repeat_and_seeds_differ(run):
    folder = run()
    for words in ([], [], ["--seed", 2], ["--stochastic"], ["--stochastic"], ["--no-stochastic"]):
        play(folder, *words)
    means = [x["mean"] for x in rows(folder)]
    assert means[0] == means[1] == means[5] != means[2] and means[3] == means[4] != means[0]


def test_all_starts_are_distinct_and_new(monkeypatch):
    """Ten episodes of Hopper begin with ten observations, none of which training began with."""
    starts = {}
    for entropy in ([1, 2**64], [1, 0], [1, 2048]):
        envs, *_ = bpo.make_envs(bpo.Args(), 10, entropy)
        starts |= {x.tobytes(): entropy for x in envs.reset()[0]}
        envs.close()
    assert len(starts) == 30


def test_it_draws_its_own_seeds(run, monkeypatch):
    entropies, make_envs = [], bpo.make_envs
    monkeypatch.setattr(
        bpo, "make_envs", lambda a, n, entropy: entropies.append((n, entropy)) or make_envs(a, n, entropy)
    )
    play(run(), "--episodes", 7, "--seed", 3)
    assert entropies[-1] == (7, [3, 2**64])


def test_only_the_first_episode_of_each_environment_counts(run):
    """OneOrNine pays 1 a step for one step or nine. Were later episodes counted, totals would not be 1 or 9."""
    folder = run("OneOrNine-v0")
    args, _ = bpo.load_run(folder, "agent.pt")
    envs, *_ = bpo.make_envs(args, 40, 7)
    returns, cut = enjoy.evaluate(enjoy.load(folder), enjoy.load_agent(folder), envs, 100, Counter())
    assert set(returns) == {1, 9} and cut == 0
    play(folder, "--episodes", 40)
    (row,) = rows(folder)
    ones = (9 - float(row["mean"])) / 8 * 40
    assert ones == pytest.approx(round(ones), abs=1e-6) and 5 < ones < 35


def test_endless_episodes_are_cut_and_small_returns_shown(run, capsys):
    folder = run("Forever-v0")
    play(folder, "--episodes", 4, "--max-steps", 10)
    assert "return 0.01 +- 0 over 4 episodes, 4 episodes cut after 10 steps\n" in capsys.readouterr().out
    (row,) = rows(folder)
    assert (row["mean"], row["max_steps"], row["cut"]) == ("0.01", "10", "4")


def test_several_runs_and_another_task(run, capsys):
    folders = run(), run("OneOrNine-v0", ppo)
    play(*folders, "--env-id", "Skewed-v0", "--episodes", 50)
    assert [rows(x)[0]["env_id"] for x in folders] == ["Skewed-v0"] * 2
    assert capsys.readouterr().out.count("Skewed-v0, seed 1, deterministic, return") == 2


def test_the_live_line_counts_steps_and_episodes(run, capsys, monkeypatch):
    monkeypatch.setattr(enjoy.time, "time", iter(range(10**6)).__next__)
    monkeypatch.setattr(enjoy.os, "isatty", lambda descriptor: True)
    play(run(), "--episodes", 3)
    assert "step 8, 0 of 3 episodes finished" in (out := capsys.readouterr().out) and out.count("\r") > 5


def test_an_unwritable_folder_costs_only_the_record(run, capsys):
    folder = run()
    (folder / "evaluations.csv").mkdir()
    play(folder)
    out, err = capsys.readouterr()
    assert "return" in out and err.startswith("the result is not recorded: ") and err.count("\n") == 1


@pytest.mark.slow
def test_interrupt_ends_it_at_once(run):
    command = [sys.executable, enjoy.__file__, "examples/Hopper-v4__bpo_continuous_action", "--episodes", "10000"]
    folder = Path(enjoy.__file__).parent
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT and "Traceback" not in err and out == ""


# --- from Python


@pytest.mark.parametrize("script", NAMES.values(), ids=NAMES)
def test_load_agent_acts_as_enjoy_and_training_do(script, run):
    folder = run(script=script)
    act = enjoy.load_agent(folder)
    env = gym.make("Painted-v0")
    obs, _ = env.reset(seed=1)
    action = act(obs)
    obs, reward, *_ = env.step(action)
    assert action.shape == (1,) and -5 <= action <= 3 and reward == pytest.approx(action.item())

    args, checkpoint = script.load_run(folder, "agent.pt")
    _, obs_space, action_space = script.make_envs(args, 1, 0)
    agent = script.Agent(obs_space.shape[0], action_space.low, action_space.high, args)
    agent.load_state_dict(checkpoint["agent"])
    batch = np.random.default_rng(0).normal(size=(5, 1))
    expected = agent.to_env(agent(agent.normalize(torch.from_numpy(batch).float())).mean.detach())
    assert act(batch) == pytest.approx(expected, abs=1e-6) and act(batch).shape == (5, 1)
    assert np.ptp(act(np.zeros((500, 1)), stochastic=True)) > 1 and np.ptp(act(np.zeros((500, 1)))) == 0


@pytest.mark.slow
def test_the_example_plays_well_through_gymnasium():
    act = enjoy.load_agent(Path(enjoy.__file__).parent / "examples/Hopper-v4__bpo_continuous_action")
    env, total, over = gym.make("Hopper-v4"), 0.0, False
    obs, _ = env.reset(seed=1)
    while not over:
        obs, reward, terminated, truncated, _ = env.step(act(obs))
        total, over = total + reward, terminated or truncated
    assert total > 3000


def test_the_example_is_small_and_whole():
    folder = Path(enjoy.__file__).parent / "examples/Hopper-v4__bpo_continuous_action"
    assert (folder / "args.json").exists() and (folder / "agent.pt").stat().st_size < 80_000


# --- films


def test_films_are_readable_and_never_overwritten(run, capsys):
    folder = run()
    for _ in range(2):
        play(folder, "--video", "--episodes", 2)
    first, second = (folder / "videos").iterdir()
    frames = imageio.mimread(first)
    assert first != second and len(frames) == 5  # of ten, which are 60 a second
    assert frames[0].shape == (64, 64, 3) and frames[0].mean() < frames[2].mean() < frames[4].mean()
    assert imageio.get_reader(first).get_meta_data()["fps"] == 30
    assert capsys.readouterr().out.count("film of 9 steps, return ") == 2


@pytest.mark.slow
def test_the_camera_follows_the_robot(monkeypatch):
    monkeypatch.setattr(gym.logger, "min_level", gym.logger.ERROR)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    try:
        from mujoco.egl import GLContext  # noqa: F401
    except (ImportError, AttributeError):
        pytest.skip("there is no EGL")
    brown = []
    for x in (0, 10):  # two cameras, one after the other: neither may be black
        env, fps, _ = enjoy.open_camera(SimpleNamespace(script=bpo, args=bpo.Args()), 0)
        env.reset(seed=0)
        env.unwrapped.set_state(env.unwrapped.init_qpos + [x, 0, 0, 0, 0, 0], env.unwrapped.init_qvel)
        red, _, blue = env.render().astype(int).transpose(2, 0, 1)
        brown.append((red - blue > 30).sum())
        env.close()
        del env
    assert fps == 125 and min(brown) > 1000 and brown[0] == pytest.approx(brown[1], rel=0.2)


@pytest.mark.parametrize("env_id", ["OneOrNine-v0", "Unpainted-v0"])
def test_what_cannot_be_filmed_is_not_played(env_id, run, capsys):
    folder = run()
    before = contents(folder)
    error = refused(capsys, run("OneOrNine-v0", ppo), folder, "--env-id", env_id, "--video")
    assert f"cannot film {env_id}: " in error and "libegl1" in error and 'pip install "gymnasium[box2d]"' in error
    assert contents(folder) == before


def test_what_only_envpool_has_cannot_be_filmed():
    with pytest.raises(ValueError, match="cannot film HopperHop-v1: only EnvPool has this task"):
        enjoy.open_camera(SimpleNamespace(script=bpo, args=bpo.Args(env_id="HopperHop-v1")), 0)


@pytest.mark.parametrize(
    "env_id, first",
    [
        ("Go1JoystickRoughTerrain-v1", 45),
        pytest.param("G1JoystickRoughTerrain-v1", 9, marks=pytest.mark.slow),
    ],
)
def test_a_robot_is_told_where_to_go(env_id, first):
    run = SimpleNamespace(script=bpo_locomotion, args=bpo_locomotion.Args(env_id=env_id))
    assert enjoy.find_command(run) == first
    obs = torch.arange(2 * 48.0).view(2, 48)
    steered = enjoy.steer(first, (0.75, 0.0, -0.5), obs)
    assert steered[:, first : first + 3].tolist() == [[0.75, 0.0, -0.5]] * 2
    assert (steered != obs).sum() == 6


@pytest.mark.parametrize("env_id", [pytest.param("H1JoystickGaitTracking-v1", marks=pytest.mark.slow), "Pendulum-v1"])
def test_a_robot_without_a_command_cannot_be_told(env_id):
    with pytest.raises(ValueError, match=f"--command: {env_id} shows no command"):
        enjoy.find_command(SimpleNamespace(script=bpo_locomotion, args=bpo_locomotion.Args(env_id=env_id)))


# --- refusals


def write_about(folder, **changes):
    path = folder / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD_RUNS = {
    "no folder": (shutil.rmtree, "is no run: FileNotFoundError"),
    "no args.json": (lambda x: (x / "args.json").unlink(), "is no run: FileNotFoundError"),
    "half an args.json": (lambda x: os.truncate(x / "args.json", 50), "is no run: JSONDecodeError"),
    "a list": (lambda x: (x / "args.json").write_text("[]"), "is no run: TypeError"),
    "language model": (lambda x: write_about(x, script="gbpo_llm"), "is a run of 'gbpo_llm', not of bpo_continuous"),
    "Atari": (lambda x: write_about(x, script="bpo_atari_envpool"), "cannot use the run"),
    "no name": (lambda x: write_about(x, script=["bpo_continuous_action"]), "is a run of ['bpo_continuous_action']"),
    "long name": (lambda x: write_about(x, script="x\n" * 1000), "is a run of 'x\\nx"),
    "sibling": (lambda x: write_about(x, script="ppo_continuous_action"), "cannot use the run"),
    "old format": (lambda x: write_about(x, format=1), "cannot use the run"),
    "no agent": (lambda x: [(x / y).unlink() for y in ("agent.pt", "checkpoint.pt")], "cannot use the run"),
    "half an agent": (lambda x: os.truncate(x / "agent.pt", 5000), "cannot use the run"),
    "no weights": (lambda x: torch.save({}, x / "agent.pt"), "agent.pt"),
    "no dict": (lambda x: torch.save([1], x / "agent.pt"), "agent.pt"),
    "other sizes": (
        lambda x: write_about(x, args=dataclasses.asdict(bpo.Args(**TINY | {"hidden_size": 8}))),
        "not fit",
    ),
}


@pytest.mark.parametrize("damage, message", BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_runs_are_refused_before_any_is_played(damage, message, run, capsys):
    good, bad = run("OneOrNine-v0"), run()
    damage(bad)
    before = contents(good) | contents(bad)
    assert message in refused(capsys, good, bad)
    assert contents(good) | contents(bad) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--env-id", "Hopper-v4"], "does not fit its args.json or Hopper-v4, which observes Box("),
        (["--env-id", "Nowhere-v0"], "gymnasium cannot make Nowhere-v0"),
        (["--env-id", "Image-v0"], "Image-v0 has no flat Box observation"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(words, message, run, capsys):
    folder = run()
    before = contents(folder)
    assert message in refused(capsys, folder, *words)
    assert contents(folder) == before


@pytest.mark.parametrize("words", [["--episodes", 0], ["--seed", -1], ["--max-steps", 0], ["--unknown"], None])
def test_bad_options_are_refused(words, run, capsys):
    with pytest.raises(SystemExit) as stop:
        play(*([run(), *words] if words else []))
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_a_run_never_names_what_is_imported(run, capsys, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = run()
    write_about(folder, script="evil")
    assert "is a run of 'evil'" in refused(capsys, folder)
    with pytest.raises(ValueError, match="is a run of 'evil'"):
        enjoy.load_agent(folder)
    write_about(folder, script=bpo.SCRIPT)
    args = json.loads((folder / "args.json").read_text())["args"]
    write_about(folder, args=args | dict(env_id="evil:Task-v0", env_backend="gymnasium"))
    assert "code of your own: if it is yours, add --env-id evil:Task-v0" in refused(capsys, folder)
    with pytest.raises(ValueError, match="code of your own"):
        enjoy.load_agent(folder)
    assert "evil" not in sys.modules
    play(folder, "--env-id", "probe_envs:Target-v0", "--max-steps", 5)


# --- Atari and robots


@pytest.mark.parametrize("script", (bpo_atari, ppo_atari))
@pytest.mark.slow
def test_a_game_goes_on_after_a_lost_life_and_counts_its_own_reward(script, tmp_path):
    args = script.Args(env_id="Breakout-v5", num_steps=8, total_timesteps=64, device="cpu", minibatch_size=64)
    run = enjoy.check(script.train(dataclasses.replace(args, output_dir=str(tmp_path))), enjoy.Options(("",)))
    torch.manual_seed(0)
    envs, *_ = script.make_envs(args, 2, 5)
    policy = functools.partial(enjoy.act, run.agent, stochastic=True)
    returns, cut = enjoy.evaluate(run, policy, envs, 10_000, Counter())
    torch.manual_seed(0)
    envs, *_ = script.make_envs(args, 2, 5)
    (obs, _), scores, lives, over = envs.reset(), np.zeros(2), np.zeros(2), np.zeros(2, bool)
    while not over.all():
        obs, _, ends, _, info = envs.step(enjoy.act(run.agent, obs, stochastic=True))
        scores, lives = scores + info["reward"] * ~over, lives + ends * ~over
        over |= info["terminated"].astype(bool)
    assert returns == pytest.approx(scores) and cut == 0 and (lives == 5).all() and scores.max() > 0


@pytest.mark.slow
def test_a_game_is_filmed_in_colour_as_the_simulator_shows_it(tmp_path):
    args = dict(env_id="Pong-v5", num_steps=8, total_timesteps=64, device="cpu", minibatch_size=64)
    folder = Path(bpo_atari.train(bpo_atari.Args(**args, output_dir=str(tmp_path))))
    play(folder, "--episodes", 1, "--max-steps", 20, "--video")
    (film,) = (folder / "videos").iterdir()
    frames = np.stack(imageio.mimread(film))
    assert frames.shape == (20, 210, 160, 3) and np.ptp(frames.astype(int), axis=-1).max() > 50


@pytest.fixture
def robot(tmp_path):
    settings = dict(env_id="Pendulum-v1", num_envs=4, total_timesteps=200, hidden_sizes=(8,), device="cpu")
    return Path(ppo_locomotion.train(ppo_locomotion.Args(**settings, output_dir=str(tmp_path))))


def test_a_robot_is_played_and_its_exported_policy_acts_the_same(robot):
    play(robot, "--episodes", 10, "--export")  # of four robots at a time, as in training
    (row,) = rows(robot)
    assert -2000 < float(row["min"]) < float(row["max"]) < 0 and (row["episodes"], row["cut"]) == ("10", "0")
    obs = 3 * torch.randn(5, 3)
    actions = torch.export.load(robot / "policy.pt2").module()(obs)
    assert actions.detach().numpy() == pytest.approx(enjoy.load_agent(robot)(obs), abs=1e-6) and actions.std() > 0


def test_only_robots_are_exported(run, capsys):
    assert "--export is for legged robots" in refused(capsys, run(), "--export")
