"""WebDataset shards that are broken are named."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from transformers import LlavaProcessor

from dynamic_llava.data import open_dataset

from .conftest import talk
from .test_sources import SAMPLES, add, write_shard


def bad_tar(folder: Path, members: dict[str, bytes], name: str = "bad.tar") -> Path:
    with tarfile.open(folder / name, "w") as tar:
        for member, content in members.items():
            add(tar, member, content)
    return folder / name


def test_broken_shards_are_named(folder: Path, processor: LlavaProcessor) -> None:
    (folder / "a.tar").write_bytes(b"x" * 2000)
    cases = {
        folder / "a.tar": "uncompressed tar",
        bad_tar(folder, {"readme": b"", ".hidden.json": b"{}"}, "none.tar"): "has no samples",
        bad_tar(folder, {"k.json": b"{"}, "json.tar"): "k.json in .*not valid JSON",
        bad_tar(folder, {"k.png": b""}, "bare.tar"): "'k'.*'conversations' must be",
        bad_tar(folder, {"k.json": json.dumps(talk("<image>", "a")).encode()}, "count.tar"): "'k'.*1 <image> for 0",
    }
    whole = write_shard(folder).read_bytes()
    (folder / "short.tar").write_bytes(whole[: len(whole) // 3])
    cases[folder / "short.tar"] = "uncompressed tar"
    with tarfile.open(folder / "twice.tar", "w") as tar:
        add(tar, "k.json", b"{}")
        add(tar, "k.json", b"{}")
    cases[folder / "twice.tar"] = "two members 'k.json'"
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            open_dataset(path, None, processor)
        assert path.name in str(caught.value)


def test_a_damaged_picture_in_a_shard_is_named_or_skipped(folder: Path, processor: LlavaProcessor) -> None:
    good = {"0.json": json.dumps(SAMPLES[1]).encode()}
    bad = {"k.json": json.dumps(talk("<image>", "a")).encode(), "k.png": b"half a picture"}
    path = bad_tar(folder, {**bad, **good})
    with pytest.raises(ValueError, match=r"bad\.tar: sample 'k': picture k\.png in .* cannot be read"):
        open_dataset(path, None, processor)[0]
    dataset = open_dataset(path, None, processor, on_bad_sample="skip")
    assert dataset[0]["id"] == "text"
    assert [name for name, _ in dataset.skipped] == ["k"]
