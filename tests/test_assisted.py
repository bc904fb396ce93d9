"""Assisted decoding: tokens, decisions and cache are those of plain decoding, whatever is drafted."""

from __future__ import annotations

import pytest
import torch

from dynamic_llava import SparseCache

from .tiny import batch_of, image_run, mixed_prompts, pictures, stock_model, tiny_model, words

GREEDY = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
ARGUMENTS = [{}, {"output_keep_rate": 0.3}, {"output_sparsity": False}, {"image_keep_rate": 1.0}]


class EveryOther:
    """An output rule with a state: keeps the first of every `n` tokens of a row."""

    needs = frozenset()
    state_size = 1

    def keep(self, evidence, state):
        kept = []
        for _ in range(evidence.valid.shape[1]):
            kept.append(state[:, 0] % 3 == 0)
            state = state + 1
        return torch.stack(kept, dim=1), state


def judging_model(**kwargs):
    """A model that keeps about half of any output."""
    model = tiny_model(**kwargs)
    tokens, predictor = torch.tensor([words(60, 3)]), model.model.language_model.output_predictor
    with torch.no_grad():
        logits = model(tokens, num_generated=50, use_cache=False).output_keep_logits
        predictor.head[-1].bias[0] -= (logits[..., 0] - logits[..., 1]).median()
    return model


def feed(model, cache, tokens, **arguments):
    with torch.no_grad():
        return model(tokens, past_key_values=cache, num_generated=tokens.shape[1], **arguments)


@pytest.mark.parametrize("arguments", [*ARGUMENTS, {"output_selector": EveryOther()}])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("max_length", [None, 90])
def test_several_output_tokens_in_one_call_are_judged_one_by_one(attention, arguments, max_length):
    model, batch = judging_model(attention=attention), batch_of(*mixed_prompts(), "left")
    tokens = torch.tensor([words(13, 50 + row) for row in range(4)])
    found = []
    for parts in ([13], [1, 5, 7], [1] * 13):
        cache, logits, kept = SparseCache(model.config, max_length=max_length), [], []
        mask = batch["attention_mask"]
        for number, part in enumerate(torch.split(tokens, parts, dim=1)):
            inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
            for call in ([inputs] if number == 0 else []) + [{"input_ids": part, "num_generated": part.shape[1]}]:
                if call is not inputs:
                    mask = torch.cat([mask, torch.ones_like(part)], dim=1)
                shown = mask if max_length is None else torch.nn.functional.pad(mask, (0, 90 - mask.shape[1]))
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -call["input_ids"].shape[1] :]
                with torch.no_grad():
                    output = model(
                        **call, attention_mask=shown, position_ids=positions, past_key_values=cache, **arguments
                    )
                if call is not inputs:
                    logits.append(output.logits)
                    kept.append(output.output_keep_mask)
        stored = cache.table.stored(batch["input_ids"].shape[1] + 13)
        found.append((torch.cat(logits, dim=1), None if kept[0] is None else torch.cat(kept, dim=1), stored))
    for logits, kept, stored in found[1:]:
        torch.testing.assert_close(logits, found[0][0], atol=2e-5, rtol=1e-4)
        assert torch.equal(stored, found[0][2])
        if kept is not None:
            assert torch.equal(kept, found[0][1])
            assert set(kept.flatten().tolist()) == {True, False}


@pytest.mark.parametrize("arguments", [*ARGUMENTS, {"output_selector": EveryOther()}])
@pytest.mark.parametrize("accepted", [1, 3, 4])
def test_rejected_tokens_leave_nothing_behind(arguments, accepted):
    model, batch = judging_model(), batch_of(*mixed_prompts(), "left")
    tokens = torch.tensor([words(9, 50 + row) for row in range(4)])
    caches = [SparseCache(model.config) for _ in range(2)]
    for cache in caches:
        with torch.no_grad():
            model(**batch, past_key_values=cache, **arguments)
    feed(model, caches[0], tokens[:, :4], **arguments)
    if accepted < 4:
        caches[0].crop(accepted - 4)
    for number in range(accepted):
        feed(model, caches[1], tokens[:, number : number + 1], **arguments)
    assert torch.equal(caches[0].kept_lengths, caches[1].kept_lengths)
    one, two = (feed(model, cache, tokens[:, 5:8], **arguments).logits for cache in caches)
    torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


def prompts():
    repeating = words(6, 9) * 3
    return {
        "picture": ([1, *words(2, 1), *image_run(), *words(4, 2)], pictures(1, 1)),
        "pictures at the end": ([1, *repeating, *image_run(2)], pictures(2, 2)),
        "text": ([1, *repeating], None),
    }


@pytest.mark.parametrize("arguments", [*ARGUMENTS, {"output_selector": EveryOther()}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("name", prompts())
def test_prompt_lookup_gives_the_tokens_of_plain_greedy(name, arguments):
    model = judging_model()
    row, images = prompts()[name]
    batch, told = batch_of([row], [images], "left"), {"return_dict_in_generate": True, "return_sparsity": True}
    plain = model.generate(**batch, **GREEDY, **arguments, **told)
    calls = []
    hook = model.model.register_forward_hook(lambda *_: calls.append(1))
    found = model.generate(**batch, **GREEDY, **arguments, **told, prompt_lookup_num_tokens=4)
    hook.remove()
    assert torch.equal(found.sequences, plain.sequences)
    assert found.sparsity.kept_columns == plain.sparsity.kept_columns
    for part in ("image_tokens_kept", "output_tokens_kept", "output_tokens"):
        assert torch.equal(getattr(found.sparsity, part), getattr(plain.sparsity, part))
    assert len(calls) <= 40


def test_what_repeats_takes_fewer_passes():
    """All words are the same one: each pass accepts what it has drafted."""
    model = judging_model()
    with torch.no_grad():
        model.lm_head.weight[:] = 0
    batch, calls = batch_of([[1, *image_run(), *words(4, 2), 0, 0, 0, 0]], [pictures(1)], "left"), []
    model.generation_config.suppress_tokens = None
    model.model.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**batch, max_new_tokens=40, do_sample=False, pad_token_id=99, prompt_lookup_num_tokens=7)
    assert len(calls) < 15


@pytest.mark.parametrize("assistant", ["itself", "stock", "another"])
@pytest.mark.parametrize("arguments", [{}, {"output_keep_rate": 0.3, "image_keep_rate": 0.5}])
@pytest.mark.parametrize("name", prompts())
def test_an_assistant_gives_the_tokens_of_plain_greedy(name, assistant, arguments):
    model = judging_model()
    drafts = {"itself": lambda: model, "stock": lambda: stock_model(model), "another": lambda: tiny_model(seed=5)}
    row, images = prompts()[name]
    batch = batch_of([row], [images], "left")
    plain = model.generate(**batch, **GREEDY, **arguments)
    found = model.generate(**batch, **GREEDY, **arguments, assistant_model=drafts[assistant]())
    assert torch.equal(found, plain)


def test_a_cache_that_has_started_is_refused():
    model, ids = tiny_model(), torch.tensor([[1, 5, 6]])
    cache = model(ids, use_cache=True).past_key_values
    whole = {"input_ids": torch.tensor([[1, 5, 6, 7, 8]]), "past_key_values": cache}
    with pytest.raises(ValueError, match="feeds the whole prompt again"):
        model.generate(**whole, attention_mask=torch.ones(1, 5), prompt_lookup_num_tokens=3, **GREEDY)


@pytest.mark.parametrize("assistant", ["stock", "another"])
def test_a_padded_prompt_is_assisted_too(assistant):
    model = tiny_model()
    batch = batch_of([[0, 0, 1, *words(2, 1), *image_run(), *words(4, 2)]], [pictures(1)], "left")
    batch["attention_mask"][:, :2] = 0
    plain = model.generate(**batch, **GREEDY)
    drafts = stock_model(model) if assistant == "stock" else tiny_model(seed=5)
    assert torch.equal(model.generate(**batch, **GREEDY, assistant_model=drafts), plain)


def test_a_sparse_assistant_sees_the_pictures():
    """Itself as its assistant drafts what it says: most is accepted, also where the picture ends the prompt."""
    model = tiny_model()
    for name in ("picture", "pictures at the end"):
        row, images = prompts()[name]
        drafts, passes = tiny_model(), []
        drafts.generation_config.num_assistant_tokens = 5
        drafts.generation_config.assistant_confidence_threshold = 0
        hook = model.model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        model.generate(**batch_of([row], [images], "left"), **GREEDY, output_sparsity=False, assistant_model=drafts)
        hook.remove()
        assert len(passes) < 20


def test_a_prompt_and_output_in_one_call_on_a_cache_are_refused():
    model, cache = tiny_model(), None
    for cache, number in ((SparseCache(model.config), 3), (None, 2)):
        cache = cache or model(torch.tensor([[1, 5, 6]]), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"{number} generated of 3 tokens in one call on a cache"):
            model(torch.tensor([[1, 5, 6]]), past_key_values=cache, num_generated=number)
