"""`python -m dynamic_llava.checkpoints merge LORA DST`: an adapter folded into its base, as one model."""

from __future__ import annotations

from pathlib import Path

from .adapters import load_adapter
from .source import find_folder
from .tokenizer import copy_tokenizer
from .write import atomic_folder


def merge_adapter(
    adapter: str | Path, target: str | Path, base: str | Path | None = None, overwrite: bool = False
) -> None:
    """Write the merged model of a LoRA folder to `target` in our layout, with the processor where the LoRA has one.

    Raises:
        ValueError, FileNotFoundError: as `load_adapter`.
        FileExistsError, OSError: see `write.atomic_folder`.
    """
    model = load_adapter(adapter, base, merge=True)
    needed = sum(parameter.nbytes for parameter in model.parameters())
    with atomic_folder(Path(target), needed, overwrite) as folder:
        copy_tokenizer(find_folder(adapter), folder)
        model.save_pretrained(folder)
    print(f"wrote {target}")
