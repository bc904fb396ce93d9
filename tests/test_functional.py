"""The functional core against naive loops."""

from __future__ import annotations

import math

import pytest
import torch

from dynamic_llava import functional
from dynamic_llava.masked_softmax import masked_softmax
from dynamic_llava.sparsity_config import GATE_ESTIMATORS
from dynamic_llava.token_masks import answer_token_mask


def test_gumbel_noise_has_the_gumbel_moments():
    noise = functional.sample_gumbel((200_000,), generator=torch.Generator().manual_seed(0))
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_gumbel_keep_mask_is_hard_with_soft_gradients():
    logits = torch.randn(4, 7, 2, requires_grad=True)
    noise = functional.sample_gumbel((4, 7, 2), generator=torch.Generator().manual_seed(1))
    mask = functional.gumbel_keep_mask(logits, noise, 0.7)
    expected = ((logits + noise).argmax(dim=-1) == 0).float()
    assert torch.equal(mask, expected)
    (gradient,) = torch.autograd.grad((mask * torch.arange(7.0)).sum(), logits)
    soft = ((logits + noise) / 0.7).softmax(dim=-1)[..., 0]
    (reference,) = torch.autograd.grad((soft * torch.arange(7.0)).sum(), logits)
    torch.testing.assert_close(gradient, reference)
    with pytest.raises(ValueError, match="above 0, got 0"):
        functional.gumbel_keep_mask(logits, noise, 0)


@pytest.mark.parametrize("rate", [0.2, 0.29, 0.5, 1.0])
def test_top_k_keep_mask_against_sorting(rate):
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(5, 20, generator=generator).round(decimals=1)
    valid = torch.rand(5, 20, generator=generator) < torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0])[:, None]
    mask = functional.top_k_keep_mask(scores, valid, functional.keep_counts(valid, rate))
    for row in range(5):
        places = valid[row].nonzero()[:, 0].tolist()
        number = min(max(int(len(places) * rate), 1), len(places))
        best = sorted(places, key=lambda place: (-scores[row, place].item(), place))[:number]
        assert mask[row].nonzero()[:, 0].tolist() == sorted(best)


def test_the_paper_keeps_115_of_576():
    valid = torch.ones(1, 576, dtype=torch.bool)
    mask = functional.top_k_keep_mask(torch.rand(1, 576), valid, functional.keep_counts(valid, 0.2))
    assert mask.sum() == 115


def test_threshold_keeps_at_least_the_best():
    logits = torch.tensor([[[0.0, 1.0], [0.5, 1.0], [-3.0, 1.0]], [[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]]])
    valid = torch.ones(2, 3, dtype=torch.bool)
    assert functional.threshold_keep_mask(logits, valid).tolist() == [[False, True, False], [True, False, True]]


def test_packing_and_its_inverse():
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(4, 9, generator=generator) < torch.tensor([0.5, 1.0, 0.2, 0.0])[:, None]
    values = torch.randn(4, 9, 3, generator=generator)
    index, valid, full = functional.pack_left(mask)
    assert not full
    packed = functional.gather_kept(values, index)
    for row in range(4):
        torch.testing.assert_close(packed[row][valid[row]], values[row][mask[row]])
    restored = functional.scatter_kept(packed, index, valid, torch.zeros_like(values))
    assert torch.equal(restored, values * mask[..., None])


def naive_masked_softmax(scores, gates, candidates):
    """Eq. 7 by the definition, differentiable in the gates."""
    size = scores.shape[-1]
    eye = torch.eye(size, dtype=scores.dtype)
    factors = gates[:, None, None, :] * (1 - eye) * candidates.to(scores.dtype) + eye
    weights = scores.exp() * factors
    return weights / weights.sum(dim=-1, keepdim=True)


def softmax_case(seed=4):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    gates = (torch.rand(2, 8, generator=generator) < 0.5).double()
    present = torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    candidates = torch.ones(8, 8, dtype=torch.bool).tril() & present[:, None, None, :]
    upstream = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return scores, gates, candidates, upstream


def test_masked_softmax_is_equation_7_with_its_derivative():
    scores, gates, candidates, upstream = softmax_case()
    results = []
    for function in (naive_masked_softmax, lambda *a: masked_softmax(*a, "exact")):
        s, g = scores.clone().requires_grad_(), gates.clone().requires_grad_()
        weights = function(s, g, candidates)
        (weights * upstream).sum().backward()
        results.append((weights.detach(), s.grad, g.grad))
    for reference, found in zip(*results, strict=True):
        torch.testing.assert_close(found, reference)


def test_bounded_gate_gradient_is_the_effect_of_flipping_the_gate():
    """`bounded` is d(loss) for flipping one gate, to first order in the change of the weights, and equals `exact` on
    kept columns."""
    scores, gates, candidates, upstream = softmax_case(5)
    gradients = {}
    for estimator in GATE_ESTIMATORS:
        g = gates.clone().requires_grad_()
        (masked_softmax(scores, g, candidates, estimator) * upstream).sum().backward()
        gradients[estimator] = g.grad
    kept = gates > 0.5
    torch.testing.assert_close(gradients["bounded"][kept], gradients["exact"][kept])
    base = naive_masked_softmax(scores, gates, candidates)
    for row, column in (~kept).nonzero().tolist():
        flipped = gates.clone()
        flipped[row, column] = 1
        change = ((naive_masked_softmax(scores, flipped, candidates) - base) * upstream)[row].sum()
        torch.testing.assert_close(gradients["bounded"][row, column], change)


def test_masked_softmax_of_huge_scores_stays_finite():
    scores = torch.tensor([[[[0.0, 0.0], [300.0, 0.0]]]], requires_grad=True)
    gates = torch.tensor([[0.0, 1.0]], requires_grad=True)
    candidates = torch.ones(2, 2, dtype=torch.bool).tril()[None, None]
    weights = masked_softmax(scores, gates, candidates)
    (weights * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert weights[0, 0, 1].tolist() == [0.0, 1.0]
    assert torch.isfinite(gates.grad).all()
    with pytest.raises(ValueError, match="Unknown gate_estimator 'soft'"):
        masked_softmax(scores, gates, candidates, "soft")


def test_budget_loss_by_hand():
    mask = torch.tensor([[1.0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    valid = torch.tensor([[True] * 4 + [False], [False] * 5, [True] * 5])
    expected = ((0.5 - 0.25) ** 2 + 0 + (0.5 - 0.4) ** 2) / 3
    assert functional.budget_loss(mask, valid, 0.5) == pytest.approx(expected)
    counted = torch.tensor([True, True, False])
    assert functional.budget_loss(mask, valid, 0.5, counted) == pytest.approx(0.25**2 / 3)


def test_answer_spans():
    ignore = -100
    labels = torch.tensor(
        [
            [ignore, 5, 6, ignore, 7, 8],  # two turns: the last answer
            [ignore, ignore, 7, 8, ignore, ignore],  # right padding
            [ignore, ignore, ignore, ignore, 7, 8],  # left padding
            [ignore, 7, ignore, ignore, ignore, ignore],  # ends in a question
            [ignore] * 6,
        ]
    )
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1] * 6, [1] * 6])
    found = [row.nonzero()[:, 0].tolist() for row in answer_token_mask(labels, mask)]
    assert found == [[4, 5], [2, 3], [4, 5], [], []]
