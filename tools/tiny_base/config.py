"""The settings of the tiny base, read from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dynamic_llava.config import keys_of, typed
from dynamic_llava.config.words import Reader
from dynamic_llava.files import read_yaml_mapping

# The wording that the base of the package was trained with; its chat template writes it. Vicuna v1 says "user".
SYSTEM_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@dataclass(frozen=True)
class VisionShape:
    """Size of the CLIP tower; the projector reads the output of its last layer but one."""

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 256


@dataclass(frozen=True)
class TextShape:
    """Size of the Llama decoder."""

    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 384
    initializer_range: float = 0.06


@dataclass(frozen=True)
class TowerStage:
    """Recognition warm-up of the tower: every patch learns what covers it."""

    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class AlignStage:
    """Warm-up of the projector: patches become sums of the word embeddings that describe them."""

    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class DecoderStage:
    """Training of projector and decoder on the frozen tower."""

    steps: int = 4000
    batch_size: int = 32
    learning_rate: float = 2e-3
    questions_per_picture: int = 10
    extra_relation_questions: int = 0
    position_questions: int = 0
    description_share: float = 0.4
    save_every: int = 500
    compile: bool = False


@dataclass(frozen=True)
class TinyBaseConfig:
    """All settings of a run."""

    output: str = "assets/tiny-llava"
    work_dir: str = "runs/tiny-base"
    seed: int = 0
    pictures: int = 24000
    val_pictures: int = 300
    test_pictures: int = 1000
    bf16: bool = False
    rope_theta: float = 1e6
    vision: VisionShape = field(default_factory=VisionShape)
    text: TextShape = field(default_factory=TextShape)
    tower: TowerStage = field(default_factory=TowerStage)
    align: AlignStage = field(default_factory=AlignStage)
    decoder: DecoderStage = field(default_factory=DecoderStage)


def load_config(path: str | Path) -> TinyBaseConfig:
    """Reads a YAML file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: on a key that does not exist, with the nearest names, or a value of another type or range.
    """
    return _build(TinyBaseConfig, read_yaml_mapping(path), str(path))


def _build(cls: type, values: object, where: str) -> Any:
    """Makes a settings object of a mapping, and those in it of the mappings in it."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping with keys {', '.join(cls.__annotations__)}, got {values!r}")
    given = Reader(keys_of((cls,)), PROGRAM).of_mapping(values, where)
    parts = {
        name: _build(_STAGES[kind], given.values.pop(name), f"{where}: {name}")
        for name, kind in cls.__annotations__.items()
        if kind in _STAGES and name in given.values
    }
    ranges = {name: "[0, inf)" if name in _MAY_BE_ZERO else "(0, inf)" for name in cls.__annotations__}
    return replace(typed((cls,), given, ranges)[0], **parts)


PROGRAM = "python -m tools.tiny_base"
_STAGES = {stage.__name__: stage for stage in (VisionShape, TextShape, TowerStage, AlignStage, DecoderStage)}
_MAY_BE_ZERO = ("seed", "extra_relation_questions", "position_questions", "description_share")
