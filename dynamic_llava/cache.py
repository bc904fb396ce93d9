"""SparseCache: dense layers below `sparse_layer`, slots with one shared table of cursors above.

A token of a sparse layer is written at its row's cursor, attended to, and the cursor advances only where the token is
kept: the next token then overwrites a dropped one. Nothing is concatenated, there is no loop over rows.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .cache_layers import FixedLayer, SparseLayer
from .kept_table import KeptTable


class SparseCache(Cache):
    """KV cache of Dynamic-LLaVA: everything below `sparse_layer`, kept tokens only from there on.

    Changes from `DynamicCache`:
        - layers from `sparse_layer` on store kept tokens in slots that grow by `block_size`;
        - `get_seq_length()` is the number of tokens seen, dropped ones included;
        - `kept_lengths`, `memory_bytes()`.

    Args:
        config: `DynamicLlavaConfig`.
        block_size: slots added when the storage of the sparse layers is full.
        max_length: how many tokens it takes, in a storage of fixed size for compiled decoding; None grows. The sparse
            layers are allocated in the first call, without slots for what it drops.
        offload: keep the layers that are not being computed in host memory (models on a GPU).
    """

    layers: list[Any]

    def __init__(self, config, block_size: int = 64, max_length: int | None = None, offload: bool = False) -> None:
        for name, value in (("block_size", block_size), ("max_length", max_length)):
            whole = isinstance(value, Integral) and not isinstance(value, bool) and 0 < value < 2**63
            if not whole and (value is not None or name == "block_size"):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if not isinstance(offload, bool):
            raise ValueError(f"offload is True or False, got {offload!r}.")
        if offload and max_length is not None:
            raise ValueError(f"A SparseCache of fixed size (max_length={max_length}) is not offloaded; choose one.")
        if offload and not torch.cuda.is_available():
            raise ValueError("offload=True moves keys and values from a GPU to the host; this torch sees no GPU.")
        num_layers = config.text_config.num_hidden_layers
        self.sparse_layer = config.sparsity.sparse_layer
        self.max_length = max_length
        self.table = KeptTable(block_size, fixed_size=max_length)
        layers: list[Any] = [
            DynamicLayer() if max_length is None else FixedLayer(max_length) for _ in range(self.sparse_layer)
        ]
        layers += [SparseLayer(self.table) for _ in range(num_layers - self.sparse_layer)]
        super().__init__(layers=layers, offloading=offload)

    @property
    def started(self) -> bool:
        """Whether tokens have been fed."""
        return self.table.started

    @property
    def max_cache_len(self) -> int:
        """What peft asks for before it brings a cache of its own, which `require_sparse_cache` refuses."""
        return self.get_max_length()

    @property
    def rows(self) -> int:
        """Rows that the cache holds, 0 before the first call."""
        return 0 if self.table.cursor is None else len(self.table.cursor)

    @property
    def kept_lengths(self) -> Tensor:
        """`(B,)` long: tokens stored by the sparse layers, padding not counted."""
        return self.table.kept_lengths()

    def memory_bytes(self) -> int:
        """Bytes allocated for keys and values, unused slots included."""
        tensors = [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def check_call(self, config, batch_size: int, length: int) -> None:
        """Raise `ValueError` when a call does not fit: another decoder, another number of rows, too many tokens."""
        num_layers = config.text_config.num_hidden_layers
        if (len(self.layers), self.sparse_layer) != (num_layers, config.sparsity.sparse_layer):
            raise ValueError(
                f"The SparseCache was made for {len(self.layers)} layers with sparse_layer={self.sparse_layer}, "
                f"the model has {num_layers} with sparse_layer={config.sparsity.sparse_layer}; "
                "make one with SparseCache(model.config)."
            )
        if self.started and self.rows != batch_size:
            raise ValueError(
                f"The SparseCache holds {self.rows} rows, the call has {batch_size}; "
                "pass a new SparseCache(model.config) or the rows it was made for."
            )
        if self.max_length is not None:
            self._check_call_fits(length)

    def _check_call_fits(self, length: int) -> None:
        """As `check_room` for `length` more tokens, without asking the device how many there are."""
        seen = self.get_seq_length()
        if torch.compiler.is_compiling():
            fits = torch.as_tensor(seen + length <= self.max_length)
            torch._assert_async(fits, f"A SparseCache of max_length={self.max_length} is full; make a longer one.")
            return
        if self.table.fed is None:
            self.table.fed = int(seen)
        self.check_room(self.table.fed + length)

    def check_room(self, tokens: int) -> None:
        """Raise `ValueError` where a fixed size does not hold `tokens` in all."""
        if self.max_length is not None and tokens > self.max_length:
            raise ValueError(
                f"{tokens} tokens do not fit a SparseCache of max_length={self.max_length}; make a longer one."
            )

    def reset(self) -> None:
        super().reset()
        self.table.reset()
        if self.max_length is None:
            # transformers before 5.18 zeroes a growing layer instead of emptying it.
            for layer in self.layers[: self.sparse_layer]:
                layer.keys = layer.values = None
                layer.is_initialized = False

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.table.map_rows(lambda tensor: tensor[beam_idx])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.started:
            rows = torch.arange(len(self.table.cursor), device=self.table.cursor.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not isinstance(indices, Tensor) or indices.is_floating_point():
            raise ValueError(f"Rows are chosen by a tensor of whole numbers or a mask, got {indices!r}.")
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens seen, as if they had never been fed.

        Raises:
            ValueError: a part of a prompt would stay whose image tokens were chosen among more than that part holds
                (the choice would have been another one), `tokens_to_remove` is positive, or the size is fixed.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}.")
        if self.max_length is not None:
            raise ValueError("A SparseCache of fixed size cannot be cropped; make one without max_length.")
        length = self.get_seq_length() + tokens_to_remove
        if length <= 0:
            self.reset()
        elif tokens_to_remove < 0:
            self.table.crop(length)
            super().crop(tokens_to_remove)
            for layer in self.layers[: self.sparse_layer]:
                # What a view leaves out would stay allocated.
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def require_sparse_cache(cache: Cache) -> SparseCache:
    """`cache`; `ValueError` unless it is a `SparseCache`."""
    if not isinstance(cache, SparseCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, which would store dropped tokens; "
            "pass dynamic_llava.SparseCache(model.config), or nothing. Prefix tuning, which brings one, is not "
            "supported; LoRA and prompt tuning are."
        )
    return cache


def seen_tokens(cache: SparseCache | None) -> int | Tensor:
    """Tokens fed so far; a tensor of its own where the cache has a fixed size, which counts on the device."""
    if cache is None:
        return 0
    seen = cache.get_seq_length()
    return seen.clone() if isinstance(seen, Tensor) else seen
