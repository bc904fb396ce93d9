"""Tokenizers and processors of published checkpoints, made so that `AutoProcessor` and `pipeline` take the result."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase

from ..config_checks import config_errors
from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..reading import read_json_object, regular_file
from .chat_template import IMAGE_TOKEN, chat_template, needs_space_behind_image

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
COPIED_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *PROCESSOR_FILES,
    "chat_template.jinja",
    "chat_template.json",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds the files of a tokenizer."""
    return any(os.path.lexists(folder / name) for name in TOKENIZER_FILES)


@contextmanager
def tokenizer_errors(folder: Path) -> Iterator[None]:
    """`ValueError` naming the file of tokenizer or processor that is damaged, or at least `folder`."""
    for path in (folder / name for name in COPIED_FILES):
        if os.path.lexists(path) and path.suffix == ".json":
            read_json_object(path, "file of the tokenizer or processor")
        elif os.path.lexists(path):
            regular_file(path, "file of the tokenizer or processor")
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"The tokenizer of {folder} is a SentencePiece model (tokenizer.model): pip install sentencepiece."
        ) from error
    except Exception as error:
        # The tokenizers library has no errors of its own.
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"The tokenizer or processor in {folder} cannot be read ({said}); copy or download it again."
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a published checkpoint, with the image token that LLaVA's own code does without."""
    with tokenizer_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # Settings of another type show when it is used.
        tokenizer("?")
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def image_token_of(folder: Path, vocab_size: int) -> int:
    """Id of `<image>`: the tokenizer's where there is one, else the first id outside the vocabulary."""
    if not has_tokenizer(folder):
        return vocab_size
    return load_tokenizer(folder).convert_tokens_to_ids(IMAGE_TOKEN)


def own_processor(folder: Path, config: DynamicLlavaConfig) -> LlavaProcessor:
    """The processor of a folder; what its `processor_config.json` does not say (transformers 4.36) is the tower's."""
    with tokenizer_errors(folder):
        processor = AutoProcessor.from_pretrained(folder)
    if not isinstance(processor, LlavaProcessor):
        raise ValueError(f"{folder} holds a {type(processor).__name__}, not the processor of a LLaVA; copy it there.")
    with tokenizer_errors(folder):
        processor.tokenizer("?")
    said = _said(folder)
    for name, value in token_settings(config).items():
        if said.get(name) is None:
            setattr(processor, name, value)
    return processor


def is_complete(folder: Path) -> bool:
    """Whether the processor that `folder` holds says how many tokens an image has."""
    return all(_said(folder).get(name) is not None for name in ("patch_size", "num_additional_image_tokens"))


def _said(folder: Path) -> dict[str, Any]:
    path = folder / "processor_config.json"
    return read_json_object(path, "processor configuration") if path.exists() else {}


def token_settings(config: DynamicLlavaConfig) -> dict[str, Any]:
    """What a `LlavaProcessor` must know of the tower to count an image's tokens; CLIP has one for the class."""
    return {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,
    }


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
    with config_errors(f"preprocessor_config.json of {folder}"):
        image_processor = CLIPImageProcessorPil(**settings)
    # For the padding of a batch on the left, which generation wants.
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    template = chat_template(space_behind_image=needs_space_behind_image(tokenizer))
    tokenizer.chat_template = template
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_token=IMAGE_TOKEN,
        chat_template=template,
        **token_settings(config),
    )


def image_settings_of(folder: Path) -> dict[str, Any] | None:
    """Settings of the image processor that `folder` holds, None where there is none."""
    whole, own = (folder / name for name in PROCESSOR_FILES)
    if own.exists():
        return read_json_object(own, "image processor")
    settings = read_json_object(whole, "processor").get("image_processor") if whole.exists() else None
    if not isinstance(settings, dict | None):
        raise ValueError(f"{whole}: image_processor is {settings!r}, not an object; copy or download it again.")
    return settings


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the files of tokenizer and processor that `source` has; their names."""
    found = [name for name in COPIED_FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
