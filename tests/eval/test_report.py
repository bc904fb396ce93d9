import json
import re

import pytest
from PIL import Image

from dynamic_llava.eval.conversations import data_root_at
from dynamic_llava.eval.report import main
from dynamic_llava.eval.report_html import scaled
from dynamic_llava.eval.report_rows import ROWS, VQA_TASK, make_report
from dynamic_llava.eval.runner import EvaluationOptions, numeric_metrics
from dynamic_llava.visualize.drawing import PAPER, draw_patches
from dynamic_llava.visualize.views import text_pieces


@pytest.fixture(scope="module")
def report(run_folder, dense_folder, shapes_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    with data_root_at(shapes_folder):
        make_report(str(run_folder), str(dense_folder), folder, EvaluationOptions((VQA_TASK,), batch_size=4))
    return folder


def test_report_json(report, run_folder, dense_folder):
    content = json.loads((report / "report.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == [row.name for row in ROWS]
    assert rows["dense"]["model"] == str(dense_folder)
    assert rows["image_output"]["model"] == str(run_folder)
    assert rows["random_image"]["settings"]["image_selector"] == "random"
    assert rows["random_image"]["settings"]["output_sparsity"] is False
    assert rows["random_output"]["settings"]["output_selector"] == "random"
    assert rows["dense"]["image_tokens_kept"] == 64
    for name in ("image", "image_output", "random_image", "random_output"):
        assert rows[name]["image_tokens_kept"] == 12
        assert rows[name]["prefill_flops_vs_dense"] == rows[name]["prefill_flops"] / rows["dense"]["prefill_flops"]
    for name in ("dense", "image", "random_image"):
        assert rows[name]["output_kept_fraction"] == 1.0
    assert rows["image"]["kv_bytes"] < rows["dense"]["kv_bytes"]
    assert rows["random_output"]["kv_bytes"] < rows["image"]["kv_bytes"]
    assert set(rows["image"]["accuracy_by_kind"]) == {"colour", "shape"}
    assert rows["dense"]["accuracy_points_vs_dense"] == 0.0


def test_report_kv_bytes_by_hand(report):
    rows = {row["name"]: row for row in json.loads((report / "report.json").read_text())["rows"]}
    per_token = 2 * 64 * 4
    tokens = rows["dense"]["prompt_text_tokens"] + 64 + rows["dense"]["output_tokens"]
    assert rows["dense"]["kv_bytes"] == pytest.approx(4 * tokens * per_token)
    assert rows["image"]["kv_bytes"] == pytest.approx((2 * tokens + 2 * (tokens - 64 + 12)) * per_token)


def test_report_html_is_self_contained(report):
    page = (report / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    for row in ROWS:
        assert row.label.replace("&", "&amp;") in page
    assert "$" not in page
    for name in ("kept_patches.png", "kept_words.png"):
        with Image.open(report / name) as picture:
            assert picture.width > 300


def test_report_refuses_models_the_wrong_way_round(run_folder, dense_folder, shapes_folder, tmp_path, capsys):
    arguments = ["--data-root", str(shapes_folder), "--output", str(tmp_path)]
    assert main(["--run", str(dense_folder), "--base", str(dense_folder), *arguments]) == 2
    assert "--run must be a Dynamic-LLaVA checkpoint" in capsys.readouterr().err


def test_draw_patches_fades_what_is_dropped():
    picture = Image.new("RGB", (8, 8), (0, 0, 0))
    panel = draw_patches(picture, [True, False, False, True], size=40)
    assert panel.getpixel((10, 10)) == (0, 0, 0)
    assert panel.getpixel((30, 30)) == (0, 0, 0)
    assert panel.getpixel((30, 10)) == (204, 204, 204)
    assert PAPER == (255, 255, 255)
    with pytest.raises(ValueError, match="5 patches"):
        draw_patches(picture, [True] * 5)


def test_text_pieces_join_to_the_text(run):
    tokenizer = run.processor.tokenizer
    ids = tokenizer("There is a red circle in the picture.", return_tensors="pt")["input_ids"][0]
    pieces = text_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_scaled():
    assert scaled(999, "B") == "999 B"
    assert scaled(1234, "B") == "1.23 KB"
    assert scaled(2.5e13, "FLOPs") == "25.0 TFLOPs"


def test_numeric_metrics():
    values = {"accuracy,none": 0.5, "accuracy_stderr,none": "N/A", "accuracy_stderr_clt,none": 0.1, "alias": "x"}
    assert numeric_metrics(values) == {"accuracy": 0.5, "accuracy_stderr": 0.1}
    assert numeric_metrics({"score,strict": 1, "score_stderr_clustered,strict": 0.2}) == {"score/strict": 1.0}
