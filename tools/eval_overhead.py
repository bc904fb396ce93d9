"""`python -m tools.eval_overhead`: what an evaluation takes besides its model, against lmms-eval itself.

The model answers at once. One side is lmms-eval with a model that returns a word per request; the other is everything
that `python -m dynamic_llava.eval` does between its checks and its result files: pictures, prompts, batches, answers on
disk, records, costs.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamic_llava.config import Command, option
from dynamic_llava.errors import run_command
from dynamic_llava.packages import require_package
from dynamic_llava.screen import console


@dataclass(frozen=True)
class OverheadOptions:
    """What is measured."""

    documents: int = option(300, "questions", "[1, inf)")
    batch_size: int = option(16, "prompts of a call", "[1, inf)")
    repeats: int = option(3, "timed pairs", "[1, inf)")
    processor: str = option("assets/tiny-llava", "its tokenizer is used")
    json: bool = option(False, "print JSON instead of a table")


COMMAND = Command("tools.eval_overhead", __doc__, (OverheadOptions,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str] | None) -> None:
    (args,) = COMMAND.parse(arguments)
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
