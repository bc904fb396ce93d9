"""`python -m dynamic_llava.train --config configs/train/shapes.yaml key=value ...`: the sparsification stage."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys

from .config import StageConfig, read_values, resolve


def main(arguments: list[str] | None = None) -> int:
    """Train, save, and report where the configuration asks for it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dynamic_llava.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, see configs/train/")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done: parameters, memory, schedule")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: as on N GPUs (default: those here)")
    parser.add_argument(
        "--launcher", default="python -m", metavar="WORDS", help="with --dry-run: what the command shown starts with"
    )
    parser.add_argument(
        "--gradient-report",
        type=int,
        metavar="N",
        help="instead of training, the gradients at the predictors from the LM loss and the budgets over N batches",
    )
    parser.add_argument("overrides", nargs="*", help="key=value, on top of the file")
    parsed = parser.parse_intermixed_args(arguments)
    try:
        values, overridden = read_values(parsed.config, parsed.overrides)
        if parsed.dry_run:
            # What asks for a GPU can be planned without one.
            values["use_cpu"] = True
        elif values.get("deepspeed"):
            be_a_group()
        config = resolve(values, parsed.config, overridden)
        if parsed.dry_run:
            words = ["--config", parsed.config, *parsed.overrides]
            dry_run(config, f"{parsed.launcher} {__package__} {shlex.join(words)}", parsed.ranks)
        elif parsed.gradient_report is not None:
            report_gradients(config, parsed.gradient_report)
        else:
            run(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def be_a_group() -> None:
    """A process that no launcher started is the only one of its group; DeepSpeed would ask MPI who else there is."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def make_data(config: StageConfig) -> None:
    """Draw the embedded data where it is asked for and not there yet."""
    if config.data.shapes is not None:
        from ..data.shapes import build_shapes

        with config.training.main_process_first(desc="drawing the shapes"):
            build_shapes(config.data.image_folder[0], **config.data.shapes)


def dry_run(config: StageConfig, command: str, ranks: int | None) -> None:
    """Print what `command` would do."""
    from ..data.judged import count_judged
    from .plan import open_epoch, plan, print_judged, print_plan

    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks takes at least 1, got {ranks}.")
    dataset = open_epoch(config)
    print_plan(plan(config, None if dataset is None else len(dataset), ranks), command)
    if dataset is not None:
        print_judged(count_judged(dataset, config.sparsity.min_output_length), config)


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
