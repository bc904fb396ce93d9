"""The output predictor brought to its keep rate: the offset, what is written, the end of a stage, the command."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dynamic_llava.checkpoints import load_checkpoint, load_processor, load_published
from dynamic_llava.checkpoints.__main__ import main
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.data import LlavaCollator, open_dataset
from dynamic_llava.errors import ExitStatus
from dynamic_llava.offsets import OFFSET_RATES
from dynamic_llava.train import stage
from dynamic_llava.train.output_rate import calibrate, offset_of

from .test_stage import config_of, shapes  # noqa: F401  a fixture

BIAS = "output_predictor.head.4.bias"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", OFFSET_RATES)
def test_an_offset_keeps_as_near_to_the_rate_as_equal_margins_allow(dtype, rate):
    margins = (torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(dtype).float()
    kept = int((margins + offset_of(margins, rate) > 0).sum())
    possible = {int((margins > value).sum()) for value in margins} | {500}
    assert abs(kept - rate * 500) == min(abs(number - rate * 500) for number in possible)


def test_offsets_rise_with_the_rate_and_equal_margins_are_no_error():
    margins = torch.randn(40, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    offsets = [offset_of(margins, rate) for rate in OFFSET_RATES]
    assert offsets == sorted(offsets)
    same = torch.full((5,), 2.0)
    assert not (same + offset_of(same, 0.2) > 0).any()
    assert (same + offset_of(same, 0.8) > 0).all()


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):  # noqa: F811
    """A run that was not calibrated."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    stage.train(config_of(shapes, folder, min_output_length=20))
    return folder


def copy_of(run, folder):
    folder.mkdir()
    for path in run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def decided_rate(folder, shapes, **arguments):  # noqa: F811
    """Kept fraction of the output tokens of all long training answers, in one forward of scoring."""
    processor, model = load_processor(folder), load_checkpoint(folder).eval()
    dataset = open_dataset(shapes / "train.json", shapes, processor)
    samples = (dataset[number] for number in range(len(dataset)))
    rows = [sample for sample in samples if int((sample["labels"] != -100).sum()) >= 20]
    with torch.no_grad():
        output = model(**LlavaCollator(processor)(rows), use_cache=False, **arguments)
    labels = LlavaCollator(processor)(rows)["labels"]
    # The last answer of a row; descriptions have one.
    return float(output.output_keep_mask[labels != -100].float().mean())


def same_but_for_the_bias(one, two):
    one, two = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    changed = {key for key in one if not torch.equal(one[key], two[key])}
    assert one.keys() == two.keys()
    assert len(changed) <= 1
    for key in changed:
        assert key.endswith(BIAS)
        assert one[key][1] == two[key][1]


def test_a_stage_ends_at_its_rate(shapes, run, tmp_path):  # noqa: F811
    stage.train(config_of(shapes, tmp_path / "run", min_output_length=20, calibration_answers=64))
    same_but_for_the_bias(run, tmp_path / "run")
    assert abs(decided_rate(run, shapes) - 0.5) > 0.03
    assert decided_rate(tmp_path / "run", shapes) == pytest.approx(0.5, abs=0.005)
    for rate in (0.2, 0.33, 0.7, 0.8):
        found = decided_rate(tmp_path / "run", shapes, output_keep_rate=rate)
        assert found == pytest.approx(rate, abs=0.02)
    sparsity = json.loads((tmp_path / "run" / "config.json").read_text())["sparsity"]
    assert set(sparsity["output_offsets"]) >= {f"{rate:g}" for rate in OFFSET_RATES}
    assert abs(sparsity["output_offsets"]["0.5"]) < 1e-5
    assert json.loads((run / "config.json").read_text())["sparsity"]["output_offsets"] == {}
    # Another stage trains the predictor on: it begins without the table.
    again = config_of(shapes, tmp_path / "again", base_model=tmp_path / "run")
    assert stage.build_model(again, tokenizer=None).config.sparsity.output_offsets == {}


def test_a_finished_run_that_is_started_again_is_calibrated_too(shapes, tmp_path):  # noqa: F811
    values = {"min_output_length": 20, "calibration_answers": 64, "save_strategy": "steps", "save_steps": 2}
    stage.train(config_of(shapes, tmp_path / "run", **values))
    # Mapped from the file, which is written again.
    first = {key: value.clone() for key, value in load_file(tmp_path / "run" / "model.safetensors").items()}
    stage.train(config_of(shapes, tmp_path / "run", **values))
    for key, value in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(first[key], value), key
    assert load_checkpoint(tmp_path / "run").config.sparsity.output_offsets


def test_the_command_finds_what_the_stage_finds_and_nothing_the_second_time(shapes, run, tmp_path, capsys):  # noqa: F811
    folder = copy_of(run, tmp_path / "run")
    words = [
        "calibrate",
        str(folder),
        str(shapes / "train.json"),
        "--image-folder",
        str(shapes),
        "--answers",
        "64",
        "--device",
        "cpu",
    ]
    for before in (False, True):
        assert main(words) == ExitStatus.DONE
        line = capsys.readouterr().out
        assert line.startswith("output_keep_rate 0.5: of ")
        assert (" 0.500 are kept, 0.500 before" in line) == before
    same_but_for_the_bias(run, folder)
    assert decided_rate(folder, shapes) == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_16_bits(shapes, run, tmp_path, dtype):  # noqa: F811
    model = load_checkpoint(run, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "run")
    processor = load_processor(run)
    processor.save_pretrained(tmp_path / "run")
    found = calibrate(tmp_path / "run", open_dataset(shapes / "train.json", shapes, processor), processor, 64)
    assert found["after"] == pytest.approx(0.5, abs=0.03)
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {getattr(torch, dtype)}
    for rate in (0.3, 0.7):
        assert decided_rate(tmp_path / "run", shapes, output_keep_rate=rate) == pytest.approx(rate, abs=0.03)


def test_a_lora_folder(shapes, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    values = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "min_output_length": 20}
    stage.train(config_of(shapes, tmp_path / "plain", **values))
    stage.train(config_of(shapes, tmp_path / "run", **values, calibration_answers=64))
    assert abs(decided_rate(tmp_path / "plain", shapes) - 0.5) > 0.03
    assert decided_rate(tmp_path / "run", shapes) == pytest.approx(0.5, abs=0.02)
    assert decided_rate(tmp_path / "run", shapes, output_keep_rate=0.3) == pytest.approx(0.3, abs=0.02)


def test_the_published_layout_has_the_rate_and_not_the_table(shapes, run, tmp_path):  # noqa: F811
    folder = copy_of(run, tmp_path / "run")
    processor = load_processor(folder)
    calibrate(folder, open_dataset(shapes / "train.json", shapes, processor), processor, 64)
    said = []
    convert(folder, tmp_path / "published", "published", say=said.append)
    assert sum("offsets of other output keep rates were left out" in line for line in said) == 1
    published = load_published(tmp_path / "published")
    assert published.config.sparsity.output_offsets == {}
    bias = f"model.language_model.{BIAS}"
    assert torch.equal(published.get_parameter(bias), load_checkpoint(folder).get_parameter(bias))
    said.clear()
    convert(folder, tmp_path / "ours", "ours", say=said.append)
    assert load_checkpoint(tmp_path / "ours").config.sparsity.output_offsets
    assert not said


def test_what_cannot_be_calibrated_is_refused_and_left_as_it_was(shapes, run, tmp_path, capsys):  # noqa: F811
    data = str(shapes / "train.json")

    def refused(folder, changes, message):
        folder = copy_of(run, folder)
        config = json.loads((folder / "config.json").read_text())
        config["sparsity"] |= changes
        (folder / "config.json").write_text(json.dumps(config))
        assert main(["calibrate", str(folder), data, "--image-folder", str(shapes)]) == ExitStatus.BAD_INPUT
        assert message in capsys.readouterr().err
        assert json.loads((folder / "config.json").read_text()) == config
        assert (folder / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()

    refused(tmp_path / "a", {"untrained": ["output_predictor"]}, "off, or has never been trained")
    refused(tmp_path / "b", {"output_predictor": False}, "off, or has never been trained")
    refused(tmp_path / "c", {"min_output_length": 900}, "has an answer of min_output_length=900 tokens")
    convert(run, tmp_path / "published", "published")
    for folder, message in ((tmp_path / "published", "convert it first"), (tmp_path / "none", "is no folder here")):
        assert main(["calibrate", str(folder), data]) == ExitStatus.BAD_INPUT
        assert message in capsys.readouterr().err
