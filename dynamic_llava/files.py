"""Reading what users write (text, JSON, YAML) and writing files whole or not at all; stdlib and PyYAML alone."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import yaml

BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
LONGEST_NAME = 255
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def regular_file(path: str | Path, what: str = "file") -> Path:
    """Returns `path`, which is a file that can be read to its end.

    Args:
        path: where it should be.
        what: what messages call it, such as "configuration".

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, a FIFO, a socket or a device is there (reading these could wait for ever), or the name
            is none that a file can have.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"There is no {what} at {path}; check the path.") from None
    except (ValueError, OSError) as error:
        # A name with a null byte, or one that is too long.
        raise ValueError(f"{str(path)!r} cannot be opened as a {what} ({error}); check the path.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file (a pipe, socket or device)"
        raise ValueError(f"{path} is {kind}; give the path of a {what}.")
    return path


def inside(folder: str | Path, name: str, where: str, *, or_absolute: bool = False) -> Path:
    """Returns the path of `name`, which a data file gives, below `folder`; symlinks in the folder are its owner's.

    Args:
        folder: what the name must not lead out of.
        name: relative, `/` between its parts.
        where: what messages call the place of the name, such as "FILE row 3".
        or_absolute: take absolute paths as they are, where our own commands write them.

    Raises:
        ValueError: no name of a file below the folder: another type, empty, absolute, with `..` or a drive, also in the
            spelling of another system, or with characters that no file has.
    """
    if or_absolute and isinstance(name, str) and os.path.isabs(name) and "\0" not in name:
        return Path(name)
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else [""]
    wrong = not any(part.strip() not in ("", ".") for part in parts) or ".." in (part.strip() for part in parts)
    # A drive also where it stands alone: C:name is relative to another folder.
    wrong = wrong or not parts[0].strip() or bool(re.match(r"[A-Za-z]:", parts[0])) or "\0" in name
    if wrong or any(len(part.encode(errors="surrogatepass")) > LONGEST_NAME for part in parts):
        shown = repr(name) if len(repr(name)) < 80 else f"{repr(name)[:77]}..."
        raise ValueError(f"{where}: {shown} is no name of a file below {folder}; correct it, or download it again.")
    return Path(folder) / name


def read_text(path: str | Path, what: str = "file") -> str:
    """Text of a file in UTF-8, or in what its byte order mark says; errors as `regular_file`.

    Raises:
        ValueError: also where the bytes are no text, or those of a Git LFS pointer.
    """
    content = regular_file(path, what).read_bytes()
    if content.startswith(GIT_LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the {what} itself; run 'git lfs pull' or download it.")
    encoding = next((name for mark, name in BOMS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); is the download complete?") from error


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text; `ValueError` naming `where` when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); copy or download it again.") from error


def read_json(path: str | Path, what: str = "file") -> Any:
    """The value of a JSON file; errors as `read_text` and `parse_json`."""
    return parse_json(read_text(path, what), str(path))


def read_json_object(path: str | Path, what: str = "file") -> dict[str, Any]:
    """The object of a JSON file; `ValueError` also where it holds another type."""
    values = read_json(path, what)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object; copy or download it again.")
    return values


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core schema: `no`, `on`, `12:30` and `2024-01-01` are words, `1e-5` is a number."""

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
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


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
