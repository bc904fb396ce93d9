"""`python -m dynamic_llava.eval compare RUN...`: evaluations side by side with the paper's figures.

Writes `compare.md` and `compare.html` and prints the former. A figure that differs from the paper's by more than the
tolerance is marked ▲ (higher) or ▼ (lower); dense models are compared with the paper's dense row, others with I|T.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dynamic_llava

from .compare_page import Comparison, Section, render_html, render_markdown
from .llava_prompts import OCR_TASK, TEXTS
from .tables import MISSING, scaled

ASKED_OTHERWISE = {OCR_TASK, *TEXTS}
PAPER = Path(dynamic_llava.__file__).resolve().parent.parent / "eval" / "expected" / "paper.json"
RESULTS = "results.json"
HIGHER, LOWER = "▲", "▼"
COSTS = {
    "image_tokens_kept": "image tokens kept",
    "output_tokens_kept": "output tokens kept",
    "prefill_ms": "prefill ms",
    "decode_ms": "decode ms",
    "prefill_flops": "prefill FLOPs",
    "kv_bytes": "KV bytes",
}


@dataclass(frozen=True)
class Run:
    """One evaluation: how it is called in the tables, and the content of its `results.json`."""

    label: str
    path: Path
    results: dict[str, Any]

    @property
    def aspect_ratio(self) -> str:
        """How pictures became square; versions that did not note it cut out the middle."""
        return self.results.get("image_aspect_ratio") or "square"

    @property
    def row(self) -> str:
        """The paper's row that it is compared with: `dense` or `ours`."""
        return "dense" if self.results.get("dense") else "ours"


def find_results(run: str | Path) -> Path:
    """`results.json` of a run: the file, its folder, or the folder of the run that holds `eval`."""
    run = Path(run)
    for path in (run, run / RESULTS, run / "eval" / RESULTS):
        if path.is_file():
            return path
    raise FileNotFoundError(f"No {RESULTS} in {run} or {run / 'eval'}; evaluate it first or pass the --output folder.")


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs with labels of their own.

    Raises:
        FileNotFoundError: a run without results.
        ValueError: a file that is not what an evaluation writes.
    """
    files = [find_results(path) for path in paths]
    contents = []
    for file in files:
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON ({error}); evaluate again.") from error
        missing = [name for name in ("model", "metrics", "settings", "options") if name not in results]
        if missing:
            raise ValueError(f"{file} is not what an evaluation writes: it lacks {', '.join(missing)}.")
        contents.append(results)
    names = [Path(results["model"]).name or results["model"] for results in contents]
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if names.count(name) == 1 else f"{name} ({seen[name]})")
    return [Run(*parts) for parts in zip(labels, files, contents, strict=True)]


def compare(runs: Sequence[Run], paper: dict[str, Any], tolerance: float = 0.01) -> Comparison:
    """All tables.

    Args:
        runs: the evaluations; the first is what further metrics are compared with.
        paper: content of `eval/expected/paper.json`.
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
        first = next(value for value in values if value is not None)
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


def run(arguments: Sequence[str]) -> None:
    """The command line of `compare`."""
    parser = argparse.ArgumentParser(
        prog="python -m dynamic_llava.eval compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="results.json of evaluations, or the folders that hold them")
    parser.add_argument("--output", help="folder for compare.md and compare.html (default: that of the first run)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="relative difference that is marked (0.01)")
    args = parser.parse_args(arguments)
    if args.tolerance < 0:
        raise ValueError(f"--tolerance must be at least 0, got {args.tolerance}.")
    runs = load_runs(args.runs)
    comparison = compare(runs, json.loads(PAPER.read_text(encoding="utf-8")), args.tolerance)
    folder = Path(args.output) if args.output else runs[0].path.parent
    folder.mkdir(parents=True, exist_ok=True)
    markdown = render_markdown(comparison)
    (folder / "compare.md").write_text(markdown, encoding="utf-8")
    (folder / "compare.html").write_text(render_html(comparison), encoding="utf-8")
    print(markdown)
    print(f"Written: {folder / 'compare.md'}, {folder / 'compare.html'}")
