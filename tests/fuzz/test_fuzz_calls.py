"""Malformed calls of the model and of the functions around it: refused at the door, or right; see `harness`."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, DynamicCache, GenerationConfig

from dynamic_llava import SparseCache
from dynamic_llava.checkpoints import load_adapter, load_checkpoint, load_published
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.checkpoints.load import load_processor
from dynamic_llava.data import LlavaCollator, open_dataset
from dynamic_llava.data.conversation import encode_conversation, parse_turns

from ..data_pipeline.conftest import ASSET, talk
from ..tiny import IMAGE_TOKEN, batch_of, mixed_prompts, stock_model, tiny_model, words
from .harness import Case, is_refusal, run_cases
from .mutators import anything, mutate_value

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
RATES = ("image_keep_rate", "output_keep_rate")
# Arguments that stock LLaVA has not.
OURS = (*RATES, "image_selection", "image_selector", "output_selector", "output_sparsity", "num_generated", "elastic")
OURS += ("gumbel_tau", "output_mask", "return_sparsity", "past_key_values")
STOCKS = ("use_cache", "logits_to_keep", "position_ids", "vision_feature_layer", "vision_feature_select_strategy")
GENERATES = ("max_new_tokens", "num_beams", "num_return_sequences", "temperature", "top_k", "eos_token_id", "top_p")
GENERATES += ("cache_implementation", "prefill_chunk_size", "max_length", "repetition_penalty", "guidance_scale")
SAME, WRONG, ANY = "same", "wrong", "any"


@pytest.fixture(scope="module")
def models():
    model = tiny_model()
    return model, stock_model(model)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ASSET)


def test_calls(models, processor, tmp_path):
    model, stock = models
    batch = batch_of(*mixed_prompts(), "left")
    with torch.no_grad():
        expected = model(**batch).logits

    def one(case: Case) -> None:
        kind = case.random.randrange(12)
        torch.manual_seed(case.seed)
        if kind < 5:
            _call(case, model, stock, batch, lambda m, kwargs: _no_grad(m, kwargs))
        elif kind < 8:
            _call(case, model, stock, batch, lambda m, kwargs: m.generate(**{**GREEDY, **kwargs}))
        elif kind < 10:
            _turns(case, model, batch)
        else:
            _functions(case, processor)
        if case.random.random() < 0.2:
            # A call that was refused leaves nothing behind.
            with torch.no_grad():
                case.check(torch.equal(model(**batch).logits, expected), "the model changed")

    run_cases("calls", 150, one, tmp_path)


def _no_grad(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**kwargs).logits


def _call(case: Case, model: Any, stock: Any, batch: dict[str, Any], run: Callable) -> None:
    """One call with an argument spelled otherwise, or wrong."""
    kwargs = dict(batch)
    generates = case.random.random() < 0.5
    name, meaning = _spell(case.random, kwargs, generates)
    case.note(name, _shape(kwargs.get(name)), meaning)
    limits = {"max_new_tokens", "max_length", "num_beams", "num_return_sequences"}
    if name in limits and isinstance(kwargs[name], (int, float)) and abs(kwargs[name]) > 100:
        # A long call is no malformed one.
        kwargs[name] = 7
    try:
        found = run(model, kwargs)
    except Exception as error:
        if is_refusal(error):
            case.refuse(error)
            case.check(meaning != SAME, "a spelling is refused", name, str(error))
            return
        if name not in OURS and _fails_so(stock, kwargs, run, error):
            case.note("as stock")
            return
        raise
    case.check(meaning != WRONG, "taken", name, _shape(kwargs.get(name)))
    if meaning == SAME:
        case.check(torch.equal(found, run(model, _canonical(batch, kwargs, name))), "another result", name)


def _canonical(batch: dict[str, Any], kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    if name in batch:
        return batch
    value = kwargs[name]
    return {**batch, name: float(value) if name in RATES else value}


def _fails_so(stock: Any, kwargs: dict[str, Any], run: Callable, error: Exception) -> bool:
    try:
        run(stock, {key: value for key, value in kwargs.items() if key not in OURS})
    except Exception as theirs:
        return type(theirs) is type(error)
    return False


def _shape(value: Any) -> Any:
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else value


def _spell(rng: Random, kwargs: dict[str, Any], generates: bool) -> tuple[str, str]:
    """Change one argument in place; its name and what that means."""
    name = rng.choice([*["input_ids", "attention_mask", "pixel_values"] * 4, *OURS * 2, *STOCKS, *GENERATES, "labels"])
    if name == "input_ids":
        kwargs[name], meaning = rng.choice(_ids(rng, kwargs[name]))
    elif name == "attention_mask":
        kwargs[name], meaning = rng.choice(_masks(rng, kwargs[name]))
    elif name == "pixel_values":
        kwargs[name], meaning = rng.choice(_pixels(rng, kwargs[name]))
    elif name == "labels":
        kwargs[name], meaning = rng.choice(_labels(rng, kwargs["input_ids"]))
    elif name in RATES:
        value, meaning = rng.choice(_rates(rng))
        kwargs[name] = value
    elif name == "past_key_values":
        kwargs[name], meaning = rng.choice(
            [(DynamicCache(), WRONG), ("x", WRONG), (7, WRONG), ([], ANY), (((), ()), WRONG)]
        )
    elif rng.random() < 0.1:
        name = rng.choice(["image_keep_rates", "keep_rate", "pixels", "Input_ids", "output_sparse", "x"])
        kwargs[name], meaning = anything(rng), ANY
        meaning = ANY if kwargs[name] is None else WRONG
    else:
        kwargs[name], meaning = _odd(rng), ANY
        if name in ("image_selection", "image_selector", "output_selector") and not _is_name(kwargs[name]):
            meaning = ANY if kwargs[name] is None else WRONG
        if name == "output_sparsity" and not isinstance(kwargs[name], (bool, type(None))):
            meaning = WRONG
    return name, meaning


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value in ("topk", "threshold", "predictor", "random")


def _odd(rng: Random) -> Any:
    tensors = (torch.tensor(3), torch.zeros(0), torch.full((2, 3), -1), torch.tensor(float("nan")), torch.tensor(True))
    others = (np.float32(0.3), np.int64(2), object(), len, b"x", {1}, 2 + 1j, (1, 2), slice(1, 2), torch.float16)
    return rng.choice([anything(rng), anything(rng), rng.choice(tensors), rng.choice(others)])


def _ids(rng: Random, ids: torch.Tensor) -> list[tuple[Any, str]]:
    row, column = rng.randrange(ids.shape[0]), rng.randrange(ids.shape[1])

    def other(value: int) -> torch.Tensor:
        changed = ids.clone()
        changed[row, column] = value
        return changed

    return [
        (ids.int(), SAME),
        (ids.float(), ANY),
        (ids.bool(), ANY),
        (ids.tolist(), WRONG),
        (ids.numpy(), WRONG),
        (ids[0], ANY),
        (ids[None], ANY),
        (ids[:, :0], WRONG),
        (ids[:0], WRONG),
        (ids[:2], WRONG),
        (ids[:, 1:], WRONG),
        (other(-1), WRONG),
        (other(100), WRONG),
        (other(10**9), WRONG),
        (other(IMAGE_TOKEN), ANY),
        (ids.masked_fill(ids == IMAGE_TOKEN, 5), WRONG),
        (torch.full_like(ids, IMAGE_TOKEN), WRONG),
        (ids.to("meta"), ANY),
        (None, WRONG),
        ("hello", WRONG),
        (_odd(rng), ANY),
    ]


def _masks(rng: Random, mask: torch.Tensor) -> list[tuple[Any, str]]:
    row, column = rng.randrange(mask.shape[0]), rng.randrange(mask.shape[1])

    def other(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        changed = mask.to(dtype)
        changed[row, column] = value
        return changed

    hole = mask.clone()
    hole[1, 7] = 0
    return [
        (mask.bool(), SAME),
        (mask.float(), SAME),
        (mask.int(), SAME),
        (mask.half(), SAME),
        (mask.to(torch.uint8), SAME),
        (other(2), WRONG),
        (other(-1), WRONG),
        (other(0.5), WRONG),
        (other(float("nan")), WRONG),
        (other(-1e9), WRONG),
        (other(7, torch.uint8), WRONG),
        (hole, ANY),
        (torch.zeros_like(mask), ANY),
        (mask[:, 1:], WRONG),
        (mask[:2], WRONG),
        (mask[0], WRONG),
        (mask[:, None, None, :], ANY),
        (torch.cat([mask, mask], dim=1), WRONG),
        (mask.tolist(), WRONG),
        (mask.numpy(), ANY),
        (mask.to(torch.complex64), ANY),
        (_odd(rng), ANY),
    ]


def _pixels(rng: Random, pixels: torch.Tensor) -> list[tuple[Any, str]]:
    return [
        (pixels.double(), ANY),
        (pixels[:-1], WRONG),
        (torch.cat([pixels, pixels[:1]]), WRONG),
        (pixels[:, :1], WRONG),
        (pixels[..., :14], WRONG),
        (pixels[..., :0], WRONG),
        (pixels[:0], WRONG),
        (pixels[0], WRONG),
        (pixels[None], ANY),
        (pixels.byte(), ANY),
        (pixels.half(), ANY),
        (pixels.to(torch.complex64), ANY),
        (list(pixels), ANY),
        (pixels.numpy(), ANY),
        (pixels.tolist(), ANY),
        (pixels.to("meta"), ANY),
        (None, WRONG),
        ("a.png", WRONG),
        (_odd(rng), ANY),
    ]


def _labels(rng: Random, ids: torch.Tensor) -> list[tuple[Any, str]]:
    return [
        (ids.clone(), ANY),
        (torch.full_like(ids, -100), ANY),
        (torch.full_like(ids, -1), ANY),
        (torch.full_like(ids, 10**6), ANY),
        (ids[:, 1:], WRONG),
        (ids[0], WRONG),
        (ids.float(), ANY),
        (ids.int(), ANY),
        (ids.tolist(), WRONG),
        (_odd(rng), ANY),
    ]


def _rates(rng: Random) -> list[tuple[Any, str]]:
    good = [0.5, 1, 1.0, np.float32(0.5), np.float64(0.25), Fraction(1, 2), np.int64(1)]
    wrong = [0, -0.1, 1.1, 2, float("nan"), float("inf"), True, False, "0.5", "x", [0.5], (0.5,), {}, 10**400, 0.5j]
    return [*[(value, SAME) for value in good], *[(value, WRONG) for value in wrong], (1e-300, ANY), (None, ANY)]


def _turns(case: Case, model: Any, batch: dict[str, Any]) -> None:
    """A second turn on a cache, behind calls that are refused: they leave the cache as it was."""
    rng = case.random

    def begun() -> tuple[SparseCache, torch.Tensor]:
        cache = SparseCache(model.config)
        with torch.no_grad():
            model(**batch, past_key_values=cache, use_cache=True)
        return cache, batch["attention_mask"]

    def go_on(cache: SparseCache, mask: torch.Tensor) -> torch.Tensor:
        more = torch.tensor([words(3, row) for row in range(4)])
        with torch.no_grad():
            whole = torch.cat([mask, torch.ones_like(more)], dim=1)
            return model(input_ids=more, attention_mask=whole, past_key_values=cache, use_cache=True).logits

    expected = go_on(*begun())
    cache, mask = begun()
    kind = rng.randrange(5)
    if kind == 0:
        number = rng.choice([5, 1, -1000, 0, "x", None, 2.5, True, -(10**20), torch.tensor(-1), float("nan")])
        case.note("crop", number)
        before = cache.get_seq_length()
        case.call(cache.crop, number)
        if cache.get_seq_length() != before:
            return
    elif kind == 1:
        kwargs = {"input_ids": torch.full((4, 2), 5), "attention_mask": mask, "past_key_values": cache}
        ids = (torch.full((3, 2), 5), torch.full((4, 2), IMAGE_TOKEN), torch.full((4, 0), 5), "x", None)
        kwargs[rng.choice(["input_ids", "pixel_values", "inputs_embeds"])] = rng.choice(ids)
        case.note("turn", {key: _shape(value) for key, value in kwargs.items() if key != "past_key_values"})
        taken = case.call(_no_grad, model, kwargs)
        case.check(taken is None, "taken", case.notes)
    elif kind == 2:
        indices = rng.choice(
            [torch.tensor([0, 9]), torch.tensor([-9]), "x", None, torch.tensor([0.5]), [0], torch.zeros(0)]
        )
        case.note("rows", indices)
        method = rng.choice(["reorder_cache", "batch_select_indices"])
        if case.call(getattr(cache, method), indices) is None and "refused" not in str(case.notes):
            return
    elif kind == 3:
        settings = {"block_size": _odd(rng)} if rng.random() < 0.5 else {"max_length": _odd(rng), "offload": _odd(rng)}
        case.note(settings)
        other = case.call(SparseCache, model.config, **settings)
        if other is not None and isinstance(other.max_length, int) and other.max_length > 10**6:
            return
        if other is not None:
            kwargs = {**batch, "past_key_values": other, "use_cache": True}
            case.call(_no_grad, model, kwargs)
    else:
        config = {rng.choice(GENERATES): _odd(rng)}
        case.note("config", config)
        made = case.call(lambda: GenerationConfig(**GREEDY | config)) if "max_length" not in config else None
        del made
    case.check(torch.equal(go_on(cache, mask), expected), "the cache changed")


def _functions(case: Case, processor: Any) -> None:
    """Functions that read files and conversations."""
    rng = case.random
    value, other = _odd(rng), _odd(rng)
    if rng.random() < 0.5:
        turns, place = mutate_value(rng, talk("<image>\nWhat is it?", "red", "And now?", "blue"))
        case.note("turns", place)
        found = case.call(parse_turns, turns)
        if found is not None:
            length = rng.choice([2048, 2048, 10, 1, 0, -1, "x", None, 1.5])
            case.note(length)
            case.call(encode_conversation, found, processor.tokenizer, [64], length)
        return
    case.note(_shape(value), _shape(other))
    folder = Path(rng.choice([ASSET, case.work, case.work / "none"]))
    rng.choice(
        [
            lambda: case.call(load_checkpoint, value),
            lambda: case.call(load_processor, value),
            lambda: case.call(load_published, value),
            lambda: case.call(load_adapter, rng.choice([value, folder]), base=other),
            lambda: case.call(convert, rng.choice([value, folder]), case.output / "x", other),
            lambda: case.call(open_dataset, value, other, processor),
            lambda: case.call(open_dataset, case.work / "x.json", None, processor, on_bad_sample=value),
            lambda: case.call(LlavaCollator, processor, value),
            lambda: case.call(parse_turns, value),
        ]
    )()
