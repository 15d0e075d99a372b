"""TRL's GRPOTrainer with gbpo_llm.py's defaults, 64 prompts x 8 completions per iteration, for benchmark/speed.py.

Prints (completion tokens, time) at the start and after each iteration, counted from reward to reward.
"""

import json
import random
import sys
import tempfile
import time

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

case, points, tokens = json.loads(sys.argv[1]), [], 0


def reward(prompts, completions, answer, completion_ids, **_):
    global tokens
    points.append((tokens, time.perf_counter()))
    tokens += sum(map(len, completion_ids))
    return [float(x == y) for x, y in zip(completions, answer)]


torch.set_num_threads(case["cores"])
random.seed(0)
pairs = [(random.randint(10, 99), random.randint(10, 99)) for _ in range(64 * case["iterations"])]
rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
sizes = dict(per_device_train_batch_size=128, steps_per_generation=4, num_generations=8, max_completion_length=4)
with tempfile.TemporaryDirectory() as folder:
    settings = dict(output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", beta=0.0)
    settings |= dict(learning_rate=3e-4, max_steps=4 * case["iterations"], disable_tqdm=True, loss_type="grpo")
    settings |= dict(gradient_checkpointing=False)  # TRL's default recomputes activations, ours does not
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(case["model"]),
        reward,
        args=GRPOConfig(**settings, **sizes, logging_steps=4, temperature=1.0),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(case["model"], padding_side="left"),
    )
    trainer.train()
print(json.dumps(points))
