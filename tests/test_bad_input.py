"""What the scripts for control refuse: damaged runs, settings that cannot be, words that name nothing."""

import json
import math
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import probe_envs  # registers tasks
import pydantic
import pytest
import torch
from common import ATARI, BPO, CONTINUOUS, CONTROL, ROBOTS, command_line, contents, each, options, resume, train

# --- runs


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    """A complete run per script for continuous actions; its settings are not the defaults."""
    folder, settings = tmp_path_factory.mktemp("tiny"), dict(env_id="Target-v0", seed=5, total_timesteps=320)
    return {script: train(script, folder, **settings) for script in CONTINUOUS}


@pytest.fixture
def tiny(tiny_runs, tmp_path):
    return lambda script: Path(shutil.copytree(tiny_runs[script], tmp_path / "run"))


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


def change_checkpoint(run, **changes):
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | changes, run / "checkpoint.pt")


def write(path):
    path.write_text("of the user")
    return path


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
    "list for weights": lambda run: change_checkpoint(run, agent=[]),
    "nothing for Adam's state": lambda run: change_checkpoint(run, optimizer=None),
    "text for a random state": lambda run: change_checkpoint(run, rng_state="abc"),
    "checkpoint without sizes": lambda run: drop_from_checkpoint(run, "log_sizes"),
    "sizes of a file elsewhere": lambda run: change_checkpoint(run, log_sizes={str(write(run.parent / "notes")): 0}),
    "episodes lost": lambda run: cut(run / "episodes.csv", 0.9),
    "no metrics.csv": lambda run: (run / "metrics.csv").unlink(),
}


@each(BPO[0])
@pytest.mark.parametrize("damage", [*RESUME_DAMAGES, "sibling's run"])
def test_damaged_run_is_refused_in_one_line_and_stays_as_it_is(script, damage, tiny, tmp_path, monkeypatch):
    run_dir = tiny(script if damage in RESUME_DAMAGES else CONTINUOUS[1])
    RESUME_DAMAGES.get(damage, lambda run: None)(run_dir)
    monkeypatch.chdir(tmp_path)  # an output would land here
    before = contents(tmp_path)
    with pytest.raises(script.BadInput) as error:
        resume(script, "run", "--total-timesteps", "640")
    assert "\n" not in str(error.value) and contents(tmp_path) == before
    if damage in DAMAGES or damage == "sibling's run":  # what enjoy.py reads
        with pytest.raises(script.BadInput, match="cannot use the run ") as error:
            script.load_run(run_dir, "agent.pt")
        assert "\n" not in str(error.value) and contents(tmp_path) == before


@each(*CONTINUOUS)
def test_undamaged_run_is_resumed(script, tiny):
    """Else the test above would say nothing."""
    run_dir = tiny(script)
    script.load_run(run_dir, "agent.pt")
    assert resume(script, run_dir, "--total-timesteps", "640") == str(run_dir)


@each(*CONTINUOUS)
def test_typed_settings_of_a_run_cannot_change(script, tiny, monkeypatch, capsys):
    """Some equal the script's defaults, which the run's settings (seed 5, 16 units) do not."""
    run_dir = tiny(script)
    before = contents(run_dir)
    for words in ("--seed 1", "--num-envs 128", "--seed 1 --num-envs 128", "--gamma 0.5", "--hidden-size 64"):
        with pytest.raises(script.BadInput, match=f"^a run keeps its settings: leave out {words.split()[0]}$"):
            resume(script, run_dir, "--total-timesteps", "640", *words.split())
    code, lines = command_line(script, ["--resume", run_dir, "--no-norm-obs"], monkeypatch, capsys)
    assert (code, lines) == (2, ["error: a run keeps its settings: leave out --norm-obs"])
    with pytest.raises(script.BadInput, match="^a run keeps its settings: leave out --"):
        script.train(script.Args(resume=str(run_dir)))  # not typed at all
    assert contents(run_dir) == before
    args = script.read_args(["--resume", str(run_dir), "--minibatch-size", "32", "--total-timesteps", "9000"])
    assert (args.minibatch_size, args.num_steps, args.total_timesteps) == (32, 16, 9000)  # its own may be typed


@each(*ATARI, *ROBOTS)
def test_a_run_may_go_on_on_another_device_but_with_no_other_setting(script, tmp_path, monkeypatch):
    probe_envs.play(script, monkeypatch, probe_envs.one_step)
    run_dir = train(script, tmp_path, total_timesteps=8)
    about = json.loads((run_dir / "args.json").read_text())
    about["args"]["device"] = "cuda"
    (run_dir / "args.json").write_text(json.dumps(about))
    words = ["--resume", str(run_dir), "--total-timesteps", "99"]
    assert script.read_args(words).device == "cuda" and script.read_args([*words, "--device", "cpu"]).device == "cpu"
    with pytest.raises(script.BadInput, match="a run keeps its settings: leave out --gamma"):
        script.train(script.read_args([*words, "--device", "cpu", "--gamma", "0.5"]))


# --- settings

NAN, INF = math.nan, math.inf
BAD_VALUES = dict(total_timesteps=[0, -5, 1.5, 10**400], num_envs=[0, -1, 10**18], num_steps=[0, 10**18])
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
BAD_TOGETHER = [{"divergence": "kl", "clip_coef": 1.0}, {"divergence": "kl", "tv_coef": 0.1}]
BAD_ATARI = dict(num_steps=[1, 10**9], minibatch_size=[4096, 1], learning_rate=[NAN], heads=["cnn"], seed=[-1])
BAD_ATARI |= dict(cuda_graphs=[True], lr_schedule=["adaptive"])
BAD_ROBOTS = dict(num_envs=[0], num_steps=[1, 10**9], hidden_sizes=[(), (0,)], init_std=[0.0], gamma=[NAN])
BAD_ROBOTS |= dict(ent_coef=[-1.0], num_minibatches=[7, 0], desired_kl=[0.0], no_such_option=[1])
FEW = {x: BAD_BPO_VALUES[x] for x in ("ratio_low", "ratio_high", "temperature", "median_network", "clip_coef")}
OWN = {BPO[0]: BAD_BPO_VALUES, BPO[1]: FEW, BPO[2]: FEW}
BAD = {}
for scripts, values in ((CONTINUOUS, BAD_VALUES), (ATARI, BAD_ATARI), (ROBOTS, BAD_ROBOTS)):
    for script in scripts:
        pairs = [*values.items(), *OWN.get(script, {}).items()]
        BAD[script] = [{name: x} for name, bad in pairs for x in bad] + BAD_TOGETHER * (script in BPO[:2])


@each(*CONTROL)
def test_bad_settings_are_refused(script):
    own = {} if script in CONTINUOUS else {"device": "cpu"}
    for settings in BAD[script]:
        with pytest.raises(pydantic.ValidationError):
            script.Args(**own | settings)
            pytest.fail(f"{settings} are taken")


@each(*BPO)
def test_bad_settings_on_the_command_line_are_a_box_that_names_them(script, capsys):
    for settings in BAD[script]:
        if any(isinstance(x, tuple) for x in settings.values()):
            continue
        with pytest.raises(SystemExit) as stop:
            script.read_args(options(**settings))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in err
        names = {*settings, *(word.split("=")[0] for word in options(**settings)), "0 <= low < 1 < high"}
        assert any(name in err for name in names), (settings, err)


@each(*ATARI)
def test_sizes_that_the_processes_cannot_share_are_refused(script, monkeypatch):
    for sizes in (dict(num_envs=9), dict(minibatch_size=255)):
        assert script.Args(device="cpu", **sizes)
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="must be multiples of the 2 processes"):
            patch.setattr(script, "WORLD_SIZE", 2)
            script.Args(device="cpu", **sizes)


# --- words

GYM = ["--env-backend", "gymnasium", "--env-id"]
OF_CONTINUOUS = {
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
HINT = "EnvPool has no game {}: did you mean Pong-v5"
GAMES = "pong", "PongDeterministic-v4", "PongNoFrameskip-v0", "ALE/Pong-v5"
OF_ATARI = {x: (["--env-id", x], HINT.format(x)) for x in GAMES} | {
    "CartPole-v1": (["--env-id", "CartPole-v1"], "EnvPool has no game CartPole-v1$"),
    "memory": (["--num-steps", "1000000"], "no memory for a rollout's frames, 226 GB: lower --num-steps or --num-envs"),
    "evaluate": (["--evaluate", "RUN_DIR"], "python enjoy.py RUN_DIR --video"),
    "folder that cannot be": (["--output-dir", "/proc/out", "--num-envs", "2"], "choose another --output-dir"),
}
HOPPER = ["--env-id", "Hopper-v4", "--num-envs", "4"]
OF_ROBOTS = {
    "Go2": (["--env-id", "Go2JoystickRoughTerrain-v1"], "EnvPool has no task .* did you mean Go1JoystickRoughTerrain"),
    "go1": (["--env-id", "go1"], "did you mean .*Go1JoystickRoughTerrain-v1"),
    "g1": (["--env-id", "g1joystickroughterrain"], "did you mean .*G1JoystickRoughTerrain-v1"),
    "discrete": (["--env-id", "CartPole-v1"], "has no flat Box action"),
    "Atari": (["--env-id", "Pong-v5"], "has no flat Box observation"),
    "Isaac": (["--env-id", "Isaac-Velocity-Rough-G1-v0"], r"is not installed \(No module .*isaac-sim.github.io"),
    "compile": (["--compile", *HOPPER], r"--compile needs a C\+\+ compiler"),
    "folder that cannot be": ([*HOPPER, "--output-dir", "/proc/out"], "choose another --output-dir"),
}
BAD_WORDS = dict.fromkeys(CONTINUOUS, OF_CONTINUOUS) | dict.fromkeys(ATARI, OF_ATARI) | dict.fromkeys(ROBOTS, OF_ROBOTS)
WORDS = [pytest.param(x, case, id=f"{x.__name__}-{case}") for x, cases in BAD_WORDS.items() for case in cases]


@pytest.mark.parametrize("script, case", WORDS)
def test_bad_input_is_one_line_before_anything_is_created(script, case, monkeypatch, tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "broken_tasks.py").write_text("raise OSError('libGL.so.1\\n missing. Sorry')")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("CXX", "no-such-compiler")
    words, message = BAD_WORDS[script][case]
    own = ["--no-compile"] if script in CONTINUOUS else ["--device", "cpu"]
    with pytest.raises(script.BadInput, match=message) as error:
        script.train(script.read_args([*own, *words]))
    assert "\n" not in str(error.value) and not list((tmp_path / "work").iterdir())


@each(*CONTROL)
def test_bad_input_ends_a_script_with_one_line_and_status_2(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, lines = command_line(script, ["--resume", "missing"], monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: cannot use the run missing: FileNotFound")
    assert not list(tmp_path.iterdir())


@each(*ATARI, *ROBOTS)
def test_devices_that_are_missing_are_named(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(script.BadInput, match="--device cuda needs a GPU"):
        train(script, tmp_path / "out", device="cuda", env_id="Pong-v5" if script in ATARI else "Pendulum-v1")
    assert not (tmp_path / "out").exists()


@each(*CONTROL)
def test_simulators_that_are_missing_are_named(script, monkeypatch, tmp_path):
    cases = [("envpool", "Hopper-v4", "envpool cannot make Hopper-v4: ModuleNotFound")]
    if script in ATARI:
        cases = [("envpool", "Pong-v5", "cannot import EnvPool: ModuleNotFound")]
    if script in ROBOTS:
        cases = [("envpool", "Go1JoystickRoughTerrain-v1", "is not installed .*: pip install -r requirements.txt")]
        cases += [("mjlab", "Mjlab-Cartpole-Balance", "is not installed .*: pip install -r requirements-mjlab.txt")]
    for module, env_id, words in cases:
        monkeypatch.setitem(sys.modules, module, None)  # import then raises ImportError
        monkeypatch.setitem(sys.modules, f"{module}.tasks", None)
        own = {"env_backend": "envpool"} if script in CONTINUOUS else {}
        with pytest.raises(script.BadInput, match=words):
            train(script, tmp_path / "out", env_id=env_id, **own)
    assert not (tmp_path / "out").exists()


@each(*ROBOTS)
def test_simulators_that_do_not_fit_into_memory_are_one_line(script, monkeypatch):
    for error in (MemoryError(), RuntimeError("CUDA out of memory"), RuntimeError("Failed to allocate"), OSError("x")):
        monkeypatch.setattr(script, "EnvPool", lambda *_, error=error: (_ for _ in ()).throw(error))
        kind, words = (OSError, "x") if isinstance(error, OSError) else (script.BadInput, "do not fit into memory")
        with pytest.raises(kind, match=words):
            script.make_envs(script.Args(), 4, 0)


HUGE = [(x, ["--hidden-size", "1000000", "--no-compile"], 1, "error: .*allocate memory") for x in CONTINUOUS]
HUGE += [(BPO[2], ["--env-id", "Pendulum-v1", "--hidden-sizes", "1000000", "1000000"], 1, "error: .*allocate memory")]


@pytest.mark.parametrize("script, words, status, line", HUGE, ids=[x.__name__ for x, *_ in HUGE])
def test_what_does_not_fit_into_memory_is_one_line(script, words, status, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "")  # as some schedulers leave it
    monkeypatch.chdir(tmp_path)
    code, lines = command_line(script, words, monkeypatch, capsys)
    assert code == status and len(lines) == 1 and re.match(line, lines[0]) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("processes", ["2", "two"])
@each(*CONTINUOUS)
def test_torchrun_is_refused_in_one_line(script, processes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", processes)
    code, lines = command_line(script, ["--output-dir", tmp_path / "out"], monkeypatch, capsys)
    assert code == 2 and lines == ["error: this script trains in one process: start it without torchrun"]
    assert not list(tmp_path.iterdir())


def test_tracking_without_an_account_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "short")  # so that none is looked for
    message = "^--track: .*WANDB_API_KEY invalid: .*; WANDB_MODE=offline needs no account$"
    with pytest.raises(CONTINUOUS[0].BadInput, match=message):
        train(CONTINUOUS[0], tmp_path / "out", env_id="Target-v0", track=True)
    assert not list(tmp_path.iterdir())


@each(BPO[0])
def test_what_wandb_refuses_is_one_line_that_costs_no_agent(script, tmp_path, monkeypatch):
    probe_envs.play(script, monkeypatch, probe_envs.one_step)
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = dict(total_timesteps=64, track=True, wandb_project_name="a/b")
    with pytest.raises(script.BadInput, match="^--track: .*Invalid project name"):
        train(script, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())
    run_dir = train(script, tmp_path / "out", **settings | dict(track=False))
    words = "--total-timesteps", "128", "--track", "--wandb-project-name", "a/b"
    with pytest.raises(script.BadInput, match="^--track: .*Invalid project name"):
        resume(script, run_dir, *words)
    assert (run_dir / "agent.pt").exists() and json.loads((run_dir / "args.json").read_text())["args"]["track"] is False
