"""What the scripts share is the same text, what differs is what they say; options have help, functions are short."""

import ast
import difflib
import importlib
import re
import subprocess
import sys

import pytest
from common import CONTROL, ROOT, options_without_help
from faults import FAULTS

NAMES = [*(x.__name__ for x in CONTROL), "gbpo_llm", "grpo_llm"]
PAIRS = [("ppo_continuous_action", "bpo_continuous_action"), ("ppo_atari_envpool", "bpo_atari_envpool")]
PAIRS += [("ppo_locomotion", "bpo_locomotion"), ("grpo_llm", "gbpo_llm")]

# Functions and classes of the pairs for control that may have lines of their own, and their own options.
OWN_LINES = {
    "ppo_continuous_action": "docstring Args ratio_bounds policy_loss spo_loss minibatch_loss",
    "bpo_continuous_action": "docstring Args ratio_bounds target_ratio policy_loss median_loss minibatch_loss "
    "measure_advantages distance Agent prepare measure",
    "ppo_atari_envpool": "docstring Args ratio_bounds policy_loss minibatch_loss",
    "ppo_locomotion": "docstring Args ratio_bounds policy_loss minibatch_loss measure_advantages prepare",
    "bpo_locomotion": "docstring Args ratio_bounds target_ratio policy_loss median_loss minibatch_loss "
    "measure_advantages Agent prepare measure",
}
OWN_LINES["bpo_atari_envpool"] = OWN_LINES["bpo_continuous_action"]
OF_BPO = "ratio_low ratio_high temperature median_temperature median_network median_coef tv_coef "
OF_BPO += "recompute_advantages "
OWN_OPTIONS = {
    "ppo_continuous_action": "objective",
    "bpo_continuous_action": OF_BPO + "divergence",
    "ppo_atari_envpool": "update_epochs clip_coef norm_adv ent_coef",
    "bpo_atari_envpool": OF_BPO + "clip_coef divergence update_epochs norm_adv ent_coef",
    "ppo_locomotion": "update_epochs clip_coef vf_coef clip_vloss ent_coef",
    "bpo_locomotion": OF_BPO + "clip_coef update_epochs vf_coef clip_vloss ent_coef",
}
# Functions and classes of the pair for language models that differ: GRPO's objectives and GBPO's target, DAPO's bound
# and its resampling, the median, equation numbers.
OF_LANGUAGE = "Args ratio_bounds group_advantages minibatch_loss make_minibatches make_minibatch rollout"
# What a script has in words of its own, of all that carries a name of the script for continuous actions.
OTHER = {
    "atari_envpool": "Args minibatch_loss measure_advantages policy_change critic Agent make_envs collect prepare "
    "make_optimizer minibatch_gradient update measure train compiled read_args",
    "locomotion": "Args minibatch_loss mlp critic Agent make_envs require_finite collect prepare update measure "
    "make_optimizer train compiled measure_advantages",
    "llm": "Args minibatch_loss train Run read_args update measure",
}


def parse(name):
    """The script's lines, its syntax tree, and the name of the top-level function or class that each line is in."""
    text = (ROOT / f"{name}.py").read_text()
    owners, tree = [""] * (len(text.splitlines()) + 1), ast.parse(text)
    for node in tree.body:
        owner = "docstring" if node is tree.body[0] else getattr(node, "name", "")
        owners[node.lineno : node.end_lineno + 1] = [owner] * (node.end_lineno + 1 - node.lineno)
    return text.splitlines(), tree, owners[1:]


def definitions(name):
    """Source text of every top-level function and class."""
    lines, tree, _ = parse(name)
    return {x.name: "\n".join(lines[x.lineno - 1 : x.end_lineno]) for x in tree.body if hasattr(x, "name")}


@pytest.mark.parametrize("ppo, bpo", PAIRS[:3])
def test_siblings_share_all_but_the_algorithm(ppo, bpo):
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


def test_siblings_for_language_models_share_all_but_the_algorithm():
    theirs, ours = map(definitions, PAIRS[3])
    assert set(ours) - set(theirs) == {"target_ratio", "policy_loss", "exact_baseline"}
    losses = {f"{name}_loss" for name in ("grpo", "gspo", "sapo")}
    assert set(theirs) - set(ours) == losses | {"mean_log_ratio"}
    assert {name for name in ours if name in theirs and ours[name] != theirs[name]} == set(OF_LANGUAGE.split())


@pytest.mark.parametrize(
    "name", ["bpo_atari_envpool", "bpo_locomotion", "gbpo_llm", "ppo_atari_envpool", "ppo_locomotion"]
)
def test_what_scripts_call_the_same_is_the_same_text(name):
    ours = definitions(name)
    theirs = definitions("ppo_continuous_action" if name.startswith("ppo") else "bpo_continuous_action")
    shared = ours.keys() & theirs.keys() - set(OTHER[name.split("_", 1)[1]].split())
    assert {"BadInput", "BrokenRun", "say", "write_atomically", "one_line", "load_run", "policy_loss"} <= shared
    assert {"Run", "compute_gae", "value_loss"} <= shared or name == "gbpo_llm"
    assert [x for x in shared if ours[x] != theirs[x]] == []


def test_language_models_stop_as_the_others_do():
    methods = [re.search(r"    def request_stop.*?(?=\n    def )", definitions(x)["Run"], re.S)[0] for x in NAMES]
    assert len(set(methods)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_functions_are_short_and_no_file_of_this_project_is_imported(name):
    nodes = list(ast.walk(parse(name)[1]))
    lengths = {x.name: x.end_lineno - x.lineno + 1 for x in nodes if isinstance(x, ast.FunctionDef)}
    assert len(lengths) > 30 and max(lengths.values()) <= 60, max(lengths, key=lengths.get)
    imported = [alias.name for x in nodes if isinstance(x, ast.Import) for alias in x.names]
    imported += [x.module for x in nodes if isinstance(x, ast.ImportFrom)]
    names = {x.split(".")[0] for x in imported}
    assert "torch" in names and not [x for x in names if (ROOT / f"{x}.py").exists() or (ROOT / x).is_dir()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_help_text(name, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit):
        script.read_args(["--help"])
    assert options_without_help(script, capsys.readouterr().out) == []


# Table 2 and Table 3, rows Go1-Rough, and RSL-RL's settings where the tables are silent.
TABLE = dict(num_steps=24, num_minibatches=4, gamma=0.99, gae_lambda=0.95, lr_schedule="adaptive", desired_kl=0.01)
TABLE |= dict(max_grad_norm=1.0, hidden_sizes=(512, 256, 128), norm_adv=True)
TABLES = {"bpo": TABLE | dict(clip_coef=0.3, ent_coef=0.001, update_epochs=10, vf_coef=0.5, clip_vloss=False)}
TABLES["bpo"] |= dict(temperature=0.001, median_temperature=None, median_coef=0.5, tv_coef=0.0)
TABLES["ppo"] = TABLE | dict(clip_coef=0.2, ent_coef=0.01, update_epochs=5, vf_coef=1.0, clip_vloss=True)


@pytest.mark.parametrize("name", TABLES)
def test_defaults_for_robots_are_the_papers_tables(name):
    args = importlib.import_module(f"{name}_locomotion").Args()
    assert {x: getattr(args, x) for x in TABLES[name]} == TABLES[name]


def test_every_known_fault_still_has_its_place_in_the_scripts():
    """Else faults.py, which takes minutes and is run by hand, would be the first to say so."""
    text = {name: (ROOT / f"{name}.py").read_text() for name in [*NAMES, "brrl_tabular"]}
    for fault, parts in FAULTS.items():
        for scripts, *pairs in parts:
            for script in scripts:
                assert all(old in text[script] for old in pairs[::2]), (fault, script)


@pytest.mark.slow
def test_importing_a_script_imports_no_simulator_and_creates_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(NAMES)}; "
    code += "print({'mjlab', 'warp', 'isaaclab', 'mujoco', 'envpool'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, list(tmp_path.iterdir())) == (0, "set()\n", []), run.stderr
