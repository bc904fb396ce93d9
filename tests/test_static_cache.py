"""A cache of fixed size: same tokens, one graph for all decode steps, nothing copied to the host within a step."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from dynamic_llava import SparseCache

from .tiny import batch_of, image_run, mixed_prompts, pictures, tiny_model, words

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
    # Of 40 tokens the longest row keeps 20 at most.
    slots = cache.layers[-1].keys.shape[2]
    assert slots == 48
    assert cache.memory_bytes() == (2 * 64 + 3 * slots) * 2 * 4 * heads * width * 4
    with pytest.raises(ValueError, match="max_length"):
        SparseCache(model.config, max_length=0)
    with pytest.raises(ValueError, match="9 tokens do not fit a SparseCache of max_length=8"), torch.no_grad():
        model(input_ids=torch.tensor([words(9, 0)]), past_key_values=SparseCache(model.config, max_length=8))


@pytest.mark.parametrize("rows", [[0], [2], [3, 0], [0, 1, 2, 3]])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_slots_suffice_where_all_that_follows_is_kept(rows, attention):
    """To the last token that fits, over steps and turns; then the cache is full, and says so."""
    model = tiny_model(attention=attention)
    prompts, images = mixed_prompts()
    batch = batch_of([prompts[row] for row in rows], [images[row] for row in rows], "left")
    seen, room = batch["input_ids"].shape[1], 31
    kept = {"output_sparsity": False}
    caches = SparseCache(model.config, max_length=seen + room), SparseCache(model.config)
    fed, turns = 0, (1, 1, 9, 1, 18, 1)
    with torch.no_grad():
        mask = batch.pop("attention_mask")
        for number in (0, *turns):
            if number:
                batch = {"input_ids": torch.tensor([words(number, 3 * fed + row) for row in rows])}
                mask, fed = torch.cat([mask, torch.ones(len(rows), number, dtype=torch.long)], dim=1), fed + number
            fixed = torch.nn.functional.pad(mask, (0, seen + room - mask.shape[1]))
            one, two = (
                model(**batch, attention_mask=shown, past_key_values=cache, **kept).logits
                for cache, shown in zip(caches, (fixed, mask), strict=True)
            )
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
        assert fed == room
        assert torch.equal(caches[0].kept_lengths, caches[1].kept_lengths)
        with pytest.raises(ValueError, match="do not fit a SparseCache"):
            model(torch.tensor([[5]] * len(rows)), past_key_values=caches[0])
    most = int(caches[1].kept_lengths.max())
    assert most <= caches[0].layers[-1].keys.shape[2] <= most + 16


def test_a_picture_in_a_later_turn_of_a_fixed_size():
    model = tiny_model()
    texts = [[1, *words(12, 5)], [1, *words(9, 6)]]
    turns = [(texts, [None, None]), ([[*image_run(), *words(4, 1)]] * 2, [pictures(1, 1), pictures(1, 2)])]
    logits = {}
    for length in (None, 60):
        cache, mask = SparseCache(model.config, max_length=length), torch.zeros(2, 0, dtype=torch.long)
        for rows, images in turns:
            batch = batch_of(rows, images, "left")
            mask = torch.cat([mask, batch.pop("attention_mask")], dim=1)
            shown = mask if length is None else torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
            with torch.no_grad():
                logits[length] = model(**batch, attention_mask=shown, past_key_values=cache).logits
    torch.testing.assert_close(logits[60], logits[None], atol=1e-5, rtol=1e-4)


def test_bytes_of_a_fixed_size_are_far_below_dense():
    """One picture at the rates of the paper, 1,024 tokens, 32 layers: .6 of dense and less."""
    model = tiny_model(image_keep_rate=0.2)
    prompt = {"input_ids": torch.tensor([[1, *image_run(4), *words(7, 1)]]), "pixel_values": pictures(4)}
    seen, room = prompt["input_ids"].shape[1], 40
    cache = SparseCache(model.config, max_length=seen + room)
    with torch.no_grad():
        model(**prompt, past_key_values=cache)
    dense, sparse = (cache.layers[n].keys.shape[2] for n in (0, -1))
    assert (2 * dense + 30 * sparse) / (32 * dense) < 0.65


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
