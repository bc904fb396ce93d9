"""`checkpoints calibrate CKPT DATA`: a checkpoint's output predictor brought to its keep rate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Command, option
from ..errors import run_command


@dataclass(frozen=True)
class CalibrateOptions:
    """Which checkpoint, and on what."""

    checkpoint: str = option(help="folder of a run, or another one in our layout", positional=True)
    data: str = option(help="training data, as train_file takes it", positional=True)
    image_folder: str | None = option(None, "where its pictures are (the folder of the data)")
    answers: int = option(128, "training answers to look at", "[1, inf)")
    device: str | None = option(None, "of torch (the first GPU where there is one)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`."""
    return run_command(run, arguments)


def run(words: Sequence[str] | None = None) -> None:
    """Calibrate as the words say."""
    about = "bring the output predictor to its keep rate, on training answers"
    (options,) = Command("checkpoints calibrate", about, (CalibrateOptions,)).parse(words)
    # Imported here: `--help` and wrong words answer before torch is there.
    import torch

    from ..checkpoints import load_processor
    from ..data import open_dataset
    from ..machine import checked_device
    from ..screen import hush_libraries
    from .output_rate import calibrate, checked_config, summary

    folder = Path(options.checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder here; download the checkpoint, its files change.")
    checked_config(folder)
    hush_libraries()
    device = checked_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    processor = load_processor(folder)
    dataset = open_dataset(options.data, options.image_folder, processor, output_turns="all")
    print(summary(calibrate(folder, dataset, processor, options.answers, device)))


if __name__ == "__main__":
    sys.exit(main())
