"""`python -m dynamic_llava.data check CONFIG [key=value ...]`: what training data holds and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from .check import check_data, load_settings
from .check_report import print_report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 where the data is fine, 1 where it has problems or cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m dynamic_llava.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="counts, token lengths, missing and unreadable pictures, samples that would be cut",
        description="Exit status 0: fine; 1: samples that training would stop at or skip, or unreadable files.",
    )
    check.add_argument("config", metavar="CONFIG", help="training YAML, such as configs/train/llava15_7b.yaml")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, such as image_folder=/data")
    check.add_argument("--decode", action="store_true", help="decode every picture; finds damage inside, takes long")
    check.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    try:
        report = check_data(load_settings(arguments.config, arguments.overrides), arguments.decode)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, Console())
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
