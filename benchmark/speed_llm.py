"""Completion tokens per second of training beside TRL's GRPOTrainer: the same model, prompts, batches and lengths.

    pip install -r benchmark/requirements.txt
    python benchmark/speed_llm.py

All run in turn, round by round, pinned to one core. A figure is completion tokens per second of wall time after the
first iterations: sampling, rewards, learning and logging, without evaluations and checkpoints.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3  # iterations


@dataclass
class Args:
    rounds: int = 3
    """measurements of each"""
    iterations: int = 20
    """rollouts of 64 prompts x 8 completions in each measurement"""
    core: int = 0
    """processor core that all are pinned to"""
    output: str = "benchmark/results/llm_speed"
    """folder for speed.json and speed.md"""
    peer: str | None = None
    """folder of a model: train it with TRL once and print its figure (used by the script itself)"""


def run_peer(args):
    """Trains with TRL as gbpo_llm.py's defaults do and prints its completion tokens per second."""
    import random

    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    random.seed(0)
    pairs = [(random.randint(10, 99), random.randint(10, 99)) for _ in range(64 * args.iterations)]
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    seconds, tokens = [], []

    def reward(prompts, completions, answer, completion_ids, **_):
        seconds.append(time.perf_counter())
        tokens.append(sum(map(len, completion_ids)))
        return [float(x == y) for x, y in zip(completions, answer)]

    sizes = dict(per_device_train_batch_size=128, steps_per_generation=4, num_generations=8, max_completion_length=4)
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", beta=0.0)
        settings |= dict(learning_rate=3e-4, max_steps=4 * args.iterations, disable_tqdm=True, loss_type="grpo")
        settings |= dict(gradient_checkpointing=False)  # TRL's default recomputes activations, ours does not
        config = GRPOConfig(**settings, **sizes, logging_steps=4, temperature=1.0)
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(args.peer),
            reward,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(args.peer, padding_side="left"),
        )
        trainer.train()
    rate = sum(tokens[WARM_UP:-1]) / (seconds[-1] - seconds[WARM_UP])
    print(json.dumps({"rate": rate, "completions": len(tokens) * 512, "mean_length": sum(tokens) / len(tokens) / 512}))


def pinned(command, core):
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, command))} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def measure(name, model, args):
    """Completion tokens per second of one program, pinned to the core."""
    if name == "trl":
        command = [sys.executable, __file__, f"--peer={model}", f"--iterations={args.iterations}"]
        return json.loads(pinned(command, args.core).splitlines()[-1])["rate"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / f"{name}.py"),
            f"--model={model}",
            f"--output-dir={folder}",
            "--device=cpu",
        ]
        command += [f"--total-timesteps={512 * args.iterations}", "--eval-interval=1000", "--checkpoint-interval=1000"]
        pinned(command, args.core)
        lines = next(Path(folder).glob("*/metrics.csv")).read_text().splitlines()
        rows = [dict(zip(lines[0].split(","), map(float, line.split(",")))) for line in lines[1:]]
        seconds = [row["step"] / row["charts/SPS"] for row in rows]
        tokens = sum(512 * row["completions/mean_length"] for row in rows[WARM_UP:])
        return tokens / (seconds[-1] - seconds[WARM_UP - 1])


def bad_input(line):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def main(args):
    if not importlib.util.find_spec("trl"):
        bad_input("TRL is not installed: pip install -r benchmark/requirements.txt")
    if args.iterations < WARM_UP + 2 or args.rounds < 1:
        bad_input(f"--iterations must be at least {WARM_UP + 2}, --rounds at least 1")
    programs = ("gbpo_llm", "grpo_llm", "trl")
    figures = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, str(ROOT / "gbpo_llm.py"), f"--output-dir={folder}", "--total-timesteps=512"]
        pinned([*start, "--device=cpu"], args.core)
        model = next(Path(folder).glob("*/initial_model"))
        for _ in range(args.rounds):
            for name in programs:
                figures[name].append(measure(name, model, args))
                print(name, f"{figures[name][-1]:.0f} tokens/s", flush=True)
    results, table = [], ["| program | completion tokens/s | times TRL (min to max) |", "|-|-|-|"]
    for name, rates in figures.items():
        ratios = [rate / peer for rate, peer in zip(rates, figures["trl"])]
        row = dict(program=name, tokens_per_second=statistics.median(rates), ratio=statistics.median(ratios))
        results.append(row | dict(ratio_min=min(ratios), ratio_max=max(ratios)))
        ratio = f"{row['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.append(f"| `{name}` | {row['tokens_per_second']:.0f} | {ratio} |")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "speed.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    run_peer(arguments) if arguments.peer else main(arguments)
