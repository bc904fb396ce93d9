"""`dynamic-llava compare RUN...`: evaluations side by side with the paper's figures.

Writes `compare.md` and `compare.html` and prints the former. A figure that differs from the paper's by more than the
tolerance is marked ▲ (higher) or ▼ (lower); dense models are compared with the paper's dense row, others with I|T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Command, option
from ..errors import run_command
from ..files import output_folder, write_atomically
from ..reading import read_json_object
from .compare_page import Comparison, Section, render_html, render_markdown
from .compare_runs import Run, load_runs
from .llava_prompts import OCR_TASK, TEXTS
from .tables import MISSING, scaled

ASKED_OTHERWISE = {OCR_TASK, *TEXTS}
PAPER = Path(__file__).with_name("paper.json")
HIGHER, LOWER = "▲", "▼"
COSTS = {
    "image_tokens_kept": "image tokens kept",
    "output_tokens_kept": "output tokens kept",
    "prefill_ms": "prefill ms",
    "decode_ms": "decode ms",
    "prefill_flops": "prefill FLOPs",
    "kv_bytes": "KV bytes",
}


def compare(runs: Sequence[Run], paper: dict[str, Any], tolerance: float = 0.01) -> Comparison:
    """All tables.

    Args:
        runs: the evaluations; the first is what further metrics are compared with.
        paper: content of `paper.json`.
        tolerance: relative difference from the paper above which a figure is marked.
    """
    limits = [(run.label, run.results["options"].get("limit")) for run in runs]
    notes = [f"{label}: only the first {limit} documents of each task." for label, limit in limits if limit]
    notes += _picture_notes(runs)
    sections = [
        _paper_section(runs, paper, tolerance, notes),
        _metrics_section(runs, paper),
        _efficiency_section(runs),
        _settings_section(runs),
        _costs_section(paper),
    ]
    title = f"{', '.join(run.label for run in runs)} beside the paper"
    source = paper["source"]
    notes.append(f"Paper: {source['paper']}, {source['url']}.")
    return Comparison(title, [section for section in sections if section.rows], list(dict.fromkeys(notes)))


def _picture_notes(runs: Sequence[Run]) -> list[str]:
    """What sets runs apart from the paper, and perhaps from one another, in how pictures become square."""
    cut = [run.label for run in runs if run.aspect_ratio != "pad"]
    notes = [f"{label}: pictures cut to their middle; the paper pads them (--image-aspect-ratio pad)." for label in cut]
    if 0 < len(cut) < len(runs):
        notes.append("Runs that saw other pictures do not differ by their models alone.")
    return notes


def _paper_section(runs: Sequence[Run], paper: dict[str, Any], tolerance: float, notes: list[str]) -> Section:
    source = paper["source"]
    header = ["Benchmark", source["dense"], source["ours"], *(run.label for run in runs)]
    rows = []
    for benchmark in paper["benchmarks"]:
        digits = benchmark["digits"]
        cells = [(f"{benchmark[row]:.{digits}f}", "paper") for row in ("dense", "ours")]
        found = [_measured(run, benchmark, notes) for run in runs]
        if any(value is not None for value in found):
            cells += [
                (MISSING, "") if value is None else _beside(value, benchmark[run.row], digits, tolerance)
                for run, value in zip(runs, found, strict=True)
            ]
            rows.append([(benchmark["name"], benchmark["note"] or ""), *cells])
    return Section("Beside the paper", header, rows)


def _measured(run: Run, benchmark: dict[str, Any], notes: list[str]) -> float | None:
    """The run's figure in the paper's unit; what makes it another measure than the paper's goes into `notes`."""
    for measure in benchmark["measures"]:
        value = run.results["metrics"].get(measure["task"], {}).get(measure["metric"])
        if value is not None:
            if measure["note"]:
                notes.append(f"{benchmark['name']} here: {measure['note']}.")
            if measure["task"] in ASKED_OTHERWISE and not run.results["options"].get("llava_prompts"):
                notes.append(f"{run.label}: {benchmark['name']} by lmms-eval's prompt; --llava-prompts writes LLaVA's.")
            return value * measure["scale"]
    return None


def _beside(value: float, reference: float, digits: int, tolerance: float) -> tuple[str, str]:
    difference = value - reference
    marked = abs(difference) > tolerance * abs(reference)
    mark = f" {HIGHER if difference > 0 else LOWER}" if marked else ""
    return f"{value:.{digits}f}{mark}", f"{difference:+.{digits}f}"


def _metrics_section(runs: Sequence[Run], paper: dict[str, Any]) -> Section:
    """Every metric that the first table does not show, with the difference from the first run that has it."""
    shown = {(m["task"], m["metric"]) for benchmark in paper["benchmarks"] for m in benchmark["measures"]}
    names = [
        (task, metric)
        for run in runs
        for task, metrics in run.results["metrics"].items()
        for metric in metrics
        if (task, metric) not in shown and not metric.endswith("_stderr")
    ]
    rows = []
    for task, metric in dict.fromkeys(names):
        values = [run.results["metrics"].get(task, {}).get(metric) for run in runs]
        first = next((value for value in values if value is not None), None)
        if first is None:
            continue
        base = values.index(first)
        cells = [
            (MISSING, "") if value is None else (f"{value:,.4g}", "" if index == base else f"{value - first:+,.4g}")
            for index, value in enumerate(values)
        ]
        rows.append([(f"{task} {metric}", ""), *cells])
    return Section("Further metrics", ["Metric", *(run.label for run in runs)], rows)


def _efficiency_section(runs: Sequence[Run]) -> Section:
    """What the answers cost, per request, with the ratio to the first run that has the task."""
    efficiency = [run.results.get("efficiency", {}) for run in runs]
    rows = []
    for task in dict.fromkeys(task for tasks in efficiency for task in tasks):
        for name, label in COSTS.items():
            values = [tasks.get(task, {}).get(name) for tasks in efficiency]
            known = [value for value in values if value is not None]
            if known:
                base = values.index(known[0])
                cells = [
                    (MISSING, "")
                    if value is None
                    else (scaled(value), f"×{value / known[0]:.2f}" if index != base and known[0] else "")
                    for index, value in enumerate(values)
                ]
                rows.append([(f"{task} {label}", ""), *cells])
    return Section("Cost per request", ["", *(run.label for run in runs)], rows)


def _settings_section(runs: Sequence[Run]) -> Section:
    """What was evaluated how; a setting in which the runs differ is marked."""
    columns = [
        {"model": run.results["model"], "image_aspect_ratio": run.aspect_ratio}
        | run.results["settings"]
        | run.results["options"]
        for run in runs
    ]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name) for column in columns]
        differs = any(value != values[0] for value in values)
        shown = [(MISSING if value is None else _plain(value), "") for value in values]
        rows.append([(name, "differs" if differs else ""), *shown])
    return Section("Settings", ["", *(run.label for run in runs)], rows)


def _costs_section(paper: dict[str, Any]) -> Section:
    rows = [
        [(cost["name"], cost["unit"]), (f"{cost['dense']:g}", "paper"), (f"{cost['ours']:g}", "paper")]
        for cost in paper["costs"]
    ]
    return Section("Cost in the paper", ["", paper["source"]["dense"], paper["source"]["ours"]], rows)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass
class CompareOptions:
    """What is compared."""

    runs: list[str] = option(help="results.json of evaluations, or the folders that hold them", positional=True)
    output: str | None = option(None, "folder for compare.md and .html (that of the first run)")
    tolerance: float = option(0.01, "relative difference from the paper that is marked", "[0, 100]")


COMMAND = Command("compare", __doc__, (CompareOptions,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(run, arguments)


def run(words: Sequence[str] | None = None) -> None:
    """Compare what the command line names."""
    (args,) = COMMAND.parse(words)
    runs = load_runs(args.runs)
    comparison = compare(runs, read_json_object(PAPER, "record of the paper's figures"), args.tolerance)
    folder = output_folder(args.output or runs[0].path.parent)
    markdown = render_markdown(comparison)
    for name, page in (("compare.md", markdown), ("compare.html", render_html(comparison))):
        write_atomically(folder / name, page.encode(errors="backslashreplace"))
    print(markdown)
    print(f"Written: {folder / 'compare.md'}, {folder / 'compare.html'}")
