"""Configurations, tokenizers and generation settings that are damaged, of another kind, or of an old version."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import load_checkpoint, load_processor
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.checkpoints.inspect import inspect_checkpoint

from ..tiny import tiny_model
from .doors import LAYOUTS, answers, change_json
from .test_published import assert_same, inputs_of
from .writing import model_of, write_state

TINY = "assets/tiny-llava"


def copy(layouts, layout, tmp_path):
    return shutil.copytree(layouts / layout, tmp_path / "m")


@pytest.mark.parametrize(
    ("layout", "keys", "value"),
    [
        ("ours", "text_config", None),
        ("ours", "text_config", [1]),
        ("ours", "vision_config", None),
        ("ours", "vision_config", "clip"),
        ("ours", "text_config hidden_size", "32"),
        ("ours", "text_config hidden_size", 33),
        ("ours", "text_config hidden_size", 10**9),
        ("ours", "text_config num_hidden_layers", -3),
        ("ours", "text_config num_hidden_layers", 10**9),
        ("ours", "vision_config num_hidden_layers", 10**9),
        ("ours", "text_config num_attention_heads", 0),
        ("ours", "text_config num_attention_heads", 3),
        ("ours", "text_config num_key_value_heads", 3),
        ("ours", "text_config vocab_size", 0),
        ("ours", "text_config vocab_size", 10**12),
        ("ours", "text_config head_dim", -8),
        ("ours", "text_config pad_token_id", 1000),
        ("ours", "text_config hidden_act", "foo"),
        ("ours", "projector_hidden_act", "foo"),
        ("ours", "text_config rms_norm_eps", math.nan),
        ("ours", "text_config rms_norm_eps", "x"),
        ("ours", "text_config rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}),
        ("ours", "text_config rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}),
        ("ours", "text_config rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
        ("ours", "text_config rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}),
        ("ours", "vision_config patch_size", 0),
        ("ours", "vision_config image_size", 10**9),
        ("ours", "vision_config model_type", "foo"),
        ("ours", "vision_feature_layer", 99),
        ("ours", "vision_feature_select_strategy", "foo"),
        ("ours", "image_token_index", -5),
        ("ours", "image_token_index", "x"),
        ("ours", "sparsity", [1]),
        ("ours", "sparsity predictor_num_layers", 10**9),
        ("ours", "projector_layers", "2"),
        ("ours", "projector_layers", 10**9),
        ("ours", "published", 3),
        ("ours", "dtype", "foo"),
        ("ours", "dtype", "int64"),
        ("ours", "tie_word_embeddings", "x"),
        ("ours", "quantization_config", 3),
        ("published", "hidden_size", "32"),
        ("published", "hidden_size", 33),
        ("published", "num_hidden_layers", -3),
        ("published", "num_hidden_layers", 10**9),
        ("published", "num_key_value_heads", 3),
        ("published", "vocab_size", 0),
        ("published", "rms_norm_eps", math.inf),
        ("published", "rope_scaling", {"type": "spiral", "factor": 2.0}),
        ("published", "rope_scaling", [1]),
        ("published", "rope_theta", "x"),
        ("published", "mm_projector_type", 3),
        ("published", "mm_projector_type", "mlp99999999x_gelu"),
        ("published", "mm_vision_select_layer", "x"),
        ("published", "mm_vision_select_layer", -99),
        ("published", "mm_vision_select_feature", ["patch"]),
        ("published", "mm_vision_tower", 3),
        ("published", "sparse_config", [1]),
        ("published", "sparse_config", "x"),
        ("published", "torch_dtype", "foo"),
        ("published", "hidden_act", None),
    ],
)
def test_values_that_describe_no_model(layouts, tmp_path, layout, keys, value):
    folder = copy(layouts, layout, tmp_path)
    change_json(folder / "config.json", *keys.split(), value=value)
    for door, said in answers(layout, folder, tmp_path / "out").items():
        assert str(folder) in said, (door, said)
        assert "\n" not in said


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'{"a"', b"\xff\xfe\x00", b"{" * 100_000, b"[" * 100_000])
def test_damaged_files(layouts, tmp_path, layout, name, content):
    folder = copy(layouts, layout, tmp_path)
    (folder / name).write_bytes(content)
    for door, said in answers(layout, folder, tmp_path / "out").items():
        # The published layout has its settings of generation in config.json; conversions write the file all the same.
        assert name in said or ((layout, said) == ("published", "loaded") and "load" in door), (door, said)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(layouts, tmp_path, layout, encoding):
    folder = copy(layouts, layout, tmp_path)
    for path in folder.glob("*.json"):
        path.write_text(path.read_text(), encoding=encoding)
    assert set(answers(layout, folder, tmp_path / "out").values()) == {"loaded"}


NEXT = "LLaVA-NeXT"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llava_next", "text_config": {"model_type": "llama"}, "vision_config": {}}, NEXT),
        ({"model_type": "llava_llama", "mm_patch_merge_type": "spatial_unpad"}, NEXT),
        ({"model_type": "llava", "mm_patch_merge_type": "spatial"}, NEXT),
        ({"model_type": "llava", "image_aspect_ratio": "anyres"}, NEXT),
        ({"model_type": "llava_llama", "image_aspect_ratio": "anyres_max_9"}, NEXT),
        ({"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}, "LLaVA on Mistral"),
        ({"model_type": "llava", "architectures": ["LlavaMistralForCausalLM"]}, "LlavaMistralForCausalLM"),
        ({"model_type": "llava_mpt"}, "LLaVA-MPT"),
        ({"model_type": "llava_qwen"}, "LLaVA on Qwen"),
        ({"model_type": "llava_onevision", "text_config": {}, "vision_config": {}}, "LLaVA-OneVision"),
        ({"model_type": "qwen2_vl"}, "Qwen2-VL"),
        ({"model_type": "blip"}, "BLIP"),
        ({"model_type": "llama"}, "plain Llama, text-only"),
        ({"model_type": "llava", "text_config": {"model_type": "gemma"}, "vision_config": {}}, "LLaVA on 'gemma'"),
        ({"model_type": "something_new"}, "'something_new'"),
        ({"model_type": ["llava"]}, "llava"),
        ({}, "no model_type"),
    ],
)
def test_other_models_are_called_by_their_names(layouts, tmp_path, config, name):
    folder = copy(layouts, "tiny", tmp_path)
    (folder / "config.json").write_text(json.dumps(config))
    said = {**answers("ours", folder, tmp_path / "out"), **answers("published", folder, tmp_path / "out")}
    with pytest.raises(ValueError, match=re.escape(name)):
        load_processor(folder)
    for door, message in said.items():
        assert name in message, (door, message)
        assert "takes LLaVA-1.5" in message


GREEDY_WITH_SAMPLING = [
    {"temperature": 0.9, "top_p": 0.6},
    {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "max_length": 4096, "_from_model_config": True},
    {"top_k": 20, "typical_p": 0.5, "min_p": 0.1},
    {"length_penalty": 2.0, "early_stopping": True},
    {"pad_token_id": -1},
    {"output_attentions": True},
]


@pytest.mark.parametrize("settings", GREEDY_WITH_SAMPLING)
def test_generation_settings_without_effect_do_not_stop_a_save(tmp_path, settings):
    tiny_model().save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    model = load_checkpoint(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.generation_config.suppress_tokens == model.generation_config.suppress_tokens == [99]
    assert again.generation_config.eos_token_id == 2
    for to in ("ours", "published", "llava-hf"):
        convert(tmp_path / "base", tmp_path / to, to, say=lambda line: None)
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava-hf").save_pretrained(tmp_path / "stock")


def test_sampling_settings_that_count_are_kept(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    change_json(tmp_path / "generation_config.json", "do_sample", value=True)
    change_json(tmp_path / "generation_config.json", "temperature", value=0.3)
    assert load_checkpoint(tmp_path).generation_config.temperature == 0.3


@pytest.mark.parametrize("value", ["warm", [1], {}])
def test_generation_settings_of_another_type(tmp_path, value):
    tiny_model().save_pretrained(tmp_path / "m")
    change_json(tmp_path / "m" / "generation_config.json", "do_sample", value=True)
    change_json(tmp_path / "m" / "generation_config.json", "num_beams", value=value)
    change_json(tmp_path / "m" / "generation_config.json", "max_new_tokens", value=value)
    for said in answers("ours", tmp_path / "m", tmp_path / "out").values():
        assert "generation_config.json" in said


@pytest.mark.parametrize("gone", [("patch_size",), ("num_additional_image_tokens",), None])
def test_a_processor_of_an_old_version_takes_the_towers_values(layouts, tmp_path, gone):
    """llava-hf folders of transformers 4.36 have no processor_config.json, those of 4.45 no number of extra tokens."""
    folder = copy(layouts, "tiny", tmp_path)
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
    for key in gone or ():
        settings.pop(key)
    (folder / "processor_config.json").write_text(json.dumps(settings))
    if gone is None:
        (folder / "processor_config.json").unlink()
    expected = AutoProcessor.from_pretrained(TINY)
    convert(folder, tmp_path / "ours", "ours", say=lambda line: None)
    for found in (load_processor(folder), AutoProcessor.from_pretrained(tmp_path / "ours")):
        for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
            assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("content", ["", "null", "[1]", '{"a": [', "{" * 100_000, "folder", "fifo"])
@pytest.mark.parametrize("published", [False, True])
def test_damaged_tokenizers_and_processors(layouts, tmp_path, name, content, published):
    folder = copy(layouts, "tiny", tmp_path)
    if published:
        convert(folder, tmp_path / "published", "published", say=lambda line: None)
        folder = tmp_path / "published"
    (folder / name).unlink(missing_ok=True)
    if content == "folder":
        (folder / name).mkdir()
    elif content == "fifo":
        os.mkfifo(folder / name)
    else:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_processor(folder)


@pytest.mark.parametrize("change", [{"model": {}}, {"model": {"type": "new"}}, {"added_tokens": [{"id": "x"}]}, {}])
def test_tokenizers_that_the_library_cannot_read(layouts, tmp_path, change):
    folder = copy(layouts, "tiny", tmp_path)
    whole = json.loads((folder / "tokenizer.json").read_text()) if change else {}
    (folder / "tokenizer.json").write_text(json.dumps({**whole, **change}))
    with pytest.raises(ValueError, match=r"tokenizer or processor in .* cannot be read"):
        load_processor(folder)


@pytest.mark.parametrize("place", [("tie_word_embeddings",), ("text_config", "tie_word_embeddings")])
def test_tied_embeddings(tmp_path, place, caplog):
    """No head in the file, in any layout: it is the embeddings."""
    model = model_of()
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "m")
    change_json(tmp_path / "m" / "config.json", *place, value=True)
    state = {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    write_state(state, tmp_path / "m", "model.safetensors")
    logging.getLogger("transformers").propagate = True

    def check(folder):
        with caplog.at_level(logging.WARNING):
            loaded = load_checkpoint(folder)
        assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
        assert_same(loaded, model)
        assert inspect_checkpoint(folder)["parameters"] == sum(p.numel() for p in loaded.parameters())
        return loaded

    check(tmp_path / "m").save_pretrained(tmp_path / "saved")
    check(tmp_path / "saved")
    for first in ("ours", "published"):
        convert(tmp_path / "m", tmp_path / first, first, say=lambda line: None)
        check(tmp_path / first)
        for then in ("ours", "published"):
            convert(tmp_path / first, tmp_path / f"{first}-{then}", then, say=lambda line: None)
            check(tmp_path / f"{first}-{then}")
    convert(tmp_path / "m", tmp_path / "hf", "llava-hf", say=lambda line: None)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = model(**inputs, image_keep_rate=1.0, output_sparsity=False).logits
        torch.testing.assert_close(stock(**inputs).logits[..., :100], expected, atol=1e-5, rtol=1e-5)
    trained = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "m").train()
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    trained(**inputs, labels=labels).loss.backward()
    assert trained.lm_head.weight.grad is trained.model.language_model.embed_tokens.weight.grad


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("odd", ["x", [1], {}, None, "10"])
def test_tokenizers_with_settings_of_another_type(layouts, tmp_path, published, odd):
    folder = copy(layouts, "tiny", tmp_path)
    if published:
        convert(folder, tmp_path / "published", "published", say=lambda line: None)
        folder = tmp_path / "published"
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": odd}))
    if odd is not None:
        with pytest.raises(ValueError, match=r"tokenizer or processor in .* cannot be read"):
            load_processor(folder)
    if published:
        path = folder / "processor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "image_processor": [odd]}))
        with pytest.raises(ValueError, match=r"processor_config\.json: image_processor is .*, not an object"):
            load_processor(folder)
