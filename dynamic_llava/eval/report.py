"""`python -m dynamic_llava.eval.report --run RUN`: the run against its dense base and against random selection.

Writes `report.json`, `report.html` (self-contained) and the pictures in it as PNG, and prints the table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..cli import Parser, seed, text, whole
from ..errors import run_command
from ..packages import require_package
from ..screen import hush_libraries


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m dynamic_llava.eval.report", description=__doc__)
    parser.add_argument("--run", type=text, required=True, help="folder of a Dynamic-LLaVA run")
    parser.add_argument("--base", type=text, default="assets/tiny-llava", help="its dense base (default %(default)s)")
    parser.add_argument("--data-root", type=text, help="folder of the shapes data (default data/shapes)")
    parser.add_argument("--output", type=text, help="folder of the report (default RUN/report)")
    parser.add_argument("--batch-size", type=whole(), default=32)
    parser.add_argument("--limit", type=whole(), help="first questions only")
    parser.add_argument("--descriptions", type=whole(), help="first descriptions only")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the random rows")
    parser.add_argument("--dtype", type=text, default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", type=text, help="torch device; default: the GPU where there is one")
    parser.add_argument("--tasks-dir", type=text, help="folder of further task YAML")
    return parser


def run(arguments: Sequence[str] | None = None) -> None:
    """Make the report that the command line asks for."""
    args = build_parser().parse_args(arguments)
    require_package("lmms_eval", "The report")
    hush_libraries()
    # Imported here: wrong arguments and a missing package answer before lmms-eval is loaded.
    from .conversations import data_root_at
    from .report_rows import VQA_TASK, make_report
    from .runner import EvaluationOptions

    options = EvaluationOptions((VQA_TASK,), args.batch_size, args.limit, args.seed, args.tasks_dir)
    with data_root_at(args.data_root):
        output = args.output or f"{args.run}/report"
        make_report(args.run, args.base, output, options, args.descriptions, args.dtype, args.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
