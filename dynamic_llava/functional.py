"""Pure tensor functions of Dynamic-LLaVA: noise, keep masks, packing, masked softmax, budget. Imports torch alone.

Keep masks hold 1 where a token is kept. Keep logits have two channels and index 0 means keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

GATE_ESTIMATORS = ("bounded", "exact")


def sample_gumbel(
    shape: tuple[int, ...],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw standard Gumbel(0, 1) noise; the only source of noise in training.

    Args:
        shape: shape of the result; the model asks once for the image tokens `(B, N_image, 2)` and once
            for the output tokens `(B, N_output, 2)`, rows packed to the left.
        device, dtype, generator: as in `torch.empty` and `Tensor.exponential_`.
    """
    return -torch.empty(shape, device=device, dtype=dtype).exponential_(generator=generator).log()


def gumbel_keep_mask(keep_logits: Tensor, noise: Tensor, gumbel_tau: float) -> Tensor:
    """Hard Gumbel-Softmax keep mask with straight-through gradients (paper, end-to-end training).

    Args:
        keep_logits: `(..., 2)` float, index 0 means keep.
        noise: `(..., 2)` Gumbel(0, 1) noise of the same shape.
        gumbel_tau: temperature above 0.

    Returns:
        `(...)` float, exactly 0 or 1; its gradient is that of the soft sample.

    Raises:
        ValueError: `gumbel_tau` is not positive.
    """
    if not gumbel_tau > 0:
        raise ValueError(f"gumbel_tau must be above 0, got {gumbel_tau}.")
    soft = ((keep_logits.float() + noise.float()) / gumbel_tau).softmax(dim=-1)[..., 0]
    hard = (soft >= 0.5).to(soft.dtype)
    # soft - soft.detach() is exactly 0, so that the mask is exactly 0 or 1.
    return hard + (soft - soft.detach())


def match_keep_rate(keep_logits: Tensor, valid: Tensor, keep_rate: float, steps: int = 40) -> Tensor:
    """Shift the margin of each row so that its expected kept fraction is `keep_rate` (elastic rates).

    The order of the tokens stays, and so do the gradients of their logits: what is learned is which tokens matter, not
    how many are kept.

    Args:
        keep_logits: `(B, N, 2)` float, index 0 means keep.
        valid: `(B, N)` bool.
        keep_rate: in (0, 1).
        steps: halvings of the interval in which the shift is sought.

    Returns:
        `(B, N, 2)` float32, the first channel shifted by a constant of its row.
    """
    logits = keep_logits.float()
    margin = (logits[..., 0] - logits[..., 1]).detach()
    number = valid.sum(dim=-1).clamp(min=1)
    bound = margin.abs().masked_fill(~valid, 0).amax(dim=-1, keepdim=True) + 20
    low, high = -bound, bound
    for _ in range(steps):
        middle = (low + high) / 2
        expected = ((margin + middle).sigmoid() * valid).sum(dim=-1, keepdim=True) / number[:, None]
        low, high = torch.where(expected < keep_rate, middle, low), torch.where(expected < keep_rate, high, middle)
    return logits + torch.stack([(low + high) / 2, torch.zeros_like(low)], dim=-1)


def keep_scores(keep_logits: Tensor) -> Tensor:
    """Log-probability of keeping, `(..., 2)` -> `(...)`; higher means keep (paper, Eq. 5)."""
    return keep_logits.float().log_softmax(dim=-1)[..., 0]


def top_k_keep_mask(scores: Tensor, valid: Tensor, keep_rate: float) -> Tensor:
    """Keep the `int(n * keep_rate)` highest scores of each row, n counted over the row's valid entries.

    Args:
        scores: `(B, N)` float, higher means keep.
        valid: `(B, N)` bool; invalid entries are never kept and never counted.
        keep_rate: in (0, 1].

    Returns:
        `(B, N)` bool. NOTE(published code): a row with valid entries keeps at least one, where
        `int(n * keep_rate)` would be 0.
    """
    counts = valid.sum(dim=-1)
    # float64, as Python's int(n * rate) computes it.
    keep = (counts.double() * keep_rate).floor().long()
    keep = torch.minimum(keep.clamp(min=1), counts)
    order = scores.float().masked_fill(~valid, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < keep[:, None]) & valid


def threshold_keep_mask(keep_logits: Tensor, valid: Tensor) -> Tensor:
    """Keep where keeping is the more likely of the two (paper, Eq. 5), at least the best token of each row.

    Args:
        keep_logits: `(B, N, 2)` float, index 0 means keep.
        valid: `(B, N)` bool.

    Returns:
        `(B, N)` bool.
    """
    best = top_k_keep_mask(keep_scores(keep_logits), valid, keep_rate=torch.finfo(torch.float64).tiny)
    return ((keep_logits[..., 0] > keep_logits[..., 1]) & valid) | best


def new_steering(batch_size: int, device: torch.device) -> Tensor:
    """State of `steered_keep_mask` before the first token: `(B, 3)` threshold, sum of |margin|, tokens."""
    return torch.zeros(batch_size, 3, device=device)


def steered_keep_mask(keep_logits: Tensor, valid: Tensor, keep_rate: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """Keep output tokens by an online threshold that drives each row's kept fraction to `keep_rate`.

    A token is kept iff its margin `logit0 - logit1` reaches the row's threshold, which then moves by the row's mean
    |margin| times (kept - keep_rate). The moves telescope: after T tokens the fraction is off by the range of the
    margins in units of their mean size, over T. No token looks at a later one.

    Args:
        keep_logits: `(B, T, 2)` float, rows packed to the left, index 0 means keep.
        valid: `(B, T)` bool.
        keep_rate: in (0, 1).
        state: `(B, 3)` from `new_steering` or the previous call.

    Returns:
        `(B, T)` bool and the new state.
    """
    margin = keep_logits[..., 0].float() - keep_logits[..., 1].float()
    threshold, size, seen = state.unbind(dim=-1)
    kept = []
    for step in range(margin.shape[1]):
        keep = margin[:, step] >= threshold
        counts = valid[:, step].float()
        size = size + counts * margin[:, step].abs()
        seen = seen + counts
        threshold = threshold + counts * size / seen.clamp(min=1) * (keep.float() - keep_rate)
        kept.append(keep)
    return torch.stack(kept, dim=1) & valid, torch.stack([threshold, size, seen], dim=-1)


def pack_left(mask: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Positions of the true entries of each row, moved to the left in their original order.

    Args:
        mask: `(B, N)` bool.

    Returns:
        `index (B, K)` long with distinct entries per row, `valid (B, K)` bool, and whether all entries are valid. K is
        the largest number of true entries of a row, at least 1. Reads K back from the device, hence for prefill and
        training only; K is N in `torch.export`, whose sizes depend on no values.
    """
    counts = mask.sum(dim=-1)
    if torch.compiler.is_exporting():
        least, width = -1, mask.shape[1]
    else:
        least, most = torch.stack([counts.min(), counts.max()]).tolist()
        width = max(most, 1)
    index = (~mask).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :width]
    valid = torch.arange(width, device=mask.device) < counts[:, None]
    return index, valid, least == width


def gather_kept(tensor: Tensor, index: Tensor) -> Tensor:
    """`tensor (B, N, ...)` at `index (B, K)` -> `(B, K, ...)`."""
    shape = index.shape + (1,) * (tensor.dim() - 2)
    return tensor.gather(1, index.view(shape).expand(*index.shape, *tensor.shape[2:]))


def scatter_kept(packed: Tensor, index: Tensor, valid: Tensor, fill: Tensor) -> Tensor:
    """Inverse of `gather_kept`: put `packed (B, K, ...)` at `index (B, K)` of a copy of `fill (B, N, ...)`.

    Entries with `valid (B, K)` false leave `fill` as it is.
    """
    shape = index.shape + (1,) * (packed.dim() - 2)
    index = index.view(shape).expand_as(packed)
    packed = torch.where(valid.view(shape), packed, fill.gather(1, index).to(packed.dtype))
    return fill.to(packed.dtype).scatter(1, index, packed)


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """`tensor`, to the bit, whose gradient is multiplied by `factor`."""
    return tensor.detach() + factor * (tensor - tensor.detach())


def gate_weights(scores: Tensor, lse: Tensor, visible: Tensor, estimator: str) -> Tensor:
    """Weight `w_ij` with which column j enters the gradient of its gate (see `masked_softmax`).

    Args:
        scores: `(..., N, N)` float attention scores.
        lse: `(..., N, 1)` log-sum-exp over the visible columns.
        visible: bool, broadcastable to `scores`.
        estimator: `exact` is `exp(s - lse)` everywhere, the derivative of Eq. 7; `bounded` replaces it for
            dropped columns by `sigmoid(s - lse)`, the weight the column would have if it were kept.
    """
    gap = scores - lse
    if estimator == "exact":
        return gap.exp()
    return torch.where(visible, gap.exp(), gap.sigmoid())


class _MaskedSoftmax(torch.autograd.Function):
    """Softmax over the visible columns; the backward also gives the gradient of the gates."""

    @staticmethod
    def forward(ctx, scores: Tensor, keep_mask: Tensor, candidates: Tensor, estimator: str) -> Tensor:
        visible = visible_columns(keep_mask, candidates)
        masked = scores.masked_fill(~visible, float("-inf"))
        lse = masked.logsumexp(dim=-1, keepdim=True)
        weights = (masked - lse).exp()
        ctx.save_for_backward(scores, lse, weights, visible, candidates)
        ctx.estimator = estimator
        return weights

    @staticmethod
    def backward(ctx, grad: Tensor):
        scores, lse, weights, visible, candidates = ctx.saved_tensors
        centred = grad - (grad * weights).sum(dim=-1, keepdim=True)
        gate = gate_weights(scores, lse, visible, ctx.estimator) * centred
        # A token always sees itself whatever its gate, and never the future or padding.
        gate = gate.masked_fill(~off_diagonal(candidates), 0.0)
        return weights * centred, gate.sum(dim=(1, 2)), None, None


def off_diagonal(candidates: Tensor) -> Tensor:
    """`candidates (..., N, N)` without its diagonal."""
    size = candidates.shape[-1]
    return candidates & ~torch.eye(size, dtype=torch.bool, device=candidates.device)


def visible_columns(keep_mask: Tensor, candidates: Tensor) -> Tensor:
    """Columns that take part: kept ones among the candidates, and the diagonal (paper, Eq. 7).

    Args:
        keep_mask: `(B, N)`, 1 = keep.
        candidates: `(B or 1, 1, N, N)` bool, true where key j is neither in the future nor padding.

    Returns:
        `(B, 1, N, N)` bool; the diagonal is always true, so that no row is empty.
    """
    size = candidates.shape[-1]
    diagonal = torch.eye(size, dtype=torch.bool, device=candidates.device)
    return (candidates & (keep_mask.detach() > 0.5)[:, None, None, :]) | diagonal


def masked_softmax(scores: Tensor, keep_mask: Tensor, candidates: Tensor, estimator: str = "bounded") -> Tensor:
    """MaskedSoftmax (paper, Eq. 7, epsilon 0): softmax over kept columns and the diagonal, with gate gradients.

    Args:
        scores: `(B, H, N, N)` float32 attention scores.
        keep_mask: `(B, N)` float, exactly 0 or 1; receives a gradient.
        candidates: `(B or 1, 1, N, N)` bool, true where key j is neither in the future of i nor padding.
        estimator: gradient of the gates of dropped columns, `bounded` or `exact` (see `gate_weights`).

    Returns:
        `(B, H, N, N)` float32 weights; each row sums to 1.

    Raises:
        ValueError: unknown estimator.
    """
    check_estimator(estimator)
    return _MaskedSoftmax.apply(scores, keep_mask, candidates, estimator)


def check_estimator(estimator: str) -> None:
    """Raise `ValueError` unless `estimator` is one of `GATE_ESTIMATORS`."""
    if estimator not in GATE_ESTIMATORS:
        raise ValueError(f"Unknown gate_estimator {estimator!r}; use one of {', '.join(GATE_ESTIMATORS)}.")


def budget_loss(keep_mask: Tensor, valid: Tensor, keep_rate: float, counted: Tensor | None = None) -> Tensor:
    """Mean over rows of `(keep_rate - kept fraction) ** 2` (paper, training loss).

    Args:
        keep_mask: `(B, N)` float, 1 = keep.
        valid: `(B, N)` bool, the tokens of each row that are judged.
        keep_rate: target fraction, in (0, 1].
        counted: `(B,)` bool; rows where it is false, and rows without valid tokens, add 0 but stay in the mean.

    Returns:
        Scalar float.
    """
    number = valid.sum(dim=-1)
    fraction = (keep_mask * valid).sum(dim=-1) / number.clamp(min=1)
    counted = (number > 0) if counted is None else counted & (number > 0)
    return ((keep_rate - fraction) ** 2 * counted).mean()
