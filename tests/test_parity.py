"""The reference values of the published implementation hold (tests/data/parity)."""

from __future__ import annotations

import pytest
import torch

from dynamic_llava import decisions
from dynamic_llava.checkpoints.keys import from_published

from .parity import IMAGE_TOKEN, Case, load_case, load_model

LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4

PREFILL = [f"a_prefill_{name}" for name in ("keep0.2", "keep0.5", "keep1.0", "sparse_layer1", "sparse_layer4")]
FORCED = [f"b_forced_cache{name}" for name in ("", "_sparse_layer1", "_sparse_layer4", "_text_only", "_vision_only")]
TRAINING = [
    f"e_train_{name}"
    for name in (
        "b1_tau0.3",
        "b1_tau1.0",
        "b2_equal_tau0.3",
        "b2_equal_tau1.0",
        "b3_padded_tau0.3",
        "b3_padded_tau1.0",
        "multiround",
        "vision_predictor_only",
    )
]


def prompt(case: Case, row: int | None = None) -> dict[str, torch.Tensor]:
    """The prompt of a case as model inputs, all rows or one."""
    inputs = {"input_ids": case.expand(), "attention_mask": case.expand("attention_mask", fill=1)}
    if "pixel_values" in case.inputs:
        inputs["pixel_values"] = case.inputs["pixel_values"]
    return inputs if row is None else {key: value[row : row + 1] for key, value in inputs.items()}


def decode_forced(model, inputs: dict, forced: torch.Tensor):
    """Feed `forced (B, T)` token by token on the cache; per-step logits, decisions, sparse cache lengths."""
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        cache = output.past_key_values
        logits, decisions, lengths = [output.logits[:, -1]], [], [cache.kept_lengths]
        for token in forced[:, :-1].T:
            output = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
            logits.append(output.logits[:, -1])
            lengths.append(cache.kept_lengths)
            if output.output_keep_mask is not None:
                decisions.append(output.output_keep_mask)
    return torch.stack(logits, 1), torch.cat(decisions, 1) if decisions else None, torch.stack(lengths), cache


@pytest.mark.parametrize("name", PREFILL)
def test_prefill(name):
    case = load_case(name)
    model = load_model(case.meta["sparse_config_override"])
    inputs = prompt(case)
    with torch.no_grad():
        output = model(**inputs)
    kept = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if output.image_keep_mask is not None:
        kept = output.image_keep_mask
    is_image = inputs["input_ids"][0] == IMAGE_TOKEN
    assert kept[0][is_image].nonzero()[:, 0].tolist() == case.expected["image_keep_index"][0].tolist()
    table = output.past_key_values.table
    # The published code numbers positions from 0, as the columns of an unpadded prompt.
    stored = table.stored(output.past_key_values.get_seq_length())[0].nonzero().flatten()
    assert stored.tolist() == case.expected["position_ids_sparse"][0].tolist()
    assert output.past_key_values.kept_lengths.tolist() == [case.expected["kv_len"][-1].item()]
    torch.testing.assert_close(output.logits[0][kept[0]], case.expected["logits"][0], atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FORCED)
def test_forced_decoding(name):
    case = load_case(name)
    model = load_model(case.meta.get("sparse_config_override"))
    logits, decisions, lengths, _ = decode_forced(model, prompt(case), case.inputs["forced_tokens"])
    torch.testing.assert_close(logits, case.expected["step_logits"], atol=LOGIT_TOLERANCE, rtol=0)
    assert torch.equal(lengths, case.expected["true_cache_length"][:, -1])
    if "output_decision" in case.expected:
        assert torch.equal(decisions, case.expected["output_decision"])
    else:
        assert decisions is None


@pytest.mark.parametrize("name", ["b_greedy_cache", "b_textonly_greedy_cache"])
def test_greedy_generate(name):
    case = load_case(name)
    model = load_model()
    tokens = case.expected["tokens"]
    inputs = prompt(case)
    output = model.generate(
        **inputs,
        max_new_tokens=tokens.shape[1],
        min_new_tokens=tokens.shape[1],
        do_sample=False,
        eos_token_id=-1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], tokens)
    step_logits = torch.stack(output.logits, 1)
    torch.testing.assert_close(step_logits, case.expected["step_logits"], atol=LOGIT_TOLERANCE, rtol=0)
    assert output.past_key_values.kept_lengths.tolist() == case.expected["true_cache_length"][-1, -1].tolist()


@pytest.mark.parametrize("name", ["d_batch2_forced_cache", "d_batch2_greedy_cache"])
def test_batch_of_two_equals_the_published_single_rows(name):
    case = load_case(name)
    model = load_model()
    if name == "d_batch2_forced_cache":
        logits, decisions, lengths, _ = decode_forced(model, prompt(case), case.inputs["forced_tokens"])
    for row in range(2):
        expected = {k.removeprefix(f"row{row}."): v for k, v in case.expected.items() if k.startswith(f"row{row}.")}
        if name == "d_batch2_greedy_cache":
            forced = expected["batch1_tokens"].repeat(2, 1)
            logits, decisions, lengths, _ = decode_forced(model, prompt(case), forced)
        torch.testing.assert_close(logits[row], expected["batch1_step_logits"][0], atol=LOGIT_TOLERANCE, rtol=0)
        if "batch1_output_decision" in expected:
            assert torch.equal(decisions[row], expected["batch1_output_decision"][0])
        if "batch1_true_cache_length" in expected:
            assert torch.equal(lengths[:, row], expected["batch1_true_cache_length"][:, -1, 0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TRAINING)
def test_training(name, attention, monkeypatch):
    case = load_case(name)
    model = load_model(case.meta.get("sparse_config_override")).train()
    model.set_attn_implementation(attention)
    noise = [case.inputs[key] for key in ("gumbel_noise.image", "gumbel_noise.output") if key in case.inputs]

    def injected(shape, **kwargs):
        drawn = noise.pop(0)
        assert tuple(drawn.shape) == shape
        return drawn

    monkeypatch.setattr(decisions, "sample_gumbel", injected)
    labels = case.expand("labels", fill=-100)
    output = model(**prompt(case), labels=labels, gumbel_tau=case.meta["tau"])
    is_image = case.expand() == IMAGE_TOKEN
    assert torch.equal(output.image_keep_mask[is_image].view(len(labels), -1), case.expected["hard_mask.image"])
    for row in range(len(labels)):
        if f"hard_mask.output.row{row}" in case.expected:
            expected = case.expected[f"hard_mask.output.row{row}"]
            answer = labels[row] != -100
            answer[: (~answer & (case.expand("attention_mask", fill=1)[row] > 0)).nonzero().max()] = False
            assert torch.equal(output.output_keep_mask[row][answer], expected)
    for key in ("lm_loss", "image_budget_loss", "output_budget_loss", "loss"):
        if key in case.expected and getattr(output, key) is not None:
            torch.testing.assert_close(getattr(output, key), case.expected[key], atol=1e-5, rtol=1e-5)
    output.loss.backward()
    ours = dict(model.named_parameters())
    compared = 0
    for key, expected in case.expected.items():
        if key.startswith("grad."):
            found = ours[from_published(key.removeprefix("grad."))].grad
            assert (found - expected).abs().max() <= GRADIENT_TOLERANCE * expected.abs().max(), key
            compared += 1
    assert compared


def test_dense_reference():
    case = load_case("f_dense_reference")
    model = load_model(image_predictor=False, output_predictor=False)
    with torch.no_grad():
        prefill = model(**prompt(case))
        full_ids = case.expand("full_input_ids", marker_source="full_input_ids")
        labels = case.expand("full_labels", fill=-100, marker_source="full_input_ids")
        full = model(input_ids=full_ids, pixel_values=case.inputs["pixel_values"], labels=labels)
    torch.testing.assert_close(prefill.logits, case.expected["prefill_logits"], atol=LOGIT_TOLERANCE, rtol=0)
    torch.testing.assert_close(full.logits, case.expected["full_logits"], atol=LOGIT_TOLERANCE, rtol=0)
    torch.testing.assert_close(full.lm_loss, case.expected["loss"], atol=1e-5, rtol=1e-5)
    tokens = model.generate(**prompt(case), max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=-1)
    assert torch.equal(tokens[:, -32:], case.expected["greedy_tokens"])


def test_second_turn_on_the_cache():
    case = load_case("h_two_rounds_cache")
    model = load_model()
    first, second = case.inputs["round1_labels"], case.inputs["round2_labels"]
    logits_1, _, lengths_1, cache = decode_forced(model, prompt(case), first)
    with torch.no_grad():
        turn = model(input_ids=case.inputs["round2_input_ids"], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(turn.logits, case.expected["round2_first_logits"], atol=LOGIT_TOLERANCE, rtol=0)
        logits_2, lengths_2 = [turn.logits[:, -1]], [cache.kept_lengths]
        for token in second[:, :-1].T:
            output = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
            logits_2.append(output.logits[:, -1])
            lengths_2.append(cache.kept_lengths)
    logits = torch.cat([logits_1, torch.stack(logits_2, 1)], dim=1)
    torch.testing.assert_close(logits, case.expected["step_logits"], atol=LOGIT_TOLERANCE, rtol=0)
    lengths = torch.cat([lengths_1, torch.stack(lengths_2)])
    assert torch.equal(lengths, case.expected["true_cache_length"][:, -1])
