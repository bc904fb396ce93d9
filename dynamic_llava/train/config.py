"""The configuration of a stage: what `config` reads, checked and typed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..compat import FORMER_NAMES, named_as_here
from ..config import Command, Given, keys_of, typed
from ..files import write_yaml
from ..reading import parse_json
from ..sparsity_config import SparsityConfig
from .arguments import GROUPS, RANGES, StageArguments
from .conditions import check_conditions
from .effects import check_refused
from .keys import COMMAND, DataArguments, ModelArguments

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
        write_yaml(path, self.values)


def known_keys() -> list[str]:
    """All keys that a configuration may set."""
    return sorted(keys_of(GROUPS))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StageConfig:
    """The typed configuration of a file, or a preset, with words on top; raises as `Command.read` and `resolve`."""
    return resolve(read_values(["--config", str(path), *overrides]))


def read_values(words: Sequence[str] | None, command: Command = COMMAND) -> Given:
    """What the words of a command say, which takes the keys of training beside its own; raises as `Command.read`."""
    return command.read(words, (*command.groups, *GROUPS), {*FORMER_NAMES, *FORMER_NAMES.values()})


def resolve(given: Given) -> StageConfig:
    """Typed arguments; keys that are not of a configuration are left alone.

    Raises:
        ValueError: a value of the wrong type, values that contradict, or one that would have no effect (`effects`).
    """
    known = known_keys()
    values = {key: value for key, value in named_as_here(given.values, known).items() if key in known}
    check_refused(values)
    values = _elastic(values)
    model, sparsity, data, training = typed(GROUPS, replace(given, values=values), RANGES)
    if isinstance(data.shapes, str):
        data.shapes = parse_json(data.shapes, "shapes")
    _check_engine(model, training, values.get("deepspeed"))
    config = StageConfig(model, sparsity, data, training, values)
    check_conditions(config, set(named_as_here(dict.fromkeys(given.texts), known)))
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
