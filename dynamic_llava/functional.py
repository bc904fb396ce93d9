"""Pure tensor functions of Dynamic-LLaVA: noise, keep masks, packing, budget. Imports torch alone.

Words of this package for Boolean masks, one for each idea:
    present: the token is no padding.
    valid: the entry of a packed tensor is a real one.
    keep: a predictor or a rule keeps the token (keep masks hold 1 there; of keep logits `(..., 2)` index 0 means keep).
    judged: a predictor or a rule decides on the token.
    visible: the query may see the key.
    causal: the key is neither in the future of the query nor padding: what is visible where all is kept.
    computed: the sparse layers compute the token; all that are kept, and dropped ones whose logits count.
    supervised: the next token of this one has a label.
Image, output and instruct are kinds of tokens. A rule selects; a predictor is a learned rule.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def keep_counts(valid: Tensor, keep_rate: float) -> Tensor:
    """How many tokens a row keeps: `int(n * keep_rate)`, n counted over its valid entries.

    Args:
        valid: `(B, N)` bool.
        keep_rate: in (0, 1].

    Returns:
        `(B,)` long. NOTE(published code): a row with valid entries keeps at least one, where `int(n * keep_rate)` would
        be 0.
    """
    counts = valid.sum(dim=-1)
    # float64, as Python's int(n * rate) computes it.
    keep = (counts.double() * keep_rate).floor().long()
    return torch.minimum(keep.clamp(min=1), counts)


def top_k_keep_mask(scores: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
    """Keep the highest scores of each row; of equal ones the first.

    Args:
        scores: `(B, N)` float, higher means keep.
        valid: `(B, N)` bool; invalid entries are never kept.
        keep: `(B,)` long, how many of each row, at most as many as are valid.

    Returns:
        `(B, N)` bool.
    """
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
    best = top_k_keep_mask(keep_scores(keep_logits), valid, valid.any(dim=-1).long())
    return ((keep_logits[..., 0] > keep_logits[..., 1]) & valid) | best


#: Numbers of a row that `steered_keep_mask` carries on: threshold, sum of |margin|, tokens; 0 at the first token.
STEERING_SIZE = 3


def steered_keep_mask(keep_logits: Tensor, valid: Tensor, keep_rate: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """Keep output tokens by an online threshold that drives each row's kept fraction to `keep_rate`.

    A token is kept iff its margin `logit0 - logit1` reaches the row's threshold, which then moves by the row's mean
    |margin| times (kept - keep_rate). The moves telescope: after T tokens the fraction is off by the range of the
    margins in units of their mean size, over T. No token looks at a later one.

    Args:
        keep_logits: `(B, T, 2)` float, rows packed to the left, index 0 means keep.
        valid: `(B, T)` bool.
        keep_rate: in (0, 1).
        state: `(B, STEERING_SIZE)` of the previous call, 0 at the first.

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
