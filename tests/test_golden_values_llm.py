"""The language model scripts compute what they computed before they were rebuilt (recorded at a762edc)."""

import copy
import importlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from record_golden_values_llm import NUMBERS, SIZES, entries, seeded_groups, shift

import gbpo_llm as gbpo
import grpo_llm as grpo

GOLDEN = json.loads(Path(__file__).with_name("golden_values_llm.json").read_text())
CASES = [(script, variant) for script, variants in GOLDEN["variants"].items() for variant in variants]


@pytest.mark.parametrize("name, variant", CASES, ids=[f"{script[:4]}, {variant}" for script, variant in CASES])
def test_losses_gradient_and_three_steps_are_the_recorded_ones(name, variant):
    script, golden = importlib.import_module(name), GOLDEN["variants"][name][variant]
    args = script.Args(**SIZES, **golden["settings"])
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
        learner.step(learner.learning_rate(0))
    assert losses == pytest.approx(golden["losses"], rel=1e-5)
    assert entries(model.parameters()) == pytest.approx(golden["after"], rel=1e-5, abs=1e-7)


def test_advantages_rewards_samples_and_draws_are_the_recorded_ones():
    golden, close = GOLDEN["shared"], torch.testing.assert_close
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
