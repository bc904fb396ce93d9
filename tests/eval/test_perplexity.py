import json
import math

import pytest
import torch
from PIL import Image

from dynamic_llava.checkpoints.loaded import SparsitySettings
from dynamic_llava.data.conversation import encode_conversation, parse_turns
from dynamic_llava.eval.perplexity import score_answers, token_nll
from tools.tiny_base.config import SYSTEM_PROMPT as TINY_PROMPT


def test_token_nll_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1.0, 1.0, 1.0]]]))
    labels = torch.tensor([[-100, 1, 0]])
    torch.testing.assert_close(token_nll(logits, labels), -torch.log(torch.tensor([[0.25, 0.1]])))
    assert token_nll(logits, torch.full((1, 3), -100)).eq(0).all()


def manual_loop(loaded, folder) -> tuple[float, int]:
    """Total negative log likelihood and tokens, one sample and one token at a time."""
    total, count = 0.0, 0
    for sample in json.loads((folder / "test_describe.json").read_text()):
        ids, labels = encode_conversation(
            parse_turns(sample["conversations"]), loaded.processor.tokenizer, [64], system=TINY_PROMPT
        )
        picture = Image.open(folder / sample["image"]).convert("RGB")
        pixels = loaded.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = loaded.model(
                input_ids=torch.tensor([ids]), pixel_values=pixels, labels=torch.tensor([labels])
            ).logits[0]
        for position, label in enumerate(labels):
            if label != -100:
                total -= logits[position - 1].double().log_softmax(-1)[label].item()
                count += 1
    return total, count


@pytest.mark.parametrize("name", ["dense", "run"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_equals_a_manual_loop(name, batch_size, shapes_folder, request):
    loaded = request.getfixturevalue(name)
    total, count = manual_loop(loaded, shapes_folder)
    scores = score_answers(loaded, shapes_folder / "test_describe.json", shapes_folder, batch_size=batch_size)
    assert scores.total("scored_tokens") == count
    assert scores.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_kept_counts(run, dense, shapes_folder):
    arguments = (shapes_folder / "test_describe.json", shapes_folder)
    scores = score_answers(run, *arguments)
    for sample in scores.samples:
        assert (sample.image_tokens, sample.image_tokens_kept) == (64, 12)
        assert sample.scored_tokens == sample.output_tokens
        dropped = 64 - 12 + sample.output_tokens - sample.output_tokens_kept
        assert sample.dense_tokens - sample.sparse_tokens == dropped
    image_only = score_answers(run, *arguments, SparsitySettings(image_keep_rate=0.5, output_sparsity=False))
    assert image_only.kept_fraction("image") == 0.5
    assert image_only.kept_fraction("output") == 1.0
    everything = score_answers(dense, *arguments)
    assert everything.kept_fraction("image") == everything.kept_fraction("output") == 1.0
    assert everything.total("dense_tokens") == everything.total("sparse_tokens")


def test_random_selection_repeats_with_its_seed(run, shapes_folder):
    arguments = (shapes_folder / "test_describe.json", shapes_folder)
    random = SparsitySettings(image_selector="random", output_selector="random")
    first, second = (score_answers(run, *arguments, random, seed=3) for _ in range(2))
    assert first == second
    assert first != score_answers(run, *arguments, random, seed=4)
    assert first.kept_fraction("image") == 12 / 64


def test_limit(run, shapes_folder):
    scores = score_answers(run, shapes_folder / "test_describe.json", shapes_folder, limit=2)
    assert len(scores.samples) == 2
