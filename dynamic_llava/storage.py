"""Tensors that live from call to call: allocated so that any call may change them in place, grown by blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# What a tensor of a table is before its first call.
NOTHING: Tensor = None


def persistent(method: Callable) -> Callable:
    """Let what `method` makes be changed in place by calls in and outside of `torch.inference_mode`."""

    @wraps(method)
    def outside_of_inference_mode(*args, **kwargs):
        with_gradients = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(with_gradients):
            return method(*args, **kwargs)

    return outside_of_inference_mode


def widen(tensor: Tensor, columns: Any, block_size: int) -> Tensor:
    """`tensor (B, T, ...)` with at least `columns` columns, new ones 0, grown by whole blocks."""
    if columns <= tensor.shape[1]:
        return tensor
    return extend(tensor, -(-columns // block_size) * block_size, dim=1)


@persistent
def extend(tensor: Tensor, size: int, dim: int) -> Tensor:
    """A copy of `tensor` with `size` entries along `dim`, new ones 0."""
    extended = tensor.new_zeros(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    extended.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return extended


def mark_static(*tensors: Tensor) -> None:
    """Tell the compiler that the tensors keep their addresses; it cannot be told from within what it compiles."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
