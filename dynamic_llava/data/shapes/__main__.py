"""`python -m dynamic_llava.data.shapes --output data/shapes --seed 0`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from ...cli import Parser, seed, text, whole
from ...errors import run_command
from ...reading import read_json_object
from .build import INFO_FILE, build_shapes


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line, builds the data and says what is there; returns the exit status."""
    return run_command(_run, argv)


def _run(argv: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m dynamic_llava.data.shapes", description="Build the shapes data.")
    parser.add_argument("--output", type=text, default="data/shapes", help="folder to write")
    for name, parameter in inspect.signature(build_shapes).parameters.items():
        if isinstance(parameter.default, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help="replace other shapes there")
        elif isinstance(parameter.default, int):
            kind = seed if name == "seed" else whole()
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=parameter.default)
    output = build_shapes(**vars(parser.parse_args(argv)))
    counts = read_json_object(Path(output) / INFO_FILE, "record of shapes")["samples"]
    print(f"{output}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
