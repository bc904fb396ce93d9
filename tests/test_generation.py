"""`generate` in every mode, and the per-call arguments."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

from dynamic_llava import SparseCache, functional

from .naive import naive_generate, naive_sequence, naive_steering
from .tiny import IMAGE_TOKEN, batch_of, image_run, mixed_prompts, pad_rows, pictures, tiny_model, words

GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def batch():
    return batch_of(*mixed_prompts(), "left")


@pytest.mark.parametrize("use_cache", [True, False])
def test_right_padding_equals_left_padding(model, batch, use_cache):
    right = batch_of(*mixed_prompts(), "right")
    left = model.generate(**batch, **GREEDY, use_cache=use_cache)
    assert torch.equal(model.generate(**right, **GREEDY, use_cache=use_cache), left)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_keep_rate": 0.7},
        {"output_sparsity": False},
        {"image_selection": "threshold"},
        {"image_selection": "diverse", "num_beams": 2},
        {"output_keep_rate": 0.3},
        {"output_keep_rate": 0.3, "image_keep_rate": 1.0},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_modes_equal_the_row_alone_and_decoding_without_cache(model, batch, arguments):
    together = model.generate(**batch, **GREEDY, **arguments)
    assert torch.equal(together, model.generate(**batch, **GREEDY, **arguments, use_cache=False))
    copies = arguments.get("num_return_sequences", 1)
    rows, images = mixed_prompts()
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        alone = model.generate(**batch_of([row], [image], "left"), **GREEDY, **arguments)
        found = together[number * copies : (number + 1) * copies, -24:]
        assert torch.equal(found, alone[:, -24:]), number


@pytest.mark.parametrize("attention_mask", [True, False])
def test_a_single_unpadded_prompt_without_cache(model, attention_mask):
    rows, images = mixed_prompts()
    for row, image in zip(rows, images, strict=True):
        one = batch_of([row], [image], "left")
        if not attention_mask:
            one.pop("attention_mask")
        assert torch.equal(model.generate(**one, **GREEDY, use_cache=False), model.generate(**one, **GREEDY))


def test_sampling_repeats_with_a_seed_and_does_not_need_the_cache(model, batch):
    arguments = {**GREEDY, "do_sample": True, "num_return_sequences": 2, "temperature": 1.5}
    found = []
    for use_cache in (True, True, False):
        torch.manual_seed(5)
        found.append(model.generate(**batch, **arguments, use_cache=use_cache))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.manual_seed(6)
    assert not torch.equal(found[0], model.generate(**batch, **arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_keep_rate": 0.7},
        {"output_sparsity": False},
        {"image_selection": "threshold"},
        {"output_keep_rate": 0.3},
        {"output_keep_rate": 0.6, "image_keep_rate": 1.0},
    ],
)
def test_modes_equal_the_definition(model, batch, arguments):
    together = model.generate(
        **batch, **GREEDY, **arguments, return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    rows, images = mixed_prompts()
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        tokens, logits = naive_generate(model, row, image, 24, **arguments)
        assert together.sequences[number, -24:].tolist() == tokens
        found = torch.stack(together.logits, dim=1)[number]
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_and_samples_follow_the_definition(model, batch, arguments, use_cache):
    """What beams and sampling choose is transformers'; the scores they choose by are the definition's."""
    torch.manual_seed(3)
    output = model.generate(
        **batch,
        **{**GREEDY, "max_new_tokens": 10, "min_new_tokens": 10, **arguments},
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    rows, images = mixed_prompts()
    copies = arguments.get("num_return_sequences", 1)
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        sequence = number * copies
        scores = naive_sequence(model, row, image, output.sequences[sequence, -10:].tolist())
        if "num_beams" in arguments:
            # The suppressed tokens take a share of the probability that the scores do not have back.
            steps = torch.stack(output.logits, dim=1)
            beams = output.beam_indices[sequence, :10]
            found = torch.stack([steps[b, n].log_softmax(-1) for n, b in enumerate(beams)])
        else:
            found = torch.stack(output.logits, dim=1)[sequence].log_softmax(-1)
        found = found.gather(1, output.sequences[sequence, -10:, None])[:, 0]
        torch.testing.assert_close(found, scores, atol=1e-4, rtol=1e-4)


def test_a_generated_image_token_is_a_word(model):
    """Nothing in decoding may take it for an image that lacks its features."""
    rows, images = mixed_prompts()
    for row, image in ((rows[0], images[0]), (rows[2], None)):
        found = [
            model.generate(
                **batch_of([row], [image], "left"),
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
                suppress_tokens=[],
                sequence_bias={(IMAGE_TOKEN,): 100.0},
                use_cache=use_cache,
            )
            for use_cache in (True, False)
        ]
        assert (found[0] == IMAGE_TOKEN).sum() > row.count(IMAGE_TOKEN)
        assert torch.equal(*found)


def test_a_prompt_that_ends_in_a_dropped_image_token(model):
    """It says the first word of the answer, and no later token sees it."""
    rows = [[1, *words(3, 8), *image_run()], [1, *image_run(), *words(2, 9)]]
    images = [pictures(1, 4), pictures(1, 5)]
    both = batch_of(rows, images, "left")
    with torch.no_grad():
        assert not model(**both).image_keep_mask[0, -1]
    cached = model.generate(**both, **GREEDY)
    assert torch.equal(cached, model.generate(**both, **GREEDY, use_cache=False))
    for number in range(2):
        assert cached[number, -24:].tolist() == naive_generate(model, rows[number], images[number], 24)[0]


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_steering_reaches_the_rate_and_equals_its_definition(rate):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 300, 2, generator=generator) * torch.tensor([1.0, 5.0, 20.0])[:, None, None] + 1
    valid = torch.arange(300) < torch.tensor([300, 250, 280])[:, None]
    keep, _ = functional.steered_keep_mask(logits, valid, rate, torch.zeros(3, functional.STEERING_SIZE))
    for row in range(3):
        length = int(valid[row].sum())
        margins = (logits[row, :length, 0] - logits[row, :length, 1]).tolist()
        assert keep[row, :length].tolist() == naive_steering(margins, rate)
        assert abs(keep[row, :length].float().mean() - rate) < 0.02
        assert not keep[row, length:].any()


@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_output_keep_rate_of_a_call_is_met(model, batch, rate):
    arguments = {**GREEDY, "max_new_tokens": 121, "min_new_tokens": 121}
    output = model.generate(**batch, **arguments, output_keep_rate=rate, return_sparsity=True)
    realised = output.sparsity.output_tokens_kept / output.sparsity.output_tokens
    assert output.sparsity.output_tokens.tolist() == [120] * 4
    assert (realised - rate).abs().max() < 0.05


def test_scoring_steers_as_cached_decoding(model, batch):
    output = model.generate(**batch, **GREEDY, output_keep_rate=0.4, return_sparsity=True)
    rows, images = mixed_prompts()
    answers = output.sequences[:, -24:].tolist()
    labels, _ = pad_rows([[-100] * len(r) + a for r, a in zip(rows, answers, strict=True)], "left", fill=-100)
    full = [row + answer for row, answer in zip(rows, answers, strict=True)]
    with torch.no_grad():
        scored = model(**batch_of(full, images, "left"), labels=labels, output_keep_rate=0.4)
    kept = scored.output_keep_mask[:, -24:-1].sum(dim=-1)
    assert kept.tolist() == output.sparsity.output_tokens_kept.tolist()


def test_statistics_of_a_call(model, batch):
    output = model.generate(**batch, **GREEDY, return_sparsity=True)
    found = output.sparsity
    images = [16, 32, 0, 16]
    assert found.image_tokens.tolist() == images
    assert found.image_tokens_kept.tolist() == [int(n * 0.4) for n in images]
    assert found.output_tokens.tolist() == [23] * 4
    text = batch["attention_mask"].sum(dim=-1) - found.image_tokens
    kept = text + found.image_tokens_kept + found.output_tokens_kept
    assert output.past_key_values.kept_lengths.tolist() == kept.tolist() == [len(c) for c in found.kept_columns]
    cache = output.past_key_values
    assert found.kv_bytes == sum(2 * layer.keys.untyped_storage().nbytes() for layer in cache.layers)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(**batch, **GREEDY, return_sparsity=True, use_cache=False)


def test_statistics_of_a_row_that_ends_early_are_its_own(model):
    rows, images = mixed_prompts()
    free = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "return_sparsity": True}
    together = model.generate(**batch_of(rows, images, "left"), **free)
    start = max(map(len, rows))
    # Whatever comes third in the second row ends every row from now on.
    free["eos_token_id"] = int(together.sequences[1, start + 2])
    together = model.generate(**batch_of(rows, images, "left"), **free)
    assert (together.sequences[1, start + 3 :] == 0).all()
    assert together.sequences.shape[1] > start + 3
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        alone = model.generate(**batch_of([row], [image], "left"), **free).sparsity
        for name in ("image_tokens", "image_tokens_kept", "output_tokens", "output_tokens_kept"):
            assert getattr(together.sparsity, name)[number] == getattr(alone, name)[0], (number, name)
        shift = start - len(row)
        assert together.sparsity.kept_columns[number] == [column + shift for column in alone.kept_columns[0]]


def test_later_turns_of_a_batch_equal_those_of_the_row_alone(model):
    """Answers and questions of different lengths: what the mask leaves out of earlier turns is not seen any more."""
    rows, images = mixed_prompts()
    questions = [words(5, 50), words(2, 51), words(7, 52), words(3, 53)]
    lengths = [9, 3, 6, 1]

    def turns(chosen):
        batch = batch_of([rows[i] for i in chosen], [images[i] for i in chosen], "left")
        first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        cache, start = first.past_key_values, batch["input_ids"].shape[1]
        seen = cache.get_seq_length()
        # Of each answer only the first tokens count; the others lie in the cache and are masked.
        kept = [lengths[i] for i in chosen]
        mask = torch.zeros(len(chosen), seen, dtype=torch.long)
        mask[:, :start] = batch["attention_mask"]
        for row, number in enumerate(kept):
            mask[row, start : start + number] = 1
        added, present = pad_rows([questions[i] for i in chosen], "left")
        sequences = torch.cat([first.sequences[:, :seen], added], dim=1)
        mask = torch.cat([mask, present], dim=1)
        second = model.generate(input_ids=sequences, attention_mask=mask, past_key_values=cache, **GREEDY)
        return second[:, sequences.shape[1] :]

    together = turns(range(4))
    for number in range(4):
        assert torch.equal(together[number], turns([number])[0]), number


def test_second_turn_through_generate(model):
    """The history goes on on the cache of the first turn, as by hand-fed calls."""
    rows, images = mixed_prompts()
    first = batch_of(rows[:1], images[:1], "left")
    answer = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    cache = answer.past_key_values
    turn = torch.cat([answer.sequences, torch.tensor([[*words(5, 50)]])], dim=1)
    # Without a mask `generate` takes an answer's token 0 for padding.
    second = model.generate(input_ids=turn, attention_mask=torch.ones_like(turn), past_key_values=cache, **GREEDY)

    by_hand = SparseCache(model.config)
    with torch.no_grad():
        model(**first, past_key_values=by_hand, use_cache=True)
        for token in answer.sequences[0, first["input_ids"].shape[1] : -1]:
            model(input_ids=token.view(1, 1), past_key_values=by_hand, use_cache=True)
        logits = model(input_ids=turn[:, -6:], past_key_values=by_hand, use_cache=True).logits
    suppressed = logits[0, -1].index_fill(0, torch.tensor([2, 99]), float("-inf"))
    assert second[0, turn.shape[1]] == suppressed.argmax()
    assert second.shape[1] == turn.shape[1] + 24


def test_a_cache_is_reusable_after_reset(model, batch):
    cache = SparseCache(model.config)
    fresh = model.generate(**batch, **GREEDY, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(fresh, model.generate(**batch, **GREEDY, past_key_values=cache))


def test_batch_select_and_repeat(model, batch):
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        other = model(**batch, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 4, 6]))
    token = torch.tensor([[5], [6], [7], [8]])
    with torch.no_grad():
        one = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        two = model(input_ids=token, past_key_values=other, use_cache=True).logits
    assert torch.equal(one, two)


def test_growth_of_the_slots_changes_nothing(model, batch):
    """Blocks of 1 grow at every step, a block of 512 never."""
    outputs = [
        model.generate(**batch, **GREEDY, past_key_values=SparseCache(model.config, block_size=size))
        for size in (1, 512)
    ]
    assert torch.equal(*outputs)


def test_streaming(model):
    class Words:
        """Stands in for a tokenizer: numbers as words."""

        def decode(self, ids, **_):
            return " ".join(str(int(i)) for i in ids) + " "

    from transformers import TextIteratorStreamer

    rows, images = mixed_prompts()
    one = batch_of(rows[:1], images[:1], "left")
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    thread = Thread(target=model.generate, kwargs={**one, **GREEDY, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = model.generate(**one, **GREEDY)[0, -24:]
    assert text.split() == [str(int(i)) for i in expected]


def test_drafts_of_its_own_layers_and_other_caches_are_refused(model):
    ids = torch.tensor([[1, 5, 6, 7]])
    with pytest.raises(ValueError, match="assistant_early_exit=2 drafts with layers of this model"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), assistant_early_exit=2, **GREEDY)
    with pytest.raises(ValueError, match="cache_implementation='quantized'"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), cache_implementation="quantized", **GREEDY)
    with pytest.raises(ValueError, match=r"output_keep_rate .* got 0"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), output_keep_rate=0, **GREEDY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_model().to(dtype)
    rows, images = mixed_prompts()
    batch = batch_of(rows, images, "left")
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    output = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert torch.isfinite(torch.stack(output.logits)).all()
    assert output.past_key_values.layers[-1].keys.dtype == dtype


def test_random_selection_keeps_the_same_number(model):
    ids = torch.tensor([[1, *image_run(), 5, 6]])
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        torch.manual_seed(0)
        one = model(input_ids=ids, pixel_values=pixels, image_selector="random").image_keep_mask
        two = model(input_ids=ids, pixel_values=pixels, image_selector="random").image_keep_mask
        learned = model(input_ids=ids, pixel_values=pixels).image_keep_mask
    assert one.sum() == two.sum() == learned.sum()
    assert not torch.equal(one, two)
