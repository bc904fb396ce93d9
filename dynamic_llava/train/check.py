"""`dynamic-llava data check CONFIG [key=value ...]`: the configuration as training reads it, and what its data holds.

Exit status 0: fine; 1: samples that training would stop at or skip; 2: unreadable files, wrong keys.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Command, option, typed
from ..errors import ExitStatus
from ..screen import console
from .keys import OF_TRANSFORMERS, OWN_GROUPS


@dataclass
class CheckOptions:
    """How is looked, and what is printed."""

    decode: bool = option(False, "Decode every picture; finds damage inside, takes long.")
    json: bool = option(False, "Print JSON.")


COMMAND = Command(
    "data check", __doc__, (CheckOptions, *OWN_GROUPS), presets="train", config_first=True, also=OF_TRANSFORMERS
)


def run(words: Sequence[str] | None = None) -> ExitStatus:
    """Check and print; `FINDINGS` where the data has problems."""
    words = sys.argv[1:] if words is None else words
    COMMAND.answer_help(words)

    from ..data.check import check_data
    from ..data.check_report import print_report
    from .config import read_values, resolve

    given = read_values(words, COMMAND)
    (options,) = typed((CheckOptions,), given)
    # What asks for a GPU can be checked without one.
    given.values["use_cpu"] = True
    config = resolve(given)
    report = check_data(config.model.base_model, config.data, config.sparsity, config.training.seed, options.decode)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, console())
    return ExitStatus.DONE if report["ok"] else ExitStatus.FINDINGS
