"""The keys of training in full: ours on those of transformers."""

from __future__ import annotations

import os
from dataclasses import dataclass

from transformers import TrainingArguments

from ..files import shipped
from ..reading import read_json_object
from ..sparsity_config import SparsityConfig
from .keys import DataArguments, ModelArguments, StageKeys

# Of the numbers of transformers, as intervals: a round bracket leaves the end out.
RANGES = {
    "per_device_train_batch_size": "[1, inf)",
    "per_device_eval_batch_size": "[1, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "num_train_epochs": "(0, inf)",
    "max_steps": "[-1, inf)",
    "learning_rate": "(0, inf)",
    "warmup_steps": "[0, inf)",
    "weight_decay": "[0, inf)",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "(0, inf)",
    "max_grad_norm": "[0, inf)",
    "neftune_noise_alpha": "(0, inf)",
    "torch_empty_cache_steps": "[1, inf)",
    "logging_steps": "(0, inf)",
    "eval_steps": "(0, inf)",
    "eval_delay": "[0, inf)",
    "save_steps": "(0, inf)",
    "save_total_limit": "[1, inf)",
    "seed": "[0, 4294967296)",
    "data_seed": "[0, 4294967296)",
    "dataloader_num_workers": "[0, inf)",
    "dataloader_prefetch_factor": "[1, inf)",
    "ddp_bucket_cap_mb": "[1, inf)",
    "ddp_timeout": "[1, inf)",
}


@dataclass
class StageArguments(StageKeys, TrainingArguments):
    """`TrainingArguments` with what the sparsification stage adds."""

    def __post_init__(self) -> None:
        if self.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing; give a number of steps, or leave it to num_train_epochs.")
        if self.global_batch_size is not None:
            # Before Trainer's own arguments are resolved: DeepSpeed's are filled from them.
            steps = self.accumulation_steps(int(os.environ.get("WORLD_SIZE", 1)))
            if self.gradient_accumulation_steps not in (1, steps):
                raise ValueError(
                    f"gradient_accumulation_steps={self.gradient_accumulation_steps} contradicts "
                    f"global_batch_size={self.global_batch_size}, which takes {steps}; leave out one of them."
                )
            self.gradient_accumulation_steps = steps
        self._check_best()
        self._resolve_stock()
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "lr_scheduler_kwargs"):
            value = getattr(self, name, None)
            if not isinstance(value, dict | None):
                raise ValueError(f"{name} must be an object such as {{a: 1}}, got {value!r}.")
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant=true cannot carry the gates of dropped tokens; leave it out.")
        for name in ("image_keep_rates", "output_keep_rates"):
            rates = getattr(self, name)
            if rates is None:
                continue
            if len(rates) != 2 or not 0 < rates[0] <= rates[1] <= 1:
                raise ValueError(f"{name} must be two rates in (0, 1], the smaller first, got {rates}.")
            if self.keep_rate_schedule != "constant":
                raise ValueError(f"{name} are drawn, keep_rate_schedule={self.keep_rate_schedule!r} would change them.")

    def _resolve_stock(self) -> None:
        """What `TrainingArguments` makes of its own keys; `deepspeed` becomes what its file holds."""
        given = self.deepspeed
        if isinstance(given, str) and not given.startswith("{"):
            self.deepspeed = read_json_object(shipped(given), "DeepSpeed file")
        try:
            super().__post_init__()
        except (AttributeError, TypeError) as error:
            if not given:
                raise
            raise ValueError(f"deepspeed={given} has a value where a section belongs ({error}).") from error

    def _check_best(self) -> None:
        """What the best model is; `ValueError` where it would not be among those that are saved."""
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "loss"
        if self.metric_for_best_model is None:
            return
        if self.metric_for_best_model.removeprefix("eval_") not in ("loss", "perplexity"):
            raise ValueError(f"metric_for_best_model must be loss or perplexity, got {self.metric_for_best_model!r}.")
        # Of both; transformers takes every other metric than a loss for one that should grow.
        self.greater_is_better = False
        if self.load_best_model_at_end and self.save_strategy == self.eval_strategy == "steps":
            scored = self.eval_steps or self.logging_steps
            if scored != self.save_steps:
                raise ValueError(
                    f"load_best_model_at_end takes a checkpoint of each evaluation; save_steps={self.save_steps:g} "
                    f"and eval_steps={scored:g} differ. Make them equal, or set save_strategy=best."
                )

    def accumulation_steps(self, ranks: int) -> int:
        """Micro-batches of an optimizer step on `ranks` processes; `ValueError` where they do not make up the batch."""
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        at_once = self.per_device_train_batch_size * ranks
        if self.global_batch_size % at_once:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is no multiple of the {at_once} samples that {ranks} "
                f"rank(s) with per_device_train_batch_size={self.per_device_train_batch_size} take at once; change one."
            )
        return self.global_batch_size // at_once


GROUPS = (ModelArguments, SparsityConfig, DataArguments, StageArguments)
