"""What Dynamic-LLaVA drops and how it learns to: `SparsityConfig`, typed and validated; needs neither torch nor
transformers, so that a command line can describe it at once."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from .offsets import checked_offsets
from .values import MOST_SIZE, is_finite

IMAGE_SELECTIONS = ("topk", "threshold", "diverse")
OUTPUT_RATE_CONTROLS = ("offset", "steered")
BUDGETS_ON = ("sampled", "argmax")
GATE_ESTIMATORS = ("bounded", "exact")
SPARSE_TRAINING = ("masked", "pruned")
MASKED_KERNELS = ("auto", "triton", "blocked")
#: Kinds of tokens that can be judged; each has a predictor of its own.
KINDS = ("image", "output", "instruct")
PREDICTOR_NAMES = tuple(f"{kind}_predictor" for kind in KINDS)
_WORDS = {
    "image_selection": IMAGE_SELECTIONS,
    "budget_on": BUDGETS_ON,
    "gate_estimator": GATE_ESTIMATORS,
    "image_gate_estimator": GATE_ESTIMATORS,
    "output_gate_estimator": GATE_ESTIMATORS,
    "sparse_training": SPARSE_TRAINING,
    "masked_kernel": MASKED_KERNELS,
}


def check_keep_rate(name: str, value: float) -> float:
    """Return `value` as a float, or raise `ValueError` when it is not a fraction kept in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise ValueError(f"{name} is the fraction of tokens kept and must lie in (0, 1], got {value!r}.")
    return float(value)


def check_word(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return `value`, or raise `ValueError` when it is not one of the words `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    return value


@dataclass
class SparsityConfig:
    """What Dynamic-LLaVA drops, and how it learns to.

    Args:
        sparse_layer: number of dense decoder layers in front, index of the first sparse one (paper: l = 2).
        image_keep_rate: fraction of image tokens kept, in (0, 1].
        output_keep_rate: fraction of output tokens kept, in (0, 1].
        image_predictor: whether image tokens are dropped.
        output_predictor: whether output tokens are dropped.
        image_selection: `topk` keeps the `int(n * image_keep_rate)` likeliest tokens, `diverse` as many that are likely
            kept and unlike likelier ones (`diversity`), `threshold` those more likely kept than not (Eq. 5).
        output_offsets: what a call adds to the first logit of the output predictor to keep a fraction of the output
            tokens, by that fraction; `dynamic-llava checkpoints calibrate` finds it. Empty: calls are steered online.
        predictor_dim: width of both predictors.
        predictor_num_heads, predictor_ffn_dim, predictor_num_layers: the ViT blocks of the image predictor.
        budget_weight: weight of the two budget losses beside the LM loss.
        budget_on: of tokens whose fate their keep logits alone decide in inference (all but images by rate), what the
            budget counts: those `sampled` in training (paper), or the decisions of inference (`argmax`), with the
            gradient of the keep probability.
        keep_entropy_weight: weight of the mean entropy of the keep probabilities of these tokens in the loss; it moves
            them away from one half, where draws and decisions differ.
        min_output_length: answers shorter than this are kept whole in training.
        gate_estimator: gradient of the gates of dropped columns, `bounded` or `exact` (`masked_softmax.gate_weights`).
        image_gate_estimator, output_gate_estimator: that of image and of output tokens; None is `gate_estimator`.
        masked_kernel: how MaskedSoftmax runs in training with every attention but eager: `triton`, `blocked` (plain
            torch) or `auto` (`masked_attention_kernels.choose_kernel`).
        sparse_training: `masked` keeps every token in training and hides dropped ones by MaskedSoftmax (paper);
            `pruned` lets dropped image (and instruct) tokens leave the sparse layers, at little more than the cost of
            inference. Gates of tokens that left get no gradient.
        pruned_probe_rate: in pruned training, the fraction of dropped tokens that stay as probes, drawn at random in
            each call: hidden as in masked training, their gates get its gradient, divided by this rate. On average
            over the draws that is masked training's; 0 leaves the gradient to the gates of kept tokens alone.
        instruct_predictor: whether text of the last user turn, from its last image on, is dropped too, in prefill
            and training (published code; the paper's Table 9 shows that it costs accuracy).
        instruct_keep_rate: fraction of it kept in training, in (0, 1]; inference keeps what is more likely kept.
        min_instruct_length: shorter texts are kept whole in training.
        user_marker, assistant_marker: token ids between which that text stands, by default `USER:` and `ASSISTANT:` of
            Llama's tokenizer.
        untrained: predictors that are switched on but have never been trained, of those that the fields above name.
            Loading and training keep this record.

    Raises:
        ValueError: a value out of range, named with the values allowed.
    """

    sparse_layer: int = 2
    image_keep_rate: float = 0.2
    output_keep_rate: float = 0.5
    image_predictor: bool = True
    output_predictor: bool = True
    image_selection: str = "topk"
    predictor_dim: int = 512
    predictor_num_heads: int = 8
    predictor_ffn_dim: int = 2048
    predictor_num_layers: int = 2
    budget_weight: float = 100.0
    budget_on: str = "sampled"
    keep_entropy_weight: float = 0.0
    min_output_length: int = 50
    gate_estimator: str = "bounded"
    image_gate_estimator: str | None = None
    output_gate_estimator: str | None = None
    masked_kernel: str = "auto"
    sparse_training: str = "masked"
    pruned_probe_rate: float = 0.1
    instruct_predictor: bool = False
    instruct_keep_rate: float = 0.7
    min_instruct_length: int = 25
    user_marker: list[int] = field(default_factory=lambda: [3148, 1001, 29901])
    assistant_marker: list[int] = field(default_factory=lambda: [319, 1799, 9047, 13566, 29901])
    output_offsets: dict[str, float] = field(default_factory=dict)
    untrained: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image_keep_rate = check_keep_rate("image_keep_rate", self.image_keep_rate)
        self.output_keep_rate = check_keep_rate("output_keep_rate", self.output_keep_rate)
        self.instruct_keep_rate = check_keep_rate("instruct_keep_rate", self.instruct_keep_rate)
        for name in PREDICTOR_NAMES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        for name in ("user_marker", "assistant_marker"):
            ids = getattr(self, name)
            if not ids or not isinstance(ids, (list, tuple)) or not all(isinstance(item, Integral) for item in ids):
                raise ValueError(f"{name} must be token ids, such as those of 'USER:', got {ids!r}.")
        if not isinstance(self.untrained, (list, tuple)) or not all(name in PREDICTOR_NAMES for name in self.untrained):
            raise ValueError(f"untrained lists some of {', '.join(PREDICTOR_NAMES)}, got {self.untrained!r}.")
        self.output_offsets = checked_offsets(self.output_offsets)
        for name, allowed in _WORDS.items():
            if getattr(self, name) is not None or name not in ("image_gate_estimator", "output_gate_estimator"):
                check_word(name, getattr(self, name), allowed)
        self.pruned_probe_rate = self._number("pruned_probe_rate", 0, 1)
        self.budget_weight = self._number("budget_weight", 0)
        self.keep_entropy_weight = self._number("keep_entropy_weight", 0)
        for name in ("sparse_layer", "predictor_dim", "predictor_num_heads", "predictor_ffn_dim"):
            setattr(self, name, self._whole(name, 1))
        for name in ("predictor_num_layers", "min_output_length", "min_instruct_length"):
            setattr(self, name, self._whole(name, 0))
        if self.predictor_dim % 8 or self.predictor_dim % self.predictor_num_heads:
            raise ValueError(
                f"predictor_dim must be a multiple of 8 and of predictor_num_heads={self.predictor_num_heads}, "
                f"got {self.predictor_dim}."
            )

    def _number(self, name: str, lowest: float, highest: float = math.inf) -> float:
        value = getattr(self, name)
        real = isinstance(value, Real) and not isinstance(value, bool) and is_finite(value)
        if not real or not lowest <= value <= highest:
            most = "" if highest == math.inf else f" and at most {highest}"
            raise ValueError(f"{name} must be a number, at least {lowest}{most}, got {value!r}.")
        return float(value)

    def _whole(self, name: str, lowest: int) -> int:
        value = getattr(self, name)
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or not lowest <= int(value) <= MOST_SIZE:
            raise ValueError(
                f"{name} must be a whole number, at least {lowest} and at most {MOST_SIZE}, got {value!r}."
            )
        return int(value)

    def predictors_on(self) -> list[str]:
        """Names of the predictors that drop tokens."""
        return [f"{kind}_predictor" for kind in self.kinds_on()]

    def kinds_on(self) -> list[str]:
        """The kinds of tokens that have a predictor."""
        return [kind for kind in KINDS if getattr(self, f"{kind}_predictor")]

    def kinds_by_logits(self) -> list[str]:
        """Those of them that inference keeps where the first keep logit is the higher one, whatever the rate."""
        return [kind for kind in self.kinds_on() if kind != "image" or self.image_selection == "threshold"]

    def gate_estimators(self) -> dict[str, str]:
        """The gate estimator of each of them."""
        own = {"image": self.image_gate_estimator, "output": self.output_gate_estimator}
        return {kind: own.get(kind) or self.gate_estimator for kind in self.kinds_on()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SparsityConfig:
        """Build from plain values; an unknown key is a `ValueError` that offers the nearest names."""
        known = [item.name for item in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
                raise ValueError(f"Unknown sparsity key {key!r}. Did you mean {', '.join(near)}?")
        return cls(**values)

    def check_decoder(self, num_layers: int) -> None:
        """Raise `ValueError` unless `sparse_layer` leaves a dense and a sparse part of `num_layers` layers."""
        if not 1 <= self.sparse_layer < num_layers:
            raise ValueError(
                f"sparse_layer={self.sparse_layer} is outside the decoder of {num_layers} layers; "
                f"use 1 to {num_layers - 1}."
            )
