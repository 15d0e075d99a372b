"""Runs of the scripts for control on scripted simulators: what is learned, counted, logged and resumed.

What siblings share is run in BPO's scripts alone: test_siblings.py holds that PPO's have the same text.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import sys
import types

import numpy as np
import pytest
import torch
from common import (
    ATARI,
    BPO,
    CONTINUOUS,
    CONTROL,
    ROBOTS,
    ROOT,
    STOPS,
    column,
    command_line,
    contents,
    each,
    options,
    read,
    resume,
    train,
    without_clock,
)
from filelock import Timeout
from probe_envs import LENGTHS, marked, one_step, play
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NAN = math.nan
BATCHES = {x: "num_minibatches" if x in ROBOTS else "minibatch_size" for x in CONTROL}


def recorded(script, monkeypatch):
    """Lists that receive the samples of every iteration, numbered, with what the agent's statistics had counted before
    the update, and its minibatches."""
    samples, minibatches, prepare, gradient = [], [], script.prepare, script.minibatch_gradient

    def number(agent, *rest):
        batch = prepare(agent, *rest)
        rows = batch[0] if script in ATARI else batch
        rows["row"] = torch.arange(len(rows["obs"]))
        samples.append((rows, None if script in ATARI else agent.obs_stats.count[0].item()))
        return batch

    monkeypatch.setattr(script, "prepare", number)
    monkeypatch.setattr(script, "minibatch_gradient", lambda *args: minibatches.append(args[-2]) or gradient(*args))
    return samples, minibatches


# --- samples


CASES = [(x, True) for x in CONTROL] + [(x, False) for x in ROBOTS]
CASES = [pytest.param(*x, id=f"{x[0].__name__}-{'next' if x[1] else 'same'}-step") for x in CASES]


@pytest.mark.parametrize("script, next_step", CASES)
def test_dummy_rows_reach_neither_loss_nor_statistics_nor_step_count(script, next_step, tmp_path, monkeypatch):
    """The observation 1000 (255 in a picture) is only theirs, as is a reward of a million."""
    play(script, monkeypatch, marked, next_step)
    samples, minibatches = recorded(script, monkeypatch)
    own = {x: dict(gamma=0.5, norm_obs=False) for x in CONTINUOUS} | {x: dict(norm_obs=False) for x in ROBOTS}
    settings = dict(num_envs=3, num_steps=12, update_epochs=2, total_timesteps=80) | own.get(script, {})
    run_dir = train(script, tmp_path, **settings, **{BATCHES[script]: 3 if script in ROBOTS else 8})

    # One environment's rows, written out from the lengths of episodes, None for a dummy; all three are alike.
    rows, episodes = [], []
    for e in range(40):
        pay = [3.0 + k for k in range(LENGTHS[e % 4])]
        rows += [(k + 1.0, sum(0.5 ** (k - j) * pay[j] for j in range(k + 1))) for k in range(len(pay))]
        episodes.append((sum(pay), len(pay), len(rows)))
        rows += [None] * next_step
    metrics = read(run_dir / "metrics.csv")
    played = rows[: 12 * len(metrics)]
    real = np.array([row for row in played if row is not None])
    steps = [3 * sum(row is not None for row in rows[: 12 * (i + 1)]) for i in range(len(metrics))]
    assert column(metrics, "step").tolist() == steps and steps[-1] == 3 * len(real) >= 80
    # Robots' first episodes are none if a time limit ended them: they were cut.
    finished = [(total, length) for total, length, end in episodes[script in ROBOTS :] if end <= len(played)]
    found = [(row["return"], row["length"]) for row in read(run_dir / "episodes.csv")]
    assert found == [episode for episode in finished for _ in range(3)]

    state = torch.load(run_dir / "checkpoint.pt")["agent"]
    statistics = {"obs_stats": real[:, 0]} if script not in ATARI else {}
    statistics |= {"privileged_stats": real[:, 0] + 0.5} if script in ROBOTS else {}
    statistics |= {"return_stats": real[:, 1]} if script in CONTINUOUS else {}
    for name, x in statistics.items():
        assert state[f"{name}.count"] == 3 * len(real) and state[f"{name}.mean"].item() == pytest.approx(x.mean())
        assert state[f"{name}.var"].item() == pytest.approx(x.var())
    if script not in ATARI:  # they change between the iterations, not while acting or learning
        assert [count for _, count in samples] == [0, *steps[:-1]]

    # Every real row is in some minibatch of each epoch, no dummy in any; all minibatches have one size.
    assert max(x["obs"].max() for x in minibatches) <= 7 and max(x["returns"].abs().max() for x in minibatches) < 100
    assert {len(x["obs"]) for x in minibatches} == {12 if script in ROBOTS else 8}
    for size in np.diff([0, *steps]):
        epoch = 3 if script in ROBOTS else math.ceil(size / 8)
        for _ in range(2):
            seen = torch.cat([x["row"] for x in minibatches[:epoch]])
            assert len(set(seen.tolist())) == size
            del minibatches[:epoch]
    assert not minibatches


@each(*CONTROL)
def test_old_log_probabilities_stay_those_of_acting_through_all_epochs(script, tmp_path, monkeypatch):
    play(script, monkeypatch, one_step)
    samples, minibatches = recorded(script, monkeypatch)
    train(script, tmp_path, update_epochs=3, total_timesteps=20, **{BATCHES[script]: 2 if script in ROBOTS else 8})
    for x in minibatches[-3:]:
        assert torch.equal(x["log_probs"], samples[-1][0]["log_probs"][x["row"]])
        if script in ATARI:  # whose scale is that of the minibatch's own advantages
            advantages = x["returns"] - x["values"]
            expected = [advantages.mean().item(), advantages.abs().mean().item(), advantages.std().item()]
            assert x["moments"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@each(*CONTROL)
def test_the_update_starts_from_the_policy_that_acted(script, tmp_path, monkeypatch):
    """With one gradient step per iteration nothing has moved when the divergence from the acting policy is taken."""
    play(script, monkeypatch, one_step)
    one = {BATCHES[script]: 1 if script in ROBOTS else 32}
    rows = read(train(script, tmp_path, **one, total_timesteps=60, learning_rate=0.01) / "metrics.csv")
    assert np.abs(column(rows, "losses/kl")).max() < 1e-6 and np.abs(column(rows, "losses/approx_kl")).max() < 1e-6
    assert (column(rows, "losses/clipfrac") == 0).all() and rows[0]["ratio/high_mean"] > 1 + 1e-4  # the step moves it


@each(*BPO)
def test_rollouts_of_one_sample_count(script, tmp_path, monkeypatch):
    """Two steps of one environment whose episodes last one: a sample and a dummy."""
    play(script, monkeypatch, one_step)
    sizes = dict(num_envs=1, num_steps=2, total_timesteps=5, **{BATCHES[script]: 1 if script in ROBOTS else 2})
    metrics = read(train(script, tmp_path, **sizes) / "metrics.csv")
    assert column(metrics, "step").tolist() == [1, 2, 3, 4, 5]
    assert all(math.isfinite(x) for row in metrics for x in row.values())


@each(*CONTINUOUS)
def test_rewards_are_scaled_within_an_episode_also_with_rollouts_of_one_step(script, tmp_path, monkeypatch):
    """All episodes then end at once, and the rollout after that has dummy rows only."""
    play(script, monkeypatch, lambda e, k, action: (0.0, 1.0, "truncated" if k == 4 else ""))
    seen, update = [], script.RunningNormalizer.update

    def record(self, samples):
        if samples.any():  # the observations are all 0
            seen.append(samples.flatten().tolist())
        update(self, samples)

    monkeypatch.setattr(script.RunningNormalizer, "update", record)
    train(script, tmp_path, num_envs=2, num_steps=1, minibatch_size=2, gamma=0.5, norm_obs=False, total_timesteps=20)
    assert seen == [[x, x] for x in (1.0, 1.5, 1.75, 1.875, 1.9375)] * 2


@each(*ATARI)
def test_scores_span_lives_and_timeouts_and_learning_sees_clipped_rewards(script, tmp_path, monkeypatch):
    games = [[(3, "life"), (5, "life"), (2, "terminated")], [(4, "life"), (3, "truncated")], [(6, "terminated")]]
    lives = [life for game in games for life in game]

    def play_lives(e, k, action):
        steps, end = lives[e % len(lives)]
        return k + 1.0, (k % 4) * 2.0 - 3, end if k + 1 == steps else ""

    play(script, monkeypatch, play_lives)
    rollouts, gae = [], script.compute_gae
    monkeypatch.setattr(script, "compute_gae", lambda *args: rollouts.append(args) or gae(*args))
    run_dir = train(
        script, tmp_path, num_envs=2, num_steps=12, minibatch_size=8, learning_rate=1e-30, total_timesteps=90
    )
    scores = [(sum((k % 4) * 2.0 - 3 for n, _ in game for k in range(n)), sum(n for n, _ in game)) for game in games]
    found = [(row["return"], row["length"]) for row in read(run_dir / "episodes.csv")]
    assert len(found) > 6 and found == [scores[i // 2 % 3] for i in range(len(found))]
    # A lost life terminates; a timeout is bootstrapped from: the value after it is that of the last picture.
    rewards, terminated, truncated = (np.concatenate([x[i] for x in rollouts])[:, 0] for i in (0, 2, 3))
    rows = [(np.sign((k % 4) * 2.0 - 3), k + 1 == n and end) for n, end in lives * 9 for k in range(n)]
    rows = [row for reward, end in rows for row in ([(reward, end), (0, False)] if end else [(reward, end)])]
    for t, (reward, end) in enumerate(rows[: len(rewards)]):
        assert (terminated[t], truncated[t]) == (end in ("life", "terminated"), end == "truncated")
        assert rewards[t] == reward or reward == 0  # what a dummy pays is in no sample
    values = np.concatenate([x[1][1:] for x in rollouts])[:, 0][truncated]
    assert len(values) > 1 and values == pytest.approx(values[:1].repeat(len(values)), rel=1e-4)


@each(*ROBOTS)
def test_episodes_are_counted_across_rollouts_and_cut_ones_are_none(script):
    """Environment 0 falls in its first episode; 1 is cut in it; 2 has a dummy step; 3 is terminated at its limit."""
    first, second = torch.zeros(2, 5, 4, dtype=torch.bool), torch.zeros(2, 5, 4, dtype=torch.bool)
    first[0, 1, 0] = first[1, 2, 1] = first[1, 0, 2] = first[0, 3, 3] = first[1, 3, 3] = True
    second[1, 2, 1] = second[1, 4, 2] = True
    state = types.SimpleNamespace(step=100, returns=np.zeros(4), lengths=np.zeros(4), cut=np.ones(4, bool))
    found = []
    for ends in (first, second):
        rewards, valid = torch.arange(1.0, 21).view(5, 4), torch.ones(5, 4, dtype=torch.bool)
        if ends is first:
            valid[1, 2] = False
            rewards[1, 2] = 0
        rollout = dict(rewards=rewards, valid=valid, terminated=ends[0], truncated=ends[1])
        found.append(script.finished_episodes(rollout, state))
    assert found[0] == [(107, 1 + 5, 2), (115, 4 + 8 + 12 + 16, 4)]
    assert found[1] == [(131, 14 + 18 + 2 + 6 + 10, 5), (139, 11 + 15 + 19 + 3 + 7 + 11 + 15 + 19, 8)]
    assert state.step == 139 and state.lengths.tolist() == [8, 2, 0, 6]


# --- schedules, metrics, files


@each(*BPO)
def test_linear_rate_is_what_is_left_of_the_run_when_an_iteration_starts(script, tmp_path, monkeypatch):
    play(script, monkeypatch, marked)
    run_dir = train(script, tmp_path, lr_schedule="linear", learning_rate=0.01, total_timesteps=150)
    rows = read(run_dir / "metrics.csv")
    expected = 0.01 * (1 - np.array([0, *column(rows, "step")[:-1]]) / 150)
    np.testing.assert_allclose(column(rows, "charts/learning_rate"), expected, rtol=1e-4)
    assert len(rows) > 3 and expected[-1] < 0.005


@each(*BPO[:2])
def test_target_kl_ends_the_epochs(script, tmp_path, monkeypatch):
    play(script, monkeypatch, one_step)
    _, minibatches = recorded(script, monkeypatch)
    for target_kl in (None, 1e-9):
        train(script, tmp_path / str(target_kl), update_epochs=3, total_timesteps=5, target_kl=target_kl,
              minibatch_size=8, num_envs=2)  # fmt: skip
    assert len(minibatches) == (3 + 1) * 2  # of 16 samples


@each(*CONTROL)
def test_metrics_are_finite_documented_and_shown_by_tensorboard(script, tmp_path, monkeypatch):
    play(script, monkeypatch, marked)
    run_dir = train(script, tmp_path, total_timesteps=150)
    metrics, episodes = read(run_dir / "metrics.csv"), read(run_dir / "episodes.csv")
    page = (ROOT / "docs" / f"bpo_{script.__name__[4:]}.md").read_text()
    names = [x for x in metrics[0] if not x.startswith("rewards/") and x != "step"]
    assert len(names) > 15 and not [x for x in (*names, "charts/episodic_return") if f"`{x}`" not in page]
    assert ("theory/improvement_bound" in names) == ("losses/median_loss" in names) == (script in BPO)
    assert all(math.isfinite(x) for row in metrics for x in row.values())
    assert (column(metrics, "ratio/high_mean") >= 1).all() and (column(metrics, "ratio/low_mean") <= 1).all()
    for name in ("return", "length"):
        mean = np.mean(column(episodes, name)[-100:])
        assert metrics[-1][f"charts/mean_{name}_100"] == pytest.approx(mean, rel=1e-4)
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    scalars = events.Scalars("charts/episodic_return")
    assert [x.step for x in scalars] == column(episodes, "step").tolist()
    np.testing.assert_allclose([x.value for x in scalars], column(episodes, "return"), rtol=1e-5)
    assert set(events.Tags()["scalars"]) == {"charts/episodic_return", "charts/episodic_length", *metrics[0]} - {"step"}
    about = json.loads((run_dir / "args.json").read_text())
    assert (about["script"], about["format"], set(about["args"])) == (
        script.SCRIPT,
        script.FORMAT,
        {x.name for x in dataclasses.fields(script.Args)},
    )
    assert about["versions"]["torch"] == torch.__version__ and "commit" in about


@each(*ROBOTS)
def test_logs_of_steps_are_kept_and_those_of_episodes_are_nan_where_none_ends(script, tmp_path, monkeypatch, capsys):
    """As in mjlab, whose rewards log something in every step, and whose episodes when they end."""
    play(script, monkeypatch, lambda e, k, action: (0.0, 1.0, "terminated" if k == 29 else ""), next_step=False)
    make_envs, count = script.make_envs, itertools.count()

    def make(*args, **options):
        envs, *spaces = make_envs(*args, **options)
        step, reset = envs.step, envs.reset

        def logging_step(actions):
            *results, info = step(actions)
            info["logs"] = {"Metrics/slip": next(count)}
            if results[2].any():
                info["logs"] |= {"rewards/pay": torch.tensor(7.0), "Metrics/new": 1.0}
            return *results, info

        def first(**options):
            obs, info = reset(**options)
            return obs, info | {"logs": {"rewards/pay": 0.0, "Metrics/slip": 0.0}}

        envs.step, envs.reset = logging_step, first
        return envs, *spaces

    monkeypatch.setattr(script, "make_envs", make)
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    rows = read(train(script, tmp_path, num_steps=12, total_timesteps=4 * 12 * 5) / "metrics.csv")  # ends in 3 and 5
    np.testing.assert_array_equal(column(rows, "rewards/pay"), [NAN, NAN, 7, NAN, 7])
    assert column(rows, "Metrics/slip").tolist() == [5.5, 17.5, 29.5, 41.5, 53.5] and "Metrics/new" not in rows[0]
    live = capsys.readouterr().out.split("\r")[-2]
    assert live.startswith("step 240, ") and "pay" not in live and len(live) < 80  # it must not wrap


@each(*CONTINUOUS)
def test_runs_started_in_one_second_get_their_own_folders(script, tmp_path, monkeypatch):
    play(script, monkeypatch, one_step)
    moments = itertools.count()
    monkeypatch.setattr(script.time, "time", lambda: 1_900_000_000 + next(moments) / 10_000)
    runs = {train(script, tmp_path, total_timesteps=5) for _ in range(2)}
    assert len(runs) == len(list(tmp_path.iterdir())) == 2 and all((run / "agent.pt").exists() for run in runs)


@each(*CONTINUOUS)
def test_names_stay_legal_and_a_run_can_be_resumed_from_inside(script, tmp_path, monkeypatch):
    """Weights & Biases refuses names with a colon or a slash, and a run named "." would not be this one's."""
    began = []
    wandb = types.SimpleNamespace(init=lambda **options: began.append(options), finish=lambda: began.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = dict(env_id="probe_envs:Target-v0", exp_name="a/../b c?", track=True, seed=5)
    run_dir = train(script, tmp_path, **settings, total_timesteps=60)
    assert run_dir.parent == tmp_path and re.fullmatch(r"probe_envs-Target-v0__[\w.-]+__5__[\d.]+", run_dir.name)
    monkeypatch.chdir(run_dir)
    with pytest.raises(script.BadInput, match="if it is yours, add --env-id probe_envs:Target-v0"):
        resume(script, ".", "--total-timesteps", "120")
    assert resume(script, ".", "--env-id", "probe_envs:Target-v0", "--total-timesteps", "120") == "."
    assert len(read(run_dir / "episodes.csv")) == 128 and (run_dir / "agent.pt").exists()
    assert began[1::2] == ["finish"] * 2 and [x["id"] for x in began[::2]] == [run_dir.name] * 2
    assert began[0]["sync_tensorboard"] and began[0]["config"]["seed"] == 5 and "wandb" not in os.listdir()


@each(*CONTINUOUS, *ROBOTS)
def test_progress_line_shows_small_returns(script, tmp_path, monkeypatch, capsys):
    play(script, monkeypatch, lambda e, k, action: (0.0, 0.01, "terminated"))
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    train(script, tmp_path, total_timesteps=30)
    out = capsys.readouterr().out
    assert re.search(r"step \d+, \d+ steps/s, mean return 0.01, ", out) or script in ROBOTS and "pay 5" in out


# --- resuming


@each(*BPO)
def test_resumed_run_equals_an_unbroken_one(script, tmp_path, monkeypatch):
    """Episodes of one step, so that simulators which start anew change nothing: every later row must be the same."""
    keys = play(script, monkeypatch, one_step)
    lr_schedule, total = "constant" if script in ATARI else "adaptive", 4 * 16 if script in ATARI else 4 * 32
    settings = dict(lr_schedule=lr_schedule, total_timesteps=total, update_epochs=2)
    unbroken = train(script, tmp_path / "unbroken", **settings)
    run_dir = train(script, tmp_path / "broken", **settings | dict(total_timesteps=total // 2))
    for name in ("episodes.csv", "metrics.csv"):  # rows past the checkpoint, then half a row, as a kill leaves them
        with (run_dir / name).open("a") as file:
            file.write((run_dir / name).read_text().splitlines()[-1] + "\n999,0.")
    torch.manual_seed(99)
    assert resume(script, run_dir, "--total-timesteps", total) == str(run_dir)
    for name in ("metrics.csv", "episodes.csv"):
        assert without_clock(read(run_dir / name)) == without_clock(read(unbroken / name))
    ours, theirs = (torch.load(x / "checkpoint.pt") for x in (run_dir, unbroken))
    assert all(torch.equal(x, theirs["agent"][name]) for name, x in ours["agent"].items())
    assert torch.equal(ours["rng_state"], theirs["rng_state"]) and ours["step"] == total
    # Each start of a simulator has random numbers of its own.
    assert [key[:2] for key in keys] == [[1, 0], [1, 0], [1, total // 2]]


@each(*BPO)
def test_resuming_restores_every_tensor(script, tmp_path, monkeypatch):
    play(script, monkeypatch, one_step)
    run_dir = train(script, tmp_path, total_timesteps=40, lr_schedule="constant" if script in ATARI else "adaptive")
    checkpoint, seen, begin = torch.load(run_dir / "checkpoint.pt"), {}, script.Run.begin
    monkeypatch.setattr(script.Run, "begin", lambda run, **parts: begin(run, **parts) or seen.update(parts))
    monkeypatch.setattr(script, "collect", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # when all is loaded
    with pytest.raises(KeyboardInterrupt):
        resume(script, run_dir, "--total-timesteps", "90")
    assert not (run_dir / "agent.pt").exists(), "a run that goes on is not complete"
    for name in ("agent", "optimizer"):
        torch.testing.assert_close(seen[name].state_dict(), checkpoint[name], rtol=0, atol=0)
    states, parameters = checkpoint["optimizer"]["state"].values(), list(seen["agent"].parameters())
    assert all(x.keys() == {"step", "exp_avg", "exp_avg_sq"} and x["step"] > 0 for x in states)
    # The optimizer still steps what the networks read.
    stepped = seen["optimizer"].param_groups[0]["params"]
    assert len(states) == len(stepped)
    assert all(p.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in stepped} for p in parameters)


@each(*CONTINUOUS, *ROBOTS)
def test_a_complete_run_goes_on_if_asked_for_more_steps(script, tmp_path, monkeypatch):
    play(script, monkeypatch, one_step)
    run_dir = train(script, tmp_path, total_timesteps=32)
    before, first = contents(run_dir), int(read(run_dir / "metrics.csv")[-1]["step"])
    for words in ([], ["--total-timesteps", first], ["--total-timesteps", "7"]):
        for _ in range(2):  # a refused run can be tried again in the same process
            with pytest.raises(script.BadInput, match="is complete: to go on, add a larger --total-timesteps"):
                resume(script, run_dir, *words)
    assert contents(run_dir) == before
    resume(script, run_dir, "--total-timesteps", 2 * first, "--output-dir", "elsewhere", "--checkpoint-seconds", "7")
    changed = dict(total_timesteps=2 * first, output_dir="elsewhere", checkpoint_seconds=7.0)
    old = json.loads(before[run_dir / "args.json"])
    assert json.loads((run_dir / "args.json").read_text()) == old | {"args": old["args"] | changed}
    episodes, metrics = read(run_dir / "episodes.csv"), read(run_dir / "metrics.csv")
    assert (run_dir / "agent.pt").exists() and len(episodes) == metrics[-1]["step"] == 2 * first
    for row in metrics:
        mean = np.mean(column(episodes, "return")[max(0, int(row["step"]) - 100) : int(row["step"])])
        assert row["charts/mean_return_100"] == pytest.approx(mean, rel=1e-4)


@each(*BPO)
def test_two_processes_never_own_one_run(script, tmp_path, monkeypatch, capsys):
    """Neither a new run nor a resumed one can be resumed while it trains."""
    play(script, monkeypatch, one_step)
    collect, refused = script.collect, []

    def written(run_dir):
        """All files but TensorBoard's, which a thread writes."""
        return {path: x for path, x in contents(run_dir).items() if "tfevents" not in path.name}

    def intrude(*args):
        (run_dir,) = (x.parent for x in tmp_path.rglob("checkpoint.pt"))
        before, handlers = written(run_dir), [script.signal.getsignal(x) for x in STOPS.values()]
        monkeypatch.setattr(script, "collect", collect)  # if it is not refused, it shall not intrude on itself
        with pytest.raises(Timeout):
            resume(script, run_dir, "--total-timesteps", "200")
        refused.append(command_line(script, ["--resume", run_dir], monkeypatch, capsys))
        monkeypatch.setattr(script, "collect", intrude)
        assert written(run_dir) == before
        assert [script.signal.getsignal(x) for x in STOPS.values()] == handlers
        return collect(*args)

    monkeypatch.setattr(script, "collect", intrude)
    run_dir = train(script, tmp_path, total_timesteps=10)
    resume(script, run_dir, "--total-timesteps", "40")
    assert len(refused) >= 2
    for code, lines in refused:
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and "lock" in lines[0]


# --- what breaks


def check_last_checkpoint(script, folder, steps):
    (run_dir,) = folder.iterdir()
    _, checkpoint = script.load_run(run_dir, "checkpoint.pt")
    assert all(x.isfinite().all() for name, x in checkpoint["agent"].items() if not name.startswith("action_"))
    assert (checkpoint["step"] > 0) == steps and not (run_dir / "agent.pt").exists()
    if steps:
        assert checkpoint["step"] == read(run_dir / "metrics.csv")[-1]["step"]


@each(*CONTINUOUS, *ROBOTS)
@pytest.mark.parametrize("reward, obs", [(NAN, 0.0), (1e39, 0.0), (1.0, NAN), (1.0, 1e39)])
def test_task_that_breaks_is_named_and_the_checkpoint_kept(script, reward, obs, tmp_path, monkeypatch):
    play(script, monkeypatch, lambda e, k, _: (obs if e > 30 else 0.0, reward if e > 30 else 1.0, "terminated"))
    names = {True: ("rewards", "obs"), False: ("a reward", "an observation")}[script in ROBOTS]
    name, verb = names[reward == 1.0], "are" if script in ROBOTS else "is"
    with pytest.raises(script.BrokenRun, match=f" returned {name} that {verb} no finite float32"):
        train(script, tmp_path, total_timesteps=9000)
    check_last_checkpoint(script, tmp_path, True)


@each(*CONTINUOUS, *ROBOTS)
def test_first_observation_that_is_not_finite_is_named_before_anything_is_created(script, tmp_path, monkeypatch):
    play(script, monkeypatch, lambda e, k, action: (NAN, 1.0, ""))
    with pytest.raises(script.BrokenRun, match=" returned (an observation that is|obs that are) no finite float32"):
        train(script, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@each(*BPO)
def test_loss_that_breaks_is_named_and_the_checkpoint_kept(script, tmp_path, monkeypatch):
    play(script, monkeypatch, one_step)
    calls, policy_loss = [], script.policy_loss

    def broken(*args):
        calls.append(1)
        return policy_loss(*args) * (NAN if len(calls) > 15 else 1)

    monkeypatch.setattr(script, "policy_loss", broken)
    with pytest.raises(script.BrokenRun, match=r"losses/policy_loss is nan at step \d+$"):
        train(script, tmp_path, total_timesteps=9000, checkpoint_seconds=0)
    check_last_checkpoint(script, tmp_path, True)


@each(*BPO)
def test_weights_that_break_are_not_saved(script, tmp_path, monkeypatch):
    """One step of 1e38: no loss tells, and the weights are not finite."""
    play(script, monkeypatch, one_step)
    settings = {BATCHES[script]: 1 if script in ROBOTS else 32, "learning_rate": 1e38, "lr_schedule": "constant"}
    settings["checkpoint_seconds"] = 0
    with pytest.raises(script.BrokenRun, match=r"a weight is not finite at step \d+$"):
        train(script, tmp_path, **settings)
    check_last_checkpoint(script, tmp_path, False)


@each(*CONTINUOUS)
def test_a_broken_run_is_one_line_and_status_1(script, tmp_path, monkeypatch, capsys):
    settings = dict(env_id="Target-v0", env_backend="gymnasium", compile=False, num_steps=64, minibatch_size=32)
    words = options(**settings, learning_rate=1e38, update_epochs=1, output_dir=tmp_path)
    code, (line,) = command_line(script, words, monkeypatch, capsys)
    assert code == 1 and re.match(r"error: losses/policy_loss is nan at step \d+\. ", line)
    assert "Checkpoints made before are kept; resumed with the same settings it ends here again" in line


@each(BPO[0])
def test_a_stop_hides_no_error_but_those_it_may_have_caused(script, tmp_path):
    run = script.Run(script.Args())
    run.dir, run.stopping = tmp_path, True
    for error in (script.BrokenRun("a weight is not finite"), OSError("no space left")):
        with pytest.raises(type(error), match=str(error)), run:
            raise error
    with pytest.raises(SystemExit, match="stopped at step 0; go on with: "), run:
        raise RuntimeError("the compiler was interrupted")


@each(ATARI[0])
def test_followers_heed_nohup(script):
    own = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with script.Follower(script.Args()) as follower:
            follower.begin()
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == follower.request_stop
    finally:
        signal.signal(signal.SIGHUP, own)


# --- learning


@each(*CONTINUOUS)
@pytest.mark.parametrize("env_id, best, unit", [("Target-v0", 0.5, 0.1), ("Inner-v0", 0.3, -0.4)])
@pytest.mark.slow
def test_policy_moves_to_the_best_action(script, env_id, best, unit, tmp_path):
    """Also within bounds 0 and 1. The policy's own units are half the width of the bounds, from their middle."""
    run_dir = train(script, tmp_path, env_id=env_id, num_steps=64, minibatch_size=64, update_epochs=10,
                    learning_rate=3e-3, total_timesteps=6000, checkpoint_seconds=30)  # fmt: skip
    agent, obs = load(script, run_dir)
    action = agent.policy(obs).detach()
    width = best / unit if env_id == "Target-v0" else 0.5
    assert action.item() == pytest.approx(unit, abs=0.1)
    assert agent.to_env(action).item() == pytest.approx(best, abs=0.1 * width)
    assert agent.log_std.item() < -0.8
    returns = column(read(run_dir / "episodes.csv"), "return")
    assert returns[-300:].mean() > returns[:300].mean() / 2


def load(script, run_dir):
    """The agent of a continuous run, through the script's own functions, and what it makes of the observation 0."""
    args, saved = script.load_run(run_dir, "agent.pt")
    envs, obs_space, action_space = script.make_envs(args, 1, 0)
    envs.close()
    agent = script.Agent(obs_space.shape[0], action_space.low, action_space.high, args)
    agent.load_state_dict(saved["agent"])
    return agent, agent.normalize(torch.zeros(1, obs_space.shape[0]))


@each(*ROBOTS)
@pytest.mark.slow
def test_policy_of_a_robot_moves_to_the_best_action(script, tmp_path, monkeypatch):
    play(script, monkeypatch, one_step, next_step=False)
    settings = dict(num_envs=16, num_steps=12, init_std=1.0, update_epochs=10, total_timesteps=12_000)
    run_dir = train(script, tmp_path, **settings, checkpoint_seconds=30)
    args, saved = script.load_run(run_dir, "agent.pt")
    agent = script.Agent(1, 1, [-np.inf], [np.inf], args)
    agent.load_state_dict(saved["agent"])
    assert agent(agent.normalize(torch.full((1, 1), 7.0))).mode.item() == pytest.approx(0.5, abs=0.15)
    rows = read(run_dir / "metrics.csv")
    assert rows[-1]["charts/std"] < 0.9 and len(set(column(rows, "charts/learning_rate"))) > 3


@each(*CONTINUOUS)
@pytest.mark.slow
def test_value_bootstraps_through_truncation(script, tmp_path, monkeypatch):
    """Reward 1 for ever, cut every five steps: 1 / (1 - 0.9). Taken for termination, the cuts would leave about 3."""
    settings = dict(env_id="Endless-v0", gamma=0.9, norm_reward=False, learning_rate=3e-3, total_timesteps=6000)
    sizes = dict(num_steps=64, minibatch_size=64, update_epochs=4, checkpoint_seconds=30)
    agent, obs = load(script, train(script, tmp_path, **settings, **sizes, lr_schedule="constant"))
    assert agent.value(obs).item() == pytest.approx(10, abs=0.3)


@pytest.mark.slow
def test_median_of_a_skewed_reward_is_far_from_its_mean(tmp_path):
    """Rewards 0 (70%) and 10 (30%): the value must go to 3, the median to 0, in units of the raw reward."""
    settings = dict(norm_reward=False, norm_adv=False, temperature=0.05, learning_rate=1e-2, total_timesteps=6000)
    sizes = dict(num_steps=128, minibatch_size=64, update_epochs=5, checkpoint_seconds=30)
    agent, obs = load(BPO[0], train(BPO[0], tmp_path, env_id="Skewed-v0", **settings, **sizes))
    assert agent.value(obs).item() == pytest.approx(3, abs=0.8)
    assert agent.median(obs).item() == pytest.approx(0, abs=0.2)


@each(*ATARI)
@pytest.mark.slow
def test_agent_learns_to_act_on_what_it_sees(script, tmp_path, monkeypatch):
    """A bright half is shown for five steps; action 0 on the left or 1 on the right scores 2, all else -1."""
    sides = np.zeros((2, 4, 84, 84), np.uint8)
    sides[0, ..., :42], sides[1, ..., 42:] = 200, 200

    def side_game(e, k, action):
        side = (e * 5 + k) * 7919 % 13 % 2
        return sides[side], 2.0 if action == side else -1.0, "terminated" if k == 4 else ""

    play(script, monkeypatch, side_game)
    sizes = dict(num_envs=8, num_steps=16, minibatch_size=32, update_epochs=3, total_timesteps=2000)
    run_dir = train(script, tmp_path, **sizes, ent_coef=0.001, checkpoint_seconds=30)
    returns = column(read(run_dir / "episodes.csv"), "return")
    assert returns[:40].mean() < 3 and returns[-40:].mean() > 8


@pytest.mark.slow
def test_a_compiled_run_equals_a_plain_one(tmp_path, monkeypatch):
    play(BPO[2], monkeypatch, one_step)
    settings = dict(total_timesteps=96, update_epochs=2)
    folders = [train(BPO[2], tmp_path / str(x), **settings, compile=x) for x in (False, True)]
    for row, other in zip(*(read(x / "metrics.csv") for x in folders), strict=True):
        names = [x for x in row if x.startswith(("losses/", "charts/l"))]
        assert [row[x] for x in names] == pytest.approx([other[x] for x in names], rel=1e-3, abs=1e-5)
