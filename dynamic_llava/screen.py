"""What commands show: tables that are whole wherever they go, one bar at a time, and nothing of the libraries below."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from tqdm import tqdm

#: Columns where no terminal sets them: more than any table takes.
WIDE = 1000
#: Seconds between two states of a bar that is written into a file.
SELDOM = 60.0
COMMAND = "dynamic-llava"

_BAR: ContextVar[tqdm | None] = ContextVar("_BAR", default=None)


def console() -> Console:
    """A console on stdout, as wide as its terminal; in a file or a pipe a table is as wide as its content."""
    return Console(width=None if _is_terminal(sys.stdout) else WIDE)


@contextmanager
def progress(total: int, what: str, shown: bool = True) -> Iterator[tqdm]:
    """A bar on stderr that counts to `total`; inside another one, its steps become part of that one."""
    outer = _BAR.get()
    if outer is not None:
        outer.total += total
        yield outer
        return
    often = 0.1 if _is_terminal(sys.stderr) else SELDOM
    with tqdm(total=total, desc=what, disable=not shown, dynamic_ncols=True, mininterval=often) as bar:
        token = _BAR.set(bar)
        try:
            yield bar
        finally:
            _BAR.reset(token)


def command(*words: str) -> str:
    """A command of this project as it can be typed here."""
    if shutil.which(COMMAND):
        return shlex.join([COMMAND, *words])
    python = os.path.relpath(sys.executable)
    return shlex.join([sys.executable if python.startswith("..") else python, "-m", __package__, *words])


def clock(seconds: float) -> str:
    """A duration as 0:07, 12:30 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def hush_libraries(level: int = logging.WARNING) -> None:
    """No bars for weights that are read and written, and no messages below `level`, `ERROR` on all ranks but one."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    downloads_show = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if downloads_show:
        # Minutes, where the others are seconds.
        enable_progress_bars()
    for package in ("transformers", __package__):
        logging.getLogger(package).setLevel(level)


def _is_terminal(stream) -> bool:
    return stream is not None and stream.isatty()
