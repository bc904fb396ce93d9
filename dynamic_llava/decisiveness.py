"""What brings the decisions of inference to the rates of training: a budget of decisions, and an entropy.

Training draws tokens with their keep probability, inference keeps those above one half. Where many lie a little below,
inference keeps fewer than the budget was met with.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def decided_keep_mask(keep_logits: Tensor) -> Tensor:
    """Decisions of inference (paper, Eq. 5) with the gradient of the keep probability (straight-through).

    Args:
        keep_logits: `(..., 2)` float, index 0 means keep.

    Returns:
        `(...)` float32, exactly 0 or 1.
    """
    soft = keep_logits.float().softmax(dim=-1)[..., 0]
    # soft - soft.detach() is exactly 0.
    return (keep_logits[..., 0] > keep_logits[..., 1]).to(soft.dtype) + (soft - soft.detach())


def keep_entropy(keep_logits: Tensor, valid: Tensor, counted: Tensor) -> Tensor:
    """Mean over rows of the mean entropy of their keep probabilities, as `functional.budget_loss` counts rows.

    Args:
        keep_logits: `(B, N, 2)` float, index 0 means keep.
        valid: `(B, N)` bool, the tokens of each row that are judged.
        counted: `(B,)` bool; rows where it is false add 0 but stay in the mean.

    Returns:
        Scalar float32, at least 0 and at most log 2.
    """
    margin = keep_logits[..., 0].float() - keep_logits[..., 1].float()
    keep = margin.sigmoid()
    entropy = (keep * F.softplus(-margin) + (1 - keep) * F.softplus(margin)) * valid
    return (entropy.sum(dim=-1) / valid.sum(dim=-1).clamp(min=1) * counted).mean()
