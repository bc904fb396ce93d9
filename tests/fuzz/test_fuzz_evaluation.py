"""Damaged downloads, documents, results and answers of evaluations; see `harness`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.conversation_files import conversation_files
from dynamic_llava.eval.conversations import read_documents as read_conversations
from dynamic_llava.eval.local import documents
from dynamic_llava.eval.responses import ResponseStore
from eval.benchmarks.generation import main as build_benchmarks
from eval.benchmarks.prepare import CONVERSIONS
from eval.benchmarks.prepare import main as prepare

from ..eval.downloads import build_all, cvbench_parquet
from ..eval.generation_data import write_downloads
from ..eval.test_compare import results
from .harness import Case, run_cases
from .limits import watched
from .mutators import anything, damage_file, mutate_value, write_json, write_yaml

METRICS = {"gqa": {"exact_match": 0.61, "exact_match_stderr": 0.1}, "mme": {"mme_perception_score": 1510.0}}
COSTS = {"gqa": {"image_tokens_kept": 115.0, "prefill_ms": 3.5, "prefill_flops": 1e12, "kv_bytes": 10}}
ANSWER = {"text": "yes", "tokens": 3, "image_tokens": 64}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    root = build_all(tmp_path_factory.mktemp("downloads"))
    shutil.copytree(root / "cvbench", root / "parquet" / "cvbench")
    cvbench_parquet(root / "parquet")
    return root


@pytest.fixture(scope="module")
def prepared(downloads, tmp_path_factory) -> dict[str, list[str]]:
    """The documents of each task, made of the good downloads, without their pictures' places."""
    folder = tmp_path_factory.mktemp("prepared")
    assert prepare(["--source", str(downloads), "--output", str(folder)]) == 0
    return {path.stem: _lines(path) for path in folder.glob("*.jsonl")}


@pytest.fixture(scope="module")
def generation(tmp_path_factory) -> Path:
    return write_downloads(tmp_path_factory.mktemp("generation"))


def test_evaluation(downloads, prepared, generation, tmp_path):
    targets: tuple[Callable[[Case], None], ...] = (
        lambda case: _prepare(case, downloads, prepared),
        lambda case: _prepare(case, downloads, prepared),
        lambda case: _generation(case, generation),
        lambda case: _conversations(case, generation),
        lambda case: _documents(case, downloads),
        _compare,
        _compare,
        _responses,
        _options,
    )
    run_cases("evaluation", 150, lambda case: case.random.choice(targets)(case), tmp_path)


def _lines(path: Path) -> list[str]:
    """Documents as text, with the names of their pictures alone."""
    found = []
    for line in path.read_text().splitlines():
        document = json.loads(line)
        images = document.get("image")
        names = [Path(name).name for name in (images if isinstance(images, list) else [images] if images else [])]
        found.append(json.dumps({**document, "image": names}))
    return found


def _damage_text(case: Case, path: Path) -> int:
    """Damage a file of JSON, JSON lines or cells; how many of its rows may be others than before."""
    rng = case.random
    if rng.random() < 0.3:
        case.note(damage_file(rng, path))
        return 10**9
    text = path.read_text()
    if path.suffix == ".json" and text[:1] in "[{":
        try:
            value, place = mutate_value(rng, json.loads(text))
        except ValueError:
            return _damage_line(case, path, text)
        path.write_bytes(write_json(rng, value))
        case.note(path.name, place)
        return 1 if len(place) > 1 + isinstance(value, dict) else 10**9
    return _damage_line(case, path, text)


def _damage_line(case: Case, path: Path, text: str) -> int:
    rng, lines = case.random, text.split("\n")
    number = rng.randrange(len(lines))
    if path.suffix in (".jsonl", ".json") and lines[number]:
        value, place = mutate_value(rng, json.loads(lines[number]))
        lines[number] = json.dumps(value)
        case.note(path.name, "line", number, place, lines[number])
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        cells = lines[number].split(mark)
        cells[rng.randrange(len(cells))] = str(anything(rng))
        lines[number] = mark.join(cells)
        case.note(path.name, "row", number, cells)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return 1 if number else 10**9


def _prepare(case: Case, downloads: Path, prepared: dict[str, list[str]]) -> None:
    rng = case.random
    task = rng.choice(sorted(prepared))
    name = CONVERSIONS[task].folder
    source = downloads / "parquet" / name if task.startswith("cv_bench") and rng.random() < 0.5 else downloads / name
    folder = case.copy(source, f"source/{name}")
    if name == "pope":
        assert (folder / "val2014").is_dir()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix in (".json", ".jsonl", ".tsv", ".csv", ".txt")]
    if texts and rng.random() < 0.85:
        changed = _damage_text(case, rng.choice(texts))
    else:
        case.note(damage_file(rng, rng.choice(files)))
        changed = 10**9
    every = rng.random() < 0.2
    with watched(case.root):
        status, said = case.command(
            prepare, *(() if every else (f"stock:{task}",)), "--source", folder.parent, "--output", case.output
        )
    made = case.output / f"{task}.jsonl"
    if not every:
        case.check(made.is_file() == (status == 0), "status", status, made.is_file())
    case.check(not list(case.output.glob("*.partial")), "left over")
    if made.is_file() and changed == 1 and f"{task}: " in said:
        lost = [line for line in prepared[task] if line not in _lines(made)]
        case.check(len(lost) <= 1, "documents", task, lost[:2])
        case.note(said)


def _generation(case: Case, generation: Path) -> None:
    folder = case.copy(generation, "downloads")
    _damage_text(case, folder / case.random.choice(["lvis.json", "sharegpt4v.json"]))
    words = ("--lvis", folder / "lvis.json", "--sharegpt4v", folder / "sharegpt4v.json", "--allow-fewer")
    with watched(case.root):
        case.command(build_benchmarks, *words, "--image-folder", folder, "--output", case.output)


def _conversations(case: Case, generation: Path) -> None:
    """A task's own file, as an evaluation reads it."""
    folder = case.copy(generation, "root")
    rows = json.loads((folder / "lvis.json").read_text())[1:5]
    (folder / "test_vqa.json").write_text(json.dumps(rows))
    _damage_text(case, folder / "test_vqa.json")
    with watched(case.root):
        found = case.call(read_conversations, folder, conversation_files()["shapes_vqa"])
    for document in found or ():
        texts = [*document["questions"], *document["answers"]]
        case.check(all(isinstance(text, str) and text for text in texts), "no text", document)


def _documents(case: Case, downloads: Path) -> None:
    """Prepared documents, as an evaluation reads them."""
    rng = case.random
    (case.root / "images").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copyfile(downloads / "gqa/data/images/n1.jpg", case.root / "images" / name)
    rows = [{"id": n, "question": "what?", "answer": "red", "image": f"images/{'ab'[n % 2]}.png"} for n in range(4)]
    path = case.root / "gqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _damage_text(case, path)
    with watched(case.root):
        found = case.call(documents.read_documents, path, ("id", "question", "answer", "image"))
        if found is not None and rng.random() < 0.5:
            table = case.call(documents.image_dataset, found)
            for number in range(len(table or ())):
                case.call(table.__getitem__, number)


def _compare(case: Case) -> None:
    rng = case.random
    runs = [results(case.root / f"run{n}", METRICS, efficiency=COSTS) for n in range(rng.choice([1, 2]))]
    path = rng.choice(runs) / "results.json"
    content = {**json.loads(path.read_text()), "efficiency": COSTS}
    place: tuple = ()
    for _ in range(rng.choice([1, 1, 3])):
        content, place = mutate_value(rng, content)
        case.note(place)
    path.write_bytes(write_json(rng, content))
    if rng.random() < 0.25:
        case.note(damage_file(rng, path))
    more = rng.choice([(), (), ("--tolerance", rng.choice(["nan", "inf", "-1", "x", "1e999", "0"]))])
    with watched(case.root):
        status, _ = case.command(main, "compare", *runs, "--output", case.output, *more)
    case.check((case.output / "compare.md").is_file() == (status == 0), "status", status)


def _responses(case: Case) -> None:
    """Answers that were written before are taken over as they are, or refused."""
    rng = case.random
    folder = case.output
    store = ResponseStore(folder, "print")
    store.add(["a", "b"], [{**ANSWER, "n": 1}, {**ANSWER, "n": 2}])
    store.add(["c"], [{**ANSWER, "n": 3}])
    path = folder / "responses.jsonl"
    good = {json.loads(line).get("key"): json.loads(line) for line in path.read_text().splitlines()}
    before = path.read_bytes()
    path.write_bytes(before[: rng.randrange(len(before))] if rng.random() < 0.4 else before)
    if path.read_bytes() == before:
        _damage_text(case, path)
    whole = path.is_file() and not path.is_symlink() and path.read_bytes() in before
    again = case.call(ResponseStore, folder, "print", True)
    if again is None:
        return
    for key in ("a", "b", "c") if whole else ():
        found = again.get([key])
        case.check(found is None or {"key": key, **found[0]} == good[key], "another answer", key, found)
    case.call(again.add, ["d"], [ANSWER])
    last = case.call(ResponseStore, folder, "print", True)
    case.check(last is None or not whole or len(last) == len(again), "answers lost", len(last or ()), len(again))


def _options(case: Case) -> None:
    """The configuration file and the command line of an evaluation, up to the model, which is not there."""
    rng = case.random
    values: Any = {
        "tasks": ["gqa"],
        "batch_size": 4,
        "limit": 2,
        "image_keep_rate": 0.5,
        "dtype": "auto",
        "resume": False,
    }
    for _ in range(rng.choice([0, 1, 2])):
        values, place = mutate_value(rng, values)
        case.note(place)
    path = case.root / "eval.yaml"
    path.write_bytes(write_yaml(rng, values))
    if rng.random() < 0.2:
        case.note(damage_file(rng, path))
    flags = (
        "--batch-size",
        "--limit",
        "--image-keep-rate",
        "--output-keep-rate",
        "--seed",
        "--dtype",
        "--tasks",
        "--model",
    )
    words: list[str] = []
    if rng.random() < 0.6:
        words = [
            rng.choice(flags),
            rng.choice(["0", "-1", "nan", "inf", "1e9", "", "x", "a\0b", "9" * 30, "0.5", " ", "é"]),
        ]
    with watched(case.root):
        model = ("--model", case.root / "nothing", "--output", case.output)
        status, _ = case.command(main, "--config", path, *model, *words)
    case.check(status != 0, "evaluated nothing")
