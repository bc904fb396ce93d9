"""KeptTable: which tokens the slots of the sparse layers hold. Shared by all layers from `sparse_layer` on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .decisions import Decision
from .kept_history import KeptHistory, noted_kinds
from .storage import NOTHING, mark_static, persistent, widen
from .token_masks import TokenMasks


class KeptTable:
    """Cursors and validity of the slots.

    Attributes:
        cursor: `(B,)` long, next slot of each row.
        valid: `(B, capacity)` bool, false at slots that hold padding.
        column: `(B, capacity)` long, which token seen (0 = first) a slot holds.
        length_bound: host-side upper bound of the cursors, `exact` where it is that of the only row.
        write_index: `(B, n)` slots of the tokens being written.
        read_length: slots that the call in progress reads.
        kinds: `(B, columns)` uint8, what each token seen was: a sum of `kept_history.BITS`.
        state: `(B, S)` of the output rule (`rules.OutputRule`), S its `state_size`.
        state_log: `(B, columns, S)` the state after each column, for `crop`; None until it changes, and where the size
            is fixed.
        history: what `crop` has to undo.
        fed: host-side number of tokens fed where the size is fixed; None where compiled steps were not counted.

    What a call's `attention_mask` hides is hidden from that call alone and stored nowhere, so that it needs no undoing.
    Everything is allocated outside of `torch.inference_mode`, so that calls in and outside of it can change it in turn.
    With `fixed_size`, in tokens, all tensors are allocated in the first call, with slots for what it keeps and for all
    that may follow, and changed in place; no Python number that a compiled step reads changes from step to step.
    """

    def __init__(self, block_size: int, fixed_size: int | None = None) -> None:
        self.block_size = block_size
        self.fixed_size = fixed_size
        self.reset()

    def reset(self) -> None:
        """Forget everything, as freshly made."""
        self.capacity = self.length_bound = self.read_length = 0
        self.started, self.exact, self.state_size = False, False, 0
        self.cursor = self.valid = self.column = self.write_index = NOTHING
        self._slots = self.kinds = self.state = self.state_log = NOTHING
        self.has_padding = False
        self.history = KeptHistory(self.block_size)
        self.fed: int | None = 0

    def begin(self, state_size: int) -> None:
        """Make room for the state of a call's output rule: that of the calls before, where they had the same."""
        if self.state is not None and state_size not in (0, self.state.shape[1]):
            self.state, self.state_log = self.state.new_zeros(len(self.state), state_size), None
        self.state_size = state_size

    @persistent
    def _start(self, batch_size: int, device: torch.device, dropped: int) -> None:
        """Allocate for the first call, of whose tokens each row drops `dropped` or more."""
        if self.fixed_size:
            # Enough if all that follows is kept; whole multiples are what masks are aligned to.
            self.capacity = min(-(-(self.fixed_size - dropped) // 16) * 16, self.fixed_size)
        self.cursor = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.valid = torch.zeros(batch_size, self.capacity, dtype=torch.bool, device=device)
        self.column = torch.zeros(batch_size, self.capacity, dtype=torch.long, device=device)
        self.kinds = torch.zeros(batch_size, self.fixed_size or 0, dtype=torch.uint8, device=device)
        self.state = torch.zeros(batch_size, self.state_size, device=device)
        if self.fixed_size:
            mark_static(self.cursor, self.valid, self.column, self.kinds, self.state)

    def tighten(self) -> None:
        """Read the largest cursor back from the device: the host's bound is exact until tokens are stored."""
        self.length_bound = int(self.cursor.max())
        self.exact = len(self.cursor) == 1

    def _reserve(self, number: int) -> None:
        """Make room for `number` more slots; the bound is tightened where that is free or saves a growth."""
        if self.fixed_size:
            self.read_length = self.capacity if self.started else number
            return
        on_host = self.cursor.device.type == "cpu"
        if not self.exact and (on_host or self.length_bound + number > self.capacity):
            self.tighten()
        needed = self.length_bound + number
        if needed > self.capacity:
            self.capacity = -(-needed // self.block_size) * self.block_size
            self.valid = widen(self.valid, needed, self.block_size)
            self.column = widen(self.column, needed, self.block_size)
        self.read_length = self.length_bound + number

    def plan(
        self, valid: Tensor, column: Tensor, padded: bool, present: Tensor | None = None, dropped: int = 0
    ) -> Tensor:
        """Choose the slots of a call's tokens and say what each of them sees.

        Args:
            valid: `(B, n)` bool, false at padding.
            column: `(B, n)` long, index of each token among all tokens seen.
            padded: whether `valid` may hold a false entry.
            present: `(B, columns seen or more)`, 0 at tokens that this call is not to see, such as padding behind an
                earlier answer; None means that it sees all.
            dropped: of the call's tokens, how many each row drops at least.

        Returns:
            `(B, 1, n, read_length)` bool, true where a query sees a slot.
        """
        batch_size, number = valid.shape
        if self.cursor is None:
            self._start(batch_size, valid.device, dropped)
        self.has_padding |= padded
        self._reserve(number)
        steps = torch.arange(number, device=valid.device)
        self._write_to(self.cursor[:, None] + steps)
        self.valid.scatter_(1, self.write_index, valid)
        self.column.scatter_(1, self.write_index, column)
        # The diagonal keeps the row of a padding query from being empty.
        own = self.write_index[:, None, :, None]
        slots = torch.arange(self.read_length, device=valid.device)
        return ((slots <= own) & self._shown(present)[:, None, None]) | (slots == own)

    def plan_one(self, column: int | Tensor, present: Tensor | None) -> Tensor | None:
        """As `plan` for one generated token of each row; None where each sees all (one row, no padding)."""
        self._reserve(1)
        self._write_to(self.cursor[:, None].clone())
        self.valid.scatter_(1, self.write_index, True)
        held = column if isinstance(column, int) else column.expand_as(self.write_index)
        self.column.scatter_(1, self.write_index, held)
        # On a GPU looking into the mask would wait for it; `generate` leaves out one that hides nothing.
        hiding = present is not None and (present.is_cuda or not self.exact or not bool(present.all()))
        if self.exact and not self.has_padding and not hiding:
            return None
        slots = torch.arange(self.read_length, device=self.cursor.device)
        visible = (slots <= self.write_index) & self._shown(present)
        return (visible if present is None else visible | (slots == self.write_index))[:, None, None]

    def plan_drafts(self, keep: Tensor, column: Tensor, present: Tensor | None) -> Tensor:
        """As `plan` for several generated tokens of each row, of which those of `keep (B, n)` bool are to be stored.

        They are written in front of the others, which no token but themselves sees, so that the cursor moves over them.
        """
        number = keep.shape[1]
        self._reserve(number)
        kept, dropped = keep.cumsum(dim=1), (~keep).cumsum(dim=1)
        self._write_to(self.cursor[:, None] + torch.where(keep, kept, kept[:, -1:] + dropped) - 1)
        self.valid.scatter_(1, self.write_index, True)
        self.column.scatter_(1, self.write_index, column.expand_as(self.write_index))
        slots = torch.arange(self.read_length, device=keep.device)
        stored = (slots < (self.cursor + kept[:, -1])[:, None]) & self._shown(present)
        earlier = self.column[:, None, : self.read_length] <= column[..., None]
        return ((earlier & stored[:, None]) | (slots == self.write_index[..., None]))[:, None]

    def _write_to(self, index: Tensor) -> None:
        self.write_index, self._slots = index, None

    def slots_of(self, states: Tensor) -> Tensor:
        """`write_index` in the shape of `states (B, H_kv, n, d)`, made once for all layers of a call."""
        if self._slots is None or self._slots.shape != states.shape:
            self._slots = self.write_index[:, None, :, None].expand_as(states)
        return self._slots

    def _shown(self, present: Tensor | None) -> Tensor:
        """`(B, read_length)` bool: slots that hold no padding and nothing that a call's `present` hides."""
        shown = self.valid[:, : self.read_length]
        return shown if present is None else shown & present.bool().gather(1, self.column[:, : self.read_length])

    def commit(self, advance: Tensor | int, most: int) -> None:
        """Move the cursors on by `advance`, `(B,)` or of all rows, each at most `most`."""
        self.cursor.add_(advance)
        self.started, self.exact = True, False
        if not self.fixed_size:
            self.length_bound += most

    def record(self, decision: Decision, tokens: TokenMasks, seen: int | Tensor) -> None:
        """Note what a call on tokens from column `seen` on decided, and the state of its output rule."""
        kinds = noted_kinds(decision, tokens)
        if not self.fixed_size:
            self.kinds = widen(self.kinds, seen + kinds.shape[1], self.block_size)
            self.history.note_capacity(seen, seen + kinds.shape[1], self.capacity)
        elif torch.compiler.is_compiling():
            # Changing a number would compile each step anew.
            self.fed = None
        elif self.fed is not None:
            self.fed += kinds.shape[1]
        if self.fixed_size:
            columns = torch.arange(kinds.shape[1], device=kinds.device) + seen
            self.kinds.scatter_(1, columns.expand_as(kinds), kinds)
        else:
            self.kinds[:, seen : seen + kinds.shape[1]] = kinds
        self.history.note_rows(kinds, seen)
        self._log_state(decision.state, seen, kinds.shape[1])

    def _log_state(self, state: Tensor | None, seen: int | Tensor, number: int) -> None:
        """`state` is one for the call, or `(B, number, S)` behind each of its tokens."""
        states = state if state is None or state.dim() == 3 else state[:, None]
        if self.fixed_size:
            if states is not None:
                self.state.copy_(states[:, -1])
            return
        if states is None and self.state_log is None:
            return
        log = self.state[:, None][:, :0] if self.state_log is None else self.state_log
        if states is not None:
            self.state = states[:, -1].detach()
        self.state_log = widen(log, seen + number, self.block_size)
        self.state_log[:, seen : seen + number] = self.state[:, None] if states is None else states.detach()

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
        self.history.map_rows(function)
        self.exact = False

    @persistent
    def crop(self, length: int) -> None:
        """Forget the tokens from column `length` on, at least one token staying, and all that they left behind."""
        self.history.forget_drops(length)
        stored = torch.arange(self.capacity, device=self.cursor.device) < self.cursor[:, None]
        stored &= self.column < length
        self.cursor = stored.sum(dim=-1)
        self.tighten()
        self.has_padding = bool((stored & ~self.valid).any())
        self.capacity = self.history.capacity_before(length, stored, self.column, self.capacity)
        # Stale entries would point behind the mask of the next call.
        self.column = (self.column * stored)[:, : self.capacity]
        self.valid = (self.valid & stored)[:, : self.capacity]
        self.kinds = self.kinds.clone()
        self.kinds[:, length:] = 0
        if self.state_log is not None:
            self.state = self.state_log[:, length - 1].clone()
