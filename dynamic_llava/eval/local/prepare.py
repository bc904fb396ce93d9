"""`python eval/prepare_data.py --source playground/data/eval --output data/eval`: downloads become JSON lines.

One file per lmms-eval task, `OUTPUT/<task>.jsonl`, in the columns of the task's dataset and with image paths;
`python -m dynamic_llava.eval --data-root OUTPUT` evaluates on them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import Command, option
from ...errors import ExitStatus, message_of, run_command
from ...files import output_folder
from ..local import judged, open_answers, options, yes_no
from ..names import SHORT_NAMES, STATIC_SCORERS, STOCK_PREFIX
from .documents import read_documents, write_documents
from .source import BenchmarkAbsent, Source


@dataclass(frozen=True)
class Conversion:
    """How the documents of one task are made.

    Args:
        folder: the benchmark's folder in LLaVA's `playground/data/eval`.
        convert: documents from a source.
        required: columns that every document must fill.
    """

    folder: str
    convert: Callable[[Source], Iterator[dict[str, Any]]]
    required: tuple[str, ...]


_CHOICES = ("question", "answer", "image")
_MMBENCH = ("index", "question", "A", "category", "image")
CONVERSIONS = {
    "vqav2_val": Conversion("vqav2", open_answers.vqav2_val, ("question_id", "question", "answers", "image")),
    "vqav2_test": Conversion("vqav2", open_answers.vqav2_test, ("question_id", "question", "image")),
    "gqa": Conversion("gqa", open_answers.gqa, ("id", "question", "answer", "image")),
    "textvqa_val": Conversion("textvqa", open_answers.textvqa_val, ("question_id", "question", "answers", "image")),
    "vizwiz_vqa_val": Conversion(
        "vizwiz", open_answers.vizwiz_vqa_val, ("question_id", "question", "answers", "image")
    ),
    "vizwiz_vqa_test": Conversion("vizwiz", open_answers.vizwiz_vqa_test, ("question_id", "question", "image")),
    "pope": Conversion("pope", yes_no.pope(*yes_no.POPE_CATEGORIES), ("question_id", *_CHOICES)),
    "pope_adv": Conversion("pope", yes_no.pope("adversarial"), ("question_id", *_CHOICES)),
    "pope_pop": Conversion("pope", yes_no.pope("popular"), ("question_id", *_CHOICES)),
    "pope_random": Conversion("pope", yes_no.pope("random"), ("question_id", *_CHOICES)),
    "mme": Conversion("MME", yes_no.mme, ("question_id", "category", *_CHOICES)),
    "mmbench_en_dev": Conversion(
        "mmbench", options.mmbench("mmbench_dev_20230712.tsv", "mmbench_dev_en*.tsv"), (*_MMBENCH, "answer")
    ),
    "mmbench_cn_dev": Conversion("mmbench_cn", options.mmbench("mmbench_dev_cn*.tsv"), (*_MMBENCH, "answer")),
    "mmbench_en_test": Conversion("mmbench", options.mmbench("mmbench_test_en*.tsv", "mmbench_test_2*.tsv"), _MMBENCH),
    "mmbench_cn_test": Conversion("mmbench_cn", options.mmbench("mmbench_test_cn*.tsv"), _MMBENCH),
    "scienceqa_img": Conversion("scienceqa", options.scienceqa(True), ("choices", *_CHOICES)),
    "scienceqa": Conversion("scienceqa", options.scienceqa(False), ("choices", "question", "answer")),
    "seedbench": Conversion("seed_bench", options.seedbench, ("question_id", "data_type", *_CHOICES)),
    "mmvp": Conversion("mmvp", options.mmvp, ("Index", "Question", "Options", "Correct Answer", "image")),
    "cv_bench": Conversion("cvbench", options.cv_bench("2d", "3d"), ("prompt", "choices", "source", *_CHOICES)),
    "cv_bench_2d": Conversion("cvbench", options.cv_bench("2d"), ("prompt", "choices", "source", *_CHOICES)),
    "cv_bench_3d": Conversion("cvbench", options.cv_bench("3d"), ("prompt", "choices", "source", *_CHOICES)),
    "mmvet": Conversion("mm-vet", judged.mmvet, ("question_id", "capability", *_CHOICES)),
    "llava_in_the_wild": Conversion(
        "llava-bench-in-the-wild",
        judged.llava_bench,
        ("question_id", "question", "category", "caption", "gpt_answer", "image"),
    ),
    "realworldqa": Conversion("realworldqa", options.realworldqa, _CHOICES),
}
PREPARE_SCRIPT = "eval/prepare_data.py"
PREPARE_COMMAND = f"python {PREPARE_SCRIPT}"
_JUDGED_FORM = {static: judged for judged, static in STATIC_SCORERS.items()}


def known_names() -> str:
    """All names that the command takes."""
    short = [name for name, entry in SHORT_NAMES.items() if entry.task in CONVERSIONS]
    return ", ".join(dict.fromkeys([*short, *CONVERSIONS]))


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
        path, conversion = documents_path(root, task), CONVERSIONS.get(_JUDGED_FORM.get(task, task))
        if not path.is_file() and conversion is None:
            continue
        if not path.is_file():
            raise FileNotFoundError(
                f"--data-root {root} has no {path.name} for {task}; make it with `{PREPARE_COMMAND} {path.stem} "
                f"--source DOWNLOADS --output {root}`, or leave out --data-root to fetch the task from the hub."
            )
        read_documents(path, conversion.required if conversion else ())
        files[task] = path
    return files


def require_ocr_tokens(path: Path) -> None:
    """`ValueError` where no document of `path` has OCR tokens."""
    if not any(document.get("ocr_tokens") for document in read_documents(path)):
        raise ValueError(
            f"{path} has no OCR tokens; put TextVQA_Rosetta_OCR_v0.2_val.json or LLaVA's llava_textvqa_val_v051_ocr"
            ".jsonl beside the questions and prepare the file again, or evaluate without --llava-prompts."
        )


def prepare(task: str, source: str | Path, output: str | Path) -> tuple[Path, int]:
    """Write the documents of `task` from the downloads in `source`; returns the file and its number of documents. What
    was left out is said on stderr.

    Raises:
        FileNotFoundError: a file of the download, or an image, is missing.
        ValueError: a file is not what the benchmark publishes.
    """
    conversion = CONVERSIONS[task]
    path = documents_path(output, task)
    found = Source(Path(source), conversion.folder, Path(output) / "images" / task)
    count = write_documents(path, conversion.convert(found))
    for reason, rows in found.skipped.items():
        print(f"{task}: {rows} {reason} are left out.", file=sys.stderr)
    return path, count


@dataclass
class PrepareOptions:
    """What is prepared."""

    source: str = option(help="LLaVA's playground/data/eval, or the folder of one benchmark")
    output: str = option(help="folder for the JSON lines")
    benchmarks: list[str] = option([], f"names or tasks, default all that are there: {known_names()}", positional=True)


COMMAND = Command(PREPARE_SCRIPT, __doc__, (PrepareOptions,))


def run(words: Sequence[str] | None = None) -> ExitStatus:
    """The command line; `FINDINGS` where some benchmarks were made and others failed."""
    (args,) = COMMAND.parse(words)
    if not Path(args.source).is_dir():
        raise FileNotFoundError(f"--source {args.source} is not a folder.")
    tasks = [
        SHORT_NAMES[name].task if name in SHORT_NAMES else name.removeprefix(STOCK_PREFIX) for name in args.benchmarks
    ]
    for name, task in zip(args.benchmarks, tasks, strict=True):
        if task not in CONVERSIONS:
            raise ValueError(f"No conversion for {name!r}; there are {known_names()}.")
    output_folder(args.output)
    written, failed = 0, {}
    for task in dict.fromkeys(tasks) or CONVERSIONS:
        try:
            path, count = prepare(task, args.source, args.output)
        except BenchmarkAbsent as error:
            if tasks:
                failed[task] = error
            else:
                print(f"{task}: left out. {error}", file=sys.stderr)
            continue
        except (ValueError, FileNotFoundError) as error:
            failed[task] = error
            continue
        written += 1
        print(f"{task}: {count} documents in {path}")
    return _told(written, failed, args.source)


def _told(written: int, failed: dict[str, Exception], source: str) -> ExitStatus:
    """Say what failed, if anything, and how that counts."""
    if not written and not failed:
        raise FileNotFoundError(f"{source} holds none of the benchmarks {known_names()}.")
    if not written and len(failed) == 1:
        raise next(iter(failed.values()))
    for task, error in failed.items():
        print(f"{task}: failed. {message_of(error)}", file=sys.stderr)
    if not written:
        raise ValueError(f"All {len(failed)} benchmarks failed: {', '.join(failed)}.")
    if failed:
        print(f"{len(failed)} of {written + len(failed)} benchmarks failed: {', '.join(failed)}.", file=sys.stderr)
    return ExitStatus.FINDINGS if failed else ExitStatus.DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`: 1 where some benchmarks were made and others failed."""
    return run_command(run, arguments)
