"""Checkpoints in the layouts that people have, written from tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from dynamic_llava.checkpoints.adapter_files import FULL_WEIGHTS, lora_weights
from dynamic_llava.checkpoints.keys import PUBLISHED_TOWER, to_published
from dynamic_llava.checkpoints.published_config import to_published_config
from dynamic_llava.parameter_names import DECODER, TOWER

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


def write_llama(model, folder: Path) -> Path:
    """The decoder of `model` as a plain Llama without what makes a LLaVA of it, as Vicuna is."""
    llama = LlamaForCausalLM(model.config.text_config)
    state = {key.replace(DECODER, "model."): value for key, value in model.state_dict().items()}
    llama.load_state_dict({key: state[key] for key in llama.state_dict()})
    llama.save_pretrained(folder)
    return folder


def write_llava_lora(adapted, folder: Path, base: Path, file: str = "adapter_model.bin", prefix: str = "") -> Path:
    """A `PeftModel` as LLaVA's own training saves it: LoRA of the decoder, projector and predictors in full.

    Args:
        base: the base that it names.
        file: of its LoRA weights.
        prefix: in front of the names in `non_lora_trainables.bin`, as that of peft is.
    """
    model = adapted.get_base_model()
    folder.mkdir(parents=True)
    values = {**to_published_config(model.config), "mm_vision_tower": str(base.parent / "clip")}
    values.pop("dynamic_llava")
    (folder / "config.json").write_text(json.dumps(values))
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    settings = {"base_model_name_or_path": str(base), "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    settings |= {"r": 4, "lora_alpha": 8, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = {key: value.clone().contiguous() for key, value in lora_weights(adapted).items()}
    lora = {f"base_model.model.{to_published(key, 2)}": value for key, value in weights.items() if ".lora_" in key}
    full = {key: value for key, value in weights.items() if ".lora_" not in key}
    full |= {key: value for key, value in model.state_dict().items() if "multi_modal_projector" in key}
    torch.save({f"{prefix}{to_published(key, 2)}": value for key, value in full.items()}, folder / FULL_WEIGHTS)
    if file.endswith(".bin"):
        torch.save(lora, folder / file)
    else:
        save_file(lora, folder / file)
    return folder


def write_tower(model, folder: Path) -> Path:
    """The tower of `model` as a CLIP vision model of its own."""
    state = {key.removeprefix(TOWER): value for key, value in model.state_dict().items() if key.startswith(TOWER)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.vision_config.to_dict()))
    save_file({f"vision_model.{key}": value for key, value in state.items()}, folder / "model.safetensors")
    return folder
