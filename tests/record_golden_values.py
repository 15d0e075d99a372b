"""Records tests/golden_values.json: losses, gradients and parameters after five steps, of each variant of the pair.

    python tests/record_golden_values.py

Run at commit 6853f33, before the scripts for continuous actions were rebuilt; later scripts must give the same values.
Parameters carry the names that separate nn.Sequential networks would give them.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from torch.optim.adam import adam

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
OBS, ACTIONS, HIDDEN, SAMPLES = 3, 2, 4, 24

PAPER_HOPPER = dict(clip_coef=0.25, temperature=0.001, norm_adv=False, activation="relu", max_grad_norm=1.0)
PAPER_HOPPER |= dict(learning_rate=9.808e-5)
RELEASED = dict(temperature=10.0, median_temperature=1.0, median_network="mlp-head", recompute_advantages=True)
VARIANTS = {
    "bpo_continuous_action": {
        "defaults": {},
        "mean baseline": dict(use_median=False),
        "tv": dict(divergence="tv"),
        "kl": dict(divergence="kl"),
        "tv_coef": dict(tv_coef=0.3),
        "asymmetric bounds": dict(ratio_low=0.5, ratio_high=1.9, max_grad_norm=100.0),
        "recomputed advantages": dict(recompute_advantages=True),
        "mlp-head": dict(median_network="mlp-head"),
        "no normalisations": dict(norm_adv=False, norm_obs=False, norm_reward=False),
        "entropy bonus": dict(ent_coef=0.01),
        "paper, Hopper": PAPER_HOPPER,
        "released, Hopper": PAPER_HOPPER | RELEASED,
    },
    "ppo_continuous_action": {
        "defaults": {},
        "spo": dict(objective="spo"),
        "clipped values": dict(clip_value_loss=True),
        "no normalisations": dict(norm_adv=False, norm_obs=False, norm_reward=False),
    },
}


def mlp(name, inputs, outputs):
    sizes = [(HIDDEN, inputs), (HIDDEN, HIDDEN), (outputs, HIDDEN)]
    layers = {f"{name}.{2 * k}.weight": 0.6 * torch.randn(size) for k, size in enumerate(sizes)}
    return layers | {f"{name}.{2 * k}.bias": 0.3 * torch.randn(size[0]) for k, size in enumerate(sizes)}


def views(agent):
    """The agent's parameters as those of separate networks: name -> view."""
    named = {"log_std": agent.log_std}
    heads = [
        ("policy", agent.policy_head),
        ("value", agent.value_head),
        ("median", getattr(agent, "median_head", None)),
    ]
    for k, (name, head) in enumerate(heads):
        if head is None:
            continue
        hidden = agent.hidden
        if name == "median" and agent.median_mlp is not None:
            k, hidden = 0, agent.median_mlp
        for layer, weight, bias in ((0, hidden.weight_1, hidden.bias_1), (2, hidden.weight_2, hidden.bias_2)):
            named |= {f"{name}.{layer}.weight": weight[k].T, f"{name}.{layer}.bias": bias[k, 0]}
        named |= {f"{name}.4.weight": head.weight, f"{name}.4.bias": head.bias}
    return named


def numbers(x):
    return [float(f"{value:.9g}") for value in x.flatten().tolist()]


def record(script, settings, parameters, batch):
    args = script.Args(hidden_size=HIDDEN, compile=False, **settings)
    agent = script.Agent(OBS, ACTIONS, args)
    median = "median_mlp" if settings.get("median_network") == "mlp-head" else "median"
    with torch.no_grad():
        for name, view in views(agent).items():
            of = name.replace("median", median)
            view.copy_(parameters[of])
    flat = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, agent.parameters())
    state = dict(exp_avgs=[torch.zeros_like(flat)], exp_avg_sqs=[torch.zeros_like(flat)], state_steps=[torch.zeros(())])
    fixed = dict(beta1=0.9, beta2=0.999, eps=1e-5, weight_decay=0.0, max_exp_avg_sqs=[], amsgrad=False, maximize=False)
    losses = []
    for step in range(5):
        everything, rate = torch.arange(SAMPLES), torch.tensor(args.learning_rate)
        loss, _ = script.minibatch_loss(agent, batch, args)
        losses.append(float(f"{loss.item():.9g}"))
        gradient, stats, names = script.minibatch_gradient(
            agent, list(agent.parameters()), batch, everything, rate, args
        )
        if step == 0:
            first = dict(zip(names, numbers(stats)))
            grads = torch.zeros_like(flat)
            probe = script.Agent(OBS, ACTIONS, args)
            torch.nn.utils.vector_to_parameters(grads.copy_(gradient), probe.parameters())
            gradients = {name: numbers(view) for name, view in views(probe).items()}
        adam([flat], [gradient], **state, **fixed, lr=args.learning_rate, fused=True)
    after = {name: numbers(view) for name, view in views(agent).items()}
    return {"settings": settings, "losses": losses, "statistics": first, "gradient": gradients, "after": after}


def main():
    torch.manual_seed(0)
    parameters = {"log_std": torch.tensor([-0.4, 0.1])}
    parameters |= mlp("policy", OBS, ACTIONS) | mlp("value", OBS, 1) | mlp("median", OBS, 1)
    parameters |= mlp("median_mlp", HIDDEN, 1)
    obs, log_stds = torch.randn(SAMPLES, OBS), torch.full((SAMPLES, ACTIONS), -0.2)
    means = obs
    for k in (0, 2, 4):
        means = means @ parameters[f"policy.{k}.weight"].T + parameters[f"policy.{k}.bias"]
        means = means.tanh() if k < 4 else means + 0.1 * torch.randn(SAMPLES, ACTIONS)
    actions = means + log_stds.exp() * torch.randn(SAMPLES, ACTIONS)
    log_probs = torch.distributions.Normal(means, log_stds.exp()).log_prob(actions).sum(-1)
    batch = dict(obs=obs, actions=actions, means=means, log_stds=log_stds, log_probs=log_probs)
    batch |= dict(returns=torch.randn(SAMPLES), values=torch.randn(SAMPLES), medians=torch.randn(SAMPLES))
    batch["advantages"] = batch["returns"] - batch["values"]
    golden = {"commit": "6853f33", "batch": {}, "parameters": {}, "variants": {}}
    for part, tensors in (("batch", batch), ("parameters", parameters)):
        golden[part] = {name: {"shape": list(x.shape), "values": numbers(x)} for name, x in tensors.items()}
    for name, variants in VARIANTS.items():
        script = importlib.import_module(name)
        golden["variants"][name] = {k: record(script, v, parameters, batch) for k, v in variants.items()}
    (TESTS / "golden_values.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
