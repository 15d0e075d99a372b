"""The scripts for continuous actions compute what they computed before they were rebuilt (recorded at 6853f33)."""

import importlib
import json
from pathlib import Path

import pytest
import torch

GOLDEN = json.loads(Path(__file__).with_name("golden_values.json").read_text())
RENAMED = {"clip_value_loss": "clip_vloss", "value_coef": "vf_coef"}
CASES = [(script, variant) for script, variants in GOLDEN["variants"].items() for variant in variants]


def tensors(part):
    return {name: torch.tensor(x["values"]).view(x["shape"]) for name, x in GOLDEN[part].items()}


def named_parameters(agent, mlp_head):
    """The agent's parameters by the names in the file, where an MLP head has its own layers alone."""
    parameters = dict(agent.named_parameters())
    return {name.replace("median.1.", "median.") if mlp_head else name: x for name, x in parameters.items()}


@pytest.mark.parametrize("name, variant", CASES, ids=[f"{script[:3]}, {variant}" for script, variant in CASES])
def test_losses_gradient_and_five_steps_are_the_recorded_ones(name, variant):
    script, golden = importlib.import_module(name), GOLDEN["variants"][name][variant]
    settings = {RENAMED.get(key, key): value for key, value in golden["settings"].items()}
    initial, batch = tensors("parameters"), tensors("batch")
    batch["stds"] = batch.pop("log_stds").exp()
    if settings.pop("use_median", True) is False:
        settings["median_network"] = "none"
        batch["medians"] = batch["values"]  # as prepare() has it then
    args = script.Args(hidden_size=4, **settings)
    agent = script.Agent(3, -torch.ones(2), torch.ones(2), args)
    mlp_head = settings.get("median_network") == "mlp-head"
    with torch.no_grad():
        for key, parameter in named_parameters(agent, mlp_head).items():
            parameter.copy_(initial[key.replace("median", "median_mlp") if mlp_head else key])
    optimizer = script.make_optimizer(agent, args)
    flat = optimizer.param_groups[0]["params"][0]
    losses = []
    for step in range(5):
        loss, _ = script.minibatch_loss(agent, batch, args)
        flat.grad, stats = script.minibatch_gradient(agent, batch, args)
        losses.append(loss.item())
        if step == 0:
            expected = {key.removeprefix("losses/"): value for key, value in golden["statistics"].items()}
            if settings.get("median_network") == "none":
                assert expected.pop("median_loss") == 0
            assert {key: x.item() for key, x in stats.items()} == pytest.approx(expected, rel=1e-5, abs=1e-7)
            where = script.Agent(3, -torch.ones(2), torch.ones(2), args)
            torch.nn.utils.vector_to_parameters(flat.grad, where.parameters())
            for key, gradient in named_parameters(where, mlp_head).items():
                expected = torch.tensor(golden["gradient"][key]).view_as(gradient)
                torch.testing.assert_close(gradient.data, expected, rtol=1e-5, atol=1e-7)
        optimizer.step()
    assert losses == pytest.approx(golden["losses"], rel=1e-5)
    after = named_parameters(agent, mlp_head)
    assert after.keys() == golden["after"].keys()
    for key, expected in golden["after"].items():
        torch.testing.assert_close(after[key].data, torch.tensor(expected).view_as(after[key]), rtol=1e-5, atol=1e-7)
