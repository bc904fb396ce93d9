"""`generation_config.json` as it enters: read with clear errors, and rid of what would stop the next save."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import GenerationConfig
from transformers.utils import logging

from .config_checks import config_errors
from .reading import read_json_object

logger = logging.get_logger(__name__)

GENERATION_FILE = "generation_config.json"
SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation configuration of a folder, None where it has none.

    Raises:
        ValueError: a file that is damaged, or values that transformers refuses.
    """
    path = folder / GENERATION_FILE
    if not os.path.lexists(path):
        return None
    values = read_json_object(path, "generation configuration")
    with config_errors(str(path)):
        config = GenerationConfig.from_dict(values)
        unset_idle(config)
        config.validate(strict=True)
    return config


def unset_idle(config: GenerationConfig) -> None:
    """Unset what has no effect beside the rest, as Vicuna's temperature without `do_sample`: saving would refuse it."""
    idle = [] if config.do_sample else list(SAMPLING)
    if (config.num_beams or 1) == 1:
        idle += BEAMS
    if not config.return_dict_in_generate:
        idle += config.extra_output_flags
    if config.use_cache is False:
        idle.append("cache_implementation")
    if (config.pad_token_id or 0) < 0:
        idle.append("pad_token_id")
    found = [name for name in idle if getattr(config, name, None)]
    for name in found:
        setattr(config, name, None)
    if found:
        logger.warning_once(
            f"The generation configuration sets {', '.join(found)}, which has no effect beside its other values, such "
            "as sampling settings without do_sample: unset."
        )
