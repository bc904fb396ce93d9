"""The `image-text-to-text` pipeline with a batch, on the tiny base of the package."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline

from dynamic_llava import DynamicLlavaForConditionalGeneration

BASE = "assets/tiny-llava"
COLOURS = ["red", "green", "blue"]


def talk(colour: str, question: str) -> list[dict]:
    picture = Image.new("RGB", (64, 64), colour)
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_through_the_pipeline_equals_single_calls(batch_size):
    processor = AutoProcessor.from_pretrained(BASE)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(BASE).eval()
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    questions = ["How many objects are there?", "Is there a circle?", "Describe the picture in detail."]
    talks = [talk(c, q) for c, q in zip(COLOURS, questions, strict=True)]
    arguments = {"max_new_tokens": 12, "do_sample": False}
    answers = pipe(talks, batch_size=batch_size, return_full_text=False, generate_kwargs=arguments)
    for one, answer in zip(talks, answers, strict=True):
        inputs = processor.apply_chat_template(
            one, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            output = model.generate(**inputs, **arguments)
        expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer[0]["generated_text"].strip() == expected.strip()
