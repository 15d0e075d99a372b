"""Real runs of gbpo_llm.py and grpo_llm.py: learning, files, resuming, real models, several processes, bad input."""

import dataclasses
import datetime
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import common
import numpy as np
import pytest
import torch
import transformers
from common import command_line, contents, end_of, fork, options, read, resume, without_clock
from filelock import Timeout
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gbpo_llm as gbpo
import grpo_llm as grpo

ROOT = Path(gbpo.__file__).parent
BOTH = {"gbpo": gbpo, "grpo": grpo}
SCRIPTS = pytest.mark.parametrize("script", BOTH.values(), ids=BOTH)
GBPO = pytest.mark.parametrize("script", [gbpo], ids=["gbpo"])  # of what grpo_llm.py has in the same words
SHORT = dict(num_prompts=16, minibatch_prompts=8, group_size=4, eval_problems=40, eval_samples=2, eval_interval=2)
SHORT |= dict(total_timesteps=256, kl_coef=0.01, warmup_accuracy=0.05, device="cpu")  # 4 iterations


def train(script, folder, **settings):
    return common.train(script, folder, **SHORT | settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of GBPO."""
    return train(gbpo, tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """Settings of runs that start from the built-in model before it is taught, and reward some first tokens more."""
    folder = tmp_path_factory.mktemp("untaught")
    gbpo.save_model(*gbpo.make_model(gbpo.Args(), torch.device("cpu")), folder / "model")
    (folder / "first.py").write_text("def token(completion_ids, **_):\n    return [ids[0] for ids in completion_ids]\n")
    return dict(model=str(folder / "model"), reward_fn=(f"{folder}/first.py:token",))


@pytest.fixture(scope="module")
def warmed(tmp_path_factory):
    """The folder of a model that adds right about once in three times."""
    args, folder = gbpo.Args(warmup_accuracy=0.35), tmp_path_factory.mktemp("warmed") / "model"
    model, tokenizer = gbpo.make_model(args, torch.device("cpu"))
    gbpo.warm_up(model, tokenizer, gbpo.make_problems(args, tokenizer)[0], args)
    gbpo.save_model(model, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def warmed_run(warmed, tmp_path_factory):
    """A short run of GBPO that starts from the warmed model."""
    return train(gbpo, tmp_path_factory.mktemp("short"), model=warmed)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A file in TTRL's format."""
    rows = [{"prompt": f"{a}+{b}=", "answer": f"{a + b}.0", "source": "sums", "id": a} for a, b in [(10, 11), (52, 49)]]
    path = tmp_path_factory.mktemp("problems") / "TEST-TTT.json"
    path.write_text(json.dumps(rows + [{"prompt": "9+9=", "answer": "eighteen"}]))
    return str(path)


# --- learning


@pytest.mark.slow
@SCRIPTS
def test_held_out_accuracy_rises(script, warmed, tmp_path):
    settings = dict(num_prompts=64, minibatch_prompts=16, group_size=8, total_timesteps=40_960, model=warmed)
    run_dir = train(script, tmp_path, **settings, eval_problems=200, eval_samples=4, eval_interval=40)
    accuracies = [row["pass@1"] for row in read(run_dir / "evaluations.csv")]
    assert accuracies[-1] > accuracies[0] + 0.06
    rewards = [row["reward"] for row in read(run_dir / "metrics.csv")]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.05


@pytest.mark.parametrize("objective", ["dr_grpo", "dapo", "gspo", "sapo"])
@pytest.mark.slow
def test_every_objective_trains(objective, warmed, tmp_path):
    run_dir = train(grpo, tmp_path, objective=objective, model=warmed)
    rows = read(run_dir / "metrics.csv")
    assert all(math.isfinite(x) for row in rows for x in row.values()) and rows[-1]["ratio/max"] > 1
    if objective == "dapo":  # new prompts are drawn in place of groups of equal rewards, and counted
        assert rows[0]["step"] > 64 and (run_dir / "model").exists()


# --- files


def test_metrics_are_complete_and_finite(run):
    rows = read(run / "metrics.csv")
    names = "step loss entropy grad_norm learning_rate reward reward_std frac_reward_zero_std tokens_per_second "
    names += "clip_ratio/region_mean losses/approx_kl completions/mean_length completions/max_length charts/SPS "
    names += "completions/clipped_ratio ratio/out_of_bounds ratio/high_mean ratio/high_std ratio/low_mean "
    names += "ratio/low_std ratio/max ratio/min time/rollout time/update kl"
    page = (ROOT / "docs" / "gbpo_llm.md").read_text()
    assert not [name for name in rows[0] if f"`{name}`" not in page and name != "step"]
    assert set(rows[0]) == set(names.split()) and all(math.isfinite(x) for row in rows for x in row.values())
    assert [row["step"] for row in rows] == [64, 128, 192, 256]
    for row in rows:
        assert row["ratio/min"] <= row["ratio/low_mean"] <= 1 <= row["ratio/high_mean"] <= row["ratio/max"]
        assert 0 < row["entropy"] < math.log(14) and row["loss"] >= 0 and row["grad_norm"] > 0
    assert [row["learning_rate"] for row in rows] == pytest.approx([3e-4 * k / 20 for k in (2, 4, 6, 8)])


def test_episodes_are_the_completions_and_agree_with_the_metrics(run):
    episodes, metrics = read(run / "episodes.csv"), read(run / "metrics.csv")
    assert len(episodes) == 256
    for row in metrics:
        own = [x for x in episodes if x["step"] == row["step"]]
        rewards = np.array([x["return"] for x in own]).reshape(16, 4)
        assert row["reward"] == pytest.approx(rewards.mean(), abs=1e-5)
        assert row["reward_std"] == pytest.approx(rewards.std(1, ddof=1).mean(), abs=1e-5)
        assert row["frac_reward_zero_std"] == pytest.approx((rewards.std(1) == 0).mean())
        assert row["completions/mean_length"] == pytest.approx(np.mean([x["length"] for x in own]), abs=1e-4)


def test_sample_completions_are_logged_with_their_rewards(run):
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and {row["step"] for row in rows} == {64, 128, 192, 256}
    for row in rows:
        assert row["reward"] == float(row["completion"] == row["answer"])  # a right sample has no other form here


def test_tensorboard_has_every_metric_under_trls_names(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert set(read(run / "metrics.csv")[0]) - {"step"} <= set(tags["scalars"])
    assert {"reward", "frac_reward_zero_std", "eval/pass@1", "eval/maj@2"} <= set(tags["scalars"])
    assert any("completions" in tag for tag in tags["tensors"])
    found = [x.value for x in events.Scalars("reward")]
    np.testing.assert_allclose(found, [row["reward"] for row in read(run / "metrics.csv")], rtol=1e-4)


def test_args_json_carries_settings_and_versions(run):
    about = json.loads((run / "args.json").read_text())
    assert (about["script"], about["format"]) == ("gbpo_llm", 2) and about["args"]["total_timesteps"] == 256
    assert set(about["args"]) == {x.name for x in dataclasses.fields(gbpo.Args)}
    assert about["versions"]["transformers"] == transformers.__version__


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files(run, tmp_path):
    again = train(gbpo, tmp_path)
    for name in ("episodes.csv", "evaluations.csv", "completions.jsonl"):
        assert (again / name).read_bytes() == (run / name).read_bytes()
    assert without_clock(read(again / "metrics.csv")) == without_clock(read(run / "metrics.csv"))


@pytest.mark.slow
def test_another_seed_gives_other_files(warmed, warmed_run, tmp_path):
    other = train(gbpo, tmp_path, model=warmed, seed=2)
    assert (other / "episodes.csv").read_bytes() != (warmed_run / "episodes.csv").read_bytes()


def test_final_model_loads_with_transformers(run):
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["learner"]["parameters"]
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), saved, strict=True))
    assert tokenizer.decode(tokenizer("12+34=")["input_ids"]) == "12+34="


@GBPO
def test_no_completions_to_train_on_are_an_evaluation(script, run, tmp_path):
    """Of a finished run's model: what the run itself found last."""
    (row,) = read(train(script, tmp_path, model=str(run / "model"), total_timesteps=0) / "evaluations.csv")
    assert row == read(run / "evaluations.csv")[-1] | {"step": 0}


# --- resuming


def same_but_for_the_clock(run_dir, other):
    for name in ("episodes.csv", "evaluations.csv", "completions.jsonl"):
        assert (run_dir / name).read_bytes() == (other / name).read_bytes(), name
    assert without_clock(read(run_dir / "metrics.csv")) == without_clock(read(other / "metrics.csv"))
    weights = [torch.load(x / "checkpoint.pt", weights_only=True)["learner"]["parameters"] for x in (run_dir, other)]
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))


@GBPO
def test_a_resumed_run_equals_an_unbroken_one(script, untaught, tmp_path, monkeypatch):
    own = untaught | dict(lr_schedule="linear", lr_warmup=0)
    unbroken = train(script, tmp_path / "unbroken", **own, total_timesteps=128)
    log, stopped = script.Run.log, []

    def stop(run, *rest):
        log(run, *rest)
        run.stopping = not stopped
        stopped.append(1)

    monkeypatch.setattr(script.Run, "log", stop)
    with pytest.raises(SystemExit, match="stopped at step 64"):
        train(script, tmp_path / "broken", **own, total_timesteps=128)
    (run_dir,) = (tmp_path / "broken").iterdir()
    for name in script.LOGS:  # a row and a half past the checkpoint
        with (run_dir / name).open("a") as file:
            file.write((run_dir / name).read_text().splitlines()[-1] + "\n320,")
    resume(script, run_dir, "--reward-fn", *untaught["reward_fn"])
    same_but_for_the_clock(run_dir, unbroken)


@SCRIPTS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.slow
def test_a_resumed_run_equals_an_undisturbed_one(script, number, warmed, warmed_run, tmp_path):
    """Also with another generation batch and with activations recomputed: they change memory and speed only."""
    words = options(**SHORT, model=warmed, output_dir=tmp_path, checkpoint_seconds=0)
    pid = fork(script, words, tmp_path)
    while not any("\n128," in x.read_text() for x in tmp_path.glob("*/metrics.csv")):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), (tmp_path / "stderr").read_text()
        time.sleep(0.002)
    os.kill(pid, number)
    code, lines = end_of(pid, tmp_path)
    (run_dir,) = (x.parent for x in tmp_path.glob("*/checkpoint.pt"))
    step = torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"]
    assert 64 <= step < 256 and not (run_dir / "model").exists()
    if number == signal.SIGTERM:
        command = f"{sys.executable} {os.path.abspath(script.__file__)} --resume {run_dir}"
        assert (code, lines) == (1, [f"stopped at step {step}; go on with: {command}"])
    for name in script.LOGS:  # a row and a half past the checkpoint
        with (run_dir / name).open("a") as file:
            file.write((run_dir / name).read_text().splitlines()[-1] + "\n320,")
    more = ["--generation-batch-size", "8", "--gradient-checkpointing", "--checkpoint-seconds", "99"]
    assert resume(script, run_dir, *more) == str(run_dir) and (run_dir / "model").exists()
    undisturbed = warmed_run if script is gbpo else train(script, tmp_path / "other", model=warmed)
    same_but_for_the_clock(run_dir, undisturbed)
    settings = json.loads((run_dir / "args.json").read_text())["args"]
    assert settings["generation_batch_size"] == 8 and settings["checkpoint_seconds"] == 99


@pytest.mark.slow
def test_a_finished_run_is_resumed_without_another_evaluation(run, tmp_path):
    """The case of a run that was killed while it wrote its model."""
    shutil.copytree(run, copy := tmp_path / "copy")
    shutil.rmtree(copy / "model")
    resume(gbpo, copy)
    same_but_for_the_clock(copy, run)
    assert (copy / "model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_resumed_run_has_the_same_reference_of_the_built_in_model(run, tmp_path):
    """It is not saved, but taught anew: the KL term must be that of a run in one go."""
    run_dir = train(gbpo, tmp_path, total_timesteps=128)
    resume(gbpo, run_dir, "--total-timesteps", 256)
    same_but_for_the_clock(run_dir, run)


@SCRIPTS
@pytest.mark.slow
def test_a_complete_run_goes_on_if_asked_for_more(script, untaught, tmp_path, monkeypatch):
    run_dir = train(script, tmp_path, **untaught, total_timesteps=64)
    before, code = contents(run_dir), ["--reward-fn", *untaught["reward_fn"]]
    for words in ([], ["--total-timesteps", 7]):
        with pytest.raises(script.BadInput, match="is complete: to go on, add a larger --total-timesteps"):
            resume(script, run_dir, *words, *code)
    assert contents(run_dir) == before
    make_minibatches, complete = script.make_minibatches, []
    watched = lambda *x: complete.append((run_dir / "model").exists()) or make_minibatches(*x)  # noqa: E731
    monkeypatch.setattr(script, "make_minibatches", watched)
    resume(script, run_dir, "--total-timesteps", 128, "--micro-batch-tokens", 64, *code)
    assert complete == [False] and (run_dir / "model").exists()
    assert [row["step"] for row in read(run_dir / "metrics.csv")] == [64, 128]


@GBPO
def test_two_processes_never_own_one_run(script, untaught, tmp_path, monkeypatch, capsys):
    make_minibatches, refused, code = script.make_minibatches, [], ["--reward-fn", *untaught["reward_fn"]]

    def intrude(*args):
        (run_dir,) = (x.parent for x in tmp_path.glob("*/checkpoint.pt"))
        before = contents(run_dir)
        monkeypatch.setattr(script, "make_minibatches", make_minibatches)  # if it is not refused, it ends some time
        with pytest.raises(Timeout):
            resume(script, run_dir, "--total-timesteps", 192, *code)
        monkeypatch.setattr(script, "make_minibatches", intrude)
        refused.append(command_line(script, ["--resume", run_dir, *code], monkeypatch, capsys))
        assert contents(run_dir) == before
        return make_minibatches(*args)

    monkeypatch.setattr(script, "make_minibatches", intrude)
    run_dir = train(script, tmp_path, **untaught, total_timesteps=64)
    resume(script, run_dir, "--total-timesteps", 128, *code)
    assert len(refused) == 2
    for status, (line,) in refused:
        assert status == 2 and line.startswith("error: ") and "lock" in line


@SCRIPTS
def test_dynamic_sampling_replaces_the_groups_without_a_signal(script, untaught, tmp_path, monkeypatch):
    """Which are the first and the third of four here; the first draw that replaces them has one more."""
    draw_groups, make_minibatches, trained = script.draw_groups, script.make_minibatches, []
    rewards = iter([[[0, 0], [0, 1], [1, 1], [1, 0]], [[1, 1], [1, 0], [0, 1], [0, 0]]])

    def scripted(*args):
        groups, stats = draw_groups(*args)
        for group, own in zip(groups, next(rewards), strict=True):
            group["rewards"] = torch.tensor(own, dtype=torch.float64)
        return groups, stats

    monkeypatch.setattr(script, "draw_groups", scripted)
    monkeypatch.setattr(script, "make_minibatches", lambda *x: trained.append(x[2]) or make_minibatches(*x))
    own = dict(resample_rounds=3) | ({"objective": "dapo"} if script is grpo else {})
    sizes = dict(num_prompts=4, minibatch_prompts=2, group_size=2, total_timesteps=8)
    run_dir = train(script, tmp_path, **untaught, **sizes, **own)
    (groups,) = trained
    assert [group["rewards"].tolist() for group in groups] == [[1, 0], [0, 1], [0, 1], [1, 0]]
    assert read(run_dir / "metrics.csv")[-1]["step"] == 16  # all that was sampled counts


def test_resume_takes_no_other_settings(run):
    with pytest.raises(gbpo.BadInput, match="a run keeps its settings: leave out --learning-rate"):
        resume(gbpo, run, "--learning-rate", 1.0)
    with pytest.raises(grpo.BadInput, match="made by another script or version, gbpo_llm.py"):
        grpo.read_args(["--resume", str(run)])


@SCRIPTS
def test_a_data_file_that_has_changed_is_noticed(script, run, problems, tmp_path):
    data = Path(shutil.copy(problems, tmp_path / "data.json"))
    own = dict(num_prompts=2, minibatch_prompts=2, total_timesteps=8, kl_coef=0.0)
    run_dir = train(script, tmp_path / "out", model=str(run / "model"), dataset=str(data), **own)
    before, text = contents(run_dir), data.read_text()
    data.write_text(text.replace("52+49=", "52+48="))
    with pytest.raises(script.BadInput, match="the problems have changed"):
        resume(script, run_dir, "--total-timesteps", 16)
    assert contents(run_dir) == before
    data.write_text(text)
    about = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps({name: x for name, x in about.items() if name != "data"}))
    with pytest.raises(script.BadInput, match="the problems have changed"):
        resume(script, run_dir, "--total-timesteps", 16)
    (run_dir / "args.json").write_text(json.dumps(about))
    resume(script, run_dir, "--total-timesteps", 16)


@pytest.mark.slow
def test_a_damaged_run_is_refused_and_stays_as_it_is(run, tmp_path):
    middle = bytearray((run / "checkpoint.pt").read_bytes())
    middle[len(middle) // 2] ^= 1
    damages = {"checkpoint.pt": bytes(middle), "args.json": b"{", "episodes.csv": b"step", "metrics.csv": None}
    for name, content in damages.items():
        shutil.copytree(run, damaged := tmp_path / name)
        (damaged / name).unlink()
        if content is not None:
            (damaged / name).write_bytes(content)
        before = contents(damaged)
        with pytest.raises(gbpo.BadInput, match="cannot use the run|has lost rows"):
            resume(gbpo, damaged, "--total-timesteps", 512)
        assert contents(damaged) == before
    with pytest.raises(gbpo.BadInput, match="cannot use the run"):
        gbpo.train(gbpo.Args(resume=str(tmp_path / "nowhere")))
    assert not (tmp_path / "nowhere").exists()


# --- what breaks


@pytest.mark.parametrize(
    "function, flag", [("token_log_probs", "micro-batch-tokens=8192"), ("generate", "generation-batch-size=512")]
)
@pytest.mark.slow
def test_out_of_memory_is_one_line_with_the_flag_to_lower(function, flag, warmed, tmp_path, monkeypatch):
    real, calls, good = getattr(gbpo, function), [], {"token_log_probs": 9, "generate": 3}[function]

    def full(*args, **settings):
        calls.append(1)
        if len(calls) > good:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*args, **settings)

    monkeypatch.setattr(gbpo, function, full)
    with pytest.raises(SystemExit) as error:
        train(gbpo, tmp_path, model=warmed, checkpoint_seconds=0)
    (run_dir,) = tmp_path.iterdir()
    command = f"{sys.executable} {os.path.abspath(gbpo.__file__)} --resume {run_dir}"
    assert re.fullmatch(f"error: out of memory: .*--{flag.split('=')[0]}.*; go on with: {command}", str(error.value))
    monkeypatch.undo()
    resume(gbpo, run_dir, f"--{flag}")
    assert len(read(run_dir / "metrics.csv")) == 4


@GBPO
def test_weights_that_break_are_not_saved(script, untaught, tmp_path):
    """One step of 1e38: no loss tells, and the weights are not finite."""
    with pytest.raises(script.BrokenRun, match="a weight is not finite at step 64$"):
        train(script, tmp_path, **untaught, minibatch_prompts=16, learning_rate=1e38, lr_warmup=0, checkpoint_seconds=0)
    (run_dir,) = tmp_path.iterdir()
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 0 and all(x.isfinite().all() for x in saved["learner"]["parameters"])


@pytest.mark.parametrize("room", [2000, 30_000, 500_000])
@pytest.mark.slow
def test_full_disk_ends_with_one_line(room, warmed, tmp_path):
    """Files may grow to some bytes, as on a disk with that much left."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit is then an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    words = options(**SHORT, model=warmed, output_dir=tmp_path / "out", checkpoint_seconds=0)
    code, lines = end_of(fork(gbpo, words, tmp_path, limit), tmp_path)
    assert code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
    kept = [torch.load(x, weights_only=True)["step"] for x in tmp_path.rglob("checkpoint.pt")]
    assert kept == [0] * (room == 500_000)  # where the first one fits, and none with Adam's moments


@pytest.mark.parametrize("saver", [transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase])
@pytest.mark.slow
def test_a_disk_that_is_full_when_the_model_is_saved_ends_with_one_line(saver, warmed, tmp_path):
    """safetensors and tokenizers have errors of their own; the checkpoint is there by then."""

    def limit():
        save = saver.save_pretrained

        def save_limited(*args, **settings):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            try:
                return save(*args, **settings)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        saver.save_pretrained = save_limited

    words = options(**SHORT | {"total_timesteps": 64}, model=warmed, output_dir=tmp_path / "out")
    code, lines = end_of(fork(gbpo, words, tmp_path, limit), tmp_path)
    assert code == 1 and len(lines) == 1 and re.match("error: cannot write .*/model: .*go on with: ", lines[0]), lines
    (run_dir,) = (tmp_path / "out").iterdir()
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] == 64
    assert resume(gbpo, run_dir) == str(run_dir) and (run_dir / "model").exists()


@SCRIPTS
def test_what_wandb_refuses_is_one_line_that_costs_no_model(script, run, problems, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    own = dict(num_prompts=2, minibatch_prompts=2, total_timesteps=8, model=str(run / "model"), dataset=str(problems))
    with pytest.raises(script.BadInput, match="^--track: .*Invalid project name"):
        train(script, tmp_path / "out", **own, track=True, wandb_project_name="a/b")
    assert not (tmp_path / "out").exists()
    run_dir = train(script, tmp_path / "out", **own)
    with pytest.raises(script.BadInput, match="^--track: .*Invalid project name"):
        resume(script, run_dir, "--total-timesteps", 16, "--track", "--wandb-project-name", "a/b")
    assert (run_dir / "model").exists() and json.loads((run_dir / "args.json").read_text())["args"]["track"] is False


# --- real models


@pytest.mark.parametrize(
    "script, own", [(gbpo, {"reward": "exact"}), (grpo, {"objective": "gspo", "reward": "majority"})]
)
def test_a_saved_model_and_a_file_in_ttrls_format(script, own, run, problems, tmp_path, capsys, monkeypatch):
    """The whole real-model path: bf16, gradient checkpointing, small micro-batches, KL, entropy bonus, lr schedule."""
    majority_rewards, voted = script.majority_rewards, []

    def watched(groups, args):
        voted.append(([x["texts"] for x in groups], [x["problem"]["row"]["answer"] for x in groups]))
        return majority_rewards(groups, args)

    monkeypatch.setattr(script, "majority_rewards", watched)
    settings = dict(model=str(run / "model"), dataset=problems, num_prompts=4, minibatch_prompts=2, num_votes=8)
    settings |= dict(dtype="bfloat16", gradient_checkpointing=True, micro_batch_tokens=64, kl_coef=0.01, ent_coef=0.001)
    settings |= dict(total_timesteps=96, lr_schedule="cosine", learning_rate=1e-3, lr_warmup=0)
    settings |= {"aggregation": "token"} if script is gbpo else {}
    run_dir = train(script, tmp_path, **settings, **own)
    voting = own["reward"] == "majority"  # needs no answers
    assert run_dir.name.startswith("TEST-TTT__") and ("row 2 has no number" in capsys.readouterr().out) != voting
    rows = read(run_dir / "metrics.csv")
    assert rows[0]["kl"] >= 0 and rows[-1]["kl"] > 0 and rows[-1]["ratio/max"] != 1
    unknown = ("ttrl/label_accuracy", "ttrl/ground_truth_ratio") if voting else ()  # where no answer was drawn
    assert all(math.isfinite(x) for row in rows for name, x in row.items() if name not in unknown)
    assert rows[0]["learning_rate"] == pytest.approx(1e-3)
    if voting:  # 8 votes, of which 4 are trained on
        episodes = read(run_dir / "episodes.csv")
        assert len(episodes) == 96 and [row["step"] for row in rows] == [32, 64, 96]
        for row, (texts, answers) in zip(rows, voted, strict=True):
            votes = [[int(x) if re.fullmatch(r"\+?[0-9]+", x) else -1 for x in group] for group in texts]
            labels = [Counter(x for x in group if x >= 0).most_common(1) or [(-2, 0)] for group in votes]
            right = [y[0][0] == int(float(x)) for y, x in zip(labels, answers, strict=True) if x != "eighteen"]
            shares = np.array([[float(x == label[0][0]) for x in group] for group, label in zip(votes, labels)])
            assert shares.shape == (4, 8)
            assert [x["return"] for x in episodes if x["step"] == row["step"]] == shares.flatten().tolist()
            assert row["reward"] == row["ttrl/majority_ratio"] == pytest.approx(shares.mean(), abs=1e-5)
            assert row["ttrl/label_accuracy"] == pytest.approx(np.mean(right) if right else math.nan, nan_ok=True)
            trained = shares[:, :4]
            assert row["reward_std"] == pytest.approx(trained.std(1, ddof=1).mean(), abs=1e-5)
            assert row["frac_reward_zero_std"] == pytest.approx((trained.std(1) == 0).mean())
    model = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert model.dtype == torch.bfloat16
    masters = torch.load(run_dir / "checkpoint.pt", weights_only=True)["learner"]["parameters"]
    for x, master in zip(model.parameters(), masters, strict=True):
        assert master.dtype == torch.float32 and torch.equal(x, master.bfloat16())


def test_a_reward_function_is_called_as_trl_calls_it(run, problems, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "calls = []\n"
        "def short(prompts, completions, **columns):\n"
        "    calls.append((prompts, completions, columns))\n"
        "    return [1.0 / (1 + len(x)) for x in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = dict(model=str(run / "model"), dataset=problems, num_prompts=4, minibatch_prompts=4, total_timesteps=16)
    run_dir = train(gbpo, tmp_path, **settings, reward_fn=("my_rewards:short",))
    resumed = ["--resume", str(run_dir), "--total-timesteps", "32"]
    for words in ([], ["--reward-fn", "my_rewards:other"]):  # code that a file names is not run
        with pytest.raises(gbpo.BadInput, match="if it is yours, add --reward-fn my_rewards:short"):
            gbpo.read_args(resumed + words)
    assert gbpo.read_args([*resumed, "--reward-fn", "my_rewards:short"]).reward_fn == ("my_rewards:short",)
    calls = sys.modules["my_rewards"].calls
    prompts, completions, columns = calls[1]  # the first is the evaluation's
    assert len(prompts) == len(completions) == 16 and {len(x) for x in columns.values()} == {16}
    assert len(columns.pop("completion_ids")) == 16
    assert set(columns) == {"answer", "source", "id"} and prompts[:4] == [prompts[0]] * 4
    rewards = [1 / (1 + len(x)) for x in completions]
    assert [x["return"] for x in read(run_dir / "episodes.csv")] == pytest.approx(rewards)


@SCRIPTS
def test_chats_in_verls_parquet_with_a_function_written_for_trl(script, run, tmp_path, monkeypatch, capsys):
    """Messages as prompts, the truth within reward_model, and TRL's own example of a reward, weighted with another."""
    import datasets

    rows = [{"role": "user", "content": f"{a}+{a}="} for a in (11, 22)]
    rows = [{"prompt": [x], "reward_model": {"style": "rule", "ground_truth": "22"}, "data_source": "s"} for x in rows]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    shutil.copytree(run / "model", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "trl_rewards.py").write_text(
        "def reward_len(completions, **kwargs):\n"
        "    return [float(len(completion[0]['content'])) for completion in completions]\n"
        "async def reward_ids(completion_ids, reward_model, **kwargs):\n"
        "    assert all(x['ground_truth'] == '22' for x in reward_model)\n"
        "    return [float(len(ids)) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    names = ("trl_rewards.py:reward_len", "trl_rewards.py:reward_ids")
    own = dict(num_prompts=2, minibatch_prompts=2, total_timesteps=16, chat_template=True, kl_coef=0.0)
    own |= dict(model="model", dataset="x.parquet")
    run_dir = train(script, tmp_path / "out", **own, reward_fn=names, reward_weights=(1.0, 100.0))
    for row in read(run_dir / "episodes.csv"):
        ids, characters = divmod(row["return"], 100)
        assert ids == row["length"] and characters in (ids, ids - 1)  # without the end-of-sequence token
    assert "step 0, training problems: reward " in capsys.readouterr().out
    pytest.importorskip("math_verify")
    assert train(script, tmp_path / "boxed", **own, reward="boxed").exists()


def test_rows_as_those_of_gsm8k_are_trained_on(run, tmp_path):
    rows = [{"question": f"{a}+{a}=", "answer": f"It is <<{a}+{a}={2 * a}>>.\n#### {2 * a}"} for a in (11, 22)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = dict(num_prompts=4, minibatch_prompts=4, total_timesteps=16, kl_coef=0.0)
    run_dir = train(gbpo, tmp_path, model=str(run / "model"), dataset=str(tmp_path / "train.jsonl"), **own)
    samples = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    assert all(x["reward"] == (x["completion"] == x["answer"].split()[-1]) for x in samples)


def test_a_reward_that_is_not_finite_stops_the_run(run, problems, tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text(
        "calls = []\n"
        "def f(prompts, completions, **columns):\n"
        "    calls.append(1)\n"
        "    return [float('nan') if len(calls) > 1 else 0.0 for x in completions]\n"  # the first is the evaluation's
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gbpo.BrokenRun, match="broken_rewards:f must return 64 finite numbers"):
        train(gbpo, tmp_path, model=str(run / "model"), dataset=problems, reward_fn=("broken_rewards:f",))
    (run_dir,) = (x for x in tmp_path.iterdir() if x.name.startswith("TEST"))
    assert (run_dir / "checkpoint.pt").exists() and not (run_dir / "model").exists()


def test_any_column_of_a_dataset_may_come_along(run, tmp_path):
    """One named step does not replace the run's, and a date has no form of its own in JSON."""
    import datasets

    rows = [{"prompt": "1+1=", "answer": "2", "step": "a", "when": datetime.datetime(2024, 1, 2)}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    settings = dict(num_prompts=2, minibatch_prompts=2, total_timesteps=16)
    run_dir = train(gbpo, tmp_path / "out", model=str(run / "model"), dataset=str(tmp_path / "x.parquet"), **settings)
    rows = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [8, 8, 16, 16] and rows[0]["when"] == "2024-01-02 00:00:00"


def test_completions_that_were_all_cut_off_teach_nothing_and_stop_nothing(run, tmp_path):
    settings = dict(model=str(run / "model"), max_completion_length=1, mask_truncated=True, total_timesteps=64)
    rows = read(train(gbpo, tmp_path, **settings) / "metrics.csv")
    assert rows[0]["completions/clipped_ratio"] == 1 and rows[0]["loss"] == rows[0]["grad_norm"] == 0
    assert rows[0]["ratio/max"] == rows[0]["ratio/min"] == 1 and rows[0]["ratio/out_of_bounds"] == 0


@SCRIPTS
@pytest.mark.slow
def test_dropout_is_off_while_gradient_checkpointing_recomputes(script, run, tmp_path):
    """OPT's layers drop out by their own training flag, with 0.1 as the default."""
    sizes = dict(hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32)
    config = transformers.OPTConfig(vocab_size=14, **sizes, max_position_embeddings=64, pad_token_id=0, eos_token_id=1)
    assert config.dropout == 0.1
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(run / "model").save_pretrained(tmp_path / "model")
    settings = dict(model=str(tmp_path / "model"), gradient_checkpointing=True, minibatch_prompts=16)
    for row in read(train(script, tmp_path / "out", **settings, total_timesteps=128) / "metrics.csv"):
        assert row["ratio/min"] == row["ratio/max"] == 1  # one step an iteration: measured before it


def test_weights_that_take_no_part_stay_as_they_are(untaught, tmp_path, monkeypatch):
    """As those of the part for images of a model that reads both: they get no gradient."""
    make_model = gbpo.make_model

    def with_more(*args):
        model, tokenizer = make_model(*args)
        model.unused = torch.nn.Parameter(torch.ones(3))
        return model, tokenizer

    monkeypatch.setattr(gbpo, "make_model", with_more)
    run_dir = train(gbpo, tmp_path, **untaught, total_timesteps=64)
    masters = torch.load(run_dir / "checkpoint.pt", weights_only=True)["learner"]["parameters"]
    assert [x.tolist() for x in masters if x.shape == (3,)] == [[1, 1, 1]]


def test_chat_template_wraps_the_prompt(run, problems, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    args = gbpo.Args(model=str(run / "model"), chat_template=True, system_prompt="1", device="cpu")
    with pytest.raises(gbpo.BadInput, match="no chat template"):
        gbpo.make_model(args, torch.device("cpu"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}={% endfor %}{% if add_generation_prompt %}+{% endif %}"
    )
    assert tokenizer.decode(gbpo.encode("23", args, tokenizer)) == "1=23=+"


# --- several processes


def torchrun(processes, script, **settings):
    """Runs the script under torchrun with this many processes on the CPU."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    flags = options(**settings)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, script.__file__, *flags], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "fsdp gradient_checkpointing"])
def test_two_processes_equal_one(warmed, warmed_run, tmp_path, flags):
    """The same prompts, samples, minibatches and gradients: all but the last digits agree."""
    done = torchrun(2, gbpo, **SHORT, model=warmed, output_dir=tmp_path, **dict.fromkeys(flags.split(), True))
    assert done.returncode == 0, done.stderr[-2000:]
    (run_dir,), run = tmp_path.iterdir(), warmed_run
    assert (run_dir / "episodes.csv").read_bytes() == (run / "episodes.csv").read_bytes()
    for two, one in zip(
        without_clock(read(run_dir / "metrics.csv")), without_clock(read(run / "metrics.csv")), strict=True
    ):
        assert two == pytest.approx(one, rel=2e-3, abs=1e-5)
    assert (run_dir / "evaluations.csv").read_bytes() == (run / "evaluations.csv").read_bytes()
    models = [transformers.AutoModelForCausalLM.from_pretrained(x / "model") for x in (run, run_dir)]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_process_without_a_problem_to_evaluate_keeps_up(warmed, warmed_run, tmp_path):
    done = torchrun(2, gbpo, **SHORT | {"eval_problems": 1}, model=warmed, output_dir=tmp_path, fsdp=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (run_dir,) = tmp_path.iterdir()
    assert (run_dir / "episodes.csv").read_bytes() == (warmed_run / "episodes.csv").read_bytes()


UNLIKE_RUN = """
import sys, torch, {script} as script

token_log_probs = script.token_log_probs

def rounded_otherwise(*args, **settings):
    log_probs, entropy = token_log_probs(*args, **settings)
    return log_probs * (1 + 0.01 * script.RANK), entropy

script.token_log_probs = rounded_otherwise
settings = dict(num_prompts=8, minibatch_prompts=4, group_size=4, eval_problems=8, eval_samples=2, device="cpu")

def watched(model, reference, *args):
    for x, y in zip(model.parameters(), reference.parameters(), strict=True):
        both = script.gather(x.detach().clone())
        assert torch.equal(*both) and torch.equal(x, y)
    print("ALIKE", file=sys.stderr)
    raise SystemExit(7)

script.make_minibatches = watched
script.train(script.Args(**settings, kl_coef=0.01, total_timesteps=32, warmup_accuracy=0.05))
"""


@pytest.mark.slow
def test_processes_start_from_the_same_built_in_model(tmp_path):
    """Although each is taught by itself, and may round differently; the initial model of the KL term, too."""
    (tmp_path / "run.py").write_text(UNLIKE_RUN.format(script="gbpo_llm"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(gbpo.__file__).parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stderr.count("ALIKE") == 2, done.stderr[-2000:]


# --- bad input


@SCRIPTS
@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--model", "/no/such"], "cannot load --model /no/such"),
        (["--eval-dataset", "missing.json"], "cannot read missing.json: FileNotFoundError"),
        (["--reward-fn", "nowhere:f"], "--reward-fn takes module:function"),
        (["--chat-template"], "the built-in model has no chat template"),
        (["--resume", "nowhere"], "cannot use the run nowhere"),
        (["--resume", ""], "cannot use the run "),  # as in --resume "$RUN" where RUN is not set
        (["--output-dir", "/proc/none", "--warmup-accuracy", "0"], "choose another --output-dir"),
        (["--eval-dataset", "empty.json"], "no usable row"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_created(script, arguments, part, monkeypatch, tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    rows = script.addition_rows()[:600]
    monkeypatch.setattr(script, "addition_rows", lambda: rows)
    with pytest.raises(script.BadInput, match=re.escape(part)) as error:
        script.train(script.read_args(["--device", "cpu", *arguments]))
    assert "\n" not in str(error.value) and [x.name for x in tmp_path.iterdir()] == ["empty.json"]


@SCRIPTS
def test_bad_input_ends_a_script_with_one_line_and_status_2(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, lines = command_line(script, ["--resume", "missing"], monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: cannot use the run missing")
    assert not list(tmp_path.iterdir())


def test_vllm_is_imported_only_when_asked_for(monkeypatch):
    """A None in sys.modules makes its import fail, as on a machine without it."""
    assert "vllm" not in sys.modules and "trl" not in sys.modules
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(gbpo.BadInput, match="vLLM is not installed"):
        gbpo.make_vllm(gbpo.Args(generator="vllm", model="x"))


VLLM_RUN = """
import sys, torch, {script} as script

generate, far = script.generate_vllm, []

def watched(engine, model, prompts, copies, limit, stop_ids, temperature, top_p):
    completions, log_probs = generate(engine, model, prompts, copies, limit, stop_ids, temperature, top_p)
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    for prompt, completion, theirs in zip(prompts, completions, log_probs):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
        ours = logits.log_softmax(-1)[range(len(completion)), completion]
        far.append((ours - torch.tensor(theirs)).abs().max().item())
    return completions, log_probs

script.generate_vllm = watched
settings = dict(generator="vllm", model="model", dataset="sums.jsonl", eval_dataset="sums.jsonl", device="cpu")
settings |= dict(num_prompts=8, minibatch_prompts=4, group_size=8, max_prompt_length=16, max_completion_length=4)
settings |= dict(total_timesteps=256, eval_problems=8, eval_samples=2, eval_top_p=1.0, learning_rate=1e-2)
settings |= dict(sampling_temperature=0.7)
script.train(script.Args(**settings, fsdp=script.WORLD_SIZE > 1))
print("FARTHEST", max(far), len(far), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@SCRIPTS
def test_vllm_samples_from_the_weights_that_the_trainer_has(script, processes, tmp_path):
    """vLLM's log-probabilities are the trainer's in every rollout, while the weights change; with FSDP2, too."""
    pytest.importorskip("vllm")
    tokenizer = script.make_model(script.Args(), torch.device("cpu"))[1]
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)  # 32 a head or more
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer), eos_token_id=1)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in (1, 2, 3) for b in (1, 2, 3)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    (tmp_path / "run.py").write_text(VLLM_RUN.format(script=script.__name__))
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    paths = {"PYTHONPATH": str(Path(script.__file__).parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, "run.py"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    far = [x.split() for x in done.stderr.splitlines() if x.startswith("FARTHEST")]
    assert len(far) == processes and all(float(x[1]) < 1e-3 for x in far), far
    rows = read(next((tmp_path / "runs").glob("*/metrics.csv")))
    assert len(rows) == 4 and max(abs(row["ratio/high_mean"] - 1) for row in rows) > 0.01  # the policy moved
