"""Group-relative Bounded Policy Optimization (GBPO) for language models, in one file.

GBPO (Ao et al., "Bounded Ratio Reinforcement Learning", section 4.5) samples a group of completions for each prompt,
scores them, and moves the probability ratio of every token towards a target that depends on how the completion compares
with its group's median. Without arguments it teaches a tiny transformer, made here, to add two-digit numbers.

    python gbpo_llm.py
    python gbpo_llm.py --model Qwen/Qwen2.5-Math-1.5B --dataset problems.json --reward boxed ...  (see docs/gbpo_llm.md)

What differs from the sibling, grpo_llm.py:
1. target_ratio: the optimal ratio pi*/pi_0, a sigmoid of the median advantage (Theorem 4.1, Corollary 4.7).
2. policy_loss: the distance of the ratio from that target, weighted by abs(advantage) (section 4.5), not a clip.
3. group_advantages: measured from the group's median as well, for the target.
"""

import dataclasses
import functools
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Literal

import tokenizers
import torch
import torch.distributed as dist
import torch.nn as nn
import transformers
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

SCRIPT = Path(__file__).stem
STOP = []  # signals received: a first Ctrl-C or SIGTERM ends the run after the iteration, with a checkpoint
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # of this machine's processes


class BadInput(ValueError):
    """Input that cannot work: printed as one line, exit status 2."""


@dataclass
class Args:
    env_id: str = "addition"
    """name of the task in folders and plots; two-digit addition is built in, --dataset brings others"""
    dataset: str | None = None
    """problems with prompt and answer: a JSON, JSONL or Parquet file, or ID, ID:SPLIT or ID:CONFIG:SPLIT on the Hub"""
    eval_dataset: str | None = None
    """held-out problems, in the same forms; default: those of --dataset, as test-time training does"""
    model: str | None = None
    """folder or Hub id of a causal language model; default: a tiny one, warmed up on addition by supervised learning"""
    chat_template: bool = False
    """wrap prompts in the tokenizer's chat template"""
    system_prompt: str | None = None
    """system message of the chat template"""
    reward: Literal["exact", "boxed", "majority"] = "exact"
    """1 for the right number: the whole completion, in the last \\boxed{}, or (TTRL) the one that most samples gave"""
    reward_fn: str | None = None
    """module:function in place of --reward; called as TRL calls it: (prompts, completions, **columns) -> floats"""
    num_votes: int = 64
    """completions that vote on the label with --reward majority; the first --group-size of them are trained on"""
    seed: int = 1
    """seed of the initial weights, the prompts, the sampling and the minibatches"""
    total_timesteps: int = 81_920
    """completions to sample for training"""
    num_prompts: int = 64
    """prompts per iteration, all processes together"""
    group_size: int = 8
    """completions per prompt"""
    minibatch_prompts: int = 16
    """prompts (whole groups) per gradient step, all processes together"""
    update_epochs: int = 1
    """passes over the rollout per iteration"""
    learning_rate: float = 3e-4
    """AdamW's step size (the initial one if it is scheduled)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """linear, cosine: falls towards 0"""
    lr_warmup: int = 20
    """gradient steps over which the learning rate rises from 0"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    max_prompt_length: int = 512
    """tokens; longer prompts are left out"""
    max_completion_length: int = 4
    """tokens after which a completion is cut off"""
    sampling_temperature: float = 1.0
    """temperature of the policy, while sampling and while learning"""
    clip_coef: float = 0.2
    """epsilon: the ratio's bounds are 1 - epsilon and 1 + epsilon"""
    ratio_low: float | None = None
    """lower bound c_l of the ratio, in place of 1 - epsilon (Corollary 4.7)"""
    ratio_high: float | None = None
    """upper bound c_h of the ratio, in place of 1 + epsilon (Corollary 4.7)"""
    target_temperature: float = 1e-4
    """lambda of Theorem 4.1, in units of the group's standard deviation, or of reward with --scale-rewards none"""
    tv_coef: float = 0.0
    """alpha_1: weight of the plain total variation beside the advantage-weighted one (Eq. 16)"""
    aggregation: Literal["response", "token", "constant"] = "response"
    """mean over each response, then over all (paper); over tokens (authors' code); sum over the length limit"""
    scale_rewards: Literal["unbiased", "biased", "none"] = "unbiased"
    """divide by the group's std + 1e-6 with n - 1 (authors, TRL), by sqrt(var + 1e-6) with n, or not at all"""
    resample_rounds: int = 0
    """draws of new prompts, per iteration, to replace groups whose rewards are all equal (DAPO's dynamic sampling)"""
    mask_truncated: bool = False
    """leave completions that were cut off out of the loss"""
    kl_coef: float = 0.0
    """weight of the KL divergence (k3 estimate) to the initial model"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    warmup_accuracy: float = 0.4
    """the supervised phase of the built-in model ends when its samples are right this often"""
    eval_interval: int = 10
    """iterations between evaluations on held-out problems"""
    eval_problems: int = 200
    """held-out problems to evaluate on, at most"""
    eval_samples: int = 8
    """completions per held-out problem: pass@1 is their mean score, maj@k the score of their most common answer"""
    eval_temperature: float = 0.6
    """sampling temperature of evaluations"""
    eval_top_p: float = 0.95
    """evaluations sample from the most likely tokens that together have this probability"""
    generator: Literal["transformers", "vllm"] = "transformers"
    """what samples completions; vllm (for --model, an optional install) shares the device and gets every new weight"""
    vllm_memory: float = 0.4
    """fraction of the device's memory that vLLM may take"""
    generation_batch_size: int = 1024
    """completions sampled at a time, but at least all of one prompt"""
    micro_batch_tokens: int = 16_384
    """tokens per forward and backward pass, padding included: lower it when memory runs out"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the model's weights; the optimizer keeps float32 copies, log-probabilities are float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: slower, less memory"""
    fsdp: bool = False
    """shard the weights over torchrun's processes (FSDP2); without it every process holds them all"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""
    output_dir: str = "runs"
    """folder that receives this run's folder"""
    checkpoint_interval: int = 20
    """iterations between checkpoints"""
    resume: str | None = None
    """RUN_DIR: continue this interrupted run with the settings it was started with"""
    evaluate: str | None = None
    """RUN_DIR: evaluate this run's final model instead of training"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline works without an account)"""
    wandb_project: str = "bounded-ratio-rl"
    """Weights & Biases project"""


def ratio_bounds(args):
    """Bounds (c_l, c_h) of the ratio between new and old policy."""
    low = 1 - args.clip_coef if args.ratio_low is None else args.ratio_low
    return low, 1 + args.clip_coef if args.ratio_high is None else args.ratio_high


def check_args(args):
    """Raises BadInput with one line that says what to change."""
    for names, holds, rule in (
        ("total_timesteps num_prompts minibatch_prompts update_epochs", lambda x: x >= 1, "at least 1"),
        ("max_prompt_length max_completion_length num_votes", lambda x: x >= 1, "at least 1"),
        ("eval_interval eval_problems eval_samples", lambda x: x >= 1, "at least 1"),
        ("generation_batch_size micro_batch_tokens checkpoint_interval", lambda x: x >= 1, "at least 1"),
        ("group_size", lambda x: x >= 2, "at least 2: a group of one has nothing to compare with"),
        ("learning_rate max_grad_norm clip_coef", lambda x: 0 < x < math.inf, "positive and finite"),
        ("target_temperature sampling_temperature eval_temperature", lambda x: 0 < x < math.inf, "positive and finite"),
        ("tv_coef kl_coef ent_coef weight_decay", lambda x: 0 <= x < math.inf, "finite and not negative"),
        ("lr_warmup resample_rounds", lambda x: x >= 0, "not negative"),
        ("eval_top_p vllm_memory", lambda x: 0 < x <= 1, "within (0, 1]"),
        ("warmup_accuracy", lambda x: 0 <= x < 1, "within [0, 1)"),
        ("seed", lambda x: 0 <= x < 2**31, "within [0, 2^31)"),
    ):
        for name in names.split():
            if (value := getattr(args, name)) is not None and not holds(value):
                raise BadInput(f"--{name.replace('_', '-')} must be {rule}, got {value}")
    low, high = ratio_bounds(args)
    if not 0 <= low < 1 < high < math.inf:
        raise BadInput(f"the ratio's bounds must satisfy 0 <= low < 1 < high, got {low} and {high}")
    if args.num_prompts % args.minibatch_prompts or args.minibatch_prompts % WORLD_SIZE:
        rule = f"--minibatch-prompts must divide --num-prompts and be a multiple of the {WORLD_SIZE} processes"
        raise BadInput(f"{rule}, got {args.minibatch_prompts} and {args.num_prompts}")
    if args.reward == "majority" and not args.reward_fn and args.num_votes < args.group_size:
        raise BadInput(f"--num-votes must be at least --group-size, got {args.num_votes} and {args.group_size}")
    if args.env_id != "addition" and not args.dataset:
        raise BadInput(f"there is no built-in task {args.env_id}: pass --dataset, or --env-id addition")
    if args.system_prompt and not args.chat_template:
        raise BadInput("--system-prompt is a part of the chat template: add --chat-template")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: there is no GPU that PyTorch can use; leave it out to run on the CPU")
    if args.device != "cpu" and 0 < (gpus := torch.cuda.device_count()) <= LOCAL_RANK:
        raise BadInput(f"every process needs its own GPU, and there are {gpus}: start as many, or pass --device cpu")
    if args.dataset and not args.model:
        raise BadInput("--dataset needs --model: the built-in model can read sums only")
    if args.generator == "vllm" and not args.model:
        raise BadInput("--generator vllm needs --model")
    if args.fsdp and WORLD_SIZE == 1:
        raise BadInput("--fsdp shards over several processes: start the script with torchrun --nproc-per-node N")


# ------------------------------------------------------------------------------------------------------------ problems


def read_rows(source):
    """Rows (a list) of a JSON, JSONL or Parquet file, or of a dataset on the Hub; BadInput if there are none."""
    path = Path(source)
    try:
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text()
            return json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.split("\n") if x]
        import datasets

        datasets.disable_progress_bars()
        if path.suffix == ".parquet":
            if not path.is_file():
                raise FileNotFoundError(2, "there is no such file")
            return datasets.Dataset.from_parquet(source, cache_dir=None).to_list()
        name, *parts = source.split(":")
        return datasets.load_dataset(name, *parts[:-1], split=parts[-1] if parts else "train").to_list()
    except ImportError:
        raise BadInput(f"{source} needs the package datasets: install it, or pass a .json or .jsonl file") from None
    except (OSError, ValueError, RecursionError) as error:  # the package's own errors, too
        raise BadInput(f"cannot read {source}: {str(getattr(error, 'strerror', None) or error)[:200]}") from None


def usable_problems(rows, source, args, tokenizer, answers=True):
    """Problems (dicts): the source's rows, with the prompt's tokens and the answer's number.

    Bad rows are named, counted and left out; BadInput if none is left. answers: whether a row needs one.
    """
    problems, bad = [], []
    for i, row in enumerate(rows if isinstance(rows, list) else []):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        number = parse_number(str(row.get("answer"))) if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt:
            bad.append(f"row {i} has no prompt")
        elif re.search("[\ud800-\udfff]", prompt):
            bad.append(f"row {i} has half a character in its prompt")
        elif number is None and answers and not args.reward_fn:
            bad.append(f"row {i} has no number as its answer")
        elif len(ids := encode(prompt, args, tokenizer)) > args.max_prompt_length:
            bad.append(f"row {i} has a prompt of {len(ids)} tokens")
        else:
            problems.append({"row": row, "prompt": prompt, "ids": ids, "number": number})
    if not problems:
        raise BadInput(f"{source} has no usable row: {'; '.join(bad[:3]) or 'it must be a list of rows'}")
    if bad and RANK == 0:
        named = "; ".join(bad[:5]) + "; ..." * (len(bad) > 5)
        print(f"{source}: {len(bad)} of {len(rows)} rows left out ({named})", file=sys.stderr)
    return problems


def encode(prompt, args, tokenizer):
    """Tokens of a prompt (a list), in the chat template if asked for."""
    if not args.chat_template:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "system", "content": args.system_prompt}] * bool(args.system_prompt)
    messages += [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def addition_rows():
    """All sums of two numbers from 10 to 99, in random order: a list of rows."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    order = torch.randperm(len(pairs), generator=make_generator("addition")).tolist()
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in (pairs[i] for i in order)]


def make_problems(args, tokenizer):
    """Problems to train on and held-out ones: two lists."""
    if args.dataset:
        labelled = args.reward != "majority"  # whose votes need no answers
        problems = usable_problems(read_rows(args.dataset), args.dataset, args, tokenizer, answers=labelled)
        held_out = [x for x in problems if x["number"] is not None or args.reward_fn]
    else:
        rows, source = addition_rows(), "the built-in task"
        problems, held_out = (usable_problems(x, source, args, tokenizer) for x in (rows[500:], rows[:500]))
    if args.eval_dataset:
        held_out = usable_problems(read_rows(args.eval_dataset), args.eval_dataset, args, tokenizer)
    if not held_out:
        raise BadInput(f"{args.dataset} has no answers to evaluate with: pass --eval-dataset")
    if args.fsdp and args.generator == "vllm" and min(len(held_out), args.eval_problems) < WORLD_SIZE:
        raise BadInput(f"--fsdp --generator vllm needs a held-out problem for each of the {WORLD_SIZE} processes")
    return problems, held_out


# ------------------------------------------------------------------------------------------------------------- rewards
# A completion is untrusted text: it is matched by bounded expressions, never evaluated.

WHOLE = r"[0-9]{1,40}|[0-9]{1,3}(?:,[0-9]{3}){1,12}|(?=\.[0-9])"  # the last: nothing, as in .5
NUMBER = re.compile(rf"([+-]?)({WHOLE})(?:\.([0-9]{{0,40}}))?(?:/([0-9]{{1,40}}))?")
FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([0-9]{1,40})\}\{([0-9]{1,40})\}")


def parse_number(text):
    """The number that the text is, as a Fraction, or None: 142, -1,000, 0.5, 3/4, \\frac{3}{4}, each also within $."""
    if len(text) > 200:
        return None
    text = text.strip().strip("$").strip()
    if match := FRACTION.fullmatch(text):
        sign, top, bottom = match.groups()
        decimals = ""
    elif match := NUMBER.fullmatch(text):
        sign, top, decimals, bottom = match.groups()
    else:
        return None
    top, bottom = int(top.replace(",", "") + (decimals or "")), int(bottom or 1) * 10 ** len(decimals or "")
    return Fraction(-top if sign == "-" else top, bottom) if bottom else None


def extract_answer(text, reward):
    """The number that a completion gives, or None: in the last \\boxed{} (of at most 200 characters) or as a whole."""
    start = text.rfind("\\boxed{")
    if reward == "exact" or (reward == "majority" and start < 0):
        return parse_number(text)
    depth, inside = 1, text[start + 7 : start + 207] if start >= 0 else ""
    for i, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return parse_number(inside[:i])
    return None


def load_function(name):
    """The function that module:function names; BadInput if there is none."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"--reward-fn takes module:function, and {name} cannot be loaded: {error}") from None
    finally:
        sys.path.pop(0)


def true_rewards(problems, texts, args):
    """Rewards [P, G] of P groups of G texts, by --reward-fn or the true answers, and no statistics."""
    if args.reward_fn:
        each = [problem for problem, group in zip(problems, texts) for _ in group]
        given = ("prompt", "prompts", "completions")
        names = dict.fromkeys(name for problem in problems for name in problem["row"] if name not in given)
        columns = {name: [problem["row"].get(name) for problem in each] for name in names}
        flat = [text for group in texts for text in group]
        rewards = load_function(args.reward_fn)(prompts=[x["prompt"] for x in each], completions=flat, **columns)
        try:
            rewards = [float(x) for x in rewards]
        except (TypeError, ValueError):  # not a list, or None (TRL's "not applicable") among them
            rewards = []
        if len(rewards) != len(flat) or not all(map(math.isfinite, rewards)):
            raise SystemExit(f"error: {args.reward_fn} must return {len(flat)} finite numbers, one per completion")
        return torch.tensor(rewards, dtype=torch.float64).view(len(texts), -1), {}
    right = [[extract_answer(x, args.reward) == p["number"] for x in group] for p, group in zip(problems, texts)]
    return torch.tensor(right, dtype=torch.float64), {}


def majority_vote(keys):
    """The most common key that is not None, the earliest of equals; None if there is none."""
    counts = Counter(key for key in keys if key is not None)
    return max(counts, key=counts.get) if counts else None


def majority_rewards(problems, texts, args):
    """TTRL: 1 for the label that most of a group's votes gave: rewards [P, V], and statistics against the truth [P],
    NaN where it is not known."""
    keys = [[extract_answer(text, args.reward) for text in group] for group in texts]
    labels = [majority_vote(group) for group in keys]
    rewards = torch.tensor([[k is not None and k == label for k in x] for x, label in zip(keys, labels)]).double()
    known = torch.tensor([math.nan if p["number"] is None else 1.0 for p in problems]).double()
    stats = {
        "ttrl/label_accuracy": known * torch.tensor([a == p["number"] for a, p in zip(labels, problems)]),
        "ttrl/majority_ratio": rewards.mean(1),
        "ttrl/ground_truth_ratio": known * true_rewards(problems, texts, args)[0].mean(1),
    }
    return rewards, stats


# --------------------------------------------------------------------------------------------------------------- model


def make_model(args, device):
    """Model and tokenizer: those of --model, or new tiny ones; BadInput if they cannot be loaded."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.model:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                args.model, dtype=getattr(torch, args.dtype), trust_remote_code=False, output_loading_info=True
            )
        except Exception as error:  # a missing folder, no network, no weights, an unknown architecture: many kinds
            raise BadInput(f"cannot load --model {args.model}: {str(error).splitlines()[0][:200]}") from None
        if missing := sorted(loading["missing_keys"]):  # transformers would draw them at random
            raise BadInput(f"--model {args.model} is no whole language model: it has no weights for {missing[0]}")
        with torch.no_grad():
            if not hasattr(model(torch.tensor([[0]]), use_cache=True), "past_key_values"):
                raise BadInput(f"--model {args.model} keeps no key-value cache, which sampling needs")
        if tokenizer.eos_token_id is None:
            raise BadInput(f"the tokenizer of {args.model} has no end-of-sequence token")
    else:
        vocabulary = {x: i for i, x in enumerate(["<pad>", "<eos>", *"0123456789+="])}
        characters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
        characters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
        characters.decoder = tokenizers.decoders.Fuse()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>"
        )
        torch.manual_seed(args.seed)
        config = transformers.Qwen2Config(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            initializer_range=0.1,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
        )
        model = transformers.Qwen2ForCausalLM(config).to(getattr(torch, args.dtype))
    if args.chat_template and not tokenizer.chat_template:
        name = args.model or "the built-in model"
        raise BadInput(f"the tokenizer of {name} has no chat template: leave out --chat-template")
    if args.gradient_checkpointing:  # transformers' own works in training mode only, which brings dropout
        layers = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
        if not layers:
            raise BadInput(f"{args.model} has no layers to recompute: leave out --gradient-checkpointing")
        for layer in layers:
            layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return model.to(device).eval(), tokenizer  # eval: no dropout, while learning neither


def warm_up(model, tokenizer, problems, args):
    """Supervised learning of the built-in model on right answers, until its samples are right often enough."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    generator = make_generator("supervised", args.seed)
    answers = tokenizer([problem["row"]["answer"] + "<eos>" for problem in problems])["input_ids"]
    accuracy, step = 0.0, 0
    while accuracy < args.warmup_accuracy and not STOP:
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20)
        rows = torch.randint(len(problems), (128,), generator=generator).tolist()
        batch = collate([problems[i]["ids"] for i in rows], [answers[i] for i in rows], 0, model.device)
        log_probs, _ = token_log_probs(model, batch, 1.0, entropy=False)
        log_probs = log_probs * batch["mask"]
        accuracy = 0.9 * accuracy + 0.1 * log_probs.detach().sum(1).exp().mean().item()  # chance of a right sample
        (-log_probs.sum() / batch["mask"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if not math.isfinite(accuracy) or step == 5000:
            raise SystemExit(
                f"error: after {step} supervised steps {accuracy:.2f} of the samples are right; another --seed?"
            )
    return step


def positions(attention_mask):
    """Position of each token, counted from the first that is not padding: [B, L] -> [B, L]"""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def collate(prompts, completions, pad, device):
    """Lists of B prompts and completions (lists of tokens) as tensors, padded on the outside to L = Lp + T tokens.

    Returns ids[B, L], attention_mask[B, L], and the completions' mask[B, T], as floats.
    """
    before, after = max(map(len, prompts)), max(map(len, completions))
    rows = list(zip(prompts, completions))
    ids = [[pad] * (before - len(p)) + p + c + [pad] * (after - len(c)) for p, c in rows]
    mask = [[0] * (before - len(p)) + [1] * len(p + c) + [0] * (after - len(c)) for p, c in rows]
    ids, mask = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
    left_padded = min(map(len, prompts)) < before
    return {"ids": ids, "attention_mask": mask, "mask": mask[:, before:].float(), "left_padded": left_padded}


def token_log_probs(model, batch, temperature, entropy=True, entropy_gradient=False):
    """Log-probability and entropy (or None) of each completion token under the policy, in float32 and nats: [B, T] each

    The entropy takes memory of the size of all logits.
    """
    length = batch["mask"].shape[1]
    ids, mask = batch["ids"][:, :-1], batch["attention_mask"][:, :-1]
    inputs = dict(use_cache=False, logits_to_keep=length)
    if batch["left_padded"]:  # causal attention sees no padding on the right, and is faster without a mask
        inputs |= dict(attention_mask=mask, position_ids=positions(mask))
    log_probs = (model(ids, **inputs).logits.float() / temperature).log_softmax(-1)
    chosen = log_probs.gather(-1, batch["ids"][:, -length:, None]).squeeze(-1)
    if not entropy:
        return chosen, None
    log_probs = log_probs if entropy_gradient else log_probs.detach()
    return chosen, -(log_probs.exp() * log_probs).sum(-1)


def sample_tokens(logits, uniforms, temperature, top_p):
    """Tokens [B] drawn from logits [B, V] by inverting the cumulative distribution at uniforms [B]."""
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        probs, order = probs.sort(-1, descending=True)
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    cumulative = probs.cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    tokens = tokens.clamp(max=probs.shape[1] - 1)
    return (order.gather(-1, tokens) if top_p < 1 else tokens).squeeze(-1)


@torch.no_grad()
def generate(model, prompts, uniforms, stop_ids, temperature, top_p, batch_size):
    """Samples G completions of at most T tokens for each of P prompts (lists of tokens), with a key-value cache.

    uniforms[P, G, T] decide every token, so a completion does not depend on what is sampled beside it.
    Returns P * G completions as lists of tokens, each with its end-of-sequence token unless it was cut off.
    """
    (_, copies, limit), device = uniforms.shape, model.device
    stop_ids, completions = torch.tensor(stop_ids, device=device), []
    for start in range(0, len(prompts), count := max(1, batch_size // copies)):
        part = prompts[start : start + count]
        batch = collate(part, [[]] * len(part), 0, device)
        mask = batch["attention_mask"]
        output = model(
            batch["ids"], attention_mask=mask, position_ids=positions(mask), use_cache=True, logits_to_keep=1
        )
        cache, logits = output.past_key_values, output.logits[:, -1].repeat_interleave(copies, 0)
        # Each prompt is read once. Only this way of repeating works for states of convolutions, too.
        cache.reorder_cache(torch.arange(len(part), device=device).repeat_interleave(copies))
        mask, noise = mask.repeat_interleave(copies, 0), uniforms[start : start + count].flatten(0, 1).to(device)
        tokens = torch.full(noise.shape, -1, device=device)
        rows = torch.arange(len(noise), device=device)  # completions that go on
        for t in range(limit):
            new = tokens[rows, t] = sample_tokens(logits, noise[rows, t], temperature, top_p)
            going = ~torch.isin(new, stop_ids)
            if not going.all():
                going = going.nonzero().squeeze(1)
                rows, new, mask = rows[going], new[going], mask[going]
                cache.reorder_cache(going)
            if len(rows) == 0 or t == limit - 1:
                break
            mask = nn.functional.pad(mask, (0, 1), value=1)
            inputs = dict(attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1)
            logits = model(new[:, None], **inputs, past_key_values=cache, use_cache=True).logits[:, -1]
        completions += [[x for x in row if x >= 0] for row in tokens.tolist()]
    return completions


def make_vllm(args, device):
    """A vLLM engine on this process's device; BadInput if vLLM is not installed, or not for that device."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that it takes weights from it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm.platforms
    except ImportError:
        raise BadInput(
            "vLLM is not installed: pip install -r requirements-vllm.txt, or leave out --generator"
        ) from None
    platform = vllm.platforms.current_platform
    if not (platform.is_cpu() if device.type == "cpu" else platform.is_cuda_alike()):
        raise BadInput(f"the vLLM installed here has no support for {device.type}: see requirements-vllm.txt")
    settings = dict(gpu_memory_utilization=args.vllm_memory, dtype=args.dtype, logprobs_mode="processed_logprobs")
    settings |= dict(max_model_len=args.max_prompt_length + args.max_completion_length, seed=args.seed + RANK)
    return vllm.LLM(
        args.model, distributed_executor_backend="external_launcher" if WORLD_SIZE > 1 else "uni", **settings
    )


def generate_vllm(engine, model, prompts, copies, limit, stop_ids, temperature, top_p):
    """As generate, with the model's present weights in vLLM: completions, and vLLM's log-probabilities (lists)."""
    import vllm

    weights = ((k, x.full_tensor() if isinstance(x, DTensor) else x) for k, x in model.state_dict().items())
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    engine.reset_prefix_cache()
    settings = dict(n=copies, temperature=temperature, top_p=top_p, max_tokens=limit, logprobs=0)
    settings = vllm.SamplingParams(**settings, stop_token_ids=sorted(stop_ids), detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    samples = [sample for output in outputs for sample in output.outputs]
    log_probs = [[x[token].logprob for token, x in zip(s.token_ids, s.logprobs)] for s in samples]
    return [list(sample.token_ids) for sample in samples], log_probs


# ----------------------------------------------------------------------------------------------------------- algorithm


def group_advantages(rewards, quantile=0.5, scale="unbiased"):
    """Advantages within each group against its mean and against its median (section 4.5): rewards[P, G] -> two [P, G].

    Bounds that are not symmetric have the quantile (c_h - 1) / (c_h - c_l) for the median (Corollary 4.7 as lambda
    vanishes). scale: "unbiased" divides by the standard deviation (n - 1) plus 1e-6, "biased" by sqrt(var + 1e-6) (n),
    "none" by nothing. Groups of equal rewards get exactly 0.
    """
    deviations = rewards - rewards.mean(-1, keepdim=True)
    deviations = deviations.where(rewards.amax(-1, keepdim=True) > rewards.amin(-1, keepdim=True), 0.0)
    median_deviations = rewards - rewards.quantile(quantile, dim=-1, keepdim=True)
    divisor = {
        "unbiased": rewards.std(-1, keepdim=True) + 1e-6,
        "biased": (rewards.var(-1, correction=0, keepdim=True) + 1e-6).sqrt(),
        "none": 1.0,
    }[scale]
    return deviations / divisor, median_deviations / divisor


def target_ratio(median_advantage, ratio_low, ratio_high, temperature):
    """The best ratio pi*/pi_0, Corollary 4.7: [...] -> [...]. It is 1 at the median, and the bounds far from it.

    For bounds 1 -+ epsilon it is Theorem 4.1, 1 + epsilon * tanh(median_advantage / (2 * temperature)).
    """
    odds = (ratio_high - 1) / (1 - ratio_low)
    return ratio_low + (ratio_high - ratio_low) * torch.sigmoid(median_advantage / temperature - math.log(odds))


def policy_loss(ratio, target, advantage, tv_coef):
    """Advantage-weighted total variation plus tv_coef times the plain one, Eq. 16: [B], [B], [B] -> [B]"""
    return (target - ratio).abs() * (advantage.abs() + tv_coef)


def token_weights(mask, aggregation, responses, tokens, max_length):
    """Weight of each token in the loss: mask[B, T] -> [B, T]. responses, tokens: counts of the whole minibatch."""
    return {
        "response": mask / (mask.sum(1, keepdim=True).clamp(min=1) * responses),  # mean over 1 / |o_i|, section 4.5
        "token": mask / tokens,
        "constant": mask / (responses * max_length),
    }[aggregation]


def minibatch_loss(model, batch, args):
    """A micro-batch's share of the objective and of its statistics, and the ratios of its tokens, in one dimension.

    batch: a dict of tensors [B, T] and [B].
    """
    log_probs, entropy = token_log_probs(model, batch, args.sampling_temperature, entropy_gradient=args.ent_coef > 0)
    log_ratio = (log_probs - batch["old_log_probs"]).clamp(-20, 20)
    ratio, advantages = log_ratio.exp(), batch["advantages"][:, None]
    low, high = ratio_bounds(args)
    median_advantages = batch["median_advantages"][:, None].double()  # in float32 a target of 1 may be rounded
    target = target_ratio(median_advantages, low, high, args.target_temperature).to(ratio.dtype)
    loss = policy_loss(ratio, target, advantages, args.tv_coef)
    mean = batch["mask"] / batch["tokens"]
    stats = {
        "clip_ratio/region_mean": (mean * ((ratio < low) | (ratio > high))).sum(),
        "losses/approx_kl": (mean * (ratio - 1 - log_ratio)).sum(),
        "entropy": (mean * entropy).sum(),
    }
    if args.kl_coef:
        difference = batch["ref_log_probs"] - log_probs
        kl = difference.exp() - difference - 1  # k3
        loss, stats["kl"] = loss + args.kl_coef * kl, (mean * kl).sum()
    loss = (batch["weights"] * (loss - args.ent_coef * entropy)).sum()
    return loss, {"loss": loss} | stats, ratio[batch["mask"] > 0]


def ratio_statistics(ratio, low, high):
    """Figure 7: mean and standard deviation of the ratios [B] above and below 1, and the fraction out of bounds."""
    stats = {"ratio/out_of_bounds": ((ratio < low) | (ratio > high)).float().mean().item()}
    for name, side in (("high", ratio[ratio >= 1]), ("low", ratio[ratio <= 1])):
        stats[f"ratio/{name}_mean"] = side.mean().item() if len(side) else 1.0
        stats[f"ratio/{name}_std"] = side.std(correction=0).item() if len(side) else 0.0
    return stats


def pack(prompts, completions, budget, count=0):
    """Splits completions by length into micro-batches of at most budget tokens, padding included; at least count.

    Lists of B prompts and completions -> lists of row numbers. A row longer than the budget is alone.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(completions[i]))
    parts, before, after = [], 0, 0
    for i in order:
        before, after = max(before, len(prompts[i])), max(after, len(completions[i]))
        if not parts or (len(parts[-1]) + 1) * (before + after) > budget:
            parts.append([])
            before, after = len(prompts[i]), len(completions[i])
        parts[-1].append(i)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        half = len(parts[largest]) // 2
        parts[largest : largest + 1] = [parts[largest][:half], parts[largest][half:]]
    return parts


# ---------------------------------------------------------------------------------------------------------- processes


def start_processes(args):
    """Joins the processes that torchrun started; returns this one's device."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients can be NaN (pytorch/pytorch#196678)
    elif not args.model:
        torch.set_num_threads(1)  # faster than two for the built-in model
    if WORLD_SIZE > 1 and not dist.is_initialized():
        # The others wait while one writes a checkpoint, which NCCL would allow ten minutes for.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    return device


def share(x, minibatches):
    """This process's part of x[P, ...]: an equal part of each minibatch, so that together they learn what one would."""
    return x.view(minibatches, WORLD_SIZE, -1, *x.shape[1:])[:, RANK].flatten(0, 1)


def gather(x):
    """The tensors x of all processes, on the CPU, in a list."""
    parts = [x.cpu()] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(parts, x.cpu())
    return parts


def reduce(x, operation=dist.ReduceOp.SUM):
    """The sum (or another operation) of a tensor over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x, operation)
    return x


def full(x):
    """The whole of a sharded tensor; all else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gathered(x):
    """full(x), which all processes take part in, in the first one; None in the others, which need not hold it."""
    x = full(x)
    return x if RANK == 0 else None


def like(x, other):
    """The whole tensor x, on the device and in the shards of other."""
    x = x.to(other.device)
    return distribute_tensor(x, other.device_mesh, other.placements) if isinstance(other, DTensor) else x


def hold_weights(model, hold):
    """FSDP: keeps each layer's gathered weights between forward passes, for sampling, or frees them again."""
    for module in (x for x in model.modules() if hasattr(x, "set_reshard_after_forward")):
        module.set_reshard_after_forward(not hold, recurse=False)
        module.unshard() if hold else module.reshard()


def say(text):
    if RANK == 0:
        print(text, flush=True)


# ------------------------------------------------------------------------------------------------ sampling and scoring


def sample(model, engine, tokenizer, args, prompts, uniforms, temperature, top_p):
    """G completions of each of P prompts, as generate does it: tokens and vLLM's log-probabilities (lists of P * G),
    texts (a list of G for each prompt), lengths [P, G], and whether they were cut off [P, G]."""
    stop_ids = {tokenizer.eos_token_id}
    if model.generation_config.eos_token_id is not None:  # one, or a list of them
        stop_ids |= set(torch.tensor(model.generation_config.eos_token_id).view(-1).tolist())
    prompts, shape = [problem["ids"] for problem in prompts], uniforms.shape[:2]
    if engine:
        completions, log_probs = generate_vllm(
            engine, model, prompts, *uniforms.shape[1:], stop_ids, temperature, top_p
        )
    else:
        limits = sorted(stop_ids), temperature, top_p, args.generation_batch_size
        completions, log_probs = generate(model, prompts, uniforms, *limits), [None] * shape.numel()
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    texts = [texts[i : i + shape[1]] for i in range(0, len(texts), shape[1])]
    lengths = torch.tensor([len(x) for x in completions]).view(shape).double()
    truncated = torch.tensor([x[-1] not in stop_ids for x in completions]).view(shape).double()
    return completions, log_probs, texts, lengths, truncated


def make_generator(*purpose):
    """A source of random numbers that a purpose and numbers determine: nothing else needs to be saved for a resume."""
    return torch.Generator().manual_seed(zlib.crc32(repr(purpose).encode()))


def draw(size, first, count, seed):
    """Numbers `first` to first + count of an endless sequence that goes through range(size) in ever new orders."""
    epochs = range(first // size, (first + count - 1) // size + 1)
    orders = [torch.randperm(size, generator=make_generator("problems", seed, epoch)) for epoch in epochs]
    return torch.cat(orders)[first - epochs[0] * size :][:count]


def rollout(sampler, problems, drawn, args):
    """Samples and scores the next prompts: this process's groups (dicts), and statistics [P, V] or [P] of all.

    drawn: prompts drawn before; with the seed it decides which come next and what is sampled.
    """
    vote = args.reward == "majority" and not args.reward_fn
    copies, minibatches = args.num_votes if vote else args.group_size, args.num_prompts // args.minibatch_prompts
    rows = share(draw(len(problems), drawn, args.num_prompts, args.seed), minibatches).tolist()
    problems, generator = [problems[i] for i in rows], make_generator("completions", args.seed, drawn)
    uniforms = torch.rand(args.num_prompts, copies, args.max_completion_length, generator=generator)
    sampled = sampler(problems, share(uniforms, minibatches), args.sampling_temperature, 1.0)
    completions, log_probs, texts, lengths, truncated = sampled
    rewards, stats = (majority_rewards if vote else true_rewards)(problems, texts, args)
    groups = []
    for i, problem in enumerate(problems):
        rows = slice(i * copies, i * copies + args.group_size)
        group = dict(problem=problem, texts=texts[i], completions=completions[rows], log_probs=log_probs[rows])
        groups.append(group | dict(rewards=rewards[i, : args.group_size], truncated=truncated[i, : args.group_size]))
    stats |= {"reward": rewards, "length": lengths, "completions/clipped_ratio": truncated}
    parts = {name: [x.view(minibatches, -1, *x.shape[1:]) for x in gather(x)] for name, x in stats.items()}
    return groups, {name: torch.stack(x, 1).flatten(0, 2) for name, x in parts.items()}


def make_minibatches(model, reference, groups, args):
    """Minibatches, each a list of micro-batches: dicts of tensors [B, T] and [B], with the old log-probabilities.

    The micro-batches stay as they are for all epochs. The old log-probabilities come from the same computation as the
    new ones, so the first ratio is exactly 1: the loss has its kink there, and noise would turn into gradient.
    """
    low, high = ratio_bounds(args)
    rewards = torch.stack([group["rewards"] for group in groups])
    both = group_advantages(rewards, (high - 1) / (high - low), args.scale_rewards)
    advantages, median_advantages = (x.flatten().float().to(model.device) for x in both)
    size, responses, minibatches = args.minibatch_prompts // WORLD_SIZE, args.minibatch_prompts * args.group_size, []
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        prompts = [group["problem"]["ids"] for group in part for _ in group["completions"]]
        completions, sampled = ([x for group in part for x in group[name]] for name in ("completions", "log_probs"))
        keep = 1 - torch.cat([x["truncated"] for x in part]).float() * args.mask_truncated
        tokens = (keep * torch.tensor([len(x) for x in completions])).sum().to(model.device)
        tokens = max(1.0, reduce(tokens).item())
        parts = pack(prompts, completions, args.micro_batch_tokens)
        if args.fsdp:  # every process must make the same number of passes
            count = reduce(torch.tensor(len(parts), device=model.device), dist.ReduceOp.MAX)
            parts = pack(prompts, completions, args.micro_batch_tokens, count.item())
        minibatches.append([])
        for rows in parts:
            batch = collate([prompts[i] for i in rows], [completions[i] for i in rows], 0, model.device)
            batch["mask"] *= keep[rows, None].to(model.device)
            counts = responses, tokens, args.max_completion_length
            batch |= {"weights": token_weights(batch["mask"], args.aggregation, *counts), "tokens": tokens}
            places = [start * args.group_size + i for i in rows]
            batch["advantages"] = advantages[places]
            batch["median_advantages"] = median_advantages[places]
            with torch.no_grad():
                batch["old_log_probs"], _ = token_log_probs(model, batch, args.sampling_temperature, entropy=False)
                if reference:
                    batch["ref_log_probs"], _ = token_log_probs(
                        reference, batch, args.sampling_temperature, entropy=False
                    )
            if args.generator == "vllm":  # its probabilities differ a little: importance weights, at most 2
                theirs = nn.utils.rnn.pad_sequence([torch.tensor(sampled[i]) for i in rows], batch_first=True)
                batch["weights"] *= (batch["old_log_probs"] - theirs.to(model.device)).exp().clamp(max=2)
            minibatches[-1].append(batch)
    return minibatches


def evaluate(sampler, problems, args):
    """pass@1, maj@k, mean length and fraction cut off, on held-out problems, with the same noise every time."""
    problems, generator = problems[: args.eval_problems], make_generator("evaluation")
    uniforms = torch.rand(len(problems), args.eval_samples, args.max_completion_length, generator=generator)
    mine, sums = problems[RANK::WORLD_SIZE], torch.zeros(4)
    if mine:
        sampled = sampler(mine, uniforms[RANK::WORLD_SIZE], args.eval_temperature, args.eval_top_p)
        _, _, texts, lengths, truncated = sampled
        scores, _ = true_rewards(mine, texts, args)
        keys = [[x.strip() if args.reward_fn else extract_answer(x, args.reward) for x in group] for group in texts]
        votes = [majority_vote(group) for group in keys]
        majority = [0.0 if v is None else s[k.index(v)].item() for s, k, v in zip(scores, keys, votes)]
        sums = torch.stack([x.mean(1).sum() for x in (scores, torch.tensor([majority]).T, lengths, truncated)])
    names = ("pass@1", f"maj@{args.eval_samples}", "mean_length", "clipped_ratio")
    return dict(zip(names, (sum(gather(sums)) / len(problems)).tolist()))


# --------------------------------------------------------------------------------------------------------------- files


def write_atomically(path, content):
    """Writes bytes to a temporary file, then renames it, so that path never holds half a file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name without the content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_args(run_dir):
    """The settings of a run; BadInput if they are missing, damaged or not this script's."""
    try:
        about = json.loads((run_dir / "args.json").read_text())
        if about["script"] != SCRIPT:
            raise BadInput(f"{run_dir} was made by {about['script']}: it does not belong here")
        args = Args(**about["args"])
    except OSError as error:
        raise BadInput(f"cannot read {error.filename}: pass the folder of a run that has saved a checkpoint") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise BadInput(f"{run_dir} holds no readable run of this script: {type(error).__name__}") from None
    return args


def check_same_settings(asked, args):
    """BadInput if a setting was asked for that the run does not have."""
    for field in dataclasses.fields(Args):
        value = getattr(asked, field.name)
        if field.name not in ("resume", "evaluate") and value not in (field.default, getattr(args, field.name)):
            raise BadInput(
                f"the settings are the run's, and cannot be changed: leave out --{field.name.replace('_', '-')}"
            )


def trim(path, step):
    """Drops the rows of a CSV file that were written after `step`, or only half written."""
    lines = path.read_text().splitlines(keepends=True)
    rows = [x for x in lines[1:] if x.endswith("\n") and x.count(",") == lines[0].count(",")]
    rows = [x for x in rows if int(x.split(",", 1)[0]) <= step]
    write_atomically(path, "".join(lines[:1] + rows).encode())


def make_run_dir(args):
    """Makes the run's folder, with args.json; BadInput if that is not possible."""
    run_dir = Path(args.output_dir) / f"{args.env_id.replace('/', '-')}__{SCRIPT}__{args.seed}__{int(time.time())}"
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    modules = [sys.modules[name] for name in ("torch", "transformers", "vllm", "numpy") if name in sys.modules]
    about = {"script": SCRIPT, "args": dataclasses.asdict(args), "commit": commit, "python": sys.version.split()[0]}
    about["versions"] = {module.__name__: module.__version__ for module in modules}
    try:
        run_dir.mkdir(parents=True)
        write_atomically(run_dir / "args.json", json.dumps(about, indent=2).encode())
    except OSError as error:
        raise BadInput(f"cannot write to {run_dir}: {error.strerror}; choose another --output-dir") from None
    return run_dir


def save_model(model, tokenizer, folder):
    """Writes weights, configuration and tokenizer by save_pretrained, all or nothing; all processes take part."""
    state = {name: gathered(x) for name, x in model.state_dict().items()}
    if RANK == 0:
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    if WORLD_SIZE > 1:
        dist.barrier()  # the others may read it next


# ------------------------------------------------------------------------------------------------------------ training


def train(args):
    """Trains a model and returns its run's folder; BadInput before anything is created."""
    checkpoint, step, drawn, updates, result = None, 0, 0, 0, {}
    if args.resume is not None:
        asked, run_dir = args, Path(args.resume)
        args = load_args(run_dir)
        try:
            checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True, mmap=True)  # read only where needed
            step, drawn, updates, result = (checkpoint[name] for name in ("step", "drawn", "updates", "result"))
        except Exception as error:
            raise BadInput(f"cannot read {run_dir / 'checkpoint.pt'}: {type(error).__name__}") from None
        if step >= args.total_timesteps and (run_dir / "evaluation.json").exists():
            raise BadInput(f"{run_dir} is complete: to train on, raise total_timesteps in its args.json")
        check_same_settings(asked, args)
    if args.dataset and args.env_id == "addition":
        args = dataclasses.replace(args, env_id=re.sub(r"\W+", "-", Path(args.dataset).stem))
    check_args(args)
    if args.track:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise BadInput("--track needs an account: type wandb login first, or set WANDB_MODE=offline")
    if args.reward_fn:
        load_function(args.reward_fn)
    device = start_processes(args)
    model, tokenizer = make_model(args, device)
    problems, held_out = make_problems(args, tokenizer)
    engine = make_vllm(args, device) if args.generator == "vllm" else None
    if not checkpoint:
        folders = [make_run_dir(args) if RANK == 0 else None]
        if WORLD_SIZE > 1:
            dist.broadcast_object_list(folders)
        run_dir = folders[0]
        if not args.model:
            say(f"supervised learning of the built-in model: {warm_up(model, tokenizer, problems, args)} steps")
            if STOP:
                raise SystemExit("stopped before the first iteration: there is nothing to resume")
            if WORLD_SIZE > 1:
                for x in model.parameters():
                    dist.broadcast(x.data, 0)  # GPUs may have rounded differently
            save_model(model, tokenizer, run_dir / "initial_model")
    reference = None
    if args.kl_coef:
        source, dtype = args.model or run_dir / "initial_model", getattr(torch, args.dtype)
        reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
    mesh = init_device_mesh(device.type, (WORLD_SIZE,)) if args.fsdp else None  # by default it would be the GPUs'
    for whole in [x for x in (model, reference) if x and args.fsdp]:
        for layer in [x for x in whole.modules() if isinstance(x, GradientCheckpointingLayer)]:
            fully_shard(layer, mesh=mesh)
        fully_shard(whole, mesh=mesh)
    parameters = [x for x in model.parameters() if x.requires_grad]
    masters = [x.detach().float() for x in parameters]  # of a float32 model: the parameters themselves
    optimizer = torch.optim.AdamW(masters, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    sampler = functools.partial(sample, model, engine, tokenizer, args)
    if checkpoint:
        try:
            for x, master, saved in zip(parameters, masters, checkpoint["parameters"], strict=True):
                master.copy_(like(saved, master))
                x.detach().copy_(master)
            for i, state in checkpoint["optimizer"]["state"].items():
                state |= {name: like(x, masters[i]) for name, x in state.items() if x.ndim}
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (ValueError, RuntimeError):
            raise BadInput(f"the weights in {run_dir} do not fit its args.json") from None
    kept = f"go on with: python {SCRIPT}.py --resume {run_dir}"

    if RANK == 0:
        (run_dir / "evaluation.json").unlink(missing_ok=True)  # of a run that was complete, and goes on
        shutil.rmtree(run_dir / "model", ignore_errors=True)
        headers = {"episodes.csv": "step,return,length\n", "metrics.csv": "", "completions.jsonl": ""}
        headers["evaluations.csv"] = f"step,pass@1,maj@{args.eval_samples},mean_length,clipped_ratio\n"
        files = {}
        for name, header in headers.items():
            if not checkpoint:
                (run_dir / name).write_text(header)
            elif name.endswith(".csv"):
                trim(run_dir / name, step)
            else:
                lines = [x for x in (run_dir / name).read_text().splitlines(keepends=True) if x.endswith("\n")]
                lines = [x for x in lines if json.loads(x)["step"] <= step]
                write_atomically(run_dir / name, "".join(lines).encode())
            files[name] = (run_dir / name).open("a")
        if args.track:
            settings = dict(config=dataclasses.asdict(args), dir=run_dir, id=run_dir.name, name=run_dir.name)
            wandb.init(project=args.wandb_project, resume="allow", sync_tensorboard=True, **settings)
        writer = SummaryWriter(run_dir, purge_step=step + 1)
        writer.add_text("args", "\n".join(f"    {k}: {v}" for k, v in dataclasses.asdict(args).items()))

    def save_checkpoint():
        state = {"parameters": masters, "optimizer": optimizer.state_dict()}
        state = tree_map(lambda x: x.cpu() if isinstance(x := gathered(x), torch.Tensor) else x, state)
        if RANK == 0:
            for file in files.values():
                file.flush()
            writer.flush()
            state |= {"step": step, "drawn": drawn, "updates": updates, "result": result}
            with (run_dir / "checkpoint.pt.tmp").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(run_dir / "checkpoint.pt.tmp", run_dir / "checkpoint.pt")

    def run_evaluation():
        hold_weights(model, True)
        result = evaluate(sampler, held_out, args)
        hold_weights(model, False)
        if RANK == 0:
            files["evaluations.csv"].write(",".join([str(step), *(f"{x:.6g}" for x in result.values())]) + "\n")
            files["evaluations.csv"].flush()
            for name, value in result.items():
                writer.add_scalar(f"eval/{name}", value, step)
        return result

    size = sum(x.numel() for x in masters) / 1e6
    say(f"{SCRIPT} on {args.env_id}, seed {args.seed}, {size:.2f}M parameters, {WORLD_SIZE} x {device.type}: {run_dir}")
    if not checkpoint:
        result = run_evaluation()
        save_checkpoint()
        say(f"step 0, held-out pass@1 {result['pass@1']:.3f}")
    iteration = updates // (args.update_epochs * args.num_prompts // args.minibatch_prompts)
    first_step, start_time, last_line = step, time.time(), time.time()
    bar = tqdm(total=args.total_timesteps, initial=step, unit="completion", disable=RANK > 0 or not sys.stderr.isatty())

    while step < args.total_timesteps and not reduce(torch.tensor(len(STOP), device=device)):
        iteration += 1
        rollout_start = time.perf_counter()
        hold_weights(model, True)
        groups, stats = rollout(sampler, problems, drawn, args)
        drawn += args.num_prompts
        for _ in range(args.resample_rounds):
            empty = [i for i, group in enumerate(groups) if group["rewards"].min() == group["rewards"].max()]
            if not reduce(torch.tensor(len(empty), device=device)):
                break
            more, more_stats = rollout(sampler, problems, drawn, args)
            drawn += args.num_prompts
            stats = {name: torch.cat([x, more_stats[name]]) for name, x in stats.items()}
            for i, group in zip(empty, (x for x in more if x["rewards"].min() < x["rewards"].max())):
                groups[i] = group
        minibatches = make_minibatches(model, reference, groups, args)
        hold_weights(model, False)
        update_start = time.perf_counter()

        schedule = {"constant": 1.0, "linear": 1 - step / args.total_timesteps}
        schedule["cosine"] = 0.5 + 0.5 * math.cos(math.pi * step / args.total_timesteps)
        totals, count, generator = Counter(), 0, make_generator("minibatches", args.seed, drawn)
        for _ in range(args.update_epochs):
            ratios = []  # of this epoch: each minibatch's before its step
            for i in torch.randperm(len(minibatches), generator=generator).tolist():
                for batch in minibatches[i]:
                    loss, loss_stats, ratio = minibatch_loss(model, batch, args)
                    loss.backward()
                    ratios.append(ratio.detach())
                    for name, x in loss_stats.items():
                        totals[name] += x.detach()
                for x, master in zip(parameters, masters):
                    gradient = torch.zeros_like(master) if x.grad is None else x.grad.float()  # None: not used
                    # FSDP has taken the mean over processes already.
                    master.grad = gradient * WORLD_SIZE if args.fsdp else reduce(gradient)
                    x.grad = None
                updates, count = updates + 1, count + 1
                learning_rate = (
                    args.learning_rate * min(1, updates / max(1, args.lr_warmup)) * schedule[args.lr_schedule]
                )
                optimizer.param_groups[0]["lr"] = learning_rate
                totals["grad_norm"] += full(nn.utils.clip_grad_norm_(masters, args.max_grad_norm)) / WORLD_SIZE
                optimizer.step()
                optimizer.zero_grad()
                if args.dtype != "float32":
                    for x, master in zip(parameters, masters):
                        x.detach().copy_(master)

        ratios = torch.cat(gather(torch.cat(ratios)))
        if not len(ratios):  # --mask-truncated has left out all: no ratio has moved
            ratios = torch.ones(1)
        rewards, lengths = stats.pop("reward"), stats.pop("length")
        trained = rewards[:, : args.group_size]  # of all votes
        step += rewards.numel()
        means = reduce(torch.stack(list(totals.values()))) / count
        seconds, sps = time.perf_counter() - rollout_start, (step - first_step) / (time.time() - start_time)
        metrics = dict(zip(totals, means.tolist())) | {
            "learning_rate": learning_rate,
            "reward": rewards.mean().item(),
            "reward_std": trained.std(1).mean().item(),
            "frac_reward_zero_std": (trained.amax(1) == trained.amin(1)).double().mean().item(),
            "completions/mean_length": lengths.mean().item(),
            "completions/max_length": lengths.max().item(),
            **{name: x.nanmean().item() for name, x in stats.items()},
            **ratio_statistics(ratios, *ratio_bounds(args)),
            "ratio/max": ratios.max().item(),
            "ratio/min": ratios.min().item(),
            "tokens_per_second": lengths.sum().item() / seconds,
            "charts/SPS": sps,
            "time/rollout": update_start - rollout_start,
            "time/update": seconds - (update_start - rollout_start),
        }
        for name, value in metrics.items():
            if not math.isfinite(value) and name not in ("ttrl/label_accuracy", "ttrl/ground_truth_ratio"):
                raise SystemExit(f"error: {name} is {value} at step {step}; {kept}")
        if RANK == 0:
            for reward, length in zip(rewards.flatten().tolist(), lengths.flatten().tolist()):
                files["episodes.csv"].write(f"{step},{reward:.8g},{length:.0f}\n")
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            if files["metrics.csv"].tell() == 0:
                files["metrics.csv"].write(",".join(["step", *metrics]) + "\n")
            files["metrics.csv"].write(",".join([str(step), *(f"{value:.6g}" for value in metrics.values())]) + "\n")
            table = [{**x["problem"]["row"], "step": step, "completion": x["texts"][0]} for x in groups[:4]]
            table = [json.dumps(x | {"reward": y["rewards"][0].item()}, default=str) for x, y in zip(table, groups)]
            files["completions.jsonl"].write("\n".join([*table, ""]))
            writer.add_text("completions", "\n\n".join(f"    {row}" for row in table), step)
            files["metrics.csv"].flush()

        done = step >= args.total_timesteps
        if iteration % args.eval_interval == 0 or done:
            result = run_evaluation()
        bar.set_postfix_str(f"reward {metrics['reward']:.3f}", refresh=False)
        bar.update(min(step, args.total_timesteps) - bar.n)
        if bar.disable and (time.time() - last_line > 30 or done):
            last_line, left = time.time(), max(args.total_timesteps - step, 0) / sps
            scores = f"reward {metrics['reward']:.3f}, held-out pass@1 {result['pass@1']:.3f}"
            say(f"step {step}, {sps:.0f} completions/s, {scores}, {left:.0f} s left")
        if iteration % args.checkpoint_interval == 0:
            save_checkpoint()

    bar.close()
    save_checkpoint()
    if step < args.total_timesteps:
        raise SystemExit(f"stopped at step {step}; {kept}")
    save_model(model, tokenizer, run_dir / "model")
    report(result, run_dir)
    if RANK == 0:
        for file in [*files.values(), writer]:
            file.close()
        if args.track:
            wandb.finish()
    return str(run_dir)


def report(result, run_dir):
    """Prints an evaluation and writes it to run_dir/evaluation.json."""
    say("evaluation: " + ", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    if RANK == 0:
        write_atomically(run_dir / "evaluation.json", json.dumps(result, indent=2).encode())


def request_stop(number, _):
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once


def main(args):
    """Trains a model, or evaluates that of an earlier run."""
    if args.resume is not None and args.evaluate is not None:
        raise BadInput("--resume and --evaluate exclude each other: pass one of them")
    if args.evaluate is None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, request_stop)
        return train(args)
    run_dir = Path(args.evaluate)
    run_args = load_args(run_dir)
    if not (run_dir / "model").is_dir():
        raise BadInput(f"{run_dir} has no final model: finish the run with --resume first")
    fields = [x for x in dataclasses.fields(Args) if x.name.startswith("eval_")]
    asked = {x.name: getattr(args, x.name) for x in fields if getattr(args, x.name) != x.default}
    run_args = dataclasses.replace(run_args, **asked, device=args.device)
    check_same_settings(args, run_args)
    run_args = dataclasses.replace(run_args, model=str(run_dir / "model"), fsdp=False)
    check_args(run_args)
    device = start_processes(run_args)
    model, tokenizer = make_model(run_args, device)
    engine = make_vllm(run_args, device) if run_args.generator == "vllm" else None
    _, held_out = make_problems(run_args, tokenizer)
    report(evaluate(functools.partial(sample, model, engine, tokenizer, run_args), held_out, run_args), run_dir)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except BadInput as error:
        if RANK == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(f"error: cannot go on: {error}")
    finally:
        if dist.is_initialized() and "vllm" not in sys.modules:  # vLLM ends all process groups itself
            dist.destroy_process_group()
