"""Finding and reading the files of official downloads: every row knows where it stands, every name is checked."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from dynamic_llava.data.opening import opened
from dynamic_llava.packages import require_package
from dynamic_llava.reading import inside, parse_json, read_json, read_text, regular_file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# A picture in base64 has a few of them.
LARGEST_CELL = 64 * 2**20


class BenchmarkAbsent(FileNotFoundError):
    """Nothing of a benchmark is there."""


@dataclass(frozen=True)
class Row:
    """One object of a download.

    Args:
        values: by name.
        where: file and row, as messages call them.
    """

    values: dict[str, Any]
    where: str

    def __post_init__(self) -> None:
        if not isinstance(self.values, dict):
            raise ValueError(f"{self.where} is a {type(self.values).__name__}, not an object; is it the official file?")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of `name` as it is, `default` where there is none."""
        return self.values.get(name, default)

    def value(self, name: str, kind: type | tuple[type, ...] = (str, int, float)) -> Any:
        """The value of `name` of the type `kind`, text or a number; `ValueError` where it is missing or another."""
        if name not in self.values:
            there = ", ".join(map(str, self.values))[:200]
            raise ValueError(f"{self.where} has no {name!r} among {there}; is it the official file?")
        value = self.values[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self.where}: {name!r} is {repr(value)[:60]}; is it the official file?")
        return value

    def text(self, name: str) -> str:
        """The text of `name`, which is not empty."""
        value = self.value(name, str)
        if not value.strip():
            raise ValueError(f"{self.where}: {name!r} is empty; download the file again.")
        return value

    def whole(self, name: str) -> int:
        """The whole number of `name`, at least 0, also where it is written as text."""
        value = self.value(name, (int, str))
        if not (isinstance(value, int) or (value.isascii() and value.isdecimal())) or not 0 <= int(value) < 2**63:
            raise ValueError(f"{self.where}: {name!r} must be a whole number, got {repr(value)[:60]}.")
        return int(value)

    def rows(self, name: str) -> Iterator[Row]:
        """The objects in the list of `name`."""
        return rows_of(self.value(name, list), f"{self.where}: {name}")

    def picture(self, folder: Path, name: str, pattern: str = "{}") -> Path:
        """The path below `folder` of the picture that `name` names, put into `pattern`."""
        return inside(folder, pattern.format(self.value(name)), f"{self.where}: {name!r}")


@dataclass(frozen=True)
class Source:
    """Where a benchmark's downloads lie, and where images that come inside a table are written.

    Args:
        root: LLaVA's `playground/data/eval`, or the folder of the one benchmark.
        folder: the benchmark's folder below `playground/data/eval`.
        images: folder for images that are unpacked from a table.
        skipped: rows that were left out, by reason; filled by the conversion.
        found: files and folders of the benchmark; filled by `find`.
    """

    root: Path
    folder: str
    images: Path
    skipped: dict[str, int] = field(default_factory=dict)
    found: list[Path] = field(default_factory=list)

    def find(self, *candidates: str) -> Path:
        """The first of `candidates` (paths or patterns) that is there, else `FileNotFoundError` naming them.

        Where nothing of the benchmark was found before, the error is `BenchmarkAbsent`.
        """
        path = self.optional(*candidates)
        if path is None:
            error = FileNotFoundError if self.found else BenchmarkAbsent
            raise error(f"Found none of {', '.join(candidates)} in {self.root} or {self.root / self.folder}.")
        self.found.append(path)
        return path

    def optional(self, *candidates: str) -> Path | None:
        """As `find`, None where there is none."""
        matches = (
            sorted(base.glob(candidate)) for base in (self.root / self.folder, self.root) for candidate in candidates
        )
        return next((found[0] for found in matches if found), None)

    def skip(self, reason: str) -> None:
        """Count a row that becomes no document."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def unpack(self, name: str, content: bytes, where: str) -> Path:
        """Write the bytes of a picture as `name` below `images`; `ValueError` where they are none, or the name is."""
        path = inside(self.images, name, where)
        with opened(BytesIO(content), f"of {where}"):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not through a link that happens to lie there.
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return path


def read_object(path: Path) -> Row:
    """The object of a JSON file."""
    return Row(read_json(path, "download"), str(path))


def read_named(path: Path) -> Iterator[tuple[str, Row]]:
    """The objects in the object of a JSON file, by name."""
    for name, values in read_object(path).values.items():
        yield name, Row(values, f"{path} entry {name!r}")


def read_list(path: Path) -> Iterator[Row]:
    """The objects of a JSON list."""
    values = read_json(path, "download")
    if not isinstance(values, list):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a list; is it the official file?")
    return rows_of(values, str(path))


def read_lines(path: Path) -> Iterator[Row]:
    """The objects of a file of JSON lines."""
    for number, line in enumerate(read_text(path, "download").split("\n"), start=1):
        if line.strip():
            yield Row(parse_json(line, f"{path} line {number}"), f"{path} line {number}")


def read_table(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows of a table with a header; empty cells are None."""
    csv.field_size_limit(LARGEST_CELL)
    with regular_file(path, "download").open(encoding="utf-8-sig", newline="") as file:
        lacking = object()
        reader = csv.DictReader(file, delimiter=delimiter, restval=lacking)
        number = 1
        try:
            for number, row in enumerate(reader, start=1):
                if None in row or lacking in row.values():
                    more = "more" if None in row else "fewer"
                    raise ValueError(f"{path} row {number} has {more} cells than the header; download it again.")
                yield Row({name: value or None for name, value in row.items()}, f"{path} row {number}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as a table behind row {number} ({error}).") from error


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a parquet file."""
    require_package("pyarrow", str(path))
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(regular_file(path, "download")).iter_batches(batch_size=64):
            for values in batch.to_pylist():
                number += 1
                yield Row(values, f"{path} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet behind row {number} ({error}).") from error


def rows_of(values: Iterable[Any], where: str) -> Iterator[Row]:
    """The objects of a list that stands at `where`."""
    return (Row(value, f"{where} row {number}") for number, value in enumerate(values, start=1))


def unique(rows: Iterable[Row], name: str) -> Iterator[Row]:
    """`rows`; `ValueError` at the second with the same value of `name`."""
    seen: set[Any] = set()
    for row in rows:
        value = row.value(name)
        if value in seen:
            raise ValueError(f"{row.where}: {name!r} {value!r} is there a second time; download the file again.")
        seen.add(value)
        yield row
