"""What one call may say about what is dropped: the arguments of `forward` and `generate`, and their values."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any, TypedDict

from transformers import GenerationConfig

from .rules import ImageRule, OutputRule
from .sparsity_config import IMAGE_SELECTIONS, OUTPUT_RATE_CONTROLS, check_keep_rate, check_word

# Logits over less than this are infinite.
LEAST_TAU = 1e-6


class CallArguments(TypedDict, total=False):
    """What `forward` takes beside the arguments of stock LLaVA, and `generate` too but for the last two.

    Attributes:
        image_keep_rate: fraction of image tokens kept in this call, in (0, 1]; else the configuration's. In training
            the rate of the budget, as `output_keep_rate` is.
        image_selection: `topk`, `diverse` or `threshold` in this call.
        image_selector, output_selector: `predictor`, the name of another rule such as `random`, `my_module:MyRule`, or
            the rule itself (`rules`).
        output_sparsity: False keeps all output tokens in this call.
        output_keep_rate: keep this fraction of output tokens, in (0, 1]; else the decisions are as learned.
        output_rate_control: how: `offset` shifts the keep logits by what the configuration's table says, so that a
            decision needs its token alone and the fraction is met on the whole; `steered` drives each row's kept
            fraction to the rate, by an online threshold (`functional.steered_keep_mask`). By default the first where
            the table covers the rate.
        gumbel_tau: temperature of the draws in training.
        elastic: in training, shift the keep logits of each row to the keep rates of this call
            (`functional.match_keep_rate`), so that one checkpoint learns to serve many rates.
    """

    image_keep_rate: float | None
    image_selection: str | None
    image_selector: str | ImageRule
    output_selector: str | OutputRule
    output_sparsity: bool | None
    output_keep_rate: float | None
    output_rate_control: str | None
    gumbel_tau: float
    elastic: bool


CALL_ARGUMENTS = tuple(CallArguments.__annotations__)
TRAINING_ARGUMENTS = ("gumbel_tau", "elastic")
GENERATE_ARGUMENTS = tuple(name for name in CALL_ARGUMENTS if name not in TRAINING_ARGUMENTS)


def given_arguments(kwargs: Mapping[str, Any], names: Collection[str] = CALL_ARGUMENTS) -> dict[str, Any]:
    """Those of `kwargs` that are given and among `names`."""
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def configured_arguments(config: GenerationConfig) -> dict[str, Any]:
    """The `GENERATE_ARGUMENTS` that stand in a generation configuration, of a checkpoint, a server's request or a call.

    Raises:
        ValueError: one names code to import (`my_module:MyRule`): such a file or request may come from anyone.
    """
    given = given_arguments(vars(config), GENERATE_ARGUMENTS)
    for name, value in given.items():
        if name.endswith("_selector") and isinstance(value, str) and ":" in value:
            raise ValueError(
                f"{name}={value!r} in a generation configuration would import code; name a registered rule there, or "
                "pass this one to generate itself."
            )
    return given


def check_values(call: Mapping[str, Any]) -> None:
    """`ValueError` that names the first of a call's arguments whose value is none that it takes."""
    for name in ("image_keep_rate", "output_keep_rate"):
        if name in call:
            check_keep_rate(name, call[name])
    for name, allowed in (("image_selection", IMAGE_SELECTIONS), ("output_rate_control", OUTPUT_RATE_CONTROLS)):
        if name in call:
            check_word(name, call[name], allowed)
    tau, elastic = call.get("gumbel_tau", 1.0), call.get("elastic", False)
    real = isinstance(tau, Real) and not isinstance(tau, bool)
    if not real or not LEAST_TAU <= tau <= sys.float_info.max:
        raise ValueError(f"gumbel_tau must be a finite number of at least {LEAST_TAU:g}, got {tau!r}.")
    if not isinstance(elastic, bool):
        raise ValueError(f"elastic is True or False, got {elastic!r}.")
