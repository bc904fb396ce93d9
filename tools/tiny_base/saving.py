"""Keeps results: of the stages, to go on from there; of the whole, in one step so that no reader sees half of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

logger = logging.getLogger(__name__)


def run_stage(
    path: Path, settings: object, module: nn.Module, train: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Trains a module, or loads what a run with the same settings left.

    Args:
        path: safetensors file that keeps the result.
        settings: all that the result depends on, JSON-able.
        module: what `train` changes in place.
        train: the stage; returns facts worth keeping.

    Returns:
        The facts, and the "seconds" that the stage took when it ran.
    """
    key = json.dumps(settings)
    if path.is_file():
        with safe_open(path, "pt") as stored:
            found = stored.metadata()
        if found["settings"] == key:
            logger.info("taken from %s, made with the same settings", path)
            module.load_state_dict(load_file(path))
            return json.loads(found["facts"])
    started = time.perf_counter()
    facts = train()
    facts["seconds"] = time.perf_counter() - started
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    save_file(module.state_dict(), part, {"settings": key, "facts": json.dumps(facts)})
    os.replace(part, path)
    return facts


def save_asset(output: str | Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor, card: str) -> None:
    """Writes model, tokenizer, processor and model card beside `output`, then takes its place."""
    output = Path(output)
    fresh, old = output.with_name(f".{output.name}.new"), output.with_name(f".{output.name}.old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    fresh.mkdir(parents=True)
    model.save_pretrained(fresh)
    processor.save_pretrained(fresh)
    (fresh / "README.md").write_text(card)
    if output.exists():
        output.rename(old)
    fresh.rename(output)
    shutil.rmtree(old, ignore_errors=True)
