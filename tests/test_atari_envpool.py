"""The functions of the BPO and PPO scripts for Atari against formulas, and the likeness of the two."""

import ast
import contextlib
import copy
import difflib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_continuous_action import literal_median_loss, literal_target, parse
from torch.distributions import Categorical, kl_divergence

import bpo_atari_envpool as bpo
import bpo_continuous_action
import ppo_atari_envpool as ppo
import ppo_continuous_action

ROOT = Path(bpo.__file__).parent
SCRIPTS = pytest.mark.parametrize("script", [bpo, ppo], ids=["bpo", "ppo"])
ACTIONS = 5
close = torch.testing.assert_close


def frames(size):
    return torch.randint(0, 256, (size, 84, 84, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_agent(script, **settings):
    torch.manual_seed(1)
    args = script.Args(device="cpu", **settings)
    agent = script.Agent(4, ACTIONS, args)
    with torch.no_grad():
        agent.policy[-1].weight *= 30  # away from the flat policy of a new network
    return args, agent


def make_batch(script, agent, obs, spread):
    """A minibatch of an older policy: ratios spread around 1."""
    old = copy.deepcopy(agent)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += spread * torch.randn_like(parameter)
        features = old.features(obs)
        policy, values = old(features), old.value(features)
        batch = dict(obs=obs, actions=policy.sample(), log_policy=policy.logits, values=values)
        batch |= dict(log_probs=policy.log_prob(batch["actions"]), returns=values + torch.randn_like(values) + 0.3)
        if script is bpo:
            batch["medians"] = old.median(features)
        return batch | {"moments": script.minibatch_moments(batch["returns"] - values)}


# --- the agent


@pytest.mark.parametrize("heads", ["linear", "mlp"])
@pytest.mark.parametrize("median", [None, "linear-head", "mlp-head", "none"])
def test_network_is_the_nature_cnn_with_heads(median, heads):
    """On images in [0, 1], channels first, layer by layer; None is PPO, which has no median."""
    _, agent = make_agent(bpo if median else ppo, heads=heads, **({"median_network": median} if median else {}))
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
    logits = head(list(agent.policy.parameters()), features)[1]
    close(agent(features).logits, logits.log_softmax(-1))
    assert values_input.shape == (3, {"linear": 512, "mlp": 256}[heads])
    if median == "none":
        assert agent.median is agent.value
    elif median:
        close(agent.median(features), head(list(agent.median[1].parameters()), values_input)[1][:, 0])
        assert len(list(agent.median[1].parameters())) == {"linear-head": 2, "mlp-head": 4}[median]


@SCRIPTS
def test_weights_are_orthogonal_and_the_first_policy_is_nearly_flat(script):
    agent = script.Agent(4, ACTIONS, script.Args(device="cpu"))
    layers = (agent.first, 2), (agent.convolutions[1], 2), (agent.dense[0], 2), (agent.policy[0], 1e-4)
    for layer, square in (*layers, (agent.value[0], 1)):
        weight = layer.weight.flatten(1)
        close(weight @ weight.T, square * torch.eye(len(weight)), atol=1e-4 * square, rtol=1e-4)
        assert not layer.bias.any()
    policy = agent(agent.features(frames(3))).probs
    close(policy, torch.full_like(policy, 1 / ACTIONS), atol=0.02, rtol=0)


@SCRIPTS
def test_a_saved_agent_acts_on_what_the_simulator_returns(script):
    _, agent = make_agent(script)
    obs = np.random.default_rng(0).integers(0, 256, (3, 4, 84, 84), dtype=np.uint8)
    policy = agent(agent.normalize(torch.from_numpy(obs)))
    close(policy.logits, agent(agent.features(torch.from_numpy(obs.transpose(0, 2, 3, 1)))).logits)
    close(policy.logits, agent(agent.normalize(torch.from_numpy(obs).float())).logits)  # as enjoy.py gives them
    assert agent.to_env(policy.mode).tolist() == policy.logits.argmax(-1).tolist()


@SCRIPTS
def test_bfloat16_computes_the_same_to_its_precision(script):
    exact, rough = (make_agent(script, bf16=bf16)[1].features(frames(8)) for bf16 in (False, True))
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


# --- the objective


@SCRIPTS
def test_moments_are_those_of_each_minibatch(script):
    advantages = torch.randn(3, 4, 50, dtype=torch.float64) * 7 + 2
    moments = script.minibatch_moments(advantages)
    assert moments.shape == (3, 4, 3) and moments.dtype == torch.float32
    expected = np.stack([advantages.mean(-1), advantages.abs().mean(-1), advantages.numpy().std(-1, ddof=1)], -1)
    np.testing.assert_allclose(moments, expected, rtol=1e-5)
    equal = script.minibatch_moments(torch.full((1, 50), 0.1))[0]
    assert equal[:2].tolist() == pytest.approx([0.1, 0.1]) and 0 <= equal[2] < 1e-6


def literal_bpo(args, agent, batch, ratio):
    low, high, returns, median = 1 - args.clip_coef, 1 + args.clip_coef, batch["returns"], agent.median(batch["obs"])
    values, medians, old = batch["values"], batch["medians"], returns - batch["values"]
    if args.recompute_advantages:
        values, medians = agent.value(batch["obs"]).detach(), median.detach()
    scale = old.std().item() if args.norm_adv else 1
    target = literal_target(returns - medians, low, high, scale * args.temperature)
    distance = (target - ratio).abs() * (returns - values).abs() / scale
    if args.divergence == "kl":
        distance = ratio * torch.log(ratio / target) - ratio + target
    loss, bound = distance.mean(), (target - 1) * (returns - medians) - (target - ratio).abs() * old.abs()
    if args.median_network != "none":
        width = scale * (args.temperature if args.median_temperature is None else args.median_temperature)
        loss = loss + args.median_coef * literal_median_loss(returns - median, low, high, width).mean()
    return loss, bound.mean().item()


def literal_ppo(args, agent, batch, ratio):
    advantage = batch["returns"] - batch["values"]
    if args.norm_adv:
        advantage = (advantage - advantage.mean()) / advantage.std()
    clipped = ratio.clip(1 - args.clip_coef, 1 + args.clip_coef)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean(), None


SETTINGS = [
    (bpo, literal_bpo, dict(temperature=0.5, ent_coef=0.1)),
    (bpo, literal_bpo, dict(norm_adv=True, temperature=0.3, median_temperature=None)),
    (bpo, literal_bpo, dict(recompute_advantages=True, norm_adv=True, median_network="mlp-head", heads="mlp")),
    (bpo, literal_bpo, dict(median_network="none", divergence="kl", temperature=0.7)),
    (ppo, literal_ppo, dict()),
    (ppo, literal_ppo, dict(norm_adv=False, clip_vloss=True, clip_coef=0.05)),
]


@pytest.mark.parametrize("script, literal, settings", SETTINGS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_objective_and_its_gradient_equal_the_literal_formulas(script, literal, settings):
    """On given features, in float64: the trunk is not what is tested here."""
    args, agent = make_agent(script, **settings)
    agent.features = lambda obs: obs
    batch = make_batch(script, agent.double(), torch.randn(48, 512, dtype=torch.float64) / 20, spread=0.3)
    policy, value = Categorical(logits=agent.policy(batch["obs"])), agent.value(batch["obs"])
    ratio = policy.log_prob(batch["actions"]).exp() / batch["log_probs"].exp()
    pg_loss, bound = literal(args, agent, batch, ratio)
    squares = (value - batch["returns"]) ** 2
    if args.clip_vloss:
        clipped = torch.clip(value, batch["values"] - args.clip_coef, batch["values"] + args.clip_coef)
        squares = torch.maximum(squares, (clipped - batch["returns"]) ** 2)
    expected = pg_loss + args.vf_coef * squares.mean() - args.ent_coef * policy.entropy().mean()
    loss, stats = script.minibatch_loss(agent, batch, args)
    close(loss, expected, rtol=1e-6, atol=1e-8)  # the moments are float32
    parameters = [*agent.policy.parameters(), *agent.value.parameters()]
    for gradient, wanted in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        close(gradient, wanted, rtol=1e-5, atol=1e-7)
    outside = ((ratio - 1).abs() > args.clip_coef).double()
    assert 0 < outside.sum() < 48, "the batch must have ratios within the bounds and beyond them"
    terms = {"clipfrac": outside.mean(), "approx_kl": (ratio - 1 - ratio.log()).mean()}
    terms |= {"entropy": policy.entropy().mean(), "value_loss": squares.mean()}
    terms["kl"] = kl_divergence(Categorical(logits=batch["log_policy"]), policy).mean()
    assert {name: stats[name].item() for name in terms} == pytest.approx({k: x.item() for k, x in terms.items()})
    measured = script.measure(agent, batch, args)
    assert measured["ratio/out_of_bounds"] == pytest.approx(stats["clipfrac"].item())
    if script is bpo and not args.recompute_advantages:  # the theory is about the advantages that acting had
        assert measured["theory/improvement_bound"] == pytest.approx(bound, rel=1e-5)


@SCRIPTS
def test_statistics_of_one_sample_are_finite(script):
    """Two processes have one each of a minibatch of two."""
    args, agent = make_agent(script, norm_adv=True)
    batch = make_batch(script, agent, frames(2), spread=0.005)
    one = {name: x if name == "moments" else x[:1] for name, x in batch.items()}
    assert np.isfinite(list(script.measure(agent, one, args).values())).all()


# --- the update


@SCRIPTS
@pytest.mark.parametrize("max_grad_norm", [0.01, 1e6])
def test_minibatch_gradient_is_autograd_and_clip_grad_norm(script, max_grad_norm):
    args, agent = make_agent(script, max_grad_norm=max_grad_norm)
    batch = make_batch(script, agent, frames(4), spread=0.005)
    gradient, stats = script.minibatch_gradient(script.minibatch_loss, agent, batch, args)
    parameters = list(agent.parameters())
    script.minibatch_loss(agent, batch, args)[0].backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    close(gradient, torch.cat([x.grad.flatten() for x in parameters]), rtol=1e-4, atol=1e-6)
    assert stats["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    assert not any(x.requires_grad for x in stats.values())


@pytest.mark.parametrize("script, bf16", [(bpo, False), (ppo, True)])
def test_loss_is_one_graph(script, bf16):
    """torch.compile traces all of it, forward and backward; inductor's own code is not what is tested here."""
    args, agent = make_agent(script, bf16=bf16)
    batch = make_batch(script, agent, frames(4), spread=0.005)
    graph = torch.compile(script.minibatch_loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (script.minibatch_loss, graph):
        loss, stats = function(agent, batch, args)
        results.append([loss, *torch.autograd.grad(loss, list(agent.parameters())), *stats.values()])
    close(*results, **(dict(rtol=0.05, atol=0.01) if bf16 else dict(rtol=1e-4, atol=1e-6)))


@SCRIPTS
def test_an_update_computes_on_one_device_and_waits_for_nothing(script, monkeypatch):
    """On a device without memory a tensor of the CPU is an error, and so is a number that the host asks for."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no such device
    args, agent = make_agent(script)
    batch = {name: x.to("meta") for name, x in make_batch(script, agent, frames(4), spread=0.005).items()}
    agent, order = agent.to("meta"), torch.zeros(2, 3, 4, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        agent.features(frames(2))
    moments = script.minibatch_moments((batch["returns"] - batch["values"])[order])
    minibatch = script.take(batch, order[1, 2], moments[1, 2])
    gradient, stats = script.minibatch_gradient(script.minibatch_loss, agent, minibatch, args)
    assert gradient.is_meta and all(x.is_meta for x in stats.values())


# --- several processes


def run_ranks(command, folder, until=lambda processes: None):
    """Runs a command as two processes of a group: the exit status and the output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ranks = [os.environ | group | dict(RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    processes = [subprocess.Popen(command, cwd=folder, env=env, **pipes) for env in ranks]
    until(processes)
    outputs = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


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
    half = {name: x.chunk(2)[bpo.RANK] for name, x in batch.items() if name != "moments"}
    half["moments"] = script.minibatch_moments(half["returns"] - half["values"])
    gradient, stats = script.minibatch_gradient(script.minibatch_loss, agent, half, args)
    results.append((half["moments"], gradient, stats["grad_norm"], script.average(stats["approx_kl"])))
games = [[(0, 5.0, 9), (2, 6.0, 9)], [(0, 7.0, 8), (1, 8.0, 8)]][bpo.RANK]
results.append(bpo.add_up(100, bpo.np.array([2, 1, 2]) + bpo.RANK, games))
torch.save(results, f"{sys.argv[2]}.{bpo.RANK}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does_on_the_same_data(tmp_path):
    """Gradients of halves whose own advantage moments differ from the whole's; steps and games in order."""
    cases, expected = [], []
    for name, settings in (("bpo", {"norm_adv": True, "temperature": 0.1}), ("ppo", {})):
        script, settings = {"bpo": bpo, "ppo": ppo}[name], settings | {"max_grad_norm": 0.05}
        args, agent = make_agent(script, **settings)
        batch = make_batch(script, agent, frames(12), spread=0.005)
        batch["returns"][:6] += 2
        batch["moments"] = script.minibatch_moments(batch["returns"] - batch["values"])
        gradient, stats = script.minibatch_gradient(script.minibatch_loss, agent, batch, args)
        assert gradient.norm().item() == pytest.approx(0.05, rel=1e-3)  # clipped, as one
        cases.append((name, settings, agent.state_dict(), batch))
        expected.append((batch["moments"], gradient, stats["grad_norm"], stats["approx_kl"]))
    torch.save(cases, tmp_path / "cases")
    ends = run_ranks([sys.executable, "-c", WORKER, str(ROOT), str(tmp_path / "cases")], tmp_path)
    assert [code for code, *_ in ends] == [0, 0], ends
    for rank in range(2):
        *results, added = torch.load(tmp_path / f"cases.{rank}", weights_only=False)
        close(results, expected, rtol=2e-4, atol=2e-6)
        assert added == (113, [(105, 5.0, 9), (105, 7.0, 8), (108, 8.0, 8), (113, 6.0, 9)])


# --- the siblings, and the scripts for continuous actions

SHARED = (
    "BadInput BrokenRun Run compute_gae load_run make_optimizer one_line policy_loss say value_loss write_atomically"
)
OWN_LINES = {
    ppo: "docstring Args ratio_bounds policy_loss minibatch_loss",
    bpo: "docstring Args ratio_bounds target_ratio policy_loss median_loss minibatch_loss measure_advantages distance "
    "Agent prepare measure",
}
OWN_OPTIONS = {
    ppo: "update_epochs clip_coef norm_adv ent_coef",
    bpo: "update_epochs clip_coef ratio_low ratio_high temperature median_temperature median_network median_coef "
    "divergence tv_coef recompute_advantages norm_adv ent_coef",
}


@pytest.mark.parametrize("ours, theirs", [(bpo, bpo_continuous_action), (ppo, ppo_continuous_action)])
def test_what_is_shared_with_the_continuous_script_is_the_same_text(ours, theirs):
    """So its tests, of formulas, folders and crashes, hold here too."""
    texts = []
    for script in (ours, theirs):
        lines, tree, _ = parse(script)
        nodes = [x for x in tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
        texts.append({x.name: "\n".join(lines[x.lineno - 1 : x.end_lineno]) for x in nodes})
    names = SHARED.split() + ("ratio_bounds target_ratio median_loss distance".split() if ours is bpo else [])
    assert not [name for name in names if texts[0][name] != texts[1][name]]


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
def test_every_option_has_a_help_text_and_functions_are_short(script, capsys):
    source = Path(script.__file__).read_text().split("class Args:")[1].split("    @model_validator")[0]
    texts = re.findall("# (.+)", source)
    assert len(texts) == len(script.dataclasses.fields(script.Args))
    with pytest.raises(SystemExit):
        script.read_args(["--help"])
    shown = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert not [text for text in texts if f" {text} (default: " not in shown]
    functions = [x for x in ast.walk(parse(script)[1]) if isinstance(x, ast.FunctionDef)]
    assert max(x.end_lineno - x.lineno for x in functions) < 60
