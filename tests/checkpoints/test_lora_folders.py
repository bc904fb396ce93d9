"""LoRA folders, of peft and of LLaVA's own code: whole or refused, at every door."""

from __future__ import annotations

import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import load_adapter, load_checkpoint, load_published, save_adapter
from dynamic_llava.checkpoints.adapter_files import FULL_WEIGHTS
from dynamic_llava.checkpoints.adapters import check_resumed
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.checkpoints.inspect import inspect_checkpoint

from ..tiny import stock_model
from .doors import answers, change_json
from .test_adapters import trained_adapter
from .test_published import inputs_of
from .writing import model_of, write_llama, write_llava_lora, write_published, write_tower


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A dense LLaVA as base, and the LoRA folder of a Dynamic-LLaVA on it."""
    folder = tmp_path_factory.mktemp("lora")
    model = model_of()
    stock_model(model).save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    save_adapter(trained_adapter(model), folder / "lora")
    return folder


@pytest.fixture
def lora(written, tmp_path):
    return shutil.copytree(written / "lora", tmp_path / "lora")


def change_weights(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def renamed(old, new):
    return lambda state: {key.replace(old, new): value for key, value in state.items()}


def without(*parts):
    return lambda state: {key: value for key, value in state.items() if not any(part in key for part in parts)}


def spoiled(value, part="lora_B"):
    def change(state):
        key = next(key for key in state if part in key)
        state[key].view(-1)[0] = value
        return state

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("lora_"),
        without("lora_A"),
        without(".layers.3."),
        without("q_proj"),
        without("image_predictor"),
        without("output_predictor.head.4"),
        renamed("base_model.model.", ""),
        renamed("base_model.model.", "base_model.model.model."),
        renamed("base_model.", "module.base_model."),
        renamed("lora_A", "lora_a"),
        renamed("q_proj", "query"),
        lambda state: state | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)},
        lambda state: {key: value[:2].clone() if "lora_A" in key else value for key, value in state.items()},
        lambda state: {key: value.long() if "lora_A" in key else value for key, value in state.items()},
        spoiled(float("nan")),
        spoiled(float("inf"), "predictor"),
    ],
)
def test_weights_that_are_not_those_of_the_adapters(lora, tmp_path, change):
    change_weights(lora, change)
    for door, said in answers("lora", lora, tmp_path / "out").items():
        assert re.search(r"missing .*; unknown|does not fit its base|NaN or infinite|no floating point", said), door
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_from_whole_adapters_alone(written, lora):
    adapted = load_adapter(lora, written / "base")
    check_resumed(adapted, lora)
    for change in (without("lora_A"), without(".layers.3."), without("image_predictor"), spoiled(float("nan"))):
        shutil.copy(written / "lora" / "adapter_model.safetensors", lora)
        change_weights(lora, change)
        with pytest.raises(ValueError, match=r"missing|NaN"):
            check_resumed(adapted, lora)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", None),
        ("r", "four"),
        ("r", -4),
        ("target_modules", 3),
        ("target_modules", ["nothing"]),
        ("target_modules", "("),
        ("peft_type", "IA3"),
        ("peft_type", 3),
        ("megatron_config", {"a": 1}),
        ("base_model_name_or_path", None),
        ("base_model_name_or_path", 3),
        ("modules_to_save", 5),
        ("lora_alpha", "x"),
        ("task_type", "NOTHING"),
    ],
)
def test_settings_that_describe_no_adapter(lora, tmp_path, key, value):
    change_json(lora / "adapter_config.json", key, value=value)
    for door, said in answers("lora", lora, tmp_path / "out").items():
        assert said != "loaded" or (door, key) == ("inspect", "base_model_name_or_path"), door


@pytest.mark.parametrize("content", ["", "null", "[]", "{" * 100_000, "\x00"])
@pytest.mark.parametrize("name", ["adapter_config.json", "config.json"])
def test_damaged_files(lora, tmp_path, name, content):
    (lora / name).write_text(content)
    for said in answers("lora", lora, tmp_path / "out").values():
        assert name in said


def test_a_lora_that_is_its_own_base(lora, tmp_path):
    change_json(lora / "adapter_config.json", "base_model_name_or_path", value=str(lora))
    for door, said in answers("lora", lora, tmp_path / "out").items():
        assert "has itself as its base" in said or door == "inspect"


def test_what_the_adapter_brings_is_not_called_new(written, caplog):
    logging.getLogger("dynamic_llava").propagate = True
    with caplog.at_level(logging.WARNING):
        load_checkpoint(written / "lora")
    assert not [record.message for record in caplog.records if "initialised" in record.message]
    facts = inspect_checkpoint(written / "lora")
    assert facts["layout"] == "LoRA (peft)"
    assert facts["predictors"] == ["image_predictor", "output_predictor"]
    assert (facts["rank"], facts["base"]) == (4, str(written / "base"))


def test_an_adapter_on_an_adapter(written, tmp_path):
    """The second one names the first as its base."""
    model = load_checkpoint(written / "lora")
    assert model.name_or_path == str(written / "lora")
    adapted = trained_adapter(model)
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = adapted(**inputs).logits
    save_adapter(adapted, tmp_path / "second")
    with torch.no_grad():
        torch.testing.assert_close(
            load_checkpoint(tmp_path / "second")(**inputs).logits, expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("base", ["llama", "published", "ours"])
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_the_layout_of_llavas_own_lora(tmp_path, base, file, prefix):
    model = model_of()
    write_tower(model, tmp_path / "clip")
    place = tmp_path / "base"
    if base == "llama":
        write_llama(model, place)
    elif base == "published":
        write_published(model_of(), place)
    else:
        model.save_pretrained(place)
    model.name_or_path = str(place)
    adapted = trained_adapter(model)
    with torch.no_grad():
        for parameter in adapted.get_base_model().model.multi_modal_projector.parameters():
            parameter.add_(0.1)
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = adapted(**inputs)
    lora = write_llava_lora(adapted, tmp_path / "lora", place, file, prefix)

    def check(found):
        with torch.no_grad():
            output = found(**inputs)
        torch.testing.assert_close(output.logits, expected.logits, atol=2e-5, rtol=1e-4)
        assert torch.equal(output.image_keep_mask, expected.image_keep_mask)

    check(load_adapter(lora))
    check(load_checkpoint(lora))
    for to, load in (("ours", DynamicLlavaForConditionalGeneration.from_pretrained), ("published", load_published)):
        convert(lora, tmp_path / to, to, say=lambda line: None)
        check(load(tmp_path / to))
    facts = inspect_checkpoint(lora)
    assert facts["layout"] == "LoRA (LLaVA)"
    assert facts["files"] == [file, FULL_WEIGHTS]
    assert facts["predictors"] == ["image_predictor", "output_predictor"]


@pytest.mark.parametrize("part", ["mm_projector.0.weight", "image_score_predictor.down_mlp.1.weight", "lora_B"])
def test_llavas_own_lora_cut_short(tmp_path, part):
    model = model_of()
    write_tower(model, tmp_path / "clip")
    write_llama(model, tmp_path / "base")
    lora = write_llava_lora(trained_adapter(model), tmp_path / "lora", tmp_path / "base")
    file = lora / ("adapter_model.bin" if part == "lora_B" else FULL_WEIGHTS)
    state = torch.load(file)
    torch.save({key: value for key, value in state.items() if part not in key}, file)
    for door, said in answers("lora", lora, tmp_path / "out").items():
        assert "missing" in said or (door, part) == ("inspect", "mm_projector.0.weight"), (door, said)


def test_arguments_without_effect_are_refused(written, tmp_path):
    whole = write_published(model_of(), tmp_path / "published")
    with pytest.raises(ValueError, match=r"vision_tower=.* has no effect"):
        load_checkpoint(written / "lora", vision_tower=whole / "clip")
    with pytest.raises(ValueError, match=r"vision_tower=.* has no effect"):
        load_checkpoint(written / "base", vision_tower=whole / "clip")
    with pytest.raises(ValueError, match=r"vision_tower=.* has no effect"):
        inspect_checkpoint(written / "base", vision_tower=whole / "clip")
    for folder in (whole, written / "base"):
        with pytest.raises(ValueError, match=r"base=.* has no effect"):
            load_checkpoint(folder, base=written / "base")
    # It has one for the LoRA of a published base.
    lora = tmp_path / "lora"
    shutil.copytree(written / "lora", lora)
    other = write_tower(model_of(seed=3), tmp_path / "other")
    loaded = load_checkpoint(lora, base=whole, vision_tower=other)
    assert torch.equal(
        loaded.model.vision_tower.embeddings.class_embedding,
        model_of(seed=3).model.vision_tower.embeddings.class_embedding,
    )
    assert loaded.dtype == torch.float32
    assert load_checkpoint(lora, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_checkpoint(lora, sparsity={"image_keep_rate": 0.9}).config.sparsity.predictor_dim == 32
    for folder in (lora, written / "base"):
        with pytest.raises(ValueError, match="output_loading_info"):
            load_checkpoint(folder, output_loading_info=True)
    with pytest.raises(TypeError, match="device"):
        load_checkpoint(written / "base", device="cpu")
    assert json.loads((lora / "config.json").read_text())["sparsity"]["image_keep_rate"] == 0.4
