"""MaskedSoftmax (paper, Eq. 7) by its definition, on materialised scores: what every faster form is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .sparsity_config import GATE_ESTIMATORS


def gate_weights(scores: Tensor, lse: Tensor, visible: Tensor, estimator: str | Tensor) -> Tensor:
    """Weight `w_ij` with which column j enters the gradient of its gate (see `masked_softmax`).

    Args:
        scores: `(..., N, N)` float attention scores.
        lse: `(..., N, 1)` log-sum-exp over the visible columns.
        visible: bool, broadcastable to `scores`.
        estimator: `exact` is `exp(s - lse)` everywhere, the derivative of Eq. 7; `bounded` replaces it for
            dropped columns by `sigmoid(s - lse)`, the weight the column would have if it were kept. `(B, N)` bool takes
            `exact` for the columns where it is true, `bounded` for the others.
    """
    gap = scores - lse
    if isinstance(estimator, str) and estimator == "exact":
        return gap.exp()
    if isinstance(estimator, Tensor):
        visible = visible | estimator[:, None, None, :]
    return torch.where(visible, gap.exp(), gap.sigmoid())


class _MaskedSoftmax(torch.autograd.Function):
    """Softmax over the visible columns; the backward also gives the gradient of the gates."""

    @staticmethod
    def forward(ctx, scores: Tensor, keep_mask: Tensor, causal: Tensor, estimator: str | Tensor) -> Tensor:
        visible = visible_columns(keep_mask, causal)
        masked = scores.masked_fill(~visible, float("-inf"))
        lse = masked.logsumexp(dim=-1, keepdim=True)
        weights = (masked - lse).exp()
        ctx.save_for_backward(scores, lse, weights, visible, causal)
        ctx.estimator = estimator
        return weights

    @staticmethod
    def backward(ctx, grad: Tensor):
        scores, lse, weights, visible, causal = ctx.saved_tensors
        centred = grad - (grad * weights).sum(dim=-1, keepdim=True)
        gate = gate_weights(scores, lse, visible, ctx.estimator) * centred
        # A token always sees itself whatever its gate, and never the future or padding.
        gate = gate.masked_fill(~off_diagonal(causal), 0.0)
        return weights * centred, gate.sum(dim=(1, 2)), None, None


def off_diagonal(causal: Tensor) -> Tensor:
    """`causal (..., N, N)` without its diagonal."""
    size = causal.shape[-1]
    return causal & ~torch.eye(size, dtype=torch.bool, device=causal.device)


def visible_columns(keep_mask: Tensor, causal: Tensor) -> Tensor:
    """Columns that take part: kept ones among the causal, and the diagonal (paper, Eq. 7).

    Args:
        keep_mask: `(B, N)`, 1 = keep.
        causal: `(B or 1, 1, N, N)` bool, true where key j is neither in the future nor padding.

    Returns:
        `(B, 1, N, N)` bool; the diagonal is always true, so that no row is empty.
    """
    size = causal.shape[-1]
    diagonal = torch.eye(size, dtype=torch.bool, device=causal.device)
    return (causal & (keep_mask.detach() > 0.5)[:, None, None, :]) | diagonal


def masked_softmax(scores: Tensor, keep_mask: Tensor, causal: Tensor, estimator: str | Tensor = "bounded") -> Tensor:
    """MaskedSoftmax (paper, Eq. 7, epsilon 0): softmax over kept columns and the diagonal, with gate gradients.

    Args:
        scores: `(B, H, N, N)` float32 attention scores.
        keep_mask: `(B, N)` float, exactly 0 or 1; receives a gradient.
        causal: `(B or 1, 1, N, N)` bool, true where key j is neither in the future of i nor padding.
        estimator: gradient of the gates of dropped columns, see `gate_weights`.

    Returns:
        `(B, H, N, N)` float32 weights; each row sums to 1.

    Raises:
        ValueError: unknown estimator.
    """
    check_estimator(estimator)
    return _MaskedSoftmax.apply(scores, keep_mask, causal, estimator)


def check_estimator(estimator: str | Tensor) -> None:
    """Raise `ValueError` unless `estimator` is one of `GATE_ESTIMATORS`, or says for each column which."""
    if not isinstance(estimator, Tensor) and estimator not in GATE_ESTIMATORS:
        raise ValueError(f"Unknown gate_estimator {estimator!r}; use one of {', '.join(GATE_ESTIMATORS)}.")


def column_states(present: Tensor, estimator: str | Tensor) -> Tensor:
    """`(B, N)` int8 for kernels: 0 at padding, 2 at columns that take `exact` where others do not, 1 elsewhere."""
    states = present.to(torch.int8)
    return (states * (1 + estimator) if isinstance(estimator, Tensor) else states).contiguous()
