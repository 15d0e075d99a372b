"""The Atari scripts compute what they computed before they were rebuilt (recorded at a762edc)."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from record_golden_values_atari import excerpt, frames, initial

GOLDEN = json.loads(Path(__file__).with_name("golden_values_atari.json").read_text())
RENAMED = {"clip_value_loss": "clip_vloss", "value_coef": "vf_coef"}
CASES = [(script, variant) for script, variants in GOLDEN["variants"].items() for variant in variants]
# The parameters' names in the file: for linear heads, then for those with a hidden layer.
LINEAR = {"policy.0": "policy", "value.0": "value", "median.1.0": "median.1"}
MLP = {"policy.0": "policy_branch.0", "policy.2": "policy", "value.0": "value_branch.0", "value.2": "value"}
MLP |= {"median.1.0": "median.0.0", "median.1.2": "median.1"}


def named_parameters(agent, heads):
    names = MLP if heads == "mlp" else LINEAR
    pairs = [(*name.rsplit(".", 1), x) for name, x in agent.named_parameters()]
    return {f"{names.get(layer, layer)}.{kind}": x for layer, kind, x in pairs}


@pytest.mark.parametrize("name, variant", CASES, ids=[f"{script[:3]}, {variant}" for script, variant in CASES])
def test_losses_gradient_and_five_steps_are_the_recorded_ones(name, variant):
    script, golden = importlib.import_module(name), GOLDEN["variants"][name][variant]
    settings = {RENAMED.get(key, key): value for key, value in golden["settings"].items()}
    batch = {key: torch.tensor(x) for key, x in GOLDEN["batch"].items()} | {"obs": frames()}
    batch["log_policy"] = batch.pop("logits").log_softmax(-1)
    batch["log_probs"] = batch["log_policy"].gather(1, batch["actions"][:, None])[:, 0]
    batch["moments"] = script.minibatch_moments(batch["returns"] - batch["values"])
    if settings.pop("use_median", True) is False:
        settings["median_network"], batch["medians"] = "none", batch["values"]  # as prepare() has it then
    heads = settings.get("heads", "linear")
    if heads == "mlp" and name.startswith("bpo"):
        settings["median_network"] = "mlp-head"
    args = script.Args(device="cpu", learning_rate=2e-5, **settings)
    agent = script.Agent(4, 4, args)
    parameters = named_parameters(agent, heads)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(initial(key, parameter.shape))
    optimizer = script.make_optimizer(agent, args)
    (flat,) = optimizer.param_groups[0]["params"]
    losses = []
    for step in range(5):
        losses.append(script.minibatch_loss(agent, batch, args)[0].item())
        flat.grad, stats = script.minibatch_gradient(script.minibatch_loss, agent, batch, args)
        if step == 0:
            expected = {key.removeprefix("losses/"): value for key, value in golden["statistics"].items()}
            if settings.get("median_network") == "none":
                assert expected.pop("median_loss") == 0
            assert {key: x.item() for key, x in stats.items()} == pytest.approx(expected, rel=1e-5, abs=1e-7)
            parts = flat.grad.split([x.numel() for x in parameters.values()])
            found = {key: excerpt(x) for key, x in zip(parameters, parts)}
            assert found.keys() == golden["gradient"].keys()
            for key, x in found.items():
                assert x == pytest.approx(golden["gradient"][key], rel=1e-5, abs=1e-7), key
        optimizer.step()
    assert losses == pytest.approx(golden["losses"], rel=1e-5)
    for key, x in parameters.items():
        assert excerpt(x) == pytest.approx(golden["after"][key], rel=1e-5, abs=1e-7), key
