"""Real runs of bpo_continuous_action.py and ppo_continuous_action.py: learning, log files, resuming, bad input."""

import dataclasses
import json
import math
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import probe_envs
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bpo_continuous_action as bpo
import ppo_continuous_action as ppo

BOTH = {"bpo": bpo, "ppo": ppo}
SCRIPTS = pytest.mark.parametrize("script", BOTH.values(), ids=BOTH)
PROBE = dict(env_backend="gymnasium", compile=False, num_envs=4, num_steps=64, hidden_size=16, eval_episodes=2)


@pytest.fixture(params=BOTH.values(), ids=BOTH, scope="module")
def each_script(request):
    return request.param


@pytest.fixture(autouse=True)
def signal_handlers():
    """A script run as __main__ in this process leaves its own handlers behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train(script, folder, **settings):
    return Path(script.train(script.Args(**{"compile": False, "output_dir": str(folder), **settings})))


def load(script, run_dir, name="agent.pt"):
    """The trained agent of a run, through the script's own functions, and the run's settings."""
    args, checkpoint = script.load_run(run_dir, name)
    envs, obs_space, action_space = script.make_envs(args, 1, 0)
    envs.close()
    agent = script.Agent(obs_space.shape[0], action_space.shape[0], args)
    script.load_agent(agent, checkpoint, run_dir)
    return agent, args


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


# ---------------------------------------------------------------------------------- probes with known right answers


@SCRIPTS
def test_value_of_one_step_with_constant_reward_is_the_reward(script, tmp_path):
    run_dir = train(
        script, tmp_path, **PROBE, env_id="Probe-v0", norm_reward=False, learning_rate=3e-3, total_timesteps=4000
    )
    agent, _ = load(script, run_dir)
    assert agent.value(agent.hidden(agent.normalize(torch.zeros(1, 1)))).item() == pytest.approx(2, abs=0.05)


def test_median_of_a_skewed_reward_is_far_from_its_mean(tmp_path):
    """Rewards 0 (70%) and 10 (30%): the value must go to 3, the median to 0, in units of the raw reward."""
    settings = dict(norm_reward=False, norm_adv=False, temperature=0.05, learning_rate=1e-2, total_timesteps=6000)
    run_dir = train(bpo, tmp_path, **PROBE | dict(num_steps=128), env_id="Skewed-v0", update_epochs=5, **settings)
    agent, _ = load(bpo, run_dir)
    hidden = agent.hidden(agent.normalize(torch.zeros(1, 1)))
    assert agent.value(hidden).item() == pytest.approx(3, abs=0.8)
    assert agent.median(hidden).item() == pytest.approx(0, abs=0.2)


@SCRIPTS
def test_policy_moves_to_the_best_action(script, tmp_path):
    run_dir = train(script, tmp_path, **PROBE, env_id="Target-v0", learning_rate=3e-3, total_timesteps=6000)
    agent, _ = load(script, run_dir)
    assert agent.policy(agent.normalize(torch.zeros(1, 1))).item() == pytest.approx(0.5, abs=0.15)
    assert agent.log_std.item() < -0.1
    returns = column(read(run_dir / "episodes.csv"), "return")
    assert returns[-300:].mean() > returns[:300].mean() / 2


@SCRIPTS
def test_value_bootstraps_through_truncation(script, tmp_path):
    """Reward 1 for ever, cut every five steps: 1 / (1 - 0.9). Taken for termination, the cuts would leave about 3."""
    settings = dict(env_id="Endless-v0", gamma=0.9, norm_reward=False, learning_rate=3e-3, total_timesteps=6000)
    agent, _ = load(script, train(script, tmp_path, **PROBE, **settings, lr_schedule="constant", update_epochs=4))
    assert agent.value(agent.hidden(agent.normalize(torch.zeros(1, 1)))).item() == pytest.approx(10, abs=0.3)


@SCRIPTS
@pytest.mark.parametrize("hidden_size", [64, 256])
def test_only_wide_networks_learn_through_onednn(script, hidden_size, tmp_path, monkeypatch):
    gradient, precisions = script.minibatch_gradient, set()

    def watched(*arguments):
        precisions.add(torch.get_float32_matmul_precision())
        return gradient(*arguments)

    monkeypatch.setattr(script, "minibatch_gradient", watched)
    train(script, tmp_path, **PROBE | {"hidden_size": hidden_size}, env_id="Probe-v0", total_timesteps=512)
    wide = hidden_size == 256 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert precisions == {"medium" if wide else "highest"}
    assert torch.get_float32_matmul_precision() == "highest"


# ---------------------------------------------------------------------------------------------------------- dummy rows


@SCRIPTS
def test_dummy_rows_reach_neither_loss_nor_statistics_nor_step_count(script, tmp_path, monkeypatch):
    samples, gradient = [], script.minibatch_gradient

    def record(agent, parameters, batch, indices, *rest):
        samples.append((batch["obs"][indices].flatten().tolist(), indices.tolist()))
        return gradient(agent, parameters, batch, indices, *rest)

    monkeypatch.setattr(script, "minibatch_gradient", record)
    settings = dict(PROBE, num_envs=3, num_steps=11, minibatch_size=8, norm_obs=False, update_epochs=1, gamma=0.5)
    run_dir = train(script, tmp_path, **settings, env_id="Marked-v0", total_timesteps=100, checkpoint_interval=1)

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

    # Every real row is in some minibatch, no dummy in any: theirs is the observation 1000.
    assert max(max(obs) for obs, _ in samples) <= 7
    for size in np.diff([0, *expected_steps]):
        iteration, samples = samples[: math.ceil(size / 8)], samples[math.ceil(size / 8) :]
        assert len({index for _, indices in iteration for index in indices}) == size
    assert not samples


# --------------------------------------------------------------------------------------------------- runs on Hopper


@pytest.fixture(scope="module")
def hopper(each_script, tmp_path_factory):
    """A short default run."""
    folder = tmp_path_factory.mktemp("hopper")
    return each_script, train(each_script, folder, total_timesteps=25_000, eval_episodes=5)


def test_hopper_improves(hopper):
    returns = column(read(hopper[1] / "episodes.csv"), "return")
    assert returns[-20:].mean() > 3 * returns[:20].mean()


def test_metrics_are_complete_and_finite(hopper):
    script, run_dir = hopper
    rows = read(run_dir / "metrics.csv")
    names = "step losses/policy_loss losses/value_loss losses/entropy losses/approx_kl losses/kl losses/clipfrac "
    names += "losses/grad_norm losses/explained_variance charts/mean_return_100 charts/learning_rate charts/SPS "
    names += "charts/log_std time/rollout time/update "
    names += "ratio/out_of_bounds ratio/high_mean ratio/high_std ratio/low_mean ratio/low_std "
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
    assert about["args"]["total_timesteps"] == 25_000 and about["script"] == script.SCRIPT
    assert set(about["args"]) == {x.name for x in dataclasses.fields(script.Args)}
    assert about["versions"]["torch"] == torch.__version__ and {"numpy", "envpool"} <= set(about["versions"])
    assert about["python"] == sys.version.split()[0]
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
    tags = events.Tags()["scalars"]
    assert {"charts/episodic_length", "evaluation/deterministic_return", *metrics[0]} - {"step"} <= set(tags)
    kl = [x.value for x in events.Scalars("losses/approx_kl")]
    np.testing.assert_allclose(kl, column(metrics, "losses/approx_kl"), rtol=1e-4)


def test_saved_agent_evaluates_in_a_fresh_process_at_the_level_of_training(hopper, tmp_path):
    script, run_dir = hopper
    trained = json.loads((run_dir / "evaluation.json").read_text())
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (copy / "evaluation.json").unlink()
    process = start(script, ["--evaluate", str(copy), "--eval-episodes", "5"], cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    results = json.loads((copy / "evaluation.json").read_text())
    level = column(read(run_dir / "episodes.csv"), "return")[-20:].mean()
    for name in ("deterministic", "stochastic"):
        assert f"evaluation, {name}: {results[name]['mean']:.1f}" in out
        assert len(results[name]["returns"]) == 5
        assert results[name]["mean"] == pytest.approx(np.mean(results[name]["returns"]))
        assert 0.5 * level < results[name]["mean"] < 2 * level
    # Same simulators, same weights, no noise.
    assert results["deterministic"]["returns"] == pytest.approx(trained["deterministic"]["returns"], rel=1e-3)
    assert {x.name for x in tmp_path.iterdir()} == {"copy"}
    assert {x.name for x in copy.iterdir()} == {x.name for x in run_dir.iterdir()}


def test_evaluation_changes_nothing_and_follows_its_seed(hopper):
    script, run_dir = hopper
    agent, args = load(script, run_dir)
    final, _ = load(script, run_dir, "checkpoint.pt")
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    assert before["obs_stats.count"] == read(run_dir / "metrics.csv")[-1]["step"]
    returns = [script.evaluate(agent, args, True, seed) for seed in (7, 7, 8)]
    script.evaluate(agent, args, False, 7)
    for name, x in agent.state_dict().items():
        assert torch.equal(x, before[name]) and torch.equal(x, final.state_dict()[name])
    assert returns[0].tolist() == returns[1].tolist() != returns[2].tolist() and returns[0].shape == (5,)


@SCRIPTS
def test_evaluation_counts_the_first_episode_of_each_environment_only(script):
    args = script.Args(**PROBE | dict(eval_episodes=12), env_id="Uneven-v0")
    returns = script.evaluate(script.Agent(1, 1, args), args, True, 0)
    assert set(returns) == {1, 9} and len(returns) == 12


def test_a_run_without_final_agent_is_evaluated_from_its_checkpoint(hopper, tmp_path, capsys):
    script, run_dir = hopper
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (copy / "agent.pt").unlink()
    script.main(script.Args(evaluate=str(copy), eval_episodes=2))
    assert capsys.readouterr().out.count("over 2 episodes") == 2


@SCRIPTS
def test_same_seed_same_episodes(script, tmp_path):
    settings = dict(num_steps=256, update_epochs=2, total_timesteps=6000, eval_episodes=1, lr_schedule="constant")
    runs = [train(script, tmp_path / str(i), **settings, seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, same, other = ((run_dir / "episodes.csv").read_bytes() for run_dir in runs)
    assert first == same != other and first.count(b"\n") > 100
    rates = column(read(runs[0] / "metrics.csv"), "charts/learning_rate")
    assert rates == pytest.approx(3e-4)


@SCRIPTS
def test_gymnasium_backend_runs_hopper(script, tmp_path):
    settings = PROBE | dict(num_envs=2, update_epochs=1, eval_episodes=1)
    run_dir = train(script, tmp_path, **settings, env_id="Hopper-v4", total_timesteps=500)
    rows = read(run_dir / "episodes.csv")
    assert 5 < column(rows, "length").mean() < 60 and 3 < column(rows, "return").mean() < 100


@SCRIPTS
def test_rewards_are_scaled_within_an_episode_also_with_rollouts_of_one_step(script, tmp_path, monkeypatch):
    """All episodes then end at once, and the rollout after that has dummy rows only."""
    seen, update = [], script.RunningNormalizer.update

    def record(self, samples):
        if self.mean.shape == (1,) and samples.dtype == torch.float64:
            seen.append(samples.flatten().tolist())
        update(self, samples)

    monkeypatch.setattr(script.RunningNormalizer, "update", record)
    settings = PROBE | dict(num_envs=2, num_steps=1, minibatch_size=2, update_epochs=1, gamma=0.5, norm_obs=False)
    train(script, tmp_path, **settings, env_id="Endless-v0", total_timesteps=20)
    episode = [[x, x] for x in (1.0, 1.5, 1.75, 1.875, 1.9375)]
    assert seen == episode * 2


@SCRIPTS
def test_seed_of_the_evaluation_stays_within_range(script, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(script, "evaluate", lambda agent, args, deterministic, seed: seeds.append(seed) or np.ones(1))
    for seed in (1, 2**31 - 1):
        script.report(None, script.Args(seed=seed), tmp_path)
    assert seeds == [10_001] * 2 + [9_999] * 2


def test_clip_coef_near_zero_keeps_the_policy(tmp_path):
    """The target is then the old policy itself, whatever the advantages."""
    runs = {}
    for clip_coef in (1e-6, 0.4):
        settings = dict(num_steps=256, update_epochs=4, total_timesteps=4000, eval_episodes=1)
        rows = read(train(bpo, tmp_path / str(clip_coef), **settings, clip_coef=clip_coef) / "metrics.csv")
        runs[clip_coef] = column(rows, "losses/kl").mean(), column(rows, "ratio/high_mean").mean() - 1
    assert runs[1e-6][0] < runs[0.4][0] / 100 and runs[1e-6][1] < runs[0.4][1] / 10, runs


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_other_divergences_train(divergence, tmp_path):
    settings = dict(median_network="mlp-head", recompute_advantages=True, target_kl=0.05, lr_schedule="adaptive")
    settings |= dict(num_steps=128, update_epochs=3, total_timesteps=3000, eval_episodes=1)
    rows = read(train(bpo, tmp_path, divergence=divergence, **settings) / "metrics.csv")
    assert len(set(column(rows, "charts/learning_rate"))) > 1
    assert 0 < column(rows, "losses/kl").mean() < 0.2


# ----------------------------------------------------------------------------------------------------------- resuming

LONG = dict(compile=False, seed=3, num_steps=256, update_epochs=2, total_timesteps=20_000)
LONG |= dict(checkpoint_interval=2, eval_episodes=1)


@pytest.fixture(scope="module")
def broken_and_unbroken(each_script, tmp_path_factory):
    """A run left alone, one ended by SIGTERM and one by SIGKILL: (script, {name: run_dir}, SIGTERM's exit)."""
    folder = tmp_path_factory.mktemp("resume")
    names = {"sigterm": signal.SIGTERM, "sigkill": signal.SIGKILL}
    processes = {n: start(each_script, options(**LONG, output_dir=folder / n), cwd=folder) for n in names}
    waiting, run_dirs, deadline = set(names), {}, time.time() + 120
    while waiting and time.time() < deadline:
        for name in sorted(waiting):
            metrics = list((folder / name).glob("*/metrics.csv"))
            # Killed after the third iteration, whose rows are past the checkpoint of the second.
            if metrics and metrics[0].with_name("checkpoint.pt").exists() and metrics[0].read_text().count("\n") >= 4:
                processes[name].send_signal(names[name])
                run_dirs[name] = metrics[0].parent
                waiting.remove(name)
        time.sleep(0.005)
    for process in processes.values():
        if waiting:
            process.kill()
    ends = {name: (*process.communicate(timeout=60), process.returncode) for name, process in processes.items()}
    assert not waiting, ends
    run_dirs["unbroken"] = train(each_script, folder / "unbroken", **LONG)
    return each_script, run_dirs, ends


def comparable(rows):
    """Without what a clock says."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "charts/SPS"))} for row in rows]


def test_signals_end_a_run_as_they_should(broken_and_unbroken):
    _, run_dirs, ends = broken_and_unbroken
    _, err, code = ends["sigterm"]
    assert code == 1 and len(err.splitlines()) == 1
    assert "stopped at step" in err and f"--resume {run_dirs['sigterm']}" in err
    step = torch.load(run_dirs["sigterm"] / "checkpoint.pt")["step"]
    assert read(run_dirs["sigterm"] / "metrics.csv")[-1]["step"] == step < 20_000
    assert ends["sigkill"][2] == -signal.SIGKILL
    assert not (run_dirs["sigkill"] / "agent.pt").exists()


@pytest.mark.parametrize("name", ["sigterm", "sigkill"])
def test_resumed_run_goes_on_where_the_checkpoint_was(broken_and_unbroken, name, tmp_path):
    script, run_dirs, _ = broken_and_unbroken
    run_dir = shutil.copytree(run_dirs[name], tmp_path / "run")
    step = torch.load(run_dir / "checkpoint.pt")["step"]
    columns = (run_dir / "metrics.csv").read_text().split("\n", 1)[0].count(",")
    with (run_dir / "metrics.csv").open("a") as metrics, (run_dir / "episodes.csv").open("a") as episodes:
        metrics.write(f"{step + 5}" + ",1" * columns + f"\n{step - 1},0.5")  # rows past the checkpoint, then half rows
        episodes.write(f"{step + 3},7,7\n{step - 1},7,3")
    assert script.train(script.Args(resume=str(run_dir), compile=False)) == str(run_dir)

    for file in ("metrics.csv", "episodes.csv"):
        resumed, unbroken = read(run_dir / file), read(run_dirs["unbroken"] / file)
        kept = comparable([row for row in resumed if row["step"] <= step])
        assert kept and kept == comparable([row for row in unbroken if row["step"] <= step])
        steps = column(resumed, "step")
        assert (np.diff(steps) >= (1 if file == "metrics.csv" else 0)).all()
        assert len(steps) > len(kept) and steps[-1] > 19_000
    metrics = read(run_dir / "metrics.csv")
    assert metrics[-1]["step"] >= 20_000 and torch.load(run_dir / "checkpoint.pt")["step"] == metrics[-1]["step"]
    next_rate = [row for row in metrics if row["step"] > step][0]["charts/learning_rate"]
    assert next_rate == pytest.approx(3e-4 * (1 - step / 20_000), rel=1e-4)
    agent, _ = load(script, run_dir)
    assert agent.obs_stats.count == metrics[-1]["step"]
    assert not list(run_dir.glob("*.tmp"))


def test_resuming_restores_every_tensor(broken_and_unbroken, monkeypatch, tmp_path):
    script, run_dirs, _ = broken_and_unbroken
    run_dir = shutil.copytree(run_dirs["sigkill"], tmp_path / "run")
    made = {}

    class Stop(Exception):
        pass

    def keep(name, function):
        def call(*args, **kwargs):
            made[name] = function(*args, **kwargs)
            return made[name]

        return call

    def open_log(*args, **kwargs):  # the log opens when everything is loaded
        made["rng_state"] = torch.get_rng_state()
        return writer(*args, **kwargs)

    def stop(parameters, _, **optimizer):  # the first step
        made["flat"], made["optimizer"] = parameters[0], optimizer
        raise Stop

    writer, checkpoint = script.SummaryWriter, torch.load(run_dir / "checkpoint.pt")
    monkeypatch.setattr(script, "Agent", keep("agent", script.Agent))
    monkeypatch.setattr(script, "adam", stop)
    monkeypatch.setattr(script, "SummaryWriter", open_log)
    with pytest.raises(Stop):
        script.train(script.Args(resume=str(run_dir), compile=False))
    agent, saved = made["agent"].state_dict(), checkpoint["optimizer"]
    assert agent.keys() == checkpoint["agent"].keys()
    unchanged = [name for name in agent if "return_stats" not in name]  # that one has seen a rollout more
    assert all(torch.equal(agent[name], checkpoint["agent"][name]) for name in unchanged)
    assert agent["obs_stats.count"] == checkpoint["step"] == checkpoint["agent"]["return_stats.count"]
    assert agent["return_stats.count"] > checkpoint["step"]
    assert saved.keys() == {"exp_avgs", "exp_avg_sqs", "state_steps", "lr"} and saved["state_steps"][0] > 0
    for name in saved.keys() - {"lr"}:  # which the schedule has set anew
        assert torch.equal(made["optimizer"][name][0], saved[name][0])
    settings = {name: made["optimizer"][name] for name in ("beta1", "beta2", "eps", "weight_decay", "amsgrad")}
    assert settings == {"beta1": 0.9, "beta2": 0.999, "eps": 1e-5, "weight_decay": 0.0, "amsgrad": False}
    assert torch.equal(made["rng_state"], checkpoint["rng_state"])
    # The optimizer's vector is still what the networks read.
    flat, parameters = made["flat"], list(made["agent"].parameters())
    assert torch.equal(flat, torch.nn.utils.parameters_to_vector(parameters).detach())
    assert all(p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in parameters)


@pytest.mark.parametrize("purpose", ["resume", "evaluate"])
def test_a_run_takes_no_other_settings(broken_and_unbroken, purpose, tmp_path):
    script, run_dirs, _ = broken_and_unbroken
    run_dir = shutil.copytree(run_dirs["unbroken"], tmp_path / "run")
    edit(run_dir / "args.json", total_timesteps=10**6)  # else it is complete
    with pytest.raises(script.BadInput, match="leave out --gamma"):
        script.main(script.Args(**{purpose: str(run_dir)}, compile=False, gamma=0.5))


def test_mean_return_of_the_last_episodes_goes_on_over_a_restart(broken_and_unbroken, tmp_path, monkeypatch):
    script, run_dirs, _ = broken_and_unbroken
    run_dir = shutil.copytree(run_dirs["unbroken"], tmp_path / "run")
    edit(run_dir / "args.json", total_timesteps=21_000)
    before, gradient, complete = len(read(run_dir / "episodes.csv")), script.minibatch_gradient, []

    def watched(*args):
        complete.extend(name for name in ("agent.pt", "evaluation.json") if (run_dir / name).exists())
        return gradient(*args)

    monkeypatch.setattr(script, "minibatch_gradient", watched)
    script.train(script.Args(resume=str(run_dir), compile=False))
    assert not complete and (run_dir / "agent.pt").exists(), "a run that goes on is not complete"
    episodes, row = read(run_dir / "episodes.csv"), read(run_dir / "metrics.csv")[-1]
    assert before < len(episodes) < before + 100
    ended = [x["return"] for x in episodes if x["step"] <= row["step"]]
    assert row["charts/mean_return_100"] == pytest.approx(np.mean(ended[-100:]), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ broken numbers


@SCRIPTS
@pytest.mark.parametrize(
    "env_id, word", [("BrokenReward-v0", "reward"), ("BrokenObservation-v0", "observation")], ids=["reward", "obs"]
)
def test_nan_from_the_task_stops_the_run_and_keeps_the_checkpoint(script, env_id, word, tmp_path):
    with pytest.raises(SystemExit, match=f"error: {env_id} returned a {word} that is not finite, step .*--resume"):
        train(script, tmp_path, **PROBE, env_id=env_id, total_timesteps=4000, checkpoint_interval=1)
    check_last_checkpoint(script, tmp_path)


@SCRIPTS
def test_nan_loss_stops_the_run_and_names_the_loss(script, tmp_path, monkeypatch):
    calls, policy_loss = [], script.policy_loss

    def broken(*args):
        calls.append(1)
        return policy_loss(*args) * (math.nan if len(calls) > 30 else 1)

    monkeypatch.setattr(script, "policy_loss", broken)
    with pytest.raises(SystemExit, match="error: losses/policy_loss is nan at step .*--resume"):
        train(script, tmp_path, **PROBE, env_id="Target-v0", total_timesteps=9000, checkpoint_interval=1)
    check_last_checkpoint(script, tmp_path)


def check_last_checkpoint(script, folder):
    (run_dir,) = folder.iterdir()
    agent, _ = load(script, run_dir, "checkpoint.pt")
    assert all(torch.isfinite(x).all() for x in agent.state_dict().values())
    metrics = read(run_dir / "metrics.csv")
    assert torch.load(run_dir / "checkpoint.pt")["step"] == metrics[-1]["step"] == agent.obs_stats.count > 0


# ---------------------------------------------------------------------------------------------------------- bad input

GYM = {"env_backend": "gymnasium"}
NAN, INF = math.nan, math.inf
BAD_TASKS = [
    ({"env_id": "Hoper-v4"}, "did you mean Hopper-v4"),
    ({"env_id": "Nothing-v0", **GYM}, "Gymnasium cannot make Nothing-v0"),
    ({"env_id": "no_such_module:Hopper-v4", **GYM}, "cannot make"),
    ({"env_id": "not a name", **GYM}, "cannot make"),
    ({"env_id": "CartPole-v1"}, "no continuous"),
    ({"env_id": "CartPole-v1", **GYM}, "no continuous"),
    ({"env_id": "Choice-v0", **GYM}, "no continuous"),
    ({"env_id": "Dictionary-v0", **GYM}, "no flat Box observation"),
    ({"env_id": "Image-v0", **GYM}, "no flat Box observation"),
]
BAD_VALUES = dict(total_timesteps=[0, -5], num_envs=[0, -1], num_steps=[0], update_epochs=[0], hidden_size=[0])
BAD_VALUES |= dict(minibatch_size=[0, -64, 1, 4 * 512 + 1], checkpoint_interval=[0], eval_episodes=[0], seed=[-1])
BAD_VALUES |= dict(learning_rate=[0.0, -1.0, NAN, INF], clip_coef=[0.0, -0.2, 1.5, NAN], max_grad_norm=[0.0, NAN])
BAD_VALUES |= dict(gamma=[1.1, -0.1, NAN], gae_lambda=[1.1, NAN], ent_coef=[-1.0, NAN], value_coef=[-1.0, INF])
BAD_VALUES |= dict(target_kl=[0.0, NAN], desired_kl=[0.0, NAN], log_std_init=[NAN, INF])
BAD_BPO_VALUES = dict(ratio_low=[1.0, 1.2, -0.1, NAN], ratio_high=[1.0, 0.9, INF, NAN], temperature=[0.0, -1.0, NAN])
BAD_BPO_VALUES |= dict(median_temperature=[0.0, NAN], median_coef=[-1.0, NAN], tv_coef=[-1.0, NAN])
BAD_INPUT = [(script, *case) for script in (bpo, ppo) for case in BAD_TASKS]
BAD_INPUT += [(bpo, {"divergence": "kl", "clip_coef": 1.0}, "--divergence must be atv or tv")]
BAD_INPUT += [(bpo, {"divergence": "tv", "tv_coef": 0.1}, "--tv-coef must be 0 unless --divergence is atv")]
for scripts, table in ((BOTH.values(), BAD_VALUES), ([bpo], BAD_BPO_VALUES)):
    for name, values in table.items():
        word = "bounds" if name.startswith("ratio") else f"--{name.replace('_', '-')} must be|bounds"
        BAD_INPUT += [(script, {name: value}, word) for script in scripts for value in values]


@pytest.mark.parametrize("script, settings, words", BAD_INPUT, ids=lambda x: getattr(x, "SCRIPT", "")[:3] or str(x))
def test_bad_settings_are_one_line_before_anything_is_created(script, settings, words, tmp_path):
    with pytest.raises(script.BadInput, match=words) as error:
        train(script, tmp_path / "out", **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@SCRIPTS
@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_output_dir_that_cannot_be_made(script, place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(script.BadInput, match="cannot write to .*choose another --output-dir"):
        train(script, tmp_path / place, total_timesteps=100)
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


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


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    settings = dict(PROBE, env_id="Probe-v0", total_timesteps=300, update_epochs=1)
    return {script: train(script, folder, **settings) for script in BOTH.values()}


@SCRIPTS
@pytest.mark.parametrize("use", ["resume", "evaluate"])
@pytest.mark.parametrize("damage", [*DAMAGES, "sibling's run"])
def test_unusable_run_is_one_line(script, use, damage, tiny_runs, tmp_path, monkeypatch):
    maker = script if damage in DAMAGES else {bpo: ppo, ppo: bpo}[script]
    run_dir = shutil.copytree(tiny_runs[maker], tmp_path / "run")
    DAMAGES.get(damage, lambda run: None)(run_dir)
    monkeypatch.chdir(tmp_path)  # an output would land here
    before = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")}
    with pytest.raises(script.BadInput) as error:
        script.main(script.Args(**{use: str(run_dir)}, compile=False))
    assert "\n" not in str(error.value) and not any(x in str(error.value) for x in ("leave out", "BadInput"))
    assert {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")} == before


@SCRIPTS
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--env-id", "Hoper-v4"], "did you mean"),
        (["--env-id", "CartPole-v1"], "no continuous"),
        (["--minibatch-size", "4096"], "--minibatch-size must be"),
        (["--gamma", "nan"], "--gamma must be within"),
        (["--resume", "missing"], "cannot read missing"),
        (["--evaluate", "missing"], "cannot read missing"),
        (["--output-dir", "/proc/out"], "choose another --output-dir"),
    ],
    ids=lambda x: "" if isinstance(x, str) else x[0],
)
def test_bad_input_on_the_command_line(script, arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, lines = command_line(script, [*arguments, "--no-compile"], monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not list(tmp_path.iterdir())


@SCRIPTS
def test_unknown_option_exits_with_two(script, monkeypatch, capsys):
    code, lines = command_line(script, ["--no-such-option", "1"], monkeypatch, capsys)
    assert code == 2 and any("no-such-option" in line for line in lines)


def test_bad_input_ends_a_real_process_with_status_two(tmp_path):
    process = start(bpo, ["--env-id", "CartPole-v1", "--no-compile"], cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, len(err.splitlines())) == (2, "", 1) and err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_full_disk_ends_with_one_line(tmp_path):
    """Files may grow to 20 kB, as on a disk with that much left: the logs fit, the checkpoint does not."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit is then an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    settings = dict(compile=False, num_steps=64, update_epochs=1, total_timesteps=9000, checkpoint_interval=2)
    process = start(bpo, options(**settings, output_dir=tmp_path), cwd=tmp_path, preexec_fn=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (1, 2)
    assert len(err.splitlines()) == 1 and err.startswith("error: "), err
    (run_dir,) = tmp_path.iterdir()
    assert not (run_dir / "checkpoint.pt").exists()


# ------------------------------------------------------------------------------------------------------------- tracking


@pytest.mark.slow
def test_track_writes_an_offline_wandb_run(tmp_path):
    pytest.importorskip("wandb")
    settings = PROBE | dict(env_id="Hopper-v4", env_backend="envpool", track=True, total_timesteps=300)
    settings |= dict(update_epochs=1, eval_episodes=1, output_dir=tmp_path)
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(tmp_path)}
    process = start(bpo, options(**settings), cwd=tmp_path, env=environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (offline,) = tmp_path.glob("Hopper-v4__*/wandb/offline-run-*/*.wandb")
    assert b"charts/episodic_return" in offline.read_bytes()
