"""The scripts for legged robots compute what they computed before they were rebuilt (recorded at a762edc)."""

import importlib
import json
from pathlib import Path

import pytest
import torch

GOLDEN = json.loads(Path(__file__).with_name("golden_values_locomotion.json").read_text())
RENAMED = {"clip_value_loss": "clip_vloss", "value_coef": "vf_coef"}
CASES = [(script, variant) for script, variants in GOLDEN["variants"].items() for variant in variants]
close = torch.testing.assert_close


def tensors(part):
    return {name: torch.tensor(x["values"]).view(x["shape"]) for name, x in GOLDEN[part].items()}


def assert_parameters_are(agent, golden):
    parameters = dict(agent.named_parameters())
    assert parameters.keys() == golden.keys()
    for name, x in parameters.items():
        close(x.data, torch.tensor(golden[name]).view_as(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name, variant", CASES, ids=[f"{script[:3]}, {variant}" for script, variant in CASES])
def test_losses_gradient_and_five_steps_are_the_recorded_ones(name, variant, monkeypatch):
    script, golden = importlib.import_module(name), GOLDEN["variants"][name][variant]
    settings = {RENAMED.get(key, key): value for key, value in golden["settings"].items()}
    if no_median := settings.pop("use_median", True) is False:
        settings["median_network"] = "none"
    sizes = dict(hidden_sizes=(6, 5), num_envs=12, num_steps=2, num_minibatches=1, update_epochs=5)
    args = script.Args(**sizes, **settings)
    agent = script.Agent(3, 4, [-1.0, -1.0], [1.0, 1.0], args)
    with torch.no_grad():
        for key, parameter in agent.named_parameters():
            parameter.copy_(tensors("parameters")[key])
    batch = tensors("batch")
    batch["stds"] = batch.pop("log_stds").exp()
    medians = batch["values"] if no_median else batch["medians"]
    critics = (batch["values"], medians) if name[:3] == "bpo" else (batch["values"],)
    batch |= script.measure_advantages(batch["returns"], *critics, args)
    losses, rates, gradient = [], [], script.minibatch_gradient

    def record(*arguments):
        losses.append(script.minibatch_loss(*arguments)[0].item())
        result = gradient(*arguments)
        if len(losses) == 1:
            expected = dict(golden["statistics"])
            if no_median:
                assert expected.pop("median_loss") == 0
            assert {key: x.item() for key, x in result[1].items()} == pytest.approx(expected, rel=1e-5, abs=1e-7)
            where = script.Agent(3, 4, [-1.0, -1.0], [1.0, 1.0], args)
            torch.nn.utils.vector_to_parameters(result[0], where.parameters())
            assert_parameters_are(where, golden["gradient"])
        return result

    metrics = script.update(agent, script.make_optimizer(agent, args), record, batch, args)
    assert losses == pytest.approx(golden["losses"], rel=1e-5)
    rates = golden["learning_rates"]
    assert metrics["charts/learning_rate"] == pytest.approx(sum(rates) / len(rates), rel=1e-5)
    assert_parameters_are(agent, golden["after"])
