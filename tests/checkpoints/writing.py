"""Checkpoints in the layouts that people have, written from tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from dynamic_llava.checkpoints.keys import PUBLISHED_TOWER, to_published
from dynamic_llava.checkpoints.published_config import to_published_config

from ..tiny import tiny_model


def model_of(**kwargs):
    """A tiny model as a published one: the image token is the first id outside its vocabulary."""
    model = tiny_model(gate_estimator="exact", **kwargs)
    model.config.image_token_index = model.config.text_config.vocab_size
    return model


def published_state(model) -> dict[str, torch.Tensor]:
    layers = model.config.projector_layers
    return {to_published(key, layers): value.clone() for key, value in model.state_dict().items()}


def write_published(model, folder: Path, files: str = "model.safetensors", tower: str = "inside", **config) -> Path:
    """Write `model` in the published layout.

    Args:
        files: `model.safetensors`, `pytorch_model.bin`, or one of them with `:N` shards.
        tower: `inside`, `separate` (a CLIPVisionModel folder), or `whole` (a folder with a text side too).
        config: entries on top of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = published_state(model)
    values = {**to_published_config(model.config), "mm_vision_tower": "clip", **config}
    values.pop("dynamic_llava")
    (folder / "config.json").write_text(json.dumps(values))
    vision = model.config.vision_config.to_dict()
    (folder / "clip").mkdir(exist_ok=True)
    if tower != "inside":
        own = {
            key.removeprefix(PUBLISHED_TOWER): state.pop(key) for key in list(state) if key.startswith(PUBLISHED_TOWER)
        }
        own = {f"vision_model.{key}": value for key, value in own.items()}
        if tower == "whole":
            own |= {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 3), "logit_scale": torch.zeros(())}
            vision = {"model_type": "clip", "vision_config": vision, "text_config": {}}
        save_file(own, folder / "clip" / "model.safetensors", metadata={"format": "pt"})
    (folder / "clip" / "config.json").write_text(json.dumps(vision))
    write_state(state, folder, files)
    return folder


def write_state(state: dict[str, torch.Tensor], folder: Path, files: str) -> None:
    name, _, shards = files.partition(":")
    stem, suffix = name.rsplit(".", 1)
    keys = list(state)
    number = int(shards or 1)
    parts = [keys[n::number] for n in range(number)]
    weight_map = {}
    for n, part in enumerate(parts, start=1):
        file = name if number == 1 else f"{stem}-{n:05d}-of-{number:05d}.{suffix}"
        weight_map |= dict.fromkeys(part, file)
        tensors = {key: state[key] for key in part}
        if suffix == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if number > 1:
        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
