"""The configuration of a stage: a YAML file below `key=value` on the command line, checked and typed."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..compat import named_as_here
from ..files import parse_yaml, read_yaml_mapping, write_atomically
from ..reading import parse_json
from ..sparsity_config import SparsityConfig
from .arguments import DataArguments, ModelArguments, StageArguments
from .conditions import check_conditions
from .effects import GROUPS, check_refused

RESOLVED_CONFIG = "train_config.yaml"


@dataclass
class StageConfig:
    """The resolved configuration of a run."""

    model: ModelArguments
    sparsity: SparsityConfig
    data: DataArguments
    training: StageArguments
    values: dict[str, Any]

    def fixed_values(self) -> dict[str, Any]:
        """What a run that goes on must have as it was, but for `checkpointing.FREE_KEYS`."""
        return {**self.values, "ranks": self.training.world_size}

    def save(self, folder: str | Path) -> None:
        """Write what was given, file and command line together, so that the run can be started again from it."""
        path = Path(folder) / RESOLVED_CONFIG
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, yaml.safe_dump(self.values, sort_keys=True, allow_unicode=True))


def known_keys() -> list[str]:
    """All keys that a configuration may set."""
    return sorted({item.name for group in GROUPS for item in dataclasses.fields(group) if item.init})


def parse_override(text: str) -> tuple[str, Any]:
    """`key=value` -> key and value, read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"Cannot read {text!r}; overrides look like learning_rate=1e-4.")
    return key.strip().removeprefix("--"), parse_yaml(value, text)


def load_config(path: str | Path, overrides: list[str] = ()) -> StageConfig:
    """The typed configuration of a YAML file with `key=value` overrides on top; raises as `read_values`, `resolve`."""
    values, overridden = read_values(path, overrides)
    return resolve(values, str(path), overridden)


def read_values(path: str | Path, overrides: list[str] = ()) -> tuple[dict[str, Any], set[str]]:
    """The values of a YAML file with `key=value` overrides on top, and the keys of these.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not a mapping, or an override that is not `key=value`.
    """
    on_top = dict(parse_override(text) for text in overrides)
    return {**read_yaml_mapping(path, "training configuration"), **on_top}, set(on_top)


def resolve(values: dict[str, Any], source: str, overridden: Collection[str] = ()) -> StageConfig:
    """Typed arguments of `values`, of which the command line has set those `overridden`.

    Raises:
        ValueError: an unknown key (with the nearest names), a value of the wrong type, values that contradict, or one
            that would have no effect (`effects`).
    """
    known = known_keys()
    values = named_as_here(values, known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5)
            hint = f"Did you mean {', '.join(near)}?" if near else "See dynamic_llava/train/arguments.py."
            raise ValueError(f"Unknown key {key!r} in {source}. {hint}")
    check_refused(values)
    values = _elastic(values)
    parser = HfArgumentParser(GROUPS, exit_on_error=False)
    parser.error = _raise
    words = _as_arguments(values, {action.dest for action in parser._actions if action.nargs in ("+", "*")})
    try:
        model, sparsity, data, training = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except argparse.ArgumentError as error:
        raise ValueError(f"{source}: {error}") from error
    if isinstance(data.shapes, str):
        data.shapes = parse_json(data.shapes, "shapes")
    _check_engine(model, training, values.get("deepspeed"))
    config = StageConfig(model, sparsity, data, training, values)
    check_conditions(config, set(named_as_here(dict.fromkeys(overridden), known)))
    return config


def is_fsdp() -> bool:
    """Whether accelerate's launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _check_engine(model: ModelArguments, training: StageArguments, given: Any) -> None:
    """`ValueError` where a DeepSpeed configuration, `given` as a file or its content, contradicts the rest."""
    engine = training.deepspeed
    if not engine:
        return
    stage = (engine.get("zero_optimization") or {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage of deepspeed={given} must be 0, 1, 2 or 3, got {stage!r}.")
    if model.quantize and stage == 3:
        raise ValueError(
            f"quantize={model.quantize} and ZeRO-3 do not go together: bitsandbytes weights cannot be sharded by it. "
            "Use ZeRO-2, or lora_r without quantize."
        )
    if is_fsdp():
        raise ValueError(f"FSDP and deepspeed={given} exclude each other; pass deepspeed=null for FSDP.")
    twice = [name for name in ("optimizer", "scheduler") if name in engine]
    if twice:
        raise ValueError(
            f"deepspeed={given} sets {' and '.join(twice)}, which learning_rate, "
            "predictor_learning_rate and lr_scheduler_type set here; remove them there."
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


def _as_arguments(values: dict[str, Any], several: Collection[str]) -> list[str]:
    """Values as command-line words: argparse then gives every key its type. `several` are the keys that take lists."""
    hints = {key: hint for group in GROUPS for key, hint in get_type_hints(group).items()}
    objects = {key for key, hint in hints.items() if "dict" in str(hint)}
    words = []
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, dict) and key not in objects:
            raise ValueError(f"{key} takes a word or a number, got the mapping {value}.")
        if isinstance(value, (list, tuple)):
            if key not in several:
                raise ValueError(f"{key} takes one value, got the list {value}.")
            words += [f"--{key}", *map(str, value)]
        else:
            # In one word: -1e-5 would look like another key.
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
