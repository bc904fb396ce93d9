"""What stock LLaVA and Dynamic-LLaVA cost.

dynamic-llava efficiency flops --shape 13b --image-keep-rate 0.2
dynamic-llava efficiency measure --output runs/efficiency
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..commands import choose
from ..config import Command
from ..errors import run_command
from ..files import output_folder
from .options import Delivery, FlopsOptions, MeasureOptions, ScoreOptions, ShapeOptions, StepOptions


@dataclass(frozen=True)
class Part:
    """A command below: its module, whose `run` takes options, shape and delivery, its options, and a line of help."""

    module: str
    options: type
    help: str


PARTS = {
    "flops": Part("flops_report", FlopsOptions, "count FLOPs and KV bytes; needs no weights"),
    "measure": Part("measure", MeasureOptions, "time and memory of stock LLaVA and ours on the same random weights"),
    "train": Part("train_step", StepOptions, "time and memory of a training step of both"),
    "score": Part("scoring", ScoreOptions, "perplexity of an answer in one forward against cached decoding"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(run, arguments)


def run(words: Sequence[str] | None = None) -> None:
    """Run the command that the words begin with."""
    helps = {name: part.help for name, part in PARTS.items()}
    name, rest = choose("efficiency", __doc__, helps, sys.argv[1:] if words is None else words)
    part = PARTS[name]
    command = Command(f"efficiency {name}", part.help, (part.options, ShapeOptions, Delivery))
    options, shape, delivery = command.parse(rest)
    if delivery.output is not None:
        # Before the work whose results go there.
        output_folder(delivery.output)
    importlib.import_module(f".{part.module}", __package__).run(options, shape, delivery)


if __name__ == "__main__":
    sys.exit(main())
