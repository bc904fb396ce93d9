"""Samples from JSON files and from tables: parquet files and folders that `datasets` saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pictures import StoredPicture

if TYPE_CHECKING:
    import datasets
    import pyarrow

ROWS = 1000


def read_json(path: Path) -> list[Any]:
    """Returns the samples of a LLaVA JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a non-empty JSON list.
    """
    samples = _parse(_text(path), str(path))
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"{path} must hold a non-empty JSON list of samples, found {type(samples).__name__}")
    return samples


def read_json_lines(path: Path) -> list[Any]:
    """Returns the samples of a file with one JSON object per line; errors as `read_json`."""
    lines = enumerate(_text(path).split("\n"), 1)
    samples = [_parse(line, f"line {number} of {path}") for number, line in lines if line.strip()]
    if not samples:
        raise ValueError(f"{path} must hold a sample on each line, found none")
    return samples


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}; give the path of a LLaVA conversation JSON")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); is the download complete?") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error}); is the download complete?") from error


def read_parquet(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns the samples of parquet files, see `table_samples`; `datasets` keeps them mapped in its cache."""
    library = _datasets()
    import pyarrow

    try:
        table = library.Dataset.from_parquet([str(path) for path in paths])
    except (library.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{', '.join(map(str, paths))} cannot be read as parquet ({reason})") from error
    return table_samples(table, ", ".join(map(str, paths)))


def read_saved(folder: Path) -> list[dict[str, Any]]:
    """Returns the samples of a folder written by `Dataset.save_to_disk`, see `table_samples`.

    Raises:
        ValueError: the folder holds several splits.
    """
    table = _datasets().load_from_disk(str(folder))
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
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
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
