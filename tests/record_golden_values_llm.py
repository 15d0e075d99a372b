"""Records tests/golden_values_llm.json: what the language model scripts compute on a seeded batch.

    python tests/record_golden_values_llm.py

Run at commit a762edc, before the scripts were rebuilt; later scripts must give the same values.
"""

import copy
import importlib
import json
import sys
from fractions import Fraction
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
SIZES = dict(num_prompts=2, minibatch_prompts=2, group_size=6, micro_batch_tokens=60, max_completion_length=5)
SIZES |= dict(learning_rate=1e-3, lr_warmup=2, update_epochs=3, device="cpu")
EXTRA = dict(kl_coef=0.1, ent_coef=0.01)
VARIANTS = {
    "gbpo_llm": {
        "response": {},
        "token": dict(aggregation="token"),
        "constant": dict(aggregation="constant"),
        "asymmetric bounds": dict(ratio_low=0.6, ratio_high=1.3, target_temperature=0.3),
        "kl and entropy": EXTRA,
        "tv_coef": dict(tv_coef=0.3, scale_rewards="biased", clip_coef=0.5, target_temperature=0.3),
        "truncated": dict(mask_truncated=True, scale_rewards="none", sampling_temperature=0.7),
    },
    "grpo_llm": {
        "grpo": {},
        "dr_grpo": dict(objective="dr_grpo"),
        "dapo": dict(objective="dapo"),
        "gspo": dict(objective="gspo"),
        "sapo": dict(objective="sapo"),
        "kl and entropy": EXTRA,
        "gspo, kl and entropy": dict(objective="gspo", clip_coef=0.05) | EXTRA,
    },
}
TEXTS = [["12", " 12.0", "\\boxed{12}", "x", "24/2", "13"], ["7", "\\boxed{3/4}", "0.75", "\\frac{3}{4}", "", "7"]]
NUMBERS = [Fraction(12), Fraction(3, 4)]


def numbers(x):
    return [float(f"{value:.9g}") for value in x.flatten().tolist()]


def seeded_groups(script, tokenizer):
    """Two groups of completions of 1 to 5 tokens, as rollout gives them."""
    generator, groups = torch.Generator().manual_seed(3), []
    for prompt in ("12+34=", "5+6="):
        lengths = torch.randint(1, 6, (6,), generator=generator)
        completions = [torch.randint(2, 14, (n,), generator=generator).tolist() for n in lengths.tolist()]
        rewards = torch.randint(0, 3, (6,), generator=generator).double() / 2
        group = dict(problem={"ids": tokenizer(prompt)["input_ids"]}, completions=completions, log_probs=[None] * 6)
        groups.append(group | dict(rewards=rewards, truncated=(lengths == 5).double()))
    return groups


def shift(model, seed):
    """Moves all weights a little, so that ratios are on both sides of the bounds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            x += 0.02 * torch.randn(x.shape, generator=generator)


def entries(tensors):
    """The same 40 entries of the tensors put in a row."""
    flat = torch.cat([x.detach().flatten() for x in tensors])
    return numbers(flat[torch.randint(len(flat), (40,), generator=torch.Generator().manual_seed(4))])


def record(script, settings):
    args = script.Args(**SIZES, **settings)
    model, tokenizer = script.make_model(args, torch.device("cpu"))
    reference = copy.deepcopy(model)
    shift(reference, 5)
    (minibatch,) = script.make_minibatches(model, reference, seeded_groups(script, tokenizer), args)
    shift(model, 6)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    losses, first = [], {}
    for step in range(3):
        totals = {}
        for batch in minibatch:
            loss, stats, _ = script.minibatch_loss(model, batch, args)
            loss.backward()
            for name, x in stats.items():
                totals[name] = totals.get(name, 0) + x.item()
        losses.append(totals["loss"])
        if step == 0:
            first = dict(statistics=totals, entries=entries([x.grad for x in parameters]))
            first["norms"] = [x.grad.norm().item() for x in parameters]
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, (step + 1) / args.lr_warmup)
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {"settings": settings, "losses": losses, **first, "after": entries(parameters)}


def record_shared(gbpo, grpo):
    """Group advantages, rewards and samples."""
    rewards = torch.tensor([[0, 1, 0, 0, 1, 0], [0.5, 0.5, 1, 0, 0.25, 2], [0.7] * 6], dtype=torch.float64)
    golden = {"rewards": rewards.tolist(), "advantages": {}, "texts": TEXTS, "scores": {}}
    for scale in ("unbiased", "biased", "none"):
        for quantile in (0.5, 0.75):
            both = gbpo.group_advantages(rewards, quantile, scale)
            assert torch.equal(both[0], grpo.group_advantages(rewards, scale))
            golden["advantages"][f"{scale} {quantile}"] = [x.tolist() for x in both]
    problems = [{"answer": x} for x in NUMBERS]
    for reward in ("exact", "boxed", "majority"):
        score = gbpo.majority_rewards if reward == "majority" else gbpo.true_rewards
        scores, stats = score(problems, TEXTS, gbpo.Args(reward=reward))
        golden["scores"][reward] = [scores.tolist(), {name: x.tolist() for name, x in stats.items()}]
    model, tokenizer = gbpo.make_model(gbpo.Args(), torch.device("cpu"))
    prompts = [tokenizer(x)["input_ids"] for x in ("12+34=", "5+6=", "99+1=")]
    uniforms = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(2))
    golden["samples"] = [gbpo.generate(model, prompts, uniforms, [1], *x, 8) for x in ((1.0, 1.0), (0.6, 0.9))]
    golden["draws"] = gbpo.draw(7, 4, 12, 1).tolist()
    return golden


def main():
    scripts = {name: importlib.import_module(name) for name in VARIANTS}
    golden = {"commit": "a762edc", "shared": record_shared(*scripts.values())}
    golden["variants"] = {name: {k: record(scripts[name], v) for k, v in x.items()} for name, x in VARIANTS.items()}
    (TESTS / "golden_values_llm.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
