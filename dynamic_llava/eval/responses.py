"""Answers on disk as they come, so that an evaluation that was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.source import find_folder
from ..reading import parse_json, regular_file

FILE_NAME = "responses.jsonl"
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
CONFIG_PATTERNS = ("*config.json", "*template*", "*.index.json")
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 4096


def checkpoint_fingerprint(path: str | Path) -> str:
    """A hash of a checkpoint that changes with its configuration or its weights, without reading them whole.

    Covers configuration files, and of each weight file the name, the size, the safetensors header and blocks spread
    evenly over it: a checkpoint trained further has the same header.
    """
    folder = find_folder(str(path))
    digest = hashlib.sha256()
    configs = {file for pattern in CONFIG_PATTERNS for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(configs):
        digest.update(file.name.encode() + file.read_bytes())
    weights = {file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(weights):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            if file.suffix == ".safetensors":
                length = int.from_bytes(content.read(8), "little")
                digest.update(content.read(min(length, size)))
            for block in range(SAMPLED_BLOCKS):
                content.seek(block * max(size - BLOCK_BYTES, 0) // (SAMPLED_BLOCKS - 1))
                digest.update(content.read(BLOCK_BYTES))
    return digest.hexdigest()


def response_key(*parts: Any) -> str:
    """A hash of everything that an answer depends on besides the checkpoint."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class ResponseStore:
    """Answers of one evaluation, appended to `responses.jsonl` (one file per rank) after each batch.

    Args:
        folder: output folder of the evaluation.
        fingerprint: of the checkpoint, see `checkpoint_fingerprint`.
        resume: take over the answers that are there, of any number of ranks; else they are removed when the first new
            ones come.
        rank, world_size: of this process.

    Raises:
        ValueError: there is nothing to resume, the answers there are another checkpoint's, or a line other than the
            last is broken.
    """

    def __init__(
        self, folder: str | Path, fingerprint: str, resume: bool = False, rank: int = 0, world_size: int = 1
    ) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.path = self.folder / (FILE_NAME if world_size == 1 else f"responses-{rank}.jsonl")
        self._answers: dict[str, dict[str, Any]] = {}
        if resume and not self._files():
            raise ValueError(f"--resume: there is no {FILE_NAME} in {self.folder}; leave it out to start anew.")
        self._outdated = [] if resume else self._files_to_replace(rank, world_size)
        for file in self._files() if resume else ():
            self._load(file)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, keys: Sequence[str]) -> list[dict[str, Any]] | None:
        """The answers to `keys` where all of them are known, else None: a batch is repeated whole."""
        found = [self._answers.get(key) for key in keys]
        return None if None in found else found

    def add(self, keys: Sequence[str], answers: Sequence[dict[str, Any]]) -> None:
        """Keep the answers of one batch, on disk before this returns."""
        while self._outdated:
            self._outdated.pop().unlink(missing_ok=True)
        rows = [{"key": key, **answer} for key, answer in zip(keys, answers, strict=True)]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if not file.tell():
                # A new file, or one that a full disk has left empty.
                rows.insert(0, {"fingerprint": self.fingerprint})
            text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            file.write(text.encode(errors="backslashreplace"))
        self._answers.update(zip(keys, answers, strict=True))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("responses*.jsonl"))

    def _files_to_replace(self, rank: int, world_size: int) -> list[Path]:
        """A rank's own file, and for the first one also those of ranks that this run does not have."""
        others = {f"responses-{other}.jsonl" for other in range(world_size)} if world_size > 1 else set()
        return [file for file in self._files() if file == self.path or (rank == 0 and file.name not in others)]

    def _load(self, path: Path) -> None:
        lines = regular_file(path, "file of answers").read_bytes().splitlines(keepends=True)
        position = 0
        for number, line in enumerate(lines, start=1):
            try:
                row = _parse_line(line, "fingerprint" if number == 1 else "key")
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(
                        f"{path} line {number} is broken ({error}); remove that line, or start without --resume."
                    ) from error
                self._drop_from(path, position)
                return
            position += len(line)
            if number > 1:
                self._answers[row.pop("key")] = row
            elif row["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{path} holds answers of another checkpoint, or of this one before it changed; "
                    "start without --resume, or write to another --output."
                )

    def _drop_from(self, path: Path, position: int) -> None:
        """Cut the broken last line off, so that new answers do not continue it; other ranks' files stay untouched."""
        print(f"{path}: the last line was cut off and is dropped; its batch is repeated.", file=sys.stderr)
        if path == self.path and position:
            os.truncate(path, position)
        elif path == self.path:
            path.unlink()


def _parse_line(line: bytes, field: str) -> dict[str, Any]:
    row = parse_json(line, "it")
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ValueError(f"no {field!r}")
    if not line.endswith(b"\n"):
        raise ValueError("no end of line")
    return row
