"""The lmms-eval task class of the embedded shapes data: documents from LLaVA JSON in a local folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
from lmms_eval.api.task import ConfigurableTask
from PIL import Image

ROOT_VARIABLE = "DYNAMIC_LLAVA_SHAPES_ROOT"
DEFAULT_ROOT = "data/shapes"
BUILD_COMMAND = "python -m dynamic_llava.data.shapes --output"


def shapes_root() -> Path:
    """The folder of the shapes data: `$DYNAMIC_LLAVA_SHAPES_ROOT`, else `data/shapes`."""
    return Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


def require_shapes(root: Path, file: str) -> Path:
    """Path of `file` below `root`, or `FileNotFoundError` with the command that builds the data."""
    path = root / file
    if not path.is_file():
        raise FileNotFoundError(
            f"No shapes data: {path} is missing. Build it with `{BUILD_COMMAND} {root}`, "
            f"or point --data-root (or ${ROOT_VARIABLE}) to it."
        )
    return path


def read_documents(root: Path, file: str) -> list[dict[str, str]]:
    """One document (id, image, kind, question, answer) per single-turn LLaVA conversation of `root/file`.

    Raises:
        FileNotFoundError: the file, or a picture that it names, is missing.
        ValueError: a conversation is not one question and one answer.
    """
    path = require_shapes(root, file)
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
        return [_document(root, sample) for sample in samples]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not LLaVA conversation JSON with one question each ({error!r}).") from error


def _document(root: Path, sample: dict[str, Any]) -> dict[str, str]:
    turns = [turn["from"] for turn in sample["conversations"]]
    if turns != ["human", "gpt"]:
        raise ValueError(f"Sample {sample['id']!r} has the turns {turns}; one question and one answer are needed.")
    picture = root / sample["image"]
    if not picture.is_file():
        raise FileNotFoundError(f"Sample {sample['id']!r} names a missing picture: {picture}.")
    question, answer = (turn["value"] for turn in sample["conversations"])
    return {
        "id": str(sample["id"]),
        "image": sample["image"],
        "kind": sample.get("kind", ""),
        "question": question.replace("<image>", "").strip(),
        "answer": answer.strip(),
    }


class ShapesTask(ConfigurableTask):
    """A YAML task whose `dataset_kwargs.file` is read from the local shapes folder.

    Changes from `ConfigurableTask`:
        - `download` reads the JSON below `shapes_root()`: no hub, no cache folder, no retries on a missing file.
        - `doc_to_visual` opens the picture below the same root.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.root = shapes_root()
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any]) -> None:
        """Fill `dataset` and `dataset_no_image`; the documents hold paths, so that both are the same."""
        documents = datasets.Dataset.from_list(read_documents(self.root, dataset_kwargs["file"]))
        self.dataset = datasets.DatasetDict({self.config.test_split: documents})
        self.dataset_no_image = self.dataset

    def doc_to_visual(self, doc: dict[str, str]) -> list[Image.Image]:
        """The one picture of the document."""
        with Image.open(self.root / doc["image"]) as picture:
            return [picture.convert("RGB")]
