"""The three timed modes: prefill, decode steps with a cache, generation without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..efficiency import flops
from .filled_cache import Context
from .model_pair import Pair, prompt_inputs, random_tokens
from .options import MeasureOptions
from .timing import time_pairs


def measure_prefill(pair: Pair, options: MeasureOptions, batch: int, text_tokens: int) -> Iterator[dict[str, Any]]:
    """Time to first token: one call with image and prompt, ending in the choice of a token.

    `share_of_promise` is the speed-up over what the FLOPs promise: `(t_dense / t_ours) / (F_dense / F_ours)`.
    """
    inputs = prompt_inputs(pair.config, text_tokens, batch, pair.device, pair.dense.dtype)

    def first_token(model):
        def call() -> None:
            with torch.no_grad():
                model(**inputs, use_cache=True, logits_to_keep=1).logits.argmax(dim=-1)

        return call

    counted = _whole_sequences(pair, options)
    # A case of its own here, where one without a cache has three timings to share its seconds.
    counted["seconds"] *= 3
    times = time_pairs(first_token(pair.dense), first_token(pair.ours), **counted)
    rate = pair.config.sparsity.image_keep_rate
    counts = [flops.prefill_flops(pair.config, text_tokens, r, batch=batch) for r in (None, rate)]
    time = times.summary()
    yield {
        "batch": batch,
        "text_tokens": text_tokens,
        "image_tokens": flops.image_tokens_per_image(pair.config),
        "time": time,
        "flops": {"dense": counts[0], "ours": counts[1], "ratio": counts[1] / counts[0]},
        "share_of_promise": counts[1] / counts[0] / time["ratio"]["median"],
    }


def measure_decode(pair: Pair, options: MeasureOptions, batch: int, text_tokens: int) -> Iterator[dict[str, Any]]:
    """Time per output token at each output length, and the KV memory held there.

    The timed steps are among the last ones up to the length; see `filled_cache` for how the caches come there.
    """
    dense, ours = (Context(model, text_tokens, batch) for model in (pair.dense, pair.ours))
    for length in options.output_lengths:
        start = max(dense.written, length - options.warmup - options.steps)
        dense.fill_to(start)
        ours.fill_to(start)
        kept = int(ours.output_kept().sum())
        pairs = length - start
        warmup = min(options.warmup, pairs - 1)
        times = time_pairs(
            dense.step,
            ours.step,
            pairs=pairs - warmup,
            warmup=warmup,
            seconds=options.case_seconds,
            device=pair.device,
        )
        realised = (int(ours.output_kept().sum()) - kept) / (batch * (ours.written - start))
        dense.fill_to(length)
        ours.fill_to(length)
        time = times.summary()
        bytes_held = {"dense": dense.kv_bytes(), "ours": ours.kv_bytes()}
        yield {
            "batch": batch,
            "text_tokens": text_tokens,
            "output_length": length,
            "time": time,
            "tokens_per_s": {side: batch / time[f"{side}_s"]["median"] for side in ("dense", "ours")},
            "kv_bytes": {**bytes_held, "ratio": bytes_held["ours"] / bytes_held["dense"]},
            "image_tokens_kept": ours.prompt_kept - text_tokens,
            "realised_output_keep_rate": realised,
        }


def measure_no_cache(
    pair: Pair, options: MeasureOptions, batch: int, text_tokens: int, length: int
) -> Iterator[dict[str, Any]]:
    """Time of a generation of `length` tokens that reads the whole sequence, image included, for each of them.

    The tower runs once, as in `generate`. The cost of a step grows almost linearly with its position, so that the total
    is taken as the tower's time and `length` times the mean of the first and the last step; all three are measured.
    """
    prompt = prompt_inputs(pair.config, text_tokens, batch, pair.device, pair.dense.dtype)
    pixels, prompt_ids = prompt["pixel_values"], prompt["input_ids"]
    encoded = {"image": _encode(pair.dense, pixels)}

    def tower(model) -> Callable[[], object]:
        return lambda: _encode(model, pixels)

    def step(model, written: int) -> Callable[[], None]:
        output = random_tokens(pair.config, batch, written, pair.device)
        inputs = {"input_ids": torch.cat([prompt_ids, output], dim=1), "mm_encoder_outputs": encoded}
        if written and model is pair.ours:
            inputs["num_generated"] = written

        def call() -> None:
            with torch.no_grad():
                model(**inputs, use_cache=False, logits_to_keep=1)

        return call

    counted = _whole_sequences(pair, options)
    parts = {
        "tower": time_pairs(tower(pair.dense), tower(pair.ours), **counted).summary(),
        "first_step": time_pairs(step(pair.dense, 0), step(pair.ours, 0), **counted).summary(),
        "last_step": time_pairs(step(pair.dense, length - 1), step(pair.ours, length - 1), **counted).summary(),
    }
    totals = {}
    for side in ("dense", "ours"):
        once, first, last = (parts[name][f"{side}_s"]["median"] for name in ("tower", "first_step", "last_step"))
        totals[side] = once + length * (first + last) / 2
    rates = (pair.config.sparsity.image_keep_rate, pair.config.sparsity.output_keep_rate)
    counts = [
        flops.generation_flops(pair.config, text_tokens, length, *r, use_cache=False, batch=batch)
        for r in ((None, None), rates)
    ]
    yield {
        "batch": batch,
        "text_tokens": text_tokens,
        "output_length": length,
        **parts,
        "total_s": {**totals, "ratio": totals["ours"] / totals["dense"]},
        "flops": {"dense": counts[0], "ours": counts[1], "ratio": counts[1] / counts[0]},
    }


def _whole_sequences(pair: Pair, options: MeasureOptions) -> dict[str, Any]:
    """How `time_pairs` treats calls on a whole sequence: they are long, and one warms up enough."""
    warmup = min(1, options.warmup)
    return {"pairs": options.repeats, "warmup": warmup, "seconds": options.case_seconds, "device": pair.device}


def _encode(model, pixels: Tensor):
    with torch.no_grad():
        return model.model.get_image_features(pixel_values=pixels, return_dict=True)
