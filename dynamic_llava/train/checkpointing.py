"""Checkpoints that a run can trust: a manifest written last, the newest valid one, one run per folder.

A checkpoint folder counts once `manifest.json` stands in it with the size and hash of every other file. It is written
after them, under another name, and renamed; a save that was killed leaves a folder without one, which the next save or
resume removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from ..files import parse_yaml, write_atomically
from ..reading import read_json_object

MANIFEST = "manifest.json"
LOCK = ".lock"
# What a checkpoint holds beside the model and its processor.
_STATE_FILES = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|pytorch_model_fsdp|trainer_state|training_args|manifest|latest|zero_to).*"
)
_CHUNK = 1 << 22
# How `torch.save` says that its file could not be written.
_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter")
# Keys of a configuration that do not change what is computed; a resumed run may have other values.
FREE_KEYS = frozenset(
    {
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "disable_tqdm"),
        *("logging_dir", "logging_first_step", "on_bad_sample", "output_dir", "report", "report_descriptions"),
        *("peak_tflops", "picture_steps", "calibration_answers"),
        *("report_questions", "report_to", "restart", "run_name", "save_steps", "save_strategy", "save_total_limit"),
    }
)


@contextmanager
def write_errors() -> Iterator[None]:
    """`OSError` for a file that could not be written: torch and safetensors raise errors of their own."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:
        if not _TORCH_WRITER.search(str(error)):
            raise
        raise OSError(f"torch.save: {str(error).splitlines()[0]}") from error


def write_manifest(folder: Path, config: dict[str, Any]) -> None:
    """Declare the checkpoint in `folder` whole: note size and hash of its files, and the run's configuration."""
    files = {str(path.relative_to(folder)): _fingerprint(path) for path in _files(folder)}
    write_atomically(folder / MANIFEST, json.dumps({"files": files, "config": config}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, None where there is none that can be read."""
    try:
        return read_json_object(folder / MANIFEST)
    except (OSError, ValueError):
        return None


def is_valid(folder: Path, hashes: bool = True) -> bool:
    """Whether every file of the manifest is there with its size and, with `hashes`, its content."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["size"]:
            return False
        if hashes and _fingerprint(path) != expected:
            return False
    return True


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, valid or not."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in run.glob("checkpoint-*")}
    return sorted((path for path, match in found.items() if match), key=lambda p: -int(found[p][1]))


def newest_valid(run: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    return next((path for path in checkpoints(run) if is_valid(path)), None)


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint is that of the run's last step."""
    state = _state_of(checkpoint)
    return state["global_step"] >= state["max_steps"]


def copy_model(checkpoint: Path, run: Path) -> None:
    """The model of a finished run's last checkpoint as the run's own, where it was killed at its very end."""
    for path in checkpoint.iterdir():
        if path.is_file() and not _STATE_FILES.match(path.name):
            shutil.copyfile(path, run / path.name)


def remove_unfinished(run: Path) -> list[Path]:
    """Remove checkpoint folders without a manifest: saves that were cut short. Returns them."""
    unfinished = [path for path in checkpoints(run) if read_manifest(path) is None]
    for path in unfinished:
        shutil.rmtree(path)
    return unfinished


def best_of(checkpoint: Path) -> Path | None:
    """The checkpoint beside this one that had scored best when it was saved; None where it is not there or unknown."""
    best = checkpoint.parent / f"checkpoint-{_state_of(checkpoint).get('best_global_step')}"
    return best if read_manifest(best) is not None else None


def rotate(run: Path, limit: int | None, keep: Path | None = None) -> None:
    """Keep the `limit` newest whole checkpoints, and `keep`, which takes the place of one of them.

    Called when the newest has its manifest, so that one always stays.
    """
    if not limit:
        return
    whole = [path for path in checkpoints(run) if is_valid(path, hashes=False)]
    kept = set(whole[:limit])
    if keep in whole and keep not in kept:
        kept = {keep, *whole[: max(limit - 1, 1)]}
    for path in whole:
        if path in kept:
            continue
        # The manifest goes first: a removal that is cut short leaves nothing that looks whole.
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def check_same_config(checkpoint: Path, config: dict[str, Any]) -> None:
    """`ValueError` that lists the keys in which a run differs from the one that wrote `checkpoint`."""
    before = (read_manifest(checkpoint) or {}).get("config", {})
    # As JSON holds them: paths as text, tuples as lists.
    now = json.loads(json.dumps(config, default=str))
    keys = before.keys() | now.keys()
    keys = sorted(key for key in keys - FREE_KEYS if not _same(before.get(key), now.get(key)))
    if keys:
        changes = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys)
        raise ValueError(
            f"{checkpoint} was written by a run with another configuration ({changes}). Set it back to resume, pass "
            "restart=true to begin anew in this folder, or another output_dir."
        )


def _same(before: Any, now: Any) -> bool:
    """Whether two values of a key are one; earlier versions read `1e-3` as a word, and a folder 7 as a number."""
    for text, number in ((before, now), (now, before)):
        if isinstance(text, str) and isinstance(number, (int, float)):
            with suppress(ValueError):
                return parse_yaml(text, "a noted value") == number
    return before == now


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the folder of a run; `ValueError` where another process does. Goes with the process, however it ends."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"Another run is writing to {run}; wait for it, or pass another output_dir.") from error
        yield


def drop_later_lines(path: Path, step: int) -> None:
    """Leave the lines of a JSON-lines log up to `step`; the last one may be cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            break
    write_atomically(path, "".join(f"{line}\n" for line in kept))


def _state_of(checkpoint: Path) -> dict[str, Any]:
    return read_json_object(checkpoint / TRAINER_STATE_NAME)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"size": path.stat().st_size, "blake2b": digest.hexdigest()}
