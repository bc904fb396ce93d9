"""Reading what users write: paths, text and JSON, whole or with an error that says what is wrong; stdlib alone."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

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
