"""How every command ends: one line for what a user can cause, one table of exit statuses."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum


class ExitStatus(IntEnum):
    """What a command's exit status says."""

    #: Also a training that a scheduler stopped (SIGTERM, SIGUSR1): it is saved, and the same command goes on.
    DONE = 0
    #: The command did its work and found something wrong, as `data check` does with a broken picture.
    FINDINGS = 1
    #: Wrong arguments, files or settings, a package that is missing, a disk that is full: nothing was done, or what
    #: was done can be resumed.
    BAD_INPUT = 2
    #: A fault of this project; a traceback was printed.
    FAULT = 70
    #: Ctrl-C or a closed terminal (SIGHUP); 128 + the signal's number, as shells count. A training is saved first, but
    #: for a second Ctrl-C.
    INTERRUPTED = 130


#: With this variable set, one-line messages come with their traceback.
SHOW_TRACEBACK = "DYNAMIC_LLAVA_TRACEBACK"
USER_ERRORS = (ValueError, OSError, ImportError, NotImplementedError)


def run_command(command: Callable[..., int | None], *arguments) -> int:
    """Returns the exit status of `command(*arguments)`, whose own result counts where it is a number.

    `ValueError`, `OSError`, `ImportError` and `NotImplementedError` are what a user can cause: one line on stderr.
    """
    try:
        return int(command(*arguments) or ExitStatus.DONE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    except USER_ERRORS as error:
        if os.environ.get(SHOW_TRACEBACK):
            traceback.print_exc()
        print(f"error: {message_of(error)}", file=sys.stderr)
        return ExitStatus.BAD_INPUT
    except Exception:
        traceback.print_exc()
        print("error: this is a fault of dynamic_llava; please report it with the lines above.", file=sys.stderr)
        return ExitStatus.FAULT


def message_of(error: BaseException) -> str:
    """What an exception says, on one line where that is all it has; never empty."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip() or type(error).__name__
