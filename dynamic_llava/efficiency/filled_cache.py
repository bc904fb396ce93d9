"""Caches as they are after so many output tokens, without running the model for each of them.

A prompt is really prefilled. The keys and values of output tokens are copies of the prompt's, appended through the
caches' own `update`, which leaves the same shapes, storages and cursors as decoding them would; their values change
neither time nor memory. Steps that are timed are real model steps on these caches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..cache import SparseCache
from .model_pair import prompt_inputs, random_tokens

# Tokens appended at once; each time the dense layers are copied whole.
FILL_BLOCK = 1024


class Context:
    """One model with its cache at some output position.

    Args:
        model: stock or ours.
        text_tokens: text tokens of the prompt.
        batch: rows.
        repeat_prompt: prefill one row and repeat its cache, where nobody looks at the cost of the prefill.
    """

    def __init__(self, model, text_tokens: int, batch: int, repeat_prompt: bool = True) -> None:
        self.model, self.batch, self.written = model, batch, 0
        self.sparse = hasattr(model.config, "sparsity")
        self.cache: Cache = SparseCache(model.config) if self.sparse else DynamicCache(config=model.config)
        prefilled = 1 if repeat_prompt else batch
        self._forward(**prompt_inputs(model.config, text_tokens, prefilled, model.device, model.dtype))
        if batch > prefilled:
            self.cache.batch_repeat_interleave(batch)
        self.prompt_length = self.cache.get_seq_length()
        self.prompt_kept = int(self.cache.kept_lengths.max()) if self.sparse else self.prompt_length

    def step(self) -> None:
        """Feed one random token per row."""
        self._forward(input_ids=random_tokens(self.model.config, self.batch, 1, self.model.device))
        self.written += 1

    def fill_to(self, written: int, block: int = FILL_BLOCK) -> None:
        """Append output tokens, `block` at once, until `written` of them have been seen; never goes back."""
        while self.written < written:
            number = min(block, written - self.written)
            if self.sparse:
                self._append_sparse(number)
            else:
                self._append(range(len(self.cache.layers)), number)
            self.written += number

    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, unused slots included."""
        if self.sparse:
            return self.cache.memory_bytes()
        tensors = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def output_kept(self) -> Tensor:
        """`(batch,)` long: output tokens that the sparse layers hold."""
        return self.cache.kept_lengths - self.prompt_kept

    def _append_sparse(self, number: int) -> None:
        """The dense prefix stores all of `number` output tokens, the sparse suffix what each row keeps of them."""
        cache, rate = self.cache, self.model.config.sparsity.output_keep_rate
        target = kept_by_row(self.written + number, rate, self.batch).to(cache.table.cursor.device)
        advance = (target - self.output_kept()).clamp(0, number)
        most, seen = int(advance.max()), cache.get_seq_length()
        self._append(range(cache.sparse_layer), number)
        if most:
            columns = torch.arange(seen + number - most, seen + number, device=advance.device)
            kept = torch.ones(self.batch, most, dtype=torch.bool, device=advance.device)
            cache.table.plan(kept, columns.expand(self.batch, most), padded=False)
            self._append(range(cache.sparse_layer, len(cache.layers)), most)
            cache.table.commit(advance, most=most)

    def _append(self, layers: range, number: int) -> None:
        for index in layers:
            layer = self.cache.layers[index]
            copied = torch.arange(number, device=layer.keys.device) % layer.keys.shape[2]
            self.cache.update(layer.keys[:, :, copied], layer.values[:, :, copied], index)

    def _forward(self, **inputs: Tensor) -> None:
        with torch.no_grad():
            self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)


def kept_by_row(written: int, rate: float, batch: int) -> Tensor:
    """`(batch,)` long: kept tokens of rows that keep each of `written` tokens with probability `rate`.

    The quantiles of that distribution, one per row, instead of draws: the longest row, which sets the memory, is then
    as long as it is expected to be, in every run.
    """
    deviation = math.sqrt(written * rate * (1 - rate))
    normal = torch.special.ndtri((torch.arange(batch, dtype=torch.float64) + 0.5) / batch)
    return (written * rate + deviation * normal).round().clamp(0, written).long()
