"""The offsets with which the output predictor keeps a fraction of the output tokens; stdlib alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from numbers import Real
from typing import Any

from .values import is_finite

#: Rates of a table that is made.
OFFSET_RATES = (0.01, 0.02, *(step / 20 for step in range(1, 20)), 0.98, 0.99)


def checked_offsets(table: Any) -> dict[str, float]:
    """`table` by rising rate; `ValueError` unless it maps rates in (0, 1), as text, to finite offsets that never fall.

    An offset is added to the first keep logit: the higher it is, the more tokens are kept.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"output_offsets must map rates to offsets, such as {{'0.5': 0.1}}, got {table!r}.")
    pairs = []
    for rate, offset in table.items():
        try:
            number = float(str(rate))
        except ValueError:
            number = 0.0
        real = isinstance(offset, Real) and not isinstance(offset, bool) and is_finite(offset)
        if not 0 < number < 1 or not real:
            raise ValueError(
                f"output_offsets must map rates in (0, 1) to numbers, got {rate!r}: {offset!r}; make the table anew "
                "(dynamic-llava checkpoints calibrate)."
            )
        pairs.append((number, float(offset)))
    pairs.sort()
    for (rate, low), (next_rate, high) in pairwise(pairs):
        if low > high or rate == next_rate:
            raise ValueError(
                f"output_offsets must rise with the rate, got {low:g} at {rate:g} and {high:g} at {next_rate:g}; make "
                "the table anew (dynamic-llava checkpoints calibrate)."
            )
    return {f"{rate:.12g}": offset for rate, offset in pairs}


def offset_at(table: Mapping[str, float], rate: float) -> float | None:
    """The offset of `rate` in a checked table, between two of its rates in proportion; None outside of them."""
    before = None
    for text, offset in table.items():
        there = float(text)
        if rate == there:
            return offset
        if rate < there:
            if before is None:
                return None
            return before[1] + (offset - before[1]) * (rate - before[0]) / (there - before[0])
        before = there, offset
    return None
