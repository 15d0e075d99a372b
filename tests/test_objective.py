"""Returns, targets, losses, gradients and statistics of the scripts for control against the papers' formulas."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from common import (
    ATARI,
    BPO,
    CONTINUOUS,
    CONTROL,
    PPO,
    ROBOTS,
    advantages_of,
    critics_input,
    each,
    gradients_of,
    make_agent,
    make_batch,
    policy_of,
    set_gradients,
)
from hypothesis import example, given, settings
from hypothesis.strategies import floats, integers, sampled_from
from torch.distributions import Independent, Normal, kl_divergence

SEEDS = integers(0, 2**31)
BOUNDS = [(0.8, 1.2), (0.999, 1.001), (0, 2), (0.5, 4), (0.2, 1.1), (0, 50)]
allclose, close = np.testing.assert_allclose, torch.testing.assert_close
quick = settings(max_examples=25, deadline=None, derandomize=True)


# --- returns


def literal_gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """Sum over l of (gamma lambda)^l delta_{t+l}, up to the end of t's episode or of the rollout."""
    advantages = np.zeros(rewards.shape)
    for t, n in np.ndindex(*rewards.shape):
        for k in range(t, len(rewards)):
            next_value = 0.0 if terminated[k, n] else values[k + 1, n]
            advantages[t, n] += (gamma * gae_lambda) ** (k - t) * (rewards[k, n] + gamma * next_value - values[k, n])
            if terminated[k, n] or truncated[k, n]:
                break
    return advantages


@each(*CONTROL)
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


KNOWN = [(x, True, {}) for x in CONTROL] + [(x, True, {"median_network": "none"}) for x in BPO]
KNOWN += [(x, False, {}) for x in ROBOTS]
KNOWN = [pytest.param(*x, id=f"{x[0].__name__}-{'next' if x[1] else 'same'}-step{'-none' * bool(x[2])}") for x in KNOWN]


@pytest.mark.parametrize("script, next_step, own", KNOWN)
def test_samples_are_what_the_acting_agent_knew_without_dummies(script, next_step, own):
    """Where the next episode begins in the same step, a time limit bootstraps from the observation before it."""
    sizes = dict(num_envs=8, num_steps=6) | ({} if script in ROBOTS else dict(minibatch_size=16))
    args, agent = make_agent(script, torch.float32, **sizes, **own)
    terminated, truncated, dummy = torch.rand(3, 6, 8) < 0.2
    dummy &= next_step
    rollout = dict(rewards=torch.randn(6, 8) * ~dummy, valid=~dummy, terminated=terminated, truncated=truncated)
    if script in ATARI:
        rollout |= dict(obs=torch.randn(6, 8, 1), features=torch.rand(7, 8, 512), actions=torch.randint(5, (6, 8)))
        inputs, seen = rollout["features"], dict(obs=rollout["obs"])
        agent.features = lambda x: x
    else:
        agent.obs_stats.update(torch.randn(50, 3) * 2 + 1)
        rollout |= dict(obs=torch.randn(6 + (script in CONTINUOUS), 8, 3), actions=torch.randn(6, 8, 2))
        inputs = agent.obs_stats(rollout["obs"])
        seen = dict(obs=inputs[:6])
    if script in ROBOTS:
        agent.privileged_stats.update(torch.randn(50, 4) * 2 + 1)
        rollout |= dict(privileged=torch.randn(7, 8, 4), means=torch.randn(6, 8, 2))
        inputs = agent.privileged_stats(rollout["privileged"])
        seen["privileged"] = inputs[:-1]
    twin = copy.deepcopy(agent)
    batch = script.prepare(agent, rollout, *[next_step] * (script in ROBOTS), args)
    if script in ATARI:
        batch, rows = batch
        batch = {name: x[rows] for name, x in batch.items()}
    with torch.no_grad():
        rewards, values = rollout["rewards"], twin.value(inputs)
        if script in CONTINUOUS:
            rewards = twin.scale_rewards(rewards, ~dummy, args.gamma)
        policy = policy_of(twin, rollout["features"][:-1] if script in ATARI else seen["obs"])
        if script in ROBOTS:  # which keeps the means that acted
            policy = Independent(Normal(rollout["means"], twin.std), 1)
        after = values.clone()
        if not next_step:
            after[1:] = torch.where(truncated, values[:-1], values[1:])
        advantages = torch.zeros(6, 8)
        for t, n in np.ndindex(6, 8):
            for k in range(t, 6):
                error = rewards[k, n] + args.gamma * after[k + 1, n] * ~terminated[k, n] - values[k, n]
                advantages[t, n] += (args.gamma * args.gae_lambda) ** (k - t) * error
                if terminated[k, n] or truncated[k, n]:
                    break
        expected = seen | dict(actions=rollout["actions"], values=values[:-1], returns=advantages + values[:-1])
        expected |= dict(log_probs=policy.log_prob(rollout["actions"]))
        expected |= {"log_policy": policy.logits} if script in ATARI else dict(means=policy.mean, stds=policy.stddev)
        expected |= {"medians": twin.median(inputs[:-1])} if script in BPO else {}
        assert not own or twin.median is twin.value
    expected = {name: x[~dummy] for name, x in expected.items()}
    expected |= advantages_of(script, expected, args) if script in ROBOTS else {}
    close(batch, expected, rtol=1e-4, atol=1e-5)


# --- the target ratio and the median loss


def literal_target(x, low, high, temperature):
    """Corollary 4.7: c_l + (c_h - c_l) / (1 + (c_h - 1) / (1 - c_l) exp(-A / lambda))"""
    return low + (high - low) / (1 + (high - 1) / (1 - low) * torch.exp(-x / temperature))


def literal_median_loss(x, low, high, temperature):
    """lambda g'(x / lambda), g'(x) = ln(e^(k x) + (c_h-1)/(1-c_l) e^(-(1-k) x)) with k = (c_h-1)/(c_h-c_l)"""
    k, odds, x = (high - 1) / (high - low), (high - 1) / (1 - low), x / temperature
    return temperature * torch.logaddexp(k * x, math.log(odds) - (1 - k) * x)


@each(*BPO)
@pytest.mark.parametrize("low, high", BOUNDS)
def test_target_ratio_and_median_loss_are_corollary_4_7(script, low, high):
    for temperature in (1e-3, 0.1, 30.0):
        x = torch.cat([torch.linspace(-30, 30, 121), torch.linspace(-300, 300, 121)]).double() * temperature
        target = script.target_ratio(x, low, high, temperature)
        allclose(target, literal_target(x, low, high, temperature), rtol=1e-10)
        assert target[x == 0].tolist() == pytest.approx([1, 1], abs=1e-12)
        returns = torch.randn_like(x)
        loss = script.median_loss(returns, returns - x, low, high, temperature)
        allclose(loss, literal_median_loss(x, low, high, temperature), rtol=1e-8, atol=1e-11)
        if low + high == 2:  # Theorem 4.1: 1 + eps tanh(A / 2 lambda), and g without a constant beside it
            half = x / (2 * temperature)
            allclose(target, 1 + (high - 1) * half.tanh(), rtol=1e-10, atol=1e-12)
            allclose(loss, temperature * torch.log(half.exp() + (-half).exp()), rtol=1e-8, atol=1e-11)


@each(*BPO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_from_the_median_nothing_overflows_and_the_limits_hold(script, dtype):
    """Remark 4.3: many temperatures away the target is a bound, and Eq. 15 the quantile loss."""
    for (low, high), temperature in ((bounds, x) for bounds in BOUNDS for x in (1e-3, 1e-9)):
        x = torch.tensor([-1e6, -1e3, -90.0, -1.0, 0.0, 1.0, 90.0, 1e3, 1e6], dtype=dtype) * temperature
        target = script.target_ratio(x, low, high, temperature)
        allclose(target[:3], [low] * 3, atol=1e-6)
        allclose(target[-3:], [high] * 3, rtol=1e-6)
        loss = script.median_loss(x, torch.zeros_like(x), low, high, temperature)
        quantile = torch.where(x > 0, (high - 1) / (high - low) * x, (low - 1) / (high - low) * x)
        far = x.abs() > 50 * temperature
        slack = abs(math.log((high - 1) / (1 - low)))  # a constant of the loss below the median
        allclose(loss[far], quantile[far], rtol=1e-4, atol=1.01 * slack * temperature)


@each(*BPO)
@quick
@given(floats(-60, 60), sampled_from(BOUNDS), sampled_from([1e-3, 0.1, 1.0, 30.0]), floats(-10, 10))
def test_median_loss_gradient_is_one_minus_the_target_ratio_over_the_width(script, scaled, bounds, temperature, median):
    low, high = bounds
    median = torch.tensor(median, dtype=torch.float64, requires_grad=True)
    returns = median.detach() + scaled * temperature
    script.median_loss(returns, median, low, high, temperature).backward()
    expected = -(script.target_ratio(returns - median.detach(), low, high, temperature) - 1) / (high - low)
    close(median.grad, expected, rtol=1e-8, atol=1e-8)


@each(*BPO)
@quick
@given(SEEDS, integers(1, 30), sampled_from([(0.6, 1.4), (0, 3), (0.5, 1.2), (0.8, 6)]), sampled_from([0.05, 1.0, 5.0]))
def test_minimiser_of_the_median_loss_normalises_the_target_policy(script, seed, actions, bounds, temperature):
    """Any distribution over any actions: at the minimum of Eq. 15 the target probabilities sum to one."""
    rng = np.random.default_rng(seed)
    q = torch.from_numpy(rng.normal(size=actions) * rng.choice([0.1, 3]))
    weights = torch.from_numpy(rng.dirichlet(np.ones(actions)))
    medians = torch.linspace(q.min().item() - 20 * temperature, q.max().item() + 20 * temperature, 40).double()
    for _ in range(8):  # ever finer grids: uses the loss's values only, not its gradient
        losses = script.median_loss(q[:, None], medians, *bounds, temperature)
        best = (weights[:, None] * losses).sum(0).argmin().item()
        medians = torch.linspace(medians[max(best - 1, 0)], medians[min(best + 1, 39)], 40).double()
    target = script.target_ratio(q - medians.mean(), *bounds, temperature)
    assert (weights * target).sum().item() == pytest.approx(1, abs=1e-4)


# --- the objective


@pytest.mark.parametrize("bpo, ppo", [*zip(BPO, PPO)], ids=[f"{x.__name__}-{y.__name__}" for x, y in zip(BPO, PPO)])
def test_policy_losses_are_their_formulas_and_relate_as_the_papers_say(bpo, ppo):
    epsilon = 0.25
    ratio, advantage = torch.cartesian_prod(torch.linspace(0, 3, 61), torch.tensor([-7, -0.3, 0, 1e-3, 2])).double().T
    r, a, goal = ratio.numpy(), advantage.numpy(), 1 + epsilon * advantage.sign()
    clip = ppo.policy_loss(ratio, advantage, epsilon)
    allclose(clip, -np.minimum(r.clip(1 - epsilon, 1 + epsilon) * a, r * a), rtol=1e-12)
    for tv_coef in (0.0, 0.7):  # Eq. 16 for any target
        target = np.random.default_rng(0).normal(1, 0.3, len(r))
        loss = bpo.policy_loss(ratio, torch.from_numpy(target), advantage, tv_coef)
        allclose(loss, np.abs(target - r) * (np.abs(a) + tv_coef), rtol=1e-12, atol=1e-12)
    # Proposition 4.6: PPO's is BPO's with a hard target within the bounds; past it PPO is flat, and BPO turns back.
    distance, within, past = bpo.policy_loss(ratio, goal, advantage, 0.0), (ratio - 1).abs() <= epsilon, ratio - goal
    close((clip + goal * advantage)[within], distance[within])
    past = past * advantage > 1e-12
    assert past.any() and ((clip + goal * advantage)[past].abs() < 1e-12).all() and (distance[past] > 0).all()
    if hasattr(ppo, "spo_loss"):  # that distance squared, up to a constant
        spo = ppo.spo_loss(ratio, advantage, epsilon)
        squares = advantage.abs() * (ratio - goal) ** 2 / (2 * epsilon)
        close(spo + advantage + epsilon * advantage.abs() / 2, squares, rtol=1e-9, atol=1e-12)


def literal_advantages(script, args, batch, value, median):
    """Advantages over value and median, and their unit."""
    advantage, median_advantage = batch["returns"] - value, batch["returns"] - median
    measured = batch["returns"] - batch["values"] if script in ATARI else advantage
    deviation = math.sqrt(((measured - measured.mean()) ** 2).sum() / (len(measured) - 1)) if args.norm_adv else 1.0
    if args.norm_adv and (script in ROBOTS or script in PPO):
        advantage = advantage - advantage.mean()
    if args.norm_adv and script in ROBOTS:
        median_advantage = median_advantage - median_advantage.sort().values[(len(median) - 1) // 2]
    return advantage, median_advantage, deviation


def literal_objective(script, args, agent, batch):
    """The terms of the loss through torch.distributions and plain formulas, and the ratio."""
    policy, inputs = policy_of(agent, batch["obs"]), critics_input(agent, batch)
    ratio = policy.log_prob(batch["actions"]).exp() / batch["log_probs"].exp()
    new, old, returns = agent.value(inputs), batch["values"], batch["returns"]
    clipped = old + torch.clip(new - old, -args.clip_coef, args.clip_coef) if args.clip_vloss else new
    value_losses = torch.stack([(new - returns) ** 2, (clipped - returns) ** 2]).amax(0)
    terms = {"value_loss": value_losses.mean(), "entropy": policy.entropy().mean()}
    low, high = script.ratio_bounds(args)
    if script in PPO:
        advantage, _, deviation = literal_advantages(script, args, batch, old, old)
        advantage = advantage / deviation
        surrogate = torch.minimum(ratio * advantage, ratio.clip(low, high) * advantage)
        if getattr(args, "objective", "clip") == "spo":
            surrogate = ratio * advantage - advantage.abs() / (2 * args.clip_coef) * (ratio - 1) ** 2
        return terms | {"policy_loss": -surrogate.mean()}, ratio
    median = agent.median(inputs)
    baselines = (new.detach(), median.detach()) if args.recompute_advantages else (old, batch["medians"])
    advantage, median_advantage, deviation = literal_advantages(script, args, batch, *baselines)
    target = literal_target(median_advantage, low, high, deviation * args.temperature)
    distance = {
        "atv": (target - ratio).abs() * (advantage.abs() / deviation + args.tv_coef),
        "tv": (target - ratio).abs(),
        "kl": ratio * torch.log(ratio / target) - ratio + target,
    }[getattr(args, "divergence", "atv")]
    if args.median_network != "none":
        temperature = args.temperature if args.median_temperature is None else args.median_temperature
        terms["median_loss"] = literal_median_loss(returns - median, low, high, deviation * temperature).mean()
    return terms | {"policy_loss": distance.mean()}, ratio


ALL = [dict(), dict(norm_adv=False), dict(norm_adv=True, ent_coef=0.1, vf_coef=0.2), dict(clip_vloss=True)]
OF_BPO = [dict(norm_adv=False, temperature=1.5), dict(norm_adv=True, temperature=0.7, tv_coef=0.3)]
OF_BPO += [dict(norm_adv=True, temperature=0.5, ratio_low=0.3, ratio_high=1.2, clip_coef=0.1)]
OF_BPO += [dict(median_network="none"), dict(median_temperature=1.3, median_coef=2.0, norm_adv=True)]
OF_BPO += [dict(recompute_advantages=True, norm_adv=True, temperature=0.5, ratio_high=1.9)]
OF_DIVERGENCES = [dict(divergence="tv", temperature=0.7), dict(divergence="kl", norm_adv=True, temperature=0.7)]
OF_DIVERGENCES += [dict(recompute_advantages=True, median_network="mlp-head", norm_adv=False, temperature=1.0)]
OWN = {x: OF_BPO + OF_DIVERGENCES for x in BPO} | {x: [] for x in PPO} | {BPO[2]: OF_BPO}
OWN[PPO[0]] = [dict(objective="spo"), dict(objective="spo", norm_adv=False)]
OWN[BPO[0]] += [dict(activation="relu", norm_adv=False, temperature=1.5)]


@each(*CONTROL)
def test_objective_gradient_and_statistics_equal_the_literal_formulas(script):
    exact = dict(rtol=1e-5, atol=1e-6) if script in ATARI else dict(rtol=1e-7, atol=1e-9)  # its moments are float32
    for own in ALL + OWN[script]:
        args, agent, batch = make_batch(script, **own)
        terms, ratio = literal_objective(script, args, agent, batch)
        coefs = {"policy_loss": 1, "value_loss": args.vf_coef, "entropy": -args.ent_coef}
        coefs["median_loss"] = getattr(args, "median_coef", None)
        expected = sum(coefs[name] * x for name, x in terms.items())
        loss, stats = script.minibatch_loss(agent, batch, args)
        close(loss, expected, **exact, msg=lambda text, own=own: f"{own}: {text}")
        parameters = [x for name, x in agent.named_parameters() if not name.startswith(("first", "conv", "dense"))]
        for gradient, wanted in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
            close(gradient, wanted, **exact)
        low, high = script.ratio_bounds(args)
        outside = ((ratio < low) | (ratio > high)).double()
        assert 0 < outside.sum() < len(ratio), "the batch must have ratios within the bounds and beyond them"
        old = policy_of(agent, batch["obs"])
        old = type(old)(logits=batch["log_policy"]) if script in ATARI else Independent(
            Normal(batch["means"], batch["stds"]), 1)  # fmt: skip
        terms |= {"clipfrac": outside.mean(), "approx_kl": (ratio - 1 - ratio.log()).mean()}
        terms["kl"] = kl_divergence(old, policy_of(agent, batch["obs"])).mean()
        found = {name: x.item() for name, x in stats.items()}
        assert found == pytest.approx({name: x.item() for name, x in terms.items()}, rel=1e-5)


@each(*CONTROL)
@pytest.mark.parametrize("norm_adv", [True, False])
@torch.no_grad()
def test_measure_gives_figure_7_the_fit_and_corollary_4_4(script, norm_adv):
    own = dict(clip_coef=0.3, norm_adv=norm_adv) | (dict(temperature=0.4) if script in BPO else {})
    args, agent, batch = make_batch(script, **own)
    batch["log_probs"][0] = policy_of(agent, batch["obs"]).log_prob(batch["actions"])[0]
    ratio = (policy_of(agent, batch["obs"]).log_prob(batch["actions"]) - batch["log_probs"]).exp().numpy()
    assert ratio[0] == 1 and 0 < (np.abs(ratio - 1) > 0.3).sum() < 47
    expected = {"ratio/out_of_bounds": np.mean(np.abs(ratio - 1) > 0.3)}
    for name, side in (("high", ratio[ratio >= 1]), ("low", ratio[ratio <= 1])):
        expected |= {f"ratio/{name}_mean": side.mean(), f"ratio/{name}_std": side.std()}
    error = (batch["returns"] - batch["values"]).numpy()
    expected["losses/explained_variance"] = 1 - error.var() / batch["returns"].numpy().var()
    expected |= {"charts/log_std": agent.log_std.mean().item()} if script in CONTINUOUS else {}
    expected |= {"charts/std": agent.std.mean().item()} if script in ROBOTS else {}
    if script in BPO:
        advantage, median, deviation = literal_advantages(script, args, batch, batch["values"], batch["medians"])
        tanh = (median / (2 * 0.4 * deviation)).tanh().numpy()
        gain, distance = 0.3 * tanh * median.numpy(), np.abs(1 + 0.3 * tanh - ratio) * np.abs(advantage.numpy())
        expected |= {"theory/guaranteed_gain": gain.mean(), "theory/atv_divergence": distance.mean()}
        expected["theory/improvement_bound"] = (gain - distance).mean()
    assert script.measure(agent, batch, args) == pytest.approx(expected, rel=1e-5)


@each(*CONTROL)
@pytest.mark.parametrize("norm_adv", [False, True])
def test_one_sample_and_equal_advantages_give_finite_gradients(script, norm_adv):
    for size, shift in ((1, 3.0), (5, 3.0), (5, 0.0)):
        args, agent, batch = make_batch(script, torch.float32, norm_adv=norm_adv)
        batch = {name: x if name == "moments" else x[:size] for name, x in batch.items()}
        if size > 1 or script not in CONTINUOUS + ATARI:  # minibatches of one sample do not occur there
            batch["returns"] = batch["values"] + shift
            batch |= advantages_of(script, batch, args)
            gradients, stats = gradients_of(script, agent, batch, args)
            assert all(x.isfinite().all() for x in (*gradients, *stats.values()))
        assert all(math.isfinite(x) for x in script.measure(agent, batch, args).values())


@each(*BPO[:2])
def test_kl_divergence_is_finite_where_a_ratio_underflows_to_zero(script):
    args, agent, batch = make_batch(script, torch.float32, divergence="kl")
    with torch.no_grad():
        batch["log_probs"] = policy_of(agent, batch["obs"]).log_prob(batch["actions"]) + 200
    loss, stats = script.minibatch_loss(agent, batch, args)
    assert torch.tensor(-200.0).exp() == 0 and 0.5 < stats["policy_loss"] < 1.5  # the mean target
    assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, list(agent.parameters()))))


def test_robots_advantages_are_level_when_the_critics_lag():
    """Returns that grow by more than they vary: without centring all ratios would be pulled up."""
    for norm_adv in (False, True):
        args, _, batch = make_batch(BPO[2], norm_adv=norm_adv)
        batch["returns"] = batch["returns"] + 20
        up = (advantages_of(BPO[2], batch, args)["median_advantages"] > 0).double().mean()
        assert up == 1 if not norm_adv else 0.4 < up < 0.6


@each(*ATARI)
def test_moments_are_those_of_each_minibatch(script):
    advantages = torch.randn(3, 4, 50, dtype=torch.float64) * 7 + 2
    moments = script.minibatch_moments(advantages)
    assert moments.shape == (3, 4, 3) and moments.dtype == torch.float32
    allclose(moments, np.stack([advantages.mean(-1), advantages.abs().mean(-1), advantages.std(-1)], -1), rtol=1e-5)
    equal = script.minibatch_moments(torch.full((1, 50), 0.1))[0]
    assert equal[:2].tolist() == pytest.approx([0.1, 0.1]) and 0 <= equal[2] < 1e-6


@each(*ROBOTS)
def test_the_policy_sees_the_observation_and_the_critics_the_privileged_one(script):
    args, agent, batch = make_batch(script)
    inputs = [batch["obs"].requires_grad_(), batch["privileged"].requires_grad_()]
    for name, of_obs in (("policy_loss", True), ("value_loss", False), ("median_loss", False)):
        _, stats = script.minibatch_loss(agent, batch, args)
        if name in stats:
            found = [x is not None for x in torch.autograd.grad(stats[name], inputs, allow_unused=True)]
            assert found == [of_obs, not of_obs], name


# --- the update


@each(*CONTROL)
@pytest.mark.parametrize("max_grad_norm", [0.01, 1e6])
def test_steps_equal_clip_grad_norm_and_adam_on_single_parameters(script, max_grad_norm):
    args, agent, batch = make_batch(script, torch.float32, max_grad_norm=max_grad_norm, learning_rate=1e-3)
    twin, initial = copy.deepcopy(agent), copy.deepcopy(agent.state_dict())
    eps = 1e-8 if script in ROBOTS else 1e-5
    optimizer, reference = script.make_optimizer(agent, args), torch.optim.Adam(twin.parameters(), 1e-3, eps=eps)
    for _ in range(2):
        gradients, stats = gradients_of(script, agent, batch, args)
        reference.zero_grad()
        script.minibatch_loss(twin, batch, args)[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
        assert stats["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-3)
        assert not any(x.requires_grad for x in stats.values())
        expected = [x.grad for x in twin.parameters()]
        expected = [torch.cat([x.flatten() for x in expected])] if script in ATARI else expected
        close(gradients, expected, rtol=1e-3, atol=1e-6)
        set_gradients(optimizer, expected)  # Adam makes much of a rounding error
        optimizer.step()
        reference.step()
        close(agent.state_dict(), twin.state_dict())
    agent.load_state_dict(initial)  # as a resumed run does: the optimizer's vector is to follow
    parameters = torch.nn.utils.parameters_to_vector(optimizer.param_groups[0]["params"])
    assert parameters.equal(torch.nn.utils.parameters_to_vector(agent.parameters()))


@each(*CONTINUOUS, *ROBOTS)
def test_adaptive_learning_rate_follows_rsl_rl_and_adapts_before_each_step(script):
    """desired_kl is 0.01: above twice that down by 1.5, not below 1e-5; below half of it up by 1.5, not above 1e-2."""
    kl = torch.tensor([0.03, 0.01, 0.0199, 0.0201, 0.0051, 0.0049, 0.001, 0.5, 0.001])
    rates = torch.tensor([1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1.2e-5, 8e-3])
    expected = torch.tensor([1e-3 / 1.5, 1e-3, 1e-3, 1e-3 / 1.5, 1e-3, 1.5e-3, 1.5e-3, 1e-5, 1e-2])
    close(script.adaptive_learning_rate(rates, kl, 0.01), expected, rtol=1e-6, atol=0)
    own = (
        dict(num_minibatches=2) if script in ROBOTS else dict(minibatch_size=24, target_kl=0.02)
    )  # ends after one epoch
    own |= dict(lr_schedule="adaptive", learning_rate=1e-3) | (dict(update_epochs=1) if script in ROBOTS else {})
    args, agent, batch = make_batch(script, torch.float32, **own)
    std = agent.std if script in ROBOTS else agent.log_std
    ones, kl, before = [torch.ones_like(x) for x in agent.parameters()], torch.tensor(0.03), std.clone()
    step = lambda *_: (ones, {"kl": kl, "approx_kl": kl})  # noqa: E731
    metrics = script.update(agent, script.make_optimizer(agent, args), step, batch, args)
    close(std.detach(), before.detach() - 1e-3 / 1.5 - 1e-3 / 1.5**2, rtol=1e-4, atol=1e-6)  # Adam's first two steps
    mean = (1e-3 / 1.5 + 1e-3 / 1.5**2) / 2
    of_robots = {"charts/learning_rate": pytest.approx(mean)} if script in ROBOTS else {}
    assert metrics == {"losses/kl": pytest.approx(0.03), "losses/approx_kl": pytest.approx(0.03)} | of_robots


@each(*ROBOTS)
def test_standard_deviation_has_a_floor_and_leaves_it_again(script):
    own = dict(lr_schedule="constant", learning_rate=0.02, init_std=0.05, update_epochs=10)
    args, agent, batch = make_batch(script, torch.float32, **own)
    optimizer, seen = script.make_optimizer(agent, args), []
    for sign in (1.0, -1.0):
        gradients = [torch.full_like(x, sign) for x in agent.parameters()]
        script.update(agent, optimizer, lambda *_, x=gradients: (x, {"kl": torch.ones(())}), batch, args)
        seen.append(agent.std.tolist())
    assert seen[0] == pytest.approx([0.01, 0.01]) and min(seen[1]) > 0.011


@each(*ATARI, *ROBOTS)
def test_an_update_computes_on_one_device_and_waits_for_nothing(script, monkeypatch):
    """On a device without memory a tensor of the CPU is an error, and so is a number that the host asks for."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no such device
    args, agent, batch = make_batch(script, torch.float32)
    batch, agent = {name: x.to("meta") for name, x in batch.items()}, agent.to("meta")
    lr, network = torch.tensor(1e-3, device="meta"), agent.features if script in ATARI else agent.policy
    for wrong in (lambda: network(frames_or_zeros(script)), lr.item):
        with pytest.raises(RuntimeError, match="meta"):
            wrong()
    if script in ATARI:
        order = torch.zeros(2, 3, 4, dtype=torch.int64, device="meta")
        moments = script.minibatch_moments((batch["returns"] - batch["values"])[order])
        batch = script.take({name: x for name, x in batch.items() if name != "moments"}, order[1, 2], moments[1, 2])
    results = gradients_of(script, agent, batch | advantages_of(script, batch, args), args)
    if script in ROBOTS:
        agent.obs_stats.update(batch["obs"])
        values = agent.value(agent.normalize_privileged(batch["privileged"]))[:8].expand(7, 8)
        rewards = torch.zeros(6, 8, device="meta")
        script.compute_gae(rewards, values, rewards > 0, rewards > 0, args.gamma, args.gae_lambda)
        lr.copy_(script.adaptive_learning_rate(lr, results[1]["kl"], args.desired_kl))
    assert all(x.is_meta for x in (*results[0], *results[1].values()))


def frames_or_zeros(script):
    return torch.zeros(2, 84, 84, 4, dtype=torch.uint8) if script in ATARI else torch.zeros(48, 3)


@pytest.mark.slow
@each(*CONTROL)
def test_what_is_compiled_is_one_graph_that_computes_the_same(script):
    """torch.compile traces all of it; inductor's own code is not what is tested here."""
    own = dict(bf16=True) if script in (PPO[1], PPO[2]) else {}
    args, agent, batch = make_batch(script, torch.float32, **own)
    function = script.minibatch_loss if script in ATARI else script.minibatch_gradient
    graph, results = torch.compile(function, fullgraph=True, backend="aot_eager"), []
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for call in (graph, function):  # in this order: caches of a first call may hide what cannot be traced
            result, stats = call(agent, batch, args)
            if script in ATARI:
                result = torch.cat([x.flatten() for x in torch.autograd.grad(result, list(agent.parameters()))])
            results.append([result, stats])
    close(*results, **(dict(rtol=0.05, atol=0.01) if own else dict(rtol=1e-4, atol=1e-5)))


@pytest.mark.slow
@each(*CONTINUOUS)
def test_compiled_gradient_equals_the_plain_one(script):
    args, agent, batch = make_batch(script, torch.float32, compile=True)
    function = script.compiled(script.minibatch_gradient, args)
    if function is script.minibatch_gradient:
        pytest.skip("torch.compile needs a C++ compiler and Python's headers")
    plain = script.minibatch_gradient(agent, batch, args)
    close(function(agent, batch, args), plain, rtol=1e-4, atol=1e-6)
