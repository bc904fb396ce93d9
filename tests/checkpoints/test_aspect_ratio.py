"""A processor says how pictures become square: of published checkpoints, of runs old and new, and after conversions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from dynamic_llava.checkpoints import load_processor
from dynamic_llava.checkpoints.aspect_ratio import IMAGE_ASPECT_RATIOS, aspect_ratio_of, with_aspect_ratio
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.checkpoints.loaded import evaluation_processor
from dynamic_llava.config import keys_of
from dynamic_llava.eval.keys import EvalOptions
from dynamic_llava.train import keys
from dynamic_llava.train.config import load_config

from ..odd_pictures import noisy, stripes
from .writing import model_of, write_published

TINY = Path(__file__).parents[2] / "assets" / "tiny-llava"


def pixels(processor: LlavaProcessor, picture: Image.Image) -> torch.Tensor:
    return processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]


def padded_by_hand(picture: Image.Image) -> Image.Image:
    """LLaVA's `expand2square`, with CLIP's mean colour."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


@pytest.mark.parametrize("size", [(80, 40), (33, 81), (300, 1), (1, 299), (64, 64), (233, 700), (36, 35), (35, 36)])
def test_padding_is_llavas_bit_for_bit(size):
    plain, picture = AutoProcessor.from_pretrained(TINY), noisy(size)
    padding, cutting = (with_aspect_ratio(plain, ratio) for ratio in ("pad", "square"))
    assert torch.equal(pixels(padding, picture), pixels(plain, padded_by_hand(picture)))
    assert torch.equal(pixels(cutting, picture), pixels(plain, picture))
    assert aspect_ratio_of(plain) is None, "the processor that was given stays as it was"


def test_a_processor_says_it_when_it_is_saved_and_keeps_it(tmp_path):
    for ratio, kept in (("pad", "pad"), ("square", "square"), ("keep", "square")):
        with_aspect_ratio(AutoProcessor.from_pretrained(TINY), ratio).save_pretrained(tmp_path / ratio)
        for loaded in (AutoProcessor.from_pretrained(tmp_path / ratio), load_processor(TINY)):
            loaded = loaded if aspect_ratio_of(loaded) else with_aspect_ratio(loaded, ratio)
            assert aspect_ratio_of(loaded) == kept
            assert aspect_ratio_of(with_aspect_ratio(loaded, "keep")) == kept


@pytest.mark.parametrize("word", ["anyres", "anyres_max_9", "Pad", "PAD", "", "true", True, False, 1, ["pad"], {}])
def test_other_words_are_refused_naming_those_that_are_known(word, tmp_path):
    with pytest.raises(ValueError, match=r"choose pad.*square.*keep"):
        with_aspect_ratio(AutoProcessor.from_pretrained(TINY), word)
    values = {"base_model": str(TINY), "train_file": ["a.json"], "image_aspect_ratio": word}
    (tmp_path / "a.yaml").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="image_aspect_ratio"):
        load_config(tmp_path / "a.yaml", ["use_cpu=true"])


def test_the_words_of_the_command_lines_are_those_of_the_processor():
    assert keys.IMAGE_ASPECT_RATIOS == IMAGE_ASPECT_RATIOS
    assert keys_of((EvalOptions,))["image_aspect_ratio"].choices == IMAGE_ASPECT_RATIOS


def published(folder: Path, **config) -> Path:
    """A published checkpoint with the tokenizer of the tiny base, and no processor."""
    write_published(model_of(), folder, **config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


@pytest.mark.parametrize(
    ("said", "expected"), [("pad", "pad"), ("square", "square"), (None, "square"), ("", "square")], ids=str
)
def test_published_checkpoints_do_what_llava_does_with_them(said, expected, tmp_path):
    folder = published(tmp_path / "m", image_aspect_ratio=said)
    assert aspect_ratio_of(load_processor(folder)) == expected
    assert aspect_ratio_of(evaluation_processor(folder)) == expected
    for layout in ("ours", "llava-hf"):
        convert(folder, tmp_path / layout, layout)
        saved = AutoProcessor.from_pretrained(tmp_path / layout)
        assert torch.equal(pixels(saved, stripes()), pixels(load_processor(folder), stripes()))
        assert aspect_ratio_of(saved) == expected


def test_published_checkpoints_with_pictures_in_tiles_are_refused(tmp_path):
    for word, message in (("anyres", "LLaVA-NeXT.*image_aspect_ratio='anyres'"), ("Pad", r"config\.json is 'Pad'")):
        with pytest.raises(ValueError, match=message):
            load_processor(published(tmp_path / word, image_aspect_ratio=word))


def old_run(folder: Path, config: str | None) -> Path:
    """As earlier versions saved them: a processor that says nothing, beside the configuration of the run."""
    shutil.copytree(TINY, folder)
    if config is not None:
        (folder / "train_config.yaml").write_text(config)
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("image_aspect_ratio: pad\n", "pad"),
        ("learning_rate: 1e-4\n", "pad"),
        ("image_aspect_ratio:\n", "pad"),
        ("image_aspect_ratio: keep\n", "square"),
        ("image_aspect_ratio: anyres\n", "square"),
    ],
)
def test_runs_of_earlier_versions_are_shown_what_they_were_trained_on(config, expected, tmp_path, caplog):
    run = old_run(tmp_path / "run", config)
    checkpoint = old_run(run / "checkpoint-20", None)
    for folder in (run, checkpoint):
        assert aspect_ratio_of(load_processor(folder)) == expected
        assert aspect_ratio_of(evaluation_processor(folder)) == expected
    for layout in ("ours", "llava-hf"):
        convert(run, tmp_path / layout, layout)
        assert aspect_ratio_of(AutoProcessor.from_pretrained(tmp_path / layout)) == expected
    convert(run, tmp_path / "published", "published")
    assert json.loads((tmp_path / "published" / "config.json").read_text())["image_aspect_ratio"] == expected
    assert aspect_ratio_of(load_processor(tmp_path / "published")) == expected


def test_what_a_processor_says_goes_before_the_configuration_beside_it(tmp_path):
    run = old_run(tmp_path / "run", "image_aspect_ratio: pad\n")
    with_aspect_ratio(AutoProcessor.from_pretrained(TINY), "square").save_pretrained(run)
    assert aspect_ratio_of(load_processor(run)) == "square"


def test_a_broken_configuration_of_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train_config\.yaml is not valid YAML"):
        load_processor(old_run(tmp_path / "run", "a: [b\n"))


def test_stock_checkpoints_stay_as_they_are_but_are_evaluated_padded():
    assert aspect_ratio_of(load_processor(TINY)) is None
    assert aspect_ratio_of(evaluation_processor(TINY)) == "pad"
    for ratio in IMAGE_ASPECT_RATIOS:
        assert aspect_ratio_of(evaluation_processor(TINY, ratio)) == ("pad" if ratio == "pad" else "square")
