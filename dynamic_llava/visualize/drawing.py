"""Pictures of what is kept: patches of an image, words of an answer. Drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

PAPER = (255, 255, 255)
INK = (28, 32, 36)
GREY = (176, 182, 188)
HIGHLIGHT = (255, 226, 122)
OUTLINE = (226, 88, 34)
PANEL = 256
GAP = 12


@dataclass(frozen=True)
class PatchView:
    """One held-out image as the model sees it: its question, reference, the model's answer and the kept patches by
    selector."""

    picture: Image.Image
    question: str
    reference: str
    answer: str
    kept: dict[str, list[bool]]


@dataclass(frozen=True)
class WordView:
    """One generated description: pieces of text, and whether each was kept in the cache of the sparse layers."""

    picture: Image.Image
    question: str
    pieces: list[str]
    kept: list[bool]


def draw_patches(picture: Image.Image, kept: Sequence[bool], size: int = PANEL) -> Image.Image:
    """`picture` as a square of `size` pixels, dropped patches faded, kept ones outlined.

    Args:
        kept: one flag per patch, row by row; a square number of them.
    """
    side = math.isqrt(len(kept))
    if side * side != len(kept):
        raise ValueError(f"{len(kept)} patches do not form a square grid.")
    bright = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    panel = Image.blend(bright, Image.new("RGB", bright.size, PAPER), 0.8)
    pen = ImageDraw.Draw(panel)
    for index in (i for i, keep in enumerate(kept) if keep):
        row, column = divmod(index, side)
        edges = [round(k * size / side) for k in (column, row, column + 1, row + 1)]
        panel.paste(bright.crop(edges), edges[:2])
        pen.rectangle((edges[0], edges[1], edges[2] - 1, edges[3] - 1), outline=OUTLINE)
    return panel


def patch_sheet(views: Sequence[PatchView]) -> Image.Image:
    """One column per view: the image, then its kept patches by selector."""
    selectors = list(views[0].kept)
    font = ImageFont.load_default(14)
    label_width, caption = 96, 46
    width = label_width + len(views) * (PANEL + GAP)
    sheet = Image.new("RGB", (width, caption + (1 + len(selectors)) * (PANEL + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(["image", *selectors]):
        pen.text((GAP, caption + row * (PANEL + GAP) + PANEL / 2), name, INK, font)
    for column, view in enumerate(views):
        left = label_width + column * (PANEL + GAP)
        pen.text((left, 4), _fit(view.question, font, PANEL), INK, font)
        pen.text((left, 23), _fit(f"{view.answer} (right: {view.reference})", font, PANEL), INK, font)
        panels = [view.picture.convert("RGB").resize((PANEL, PANEL), Image.Resampling.BICUBIC)]
        panels += [draw_patches(view.picture, view.kept[selector]) for selector in selectors]
        for row, panel in enumerate(panels):
            sheet.paste(panel, (left, caption + row * (PANEL + GAP)))
    return sheet


def word_sheet(view: WordView, width: int = 900) -> Image.Image:
    """The description beside its picture: kept words highlighted, dropped ones grey."""
    font, small = ImageFont.load_default(20), ImageFont.load_default(14)
    left, line = PANEL + 2 * GAP, 30
    places, x, y = [], left, 40
    for piece, keep in zip(view.pieces, view.kept, strict=True):
        length = font.getlength(piece)
        if x + length > width - GAP:
            x, y = left, y + line
        places.append((x, y, x + length, piece, keep))
        x += length
    sheet = Image.new("RGB", (width, max(y + line + GAP, PANEL + 2 * GAP)), PAPER)
    sheet.paste(ImageOps.pad(view.picture.convert("RGB"), (PANEL, PANEL), color=PAPER), (GAP, GAP))
    pen = ImageDraw.Draw(sheet)
    pen.text((left, 12), f"{view.question}  ({sum(view.kept)} of {len(view.kept)} tokens kept)", INK, small)
    for x, y, right, piece, keep in places:
        if keep and piece.strip():
            start = x + font.getlength(piece[: len(piece) - len(piece.lstrip())])
            pen.rounded_rectangle((start - 1, y, right + 1, y + line - 4), 4, fill=HIGHLIGHT)
        pen.text((x, y), piece, INK if keep else GREY, font)
    return sheet


def _fit(text: str, font: ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
