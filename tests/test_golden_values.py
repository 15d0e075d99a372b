"""The scripts compute what they computed before they were rebuilt: losses, gradients, parameters after steps.

The values were recorded by tests/record_golden_values*.py at 6853f33 (continuous actions) and a762edc (all else), whose
scripts have other interfaces; git log -- tests/record_golden_values.py finds the recorders.
"""

import copy
import importlib
import json
import zlib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ATARI, ROBOTS, gradients_of, set_gradients

RENAMED = {"clip_value_loss": "clip_vloss", "value_coef": "vf_coef"}
FILES = {"continuous_action": "", "atari_envpool": "_atari", "locomotion": "_locomotion", "llm": "_llm"}
TESTS = Path(__file__).parent
GOLDEN = {name: json.loads((TESTS / f"golden_values{x}.json").read_text()) for name, x in FILES.items()}
CASES = {family: [(x, v) for x, variants in y["variants"].items() for v in variants] for family, y in GOLDEN.items()}
CONTROL = [pytest.param(*x, id=", ".join(x)) for family in list(FILES)[:3] for x in CASES[family]]
LANGUAGE = [pytest.param(*x, id=", ".join(x)) for x in CASES["llm"]]


# --- control


def frames():
    x = np.random.default_rng(0).integers(0, 256, (16, 7, 7, 4), dtype=np.uint8)
    return torch.from_numpy(x.repeat(12, 1).repeat(12, 2))


def drawn(name, shape):
    """The value that a parameter of Atari's networks starts with."""
    x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=tuple(shape))
    return torch.from_numpy(x * (2 / max(1, np.prod(shape[1:]))) ** 0.5 if len(shape) > 1 else 0.1 * x).float()


def excerpt(x):
    """Norm and three entries of a parameter of Atari's networks, or of its gradient."""
    x = x.detach().flatten()
    places = np.random.default_rng(len(x)).integers(len(x), size=3)
    return [float(f"{value:.9g}") for value in (x.double().norm().item(), *x[places].tolist())]


# Names of Atari's parameters in the file: for linear heads, then for those with a hidden layer.
LINEAR = {"policy.0": "policy", "value.0": "value", "median.1.0": "median.1"}
MLP = {"policy.0": "policy_branch.0", "policy.2": "policy", "value.0": "value_branch.0", "value.2": "value"}
MLP |= {"median.1.0": "median.0.0", "median.1.2": "median.1"}


def named_parameters(script, agent, settings):
    """The agent's parameters by their names in the file, where an MLP head of a median has its own layers alone."""
    if script in ATARI:
        names = MLP if settings.get("heads") == "mlp" else LINEAR
        pairs = [(*name.rsplit(".", 1), x) for name, x in agent.named_parameters()]
        return {f"{names.get(layer, layer)}.{kind}": x for layer, kind, x in pairs}
    mlp_head = settings.get("median_network") == "mlp-head"
    return {x.replace("median.1.", "median.") if mlp_head else x: p for x, p in agent.named_parameters()}


def tensors(golden):
    return {name: torch.tensor(x["values"]).view(x["shape"]) for name, x in golden.items()}


def assert_are(script, parameters, golden):
    assert parameters.keys() == golden.keys()
    for name, x in parameters.items():
        found = excerpt(x) if script in ATARI else x.detach().flatten().tolist()
        assert found == pytest.approx(golden[name], rel=1e-5, abs=1e-7), name


def prepare(script, golden, settings):
    """Settings, agent and samples of the recording."""
    if script in ATARI:
        batch = {key: torch.tensor(x) for key, x in golden["batch"].items()} | {"obs": frames()}
        batch["log_policy"] = batch.pop("logits").log_softmax(-1)
        batch["log_probs"] = batch["log_policy"].gather(1, batch["actions"][:, None])[:, 0]
        batch["moments"] = script.minibatch_moments(batch["returns"] - batch["values"])
        args = script.Args(device="cpu", learning_rate=2e-5, **settings)
        return args, script.Agent(4, 4, args), batch
    batch = tensors(golden["batch"])
    batch["stds"] = batch.pop("log_stds").exp()
    if script not in ROBOTS:
        args = script.Args(hidden_size=4, **settings)
        return args, script.Agent(3, -torch.ones(2), torch.ones(2), args), batch
    args = script.Args(hidden_sizes=(6, 5), num_envs=12, num_steps=2, num_minibatches=1, update_epochs=5, **settings)
    return args, script.Agent(3, 4, [-1.0, -1.0], [1.0, 1.0], args), batch


@pytest.mark.parametrize("name, variant", CONTROL)
def test_losses_gradient_and_five_steps_are_the_recorded_ones(name, variant):
    script, recorded = importlib.import_module(name), GOLDEN[name.split("_", 1)[1]]
    golden = recorded["variants"][name][variant]
    settings = {RENAMED.get(key, key): value for key, value in golden["settings"].items()}
    if name == "ppo_continuous_action":
        settings.setdefault("clip_coef", 0.2)  # the default of that time
    if no_median := settings.pop("use_median", True) is False:
        settings["median_network"] = "none"
    if name == "bpo_atari_envpool" and settings.get("heads") == "mlp":
        settings["median_network"] = "mlp-head"
    args, agent, batch = prepare(script, recorded, settings)
    if no_median:
        batch["medians"] = batch["values"]  # as prepare() of the script has it then
    if script in ROBOTS:
        critics = [batch[x] for x in ("values", "medians")][: 1 + name.startswith("bpo")]
        batch |= script.measure_advantages(batch["returns"], *critics, args)
    parameters, mlp_head = named_parameters(script, agent, settings), settings.get("median_network") == "mlp-head"
    with torch.no_grad():
        for key, x in parameters.items():
            file = None if script in ATARI else tensors(recorded["parameters"])
            x.copy_(file[key.replace("median", "median_mlp") if mlp_head else key] if file else drawn(key, x.shape))
    optimizer = script.make_optimizer(agent, args)
    (group,), losses, rates = optimizer.param_groups, [], []
    for step in range(5):
        losses.append(script.minibatch_loss(agent, batch, args)[0].item())
        gradients, stats = gradients_of(script, agent, batch, args)
        set_gradients(optimizer, gradients)
        if step == 0:
            expected = {key.removeprefix("losses/"): value for key, value in golden["statistics"].items()}
            if no_median:
                assert expected.pop("median_loss") == 0
            assert {key: x.item() for key, x in stats.items()} == pytest.approx(expected, rel=1e-5, abs=1e-7)
            parts = torch.cat([x.flatten() for x in gradients]).split([x.numel() for x in parameters.values()])
            assert_are(script, dict(zip(parameters, parts)), golden["gradient"])
        if "learning_rates" in golden and args.lr_schedule == "adaptive":
            group["lr"].copy_(script.adaptive_learning_rate(group["lr"], stats["kl"], args.desired_kl))
        rates.append(group["lr"].item())
        optimizer.step()
    assert losses == pytest.approx(golden["losses"], rel=1e-5)
    assert rates == pytest.approx(golden.get("learning_rates", rates), rel=1e-5)
    assert_are(script, named_parameters(script, agent, settings), golden["after"])


# --- language models

SIZES = dict(num_prompts=2, minibatch_prompts=2, group_size=6, micro_batch_tokens=60, max_completion_length=5)
SIZES |= dict(learning_rate=1e-3, lr_warmup=2, update_epochs=3, device="cpu")
NUMBERS = [Fraction(12), Fraction(3, 4)]


def numbers(x):
    return [float(f"{value:.9g}") for value in x.flatten().tolist()]


def seeded_groups(script, tokenizer):
    """Two groups of completions of 1 to 5 tokens, as rollout gives them."""
    generator, groups = torch.Generator().manual_seed(3), []
    for prompt in ("12+34=", "5+6="):
        lengths = torch.randint(1, 6, (6,), generator=generator)
        completions = [torch.randint(2, 14, (n,), generator=generator).tolist() for n in lengths.tolist()]
        rewards = torch.randint(0, 3, (6,), generator=generator).double() / 2
        group = dict(problem={"ids": tokenizer(prompt)["input_ids"]}, completions=completions, log_probs=[None] * 6)
        groups.append(group | dict(rewards=rewards, truncated=(lengths == 5).double()))
    return groups


def shift(model, seed):
    """Moves all weights a little, so that ratios are on both sides of the bounds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            x += 0.02 * torch.randn(x.shape, generator=generator)


def entries(tensors):
    """The same 40 entries of the tensors put in a row."""
    flat = torch.cat([x.detach().flatten() for x in tensors])
    return numbers(flat[torch.randint(len(flat), (40,), generator=torch.Generator().manual_seed(4))])


@pytest.mark.parametrize("name, variant", LANGUAGE)
def test_losses_gradient_and_three_steps_are_the_recorded_ones(name, variant):
    script, golden = importlib.import_module(name), GOLDEN["llm"]["variants"][name][variant]
    recorded = {"baseline": "median"} if name == "gbpo_llm" else {}  # the default of then
    args = script.Args(**SIZES, **golden["settings"], **recorded)
    model, tokenizer = script.make_model(args, torch.device("cpu"))
    shift(reference := copy.deepcopy(model), 5)
    (minibatch,) = script.make_minibatches(model, reference, seeded_groups(script, tokenizer), args)
    assert len(minibatch) > 1
    shift(model, 6)
    learner, losses = script.Learner(model, args), []
    for step in range(3):
        totals = Counter()
        for batch in minibatch:
            loss, stats, _ = script.minibatch_loss(model, batch, args)
            loss.backward()
            totals.update({key: x.item() for key, x in stats.items()})
        losses.append(totals["loss"])
        if step == 0:
            assert totals == pytest.approx(golden["statistics"], rel=1e-5, abs=1e-7)
            gradients = [x.grad for x in model.parameters()]
            assert [x.norm().item() for x in gradients] == pytest.approx(golden["norms"], rel=1e-5)
            assert entries(gradients) == pytest.approx(golden["entries"], rel=1e-5, abs=1e-7)
        learner.step(0)
    assert losses == pytest.approx(golden["losses"], rel=1e-5)
    assert entries(model.parameters()) == pytest.approx(golden["after"], rel=1e-5, abs=1e-7)


def test_advantages_rewards_samples_and_draws_are_the_recorded_ones():
    gbpo, grpo = map(importlib.import_module, ("gbpo_llm", "grpo_llm"))
    golden, close = GOLDEN["llm"]["shared"], torch.testing.assert_close
    rewards = torch.tensor(golden["rewards"], dtype=torch.float64)
    for case, both in golden["advantages"].items():
        scale, quantile = case.split()
        found = gbpo.group_advantages(rewards, float(quantile), scale)
        close(torch.stack(found), torch.tensor(both, dtype=torch.float64))
        assert torch.equal(grpo.group_advantages(rewards, scale), found[0])
    groups = [{"problem": {"answer": x}, "texts": texts} for x, texts in zip(NUMBERS, golden["texts"])]
    for reward, (scores, stats) in golden["scores"].items():
        args = gbpo.Args(reward=reward)
        if reward == "majority":
            found, statistics = gbpo.majority_rewards(groups, args)
            assert {name: x.tolist() for name, x in statistics.items()} == stats
        else:
            found = gbpo.true_rewards(groups, args)
        assert found.tolist() == scores
    model, tokenizer = gbpo.make_model(gbpo.Args(), torch.device("cpu"))
    prompts = [tokenizer(x)["input_ids"] for x in ("12+34=", "5+6=", "99+1=")]
    uniforms = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(2))
    for options, samples in zip(((1.0, 1.0), (0.6, 0.9)), golden["samples"]):
        assert gbpo.generate(model, prompts, uniforms, [1], *options, 8) == samples
    assert gbpo.draw(7, 4, 12, 1).tolist() == golden["draws"]
