"""The head runs on the tokens whose logits count alone: same losses, same gradients, same logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from .test_modeling import training_batch
from .tiny import batch_of, mixed_prompts, stock_model, tiny_model


class HeadRows:
    """Notes how many rows each call of the head has."""

    def __init__(self, model) -> None:
        self.rows: list[int] = []
        model.lm_head.register_forward_hook(lambda head, args, _: self.rows.append(args[0].numel() // head.in_features))


def run(model, batch, **arguments):
    model.zero_grad()
    torch.manual_seed(4)
    output = model(**batch, **arguments)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["masked", "pruned", "scored"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arguments", [{}, {"logits_to_keep": 7}, {"num_items_in_batch": torch.tensor(3)}])
def test_loss_and_gradients_are_those_of_all_logits(mode, side, arguments):
    model = tiny_model(sparse_training="pruned" if mode == "pruned" else "masked").train(mode != "scored")
    batch, head = training_batch(side), HeadRows(model)
    whole, expected = run(model, batch, **arguments, skip_logits=False)
    lean, found = run(model, batch, **arguments, skip_logits=True)
    asked = batch["labels"][:, -arguments.get("logits_to_keep", 0) :]
    supervised = int((asked[:, 1:] != -100).sum())
    assert head.rows[1] == supervised < head.rows[0]
    assert lean.logits is None
    assert whole.logits.shape[:2] == asked.shape
    torch.testing.assert_close(lean.lm_loss, whole.lm_loss, atol=1e-6, rtol=1e-6)
    by_hand = F.cross_entropy(whole.logits[:, :-1].mT, asked[:, 1:], reduction="sum")
    torch.testing.assert_close(by_hand / arguments.get("num_items_in_batch", supervised), lean.lm_loss)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5 * float(value.abs().max()) + 1e-7, rtol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["masked", "pruned", "scored"])
@pytest.mark.parametrize("rows", [[3], [3, 3], [0, 3]])
def test_rows_without_labels_give_no_loss_and_touch_the_head(mode, rows):
    model = tiny_model(sparse_training="pruned" if mode == "pruned" else "masked").train(mode != "scored")
    batch = training_batch()
    batch = {name: value[rows] for name, value in batch.items() if name != "pixel_values"}
    batch["pixel_values"] = training_batch()["pixel_values"][[{0: 0, 3: 3}[row] for row in rows]]
    output, gradients = run(model, batch, skip_logits=True)
    if 0 in rows:
        alone = {name: value[:1] for name, value in batch.items()}
        assert gradients["lm_head.weight"].abs().max() > 0
        if mode == "scored":
            torch.testing.assert_close(output.loss, model(**alone).loss)
    else:
        assert output.lm_loss == 0
        assert (gradients["lm_head.weight"] == 0).all()
    assert all(torch.isfinite(value).all() for value in gradients.values())


def test_defaults_and_what_is_refused():
    model, batch = tiny_model(), training_batch()
    assert model(**batch).logits.shape[:2] == batch["labels"].shape
    assert model.train()(**batch).logits is None
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    assert model(**prompt).logits is not None
    for wrong in (1, "yes", torch.tensor(True)):
        with pytest.raises(ValueError, match=r"skip_logits=.* True, False or None"):
            model(**batch, skip_logits=wrong)
    with pytest.raises(ValueError, match="True needs labels"):
        model(**prompt, skip_logits=True)
    with pytest.raises(ValueError, match="skip_logits of forward"):
        model.generate(**prompt, skip_logits=True, max_new_tokens=1)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("logits_to_keep", [0, 1, 9, torch.tensor([0, 5, 3]), torch.arange(20)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_computes_the_logits_of_kept_tokens(logits_to_keep, side, calls):
    model = tiny_model()
    head, batch = HeadRows(model), batch_of(*mixed_prompts(), side)
    with torch.no_grad():
        cache = None
        for _ in range(calls):
            output = model(**batch, logits_to_keep=logits_to_keep, past_key_values=cache, output_hidden_states=True)
            cache = output.past_key_values
            if calls > 1:
                batch["attention_mask"] = torch.cat([batch["attention_mask"]] * 2, dim=1)
        hidden = output.hidden_states[-1]
        picked = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        expected = model.lm_head(picked)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    dropped = (picked == 0).all(dim=-1)
    assert (output.logits[dropped] == 0).all()
    # The row of zeros that the others share is one more.
    assert head.rows[-2] in (int((~dropped).sum()) + 1, dropped.numel() if picked.shape[1] == 1 else 0)


def test_a_head_with_a_bias_says_it_at_dropped_tokens():
    model = tiny_model()
    bias = torch.nn.Linear(32, 100, bias=True)
    bias.weight = model.lm_head.weight
    batch = batch_of(*mixed_prompts(), "right")
    with torch.no_grad():
        plain = model(**batch).logits
        model.lm_head = bias
        torch.testing.assert_close(model(**batch).logits, plain + bias.bias, atol=1e-5, rtol=1e-5)


def test_all_kept_and_unlabelled_losses_are_stock(tmp_path):
    model = tiny_model()
    stock: LlavaForConditionalGeneration = stock_model(model)
    batch = training_batch("right")
    keep_all = {"image_keep_rate": 1.0, "output_sparsity": False}
    with torch.no_grad():
        ours, theirs = model(**batch, **keep_all), stock(**batch)
        torch.testing.assert_close(ours.loss, theirs.loss)
        assert torch.equal(ours.logits[batch["attention_mask"].bool()], theirs.logits[batch["attention_mask"].bool()])
        torch.testing.assert_close(model(**batch, **keep_all, skip_logits=True).loss, theirs.loss)


def test_stock_trainer_still_reads_logits(tmp_path):
    model, batch = tiny_model(), training_batch()
    rows = [{name: value[n] for name, value in batch.items() if name != "pixel_values"} for n in range(4)]

    def collate(samples):
        numbers = [next(n for n, row in enumerate(rows) if row is sample) for sample in samples]
        return {name: value[numbers] for name, value in batch.items() if name != "pixel_values"} | {
            "pixel_values": batch["pixel_values"]
        }

    arguments = TrainingArguments(
        tmp_path, report_to=[], use_cpu=True, remove_unused_columns=False, per_device_eval_batch_size=4
    )
    trainer = Trainer(model, arguments, data_collator=collate, eval_dataset=rows)
    logits = trainer.predict(rows).predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    assert logits.shape == (4, batch["labels"].shape[1], 100)
