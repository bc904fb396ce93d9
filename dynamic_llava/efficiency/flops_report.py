"""`dynamic-llava efficiency flops`: the counts of one setting, as JSON or as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..efficiency import flops
from ..sparsity_config import check_keep_rate
from .delivery import deliver
from .options import Delivery, FlopsOptions, ShapeOptions
from .shapes import config_from_options

DEFAULT_SHAPE = "7b"


def run(options: FlopsOptions, shape: ShapeOptions, delivery: Delivery) -> None:
    """Count, print and write."""
    report = count(config_from_options(shape, DEFAULT_SHAPE), **vars(options))
    deliver("flops", report, [table(report)], delivery, options, shape)


def count(
    config: DynamicLlavaConfig,
    prompt: int = 64,
    images: int = 1,
    output_length: int = 1000,
    image_keep_rate: float | None = None,
    output_keep_rate: float | None = None,
    dtype_bytes: int = 2,
) -> dict[str, Any]:
    """All counts of one setting, dense and sparsified, one row of a batch.

    Args:
        config: shape, and the rates where None is passed.
        prompt: text tokens of the prompt.
        images: images of the prompt.
        output_length: tokens written, at least 1.
        image_keep_rate: fraction of image tokens kept, in (0, 1].
        output_keep_rate: fraction of output tokens kept, in (0, 1].
        dtype_bytes: bytes of one number of the KV cache.

    Returns:
        `settings`; `paper` and `exact` with `{"dense", "ours", "ratio"}` for each count, in FLOPs; `kv_bytes` likewise;
        `predictor_share` of our prefill and of our decode step.

    Raises:
        ValueError: a rate outside (0, 1], a negative number of tokens.
    """
    for name, value, least in (("prompt", prompt, 0), ("images", images, 0), ("output_length", output_length, 1)):
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
    image_rate, output_rate = (
        check_keep_rate(name, getattr(config.sparsity, name) if rate is None else rate)
        for name, rate in (("image_keep_rate", image_keep_rate), ("output_keep_rate", output_keep_rate))
    )
    image_tokens = images * flops.image_tokens_per_image(config)
    settings = {
        "hidden_size": config.text_config.hidden_size,
        "num_hidden_layers": config.text_config.num_hidden_layers,
        "sparse_layer": config.sparsity.sparse_layer,
        "text_tokens": prompt,
        "image_tokens": image_tokens,
        "image_tokens_kept": flops.kept_image_tokens(image_tokens, image_rate) if images else 0,
        "output_length": output_length,
        "image_keep_rate": image_rate,
        "output_keep_rate": output_rate,
        "dtype_bytes": dtype_bytes,
    }
    exact, share = _exact(config, prompt, images, output_length, image_rate, output_rate)
    dense_end = prompt + image_tokens + output_length
    sparse_end = prompt + settings["image_tokens_kept"] + round(output_length * output_rate)
    return {
        "settings": settings,
        "paper": _paper(config, image_tokens, settings["image_tokens_kept"], output_length, output_rate),
        "exact": exact,
        "kv_bytes": _compare(
            flops.kv_cache_bytes(config, dense_end, dtype_bytes=dtype_bytes),
            flops.kv_cache_bytes(config, dense_end, sparse_end, dtype_bytes),
        ),
        "predictor_share": share,
    }


def _compare(dense: int, ours: int) -> dict[str, float]:
    return {"dense": dense, "ours": ours, "ratio": ours / dense if dense else 1.0}


def _paper(config: DynamicLlavaConfig, images: int, kept: int, output_length: int, output_rate: float) -> dict:
    text, start = config.text_config, config.sparsity.sparse_layer

    def compare(tokens: int, kept: int) -> dict[str, float]:
        shape = (text.hidden_size, text.num_hidden_layers)
        return _compare(
            flops.paper_flops(*shape, tokens, tokens, start), flops.paper_flops(*shape, tokens, kept, start)
        )

    return {
        "prefill_image_tokens": compare(images, kept),
        "last_step_output_tokens_no_cache": compare(output_length, round(output_length * output_rate)),
    }


def _exact(
    config: DynamicLlavaConfig, prompt: int, images: int, length: int, image_rate: float, output_rate: float
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Counts of everything that runs, and the predictors' share of ours."""
    dense, sparse = flops.context_lengths(config, prompt, image_rate, images)
    # The last step reads the last token but one written; those in front of it are stored.
    written = length - 1
    stored = sparse + round(max(0, written - 1) * output_rate)
    rates = (image_rate, output_rate)
    prefill = flops.prefill_flops(config, prompt, image_rate, images)
    step = flops.decode_step_flops(config, dense + max(0, written - 1), stored)
    counts = {
        "prefill": _compare(flops.prefill_flops(config, prompt, None, images), prefill),
        "last_step_with_cache": _compare(flops.decode_step_flops(config, dense + max(0, written - 1)), step),
        "last_step_no_cache": _compare(
            flops.decode_step_flops_no_cache(config, prompt, written, num_images=images),
            flops.decode_step_flops_no_cache(config, prompt, written, *rates, num_images=images),
        ),
    }
    for name, cached in (("generation_with_cache", True), ("generation_no_cache", False)):
        counts[name] = _compare(
            flops.generation_flops(config, prompt, length, use_cache=cached, num_images=images),
            flops.generation_flops(config, prompt, length, *rates, use_cache=cached, num_images=images),
        )
    judged = images * flops.image_tokens_per_image(config) if image_rate < 1 else 0
    share = {
        "prefill": flops.predictor_flops(config, image_tokens=judged) / prefill,
        "step_with_cache": flops.predictor_flops(config, output_tokens=1) / step,
    }
    return counts, share


LABELS = {
    "prefill_image_tokens": "prefill, image tokens",
    "last_step_output_tokens_no_cache": "last step without cache, output tokens",
    "prefill": "prefill",
    "last_step_with_cache": "last step with cache",
    "last_step_no_cache": "last step without cache",
    "generation_with_cache": "whole generation with cache",
    "generation_no_cache": "whole generation without cache",
}


def table(report: dict[str, Any]) -> Table:
    """The report of `count` for the screen."""
    settings = report["settings"]
    title = (
        f"{settings['num_hidden_layers']} layers x {settings['hidden_size']}, "
        f"{settings['image_tokens']} image + {settings['text_tokens']} text tokens, "
        f"{settings['output_length']} written; kept: image {settings['image_keep_rate']:g}, "
        f"output {settings['output_keep_rate']:g}"
    )
    share = report["predictor_share"]
    caption = f"predictors: {share['prefill']:.2%} of our prefill, {share['step_with_cache']:.2%} of our decode step"
    result = Table("", "dense", "ours", "ours / dense", title=title, caption=caption)
    for column in result.columns[1:]:
        column.justify = "right"
    for section, heading in (("paper", "TFLOPs, the paper's formula"), ("exact", "TFLOPs, everything that runs")):
        result.add_section()
        result.add_row(f"[bold]{heading}")
        for name, values in report[section].items():
            result.add_row(LABELS[name], *(f"{values[k] / 1e12:.4g}" for k in ("dense", "ours")), _ratio(values))
    result.add_section()
    kv = report["kv_bytes"]
    result.add_row("[bold]KV cache at the end, MB", *(f"{kv[k] / 1e6:.4g}" for k in ("dense", "ours")), _ratio(kv))
    return result


def _ratio(values: dict[str, float]) -> str:
    return f"{values['ratio']:.3f}"
