"""Pictures of a data set: found in folders or stored with the rows, opened, and counted in tokens."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaProcessor

from .conversation import printable
from .opening import for_processor, opened, to_rgb

# Behind the end marker of a whole JPEG some writers leave a few bytes.
JPEG_END, JPEG_TAIL = b"\xff\xd9", 4096


class StoredPicture(ABC):
    """A picture kept with its row, in a table or a shard, instead of in a file; `name` is for messages."""

    name: str

    @abstractmethod
    def read(self) -> bytes:
        """Returns the bytes of the picture's file."""


class PictureReader:
    """Opens pictures, and makes of them what the model sees.

    Args:
        processor: LLaVA processor; whether it pads pictures to a square is its own affair.
        folders: image paths are relative to these; the first folder that has a file wins.
    """

    def __init__(self, processor: LlavaProcessor, folders: Sequence[Path]) -> None:
        self.processor = processor
        self.folders = list(folders)

    def find(self, name: str) -> Path:
        """Returns the file of an image path.

        Raises:
            FileNotFoundError: when no folder has it, with the remedy.
        """
        for folder in self.folders:
            path = folder / name
            if os.path.isfile(path):  # unlike Path.is_file, false for names that are no names at all
                return path
        places = printable(" or ".join(str(folder / name) for folder in self.folders))
        raise FileNotFoundError(
            f"no picture at {places}; check image_folder, fetch the file, or set on_bad_sample='skip'"
        )

    def open(self, picture: str | StoredPicture) -> Image.Image:
        """Returns the picture, upright and RGB.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it cannot be read, or is too large to be worked on.
        """
        with self._opened(picture) as (image, _):
            return to_rgb(image)

    def verify(self, picture: str | StoredPicture, decode: bool = False) -> None:
        """Checks that a picture is there and whole without decoding it, unless `decode` asks for that.

        PNG files are checked by their checksums, JPEG files by their end marker.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it cannot be read, or is too large to be worked on.
        """
        with self._opened(picture) as (image, source):
            # A JPEG without its end marker may still be whole, and what these modes hold is seen in the pixels alone.
            unsure = image.mode in ("I", "F") or (image.format == "JPEG" and not _has_jpeg_end(source))
            if decode or unsure:
                to_rgb(image)
            else:
                image.verify()

    def pixel_values(self, images: list[Image.Image]) -> torch.Tensor | None:
        """Returns float32 `(images, 3, H, W)`, None without images."""
        if not images:
            return None
        image_processor = self.processor.image_processor
        return image_processor(images=for_processor(images, image_processor), return_tensors="pt")["pixel_values"]

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
        sizes = ((64, 64), (128, 64))
        counts = {self.tokens_of(self.pixel_values([Image.new("RGB", size)])) for size in sizes}
        if len(counts) > 1:
            raise ValueError(
                f"pictures have {min(counts)} to {max(counts)} tokens by their shape, so lengths are not known without "
                "opening them; set image_aspect_ratio=pad, or do_center_crop in the image processor"
            )
        return counts.pop()

    @contextmanager
    def _opened(self, picture: str | StoredPicture) -> Iterator[tuple[Image.Image, Path | BytesIO]]:
        """The picture, its header read, and what it is read from."""
        name, source = self._source(picture)
        try:
            with opened(source, name, self.processor.image_processor) as image:
                yield image, source
        except ValueError as error:
            raise ValueError(f"{error}; replace the file, or set on_bad_sample='skip'") from error

    def _source(self, picture: str | StoredPicture) -> tuple[str, Path | BytesIO]:
        """Returns a name for messages, and what Pillow opens."""
        if isinstance(picture, StoredPicture):
            return picture.name, BytesIO(picture.read())
        path = self.find(picture)
        return str(path), path


def _has_jpeg_end(source: Path | BytesIO) -> bool:
    if isinstance(source, BytesIO):
        return JPEG_END in source.getbuffer()[-JPEG_TAIL:].tobytes()
    with source.open("rb") as file:
        file.seek(max(source.stat().st_size - JPEG_TAIL, 0))
        return JPEG_END in file.read()
