"""Which tokens the sparse layers still see: Gumbel draws in training, predictions in inference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import functional
from .options import IMAGE_SELECTORS, OUTPUT_SELECTORS, PREDICTOR, SparsityOptions
from .token_spans import TokenSpans


@dataclass
class Decision:
    """What a call decided, by predictor.

    Keep masks are `(B, N)`, 1 where that predictor keeps the token or does not judge it (float with gradients in
    training, bool in inference); None where nothing was judged. Keep logits are `(B, N_image, 2)` and
    `(B, N_output, 2)`, rows packed to the left.
    """

    image_keep_mask: Tensor | None = None
    output_keep_mask: Tensor | None = None
    image_keep_logits: Tensor | None = None
    output_keep_logits: Tensor | None = None
    image_budget_loss: Tensor | None = None
    output_budget_loss: Tensor | None = None
    steering: Tensor | None = None
    instruct_keep_mask: Tensor | None = None
    instruct_keep_logits: Tensor | None = None
    instruct_budget_loss: Tensor | None = None

    def keep_mask(self, like: Tensor) -> Tensor:
        """Product of the masks, `(B, N)` in the dtype of `like (B, N)`."""
        keep = torch.ones_like(like)
        for mask in (self.image_keep_mask, self.output_keep_mask, self.instruct_keep_mask):
            if mask is not None:
                keep = keep * mask.to(keep.dtype)
        return keep


def draw(model, hidden: Tensor, spans: TokenSpans, options: SparsityOptions) -> Decision:
    """Training: hard Gumbel masks over image tokens and answers, and their budget losses.

    Both predictors run in every call, also on a batch without images or answers, so that all ranks of a distributed
    run do the same.
    """
    decision = Decision()
    ones = torch.ones(hidden.shape[:2], device=hidden.device)
    nothing = torch.zeros_like(spans.present)
    if options.image_sparsity:
        index, valid, _ = functional.pack_left(nothing if spans.image is None else spans.image)
        logits = model.image_predictor(functional.gather_kept(hidden, index), valid)
        mask = _draw_masks(logits, valid, options, options.image_keep_rate)
        decision.image_keep_logits = logits
        decision.image_keep_mask = functional.scatter_kept(mask, index, valid, ones)
        decision.image_budget_loss = functional.budget_loss(mask, valid, options.image_keep_rate)
    if options.output_sparsity:
        decision.output_keep_logits, decision.output_keep_mask, decision.output_budget_loss = _draw_tokens(
            model.output_predictor,
            hidden,
            nothing if spans.output is None else spans.output,
            options,
            options.output_keep_rate,
            options.min_output_length,
        )
    if options.instruct_sparsity:
        decision.instruct_keep_logits, decision.instruct_keep_mask, decision.instruct_budget_loss = _draw_tokens(
            model.instruct_predictor,
            hidden,
            nothing if spans.instruct is None else spans.instruct,
            options,
            options.instruct_keep_rate,
            options.min_instruct_length,
        )
    return decision


def _draw_masks(logits: Tensor, valid: Tensor, options: SparsityOptions, keep_rate: float) -> Tensor:
    """Hard Gumbel masks `(B, K)` of `logits (B, K, 2)`."""
    if options.elastic and keep_rate < 1:
        logits = functional.match_keep_rate(logits, valid, keep_rate)
    noise = functional.sample_gumbel(tuple(logits.shape), device=logits.device)
    return functional.gumbel_keep_mask(logits, noise, options.gumbel_tau)


def _draw_tokens(
    predictor, hidden: Tensor, tokens: Tensor, options: SparsityOptions, keep_rate: float, min_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep logits, keep mask and budget loss of `tokens (B, N)`, judged one by one; short rows are kept whole."""
    index, valid, _ = functional.pack_left(tokens)
    logits = predictor(functional.gather_kept(hidden, index))
    mask = _draw_masks(logits, valid, options, keep_rate)
    long_enough = valid.sum(dim=-1) >= min_length
    ones = torch.ones(hidden.shape[:2], device=hidden.device)
    keep = functional.scatter_kept(mask, index, valid & long_enough[:, None], ones)
    return logits, keep, functional.budget_loss(mask, valid, keep_rate, long_enough)


def decide(
    model, hidden: Tensor, spans: TokenSpans, options: SparsityOptions, steering: Tensor | None = None
) -> Decision:
    """Inference: top-k or threshold over the image tokens, keep iff `logit0 > logit1` for output tokens.

    Args:
        steering: `(B, 3)` state of earlier output tokens where `options.steer_output`, None at the first.
    """
    decision = Decision()
    if spans.image is not None and not options.keeps_all_images:
        index, valid, _ = functional.pack_left(spans.image)
        packed = functional.gather_kept(hidden, index)
        keep, decision.image_keep_logits = _judge_images(model, packed, valid, options)
        decision.image_keep_mask = functional.scatter_kept(keep, index, valid, torch.ones_like(spans.present))
    if options.output_sparsity and spans.output is not None:
        _judge_outputs(model, hidden, spans, options, steering, decision)
    if options.instruct_sparsity and spans.instruct is not None:
        index, valid, _ = functional.pack_left(spans.instruct)
        logits = decision.instruct_keep_logits = model.instruct_predictor(functional.gather_kept(hidden, index))
        keep = logits[..., 0] > logits[..., 1]
        decision.instruct_keep_mask = functional.scatter_kept(keep, index, valid, torch.ones_like(spans.present))
    return decision


def _judge_images(model, hidden: Tensor, valid: Tensor, options: SparsityOptions) -> tuple[Tensor, Tensor | None]:
    if options.image_selector != PREDICTOR:
        scores = IMAGE_SELECTORS[options.image_selector](hidden, valid)
        return functional.top_k_keep_mask(scores, valid, options.image_keep_rate), None
    logits = model.image_predictor(hidden, valid)
    if options.image_selection == "threshold":
        return functional.threshold_keep_mask(logits, valid), logits
    return functional.top_k_keep_mask(functional.keep_scores(logits), valid, options.image_keep_rate), logits


def _judge_outputs(
    model, hidden: Tensor, spans: TokenSpans, options: SparsityOptions, steering: Tensor | None, decision: Decision
) -> None:
    if spans.single_output:
        index, valid, packed = None, spans.output, hidden
    else:
        index, valid, _ = functional.pack_left(spans.output)
        packed = functional.gather_kept(hidden, index)
    if options.output_selector != PREDICTOR:
        keep = OUTPUT_SELECTORS[options.output_selector](packed, options.output_keep_rate)
    else:
        logits = decision.output_keep_logits = model.output_predictor(packed)
        if options.steer_output and options.output_keep_rate < 1:
            if steering is None:
                steering = functional.new_steering(len(hidden), hidden.device)
            keep, decision.steering = functional.steered_keep_mask(logits, valid, options.output_keep_rate, steering)
        else:
            keep = (logits[..., 0] > logits[..., 1]) | options.steer_output
    if index is not None:
        keep = functional.scatter_kept(keep, index, valid, torch.ones_like(spans.present))
    decision.output_keep_mask = keep
