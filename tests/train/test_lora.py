"""A LoRA stage: what learns, what is saved, and that it resumes and loads."""

from __future__ import annotations

import json

import pytest
import torch

from dynamic_llava.checkpoints import load_adapter, load_checkpoint
from dynamic_llava.errors import ExitStatus
from dynamic_llava.train import stage
from dynamic_llava.train.__main__ import main

from .test_resume import CONFIG, STEPS, stop_in_step
from .test_stage import config_of, overrides, shapes  # noqa: F401  a fixture

LORA = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def arguments(shapes, output, **values):  # noqa: F811
    return ["--config", CONFIG, *overrides(shapes, output, **{**LORA, **STEPS, **values})]


def with_quantization(test):
    """Run `test` on a plain base and on quantized ones."""
    return pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])(test)


def lora(quantize: str | None) -> dict:
    if quantize is None:
        return LORA
    pytest.importorskip("bitsandbytes")
    return {**LORA, "quantize": quantize}


@with_quantization
def test_adapters_and_predictors_learn_and_nothing_else(shapes, tmp_path, quantize):  # noqa: F811
    run = tmp_path / "run"
    done = stage.train(config_of(shapes, run, **lora(quantize)))
    kinds = {type(module.base_layer).__name__ for module in done.model.modules() if hasattr(module, "base_layer")}
    assert kinds == {{None: "Linear", "4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantize]}
    learning = {name for name, p in done.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "predictor.modules_to_save" in name for name in learning)
    assert not any("vision_tower" in name or "projector" in name for name in learning)
    layers = done.model.config.text_config.num_hidden_layers
    assert sum("lora_A" in name for name in learning) == 7 * layers
    rates = {group["lr"] for group in parameter_rates(done)}
    assert len(rates) == 2
    assert (run / "adapter_model.safetensors").is_file()
    assert json.loads((run / "config.json").read_text())["sparsity"]["image_keep_rate"] == 0.2

    trained = {k: v for k, v in done.model.state_dict().items() if "predictor.modules_to_save" in k}
    loaded = load_adapter(run)
    for key, value in trained.items():
        assert torch.equal(loaded.state_dict()[key], value), key
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        one, two = loaded(input_ids=ids).logits, load_checkpoint(run)(input_ids=ids).logits
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def parameter_rates(done):
    return [{"lr": group["initial_lr"]} for group in done.optimizer.param_groups]


@with_quantization
def test_a_lora_run_goes_on_bit_for_bit(shapes, tmp_path, monkeypatch, quantize):  # noqa: F811
    assert main(arguments(shapes, tmp_path / "straight", **lora(quantize))) == 0
    stop_in_step(3, monkeypatch)
    assert main(arguments(shapes, tmp_path / "run", **lora(quantize))) == ExitStatus.INTERRUPTED
    monkeypatch.undo()
    assert main(arguments(shapes, tmp_path / "run", **lora(quantize))) == 0
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("straight", "run"))
    assert one == two


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_r": -1}, "lora_r must be a whole number of at least 0"),
        ({"lora_r": 4, "train_projector": "true"}, "contradictory"),
        ({"lora_r": 4, "train_decoder": "false"}, "contradictory"),
        ({"quantize": "4bit"}, "set lora_r to train adapters"),
        ({"quantize": "2bit", "lora_r": 4}, "quantize must be one of 4bit, 8bit, got '2bit'"),
        ({"quantize": "8bit", "lora_r": 4, "deepspeed": "configs/deepspeed/zero3.json"}, "ZeRO-3 do not go together"),
    ],
)
def test_contradictory_settings(shapes, tmp_path, values, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        config_of(shapes, tmp_path, **values)


def test_a_deepspeed_file_that_sets_what_the_configuration_sets(shapes, tmp_path):  # noqa: F811
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}))
    with pytest.raises(ValueError, match="sets optimizer, which learning_rate"):
        config_of(shapes, tmp_path, deepspeed=file)
