"""The functions of gbpo_llm.py and grpo_llm.py against literal formulas, and the likeness of the two."""

import json
import math
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

import pydantic
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import gbpo_llm as gbpo
import grpo_llm as grpo

ROOT = Path(gbpo.__file__).parent
SCRIPTS = pytest.mark.parametrize("script", [gbpo, grpo], ids=["gbpo", "grpo"])
OBJECTIVES = ["grpo", "dr_grpo", "dapo", "gspo", "sapo"]
quick = settings(max_examples=40, deadline=None, derandomize=True)
rewards_strategy = st.integers(2, 9).flatmap(
    lambda g: st.lists(st.lists(st.sampled_from([0, 0.1, 0.3, 1]), min_size=g, max_size=g), min_size=1, max_size=4)
)


@pytest.fixture(scope="module")
def tiny():
    """The built-in model without its supervised phase, and its tokenizer."""
    return gbpo.make_model(gbpo.Args(), torch.device("cpu"))


# --- advantages


def literal_deviation(group, scale):
    mean = sum(group) / len(group)
    squares = sum((x - mean) ** 2 for x in group)
    return {
        "unbiased": math.sqrt(squares / (len(group) - 1)) + 1e-6,
        "biased": math.sqrt(squares / len(group) + 1e-6),
        "none": 1.0,
    }[scale]


def literal_median(group):
    ordered, half = sorted(group), len(group) // 2
    return ordered[half] if len(group) % 2 else (ordered[half - 1] + ordered[half]) / 2


@SCRIPTS
@quick
@given(rewards_strategy, st.sampled_from(["unbiased", "biased", "none"]))
def test_group_advantages_are_deviations_from_mean_and_median(script, rewards, scale):
    """Even and odd groups, ties and equal rewards are all among the examples. GRPO has no median."""
    both = script.group_advantages(torch.tensor(rewards, dtype=torch.float64), scale=scale)
    advantages, median_advantages = (x.tolist() for x in (both if script is gbpo else (both, both)))
    for group, a, m in zip(rewards, advantages, median_advantages):
        deviation = literal_deviation(group, scale)
        if max(group) == min(group):
            assert a == m == [0.0] * len(group)
        else:
            assert a == pytest.approx([(x - sum(group) / len(group)) / deviation for x in group], abs=1e-9)
            centre = literal_median(group) if script is gbpo else sum(group) / len(group)
            assert m == pytest.approx([(x - centre) / deviation for x in group], abs=1e-9)
        assert sum(a) == pytest.approx(0, abs=1e-6)


@SCRIPTS
def test_equal_rewards_have_no_advantage_whatever_the_rounding_of_their_mean(script):
    rewards = torch.tensor([[0.7] * 7, [0.0] * 6 + [1.0]])
    assert rewards[0].mean() != rewards[0, 0], "the case must round"
    both = script.group_advantages(rewards)
    for advantages in both if script is gbpo else [both]:
        assert not advantages[0].any() and advantages[1].any()


def test_an_even_group_split_in_half_has_its_median_in_the_middle():
    _, median_advantages = gbpo.group_advantages(torch.tensor([[0.0, 0, 1, 1]]).double(), 0.5, "none")
    assert median_advantages.tolist() == [[-0.5, -0.5, 0.5, 0.5]]


def test_bounds_that_are_not_symmetric_compare_with_their_quantile():
    """Corollary 4.7 with bounds 0 and 4: the best quarter is above the baseline (the cross-entropy method)."""
    _, median_advantages = gbpo.group_advantages(torch.arange(9.0).double()[None], 0.75, "none")
    target = gbpo.target_ratio(median_advantages, 0.0, 4.0, 1e-4)
    assert target[0].round().tolist() == [0.0] * 6 + [1.0] + [4.0] * 2


@quick
@given(rewards_strategy, st.sampled_from([(0.8, 1.2), (0.0, 4.0), (0.5, 1.1)]), st.sampled_from([1e-4, 0.3]))
def test_over_the_exact_baseline_every_groups_targets_average_to_one(rewards, bounds, temperature):
    """Also as a minibatch holds them, in float32: Theorem 4.1 and Corollary 4.7."""
    assert gbpo.Args().baseline == "exact"
    args = gbpo.Args(baseline="exact", ratio_low=bounds[0], ratio_high=bounds[1], target_temperature=temperature)
    groups = [{"rewards": torch.tensor(group).double()} for group in rewards]
    kept = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gbpo, "make_minibatch", lambda model, reference, groups, args: kept.extend(groups))
        gbpo.make_minibatches(None, None, groups, args)
    for group in kept:
        assert group["targets"].float().mean().item() == pytest.approx(1, abs=1e-6)


def test_the_exact_target_of_0_1_rewards_takes_from_the_majority_what_the_minority_gets():
    advantages = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, 0.5, -1.5], [0.0, 0, 0, 0]]).double()
    target = gbpo.target_ratio(advantages - gbpo.exact_baseline(advantages, 0.8, 1.2, 1e-4), 0.8, 1.2, 1e-4)
    expected = [[1.2, *[1 - 0.2 / 3] * 3], [*[1 + 0.2 / 3] * 3, 0.8], [1.0] * 4]  # 1 - eps p / (1 - p) for a minority
    assert target.flatten().tolist() == pytest.approx(sum(expected, []), abs=1e-9)


@pytest.mark.parametrize("low, high", [(0.0, 1.45), (0.0, 2.9), (0.0, 3.7), (0.52, 1.35), (0.8, 1.2)])
def test_the_majority_is_held_at_a_ratio_of_exactly_one(low, high, monkeypatch):
    """In float32, too, and whatever the bounds: at ratio 1 the majority's share of the loss is 0, not a rounding."""
    args = gbpo.Args(baseline="median", ratio_low=low, ratio_high=high)
    kept = []
    monkeypatch.setattr(gbpo, "make_minibatch", lambda model, reference, groups, args: kept.extend(groups))
    gbpo.make_minibatches(None, None, [{"rewards": torch.tensor([1.0] * 19 + [0.0]).double()}], args)
    log_probs = torch.full((1, 3), -0.5, requires_grad=True)
    monkeypatch.setattr(gbpo, "token_log_probs", lambda *_: (log_probs, torch.zeros(1, 3, 1)))
    batch = {"mask": torch.ones(1, 3), "weights": torch.ones(1, 3), "tokens": 3.0, "old_log_probs": log_probs.detach()}
    batch |= {"advantages": torch.ones(1), "targets": kept[0]["targets"][:1].float()}
    loss, _, ratios = gbpo.minibatch_loss(None, batch, args)
    assert (ratios == 1).all() and loss == 0 and loss.dtype == torch.float32


# --- objectives


def random_batch(seed, args, rows=6, length=5):
    """A micro-batch in float64 with padding, ratios on both sides of the bounds, and every kind of advantage."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 3
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).double()
    old = log_probs + 0.4 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    reference = log_probs + 0.3 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.3, -0.7, 0.0, 0.2, -1.1, 2.0]).double()
    medians = torch.tensor([1e-4, -2e-4, 0.0, 0.5, -0.5, 5e-5]).double()
    batch = {"mask": mask, "old_log_probs": old, "ref_log_probs": reference, "tokens": mask.sum().item() + 4}
    of_all = torch.randn(rows, length, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    args = args if isinstance(args, gbpo.Args) else gbpo.Args()
    batch["targets"] = gbpo.target_ratio(medians, *gbpo.ratio_bounds(args), args.target_temperature)
    return log_probs.requires_grad_(), of_all, batch | {"advantages": advantages, "median_advantages": medians}


def literal_objective(log_probs, entropy, batch, args, objective, responses):
    """The loss, token by token, from the paper (GBPO) or the alignment text (all else)."""
    loss = 0.0
    for i in range(len(log_probs)):
        length = int(batch["mask"][i].sum())
        advantage, median = batch["advantages"][i].item(), batch["median_advantages"][i].item()
        log_ratios = [log_probs[i, t] - batch["old_log_probs"][i, t] for t in range(length)]
        low = 1 - args.clip_coef if args.ratio_low is None else args.ratio_low
        wide = 1.4 if objective == "dapo" else 1
        high = 1 + wide * args.clip_coef if args.ratio_high is None else args.ratio_high
        for t in range(length):
            ratio = torch.exp(log_ratios[t])
            if objective == "gspo":
                ratio = torch.exp(sum(log_ratios) / length)  # Eq. 107
            if objective == "gbpo" and args.ratio_low is args.ratio_high is None:  # section 4.5
                target = 1 + args.clip_coef * math.tanh(median / (2 * args.target_temperature))
                term = abs(target - ratio) * (abs(advantage) + args.tv_coef)
            elif objective == "gbpo":  # Corollary 4.7
                odds = (high - 1) / (1 - low) * math.exp(-median / args.target_temperature)
                term = abs(low + (high - low) / (1 + odds) - ratio) * (abs(advantage) + args.tv_coef)
            elif objective == "sapo":  # Eq. 117, 118
                tau = args.tau_pos if advantage > 0 else args.tau_neg
                term = -4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * advantage
            else:  # Eq. 96, 99, 101, 109
                term = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
            if args.kl_coef:
                difference = batch["ref_log_probs"][i, t] - log_probs[i, t]
                term = term + args.kl_coef * (torch.exp(difference) - difference - 1)
            term = term - args.ent_coef * entropy[i, t]
            aggregation = {"dapo": "token", "dr_grpo": "constant"}.get(objective, "response")
            aggregation = args.aggregation if objective == "gbpo" else aggregation
            divisor = {"response": length * responses, "token": batch["tokens"]}
            loss = loss + term / divisor.get(aggregation, responses * args.max_completion_length)
    return loss


CASES = [("gbpo", x) for x in ({}, {"aggregation": "token"}, {"aggregation": "constant", "clip_coef": 0.5})]
CASES += [("gbpo", {"target_temperature": 0.3, "tv_coef": 0.2}), ("gbpo", {"kl_coef": 0.1, "ent_coef": 0.01})]
CASES += [
    ("gbpo", x | {"target_temperature": 0.1}) for x in ({"ratio_low": 0.0, "ratio_high": 4.0}, {"ratio_low": 0.7})
]
CASES += [(x, {}) for x in OBJECTIVES] + [(x, {"kl_coef": 0.1, "ent_coef": 0.01, "clip_coef": 0.4}) for x in OBJECTIVES]
CASES += [("dapo", {"ratio_low": 0.9, "ratio_high": 1.1}), ("sapo", {"tau_pos": 2.0, "tau_neg": 5.0})]


@pytest.mark.parametrize("objective, overrides", CASES, ids=str)
def test_objective_and_its_gradient_equal_the_literal_formulas(objective, overrides, monkeypatch):
    script = gbpo if objective == "gbpo" else grpo
    own = {} if objective == "gbpo" else {"objective": objective}
    args = script.Args(**own, **overrides, max_completion_length=7)
    for seed in range(3):
        log_probs, of_all, batch = random_batch(seed, args)
        entropy = torch.distributions.Categorical(logits=of_all).entropy()
        aggregation = args.aggregation if objective == "gbpo" else script.AGGREGATIONS[objective]
        batch["weights"] = script.token_weights(batch["mask"], aggregation, 9, batch["tokens"], 7)
        monkeypatch.setattr(script, "token_log_probs", lambda *_, x=(log_probs, of_all): x)
        loss, stats, ratios = script.minibatch_loss(None, batch, args)
        expected = literal_objective(log_probs, entropy, batch, args, objective, 9)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        gradient, wanted = (torch.autograd.grad(x, log_probs)[0] for x in (loss, expected))
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
        assert gradient.abs().sum() > 0 and not gradient[batch["mask"] == 0].any()
        low, high = script.ratio_bounds(args)
        ratio = (log_probs - batch["old_log_probs"]).exp()[batch["mask"] > 0]
        assert torch.equal(ratios[batch["mask"] > 0], ratio)
        if objective == "gspo":  # of the 9 responses, each of which has one ratio
            means = [x[m > 0].mean().exp() for x, m in zip(log_probs - batch["old_log_probs"], batch["mask"])]
            outside, of = sum(not low <= x <= high for x in means), 9
        else:
            outside, of = ((ratio < low) | (ratio > high)).sum().item(), batch["tokens"]
        assert 0 < outside or high > 3 or objective == "gspo"
        assert stats["clip_ratio/region_mean"].item() == pytest.approx(outside / of)
        assert stats["entropy"].item() == pytest.approx((entropy * batch["mask"]).sum().item() / batch["tokens"])
        kl = (ratio - 1 - ratio.log()).sum().item() / batch["tokens"]
        assert stats["losses/approx_kl"].item() == pytest.approx(kl)


@SCRIPTS
def test_a_token_that_the_old_policy_all_but_excluded_leaves_the_loss_finite(script, monkeypatch):
    log_probs, of_all, batch = random_batch(0, None)
    batch["old_log_probs"] = log_probs.detach() - 800  # a ratio of exp(800) would be inf
    batch["weights"] = script.token_weights(batch["mask"], "token", 9, batch["tokens"], 7)
    monkeypatch.setattr(script, "token_log_probs", lambda *_: (log_probs, of_all))
    loss, stats, ratios = script.minibatch_loss(None, batch, script.Args(max_completion_length=7))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert all(x.isfinite().all() for x in (loss, gradient, ratios, *stats.values()))


@SCRIPTS
def test_the_kl_estimate_is_clamped_as_in_verl(script, monkeypatch):
    """Log-ratios to +-20, the estimate to 10: a peaked model's exp(90) would be the only thing learned."""
    log_probs = torch.tensor([[-95.0, -1.0, -0.5]], requires_grad=True)
    batch = {"mask": torch.ones(1, 3), "weights": torch.ones(1, 3) / 3, "tokens": 3.0}
    batch |= {"old_log_probs": log_probs.detach(), "ref_log_probs": torch.tensor([[-0.1, -0.5, -95.0]])}
    batch |= {"advantages": torch.zeros(1), "targets": torch.ones(1)}
    monkeypatch.setattr(script, "token_log_probs", lambda *_: (log_probs, torch.zeros(1, 3, 1)))
    loss, stats, _ = script.minibatch_loss(None, batch, script.Args(kl_coef=1.0))
    expected = (10 + (math.exp(0.5) - 0.5 - 1) + 10) / 3  # the last: exp(-20) + 20 - 1, clamped
    assert stats["kl"].item() == pytest.approx(expected) and loss.item() == pytest.approx(expected)
    assert torch.autograd.grad(loss, log_probs)[0].isfinite().all()


@SCRIPTS
@pytest.mark.parametrize("ent_coef", [0.0, 0.01])
def test_tokens_that_a_model_excludes_leave_loss_and_gradient_finite(script, ent_coef):
    """A logit of -inf, here of the token that pads: 0 times infinity is NaN."""
    args = script.Args(num_prompts=2, minibatch_prompts=2, group_size=3, kl_coef=0.1, ent_coef=ent_coef)
    model, _ = script.make_model(args, torch.device("cpu"))
    model.lm_head.register_forward_hook(lambda _, __, x: x.index_fill(-1, torch.tensor([0]), -math.inf))
    ((batch,),) = script.make_minibatches(model, model, new_groups(script, args), args)
    assert (batch["mask"] == 0).any()
    loss, stats, ratios = script.minibatch_loss(model, batch, args)
    loss.backward()
    assert all(x.isfinite().all() for x in (loss, ratios, *stats.values())) and stats["entropy"] > 0
    assert all(x.grad.isfinite().all() for x in model.parameters())


def test_sapo_gate_is_sech_squared():
    """Eq. 120, which lost a sech^2 in print: the derivative of the gate is 4 s (1 - s) = sech^2(tau (r - 1) / 2)."""
    args = grpo.Args(objective="sapo", tau_pos=3.0)
    ratio = torch.linspace(0.2, 3, 30, dtype=torch.float64, requires_grad=True)
    loss = grpo.sapo_loss(ratio.log()[:, None], torch.ones(30, 1).double(), torch.ones(30, 1).double(), args)
    gradient = torch.autograd.grad(-loss.sum(), ratio)[0]
    torch.testing.assert_close(gradient, 1 / torch.cosh(3 * (ratio.detach() - 1) / 2) ** 2)


RECORDED = json.loads((ROOT / "tests" / "trl_losses.json").read_text())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_equal_those_of_trl(objective, monkeypatch):
    """Recorded from TRL by tests/record_trl_losses.py: loss and gradient."""
    inputs, recorded = RECORDED["inputs"], RECORDED["losses"][objective]
    tensors = {name: torch.tensor(x, dtype=torch.float64) for name, x in inputs.items()}
    args = grpo.Args(objective=objective, ratio_high=RECORDED["high"], ratio_low=RECORDED["low"], kl_coef=0.05)
    log_probs, mask = tensors["log_probs"].requires_grad_(), tensors["mask"]
    batch = {"mask": mask, "tokens": mask.sum().item(), "advantages": tensors["advantages"]}
    batch |= {"old_log_probs": tensors["old_log_probs"], "ref_log_probs": tensors["ref_log_probs"]}
    counts = len(mask), mask.sum().item(), RECORDED["max_completion_length"]
    batch["weights"] = grpo.token_weights(mask, grpo.AGGREGATIONS[objective], *counts)
    monkeypatch.setattr(grpo, "token_log_probs", lambda *_: (log_probs, torch.zeros(*log_probs.shape, 1)))
    loss, *_ = grpo.minibatch_loss(None, batch, args)
    assert loss.item() == pytest.approx(recorded["loss"], rel=1e-5)
    gradient = torch.autograd.grad(loss, log_probs)[0]
    torch.testing.assert_close(gradient, torch.tensor(recorded["gradient"]).double(), rtol=1e-5, atol=1e-8)


@SCRIPTS
def test_metrics_describe_votes_groups_and_the_ratios_on_each_side_of_one(script):
    """Three completions vote, the first two are trained on; where no truth is known a statistic is NaN."""
    rewards, nan = torch.tensor([[1.0, 1, 0], [0, 1, 1]]).double(), math.nan
    stats = {"reward": rewards, "length": torch.tensor([[1.0, 2, 6], [3, 3, 3]]), "ttrl/x": torch.tensor([nan, 0.5])}
    ratios = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5])
    metrics = script.measure(stats, ratios, script.Args(group_size=2, clip_coef=0.4))
    expected = {"reward": 4 / 6, "reward_std": 0.5**0.5 / 2, "frac_reward_zero_std": 0.5, "ttrl/x": 0.5}
    expected |= {"completions/mean_length": 3, "completions/max_length": 6, "ratio/max": 1.5, "ratio/min": 0.5}
    expected |= {"ratio/out_of_bounds": 2 / 5, "ratio/high_mean": 1.2, "ratio/low_mean": 0.8}
    expected |= {"ratio/high_std": 0.2160247, "ratio/low_std": 0.2160247}
    assert metrics == pytest.approx(expected)
    nothing = script.measure(stats, torch.ones(0), script.Args(group_size=2))
    assert nothing["ratio/max"] == nothing["ratio/low_mean"] == 1 and nothing["ratio/out_of_bounds"] == 0


# --- log-probabilities


PROMPTS = [[5, 6, 12, 7, 13], [9, 12, 4, 13], [3, 3, 12, 8, 8, 13]]
COMPLETIONS = [[4, 5, 1], [7, 1], [2, 3, 4, 1]]


@SCRIPTS
@pytest.mark.parametrize("prompts", [PROMPTS, [x[-4:] for x in PROMPTS]], ids=["left and right", "right"])
def test_padding_on_either_side_changes_nothing(script, tiny, prompts):
    """Each row of a padded batch has the log-probabilities and entropies of the row alone, at temperature 0.7.

    Attention gets no mask where padding on the right is all there is: its kernels for causal attention are faster.
    """
    model, _ = tiny
    batch, masks = script.collate(prompts, COMPLETIONS, "cpu"), []
    if prompts is PROMPTS:
        assert batch["ids"].shape == (3, 10) and batch["ids"][1].tolist() == [0, 0, 9, 12, 4, 13, 7, 1, 0, 0]
    attention = model.model.layers[0].self_attn
    hook = attention.register_forward_pre_hook(lambda _, __, x: masks.append(x["attention_mask"]), with_kwargs=True)
    with torch.no_grad():
        log_probs, of_all = script.token_log_probs(model, batch, 0.7)
        hook.remove()
        assert (masks[0] is None) == (prompts is not PROMPTS)
        for i, (prompt, completion) in enumerate(zip(prompts, COMPLETIONS)):
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = [logits[t].log_softmax(-1)[token].item() for t, token in enumerate(completion)]
            assert log_probs[i, : len(completion)].tolist() == pytest.approx(expected, abs=1e-5)
            torch.testing.assert_close(of_all[i, : len(completion)], logits.log_softmax(-1), rtol=1e-4, atol=1e-5)
            assert batch["mask"][i].tolist() == [1.0] * len(completion) + [0.0] * (4 - len(completion))


def test_a_padding_token_within_a_completion_counts(tiny):
    """Masks come from lengths, never from token numbers: a sampled <pad> is a token like any other."""
    batch = gbpo.collate([[5, 13]], [[0, 0, 1]], "cpu")
    assert batch["mask"].tolist() == [[1, 1, 1]] and batch["attention_mask"].tolist() == [[1] * 5]


def new_groups(script, args, seed=0):
    """Groups as rollout makes them, with completions of different lengths and both rewards in each group."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for i in range(args.num_prompts):
        lengths = torch.randint(1, 5, (args.group_size,), generator=generator).tolist()
        completions = [[*torch.randint(2, 14, (n - 1,), generator=generator).tolist(), 1] for n in lengths]  # <eos>
        rewards = (torch.arange(args.group_size) % 3 == 0).double()
        group = {"problem": {"ids": PROMPTS[i % 3]}, "completions": completions, "rewards": rewards}
        groups.append(
            group | {"log_probs": [None] * args.group_size, "truncated": (torch.tensor(lengths) == 4).double()}
        )
    return groups


@SCRIPTS
@pytest.mark.parametrize(
    "overrides", [{"sampling_temperature": 0.7}, {"micro_batch_tokens": 60}, {"gradient_checkpointing": True}], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_ratios_are_exactly_one(script, overrides, dtype):
    """Old and new log-probabilities are equal bit for bit, so what GBPO's target leaves at 1 gets no gradient."""
    args = script.Args(num_prompts=4, minibatch_prompts=2, group_size=5, dtype=dtype, **overrides)
    model, _ = script.make_model(args, torch.device("cpu"))
    minibatches = script.make_minibatches(model, None, new_groups(script, args), args)
    assert len(minibatches) == 2 and len(minibatches[0]) > bool(args.micro_batch_tokens < 100)
    for batch in (x for minibatch in minibatches for x in minibatch):
        log_probs, _ = script.token_log_probs(model, batch, args.sampling_temperature)
        assert log_probs.requires_grad and torch.equal(log_probs, batch["old_log_probs"])
        _, stats, ratios = script.minibatch_loss(model, batch, args)
        assert (ratios == 1).all() and stats["losses/approx_kl"] == 0 and stats["clip_ratio/region_mean"] == 0


@SCRIPTS
def test_gradient_checkpointing_computes_twice_and_changes_no_gradient(script):
    results = []
    for checkpointing in (False, True):
        args = script.Args(num_prompts=2, minibatch_prompts=2, group_size=4, gradient_checkpointing=checkpointing)
        model, _ = script.make_model(args, torch.device("cpu"))
        ((batch,),) = script.make_minibatches(model, None, new_groups(script, args), args)
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, x=calls: x.append(1))
        script.minibatch_loss(model, batch, args)[0].backward()
        results.append((len(calls), torch.cat([x.grad.flatten() for x in model.parameters()])))
    assert [calls for calls, _ in results] == [1, 2] and torch.equal(results[0][1], results[1][1])


@SCRIPTS
def test_a_model_without_layers_to_recompute_is_bad_input(script, monkeypatch):
    monkeypatch.setattr(script, "GradientCheckpointingLayer", torch.nn.Conv3d)
    with pytest.raises(script.BadInput, match="leave out --gradient-checkpointing"):
        script.make_model(script.Args(gradient_checkpointing=True), torch.device("cpu"))


@SCRIPTS
def test_each_completion_is_learned_with_the_advantage_of_its_reward_in_its_group(script):
    args = script.Args(num_prompts=4, minibatch_prompts=2, group_size=5, micro_batch_tokens=60)
    model, _ = script.make_model(args, torch.device("cpu"))
    groups = new_groups(script, args)
    for k, group in enumerate(groups):
        group["rewards"] = torch.tensor([0.0, 1, 1, 0, 0]).roll(k).double() * (k + 1)
    for k, minibatch in enumerate(script.make_minibatches(model, None, groups, args)):
        found, expected, weights = [], [], 0.0
        for batch in minibatch:
            weights += batch["weights"].sum().item()
            for row, advantage in enumerate(batch["advantages"].tolist()):
                found.append((batch["ids"][row][batch["attention_mask"][row] > 0].tolist(), pytest.approx(advantage)))
                length = int(batch["mask"][row].sum())  # the end-of-sequence token is learned, too
                assert (batch["weights"][row, :length] > 0).all() and found[-1][0][-length - 1] == 13
        for group in groups[2 * k : 2 * k + 2]:
            both = script.group_advantages(group["rewards"][None])
            advantages = (both[0] if script is gbpo else both)[0].tolist()
            expected += [(group["problem"]["ids"] + x, a) for x, a in zip(group["completions"], advantages)]
        assert sorted(expected) == sorted(found, key=lambda x: (x[0], x[1].expected))
        assert weights == pytest.approx(1)  # a mean over tokens, then over responses, or over all tokens


@SCRIPTS
@pytest.mark.parametrize("overrides", [{}, {"mask_truncated": True}], ids=str)
def test_micro_batches_add_up_to_the_minibatch(script, overrides):
    """Loss and gradient do not depend on how a minibatch is cut, and truncated completions can be left out."""
    results = []
    for budget in (100_000, 40):
        args = script.Args(num_prompts=3, minibatch_prompts=3, group_size=4, micro_batch_tokens=budget, **overrides)
        model, _ = script.make_model(args, torch.device("cpu"))
        (minibatch,) = script.make_minibatches(model, None, new_groups(script, args), args)
        total = 0.0
        for batch in minibatch:
            batch["old_log_probs"] = batch["old_log_probs"] - 0.1  # away from the kink at ratio 1
            loss, *_ = script.minibatch_loss(model, batch, args)
            loss.backward()
            total += loss.item()
        norms = torch.cat([x.grad.flatten() for x in model.parameters()])
        results.append((len(minibatch), total, norms))
        tokens = sum(batch["mask"].sum().item() for batch in minibatch)
        lengths = [len(c) for group in new_groups(script, args) for c in group["completions"]]
        assert tokens == sum(x for x in lengths if x < 4 or not args.mask_truncated) == minibatch[0]["tokens"]
    assert results[0][0] == 1 < results[1][0]
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-3, atol=1e-5)


@quick
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=20), st.integers(1, 99))
def test_pack_keeps_every_row_once_and_the_budget(sizes, budget):
    prompts, completions = ([[0] * n for n in x] for x in zip(*sizes))
    parts = gbpo.pack(prompts, completions, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    for part in parts:
        longest = max(sizes[i][0] for i in part) + max(sizes[i][1] for i in part)
        assert len(part) == 1 or len(part) * longest <= budget


# --- generation


def literal_generation(model, prompt, uniforms, temperature, top_p, stop):
    """One completion without a cache or a batch: the first token whose cumulative probability exceeds the noise."""
    tokens = []
    for u in uniforms.tolist():
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, -1].double() / temperature
        probs = dict(enumerate(logits.softmax(-1).tolist()))
        order = sorted(probs, key=probs.get, reverse=True) if top_p < 1 else list(probs)
        if top_p < 1:
            kept, mass = [], 0.0
            for token in order:
                if mass < top_p:
                    kept.append(token)
                mass += probs[token]
            order = kept
        target, mass = u * sum(probs[x] for x in order), 0.0
        for token in order:
            mass += probs[token]
            if mass > target:
                break
        tokens.append(token)
        if token in stop:
            break
    return tokens


@SCRIPTS
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 0.9)])
def test_generation_with_a_cache_equals_generation_without(script, tiny, temperature, top_p):
    model, _ = tiny
    uniforms, stop = torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(3)), [1, 7]
    expected = [
        literal_generation(model, prompt, noise, temperature, top_p, stop)
        for prompt, group in zip(PROMPTS, uniforms)
        for noise in group
    ]
    assert len({len(x) for x in expected}) > 2, "completions must end at different times"
    for batch_size in (1, 8, 100):
        assert script.generate(model, PROMPTS, uniforms, stop, temperature, top_p, batch_size) == expected


@SCRIPTS
def test_a_model_that_cannot_be_trained_is_bad_input(script, tiny, tmp_path):
    """Without a head, which transformers would draw at random; without a key-value cache."""
    config = transformers.Qwen2Config(
        vocab_size=14, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    mamba = transformers.MambaConfig(vocab_size=14, hidden_size=8, num_hidden_layers=1)
    for name, model, words in (
        (
            "headless",
            transformers.Qwen2Model(config),
            "headless is no whole language model: it has no weights for lm_head",
        ),
        ("mamba", transformers.MambaForCausalLM(mamba), "keeps no key-value cache"),
    ):
        model.save_pretrained(tmp_path / name)
        tiny[1].save_pretrained(tmp_path / name)
        with pytest.raises(script.BadInput, match=words):
            script.make_model(script.Args(model=str(tmp_path / name)), torch.device("cpu"))


def test_sampled_tokens_follow_the_probabilities():
    logits = torch.tensor([2.0, 0.0, 1.0, -50.0, 1.5]).expand(20_000, 5)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for temperature, top_p, kept in ((1.0, 1.0, [0, 1, 2, 4]), (0.5, 1.0, [0, 1, 2, 4]), (1.0, 0.7, [0, 4])):
        counts = torch.bincount(gbpo.sample_tokens(logits, uniforms, temperature, top_p), minlength=5)
        probs = torch.zeros(5).index_copy(0, torch.tensor(kept), logits[0, kept].div(temperature).softmax(0))
        assert ((counts / 20_000 - probs).abs() < 0.012).all()
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert gbpo.sample_tokens(logits[:2], edges, 1.0, 1.0).tolist() == [0, 4]


@quick
@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 20))
def test_draw_goes_through_all_problems_in_each_epoch(size, first, count):
    whole = gbpo.draw(size, 0, first + count, 3).tolist()
    assert gbpo.draw(size, first, count, 3).tolist() == whole[first:]
    for epoch in range(len(whole) // size):
        assert sorted(whole[epoch * size : (epoch + 1) * size]) == list(range(size))


# --- rewards


@pytest.mark.parametrize(
    "text, number",
    [("142", 142), ("142.0", 142), (" -7 ", -7), ("+3", 3), ("1,234,567", 1234567), ("0.50", Fraction(1, 2))]
    + [("3/4", Fraction(3, 4)), ("\\frac{3}{4}", Fraction(3, 4)), ("-\\dfrac{6}{8}", Fraction(-3, 4)), ("$12$", 12)]
    + [("007", 7), ("5.", 5), (".5", Fraction(1, 2)), ("-.25", Fraction(-1, 4))]
    + [(x, None) for x in (".", "-.", "..5", "1,.5", "./2")]
    + [(x, None) for x in ("", "x", "1e9", "1_000", "12,34", "--1", "1/0", "\\frac{1}{0}", "0x10", "nan", "inf", "1 2")]
    + [("１２", 12)]
    + [(x, None) for x in ("٣", "²", "1/2/3", "1.2.3", "__import__('os')", "9**9**9", "\\frac{1}{2", "½")],
)
def test_parse_number(text, number):
    assert gbpo.parse_number(text) == number


@quick
@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_numbers_are_read_as_they_are_written(integer, decimals):
    value = Fraction(integer, 10**decimals)
    digits = f"{abs(integer):0{decimals + 1}d}"
    sign = "-" if integer < 0 else ""
    text = sign + (f"{digits[:-decimals]}.{digits[-decimals:]}" if decimals else digits)
    assert gbpo.parse_number(text) == value and gbpo.parse_number(str(value)) == value
    assert gbpo.parse_number(f"{integer:,}") == integer


@quick
@given(st.text(max_size=60))
def test_any_text_is_a_number_or_none(text):
    assert gbpo.parse_number(text) is None or isinstance(gbpo.parse_number(text), Fraction)
    for reward in ("exact", "boxed", "majority"):
        gbpo.extract_answer(text, reward)


@pytest.mark.parametrize(
    "text, answer",
    [("so \\boxed{42}.", 42), ("\\boxed{1} then \\boxed{2}", 2), ("\\boxed{\\frac{1}{2}}", Fraction(1, 2))]
    + [("42", None), ("\\boxed{42", None), ("\\boxed{}", None), ("\\boxed{x=4}", 4), ("\\boxed{{{4}}", None)],
)
def test_the_last_box_is_the_answer(text, answer):
    assert gbpo.extract_answer(text, "boxed") == answer


ABSURD = ["9" * 10**6, "\\boxed{" + "9" * 10**6 + "}", "\\boxed{" * 10**5, "{" * 10**6, "\\boxed{" + "{" * 10**6]
ABSURD += ["\\boxed{1/0}", "1/0", "1" + ",000" * 10**5, "\\boxed{" + "٣" * 50 + "}", "-" * 10**6, " " * 10**6 + "1"]
ABSURD += ["\\frac{" * 10**5, "1e999999999", "\\boxed{1e999999999}", "\0" * 10**6, "9" * 41, "0." + "1" * 10**6]


def test_absurd_completions_cost_milliseconds_and_earn_nothing():
    for reward in ("exact", "boxed", "majority"):
        for text in ABSURD:
            start = time.perf_counter()
            group = {"problem": {"answer": Fraction(3)}, "texts": [text]}
            rewards = gbpo.true_rewards([group], gbpo.Args(reward=reward))
            assert rewards.item() == 0 and time.perf_counter() - start < 0.05, text[:20]


@SCRIPTS
def test_majority_vote(script):
    assert script.majority_vote([None, 3, 2, 2, 3, None, None]) == 3  # a tie: the earliest
    assert script.majority_vote([None, None]) is None and script.majority_vote([]) is None


def test_majority_rewards_and_their_accuracy():
    truths = [Fraction(5), Fraction(7), Fraction(1), None]
    texts = [["5", "\\boxed{5}", "4", "x"], ["8", "8", "7", "8"], ["?", "", "1/0", "\\boxed{}"], ["3", "?", "3", "3"]]
    groups = [{"problem": {"answer": truth}, "texts": group} for truth, group in zip(truths, texts)]
    rewards, stats = gbpo.majority_rewards(groups, gbpo.Args(reward="majority"))
    assert rewards.tolist() == [[1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]]
    assert stats["ttrl/label_accuracy"].tolist() == pytest.approx([1, 0, 0, math.nan], nan_ok=True)
    assert stats["ttrl/majority_ratio"].tolist() == [0.5, 0.75, 0, 0.75]
    assert stats["ttrl/ground_truth_ratio"].tolist() == pytest.approx([0.5, 0.25, 0, math.nan], nan_ok=True)


@SCRIPTS
def test_votes_need_no_answers_but_evaluations_do(script, tiny, tmp_path):
    rows = [{"prompt": "1+1="}, {"prompt": "2+2=", "answer": "4"}, {"prompt": "3+\ud800=", "answer": "4"}]
    args = script.Args(model="x", dataset=write_rows(tmp_path / "x.json", rows), reward="majority")
    train, held_out = script.make_problems(args, tiny[1])
    assert [x["row"] for x in train] == rows[:2] and [x["row"] for x in held_out] == rows[1:2]
    assert len(script.make_problems(script.Args(model="x", dataset=args.dataset), tiny[1])[0]) == 1
    args.dataset = write_rows(tmp_path / "y.json", rows[:1])
    with pytest.raises(script.BadInput, match="y.json has no answers to evaluate with: pass --eval-dataset"):
        script.make_problems(args, tiny[1])
    args.eval_dataset = write_rows(tmp_path / "z.json", rows[1:2])
    assert [len(x) for x in script.make_problems(args, tiny[1])] == [1, 1]


SUM = {"prompt": "1+1=", "row": {"prompt": "1+1=", "answer": "2"}}
SUMS = [{"problem": SUM, "texts": ["2", "3"], "completions": [[4, 1], [5, 1]]}]


def with_functions(script, monkeypatch, **functions):
    monkeypatch.setattr(script, "load_function", functions.get)


@SCRIPTS
@pytest.mark.parametrize(
    "rewards", [[1.0], [1.0] * 3, [0.0, math.nan], [math.inf, 0], None, ["a", 1], 7, [[1], [2]], [10**400, 0]]
)
def test_a_reward_function_must_return_a_finite_number_for_each_completion(script, rewards, monkeypatch):
    with_functions(script, monkeypatch, f=lambda **_: rewards, g=lambda **_: iter([True, 0.5]))
    with pytest.raises(script.BrokenRun, match="f must return 2 finite numbers or None"):
        script.true_rewards(SUMS, script.Args(reward_fn=("f",)))
    assert script.true_rewards(SUMS, script.Args(reward_fn=("g",))).tolist() == [[1.0, 0.5]]


@SCRIPTS
def test_rewards_of_several_functions_are_weighted_and_none_does_not_apply(script, monkeypatch):
    async def waits(completions, **_):
        return [float(x) for x in completions]

    with_functions(script, monkeypatch, f=lambda **_: [None, 1.0], g=waits)
    args = script.Args(reward_fn=("f", "g"), reward_weights=(0.5, 2.0))
    assert script.true_rewards(SUMS, args).tolist() == [[4.0, 6.5]]
    assert script.true_rewards(SUMS, script.Args(reward_fn=("f", "g"))).tolist() == [[2.0, 4.0]]
    with pytest.raises(script.BrokenRun, match="a completion has no reward: every --reward-fn returned None"):
        script.true_rewards(SUMS, script.Args(reward_fn=("f",)))
    with pytest.raises(pydantic.ValidationError, match="a number for each --reward-fn"):
        script.Args(reward_fn=("f", "g"), reward_weights=(1.0,))


@SCRIPTS
def test_what_a_reward_function_raises_is_one_message_with_its_name_and_place(script, monkeypatch):
    def broken(**_):
        return json.loads("{")

    with_functions(script, monkeypatch, f=broken)
    with pytest.raises(script.BrokenRun, match=r"^--reward-fn f: JSONDecodeError: .*decoder.py, line \d+\)$"):
        script.true_rewards(SUMS, script.Args(reward_fn=("f",)))


@SCRIPTS
def test_a_function_that_wants_what_it_is_not_passed_is_refused_before_the_run(script, monkeypatch):
    def good(prompts, completions, answer, **_):
        return 1.0

    def other(completions, trainer_state, **_):
        return 1.0

    with_functions(script, monkeypatch, f=good, g=other, h=len)
    script.check_functions([SUM], script.Args(reward_fn=("f",)))
    passed = "it is passed answer, completion_ids, completions, prompts$"
    for names, fault in ((("f", "g"), "g: missing a required .*'trainer_state'; "), (("h",), "h: missing .*; ")):
        with pytest.raises(script.BadInput, match=f"^--reward-fn {fault}{passed}"):
            script.check_functions([SUM], script.Args(reward_fn=names))


@SCRIPTS
def test_completions_of_chats_are_messages_and_columns_and_tokens_come_along(script):
    chat = {"prompt": [{"role": "user", "content": "1+1"}], "row": {"id": 7, "completion": "no", "prompts": "no"}}
    group = {"problem": chat, "texts": ["2"], "completions": [[4, 1]]}
    assert script.reward_keywords([*SUMS, group]) == {
        "prompts": ["1+1=", "1+1=", chat["prompt"]],
        "completions": ["2", "3", [{"role": "assistant", "content": "2"}]],
        "completion_ids": [[4, 1], [5, 1], [4, 1]],
        "answer": ["2", "2", None],
        "id": [None, None, 7],
    }


@SCRIPTS
def test_a_reward_function_cannot_end_the_process_without_a_word(script, monkeypatch):
    with_functions(script, monkeypatch, f=lambda **_: sys.exit(3))
    with pytest.raises(script.BrokenRun, match="--reward-fn f: SystemExit: 3 "):
        script.true_rewards(SUMS, script.Args(reward_fn=("f",)))


@SCRIPTS
def test_a_damaged_dataset_is_one_line(script, tmp_path):
    path = tmp_path / "x.parquet"
    write_rows(path, ROWS * 500)
    content = bytearray(path.read_bytes())
    content[20:400] = b"\xff" * 380
    path.write_bytes(content)
    with pytest.raises(script.BadInput, match="^cannot read "):
        script.make_problems(script.Args(model="x", dataset=str(path)), None)


@SCRIPTS
@pytest.mark.parametrize("source", [":", "http://nowhere.invalid/x.parquet"])
def test_what_is_no_dataset_is_one_line(script, source):
    with pytest.raises(script.BadInput, match="^cannot read "):
        script.read_rows(source)


@SCRIPTS
def test_functions_are_loaded_from_a_path_or_a_module(script, tmp_path, monkeypatch):
    """A file may be called as a module of the library is."""
    (tmp_path / "statistics.py").write_text("import json\ndef f(**_):\n    return 17\n")
    (tmp_path / "bad.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for name in ("statistics.py:f", f"{tmp_path}/statistics.py:f"):
        assert script.load_function(name)() == 17
    assert script.load_function("math:isfinite") is math.isfinite
    for name in ("statistics.py:g", "bad.py:f", "none.py:f", "no_such_module:f", "f", "math:"):
        with pytest.raises(script.BadInput, match="^--reward-fn takes module:function or path.py:function, and "):
            script.check_functions([], script.Args(reward_fn=(name,)))


# --- before sampling


@SCRIPTS
def test_stop_tokens_are_those_of_tokenizer_generation_config_and_flag(script, tiny):
    model, tokenizer = tiny
    old = model.generation_config.eos_token_id
    try:
        for more, stop, expected in ((7, (), {1, 7}), ([7, 8], ("=",), {1, 7, 8, 13}), (None, (), {1})):
            model.generation_config.eos_token_id = more
            assert script.stop_tokens(model, tokenizer, script.Args(stop=stop)) == expected
    finally:
        model.generation_config.eos_token_id = old
    for text in ("12", "x", ""):
        with pytest.raises(script.BadInput, match=f"--stop {text} is not one token"):
            script.stop_tokens(model, tokenizer, script.Args(stop=(text,)))


@SCRIPTS
@pytest.mark.parametrize("keep", [False, True])
def test_the_text_lacks_the_stop_token_and_has_special_ones_if_asked_for(script, tiny, keep):
    model, tokenizer = tiny
    args = script.Args(stop=("=", "+"), keep_special_tokens=keep, max_completion_length=6)
    generator = torch.Generator().manual_seed(0)
    (group,) = script.sample(model, None, tokenizer, args, [{"ids": PROMPTS[0]}], 40, generator, 1.0, 1.0)
    ended = [x for x in group["completions"] if x[-1] in (12, 13)]
    assert ended and any(0 in x for x in group["completions"])
    for ids, text in zip(group["completions"], group["texts"]):
        kept = [x for x in (ids[:-1] if ids[-1] in (1, 12, 13) else ids) if x or keep]
        assert text == tokenizer.decode(kept)
        assert not {"+", "=", "<eos>"} & set(re.findall("<eos>|.", text))


def sized(kind, **own):
    """A random model of a kind, with 20 tokens."""
    sizes = dict(vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, initializer_range=0.5, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes | own)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@SCRIPTS
@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_what_does_not_fit_the_models_tables_is_noticed_before_sampling(script, kind, tiny, capsys):
    """A table of positions ends; rotary positions go on, which gets a warning."""
    own = dict(max_position_embeddings=8) | (dict(word_embed_proj_dim=32, ffn_dim=32) if kind == "opt" else {})
    model = sized(kind, **own)
    problems, args = [{"ids": [3, 4, 5, 6, 7]}], script.Args(max_completion_length=3)
    script.check_sizes(model, tiny[1], problems, args)
    with pytest.raises(script.BadInput, match="a prompt has token 20, and the model knows 20"):
        script.check_sizes(model, tiny[1], [{"ids": [20]}], args)
    assert not capsys.readouterr().out
    problems[0]["ids"].append(8)
    if kind == "llama":
        script.check_sizes(model, tiny[1], problems, args)
        assert "warning: prompts and completions of up to 9 tokens, and the model knows 8" in capsys.readouterr().out
    else:
        with pytest.raises(script.BadInput, match="up to 9 tokens, and the model knows 8 positions: lower --max"):
            script.check_sizes(model, tiny[1], problems, args)


LAYERS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
KINDS = {
    "gpt2": {},
    "opt": dict(word_embed_proj_dim=32, ffn_dim=32),
    "gpt_neox": {},
    "llama": {},
    "mistral": dict(sliding_window=4),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3": dict(head_dim=16),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16),
    "gemma2": dict(head_dim=16, **LAYERS),
    "gemma3_text": dict(head_dim=16, **LAYERS),
    "phi3": {},
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "qwen3_5_text": dict(
        layer_types=["linear_attention", "full_attention"],
        head_dim=16,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_equals_single_rows_in_every_architecture(kind):
    """Log-probabilities; samples with a cache are those without."""
    model = sized(kind, **KINDS[kind])
    with torch.no_grad():
        batch = gbpo.collate(PROMPTS, COMPLETIONS, "cpu")
        both = gbpo.token_log_probs(model, batch, 0.7)
        for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
            single = gbpo.token_log_probs(model, gbpo.collate([prompt], [completion], "cpu"), 0.7)
            for found, expected in zip(both, single):
                torch.testing.assert_close(found[i, : len(completion)], expected[0], rtol=1e-4, atol=1e-5)
    uniforms = torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(1))
    expected = [literal_generation(model, p, x, 1.0, 1.0, [1, 7]) for p, g in zip(PROMPTS, uniforms) for x in g]
    assert gbpo.generate(model, PROMPTS, uniforms, [1, 7], 1.0, 1.0, 100) == expected


# --- problems

ROWS = [{"prompt": "1+1=", "answer": "2", "source": "a"}, {"prompt": "2+2=", "answer": 4.0, "id": 7}]


def write_rows(path, rows):
    if path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list([{"prompt": x["prompt"], "answer": str(x["answer"])} for x in rows]).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_problems_are_read_from_every_kind_of_file(tiny, tmp_path, suffix):
    rows = gbpo.read_rows(write_rows(tmp_path / f"x{suffix}", ROWS))
    problems = gbpo.usable_problems(rows, "x", gbpo.Args(), tiny[1])
    assert [x["answer"] for x in problems] == [2, 4] and problems[0]["ids"] == [3, 12, 3, 13]


def test_bad_rows_are_named_counted_and_left_out(tiny, tmp_path, capsys):
    rows = [ROWS[0], {"answer": "3"}, {"prompt": "", "answer": "3"}, {"prompt": "1+2=", "answer": "three"}, 17]
    rows += [{"prompt": "1" * 600, "answer": "1"}, {"prompt": "3+3=", "answer": None}, ROWS[1]]
    rows = gbpo.read_rows(write_rows(tmp_path / "x.json", rows))
    assert len(gbpo.usable_problems(rows, "x.json", gbpo.Args(), tiny[1])) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert "6 of 8 rows left out" in line and "row 1 has no prompt" in line and "row 3 has no number" in line
    args = gbpo.Args(reward_fn=("a:b",))  # answers may be anything then
    assert len(gbpo.usable_problems(rows, "x.json", args, tiny[1])) == 4


def test_a_line_of_a_jsonl_file_ends_at_its_newline_only(tmp_path):
    """JSON allows within a string what Python's splitlines takes for the end of a line."""
    rows = [ROWS[0] | {"source": "a\u2028b\u0085c\x1cd"}, ROWS[1]]
    (tmp_path / "x.jsonl").write_text("\n\n".join(json.dumps(x, ensure_ascii=False) for x in rows) + "\n")
    assert gbpo.read_rows(str(tmp_path / "x.jsonl")) == rows


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", "[" * 10**5, '[{"prompt": "a", "answer": "b"}]', ""])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_file_without_a_usable_row_is_bad_input(tiny, tmp_path, text, suffix):
    (tmp_path / f"x{suffix}").write_text(text)
    with pytest.raises(gbpo.BadInput) as error:
        gbpo.make_problems(gbpo.Args(model="x", dataset=str(tmp_path / f"x{suffix}")), tiny[1])
    assert "\n" not in str(error.value)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not system %}{{ raise_exception('no system') }}{% endif %}"
)
TEMPLATE += "{{ m.content }}={% endfor %}{% if add_generation_prompt %}+{% endif %}"
CHAT = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "2+2"}]


@pytest.fixture
def chat():
    """A tokenizer with a chat template that knows no system message."""
    _, tokenizer = gbpo.make_model(gbpo.Args(), torch.device("cpu"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    "row, own",
    [({"problem": "2+2", "answer": "4"}, {}), ({"question": "2+2", "answer": "He has 2 + 2.\n#### 4"}, {})]
    + [({"prompt": "2+2", "reward_model": {"ground_truth": "4", "style": "rule"}}, {})]
    + [({"problem": "2+2", "solution": "so \\boxed{4}, and not \\boxed{}"}, {})]
    + [({"prompt": "x", "q": {"text": "2+2"}, "a": ["4"]}, dict(prompt_column="q.text", answer_column="a"))],
)
def test_columns_are_found_under_their_usual_names_or_as_told(tiny, row, own):
    (problem,) = gbpo.usable_problems([row], "x", gbpo.Args(**own), tiny[1])
    assert problem["prompt"] == "2+2" and problem["ids"] == [4, 12, 4] and problem["answer"] == 4


def test_a_refusal_names_the_columns_that_it_saw(tiny):
    with pytest.raises(gbpo.BadInput, match="row 0 has no prompt; the last one's columns: text, label$"):
        gbpo.usable_problems([{"text": "1+1", "label": 2}], "x", gbpo.Args(), tiny[1])


def test_files_may_have_a_byte_order_mark_and_lines_under_any_name(tmp_path):
    for name in ("a.json", "b.jsonl"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ROWS)).encode() + b"\r\n")
        assert gbpo.read_rows(str(tmp_path / name)) == ROWS
        (tmp_path / name).write_text(json.dumps(ROWS, indent=1))
        assert gbpo.read_rows(str(tmp_path / name)) == ROWS


def test_prompts_may_be_chat_messages(chat):
    args = gbpo.Args(chat_template=True)
    assert chat.decode(gbpo.encode(CHAT, args, chat)) == "1+2=3=2+2=+" and gbpo.encode("2+2", args, chat)
    for prompt, own, words in (
        (CHAT, {}, "chat messages as its prompt: add --chat-template"),
        (CHAT, dict(chat_template=True, system_prompt="1"), "a prompt that tokenizer or template refuses: .*no system"),
        (
            [{"role": "system", "content": "1"}, *CHAT],
            dict(chat_template=True, system_prompt="1"),
            "leave out --system",
        ),
        ([{"role": "user", "content": None}], dict(chat_template=True), "no prompt"),
        (["1+1", "2+2"], {}, "no prompt"),
        ([{"role": "user", "content": "\ud800"}], dict(chat_template=True), "tokenizer or template refuses"),
    ):
        with pytest.raises(gbpo.BadInput, match=words):
            gbpo.usable_problems([{"prompt": prompt, "answer": "4"}], "x", gbpo.Args(**own), chat)


def test_a_prompt_has_one_bos_and_at_least_one_token(chat):
    """Texts that went through a template before begin with BOS, and the tokenizer adds another."""
    chat.bos_token = "="
    chat._tokenizer.post_processor = gbpo.tokenizers.processors.TemplateProcessing("= $A", None, [("=", 13)])
    assert gbpo.encode("1+1", gbpo.Args(), chat) == gbpo.encode("=1+1", gbpo.Args(), chat) == [13, 3, 12, 3]
    chat._tokenizer.post_processor = gbpo.tokenizers.processors.TemplateProcessing("$A", None, [])
    chat._tokenizer.normalizer = gbpo.tokenizers.normalizers.Strip()
    with pytest.raises(gbpo.BadInput, match="row 0 has a prompt of 0 tokens"):
        gbpo.usable_problems([{"prompt": "  ", "answer": "4"}], "x", gbpo.Args(), chat)


def test_addition_holds_problems_out(tiny):
    train, held_out = gbpo.make_problems(gbpo.Args(), tiny[1])
    assert (len(train), len(held_out)) == (7600, 500)
    assert not {x["prompt"] for x in train} & {x["prompt"] for x in held_out}
    for problem in train[:50]:
        a, b = problem["prompt"].rstrip("=").split("+")
        assert problem["answer"] == int(a) + int(b) and tiny[1].decode(problem["ids"]) == problem["prompt"]


@SCRIPTS
@pytest.mark.slow
def test_the_built_in_task_is_encoded_and_checked_as_a_dataset_is(script):
    args = script.Args(model="x", chat_template=True, system_prompt="1+", max_prompt_length=9)
    with pytest.raises(script.BadInput, match="the built-in model has no chat template"):
        script.make_model(script.Args(chat_template=True), torch.device("cpu"))
    _, tokenizer = script.make_model(script.Args(), torch.device("cpu"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    train, held_out = script.make_problems(args, tokenizer)
    assert (len(train), len(held_out)) == (7600, 500)
    for problem in train[:9] + held_out[:9]:
        assert tokenizer.decode(problem["ids"]) == "1+" + problem["prompt"] + "="
    args.max_prompt_length = 8
    with pytest.raises(script.BadInput, match="the built-in task has no usable row: row 0 has a prompt of 9 tokens"):
        script.make_problems(args, tokenizer)


@SCRIPTS
def test_held_out_problems_may_be_of_a_file_without_a_dataset(script, tiny, tmp_path):
    args = script.Args(eval_dataset=write_rows(tmp_path / "x.json", ROWS))
    train, held_out = script.make_problems(args, tiny[1])
    assert len(train) == 7600 and [x["row"] for x in held_out] == ROWS


# --- settings and machines


BAD_VALUES = dict(group_size=[1, 10**18], num_prompts=[0, 10, 10**18], minibatch_prompts=[0, 128])
BAD_VALUES |= dict(learning_rate=[math.nan, 0.0], total_timesteps=[-1, 10**400])
BAD_VALUES |= dict(ratio_low=[1.0, -0.1], ratio_high=[0.9, math.inf], clip_coef=[1.5], env_id=["Hopper-v4"])
BAD_VALUES |= dict(system_prompt=["Add."], eval_top_p=[0.0], generator=["vllm"], seed=[2**31])
BAD_VALUES |= dict(dataset=["x.json"], model=[""], no_such_setting=[1], micro_batch_tokens=[0], warmup_accuracy=[1.0])


@SCRIPTS
@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_settings_are_refused(script, name):
    for value in BAD_VALUES[name]:
        with pytest.raises(pydantic.ValidationError):
            script.Args(**{name: value})


@SCRIPTS
def test_settings_that_exclude_each_other_are_refused(script):
    for own in (dict(reward="majority", num_votes=4), dict(reward="boxed", reward_fn=("a:b",))):
        with pytest.raises(pydantic.ValidationError, match="--num-votes|takes the place of --reward"):
            script.Args(**own)


@SCRIPTS
def test_a_machine_that_does_not_fit_is_named(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for own, part in ((dict(device="cuda"), "no GPU"), (dict(fsdp=True), "torchrun --nproc-per-node N")):
        with pytest.raises(script.BadInput, match=part):
            script.start_processes(script.Args(**own))
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    with pytest.raises(script.BadInput, match="--minibatch-prompts must be a multiple of the 3 processes"):
        script.start_processes(script.Args())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(script, "LOCAL_WORLD_SIZE", 2)  # all of a machine's processes say so, not the second one alone
    with pytest.raises(script.BadInput, match="every process needs its own GPU, and there are 1"):
        script.start_processes(script.Args())


@SCRIPTS
def test_processes_on_gpus_avoid_cudnn_attention_and_wait_longer_than_a_checkpoint_takes(script, monkeypatch):
    calls = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(device=device))
    monkeypatch.setattr(script.dist, "init_process_group", lambda *args, **kwargs: calls.update(kwargs, backend=args))
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    monkeypatch.setattr(script, "LOCAL_RANK", 1)
    try:
        device = script.start_processes(script.Args())
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert device == calls["device"] == torch.device("cuda", 1) and calls["backend"] == ("nccl",)
    assert calls["timeout"].total_seconds() >= 3600
