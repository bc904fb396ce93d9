"""The one place where picture files are opened and turned into what an image processor takes.

Upright (EXIF), RGB as LLaVA and `transformers.image_utils.load_image` convert it but with 16 bits scaled to 8, and of
a size that can be decoded, padded and resized in bounded memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from ..reading import regular_file

# Only what data sets hold: Pillow would also run Ghostscript on PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
#: Most pixels of a picture as it is decoded, padded and resized; 8192 x 8192. Three bytes each, held about five times.
MAX_PIXELS = 2**26
# What Pillow raises for files that are not pictures, are cut short, or are too large to be meant.
UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    NotImplementedError,
    struct.error,
    Image.DecompressionBombError,
)


@contextmanager
def opened(source: Path | BytesIO, name: str, image_processor: Any = None) -> Iterator[Image.Image]:
    """The picture of a file, its header read; whatever Pillow finds wrong inside the block is a `ValueError`.

    Args:
        source: a file that is there, or its bytes.
        name: what messages call it.
        image_processor: what the picture is for, see `check_size`.
    """
    try:
        with _whole_files_only(), Image.open(source, formats=FORMATS) as image:
            check_size(image.size, image_processor)
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"picture {name} cannot be read (it is whole in none of {', '.join(FORMATS)})") from error
    except UNREADABLE as error:
        raise ValueError(f"picture {name} cannot be read ({str(error) or type(error).__name__})") from error


def open_picture(path: str | Path) -> Image.Image:
    """Returns the picture of a file, upright and RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file but a folder or a device; no picture of `FORMATS`, one that is cut short or has more than
            `MAX_PIXELS`.
    """
    with opened(regular_file(path, "picture"), str(path)) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns a Pillow picture of any mode upright and RGB; what is transparent keeps the colour under it.

    Raises:
        ValueError: floating point, or integers of more than 16 bits: nothing says how bright these are.
    """
    image.load()
    upright = _upright(image)
    if upright.mode.startswith("I"):
        upright = _eight_bits(upright)
    elif upright.mode == "F":
        raise ValueError("it is of floating point numbers; write it anew with 8 or 16 bits")
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    # An orientation that cannot be read turns nothing: the picture itself is whole.
    with suppress(*UNREADABLE):
        # Asked first: Pillow copies what it has nothing to turn in.
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """The high bytes of 16-bit grey, as Pillow takes those of 16-bit colour; its own conversion cuts off at 255."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise ValueError(f"its values reach from {grey.min()} to {grey.max()}; write it anew with 8 or 16 bits")
    return Image.fromarray((grey >> 8).astype(np.uint8))


def for_processor(images: Sequence[Image.Image], image_processor: Any) -> list[Image.Image]:
    """Returns Pillow pictures as `image_processor` takes them: upright, RGB, and of sizes that it can work on.

    Every picture goes through here on its way to pixels: those of a data set, of an evaluation, of a user.

    Raises:
        TypeError: something else than a Pillow picture.
        ValueError: see `to_rgb` and `check_size`.
    """
    found = []
    for image in images:
        if not isinstance(image, Image.Image):
            raise TypeError(f"a picture is a {type(image).__name__}; pass pictures of Pillow, such as open_picture's")
        check_size(image.size, image_processor)
        found.append(to_rgb(image))
    return found


def check_size(size: tuple[int, int], image_processor: Any = None) -> None:
    """`ValueError` where a picture has more than `MAX_PIXELS` as it is, or as `image_processor` pads and resizes it.

    Args:
        size: width and height.
        image_processor: CLIP's or LLaVA's; None looks at the picture alone.
    """
    width, height = size
    steps = {"": (width, height)}
    if min(size) < 1:
        raise ValueError(f"it is {width} x {height} pixels; replace it")
    if getattr(image_processor, "do_pad", False):
        width = height = max(size)
        steps[", padded to a square"] = (width, height)
    shortest = getattr(image_processor, "size", None)
    shortest = shortest.get("shortest_edge") if getattr(image_processor, "do_resize", False) and shortest else None
    if shortest:
        scale = shortest / min(width, height)
        steps[f", its shorter side resized to {shortest}"] = (math.ceil(width * scale), math.ceil(height * scale))
    for step, (wide, high) in steps.items():
        if wide * high > MAX_PIXELS:
            raise ValueError(
                f"it is {size[0]} x {size[1]} pixels: with {wide * high:,}{step} it has more than {MAX_PIXELS:,}; "
                "scale or crop it, or leave it out"
            )


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Pillow's setting for pictures that are cut short as it comes; other libraries switch it for the whole process."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
