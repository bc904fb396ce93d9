"""Opens what `train_file` names: JSON, parquet, saved data sets, WebDataset shards, one or several with weights."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from transformers import LlavaProcessor

from .dataset import ConversationDataset
from .mixture import MixtureDataset
from .shards import read_shard
from .tables import read_json, read_json_lines, read_parquet, read_saved

READERS = {".json": read_json, ".jsonl": read_json_lines, ".tar": read_shard}
KINDS = ".json, .jsonl, .parquet, .tar, or a folder of datasets.save_to_disk, parquet files or shards"


def parse_source(entry: str | Path) -> tuple[str, float]:
    """Returns path and weight of "path" or "path:weight"; the weight is 1 where there is none.

    Raises:
        ValueError: on a weight that is not above 0.
    """
    path, colon, text = str(entry).rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        return str(entry), 1.0
    if not colon or not path:
        return str(entry), 1.0
    if not 0 < weight < float("inf"):
        raise ValueError(f"{entry!r} has the weight {text}; give one above 0, or leave the file out to skip it")
    return path, weight


def find_files(pattern: str) -> list[Path]:
    """Returns the files or folders of a path, which may have `*`, in order.

    Raises:
        FileNotFoundError: there are none.
    """
    path = Path(pattern)
    if path.exists():
        return [path]
    found = [Path(name) for name in sorted(glob(pattern, recursive=True))]
    if not found:
        raise FileNotFoundError(f"no data file at {path}; give a path to {KINDS}")
    return found


def read_samples(files: Sequence[Path]) -> list[Any]:
    """Returns the samples of files of any kind, in order.

    Raises:
        ValueError: a file of another kind, or a malformed one.
    """
    parquet = [path for path in files if path.suffix == ".parquet" and not path.is_dir()]
    samples = read_parquet(parquet) if parquet else []
    for path in files:
        if path.is_dir():
            samples += _read_folder(path)
        elif path.suffix in READERS:
            samples += READERS[path.suffix](path)
        elif path.suffix != ".parquet":
            remedy = "unpack it" if path.suffix in (".gz", ".zst", ".xz", ".bz2", ".zip") else "convert it"
            raise ValueError(f"{path} is of no kind that can be read; {remedy}: {KINDS}")
    return samples


def _read_folder(folder: Path) -> list[Any]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return read_saved(folder)
    for suffix in (".parquet", ".tar"):
        files = sorted(folder.rglob(f"*{suffix}"))
        if files:
            return read_samples(files)
    raise ValueError(f"{folder} holds no data set; give {KINDS}")


def open_parts(
    train_file: str | Path | Sequence[str | Path],
    image_folder: str | Path | Sequence[str | Path] | None,
    processor: LlavaProcessor,
    **options: Any,
) -> list[tuple[ConversationDataset, float]]:
    """Returns the data set and weight of each entry of `train_file`; arguments and errors as for `open_dataset`."""
    for name, value in (("train_file", train_file), ("image_folder", image_folder)):
        if value is not None and not isinstance(value, (str, Path, Sequence)):
            raise TypeError(f"{name} is {value!r}; give a path or a list of paths")
    entries = [train_file] if isinstance(train_file, (str, Path)) else list(train_file or ())
    if not entries:
        raise ValueError("train_file is empty; name at least one file")
    parts = []
    for entry in entries:
        # A file with a colon in its name is the file.
        path, weight = (str(entry), 1.0) if Path(entry).exists() else parse_source(entry)
        files = find_files(path)
        folder = image_folder
        if folder is None or folder == []:
            folder = files[0] if files[0].is_dir() else files[0].parent
        parts.append((ConversationDataset(read_samples(files), path, folder, processor, **options), weight))
    return parts


def open_dataset(
    train_file: str | Path | Sequence[str | Path],
    image_folder: str | Path | Sequence[str | Path] | None,
    processor: LlavaProcessor,
    *,
    seed: int = 0,
    **options: Any,
) -> ConversationDataset | MixtureDataset:
    """Opens training data.

    Args:
        train_file: "path" or "path:weight", or several: .json, .jsonl, .parquet, .tar (WebDataset) or a folder that
            `datasets` saved or that holds parquet files or shards; a path may have `*`. A weight says how often an
            epoch visits the samples, see `MixtureDataset`.
        image_folder: folder that image paths are relative to, or several: the first that has a file wins; None: the
            folder of the data file.
        processor: LLaVA processor with a fast tokenizer.
        seed: chooses the samples of a weight that is not whole.
        options: those of `ConversationDataset`.

    Returns:
        The data set of a single entry of weight 1, a mixture otherwise; both have `lengths` and `skipped`.

    Raises:
        FileNotFoundError: a file, or (with on_bad_sample="error") an image, is missing.
        ValueError: a malformed file, weight or sample, named with the remedy.
        ImportError: parquet and saved data sets without `datasets`.
    """
    parts = open_parts(train_file, image_folder, processor, **options)
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    return MixtureDataset([part for part, _ in parts], [weight for _, weight in parts], seed)
