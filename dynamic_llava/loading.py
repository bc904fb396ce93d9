"""Loading: Hugging Face LLaVA-1.5 folders and ours, nothing re-initialised in silence."""

from __future__ import annotations

import copy
from pathlib import Path

from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .call_arguments import GENERATE_ARGUMENTS, given_arguments
from .compat import Stock
from .generation_file import read_generation_config, unset_idle
from .model_card import write_model_card
from .reading import regular_file
from .weight_checks import PREDICTORS, check_keys, check_weights, note_new
from .weight_files import check_finite

logger = logging.get_logger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# Arguments with which transformers reads other files of a folder, or others than are there.
_OTHER_FILES = ("gguf_file", "ignore_mismatched_sizes", "key_mapping", "state_dict", "subfolder", "use_safetensors")


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds a peft adapter."""
    return (folder / ADAPTER_CONFIG).exists()


def require_adapter(folder: Path, name: str | Path) -> None:
    """`ValueError` unless `folder`, which messages call `name`, holds an adapter."""
    if not is_adapter(folder):
        raise ValueError(f"{name} holds no {ADAPTER_CONFIG}; it is not a LoRA folder.")


def refuse_adapter(folder: Path, name: str | Path) -> None:
    """`ValueError` where `folder`, which messages call `name`, holds an adapter and not a whole model."""
    if is_adapter(folder):
        raise ValueError(
            f"{name} is a LoRA folder, not a whole model; load it with "
            "dynamic_llava.checkpoints.load_adapter(folder, base=...)."
        )


class DynamicLoadingMixin(Stock):
    """Changes from `PreTrainedModel.from_pretrained`: only predictors may be missing, and that is said once."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a Dynamic-LLaVA or LLaVA-1.5 checkpoint in Hugging Face layout.

        Predictors that the checkpoint does not hold are new; a message says so. With a bitsandbytes
        `quantization_config` the predictors stay in the compute dtype.

        Raises:
            ValueError: another kind of model; a weight other than a predictor's, or only some of a predictor's, are
                missing; a weight is unknown, of another shape, no floating point number, NaN or infinite; a file is
                damaged, or none that its place is for.
        """
        name = pretrained_model_name_or_path
        if name is not None and Path(name).is_dir() and not kwargs.get("variant"):
            generation = cls._check_folder(Path(name), kwargs)
            kwargs.setdefault("generation_config", generation)
        model, info = _load_quietly(super().from_pretrained, str(name), name, *args, **kwargs)
        note_new(model.config.sparsity, str(name), _check_loaded(str(name), model, info))
        return (model, info) if output_loading_info else model

    @classmethod
    def _check_folder(cls, folder: Path, kwargs: dict) -> GenerationConfig | None:
        """Refuse what transformers would load in part, wait for, or end over in an error of its own.

        Returns the folder's generation configuration; for a damaged one transformers would take the model's.
        """
        refuse_adapter(folder, folder)
        if any(kwargs.get(name) for name in _OTHER_FILES):
            return None
        config = kwargs.get("config")
        if config is None:
            regular_file(folder / "config.json", "configuration")
            config, _ = cls.config_class.from_pretrained(folder, **{**kwargs, "return_unused_kwargs": True})
        check_weights(str(folder), cls, config, folder)
        return read_generation_config(folder)

    @classmethod
    def from_state_dict(cls, state_dict: dict, config, name: str, **kwargs):
        """A model of `config` with the weights `state_dict`, by our names; `kwargs` as in `from_pretrained`.

        Args:
            name: what messages call the checkpoint.
        """
        model, info = _load_quietly(super().from_pretrained, name, None, config=config, state_dict=state_dict, **kwargs)
        note_new(model.config.sparsity, name, _check_loaded(name, model, info))
        # What a LoRA adapter notes as its base.
        model.name_or_path = name
        return model

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """As `PreTrainedModel.save_pretrained`, with the code of the model and a model card where there is none."""
        generation = getattr(self, "generation_config", None)
        if generation is not None and given_arguments(vars(generation), GENERATE_ARGUMENTS):
            # A file with this mark would be read without what transformers does not know.
            generation._from_model_config = False
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_model_card(save_directory, self.config, base=self.name_or_path)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """As `PushToHubMixin`, which would put an empty form in the place of the card."""
        write_model_card(working_dir, self.config, base=self.name_or_path)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _check_loaded(name: str, model, info: dict) -> list[str]:
    """The predictors that are new; `ValueError` where other weights are, or where one is no finite number."""
    new = check_keys(name, model.state_dict(), info["missing_keys"], info["unexpected_keys"])
    check_finite(name, model.named_parameters())
    if model.can_generate():
        unset_idle(model.generation_config)
    return new


def _load_quietly(load, name: str, *args, **kwargs):
    """`load(*args, **kwargs)` without transformers' report of new weights; the model and the loading info."""
    if kwargs.get("quantization_config") is not None:
        kwargs["quantization_config"] = _spare_predictors(kwargs["quantization_config"])
    verbosity = logging.get_verbosity()
    try:
        # The generic report calls new predictors a warning of its own; `check_keys` replaces it.
        logging.set_verbosity_error()
        model, info = load(*args, output_loading_info=True, **kwargs)
        if is_deepspeed_zero3_enabled():
            # Noted there are renamings that loading has not used; saving would turn all of them round.
            model._weight_conversions = None
        return model, info
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
