"""What a case may not do: take longer than `SECONDS` or more than `MEMORY`, run code, write outside of its output."""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .mutators import ESCAPE

SECONDS = 30
MEMORY = 2 << 30
OUTPUT = "out"
# Files that code in an input makes when it runs, or that a name which leads out of a folder becomes.
CANARIES = ("executed", ESCAPE)


class Fault(Exception):
    """The product did what it must not; `key` is the same for the same fault."""

    def __init__(self, kind: str, place: str, text: str = "") -> None:
        super().__init__(text)
        self.key = f"{kind} at {place}"


class Hang(BaseException):
    """A case took longer than `SECONDS`."""


@contextmanager
def watched(root: Path) -> Iterator[None]:
    """Nothing below the folder of a case is written, changed or removed inside, but for its output."""
    before = _tree(root)
    yield
    changed = sorted(dict(before ^ _tree(root)))
    if changed:
        raise Fault("wrote outside its output", ", ".join(changed[:3]))


def _tree(root: Path) -> set[tuple[str, tuple]]:
    found = set()
    for folder, folders, files in os.walk(root):
        if Path(folder) == root:
            folders.remove(OUTPUT)
        for name in (*folders, *files):
            path = Path(folder, name)
            state = path.lstat()
            content = None if path.is_dir() else (state.st_size, state.st_mtime_ns)
            found.add((str(path.relative_to(root)), (state.st_mode, content)))
    return found


@contextmanager
def guarded(root: Path, work: Path, warnings: list[str]) -> Iterator[None]:
    """Limits of time and memory, `work` as the working directory, the environment as it was, warnings heard."""
    environment, place = dict(os.environ), Path.cwd()
    handler = _Hear(warnings)
    loggers = [logging.getLogger(name) for name in ("dynamic_llava", "transformers")]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if mapped := _bytes_of("VmSize"):
        # A little more than may be used, so that it is measured and not hit.
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY + (1 << 30), hard))
        Path("/proc/self/clear_refs").write_text("5")
    before = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    # Where Python does not hear the alarm.
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True, file=sys.__stderr__)
    for logger in loggers:
        logger.addHandler(handler)
    os.chdir(work)
    try:
        yield
        executed = [name for name in CANARIES if (root.parent / name).exists()]
        executed += [str(path) for path in root.rglob(CANARIES[0])]
        if executed:
            raise Fault("executed or escaped", str(executed))
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        os.chdir(place)
        os.environ.clear()
        os.environ.update(environment)
        for logger in loggers:
            logger.removeHandler(handler)
    peak = _bytes_of("VmHWM")
    if peak > MEMORY:
        raise Fault(f"memory above {MEMORY >> 30} GiB", "case", f"{peak / 2**30:.1f} GiB")


class _Hear(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


def _ring(number: int, frame: Any) -> None:
    raise Hang


def _bytes_of(name: str) -> int:
    """An entry of this process's status; 0 on systems that have none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)
