"""Tokenizers and processors of published checkpoints, made so that `AutoProcessor` and `pipeline` take the result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase

from ..chat_template import IMAGE_TOKEN, chat_template, needs_space_behind_image
from ..configuration_dynamic_llava import DynamicLlavaConfig
from .source import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
COPIED_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a published checkpoint, with the image token that LLaVA's own code does without."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ImportError as error:
        raise ImportError(
            f"The tokenizer of {folder} is a SentencePiece model (tokenizer.model): pip install sentencepiece."
        ) from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def image_token_of(folder: Path, vocab_size: int) -> int:
    """Id of `<image>`: the tokenizer's where there is one, else the first id outside the vocabulary."""
    if not has_tokenizer(folder):
        return vocab_size
    return load_tokenizer(folder).convert_tokens_to_ids(IMAGE_TOKEN)


def build_processor(folder: Path, config: DynamicLlavaConfig, image_settings: dict[str, Any] | None) -> LlavaProcessor:
    """The processor of a published checkpoint: its tokenizer, CLIP's image processing, Vicuna v1's chat template.

    Args:
        folder: the checkpoint.
        config: its configuration.
        image_settings: `preprocessor_config.json` of the tower; None takes CLIP's defaults at the tower's size.
    """
    size = config.vision_config.image_size
    settings = image_settings or {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    settings = {key: value for key, value in settings.items() if not key.endswith("_type")}
    # For the padding of a batch on the left, which generation wants.
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    template = chat_template(space_behind_image=needs_space_behind_image(tokenizer))
    tokenizer.chat_template = template
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**settings),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE_TOKEN,
        chat_template=template,
        num_additional_image_tokens=1,
    )


def image_settings_of(folder: Path) -> dict[str, Any] | None:
    """`preprocessor_config.json` of `folder`, None where there is none."""
    path = folder / "preprocessor_config.json"
    return read_json(path) if path.is_file() else None


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the files of tokenizer and processor that `source` has; their names."""
    found = [name for name in COPIED_FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
