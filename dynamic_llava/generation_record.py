"""When each row of a generation ended, noted beside its stopping criteria."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList


class GenerationRecord(StoppingCriteria):
    """What `generate` does not return: stops nothing itself; `RecordedStops` writes into it.

    Attributes:
        steps: tokens that were generated for each row, those behind a row's end included.
        generated: `(B,)` long, tokens of each row up to its end, the token that ended it included.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.generated: Tensor | None = None
        self._length = 0

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def note(self, stopped: Tensor, length: int) -> None:
        """Count the new tokens of each row, now of `length` tokens, that has not `stopped (B,)` bool before them."""
        # The first pass generates one; a pass that checks drafts several.
        number = 1 if self.generated is None else length - self._length
        self._length = length
        if self.generated is None or len(self.generated) != len(stopped):
            # Beam search asks about more candidates than it has rows; it tells lengths by its beam indices.
            self.generated = torch.zeros_like(stopped, dtype=torch.long)
            self._running = torch.ones_like(stopped)
        self.steps += number
        self.generated = self.generated + number * self._running
        self._running = self._running & ~stopped


class RecordedStops(StoppingCriteriaList):
    """`StoppingCriteriaList` that notes what it says in the `GenerationRecord` among its members."""

    @classmethod
    def of(cls, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """`criteria`, recorded where one of them is a record."""
        return cls(criteria) if any(isinstance(one, GenerationRecord) for one in criteria) else criteria

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        stopped = super().__call__(input_ids, scores, **kwargs)
        for one in self:
            if isinstance(one, GenerationRecord):
                one.note(stopped, input_ids.shape[1])
        return stopped
