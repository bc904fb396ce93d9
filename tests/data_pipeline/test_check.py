"""`python -m dynamic_llava.data check`: what it counts and finds, on 10,000 rows of the shape of mix665k too."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import LlavaProcessor

from dynamic_llava.data import open_dataset
from dynamic_llava.data.__main__ import main
from dynamic_llava.data.check import check_data
from dynamic_llava.train.config import load_config

from .conftest import ASSET, noise, talk

FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")
ROWS = 10_000


def config(folder: Path, **values: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"base_model": str(ASSET), "learning_rate": 1e-4, **values}))
    return path


def mix665k(folder: Path) -> tuple[Path, list[str]]:
    """Writes rows as in llava_v1_5_mix665k and their pictures; returns the file and the ids of image rows."""
    rng = np.random.default_rng(0)
    words = ["the", "a", "red", "blue", "cross", "circle", "of", "in", "is", "left", "picture", "what", "how many"]
    names = [f"{place}/{number:06d}.jpg" for number in range(1000) for place in FOLDERS]
    original = noise(folder / names[0], (64, 48)).read_bytes()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(original)

    def text(count: int) -> str:
        return " ".join(rng.choice(words, count))

    rows, image_ids = [], []
    for number in range(ROWS):
        turns = [text(rng.integers(4, 40)) for _ in range(2 * rng.integers(1, 5))]
        row: dict[str, Any] = {"id": f"{number:012d}"}
        # Of mix665k, 40,688 of 665,298 rows are text alone, from ShareGPT; some begin with the model's turn.
        if number % 16:
            row["image"] = names[int(rng.integers(len(names)))]
            turns[0] = (f"<image>\n{turns[0]}", f"{turns[0]}\n<image>", f"{turns[0]} <image> {turns[0]}")[number % 3]
            image_ids.append(row["id"])
        row["conversations"] = talk(*turns)
        if number % 160 == 0:
            row["conversations"].insert(0, {"from": "gpt", "value": "Hello"})
        rows.append(row)
    path = folder / "llava_v1_5_mix665k.json"
    path.write_text(json.dumps(rows))
    return path, image_ids


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """10,000 rows."""
    return mix665k(tmp_path_factory.mktemp("mix"))


def test_every_image_row_of_mix665k_is_there_once(mix: tuple[Path, list[str]], processor: LlavaProcessor) -> None:
    path, image_ids = mix
    dataset = open_dataset(path, path.parent, processor, require_image=True)
    assert Counter(sample["id"] for sample in dataset.samples) == Counter(dict.fromkeys(image_ids, 1))
    for position in range(0, len(dataset), 997):
        assert dataset[position]["id"] == image_ids[position]
        assert len(dataset[position]["input_ids"]) == dataset.lengths[position]
    assert len(open_dataset(path, path.parent, processor)) == ROWS


def test_ten_thousand_rows_take_less_than_twenty_seconds(mix: tuple[Path, list[str]]) -> None:
    path, image_ids = mix
    written = config(path.parent, train_file=str(path), image_folder=str(path.parent), require_image=True)
    command = [sys.executable, "-m", "dynamic_llava.data", "check", str(written), "--json"]
    # Processor time of the command alone, over all cores: the wall clock would measure other processes too.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0, run.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
    report = json.loads(run.stdout)
    (source,) = report["sources"]
    assert source["rows"] == ROWS
    assert source["one_picture"] == report["samples_per_epoch"] == len(image_ids)
    assert source["left_out_text_only"] == ROWS - len(image_ids)
    assert (source["text_only"], source["several_pictures"]) == (0, 0)
    assert report["ok"]


@pytest.fixture
def troubled(tmp_path: Path) -> Path:
    """One data set with one of everything."""
    folder = tmp_path / "images"
    for name in ("a.png", "b.png"):
        noise(folder / name)
    (folder / "broken.jpg").write_bytes(noise(folder / "whole.jpg").read_bytes()[:900])
    long = " ".join(["word"] * 300)
    samples = [
        {"id": "one", "image": "a.png", "conversations": talk("<image>\nWhat?", "red")},
        {"id": "two", "image": ["a.png", "b.png"], "conversations": talk("<image> or <image>?", "blue")},
        {"id": "text", "conversations": talk("Hi", "Hey")},
        {"id": "gone", "image": "gone.png", "conversations": talk("<image>", "red")},
        {"id": "gone too", "image": "gone.png", "conversations": talk("<image>", "blue")},
        {"id": "broken", "image": "broken.jpg", "conversations": talk("<image>", "red")},
        {"id": "malformed", "image": "a.png", "conversations": talk("no placeholder", "red")},
        {"id": "long answer", "image": "a.png", "conversations": talk("<image>", long)},
        {"id": "long question", "image": "a.png", "conversations": talk(f"<image>\n{long}", "red")},
    ]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    return config(tmp_path, train_file=str(tmp_path / "data.json"), image_folder=[str(folder)], max_length=250)


def test_what_is_wrong_is_found_and_named(troubled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(troubled), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    findings = report["findings"]
    expected = {
        "malformed": (1, "'malformed'"),
        "missing pictures": (1, "'gone'"),
        "unreadable pictures": (1, "'broken'"),
        "no answer left": (1, "'long question'"),
        "truncated": (2, "'long answer'"),
    }
    assert {kind: finding["count"] for kind, finding in findings.items() if finding["count"]} == {
        kind: count for kind, (count, _) in expected.items()
    }
    for kind, (_, name) in expected.items():
        assert name in findings[kind]["examples"][0]
        assert "data.json" in findings[kind]["examples"][0]
    (source,) = report["sources"]
    counts = {key: source[key] for key in ("rows", "text_only", "one_picture", "several_pictures", "pictures")}
    assert counts == {"rows": 9, "text_only": 1, "one_picture": 6, "several_pictures": 1, "pictures": 4}
    assert not report["ok"]


def test_the_tables_name_the_findings(troubled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(troubled)]) == 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("Data", "p95", "unreadable pictures (1)", "'broken'", "64 per picture"))


def test_being_cut_short_alone_is_fine(troubled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = troubled.parent / "fine.json"
    rows = [
        row for row in json.loads((troubled.parent / "data.json").read_text()) if row["id"] in ("one", "long answer")
    ]
    path.write_text(json.dumps(rows))
    assert main(["check", str(troubled), f"train_file={path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"]["truncated"]["count"] == 1


def test_lengths_are_those_of_an_epoch(troubled: Path, processor: LlavaProcessor) -> None:
    path = troubled.parent / "data.json"
    words = [f"train_file=['{path}', '{path}:0.5']", "seed=3", "require_image=true", "use_cpu=true"]
    settings = load_config(troubled, words)
    report = check_data(settings.model.base_model, settings.data, settings.sparsity, settings.training.seed)
    options = {"require_image": True, "on_bad_sample": "skip", "check_files": False, "max_length": 250}
    mixture = open_dataset(settings.data.train_file, settings.data.image_folder, processor, seed=3, **options)
    full = np.array(mixture.full_lengths)
    lengths = report["lengths"]
    assert report["samples_per_epoch"] == len(mixture) == sum(s["samples_per_epoch"] for s in report["sources"])
    assert (lengths["min"], lengths["max"], lengths["total"]) == (full.min(), full.max(), sum(mixture.lengths))
    assert lengths["p90"] == np.percentile(full, 90)
    assert [source["weight"] for source in report["sources"]] == [1, 0.5]


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"train_file": "a.json"}, ["max_lenght=5"], "'max_lenght'.*Did you mean max_length"),
        ({"train_file": "a.json"}, ["max_length"], "write key=value"),
        ({}, [], r"train_file is missing in .*config\.yaml"),
        ({"train_file": "a.json", "base_model": ""}, [], "base_model must be text that is not empty"),
        ({"train_file": "a.json", "max_length": "long"}, [], "max_length must be a whole number.*'long'"),
        ({"train_file": "a.json"}, ["require_image=5"], "require_image must be true or false, got 5"),
        ({"train_file": "a.json"}, ["lora_r=-1"], "lora_r must be a whole number of at least 0, got -1"),
        (
            {"train_file": "a.json"},
            ["masked_kernel=triton", "attn_implementation=eager"],
            "masked_kernel=triton has no",
        ),
        ({"train_file": "a.json", "hub_strategy": "end"}, [], "hub_strategy=end has no effect here"),
        ({"train_file": "gone.json"}, [], r"no data file at gone\.json"),
        ({"train_file": "gone.json", "base_model": "gone/model"}, [], "gone/model"),
    ],
)
def test_bad_configurations_are_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, Any],
    overrides: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["check", str(config(tmp_path, **values)), *overrides]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_missing_and_malformed_configurations_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "none.yaml")]) == 2
    (tmp_path / "list.yaml").write_text("- a")
    assert main(["check", str(tmp_path / "list.yaml")]) == 2
    printed = capsys.readouterr().err
    assert "none.yaml" in printed
    assert "found a list" in printed
