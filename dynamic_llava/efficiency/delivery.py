"""Where a report goes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from ..config import save
from ..files import write_atomically
from ..screen import console
from .options import Delivery


def deliver(name: str, report: dict[str, Any], tables: Iterable[Table], delivery: Delivery, *options: Any) -> None:
    """Print a report as tables or as JSON; into the output folder, where there is one, go `NAME.json` and `NAME.yaml`.

    Args:
        name: of the command: several write into one folder.
        report: ready for JSON.
        tables: the same for the screen.
        delivery: how, and where to.
        options: what made it; `--config` reads them again.
    """
    if delivery.json:
        print(json.dumps(report, indent=2))
    else:
        console().print(*tables)
    if delivery.output is not None:
        path = Path(delivery.output) / f"{name}.json"
        write_atomically(path, json.dumps(report, indent=2) + "\n")
        save(delivery.output, *options, delivery, name=f"{name}.yaml")
        print(f"wrote {path}", file=sys.stderr)
