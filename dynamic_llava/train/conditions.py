"""Keys of a training configuration that do something only beside others; one that would do nothing is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .effects import is_default

if TYPE_CHECKING:
    from .config import StageConfig

# Optimizers (the beginnings of their names) that read optim_args, Adam's betas, and its epsilon.
_READ_ARGUMENTS = ("sgd", "adagrad", "rmsprop", "ademamix", "paged_ademamix", "adamw_anyprecision", "adamw_torch_4bit")
_READ_ARGUMENTS += ("adamw_torch_8bit", "grokadamw", "schedule_free", "stable_adamw")
_READ_EPSILON = ("adamw", "ademamix", "paged_a", "grokadamw", "stable_adamw", "schedule_free_adamw")
_READ_EPSILON += ("schedule_free_radam",)
_READ_BETAS = (*_READ_EPSILON, "lion", "paged_lion")


@dataclass(frozen=True)
class Condition:
    """Keys that do something only where `holds`.

    Attributes:
        keys: these keys, separated by spaces.
        switches: the keys that `holds` looks at, separated by spaces.
        holds: of a resolved configuration.
        reason: why they do nothing otherwise, and what would make them.
    """

    keys: str
    switches: str
    holds: Callable[[StageConfig], bool]
    reason: str


def _optim(*names: str) -> Callable[[StageConfig], bool]:
    return lambda config: config.training.optim.startswith(names)


CONDITIONS = (
    Condition("lora_alpha lora_dropout", "lora_r", lambda c: c.model.lora_r > 0, "lora_r=0 adds no adapters; set it"),
    Condition(
        "learning_rate",
        "train_decoder",
        lambda c: c.model.train_decoder or c.model.train_projector,
        "train_decoder=false trains the predictors alone, at predictor_learning_rate",
    ),
    Condition(
        "masked_kernel",
        "attn_implementation",
        lambda c: c.model.attn_implementation != "eager",
        "attn_implementation=eager has the reference MaskedSoftmax; use sdpa",
    ),
    Condition(
        "pruned_probe_rate",
        "sparse_training",
        lambda c: c.sparsity.sparse_training == "pruned",
        "sparse_training=masked keeps every token; set sparse_training=pruned",
    ),
    Condition(
        "image_keep_rate image_keep_rates image_selection image_gate_estimator predictor_num_heads predictor_ffn_dim "
        "predictor_num_layers",
        "image_predictor",
        lambda c: c.sparsity.image_predictor,
        "image_predictor=false keeps every image token; switch it on",
    ),
    Condition(
        "output_keep_rate output_keep_rates output_gate_estimator min_output_length output_turns calibration_answers",
        "output_predictor",
        lambda c: c.sparsity.output_predictor,
        "output_predictor=false keeps every output token; switch it on",
    ),
    Condition(
        "instruct_keep_rate min_instruct_length",
        "instruct_predictor",
        lambda c: c.sparsity.instruct_predictor,
        "instruct_predictor=false keeps the whole text; switch it on",
    ),
    Condition(
        "budget_on keep_entropy_weight",
        "output_predictor instruct_predictor image_predictor image_selection",
        lambda c: c.sparsity.kinds_by_logits() != [],
        "only images are dropped, by their rate and not by their logits alone; switch on output_predictor",
    ),
    Condition(
        "predictor_dim predictor_learning_rate budget_weight gumbel_tau_start gumbel_tau_end keep_rate_schedule "
        "gate_estimator sparse_training",
        "image_predictor output_predictor instruct_predictor",
        lambda c: c.sparsity.predictors_on() != [],
        "no predictor is on; switch on image_predictor or output_predictor",
    ),
    Condition(
        "keep_rate_ramp",
        "keep_rate_schedule",
        lambda c: c.training.keep_rate_schedule != "constant",
        "keep_rate_schedule=constant has no ramp; set linear or cosine",
    ),
    Condition(
        "eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start prediction_loss_only "
        "metric_for_best_model",
        "eval_file",
        lambda c: bool(c.data.eval_file),
        "there is no eval_file to score; set it",
    ),
    Condition(
        "eval_file",
        "eval_strategy eval_on_start",
        lambda c: c.training.eval_strategy != "no" or c.training.eval_on_start,
        "eval_strategy=no never scores eval_file; set steps or epoch",
    ),
    Condition(
        "eval_delay metric_for_best_model",
        "eval_strategy",
        lambda c: c.training.eval_strategy != "no",
        "it belongs to eval_strategy=steps or epoch",
    ),
    Condition(
        "eval_steps",
        "eval_strategy",
        lambda c: c.training.eval_strategy == "steps",
        "it belongs to eval_strategy=steps",
    ),
    Condition(
        "save_steps",
        "save_strategy",
        lambda c: c.training.save_strategy == "steps",
        "it belongs to save_strategy=steps",
    ),
    Condition(
        "logging_steps",
        "logging_strategy",
        lambda c: c.training.logging_strategy == "steps",
        "it belongs to logging_strategy=steps",
    ),
    Condition(
        "report_questions report_descriptions",
        "report",
        lambda c: c.data.report,
        "report=false makes no report; switch it on",
    ),
    Condition(
        "dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order",
        "dataloader_num_workers",
        lambda c: c.training.dataloader_num_workers > 0,
        "dataloader_num_workers=0 has no workers; set it",
    ),
    Condition(
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
        "activation_checkpointing gradient_checkpointing",
        lambda c: bool(c.training.gradient_checkpointing),
        "activations are not checkpointed; set activation_checkpointing=true",
    ),
    Condition("optim_args", "optim", _optim(*_READ_ARGUMENTS), "this optimizer reads no optim_args; see optim"),
    Condition("adam_beta1 adam_beta2", "optim", _optim(*_READ_BETAS), "this optimizer has no betas; see optim"),
    Condition("adam_epsilon", "optim", _optim(*_READ_EPSILON), "this optimizer has no such epsilon; see optim"),
    Condition(
        "run_name",
        "report_to",
        lambda c: bool(set(c.training.report_to) - {"tensorboard"}),
        "it is for the trackers of report_to, such as wandb; output_dir names a run here",
    ),
    Condition(
        "project trackio_space_id trackio_bucket_id trackio_static_space_id",
        "report_to",
        lambda c: "trackio" in c.training.report_to,
        "it belongs to report_to=trackio",
    ),
    Condition(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph",
        "deepspeed",
        lambda c: not c.training.deepspeed,
        "it belongs to DDP, and deepspeed is set; pass deepspeed=null",
    ),
)


def check_conditions(config: StageConfig, overridden: Collection[str]) -> None:
    """`ValueError` for the first value that has no effect beside the others.

    A key of the file whose switch the command line has turned off is meant to rest: it goes from `config.values`.
    """
    for condition in CONDITIONS:
        if condition.holds(config):
            continue
        for key in condition.keys.split():
            value = config.values.get(key)
            if value is None or is_default(key, value):
                continue
            if key not in overridden and not overridden.isdisjoint(condition.switches.split()):
                del config.values[key]
                continue
            raise ValueError(f"{key}={value} has no effect here: {condition.reason}, or leave out {key} ({key}=null).")
