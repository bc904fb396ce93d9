"""Per-call arguments in a generation configuration: of a call, of the model, and which comes first."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.call_arguments import GENERATE_ARGUMENTS

from .tiny import IMAGE_TOKEN, IMAGE_TOKENS, batch_of, image_run, pictures, tiny_model, words

BATCH = ([[1, *words(2, 1), *image_run(), *words(4, 2)]], [pictures(1, 1)], "left")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def kept(model, config: dict | None = None, **call) -> tuple[int, int]:
    """How many image and output tokens a call keeps."""
    if config is not None:
        call["generation_config"] = GenerationConfig(**config, **GREEDY)
    else:
        call |= GREEDY
    found = model.generate(**batch_of(*BATCH), **call, return_sparsity=True).sparsity
    return found.image_tokens_kept.item(), found.output_tokens_kept.item()


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    "arguments",
    [
        {"image_keep_rate": 0.1},
        {"output_sparsity": False},
        {"output_keep_rate": 1.0, "image_keep_rate": 1.0},
        {"image_selection": "threshold"},
        {"image_selector": "random"},
        {"output_selector": "random", "image_keep_rate": 0.5},
    ],
)
def test_an_argument_means_the_same_in_a_configuration(model, arguments, beams):
    assert set(arguments) <= set(GENERATE_ARGUMENTS)

    def tokens(config: dict, **call):
        torch.manual_seed(0)
        config = GenerationConfig(**config, **GREEDY, num_beams=beams)
        return model.generate(**batch_of(*BATCH), generation_config=config, **call)

    assert torch.equal(tokens(arguments), tokens({}, **arguments))


def test_the_call_comes_before_its_configuration_and_that_before_the_model(model):
    own = kept(model)[0]
    model.generation_config.image_keep_rate = 0.75
    try:
        assert kept(model)[0] == 12
        assert kept(model, image_keep_rate=None)[0] == 12
        assert kept(model, {})[0] == 12
        assert kept(model, {"output_sparsity": False}) == (12, 5)
        assert kept(model, {"image_keep_rate": 0.5})[0] == 8
        assert kept(model, {"image_keep_rate": 0.5}, image_keep_rate=0.25)[0] == 4
        assert kept(model, image_keep_rate=0.25)[0] == 4
        # What a call says does not stay.
        assert kept(model)[0] == 12
    finally:
        del model.generation_config.image_keep_rate
    assert kept(model)[0] == own != IMAGE_TOKENS


@pytest.mark.parametrize("place", ["call", "model"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_keep_rate": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"image_keep_rate": "0.5"}, "got '0.5'"),
        ({"image_selector": "os:path"}, "would import code"),
        ({"output_selector": "tests.tiny:Rule"}, "would import code"),
        ({"output_selector": "nobody"}, "nobody"),
        ({"output_sparsity": False, "output_keep_rate": 0.5}, "drops no output tokens"),
    ],
)
def test_what_does_not_fit(model, arguments, message, place):
    if place == "call":
        with pytest.raises(ValueError, match=message):
            kept(model, arguments)
        return
    for name, value in arguments.items():
        setattr(model.generation_config, name, value)
    try:
        with pytest.raises(ValueError, match=message):
            kept(model)
    finally:
        for name in arguments:
            delattr(model.generation_config, name)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}, {"use_cache": False}])
def test_stop_strings_with_the_tokenizer_that_they_need(mode):
    base = "assets/tiny-llava"
    model, tokenizer = DynamicLlavaForConditionalGeneration.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    inputs = tokenizer("The picture shows", return_tensors="pt")
    torch.manual_seed(0)
    whole = model.generate(**inputs, max_new_tokens=12, **mode)
    answer = tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :])
    stop = answer.split()[1]
    torch.manual_seed(0)
    found = model.generate(**inputs, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer, **mode)
    assert stop in tokenizer.decode(found[0, inputs["input_ids"].shape[1] :])
    assert found.shape[1] < whole.shape[1] or stop == answer.split()[-1]
