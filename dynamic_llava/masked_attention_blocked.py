"""MaskedSoftmax attention on packed columns, with memory linear in the sequence length.

What a query i sees (paper, Eq. 7) are the kept columns in front of it, and itself whatever its gate. So the kept
columns are packed, and with s_ij = q_i . k_j, j < i and kept,

    lse_i = log(exp(s_ii) + sum_j exp(s_ij)),    w_ij = exp(s_ij - lse_i),    o_i = w_ii v_i + sum_j w_ij v_j.

Backward makes the weights again, as flash attention does. With gap_ij = do_i . v_j - do_i . o_i,

    dq_i = sum_j w_ij gap_ij k_j,    dk_j = sum_i w_ij gap_ij q_i,    dv_j = sum_i w_ij do_i,

over the same pairs and the diagonal. The gate of column j gets what the queries behind it would gain by it,

    dm_j = sum_i w_ij gap_ij = v_j . (sum_i w_ij do_i) - sum_i w_ij (do_i . o_i),    i > j,

where of a kept column the first sum is in dv_j already, and of a dropped one w_ij is that of the estimator
(`masked_softmax.gate_weights`): its scores and one product with do_i are all that it costs. Queries, keys, values and
gradients carry one number more, (q, -lse), (k, 1), (v, -1), (do, do . o), so that products give s - lse and gap.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import pack_left
from .masked_softmax import check_estimator

# Queries in a block; the largest matrix is B x H x BLOCK x (kept or dropped columns) in float32.
BLOCK = 64


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
        kept = _Columns(present & (keep_mask > 0.5), block)
        keys, values, asking = kept.of(key), kept.of(value), _grouped(query, key) * scaling
        lse = (asking * key.float()[:, :, None]).sum(dim=-1)
        own, seen = lse.clone(), torch.empty_like(asking)
        for now, width, unseen in kept.blocks():
            scores = _hide(_rows(asking, now) @ keys[:, :, :width].transpose(2, 3), unseen)
            lse[..., now] = torch.logaddexp(_by_query(scores.logsumexp(dim=-1), now), lse[..., now])
            weights = scores.sub_(_rows(lse, now)[..., None]).exp_()
            seen[..., now, :] = _by_query(weights @ values[:, :, :width], now)
        seen.addcmul_((own - lse).exp_()[..., None], value.float()[:, :, None])
        output = seen.flatten(1, 2).to(query.dtype)
        ctx.save_for_backward(query, key, value, keep_mask, present, output, lse)
        ctx.scaling, ctx.estimator, ctx.block = scaling, estimator, block
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, keep_mask, present, output, lse = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        delta = (grad.float() * output.float()).sum(dim=-1, keepdim=True).unflatten(1, (-1, groups))
        asking = torch.cat([_grouped(query, key) * ctx.scaling, -lse[..., None]], dim=-1)
        upper = torch.cat([_grouped(grad, key), delta], dim=-1)
        key, value = F.pad(key.float(), (0, 1), value=1.0), F.pad(value.float(), (0, 1), value=-1.0)
        kept = present & (keep_mask > 0.5)
        grads = _through_kept(_Columns(kept, ctx.block), asking, upper, key, value)
        grad_query, grad_key, summed, gate = grads
        if ctx.needs_input_grad[3]:
            gate += _through_dropped(_Columns(present & ~kept, ctx.block), asking, upper, key, value, ctx.estimator)
        # Itself, whatever the gate.
        key, value = key[:, :, None], value[:, :, None]
        weight = (asking * key).sum(dim=-1, keepdim=True).exp_()
        slope = weight * (upper * value).sum(dim=-1, keepdim=True)
        grad_query.addcmul_(slope, key).mul_(ctx.scaling)
        grad_key += (slope * asking).sum(dim=2)
        summed += (weight * upper).sum(dim=2)
        return (
            grad_query[..., :-1].flatten(1, 2).to(query.dtype),
            grad_key[..., :-1].to(query.dtype),
            summed[..., :-1].to(query.dtype),
            gate.to(keep_mask.dtype),
            *[None] * 4,
        )


def _through_kept(columns: _Columns, asking: Tensor, upper: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """What comes through kept columns: gradients of `asking`, keys and values as they are here, and of the gates."""
    keys, values = columns.of(key), columns.of(value)
    grad_query, grad_keys, summed = torch.empty_like(asking), torch.zeros_like(keys), torch.zeros_like(values)
    for now, width, unseen in columns.blocks():
        rows, above = _rows(asking, now), _rows(upper, now)
        weights = _hide(rows @ keys[:, :, :width].transpose(2, 3), unseen).exp_()
        summed[:, :, :width] += weights.transpose(2, 3) @ above
        slope = weights.mul_(above @ values[:, :, :width].transpose(2, 3))
        grad_query[..., now, :] = _by_query(slope @ keys[:, :, :width], now)
        grad_keys[:, :, :width] += slope.transpose(2, 3) @ rows
    return grad_query, columns.back(grad_keys), columns.back(summed), columns.gates(summed, values)


def _through_dropped(
    columns: _Columns, asking: Tensor, upper: Tensor, key: Tensor, value: Tensor, estimator: str | Tensor
) -> Tensor:
    """`(B, N)` gradient of the gates of dropped columns."""
    keys, values = columns.of(key), columns.of(value)
    summed = torch.zeros_like(values)
    if isinstance(estimator, Tensor):
        exact = estimator.gather(1, columns.index)[:, None, None]
    for now, width, unseen in columns.blocks():
        scores = _hide(_rows(asking, now) @ keys[:, :, :width].transpose(2, 3), unseen)
        if isinstance(estimator, Tensor):
            weights = torch.where(exact[..., :width], scores.exp(), scores.sigmoid_())
        else:
            weights = scores.exp_() if estimator == "exact" else scores.sigmoid_()
        summed[:, :, :width] += weights.transpose(2, 3) @ _rows(upper, now)
    return columns.gates(summed, values)


class _Columns:
    """The columns of a mask `(B, N)` bool, packed to the left, and what each block of queries sees of them."""

    def __init__(self, mask: Tensor, block: int) -> None:
        self.index, self.valid, _ = pack_left(mask)
        self.length, self.block = mask.shape[1], block
        counts = mask.cumsum(dim=1)
        # Where each column of the sequence is packed; the others are behind the last.
        self.place = torch.where(mask, counts - 1, self.index.shape[1])
        before = F.pad(counts, (1, 0))
        firsts = torch.arange(0, self.length, block, device=mask.device)
        lasts = (firsts + block).clamp(max=self.length) - 1
        self.seen = torch.stack([before[:, firsts].amin(dim=0), before[:, lasts].amax(dim=0)], dim=1).tolist()

    def of(self, tensor: Tensor) -> Tensor:
        """`tensor (B, H_kv, N, d)` at these columns, `(B, H_kv, K, d)` float32."""
        return _take(tensor, self.index).float()

    def back(self, packed: Tensor) -> Tensor:
        """`packed (B, H_kv, K, d)` where it comes from, `(B, H_kv, N, d)`, 0 elsewhere."""
        return _take(F.pad(packed, (0, 0, 0, 1)), self.place)

    def gates(self, summed: Tensor, values: Tensor) -> Tensor:
        """`(B, N)` gradients of the gates by the sums over queries, `(B, H_kv, K, d + 1)` each."""
        return F.pad((summed * values).sum(dim=(1, 3)), (0, 1)).gather(1, self.place)

    def blocks(self) -> Iterator[tuple[slice, int, tuple[int, Tensor]]]:
        """The queries of each block, how many columns they may see, and from which on some of them see less.

        The last is a column and `(B, 1, 1, Q, columns from there on)` bool, true at those that are not in front of the
        query.
        """
        for first, (full, width) in zip(range(0, self.length, self.block), self.seen, strict=True):
            now = slice(first, min(first + self.block, self.length))
            queries = torch.arange(now.start, now.stop, device=self.index.device)[:, None]
            last = slice(full, width)
            unseen = (self.index[:, None, last] >= queries) | ~self.valid[:, None, last]
            yield now, width, (full, unseen[:, None, None])


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """`tensor (B, H, N, d)` at `index (B, K)`, `(B, H, K, d)`, row by row, which is faster than `gather`."""
    batch, heads, length, size = tensor.shape
    first = torch.arange(batch * heads, device=index.device).view(batch, heads, 1) * length
    rows = (first + index[:, None]).flatten()
    return tensor.reshape(-1, size).index_select(0, rows).view(batch, heads, -1, size)


def _grouped(tensor: Tensor, key: Tensor) -> Tensor:
    """`(B, H, N, d)` as `(B, H_kv, groups, N, d)` float32."""
    return tensor.float().contiguous().unflatten(1, (key.shape[1], -1))


def _rows(tensor: Tensor, now: slice) -> Tensor:
    """A block of `(B, H_kv, groups, N, ...)` as `(B, H_kv, groups * Q, ...)`: the heads of a group share their keys."""
    return tensor[:, :, :, now].flatten(2, 3)


def _by_query(rows: Tensor, now: slice) -> Tensor:
    """The inverse of `_rows`."""
    return rows.unflatten(2, (-1, now.stop - now.start))


def _hide(scores: Tensor, unseen: tuple[int, Tensor]) -> Tensor:
    """`scores (B, H_kv, groups * Q, columns)`, in place, -inf at columns that are not seen."""
    first, mask = unseen
    if mask.shape[-1]:
        scores.unflatten(2, (-1, mask.shape[-2]))[..., first:].masked_fill_(mask, float("-inf"))
    return scores
