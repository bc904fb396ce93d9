"""Benchmarks answered with yes or no: POPE and MME. Columns are those of lmms-eval's datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dynamic_llava.reading import read_text

from .source import IMAGE_SUFFIXES, Source, read_lines

POPE_CATEGORIES = ("adversarial", "popular", "random")


def pope(*categories: str) -> Callable[[Source], Iterator[dict[str, Any]]]:
    """Converter of POPE's questions on COCO of `categories`."""

    def convert(source: Source) -> Iterator[dict[str, Any]]:
        names = {category: f"coco_pope_{category}.json" for category in categories}
        paths = {c: source.find(f"coco/{name}", name, f"output/coco/{name}") for c, name in names.items()}
        images = source.find("val2014", "images/val2014", "vqav2/val2014")
        for category, path in paths.items():
            for line in read_lines(path):
                picture = line.picture(images, "image")
                yield {
                    "id": f"{category}_{line.value('question_id')}",
                    "question_id": line.value("question_id"),
                    "question": line.text("text"),
                    "answer": line.text("label"),
                    "image_source": picture.stem,
                    "category": category,
                    "image": picture,
                }

    return convert


def mme(source: Source) -> Iterator[dict[str, Any]]:
    """MME's release: per category a text file beside each image, one question and answer per line."""
    release = "MME_Benchmark_release_version"
    found = source.optional(f"{release}/MME_Benchmark/existence", f"{release}/existence", "existence")
    root = found.parent if found else source.find(f"{release}/MME_Benchmark", release)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        texts, images = folder / "questions_answers_YN", folder / "images"
        texts, images = (texts, images) if texts.is_dir() else (folder, folder)
        for text in sorted(texts.glob("*.txt")):
            image = _image_named(images, text.stem)
            for line in read_text(text, "list of questions").splitlines():
                question, _, answer = line.strip().partition("\t")
                if answer:
                    yield {
                        "question_id": f"{folder.name}/{image.name}",
                        "question": question,
                        "answer": answer.strip(),
                        "category": folder.name,
                        "image": image,
                    }
                elif question:
                    source.skip("lines without a question and an answer")


def _image_named(folder: Path, stem: str) -> Path:
    for suffix in IMAGE_SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise FileNotFoundError(f"No image {stem} ({', '.join(IMAGE_SUFFIXES)}) in {folder}.")
