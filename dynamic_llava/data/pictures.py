"""Pictures of a data set: found in folders or stored with the rows, opened, padded, and counted in tokens."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from transformers import LlavaProcessor

# What Pillow raises for files that are not pictures, are cut short, or are too large to be meant.
UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# Behind the end marker of a whole JPEG some writers leave a few bytes.
JPEG_END, JPEG_TAIL = b"\xff\xd9", 4096


class StoredPicture(ABC):
    """A picture kept with its row, in a table or a shard, instead of in a file; `name` is for messages."""

    name: str

    @abstractmethod
    def read(self) -> bytes:
        """Returns the bytes of the picture's file."""


class PictureReader:
    """Opens pictures as the model sees them.

    Args:
        processor: LLaVA processor.
        folders: image paths are relative to these; the first folder that has a file wins.
        image_aspect_ratio: "pad" pads to a square with the mean colour as LLaVA-1.5 does; None leaves pictures to the
            image processor.

    Raises:
        ValueError: on another `image_aspect_ratio`.
    """

    def __init__(
        self, processor: LlavaProcessor, folders: Sequence[Path], image_aspect_ratio: Literal["pad"] | None = None
    ) -> None:
        if image_aspect_ratio not in ("pad", None):
            raise ValueError(f"image_aspect_ratio is {image_aspect_ratio!r}; choose 'pad' or None")
        self.processor = processor
        self.folders = list(folders)
        self.image_aspect_ratio = image_aspect_ratio

    def find(self, name: str) -> Path:
        """Returns the file of an image path.

        Raises:
            FileNotFoundError: when no folder has it, with the remedy.
        """
        for folder in self.folders:
            path = folder / name
            if os.path.isfile(path):  # unlike Path.is_file, false for names that are no names at all
                return path
        places = " or ".join(str(folder / name) for folder in self.folders)
        raise FileNotFoundError(
            f"no picture at {places}; check image_folder, fetch the file, or set on_bad_sample='skip'"
        )

    def open(self, picture: str | StoredPicture) -> Image.Image:
        """Returns the picture, RGB, padded where asked.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it cannot be read.
        """
        with self._opened(picture) as (image, _):
            image = image.convert("RGB")
        return self._pad_to_square(image) if self.image_aspect_ratio == "pad" else image

    def verify(self, picture: str | StoredPicture, decode: bool = False) -> None:
        """Checks that a picture is there and whole without decoding it, unless `decode` asks for that.

        PNG files are checked by their checksums, JPEG files by their end marker.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it cannot be read.
        """
        with self._opened(picture) as (image, source):
            # A JPEG without its end marker may still be whole: only decoding tells.
            if decode or (image.format == "JPEG" and not _has_jpeg_end(source)):
                image.load()
            else:
                image.verify()

    def pixel_values(self, images: list[Image.Image]) -> torch.Tensor | None:
        """Returns float32 `(images, 3, H, W)`, None without images."""
        if not images:
            return None
        return self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]

    def tokens_of(self, pixel_values: torch.Tensor) -> int:
        """Returns how many tokens the model makes of one of these pictures `(..., H, W)`."""
        processor = self.processor
        if processor.patch_size is None:
            raise ValueError("the processor has no patch_size; set it to the vision tower's (14 for LLaVA-1.5)")
        height, width = pixel_values.shape[-2:]
        count = (height // processor.patch_size) * (width // processor.patch_size)
        count += processor.num_additional_image_tokens
        return count - (processor.vision_feature_select_strategy == "default")

    def tokens_per_picture(self) -> int:
        """Returns the tokens of any picture, found from blank ones.

        Raises:
            ValueError: when a wide picture has another number of tokens than a square one.
        """
        counts = set()
        for size in ((64, 64), (128, 64)):
            blank = Image.new("RGB", size)
            if self.image_aspect_ratio == "pad":
                blank = self._pad_to_square(blank)
            counts.add(self.tokens_of(self.pixel_values([blank])))
        if len(counts) > 1:
            raise ValueError(
                f"pictures have {min(counts)} to {max(counts)} tokens by their shape, so lengths are not known without "
                "opening them; set image_aspect_ratio='pad', or do_center_crop in the image processor"
            )
        return counts.pop()

    @contextmanager
    def _opened(self, picture: str | StoredPicture) -> Iterator[tuple[Image.Image, Path | BytesIO]]:
        """The picture and what it is read from; whatever Pillow finds wrong inside the block names the picture."""
        name, source = self._source(picture)
        try:
            with _whole_files_only(), Image.open(source) as image:
                yield image, source
        except UNREADABLE as error:
            raise ValueError(_unreadable(name, error)) from error

    def _source(self, picture: str | StoredPicture) -> tuple[str, Path | BytesIO]:
        """Returns a name for messages, and what Pillow opens."""
        if isinstance(picture, StoredPicture):
            return picture.name, BytesIO(picture.read())
        path = self.find(picture)
        return str(path), path

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        colour = tuple(int(value * 255) for value in self.processor.image_processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Pillow's setting for pictures that are cut short as it comes; other libraries switch it for the whole process."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _has_jpeg_end(source: Path | BytesIO) -> bool:
    if isinstance(source, BytesIO):
        return JPEG_END in source.getbuffer()[-JPEG_TAIL:].tobytes()
    with source.open("rb") as file:
        file.seek(max(source.stat().st_size - JPEG_TAIL, 0))
        return JPEG_END in file.read()


def _unreadable(name: str, error: Exception) -> str:
    return f"picture {name} cannot be read ({error}); replace the file, or set on_bad_sample='skip'"
