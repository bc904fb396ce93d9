"""Evaluate a model: `python -m dynamic_llava.eval --model RUN --tasks vqav2,gqa,mmbench`.

`python -m dynamic_llava.eval compare RUN...` sets evaluations side by side with the paper's figures.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import Parser, rate, seed, text, whole
from ..errors import run_command
from ..files import output_folder
from ..packages import require_package
from ..screen import console, hush_libraries
from .config_file import apply_config
from .names import OWN_TASKS, SHORT_NAMES, judge_key, resolve_names
from .tables import efficiency_table, results_table

COMPARE = "compare"


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m dynamic_llava.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=text, help="YAML with defaults of these options, see configs/eval")
    parser.add_argument("--model", type=text, help="folder or hub name: a Dynamic-LLaVA run, or a dense LLaVA")
    parser.add_argument(
        "--tasks", type=text, help=f"comma-separated: {', '.join([*SHORT_NAMES, *OWN_TASKS])}, or any lmms-eval task"
    )
    parser.add_argument("--image-keep-rate", type=rate, help="fraction of image tokens kept, in (0, 1]")
    parser.add_argument("--no-output-sparsity", action="store_true", help="keep all output tokens")
    parser.add_argument("--image-selector", default="predictor", help="predictor or random")
    parser.add_argument("--output-keep-rate", type=rate, help="drive the kept fraction of output tokens to this value")
    parser.add_argument("--output-selector", default="predictor", help="predictor or random")
    parser.add_argument("--batch-size", type=whole(), default=16, help="(default %(default)s)")
    parser.add_argument("--limit", type=whole(), help="first documents of each task only")
    parser.add_argument(
        "--image-aspect-ratio", help="pad, square or keep; default: as the model was trained, for a dense LLaVA pad"
    )
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", type=text, help="torch device; default: the GPU where there is one")
    parser.add_argument("--seed", type=seed, default=0, help="seed of random selectors")
    parser.add_argument(
        "--data-root", type=text, help="documents of eval/prepare_data.py; also the shapes (data/shapes)"
    )
    parser.add_argument("--llava-prompts", action="store_true", help="ask as LLaVA's scripts do: TextVQA, MMBench, ...")
    parser.add_argument("--tasks-dir", type=text, help="folder of further task YAML")
    parser.add_argument("--output", type=text, help="folder for results.json and samples (default MODEL/eval)")
    parser.add_argument("--resume", action="store_true", help="take over the answers in OUTPUT/responses.jsonl")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options from the command line over those of `--config`; `ValueError` where the model or the tasks are missing."""
    parser = build_parser()
    config = parser.parse_args(arguments).config
    if config:
        apply_config(parser, Path(config))
    args = parser.parse_args(arguments)
    for name in ("model", "tasks"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing; pass it, or name a file with it as --config.")
    if args.output is None and not Path(args.model).is_dir():
        raise ValueError(f"{args.model} is no folder here to write results into; pass --output.")
    return args


def run(arguments: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = parse(arguments)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    tasks, notices = resolve_names(names, judge_key() is not None)
    require_package("lmms_eval", "Evaluation")
    rank, world_size = (whole(0)(os.environ.get(name, least)) for name, least in (("RANK", 0), ("WORLD_SIZE", 1)))
    hush_libraries(logging.WARNING if rank == 0 else logging.ERROR)
    for notice in notices if rank == 0 else ():
        print(notice, file=sys.stderr)
    # Imported here: `--help` and wrong arguments answer at once instead of after torch and lmms-eval.
    from ..checkpoints.aspect_ratio import check_aspect_ratio
    from ..checkpoints.loaded import SparsitySettings, load_model, parse_dtype
    from ..checkpoints.source import find_folder
    from ..machine import checked_device
    from .conversations import data_root_at
    from .responses import ResponseStore, checkpoint_fingerprint
    from .runner import EvaluationOptions, check_tasks, evaluate_tasks, read_tasks, write_evaluation

    device = args.device or default_device(world_size)
    parse_dtype(args.dtype)
    if device is not None:
        checked_device(device)
    settings = SparsitySettings(
        args.image_keep_rate,
        False if args.no_output_sparsity else None,
        args.image_selector,
        args.output_selector,
        args.output_keep_rate,
    )
    if args.image_aspect_ratio is not None:
        check_aspect_ratio(args.image_aspect_ratio, "--image-aspect-ratio")
    options = EvaluationOptions(
        tasks, args.batch_size, args.limit, args.seed, args.tasks_dir, args.data_root, args.llava_prompts
    )
    output = Path(args.output or f"{args.model}/eval")
    with data_root_at(args.data_root):
        manager = check_tasks(options)
        # What is cheap comes first: is there such a model, then the documents, then gigabytes of weights.
        find_folder(args.model, weights=False)
        if rank == 0:
            # The other ranks take what this one has fetched.
            read_tasks(manager, options)
        output_folder(output)
        store = ResponseStore(output, checkpoint_fingerprint(args.model), args.resume, rank, world_size)
        if len(store):
            print(f"{len(store)} answers of an earlier run are taken over.", file=sys.stderr)
        evaluation = evaluate_tasks(
            load_model(args.model, args.dtype, device, args.image_aspect_ratio),
            settings,
            options,
            manager,
            output,
            store,
        )
    if evaluation is None:
        return
    path = write_evaluation(evaluation, output)
    console().print(results_table(evaluation), efficiency_table(evaluation.efficiency), f"Results: {path}")


def default_device(world_size: int) -> str | None:
    """Each process's own GPU where several run, else what `load_model` takes."""
    import torch

    if world_size > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == [COMPARE]:
        from .compare import run as compare

        return run_command(compare, arguments[1:])
    return run_command(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
