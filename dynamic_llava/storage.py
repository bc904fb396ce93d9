"""Tensors that live from call to call: allocated so that any call may change them in place, grown by blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(tensor: Tensor, columns: int, block_size: int) -> Tensor:
    """`tensor (B, T, ...)` with at least `columns` columns, new ones 0, grown by whole blocks."""
    if columns <= tensor.shape[1]:
        return tensor
    return extend(tensor, -(-columns // block_size) * block_size, dim=1)


def extend(tensor: Tensor, size: int, dim: int) -> Tensor:
    """A copy of `tensor` with `size` entries along `dim`, new ones 0, which calls in any mode may change in place."""
    shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    with torch.inference_mode(False):
        extended = tensor.new_zeros(shape)
    extended.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return extended


def mark_static(*tensors: Tensor) -> None:
    """Tell the compiler that the tensors keep their addresses; it cannot be told from within what it compiles."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
