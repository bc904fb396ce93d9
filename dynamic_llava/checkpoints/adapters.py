"""LoRA folders (adapters of the decoder, predictors in full), and loading any checkpoint by what it is."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ..carried_code import without_code
from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..loading import is_adapter
from ..model_card import write_model_card
from ..model_kinds import check_kind
from ..sparsity_config import SparsityConfig
from ..weight_checks import check_keys, note_new, noting_new
from ..weight_files import TensorInfo
from .adapter_files import FULL_WEIGHTS, AdapterFiles, adapt, check_adapter, lora_weights, read_adapter, take_full
from .keys import own_name
from .load import load_source, load_whole
from .source import CheckpointSource, adapter_chain, base_of, find_folder, open_source
from .tokenizer import has_tokenizer


def load_checkpoint(name: str | Path, vision_tower: str | Path | None = None, base: str | Path | None = None, **kwargs):
    """Load any checkpoint as a Dynamic-LLaVA: ours, Hugging Face's, published, or a LoRA folder.

    Args:
        name: folder or repository, also `repository@revision`.
        vision_tower: see `load_published`; of the base, for a LoRA folder.
        base: see `load_adapter`.
        kwargs: as in `from_pretrained`; `sparsity` as in `load_published`.

    Raises:
        FileNotFoundError: no such checkpoint, or a part of it is not there.
        ValueError: as `load_published` and `load_adapter`; also `vision_tower` or `base` where it has no effect.
    """
    if is_adapter(find_folder(name)):
        return load_adapter(name, base, merge=True, vision_tower=vision_tower, **kwargs)
    if base is not None:
        raise ValueError(f"{name} is a whole model, not a LoRA folder: base={str(base)!r} has no effect; leave it out.")
    return load_whole(name, vision_tower, **kwargs)


def load_adapter(folder: str | Path, base: str | Path | None = None, merge: bool = False, **kwargs):
    """Load a LoRA folder, of peft or of LLaVA's own code, on its base.

    Args:
        folder: folder or repository with `adapter_config.json`, and the `config.json` that `save_adapter` writes.
        base: checkpoint that the adapter was trained on, any layout, a LoRA folder too; None takes the one it names.
            LLaVA's own LoRA, which holds its projector, may have a plain Llama.
        merge: fold the adapter into the weights and return the plain model.
        kwargs: as in `load_checkpoint`, for the base; `sparsity` goes on top of the adapter's.

    Returns:
        `PeftModel`, or a `DynamicLlavaForConditionalGeneration` with `merge`.

    Raises:
        FileNotFoundError: no such folder, no weights in it, or its base is not there.
        ValueError: not a LoRA folder; weights that are missing, unknown, misshapen, NaN or infinite.
    """
    # Every base is there, and none is its own.
    deque(adapter_chain(folder, base), maxlen=0)
    files = read_adapter(folder)
    kwargs["sparsity"] = _sparsity(files, kwargs.get("sparsity"))
    with noting_new() as new:
        model = _load_base(files, base or base_of(files.folder), **kwargs)
    adapted = adapt(model, files)
    # What the adapter brings is not new, and it brings the whole of a predictor or nothing.
    brought = files.weights.keys() | files.full.keys()
    if files.config is None:
        sparsity = model.config.sparsity
        sparsity.untrained = [name for name in sparsity.untrained if not any(f"{name}." in key for key in brought)]
    note_new(model.config.sparsity, files.name, check_keys(files.name, new, set(new) - brought, ()))
    if not merge:
        return adapted.eval()
    merged = adapted.merge_and_unload().eval()
    merged.name_or_path = files.name
    return merged


def check_resumed(model, folder: str | Path) -> None:
    """`ValueError` unless a LoRA folder holds all adapters and predictors of the `PeftModel` that goes on from it."""
    # Ranks of ZeRO-3 hold parts, so that shapes say nothing here.
    check_adapter(read_adapter(folder), lora_weights(model), shapes=False)


def save_adapter(model, folder: str | Path) -> None:
    """Save a `PeftModel` on Dynamic-LLaVA: adapter, predictors, and the configuration that `load_adapter` needs."""
    model.save_pretrained(folder)
    describe_adapter(model, folder)


def describe_adapter(model, folder: str | Path) -> None:
    """Put the configuration and a model card beside the adapter of a `PeftModel` that lies in `folder`."""
    base = model.get_base_model()
    with without_code(base.config):
        base.config.save_pretrained(folder)
    write_model_card(folder, base.config, base=base.name_or_path, adapter=True)


def _sparsity(files: AdapterFiles, changes: dict[str, Any] | SparsityConfig | None) -> Any:
    """The sparsity that an adapter was trained with, `changes` on top; a published one is read with its base."""
    if files.config is None or files.published or isinstance(changes, SparsityConfig):
        return changes
    return {**asdict(DynamicLlavaConfig.from_pretrained(files.folder).sparsity), **(changes or {})}


def _load_base(files: AdapterFiles, base: str | Path, **kwargs) -> nn.Module:
    if is_adapter(find_folder(base)):
        model = load_adapter(base, merge=True, **kwargs)
    elif files.published:
        return load_source(_with_base(files, open_source(base, any_kind=True)), **kwargs)
    else:
        model = load_whole(base, **kwargs)
    take_full(model, files)
    return model


def _with_base(files: AdapterFiles, base: CheckpointSource) -> CheckpointSource:
    """The published checkpoint that LLaVA's own LoRA makes with its base: the base with its full weights."""
    if base.config.get("model_type") != "llama":
        check_kind(base.config, base.name)
    tensors = {key: info for key, info in base.tensors.items() if own_name(key) not in files.full}
    full = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in files.full.items()}
    where = base.where | dict.fromkeys(full, files.folder / FULL_WEIGHTS)
    # The image token is that of the tokenizer, which may be the base's.
    folder = files.folder if has_tokenizer(files.folder) else base.folder
    return CheckpointSource(files.name, folder, files.config, base.files, tensors | full, where, files.full)
