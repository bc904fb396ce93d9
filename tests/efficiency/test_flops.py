"""The FLOP counts against the paper's figures and against torch's own counter."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from dynamic_llava import DynamicLlavaForConditionalGeneration, SparseCache
from dynamic_llava.efficiency import flops
from dynamic_llava.efficiency.shapes import build_config, stock_config

TEXT = 11


class NoArithmetic(TorchDispatchMode):
    """Products give zeros of the right shape, so that a 7B runs with real shapes and untouched weights."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in PRODUCTS:
            on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
            return torch.zeros_like(func(*on_meta, **(kwargs or {})), device="cpu")
        return func(*args, **(kwargs or {}))


aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}


def counted(call) -> int:
    """FLOPs of `call()` by torch's counter; attention as plain products, since the CPU kernel is not counted."""
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math, FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def prompt(config, batch: int = 1, images: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, config.image_token_id, (batch, TEXT + images * flops.image_tokens_per_image(config)))
    ids[:, 3 : 3 + images * flops.image_tokens_per_image(config)] = config.image_token_id
    size = config.vision_config.image_size
    return {"input_ids": ids, "pixel_values": torch.zeros(batch * images, 3, size, size)}


@pytest.fixture(params=[{}, {"kv_heads": 2, "layers": 5, "sparse_layer": 3}], ids=["plain", "grouped"])
def config(request):
    return build_config("tiny", request.param)


def stock(config) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration(stock_config(config)).eval()


def ours(config) -> DynamicLlavaForConditionalGeneration:
    torch.manual_seed(0)
    return DynamicLlavaForConditionalGeneration(config).eval()


def test_paper_figures():
    trillions = [
        flops.paper_flops(hidden, layers, 576, flops.kept_image_tokens(576, rate), sparse_layer=2) / 1e12
        for hidden, layers in ((4096, 32), (5120, 40))
        for rate in (1.0, 0.2)
    ]
    assert [round(value, 1) for value in trillions] == [10.1, 2.5, 19.6, 4.7]


@pytest.mark.parametrize("images", [1, 2])
def test_dense_prefill_equals_counter(config, images):
    model = stock(config)
    real = counted(lambda: model(**prompt(config, 2, images), logits_to_keep=1))
    assert flops.prefill_flops(config, TEXT, num_images=images, batch=2) == pytest.approx(real, rel=1e-3)


def test_dense_steps_equal_counter(config):
    model = stock(config)
    inputs = prompt(config)
    cache = model(**inputs, use_cache=True).past_key_values
    length = inputs["input_ids"].shape[1]
    real = counted(lambda: model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True))
    assert flops.decode_step_flops(config, length) == pytest.approx(real, rel=1e-3)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.full((1, 7), 5)], dim=1)
    real = counted(lambda: model(**inputs, use_cache=False, logits_to_keep=1))
    expected = flops.decode_step_flops_no_cache(config, TEXT, 7) + flops.vision_flops(config)
    assert expected == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("selection", ["topk", "diverse"])
@pytest.mark.parametrize("rate", [0.2, 0.55, 1.0])
def test_our_prefill_equals_counter(config, rate, selection):
    config = copy.deepcopy(config)
    config.sparsity.image_selection = selection
    model = ours(config)
    real = counted(lambda: model(**prompt(config, 2, 2), logits_to_keep=1, image_keep_rate=rate))
    assert flops.prefill_flops(config, TEXT, rate, num_images=2, batch=2) == pytest.approx(real, rel=1e-3)


def test_our_steps_equal_counter(config):
    model, cache = ours(config), SparseCache(config)
    inputs = prompt(config)
    length = inputs["input_ids"].shape[1]
    model(**inputs, past_key_values=cache, use_cache=True)
    kept = int(cache.kept_lengths)
    assert (length, kept) == flops.context_lengths(config, TEXT, config.sparsity.image_keep_rate)
    real = counted(lambda: model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True))
    assert flops.decode_step_flops(config, length, kept) == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_our_step_without_cache_equals_counter(config, rate):
    model = ours(config)
    inputs = prompt(config)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.randint(0, 100, (1, 9))], dim=1)
    head = model.model.language_model.output_predictor.head[-1]
    logits = model(**inputs, num_generated=9, use_cache=False).output_keep_logits[0, :-1]
    margin = (logits[:, 0] - logits[:, 1]).sort(descending=True).values
    # Exactly this fraction of the eight tokens in front of the last is kept.
    threshold = margin[round(8 * rate) - 1] - 1e-6
    with torch.no_grad():
        head.bias[0] -= threshold
    real = counted(lambda: model(**inputs, num_generated=9, use_cache=False, logits_to_keep=1))
    expected = flops.decode_step_flops_no_cache(config, TEXT, 9, config.sparsity.image_keep_rate, rate)
    assert expected + flops.vision_flops(config) == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("build", [stock, ours])
def test_generation_equals_generate(config, build, use_cache):
    if not use_cache and Version(transformers.__version__) < Version("5.19"):
        pytest.skip("generate of this transformers runs the tower again for every token without a cache")
    model, inputs, length = build(config), prompt(config), 6
    rates = (None, None)
    if build is ours:
        # The random predictor keeps every token, so that the rate is known.
        model.model.language_model.output_predictor.head[-1].bias.data[0] += 100
        rates = (config.sparsity.image_keep_rate, 1.0)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"min_new_tokens": length, "max_new_tokens": length, "do_sample": False, "use_cache": use_cache}
    real = counted(lambda: model.generate(**inputs, **options))
    assert flops.generation_flops(config, TEXT, length, *rates, use_cache=use_cache) == pytest.approx(real, rel=1e-3)


def untouched(model_class, config):
    """A model of real size: memory is reserved, but only norms, biases and buffers are ever written."""
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    model.to_empty(device="cpu")
    for tensor in [*(p.data for p in model.parameters() if p.dim() == 1), *model.buffers()]:
        tensor.zero_()
    return model.eval()


def test_7b_shapes_equal_counter():
    config = build_config("7b")
    length, kept = flops.context_lengths(config, TEXT, 0.2)
    inputs = prompt(config)
    token = torch.tensor([[5]])
    with NoArithmetic():
        model = untouched(LlavaForConditionalGeneration, stock_config(config))
        outputs = []
        dense = counted(lambda: outputs.append(model(**inputs, use_cache=True, logits_to_keep=1)))
        cache = outputs.pop().past_key_values
        dense_step = counted(lambda: model(input_ids=token, past_key_values=cache, use_cache=True))
        del model, cache
        model, cache = untouched(DynamicLlavaForConditionalGeneration, config), SparseCache(config)
        sparse = counted(lambda: model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1))
        sparse_step = counted(lambda: model(input_ids=token, past_key_values=cache, use_cache=True))
    assert flops.prefill_flops(config, TEXT) == pytest.approx(dense, rel=1e-3)
    assert flops.decode_step_flops(config, length) == pytest.approx(dense_step, rel=1e-3)
    assert flops.prefill_flops(config, TEXT, 0.2) == pytest.approx(sparse, rel=1e-3)
    assert flops.decode_step_flops(config, length, kept) == pytest.approx(sparse_step, rel=1e-3)
