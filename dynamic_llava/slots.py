"""SlotTable: which slots of the sparse layers hold what. Shared by all layers from `sparse_layer` on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .functional import new_steering

# What `kinds` holds of a token: image and output tokens judged, and whether they were kept.
KINDS = {"image": 1, "image_kept": 2, "output": 4, "output_kept": 8}


class SlotTable:
    """Cursors and validity of the slots.

    Attributes:
        cursor: `(B,)` long, next slot of each row.
        valid: `(B, capacity)` bool, false at slots that hold padding.
        column: `(B, capacity)` long, which token seen (0 = first) a slot holds.
        length_bound: host-side upper bound of the cursors.
        write_index: `(B, n)` slots of the tokens being written.
        read_length: slots that the call in progress reads.
        kinds: `(B, columns)` uint8, what each token seen was: a sum of `KINDS`.
        row_log: `(B, columns)` uint8, `kinds` as each call wrote them, whatever rows became since; None unless
            `logs_rows`.
        steering: `(B, 3)` state of `functional.steered_keep_mask`.
        steering_log: `(B, columns, 3)` the state after each column, for `crop`; None until a call steers, and where the
            size is fixed.

    With `fixed_size` all tensors are allocated once and changed in place, and no Python number changes from step to
    step, so that a compiled decode step runs on unchanged.
    """

    def __init__(self, block_size: int, fixed_size: int | None = None) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}.")
        self.block_size = block_size
        self.fixed_size = fixed_size
        self.reset()

    def reset(self) -> None:
        """Forget everything, as freshly made."""
        self.capacity = self.length_bound = self.read_length = 0
        self.started = False
        self.cursor: Tensor | None = None
        self.valid: Tensor | None = None
        self.column: Tensor | None = None
        self.write_index: Tensor | None = None
        self.kinds: Tensor | None = None
        self.steering: Tensor | None = None
        self.steering_log: Tensor | None = None
        self.has_padding = False
        self.logs_rows, self.row_log = False, None
        # Columns below this belong to calls whose image tokens were dropped: they cannot be cropped into.
        self.crop_floor = 0

    def _start(self, batch_size: int, device: torch.device) -> None:
        self.cursor = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.capacity = self.fixed_size or 0
        self.valid = torch.zeros(batch_size, self.capacity, dtype=torch.bool, device=device)
        self.column = torch.zeros(batch_size, self.capacity, dtype=torch.long, device=device)
        self.kinds = torch.zeros(batch_size, self.capacity, dtype=torch.uint8, device=device)
        self.steering = new_steering(batch_size, device)
        if self.fixed_size:
            for tensor in (self.cursor, self.valid, self.column, self.kinds, self.steering):
                torch._dynamo.mark_static_address(tensor)

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
            self.valid = _widen(self.valid, needed, self.block_size)
            self.column = _widen(self.column, needed, self.block_size)
        self.read_length = self.length_bound + number

    def hide(self, present: Tensor) -> None:
        """Hide slots of tokens that a later call's `attention_mask` leaves out, such as padding behind an answer.

        Args:
            present: `(B, columns seen or more)`, 0 at tokens that are not to be seen any more.
        """
        self.valid &= present.bool().gather(1, self.column)
        self.has_padding |= not bool(present.all())

    def plan(self, valid: Tensor, column: Tensor, padded: bool) -> Tensor | None:
        """Choose the slots of a call's tokens and say what each of them sees.

        Args:
            valid: `(B, n)` bool, false at padding.
            column: `(B, n)` long, index of each token among all tokens seen.
            padded: whether `valid` may hold a false entry.

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
        if exact and number == 1 and not self.has_padding:
            return None
        slots = torch.arange(self.read_length, device=valid.device)
        own = self.write_index[:, None, :, None]
        # The diagonal keeps the row of a padding query from being empty.
        return ((slots <= own) & self.valid[:, None, None, : self.read_length]) | (slots == own)

    def commit(self, advance: Tensor, most: int) -> None:
        """Move the cursors on by `advance (B,)`, each at most `most`."""
        self.cursor.add_(advance)
        self.started = True
        if not self.fixed_size:
            self.length_bound += most

    def commit_all(self, number: int) -> None:
        """Move every cursor on by `number`."""
        self.commit(torch.full_like(self.cursor, number), most=number)

    def record(self, decision, spans, seen: int | Tensor) -> None:
        """Note what a call on tokens from column `seen` on decided, and where the steering stands."""
        kinds = torch.zeros_like(spans.present, dtype=torch.uint8)
        for name, tokens, keep in (
            ("image", spans.image, decision.image_keep_mask),
            ("output", spans.output, decision.output_keep_mask),
        ):
            if tokens is not None:
                kept = tokens if keep is None else tokens & keep
                for kind, which in ((name, tokens), (f"{name}_kept", kept)):
                    kinds = kinds + which.to(torch.uint8) * KINDS[kind]
        columns = torch.arange(kinds.shape[1], device=kinds.device) + seen
        if not self.fixed_size:
            self.kinds = _widen(self.kinds, seen + kinds.shape[1], self.block_size)
        self.kinds.scatter_(1, columns.expand_as(kinds), kinds)
        if self.logs_rows:
            self._log_rows(kinds, int(seen))
        self._log_steering(decision.steering, seen, kinds.shape[1])

    def _log_rows(self, kinds: Tensor, seen: int) -> None:
        """Note `kinds (B, n)` as written, in rows that no beam search has reordered yet."""
        if self.row_log is None or len(self.row_log) != len(kinds):
            self.row_log = kinds.new_zeros(len(kinds), 0)
        self.row_log = _widen(self.row_log, seen + kinds.shape[1], self.block_size)
        self.row_log[:, seen : seen + kinds.shape[1]] = kinds

    def _log_steering(self, steering: Tensor | None, seen: int | Tensor, number: int) -> None:
        if self.fixed_size:
            if steering is not None:
                self.steering.copy_(steering)
            return
        if steering is None and self.steering_log is None:
            return
        if self.steering_log is None:
            self.steering_log = self.steering.new_zeros(len(self.steering), 0, self.steering.shape[-1])
        if steering is not None:
            self.steering = steering
        self.steering_log = _widen(self.steering_log, seen + number, self.block_size)
        self.steering_log[:, seen : seen + number] = self.steering[:, None]

    def kept_lengths(self) -> Tensor:
        """`(B,)` long: stored tokens of each row, padding not counted."""
        if self.cursor is None:
            return torch.zeros(0, dtype=torch.long)
        slots = torch.arange(self.capacity, device=self.cursor.device)
        return (self.valid & (slots < self.cursor[:, None])).sum(dim=-1)

    def stored(self, columns: int) -> Tensor:
        """`(B, columns)` bool: which of the tokens seen each row has stored."""
        slots = torch.arange(self.capacity, device=self.cursor.device)
        used = self.valid & (slots < self.cursor[:, None])
        # Slots not in use count for a column of their own, which is cut off.
        column = torch.where(used, self.column, columns)
        found = torch.zeros(len(used), columns + 1, dtype=torch.bool, device=used.device)
        return found.scatter_(1, column, True)[:, :columns]

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows of the table by `function` of them (reorder, repeat, select)."""
        for name in ("cursor", "valid", "column", "kinds", "steering", "steering_log"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))

    def crop(self, length: int) -> None:
        """Forget the tokens from column `length` on, and what was decided about them."""
        if length < self.crop_floor:
            raise ValueError(
                f"crop to {length} tokens reaches into a prompt of {self.crop_floor} tokens whose image tokens were "
                "dropped: their selection would change. Crop less, or reset the cache and feed the shorter prompt."
            )
        if self.cursor is None:
            return
        slots = torch.arange(self.capacity, device=self.cursor.device)
        stored = slots < self.cursor[:, None]
        self.cursor = (stored & (self.column < length)).sum(dim=-1)
        self.kinds[:, length:] = 0
        if self.steering_log is not None:
            self.steering = self.steering_log[:, length - 1].clone() if length else torch.zeros_like(self.steering)


def _widen(tensor: Tensor, columns: int, block_size: int) -> Tensor:
    """`tensor (B, T, ...)` with at least `columns` columns, new ones 0, grown by whole blocks."""
    if columns <= tensor.shape[1]:
        return tensor
    missing = -(-columns // block_size) * block_size - tensor.shape[1]
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], dim=1)
