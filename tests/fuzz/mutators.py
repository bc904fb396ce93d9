"""Damage by chance: bytes, values of JSON and YAML, the texts they are written as, files in the place of files."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import yaml

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
FOREIGN = (
    b"",
    b"\0" * 64,
    b"<!doctype html><title>404</title>",
    b"PK\x03\x04",
    b"\x1f\x8b\x08\0",
    b"PAR1",
    LFS_POINTER,
)
# Written in the place of this word: brackets deeper than any recursion goes.
DEEP = "@deep@"
# A name that leads out of the folder that it is joined to; see `harness.Case.outside`.
ESCAPE = "escaped"
SCALARS = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31,
    2**63,
    -(10**30),
    10**400,
    0.5,
    -0.0,
    1e308,
    1e-320,
    math.nan,
    math.inf,
    -math.inf,
)
WORDS = (
    "",
    " ",
    "a\0b",
    "\ud800",
    "é\u202e",
    f"../../{ESCAPE}",
    f"../../../{ESCAPE}/../{ESCAPE}",
    "..",
    ".",
    "/",
    "/dev/zero",
    "~",
    "$HOME",
    "x" * 5000,
    "no",
    "True",
    "None",
    "nan",
    "1e-5",
    "0x10",
    "1_000",
    "-1",
    "<image>",
    "<image>" * 40,
    "</s>",
    "{{ 7 * 7 }}",
    "%s %d {} {0.__class__}",
    DEEP,
)
PARTS = ([], {}, [[]], [None], [{}], {"": None}, {"a": {"b": [1, 2]}}, [1, "2", None], ["a"] * 300)


def anything(rng: Random) -> Any:
    """A value that nobody expects."""
    return copy.deepcopy(rng.choice(rng.choice((SCALARS, WORDS, PARTS))))


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside `value`, its own () first."""
    found = [path]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        found += places(inner, (*path, key))
    return found


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def mutate_value(rng: Random, value: Any) -> tuple[Any, tuple]:
    """A copy of a JSON value with one place changed, and the path of that place."""
    value = copy.deepcopy(value)
    path = rng.choice(places(value)[1:] or [()])
    if not path:
        return anything(rng), ()
    parent, key = at(value, path[:-1]), path[-1]
    old = parent[key]
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice([str(key).upper(), f"{key}s", f" {key}", str(key)[:-1], f"{key}\0"])] = parent.pop(key)
    elif kind == 1:
        parent.insert(key, copy.deepcopy(old))
    elif kind == 2:
        parent[key] = rng.choice([[old], {"value": old}, [old, old], str(old), {str(key): old}])
    elif kind == 3 and isinstance(old, (int, float)):
        parent[key] = rng.choice([-old, old * 1000, old + 0.5, old // 2, str(old), not old])
    elif kind == 3 and isinstance(old, str):
        parent[key] = rng.choice([old + "x", old[:-1], old.upper(), f" {old} ", old * 2, f"../{old}", f"/{old}"])
    else:
        parent[key] = anything(rng)
    return value, path


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """`data` with a kind of damage that files suffer."""
    place = rng.randrange(len(data) + 1)
    end = min(len(data), place + rng.choice([1, 4, 64, len(data)]))
    kind = rng.randrange(10)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + data[end:]
    if kind == 2:
        return data[:place] + data[place:end] * 2 + data[end:]
    if kind == 3:
        return data[:place] + rng.randbytes(rng.choice([1, 2, 8, 100])) + data[place:]
    if kind == 4:
        return data[:place] + bytes(end - place) + data[end:]
    if kind == 5:
        return rng.choice(BOMS) + data
    if kind == 6:
        return rng.choice(FOREIGN)
    if kind == 7:
        return data + rng.choice([data, b"\0", b"}", b"\n\n"])
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def write_json(rng: Random, value: Any) -> bytes:
    """`value` as JSON, sometimes with a key twice, in another encoding or behind a byte order mark."""
    text = json.dumps(value, ensure_ascii=True)
    if rng.random() < 0.05 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        text = f"{{{json.dumps(key)}: {json.dumps(anything(rng))}, {text[1:]}"
    return _encoded(rng, text)


def write_yaml(rng: Random, value: Any) -> bytes:
    """`value` as YAML, sometimes with what YAML has and JSON has not."""
    try:
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=False)
    except yaml.YAMLError:
        text = json.dumps(value)
    extra = (
        "k: !!python/object/apply:os.system ['touch executed']\n",
        "? [a, b]\n: c\n",
        "<<: *nobody\n",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\n",
        "\tseed: 1\n",
        "seed: 2024-01-01\n",
        "seed: 12:30:00\n",
        "seed: !!binary aGVsbG8=\n",
        "seed: 010\n",
        "--- {}\n...\n--- []\n",
        "seed: 1\nseed: 2\n",
        "1: 2\n",
        "null: 1\n",
        "{",
    )
    if rng.random() < 0.2:
        text = rng.choice([text + rng.choice(extra), rng.choice(extra) + text])
    return _encoded(rng, text)


def _encoded(rng: Random, text: str) -> bytes:
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(DEEP, "[" * 3000)
    encoding = rng.choice(["utf-8"] * 12 + ["utf-8-sig", "utf-16"])
    return text.encode(encoding, "surrogatepass")


def replace_file(rng: Random, path: Path) -> str:
    """Put something that is no good file in the place of `path`; says what."""
    kind = rng.choice(["missing", "empty", "folder", "fifo", "loop", "dangling", "device", "pointer"])
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind in ("loop", "dangling", "device"):
        path.symlink_to({"loop": path, "dangling": path.with_name("nowhere"), "device": "/dev/zero"}[kind])
    elif kind == "pointer":
        path.write_bytes(LFS_POINTER)
    return kind


def damage_file(rng: Random, path: Path) -> str:
    """Damage the content of `path`, or put something else in its place; says what."""
    if rng.random() < 0.2 or not path.is_file():
        return f"{path.name} is {replace_file(rng, path)}"
    path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    return f"bytes of {path.name}"
