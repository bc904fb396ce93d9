"""Finding and reading the files of official downloads."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Source:
    """Where a benchmark's downloads lie, and where images that come inside a table are written.

    Args:
        root: LLaVA's `playground/data/eval`, or the folder of the one benchmark.
        folder: the benchmark's folder below `playground/data/eval`.
        images: folder for images that are unpacked from a table.
    """

    root: Path
    folder: str
    images: Path

    def find(self, *candidates: str) -> Path:
        """The first of `candidates` (paths or patterns) that is there, else `FileNotFoundError` naming them."""
        for base in (self.root / self.folder, self.root):
            for candidate in candidates:
                matches = sorted(base.glob(candidate))
                if matches:
                    return matches[0]
        raise FileNotFoundError(f"Found none of {', '.join(candidates)} in {self.root} or {self.root / self.folder}.")

    def optional(self, *candidates: str) -> Path | None:
        """As `find`, None where there is none."""
        try:
            return self.find(*candidates)
        except FileNotFoundError:
            return None


def read_json(path: Path) -> Any:
    """Content of a JSON file; `ValueError` names a broken one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again.") from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines; `ValueError` names the broken line."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path} line {number} is not JSON ({error}); download it again.") from error


def read_table(path: Path, delimiter: str) -> Iterator[dict[str, str | None]]:
    """Rows of a table with a header; empty cells are None."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, delimiter=delimiter):
            yield {name: value or None for name, value in row.items()}


def column(row: dict[str, Any], name: str, path: Path) -> Any:
    """`row[name]`, or `ValueError` naming the file, the column and what there is."""
    if name not in row:
        raise ValueError(f"{path} has no {name!r} in {sorted(row)}; is it the official file?")
    return row[name]
