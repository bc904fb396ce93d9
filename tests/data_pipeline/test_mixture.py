"""Weights, lengths without pictures, `require_image`, several answers as output, and Trainer's samplers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler
from transformers import LlavaProcessor

from dynamic_llava.data import IGNORE_INDEX, LengthGroupedSampler, LlavaCollator, LlavaJsonDataset, MixtureDataset
from dynamic_llava.data.mixture import chosen_positions
from dynamic_llava.token_masks import answer_token_mask

from .conftest import talk
from .test_conversation import answers_of
from .test_dataset import ONE, TEXT, TWO

Writer = Callable[[object], Path]


def test_weights_say_how_often_an_epoch_visits() -> None:
    for weight in (0.5, 1.0, 2.0, 2.25):
        chosen = chosen_positions(100, weight, seed=1)
        assert torch.equal(chosen, chosen_positions(100, weight, seed=1))
        assert len(chosen) == round(100 * weight)
        visits = Counter(chosen.tolist())
        assert set(visits.values()) <= {int(weight), int(weight) + 1}
    assert not torch.equal(chosen_positions(100, 0.5, seed=1), chosen_positions(100, 0.5, seed=2))
    assert set(chosen_positions(100, 1.0, seed=3).tolist()) == set(range(100))


def test_a_mixture_is_its_parts(write_samples: Writer, processor: LlavaProcessor) -> None:
    first = LlavaJsonDataset(write_samples([ONE, TEXT]), None, processor)
    second = LlavaJsonDataset(write_samples([TWO, {"id": "bad"}]), None, processor, on_bad_sample="skip")
    mixture = MixtureDataset([first, second], [1, 3])
    assert [mixture[i]["id"] for i in range(5)] == ["one", "7", "two", "two", "two"]
    assert mixture.lengths == [len(mixture[i]["input_ids"]) for i in range(5)]
    assert mixture.full_lengths == mixture.lengths
    assert [name for name, _ in mixture.skipped] == ["bad"]
    assert len(MixtureDataset([first, second], [0.5, 1], seed=4)) == 2
    with pytest.raises(ValueError, match="no sample is left of 1 with weights"):
        MixtureDataset([second], [0.1])
    with pytest.raises(ValueError, match="1 weights for 2"):
        MixtureDataset([first, second], [1])
    with pytest.raises(ValueError, match="at least one"):
        MixtureDataset([], [])
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"weight {weight} must be above 0"):
            MixtureDataset([first], [weight])


def test_lengths_open_no_picture(write_samples: Writer, processor: LlavaProcessor) -> None:
    three = {
        **TWO,
        "id": "three",
        "image": ["a.png"] * 3,
        "conversations": talk("<image><image>?", "a", "<image>", "b"),
    }
    path = write_samples([ONE, TEXT, TWO, three])
    dataset = LlavaJsonDataset(path, None, processor)
    expected = [len(dataset[i]["input_ids"]) for i in range(4)]
    for picture in path.parent.glob("*.png"):
        picture.unlink()
    unopened = LlavaJsonDataset(path, None, processor, check_files=False)
    assert unopened.lengths == expected
    short = LlavaJsonDataset(path, None, processor, check_files=False, max_length=100)
    assert short.full_lengths == expected
    assert short.lengths == [min(length, 100) for length in expected]
    assert LlavaJsonDataset(write_samples([TEXT]), None, processor).lengths == [expected[1]]


def test_shapes_have_their_lengths(shapes: Path, processor: LlavaProcessor) -> None:
    dataset = LlavaJsonDataset(shapes / "train.json", shapes, processor)
    assert dataset.lengths == [len(dataset[i]["input_ids"]) for i in range(len(dataset))]


def test_pictures_behind_the_cut_go(write_samples: Writer, processor: LlavaProcessor) -> None:
    path = write_samples([TWO])
    whole = LlavaJsonDataset(path, None, processor)[0]
    second = (whole["input_ids"] == processor.image_token_id).nonzero().flatten()[64].item()
    for max_length in (second, second + 1, second + 63):
        cut = LlavaJsonDataset(path, None, processor, max_length=max_length)[0]
        assert torch.equal(cut["input_ids"], whole["input_ids"][:second])
        assert torch.equal(cut["pixel_values"], whole["pixel_values"][:1])
        assert answers_of(cut["input_ids"].tolist(), cut["labels"].tolist(), processor) == [" red</s>"]
    late = {"id": "late", "image": "a.png", "conversations": talk("Is it?", "yes", "<image>", "red")}
    dataset = LlavaJsonDataset(write_samples([late]), None, processor, max_length=80)
    assert dataset[0]["pixel_values"] is None
    assert (dataset[0]["input_ids"] == processor.image_token_id).sum() == 0


@pytest.mark.parametrize("sampler", ["random", "group_by_length"])
def test_every_image_row_is_visited_once_per_epoch(shapes: Path, processor: LlavaProcessor, sampler: str) -> None:
    dataset = LlavaJsonDataset(shapes / "train.json", shapes, processor, require_image=True)
    samplers = {
        "random": RandomSampler(dataset),
        "group_by_length": LengthGroupedSampler(dataset.lengths, 8),
    }
    loader = DataLoader(dataset, batch_size=8, sampler=samplers[sampler], collate_fn=list)
    visits = Counter(sample["id"] for batch in loader for sample in batch)
    assert visits == Counter({sample["id"]: 1 for sample in dataset.samples})


def test_grouping_by_length_depends_on_seed_and_epoch_alone() -> None:
    lengths = torch.randint(50, 2000, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroupedSampler(lengths, 8, seed=3)
    loader = prepare_data_loader(DataLoader(range(400), batch_size=8, sampler=sampler))

    def order(epoch: int) -> list[int]:
        loader.set_epoch(epoch)
        return [index for batch in loader for index in batch.tolist()]

    first, second = order(0), order(1)
    assert sorted(first) == sorted(second) == list(range(400))
    assert first != second
    torch.manual_seed(7)
    assert order(0) == first
    assert order(1) == second
    spread = [max(own) - min(own) for own in torch.tensor(lengths)[first].view(-1, 8).tolist()[1:]]
    assert sum(spread) / len(spread) < 400
    assert max(lengths) == lengths[first[0]], "the longest comes first, so that a lack of memory shows at once"
    for bad in (([], 8), ([5], 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            LengthGroupedSampler(*bad)


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_answers_as_output(write_samples: Writer, processor: LlavaProcessor, side: str) -> None:
    path = write_samples([ONE, TEXT, TWO])
    last = LlavaJsonDataset(path, None, processor)
    every = LlavaJsonDataset(path, None, processor, output_turns="all")
    collate = LlavaCollator(processor, padding_side=side)
    samples = [every[i] for i in range(3)]
    batch, plain = collate(samples), collate([last[i] for i in range(3)])
    assert "output_mask" not in plain
    assert torch.equal(batch["output_mask"], batch["labels"] != IGNORE_INDEX)
    assert torch.equal(batch["labels"], plain["labels"]), "labels teach every answer in both"
    judged = answer_token_mask(plain["labels"], plain["attention_mask"])
    assert (judged.sum(-1) <= batch["output_mask"].sum(-1)).all()
    assert torch.equal(judged[:2], batch["output_mask"][:2]), "rows of one answer are the same"
    assert judged[2].sum() < batch["output_mask"][2].sum()
    with pytest.raises(ValueError, match="'first'"):
        LlavaJsonDataset(path, None, processor, output_turns="first")
