"""Broken or foreign checkpoints: one clear error, nothing executed."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import load_adapter, load_checkpoint, load_published
from dynamic_llava.checkpoints.__main__ import main

from .writing import model_of, published_state, write_published, write_state


@pytest.fixture
def folder(tmp_path):
    return write_published(model_of(), tmp_path / "m")


def test_a_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"No checkpoint at .*nowhere"):
        load_published(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_published(tmp_path)


@pytest.mark.parametrize("files", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file(tmp_path, files):
    folder = write_published(model_of(), tmp_path / "m", files)
    path = folder / files
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{files} is damaged or cut off .*again"):
        load_published(folder)


def test_a_missing_shard(tmp_path):
    folder = write_published(model_of(), tmp_path / "m", "model.safetensors:3")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names files that are not there: model-00002-of-00003"):
        load_published(folder)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_is_not_weights(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil(tmp_path / "executed")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a file of plain weights, and nothing in it was executed"):
        load_published(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"nothing in it was executed|damaged"):
        load_published(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        load_published(folder)
    assert not (tmp_path / "executed").exists()


def test_wrong_shapes(folder):
    state = published_state(model_of())
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    write_state(state, folder, "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight \(3, 3\) instead of \(64, 32\)"):
        load_published(folder)


def test_wrong_shapes_in_hugging_face_layout(tmp_path):
    model_of().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another shape than config\.json says"):
        DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_missing_and_unknown_weights_are_listed(folder):
    state = published_state(model_of())
    state.pop("model.layers.1.mlp.up_proj.weight")
    state["model.layers.1.mlp.other.weight"] = torch.zeros(1)
    write_state(state, folder, "model.safetensors")
    with pytest.raises(ValueError, match=r"missing .*layers\.1\.mlp\.up_proj\.weight; unknown .*mlp\.other"):
        load_published(folder)


def test_a_text_only_llama(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"plain Llama, text-only model \(model_type 'llama'\)"):
        load_published(tmp_path)


def test_a_tower_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_published(model_of(), tmp_path / "m", tower="separate", mm_vision_tower="nobody/clip")
    with pytest.raises(FileNotFoundError, match=r"vision tower 'nobody/clip' .*pass vision_tower="):
        load_published(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mm_projector_type": "resampler"}, "Unknown mm_projector_type 'resampler'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, r"LLaVA-NeXT .*mm_patch_merge_type='spatial_unpad'"),
        ({"mm_vision_select_feature": "all"}, "Unknown mm_vision_select_feature 'all'"),
        ({"model_type": "llava_mistral"}, "LLaVA on Mistral model .*'llava_mistral'"),
    ],
)
def test_parts_that_llava_1_5_has_not(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        load_published(write_published(model_of(), tmp_path / "m", **entry))


def test_a_lora_without_its_base(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nobody/gone"}))
    with pytest.raises(FileNotFoundError, match=r"base 'nobody/gone' of the LoRA .*pass base="):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="LoRA folder, not a whole model"):
        load_published(tmp_path)
    with pytest.raises(ValueError, match="not a LoRA folder"):
        load_adapter(write_published(model_of(), tmp_path / "m"))


def test_the_command_says_one_line(tmp_path, capsys):
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), "--to", "ours"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
