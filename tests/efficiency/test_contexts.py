"""Filled caches are what decoding would have left."""

from __future__ import annotations

import pytest
import torch

from dynamic_llava.efficiency.filled_cache import Context, kept_by_row
from dynamic_llava.efficiency.model_pair import build_pair
from dynamic_llava.efficiency.shapes import build_config

CPU = torch.device("cpu")
LENGTH = 90


def pair(output_keep_rate: float):
    torch.manual_seed(0)
    config = build_config("tiny")
    config.sparsity.output_keep_rate = output_keep_rate
    return build_pair(config, torch.float32, CPU, "sdpa")


def pointers(model) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_pair_shares_its_weights():
    both = pair(0.5)
    dense, ours = pointers(both.dense), pointers(both.ours)
    assert dense.items() <= ours.items()
    assert all("_predictor." in name for name in set(ours) - set(dense))


def test_calibrated_predictor_keeps_about_the_rate():
    context = Context(pair(0.3).ours, 12, batch=16)
    for _ in range(20):
        context.step()
    assert float(context.output_kept().float().mean()) / 20 == pytest.approx(0.3, abs=0.12)


@pytest.mark.parametrize("side", ["dense", "ours"])
def test_filling_equals_decoding(side):
    """At rate 1 nothing is left to chance, so that lengths and allocated bytes must be the same."""
    model = getattr(pair(1.0), side)
    if side == "ours":
        # Calibration on a sample cannot promise the last token.
        model.model.language_model.output_predictor.head[-1].bias[0] += 100
    filled, decoded = Context(model, 12, batch=2), Context(model, 12, batch=2)
    filled.fill_to(LENGTH)
    for _ in range(LENGTH):
        decoded.step()
    assert filled.kv_bytes() == decoded.kv_bytes()
    assert filled.cache.get_seq_length() == decoded.cache.get_seq_length()
    if side == "ours":
        assert filled.cache.kept_lengths.tolist() == decoded.cache.kept_lengths.tolist()
    filled.step()
    assert filled.cache.get_seq_length() == filled.prompt_length + LENGTH + 1


def test_rows_keep_what_their_distribution_says():
    context = Context(pair(0.5).ours, 12, batch=4)
    context.fill_to(64)
    context.step()
    context.fill_to(400)
    expected = kept_by_row(400, 0.5, 4)
    assert context.output_kept().tolist() == expected.tolist()
    assert expected.float().mean() == pytest.approx(200, abs=1)
    assert context.cache.get_seq_length() == context.prompt_length + 400
