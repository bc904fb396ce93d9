"""Which tokens the sparse layers still see: Gumbel draws in training, rules in inference; one path for every kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .decisiveness import decided_keep_mask, keep_entropy
from .functional import (
    budget_loss,
    gather_kept,
    gumbel_keep_mask,
    match_keep_rate,
    pack_left,
    sample_gumbel,
    scatter_kept,
)
from .options import SparsityOptions
from .rules import Evidence, OutputRule, keep_of
from .sparsity_config import KINDS, SparsityConfig
from .token_masks import TokenMasks


@dataclass
class KindDecision:
    """What a call decided on the tokens of one kind.

    Attributes:
        keep_mask: `(B, N)`, 1 where the token is kept or not judged here (float with gradients in training, else bool).
        keep_logits: `(B, N_kind, 2)` of the predictor, rows packed to the left; None where it was not asked.
        budget_loss: scalar, in training.
        keep_entropy: scalar, in training with a weight for it, of tokens whose fate their keep logits alone decide.
    """

    keep_mask: Tensor
    keep_logits: Tensor | None = None
    budget_loss: Tensor | None = None
    keep_entropy: Tensor | None = None


@dataclass
class Decision:
    """What a call decided.

    Attributes:
        kinds: by name, those that had tokens to judge.
        state: of the output rule behind the call, where it is a new one: `(B, S)`, or `(B, N, S)` behind each token.
        computed: `(B, N)` bool, the tokens that the sparse layers have computed where others are 0; None where none is.
    """

    kinds: dict[str, KindDecision] = field(default_factory=dict)
    state: Tensor | None = None
    computed: Tensor | None = None

    def keep_masks(self) -> list[Tensor]:
        """The keep masks of all kinds."""
        return [decided.keep_mask for decided in self.kinds.values()]

    def keep_mask(self, kind: str) -> Tensor | None:
        """The keep mask of one kind, None where it was not judged."""
        return self.kinds[kind].keep_mask if kind in self.kinds else None

    def gates(self, like: Tensor) -> Tensor:
        """Product of the masks, `(B, N)` in the dtype of `like (B, N)`."""
        keep = torch.ones_like(like)
        for mask in self.keep_masks():
            keep = keep * mask.to(keep.dtype)
        return keep

    def outputs(self) -> dict[str, Tensor | None]:
        """`image_keep_mask`, `image_keep_logits`, `image_budget_loss` and so on, by the names of the model's output."""
        return {
            f"{kind}_{name}": value for kind, decided in self.kinds.items() for name, value in vars(decided).items()
        }


def weighted_losses(outputs: Mapping[str, Tensor | None], sparsity: SparsityConfig) -> Iterator[Tensor]:
    """What stands beside the LM loss: each of the scalars that `Decision.outputs` has, times its weight."""
    weights = {"budget_loss": sparsity.budget_weight, "keep_entropy": sparsity.keep_entropy_weight}
    for kind in KINDS:
        for name, weight in weights.items():
            if (loss := outputs.get(f"{kind}_{name}")) is not None:
                yield weight * loss


def predictor_of(model: nn.Module, kind: str) -> nn.Module:
    """The predictor of a kind of tokens; decoders have one for each kind that is judged."""
    return getattr(model, f"{kind}_predictor")


def draw(model: Any, hidden: Tensor, tokens: TokenMasks, options: SparsityOptions) -> Decision:
    """Training: hard Gumbel masks over the tokens of each kind, and their budget losses; short rows are kept whole.

    All predictors run in every call, also on a batch without images or answers, so that all ranks of a distributed run
    do the same.
    """
    decision = Decision()
    for kind, settings in options.kinds.items():
        judged = tokens.of(kind)
        index, valid, _ = pack_left(torch.zeros_like(tokens.present) if judged is None else judged)
        logits = predictor_of(model, kind)(gather_kept(hidden, index), valid)
        drawn_from = logits
        if options.elastic and settings.keep_rate < 1:
            drawn_from = match_keep_rate(logits, valid, settings.keep_rate)
        noise = sample_gumbel(tuple(logits.shape), device=logits.device)
        mask = gumbel_keep_mask(drawn_from, noise, options.gumbel_tau)
        long_enough = valid.sum(dim=-1) >= settings.min_length
        alone = kind in model.sparsity.kinds_by_logits()
        counted = decided_keep_mask(drawn_from) if alone and model.sparsity.budget_on == "argmax" else mask
        weighed = alone and model.sparsity.keep_entropy_weight > 0
        ones = torch.ones(hidden.shape[:2], device=hidden.device)
        decision.kinds[kind] = KindDecision(
            keep_mask=scatter_kept(mask, index, valid & long_enough[:, None], ones),
            keep_logits=logits,
            budget_loss=budget_loss(counted, valid, settings.keep_rate, long_enough),
            keep_entropy=keep_entropy(drawn_from, valid, long_enough) if weighed else None,
        )
    return decision


def gate_estimator(sparsity: SparsityConfig, tokens: TokenMasks) -> str | Tensor:
    """The gate estimator of a training call: a word, or `(B, N)` bool, the tokens of kinds that take `exact`."""
    found = sparsity.gate_estimators()
    if len(set(found.values())) < 2:
        return next(iter(found.values()), sparsity.gate_estimator)
    exact = torch.zeros_like(tokens.present)
    for kind, estimator in found.items():
        if estimator == "exact" and (own := tokens.of(kind)) is not None:
            exact = exact | own
    return exact


def decide(
    model: Any,
    hidden: Tensor,
    embedded: Tensor,
    tokens: TokenMasks,
    options: SparsityOptions,
    state: Tensor | None = None,
) -> Decision:
    """Inference: what the rules keep of the tokens of each kind.

    Args:
        model: the decoder, with its predictors.
        hidden, embedded: `(B, N, D)` behind the dense layers and in front of them.
        tokens: of this call.
        options: what is dropped, and by which rules.
        state: `(B, S)` of the output rule behind earlier tokens, None at the first.
    """
    decision = Decision()
    for kind in options.kinds:
        judged, rule = tokens.of(kind), options.rule(kind)
        if judged is None or (kind == "image" and options.keeps_all_images):
            continue
        single = kind == "output" and tokens.output_alone
        index, valid, _ = (None, judged, True) if single else pack_left(judged)
        packed = hidden if index is None else gather_kept(hidden, index)
        driven = kind == "output" and options.drive_output
        evidence = Evidence(packed, valid, options.rate(kind), driven, options.output_offset, columns=index)
        if "keep_logits" in rule.needs:
            evidence.keep_logits = predictor_of(model, kind)(packed, valid)
        if "features" in rule.needs:
            evidence.features = embedded if index is None else gather_kept(embedded, index)
        if "text" in rule.needs:
            text, evidence.text_valid, _ = pack_left(tokens.text())
            evidence.text = gather_kept(hidden, text)
        if kind == "image":
            keep = keep_of(rule, evidence)
        else:
            before = hidden.new_zeros(len(hidden), rule.state_size, dtype=torch.float32) if state is None else state
            apart = tokens.output_alone and judged.shape[1] > 1
            keep, after = _keep_each(rule, evidence, before) if apart else rule.keep(evidence, before)
            if kind == "output" and after is not before:
                decision.state = after
        if index is not None:
            keep = scatter_kept(keep, index, valid, torch.ones_like(tokens.present))
        decision.kinds[kind] = KindDecision(keep, evidence.keep_logits)
    return decision


def _keep_each(rule: OutputRule, evidence: Evidence, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `rule.keep` on tokens that may be forgotten again, one after the other: `state` behind each, `(B, N, S)`."""
    kept, states, before = [], [], state
    for number in range(evidence.valid.shape[1]):
        one = slice(number, number + 1)
        parts = {name: getattr(evidence, name) for name in ("hidden", "valid", "keep_logits", "features")}
        parts = {name: None if part is None else part[:, one] for name, part in parts.items()}
        keep, state = rule.keep(replace(evidence, **parts), state)
        kept.append(keep)
        states.append(state)
    return torch.cat(kept, dim=1), before if state is before else torch.stack(states, dim=1)


def split_computed(decision: Decision, tokens: TokenMasks) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens the sparse layers compute, and which of these are dropped, `(B, N)` bool; None where none is judged.

    Dropped tokens leave, but for those whose logits count: the last of a row, and with labels all that are supervised.
    These see the kept tokens and themselves, and no other token sees them.
    """
    masks = decision.keep_masks()
    if not masks:
        return None, None
    keep = torch.stack(masks).all(dim=0)
    computed = keep | (tokens.present.flip(-1).cumsum(dim=-1).flip(-1) == 1)
    if tokens.supervised is not None:
        computed = computed | tokens.supervised
    computed = computed & tokens.present
    return computed, computed & ~keep


def chosen_from(decision: Decision, tokens: TokenMasks) -> Tensor:
    """`(B, N)` bool: the tokens on which it depended which ones left the sequence."""
    if decision.keep_mask("instruct") is not None:
        # The user's turn is told by the marker behind it.
        return torch.ones_like(tokens.present)
    return torch.zeros_like(tokens.present) if tokens.image is None else tokens.image
