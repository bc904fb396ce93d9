"""KeptTable: which tokens the slots of the sparse layers hold. Shared by all layers from `sparse_layer` on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .decisions import Decision
from .storage import mark_static, persistent, widen
from .token_masks import TokenMasks

# What `kinds` holds of a token: image and output tokens judged, and whether they were kept.
BITS = {"image": 1, "image_kept": 2, "output": 4, "output_kept": 8}


class KeptTable:
    """Cursors and validity of the slots.

    Attributes:
        cursor: `(B,)` long, next slot of each row.
        valid: `(B, capacity)` bool, false at slots that hold padding.
        column: `(B, capacity)` long, which token seen (0 = first) a slot holds.
        length_bound: host-side upper bound of the cursors.
        write_index: `(B, n)` slots of the tokens being written.
        read_length: slots that the call in progress reads.
        kinds: `(B, columns)` uint8, what each token seen was: a sum of `BITS`.
        row_log: `(B, columns)` uint8, `kinds` as each call wrote them, whatever rows became since; see `log_rows`.
        state: `(B, S)` of the output rule (`rules.OutputRule`), S its `state_size`.
        state_log: `(B, columns, S)` the state after each column, for `crop`; None until it changes, and where the size
            is fixed.
        drops: of each call that dropped tokens its first column, and `(B,)` the column behind the last one that its
            choice was made among.
        growths: of each call that made the storage grow its columns `(first, behind)` and the capacity since then.
        fed: host-side number of tokens fed where the size is fixed; None where compiled steps were not counted.

    What a call's `attention_mask` hides is hidden from that call alone and stored nowhere, so that it needs no undoing.
    Everything is allocated outside of `torch.inference_mode`, so that calls in and outside of it can change it in turn.
    With `fixed_size` all tensors are allocated once and changed in place, and no Python number that a compiled step
    reads changes from step to step, so that it runs on unchanged.
    """

    def __init__(self, block_size: int, fixed_size: int | None = None) -> None:
        self.block_size = block_size
        self.fixed_size = fixed_size
        self.reset()

    def reset(self) -> None:
        """Forget everything, as freshly made."""
        self.capacity = self.length_bound = self.read_length = 0
        self.started = False
        self.state_size = 0
        self.cursor: Tensor | None = None
        self.valid = self.column = self.write_index = self.kinds = self.state = self.state_log = None
        self.has_padding = False
        self.logs_rows, self.row_log = False, None
        self.drops: list[tuple[int, Tensor]] = []
        self.growths: list[tuple[int, int, int]] = []
        self.fed: int | None = 0

    def begin(self, state_size: int) -> None:
        """Make room for the state of a call's output rule: that of the calls before, where they had the same."""
        if self.state is not None and state_size not in (0, self.state.shape[1]):
            self.state, self.state_log = self.state.new_zeros(len(self.state), state_size), None
        self.state_size = state_size

    @persistent
    def _start(self, batch_size: int, device: torch.device) -> None:
        self.capacity = self.fixed_size or 0
        self.cursor = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.valid = torch.zeros(batch_size, self.capacity, dtype=torch.bool, device=device)
        self.column = torch.zeros(batch_size, self.capacity, dtype=torch.long, device=device)
        self.kinds = torch.zeros(batch_size, self.capacity, dtype=torch.uint8, device=device)
        self.state = torch.zeros(batch_size, self.state_size, device=device)
        if self.fixed_size:
            mark_static(self.cursor, self.valid, self.column, self.kinds, self.state)

    def _reserve(self, number: int) -> None:
        """Make room for `number` more slots; the bound is tightened where that is free or saves a growth."""
        if self.fixed_size:
            self.read_length = self.fixed_size if self.started else number
            return
        on_host = self.cursor.device.type == "cpu"
        if on_host or self.length_bound + number > self.capacity:
            self.length_bound = int(self.cursor.max())
        needed = self.length_bound + number
        if needed > self.capacity:
            self.capacity = -(-needed // self.block_size) * self.block_size
            self.valid = widen(self.valid, needed, self.block_size)
            self.column = widen(self.column, needed, self.block_size)
        self.read_length = self.length_bound + number

    def plan(self, valid: Tensor, column: Tensor, padded: bool, present: Tensor | None = None) -> Tensor | None:
        """Choose the slots of a call's tokens and say what each of them sees.

        Args:
            valid: `(B, n)` bool, false at padding.
            column: `(B, n)` long, index of each token among all tokens seen.
            padded: whether `valid` may hold a false entry.
            present: `(B, columns seen or more)`, 0 at tokens that this call is not to see, such as padding behind an
                earlier answer; None means that it sees all.

        Returns:
            `(B, 1, n, read_length)` bool, true where a query sees a slot; None where each sees all (one row, one
            token, no padding).
        """
        batch_size, number = valid.shape
        if self.cursor is None:
            self._start(batch_size, valid.device)
        self.has_padding |= padded
        self._reserve(number)
        steps = torch.arange(number, device=valid.device)
        self.write_index = self.cursor[:, None] + steps
        self.valid.scatter_(1, self.write_index, valid)
        self.column.scatter_(1, self.write_index, column)
        exact = self.cursor.device.type == "cpu" and batch_size == 1 and not self.fixed_size
        if exact and number == 1 and not self.has_padding and (present is None or bool(present.all())):
            return None
        slots = torch.arange(self.read_length, device=valid.device)
        own = self.write_index[:, None, :, None]
        shown = self.valid[:, : self.read_length]
        if present is not None:
            shown = shown & present.bool().gather(1, self.column[:, : self.read_length])
        # The diagonal keeps the row of a padding query from being empty.
        return ((slots <= own) & shown[:, None, None]) | (slots == own)

    def commit(self, advance: Tensor, most: int) -> None:
        """Move the cursors on by `advance (B,)`, each at most `most`."""
        self.cursor.add_(advance)
        self.started = True
        if not self.fixed_size:
            self.length_bound += most

    def commit_all(self, number: int) -> None:
        """Move every cursor on by `number`."""
        self.commit(torch.full_like(self.cursor, number), most=number)

    def record(self, decision: Decision, tokens: TokenMasks, seen: int | Tensor) -> None:
        """Note what a call on tokens from column `seen` on decided, and the state of its output rule."""
        kinds = torch.zeros_like(tokens.present, dtype=torch.uint8)
        for kind in ("image", "output"):
            judged, keep = tokens.of(kind), decision.keep_mask(kind)
            if judged is not None:
                kept = judged if keep is None else judged & keep
                for name, which in ((kind, judged), (f"{kind}_kept", kept)):
                    kinds = kinds + which.to(torch.uint8) * BITS[name]
        columns = torch.arange(kinds.shape[1], device=kinds.device) + seen
        if not self.fixed_size:
            self.kinds = widen(self.kinds, seen + kinds.shape[1], self.block_size)
            if self.capacity > (self.growths[-1][-1] if self.growths else 0):
                self.growths.append((seen, seen + kinds.shape[1], self.capacity))
        elif torch.compiler.is_compiling():
            # Changing a number would compile each step anew.
            self.fed = None
        elif self.fed is not None:
            self.fed += kinds.shape[1]
        self.kinds.scatter_(1, columns.expand_as(kinds), kinds)
        if self.logs_rows:
            self._log_rows(kinds, int(seen))
        self._log_state(decision.state, seen, kinds.shape[1])

    def log_rows(self, wanted: bool) -> None:
        """Begin or end a `row_log`."""
        self.logs_rows, self.row_log = wanted, None

    def _log_rows(self, kinds: Tensor, seen: int) -> None:
        """Note `kinds (B, n)` as written, in rows that no beam search has reordered yet."""
        if self.row_log is None or len(self.row_log) != len(kinds):
            self.row_log = kinds.new_zeros(len(kinds), 0)
        self.row_log = widen(self.row_log, seen + kinds.shape[1], self.block_size)
        self.row_log[:, seen : seen + kinds.shape[1]] = kinds

    def _log_state(self, state: Tensor | None, seen: int | Tensor, number: int) -> None:
        if self.fixed_size:
            if state is not None:
                self.state.copy_(state)
            return
        if state is None and self.state_log is None:
            return
        log = self.state[:, None][:, :0] if self.state_log is None else self.state_log
        if state is not None:
            self.state = state.detach()
        self.state_log = widen(log, seen + number, self.block_size)
        self.state_log[:, seen : seen + number] = self.state[:, None]

    def _used(self) -> Tensor:
        """`(B, capacity)` bool: slots that hold a token."""
        return self.valid & (torch.arange(self.capacity, device=self.cursor.device) < self.cursor[:, None])

    def kept_lengths(self) -> Tensor:
        """`(B,)` long: stored tokens of each row, padding not counted."""
        return torch.zeros(0, dtype=torch.long) if self.cursor is None else self._used().sum(dim=-1)

    def stored(self, columns: int) -> Tensor:
        """`(B, columns)` bool: which of the first `columns` tokens seen each row has stored."""
        used = self._used()
        # Other slots count for a column of their own, which is cut off.
        column = torch.where(used, self.column, columns).clamp(max=columns)
        return used.new_zeros(len(used), columns + 1).scatter_(1, column, True)[:, :columns]

    @persistent
    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows of the table by `function` of them (reorder, repeat, select)."""
        for name in ("cursor", "valid", "column", "kinds", "state", "state_log"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, function(tensor))
        self.drops = [(start, function(end)) for start, end in self.drops]

    def note_drops(self, start: int, chosen_from: Tensor) -> None:
        """Remember that a call from column `start` on dropped tokens, by a choice among `chosen_from (B, n)` bool."""
        behind = torch.arange(1, chosen_from.shape[1] + 1, device=chosen_from.device) + start
        self.drops.append((start, torch.where(chosen_from, behind, 0).amax(dim=-1)))

    @persistent
    def crop(self, length: int) -> None:
        """Forget the tokens from column `length` on, at least one token staying, and all that they left behind."""
        for start, end in self.drops:
            if start < length < (behind := int(end.max())):
                raise ValueError(
                    f"crop to {length} tokens reaches into a prompt whose image tokens were dropped, by a choice among "
                    f"tokens {start} to {behind - 1}; crop to {start} tokens, or to {behind} or more."
                )
        self.drops = [(start, end) for start, end in self.drops if start < length]
        stored = torch.arange(self.capacity, device=self.cursor.device) < self.cursor[:, None]
        stored &= self.column < length
        self.cursor = stored.sum(dim=-1)
        self.length_bound = int(self.cursor.max())
        self.has_padding = bool((stored & ~self.valid).any())
        self._shrink(stored, length)
        # Stale entries would point behind the mask of the next call.
        self.column = (self.column * stored)[:, : self.capacity]
        self.valid = (self.valid & stored)[:, : self.capacity]
        self.kinds = self.kinds.clone()
        self.kinds[:, length:] = 0
        if self.state_log is not None:
            self.state = self.state_log[:, length - 1].clone()

    def _shrink(self, stored: Tensor, length: int) -> None:
        """Take back the growth of calls that are forgotten; `stored (B, capacity)` are the slots that stay in use."""
        grown = [growth for growth in self.growths if growth[0] < length]
        if grown and grown[-1][1] > length:
            # Of this call a part stays, which would have needed less.
            before = stored & (self.column < (start := grown.pop()[0]))
            needed = before.sum(dim=-1).max() + (stored & ~before).sum(dim=-1).max()
            capacity = -(-int(needed) // self.block_size) * self.block_size
            if capacity > (grown[-1][-1] if grown else 0):
                grown.append((start, length, capacity))
        if grown:
            self.growths, self.capacity = grown, grown[-1][-1]
