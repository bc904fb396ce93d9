"""`python -m dynamic_llava.checkpoints {inspect,convert,merge}`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import Parser, real, text
from ..errors import run_command
from ..screen import console, hush_libraries
from .convert import LAYOUTS, convert
from .inspect import facts_table, inspect_checkpoint
from .merge import merge_adapter

MOST_GIGABYTES = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, see `errors.ExitStatus`."""
    return run_command(_run, argv)


def _run(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m dynamic_llava.checkpoints", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    tower = {
        "metavar": "CLIP",
        "type": text,
        "help": "folder or repository of the CLIP model (default: the checkpoint's)",
    }

    inspect = commands.add_parser("inspect", help="say what a checkpoint is, what is missing, what would be new")
    inspect.add_argument("source", metavar="SRC", type=text, help="folder or repository")
    inspect.add_argument("--vision-tower", **tower)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    other = commands.add_parser("convert", help="write a checkpoint in another layout")
    other.add_argument("source", metavar="SRC", type=text, help="folder or repository")
    other.add_argument("target", metavar="DST", type=Path, help="new folder")
    other.add_argument("--to", required=True, choices=LAYOUTS)
    other.add_argument("--vision-tower", **tower)
    other.add_argument("--base", metavar="MODEL", type=text, help="of a LoRA folder (default: the one it names)")
    gigabytes = real(above=0, most=MOST_GIGABYTES)
    other.add_argument("--max-shard-gb", type=gigabytes, default=2.0, metavar="GB", help="(default: 2)")
    other.add_argument("--overwrite", action="store_true", help="replace DST")
    other.set_defaults(run=_convert)

    merge = commands.add_parser("merge", help="fold a LoRA folder into its base")
    merge.add_argument("source", metavar="LORA", type=text, help="folder or repository")
    merge.add_argument("target", metavar="DST", type=Path, help="new folder, our layout")
    merge.add_argument("--base", metavar="MODEL", type=text, help="the base (default: the one the adapter names)")
    merge.add_argument("--overwrite", action="store_true", help="replace DST")
    merge.set_defaults(run=_merge)
    return parser


def _merge(arguments: argparse.Namespace) -> None:
    hush_libraries()
    merge_adapter(arguments.source, arguments.target, arguments.base, arguments.overwrite)


def _inspect(arguments: argparse.Namespace) -> None:
    facts = inspect_checkpoint(arguments.source, arguments.vision_tower)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        console().print(facts_table(arguments.source, facts))


def _convert(arguments: argparse.Namespace) -> None:
    convert(
        arguments.source,
        arguments.target,
        arguments.to,
        vision_tower=arguments.vision_tower,
        max_shard_bytes=int(arguments.max_shard_gb * 2**30),
        overwrite=arguments.overwrite,
        base=arguments.base,
    )
    print(f"wrote {arguments.target}")


if __name__ == "__main__":
    sys.exit(main())
