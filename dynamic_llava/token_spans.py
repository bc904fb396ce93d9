"""Which positions of a batch are image tokens and which are output tokens."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100


def image_token_mask(input_ids: Tensor, image_token_id: int) -> Tensor:
    """`(B, N)` bool, true at the image tokens of `input_ids (B, N)`."""
    return input_ids == image_token_id


def answer_token_mask(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The last answer of each row: the tokens after the last ignored label.

    Args:
        labels: `(B, N)` long, -100 where ignored.
        attention_mask: `(B, N)`, 0 at padding on either side; None means no padding.

    Returns:
        `(B, N)` bool; all false for a row that does not end in an answer.
    """
    present = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    ignored_prompt = (labels == IGNORE_INDEX) & present
    ignored_from_here_on = ignored_prompt.flip(-1).cumsum(dim=-1).flip(-1) > 0
    return present & ~ignored_from_here_on


def generated_token_mask(shape: tuple[int, int], prompt_length: int, device: torch.device) -> Tensor:
    """`(B, N)` bool, true from column `prompt_length` on: what `generate` has appended to the prompt."""
    return (torch.arange(shape[1], device=device) >= prompt_length).expand(shape)
