"""Which positions of a batch are image tokens and which are output tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass
class TokenMasks:
    """Tokens of a call by kind, `(B, N)` bool each.

    `present` is false at padding; `image`, `output` and `instruct` are None where the call has none. `supervised`,
    where there are labels, is true at tokens whose next token has one: their logits count, so that these are computed
    also where they are dropped. `output_alone` tells that the call is generated tokens alone, on a cache.
    """

    present: Tensor
    has_padding: bool
    image: Tensor | None = None
    output: Tensor | None = None
    instruct: Tensor | None = None
    supervised: Tensor | None = None
    output_alone: bool = False

    def of(self, kind: str) -> Tensor | None:
        """The tokens of one of `KINDS`."""
        return getattr(self, kind)

    def text(self) -> Tensor:
        """The present tokens that are neither of an image nor generated, `(B, N)` bool."""
        others = [tokens for tokens in (self.image, self.output) if tokens is not None]
        return self.present & ~torch.stack([torch.zeros_like(self.present), *others]).any(dim=0)


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


def last_user_turn_mask(
    input_ids: Tensor, image: Tensor, end_before: Tensor, user_marker: list[int], assistant_marker: list[int]
) -> Tensor:
    """The text of the last user turn from its last image on (published code, instruct predictor).

    Args:
        input_ids: `(B, N)` long.
        image: `(B, N)` bool, image tokens; rows without any have no such text.
        end_before: `(B, N)` bool, tokens of the answer that is judged or of padding, where no marker is looked for.
        user_marker, assistant_marker: token ids of `USER:` and `ASSISTANT:`.

    Returns:
        `(B, N)` bool: after the last image and the last `USER:`, in front of the last `ASSISTANT:`.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    after_image = torch.where(image, columns + 1, 0).amax(dim=1)
    user = _marker_starts(input_ids, user_marker) & ~end_before
    assistant = _marker_starts(input_ids, assistant_marker) & ~end_before
    start = torch.maximum(after_image, torch.where(user, columns + len(user_marker), 0).amax(dim=1))
    end = torch.where(assistant, columns, 0).amax(dim=1)
    return (columns >= start[:, None]) & (columns < end[:, None]) & image.any(dim=1, keepdim=True)


def _marker_starts(input_ids: Tensor, marker: list[int]) -> Tensor:
    """`(B, N)` bool, true where `marker` starts."""
    found = torch.ones_like(input_ids, dtype=torch.bool)
    for offset, token in enumerate(marker):
        shifted = input_ids.roll(-offset, dims=1) == token
        shifted[:, input_ids.shape[1] - offset :] = False
        found &= shifted
    return found


def generated_token_mask(shape: tuple[int, int], num_generated: int, device: torch.device) -> Tensor:
    """`(B, N)` bool, true at the last `num_generated` columns: what `generate` has appended to the prompt."""
    return (torch.arange(shape[1], device=device) >= shape[1] - num_generated).expand(shape)


def shifted_labels(labels: Tensor) -> Tensor:
    """`(B, N)` long, what each token is to say: the label of the next one, -100 at the last."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def supervised_token_mask(labels: Tensor) -> Tensor:
    """`(B, N)` bool, true at tokens whose next token is not ignored by `labels (B, N)`."""
    return shifted_labels(labels) != IGNORE_INDEX


def check_position_ids(position_ids: Tensor, attention_mask: Tensor | None, batch_size: int, length: int) -> None:
    """`ValueError` unless positions rise from token to token of each row, padding aside.

    Args:
        position_ids: `(B or 1, N)` long.
        attention_mask: `(B, N)`, 0 at padding; None means no padding.
        batch_size, length: B and N.
    """
    if position_ids.shape not in ((batch_size, length), (1, length)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, but the call has {batch_size} rows of {length} "
            f"tokens; pass one of shape {(batch_size, length)}, or leave it out."
        )
    present = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    positions = position_ids.expand(present.shape)
    # The largest position of the present tokens in front of each, -1 at the first.
    before = positions.masked_fill(~present, -1).cummax(dim=-1).values.roll(1, dims=-1)
    before[:, 0] = -1
    wrong = ((positions <= before) & present).any(dim=-1)
    if torch.compiler.is_exporting():
        torch._assert_async(~wrong.any(), "position_ids must rise over the present tokens of each row.")
        return
    if bool(wrong.any()):
        row = int(wrong.long().argmax())
        raise ValueError(
            f"position_ids of row {row} contradict the attention mask: {_short(positions[row].tolist())} do not rise "
            "over its present tokens; leave position_ids out to have them counted from the mask."
        )


def _short(values: list[int], most: int = 12) -> str:
    shown = ", ".join(map(str, values[:most]))
    return f"[{shown}{', ...' if len(values) > most else ''}]"


def find_masks(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    image: Tensor | None = None,
    labels: Tensor | None = None,
    output_mask: Tensor | None = None,
    num_generated: int = 0,
    output_alone: bool = False,
) -> TokenMasks:
    """The masks of a call.

    Args:
        inputs_embeds: `(B, N, D)`, for shape and device.
        attention_mask: `(B, N)`, 0 at padding; None means no padding.
        image: `(B, N)` bool, image tokens; None where there are none.
        labels: `(B, N)` long; the output tokens are then the answers that they end in.
        output_mask: `(B, N)` bool, the output tokens where they are not the last answers alone.
        num_generated: how many of the last columns were generated.
        output_alone: the call is generated tokens alone, on a cache.
    """
    shape, device = (inputs_embeds.shape[0], inputs_embeds.shape[1]), inputs_embeds.device
    present = torch.ones(shape, dtype=torch.bool, device=device)
    has_padding = False
    if attention_mask is not None:
        present = attention_mask.bool()
        has_padding = torch.compiler.is_exporting() or not bool(present.all())
    tokens = TokenMasks(present, has_padding, image, output_alone=output_alone)
    if output_alone:
        tokens.output = present
    elif labels is not None:
        tokens.output = answer_token_mask(labels, present) if output_mask is None else output_mask.bool() & present
        tokens.supervised = supervised_token_mask(labels) & present
    elif num_generated:
        tokens.output = generated_token_mask(shape, num_generated, device) & present
    return tokens


def count_positions(inputs_embeds: Tensor, attention_mask: Tensor | None, seen: int | Tensor) -> Tensor:
    """Number of present tokens in front of each token, `(B or 1, N)`."""
    columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
    if attention_mask is None:
        return columns[None]
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, columns]
