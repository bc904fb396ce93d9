"""`python -m dynamic_llava.data.shapes --output data/shapes --seed 0`."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path

from .build import INFO_FILE, build_shapes


def main() -> None:
    """Reads the command line, builds the data and says what is there."""
    parser = argparse.ArgumentParser(prog="python -m dynamic_llava.data.shapes", description="Build the shapes data.")
    parser.add_argument("--output", default="data/shapes", help="folder to write")
    for name, parameter in inspect.signature(build_shapes).parameters.items():
        if isinstance(parameter.default, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help="replace other shapes there")
        elif isinstance(parameter.default, int):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=parameter.default)
    arguments = vars(parser.parse_args())
    try:
        output = build_shapes(**arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    counts = json.loads((Path(output) / INFO_FILE).read_text())["samples"]
    print(f"{output}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
