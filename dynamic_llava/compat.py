"""What the supported releases of transformers (5.17 and newer) do not all have."""

from __future__ import annotations

from torch import Tensor

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before 5.21

    def slice_logits_to_keep(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """The last `logits_to_keep` positions of `hidden_states (B, N, D)`, 0 for all, or those that a tensor names."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


__all__ = ["slice_logits_to_keep"]
