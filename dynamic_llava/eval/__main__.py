"""`python -m dynamic_llava.eval --model RUN --tasks shapes_vqa,shapes_describe`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dynamic_llava.eval", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub name: a Dynamic-LLaVA run, or a dense LLaVA")
    parser.add_argument("--tasks", required=True, help="comma-separated lmms-eval task names")
    parser.add_argument("--image-keep-rate", type=float, help="fraction of image tokens kept, in (0, 1]")
    parser.add_argument("--no-output-sparsity", action="store_true", help="keep all output tokens")
    parser.add_argument("--image-selector", default="predictor", help="predictor or random")
    parser.add_argument("--output-keep-rate", type=float, help="drive the kept fraction of output tokens to this value")
    parser.add_argument("--output-selector", default="predictor", help="predictor or random")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, help="first documents of each task only")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", help="torch device; default: the GPU where there is one")
    parser.add_argument("--seed", type=int, default=0, help="seed of random selectors")
    parser.add_argument("--data-root", help="folder of the shapes data (default data/shapes)")
    parser.add_argument("--tasks-dir", help="folder of task YAML (default eval/tasks of the repository)")
    parser.add_argument("--output", help="folder for results.json and samples (default MODEL/eval)")
    return parser


def results_table(evaluation) -> Table:
    """Metrics of an `Evaluation`, one row each."""
    table = Table(title=f"{evaluation.model}", title_style="bold")
    for column, justify in (("Task", "left"), ("Metric", "left"), ("Value", "right"), ("±", "right")):
        table.add_column(column, justify=justify)
    for task, metrics in evaluation.metrics.items():
        for name, value in metrics.items():
            if not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr")
                shown = f"{value:,.0f}" if value >= 100 else f"{value:.4f}"
                table.add_row(task, name, shown, "" if error is None else f"{error:.4f}")
        table.add_section()
    return table


def run(arguments: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = build_parser().parse_args(arguments)
    # Imported here: `--help` and wrong arguments answer at once instead of after torch and lmms-eval.
    from .loading import SparsitySettings, load_model
    from .runner import EvaluationOptions, check_data, evaluate_tasks, shapes_root_at, write_evaluation
    from .tasks import task_manager_for

    settings = SparsitySettings(
        args.image_keep_rate,
        False if args.no_output_sparsity else None,
        args.image_selector,
        args.output_selector,
        args.output_keep_rate,
    )
    if args.output is None and not Path(args.model).is_dir():
        raise ValueError(f"{args.model} is no folder here to write results into; pass --output.")
    tasks = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
    options = EvaluationOptions(tasks, args.batch_size, args.limit, args.seed, args.tasks_dir)
    with shapes_root_at(args.data_root):
        task_manager_for(tasks, args.tasks_dir)
        check_data(tasks)
        evaluation = evaluate_tasks(load_model(args.model, args.dtype, args.device), settings, options)
    path = write_evaluation(evaluation, args.output or f"{args.model}/eval")
    console = Console()
    console.print(results_table(evaluation))
    console.print(f"Results: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 with one line on what is wrong."""
    try:
        run(arguments)
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
