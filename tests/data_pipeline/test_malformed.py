"""Samples and files of data that are malformed in any way: skipped and counted, or named in one line."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, LlavaProcessor

from dynamic_llava.data import LlavaCollator, LlavaJsonDataset, open_dataset
from dynamic_llava.data.__main__ import main
from dynamic_llava.data.judged import count_judged

from .conftest import ASSET, talk
from .test_check import config

Writer = Callable[[object], Path]
GOOD = {"id": "good", "image": "a.png", "conversations": talk("<image>\nWhat is it?", "red")}
TEXT = {"id": "text", "conversations": talk("Is it red?", "yes")}
SURROGATE = "half \ud83d a pair"
DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]
ODD = [None, True, 0, 1.5, float("nan"), 10**30, "", "text", SURROGATE, [], [None], [[]], {}, {"a": 1}, DEEP]


def malformed() -> list[Any]:
    """Samples with something odd in each of their places."""
    turn = {"from": "human", "value": "<image>\nWhat?"}
    answer = {"from": "gpt", "value": "red"}
    found: list[Any] = [value for value in ODD if not isinstance(value, dict)]
    found += [{**GOOD, "conversations": value} for value in ODD]
    found += [{**GOOD, "conversations": [value, answer]} for value in ODD]
    found += [{**GOOD, "conversations": [turn, value]} for value in ODD]
    for key in ("from", "value"):
        found += [{**GOOD, "conversations": [{**turn, key: value}, answer]} for value in ODD]
        found += [
            {**GOOD, "conversations": [turn, {**answer, key: value}]}
            for value in ODD
            if key == "from" or value != "text"
        ]
        found += [
            {**GOOD, "conversations": [{k: v for k, v in turn.items() if k != key}, answer]},
            {**GOOD, "conversations": [turn, {k: v for k, v in answer.items() if k != key}]},
        ]
    found += [{**GOOD, "image": value} for value in ODD]
    found += [{**GOOD, "image": [value]} for value in ODD]
    found += [{**GOOD, "image": ["a.png", value]} for value in ODD]
    found += [{**TEXT, "image": value} for value in ODD if value not in (None, "", [])]
    found += [{"id": value} for value in ODD]
    return found


@pytest.mark.parametrize("number", range(len(malformed())))
def test_a_malformed_sample_is_named_or_skipped_and_counted(
    write_samples: Writer, processor: LlavaProcessor, number: int
) -> None:
    sample = malformed()[number]
    path = write_samples([GOOD, sample, TEXT])
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        LlavaJsonDataset(path, None, processor)
    message = str(caught.value)
    assert "samples.json: sample " in message
    assert len(message) < 1000
    message.encode()
    dataset = LlavaJsonDataset(path, None, processor, on_bad_sample="skip")
    assert [sample["id"] for sample in dataset.samples] == ["good", "text"]
    ((name, reason),) = dataset.skipped
    f"{name} {reason}".encode()
    assert count_judged(dataset, 1).answers == 2


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_odd_ids_are_names(write_samples: Writer, processor: LlavaProcessor, value: Any) -> None:
    dataset = LlavaJsonDataset(write_samples([{**GOOD, "id": value}]), None, processor)
    name = dataset[0]["id"]
    assert isinstance(name, str)
    name.encode()
    assert LlavaCollator(processor)([dataset[0]])["input_ids"].shape[0] == 1


def test_an_absent_picture_may_be_written_in_each_usual_way(write_samples: Writer, processor: LlavaProcessor) -> None:
    samples = [TEXT, *({**TEXT, "image": value} for value in (None, "", []))]
    assert len(LlavaJsonDataset(write_samples(samples), None, processor)) == 4
    with pytest.raises(ValueError, match="no usable sample"):
        LlavaJsonDataset(write_samples(samples), None, processor, require_image=True)


def test_the_check_counts_malformed_samples(write_samples: Writer, tmp_path: Path, capsys) -> None:
    samples = malformed()
    path = write_samples([GOOD, *samples, TEXT])
    written = config(tmp_path, train_file=str(path), image_folder=str(tmp_path), min_output_length=1)
    assert main(["check", str(written), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    # Those that name a picture which is not there are sound otherwise: two, each in two ways.
    assert report["findings"]["malformed"]["count"] == report["sources"][0]["malformed"] == len(samples) - 4
    assert report["findings"]["missing pictures"]["count"] == 2
    assert report["sources"][0]["rows"] == len(samples) + 2
    assert main(["check", str(written)]) == 1
    capsys.readouterr().out.encode()


ENCODINGS = {"utf-8": b"", "utf-8-sig": b"", "utf-16": b"", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "mac"])
def test_data_files_in_every_encoding_and_with_every_line_end(
    write_samples: Writer, processor: LlavaProcessor, encoding: str, end: str
) -> None:
    samples = [GOOD, {**TEXT, "id": "two", "conversations": talk("Zwölf\u2028 猫\x85?", "näch\u2029stes 🐈")}]
    folder = write_samples([]).parent
    texts = {
        "a.json": json.dumps(samples, ensure_ascii=False, indent=1).replace("\n", end),
        "a.jsonl": end.join(json.dumps(sample, ensure_ascii=False) for sample in samples) + end + end,
    }
    for name, text in texts.items():
        (folder / name).write_bytes(ENCODINGS[encoding] + text.encode(encoding))
        dataset = open_dataset(folder / name, None, processor)
        assert dataset.samples == samples


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a.tar"])
@pytest.mark.parametrize("place", ["pipe", "device", "folder", "nothing", "empty", "pointer", "garbage", "nulls"])
def test_files_that_are_no_data_are_named_and_not_waited_on(
    tmp_path: Path, processor: LlavaProcessor, name: str, place: str
) -> None:
    path = tmp_path / name
    contents = {
        "empty": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "garbage": random.Random(0).randbytes(3000),
        "nulls": bytes(3000),
    }
    if place == "pipe":
        os.mkfifo(path)
    elif place == "device":
        path.symlink_to("/dev/zero")
    elif place == "folder":
        path.mkdir()
    elif place != "nothing":
        path.write_bytes(contents[place])
    with pytest.raises((ValueError, FileNotFoundError), match=name.replace(".", r"\.")):
        open_dataset(path, None, processor)


def message_of(path: Path, processor: LlavaProcessor) -> str | None:
    """Why the data cannot be opened, None where it can."""
    try:
        open_dataset(path, None, processor, on_bad_sample="skip")
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


def test_saved_folders_that_are_damaged_are_named(tmp_path: Path, processor: LlavaProcessor) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"id": "a", "conversations": talk("Hi", "Hey")}])
    for number, damage in enumerate((b"", b"{}", b"[]", b"null", b'{"_data_files": [{"filename": "../../x"}]}', None)):
        for file in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
            folder = tmp_path / f"{number} {file}"
            table.save_to_disk(folder)
            (folder / file).unlink()
            if damage is None:
                os.mkfifo(folder / file)
            else:
                (folder / file).write_bytes(damage)
            message = message_of(folder, processor)
            assert str(folder) in message if message else file == "dataset_info.json"


def test_rows_whose_columns_differ_in_length_are_malformed(tmp_path: Path, processor: LlavaProcessor) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"id": "good", "conversations": {"from": ["human", "gpt"], "value": ["Hi", "Hey"]}},
        {"id": "bad", "conversations": {"from": ["human", "gpt"], "value": ["Hi"]}},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    dataset = open_dataset(tmp_path / "a.parquet", None, processor, on_bad_sample="skip")
    assert [sample["id"] for sample in dataset.samples] == ["good"]
    assert [name for name, _ in dataset.skipped] == ["bad"]


def shard(path: Path, members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


SAMPLE = json.dumps({"conversations": talk("Hi", "Hey")}).encode()


@pytest.mark.parametrize("name", ["../../out", "/etc/out", "a/../../b", "c:\\x", "\udcff", "a" * 300])
def test_names_in_shards_are_keys_and_never_paths(tmp_path: Path, processor: LlavaProcessor, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = shard(inner / "a.tar", {f"{name}x.json": SAMPLE})
    before = sorted(tmp_path.rglob("*"))
    dataset = open_dataset(path, None, processor, on_bad_sample="skip")
    dataset[0]["id"].encode()
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_shards_are_named(tmp_path: Path, processor: LlavaProcessor) -> None:
    """Each byte of the headers changed, the file cut anywhere: an error of one kind, or samples."""
    whole = shard(
        tmp_path / "whole.tar", {"a.json": SAMPLE, "b" * 200 + ".json": SAMPLE}, tarfile.PAX_FORMAT
    ).read_bytes()
    chance = random.Random(1)
    path = tmp_path / "a.tar"
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(len(content) // 2)] = chance.randrange(256)
        path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
        message = message_of(path, processor)
        assert message is None or "a.tar" in message


def test_members_of_impossible_sizes_are_named(tmp_path: Path, processor: LlavaProcessor) -> None:
    path = shard(tmp_path / "a.tar", {"a.json": SAMPLE, "b.json": SAMPLE})
    for size in (-512, -1, 1 << 40, 1 << 62):
        content = bytearray(path.read_bytes())
        field = (b"\xff" if size < 0 else b"\x80") + struct.pack(">q", size).rjust(11, b"\xff" if size < 0 else b"\0")
        content[124:136] = field
        content[148:156] = b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
        (tmp_path / "b.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"b\.tar cannot be read as an uncompressed tar file"):
            open_dataset(tmp_path / "b.tar", None, processor)


@pytest.mark.parametrize(
    ("values", "answers", "finding"),
    [
        ({}, ["red"] * 3, "Set output_turns=all, a smaller min_output_length, or output_predictor=false"),
        ({"output_turns": "all"}, ["red"] * 3, "Set a smaller min_output_length"),
        ({"output_turns": "all", "min_output_length": 3}, ["red"] * 3, None),
        ({"min_output_length": 2}, ["red"] * 3, None),
        ({"output_predictor": False}, ["red"] * 3, None),
        ({}, ["red", " ".join(["word"] * 60)], None),
        ({}, [" ".join(["word"] * 60), "red"], "no last answer has min_output_length=50 tokens within max_length=2048"),
    ],
)
def test_the_check_says_when_a_predictor_would_see_nothing(
    write_samples: Writer, tmp_path: Path, capsys, values: dict[str, Any], answers: list[str], finding: str | None
) -> None:
    texts = [text for answer in answers for text in ("What?", answer)]
    path = write_samples([{**GOOD, "conversations": talk(f"<image>\n{texts[0]}", *texts[1:])}])
    written = config(tmp_path, train_file=str(path), image_folder=str(tmp_path), **values)
    assert main(["check", str(written), "--json"]) == (finding is not None)
    report = json.loads(capsys.readouterr().out)
    assert report["judged"]["answers"] == report["judged"]["image_rows"] == 1
    assert report["judged"]["judged"] == (finding is None and values.get("output_predictor", True))
    found = report["findings"]["predictor without data"]["examples"]
    assert finding in found[0] if finding else not found


def test_the_check_says_when_no_sample_has_a_picture(write_samples: Writer, tmp_path: Path, capsys) -> None:
    written = config(tmp_path, train_file=str(write_samples([TEXT])), min_output_length=1)
    assert main(["check", str(written)]) == 1
    assert "image_predictor=false" in capsys.readouterr().out
    assert main(["check", str(written), "image_predictor=false"]) == 0


def test_the_check_reports_pictures_that_are_too_large(tmp_path: Path, capsys) -> None:
    from ..odd_pictures import REFUSED

    names = [name for name in REFUSED if name != "half.png"]
    for name in names:
        (tmp_path / name).write_bytes(REFUSED[name][0]())
    samples = [{**GOOD, "id": name, "image": name} for name in names]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    written = config(tmp_path, train_file=str(tmp_path / "data.json"), min_output_length=1, base_model=str(ASSET))
    assert main(["check", str(written), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"]["unreadable pictures"]["count"] == len(names)


@pytest.mark.parametrize("odd", ["x", None, 1.5, 0, -1, True, float("nan")])
def test_lengths_that_are_none(write_samples: Writer, processor: LlavaProcessor, odd: Any) -> None:
    with pytest.raises(ValueError, match="max_length is"):
        open_dataset(write_samples([GOOD]), None, processor, max_length=odd)


@pytest.mark.parametrize("odd", [True, 3, 1.5, {"a": 1}])
def test_paths_that_are_none(write_samples: Writer, processor: LlavaProcessor, odd: Any) -> None:
    for arguments in ((odd, None), (write_samples([GOOD]), odd)):
        with pytest.raises(TypeError, match=r"(train_file|image_folder) is .*; give a path"):
            open_dataset(*arguments, processor)


def test_a_table_with_a_field_twice(tmp_path: Path, processor: LlavaProcessor) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    from pyarrow import array, table

    # Arrow's names end at a null byte.
    turns = [{**turn, "value\0": "x"} for turn in GOOD["conversations"]]
    pyarrow.write_table(table({"conversations": array([turns])}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read"):
        open_dataset(tmp_path / "a.parquet", None, processor)


@pytest.mark.parametrize("template", ["{% for x", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ cycler.__init__.__globals__ }}"])
def test_a_chat_template_that_fails(write_samples: Writer, template: str) -> None:
    processor = AutoProcessor.from_pretrained(ASSET)
    processor.chat_template = template
    with pytest.raises(ValueError, match="chat template fails"):
        open_dataset(write_samples([TEXT]), None, processor)
