"""The LLaVA JSON dataset and its collator: real layouts, bad input, padding."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import LlavaProcessor

from dynamic_llava.checkpoints.aspect_ratio import with_aspect_ratio
from dynamic_llava.data import IGNORE_INDEX, LlavaCollator, LlavaJsonDataset

from .conftest import talk
from .test_conversation import answers_of

Writer = Callable[[object], Path]

ONE = {"id": "one", "image": "a.png", "conversations": talk("<image>\nWhat is it?", "red")}
TWO = {
    "id": "two",
    "image": ["a.png", "b.png"],
    "conversations": talk("<image>\nWhat is it?", "red", "And this?\n<image>", "a blue cross"),
}
TEXT = {"id": 7, "conversations": talk("Is it red?", "yes")}


def test_shapes_go_through(shapes: Path, processor: LlavaProcessor) -> None:
    dataset = LlavaJsonDataset(shapes / "train.json", shapes, processor)
    assert len(dataset) == 48
    for sample, raw in zip((dataset[i] for i in range(8)), dataset.samples, strict=False):
        expected = [f" {turn['value']}</s>" for turn in raw["conversations"][1::2]]
        assert answers_of(sample["input_ids"].tolist(), sample["labels"].tolist(), processor) == expected
        assert sample["pixel_values"].shape == (1, 3, 128, 128)
        assert (sample["input_ids"] == processor.image_token_id).sum() == 64
    assert dataset.skipped == []


def test_one_two_or_no_pictures(write_samples: Writer, processor: LlavaProcessor) -> None:
    dataset = LlavaJsonDataset(write_samples([ONE, TWO, TEXT]), None, processor)
    one, two, text = (dataset[i] for i in range(3))
    assert [s["id"] for s in (one, two, text)] == ["one", "two", "7"]
    assert two["pixel_values"].shape == (2, 3, 128, 128)
    assert (two["input_ids"] == processor.image_token_id).sum() == 128
    assert answers_of(two["input_ids"].tolist(), two["labels"].tolist(), processor) == [" red</s>", " a blue cross</s>"]
    assert text["pixel_values"] is None
    assert torch.equal(one["pixel_values"], two["pixel_values"][:1])


def test_pixels_are_the_processors_own(write_samples: Writer, processor: LlavaProcessor) -> None:
    path = write_samples([ONE])
    picture = Image.open(path.parent / "a.png").convert("RGB")
    expected = processor(images=picture, text="<image>", return_tensors="pt")
    sample = LlavaJsonDataset(path, None, processor)[0]
    assert torch.equal(sample["pixel_values"], expected["pixel_values"])
    count = (expected["input_ids"] == processor.image_token_id).sum()
    assert (sample["input_ids"] == processor.image_token_id).sum() == count


def test_padding_to_a_square_keeps_the_whole_picture(write_samples: Writer, processor: LlavaProcessor) -> None:
    padding = with_aspect_ratio(processor, "pad")
    padded = LlavaJsonDataset(write_samples([ONE]), None, padding)[0]["pixel_values"][0]
    assert padded[:, :24].abs().max() < 0.03, "the mean colour is about zero after normalisation"
    assert padded[:, 48:80].std() > 0.1


@pytest.mark.parametrize(
    ("sample", "error", "parts"),
    [
        ({**ONE, "image": "gone.png"}, FileNotFoundError, ("'bad'", "gone.png", "image_folder")),
        ({**ONE, "image": ["a.png", "b.png"]}, ValueError, ("'bad'", "1 <image> for 2 pictures", "write <image>")),
        ({"conversations": ONE["conversations"]}, ValueError, ("'bad'", "1 <image> for 0 pictures", "write <image>")),
        ({**TEXT, "image": "a.png"}, ValueError, ("'bad'", "0 <image> for 1 pictures", "a.png")),
        ({**TEXT, "conversations": talk("Hi")}, ValueError, ("'bad'", "no answer", "add")),
        ({**TEXT, "conversations": "Hi"}, ValueError, ("'bad'", "non-empty list")),
        ({**ONE, "image": 5}, ValueError, ("'bad'", "'image' is 5", "list of paths")),
    ],
)
def test_bad_samples_are_named_at_once_or_skipped(
    write_samples: Writer, processor: LlavaProcessor, sample: dict, error: type[Exception], parts: tuple[str, ...]
) -> None:
    path = write_samples([ONE, {**sample, "id": "bad"}, TEXT])
    with pytest.raises(error) as caught:
        LlavaJsonDataset(path, None, processor)
    assert all(part in str(caught.value) for part in (*parts, path.name))
    dataset = LlavaJsonDataset(path, None, processor, on_bad_sample="skip")
    assert [dataset[i]["id"] for i in range(len(dataset))] == ["one", "7"]
    ((name, reason),) = dataset.skipped
    assert name == "bad"
    assert all(part in reason for part in parts)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_picture_raises_or_is_replaced_and_counted(
    write_samples: Writer, processor: LlavaProcessor, workers: int
) -> None:
    path = write_samples([ONE, {**ONE, "id": "bad", "image": "broken.png"}, TEXT])
    strict = LlavaJsonDataset(path, None, processor)
    with pytest.raises(ValueError, match=r"'bad'.*broken\.png cannot be read.*replace the file"):
        strict[1]
    dataset = LlavaJsonDataset(path, None, processor, on_bad_sample="skip")
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_name)
    assert list(loader) == ["one", "7", "7"]
    assert [name for name, _ in dataset.skipped] == ["bad"]
    assert "broken.png" in dataset.skipped[0][1]


def _name(sample: dict) -> str:
    return sample["id"]


def test_a_picture_that_vanishes_later_is_named(write_samples: Writer, processor: LlavaProcessor) -> None:
    path = write_samples([ONE])
    dataset = LlavaJsonDataset(path, None, processor)
    (path.parent / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"'one'.*a\.png"):
        dataset[0]


def test_overlong_samples_are_named(write_samples: Writer, processor: LlavaProcessor) -> None:
    dataset = LlavaJsonDataset(write_samples([ONE]), None, processor, max_length=60)
    with pytest.raises(ValueError, match=r"'one'.*max_length 60"):
        dataset[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [("[{", "not valid JSON"), ("{}", "JSON list"), ("[]", "non-empty"), ('["text"]', "'#0' is not an object")],
)
def test_bad_files_are_named(write_samples: Writer, processor: LlavaProcessor, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        LlavaJsonDataset(write_samples(content), None, processor)
    assert "samples.json" in str(caught.value)


def test_missing_file_unknown_policy_and_nothing_left(write_samples: Writer, processor: LlavaProcessor) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        LlavaJsonDataset("nowhere.json", None, processor)
    with pytest.raises(ValueError, match="'ignore'"):
        LlavaJsonDataset(write_samples([ONE]), None, processor, on_bad_sample="ignore")
    with pytest.raises(ValueError, match="no usable sample"):
        LlavaJsonDataset(write_samples([{"id": "x"}]), None, processor, on_bad_sample="skip")


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_and_stacks(write_samples: Writer, processor: LlavaProcessor, side: str) -> None:
    dataset = LlavaJsonDataset(write_samples([TEXT, TWO, ONE]), None, processor)
    samples = [dataset[i] for i in range(3)]
    batch = LlavaCollator(processor, padding_side=side)(samples)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert batch["pixel_values"].shape == (3, 3, 128, 128)
    assert torch.equal(batch["pixel_values"][:2], samples[1]["pixel_values"])
    length = len(samples[1]["input_ids"])
    assert batch["input_ids"].shape == (3, length)
    for row, sample in enumerate(samples):
        count = len(sample["input_ids"])
        mask = batch["attention_mask"][row].bool()
        assert mask.sum() == count
        assert mask[0 if side == "right" else -1]
        assert torch.equal(batch["input_ids"][row][mask], sample["input_ids"])
        assert torch.equal(batch["labels"][row][mask], sample["labels"])
        assert (batch["input_ids"][row][~mask] == processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][row][~mask] == IGNORE_INDEX).all()


def test_collator_without_pictures_and_its_errors(write_samples: Writer, processor: LlavaProcessor) -> None:
    dataset = LlavaJsonDataset(write_samples([TEXT]), None, processor)
    assert "pixel_values" not in LlavaCollator(processor)([dataset[0], dataset[0]])
    with pytest.raises(ValueError, match="'middle'"):
        LlavaCollator(processor, padding_side="middle")
    bare = copy(processor)
    bare.tokenizer = deepcopy(processor.tokenizer)
    bare.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad_token"):
        LlavaCollator(bare)


def test_require_image_leaves_out_text_only_samples(write_samples: Writer, processor: LlavaProcessor) -> None:
    dataset = LlavaJsonDataset(write_samples([ONE, TEXT, TWO]), None, processor, require_image=True)
    assert [dataset[i]["id"] for i in range(len(dataset))] == ["one", "two"]
    with pytest.raises(ValueError, match="no usable sample"):
        LlavaJsonDataset(write_samples([TEXT]), None, processor, require_image=True)
