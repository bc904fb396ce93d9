"""Runs side by side with the paper's rows."""

import json
import re

import pytest

from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.compare import PAPER


def results(folder, metrics, model="runs/one", dense=False, settings=None, **options):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"image_keep_rate": None, **(settings or {})}
    options = {"tasks": list(metrics), "limit": None, "llava_prompts": True, **options}
    content = {"model": model, "dense": dense, "settings": settings, "options": options, "metrics": metrics}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def compared(tmp_path, capsys):
    """The Markdown of `compare` on runs."""

    def run(*arguments) -> str:
        assert main(["compare", *map(str, arguments), "--output", str(tmp_path / "out")]) == 0
        capsys.readouterr()
        return (tmp_path / "out/compare.md").read_text()

    return run


def line(page: str, start: str) -> str:
    (found,) = [row for row in page.splitlines() if row.startswith(f"| {start}")]
    return found


def test_figures_beside_their_row_of_the_paper(compared, tmp_path):
    metrics = {"gqa": {"exact_match": 0.6}, "mme": {"mme_perception_score": 1510.0, "mme_cognition_score": 300.0}}
    dense = results(tmp_path / "a", metrics, model="llava-1.5-7b", dense=True)
    ours = results(tmp_path / "b/eval", {"gqa": {"exact_match": 0.611, "exact_match_stderr": 0.1}}, model="runs/ours")
    page = compared(dense, tmp_path / "b")
    assert line(page, "GQA") == "| GQA | 62.0 (paper) | 61.3 (paper) | 60.0 ▼ (-2.0) | 61.1 (-0.2) |"
    assert line(page, "MME") == "| MME (perception) | 1510.7 (paper) | 1501.0 (paper) | 1510.0 (-0.7) | – |"
    assert line(page, "mme mme_cognition_score") == "| mme mme_cognition_score | 300 | – |"
    assert "stderr" not in page
    assert "VQAv2" not in page
    assert "I\\|T" in page, "bars inside cells are escaped"
    assert ours.is_dir()


def test_every_benchmark_of_the_paper_has_its_measure(compared, tmp_path):
    paper = json.loads(PAPER.read_text())
    metrics: dict = {}
    for benchmark in paper["benchmarks"]:
        measure = benchmark["measures"][0]
        metrics.setdefault(measure["task"], {})[measure["metric"]] = benchmark["ours"] / measure["scale"]
    page = compared(results(tmp_path / "a", metrics))
    for benchmark in paper["benchmarks"]:
        assert re.search(r"\([+-]0\.0+\) \|$", line(page, benchmark["name"])), benchmark["name"]
    assert "▲" not in page
    assert "▼" not in page


def test_figures_of_the_paper():
    figures = {row["name"]: (row["dense"], row["ours"]) for row in json.loads(PAPER.read_text())["benchmarks"]}
    assert figures["VQAv2"] == (78.5, 77.9)
    assert figures["MME"] == (1510.7, 1501.0)
    assert figures["LVIS-VQA perplexity"] == (4.59, 4.90)
    costs = {row["name"]: (row["dense"], row["ours"]) for row in json.loads(PAPER.read_text())["costs"]}
    assert costs["KV cache"] == (103, 63)


def test_what_makes_figures_incomparable_is_said(compared, tmp_path):
    metrics = {"vqav2_val": {"exact_match": 0.7}, "textvqa_val": {"exact_match": 0.5}}
    page = compared(results(tmp_path / "a", metrics, limit=100, llava_prompts=False))
    assert "only the first 100 documents" in page
    assert "VQAv2 here: validation instead of test-dev." in page
    assert "TextVQA by lmms-eval's prompt; --llava-prompts writes LLaVA's." in page
    asked = compared(results(tmp_path / "b", metrics, llava_prompts=True))
    assert "lmms-eval's prompt" not in asked


def test_settings_that_differ_are_marked(compared, tmp_path):
    first = results(tmp_path / "a", {"gqa": {"exact_match": 0.6}}, settings={"image_keep_rate": 0.2})
    second = results(tmp_path / "b", {"gqa": {"exact_match": 0.6}}, settings={"image_keep_rate": 0.5})
    page = compared(first, second)
    assert line(page, "image_keep_rate") == "| image_keep_rate (differs) | 0.2 | 0.5 |"
    assert line(page, "model") == "| model | runs/one | runs/one |"
    assert "| one (1) | one (2) |" in page


def test_tolerance(compared, tmp_path):
    run = results(tmp_path / "a", {"gqa": {"exact_match": 0.62}})
    assert "62.0 ▲ (+0.7)" in compared(run)
    assert "62.0 (+0.7)" in compared(run, "--tolerance", "0.02")


def test_page_is_self_contained(compared, tmp_path):
    compared(results(tmp_path / "a", {"gqa": {"exact_match": 0.6}}, model="<b>"))
    page = (tmp_path / "out/compare.html").read_text()
    assert "<td>60.0 ▼<small>-1.3</small></td>" in page
    assert "&lt;b&gt;" in page
    assert not re.search(r'(src|href)="', page)


def test_written_beside_the_first_run_by_default(run_folder, shapes_folder, tmp_path, capsys):
    arguments = ["--tasks", "shapes_vqa", "--data-root", str(shapes_folder), "--output", str(tmp_path)]
    assert main(["--model", str(run_folder), *arguments]) == 0
    assert main(["compare", str(tmp_path)]) == 0
    assert (tmp_path / "compare.html").is_file()
    assert "shapes_vqa accuracy" in capsys.readouterr().out


def test_bad_input_is_named(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "none")]) == 2
    assert "No results.json" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{")
    assert main(["compare", str(tmp_path)]) == 2
    assert "results.json is not valid JSON" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"model": "a"}')
    assert main(["compare", str(tmp_path)]) == 2
    assert "lacks metrics, settings, options" in capsys.readouterr().err
    run = results(tmp_path, {})
    assert main(["compare", str(run), "--tolerance", "-1"]) == 2
    assert "--tolerance" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shown", [("pad", "pad"), ("pad", "square"), ("square", "square"), (None, "pad"), (None, None)]
)
def test_runs_that_saw_other_pictures_are_told(compared, tmp_path, shown):
    folders = [results(tmp_path / name, {"gqa": {"exact_match": 0.6}}, model=name) for name in ("a", "b")]
    for folder, ratio in zip(folders, shown, strict=True):
        content = json.loads((folder / "results.json").read_text())
        # Versions that cut out the middle did not note it.
        noted = content if ratio is None else {**content, "image_aspect_ratio": ratio}
        (folder / "results.json").write_text(json.dumps(noted))
    page = compared(*folders)
    cut = [name for name, ratio in zip(("a", "b"), shown, strict=True) if ratio != "pad"]
    for name in ("a", "b"):
        assert (f"{name}: pictures cut to their middle" in page) == (name in cut)
    assert ("do not differ by their models alone" in page) == (len(cut) == 1)
    assert ("differs" in line(page, "image_aspect_ratio")) == (len(cut) == 1)
