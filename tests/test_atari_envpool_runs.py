"""Real runs of the BPO and PPO scripts for Atari: scores, dummy rows, processes, resuming, bad input."""

import json
import math
import runpy
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_atari_envpool import run_ranks
from test_continuous_action_runs import column, comparable, options, read, signal_handlers  # noqa: F401 (a fixture)

import bpo_atari_envpool as bpo
import ppo_atari_envpool as ppo

BOTH = {"bpo": bpo, "ppo": ppo}
SCRIPTS = pytest.mark.parametrize("script", BOTH.values(), ids=BOTH)
TINY = dict(device="cpu", num_envs=2, num_steps=16, minibatch_size=16, update_epochs=1, checkpoint_seconds=0)


def train(script, folder, **settings):
    return Path(script.train(script.Args(**{**TINY, "output_dir": str(folder), **settings})))


# --- scripted simulators


class Simulator:
    """What the scripts use of EnvPool's Atari games; subclasses say what a step of one game brings."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, num_envs):
        self.games = [self.game(n) for n in range(num_envs)]

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


def play(simulator, script, monkeypatch):
    make = lambda args, num, key: (simulator(num), simulator.observation_space, simulator.action_space)  # noqa: E731
    monkeypatch.setattr(script, "make_envs", make)


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
            yield 0, 99, False, False, False  # the first picture: of a reset, or of the dummy step that resets
            for k in range(1, steps + 1):
                last = k == steps
                ends = last and end in ("life", "over"), last and end == "timeout", last and end == "over"
                yield 255 if last else k, (k % 4) * 2 - 3, *ends


class Scripted(Simulator):
    game = staticmethod(scripted_game)


@SCRIPTS
def test_scores_span_lives_and_timeouts_and_dummy_rows_are_dropped(script, tmp_path, monkeypatch):
    samples, take, rollouts, gae, last_values = [], script.take, [], script.compute_gae, []

    def record_take(batch, indices, moments):
        samples.append((batch["obs"][indices][:, 0, 0, 0].tolist(), indices.tolist(), batch["obs"].data_ptr()))
        return take(batch, indices, moments)

    def record_gae(rewards, values, terminated, truncated, *rest):
        rollouts.append([np.asarray(x).copy() for x in (rewards, terminated, truncated)])
        last_values.append(values[1:][truncated].tolist())
        return gae(rewards, values, terminated, truncated, *rest)

    monkeypatch.setattr(script, "take", record_take)
    monkeypatch.setattr(script, "compute_gae", record_gae)
    play(Scripted, script, monkeypatch)
    run_dir = train(script, tmp_path, num_envs=3, num_steps=11, minibatch_size=8, total_timesteps=90)

    # The rows of each environment, written out from GAMES: (raw reward, how the life ends) or None for a dummy.
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
    for t, n in np.ndindex(length, 3):
        if columns[n][t] is not None:
            score[n], played[n] = score[n] + columns[n][t][0], played[n] + 1
            if columns[n][t][1] in ("over", "timeout"):
                games.append((steps[t], score[n], played[n]))
                score[n] = played[n] = 0
    found = [(row["step"], row["return"], row["length"]) for row in read(run_dir / "episodes.csv")]
    assert found == games and len({game[1] for game in games}) == 3

    # Learning sees clipped rewards; a lost life terminates, a timeout truncates, and is bootstrapped from: the value
    # after it is that of the last picture, the same wherever a timeout comes.
    rewards, terminated, truncated = (np.concatenate(x) for x in zip(*rollouts))
    for n, t in np.ndindex(3, length):
        if columns[n][t]:
            raw, end = columns[n][t]
            assert (rewards[t, n], terminated[t, n], truncated[t, n]) == (
                np.sign(raw),
                end in ("life", "over"),
                end == "timeout",
            )
    assert truncated.sum() > 3 and terminated.sum() > 9
    assert all(values == pytest.approx(values[:1] * len(values), rel=1e-4) for values in last_values)

    # Every real row is in some minibatch, no dummy in any: theirs is the last picture, 255. The last take measures.
    assert max(max(pictures) for pictures, *_ in samples) < 6
    for size in np.diff([0, *steps[10::11]]):
        count = math.ceil(size / 8)
        iteration, samples = samples[:count], samples[count + 1 :]
        assert len({index for _, indices, _ in iteration for index in indices}) == size
    assert not samples


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


@pytest.mark.slow
@SCRIPTS
def test_agent_learns_to_act_on_what_it_sees(script, tmp_path, monkeypatch):
    play(Sides, script, monkeypatch)
    sizes = dict(num_envs=8, num_steps=16, minibatch_size=32, update_epochs=3, total_timesteps=2000)
    run_dir = train(script, tmp_path, **sizes, ent_coef=0.001, checkpoint_seconds=30)
    returns = column(read(run_dir / "episodes.csv"), "return")
    assert returns[:40].mean() < 3 and returns[-40:].mean() > 8


@SCRIPTS
def test_metrics_of_very_few_samples_are_finite(script, tmp_path, monkeypatch):
    """One of the two steps of a rollout may be a dummy: statistics of a single sample."""
    play(Sides, script, monkeypatch)
    sizes = dict(num_envs=1, num_steps=2, minibatch_size=2, norm_adv=True, total_timesteps=8)
    rows = read(train(script, tmp_path, **sizes) / "metrics.csv")
    assert 1 in np.diff([0, *column(rows, "step")])
    unknown = ("charts/mean_return_100", "charts/mean_length_100")  # until the first game is over
    assert not [name for row in rows for name, x in row.items() if not math.isfinite(x) and name not in unknown]


@SCRIPTS
def test_target_kl_ends_the_epochs(script, tmp_path, monkeypatch):
    play(Sides, script, monkeypatch)
    calls, gradient = [], script.minibatch_gradient
    monkeypatch.setattr(script, "minibatch_gradient", lambda *args: calls.append(1) or gradient(*args))
    for target_kl in (None, 1e-9):
        train(script, tmp_path / str(target_kl), update_epochs=3, total_timesteps=20, target_kl=target_kl)
    assert len(calls) == (3 + 1) * 2  # minibatches of half a rollout


@SCRIPTS
def test_nan_loss_stops_the_run_and_keeps_a_good_checkpoint(script, tmp_path, monkeypatch):
    play(Sides, script, monkeypatch)
    calls, policy_loss = [], script.policy_loss
    monkeypatch.setattr(
        script, "policy_loss", lambda *x: calls.append(1) or policy_loss(*x) * (math.nan if len(calls) > 9 else 1)
    )
    with pytest.raises(script.BrokenRun, match="losses/policy_loss is nan at step "):
        train(script, tmp_path, total_timesteps=9000)
    (run_dir,) = tmp_path.iterdir()
    _, checkpoint = script.load_run(run_dir, "checkpoint.pt")
    assert all(x.isfinite().all() for x in checkpoint["agent"].values()) and checkpoint["step"] > 0


# --- real games


def breakout_score(ram):
    """The score that Breakout keeps for its own display, as decimal digits in two bytes."""
    return sum(10**place * int(digit) for place, digit in enumerate(f"{ram[76]:02x}{ram[77]:02x}"[::-1]))


@pytest.mark.slow
def test_episodes_hold_breakouts_own_score(tmp_path, monkeypatch):
    """Over lost lives and over timeouts, which are made to come after 170 steps; read from the console's memory."""
    ends, make = [], bpo.envpool.make

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

    monkeypatch.setattr(bpo.envpool, "make", make_recorded)
    sizes = dict(num_envs=8, num_steps=128, minibatch_size=1024, total_timesteps=3000, checkpoint_seconds=30)
    rows = read(train(bpo, tmp_path, env_id="BreakoutNoFrameskip-v4", **sizes) / "episodes.csv")
    assert column(rows, "return").tolist() == [score for score, *_ in ends]
    assert len(rows) > 10 and len(set(column(rows, "return"))) > 2
    timeouts = [row["length"] for row, (_, truncated, _) in zip(rows, ends) if truncated]
    assert timeouts and set(timeouts) == {170} and any(not truncated for _, truncated, _ in ends)
    assert any(lives > 0 for _, _, lives in ends) and column(rows, "length").min() > 5 * 15  # five lives, not one


@SCRIPTS
def test_seeds_parts_of_a_run_and_processes_share_no_simulator(script):
    starts = []
    for env_id, key in (("Breakout-v5", [1, 0, 0]), ("Breakout-v5", [2, 0, 0]), ("Breakout-v5", [1, 512, 0]),
                        ("Breakout-v5", [1, 0, 1]), ("BreakoutNoFrameskip-v4", [1, 0, 0])):  # fmt: skip
        envs, obs_space, action_space = script.make_envs(script.Args(env_id=env_id, device="cpu"), 2, key)
        assert (obs_space.shape, action_space.n) == ((4, 84, 84), 4)
        envs.reset()
        pictures = [envs.step(np.array([2, 3]))[0] for _ in range(40)][-1]
        starts.append(pictures)
        envs.close()
    np.testing.assert_array_equal(starts[0], starts[4])  # another name of the same game
    assert len(np.unique(np.concatenate(starts[:4]), axis=0)) > 4  # few different starts: pictures may coincide


@SCRIPTS
@pytest.mark.parametrize("bf16, most", [(False, 1e-6), (True, 1e-4)], ids=["float32", "bfloat16"])
def test_first_ratio_is_one(script, bf16, most, tmp_path):
    """Acting and learning compute the same policy: before the first step nothing has moved."""
    (row,) = read(train(script, tmp_path, minibatch_size=32, total_timesteps=20, bf16=bf16) / "metrics.csv")
    assert abs(row["losses/approx_kl"]) < most and abs(row["losses/kl"]) < most and row["losses/clipfrac"] == 0
    assert row["ratio/high_mean"] > 1 + 1e-5  # the step itself did move it
    assert row["losses/entropy"] == pytest.approx(math.log(4), rel=0.01)


@pytest.mark.slow
def test_same_seed_same_episodes_and_linear_rate(tmp_path):
    settings = dict(num_envs=4, num_steps=32, minibatch_size=128, total_timesteps=800, lr_schedule="linear")
    runs = [train(bpo, tmp_path / str(i), **settings, seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, same, other = ((run_dir / "episodes.csv").read_bytes() for run_dir in runs)
    assert first == same != other and first.count(b"\n") > 2
    metrics = read(runs[0] / "metrics.csv")
    expected = 2.5e-4 * (1 - np.array([0, *column(metrics, "step")[:-1]]) / 800)
    np.testing.assert_allclose(column(metrics, "charts/learning_rate"), expected, rtol=1e-4)


def stop_after(rows, folder, number=0):
    """For run_ranks: SIGTERM to one process as soon as the only run's metrics have so many rows."""

    def until(processes):
        deadline = time.time() + 200
        while time.time() < deadline and processes[number].poll() is None:
            found = list(folder.glob("*/metrics.csv"))
            if found and found[0].read_text().count("\n") > rows:
                return processes[number].send_signal(signal.SIGTERM)
            time.sleep(0.02)

    return until


@pytest.mark.slow
def test_two_processes_train_as_one_run_and_stop_together(tmp_path):
    """A signal to the second one ends both; the run is one log, and one process goes on with it."""
    settings = TINY | dict(num_envs=4, num_steps=32, minibatch_size=64, output_dir=str(tmp_path))
    command = [sys.executable, bpo.__file__, *options(**settings, total_timesteps=90_000)]
    (code, out, err), second = run_ranks(command, tmp_path, stop_after(4, tmp_path, number=1))
    (run_dir,) = tmp_path.iterdir()
    assert second == (0, "", "") and (code, len(err.splitlines())) == (1, 1), (out, err)
    assert f"--resume {run_dir}" in err and "stopped at step" in err
    metrics, checkpoint = read(run_dir / "metrics.csv"), torch.load(run_dir / "checkpoint.pt")
    steps = column(metrics, "step")
    assert steps[-1] == checkpoint["step"] and (np.diff(steps) > 0).all() and 32 * 4 * 0.9 < steps[0] <= 32 * 4
    assert not [name for name, x in metrics[-1].items() if not math.isfinite(x) and "mean_" not in name]

    total = str(int(steps[-1]) + 200)
    args = bpo.read_args(["--resume", str(run_dir), "--total-timesteps", total])
    assert bpo.train(args) == str(run_dir)
    resumed = read(run_dir / "metrics.csv")
    for row, expected in zip(comparable(resumed), comparable(metrics)):
        assert row == pytest.approx(expected, nan_ok=True)
    assert len(resumed) > len(metrics) and resumed[-1]["step"] >= int(total)
    lengths = column(read(run_dir / "episodes.csv"), "length")
    assert len(lengths) and lengths.min() > 5 * 15 and lengths.sum() <= resumed[-1]["step"]


def test_a_resumed_run_has_the_state_of_its_checkpoint(tmp_path, monkeypatch):
    run_dir = train(ppo, tmp_path, total_timesteps=60)
    checkpoint, seen = torch.load(run_dir / "checkpoint.pt"), {}

    def stop(agent, envs, state, args):
        raise KeyboardInterrupt

    begin = ppo.Run.begin
    monkeypatch.setattr(ppo.Run, "begin", lambda run, **parts: begin(run, **parts) or seen.update(parts))
    monkeypatch.setattr(ppo, "collect", stop)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(ppo.read_args(["--resume", str(run_dir), "--total-timesteps", "90"]))
    for name in ("agent", "optimizer"):
        torch.testing.assert_close(seen[name].state_dict(), checkpoint[name], rtol=0, atol=0)
    assert checkpoint["optimizer"]["state"][0]["step"] > 0 and not (run_dir / "agent.pt").exists()
    (flat,) = seen["optimizer"].param_groups[0]["params"]  # the optimizer's vector is still what the network reads
    assert all(x.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for x in seen["agent"].parameters())


# --- bad input


def command_line(script, words, monkeypatch, capsys):
    """Runs the script as __main__ in this process: its exit status and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    return stop.value.code, capsys.readouterr().err


HINT = "EnvPool has no game {}: did you mean Pong-v5"
BAD_INPUT = {
    "pong": HINT.format("pong"),
    "PongDeterministic-v4": HINT.format("PongDeterministic-v4"),
    "PongNoFrameskip-v0": HINT.format("PongNoFrameskip-v0"),
    "ALE/Pong-v5": HINT.format("ALE/Pong-v5"),
    "CartPole-v1": "EnvPool has no game CartPole-v1\n",
    "--num-steps 1000000": "no memory for a rollout's frames, 226 GB: lower --num-steps or --num-envs",
    "--device cuda": "needs a GPU per process, and PyTorch finds 0: add --device cpu",
    "--evaluate RUN_DIR": "python enjoy.py RUN_DIR --video",
    "--resume missing": "cannot use the run missing",
    "--output-dir /proc/out --num-envs 2": "choose another --output-dir",
}


@SCRIPTS
@pytest.mark.parametrize("words", BAD_INPUT)
def test_bad_input_is_one_line_before_anything_is_created(script, words, monkeypatch, capsys, tmp_path):
    if words == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    words_, device = words.split() if " " in words else ["--env-id", words], ["--device", "cpu"]
    code, err = command_line(script, [*device, *words_], monkeypatch, capsys)
    assert code == 2 and err.startswith("error: ") and BAD_INPUT[words] in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


BAD_SETTINGS = {
    "--cuda-graphs": "--cuda-graphs needs --compile and --device cuda",
    "--num-steps 1000000000": "num_steps",
    "--num-steps 1": "num_steps",
    "--clip-coef 1.5": "bounds must have 0 <= low < 1 < high",
    "--minibatch-size 4096": "--minibatch-size must be from 2",
    "--learning-rate nan": "learning_rate",
}


@SCRIPTS
@pytest.mark.parametrize("words", BAD_SETTINGS)
def test_bad_settings_are_one_message(script, words, capsys):
    with pytest.raises(SystemExit) as stop:
        script.read_args(["--device", "cpu", *words.split()])
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and BAD_SETTINGS[words] in err and "Traceback" not in err


@SCRIPTS
@pytest.mark.parametrize("sizes", [dict(num_envs=9), dict(minibatch_size=255)], ids=str)
def test_sizes_that_the_processes_cannot_share_are_refused(script, sizes, monkeypatch):
    assert script.Args(device="cpu", **sizes)
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    with pytest.raises(ValueError, match="must be multiples of the 2 processes"):
        script.Args(device="cpu", **sizes)


@pytest.mark.slow
def test_what_is_wrong_with_the_words_is_said_by_one_process(tmp_path):
    ends = run_ranks([sys.executable, bpo.__file__, "--device", "cpu", "--num-envs", "9"], tmp_path)
    assert [code for code, *_ in ends] == [2, 2] and not list(tmp_path.iterdir())
    first, second = (" ".join((out + err).replace("│", " ").split()) for _, out, err in ends)
    assert "--num-envs and --minibatch-size must be multiples of the 2 processes" in first and not second


def test_a_run_may_go_on_on_another_device_but_with_no_other_setting(tmp_path):
    run_dir = train(bpo, tmp_path, total_timesteps=20)
    about = json.loads((run_dir / "args.json").read_text())
    about["args"]["device"] = "cuda"
    (run_dir / "args.json").write_text(json.dumps(about))
    words = ["--resume", str(run_dir), "--total-timesteps", "99"]
    assert bpo.read_args(words).device == "cuda" and bpo.read_args([*words, "--device", "cpu"]).device == "cpu"
    with pytest.raises(bpo.BadInput, match="a run keeps its settings: leave out --heads"):
        bpo.read_args([*words, "--heads", "mlp"])
