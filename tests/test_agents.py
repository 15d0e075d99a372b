"""The agents of the scripts for control: networks, initial weights, running statistics, actions."""

import math

import numpy as np
import pytest
import torch
from common import ATARI, BPO, CONTINUOUS, PPO, ROBOTS, each, frames, make_agent, make_batch
from hypothesis import given, settings
from hypothesis.strategies import integers, lists, sampled_from

INF = math.inf
allclose, close = np.testing.assert_allclose, torch.testing.assert_close


@each(*CONTINUOUS, *ROBOTS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(integers(0, 2**31), lists(integers(1, 9), min_size=1, max_size=8), sampled_from([1e-3, 1, 1e3]))
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


@each(*CONTINUOUS)
def test_floor_under_the_standard_deviation_of_observations_leaves_rewards_alone(script):
    args, agent = make_agent(script, torch.float32, min_obs_std=0.5)
    samples = torch.tensor([[0.1, 1.0, 2.0]]) * torch.tensor([[-1.0], [1.0]]) + 7  # deviations 0.1, 1 and 2
    agent.obs_stats.update(samples)
    allclose(agent.normalize(samples), [[-0.2, -1, -1], [0.2, 1, 1]], atol=1e-4)
    agent.return_stats.update(torch.tensor([[-0.1], [0.1]]))
    allclose(agent.return_stats.std(), [0.1], rtol=1e-4)


@each(*CONTINUOUS)
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
        allclose(scaled, (rewards[half] / np.sqrt(np.var(sums) + 1e-8)).clip(-10, 10), rtol=1e-5, atol=1e-7)
        allclose(agent.state_dict()["discounted_return"], current, rtol=1e-6)
        saved, (_, agent) = agent.state_dict(), make_agent(script, torch.float32, num_envs=3)
        agent.load_state_dict(saved)
    assert scaled[59, 1] == 10


@pytest.mark.parametrize("network", [None, "separate", "mlp-head", "none"])
def test_continuous_networks_are_mlps_and_a_median_reads_what_its_name_says(network):
    """None is PPO, which has no median."""
    script, own = (BPO[0], {"median_network": network}) if network else (PPO[0], {})
    for activation in ("tanh", "relu", "elu"):
        _, agent, batch = make_batch(script, activation=activation, **own)
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


@pytest.mark.parametrize("heads", ["linear", "mlp"])
@pytest.mark.parametrize("median", [None, "linear-head", "mlp-head", "none"])
def test_atari_network_is_the_nature_cnn_with_heads(median, heads):
    """On images in [0, 1], channels first, layer by layer; None is PPO, which has no median."""
    script, own = (BPO[1], {"median_network": median}) if median else (PPO[1], {})
    _, agent = make_agent(script, torch.float32, heads=heads, **own)
    obs = frames(3)
    x = torch.from_numpy(obs.numpy().transpose(0, 3, 1, 2) / np.float32(255))
    for layer, stride in ((agent.first, 4), (agent.convolutions[1], 2), (agent.convolutions[3], 1)):
        x = torch.nn.functional.conv2d(x, layer.weight, layer.bias, stride=stride).relu()
    x = (x.permute(0, 2, 3, 1).reshape(3, 7 * 7 * 64) @ agent.dense[0].weight.T + agent.dense[0].bias).relu()
    features = agent.features(obs)
    close(features, x, rtol=1e-4, atol=1e-5)

    def head(parameters, x):
        """Linear layers with ReLU between: what the last one reads, and what it says."""
        *hidden, weight, bias = parameters
        for w, b in zip(hidden[::2], hidden[1::2]):
            x = (x @ w.T + b).relu()
        return x, x @ weight.T + bias

    values_input, values = head(list(agent.value.parameters()), features)
    close(agent.value(features), values[:, 0])
    close(agent(features).logits, head(list(agent.policy.parameters()), features)[1].log_softmax(-1))
    assert values_input.shape == (3, {"linear": 512, "mlp": 256}[heads])
    if median == "none":
        assert agent.median is agent.value
    elif median:
        close(agent.median(features), head(list(agent.median[1].parameters()), values_input)[1][:, 0])
        assert len(list(agent.median[1].parameters())) == {"linear-head": 2, "mlp-head": 4}[median]


@each(*CONTINUOUS)
def test_continuous_weights_are_orthogonal_and_differ_between_networks(script):
    _, agent = make_agent(script, hidden_size=16)
    networks = [agent.policy, agent.value] + ([agent.median] if script in BPO else [])
    for network, gain in zip(networks, (0.01, 1, 1)):
        for layer in (network[0], network[2]):
            products = layer.weight.T @ layer.weight  # of the columns, which are no more than the rows
            close(products, 2 * torch.eye(len(products)).double(), atol=1e-5, rtol=0)
        assert network[4].weight.norm(dim=1).tolist() == pytest.approx([gain] * len(network[4].weight))
        assert not any(layer.bias.any() for layer in network[:5:2])
    assert all((a[0].weight - b[0].weight).abs().max() > 0.1 for a, b in zip(networks, networks[1:]))
    assert agent.log_std.tolist() == pytest.approx([-0.3, -0.3])


@each(*ATARI)
def test_atari_weights_are_orthogonal_and_the_first_policy_is_nearly_flat(script):
    agent = script.Agent(4, 5, script.Args(device="cpu"))
    layers = (agent.first, 2), (agent.convolutions[1], 2), (agent.dense[0], 2), (agent.policy[0], 1e-4)
    for layer, square in (*layers, (agent.value[0], 1)):
        weight = layer.weight.flatten(1)
        close(weight @ weight.T, square * torch.eye(len(weight)), atol=1e-4 * square, rtol=1e-4)
        assert not layer.bias.any()
    policy = agent(agent.features(frames(3))).probs
    close(policy, torch.full_like(policy, 0.2), atol=0.02, rtol=0)


@each(*ATARI)
def test_a_saved_agent_acts_on_what_the_simulator_returns(script):
    _, agent = make_agent(script, torch.float32)
    obs = np.random.default_rng(0).integers(0, 256, (3, 4, 84, 84), dtype=np.uint8)
    policy = agent(agent.normalize(torch.from_numpy(obs)))
    close(policy.logits, agent(agent.features(torch.from_numpy(obs.transpose(0, 2, 3, 1)))).logits)
    close(policy.logits, agent(agent.normalize(torch.from_numpy(obs).float())).logits)  # as enjoy.py gives them
    assert agent.to_env(policy.mode).tolist() == policy.logits.argmax(-1).tolist()


@each(*ATARI, *ROBOTS)
def test_bfloat16_computes_the_same_to_its_precision(script):
    agents = [make_agent(script, torch.float32, bf16=bf16)[1] for bf16 in (False, True)]
    for exact, found in zip(*(x.parameters() for x in agents), strict=True):
        assert torch.equal(exact, found) and found.dtype == torch.float32
    x = torch.randn(16, 4)
    if script in ATARI:
        outputs = [[agent.features(frames(8))] for agent in agents]
    else:
        outputs = [[agent.value(x), agent.policy(x[:, :3])] for agent in agents]
    for exact, found in zip(*outputs):
        assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()


@each(*CONTINUOUS)
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
    low, high = map(torch.tensor, zip(*table))
    agent = script.Agent(3, low.float(), high.float(), script.Args(compile=False))
    mapped = agent.to_env(actions[:, None].expand(-1, len(table)))
    allclose(mapped.T, list(table.values()), rtol=1e-6)
    assert (mapped[1:-1, 2] == actions[1:-1].numpy()).all()  # exactly, where the bounds are -1 and 1


@each(*ROBOTS)
def test_actions_of_robots_are_clipped_and_the_parameter_is_the_deviation(script):
    _, agent = make_agent(script, torch.float32, init_std=1.0)
    assert agent.to_env(torch.tensor([[-5.0, -5.0], [0.3, 5.0]])).tolist() == [[-1.0, -2.0], [pytest.approx(0.3), 5.0]]
    assert (agent.std == 1).all()
    with torch.no_grad():
        agent.std.copy_(torch.tensor([0.5, 0.25]))
    assert agent(torch.zeros(7, 3)).stddev[3].tolist() == [0.5, 0.25]
