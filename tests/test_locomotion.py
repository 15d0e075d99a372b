"""The functions of bpo_locomotion.py and ppo_locomotion.py against formulas, and the likeness of the scripts."""

import ast
import contextlib
import copy
import difflib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

import bpo_continuous_action
import bpo_locomotion as bpo
import ppo_continuous_action
import ppo_locomotion as ppo

ROOT = Path(bpo.__file__).parent
SCRIPTS = pytest.mark.parametrize("script", [bpo, ppo], ids=["bpo", "ppo"])


def new_agent(script, dtype=torch.float64, **overrides):
    torch.manual_seed(1)
    args = script.Args(**{"hidden_sizes": (8, 6), "init_std": 0.7, **overrides})
    return args, script.Agent(3, 4, 2, args).to(dtype)


def sample_batch(script, args, agent, size=48, dtype=torch.float64):
    """A rollout's batch of an older policy: ratios spread around 1, some beyond the bounds."""
    torch.manual_seed(5)
    old = copy.deepcopy(agent)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
        obs, privileged = torch.randn(size, 3, dtype=dtype), torch.randn(size, 4, dtype=dtype)
        means, log_stds = old.policy(obs), old.log_std.expand(size, 2)
        actions = means + log_stds.exp() * torch.randn(size, 2, dtype=dtype)
        batch = dict(obs=obs, privileged=privileged, actions=actions, means=means, log_stds=log_stds)
        batch |= dict(values=old.value(privileged), log_probs=script.log_prob(means, old.log_std, actions))
        batch["returns"] = batch["values"] + 2 * torch.randn(size, dtype=dtype) + 0.5
        batch["advantages"] = batch["returns"] - batch["values"]
        if getattr(args, "use_median", False):
            batch["medians"] = old.median(privileged)
    return batch


# ---------------------------------------------------------------------------------------------------------- returns


@SCRIPTS
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    st.integers(1, 14),
    st.integers(1, 3),
    st.sampled_from([0, 0.1, 0.5]),
    st.sampled_from([0, 0.9, 1]),
    st.sampled_from([0, 0.95, 1]),
)
def test_gae_is_the_sum_of_discounted_errors_within_episodes(script, seed, steps, num, ends, gamma, gae_lambda):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(steps, num)), rng.normal(size=(steps + 1, num))
    terminated, truncated = rng.random((2, steps, num)) < ends  # both at once is possible: terminated counts
    expected = np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        for k in range(t, steps):
            next_value = 0.0 if terminated[k, n] else values[k + 1, n]
            expected[t, n] += (gamma * gae_lambda) ** (k - t) * (rewards[k, n] + gamma * next_value - values[k, n])
            if terminated[k, n] or truncated[k, n]:
                break
    arrays = map(torch.from_numpy, (rewards, values, terminated, truncated))
    advantages, returns = script.compute_gae(*arrays, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(returns, expected + values[:-1], rtol=1e-10, atol=1e-10)


# -------------------------------------------------------------------------------------------------- the target ratio


@pytest.mark.parametrize("norm_adv", [False, True])
@pytest.mark.parametrize("use_median", [False, True])
def test_bpo_targets_are_theorem_4_1_on_the_whole_rollout(norm_adv, use_median):
    args, agent = new_agent(bpo, norm_adv=norm_adv, use_median=use_median, temperature=0.3, clip_coef=0.25)
    batch = sample_batch(bpo, args, agent)
    returns, values = batch["returns"].numpy(), batch["values"].numpy()
    medians = batch["medians"].numpy() if use_median else values
    advantages, median_advantages, scale = returns - values, returns - medians, 1.0
    if norm_adv:
        scale = np.std(advantages, ddof=1)
        advantages = advantages - advantages.mean()
        median_advantages = median_advantages - np.sort(median_advantages)[(len(medians) - 1) // 2]
    bpo.prepare_batch(batch, args)
    targets = 1 + 0.25 * np.tanh(median_advantages / (2 * 0.3 * scale))
    np.testing.assert_allclose(batch["targets"], targets, rtol=1e-6)
    np.testing.assert_allclose(batch["advantages"], advantages / scale, rtol=1e-6)
    assert targets.std() > 0.05 and (abs(targets - 1) < 0.25).all()

    # Corollary 4.4 with the same advantages and targets.
    ratio = np.random.default_rng(1).uniform(0.6, 1.4, len(returns))
    gain = ((targets - 1) * median_advantages).mean()
    divergence = (abs(targets - ratio) * abs(advantages)).mean()
    bound = bpo.improvement_bound(torch.from_numpy(ratio), batch, args)
    assert bound["theory/guaranteed_gain"] == pytest.approx(gain, rel=1e-6)
    assert bound["theory/atv_divergence"] == pytest.approx(divergence, rel=1e-6)
    assert bound["theory/improvement_bound"] == pytest.approx(gain - divergence, rel=1e-6)


def test_bpo_targets_are_level_when_the_critics_lag():
    """Returns that grow by more than they vary: without centring all ratios would be pulled up."""
    for norm_adv in (False, True):
        args, agent = new_agent(bpo, norm_adv=norm_adv)
        batch = sample_batch(bpo, args, agent)
        batch["returns"], batch["advantages"] = batch["returns"] + 20, batch["advantages"] + 20
        bpo.prepare_batch(batch, args)
        up = (batch["targets"] > 1).double().mean()
        assert up == 1 if not norm_adv else 0.4 < up < 0.6


@pytest.mark.parametrize("norm_adv", [False, True])
def test_ppo_standardises_the_whole_rollout_once(norm_adv):
    args, agent = new_agent(ppo, norm_adv=norm_adv)
    batch = sample_batch(ppo, args, agent)
    advantages = batch["advantages"].numpy()
    ppo.prepare_batch(batch, args)
    standard = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(batch["advantages"], standard if norm_adv else advantages, rtol=1e-12)


# ----------------------------------------------------------------------------------------------------- the objective


def literal_objective(script, args, agent, batch):
    """Table 2's and Table 3's objectives through torch.distributions, from the batch as it was before prepare_batch."""
    policy = Independent(Normal(agent.policy(batch["obs"]), agent.std), 1)
    ratio = policy.log_prob(batch["actions"]).exp() / batch["log_probs"].exp()
    values, returns, advantage = agent.critic(batch["privileged"])[:, 0], batch["returns"], batch["advantages"]
    value_loss = (values - returns) ** 2
    if args.clip_value_loss:
        change = torch.clip(values - batch["values"], -args.clip_coef, args.clip_coef)
        value_loss = torch.maximum(value_loss, (batch["values"] + change - returns) ** 2)
    loss = args.value_coef * value_loss.mean() - args.ent_coef * policy.entropy().mean()
    deviation = math.sqrt(((advantage - advantage.mean()) ** 2).sum() / (len(advantage) - 1))
    if args.norm_adv:
        advantage = advantage - advantage.mean()
    if script is ppo:
        advantage = advantage / (deviation if args.norm_adv else 1)
        clipped = ratio.clip(1 - args.clip_coef, 1 + args.clip_coef)
        return loss - torch.minimum(ratio * advantage, clipped * advantage).mean(), ratio
    scale = deviation if args.norm_adv else 1.0
    width, median_advantage = args.temperature * scale, returns - batch["medians" if args.use_median else "values"]
    if args.norm_adv:
        median_advantage = median_advantage - median_advantage.median()
    if args.use_median:
        x = (returns - agent.median_head(batch["privileged"])[:, 0]) / width
        loss = loss + args.median_coef * width * torch.log(torch.exp(x / 2) + torch.exp(-x / 2)).mean()
    target = 1 + args.clip_coef * torch.tanh(median_advantage / (2 * width))
    return loss + ((target - ratio).abs() * (advantage.abs() / scale + args.tv_coef)).mean(), ratio


@pytest.mark.parametrize(
    "script, overrides",
    [
        (bpo, {"temperature": 0.5}),
        (bpo, {"temperature": 0.5, "norm_adv": True, "tv_coef": 0.3, "ent_coef": 0.1}),
        (bpo, {"temperature": 0.5, "use_median": False, "clip_value_loss": True}),
        (bpo, {"temperature": 0.8, "median_coef": 2.0, "value_coef": 0.1, "norm_adv": True, "clip_coef": 0.1}),
        (ppo, {}),
        (ppo, {"norm_adv": False, "clip_value_loss": False, "ent_coef": 0.1, "value_coef": 0.3}),
    ],
    ids=str,
)
def test_objective_and_its_gradient_equal_the_literal_formulas(script, overrides):
    args, agent = new_agent(script, **overrides)
    batch = sample_batch(script, args, agent)
    expected, ratio = literal_objective(script, args, agent, dict(batch))
    script.prepare_batch(batch, args)
    loss, stats = script.minibatch_loss(agent, batch, args)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)
    parameters = list(agent.parameters())
    for gradient, wanted in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    outside = (ratio - 1).abs() > args.clip_coef
    assert 0 < outside.sum() < len(ratio), "the batch must have ratios within the bounds and beyond them"
    assert stats["losses/clipfrac"].item() == pytest.approx(outside.double().mean().item())
    old = Independent(Normal(batch["means"], batch["log_stds"].exp()), 1)
    new = Independent(Normal(agent.policy(batch["obs"]), agent.std), 1)
    assert stats["losses/kl"].item() == pytest.approx(kl_divergence(old, new).mean().item())


@SCRIPTS
def test_the_policy_sees_the_observation_and_the_critics_the_privileged_one(script):
    args, agent = new_agent(script)
    obs, privileged = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    batch = sample_batch(script, args, agent)
    script.prepare_batch(batch, args)
    batch["obs"].requires_grad_()
    batch["privileged"].requires_grad_()
    for name, of_obs in (("losses/policy_loss", True), ("losses/value_loss", False), ("losses/median_loss", False)):
        loss, stats = script.minibatch_loss(agent, batch, args)
        if name in stats:
            inputs = [batch["obs"], batch["privileged"]]
            found = [x is not None for x in torch.autograd.grad(stats[name], inputs, allow_unused=True)]
            assert found == [of_obs, not of_obs], name
    assert agent.policy(obs).shape == (5, 2) and agent.value(privileged).shape == (5,)


@SCRIPTS
def test_the_parameter_is_the_standard_deviation_itself(script):
    _, agent = new_agent(script, init_std=1.0)
    assert agent.std.shape == (2,) and (agent.std == 1).all() and (agent.log_std == 0).all()
    with torch.no_grad():
        agent.std.copy_(torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(agent.log_std.exp(), torch.tensor([0.5, 0.25], dtype=torch.float64))


# ---------------------------------------------------------------------------------------------- the learning rate


@SCRIPTS
@pytest.mark.parametrize(
    "kl, start, expected",
    [
        (0.03, 1e-3, 1e-3 / 1.5),
        (0.01, 1e-3, 1e-3),
        (0.0199, 1e-3, 1e-3),
        (0.0201, 1e-3, 1e-3 / 1.5),
        (0.0051, 1e-3, 1e-3),
        (0.0049, 1e-3, 1.5e-3),
        (0.5, 1.2e-5, 1e-5),
        (0.001, 8e-3, 1e-2),
        (0.0, 1e-3, 1.5e-3),
    ],
)
@pytest.mark.parametrize("moved", ["mean", "std"])
def test_adaptive_learning_rate_follows_rsl_rl(script, kl, start, expected, moved):
    """desired_kl is 0.01: above twice that down by 1.5, not below 1e-5; below half of it up by 1.5, not above 1e-2."""
    args, agent = new_agent(script, torch.float32)
    batch = sample_batch(script, args, agent, dtype=torch.float32)
    with torch.no_grad():  # an old policy whose closed-form divergence from this one is as asked
        batch["means"], batch["log_stds"] = agent.policy(batch["obs"]), agent.log_std.expand(48, 2)
        if moved == "mean":  # two dimensions, each (mean difference / std)^2 / 2
            batch["means"] = batch["means"] + math.sqrt(kl) * agent.std
        else:  # per dimension ln(new/old) + (old/new)^2 / 2 - 1/2 = kl / 2, solved by bisection for old/new > 1
            low, high = 1.0, 3.0
            for _ in range(60):
                r = (low + high) / 2
                low, high = (r, high) if -math.log(r) + r * r / 2 - 0.5 < kl / 2 else (low, r)
            batch["log_stds"] = (agent.std * r).log().expand(48, 2)
    script.prepare_batch(batch, args)
    learning_rate, parameters = torch.tensor(start), list(agent.parameters())
    _, stats, names = script.minibatch_gradient(agent, parameters, batch, learning_rate, args)
    assert stats[names.index("losses/kl")].item() == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert learning_rate.item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- speed


@SCRIPTS
def test_bfloat16_computes_the_same_to_its_precision(script):
    _, agent = new_agent(script, torch.float32)
    _, rough = new_agent(script, torch.float32, bf16=True)
    x = torch.randn(16, 4)
    for exact, found in ((agent.value(x), rough.value(x)), (agent.policy(x[:, :3]), rough.policy(x[:, :3]))):
        assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.dtype == torch.float32 for p in rough.parameters())


@SCRIPTS
@pytest.mark.parametrize("bf16", [False, True])
def test_gradient_is_one_graph(script, bf16):
    """torch.compile traces all of it, the adaptive rate included; inductor's own code is not what is tested here."""
    args, agent = new_agent(script, torch.float32, bf16=bf16)
    batch = sample_batch(script, args, agent, dtype=torch.float32)
    script.prepare_batch(batch, args)
    graph = torch.compile(script.minibatch_gradient, fullgraph=True, backend="aot_eager")
    results, parameters = [], list(agent.parameters())
    for function in (script.minibatch_gradient, graph):
        learning_rate = torch.tensor(1e-3)
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            gradient, stats, _ = function(agent, parameters, batch, learning_rate, args)
        results.append((gradient, stats, learning_rate))
    assert results[0][2] != 1e-3
    for plain, traced in zip(*results):
        torch.testing.assert_close(traced, plain, rtol=1e-4, atol=1e-5)


@SCRIPTS
def test_an_iteration_computes_on_one_device_and_waits_for_nothing(script, monkeypatch):
    """On a device without memory a tensor of the CPU is an error, and so is a number that the host asks for."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no such device
    args, agent = new_agent(script, torch.float32)
    batch = {name: x.to("meta") for name, x in sample_batch(script, args, agent, dtype=torch.float32).items()}
    agent, learning_rate = agent.to("meta"), torch.tensor(1e-3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        agent.policy(torch.zeros(48, 3))
    with pytest.raises(RuntimeError, match="meta"):
        learning_rate.item()
    agent.obs_stats.update(batch["obs"])
    rewards, values = torch.zeros(6, 8, device="meta"), agent.value(agent.normalize_privileged(batch["privileged"]))
    ends = rewards > 0
    results = script.compute_gae(rewards, values[:8].expand(7, 8), ends, ends, args.gamma, args.gae_lambda)
    script.prepare_batch(batch, args)
    results += script.minibatch_gradient(agent, list(agent.parameters()), batch, learning_rate, args)[:2]
    assert all(x.is_meta for x in (*results, *agent.obs_stats.buffers(), *batch.values()))


# ---------------------------------------------------------------------------------------------------------- siblings


def definitions(script):
    """Source text of every top-level function and class."""
    text = Path(script.__file__).read_text()
    nodes = [x for x in ast.parse(text).body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


# What may differ, and why. "less": PPO's text is BPO's with lines left out.
ALLOWED = {
    "Args": "own",  # fewer options, Table 3's defaults
    "policy_loss": "own",  # Eq. 16 and Eq. 17
    "prepare_batch": "own",  # the targets
    "minibatch_loss": "own",  # the objective
    "check_args": "less",  # BPO's own options
    "Agent": "less",  # the median head
    "train": "less",  # the median of the rollout and the theory's statistics
}
ONLY_BPO = {"target_ratio", "median_loss", "improvement_bound"}


def test_what_the_siblings_share_is_the_same_text():
    ours, theirs = definitions(bpo), definitions(ppo)
    assert set(ours) - set(theirs) == ONLY_BPO and set(theirs) <= set(ours)
    different = {name for name in theirs if ours[name] != theirs[name]}
    assert different == set(ALLOWED), f"unexpected: {different - set(ALLOWED)}, now equal: {set(ALLOWED) - different}"
    for name, kind in ALLOWED.items():
        if kind == "less":
            changes = [x for x in difflib.ndiff(theirs[name].splitlines(), ours[name].splitlines()) if x[0] in "+-"]
            assert all(x[0] == "+" for x in changes), f"{name}: {changes}"
            assert "median" in "\n".join(changes) or "improvement_bound" in "\n".join(changes)


# Also in the scripts for continuous actions, in the same words.
SHARED = {"policy_loss"}
SHARED_BPO = {"target_ratio", "median_loss"}


@pytest.mark.parametrize(
    "script, other, names",
    [(bpo, bpo_continuous_action, SHARED | SHARED_BPO), (ppo, ppo_continuous_action, SHARED | {"ratio_bounds"})],
    ids=["bpo", "ppo"],
)
def test_what_is_shared_with_the_continuous_scripts_is_the_same_text(script, other, names):
    ours, theirs = definitions(script), definitions(other)
    assert not [name for name in names if ours[name] != theirs[name]]


@SCRIPTS
def test_normaliser_and_gaussians_are_those_of_torch_and_numpy(script):
    torch.manual_seed(0)
    samples, stats = 5 + 3 * torch.randn(40, 2, dtype=torch.float64), script.RunningNormalizer(2)
    for part in samples.split(15):
        stats.update(part)
    np.testing.assert_allclose(stats.mean, samples.numpy().mean(0), rtol=1e-9)
    np.testing.assert_allclose(stats.var, samples.numpy().var(0), rtol=1e-9)
    old_mean, mean, actions = torch.randn(3, 9, 2, dtype=torch.float64)
    old_log_std, log_std = torch.randn(2, 2, dtype=torch.float64)
    old, new = (Independent(Normal(m, s.exp()), 1) for m, s in ((old_mean, old_log_std), (mean, log_std)))
    torch.testing.assert_close(script.log_prob(mean, log_std, actions), new.log_prob(actions))
    torch.testing.assert_close(script.kl_divergence(old_mean, old_log_std, mean, log_std), kl_divergence(old, new))


# Table 2 and Table 3, rows Go1-Rough, and RSL-RL's settings where the tables are silent.
TABLE = dict(num_steps=24, num_minibatches=4, gamma=0.99, gae_lambda=0.95, lr_schedule="adaptive", desired_kl=0.01)
TABLE |= dict(max_grad_norm=1.0, hidden_sizes=(512, 256, 128))
TABLE2 = TABLE | dict(clip_coef=0.3, ent_coef=0.001, update_epochs=10, temperature=0.001, tv_coef=0.0)
TABLE2 |= dict(value_coef=0.5, median_coef=0.5, norm_adv=True, clip_value_loss=False)
TABLE3 = TABLE | dict(
    clip_coef=0.2, ent_coef=0.01, update_epochs=5, value_coef=1.0, norm_adv=True, clip_value_loss=True
)


def test_defaults_are_the_papers_tables():
    for script, table in ((bpo, TABLE2), (ppo, TABLE3)):
        assert {name: getattr(script.Args(), name) for name in table} == table
    ours, theirs = ({x.name: x for x in y.dataclasses.fields(y.Args)} for y in (bpo, ppo))
    assert [name for name in ours if name in theirs] == list(theirs)
    different = {name for name, x in theirs.items() if (x.type, x.default) != (ours[name].type, ours[name].default)}
    assert different == {"clip_coef", "ent_coef", "update_epochs", "value_coef", "clip_value_loss"}
    assert set(ours) - set(theirs) == {"temperature", "use_median", "median_coef", "tv_coef"}


def test_siblings_differ_in_few_lines():
    ours, theirs = (Path(x.__file__).read_text().splitlines() for x in (bpo, ppo))
    blocks = difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes()
    assert sum(a2 - a1 + b2 - b1 for kind, a1, a2, b1, b2 in blocks if kind != "equal") < 110


@SCRIPTS
def test_every_option_has_a_help_text(script):
    body = next(x for x in ast.parse(Path(script.__file__).read_text()).body if getattr(x, "name", "") == "Args").body
    for field, text in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign) and isinstance(text.value.value, str), ast.unparse(field)


@SCRIPTS
def test_script_imports_no_file_of_this_project_and_no_optional_library(script):
    imported = set()
    for node in ast.parse(Path(script.__file__).read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {x.name.split(".")[0] for x in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert not [name for name in imported if (ROOT / f"{name}.py").exists() or (ROOT / name).is_dir()]
    assert not imported & {"mjlab", "warp", "isaaclab", "mujoco", "envpool"}


def test_importing_a_script_runs_and_creates_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bpo_locomotion, ppo_locomotion"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, list(tmp_path.iterdir())) == (0, "", []), run.stderr
