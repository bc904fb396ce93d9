"""Model shapes by name, from the command line, or from a checkpoint folder; no weights are read."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from ..cli import rate, text, whole
from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..reading import read_json_object
from ..sparsity_config import SparsityConfig

CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# 576 image tokens as in LLaVA-1.5, a tower small enough not to hide the decoder.
CLIP_SMALL = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
CLIP_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _shape(vision: dict[str, int], image_size: int, predictor_dim: int, **text: int) -> dict[str, dict[str, int]]:
    vision = {**vision, "image_size": image_size, "patch_size": 14}
    return {"text": text, "vision": vision, "sparsity": {"predictor_dim": predictor_dim}}


SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "7b": _shape(
        CLIP_LARGE,
        336,
        512,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
    ),
    "13b": _shape(
        CLIP_LARGE,
        336,
        512,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        vocab_size=32064,
    ),
    # 270 M parameters: the smallest at which a CPU's times follow the FLOPs and the bytes moved.
    "small": _shape(
        CLIP_SMALL,
        336,
        512,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=16,
        num_attention_heads=16,
        vocab_size=32064,
    ),
    "tiny": _shape(
        CLIP_TINY,
        56,
        16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=128,
    ),
}

OVERRIDES = {
    "hidden": ("text", "hidden_size", "width of the decoder"),
    "intermediate": ("text", "intermediate_size", "width of the decoder's MLP"),
    "layers": ("text", "num_hidden_layers", "decoder layers"),
    "heads": ("text", "num_attention_heads", "attention heads of the decoder"),
    "kv_heads": ("text", "num_key_value_heads", "key/value heads of the decoder"),
    "vocab": ("text", "vocab_size", "vocabulary of the decoder"),
    "image_size": ("vision", "image_size", "pixels of an image's side; the patch is 14"),
    "sparse_layer": ("sparsity", "sparse_layer", "dense decoder layers in front"),
    "predictor_dim": ("sparsity", "predictor_dim", "width of the predictors"),
}
# Beyond every model, and still counted at once.
MOST_LAYERS, MOST_WIDTH = 10_000, 2**20


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
        section, key, _ = OVERRIDES[name]
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
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"No config.json in {folder}; pass a checkpoint folder, or --shape {'|'.join(SHAPES)}.")
    values = read_json_object(Path(folder) / "config.json", "configuration")
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


def add_shape_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """`--model`, `--shape` and the overrides."""
    parser.add_argument(
        "--model", type=text, metavar="FOLDER", help="take the shape of this checkpoint; weights are not read"
    )
    parser.add_argument("--shape", default=None, help=f"one of {', '.join(SHAPES)} (default: {default})")
    for name, (_, _, description) in OVERRIDES.items():
        number = whole(2 if name == "vocab" else 1, MOST_LAYERS if name == "layers" else MOST_WIDTH)
        parser.add_argument(f"--{name.replace('_', '-')}", type=number, metavar="N", help=description)


def add_rate_arguments(parser: argparse.ArgumentParser) -> None:
    """`--image-keep-rate` and `--output-keep-rate`."""
    for name in ("image", "output"):
        parser.add_argument(f"--{name}-keep-rate", type=rate, metavar="R", help="default: the configuration's")


def config_from_arguments(arguments: argparse.Namespace, default: str) -> DynamicLlavaConfig:
    """What `add_shape_arguments` has read.

    Raises:
        ValueError: `--model` together with `--shape` or an override.
    """
    overrides = {name: getattr(arguments, name) for name in OVERRIDES if getattr(arguments, name) is not None}
    if arguments.model is None:
        return build_config(arguments.shape or default, overrides)
    if arguments.shape or overrides:
        given = ["shape"] * bool(arguments.shape) + list(overrides)
        raise ValueError(f"--model fixes the shape; leave out --{given[0].replace('_', '-')}, or --model.")
    return load_config(arguments.model)
