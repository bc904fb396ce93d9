"""Documents of benchmarks on this machine, in the place of the hub: one file of JSON lines for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..names import STATIC_SCORERS
from .documents import read_documents

PREPARE_COMMAND = "python eval/prepare_data.py"
_JUDGED_FORM = {static: judged for judged, static in STATIC_SCORERS.items()}
# Columns that every document of a task must fill.
REQUIRED = {
    "vqav2_val": ("question_id", "question", "answers", "image"),
    "vqav2_test": ("question_id", "question", "image"),
    "gqa": ("id", "question", "answer", "image"),
    "textvqa_val": ("question_id", "question", "answers", "image"),
    "vizwiz_vqa_val": ("question_id", "question", "answers", "image"),
    "vizwiz_vqa_test": ("question_id", "question", "image"),
    "pope": ("question_id", "question", "answer", "image"),
    "pope_adv": ("question_id", "question", "answer", "image"),
    "pope_pop": ("question_id", "question", "answer", "image"),
    "pope_random": ("question_id", "question", "answer", "image"),
    "mme": ("question_id", "category", "question", "answer", "image"),
    "mmbench_en_dev": ("index", "question", "A", "category", "image", "answer"),
    "mmbench_cn_dev": ("index", "question", "A", "category", "image", "answer"),
    "mmbench_en_test": ("index", "question", "A", "category", "image"),
    "mmbench_cn_test": ("index", "question", "A", "category", "image"),
    "scienceqa_img": ("choices", "question", "answer", "image"),
    "scienceqa": ("choices", "question", "answer"),
    "seedbench": ("question_id", "data_type", "question", "answer", "image"),
    "mmvp": ("Index", "Question", "Options", "Correct Answer", "image"),
    "cv_bench": ("prompt", "choices", "source", "question", "answer", "image"),
    "cv_bench_2d": ("prompt", "choices", "source", "question", "answer", "image"),
    "cv_bench_3d": ("prompt", "choices", "source", "question", "answer", "image"),
    "mmvet": ("question_id", "capability", "question", "answer", "image"),
    "llava_in_the_wild": ("question_id", "question", "category", "caption", "gpt_answer", "image"),
    "realworldqa": ("question", "answer", "image"),
}


def documents_path(root: str | Path, task: str) -> Path:
    """The file of `task` below `root`; a static scorer reads the file of its judged form."""
    return Path(root) / f"{_JUDGED_FORM.get(task, task)}.jsonl"


def local_files(root: str | Path | None, tasks: Sequence[str]) -> dict[str, Path]:
    """Files below `root` that tasks read in place of the hub, each checked: columns, answers, images.

    A task that `prepare_data.py` can make must have its file; any other takes it where there is one.

    Raises:
        FileNotFoundError: a file or an image is missing.
        ValueError: a document is incomplete.
    """
    files = {}
    for task in tasks if root is not None else ():
        path = documents_path(root, task)
        required = REQUIRED.get(path.stem)
        if not path.is_file() and required is None:
            continue
        if not path.is_file():
            raise FileNotFoundError(
                f"--data-root {root} has no {path.name} for {task}; make it with `{PREPARE_COMMAND} {path.stem} "
                f"--source DOWNLOADS --output {root}`, or leave out --data-root to fetch the task from the hub."
            )
        read_documents(path, required or ())
        files[task] = path
    return files


def require_ocr_tokens(path: Path) -> None:
    """`ValueError` where no document of `path` has OCR tokens."""
    if not any(document.get("ocr_tokens") for document in read_documents(path)):
        raise ValueError(
            f"{path} has no OCR tokens; put TextVQA_Rosetta_OCR_v0.2_val.json or LLaVA's llava_textvqa_val_v051_ocr"
            ".jsonl beside the questions and prepare the file again, or evaluate without --llava-prompts."
        )
