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

from dynamic_llava.config import Command, option
from dynamic_llava.errors import ExitStatus, message_of, run_command
from dynamic_llava.eval.local.documents import write_documents
from dynamic_llava.eval.local.files import documents_path
from dynamic_llava.eval.names import SHORT_NAMES, STOCK_PREFIX
from dynamic_llava.files import output_folder

from . import judged, open_answers, options, yes_no
from .source import BenchmarkAbsent, Source


@dataclass(frozen=True)
class Conversion:
    """How the documents of one task are made.

    Args:
        folder: the benchmark's folder in LLaVA's `playground/data/eval`.
        convert: documents from a source.
    """

    folder: str
    convert: Callable[[Source], Iterator[dict[str, Any]]]


CONVERSIONS = {
    "vqav2_val": Conversion("vqav2", open_answers.vqav2_val),
    "vqav2_test": Conversion("vqav2", open_answers.vqav2_test),
    "gqa": Conversion("gqa", open_answers.gqa),
    "textvqa_val": Conversion("textvqa", open_answers.textvqa_val),
    "vizwiz_vqa_val": Conversion("vizwiz", open_answers.vizwiz_vqa_val),
    "vizwiz_vqa_test": Conversion("vizwiz", open_answers.vizwiz_vqa_test),
    "pope": Conversion("pope", yes_no.pope(*yes_no.POPE_CATEGORIES)),
    "pope_adv": Conversion("pope", yes_no.pope("adversarial")),
    "pope_pop": Conversion("pope", yes_no.pope("popular")),
    "pope_random": Conversion("pope", yes_no.pope("random")),
    "mme": Conversion("MME", yes_no.mme),
    "mmbench_en_dev": Conversion("mmbench", options.mmbench("mmbench_dev_20230712.tsv", "mmbench_dev_en*.tsv")),
    "mmbench_cn_dev": Conversion("mmbench_cn", options.mmbench("mmbench_dev_cn*.tsv")),
    "mmbench_en_test": Conversion("mmbench", options.mmbench("mmbench_test_en*.tsv", "mmbench_test_2*.tsv")),
    "mmbench_cn_test": Conversion("mmbench_cn", options.mmbench("mmbench_test_cn*.tsv")),
    "scienceqa_img": Conversion("scienceqa", options.scienceqa(True)),
    "scienceqa": Conversion("scienceqa", options.scienceqa(False)),
    "seedbench": Conversion("seed_bench", options.seedbench),
    "mmvp": Conversion("mmvp", options.mmvp),
    "cv_bench": Conversion("cvbench", options.cv_bench("2d", "3d")),
    "cv_bench_2d": Conversion("cvbench", options.cv_bench("2d")),
    "cv_bench_3d": Conversion("cvbench", options.cv_bench("3d")),
    "mmvet": Conversion("mm-vet", judged.mmvet),
    "llava_in_the_wild": Conversion("llava-bench-in-the-wild", judged.llava_bench),
    "realworldqa": Conversion("realworldqa", options.realworldqa),
}
PREPARE_SCRIPT = "eval/prepare_data.py"


def known_names() -> str:
    """All names that the command takes."""
    short = [name for name, entry in SHORT_NAMES.items() if entry.task in CONVERSIONS]
    return ", ".join(dict.fromkeys([*short, *CONVERSIONS]))


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
