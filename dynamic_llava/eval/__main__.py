"""Evaluate a model: `dynamic-llava eval --model RUN --tasks vqav2,gqa,mmbench`.

`dynamic-llava compare RUN...` sets evaluations side by side with the paper's figures.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from .. import commands
from ..config import Command, save
from ..config.fields import Key
from ..errors import run_command
from ..files import output_folder
from ..packages import require_package
from ..screen import console, hush_libraries
from .keys import EvalOptions
from .names import judge_key, resolve_names

if TYPE_CHECKING:
    from .runner import Evaluation

COMPARE = "compare"

COMMAND = Command("eval", __doc__, (EvalOptions,), presets="eval")


def parse(words: Sequence[str] | None) -> EvalOptions:
    """The options; `ValueError` also where there is no folder for results."""
    (args,) = COMMAND.parse(words)
    if args.output is None and not Path(args.model).is_dir():
        raise ValueError(f"{args.model} is no folder here to write results into; pass --output.")
    return args


def run(words: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says, or compare evaluations."""
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == [COMPARE]:
        commands.load(COMPARE).run(words[1:])
    else:
        evaluate(parse(words))


def evaluate(args: EvalOptions) -> None:
    """Evaluate, write and print."""
    tasks, notices = resolve_names(args.tasks, judge_key() is not None)
    require_package("lmms_eval", "Evaluation")
    rank, world_size = (_count(name, least) for name, least in (("RANK", 0), ("WORLD_SIZE", 1)))
    hush_libraries(logging.WARNING if rank == 0 else logging.ERROR)
    for notice in notices if rank == 0 else ():
        print(notice, file=sys.stderr)
    # Imported here: `--help` and wrong arguments answer at once instead of after torch and lmms-eval.
    from ..checkpoints.loaded import SparsitySettings, load_model
    from ..checkpoints.source import find_folder
    from ..machine import checked_device
    from .conversations import data_root_at
    from .responses import ResponseStore, checkpoint_fingerprint
    from .runner import EvaluationOptions, check_tasks, evaluate_tasks, read_tasks, write_evaluation

    device = args.device or default_device(world_size)
    if device is not None:
        checked_device(device)
    settings = SparsitySettings(**{field.name: getattr(args, field.name) for field in fields(SparsitySettings)})
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
        if rank == 0:
            save(output, args)
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
    if evaluation is not None:
        _show(evaluation, write_evaluation(evaluation, output))


def _show(evaluation: Evaluation, path: Path) -> None:
    from .tables import efficiency_table, results_table

    console().print(results_table(evaluation), efficiency_table(evaluation.efficiency), f"Results: {path}")


def default_device(world_size: int) -> str | None:
    """Each process's own GPU where several run, else what `load_model` takes."""
    import torch

    if world_size > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return None


def _count(name: str, default: int) -> int:
    """A number that a launcher sets."""
    key = Key(name, (int,), default, "", "[0, inf)")
    return key.checked(os.environ.get(name, default), name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
