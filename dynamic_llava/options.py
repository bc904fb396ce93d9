"""What one call drops: the configuration with the call's own arguments on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from .call_arguments import CALL_ARGUMENTS, check_values, given_arguments
from .offsets import offset_at
from .rules import LEARNED, LEARNED_OUTPUT, ImageRule, OutputRule, find_image_rule, find_output_rule
from .sparsity_config import KINDS, SparsityConfig

logger = logging.get_logger(__name__)


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
        output_offset: by what the first keep logit is shifted to do so; None steers online.
        training, gumbel_tau, elastic: whether and how masks are drawn.
    """

    kinds: dict[str, KindOptions]
    image_rule: ImageRule
    output_rule: OutputRule
    drive_output: bool
    output_offset: float | None
    training: bool
    gumbel_tau: float
    elastic: bool

    @classmethod
    def resolve(
        cls, sparsity: SparsityConfig, *, training: bool, call: Mapping[str, Any] | None = None
    ) -> SparsityOptions:
        """Check a call's `CallArguments` and fill the rest from `sparsity`.

        Raises:
            ValueError: a rate outside (0, 1], a temperature that is none, an unknown selection or selector, an
                argument that could have no effect: of a predictor that is off, of inference in training or the reverse.
        """
        call = dict(call or {})
        check_values(call)
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
            output_offset=_output_offset(sparsity, call),
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
                "out, or pass image_selection='topk' or 'diverse'."
            )
        if "output" not in self.kinds and self.drive_output and call["output_keep_rate"] < 1:
            raise ValueError(
                f"output_keep_rate={call['output_keep_rate']}: this call drops no output tokens (output_predictor is "
                "off, or output_sparsity=False). Leave it out."
            )
        control = call.get("output_rate_control")
        if control is not None and (not self.drive_output or self.training or "output_selector" in selectors):
            raise ValueError(
                f"output_rate_control={control!r} says how the output predictor meets output_keep_rate in inference; "
                "pass this too, with no output_selector, or leave it out."
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


def _output_offset(sparsity: SparsityConfig, call: Mapping[str, Any]) -> float | None:
    """What is added to the first keep logit to meet a call's rate; `ValueError` where the table does not say it."""
    rate, control = call.get("output_keep_rate"), call.get("output_rate_control")
    if rate in (None, 1) or control == "steered":
        return None
    offset = offset_at(sparsity.output_offsets, float(rate))
    if offset is None and control == "offset":
        rates = list(sparsity.output_offsets)
        raise ValueError(
            "output_rate_control='offset': this checkpoint has "
            + (f"offsets from {rates[0]} to {rates[-1]}, not for {rate}" if rates else "no offsets")
            + ". Make them (dynamic-llava checkpoints calibrate), or pass output_rate_control='steered'."
        )
    return offset


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
