"""Training data: what is wrong with it, and the embedded shapes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..commands import Entry, run_below
from ..errors import run_command

TABLE = {
    "check": Entry("dynamic_llava.train.check", "counts, token lengths, missing and unreadable pictures, what is cut"),
    "shapes": Entry("dynamic_llava.data.shapes.__main__", "draw the embedded data"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`: 1 where the data has problems."""
    return run_command(run, arguments)


def run(words: Sequence[str] | None = None) -> int | None:
    """Run the command that the words begin with."""
    return run_below("data", __doc__, TABLE, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
