"""A checkpoint on disk or on the hub: its configuration, and its tensors one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor

from ..files import shipped
from ..loading import ADAPTER_CONFIG, is_adapter, refuse_adapter
from ..model_kinds import check_kind
from ..reading import read_json_object
from ..weight_files import (
    PICKLES,
    SAFETENSORS,
    TensorInfo,
    check_finite,
    damaged,
    first_line,
    list_weights,
    open_weights,
)

PICKLED_MODEL = ("pytorch_model*.bin",)
TRAINING_STATES = ("checkpoint-*/*", "global_step*/*")
SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt")


@dataclass
class CheckpointSource:
    """Files of one checkpoint.

    Attributes:
        name: as it was asked for.
        folder: where its files are.
        config: its `config.json`.
        files: weight files in the order in which they are read.
        tensors: what they hold, by key.
        where: the file of each key.
        held: those that are in memory already.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    files: list[Path]
    tensors: dict[str, TensorInfo]
    where: dict[str, Path] = field(repr=False)
    held: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    def read(self, key: str) -> Tensor:
        """The tensor stored under `key`, on the CPU, read from its file now; `ValueError` where it is not finite."""
        file = self._file(key)
        try:
            tensor = file[key] if isinstance(file, dict) else file.get_tensor(key)
        except SafetensorError as error:
            raise damaged(self.where[key], error) from error
        check_finite(str(self.where[key]), [(key, tensor)])
        return tensor

    def lazy(self, key: str):
        """The tensor of `key` in a form that `from_pretrained` reads when it comes to it."""
        file = self._file(key)
        return file[key] if isinstance(file, dict) else file.get_slice(key)

    def close(self) -> None:
        """Let go of the files; what has been mapped no longer counts as memory. `read` opens them again."""
        self._open.clear()

    def _file(self, key: str):
        if key in self.held:
            return self.held
        path = self.where[key]
        if path not in self._open:
            self._open[path] = open_weights(path)
        return self._open[path]


def find_folder(name: str | Path, weights: bool = True) -> Path:
    """The local folder of `name`, downloaded where it is a repository of the hub.

    Args:
        name: folder or repository; `repository@revision` names a branch, a tag or a commit of one. What the package
            ships (`assets/tiny-llava`) is found from everywhere.
        weights: False downloads configuration and tokenizer alone.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be had.
    """
    path = shipped(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{name} is a file; pass the folder that holds config.json.")
    try:
        repository, _, revision = str(name).partition("@")
        return _download(repository, revision or None, weights)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"No checkpoint at {str(name)!r}: not a folder here, and not to be had from the hub ({first_line(error)})."
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


def base_of(folder: Path) -> str:
    """The base that a LoRA folder names; `FileNotFoundError` where it names none."""
    base = read_json_object(folder / ADAPTER_CONFIG, "LoRA configuration").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise FileNotFoundError(
            f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path is {base!r}); pass base=, the "
            "checkpoint it was trained on."
        )
    return base


def adapter_chain(name: str | Path, base: str | Path | None = None) -> Iterator[Path]:
    """The folder of `name`, and while these are LoRA folders that of their base; downloads no weights.

    Raises:
        FileNotFoundError: a base is not there.
        ValueError: a LoRA folder that has itself as its base.
    """
    folder = find_folder(name, weights=False)
    seen = [folder.resolve()]
    yield folder
    while is_adapter(folder):
        named, base = base or base_of(folder), None
        try:
            below = find_folder(named, weights=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The base {str(named)!r} of the LoRA {folder} is not there; pass base=, where it is now."
            ) from error
        if below.resolve() in seen:
            raise ValueError(f"The LoRA {folder} has itself as its base; pass base=, the checkpoint it was trained on.")
        seen.append(below.resolve())
        folder = below
        yield folder


def read_config_file(folder: Path, name: str | Path | None = None) -> dict[str, Any]:
    """`config.json` of a LLaVA-1.5 or Dynamic-LLaVA in any layout.

    Args:
        folder: where it is.
        name: what messages call the checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or that of another kind of model, which is named.
    """
    config = read_model_file(folder)
    check_kind(config, str(name or folder))
    return config


def read_model_file(folder: Path) -> dict[str, Any]:
    """`config.json` of any model; `FileNotFoundError` or `ValueError` that name the file."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no config.json; is it the folder of a model?")
    return read_json_object(path, "configuration")


def open_source(name: str | Path, any_kind: bool = False) -> CheckpointSource:
    """Find a checkpoint and list what it holds, without reading its tensors.

    Args:
        name: see `find_folder`.
        any_kind: also other models than LLaVA-1.5 and Dynamic-LLaVA, such as a CLIP tower.

    Raises:
        FileNotFoundError: no such folder or repository, or a file that its index names is not there.
        ValueError: not a checkpoint of a whole model, or a file that is damaged or no plain weights.
    """
    folder = find_folder(name)
    refuse_adapter(folder, name)
    config = read_model_file(folder) if any_kind else read_config_file(folder, name)
    files, found = list_weights(folder)
    if not files:
        if (folder / "mm_projector.bin").is_file():
            raise ValueError(f"{name} holds LLaVA's projector alone (mm_projector.bin); pass the fine-tuned model.")
        raise FileNotFoundError(
            f"{name} holds no weights: none of {', '.join(SAFETENSORS + PICKLES)}. Is the download complete?"
        )
    tensors = {key: info for key, (_, info) in found.items()}
    return CheckpointSource(str(name), folder, config, files, tensors, {key: path for key, (path, _) in found.items()})
