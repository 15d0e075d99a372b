"""Real runs of the BPO and PPO scripts for Atari: scores, dummy rows, memory, resuming, processes, errors."""

import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_atari_envpool import run_ranks

import bpo_atari_envpool as bpo
import ppo_atari_envpool as ppo

BOTH = {"bpo": bpo, "ppo": ppo}
SCRIPTS = pytest.mark.parametrize("script", BOTH.values(), ids=BOTH)
TINY = dict(device="cpu", num_envs=2, num_steps=16, minibatch_size=16, update_epochs=1, eval_episodes=1)
NEXT_STEP = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}


@pytest.fixture(autouse=True)
def signal_handlers():
    """A script run as __main__ in this process leaves its own handlers behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train(script, folder, **settings):
    return Path(script.train(script.Args(**{**TINY, "output_dir": str(folder), **settings})))


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


def options(**settings):
    """Settings as command-line options."""
    names = {name: "--" + name.replace("_", "-") for name in settings}
    flags = [x.replace("--", "--no-") if settings[n] is False else x for n, x in names.items()]
    values = [[] if isinstance(x, bool) else [str(x)] for x in settings.values()]
    return [word for flag, value in zip(flags, values) for word in (flag, *value)]


def start(script, arguments, **kwargs):
    command = [sys.executable, script.__file__, *arguments]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, text=True, **pipes, **kwargs)


def command_line(script, arguments, monkeypatch, capsys):
    """Runs the script as __main__ in this process: its exit status and the lines it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    return stop.value.code, capsys.readouterr().err.splitlines()


def comparable(rows):
    """Without what a clock says."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "charts/SPS"))} for row in rows]


class Malicious:
    """Would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cut(path, part):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def edit(path, **settings):
    about = json.loads(path.read_text())
    about["args"] |= settings
    path.write_text(json.dumps(about))


DAMAGES = {
    "missing folder": lambda run: shutil.rmtree(run),
    "text file": lambda run: (shutil.rmtree(run), run.write_text("hello\n")),
    "no checkpoint": lambda run: [x.unlink() for x in run.glob("*.pt")],
    "empty checkpoint": lambda run: [cut(x, 0) for x in run.glob("*.pt")],
    "truncated checkpoint": lambda run: [cut(x, 0.5) for x in run.glob("*.pt")],
    "almost whole checkpoint": lambda run: [cut(x, 0.99) for x in run.glob("*.pt")],
    "text for a checkpoint": lambda run: [x.write_text("hello\n") for x in run.glob("*.pt")],
    "code for a checkpoint": lambda run: [torch.save(Malicious(run / "executed"), x) for x in run.glob("*.pt")],
    "other object": lambda run: [torch.save([1, 2], x) for x in run.glob("*.pt")],
    "no args.json": lambda run: (run / "args.json").unlink(),
    "half args.json": lambda run: cut(run / "args.json", 0.5),
    "list for args.json": lambda run: (run / "args.json").write_text("[]"),
    "unknown setting": lambda run: edit(run / "args.json", no_such_setting=1),
    "wrong type": lambda run: edit(run / "args.json", num_envs="four"),
    "wrong value": lambda run: edit(run / "args.json", gamma=7),
    "other task": lambda run: edit(run / "args.json", env_id="Target-v0"),
    "other size": lambda run: edit(run / "args.json", hidden_size=32),
}


# -------------------------------------------------------------------------------------------------- scripted simulators


class Simulator:
    """What the scripts use of EnvPool's Atari games; subclasses say what a step of one game brings."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)
    metadata = NEXT_STEP

    def __init__(self, num_envs):
        self.games = [self.game(n) for n in range(num_envs)]
        self.done = np.zeros(num_envs, bool)

    def reset(self):
        return self.stack([next(game) for game in self.games])[0], {}

    def step(self, actions):
        rows = [game.send(int(action)) for game, action in zip(self.games, actions)]
        obs, raw, terminated, truncated, over = self.stack(rows)
        return obs, np.sign(raw).astype(np.float32), terminated, truncated, {"reward": raw, "terminated": over}

    def stack(self, rows):
        """Rows of (pixel or image, raw reward, terminated, truncated, game over) as arrays over the environments."""
        images, raw, *flags = zip(*rows)
        obs = np.stack([np.broadcast_to(np.uint8(image), (4, 84, 84)) for image in images])
        terminated, truncated, over = (np.array(x, bool) for x in flags)
        return obs, np.array(raw, np.float32), terminated, truncated, over.astype(np.int32)

    def close(self):
        pass


# Games as lists of lives: (steps, how it ends). The game's score is the sum of its raw rewards, whatever its lives.
GAMES = [
    [(3, "life"), (5, "life"), (2, "over")],
    [(4, "life"), (3, "timeout")],
    [(6, "over")],
    [(2, "timeout")],
]


def scripted_game(n):
    """Rewards 1, 2, ... -3 per step and shows the step of the life; the last picture of a life is 255."""
    for index in range(n, 10_000):
        for steps, end in GAMES[index % len(GAMES)]:
            yield 0, 0, False, False, False  # the first picture: of a reset, or of the dummy step that resets
            for k in range(1, steps + 1):
                last = k == steps
                ends = last and end in ("life", "over"), last and end == "timeout", last and end == "over"
                yield 255 if last else k, (k % 4) * 2 - 3, *ends


class Scripted(Simulator):
    game = staticmethod(scripted_game)


@SCRIPTS
def test_scores_span_lives_and_timeouts_and_dummy_rows_are_dropped(script, tmp_path, monkeypatch):
    samples, gradient, rollouts, gae = [], script.minibatch_gradient, [], script.compute_gae

    def record_gradient(function, agent, parameters, batch, indices, *rest):
        samples.append((batch["obs"][indices][:, 0, 0, 0].tolist(), indices.tolist()))
        return gradient(function, agent, parameters, batch, indices, *rest)

    def record_gae(rewards, values, terminated, truncated, *rest):
        rollouts.append([np.asarray(x).copy() for x in (rewards, values, terminated, truncated)])
        return gae(rewards, values, terminated, truncated, *rest)

    monkeypatch.setattr(script, "minibatch_gradient", record_gradient)
    monkeypatch.setattr(script, "compute_gae", record_gae)
    monkeypatch.setattr(
        script, "make_envs", lambda args, num, seed: (Scripted(num), Scripted.observation_space, Scripted.action_space)
    )
    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros(1))
    settings = dict(num_envs=3, num_steps=11, minibatch_size=8, total_timesteps=90, checkpoint_interval=1)
    run_dir = train(script, tmp_path, **settings)

    # The rows of each environment, written out from GAMES: (raw reward, terminated, truncated, game over) or a dummy.
    metrics = read(run_dir / "metrics.csv")
    length = 11 * len(metrics)
    columns = []
    for n in range(3):
        rows = []
        for index in range(n, 40):
            for steps, end in GAMES[index % len(GAMES)]:
                rows += [((k % 4) * 2 - 3, "") for k in range(1, steps)] + [((steps % 4) * 2 - 3, end), None]
        columns.append(rows[:length])
    valid = np.array([[row is not None for row in rows] for rows in columns]).T
    steps = valid.sum(1).cumsum()
    assert column(metrics, "step").tolist() == steps[10::11].tolist() and steps[-1] >= 90

    games, score, played = [], np.zeros(3), np.zeros(3, int)
    for t in range(length):
        for n in range(3):
            if columns[n][t] is not None:
                score[n], played[n] = score[n] + columns[n][t][0], played[n] + 1
                if columns[n][t][1] in ("over", "timeout"):
                    games.append((steps[t], score[n], played[n]))
                    score[n] = played[n] = 0
    found = [(row["step"], row["return"], row["length"]) for row in read(run_dir / "episodes.csv")]
    assert found == games and len({game[1] for game in games}) == 3

    # Learning sees clipped rewards; a lost life terminates, a timeout truncates, and is bootstrapped from.
    rewards, _, terminated, truncated = (np.concatenate(x) for x in zip(*rollouts))
    for n, t in np.ndindex(3, length):
        raw, end = columns[n][t] or (0, "")
        assert rewards[t, n] == np.sign(raw)
        assert (terminated[t, n], truncated[t, n]) == (end in ("life", "over"), end == "timeout")
    assert truncated.sum() > 3 and terminated.sum() > 9
    agent = script.Agent(4, 3, script.Args(**TINY))
    script.load_agent(agent, script.load_run(run_dir, "checkpoint.pt")[1], run_dir)

    # Every real row is in some minibatch, no dummy in any: theirs is the last picture, 255.
    assert max(max(pictures) for pictures, _ in samples) < 6
    for size in np.diff([0, *steps[10::11]]):
        iteration, samples = samples[: math.ceil(size / 8)], samples[math.ceil(size / 8) :]
        assert len({index for _, indices in iteration for index in indices}) == size
    assert not samples


def test_timeout_bootstraps_from_the_last_picture(tmp_path, monkeypatch):
    """The value that follows a timeout's row is that of picture 255, though the row itself is never trained on."""
    seen, gae = [], bpo.compute_gae
    monkeypatch.setattr(bpo, "compute_gae", lambda r, v, te, tr, *x: seen.append((v, tr)) or gae(r, v, te, tr, *x))
    monkeypatch.setattr(
        bpo, "make_envs", lambda args, num, seed: (Scripted(num), Scripted.observation_space, Scripted.action_space)
    )
    monkeypatch.setattr(bpo, "evaluate", lambda *_: np.zeros(1))
    made, agent_class = [], bpo.Agent
    monkeypatch.setattr(bpo, "Agent", lambda *x: made.append(agent_class(*x)) or made[-1])
    before = []
    monkeypatch.setattr(
        bpo,
        "minibatch_moments",
        lambda x, f=bpo.minibatch_moments: before.append(made[0](last)["values"].item()) or f(x),
    )
    last = torch.full((1, 84, 84, 4), 255, dtype=torch.uint8)
    train(bpo, tmp_path, num_envs=4, total_timesteps=40)
    (values, truncated), value = seen[0], before[0]
    at = np.argwhere(truncated)
    assert len(at) > 2 and all(values[t + 1, n].item() == pytest.approx(value, rel=1e-4) for t, n in at)
    assert len({round(x, 5) for x in values.flatten().tolist()}) > 4


def side_game(n):
    """Shows a bright half for five steps; action 0 on the left or 1 on the right scores 2, all else -1."""
    rng, pictures = np.random.default_rng(n), np.zeros((2, 4, 84, 84), np.uint8)
    pictures[0, ..., :42], pictures[1, ..., 42:] = 200, 200
    while True:
        side = rng.integers(2)
        action = yield pictures[side], 0, False, False, False
        for k in range(5):
            score, side = 2 if action == side else -1, rng.integers(2)
            action = yield pictures[side], score, k == 4, False, k == 4


class Sides(Simulator):
    game = staticmethod(side_game)


@SCRIPTS
def test_agent_learns_to_act_on_what_it_sees(script, tmp_path, monkeypatch):
    monkeypatch.setattr(
        script, "make_envs", lambda args, num, seed: (Sides(num), Sides.observation_space, Sides.action_space)
    )
    settings = dict(num_envs=8, num_steps=16, minibatch_size=32, update_epochs=3, total_timesteps=2000)
    run_dir = train(script, tmp_path, **settings, ent_coef=0.001, eval_episodes=4)
    returns = column(read(run_dir / "episodes.csv"), "return")
    assert returns[:40].mean() < 3 and returns[-40:].mean() > 8
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["deterministic"]["mean"] > 9 and len(evaluation["stochastic"]["returns"]) == 4


# ------------------------------------------------------------------------------------------------------ real simulators


def breakout_score(ram):
    """The score that Breakout keeps for its own display, as decimal digits in two bytes."""
    return sum(10**place * int(digit) for place, digit in enumerate(f"{ram[76]:02x}{ram[77]:02x}"[::-1]))


@SCRIPTS
def test_episodes_hold_breakouts_own_score(script, tmp_path, monkeypatch):
    """Over lost lives and over timeouts, which are made to come after 170 steps; read from the console's memory."""
    ends, make = [], script.envpool.make

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

    monkeypatch.setattr(script.envpool, "make", make_recorded)
    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros(1))
    settings = dict(num_envs=8, num_steps=128, minibatch_size=1024, total_timesteps=4000)
    run_dir = train(script, tmp_path, env_id="BreakoutNoFrameskip-v4", **settings)
    rows = read(run_dir / "episodes.csv")
    assert column(rows, "return").tolist() == [score for score, *_ in ends]
    assert len(rows) > 15 and len(set(column(rows, "return"))) > 2
    timeouts = [row["length"] for row, (_, truncated, _) in zip(rows, ends) if truncated]
    assert timeouts and set(timeouts) == {170} and any(not truncated for _, truncated, _ in ends)
    assert any(lives > 0 for _, _, lives in ends) and column(rows, "length").min() > 5 * 15  # five lives, not one


@SCRIPTS
def test_no_frameskip_names_are_those_of_the_same_games(script):
    pictures = []
    for env_id in ("BreakoutNoFrameskip-v4", "Breakout-v5"):
        envs, obs_space, action_space = script.make_envs(script.Args(env_id=env_id, device="cpu"), 2, 5)
        pictures.append(envs.reset()[0])
        assert obs_space.shape == (4, 84, 84) and action_space.n == 4
        envs.close()
    assert np.array_equal(*pictures)


PEAK = """
import resource, sys, bpo_atari_envpool as bpo
sizes, gradient = [], bpo.minibatch_gradient
def record(function, agent, parameters, batch, *rest):
    sizes.append((batch["obs"].dtype, batch["obs"].untyped_storage().nbytes()))
    return gradient(function, agent, parameters, batch, *rest)
bpo.minibatch_gradient = record
bpo.evaluate = lambda *_: bpo.np.zeros(1)
steps = int(sys.argv[2])
bpo.train(bpo.Args(env_id="Pong-v5", device="cpu", num_steps=steps, minibatch_size=64, update_epochs=1,
                   total_timesteps=8 * steps, output_dir=sys.argv[1]))
print(sizes[0][0], sizes[0][1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_rollout_costs_its_bytes_and_no_more(tmp_path):
    """Its own buffer; and the peak of the whole process grows with the rollout's length by no other frames."""
    peaks = {}
    for steps in (128, 512):
        command = [sys.executable, "-c", PEAK, str(tmp_path), str(steps)]
        environment = os.environ | {"PYTHONPATH": str(Path(bpo.__file__).parent), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        dtype, size, peak = run.stdout.split()[-3:]
        assert dtype == "torch.uint8" and int(size) == steps * 8 * 4 * 84 * 84
        peaks[steps] = int(peak)
    more = (512 - 128) * 8 * 4 * 84 * 84
    assert peaks[512] - peaks[128] < 1.2 * more, peaks  # one more copy of the frames as floats would be 5 times that


@pytest.fixture(scope="module", params=BOTH.values(), ids=BOTH)
def breakout(request, tmp_path_factory):
    """A short run of Breakout."""
    folder = tmp_path_factory.mktemp("breakout")
    settings = dict(num_envs=4, num_steps=32, minibatch_size=64, total_timesteps=1000, eval_episodes=2)
    return request.param, train(request.param, folder, **settings, heads="mlp")


def test_metrics_are_complete_and_finite(breakout):
    script, run_dir = breakout
    rows = read(run_dir / "metrics.csv")
    names = "step losses/policy_loss losses/value_loss losses/entropy losses/approx_kl losses/kl losses/clipfrac "
    names += "losses/grad_norm losses/explained_variance charts/mean_return_100 charts/learning_rate charts/SPS "
    names += "time/rollout time/simulation time/update "
    names += "ratio/out_of_bounds ratio/high_mean ratio/high_std ratio/low_mean ratio/low_std "
    if script is bpo:
        names += "losses/median_loss theory/guaranteed_gain theory/atv_divergence theory/improvement_bound"
    assert set(rows[0]) == set(names.split())
    assert all(math.isfinite(x) for row in rows for name, x in row.items() if name != "charts/mean_return_100")
    assert rows[-1]["step"] >= 1000 and math.isfinite(rows[-1]["charts/mean_return_100"])
    assert 0 < rows[0]["time/simulation"] < rows[0]["time/rollout"] and rows[0]["time/update"] > 0
    assert rows[0]["losses/entropy"] == pytest.approx(math.log(4), rel=0.01)


def test_saved_agent_evaluates_in_a_fresh_process_as_after_training(breakout, tmp_path):
    script, run_dir = breakout
    trained = json.loads((run_dir / "evaluation.json").read_text())
    copied = shutil.copytree(run_dir, tmp_path / "copy")
    (copied / "evaluation.json").unlink()
    arguments = ["--evaluate", str(copied), "--eval-episodes", "2", "--capture-video", "--device", "cpu"]
    process = start(script, arguments, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    results = json.loads((copied / "evaluation.json").read_text())
    assert results["deterministic"] == trained["deterministic"]
    assert f"evaluation, stochastic: {results['stochastic']['mean']:.1f}" in out
    import imageio

    (video,) = (copied / "videos").iterdir()
    pictures = imageio.mimread(video, memtest=False)
    assert pictures[0].shape == (210, 160, 3) and len(pictures) > 60 and np.ptp(pictures[0]) > 100


def test_evaluation_scores_whole_games(breakout, monkeypatch):
    script, run_dir = breakout
    args, checkpoint = script.load_run(run_dir, "agent.pt")
    agent = script.Agent(4, 3, args)
    monkeypatch.setattr(script, "make_envs", lambda args, num, seed: (Scripted(num), None, None))
    scores = script.evaluate(agent, script.Args(device="cpu", eval_episodes=4), False, 0)
    assert scores.tolist() == [sum((k % 4) * 2 - 3 for steps, _ in game for k in range(1, steps + 1)) for game in GAMES]


@SCRIPTS
def test_same_seed_same_episodes_and_linear_rate(script, tmp_path):
    settings = dict(num_envs=4, num_steps=32, minibatch_size=32, total_timesteps=800, lr_schedule="linear")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(script, "evaluate", lambda *_: np.zeros(1))
    runs = [train(script, tmp_path / str(i), **settings, seed=seed) for i, seed in enumerate((3, 3, 4))]
    monkey.undo()
    first, same, other = ((run_dir / "episodes.csv").read_bytes() for run_dir in runs)
    assert first == same != other and first.count(b"\n") > 2
    metrics = read(runs[0] / "metrics.csv")
    expected = 2.5e-4 * (1 - np.array([0, *column(metrics, "step")[:-1]]) / 800)
    np.testing.assert_allclose(column(metrics, "charts/learning_rate"), expected, rtol=1e-4)


@SCRIPTS
@pytest.mark.parametrize("bf16, most", [(False, 1e-6), (True, 1e-4)], ids=["float32", "bfloat16"])
def test_first_ratio_is_one(script, bf16, most, tmp_path, monkeypatch):
    """Acting and learning compute the same policy: before the first step nothing has moved."""
    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros(1))
    run_dir = train(script, tmp_path, minibatch_size=32, total_timesteps=20, bf16=bf16)
    (row,) = read(run_dir / "metrics.csv")
    assert abs(row["losses/approx_kl"]) < most and abs(row["losses/kl"]) < most and row["losses/clipfrac"] == 0
    assert row["ratio/high_mean"] > 1 + 1e-5  # the step itself did move it


@SCRIPTS
def test_target_kl_ends_the_epochs(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros(1))
    calls, gradient = [], script.minibatch_gradient
    monkeypatch.setattr(script, "minibatch_gradient", lambda *args: calls.append(1) or gradient(*args))
    for target_kl in (None, 1e-9):
        train(script, tmp_path / str(target_kl), update_epochs=3, total_timesteps=20, target_kl=target_kl)
    assert len(calls) == (3 + 1) * 2  # minibatches of half a rollout


# ----------------------------------------------------------------------------------------------------------- processes


def test_two_processes_train_as_one_run(tmp_path, monkeypatch):
    """The same environments as one process would have, one log, and it can be resumed by one process."""
    settings = TINY | dict(num_envs=4, num_steps=32, minibatch_size=32, checkpoint_interval=1, output_dir=tmp_path)
    command = [sys.executable, bpo.__file__, *options(**settings, total_timesteps=900)]
    ends = run_ranks(command, tmp_path)
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "cpu x 2" in ends[0][1] and "evaluation, deterministic" in ends[0][1] and ends[1][1:] == ("", "")
    (run_dir,) = tmp_path.iterdir()
    metrics, episodes = read(run_dir / "metrics.csv"), read(run_dir / "episodes.csv")
    steps = column(metrics, "step")
    assert steps[-1] >= 900 and (np.diff(steps) > 0).all() and all(math.isfinite(x) for x in metrics[-1].values())
    assert 32 * 4 * 0.9 < steps[0] <= 32 * 4
    lengths = column(episodes, "length")
    assert len(episodes) >= 3 and lengths.min() > 5 * 15 and lengths.sum() <= steps[-1]

    about = json.loads((run_dir / "args.json").read_text())
    about["args"]["total_timesteps"] = 1200
    (run_dir / "args.json").write_text(json.dumps(about))
    monkeypatch.setattr(bpo, "evaluate", lambda *_: np.zeros(1))
    assert bpo.train(bpo.Args(resume=str(run_dir), device="cpu")) == str(run_dir)
    resumed = read(run_dir / "metrics.csv")
    for row, expected in zip(comparable(resumed), comparable(metrics)):
        assert row == pytest.approx(expected, nan_ok=True)
    assert len(resumed) > len(metrics) and resumed[-1]["step"] >= 1200


@SCRIPTS
def test_environments_split_over_processes_are_those_of_one(script, monkeypatch):
    asked = []

    def record(args, num_envs, seed):
        asked.append((args, num_envs, seed))
        raise script.BadInput("that is all")

    with monkeypatch.context() as patch:
        patch.setattr(script, "make_envs", record)
        for world_size, rank in ((1, 0), (2, 0), (2, 1)):
            patch.setattr(script, "WORLD_SIZE", world_size)
            patch.setattr(script, "RANK", rank)
            with pytest.raises(script.BadInput, match="that is all"):
                script.train(script.Args(device="cpu", num_envs=4, seed=7))
    whole, *halves = (script.make_envs(*x)[0] for x in asked)
    expected = whole.reset()[0]
    assert np.array_equal(np.concatenate([half.reset()[0] for half in halves]), expected)
    assert not np.array_equal(expected[:2], expected[2:])


# ----------------------------------------------------------------------------------------------------------- resuming


@SCRIPTS
def test_a_stopped_run_goes_on_where_it_was(script, tmp_path, monkeypatch):
    settings = TINY | dict(num_envs=4, num_steps=32, minibatch_size=64, total_timesteps=1500, checkpoint_interval=2)
    arguments = options(**settings, output_dir=tmp_path / "stopped")
    process = start(script, arguments, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.time() + 100
    while time.time() < deadline:
        metrics = list((tmp_path / "stopped").glob("*/metrics.csv"))
        if metrics and metrics[0].read_text().count("\n") >= 4:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    _, err = process.communicate(timeout=60)
    (run_dir,) = (tmp_path / "stopped").iterdir()
    assert process.returncode == 1 and len(err.splitlines()) == 1, err
    assert "stopped at step" in err and f"--resume {run_dir}" in err
    step = torch.load(run_dir / "checkpoint.pt")["step"]
    assert read(run_dir / "metrics.csv")[-1]["step"] == step < 1500

    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros(1))
    unbroken = train(script, tmp_path / "unbroken", **settings)
    with (run_dir / "episodes.csv").open("a") as episodes:
        episodes.write(f"{step + 3},7,7\n{step - 1},7")  # a row past the checkpoint, then half a row
    assert script.train(script.Args(resume=str(run_dir), device="cpu")) == str(run_dir)
    for file in ("metrics.csv", "episodes.csv"):
        resumed, other = read(run_dir / file), read(unbroken / file)
        kept = [row for row in comparable(resumed) if row["step"] <= step]
        wanted = [row for row in comparable(other) if row["step"] <= step]
        assert len(kept) == len(wanted) < len(resumed)
        for row, expected in zip(kept, wanted):
            assert row == pytest.approx(expected, nan_ok=True)
    assert read(run_dir / "metrics.csv")[-1]["step"] >= 1500


def test_resuming_restores_every_tensor(breakout, monkeypatch, tmp_path):
    script, run_dir = breakout
    run_dir = shutil.copytree(run_dir, tmp_path / "run")
    (run_dir / "evaluation.json").unlink()  # as if it had been killed before: else it is complete
    made = {}

    class Stop(Exception):
        pass

    def keep(name, function):
        def call(*args, **kwargs):
            made[name] = function(*args, **kwargs)
            return made[name]

        return call

    def stop(*_, **__):  # the log opens when everything is loaded
        made["rng_state"] = torch.get_rng_state()
        raise Stop

    monkeypatch.setattr(script, "Agent", keep("agent", script.Agent))
    monkeypatch.setattr(torch.optim, "Adam", keep("optimizer", torch.optim.Adam))
    monkeypatch.setattr(script, "SummaryWriter", stop)
    with pytest.raises(Stop):
        script.train(script.Args(resume=str(run_dir), device="cpu"))
    assert not (run_dir / "agent.pt").exists(), "the run would count as complete before it is"
    checkpoint = torch.load(run_dir / "checkpoint.pt")
    agent, optimizer = made["agent"].state_dict(), made["optimizer"].state_dict()
    assert agent.keys() == checkpoint["agent"].keys()
    assert all(torch.equal(agent[name], x) for name, x in checkpoint["agent"].items())
    restored, saved = optimizer["state"][0], checkpoint["optimizer"]["state"][0]
    assert saved["step"] > 0 and all(torch.equal(restored[name], saved[name]) for name in saved)
    assert torch.equal(made["rng_state"], checkpoint["rng_state"])
    (flat,) = made["optimizer"].param_groups[0]["params"]  # the optimizer's vector is still what the network reads
    parameters = list(made["agent"].parameters())
    assert torch.equal(flat, torch.nn.utils.parameters_to_vector(parameters).detach())
    assert all(p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in parameters)


# ---------------------------------------------------------------------------------------------------------- bad input


@SCRIPTS
def test_nan_loss_stops_the_run_and_names_the_loss(script, tmp_path, monkeypatch):
    calls, policy_loss = [], script.policy_loss

    def broken(*args):
        calls.append(1)
        return policy_loss(*args) * (math.nan if len(calls) > 5 else 1)

    monkeypatch.setattr(script, "policy_loss", broken)
    with pytest.raises(SystemExit, match="error: losses/policy_loss is nan at step .*--resume"):
        train(script, tmp_path, total_timesteps=9000, checkpoint_interval=1)
    (run_dir,) = tmp_path.iterdir()
    _, checkpoint = script.load_run(run_dir, "checkpoint.pt")
    assert all(torch.isfinite(x).all() for x in checkpoint["agent"].values()) and checkpoint["step"] > 0


NAN = math.nan
BAD = [
    ({"env_id": "Brakout-v5"}, "did you mean Breakout-v5"),
    ({"env_id": "BrakoutNoFrameskip-v4"}, "no game BrakoutNoFrameskip-v4: did you mean Breakout-v5"),
    ({"env_id": "zzz"}, "EnvPool has no game zzz"),
    ({"env_id": "CartPole-v1"}, "CartPole-v1 is no Atari game"),
    ({"env_id": "Hopper-v4"}, "Hopper-v4 is no Atari game"),
    ({"device": "cuda"}, "needs a GPU per process, and PyTorch finds 0: pass --device cpu"),
    ({"cuda_graphs": True}, "--cuda-graphs needs"),
]
BAD_VALUES = dict(total_timesteps=[0], num_envs=[0, -1], num_steps=[0], update_epochs=[0], eval_episodes=[0])
BAD_VALUES |= dict(minibatch_size=[0, 1, 8 * 128 + 1], checkpoint_interval=[0], seed=[-1], learning_rate=[0.0, NAN])
BAD_VALUES |= dict(clip_coef=[0.0, NAN], max_grad_norm=[0.0], gamma=[1.1, NAN], gae_lambda=[-0.1], ent_coef=[-1.0])
BAD_VALUES |= dict(value_coef=[math.inf], target_kl=[0.0])
BAD_BPO_VALUES = dict(temperature=[0.0, NAN], median_temperature=[0.0], median_coef=[-1.0], tv_coef=[NAN])
BAD_INPUT = [(script, *case) for script in (bpo, ppo) for case in BAD]
for scripts, table in ((BOTH.values(), BAD_VALUES), ([bpo], BAD_BPO_VALUES)):
    for name, values in table.items():
        words = f"--{name.replace('_', '-')} must be"
        BAD_INPUT += [(script, {name: value}, words) for script in scripts for value in values]
BAD_INPUT += [
    (bpo, {"ratio_low": 1.0}, "bounds"),
    (bpo, {"ratio_high": 0.9}, "bounds"),
    (ppo, {"clip_coef": 1.5}, "bounds"),
    (bpo, {"divergence": "kl", "clip_coef": 1.0}, "--divergence must be atv or tv"),
]


@pytest.mark.parametrize("script, settings, words", BAD_INPUT, ids=lambda x: getattr(x, "SCRIPT", "")[:3] or str(x))
def test_bad_settings_are_one_line_before_anything_is_created(script, settings, words, tmp_path):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(script.BadInput, match=words) as error:
        script.train(script.Args(**{"device": "cpu", "output_dir": str(tmp_path / "out"), **settings}))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@SCRIPTS
def test_sizes_that_the_processes_cannot_share(script, monkeypatch):
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    for settings in (dict(num_envs=8, minibatch_size=255), dict(num_envs=9, minibatch_size=256)):
        with pytest.raises(script.BadInput, match="must be a multiple of the 3 processes"):
            script.check_args(script.Args(device="cpu", **settings))


@SCRIPTS
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--env-id", "Brakout-v5"], "did you mean"),
        (["--minibatch-size", "4096"], "--minibatch-size must be"),
        (["--resume", "missing"], "cannot read missing"),
        (["--output-dir", "/proc/out"], "choose another --output-dir"),
    ],
    ids=lambda x: "" if isinstance(x, str) else x[0],
)
def test_bad_input_on_the_command_line(script, arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, lines = command_line(script, [*arguments, "--device", "cpu"], monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use", ["resume", "evaluate"])
@pytest.mark.parametrize(
    "damage", [*(x for x in DAMAGES if x not in ("other task", "other size")), "sibling's run", "other heads"]
)
def test_unusable_run_is_one_line(breakout, use, damage, tmp_path, monkeypatch):
    maker, run_dir = breakout
    script = {bpo: ppo, ppo: bpo}[maker] if damage == "sibling's run" else maker
    run_dir = shutil.copytree(run_dir, tmp_path / "run")
    DAMAGES.get(damage, lambda run: None)(run_dir)
    if damage == "other heads":
        about = json.loads((run_dir / "args.json").read_text())
        about["args"]["heads"] = "linear"
        (run_dir / "args.json").write_text(json.dumps(about))
    monkeypatch.chdir(tmp_path)  # an output would land here
    before = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")}
    with pytest.raises(script.BadInput) as error:
        script.main(script.Args(**{use: str(run_dir)}, device="cpu"))
    assert "\n" not in str(error.value) and not any(x in str(error.value) for x in ("leave out", "BadInput"))
    assert {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")} == before
