"""Which numbers a training key takes; NaN and infinity are none of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..values import is_finite

# By key, as intervals: a round bracket leaves the end out.
BOUNDS = {
    "per_device_train_batch_size": "[1, inf)",
    "per_device_eval_batch_size": "[1, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "global_batch_size": "[1, inf)",
    "num_train_epochs": "(0, inf)",
    "max_steps": "[-1, inf)",
    "learning_rate": "(0, inf)",
    "predictor_learning_rate": "(0, inf)",
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
    "gumbel_tau_start": "(0, inf)",
    "gumbel_tau_end": "(0, inf)",
    "keep_rate_ramp": "(0, 1]",
    "peak_tflops": "(0, inf)",
    "picture_steps": "[1, inf)",
    "calibration_answers": "[0, inf)",
    "lora_r": "[0, inf)",
    "lora_alpha": "[1, inf)",
    "lora_dropout": "[0, 1)",
    "max_length": "[1, inf)",
    "report_questions": "[1, inf)",
    "report_descriptions": "[1, inf)",
}


def check_bounds(arguments: Any) -> None:
    """`ValueError` that names the first number of a dataclass outside of `BOUNDS`."""
    for field in dataclasses.fields(arguments):
        value, interval = getattr(arguments, field.name), BOUNDS.get(field.name)
        if interval is not None and value is not None and not is_inside(value, interval):
            what = f"must {in_words(interval)}" if is_finite(value) else "must be a finite number"
            raise ValueError(f"{field.name} {what}, got {value}.")
        if field.name == "max_steps" and value == 0:
            raise ValueError("max_steps=0 trains nothing; give a number of steps, or leave it to num_train_epochs.")


def is_inside(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as `(0, inf)`; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = low < value if interval[0] == "(" else low <= value
    return is_finite(value) and above and (value < high if interval[-1] == ")" else value <= high)


def in_words(interval: str) -> str:
    """An interval as messages say it."""
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"lie in {interval}"
    return f"be {'above' if interval[0] == '(' else 'at least'} {low}"
