"""Configurations that describe no model, refused in one sentence that names the file, the key and the value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .model_kinds import DECODERS
from .values import MOST_SIZE

POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "image_size", "patch_size", "num_channels"),
)
EPSILONS = ("rms_norm_eps", "layer_norm_eps")
ACTIVATIONS = ("hidden_act", "projector_hidden_act")
# More layers than any such model has; making the modules of a billion would not end.
MOST_LAYERS = 1000


@contextmanager
def config_errors(where: str) -> Iterator[None]:
    """`ValueError` naming `where` for whatever transformers or peft raise over values that describe no model."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError) and said.startswith(where):
            raise
        # A missing key or an unknown name says only itself.
        said = f"{type(error).__name__}: {said}" if isinstance(error, LookupError | AttributeError) else said
        raise ValueError(f"{where}: {said}") from error


def check_model_values(config: Any) -> None:
    """`ValueError` where a LLaVA configuration has sizes of no model; transformers finds these late, or never."""
    parts = {"text_config.": config.text_config, "vision_config.": config.vision_config, "": config}
    for prefix, part in parts.items():
        for name, value in vars(part).items():
            _check_value(f"{prefix}{name}", name, value)
    text, vision = config.text_config, config.vision_config
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    if kv_heads is not None and heads % kv_heads:
        raise ValueError(f"text_config.num_key_value_heads={kv_heads} must divide num_attention_heads={heads}.")
    if not -text.vocab_size <= (text.pad_token_id or 0) < text.vocab_size:
        raise ValueError(f"text_config.pad_token_id={text.pad_token_id} is not in the vocabulary of {text.vocab_size}.")
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if not isinstance(rope, str) or rope not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(
            f"text_config.rope_parameters has rope_type={rope!r}; use one of default, {', '.join(ROPE_INIT_FUNCTIONS)}."
        )
    for key, value in (getattr(text, "rope_parameters", None) or {}).items():
        named = key in ("rope_type", "type")
        if (not named and isinstance(value, str)) or (key in ("rope_theta", "factor") and not value > 0):
            raise ValueError(f"text_config.rope_parameters has {key}={value!r}; it must be a number above 0.")
    if getattr(vision, "patch_size", 1) > getattr(vision, "image_size", 1):
        raise ValueError(f"vision_config.patch_size={vision.patch_size} is more than image_size={vision.image_size}.")
    states = getattr(vision, "num_hidden_layers", 0) + 1
    layers = config.vision_feature_layer
    for layer in layers if isinstance(layers, list | tuple) else [layers]:
        if states > 1 and not -states <= layer < states:
            raise ValueError(
                f"vision_feature_layer={layer} is not one of a tower of {states - 1} layers: -{states} to {states - 1}."
            )
    if config.sparsity.predictor_num_layers > MOST_LAYERS:
        raise ValueError(f"sparsity.predictor_num_layers must be at most {MOST_LAYERS}.")
    if config.image_token_index < 0:
        raise ValueError(f"image_token_index={config.image_token_index} must not be negative.")


def check_decoder(text: Any) -> None:
    """`ValueError` unless the decoder of a configuration has a sparse form (`model_kinds.DECODERS`)."""
    if text.model_type not in DECODERS:
        raise ValueError(
            f"Dynamic-LLaVA has sparse decoders of {', '.join(DECODERS)}, got text_config.model_type="
            f"{text.model_type!r}."
        )
    # Qwen's configurations hold a window that they may not use; where layers have types, these say it.
    types = getattr(text, "layer_types", None)
    slides = "sliding_attention" in types if types else getattr(text, "sliding_window", None) is not None
    if slides:
        raise ValueError(
            f"text_config.sliding_window={text.sliding_window}: kept tokens have gaps, and windows over them are not "
            "supported. Set it to null where the model was trained on shorter sequences than that."
        )


def _check_value(key: str, name: str, value: Any) -> None:
    """`value` by what its name says of it; None is that of an entry that is optional."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value!r}.")
    if value is None:
        return
    if name in POSITIVE and not (type(value) is int and 0 < value <= MOST_SIZE):
        raise ValueError(f"{key} must be a whole number from 1 to {MOST_SIZE}, got {value!r}.")
    if name in EPSILONS and not value > 0:
        raise ValueError(f"{key} must be above 0, got {value!r}.")
    if name == "num_hidden_layers" and value > MOST_LAYERS:
        raise ValueError(f"{key} must be at most {MOST_LAYERS}, got {value!r}.")
    if name in ACTIVATIONS and not (isinstance(value, str) and value in ACT2FN):
        raise ValueError(f"{key}={value!r} is no activation of transformers.")
    if name in ("dtype", "torch_dtype") and not _is_float(value):
        raise ValueError(f"{key} must be auto, float32, bfloat16 or float16, got {value!r}.")
    if name == "quantization_config" and not (isinstance(value, dict) or hasattr(value, "to_dict")):
        raise ValueError(f"{key} must be an object, got {value!r}.")


def _is_float(value: Any) -> bool:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return value == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
