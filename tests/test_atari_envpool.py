"""The functions of the BPO and PPO scripts for Atari against formulas, and the likeness of the two."""

import ast
import contextlib
import copy
import dataclasses
import difflib
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import bpo_atari_envpool as bpo
import bpo_continuous_action
import ppo_atari_envpool as ppo
import ppo_continuous_action

ROOT = Path(bpo.__file__).parent
SCRIPTS = pytest.mark.parametrize("script", [bpo, ppo], ids=["bpo", "ppo"])
ACTIONS = 5


# -------------------------------------------------------------------------------------------------------- the network


def frames(size, seed=0):
    return torch.randint(0, 256, (size, 84, 84, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def new_agent(script, dtype=torch.float32, **settings):
    torch.manual_seed(1)
    args = script.Args(device="cpu", **settings)
    agent = script.Agent(4, ACTIONS, args)
    with torch.no_grad():
        for head in (agent.policy, agent.value):
            head.weight *= 3  # away from the flat policy of a new network
            head.bias.uniform_(-0.5, 0.5)
    return args, agent.to(dtype)


def literal_features(agent, obs):
    """The Nature CNN on images in [0, 1], channels first, layer by layer."""
    first, (_, second, _, third, _), (last, _) = agent.first, agent.convolutions, agent.dense
    x = obs.numpy().transpose(0, 3, 1, 2) / np.float32(255)
    x = torch.nn.functional.conv2d(torch.from_numpy(x), first.weight, first.bias, stride=4).relu()
    x = torch.nn.functional.conv2d(x, second.weight, second.bias, stride=2).relu()
    x = torch.nn.functional.conv2d(x, third.weight, third.bias, stride=1).relu()
    return (x.permute(0, 2, 3, 1).reshape(len(x), 7 * 7 * 64) @ last.weight.T + last.bias).relu()


@SCRIPTS
@pytest.mark.parametrize("heads", ["linear", "mlp"])
def test_network_is_the_nature_cnn_with_heads(script, heads):
    _, agent = new_agent(script, heads=heads)
    obs = frames(6)
    features = literal_features(agent, obs)

    def layer(linear, x):
        return x @ linear.weight.T + linear.bias

    policy_features = value_features = features
    if heads == "mlp":
        policy_features = layer(agent.policy_branch[0], features).relu()
        value_features = layer(agent.value_branch[0], features).relu()
        assert policy_features.shape == value_features.shape == (6, 256)
    outputs = agent(obs)
    expected = dict(logits=layer(agent.policy, policy_features), values=layer(agent.value, value_features)[:, 0])
    if script is bpo:
        x = layer(agent.median[0][0], value_features).relu() if heads == "mlp" else value_features
        expected["medians"] = layer(agent.median[1], x)[:, 0]
    assert outputs.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(outputs[name], x, rtol=1e-4, atol=1e-5)


@SCRIPTS
def test_weights_are_orthogonal_and_the_first_policy_is_nearly_flat(script):
    agent = script.Agent(4, ACTIONS, script.Args(device="cpu"))
    trunk = agent.convolutions[1], agent.dense[0]
    for layer, gain in (*((layer, 2**0.5) for layer in trunk), (agent.policy, 0.01), (agent.value, 1)):
        weight = layer.weight.flatten(1)
        expected = gain**2 * torch.eye(len(weight))
        torch.testing.assert_close(weight @ weight.T, expected, atol=1e-4 * gain**2, rtol=1e-4)
        assert not layer.bias.any()
    policy = agent(frames(3))["logits"].softmax(-1)
    torch.testing.assert_close(policy, torch.full_like(policy, 1 / ACTIONS), atol=0.02, rtol=0)


def test_without_median_there_is_no_median_head():
    _, agent = new_agent(bpo, use_median=False)
    assert agent(frames(2)).keys() == {"logits", "values"} and not hasattr(agent, "median")


@SCRIPTS
def test_bfloat16_computes_the_same_to_its_precision(script):
    _, agent = new_agent(script)
    _, rough = new_agent(script, bf16=True)
    exact, outputs = agent(frames(16)), rough(frames(16))
    for name, x in exact.items():
        assert outputs[name].dtype == torch.float32
        assert 0 < (outputs[name] - x).abs().max() < 0.05 * x.abs().max()


@SCRIPTS
def test_frames_become_channels_last_bytes(script):
    obs = np.random.default_rng(0).integers(0, 256, (3, 4, 84, 84), dtype=np.uint8)
    assert np.array_equal(script.to_frames(torch.from_numpy(obs)).numpy(), obs.transpose(0, 2, 3, 1))


# ----------------------------------------------------------------------------------------------------- the objective


@SCRIPTS
def test_log_prob_and_kl_divergence_equal_torch_distributions(script):
    torch.manual_seed(0)
    old_logits, logits = torch.randn(2, 50, ACTIONS, dtype=torch.float64) * 3
    actions = torch.randint(ACTIONS, (50,))
    torch.testing.assert_close(script.log_prob(logits, actions), Categorical(logits=logits).log_prob(actions))
    expected = kl_divergence(Categorical(logits=old_logits), Categorical(logits=logits))
    torch.testing.assert_close(script.kl_divergence(old_logits, logits), expected)


@SCRIPTS
def test_moments_are_those_of_each_minibatch(script):
    advantages = torch.randn(3, 4, 50, dtype=torch.float64) * 7 + 2
    moments = script.minibatch_moments(advantages)
    assert moments.shape == (3, 4, 3) and moments.dtype == torch.float32
    expected = np.stack([advantages.mean(-1), advantages.abs().mean(-1), advantages.numpy().std(-1, ddof=1)], -1)
    np.testing.assert_allclose(moments, expected, rtol=1e-5)
    equal = script.minibatch_moments(torch.full((1, 50), 0.1))[0]
    assert equal[:2].tolist() == pytest.approx([0.1, 0.1]) and 0 <= equal[2] < 1e-6


class Linear(torch.nn.Module):
    """Stands in for the network: linear in 6 numbers, in float64, so that formulas can be compared exactly."""

    def __init__(self, median):
        super().__init__()
        torch.manual_seed(2)
        self.names = ["values", "medians"] if median else ["values"]
        self.layer = torch.nn.Linear(6, ACTIONS + len(self.names)).double()

    def forward(self, obs):
        logits, others = self.layer(obs).split([ACTIONS, len(self.names)], -1)
        return dict(logits=logits, **dict(zip(self.names, others.unbind(-1))))


def sample_batch(script, agent, obs, spread):
    """A minibatch of an older policy: ratios spread around 1, some beyond the bounds."""
    torch.manual_seed(5)
    old = copy.deepcopy(agent)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += spread * torch.randn_like(parameter)
        batch = dict(obs=obs, actions=torch.randint(ACTIONS, (len(obs),)), **old(obs))
        batch["log_probs"] = script.log_prob(batch["logits"], batch["actions"])
        batch["returns"] = batch["values"] + torch.randn(len(obs), dtype=batch["values"].dtype) + 0.3
        batch["advantages"] = batch["returns"] - batch["values"]
    return batch


def literal_common(args, agent, batch):
    """Outputs, ratio, value loss and entropy, through torch.distributions and plain loops."""
    outputs = agent(batch["obs"])
    policy = Categorical(logits=outputs["logits"])
    ratio = policy.log_prob(batch["actions"]).exp() / batch["log_probs"].exp()
    value_losses = []
    for new, old, target in zip(outputs["values"], batch["values"], batch["returns"]):
        clipped = torch.clip(new, old - args.clip_coef, old + args.clip_coef)
        choices = [(new - target) ** 2, (clipped - target) ** 2]
        value_losses.append(max(choices) if args.clip_value_loss else choices[0])
    return outputs, ratio, torch.stack(value_losses).mean(), policy.entropy().mean()


def literal_bpo_objective(args, agent, batch):
    outputs, ratio, value_loss, entropy = literal_common(args, agent, batch)
    low = 1 - args.clip_coef if args.ratio_low is None else args.ratio_low
    high = 1 + args.clip_coef if args.ratio_high is None else args.ratio_high
    advantage = batch["returns"] - (outputs["values"].detach() if args.recompute_advantages else batch["values"])
    old = batch["advantages"]
    deviation = math.sqrt(((old - old.mean()) ** 2).sum() / (len(old) - 1))
    scale = max(deviation, old.abs().sum() / len(old) / 10) + 1e-8 if args.norm_adv else 1
    median_advantage, median_loss = advantage, 0.0
    if args.use_median:
        width = scale * (args.temperature if args.median_temperature is None else args.median_temperature)
        k, odds = (high - 1) / (high - low), (high - 1) / (1 - low)
        x = (batch["returns"] - outputs["medians"]) / width
        median_loss = width * torch.logaddexp(k * x, math.log(odds) + (k - 1) * x).mean()
        median = outputs["medians"].detach() if args.recompute_advantages else batch["medians"]
        median_advantage = batch["returns"] - median
    x = median_advantage / (scale * args.temperature)
    target = low + (high - low) / (1 + (high - 1) / (1 - low) * torch.exp(-x))
    distance = {
        "atv": (target - ratio).abs() * (advantage.abs() / scale + args.tv_coef),
        "tv": (target - ratio).abs(),
        "kl": ratio * torch.log(ratio / target) - ratio + target,
    }[args.divergence]
    loss = distance.mean() + args.value_coef * value_loss + args.median_coef * median_loss - args.ent_coef * entropy
    return loss, ratio, low, high


def literal_ppo_objective(args, agent, batch):
    _, ratio, value_loss, entropy = literal_common(args, agent, batch)
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
    {"use_median": False, "temperature": 0.5},
    {"norm_adv": True, "temperature": 0.3},
    {"norm_adv": True, "median_temperature": None},
    {"recompute_advantages": True, "norm_adv": True, "temperature": 0.5},
    {"recompute_advantages": True, "median_temperature": None, "temperature": 0.2},
    {"ratio_low": 0.3, "ratio_high": 1.2, "median_coef": 2.0, "value_coef": 0.1, "temperature": 1.0},
    {"clip_value_loss": True, "clip_coef": 0.05},
]
PPO_SETTINGS = [{}, {"norm_adv": False}, {"clip_value_loss": True, "clip_coef": 0.05}, {"ent_coef": 0.1}]


@pytest.mark.parametrize(
    "script, literal, overrides",
    [(bpo, literal_bpo_objective, x) for x in BPO_SETTINGS] + [(ppo, literal_ppo_objective, x) for x in PPO_SETTINGS],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_objective_and_its_gradient_equal_the_literal_formulas(script, literal, overrides):
    args, agent = script.Args(device="cpu", **overrides), Linear(script is bpo and overrides.get("use_median", True))
    batch = sample_batch(script, agent, torch.randn(48, 6, dtype=torch.float64), spread=0.2)
    expected, ratio, low, high = literal(args, agent, batch)
    moments = script.minibatch_moments(batch["advantages"]).double()
    loss, stats = script.minibatch_loss(agent, batch, moments, args)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)  # the moments are float32
    parameters = list(agent.parameters())
    for gradient, wanted in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
    outside = (ratio < low) | (ratio > high)
    assert 0 < outside.sum() < len(ratio), "the batch must have ratios within the bounds and beyond them"
    assert stats["losses/clipfrac"].item() == pytest.approx(outside.double().mean().item())
    assert stats["losses/approx_kl"].item() == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    old, new = (Categorical(logits=x["logits"]) for x in (batch, agent(batch["obs"])))
    assert stats["losses/kl"].item() == pytest.approx(kl_divergence(old, new).mean().item())
    assert stats["losses/entropy"].item() == pytest.approx(new.entropy().mean().item())


@SCRIPTS
@pytest.mark.parametrize("max_grad_norm", [0.01, 1e6])
def test_minibatch_gradient_is_autograd_and_clip_grad_norm(script, max_grad_norm):
    args, agent = new_agent(script, max_grad_norm=max_grad_norm)
    batch = sample_batch(script, agent, frames(12), spread=0.005)
    indices = torch.tensor([3, 10, 7, 11, 3])
    moments = script.minibatch_moments(batch["advantages"][indices])
    parameters = list(agent.parameters())
    gradient, stats, names = script.minibatch_gradient(
        script.minibatch_loss, agent, parameters, batch, indices, moments, args
    )
    loss, _ = script.minibatch_loss(agent, {name: x[indices] for name, x in batch.items()}, moments, args)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in parameters]), rtol=1e-4, atol=1e-6)
    assert stats[names.index("losses/grad_norm")].item() == pytest.approx(norm.item(), rel=1e-4)
    assert len(names) == len(stats) and not stats.requires_grad


@SCRIPTS
@pytest.mark.parametrize("bf16", [False, True])
def test_loss_is_one_graph(script, bf16):
    """torch.compile traces all of it, forward and backward; inductor's own code is not what is tested here."""
    args, agent = new_agent(script, bf16=bf16)
    batch = sample_batch(script, agent, frames(8), spread=0.005)
    moments = script.minibatch_moments(batch["advantages"])
    graph = torch.compile(script.minibatch_loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (script.minibatch_loss, graph):
        loss, stats = function(agent, batch, moments, args)
        results.append([loss, *torch.autograd.grad(loss, list(agent.parameters())), *stats.values()])
    tolerance = dict(rtol=0.05, atol=0.005) if bf16 else dict(rtol=1e-4, atol=1e-6)
    for plain, traced in zip(*results):
        torch.testing.assert_close(traced, plain, **tolerance)


@SCRIPTS
def test_an_update_computes_on_one_device_and_waits_for_nothing(script, monkeypatch):
    """On a device without memory a tensor of the CPU is an error, and so is a number that the host asks for."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no such device
    args, agent = new_agent(script)
    batch = {name: x.to("meta") for name, x in sample_batch(script, agent, frames(8), spread=0.005).items()}
    agent, order = agent.to("meta"), torch.zeros(2, 3, 4, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        agent(frames(8))
    moments = script.minibatch_moments(batch["advantages"][order])
    given = batch, order[1, 2], moments[1, 2]
    gradient, stats, _ = script.minibatch_gradient(script.minibatch_loss, agent, [*agent.parameters()], *given, args)
    assert gradient.is_meta and stats.is_meta


WORKER = """
import sys, torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import bpo_atari_envpool as bpo, ppo_atari_envpool as ppo
torch.set_num_threads(1)
dist.init_process_group("gloo")
cases, results = torch.load(sys.argv[2], weights_only=False), []
for name, settings, state, batch in cases:
    script = {"bpo": bpo, "ppo": ppo}[name]
    args = script.Args(device="cpu", **settings)
    agent = script.Agent(4, 5, args)
    agent.load_state_dict(state)
    half = torch.arange(len(batch["obs"])).chunk(2)[bpo.RANK]
    moments = script.minibatch_moments(batch["advantages"][half])
    gradient, stats, _ = script.minibatch_gradient(
        script.minibatch_loss, agent, list(agent.parameters()), batch, half, moments, args
    )
    results.append((moments, gradient, stats))
import numpy as np
local = np.arange(12.0).reshape(2, 3, 2) + 100 * bpo.RANK
results.append(torch.from_numpy(bpo.gather(local)))
torch.save(results, f"{sys.argv[2]}.{bpo.RANK}")
dist.destroy_process_group()
"""


def run_ranks(command, folder, **kwargs):
    """Runs a command as two processes of a group; returns their outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | group | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def test_gradients_of_two_processes_equal_those_of_one_on_the_same_data(tmp_path):
    cases, expected = [], []
    for name, settings in (("bpo", {}), ("bpo", {"norm_adv": True, "temperature": 0.1}), ("ppo", {})):
        script = {"bpo": bpo, "ppo": ppo}[name]
        args, agent = new_agent(script, max_grad_norm=0.05, **settings)
        batch = sample_batch(script, agent, frames(24), spread=0.005)
        batch["returns"][:12] += 2  # the halves' own moments would differ from the whole's
        batch["advantages"] = batch["returns"] - batch["values"]
        moments = script.minibatch_moments(batch["advantages"])
        everything = [agent, list(agent.parameters()), batch, torch.arange(24), moments, args]
        gradient, stats, _ = script.minibatch_gradient(script.minibatch_loss, *everything)
        assert gradient.norm().item() == pytest.approx(0.05, rel=1e-3)  # clipped, as one
        cases.append((name, dict(settings, max_grad_norm=0.05), agent.state_dict(), batch))
        expected.append((moments, gradient, stats))
    torch.save(cases, tmp_path / "cases")
    ends = run_ranks([sys.executable, "-c", WORKER, str(ROOT), str(tmp_path / "cases")], tmp_path)
    assert [code for code, *_ in ends] == [0, 0], ends
    for rank in range(2):
        *results, gathered = torch.load(tmp_path / f"cases.{rank}", weights_only=False)
        for found, wanted in zip(results, expected, strict=True):
            for x, y in zip(found, wanted):
                torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-6)
        local = np.arange(12.0).reshape(2, 3, 2)
        assert np.array_equal(gathered, np.concatenate([local, local + 100], -1))


# ---------------------------------------------------------------------------------------------------------- siblings


def definitions(script):
    """Source text of every top-level function and class."""
    text = Path(script.__file__).read_text()
    nodes = [x for x in ast.parse(text).body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


ONLY_BPO = {"target_ratio", "median_loss", "improvement_bound"}


@SCRIPTS
def test_what_is_shared_with_the_continuous_script_is_the_same_text(script):
    """So the tests of those functions' formulas, in test_continuous_action.py, hold here too."""
    ours = definitions(script)
    theirs = definitions(bpo_continuous_action if script is bpo else ppo_continuous_action)
    equal = {name for name in ours if ours[name] == theirs.get(name)}
    assert equal >= {"ratio_bounds", "policy_loss"} | ({"target_ratio", "median_loss"} if script is bpo else set())


@SCRIPTS
def test_gae_is_that_of_the_continuous_script(script):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(30, 3)), rng.normal(size=(31, 3))
    ends = rng.random((2, 30, 3)) < 0.2
    ours = script.compute_gae(rewards, values, *ends, 0.9, 0.8)
    theirs = bpo_continuous_action.compute_gae(*map(torch.from_numpy, (rewards, values, *ends)), 0.9, 0.8)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# What may differ, and why. "less": PPO's text is BPO's with lines left out.
ALLOWED = {
    "Args": "own",  # fewer options, and Table 3 in place of Table 2
    "ratio_bounds": "own",  # PPO's are symmetric
    "policy_loss": "own",  # Eq. 16 and Eq. 17
    "minibatch_loss": "own",  # the objective
    "check_args": "less",  # BPO's own options
    "Agent": "less",  # the median head
    "train": "less",  # the theory's statistics
}


def test_what_the_siblings_share_is_the_same_text():
    ours, theirs = definitions(bpo), definitions(ppo)
    assert set(ours) - set(theirs) == ONLY_BPO and set(theirs) <= set(ours)
    different = {name for name in theirs if ours[name] != theirs[name]}
    assert different == set(ALLOWED), f"unexpected: {different - set(ALLOWED)}, now equal: {set(ALLOWED) - different}"
    for name, kind in ALLOWED.items():
        if kind == "less":
            changes = [x for x in difflib.ndiff(theirs[name].splitlines(), ours[name].splitlines()) if x[0] in "+-"]
            assert all(x[0] == "+" for x in changes), f"{name}: {changes}"
            extra = "\n".join(changes)
            assert "median" in extra or "improvement_bound" in extra


def test_options_the_siblings_share_agree_but_for_the_papers_tables_and_the_authors_normalisation():
    ours, theirs = ({x.name: x for x in dataclasses.fields(script.Args)} for script in (bpo, ppo))
    assert [name for name in ours if name in theirs] == list(theirs)
    different = {n: (x.default, theirs[n].default) for n, x in ours.items() if n in theirs and x != theirs[n]}
    different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
    assert different == dict(clip_coef=(0.3, 0.2), ent_coef=(0.001, 0.01), update_epochs=(5, 4), norm_adv=(False, True))
    equal = dict(minibatch_size=256, gamma=0.98, learning_rate=2.5e-4, num_steps=128, num_envs=8, gae_lambda=0.95)
    only_bpo = dict(temperature=0.001, tv_coef=0.0, median_coef=0.5, median_temperature=1.0)
    for name, value in (equal | dict(value_coef=0.5, lr_schedule="constant") | only_bpo).items():
        assert ours[name].default == value and (name in only_bpo or theirs[name].default == value)
    own = {"ratio_low", "ratio_high", "use_median", "divergence", "recompute_advantages"}
    assert set(ours) - set(theirs) == own | set(only_bpo)


def test_siblings_differ_in_few_lines():
    ours, theirs = (Path(x.__file__).read_text().splitlines() for x in (bpo, ppo))
    blocks = difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes()
    assert sum(a2 - a1 + b2 - b1 for kind, a1, a2, b1, b2 in blocks if kind != "equal") < 115


def test_importing_a_script_runs_and_creates_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bpo_atari_envpool, ppo_atari_envpool"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, list(tmp_path.iterdir())) == (0, "", []), run.stderr
