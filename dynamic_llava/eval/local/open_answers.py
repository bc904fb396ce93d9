"""Benchmarks with short open answers: VQAv2, GQA, TextVQA, VizWiz. Columns are those of lmms-eval's datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .source import Source, column, read_json, read_lines

Documents = Iterator[dict[str, Any]]
OCR_MARK = "\nReference OCR token: "


def vqav2_val(source: Source) -> Documents:
    """VQAv2's questions and annotations of val2014."""
    questions = source.find("v2_OpenEnded_mscoco_val2014_questions.json")
    annotations = source.find("v2_mscoco_val2014_annotations.json")
    images = source.find("val2014", "images/val2014")
    by_question = {entry["question_id"]: entry for entry in column(read_json(annotations), "annotations", annotations)}
    for question in column(read_json(questions), "questions", questions):
        entry = by_question.get(question["question_id"])
        if entry is None:
            raise ValueError(f"{annotations} has no answers to question {question['question_id']}.")
        yield {
            "question_id": question["question_id"],
            "image_id": question["image_id"],
            "question": question["question"],
            "question_type": entry.get("question_type"),
            "answer_type": entry.get("answer_type"),
            "multiple_choice_answer": entry.get("multiple_choice_answer"),
            "answers": entry["answers"],
            "image": images / f"COCO_val2014_{question['image_id']:012d}.jpg",
        }


def vqav2_test(source: Source) -> Documents:
    """VQAv2's questions of test2015 or test-dev2015, or LLaVA's own list of test-dev: a submission, no scores."""
    path = source.find(
        "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        "llava_vqav2_mscoco_test-dev2015.jsonl",
        "v2_OpenEnded_mscoco_test2015_questions.json",
    )
    images = source.find("test2015", "images/test2015")
    if path.suffix == ".jsonl":
        for line in read_lines(path):
            question = line["text"].split("\n")[0]
            yield {"question_id": line["question_id"], "question": question, "image": images / Path(line["image"]).name}
        return
    for question in column(read_json(path), "questions", path):
        yield {
            "question_id": question["question_id"],
            "image_id": question["image_id"],
            "question": question["question"],
            "image": images / f"COCO_test2015_{question['image_id']:012d}.jpg",
        }


def gqa(source: Source) -> Documents:
    """GQA's balanced test-dev questions."""
    path = source.find("testdev_balanced_questions.json", "*/testdev_balanced_questions.json")
    images = source.find("images", "data/images")
    for name, question in read_json(path).items():
        yield {
            "id": name,
            "imageId": question["imageId"],
            "question": question["question"],
            "answer": question["answer"],
            "fullAnswer": question.get("fullAnswer"),
            "image": images / f"{question['imageId']}.jpg",
        }


def textvqa_val(source: Source) -> Documents:
    """TextVQA 0.5.1's validation, with OCR tokens of Rosetta or of LLaVA's own list where one of them is there."""
    path = source.find("TextVQA_0.5.1_val.json")
    images = source.find("train_images", "train_val_images/train_images")
    tokens = _ocr_tokens(source)
    for question in column(read_json(path), "data", path):
        image = question["image_id"]
        yield {
            "question_id": question["question_id"],
            "image_id": image,
            "question": question["question"],
            "answers": question["answers"],
            "ocr_tokens": tokens.get(image, tokens.get((image, question["question"].lower()), [])),
            "image": images / f"{image}.jpg",
        }


def _ocr_tokens(source: Source) -> dict[Any, list[str]]:
    """OCR tokens by image (Rosetta), or by image and question (LLaVA's list, which has them in the prompt)."""
    rosetta = source.optional("TextVQA_Rosetta_OCR_v0.2_val.json")
    if rosetta:
        return {entry["image_id"]: entry["ocr_tokens"] for entry in column(read_json(rosetta), "data", rosetta)}
    listed = source.optional("llava_textvqa_val_v051_ocr.jsonl")
    tokens = {}
    for line in read_lines(listed) if listed else ():
        question, _, rest = line["text"].partition(OCR_MARK)
        found = rest.split("\n")[0]
        tokens[Path(line["image"]).stem, question.lower()] = found.split(", ") if found else []
    return tokens


def vizwiz_vqa_val(source: Source) -> Documents:
    """VizWiz's validation questions."""
    return _vizwiz(source, "val")


def vizwiz_vqa_test(source: Source) -> Documents:
    """VizWiz's test questions: a submission, no scores."""
    return _vizwiz(source, "test")


def _vizwiz(source: Source, split: str) -> Documents:
    path = source.find(f"{split}.json", f"Annotations/{split}.json")
    images = source.find(split)
    for question in read_json(path):
        answers = [entry["answer"] for entry in question.get("answers", ())]
        yield {
            "question_id": Path(question["image"]).stem,
            "question": question["question"],
            "answers": answers or None,
            "category": question.get("answer_type"),
            "image": images / question["image"],
        }
