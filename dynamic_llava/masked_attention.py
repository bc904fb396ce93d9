"""MaskedSoftmax attention for training, and the masks of the sparse layers for inference.

The sparse layers of a model with attention back end `X` run `masked_softmax_X`, registered here with transformers'
`AttentionInterface`: stock `X` without `keep_mask`, MaskedSoftmax with it: the reference on materialised scores for
`eager`, a form with memory linear in N for every other (`masked_attention_kernels`). With it, `attention_mask` is
that of `training_mask`, and `keep_mask (B, N)` carries the gates.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, repeat_kv
from transformers.utils.generic import is_flash_attention_requested

from .masked_attention_kernels import run_kernel
from .masked_softmax import masked_softmax

MASKED_PREFIX = "masked_softmax_"


def masked_softmax_eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    keep_mask: Tensor,
    dropout: float = 0.0,
    gate_estimator: str = "bounded",
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Reference: Eq. 7 on materialised float32 scores.

    `query (B, H, N, d)`, `key` and `value (B, H_kv, N, d)` -> output `(B, N, H, d)` and weights `(B, H, N, N)`.
    """
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scaling
    weights = masked_softmax(scores, keep_mask, attention_mask, gate_estimator).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def masked_softmax_fused(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    keep_mask: Tensor,
    dropout: float = 0.0,
    gate_estimator: str = "bounded",
    masked_kernel: str = "blocked",
    **kwargs,
) -> tuple[Tensor, None]:
    """As `masked_softmax_eager` with memory linear in N, by `masked_kernel`; `attention_mask (B, N)` bool."""
    if dropout:
        raise ValueError(f"Fused MaskedSoftmax has no dropout (attention_dropout={dropout}); use attention 'eager'.")
    output = run_kernel(masked_kernel, query, key, value, keep_mask, attention_mask, scaling, gate_estimator)
    return output.transpose(1, 2).contiguous(), None


def training_mask(present: Tensor, implementation: str) -> Tensor:
    """The attention mask of the sparse layers in training: `present (B, N)`, or for eager what is causal, 4D."""
    return causal_visible(present) if implementation == "eager" else present


def gated_implementation(implementation: str) -> str:
    """Name of the attention of the sparse layers that goes with `implementation`; registered on first use."""
    name = MASKED_PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS._global_mapping:
        _register(implementation)
    return name


def _register(implementation: str) -> None:
    """Register the attention of the sparse layers: MaskedSoftmax with a keep mask, the stock one without."""
    flash = is_flash_attention_requested(requested_attention_implementation=implementation)
    masked = {"eager": masked_softmax_eager, "sdpa": masked_softmax_fused}.get(
        implementation, masked_softmax_fused if flash else None
    )

    # With `dropout` in its place for wrappers of attention that pass it by position.
    def gated_attention(module, query, key, value, attention_mask, dropout=0.0, keep_mask=None, **kwargs):
        if keep_mask is None:
            # Flash attention takes no 4D mask; those few calls that need one go through sdpa.
            carried = "sdpa" if flash and attention_mask is not None and attention_mask.dim() == 4 else implementation
            return _stock_attention(carried, module, query, key, value, attention_mask, dropout=dropout, **kwargs)
        if masked is None:
            raise ValueError(
                f"attn_implementation={implementation!r} cannot carry the keep mask of training; use 'sdpa' or 'eager'."
            )
        return masked(module, query, key, value, attention_mask, dropout=dropout, keep_mask=keep_mask, **kwargs)

    AttentionInterface.register(MASKED_PREFIX + implementation, gated_attention)
    # Without a mask function of the same name transformers passes no mask at all.
    AttentionMaskInterface.register(MASKED_PREFIX + implementation, ALL_MASK_ATTENTION_FUNCTIONS[implementation])


def _stock_attention(implementation: str, module, *args, **kwargs):
    """Stock attention `implementation`, which may look up its own name in the layer's config."""
    config, gated = module.config, module.config._attn_implementation
    stock = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    if implementation in ("eager", "sdpa"):
        return stock(module, *args, **kwargs)
    try:
        config._attn_implementation = implementation
        return stock(module, *args, **kwargs)
    finally:
        config._attn_implementation = gated


def backend_mask(
    visible: Tensor | None, query_length: int, implementation: str, like: Tensor, valid: Tensor | None = None
) -> Tensor | None:
    """A bool mask in the form that `implementation` takes: additive for eager, bool for sdpa, 2D for flash.

    Args:
        visible: `(B, 1, Q, K)` bool; None means plain causal, or a single query that sees everything.
        query_length: Q.
        implementation: name of the attention back end.
        like: tensor whose dtype and device the mask gets.
        valid: `(B, K)` bool where `visible` is no more than causal over these columns, padding on the right.

    Returns:
        The mask, additive for sdpa too where it is of a single query. Where flash attention cannot carry it, a 4D mask,
        with which the sparse layers go through sdpa.

    Raises:
        ValueError: `implementation` takes no 4D mask.
    """
    if visible is None and query_length == 1:
        return None
    if implementation == "sdpa":
        # Of a bool mask sdpa makes an additive one in every layer, and one that is not aligned it copies.
        return visible if query_length > 1 else _additive(visible, like, float("-inf"))
    if is_flash_attention_requested(requested_attention_implementation=implementation):
        if visible is None:
            return None
        return visible[:, 0, 0] if query_length == 1 else (visible if valid is None else valid)
    if implementation != "eager":
        raise ValueError(f"attn_implementation={implementation!r} cannot carry a 4D mask; use 'sdpa' or 'eager'.")
    if visible is None:
        visible = torch.ones(1, 1, query_length, query_length, dtype=torch.bool, device=like.device).tril()
    return _additive(visible, like, lowest_score(like.dtype))


def _additive(visible: Tensor, like: Tensor, hidden: float) -> Tensor:
    """`visible (..., K)` bool as what is added to scores, 0 or `hidden` in the dtype of `like`; rows begin aligned."""
    aligned = like.new_zeros(*visible.shape[:-1], -(-visible.shape[-1] // 16) * 16)
    return aligned[..., : visible.shape[-1]].masked_fill_(~visible, hidden)


def dense_mask(config, hidden: Tensor, present: Tensor | None, cache: Cache | None, positions: Tensor) -> Tensor | None:
    """The mask of the dense layers, as the stock decoder makes it; `present (B, columns)`, 0 at padding."""
    mask: Any = create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=present,
        past_key_values=cache,
        position_ids=positions,
        layer_idx=0,
    )
    if mask is not None and mask.dtype == torch.float64:
        mask = mask.clamp(min=lowest_score(mask.dtype))
    return mask


def lowest_score(dtype: torch.dtype) -> float:
    """What eager attention adds to masked scores: its softmax is in float32, where less would be -inf, and a row of
    such scores NaN."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def causal_visible(present: Tensor) -> Tensor:
    """`present (B, N)` bool, false at padding -> `(B, 1, N, N)` bool: key j not in the future and present."""
    size = present.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=present.device).tril()
    return causal & present[:, None, None, :]
