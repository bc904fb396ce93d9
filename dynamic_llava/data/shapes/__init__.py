"""The embedded data: procedural pictures of coloured shapes with questions and long descriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import lazy_names

if TYPE_CHECKING:
    from .build import build_shapes
    from .questions import KINDS
    from .scene import PATCH_SIZE, PICTURE_SIZE, Scene, patch_coverage, sample_scene, split_of

__all__ = [
    "KINDS",
    "PATCH_SIZE",
    "PICTURE_SIZE",
    "Scene",
    "build_shapes",
    "patch_coverage",
    "sample_scene",
    "split_of",
]

__getattr__ = lazy_names(
    __name__,
    {
        "KINDS": "questions",
        "PATCH_SIZE": "scene",
        "PICTURE_SIZE": "scene",
        "Scene": "scene",
        "build_shapes": "build",
        "patch_coverage": "scene",
        "sample_scene": "scene",
        "split_of": "scene",
    },
)
