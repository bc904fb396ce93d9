"""Files of every kind give the same samples; entries with weights; broken files are named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlavaProcessor

from dynamic_llava.data import ConversationDataset, MixtureDataset, open_dataset
from dynamic_llava.data.sources import parse_source

from .conftest import talk

SAMPLES = [
    {"id": "one", "image": "a.png", "conversations": talk("<image>\nWhat is it?", "red")},
    {"id": "text", "conversations": talk("Is it red?", "yes")},
    {
        "id": "two",
        "image": ["a.png", "b.png"],
        "conversations": talk("<image>\nWhat is it?", "red", "<image>?", "blue"),
    },
    {"id": "last", "image": "b.png", "conversations": talk("What is it?\n<image>", "a cross")},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` makes of parquet files goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_json(folder: Path, name: str = "data.json", samples: list[Any] = SAMPLES) -> Path:
    (folder / name).write_text(json.dumps(samples))
    return folder / name


def write_lines(folder: Path) -> Path:
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, SAMPLES)) + "\n\n")
    return folder / "data.jsonl"


def columns(images: list[Any]) -> dict[str, list[Any]]:
    rows = zip(SAMPLES, images, strict=True)
    return {
        "id": [sample["id"] for sample in SAMPLES],
        "conversations": [sample["conversations"] for sample in SAMPLES],
        "image": [image for _, image in rows],
    }


def stored(folder: Path, sample: dict[str, Any]) -> list[dict[str, Any]]:
    """The pictures of a sample as bytes."""
    names = sample.get("image", [])
    names = [names] if isinstance(names, str) else names
    return [{"bytes": (folder / "images" / name).read_bytes(), "path": name} for name in names]


def table(folder: Path, kind: str) -> datasets.Dataset:
    if kind == "paths":
        lists = [[entry["path"] for entry in stored(folder, sample)] for sample in SAMPLES]
        return datasets.Dataset.from_dict(columns(lists))
    lists = [stored(folder, sample) for sample in SAMPLES]
    if kind == "bytes":
        return datasets.Dataset.from_dict(columns(lists))
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
            "image": datasets.List(datasets.Image()),
        }
    )
    return datasets.Dataset.from_dict(columns(lists), features=features)


def write_parquet(folder: Path, kind: str) -> Path:
    table(folder, kind).to_parquet(folder / f"{kind}.parquet")
    return folder / f"{kind}.parquet"


def write_saved(folder: Path) -> Path:
    table(folder, "features").save_to_disk(folder / "saved")
    return folder / "saved"


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_shard(folder: Path, name: str = "data.tar", samples: list[Any] = SAMPLES) -> Path:
    with tarfile.open(folder / name, "w") as tar:
        for number, sample in enumerate(samples):
            key = f"part.1/{number:06d}"
            pictures = stored(folder, sample)
            # Ten in front of two by name: the order is that of the numbers.
            fields = ["png"] if len(pictures) == 1 else ["2.png", "10.png"]
            for field, picture in reversed(list(zip(fields, pictures, strict=False))):
                add(tar, f"{key}.{field}", picture["bytes"])
            add(tar, f"{key}.json", json.dumps(sample).encode())
            add(tar, f"{key}.txt", b"passed over")
    return folder / name


WRITERS = {
    "json": write_json,
    "jsonl": write_lines,
    "parquet with paths": lambda folder: write_parquet(folder, "paths"),
    "parquet with bytes": lambda folder: write_parquet(folder, "bytes"),
    "parquet with an image feature": lambda folder: write_parquet(folder, "features"),
    "saved by datasets": write_saved,
    "webdataset": write_shard,
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("require_image", [False, True])
def test_every_kind_of_file_gives_the_same_samples(
    folder: Path, processor: LlavaProcessor, writer: Any, require_image: bool
) -> None:
    options = {"require_image": require_image}
    expected = open_dataset(write_json(folder, "expected.json"), folder / "images", processor, **options)
    found = open_dataset(writer(folder), folder / "images", processor, **options)
    assert isinstance(found, ConversationDataset)
    assert len(found) == len(expected) == (3 if require_image else 4)
    assert found.lengths == expected.lengths == [len(expected[i]["input_ids"]) for i in range(len(expected))]
    for position in range(len(expected)):
        ours, theirs = found[position], expected[position]
        assert ours["id"] == theirs["id"]
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(ours["labels"], theirs["labels"])
        if theirs["pixel_values"] is None:
            assert ours["pixel_values"] is None
        else:
            assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize("kind", ["webdataset", "saved by datasets"])
def test_stored_pictures_reach_data_loader_workers(folder: Path, processor: LlavaProcessor, kind: str) -> None:
    dataset = open_dataset(WRITERS[kind](folder), None, processor)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, collate_fn=lambda sample: sample["input_ids"])
    assert [len(ids) for ids in loader] == dataset.lengths
    spawned = pickle.loads(pickle.dumps(dataset.samples[0]["image"][0]))
    assert spawned.read() == (folder / "images" / "a.png").read_bytes(), "workers that are spawned get a copy"


def test_a_table_of_single_pictures_of_bytes_alone_and_of_old_conversations(
    folder: Path, processor: LlavaProcessor
) -> None:
    content = (folder / "images" / "a.png").read_bytes()
    rows = {"conversations": [{"from": ["human", "gpt"], "value": ["<image>\nWhat is it?", "red"]}] * 3}
    rows["image"] = [content, content, content]
    datasets.Dataset.from_dict(rows).to_parquet(folder / "old.parquet")
    dataset = open_dataset(folder / "old.parquet", None, processor)
    assert [dataset[i]["id"] for i in range(3)] == ["#0", "#1", "#2"]
    assert dataset[1]["pixel_values"].shape == (1, 3, 128, 128)
    rows["image"] = [{"bytes": content, "path": None}, {"bytes": None, "path": "a.png"}, None]
    datasets.Dataset.from_dict(rows).to_parquet(folder / "mixed.parquet")
    dataset = open_dataset(folder / "mixed.parquet", folder / "images", processor, on_bad_sample="skip")
    assert torch.equal(dataset[0]["pixel_values"], dataset[1]["pixel_values"])
    assert [name for name, _ in dataset.skipped] == ["#2"]


def test_folders_of_parquet_files_and_shards_and_patterns(folder: Path, processor: LlavaProcessor) -> None:
    (folder / "hub" / "data").mkdir(parents=True)
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        write_parquet(folder, "bytes").rename(folder / "hub" / "data" / name)
    assert len(open_dataset(folder / "hub", None, processor)) == 8
    (folder / "shards").mkdir()
    for name in ("00.tar", "01.tar"):
        write_shard(folder, name).rename(folder / "shards" / name)
    assert len(open_dataset(folder / "shards", None, processor)) == 8
    assert len(open_dataset(str(folder / "shards" / "*.tar"), None, processor)) == 8
    assert len(open_dataset(str(folder / "shards" / "*.tar:2"), None, processor)) == 16


def test_entries_with_weights(folder: Path, processor: LlavaProcessor) -> None:
    assert parse_source("a.json") == ("a.json", 1.0)
    assert parse_source("a.json:0.5") == ("a.json", 0.5)
    assert parse_source("a:b.json") == ("a:b.json", 1.0)
    assert parse_source("7") == ("7", 1.0)
    for entry in ("a.json:0", "a.json:-1", "a.json:nan", "a.json:inf"):
        with pytest.raises(ValueError, match=f"{entry!r}.*above 0"):
            parse_source(entry)
    entries = [write_json(folder), f"{write_shard(folder)}:2"]
    mixture = open_dataset(entries, [folder / "nowhere", folder / "images"], processor, seed=5)
    assert isinstance(mixture, MixtureDataset)
    assert [mixture[i]["id"] for i in range(len(mixture))] == [s["id"] for s in SAMPLES] * 3
    odd = write_json(folder, "a:2")
    with pytest.raises(ValueError, match="a:2 is of no kind"):
        open_dataset(odd, None, processor)


def test_without_an_image_folder_paths_are_relative_to_the_file(folder: Path, processor: LlavaProcessor) -> None:
    path = write_json(folder / "images")
    assert len(open_dataset(path, None, processor)) == 4
    assert len(open_dataset([path], [], processor)) == 4


def test_broken_files_are_named(folder: Path, processor: LlavaProcessor) -> None:
    def refuses(path: Path, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message) as caught:
            open_dataset(path, folder / "images", processor)
        assert Path(str(path)).name in str(caught.value)

    refuses(folder / "gone.json", "no data file", FileNotFoundError)
    refuses(folder / "gone*.tar", "no data file", FileNotFoundError)
    (folder / "a.csv").write_text("id")
    refuses(folder / "a.csv", "convert it: .json")
    (folder / "a.tar.gz").write_bytes(b"")
    refuses(folder / "a.tar.gz", "unpack it")
    (folder / "empty").mkdir()
    refuses(folder / "empty", "holds no data set")
    (folder / "a.jsonl").write_text('{"id": 1}\n{"id"')
    refuses(folder / "a.jsonl", "line 2 of .*not valid JSON")
    (folder / "b.jsonl").write_text("\n")
    refuses(folder / "b.jsonl", "found none")
    (folder / "a.parquet").write_bytes(b"PAR1 and no more")
    refuses(folder / "a.parquet", "cannot be read as parquet")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(folder / "b.parquet")
    refuses(folder / "b.parquet", "1 rows of the columns text; a row needs 'conversations'")
    datasets.DatasetDict({"train": table(folder, "paths"), "test": table(folder, "paths")}).save_to_disk(folder / "two")
    refuses(folder / "two", "splits train, test; give one of them: .*train")
    assert len(open_dataset(folder / "two" / "train", folder / "images", processor)) == 4
    datasets.DatasetDict({"train": table(folder, "paths")}).save_to_disk(folder / "one")
    assert len(open_dataset(folder / "one", folder / "images", processor)) == 4
    with pytest.raises(ValueError, match="train_file is empty"):
        open_dataset([], None, processor)
