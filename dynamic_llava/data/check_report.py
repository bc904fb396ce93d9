"""The report of `check_data` as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .check import PROBLEMS

SOURCE_ROWS = {
    "weight": "weight",
    "rows": "rows",
    "malformed": "malformed",
    "left_out_text_only": "text only, left out",
    "text_only": "text only",
    "one_picture": "with one picture",
    "several_pictures": "with several pictures",
    "samples_per_epoch": "samples per epoch",
    "pictures": "different pictures",
}


def print_report(report: dict[str, Any], console: Console) -> None:
    """Prints what the check found; examples stand on one line each, whatever the width."""
    for table in (_sources(report), _lengths(report), _findings(report)):
        console.print(table)
    judged = report["judged"]
    console.print(
        f"Judged in an epoch: {judged['judged']:,} of {judged['answers']:,} answers are long enough for the output "
        f"predictor, {judged['image_rows']:,} samples have an image for the image predictor.",
        soft_wrap=True,
        highlight=False,
    )
    for kind, finding in report["findings"].items():
        if finding["examples"]:
            lines = [f"\n{kind} ({finding['count']:,}), the first:", *(f"  {text}" for text in finding["examples"])]
            console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


def _sources(report: dict[str, Any]) -> Table:
    table = Table(title="Data", title_justify="left")
    table.add_column("")
    for source in report["sources"]:
        table.add_column(source["path"], justify="right", overflow="fold")
    for key, name in SOURCE_ROWS.items():
        table.add_row(name, *(_show(source[key]) for source in report["sources"]))
    return table


def _lengths(report: dict[str, Any]) -> Table:
    title = f"Tokens per sample before the cut at {report['max_length']}, {report['tokens_per_picture']} per picture"
    lengths = {**report["lengths"], "per epoch, after the cut": report["lengths"]["total"]}
    del lengths["total"]
    table = Table(title=title, title_justify="left")
    for name in lengths:
        table.add_column(name, justify="right")
    table.add_row(*(_show(round(value)) for value in lengths.values()))
    return table


def _findings(report: dict[str, Any]) -> Table:
    table = Table(title="Findings", title_justify="left")
    table.add_column("kind")
    table.add_column("count", justify="right")
    for kind, finding in report["findings"].items():
        bad = kind in PROBLEMS and finding["count"] > 0
        table.add_row(kind, _show(finding["count"]), style="red" if bad else "")
    return table


def _show(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
