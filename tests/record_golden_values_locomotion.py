"""Records tests/golden_values_locomotion.json: losses, gradients and parameters after five steps, of each variant.

    python tests/record_golden_values_locomotion.py

Run at commit a762edc, before the scripts for legged robots were rebuilt; later scripts must give the same values.
Parameters carry the names that nn.Sequential networks called policy, value and median give them.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
OBS, PRIVILEGED, ACTIONS, HIDDEN, SAMPLES = 3, 4, 2, (6, 5), 24

VARIANTS = {
    "bpo_locomotion": {
        "defaults": {},
        "soft targets": dict(temperature=0.5, clip_coef=0.2),
        "no norm_adv": dict(norm_adv=False),
        "mean baseline": dict(use_median=False),
        "tv_coef": dict(tv_coef=0.3),
        "clipped values": dict(clip_value_loss=True),
        "entropy bonus": dict(ent_coef=0.1),
        "small gradients": dict(max_grad_norm=0.05),
        "rate of a linear schedule": dict(lr_schedule="linear", learning_rate=0.003),
    },
    "ppo_locomotion": {
        "defaults": {},
        "no norm_adv": dict(norm_adv=False),
        "plain values": dict(clip_value_loss=False, value_coef=0.3),
        "constant rate": dict(lr_schedule="constant", learning_rate=0.003, ent_coef=0.0),
    },
}


def mlp(name, inputs, outputs):
    sizes, layers = [inputs, *HIDDEN, outputs], {}
    for k, (before, after) in enumerate(zip(sizes, sizes[1:])):
        layers[f"{name}.{2 * k}.weight"] = 0.6 * torch.randn(after, before)
        layers[f"{name}.{2 * k}.bias"] = 0.3 * torch.randn(after)
    return layers


def named(agent):
    """The agent's parameters by their later names."""
    names = {"critic": "value", "median_head": "median"}
    parts = [(name.split("."), x) for name, x in agent.named_parameters()]
    return {".".join([names.get(first, first), *rest]): x for (first, *rest), x in parts}


def numbers(x):
    return [float(f"{value:.9g}") for value in x.flatten().tolist()]


def record(script, settings, parameters, batch):
    args = script.Args(hidden_sizes=HIDDEN, device="cpu", **settings)
    agent = script.Agent(OBS, PRIVILEGED, ACTIONS, args)
    with torch.no_grad():
        for name, parameter in named(agent).items():
            parameter.copy_(parameters[name])
    flat = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, agent.parameters())
    rate = torch.tensor(args.learning_rate)
    optimizer, losses, rates = torch.optim.Adam([flat], lr=rate, fused=True), [], []
    batch = dict(batch)
    script.prepare_batch(batch, args)
    for step in range(5):
        losses.append(script.minibatch_loss(agent, batch, args)[0].item())
        flat.grad, stats, names = script.minibatch_gradient(agent, list(agent.parameters()), batch, rate, args)
        if step == 0:
            first = {name.removeprefix("losses/"): x for name, x in zip(names, numbers(stats))}
            probe = script.Agent(OBS, PRIVILEGED, ACTIONS, args)
            torch.nn.utils.vector_to_parameters(flat.grad.clone(), probe.parameters())
            gradient = {name: numbers(x) for name, x in named(probe).items()}
        rates.append(rate.item())
        optimizer.step()
        agent.std.data.clamp_(min=0.01)
    after = {name: numbers(x) for name, x in named(agent).items()}
    lists = dict(losses=numbers(torch.tensor(losses)), learning_rates=numbers(torch.tensor(rates)))
    return {"settings": settings, "statistics": first, "gradient": gradient, "after": after} | lists


def main():
    torch.manual_seed(0)
    parameters = {"std": torch.tensor([0.6, 0.9])}
    parameters |= mlp("policy", OBS, ACTIONS) | mlp("value", PRIVILEGED, 1) | mlp("median", PRIVILEGED, 1)
    obs, privileged = torch.randn(SAMPLES, OBS), torch.randn(SAMPLES, PRIVILEGED)
    means, stds = obs, torch.full((SAMPLES, ACTIONS), 0.8)
    for k in (0, 2, 4):
        means = means @ parameters[f"policy.{k}.weight"].T + parameters[f"policy.{k}.bias"]
        means = torch.nn.functional.elu(means) if k < 4 else means + 0.1 * torch.randn(SAMPLES, ACTIONS)
    actions = means + stds * torch.randn(SAMPLES, ACTIONS)
    log_probs = torch.distributions.Normal(means, stds).log_prob(actions).sum(-1)
    batch = dict(obs=obs, privileged=privileged, actions=actions, means=means, log_stds=stds.log(), log_probs=log_probs)
    batch |= dict(returns=torch.randn(SAMPLES), values=torch.randn(SAMPLES), medians=torch.randn(SAMPLES))
    batch["advantages"] = batch["returns"] - batch["values"]
    golden = {"commit": "a762edc", "batch": {}, "parameters": {}, "variants": {}}
    for part, tensors in (("batch", batch), ("parameters", parameters)):
        golden[part] = {name: {"shape": list(x.shape), "values": numbers(x)} for name, x in tensors.items()}
    for name, variants in VARIANTS.items():
        script = importlib.import_module(name)
        golden["variants"][name] = {k: record(script, v, parameters, batch) for k, v in variants.items()}
    (TESTS / "golden_values_locomotion.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
