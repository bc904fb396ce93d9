"""`--dry-run`: what a stage would do, from its configuration alone; no weights are read."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..checkpoints.load import load_processor, published_model_config
from ..checkpoints.source import find_folder, open_source, read_json
from ..configuration_dynamic_llava import DynamicLlavaConfig, is_published
from ..data import open_dataset
from ..modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from .arguments import StageConfig, engine_of
from .lora import add_adapters
from .schedules import gumbel_tau, keep_rate
from .trainer import freeze, parameter_groups

GB = 1e9
# AdamW holds two float32 numbers for each weight it trains, and a float32 copy where the weight itself is 16 bits.
ADAM_BYTES, MASTER_BYTES = 8, 4


def plan(config: StageConfig, samples: int | None) -> dict[str, Any]:
    """Groups of parameters, memory by kind, steps and schedule of a stage.

    Args:
        samples: samples of an epoch, None where the data cannot be read.

    Returns:
        `groups` (name, parameters, learning rate), `memory_bytes` per rank, `steps`, `global_batch`, `schedule`.
    """
    args = config.training
    model = meta_model(config)
    groups = parameter_groups(model, args)
    names = ["adapters" if config.model.lora_r else "decoder", "predictors"][-len(groups) :]
    ranks = args.world_size
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    steps = args.max_steps
    if steps <= 0:
        steps = None if samples is None else math.ceil(samples / batch) * math.ceil(args.num_train_epochs)
    return {
        "ranks": ranks,
        "groups": [
            {"name": name, "parameters": sum(p.numel() for p in group["params"]), "learning_rate": group["lr"]}
            for name, group in zip(names, groups, strict=True)
        ],
        "frozen_parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "memory_bytes": memory(model, config),
        "samples": samples,
        "global_batch": batch,
        "steps": steps,
        "schedule": schedule(config),
    }


def meta_model(config: StageConfig) -> nn.Module:
    """The model of a stage without weights, with what it trains set."""
    folder = find_folder(config.model.base_model, weights=False)
    sparsity = vars(config.sparsity)
    if is_published(read_json(folder / "config.json")):
        shape = published_model_config(open_source(config.model.base_model), None, config.sparsity)
    else:
        shape = DynamicLlavaConfig.from_pretrained(folder, sparsity=sparsity)
    with torch.device("meta"):
        model = DynamicLlavaForConditionalGeneration(shape)
        if config.model.lora_r:
            return add_adapters(model, config.model, gradient_checkpointing=False)
    freeze(model, train_projector=config.model.train_projector, train_decoder=config.model.train_decoder)
    return model


def memory(model: nn.Module, config: StageConfig) -> dict[str, float]:
    """Bytes on one rank by kind. Activations are a rule of thumb, for a batch of full length; the rest is counted."""
    args = config.training
    engine = engine_of(args)
    stage = (engine or {}).get("zero_optimization", {}).get("stage", 0)
    width = config.model.weight_dtype(args).itemsize
    ranks = args.world_size
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    quantized = {"4bit": 0.5, "8bit": 1.0}.get(config.model.quantize)
    weights = total * width if quantized is None else (total - trained) * quantized + trained * width
    optimizer = trained * (ADAM_BYTES + (MASTER_BYTES if width < 4 else 0))
    return {
        "weights": weights / (ranks if stage >= 3 else 1),
        "gradients": trained * width / (ranks if stage >= 2 else 1),
        "optimizer": optimizer / (ranks if stage >= 1 else 1),
        "activations": _activations(model, config),
    }


def _activations(model: nn.Module, config: StageConfig) -> float:
    """About 34 numbers of the hidden size per token and layer; with checkpointing one per layer, and a whole layer."""
    args, text = config.training, model.config.text_config
    width = 2 if args.bf16 or args.fp16 else 4
    tokens = args.per_device_train_batch_size * config.data.max_length
    layers = text.num_hidden_layers
    per_token = (layers + 34) if args.gradient_checkpointing else 34 * layers
    return float(tokens * (per_token * text.hidden_size * width + text.vocab_size * 4))


def schedule(config: StageConfig) -> list[dict[str, float]]:
    """Temperature and keep rates at five moments of training."""
    args, sparsity = config.training, config.sparsity
    rows = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        row = {"progress": progress, "gumbel_tau": gumbel_tau(progress, args.gumbel_tau_start, args.gumbel_tau_end)}
        for name in ("image_keep_rate", "output_keep_rate"):
            rate = keep_rate(progress, getattr(sparsity, name), args.keep_rate_schedule, args.keep_rate_ramp)
            row[name] = getattr(args, f"{name}s") or rate
        rows.append(row)
    return rows


def print_plan(found: dict[str, Any], command: str) -> None:
    """The plan on the screen."""
    console = Console()
    console.print(f"[bold]{command}[/bold]")
    table = Table("trained", "parameters", "learning rate", title="Parameters")
    for group in found["groups"]:
        table.add_row(group["name"], f"{group['parameters']:,}", f"{group['learning_rate']:g}")
    table.add_row("frozen", f"{found['frozen_parameters']:,}", "")
    console.print(table)
    table = Table("on each rank", "GB", title=f"Memory, {found['ranks']} rank(s)")
    for name, size in found["memory_bytes"].items():
        table.add_row(f"{name}{' (about)' if name == 'activations' else ''}", f"{size / GB:.2f}")
    table.add_row("sum", f"{sum(found['memory_bytes'].values()) / GB:.2f}")
    console.print(table)
    samples = "unknown" if found["samples"] is None else f"{found['samples']:,}"
    steps = "unknown" if found["steps"] is None else f"{found['steps']:,}"
    console.print(f"samples {samples}, global batch {found['global_batch']}, optimizer steps {steps}")
    table = Table("done", "tau", "image keep rate", "output keep rate", title="Schedule")
    for row in found["schedule"]:
        rates = [str(row[name]) if isinstance(row[name], list) else f"{row[name]:.3f}" for name in _RATES]
        table.add_row(f"{row['progress']:.0%}", f"{row['gumbel_tau']:.3f}", *rates)
    console.print(table)


_RATES = ("image_keep_rate", "output_keep_rate")


def count_samples(config: StageConfig) -> int | None:
    """Samples of an epoch, None where the data is not there yet."""
    data = config.data
    try:
        processor = load_processor(config.model.base_model)
        return len(
            open_dataset(
                data.train_file,
                data.image_folder,
                processor,
                seed=config.training.seed,
                require_image=data.require_image,
                on_bad_sample="skip",
                check_files=False,
            )
        )
    except FileNotFoundError:
        return None
