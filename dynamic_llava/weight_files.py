"""The weight files of a folder: which are read, what they hold, and their tensors; nothing in them is executed."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .reading import GIT_LFS_POINTER, read_json_object, regular_file

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Buffers that old checkpoints hold and models compute themselves.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def is_buffer(key: str) -> bool:
    """Whether `key` names a buffer that need not be loaded."""
    return bool(_BUFFERS.search(key))


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a folder in the order of transformers, and what their index says of them.

    A whole file goes before shards, safetensors before pickles; what comes behind is not looked at.

    Raises:
        FileNotFoundError: a file that the index names is not there.
        ValueError: an index that is none, or something else than a file in the place of one.
    """
    for whole, index in (SAFETENSORS, PICKLES):
        if os.path.lexists(folder / whole):
            return [regular_file(folder / whole, "weight file")], None
        if os.path.lexists(folder / index):
            weight_map = _read_index(folder / index)
            names = sorted(set(weight_map.values()))
            missing = [name for name in names if not os.path.lexists(folder / name)]
            if missing:
                raise FileNotFoundError(
                    f"{folder / index} names files that are not there: {', '.join(missing)}; complete the download."
                )
            _check_strays(folder, whole, names)
            return [regular_file(folder / name, "weight file") for name in names], weight_map
    return [], None


def list_weights(folder: Path) -> tuple[list[Path], dict[str, tuple[Path, TensorInfo]]]:
    """The weight files of a folder, and for each tensor the file that holds it, its shape and dtype.

    Raises:
        FileNotFoundError, ValueError: as `weight_files` and `list_tensors`; also a tensor that two files hold, and
            tensors that are not where the index says.
    """
    files, weight_map = weight_files(folder)
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for path in files:
        for key, info in list_tensors(path).items():
            if key in found:
                raise ValueError(f"{path} and {found[key][0].name} both hold {key}; copy or download them again.")
            found[key] = path, info
    if weight_map is not None:
        held = {key: path.name for key, (path, _) in found.items()}
        wrong = sorted(
            key
            for key in weight_map.keys() | held.keys()
            if weight_map.get(key) != held.get(key) and not is_buffer(key)
        )
        if wrong:
            raise ValueError(
                f"{folder}: the index and the shards disagree about {some(wrong)}; copy or download all of them again."
            )
    return files, found


def list_tensors(path: Path) -> dict[str, TensorInfo]:
    """What a weight file holds, from its header where it has one; errors as `open_weights`."""
    if path.suffix != ".safetensors":
        return {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in open_weights(path).items()}
    file = open_weights(path)
    found = {}
    for key in file.keys():  # noqa: SIM118  not a dict
        part = file.get_slice(key)
        if part.get_dtype() not in _DTYPES:
            raise ValueError(f"{path} holds {key} as {part.get_dtype()}; save it in a floating point type.")
        found[key] = TensorInfo(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
    return found


def open_weights(path: Path):
    """A safetensors file that is open, or the tensors of a pickle, mapped from the disk where its format allows.

    Raises:
        FileNotFoundError, ValueError: as `files.regular_file`; also a file that is damaged, a Git LFS pointer, or one
            that holds other things than tensors.
    """
    with regular_file(path, "weight file").open("rb") as file:
        if file.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the weights; run 'git lfs pull' or download it.")
    if path.suffix != ".safetensors":
        return _load_pickle(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise damaged(path, error) from error


def check_finite(where: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """`ValueError` that lists the floating point tensors in which a value is NaN or infinite; one pass over each."""
    bad = []
    for key, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        low, high = (tensor.float() if tensor.dtype.itemsize == 1 else tensor.detach()).aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad.append(key)
    if bad:
        raise ValueError(f"{where} holds weights that are NaN or infinite: {some(bad)}; train or download it again.")


def damaged(path: Path, error: Exception) -> ValueError:
    """The error for a file that cannot be read to its end."""
    return ValueError(f"{path} is damaged or cut off ({first_line(error)}); copy or download it again.")


def first_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def some(names: list[str], most: int = 8) -> str:
    """The first of `names`, and how many more there are."""
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor; all of them are files of the same folder, whatever the index says."""
    weight_map = read_json_object(path, "index of weights").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} must name a file for each weight under weight_map; copy or download it again.")
    for name in set(map(repr, weight_map.values())):
        if not re.fullmatch(r"'[^/\\]+\.(safetensors|bin)'", name):
            raise ValueError(f"{path} names {name}, which is no weight file of its folder; copy or download it again.")
    return weight_map


def _check_strays(folder: Path, whole: str, names: list[str]) -> None:
    stem, _, suffix = whole.rpartition(".")
    shards = {path.name for path in folder.glob(f"{stem}-*-of-*.{suffix}")}
    strays = sorted(shards - set(names))
    if strays:
        raise ValueError(
            f"{folder} holds {some(strays)}, which its index does not name: of another save, or the index is too old. "
            "Remove them, or download the folder again."
        )


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of torch before 1.6 cannot be mapped; damaged ones fail here once more.
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a file of plain weights, and nothing in it was executed ({first_line(error)}); "
            "get the checkpoint as safetensors."
        ) from error
    except Exception as error:
        # Damaged pickles end in errors of any kind.
        raise damaged(path, error) from error
    plain = isinstance(values, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
        for key, value in values.items()
    )
    if not plain:
        raise ValueError(f"{path} does not hold a state dict of tensors; get the checkpoint as safetensors.")
    return values
