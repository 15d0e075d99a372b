"""On a machine with a GPU: it computes what the CPU does, the update waits for nothing, and runs go on elsewhere."""

import copy
from pathlib import Path

import pytest
import torch

import bpo_atari_envpool
import bpo_locomotion
import ppo_atari_envpool
import ppo_locomotion

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ATARI = dict(env_id="Pong-v5", num_envs=4, num_steps=16, minibatch_size=32, total_timesteps=192, update_epochs=2)
ROBOTS = dict(env_id="Hopper-v4", num_envs=8, num_steps=8, num_minibatches=2, hidden_sizes=(32, 16))
ROBOTS |= dict(total_timesteps=192, update_epochs=2, matmul_precision="highest")
SCRIPTS = [(bpo_atari_envpool, ATARI), (ppo_atari_envpool, ATARI), (bpo_locomotion, ROBOTS), (ppo_locomotion, ROBOTS)]
EACH = pytest.mark.parametrize("script, settings", SCRIPTS, ids=[script.SCRIPT for script, _ in SCRIPTS])


def train(script, folder, **settings):
    return Path(script.train(script.Args(output_dir=str(folder), **settings)))


def without_waiting(function):
    def call(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


@EACH
def test_gradients_are_those_of_the_cpu_and_nothing_waits(script, settings, tmp_path, monkeypatch):
    calls, original = [], script.minibatch_gradient

    def compare(*args):
        *before, agent, batch, settings = args
        torch.set_float32_matmul_precision("highest")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        gradient, stats = original(*args) if not calls else without_waiting(original)(*args)
        slow = {name: x.cpu() for name, x in batch.items()}
        expected, expected_stats = original(*before, copy.deepcopy(agent).cpu(), slow, settings)
        found = gradient.cpu() if torch.is_tensor(gradient) else [x.cpu() for x in gradient]
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-5)
        for name in stats:
            torch.testing.assert_close(stats[name].cpu(), expected_stats[name], rtol=1e-2, atol=1e-4)
        calls.append(1)
        return gradient, stats

    monkeypatch.setattr(script, "minibatch_gradient", compare)
    monkeypatch.setattr(torch.optim.Adam, "step", without_waiting(torch.optim.Adam.step))
    train(script, tmp_path, device="cuda", **settings)
    assert len(calls) >= 8


@EACH
@pytest.mark.parametrize("first, then", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_the_other_device(first, then, script, settings, tmp_path):
    run_dir = train(script, tmp_path, device=first, lr_schedule="constant", **settings)
    rows = (run_dir / "metrics.csv").read_text()
    args = script.read_args(["--resume", str(run_dir), "--total-timesteps", "384", "--device", then])
    assert script.train(args) == str(run_dir)
    assert (run_dir / "metrics.csv").read_text().startswith(rows)
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True, map_location="cpu")["step"] >= 384


@EACH
@pytest.mark.parametrize("flags", [dict(compile=True), dict(compile=True, bf16=True), dict(bf16=True)])
def test_compiled_and_in_bfloat16(flags, script, settings, tmp_path):
    assert (train(script, tmp_path, device="cuda", **settings, **flags) / "agent.pt").exists()


@pytest.mark.parametrize("script", [bpo_atari_envpool, ppo_atari_envpool])
def test_cuda_graphs(script, tmp_path):
    run_dir = train(script, tmp_path, device="cuda", compile=True, cuda_graphs=True, **ATARI)
    assert (run_dir / "agent.pt").exists()
