import json

import pytest
from lmms_eval.api.task import ConfigurableTask

from dynamic_llava.checkpoints import loaded as loading
from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.conversations import ConversationTask


@pytest.fixture
def fails(capsys):
    """Run the command, expect exit status 2, return what it says."""

    def check(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    return check


def test_writes_results_and_samples(run_folder, shapes_folder, tmp_path, capsys):
    arguments = ["--model", str(run_folder), "--tasks", "shapes_vqa,shapes_describe", "--limit", "3"]
    options = [
        "--data-root",
        str(shapes_folder),
        "--output",
        str(tmp_path),
        "--image-keep-rate",
        "0.5",
        "--no-output-sparsity",
    ]
    assert main([*arguments, *options]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["metrics"]) == ["shapes_vqa", "shapes_describe"]
    assert results["settings"]["image_keep_rate"] == 0.5
    assert results["settings"]["output_sparsity"] is False
    described = results["metrics"]["shapes_describe"]
    assert described["image_kept_fraction"] == 0.5
    assert described["perplexity"] > 1
    samples = [json.loads(line) for line in (tmp_path / "samples_shapes_vqa.jsonl").read_text().splitlines()]
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2]
    accuracy = sum(sample["accuracy"] for sample in samples) / 3
    assert results["metrics"]["shapes_vqa"]["accuracy"] == pytest.approx(accuracy)
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 6
    assert "perplexity" in capsys.readouterr().out


def test_unknown_task_offers_names(run_folder, fails):
    message = fails("--model", str(run_folder), "--tasks", "shapes_vqq")
    assert "shapes_vqq" in message
    assert "shapes_vqa" in message


def test_missing_data_names_the_command(run_folder, tmp_path, fails):
    message = fails("--model", str(run_folder), "--tasks", "shapes_vqa", "--data-root", str(tmp_path / "none"))
    assert "test_vqa.json" in message
    assert "python -m dynamic_llava.data.shapes" in message


def test_missing_picture_is_named(run_folder, shapes_folder, tmp_path, fails):
    (tmp_path / "test_vqa.json").write_text((shapes_folder / "test_vqa.json").read_text())
    message = fails("--model", str(run_folder), "--tasks", "shapes_vqa", "--data-root", str(tmp_path))
    assert "'q0'" in message
    assert "images/test/0.png" in message


def test_documents_out_of_reach_show_before_a_model_is_loaded(run_folder, tmp_path, fails, monkeypatch):
    def out_of_reach(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", out_of_reach)
    monkeypatch.setattr(ConfigurableTask.download.retry, "sleep", lambda seconds: None)
    monkeypatch.setattr(loading, "load_model", None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    message = fails("--model", str(run_folder), "--tasks", "pope", "--output", str(tmp_path))
    assert "could not read or score pope: ConnectionError('no route to the hub')" in message
    assert "--data-root" in message


def test_documents_are_read_once(run_folder, shapes_folder, tmp_path, monkeypatch):
    reads = []
    original = ConversationTask.download
    monkeypatch.setattr(ConversationTask, "download", lambda *args: (reads.append(1), original(*args)))
    arguments = ["--model", str(run_folder), "--data-root", str(shapes_folder), "--tasks", "shapes_vqa"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert len(reads) == 1


@pytest.mark.parametrize("content", ["{", "[1]", '[{"id": "a"}]'])
def test_malformed_data_names_the_file(run_folder, tmp_path, fails, content):
    (tmp_path / "test_vqa.json").write_text(content)
    message = fails("--model", str(run_folder), "--tasks", "shapes_vqa", "--data-root", str(tmp_path))
    assert "test_vqa.json" in message


def test_missing_model(shapes_folder, tmp_path, fails):
    root = ["--data-root", str(shapes_folder), "--tasks", "shapes_vqa"]
    missing = ["--model", str(tmp_path / "nowhere"), *root]
    assert "--output" in fails(*missing)
    assert "nowhere" in fails(*missing, "--output", str(tmp_path / "results"))
    assert "config.json" in fails("--model", str(tmp_path), *root)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--image-keep-rate", "1.5"), ("--image-keep-rate", "1.5")),
        (("--image-selector", "best"), ("image_selector", "best", "random")),
        (("--dtype", "float33"), ("dtype", "float33")),
    ],
)
def test_wrong_values(run_folder, shapes_folder, fails, arguments, words):
    message = fails("--model", str(run_folder), "--tasks", "shapes_vqa", "--data-root", str(shapes_folder), *arguments)
    for word in words:
        assert word in message


def test_dense_model_has_nothing_to_drop(dense_folder, shapes_folder, fails):
    root = ["--data-root", str(shapes_folder), "--tasks", "shapes_vqa"]
    assert "image_keep_rate" in fails("--model", str(dense_folder), "--image-keep-rate", "0.5", *root)
