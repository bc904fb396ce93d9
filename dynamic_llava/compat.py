"""What the supported releases of transformers (5.17 and newer) do not all have."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

# What stands behind a mixin of this package, of which a type checker can know nothing.
Stock: Any = object

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before 5.21

    def slice_logits_to_keep(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """The last `logits_to_keep` positions of `hidden_states (B, N, D)`, 0 for all, or those that a tensor names."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


#: Arguments of training that 5.23 has renamed, by their new names.
FORMER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def named_as_here(values: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """`values` with the arguments that are not `known` by their new names under those they had before."""
    return {FORMER_NAMES.get(key, key) if key not in known else key: value for key, value in values.items()}


__all__ = ["FORMER_NAMES", "named_as_here", "slice_logits_to_keep"]
