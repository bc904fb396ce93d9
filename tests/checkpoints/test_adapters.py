"""LoRA folders with trained predictors: load, merge, save."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import load_adapter, load_checkpoint, save_adapter
from dynamic_llava.checkpoints.__main__ import main

from ..tiny import tiny_model
from .test_published import inputs_of
from .writing import model_of, write_published

LORA = LoraConfig(
    r=4,
    target_modules=r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    modules_to_save=["image_predictor", "output_predictor"],
)


def trained_adapter(model):
    """LoRA with weights as after training: nothing at its initial value."""
    adapted = get_peft_model(model, LORA)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted.eval()


@pytest.mark.parametrize("layout", ["ours", "published"])
def test_merged_equals_unmerged_and_survives_every_way(tmp_path, layout):
    model = tiny_model() if layout == "ours" else model_of()
    if layout == "ours":
        model.save_pretrained(tmp_path / "base")
    else:
        write_published(model, tmp_path / "base")
    inputs = inputs_of(model)
    with torch.no_grad():
        untouched = model(**inputs).logits
    model.name_or_path = str(tmp_path / "base")
    adapted = trained_adapter(model)
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    with torch.no_grad():
        expected = adapted(**inputs)
    assert not torch.allclose(expected.logits, untouched)
    save_adapter(adapted, tmp_path / "lora")

    def check(found):
        with torch.no_grad():
            output = found(**inputs)
        torch.testing.assert_close(output.logits, expected.logits, atol=2e-5, rtol=1e-4)
        assert torch.equal(output.image_keep_mask, expected.image_keep_mask)

    check(load_adapter(tmp_path / "lora"))
    check(load_adapter(tmp_path / "lora", merge=True))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="pass base="):
        load_adapter(tmp_path / "lora")
    check(load_adapter(tmp_path / "lora", base=tmp_path / "moved", merge=True))
    (tmp_path / "moved").rename(tmp_path / "base")
    merged = load_checkpoint(tmp_path / "lora")
    assert type(merged) is DynamicLlavaForConditionalGeneration
    check(merged)
    assert main(["merge", str(tmp_path / "lora"), str(tmp_path / "merged")]) == 0
    check(DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged"))


def test_the_sparsity_is_that_of_training(tmp_path):
    """The base says nothing of what the adapter was trained with."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = DynamicLlavaForConditionalGeneration.from_pretrained(
        tmp_path / "base", sparsity={"image_keep_rate": 0.7, "sparse_layer": 3}
    )
    save_adapter(trained_adapter(model), tmp_path / "lora")
    loaded = load_checkpoint(tmp_path / "lora")
    assert (loaded.config.sparsity.image_keep_rate, loaded.config.sparsity.sparse_layer) == (0.7, 3)
