"""Several data sets as one, each with a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from .dataset import ConversationDataset


class MixtureDataset(Dataset):
    """Data sets joined; the weight of each says how often an epoch visits its samples.

    1.0 visits every sample once, 2.0 twice, 0.5 a half that `seed` chooses, 2.5 all twice and a half of them once more.
    The choice is the same in every epoch and on every rank.

    Args:
        parts: the data sets.
        weights: above 0, one for each.
        seed: of the choice.

    Raises:
        ValueError: without data sets, on another number of weights, or on a weight that is not above 0.
    """

    def __init__(self, parts: Sequence[ConversationDataset], weights: Sequence[float], seed: int = 0) -> None:
        if not parts or len(parts) != len(weights):
            raise ValueError(f"{len(weights)} weights for {len(parts)} data sets; give one for each, and at least one")
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"weight {weight} must be above 0; leave the file out to skip it")
        self.parts = list(parts)
        self.weights = list(weights)
        self.chosen = [
            chosen_positions(len(part), weight, seed + number)
            for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
        ]
        part_of = [torch.full((len(chosen),), number) for number, chosen in enumerate(self.chosen)]
        # Two flat tensors instead of a list of pairs: data-loader workers share them.
        self._part, self._position = torch.cat(part_of), torch.cat(self.chosen)
        if not len(self._part):
            raise ValueError(f"no sample is left of {sum(map(len, parts))} with weights {self.weights}; raise them")

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the sample; see `ConversationDataset`."""
        return self.parts[int(self._part[index])][int(self._position[index])]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample, without opening a picture."""
        return self._of_samples([part.lengths for part in self.parts])

    @property
    def full_lengths(self) -> list[int]:
        """Tokens of every sample before the cut."""
        return self._of_samples([part.full_lengths for part in self.parts])

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Samples left out so far, as (id, reason)."""
        return [entry for part in self.parts for entry in part.skipped]

    def _of_samples(self, values: list[list[int]]) -> list[int]:
        return [own[position] for own, chosen in zip(values, self.chosen, strict=True) for position in chosen.tolist()]


def chosen_positions(size: int, weight: float, seed: int) -> torch.Tensor:
    """Returns the positions that an epoch visits, long `(round(size * weight),)`: all of them as often as the weight is
    whole, and a sorted random subset for its fraction."""
    whole = int(weight)
    extra = round(size * (weight - whole))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return torch.cat([*[torch.arange(size)] * whole, order[:extra].sort().values])
