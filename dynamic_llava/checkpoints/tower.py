"""The vision tower of a published checkpoint: inside it, in a folder beside it, or on the hub."""

from __future__ import annotations

import math
from pathlib import Path

from transformers import CLIPVisionConfig
from transformers.utils import logging

from ..config_checks import config_errors
from ..parameter_names import TOWER
from .keys import own_name
from .source import CheckpointSource, find_folder, read_model_file

logger = logging.get_logger(__name__)

# CLIP towers have heads of 64 and quick_gelu; where only their tensors are at hand the rest is in the shapes.
CLIP_HEAD_SIZE = 64
CLIP_TYPES = ("clip_vision_model", "clip")


def tower_config(source: CheckpointSource, vision_tower: str | Path | None) -> CLIPVisionConfig:
    """The tower's configuration: from its folder or repository, or what a conversion noted of it, or else from the
    shapes of its tensors."""
    noted = (source.config.get("dynamic_llava") or {}).get("vision_config")
    try:
        folder = tower_folder(source, vision_tower)
        values = read_model_file(folder)
    except FileNotFoundError:
        if not has_tower(source) or vision_tower is not None:
            raise
        if not noted:
            return _tower_from_shapes(source)
        folder, values = source.folder, noted
    if isinstance(values, dict):
        values = values.get("vision_config") or values
    kind = values.get("model_type", CLIP_TYPES[0]) if isinstance(values, dict) else values
    if kind not in CLIP_TYPES:
        raise ValueError(f"The vision tower in {folder} is a {kind!r} model; LLaVA-1.5 has one of CLIP.")
    with config_errors(str(folder / "config.json")):
        kept = {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
        return CLIPVisionConfig(**kept)


def has_tower(source: CheckpointSource) -> bool:
    """Whether the checkpoint holds the weights of its tower."""
    return any(own_name(key).startswith(TOWER) for key in source.tensors)


def tower_folder(source: CheckpointSource, vision_tower: str | Path | None, weights: bool = False) -> Path:
    """The folder of the tower: as asked for, or the checkpoint's `mm_vision_tower`, relative to it or not.

    `weights` as in `find_folder`.
    """
    name = vision_tower or source.config.get("mm_vision_tower") or source.config.get("vision_tower")
    if not name:
        raise FileNotFoundError(
            f"{source.name} names no mm_vision_tower; pass vision_tower=, the folder or repository of its CLIP model."
        )
    if vision_tower is None and (source.folder / name).is_dir():
        return source.folder / name
    try:
        return find_folder(name, weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The vision tower {str(name)!r} of {source.name} cannot be had; pass vision_tower=, the folder of the "
            "CLIP model."
        ) from error


def _tower_from_shapes(source: CheckpointSource) -> CLIPVisionConfig:
    names = {own_name(key): info.shape for key, info in source.tensors.items()}
    shapes = {name.removeprefix(TOWER): shape for name, shape in names.items() if name.startswith(TOWER)}
    hidden, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    positions = shapes["embeddings.position_embedding.weight"][0]
    if hidden % CLIP_HEAD_SIZE:
        raise FileNotFoundError(
            f"{source.name}: the number of heads of its vision tower of width {hidden} is not known; pass "
            "vision_tower=, the folder of the CLIP model."
        )
    logger.warning(
        f"{source.name}: the vision tower {source.config.get('mm_vision_tower')!r} cannot be had; its weights are in "
        f"the checkpoint, its configuration is taken from their shapes (heads of {CLIP_HEAD_SIZE}, quick_gelu)."
    )
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=len({key.split(".")[2] for key in shapes if key.startswith("encoder.layers.")}),
        num_attention_heads=hidden // CLIP_HEAD_SIZE,
        image_size=patch * math.isqrt(positions - 1),
        patch_size=patch,
    )
