"""How every command ends: one line for what a user can cause, one table of exit statuses; stdlib alone."""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from types import FrameType


class ExitStatus(IntEnum):
    """What a command's exit status says."""

    #: Also a training that a scheduler stopped (SIGTERM, SIGUSR1): it is saved, and the same command goes on.
    DONE = 0
    #: The command did its work and found something wrong, as `data check` does with a broken picture.
    FINDINGS = 1
    #: Wrong arguments, files or settings, a package that is missing, a disk or a memory that is full: nothing was
    #: done, or what was done can be resumed.
    BAD_INPUT = 2
    #: A fault of this project; a traceback was printed.
    FAULT = 70
    #: Ctrl-C. As shells count, 128 + the signal's number: 129 for SIGHUP, 143 for SIGTERM. A training is saved first,
    #: but for a second Ctrl-C.
    INTERRUPTED = 128 + signal.SIGINT
    #: Nobody reads the output any more, as in `| head`.
    NO_READER = 141


#: With this variable set, one-line messages come with their traceback.
SHOW_TRACEBACK = "DYNAMIC_LLAVA_TRACEBACK"
USER_ERRORS = (ValueError, OSError, ImportError, NotImplementedError)
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
# Loggers that speak while a library is imported, of what concerns only who has asked for it.
IMPORT_LOGGERS = ("bitsandbytes.backends.cpu.ops",)
INTERRUPTIONS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal that ends a command; what cleans up after Ctrl-C does so after this."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def run_command(command: Callable[..., int | None], *arguments) -> int:
    """Returns the exit status of `command(*arguments)`, whose own result counts where it is a number.

    `ValueError`, `OSError`, `ImportError` and `NotImplementedError` are what a user can cause: one line on stderr.
    SIGINT, SIGTERM and SIGHUP end the command with 128 + their number, unless it handles them itself.
    """
    for name in IMPORT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with _signals_as_exceptions():
        try:
            if hasattr(sys.stdout, "reconfigure"):
                # A table's dots and crosses are no reason to fail in a terminal that cannot show them.
                sys.stdout.reconfigure(errors="replace")
            status = int(command(*arguments) or ExitStatus.DONE)
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
        except BaseException as error:
            # Nothing cuts the message in half, nor what comes behind it.
            with _deaf():
                return _status_of(error)


def _status_of(error: BaseException) -> int:
    """The status of a command that ended with `error`, after saying so; those of argparse and such pass through."""
    # rich makes a SystemExit of it.
    broken = isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)
    nobody_reads = broken and (isinstance(error, SystemExit) or _has_no_reader(1) or _has_no_reader(2))
    if isinstance(error, OSError):
        _drop_lost_output()
    if nobody_reads:
        return ExitStatus.NO_READER
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        _say("interrupted" if number == signal.SIGINT else f"interrupted by {signal.Signals(number).name}")
        return 128 + number
    if isinstance(error, USER_ERRORS) or _is_out_of_memory(error):
        if os.environ.get(SHOW_TRACEBACK):
            traceback.print_exception(error)
        _say(f"error: {message_of(error)}")
        return ExitStatus.BAD_INPUT
    if not isinstance(error, Exception):
        raise error
    traceback.print_exception(error)
    _say("error: this is a fault of dynamic_llava; please report it with the lines above.")
    return ExitStatus.FAULT


def message_of(error: BaseException) -> str:
    """What an exception says, on one line; never empty."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def end_quietly_on_interrupt() -> None:
    """Let Ctrl-C end this process at once and without a traceback: while torch is imported, and at the very end.

    `run_command` takes over for as long as it runs.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def starts_a_command() -> bool:
    """Whether the package is imported because `dynamic-llava`, `python -m dynamic_llava...` or a script starts."""
    words, script = sys.orig_argv, getattr(sys.modules.get("__main__"), "__file__", None)
    if sys.argv[:1] == ["-m"] and "-m" in words[:-1]:
        return words[words.index("-m") + 1].split(".")[0] == __package__
    if not script:
        return False
    # The console script, also as Windows and zipped archives name it.
    if re.fullmatch(r"dynamic-llava(-script)?(\.\w+)?", os.path.basename(sys.argv[0] if sys.argv else script)):
        return True
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.dirname(os.path.abspath(script)) in {f"{root}/eval", f"{root}/scripts"}


def _end_at_once(number: int, frame: FrameType | None) -> None:
    # Written by the system: the streams may be in the middle of something.
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Interruptions raise `Interrupted` inside; what is ignored, or handled by who calls us, stays so."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in INTERRUPTIONS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _end_at_once):
                before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deaf() -> Iterator[None]:
    """Interruptions are not heard inside."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, signal.SIG_IGN) for n in INTERRUPTIONS if signal.getsignal(n) is _raise}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _has_no_reader(stream: int) -> bool:
    """Whether the descriptor `stream` is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(stream, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _drop_lost_output() -> None:
    """Lead a stdout that takes nothing any more into nothing, or Python would complain of it at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, sys.stdout.fileno())
            os.close(nothing)


def _is_out_of_memory(error: BaseException) -> bool:
    """Of Python, of torch on a CPU or on a GPU."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return any(words in str(error) for words in OUT_OF_MEMORY)


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
