"""The embedded data: procedural pictures of coloured shapes with questions and long descriptions."""

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
