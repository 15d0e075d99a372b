"""What every script says when --resume or --evaluate cannot be meant; before anything is created."""

import dataclasses
import importlib
import json

import pytest
import torch

TASKS = ("atari_envpool", "locomotion")
NAMES = [f"{algorithm}_{task}" for task in TASKS for algorithm in ("bpo", "ppo")]
SCRIPTS = pytest.mark.parametrize("script", [importlib.import_module(x) for x in NAMES], ids=NAMES)


@SCRIPTS
def test_a_complete_run_is_not_trained_again(script, tmp_path):
    """--resume RUN --total-timesteps MORE would do nothing but evaluate anew, where MORE is the default."""
    args = script.Args(total_timesteps=500)
    about = {"script": script.SCRIPT, "args": dataclasses.asdict(args), "device": "cpu"}
    (tmp_path / "args.json").write_text(json.dumps(about))
    checkpoint = dict(script=script.SCRIPT, env_id=args.env_id, step=512, device="cpu")
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    (tmp_path / "evaluation.json").write_text("{}")
    before = {x: x.read_bytes() for x in tmp_path.iterdir()}
    for total in (script.Args.total_timesteps, 1000):
        with pytest.raises(script.BadInput, match="is complete: to train on, raise total_timesteps in its args.json"):
            script.train(script.Args(resume=str(tmp_path), total_timesteps=total))
    assert {x: x.read_bytes() for x in tmp_path.iterdir()} == before


@SCRIPTS
def test_an_empty_folder_name_is_no_new_run(script, tmp_path, monkeypatch):
    """As in --resume "$RUN" where RUN is not set."""
    monkeypatch.chdir(tmp_path)
    for call, purpose in ((script.train, "resume"), (script.main, "evaluate")):
        with pytest.raises(script.BadInput):
            call(script.Args(**{purpose: ""}))
    with pytest.raises(script.BadInput, match="--resume and --evaluate exclude each other"):
        script.main(script.Args(resume="one", evaluate="two"))
    assert not list(tmp_path.iterdir())


@SCRIPTS
def test_tracking_without_an_account_is_one_line(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    asked = []
    monkeypatch.setattr("wandb.login", lambda **options: asked.append(options))  # returns None: no key is known
    with pytest.raises(script.BadInput, match="--track needs an account: .* WANDB_MODE=offline"):
        script.train(script.Args(track=True))
    assert asked == [{"prompt": False}] and not list(tmp_path.iterdir())
