"""Checkpoints: round trips bit for bit, stock LLaVA folders, Auto classes, and nothing re-initialised in silence."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, SparsityConfig
from dynamic_llava.sparsity_config import PREDICTOR_NAMES, check_keep_rate

from .tiny import batch_of, mixed_prompts, stock_model, tiny_model


@pytest.fixture
def saved(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "ours")
    return model, tmp_path / "ours"


def test_round_trip_is_bit_identical(saved):
    model, folder = saved
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(loaded) is DynamicLlavaForConditionalGeneration
    assert loaded.config.sparsity == model.config.sparsity
    assert AutoConfig.from_pretrained(folder).sparsity == model.config.sparsity
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key


def old_names(key: str) -> str:
    """Key of a current LLaVA parameter in the hub's older checkpoints."""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ):
        if key.startswith(new):
            return old + key.removeprefix(new)
    return key


@pytest.mark.parametrize("layout", ["current", "old"])
def test_stock_llava_loads_with_new_predictors_said_once(tmp_path, layout, caplog):
    stock = stock_model(tiny_model())
    stock.save_pretrained(tmp_path)
    if layout == "old":
        state = {old_names(key): value.clone() for key, value in stock.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    logging.getLogger("dynamic_llava").propagate = True
    with caplog.at_level(logging.WARNING):
        model = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path, sparsity={"predictor_dim": 32})
    messages = [record.message for record in caplog.records if "new ones were initialised" in record.message]
    assert len(messages) == 1
    assert "image_predictor and output_predictor" in messages[0]
    for key, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    # PyTorch's own initialisation, not the decoder's normal(0, initializer_range).
    weight = model.model.language_model.output_predictor.down[1].weight
    assert weight.abs().max() <= 1 / weight.shape[1] ** 0.5


def test_a_missing_weight_is_an_error(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    state = load_file(file)
    lost = next(key for key in state if "layers.3.mlp.up_proj" in key)
    state.pop(lost)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing .*layers\.3\.mlp\.up_proj"):
        DynamicLlavaForConditionalGeneration.from_pretrained(folder)


def test_an_unknown_weight_is_an_error(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    state = load_file(file)
    state["model.language_model.layers.9.extra"] = torch.zeros(1)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unknown .*layers\.9\.extra"):
        DynamicLlavaForConditionalGeneration.from_pretrained(folder)


def test_a_cut_off_file_is_an_error(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged or cut off"):
        DynamicLlavaForConditionalGeneration.from_pretrained(folder)


def test_a_folder_without_weights_is_an_error(saved):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
        DynamicLlavaForConditionalGeneration.from_pretrained(folder)


def test_unknown_sparsity_key_in_config_json(saved):
    _, folder = saved
    values = json.loads((folder / "config.json").read_text())
    values["sparsity"]["image_keep_ratio"] = 0.3
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"'image_keep_ratio'. Did you mean image_keep_rate"):
        DynamicLlavaForConditionalGeneration.from_pretrained(folder)


def test_numbers_of_other_types_are_taken():
    sparsity = SparsityConfig(
        image_keep_rate=np.float32(0.25),
        output_keep_rate=np.float64(0.5),
        budget_weight=np.int64(3),
        sparse_layer=np.int32(2),
        pruned_probe_rate=0,
    )
    assert json.loads(json.dumps(asdict(sparsity)))["image_keep_rate"] == 0.25
    assert type(sparsity.sparse_layer) is int
    assert check_keep_rate("image_keep_rate", np.float16(0.5)) == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, "2", None, True, [1]], ids=repr)
@pytest.mark.parametrize("key", [field.name for field in fields(SparsityConfig) if field.type in ("int", "float")])
def test_every_number_of_the_configuration_is_checked(key, value):
    with pytest.raises(ValueError, match=key):
        SparsityConfig(**{key: value})


@pytest.mark.parametrize("value", ["False", 1, None], ids=repr)
@pytest.mark.parametrize("key", PREDICTOR_NAMES)
def test_a_switch_is_true_or_false(key, value):
    with pytest.raises(ValueError, match=f"{key} must be true or false"):
        SparsityConfig(**{key: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_keep_rate": 0}, r"image_keep_rate .* \(0, 1\], got 0"),
        ({"output_keep_rate": 1.01}, r"output_keep_rate .* got 1.01"),
        ({"image_keep_rate": True}, "got True"),
        ({"image_selection": "best"}, "topk, threshold, diverse, got 'best'"),
        ({"gate_estimator": "soft"}, "gate_estimator must be one of bounded, exact, got 'soft'"),
        ({"predictor_dim": 60}, "multiple of 8"),
        ({"sparse_layer": 0}, "sparse_layer must be a whole number, at least 1"),
        ({"budget_weight": -1}, "budget_weight must be a number, at least 0, got -1"),
    ],
)
def test_bad_sparsity_values(values, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**values)


def test_sparse_layer_outside_the_decoder():
    with pytest.raises(ValueError, match="outside the decoder of 32 layers; use 1 to 31"):
        DynamicLlavaConfig(sparsity={"sparse_layer": 32})


def test_a_decoder_that_is_not_llama():
    with pytest.raises(ValueError, match="has sparse decoders of llama"):
        DynamicLlavaConfig(text_config={"model_type": "gemma"})


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_loading_spares_the_predictors(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = tiny_model(width=64).to(torch.bfloat16)  # 4-bit blocks hold 64 weights
    model.save_pretrained(tmp_path)
    settings = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16} if bits == 4 else {"load_in_8bit": True}
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16
    )
    decoder = loaded.model.language_model
    assert type(decoder.layers[3].mlp.up_proj).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    for predictor in ("image_predictor", "output_predictor"):
        for name, value in getattr(decoder, predictor).named_parameters():
            assert value.dtype == torch.bfloat16, name
            assert torch.equal(value, model.get_parameter(f"model.language_model.{predictor}.{name}")), name
    batch = batch_of(*mixed_prompts(), "left")
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert loaded.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[0] == 4
