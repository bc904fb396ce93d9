"""Token lengths of conversations without opening a picture, and batches of similar lengths from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Encoding
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..checkpoints.chat_template import SYSTEM_PROMPT
from .conversation import Turn, count_images, render_conversation, space_images

BATCH = 1024


@dataclass(frozen=True)
class ConversationLength:
    """Tokens of a conversation before any cut.

    `total` counts all of them, `answers` those of every answer with its end token, `last_answer` those of the answer
    that the conversation ends in, 0 where it ends in a question.
    """

    total: int
    answers: int
    last_answer: int


def conversation_lengths(
    conversations: Iterable[Sequence[Turn]],
    tokenizer: PreTrainedTokenizerBase,
    tokens_per_picture: int,
    system: str = SYSTEM_PROMPT,
    space_behind_image: bool = False,
) -> list[ConversationLength]:
    """Returns the numbers of tokens of each conversation before any cut, equal to `encode_conversation`'s.

    Args:
        conversations: the turns of each, from `parse_turns`.
        tokenizer: a fast tokenizer that knows `<image>` as one special token.
        tokens_per_picture: image tokens of every picture.
        system, space_behind_image: as for `encode_conversation`.
    """
    lengths: list[ConversationLength] = []
    rest = iter(conversations)
    while batch := list(islice(rest, BATCH)):
        spaced = map(space_images, batch) if space_behind_image else batch
        rendered = [render_conversation(turns, system) for turns in spaced]
        encoded = tokenizer([text for text, _ in rendered], return_attention_mask=False, verbose=False)
        for turns, (_, spans), tokens in zip(batch, rendered, encoded.encodings, strict=True):
            answers = [_tokens_between(tokens, start, end) for start, end in spans]
            total = len(tokens) + count_images(turns) * (tokens_per_picture - 1)
            last = answers[-1] if turns[-1].role == "assistant" else 0
            lengths.append(ConversationLength(total, sum(answers), last))
    return lengths


def _tokens_between(tokens: Encoding, start: int, end: int) -> int:
    """Tokens that hold the characters `[start, end)` of an answer."""
    # Some tokenizers leave the space in front of a word to no token.
    first = next((found for place in range(start, end) if (found := tokens.char_to_token(place)) is not None), None)
    last = tokens.char_to_token(end - 1)
    # A tokenizer that has no token for the end of an answer is refused by `encode_conversation`.
    return 0 if first is None or last is None else last - first + 1


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
