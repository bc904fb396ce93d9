"""Conversions: bit-identical round trips, all or nothing, and results that stock classes load."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, pipeline

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import convert as convert_module
from dynamic_llava.checkpoints import load_published, write
from dynamic_llava.checkpoints.__main__ import main
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.checkpoints.inspect import inspect_checkpoint

from ..test_loading import old_names
from ..tiny import stock_model, tiny_model
from .test_published import assert_same, inputs_of
from .writing import model_of, write_published

TINY = "assets/tiny-llava"


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same_tensors(one, two):
    one, two = tensors_of(one), tensors_of(two)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert value.dtype == two[key].dtype
        assert torch.equal(value, two[key]), key


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"kv_heads": 1, "projector_layers": 3},
        {"projector_layers": 1, "output_predictor": False, "image_selection": "threshold"},
        {"instruct_predictor": True, "instruct_keep_rate": 0.6, "user_marker": [7]},
    ],
)
def test_ours_published_ours_is_bit_identical(tmp_path, kwargs):
    model = tiny_model(**kwargs)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "published", "published", max_shard_bytes=20_000)
    convert(tmp_path / "published", tmp_path / "back", "ours")
    assert len(list((tmp_path / "published").glob("*.safetensors"))) > 3
    assert_same_tensors(tmp_path / "ours", tmp_path / "back")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    assert loaded.config.sparsity == model.config.sparsity
    assert_same(loaded, model)
    assert_same(load_published(tmp_path / "published"), model)


def test_published_ours_published_is_bit_identical(tmp_path):
    model = model_of()
    first = write_published(model, tmp_path / "first", "pytorch_model.bin:2", maskclip_model="x")
    convert(first, tmp_path / "ours", "ours")
    convert(tmp_path / "ours", tmp_path / "second", "published")
    assert_same(load_published(tmp_path / "second"), model)
    state = tensors_of(tmp_path / "second")
    stored = {k: v for file in first.glob("*.bin") for k, v in torch.load(file, weights_only=True).items()}
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[key], value) for key, value in stored.items())
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (first, tmp_path / "second"))
    assert two["maskclip_model"] == "x"
    assert {key: two["sparse_config"][key] for key in one["sparse_config"]} == one["sparse_config"]
    for key in ("hidden_size", "num_key_value_heads", "rope_scaling", "mm_projector_type", "mm_vision_tower"):
        assert one[key] == two[key], key


def test_hugging_face_ours_hugging_face_is_bit_identical(tmp_path):
    stock = stock_model(tiny_model())
    stock.save_pretrained(tmp_path / "hf")
    state = {old_names(key): value.clone() for key, value in stock.state_dict().items()}
    save_file(state, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "ours", "ours")
    convert(tmp_path / "ours", tmp_path / "back", "llava-hf")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    inputs = inputs_of(stock)
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, stock(**inputs).logits)


def test_published_to_stock_hugging_face(tmp_path, capsys):
    """The image token gets a row of its own; the predictors are left out, and that is said."""
    model = model_of()
    folder = write_published(model, tmp_path / "m", tower="separate")
    convert(folder, tmp_path / "hf", "llava-hf")
    assert "predictors were left out" in capsys.readouterr().out
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").eval()
    assert type(stock) is LlavaForConditionalGeneration
    assert stock.config.text_config.vocab_size == 128
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = model(**inputs, image_keep_rate=1.0, output_sparsity=False).logits
        torch.testing.assert_close(stock(**inputs).logits[..., :100], expected, atol=1e-5, rtol=1e-5)


def test_a_published_checkpoint_becomes_one_for_the_pipeline(tmp_path):
    """With its tokenizer: processor, Vicuna v1 chat template and generation configuration are there."""
    convert(TINY, tmp_path / "published", "published")
    for name in ("processor_config.json", "chat_template.jinja"):
        (tmp_path / "published" / name).unlink()
    convert(tmp_path / "published", tmp_path / "ours", "ours")
    original = DynamicLlavaForConditionalGeneration.from_pretrained(TINY).eval()
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert loaded.config.image_token_index == original.config.image_token_index
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "generation_config.json").is_file()
    assert "Dynamic-LLaVA" in (tmp_path / "ours" / "README.md").read_text()
    picture = Image.new("RGB", (128, 128), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "How many objects are there?"}]
    talk = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert text.startswith("A chat between a curious user and an artificial intelligence assistant.")
    assert text.endswith("USER: <image>\nHow many objects are there? ASSISTANT:")
    old = AutoProcessor.from_pretrained(TINY)
    one, two = (p(images=picture, text=text, return_tensors="pt") for p in (processor, old))
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    with torch.no_grad():
        kept = {"image_keep_rate": 1.0, "output_sparsity": False}
        assert torch.equal(loaded(**one, **kept).logits, original(**one, **kept).logits)
    pipe = pipeline("image-text-to-text", model=str(tmp_path / "ours"), device="cpu")
    answer = pipe(talk, return_full_text=False, generate_kwargs={"max_new_tokens": 4, "do_sample": False})
    assert answer[0]["generated_text"]


def test_no_tokenizer_is_said(tmp_path, capsys):
    convert(write_published(model_of(), tmp_path / "m"), tmp_path / "ours", "ours")
    assert "holds no tokenizer" in capsys.readouterr().out


def test_one_shard_in_memory_at_a_time(tmp_path, monkeypatch):
    """Nothing is read before its shard is written, and nothing twice."""
    model_of().save_pretrained(tmp_path / "ours")
    events = []
    read = convert_module.Checkpoint.read
    save = write.save_file
    monkeypatch.setattr(convert_module.Checkpoint, "read", lambda self, own: (events.append(own), read(self, own))[1])
    monkeypatch.setattr(write, "save_file", lambda t, *a, **k: (events.append(len(t)), save(t, *a, **k)))
    convert(tmp_path / "ours", tmp_path / "published", "published", max_shard_bytes=20_000)
    shards, pending = [], []
    for event in events:
        if isinstance(event, int):
            assert len(pending) == event
            shards.append(pending)
            pending = []
        else:
            pending.append(event)
    keys = [key for shard in shards for key in shard]
    assert len(shards) > 3
    assert len(keys) == len(set(keys)) == len(model_of().state_dict())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("x")])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, error):
    source = write_published(model_of(), tmp_path / "m")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(convert_module, "_write_config", fail)
    with pytest.raises(type(error)):
        convert(source, tmp_path / "out", "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_killed_conversion_leaves_no_folder_that_loads(tmp_path, monkeypatch):
    """What `kill -9` leaves is a hidden folder without config.json; the next run goes its own way."""
    source = write_published(model_of(), tmp_path / "m")
    seen = []
    original = convert_module._write_tokenizer
    monkeypatch.setattr(
        convert_module,
        "_write_tokenizer",
        lambda checkpoint, folder, *a: (
            seen.append(sorted(p.name for p in folder.iterdir())),
            original(checkpoint, folder, *a),
        ),
    )
    convert(source, tmp_path / "out", "ours")
    assert seen == [["model.safetensors"]]


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path):
    source = write_published(model_of(), tmp_path / "m")
    dead = tmp_path / f".out.partial-{dead_process()}"
    other = tmp_path / f".another.partial-{dead_process()}"
    mine = tmp_path / ".out.partial-mine"
    with subprocess.Popen(["sleep", "60"]) as living:
        alive = tmp_path / f".out.partial-{living.pid}"
        for folder in (dead, other, mine, alive):
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"x")
        convert(source, tmp_path / "out", "ours", say=lambda line: None)
        living.kill()
    assert {path.name for path in tmp_path.glob(".*")} == {other.name, mine.name, alive.name}


def test_a_folder_that_another_machine_writes_to_is_left_alone(tmp_path):
    """Its process has no number here; the lock of the folder is all that is seen of it."""
    source = write_published(model_of(), tmp_path / "m")
    held = tmp_path / f".out.partial-{dead_process()}"
    held.mkdir()
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    convert(source, tmp_path / "out", "ours", say=lambda line: None)
    assert held.exists()
    os.close(lock)
    convert(source, tmp_path / "out", "ours", say=lambda line: None, overwrite=True)
    assert not held.exists()


def test_a_kill_while_the_target_is_replaced_loses_nothing(tmp_path):
    source = write_published(model_of(), tmp_path / "m")
    old = tmp_path / f".out.old-{dead_process()}"
    old.mkdir()
    (old / "precious").write_text("x")
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "out", "ours")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    assert not old.exists()


def test_kill_minus_nine(tmp_path):
    """A real one: the hidden folder is there afterwards, and gone after the next conversion."""
    source = write_published(model_of(), tmp_path / "m")
    code = (
        "import os, sys; from dynamic_llava.checkpoints import convert;"
        "convert._write_config = lambda *a: os.kill(os.getpid(), 9);"
        "convert.convert(sys.argv[1], sys.argv[2], 'ours')"
    )
    done = subprocess.run([sys.executable, "-c", code, source, tmp_path / "out"], capture_output=True)
    assert done.returncode == -9
    assert [path.name for path in tmp_path.glob(".out.partial-*")]
    convert(source, tmp_path / "out", "ours", say=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_no_room_on_the_disk_is_found_first(tmp_path, monkeypatch):
    source = write_published(model_of(), tmp_path / "m")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    with pytest.raises(OSError, match="GB free, the checkpoint needs"):
        convert(source, tmp_path / "out", "ours")
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_there_is_left_alone(tmp_path):
    source = write_published(model_of(), tmp_path / "m")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="choose another folder, or pass --overwrite"):
        convert(source, tmp_path / "out", "ours")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    convert(source, tmp_path / "out", "ours", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()
    assert_same(DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "out"), model_of())


def test_a_projector_that_hugging_face_has_not(tmp_path):
    source = write_published(model_of(projector_layers=3), tmp_path / "m")
    with pytest.raises(ValueError, match="projectors of 2 layers"):
        convert(source, tmp_path / "out", "llava-hf")
    with pytest.raises(ValueError, match="Unknown layout 'gguf'"):
        convert(source, tmp_path / "out", "gguf")


def test_inspect(tmp_path, capsys):
    model = model_of()
    facts = inspect_checkpoint(write_published(model, tmp_path / "m"))
    assert facts["layout"] == "published (llava_llama)"
    assert facts["model"] == "Dynamic-LLaVA"
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["dtypes"] == {"float32": facts["parameters"]}
    assert facts["new"] == []
    facts = inspect_checkpoint(TINY)
    assert facts["layout"] == "Hugging Face (llava)"
    assert facts["model"] == "LLaVA"
    assert len(facts["new"]) == len([key for key in model.state_dict() if "_predictor." in key])
    assert main(["inspect", TINY]) == 0
    assert "image_predictor, output_predictor" in capsys.readouterr().out
    assert main(["inspect", TINY, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "LLaVA"


def test_saving_writes_a_card_and_keeps_an_own_one(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert "layers 2 to 4" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_push_to_hub(tmp_path, monkeypatch):
    """The whole way but for the network: what would be uploaded is copied to a folder, and loads."""
    from huggingface_hub import HfApi

    Url = namedtuple("Url", "repo_id")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: Url(repo_id))
    monkeypatch.setattr("huggingface_hub.ModelCard.load", lambda *_, **__: (_ for _ in ()).throw(_missing()))

    def commit(self, repo_id, operations, **_):
        for operation in operations:
            target = tmp_path / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())

    monkeypatch.setattr(HfApi, "create_commit", commit)
    model = tiny_model()
    model.push_to_hub("me/tiny")
    assert_same(DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "me" / "tiny"), model)
    assert 'library_name: "transformers"' in (tmp_path / "me" / "tiny" / "README.md").read_text()


def _missing():
    from huggingface_hub.errors import EntryNotFoundError

    return EntryNotFoundError("no card")
