"""`dynamic-llava efficiency score`: perplexity of an answer in one forward, and by cached decoding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..cache import SparseCache
from ..config import command_line
from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..machine import checked_device, machine_facts
from ..token_masks import IGNORE_INDEX
from .delivery import deliver
from .model_pair import build_pair, prompt_inputs, random_tokens
from .options import Delivery, ScoreOptions, ShapeOptions
from .shapes import config_from_options
from .timing import time_pairs

DEFAULT_SHAPE = "small"


def run(options: ScoreOptions, shape: ShapeOptions, delivery: Delivery) -> None:
    """Measure, print and write."""
    checked_device(options.device)
    report = measure_scoring(config_from_options(shape, DEFAULT_SHAPE), options)
    deliver("score", report, [score_table(report)], delivery, options, shape)


def measure_scoring(config: DynamicLlavaConfig, options: ScoreOptions) -> dict[str, Any]:
    """Time and perplexity of both ways in turns, of stock LLaVA and of ours, on the same random weights."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    pair = build_pair(config, getattr(torch, options.dtype), device, options.attention)
    prompt = prompt_inputs(config, options.text_tokens, 1, device, pair.dense.dtype)
    answer = random_tokens(config, 1, options.output_tokens, device)
    report: dict[str, Any] = {
        "machine": machine_facts(device),
        "command": command_line(),
        "options": vars(options),
        "parameters": sum(p.numel() for p in pair.dense.parameters()),
        "models": {},
    }
    for name, model in (("dense", pair.dense), ("ours", pair.ours)):
        found: dict[str, float] = {}
        decode = _decoder(model, prompt, answer, found)
        score = _scorer(model, prompt, answer, found)
        times = time_pairs(decode, score, pairs=options.repeats, warmup=1, seconds=math.inf, device=device)
        summary = times.summary()
        report["models"][name] = {
            "decoding_s": summary["dense_s"],
            "scoring_s": summary["ours_s"],
            "speed_up": 1 / summary["ratio"]["median"],
            "perplexity_decoding": found["decoding"],
            "perplexity_scoring": found["scoring"],
            "relative_difference": abs(found["scoring"] / found["decoding"] - 1),
        }
    return report


def _scorer(model, prompt: dict[str, Tensor], answer: Tensor, found: dict[str, float]) -> Callable[[], None]:
    labels = torch.cat([torch.full_like(prompt["input_ids"], IGNORE_INDEX), answer], dim=1)
    inputs = {**prompt, "input_ids": torch.cat([prompt["input_ids"], answer], dim=1), "labels": labels}
    if not hasattr(model.config, "sparsity"):
        # Only ours needs to know which tokens are judged.
        inputs.pop("labels")

    def score() -> None:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False, logits_to_keep=answer.shape[1] + 1).logits
        found["scoring"] = _perplexity(logits[0, :-1], answer[0])

    return score


def _decoder(model, prompt: dict[str, Tensor], answer: Tensor, found: dict[str, float]) -> Callable[[], None]:
    """Each token of the answer fed by itself, as `generate` would."""
    sparse = hasattr(model.config, "sparsity")

    def decode() -> None:
        with torch.no_grad():
            cache = SparseCache(model.config) if sparse else None
            output = model(**prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits, cache = [output.logits[0, -1]], output.past_key_values
            for token in answer[:, :-1].split(1, dim=1):
                logits.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1])
        found["decoding"] = _perplexity(torch.stack(logits), answer[0])

    return decode


def _perplexity(logits: Tensor, labels: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.double(), labels).exp())


def score_table(report: dict[str, Any]) -> Table:
    """The report as a rich table."""
    options, machine = report["options"], report["machine"]
    table = Table(title=f"Perplexity of {options['output_tokens']} tokens", title_style="bold")
    for column in ("model", "decoding s", "scoring s", "speed-up", "perplexity", "relative difference"):
        table.add_column(column, justify="right")
    for name, case in report["models"].items():
        table.add_row(
            name,
            f"{case['decoding_s']['median']:.2f}",
            f"{case['scoring_s']['median']:.2f}",
            f"{case['speed_up']:.1f}",
            f"{case['perplexity_scoring']:.6g}",
            f"{case['relative_difference']:.1e}",
        )
    where = f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    table.caption = f"{report['parameters'] / 1e6:.3g} M parameters, {options['dtype']}; {where}"
    return table
