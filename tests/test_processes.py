"""Real processes of the scripts for control: kills, signals, full disks, closed pipes, torchrun. All are slow.

Most are of one script: test_siblings holds that Run has the same text in all."""

import functools
import math
import os
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import probe_envs  # noqa: F401 (registers tasks)
import pytest
import torch
from common import (
    ATARI,
    CONTINUOUS,
    ROOT,
    STOPS,
    TINY,
    column,
    end_of,
    fork,
    make_batch,
    options,
    read,
    resume,
    train,
    without_clock,
)

pytestmark = pytest.mark.slow
bpo = CONTINUOUS[0]
# One episode a step, a reward that tells rows apart, an iteration of 32 steps in some ten milliseconds.
TARGET = TINY[bpo] | dict(env_id="Target-v0", num_envs=4, seed=5)
IMPORTABLE = dict(env_id="probe_envs:Target-v0")  # in a process that has not imported it


def rows_on_disk(folder):
    """The only run in a folder and how many lines its metrics have; (None, 0) before its first checkpoint."""
    found = list(folder.glob("*/checkpoint.pt"))
    return (found[0].parent, (found[0].parent / "metrics.csv").read_text().count("\n")) if found else (None, 0)


def wait_for_rows(folder, lines, pid, timeout=60):
    deadline = time.time() + timeout
    while rows_on_disk(folder)[1] < lines:
        assert time.time() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0), (folder / "stderr").read_text()
        time.sleep(0.002)
    return rows_on_disk(folder)[0]


# --- signals and kills


def test_twenty_kills_lose_and_double_no_row(tmp_path):
    """Every kill comes at a random moment: while the run starts, trains or writes."""
    rng, words, step = random.Random(1), [], None
    settings, total = TARGET | dict(lr_schedule="constant", checkpoint_seconds=0.02), 12_800
    for kill in range(20):
        lines = rows_on_disk(tmp_path)[1]
        words = words or options(**settings, total_timesteps=total, output_dir=tmp_path)
        pid = fork(bpo, words, tmp_path)
        if kill % 3 == 0:
            run_dir = wait_for_rows(tmp_path, lines + rng.randrange(2, 8), pid)
        time.sleep(rng.uniform(0, 0.03 if kill % 3 == 0 else 0.2))
        os.kill(pid, signal.SIGKILL)
        assert end_of(pid, tmp_path) == (-signal.SIGKILL, []), f"kill {kill} came too late"
        words, step = ["--resume", run_dir], step or torch.load(run_dir / "checkpoint.pt")["step"]
    assert end_of(fork(bpo, words, tmp_path), tmp_path) == (0, [])
    assert (run_dir / "agent.pt").exists() and not list(run_dir.glob("*.tmp"))
    agent = torch.load(run_dir / "agent.pt")["agent"]
    assert agent["obs_stats.count"] == agent["return_stats.count"] == total
    undisturbed = train(bpo, tmp_path / "undisturbed", **settings, total_timesteps=step)
    ends = {"metrics.csv": range(32, total + 1, 32), "episodes.csv": np.repeat(range(4, total + 1, 4), 4)}
    for name, steps in ends.items():
        rows = read(run_dir / name)
        assert column(rows, "step").tolist() == list(steps)
        assert step > 0 and without_clock(rows, step) == without_clock(read(undisturbed / name))


@pytest.mark.parametrize("name", STOPS)
def test_first_signal_ends_a_run_with_a_checkpoint(name, tmp_path):
    settings = TARGET | IMPORTABLE | dict(checkpoint_seconds=0.05, output_dir=tmp_path)
    words = options(**settings, total_timesteps=10**7)
    pid = fork(bpo, words, tmp_path)
    run_dir = wait_for_rows(tmp_path, 4, pid)
    os.kill(pid, STOPS[name])
    code, (message,) = end_of(pid, tmp_path)
    step = torch.load(run_dir / "checkpoint.pt")["step"]
    assert code == 1 and message.startswith(f"stopped at step {step}; go on with: ")
    command, own = message.split("go on with: ")[1], ["--env-id", IMPORTABLE["env_id"]]
    assert shlex.split(command) == [sys.executable, os.path.abspath(bpo.__file__), "--resume", str(run_dir), *own]
    assert read(run_dir / "metrics.csv")[-1]["step"] == step == len(read(run_dir / "episodes.csv"))
    assert not (run_dir / "agent.pt").exists()
    if name == "SIGHUP":  # pasted into a shell that stands elsewhere
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        pasted = f"{command} --total-timesteps {step + 64}"
        subprocess.run(pasted, shell=True, cwd="/", env=environment, check=True, capture_output=True, timeout=120)
        assert (run_dir / "agent.pt").exists() and len(read(run_dir / "episodes.csv")) == step + 64


def test_second_signal_ends_the_process_at_once(tmp_path):
    settings = TARGET | dict(env_id="Sleepy-v0", num_steps=64, output_dir=tmp_path)
    pid = fork(bpo, options(**settings), tmp_path)
    wait_for_rows(tmp_path, 6, pid)
    time.sleep(0.5)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the first one waits for the iteration"
    os.kill(pid, signal.SIGINT)
    assert end_of(pid, tmp_path, timeout=5) == (-signal.SIGINT, [])


def test_nohup_keeps_a_run_alive(tmp_path):
    ignore = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    pid = fork(bpo, options(**TARGET | dict(output_dir=tmp_path), total_timesteps=3200), tmp_path, ignore)
    run_dir = wait_for_rows(tmp_path, 4, pid)
    os.kill(pid, signal.SIGHUP)
    assert end_of(pid, tmp_path) == (0, []) and (run_dir / "agent.pt").exists()


# --- disks and pipes


@pytest.mark.parametrize("room", [2000, 20_000])
def test_full_disk_ends_with_one_line(room, tmp_path):
    """Files may grow to some bytes, as on a disk with that much left: args.json fits, then only the logs do."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit is then an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    words = options(compile=False, num_steps=64, update_epochs=1, checkpoint_seconds=0, output_dir=tmp_path / "out")
    process = start(bpo, words, cwd=tmp_path, preexec_fn=limit)  # no fork: EnvPool's threads do not survive one
    code, lines = process.wait(120), process.stderr.read().splitlines()
    assert code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not list(tmp_path.rglob("checkpoint.pt"))


def start(script, words, **kwargs):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent)} | kwargs.pop("env", {})
    command = [sys.executable, script.__file__, *words]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, text=True, env=environment, **pipes | kwargs)


def test_closed_pipe_does_not_end_a_run(tmp_path):
    """As in `python bpo_continuous_action.py | head -c 1`, but closed for certain before the run prints."""
    settings = TARGET | IMPORTABLE | dict(output_dir=tmp_path)
    process = start(bpo, options(**settings, total_timesteps=320), cwd=tmp_path)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "") and len(list(tmp_path.glob("*/agent.pt"))) == 1


def test_interrupt_during_the_imports_prints_nothing(tmp_path):
    process = start(bpo, ["--num-envs", "2"], cwd=tmp_path)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():  # torch takes seconds
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "") and not list(tmp_path.iterdir())


def test_bad_input_ends_a_real_process_with_status_two(tmp_path):
    process = start(bpo, ["--env-id", "CartPole-v1"], cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, len(err.splitlines())) == (2, "", 1) and err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_track_writes_an_offline_wandb_run(tmp_path):
    pytest.importorskip("wandb")
    settings = TARGET | IMPORTABLE | dict(track=True, total_timesteps=300, output_dir=tmp_path)
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(tmp_path)}
    process = start(bpo, options(**settings), cwd=tmp_path, env=environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (offline,) = tmp_path.glob("probe_envs-Target-v0__*/wandb/offline-run-*/*.wandb")
    assert b"charts/episodic_return" in offline.read_bytes()


# --- several processes


def run_ranks(command, folder, until=lambda processes: None):
    """Runs a command as two processes of a group: the exit status and the output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ranks = [os.environ | group | dict(RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    processes = [subprocess.Popen(command, cwd=folder, env=env, **pipes) for env in ranks]
    until(processes)
    outputs = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


WORKER = """
import sys, torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import bpo_atari_envpool as bpo, ppo_atari_envpool as ppo
torch.set_num_threads(1)
dist.init_process_group("gloo")
cases, results = torch.load(sys.argv[2], weights_only=False), []
for name, settings, state, batch in cases:
    script = {"bpo": bpo, "ppo": ppo}[name]
    args = script.Args(device="cpu", **settings)
    agent = script.Agent(4, 5, args)
    agent.load_state_dict(state)
    half = {name: x.chunk(2)[bpo.RANK] for name, x in batch.items() if name != "moments"}
    half["moments"] = script.minibatch_moments(half["returns"] - half["values"])
    gradient, stats = script.minibatch_gradient(script.minibatch_loss, agent, half, args)
    results.append((half["moments"], gradient, stats["grad_norm"], script.average(stats["approx_kl"])))
games = [[(0, 5.0, 9), (2, 6.0, 9)], [(0, 7.0, 8), (1, 8.0, 8)]][bpo.RANK]
results.append(bpo.add_up(100, bpo.np.array([2, 1, 2]) + bpo.RANK, games))
torch.save(results, f"{sys.argv[2]}.{bpo.RANK}")
dist.destroy_process_group()
"""


def test_two_processes_compute_what_one_does_on_the_same_data(tmp_path):
    """Gradients of halves whose own advantage moments differ from the whole's; steps and games in order."""
    cases, expected = [], []
    for name, settings in (("bpo", {"norm_adv": True, "temperature": 0.1}), ("ppo", {})):
        script, settings = ATARI[name == "ppo"], settings | {"max_grad_norm": 0.05}
        args, agent, batch = make_batch(script, torch.float32, **settings)
        batch["returns"][:6] += 2
        batch["moments"] = script.minibatch_moments(batch["returns"] - batch["values"])
        gradient, stats = script.minibatch_gradient(script.minibatch_loss, agent, batch, args)
        assert gradient.norm().item() == pytest.approx(0.05, rel=1e-3)  # clipped, as one
        cases.append((name, settings, agent.state_dict(), batch))
        expected.append((batch["moments"], gradient, stats["grad_norm"], stats["approx_kl"]))
    torch.save(cases, tmp_path / "cases")
    ends = run_ranks([sys.executable, "-c", WORKER, str(ROOT), str(tmp_path / "cases")], tmp_path)
    assert [code for code, *_ in ends] == [0, 0], ends
    for rank in range(2):
        *results, added = torch.load(tmp_path / f"cases.{rank}", weights_only=False)
        torch.testing.assert_close(results, expected, rtol=2e-4, atol=2e-6)
        assert added == (113, [(105, 5.0, 9), (105, 7.0, 8), (108, 8.0, 8), (113, 6.0, 9)])


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


def test_two_processes_train_as_one_run_and_stop_together(tmp_path):
    """A signal to the second one ends both; the run is one log, and one process goes on with it."""
    script = ATARI[0]
    settings = TINY[script] | dict(num_envs=4, num_steps=32, minibatch_size=64, output_dir=str(tmp_path))
    command = [sys.executable, script.__file__, *options(**settings, total_timesteps=90_000)]
    (code, out, err), second = run_ranks(command, tmp_path, stop_after(4, tmp_path, number=1))
    (run_dir,) = tmp_path.iterdir()
    assert second == (0, "", "") and (code, len(err.splitlines())) == (1, 1), (out, err)
    assert f"--resume {run_dir}" in err and "stopped at step" in err
    metrics, checkpoint = read(run_dir / "metrics.csv"), torch.load(run_dir / "checkpoint.pt")
    steps = column(metrics, "step")
    assert steps[-1] == checkpoint["step"] and (np.diff(steps) > 0).all() and 32 * 4 * 0.9 < steps[0] <= 32 * 4
    assert not [name for name, x in metrics[-1].items() if not math.isfinite(x) and "mean_" not in name]

    total = str(int(steps[-1]) + 200)
    assert resume(script, run_dir, "--total-timesteps", total) == str(run_dir)
    resumed = read(run_dir / "metrics.csv")
    for row, expected in zip(without_clock(resumed), without_clock(metrics)):
        assert row == pytest.approx(expected, nan_ok=True)
    assert len(resumed) > len(metrics) and resumed[-1]["step"] >= int(total)
    lengths = column(read(run_dir / "episodes.csv"), "length")
    assert len(lengths) and lengths.min() > 5 * 15 and lengths.sum() <= resumed[-1]["step"]


def test_what_is_wrong_with_the_words_is_said_by_one_process(tmp_path):
    ends = run_ranks([sys.executable, ATARI[0].__file__, "--device", "cpu", "--num-envs", "9"], tmp_path)
    assert [code for code, *_ in ends] == [2, 2] and not list(tmp_path.iterdir())
    first, second = (" ".join((out + err).replace("│", " ").split()) for _, out, err in ends)
    assert "--num-envs and --minibatch-size must be multiples of the 2 processes" in first and not second


PENDULUMS = ["--env-id", "Pendulum-v1", "--device", "cpu"]


@pytest.mark.parametrize("words, message", [
    (["--num-steps", "1000000", "--num-envs", "1000000"], "error: .*pass --num-envs .* or less\n"),
    (["--num-steps", "1000000000"], r"[\s\S]*num_steps[\s\S]*"),  # a box, which names the option
])  # fmt: skip
def test_sizes_that_cannot_be_are_one_message(words, message, tmp_path):
    """In a process of its own: in this one, what earlier tests left would disturb the measurement of memory."""
    command = [sys.executable, ROOT / "ppo_locomotion.py", *PENDULUMS, *words]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and "Traceback" not in run.stderr and re.fullmatch(message, run.stderr), run.stderr
    assert not list(tmp_path.iterdir())
