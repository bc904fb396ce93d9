"""`python -m dynamic_llava.efficiency flops|measure|train|score`: what dense LLaVA and Dynamic-LLaVA cost.

python -m dynamic_llava.efficiency flops --shape 13b --image-keep-rate 0.2
python -m dynamic_llava.efficiency measure --output runs/efficiency
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..cli import Parser
from ..efficiency import flops_report, measure, scoring, train_step
from ..errors import run_command


def build_parser() -> Parser:
    """The subcommands."""
    parser = Parser(prog="python -m dynamic_llava.efficiency", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module, text in (
        ("flops", flops_report, "count FLOPs and KV bytes; needs no weights"),
        ("measure", measure, "time and memory of stock LLaVA and ours on the same random weights"),
        ("train", train_step, "time and memory of a training step of both"),
        ("score", scoring, "perplexity of an answer in one forward against cached decoding"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, see `errors.ExitStatus`."""
    return run_command(_run, argv)


def _run(argv: Sequence[str] | None) -> None:
    arguments = build_parser().parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
