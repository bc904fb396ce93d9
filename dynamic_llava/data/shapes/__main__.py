"""`dynamic-llava data shapes --output data/shapes --seed 0`: draw the embedded data."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config import Command, option
from ...errors import run_command
from ...reading import read_json_object


@dataclass
class ShapesOptions:
    """The arguments of `build_shapes`."""

    output: str = option("data/shapes", "folder to write")
    seed: int = option(0, "seed of everything", "[0, 4294967296)")
    train_pictures: int = option(4000, "pictures to train on", "[1, inf)")
    val_pictures: int = option(200, "pictures to watch", "[1, inf)")
    test_pictures: int = option(400, "pictures to evaluate on", "[1, inf)")
    questions_per_picture: int = option(8, "turns of a conversation", "[1, inf)")
    min_objects: int = option(2, "fewest objects in a picture", "[1, inf)")
    max_objects: int = option(4, "most objects in a picture", "[1, inf)")
    overwrite: bool = option(False, "replace other shapes there")


COMMAND = Command("data shapes", "Draw the embedded data.", (ShapesOptions,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the data and says what is there; returns the exit status."""
    return run_command(run, arguments)


def run(words: Sequence[str] | None = None) -> None:
    """Draw, and say what is there."""
    (options,) = COMMAND.parse(words)
    from .build import INFO_FILE, build_shapes

    output = build_shapes(**dataclasses.asdict(options))
    counts = read_json_object(Path(output) / INFO_FILE, "record of shapes")["samples"]
    print(f"{output}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
