"""The evaluations that `compare` sets side by side: finding, reading and checking their `results.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reading import read_json_object
from ..values import is_finite

RESULTS = "results.json"


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
    contents = [_checked(read_json_object(file, "record of an evaluation"), file) for file in files]
    names = [Path(results["model"]).name or results["model"] for results in contents]
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if names.count(name) == 1 else f"{name} ({seen[name]})")
    return [Run(*parts) for parts in zip(labels, files, contents, strict=True)]


def _checked(results: dict[str, Any], file: Path) -> dict[str, Any]:
    """`results`, or `ValueError` where it is not what an evaluation writes into `file`."""
    missing = [name for name in ("model", "metrics", "settings", "options") if name not in results]
    if missing:
        raise ValueError(f"{file} is not what an evaluation writes: it lacks {', '.join(missing)}.")
    limit = results["options"].get("limit") if isinstance(results["options"], dict) else None
    fits = {
        "model": isinstance(results["model"], str),
        "settings": isinstance(results["settings"], dict),
        "options": isinstance(results["options"], dict) and (limit is None or type(limit) is int),
        "metrics": _are_figures(results["metrics"]),
        "efficiency": _are_figures(results.get("efficiency", {})),
    }
    for name in (name for name, fit in fits.items() if not fit):
        raise ValueError(f"{file} is not what an evaluation writes: {name} is {repr(results[name])[:80]}.")
    return results


def _are_figures(found: Any) -> bool:
    """Whether `found` is task -> name -> number, or None for what was not measured."""
    return isinstance(found, dict) and all(
        isinstance(entry, dict) and all(map(_is_figure, entry.values())) for entry in found.values()
    )


def _is_figure(value: Any) -> bool:
    # NaN and infinity may have been measured.
    return value is None or type(value) is float or (type(value) is int and is_finite(value))
