"""A cache of fixed size: same tokens, one graph for all decode steps, nothing copied to the host within a step."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from dynamic_llava import SparseCache

from .tiny import batch_of, mixed_prompts, tiny_model, words

GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


class NoHostCopies(TorchDispatchMode):
    """Raises where a tensor's value is read by Python: on a GPU each such read waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} reads a value back to the host within a decode step")
        return func(*args, **(kwargs or {}))


def prefilled(model, max_length=96):
    batch = batch_of(*mixed_prompts(), "left")
    cache = SparseCache(model.config, max_length=max_length)
    mask = torch.nn.functional.pad(batch.pop("attention_mask"), (0, 0))
    with torch.no_grad():
        padded = torch.nn.functional.pad(mask, (0, max_length - mask.shape[1]))
        model(**batch, attention_mask=padded, past_key_values=cache, use_cache=True)
    return cache, padded, mask.shape[1]


@pytest.mark.parametrize("arguments", [{}, {"output_keep_rate": 0.3}, {"num_beams": 3}, {"image_keep_rate": 1.0}])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_static_generation_equals_dynamic(attention, arguments):
    model = tiny_model(attention=attention)
    batch = batch_of(*mixed_prompts(), "left")
    dynamic = model.generate(**batch, **GREEDY, **arguments)
    static = model.generate(**batch, **GREEDY, **arguments, cache_implementation="static")
    assert torch.equal(dynamic, static)


def decode_inputs(padded, seen, step):
    padded[:, seen + step] = 1
    tokens = torch.tensor([[word] for word in words(4, 70 + step)])
    positions = padded.sum(dim=-1, keepdim=True) - 1
    return {"input_ids": tokens, "attention_mask": padded, "position_ids": positions, "use_cache": True}


def test_compiled_decoding_is_one_graph_and_equals_eager():
    model = tiny_model()
    eager_cache, eager_mask, seen = prefilled(model)
    cache, mask, _ = prefilled(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.forward, backend=counter, fullgraph=True)
    with torch.no_grad():
        for step in range(6):
            expected = model(**decode_inputs(eager_mask, seen, step), past_key_values=eager_cache)
            found = compiled(**decode_inputs(mask, seen, step), past_key_values=cache)
            torch.testing.assert_close(found.logits, expected.logits, atol=5e-5, rtol=1e-4)
            assert torch.equal(found.output_keep_mask, expected.output_keep_mask)
    assert torch.equal(cache.kept_lengths, eager_cache.kept_lengths)
    assert counter.frame_count == 1


def test_a_step_copies_nothing_to_the_host():
    model = tiny_model()
    cache, mask, seen = prefilled(model)
    inputs = [decode_inputs(mask.clone(), seen, step) for step in range(2)]
    with torch.no_grad(), NoHostCopies():
        for call in inputs:
            model(**call, past_key_values=cache)


def test_storage_of_fixed_size_is_checked_and_counted():
    model = tiny_model()
    cache, _, _ = prefilled(model, max_length=64)
    assert cache.is_compileable
    assert cache.get_max_length() == 64
    heads, width = 2, 8
    assert cache.memory_bytes() == 5 * 2 * 4 * heads * 64 * width * 4
    with pytest.raises(ValueError, match="max_length"):
        SparseCache(model.config, max_length=0)
    with pytest.raises(ValueError, match="9 tokens do not fit a SparseCache of max_length=8"), torch.no_grad():
        model(input_ids=torch.tensor([words(9, 0)]), past_key_values=SparseCache(model.config, max_length=8))


def test_offloading_needs_a_gpu_and_a_growing_cache():
    model = tiny_model()
    with pytest.raises(ValueError, match="is not offloaded"):
        SparseCache(model.config, max_length=8, offload=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="this torch sees no GPU"):
            model.generate(**batch_of(*mixed_prompts(), "left"), **GREEDY, cache_implementation="offloaded")


def test_layers_that_left_and_came_back_are_the_same():
    """What the cache does with an offloaded layer around each update; the copies themselves need a GPU."""
    model = tiny_model()
    batch, token = batch_of(*mixed_prompts(), "left"), torch.tensor([[5]] * 4)
    with torch.no_grad():
        caches = [model(**batch, use_cache=True).past_key_values for _ in range(2)]
        for layer in caches[1].layers:
            layer.offload()
            layer.prefetch()
        one, two = (model(input_ids=token, past_key_values=cache).logits for cache in caches)
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="fixed size cannot be cropped"):
        prefilled(model)[0].crop(-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_generation_equals_resident():
    model = tiny_model().cuda()
    batch = {name: tensor.cuda() for name, tensor in batch_of(*mixed_prompts(), "left").items()}
    resident = model.generate(**batch, **GREEDY)
    assert torch.equal(resident, model.generate(**batch, **GREEDY, cache_implementation="offloaded"))
