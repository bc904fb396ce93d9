"""`python -m dynamic_llava.checkpoints inspect SRC`: what a checkpoint is, what is missing, what would be new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..loading import is_adapter
from ..model_kinds import is_published
from ..modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from ..weight_checks import PREDICTORS
from ..weight_files import TensorInfo
from .adapter_files import FULL_WEIGHTS, adapt, read_adapter, take_full
from .load import published_model_config
from .opened import open_checkpoint
from .source import CheckpointSource, adapter_chain, find_folder, open_source, read_config_file


def inspect_checkpoint(name: str | Path, vision_tower: str | Path | None = None) -> dict[str, Any]:
    """Facts of a checkpoint, all of whose weights are read once, to see that they are numbers.

    Returns:
        `layout`, `files`, `parameters`, `dtypes`, `decoder`, `vision_tower`, `projector_layers`, `image_token`,
        `sparsity`, `new` (weights that loading would initialise); for a LoRA folder `layout`, `base`
        (which is not read), `files`, `rank`, `alpha`, `parameters`, `dtypes` and `predictors`, those that it brings.

    Raises:
        ValueError, FileNotFoundError: as `load_checkpoint`, with what is missing or wrong.
    """
    if is_adapter(find_folder(name)):
        return _inspect_adapter(name, vision_tower)
    checkpoint = open_checkpoint(name, vision_tower)
    config, source = checkpoint.config, checkpoint.source
    text, vision = config.text_config, config.vision_config
    try:
        for own in checkpoint.stored:
            checkpoint.read(own)
    finally:
        checkpoint.close()
    sizes = _sizes(checkpoint.info(own) for own in checkpoint.stored)
    predictors = any("_predictor." in key for key in checkpoint.stored)
    kind = {"hugging face": "Hugging Face"}.get(checkpoint.layout, checkpoint.layout)
    return {
        "layout": f"{kind} ({source.config['model_type']})",
        "model": "Dynamic-LLaVA" if predictors else "LLaVA",
        "files": [path.name for path in source.files],
        "parameters": sum(sizes.values()),
        "dtypes": dict(sizes),
        "decoder": f"{text.num_hidden_layers} layers, hidden {text.hidden_size}, {text.num_attention_heads} heads, "
        f"{text.num_key_value_heads} KV heads, vocabulary {text.vocab_size}",
        "vision_tower": f"{vision.num_hidden_layers} layers, hidden {vision.hidden_size}, {vision.image_size} px, "
        f"patches of {vision.patch_size}",
        "projector_layers": config.projector_layers,
        "image_token": config.image_token_index,
        "sparsity": asdict(config.sparsity),
        "new": checkpoint.new,
    }


def _inspect_adapter(name: str | Path, vision_tower: str | Path | None) -> dict[str, Any]:
    """Facts of a LoRA folder, whose weights are checked against a model without weights."""
    files = read_adapter(name)
    described = next((part for part in adapter_chain(name) if (part / "config.json").exists()), files.folder)
    if files.published:
        source = CheckpointSource(files.name, files.folder, files.config, [], {}, {})
        config = published_model_config(source, vision_tower)
    elif is_published(read_config_file(described, name)):
        config = published_model_config(open_source(described), vision_tower)
    else:
        config = DynamicLlavaConfig.from_pretrained(described)
    with torch.device("meta"):
        model = DynamicLlavaForConditionalGeneration(config)
        take_full(model, files)
        adapt(model, files, load=False)
    held = files.weights | files.full
    sizes = _sizes(TensorInfo(tuple(value.shape), value.dtype) for value in held.values())
    full = [FULL_WEIGHTS] if files.full else []
    return {
        "layout": f"LoRA ({'LLaVA' if files.published else 'peft'})",
        "base": files.settings.get("base_model_name_or_path"),
        "files": [files.file.name, *full],
        "rank": files.settings.get("r"),
        "alpha": files.settings.get("lora_alpha"),
        "parameters": sum(sizes.values()),
        "dtypes": dict(sizes),
        "predictors": [part.rstrip(".") for part in PREDICTORS if any(part in key for key in held)],
    }


def _sizes(infos: Iterable[TensorInfo]) -> Counter:
    """Number of parameters of each dtype."""
    sizes = Counter()
    for info in infos:
        sizes[str(info.dtype).removeprefix("torch.")] += torch.Size(info.shape).numel()
    return sizes


def facts_table(name: str, facts: dict[str, Any]) -> Table:
    """The facts as a rich table."""
    table = Table(title=name, show_header=False, title_style="bold")
    for key, value in facts.items():
        if key == "new":
            names = sorted({item.split(".")[2] for item in value})
            value = f"{len(value)} weights: {', '.join(names)}" if value else "nothing"
        elif isinstance(value, dict):
            value = "\n".join(f"{name}: {item}" for name, item in value.items())
        elif isinstance(value, list):
            value = "\n".join(value)
        elif isinstance(value, int):
            value = f"{value:,}"
        table.add_row(key.replace("_", " "), str(value))
    return table
