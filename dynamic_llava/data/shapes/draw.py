"""Draws a scene with Pillow: a tinted, noisy ground with dim clutter, and the objects on top."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .scene import COLOURS, PICTURE_SIZE, Scene, SceneObject

_NOISE_SIZE = 512
_NOISE_LEVEL = 5
_COLOUR_JITTER = 12


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """One fixed sheet of grey noise; pictures cut their piece out of it, which is far cheaper than fresh noise."""
    noise = np.random.default_rng(7).normal(0, _NOISE_LEVEL, (_NOISE_SIZE, _NOISE_SIZE, 1))
    return noise.round().astype(np.int16)


def draw_scene(scene: Scene) -> Image.Image:
    """Returns the RGB picture of a scene, `PICTURE_SIZE` pixels square; equal scenes give equal pictures."""
    rng = np.random.default_rng(scene.texture_seed)
    ground = int(rng.integers(205, 232)) + rng.integers(-8, 9, 3)
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), tuple(int(v) for v in ground))
    pen = ImageDraw.Draw(picture)
    _draw_clutter(pen, rng)
    for item in scene.objects:
        jitter = rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, 3)
        colour = np.clip(np.array(COLOURS[item.colour]) + jitter, 0, 255)
        _draw_object(pen, item, tuple(int(v) for v in colour))
    top, left = rng.integers(0, _NOISE_SIZE - PICTURE_SIZE, 2)
    noise = _noise()[top : top + PICTURE_SIZE, left : left + PICTURE_SIZE]
    pixels = np.asarray(picture, dtype=np.int16) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_clutter(pen: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Thin grey lines and dots all over, so that a background patch cannot be told by being blank."""
    for _ in range(int(rng.integers(3, 7))):
        ends = tuple(int(v) for v in rng.integers(0, PICTURE_SIZE, 4))
        pen.line(ends, fill=(int(rng.integers(150, 190)),) * 3, width=1)
    for x, y, radius, grey in zip(
        rng.integers(0, PICTURE_SIZE, 10),
        rng.integers(0, PICTURE_SIZE, 10),
        rng.integers(1, 3, 10),
        rng.integers(140, 190, 10),
        strict=True,
    ):
        pen.ellipse((int(x - radius), int(y - radius), int(x + radius), int(y + radius)), fill=(int(grey),) * 3)


def _draw_object(pen: ImageDraw.ImageDraw, item: SceneObject, colour: tuple[int, int, int]) -> None:
    half = item.pixels / 2
    left, top, right, bottom = item.x - half, item.y - half, item.x + half, item.y + half
    if item.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif item.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    elif item.shape == "triangle":
        pen.polygon(((item.x, top), (right, bottom), (left, bottom)), fill=colour)
    else:
        arm = half * 0.36
        pen.rectangle((item.x - arm, top, item.x + arm, bottom), fill=colour)
        pen.rectangle((left, item.y - arm, right, item.y + arm), fill=colour)
