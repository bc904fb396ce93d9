"""`load_published` on every layout that the parity checkpoints do not cover."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoProcessor, AutoTokenizer

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import load_checkpoint, load_processor, load_published
from dynamic_llava.checkpoints.keys import to_published

from ..tiny import pictures, stock_model, words
from .writing import model_of, published_state, write_published, write_state


def inputs_of(model) -> dict[str, torch.Tensor]:
    row = [1, *words(3, 1), *[model.config.image_token_id] * 16, *words(4, 2)]
    return {"input_ids": torch.tensor([row]), "pixel_values": pictures(1)}


def assert_same(loaded, model):
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
    inputs = inputs_of(model)
    with torch.no_grad():
        one, two = loaded(**inputs), model(**inputs)
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.image_keep_mask, two.image_keep_mask)


@pytest.mark.parametrize(
    "files", ["model.safetensors", "model.safetensors:3", "pytorch_model.bin", "pytorch_model.bin:2"]
)
@pytest.mark.parametrize("tower", ["inside", "separate", "whole"])
def test_files_and_towers(tmp_path, files, tower):
    model = model_of(kv_heads=2)
    loaded = load_published(write_published(model, tmp_path / "m", files, tower), attn_implementation="sdpa")
    assert_same(loaded, model)
    assert loaded.config.sparsity == model.config.sparsity
    assert loaded.config.text_config.num_key_value_heads == 2


@pytest.mark.parametrize("layers", [1, 3])
def test_projectors_of_other_depths(tmp_path, layers):
    torch.manual_seed(0)
    model = model_of(projector_layers=layers)
    folder = write_published(model, tmp_path / "m")
    kind = json.loads((folder / "config.json").read_text())["mm_projector_type"]
    assert kind == {1: "linear", 3: "mlp3x_gelu"}[layers]
    keys = {key for key in published_state(model) if "mm_projector" in key}
    places = [""] if layers == 1 else ["0.", "2.", "4."]
    assert keys == {f"model.mm_projector.{place}{name}" for place in places for name in ("weight", "bias")}
    loaded = load_published(folder)
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "ours")
    assert_same(DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours"), model)


@pytest.mark.parametrize("model_type", ["llava_llama", "llava", "dynamic_llava_llama"])
def test_a_plain_llava_gets_new_predictors_said_once(tmp_path, model_type, caplog):
    model = model_of(image_keep_rate=1.0, output_predictor=False)
    folder = write_published(model, tmp_path / "m", model_type=model_type, sparse_config=None)
    state = {key: value for key, value in published_state(model).items() if "predictor" not in key}
    write_state(state, folder, "model.safetensors")
    logging.getLogger("dynamic_llava").propagate = True
    with caplog.at_level(logging.WARNING):
        loaded = load_published(folder, sparsity={"image_keep_rate": 1.0, "output_predictor": False})
    said = [record.message for record in caplog.records if "new ones were initialised" in record.message]
    assert len(set(said)) == len(said) == 1
    assert loaded.config.sparsity.gate_estimator == "bounded"
    model.config.image_token_index = loaded.config.image_token_index = 99
    inputs = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, stock_model(model)(**inputs).logits)


def test_old_buffers_and_unknown_entries_are_tolerated_and_said_once(tmp_path, caplog):
    model = model_of()
    folder = write_published(model, tmp_path / "m", maskclip_model="ViT-B/16", mm_something_new=3)
    state = published_state(model)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    write_state(state, folder, "model.safetensors")
    logging.getLogger("dynamic_llava").propagate = True
    with caplog.at_level(logging.WARNING):
        assert_same(load_published(folder), model)
    said = [record.message for record in caplog.records if "maskclip_model" in record.message]
    assert len(said) == 1
    assert "mm_something_new" not in said[0]


def test_rope_scaling_and_select_layer(tmp_path):
    model = model_of()
    folder = write_published(
        model, tmp_path / "m", rope_scaling={"type": "linear", "factor": 2.0}, mm_vision_select_layer=-1, rope_theta=5e4
    )
    loaded = load_published(folder, dtype=torch.bfloat16)
    rope = loaded.config.text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 5e4)
    assert loaded.config.vision_feature_layer == -1
    assert loaded.dtype == torch.bfloat16


def test_the_image_token_is_that_of_the_tokenizer(tmp_path):
    folder = write_published(model_of(), tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny-llava")
    tokenizer.save_pretrained(folder)
    expected = tokenizer.convert_tokens_to_ids("<image>")
    assert load_published(folder).config.image_token_index == expected


def test_the_tower_can_be_another(tmp_path):
    model, other = model_of(), model_of(seed=1)
    folder = write_published(model, tmp_path / "m")
    clip = write_published(other, tmp_path / "o", tower="separate") / "clip"
    loaded = load_published(folder, vision_tower=clip)
    assert torch.equal(
        loaded.model.vision_tower.embeddings.class_embedding, other.model.vision_tower.embeddings.class_embedding
    )


def test_load_checkpoint_takes_every_layout(tmp_path):
    model = model_of()
    published = write_published(model, tmp_path / "m")
    model.save_pretrained(tmp_path / "ours")
    for folder in (published, tmp_path / "ours"):
        assert_same(load_checkpoint(folder), model)
    with pytest.raises(ValueError, match="load_published"):
        DynamicLlavaForConditionalGeneration.from_pretrained(published)
    with pytest.raises(ValueError, match="from_pretrained loads it"):
        load_published(tmp_path / "ours")


@pytest.mark.parametrize("layout", ["ours", "published"])
@pytest.mark.parametrize(("name", "revision"), [("someone/model", None), ("someone/model@v1.5", "v1.5")])
def test_a_repository_of_the_hub_and_its_revision(tmp_path, monkeypatch, layout, name, revision):
    model = model_of()
    if layout == "ours":
        model.save_pretrained(tmp_path / "hub")
    else:
        write_published(model, tmp_path / "hub")
    asked = stand_in_hub(tmp_path / "hub", tmp_path / "cache", monkeypatch)
    loaded = load_checkpoint(name)
    assert set(asked) == {("someone/model", revision)}
    assert loaded.name_or_path == name
    assert_same(model, loaded)


def stand_in_hub(hub: Path, cache: Path, monkeypatch) -> list[tuple[str, str | None]]:
    """Downloads come from the folder `hub` now; the list that every one is noted in."""
    asked = []

    def download(repository, revision, allow_patterns, ignore_patterns):
        asked.append((repository, revision))
        files = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, cache / file)
        return str(cache)

    monkeypatch.setattr("dynamic_llava.checkpoints.source.snapshot_download", download)
    return asked


def test_no_more_is_downloaded_than_is_read(tmp_path, monkeypatch):
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    model = model_of()
    model.save_pretrained(hub)
    AutoProcessor.from_pretrained("assets/tiny-llava").save_pretrained(hub)
    for leftover in ("pytorch_model.bin", "tf_model.h5", "checkpoint-5/model.safetensors"):
        (hub / leftover).parent.mkdir(exist_ok=True)
        (hub / leftover).write_bytes(b"not to be had")
    (hub / "non_lora_trainables.bin").write_bytes(b"of a LoRA, beside its safetensors")
    stand_in_hub(hub, cache, monkeypatch)
    load_processor("someone/model")
    assert not list(cache.rglob("*.safetensors")) + list(cache.rglob("*.bin"))
    assert_same(load_checkpoint("someone/model"), model)
    had = {path.name for path in cache.rglob("*") if path.suffix in (".safetensors", ".bin", ".h5")}
    assert had == {"model.safetensors", "non_lora_trainables.bin"}
    assert not (cache / "checkpoint-5").exists()


def test_names_are_those_of_the_published_code():
    """Spelled out for the parts that the parity checkpoint has not."""
    own = "model.language_model.instruct_predictor."
    assert to_published(own + "down.1.weight", 2) == "model.instruct_score_predictor.output_mlp.1.weight"
    assert to_published(own + "head.4.bias", 2) == "model.instruct_score_predictor.output_mlp.7.bias"
