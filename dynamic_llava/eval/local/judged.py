"""Benchmarks with open answers that a judge scores: MM-Vet and LLaVA-Bench (in the Wild), in lmms-eval's columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .source import Source, column, read_json, read_lines

Documents = Iterator[dict[str, Any]]


def mmvet(source: Source) -> Documents:
    """MM-Vet's `mm-vet.json`: questions by id, with the capabilities that each needs."""
    path = source.find("mm-vet.json")
    images = source.find("images")
    for name, entry in read_json(path).items():
        yield {
            "question_id": name,
            "question": column(entry, "question", path),
            "answer": column(entry, "answer", path),
            "image_source": entry.get("imagesource"),
            "capability": ",".join(column(entry, "capability", path)),
            "image": images / column(entry, "imagename", path),
        }


def llava_bench(source: Source) -> Documents:
    """LLaVA-Bench's questions with the captions that the judge sees, and GPT-4's answers that it compares with."""
    questions, contexts, answers = (
        source.find(name) for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")
    )
    images = source.find("images")
    captions = {column(line, "image", contexts): column(line, "caption", contexts) for line in read_lines(contexts)}
    given = {column(line, "question_id", answers): column(line, "text", answers) for line in read_lines(answers)}
    for line in read_lines(questions):
        name, image = column(line, "question_id", questions), column(line, "image", questions)
        if name not in given or image not in captions:
            lacking = answers if name not in given else contexts
            raise ValueError(f"{lacking} has nothing for question {name} on {image}; download it again.")
        yield {
            "question_id": name,
            "image_id": image,
            "question": column(line, "text", questions),
            "category": column(line, "category", questions),
            "caption": captions[image],
            "gpt_answer": given[name],
            "image": images / image,
        }
