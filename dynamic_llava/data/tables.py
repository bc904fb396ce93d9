"""Samples from JSON files and from tables: parquet files and folders that `datasets` saved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import reading
from .pictures import StoredPicture

if TYPE_CHECKING:
    import datasets
    import pyarrow

ROWS = 1000
DATA_FILE = "data file of LLaVA conversations"


def read_json(path: Path) -> list[Any]:
    """Returns the samples of a LLaVA JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `reading.read_json`, or the file is not a non-empty JSON list.
    """
    samples = reading.read_json(path, DATA_FILE)
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"{path} must hold a non-empty JSON list of samples, found {type(samples).__name__}")
    return samples


def read_json_lines(path: Path) -> list[Any]:
    """Returns the samples of a file with one JSON object per line; errors as `read_json`."""
    # Line ends of Unix, Windows and old Macs: inside JSON's strings none of them can stand as it is.
    lines = enumerate(re.split(r"\r\n|\n|\r", reading.read_text(path, DATA_FILE)), 1)
    samples = [reading.parse_json(line, f"line {number} of {path}") for number, line in lines if line.strip()]
    if not samples:
        raise ValueError(f"{path} must hold a sample on each line, found none")
    return samples


def read_parquet(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns the samples of parquet files, see `table_samples`; `datasets` keeps them mapped in its cache.

    Raises:
        FileNotFoundError, ValueError: a file that is not there, is none, or is damaged.
        ImportError: no `datasets`.
    """
    library = _datasets()
    source = ", ".join(map(str, paths))
    with _damage(source, "as parquet"):
        table = library.Dataset.from_parquet([str(reading.regular_file(path, DATA_FILE)) for path in paths])
    return table_samples(table, source)


def read_saved(folder: Path) -> list[dict[str, Any]]:
    """Returns the samples of a folder written by `Dataset.save_to_disk`, see `table_samples`.

    Raises:
        ValueError: the folder holds several splits, or is damaged.
        ImportError: no `datasets`.
    """
    library = _datasets()
    for path in folder.rglob("*"):
        if not path.is_dir():
            reading.regular_file(path, DATA_FILE)
    with _damage(str(folder), "as a folder of datasets.save_to_disk"):
        table = library.load_from_disk(str(folder))
    if isinstance(table, dict):
        if len(table) > 1:
            raise ValueError(
                f"{folder} holds the splits {', '.join(table)}; give one of them: {folder / next(iter(table))}"
            )
        table = next(iter(table.values()))
    return table_samples(table, str(folder))


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Reading parquet and saved data sets takes `datasets`: pip install datasets") from error
    return datasets


@contextmanager
def _damage(source: str, kind: str) -> Iterator[None]:
    """`ValueError` for whatever `datasets` and pyarrow stumble over in a damaged file: they have no error for that."""
    try:
        yield
    except (MemoryError, FileNotFoundError):
        raise
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(f"{source} cannot be read {kind} ({reason}); copy or write it again") from error


def table_samples(table: datasets.Dataset, source: str) -> list[dict[str, Any]]:
    """Returns the rows as LLaVA samples; pictures stay in the table until they are opened.

    Args:
        table: rows of `conversations`, and perhaps `id` and `image` (or `images`): a path, `{"bytes", "path"}`, or a
            list of either.
        source: for messages.

    Raises:
        ValueError: no `conversations`, or no rows.
    """
    if "conversations" not in table.column_names or not len(table):
        raise ValueError(
            f"{source} has {len(table)} rows of the columns {', '.join(table.column_names)}; "
            "a row needs 'conversations', and 'image' where it has a picture"
        )
    column = next((name for name in ("image", "images") if name in table.column_names), None)
    names = [name for name in ("id", "conversations", column) if name in table.column_names]
    # Arrow's own format: pictures are neither decoded nor copied.
    table = table.select_columns(names).with_format("arrow")
    samples: list[dict[str, Any]] = []
    for batch in table.iter(batch_size=ROWS):
        with _damage(source, "as rows of 'conversations'"):
            conversations = batch.column("conversations").to_pylist()
            pictures = [None] * len(batch) if column is None else _names(batch.column(column).combine_chunks())
            ids = batch.column("id").to_pylist() if "id" in names else [None] * len(batch)
        for own_id, turns, named in zip(ids, conversations, pictures, strict=True):
            row = len(samples)
            name = f"#{row}" if own_id is None else str(own_id)
            several = named if isinstance(named, list) else [] if named is None else [named]
            image = [
                TablePicture(table, column, row, place, f"{place} of row {row} in {source}")
                if entry is STORED
                else entry
                for place, entry in enumerate(several)
                if entry is not None
            ]
            samples.append({"id": name, "image": image, "conversations": _turns(turns)})
    return samples


STORED = object()


def _names(array: pyarrow.Array) -> list[Any]:
    """Returns what an image column holds, without reading bytes: per row None, a path, `STORED`, or a list of these."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        flat, rows, start = _names(array.flatten()), [], 0
        for length in pc.list_value_length(array).to_pylist():
            rows.append(flat[start : start + (length or 0)])
            start += length or 0
        return rows
    if pa.types.is_struct(array.type):
        fields = {array.type.field(index).name for index in range(array.type.num_fields)}
        stored = pc.struct_field(array, "bytes").is_valid().to_pylist() if "bytes" in fields else [False] * len(array)
        paths = pc.struct_field(array, "path").to_pylist() if "path" in fields else [None] * len(array)
        return [STORED if inside else path for inside, path in zip(stored, paths, strict=True)]
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        return [STORED if valid else None for valid in array.is_valid().to_pylist()]
    return array.to_pylist()


def _turns(value: Any) -> Any:
    """Returns turns as a list, which older versions of `datasets` keep as `{"from": [...], "value": [...]}`."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return value


@dataclass(frozen=True, eq=False)
class TablePicture(StoredPicture):
    """A picture in a row of a table."""

    table: datasets.Dataset
    column: str
    row: int
    place: int
    name: str

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        value = self.table[self.row].column(self.column)[0].as_py()
        value = value[self.place] if isinstance(value, list) else value
        return value["bytes"] if isinstance(value, dict) else value
