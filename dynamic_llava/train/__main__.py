"""`python -m dynamic_llava.train --config configs/train/shapes.yaml key=value ...`: the sparsification stage."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from typing import Any

from ..cli import Parser, text, whole
from ..errors import USER_ERRORS, message_of, run_command
from ..packages import require_package
from .config import StageConfig, read_values, resolve


def main(arguments: list[str] | None = None) -> int:
    """Train, save, and report where the configuration asks for it. Returns the exit status."""
    return run_command(_run, arguments)


def _run(arguments: list[str] | None) -> None:
    parser = Parser(prog="python -m dynamic_llava.train", description=__doc__)
    parser.add_argument("--config", required=True, type=text, help="YAML file, see configs/train/")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done: parameters, memory, schedule")
    parser.add_argument("--ranks", type=whole(), metavar="N", help="with --dry-run: as on N GPUs (default: those here)")
    parser.add_argument(
        "--launcher", default="python -m", metavar="WORDS", help="with --dry-run: what the command shown starts with"
    )
    parser.add_argument(
        "--gradient-report",
        type=whole(),
        metavar="N",
        help="instead of training, the gradients at the predictors from the LM loss and the budgets over N batches",
    )
    parser.add_argument("overrides", nargs="*", help="key=value, on top of the file")
    parsed = parser.parse_intermixed_args(arguments)
    values, overridden = read_values(parsed.config, parsed.overrides)
    if parsed.dry_run:
        # What asks for a GPU, or a package, can be planned without one.
        values["use_cpu"] = True
    else:
        require_packages(values)
        if values.get("deepspeed"):
            be_a_group()
    name_accelerator()
    config = resolve(values, parsed.config, overridden)
    if parsed.dry_run:
        words = ["--config", parsed.config, *parsed.overrides]
        dry_run(config, f"{parsed.launcher} {__package__} {shlex.join(words)}", parsed.ranks)
    elif parsed.gradient_report is not None:
        report_gradients(config, parsed.gradient_report)
    else:
        run(config)


def require_packages(values: dict[str, Any]) -> None:
    """`ImportError` where a key of the configuration needs a package that is missing, before anything is read."""
    reporters = values.get("report_to")
    reporters = reporters if isinstance(reporters, list) else [reporters]
    needs = {
        "deepspeed": bool(values.get("deepspeed")),
        "peft": bool(values.get("lora_r")),
        "bitsandbytes": bool(values.get("quantize")) or "bnb" in str(values.get("optim")),
        "flash_attn": values.get("attn_implementation") == "flash_attention_2",
        "tensorboard": "tensorboard" in reporters,
        "wandb": "wandb" in reporters,
        "lmms_eval": values.get("report") is True,
    }
    for name in (name for name, needed in needs.items() if needed):
        require_package(name, "This configuration")


def be_a_group() -> None:
    """A process that no launcher started is the only one of its group; DeepSpeed would ask MPI who else there is."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def name_accelerator() -> None:
    """DeepSpeed, which accelerate imports wherever it is installed, would warn of every machine without a GPU."""
    import torch

    if not torch.cuda.is_available() and torch.accelerator.current_accelerator() is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


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

    dataset = open_epoch(config)
    print_plan(plan(config, None if dataset is None else len(dataset), ranks), command)
    if dataset is not None:
        print_judged(count_judged(dataset, config.sparsity.min_output_length), config)


def report_gradients(config: StageConfig, batches: int) -> None:
    """Print the gradients that reach the predictors."""
    from ..screen import console
    from ..train import stage
    from .gradients import gradient_table

    make_data(config)
    console().print(gradient_table(stage.report_gradients(config, batches)))


def run(config: StageConfig) -> None:
    """The whole stage: data where it is embedded, training, checkpoint, report."""
    from ..train import stage
    from .progress import print_end

    make_data(config)
    stage.train(config)
    if config.training.process_index != 0:
        return
    if config.data.report:
        from ..eval.report import run as report

        arguments = {
            "run": config.training.output_dir,
            "base": config.model.base_model,
            "data-root": config.data.image_folder[0],
            "limit": config.data.report_questions,
            "descriptions": config.data.report_descriptions,
        }
        try:
            report([f"--{key}={value}" for key, value in arguments.items() if value is not None])
        except USER_ERRORS as error:
            place = config.training.output_dir
            raise ValueError(f"The run is saved in {place}; its report failed: {message_of(error)}") from error
    print_end(config)


if __name__ == "__main__":
    sys.exit(main())
