"""`config.json` of LLaVA's and Dynamic-LLaVA's own code, to and from `DynamicLlavaConfig`."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import LlamaConfig
from transformers.utils import logging

from ..config_checks import config_errors
from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..model_kinds import check_kind, is_published
from ..sparsity_config import SparsityConfig
from .source import CheckpointSource
from .tower import tower_config

logger = logging.get_logger(__name__)

# Entries of `sparse_config`, and ours.
SPARSITY_KEYS = {
    "sparse_layer": "sparse_layer",
    "vision_keep_rate": "image_keep_rate",
    "output_text_keep_rate": "output_keep_rate",
    "instruct_keep_rate": "instruct_keep_rate",
    "use_vision_predictor": "image_predictor",
    "d_model": "predictor_dim",
    "nhead": "predictor_num_heads",
    "dim_feedforward": "predictor_ffn_dim",
    "num_layers": "predictor_num_layers",
    "mask_loss_weight": "budget_weight",
    "output_text_len_for_training": "min_output_length",
    "instruct_len_for_training": "min_instruct_length",
}
# Read here or by LLaVA's training code; whatever else is not Llama's is said once.
_LLAVA_KEYS = re.compile(
    r"^(mm_.*|tune_mm_.*|freeze_mm_.*|unfreeze_mm_.*|use_mm_.*|image_.*|vision_.*|tokenizer_.*|sparse_config|"
    r"architectures|model_type|torch_dtype|dtype|transformers_version|_name_or_path|auto_map|dynamic_llava)$"
)


def read_config(
    source: CheckpointSource, vision_tower: str | Path | None, sparsity: dict[str, Any] | None = None
) -> DynamicLlavaConfig:
    """The configuration of a published checkpoint.

    Args:
        source: the checkpoint.
        vision_tower: CLIP folder or repository; None takes `mm_vision_tower`, relative to the checkpoint first.
        sparsity: entries that go on top of the checkpoint's.

    Raises:
        ValueError: not a LLaVA on Llama, or a part of LLaVA that LLaVA-1.5 does not have.
        FileNotFoundError: the tower is not in the checkpoint, and its folder or repository cannot be had.
    """
    check_supported(source)
    with config_errors(f"config.json of {source.name}"):
        return _read_config(source, vision_tower, sparsity or {})


def _read_config(
    source: CheckpointSource, vision_tower: str | Path | None, sparsity: dict[str, Any]
) -> DynamicLlavaConfig:
    config = source.config
    text_keys = set(LlamaConfig().to_dict()) | {"rope_theta", "rope_scaling"}
    extra = {key: value for key, value in config.items() if key not in text_keys}
    unknown = sorted(key for key in extra if not _LLAVA_KEYS.match(key))
    unknown += sorted(f"sparse_config.{key}" for key in _unknown_sparsity(config))
    if unknown:
        logger.warning_once(f"{source.name}: entries of config.json that nothing here reads: {', '.join(unknown)}.")
    text = LlamaConfig(**_text_config(config))
    vision = tower_config(source, vision_tower)
    ours = config.get("dynamic_llava") or {}
    dtype = config.get("torch_dtype") or config.get("dtype")
    return DynamicLlavaConfig(
        text_config=text,
        vision_config=vision,
        sparsity=SparsityConfig.from_dict({**_sparsity(config), **sparsity}),
        projector_layers=projector_layers(config),
        image_token_index=ours.get("image_token_index", text.vocab_size),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=_select_strategy(config),
        published=extra,
        pad_token_id=config.get("pad_token_id"),
        **({"dtype": dtype} if dtype else {}),
    )


def check_supported(source: CheckpointSource) -> None:
    """`ValueError` unless `source` is a published LLaVA-1.5 or Dynamic-LLaVA."""
    config, name = source.config, source.name
    check_kind(config, name)
    if not is_published(config):
        raise ValueError(
            f"{name} is a {config['model_type']!r} model in Hugging Face's layout, not in LLaVA's own: "
            "DynamicLlavaForConditionalGeneration.from_pretrained loads it."
        )
    if not config.get("mm_projector_type") and not any(".mm_projector." in key for key in source.tensors):
        raise ValueError(f"{name} has no projector: a text-only model. Pass a fine-tuned LLaVA-1.5 checkpoint.")


def projector_layers(config: dict[str, Any]) -> int:
    """Linear layers of `mm_projector_type`: 1 for `linear`, N for `mlpNx_gelu`."""
    kind = config.get("mm_projector_type") or "linear"
    if kind == "linear":
        return 1
    match = re.fullmatch(r"mlp(\d{1,4})x_gelu", str(kind))
    if not match:
        raise ValueError(f"Unknown mm_projector_type {kind!r}; linear and mlpNx_gelu are known.")
    return int(match[1])


def to_published_config(config: DynamicLlavaConfig) -> dict[str, Any]:
    """The inverse of `read_config`; what the published layout has no word for goes under `dynamic_llava`.

    Raises:
        ValueError: the decoder is none that the published layout knows.
    """
    if config.text_config.model_type != "llama":
        raise ValueError(
            f"The published layout has Llama decoders alone, this is {config.text_config.model_type!r}; keep --to ours."
        )
    text = {
        key: value
        for key, value in config.text_config.to_diff_dict().items()
        if key not in ("model_type", "architectures", "rope_parameters", "dtype", "transformers_version")
    }
    rope = dict(config.text_config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    # Other code would train the predictor on and leave its offsets as they are.
    sparsity = {**asdict(config.sparsity), "output_offsets": {}}
    kept = dict(config.published or {})
    values = {
        "architectures": ["DynamicLlavaLlamaForCausalLM"],
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "use_mm_proj": True,
        "mm_vision_tower": "vision_tower",
        **kept,
        **{key: getattr(config.text_config, key) for key in _SHAPE_KEYS},
        **text,
        "model_type": kept.get("model_type", "llava_llama"),
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": {"type": rope["rope_type"], **scaling}
        if rope.get("rope_type", "default") != "default"
        else None,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "linear" if config.projector_layers == 1 else f"mlp{config.projector_layers}x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": {"default": "patch", "full": "cls_patch"}[config.vision_feature_select_strategy],
        "sparse_config": {
            **(kept.get("sparse_config") or {}),
            **{theirs: sparsity[own] for theirs, own in SPARSITY_KEYS.items() if own in sparsity},
            "use_output_text_predictor": config.sparsity.output_predictor,
            "use_instruct_predictor": config.sparsity.instruct_predictor,
            "use_text_predictor": config.sparsity.output_predictor or config.sparsity.instruct_predictor,
        },
        "dynamic_llava": {
            "image_token_index": config.image_token_index,
            # Where mm_vision_tower is a folder, it may lie elsewhere now.
            "vision_config": config.vision_config.to_diff_dict(),
            "sparsity": {key: value for key, value in sparsity.items() if key not in SPARSITY_KEYS.values()},
        },
    }
    if config.dtype is not None:
        values["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    return values


_SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    skipped = {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "rope_parameters"}
    text = {key: config[key] for key in (LlamaConfig().to_dict().keys() - skipped) & config.keys()}
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    text["rope_parameters"] = {"rope_type": kind, "rope_theta": config.get("rope_theta", 10000.0), **scaling}
    return text


def _select_strategy(config: dict[str, Any]) -> str:
    feature = config.get("mm_vision_select_feature", "patch")
    strategies = {"patch": "default", "cls_patch": "full"}
    if feature not in strategies:
        raise ValueError(f"Unknown mm_vision_select_feature {feature!r}; use {' or '.join(strategies)}.")
    return strategies[feature]


def _sparsity(config: dict[str, Any]) -> dict[str, Any]:
    """Our sparsity entries of a published configuration; none where it is a plain LLaVA's."""
    sparse = config.get("sparse_config")
    if not sparse:
        return {}
    values = {own: sparse[theirs] for theirs, own in SPARSITY_KEYS.items() if theirs in sparse}
    text = sparse.get("use_text_predictor", True)
    values["output_predictor"] = text and sparse.get("use_output_text_predictor", True)
    values["instruct_predictor"] = text and sparse.get("use_instruct_predictor", False)
    # What the published code computes in training.
    values["gate_estimator"] = "exact"
    return {**values, **(config.get("dynamic_llava") or {}).get("sparsity", {})}


def _unknown_sparsity(config: dict[str, Any]) -> list[str]:
    known = {*SPARSITY_KEYS, "use_text_predictor", "use_output_text_predictor", "use_instruct_predictor"}
    return [key for key in config.get("sparse_config") or {} if key not in known]


assert set(SPARSITY_KEYS.values()) <= {item.name for item in fields(SparsityConfig)}
