"""The Atari suite holds the paper's tables."""

import tomllib
from pathlib import Path

import bpo_atari_envpool as bpo
import ppo_atari_envpool as ppo

SUITES = Path(bpo.__file__).parent / "benchmark" / "suites"
COLUMNS = "minibatch_size clip_coef ent_coef gamma learning_rate update_epochs num_steps num_envs gae_lambda".split()
# Tables 2 and 3, columns batch size to n_envs, then GAE lambda.
PAPER = {
    "bpo": (256, 0.3, 0.001, 0.98, 2.5e-4, 5, 128, 8, 0.95),
    "ppo": (256, 0.2, 0.01, 0.98, 2.5e-4, 4, 128, 8, 0.95),
}


def test_paper_suite_and_defaults_hold_the_tables():
    suite = tomllib.loads((SUITES / "paper_atari.toml").read_text())
    games = ["BreakoutNoFrameskip-v4", "PongNoFrameskip-v4", "BoxingNoFrameskip-v4", "AsterixNoFrameskip-v4"]
    assert suite["tasks"] == games and suite["seeds"] == 10
    for script, variant in zip((bpo, ppo), suite["variants"], strict=True):
        assert variant["script"] == Path(script.__file__).name
        flags = suite["flags"] | variant["flags"]
        args = script.Args(device="cpu", **flags)
        for chosen in (args, script.Args(device="cpu")):
            assert tuple(getattr(chosen, name) for name in COLUMNS) == PAPER[variant["name"]]
            assert (chosen.vf_coef, chosen.lr_schedule) == (0.5, "constant")
        if script is bpo:
            assert (args.temperature, args.tv_coef, args.median_coef) == (0.001, 0, 0.5)
            assert args.median_network != "none"
