"""`dynamic-llava report --run RUN`: the run against its dense base and against random selection.

Writes `report.json`, `report.html` (self-contained) and the pictures in it as PNG, and prints the table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Command, option, save
from ..errors import run_command
from ..files import output_folder
from ..packages import require_package
from ..screen import hush_libraries
from .keys import DTYPES, SEEDS


@dataclass
class ReportOptions:
    """What is reported on."""

    run: str = option(help="folder of a Dynamic-LLaVA run")
    base: str = option("assets/tiny-llava", "its dense base")
    data_root: str | None = option(None, "folder of the shapes data (data/shapes)")
    output: str | None = option(None, "folder of the report (RUN/report)")
    batch_size: int = option(32, range="[1, inf)")
    limit: int | None = option(None, "first questions only", "[1, inf)")
    descriptions: int | None = option(None, "first descriptions only", "[1, inf)")
    seed: int = option(0, "of the random rows", SEEDS)
    dtype: str = option("auto", "of the weights", choices=DTYPES)
    device: str | None = option(None, "torch device (the GPU where there is one)")
    tasks_dir: str | None = option(None, "folder of further task YAML")


COMMAND = Command("report", __doc__, (ReportOptions,))


def run(words: Sequence[str] | None = None) -> None:
    """Make the report that the command line asks for."""
    (args,) = COMMAND.parse(words)
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
        save(output_folder(output), args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
