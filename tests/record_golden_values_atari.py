"""Records tests/golden_values_atari.json: losses, gradients and parameters after five steps, of each variant.

    python tests/record_golden_values_atari.py

Run at commit a762edc, before the Atari scripts were rebuilt; later scripts must give the same values. NumPy draws the
initial parameters and the frames; the file has the norm and three entries of what became of each parameter.
"""

import importlib
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
ACTIONS, SAMPLES, STEPS = 4, 16, 5
VARIANTS = {
    "bpo_atari_envpool": {
        "defaults": {},
        "mean baseline": dict(use_median=False),
        "tv": dict(divergence="tv"),
        "kl": dict(divergence="kl", temperature=0.7),
        "tv_coef": dict(tv_coef=0.3),
        "asymmetric bounds": dict(ratio_low=0.5, ratio_high=1.9, max_grad_norm=100.0, temperature=0.5),
        "recomputed advantages": dict(recompute_advantages=True, temperature=0.5),
        "mlp heads": dict(heads="mlp"),
        "norm_adv": dict(norm_adv=True, temperature=0.3, median_temperature=None),
        "clipped values": dict(clip_value_loss=True),
        "entropy bonus": dict(ent_coef=0.1, value_coef=0.2),
        "released": dict(heads="mlp", recompute_advantages=True, max_grad_norm=1.0),
    },
    "ppo_atari_envpool": {
        "defaults": {},
        "mlp heads": dict(heads="mlp"),
        "clipped values": dict(clip_value_loss=True),
        "no norm_adv": dict(norm_adv=False, ent_coef=0.1, value_coef=0.2),
    },
}


def initial(name, shape):
    """The value that a parameter starts with."""
    x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=tuple(shape))
    return torch.from_numpy(x * (2 / max(1, np.prod(shape[1:]))) ** 0.5 if len(shape) > 1 else 0.1 * x).float()


def frames():
    x = np.random.default_rng(0).integers(0, 256, (SAMPLES, 7, 7, 4), dtype=np.uint8)
    return torch.from_numpy(x.repeat(12, 1).repeat(12, 2))


def excerpt(x):
    """Norm and three entries of a parameter or its gradient."""
    x = x.detach().flatten()
    places = np.random.default_rng(len(x)).integers(len(x), size=3)
    return [float(f"{value:.9g}") for value in (x.double().norm().item(), *x[places].tolist())]


def record(script, settings, batch):
    args = script.Args(device="cpu", learning_rate=2e-5, **settings)
    agent = script.Agent(4, ACTIONS, args)
    parameters, names = list(agent.parameters()), [name for name, _ in agent.named_parameters()]
    with torch.no_grad():
        for name, parameter in zip(names, parameters):
            parameter.copy_(initial(name, parameter.shape))
    flat = torch.nn.utils.parameters_to_vector(parameters).detach()
    torch.nn.utils.vector_to_parameters(flat, parameters)
    optimizer = torch.optim.Adam([flat], lr=torch.tensor(args.learning_rate), eps=1e-5, fused=True)
    moments, everything, losses = script.minibatch_moments(batch["advantages"]), torch.arange(SAMPLES), []
    for step in range(STEPS):
        loss, _ = script.minibatch_loss(agent, batch, moments, args)
        losses.append(float(f"{loss.item():.9g}"))
        flat.grad, stats, stat_names = script.minibatch_gradient(
            script.minibatch_loss, agent, parameters, batch, everything, moments, args
        )
        if step == 0:
            first = {name: float(f"{x:.9g}") for name, x in zip(stat_names, stats.tolist())}
            parts = flat.grad.split([x.numel() for x in parameters])
            gradient = {name: excerpt(x) for name, x in zip(names, parts)}
        optimizer.step()
    after = {name: excerpt(x) for name, x in zip(names, parameters)}
    return {"settings": settings, "losses": losses, "statistics": first, "gradient": gradient, "after": after}


def main():
    torch.set_num_threads(1)
    rng, bpo = np.random.default_rng(1), importlib.import_module("bpo_atari_envpool")
    agent = bpo.Agent(4, ACTIONS, bpo.Args(device="cpu"))
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            parameter.copy_(initial(name, parameter.shape))
        outputs = agent(frames())
    noise = {name: torch.from_numpy(rng.normal(size=x.shape)).float() for name, x in outputs.items()}
    old = {name: x + 0.3 * noise[name] for name, x in outputs.items()}
    actions = torch.from_numpy(rng.integers(ACTIONS, size=SAMPLES))
    returns = old["values"] + torch.from_numpy(rng.normal(0.3, 1, SAMPLES)).float()
    batch = dict(old, actions=actions, returns=returns)
    golden = {"commit": "a762edc", "batch": {name: x.tolist() for name, x in batch.items()}, "variants": {}}
    batch |= dict(obs=frames(), log_probs=bpo.log_prob(old["logits"], actions), advantages=returns - old["values"])
    for name, variants in VARIANTS.items():
        script = importlib.import_module(name)
        golden["variants"][name] = {k: record(script, v, batch) for k, v in variants.items()}
    (TESTS / "golden_values_atari.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
