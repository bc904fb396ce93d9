"""Benchmarks with options: MMBench, ScienceQA, SEED-Bench, MMVP, CV-Bench, RealWorldQA, in lmms-eval's columns."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .source import IMAGE_SUFFIXES, Source, column, read_json, read_lines, read_table

Documents = Iterator[dict[str, Any]]
MMBENCH_TEXTS = ("question", "hint", "A", "B", "C", "D", "answer", "category", "source", "comment", "split")
# Shorter cells are the index of the row whose picture is shared.
SHORTEST_PICTURE = 64
# Pairs whose published answers are swapped; lmms-eval's dataset has them corrected (its README lists them).
MMVP_CORRECTIONS = {99: "(b)", 100: "(a)", 279: "(b)", 280: "(a)"}


def mmbench(*files: str) -> Callable[[Source], Documents]:
    """Converter of an MMBench table; its base64 pictures are written out. Empty options and hints stay empty."""

    def convert(source: Source) -> Documents:
        path = source.find(*files)
        source.images.mkdir(parents=True, exist_ok=True)
        written: dict[str, Path] = {}
        for row in read_table(path, "\t"):
            index, picture = column(row, "index", path), column(row, "image", path) or ""
            if len(picture) < SHORTEST_PICTURE:
                if picture not in written:
                    raise ValueError(f"{path}: question {index} names the picture of {picture!r}, which is not there.")
                image = written[picture]
            else:
                image = source.images / f"{index}.jpg"
                image.write_bytes(base64.b64decode(picture))
            written[index] = image
            texts = {name: row.get(name) for name in MMBENCH_TEXTS}
            yield {"index": int(index), **texts, "L2-category": row.get("l2-category"), "image": image}

    return convert


def scienceqa(only_with_image: bool) -> Callable[[Source], Documents]:
    """Converter of ScienceQA's test problems, all of them or those with a picture."""

    def convert(source: Source) -> Documents:
        path = source.find("problems.json", "data/scienceqa/problems.json")
        splits = source.find("pid_splits.json", "data/scienceqa/pid_splits.json")
        images = source.find("images/test", "test")
        problems = read_json(path)
        for name in column(read_json(splits), "test", splits):
            problem = column(problems, name, path)
            picture = problem.get("image")
            if only_with_image and not picture:
                continue
            texts = {key: problem.get(key, "") for key in ("grade", "subject", "topic", "category", "skill", "lecture")}
            yield {
                "id": name,
                "question": problem["question"],
                "choices": problem["choices"],
                "answer": problem["answer"],
                "hint": problem.get("hint", ""),
                **texts,
                "image": images / name / picture if picture else None,
            }

    return convert


def seedbench(source: Source) -> Documents:
    """SEED-Bench; a question on a video takes part where LLaVA's script extracted its middle frame."""
    path = source.find("SEED-Bench.json")
    images = source.find("SEED-Bench-image")
    frames = source.optional("SEED-Bench-video-image")
    without_frame = 0
    for question in column(read_json(path), "questions", path):
        if question["data_type"] == "video":
            picture = frames / f"{question['question_id']}.png" if frames else None
            if picture is None or not picture.is_file():
                without_frame += 1
                continue
        else:
            picture = images / question["data_id"]
        names = ("question_id", "question", "answer", "data_id", "data_type", "question_type_id")
        options = {f"choice_{letter}": question[f"choice_{letter}"] for letter in "abcd"}
        yield {**{name: question[name] for name in names}, **options, "image": [picture]}
    if without_frame:
        print(f"seedbench: {without_frame} video questions without a frame are left out.", file=sys.stderr)


def mmvp(source: Source) -> Documents:
    """MMVP's table with lmms-eval's corrections of two swapped pairs."""
    path = source.find("Questions.csv")
    images = source.find("MMVP Images", "MMVP_Images", "images")
    for row in read_table(path, ","):
        index = int(column(row, "Index", path))
        picture = next((images / f"{index}{s}" for s in IMAGE_SUFFIXES if (images / f"{index}{s}").is_file()), None)
        if picture is None:
            raise FileNotFoundError(f"No image {index} ({', '.join(IMAGE_SUFFIXES)}) in {images}.")
        yield {
            "Index": index,
            "Question": row["Question"],
            "Options": row["Options"],
            "Correct Answer": MMVP_CORRECTIONS.get(index, row["Correct Answer"]),
            "image": picture,
        }


def cv_bench(*parts: str) -> Callable[[Source], Documents]:
    """Converter of CV-Bench's `test_2d` and `test_3d`, parquet with the pictures inside or JSON lines beside them."""

    def convert(source: Source) -> Documents:
        for part in parts:
            images = source.optional("img")
            path = source.find(f"test_{part}.parquet", f"data/test_{part}.parquet", f"test_{part}.jsonl")
            for row in _parquet_rows(path) if path.suffix == ".parquet" else read_lines(path):
                picture = row.get("image")
                if isinstance(picture, dict):
                    image = source.images / f"{part}_{row['idx']}.png"
                    image.parent.mkdir(parents=True, exist_ok=True)
                    image.write_bytes(picture["bytes"])
                else:
                    image = (images or path).parent / column(row, "filename", path)
                names = ("idx", "type", "task", "question", "choices", "answer", "prompt", "source")
                yield {**{name: column(row, name, path) for name in names}, "image": image}

    return convert


def _parquet_rows(path: Path) -> Documents:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64):
        yield from batch.to_pylist()


def realworldqa(source: Source) -> Documents:
    """RealWorldQA's annotations: JSON lines (or one JSON list) with image, question and answer."""
    path = source.find("annotations.jsonl", "annotations.json")
    for line in read_lines(path) if path.suffix == ".jsonl" else read_json(path):
        name = column(line, "image", path)
        image = path.parent / name
        yield {
            "question": column(line, "question", path),
            "answer": column(line, "answer", path),
            "image": image if image.is_file() else path.parent / "images" / name,
        }
