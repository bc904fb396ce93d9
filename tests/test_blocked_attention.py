"""Blocked MaskedSoftmax against the reference on materialised float64 scores: forward and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dynamic_llava.masked_attention_blocked import blocked_masked_softmax

from .masked import problem, reference, relative


@pytest.mark.parametrize("estimator", ["bounded", "exact"])
@pytest.mark.parametrize("length", [1, 37, 130])
@pytest.mark.parametrize(("head_size", "kv_heads"), [(64, 4), (128, 2), (64, 1)])
def test_float32_equals_the_reference(estimator, length, head_size, kv_heads):
    tensors, keep, present, grad = problem(length, head_size, kv_heads=kv_heads)
    scaling = head_size**-0.5
    expected = reference(tensors, keep, present, grad, scaling, estimator)
    leaves = [x.float().requires_grad_() for x in (*tensors, keep)]
    output = blocked_masked_softmax(*leaves, present, scaling, estimator, block=32)
    output.backward(grad.float())
    for name, one, two in zip("oqkvm", [output.detach(), *[x.grad for x in leaves]], expected, strict=True):
        if two.norm() > 0:
            assert relative(one, two) < 1e-5, name
        else:
            assert one.abs().max() < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ["bounded", "exact"])
def test_half_precision_is_as_near_as_its_rounding(dtype, estimator):
    """The reference gets the rounded inputs, so that what is left is the arithmetic and one rounding of each result."""
    tensors, keep, present, grad = problem(100, 64)
    tensors, grad = [x.to(dtype).double() for x in tensors], grad.to(dtype).double()
    expected = reference(tensors, keep, present, grad, 0.125, estimator)
    leaves = [x.to(dtype).requires_grad_() for x in tensors] + [keep.float().requires_grad_()]
    output = blocked_masked_softmax(*leaves, present, 0.125, estimator, block=32)
    output.backward(grad.to(dtype))
    rounding = {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    assert relative(output.detach(), expected[0].to(dtype).double()) < 1e-4
    for name, one, two in zip("oqkvm", [output.detach(), *[x.grad for x in leaves]], expected, strict=True):
        assert relative(one, two) < rounding, name


def test_the_block_changes_nothing():
    tensors, keep, present, grad = problem(90, 32)
    results = []
    for block in (1, 32, 4096):
        leaves = [x.float().requires_grad_() for x in (*tensors, keep)]
        output = blocked_masked_softmax(*leaves, present, 0.2, "bounded", block=block)
        output.backward(grad.float())
        results.append([output.detach(), *[x.grad for x in leaves]])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that an operation gives out."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


def test_nothing_is_quadratic_in_the_length():
    sizes = []
    for length in (512, 1024):
        tensors, keep, present, grad = problem(length, 16)
        leaves = [x.float().requires_grad_() for x in (*tensors, keep)]
        with LargestTensor() as largest:
            blocked_masked_softmax(*leaves, present, 0.25, "bounded", block=64).backward(grad.float())
        sizes.append(largest.size)
    assert sizes[1] <= 2 * sizes[0]
    assert sizes[1] <= 2 * 4 * 64 * 1024


def test_unknown_estimator():
    tensors, keep, present, _ = problem(4, 8)
    with pytest.raises(ValueError, match="Unknown gate_estimator 'free'"):
        blocked_masked_softmax(*tensors, keep, present, 1.0, "free")
