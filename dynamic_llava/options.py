"""What one call drops: the configuration with the call's own arguments on top."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypedDict

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from .rules import LEARNED, LEARNED_OUTPUT, ImageRule, OutputRule, find_image_rule, find_output_rule
from .sparsity_config import KINDS, SparsityConfig, check_image_selection, check_keep_rate

logger = logging.get_logger(__name__)

# Logits over less than this are infinite.
LEAST_TAU = 1e-6


class CallArguments(TypedDict, total=False):
    """What `forward` takes beside the arguments of stock LLaVA, and `generate` too but for the last two.

    Attributes:
        image_keep_rate: fraction of image tokens kept in this call, in (0, 1]; else the configuration's. In training
            the rate of the budget, as `output_keep_rate` is.
        image_selection: `topk` or `threshold` in this call.
        image_selector, output_selector: `predictor`, the name of another rule such as `random`, `my_module:MyRule`, or
            the rule itself (`rules`).
        output_sparsity: False keeps all output tokens in this call.
        output_keep_rate: drive each row's kept fraction of output tokens to this value, in (0, 1], by an online
            threshold on the keep probability (`functional.steered_keep_mask`); else the decisions are as learned.
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


@dataclass(frozen=True)
class KindOptions:
    """How tokens of one kind are judged: the rate at which they are kept, and in training how many a row must have."""

    keep_rate: float
    min_length: int = 0


@dataclass
class SparsityOptions:
    """What one call drops.

    Attributes:
        kinds: the kinds of tokens that are judged, by name.
        image_rule, output_rule: who judges them in inference.
        drive_output: whether output tokens are driven to their rate.
        training, gumbel_tau, elastic: whether and how masks are drawn.
    """

    kinds: dict[str, KindOptions]
    image_rule: ImageRule
    output_rule: OutputRule
    drive_output: bool
    training: bool
    gumbel_tau: float
    elastic: bool

    @classmethod
    def resolve(
        cls, sparsity: SparsityConfig, *, training: bool, call: Mapping[str, Any] | None = None
    ) -> SparsityOptions:
        """Check a call's `CallArguments` and fill the rest from `sparsity`.

        Raises:
            ValueError: a rate outside (0, 1], a temperature below `LEAST_TAU`, an unknown selection or selector, an
                argument that could have no effect: of a predictor that is off, of inference in training or the reverse.
        """
        call = dict(call or {})
        _check_values(call)
        selector, selection = call.get("image_selector", LEARNED), call.get("image_selection")
        output_selector, output_rate = call.get("output_selector", LEARNED), call.get("output_keep_rate")
        image_rule = find_image_rule(selector, sparsity.image_selection if selection is None else selection)
        output_rule = find_output_rule(output_selector)
        kinds = {}
        # Another rule needs no predictor.
        if sparsity.image_predictor or not _is_learned(selector):
            kinds["image"] = KindOptions(float(call.get("image_keep_rate", sparsity.image_keep_rate)))
        if _output_sparsity(sparsity, call.get("output_sparsity"), output_selector):
            rate = sparsity.output_keep_rate if output_rate is None else float(output_rate)
            kinds["output"] = KindOptions(rate, sparsity.min_output_length)
        if sparsity.instruct_predictor:
            kinds["instruct"] = KindOptions(sparsity.instruct_keep_rate, sparsity.min_instruct_length)
        options = cls(
            kinds={name: kinds[name] for name in KINDS if name in kinds},
            image_rule=image_rule,
            output_rule=output_rule,
            drive_output=output_rate is not None,
            training=training,
            gumbel_tau=float(call.get("gumbel_tau", 1.0)),
            elastic=call.get("elastic", False),
        )
        options._refuse_what_has_no_effect(call)
        if sparsity.untrained and not training:
            options._say_untrained(sparsity.untrained, call)
        return options

    @classmethod
    def of_call(
        cls, sparsity: SparsityConfig, kwargs: Mapping[str, Any], training: bool
    ) -> tuple[SparsityOptions, dict[str, Any]]:
        """The options of a call, and its keywords that are not `CallArguments`; errors as `resolve`."""
        rest = {name: value for name, value in kwargs.items() if name not in CALL_ARGUMENTS}
        return cls.resolve(sparsity, training=training, call=given_arguments(kwargs)), rest

    def rule(self, kind: str) -> Any:
        """Who judges the tokens of a kind: an `ImageRule` for images, an `OutputRule` for what is judged one by one."""
        return {"image": self.image_rule, "output": self.output_rule}.get(kind, LEARNED_OUTPUT)

    def rate(self, kind: str) -> float:
        """The rate at which tokens of a kind are kept, 1 where they are not judged."""
        return self.kinds[kind].keep_rate if kind in self.kinds else 1.0

    @property
    def keeps_all_images(self) -> bool:
        """Whether no image token can be dropped."""
        return self.rate("image") == 1 and not ("image" in self.kinds and _ignores_rate(self.image_rule))

    def _say_untrained(self, untrained: list[str], call: Mapping[str, Any]) -> None:
        """`ValueError` where a call asks for a predictor that has learned nothing, a warning where it uses one."""
        used = {
            "image_predictor": "keep_logits" in self.image_rule.needs and not self.keeps_all_images,
            "output_predictor": "keep_logits" in self.output_rule.needs
            and "output" in self.kinds
            and not (self.drive_output and self.rate("output") == 1),
            "instruct_predictor": "instruct" in self.kinds,
        }
        if call.get("output_sparsity") and used["output_predictor"] and "output_predictor" in untrained:
            raise ValueError("output_sparsity=True: the output_predictor has never been trained. Train it first.")
        names = [name for name in untrained if used[name]]
        # A message would break a compiled graph.
        if names and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{' and '.join(names)}: never trained, so that what is dropped is arbitrary. Train them "
                "(dynamic-llava train), or pass image_keep_rate=1.0 and output_sparsity=False."
            )

    def _refuse_what_has_no_effect(self, call: Mapping[str, Any]) -> None:
        rate, selection = call.get("image_keep_rate"), call.get("image_selection")
        selectors = [name for name in ("image_selector", "output_selector") if not _is_learned(call.get(name, LEARNED))]
        if "image" not in self.kinds and (selection is not None or rate not in (None, 1)):
            raise ValueError(
                f"image_keep_rate={rate}, image_selection={selection!r}: this model drops no image tokens "
                "(image_predictor is off). Leave them out, or name an image_selector that needs no predictor."
            )
        if not self.training and selection is not None and "image_selector" in selectors:
            raise ValueError(
                f"image_selection={selection!r} says how the predictor chooses, image_selector is "
                f"{call['image_selector']!r}; leave one of them out."
            )
        if not self.training and rate is not None and _ignores_rate(self.image_rule):
            raise ValueError(
                f"image_keep_rate={rate}: image_selection='threshold' keeps what is more likely kept. Leave the rate "
                "out, or pass image_selection='topk'."
            )
        if "output" not in self.kinds and self.drive_output and call["output_keep_rate"] < 1:
            raise ValueError(
                f"output_keep_rate={call['output_keep_rate']}: this call drops no output tokens (output_predictor is "
                "off, or output_sparsity=False). Leave it out."
            )
        if "output" not in self.kinds and "output_selector" in selectors:
            raise ValueError(
                f"output_selector={call['output_selector']!r} beside output_sparsity=False: leave one out."
            )
        if self.training:
            for name in [*selectors, *(["image_selection"] if selection is not None else [])]:
                raise ValueError(f"{name}={call[name]!r} is for inference; training draws its masks. Leave it out.")
        elif self.elastic:
            raise ValueError("elastic=True is for training; pass image_keep_rate or output_keep_rate alone.")


def _check_values(call: Mapping[str, Any]) -> None:
    for name in ("image_keep_rate", "output_keep_rate"):
        if name in call:
            check_keep_rate(name, call[name])
    if "image_selection" in call:
        check_image_selection(call["image_selection"])
    tau, elastic = call.get("gumbel_tau", 1.0), call.get("elastic", False)
    real = isinstance(tau, Real) and not isinstance(tau, bool)
    if not real or not LEAST_TAU <= tau <= sys.float_info.max:
        raise ValueError(f"gumbel_tau must be a finite number of at least {LEAST_TAU:g}, got {tau!r}.")
    if not isinstance(elastic, bool):
        raise ValueError(f"elastic is True or False, got {elastic!r}.")


def _is_learned(selector: Any) -> bool:
    return isinstance(selector, str) and selector == LEARNED


def _ignores_rate(rule: ImageRule) -> bool:
    return getattr(rule, "ignores_rate", False)


def _output_sparsity(sparsity: SparsityConfig, asked: bool | None, selector: Any) -> bool:
    """Whether a call drops output tokens; `ValueError` where it asks for what is off, or in a word."""
    available = sparsity.output_predictor or not _is_learned(selector)
    if asked is None:
        return available
    if not isinstance(asked, bool):
        raise ValueError(f"output_sparsity is True, False or None, got {asked!r}.")
    if asked and not available:
        raise ValueError("output_sparsity=True: the output_predictor of this model is off. Leave it out.")
    return asked
