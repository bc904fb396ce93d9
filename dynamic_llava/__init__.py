"""Dynamic-LLaVA on stock transformers: public names, and registration with the Auto classes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .errors import end_quietly_on_interrupt, starts_a_command
from .lazy import lazy_names

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

__getattr__ = lazy_names(
    __name__,
    {
        "DynamicLlavaConfig": "configuration_dynamic_llava",
        "DynamicLlavaForConditionalGeneration": "modeling_dynamic_llava",
        "DynamicLlavaModel": "modeling_dynamic_llava",
        "SparseCache": "cache",
        "SparsityConfig": "sparsity_config",
        "selection": "selection",
    },
)

if starts_a_command():
    # A command imports what it needs when it knows its arguments: torch and transformers take seconds.
    end_quietly_on_interrupt()
else:
    # Importing registers them.
    from . import modeling_dynamic_llava, selection  # noqa: F401
