"""How many rows of training data the predictors learn from, counted without opening a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..token_masks import IGNORE_INDEX, answer_token_mask
from .dataset import ConversationDataset
from .mixture import MixtureDataset
from .samples import pictures_of


@dataclass(frozen=True)
class JudgedCounts:
    """Rows of an epoch behind the cut at `max_length`.

    `answers` are the rows with output tokens: with output_turns="last" those that end in an answer, with "all" those
    with any. `judged` are those of them with at least `min_output_length` output tokens, of which the output predictor
    learns; `image_rows` those with image tokens, of which the image predictor learns.
    """

    answers: int
    judged: int
    image_rows: int


def count_judged(dataset: ConversationDataset | MixtureDataset, min_output_length: int) -> JudgedCounts:
    """Counts what the predictors see in an epoch of `dataset`, each row as often as its weight says.

    Args:
        dataset: training data.
        min_output_length: rows with fewer output tokens are kept whole (`SparsityConfig`).

    Raises:
        ValueError: pictures have other numbers of tokens by their shape.
    """
    if isinstance(dataset, MixtureDataset):
        parts = zip(dataset.parts, (chosen.tolist() for chosen in dataset.chosen), strict=True)
    else:
        parts = [(dataset, range(len(dataset)))]
    answers = judged = image_rows = 0
    for part, positions in parts:
        rows = _rows(part)
        for position in positions:
            output_tokens, has_image = rows[position]
            answers += output_tokens > 0
            judged += output_tokens >= max(min_output_length, 1)
            image_rows += has_image
    return JudgedCounts(answers, judged, image_rows)


def sees_any(
    dataset: ConversationDataset | MixtureDataset, min_output_length: int, answers: bool = True, images: bool = True
) -> tuple[bool, bool]:
    """Returns whether any row is judged, and whether any has an image: as `count_judged`, up to the first of each.

    Args:
        dataset, min_output_length: as for `count_judged`.
        answers, images: which of both is asked for; the other is true.
    """
    judged, pictured = not answers, not images
    for part in dataset.parts if isinstance(dataset, MixtureDataset) else [dataset]:
        tokens = None
        for position, sample in enumerate(part.samples):
            if judged and pictured:
                return judged, pictured
            if pictures_of(sample) and tokens is None:
                tokens = part.pictures.tokens_per_picture()
            output_tokens, has_image = _cut_row(part, position, tokens or 0)
            judged |= output_tokens >= max(min_output_length, 1)
            pictured |= has_image
    return judged, pictured


def unseeing_predictors(sparsity: Any, data: Any, judged: bool, pictured: bool) -> list[str]:
    """What is wrong, and to be done, with each predictor that is on and would see nothing; empty where all is well.

    Args:
        sparsity: has `output_predictor`, `image_predictor` and `min_output_length`.
        data: has `output_turns` and `max_length`.
        judged, pictured: whether any answer is judged, and any sample has an image.
    """
    found = []
    if sparsity.output_predictor and not judged:
        which, turns = ("answer", "") if data.output_turns == "all" else ("last answer", "output_turns=all, ")
        found.append(
            f"The output predictor would never learn: no {which} has min_output_length={sparsity.min_output_length} "
            f"tokens within max_length={data.max_length}. Set {turns}a smaller min_output_length, or "
            "output_predictor=false."
        )
    if sparsity.image_predictor and not pictured:
        found.append(
            f"The image predictor would never learn: no sample has an image within max_length={data.max_length}. Add "
            "data with images, raise max_length, or set image_predictor=false."
        )
    return found


def _rows(part: ConversationDataset) -> list[tuple[int, bool]]:
    """Output tokens of every sample behind the cut, and whether it has an image there."""
    rows = []
    # Finding out about pictures runs the image processor: once, and only where a cut asks for it.
    tokens = None
    for position, (sample, length) in enumerate(zip(part.samples, part.counted, strict=True)):
        if length.total > part.max_length:
            tokens = part.pictures.tokens_per_picture() if tokens is None else tokens
            rows.append(_cut_row(part, position, tokens))
        else:
            output_tokens = length.answers if part.output_turns == "all" else length.last_answer
            rows.append((output_tokens, bool(pictures_of(sample))))
    return rows


def _cut_row(part: ConversationDataset, position: int, tokens: int) -> tuple[int, bool]:
    try:
        input_ids, labels = part.encode(position, tokens)
    except ValueError:
        # No answer is left: training stops at this sample, or skips it.
        return 0, False
    own = torch.tensor([labels])
    output = own != IGNORE_INDEX if part.output_turns == "all" else answer_token_mask(own)
    return int(output.sum()), part.processor.image_token_id in input_ids
