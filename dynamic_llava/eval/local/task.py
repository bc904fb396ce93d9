"""A stock lmms-eval task on local documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from lmms_eval.api.task import ConfigurableTask

from .documents import IMAGE_COLUMN, image_dataset, read_documents

MODEL_NAME = "dynamic_llava"


def local_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The stock `config` reading `path`: prompts, scorers, metrics and aggregation stay; the dataset changes.

    `process_docs` goes: where a stock task has one it fetches the images from a second dataset on the hub.
    """
    local = {key: value for key, value in config.items() if key not in ("dataset_name", "process_docs")}
    return {**local, "dataset_path": "json", "dataset_kwargs": {"data_files": str(path)}, "class": LocalTask}


class LocalTask(ConfigurableTask):
    """A task whose dataset is one file of JSON lines with image paths.

    Changes from `ConfigurableTask`:
        - `download` reads the file: no hub, no cache folder, no retries on a missing file.
        - `class` is taken out of the configuration, which has no such field.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={k: v for k, v in config.items() if k != "class"}, model_name=MODEL_NAME)

    def download(self, dataset_kwargs: dict[str, Any]) -> None:
        """Fill `dataset` and `dataset_no_image`."""
        documents = image_dataset(read_documents(Path(dataset_kwargs["data_files"])))
        self.dataset = datasets.DatasetDict({self.config.test_split: documents})
        self.dataset_no_image = datasets.DatasetDict({self.config.test_split: documents.remove_columns([IMAGE_COLUMN])})
