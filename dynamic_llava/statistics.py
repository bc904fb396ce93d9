"""What a generation kept, per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import SparseCache
from .generation_record import GenerationRecord
from .kept_history import BITS


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
        """What `cache` holds; with `present (B, columns seen or more)`, 0 or 1, of these tokens alone."""
        if not cache.started:
            raise ValueError("The SparseCache is empty; statistics are there after the first forward.")
        columns = int(cache.get_seq_length())
        kinds, stored = cache.table.kinds[:, :columns], cache.table.stored(columns)
        if present is not None:
            counted = present[:, :columns].bool().to(kinds.device)
            kinds, stored = kinds * counted, stored & counted
        return cls._from(cache, kinds, stored)

    @classmethod
    def of_generation(
        cls, cache: SparseCache, record: GenerationRecord, beams: Tensor | None, prompt_mask: Tensor | None
    ) -> SparsityStatistics:
        """What the returned sequences kept.

        Args:
            cache: what `generate` has returned.
            record: of the same call.
            beams: `(R, T)` row of the cache at each step that wrote each token, -1 behind a sequence's end; None
                without beams.
            prompt_mask: `(B, columns of the prompt)`, the mask of the call; None: all count.
        """
        seen = int(cache.get_seq_length())
        prompt = seen - (record.steps - 1)
        kinds, stored = cache.table.kinds[:, :seen], cache.table.stored(seen)
        lengths = record.generated
        if beams is not None:
            lengths = (beams >= 0).sum(dim=1)
            kinds, stored = _of_beams(cache, kinds, stored, prompt, beams.long())
        # The last token of a row, which may have ended it, is never fed.
        columns = torch.arange(seen, device=kinds.device)
        counted = columns < prompt + lengths[:, None] - 1
        if prompt_mask is not None:
            given = prompt_mask.bool().to(kinds.device).repeat_interleave(len(kinds) // len(prompt_mask), dim=0)
            # A virtual token of prompt tuning stands in front of the mask.
            counted[:, prompt - given.shape[1] : prompt] &= given
        return cls._from(cache, kinds * counted, stored & counted)

    @classmethod
    def _from(cls, cache: SparseCache, kinds: Tensor, stored: Tensor) -> SparsityStatistics:
        counts = [((kinds & bit) > 0).sum(dim=1) for bit in BITS.values()]
        columns = [row.nonzero().flatten().tolist() for row in stored]
        image, image_kept, output, output_kept = counts
        return cls(image, image_kept, output, output_kept, kv_bytes=cache.memory_bytes(), kept_columns=columns)


def _of_beams(cache: SparseCache, kinds: Tensor, stored: Tensor, prompt: int, beams: Tensor) -> tuple[Tensor, Tensor]:
    """`kinds` and `stored` of returned beams, of which the cache may no longer hold a row.

    A token is judged in the pass that writes the next one, in the row that `beams` names for that. The prompt of a beam
    is that of any row of its input.
    """
    first = beams[:, 0]
    rows = beams[:, 1:].clamp(min=0)
    columns = torch.arange(rows.shape[1], device=rows.device) + prompt
    judged = cache.table.history.row_log[rows, columns]
    width = kinds.shape[1] - prompt - judged.shape[1]
    judged = torch.nn.functional.pad(judged, (0, width))
    kinds = torch.cat([kinds[first, :prompt], judged], dim=1)
    return kinds, torch.cat([stored[first, :prompt], (judged & BITS["output_kept"]) > 0], dim=1)
