"""`python -m dynamic_llava.data check CONFIG [key=value ...]`: what training data holds and what is wrong with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ..cli import Parser
from ..errors import ExitStatus, run_command
from ..screen import console
from .check import check_data, load_settings
from .check_report import print_report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, see `errors.ExitStatus`: 1 where the data has problems."""
    return run_command(_run, argv)


def _run(argv: Sequence[str] | None) -> ExitStatus:
    parser = Parser(prog="python -m dynamic_llava.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="counts, token lengths, missing and unreadable pictures, samples that would be cut",
        description="Exit status 0: fine; 1: samples that training would stop at or skip; 2: unreadable files.",
    )
    check.add_argument("config", metavar="CONFIG", help="training YAML, such as configs/train/llava15_7b.yaml")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, such as image_folder=/data")
    check.add_argument("--decode", action="store_true", help="decode every picture; finds damage inside, takes long")
    check.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    report = check_data(load_settings(arguments.config, arguments.overrides), arguments.decode)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, console())
    return ExitStatus.DONE if report["ok"] else ExitStatus.FINDINGS


if __name__ == "__main__":
    sys.exit(main())
