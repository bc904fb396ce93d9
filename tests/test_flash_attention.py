"""flash_attention_2 with dropped tokens, on a stand-in that keeps its contract: 2D masks, bottom-right causality.

The real kernel needs a GPU; what can go wrong on this side is which mask a call hands over.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import repeat_kv

from dynamic_llava.masked_attention import MASKED_PREFIX

from .test_modeling import training_batch
from .tiny import batch_of, mixed_prompts, tiny_model, words

FLASH = "flash_attention_2"
GREEDY = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
calls: list[str] = []


def attention_of_one(query, key, value, scaling):
    """`(H, q, d)` on `(H, k, d)`, the last query at the last key, as the kernel aligns them."""
    length, seen = query.shape[1], key.shape[1]
    causal = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
    weights = (query @ key.transpose(1, 2) * scaling).masked_fill(~causal, float("-inf")).softmax(-1)
    return weights @ value


def naive_flash(module, query, key, value, attention_mask, scaling, position_ids=None, **kwargs):
    assert module.config._attn_implementation == FLASH
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    calls.append("none" if attention_mask is None else f"{attention_mask.dim()}D")
    if attention_mask is None and position_ids is not None and len(query) == 1 and query.shape[2] > 1:
        assert (position_ids.diff() == 1).all(), "would be taken for packed sequences"
    output = torch.zeros_like(query)
    for row in range(len(query)):
        if attention_mask is None:
            output[row] = attention_of_one(query[row], key[row], value[row], scaling)
            continue
        assert attention_mask.shape == (len(query), key.shape[2])
        keys = attention_mask[row].bool()
        queries = torch.ones(1, dtype=torch.bool) if query.shape[2] == 1 else keys[-query.shape[2] :]
        output[row][:, queries] = attention_of_one(
            query[row][:, queries], key[row][:, keys], value[row][:, keys], scaling
        )
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash():
    """Makes a model use the stand-in; undone afterwards."""
    mapping = ALL_ATTENTION_FUNCTIONS._global_mapping
    before = mapping[FLASH]
    AttentionInterface.register(FLASH, naive_flash)
    calls.clear()

    def switch(model):
        model.model.language_model.config._attn_implementation = FLASH
        return model

    yield switch
    mapping[FLASH] = before
    mapping.pop(MASKED_PREFIX + FLASH, None)


@pytest.mark.parametrize(
    "arguments", [{}, {"output_sparsity": False}, {"num_beams": 2}, {"image_selection": "threshold"}]
)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rows", [slice(0, 4), slice(0, 1), slice(1, 3)])
def test_generation_equals_sdpa(flash, arguments, use_cache, rows):
    prompts, images = mixed_prompts()
    batch = batch_of(prompts[rows], images[rows], "left")
    expected = tiny_model().generate(**batch, **GREEDY, **arguments, use_cache=use_cache)
    found = flash(tiny_model()).generate(**batch, **GREEDY, **arguments, use_cache=use_cache)
    assert torch.equal(found, expected)
    assert calls
    assert "4D" not in calls


def test_calls_that_need_a_4d_mask_go_through_sdpa(flash):
    """A second turn on a ragged cache, and scoring with hidden answer tokens."""
    stock, model = tiny_model(), flash(tiny_model())
    rows, images = mixed_prompts()
    turn = torch.tensor([words(4, 30 + row) for row in range(4)])
    logits = []
    with torch.no_grad():
        for one in (stock, model):
            cache = one(**batch_of(rows, images, "left"), use_cache=True).past_key_values
            mask = torch.nn.functional.pad(batch_of(rows, images, "left")["attention_mask"], (0, 4), value=1)
            logits.append(one(input_ids=turn, attention_mask=mask, past_key_values=cache).logits)
        torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)
        scored = [one(**training_batch()) for one in (stock, model)]
    torch.testing.assert_close(scored[0].loss, scored[1].loss)


def test_training_masks_the_sparse_layers_itself(flash):
    losses, gradients = [], []
    for model in (tiny_model(), flash(tiny_model())):
        torch.manual_seed(0)
        loss = model.train()(**training_batch()).loss
        loss.backward()
        losses.append(loss)
        gradients.append(model.model.language_model.image_predictor.down[1].weight.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, atol=5e-5, rtol=1e-3)
    assert set(calls) <= {"2D", "none"}
