"""What a number may be; stdlib alone."""

from __future__ import annotations

import sys


def is_finite(value: float) -> bool:
    """Whether a number of any type is finite as a float: NaN is not at most the largest, nor is what no float holds."""
    return abs(value) <= sys.float_info.max
