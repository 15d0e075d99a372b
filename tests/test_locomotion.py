"""The functions of bpo_locomotion.py and ppo_locomotion.py against formulas, and the likeness of the scripts."""

import ast
import contextlib
import copy
import difflib
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import bpo_continuous_action
import bpo_locomotion as bpo
import ppo_continuous_action
import ppo_locomotion as ppo

ROOT = Path(bpo.__file__).parent
SCRIPTS = pytest.mark.parametrize("script", [bpo, ppo], ids=["bpo", "ppo"])
close = torch.testing.assert_close


def make_agent(script, dtype=torch.float64, **overrides):
    torch.manual_seed(1)
    sizes = dict(num_envs=8, num_steps=6, num_minibatches=2, hidden_sizes=(8, 6), init_std=0.7)
    args = script.Args(**sizes | overrides)
    return args, script.Agent(3, 4, [-1.0, -2.0], [1.0, math.inf], args).to(dtype)


def measure_advantages(script, batch, args):
    critics = ["values", "medians"] if script is bpo else ["values"]
    return script.measure_advantages(batch["returns"], *(batch[x] for x in critics), args)


def make_batch(script, dtype=torch.float64, **overrides):
    """Settings, an agent, and 48 samples of an older policy: some ratios are beyond the bounds."""
    args, agent = make_agent(script, dtype, **overrides)
    old = copy.deepcopy(agent)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
        obs, privileged = torch.randn(48, 3, dtype=dtype), torch.randn(48, 4, dtype=dtype)
        policy, values = old(obs), old.value(privileged)
        actions, returns = policy.sample(), values + 2 * torch.randn(48, dtype=dtype) + 0.5
        batch = dict(obs=obs, privileged=privileged, actions=actions, means=policy.mean, stds=policy.stddev)
        batch |= dict(returns=returns, values=values, log_probs=policy.log_prob(actions).sum(-1))
        if script is bpo:
            batch["medians"] = old.median(privileged)
        return args, agent, batch | measure_advantages(script, batch, args)


# --- advantages and the objective


@pytest.mark.parametrize("norm_adv", [False, True])
@pytest.mark.parametrize("median_network", ["separate", "none"])
def test_bpo_measures_advantages_and_corollary_4_4_on_the_whole_rollout(norm_adv, median_network):
    overrides = dict(norm_adv=norm_adv, median_network=median_network, temperature=0.3, clip_coef=0.25)
    args, agent, batch = make_batch(bpo, **overrides)
    returns, values, medians = (batch[x].numpy() for x in ("returns", "values", "medians"))
    assert (median_network == "none") == np.array_equal(values, medians)
    advantages, median_advantages, scale = returns - values, returns - medians, 1.0
    if norm_adv:
        scale = np.std(advantages, ddof=1)
        advantages = advantages - advantages.mean()
        median_advantages = median_advantages - np.sort(median_advantages)[(len(medians) - 1) // 2]
    for name, x in dict(advantages=advantages, median_advantages=median_advantages, scales=[scale] * 48).items():
        np.testing.assert_allclose(batch[name], x, rtol=1e-6, atol=1e-9)
    targets = 1 + 0.25 * np.tanh(median_advantages / (2 * 0.3 * scale))  # Theorem 4.1
    ratio = agent(batch["obs"]).log_prob(batch["actions"]).sum(-1).exp() / batch["log_probs"].exp()
    gain = ((targets - 1) * median_advantages).mean()
    distance = (abs(targets - ratio.detach().numpy()) * abs(advantages)).mean()
    stats = bpo.measure(agent, batch, args)
    assert stats["theory/guaranteed_gain"] == pytest.approx(gain, rel=1e-6)
    assert stats["theory/atv_divergence"] == pytest.approx(distance, rel=1e-6)
    assert stats["theory/improvement_bound"] == pytest.approx(gain - distance, rel=1e-6)
    assert stats["charts/std"] == pytest.approx(agent.std.mean().item())


def test_bpo_targets_are_level_when_the_critics_lag():
    """Returns that grow by more than they vary: without centring all ratios would be pulled up."""
    for norm_adv in (False, True):
        args, _, batch = make_batch(bpo, norm_adv=norm_adv)
        batch["returns"] = batch["returns"] + 20
        advantages = measure_advantages(bpo, batch, args)["median_advantages"]
        up = (advantages > 0).double().mean()
        assert up == 1 if not norm_adv else 0.4 < up < 0.6


@pytest.mark.parametrize("norm_adv", [False, True])
def test_ppo_standardises_the_whole_rollout_once(norm_adv):
    args, _, batch = make_batch(ppo, norm_adv=norm_adv)
    advantages = (batch["returns"] - batch["values"]).numpy()
    standard = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(batch["advantages"], standard if norm_adv else advantages, rtol=1e-12)


@SCRIPTS
@pytest.mark.parametrize("norm_adv", [False, True])
def test_one_sample_and_equal_advantages_give_finite_gradients(script, norm_adv):
    for size, shift in ((1, 3.0), (5, 3.0), (5, 0.0)):
        args, agent, batch = make_batch(script, torch.float32, norm_adv=norm_adv)
        batch = {name: x[:size] for name, x in batch.items()}
        batch["returns"] = batch["values"] + shift
        batch |= measure_advantages(script, batch, args)
        gradient, stats = script.minibatch_gradient(agent, batch, args)
        assert gradient.isfinite().all() and all(x.isfinite() for x in stats.values())
        assert all(math.isfinite(x) for x in script.measure(agent, batch, args).values())


def literal_objective(script, args, agent, batch):
    """The loss through torch.distributions and plain formulas, from returns and the critics of the rollout."""
    policy = Independent(Normal(agent.policy(batch["obs"]), agent.std), 1)
    ratio = policy.log_prob(batch["actions"]).exp() / batch["log_probs"].exp()
    value, returns, old = agent.value(batch["privileged"]), batch["returns"], batch["values"]
    value_loss = (value - returns) ** 2
    if args.clip_vloss:
        change = torch.clip(value - old, -args.clip_coef, args.clip_coef)
        value_loss = torch.maximum(value_loss, (old + change - returns) ** 2)
    loss = args.vf_coef * value_loss.mean() - args.ent_coef * policy.entropy().mean()
    baseline = value.detach() if getattr(args, "recompute_advantages", False) else old
    advantage = returns - baseline
    deviation = math.sqrt(((advantage - advantage.mean()) ** 2).sum() / (len(advantage) - 1)) if args.norm_adv else 1.0
    weight = (advantage - advantage.mean()) / deviation if args.norm_adv else advantage
    if script is ppo:
        clipped = ratio.clip(1 - args.clip_coef, 1 + args.clip_coef)
        return loss - torch.minimum(ratio * weight, clipped * weight).mean(), ratio
    low = 1 - args.clip_coef if args.ratio_low is None else args.ratio_low
    high = 1 + args.clip_coef if args.ratio_high is None else args.ratio_high
    median = agent.median(batch["privileged"])
    median_advantage = returns - (median.detach() if args.recompute_advantages else batch["medians"])
    if args.norm_adv:
        median_advantage = median_advantage - median_advantage.sort().values[(len(returns) - 1) // 2]
    # Corollary 4.7
    odds, k = (high - 1) / (1 - low), (high - 1) / (high - low)
    target = low + (high - low) / (1 + odds * torch.exp(-median_advantage / (args.temperature * deviation)))
    if args.median_network != "none":
        temperature = args.temperature if args.median_temperature is None else args.median_temperature
        x = (returns - median) / (temperature * deviation)
        g = torch.logaddexp(k * x, math.log(odds) - (1 - k) * x)
        loss = loss + args.median_coef * temperature * deviation * g.mean()
    return loss + ((target - ratio).abs() * (weight.abs() + args.tv_coef)).mean(), ratio


AUTHORS = dict(temperature=0.5, median_temperature=1.0, recompute_advantages=True)
CASES = [(bpo, dict(temperature=0.5) | x) for x in (dict(), dict(tv_coef=0.3, ent_coef=0.1), dict(norm_adv=False))]
CASES += [
    (bpo, dict(temperature=0.5, median_network="none", clip_vloss=True)),
    (bpo, dict(temperature=0.8, median_coef=2.0, vf_coef=0.1, clip_coef=0.1)),
    (bpo, dict(temperature=0.5, ratio_low=0.4, ratio_high=2.0)),
    (bpo, dict(temperature=0.5, median_temperature=1.3)),
    (bpo, AUTHORS),
    (bpo, AUTHORS | dict(norm_adv=False, vf_coef=1.0, median_coef=1.0)),
    (bpo, AUTHORS | dict(median_network="none", ratio_high=1.6)),
    (ppo, dict()),
    (ppo, dict(norm_adv=False, clip_vloss=False, ent_coef=0.1, vf_coef=0.3)),
]


@pytest.mark.parametrize("script, overrides", CASES, ids=lambda x: str(x) if isinstance(x, dict) else x.SCRIPT[:3])
def test_objective_and_its_gradient_equal_the_literal_formulas(script, overrides):
    args, agent, batch = make_batch(script, **overrides)
    expected, ratio = literal_objective(script, args, agent, batch)
    loss, stats = script.minibatch_loss(agent, batch, args)
    close(loss, expected, rtol=1e-7, atol=1e-9)
    parameters = list(agent.parameters())
    for gradient, wanted in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        close(gradient, wanted, rtol=1e-6, atol=1e-9)
    low, high = script.ratio_bounds(args)
    outside = (ratio < low) | (ratio > high)
    assert 0 < outside.sum() < len(ratio), "the batch must have ratios within the bounds and beyond them"
    assert stats["clipfrac"].item() == pytest.approx(outside.double().mean().item())
    old = Independent(Normal(batch["means"], batch["stds"]), 1)
    new = Independent(Normal(agent.policy(batch["obs"]), agent.std), 1)
    assert stats["kl"].item() == pytest.approx(kl_divergence(old, new).mean().item())


# --- the agent


@SCRIPTS
def test_the_policy_sees_the_observation_and_the_critics_the_privileged_one(script):
    args, agent, batch = make_batch(script)
    inputs = [batch["obs"].requires_grad_(), batch["privileged"].requires_grad_()]
    for name, of_obs in (("policy_loss", True), ("value_loss", False), ("median_loss", False)):
        _, stats = script.minibatch_loss(agent, batch, args)
        if name in stats:
            found = [x is not None for x in torch.autograd.grad(stats[name], inputs, allow_unused=True)]
            assert found == [of_obs, not of_obs], name


@SCRIPTS
def test_actions_are_clipped_to_the_bounds_and_the_parameter_is_the_deviation(script):
    _, agent = make_agent(script, torch.float32, init_std=1.0)
    assert agent.to_env(torch.tensor([[-5.0, -5.0], [0.3, 5.0]])).tolist() == [[-1.0, -2.0], [pytest.approx(0.3), 5.0]]
    assert (agent.std == 1).all()
    with torch.no_grad():
        agent.std.copy_(torch.tensor([0.5, 0.25]))
    assert agent(torch.zeros(7, 3)).stddev[3].tolist() == [0.5, 0.25]


@SCRIPTS
def test_bfloat16_computes_the_same_to_its_precision(script):
    _, agent = make_agent(script, torch.float32)
    _, rough = make_agent(script, torch.float32, bf16=True)
    for exact, found in zip(agent.parameters(), rough.parameters(), strict=True):
        assert torch.equal(exact, found) and found.dtype == torch.float32
    x = torch.randn(16, 4)
    for exact, found in ((agent.value(x), rough.value(x)), (agent.policy(x[:, :3]), rough.policy(x[:, :3]))):
        assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()


# --- samples


@SCRIPTS
@pytest.mark.parametrize("next_step", [True, False], ids=["next-step", "same-step"])
def test_samples_are_what_the_acting_agent_knew_without_dummies(script, next_step):
    """A time limit bootstraps from the true last observation, or, where that is lost, from the one before."""
    args, agent = make_agent(script)
    shape = (6, 8)
    agent.obs_stats.update(torch.randn(50, 3) * 2 + 1)
    terminated, truncated, dummy = torch.rand(3, *shape) < 0.2
    dummy &= next_step
    rollout = dict(obs=torch.randn(*shape, 3), privileged=torch.randn(7, 8, 4), actions=torch.randn(*shape, 2))
    rollout |= dict(means=torch.randn(*shape, 2), rewards=torch.randn(shape))
    rollout = {name: x.double() for name, x in rollout.items()}
    rollout |= dict(valid=~dummy, terminated=terminated, truncated=truncated)
    batch = script.prepare(agent, rollout, next_step, args)
    rewards, values = rollout["rewards"], agent.value(rollout["privileged"]).detach()
    returns = torch.zeros_like(rewards)
    for t, n in np.ndindex(shape):
        for k in range(t, 6):
            after = 0 if terminated[k, n] else values[k if truncated[k, n] and not next_step else k + 1, n]
            error = rewards[k, n] + args.gamma * after - values[k, n]
            returns[t, n] += (args.gamma * args.gae_lambda) ** (k - t) * error
            if terminated[k, n] or truncated[k, n]:
                break
    policy = Independent(Normal(rollout["means"], agent.std), 1)
    expected = dict(obs=agent.obs_stats(rollout["obs"]), privileged=rollout["privileged"][:-1], values=values[:-1])
    expected |= dict(returns=returns + values[:-1], log_probs=policy.log_prob(rollout["actions"]).detach())
    expected |= dict(actions=rollout["actions"], means=rollout["means"])
    expected = {name: x[~dummy] for name, x in expected.items()}
    close({name: batch[name] for name in expected}, expected, rtol=1e-6, atol=1e-8)
    if script is bpo:
        close(batch["medians"], agent.median(expected["privileged"]).detach())
    close(batch["advantages"], measure_advantages(script, batch, args)["advantages"])


@SCRIPTS
def test_episodes_are_counted_across_rollouts_and_cut_ones_are_none(script):
    """Environment 0 falls in its first episode; 1 is cut in it; 2 has a dummy step; 3 is terminated at its limit."""
    first, second = torch.zeros(2, 5, 4, dtype=torch.bool), torch.zeros(2, 5, 4, dtype=torch.bool)
    first[0, 1, 0] = first[1, 2, 1] = first[1, 0, 2] = first[0, 3, 3] = first[1, 3, 3] = True
    second[1, 2, 1] = second[1, 4, 2] = True
    state = SimpleNamespace(step=100, returns=np.zeros(4), lengths=np.zeros(4), cut=np.ones(4, bool))
    found = []
    for ends in (first, second):
        rewards, valid = torch.arange(1.0, 21).view(5, 4), torch.ones(5, 4, dtype=torch.bool)
        if ends is first:
            valid[1, 2] = False
            rewards[1, 2] = 0
        rollout = dict(rewards=rewards, valid=valid, terminated=ends[0], truncated=ends[1])
        found.append(script.finished_episodes(rollout, state))
    assert found[0] == [(107, 1 + 5, 2), (115, 4 + 8 + 12 + 16, 4)]
    assert found[1] == [(131, 14 + 18 + 2 + 6 + 10, 5), (139, 11 + 15 + 19 + 3 + 7 + 11 + 15 + 19, 8)]
    assert state.step == 139 and state.lengths.tolist() == [8, 2, 0, 6]


# --- the update


@SCRIPTS
def test_minibatches_stay_the_same_in_all_epochs_and_hold_every_sample(script):
    args, agent, batch = make_batch(script, torch.float32, update_epochs=3)
    batch = {name: x[:37] for name, x in batch.items()}  # 11 of the rollout's 48 rows were dummies
    seen, zero = [], torch.zeros(sum(x.numel() for x in agent.parameters()))

    def record(agent, minibatch, args):
        seen.append(minibatch)
        return zero, {"kl": torch.tensor(0.01), "grad_norm": torch.tensor(float(len(seen)))}

    metrics = script.update(agent, script.make_optimizer(agent, args), record, batch, args)
    assert metrics == pytest.approx({"losses/kl": 0.01, "losses/grad_norm": 3.5, "charts/learning_rate": 1e-4})
    epochs = [torch.cat([x["actions"][:, 0] for x in seen[k : k + 2]]) for k in (0, 2, 4)]
    assert torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[0], epochs[2])
    assert [len(x["obs"]) for x in seen] == [24] * 6 and set(epochs[0].tolist()) == set(batch["actions"][:, 0].tolist())
    assert torch.equal(epochs[0][37:], epochs[0][:11])


@SCRIPTS
def test_the_rate_adapts_before_each_step_and_its_mean_is_told(script):
    args, agent, batch = make_batch(script, torch.float32, learning_rate=1e-3, update_epochs=1)
    ones, kl, before = torch.ones(sum(x.numel() for x in agent.parameters())), torch.tensor(0.03), agent.std.clone()
    metrics = script.update(agent, script.make_optimizer(agent, args), lambda *_: (ones, {"kl": kl}), batch, args)
    close(agent.std.detach(), before - 1e-3 / 1.5 - 1e-3 / 1.5**2, rtol=1e-4, atol=1e-6)  # Adam's first two steps
    assert metrics["charts/learning_rate"] == pytest.approx((1e-3 / 1.5 + 1e-3 / 1.5**2) / 2)


@SCRIPTS
def test_standard_deviation_has_a_floor_and_leaves_it_again(script):
    overrides = dict(lr_schedule="constant", learning_rate=0.02, init_std=0.05, update_epochs=10)
    args, agent, batch = make_batch(script, torch.float32, **overrides)
    optimizer, seen = script.make_optimizer(agent, args), []
    for sign in (1.0, -1.0):
        flat = sign * torch.ones(sum(x.numel() for x in agent.parameters()))
        script.update(agent, optimizer, lambda *_, flat=flat: (flat, {"kl": flat[0]}), batch, args)
        seen.append(agent.std.tolist())
    assert seen[0] == pytest.approx([0.01, 0.01]) and min(seen[1]) > 0.011


@SCRIPTS
@pytest.mark.parametrize("overrides", [{}, {"bf16": True, "recompute_advantages": True}], ids=str)
def test_gradient_is_one_graph(script, overrides):
    """torch.compile traces all of it; inductor's own code is not what is tested here."""
    if script is ppo:
        overrides = {name: x for name, x in overrides.items() if name == "bf16"}
    args, agent, batch = make_batch(script, torch.float32, **overrides)
    graph = torch.compile(script.minibatch_gradient, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        traced = graph(agent, batch, args)
    close(traced, script.minibatch_gradient(agent, batch, args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script, overrides", [(ppo, {}), (bpo, {}), (bpo, {"recompute_advantages": True})])
def test_an_update_computes_on_one_device_and_waits_for_nothing(script, overrides, monkeypatch):
    """On a device without memory a tensor of the CPU is an error, and so is a number that the host asks for."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no such device
    args, agent, batch = make_batch(script, torch.float32, **overrides)
    batch, agent = {name: x.to("meta") for name, x in batch.items()}, agent.to("meta")
    lr = torch.tensor(1e-3, device="meta")
    for wrong in (lambda: agent.policy(torch.zeros(48, 3)), lr.item):
        with pytest.raises(RuntimeError, match="meta"):
            wrong()
    agent.obs_stats.update(batch["obs"])
    rewards, values = torch.zeros(6, 8, device="meta"), agent.value(agent.normalize_privileged(batch["privileged"]))
    results = script.compute_gae(
        rewards, values[:8].expand(7, 8), rewards > 0, rewards > 0, args.gamma, args.gae_lambda
    )
    gradient, stats = script.minibatch_gradient(agent, batch | measure_advantages(script, batch, args), args)
    lr.copy_(script.adaptive_learning_rate(lr, stats["kl"], args.desired_kl))
    agent.std.data.clamp_(min=0.01)
    assert all(x.is_meta for x in (*results, gradient, *stats.values(), *agent.obs_stats.buffers()))


# --- the siblings

# Functions and classes that may have lines of their own; all other lines are the same in both files.
OWN_LINES = {
    ppo: "docstring Args ratio_bounds policy_loss minibatch_loss measure_advantages prepare",
    bpo: "docstring Args ratio_bounds target_ratio policy_loss median_loss minibatch_loss measure_advantages Agent "
    "prepare measure",
}
DEFAULTS = "update_epochs clip_coef vf_coef clip_vloss ent_coef"
OWN_OPTIONS = {
    ppo: DEFAULTS,
    bpo: f"{DEFAULTS} ratio_low ratio_high temperature median_temperature median_network median_coef tv_coef "
    "recompute_advantages",
}


def parse(script):
    """The script's lines, its syntax tree, and the name of the top-level function or class that each line is in."""
    text = Path(script.__file__).read_text()
    owners, tree = [""] * (len(text.splitlines()) + 1), ast.parse(text)
    for node in tree.body:
        name = "docstring" if node is tree.body[0] else getattr(node, "name", "")
        owners[node.lineno : node.end_lineno + 1] = [name] * (node.end_lineno + 1 - node.lineno)
    return text.splitlines(), tree, owners[1:]


def test_siblings_share_all_but_the_algorithm():
    (theirs, _, their_owners), (ours, _, our_owners) = parse(ppo), parse(bpo)
    blocks = difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes()
    blocks = [block[1:] for block in blocks if block[0] != "equal"]
    own = {
        ppo: [(their_owners[k], theirs[k]) for start, end, _, _ in blocks for k in range(start, end)],
        bpo: [(our_owners[k], ours[k]) for _, _, start, end in blocks for k in range(start, end)],
    }
    assert len(own[ppo]) + len(own[bpo]) <= 100
    for script, lines in own.items():
        assert {owner for owner, line in lines if line} == set(OWN_LINES[script].split())
        options = [re.match(r"    (\w+): ", line) for owner, line in lines if owner == "Args"]
        assert {option[1] for option in options if option} == set(OWN_OPTIONS[script].split())


# Names that the scripts for continuous actions have as well, in other words.
OTHER = "Args minibatch_loss mlp critic Agent make_envs require_finite collect prepare update measure make_optimizer "
OTHER += "train compiled measure_advantages"


@pytest.mark.parametrize("ours, theirs", [(bpo, bpo_continuous_action), (ppo, ppo_continuous_action)])
def test_all_else_is_the_text_of_the_continuous_pair(ours, theirs):
    texts = []
    for script in (ours, theirs):
        nodes, text = parse(script)[1].body, Path(script.__file__).read_text()
        texts.append({x.name: ast.get_source_segment(text, x) for x in nodes if hasattr(x, "name")})
    shared = texts[0].keys() & texts[1].keys() - set(OTHER.split())
    assert {"Run", "compute_gae", "policy_loss", "load_run", "RunningNormalizer", "minibatch_gradient"} <= shared
    assert not [name for name in shared if texts[0][name] != texts[1][name]]


# Table 2 and Table 3, rows Go1-Rough, and RSL-RL's settings where the tables are silent.
TABLE = dict(num_steps=24, num_minibatches=4, gamma=0.99, gae_lambda=0.95, lr_schedule="adaptive", desired_kl=0.01)
TABLE |= dict(max_grad_norm=1.0, hidden_sizes=(512, 256, 128), norm_adv=True)
TABLE2 = TABLE | dict(clip_coef=0.3, ent_coef=0.001, update_epochs=10, vf_coef=0.5, clip_vloss=False)
TABLE2 |= dict(temperature=0.001, median_temperature=None, median_coef=0.5, tv_coef=0.0, recompute_advantages=False)
TABLE3 = TABLE | dict(clip_coef=0.2, ent_coef=0.01, update_epochs=5, vf_coef=1.0, clip_vloss=True)


@pytest.mark.parametrize("script, table", [(bpo, TABLE2), (ppo, TABLE3)], ids=["bpo", "ppo"])
def test_defaults_are_the_papers_tables_and_every_option_has_a_help_text(script, table, capsys):
    assert {name: getattr(script.Args(), name) for name in table} == table
    source = Path(script.__file__).read_text().split("class Args:")[1].split("    @model_validator")[0]
    texts = re.findall("# (.+)", source)
    assert len(texts) == len(script.dataclasses.fields(script.Args))
    with pytest.raises(SystemExit):
        script.read_args(["--help"])
    shown = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert not [text for text in texts if f" {text} (default: " not in shown]


@SCRIPTS
def test_functions_are_short_and_no_file_of_this_project_is_imported(script):
    nodes = list(ast.walk(parse(script)[1]))
    lengths = {x.name: x.end_lineno - x.lineno + 1 for x in nodes if isinstance(x, ast.FunctionDef)}
    assert len(lengths) > 30 and max(lengths.values()) <= 60, max(lengths, key=lengths.get)
    imported = [name.name for x in nodes if isinstance(x, ast.Import) for name in x.names]
    imported += [x.module for x in nodes if isinstance(x, ast.ImportFrom)]
    names = {x.split(".")[0] for x in imported}
    assert "torch" in names and not [x for x in names if (ROOT / f"{x}.py").exists() or (ROOT / x).is_dir()]


def test_importing_a_script_imports_no_simulator_and_creates_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bpo_locomotion, ppo_locomotion; "
    code += "print({'mjlab', 'warp', 'isaaclab', 'mujoco', 'envpool'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, list(tmp_path.iterdir())) == (0, "set()\n", []), run.stderr
