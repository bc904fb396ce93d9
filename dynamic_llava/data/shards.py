"""WebDataset shards: tar files of `key.json` beside `key.jpg`, read in place."""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reading import parse_json, regular_file
from .pictures import StoredPicture

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")


@dataclass(frozen=True, eq=False)
class ShardPicture(StoredPicture):
    """A picture inside an uncompressed tar file."""

    path: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_shard(path: Path) -> list[dict[str, Any]]:
    """Returns the samples of a shard; only the headers and the JSON are read.

    A sample is the members with one key, the name up to the first dot of its last part: `key.json` holds a LLaVA sample
    or its `conversations`; `key.jpg`, or `key.0.jpg`, `key.1.jpg`, ... in this order, are its pictures, none for text
    only. Other members are passed over.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an uncompressed tar file, cut short, no samples, two members of one name, or broken JSON.
    """
    members: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(regular_file(path, "shard"), "r:") as tar:
            end = path.stat().st_size
            for member in tar:
                if member.size < 0 or member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name!r} reaches beyond the end of the file")
                _add_member(members, tar, member, path)
    except (tarfile.TarError, EOFError, OverflowError, RecursionError, UnicodeError) as error:
        raise ValueError(
            f"{path} cannot be read as an uncompressed tar file ({error}); fetch it again, or unpack .gz with gunzip"
        ) from error
    if not members:
        raise ValueError(f"{path} has no samples; a shard holds key.json beside key.jpg")
    return [_sample(key, fields) for key, fields in members.items()]


def _add_member(members: dict[str, dict[str, Any]], tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Notes a member under its key; its name is no path, and nothing is ever unpacked."""
    folder, _, name = member.name.rpartition("/")
    stem, dot, field = name.partition(".")
    kind = field.rpartition(".")[2].lower()
    # The bytes of a sparse member do not lie in one piece.
    if not (member.isfile() and dot and stem) or member.issparse() or kind not in (*PICTURES, "json"):
        return
    fields = members.setdefault(f"{folder}/{stem}".lstrip("/"), {})
    if field in fields:
        raise ValueError(f"{path} has two members {member.name!r}; give every sample a key of its own")
    if kind == "json":
        fields[field] = parse_json(tar.extractfile(member).read(), f"{member.name} in {path}")
    else:
        fields[field] = ShardPicture(path, member.offset_data, member.size, f"{member.name} in {path}")


def _sample(key: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the sample of a key; one without JSON has no conversation, which the data set reports."""
    content = fields.pop("json", None)
    sample = dict(content) if isinstance(content, dict) else {"conversations": content}
    sample.setdefault("id", key)
    pictures = [
        fields[name] for name in sorted(fields, key=_numbers_in_order) if isinstance(fields[name], ShardPicture)
    ]
    if pictures:
        sample["image"] = pictures
    return sample


def _numbers_in_order(name: str) -> list[tuple[int, str]]:
    """Sorts 2.jpg in front of 10.jpg."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
