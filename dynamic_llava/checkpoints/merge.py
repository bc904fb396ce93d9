"""`python -m dynamic_llava.checkpoints merge LORA DST`: an adapter folded into its base, as one model."""

from __future__ import annotations

from pathlib import Path

from ..loading import require_adapter
from .convert import convert
from .source import find_folder


def merge_adapter(
    adapter: str | Path, target: str | Path, base: str | Path | None = None, overwrite: bool = False
) -> None:
    """Write the merged model of a LoRA folder to `target` in our layout, with the processor where there is one.

    Raises:
        ValueError, FileNotFoundError: as `load_adapter`.
        FileExistsError, OSError: see `write.atomic_folder`.
    """
    require_adapter(find_folder(adapter), adapter)
    convert(adapter, target, "ours", overwrite=overwrite, base=base)
    print(f"wrote {target}")
