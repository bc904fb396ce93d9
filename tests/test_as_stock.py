"""What works with stock LLaVA works here, or is refused in one line: autograd modes, compilation, export, loading."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModel, CompileConfig

from dynamic_llava import DynamicLlavaModel, SparseCache

from .tiny import batch_of, image_run, mixed_prompts, pictures, stock_model, tiny_model, words

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": nullcontext}
ALL_KEPT = {"image_predictor": False, "output_predictor": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def conversation(model, modes: list, max_length: int | None) -> list[torch.Tensor]:
    """Logits of a prompt, turns and steps on one cache, each call in the next of `modes`; beams and a crop between."""
    batch = batch_of(*mixed_prompts(), "left")
    mask, cache = batch.pop("attention_mask"), SparseCache(model.config, max_length=max_length)
    found = []

    def call(mode, mask, **inputs):
        shown = mask if max_length is None else torch.nn.functional.pad(mask, (0, max_length - mask.shape[1]))
        with mode():
            found.append(model(**inputs, attention_mask=shown, past_key_values=cache, use_cache=True).logits)

    call(modes[0], mask, **batch)
    for number, length in enumerate((3, 1, 1, 4, 1, 2)):
        mode = modes[(number + 1) % len(modes)]
        with mode():
            if number == 2:
                cache.reorder_cache(torch.tensor([3, 2, 1, 1]))
            if number == 4 and max_length is None:
                cache.crop(-2)
                mask = mask[:, :-2]
        mask = torch.cat([mask, torch.ones(4, length, dtype=torch.long)], dim=1)
        call(mode, mask, input_ids=torch.tensor([words(length, row) for row in range(4)]), output_keep_rate=0.4)
    return found


@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_calls_in_different_modes_take_turns_on_a_cache(model, first, second, max_length):
    expected = conversation(model, [torch.no_grad], max_length)
    found = conversation(model, [MODES[first], MODES[second], MODES[second], MODES[first]], max_length)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), two, atol=1e-4, rtol=1e-4)


def test_gradients_flow_through_the_cache_as_in_stock_llava():
    ours = tiny_model(**ALL_KEPT)
    stock = stock_model(ours)
    batch = batch_of(*mixed_prompts(), "left")
    for model in (ours, stock):
        cache = model(**batch, use_cache=True).past_key_values
        mask = batch["attention_mask"]
        total = 0
        for length in (1, 3, 1):
            mask = torch.cat([mask, torch.ones(4, length, dtype=torch.long)], dim=1)
            ids = torch.tensor([words(length, row) for row in range(4)])
            total = total + model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits.square().mean()
        total.backward()
    expected = {name: parameter.grad for name, parameter in stock.named_parameters() if parameter.grad is not None}
    found = dict(ours.named_parameters())
    assert len(expected) > 50
    for name, grad in expected.items():
        torch.testing.assert_close(found[name].grad, grad, atol=1e-5, rtol=1e-3, msg=name)


def compiled_forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


@pytest.mark.parametrize(
    ("how", "arguments"),
    [
        (compiled_forward, {"cache_implementation": "static"}),
        (torch.compile, {"cache_implementation": "static"}),
        (torch.compile, {}),
    ],
)
def test_compiled_models_generate_the_same(model, how, arguments):
    torch._dynamo.reset()
    arguments = {**batch_of(*mixed_prompts(), "left"), **GREEDY, "max_new_tokens": 3, "min_new_tokens": 3, **arguments}
    expected = model.generate(**arguments)
    assert torch.equal(how(tiny_model(), backend="eager").generate(**arguments), expected)


def test_compiled_steps_of_generate_are_one_graph(model):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    # Compiles on a CPU too.
    config._compile_all_devices = True
    batch = batch_of(*mixed_prompts(), "left")
    found = tiny_model().generate(**batch, **GREEDY, cache_implementation="static", compile_config=config)
    assert torch.equal(found, model.generate(**batch, **GREEDY))
    assert len(graphs) == 1


def one_picture() -> dict:
    ids = torch.tensor([[1, *words(2, 1), *image_run(), *words(4, 2)]])
    return {"input_ids": ids, "pixel_values": pictures(1), "attention_mask": torch.ones_like(ids)}


def exported_calls() -> dict[str, dict]:
    batch = batch_of(*mixed_prompts(), "left")
    text = torch.tensor([[1, *words(6, 3)]])
    return {
        "text": {"input_ids": text},
        "text with mask": {"input_ids": text, "attention_mask": torch.ones_like(text)},
        "picture": one_picture(),
        "all kept": {**one_picture(), "image_keep_rate": 1.0},
        "rate": {**one_picture(), "image_keep_rate": 0.3},
        "threshold": {**one_picture(), "image_selection": "threshold"},
        "diverse": {**one_picture(), "image_selection": "diverse"},
        "batch": batch,
        "positions": {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)},
        "scoring": {**batch, "labels": batch["input_ids"].masked_fill(batch["input_ids"] == 99, -100)},
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", exported_calls())
def test_exported_programs_decide_and_say_the_same(name, attention):
    """Also on other pictures and words than those that they were traced with."""
    model, call = tiny_model(attention=attention), {**exported_calls()[name], "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), call, strict=False).module()
        for seed in (None, 5):
            if seed is not None and "pixel_values" in call:
                call["pixel_values"] = pictures(len(call["pixel_values"]), seed)
            found, expected = program(**call), model(**call)
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
            if expected.image_keep_mask is not None:
                assert torch.equal(found.image_keep_mask, expected.image_keep_mask)


def test_exported_programs_check_their_inputs():
    model, call = tiny_model(), {**one_picture(), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), call, strict=False).module()
        with pytest.raises(RuntimeError, match="must hold 16 image tokens"):
            program(**{**call, "input_ids": torch.full_like(call["input_ids"], 7)})
        with pytest.raises(RuntimeError, match="attention_mask must hold 0 and 1"):
            program(**{**call, "attention_mask": call["attention_mask"] * 2})


def test_auto_model_loads_the_headless_model(model, tmp_path):
    """From our folders and stock ones, under LLaVA's older names of the weights, and from its own."""
    model.save_pretrained(tmp_path / "ours")
    stock_model(model).save_pretrained(tmp_path / "stock")
    headless = AutoModel.from_pretrained(tmp_path / "ours")
    assert type(headless) is DynamicLlavaModel
    headless.save_pretrained(tmp_path / "headless")
    expected = model.model.state_dict()
    for loaded, part in (
        (headless, ""),
        (AutoModel.from_pretrained(tmp_path / "headless"), ""),
        (DynamicLlavaModel.from_pretrained(tmp_path / "stock"), "_predictor."),
    ):
        state = loaded.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected if not part or part not in key)
    assert type(AutoModel.from_config(model.config)) is DynamicLlavaModel
    with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
        type(model).from_pretrained(tmp_path / "headless")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_precision_in_every_mode(dtype, attention):
    model = tiny_model(attention=attention).to(dtype)
    batch = batch_of(*mixed_prompts(), "left")
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    for arguments in ({}, {"use_cache": False}, {"output_keep_rate": 0.4}, {"cache_implementation": "static"}):
        output = model.generate(**batch, **GREEDY, **arguments, return_dict_in_generate=True, output_logits=True)
        assert torch.isfinite(torch.stack(output.logits)).all(), arguments
    labels = batch["input_ids"].clone()
    labels[:, :-5] = -100
    with torch.no_grad():
        assert torch.isfinite(model(**batch, labels=labels).loss)
    for training in ("masked", "pruned"):
        model = tiny_model(attention=attention, sparse_training=training).to(dtype).train()
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            loss = model(**batch, labels=labels).loss
            assert torch.isfinite(loss)
            loss.backward()


def test_caches_and_outputs_are_copied_and_pickled(model):
    token = torch.tensor([[5]] * 4)
    with torch.no_grad():
        output = model(**batch_of(*mixed_prompts(), "left"), use_cache=True)
        copies = [copy.deepcopy(output), pickle.loads(pickle.dumps(output))]
        expected = model(input_ids=token, past_key_values=output.past_key_values).logits
        for other in copies:
            assert other.past_key_values.get_seq_length() == output.past_key_values.get_seq_length() - 1
            assert torch.equal(model(input_ids=token, past_key_values=other.past_key_values).logits, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_fixed_size_outgrown_in_decoding_is_said(model, compiled):
    torch._dynamo.reset()
    cache, token = SparseCache(model.config, max_length=8), torch.tensor([[5]])
    step = torch.compile(tiny_model().forward, backend="eager") if compiled else model
    with torch.no_grad():
        model(input_ids=torch.tensor([words(5, 1)]), past_key_values=cache)
        for _ in range(3):
            step(input_ids=token, past_key_values=cache)
        before = [layer.keys.clone() for layer in cache.layers]
        if compiled:
            with pytest.raises(RuntimeError, match="max_length=8 is full"):
                step(input_ids=token, past_key_values=cache)
        # A call that is not compiled knows it after compiled ones, too.
        with pytest.raises(ValueError, match="9 tokens do not fit a SparseCache of max_length=8"):
            model(input_ids=token, past_key_values=cache)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    short = SparseCache(model.config, max_length=8)
    with pytest.raises(ValueError, match="9 tokens do not fit a SparseCache of max_length=8"):
        model.generate(torch.tensor([words(5, 1)]), past_key_values=short, **GREEDY)


def test_paged_caches_and_continuous_batching_are_refused(model):
    prompt = torch.tensor([words(5, 1)])
    for call in (
        lambda: model.generate_batch(prompt.tolist(), generation_config=model.generation_config),
        lambda: model.generate(prompt, cache_implementation="paged", **GREEDY),
        lambda: model.init_continuous_batching(),
    ):
        with pytest.raises(ValueError, match=r"Continuous batching .* call generate with a padded batch"):
            call()


def test_prefix_tuning_is_refused(model):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=5, num_attention_heads=2, token_dim=16
    )
    tuned, ids = peft.get_peft_model(tiny_model(), config), torch.tensor([words(5, 1)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for call in (lambda: tuned(**inputs), lambda: tuned(**inputs, labels=ids), lambda: tuned.generate(**inputs)):
        with pytest.raises(ValueError, match="Prefix tuning"):
            call()


def test_gradient_checkpointing_takes_no_cache():
    model, batch = tiny_model().train(), batch_of(*mixed_prompts(), "left")
    expected = model(**batch).logits
    model.gradient_checkpointing_enable()
    output = model(**batch, use_cache=True)
    assert output.past_key_values is None
    assert torch.equal(output.logits, expected)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        model.generate(**batch, **GREEDY)
    found = model.generate(**batch, **GREEDY, use_cache=False)
    assert torch.equal(found, model.eval().generate(**batch, **GREEDY))


def test_hidden_states_attentions_and_tuples(model):
    """The layers from the sparse one on report the tokens that they computed."""
    eager, batch = tiny_model(attention="eager"), batch_of(*mixed_prompts(), "left")
    with torch.no_grad():
        output = eager(**batch, output_hidden_states=True, output_attentions=True)
        plain = eager(**batch, output_hidden_states=True, output_attentions=True, return_dict=False)
        some = eager(**batch, logits_to_keep=torch.tensor([3, 5]))
    assert len(output.hidden_states) == 6
    columns, kept = (
        batch["input_ids"].shape[1],
        int((output.image_keep_mask & (batch["attention_mask"] == 1)).sum(1).max()),
    )
    assert [a.shape[-1] for a in output.attentions] == [columns] * 2 + [kept] * 3
    assert torch.equal(plain[0], output.logits)
    torch.testing.assert_close(some.logits, output.logits[:, [3, 5]])
