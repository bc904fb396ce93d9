"""Keys of a training configuration that would have no effect: refused where they are set, never ignored.

`WORKS` and `REFUSED` together hold every field of transformers' `TrainingArguments`; one that a newer release adds is
refused until it stands in one of them. Keys that do something only beside others are in `conditions`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments

from .arguments import GROUPS

WORKS = frozenset(
    {
        *("output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate"),
        *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "average_tokens_across_devices"),
        *("max_grad_norm", "bf16", "fp16", "tf32", "activation_checkpointing", "activation_checkpointing_kwargs"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend"),
        *("torch_compile_mode", "neftune_noise_alpha", "torch_empty_cache_steps", "logging_strategy"),
        *("logging_steps", "logging_first_step", "log_on_each_node", "include_num_input_tokens_seen", "log_level"),
        *("log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
        *("trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay"),
        *("per_device_eval_batch_size", "prediction_loss_only", "eval_on_start", "save_strategy", "save_steps"),
        *("save_on_each_node", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
        *("ignore_data_skip", "full_determinism", "seed", "data_seed", "use_cpu", "dataloader_drop_last"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
        *("train_sampling_strategy", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("ddp_static_graph", "ddp_backend", "ddp_timeout", "deepspeed", "debug", "skip_memory_metrics", "do_train"),
    }
)

_METRICS = "an evaluation is the loss and its perplexity, without predictions or metrics to compute"
_HUB = "a run stays on this machine; upload its folder when it is finished (hf upload NAME OUTPUT_DIR)"
_MARKERS = "training takes it from the tokenizer"
# Why a key does nothing here, and what does.
REFUSED = {
    "label_smoothing_factor": "the LM loss is computed without smoothing",
    "bf16_full_eval": "evaluation has the precision of training; set bf16",
    "fp16_full_eval": "evaluation has the precision of training; set fp16",
    "use_liger_kernel": "liger has no kernels for this model; masked_kernel says how MaskedSoftmax runs",
    "liger_kernel_config": "liger has no kernels for this model; masked_kernel says how MaskedSoftmax runs",
    "use_cache": "training has no cache; generate takes use_cache",
    "optim_target_modules": "optimizers that project the gradients of modules are not supported; lora_r trains less",
    "auto_find_batch_size": "a batch that shrinks on the way is no longer the one that was asked for; set "
    "per_device_train_batch_size, with global_batch_size for the whole",
    "logging_nan_inf_filter": "a loss that is no number ends the run",
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "eval_accumulation_steps": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "label_names": "the collator names them",
    "remove_unused_columns": "the collator makes the columns, and messages name samples by them",
    "length_column_name": "train_sampling_strategy=group_by_length counts the tokens itself",
    "save_only_model": "a run cannot go on from a checkpoint without the optimizer's state; save_total_limit=1 keeps "
    "one checkpoint, and the run's own folder holds the model alone",
    "enable_jit_checkpoint": "SIGTERM saves and ends a run as it is",
    "restore_callback_states_from_checkpoint": "no callback of this command has a state",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "greater_is_better": "loss and perplexity are better where they are lower",
    "accelerator_config": "batches are shared out among the ranks in one way, by per_device_train_batch_size and "
    "gradient_accumulation_steps",
    "parallelism_config": "the sparse decoder is not split within a layer or a sequence; deepspeed and FSDP share out "
    "its weights",
    "fsdp": "start FSDP by accelerate's launcher, as ACCELERATE=configs/accelerate/fsdp2.yaml with "
    "scripts/train_stage.sh does",
    "fsdp_config": "FSDP is set in accelerate's file, such as configs/accelerate/fsdp2.yaml",
    "do_eval": "eval_file and eval_strategy say what is evaluated and when",
    "do_predict": "evaluate a finished run with python -m dynamic_llava.eval",
    "resume_from_checkpoint": "the same command goes on from the newest whole checkpoint in output_dir; another "
    "model to start from is base_model",
    "local_rank": "the launcher sets it",
    "user_marker": _MARKERS,
    "assistant_marker": _MARKERS,
    "output_offsets": "training finds them at its end",
    "untrained": "training notes there which predictors it has not reached",
}

_PROJECTED = "it takes other parameter groups than decoder and predictors; lora_r trains less of the decoder"
# Values (their beginnings) of keys that otherwise work.
REFUSED_VALUES = {
    ("optim", "galore"): _PROJECTED,
    ("optim", "apollo"): _PROJECTED,
    ("optim", "lomo"): _PROJECTED,
    ("optim", "adalomo"): _PROJECTED,
    ("train_sampling_strategy", "batch_rebalance"): "it would open every picture; use group_by_length",
    ("debug", ""): "its hooks cannot read masks; a loss that is no number ends the run with its samples",
}


def check_refused(values: dict[str, Any]) -> None:
    """`ValueError` that names the first of `values` that no configuration gives an effect, and its remedy."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key, value in values.items():
        if value is None or is_default(key, value):
            continue
        if key in REFUSED:
            shown = "..." if key == "hub_token" else value
            raise ValueError(f"{key}={shown} has no effect here: {REFUSED[key]}. Leave it out.")
        for (other, beginning), reason in REFUSED_VALUES.items():
            if key == other and str(value).startswith(beginning):
                raise ValueError(f"{key}={value} is not supported: {reason}.")
        if key in known and key not in WORKS:
            raise ValueError(f"{key}={value} is of a release of transformers newer than what was tested; leave it out.")


def is_default(key: str, value: Any) -> bool:
    """Whether a value of a configuration is what its key has anyway."""
    return value == _DEFAULTS.get(key) or str(value) == str(_DEFAULTS.get(key))


_DEFAULTS = {
    field.name: field.default_factory() if field.default is dataclasses.MISSING else field.default
    for group in GROUPS
    for field in dataclasses.fields(group)
    if not (field.default is field.default_factory is dataclasses.MISSING)
}
