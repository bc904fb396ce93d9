"""The tables of a measurement: medians, and ratios of pairs ± half their interquartile range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """One table for each mode that was measured."""
    machine = report["machine"]
    where = f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    size = f"{report['model']['parameters'] / 1e6:.3g} M parameters, {report['options']['dtype']}"
    for mode, build in (("prefill", _prefill), ("decode", _decode), ("no_cache", _no_cache), ("peak", _peak)):
        if report.get(mode):
            table = build(report[mode])
            table.caption = f"{size}; {where}"
            yield table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _prefill(cases: list[dict[str, Any]]) -> Table:
    table = _table("Time to first token", "rows", "text", "dense ms", "ours ms", "ratio", "FLOP ratio", "of promise")
    for case in cases:
        table.add_row(
            str(case["batch"]),
            str(case["text_tokens"]),
            *_milliseconds(case["time"]),
            ratio_text(case["time"]["ratio"]),
            f"{case['flops']['ratio']:.3f}",
            f"{case['share_of_promise']:.2f}",
        )
    return table


def _decode(cases: list[dict[str, Any]]) -> Table:
    columns = ("rows", "at", "dense ms", "ours ms", "ratio", "tokens/s", "KV MB", "KV ratio", "kept")
    table = _table("Decode step with cache at an output length", *columns)
    for case in cases:
        speed, kv = case["tokens_per_s"], case["kv_bytes"]
        table.add_row(
            str(case["batch"]),
            str(case["output_length"]),
            *_milliseconds(case["time"]),
            ratio_text(case["time"]["ratio"]),
            f"{speed['dense']:.1f} {speed['ours']:.1f}",
            f"{kv['dense'] / 1e6:.0f} {kv['ours'] / 1e6:.0f}",
            f"{kv['ratio']:.3f}",
            f"{case['realised_output_keep_rate']:.2f}",
        )
    return table


def _no_cache(cases: list[dict[str, Any]]) -> Table:
    table = _table("Generation without cache", "rows", "length", "dense s", "ours s", "ratio", "FLOP ratio")
    for case in cases:
        total = case["total_s"]
        table.add_row(
            str(case["batch"]),
            str(case["output_length"]),
            f"{total['dense']:.1f}",
            f"{total['ours']:.1f}",
            f"{total['ratio']:.3f}",
            f"{case['flops']['ratio']:.3f}",
        )
    return table


def _peak(cases: list[dict[str, Any]]) -> Table:
    table = _table("Peak memory, MB", "rows", "at", "dense", "ours", "above weights: dense", "ours")
    for case in cases:
        dense, ours = case["dense"], case["ours"]
        rows = [("prefill", dense["prefill_peak_bytes"], ours["prefill_peak_bytes"])]
        for left, right in zip(dense["points"], ours["points"], strict=True):
            rows.append((str(left["output_length"]), left["peak_bytes"], right["peak_bytes"]))
        for name, left, right in rows:
            above = (left - dense["loaded_bytes"], right - ours["loaded_bytes"])
            table.add_row(str(case["batch"]), name, *(f"{value / 1e6:.0f}" for value in (left, right, *above)))
    return table


def _milliseconds(time: dict[str, Any]) -> tuple[str, str]:
    return f"{1e3 * time['dense_s']['median']:.1f}", f"{1e3 * time['ours_s']['median']:.1f}"


def ratio_text(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f}±{spread['iqr'] / 2:.3f}"
