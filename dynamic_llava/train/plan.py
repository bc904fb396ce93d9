"""`--dry-run`: what a stage would do, from its configuration alone; no weights are read."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..checkpoints.load import published_model_config
from ..checkpoints.source import find_folder, open_source, read_config_file
from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..data import ConversationDataset, MixtureDataset, open_dataset
from ..data.judged import JudgedCounts
from ..loading import PREDICTORS
from ..model_kinds import is_published
from ..modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from ..screen import console
from .config import StageConfig, is_fsdp
from .lora import add_adapters
from .preflight import refuse_unjudged
from .processor import stage_processor
from .schedules import gumbel_tau, keep_rate
from .trainer import freeze, parameter_groups

GB = 1e9
# AdamW holds two float32 numbers for each weight it trains, and a float32 copy where the weight itself is 16 bits.
ADAM_BYTES, MASTER_BYTES = 8, 4
# What a rank has on its host with these entries of a DeepSpeed file.
OFFLOADED = {"offload_optimizer": ("gradients", "optimizer"), "offload_param": ("weights",)}
QUANTIZED_BYTES = {"4bit": 0.5, "8bit": 1.0}


def plan(config: StageConfig, samples: int | None, ranks: int | None = None) -> dict[str, Any]:
    """Groups of parameters, memory by kind, steps and schedule of a stage.

    Args:
        samples: samples of an epoch, None where the data cannot be read.
        ranks: processes, one for each GPU; None takes those that run now.

    Returns:
        `groups` (name, parameters, learning rate), `memory_bytes` of a rank's GPU and `host_bytes` of its host (with
        offload) by kind, `steps`, `global_batch`, `micro_batches` of `batch`, `schedule`.

    Raises:
        ValueError: `global_batch_size` does not divide among `ranks`.
    """
    args = config.training
    model = meta_model(config)
    groups = parameter_groups(model, args)
    names = ["adapters" if config.model.lora_r else "decoder", "predictors"][-len(groups) :]
    ranks = ranks or args.world_size
    micro_batches = args.accumulation_steps(ranks)
    batch = args.per_device_train_batch_size * micro_batches * ranks
    device, host = memory(model, config, ranks)
    steps = args.max_steps
    if steps <= 0:
        steps = None if samples is None else math.ceil(math.ceil(samples / batch) * args.num_train_epochs)
    return {
        "ranks": ranks,
        "groups": [
            {"name": name, "parameters": sum(p.numel() for p in group["params"]), "learning_rate": group["lr"]}
            for name, group in zip(names, groups, strict=True)
        ],
        "frozen_parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "memory_bytes": device,
        "host_bytes": host,
        "samples": samples,
        "global_batch": batch,
        "micro_batches": micro_batches,
        "batch": args.per_device_train_batch_size,
        "steps": steps,
        "schedule": schedule(config),
    }


def meta_model(config: StageConfig) -> nn.Module:
    """The model of a stage without weights, with what it trains set."""
    # With ZeRO-3 weights would be shared out among ranks as they are made.
    unset_hf_deepspeed_config()
    folder = find_folder(config.model.base_model, weights=False)
    sparsity = vars(config.sparsity)
    if is_published(read_config_file(folder, config.model.base_model)):
        shape = published_model_config(open_source(config.model.base_model), None, config.sparsity)
    else:
        shape = DynamicLlavaConfig.from_pretrained(folder, sparsity=sparsity)
    with torch.device("meta"):
        model = DynamicLlavaForConditionalGeneration(shape)
        if config.model.lora_r:
            return add_adapters(model, config.model, gradient_checkpointing=False)
    freeze(model, train_projector=config.model.train_projector, train_decoder=config.model.train_decoder)
    return model


def memory(model: nn.Module, config: StageConfig, ranks: int) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of one of `ranks` by kind, on its device and, offloaded, on its host.

    They are counted, but activations: a rule of thumb for a batch of full length.
    """
    args = config.training
    sharding = (args.deepspeed or {}).get("zero_optimization") or {}
    # FSDP shares out what ZeRO-3 does.
    stage = 3 if is_fsdp() else sharding.get("stage", 0)
    width = config.model.weight_dtype(args).itemsize
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = total * width
    if config.model.quantize:
        weights = _quantized(model) * QUANTIZED_BYTES[config.model.quantize] + trained * width
        # peft holds what is frozen and not quantized, such as the embeddings, in float32.
        weights += (total - trained - _quantized(model)) * 4
    optimizer = trained * (ADAM_BYTES + (MASTER_BYTES if width < 4 else 0))
    sizes = {
        "weights": weights / (ranks if stage >= 3 else 1),
        "gradients": trained * width / (ranks if stage >= 2 else 1),
        "optimizer": optimizer / (ranks if stage >= 1 else 1),
        "activations": _activations(model, config),
    }
    moved = [kind for key, kinds in OFFLOADED.items() if _offloads(sharding, key) for kind in kinds]
    return (
        {kind: 0.0 if kind in moved else size for kind, size in sizes.items()},
        {kind: size if kind in moved else 0.0 for kind, size in sizes.items()},
    )


def _offloads(sharding: dict[str, Any], key: str) -> bool:
    return (sharding.get(key) or {}).get("device", "none") != "none"


def _quantized(model: nn.Module) -> int:
    """Weights that bitsandbytes quantizes: of frozen linear layers, but the head's and the predictors' copies."""
    return sum(
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and not layer.weight.requires_grad
        and not name.endswith("lm_head")
        and not any(predictor in f"{name}." for predictor in PREDICTORS)
    )


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
    out = console()
    out.print(command, style="bold", soft_wrap=True, highlight=False, markup=False)
    table = Table("trained", "parameters", "learning rate", title="Parameters")
    for group in found["groups"]:
        table.add_row(group["name"], f"{group['parameters']:,}", f"{group['learning_rate']:g}")
    table.add_row("frozen", f"{found['frozen_parameters']:,}", "")
    out.print(table)
    device, host = found["memory_bytes"], found["host_bytes"]
    table = Table("on each rank", "GB", "on the host", title=f"Memory, {found['ranks']} rank(s)")
    for name in device:
        row = f"{name}{' (about)' if name == 'activations' else ''}"
        table.add_row(row, f"{device[name] / GB:.2f}", f"{host[name] / GB:.2f}")
    table.add_row("sum", *(f"{sum(sizes.values()) / GB:.2f}" for sizes in (device, host)))
    out.print(table)
    samples = "unknown" if found["samples"] is None else f"{found['samples']:,}"
    steps = "unknown" if found["steps"] is None else f"{found['steps']:,}"
    out.print(
        f"samples {samples}, global batch {found['global_batch']} ({found['micro_batches']} times "
        f"{found['batch']} on each rank), optimizer steps {steps}",
        soft_wrap=True,
    )
    table = Table("done", "tau", "image keep rate", "output keep rate", title="Schedule")
    for row in found["schedule"]:
        rates = [str(row[name]) if isinstance(row[name], list) else f"{row[name]:.3f}" for name in _RATES]
        table.add_row(f"{row['progress']:.0%}", f"{row['gumbel_tau']:.3f}", *rates)
    out.print(table)


_RATES = ("image_keep_rate", "output_keep_rate")


def open_epoch(config: StageConfig) -> ConversationDataset | MixtureDataset | None:
    """The training data with its bad samples left out and no picture looked for; None where it is not there yet."""
    data = config.data
    try:
        return open_dataset(
            data.train_file,
            data.image_folder,
            stage_processor(config),
            seed=config.training.seed,
            max_length=data.max_length,
            require_image=data.require_image,
            output_turns=data.output_turns,
            on_bad_sample="skip",
            check_files=False,
        )
    except FileNotFoundError:
        return None


def print_judged(found: JudgedCounts, config: StageConfig) -> None:
    """What the predictors see in an epoch, and which of them would see nothing."""
    sparsity, out = config.sparsity, console()
    if sparsity.output_predictor:
        out.print(
            f"judged answers {found.judged:,} of {found.answers:,} (at least min_output_length="
            f"{sparsity.min_output_length} tokens, output_turns={config.data.output_turns})",
            soft_wrap=True,
        )
    if sparsity.image_predictor:
        out.print(f"samples with an image {found.image_rows:,}")
    refuse_unjudged(config, judged=found.judged > 0, pictured=found.image_rows > 0)
