"""Loading whole checkpoints of any layout, and their processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaProcessor
from transformers.utils import logging

from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..loading import is_adapter
from ..model_kinds import is_published
from ..modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from ..parameter_names import EMBEDDINGS, HEAD, TOWER
from ..sparsity_config import SparsityConfig
from ..weight_checks import by_own_name, check_tensors, model_weights
from ..weight_files import some
from .aspect_ratio import aspect_ratio_of, published_aspect_ratio, trained_aspect_ratio, with_aspect_ratio
from .keys import own_name
from .published_config import read_config
from .source import CheckpointSource, adapter_chain, find_folder, open_source, read_config_file
from .tokenizer import build_processor, has_tokenizer, image_settings_of, image_token_of, own_processor
from .tower import has_tower, tower_folder

logger = logging.get_logger(__name__)

OWN_TOWER = (
    "{name} holds its vision tower, as all in Hugging Face's layout do: vision_tower={tower!r} has no effect; "
    "leave it out."
)
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
    return load_source(open_source(folder_or_repo), vision_tower, dtype, sparsity, **from_pretrained_kwargs)


def load_source(
    source: CheckpointSource,
    vision_tower: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    sparsity: dict[str, Any] | SparsityConfig | None = None,
    **from_pretrained_kwargs,
) -> DynamicLlavaForConditionalGeneration:
    """The model of a published checkpoint that is open; as `load_published`."""
    config = published_model_config(source, vision_tower, sparsity)
    stored = our_tensors(source, vision_tower)
    infos = {own: part.tensors[key] for own, (part, key) in stored.items()}
    check_tensors(source.name, model_weights(source.name, DynamicLlavaForConditionalGeneration, config), infos)
    state = {own: part.lazy(key) for own, (part, key) in stored.items()}
    if dtype is None:
        dtype = "auto" if config.dtype is not None else infos[EMBEDDINGS].dtype
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
    pairs = [(own_name(key), key) for key in source.tensors]
    own = by_own_name(source.name, (pair for pair in pairs if inside or not pair[0].startswith(TOWER)))
    stored = {name: (source, key) for name, key in own.items()}
    if not inside:
        tower = open_source(tower_folder(source, vision_tower, weights=True), any_kind=True)
        # A whole CLIP model has a text side too.
        keys = (key for key in tower.tensors if not key.startswith(CLIP_TEXT_KEYS))
        own = by_own_name(tower.name, ((TOWER + key.removeprefix("vision_model."), key) for key in keys))
        stored.update({name: (tower, key) for name, key in own.items()})
    return stored


def load_processor(name: str | Path, vision_tower: str | Path | None = None) -> LlavaProcessor:
    """The processor of any checkpoint: its own, or one built for a published layout (`tokenizer.build_processor`).

    Pictures are padded or cut as the checkpoint was trained: by its own image processor, by `image_aspect_ratio` of a
    published `config.json`, or by the `train_config.yaml` of a run whose processor does not say.

    Raises:
        FileNotFoundError: no such checkpoint, or one without a tokenizer.
        ValueError: a published checkpoint whose pictures are handled in a way that is not known.
    """
    # A LoRA folder may leave its tokenizer to its base, and its configuration too.
    folder = next((part for part in adapter_chain(name) if has_tokenizer(part)), None)
    if folder is None:
        raise FileNotFoundError(f"{name} holds no tokenizer (tokenizer.json or tokenizer.model); copy it there.")
    described = next((part for part in adapter_chain(name) if (part / "config.json").exists()), folder)
    if is_published(read_config_file(described, name)):
        processor = _published_processor(name, folder, described, vision_tower)
    elif vision_tower is not None:
        raise ValueError(OWN_TOWER.format(name=name, tower=vision_tower))
    else:
        processor = own_processor(folder, DynamicLlavaConfig.from_pretrained(described))
    run = find_folder(name, weights=False)
    trained = trained_aspect_ratio(run)
    if trained is None or (run == folder and aspect_ratio_of(processor) is not None):
        return processor
    if run == folder:
        logger.warning_once(
            f"The processor in {folder} was saved by an earlier version and says nothing of padding; pictures are "
            f"handled as its train_config.yaml says: image_aspect_ratio={trained}."
        )
    return with_aspect_ratio(processor, trained)


def _published_processor(
    name: str | Path, folder: Path, described: Path, vision_tower: str | Path | None
) -> LlavaProcessor:
    if is_adapter(described):
        source = CheckpointSource(str(name), folder, read_config_file(described, name), [], {}, {})
    else:
        source = open_source(described)
    settings = None if vision_tower else image_settings_of(folder)
    if settings is None:
        try:
            settings = image_settings_of(tower_folder(source, vision_tower))
        except FileNotFoundError:
            logger.warning(f"{name}: no preprocessor_config.json of its vision tower; CLIP's defaults are used.")
    ratio = published_aspect_ratio(source.config)
    processor = build_processor(folder, published_model_config(source, vision_tower), settings)
    return with_aspect_ratio(processor, ratio)


def load_whole(
    name: str | Path, vision_tower: str | Path | None = None, **kwargs
) -> DynamicLlavaForConditionalGeneration:
    """Load a checkpoint of any layout but a LoRA folder; arguments as `adapters.load_checkpoint`."""
    folder = find_folder(name)
    if is_published(read_config_file(folder, name)):
        return load_published(name, vision_tower=vision_tower, **kwargs)
    if vision_tower is not None:
        raise ValueError(OWN_TOWER.format(name=name, tower=vision_tower))
    if kwargs.pop("output_loading_info", False):
        raise ValueError("output_loading_info is for from_pretrained of the model's class; leave it out.")
    model = DynamicLlavaForConditionalGeneration.from_pretrained(folder, **kwargs)
    # Adapters of it name their base by what was asked for, not by where it was downloaded to.
    model.name_or_path = str(name)
    return model


def load_weights(model: DynamicLlavaForConditionalGeneration, folder: str | Path) -> None:
    """Copy the weights of a checkpoint in our layout into `model`; `ValueError` unless it holds all of them."""
    source = open_source(folder)
    own = by_own_name(source.name, ((own_name(key), key) for key in source.tensors))
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        expected.pop(HEAD)
    new = check_tensors(source.name, expected, {name: source.tensors[key] for name, key in own.items()})
    if new:
        raise ValueError(f"{folder} does not hold {some(new)}; go on from another checkpoint.")
    model.load_state_dict({name: source.read(key) for name, key in own.items()}, strict=False)
