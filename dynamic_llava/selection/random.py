"""Random selection: the floor that a learned predictor has to beat at the same rates.

Draws from torch's global generator, so that `torch.manual_seed` repeats a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rules import Evidence, image_rule, output_rule


@image_rule("random")
class RandomImages:
    """Uniform scores in [0, 1), higher = keep."""

    needs = frozenset()

    def score(self, evidence: Evidence) -> Tensor:
        return torch.rand(evidence.valid.shape, device=evidence.hidden.device)


@output_rule("random")
class RandomOutputs:
    """Each token is kept with the probability `rate`."""

    needs = frozenset()
    state_size = 0

    def keep(self, evidence: Evidence, state: Tensor) -> tuple[Tensor, Tensor]:
        return torch.rand(evidence.hidden.shape[:-1], device=evidence.hidden.device) < evidence.rate, state
