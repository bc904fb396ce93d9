"""A picture is the same pixels in training, through the saved processor, in evaluation, scoring and drawings."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from dynamic_llava.checkpoints import load_processor
from dynamic_llava.checkpoints.loaded import SparsitySettings, load_model
from dynamic_llava.data import open_dataset
from dynamic_llava.data.opening import open_picture
from dynamic_llava.data.prompts import encode_prompts
from dynamic_llava.eval import report_rows as report
from dynamic_llava.eval.conversations import data_root_at
from dynamic_llava.eval.lmms_model import DynamicLlava
from dynamic_llava.eval.local.documents import image_dataset
from dynamic_llava.eval.multi_round import Conversation, hold_conversations
from dynamic_llava.eval.perplexity import score_answers
from dynamic_llava.eval.runner import EvaluationOptions, evaluate_tasks
from dynamic_llava.train.config import read_values, resolve
from dynamic_llava.train.processor import stage_processor
from dynamic_llava.visualize.drawing import WordView
from dynamic_llava.visualize.views import seen_picture, view_patches

from ..odd_pictures import PICTURES, REFUSED, stripes
from .conftest import ASSETS

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One question and one description of each odd picture."""
    root = tmp_path_factory.mktemp("odd")
    samples = []
    for name, make in PICTURES.items():
        (root / name).write_bytes(make())
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "a picture"}]
        samples.append({"id": name, "image": name, "kind": "odd", "conversations": turns})
    for file in ("test_vqa.json", "test_describe.json"):
        (root / file).write_text(json.dumps(samples))
    return root


def training_processor(**values):
    words = [f"{key}={value}" for key, value in {"base_model": ASSETS, "train_file": "a.json", **values}.items()]
    return stage_processor(resolve(read_values(words)))


@pytest.fixture(scope="module")
def trained(run_folder, tmp_path_factory) -> Path:
    """A run that says nothing of aspect ratios and has saved its processor."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(run_folder, folder)
    training_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def in_training(root) -> dict[str, torch.Tensor]:
    dataset = open_dataset(root / "test_vqa.json", root, training_processor())
    return {sample["id"]: sample["pixel_values"][0] for sample in (dataset[i] for i in range(len(dataset)))}


@contextmanager
def seen_by(loaded):
    """Every picture that reaches the tower, as bytes."""
    found = set()

    def note(module, args, kwargs):
        pixels = kwargs.get("pixel_values", args[0] if args else None)
        found.update(picture.float().numpy().tobytes() for picture in pixels)

    hook = loaded.model.model.vision_tower.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def as_bytes(pictures: dict[str, torch.Tensor]) -> set[bytes]:
    return {picture.numpy().tobytes() for picture in pictures.values()}


def test_the_saved_processor_does_what_training_did(trained, root, in_training):
    for processor in (AutoProcessor.from_pretrained(trained), load_processor(trained)):
        for name, expected in in_training.items():
            pixels = processor(images=open_picture(root / name), text="<image>", return_tensors="pt")["pixel_values"]
            assert torch.equal(pixels[0], expected), name


def test_chat_templates_open_the_same_pictures(trained, root, in_training):
    processor = AutoProcessor.from_pretrained(trained)
    for name, expected in in_training.items():
        # Stock transformers makes of these a white picture.
        if name.startswith("grey16") or name.startswith("grey32"):
            continue
        content = [{"type": "image", "path": str(root / name)}, {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert torch.equal(inputs["pixel_values"][0], expected), name


@pytest.mark.parametrize("which", ["trained", "dense_folder"])
def test_evaluation_scoring_and_drawing_see_what_training_saw(which, root, in_training, request):
    loaded = load_model(request.getfixturevalue(which), device="cpu")
    assert loaded.image_aspect_ratio == "pad"
    expected = as_bytes(in_training)
    assert len(expected) > 20, "few of them are alike"
    with data_root_at(root):
        with seen_by(loaded) as found:
            evaluation = evaluate_tasks(loaded, SparsitySettings(), EvaluationOptions(("shapes_vqa",), 5))
        assert found == expected
        assert evaluation.summary()["image_aspect_ratio"] == "pad"
        with seen_by(loaded) as found:
            score_answers(loaded, root / "test_describe.json", root, batch_size=4)
        assert found == expected
    # Pictures that others opened, turned or not.
    opened = {name: Image.open(root / name) for name in PICTURES}
    for name, picture in opened.items():
        pixels = encode_prompts(loaded.processor, [QUESTION], [[picture]])["pixel_values"]
        assert torch.equal(pixels[0], in_training[name]), name
    with seen_by(loaded) as found:
        held = [Conversation(QUESTION, [Image.open(root / name)], lambda number, answers: None) for name in PICTURES]
        hold_conversations(loaded, held, {"max_new_tokens": 1}, {})
    assert found == expected
    if not loaded.is_dense:
        view = view_patches(loaded, open_picture(root / "wide.png"), QUESTION, "", 0, ("predictor",))
        seen = seen_picture(in_training["wide.png"], loaded.processor.image_processor)
        assert np.array_equal(np.asarray(view.picture), np.asarray(seen))


def test_pictures_of_lmms_evals_own_documents_are_opened_alike(trained, root, in_training, tmp_path):
    """They come opened, with what their files say of turns, and are refused before they are decoded."""
    lm = DynamicLlava(load_model(trained, device="cpu"))
    lm.task_dict["task"] = {"test": list(PICTURES)}
    for number, name in enumerate(PICTURES):
        _, pictures = lm._opened("task", "test", number, lambda name: [Image.open(root / name)])
        pixels = encode_prompts(lm.loaded.processor, [QUESTION], [pictures])["pixel_values"]
        assert torch.equal(pixels[0], in_training[name]), name
    for visual in (Image.new("1", (1, 20000)), "a video.mp4"):
        with pytest.raises(
            ValueError, match=r"document 1 of task cannot be read \((it is 1 x 20000|a picture is a str)"
        ):
            lm._opened("task", "test", 1, lambda name, visual=visual: [visual])


def test_prepared_documents_are_opened_alike(root, in_training):
    documents = [{"question": QUESTION, "image": str(root / name)} for name in PICTURES]
    processor = training_processor()
    for document, expected in zip(image_dataset(documents), in_training.values(), strict=True):
        # As lmms-eval's tasks do.
        pixels = encode_prompts(processor, [QUESTION], [[document["image"].convert("RGB")]])["pixel_values"]
        assert torch.equal(pixels[0], expected)


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "half.png"])
def test_evaluation_refuses_what_training_refuses(name, tmp_path):
    (tmp_path / name).write_bytes(REFUSED[name][0]())
    processor = training_processor()
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        # Some of them are too large when they are padded only.
        encode_prompts(processor, [QUESTION], [[open_picture(tmp_path / name)]])
    documents = image_dataset([{"image": str(tmp_path / name)}])
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        encode_prompts(processor, [QUESTION], [[documents[0]["image"]]])


def colours(pixels: torch.Tensor, processor) -> list[int]:
    """Share of red, green and blue in the middle line, in percent."""
    middle = np.asarray(seen_picture(pixels, processor.image_processor))[pixels.shape[1] // 2]
    return [round(100 * (middle.argmax(-1) == channel)[middle.max(-1) > 200].mean()) for channel in range(3)]


def test_all_of_a_wide_picture_is_seen_and_cut_only_where_asked_for(trained):
    for ratio, expected in (
        (None, [33, 33, 33]),
        ("pad", [33, 33, 33]),
        ("keep", [33, 33, 33]),
        ("square", [0, 100, 0]),
    ):
        loaded = load_model(trained, device="cpu", image_aspect_ratio=ratio)
        pixels = encode_prompts(loaded.processor, [QUESTION], [[stripes(300, 100)]])["pixel_values"][0]
        assert np.allclose(colours(pixels, loaded.processor), expected, atol=2)
        assert loaded.image_aspect_ratio == ("square" if ratio == "square" else "pad")
    with pytest.raises(ValueError, match=r"'anyres'; choose pad.*square.*keep"):
        load_model(trained, device="cpu", image_aspect_ratio="anyres")


@pytest.mark.parametrize("ratio", ["pad", "square"])
def test_the_dense_baseline_of_a_report_is_shown_what_the_run_is_shown(
    ratio, run_folder, dense_folder, root, tmp_path, monkeypatch
):
    run, loaded = tmp_path / "run", []
    shutil.copytree(run_folder, run)
    training_processor(image_aspect_ratio=ratio).save_pretrained(run)
    load = report.load_model
    monkeypatch.setattr(report, "load_model", lambda *args: loaded.append(load(*args)) or loaded[-1])
    monkeypatch.setattr(report, "word_view", lambda loaded: WordView(stripes(), QUESTION, ["a"], [True]))
    with data_root_at(root):
        options = EvaluationOptions(("shapes_vqa",), 8, limit=2)
        content = report.make_report(str(run), str(dense_folder), tmp_path / "report", options, 2, device="cpu")
    assert {model.is_dense: model.image_aspect_ratio for model in loaded} == {True: ratio, False: ratio}
    assert content["image_aspect_ratio"] == ratio


def test_answers_of_another_aspect_ratio_are_not_taken_over(trained):
    keys = []
    for ratio in ("pad", "square"):
        lm = DynamicLlava(load_model(trained, device="cpu", image_aspect_ratio=ratio))
        request = type("Request", (), {"args": ("?", {}, None, 0, "task", "test")})()
        keys += lm._response_keys([request])
    assert keys[0] != keys[1]
