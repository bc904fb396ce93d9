"""The Triton kernels against the reference, interpreted; compiled for GPUs that are not there; and who chooses them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynamic_llava import masked_attention_kernels as masked_kernels
from dynamic_llava.masked_attention_kernels import choose_kernel, failed_trial

from .masked import problem, reference, relative
from .test_modeling import training_batch
from .tiny import tiny_model

pytest.importorskip("triton", reason="needs Triton (pip install triton)")

from dynamic_llava.masked_attention_triton import triton_masked_softmax

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
TYPES = {torch.float32: 1e-5, torch.float16: 6e-4, **({torch.bfloat16: 5e-3} if CUDA else {})}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("estimator", ["bounded", "exact"])
@pytest.mark.parametrize(
    ("length", "head_size", "kv_heads"), [(1, 64, 4), (37, 64, 2), (64, 16, 4), (130, 128, 1), (150, 32, 4)]
)
def test_output_and_gradients_equal_the_reference(dtype, estimator, length, head_size, kv_heads):
    tensors, keep, present, grad = problem(length, head_size, kv_heads=kv_heads)
    tensors, grad = [x.to(dtype).double() for x in tensors], grad.to(dtype).double()
    expected = reference(tensors, keep, present, grad, head_size**-0.5, estimator)
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in tensors] + [keep.float().to(DEVICE).requires_grad_()]
    output = triton_masked_softmax(*leaves, present.to(DEVICE), head_size**-0.5, estimator)
    output.backward(grad.to(DEVICE, dtype))
    for name, one, two in zip("oqkvm", [output.detach(), *[x.grad for x in leaves]], expected, strict=True):
        if two.norm() > 1e-10:
            assert relative(one.cpu(), two) < TYPES[dtype], name
        else:
            assert one.abs().max() < 1e-5, name


def test_layout_of_the_tensors_changes_nothing():
    """The decoder's heads lie between tokens, and gradients come in any layout."""
    tensors, keep, present, grad = problem(70, 32, kv_heads=2)
    results = []
    for spread in (False, True):
        leaves = [x.float().to(DEVICE).requires_grad_() for x in (*tensors, keep)]
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) if spread else x for x in leaves[:3]]
        output = triton_masked_softmax(*inputs, leaves[3], present.to(DEVICE), 0.2)
        out_grad = grad.float().to(DEVICE)
        output.backward(out_grad.transpose(2, 3).contiguous().transpose(2, 3) if spread else out_grad)
        results.append([output.detach(), *[x.grad for x in leaves]])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_frozen_gates_cost_nothing_and_get_nothing():
    tensors, keep, present, grad = problem(40, 16)
    leaves = [x.float().to(DEVICE).requires_grad_() for x in tensors]
    gates = keep.float().to(DEVICE)
    triton_masked_softmax(*leaves, gates, present.to(DEVICE), 0.25).backward(grad.float().to(DEVICE))
    assert gates.grad is None
    expected = reference(tensors, keep, present, grad, 0.25, "bounded")
    assert relative(leaves[1].grad.cpu(), expected[2]) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_equals_that_of_the_blocked_form(checkpointing):
    gradients = []
    for kernel in ("blocked", "triton"):
        model = tiny_model(width=64, masked_kernel=kernel).to(DEVICE).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        batch = {name: value.to(DEVICE) for name, value in training_batch().items()}
        model(**batch, gumbel_tau=0.7).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        scale = max(float(value.abs().max()), 1e-2)
        torch.testing.assert_close(gradients[1][name] / scale, value / scale, atol=1e-4, rtol=0, msg=name)


def test_autocast_computes_in_its_type():
    query = torch.randn(1, 2, 20, 16, device=DEVICE)
    value, gates = query.to(torch.float16), torch.ones(1, 20, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        output = masked_kernels.run_kernel("triton", query, query, value, gates, gates.bool(), 0.25, "bounded")
    assert output.dtype == torch.float16


def test_kernels_compile_for_gpus_and_fit_their_shared_memory(tmp_path):
    """Without a GPU the interpreter says that the sums are right, and the compiler that the kernels are."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    result = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 12


class TestChoice:
    hidden = torch.zeros(1, 4, 8)

    def test_auto_takes_blocks_without_a_gpu(self):
        assert choose_kernel("auto", self.hidden, 64) == "blocked"

    def test_what_was_asked_for(self):
        assert choose_kernel("blocked", self.hidden, 64) == "blocked"
        assert choose_kernel("triton", self.hidden.to(DEVICE), 64) == "triton"

    def test_forced_where_it_cannot_run(self):
        with pytest.raises(ValueError, match=r"head size 80 is not one of 16, 32, 64, 128; use masked_kernel='auto'"):
            choose_kernel("triton", self.hidden.to(DEVICE), 80)
        with pytest.raises(ValueError, match=r"torch\.float64 is not one of"):
            choose_kernel("triton", self.hidden.to(DEVICE).double(), 64)

    @pytest.mark.skipif(CUDA, reason="is about machines without a GPU")
    def test_forced_on_a_cpu(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="on the CPU, where Triton only interprets"):
            choose_kernel("triton", self.hidden, 64)

    def test_forced_without_triton(self, monkeypatch):
        monkeypatch.setattr(masked_kernels.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="Triton is not installed"):
            choose_kernel("triton", self.hidden, 64)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="masked_kernel must be one of auto, triton, blocked, got 'cuda'"):
            tiny_model(masked_kernel="cuda")


class TestTrial:
    """What `auto` asks the kernels for before it trusts them."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        failed_trial.cache_clear()
        yield
        failed_trial.cache_clear()

    def test_right_kernels_pass_and_no_random_number_is_drawn(self):
        state = torch.get_rng_state()
        assert failed_trial(torch.device(DEVICE), torch.float32, 16) is None
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize("factor", [1.01, float("nan")])
    def test_wrong_ones_do_not(self, monkeypatch, factor):
        def wrong(*arguments):
            return triton_masked_softmax(*arguments) * factor

        monkeypatch.setattr("dynamic_llava.masked_attention_triton.triton_masked_softmax", wrong)
        assert "kernels are off by" in failed_trial(torch.device(DEVICE), torch.float32, 16)

    def test_nor_do_those_that_raise(self, monkeypatch):
        def broken(*arguments):
            raise RuntimeError("no such instruction")

        monkeypatch.setattr("dynamic_llava.masked_attention_triton.triton_masked_softmax", broken)
        assert "RuntimeError: no such instruction" in failed_trial(torch.device(DEVICE), torch.float32, 16)

    def test_auto_says_why_it_goes_on_without_them(self, monkeypatch, caplog):
        class OnGpu(torch.Tensor):
            is_cuda = True

        monkeypatch.setattr(masked_kernels, "failed_trial", lambda *_: "the Triton kernels failed here")
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        hidden = torch.zeros(1, 4, 8).as_subclass(OnGpu)
        with caplog.at_level(logging.WARNING):
            assert choose_kernel("auto", hidden, 64) == "blocked"
        monkeypatch.setattr(masked_kernels, "failed_trial", lambda *_: None)
        assert choose_kernel("auto", hidden, 64) == "triton"
