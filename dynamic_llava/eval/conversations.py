"""The lmms-eval task of benchmarks in LLaVA's conversation JSON: the shapes, the paper's generation benchmarks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from lmms_eval.api.task import ConfigurableTask
from PIL import Image

from ..data.opening import open_picture
from ..reading import inside, read_json
from .conversation_files import ROOT_VARIABLE, SECTION, ConversationFile

DEFAULT_ROOT = "data/shapes"


def data_root() -> Path:
    """The folder of these files: `$DYNAMIC_LLAVA_DATA_ROOT`, else `data/shapes`."""
    return Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


@contextmanager
def data_root_at(root: str | Path | None) -> Iterator[None]:
    """Let the tasks read `root`; None leaves the environment as it is."""
    before = os.environ.get(ROOT_VARIABLE)
    if root is not None:
        os.environ[ROOT_VARIABLE] = str(root)
    try:
        yield
    finally:
        os.environ.pop(ROOT_VARIABLE, None)
        if before is not None:
            os.environ[ROOT_VARIABLE] = before


def read_documents(root: Path, file: ConversationFile) -> list[dict[str, Any]]:
    """One document (id, image, kind, questions, answers) per conversation of a file; `question` and `answer` are
    those of the first round.

    Raises:
        FileNotFoundError: the file, or a picture that it names, is missing.
        ValueError: a conversation is not questions and answers in turn, about one picture, or the picture's name leads
            out of `root` without being a whole path.
    """
    path = file.require(root)
    samples = read_json(path, "file of conversations")
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"{path} is not LLaVA conversation JSON: it holds no list of samples.")
    return [_document(root, sample, f"{path} sample {number}") for number, sample in enumerate(samples)]


def _document(root: Path, sample: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        where = f"{where} ({sample['id']!r})"
        turns = [turn["from"] for turn in sample["conversations"]]
        texts = [turn["value"].replace("<image>", "").strip() for turn in sample["conversations"]]
        image = sample["image"]
        if not isinstance(image, str):
            raise TypeError(f"image is {image!r}")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is not LLaVA conversation JSON about one picture ({error!r}).") from error
    if not turns or turns != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"{where} has the turns {turns}; questions and answers must alternate.")
    # Whole paths are those of pictures that lie outside, which `build_generation_benchmarks` gives.
    picture = inside(root, image, where, or_absolute=True)
    if not picture.is_file():
        raise FileNotFoundError(f"{where} names a missing picture: {picture}.")
    if not all(texts):
        raise ValueError(f"{where} has an empty question or answer; remove it.")
    return {
        "id": str(sample["id"]),
        "image": image,
        "kind": str(sample.get("kind", "")),
        "questions": texts[::2],
        "answers": texts[1::2],
        "question": texts[0],
        "answer": texts[1],
    }


def next_question(
    doc: dict[str, Any],
    lmms_eval_specific_kwargs: dict | None = None,
    round_idx: int = 0,
    previous_output: list[str] | None = None,
    previous_round_info: Any = None,
) -> str | tuple[list, str | None, bool, list[str], Any]:
    """lmms-eval's protocol of several rounds: the first question, then pictures, question, whether that was all, the
    answers so far, and nothing to carry on."""
    if round_idx == 0:
        return doc["questions"][0]
    ended = round_idx >= len(doc["questions"])
    return [], None if ended else doc["questions"][round_idx], ended, list(previous_output or []), None


class ConversationTask(ConfigurableTask):
    """A YAML task with the section `conversations`, read from a local folder.

    Changes from `ConfigurableTask`:
        - what the section says fills in questions, answers and scores (`with_conversations`);
        - `download` reads the JSON below `data_root()`: no hub, no cache folder, no retries on a missing file;
        - `doc_to_visual` opens the picture below the same root.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.root = data_root()
        self.file = ConversationFile.of(config.get(SECTION), str(config.get("task")))
        super().__init__(config=with_conversations(config, self.file))

    def download(self, dataset_kwargs: dict[str, Any] | None) -> None:
        """Fill `dataset` and `dataset_no_image`; the documents hold paths, so that both are the same."""
        documents = datasets.Dataset.from_list(read_documents(self.root, self.file))
        self.dataset = datasets.DatasetDict({self.config.test_split: documents})
        self.dataset_no_image = self.dataset

    def doc_to_visual(self, doc: dict[str, Any]) -> list[Image.Image]:
        """The one picture of the document."""
        return [open_picture(self.root / doc["image"])]


def with_conversations(config: dict[str, Any], file: ConversationFile) -> dict[str, Any]:
    """A task's configuration with what its `file` says of it; what it sets itself stays.

    Raises:
        ValueError: an unknown metric.
    """
    score, figures = file.scorer(str(config.get("task")))
    filled = {
        "test_split": "test",
        "output_type": "generate_until_multi_round" if file.rounds else "generate_until",
        "doc_to_text": next_question if file.rounds else "question",
        "doc_to_target": "answers" if file.rounds else "answer",
        "process_results": score,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in figures],
        **{key: value for key, value in config.items() if key not in ("class", SECTION)},
    }
    filled["generation_kwargs"] = {"do_sample": False, "until": [], **(config.get("generation_kwargs") or {})}
    return filled
