"""The optional instruct predictor: text of the last user turn, dropped in prefill and training."""

from __future__ import annotations

import pytest
import torch

from dynamic_llava.token_masks import last_user_turn_mask

from .naive import NaiveRow
from .tiny import IMAGE_TOKEN, batch_of, image_run, pad_rows, pictures, tiny_model, words

USER, ASSISTANT = [90, 91], [92, 93, 94]
OPTIONS = {
    "instruct_predictor": True,
    "user_marker": USER,
    "assistant_marker": ASSISTANT,
    "min_instruct_length": 4,
    "instruct_keep_rate": 0.6,
}
GREEDY = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}


def text(length: int, seed: int) -> list[int]:
    return [token % 80 + 3 for token in words(length, seed)]


# Image in the last turn; image in the first of two turns; text only; image behind the question; no marker at all.
ROWS = [
    [1, *text(3, 1), *USER, *image_run(), *text(9, 2), *ASSISTANT],
    [1, *USER, *image_run(), *text(5, 3), *ASSISTANT, *text(3, 4), 2, *USER, *text(8, 5), *ASSISTANT],
    [1, *USER, *text(7, 6), *ASSISTANT],
    [1, *USER, *text(6, 7), *image_run(), *text(1, 8), *ASSISTANT],
    [1, *image_run(), *text(6, 9)],
]
IMAGES = [pictures(1, 1), pictures(1, 2), None, pictures(1, 3), pictures(1, 4)]


def naive_span(row: list[int]) -> list[int]:
    """By the published definition, on lists."""
    if IMAGE_TOKEN not in row:
        return []
    after_image = max(i for i, token in enumerate(row) if token == IMAGE_TOKEN) + 1
    instruct = row[after_image:]
    users = [i + len(USER) for i in range(len(instruct)) if instruct[i : i + len(USER)] == USER]
    ends = [i for i in range(len(instruct)) if instruct[i : i + len(ASSISTANT)] == ASSISTANT]
    if not ends:
        return []
    return list(range(after_image + (users[-1] if users else 0), after_image + ends[-1]))


def test_the_span_is_that_of_the_published_code():
    ids, mask = pad_rows(ROWS, "left")
    found = last_user_turn_mask(ids, ids == IMAGE_TOKEN, ~mask.bool(), USER, ASSISTANT)
    for number, row in enumerate(ROWS):
        offset = ids.shape[1] - len(row)
        assert (found[number].nonzero()[:, 0] - offset).tolist() == naive_span(row), number
    assert [len(naive_span(row)) for row in ROWS] == [9, 8, 0, 1, 0]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = tiny_model(**OPTIONS)
    with torch.no_grad():
        for parameter in model.model.language_model.instruct_predictor.parameters():
            if parameter.dim() == 2:
                torch.nn.init.orthogonal_(parameter, gain=2.0)
    return model


class NaiveInstruct(NaiveRow):
    """Also drops what the instruct predictor drops; the last token of the text is not judged in inference."""

    def _dropped_outputs(self, states):
        dropped = super()._dropped_outputs(states)
        predictor = self.model.model.language_model.instruct_predictor
        for i in naive_span(self.row)[:-1]:
            logits = predictor(states[i])
            if logits[0] <= logits[1]:
                dropped.add(i)
        return dropped


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_the_definition(model, use_cache):
    together = model.generate(
        **batch_of(ROWS, IMAGES, "left"),
        **GREEDY,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(together.logits, dim=1)
    with torch.no_grad():
        for number, (row, image) in enumerate(zip(ROWS, IMAGES, strict=True)):
            naive, output = NaiveInstruct(model, row, image), together.sequences[number, -16:].tolist()
            for step in range(16):
                expected = naive.logits(output[:step])
                torch.testing.assert_close(logits[number, step], expected, atol=1e-4, rtol=1e-4)


def test_something_is_dropped_and_the_cache_is_shorter(model):
    with torch.no_grad():
        output = model(**batch_of(ROWS, IMAGES, "left"), use_cache=True)
    dropped = (~output.instruct_keep_mask).sum(dim=1)
    assert dropped[0] > 0
    assert dropped[[2, 3, 4]].tolist() == [0, 0, 0]
    plain = tiny_model(**{**OPTIONS, "instruct_predictor": False})
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        other = plain(**batch_of(ROWS, IMAGES, "left"), use_cache=True)
    assert (other.past_key_values.kept_lengths - output.past_key_values.kept_lengths).tolist() == dropped.tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_draws_masks_and_adds_the_budget(attention):
    model = tiny_model(attention=attention, **OPTIONS).train()
    rows = [row + text(6, 20 + n) for n, row in enumerate(ROWS)]
    labels, _ = pad_rows([[-100] * len(r) + f[len(r) :] for r, f in zip(ROWS, rows, strict=True)], "right", fill=-100)
    torch.manual_seed(2)
    output = model(**batch_of(rows, IMAGES, "right"), labels=labels)
    keep, expected = output.instruct_keep_mask, 0.0
    for number, row in enumerate(ROWS):
        span = naive_span(row)
        outside = torch.ones(keep.shape[1], dtype=torch.bool)
        outside[span] = False
        assert keep[number][outside].eq(1).all()
        if len(span) >= 4:
            expected += (0.6 - keep[number][span].mean()) ** 2 / len(ROWS)
        else:
            assert keep[number].eq(1).all()
    torch.testing.assert_close(output.instruct_budget_loss, expected)
    budgets = output.image_budget_loss + output.output_budget_loss + output.instruct_budget_loss
    torch.testing.assert_close(output.loss, output.lm_loss + 100 * budgets)
    output.loss.backward()
    grads = [p.grad for p in model.model.language_model.instruct_predictor.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)


def test_scoring_equals_generation(model):
    output = model.generate(
        **batch_of(ROWS, IMAGES, "left"), **GREEDY, return_dict_in_generate=True, output_logits=True
    )
    answers = output.sequences[:, -16:].tolist()
    rows = [row + answer for row, answer in zip(ROWS, answers, strict=True)]
    labels, _ = pad_rows([[-100] * len(r) + a for r, a in zip(ROWS, answers, strict=True)], "left", fill=-100)
    with torch.no_grad():
        scored = model(**batch_of(rows, IMAGES, "left"), labels=labels)
    torch.testing.assert_close(scored.logits[:, -17:-1], torch.stack(output.logits, dim=1), atol=2e-5, rtol=1e-4)


def test_bad_settings():
    with pytest.raises(ValueError, match="instruct_keep_rate"):
        tiny_model(instruct_keep_rate=0)
    with pytest.raises(ValueError, match="user_marker must be token ids"):
        tiny_model(user_marker=[])
    model = tiny_model(**OPTIONS)
    ids = torch.tensor([ROWS[0]])
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="pass them, not inputs_embeds"):
        model(inputs_embeds=embeds, pixel_values=IMAGES[0])
