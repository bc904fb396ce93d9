"""The sparsification stage end to end on a handful of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from dynamic_llava import DynamicLlavaForConditionalGeneration, decisions, functional
from dynamic_llava.checkpoints import load_checkpoint, load_processor
from dynamic_llava.data import LlavaCollator
from dynamic_llava.data.shapes import build_shapes
from dynamic_llava.train import stage
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.config import load_config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "train" / "shapes.yaml")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return build_shapes(
        tmp_path_factory.mktemp("shapes") / "data", seed=1, train_pictures=8, val_pictures=1, test_pictures=1
    )


def overrides(shapes, output, **values):
    values = {
        "base_model": ROOT / "assets" / "tiny-llava",
        "train_file": shapes / "train.json",
        "image_folder": shapes,
        "output_dir": output,
        "shapes": "null",
        "report": "false",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "calibration_answers": 0,
        **values,
    }
    return [f"{key}={value}" for key, value in values.items()]


def config_of(shapes, output, **values):
    return load_config(ROOT / "configs" / "train" / "shapes.yaml", overrides(shapes, output, **values))


def test_a_run_trains_logs_and_saves(shapes, tmp_path):
    config = config_of(shapes, tmp_path / "run")
    before = stage.build_model(config, tokenizer=None).state_dict()
    trainer = stage.train(config)
    after = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "run").state_dict()
    still = {"vision_tower", "multi_modal_projector"}
    for name, value in trainer.model.named_parameters():
        frozen = any(part in name for part in still)
        assert value.requires_grad != frozen, name
        assert torch.equal(after[name], value), name
        if frozen:
            assert torch.equal(after[name], before[name]), name
        elif "_predictor" not in name:  # predictors start anew in every model
            assert not torch.equal(after[name], before[name]), name

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert [line["gumbel_tau"] for line in steps] == [1.0, pytest.approx(0.1)]
    for line in steps:
        budget = config.sparsity.budget_weight * (line["image_budget_loss"] + line["output_budget_loss"])
        assert line["loss"] == pytest.approx(line["lm_loss"] + budget, rel=1e-4)
        assert 0 < line["image_keep_rate"] < 1
    assert (tmp_path / "run" / "train_config.yaml").is_file()
    assert AutoProcessor.from_pretrained(tmp_path / "run").image_processor.do_pad is True


def test_two_learning_rates(shapes, tmp_path):
    config = config_of(shapes, tmp_path / "run", learning_rate=1e-5, predictor_learning_rate=1e-3, warmup_steps=0)
    trainer = stage.train(config)
    decoder, predictors = trainer.optimizer.param_groups
    assert (decoder["initial_lr"], predictors["initial_lr"]) == (1e-5, 1e-3)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    assert all("_predictor" in names[id(parameter)] for parameter in predictors["params"])
    assert not any("_predictor" in names[id(parameter)] for parameter in decoder["params"])


def test_eight_accumulated_rows_equal_a_batch_of_eight(shapes, tmp_path, monkeypatch):
    """With noise that depends on the place in the row alone, one step does the same in both, weight by weight."""

    def noise(shape, **_):
        generator = torch.Generator().manual_seed(3)
        return functional_gumbel((512, 2), generator=generator)[: shape[1]].expand(shape)

    functional_gumbel = functional.sample_gumbel
    monkeypatch.setattr(decisions, "sample_gumbel", noise)
    found = []
    for batch, steps in ((8, 1), (1, 8)):
        trainer = stage.train(
            config_of(
                shapes,
                tmp_path / f"run{batch}",
                max_steps=1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=steps,
                warmup_steps=0,
                min_output_length=4,
                max_grad_norm=0,
                # Steps in proportion to the gradients.
                optim="sgd",
                learning_rate=0.1,
                predictor_learning_rate=0.1,
            )
        )
        line = json.loads((tmp_path / f"run{batch}" / "metrics.jsonl").read_text().splitlines()[0])
        found.append((line, {n: p.detach() for n, p in trainer.model.named_parameters()}))
    (one, ones), (eight, eights) = found
    for key in ("loss", "lm_loss", "image_budget_loss", "output_budget_loss", "image_keep_rate", "output_keep_rate"):
        assert one[key] == pytest.approx(eight[key], rel=1e-5), key
    assert one["grad_norm"] == pytest.approx(eight["grad_norm"], rel=1e-4)
    assert ones.keys() == eights.keys()
    before = load_checkpoint(ROOT / "assets" / "tiny-llava").get_parameter("lm_head.weight")
    assert (ones["lm_head.weight"] - before).abs().max() > 1e-4
    for name, value in ones.items():
        torch.testing.assert_close(value, eights[name], atol=1e-6, rtol=1e-5, msg=name)


def test_the_command_says_what_is_wrong(shapes, tmp_path, capsys):
    config = str(ROOT / "configs" / "train" / "shapes.yaml")
    assert main(["--config", config, "imge_keep_rate=0.1"]) == 2
    assert "Did you mean image_keep_rate" in capsys.readouterr().err
    assert main(["--config", config, *overrides(shapes, tmp_path, train_file="nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_bad_samples_are_skipped_and_counted(shapes, tmp_path, capsys):
    rows = json.loads((shapes / "train.json").read_text())
    rows[0]["image"] = "images/train/gone.png"
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(rows))
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        stage.train(config_of(shapes, tmp_path / "a", train_file=broken))
    stage.train(config_of(shapes, tmp_path / "b", train_file=broken, on_bad_sample="skip", max_steps=1))
    assert "1 samples were skipped" in capsys.readouterr().out


def test_the_instruct_predictor_takes_its_markers_from_the_tokenizer(shapes, tmp_path):
    config = config_of(shapes, tmp_path / "run", instruct_predictor=True)
    processor = load_processor(config.model.base_model)
    model = stage.build_model(config, processor.tokenizer)
    text = "A picture. USER: what is it? ASSISTANT:"
    ids = processor.tokenizer(text)["input_ids"]
    sparsity = model.config.sparsity
    for marker in (sparsity.user_marker, sparsity.assistant_marker):
        assert any(ids[i : i + len(marker)] == marker for i in range(len(ids)))
    assert any("instruct_predictor" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_gradient_report_equals_two_backward_passes(shapes, tmp_path, monkeypatch):
    def noise(shape, **_):
        return torch.full(shape, 0.5) + torch.arange(shape[-1])

    monkeypatch.setattr(decisions, "sample_gumbel", noise)
    config = config_of(shapes, tmp_path / "run", per_device_train_batch_size=8, min_output_length=1)
    report = {row["predictor"]: row for row in stage.report_gradients(config, 1)}
    assert set(report) == {"image_predictor", "output_predictor"}
    for row in report.values():
        assert row["lm_norm"] > 0
        assert row["budget_norm"] > 0
        assert -1 <= row["cosine"] <= 1
    config.sparsity.budget_weight *= 2
    again = {row["predictor"]: row for row in stage.report_gradients(config, 1)}
    for name, row in again.items():
        assert row["lm_norm"] == pytest.approx(report[name]["lm_norm"], rel=1e-4)
        assert row["budget_norm"] == pytest.approx(2 * report[name]["budget_norm"], rel=1e-4)


def test_batches_of_similar_length(shapes, tmp_path):
    trainer = stage.train(config_of(shapes, tmp_path / "run", train_sampling_strategy="group_by_length"))
    assert type(trainer._get_train_sampler()).__name__ == "LengthGroupedSampler"


def test_all_answers_are_judged_where_asked_for(shapes, tmp_path):
    """With `output_turns=all` the output predictor judges every answer of a conversation of several turns."""
    samples = json.loads((shapes / "train.json").read_text())
    long = max(samples, key=lambda sample: len(sample["conversations"][1]["value"]))
    turns = long["conversations"]
    again = [{**turns[0], "value": turns[0]["value"].replace("<image>", "").strip()}, turns[1]]
    file = tmp_path / "two.json"
    file.write_text(json.dumps([{**long, "conversations": turns + again}] * 4))
    judged = {}
    for which in ("last", "all"):
        config = config_of(shapes, tmp_path / which, train_file=file, output_turns=which, min_output_length=1)
        processor = load_processor(config.model.base_model)
        batch = LlavaCollator(processor)([stage.open_data(config, processor)[0]])
        model = stage.build_model(config, processor.tokenizer).train()
        judged[which] = model(**batch).output_keep_logits.shape[1]
    assert judged["all"] == 2 * judged["last"]
