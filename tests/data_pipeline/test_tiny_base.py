"""The asset loads with stock transformers and answers; its settings and helpers hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava.data.shapes.scene import sample_split_scene
from tools.tiny_base.build import build_model, build_tokenizer
from tools.tiny_base.config import TextShape, TinyBaseConfig, VisionShape, load_config
from tools.tiny_base.decoder import EncodedConversation, predict
from tools.tiny_base.evaluate import held_out, object_patches, random_patches, score
from tools.tiny_base.saving import save_asset
from tools.tiny_base.tower import cache_features, draw_pictures, normalise, patch_labels

from .conftest import ASSET

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base() -> LlavaForConditionalGeneration:
    """The tiny base, as stock transformers loads it."""
    return AutoModelForImageTextToText.from_pretrained(ASSET).eval()


def test_asset_is_small_and_in_llava_layout(base: LlavaForConditionalGeneration) -> None:
    assert sum(path.stat().st_size for path in ASSET.rglob("*")) < 10e6
    config = base.config
    assert (config.model_type, config.vision_config.model_type, config.text_config.model_type) == (
        "llava",
        "clip_vision_model",
        "llama",
    )
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.text_config.num_hidden_layers >= 6
    assert (ASSET / "model.safetensors").is_file()


def test_special_tokens_agree(base: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    assert processor.image_token_id == base.config.image_token_id
    assert tokenizer.eos_token_id == base.generation_config.eos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, processor.image_token_id}) == 4
    assert tokenizer.decode(tokenizer.encode("Füße, 猫 & 1+1", add_special_tokens=False)) == "Füße, 猫 & 1+1"


def test_generate_answers_held_out_questions(
    base: LlavaForConditionalGeneration, processor: LlavaProcessor, shapes: Path
) -> None:
    rows = json.loads((shapes / "test_vqa.json").read_text())
    right = 0
    for row in rows:
        text = row["conversations"][0]["value"].removeprefix("<image>\n")
        content = [{"type": "image", "image": Image.open(shapes / row["image"])}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = base.generate(**inputs, max_new_tokens=4, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        right += answer == row["conversations"][1]["value"]
    assert right / len(rows) >= 0.85, "a few pictures only: the model card has the measured accuracy"


def test_few_well_chosen_tokens_beat_random_ones(
    base: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    rng = np.random.default_rng(5)
    pictures = draw_pictures([sample_split_scene(rng, "test") for _ in range(24)])
    features = cache_features(base.model.vision_tower, pictures, processor)
    samples = held_out(pictures.scenes, processor.tokenizer, 64, seed=0)
    chosen = score(base, features, samples, object_patches(pictures.scenes, 12))
    random = score(base, features, samples, random_patches(24, 64, 12, seed=0))
    base.eval()
    assert chosen.accuracy > random.accuracy + 0.05
    assert chosen.perplexity < random.perplexity


def test_cached_forward_equals_the_whole_model(base: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    rng = np.random.default_rng(6)
    pictures = draw_pictures([sample_split_scene(rng, "test") for _ in range(2)])
    features = cache_features(base.model.vision_tower, pictures, processor).float()
    samples: list[EncodedConversation] = held_out(pictures.scenes, processor.tokenizer, 64, seed=0).descriptions
    with torch.no_grad():
        logits, _, rows = predict(base, features, samples)
        whole = base(
            input_ids=torch.tensor([samples[0].input_ids]), pixel_values=normalise(pictures.pixels[:1], processor)
        ).logits[0, :-1]
    learned = torch.tensor(samples[0].labels[1:]) != -100
    torch.testing.assert_close(logits[rows == 0], whole[learned], atol=5e-2, rtol=0)


def test_normalise_is_the_image_processor(processor: LlavaProcessor) -> None:
    pictures = draw_pictures([sample_split_scene(np.random.default_rng(0), "test")])
    expected = processor.image_processor(images=Image.fromarray(pictures.pixels[0]), return_tensors="pt")
    torch.testing.assert_close(normalise(pictures.pixels, processor), expected["pixel_values"])


def test_patch_labels_know_each_object() -> None:
    scene = sample_split_scene(np.random.default_rng(1), "train")
    labels, centres = patch_labels([scene])
    assert (labels["centre"] == 1).sum() == len(scene.objects)
    assert set(labels["colour"][0].tolist()) - {-100} == set(labels["colour"][0][labels["object"][0] == 1].tolist())
    assert len(set(labels["colour"][0].tolist()) - {-100}) == len(scene.objects)
    assert (~centres.isnan()).any(-1).sum() == (labels["colour"] != -100).sum()


def test_config_file_is_read_and_checked(tmp_path: Path) -> None:
    config = load_config(ROOT / "tools" / "tiny_base" / "tiny_base.yaml")
    assert config.text.num_hidden_layers >= 6
    path = tmp_path / "config.yaml"
    path.write_text("tower: {step: 5}")
    with pytest.raises(ValueError, match=r"Unknown key 'step'.*steps"):
        load_config(path)
    path.write_text("rope_theta: 1e6")
    assert load_config(path).rope_theta == 1e6
    for wrong in ("many", "-1", "0", ".nan", ".inf", "true", "[1]"):
        for key in ("rope_theta", "pictures"):
            path.write_text(f"{key}: {wrong}")
            with pytest.raises(ValueError, match=rf"{key} (must be|takes)"):
                load_config(path)
    path.write_text("tower: 5")
    with pytest.raises(ValueError, match="mapping"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_asset_is_replaced_whole(tmp_path: Path, processor: LlavaProcessor) -> None:
    tokenizer = build_tokenizer(0)
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab(), "the asset's tokenizer is the one that is built"
    small = TinyBaseConfig(
        vision=VisionShape(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16),
        text=TextShape(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16),
    )
    model = build_model(small, tokenizer)
    for card in ("first", "second"):
        save_asset(tmp_path / "asset", model, processor, card)
    assert (tmp_path / "asset" / "README.md").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["asset"]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "asset")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert AutoProcessor.from_pretrained(tmp_path / "asset").patch_size == processor.patch_size
