"""Random selection: the floor that a learned predictor has to beat at the same rates.

Draws from torch's global generator, so that `torch.manual_seed` repeats a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import IMAGE_SELECTORS, OUTPUT_SELECTORS


def image_scores(hidden: Tensor, valid: Tensor) -> Tensor:
    """Uniform scores `(B, N_image)` in [0, 1), higher = keep."""
    return torch.rand(valid.shape, device=hidden.device)


def output_keep(hidden: Tensor, keep_rate: float) -> Tensor:
    """Keep each token of `hidden (..., D)` with probability `keep_rate`; bool `(...)`."""
    return torch.rand(hidden.shape[:-1], device=hidden.device) < keep_rate


IMAGE_SELECTORS["random"] = image_scores
OUTPUT_SELECTORS["random"] = output_keep
