"""Loading: Hugging Face LLaVA-1.5 folders and ours, nothing re-initialised in silence."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from safetensors import SafetensorError
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging

from .configuration_dynamic_llava import PREDICTOR_NAMES
from .model_card import write_model_card

logger = logging.get_logger(__name__)

PREDICTORS = tuple(f"{name}." for name in PREDICTOR_NAMES)


class DynamicLoadingMixin:
    """Changes from `PreTrainedModel.from_pretrained`: only predictors may be missing, and that is said once."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a Dynamic-LLaVA or LLaVA-1.5 checkpoint in Hugging Face layout.

        Predictors that the checkpoint does not hold are new; a message says so. With a bitsandbytes
        `quantization_config` the predictors stay in the compute dtype.

        Raises:
            ValueError: a weight other than a predictor's is missing or unknown, or a file is damaged.
        """
        name = pretrained_model_name_or_path
        model, info = _load_quietly(super().from_pretrained, str(name), name, *args, **kwargs)
        _note_new(model, str(name), check_keys(str(name), info["missing_keys"], info["unexpected_keys"]))
        return (model, info) if output_loading_info else model

    @classmethod
    def from_state_dict(cls, state_dict: dict, config, name: str, **kwargs):
        """A model of `config` with the weights `state_dict`, by our names; `kwargs` as in `from_pretrained`.

        Args:
            name: what messages call the checkpoint.
        """
        model, info = _load_quietly(super().from_pretrained, name, None, config=config, state_dict=state_dict, **kwargs)
        _note_new(model, name, check_keys(name, info["missing_keys"], info["unexpected_keys"]))
        # What a LoRA adapter notes as its base.
        model.name_or_path = name
        return model

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """As `PreTrainedModel.save_pretrained`, with a model card where there is none."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_model_card(save_directory, self.config)


def _load_quietly(load, name: str, *args, **kwargs):
    """`load(*args, **kwargs)` without transformers' report of new weights; the model and the loading info."""
    if kwargs.get("quantization_config") is not None:
        kwargs["quantization_config"] = _spare_predictors(kwargs["quantization_config"])
    verbosity = logging.get_verbosity()
    try:
        # The generic report calls new predictors a warning of its own; `check_keys` replaces it.
        logging.set_verbosity_error()
        return load(*args, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"A weight file of {name} is damaged or cut off ({error}); copy or download it again."
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{name}: weights of another shape than config.json says. Check that config.json belongs to them.\n{error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _spare_predictors(quantization):
    """A copy of a bitsandbytes configuration that leaves the predictors (and the head) in the compute dtype."""
    if not hasattr(quantization, "llm_int8_skip_modules"):
        return quantization
    quantization = copy.deepcopy(quantization)
    spared = quantization.llm_int8_skip_modules or ["lm_head"]
    quantization.llm_int8_skip_modules = [*spared, *(name.rstrip(".") for name in PREDICTORS)]
    return quantization


def check_keys(source: str, missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
    """Predictors alone may be missing; returns these.

    Raises:
        ValueError: another weight is missing, or one is unknown; lists them.
    """
    new = sorted(key for key in missing if any(name in key for name in PREDICTORS))
    lost = sorted(set(missing) - set(new))
    unknown = sorted(unexpected)
    if lost or unknown:
        raise ValueError(
            f"{source} does not hold a whole Dynamic-LLaVA or LLaVA-1.5 checkpoint: "
            f"missing {_some(lost)}; unknown {_some(unknown)}. "
            "Check that the copy is whole and that its config.json belongs to it."
        )
    return new


def _note_new(model, source: str, keys: list[str]) -> None:
    """Say which predictors are new, and note them in the configuration as untrained."""
    if not keys:
        return
    new, sparsity = {_predictor(key) for key in keys}, model.config.sparsity
    sparsity.untrained = [name for name in PREDICTOR_NAMES if name in new or name in sparsity.untrained]
    logger.warning(
        f"{source} holds no {' and '.join(sorted(new))}: new ones were initialised. "
        "Train them (python -m dynamic_llava.train) before dropping tokens."
    )


def _predictor(key: str) -> str:
    return next(name.rstrip(".") for name in PREDICTORS if name in key)


def _some(keys: list[str], most: int = 8) -> str:
    if not keys:
        return "nothing"
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def register_key_renaming(model_type: str, class_name: str, base_class_name: str) -> None:
    """Give our classes LLaVA's renaming of old checkpoint keys, which out-of-tree subclasses do not inherit."""
    for name, stock in ((model_type, "llava"), (class_name, "llava"), (base_class_name, "LlavaModel")):
        mapping = get_checkpoint_conversion_mapping(stock)
        if mapping is not None:
            register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
