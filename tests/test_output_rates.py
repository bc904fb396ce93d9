"""Output keep rates by a table of offsets: per call, in every way of decoding, and what cannot be."""

from __future__ import annotations

import pytest
import torch

from dynamic_llava import DynamicLlavaConfig, SparsityConfig
from dynamic_llava.offsets import offset_at
from dynamic_llava.rules import Evidence, Learned

from .naive import naive_generate
from .test_static_cache import NoHostCopies, decode_inputs, prefilled
from .tiny import batch_of, mixed_prompts, pad_rows, tiny_model

GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
TABLE = {"0.2": -1.2, "0.4": -0.3, "0.8": 1.9}


@pytest.fixture(scope="module")
def model():
    return tiny_model(output_offsets=TABLE)


@pytest.fixture
def batch():
    return batch_of(*mixed_prompts(), "left")


@pytest.mark.parametrize(
    ("rate", "offset"), [(0.2, -1.2), (0.3, -0.75), (0.4, -0.3), (0.5, 0.25), (0.8, 1.9), (0.1, None), (0.9, None)]
)
def test_between_two_rates_in_proportion_and_none_outside(rate, offset):
    assert offset_at(TABLE, rate) == (offset if offset is None else pytest.approx(offset))
    assert offset_at({}, rate) is None


@pytest.mark.parametrize("rate", [0.2, 0.3, 0.5])
def test_decoding_with_an_offset_is_the_definition(model, batch, rate):
    """Cached, without cache, on a cache of fixed size, and each row alone, token by token."""
    arguments = {**GREEDY, "output_keep_rate": rate}
    together = model.generate(**batch, **arguments)
    assert torch.equal(together, model.generate(**batch, **arguments, use_cache=False))
    assert torch.equal(together, model.generate(**batch, **arguments, cache_implementation="static"))
    assert torch.equal(together, model.generate(**batch, **arguments, output_rate_control="offset"))
    rows, images = mixed_prompts()
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        alone = model.generate(**batch_of([row], [image], "left"), **arguments)
        assert torch.equal(together[number, -24:], alone[0, -24:])
        offset = offset_at(TABLE, rate)
        tokens, _ = naive_generate(model, row, image, 24, output_keep_rate=rate, output_offset=offset)
        assert together[number, -24:].tolist() == tokens


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_scoring_decides_as_cached_decoding(model, batch, rate):
    output = model.generate(**batch, **GREEDY, output_keep_rate=rate, return_sparsity=True)
    rows, images = mixed_prompts()
    answers = output.sequences[:, -24:].tolist()
    labels, _ = pad_rows([[-100] * len(r) + a for r, a in zip(rows, answers, strict=True)], "left", fill=-100)
    full = [row + answer for row, answer in zip(rows, answers, strict=True)]
    with torch.no_grad():
        scored = model(**batch_of(full, images, "left"), labels=labels, output_keep_rate=rate)
    kept = scored.output_keep_mask[:, -24:-1].sum(dim=-1)
    assert kept.tolist() == output.sparsity.output_tokens_kept.tolist()
    margin = scored.output_keep_logits[..., 0] - scored.output_keep_logits[..., 1]
    assert torch.equal(scored.output_keep_mask[:, -24:], margin[:, :24] + offset_at(TABLE, rate) > 0)


@pytest.mark.parametrize(("rate", "arguments"), [(0.3, {"output_rate_control": "steered"}), (0.1, {}), (0.9, {})])
def test_steering_is_what_it_was(model, batch, rate, arguments):
    """Where it is asked for, and at rates that the table does not cover."""
    found = model.generate(**batch, **GREEDY, output_keep_rate=rate, **arguments)
    plain = tiny_model().generate(**batch, **GREEDY, output_keep_rate=rate)
    assert torch.equal(found, plain)


def test_a_table_changes_no_call_that_asks_for_no_rate(model, batch):
    assert torch.equal(model.generate(**batch, **GREEDY), tiny_model().generate(**batch, **GREEDY))
    all_kept = model.generate(**batch, **GREEDY, output_keep_rate=1.0, return_sparsity=True).sparsity
    assert torch.equal(all_kept.output_tokens_kept, all_kept.output_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_do_not_round_the_offset(dtype):
    """Logits of 16 bits are taken as they are; an offset below their spacing still tells equal ones apart."""
    logits = torch.tensor([[[8.0, 8.0], [8.0, 8.0625], [-3.0, -3.0]]], dtype=dtype)
    valid = torch.ones(1, 3, dtype=torch.bool)
    for offset in (1e-4, -1e-4, 0.07):
        evidence = Evidence(torch.zeros(1, 3, 4), valid, rate=0.5, driven=True, offset=offset, keep_logits=logits)
        keep, state = Learned().keep(evidence, torch.zeros(1, 3))
        assert keep[0].tolist() == [a + offset > b for a, b in logits[0].tolist()]
        assert not state.any()


def test_a_compiled_step_is_one_graph_and_copies_nothing(model):
    from torch._dynamo.testing import CompileCounter

    eager_cache, eager_mask, seen = prefilled(model)
    cache, mask, _ = prefilled(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.forward, backend=counter, fullgraph=True)
    with torch.no_grad():
        for step in range(4):
            with NoHostCopies():
                expected = model(
                    **decode_inputs(eager_mask, seen, step), past_key_values=eager_cache, output_keep_rate=0.3
                )
            found = compiled(**decode_inputs(mask, seen, step), past_key_values=cache, output_keep_rate=0.3)
            assert torch.equal(found.output_keep_mask, expected.output_keep_mask)
    assert counter.frame_count == 1


def test_the_table_is_saved_and_told_by_the_checkpoint(tmp_path):
    model = tiny_model(output_offsets={0.8: 1.9, 0.2: -1.2})
    model.save_pretrained(tmp_path)
    for sparsity in (None, {"image_keep_rate": 0.3}, SparsityConfig(image_keep_rate=0.3)):
        config = DynamicLlavaConfig.from_pretrained(tmp_path, sparsity=sparsity)
        assert config.sparsity.output_offsets == {"0.2": -1.2, "0.8": 1.9}
    assert list(config.sparsity.output_offsets) == ["0.2", "0.8"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.2, 0.3], r"must map rates to offsets, .* got \[0.2, 0.3\]"),
        ({"half": 0.1}, "got 'half': 0.1"),
        ({"1.0": 0.1}, "got '1.0': 0.1"),
        ({"nan": 0.1}, "got 'nan': 0.1"),
        ({"0.5": float("nan")}, "got '0.5': nan"),
        ({"0.5": "0.1"}, "got '0.5': '0.1'"),
        ({"0.2": 1.0, "0.5": 0.5}, "must rise with the rate, got 1 at 0.2 and 0.5 at 0.5"),
        ({"0.5": 1.0, ".5": 1.0}, "must rise"),
    ],
)
def test_a_table_that_is_none_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(output_offsets=table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_rate_control": "by hand", "output_keep_rate": 0.3}, "one of offset, steered, got 'by hand'"),
        ({"output_rate_control": "offset"}, "output_keep_rate in inference; pass this too"),
        (
            {"output_rate_control": "steered", "output_keep_rate": 0.3, "output_selector": "random"},
            "no output_selector",
        ),
        ({"output_rate_control": "offset", "output_keep_rate": 0.9}, "offsets from 0.2 to 0.8, not for 0.9"),
    ],
)
def test_what_has_no_effect_or_no_offset_is_refused(model, batch, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, **GREEDY, **arguments)


def test_without_a_table_an_offset_is_refused_and_in_training_too(batch):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"no offsets\. Make them"):
        model.generate(**batch, **GREEDY, output_keep_rate=0.3, output_rate_control="offset")
    with pytest.raises(ValueError, match="in inference"):
        model.train()(**batch, labels=batch["input_ids"], output_keep_rate=0.3, output_rate_control="steered")
