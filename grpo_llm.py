"""Group Relative Policy Optimization (GRPO) for language models and its relatives, in one file.

--objective chooses among GRPO, Dr. GRPO, DAPO, GSPO and SAPO; equation numbers are those of "RL for LLM alignment", a
text that puts the five side by side. All else is the text of the sibling, gbpo_llm.py, so that comparing the two
compares the algorithms.

    python grpo_llm.py                       teaches a tiny transformer, made here, to add two-digit numbers
    python grpo_llm.py --objective dapo
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes during the slow imports below

import argparse
import asyncio
import copy
import functools
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import tokenizers
import torch
import torch.distributed as dist
import torch.nn as nn
import transformers
import tyro
from filelock import FileLock, Timeout
from pydantic import Field, PositiveInt, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.tensorboard import SummaryWriter
from transformers.modeling_layers import GradientCheckpointingLayer

SCRIPT = Path(__file__).stem
# Set by torchrun: the number of this process and of all, and on this machine.
RANK, WORLD_SIZE = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
LOCAL_RANK, LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_RANK") or 0), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
Count = Annotated[int, Field(ge=0, le=10**15)]
Size = Annotated[int, Field(ge=1, le=10**6)]
Probability = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e38)]
Name = Annotated[str, Field(min_length=1)]
NonNegative = Annotated[float, Field(ge=0, le=1e38)]


@dataclass(config=dict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True))
class Args:
    objective: Literal["grpo", "dr_grpo", "dapo", "gspo", "sapo"] = "grpo"  # docs/grpo_llm.md has the five in a table
    env_id: str = "addition"  # the task's name: sums are built in
    dataset: Name | None = None  # .json, .jsonl or .parquet file, or ID, ID:SPLIT or ID:CONFIG:SPLIT on the Hub
    eval_dataset: Name | None = None  # held-out problems, in the same forms; default: those of --dataset
    train_problems: PositiveInt | None = None  # the first so many only; default: all
    prompt_column: Name | None = None  # a.b: b of column a; default: prompt, problem or question
    answer_column: Name | None = None  # default: answer, reward_model.ground_truth, ground_truth or solution
    model: Name | None = None  # folder or Hub id of a causal language model; default: a tiny one, taught to add
    chat_template: bool = False  # wrap prompts in the tokenizer's chat template
    system_prompt: str | None = None  # system message of the chat template
    # 1 for the right answer. exact: the completion is that number; boxed: the last \boxed{} is; majority: TTRL's votes
    reward: Literal["exact", "boxed", "majority"] = "exact"
    reward_fn: tuple[str, ...] = ()  # module:function or path.py:function, in place of --reward; called as by TRL
    reward_weights: tuple[float, ...] = ()  # of several functions, whose rewards are added; default: 1 each
    num_votes: Size = 64  # completions that vote; the first --group-size are trained on
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # of initial weights, prompts, samples and minibatches
    total_timesteps: Count = 81_920  # completions to sample for training; 0: evaluate only
    num_prompts: Size = 64  # prompts per iteration, of all processes
    group_size: Annotated[int, Field(ge=2, le=10**6)] = 8  # completions per prompt
    minibatch_prompts: Size = 16  # prompts (whole groups) per gradient step, of all processes
    update_epochs: PositiveInt = 1  # passes over the rollout per iteration
    learning_rate: Positive = 3e-4  # Adam's step size, at the start if it is scheduled
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # linear, cosine: to 0 at the last step
    lr_warmup: Count = 20  # gradient steps over which the learning rate rises from 0
    max_grad_norm: Positive = 1.0  # largest norm of the gradient
    max_prompt_length: Size = 512  # tokens; longer prompts are left out
    max_completion_length: Size = 4  # tokens; longer completions are cut off
    stop: tuple[str, ...] = ()  # texts of one token each that end a completion as the model's own stop tokens do
    keep_special_tokens: bool = False  # leave special tokens in the text that is rewarded, as <think> may be one
    sampling_temperature: Positive = 1.0  # of the policy, while sampling and while learning
    clip_coef: Positive = 0.2  # epsilon: the ratio's bounds are 1 -+ epsilon
    ratio_low: float | None = None  # lower bound of the clip, in place of 1 - epsilon
    ratio_high: float | None = None  # upper bound, in place of 1 + epsilon (dapo: 1 + 1.4 epsilon)
    tau_pos: Positive = 1.0  # sapo's temperature for positive advantages
    tau_neg: Positive = 1.05  # sapo's temperature for negative advantages
    # divide by the group's std + 1e-6 with n - 1 (TRL adds 1e-4), by sqrt(var + 1e-6) with n, or not (dr_grpo)
    scale_rewards: Literal["unbiased", "biased", "none"] = "unbiased"
    resample_rounds: Count = 10  # dapo: draws of new prompts for groups of equal rewards, at most
    mask_truncated: bool = False  # leave cut-off completions out of the loss, not out of their group's statistics
    kl_coef: NonNegative = 0.0  # weight of the KL divergence to the initial model (k3 estimate)
    ent_coef: NonNegative = 0.0  # weight of the entropy bonus
    # the built-in model is taught until its samples are right this often
    warmup_accuracy: Annotated[float, Field(ge=0, lt=1)] = 0.4
    eval_interval: PositiveInt = 10  # iterations between evaluations on held-out problems
    eval_problems: Size = 200  # held-out problems to evaluate on, at most
    eval_samples: Size = 8  # completions per held-out problem, k of maj@k
    eval_temperature: Positive = 0.6  # sampling temperature of evaluations
    eval_top_p: Probability = 0.95  # from the most likely tokens of this total probability
    generator: Literal["transformers", "vllm"] = "transformers"  # vllm: an optional install, on the same device
    vllm_memory: Probability = 0.4  # fraction of the device's memory that vLLM may take
    generation_batch_size: PositiveInt = 1024  # completions sampled at a time, but at least all of one prompt
    micro_batch_tokens: PositiveInt = 16_384  # tokens per forward and backward pass, padding included
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model; Adam keeps float32 copies of its weights
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: slower, less memory
    fsdp: bool = False  # shard the weights over torchrun's processes (FSDP2)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    exp_name: str = SCRIPT  # a part of the run's name
    output_dir: str = "runs"  # parent of the run's folder
    checkpoint_seconds: NonNegative = 300  # between checkpoints; 0: one after every iteration
    resume: str | None = None  # RUN_DIR: go on with this run; flags of memory and speed may differ
    track: bool = False  # log to Weights & Biases, too (WANDB_MODE=offline needs no account)
    wandb_project_name: str = "bounded-ratio-rl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team

    @model_validator(mode="after")
    def check(self):
        low, high = ratio_bounds(self)
        if not 0 <= low < 1 < high:
            raise ValueError(f"the ratio's bounds must have 0 <= low < 1 < high, not {low} and {high}")
        if self.num_prompts % self.minibatch_prompts:
            raise ValueError("--minibatch-prompts must divide --num-prompts")
        if self.reward == "majority" and self.num_votes < self.group_size:
            raise ValueError("--num-votes must be at least --group-size")
        if self.reward_fn and self.reward != "exact":
            raise ValueError("--reward-fn takes the place of --reward: leave that out")
        if self.reward_weights and len(self.reward_weights) != len(self.reward_fn):
            raise ValueError("--reward-weights needs a number for each --reward-fn")
        if (self.dataset or self.generator == "vllm") and not self.model:
            raise ValueError("--dataset and --generator vllm need --model: the built-in one reads sums only")
        if self.system_prompt and not self.chat_template:
            raise ValueError("--system-prompt needs --chat-template")
        if self.env_id != "addition" and not self.dataset:
            raise ValueError(f"there is no built-in task {self.env_id}: pass --dataset")
        if self.env_id == "addition" and self.dataset:
            self.env_id = re.sub(r"\W+", "-", Path(self.dataset).stem)
        return self


# --- the algorithm: P prompts, G completions of each (V, if they vote), B rows of T tokens


def ratio_bounds(args):
    """Bounds (c_l, c_h) of the ratio between new and old policy."""
    low = 1 - args.clip_coef if args.ratio_low is None else args.ratio_low
    widening = 1.4 if args.objective == "dapo" else 1.0  # 0.28 for 0.2
    return low, 1 + widening * args.clip_coef if args.ratio_high is None else args.ratio_high


def group_advantages(rewards, scale="unbiased"):
    """Advantages over each group's mean, Eq. 91 (biased: Eq. 90, none: Eq. 98): rewards[P, G] -> [P, G]"""
    deviations = rewards - rewards.mean(-1, keepdim=True)  # equal rewards leave a rounding error: 0
    deviations = deviations.where(rewards.amax(-1, keepdim=True) > rewards.amin(-1, keepdim=True), 0.0)
    divisor = {
        "unbiased": rewards.std(-1, keepdim=True) + 1e-6,
        "biased": (rewards.var(-1, correction=0, keepdim=True) + 1e-6).sqrt(),
        "none": 1.0,
    }[scale]
    return deviations / divisor


# The objectives per token, to be minimised: log_ratio[B, T], advantage[B, 1], mask[B, T] -> [B, T].


def grpo_loss(log_ratio, advantage, mask, args):
    """GRPO: the clipped surrogate, Eq. 96."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(*ratio_bounds(args)) * advantage)


def gspo_loss(log_ratio, advantage, mask, args):
    """GSPO: the clipped geometric mean of the response's ratios, Eq. 107 and 109; the same for all its tokens."""
    return grpo_loss(mean_log_ratio(log_ratio, mask), advantage, mask, args).expand_as(mask)


def mean_log_ratio(log_ratio, mask):
    """The log of Eq. 107: [B, T] -> [B, 1]"""
    return (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def sapo_loss(log_ratio, advantage, mask, args):
    """SAPO: a soft gate in place of the clip, Eq. 117-119, narrower for negative advantages, Eq. 118."""
    tau = torch.full_like(advantage, args.tau_neg).masked_fill(advantage > 0, args.tau_pos)
    return -4 / tau * torch.sigmoid(tau * (log_ratio.exp() - 1)) * advantage


OBJECTIVES = {
    "grpo": grpo_loss,
    "dr_grpo": grpo_loss,  # Eq. 99, of advantages in units of reward, Eq. 98
    "dapo": grpo_loss,  # Eq. 101, with bounds of its own on each side
    "gspo": gspo_loss,
    "sapo": sapo_loss,
}
# Eq. 97, 100, 102, 109 and 119
AGGREGATIONS = {"grpo": "response", "dr_grpo": "constant", "dapo": "token", "gspo": "response", "sapo": "response"}


def token_weights(mask, aggregation, responses, tokens, max_length):
    """Weight of each token in the loss: mask[B, T] -> [B, T]. responses, tokens: counts of the whole minibatch."""
    return {
        "response": mask / (mask.sum(1, keepdim=True).clamp(min=1) * responses),  # mean over each, then over all
        "token": mask / tokens,  # mean over all tokens
        "constant": mask / (responses * max_length),
    }[aggregation]


def minibatch_loss(model, batch, args):
    """One micro-batch's share of a minibatch's objective [] and statistics [], and its ratios [B, T]."""
    log_probs, all_log_probs = token_log_probs(model, batch, args.sampling_temperature)
    all_log_probs = all_log_probs if args.ent_coef else all_log_probs.detach()
    entropy = -(all_log_probs.exp() * all_log_probs.clamp(min=-1e4)).sum(-1)  # excluded tokens: 0, not 0 times -inf
    log_ratio = (log_probs - batch["old_log_probs"]).clamp(-20, 20)
    ratio, (low, high) = log_ratio.exp(), ratio_bounds(args)
    loss = OBJECTIVES[args.objective](log_ratio, batch["advantages"][:, None], batch["mask"], args)
    mean = batch["mask"] / batch["tokens"]
    stats = {
        "clip_ratio/region_mean": (mean * ((ratio < low) | (ratio > high))).sum(),
        "losses/approx_kl": (mean * (ratio - 1 - log_ratio)).sum(),
        "entropy": (mean * entropy).sum(),
    }
    if args.objective == "gspo":  # whose bounds are the responses'
        ratios = mean_log_ratio(log_ratio, batch["mask"]).exp()
        stats["clip_ratio/region_mean"] = (batch["weights"] * ((ratios < low) | (ratios > high))).sum()
    if args.kl_coef:
        difference = (batch["ref_log_probs"] - log_probs).clamp(-20, 20)
        kl = (difference.exp() - difference - 1).clamp(max=10)  # k3, clamped as in verl
        loss, stats["kl"] = loss + args.kl_coef * kl, (mean * kl).sum()
    loss = (batch["weights"] * (loss - args.ent_coef * entropy)).sum()
    return loss, {"loss": loss} | stats, ratio


# --- the model


def token_log_probs(model, batch, temperature):
    """Log-probability of each completion token (of padding: 0) [B, T], and of all in its place [B, T, vocabulary]."""
    length = batch["mask"].shape[1]
    # Causal attention sees no padding on the right, and is faster without a mask.
    names = ["attention_mask", "position_ids"] if batch["left_padded"] else []
    inputs = {name: batch[name][:, :-1] for name in names}
    logits = model(batch["ids"][:, :-1], **inputs, use_cache=False, logits_to_keep=length).logits
    log_probs = (logits.float() / temperature).log_softmax(-1)
    chosen = log_probs.gather(-1, batch["ids"][:, -length:, None]).squeeze(-1)
    return chosen.where(batch["mask"] > 0, 0.0), log_probs  # of padding it may be -inf


def collate(prompts, completions, device):
    """Tokens, padded on the outside: ids, attention_mask, position_ids [B, Lp + T]; the completions' mask[B, T]."""
    before, after = max(map(len, prompts)), max(map(len, completions))
    ids = [[-1] * (before - len(p)) + p + c + [-1] * (after - len(c)) for p, c in zip(prompts, completions)]
    ids = torch.tensor(ids, device=device)
    mask = (ids >= 0).long()
    batch = {"ids": ids.clamp(min=0), "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return batch | {"mask": mask[:, before:].float(), "left_padded": min(map(len, prompts)) < before}


def make_model(args, device):
    """Model and tokenizer: those of --model, or new tiny ones. BadInput if they cannot be loaded or trained."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_model(args) if args.model else built_in_model(args)
    if args.chat_template and not tokenizer.chat_template:
        raise BadInput(f"{args.model or 'the built-in model'} has no chat template: leave out --chat-template")
    if args.gradient_checkpointing:  # transformers' own works in training mode only, which brings dropout
        layers = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
        if not layers:
            raise BadInput(f"{args.model} has no layers to recompute: leave out --gradient-checkpointing")
        for layer in layers:
            layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return model.to(device).eval(), tokenizer  # eval: no dropout, not even while learning


def load_model(args):
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        settings = dict(dtype=args.dtype, trust_remote_code=False, output_loading_info=True)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(args.model, **settings)
    except Exception as error:  # no folder, no network, no weights, an unknown architecture: many kinds
        raise BadInput(f"cannot load --model {args.model}: {one_line(error)[:200]}") from None
    if missing := sorted(loading["missing_keys"]):  # transformers would draw them at random
        raise BadInput(f"{args.model} is no whole language model: it has no weights for {missing[0]}")
    with torch.no_grad():
        if not hasattr(model(torch.tensor([[0]]), use_cache=True), "past_key_values"):
            raise BadInput(f"{args.model} keeps no key-value cache, which sampling needs")
    return model, tokenizer


def built_in_model(args):
    """A transformer of 0.1M parameters, and a tokenizer for which each character is a token."""
    vocabulary = {x: i for i, x in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    characters = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[], unk_token="<pad>"))
    characters.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    sizes = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, max_position_embeddings=64)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=4, vocab_size=len(vocabulary), tie_word_embeddings=True)
    torch.manual_seed(args.seed)
    config = transformers.Qwen2Config(**sizes, initializer_range=0.1, pad_token_id=0, eos_token_id=1)
    return transformers.Qwen2ForCausalLM(config).to(getattr(torch, args.dtype)), tokenizer


def warm_up(model, tokenizer, problems, args):
    """Supervised learning of right answers, until samples are right often enough."""
    say(f"teaching the built-in model until {args.warmup_accuracy:.0%} of its samples are right")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.9, 0.99), fused=True)
    generator = make_generator("supervised", args.seed)
    answers = tokenizer([problem["row"]["answer"] + "<eos>" for problem in problems])["input_ids"]
    accuracy = 0.0
    for step in range(5000):
        if accuracy >= args.warmup_accuracy:
            break
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20)
        rows = torch.randint(len(problems), (128,), generator=generator).tolist()
        batch = collate([problems[i]["ids"] for i in rows], [answers[i] for i in rows], model.device)
        log_probs, _ = token_log_probs(model, batch, 1.0)
        accuracy = 0.9 * accuracy + 0.1 * log_probs.detach().sum(1).exp().mean().item()  # chance of a right sample
        (-log_probs.sum() / batch["mask"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        raise BadInput(f"{accuracy:.0%} of the samples are right after {step} steps: try another --seed")
    for x in model.parameters() if WORLD_SIZE > 1 else ():
        dist.broadcast(x.data, 0)  # GPUs may have rounded differently


# --- sampling


def sample_tokens(logits, uniforms, temperature, top_p):
    """Tokens [B] drawn from logits [B, vocabulary] by inverting the cumulative distribution at uniforms [B]."""
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
    """G completions of at most T tokens for each of P prompts: P * G lists of tokens, with the one that ended each.

    uniforms[P, G, T] decide every token, so a completion does not depend on what is sampled beside it.
    """
    (_, copies, limit), device = uniforms.shape, model.device
    stop_ids, completions = torch.tensor(stop_ids, device=device), []
    for start in range(0, len(prompts), count := max(1, batch_size // copies)):
        part, noise = prompts[start : start + count], uniforms[start : start + count].flatten(0, 1).to(device)
        batch, cache = collate(part, [[]] * len(part), device), None
        ids, mask, positions = batch["ids"], batch["attention_mask"], batch["position_ids"]
        tokens = torch.full(noise.shape, -1, device=device)
        rows = torch.arange(len(noise), device=device)  # completions that go on
        for t in range(limit):
            inputs = dict(attention_mask=mask, position_ids=positions, past_key_values=cache)
            output = model(ids, **inputs, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1]
            if t == 0:  # each prompt is read once; only this way of copying works for states of convolutions, too
                cache.reorder_cache(rows // copies)
                logits, mask = logits[rows // copies], mask[rows // copies]
            new = tokens[rows, t] = sample_tokens(logits, noise[rows, t], temperature, top_p)
            going = (~torch.isin(new, stop_ids)).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if len(going) < len(rows):
                cache.reorder_cache(going)
                rows, new, mask = rows[going], new[going], mask[going]
            ids, positions = new[:, None], mask.sum(1, keepdim=True)
            mask = nn.functional.pad(mask, (0, 1), value=1)
        completions += [[x for x in row if x >= 0] for row in tokens.tolist()]
    return completions


def make_vllm(args):
    """A vLLM engine on this process's device. BadInput if vLLM is not installed."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that it takes weights from it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
    except ImportError:
        raise BadInput("vLLM is not installed: see requirements-vllm.txt, or leave out --generator") from None
    settings = dict(gpu_memory_utilization=args.vllm_memory, dtype=args.dtype, logprobs_mode="processed_logprobs")
    settings |= dict(max_model_len=args.max_prompt_length + args.max_completion_length, seed=args.seed + RANK)
    launcher = "external_launcher" if WORLD_SIZE > 1 else "uni"
    return vllm.LLM(args.model, distributed_executor_backend=launcher, **settings)


def generate_vllm(engine, model, prompts, copies, limit, stop_ids, temperature, top_p):
    """As generate, by vLLM with the model's present weights: completions and their log-probabilities."""
    import vllm

    weights = ((name, full(x)) for name, x in model.state_dict().items())
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    engine.reset_prefix_cache()
    settings = dict(n=copies, temperature=temperature, top_p=top_p, max_tokens=limit, logprobs=0)
    settings = vllm.SamplingParams(**settings, stop_token_ids=stop_ids, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    samples = [sample for output in outputs for sample in output.outputs]
    log_probs = [[x[token].logprob for token, x in zip(s.token_ids, s.logprobs)] for s in samples]
    return [list(sample.token_ids) for sample in samples], log_probs


def stop_tokens(model, tokenizer, args):
    """Tokens that end a completion: of the tokenizer, the model's generation config and --stop, or BadInput."""
    more = model.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    for text in args.stop:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or tokenizer.decode(ids) != text:
            raise BadInput(f"--stop {text} is not one token of the tokenizer")
        stop_ids.add(ids[0])
    return stop_ids


def check_sizes(model, tokenizer, problems, args):
    """BadInput if the model has no embedding of a token, or of a position, that these problems need."""
    stop_tokens(model, tokenizer, args)
    embedding = model.get_input_embeddings()
    largest = max(max(problem["ids"]) for problem in problems)
    if largest >= len(embedding.weight):
        raise BadInput(f"a prompt has token {largest}, and the model knows {len(embedding.weight)}: another tokenizer?")
    longest = max(len(problem["ids"]) for problem in problems) + args.max_completion_length
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or longest
    if longest > limit:
        message = f"prompts and completions of up to {longest} tokens, and the model knows {limit} positions"
        if not getattr(config, "rope_parameters", None):  # a table of positions ends, rotary ones go on
            raise BadInput(f"{message}: lower --max-prompt-length or --max-completion-length")
        say(f"warning: {message} from its training")


def sample(model, engine, tokenizer, args, problems, copies, generator, temperature, top_p):
    """A group of G completions for every WORLD_SIZE-th problem, this process's: dicts of lists and tensors [G]."""
    limit, stop_ids = args.max_completion_length, stop_tokens(model, tokenizer, args)
    uniforms = torch.rand(len(problems), copies, limit, generator=generator)[RANK::WORLD_SIZE]
    problems = problems[RANK::WORLD_SIZE]
    prompts, options = [problem["ids"] for problem in problems], (sorted(stop_ids), temperature, top_p)
    with whole_weights(model):
        if engine:
            completions, log_probs = generate_vllm(engine, model, prompts, copies, limit, *options)
        else:
            completions = generate(model, prompts, uniforms, *options, args.generation_batch_size)
            log_probs = [None] * len(completions)
    bare = [x[:-1] if x[-1] in stop_ids else x for x in completions]  # a stop token need not be a special one
    columns = {
        "completions": completions,
        "log_probs": log_probs,
        "texts": tokenizer.batch_decode(bare, skip_special_tokens=not args.keep_special_tokens),
        "lengths": torch.tensor([len(x) for x in completions]).double(),
        "truncated": torch.tensor([x[-1] not in stop_ids for x in completions]).double(),
    }
    slices = [slice(i, i + copies) for i in range(0, len(completions), copies)]
    return [{"problem": x} | {name: y[rows] for name, y in columns.items()} for x, rows in zip(problems, slices)]


# --- problems and rewards


def read_rows(source):
    """Rows of a JSON, JSONL or Parquet file, or of a dataset on the Hub. BadInput if they cannot be read."""
    try:
        if source.endswith((".json", ".jsonl")):  # which the package reads only if a column has one type
            text = Path(source).read_text(encoding="utf-8-sig").strip()
            whole = text.startswith("[")
            rows = json.loads(text) if whole else [json.loads(x) for x in text.split("\n") if x.strip()]
        else:
            import datasets

            datasets.disable_progress_bars()
            name, *parts = source.split(":")
            if source.endswith(".parquet"):
                rows = datasets.Dataset.from_parquet(source)
            else:
                rows = datasets.load_dataset(name, *parts[:-1], split=parts[-1] if parts else "train")
        if not rows:
            raise ValueError("no usable row")
        return list(rows)
    except Exception as error:  # the package's own errors, too
        raise BadInput(f"cannot read {source}: {one_line(error)[:200]}") from None


def column(row, named, usual):
    """The entry of a row in the named column, or in the first of the usual ones that it has; None if there is none."""
    for name in [named] if named else usual:
        value = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def true_answer(value, reward):
    """The key of an answer that a dataset gives: after ####, in its last box, or all of it. None if it has none."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    text = str("" if value is None else value).rpartition("####")[2]
    text = last_box(text) or text
    return parse_number(text) if reward == "exact" else answer_key(text)


def usable_problems(rows, source, args, tokenizer):
    """Problems (dicts) of the rows that are good; others are named and counted. BadInput if there are none."""
    problems, bad = [], []
    for i, row in enumerate(rows):
        row = row if isinstance(row, dict) else {}
        prompt = column(row, args.prompt_column, ("prompt", "problem", "question"))
        usual = ("answer", "reward_model.ground_truth", "ground_truth", "solution")
        answer = true_answer(column(row, args.answer_column, usual), args.reward)
        try:
            ids = encode(prompt, args, tokenizer)
            if not 0 < len(ids) <= args.max_prompt_length:
                raise ValueError(f"a prompt of {len(ids)} tokens")
            if answer is None and args.reward != "majority" and not args.reward_fn:  # votes need none
                raise ValueError(f"no {'number as its ' * (args.reward == 'exact')}answer")
            problems.append({"row": row, "prompt": prompt, "ids": ids, "answer": answer})
        except ValueError as error:
            bad.append(f"row {i} has {error}")
    if not problems:
        raise BadInput(f"{source} has no usable row: {bad[0]}; the last one's columns: {', '.join(map(str, row))}")
    if bad:
        say(f"{source}: {len(bad)} of {len(rows)} rows left out: {'; '.join(bad[:5])}")
    return problems


def encode(prompt, args, tokenizer):
    """Tokens of a prompt, a text or a list of chat messages. ValueError if it is neither, or is refused."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if not prompt or not all(isinstance(x, dict) and type(x.get("content")) is str for x in messages):
        raise ValueError("no prompt")
    if messages is prompt and not args.chat_template:
        raise ValueError("chat messages as its prompt: add --chat-template")
    if args.system_prompt and messages[0].get("role") == "system":
        raise ValueError("a system message of its own: leave out --system-prompt")
    if args.system_prompt:
        messages = [{"role": "system", "content": args.system_prompt}, *messages]
    try:
        if args.chat_template:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer(prompt)["input_ids"]
    except Exception as error:  # of the template's language, or of half a character
        raise ValueError(f"a prompt that tokenizer or template refuses: {one_line(error)}") from None
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids  # the text had one, too


def addition_rows():
    """All sums of two numbers from 10 to 99, in random order: a list of rows."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 100) for b in range(10, 100)]
    return [rows[i] for i in torch.randperm(len(rows), generator=make_generator("addition"))]


def make_problems(args, tokenizer):
    """Problems to train on and held-out ones: two lists."""
    if args.dataset:
        problems = held_out = usable_problems(read_rows(args.dataset), args.dataset, args, tokenizer)
    else:
        sums = usable_problems(addition_rows(), "the built-in task", args, tokenizer)
        problems, held_out = sums[500:], sums[:500]
    if args.eval_dataset:
        held_out = usable_problems(read_rows(args.eval_dataset), args.eval_dataset, args, tokenizer)
    held_out = [x for x in held_out if x["answer"] is not None or args.reward_fn]
    if not held_out:
        raise BadInput(f"{args.eval_dataset or args.dataset} has no answers to evaluate with: pass --eval-dataset")
    return problems, held_out


# A completion is untrusted text: it is matched by bounded expressions, or given seconds of math-verify; never run.
WIDE = {i + 0xFEE0: i for i in range(33, 127)} | dict.fromkeys(map(ord, "−–"), "-")  # full-width characters
TEXT = r"\\(?:text|math|mbox|underline)(?:rm|bf|it)? ?"
# What follows a number without being its unit: words for numbers, and variables.
ORDINAL = "third|quarter|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+teen|[a-z]+tie)th"
NUMERAL = rf"[a-z]*illion|hundred|thousand|dozen|hal[fv]|{ORDINAL}|squared|cubed|factorial|bn|lakh|crore"
NO_UNIT = rf"(?:.*[ ./])?(?:{NUMERAL}|(?:[a-fikx-z]|pi|or|and|mod|base|binary|repeating|less|more|plus|minus)\b)"
BARE_UNIT = r"(?<=[\d ])(?:[cmk]m|kg)|(?<= )(?:grams?|met(?:er|re)s?|degrees?|dollars?|cents?|inches|feet|miles?"
BARE_UNIT += "|(?:square |cubic )?units?|percent|seconds?|minutes?|hours?|days?|weeks?|months?|years?)"
UNIT = rf"{TEXT}\{{ ?(?!{NO_UNIT})[a-zA-Z][a-zA-Z ./]*\}}|{BARE_UNIT}|\\?%|°|\^ ?\{{?\\circ\}}?"
PLAIN = [
    (r"\\!|\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
    (r"\{,\}", ","),
    (r"(?:(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z]))|\\?[$€£¥]|\\[()\[\]]|[~*\s])+", " "),  # spaces, and what is like one
    (r" ?\\[dtc]?frac ?(?:\{ ?(-?[0-9,]+) ?\}|([0-9])) ?(?:\{ ?(-?[0-9]+) ?\}|([0-9])) ?", r" \1\2/\3\4 "),
    (r"^ ?\\?[a-zA-Z]+(?:_\w|_\{\w+\})?(?:\([a-z]\))? ?= ?", ""),  # x = 5
    (rf"(?<=[\w}}) ])(?: ?(?:{UNIT})(?:\^\{{?[23]\}}?)?)+[ .]*$", ""),
    (TEXT + r"\{([^{}]*)\}", r" \1 "),
    (r"^ *\([A-E]\) *(?=[-+]? ?[\d.,/ ]+$)", ""),  # the letter of a choice
]
NUMBER = re.compile(
    r"([+-]?) ?(?:([0-9]{1,40}) (?=[1-9][0-9]*/))?"  # the sign; the whole part of a mixed number
    r"([0-9]{1,40}|[0-9]{1,3}(?:(?:,[0-9]{3}){1,12}|(?: [0-9]{3}){1,12})|(?=\.[0-9]))"  # 1000, 1,000 or 1 000
    r"(\.[0-9]{0,40})?(?: ?/ ?(-?[0-9]{1,40}))?"  # the decimals; the divisor
)
BRACES = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"  # three more within these
# A minus before a box: directly, after no operand; or alone in front of it in a formula, with spacing.
MINUS = re.compile(r"(?:^|[^\w)}\]-])[-−]\Z|[$=(] ?[-−–](?:[~$ ]|\\,)*\Z")
BOX = re.compile(rf"\s{{0,3}}(?:{BRACES}|([0-9.,/+-]{{0,40}}[0-9]))")


def plain(text):
    """An answer without its typography, its unit and the variable that it is the value of."""
    text = text.translate(WIDE)
    for pattern, new in PLAIN * 2:  # \text{5 cm} has a unit only without its wrapper
        text = re.sub(pattern, new, text)
    return text.strip()


@functools.lru_cache(10_000)
def parse_number(text):
    """The number that the text is, or None: -1,000, 0.5, 3/4, \\frac34, 1\\,000, x=5, 5\\text{ cm}, 50\\%, \\$5."""
    match = NUMBER.fullmatch(plain(text)) if len(text) <= 200 else None
    if not match or int(match[5] or 1) == 0:
        return None
    whole = Fraction(re.sub("[, ]", "", match[3]) + (match[4] or "")) / int(match[5] or 1) + int(match[2] or 0)
    return -whole if match[1] == "-" else whole


def answer_key(text):
    """By which answers are compared: a number, else plain text; None if it is empty, too long or breaks off."""
    number = parse_number(text)
    if number is not None or len(text) > 200:
        return number
    text = re.sub(r" *([^\w ]) *", r"\1", plain(text).rstrip("."))
    return None if re.search(r"[-+*/^_=<>\\]$", text) else text or None


def last_box(text):
    """What the last \\boxed or \\fbox with an end and a content holds (200 characters at most), or None.

    A minus directly before the box, or alone before it in a formula, belongs to the answer.
    """
    parts = text.replace("\\fbox", "\\boxed").rsplit("\\boxed", 8)
    for before, after in reversed([*itertools.pairwise(parts)]):
        match = BOX.match(after[:204])
        content = match and (match[1] or match[2])
        if content and content.strip():
            return "-" * bool(MINUS.search(before[-12:])) + content
    return None


def extract_answer(text, reward):
    """The key of a completion's answer, or None: that of the last box, or the number that it is as a whole."""
    if reward != "exact" and (box := last_box(text)):
        return answer_key(box)
    return None if reward == "boxed" else parse_number(text)


@functools.lru_cache(100_000)
def same_answer(answer, truth):
    """Whether two keys are the same answer: two numbers exactly; else math-verify has three seconds for each step."""
    texts = [x for x in (answer, truth) if isinstance(x, str)]
    if answer is None or truth is None or answer == truth or not texts:
        return answer is not None and answer == truth
    if len(texts) == 1 and not re.search(r"[\\^(*+]", texts[0]):  # parse_number would have read it
        return False
    if len(texts) == 1 and re.search("[a-zA-Z_=]", re.sub(r"\\[a-zA-Z]+", "", texts[0])):  # a variable is no number
        return False
    import math_verify
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        parsed = [math_verify.parse(f"${x}$", parsing_timeout=3) for x in (truth, answer)]
        return bool(math_verify.verify(*parsed, timeout_seconds=3))
    except (Exception, TimeoutException):  # what it cannot read is not the answer
        return False


@functools.cache
def load_function(name):
    """The function that module:function or path.py:function names. BadInput if there is none."""
    module, _, function = name.rpartition(":")
    sys.path.append(os.getcwd())
    try:
        return (runpy.run_path(module) if module.endswith(".py") else vars(importlib.import_module(module)))[function]
    except (Exception, SystemExit) as error:  # of the module's own code, too
        where = "module:function or path.py:function"
        raise BadInput(f"--reward-fn takes {where}, and {name} cannot be loaded: {one_line(error)}") from None


def true_rewards(groups, args):
    """Rewards [P, G] of P groups of G texts, by --reward-fn or the true answers."""
    if args.reward_fn:
        return function_rewards(groups, args)
    right = [
        [same_answer(extract_answer(x, args.reward), group["problem"]["answer"]) for x in group["texts"]]
        for group in groups
    ]
    return torch.tensor(right, dtype=torch.float64)


def reward_keywords(groups):
    """What TRL passes to a reward function: lists with an entry per completion, of messages if the prompt is."""
    problems = [group["problem"] for group in groups for _ in group["texts"]]
    names = {name for problem in problems for name in problem["row"]} - {"prompt", "completion"}
    columns = {name: [problem["row"].get(name) for problem in problems] for name in names}
    return columns | {
        "prompts": [problem["prompt"] for problem in problems],
        "completions": [
            [{"role": "assistant", "content": text}] if isinstance(group["problem"]["prompt"], list) else text
            for group in groups
            for text in group["texts"]
        ],
        "completion_ids": [ids for group in groups for ids in group["completions"]],
    }


def check_functions(problems, args):
    """BadInput if a --reward-fn cannot be loaded, or wants what it is not passed."""
    passed = reward_keywords([{"problem": x, "texts": [""], "completions": [[]]} for x in problems])
    for name in args.reward_fn:
        function = load_function(name)
        try:
            inspect.signature(function).bind(**passed)
        except (TypeError, ValueError) as error:
            raise BadInput(f"--reward-fn {name}: {error}; it is passed {', '.join(sorted(passed))}") from None


def function_rewards(groups, args):
    """The weighted sum of what the functions return, of those that apply (not None): [P, G]. BrokenRun if they fail."""
    keywords = reward_keywords(groups)
    count, totals, applied = len(keywords["completions"]), 0.0, False
    for name, weight in zip(args.reward_fn, args.reward_weights or itertools.repeat(1.0)):
        try:
            rewards = load_function(name)(**keywords)
            rewards = asyncio.run(rewards) if inspect.iscoroutine(rewards) else rewards
        except (Exception, SystemExit) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise BrokenRun(f"--reward-fn {name}: {one_line(error)} ({last.filename}, line {last.lineno})") from error
        try:
            rewards = list(rewards)
            own = torch.tensor([0.0 if x is None else x for x in rewards], dtype=torch.float64)
        except Exception:  # no list, or not of numbers
            own = torch.empty(0)
        if own.shape != (count,) or not own.isfinite().all():
            raise BrokenRun(f"{name} must return {count} finite numbers or None, one per completion")
        totals += weight * own
        applied |= torch.tensor([x is not None for x in rewards])
    if not applied.all():
        raise BrokenRun("a completion has no reward: every --reward-fn returned None")
    return totals.view(len(groups), -1)


def majority_vote(keys):
    """The most common key that is not None, the earliest of equals; None if there is none."""
    counts = Counter(key for key in keys if key is not None)
    return max(counts, key=counts.get, default=None)


def majority_rewards(groups, args):
    """TTRL: rewards [P, V], 1 for the label that most of a group gave; statistics [P], NaN where no truth is known."""
    keys = [[extract_answer(text, args.reward) for text in group["texts"]] for group in groups]
    labels, truths = [majority_vote(group) for group in keys], [group["problem"]["answer"] for group in groups]
    rewards = torch.tensor([[k is not None and k == label for k in x] for x, label in zip(keys, labels)]).double()
    known = torch.tensor([math.nan if truth is None else 1.0 for truth in truths]).double()
    stats = {
        "ttrl/label_accuracy": known * torch.tensor(list(map(same_answer, labels, truths))),
        "ttrl/majority_ratio": rewards.mean(1),
        "ttrl/ground_truth_ratio": known * true_rewards(groups, args).mean(1),
    }
    return rewards, stats


# --- training


def make_generator(*purpose):
    """Random numbers that a purpose determines, so that none are saved for a resume."""
    return torch.Generator().manual_seed(zlib.crc32(repr(purpose).encode()))


def draw(size, first, count, seed):
    """A part of an endless sequence that goes through range(size) in ever new orders: [count]"""
    epochs = range(first // size, (first + count - 1) // size + 1)
    orders = [torch.randperm(size, generator=make_generator("problems", seed, epoch)) for epoch in epochs]
    return torch.cat(orders)[first - epochs[0] * size :][:count]


def num_samples(args):
    """Completions per prompt: to train on, or to vote."""
    return args.num_votes if args.reward == "majority" else args.group_size


def rollout(sampler, problems, drawn, args):
    """This process's groups for the prompts after the first `drawn`, and statistics [P, V] or [P] of all sampled.

    In up to --resample-rounds further draws, others take the place of groups whose rewards are all equal.
    """
    groups, stats = draw_groups(sampler, problems, drawn, args)
    for _ in range(args.resample_rounds if args.objective == "dapo" else 0):
        empty = [i for i, group in enumerate(groups) if group["rewards"].min() == group["rewards"].max()]
        if not any(gather(empty)):
            break
        drawn += args.num_prompts
        more, more_stats = draw_groups(sampler, problems, drawn, args)
        stats = {name: torch.cat([x, more_stats[name]]) for name, x in stats.items()}
        for i, group in zip(empty, (x for x in more if x["rewards"].min() < x["rewards"].max())):
            groups[i] = group
    return groups, stats


def draw_groups(sampler, problems, drawn, args):
    """One draw of rollout, of which each process has every WORLD_SIZE-th group: an equal part of each minibatch."""
    problems = [problems[i] for i in draw(len(problems), drawn, args.num_prompts, args.seed).tolist()]
    generator = make_generator("completions", args.seed, drawn)
    groups = sampler(problems, num_samples(args), generator, args.sampling_temperature, 1.0)
    if args.reward == "majority":
        rewards, stats = majority_rewards(groups, args)
    else:
        rewards, stats = true_rewards(groups, args), {}
    stats |= {"reward": rewards, "length": torch.stack([group["lengths"] for group in groups])}
    stats["completions/clipped_ratio"] = torch.stack([group["truncated"] for group in groups])
    for group, reward in zip(groups, rewards):
        group["rewards"] = reward
        for name in group.keys() - {"problem"}:
            group[name] = group[name][: args.group_size]  # of all votes
    # in the order of the prompts again, of which each process has every WORLD_SIZE-th
    return groups, {name: torch.stack(gather(x), 1).flatten(0, 1) for name, x in stats.items()}


def pack(prompts, completions, budget):
    """Micro-batches of rows of like length, of at most budget tokens (or one row): lists of row numbers."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(completions[i]))
    parts, before, after = [], 0, 0
    for i in order:
        before, after = max(before, len(prompts[i])), max(after, len(completions[i]))
        if not parts or (len(parts[-1]) + 1) * (before + after) > budget:
            parts.append([])
            before, after = len(prompts[i]), len(completions[i])
        parts[-1].append(i)
    return parts


def make_minibatches(model, reference, groups, args):
    """Minibatches of this process's groups, which stay as they are for all epochs."""
    rewards = torch.stack([group["rewards"] for group in groups])
    scale = "none" if args.objective == "dr_grpo" else args.scale_rewards
    for group, advantages in zip(groups, group_advantages(rewards, scale)):
        group["advantages"] = advantages
    size = args.minibatch_prompts // WORLD_SIZE
    return [make_minibatch(model, reference, groups[i : i + size], args) for i in range(0, len(groups), size)]


@torch.no_grad()
def make_minibatch(model, reference, groups, args):
    """A list of micro-batches: tensors [B, T] and [B], left_padded, and tokens, the minibatch's count.

    The old log-probabilities come from the same computation as the new ones, so the first ratio is exactly 1: with
    a target of 1 GBPO's loss has its kink there, and noise would turn into gradient.
    """
    prompts = [group["problem"]["ids"] for group in groups for _ in group["completions"]]
    completions, sampled = ([x for group in groups for x in group[name]] for name in ("completions", "log_probs"))
    names = ("truncated", "advantages")
    columns = {name: torch.cat([group[name] for group in groups]).float() for name in names}
    keep = 1 - columns.pop("truncated") * args.mask_truncated
    tokens = max(1.0, sum(gather((keep * torch.tensor([len(x) for x in completions])).sum().item())))
    counts = args.minibatch_prompts * args.group_size, tokens, args.max_completion_length
    parts, batches = pack(prompts, completions, args.micro_batch_tokens), []
    passes = max(gather(len(parts))) if args.fsdp else len(parts)  # FSDP: as many in every process
    for k in range(passes):
        rows = parts[k % len(parts)]
        batch = collate([prompts[i] for i in rows], [completions[i] for i in rows], model.device)
        batch |= {name: x[rows].to(model.device) for name, x in columns.items()}
        batch["mask"] *= keep[rows, None].to(model.device) * (k < len(parts))  # what is passed again does not count
        batch["weights"] = token_weights(batch["mask"], AGGREGATIONS[args.objective], *counts)
        batch["tokens"] = tokens
        for name, policy in (("old_log_probs", model), ("ref_log_probs", reference)):
            if policy is not None:
                batch[name] = token_log_probs(policy, batch, args.sampling_temperature)[0]
        if args.generator == "vllm":  # its probabilities differ a little: importance weights, at most 2
            theirs = nn.utils.rnn.pad_sequence([torch.tensor(sampled[i]) for i in rows], batch_first=True)
            batch["weights"] *= (batch["old_log_probs"] - theirs.to(model.device)).exp().clamp(max=2)
        batches.append(batch)
    return batches


class Learner:
    """Adam on float32 copies of the weights: of a float32 model, on the weights themselves."""

    def __init__(self, model, args):
        self.args, self.updates = args, 0
        self.weights = [x for x in model.parameters() if x.requires_grad]
        self.masters = [x.detach().float() for x in self.weights]
        self.optimizer = torch.optim.Adam(self.masters, lr=args.learning_rate, fused=True)

    def step(self, completions):
        """A step along all processes' gradients, after so many completions; their norm [] before it is clipped."""
        for weight, master in zip(self.weights, self.masters):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()  # None: not used
            weight.grad = None
            if self.args.fsdp:
                master.grad *= WORLD_SIZE  # FSDP has taken the mean
            elif WORLD_SIZE > 1:
                dist.all_reduce(master.grad)
        norm = full(nn.utils.clip_grad_norm_(self.masters, self.args.max_grad_norm))
        self.updates += 1
        warmup = min(1, self.updates / max(1, self.args.lr_warmup))
        done = completions / self.args.total_timesteps
        schedule = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
        self.optimizer.param_groups[0]["lr"] = self.args.learning_rate * warmup * schedule[self.args.lr_schedule]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.copy_to_model()
        return norm

    def copy_to_model(self):
        for weight, master in zip(self.weights, self.masters):
            weight.detach().copy_(master)

    def state_dict(self):
        """Whole tensors on the CPU, for which all processes are needed; only the first gets them."""
        state = {"parameters": self.masters, "optimizer": self.optimizer.state_dict(), "updates": self.updates}
        return tree_map(on_first, state)

    def load_state_dict(self, state):
        for saved, master in zip(state["parameters"], self.masters, strict=True):
            master.copy_(like(saved, master))
        for i, own in state["optimizer"]["state"].items():
            own |= {name: like(x, self.masters[i]) for name, x in own.items() if x.ndim}
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
        self.copy_to_model()


def update(model, learner, minibatches, completions, generator, args):
    """Epochs of gradient steps: the statistics' means, and the last epoch's ratios [tokens], each before its step."""
    totals = Counter()
    for _ in range(args.update_epochs):
        kept = []
        for i in torch.randperm(len(minibatches), generator=generator).tolist():
            for batch in minibatches[i]:
                loss, stats, ratio = minibatch_loss(model, batch, args)
                loss.backward()
                kept.append((ratio.detach(), batch["mask"]))
                totals.update({name: x.detach() for name, x in stats.items()})  # adds
            totals["grad_norm"] += learner.step(completions) / WORLD_SIZE  # of which the sum is taken below
    sums = torch.stack(list(totals.values()))
    if WORLD_SIZE > 1:
        dist.all_reduce(sums)
    means = sums / (args.update_epochs * len(minibatches))
    ratios = torch.cat([ratio[mask > 0].cpu() for ratio, mask in kept])  # only now, as it waits for the GPU
    metrics = dict(zip(totals, means.tolist()))
    metrics["learning_rate"] = learner.optimizer.param_groups[0]["lr"]
    return metrics, torch.cat(gather(ratios))


def measure(stats, ratios, args):
    """Metrics of the completions, statistics [P, V] or [P], and of the tokens' ratios (Figure 7)."""
    rewards, lengths, (low, high) = stats["reward"], stats["length"], ratio_bounds(args)
    trained = rewards[:, : args.group_size]
    ratios = ratios if len(ratios) else torch.ones(1)  # --mask-truncated has left out all
    metrics = {name: x.nanmean() for name, x in stats.items() if name != "length"} | {
        "reward_std": trained.std(1).mean(),
        "frac_reward_zero_std": (trained.amax(1) == trained.amin(1)).double().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/max_length": lengths.max(),
        "ratio/out_of_bounds": ((ratios < low) | (ratios > high)).float().mean(),
        "ratio/max": ratios.max(),
        "ratio/min": ratios.min(),
    }
    for name, chosen in (("high", ratios >= 1), ("low", ratios <= 1)):
        side = ratios[chosen] if chosen.any() else torch.ones(1)
        metrics |= {f"ratio/{name}_mean": side.mean(), f"ratio/{name}_std": side.std(correction=0)}
    return {name: x.item() for name, x in metrics.items()}


def evaluate(sampler, problems, args):
    """Figures of held-out problems, with the same noise every time (not by vLLM); a --reward-fn votes by whole text."""
    problems, sums = problems[: args.eval_problems], torch.zeros(4).double()
    generator = make_generator("evaluation")
    groups = sampler(problems, args.eval_samples, generator, args.eval_temperature, args.eval_top_p)
    for group, scores in zip(groups, true_rewards(groups, args) if groups else []):
        keys = [x.strip() if args.reward_fn else extract_answer(x, args.reward) for x in group["texts"]]
        vote = majority_vote(keys)
        best = torch.tensor(0.0) if vote is None else scores[keys.index(vote)]
        sums += torch.stack([scores.mean(), best, group["lengths"].mean(), group["truncated"].mean()])
    names = ("pass@1", f"maj@{args.eval_samples}", "mean_length", "clipped_ratio")
    return dict(zip(names, (sum(gather(sums)) / len(problems)).tolist()))


def train(args):
    """Trains a model and returns its run's folder. BadInput before anything is created, BrokenRun, SystemExit."""
    with Run(args) as run:
        run.load()
        device = start_processes(args)
        model, tokenizer = make_model(args, device)
        problems, held_out = make_problems(args, tokenizer)
        check_functions(problems + held_out, args)
        check_sizes(model, tokenizer, problems + held_out, args)
        engine = make_vllm(args) if args.generator == "vllm" else None
        if not args.model and (args.kl_coef or not run.saved):  # a resumed run needs it for the reference only
            warm_up(model, tokenizer, problems, args)
        problems = problems[: args.train_problems]
        reference = copy.deepcopy(model) if args.kl_coef else None
        if args.fsdp:
            shard(model, device)
        if args.fsdp and reference:
            shard(reference, device)
        learner = Learner(model, args)
        run.begin(learner, problems + held_out)  # restores it, or makes the folder: all is known to fit by now
        sampler = functools.partial(sample, model, engine, tokenizer, args)
        if not run.saved:
            run.log_evaluation(evaluate(sampler, held_out, args))
            run.save()
        while run.step < args.total_timesteps and not any(gather(run.stopping)):
            start, drawn = time.perf_counter(), run.step // num_samples(args)  # prompts so far
            groups, stats = rollout(sampler, problems, drawn, args)
            minibatches = make_minibatches(model, reference, groups, args)
            sampled, step = time.perf_counter(), run.step + stats["reward"].numel()
            generator = make_generator("minibatches", args.seed, drawn + len(stats["reward"]))
            losses, ratios = update(model, learner, minibatches, run.step, generator, args)
            metrics = losses | measure(stats, ratios, args)
            seconds = {"time/rollout": sampled - start, "time/update": time.perf_counter() - sampled}
            metrics |= seconds | {"tokens_per_second": stats["length"].sum().item() / sum(seconds.values())}
            run.log(step, metrics, stats, groups)
            iteration = learner.updates // (args.update_epochs * len(minibatches))
            if iteration % args.eval_interval == 0 or step >= args.total_timesteps:
                run.log_evaluation(evaluate(sampler, held_out, args))
            run.save(args.checkpoint_seconds)
        return run.finish(model, tokenizer)


# --- running: folders, logs and checkpoints; no algorithm below

FORMAT = 2  # of args.json and checkpoints
KEYS = {"checkpoint.pt": {"learner", "step", "log_sizes"}}
LOGS = ("episodes.csv", "metrics.csv", "evaluations.csv", "completions.jsonl")
MAY_VARY = (
    "resume total_timesteps micro_batch_tokens generation_batch_size gradient_checkpointing fsdp device vllm_memory "
    "output_dir checkpoint_seconds track wandb_project_name wandb_entity"
).split()


class BadInput(ValueError):
    """One line, exit status 2."""


class BrokenRun(RuntimeError):
    """One line, exit status 1."""


def start_processes(args):
    """Joins the processes that torchrun started; returns this one's device. BadInput if the machine does not fit."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise BadInput("--device cuda: there is no GPU that PyTorch can use")
    if cuda and (gpus := torch.cuda.device_count()) < LOCAL_WORLD_SIZE:
        raise BadInput(f"every process needs its own GPU, and there are {gpus}: start as many, or pass --device cpu")
    if args.minibatch_prompts % WORLD_SIZE:
        raise BadInput(f"--minibatch-prompts must be a multiple of the {WORLD_SIZE} processes")
    if args.fsdp and WORLD_SIZE == 1:
        raise BadInput("--fsdp needs several processes: start the script with torchrun --nproc-per-node N")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # the first one speaks for all
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


def gather(x):
    """What each process passes (tensors on the CPU), as a list in all of them."""
    parts = [x] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(parts, x)
    return parts


def shard(model, device):
    """FSDP2: splits the weights of every layer over the processes."""
    mesh = init_device_mesh(device.type, (WORLD_SIZE,))  # by default it would be the GPUs'
    for layer in [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def whole_weights(model):
    """FSDP: keeps each layer's gathered weights between forward passes, for sampling."""
    sharded = [x for x in model.modules() if hasattr(x, "set_reshard_after_forward")]
    for module in sharded:
        module.set_reshard_after_forward(False)
        module.unshard()
    yield
    for module in sharded:
        module.set_reshard_after_forward(True)
        module.reshard()


def full(x):
    """The whole of a sharded tensor, for which all processes are needed; all else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def on_first(x):
    """full(x) on the CPU in the first process; None in the others, which need not hold it."""
    x = full(x)
    return (x.cpu() if isinstance(x, torch.Tensor) else x) if RANK == 0 else None


def like(x, other):
    """The whole tensor x, on the device and in the shards of other."""
    x = x.to(other.device)
    return distribute_tensor(x, other.device_mesh, other.placements) if isinstance(other, DTensor) else x


def save_model(model, tokenizer, folder):
    """Writes weights, configuration and tokenizer, all or nothing; all processes take part."""
    state = tree_map(on_first, model.state_dict())
    if RANK == 0:
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)


class Run(ExitStack):
    """A run's folder, new or resumed: lock, settings, logs and checkpoints; the progress line; stop signals.

    The first process writes; all take part in checkpoints. step counts the completions sampled so far.
    """

    def __init__(self, args):
        super().__init__()
        self.args, self.step, self.stopping, self.saved, self.learner = args, 0, False, {}, None

    def load(self):
        """Locks the folder and reads the checkpoint, if this is to resume a run."""
        if self.args.resume is not None:
            self.dir = Path(self.args.resume)
            if RANK == 0 and self.dir.exists():
                self.enter_context(FileLock(self.dir / "lock", timeout=0))
            settings, self.saved = load_run(self.dir, "checkpoint.pt")
            for name, value in vars(settings).items():
                if getattr(self.args, name) != value and name not in MAY_VARY:
                    raise BadInput(f"a run keeps its settings: leave out --{name.replace('_', '-')}")
            self.step = self.saved["step"]
            if self.step >= self.args.total_timesteps and (self.dir / "model").exists():
                raise BadInput(f"{self.dir} is complete: to go on, add a larger --total-timesteps")

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        if self.stopping and isinstance(error, Exception) and not isinstance(error, BrokenRun | OSError):
            # It is of a library that Ctrl-C has reached as well.
            raise SystemExit(self.stop_message()) from None
        if self.learner and out_of_memory(error):
            less = "lower --generation-batch-size, for sampling, or --micro-batch-tokens, for learning"
            saved = (self.dir / "checkpoint.pt").exists()
            raise SystemExit(f"error: out of memory: {less}{'; ' + self.command() if saved else ''}") from None

    def begin(self, learner, problems):
        """Restores the learner, or makes the folder; opens the logs. The problems must be those that the run had."""
        self.learner, args = learner, self.args
        data = zlib.crc32(repr([x["row"] for x in problems]).encode(errors="surrogatepass"))
        about = self.restore(data) if self.saved else self.make_dir() | {"data": data}
        if RANK == 0:
            if args.track:
                names = dict(project=args.wandb_project_name, entity=args.wandb_entity, id=self.dir.resolve().name)
                try:
                    import wandb

                    wandb.init(**names, config=vars(args), dir=self.dir, resume="allow", sync_tensorboard=True)
                except Exception as error:  # it has many kinds
                    if not self.saved:
                        shutil.rmtree(self.dir)
                        with suppress(OSError):  # other runs are in it
                            self.dir.parent.rmdir()
                    raise BadInput(f"--track: {one_line(error)}; WANDB_MODE=offline needs no account") from None
                self.callback(wandb.finish)
            # All that may be refused is behind; a kill from here on leaves no longer run that looks complete.
            shutil.rmtree(self.dir / "model", ignore_errors=True)
            about["args"] = vars(args) | {"resume": None}
            write_atomically(self.dir / "args.json", json.dumps(about, indent=2).encode())
            self.logs = {name: self.enter_context((self.dir / name).open("a")) for name in LOGS}
            self.writer = self.enter_context(SummaryWriter(self.dir, purge_step=self.step + 1))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # which nohup sets
                self.callback(signal.signal, number, signal.signal(number, self.request_stop))
        self.first_step = self.step
        self.start_time = self.line_time = self.save_time = time.time()
        size, device = sum(x.numel() for x in learner.masters) / 1e6, learner.masters[0].device.type
        say(f"{args.env_id}, seed {args.seed}, {size:.2f}M parameters, {WORLD_SIZE} x {device}: {self.dir}")

    def make_dir(self):
        """Makes the folder; returns what args.json is to say besides the settings."""
        name = f"{self.args.env_id}__{self.args.exp_name}__{self.args.seed}__{time.time():.6f}"
        self.dir = gather(Path(self.args.output_dir, re.sub(r"[^\w.-]", "-", name)))[0]
        if RANK == 0:
            try:
                self.dir.mkdir(parents=True)
            except OSError as error:
                raise BadInput(f"cannot make {self.dir}: {error.strerror}; choose another --output-dir") from None
            self.enter_context(FileLock(self.dir / "lock", timeout=0))
        git = "git --no-optional-locks describe --always --dirty --abbrev=40 2>/dev/null || true"
        commit = subprocess.check_output(git, shell=True, text=True, cwd=Path(__file__).resolve().parent).strip()
        modules = {"torch", "transformers", "tokenizers", "numpy", "vllm"} & set(sys.modules)
        about = {"format": FORMAT, "script": SCRIPT, "commit": commit, "python": sys.version.split()[0]}
        return about | {"versions": {name: version(name) for name in sorted(modules)}}

    def restore(self, data):
        """Reads all, then changes: the learner, the logs as they were. Returns args.json."""
        about = json.loads((self.dir / "args.json").read_bytes())
        if about.get("data") != data:
            raise BadInput(f"the problems have changed since {self.dir} began: --dataset or --eval-dataset")
        try:
            self.learner.load_state_dict(self.saved["learner"])
        except Exception:  # damaged checkpoints raise many kinds
            raise BadInput(f"the checkpoint in {self.dir} does not fit its args.json or the model") from None
        sizes = {self.dir / Path(name).name: size for name, size in self.saved["log_sizes"].items()}
        if lost := [path for path, size in sizes.items() if not path.exists() or path.stat().st_size < size]:
            raise BadInput(f"{lost[0]} has lost rows that it had when the checkpoint was made")
        if RANK == 0:
            for path, size in sizes.items():
                os.truncate(path, size)  # drops rows written after the checkpoint
        return about

    def request_stop(self, number, frame):
        """The first signal ends the run after the iteration, a second one ends the process at once."""
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)

    def log(self, step, metrics, stats, groups):
        """Writes an iteration: metrics, all rewards and lengths, and four completions. BrokenRun if not finite."""
        for name, value in metrics.items():
            if not math.isfinite(value) and not name.startswith("ttrl/"):  # which may be unknown
                raise BrokenRun(f"{name} is {value} at step {step}")
        self.step = step
        if RANK > 0:
            return
        for reward, length in zip(stats["reward"].flatten().tolist(), stats["length"].flatten().tolist()):
            self.write("episodes.csv", {"return": reward, "length": length})
        sps = (step - self.first_step) / (time.time() - self.start_time)
        metrics["charts/SPS"] = sps
        self.write("metrics.csv", metrics)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        for i, group in enumerate(groups[:4]):
            own = {"step": step, "completion": group["texts"][0], "reward": group["rewards"][0].item()}
            line = json.dumps(group["problem"]["row"] | own, default=str)
            self.logs["completions.jsonl"].write(line + "\n")
            self.writer.add_text(f"completions/{i}", "    " + line, step)
        live, left = os.isatty(1), max(self.args.total_timesteps - step, 0) / sps
        if live or time.time() - self.line_time > 30:
            line = f"step {step}, {sps:.0f} completions/s, reward {metrics['reward']:.4g}, {left:.0f} s left    "
            say(line, end="\r" if live else "\n")
            self.line_time = time.time()

    def log_evaluation(self, result):
        """result: figure -> number, of held-out problems."""
        where = "training problems" if self.args.dataset and not self.args.eval_dataset else "held-out"
        text = ", ".join(f"{name} {x:.4g}" for name, x in result.items())
        say(f"step {self.step}, {where}: {text.replace('pass@1', 'reward') if self.args.reward_fn else text}")
        if RANK == 0:
            self.write("evaluations.csv", result)
            for name, value in result.items():
                self.writer.add_scalar(f"eval/{name}", value, self.step)

    def write(self, log, row):
        """Adds a row to a CSV file, after a header if it is the first."""
        file = self.logs[log]
        if file.tell() == 0:
            print("step", *row, sep=",", file=file)
        print(self.step, *(f"{x:.8g}" for x in row.values()), sep=",", file=file)

    def save(self, seconds=0):
        """Writes the checkpoint if the last is so old. BrokenRun, and that one stays, if a weight is not finite."""
        if not any(gather(time.time() - self.save_time >= seconds)):
            return
        if not full(nn.utils.get_total_norm(self.learner.masters)).isfinite():
            raise BrokenRun(f"a weight is not finite at step {self.step}")
        state = {"learner": self.learner.state_dict(), "step": self.step, "log_sizes": {}}
        if RANK == 0:
            self.writer.flush()
            for name, file in self.logs.items():
                file.flush()
                os.fsync(file.fileno())
                state["log_sizes"][name] = file.tell()
            write_atomically(self.dir / "checkpoint.pt", state)
        self.save_time = time.time()

    def finish(self, model, tokenizer):
        """Saves the last checkpoint and, if the run is complete, the model; returns the folder."""
        self.save()
        if self.step < self.args.total_timesteps:
            raise SystemExit(self.stop_message())
        try:
            save_model(model, tokenizer, self.dir / "model")
        except Exception as error:  # a full disk: every library has its own
            raise OSError(f"cannot write {self.dir / 'model'}: {one_line(error)}; {self.command()}") from None
        say(f"complete at step {self.step}; the model: {self.dir / 'model'}")
        return str(self.dir)

    def stop_message(self):
        return f"stopped at step {self.step}; {self.command()}"

    def command(self):
        launcher = ["torchrun", f"--nproc-per-node={LOCAL_WORLD_SIZE}"] if WORLD_SIZE > 1 else [sys.executable]
        words = [*launcher, os.path.abspath(__file__), "--resume", str(self.dir.resolve())]
        words += ["--reward-fn", *self.args.reward_fn] if self.args.reward_fn else []
        return f"go on with: {shlex.join(words)}"


def say(text, end="\n"):
    """Prints a line; a reader that went away (as in `| head`) does not end the run."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def write_atomically(path, content):
    """Writes bytes, or a dict as torch.save does, so that path never holds half a file."""
    if isinstance(content, dict):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getbuffer()
    temporary = Path(f"{path}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else a power cut could leave the new name without the content
    temporary.replace(path)


def out_of_memory(error):
    return isinstance(error, MemoryError) or re.search("(allocate|out of) memory|Storage size", str(error))


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0]}"


def load_run(run_dir, name):
    """The settings of a run, read strictly, and one of its checkpoints; BadInput if they are missing or damaged."""
    try:
        about = json.loads(Path(run_dir, "args.json").read_bytes())
        if (about["script"], about.get("format")) != (SCRIPT, FORMAT):
            raise ValueError(f"it was made by another script or version, {about['script']}.py")
        args = TypeAdapter(Args).validate_json(json.dumps(about["args"]), strict=True)  # strict takes JSON only
        if missing := vars(args).keys() - about["args"].keys():
            raise ValueError(f"args.json lacks {', '.join(sorted(missing))}")
        if zipfile.ZipFile(Path(run_dir, name)).testzip():  # compares checksums
            raise ValueError(f"{name} is damaged")
        checkpoint = torch.load(Path(run_dir, name), weights_only=True, map_location="cpu", mmap=True)
        if missing := KEYS[name] - set(checkpoint):
            raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
        return args, checkpoint
    except Exception as error:  # damaged files raise many kinds
        raise BadInput(f"cannot use the run {run_dir}: {one_line(error)}") from None


def read_args(words):
    """Args from the command line. With --resume the run's settings are the defaults."""
    os.environ["PYDANTIC_ERRORS_INCLUDE_URL"] = "0"
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?")
    parser.add_argument("--reward-fn", "--reward_fn", nargs="+", default=())
    typed = parser.parse_known_args(words)[0]
    if typed.resume is None:
        return tyro.cli(Args, args=words)
    saved, _ = load_run(typed.resume, "checkpoint.pt")
    saved.resume = typed.resume
    if saved.reward_fn and tuple(typed.reward_fn) != saved.reward_fn:  # code that a file names is not run
        raise BadInput(f"the run calls code: if it is yours, add --reward-fn {shlex.join(saved.reward_fn)}")
    return tyro.cli(Args, args=words, default=saved)


if __name__ == "__main__":
    try:
        train(read_args(sys.argv[1:]))
    except (BadInput, Timeout) as error:
        if LOCAL_RANK == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenRun as error:
        sys.exit(f"error: {error}. Checkpoints made before are kept; resumed with the same settings it ends here again")
    except Exception as error:
        if not isinstance(error, OSError) and not out_of_memory(error):
            raise
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized() and "vllm" not in sys.modules:  # vLLM ends all process groups itself
            dist.destroy_process_group()
