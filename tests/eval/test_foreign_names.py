"""No name of a data file leads out of the folder that it belongs to, in readers and in writers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from dynamic_llava.errors import ExitStatus
from dynamic_llava.eval.conversation_files import conversation_files
from dynamic_llava.eval.conversations import read_documents as read_conversations
from dynamic_llava.eval.local.documents import read_documents
from dynamic_llava.reading import inside
from eval.benchmarks.generation import main as build_generation
from eval.benchmarks.prepare import main as prepare

from . import downloads

ESCAPES = [
    "../../x",
    "a/../../x",
    "..",
    "..\\x",
    "a\\..\\..\\x",
    ".. /x",
    "/abs/x",
    "\\abs\\x",
    "C:\\x",
    "c:x",
    "",
    " ",
    ".",
    "./",
    "a\0b",
    "x" * 256,
    5,
    None,
    ["a"],
]
NAMES = ["a.png", "a/b.png", "./a.png", "a b/ü.png", "..a.png", "a..b/c", "x" * 255, "COCO_val2014_000000000042.jpg"]


@pytest.mark.parametrize("name", ESCAPES, ids=repr)
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"the\.json row 3"):
        inside(tmp_path, name, "the.json row 3")
    if name != "/abs/x":
        with pytest.raises(ValueError, match=r"the\.json row 3"):
            inside(tmp_path, name, "the.json row 3", or_absolute=True)


@pytest.mark.parametrize("name", NAMES)
def test_other_names_stay_below_the_folder(tmp_path, name):
    assert inside(tmp_path, name, "here") == tmp_path / name
    assert inside(tmp_path, name, "here").resolve().is_relative_to(tmp_path.resolve())


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def mmbench(root: Path, index: str) -> None:
    row = {"index": index, "question": "?", "A": "a", "B": "b", "answer": "A", "category": "c"}
    row["image"] = downloads.encoded(3)
    path = root / "in/mmbench/mmbench_dev_20230712.tsv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row, delimiter="\t")
        writer.writeheader()
        writer.writerow(row)


@pytest.mark.parametrize(
    "index", ["../../x", "/tmp/x", "..", "a/../../../x", "..\\x", "C:x", "", "1e3", "-1", "1.5", "x", "9" * 300, "٣"]
)
def test_an_index_of_mmbench_writes_nothing_outside(tmp_path, index, capsys):
    mmbench(tmp_path, index)
    before = files_of(tmp_path)
    assert prepare(["mmbench", "--source", f"{tmp_path}/in", "--output", f"{tmp_path}/out"]) == ExitStatus.BAD_INPUT
    said = capsys.readouterr().err
    assert "mmbench_dev_20230712.tsv row 1" in said
    assert files_of(tmp_path) == before


def test_a_link_where_a_picture_goes_is_not_followed(tmp_path):
    mmbench(tmp_path, "7")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "out/images/mmbench_en_dev").mkdir(parents=True)
    (tmp_path / "out/images/mmbench_en_dev/7.jpg").symlink_to(outside)
    assert prepare(["mmbench", "--source", f"{tmp_path}/in", "--output", f"{tmp_path}/out"]) == 0
    assert outside.read_text() == "mine"


def change(path: Path, old: str, new: str) -> None:
    """Replace a value of a JSON file, whatever its layout."""
    text = path.read_text()
    assert json.dumps(old)[1:-1] in text
    path.write_text(text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1], 1))


@pytest.mark.parametrize("escape", ["../../../x", "/etc/x", "..\\\\x", "C:x"])
@pytest.mark.parametrize(
    ("build", "task", "file", "name"),
    [
        (downloads.gqa, "gqa", "gqa/data/testdev_balanced_questions.json", "n3"),
        (downloads.textvqa, "textvqa_val", "textvqa/TextVQA_0.5.1_val.json", "t3"),
        (downloads.vizwiz, "vizwiz_vqa_val", "vizwiz/val.json", "VizWiz_val_00000003.jpg"),
        (downloads.pope, "pope_adv", "pope/coco/coco_pope_adversarial.json", "COCO_val2014_000000000003.jpg"),
    ],
)
def test_pictures_of_downloads_are_looked_for_below_their_folder(tmp_path, capsys, build, task, file, name, escape):
    build(tmp_path)
    change(tmp_path / file, name, escape)
    assert prepare([task, "--source", str(tmp_path), "--output", f"{tmp_path}/out"]) == ExitStatus.BAD_INPUT
    said = capsys.readouterr().err
    assert "is no name of a file below" in said
    assert Path(file).name in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("escape", ["../x.png", "a/../../x.png", "..\\x.png", "", 5, None])
def test_pictures_of_prepared_documents_stay_below_their_folder(tmp_path, escape):
    (tmp_path / "root").mkdir()
    downloads.picture(tmp_path / "x.png")
    path = tmp_path / "root/task.jsonl"
    path.write_text(json.dumps({"question": "?", "image": [escape]}))
    with pytest.raises(ValueError, match=r"task\.jsonl line 1"):
        read_documents(path)
    path.write_text(json.dumps({"question": "?", "image": str(tmp_path / "x.png")}))
    assert read_documents(path)[0]["image"] == str(tmp_path / "x.png")


@pytest.mark.parametrize("escape", ["../x.png", "a/../../x.png", "..\\x.png", "", 5, ["a"]])
def test_pictures_of_conversations_stay_below_their_folder(tmp_path, escape, capsys):
    (tmp_path / "root").mkdir()
    downloads.picture(tmp_path / "x.png")
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "word " * 101}]
    samples = [{"id": "a", "image": escape, "conversations": turns}]
    (tmp_path / "root/test_vqa.json").write_text(json.dumps(samples))
    with pytest.raises(ValueError, match=r"test_vqa\.json sample 0"):
        read_conversations(tmp_path / "root", conversation_files()["shapes_vqa"])
    arguments = ["--lvis", f"{tmp_path}/root/test_vqa.json", "--image-folder", f"{tmp_path}/root"]
    arguments += ["--output", f"{tmp_path}/out", "--allow-fewer"]
    assert build_generation(arguments) == ExitStatus.BAD_INPUT
    assert not files_of(tmp_path / "out")


def test_one_broken_benchmark_does_not_stop_the_others(tmp_path, capsys):
    downloads.gqa(tmp_path)
    downloads.vizwiz(tmp_path)
    downloads.mme(tmp_path)
    (tmp_path / "gqa/data/testdev_balanced_questions.json").write_text('{"1": {"question": 5}}')
    text = next((tmp_path / "MME").rglob("*.txt"))
    text.write_text(text.read_text() + "a line of its own\n")
    assert prepare(["--source", str(tmp_path), "--output", f"{tmp_path}/out"]) == ExitStatus.FINDINGS
    said = capsys.readouterr()
    assert "vizwiz_vqa_val: 8 documents" in said.out
    assert "mme: 1 lines without a question and an answer are left out." in said.err
    assert "gqa: failed. " in said.err
    assert "entry '1'" in said.err
    assert said.err.endswith("1 of 3 benchmarks failed: gqa.\n")
    assert not (tmp_path / "out/gqa.jsonl").exists()


# Row 2 of a table whose other rows are right.
BROKEN_ROWS = {
    "more cells": "2\tq\ta\tb\tA\tc\tP\tmore",
    "fewer cells": "2\tq",
    "no base64": "2\tq\ta\tb\tA\tc\t" + "*" * 100,
    "no picture": "2\tq\ta\tb\tA\tc\t" + "QUJD" * 30,
    "no picture above": "2\tq\ta\tb\tA\tc\t99",
    "same index": "1\tq\ta\tb\tA\tc\tP",
    "empty picture": "2\tq\ta\tb\tA\tc\t",
}


@pytest.mark.parametrize("row", BROKEN_ROWS.values(), ids=BROKEN_ROWS)
def test_broken_rows_of_a_table_are_named(tmp_path, capsys, row):
    path = tmp_path / "mmbench_dev_20230712.tsv"
    header, first = "index\tquestion\tA\tB\tanswer\tcategory\timage", "1\tq\ta\tb\tA\tc\tP"
    path.write_text("\n".join([header, first, row]).replace("\tP", f"\t{downloads.encoded(1)}"))
    assert prepare(["mmbench", "--source", str(tmp_path), "--output", f"{tmp_path}/out"]) == ExitStatus.BAD_INPUT
    said = capsys.readouterr().err
    assert "mmbench_dev_20230712.tsv row 2" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"index\timage\n\x00\n", b'index\timage\n"' + b"x" * 2**20, b"\x00" * 1000]
)
def test_files_that_are_no_tables(tmp_path, capsys, content):
    (tmp_path / "mmbench_dev_20230712.tsv").write_bytes(content)
    assert prepare(["mmbench", "--source", str(tmp_path), "--output", f"{tmp_path}/out"]) == ExitStatus.BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("value", [None, [], "x", 5, {"questions": None}, {"questions": [None]}, {"questions": [[]]}])
@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("gqa", "testdev_balanced_questions.json"),
        ("seedbench", "SEED-Bench.json"),
        ("vizwiz", "val.json"),
        ("scienceqa", "problems.json"),
        ("realworldqa", "annotations.json"),
        ("mmvet", "mm-vet.json"),
    ],
)
def test_json_of_other_shapes_is_one_line(tmp_path, capsys, task, file, value):
    for folder in ("images", "val", "SEED-Bench-image", "test"):
        (tmp_path / folder).mkdir()
    (tmp_path / file).write_text(json.dumps(value))
    (tmp_path / "pid_splits.json").write_text('{"test": ["1"]}')
    assert prepare([task, "--source", str(tmp_path), "--output", f"{tmp_path}/out"]) == ExitStatus.BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
