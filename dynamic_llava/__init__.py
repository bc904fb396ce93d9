"""Dynamic-LLaVA on stock transformers: public names, and registration with the Auto classes."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .errors import end_quietly_on_interrupt, starts_a_command

if TYPE_CHECKING:
    from . import selection
    from .cache import SparseCache
    from .configuration_dynamic_llava import DynamicLlavaConfig
    from .modeling_dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaModel
    from .sparsity_config import SparsityConfig

try:
    __version__ = version("dynamic-llava")
except PackageNotFoundError:
    # A checkout that nobody has installed.
    __version__ = "unknown"

__all__ = [
    "DynamicLlavaConfig",
    "DynamicLlavaForConditionalGeneration",
    "DynamicLlavaModel",
    "SparseCache",
    "SparsityConfig",
    "selection",
]

_HOMES = {
    "DynamicLlavaConfig": "configuration_dynamic_llava",
    "DynamicLlavaForConditionalGeneration": "modeling_dynamic_llava",
    "DynamicLlavaModel": "modeling_dynamic_llava",
    "SparseCache": "cache",
    "SparsityConfig": "sparsity_config",
}


def __getattr__(name: str) -> Any:
    if name == "selection":
        return importlib.import_module(".selection", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


if starts_a_command():
    # A command imports what it needs when it knows its arguments: torch and transformers take seconds.
    end_quietly_on_interrupt()
else:
    # Importing registers them.
    from . import modeling_dynamic_llava, selection  # noqa: F401
