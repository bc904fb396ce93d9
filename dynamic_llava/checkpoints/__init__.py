"""Checkpoints of LLaVA and Dynamic-LLaVA in every layout that people have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .adapters import load_adapter, load_checkpoint, save_adapter
    from .load import load_processor, load_published

__all__ = [
    "load_adapter",
    "load_checkpoint",
    "load_processor",
    "load_published",
    "save_adapter",
]

__getattr__ = lazy_names(
    __name__,
    {
        "load_adapter": "adapters",
        "load_checkpoint": "adapters",
        "load_processor": "load",
        "load_published": "load",
        "save_adapter": "adapters",
    },
)
