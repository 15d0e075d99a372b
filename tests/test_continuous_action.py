"""The functions of the BPO and PPO scripts for continuous actions against formulas, and the likeness of the two."""

import ast
import copy
import difflib
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis.strategies import floats, integers, lists, sampled_from
from torch.distributions import Independent, Normal, kl_divergence

import bpo_continuous_action as bpo
import ppo_continuous_action as ppo

ROOT = Path(bpo.__file__).parent
SCRIPTS = pytest.mark.parametrize("script", [bpo, ppo], ids=["bpo", "ppo"])
BOUNDS = pytest.mark.parametrize("low, high", [(0.8, 1.2), (0.999, 1.001), (0, 2), (0.5, 4), (0.2, 1.1), (0, 50)])
SEEDS, INF = integers(0, 2**31), math.inf
allclose, close = np.testing.assert_allclose, torch.testing.assert_close
quick = settings(max_examples=40, deadline=None, derandomize=True)


def make_agent(script, dtype=torch.float64, low=(-1.0, -1.0), high=(1.0, 1.0), **overrides):
    torch.manual_seed(1)
    args = script.Args(**{"hidden_size": 8, "log_std_init": -0.3, "compile": False, **overrides})
    return args, script.Agent(3, torch.tensor(low), torch.tensor(high), args).to(dtype)


def make_batch(script, dtype=torch.float64, **overrides):
    """Settings, an agent, and 48 samples of an older policy: some ratios are beyond the bounds."""
    args, agent = make_agent(script, dtype, **overrides)
    old = copy.deepcopy(agent)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
        obs = torch.randn(48, 3, dtype=dtype)
        policy, values = old(obs), old.value(obs)
        actions, returns = policy.sample(), values + 2 * torch.randn(48, dtype=dtype) + 0.5
        batch = dict(obs=obs, actions=actions, means=policy.mean, stds=policy.stddev, returns=returns, values=values)
        batch["log_probs"] = policy.log_prob(actions).sum(-1)
        return args, agent, batch | ({"medians": old.median(obs)} if script is bpo else {})


# --- returns and running statistics


def literal_gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """Sum over l of (gamma lambda)^l delta_{t+l}, up to the end of t's episode or of the rollout."""
    advantages = np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        for k in range(t, len(rewards)):
            next_value = 0.0 if terminated[k, n] else values[k + 1, n]
            advantages[t, n] += (gamma * gae_lambda) ** (k - t) * (rewards[k, n] + gamma * next_value - values[k, n])
            if terminated[k, n] or truncated[k, n]:
                break
    return advantages


@SCRIPTS
@quick
@given(SEEDS, integers(1, 14), integers(1, 3), *map(sampled_from, ([0, 0.1, 0.5], [0, 0.9, 1], [0, 0.95, 1])))
@example(seed=0, steps=14, num=3, ends=0.1, gamma=0.9, gae_lambda=0.95)
def test_gae_is_the_sum_of_discounted_errors_within_episodes(script, seed, steps, num, ends, gamma, gae_lambda):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(steps, num)), rng.normal(size=(steps + 1, num))
    terminated, truncated = rng.random((2, steps, num)) < ends  # both at once is possible: terminated counts
    expected = literal_gae(rewards, values, terminated, truncated, gamma, gae_lambda)
    tensors = map(torch.from_numpy, (rewards, values, terminated, truncated))
    advantages, returns = script.compute_gae(*tensors, gamma, gae_lambda)
    allclose(advantages, expected, rtol=1e-10, atol=1e-10)
    allclose(returns, expected + values[:-1], rtol=1e-10, atol=1e-10)


@SCRIPTS
def test_gae_of_an_endless_constant_reward_is_zero_at_the_true_value(script):
    """Truncation changes nothing where the value is 1 / (1 - gamma); termination takes gamma V away."""
    rewards, values, never = torch.ones(7, 2), torch.full((8, 2), 10.0), torch.zeros(7, 2, dtype=torch.bool)
    cut = never.clone()
    cut[3, 0] = True
    for truncated in (never, cut):
        advantages, returns = script.compute_gae(rewards, values, never, truncated, 0.9, 0.95)
        assert advantages.dtype == returns.dtype == torch.float32
        close(advantages, torch.zeros(7, 2), atol=1e-5, rtol=0)
        close(returns, values[:-1])
    advantages, _ = script.compute_gae(rewards, values, cut, never, 0.9, 0.95)
    close(advantages[:, 0], torch.tensor([*(-9 * 0.855**k for k in (3, 2, 1, 0)), 0, 0, 0]))


@SCRIPTS
@quick
@given(SEEDS, lists(integers(1, 9), min_size=1, max_size=8), sampled_from([1e-3, 1, 1e3]))
def test_running_normalizer_equals_numpy_over_all_batches(script, seed, sizes, scale):
    samples = np.random.default_rng(seed).normal(5 * scale, scale, (sum(sizes), 3))
    stats = script.RunningNormalizer(3)
    for batch in np.split(samples, np.cumsum(sizes)[:-1]):
        stats.update(torch.from_numpy(batch))
    assert stats.count.tolist() == [len(samples)] * 3
    allclose(stats.mean, samples.mean(0), rtol=1e-9)
    allclose(stats.var, samples.var(0), rtol=1e-6, atol=1e-12 * scale**2)
    if len(samples) > 9:
        mean, std = samples.mean(0), np.sqrt(samples.var(0) + 1e-8)
        points = np.concatenate([samples, [mean - 50 * std, mean + 50 * std]])
        normalized = stats(torch.from_numpy(points).float())
        allclose(normalized, ((points - mean) / std).clip(-10, 10), atol=1e-3)


@SCRIPTS
def test_floor_under_the_standard_deviation_of_observations_leaves_rewards_alone(script):
    args, agent = make_agent(script, torch.float32, min_obs_std=0.5)
    samples = torch.tensor([[0.1, 1.0, 2.0]]) * torch.tensor([[-1.0], [1.0]]) + 7  # deviations 0.1, 1 and 2
    agent.obs_stats.update(samples)
    allclose(agent.normalize(samples), [[-0.2, -1, -1], [0.2, 1, 1]], atol=1e-4)
    agent.return_stats.update(torch.tensor([[-0.1], [0.1]]))
    allclose(agent.return_stats.std(), [0.1], rtol=1e-4)


@SCRIPTS
def test_rewards_are_scaled_by_discounted_returns_that_go_on_across_calls_and_checkpoints(script):
    _, agent = make_agent(script, torch.float32, num_envs=3)
    rewards, valid = np.random.default_rng(0).normal(1, 1, (120, 3)).astype(np.float32), np.ones((120, 3), bool)
    rewards[119, 1] = 1e4  # more than ten deviations
    valid[[20, 59, 90], [0, 1, 2]] = False  # dummies, whose reward is 0, begin a new sum
    rewards *= valid
    sums, current = [], np.zeros(3)
    for half in (slice(0, 60), slice(60, 120)):
        for reward, real in zip(rewards[half], valid[half]):
            current = np.where(real, reward + 0.99 * current, 0)
            sums += current[real].tolist()
        scaled = agent.scale_rewards(torch.from_numpy(rewards[half]), torch.from_numpy(valid[half]), 0.99)
        expected = (rewards[half] / np.sqrt(np.var(sums) + 1e-8)).clip(-10, 10)
        allclose(scaled, expected, rtol=1e-5, atol=1e-7)
        allclose(agent.state_dict()["discounted_return"], current, rtol=1e-6)
        saved, (_, agent) = agent.state_dict(), make_agent(script, torch.float32, num_envs=3)
        agent.load_state_dict(saved)
    assert scaled[59, 1] == 10


# --- the target ratio and the median loss


def literal_target(x, low, high, temperature):
    """Corollary 4.7: c_l + (c_h - c_l) / (1 + (c_h - 1) / (1 - c_l) exp(-A / lambda))"""
    return low + (high - low) / (1 + (high - 1) / (1 - low) * torch.exp(-x / temperature))


def literal_median_loss(x, low, high, temperature):
    """lambda g'(x / lambda), g'(x) = ln(e^(k x) + (c_h-1)/(1-c_l) e^(-(1-k) x)) with k = (c_h-1)/(c_h-c_l)"""
    k, odds, x = (high - 1) / (high - low), (high - 1) / (1 - low), x / temperature
    return temperature * torch.logaddexp(k * x, math.log(odds) - (1 - k) * x)


@BOUNDS
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 30.0])
def test_target_ratio_and_median_loss_are_corollary_4_7(low, high, temperature):
    x = torch.cat([torch.linspace(-30, 30, 121), torch.linspace(-300, 300, 121)]).double() * temperature
    target = bpo.target_ratio(x, low, high, temperature)
    allclose(target, literal_target(x, low, high, temperature), rtol=1e-10)
    assert target[x == 0].tolist() == pytest.approx([1, 1], abs=1e-12)
    returns = torch.randn_like(x)
    loss = bpo.median_loss(returns, returns - x, low, high, temperature)
    allclose(loss, literal_median_loss(x, low, high, temperature), rtol=1e-8, atol=1e-11)
    if low + high == 2:  # Theorem 4.1: 1 + eps tanh(A / 2 lambda), and g without a constant beside it
        half = x / (2 * temperature)
        allclose(target, 1 + (high - 1) * half.tanh(), rtol=1e-10, atol=1e-12)
        allclose(loss, temperature * torch.log(half.exp() + (-half).exp()), rtol=1e-8, atol=1e-11)


@BOUNDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-3, 1e-9])
def test_far_from_the_median_nothing_overflows_and_the_limits_hold(low, high, dtype, temperature):
    """Remark 4.3: many temperatures away the target is a bound, and Eq. 15 the quantile loss."""
    x = torch.tensor([-1e6, -1e3, -90.0, -1.0, 0.0, 1.0, 90.0, 1e3, 1e6], dtype=dtype) * temperature
    returns, medians = torch.zeros_like(x), (-x).requires_grad_()
    target = bpo.target_ratio(returns - medians, low, high, temperature)
    loss = bpo.median_loss(returns, medians, low, high, temperature)
    gradients = [torch.autograd.grad(y.sum(), medians, retain_graph=True)[0] for y in (target, loss)]
    assert all(y.dtype == dtype and y.isfinite().all() for y in (target, loss, *gradients))
    assert (target >= low - 1e-6).all() and (target <= high * (1 + 1e-6)).all() and target.diff().min() >= 0
    close(target[[0, 1, -2, -1]], torch.tensor([low, low, high, high], dtype=dtype))
    k, log_odds = (high - 1) / (high - low), math.log((high - 1) / (1 - low))
    most = temperature * (abs(log_odds) + np.logaddexp(0, log_odds))
    close(loss.detach(), torch.maximum(k * x, (k - 1) * x), atol=most, rtol=1e-6)


@quick
@given(floats(-50, 50), floats(0, 0.99), floats(1.01, 20), sampled_from([0.01, 1.0, 7.0]), floats(-5, 5))
def test_median_loss_gradient_is_one_minus_the_target_ratio_over_the_width(scaled, low, high, temperature, median):
    median = torch.tensor(median, dtype=torch.float64, requires_grad=True)
    returns = median.detach() + scaled * temperature
    bpo.median_loss(returns, median, low, high, temperature).backward()
    expected = -(bpo.target_ratio(returns - median.detach(), low, high, temperature) - 1) / (high - low)
    close(median.grad, expected, rtol=1e-8, atol=1e-8)


@quick
@given(SEEDS, integers(1, 30), sampled_from([(0.6, 1.4), (0, 3), (0.5, 1.2), (0.8, 6)]), sampled_from([0.05, 1.0, 5.0]))
def test_minimiser_of_the_median_loss_normalises_the_target_policy(seed, actions, bounds, temperature):
    """Any distribution over any actions: at the minimum of Eq. 15 the target probabilities sum to one."""
    rng = np.random.default_rng(seed)
    q = torch.from_numpy(rng.normal(size=actions) * rng.choice([0.1, 3]))
    weights = torch.from_numpy(rng.dirichlet(np.ones(actions)))

    def loss(median):
        return (weights * bpo.median_loss(q, torch.full_like(q, median), *bounds, temperature)).sum().item()

    left, right = q.min().item() - 20 * temperature, q.max().item() + 20 * temperature
    for _ in range(60):  # golden sections: uses the loss's values only, not its gradient
        a, b = right - (right - left) * 0.618, left + (right - left) * 0.618
        left, right = (left, b) if loss(a) < loss(b) else (a, right)
    target = bpo.target_ratio(q - (left + right) / 2, *bounds, temperature)
    assert (weights * target).sum().item() == pytest.approx(1, abs=1e-4)


def test_zero_lower_bound_and_temperature_recover_the_cross_entropy_method():
    """The best quarter of the actions takes all the probability when the ratio may go from 0 to 4."""
    q = torch.arange(100).double()
    target = bpo.target_ratio(q - 74.5, 0.0, 4.0, 1e-3)
    close(target, torch.tensor([0.0] * 75 + [4.0] * 25).double())
    losses = [bpo.median_loss(q, torch.full_like(q, m), 0.0, 4.0, 1e-3).mean().item() for m in (73.5, 74.5, 75.5)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


# --- the agent


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu"])
@pytest.mark.parametrize("script, network", [(ppo, None), (bpo, "separate"), (bpo, "mlp-head"), (bpo, "none")])
def test_networks_are_mlps_and_a_median_reads_what_its_name_says(script, network, activation):
    _, agent, batch = make_batch(script, activation=activation, **({"median_network": network} if network else {}))
    depths = {"policy": 3, "value": 3, "median": 5 if network == "mlp-head" else 3}
    for name in [x for x in depths if hasattr(agent, x)]:
        x = obs = batch["obs"].view(4, 12, 3)
        parameters, depth = list(getattr(agent, name).parameters()), depths[name]
        for k in range(depth):
            x = x @ parameters[2 * k].T + parameters[2 * k + 1]
            x = x if k == depth - 1 else getattr(torch.nn.functional, activation)(x)
        assert len(parameters) == 2 * depth
        close(getattr(agent, name)(obs), x if name == "policy" else x[..., 0])
    if network:
        agent.median(batch["obs"]).sum().backward()
        trunk_and_own = ("value.0", "value.2", "median.1")
        wanted = {"separate": "median", "mlp-head": trunk_and_own, "none": "value"}[network]
        for name, parameter in agent.named_parameters():
            assert (parameter.grad is not None) == name.startswith(wanted), name


@SCRIPTS
def test_initial_weights_are_orthogonal_and_differ_between_networks(script):
    _, agent = make_agent(script, hidden_size=16)
    networks = [agent.policy, agent.value] + ([agent.median] if script is bpo else [])
    for network, gain in zip(networks, (0.01, 1, 1)):
        for layer in (network[0], network[2]):
            products = layer.weight.T @ layer.weight  # of the columns, which are no more than the rows
            close(products, 2 * torch.eye(len(products)).double(), atol=1e-5, rtol=0)
        assert network[4].weight.norm(dim=1).tolist() == pytest.approx([gain] * len(network[4].weight))
        assert not any(layer.bias.any() for layer in network[:5:2])
    assert all((a[0].weight - b[0].weight).abs().max() > 0.1 for a, b in zip(networks, networks[1:]))
    assert agent.log_std.tolist() == pytest.approx([-0.3, -0.3])


@SCRIPTS
def test_actions_from_minus_one_to_one_span_the_bounds_if_there_are_any(script):
    actions = torch.tensor([-2000, -1, -0.1, 0.123456789, 1, 2000])
    table = {  # each dimension on its own
        (0, 1): [0, 0, 0.45, 0.5617284, 1, 1],
        (-0.4, 0.4): [-0.4, -0.4, -0.04, 0.04938272, 0.4, 0.4],  # Humanoid
        (-1, 1): [-1, -1, -0.1, 0.123456789, 1, 1],
        (-999, 3): [-999, -999, -548.1, -436.1482, 3, 3],
        (-1000, 5): [-1000, -1, -0.1, 0.123456789, 1, 5],
        (-2, INF): [-2, -1, -0.1, 0.123456789, 1, 2000],
        (-INF, INF): actions.tolist(),
    }
    low, high = zip(*table)
    mapped = make_agent(script, torch.float32, low=low, high=high)[1].to_env(actions[:, None].expand(-1, len(table)))
    allclose(mapped.T, list(table.values()), rtol=1e-6)
    assert (mapped[1:-1, 2] == actions[1:-1].numpy()).all()  # exactly, where the bounds are -1 and 1


@pytest.mark.parametrize("script, network", [(bpo, "separate"), (bpo, "none"), (ppo, None)])
@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_samples_are_what_the_acting_agent_knew_without_dummies(script, network, norm):
    overrides = {"median_network": network} if network else {}
    args, agent = make_agent(script, torch.float32, num_envs=2, norm_obs=norm, norm_reward=norm, **overrides)
    agent.obs_stats.update(torch.randn(50, 3) * 2 + 1)
    obs, actions, rewards, twin = torch.randn(7, 2, 3), torch.randn(6, 2, 2), torch.randn(6, 2), copy.deepcopy(agent)
    ends = terminated, truncated, dummy = torch.zeros(3, 6, 2, dtype=torch.bool)
    terminated[2, 0] = truncated[3, 1] = dummy[3, 0] = dummy[4, 1] = True
    rollout = dict(obs=obs, actions=actions, rewards=rewards, terminated=terminated, truncated=truncated, valid=~dummy)
    batch = script.prepare(agent, rollout, args)
    if norm:
        obs, rewards = twin.obs_stats(obs), twin.scale_rewards(rewards, ~dummy, args.gamma)
    values, policy = twin.value(obs), Independent(twin(obs[:-1]), 1)
    _, returns = script.compute_gae(rewards, values, *ends[:2], args.gamma, args.gae_lambda)
    expected = dict(obs=obs[:-1], actions=actions, returns=returns, values=values[:-1], means=policy.mean)
    expected |= dict(stds=policy.stddev, log_probs=policy.log_prob(actions))
    expected |= {"medians": values[:-1] if network == "none" else twin.median(obs[:-1])} if network else {}
    close(batch, {name: x[~dummy] for name, x in expected.items()})


# --- the objective


@pytest.mark.parametrize("epsilon", [0.2, 0.25, 0.9])
def test_policy_losses_are_their_formulas_and_relate_as_the_papers_say(epsilon):
    ratio, advantage = torch.cartesian_prod(torch.linspace(0, 3, 61), torch.tensor([-7, -0.3, 0, 1e-3, 2])).double().T
    r, a, goal = ratio.numpy(), advantage.numpy(), 1 + epsilon * advantage.sign()
    clip, spo = ppo.policy_loss(ratio, advantage, epsilon), ppo.spo_loss(ratio, advantage, epsilon)
    allclose(clip, -np.minimum(r.clip(1 - epsilon, 1 + epsilon) * a, r * a), rtol=1e-12)
    allclose(spo, -(r * a - np.abs(a) / (2 * epsilon) * (r - 1) ** 2), rtol=1e-12, atol=1e-12)
    for tv_coef in (0.0, 0.7):  # Eq. 16 for any target
        target = np.random.default_rng(0).normal(1, 0.3, len(r))
        loss = bpo.policy_loss(ratio, torch.from_numpy(target), advantage, tv_coef)
        allclose(loss, np.abs(target - r) * (np.abs(a) + tv_coef), rtol=1e-12, atol=1e-12)
    # Proposition 4.6: PPO's is BPO's with a hard target within the bounds; past it PPO is flat, and BPO turns back.
    distance, within, past = bpo.policy_loss(ratio, goal, advantage, 0.0), (ratio - 1).abs() <= epsilon, ratio - goal
    close((clip + goal * advantage)[within], distance[within])
    past = past * advantage > 1e-12
    assert past.any() and ((clip + goal * advantage)[past].abs() < 1e-12).all() and (distance[past] > 0).all()
    # SPO's is that distance squared, up to a constant.
    squares = advantage.abs() * (ratio - goal) ** 2 / (2 * epsilon)
    close(spo + advantage + epsilon * advantage.abs() / 2, squares, rtol=1e-9, atol=1e-12)


def literal_common(args, agent, batch):
    """Ratio, value loss and entropy, through torch.distributions and plain formulas."""
    policy = Independent(Normal(agent.policy(batch["obs"]), agent.log_std.exp()), 1)
    ratio = policy.log_prob(batch["actions"]).exp() / batch["log_probs"].exp()
    new, old, target = agent.value(batch["obs"]), batch["values"], batch["returns"]
    clipped = torch.clip(new, old - args.clip_coef, old + args.clip_coef) if args.clip_vloss else new
    value_losses = torch.stack([(new - target) ** 2, (clipped - target) ** 2]).amax(0)
    return ratio, {"value_loss": value_losses.mean(), "entropy": policy.entropy().mean()}


def literal_bpo(args, agent, batch):
    ratio, terms = literal_common(args, agent, batch)
    low = 1 - args.clip_coef if args.ratio_low is None else args.ratio_low
    high = 1 + args.clip_coef if args.ratio_high is None else args.ratio_high
    returns, values, medians, median = *(batch[x] for x in ("returns", "values", "medians")), agent.median(batch["obs"])
    if args.recompute_advantages:
        values, medians = agent.value(batch["obs"]).detach(), median.detach()
    advantage = returns - values
    deviation = math.sqrt(((advantage - advantage.mean()) ** 2).sum() / (len(advantage) - 1))
    scale = deviation + 1e-8 if args.norm_adv else 1
    if args.median_network != "none":
        temperature = args.temperature if args.median_temperature is None else args.median_temperature
        terms["median_loss"] = literal_median_loss(returns - median, low, high, scale * temperature).mean()
    target = literal_target(returns - medians, low, high, scale * args.temperature)
    distance = {
        "atv": (target - ratio).abs() * (advantage.abs() / scale + args.tv_coef),
        "tv": (target - ratio).abs(),
        "kl": ratio * torch.log(ratio / target) - ratio + target,
    }[args.divergence]
    return terms | {"policy_loss": distance.mean()}, ratio, low, high


def literal_ppo(args, agent, batch):
    ratio, terms = literal_common(args, agent, batch)
    advantage, epsilon = batch["returns"] - batch["values"], args.clip_coef
    if args.norm_adv:
        deviations = advantage - advantage.mean()
        advantage = deviations / (math.sqrt((deviations**2).sum() / (len(advantage) - 1)) + 1e-8)
    surrogate = torch.minimum(ratio * advantage, ratio.clip(1 - epsilon, 1 + epsilon) * advantage)
    if args.objective == "spo":
        surrogate = ratio * advantage - advantage.abs() / (2 * epsilon) * (ratio - 1) ** 2
    return terms | {"policy_loss": -surrogate.mean()}, ratio, 1 - epsilon, 1 + epsilon


BPO_SETTINGS = [
    dict(),
    dict(temperature=0.5, tv_coef=0.3, ent_coef=0.1),
    dict(divergence="tv", temperature=0.7),
    dict(divergence="kl", temperature=0.7),
    dict(median_network="none"),
    dict(median_network="none", recompute_advantages=True, norm_adv=False, temperature=2.0),
    dict(norm_adv=False, temperature=1.5),
    dict(recompute_advantages=True),
    dict(recompute_advantages=True, median_network="mlp-head", norm_adv=False, temperature=1.0),
    dict(median_network="mlp-head", median_coef=2.0, vf_coef=0.1),
    dict(ratio_low=0.3, ratio_high=1.2),
    dict(ratio_low=0.1, ratio_high=1.6, divergence="kl", temperature=0.5),
    dict(ratio_high=2.0, median_temperature=1.3, recompute_advantages=True),
    dict(median_temperature=0.6, norm_adv=False, activation="relu"),
    dict(clip_vloss=True, clip_coef=0.05, activation="elu"),
]
PPO_SETTINGS = [dict(), dict(norm_adv=False), dict(objective="spo"), dict(ent_coef=0.1, vf_coef=2)]
PPO_SETTINGS += [dict(clip_vloss=True, clip_coef=0.05)]
CASES = [(bpo, literal_bpo, x) for x in BPO_SETTINGS] + [(ppo, literal_ppo, x) for x in PPO_SETTINGS]


@pytest.mark.parametrize("script, literal, overrides", CASES, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_objective_and_its_gradient_equal_the_literal_formulas(script, literal, overrides):
    args, agent, batch = make_batch(script, **overrides)
    terms, ratio, low, high = literal(args, agent, batch)
    coefs = {"policy_loss": 1, "value_loss": args.vf_coef, "entropy": -args.ent_coef}
    coefs["median_loss"] = getattr(args, "median_coef", None)
    expected = sum(coefs[name] * x for name, x in terms.items())
    loss, stats = script.minibatch_loss(agent, batch, args)
    close(loss, expected, rtol=1e-9, atol=1e-12)
    parameters = list(agent.parameters())
    for gradient, wanted in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        close(gradient, wanted, rtol=1e-7, atol=1e-10)
    outside = (ratio < low) | (ratio > high)
    assert 0 < outside.sum() < len(ratio), "the batch must have ratios within the bounds and beyond them"
    old = Independent(Normal(batch["means"], batch["stds"]), 1)
    new = Independent(Normal(agent.policy(batch["obs"]), agent.log_std.exp()), 1)
    terms |= {"clipfrac": outside.double().mean(), "approx_kl": (ratio - 1 - ratio.log()).mean()}
    terms["kl"] = kl_divergence(old, new).mean()
    assert {k: x.item() for k, x in stats.items()} == pytest.approx({k: x.item() for k, x in terms.items()})


def test_equal_advantages_are_scaled_by_a_floor():
    for advantage, scale in ((5.0, 0.5), (-5.0, 0.5), (0.0, 1e-8)):
        batch = {"returns": torch.full([4], advantage), "values": torch.zeros(4), "medians": torch.ones(4)}
        _, of_median, found = bpo.measure_advantages(batch, batch["values"], batch["medians"], bpo.Args())
        assert found.item() == pytest.approx(scale) and of_median.tolist() == [advantage - 1] * 4


def test_kl_divergence_is_finite_where_a_ratio_underflows_to_zero():
    args, agent, batch = make_batch(bpo, torch.float32, divergence="kl")
    with torch.no_grad():
        batch["log_probs"] = agent(batch["obs"]).log_prob(batch["actions"]).sum(-1) + 200
    loss, stats = bpo.minibatch_loss(agent, batch, args)
    median_advantage = (batch["returns"] - batch["medians"]) / (batch["returns"] - batch["values"]).std()
    target = bpo.target_ratio(median_advantage, 0.7, 1.3, args.temperature)
    assert torch.tensor(-200.0).exp() == 0 and stats["policy_loss"].item() == pytest.approx(target.mean().item())
    assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, list(agent.parameters()))))


# --- the update


@SCRIPTS
@pytest.mark.parametrize("max_grad_norm", [0.01, 1e6])
def test_steps_equal_clip_grad_norm_and_adam_on_single_parameters(script, max_grad_norm):
    args, agent, batch = make_batch(script, torch.float32, max_grad_norm=max_grad_norm, learning_rate=0.01)
    twin, initial = copy.deepcopy(agent), copy.deepcopy(agent.state_dict())
    optimizer, reference = script.make_optimizer(agent, args), torch.optim.Adam(twin.parameters(), 0.01, eps=1e-5)
    (flat,) = optimizer.param_groups[0]["params"]
    for _ in range(3):
        flat.grad, stats = script.minibatch_gradient(agent, batch, args)
        reference.zero_grad()
        script.minibatch_loss(twin, batch, args)[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
        close(flat.grad, torch.cat([x.grad.flatten() for x in twin.parameters()]))
        assert stats["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
        assert not any(x.requires_grad for x in stats.values())
        optimizer.step()
        reference.step()
        close(agent.state_dict(), twin.state_dict())
    agent.load_state_dict(initial)  # as a resumed run does: the optimizer's vector is to follow
    assert flat.equal(torch.nn.utils.parameters_to_vector(agent.parameters()))


@SCRIPTS
def test_adaptive_learning_rate_follows_rsl_rl(script):
    """desired_kl is 0.01: above twice that down by 1.5, not below 1e-5; below half of it up by 1.5, not above 1e-2."""
    kl = torch.tensor([0.03, 0.01, 0.0199, 0.0201, 0.0051, 0.0049, 0.001, 0.5, 0.001])
    rates = torch.tensor([1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1.2e-5, 8e-3])
    expected = torch.tensor([1e-3 / 1.5, 1e-3, 1e-3, 1e-3 / 1.5, 1e-3, 1.5e-3, 1.5e-3, 1e-5, 1e-2])
    close(script.adaptive_learning_rate(rates, kl, 0.01), expected, rtol=1e-6, atol=0)


@SCRIPTS
def test_update_adapts_the_rate_before_each_step_and_stops_at_the_target_kl(script):
    overrides = dict(minibatch_size=24, lr_schedule="adaptive", target_kl=0.02, learning_rate=1e-3)
    args, agent, batch = make_batch(script, torch.float32, **overrides)
    optimizer, before = script.make_optimizer(agent, args), agent.log_std.detach().clone()
    ones, kl = torch.ones(sum(x.numel() for x in agent.parameters())), torch.tensor(0.03)
    metrics = script.update(agent, optimizer, lambda *_: (ones, {"kl": kl, "approx_kl": kl}), batch, args)
    close(agent.log_std.detach(), before - 1e-3 / 1.5 - 1e-3 / 1.5**2, rtol=1e-4, atol=1e-6)  # Adam's first two steps
    assert metrics == pytest.approx({"losses/kl": 0.03, "losses/approx_kl": 0.03})


@SCRIPTS
def test_compiled_gradient_equals_the_plain_one(script):
    args, agent, batch = make_batch(script, torch.float32, compile=True)
    function = script.compiled(script.minibatch_gradient, args)
    if function is script.minibatch_gradient:
        pytest.skip("torch.compile needs a C++ compiler and Python's headers")
    plain = script.minibatch_gradient(agent, batch, args)
    close(function(agent, batch, args), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("script, network", [(ppo, None), (bpo, "separate"), (bpo, "none")])
def test_measure_gives_figure_7_the_fit_and_corollary_4_4(script, network, norm_adv):
    overrides = {"temperature": 0.4, "median_network": network} if network else {}
    args, agent, batch = make_batch(script, clip_coef=0.3, norm_adv=norm_adv, **overrides)
    batch["log_probs"][0] = agent(batch["obs"]).log_prob(batch["actions"])[0].sum()
    ratio = literal_common(args, agent, batch)[0].detach().numpy()
    assert ratio[0] == 1 and 0 < (np.abs(ratio - 1) > 0.3).sum() < 47
    returns, advantage = batch["returns"].numpy(), (batch["returns"] - batch["values"]).numpy()
    expected = {"ratio/out_of_bounds": np.mean(np.abs(ratio - 1) > 0.3), "charts/log_std": agent.log_std.mean().item()}
    for name, side in (("high", ratio[ratio >= 1]), ("low", ratio[ratio <= 1])):
        expected |= {f"ratio/{name}_mean": side.mean(), f"ratio/{name}_std": side.std()}
    expected["losses/explained_variance"] = 1 - advantage.var() / returns.var()
    if script is bpo:
        median_advantage = (batch["returns"] - batch["medians"]).numpy()
        tanh = np.tanh(median_advantage / (2 * 0.4 * (advantage.std(ddof=1) if norm_adv else 1)))
        gain, distance = 0.3 * tanh * median_advantage, np.abs(1 + 0.3 * tanh - ratio) * np.abs(advantage)
        expected |= {"theory/guaranteed_gain": gain.mean(), "theory/atv_divergence": distance.mean()}
        expected["theory/improvement_bound"] = (gain - distance).mean()
    assert script.measure(agent, batch, args) == pytest.approx(expected, rel=1e-6)


# --- the siblings

# Functions and classes that may have lines of their own; all other lines are the same in both files.
OWN_LINES = {
    ppo: "docstring Args ratio_bounds policy_loss spo_loss minibatch_loss",
    bpo: "docstring Args ratio_bounds target_ratio policy_loss median_loss minibatch_loss measure_advantages distance "
    "Agent prepare measure",
}
OWN_OPTIONS = {
    ppo: "clip_coef objective",
    bpo: "clip_coef ratio_low ratio_high temperature median_temperature median_network median_coef divergence tv_coef "
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


@SCRIPTS
def test_every_option_has_a_help_text(script, capsys):
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


def test_importing_a_script_runs_and_creates_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bpo_continuous_action, ppo_continuous_action"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, list(tmp_path.iterdir())) == (0, "", []), run.stderr
