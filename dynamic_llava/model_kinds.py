"""What kind of model a `config.json` describes, and the refusal of those that are not LLaVA-1.5 or Dynamic-LLaVA."""

from __future__ import annotations

from typing import Any

# `model_type` of LLaVA's and Dynamic-LLaVA's own code ("llava" is Hugging Face's too, which has a `text_config`).
PUBLISHED_MODEL_TYPES = ("llava_llama", "llava", "dynamic_llava_llama")
HUGGING_FACE_MODEL_TYPES = ("llava", "dynamic_llava")
# Stock decoders that have a sparse form, by `model_type`.
DECODERS = {"llama": "LlamaModel", "mistral": "MistralModel", "qwen2": "Qwen2Model", "qwen3": "Qwen3Model"}
NEXT = "LLaVA-NeXT (LLaVA-1.6)"
# The names under which people know what others than these hold.
NAMES = {
    "llava_next": NEXT,
    "llava_next_video": "LLaVA-NeXT-Video",
    "llava_onevision": "LLaVA-OneVision",
    "llava_mistral": "LLaVA on Mistral",
    "llava_mpt": "LLaVA-MPT",
    "llava_qwen": "LLaVA on Qwen",
    "llava_qwen2": "LLaVA on Qwen2",
    "llava_gemma": "LLaVA on Gemma",
    "llava_phi": "LLaVA on Phi",
    "video_llava": "Video-LLaVA",
    "vipllava": "ViP-LLaVA",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "blip": "BLIP",
    "blip-2": "BLIP-2",
    "instructblip": "InstructBLIP",
    "paligemma": "PaliGemma",
    "idefics2": "Idefics2",
    "mllama": "Llama 3.2 Vision",
    "llama": "plain Llama, text-only",
    "mistral": "plain Mistral, text-only",
    "qwen2": "plain Qwen2, text-only",
    "clip": "CLIP",
    "clip_vision_model": "CLIP vision tower",
}
_REMEDY = "Dynamic-LLaVA takes LLaVA-1.5 on Llama, Mistral, Qwen2 or Qwen3, and Dynamic-LLaVA; pass one of these"


def is_published(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is in the layout of LLaVA's own code, and not Hugging Face's."""
    return config.get("model_type") in PUBLISHED_MODEL_TYPES and "text_config" not in config


def check_kind(config: dict[str, Any], name: str) -> None:
    """`ValueError` that calls a model by its name, unless `config` is a LLaVA-1.5's or a Dynamic-LLaVA's.

    Args:
        config: the entries of `config.json`.
        name: what messages call the checkpoint.
    """
    kind = config.get("model_type")
    if kind is None:
        raise ValueError(f"{name}: config.json names no model_type; {_REMEDY}.")
    if not isinstance(kind, str) or kind not in (*HUGGING_FACE_MODEL_TYPES, *PUBLISHED_MODEL_TYPES):
        known = f"{NAMES[kind]} " if isinstance(kind, str) and kind in NAMES else ""
        raise ValueError(f"{name} is a {known}model (model_type {kind!r}); {_REMEDY}.")
    if is_published(config):
        _check_published(config, name)
        return
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise ValueError(f"{name}: {part} of config.json must be an object, got {config.get(part)!r}.")
    text = config["text_config"].get("model_type", "llama")
    if text not in DECODERS:
        raise ValueError(f"{name} is a LLaVA on {text!r} (text_config.model_type); {_REMEDY}.")


def _check_published(config: dict[str, Any], name: str) -> None:
    merge, ratio = config.get("mm_patch_merge_type") or "flat", config.get("image_aspect_ratio")
    for key, value, is_next in (
        ("mm_patch_merge_type", merge, merge != "flat"),
        ("image_aspect_ratio", ratio, isinstance(ratio, str) and "anyres" in ratio),
    ):
        if is_next:
            raise ValueError(f"{name} is a {NEXT} model ({key}={value!r}), which cuts pictures up; {_REMEDY}.")
    if config.get("mm_use_im_start_end"):
        raise ValueError(f"{name} has mm_use_im_start_end, which LLaVA-1.5 has not; {_REMEDY}.")
    classes = config.get("architectures") or []
    if isinstance(classes, list) and classes and not any("llama" in str(item).lower() for item in classes):
        raise ValueError(f"{name} is a {classes[0]!r} model (architectures); {_REMEDY}.")
