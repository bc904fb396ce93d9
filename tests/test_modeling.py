"""The decoder's promises: stock when nothing is dropped, rows independent, cached = uncached = scored."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from dynamic_llava import SparseCache, decisions
from dynamic_llava.statistics import SparsityStatistics

from .naive import naive_generate
from .tiny import (
    IMAGE_TOKEN,
    batch_of,
    image_run,
    mixed_prompts,
    pad_rows,
    pictures,
    stock_model,
    tiny_model,
    words,
)

ATTENTIONS = ["eager", "sdpa"]
SIDES = ["left", "right"]


def present(output, mask):
    return output.logits[mask.bool()]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_all_keep_equals_stock_bit_for_bit(attention):
    model = tiny_model(attention=attention)
    stock = stock_model(model)
    rows, images = mixed_prompts()
    batch = batch_of(rows, images, "left")
    keep_all = {"image_keep_rate": 1.0, "output_sparsity": False}
    with torch.no_grad():
        one = {"input_ids": torch.tensor(rows[:1]), "pixel_values": images[0]}
        assert torch.equal(model(**one, **keep_all).logits, stock(**one).logits)
        arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        arguments |= {"return_dict_in_generate": True, "output_logits": True}
        ours = model.generate(**batch, **keep_all, **arguments)
        theirs = stock.generate(**batch, **arguments)
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, (our, their) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert torch.equal(our, their), step


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", SIDES)
def test_batch_rows_equal_single_rows(attention, side):
    model = tiny_model(attention=attention)
    rows, images = mixed_prompts()
    batch = batch_of(rows, images, side)
    with torch.no_grad():
        together = model(**batch)
        for number, (row, image) in enumerate(zip(rows, images, strict=True)):
            alone = model(**batch_of([row], [image], side))
            mask = batch["attention_mask"][number].bool()
            torch.testing.assert_close(together.logits[number][mask], alone.logits[0], atol=2e-5, rtol=1e-4)
            if image is not None:
                assert torch.equal(together.image_keep_mask[number][mask], alone.image_keep_mask[0])
            assert together.past_key_values.kept_lengths[number] == alone.past_key_values.kept_lengths[0]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_cached_equals_uncached_equals_naive_over_64_tokens(attention):
    model = tiny_model(attention=attention)
    rows, images = mixed_prompts()
    batch = batch_of(rows, images, "left")
    arguments = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**batch, **arguments)
    uncached = model.generate(**batch, **arguments, use_cache=False)
    assert torch.equal(cached, uncached)
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        assert cached[number, -64:].tolist() == naive_generate(model, row, image, 64)[0]


def stepwise(model, row, image, answer):
    """Per-token log-probabilities of `answer` by cached decoding, and the decisions on the way."""
    with torch.no_grad():
        output = model(**batch_of([row], [image], "left"), use_cache=True)
        cache, logits, kept = output.past_key_values, [output.logits[0, -1]], []
        for token in answer[:-1]:
            output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            logits.append(output.logits[0, -1])
            kept.append(bool(output.output_keep_mask[0, 0]))
    scores = torch.stack(logits).log_softmax(-1)
    return scores.gather(1, torch.tensor(answer)[:, None])[:, 0], kept


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", SIDES)
def test_scoring_equals_stepwise_cached_decoding(attention, side):
    model = tiny_model(attention=attention)
    rows, images = mixed_prompts()
    answers = [words(length, 20 + length) for length in (12, 3, 9, 1)]
    full = [row + answer for row, answer in zip(rows, answers, strict=True)]
    labels, _ = pad_rows([[-100] * len(r) + a for r, a in zip(rows, answers, strict=True)], side, fill=-100)
    batch = batch_of(full, images, side)
    with torch.no_grad():
        output = model(**batch, labels=labels)
    total, count = 0.0, 0
    for number, answer in enumerate(answers):
        expected, kept = stepwise(model, rows[number], images[number], answer)
        mask = batch["attention_mask"][number].bool()
        logits = output.logits[number][mask][len(rows[number]) - 1 : -1].log_softmax(-1)
        found = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert output.output_keep_mask[number][mask][len(rows[number]) : -1].tolist() == kept
        total, count = total - expected.sum(), count + len(answer)
    torch.testing.assert_close(output.loss, total / count, atol=1e-5, rtol=1e-5)
    decisions = [bool(x) for x in output.output_keep_mask[labels != -100]]
    assert True in decisions
    assert False in decisions


@pytest.mark.parametrize("side", SIDES)
def test_scores_of_the_last_positions_alone(side):
    model = tiny_model()
    batch = training_batch(side)
    first = int((batch["labels"] != -100).any(dim=0).long().argmax())
    last = batch["labels"].shape[1] - first + 1
    with torch.no_grad():
        whole = model(**batch)
        part = model(**batch, logits_to_keep=last)
    torch.testing.assert_close(part.logits, whole.logits[:, -last:], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(part.loss, whole.loss, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        fewer = model(**batch, logits_to_keep=4)
        labels = torch.full_like(batch["labels"], -100)
        labels[:, -3:] = batch["labels"][:, -3:]
        expected = torch.nn.functional.cross_entropy(whole.logits[:, :-1].mT, labels[:, 1:])
    torch.testing.assert_close(fewer.lm_loss, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="logits_to_keep is a number"):
        model(**batch, logits_to_keep=torch.tensor([3]))


def training_batch(side="right"):
    rows, images = mixed_prompts()
    answers = [words(9, 30), words(5, 31), words(2, 32), []]
    full = [row + answer for row, answer in zip(rows, answers, strict=True)]
    labels, _ = pad_rows([[-100] * len(r) + a for r, a in zip(rows, answers, strict=True)], side, fill=-100)
    return batch_of(full, images, side) | {"labels": labels}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", SIDES)
def test_training_gives_finite_gradients_everywhere(attention, side):
    model = tiny_model(attention=attention).train()
    output = model(**training_batch(side), gumbel_tau=0.5)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert torch.equal(output.image_keep_mask, output.image_keep_mask.round())
    for name, parameter in model.named_parameters():
        unused = "post_layernorm" in name or "vision_tower.encoder.layers.2" in name
        if not unused and "head" not in name.split(".")[0]:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    for predictor in ("image_predictor", "output_predictor"):
        moved = [p.grad.abs().sum() for n, p in model.named_parameters() if predictor in n]
        assert min(moved) > 0


def test_a_batch_without_answers_has_zero_loss_terms():
    model = tiny_model().train()
    batch = training_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    output = model(**batch)
    assert output.lm_loss == 0
    assert output.output_budget_loss == 0
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("estimator", ["bounded", "exact"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sdpa_gradients_equal_eager(estimator, kv_heads, monkeypatch):
    gradients = []
    for attention in ATTENTIONS:
        model = tiny_model(attention=attention, gate_estimator=estimator, kv_heads=kv_heads).train()
        generator = torch.Generator().manual_seed(5)
        monkeypatch.setattr(
            decisions,
            "sample_gumbel",
            lambda shape, g=generator, **_: -torch.empty(shape).exponential_(generator=g).log(),
        )
        model(**training_batch(), gumbel_tau=0.7).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, value in gradients[0].items():
        if name.endswith("k_proj.bias"):
            continue  # Softmax does not see it: its gradient is rounding error.
        scale = max(float(value.abs().max()), 1e-2)
        torch.testing.assert_close(gradients[1][name] / scale, value / scale, atol=1e-4, rtol=0, msg=name)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(**training_batch(), gumbel_tau=0.7).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name)


def test_one_batch_equals_accumulated_single_rows(monkeypatch):
    model = tiny_model().train()
    batch = training_batch()
    rows = len(batch["labels"])
    stored = {}
    per_row = torch.Generator().manual_seed(9)
    noise = [torch.randn(64, 2, generator=per_row) for _ in range(2 * rows)]

    def whole(shape, **_):
        kind = stored["kind"] = 1 - stored.get("kind", 1)
        return torch.stack([noise[kind * rows + row][: shape[1]] for row in range(shape[0])])

    monkeypatch.setattr(decisions, "sample_gumbel", whole)
    tokens = (batch["labels"] != -100).sum()
    together = model(**batch, num_items_in_batch=tokens)
    total = 0.0
    first_image = 0
    for row in range(rows):
        number = int((batch["input_ids"][row] == IMAGE_TOKEN).sum()) // 16
        single = {key: value[row : row + 1] for key, value in batch.items() if key != "pixel_values"}
        if number:
            single["pixel_values"] = batch["pixel_values"][first_image : first_image + number]
            first_image += number

        def one(shape, row=row, **_):
            kind = stored["kind"] = 1 - stored.get("kind", 1)
            return noise[kind * rows + row][: shape[1]][None]

        monkeypatch.setattr(decisions, "sample_gumbel", one)
        output = model(**single, num_items_in_batch=tokens)
        total = total + output.lm_loss + 100 * (output.image_budget_loss + output.output_budget_loss) / rows
    torch.testing.assert_close(total, together.loss, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_second_turn_with_a_new_image_in_a_batch(side):
    """Three calls on one cache: prompts, answers, then a new turn with an image in one row."""
    model = tiny_model()
    first = [[1, *image_run(), *words(3, 1)], [1, *words(5, 2)]]
    answers = [words(4, 3), words(4, 4)]
    second = [[*words(2, 5), *image_run(), *words(2, 6)], [*words(20, 7)]]
    images, later = [pictures(1, 1), None], [pictures(1, 2), None]

    def run(rows_1, images_1, rows_a, rows_2, images_2):
        batch = batch_of(rows_1, images_1, side)
        mask = batch["attention_mask"]
        logits = []
        with torch.no_grad():
            cache = model(**batch, use_cache=True).past_key_values
            for token in torch.tensor(rows_a).T:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                step = model(input_ids=token[:, None], attention_mask=mask, past_key_values=cache, use_cache=True)
                logits.append(step.logits)
            turn = batch_of(rows_2, images_2, side)
            turn["attention_mask"] = torch.cat([mask, turn["attention_mask"]], dim=1)
            logits.append(model(**turn, past_key_values=cache, use_cache=True).logits)
        return torch.cat(logits, dim=1), cache.kept_lengths

    together, kept = run(first, images, answers, second, later)
    for row in range(2):
        alone, kept_alone = run(
            first[row : row + 1],
            images[row : row + 1],
            answers[row : row + 1],
            second[row : row + 1],
            later[row : row + 1],
        )
        torch.testing.assert_close(together[row], alone[0], atol=2e-5, rtol=1e-4)
        assert kept[row] == kept_alone[0]


@pytest.mark.parametrize("arguments", [{}, {"output_keep_rate": 0.3}])
def test_crop_forgets_as_if_never_fed(arguments):
    model = tiny_model()
    rows, images = mixed_prompts()
    batch = batch_of(rows, images, "left")
    tokens = torch.tensor([words(6, 40 + row) for row in range(4)])

    def feed(cache, columns):
        with torch.no_grad():
            return [
                model(input_ids=tokens[:, c : c + 1], past_key_values=cache, use_cache=True, **arguments).logits
                for c in columns
            ]

    with torch.no_grad():
        straight = model(**batch, use_cache=True).past_key_values
        cropped = model(**batch, use_cache=True).past_key_values
    feed(straight, [0, 1])
    feed(cropped, [0, 1, 4, 5, 3])
    cropped.crop(-3)
    assert torch.equal(straight.kept_lengths, cropped.kept_lengths)
    assert SparsityStatistics.of(straight).output_tokens.tolist() == [2] * 4
    assert torch.equal(torch.cat(feed(straight, [2, 3])), torch.cat(feed(cropped, [2, 3])))
    for name in ("image_tokens_kept", "output_tokens_kept", "output_tokens", "kept_columns"):
        one, two = (getattr(SparsityStatistics.of(cache), name) for cache in (straight, cropped))
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, name
    with pytest.raises(ValueError, match="image tokens"):
        cropped.crop(-(cropped.get_seq_length() - 3))


def test_beams_equal_beams_without_cache_and_repeat():
    model = tiny_model()
    rows, images = mixed_prompts()
    batch = batch_of(rows, images, "left")
    arguments = {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**batch, **arguments)
    assert torch.equal(cached, model.generate(**batch, **arguments, use_cache=False))
    assert torch.equal(cached, model.generate(**batch, **arguments))


def test_wrong_caches_are_refused():
    model = tiny_model()
    ids = torch.tensor([[1, 5, 6]])
    with pytest.raises(ValueError, match="SparseCache"):
        model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(ValueError, match="SparseCache"):
        model.generate(input_ids=ids, past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(ValueError, match="sparse_layer=3"):
        model(input_ids=ids, past_key_values=SparseCache(tiny_model(sparse_layer=3).config), use_cache=True)
    cache = SparseCache(model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="holds 1 rows, the call has 2"):
        model(input_ids=ids.repeat(2, 1), past_key_values=cache, use_cache=True)


def test_bad_calls_name_the_value():
    model = tiny_model()
    with_image = torch.tensor([[1, *image_run(), 5]])
    with pytest.raises(ValueError, match="pixel_values"):
        model(input_ids=with_image)
    with pytest.raises(ValueError, match=r"16 image tokens .*by row \[16\]\) for 32 image features"):
        model(input_ids=with_image, pixel_values=pictures(2))
    with pytest.raises(ValueError, match=r"by row \[16, 0\]\) for 32 image features.*none for text-only rows"):
        model(**batch_of([with_image[0].tolist(), [1, 5, 6]], [pictures(1), pictures(1)], "right"))
    positions = torch.arange(18)[None]
    for wrong, message in (
        (positions[:, 1:], r"position_ids has shape \(1, 17\)"),
        (positions.flip(-1), "position_ids of row 0 contradict the attention mask"),
        (positions - 1, "position_ids of row 0 contradict the attention mask"),
    ):
        with pytest.raises(ValueError, match=message):
            model(input_ids=with_image, pixel_values=pictures(1), position_ids=wrong)
    for beams in (1, 2):
        with pytest.raises(ValueError, match="0 image tokens"):
            model.generate(
                input_ids=torch.tensor([[1, 5, 6]]), pixel_values=pictures(1), num_beams=beams, max_new_tokens=2
            )
    with pytest.raises(ValueError, match=r"\(0, 1\], got 1.5"):
        model(input_ids=with_image, pixel_values=pictures(1), image_keep_rate=1.5)
    with pytest.raises(ValueError, match=r"\(0, 1\], got 0"):
        model.generate(input_ids=with_image, pixel_values=pictures(1), image_keep_rate=0, max_new_tokens=1)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(input_ids=with_image, pixel_values=pictures(1), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="Unknown image_selector 'best'"):
        model(input_ids=with_image, pixel_values=pictures(1), image_selector="best")
