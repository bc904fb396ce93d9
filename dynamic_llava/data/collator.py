"""Joins samples of a `ConversationDataset` into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import LlavaProcessor

from ..token_masks import IGNORE_INDEX


class LlavaCollator:
    """Pads samples to the longest and stacks their pictures.

    Args:
        processor: LLaVA processor; its tokenizer needs a padding token.
        padding_side: where the padding goes; training uses "right", generation "left".

    Raises:
        ValueError: when the tokenizer has no padding token or the side is unknown.
    """

    def __init__(self, processor: LlavaProcessor, padding_side: Literal["left", "right"] = "right") -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; choose 'left' or 'right'")
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token, for Vicuna to '<unk>'")
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.padding_side = padding_side

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns a batch.

        Args:
            samples: items of the dataset.

        Returns:
            `input_ids`, `attention_mask` and `labels`, long `(B, N)`; and `pixel_values`, float32
            `(pictures of all rows in order, 3, H, W)`, which is absent when no row has a picture. Where the samples
            have an `output_mask`, that too, bool `(B, N)`, false at padding.
        """
        length = max(len(sample["input_ids"]) for sample in samples)
        batch = {
            "input_ids": torch.full((len(samples), length), self.pad_token_id),
            "attention_mask": torch.zeros(len(samples), length, dtype=torch.long),
            "labels": torch.full((len(samples), length), IGNORE_INDEX),
        }
        if "output_mask" in samples[0]:
            batch["output_mask"] = torch.zeros(len(samples), length, dtype=torch.bool)
        for row, sample in enumerate(samples):
            count = len(sample["input_ids"])
            place = slice(0, count) if self.padding_side == "right" else slice(length - count, length)
            batch["input_ids"][row, place] = sample["input_ids"]
            batch["attention_mask"][row, place] = 1
            batch["labels"][row, place] = sample["labels"]
            if "output_mask" in batch:
                batch["output_mask"][row, place] = sample["output_mask"]
        pictures = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        if pictures:
            batch["pixel_values"] = torch.cat(pictures)
        return batch
