"""The processor of a run: its base's, which handles pictures as the run says and is saved with it."""

from __future__ import annotations

from transformers import LlavaProcessor

from ..checkpoints import load_processor
from ..checkpoints.aspect_ratio import with_aspect_ratio
from .config import StageConfig


def stage_processor(config: StageConfig) -> LlavaProcessor:
    """The processor that a stage trains with and saves.

    Raises:
        FileNotFoundError, ValueError: as `load_processor` and `with_aspect_ratio`.
    """
    return with_aspect_ratio(load_processor(config.model.base_model), config.data.image_aspect_ratio)
