"""`dynamic-llava train --config shapes key=value ...`: the sparsification stage."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .. import commands
from ..config import Given, typed
from ..errors import USER_ERRORS, message_of, run_command
from ..packages import require_package
from .keys import COMMAND, RunOptions

if TYPE_CHECKING:
    from .config import StageConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save, and report where the configuration asks for it. Returns the exit status."""
    return run_command(run, arguments)


def run(words: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    words = sys.argv[1:] if words is None else words
    COMMAND.answer_help(words)
    from .config import read_values, resolve

    given = read_values(words)
    (options,) = typed((RunOptions,), given)
    if options.dry_run:
        # What asks for a GPU, or a package, can be planned without one.
        given.values["use_cpu"] = True
    else:
        require_packages(given.values)
        if given.values.get("deepspeed"):
            be_a_group()
    name_accelerator()
    config = resolve(given)
    if options.dry_run:
        dry_run(config, f"{options.launcher} {__package__} {shlex.join(words_of(given))}", options.ranks)
    elif options.gradient_report is not None:
        report_gradients(config, options.gradient_report)
    else:
        run_stage(config)


def words_of(given: Given) -> list[str]:
    """The command line again, without what says that it is only a plan."""
    options = {field.name for field in fields(RunOptions)}
    config = [] if given.config is None else ["--config", given.config]
    return config + [f"{key}={text}" for key, text in given.texts.items() if key not in options]


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


def run_stage(config: StageConfig) -> None:
    """The whole stage: data where it is embedded, training, checkpoint, report."""
    from ..train import stage
    from .progress import print_end

    make_data(config)
    stage.train(config)
    if config.training.process_index != 0:
        return
    if config.data.report:
        arguments = {
            "run": config.training.output_dir,
            "base": config.model.base_model,
            "data_root": config.data.image_folder[0],
            "limit": config.data.report_questions,
            "descriptions": config.data.report_descriptions,
        }
        try:
            commands.load("report").run([f"{key}={value}" for key, value in arguments.items() if value is not None])
        except USER_ERRORS as error:
            place = config.training.output_dir
            raise ValueError(f"The run is saved in {place}; its report failed: {message_of(error)}") from error
    print_end(config)


if __name__ == "__main__":
    sys.exit(main())
