"""Schedules of the sparsification stage, functions of the fraction of training done."""

from __future__ import annotations

import math
import random

KEEP_RATE_SCHEDULES = ("constant", "linear", "cosine")


def gumbel_tau(progress: float, start: float = 1.0, end: float = 0.1) -> float:
    """Exponential decay of the Gumbel temperature from `start` to `end` (paper, implementation details).

    Args:
        progress: fraction of optimizer steps done, clipped to [0, 1].
        start, end: temperatures above 0.
    """
    return start * (end / start) ** _clip(progress)


def keep_rate(progress: float, target: float, schedule: str = "constant", ramp: float = 0.5) -> float:
    """Fraction kept at a moment of training: from 1.0 down to `target` within the first `ramp` of it, then `target`.

    Args:
        progress: fraction of optimizer steps done, clipped to [0, 1].
        target: in (0, 1].
        schedule: `constant` (paper) is `target` throughout, `linear` and `cosine` go down to it.
        ramp: in (0, 1].
    """
    if schedule == "constant":
        return target
    done = _clip(progress / ramp)
    if schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return 1 + (target - 1) * done


def draw_rate(low: float, high: float, seed: int, step: int) -> float:
    """The rate of one optimizer step, uniform in [low, high]: the same on every rank and after a resume."""
    return random.Random(f"{seed}/{step}").uniform(low, high)


def _clip(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)
