"""Records the losses that TRL's GRPOTrainer computes, for test_llm.py: tests/trl_losses.json.

    pip install trl==1.16.0
    python tests/record_trl_losses.py

The trainer's own _compute_loss runs on log-probabilities that are given to it; no model takes part.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

HIGH, LOW, LENGTH = 1.28, 0.8, 6
# TRL's loss_type and importance_sampling_level of each objective
TYPES = dict(grpo=("grpo", "token"), dr_grpo=("dr_grpo", "token"), dapo=("dapo", "token"))
TYPES |= dict(gspo=("grpo", "sequence"), sapo=("sapo", "token"))


class Trainer(GRPOTrainer):
    """What _compute_loss reads of a trainer, without a model."""

    def __init__(self, loss_type, level, log_probs):
        self.args = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[])
        self.loss_type, self.importance_sampling_level, self.log_probs = loss_type, level, log_probs
        self.epsilon_low, self.epsilon_high, self.beta = 1 - LOW, HIGH - 1, 0.05
        self.max_completion_length, self.current_gradient_accumulation_steps = LENGTH, 1
        self.args.steps_per_generation, self.args.use_bias_correction_kl = 1, False  # plain k3
        self.top_entropy_quantile, self.off_policy_mask_threshold, self.use_vllm = 1.0, None, False
        self.aux_loss_enabled = self._entropy_bonus_enabled = self.use_liger_kernel = False
        self.model = SimpleNamespace(training=True)
        self.accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.log_probs, torch.zeros_like(self.log_probs), None


def main():
    generator = torch.Generator().manual_seed(0)
    log_probs = -3 * torch.rand(5, LENGTH, generator=generator)
    inputs = {"log_probs": log_probs, "mask": (torch.arange(LENGTH) < torch.tensor([[6], [3], [1], [4], [5]])).float()}
    inputs["old_log_probs"] = log_probs + 0.4 * torch.randn(5, LENGTH, generator=generator)
    inputs["ref_log_probs"] = log_probs + 0.3 * torch.randn(5, LENGTH, generator=generator)
    inputs["advantages"] = torch.tensor([1.25, -0.5, 0.0, 0.75, -1.5])
    losses = {}
    for objective, (loss_type, level) in TYPES.items():
        chosen = log_probs.clone().requires_grad_()
        trl_inputs = {"prompt_ids": torch.ones(5, 2).long(), "prompt_mask": torch.ones(5, 2).long()}
        trl_inputs |= {"completion_ids": torch.ones(5, LENGTH).long(), "completion_mask": inputs["mask"]}
        trl_inputs |= {"advantages": inputs["advantages"], "num_items_in_batch": inputs["mask"].sum()}
        trl_inputs |= {"old_per_token_logps": inputs["old_log_probs"], "ref_per_token_logps": inputs["ref_log_probs"]}
        loss = Trainer(loss_type, level, chosen)._compute_loss(None, trl_inputs)
        losses[objective] = {"loss": loss.item(), "gradient": torch.autograd.grad(loss, chosen)[0].tolist()}
    record = {"trl": trl.__version__, "high": HIGH, "low": LOW, "max_completion_length": LENGTH}
    record |= {"inputs": {name: x.tolist() for name, x in inputs.items()}, "losses": losses}
    Path(__file__).with_name("trl_losses.json").write_text(json.dumps(record) + "\n")
    print({name: x["loss"] for name, x in losses.items()})


if __name__ == "__main__":
    main()
