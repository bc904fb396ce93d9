"""Outputs of the model classes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

from .decisions import Decision


@dataclass
class SparseDecoderOutput(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` with the call's `decision`."""

    decision: Decision | None = None


@dataclass
class DynamicLlavaModelOutput(LlavaModelOutputWithPast):
    """`LlavaModelOutputWithPast` with the call's `decision`."""

    decision: Decision | None = None


@dataclass
class DynamicLlavaOutput(LlavaCausalLMOutputWithPast):
    """Output of `DynamicLlavaForConditionalGeneration`.

    Changes from `LlavaCausalLMOutputWithPast`:
        lm_loss: scalar, next-token loss alone; `loss` adds the weighted budgets and entropies in training.
        image_budget_loss, output_budget_loss, instruct_budget_loss: scalars, unweighted, in training.
        image_keep_entropy, output_keep_entropy, instruct_keep_entropy: scalars, unweighted, in training with
            `keep_entropy_weight`.
        image_keep_mask, output_keep_mask, instruct_keep_mask: `(B, N)`, 1 where that predictor keeps the token or does
            not judge it; None where it judged nothing in this call.
        image_keep_logits, output_keep_logits, instruct_keep_logits: `(B, tokens of that kind, 2)`, rows packed to the
            left, index 0 means keep; None where no predictor was asked.

    `logits` are those of a zero hidden state at tokens that were dropped and not computed; None in training mode with
    labels, and wherever `skip_logits` asks for the loss alone.
    """

    lm_loss: Tensor | None = None
    image_budget_loss: Tensor | None = None
    output_budget_loss: Tensor | None = None
    instruct_budget_loss: Tensor | None = None
    image_keep_entropy: Tensor | None = None
    output_keep_entropy: Tensor | None = None
    instruct_keep_entropy: Tensor | None = None
    image_keep_mask: Tensor | None = None
    output_keep_mask: Tensor | None = None
    instruct_keep_mask: Tensor | None = None
    image_keep_logits: Tensor | None = None
    output_keep_logits: Tensor | None = None
    instruct_keep_logits: Tensor | None = None
