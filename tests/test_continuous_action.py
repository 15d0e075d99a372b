"""The functions of the BPO and PPO scripts for continuous actions against formulas, and the likeness of the two."""

import ast
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

import bpo_continuous_action as bpo
import ppo_continuous_action as ppo

ROOT = Path(bpo.__file__).parent
SCRIPTS = pytest.mark.parametrize("script", [bpo, ppo], ids=["bpo", "ppo"])
quick = settings(max_examples=40, deadline=None, derandomize=True)
BOUNDS = [(0.6, 1.4), (0.999, 1.001), (0.0, 2.0), (0.5, 4.0), (0.2, 1.1), (0.0, 50.0)]


def float64(*values):
    return [torch.tensor(x, dtype=torch.float64) for x in values]


# ---------------------------------------------------------------------------------------------------------- returns


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
    expected = literal_gae(rewards, values, terminated, truncated, gamma, gae_lambda)
    advantages, returns = script.compute_gae(
        torch.from_numpy(rewards), torch.from_numpy(values), terminated, truncated, gamma, gae_lambda
    )
    np.testing.assert_allclose(advantages, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(returns, expected + values[:-1], rtol=1e-10, atol=1e-10)


@SCRIPTS
def test_gae_of_an_endless_constant_reward_is_zero_at_the_true_value(script):
    """Truncation changes nothing where the value is 1 / (1 - gamma); termination takes gamma V away."""
    gamma, value = 0.9, 10.0
    rewards, values, never = torch.ones(7, 2), torch.full((8, 2), value), np.zeros((7, 2), bool)
    cut = never.copy()
    cut[3, 0] = True
    for truncated in (never, cut):
        advantages, returns = script.compute_gae(rewards, values, never, truncated, gamma, 0.95)
        assert advantages.dtype == returns.dtype == torch.float32
        torch.testing.assert_close(advantages, torch.zeros(7, 2), atol=1e-5, rtol=0)
        torch.testing.assert_close(returns, values[:-1])
    advantages, _ = script.compute_gae(rewards, values, cut, never, gamma, 0.95)
    torch.testing.assert_close(advantages[:, 0], torch.tensor([*(-9 * 0.855**k for k in (3, 2, 1, 0)), 0, 0, 0]))


@SCRIPTS
@quick
@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from([1e-3, 1, 1e3]))
def test_running_normalizer_equals_numpy_over_all_batches(script, seed, sizes, scale):
    samples = np.random.default_rng(seed).normal(5 * scale, scale, (sum(sizes), 3))
    stats = script.RunningNormalizer(3)
    for batch in np.split(samples, np.cumsum(sizes)[:-1]):
        stats.update(torch.from_numpy(batch))
    assert stats.count == len(samples)
    np.testing.assert_allclose(stats.mean, samples.mean(0), rtol=1e-9)
    np.testing.assert_allclose(stats.var, samples.var(0), rtol=1e-6, atol=1e-12 * scale**2)
    if len(samples) > 9:
        standard = (samples - samples.mean(0)) / np.sqrt(samples.var(0) + 1e-8)
        np.testing.assert_allclose(stats(torch.from_numpy(samples).float()), standard.clip(-10, 10), atol=1e-3)


@SCRIPTS
def test_running_normalizer_clips_at_ten_deviations(script):
    stats = script.RunningNormalizer(1)
    stats.update(torch.tensor([[-1.0], [1.0]]))
    torch.testing.assert_close(stats(torch.tensor([[-50.0], [0.5], [50.0]])), torch.tensor([[-10.0], [0.5], [10.0]]))


# ------------------------------------------------------------------------------------------------- the target ratio


def literal_target(x, low, high, temperature):
    """Corollary 4.7: c_l + (c_h - c_l) / (1 + (c_h - 1) / (1 - c_l) exp(-A / lambda))"""
    return low + (high - low) / (1 + (high - 1) / (1 - low) * np.exp(-x / temperature))


def literal_median_loss(x, low, high, temperature):
    """lambda g'(x / lambda), g'(x) = ln(e^(k x) + (c_h-1)/(1-c_l) e^(-(1-k) x)) with k = (c_h-1)/(c_h-c_l)"""
    k = (high - 1) / (high - low)
    return temperature * np.logaddexp(k * x / temperature, np.log((high - 1) / (1 - low)) - (1 - k) * x / temperature)


@pytest.mark.parametrize("low, high", BOUNDS)
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 30.0])
def test_target_ratio_and_median_loss_are_corollary_4_7(low, high, temperature):
    x = np.concatenate([np.linspace(-30, 30, 121), np.linspace(-300, 300, 121)]) * temperature
    target = bpo.target_ratio(torch.from_numpy(x), low, high, temperature)
    np.testing.assert_allclose(target, literal_target(x, low, high, temperature), rtol=1e-10)
    returns = np.random.default_rng(0).normal(size=x.shape)
    loss = bpo.median_loss(torch.from_numpy(returns), torch.from_numpy(returns - x), low, high, temperature)
    np.testing.assert_allclose(loss, literal_median_loss(x, low, high, temperature), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("epsilon", [1e-3, 0.2, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 10.0])
def test_symmetric_bounds_give_theorem_4_1(epsilon, temperature):
    """The ratio is 1 + eps tanh(A / 2 lambda); g is ln(e^(x/2) + e^(-x/2)) with no constant between the two."""
    x = np.linspace(-40, 40, 161) * temperature
    target = bpo.target_ratio(torch.from_numpy(x), 1 - epsilon, 1 + epsilon, temperature)
    np.testing.assert_allclose(target, 1 + epsilon * np.tanh(x / (2 * temperature)), rtol=1e-10, atol=1e-12)
    loss = bpo.median_loss(torch.from_numpy(x), torch.zeros(161).double(), 1 - epsilon, 1 + epsilon, temperature)
    expected = temperature * np.log(np.exp(x / (2 * temperature)) + np.exp(-x / (2 * temperature)))
    np.testing.assert_allclose(loss, expected, rtol=1e-8)  # softplus drops e^-x where x > 20


@pytest.mark.parametrize("low, high", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_overflows_a_million_temperatures_from_the_median(low, high, dtype):
    temperature = 1e-3
    x = torch.tensor([-1e6, -1e3, -90.0, -1.0, 0.0, 1.0, 90.0, 1e3, 1e6], dtype=dtype) * temperature
    returns, medians = torch.zeros_like(x), (-x).requires_grad_()
    target = bpo.target_ratio(returns - medians, low, high, temperature)
    loss = bpo.median_loss(returns, medians, low, high, temperature)
    (target_gradient,) = torch.autograd.grad(target.sum(), medians, retain_graph=True)
    (loss_gradient,) = torch.autograd.grad(loss.sum(), medians)
    for values in (target, loss, target_gradient, loss_gradient):
        assert values.dtype == dtype and torch.isfinite(values).all()
    assert (target >= low - 1e-6).all() and (target <= high * (1 + 1e-6)).all()
    assert target.diff().min() >= 0
    torch.testing.assert_close(target[[0, -1]], torch.tensor([low, high], dtype=dtype))
    k = (high - 1) / (high - low)  # far away the loss is the quantile loss
    quantile_loss = torch.tensor([(1 - k) * 1e3, k * 1e3], dtype=dtype)
    torch.testing.assert_close(loss[[0, -1]].detach(), quantile_loss, rtol=2e-4, atol=0.01)


@quick
@given(
    st.floats(-50, 50),
    st.floats(0, 0.99),
    st.floats(1.01, 20),
    st.sampled_from([0.01, 1.0, 7.0]),
    st.floats(-5, 5),
)
def test_median_loss_gradient_is_one_minus_the_target_ratio_over_the_width(scaled, low, high, temperature, median):
    median = torch.tensor(median, dtype=torch.float64, requires_grad=True)
    returns = median.detach() + scaled * temperature
    bpo.median_loss(returns, median, low, high, temperature).backward()
    expected = -(bpo.target_ratio(returns - median.detach(), low, high, temperature) - 1) / (high - low)
    torch.testing.assert_close(median.grad, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("low, high", BOUNDS)
def test_vanishing_temperature_gives_the_sign(low, high):
    """Remark 4.3: at the bound on either side; and Eq. 15 becomes the quantile loss, abs(x) / 2 if symmetric."""
    x = torch.tensor([-3.0, -0.01, 0.01, 3.0], dtype=torch.float64)
    target = bpo.target_ratio(x, low, high, 1e-5)
    torch.testing.assert_close(target, torch.tensor([low, low, high, high], dtype=torch.float64))
    k = (high - 1) / (high - low)
    loss = bpo.median_loss(x, torch.zeros_like(x), low, high, 1e-9)
    torch.testing.assert_close(loss, torch.maximum(k * x, (k - 1) * x), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("low, high", BOUNDS)
def test_target_ratio_is_one_at_the_median(low, high):
    assert bpo.target_ratio(torch.zeros(()).double(), low, high, 0.3).item() == pytest.approx(1, abs=1e-12)


@quick
@given(
    st.integers(0, 2**31),
    st.integers(1, 30),
    st.sampled_from([(0.6, 1.4), (0.0, 3.0), (0.5, 1.2), (0.8, 6.0)]),
    st.sampled_from([0.05, 1.0, 5.0]),
)
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
    torch.testing.assert_close(target, torch.tensor([0.0] * 75 + [4.0] * 25).double())
    losses = [bpo.median_loss(q, torch.full_like(q, m), 0.0, 4.0, 1e-3).mean().item() for m in (73.5, 74.5, 75.5)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


# --------------------------------------------------------------------------------------------------- the policy loss

RATIOS, ADVANTAGES = (
    x.flatten() for x in torch.meshgrid(*float64(np.linspace(0, 3, 61), [-7, -0.3, 0, 1e-3, 2]), indexing="ij")
)


@pytest.mark.parametrize("tv_coef", [0.0, 0.7])
def test_bpo_policy_loss_is_equation_16(tv_coef):
    epsilon, temperature, value, median = 0.3, 0.5, 1.1, 0.8
    returns = np.random.default_rng(0).normal(size=len(RATIOS)) * 2
    expected = np.abs(1 + epsilon * np.tanh((returns - median) / (2 * temperature)) - RATIOS.numpy())
    expected *= np.abs(returns - value) + tv_coef
    target = bpo.target_ratio(torch.from_numpy(returns) - median, 1 - epsilon, 1 + epsilon, temperature)
    loss = bpo.policy_loss(RATIOS, target, torch.from_numpy(returns) - value, tv_coef)
    np.testing.assert_allclose(loss, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.2, 0.9])
def test_ppo_policy_loss_is_the_negative_of_equation_17(epsilon):
    clipped = RATIOS.numpy().clip(1 - epsilon, 1 + epsilon)
    expected = -np.minimum(clipped * ADVANTAGES.numpy(), RATIOS.numpy() * ADVANTAGES.numpy())
    np.testing.assert_allclose(ppo.policy_loss(RATIOS, ADVANTAGES, epsilon), expected, rtol=1e-12)


@pytest.mark.parametrize("epsilon", [0.2, 0.9])
def test_spo_loss_is_bpo_loss_with_a_hard_target_in_l2_up_to_a_constant(epsilon):
    """Xie et al. (2024) maximise r A - abs(A) (r - 1)^2 / (2 eps): abs(A) (r - target)^2 / (2 eps), completed."""
    r, a = RATIOS.numpy(), ADVANTAGES.numpy()
    expected = -(r * a - np.abs(a) / (2 * epsilon) * (r - 1) ** 2)
    loss = ppo.spo_loss(RATIOS, ADVANTAGES, epsilon).numpy()
    np.testing.assert_allclose(loss, expected, rtol=1e-12, atol=1e-12)
    constant = a + epsilon * np.abs(a) / 2
    squares = np.abs(a) * (r - 1 - epsilon * np.sign(a)) ** 2 / (2 * epsilon)
    np.testing.assert_allclose(loss + constant, squares, rtol=1e-9, atol=1e-12)


def test_the_objective_chooses_the_loss():
    """With one minibatch at ratio 1, clip and spo have the same gradient; off it they do not."""
    gradients = {}
    for name in ("clip", "spo"):
        torch.manual_seed(0)
        args = ppo.Args(objective=name, hidden_size=8, compile=False)
        agent = ppo.Agent(3, 2, args).double()
        obs, actions = torch.randn(2, 6, 3, dtype=torch.float64)[0], torch.randn(6, 2, dtype=torch.float64)
        batch = dict(obs=obs, actions=actions, returns=torch.randn(6).double(), values=torch.zeros(6).double())
        batch |= dict(means=torch.zeros(6, 2).double(), log_stds=torch.zeros(6, 2).double())
        batch["advantages"] = batch["returns"]
        for shift in (0.0, 0.1):
            exact = ppo.log_prob(agent.policy(obs), agent.log_std, actions).detach()
            loss, _ = ppo.minibatch_loss(agent, batch | {"log_probs": exact - shift}, args)
            gradients[name, shift] = torch.autograd.grad(loss, agent.hidden.weight_1)[0][0]
    torch.testing.assert_close(gradients["clip", 0.0], gradients["spo", 0.0])
    assert not torch.allclose(gradients["clip", 0.1], gradients["spo", 0.1], rtol=1e-3)


def test_ppo_loss_is_bpo_loss_with_a_hard_target_up_to_a_constant():
    """Proposition 4.6: equal within the bounds; past the target PPO is flat, and BPO turns back."""
    epsilon = 0.25
    target = 1 + epsilon * ADVANTAGES.sign()
    shifted = ppo.policy_loss(RATIOS, ADVANTAGES, epsilon) + target * ADVANTAGES
    distance = bpo.policy_loss(RATIOS, target, ADVANTAGES, 0.0)
    within = (RATIOS - 1).abs() <= epsilon
    torch.testing.assert_close(shifted[within], distance[within])
    past = (RATIOS - target) * ADVANTAGES > 1e-12
    assert past.any() and (shifted[past].abs() < 1e-12).all() and (distance[past] > 0).all()


# ---------------------------------------------------------------------------------------------------- distributions


@SCRIPTS
def test_log_prob_and_kl_divergence_equal_torch_distributions(script):
    torch.manual_seed(0)
    old_mean, mean, actions = torch.randn(3, 50, 4, dtype=torch.float64) * 3
    old_log_std, log_std = torch.randn(2, 4, dtype=torch.float64)
    old, new = (Independent(Normal(m, s.exp()), 1) for m, s in ((old_mean, old_log_std), (mean, log_std)))
    torch.testing.assert_close(script.log_prob(mean, log_std, actions), new.log_prob(actions))
    kl = script.kl_divergence(old_mean, old_log_std, mean, log_std)
    torch.testing.assert_close(kl, kl_divergence(old, new))
    assert (script.kl_divergence(mean, log_std, mean, log_std) == 0).all()


# ----------------------------------------------------------------------------------------------------- the networks


@SCRIPTS
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu"])
def test_each_network_is_an_mlp_of_its_own(script, activation):
    _, agent = new_agent(script, activation=activation)
    act = {"tanh": torch.nn.Tanh(), "relu": torch.nn.ReLU(), "elu": torch.nn.ELU()}[activation]
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases are zero at first
        obs, layers, outputs = torch.randn(7, 3, dtype=torch.float64), agent.hidden, []
        heads = [agent.policy_head, agent.value_head] + ([agent.median_head] if script is bpo else [])
        for k, head in enumerate(heads):
            mlp = torch.nn.Sequential(torch.nn.Linear(3, 8), act, torch.nn.Linear(8, 8), act).double()
            for name, x in zip(("0.weight", "0.bias", "2.weight", "2.bias"), layers.parameters()):
                mlp.get_parameter(name).copy_(x[k].mT.reshape(mlp.get_parameter(name).shape))
            outputs.append(head(mlp(obs)))
        torch.testing.assert_close(agent.policy(obs), outputs[0])
        torch.testing.assert_close(agent.policy_head(agent.hidden(obs)[0]), outputs[0])
        torch.testing.assert_close(agent.value(agent.hidden(obs)), outputs[1][:, 0])
        if script is bpo:
            torch.testing.assert_close(agent.median(agent.hidden(obs)), outputs[2][:, 0])


@SCRIPTS
def test_initial_weights_are_orthogonal_and_differ_between_networks(script):
    _, agent = new_agent(script, hidden_size=16)
    for weight in (agent.hidden.weight_1, agent.hidden.weight_2):
        products = weight @ weight.mT  # of the rows, which are no more than the columns
        torch.testing.assert_close(
            products, 2 * torch.eye(weight.shape[1]).double().expand_as(products), atol=1e-5, rtol=0
        )
        assert (weight[0] - weight[1]).abs().max() > 0.1
    assert agent.policy_head.weight.norm(dim=1).allclose(torch.full((2,), 0.01).double())
    assert agent.value_head.weight.norm().item() == pytest.approx(1)


# ----------------------------------------------------------------------------------------------------- the objective


def sample_batch(script, args, agent, size=48, dtype=torch.float64):
    """A minibatch of an older policy: ratios spread around 1, some beyond the bounds."""
    torch.manual_seed(5)
    old = copy.deepcopy(agent)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
        obs = torch.randn(size, 3, dtype=dtype)
        means, log_stds = old.policy(obs), old.log_std.expand(size, 2)
        actions = means + log_stds.exp() * torch.randn(size, 2, dtype=dtype)
        batch = dict(obs=obs, actions=actions, means=means, log_stds=log_stds, values=old.value(old.hidden(obs)))
        batch["log_probs"] = script.log_prob(means, old.log_std, actions)
        batch["returns"] = batch["values"] + 2 * torch.randn(size, dtype=dtype) + 0.5
        batch["advantages"] = batch["returns"] - batch["values"]
        if getattr(args, "use_median", False):
            batch["medians"] = old.median(old.hidden(obs))
    return batch


def new_agent(script, dtype=torch.float64, **settings):
    torch.manual_seed(1)
    args = script.Args(**{"hidden_size": 8, "log_std_init": -0.3, "compile": False, **settings})
    return args, script.Agent(3, 2, args).to(dtype)


def literal_common(args, agent, batch):
    """Ratio, value loss and entropy, through torch.distributions and plain loops."""
    policy = Independent(Normal(agent.policy(batch["obs"]), agent.log_std.exp()), 1)
    ratio = policy.log_prob(batch["actions"]).exp() / batch["log_probs"].exp()
    value_losses = []
    for new, old, target in zip(agent.value(agent.hidden(batch["obs"])), batch["values"], batch["returns"]):
        clipped = torch.clip(new, old - args.clip_coef, old + args.clip_coef)
        choices = [(new - target) ** 2, (clipped - target) ** 2]
        value_losses.append(max(choices) if args.clip_value_loss else choices[0])
    return ratio, torch.stack(value_losses).mean(), policy.entropy().mean()


def literal_bpo_objective(args, agent, batch):
    ratio, value_loss, entropy = literal_common(args, agent, batch)
    low = 1 - args.clip_coef if args.ratio_low is None else args.ratio_low
    high = 1 + args.clip_coef if args.ratio_high is None else args.ratio_high
    value = agent.value(agent.hidden(batch["obs"])).detach() if args.recompute_advantages else batch["values"]
    advantage = batch["returns"] - value
    deviation = math.sqrt(((advantage - advantage.mean()) ** 2).sum() / (len(advantage) - 1))
    scale = max(deviation, advantage.abs().sum() / len(advantage) / 10) + 1e-8 if args.norm_adv else 1
    median_advantage, median_loss = advantage, 0.0
    if args.use_median:
        median = agent.median(agent.hidden(batch["obs"]))
        width = scale * (args.temperature if args.median_temperature is None else args.median_temperature)
        k, odds = (high - 1) / (high - low), (high - 1) / (1 - low)
        x = (batch["returns"] - median) / width
        median_loss = width * torch.log(torch.exp(k * x) + odds * torch.exp((k - 1) * x)).mean()
        median_advantage = batch["returns"] - (median.detach() if args.recompute_advantages else batch["medians"])
    target = torch.from_numpy(literal_target(median_advantage.numpy(), low, high, scale * args.temperature))
    distance = {
        "atv": (target - ratio).abs() * (advantage.abs() / scale + args.tv_coef),
        "tv": (target - ratio).abs(),
        "kl": ratio * torch.log(ratio / target) - ratio + target,
    }[args.divergence]
    loss = distance.mean() + args.value_coef * value_loss + args.median_coef * median_loss - args.ent_coef * entropy
    return loss, ratio, low, high


def literal_ppo_objective(args, agent, batch):
    ratio, value_loss, entropy = literal_common(args, agent, batch)
    advantage = batch["advantages"]
    if args.norm_adv:
        deviations = advantage - advantage.mean()
        advantage = deviations / (math.sqrt((deviations**2).sum() / (len(advantage) - 1)) + 1e-8)
    surrogate = torch.minimum(ratio * advantage, ratio.clip(1 - args.clip_coef, 1 + args.clip_coef) * advantage)
    loss = -surrogate.mean() + args.value_coef * value_loss - args.ent_coef * entropy
    return loss, ratio, 1 - args.clip_coef, 1 + args.clip_coef


BPO_SETTINGS = [
    {},
    {"temperature": 0.5, "tv_coef": 0.3, "ent_coef": 0.1},
    {"divergence": "tv", "temperature": 0.7},
    {"divergence": "kl", "temperature": 0.7},
    {"use_median": False},
    {"use_median": False, "recompute_advantages": True, "norm_adv": False, "temperature": 2.0},
    {"norm_adv": False, "temperature": 1.5},
    {"recompute_advantages": True},
    {"recompute_advantages": True, "median_network": "head", "norm_adv": False, "temperature": 1.0},
    {"median_network": "mlp-head", "median_coef": 2.0, "value_coef": 0.1},
    {"median_network": "mlp-head", "use_median": False},
    {"ratio_low": 0.3, "ratio_high": 1.2},
    {"ratio_low": 0.0, "ratio_high": 1.6, "divergence": "kl", "temperature": 0.5},
    {"ratio_high": 2.0, "median_temperature": 1.3, "recompute_advantages": True},
    {"median_temperature": 0.6, "norm_adv": False, "activation": "relu"},
    {"clip_value_loss": True, "clip_coef": 0.05, "activation": "elu"},
]
PPO_SETTINGS = [
    {},
    {"norm_adv": False},
    {"clip_value_loss": True, "clip_coef": 0.05},
    {"ent_coef": 0.1, "value_coef": 2},
]


@pytest.mark.parametrize(
    "script, literal, overrides",
    [(bpo, literal_bpo_objective, x) for x in BPO_SETTINGS] + [(ppo, literal_ppo_objective, x) for x in PPO_SETTINGS],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_objective_and_its_gradient_equal_the_literal_formulas(script, literal, overrides):
    args, agent = new_agent(script, **overrides)
    batch = sample_batch(script, args, agent)
    expected, ratio, low, high = literal(args, agent, batch)
    loss, stats = script.minibatch_loss(agent, batch, args)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    parameters = list(agent.parameters())
    for gradient, wanted in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-10)
    outside = (ratio < low) | (ratio > high)
    assert 0 < outside.sum() < len(ratio), "the batch must have ratios within the bounds and beyond them"
    assert stats["losses/clipfrac"].item() == pytest.approx(outside.double().mean().item())
    assert stats["losses/approx_kl"].item() == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    old = Independent(Normal(batch["means"], batch["log_stds"].exp()), 1)
    new = Independent(Normal(agent.policy(batch["obs"]), agent.log_std.exp()), 1)
    assert stats["losses/kl"].item() == pytest.approx(kl_divergence(old, new).mean().item())


@pytest.mark.parametrize("network, reaches_trunk", [("separate", False), ("head", True), ("mlp-head", True)])
def test_median_network_reads_what_its_name_says(network, reaches_trunk):
    _, agent = new_agent(bpo, median_network=network)
    agent.median(agent.hidden(torch.randn(5, 3, dtype=torch.float64))).sum().backward()
    reached = [any(x.grad[k].any() for x in agent.hidden.parameters()) for k in range(len(agent.hidden.weight_1))]
    assert reached == ([False, True] if reaches_trunk else [False, False, True])
    heads = {name.split(".")[0] for name, x in agent.named_parameters() if x.grad is not None} - {"hidden"}
    assert heads == {"median_head"} | ({"median_mlp"} if network == "mlp-head" else set())


@SCRIPTS
@pytest.mark.parametrize("max_grad_norm", [0.01, 1e6])
def test_minibatch_gradient_is_autograd_and_clip_grad_norm(script, max_grad_norm):
    args, agent = new_agent(script, torch.float32, max_grad_norm=max_grad_norm)
    batch = sample_batch(script, args, agent, dtype=torch.float32)
    indices, learning_rate = torch.tensor([3, 40, 7, 11, 3]), torch.tensor(1e-3)
    parameters = list(agent.parameters())
    gradient, stats, names = script.minibatch_gradient(agent, parameters, batch, indices, learning_rate, args)
    loss, _ = script.minibatch_loss(agent, {name: x[indices] for name, x in batch.items()}, args)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in parameters]))
    assert stats[names.index("losses/grad_norm")].item() == pytest.approx(norm.item(), rel=1e-5)
    assert len(names) == len(stats) and not stats.requires_grad and learning_rate == torch.tensor(1e-3)


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
        (0.001, 1e-3, 1.5e-3),
        (0.5, 1.2e-5, 1e-5),
        (0.001, 8e-3, 1e-2),
    ],
)
def test_adaptive_learning_rate_follows_rsl_rl(script, kl, start, expected):
    """desired_kl is 0.01: above twice that down by 1.5, not below 1e-5; below half of it up by 1.5, not above 1e-2."""
    args, agent = new_agent(script, torch.float32, lr_schedule="adaptive", desired_kl=0.01)
    batch = sample_batch(script, args, agent, dtype=torch.float32)
    with torch.no_grad():  # an old policy with the same deviation, its means moved so that KL(old || new) is as asked
        batch["log_stds"] = agent.log_std.expand(48, 2)
        batch["means"] = agent.policy(batch["obs"]) + math.sqrt(kl) * agent.log_std.exp()
    learning_rate = torch.tensor(start)
    _, stats, names = script.minibatch_gradient(
        agent, list(agent.parameters()), batch, torch.arange(48), learning_rate, args
    )
    assert stats[names.index("losses/kl")].item() == pytest.approx(kl, rel=1e-3)
    assert learning_rate.item() == pytest.approx(expected, rel=1e-5)


@SCRIPTS
def test_compiled_gradient_equals_the_plain_one(script):
    if not script.can_compile():
        pytest.skip("torch.compile needs a C++ compiler and Python's headers")
    args, agent = new_agent(script, torch.float32, lr_schedule="adaptive")
    batch = sample_batch(script, args, agent, dtype=torch.float32)
    torch._dynamo.config.trace_autograd_ops = True
    results = []
    for function in (script.minibatch_gradient, torch.compile(script.minibatch_gradient, fullgraph=True)):
        learning_rate = torch.tensor(1e-3)
        results.append(
            [function(agent, list(agent.parameters()), batch, torch.arange(32), learning_rate, args), learning_rate]
        )
    (plain, plain_rate), (compiled, compiled_rate) = results
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-4, atol=1e-6)
    assert compiled[2] == plain[2] and compiled_rate == plain_rate != torch.tensor(1e-3)


# -------------------------------------------------------------------------------------------------------- statistics


@SCRIPTS
def test_ratio_statistics_describe_each_side_of_one(script):
    ratio = torch.tensor([0.5, 0.7, 0.9, 1.0, 1.1, 1.5])
    stats = script.ratio_statistics(ratio, 0.6, 1.4)
    assert stats["ratio/out_of_bounds"] == pytest.approx(2 / 6)
    assert stats["ratio/high_mean"] == pytest.approx(np.mean([1.0, 1.1, 1.5]))
    assert stats["ratio/high_std"] == pytest.approx(np.std([1.0, 1.1, 1.5]), abs=1e-6)
    assert stats["ratio/low_mean"] == pytest.approx(np.mean([0.5, 0.7, 0.9, 1.0]))
    assert stats["ratio/low_std"] == pytest.approx(np.std([0.5, 0.7, 0.9, 1.0]), abs=1e-6)
    assert all(math.isfinite(x) for x in script.ratio_statistics(torch.tensor([1.2]), 0.6, 1.4).values())


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("use_median", [True, False])
def test_improvement_bound_is_corollary_4_4(norm_adv, use_median):
    args = bpo.Args(clip_coef=0.3, temperature=0.4, norm_adv=norm_adv, use_median=use_median)
    rng = np.random.default_rng(2)
    batch = {name: rng.normal(size=30) * 3 for name in ("returns", "values", "medians")}
    ratio, advantage = np.exp(rng.normal(size=30) * 0.2), batch["returns"] - batch["values"]
    median_advantage = batch["returns"] - batch["medians"] if use_median else advantage
    temperature = 0.4 * (advantage.std(ddof=1) if norm_adv else 1)
    tanh = np.tanh(median_advantage / (2 * temperature))
    gain, divergence = 0.3 * tanh * median_advantage, np.abs(1 + 0.3 * tanh - ratio) * np.abs(advantage)
    bound = bpo.improvement_bound(torch.from_numpy(ratio), {k: torch.from_numpy(x) for k, x in batch.items()}, args)
    assert bound["theory/guaranteed_gain"] == pytest.approx(gain.mean(), rel=1e-6)
    assert bound["theory/atv_divergence"] == pytest.approx(divergence.mean(), rel=1e-6)
    assert bound["theory/improvement_bound"] == pytest.approx((gain - divergence).mean(), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- siblings


def definitions(script):
    """Source text of every top-level function and class."""
    text = Path(script.__file__).read_text()
    nodes = [x for x in ast.parse(text).body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


# What may differ, and why. "less": PPO's text is BPO's with lines left out.
ALLOWED = {
    "Args": "own",  # other options, another default of clip_coef
    "ratio_bounds": "own",  # PPO's are symmetric
    "policy_loss": "own",  # Eq. 16 and Eq. 17
    "minibatch_loss": "own",  # the objective
    "check_args": "less",  # BPO's own options
    "Agent": "less",  # the median head
    "train": "less",  # the median of the rollout and the theory's statistics
}
ONLY_BPO, ONLY_PPO = {"target_ratio", "median_loss", "improvement_bound"}, {"spo_loss"}


def test_what_the_siblings_share_is_the_same_text():
    ours, theirs = definitions(bpo), definitions(ppo)
    assert (set(ours) - set(theirs), set(theirs) - set(ours)) == (ONLY_BPO, ONLY_PPO)
    different = {name for name in set(theirs) & set(ours) if ours[name] != theirs[name]}
    assert different == set(ALLOWED), f"unexpected: {different - set(ALLOWED)}, now equal: {set(ALLOWED) - different}"
    for name, kind in ALLOWED.items():
        if kind == "less":
            changes = [x for x in difflib.ndiff(theirs[name].splitlines(), ours[name].splitlines()) if x[0] in "+-"]
            assert all(x[0] == "+" for x in changes), f"{name}: {changes}"
            extra = "\n".join(changes)
            assert "median" in extra or "improvement_bound" in extra


def test_options_the_siblings_share_agree():
    ours = {x.name: x for x in bpo.dataclasses.fields(bpo.Args)}
    theirs = {x.name: x for x in ppo.dataclasses.fields(ppo.Args)}
    shared = [name for name in ours if name in theirs]
    assert [name for name in theirs if name != "objective"] == shared
    kinds = [(x.type, x.default) for fields in (ours, theirs) for x in map(fields.get, shared)]
    different = {name for name, a, b in zip(shared, kinds, kinds[len(shared) :]) if a != b}
    assert different == {"clip_coef"}
    own = {"ratio_low", "ratio_high", "temperature", "median_temperature", "use_median", "median_network"}
    assert set(ours) - set(theirs) == own | {"median_coef", "divergence", "tv_coef", "recompute_advantages"}


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
def test_shared_names_exist(script):
    names = ["compute_gae", "policy_loss", "Args", "Agent", "make_envs", "evaluate", "train"]
    names += ["target_ratio", "median_loss"] * (script is bpo)
    assert all(callable(getattr(script, name)) for name in names)


@SCRIPTS
def test_script_imports_no_file_of_this_project(script):
    imported = set()
    for node in ast.walk(ast.parse(Path(script.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {x.name.split(".")[0] for x in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert not [name for name in imported if (ROOT / f"{name}.py").exists() or (ROOT / name).is_dir()]


def test_importing_a_script_runs_and_creates_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bpo_continuous_action, ppo_continuous_action"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, list(tmp_path.iterdir())) == (0, "", []), run.stderr
