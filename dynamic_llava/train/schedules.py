"""Schedules of the sparsification stage, functions of the fraction of training done."""

from __future__ import annotations


def gumbel_tau(progress: float, start: float = 1.0, end: float = 0.1) -> float:
    """Exponential decay of the Gumbel temperature from `start` to `end` (paper, implementation details).

    Args:
        progress: fraction of optimizer steps done, clipped to [0, 1].
        start, end: temperatures above 0.
    """
    return start * (end / start) ** min(max(progress, 0.0), 1.0)
