"""A checkpoint on disk or on the hub: its configuration, and its tensors one at a time."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLED_MODEL = ("pytorch_model*.bin",)
TRAINING_STATES = ("checkpoint-*/*", "global_step*/*")
ADAPTER_CONFIG = "adapter_config.json"
SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class CheckpointSource:
    """Files of one checkpoint.

    Attributes:
        name: as it was asked for.
        folder: where its files are.
        config: its `config.json`.
        files: weight files in the order in which they are read.
        tensors: what they hold, by key.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    files: list[Path]
    tensors: dict[str, TensorInfo]
    _where: dict[str, Path] = field(repr=False)
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    def read(self, key: str) -> Tensor:
        """The tensor stored under `key`, on the CPU, read from its file now."""
        file = self._file(key)
        try:
            return file[key] if isinstance(file, dict) else file.get_tensor(key)
        except SafetensorError as error:
            raise _damaged(self._where[key], error) from error

    def lazy(self, key: str):
        """The tensor of `key` in a form that `from_pretrained` reads when it comes to it."""
        file = self._file(key)
        return file[key] if isinstance(file, dict) else file.get_slice(key)

    def close(self) -> None:
        """Let go of the files; what has been mapped no longer counts as memory. `read` opens them again."""
        self._open.clear()

    def _file(self, key: str):
        path = self._where[key]
        if path not in self._open:
            self._open[path] = _open_file(path)
        return self._open[path]


def find_folder(name: str | Path, weights: bool = True) -> Path:
    """The local folder of `name`, downloaded where it is a repository of the hub.

    Args:
        name: folder or repository; `repository@revision` names a branch, a tag or a commit of one.
        weights: False downloads configuration and tokenizer alone.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be had.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{name} is a file; pass the folder that holds config.json.")
    try:
        repository, _, revision = str(name).partition("@")
        return _download(repository, revision or None, weights)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"No checkpoint at {str(name)!r}: not a folder here, and not to be had from the hub ({_first_line(error)})."
        ) from error


def _download(repository: str, revision: str | None, weights: bool) -> Path:
    def fetch(*patterns: str, leave: Sequence[str] = ()) -> Path:
        ignored = [*TRAINING_STATES, *leave]
        found = snapshot_download(repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=ignored)
        return Path(found)

    folder = fetch(*SMALL_FILES)
    if weights:
        fetch("*.safetensors")
        # Many repositories hold the whole model in both forms.
        twice = PICKLED_MODEL if any((folder / name).is_file() for name in SAFETENSORS) else ()
        fetch("*.bin", leave=twice)
    return folder


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds a peft adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def open_source(name: str | Path) -> CheckpointSource:
    """Find a checkpoint and list what it holds, without reading its tensors.

    Raises:
        FileNotFoundError: no such folder or repository, or a file that its index names is not there.
        ValueError: not a checkpoint of a whole model, or a file that is damaged or no plain weights.
    """
    folder = find_folder(name)
    if is_adapter(folder) and not _weight_files(folder):
        raise ValueError(
            f"{name} is a LoRA folder, not a whole model; load it with "
            "dynamic_llava.checkpoints.load_adapter(folder, base=...)."
        )
    config = read_json(folder / "config.json")
    files = _weight_files(folder)
    if not files:
        if (folder / "mm_projector.bin").is_file():
            raise ValueError(f"{name} holds LLaVA's projector alone (mm_projector.bin); pass the fine-tuned model.")
        raise FileNotFoundError(
            f"{name} holds no weights: none of {', '.join(SAFETENSORS + PICKLES)}. Is the download complete?"
        )
    where: dict[str, Path] = {}
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for key, info in _list_tensors(path).items():
            where[key], tensors[key] = path, info
    return CheckpointSource(str(name), folder, config, files, tensors, where)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; `FileNotFoundError` or `ValueError` that name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}; is it the folder of a model?")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object; copy or download it again.")
    return values


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before pickles; empty where there are none."""
    for whole, index in (SAFETENSORS, PICKLES):
        if (folder / index).is_file():
            names = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing or not names:
                raise FileNotFoundError(
                    f"{folder / index} names files that are not there: {', '.join(missing) or 'none at all'}; "
                    "complete the download."
                )
            return [folder / name for name in names]
        if (folder / whole).is_file():
            return [folder / whole]
    return []


def _open_file(path: Path):
    if path.suffix == ".safetensors":
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise _damaged(path, error) from error
    return _load_pickle(path)


def _list_tensors(path: Path) -> dict[str, TensorInfo]:
    if path.suffix == ".safetensors":
        file = _open_file(path)
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a dict
        return {key: TensorInfo(tuple(s.get_shape()), _DTYPES[s.get_dtype()]) for key, s in slices.items()}
    return {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in _load_pickle(path).items()}


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.bin` file, mapped from the disk where its format allows; nothing in it is executed."""
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of torch before 1.6 cannot be mapped; damaged ones fail here once more.
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a file of plain weights, and nothing in it was executed ({_first_line(error)}); "
            "get the checkpoint as safetensors."
        ) from error
    except (RuntimeError, EOFError, struct.error, OSError) as error:
        raise _damaged(path, error) from error
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError(f"{path} does not hold a state dict of tensors; get the checkpoint as safetensors.")
    return values


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or cut off ({_first_line(error)}); copy or download it again.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
