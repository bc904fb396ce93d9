"""`python -m tools.eval_overhead`: both sides score the same documents; bad input."""

import json

import pytest

from dynamic_llava.eval.responses import FILE_NAME
from tools.eval_overhead import main
from tools.eval_overhead_bench import TASK, build_bench


def test_report(capsys):
    assert main(["--documents", "5", "--batch-size", "2", "--repeats", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["documents"], report["batch_size"]) == (5, 2)
    assert report["overhead_s"] == report["ours_s"]["median"] - report["lmms_eval_s"]["median"]
    assert report["pictures_and_prompts_s"] > 0


def test_our_side_does_the_whole_evaluation(tmp_path):
    build_bench(tmp_path, "assets/tiny-llava", 3, 2).ours()
    results = json.loads((tmp_path / "results/results.json").read_text())
    assert results["metrics"][TASK]["accuracy"] == 1.0
    assert results["efficiency"][TASK]["image_tokens"] == 576
    assert results["efficiency"][TASK]["image_tokens_kept"] == 115
    assert len((tmp_path / "results" / FILE_NAME).read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--documents", "0"], "--documents must be a whole number of at least 1, got 0"),
        (["--batch-size", "-2"], "--batch-size must be a whole number of at least 1, got -2"),
        (["--documents", "1", "--processor", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
