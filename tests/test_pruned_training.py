"""`sparse_training: pruned`: dropped image tokens leave in training, all but the probes; the rest stays as it was."""

from __future__ import annotations

import pytest
import torch

from dynamic_llava import decisions, functional

from .test_modeling import training_batch
from .tiny import tiny_model

ATTENTIONS = ["eager", "sdpa"]


def losses(model, seed=4):
    torch.manual_seed(seed)
    return model.train()(**training_batch())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("probes", [0.0, 0.5])
def test_losses_equal_masked_training(attention, side, probes):
    """Tokens that left were seen by nobody, and nobody sees a probe, so that every loss is the same."""
    outputs = []
    for mode in ("masked", "pruned"):
        model = tiny_model(attention=attention, sparse_training=mode, pruned_probe_rate=probes).train()
        torch.manual_seed(4)
        outputs.append(model(**training_batch(side)))
    for name in ("loss", "lm_loss", "image_budget_loss", "output_budget_loss"):
        torch.testing.assert_close(getattr(outputs[0], name), getattr(outputs[1], name), atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs[0].image_keep_mask, outputs[1].image_keep_mask)


def gradients(mode, monkeypatch, probes=0.0):
    """Gradients of the LM loss alone, and the gradient that each gate receives."""
    model = tiny_model(sparse_training=mode, budget_weight=0.0, pruned_probe_rate=probes).train()
    masks = []
    original = functional.gumbel_keep_mask

    def noted(*args):
        mask = original(*args)
        mask.retain_grad()
        masks.append(mask)
        return mask

    monkeypatch.setattr(decisions, "gumbel_keep_mask", noted)
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


@pytest.mark.parametrize("rate", [0.25, 0.6, 1.0])
def test_gates_of_probes_get_the_gradient_of_masked_training_over_the_rate(monkeypatch, rate):
    """So that their mean over the draws of probes is that of masked training."""
    (_, one), (_, two) = (gradients(mode, monkeypatch, rate) for mode in ("masked", "pruned"))
    kept = one[0].detach() > 0.5
    masked, pruned = one[0].grad[~kept], two[0].grad[~kept]
    probed = pruned != 0
    assert probed.any()
    # Rows without an answer give no gradient to anything.
    assert torch.equal(probed, masked != 0) == (rate == 1)
    torch.testing.assert_close(pruned[probed] * rate, masked[probed], atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(one[0].grad[kept], two[0].grad[kept], atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(one[1].grad, two[1].grad, atol=1e-6, rtol=1e-3)


def test_probes_are_as_many_as_asked_for():
    """Drawn for each call anew, among the dropped tokens of every row."""
    lengths, stay = [], []
    model = tiny_model(sparse_training="pruned", pruned_probe_rate=0.5).train()
    model.model.language_model.layers[-1].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    batch = {name: value[:1] for name, value in training_batch().items()}
    for seed in range(30):
        torch.manual_seed(seed)
        mask = model(**batch).image_keep_mask.bool()
        stay.append((int((mask & batch["attention_mask"].bool()).sum()), int((~mask).sum())))
    extra = [length - kept for length, (kept, _) in zip(lengths, stay, strict=True)]
    assert len(set(extra)) > 1
    assert sum(extra) / sum(dropped for _, dropped in stay) == pytest.approx(0.5, abs=0.15)


def test_every_trained_parameter_gets_a_gradient():
    model = tiny_model(sparse_training="pruned")
    losses(model).loss.backward()
    for name, parameter in model.named_parameters():
        if "language_model" in name:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_the_sparse_layers_see_fewer_tokens():
    lengths = []
    model = tiny_model(sparse_training="pruned", pruned_probe_rate=0.0)
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


@pytest.mark.parametrize("rate", [-0.1, 1.5, True])
def test_probe_rate_out_of_range(rate):
    with pytest.raises(ValueError, match="pruned_probe_rate must be a number, at least 0 and at most 1"):
        tiny_model(pruned_probe_rate=rate)
