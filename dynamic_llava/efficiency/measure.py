"""`dynamic-llava efficiency measure`: time and memory of stock LLaVA and ours on the same random weights."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..config import command_line
from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..machine import checked_device, machine_facts
from .delivery import deliver
from .measure_report import tables
from .model_pair import build_pair
from .options import Delivery, MeasureOptions, ShapeOptions
from .peak import measure_peak
from .plot import plot_report
from .shapes import config_from_options
from .timed_modes import measure_decode, measure_no_cache, measure_prefill

DEFAULT_SHAPE = "small"


def run(options: MeasureOptions, shape: ShapeOptions, delivery: Delivery) -> None:
    """Measure, print and write, with a picture where there is matplotlib."""
    checked_device(options.device)
    report = measure(config_from_options(shape, DEFAULT_SHAPE), options)
    deliver("measure", report, tables(report), delivery, options, shape)
    if delivery.output is not None:
        picture = plot_report(report, Path(delivery.output) / "measure.png")
        if picture is not None:
            print(f"wrote {picture}", file=sys.stderr)


def measure(config: DynamicLlavaConfig, options: MeasureOptions) -> dict[str, Any]:
    """All modes of `options` on random weights of the shape `config`.

    Returns:
        `machine`, `command`, `options`, `model`, and one list of cases for each mode asked for; times in seconds with
        median and interquartile range, memory in bytes, ratios ours / dense.

    Raises:
        ValueError: a rate outside (0, 1].
    """
    sparsity = dataclasses.replace(
        config.sparsity,
        **{
            name: getattr(options, name)
            for name in ("image_keep_rate", "output_keep_rate")
            if getattr(options, name) is not None
        },
    )
    config.sparsity = sparsity
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    report: dict[str, Any] = {
        "machine": machine_facts(torch.device(options.device)),
        "command": command_line(),
        "options": dataclasses.asdict(options),
    }
    # In front of the models of this process, so that a GPU never holds both.
    if "peak" in options.modes:
        report["peak"] = _peaks(config, options)
    pair = build_pair(config, getattr(torch, options.dtype), torch.device(options.device), options.attention)
    report["model"] = {
        "parameters": sum(p.numel() for p in pair.dense.parameters()),
        "predictor_parameters": sum(p.numel() for p in pair.ours.parameters())
        - sum(p.numel() for p in pair.dense.parameters()),
        "text_config": {k: v for k, v in config.text_config.to_dict().items() if isinstance(v, int)},
        "sparsity": dataclasses.asdict(sparsity),
    }
    report.update(_timed(pair, options))
    report["seconds"] = round(time.perf_counter() - started, 1)
    return report


def _timed(pair, options: MeasureOptions) -> dict[str, list[dict[str, Any]]]:
    """Cases of the timed modes."""
    prompt, full = options.prompt_lengths[0], options.full_batch_sizes
    plan = {
        "prefill": (measure_prefill, [(b, p) for b in full for p in options.prompt_lengths]),
        "decode": (measure_decode, [(b, prompt) for b in options.batch_sizes]),
        "no_cache": (measure_no_cache, [(b, prompt, n) for b in full for n in options.no_cache_lengths]),
    }
    results: dict[str, list[dict[str, Any]]] = {}
    for mode in (mode for mode in plan if mode in options.modes):
        case, arguments = plan[mode]
        results[mode] = []
        for values in tqdm(arguments, desc=mode, leave=False, disable=None):
            results[mode].extend(case(pair, options, *values))
    return results


def _peaks(config: DynamicLlavaConfig, options: MeasureOptions) -> list[dict[str, Any]]:
    """Peak memory of both models at each batch size, each in its own process."""
    cases = []
    for batch in tqdm(options.full_batch_sizes, desc="peak", leave=False, disable=None):
        sides = {
            side: measure_peak(
                config,
                side == "ours",
                text_tokens=options.prompt_lengths[0],
                batch=batch,
                output_lengths=list(options.output_lengths),
                dtype=options.dtype,
                device=options.device,
                attention=options.attention,
                threads=torch.get_num_threads(),
            )
            for side in ("dense", "ours")
        }
        cases.append({"batch": batch, "text_tokens": options.prompt_lengths[0], **sides})
    return cases
