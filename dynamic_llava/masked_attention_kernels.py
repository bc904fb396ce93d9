"""Which form of MaskedSoftmax runs a training step: the Triton kernels, or packed columns in plain torch.

On a GPU `auto` takes the Triton kernels once they have given the blocked form's output and gradients on a small problem
of the same type and head size on that very device; where they cannot run, or differ, the blocked form runs and a
notice says why.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from transformers.utils import logging

from .masked_attention_blocked import blocked_masked_softmax
from .sparsity_config import GATE_ESTIMATORS

logger = logging.get_logger(__name__)

# Relative norm by which the two may differ: a few roundings of each type.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# What the kernels take.
HEAD_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# More than one tile in each direction, and a last one that is not full.
TRIAL_LENGTH = 150


def choose_kernel(wanted: str, hidden: Tensor, head_size: int) -> str:
    """`triton` or `blocked` for the attention of one training step.

    To be called outside of layers: the first call on a device may run the trial, which a recomputed layer must not.

    Args:
        wanted: `auto`, `triton` or `blocked` (`SparsityConfig.masked_kernel`).
        hidden: `(B, N, D)`, for its device and type; under autocast its type counts.
        head_size: of the queries.

    Raises:
        ValueError: `triton` is asked for and cannot run here.
    """
    if wanted == "blocked" or (wanted == "auto" and not hidden.is_cuda):
        return "blocked"
    dtype = _compute_dtype(hidden)
    reason = _missing(hidden.device) or unsupported(dtype, head_size)
    if wanted == "auto":
        reason = reason or failed_trial(hidden.device, dtype, head_size)
        if reason:
            logger.warning_once(f"MaskedSoftmax runs in blocks of plain torch: {reason}.")
        return "blocked" if reason else "triton"
    if reason:
        raise ValueError(f"masked_kernel='triton' cannot run: {reason}; use masked_kernel='auto'.")
    return "triton"


def run_kernel(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    present: Tensor,
    scaling: float,
    estimator: str | Tensor,
) -> Tensor:
    """MaskedSoftmax by the kernel that `choose_kernel` gave; arguments as for `blocked_masked_softmax`."""
    if kernel == "blocked":
        return blocked_masked_softmax(query, key, value, keep_mask, present, scaling, estimator)
    from .masked_attention_triton import triton_masked_softmax

    if reason := unsupported(_compute_dtype(query), query.shape[-1]):
        raise ValueError(f"The Triton kernels of MaskedSoftmax do not take this call: {reason}; use 'blocked'.")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave queries and keys in float32; stock attention casts them in the same way.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return triton_masked_softmax(query, key, value, keep_mask, present, scaling, estimator)


@lru_cache
def failed_trial(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why the Triton kernels are not trusted on `device`: what they raised, or by how much they differ; else None."""
    from .masked_attention_triton import triton_masked_softmax

    for estimator in GATE_ESTIMATORS:
        expected = _trial(blocked_masked_softmax, device, dtype, head_size, estimator)
        try:
            found = _trial(triton_masked_softmax, device, dtype, head_size, estimator)
        # Whatever a compiler or a driver raises: training goes on without the kernels, and says so.
        except Exception as error:
            return f"the Triton kernels failed on {device} with {type(error).__name__}: {error}"
        for name, one, two in zip(("output", "query", "key", "value", "gates"), found, expected, strict=True):
            difference = float((one.float() - two.float()).norm() / two.float().norm())
            # Written so that a difference that is not a number fails too.
            if not difference <= TOLERANCE[dtype]:
                return f"the Triton kernels are off by {difference:.1e} ({name}, {estimator}, {dtype}) on {device}"
    return None


def _trial(attention: Callable, device: torch.device, dtype: torch.dtype, head_size: int, estimator: str):
    """Output and gradients of a small problem with padding, dropped columns and grouped heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, TRIAL_LENGTH, head_size) for heads in (4, 2, 2, 4)]
    query, key, value, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    gates = (torch.rand(2, TRIAL_LENGTH, generator=generator) < 0.5).float().to(device)
    present = torch.ones(2, TRIAL_LENGTH, dtype=torch.bool, device=device)
    present[1, -7:] = False
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        leaves = [tensor.requires_grad_() for tensor in (query, key, value, gates)]
        output = attention(*leaves, present, head_size**-0.5, estimator)
        grads = torch.autograd.grad(output, leaves, grad * present[:, None, :, None])
    return [output.detach(), *grads]


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _missing(device: torch.device) -> str | None:
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "tensors are on the CPU, where Triton only interprets (TRITON_INTERPRET=1)"
    return None


def unsupported(dtype: torch.dtype, head_size: int) -> str | None:
    """Why the kernels do not take such tensors, None where they do."""
    if head_size not in HEAD_SIZES:
        return f"head size {head_size} is not one of {', '.join(map(str, HEAD_SIZES))}"
    if dtype not in DTYPES:
        return f"{dtype} is not one of {', '.join(map(str, DTYPES))}"
    return None
