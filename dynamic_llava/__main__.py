"""Dynamic-LLaVA: train, evaluate, measure and serve multimodal models that drop tokens.

`dynamic-llava COMMAND --help` says what a command takes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from . import __version__
from .commands import COMMANDS, choose, load
from .config.words import HELP
from .errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status of the command, see `errors.ExitStatus`."""
    if not {"", os.getcwd()} & set(sys.path):
        # As `python -m` does: my_module:MyRule is looked for where the user stands.
        sys.path.insert(0, os.getcwd())
    return run_command(_run, list(sys.argv[1:] if arguments is None else arguments))


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["--version"]:
        print(f"dynamic-llava {__version__}")
        return 0
    name, rest = choose("", __doc__, {name: entry.help for name, entry in COMMANDS.items()}, words or HELP[:1])
    return load(name).main(rest)


if __name__ == "__main__":
    sys.exit(main())
