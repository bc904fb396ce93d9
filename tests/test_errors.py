"""How commands end: statuses, one line for what a user can cause, interruptions, outputs that take nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from dynamic_llava.errors import ExitStatus, Interrupted, message_of, run_command

ROOT = Path(__file__).parent.parent


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("one\n  two"), ExitStatus.BAD_INPUT, "error: one two\n"),
        (ValueError(""), ExitStatus.BAD_INPUT, "error: ValueError\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.json"), ExitStatus.BAD_INPUT, "a.json: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), ExitStatus.BAD_INPUT, "No space left on device"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ExitStatus.BAD_INPUT, "error: 'utf-8'"),
        (ImportError("pip install x"), ExitStatus.BAD_INPUT, "error: pip install x\n"),
        (NotImplementedError("not that"), ExitStatus.BAD_INPUT, "error: not that\n"),
        (MemoryError(), ExitStatus.BAD_INPUT, "error: MemoryError\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB"), ExitStatus.BAD_INPUT, "error: CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), ExitStatus.BAD_INPUT, "can't allocate memory"),
        (KeyboardInterrupt(), ExitStatus.INTERRUPTED, "interrupted\n"),
        (Interrupted(signal.SIGTERM), 143, "interrupted by SIGTERM\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_cause_is_one_line(error, status, said, capsys):
    assert run_command(raising(error)) == status
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert "Traceback" not in printed


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("deep inside"), IndexError("1"), AttributeError("a")])
def test_a_fault_of_ours_has_its_traceback(error, capsys):
    assert run_command(raising(error)) == ExitStatus.FAULT == 70
    assert "Traceback" in capsys.readouterr().err


def test_statuses_differ():
    assert len(set(ExitStatus)) == len(ExitStatus.__members__) == 6
    assert [run_command(lambda status=status: status) for status in (None, 0, 1)] == [0, 0, 1]


def test_the_traceback_of_one_line_can_be_had(monkeypatch, capsys):
    monkeypatch.setenv("DYNAMIC_LLAVA_TRACEBACK", "1")
    assert run_command(raising(ValueError("x"))) == 2
    assert "Traceback" in capsys.readouterr().err


def test_message_of_an_error_never_is_empty():
    assert message_of(ValueError("  ")) == "ValueError"
    assert message_of(OSError(5, "I/O error")) == "I/O error"


def test_handlers_are_as_before_and_ignored_signals_stay_ignored():
    before = signal.getsignal(signal.SIGINT)
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command(lambda: signal.getsignal(signal.SIGHUP) != signal.SIG_IGN) == 0
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert signal.getsignal(signal.SIGINT) is before


# `errors` alone: what happens around it needs no torch.
SCRIPT = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("errors", {path!r})
errors = importlib.util.module_from_spec(spec)
sys.modules["errors"] = errors
spec.loader.exec_module(errors)
def wait():
    try:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", file=sys.stderr, flush=True)
def much():
    for _ in range(100_000):
        print("line")
def table():
    from rich.console import Console
    from rich.table import Table
    table = Table("a", title="×±→")
    for _ in range({rows}):
        table.add_row("▲ – ×0.5 \\ud800")
    Console().print(table)
sys.exit(errors.run_command({command}))
"""


def script(command: str, rows: int = 3) -> list[str]:
    text = SCRIPT.format(path=str(ROOT / "dynamic_llava/errors.py"), command=command, rows=rows)
    return [sys.executable, "-c", text]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda n: str(n)
)
def test_a_signal_cleans_up_and_ends_with_its_status(number, status):
    # A process that runs in the background begins with some signals ignored, and so would its children.
    default = partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(script("wait"), stderr=subprocess.PIPE, text=True, preexec_fn=default)
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == status
    assert said.startswith("cleaned up\ninterrupted")
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["much", "table"])
def test_nobody_reads_the_output(command):
    process = subprocess.Popen(script(command, 20_000), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode()
    status = process.wait(timeout=60)
    assert said == ""
    # rich sees to its own output.
    assert status == ExitStatus.NO_READER or (command, status) == ("table", ExitStatus.DONE)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
def test_an_output_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(script("much"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == ExitStatus.BAD_INPUT
    assert done.stderr == "error: No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_tables_in_a_terminal_that_cannot_show_them(encoding):
    done = subprocess.run(script("table"), capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert b"0.5" in done.stdout


def test_a_closed_output():
    done = subprocess.run(["bash", "-c", '"$0" -c "$2" >&-', *script("much")], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command",
    [["-m", "dynamic_llava.efficiency", "flops"], ["eval/prepare_data.py", "--source", "x", "--output", "y"]],
    ids=["module", "script"],
)
def test_ctrl_c_while_torch_is_imported(command):
    """At several moments of the start, which takes seconds: never a traceback, always the status of an interruption."""
    for delay in (0.4, 1.2):
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)
        if process.returncode in (0, ExitStatus.BAD_INPUT):
            break
        assert process.returncode == ExitStatus.INTERRUPTED, said
        assert "Traceback" not in said[1]
