"""What a number may be; stdlib alone."""

from __future__ import annotations

import sys
from typing import Any

# More than any size of a model; their products still fit the sizes of tensors.
MOST_SIZE = 2**31 - 1


def is_finite(value: Any) -> bool:
    """Whether a number of any type is finite as a float: NaN is not at most the largest, nor is what no float holds."""
    return abs(value) <= sys.float_info.max
