"""What a generation kept, per row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .cache import SparseCache


@dataclass
class SparsityStatistics:
    """What a `SparseCache` has seen and kept.

    Attributes:
        image_tokens, image_tokens_kept: `(B,)` long.
        output_tokens, output_tokens_kept: `(B,)` long; tokens judged, hence without the last one generated, which is
            never fed. A row that ended before others counts as it would alone, without its end token and padding.
        kv_bytes: bytes allocated for keys and values of the whole batch, unused slots included.
        kept_columns: for each row the tokens that the sparse layers store, counted from the first column of the first
            call (padding included).
    """

    image_tokens: Tensor
    image_tokens_kept: Tensor
    output_tokens: Tensor
    output_tokens_kept: Tensor
    kv_bytes: int
    kept_columns: list[list[int]]

    @classmethod
    def of(cls, cache: SparseCache, present: Tensor | None = None) -> SparsityStatistics:
        """Read the statistics of `cache`; with `present (B, columns seen)` bool, of these tokens alone."""
        if not cache.started:
            raise ValueError("The SparseCache is empty; statistics are there after the first forward.")
        counts = cache.table.counts(present)
        columns = [cache.table.kept_columns(row).tolist() for row in range(len(counts))]
        if present is not None:
            columns = [[c for c in kept if there[c]] for kept, there in zip(columns, present.tolist(), strict=True)]
        return cls(*counts.unbind(dim=-1), kv_bytes=cache.memory_bytes(), kept_columns=columns)
