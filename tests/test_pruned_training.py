"""`sparse_training: pruned`: dropped image tokens leave in training, everything else stays as it was."""

from __future__ import annotations

import pytest
import torch

from dynamic_llava import functional

from .test_modeling import training_batch
from .tiny import tiny_model

ATTENTIONS = ["eager", "sdpa"]


def losses(model, seed=4):
    torch.manual_seed(seed)
    return model.train()(**training_batch())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_equal_masked_training(attention, side):
    """Tokens that left were seen by nobody, so that every loss is the same."""
    outputs = []
    for mode in ("masked", "pruned"):
        model = tiny_model(attention=attention, sparse_training=mode).train()
        torch.manual_seed(4)
        outputs.append(model(**training_batch(side)))
    for name in ("loss", "lm_loss", "image_budget_loss", "output_budget_loss"):
        torch.testing.assert_close(getattr(outputs[0], name), getattr(outputs[1], name), atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs[0].image_keep_mask, outputs[1].image_keep_mask)


def gradients(mode, monkeypatch, keep_all_outputs=False):
    """Gradients of the LM loss alone, and the gradient that each image gate receives."""
    model = tiny_model(sparse_training=mode, budget_weight=0.0, output_predictor=not keep_all_outputs).train()
    masks = []
    original = functional.gumbel_keep_mask

    def noted(*args):
        mask = original(*args)
        mask.retain_grad()
        masks.append(mask)
        return mask

    monkeypatch.setattr(functional, "gumbel_keep_mask", noted)
    torch.manual_seed(4)
    model(**training_batch()).loss.backward()
    monkeypatch.undo()
    return model, masks


def test_gradients_differ_in_the_gates_of_dropped_images_alone(monkeypatch):
    (masked, one), (pruned, two) = (gradients(mode, monkeypatch) for mode in ("masked", "pruned"))
    kept = one[0].detach() > 0.5
    assert (one[0].grad[~kept].abs() > 0).any()
    assert (two[0].grad[~kept] == 0).all()
    torch.testing.assert_close(one[0].grad[kept], two[0].grad[kept], atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(one[1].grad, two[1].grad, atol=1e-6, rtol=1e-3)
    for name, parameter in pruned.named_parameters():
        if "layers.4" in name or "lm_head" in name:
            other = masked.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, other, atol=1e-5, rtol=1e-3, msg=name)


def test_every_trained_parameter_gets_a_gradient():
    model = tiny_model(sparse_training="pruned")
    losses(model).loss.backward()
    for name, parameter in model.named_parameters():
        if "language_model" in name:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_the_sparse_layers_see_fewer_tokens():
    lengths = []
    model = tiny_model(sparse_training="pruned")
    model.model.language_model.layers[-1].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    output = losses(model)
    stay = output.image_keep_mask.bool() & training_batch()["attention_mask"].bool()
    assert lengths == [int(stay.sum(dim=1).max())]


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model = tiny_model(sparse_training="pruned")
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses(model).loss.backward()
        found.append(model.model.language_model.image_predictor.down[1].weight.grad)
    torch.testing.assert_close(*found)


def test_unknown_mode():
    with pytest.raises(ValueError, match="sparse_training must be one of masked, pruned, got 'cut'"):
        tiny_model(sparse_training="cut")
