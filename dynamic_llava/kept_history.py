"""What a `KeptTable` remembers of calls: what each token was, and what forgetting tokens must undo, or cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .decisions import Decision
from .storage import NOTHING, widen
from .token_masks import TokenMasks

# What a table holds of a token: image and output tokens judged, and whether they were kept.
BITS = {"image": 1, "image_kept": 2, "output": 4, "output_kept": 8}


def noted_kinds(decision: Decision, tokens: TokenMasks) -> Tensor:
    """`(B, n)` uint8, what is noted of the tokens of a call: the bit of a kind, and the next one where it is kept."""
    noted = None
    for kind in ("image", "output"):
        judged, keep = tokens.of(kind), decision.keep_mask(kind)
        if judged is not None:
            kept = judged if keep is None else keep
            bits = kept.view(torch.uint8) * BITS[f"{kind}_kept"] + BITS[kind]
            # Every token of a step is judged.
            bits = bits if tokens.output_alone else bits * judged
            noted = bits if noted is None else noted + bits
    return torch.zeros_like(tokens.present, dtype=torch.uint8) if noted is None else noted


class KeptHistory:
    """Of a table whose storage grows by `block_size` slots.

    Attributes:
        drops: of each call that dropped tokens its first column, and `(B,)` the column behind the last one that its
            choice was made among.
        growths: of each call that made the storage grow its columns `(first, behind)` and the capacity since then.
        row_log: `(B, columns)` uint8, what was noted as each call wrote it, whatever rows became since; see `log_rows`.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.drops: list[tuple[int, Tensor]] = []
        self.growths: list[tuple[int, int, int]] = []
        self.logs_rows, self.row_log = False, NOTHING

    def note_drops(self, start: Any, chosen_from: Tensor) -> None:
        """Remember that a call from column `start` on dropped tokens, by a choice among `chosen_from (B, n)` bool."""
        behind = torch.arange(1, chosen_from.shape[1] + 1, device=chosen_from.device) + start
        self.drops.append((start, torch.where(chosen_from, behind, 0).amax(dim=-1)))

    def note_capacity(self, start: Any, behind: Any, capacity: int) -> None:
        """Remember the capacity behind a call on the columns from `start` on, where it is a larger one."""
        if capacity > (self.growths[-1][-1] if self.growths else 0):
            self.growths.append((start, behind, capacity))

    def log_rows(self, wanted: bool) -> None:
        """Begin or end a `row_log`."""
        self.logs_rows, self.row_log = wanted, NOTHING

    def note_rows(self, kinds: Tensor, seen: int | Tensor) -> None:
        """Note `kinds (B, n)` of a call from column `seen` on, in rows that no beam search has reordered yet."""
        if not self.logs_rows:
            return
        if self.row_log is None or len(self.row_log) != len(kinds):
            self.row_log = kinds.new_zeros(len(kinds), 0)
        first, behind = int(seen), int(seen) + kinds.shape[1]
        self.row_log = widen(self.row_log, behind, self.block_size)
        self.row_log[:, first:behind] = kinds

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace rows by `function` of them."""
        self.drops = [(start, function(end)) for start, end in self.drops]

    def forget_drops(self, length: int) -> None:
        """Forget calls from column `length` on; `ValueError` where a part stays that would have chosen otherwise."""
        for start, end in self.drops:
            if start < length < (behind := int(end.max())):
                raise ValueError(
                    f"crop to {length} tokens reaches into a prompt whose image tokens were dropped, by a choice among "
                    f"tokens {start} to {behind - 1}; crop to {start} tokens, or to {behind} or more."
                )
        self.drops = [(start, end) for start, end in self.drops if start < length]

    def capacity_before(self, length: int, stored: Tensor, column: Tensor, capacity: int) -> int:
        """Take back the growth of the calls from column `length` on.

        Args:
            length: columns that stay.
            stored: `(B, capacity)` bool, slots that stay in use.
            column: `(B, capacity)` long, which column a slot holds.
            capacity: slots that there are.

        Returns:
            Slots that there would be.
        """
        grown = [growth for growth in self.growths if growth[0] < length]
        if grown and grown[-1][1] > length:
            # Of this call a part stays, which would have needed less.
            before = stored & (column < (start := grown.pop()[0]))
            needed = before.sum(dim=-1).max() + (stored & ~before).sum(dim=-1).max()
            fewer = -(-int(needed) // self.block_size) * self.block_size
            if fewer > (grown[-1][-1] if grown else 0):
                grown.append((start, length, fewer))
        if not grown:
            return capacity
        self.growths = grown
        return grown[-1][-1]
