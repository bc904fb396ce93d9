"""The files of a LoRA folder: settings and weights under our names, and the adapted model that they must fit."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config_checks import config_errors
from ..loading import ADAPTER_CONFIG, require_adapter
from ..model_kinds import check_kind, is_published
from ..parameter_names import DECODER
from ..reading import read_json_object
from ..weight_checks import PREDICTORS, by_own_name, check_floating, misshapen
from ..weight_files import check_finite, open_weights, some
from .keys import own_name, to_published
from .source import find_folder, read_model_file

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What LLaVA's own code trains in full beside its LoRA: the projector, and Dynamic-LLaVA's predictors.
FULL_WEIGHTS = "non_lora_trainables.bin"
# Of every key that peft writes, and of LLaVA's, which saves its model inside two more.
PEFT_PREFIX = "base_model.model."
LORA = ".lora_"


@dataclass
class AdapterFiles:
    """A LoRA folder.

    Attributes:
        name: as it was asked for.
        folder: where its files are.
        settings: its `adapter_config.json`.
        config: its `config.json`, None where it has none.
        file: of its LoRA weights.
        weights: what `file` holds, by our names behind `PEFT_PREFIX`.
        full: what stands beside them in full (`FULL_WEIGHTS`), by our names.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    config: dict[str, Any] | None
    file: Path
    weights: dict[str, Tensor] = field(repr=False)
    full: dict[str, Tensor] = field(repr=False)

    @property
    def published(self) -> bool:
        """Whether it is in the layout of LLaVA's own code."""
        return self.config is not None and is_published(self.config)


def read_adapter(name: str | Path) -> AdapterFiles:
    """Read the settings and weights of a LoRA folder.

    Raises:
        FileNotFoundError: no such folder, or one without weights.
        ValueError: not a LoRA folder, damaged files, weights that are no finite floating point numbers.
    """
    folder = find_folder(name)
    require_adapter(folder, name)
    settings = read_json_object(folder / ADAPTER_CONFIG, "LoRA configuration")
    if settings.get("peft_type", "LORA") != "LORA" or settings.get("megatron_config"):
        raise ValueError(f"{folder / ADAPTER_CONFIG} has peft_type {settings.get('peft_type')!r}; plain LoRA is taken.")
    config = None
    if (folder / "config.json").exists():
        config = read_model_file(folder)
        check_kind(config, str(name))
    file = next((folder / item for item in ADAPTER_WEIGHTS if os.path.lexists(folder / item)), None)
    if file is None:
        raise FileNotFoundError(
            f"{name} holds no LoRA weights: none of {', '.join(ADAPTER_WEIGHTS)}. Is the download complete?"
        )
    weights = _by_own_name(file, _adapter_key)
    full = folder / FULL_WEIGHTS
    found = _by_own_name(full, _full_key) if os.path.lexists(full) else {}
    return AdapterFiles(str(name), folder, settings, config, file, weights, found)


def adapt(model: nn.Module, files: AdapterFiles, load: bool = True):
    """`model` as a `PeftModel` with the weights of a LoRA folder, which must be those of all its adapters.

    Args:
        model: the base.
        files: the LoRA folder.
        load: False checks names and shapes alone, as for a model on the meta device.

    Raises:
        ValueError: settings that describe no adapter of `model`; LoRA weights that are missing, unknown or misshapen.
    """
    from peft import set_peft_model_state_dict

    with config_errors(str(files.folder / ADAPTER_CONFIG)):
        adapted = with_adapters(model, _lora_config(model, files))
        expected = lora_weights(adapted)
    check_adapter(files, expected)
    if load:
        set_peft_model_state_dict(adapted, {f"{PEFT_PREFIX}{key}": value for key, value in files.weights.items()})
    return adapted


def with_adapters(model: nn.Module, config: Any):
    """`peft.get_peft_model`; the old name by which it asks for checkpointing is of no concern to a user."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def lora_weights(adapted: nn.Module) -> dict[str, Tensor]:
    """What the LoRA folder of a `PeftModel` holds, by our names."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {_adapter_key(key): value for key, value in state.items()}


def check_adapter(files: AdapterFiles, expected: dict[str, Tensor], shapes: bool = True) -> None:
    """`ValueError` unless the LoRA weights of `files` are `expected`, and with `shapes` of their shapes."""
    missing, unknown = sorted(expected.keys() - files.weights.keys()), sorted(files.weights.keys() - expected.keys())
    if missing or unknown or not any(LORA in key for key in expected):
        raise ValueError(
            f"{files.file} does not hold the weights of the adapters that its {ADAPTER_CONFIG} describes: missing "
            f"{some(missing)}; unknown {some(unknown)}. Check that the copy is whole, and that base is what it was "
            "trained on."
        )
    _check_shapes(files.file, files.weights, expected if shapes else {})


def _check_shapes(file: Path, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    wrong = misshapen(weights, expected)
    if wrong:
        raise ValueError(f"{file} does not fit its base: {some(wrong)}. Pass base=, what it was trained on.")


def take_full(model: nn.Module, files: AdapterFiles) -> None:
    """Copy what a LoRA folder holds in full into its base; `ValueError` where it does not fit, or is cut off."""
    own = dict(model.named_parameters())
    unknown = sorted(files.full.keys() - own.keys())
    if unknown:
        raise ValueError(f"{files.folder / FULL_WEIGHTS} holds weights that the model has not: {some(unknown)}.")
    for part in PREDICTORS:
        keys = {key for key in own if part in key}
        lost = sorted(keys - files.full.keys())
        if lost and keys & files.full.keys():
            raise ValueError(f"{files.folder / FULL_WEIGHTS} holds only some of a predictor: missing {some(lost)}.")
    _check_shapes(files.folder / FULL_WEIGHTS, files.full, {key: own[key] for key in files.full})
    with torch.no_grad():
        for key, value in files.full.items():
            if not own[key].is_meta:
                own[key].copy_(value)


def _lora_config(model: nn.Module, files: AdapterFiles):
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(files.folder))
    config.inference_mode = True
    # As peft would do, with a warning; a model that was not loaded has no such name.
    config.base_model_name_or_path = model.name_or_path or None
    if files.published:
        config.target_modules = _decoder_targets(model, config)
        config.exclude_modules = config.layers_to_transform = None
    return config


def _decoder_targets(model: nn.Module, config) -> list[str]:
    """Our names of the layers that LLaVA's own LoRA adapts: of the decoder alone, as in its `find_all_linear_names`."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.rank_pattern or config.alpha_pattern:
        raise ValueError("rank_pattern and alpha_pattern are not known in the layout of LLaVA's own code.")
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{DECODER}layers.")
    ]
    published = {to_published(name, model.config.projector_layers): name for name in names}
    found = [own for theirs, own in published.items() if check_target_module_exists(config, theirs)]
    if not found:
        raise ValueError(f"target_modules={config.target_modules!r} are no layers of the decoder.")
    return found


def _adapter_key(key: str) -> str:
    """Our name of a key that peft wrote over a model of any layout; one of another prefix is no name of ours."""
    if not key.startswith(PEFT_PREFIX):
        return f"{key} (without {PEFT_PREFIX})"
    module, lora, rest = key.removeprefix(PEFT_PREFIX).partition(LORA)
    if not lora:
        return own_name(module)
    return own_name(f"{module}.weight").removesuffix(".weight") + lora + rest


def _full_key(key: str) -> str:
    """Our name of a key of `FULL_WEIGHTS`, with or without what peft puts in front."""
    return own_name(key.removeprefix(PEFT_PREFIX))


def _by_own_name(file: Path, name_of) -> dict[str, Tensor]:
    opened = open_weights(file)
    read = opened.__getitem__ if isinstance(opened, dict) else opened.get_tensor
    found = by_own_name(str(file), ((name_of(key), key) for key in opened.keys()))  # noqa: SIM118  not a dict
    weights = {own: read(key) for own, key in found.items()}
    check_floating(file, weights)
    check_finite(str(file), weights.items())
    return weights
