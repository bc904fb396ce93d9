"""Budgets on decisions, entropy of keep probabilities, and gate estimators by kind: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from dynamic_llava import SparsityConfig, decisions
from dynamic_llava.decisiveness import decided_keep_mask, keep_entropy
from dynamic_llava.masked_attention_blocked import blocked_masked_softmax

from .masked import problem, reference, relative
from .test_modeling import training_batch
from .tiny import tiny_model


def test_decided_masks_are_decisions_with_the_gradient_of_the_probability():
    logits = torch.tensor([[0.3, 0.1], [0.1, 0.3], [0.2, 0.2], [5.0, -5.0]], requires_grad=True)
    mask = decided_keep_mask(logits)
    assert mask.tolist() == [1, 0, 0, 1]
    mask.sum().backward()
    twin = logits.detach().clone().requires_grad_()
    twin.softmax(dim=-1)[:, 0].sum().backward()
    assert torch.equal(logits.grad, twin.grad)


def test_the_entropy_is_that_of_the_loops():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64) * 3
    valid = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    counted = torch.tensor([True, True, True])
    rows = []
    for row, number in enumerate((5, 2, 0)):
        keep = [1 / (1 + math.exp(b - a)) for a, b in logits[row, :number].tolist()]
        terms = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in keep]
        rows.append(sum(terms) / max(number, 1))
    assert float(keep_entropy(logits, valid, counted)) == pytest.approx(sum(rows) / 3, rel=1e-5)
    assert float(keep_entropy(logits, valid, torch.tensor([False, True, True]))) == pytest.approx(rows[1] / 3, rel=1e-5)
    # Logits of any size give a number, and a gradient that leads away from one half.
    wide = torch.tensor([[[0.1, 0.0], [0.0, 0.1], [1e4, -1e4]]], requires_grad=True)
    keep_entropy(wide, torch.ones(1, 3, dtype=torch.bool), torch.tensor([True])).backward()
    assert wide.grad[0, 0, 0] < 0 < wide.grad[0, 1, 0]
    assert torch.isfinite(wide.grad).all()


def losses(seed: int = 3, **sparsity):
    model = tiny_model(**sparsity).train()
    torch.manual_seed(seed)
    output = model(**training_batch(), gumbel_tau=0.7)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def decided(output, kind: str) -> torch.Tensor:
    logits = output[f"{kind}_keep_logits"]
    return logits[..., 0] > logits[..., 1]


def test_entropy_is_weighed_into_the_loss_where_logits_alone_decide():
    plain, _ = losses()
    assert plain.output_keep_entropy is plain.image_keep_entropy is None
    output, _ = losses(keep_entropy_weight=3.0)
    assert output.image_keep_entropy is None
    assert 0 < float(output.output_keep_entropy) <= math.log(2)
    torch.testing.assert_close(output.loss, plain.loss + 3.0 * output.output_keep_entropy)
    by_threshold, _ = losses(keep_entropy_weight=3.0, image_selection="threshold")
    assert 0 < float(by_threshold.image_keep_entropy) <= math.log(2)


@pytest.mark.parametrize("image_selection", ["topk", "threshold"])
def test_a_budget_on_decisions_counts_decisions(image_selection):
    sampled, _ = losses(image_selection=image_selection)
    output, grads = losses(image_selection=image_selection, budget_on="argmax")
    answers = (training_batch()["labels"] != -100).sum(dim=-1)
    rows = [
        (0.5 - float(decided(output, "output")[row, :n].float().mean())) ** 2 for row, n in enumerate(answers) if n >= 4
    ]
    assert float(output.output_budget_loss) == pytest.approx(sum(rows) / len(answers), rel=1e-5)
    same = torch.equal(output.image_budget_loss, sampled.image_budget_loss)
    assert same == (image_selection == "topk")
    # The masks are drawn as before.
    assert torch.equal(output.output_keep_mask, sampled.output_keep_mask)
    assert float(grads["model.language_model.output_predictor.head.4.bias"].abs().max()) > 0


@pytest.mark.parametrize("estimator", ["image", "output"])
@pytest.mark.parametrize(
    ("attention", "training"), [("eager", "masked"), ("sdpa", "masked"), ("sdpa", "pruned"), ("eager", "pruned")]
)
def test_each_predictor_has_the_gradient_of_its_estimator(estimator, attention, training):
    """Gates do not meet in the gradient: a predictor learns as in a model whose columns all have its estimator."""
    common = {"attention": attention, "sparse_training": training}
    _, mixed = losses(**common, **{f"{estimator}_gate_estimator": "exact"})
    _, exact = losses(**common, gate_estimator="exact")
    _, bounded = losses(**common)
    for kind in ("image", "output"):
        wanted, other = (exact, bounded) if kind == estimator else (bounded, exact)
        name = f"model.language_model.{kind}_predictor.head.4.weight"
        torch.testing.assert_close(mixed[name], wanted[name], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(mixed[name], other[name], atol=1e-5, rtol=1e-2), kind


def test_one_word_for_all_is_what_it_was():
    assert SparsityConfig(gate_estimator="exact").gate_estimators() == {"image": "exact", "output": "exact"}
    both = SparsityConfig(image_gate_estimator="exact", output_gate_estimator="exact")
    assert decisions.gate_estimator(both, tokens=None) == "exact"
    alone = SparsityConfig(image_predictor=False, image_gate_estimator="exact")
    assert decisions.gate_estimator(alone, tokens=None) == "bounded"
    for name in ("image_gate_estimator", "output_gate_estimator", "budget_on"):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'soft'"):
            SparsityConfig(**{name: "soft"})


@pytest.mark.parametrize("kernel", ["blocked", "triton"])
def test_columns_of_a_kernel_have_their_own_estimator(kernel):
    tensors, keep, present, grad = problem(100, 16, kv_heads=2)
    exact = torch.arange(100).expand(2, 100) % 3 == 0
    expected = {word: reference(tensors, keep, present, grad, 0.25, word)[-1] for word in ("exact", "bounded")}
    wanted = torch.where(exact, expected["exact"], expected["bounded"])
    assert relative(reference(tensors, keep, present, grad, 0.25, exact)[-1], wanted) < 1e-12
    if kernel == "triton":
        pytest.importorskip("triton")
        from dynamic_llava.masked_attention_triton import triton_masked_softmax as attention
    else:
        attention = blocked_masked_softmax
    place = "cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu"
    leaves = [x.float().to(place).requires_grad_() for x in (*tensors, keep)]
    attention(*leaves, present.to(place), 0.25, exact.to(place)).backward(grad.float().to(place))
    assert relative(leaves[-1].grad.cpu(), wanted) < 1e-5
