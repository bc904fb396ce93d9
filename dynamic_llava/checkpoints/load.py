"""Loading published checkpoints, and any checkpoint by what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaProcessor
from transformers.utils import logging

from ..configuration_dynamic_llava import DynamicLlavaConfig, SparsityConfig, is_published
from ..loading import check_keys
from ..modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from .aspect_ratio import aspect_ratio_of, published_aspect_ratio, trained_aspect_ratio, with_aspect_ratio
from .keys import PUBLISHED_TOWER, TOWER, from_published, is_buffer
from .published_config import read_config
from .source import ADAPTER_CONFIG, CheckpointSource, TensorInfo, find_folder, is_adapter, open_source, read_json
from .tokenizer import build_processor, has_tokenizer, image_settings_of, image_token_of
from .tower import has_tower, tower_folder

logger = logging.get_logger(__name__)

CLIP_TEXT_KEYS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


def load_published(
    folder_or_repo: str | Path,
    vision_tower: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    sparsity: dict[str, Any] | SparsityConfig | None = None,
    **from_pretrained_kwargs,
) -> DynamicLlavaForConditionalGeneration:
    """Load a checkpoint in the layout of LLaVA's or Dynamic-LLaVA's own code.

    Args:
        folder_or_repo: `liuhaotian/llava-v1.5-7b`, a published Dynamic-LLaVA, or a folder of that layout.
        vision_tower: folder or repository of the CLIP model, in the place of the checkpoint's `mm_vision_tower`.
        dtype: of the weights; None keeps that of `config.json`.
        sparsity: `SparsityConfig`, or entries on top of the checkpoint's (of the paper's, for a plain LLaVA).
        from_pretrained_kwargs: `device_map`, `quantization_config`, `attn_implementation`, ... as in `from_pretrained`.

    Returns:
        The model in eval mode. Its image token is that of the tokenizer, or else the first id outside the vocabulary;
        its gate estimator is `exact` for a Dynamic-LLaVA, as in the published code.

    Raises:
        FileNotFoundError: no such checkpoint, a missing shard, or a tower that cannot be had.
        ValueError: another kind of model, missing or unknown or misshapen weights, a damaged file.
    """
    source = open_source(folder_or_repo)
    config = published_model_config(source, vision_tower, sparsity)
    stored = our_tensors(source, vision_tower)
    check_tensors(source.name, config, {own: part.tensors[key] for own, (part, key) in stored.items()})
    state = {own: part.lazy(key) for own, (part, key) in stored.items()}
    if dtype is None:
        dtype = "auto" if config.dtype is not None else source.tensors["lm_head.weight"].dtype
    return DynamicLlavaForConditionalGeneration.from_state_dict(
        state, config, source.name, dtype=dtype, **from_pretrained_kwargs
    )


def published_model_config(
    source: CheckpointSource, vision_tower: str | Path | None, sparsity: dict[str, Any] | SparsityConfig | None = None
) -> DynamicLlavaConfig:
    """The configuration of a published checkpoint, with the image token of its tokenizer."""
    changes = vars(sparsity) if isinstance(sparsity, SparsityConfig) else sparsity
    config = read_config(source, vision_tower, changes)
    if "dynamic_llava" not in source.config:
        config.image_token_index = image_token_of(source.folder, config.text_config.vocab_size)
    return config


def our_tensors(source: CheckpointSource, vision_tower: str | Path | None) -> dict[str, tuple[CheckpointSource, str]]:
    """Where a published checkpoint or its tower holds each weight, by our name."""
    inside = has_tower(source) and vision_tower is None
    stored = {
        from_published(key): (source, key)
        for key in source.tensors
        if not is_buffer(key) and (inside or not key.startswith(PUBLISHED_TOWER))
    }
    if not inside:
        tower = open_source(tower_folder(source, vision_tower, weights=True))
        # A whole CLIP model has a text side too.
        keys = (key for key in tower.tensors if not key.startswith(CLIP_TEXT_KEYS) and not is_buffer(key))
        stored.update({TOWER + key.removeprefix("vision_model."): (tower, key) for key in keys})
    return stored


def check_tensors(name: str, config: DynamicLlavaConfig, tensors: dict[str, TensorInfo]) -> list[str]:
    """`ValueError` unless `tensors` are those of a model of `config`, predictors aside; the missing predictors."""
    with torch.device("meta"):
        expected = DynamicLlavaForConditionalGeneration(config).state_dict()
    wrong = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tuple(value.shape) != tensors[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            f"{name}: weights of another shape than config.json says: {'; '.join(wrong[:8])}{more}. "
            "Check that config.json (and vision_tower) belong to these weights."
        )
    missing = expected.keys() - tensors.keys()
    return check_keys(name, missing, tensors.keys() - expected.keys())


def load_processor(name: str | Path, vision_tower: str | Path | None = None) -> LlavaProcessor:
    """The processor of any checkpoint: its own, or one built for a published layout (`tokenizer.build_processor`).

    Pictures are padded or cut as the checkpoint was trained: by its own image processor, by `image_aspect_ratio` of a
    published `config.json`, or by the `train_config.yaml` of a run whose processor does not say.

    Raises:
        FileNotFoundError: no such checkpoint, or one without a tokenizer.
        ValueError: a published checkpoint whose pictures are handled in a way that is not known.
    """
    folder = find_folder(name, weights=False)
    own = has_tokenizer(folder)
    if is_adapter(folder) and not own:
        processor = load_processor(read_json(folder / ADAPTER_CONFIG)["base_model_name_or_path"], vision_tower)
    elif not own:
        raise FileNotFoundError(f"{name} holds no tokenizer (tokenizer.json or tokenizer.model); copy it there.")
    elif is_adapter(folder) or not is_published(read_json(folder / "config.json")):
        processor = AutoProcessor.from_pretrained(folder)
    else:
        return _published_processor(name, folder, vision_tower)
    trained = trained_aspect_ratio(folder)
    if trained is None or (own and aspect_ratio_of(processor) is not None):
        return processor
    if own:
        logger.warning_once(
            f"The processor in {folder} was saved by an earlier version and says nothing of padding; pictures are "
            f"handled as its train_config.yaml says: image_aspect_ratio={trained}."
        )
    return with_aspect_ratio(processor, trained)


def _published_processor(name: str | Path, folder: Path, vision_tower: str | Path | None) -> LlavaProcessor:
    source = open_source(name)
    settings = image_settings_of(folder)
    if settings is None:
        try:
            settings = image_settings_of(tower_folder(source, vision_tower))
        except FileNotFoundError:
            logger.warning(f"{name}: no preprocessor_config.json of its vision tower; CLIP's defaults are used.")
    ratio = published_aspect_ratio(source.config)
    processor = build_processor(folder, published_model_config(source, vision_tower), settings)
    return with_aspect_ratio(processor, ratio)


def load_checkpoint(name: str | Path, vision_tower: str | Path | None = None, **kwargs):
    """Load any checkpoint as a Dynamic-LLaVA: ours, Hugging Face's, published, or a LoRA folder.

    Args:
        name: folder or repository, also `repository@revision`.
        vision_tower: see `load_published`.
        kwargs: as in `from_pretrained`; `sparsity` as in `load_published`.
    """
    folder = find_folder(name)
    if is_adapter(folder):
        # Adapters load their base through this function.
        from .adapters import load_adapter

        return load_adapter(folder, merge=True, **kwargs)
    if is_published(read_json(folder / "config.json")):
        return load_published(name, vision_tower=vision_tower, **kwargs)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(folder, **kwargs)
    # Adapters of it name their base by what was asked for, not by where it was downloaded to.
    model.name_or_path = str(name)
    return model
