"""`python -m dynamic_llava.checkpoints inspect SRC`: what a checkpoint is, what is missing, what would be new."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .convert import open_checkpoint
from .source import ADAPTER_CONFIG, find_folder, is_adapter, read_json


def inspect_checkpoint(name: str | Path, vision_tower: str | Path | None = None) -> dict[str, Any]:
    """Facts of a checkpoint, from its configuration and the headers of its files.

    Returns:
        `layout`, `files`, `parameters`, `dtypes`, `decoder`, `vision_tower`, `projector_layers`, `image_token`,
        `sparsity`, `new` (weights that loading would initialise); for a LoRA folder `layout` and `base`.

    Raises:
        ValueError, FileNotFoundError: as `load_published`, with what is missing or wrong.
    """
    folder = find_folder(name)
    if is_adapter(folder):
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        return {"layout": "LoRA (peft)", "base": base}
    checkpoint = open_checkpoint(name, vision_tower)
    config, source = checkpoint.config, checkpoint.source
    text, vision = config.text_config, config.vision_config
    sizes = Counter()
    for info in map(checkpoint.info, checkpoint.stored):
        sizes[str(info.dtype).removeprefix("torch.")] += torch.Size(info.shape).numel()
    predictors = any("_predictor." in key for key in checkpoint.stored)
    kind = "published" if checkpoint.published else "Hugging Face"
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
