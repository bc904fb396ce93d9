"""`dynamic-llava efficiency train`: a training step of stock LLaVA and of ours, masked and pruned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from ..config import command_line
from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..machine import checked_device, machine_facts
from ..token_masks import IGNORE_INDEX
from .delivery import deliver
from .measure_report import ratio_text
from .model_pair import Pair, build_pair, prompt_inputs, random_tokens
from .options import Delivery, ShapeOptions, StepOptions
from .shapes import config_from_options
from .timing import time_pairs

DEFAULT_SHAPE = "small"
# Ways to train that are measured, as keys of `SparsityConfig`.
MODES: dict[str, dict[str, Any]] = {
    "masked": {"sparse_training": "masked"},
    "pruned": {"sparse_training": "pruned"},
    "pruned without probes": {"sparse_training": "pruned", "pruned_probe_rate": 0.0},
}


def run(options: StepOptions, shape: ShapeOptions, delivery: Delivery) -> None:
    """Measure, print and write."""
    checked_device(options.device)
    report = measure_steps(config_from_options(shape, DEFAULT_SHAPE), options)
    deliver("train", report, [step_table(report)], delivery, options, shape)


def measure_steps(config: DynamicLlavaConfig, options: StepOptions) -> dict[str, Any]:
    """Forward and backward of each side on the same random weights, each mode of ours in turns with stock LLaVA.

    The tower and the projector are frozen on both sides, as in the stage. Times in seconds, memory in bytes that the
    forward saves for the backward (on a GPU also the peak), ratios ours / dense.
    """
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    pair = build_pair(config, getattr(torch, options.dtype), device, options.attention)
    keep_at_random(pair)
    inputs = training_inputs(pair, options)
    dense = _step(pair.dense, {name: value for name, value in inputs.items() if name != "gumbel_tau"}, options)
    report: dict[str, Any] = {
        "machine": machine_facts(device),
        "command": command_line(),
        "options": vars(options) | {"tokens": int(inputs["input_ids"].shape[1])},
        "parameters": sum(p.numel() for p in pair.dense.parameters()),
        "dense_saved_bytes": saved_bytes(dense, pair.dense),
        "modes": {},
    }
    for mode, keys in tqdm(MODES.items(), desc="steps", leave=False, disable=None):
        vars(pair.ours.model.language_model.sparsity).update(keys)
        ours = _step(pair.ours, inputs, options)
        saved = saved_bytes(ours, pair.ours)
        times = time_pairs(dense, ours, pairs=options.repeats, warmup=1, seconds=math.inf, device=device)
        report["modes"][mode] = {
            "time": times.summary(),
            "saved_bytes": saved,
            "saved_ratio": saved / report["dense_saved_bytes"],
            **_peaks(dense, ours, device),
        }
    return report


def keep_at_random(pair: Pair) -> None:
    """Trainable decoders, and predictors whose draws keep the configured rates whatever the token."""
    for model in (pair.dense, pair.ours):
        model.train().requires_grad_(True)
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(False)
    decoder, sparsity = pair.ours.model.language_model, pair.config.sparsity
    for predictor, rate in (
        (decoder.image_predictor, sparsity.image_keep_rate),
        (decoder.output_predictor, sparsity.output_keep_rate),
    ):
        head: nn.Linear = predictor.head[-1]
        with torch.no_grad():
            head.weight.mul_(1e-3)
            head.bias.copy_(torch.tensor([math.log(rate / (1 - rate)) if rate < 1 else 50.0, 0.0]))


def training_inputs(pair: Pair, options: StepOptions) -> dict[str, Any]:
    """An image, a prompt and an answer per row, labels on the answer."""
    inputs: dict[str, Any] = prompt_inputs(
        pair.config, options.text_tokens, options.batch, pair.device, pair.dense.dtype
    )
    answer = random_tokens(pair.config, options.batch, options.output_tokens, pair.device)
    prompt: Tensor = inputs["input_ids"]
    inputs["labels"] = torch.cat([torch.full_like(prompt, IGNORE_INDEX), answer], dim=1)
    inputs["input_ids"] = torch.cat([prompt, answer], dim=1)
    return {**inputs, "gumbel_tau": 1.0}


def _step(model, inputs: dict[str, Any], options: StepOptions) -> Callable[[], None]:
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs, use_cache=False).loss.backward()

    return step


def saved_bytes(step: Callable[[], None], model: nn.Module) -> int:
    """Bytes that a step's forward keeps for its backward, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(found.values())


def _peaks(dense: Callable[[], None], ours: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Peak bytes of a step on a GPU."""
    if device.type != "cuda":
        return {}
    peaks = []
    for step in (dense, ours):
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peaks.append(torch.cuda.max_memory_allocated(device))
    return {"peak_bytes": {"dense": peaks[0], "ours": peaks[1], "ratio": peaks[1] / peaks[0]}}


def step_table(report: dict[str, Any]) -> Table:
    """The report as a rich table."""
    options, machine = report["options"], report["machine"]
    table = Table(title="Training step, forward and backward", title_style="bold")
    for column in ("mode", "dense s", "ours s", "time ratio", "saved MB dense", "ours", "ratio"):
        table.add_column(column, justify="right")
    for mode, case in report["modes"].items():
        time: dict[str, Any] = case["time"]
        table.add_row(
            mode,
            f"{time['dense_s']['median']:.2f}",
            f"{time['ours_s']['median']:.2f}",
            ratio_text(time["ratio"]),
            f"{report['dense_saved_bytes'] / 1e6:.0f}",
            f"{case['saved_bytes'] / 1e6:.0f}",
            f"{case['saved_ratio']:.2f}",
        )
    where = f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    table.caption = (
        f"{report['parameters'] / 1e6:.3g} M parameters, {options['tokens']} tokens, batch {options['batch']}, "
        f"{options['dtype']}; {where}"
    )
    return table
