"""Rules of one's own through every door, and what holds for every rule, the learned ones included."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from dynamic_llava.rules import IMAGE_RULES, LEARNED_IMAGES, OUTPUT_RULES, Evidence

from .tiny import batch_of, mixed_prompts, tiny_model

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


class Last:
    """The last image tokens in the sequence."""

    needs = frozenset()

    def score(self, evidence: Evidence):
        return evidence.columns.float()


class Ties:
    """Equal scores: the first ones stay."""

    needs = frozenset()

    def score(self, evidence: Evidence):
        return torch.zeros(evidence.valid.shape)


class Spread:
    """Every third token, however many that are."""

    needs = frozenset()
    ignores_rate = True

    def choose(self, evidence: Evidence):
        return (torch.arange(evidence.valid.shape[1]) % 3 == 0).expand(evidence.valid.shape)


class LikeTheText:
    """Features most like the mean state of the text."""

    needs = frozenset({"features", "text"})

    def score(self, evidence: Evidence):
        weights = evidence.text_valid[..., None].float()
        mean = (evidence.text * weights).sum(1) / weights.sum(1).clamp(min=1)
        return torch.einsum("bnd,bd->bn", evidence.features, mean)


class Doubtful:
    """The tokens that the predictor would rather drop."""

    needs = frozenset({"keep_logits"})

    def score(self, evidence: Evidence):
        return evidence.keep_logits[..., 1] - evidence.keep_logits[..., 0]


class EverySecond:
    """Output tokens in turns, told by a count that is carried on."""

    needs = frozenset()
    state_size = 1

    def keep(self, evidence: Evidence, state):
        before = state + evidence.valid.cumsum(dim=1) - evidence.valid.long()
        return before % 2 == 0, state + evidence.valid.sum(dim=1, keepdim=True)


IMAGES = [Last(), Ties(), Spread(), LikeTheText(), Doubtful()]
RULES = [({"image_selector": rule}, type(rule).__name__) for rule in IMAGES]
RULES += [({"image_selection": name}, name) for name in LEARNED_IMAGES]
RULES += [({"output_selector": EverySecond()}, "EverySecond"), ({"output_keep_rate": 0.4}, "driven"), ({}, "learned")]
EVERY_RULE = pytest.mark.parametrize("call", [call for call, _ in RULES], ids=[name for _, name in RULES])


@EVERY_RULE
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows(call, side):
    model = tiny_model()
    rows, images = mixed_prompts()
    with torch.no_grad():
        together = model.generate(**batch_of(rows, images, side), return_sparsity=True, **call, **GREEDY)
        for number, (row, image) in enumerate(zip(rows, images, strict=True)):
            alone = model.generate(**batch_of([row], [image], side), return_sparsity=True, **call, **GREEDY)
            assert torch.equal(alone.sequences[0, -12:], together.sequences[number, -12:])
            for name in ("image_tokens_kept", "output_tokens_kept"):
                assert getattr(alone.sparsity, name)[0] == getattr(together.sparsity, name)[number]


@EVERY_RULE
def test_every_way_of_decoding_gives_the_same_tokens(call):
    model = tiny_model()
    batch = batch_of(*mixed_prompts(), "left")
    with torch.no_grad():
        tokens = model.generate(**batch, **call, **GREEDY)
        assert torch.equal(model.generate(**batch, use_cache=False, **call, **GREEDY), tokens)
        assert torch.equal(model.generate(**batch, cache_implementation="static", **call, **GREEDY), tokens)
        beams = model.generate(**batch, num_beams=3, **call, **GREEDY)
        assert torch.equal(model.generate(**batch, num_beams=3, use_cache=False, **call, **GREEDY), beams)


@EVERY_RULE
def test_a_cropped_cache_goes_on_as_if_it_had_not_seen_more(call):
    model = tiny_model()
    rows, images = mixed_prompts()
    batch = batch_of(rows[:1], images[:1], "left")
    with torch.no_grad():
        whole = model.generate(**batch, return_dict_in_generate=True, **call, **GREEDY)
        cache = whole.past_key_values
        cache.crop(-5)
        prompt = whole.sequences[:, : cache.get_seq_length() + 1]
        rates = {name: value for name, value in call.items() if name.startswith("output")}
        logits = model(input_ids=prompt[:, -1:], past_key_values=cache, **rates).logits[:, -1]
    assert logits.argmax() == whole.sequences[0, prompt.shape[1]]


@pytest.mark.parametrize("rule", [Last(), Ties(), LikeTheText(), Doubtful()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("rate", [0.1, 0.4, 1.0])
def test_a_score_keeps_as_many_as_the_rate_says(rule, rate):
    model = tiny_model()
    batch = batch_of(*mixed_prompts(), "left")
    with torch.no_grad():
        sparsity = model.generate(
            **batch, return_sparsity=True, image_selector=rule, image_keep_rate=rate, **GREEDY
        ).sparsity
    for seen, kept in zip(sparsity.image_tokens.tolist(), sparsity.image_tokens_kept.tolist(), strict=True):
        assert kept == (max(int(seen * rate), 1) if seen else 0)


def test_ties_go_to_the_first():
    model = tiny_model()
    rows, images = mixed_prompts()
    with torch.no_grad():
        mask = model(**batch_of(rows[:1], images[:1], "left"), image_selector=Ties()).image_keep_mask[0]
    image = torch.tensor(rows[0]) == model.config.image_token_id
    kept = mask[image]
    assert kept[: int(kept.sum())].all()


def test_names_objects_and_places_are_one(monkeypatch):
    module = ModuleType("my_rules")
    module.Last, module.last = Last, Last()
    monkeypatch.setitem(__import__("sys").modules, "my_rules", module)
    monkeypatch.setitem(IMAGE_RULES, "last", Last())
    monkeypatch.setitem(OUTPUT_RULES, "second", EverySecond())
    model = tiny_model()
    batch = batch_of(*mixed_prompts(), "left")
    with torch.no_grad():
        kept = [
            model(**batch, image_selector=selector).image_keep_mask
            for selector in (Last(), "last", "my_rules:Last", "my_rules:last")
        ]
        tokens = [model.generate(**batch, output_selector=s, **GREEDY) for s in (EverySecond(), "second")]
    assert all(torch.equal(mask, kept[0]) for mask in kept[1:])
    assert torch.equal(*tokens)


class NoNeeds:
    def score(self, evidence):
        return evidence.valid


class Greedy(Last):
    needs = frozenset({"everything"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"image_selector": "lrned"}, "Unknown image_selector 'lrned'"),
        ({"image_selector": "radnom"}, "use random"),
        ({"output_selector": "radnom"}, "Unknown output_selector 'radnom'; use random"),
        ({"image_selector": "no_such_module:Rule"}, "cannot be imported"),
        ({"image_selector": "math:Rule"}, "cannot be imported"),
        ({"image_selector": "math:pi"}, "is no rule"),
        ({"image_selector": NoNeeds()}, "must have needs"),
        ({"image_selector": Last}, "is no rule"),
        ({"image_selector": EverySecond()}, "score or choose"),
        ({"output_selector": Last()}, "is no rule: it must have needs, a frozenset, and keep"),
        ({"image_selector": Greedy()}, "needs everything"),
        ({"image_selector": 5}, "is no rule"),
    ],
)
def test_what_is_no_rule_is_refused(call, message):
    model = tiny_model()
    rows, images = mixed_prompts()
    with pytest.raises(ValueError, match=message):
        model.generate(**batch_of(rows[:1], images[:1], "left"), **call, max_new_tokens=2)
