"""The keys of training that are ours, and the command; without torch, so that help and wrong words answer at once.

`SparsityConfig` has those of the method, `StageArguments` adds those of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import Command, option
from ..sparsity_config import SparsityConfig
from .schedules import KEEP_RATE_SCHEDULES

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

# The first is the default; `checkpoints.aspect_ratio` says what they do.
IMAGE_ASPECT_RATIOS = ("pad", "square", "keep")


@dataclass
class ModelArguments:
    """Which checkpoint is made sparse, and which of its parts learn."""

    base_model: str = option(help="LLaVA-1.5 or Dynamic-LLaVA checkpoint, folder or hub name.")
    attn_implementation: str = option("sdpa", "Attention back end: sdpa or eager.")
    train_projector: bool = option(False, "Train the projector too, as the published code; the paper freezes it.")
    train_decoder: bool = option(True, "False trains the predictors alone.")
    lora_r: int = option(0, "Rank of LoRA adapters on the decoder; 0 trains it in full.", "[0, inf)")
    lora_alpha: int = option(32, "Scale of the adapters, over lora_r.", "[1, inf)")
    lora_dropout: float = option(0.05, "Dropout in front of the adapters.", "[0, 1)")
    dtype: str = option(
        "auto",
        "Of the weights: float32, bfloat16, float16; auto is float32 where AdamW "
        "trains them itself, the compute dtype with LoRA or DeepSpeed, which keep "
        "float32 copies of what they train.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str | None = option(None, "QLoRA: 4bit or 8bit for the frozen base.", choices=("4bit", "8bit"))

    def __post_init__(self) -> None:
        if self.lora_r and (self.train_projector or not self.train_decoder):
            raise ValueError(
                f"lora_r={self.lora_r} trains adapters of the decoder and the predictors; with "
                f"train_projector={self.train_projector}, train_decoder={self.train_decoder} that is contradictory. "
                "Leave these out, or set lora_r=0."
            )
        if self.quantize and not self.lora_r:
            raise ValueError(f"quantize={self.quantize} freezes the base; set lora_r to train adapters on it.")

    def weight_dtype(self, training: TrainingArguments) -> torch.dtype:
        """The dtype in which the base is loaded. 16-bit weights would round away steps of 5e-6."""
        import torch

        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        if self.lora_r or training.deepspeed:
            return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
        return torch.float32


@dataclass
class DataArguments:
    """Where the conversations and pictures are."""

    train_file: list[str] = option(
        help="Data, one or several: .json, .jsonl, .parquet, .tar or a folder; path:0.5 weights it."
    )
    image_folder: list[str] | None = option(
        None, "Folders that image paths are relative to, the first that has a file wins; None: the file's."
    )
    max_length: int = option(2048, "Tokens per sample, image tokens included.", "[1, inf)")
    image_aspect_ratio: str = option(
        IMAGE_ASPECT_RATIOS[0],
        "pad to a square, as LLaVA-1.5; square: cut out the middle; keep: as the base's processor does.",
        choices=IMAGE_ASPECT_RATIOS,
    )
    eval_file: list[str] | None = option(
        None, "Held-out data, as train_file; scored as eval_strategy and eval_steps say."
    )
    output_turns: str = option(
        "last", "Answers whose tokens are judged: last (published code), or all.", choices=("last", "all")
    )
    require_image: bool = option(False, "Train on samples with an image only.")
    on_bad_sample: str = option("error", "error, or skip and count.", choices=("error", "skip"))
    shapes: dict[str, Any] | str | None = option(
        None, "Arguments of build_shapes: make the embedded data in image_folder first."
    )
    report: bool = option(False, "At the end, evaluate on the embedded data and report.")
    report_questions: int | None = option(None, "Held-out questions in the report.", "[1, inf)")
    report_descriptions: int | None = option(None, "Held-out descriptions in the report.", "[1, inf)")

    def __post_init__(self) -> None:
        if (self.shapes is not None or self.report) and not self.image_folder:
            raise ValueError("The embedded data is made in, and reported on from, image_folder; set it.")


@dataclass
class StageKeys:
    """What the sparsification stage adds to `TrainingArguments`, or sets otherwise."""

    output_dir: str = option("runs/stage", "Folder of the run.")
    predictor_learning_rate: float = option(2e-4, "Learning rate of both predictors.", "(0, inf)")
    gumbel_tau_start: float = option(1.0, "Gumbel temperature at the first step.", "(0, inf)")
    gumbel_tau_end: float = option(0.1, "Gumbel temperature at the last step.", "(0, inf)")
    keep_rate_schedule: str = option(
        "constant",
        "constant (paper), or linear or cosine from 1.0 down to the keep rates.",
        choices=KEEP_RATE_SCHEDULES,
    )
    keep_rate_ramp: float = option(0.5, "Fraction of training in which the schedule reaches the keep rates.", "(0, 1]")
    image_keep_rates: list[float] | None = option(
        None, "Elastic: two rates, between which one is drawn for each step.", "(0, 1]"
    )
    output_keep_rates: list[float] | None = option(
        None, "Elastic: two rates, between which one is drawn for each step.", "(0, 1]"
    )
    peak_tflops: float | None = option(
        None, "Of one device in the compute dtype; logs the model FLOPs utilisation (mfu).", "(0, inf)"
    )
    picture_steps: int | None = option(None, "Draw the kept patches of a few samples every so many steps.", "[1, inf)")
    calibration_answers: int = option(
        0, "At the end, bring the output predictor to its rate on so many training answers; 0: do not.", "[0, inf)"
    )
    global_batch_size: int | None = option(
        None, "Samples per optimizer step, all ranks; sets gradient_accumulation_steps.", "[1, inf)"
    )
    restart: bool = option(False, "Begin anew although output_dir has checkpoints.")
    remove_unused_columns: bool = option(False, "Keep the collator's columns.")
    ddp_find_unused_parameters: bool | None = option(
        False, "Look for weights without a gradient; every batch gives all of them one."
    )
    log_level_replica: str = option("error", "Of the other ranks, which would repeat what the first one says.")


@dataclass
class RunOptions:
    """What is done with a configuration; no part of it."""

    dry_run: bool = option(False, "Say what would be done: parameters, memory, schedule.")
    ranks: int | None = option(None, "With --dry-run: as on so many GPUs; None: those here.", "[1, inf)")
    launcher: str = option("python -m", "With --dry-run: what the command shown starts with.")
    gradient_report: int | None = option(
        None,
        "Instead of training, the gradients at the predictors from the LM loss and the budgets over so many batches.",
        "[1, inf)",
    )


OWN_GROUPS = (ModelArguments, SparsityConfig, DataArguments, StageKeys)
OF_TRANSFORMERS = (
    "And the keys of transformers' TrainingArguments, such as learning_rate, per_device_train_batch_size, max_steps,\n"
    "deepspeed, report_to: https://huggingface.co/docs/transformers/main_classes/trainer"
)
COMMAND = Command(
    "train",
    "The sparsification stage: dynamic-llava train --config shapes output_dir=runs/mine",
    (RunOptions, *OWN_GROUPS),
    presets="train",
    also=OF_TRANSFORMERS,
)
