"""Token lengths of conversations without opening a picture, and batches of similar lengths from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..chat_template import SYSTEM_PROMPT
from .conversation import Turn, count_images, render_conversation, space_images

BATCH = 1024


def conversation_lengths(
    conversations: Iterable[Sequence[Turn]],
    tokenizer: PreTrainedTokenizerBase,
    tokens_per_picture: int,
    system: str = SYSTEM_PROMPT,
    space_behind_image: bool = False,
) -> list[int]:
    """Returns the number of tokens of each conversation before any cut, equal to `encode_conversation`'s.

    Args:
        conversations: the turns of each, from `parse_turns`.
        tokenizer: a fast tokenizer that knows `<image>` as one special token.
        tokens_per_picture: image tokens of every picture.
        system, space_behind_image: as for `encode_conversation`.
    """
    lengths: list[int] = []
    rest = iter(conversations)
    while batch := list(islice(rest, BATCH)):
        spaced = map(space_images, batch) if space_behind_image else batch
        texts = [render_conversation(turns, system)[0] for turns in spaced]
        encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        for turns, ids in zip(batch, encoded, strict=True):
            lengths.append(len(ids) + count_images(turns) * (tokens_per_picture - 1))
    return lengths


class LengthGroupedSampler(Sampler[int]):
    """Changes from `transformers.trainer_pt_utils.LengthGroupedSampler`:
    - the order is that of `seed` and the epoch alone, the same on every rank and after a resume.

    Args:
        lengths: tokens of each sample, such as `dataset.lengths`.
        batch_size: samples that should be of similar length: of a micro-batch, times the accumulation steps.
        seed: of the order.

    Raises:
        ValueError: without lengths, or on a batch size below 1.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        if not lengths or batch_size < 1:
            raise ValueError(f"{len(lengths)} lengths in batches of {batch_size}; both must be at least 1")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; data loaders of `Trainer` call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
