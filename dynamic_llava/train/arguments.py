"""Typed arguments of the sparsification stage."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ..checkpoints.aspect_ratio import PAD, check_aspect_ratio
from ..reading import read_json_object
from .bounds import check_bounds
from .schedules import KEEP_RATE_SCHEDULES


@dataclass
class ModelArguments:
    """Which checkpoint is made sparse, and which of its parts learn."""

    base_model: str = field(metadata={"help": "LLaVA-1.5 or Dynamic-LLaVA checkpoint, folder or hub name."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "Attention back end: sdpa or eager."})
    train_projector: bool = field(
        default=False, metadata={"help": "Train the projector too, as the published code; the paper freezes it."}
    )
    train_decoder: bool = field(default=True, metadata={"help": "False trains the predictors alone."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters on the decoder; 0 trains it in full."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters, over lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the weights: float32, bfloat16, float16; auto is float32 where AdamW trains them itself, the "
            "compute dtype with LoRA or DeepSpeed, which keep float32 copies of what they train."
        },
    )
    quantize: str | None = field(default=None, metadata={"help": "QLoRA: 4bit or 8bit for the frozen base."})

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}.")
        check_bounds(self)
        if self.lora_r and (self.train_projector or not self.train_decoder):
            raise ValueError(
                f"lora_r={self.lora_r} trains adapters of the decoder and the predictors; with "
                f"train_projector={self.train_projector}, train_decoder={self.train_decoder} that is contradictory. "
                "Leave these out, or set lora_r=0."
            )
        if self.quantize not in (None, "4bit", "8bit"):
            raise ValueError(f"quantize must be 4bit or 8bit, got {self.quantize!r}.")
        if self.quantize and not self.lora_r:
            raise ValueError(f"quantize={self.quantize} freezes the base; set lora_r to train adapters on it.")

    def weight_dtype(self, training: TrainingArguments) -> torch.dtype:
        """The dtype in which the base is loaded. 16-bit weights would round away steps of 5e-6."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        if self.lora_r or training.deepspeed:
            return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
        return torch.float32


@dataclass
class DataArguments:
    """Where the conversations and pictures are."""

    train_file: list[str] = field(
        metadata={"help": "Data, one or several: .json, .jsonl, .parquet, .tar or a folder; path:0.5 weights it."}
    )
    image_folder: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders that image paths are relative to, the first that has a file wins; None: the file's."
        },
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens per sample, image tokens included."})
    image_aspect_ratio: str = field(
        default=PAD,
        metadata={
            "help": "pad to a square, as LLaVA-1.5; square: cut out the middle; keep: as the base's processor does."
        },
    )
    eval_file: list[str] | None = field(
        default=None, metadata={"help": "Held-out data, as train_file; scored as eval_strategy and eval_steps say."}
    )
    output_turns: str = field(
        default="last", metadata={"help": "Answers whose tokens are judged: last (published code), or all."}
    )
    require_image: bool = field(default=False, metadata={"help": "Train on samples with an image only."})
    on_bad_sample: str = field(default="error", metadata={"help": "error, or skip and count."})
    shapes: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of build_shapes: make the embedded data in image_folder first."}
    )
    report: bool = field(default=False, metadata={"help": "At the end, evaluate on the embedded data and report."})
    report_questions: int | None = field(default=None, metadata={"help": "Held-out questions in the report."})
    report_descriptions: int | None = field(default=None, metadata={"help": "Held-out descriptions in the report."})

    def __post_init__(self) -> None:
        check_aspect_ratio(self.image_aspect_ratio)
        check_bounds(self)
        if (self.shapes is not None or self.report) and not self.image_folder:
            raise ValueError("The embedded data is made in, and reported on from, image_folder; set it.")


@dataclass
class StageArguments(TrainingArguments):
    """`TrainingArguments` with what the sparsification stage adds."""

    output_dir: str = field(default="runs/stage", metadata={"help": "Folder of the run."})
    predictor_learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of both predictors."})
    gumbel_tau_start: float = field(default=1.0, metadata={"help": "Gumbel temperature at the first step."})
    gumbel_tau_end: float = field(default=0.1, metadata={"help": "Gumbel temperature at the last step."})
    keep_rate_schedule: str = field(
        default="constant", metadata={"help": "constant (paper), or linear or cosine from 1.0 down to the keep rates."}
    )
    keep_rate_ramp: float = field(
        default=0.5, metadata={"help": "Fraction of training in which the schedule reaches the keep rates."}
    )
    image_keep_rates: list[float] | None = field(
        default=None, metadata={"help": "Elastic: two rates, between which one is drawn for each step."}
    )
    output_keep_rates: list[float] | None = field(
        default=None, metadata={"help": "Elastic: two rates, between which one is drawn for each step."}
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "Of one device in the compute dtype; logs the model FLOPs utilisation (mfu)."}
    )
    picture_steps: int | None = field(
        default=None, metadata={"help": "Draw the kept patches of a few samples every so many steps."}
    )
    calibration_answers: int = field(
        default=128,
        metadata={"help": "At the end, bring the output predictor to its rate on so many training answers; 0: do not."},
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Samples per optimizer step, all ranks; sets gradient_accumulation_steps."}
    )
    restart: bool = field(default=False, metadata={"help": "Begin anew although output_dir has checkpoints."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep the collator's columns."})

    def __post_init__(self) -> None:
        check_bounds(self)
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
        if self.keep_rate_schedule not in KEEP_RATE_SCHEDULES:
            raise ValueError(
                f"keep_rate_schedule must be one of {', '.join(KEEP_RATE_SCHEDULES)}, got {self.keep_rate_schedule!r}."
            )
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
            self.deepspeed = read_json_object(given, "DeepSpeed file")
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
