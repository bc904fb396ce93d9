"""`python -m tools.eval_overhead`: what an evaluation takes besides its model, against lmms-eval itself.

The model answers at once. One side is lmms-eval with a model that returns a word per request; the other is everything
that `python -m dynamic_llava.eval` does between its checks and its result files: pictures, prompts, batches, answers on
disk, records, costs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.cli import Parser, text, whole
from dynamic_llava.errors import run_command
from dynamic_llava.packages import require_package
from dynamic_llava.screen import console


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m tools.eval_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--documents", type=whole(), default=300, help="(default %(default)s)")
    parser.add_argument("--batch-size", type=whole(), default=16, help="(default %(default)s)")
    parser.add_argument("--repeats", type=whole(), default=3, help="timed pairs (default %(default)s)")
    parser.add_argument(
        "--processor", type=text, default="assets/tiny-llava", help="its tokenizer is used (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(arguments)
    require_package("lmms_eval", "The comparison with lmms-eval")
    from tools.eval_overhead_bench import build_bench, measure_overhead, overhead_table

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        bench = build_bench(Path(folder), args.processor, args.documents, args.batch_size)
        report = measure_overhead(bench, args.repeats)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        console().print(overhead_table(report))


if __name__ == "__main__":
    sys.exit(main())
