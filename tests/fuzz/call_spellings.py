"""The arguments of a call in other spellings, and wrong ones."""

from __future__ import annotations

from fractions import Fraction
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ..tiny import IMAGE_TOKEN
from .mutators import anything

RATES = ("image_keep_rate", "output_keep_rate")
# Arguments that stock LLaVA has not.
WORDS = ("image_selection", "image_selector", "output_selector", "output_rate_control")
OURS = (*RATES, *WORDS, "output_sparsity", "num_generated", "elastic")
OURS += ("gumbel_tau", "output_mask", "return_sparsity", "past_key_values")
STOCKS = ("use_cache", "logits_to_keep", "position_ids", "vision_feature_layer", "vision_feature_select_strategy")
GENERATES = ("max_new_tokens", "num_beams", "num_return_sequences", "temperature", "top_k", "eos_token_id", "top_p")
GENERATES += ("cache_implementation", "prefill_chunk_size", "max_length", "repetition_penalty", "guidance_scale")
# What a value means: the same call, one that must be refused, or one that must not crash.
SAME, WRONG, ANY = "same", "wrong", "any"


def shape(value: Any) -> Any:
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else value


def spell(rng: Random, kwargs: dict[str, Any]) -> tuple[str, str]:
    """Change one argument in place; its name and what that means."""
    name = rng.choice([*["input_ids", "attention_mask", "pixel_values"] * 4, *OURS * 2, *STOCKS, *GENERATES, "labels"])
    if name == "input_ids":
        kwargs[name], meaning = rng.choice(_ids(rng, kwargs[name]))
    elif name == "attention_mask":
        kwargs[name], meaning = rng.choice(_masks(rng, kwargs[name]))
    elif name == "pixel_values":
        kwargs[name], meaning = rng.choice(_pixels(rng, kwargs[name]))
    elif name == "labels":
        kwargs[name], meaning = rng.choice(_labels(rng, kwargs["input_ids"]))
    elif name in RATES:
        value, meaning = rng.choice(_rates(rng))
        kwargs[name] = value
    elif name == "past_key_values":
        kwargs[name], meaning = rng.choice(
            [(DynamicCache(), WRONG), ("x", WRONG), (7, WRONG), ([], ANY), (((), ()), WRONG)]
        )
    elif rng.random() < 0.1:
        name = rng.choice(["image_keep_rates", "keep_rate", "pixels", "Input_ids", "output_sparse", "x"])
        kwargs[name], meaning = anything(rng), ANY
        meaning = ANY if kwargs[name] is None else WRONG
    else:
        kwargs[name], meaning = odd(rng), ANY
        if name in WORDS and not _is_name(kwargs[name]):
            meaning = ANY if kwargs[name] is None else WRONG
        if name == "gumbel_tau" and not (type(kwargs[name]) in (int, float) and 1e-6 <= kwargs[name] < 2**1000):
            meaning = ANY if isinstance(kwargs[name], (np.number, type(None))) else WRONG
        if name in ("elastic", "output_sparsity") and not isinstance(kwargs[name], (bool, type(None))):
            meaning = WRONG
    return name, meaning


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value in ("topk", "threshold", "diverse", "predictor", "random", "steered")


def odd(rng: Random) -> Any:
    tensors = (torch.tensor(3), torch.zeros(0), torch.full((2, 3), -1), torch.tensor(float("nan")), torch.tensor(True))
    others = (np.float32(0.3), np.int64(2), object(), len, b"x", {1}, 2 + 1j, (1, 2), slice(1, 2), torch.float16)
    return rng.choice([anything(rng), anything(rng), rng.choice(tensors), rng.choice(others)])


def _ids(rng: Random, ids: torch.Tensor) -> list[tuple[Any, str]]:
    row, column = rng.randrange(ids.shape[0]), rng.randrange(ids.shape[1])

    def other(value: int) -> torch.Tensor:
        changed = ids.clone()
        changed[row, column] = value
        return changed

    return [
        (ids.int(), SAME),
        (ids.float(), ANY),
        (ids.bool(), ANY),
        (ids.tolist(), WRONG),
        (ids.numpy(), WRONG),
        (ids[0], ANY),
        (ids[None], ANY),
        (ids[:, :0], WRONG),
        (ids[:0], WRONG),
        (ids[:2], WRONG),
        (ids[:, 1:], WRONG),
        (other(-1), WRONG),
        (other(100), WRONG),
        (other(10**9), WRONG),
        (other(IMAGE_TOKEN), ANY),
        (ids.masked_fill(ids == IMAGE_TOKEN, 5), WRONG),
        (torch.full_like(ids, IMAGE_TOKEN), WRONG),
        (None, WRONG),
        ("hello", WRONG),
        (odd(rng), ANY),
    ]


def _masks(rng: Random, mask: torch.Tensor) -> list[tuple[Any, str]]:
    row, column = rng.randrange(mask.shape[0]), rng.randrange(mask.shape[1])

    def other(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        changed = mask.to(dtype)
        changed[row, column] = value
        return changed

    hole = mask.clone()
    hole[1, 7] = 0
    return [
        (mask.bool(), SAME),
        (mask.float(), SAME),
        (mask.int(), SAME),
        (mask.half(), SAME),
        (mask.to(torch.uint8), SAME),
        (other(2), WRONG),
        (other(-1), WRONG),
        (other(0.5), WRONG),
        (other(float("nan")), WRONG),
        (other(-1e9), WRONG),
        (other(7, torch.uint8), WRONG),
        (hole, ANY),
        (torch.zeros_like(mask), ANY),
        (mask[:, 1:], WRONG),
        (mask[:2], WRONG),
        (mask[0], WRONG),
        (mask[:, None, None, :], ANY),
        (torch.cat([mask, mask], dim=1), WRONG),
        (mask.tolist(), WRONG),
        (mask.numpy(), ANY),
        (mask.to(torch.complex64), ANY),
        (odd(rng), ANY),
    ]


def _pixels(rng: Random, pixels: torch.Tensor) -> list[tuple[Any, str]]:
    return [
        (pixels.double(), ANY),
        (pixels[:-1], WRONG),
        (torch.cat([pixels, pixels[:1]]), WRONG),
        (pixels[:, :1], WRONG),
        (pixels[..., :14], WRONG),
        (pixels[..., :0], WRONG),
        (pixels[:0], WRONG),
        (pixels[0], WRONG),
        (pixels[None], ANY),
        (pixels.byte(), ANY),
        (pixels.half(), ANY),
        (pixels.to(torch.complex64), ANY),
        (list(pixels), ANY),
        (pixels.numpy(), ANY),
        (pixels.tolist(), ANY),
        (None, WRONG),
        ("a.png", WRONG),
        (odd(rng), ANY),
    ]


def _labels(rng: Random, ids: torch.Tensor) -> list[tuple[Any, str]]:
    return [
        (ids.clone(), ANY),
        (torch.full_like(ids, -100), ANY),
        (torch.full_like(ids, -1), ANY),
        (torch.full_like(ids, 10**6), ANY),
        (ids[:, 1:], WRONG),
        (ids[0], WRONG),
        (ids.float(), ANY),
        (ids.int(), ANY),
        (ids.tolist(), WRONG),
        (odd(rng), ANY),
    ]


def _rates(rng: Random) -> list[tuple[Any, str]]:
    good = [0.5, 1, 1.0, np.float32(0.5), np.float64(0.25), Fraction(1, 2), np.int64(1)]
    wrong = [0, -0.1, 1.1, 2, float("nan"), float("inf"), True, False, "0.5", "x", [0.5], (0.5,), {}, 10**400, 0.5j]
    return [*[(value, SAME) for value in good], *[(value, WRONG) for value in wrong], (1e-300, ANY), (None, ANY)]
