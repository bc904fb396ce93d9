"""Benchmarks with options: MMBench, ScienceQA, SEED-Bench, MMVP, CV-Bench, RealWorldQA, in lmms-eval's columns."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dynamic_llava.reading import inside

from .source import IMAGE_SUFFIXES, Row, Source, read_lines, read_list, read_object, read_parquet, read_table, unique

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
        written: dict[str, Path] = {}
        for row in unique(read_table(path, "\t"), "index"):
            index, picture = row.whole("index"), row.text("image")
            if len(picture) < SHORTEST_PICTURE:
                if picture not in written:
                    raise ValueError(f"{row.where} names the picture of {picture!r}, which is not above it.")
                image = written[picture]
            else:
                image = source.unpack(f"{index}.jpg", _decoded(picture, row), row.where)
            written[str(index)] = image
            texts = {name: row.get(name) for name in MMBENCH_TEXTS}
            yield {"index": index, **texts, "L2-category": row.get("l2-category"), "image": image}

    return convert


def _decoded(picture: str, row: Row) -> bytes:
    try:
        return base64.b64decode(picture, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{row.where}: 'image' is not base64 ({error}); download the file again.") from error


def scienceqa(only_with_image: bool) -> Callable[[Source], Documents]:
    """Converter of ScienceQA's test problems, all of them or those with a picture."""

    def convert(source: Source) -> Documents:
        path = source.find("problems.json", "data/scienceqa/problems.json")
        splits = source.find("pid_splits.json", "data/scienceqa/pid_splits.json")
        images = source.find("images/test", "test")
        problems = read_object(path)
        for name in read_object(splits).value("test", list):
            problem = Row(problems.value(str(name), dict), f"{path} entry {name!r}")
            picture = problem.get("image")
            if only_with_image and not picture:
                continue
            texts = {key: problem.get(key, "") for key in ("grade", "subject", "topic", "category", "skill", "lecture")}
            folder = inside(images, str(name), problem.where)
            yield {
                "id": name,
                "question": problem.text("question"),
                "choices": problem.value("choices", list),
                "answer": problem.whole("answer"),
                "hint": problem.get("hint", ""),
                **texts,
                "image": problem.picture(folder, "image") if picture else None,
            }

    return convert


def seedbench(source: Source) -> Documents:
    """SEED-Bench; a question on a video takes part where LLaVA's script extracted its middle frame."""
    path = source.find("SEED-Bench.json")
    images = source.find("SEED-Bench-image")
    frames = source.optional("SEED-Bench-video-image")
    for question in read_object(path).rows("questions"):
        if question.value("data_type") == "video":
            picture = question.picture(frames, "question_id", "{}.png") if frames else None
            if picture is None or not picture.is_file():
                source.skip("video questions without a frame")
                continue
        else:
            picture = question.picture(images, "data_id")
        names = ("question_id", "question", "answer", "data_id", "data_type", "question_type_id")
        names += tuple(f"choice_{letter}" for letter in "abcd")
        yield {**{name: question.value(name) for name in names}, "image": [picture]}


def mmvp(source: Source) -> Documents:
    """MMVP's table with lmms-eval's corrections of two swapped pairs."""
    path = source.find("Questions.csv")
    images = source.find("MMVP Images", "MMVP_Images", "images")
    for row in unique(read_table(path, ","), "Index"):
        index = row.whole("Index")
        picture = next((images / f"{index}{s}" for s in IMAGE_SUFFIXES if (images / f"{index}{s}").is_file()), None)
        if picture is None:
            raise FileNotFoundError(f"No image {index} ({', '.join(IMAGE_SUFFIXES)}) in {images}.")
        yield {
            "Index": index,
            "Question": row.text("Question"),
            "Options": row.text("Options"),
            "Correct Answer": MMVP_CORRECTIONS.get(index, row.text("Correct Answer")),
            "image": picture,
        }


def cv_bench(*parts: str) -> Callable[[Source], Documents]:
    """Converter of CV-Bench's `test_2d` and `test_3d`, parquet with the pictures inside or JSON lines beside them."""

    def convert(source: Source) -> Documents:
        for part in parts:
            images = source.optional("img")
            path = source.find(f"test_{part}.parquet", f"data/test_{part}.parquet", f"test_{part}.jsonl")
            for row in unique(read_parquet(path) if path.suffix == ".parquet" else read_lines(path), "idx"):
                if isinstance(row.get("image"), dict):
                    content = Row(row.get("image"), f"{row.where}: 'image'").value("bytes", bytes)
                    image = source.unpack(f"{part}_{row.whole('idx')}.png", content, row.where)
                else:
                    image = row.picture((images or path).parent, "filename")
                names = ("idx", "type", "task", "question", "answer", "prompt", "source")
                values = {name: row.value(name) for name in names}
                yield {**values, "choices": row.value("choices", list), "image": image}

    return convert


def realworldqa(source: Source) -> Documents:
    """RealWorldQA's annotations: JSON lines (or one JSON list) with image, question and answer."""
    path = source.find("annotations.jsonl", "annotations.json")
    for line in read_lines(path) if path.suffix == ".jsonl" else read_list(path):
        image = line.picture(path.parent, "image")
        yield {
            "question": line.text("question"),
            "answer": line.value("answer"),
            "image": image if image.is_file() else line.picture(path.parent / "images", "image"),
        }
