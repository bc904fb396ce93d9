"""What one call drops: the configuration with the call's own arguments on top."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from transformers.utils import logging

from .configuration_dynamic_llava import SparsityConfig, check_image_selection, check_keep_rate

logger = logging.get_logger(__name__)

# Rivals of the learned predictors, by name; the packages under `selection` add theirs.
#   image:  (hidden (B, N_image, D), valid (B, N_image) bool) -> scores (B, N_image), higher = keep
#   output: (hidden (..., D), keep_rate) -> keep mask (...) bool
IMAGE_SELECTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
OUTPUT_SELECTORS: dict[str, Callable[[Tensor, float], Tensor]] = {}
PREDICTOR = "predictor"
# Logits over less than this are infinite.
LEAST_TAU = 1e-6


@dataclass
class SparsityOptions:
    """What one call drops: the configuration with the call's own arguments on top."""

    image_keep_rate: float
    output_keep_rate: float
    steer_output: bool
    image_selection: str
    image_sparsity: bool
    output_sparsity: bool
    image_selector: str
    output_selector: str
    training: bool
    gumbel_tau: float
    elastic: bool
    min_output_length: int
    instruct_sparsity: bool
    instruct_keep_rate: float
    min_instruct_length: int

    @classmethod
    def resolve(
        cls,
        sparsity: SparsityConfig,
        *,
        training: bool,
        gumbel_tau: float = 1.0,
        elastic: bool = False,
        image_keep_rate: float | None = None,
        image_selection: str | None = None,
        image_selector: str = PREDICTOR,
        output_selector: str = PREDICTOR,
        output_sparsity: bool | None = None,
        output_keep_rate: float | None = None,
    ) -> SparsityOptions:
        """Check the call's arguments and fill the rest from `sparsity`.

        Raises:
            ValueError: a rate outside (0, 1], a temperature below `LEAST_TAU`, an unknown selection or selector, an
                argument that could have no effect: of a predictor that is off, of inference in training or the reverse.
        """
        for name, rate in (("image_keep_rate", image_keep_rate), ("output_keep_rate", output_keep_rate)):
            if rate is not None:
                check_keep_rate(name, rate)
        if image_selection is not None:
            check_image_selection(image_selection)
        for known, name in ((IMAGE_SELECTORS, image_selector), (OUTPUT_SELECTORS, output_selector)):
            if not isinstance(name, str) or (name != PREDICTOR and name not in known):
                raise ValueError(f"Unknown selector {name!r}; use one of {', '.join([PREDICTOR, *sorted(known)])}.")
        real = isinstance(gumbel_tau, Real) and not isinstance(gumbel_tau, bool)
        if not real or not LEAST_TAU <= gumbel_tau <= sys.float_info.max:
            raise ValueError(f"gumbel_tau must be a finite number of at least {LEAST_TAU:g}, got {gumbel_tau!r}.")
        if not isinstance(elastic, bool):
            raise ValueError(f"elastic is True or False, got {elastic!r}.")
        options = cls(
            image_keep_rate=sparsity.image_keep_rate if image_keep_rate is None else float(image_keep_rate),
            output_keep_rate=sparsity.output_keep_rate if output_keep_rate is None else float(output_keep_rate),
            steer_output=output_keep_rate is not None,
            image_selection=sparsity.image_selection if image_selection is None else image_selection,
            # A rival needs no predictor.
            image_sparsity=sparsity.image_predictor or image_selector != PREDICTOR,
            output_sparsity=_output_sparsity(sparsity, output_sparsity, output_selector),
            image_selector=image_selector,
            output_selector=output_selector,
            training=training,
            gumbel_tau=float(gumbel_tau),
            elastic=elastic,
            min_output_length=sparsity.min_output_length,
            instruct_sparsity=sparsity.instruct_predictor,
            instruct_keep_rate=sparsity.instruct_keep_rate,
            min_instruct_length=sparsity.min_instruct_length,
        )
        options._refuse_what_has_no_effect(image_keep_rate, image_selection)
        if sparsity.untrained and not training:
            options._say_untrained(sparsity.untrained, asked=bool(output_sparsity))
        return options

    def _say_untrained(self, untrained: list[str], asked: bool) -> None:
        """`ValueError` where a call asks for a predictor that has learned nothing, a warning where it uses one."""
        used = {
            "image_predictor": self.image_selector == PREDICTOR and not self.keeps_all_images,
            "output_predictor": self.output_selector == PREDICTOR
            and self.output_sparsity
            and not (self.steer_output and self.output_keep_rate == 1),
            "instruct_predictor": self.instruct_sparsity,
        }
        if asked and used["output_predictor"] and "output_predictor" in untrained:
            raise ValueError("output_sparsity=True: the output_predictor has never been trained. Train it first.")
        names = [name for name in untrained if used[name]]
        # A message would break a compiled graph.
        if names and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{' and '.join(names)}: never trained, so that what is dropped is arbitrary. Train them "
                "(python -m dynamic_llava.train), or pass image_keep_rate=1.0 and output_sparsity=False."
            )

    @property
    def keeps_all_images(self) -> bool:
        """Whether no image token can be dropped."""
        return not self.image_sparsity or (self.image_selection == "topk" and self.image_keep_rate == 1)

    def _refuse_what_has_no_effect(self, image_keep_rate: float | None, image_selection: str | None) -> None:
        if not self.image_sparsity and (image_selection is not None or image_keep_rate not in (None, 1)):
            raise ValueError(
                f"image_keep_rate={image_keep_rate}, image_selection={image_selection!r}: this model drops no image "
                "tokens (image_predictor is off). Leave them out, or name an image_selector that needs no predictor."
            )
        if self.image_selection == "threshold" and not self.training:
            if image_keep_rate is not None:
                raise ValueError(
                    f"image_keep_rate={image_keep_rate}: image_selection='threshold' keeps what is more likely kept. "
                    "Leave the rate out, or pass image_selection='topk'."
                )
            if image_selection is not None and self.image_selector != PREDICTOR:
                raise ValueError(
                    f"image_selection='threshold' needs the predictor, image_selector is {self.image_selector!r}; "
                    "leave one of them out."
                )
        if not self.output_sparsity and self.steer_output and self.output_keep_rate < 1:
            raise ValueError(
                f"output_keep_rate={self.output_keep_rate}: this call drops no output tokens (output_predictor is off, "
                "or output_sparsity=False). Leave it out."
            )
        if self.output_selector != PREDICTOR and not self.output_sparsity:
            raise ValueError(f"output_selector={self.output_selector!r} beside output_sparsity=False: leave one out.")
        if self.training:
            for name, value, default in (
                ("image_selector", self.image_selector, PREDICTOR),
                ("output_selector", self.output_selector, PREDICTOR),
                ("image_selection", image_selection, None),
            ):
                if value != default:
                    raise ValueError(f"{name}={value!r} is for inference; training draws its masks. Leave it out.")
        elif self.elastic:
            raise ValueError("elastic=True is for training; pass image_keep_rate or output_keep_rate alone.")


def _output_sparsity(sparsity: SparsityConfig, asked: bool | None, selector: str) -> bool:
    """Whether a call drops output tokens; `ValueError` where it asks for what is off, or in a word."""
    available = sparsity.output_predictor or selector != PREDICTOR
    if asked is None:
        return available
    if not isinstance(asked, bool):
        raise ValueError(f"output_sparsity is True, False or None, got {asked!r}.")
    if asked and not available:
        raise ValueError("output_sparsity=True: the output_predictor of this model is off. Leave it out.")
    return asked
