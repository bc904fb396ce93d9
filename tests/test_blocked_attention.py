"""Packed MaskedSoftmax against the reference on materialised float64 scores: forward and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

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
    # Not exactly twice: how many columns are dropped is drawn.
    assert sizes[1] <= 2.2 * sizes[0]
    assert sizes[1] <= 2 * 4 * 64 * 1024


def test_unknown_estimator():
    tensors, keep, present, _ = problem(4, 8)
    with pytest.raises(ValueError, match="Unknown gate_estimator 'free'"):
        blocked_masked_softmax(*tensors, keep, present, 1.0, "free")


@pytest.mark.parametrize("estimator", ["bounded", "exact", "by column"])
@pytest.mark.parametrize("kept", ["all", "none", "the last", "one row's"])
@pytest.mark.parametrize("block", [16, 64])
def test_rows_of_any_number_of_kept_columns(estimator, kept, block):
    tensors, keep, present, grad = problem(50, 16, kv_heads=2)
    keep = {"all": torch.ones_like, "none": torch.zeros_like}.get(kept, torch.clone)(keep)
    if kept == "the last":
        keep[:, :45] = 0
    elif kept == "one row's":
        keep[0] = 0
    if estimator == "by column":
        estimator = torch.rand(keep.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    expected = reference(tensors, keep, present, grad, 0.25, estimator)
    leaves = [x.float().requires_grad_() for x in (*tensors, keep)]
    output = blocked_masked_softmax(*leaves, present, 0.25, estimator, block=block)
    output.backward(grad.float())
    for name, one, two in zip("oqkvm", [output.detach(), *[x.grad for x in leaves]], expected, strict=True):
        torch.testing.assert_close(one.double(), two, atol=2e-5, rtol=1e-4, msg=name)


def test_gates_without_a_gradient_change_no_other():
    tensors, keep, present, grad = problem(70, 16)
    results = []
    for wanted in (True, False):
        leaves = [x.float().requires_grad_() for x in tensors]
        gates = keep.float().requires_grad_(wanted)
        blocked_masked_softmax(*leaves, gates, present, 0.25).backward(grad.float())
        results.append([x.grad for x in leaves])
    assert gates.grad is None
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_work_shrinks_with_the_kept_columns():
    """Products of a training step over those of causal attention, with a third of the columns kept."""
    tensors, keep, present, grad = problem(512, 32)
    present[:] = True
    flops = {}
    for rate in (1.0, 0.33):
        gates = (torch.rand(keep.shape, generator=torch.Generator().manual_seed(1)) < rate).float().requires_grad_()
        leaves = [x.float().requires_grad_() for x in tensors]
        with FlopCounterMode(display=False) as counted:
            blocked_masked_softmax(*leaves, gates, present, 0.25, block=32).backward(grad.float())
        flops[rate] = counted.get_total_flops()
    # All kept: seven products. Otherwise seven on a third of the columns and two on the rest.
    assert flops[0.33] / flops[1.0] < 1.1 * (7 * 0.33 + 2 * 0.67) / 7
