"""Damaged training data of every kind: bad rows are counted, good ones stay what they are; see `harness`."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dynamic_llava.data import open_dataset
from dynamic_llava.data.__main__ import main

from ..data_pipeline.conftest import ASSET, talk
from ..data_pipeline.test_sources import add
from .harness import Case, run_cases
from .limits import watched
from .mutators import ESCAPE, damage_file, mutate_value, write_json, write_yaml

ROWS = [
    {"id": "one", "image": "a.png", "conversations": talk("<image>\nWhat is it?", "red")},
    {"id": "text", "conversations": talk("Is it red?", "yes")},
    {
        "id": "two",
        "image": ["a.png", "b.jpg"],
        "conversations": talk("<image>\nWhat is it?", "red", "<image>?", "blue"),
    },
    {"id": "last", "image": "b.jpg", "conversations": talk("What is it?\n<image>", "a cross")},
]
KINDS = ("json", "json", "jsonl", "tar", "parquet")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "EPS", "ICO", "TGA", "PDF", "SGI", "PCX", "DDS")
SIZES = ((1, 1), (1, 3000), (3000, 1), (1, 20000), (60000, 1), (2, 2))
MODES = ("1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "HSV")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in (("a.png", (40, 80)), ("b.jpg", (64, 64))):
        pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def good(pictures, processor, tmp_path_factory) -> dict[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("good") / "data.json"
    path.write_text(json.dumps(ROWS))
    dataset = open_dataset(path, pictures, processor)
    return {json.dumps(row): dataset[number] for number, row in enumerate(ROWS)}


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(ASSET)


def test_data(pictures, processor, good, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def one(case: Case) -> None:
        folder = case.copy(pictures, "images")
        kind = case.random.choice(KINDS)
        rows, touched = _rows(case), set()
        if case.random.random() < 0.4:
            touched = {_damage_picture(case, folder)}
        path, rows = _write(case, kind, rows, folder)
        with watched(case.root):
            if case.random.random() < 0.3:
                _check_command(case, path, folder, processor)
            else:
                _open(case, path, folder, processor, rows, touched, good)

    (tmp_path / "cases").mkdir()
    run_cases("data", 120, one, tmp_path / "cases")


def _rows(case: Case) -> list[Any]:
    rows: Any = json.loads(json.dumps(ROWS))
    for _ in range(case.random.choice([0, 1, 1, 1, 2])):
        rows, place = mutate_value(case.random, rows)
        case.note("row", place)
    return rows


def _write(case: Case, kind: str, rows: Any, folder: Path) -> tuple[Path, list[Any] | None]:
    """Write the rows as a file of a kind, perhaps damaged; the rows that are in it, None where that is not known."""
    rng, path = case.random, case.root / f"data.{kind}"
    case.note(kind)
    several = rows if isinstance(rows, list) else [rows]
    if kind == "json":
        path.write_bytes(write_json(rng, rows))
    elif kind == "jsonl":
        path.write_bytes(b"\n".join(json.dumps(row).encode() for row in several))
    elif kind == "tar":
        _write_tar(case, path, several, folder)
    else:
        _write_table(case, path, several)
    if rng.random() < 0.25:
        case.note(damage_file(rng, path))
    try:
        text = path.read_bytes().decode("utf-8-sig") if path.is_file() and path.resolve() != Path("/dev/zero") else ""
        known = json.loads(text) if kind == "json" else None
        if kind == "jsonl":
            known = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError, OSError):
        known = None
    return path, known if isinstance(known, list) else None


def _write_table(case: Case, path: Path, rows: list[Any]) -> None:
    """The rows as columns, of other types where a row has them."""
    rows = [row if isinstance(row, dict) else {"id": str(row)} for row in rows]
    if case.random.random() < 0.2:
        # As older versions of `datasets` write lists of objects.
        rows = [{**row, "conversations": _columns(row.get("conversations"))} for row in rows]
    columns = {}
    for name in ("id", "image", "conversations"):
        values = [row.get(name) for row in rows]
        several = [value if isinstance(value, list) else value and [value] for value in values]
        for column in (several if name == "image" else values, several, list(map(repr, values))):
            try:
                columns[name] = pyarrow.array(column)
                break
            except (pyarrow.ArrowException, UnicodeError, OverflowError):
                continue
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _columns(turns: Any) -> dict[str, list[Any]]:
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return {name: [turn[name] for turn in turns if name in turn] for name in ("from", "value")}


def _write_tar(case: Case, path: Path, rows: list[Any], folder: Path) -> None:
    rng = case.random
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            key = rng.choice(
                [f"{number:04d}"] * 12 + [f"../../{ESCAPE}", f"/{ESCAPE}", "", "a/b", ".", "\udcff", "0000"]
            )
            names = row.get("image", []) if isinstance(row, dict) else []
            for place, name in enumerate(names if isinstance(names, list) else [names]):
                file = (
                    folder / str(name).replace("\0", "")
                    if isinstance(name, str) and len(name) < 99
                    else folder / "a.png"
                )
                content = file.read_bytes() if file.name in ("a.png", "b.jpg") and file.is_file() else b"x"
                add(tar, f"{key}.{place}{file.suffix or '.png'}", content)
            add(tar, f"{key}.json", write_json(rng, row))
        if rng.random() < 0.3:
            member = tarfile.TarInfo(rng.choice([f"../{ESCAPE}.json", "0000.json", "0001.png", "9.jpg"]))
            member.type = rng.choice(
                [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
            )
            member.linkname = rng.choice(["/etc/passwd", f"../{ESCAPE}", "0000.json"])
            tar.addfile(member)
            case.note("member", member.name, member.type)


def _damage_picture(case: Case, folder: Path) -> str:
    """Damage one of the pictures; its name."""
    rng = case.random
    name = rng.choice(["a.png", "b.jpg"])
    path = folder / name
    kind = rng.choice(["file", "file", "header", "format", "size", "mode"])
    if kind == "file":
        case.note(damage_file(rng, path))
        return name
    if kind == "header":
        # Width and height of a PNG are whatever it says.
        content = bytearray((folder / "a.png").read_bytes())
        for place in (16, 20):
            content[place : place + 4] = rng.choice([0, 1, 20_000, 60_000, 2**31 - 1, 2**32 - 1]).to_bytes(4, "big")
        path.write_bytes(bytes(content))
    else:
        form = "PNG" if kind != "format" else rng.choice(FORMATS)
        image = Image.new("RGB" if kind != "mode" else "L", rng.choice(SIZES) if kind == "size" else (9, 5), 77)
        content = io.BytesIO()
        try:
            image.convert(rng.choice(MODES) if kind == "mode" else "RGB").save(content, form)
        except (OSError, ValueError, KeyError):
            image.save(content, "PNG")
        path.write_bytes(content.getvalue())
        case.note(form, image.size)
    case.note("picture", kind, name)
    return name


def _open(case, path, folder, processor, rows, touched, good) -> None:
    """Bad rows are left out and counted, the others are what they are beside good ones."""
    how = case.random.choice(["skip", "skip", "skip", "error"])
    more = case.random.choice([{}, {}, {"require_image": True}, {"max_length": case.random.choice([80, 200])}])
    case.note(how, more)
    dataset = case.call(open_dataset, path, folder, processor, on_bad_sample=how, **more)
    if dataset is None:
        return
    items = []
    for number in range(len(dataset)):
        item = case.call(dataset.__getitem__, number)
        if item is None:
            return
        items.append(item)
    case.call(lambda: dataset.lengths)
    skipped = dataset.skipped
    if how != "skip" or rows is None or "max_length" in more:
        return
    # A bad picture shows when it is opened: its place is taken by a good row, and its own is among the skipped.
    left = len(dataset) + len(dataset._skipped) + dataset.text_only_left_out
    case.check(left == len(rows), "count", left, len(rows))
    case.check(len(skipped) >= len(dataset._skipped) and all(reason for _, reason in skipped), "without a reason")
    by_id = {item["id"]: item for item in items}
    for row in rows:
        expected = good.get(json.dumps(row))
        names = row.get("image", []) if isinstance(row, dict) else []
        if expected is None or touched & set(names if isinstance(names, list) else [names]):
            continue
        if more.get("require_image") and not names:
            continue
        if sum(isinstance(other, dict) and str(other.get("id")) == row["id"] for other in rows) > 1:
            continue
        found = by_id.get(row["id"])
        case.check(found is not None, "good row lost", row["id"])
        for name, value in expected.items():
            same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
            case.check(same, "another item", row["id"], name)


def _check_command(case: Case, path: Path, folder: Path, processor: Any) -> None:
    """What `data check` calls fine can be read to its end."""
    values = {"base_model": str(ASSET), "train_file": str(path), "image_folder": str(folder)}
    config = case.output / "config.yaml"
    config.write_bytes(write_yaml(case.random, values))
    status, text = case.command(main, "check", config, "--json", "--decode")
    readable = _readable(case, path, folder, processor)
    case.check(status != 0 or readable, "called fine", *case.notes[-1:])
    if status == 1:
        findings = json.loads(text)["findings"]
        case.check(any(entry["count"] for entry in findings.values()), "found nothing", text)
        # Of what nothing could be learned says nothing of the rows.
        bad = {kind: entry for kind, entry in findings.items() if entry["count"] and kind != "predictor without data"}
        case.check(not readable or not bad, "called bad", bad)


def _readable(case: Case, path: Path, folder: Path, processor: Any) -> bool:
    dataset = case.call(open_dataset, path, folder, processor)
    return dataset is not None and all(case.call(dataset.__getitem__, n) is not None for n in range(len(dataset)))
