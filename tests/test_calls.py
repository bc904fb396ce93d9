"""A call means the same in each of its spellings, and an argument works or is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from dynamic_llava import SparseCache
from dynamic_llava.statistics import SparsityStatistics

from .naive import naive_generate
from .tiny import IMAGE_TOKEN, batch_of, image_run, mixed_prompts, pad_rows, pictures, tiny_model, words

GREEDY = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
COUNTS = ("image_tokens", "image_tokens_kept", "output_tokens", "output_tokens_kept")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def spelled(model, batch: dict, spelling: str) -> tuple[tuple, dict]:
    """Positional and keyword arguments of `generate` for one call in one of its spellings."""
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if spelling == "positional":
        return (ids,), rest
    if spelling == "inputs":
        return (), {"inputs": ids, **rest}
    if spelling == "positional config":
        return (ids, GenerationConfig(**GREEDY)), rest
    if spelling == "position_ids":
        return (ids,), {**rest, "position_ids": positions}
    if spelling == "boolean mask":
        return (ids,), {**rest, "attention_mask": mask.bool()}
    if spelling == "float mask":
        return (ids,), {**rest, "attention_mask": mask.float()}
    if spelling == "embeddings":
        return (), {"inputs_embeds": model.get_input_embeddings()(ids), **rest}
    if spelling == "embeddings and positions":
        return (), {"inputs_embeds": model.get_input_embeddings()(ids), **rest, "position_ids": positions}
    return (), batch


SPELLINGS = (
    "keyword",
    "positional",
    "inputs",
    "positional config",
    "position_ids",
    "boolean mask",
    "float mask",
    "embeddings",
    "embeddings and positions",
)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_goes_on_from_the_last_token_in_each_spelling(model, spelling, side):
    rows, images = mixed_prompts()
    expected = model.generate(**batch_of(rows, images, "left"), **GREEDY)[:, -16:]
    args, kwargs = spelled(model, batch_of(rows, images, side), spelling)
    options = {} if spelling == "positional config" else GREEDY
    assert torch.equal(model.generate(*args, **kwargs, **options)[:, -16:], expected)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", [True, False])
def test_a_later_turn_on_a_cache_in_each_spelling(model, whole, side, positions):
    """The whole history or the new columns, padded on either side."""
    rows, images = mixed_prompts()
    questions = [words(5, 50), words(2, 51), words(7, 52), words(1, 53)]

    def answer(chosen, side):
        batch = batch_of([rows[n] for n in chosen], [images[n] for n in chosen], "left")
        first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        cache, seen = first.past_key_values, first.past_key_values.get_seq_length()
        added, present = pad_rows([questions[n] for n in chosen], side)
        past = torch.cat([batch["attention_mask"], torch.ones(len(chosen), 15, dtype=torch.long)], dim=1)
        mask = torch.cat([past, present], dim=1)
        call = {"attention_mask": mask, "past_key_values": cache}
        if positions:
            call["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        ids = torch.cat([first.sequences[:, :seen], added], dim=1) if whole else added
        return model.generate(ids, **call, **GREEDY)[:, -16:]

    together = answer(range(4), side)
    for number in range(4):
        assert torch.equal(together[number], answer([number], "left")[0]), number


def test_a_row_without_a_token_to_go_on_from_is_refused(model):
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="row 1"):
        model.generate(torch.full((2, 3), 5), attention_mask=mask, **GREEDY)
    with pytest.raises(ValueError, match="inputs and input_ids"):
        model.generate(torch.full((1, 3), 5), input_ids=torch.full((1, 3), 5), **GREEDY)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("arguments", [{"output_sparsity": False}, {"output_keep_rate": 0.3}, {}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_guidance_judges_the_other_prompt_as_its_own_call(model, arguments, use_cache, side):
    """The scores of guidance are those of two separate, teacher-forced generations."""
    ids, other = torch.tensor([[1, *words(6, 1)], [1, *words(6, 3)]]), [[1, *words(9, 2)], [1, *words(4, 4)]]
    other, other_mask = pad_rows(other, side)
    mask = torch.ones_like(ids)
    output = model.generate(
        ids,
        attention_mask=mask,
        guidance_scale=1.5,
        negative_prompt_ids=other,
        negative_prompt_attention_mask=other_mask,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
        **arguments,
        **GREEDY,
    )
    answers = output.sequences[:, ids.shape[1] :]
    other, other_mask = pad_rows([[1, *words(9, 2)], [1, *words(4, 4)]], "left")

    def forced(prompt, prompt_mask):
        labels = torch.cat([torch.full_like(prompt, -100), answers], dim=1)
        sequence = torch.cat([prompt, answers], dim=1)
        full = torch.cat([prompt_mask, torch.ones_like(answers)], dim=1)
        with torch.no_grad():
            scored = model(sequence, attention_mask=full, labels=labels, **arguments)
        return scored.logits[:, prompt.shape[1] - 1 : -1].log_softmax(-1)

    one, two = forced(ids, mask), forced(other, other_mask)
    expected = 1.5 * (one - two) + two
    found = torch.stack(output.scores, dim=1)
    allowed = torch.isfinite(found)
    torch.testing.assert_close(found[allowed], expected[allowed], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("images", [False, True])
def test_prefill_in_chunks_equals_one_prefill_or_is_refused(model, chunk, images):
    rows, found = mixed_prompts()
    chosen = [0, 1, 2, 3] if images else [2]
    batch = batch_of([rows[n] for n in chosen], [found[n] for n in chosen], "left")
    expected = model.generate(**batch, **GREEDY, image_keep_rate=1.0, return_sparsity=True)
    pixels = batch.pop("pixel_values", None)
    if pixels is not None:
        with torch.no_grad():
            batch["mm_encoder_outputs"] = {
                "image": model.model.get_image_features(pixel_values=pixels, return_dict=True)
            }
        with pytest.raises(ValueError, match=f"prefill_chunk_size={chunk}"):
            model.generate(**batch, **GREEDY, prefill_chunk_size=chunk)
        encoded = batch["mm_encoder_outputs"]["image"]
        encoded.pooler_output = torch.cat(list(encoded.pooler_output))
    chunked = model.generate(**batch, **GREEDY, image_keep_rate=1.0, prefill_chunk_size=chunk, return_sparsity=True)
    assert torch.equal(chunked.sequences, expected.sequences)
    assert chunked.sparsity.output_tokens.tolist() == expected.sparsity.output_tokens.tolist()
    assert chunked.sparsity.kept_columns == expected.sparsity.kept_columns


@pytest.mark.parametrize("cached", [2, 6, 7])
def test_the_rest_of_a_prompt_on_a_cached_prefix_is_prompt(model, cached):
    """Also where one token is left: it is stored, not judged."""
    ids = torch.tensor([[1, *words(7, 5)]])
    cache = SparseCache(model.config)
    with torch.no_grad():
        model(ids[:, :cached], past_key_values=cache, use_cache=True)
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, return_sparsity=True, **GREEDY)
    expected = model.generate(ids, attention_mask=mask, return_sparsity=True, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.sparsity.kept_columns == expected.sparsity.kept_columns
    assert found.sparsity.output_tokens.tolist() == expected.sparsity.output_tokens.tolist() == [15]


@pytest.mark.parametrize("use_cache", [True, False])
def test_virtual_tokens_of_prompt_tuning_are_prompt(use_cache):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    tuned = peft.get_peft_model(
        model,
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, num_layers=5, token_dim=32, num_attention_heads=4
        ),
    ).eval()
    rows, images = mixed_prompts()
    batch = batch_of(rows[:1], images[:1], "left")
    found = tuned.generate(**batch, **GREEDY, use_cache=use_cache)[:, -16:]
    with torch.no_grad():
        prompts = tuned.get_prompt(1)
    embeds = torch.cat([prompts, model.get_input_embeddings()(batch["input_ids"])], dim=1)
    ones = torch.ones(embeds.shape[:2], dtype=torch.long)
    expected = model.generate(inputs_embeds=embeds, attention_mask=ones, pixel_values=batch["pixel_values"], **GREEDY)
    assert torch.equal(found, expected)


def stepwise(model, row, image, answer) -> torch.Tensor:
    """Logits of each token of `answer`, fed one by one on a cache."""
    cache, logits = SparseCache(model.config), []
    with torch.no_grad():
        output = model(**batch_of([row], [image], "left"), past_key_values=cache, use_cache=True)
        logits.append(output.logits[0, -1])
        for token in answer[:-1]:
            output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            logits.append(output.logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scoring_behind_a_prompt_that_ends_in_an_image(side, attention):
    """LLaVA's plain format, `<image>caption`: the dropped last image token says the first word."""
    model = tiny_model(attention=attention)
    rows = [[1, *image_run()], [1, *words(3, 8), *image_run()], [1, *image_run(), *words(4, 9)], [1, *words(3, 7)]]
    images = [pictures(1, 1), pictures(1, 4), pictures(1, 3), None]
    answers = [words(9, 20 + n) for n in range(4)]
    full = [row + answer for row, answer in zip(rows, answers, strict=True)]
    labels, _ = pad_rows([[-100] * len(r) + a for r, a in zip(rows, answers, strict=True)], side, fill=-100)
    batch = batch_of(full, images, side)
    with torch.no_grad():
        scored = model(**batch, labels=labels)
    last_dropped = 0
    for number, (row, image, answer) in enumerate(zip(rows, images, answers, strict=True)):
        start = int(batch["attention_mask"][number].argmax()) + len(row)
        found = scored.logits[number, start - 1 : start + len(answer) - 1]
        torch.testing.assert_close(found, stepwise(model, row, image, answer), atol=1e-4, rtol=1e-4)
        last_dropped += not scored.image_keep_mask[number, start - 1]
    assert last_dropped


def test_supervised_captions_in_front_of_a_later_image_are_scored(model):
    """`<image>caption<image>caption`: the token in front of each supervised one is computed, dropped or not."""
    row = [1, *image_run(), *words(3, 1), *image_run(), *words(4, 2)]
    labels = torch.tensor([[-100 if token == IMAGE_TOKEN else token for token in row]])
    labels[0, 0] = -100
    with torch.no_grad():
        output = model(**batch_of([row], [pictures(2)], "left"), labels=labels)
    asked = (labels[0, 1:] != -100).nonzero().flatten()
    empty = model.lm_head(torch.zeros(32))
    dropped = ~output.image_keep_mask[0, asked]
    assert dropped.any()
    assert not torch.isclose(output.logits[0, asked], empty).all(dim=-1).any()


def test_num_generated_by_hand(model):
    rows, images = mixed_prompts()
    one = batch_of(rows[:1], images[:1], "left")
    answer = words(6, 3)
    with torch.no_grad():
        expected = stepwise(model, rows[0], images[0], [*answer, 5])[-1]
        whole = torch.cat([one["input_ids"], torch.tensor([answer])], dim=1)
        found = model(whole, pixel_values=one["pixel_values"], num_generated=6, use_cache=False).logits[0, -1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        cache = model(**one, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="2 generated of 3 tokens in one call on a cache"):
            model(torch.tensor([[5, 6, 7]]), past_key_values=cache, num_generated=2)
        for wrong in (-1, 4, 1.5, True):
            with pytest.raises(ValueError, match="num_generated counts"):
                model(torch.tensor([[5, 6, 7]]), num_generated=wrong)
        model(torch.tensor([[5]]), past_key_values=cache, num_generated=0, use_cache=True)
    assert SparsityStatistics.of(cache).output_tokens.tolist() == [0]


class StopAfter(StoppingCriteria):
    """Ends each row behind a length of its own."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths.repeat_interleave(len(input_ids) // len(self.lengths))


def reference_counts(model, row, image, answer, **arguments) -> list[int]:
    """Counts of a row whose generated tokens are `answer`, of which the last was not fed."""
    _, kept = naive_kept(model, row, image, answer, **arguments)
    images = row.count(IMAGE_TOKEN)
    return [images, int(images * 0.4), len(answer) - 1, kept]


def naive_kept(model, row, image, answer, **arguments):
    cache = SparseCache(model.config)
    with torch.no_grad():
        model(**batch_of([row], [image], "left"), past_key_values=cache, use_cache=True, **arguments)
        for token in answer[:-1]:
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True, **arguments)
    found = SparsityStatistics.of(cache)
    return found.kept_columns[0], int(found.output_tokens_kept[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 2, "early_stopping": True, "length_penalty": -2.0},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0},
        {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("ends", ["tokens", "criterion"])
def test_statistics_are_those_of_the_returned_sequences(model, arguments, ends):
    rows, images = mixed_prompts()
    batch, start = batch_of(rows, images, "left"), max(map(len, rows))
    arguments = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **arguments}
    if ends == "tokens":
        arguments["eos_token_id"] = list(range(2, 12))
    else:
        arguments["stopping_criteria"] = StoppingCriteriaList([StopAfter([start + n for n in (3, 14, 6, 9)])])
    torch.manual_seed(0)
    output = model.generate(**batch, **arguments, return_sparsity=True)
    copies = arguments.get("num_return_sequences", 1)
    assert len(output.sparsity.kept_columns) == len(rows) * copies
    lengths = set()
    for number, sequence in enumerate(output.sequences[:, start:]):
        row, image = rows[number // copies], images[number // copies]
        if output.get("beam_indices") is not None:
            length = int((output.beam_indices[number] >= 0).sum())
        elif ends == "criterion":
            length = (3, 14, 6, 9)[number // copies]
            length = min(length, *[n + 1 for n, token in enumerate(sequence) if token == 2] or [99])
        else:
            length = next((n + 1 for n, token in enumerate(sequence) if 2 <= token < 12), 14)
        lengths.add(length)
        answer = sequence[:length].tolist()
        counts = [int(getattr(output.sparsity, name)[number]) for name in COUNTS]
        assert counts == reference_counts(model, row, image, answer), number
        columns, _ = naive_kept(model, row, image, answer)
        assert output.sparsity.kept_columns[number] == [column + start - len(row) for column in columns], number
    assert len(lengths) > 1


def test_statistics_of_a_second_turn_behind_an_early_end(model):
    """What the mask of the second turn leaves out of the first answer does not count."""
    rows, images = mixed_prompts()
    batch, start = batch_of(rows, images, "left"), max(map(len, rows))
    lengths = (3, 14, 6, 9)
    first = model.generate(
        **batch, **{**GREEDY, "max_new_tokens": 14, "min_new_tokens": 14}, return_dict_in_generate=True
    )
    cache, seen = first.past_key_values, start + 13
    mask = torch.cat([batch["attention_mask"], torch.zeros(4, 13, dtype=torch.long)], dim=1)
    for row, length in enumerate(lengths):
        mask[row, start : start + length] = 1
    question = torch.tensor([words(3, 60)] * 4)
    ids = torch.cat([first.sequences[:, :seen], question], dim=1)
    mask = torch.cat([mask, torch.ones(4, 3, dtype=torch.long)], dim=1)
    second = model.generate(ids, attention_mask=mask, past_key_values=cache, return_sparsity=True, **GREEDY)
    assert second.sparsity.output_tokens.tolist() == [min(n, 13) + 15 for n in lengths]


def test_a_cache_of_one_row_serves_beams_and_several_sequences(model):
    rows, images = mixed_prompts()
    one = batch_of(rows[:1], images[:1], "left")
    for arguments in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        expected, found = None, None
        for cached in (False, True):
            torch.manual_seed(0)
            cache = SparseCache(model.config)
            if cached:
                with torch.no_grad():
                    model(one["input_ids"][:, :-2], pixel_values=one["pixel_values"], past_key_values=cache)
                call = {
                    "input_ids": one["input_ids"],
                    "attention_mask": one["attention_mask"],
                    "past_key_values": cache,
                }
                found = model.generate(**call, **{**GREEDY, **arguments})
            else:
                expected = model.generate(**one, **{**GREEDY, **arguments})
        assert torch.equal(found, expected)


IDS = torch.tensor([[1, *image_run(), 5, 6]])
CALLS = [
    ({"image_predictor": False}, {"image_keep_rate": 0.3}, "image_predictor is off"),
    ({"image_predictor": False}, {"image_selection": "threshold"}, "image_predictor is off"),
    ({"output_predictor": False}, {"output_keep_rate": 0.3}, "output_predictor is off"),
    ({"output_predictor": False}, {"output_sparsity": True}, "output_predictor of this model is off"),
    ({}, {"output_sparsity": "False"}, "True, False or None, got 'False'"),
    ({}, {"output_sparsity": 0}, "True, False or None, got 0"),
    ({}, {"output_sparsity": False, "output_keep_rate": 0.5}, "drops no output tokens"),
    ({}, {"output_sparsity": False, "output_selector": "random"}, "beside output_sparsity=False"),
    ({}, {"image_selection": "threshold", "image_keep_rate": 0.5}, "at no set rate|more likely kept"),
    ({}, {"image_selection": "threshold", "image_selector": "random"}, "how the predictor chooses"),
    ({}, {"image_selector": "rndom"}, "Unknown image_selector 'rndom'"),
    ({}, {"elastic": True}, "for training"),
]


@pytest.mark.parametrize(("sparsity", "arguments", "message"), CALLS, ids=[str(call[1]) for call in CALLS])
@pytest.mark.parametrize("door", ["forward", "generate"])
def test_an_argument_without_effect_is_refused(sparsity, arguments, message, door):
    if door == "generate" and "elastic" in arguments:
        pytest.skip("elastic is no argument of generate")
    model = tiny_model(**sparsity)
    call = {"input_ids": IDS, "pixel_values": pictures(1), **arguments}
    with pytest.raises(ValueError, match=message):
        model(**call) if door == "forward" else model.generate(**call, **GREEDY)


def test_what_agrees_with_a_predictor_that_is_off_is_taken():
    model = tiny_model(image_predictor=False, output_predictor=False)
    call = {"input_ids": IDS, "pixel_values": pictures(1)}
    with torch.no_grad():
        plain = model(**call).logits
        assert torch.equal(model(**call, image_keep_rate=1.0, output_keep_rate=1, output_sparsity=False).logits, plain)
        # A rival needs no predictor.
        assert model(**call, image_selector="random").image_keep_mask.sum() == 3 + 6


@pytest.mark.parametrize("name", ["image_selector", "output_selector", "image_selection"])
def test_what_is_for_inference_is_refused_in_training(name):
    model = tiny_model().train()
    value = "topk" if name == "image_selection" else "random"
    with pytest.raises(ValueError, match="for inference"):
        model(IDS, pixel_values=pictures(1), labels=IDS.clone(), **{name: value})


@pytest.mark.parametrize("wrong", ["image_keep_rates", "image_keeprate", "output_sparse", "prompt_length"])
def test_unknown_keywords_are_refused_with_the_nearest(model, wrong):
    with pytest.raises(TypeError, match=wrong):
        model(IDS, pixel_values=pictures(1), **{wrong: 0.3})
    with pytest.raises(TypeError, match="did you mean"):
        model.model(IDS, pixel_values=pictures(1), **{wrong: 0.3})
    with pytest.raises(ValueError, match=wrong):
        model.generate(IDS, pixel_values=pictures(1), **{wrong: 0.3}, **GREEDY)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((1, 19), 2), "holds 2"),
        (torch.full((1, 19), 0.5), "holds 0.5"),
        (torch.full((1, 19), float("nan")), "holds nan"),
        (torch.zeros(1, 19).masked_fill(torch.ones(1, 19).bool(), float("-inf")), "holds -inf"),
        (torch.full((1, 19), -1), "holds -1"),
        (torch.ones(1, 18), "must cover all 19 columns"),
        (torch.ones(2, 19), "must cover all 19 columns"),
        (torch.ones(1, 1, 19, 19), "must cover all 19 columns"),
        (torch.ones(19), "must cover all 19 columns"),
    ],
)
def test_masks_are_zeros_and_ones_of_the_calls_shape(model, mask, message):
    with pytest.raises(ValueError, match=message):
        model(IDS, pixel_values=pictures(1), attention_mask=mask)


def test_labels_and_output_mask_fit_the_call(model):
    call = {"input_ids": IDS, "pixel_values": pictures(1)}
    with pytest.raises(ValueError, match="labels has shape"):
        model(**call, labels=IDS[:, 1:])
    with pytest.raises(ValueError, match="output_mask has shape"):
        model(**call, labels=IDS, output_mask=torch.ones(19))
    with pytest.raises(ValueError, match="output_mask holds 3"):
        model(**call, labels=IDS, output_mask=torch.full((1, 19), 3))
    with pytest.raises(ValueError, match="pass labels too"):
        model(**call, output_mask=torch.ones(1, 19))


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_numbers_of_other_types_are_numbers(model, number):
    call = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "pixel_values": pictures(1)}
    expected = model.generate(**call, image_keep_rate=0.5, output_keep_rate=0.5, num_beams=2, **GREEDY)
    found = model.generate(**call, image_keep_rate=number, output_keep_rate=number, num_beams=2, **GREEDY)
    assert torch.equal(found, expected)


def test_the_definition_is_met_in_a_positional_call(model):
    rows, images = mixed_prompts()
    found = model.generate(torch.tensor([rows[1]]), pixel_values=images[1], **GREEDY)
    assert found[0, -16:].tolist() == naive_generate(model, rows[1], images[1], 16)[0]


@pytest.mark.parametrize("name", ["image_predictor", "output_predictor"])
def test_an_untrained_predictor_is_not_used_in_silence(name, caplog):
    from dynamic_llava.options import logger

    logger.warning_once.cache_clear()
    model = tiny_model(untrained=[name])
    call = {"input_ids": IDS, "pixel_values": pictures(1)}
    everything = {"image_keep_rate": 1.0, "output_sparsity": False}
    with caplog.at_level("WARNING"), torch.no_grad():
        model(**call, **everything)
        assert not caplog.records
        model(**call)
        assert [name in record.message for record in caplog.records] == [True]
    if name == "output_predictor":
        with pytest.raises(ValueError, match="never been trained"):
            model.generate(**call, output_sparsity=True, **GREEDY)


@pytest.mark.parametrize("odd", ["x", 3, [[1]], np.ones((1, 19)), b"x"])
def test_arguments_that_are_no_tensors_are_named(model, odd):
    call = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "pixel_values": pictures(1)}
    for name in ("input_ids", "attention_mask", "position_ids", "labels", "output_mask"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got a"):
            model(**{**call, name: odd})
    for past in (odd, ()):
        with pytest.raises(ValueError, match="past_key_values is a"):
            model.generate(**call, past_key_values=past, **GREEDY)


@pytest.mark.parametrize(
    "odd", [0, -1.0, 1e-300, 10**400, float("nan"), float("inf"), True, "1", torch.tensor([1.0, 2.0])]
)
def test_temperatures_and_switches_that_are_none(model, odd):
    call = {"input_ids": IDS, "pixel_values": pictures(1), "labels": IDS.clone()}
    with pytest.raises(ValueError, match="gumbel_tau must be a finite number of at least 1e-06"):
        model(**call, gumbel_tau=odd)
    for switch in (0, "no", torch.tensor([True, False])):
        with pytest.raises(ValueError, match="elastic is True or False"):
            model(**call, elastic=switch)
        with pytest.raises(ValueError, match="return_sparsity is True or False"):
            model.generate(IDS, pixel_values=pictures(1), return_sparsity=switch, **GREEDY)


@pytest.mark.parametrize(
    ("name", "value"),
    [("labels", IDS), ("output_mask", IDS), ("gumbel_tau", 0.5), ("elastic", True), ("num_generated", 3)],
)
def test_generate_refuses_what_it_makes_no_use_of(model, name, value):
    with pytest.raises(ValueError, match=f"{name} of forward: generate makes no use of it"):
        model.generate(IDS, pixel_values=pictures(1), **{name: value}, **GREEDY)


@pytest.mark.parametrize("odd", ["x", 0, -1, 1.5, True, torch.tensor([1, 2]), [3], 10**30, float("nan")])
def test_sizes_and_rows_of_a_cache_are_whole_numbers(model, odd):
    for name in ("block_size", "max_length"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
            SparseCache(model.config, **{name: odd})
    with pytest.raises(ValueError, match="offload is True or False"):
        SparseCache(model.config, offload="yes")
    for rows in (None, [0], torch.tensor([0.5])):
        with pytest.raises(ValueError, match="Rows are chosen by a tensor of whole numbers or a mask"):
            SparseCache(model.config).batch_select_indices(rows)
