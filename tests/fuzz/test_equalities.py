"""Random conversations: a row of a batch equals the row alone, in each spelling, cache, mode and turn.

`DYNAMIC_LLAVA_EQUALITIES=5000` runs so many cases (default 150), `DYNAMIC_LLAVA_EQUALITY_CASE=1234` that one alone.
"""

from __future__ import annotations

import os
import random
from functools import cache as cached

import pytest
import torch

from dynamic_llava import SparseCache
from dynamic_llava.statistics import SparsityStatistics

from ..tiny import batch_of, image_run, pad_rows, pictures, tiny_model, words

CASES = int(os.environ.get("DYNAMIC_LLAVA_EQUALITIES", 150))
ONE = os.environ.get("DYNAMIC_LLAVA_EQUALITY_CASE")
MODELS = (
    {},
    {"attention": "eager"},
    {"kv_heads": 4, "sparse_layer": 1},
    {"sparse_layer": 4, "image_keep_rate": 0.1},
    {"output_predictor": False},
    {"image_predictor": False},
    {"image_selection": "threshold"},
    {"image_selection": "diverse", "output_offsets": {"0.2": -1.0, "0.6": 0.4}},
)
COUNTS = ("image_tokens", "image_tokens_kept", "output_tokens", "output_tokens_kept")


@cached
def model_of(number: int):
    return tiny_model(seed=number, **MODELS[number])


class Case:
    """One random conversation of a few rows, and how it is asked."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.number = self.random.randrange(len(MODELS))
        self.model = model_of(self.number)
        self.rows, self.images = zip(
            *[self._prompt(seed * 10 + n) for n in range(self.random.randint(1, 4))], strict=True
        )
        self.steps = self.random.randint(2, 10)
        self.drops = self._drops()
        self.side = self.random.choice(["left", "right"])

    def _prompt(self, seed: int) -> tuple[list[int], torch.Tensor | None]:
        row, number = [1], self.random.choice([0, 1, 1, 2])
        for _ in range(number):
            row += words(self.random.randint(0, 6), self.random.randrange(999)) + image_run()
        row += words(self.random.randint(int(number == 0), 6), self.random.randrange(999))
        return row, pictures(number, seed) if number else None

    def _drops(self) -> dict:
        """Per-call arguments that this model can follow."""
        options: list[dict] = [{}]
        sparsity = self.model.config.sparsity
        if sparsity.image_predictor and sparsity.image_selection != "threshold":
            options += [{"image_keep_rate": rate} for rate in (0.05, 0.5, 1.0)]
            options += [{"image_selection": selection} for selection in ("threshold", "diverse")]
        if sparsity.output_predictor:
            options += [{"output_sparsity": False}, {"output_keep_rate": 0.3}, {"output_keep_rate": 1.0}]
        drops: dict = {}
        for chosen in self.random.sample(options, min(2, len(options))):
            # Two that contradict each other are refused; here the first counts.
            if not {name.split("_")[0] for name in drops} & {name.split("_")[0] for name in chosen}:
                drops |= chosen
        return drops

    def words(self, least: int, most: int) -> list[int]:
        return words(self.random.randint(least, most), self.random.randrange(999))

    def call(self, **more) -> dict:
        return {
            "do_sample": False,
            "pad_token_id": 0,
            "min_new_tokens": self.steps,
            "max_new_tokens": self.steps,
            **self.drops,
            **more,
        }

    def generate(self, chosen, side: str = "left", **more):
        batch = batch_of([self.rows[n] for n in chosen], [self.images[n] for n in chosen], side)
        return self.model.generate(**self.spell(batch), **self.call(**more), return_dict_in_generate=True)

    def spell(self, batch: dict) -> dict:
        """The same call, with positions or not, as input_ids or inputs."""
        batch = dict(batch)
        if self.random.random() < 0.3:
            batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        if self.random.random() < 0.3:
            batch["inputs"] = batch.pop("input_ids")
        if self.random.random() < 0.3:
            batch["attention_mask"] = batch["attention_mask"].bool()
        return batch


def check_rows_and_caches(case: Case) -> None:
    """Batch = single, cached = uncached, dynamic = fixed = blocks of one."""
    beams = {"num_beams": case.random.choice([1, 1, 2, 3])}
    everything = range(len(case.rows))
    together = case.generate(everything, case.side, **beams, return_sparsity=True)
    kinds = [{"use_cache": False}]
    if beams["num_beams"] == 1:
        kinds += [{"cache_implementation": "static"}, {"past_key_values": SparseCache(case.model.config, block_size=1)}]
    for kind in kinds:
        other = case.generate(everything, "left", **beams, **kind)
        assert torch.equal(other.sequences, together.sequences), kind
    for number in everything:
        alone = case.generate([number], **beams, return_sparsity=True)
        assert torch.equal(together.sequences[number, -case.steps :], alone.sequences[0, -case.steps :]), number
        for name in COUNTS:
            assert getattr(together.sparsity, name)[number] == getattr(alone.sparsity, name)[0], (number, name)


def check_scoring(case: Case) -> None:
    """One forward with labels gives the logits of decoding step by step, with padding on either side."""
    answers = [case.words(case.steps, case.steps) for _ in case.rows]
    full = [row + answer for row, answer in zip(case.rows, answers, strict=True)]
    ignored = [[-100] * len(row) + answer for row, answer in zip(case.rows, answers, strict=True)]
    labels, _ = pad_rows(ignored, case.side, fill=-100)
    batch = batch_of(full, case.images, case.side)
    with torch.no_grad():
        scored = case.model(**batch, labels=labels, **case.drops).logits
        for number, (row, image) in enumerate(zip(case.rows, case.images, strict=True)):
            steps, cache = [], SparseCache(case.model.config)
            fed = case.model(**batch_of([row], [image], "left"), past_key_values=cache, **case.drops)
            for token in [*answers[number]]:
                steps.append(fed.logits[0, -1])
                fed = case.model(torch.tensor([[token]]), past_key_values=cache, **case.drops)
            start = int(batch["attention_mask"][number].long().argmax()) + len(row) - 1
            found = scored[number, start : start + case.steps]
            torch.testing.assert_close(found, torch.stack(steps), atol=2e-4, rtol=1e-4)


def second_turn(
    case: Case, chosen, keep: list[int], question: list[list[int]], side: str, undo: list[list[int]] | None
):
    """A turn on the cache of the first; `undo` is another turn that is fed and cropped before it."""
    batch = batch_of([case.rows[n] for n in chosen], [case.images[n] for n in chosen], "left")
    first = case.model.generate(**batch, **case.call(), return_dict_in_generate=True)
    cache, seen = first.past_key_values, first.past_key_values.get_seq_length()
    past = torch.cat(
        [batch["attention_mask"], torch.zeros(len(chosen), seen - batch["attention_mask"].shape[1])], dim=1
    )
    for row, n in enumerate(chosen):
        start = batch["attention_mask"].shape[1]
        past[row, start : start + keep[n]] = 1
    if undo is not None:
        added, present = pad_rows([undo[n] for n in chosen], "left")
        # This mask hides all of the answer, which the crop brings back.
        hidden = past.clone()
        hidden[:, start:] = 0
        other = case.model.generate(
            torch.cat([first.sequences[:, :seen], added], dim=1),
            attention_mask=torch.cat([hidden, present], dim=1),
            past_key_values=cache,
            return_dict_in_generate=True,
            **case.call(),
        )
        other.past_key_values.crop(seen - other.past_key_values.get_seq_length())
    added, present = pad_rows([question[n] for n in chosen], side)
    output = case.model.generate(
        torch.cat([first.sequences[:, :seen], added], dim=1),
        attention_mask=torch.cat([past, present], dim=1),
        past_key_values=cache,
        return_sparsity=True,
        **case.call(),
    )
    return output.sequences[:, -case.steps :], output.sparsity


def check_turns(case: Case) -> None:
    """A later turn of a batch equals that of the row alone, also behind a turn that was cropped."""
    keep = [case.random.randint(0, case.steps - 1) for _ in case.rows]
    question = [case.words(1, 6) for _ in case.rows]
    undo = [case.words(1, 9) for _ in case.rows] if case.random.random() < 0.5 else None
    everything = list(range(len(case.rows)))
    together, found = second_turn(case, everything, keep, question, case.side, undo)
    for number in everything:
        alone, expected = second_turn(case, [number], keep, question, "left", None)
        assert torch.equal(together[number], alone[0]), (number, undo)
        for name in COUNTS:
            assert getattr(found, name)[number] == getattr(expected, name)[0], (number, name, undo)


def check_crop(case: Case) -> None:
    """Tokens fed one by one and cropped leave the cache as if they had never been fed."""
    number = case.random.randrange(len(case.rows))
    row, image = batch_of([case.rows[number]], [case.images[number]], "left"), case.words(6, 14)
    fed, length = image, case.random.randint(0, 5)
    caches = [SparseCache(case.model.config) for _ in range(2)]
    with torch.no_grad():
        for cache, tokens in zip(caches, (fed, fed[:length]), strict=True):
            case.model(**row, past_key_values=cache, **case.drops)
            for token in tokens:
                case.model(torch.tensor([[token]]), past_key_values=cache, **case.drops)
        caches[0].crop(length - len(fed))
        more = [torch.tensor([case.words(n, n)]) for n in (3, 1, 1)]
        for tokens in more:
            one, two = [case.model(tokens, past_key_values=cache, **case.drops).logits for cache in caches]
            assert torch.equal(one, two)
    assert SparsityStatistics.of(caches[0]).kept_columns == SparsityStatistics.of(caches[1]).kept_columns


CHECKS = (check_rows_and_caches, check_scoring, check_turns, check_crop)


@pytest.mark.parametrize("seed", [int(ONE)] if ONE else range(CASES))
def test_equalities(seed):
    CHECKS[seed % len(CHECKS)](Case(seed))
