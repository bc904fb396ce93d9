"""YAML as users write it, folders for results, and files that are written whole or not at all."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import yaml

from .reading import read_text

#: Folders of this repository that are in the package too, below it.
PRESETS, SHIPPED = "configs", ("configs", "assets")
PACKAGE = Path(__file__).resolve().parent


def shipped(path: str | Path) -> Path:
    """`path`, or where nothing is there what the package, or its checkout, has under that name.

    Args:
        path: from here, or in this repository, such as `configs/deepspeed/zero2.json` and `assets/tiny-llava`.
    """
    path = Path(path)
    if path.parts[:1] and path.parts[0] in SHIPPED and ".." not in path.parts and not os.path.lexists(path):
        roots = [PACKAGE, *([PACKAGE.parent] if (PACKAGE.parent / "pyproject.toml").is_file() else [])]
        return next((root / path for root in roots if (root / path).exists()), path)
    return path


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core schema: `no`, `on`, `12:30` and `2024-01-01` are words, `1e-5` is a number."""

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}


class _CoreDumper(yaml.SafeDumper):
    """Puts in quotes what the loader above would not read as text."""

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}


for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    for _schema in (_CoreLoader, _CoreDumper):
        _schema.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    # PyYAML's own takes 010 for eight.
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text by the core schema of YAML 1.2; `ValueError` naming `where` when it is none."""
    try:
        return yaml.load(text, Loader=_CoreLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid YAML ({' '.join(str(error).split())}); correct it.") from error


def write_yaml(path: str | Path, values: dict[str, Any]) -> None:
    """Write a mapping that `read_yaml_mapping` reads as the same; errors as `write_atomically`."""
    write_atomically(path, yaml.dump(values, Dumper=_CoreDumper, sort_keys=True, allow_unicode=True))


def read_yaml_mapping(path: str | Path, what: str = "configuration") -> dict[str, Any]:
    """The mapping of a YAML file, empty for an empty one; errors as `read_text` and `parse_yaml`.

    Raises:
        ValueError: also where the file holds no mapping, or keys that are no words.
    """
    values = parse_yaml(read_text(path, what), str(path))
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must hold 'key: value' lines, found a {type(values).__name__}.")
    return values


def output_folder(path: str | Path, what: str = "--output") -> Path:
    """Returns the folder `path`, made where it is missing; to be called before the work whose results go there.

    Args:
        path: the folder.
        what: what messages call it.

    Raises:
        ValueError: a file is in its place or above it, or nothing can be written into it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
        reason = "no permission"
    except (OSError, ValueError) as error:
        writable, reason = False, getattr(error, "strerror", None) or str(error)
    if not writable:
        raise ValueError(f"{what} {path} is no folder that files can be written into ({reason}); name another one.")
    return path


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a reader, or a kill in the middle, finds the old one or the new one.

    Raises:
        OSError: as `open`; a disk that is full leaves the old file as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
