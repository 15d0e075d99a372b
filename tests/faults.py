"""Puts faults into the scripts, one at a time, and tells which of the quick tests finds each.

    python tests/faults.py                    all faults in all scripts
    python tests/faults.py 5 ppo_locomotion   the fault whose name begins with 5, in this script

Each fault goes into a temporary copy: no script knows another, so it is put into all that have the line at once, and
the tests that bear a script's name run until one fails. What siblings share is mostly run in BPO's scripts only: what
is found there and not in PPO's is put into PPO's alone, for test_siblings.py, which compares texts. Exit status 1 if a
fault is not found, or if a script has no longer the text that it replaces.
"""

import contextlib
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BPO, PPO = (tuple(f"{x}_{y}" for y in ("continuous_action", "atari_envpool", "locomotion")) for x in ("bpo", "ppo"))
CONTINUOUS, ATARI, ROBOTS = zip(BPO, PPO)
CONTROL, LLM = CONTINUOUS + ATARI + ROBOTS, ("gbpo_llm", "grpo_llm")
TABULAR = ("brrl_tabular",)
TESTS = dict.fromkeys(CONTROL, "objective training agents golden_values simulators bad_input")
TESTS |= dict.fromkeys(LLM, "llm llm_runs golden_values") | {"brrl_tabular": "brrl_tabular"}
# Which tests run first: number of the fault -> file and words of their names; all others follow if they find nothing.
FIRST = dict.fromkeys(("1", "4", "12", "15"), "objective literal_formulas") | {"11": "objective literal_formulas"}
FIRST |= dict.fromkeys(("2", "3"), "objective corollary") | dict.fromkeys(("4b", "6", "7"), "objective gae")
FIRST |= {"5": "objective gae or samples_are", "8": "objective samples_are", "16": "objective steps_equal"}
FIRST |= dict.fromkeys(("9", "10", "13", "17"), "training dummy") | {"14": "training linear", "21": "training own_one"}
FIRST |= dict.fromkeys(("18", "19", "20"), "training resum") | {"22": "training weights"}
FIRST_LLM = dict.fromkeys(("1", "2", "4", "12", "15", "24", "25"), "llm literal_formulas")
FIRST_LLM |= dict.fromkeys(("11", "23"), "llm group_advantages") | {
    "13": "llm each_completion",
    "27": "llm each_completion",
}
FIRST_LLM |= {"14": "llm_runs ttrls", "16": "golden_values recorded"} | dict.fromkeys(
    ("19", "20"), "llm_runs resumed_run_equals"
)
FIRST_LLM |= {"21": "llm_runs own_one", "22": "llm_runs break_are", "26": "llm padding or generation", "30": "llm vote"}
FIRST_LLM |= {"28": "golden_values steps", "29": "llm micro_batches"}
# Imported once, before the processes that run tests are forked. Scripts are not.
HEAVY = "envpool gymnasium hypothesis matplotlib.pyplot scipy.optimize torch.distributed.fsdp torch.utils.tensorboard "
HEAVY += "transformers.models.qwen2.modeling_qwen2 transformers.models.auto.modeling_auto "
HEAVY += "tensorboard.backend.event_processing.event_accumulator transformers tyro wandb datasets"

QUIET = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
CLIP = "x * (args.max_grad_norm / (x.norm() + 1e-6)).clamp(max=1.0) for x in gradients"
LOCK = 'self.enter_context(FileLock(self.dir / "lock", timeout=0))'
RATE = "args.learning_rate * (1 - state.step / args.total_timesteps)"
LATE_RATE = "args.learning_rate * (1 - (state.step + args.num_envs * args.num_steps) / args.total_timesteps)"
RATIO = 'log_ratio = policy.log_prob(batch["actions"])'
PRESENT = "    log_ratio = log_ratio - log_ratio.detach()"
VALID = 'rollout["valid"]'
OBS = f'rollout["obs"][:-1][{VALID}]'
ACT = "agent.policy(agent.normalize(state.obs))"
RESTORE = "part.load_state_dict(self.saved[name])"
KEEP = "* (k < len(parts))"
DISTANCE = "(target - ratio).abs() * (advantage.abs() + tv_coef)"
SURROGATE = "torch.minimum(ratio * advantage, ratio"

# name -> [(scripts, old text, new text, ...)]
FAULTS = {
    "1 sign of the policy loss": [
        ((*BPO, "gbpo_llm"), f"return {DISTANCE}", f"return -{DISTANCE}"),
        ((*PPO, "grpo_llm"), f"return -{SURROGATE}", f"return {SURROGATE}"),
        (TABULAR, "return np.abs(target - ratio)", "return -np.abs(target - ratio)"),
    ],
    "2 target above and below swapped": [
        ((*BPO, "gbpo_llm"), "sigmoid(median_advantage", "sigmoid(-median_advantage"),
        (TABULAR, "expit(median_advantage", "expit(-median_advantage"),
    ],
    "3 median loss without its shift": [
        (BPO, "softplus(math.log(c) - x", "softplus(-x"),
        (TABULAR, "logaddexp(0, log_c - x", "logaddexp(0, -x"),
    ],
    "4 lambda squared": [
        (BPO, "high, args.temperature * scale)\n    pg_loss", "high, args.temperature**2 * scale)\n    pg_loss"),
        (("gbpo_llm",), "args.target_temperature)\n    for", "args.target_temperature**2)\n    for"),
        (TABULAR, "expit(median_advantage / temperature", "expit(median_advantage / temperature**2"),
    ],
    "4b lambda of the trace squared": [(CONTROL, "gamma * gae_lambda *", "gamma * gae_lambda**2 *")],
    "5 truncation taken for termination": [
        (CONTROL, "values[1:] * ~terminated", "values[1:] * ~(terminated | truncated)"),
        (ROBOTS, "values[:-1] * (truncated & ~terminated)", "values[:-1] * 0"),  # where the next episode has begun
    ],
    "6 bootstrap through termination": [(CONTROL, "values[1:] * ~terminated -", "values[1:] -")],
    "7 trace not cut at truncation": [(CONTROL, "(~(terminated | truncated)).to", "(~terminated).to")],
    "8 valid not applied to the loss": [
        (CONTINUOUS, "x[valid] for", "x.flatten(0, 1) for"),
        (ATARI, f"{VALID}.flatten()", f"torch.ones_like({VALID}).flatten()"),
        (ROBOTS, f"x[{VALID}] for", "x.flatten(0, 1) for"),
    ],
    "9 valid not applied to the statistics": [
        (CONTINUOUS, OBS, 'rollout["obs"][:-1].flatten(0, 1)'),
        (ROBOTS, f'rollout["obs"][{VALID}]', 'rollout["obs"].flatten(0, 1)'),
        (ROBOTS, f'rollout["privileged"][:-1][{VALID}]', 'rollout["privileged"][:-1].flatten(0, 1)'),
        (CONTINUOUS, "torch.stack(history)[valid][:, None]", "torch.stack(history).view(-1, 1)"),  # of returns
    ],
    "10 valid not applied to the step count": [
        (CONTINUOUS, "int(valid[t].sum())", "valid[t].size"),
        (ATARI, "add_up(state.step, valid.sum(1)", "add_up(state.step, (valid | True).sum(1)"),
        (ROBOTS, "state.step + valid.sum(1)", "state.step + (valid | True).sum(1)"),
    ],
    "11 advantages scaled by the wrong deviation": [
        ((BPO[0], BPO[2]), "std = advantage.std(", "std = median_advantage.std("),
        ((PPO[0],), "(advantage.std() + 1e-8)", "(returns.std() + 1e-8)"),
        ((PPO[2],), "std = advantage.std(", "std = returns.std("),
        (ATARI, 'moments((batch["returns"] - batch["values"])[order])', 'moments(batch["returns"][order])'),
        (LLM, "rewards.std(-1, keepdim=True)", "rewards.std(-1, correction=0, keepdim=True)"),
    ],
    "12 old log-probabilities of the present policy": [
        (CONTINUOUS + ROBOTS, f'{RATIO}.sum(-1) - batch["log_probs"]', f"{RATIO}.sum(-1)\n{PRESENT}"),
        (ATARI, f'{RATIO} - batch["log_probs"]', f"{RATIO}\n{PRESENT}"),
        (LLM, '(log_probs - batch["old_log_probs"])', "(log_probs - log_probs.detach())"),
    ],
    "13 minibatches without the last samples": [
        (CONTINUOUS, "math.ceil(samples / args.minibatch_size)", "(samples // args.minibatch_size)"),
        (ATARI, "math.ceil(max(gather(len(rows))) / size)", "(max(gather(len(rows))) // size)"),
        (ROBOTS, "args.num_steps) % samples", "args.num_steps) % (samples - samples % args.num_minibatches - 1)"),
        (LLM, "range(0, len(groups), size)]", "range(0, len(groups) - size, size)]"),
    ],
    "14 linear schedule off by one iteration": [
        (CONTROL, RATE, LATE_RATE),
        (LLM, "learner, minibatches, run.step,", "learner, minibatches, step,"),
    ],
    "15 entropy with the wrong sign": [(CONTROL + LLM, "- args.ent_coef * entropy", "+ args.ent_coef * entropy")],
    "16 gradient clipped per network": [
        (CONTINUOUS + ROBOTS, "[x * clip for x in gradients]", f"[{CLIP}]"),
        (ATARI, "x.flatten() for x in gradients", f"x.flatten() for x in [{CLIP}]"),
        (LLM, "clip_grad_norm_(self.masters,", "clip_grad_norm_(self.masters[:1],"),
    ],
    "17 normaliser updated while acting": [
        (CONTINUOUS, "(agent.normalize(obs[t]))", "(agent.obs_stats.update(obs[t]) or agent.normalize(obs[t]))",
         f"agent.obs_stats.update({OBS})", "pass"),
        (ROBOTS, ACT, ACT.replace("agent.normalize", "agent.obs_stats.update(state.obs) or agent.normalize"),
         f'agent.obs_stats.update(rollout["obs"][{VALID}])', "pass"),
    ],
    "18 reward scaler reset on resume": [
        (CONTINUOUS, RESTORE, f"{RESTORE}\n            self.parts['agent'].return_stats.count.zero_()"),
    ],
    "19 optimizer not restored": [
        (CONTROL, f"{RESTORE}\n            torch.set", f"{RESTORE} if name == 'agent' else 0\n            torch.set"),
        (LLM, 'self.optimizer.load_state_dict(state["optimizer"])', "pass"),
    ],
    "20 logs not cut on resume": [(CONTROL + LLM, "os.truncate(path, size)", "pass")],
    "21 lock not taken": [
        (CONTROL + LLM, f"{LOCK}\n        git", "pass\n        git"),  # by a new run
        (CONTROL, f"{LOCK}\n            _, self.saved", "pass\n            _, self.saved"),  # by a resumed one
        (LLM, f"{LOCK}\n            settings, self", "pass\n            settings, self"),
    ],
    "22 weights that are not finite saved": [
        (CONTROL, 'if not all(x.isfinite().all() for x in self.parts["agent"].parameters()):', "if False:"),
        (LLM, "if not full(nn.utils.get_total_norm(self.learner.masters)).isfinite():", "if False:"),
    ],
    "23 advantages over the batch": [(LLM, "rewards.mean(-1, keepdim=True)", "rewards.mean()")],
    "24 mean over tokens for responses": [
        (LLM, '"response": mask / (mask.sum(1, keepdim=True).clamp(min=1) * responses)', '"response": mask / tokens'),
    ],
    "25 padding in the mean": [(LLM, '"response": mask / (', '"response": torch.ones_like(mask) / (')],
    "26 logits not divided by the temperature": [
        (LLM, "logits.float() / temperature).log_softmax", "logits.float()).log_softmax"),  # while learning
        (LLM, "(logits.float() / temperature).softmax", "logits.float().softmax"),  # while sampling
    ],
    "27 end of sequence not learned": [(LLM, KEEP, f'{KEEP} * (batch["ids"][:, -batch["mask"].shape[1] :] != 1)')],
    "28 reference log-probabilities of the policy": [
        (LLM, '("ref_log_probs", reference)', '("ref_log_probs", reference and model)'),
    ],
    "29 truncated completions learned when masked": [(LLM, "* args.mask_truncated", "* 0")],
    "30 a vote that counts None": [(LLM, "Counter(key for key in keys if key is not None)", "Counter(keys)")],
}  # fmt: skip


class First:
    """Notes, for every script, the first test under its name that fails; tests of what is found are left out."""

    def __init__(self, scripts):
        self.found = dict.fromkeys(scripts)

    def scripts_of(self, test):
        own = test.partition("[")[2]
        return [x for x in self.found if (x[:4] if x in LLM else x) in own or x in TABULAR]

    def pytest_collection_modifyitems(self, items):
        """All tests that name no script, or two, say nothing of one."""
        items[:] = [x for x in items if len(self.scripts_of(x.nodeid)) == 1]

    def pytest_runtest_setup(self, item):
        if self.found[self.scripts_of(item.nodeid)[0]]:
            pytest.skip("found")

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.found[(script := self.scripts_of(report.nodeid)[0])]:
            self.found[script] = report.nodeid.removeprefix("tests/")


def sibling(script):
    """The script in which the tests of shared text run."""
    return script.replace("ppo_", "bpo_").replace("grpo_", "gbpo_")


def find(case):
    """For each script, the test that finds its fault or why none does. It runs in a process that ends with it."""
    name, scripts, *texts = case
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "results"))
        first, whole = First(scripts), {x: (copy / f"{x}.py").read_text() for x in scripts}
        for script in scripts:
            text = whole[script]
            for old, new in zip(texts[::2], texts[1::2]):
                if old not in text:
                    first.found[script] = f"NOT FOUND: the script has no longer {old}"
                text = text.replace(old, new)
            (copy / f"{script}.py").write_text(text)
        os.chdir(copy)
        sys.path[0] = str(copy / "tests")  # where this file's own folder was
        files, hint = TESTS[scripts[0]].split(), (FIRST_LLM if scripts[0] in LLM else FIRST).get(name.split()[0])
        runs = [] if hint is None or scripts[0] in TABULAR else [hint.split(" ", 1)]
        runs += [(file, "not table") for file in files]
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            for file, words in runs:
                if not all(first.found.values()):
                    pytest.main([*QUIET, "-k", words, f"tests/test_{file}.py"], plugins=[first])
            faulty = {x: (copy / f"{x}.py").read_text() for x in scripts}
            for script in [x for x in scripts if not first.found[x] and first.found.get(sibling(x))]:
                for other, text in whole.items():
                    (copy / f"{other}.py").write_text(faulty[other] if other == script else text)
                status = pytest.main([*QUIET, "-k", "share or same", "tests/test_siblings.py"])
                if status == pytest.ExitCode.TESTS_FAILED:
                    first.found[script] = "test_siblings.py, in this script alone"
        os.chdir(ROOT)
        return name, {script: test or "NOT FOUND" for script, test in first.found.items()}


def main(words):
    numbers, chosen = [x for x in words if x[0].isdigit()], [x for x in words if not x[0].isdigit()]
    chosen += [sibling(x) for x in chosen]
    cases = [
        (name, [x for x in scripts if not chosen or x in chosen], *texts)
        for name, places in FAULTS.items()
        for scripts, *texts in places
        if not numbers or name.split()[0] in numbers
    ]
    torch.set_num_threads(1)
    for module in HEAVY.split():
        importlib.import_module(module)
    count = missed = 0
    print("| fault | script | found by |\n|-|-|-|")
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        for name, found in pool.imap(find, split(cases), chunksize=1):
            for script, test in found.items():
                count, missed = count + 1, missed + test.startswith("NOT FOUND")
                print(f"| {name} | {script} | {test} |", flush=True)
    print(f"{count} faults, {missed} not found")
    sys.exit(missed > 0)


def split(cases):
    """A case for each kind of script: each kind has its own tests."""
    for name, scripts, *texts in cases:
        for kind in (CONTROL, LLM, TABULAR):
            if own := [x for x in scripts if x in kind]:
                yield name, own, *texts


if __name__ == "__main__":
    main(sys.argv[1:])
