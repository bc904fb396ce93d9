"""Pictures of every shape and mode that users have, and files that are none or too large."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def stripes(width: int = 90, height: int = 30) -> Image.Image:
    """Red, green and blue from left to right."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for channel in range(3):
        pixels[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 255
    return Image.fromarray(pixels)


def noisy(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise, so that no two parts are alike."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def rotated(orientation: int, kind: str = "JPEG") -> bytes:
    """A picture that is to be turned before it is looked at."""
    image = noisy((70, 40))
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    return file_of(image, kind, exif=exif)


def palette_with_transparency() -> bytes:
    return file_of(noisy((60, 40), "P"), "PNG", transparency=3)


def grey16(size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """All brightnesses from black to white."""
    return np.linspace(0, 65535, size[0] * size[1]).astype(np.uint16).reshape(size[1], size[0])


def png_of(width: int, height: int, raw: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG file written by hand: `raw` are its lines, each behind a filter byte."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def thin(width: int, height: int) -> bytes:
    """A tiny file of a picture that is very long, or large."""
    return png_of(width, height, (b"\0" + bytes((width + 7) // 8)) * height, depth=1)


# Name of the file -> its bytes.
PICTURES: dict[str, Callable[[], bytes]] = {
    "square.png": lambda: file_of(noisy((64, 64)), "PNG"),
    "wide.png": lambda: file_of(stripes(), "PNG"),
    "wide.jpg": lambda: file_of(noisy((120, 45)), "JPEG"),
    "tall.webp": lambda: file_of(noisy((31, 90)), "WEBP"),
    "tall.gif": lambda: file_of(noisy((33, 100), "P"), "GIF"),
    **{f"rotated{turn}.jpg": (lambda turn=turn: rotated(turn)) for turn in range(2, 9)},
    "rotated.png": lambda: rotated(6, "PNG"),
    "rotated.webp": lambda: rotated(8, "WEBP"),
    "rotated.tiff": lambda: rotated(6, "TIFF"),
    "grey16.png": lambda: file_of(Image.fromarray(grey16()), "PNG"),
    "grey16.tiff": lambda: file_of(Image.fromarray(grey16()), "TIFF"),
    "grey32.tiff": lambda: file_of(Image.fromarray(grey16().astype(np.int32)), "TIFF"),
    "colour16.png": lambda: png_of(16, 4, (b"\0" + bytes(range(96))) * 4, depth=16, colour=2),
    "palette.png": lambda: file_of(noisy((60, 40), "P"), "PNG"),
    "palette transparent.png": palette_with_transparency,
    "rgba.png": lambda: file_of(noisy((60, 40), "RGBA"), "PNG"),
    "la.png": lambda: file_of(noisy((60, 40), "LA"), "PNG"),
    "grey.jpg": lambda: file_of(noisy((60, 40), "L"), "JPEG"),
    "cmyk.jpg": lambda: file_of(noisy((60, 40), "CMYK"), "JPEG"),
    "one bit.png": lambda: file_of(noisy((60, 40), "1"), "PNG"),
    "one bit.ppm": lambda: file_of(noisy((60, 40), "1"), "PPM"),
    "upper.BMP": lambda: file_of(noisy((50, 30)), "BMP"),
}
# Whole files that are refused, and a word of why.
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "thin.png": (lambda: thin(1, 20000), "1 x 20000"),
    "long.png": (lambda: thin(30000, 3), "30000 x 3"),
    "large.png": (lambda: thin(20000, 9000), "20000 x 9000|limit"),
    "script.png": (lambda: file_of(noisy((60, 40), "L"), "EPS"), "none of JPEG, PNG"),
    "page.jpg": (lambda: file_of(noisy((60, 40)), "PDF"), "none of JPEG, PNG"),
    "icon.png": (lambda: file_of(noisy((64, 64)), "ICO"), "none of JPEG, PNG"),
    "float.tiff": (lambda: file_of(Image.new("F", (9, 9)), "TIFF"), "floating point"),
    "deep.tiff": (lambda: file_of(Image.new("I", (9, 9), 1 << 20), "TIFF"), "8 or 16 bits"),
    "empty.png": (lambda: b"", "none of JPEG, PNG"),
    "nothing wide.png": (lambda: thin(0, 5), "none of JPEG, PNG"),
    "half.png": (lambda: file_of(noisy((64, 64)), "PNG")[:2000], "[tT]runcated"),
}
