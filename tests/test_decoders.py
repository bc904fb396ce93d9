"""Every stock decoder of the table: all-keep is the stock model, and dropping means the same in every mode."""

from __future__ import annotations

import pytest
import torch

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model_kinds import DECODERS

from .tiny import batch_of, mixed_prompts, stock_model, tiny_config, tiny_model

FAMILIES = pytest.mark.parametrize("decoder", DECODERS)
GREEDY = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@FAMILIES
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_all_keep_equals_stock_bit_for_bit(decoder, attention):
    model = tiny_model(attention=attention, decoder=decoder)
    stock = stock_model(model)
    rows, images = mixed_prompts()
    # Without the row of two pictures: stock transformers before 5.19 gave its beams other ones.
    del rows[1], images[1]
    batch = batch_of(rows, images, "left")
    for further in ({}, {"use_cache": False}, {"num_beams": 2}):
        with torch.no_grad():
            ours = model.generate(**batch, image_keep_rate=1.0, output_sparsity=False, **GREEDY, **LOGITS, **further)
            theirs = stock.generate(**batch, **GREEDY, **LOGITS, **further)
        assert torch.equal(ours.sequences, theirs.sequences)
        for our, their in zip(ours.logits, theirs.logits, strict=True):
            assert torch.equal(our, their)


@FAMILIES
def test_cached_equals_uncached_and_a_batch_its_rows(decoder):
    model = tiny_model(decoder=decoder)
    rows, images = mixed_prompts()
    with torch.no_grad():
        cached = model.generate(**batch_of(rows, images, "left"), return_sparsity=True, **GREEDY, **LOGITS)
        uncached = model.generate(**batch_of(rows, images, "left"), use_cache=False, **GREEDY, **LOGITS)
        assert torch.equal(cached.sequences, uncached.sequences)
        for one, two in zip(cached.logits, uncached.logits, strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
        assert (cached.sparsity.output_tokens_kept < cached.sparsity.output_tokens).any()
        for number, (row, image) in enumerate(zip(rows, images, strict=True)):
            alone = model.generate(**batch_of([row], [image], "left"), **GREEDY)
            assert torch.equal(alone[0, len(row) :], cached.sequences[number, -16:])


@FAMILIES
def test_training_equals_its_reference(decoder):
    losses = []
    for attention in ("eager", "sdpa"):
        model = tiny_model(attention=attention, decoder=decoder).train()
        batch = batch_of(*mixed_prompts(), "right")
        labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
        labels[:, :-6] = -100
        torch.manual_seed(3)
        output = model(**batch, labels=labels)
        output.loss.backward()
        grad = model.model.language_model.image_predictor.head[-1].weight.grad
        losses.append((output.loss.detach(), grad))
    for one, two in zip(*losses, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


@FAMILIES
def test_saved_and_loaded(decoder, tmp_path):
    model = tiny_model(decoder=decoder)
    model.save_pretrained(tmp_path)
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.model.language_model).__name__ == f"Sparse{DECODERS[decoder]}"
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_decoders_that_cannot_be_sparse_are_refused():
    values = tiny_config(decoder="mistral").to_dict()
    values["text_config"]["sliding_window"] = 32
    with pytest.raises(ValueError, match="sliding_window=32"):
        DynamicLlavaConfig.from_dict(values)
    values = tiny_config(decoder="qwen2").to_dict()
    values["text_config"] |= {
        "use_sliding_window": True,
        "layer_types": None,
        "sliding_window": 8,
        "max_window_layers": 1,
    }
    with pytest.raises(ValueError, match="sliding_window=8"):
        DynamicLlavaConfig.from_dict(values)
    values["text_config"] = {"model_type": "gemma", "num_hidden_layers": 3}
    with pytest.raises(ValueError, match="gemma"):
        DynamicLlavaConfig.from_dict(values)
