"""Keep rates over the course of training: schedules, and rates drawn for each step."""

from __future__ import annotations

import json

import pytest
import torch

from dynamic_llava import functional
from dynamic_llava.train import stage
from dynamic_llava.train.config import load_config
from dynamic_llava.train.schedules import draw_rate, keep_rate

from ..test_modeling import training_batch
from ..tiny import tiny_model
from .test_stage import ROOT, config_of, overrides, shapes  # noqa: F401  a fixture


def test_keep_rate_schedules():
    assert [keep_rate(p, 0.2) for p in (0.0, 0.5, 1.0)] == [0.2] * 3
    for schedule in ("linear", "cosine"):
        rates = [keep_rate(p / 10, 0.2, schedule, ramp=0.5) for p in range(11)]
        assert rates[0] == 1.0
        assert rates[5:] == pytest.approx([0.2] * 6)
        assert rates == sorted(rates, reverse=True)
    assert keep_rate(0.125, 0.2, "linear", 0.5) == pytest.approx(0.8)
    assert keep_rate(0.25, 0.2, "cosine", 0.5) == pytest.approx(0.6)


def test_drawn_rates_lie_in_their_range_and_repeat():
    rates = [draw_rate(0.1, 0.5, seed=3, step=step) for step in range(200)]
    assert rates == [draw_rate(0.1, 0.5, seed=3, step=step) for step in range(200)]
    assert 0.1 <= min(rates) < 0.15 < 0.45 < max(rates) <= 0.5
    assert rates != [draw_rate(0.1, 0.5, seed=4, step=step) for step in range(200)]


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_matched_logits_keep_the_rate_on_average_and_the_order(rate):
    generator = torch.Generator().manual_seed(0)
    logits = (
        torch.randn(3, 50, 2, generator=generator) * torch.tensor([0.1, 2.0, 30.0])[:, None, None]
    ).requires_grad_()
    valid = torch.arange(50) < torch.tensor([50, 20, 43])[:, None]
    matched = functional.match_keep_rate(logits, valid, rate)
    probability = matched.detach().softmax(-1)[..., 0]
    for row in range(3):
        assert float(probability[row, valid[row]].mean()) == pytest.approx(rate, abs=1e-3)
    shift = (matched - logits).detach()[..., 0]
    assert torch.allclose(shift, shift[:, :1].expand_as(shift), atol=1e-4)
    matched[..., 0].sum().backward()
    assert torch.equal(logits.grad[..., 0], torch.ones(3, 50))


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_elastic_training_keeps_what_the_call_asks_for(rate):
    """Untrained predictors keep any share; with `elastic` the draws keep the rate."""
    model, kept = tiny_model().train(), []
    for seed in range(30):
        torch.manual_seed(seed)
        output = model(**training_batch(), image_keep_rate=rate, elastic=True)
        kept.append(output.image_keep_mask[0][(training_batch()["input_ids"][0] == 99)].mean())
    assert float(torch.stack(kept).detach().mean()) == pytest.approx(rate, abs=0.08)


def test_a_run_with_drawn_rates(shapes, tmp_path):  # noqa: F811
    values = overrides(shapes, tmp_path / "run", image_keep_rate="[0.1, 0.5]", max_steps=3)
    config = load_config(ROOT / "configs" / "train" / "shapes.yaml", values)
    assert config.training.image_keep_rates == [0.1, 0.5]
    assert config.sparsity.image_keep_rate == pytest.approx(0.3)
    trainer = stage.train(config)
    assert trainer.current_rates()["elastic"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["image_keep_rate"] < 0.7 for line in lines if "lm_loss" in line)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_rate_schedule": "step"}, "keep_rate_schedule must be one of constant, linear, cosine, got 'step'"),
        ({"keep_rate_ramp": 0}, "keep_rate_ramp must be a number in"),
        ({"image_keep_rate": "[0.5, 0.1]"}, "the smaller first"),
        ({"image_keep_rate": "[0.5]"}, "one rate or two"),
        ({"image_keep_rate": "[0.1, 0.5]", "keep_rate_schedule": "linear"}, "are drawn"),
    ],
)
def test_bad_rates(shapes, tmp_path, values, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        config_of(shapes, tmp_path, **values)
