"""Malformed calls of the model and of the functions around it: refused at the door, or right; see `harness`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, DynamicCache

from dynamic_llava import SparseCache
from dynamic_llava.checkpoints import load_adapter, load_checkpoint, load_published
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.checkpoints.load import load_processor
from dynamic_llava.data import LlavaCollator, open_dataset
from dynamic_llava.data.conversation import encode_conversation, parse_turns

from ..data_pipeline.conftest import ASSET, talk
from ..tiny import IMAGE_TOKEN, batch_of, mixed_prompts, stock_model, tiny_model, words
from .call_spellings import OURS, RATES, SAME, WRONG, odd, shape, spell
from .harness import Case, is_refusal, run_cases
from .mutators import mutate_value

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


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
        if kind < 4:
            _call(case, model, stock, batch, _no_grad)
        elif kind == 4:
            _call(case, model, stock, batch, _training)
        elif kind < 8:
            _call(case, model, stock, batch, lambda m, kwargs: m.generate(**{**GREEDY, **kwargs}))
        elif kind < 10:
            _turns(case, model, stock, batch)
        else:
            _functions(case, processor)
        if case.random.random() < 0.2:
            # A call that was refused leaves nothing behind.
            with torch.no_grad():
                case.check(torch.equal(model(**batch).logits, expected), "the model changed")

    run_cases("calls", 200, one, tmp_path)


def _no_grad(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**kwargs).logits


def _training(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The loss of a step, whose draws are the same each time."""
    ids = kwargs["input_ids"]
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100) if isinstance(ids, torch.Tensor) else None
    torch.manual_seed(0)
    model.train()
    try:
        with torch.no_grad():
            return model(**{"labels": labels, **kwargs}).loss
    finally:
        model.eval()


def _call(case: Case, model: Any, stock: Any, batch: dict[str, Any], run: Callable) -> None:
    """One call with an argument spelled otherwise, or wrong."""
    kwargs = dict(batch)
    name, meaning = spell(case.random, kwargs)
    case.note(name, shape(kwargs.get(name)), meaning)
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
    case.check(meaning != WRONG, "taken", name, shape(kwargs.get(name)))
    if name in OURS:
        case.check(bool(torch.isfinite(found).all()), "not finite", name, kwargs[name])
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


def _turns(case: Case, model: Any, stock: Any, batch: dict[str, Any]) -> None:
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
    kind = rng.randrange(4)
    if kind == 0:
        number = rng.choice([5, 1, -1000, 0, "x", None, 2.5, True, -(10**20), torch.tensor(-1), float("nan")])
        case.note("crop", number)
        before = cache.get_seq_length()
        _as_stock(case, cache, "crop", number)
        if cache.get_seq_length() != before:
            return
    elif kind == 1:
        kwargs = {"input_ids": torch.full((4, 2), 5), "attention_mask": mask, "past_key_values": cache}
        ids = (torch.full((3, 2), 5), torch.full((4, 2), IMAGE_TOKEN), torch.full((4, 0), 5), "x", None)
        kwargs[rng.choice(["input_ids", "pixel_values", "inputs_embeds"])] = rng.choice(ids)
        case.note("turn", {key: shape(value) for key, value in kwargs.items() if key != "past_key_values"})
        try:
            taken = case.call(_no_grad, model, kwargs)
        except Exception as error:
            taken = None
            if not _fails_so(stock, kwargs, _no_grad, error):
                raise
        case.check(taken is None, "taken", case.notes)
    elif kind == 2:
        strange = (torch.tensor([0, 9]), torch.tensor([-9]), "x", None, torch.tensor([0.5]), [0], torch.zeros(0))
        method, indices = rng.choice(["reorder_cache", "batch_select_indices"]), rng.choice(strange)
        case.note(method, indices)
        if not _as_stock(case, cache, method, indices):
            return
    else:
        settings = {"block_size": odd(rng)} if rng.random() < 0.5 else {"max_length": odd(rng), "offload": odd(rng)}
        case.note(settings)
        other = case.call(SparseCache, model.config, **settings)
        if other is not None and max(other.max_length or 0, other.table.block_size) > 10**6:
            # As much memory as was asked for.
            return
        if other is not None:
            kwargs = {**batch, "past_key_values": other, "use_cache": True}
            case.call(_no_grad, model, kwargs)
    case.check(torch.equal(go_on(cache, mask), expected), "the cache changed")


def _as_stock(case: Case, cache: SparseCache, method: str, argument: Any) -> bool:
    """Whether a method of a cache was refused, or failed as that of a stock cache does."""
    try:
        getattr(cache, method)(argument)
    except Exception as error:
        if is_refusal(error):
            case.refuse(error)
            return True
        stock = DynamicCache()
        stock.update(torch.zeros(4, 2, 38, 8), torch.zeros(4, 2, 38, 8), 0)
        try:
            getattr(stock, method)(argument)
        except Exception as theirs:
            if type(theirs) is type(error):
                return True
        raise
    return False


def _functions(case: Case, processor: Any) -> None:
    """Functions that read files and conversations."""
    rng = case.random
    value, other = odd(rng), odd(rng)
    if rng.random() < 0.5:
        turns, place = mutate_value(rng, talk("<image>\nWhat is it?", "red", "And now?", "blue"))
        case.note("turns", place)
        found = case.call(parse_turns, turns)
        if found is not None:
            length = rng.choice([2048, 2048, 10, 1, 0, -1, "x", None, 1.5])
            case.note(length)
            case.call(encode_conversation, found, processor.tokenizer, [64], length)
        return
    case.note(shape(value), shape(other))
    folder = Path(rng.choice([ASSET, case.work, case.work / "none"]))
    missing = case.work / "x.json"
    asked = rng.choice(
        [
            lambda: load_checkpoint(value),
            lambda: load_processor(value),
            lambda: load_published(value),
            lambda: load_adapter(rng.choice([value, folder]), base=other),
            lambda: convert(rng.choice([value, folder]), case.output / "x", other),
            lambda: open_dataset(value, other, processor),
            lambda: open_dataset(missing, None, processor, on_bad_sample=value),
            lambda: LlavaCollator(processor, value),
            lambda: parse_turns(value),
        ]
    )
    try:
        case.call(asked)
    except TypeError as error:
        # Python's own words on what is no path.
        if "os.PathLike object" not in str(error):
            raise
