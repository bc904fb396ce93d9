"""A checkpoint is whole or refused, alike at every door."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import load_checkpoint
from dynamic_llava.checkpoints.inspect import inspect_checkpoint
from dynamic_llava.checkpoints.load import load_weights

from .doors import LAYOUTS, answers
from .test_published import assert_same
from .writing import model_of, write_state

FORMATS = ["model.safetensors:3", "pytorch_model.bin"]
UP = "layers.1.mlp.up_proj.weight"


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture
def folder(layouts, layout, tmp_path):
    return shutil.copytree(layouts / layout, tmp_path / "m")


def state_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder, state, files="model.safetensors") -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    write_state(state, folder, files)


def assert_all_say(layout, folder, tmp_path, pattern) -> None:
    said = answers(layout, folder, tmp_path / "out")
    for door, message in said.items():
        assert re.search(pattern, message), f"{door}: {message}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("files", FORMATS)
@pytest.mark.parametrize("fault", ["int64", "bool", "complex64", "nan", "inf", "-inf", "shape", "missing", "predictor"])
def test_weights_that_are_not_those_of_the_model(layout, folder, tmp_path, files, fault):
    state = state_of(folder)
    key = next(key for key in state if UP in key)
    pattern = UP.replace(".", r"\.")
    if fault in ("int64", "bool", "complex64"):
        state[key] = torch.ones_like(state[key]).to(getattr(torch, fault))
    elif fault == "shape":
        state[key] = state[key][:-1].clone()
    elif fault in ("missing", "predictor"):
        if fault == "predictor":
            key = next(key for key in state if "image" in key and "predictor" in key)
            pattern = r"missing model\.language_model\.image_predictor"
        state.pop(key)
    else:
        state[key][-1, -1] = float(fault)
    rewrite(folder, state, files)
    assert_all_say(layout, folder, tmp_path, pattern)


def test_a_predictor_that_is_missing_as_a_whole_is_new_and_said_once(layout, folder, tmp_path, caplog):
    state = state_of(folder)
    gone = ("output_predictor", "output_text_score_predictor")
    rewrite(folder, {key: value for key, value in state.items() if not any(name in key for name in gone)})
    logging.getLogger("dynamic_llava").propagate = True
    with caplog.at_level(logging.WARNING):
        load_checkpoint(folder)
    said = [record.message for record in caplog.records if "new ones were initialised" in record.message]
    assert len(said) == 1
    assert "holds no output_predictor:" in said[0]
    assert {name.split(".")[2] for name in inspect_checkpoint(folder)["new"]} == {"output_predictor"}


@pytest.mark.parametrize(
    ("files", "beside"),
    [
        ("model.safetensors", "model.safetensors.index.json"),
        ("model.safetensors", "pytorch_model.bin"),
        ("model.safetensors:3", "pytorch_model.bin"),
        ("model.safetensors:3", "pytorch_model.bin.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ],
)
def test_all_doors_read_the_files_that_transformers_prefers(layout, folder, tmp_path, files, beside):
    """What stands behind them, stale or broken, is not looked at."""
    rewrite(folder, state_of(folder), files)
    (folder / beside).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    assert set(answers(layout, folder, tmp_path / "out").values()) == {"loaded"}
    for place in (folder, tmp_path / "out"):
        assert_same(load_checkpoint(place), model_of())


def _index(folder):
    return folder / "model.safetensors.index.json"


def _map(folder, **entries):
    values = json.loads(_index(folder).read_text())
    values["weight_map"] |= entries
    _index(folder).write_text(json.dumps(values))


def _stray(folder):
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00004-of-00004.safetensors")


def _twice(folder):
    one, two = (folder / f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
    state = load_file(two)
    save_file(state | {next(iter(load_file(one))): torch.zeros(1)}, two)


def _unnamed(folder):
    values = json.loads(_index(folder).read_text())
    values["weight_map"].pop(next(iter(values["weight_map"])))
    _index(folder).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (lambda f: _index(f).write_text("null"), "holds a NoneType, not an object"),
        (lambda f: _index(f).write_text("[]"), "holds a list, not an object"),
        (lambda f: _index(f).write_text("{}"), "must name a file for each weight"),
        (lambda f: _index(f).write_text('{"weight_map": null}'), "must name a file for each weight"),
        (lambda f: _index(f).write_text('{"weight_map": ["a"]}'), "must name a file for each weight"),
        (lambda f: _index(f).write_text('{"weight_map": {}}'), "must name a file for each weight"),
        (lambda f: _index(f).write_text("{" * 100_000), "not valid JSON"),
        (lambda f: _map(f, a=1), "names 1, which is no weight file of its folder"),
        (lambda f: _map(f, a=None), "names None"),
        (lambda f: _map(f, a="../m/model.safetensors"), "which is no weight file of its folder"),
        (lambda f: _map(f, a="/etc/passwd"), "which is no weight file of its folder"),
        (lambda f: _map(f, a="sub/x.safetensors"), "which is no weight file of its folder"),
        (lambda f: _map(f, a="config.json"), "which is no weight file of its folder"),
        (lambda f: _map(f, a="gone.safetensors"), r"names files that are not there: gone\.safetensors"),
        (lambda f: _map(f, a="model-00001-of-00003.safetensors"), "the index and the shards disagree about a;"),
        (_unnamed, "the index and the shards disagree about"),
        (_stray, r"model-00004-of-00004\.safetensors, which its index does not name"),
        (_twice, "both hold"),
    ],
)
def test_indices_and_shards_that_do_not_belong_together(layout, folder, tmp_path, spoil, pattern):
    rewrite(folder, state_of(folder), "model.safetensors:3")
    spoil(folder)
    assert_all_say(layout, folder, tmp_path, pattern)


def test_one_weight_under_two_names(layouts, tmp_path):
    folder = shutil.copytree(layouts / "ours", tmp_path / "m")
    state = state_of(folder)
    key = next(key for key in state if UP in key)
    assert key.startswith("language_model.model.")
    rewrite(folder, state | {key.replace("language_model.model.", "model.language_model."): state[key] + 1})
    assert_all_say("ours", folder, tmp_path, f"holds model.language_model.{UP} twice")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 64,
        POINTER,
        (2**62).to_bytes(8, "little") + b"{}",
        (9).to_bytes(8, "little") + b'{"a":null',
        (2).to_bytes(8, "little") + b"[]",
        b"PK\x03\x04" + b"\x00" * 200,
        b"\x80\x02}q\x00.",
        b"\x80\x02cos\nsystem\nX\x09\x00\x00\x00touch /tmpq\x00\x85R.",
    ],
)
def test_files_that_hold_no_weights(layout, folder, tmp_path, name, content):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    expected = (
        "Git LFS pointer" if content == POINTER else "damaged|not a file of plain weights|missing model|state dict"
    )
    assert_all_say(layout, folder, tmp_path, expected)


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device, make_folder])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00002-of-00003.safetensors"])
def test_what_is_no_file_is_refused_and_never_waited_on(layout, folder, tmp_path, make, name):
    if "-of-" in name:
        rewrite(folder, state_of(folder), "model.safetensors:3")
    (folder / name).unlink()
    make(folder / name)
    assert_all_say(layout, folder, tmp_path, "no regular file|is a folder")


def test_a_run_goes_on_from_whole_weights_alone(layouts, tmp_path):
    folder = shutil.copytree(layouts / "ours", tmp_path / "m")
    model, other = model_of(seed=1), DynamicLlavaForConditionalGeneration.from_pretrained(folder)
    load_weights(model, folder)
    assert_same(model, other)
    state = state_of(folder)
    tied = model_of()
    tied.config.tie_word_embeddings = tied.config.text_config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    assert not any("lm_head" in key for key in state_of(tmp_path / "tied"))
    again = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "tied")
    with torch.no_grad():
        again.lm_head.weight.zero_()
    load_weights(again, tmp_path / "tied")
    assert_same(again, tied)
    for lost in ("image_predictor", UP):
        rewrite(folder, {key: value for key, value in state.items() if lost not in key})
        with pytest.raises(ValueError, match=lost.replace(".", r"\.")):
            load_weights(model, folder)
