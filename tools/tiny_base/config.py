"""The settings of the tiny base, read from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

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
        ValueError: on a key that does not exist, naming it and those that do, or a value of another type or range.
    """
    return _build(TinyBaseConfig, read_yaml_mapping(path), str(path))


def _build(cls: type, values: object, where: str) -> Any:
    """Makes a settings object of a mapping, naming what does not fit."""
    known = {f.name: f for f in fields(cls)}
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping with keys {', '.join(known)}, got {values!r}")
    built = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; known keys: {', '.join(known)}")
        kind = known[key].type
        built[key] = _build(_STAGES[kind], value, f"{where}: {key}") if kind in _STAGES else value
        if kind not in _STAGES and not _fits(key, kind, value):
            least = "at least 0" if key in _MAY_BE_ZERO else "above 0"
            wanted = f"a number {least}" if kind in ("int", "float") else f"a value of type {kind}"
            raise ValueError(f"{where}: {key} is {value!r}; write {wanted}")
    return cls(**built)


def _fits(key: str, kind: str, value: object) -> bool:
    """Whether `value` has the type `kind`; numbers also whether they are finite and not below what makes sense."""
    if kind in ("bool", "str"):
        return isinstance(value, _TYPES[kind])
    # NaN is not below anything.
    if isinstance(value, bool) or not isinstance(value, _TYPES[kind]) or not abs(value) < _MOST:
        return False
    return value > 0 or (value == 0 and key in _MAY_BE_ZERO)


_STAGES = {stage.__name__: stage for stage in (VisionShape, TextShape, TowerStage, AlignStage, DecoderStage)}
_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str}
_MOST = 2**63
_MAY_BE_ZERO = ("seed", "extra_relation_questions", "position_questions", "description_share")
