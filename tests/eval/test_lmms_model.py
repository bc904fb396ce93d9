import json
from dataclasses import asdict
from pathlib import Path

import pytest
from lmms_eval.models import get_model
from PIL import Image

from dynamic_llava.checkpoints.loaded import SparsitySettings
from dynamic_llava.data.conversation import encode_conversation, parse_turns
from dynamic_llava.data.prompts import (
    DEFAULT_MAX_NEW_TOKENS,
    cut_at_stops,
    encode_prompts,
    generation_arguments,
    stop_strings,
)
from dynamic_llava.eval.conversations import data_root_at
from dynamic_llava.eval.lmms_model import DynamicLlava, plan_batches
from dynamic_llava.eval.runner import EvaluationOptions, evaluate_tasks
from tools.tiny_base.config import SYSTEM_PROMPT as TINY_PROMPT


def answers(loaded, folder: Path, batch_size: int, settings: SparsitySettings, *tasks: str) -> dict[str, list[str]]:
    options = EvaluationOptions(tasks or ("shapes_vqa",), batch_size)
    with data_root_at(folder):
        evaluation = evaluate_tasks(loaded, settings, options)
    return {
        task: [sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in evaluation.samples.items()
    }


def test_registered_by_entry_point():
    assert get_model("dynamic_llava") is DynamicLlava


@pytest.mark.parametrize("name", ["dense", "run"])
def test_batch_size_does_not_change_answers(name, shapes_folder, request):
    loaded = request.getfixturevalue(name)
    tasks = ("shapes_vqa", "shapes_describe")
    single = answers(loaded, shapes_folder, 1, SparsitySettings(), *tasks)
    assert single == answers(loaded, shapes_folder, 4, SparsitySettings(), *tasks)
    assert len(single["shapes_vqa"]) == 8
    assert len(set(single["shapes_describe"])) > 1


def test_every_setting_is_an_argument_of_lmms_evals_model(run):
    settings = SparsitySettings(
        0.5, True, output_keep_rate=0.4, image_selection="diverse", output_rate_control="steered"
    )
    assert DynamicLlava(run, **asdict(settings)).settings == settings


def test_settings_reach_the_model(run, shapes_folder):
    learned = answers(run, shapes_folder, 4, SparsitySettings())
    assert learned != answers(run, shapes_folder, 4, SparsitySettings(image_keep_rate=1.0, output_sparsity=False))
    random = SparsitySettings(image_selector="random", output_selector="random")
    first = answers(run, shapes_folder, 4, random)
    assert learned != first
    assert first == answers(run, shapes_folder, 4, random), "the seed of the evaluation must repeat random selection"


def test_records_count_tokens(run, shapes_folder):
    with data_root_at(shapes_folder):
        evaluation = evaluate_tasks(run, SparsitySettings(), EvaluationOptions(("shapes_vqa",), 4))
    assert {record["image_tokens"] for record in evaluation.records} == {64}
    by_doc = {record["doc_id"]: record for record in evaluation.records}
    lengths = {sample["doc_id"]: sample["token_counts"][0] for sample in evaluation.samples["shapes_vqa"]}
    for doc_id, counts in lengths.items():
        assert counts["input_tokens"] == by_doc[doc_id]["prompt_tokens"]
        assert 1 <= by_doc[doc_id]["output_tokens"] <= 8


def test_prompt_equals_the_training_prompt(run, shapes_folder):
    sample = json.loads((shapes_folder / "test_vqa.json").read_text())[1]
    picture = Image.open(shapes_folder / sample["image"])
    question = sample["conversations"][0]["value"]
    prompt = encode_prompts(run.processor, [question], [[picture]])["input_ids"][0].tolist()
    trained, labels = encode_conversation(
        parse_turns(sample["conversations"]), run.processor.tokenizer, [64], system=TINY_PROMPT
    )
    assert trained[: len(prompt)] == prompt
    assert all(label == -100 for label in labels[: len(prompt)])
    assert labels[len(prompt)] != -100


def test_prompts_with_wrong_image_count(run):
    picture = Image.new("RGB", (128, 128))
    with pytest.raises(ValueError, match="2 <image> for 1 images"):
        encode_prompts(run.processor, ["<image> and <image>"], [[picture]])


def test_prompts_mix_text_and_images(run):
    picture = Image.new("RGB", (128, 128))
    batch = encode_prompts(run.processor, ["no picture", "<image> beside <image>"], [[], [picture, picture]])
    assert (batch["input_ids"] == 4).sum(dim=1).tolist() == [0, 128]
    assert batch["attention_mask"][0, 0] == 0, "padded on the left"
    assert batch["attention_mask"][0, -1] == 1


def test_plan_batches_groups_and_sorts():
    batches = plan_batches(["a", "b", "a", "a", "b"], [1, 5, 3, 2, 5], batch_size=2)
    assert batches == [[2, 3], [0], [1, 4]]


def test_blank_line_does_not_cut_answers():
    assert stop_strings(["\n\n", "STOP"]) == ["STOP"]
    assert stop_strings("\n") == []
    assert stop_strings(None) == []
    assert cut_at_stops("one\n\ntwo STOP three", ["STOP"]) == "one\n\ntwo"


def test_generation_arguments():
    assert generation_arguments({"temperature": 0, "top_p": 0.9, "until": ["x"]}) == {
        "max_new_tokens": DEFAULT_MAX_NEW_TOKENS,
        "do_sample": False,
    }
    assert generation_arguments({"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 3}) == {
        "max_new_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "do_sample": True,
    }
    assert generation_arguments({"do_sample": False, "temperature": 0.5})["do_sample"] is False


def test_unsupported_requests_say_so(run):
    lm = DynamicLlava(run)
    with pytest.raises(NotImplementedError, match="loglikelihood"):
        lm.loglikelihood([])


def test_wrong_arguments(run, dense):
    with pytest.raises(ValueError, match="batch_size"):
        DynamicLlava(run, batch_size="auto")
    with pytest.raises(ValueError, match="image_keep_rate"):
        DynamicLlava(run, image_keep_rate=1.5)
    with pytest.raises(ValueError, match="dense LLaVA"):
        DynamicLlava(dense, output_sparsity=False)


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        ("False", False),
        ("false", False),
        ("FALSE", False),
        ("True", True),
        ("None", None),
        (False, False),
        (None, None),
    ],
)
def test_output_sparsity_in_each_spelling(spelled, meant):
    assert SparsitySettings(output_sparsity=spelled).output_sparsity is meant


@pytest.mark.parametrize("wrong", ["no", "0", 0, 1, "", "off", 0.5, [False]])
def test_output_sparsity_is_never_guessed(wrong):
    with pytest.raises(ValueError, match="output_sparsity must be True or False"):
        SparsitySettings(output_sparsity=wrong)


@pytest.mark.parametrize("name", ["image_keep_rate", "output_keep_rate"])
def test_rates_in_each_spelling(name):
    for spelled in ("0.5", 0.5, 0.5e0):
        assert getattr(SparsitySettings(**{name: spelled}), name) == 0.5
    for wrong in ("abc", "", "nan", "inf", float("nan"), 0, -1, 2, True, [0.5]):
        with pytest.raises(ValueError, match=name):
            SparsitySettings(**{name: wrong})


@pytest.mark.parametrize("idle", [{"output_keep_rate": 0.5}, {"output_selector": "random"}])
def test_settings_without_effect_are_refused(idle):
    with pytest.raises(ValueError, match=f"{next(iter(idle))}=.* has no effect"):
        SparsitySettings(output_sparsity=False, **idle)


def test_unknown_model_arguments_are_refused(run):
    with pytest.raises(TypeError, match="image_keep_rates"):
        DynamicLlava(run, image_keep_rates=0.5)
    for seed in (-1, "abc", 0.5, True):
        with pytest.raises(ValueError, match="seed"):
            DynamicLlava(run, seed=seed)
