"""Writing a checkpoint folder: all of it or nothing, shard by shard."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .source import TensorInfo

# Room that configuration and tokenizer files may need beside the weights.
SPARE_BYTES = 32 << 20


@contextmanager
def atomic_folder(target: Path, needed_bytes: int, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it gets its name when all has gone well, and goes away otherwise.

    Raises:
        FileExistsError: `target` is there and not empty, and `overwrite` is false.
        OSError: not enough room on the disk, found before or while writing.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise FileExistsError(f"{target} is there and not empty; choose another folder, or pass --overwrite.")
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC, f"{parent} has {free / 1e9:.1f} GB free, the checkpoint needs {needed_bytes / 1e9:.1f} GB"
        )
    partial = parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _replace(partial, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, f"the disk of {parent} is full; nothing was written to {target}") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def write_weights(
    folder: Path,
    tensors: dict[str, TensorInfo],
    read: Callable[[str], Tensor],
    max_shard_bytes: int,
    release: Callable[[], None],
) -> None:
    """Write `tensors` as safetensors of at most `max_shard_bytes` each (or one tensor), with an index where several.

    Args:
        read: gives the tensor of a key; called once for each, so that one shard is in memory at a time.
        release: called after each shard, to let go of what reading it has mapped.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for key, info in tensors.items():
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += info.nbytes
    many = len(shards) > 1
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(tqdm(shards, desc="shards", disable=not many), start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        try:
            save_file({key: read(key).contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            # The library's own error for a failed write; the disk is the usual reason.
            raise OSError(errno.ENOSPC, f"{name} could not be written ({error})") from error
        release()
        weight_map.update(dict.fromkeys(keys, name))
    if many:
        total = sum(info.nbytes for info in tensors.values())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
