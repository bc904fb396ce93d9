"""Problems for MaskedSoftmax attention, and their solution on materialised float64 scores."""

from __future__ import annotations

import torch

from dynamic_llava.masked_attention import causal_visible
from dynamic_llava.masked_softmax import masked_softmax


def problem(length: int, head_size: int, heads: int = 4, kv_heads: int = 4, seed: int = 0):
    """Query, key, value, hard gates, present and the gradient of the output; rows padded on both sides."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, length, head_size), *[(2, kv_heads, length, head_size)] * 2]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    keep = (torch.rand(2, length, generator=generator) < 0.4).double()
    present = torch.ones(2, length, dtype=torch.bool)
    present[0, : length // 5] = False
    present[1, -(length // 7) :] = False
    grad = torch.randn(shapes[0], generator=generator, dtype=torch.float64) * present[:, None, :, None]
    return tensors, keep, present, grad


def reference(tensors, keep, present, grad, scaling, estimator):
    """Output and gradients of query, key, value and gates, all in float64."""
    leaves = [x.clone().requires_grad_() for x in (*tensors, keep)]
    query, key, value, gates = leaves
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    output = masked_softmax(scores, gates, causal_visible(present), estimator) @ value
    output.backward(grad)
    return [output.detach(), *[x.grad for x in leaves]]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
