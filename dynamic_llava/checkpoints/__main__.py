"""Checkpoints in every layout: what is in them, and one as another."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..commands import Entry, choose, load
from ..config import Command, option
from ..errors import run_command
from ..screen import console, hush_libraries

SOURCE, LORA = "folder or repository", "of a LoRA folder: its base (the one that it names)"
TOWER = "folder or repository of the CLIP model (the checkpoint's)"


@dataclass(frozen=True)
class InspectOptions:
    """What is looked at."""

    source: str = option(help=SOURCE, positional=True)
    vision_tower: str | None = option(None, TOWER)
    json: bool = option(False, "print JSON")


@dataclass(frozen=True)
class ConvertOptions:
    """What is written, and where."""

    source: str = option(help=SOURCE, positional=True)
    target: str = option(help="new folder", positional=True)
    to: str = option(help="the layout: ours, published or llava-hf")
    vision_tower: str | None = option(None, TOWER)
    base: str | None = option(None, LORA)
    max_shard_gb: float = option(2.0, "of a weight file", "(0, 1048576]")
    overwrite: bool = option(False, "replace the folder")


@dataclass(frozen=True)
class MergeOptions:
    """Which LoRA is folded."""

    source: str = option(help="LoRA folder or repository", positional=True)
    target: str = option(help="new folder, our layout", positional=True)
    base: str | None = option(None, LORA)
    overwrite: bool = option(False, "replace the folder")


def _inspect(options: InspectOptions) -> None:
    from .inspect import facts_table, inspect_checkpoint

    facts = inspect_checkpoint(options.source, options.vision_tower)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        console().print(facts_table(options.source, facts))


def _convert(options: ConvertOptions) -> None:
    from .convert import convert

    convert(
        options.source,
        options.target,
        options.to,
        vision_tower=options.vision_tower,
        max_shard_bytes=int(options.max_shard_gb * 2**30),
        overwrite=options.overwrite,
        base=options.base,
    )
    print(f"wrote {options.target}")


def _merge(options: MergeOptions) -> None:
    from .merge import merge_adapter

    hush_libraries()
    merge_adapter(options.source, options.target, options.base, options.overwrite)


PARTS: dict[str, tuple[type, Callable[[Any], None], str]] = {
    "inspect": (InspectOptions, _inspect, "say what a checkpoint is, what is missing, what would be new"),
    "convert": (ConvertOptions, _convert, "write a checkpoint in another layout"),
    "merge": (MergeOptions, _merge, "fold a LoRA folder into its base"),
}


# What needs training data, which lies above this floor.
ABOVE = {
    "calibrate": Entry(
        "dynamic_llava.train.calibrate", "bring the output predictor to its keep rate, on training answers"
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(run, arguments)


def run(words: Sequence[str] | None = None) -> None:
    """Run the command that the words begin with."""
    helps = {name: help for name, (_, _, help) in PARTS.items()}
    helps |= {name: entry.help for name, entry in ABOVE.items()}
    name, rest = choose("checkpoints", __doc__, helps, sys.argv[1:] if words is None else words)
    if name in ABOVE:
        load(name, ABOVE).run(rest)
        return
    kind, act, help = PARTS[name]
    (options,) = Command(f"checkpoints {name}", help, (kind,)).parse(rest)
    act(options)


if __name__ == "__main__":
    sys.exit(main())
