"""Typed arguments of the sparsification stage: a YAML file below `key=value` on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..configuration_dynamic_llava import SparsityConfig
from .schedules import KEEP_RATE_SCHEDULES

RESOLVED_CONFIG = "train_config.yaml"


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
        if self.lora_r < 0:
            raise ValueError(f"lora_r must not be negative, got {self.lora_r}.")
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
    image_aspect_ratio: str = field(default="pad", metadata={"help": "pad to a square, as LLaVA-1.5, or keep."})
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
    restart: bool = field(default=False, metadata={"help": "Begin anew although output_dir has checkpoints."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep the collator's columns."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gumbel_tau_start", "gumbel_tau_end", "predictor_learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.picture_steps is not None and self.picture_steps < 1:
            raise ValueError(f"picture_steps must be at least 1, got {self.picture_steps}.")
        if self.keep_rate_schedule not in KEEP_RATE_SCHEDULES:
            raise ValueError(
                f"keep_rate_schedule must be one of {', '.join(KEEP_RATE_SCHEDULES)}, got {self.keep_rate_schedule!r}."
            )
        if not 0 < self.keep_rate_ramp <= 1:
            raise ValueError(f"keep_rate_ramp must lie in (0, 1], got {self.keep_rate_ramp}.")
        for name in ("image_keep_rates", "output_keep_rates"):
            rates = getattr(self, name)
            if rates is None:
                continue
            if len(rates) != 2 or not 0 < rates[0] <= rates[1] <= 1:
                raise ValueError(f"{name} must be two rates in (0, 1], the smaller first, got {rates}.")
            if self.keep_rate_schedule != "constant":
                raise ValueError(f"{name} are drawn, keep_rate_schedule={self.keep_rate_schedule!r} would change them.")


GROUPS = (ModelArguments, SparsityConfig, DataArguments, StageArguments)


@dataclass
class StageConfig:
    """The resolved configuration of a run."""

    model: ModelArguments
    sparsity: SparsityConfig
    data: DataArguments
    training: StageArguments
    values: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write what was given, file and command line together, so that the run can be started again from it."""
        path = Path(folder) / RESOLVED_CONFIG
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.values, sort_keys=True, allow_unicode=True))


def known_keys() -> list[str]:
    """All keys that a configuration may set."""
    return sorted({item.name for group in GROUPS for item in dataclasses.fields(group) if item.init})


def parse_override(text: str) -> tuple[str, Any]:
    """`key=value` -> key and value, read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"Cannot read {text!r}; overrides look like learning_rate=1e-4.")
    return key.strip().removeprefix("--"), yaml.safe_load(value)


def load_config(path: str | Path, overrides: list[str] = ()) -> StageConfig:
    """Read a YAML file with `key=value` overrides on top.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not a mapping, an unknown key (with the nearest names), a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No training configuration at {path}; see configs/train/.")
    values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold 'key: value' lines, got a {type(values).__name__}.")
    values.update(parse_override(text) for text in overrides)
    return resolve(values, str(path))


def resolve(values: dict[str, Any], source: str) -> StageConfig:
    """Check `values` and turn them into typed arguments."""
    known = known_keys()
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5)
            hint = f"Did you mean {', '.join(near)}?" if near else "See dynamic_llava/train/arguments.py."
            raise ValueError(f"Unknown key {key!r} in {source}. {hint}")
    values = _elastic(values)
    parser = HfArgumentParser(GROUPS, exit_on_error=False)
    parser.error = _raise
    try:
        model, sparsity, data, training = parser.parse_args_into_dataclasses(_as_arguments(values))
    except argparse.ArgumentError as error:
        raise ValueError(f"{source}: {error}") from error
    if isinstance(data.shapes, str):
        data.shapes = json.loads(data.shapes)
    _check_engine(model, training)
    return StageConfig(model, sparsity, data, training, values)


def engine_of(training: TrainingArguments) -> dict[str, Any] | None:
    """The DeepSpeed configuration, None without."""
    if not training.deepspeed:
        return None
    if isinstance(training.deepspeed, dict):
        return training.deepspeed
    return json.loads(Path(training.deepspeed).read_text())


def _check_engine(model: ModelArguments, training: StageArguments) -> None:
    """`ValueError` where a DeepSpeed file contradicts the configuration."""
    engine = engine_of(training)
    if engine is None:
        return
    if model.quantize and engine.get("zero_optimization", {}).get("stage") == 3:
        raise ValueError(
            f"quantize={model.quantize} and ZeRO-3 do not go together: bitsandbytes weights cannot be sharded by it. "
            "Use ZeRO-2, or lora_r without quantize."
        )
    twice = [name for name in ("optimizer", "scheduler") if name in engine]
    if twice:
        raise ValueError(
            f"The DeepSpeed file {training.deepspeed} sets {' and '.join(twice)}, which learning_rate, "
            "predictor_learning_rate and lr_scheduler_type set here; remove them from the file."
        )


def _elastic(values: dict[str, Any]) -> dict[str, Any]:
    """`image_keep_rate: [0.1, 0.5]` as a range to draw from; the checkpoint's own rate is then the middle of it."""
    values = dict(values)
    for name in ("image_keep_rate", "output_keep_rate"):
        if isinstance(values.get(name), (list, tuple)):
            rates = values[f"{name}s"] = list(values.pop(name))
            if len(rates) != 2 or not all(isinstance(rate, (int, float)) for rate in rates):
                raise ValueError(f"{name} is one rate or two to draw between, such as [0.1, 0.5], got {rates}.")
            values[name] = sum(rates) / 2
    return values


def _raise(message: str) -> None:
    raise ValueError(f"Training configuration: {message}")


def _as_arguments(values: dict[str, Any]) -> list[str]:
    """Values as command-line words: argparse then gives every key its type (YAML reads 5e-6 as a string)."""
    words = []
    for key, value in values.items():
        if value is None:
            continue
        words.append(f"--{key}")
        if isinstance(value, (list, tuple)):
            words += [str(item) for item in value]
        elif isinstance(value, dict):
            words.append(json.dumps(value))
        else:
            words.append(str(value))
    return words
