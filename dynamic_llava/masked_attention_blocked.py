"""MaskedSoftmax attention with memory linear in the sequence length: blocks of queries, nothing of size N x N.

Forward keeps the log-sum-exp of each row; backward makes each block's weights again, as flash attention does, and adds
the gradient of the gates (`masked_softmax.gate_weights`) in the same pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masked_softmax import check_estimator

# Queries in a block; the largest matrix is B x H x BLOCK x N in float32.
BLOCK = 256


def blocked_masked_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    present: Tensor,
    scaling: float,
    estimator: str | Tensor = "bounded",
    block: int = BLOCK,
) -> Tensor:
    """Attention by MaskedSoftmax (paper, Eq. 7): key j counts for query i iff j is kept or j == i, and j <= i.

    Args:
        query: `(B, H, N, d)`.
        key, value: `(B, H_kv, N, d)`, H a multiple of H_kv.
        keep_mask: `(B, N)` float, exactly 0 or 1; receives a gradient.
        present: `(B, N)` bool, false at padding, which no query but itself sees.
        scaling: factor of the scores.
        estimator: gradient of the gates of dropped columns, see `masked_softmax.gate_weights`.
        block: queries computed at once.

    Returns:
        `(B, H, N, d)` in the dtype of `query`; scores and sums are float32.

    Raises:
        ValueError: unknown estimator.
    """
    check_estimator(estimator)
    return _Blocked.apply(query, key, value, keep_mask, present, scaling, estimator, block)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, keep_mask, present, scaling, estimator, block):
        groups, kept = query.shape[1] // key.shape[1], present & (keep_mask > 0.5)
        key32, value32 = key.float(), value.float()
        output = torch.empty_like(query)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        for start, stop in _blocks(query.shape[2], block):
            scores = _scores(query, key32, start, stop, groups, scaling)
            scores.masked_fill_(_not_visible(kept, start, stop), float("-inf"))
            total = scores.logsumexp(dim=-1, keepdim=True)
            weights = scores.sub_(total).exp_()
            output[:, :, start:stop] = _by_head(_fold(weights) @ value32[:, :, :stop], groups)
            lse[:, :, start:stop] = total[..., 0].flatten(1, 2)
        ctx.save_for_backward(query, key, value, kept, present, output, lse)
        ctx.scaling, ctx.estimator, ctx.block = scaling, estimator, block
        ctx.gate_dtype = keep_mask.dtype
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, kept, present, output, lse = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        key32, value32 = key.float(), value.float()
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key32), torch.zeros_like(value32)
        gate = torch.zeros(kept.shape, dtype=torch.float32, device=kept.device) if ctx.needs_input_grad[3] else None
        for start, stop in _blocks(query.shape[2], ctx.block):
            rows = slice(start, stop)
            folded = _folded_rows(grad, rows, groups)
            invisible = _not_visible(kept, start, stop)
            shifted = _scores(query, key32, start, stop, groups, ctx.scaling)
            shifted.sub_(_split_rows(lse, rows, groups)[..., None])
            # dO_i . v_j - dO_i . O_i
            gap = _unfold(folded @ value32[:, :, :stop].transpose(2, 3), groups)
            gap.sub_(_split_rows((grad.float() * output.float()).sum(-1), rows, groups)[..., None])
            weights = shifted.exp()
            if gate is not None:
                own = _gate_weights(ctx.estimator, weights, shifted, invisible)
                own = own.mul(gap).sum(dim=(1, 2))
                gate[:, :stop] += own.masked_fill_(_not_causal(present, start, stop), 0.0).sum(dim=1)
            weights.masked_fill_(invisible, 0.0)
            grad_value[:, :, :stop] += _fold(weights).transpose(2, 3) @ folded
            slope = _fold(weights.mul_(gap)).mul_(ctx.scaling)
            grad_query[:, :, rows] = _by_head(slope @ key32[:, :, :stop], groups)
            grad_key[:, :, :stop] += slope.transpose(2, 3) @ _folded_rows(query, rows, groups)
        gate = None if gate is None else gate.to(ctx.gate_dtype)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), gate, None, None, None, None


def _gate_weights(estimator: str | Tensor, weights: Tensor, shifted: Tensor, invisible: Tensor) -> Tensor:
    """`masked_softmax.gate_weights` of a block: `weights` are `exp(shifted)`."""
    if isinstance(estimator, Tensor):
        invisible = invisible & ~estimator[:, None, None, None, : shifted.shape[-1]]
    elif estimator == "exact":
        return weights
    return torch.where(invisible, shifted.sigmoid(), weights)


def _blocks(length: int, block: int):
    return ((start, min(start + block, length)) for start in range(0, length, block))


def _scores(query: Tensor, key: Tensor, start: int, stop: int, groups: int, scaling: float) -> Tensor:
    """Scores of a block of queries with the keys up to its end, `(B, H_kv, groups, Q, stop)` float32."""
    rows = _folded_rows(query, slice(start, stop), groups)
    return _unfold(rows @ key[:, :, :stop].transpose(2, 3), groups).mul_(scaling)


def _split_rows(tensor: Tensor, rows: slice, groups: int) -> Tensor:
    """`(B, H, N)` -> `(B, H_kv, groups, Q)`."""
    return tensor[:, :, rows].unflatten(1, (-1, groups))


def _folded_rows(tensor: Tensor, rows: slice, groups: int) -> Tensor:
    """A block of `(B, H, N, d)` as `(B, H_kv, groups * Q, d)` float32: heads of a group share their keys as rows."""
    return tensor[:, :, rows].float().unflatten(1, (-1, groups)).flatten(2, 3)


def _fold(tensor: Tensor) -> Tensor:
    """`(B, H_kv, groups, Q, K)` -> `(B, H_kv, groups * Q, K)`."""
    return tensor.flatten(2, 3)


def _unfold(tensor: Tensor, groups: int) -> Tensor:
    """The inverse of `_fold`."""
    return tensor.unflatten(2, (groups, -1))


def _by_head(tensor: Tensor, groups: int) -> Tensor:
    """`(B, H_kv, groups * Q, d)` -> `(B, H, Q, d)`."""
    return _unfold(tensor, groups).flatten(1, 2)


def _not_visible(kept: Tensor, start: int, stop: int) -> Tensor:
    """`(B, 1, 1, Q, stop)` bool: columns that a query of the block does not see."""
    columns = torch.arange(stop, device=kept.device)
    own = columns[start:, None]
    return (((columns > own) | ~kept[:, None, :stop]) & (columns != own))[:, None, None]


def _not_causal(present: Tensor, start: int, stop: int) -> Tensor:
    """`(B, Q, stop)` bool: columns whose gate a query of the block does not touch: itself, the future, padding."""
    columns = torch.arange(stop, device=present.device)
    return (columns >= columns[start:, None]) | ~present[:, None, :stop]
