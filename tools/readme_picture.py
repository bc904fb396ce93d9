"""`python -m tools.readme_picture RUN DATA PNG`: what a run on the shapes keeps of pictures and of its own words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dynamic_llava.config import Command, option
from dynamic_llava.errors import run_command


@dataclass(frozen=True)
class PictureOptions:
    """What is drawn, and where to."""

    run: str = option(help="folder of a run", positional=True)
    data: str = option(help="folder of the shapes", positional=True)
    png: str = option(help="file to write", positional=True)


COMMAND = Command("tools.readme_picture", __doc__, (PictureOptions,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str] | None) -> None:
    (args,) = COMMAND.parse(arguments)
    from dynamic_llava.checkpoints.loaded import load_model
    from dynamic_llava.eval.conversations import data_root_at
    from dynamic_llava.eval.report_rows import patch_views, word_view
    from dynamic_llava.visualize.drawing import PAPER, patch_sheet, word_sheet

    with data_root_at(args.data):
        loaded = load_model(args.run, device="cpu")
        views = patch_views(loaded, seed=0, count=3)
        for view in views:
            view.kept.pop("random")
        sheets = [patch_sheet(views), word_sheet(word_view(loaded))]
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    for number, sheet in enumerate(sheets):
        whole.paste(sheet, (0, sum(s.height for s in sheets[:number])))
    # 256 colours are enough for drawn shapes, and a third of the bytes.
    whole.quantize(256).save(Path(args.png), optimize=True)


if __name__ == "__main__":
    sys.exit(main())
