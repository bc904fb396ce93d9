"""LLaVA's `image_aspect_ratio` as a setting of the processor, which training, inference and evaluation then share.

`pad` pads a picture to a square with the mean colour, as LLaVA-1.5 does in training and evaluation; `square` (LLaVA's
word) resizes the shorter side and cuts out the middle, as Hugging Face's LLaVA does; `keep` is whatever the processor
does already.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from transformers import LlavaImageProcessorPil, LlavaProcessor

from ..files import read_yaml_mapping

PAD, SQUARE, KEEP = "pad", "square", "keep"
IMAGE_ASPECT_RATIOS = (PAD, SQUARE, KEEP)
#: The resolved configuration in the folder of a training run.
TRAIN_CONFIG = "train_config.yaml"
# What CLIP's and LLaVA's image processors have in common; LLaVA's adds `do_pad`.
SETTINGS = (
    *("crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize"),
    *("image_mean", "image_std", "resample", "rescale_factor", "size"),
)
KINDS = ("CLIPImageProcessor", "LlavaImageProcessor")


def check_aspect_ratio(value: Any, where: str = "image_aspect_ratio") -> str:
    """Returns `value`, one of `IMAGE_ASPECT_RATIOS`; `ValueError` names these."""
    if value not in IMAGE_ASPECT_RATIOS:
        raise ValueError(
            f"{where} is {value!r}; choose pad (as LLaVA-1.5), square (resize the shorter side, cut out the middle) or "
            "keep (as the processor is)."
        )
    return value


def with_aspect_ratio(processor: LlavaProcessor, image_aspect_ratio: str) -> LlavaProcessor:
    """A processor that does so, and says so when it is saved: LLaVA's image processor, whose pixels are CLIP's.

    It is the form in Pillow, as LLaVA's own: the same pixels with torchvision and without.

    Raises:
        ValueError: an unknown word, or an image processor of another kind.
    """
    check_aspect_ratio(image_aspect_ratio)
    settings = processor.image_processor.to_dict()
    kind = str(settings.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    if kind not in KINDS:
        if image_aspect_ratio == KEEP:
            return processor
        raise ValueError(
            f"image_aspect_ratio={image_aspect_ratio} takes the image processor of CLIP or LLaVA, and this one is "
            f"{kind}; pass keep."
        )
    pads = bool(settings.get("do_pad")) if image_aspect_ratio == KEEP else image_aspect_ratio == PAD
    processor = copy.copy(processor)
    processor.image_processor = LlavaImageProcessorPil(
        **{name: settings[name] for name in SETTINGS if name in settings}, do_pad=pads
    )
    return processor


def aspect_ratio_of(processor: LlavaProcessor) -> str | None:
    """`pad` or `square` where the image processor is LLaVA's; None for CLIP's, which says nothing of padding."""
    pads = getattr(processor.image_processor, "do_pad", None)
    return None if pads is None else PAD if pads else SQUARE


def trained_aspect_ratio(folder: Path) -> str | None:
    """What the run that wrote `folder` (or one of its checkpoints) trained with, None where no run did.

    Raises:
        ValueError: its configuration is broken.
    """
    places = [folder, folder.parent] if re.fullmatch(r"checkpoint-\d+", folder.name) else [folder]
    path = next((place / TRAIN_CONFIG for place in places if (place / TRAIN_CONFIG).is_file()), None)
    if path is None:
        return None
    # Earlier versions padded by this one word, which was the default, and took any other for keep.
    value = read_yaml_mapping(path, "training configuration").get("image_aspect_ratio") or PAD
    return value if value in IMAGE_ASPECT_RATIOS else KEEP


def published_aspect_ratio(config: dict[str, Any]) -> str:
    """What LLaVA's own code does with pictures by its `config.json`; `ValueError` where we cannot, such as `anyres`."""
    value = config.get("image_aspect_ratio") or SQUARE
    return check_aspect_ratio(value, "image_aspect_ratio of config.json")
