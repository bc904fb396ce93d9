"""Prompts of `generate`: right-padded ones moved to the right in each of their spellings, pictures row by row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .cache import seen_tokens
from .functional import gather_kept

# Arguments with one entry for each token of the prompt, `(B, N, ...)`.
BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids", "mm_token_type_ids")


def move_padding_left(kwargs: dict[str, Any]) -> None:
    """Let the prompt of each row end in its last token: padding behind it goes in front, in place.

    On a cache that holds earlier turns only the new columns are moved. `input_ids` then are the whole history, as wide
    as the mask, or the new turn alone.

    Raises:
        ValueError: a row whose mask leaves nothing of the new columns, so that it has no token to go on from.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    start = int(seen_tokens(kwargs.get("past_key_values")))
    new = mask[:, start:].bool()
    if not new.shape[1]:
        return
    empty = (~new.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"attention_mask leaves no new token in row {empty[0]}: there is nothing to go on from. Leave the row out, "
            "or give it a token."
        )
    if bool(new[:, -1].all()):
        return
    order = new.to(torch.uint8).sort(dim=-1, stable=True).indices + start
    order = torch.cat([torch.arange(start, device=mask.device).expand(len(mask), start), order], dim=1)
    kwargs["attention_mask"] = gather_kept(mask, order)
    for name in BY_TOKEN:
        tensor = kwargs.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[1]:
            # All columns seen, or those of the new turn alone.
            offset = mask.shape[1] - tensor.shape[1]
            if offset in (0, start):
                kwargs[name] = gather_kept(tensor.expand(len(mask), *tensor.shape[1:]), order[:, offset:] - offset)


def repeat_by_row(pictures: Tensor | Sequence[Tensor], tokens: Sequence[int], times: int) -> Any:
    """The pictures of a batch, those of each row `times` times in a run; `tokens` are the image tokens of each row."""
    if not sum(tokens):
        # `forward` says that nothing asks for these pictures.
        return pictures
    ends = [len(pictures) * seen // sum(tokens) for seen in accumulate(tokens)]
    order = [n for start, end in pairwise([0, *ends]) for _ in range(times) for n in range(start, end)]
    if isinstance(pictures, Tensor):
        return pictures[torch.tensor(order, dtype=torch.long, device=pictures.device)]
    return [pictures[n] for n in order]
