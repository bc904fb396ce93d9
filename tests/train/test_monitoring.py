"""What a run logs and draws beside its losses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from dynamic_llava.data.dataset import ConversationDataset
from dynamic_llava.data.mixture import MixtureDataset
from dynamic_llava.data.pictures import StoredPicture
from dynamic_llava.train import stage
from dynamic_llava.train.monitoring import Meter, examples_of, group_norms

from .test_stage import ROOT, config_of, shapes  # noqa: F401  a fixture


def test_a_run_says_how_it_goes(shapes, tmp_path):  # noqa: F811
    values = {
        "eval_file": shapes / "val_describe.json",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "picture_steps": 2,
        "peak_tflops": 0.1,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1e-3,
    }
    stage.train(config_of(shapes, tmp_path / "run", **values))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lm_loss" in line]
    assert len(steps) == 2
    for line in steps:
        both = math.hypot(line["grad_norm_decoder"], line["grad_norm_predictors"])
        assert both == pytest.approx(line["grad_norm"], rel=1e-4)
        assert line["tokens_per_second"] > 0
        assert 0 < line["mfu"] < 10
        assert line["memory_gb"] > 0.1
    held_out = [line for line in lines if "eval_loss" in line]
    assert len(held_out) == 2
    assert all(line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"])) for line in held_out)
    assert [path.name for path in (tmp_path / "run" / "pictures").iterdir()] == ["step-000002.png"]
    with Image.open(tmp_path / "run" / "pictures" / "step-000002.png") as sheet:
        assert min(sheet.size) > 200


def test_drawing_and_scoring_change_nothing(shapes, tmp_path):  # noqa: F811
    watched = {"eval_file": shapes / "val_describe.json", "eval_strategy": "steps", "eval_steps": 1, "picture_steps": 1}
    one = stage.train(config_of(shapes, tmp_path / "one")).model.state_dict()
    two = stage.train(config_of(shapes, tmp_path / "two", **watched)).model.state_dict()
    assert all(torch.equal(value, two[key]) for key, value in one.items())


class Kept(StoredPicture):
    """A picture that lies in a table."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name, self.content = name, content

    def read(self) -> bytes:
        return self.content


def test_examples_are_of_any_form_of_data(shapes):  # noqa: F811
    folder = shapes / "images" / "val"
    content = sorted(folder.iterdir())[0].read_bytes()
    processor = AutoProcessor.from_pretrained(ROOT / "assets" / "tiny-llava")

    def part(*pictures):
        talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
        plain = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]
        samples = [{"id": "t", "conversations": plain}]
        samples += [{"id": str(n), "image": p, "conversations": talk} for n, p in enumerate(pictures)]
        return ConversationDataset(samples, "rows", folder, processor)

    broken = Kept("broken", b"no picture")
    found = examples_of(MixtureDataset([part(), part(broken, Kept("row 1", content))], [1.0, 1.0]))
    assert [(example.question, example.answer) for example in found] == [("<image>\nWhat?", "Red.")]
    assert found[0].picture.size == (128, 128)
    assert len(examples_of(part(*[Kept("again", content)] * 6))) == 4
    with pytest.raises(ValueError, match="no sample with one picture to draw; leave out picture_steps"):
        examples_of(part(broken))


def test_norms_by_group():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    found = group_norms(torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0))
    assert found == {"grad_norm_decoder": 5.0, "grad_norm_predictors": 2.0}
    weights[0].grad = None
    assert group_norms(torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0)).keys() == {
        "grad_norm_predictors"
    }


def test_utilisation(monkeypatch):
    clock = iter([0.0, 2.0, 2.0])
    monkeypatch.setattr("dynamic_llava.train.monitoring.time.perf_counter", lambda: next(clock))
    meter = Meter(weights=10**9, peak_tflops=60.0, device=torch.device("cpu"))
    found = meter.read(tokens=40_000, ranks=2)
    assert found["tokens_per_second"] == 20_000
    assert found["mfu"] == pytest.approx(6 * 1e9 * 20_000 / 120e12)
    assert 0.1 < found["memory_gb"] < 100


def test_bad_settings(shapes, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="picture_steps must be a whole number of at least 1, got 0"):
        config_of(shapes, tmp_path, picture_steps=0)
