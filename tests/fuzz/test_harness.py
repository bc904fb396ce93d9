"""The fuzzers themselves: what is a fault, what is not, and that a seed gives one input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dynamic_llava.errors import run_command
from dynamic_llava.reading import inside, read_json

from . import harness, limits
from .harness import Case, run_cases
from .limits import watched
from .mutators import ESCAPE, damage_file, mutate_bytes, mutate_value, write_json, write_yaml

VALUE = {"a": [1, 2, {"b": "c"}], "d": {"e": 1.5, "f": None}, "g": "text"}


def fails(error: Exception) -> Callable[[list[str]], int]:
    def command() -> None:
        raise error

    return lambda words: run_command(command)


def loops(case: Case) -> None:
    while True:
        pass


def writes(name: str, watch: bool = True) -> Callable[[Case], None]:
    def one(case: Case) -> None:
        with watched(case.root) if watch else nullcontext():
            (case.output / name).write_text("x")

    return one


FAULTS = {
    "KeyError at": lambda case: case.call({}.__getitem__, "a"),
    "TypeError at": lambda case: case.call(len, 3),
    "ValueError at": lambda case: case.call(int, "x"),
    "UnicodeDecodeError at": lambda case: case.call(b"\xff".decode),
    "MemoryError at": lambda case: case.call(bytearray, limits.MEMORY * 2),
    "hang at": loops,
    "status 70": lambda case: case.command(fails(IndexError("a")), "x"),
    "unclear at": lambda case: case.command(fails(ValueError("invalid literal for int() with base 10: 'x'"))),
    "silent: taken": lambda case: case.check(False, "taken"),
    "wrote outside": writes("../else"),
    "executed or escaped": writes(f"../../{ESCAPE}", watch=False),
}


if sys.platform != "linux":
    FAULTS.pop("MemoryError at")


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_found(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "CASES", None)
    monkeypatch.setattr(harness, "ONE", None)
    monkeypatch.setattr(limits, "SECONDS", 1 if kind == "hang at" else 30)
    with pytest.raises(AssertionError, match=rf"1 faults in 1 cases\n{kind}"):
        run_cases("a target", 1, FAULTS[kind], tmp_path)


def test_refusals_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "CASES", "5:8")
    monkeypatch.setattr(harness, "ONE", None)

    def one(case: Case) -> None:
        with watched(case.root):
            assert case.call(read_json, case.root / "none.json") is None
            assert case.call(inside, case.root, f"../{ESCAPE}", "a row") is None
            assert case.command(fails(ValueError("The number of rows must be at least 1, got 0.")))[0] == 2
            (case.output / "a").write_text("x")

    run_cases("a target", 1, one, tmp_path)
    said = capsys.readouterr().out
    assert "seeds 5 to 7" in said
    assert "3 of 3 inputs refused" in said
    assert not list(tmp_path.iterdir())


def test_a_seed_gives_one_input(tmp_path: Path):
    def made(seed: int) -> list[Any]:
        rng = Random(seed)
        path = tmp_path / f"{seed}"
        path.write_bytes(b"0123456789" * 9)
        value, place = mutate_value(rng, VALUE)
        found = [repr(value), place, mutate_bytes(rng, b"abc" * 30), write_json(rng, value), write_yaml(rng, value)]
        said = damage_file(rng, path)
        return [*found, said, path.read_bytes() if path.is_file() and said.startswith("bytes") else None]

    several = [made(seed) for seed in range(40)]
    assert len({found[0] for found in several}) > 20
    for path in tmp_path.iterdir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert [made(seed) for seed in range(40)] == several
    assert VALUE["g"] == "text", "the value itself is not changed"
