"""Writing a checkpoint folder: all of it or nothing, shard by shard."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..weight_files import TensorInfo

# Room that configuration and tokenizer files may need beside the weights.
SPARE_BYTES = 32 << 20


@contextmanager
def atomic_folder(target: Path, needed_bytes: int, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it gets its name when all has gone well, and goes away otherwise.

    What a conversion to `target` that was killed has left is removed first, or put back where it was the old `target`.

    Raises:
        FileExistsError: `target` is there and not empty, and `overwrite` is false.
        OSError: not enough room on the disk, found before or while writing.
    """
    _clear_dead(target)
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
    lock = os.open(partial, os.O_RDONLY)
    try:
        # Held until this process ends, however it does: also other machines see that the folder is in use.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
        _replace(partial, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, f"the disk of {parent} is full; nothing was written to {target}") from error
        raise
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def _clear_dead(target: Path) -> None:
    """Remove the partial folders of conversions to `target` that are dead; one that was being replaced comes back."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(partial|old)-(\d+)")
    parent = target.absolute().parent
    found = [(path, match) for path in _children(parent) if (match := pattern.fullmatch(path.name))]
    for path, match in found:
        if not path.is_dir() or path.is_symlink() or _in_use(path, int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _in_use(folder: Path, process: int) -> bool:
    """Whether the process of that number lives, or one on another machine holds the folder's lock."""
    if Path("/proc/self").exists() and process != os.getpid() and Path(f"/proc/{process}").exists():
        return True
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


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
    for number, keys in enumerate(tqdm(shards, desc="shards", disable=None if many else True), start=1):
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
