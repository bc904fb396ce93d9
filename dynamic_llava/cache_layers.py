"""The layers of a `SparseCache`: slots of the sparse ones, and fixed sizes that calls in any mode may change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from .kept_table import KeptTable
from .storage import extend, mark_static, persistent


class SparseLayer(CacheLayerMixin):
    """Keys and values of one sparse layer in the slots of a shared `KeptTable`, `(B, H_kv, capacity, d)` each."""

    is_sliding = False
    is_croppable = True

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether the storage has a fixed size."""
        return self.table.fixed_size is not None

    def __init__(self, table: KeptTable) -> None:
        super().__init__()
        self.table = table

    @persistent
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = self.table.capacity if self.table.fixed_size else 0
        self.keys = key_states.new_zeros(*key_states.shape[:2], slots, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], slots, value_states.shape[-1])
        if slots:
            mark_static(self.keys, self.values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write `(B, H_kv, n, d)` at the slots that the table has planned; return the readable slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys.shape[2] < self.table.capacity:
            self.keys, self.values = (extend(states, self.table.capacity, dim=2) for states in (self.keys, self.values))
        if not self.table.started:
            # Every cursor is at 0, and the new states are all there is, already contiguous.
            number = key_states.shape[2]
            self.keys[:, :, :number], self.values[:, :, :number] = key_states, value_states
            return key_states, value_states
        index = self.table.slots_of(key_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad):
            # A backward pass through this call or an earlier one reads what they saw.
            self.keys, self.values = (
                self.keys.scatter(2, index, key_states),
                self.values.scatter(2, index, value_states),
            )
        else:
            self.keys.scatter_(2, index, key_states)
            self.values.scatter_(2, index, value_states)
        return self.keys[:, :, : self.table.read_length], self.values[:, :, : self.table.read_length]

    def get_seq_length(self) -> int:
        """Slots that may be in use, an upper bound over the rows."""
        return self.table.length_bound

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.table.length_bound + query_length, 0

    def get_max_length(self) -> int:
        return self.table.fixed_size or -1

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Give up the slots that the table has given up; it has moved the cursors back for all layers at once."""
        if self.is_initialized and self.keys.shape[2] > self.table.capacity:
            self.keys, self.values = (
                states[:, :, : self.table.capacity].clone() for states in (self.keys, self.values)
            )

    @persistent
    def reorder_cache(self, beam_idx: Any) -> None:
        if self.is_initialized:
            # An offloaded layer is in host memory.
            beam_idx = beam_idx.to(self.keys.device)
            self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]


class FixedLayer(StaticLayer):
    """`StaticLayer` that calls within and without `torch.inference_mode` can change in turn."""

    @persistent
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.cumulative_length = self.cumulative_length.clone()
        super().lazy_initialization(key_states, value_states)

    @persistent
    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
