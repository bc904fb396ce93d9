"""Time and memory against output length (the paper's Figure 1)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..packages import require_package

SIDES = (("dense", "LLaVA", "#8a8f98", "o"), ("ours", "Dynamic-LLaVA", "#c2410c", "s"))


def plot_report(report: dict[str, Any], path: Path) -> Path | None:
    """Write a picture with one row of panels for each batch size; None, with a notice, where that cannot be."""
    batches = sorted({case["batch"] for case in report.get("decode", [])})
    if not batches:
        print("no plot: it needs the mode decode", file=sys.stderr)
        return None
    try:
        require_package("matplotlib", "The plot")
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4 * len(batches)), layout="constrained")
    panels = figure.subplots(len(batches), 3, squeeze=False)
    for batch, row in zip(batches, panels, strict=True):
        cases = [case for case in report["decode"] if case["batch"] == batch]
        _draw(row[0], f"Time per output token, batch {batch}", "ms", step_times(cases))
        prefill = [case for case in report.get("prefill", []) if case["batch"] == batch]
        what = "Time of the generation" if prefill else "Time without prefill"
        _draw(row[1], f"{what}, batch {batch}", "s", generation_times(cases, prefill))
        peaks = [case for case in report.get("peak", []) if case["batch"] == batch]
        _draw(row[2], f"Memory, batch {batch}", "MB", kv_memory(cases))
        if peaks:
            _draw(row[2], row[2].get_title(), "MB", peak_memory(peaks[0]), style="--", suffix=", peak above weights")
            for side, label, color, _ in SIDES:
                row[2].lines[[s[0] for s in SIDES].index(side)].set(label=f"{label}, KV cache", color=color)
        row[2].legend(frameon=False, fontsize=8)
    machine = report["machine"]
    figure.suptitle(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads", fontsize=9)
    figure.savefig(path, dpi=150)
    return path


Curves = dict[str, tuple[list[float], list[float]]]


def step_times(cases: list[dict[str, Any]]) -> Curves:
    """Median milliseconds of a step against the output length, by side."""
    lengths = [case["output_length"] for case in cases]
    return {side: (lengths, [1e3 * case["time"][f"{side}_s"]["median"] for case in cases]) for side, *_ in SIDES}


def generation_times(cases: list[dict[str, Any]], prefill: list[dict[str, Any]]) -> Curves:
    """Seconds up to each output length: prefill, and the measured step times joined by straight lines."""
    curves = {}
    for side, *_ in SIDES:
        lengths, steps = step_times(cases)[side]
        total = prefill[0]["time"][f"{side}_s"]["median"] if prefill else 0.0
        # Up to the first length looked at, its step time stands for all.
        points, last_length, last_step = [total], 0, steps[0]
        for length, step in zip(lengths, steps, strict=True):
            total += (length - last_length) * (last_step + step) / 2e3
            points.append(total)
            last_length, last_step = length, step
        curves[side] = ([0, *lengths], points)
    return curves


def kv_memory(cases: list[dict[str, Any]]) -> Curves:
    """Megabytes held by the cache, by side."""
    lengths = [case["output_length"] for case in cases]
    return {side: (lengths, [case["kv_bytes"][side] / 1e6 for case in cases]) for side, *_ in SIDES}


def peak_memory(case: dict[str, Any]) -> Curves:
    """Megabytes of the peak beyond the loaded weights, by side."""
    curves = {}
    for side, *_ in SIDES:
        points = case[side]["points"]
        above = [(point["peak_bytes"] - case[side]["loaded_bytes"]) / 1e6 for point in points]
        curves[side] = ([point["output_length"] for point in points], above)
    return curves


def _draw(panel, title: str, unit: str, curves: Curves, style: str = "-", suffix: str = "") -> None:
    for side, label, color, marker in SIDES:
        panel.plot(*curves[side], style, marker=marker, markersize=4, color=color, label=label + suffix)
    panel.set(title=title, xlabel="output tokens", ylabel=unit)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
