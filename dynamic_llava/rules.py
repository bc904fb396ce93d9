"""The seam for selection: a rule sees evidence of the tokens of a call and says which of them stay.

A rule of image tokens is an object with `needs`, the names of the fields of `Evidence` that are made for it, and either
`score`, of whose values the highest are kept, or `choose`, where the set as a whole matters. A rule of output tokens
has `keep`. Rules see every row by itself, hold no state of their own, and are taken by name, as objects, or as
`my_module:MyRule`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from .diversity import diverse_scores
from .functional import (
    STEERING_SIZE,
    keep_counts,
    keep_scores,
    steered_keep_mask,
    threshold_keep_mask,
    top_k_keep_mask,
)

#: The learned rule: what the checkpoint's own predictor says.
LEARNED = "predictor"
Rule = TypeVar("Rule")


@dataclass
class Evidence:
    """What a rule sees of the tokens of one kind in one call, rows packed to the left.

    Attributes:
        hidden: `(B, N, D)` states behind the dense layers.
        valid: `(B, N)` bool.
        rate: the fraction that is to be kept, in (0, 1].
        driven: whether a call has asked for this rate; if not, a learned rule of output tokens decides by itself.
        offset: what a learned rule of output tokens adds to the first keep logit to meet the rate; None steers online.
        columns: `(B, N)` long, where each token stands in the call's sequence; None where the call is one token a row.
        keep_logits: `(B, N, 2)` of the checkpoint's predictor, index 0 means keep; for rules that need it.
        features: `(B, N, D)` the tokens as they enter the decoder, of images their projected features; for rules that
            need it.
        text, text_valid: `(B, N_text, D)` states and `(B, N_text)` bool of the call's other tokens, in their order; for
            rules that need `text`.
    """

    hidden: Tensor
    valid: Tensor
    rate: float
    driven: bool
    offset: float | None = None
    columns: Tensor | None = None
    keep_logits: Tensor | None = None
    features: Tensor | None = None
    text: Tensor | None = None
    text_valid: Tensor | None = None

    @property
    def keep(self) -> Tensor:
        """`(B,)` long: how many tokens of each row are to be kept."""
        return keep_counts(self.valid, self.rate)


#: What a rule may need beside what all evidence holds.
NEEDS = frozenset({"keep_logits", "features", "text"})


@runtime_checkable
class ImageRule(Protocol):
    """Chooses among the image tokens of each row in prefill."""

    needs: frozenset[str]

    # And `score(evidence) -> (B, N)` float, higher = keep, or `choose(evidence) -> (B, N)` bool.


@runtime_checkable
class OutputRule(Protocol):
    """Decides on output tokens one after the other, before each is stored; it never sees a later one.

    `state_size` numbers of each row are carried from call to call, 0 at the first token.
    """

    needs: frozenset[str]
    state_size: int

    def keep(self, evidence: Evidence, state: Tensor) -> tuple[Tensor, Tensor]:
        """`state (B, state_size)` -> `(B, N)` bool and the new state; `evidence` holds `N` tokens of each row."""


class TopK:
    """The image tokens that the predictor would most likely keep, as many as the rate says (paper, inference)."""

    needs = frozenset({"keep_logits"})

    def score(self, evidence: Evidence) -> Tensor:
        return keep_scores(evidence.keep_logits)


class Diverse:
    """The image tokens that are likely kept and unlike likelier ones, as many as the rate says (`diversity`)."""

    needs = frozenset({"keep_logits"})

    def score(self, evidence: Evidence) -> Tensor:
        return diverse_scores(keep_scores(evidence.keep_logits), evidence.hidden, evidence.valid)


class Threshold:
    """The image tokens that the predictor more likely keeps than not (paper, Eq. 5), whatever the rate."""

    needs = frozenset({"keep_logits"})
    ignores_rate = True

    def choose(self, evidence: Evidence) -> Tensor:
        return threshold_keep_mask(evidence.keep_logits, evidence.valid)


class Learned:
    """Output tokens as the predictor decides them (paper, Eq. 5), or with its threshold moved to meet a rate."""

    needs = frozenset({"keep_logits"})
    state_size = STEERING_SIZE

    def keep(self, evidence: Evidence, state: Tensor) -> tuple[Tensor, Tensor]:
        logits = evidence.keep_logits
        if not evidence.driven or evidence.rate == 1:
            keep = logits[..., 0] > logits[..., 1]
            return torch.ones_like(keep) if evidence.driven else keep, state
        if evidence.offset is None:
            return steered_keep_mask(logits, evidence.valid, evidence.rate, state)
        # In float32: 16 bits would round the offset away.
        return logits[..., 0].float() + evidence.offset > logits[..., 1].float(), state


#: Learned rules of image tokens by `image_selection`.
LEARNED_IMAGES: dict[str, ImageRule] = {"topk": TopK(), "threshold": Threshold(), "diverse": Diverse()}
LEARNED_OUTPUT: OutputRule = Learned()
#: All other rules by name; `dynamic_llava.selection` adds its own.
IMAGE_RULES: dict[str, ImageRule] = {}
OUTPUT_RULES: dict[str, OutputRule] = {LEARNED: LEARNED_OUTPUT}


def image_rule(name: str) -> Callable[[type[Rule]], type[Rule]]:
    """Register a class of image rules as `image_selector=name`."""
    return _registrar(IMAGE_RULES, name)


def output_rule(name: str) -> Callable[[type[Rule]], type[Rule]]:
    """Register a class of output rules as `output_selector=name`."""
    return _registrar(OUTPUT_RULES, name)


def _registrar(rules: dict[str, Any], name: str) -> Callable[[type[Rule]], type[Rule]]:
    def register(rule: type[Rule]) -> type[Rule]:
        rules[name] = rule()
        return rule

    return register


def find_image_rule(selector: str | ImageRule, selection: str) -> ImageRule:
    """The rule that `image_selector` means; the learned one is that of `image_selection`; errors as `_find`."""
    if isinstance(selector, str) and selector == LEARNED:
        return LEARNED_IMAGES[selection]
    return _find("image_selector", selector, {LEARNED: None, **IMAGE_RULES}, ("score", "choose"))


def find_output_rule(selector: str | OutputRule) -> OutputRule:
    """The rule that `output_selector` means; errors as `_find`."""
    return _find("output_selector", selector, OUTPUT_RULES, ("keep",))


def _find(what: str, selector: Any, rules: dict[str, Any], methods: tuple[str, ...]) -> Any:
    """The rule that a selector means: a name, `module:Class`, or the rule itself.

    Raises:
        ValueError: an unknown name (with the nearest ones), a module or class that is not there, or an object that is
            no such rule.
    """
    rule = selector
    if isinstance(selector, str):
        rule = _imported(what, selector) if ":" in selector else rules.get(selector)
        if rule is None:
            near = difflib.get_close_matches(selector, rules, n=3, cutoff=0.4) or list(rules)
            raise ValueError(f"Unknown {what} {selector!r}; use {', '.join(near)}, or your own as my_module:MyRule.")
    needs = getattr(rule, "needs", None)
    right = isinstance(needs, frozenset | set) and any(callable(getattr(rule, name, None)) for name in methods)
    if not right or isinstance(rule, type):
        raise ValueError(
            f"{what}={selector!r} is no rule: it must have needs, a frozenset, and {' or '.join(methods)}; see "
            "dynamic_llava.rules."
        )
    if not needs <= NEEDS:
        raise ValueError(f"{what}={selector!r} needs {', '.join(sorted(needs - NEEDS))}; there is {', '.join(NEEDS)}.")
    return rule


def _imported(what: str, selector: str) -> Any:
    module, _, name = selector.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
        return _made(found) if isinstance(found, type) else found
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{what}={selector!r} cannot be imported ({error}); write my_module:MyRule.") from error


@cache
def _made(kind: type) -> Any:
    """The rule of a class, made once: options are resolved at every step, and rules hold no state."""
    return kind()


def keep_of(rule: Any, evidence: Evidence) -> Tensor:
    """`(B, N)` bool: the image tokens that stay by `rule`."""
    if hasattr(rule, "choose"):
        return rule.choose(evidence) & evidence.valid
    return top_k_keep_mask(rule.score(evidence), evidence.valid, evidence.keep)
