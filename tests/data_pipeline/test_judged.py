"""Counted beforehand equals what training's own rule judges in the batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlavaProcessor

from dynamic_llava.data import LlavaCollator, LlavaJsonDataset, MixtureDataset
from dynamic_llava.data.judged import JudgedCounts, count_judged
from dynamic_llava.token_masks import answer_token_mask

from .conftest import talk

LONG = " ".join(["word"] * 40)
SAMPLES = [
    {"id": "short", "image": "a.png", "conversations": talk("<image>\nWhat?", "red", "And now?", "blue")},
    {"id": "long", "image": "a.png", "conversations": talk("<image>\nWhat?", LONG)},
    {"id": "long first", "image": "a.png", "conversations": talk("<image>\nWhat?", LONG, "Sure?", "yes")},
    {"id": "ends in a question", "image": "b.png", "conversations": talk("<image>\nWhat?", LONG, "Sure?")},
    {"id": "text", "conversations": talk("Hi", LONG)},
    {"id": "model first", "conversations": [{"from": "gpt", "value": "Hello"}, *talk("Hi", "Hey")]},
    {"id": "two", "image": ["a.png", "b.png"], "conversations": talk("<image> or <image>?", "a", "b?", f"{LONG}\n")},
    {"id": "picture behind", "image": "a.png", "conversations": talk("Hi", LONG, "<image>\nWhat?", "red")},
]


def counted_in_batches(dataset: LlavaJsonDataset | MixtureDataset, processor, minimum: int) -> JudgedCounts:
    answers = judged = images = 0
    for index in range(len(dataset)):
        batch = LlavaCollator(processor)([dataset[index]])
        output = batch.get("output_mask", answer_token_mask(batch["labels"], batch["attention_mask"]))
        answers += int(output.sum() > 0)
        judged += int(output.sum() >= max(minimum, 1))
        images += int((batch["input_ids"] == processor.image_token_id).any())
    return JudgedCounts(answers, judged, images)


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize("max_length", [2048, 190, 130, 110])
@pytest.mark.parametrize("minimum", [0, 1, 3, 40, 41, 42, 1000])
def test_counts_are_those_of_training(
    write_samples: Callable[[object], Path], processor: LlavaProcessor, turns: str, max_length: int, minimum: int
) -> None:
    # Training stops at a sample whose answers are all cut off.
    samples = [sample for sample in SAMPLES if sample["id"] != "two" or max_length > 180]
    dataset = LlavaJsonDataset(write_samples(samples), None, processor, output_turns=turns, max_length=max_length)
    assert count_judged(dataset, minimum) == counted_in_batches(dataset, processor, minimum)
    mixture = MixtureDataset([dataset, dataset], [0.5, 2], seed=3)
    assert count_judged(mixture, minimum) == counted_in_batches(mixture, processor, minimum)


def test_counting_opens_no_picture(write_samples: Callable[[object], Path], processor: LlavaProcessor) -> None:
    path = write_samples(SAMPLES)
    for picture in path.parent.glob("*.png"):
        picture.unlink()
    dataset = LlavaJsonDataset(path, None, processor, check_files=False)
    assert count_judged(dataset, 30) == JudgedCounts(answers=7, judged=3, image_rows=6)
