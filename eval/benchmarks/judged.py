"""Benchmarks with open answers that a judge scores: MM-Vet and LLaVA-Bench (in the Wild), in lmms-eval's columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .source import Source, read_lines, read_named, unique

Documents = Iterator[dict[str, Any]]


def mmvet(source: Source) -> Documents:
    """MM-Vet's `mm-vet.json`: questions by id, with the capabilities that each needs."""
    path = source.find("mm-vet.json")
    images = source.find("images")
    for name, entry in read_named(path):
        yield {
            "question_id": name,
            "question": entry.text("question"),
            "answer": entry.value("answer"),
            "image_source": entry.get("imagesource"),
            "capability": ",".join(map(str, entry.value("capability", list))),
            "image": entry.picture(images, "imagename"),
        }


def llava_bench(source: Source) -> Documents:
    """LLaVA-Bench's questions with the captions that the judge sees, and GPT-4's answers that it compares with."""
    questions, contexts, answers = (
        source.find(name) for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")
    )
    images = source.find("images")
    captions = {line.text("image"): line.text("caption") for line in read_lines(contexts)}
    given = {line.value("question_id"): line.text("text") for line in read_lines(answers)}
    for line in unique(read_lines(questions), "question_id"):
        name, image = line.value("question_id"), line.text("image")
        if name not in given or image not in captions:
            lacking = answers if name not in given else contexts
            raise ValueError(f"{lacking} has nothing for question {name} on {image}; download it again.")
        yield {
            "question_id": name,
            "image_id": image,
            "question": line.text("text"),
            "category": line.text("category"),
            "caption": captions[image],
            "gpt_answer": given[name],
            "image": line.picture(images, "image"),
        }
