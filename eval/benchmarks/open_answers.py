"""Benchmarks with short open answers: VQAv2, GQA, TextVQA, VizWiz. Columns are those of lmms-eval's datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .source import Row, Source, read_lines, read_list, read_named, read_object, unique

Documents = Iterator[dict[str, Any]]
OCR_MARK = "\nReference OCR token: "


def vqav2_val(source: Source) -> Documents:
    """VQAv2's questions and annotations of val2014."""
    questions = source.find("v2_OpenEnded_mscoco_val2014_questions.json")
    annotations = source.find("v2_mscoco_val2014_annotations.json")
    images = source.find("val2014", "images/val2014")
    entries = unique(read_object(annotations).rows("annotations"), "question_id")
    by_question = {entry.value("question_id"): entry for entry in entries}
    for question in unique(read_object(questions).rows("questions"), "question_id"):
        entry = by_question.get(question.value("question_id"))
        if entry is None:
            raise ValueError(f"{annotations} has no answers to question {question.value('question_id')}.")
        answers = [{**answer.values, "answer": answer.value("answer")} for answer in entry.rows("answers")]
        yield {
            **_vqav2_question(question, images, "val2014"),
            "question_type": entry.get("question_type"),
            "answer_type": entry.get("answer_type"),
            "multiple_choice_answer": entry.get("multiple_choice_answer"),
            "answers": answers,
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
        for line in unique(read_lines(path), "question_id"):
            question = line.text("text").split("\n")[0]
            yield {
                "question_id": line.value("question_id"),
                "question": question,
                "image": images / line.picture(images, "image").name,
            }
        return
    for question in unique(read_object(path).rows("questions"), "question_id"):
        yield _vqav2_question(question, images, "test2015")


def _vqav2_question(question: Row, images: Path, split: str) -> dict[str, Any]:
    number = question.whole("image_id")
    return {
        "question_id": question.value("question_id"),
        "image_id": number,
        "question": question.text("question"),
        "image": images / f"COCO_{split}_{number:012d}.jpg",
    }


def gqa(source: Source) -> Documents:
    """GQA's balanced test-dev questions."""
    path = source.find("testdev_balanced_questions.json", "*/testdev_balanced_questions.json")
    images = source.find("images", "data/images")
    for name, question in read_named(path):
        yield {
            "id": name,
            "imageId": question.value("imageId"),
            "question": question.text("question"),
            "answer": question.text("answer"),
            "fullAnswer": question.get("fullAnswer"),
            "image": question.picture(images, "imageId", "{}.jpg"),
        }


def textvqa_val(source: Source) -> Documents:
    """TextVQA 0.5.1's validation, with OCR tokens of Rosetta or of LLaVA's own list where one of them is there."""
    path = source.find("TextVQA_0.5.1_val.json")
    images = source.find("train_images", "train_val_images/train_images")
    tokens = _ocr_tokens(source)
    for question in unique(read_object(path).rows("data"), "question_id"):
        image, text = question.value("image_id"), question.text("question")
        yield {
            "question_id": question.value("question_id"),
            "image_id": image,
            "question": text,
            "answers": question.value("answers", list),
            "ocr_tokens": tokens.get(image, tokens.get((image, text.lower()), [])),
            "image": question.picture(images, "image_id", "{}.jpg"),
        }


def _ocr_tokens(source: Source) -> dict[Any, list[str]]:
    """OCR tokens by image (Rosetta), or by image and question (LLaVA's list, which has them in the prompt)."""
    rosetta = source.optional("TextVQA_Rosetta_OCR_v0.2_val.json")
    if rosetta:
        entries = read_object(rosetta).rows("data")
        return {entry.value("image_id"): [str(word) for word in entry.value("ocr_tokens", list)] for entry in entries}
    listed = source.optional("llava_textvqa_val_v051_ocr.jsonl")
    tokens = {}
    for line in read_lines(listed) if listed else ():
        question, _, rest = line.text("text").partition(OCR_MARK)
        found = rest.split("\n")[0]
        tokens[Path(line.text("image")).stem, question.lower()] = found.split(", ") if found else []
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
    for question in unique(read_list(path), "image"):
        answers = [answer.value("answer") for answer in question.rows("answers")] if question.get("answers") else None
        picture = question.picture(images, "image")
        yield {
            "question_id": picture.stem,
            "question": question.text("question"),
            "answers": answers,
            "category": question.get("answer_type"),
            "image": picture,
        }
