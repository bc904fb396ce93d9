"""Scenes of the embedded data: which objects stand where, drawn from a seed.

A scene is 2 to 4 objects of distinct colours on a square picture of 128 pixels. Positions are free within the cells of
a 3 x 3 grid, away from the cell borders, so that "upper left" or "left of" is never a matter of taste.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

PICTURE_SIZE = 128
PATCH_SIZE = 16

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 44),
    "green": (34, 158, 66),
    "blue": (38, 74, 214),
    "yellow": (240, 212, 30),
    "purple": (140, 44, 178),
    "orange": (244, 128, 22),
}
SIZES: dict[str, tuple[int, int]] = {"small": (24, 27), "large": (33, 36)}
ROWS = ("upper", "middle", "lower")
COLUMNS = ("left", "centre", "right")
SPLITS = ("train", "val", "test")

# Centres per row or column of the grid; the gaps between the ranges keep the nine positions apart.
_CENTRE_RANGES = ((20, 39), (48, 80), (89, 108))
_OBJECT_MARGIN = 4
_MAX_ATTEMPTS = 200


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is, the centre in pixels and the side of its bounding box in pixels."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    x: int
    y: int
    pixels: int


@dataclass(frozen=True)
class Scene:
    """Objects in reading order (row by row, left to right) and the seed of everything else in the picture."""

    objects: tuple[SceneObject, ...]
    texture_seed: int

    def content_key(self) -> str:
        """Returns all that a question or a description can speak of: equal keys mean the same scene to a reader."""
        return ";".join(f"{o.size} {o.colour} {o.shape} {o.row}{o.column}" for o in self.objects)


def split_of(scene: Scene) -> str:
    """Returns the split that a scene belongs to: a hash of its content, so that no scene is in two splits."""
    bucket = hashlib.sha256(scene.content_key().encode()).digest()[0]
    if bucket < 26:
        return "val"
    return "test" if bucket < 52 else "train"


def sample_scene(rng: np.random.Generator, min_objects: int = 2, max_objects: int = 4) -> Scene:
    """Draws one scene.

    Args:
        rng: source of all randomness.
        min_objects: fewest objects, at least 1.
        max_objects: most objects, at most the number of colours.
    """
    if not 1 <= min_objects <= max_objects <= len(COLOURS):
        limit = len(COLOURS)
        raise ValueError(f"objects must satisfy 1 <= min <= max <= {limit}, got {min_objects} and {max_objects}")
    count = int(rng.integers(min_objects, max_objects + 1))
    objects: list[SceneObject] = []
    while len(objects) < count:
        objects = _place_objects(rng, count)
    objects.sort(key=lambda o: (o.row, o.column))
    return Scene(tuple(objects), int(rng.integers(2**31)))


def sample_split_scene(rng: np.random.Generator, split: str, **counts: int) -> Scene:
    """Draws scenes until one belongs to `split`."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    while True:
        scene = sample_scene(rng, **counts)
        if split_of(scene) == split:
            return scene


def _place_objects(rng: np.random.Generator, count: int) -> list[SceneObject]:
    """Returns `count` objects that do not touch, or fewer when the draw ran out of room."""
    cells = rng.permutation(9)[:count]
    colours = rng.permutation(list(COLOURS))[:count]
    objects: list[SceneObject] = []
    for cell, colour in zip(cells, colours, strict=True):
        row, column = divmod(int(cell), 3)
        size = ("small", "large")[int(rng.integers(2))]
        pixels = int(rng.integers(SIZES[size][0], SIZES[size][1] + 1))
        for _ in range(_MAX_ATTEMPTS):
            x = int(rng.integers(_CENTRE_RANGES[column][0], _CENTRE_RANGES[column][1] + 1))
            y = int(rng.integers(_CENTRE_RANGES[row][0], _CENTRE_RANGES[row][1] + 1))
            shape = SHAPES[int(rng.integers(len(SHAPES)))]
            candidate = SceneObject(shape, str(colour), size, row, column, x, y, pixels)
            if all(_apart(candidate, other) for other in objects):
                objects.append(candidate)
                break
        else:
            return objects
    return objects


def _apart(a: SceneObject, b: SceneObject) -> bool:
    reach = (a.pixels + b.pixels) / 2 + _OBJECT_MARGIN
    return abs(a.x - b.x) >= reach or abs(a.y - b.y) >= reach


def inside_shape(shape: str, dx: np.ndarray, dy: np.ndarray, half: float) -> np.ndarray:
    """Says which offsets from the centre of a shape lie inside it.

    Args:
        shape: one of `SHAPES`.
        dx: horizontal offsets in pixels, right is positive.
        dy: vertical offsets in pixels, down is positive; broadcast against `dx`.
        half: half the side of the bounding box.

    Returns:
        Boolean array of the broadcast shape.
    """
    if shape == "circle":
        return dx**2 + dy**2 <= half**2
    in_box = (np.abs(dx) <= half) & (np.abs(dy) <= half)
    if shape == "square":
        return in_box
    if shape == "triangle":
        return in_box & (np.abs(dx) <= (dy + half) / 2)
    if shape == "cross":
        arm = half * 0.36
        return in_box & ((np.abs(dx) <= arm) | (np.abs(dy) <= arm))
    raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")


def patch_coverage(scene: Scene, step: int = 2) -> np.ndarray:
    """Returns how much of each patch each object covers.

    Args:
        scene: the scene.
        step: distance of the sample points in pixels.

    Returns:
        float32 `(objects, 8, 8)`, fractions in [0, 1].
    """
    points = np.arange(step / 2, PICTURE_SIZE, step)
    side, per_patch = PICTURE_SIZE // PATCH_SIZE, PATCH_SIZE // step
    covers = [inside_shape(o.shape, points[None] - o.x, points[:, None] - o.y, o.pixels / 2) for o in scene.objects]
    blocks = np.stack(covers).reshape(len(covers), side, per_patch, side, per_patch)
    return blocks.mean(axis=(2, 4), dtype=np.float32)
