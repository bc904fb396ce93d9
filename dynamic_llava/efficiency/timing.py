"""Pairs of timings, taken in turns so that whatever else the machine does hits both sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

LEAST_PAIRS = 5


@dataclass
class PairedTimes:
    """Seconds of the dense and of our calls, in pairs taken one after the other."""

    dense: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Ours over dense of each pair."""
        return [ours / dense for dense, ours in zip(self.dense, self.ours, strict=True)]

    def summary(self) -> dict[str, dict[str, float] | int]:
        """Median and interquartile range of both sides in seconds, and of the ratios of pairs (ours / dense)."""
        return {
            "pairs": len(self.dense),
            "dense_s": spread(self.dense),
            "ours_s": spread(self.ours),
            "ratio": spread(self.ratios),
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range (0 for a single value)."""
    if len(values) < 2:
        return {"median": values[0], "iqr": 0.0}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "iqr": high - low}


def time_pairs(
    dense: Callable[[], object],
    ours: Callable[[], object],
    *,
    pairs: int,
    warmup: int,
    seconds: float,
    device: torch.device,
) -> PairedTimes:
    """Call both sides `warmup + pairs` times in turns and time the last `pairs`.

    Every other pair starts with ours, so that neither side always finds the caches as the other has left them. Once
    the counted pairs have taken `seconds`, `LEAST_PAIRS` of them are enough.
    """
    times = PairedTimes()
    for number in range(warmup + pairs):
        order = (("dense", dense), ("ours", ours))
        for name, call in order if number % 2 == 0 else order[::-1]:
            taken = _time(call, device)
            if number >= warmup:
                getattr(times, name).append(taken)
        if len(times.ours) >= LEAST_PAIRS and sum(times.dense) + sum(times.ours) > seconds:
            break
    return times


def _time(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
