"""Cropping a cache: whatever comes next is as if the forgotten tokens had never been fed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dynamic_llava import SparseCache
from dynamic_llava.statistics import SparsityStatistics

from .tiny import IMAGE_TOKEN, image_run, pictures, tiny_model, words

MODES = [{}, {}, {"output_keep_rate": 0.4}, {"output_sparsity": False}, {"image_keep_rate": 1.0}]


@dataclass
class Call:
    """One call on a cache, by row: its tokens, what its mask shows of all columns so far, and its pictures."""

    ids: list[list[int]]
    mask: list[list[int]] | None
    images: list[Tensor | None]
    arguments: dict

    def feed(self, model, cache: SparseCache):
        inputs = {"input_ids": torch.tensor(self.ids), **self.arguments}
        if self.mask is not None:
            inputs["attention_mask"] = torch.tensor(self.mask)
        found = [image for image in self.images if image is not None]
        if found:
            inputs["pixel_values"] = torch.cat(found)
        with torch.no_grad():
            return model(**inputs, past_key_values=cache, use_cache=True)

    def rows(self, order: list[int]) -> Call:
        mask = None if self.mask is None else [self.mask[row] for row in order]
        return Call([self.ids[row] for row in order], mask, [self.images[row] for row in order], self.arguments)

    def cut(self, columns: int) -> Call:
        """Its first tokens alone, `columns` fewer."""
        mask = None if self.mask is None else [row[:-columns] for row in self.mask]
        return Call([row[:-columns] for row in self.ids], mask, self.images, self.arguments)


class Talk:
    """A random conversation on a cache, and what a cache that never saw the forgotten parts would have been fed."""

    def __init__(self, model, seed: int) -> None:
        self.random = random.Random(seed)
        self.model = model
        self.batch = self.random.choice([1, 2, 3])
        self.masked = self.random.random() < 0.8
        self.same_storage = True
        self.present: list[list[int]] = [[] for _ in range(self.batch)]
        self.history: list[Call] = []
        self.cache = SparseCache(model.config, block_size=self.random.choice([1, 4, 64]))

    @property
    def seen(self) -> int:
        return sum(len(call.ids[0]) for call in self.history)

    def call(self, with_images: bool, length: int, arguments: dict) -> Call:
        rows, images = [], []
        for _ in range(self.batch):
            row = words(self.random.randint(1, length), self.random.randrange(10**6))
            image = None
            if with_images and self.random.random() < 0.7:
                image = pictures(1, self.random.randrange(10**6))
                place = self.random.randint(0, len(row))
                row = row[:place] + image_run() + row[place:]
            rows.append(row)
            images.append(image)
        width = max(map(len, rows))
        if not self.masked:
            rows = [row + words(width - len(row), 3) for row in rows]
        left = self.random.random() < 0.5
        ids, mask = [], []
        for row, present in zip(rows, self.present, strict=True):
            gap = [0] * (width - len(row))
            ids.append(gap + row if left else row + gap)
            present += gap + [1] * len(row) if left else [1] * len(row) + gap
            mask.append(list(present))
        return Call(ids, mask if self.masked else None, images, arguments)

    def hide(self) -> None:
        """From now on the masks leave out some of the tokens that earlier ones showed."""
        for present in self.present:
            for column in range(1, len(present)):
                if self.random.random() < 0.2:
                    present[column] = 0

    def run(self, call: Call) -> None:
        call.feed(self.model, self.cache)
        self.history.append(call)

    def allowed(self) -> list[int]:
        """Lengths to crop to: none cuts a picture, or leaves one token of a turn, which would be an output token."""
        lengths, start = [0], 0
        for call in self.history:
            width = len(call.ids[0])
            behind = max((width - row[::-1].index(IMAGE_TOKEN) for row in call.ids if IMAGE_TOKEN in row), default=1)
            lengths += [start + n for n in range(max(behind, min(2, width)), width + 1)]
            start += width
        return lengths

    def crop(self, length: int | None = None) -> None:
        length = self.random.choice(self.allowed()) if length is None else length
        self.cache.crop(length - self.seen)
        for present in self.present:
            del present[length:]
        while self.seen > length:
            surplus, last = self.seen - length, self.history.pop()
            if surplus < len(last.ids[0]):
                self.history.append(last.cut(surplus))
                # A dropped image token at the end passes through a slot that it gives up again.
                self.same_storage &= all(row[-1] != IMAGE_TOKEN for row in self.history[-1].ids)

    def reorder(self) -> None:
        order = [self.random.randrange(self.batch) for _ in range(self.batch)]
        self.cache.reorder_cache(torch.tensor(order))
        self.follow(order)

    def follow(self, order: list[int]) -> None:
        self.batch = len(order)
        self.present = [list(self.present[row]) for row in order]
        self.history = [call.rows(order) for call in self.history]
        # Rows that are gone may have been those that were padded, or that the storage grew for.
        self.same_storage = False

    def step(self) -> None:
        arguments = self.random.choice(MODES)
        choice = self.random.choice(["turn", "turn", "picture", "hide", "steps", "steps", "crop", "crop", "reorder"])
        if choice == "crop" and self.history:
            self.crop()
        elif choice == "reorder" and self.history:
            self.reorder()
        elif choice == "steps" and self.history:
            for _ in range(self.random.randint(1, 5)):
                self.run(self.call(False, 1, arguments))
        elif choice == "hide" and self.masked:
            self.hide()
            self.run(self.call(False, 6, arguments))
        else:
            self.run(self.call(choice == "picture", 6, arguments))

    def never_fed(self) -> SparseCache:
        cache = SparseCache(self.model.config, block_size=self.cache.table.block_size)
        for call in self.history:
            call.feed(self.model, cache)
        return cache


def assert_same(one: SparseCache, two: SparseCache, storage: bool) -> None:
    assert one.get_seq_length() == two.get_seq_length()
    assert one.started == two.started
    if not one.started:
        return
    found, expected = (vars(SparsityStatistics.of(cache)) for cache in (one, two))
    if storage:
        assert one.table.has_padding == two.table.has_padding
        assert torch.equal(one.table.cursor, two.table.cursor)
    else:
        del found["kv_bytes"], expected["kv_bytes"]
    for name, value in expected.items():
        assert torch.equal(value, found[name]) if isinstance(value, Tensor) else value == found[name], name
    torch.testing.assert_close(one.table.state, two.table.state, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("seed", range(60))
def test_a_crop_is_exact_in_random_conversations(model, seed):
    talk = Talk(model, seed)
    for _ in range(10):
        talk.step()
    if talk.history:
        talk.crop()
    other = talk.never_fed()
    assert_same(talk.cache, other, talk.same_storage)
    if talk.masked:
        talk.hide()
    for number in range(5):
        arguments = MODES[(seed + number) % len(MODES)]
        call = talk.call(number == 2, 5 if number in (0, 2) else 1, arguments)
        one, two = call.feed(model, talk.cache), call.feed(model, other)
        torch.testing.assert_close(one.logits, two.logits, atol=2e-4, rtol=1e-4)
        for name in ("image_keep_mask", "output_keep_mask"):
            masks = getattr(one, name), getattr(two, name)
            assert masks[0] is masks[1] is None or torch.equal(*masks), name
        assert_same(talk.cache, other, talk.same_storage)


def test_crops_outside_of_what_can_be_undone(model):
    call = Call([[1, *words(3, 1), *image_run(), *words(4, 2)]], None, [pictures(1)], {})
    cache = SparseCache(model.config)
    cache.crop(-3)
    first = SparseCache(model.config)
    Call([words(5, 3)], None, [None], {}).feed(model, first)
    call.feed(model, first)
    call.feed(model, cache)
    with pytest.raises(ValueError, match="among tokens 0 to 19; crop to 0 tokens, or to 20 or more"):
        cache.crop(-5)
    with pytest.raises(ValueError, match="among tokens 5 to 24"):
        first.crop(-10)
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(3)
    assert cache.get_seq_length() == 24
    # What was refused changed nothing; whole turns and what lies behind a picture go.
    first.crop(-24)
    assert first.get_seq_length() == 5
    cache.crop(-4)
    assert cache.table.stored(4).all()
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    assert not cache.started
    assert cache.memory_bytes() == 0


def test_a_selected_and_repeated_cache_is_cropped_the_same(model):
    talk = Talk(model, 5)
    talk.follow([0, 0, 0])
    for _ in range(4):
        talk.run(talk.call(False, 6, {}))
    talk.cache.batch_select_indices(torch.tensor([True, False, True]))
    talk.cache.batch_repeat_interleave(2)
    talk.follow([0, 0, 2, 2])
    talk.crop(talk.seen - 7)
    other = talk.never_fed()
    assert_same(talk.cache, other, storage=False)
    call = talk.call(False, 6, {})
    one, two = (call.feed(model, cache).logits for cache in (talk.cache, other))
    torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-4)
