"""Evaluations as text: accuracy and what it costs, on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

MISSING = "–"
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def scaled(value: float) -> str:
    """Three digits and a unit: 2.45 T, 812 k."""
    for size, unit in UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def results_table(evaluation: Any) -> Table:
    """Metrics of an `Evaluation`, one row each."""
    table = Table(title=f"{evaluation.model}", title_style="bold")
    for column, justify in (("Task", "left"), ("Metric", "left"), ("Value", "right"), ("±", "right")):
        table.add_column(column, justify=justify)
    for task, metrics in evaluation.metrics.items():
        for name, value in metrics.items():
            if not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr")
                shown = f"{value:,.0f}" if value >= 100 else f"{value:.4f}"
                table.add_row(task, name, shown, "" if error is None else f"{error:.4f}")
        table.add_section()
    return table


def efficiency_table(efficiency: Mapping[str, Mapping[str, Any]]) -> Table:
    """What the answers of each task cost, per request; latencies are medians of whole `generate` calls."""
    sizes = sorted({entry["batch_size"] for entry in efficiency.values()})
    table = Table(title=f"Cost per request, batch size {', '.join(map(str, sizes))}", title_style="bold")
    columns = ("Task", "Image tokens", "Output tokens", "Prefill ms", "Decode ms", "Prefill FLOPs", "KV bytes")
    for column in columns:
        table.add_column(column, justify="left" if column == "Task" else "right", no_wrap=column == "Task")
    for task, entry in efficiency.items():
        table.add_row(
            task,
            _kept(entry, "image_tokens"),
            _kept(entry, "output_tokens"),
            _milliseconds(entry["prefill_ms"]),
            _milliseconds(entry["decode_ms"]),
            _against_dense(entry, "prefill_flops"),
            _against_dense(entry, "kv_bytes"),
        )
    return table


def _kept(entry: Mapping[str, Any], name: str) -> str:
    total, kept = entry[name], entry[f"{name}_kept"]
    return f"{total:,.4g}" if total == kept else f"{total:,.4g} → {kept:,.4g}"


def _milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.3g}"


def _against_dense(entry: Mapping[str, Any], name: str) -> str:
    return f"{scaled(entry[name])} (×{entry[name] / entry[f'{name}_dense']:.2f})"
