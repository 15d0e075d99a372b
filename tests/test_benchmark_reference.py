"""benchmark/reference.py: short runs of the libraries' algorithms, one stopped and resumed."""

import inspect
import json
import re
import signal
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import reference  # noqa: E402
import report  # noqa: E402

SETTINGS = tomllib.loads((ROOT / "benchmark" / "reference_settings.toml").read_text())
NEEDS_SB3 = pytest.mark.skipif(reference.sb3 is None, reason="pip install -r benchmark/requirements.txt")


@pytest.fixture(autouse=True)
def handlers():
    """Puts back the handlers of signals that a run sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@NEEDS_SB3
@pytest.mark.parametrize("algo", SETTINGS)
def test_settings_are_the_librarys(algo):
    """RL-Zoo's own words besides: normalize and n_envs."""
    library = {"trpo": reference.sb3_contrib, "sac": reference.sbx}.get(algo, reference.sb3)
    known = {*inspect.signature(getattr(library, algo.upper()).__init__).parameters, "normalize", "n_envs"}
    assert all({*settings} <= known for settings in SETTINGS[algo].values())


@NEEDS_SB3
def test_a_step_counts_all_simulators_and_returns_are_the_simulators_own(tmp_path):
    """TRPO on Swimmer-v4: two simulators, whose episodes a time limit ends after 1000 steps each."""
    args = reference.Args(algo="trpo", env_id="Swimmer-v4", total_timesteps=2048, output_dir=str(tmp_path))
    seen = []

    class Run(reference.Run):
        def _on_step(self):
            seen.append(self.training_env.get_original_reward().sum())
            return super()._on_step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "Run", Run)
        folder = reference.train(args)
    episodes = pd.read_csv(folder / "episodes.csv")
    assert episodes[["step", "length"]].to_numpy().tolist() == [[2000, 1000], [2000, 1000]]
    assert episodes["return"].sum() == pytest.approx(sum(seen[:1000]), rel=1e-4)
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics["step"].tolist() == [2048]
    assert metrics["charts/mean_return_100"][0] == pytest.approx(episodes["return"].mean())
    about, tables = report.read_run(folder)
    assert (about["script"], about["args"]["algo"]) == ("reference", "trpo") and len(tables["episodes"]) == 2
    assert {path.name for path in folder.iterdir()} == {"agent.pt", "args.json", "episodes.csv", "metrics.csv"}


@NEEDS_SB3
def test_the_pages_piece_plays_agents_without_noise(tmp_path, monkeypatch, capsys):
    """TRPO on Swimmer-v4, whose episodes all have 1000 steps, with its normaliser as training left it."""
    suite = tmp_path / "runs" / "reference_mujoco" / "trpo__Swimmer-v4__1"
    folder = reference.train(
        reference.Args(algo="trpo", env_id="Swimmer-v4", total_timesteps=2048, output_dir=str(suite))
    )
    made, make_model = [], reference.make_model
    monkeypatch.setattr(reference, "make_model", lambda *args: made.append(make_model(*args)) or made[0])
    monkeypatch.chdir(tmp_path)
    (piece,) = re.findall("```python\n(.*?)```", (ROOT / "docs" / "reference.md").read_text(), re.S)
    exec(piece, {})
    counts = [model.get_vec_normalize_env().obs_rms.count for model in made]
    assert counts == [pytest.approx(2048, abs=10)]
    summary = report.summarise(*report.read_run(folder))
    printed = re.search(r"trpo Swimmer-v4 1 (-?\d+) ", capsys.readouterr().out)
    assert summary["without_noise"] == pytest.approx(float(printed[1]), abs=0.5)
    trained = pd.read_csv(folder / "episodes.csv")["return"].mean()
    assert summary["without_noise"] != pytest.approx(trained, abs=1e-3)


@NEEDS_SB3
def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """SAC, which acts at random for so long. Its rows stay, and the replay buffer has the steps before and after."""
    original, step = reference.make_envs, reference.Run._on_step

    def make_envs(*args):
        envs, settings = original(*args)
        return envs, settings | {"buffer_size": 2000}

    def stop_at_500(run):
        if run.num_timesteps == 500:
            run.request_stop(signal.SIGTERM, None)
        return step(run)

    monkeypatch.setattr(reference, "make_envs", make_envs)
    monkeypatch.setattr(reference.Run, "_on_step", stop_at_500)
    with pytest.raises(SystemExit, match="go on with: .* --resume"):
        reference.train(reference.Args(algo="sac", total_timesteps=1200, output_dir=str(tmp_path)))
    (folder,) = tmp_path.iterdir()
    before = (folder / "episodes.csv").read_text()
    assert (folder / "checkpoint.pt").exists() and not (folder / "agent.pt").exists()
    with pytest.raises(reference.BadInput, match="other options"):
        reference.train(reference.Args(seed=2, resume=str(folder)))
    (folder / "episodes.csv").write_text(before + "501,0,1\n")  # as if killed after the checkpoint
    filled = []
    ended = reference.Run._on_training_end

    def count(run):
        filled.append(run.model.replay_buffer.pos)
        ended(run)

    monkeypatch.setattr(reference.Run, "_on_training_end", count)
    reference.train(reference.Args(resume=str(folder)))
    assert filled == [1200]
    after = (folder / "episodes.csv").read_text()
    assert after.startswith(before) and "501,0,1" not in after
    rows = pd.read_csv(folder / "episodes.csv")
    assert rows["step"].is_monotonic_increasing and rows["step"].iloc[-1] > 1000
    assert rows["length"].sum() <= 1200


def test_bad_input_is_one_message_and_creates_nothing(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(json.dumps({"args": {"algo": "trpo"}}))
    for message, words in {
        "no settings of trpo for CartPole-v1, only for Ant-v4": dict(env_id="CartPole-v1"),
        "no settings of dqn for Hopper-v4": dict(algo="dqn"),
        "cannot use the run .*checkpoint.pt": dict(resume=str(tmp_path / "run")),
        "cannot use the run .*args.json": dict(resume=str(tmp_path / "none")),
    }.items():
        args = reference.Args(**words) if "resume" in words else reference.Args(output_dir=str(tmp_path), **words)
        with pytest.raises(reference.BadInput, match=message):
            reference.train(args)
    monkeypatch.setattr(reference, "sb3", None)
    with pytest.raises(reference.BadInput, match="pip install -r benchmark/requirements.txt"):
        reference.train(reference.Args(output_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
