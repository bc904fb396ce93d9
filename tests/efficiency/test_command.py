"""`python -m dynamic_llava.efficiency`: JSON, tables, pictures and errors."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from dynamic_llava.efficiency.__main__ import main
from dynamic_llava.efficiency.plot import generation_times, plot_report
from dynamic_llava.efficiency.shapes import build_config, stock_config

MEASURE = ["measure", "--shape", "tiny", "--prompt-lengths", "8", "--output-lengths", "30,12", "--steps", "4"]
MEASURE += ["--repeats", "2", "--warmup", "1", "--no-cache-lengths", "6"]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")


def test_flops_json(capsys):
    assert main(["flops", "--shape", "13b", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    paper = report["paper"]["prefill_image_tokens"]
    assert (round(paper["dense"] / 1e12, 1), round(paper["ours"] / 1e12, 1)) == (19.6, 4.7)
    assert report["settings"]["image_tokens_kept"] == 115
    assert report["predictor_share"]["step_with_cache"] < 0.01
    for values in (*report["exact"].values(), report["kv_bytes"]):
        assert values["ours"] < values["dense"]
        assert values["ratio"] == values["ours"] / values["dense"]


def test_flops_table(capsys):
    assert main(["flops"]) == 0
    shown = capsys.readouterr().out
    assert "10.07" in shown
    assert "2.488" in shown


def test_flops_of_a_custom_shape(capsys):
    options = ["--hidden", "256", "--heads", "4", "--kv-heads", "2", "--layers", "6", "--sparse-layer", "3"]
    assert main(["flops", *options, "--image-keep-rate", "1", "--output-keep-rate", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["num_hidden_layers"] == 6
    assert report["kv_bytes"]["ratio"] == 1
    assert report["paper"]["prefill_image_tokens"]["ratio"] == 1


@pytest.mark.parametrize("stock", [False, True])
def test_flops_of_a_folder(tmp_path, capsys, stock):
    config = build_config("tiny")
    (stock_config(config) if stock else config).save_pretrained(tmp_path)
    assert main(["flops", "--model", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["hidden_size"] == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flops", "--shape", "7c"], "Did you mean 7b"),
        (["flops", "--image-keep-rate", "0"], "(0, 1]"),
        (["flops", "--output-keep-rate", "1.5"], "(0, 1]"),
        (["flops", "--model", "nowhere"], "No config.json in nowhere"),
        (["flops", "--model", "nowhere", "--hidden", "64"], "--hidden"),
        (["flops", "--hidden", "100"], "--heads 32"),
        (["flops", "--layers", "2"], "sparse_layer=2"),
        (["flops", "--prompt", "-1"], "--prompt"),
        (["flops", "--output-length", "0"], "--output-length"),
        (["measure", "--shape", "larg"], "Unknown shape"),
        (["measure", "--modes", "prefil"], "prefill"),
        (["measure", "--dtype", "int8"], "bfloat16"),
        (["measure", "--batch-sizes", "0"], "--batch-sizes"),
        (["measure", "--image-keep-rate", "2"], "(0, 1]"),
        (["measure", "--steps", "0"], "--steps"),
        (["score", "--output-tokens", "1"], "--output-tokens must be a whole number of at least 2, got 1"),
        (["score", "--dtype", "int8"], "bfloat16"),
        pytest.param(["train", "--device", "cuda"], "this torch sees no GPU", marks=WITHOUT_GPU),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_measure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    modes = ["--modes", "prefill,decode,no_cache", "--batch-sizes", "1,3", "--output", str(tmp_path), "--json"]
    assert main([*MEASURE, *modes]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "measure.json").read_text())
    assert (tmp_path / "measure.png").stat().st_size > 1000
    assert report["machine"]["torch"]
    assert report["machine"]["cpu"]
    assert report["model"]["predictor_parameters"] > 0
    assert [(case["batch"], case["output_length"]) for case in report["decode"]] == [(1, 12), (1, 30), (3, 12), (3, 30)]
    for case in report["decode"]:
        assert case["time"]["pairs"] == 4
        assert case["time"]["ratio"]["median"] > 0
        assert case["image_tokens_kept"] == 3
        assert 0 <= case["realised_output_keep_rate"] <= 1
        # 16 image tokens, text and output, 4 layers of keys and values, 64 float32 numbers each.
        assert case["kv_bytes"]["dense"] == case["batch"] * (16 + 8 + case["output_length"]) * 4 * 2 * 64 * 4
    assert report["no_cache"][0]["total_s"]["dense"] > 0
    assert report["prefill"][0]["share_of_promise"] > 0


def test_measure_peak_and_tables(capsys):
    assert main([*MEASURE, "--modes", "peak,decode", "--batch-sizes", "1"]) == 0
    shown = capsys.readouterr()
    assert "Peak memory" in shown.out
    assert "Decode step" in shown.out


def test_score(tmp_path, capsys):
    assert main(["score", "--shape", "tiny", "--output-tokens", "40", "--repeats", "2", "--output", str(tmp_path)]) == 0
    assert "Perplexity of 40 tokens" in capsys.readouterr().out
    report = json.loads((tmp_path / "score.json").read_text())
    assert set(report["models"]) == {"dense", "ours"}
    for case in report["models"].values():
        assert case["relative_difference"] < 1e-6
        assert case["speed_up"] > 0
    # Random weights guess among 128 words; ours drops tokens, so that its figure is its own.
    assert report["models"]["ours"]["perplexity_scoring"] != report["models"]["dense"]["perplexity_scoring"]


def test_train(tmp_path, capsys):
    step = ["train", "--shape", "tiny", "--output-tokens", "60", "--batch", "4", "--repeats", "1"]
    assert main([*step, "--output", str(tmp_path)]) == 0
    assert "Training step" in capsys.readouterr().out
    report = json.loads((tmp_path / "train.json").read_text())
    assert list(report["modes"]) == ["masked", "pruned", "pruned without probes"]
    saved = [case["saved_ratio"] for case in report["modes"].values()]
    # Fewer tokens leave less to save: 16 image tokens, of which 3 or so stay, and a tenth of the rest as probes.
    assert saved[0] > saved[1] > saved[2]
    assert all(case["time"]["ratio"]["median"] > 0 for case in report["modes"].values())


def test_generation_time_integrates_the_steps():
    def case(length, milliseconds):
        side = {"median": milliseconds / 1e3, "iqr": 0.0}
        return {"batch": 1, "output_length": length, "time": {"dense_s": side, "ours_s": side}}

    prefill = [{"batch": 1, "time": {"dense_s": {"median": 2.0}, "ours_s": {"median": 1.0}}}]
    curves = generation_times([case(100, 10), case(300, 30)], prefill)
    assert curves["dense"][1] == pytest.approx([2.0, 3.0, 7.0])
    assert curves["ours"][1] == pytest.approx([1.0, 2.0, 6.0])


def test_plot_without_matplotlib_is_a_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_report({"decode": [{"batch": 1}]}, tmp_path / "plot.png") is None
    assert "dynamic-llava[viz]" in capsys.readouterr().err
