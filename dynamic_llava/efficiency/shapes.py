"""Configurations of models by the name of a shape, or from a checkpoint folder; no weights are read."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..files import shipped
from ..reading import read_json_object
from ..sparsity_config import SparsityConfig
from .options import OVERRIDES, SHAPES, ShapeOptions


def build_config(shape: str, overrides: dict[str, int] | None = None) -> DynamicLlavaConfig:
    """Configuration of a named shape.

    Args:
        shape: a name of `SHAPES`.
        overrides: values by the names of `OVERRIDES`, on top of the shape.

    Raises:
        ValueError: an unknown name (the nearest ones are offered), or values that do not fit each other.
    """
    if shape not in SHAPES:
        near = difflib.get_close_matches(shape, SHAPES, n=3, cutoff=0.3) or list(SHAPES)
        raise ValueError(f"Unknown shape {shape!r}. Did you mean {', '.join(near)}? Or pass --model FOLDER.")
    values = {section: dict(numbers) for section, numbers in SHAPES[shape].items()}
    for name, value in (overrides or {}).items():
        section, key = OVERRIDES[name]
        values[section][key] = value
    decoder = values["text"]
    decoder.setdefault("num_key_value_heads", decoder["num_attention_heads"])
    for flag, name, other, divisor in (
        ("--hidden", "hidden_size", "--heads", "num_attention_heads"),
        ("--heads", "num_attention_heads", "--kv-heads", "num_key_value_heads"),
    ):
        if decoder[name] % decoder[divisor]:
            raise ValueError(f"{flag} {decoder[name]} is not a multiple of {other} {decoder[divisor]}; change one.")
    if decoder["hidden_size"] // decoder["num_attention_heads"] % 2:
        raise ValueError(
            f"--hidden {decoder['hidden_size']} gives each head an odd width; rotary positions need pairs."
        )
    if values["vision"]["image_size"] < values["vision"]["patch_size"]:
        raise ValueError(f"--image-size must be at least one patch of 14, got {values['vision']['image_size']}.")
    decoder["max_position_embeddings"] = 4096
    vision = CLIPVisionConfig(projection_dim=values["vision"]["hidden_size"], **values["vision"])
    return DynamicLlavaConfig(
        text_config=LlamaConfig(**decoder),
        vision_config=vision,
        image_token_index=decoder["vocab_size"] - 1,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        sparsity=SparsityConfig(**values["sparsity"]),
    )


def load_config(folder: str | Path) -> DynamicLlavaConfig:
    """Configuration of a checkpoint folder, ours or stock LLaVA-1.5 (taken with the paper's sparsity).

    Raises:
        FileNotFoundError: the folder holds no `config.json`.
        ValueError: the file is no configuration.
    """
    folder = shipped(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"No config.json in {folder}; pass a checkpoint folder, or --shape {'|'.join(SHAPES)}.")
    values = read_json_object(folder / "config.json", "configuration")
    try:
        return DynamicLlavaConfig.from_dict(values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json is no configuration of LLaVA ({error}); copy it again.") from error


def stock_config(config: DynamicLlavaConfig) -> LlavaConfig:
    """The same model without sparsity, for stock `LlavaForConditionalGeneration`."""
    values: dict[str, Any] = config.to_dict()
    for name in ("sparsity", "model_type", "architectures"):
        values.pop(name, None)
    return LlavaConfig(**values)


def config_from_options(options: ShapeOptions, default: str) -> DynamicLlavaConfig:
    """The configuration that options ask for.

    Args:
        options: of the command line.
        default: the shape where neither it nor a checkpoint is named.

    Raises:
        ValueError: `--model` together with `--shape` or a number of it.
    """
    overrides = {name: getattr(options, name) for name in OVERRIDES if getattr(options, name) is not None}
    if options.model is None:
        return build_config(options.shape or default, overrides)
    if options.shape or overrides:
        given = ["shape"] * bool(options.shape) + list(overrides)
        raise ValueError(f"--model fixes the shape; leave out --{given[0].replace('_', '-')}, or --model.")
    return load_config(options.model)
