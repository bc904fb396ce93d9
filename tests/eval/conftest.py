"""A few pictures with questions and descriptions, and two tiny random models with the processor of tiny-llava."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, SparsityConfig
from dynamic_llava.checkpoints.loaded import LoadedModel, load_model

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "tiny-llava"
OBJECTS = (("red", "circle"), ("blue", "square"), ("green", "circle"), ("yellow", "square"))


def _conversation(name: str, image: str, kind: str, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "kind": kind, "conversations": turns}


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory) -> Path:
    """Data in the layout of `build_shapes`: 8 questions of two kinds and 4 descriptions of unequal length."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "images" / "test").mkdir(parents=True)
    questions, descriptions = [], []
    for index, (colour, shape) in enumerate(OBJECTS):
        image = f"images/test/{index}.png"
        picture = Image.new("RGB", (128, 128), (220, 220, 220))
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if shape == "circle" else draw.rectangle)((20 * index, 30, 20 * index + 40, 70), fill=colour)
        picture.save(root / image)
        questions.append(_conversation(f"q{index}", image, "colour", f"What colour is the {shape}?", colour))
        longer = f"What shape is the {colour} object in the picture?"
        questions.append(_conversation(f"s{index}", image, "shape", longer, shape))
        text = " ".join([f"There is a {colour} {shape}."] * (index + 1))
        descriptions.append(_conversation(f"d{index}", image, "describe", "Describe the picture in detail.", text))
    (root / "test_vqa.json").write_text(json.dumps(questions))
    (root / "test_describe.json").write_text(json.dumps(descriptions))
    return root


def _parts(vocabulary: int) -> dict:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=128, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return {"vision_config": vision, "text_config": text, "image_token_index": 4, "image_seq_length": 64}


def _save(model, folder: Path) -> Path:
    model.generation_config.pad_token_id = 3
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(ASSETS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory) -> Path:
    """A random stock LLaVA."""
    torch.manual_seed(0)
    vocabulary = len(AutoProcessor.from_pretrained(ASSETS).tokenizer)
    return _save(LlavaForConditionalGeneration(LlavaConfig(**_parts(vocabulary))), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A random Dynamic-LLaVA whose output predictor keeps some tokens and drops others."""
    torch.manual_seed(1)
    vocabulary = len(AutoProcessor.from_pretrained(ASSETS).tokenizer)
    sparsity = SparsityConfig(predictor_dim=32, predictor_ffn_dim=32, predictor_num_heads=2, predictor_num_layers=1)
    model = DynamicLlavaForConditionalGeneration(DynamicLlavaConfig(**_parts(vocabulary), sparsity=sparsity))
    return _save(model, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def dense(dense_folder) -> LoadedModel:
    return load_model(dense_folder, device="cpu")


@pytest.fixture(scope="session")
def run(run_folder) -> LoadedModel:
    return load_model(run_folder, device="cpu")
