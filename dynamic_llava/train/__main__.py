"""`python -m dynamic_llava.train --config configs/train/shapes.yaml key=value ...`: the sparsification stage."""

from __future__ import annotations

import argparse
import shlex
import sys

from .arguments import StageConfig, load_config


def main(arguments: list[str] | None = None) -> int:
    """Train, save, and report where the configuration asks for it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dynamic_llava.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, see configs/train/")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done: parameters, memory, schedule")
    parser.add_argument(
        "--gradient-report",
        type=int,
        metavar="N",
        help="instead of training, the gradients at the predictors from the LM loss and the budgets over N batches",
    )
    parser.add_argument("overrides", nargs="*", help="key=value, on top of the file")
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(parsed.config, parsed.overrides)
        if parsed.dry_run:
            dry_run(config)
        elif parsed.gradient_report is not None:
            report_gradients(config, parsed.gradient_report)
        else:
            run(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_data(config: StageConfig) -> None:
    """Draw the embedded data where it is asked for and not there yet."""
    if config.data.shapes is not None:
        from ..data.shapes import build_shapes

        with config.training.main_process_first(desc="drawing the shapes"):
            build_shapes(config.data.image_folder[0], **config.data.shapes)


def dry_run(config: StageConfig) -> None:
    """Print what the stage would do."""
    from .plan import count_samples, plan, print_plan

    print_plan(plan(config, count_samples(config)), shlex.join(["python", "-m", __package__, *sys.argv[1:]]))


def report_gradients(config: StageConfig, batches: int) -> None:
    """Print the gradients that reach the predictors."""
    from rich.console import Console

    from . import stage
    from .gradients import gradient_table

    if batches < 1:
        raise ValueError(f"--gradient-report takes at least 1 batch, got {batches}.")
    make_data(config)
    Console().print(gradient_table(stage.report_gradients(config, batches)))


def run(config: StageConfig) -> None:
    """The whole stage: data where it is embedded, training, checkpoint, report."""
    from . import stage

    make_data(config)
    stage.train(config)
    if config.data.report and config.training.process_index == 0:
        from ..eval.report import main as report

        arguments = {
            "run": config.training.output_dir,
            "base": config.model.base_model,
            "data-root": config.data.image_folder[0],
            "limit": config.data.report_questions,
            "descriptions": config.data.report_descriptions,
        }
        if report([f"--{key}={value}" for key, value in arguments.items() if value is not None]):
            raise ValueError(f"the report on {config.training.output_dir} failed; the run itself is saved.")


if __name__ == "__main__":
    sys.exit(main())
