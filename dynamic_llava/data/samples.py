"""The members of a sample other than its conversation: its id, its pictures, and what messages say of them."""

from __future__ import annotations

from typing import Any

from .conversation import printable, short
from .pictures import StoredPicture


def sample_id(sample: Any, index: int) -> str:
    """Returns the id of a sample, or its place in the file where it has none; it can be printed."""
    name = sample.get("id") if isinstance(sample, dict) else None
    return f"#{index}" if name is None else printable(name if isinstance(name, str) else short(name))


def told(where: str, error: ValueError | FileNotFoundError) -> ValueError | FileNotFoundError:
    """Returns an error that says where it arose: a `FileNotFoundError` stays one, of `ValueError` no subclass does."""
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return kind(printable(f"{where}: {error}"))


def has_picture(sample: dict[str, Any]) -> bool:
    """Whether `sample` names pictures, be they sound or not."""
    return sample.get("image") not in (None, "", [])


def pictures_of(sample: dict[str, Any]) -> list[str | StoredPicture]:
    """Returns the pictures of a sample, none for text only.

    Raises:
        ValueError: `image` is no path, list of paths, or stored picture.
    """
    if not has_picture(sample):
        return []
    pictures = sample["image"]
    pictures = pictures if isinstance(pictures, list) else [pictures]
    for picture in pictures:
        if not picture or not isinstance(picture, (str, StoredPicture)):
            raise ValueError(
                f"'image' is {short(sample['image'])}; write a path, a list of paths, or leave it out for text only"
            )
    return pictures
