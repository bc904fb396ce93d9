"""Runs cases by their seeds and says what the product must not have done; see `run_cases`.

`DYNAMIC_LLAVA_FUZZ=2000` runs so many cases of each target, `DYNAMIC_LLAVA_FUZZ=2000:4000` those from the first seed to
the second, `DYNAMIC_LLAVA_FUZZ_CASE=1234` one alone.
"""

from __future__ import annotations

import io
import linecache
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import dynamic_llava

from .limits import OUTPUT, Fault, Hang, guarded

CASES = os.environ.get("DYNAMIC_LLAVA_FUZZ")
ONE = os.environ.get("DYNAMIC_LLAVA_FUZZ_CASE")
PACKAGE = str(Path(dynamic_llava.__file__).parent)
# Where no message says more than what Python says by itself.
REFUSALS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
RAW = re.compile(
    r"^(error: )?('?\w+'? object |unsupported operand|invalid literal|could not convert string|(list|string|tuple) ind|"
    r"Expecting |Extra data|Invalid control|.{0,20}codec can't|must be str|argument of type|expected str, bytes|"
    r"not enough values|too many values|unhashable|cannot unpack|\w+\(\) (missing|takes \d|got|argument)|'<|"
    r".{0,30}not iterable|bad operand|embedded null|zip\(\)|.?\d+.?$|'\w+'$)"
)
STATUSES = (0, 1, 2)


class Case:
    """One malformed input.

    Attributes:
        seed: all of it comes from this.
        random: made from it.
        root: folder of the case; nothing but `output` below it may change once `watched`.
        output: where the product may write.
        notes: what was damaged, for the report.
        warnings: what the product logged.
        refused: whether the product said no.
    """

    def __init__(self, seed: int, root: Path) -> None:
        self.seed, self.random, self.root = seed, Random(seed), root
        self.output = root / OUTPUT
        self.work = root / "work"
        self.output.mkdir()
        self.work.mkdir()
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.refused = False

    def note(self, *what: Any) -> None:
        self.notes.append(" ".join(map(_short, what)))

    def copy(self, source: Path, name: str) -> Path:
        """A copy of a good folder, to be damaged."""
        return Path(shutil.copytree(source, self.root / name, symlinks=True))

    def call(self, function: Callable, *arguments, **named) -> Any:
        """The result of a call, None where it was refused as it should be."""
        try:
            return function(*arguments, **named)
        except Exception as error:
            if not is_refusal(error):
                raise
            self.refuse(error)
            return None

    def refuse(self, error: Exception) -> None:
        self.refused = True
        self.note("refused:", f"{type(error).__name__}: {error}")

    def command(self, main: Callable[[list[str]], int], *arguments: Any) -> tuple[int, str]:
        """Exit status and stdout of a command that ended as it should; `Fault` otherwise."""
        words = list(map(str, arguments))
        self.note("ran", *words)
        out, err = io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                status = main(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        text = err.getvalue()
        if "Traceback (most recent call last)" in text or status not in STATUSES:
            raise Fault(f"status {status} {text.strip().splitlines()[-2:-1]}", _last_place(text), text[-3000:])
        said = [line for line in text.splitlines() if line.strip()]
        if status == 2 and not said:
            raise Fault("nothing said", main.__module__)
        if status and said and RAW.match(said[-1]):
            raise Fault("unclear", f"{main.__module__}: {_short(said[-1])}", text)
        self.refused |= status != 0
        self.note("status", status, *said[-1:])
        return status, out.getvalue()

    def check(self, holds: bool, kind: str, *what: Any) -> None:
        """`Fault` unless `holds`: something is wrong in silence."""
        if not holds:
            raise Fault(f"silent: {kind}", "oracle", " ".join(map(_short, what)))


def is_refusal(error: BaseException) -> bool:
    """Whether an exception says by a `raise` what is wrong, and is not one of Python's own from deep inside."""
    text = str(error).strip()
    if not isinstance(error, REFUSALS) or not text or isinstance(error, UnicodeError):
        return False
    if isinstance(error, OSError) and error.filename is not None:
        return True
    if re.search(r"unexpected keyword argument|required (positional|keyword-only) argument|multiple values for", text):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = linecache.getline(last.filename, last.lineno).strip().startswith("raise")
    return raised and not RAW.match(text)


def run_cases(target: str, default: int, one: Callable[[Case], None], folder: Path) -> None:
    """Run `one` on the cases of a target; an AssertionError lists the faults, each once, with a seed that shows it."""
    found: dict[str, list[tuple[int, str]]] = {}
    refused = 0
    seeds = _seeds(default)
    print(f"{target}: seeds {seeds.start} to {seeds.stop - 1}")
    for seed in seeds:
        root = folder / f"{seed}"
        root.mkdir()
        case = Case(seed, root)
        try:
            with guarded(root, case.work, case.warnings):
                one(case)
        except Exception as error:
            found.setdefault(_key(error), []).append((seed, _report(case, error)))
        except Hang as error:
            found.setdefault(f"hang at {_place(error)}", []).append((seed, _report(case, error)))
        finally:
            refused += case.refused
            if ONE:
                print(_report(case, None))
            shutil.rmtree(root, ignore_errors=True)
    print(f"{target}: {refused} of {len(seeds)} inputs refused")
    lines = [f"{key}: {len(hits)} cases, such as {hits[0][0]}: {hits[0][1]}" for key, hits in sorted(found.items())]
    assert not found, f"{target}: {len(found)} faults in {len(seeds)} cases\n" + "\n".join(lines)


def _seeds(default: int) -> range:
    if ONE:
        return range(int(ONE), int(ONE) + 1)
    first, _, last = (CASES or str(default)).rpartition(":")
    return range(int(first or 0), int(last))


def _place(error: BaseException) -> str:
    """The innermost line of the package that an exception passed, or else of anything."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(PACKAGE)] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


def _last_place(text: str) -> str:
    own = re.findall(rf'File "{re.escape(PACKAGE)}/([^"]+)", line (\d+)', text)
    return ":".join(own[-1]) if own else "nowhere"


def _key(error: Exception) -> str:
    return error.key if isinstance(error, Fault) else f"{type(error).__name__} at {_place(error)}"


def _report(case: Case, error: BaseException | None) -> str:
    notes = "; ".join(case.notes)
    said = "" if error is None else f"\n    {type(error).__name__}: {_short(str(error) or '', 1500)}"
    if ONE and error is not None:
        traceback.print_exception(error, file=sys.stdout)
    return f"{notes}{said}"


def _short(value: Any, most: int = 300) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
