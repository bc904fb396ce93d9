"""LoRA folders (peft): adapters on the decoder's linear layers, predictors trained in full."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..configuration_dynamic_llava import DynamicLlavaConfig
from .source import ADAPTER_CONFIG, find_folder, is_adapter, read_json


def load_adapter(folder: str | Path, base: str | Path | None = None, merge: bool = False, **kwargs):
    """Load a LoRA folder on its base.

    Args:
        folder: folder or repository with `adapter_config.json`, and the `config.json` that `save_adapter` writes.
        base: checkpoint that the adapter was trained on, any layout; None takes the one it names.
        merge: fold the adapter into the weights and return the plain model.
        kwargs: as in `load_checkpoint`, for the base.

    Returns:
        `PeftModel`, or a `DynamicLlavaForConditionalGeneration` with `merge`.

    Raises:
        FileNotFoundError: no such folder, or its base is not there.
        ValueError: not a LoRA folder.
    """
    from peft import PeftModel

    from .load import load_checkpoint

    found = find_folder(folder)
    if not is_adapter(found):
        raise ValueError(f"{folder} holds no {ADAPTER_CONFIG}; it is not a LoRA folder.")
    named = read_json(found / ADAPTER_CONFIG).get("base_model_name_or_path")
    if base is None and not named:
        raise FileNotFoundError(f"{folder} names no base model; pass base=, the checkpoint it was trained on.")
    untrained = []
    if (found / "config.json").is_file():
        sparsity = DynamicLlavaConfig.from_pretrained(found).sparsity
        kwargs.setdefault("sparsity", asdict(sparsity))
        untrained = sparsity.untrained
    try:
        model = load_checkpoint(base or named, **kwargs)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The base {str(base or named)!r} of the LoRA {folder} is not there; pass base=, where it is now."
        ) from error
    adapted = PeftModel.from_pretrained(model, found)
    # The predictors are the adapter's, whatever the base had.
    model.config.sparsity.untrained = list(untrained)
    return adapted.merge_and_unload() if merge else adapted.eval()


def save_adapter(model, folder: str | Path) -> None:
    """Save a `PeftModel` on Dynamic-LLaVA: adapter, predictors, and the configuration that `load_adapter` needs."""
    model.save_pretrained(folder)
    model.get_base_model().config.save_pretrained(folder)
