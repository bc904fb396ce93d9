"""What the commands share: flags made from a dataclass of options, their checks, and where a report goes."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from ..cli import seed, text, whole
from ..files import output_folder, write_atomically
from ..machine import checked_device
from ..screen import console
from .shapes import add_shape_arguments

DTYPES = ("float32", "bfloat16", "float16")
Options = TypeVar("Options")


def add_option_flags(parser: argparse.ArgumentParser, options: type, shape: str, file_name: str) -> None:
    """One flag per field of the dataclass `options`, those of the shape, `--output` and `--json`."""
    add_shape_arguments(parser, shape)
    for field in fields(options):
        flag = flag_of(field.name)
        if field.type == "bool":
            parser.add_argument(flag, action="store_true")
        else:
            kind = seed if field.name == "seed" else whole() if field.type == "int" else text
            parser.add_argument(flag, type=kind, default=field.default, help=f"(default: {field.default})")
    parser.add_argument("--output", type=text, metavar="FOLDER", help=f"write {file_name} there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def read_options(options: type[Options], arguments: argparse.Namespace) -> Options:
    """What `add_option_flags` has read; the output folder is there from now on."""
    found = options(**{field.name: getattr(arguments, field.name) for field in fields(options)})
    if arguments.output is not None:
        output_folder(arguments.output)
    return found


def check_options(options: Any, least: Mapping[str, int]) -> None:
    """`ValueError` for an unknown `dtype`, a `device` that is not there, and a field below its `least` value."""
    if options.dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {options.dtype!r}; use one of {', '.join(DTYPES)}.")
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise ValueError(f"{flag_of(name)} must be at least {smallest}, got {getattr(options, name)}.")
    checked_device(options.device)


def deliver(
    report: dict[str, Any], arguments: argparse.Namespace, table: Callable[[dict[str, Any]], Table], file_name: str
) -> None:
    """Print the report as a table or as JSON, and write it into the output folder where there is one."""
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        console().print(table(report))
    if arguments.output is not None:
        path = Path(arguments.output) / file_name
        write_atomically(path, json.dumps(report, indent=2) + "\n")
        print(f"wrote {path}", file=sys.stderr)


def command_line(module: str = __package__) -> str:
    """The command in progress, as one types it."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def flag_of(name: str) -> str:
    """`output_tokens` as `--output-tokens`."""
    return "--" + name.replace("_", "-")
