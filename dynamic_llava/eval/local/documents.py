"""Documents of a benchmark as JSON lines with image paths: written by `prepare`, read in place of a hub dataset."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ...data.opening import open_picture
from ...reading import inside, parse_json, read_text

IMAGE_COLUMN = "image"


def write_documents(path: Path, documents: Iterable[dict[str, Any]]) -> int:
    """Write one document per line, atomically; image paths below the file's folder become relative. Returns the count.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: there are no documents.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    try:
        with unfinished.open("wb") as file:
            count = 0
            for document in documents:
                line = json.dumps(_with_relative_images(document, path), ensure_ascii=False) + "\n"
                # Half a surrogate pair is text in JSON, and in no file.
                file.write(line.encode(errors="backslashreplace"))
                count += 1
        if not count:
            raise ValueError(f"The source of {path.stem} holds no documents.")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def _with_relative_images(document: dict[str, Any], path: Path) -> dict[str, Any]:
    for image in _images(document):
        if not Path(image).is_file():
            raise FileNotFoundError(
                f"The image {image} of {path.stem} is missing; unpack the benchmark's images there."
            )
    return {**document, IMAGE_COLUMN: _map_images(document, lambda image: _relative(image, path.parent))}


def read_documents(path: Path, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The documents of `path` with absolute image paths.

    Args:
        path: file of JSON lines.
        required: columns that every document must fill.

    Raises:
        FileNotFoundError: the file, or an image that it names, is missing.
        ValueError: a line is not a JSON object, a required column is missing or empty, or an image's name leads out of
            the file's folder without being a whole path.
    """
    documents = []
    for number, line in enumerate(read_text(path, "file of documents").split("\n"), start=1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        document = parse_json(line, where)
        if not isinstance(document, dict):
            raise ValueError(f"{where} is {type(document).__name__}, not a JSON object; prepare the file again.")
        for column in required:
            if document.get(column) in (None, "", []):
                raise ValueError(f"{where}: the document has no {column!r}; complete or remove it.")
        # Whole paths are those of pictures that lie outside, which `write_documents` gives.
        place = partial(inside, path.parent, where=f"{where}: 'image'", or_absolute=True)
        document[IMAGE_COLUMN] = _map_images(document, lambda image, place=place: str(place(image)))
        for image in _images(document):
            if not Path(image).is_file():
                raise FileNotFoundError(f"{where} names a missing image: {image}.")
        documents.append(document)
    if not documents:
        raise ValueError(f"{path} is empty; prepare the file again.")
    return documents


def image_dataset(documents: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """A dataset whose image column decodes the paths of `documents`, one image or a list of them each."""
    # From a list: the JSON reader of `datasets` would turn answers that look like dates into timestamps.
    try:
        table = datasets.Dataset.from_list(list(documents))
    except (ValueError, TypeError, OverflowError) as error:
        # Of pyarrow: a column holds text in one line and a list in another, or a number of more than 64 bits.
        raise ValueError(f"The documents do not fit into one table ({error}); prepare the file again.") from error
    several = any(isinstance(document[IMAGE_COLUMN], list) for document in documents)
    return table.cast_column(IMAGE_COLUMN, datasets.List(Picture()) if several else Picture())


@dataclass
class Picture(datasets.Image):
    """Changes from `datasets.Image`:
    - a path is opened as every picture of ours is: no formats but those that are meant, bounded sizes, upright RGB.
    """

    def decode_example(self, value: dict[str, Any], token_per_repo_id: dict[str, Any] | None = None) -> Image.Image:
        """The picture of `{"path"}`."""
        return open_picture(value["path"]) if isinstance(value, dict) else value


def _images(document: dict[str, Any]) -> list[Any]:
    value = document.get(IMAGE_COLUMN)
    return value if isinstance(value, list) else [] if value is None else [value]


def _map_images(document: dict[str, Any], change) -> Any:
    value = document.get(IMAGE_COLUMN)
    if isinstance(value, list):
        return [change(image) for image in value]
    return None if value is None else change(value)


def _relative(image: Path | str, folder: Path) -> str:
    image, folder = Path(image).resolve(), folder.resolve()
    return str(image.relative_to(folder) if image.is_relative_to(folder) else image)
