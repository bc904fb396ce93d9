"""Short names, the judge's key, the hub's token and options from a file: all before a model is loaded."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

from dynamic_llava.eval.__main__ import main, parse
from dynamic_llava.eval.conversation_files import conversation_files
from dynamic_llava.eval.conversations import data_root_at
from dynamic_llava.eval.names import OWN_TASKS, SHORT_NAMES, judge_key, resolve_names
from dynamic_llava.eval.runner import EvaluationOptions, check_tasks
from dynamic_llava.eval.task_index import leaf_tasks, task_manager_for

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "eval"


def test_every_short_name_is_a_stock_task():
    tasks, _ = resolve_names(list(SHORT_NAMES), has_judge=True)
    manager = task_manager_for(tasks)
    assert [list(leaf_tasks(manager, task)) for task in tasks] == [[task] for task in tasks]
    static, _ = resolve_names(["mmbench", "mmbench_cn"], has_judge=False)
    manager = task_manager_for(static)
    assert static == ("mmbench_en_dev_static", "mmbench_cn_dev_static")
    assert all(task in manager.task_index for task in static)


def test_names_stand_for_tasks():
    tasks, notices = resolve_names(["vqav2", "gqa", "chartqa", "stock:scienceqa", "scienceqa", "gqa"], has_judge=True)
    assert tasks == ("vqav2_val", "gqa", "chartqa", "scienceqa", "scienceqa_img")
    assert notices == ["vqav2 is lmms-eval's task vqav2_val.", "scienceqa is lmms-eval's task scienceqa_img."]


def test_mmbench_without_a_judge_is_scored_statically():
    tasks, notices = resolve_names(["mmbench"], has_judge=False)
    assert tasks == ("mmbench_en_dev_static",)
    assert "static scorer" in notices[0]
    assert "OPENAI_API_KEY" in notices[0]
    assert resolve_names(["mmbench"], has_judge=True)[0] == ("mmbench_en_dev",)


@pytest.mark.parametrize("name", ["mmvet", "llava_bench", "llava_in_the_wild"])
def test_open_answers_without_a_judge_are_refused(name, run_folder, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["--model", str(run_folder), "--tasks", name]) == 2
    message = capsys.readouterr().err
    assert name in message
    assert "judge" in message
    assert "OPENAI_API_KEY" in message


def test_judge_key():
    assert judge_key({}) is None
    assert judge_key({"OPENAI_API_KEY": ""}) is None
    assert judge_key({"OPENAI_API_KEY": "a"}) == "a"
    assert judge_key({"OPENAI_API_KEY": "a", "API_TYPE": "azure"}) is None
    assert judge_key({"AZURE_API_KEY": "b", "API_TYPE": "azure"}) == "b"


@pytest.mark.parametrize(("wrong", "right"), [("vqa2", "vqav2"), ("mmbench_em_dev", "mmbench_en_dev")])
def test_unknown_names_offer_short_and_stock_ones(run_folder, capsys, wrong, right):
    assert main(["--model", str(run_folder), "--tasks", wrong]) == 2
    message = capsys.readouterr().err
    assert f"Unknown task {wrong!r}" in message
    assert right in message


def test_data_from_the_hub_needs_a_token(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"gqa with a token.*HF_TOKEN.*--data-root"):
        check_tasks(EvaluationOptions(("gqa",)))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    assert check_tasks(EvaluationOptions(("gqa",))).local == {}


def test_half_a_pair_of_mme_is_refused():
    with pytest.raises(ValueError, match="--limit must be even, got 3"):
        check_tasks(EvaluationOptions(("mme",), limit=3))


def test_options_from_a_file(tmp_path, run_folder):
    config = tmp_path / "suite.yaml"
    config.write_text("tasks: [gqa, pope]\nbatch-size: 4\nlimit: 10\nllava_prompts: true\n")
    args = parse(["--config", str(config), "--model", str(run_folder), "--limit", "3"])
    assert (args.tasks, args.batch_size, args.limit, args.llava_prompts) == (["gqa", "pope"], 4, 3, True)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_suites(path, run_folder):
    args = parse(["--config", str(path), "--model", str(run_folder)])
    assert set(args.tasks) <= {*SHORT_NAMES, *OWN_TASKS}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("taks: gqa", ["taks", "Did you mean tasks,"]),
        ("batch_size: many", ["batch_size must be a whole number", "many"]),
        ("resume: 3", ["resume must be true or false", "3"]),
        ("- gqa", ["list"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_wrong_files_of_options(tmp_path, capsys, content, words):
    (tmp_path / "suite.yaml").write_text(content)
    assert main(["--config", str(tmp_path / "suite.yaml"), "--model", "x"]) == 2
    message = capsys.readouterr().err
    assert "suite.yaml" in message
    assert all(word in message for word in words), message


def test_missing_options_are_named(tmp_path, capsys, run_folder):
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert main(["--tasks", "gqa"]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["--model", str(run_folder)]) == 2
    assert "--tasks" in capsys.readouterr().err


def test_a_task_of_ones_own_is_one_file_beside_the_built_in_ones(tmp_path, monkeypatch):
    tasks, data = tmp_path / "tasks", tmp_path / "data"
    tasks.mkdir()
    data.mkdir()
    Image.new("RGB", (20, 10)).save(data / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Nothing."}]
    (data / "mine.json").write_text(json.dumps([{"id": "1", "image": "a.png", "kind": "x", "conversations": turns}]))
    (tasks / "mine.yaml").write_text("task: mine\nconversations: {file: mine.json}\n")
    (tmp_path / "my_scores.py").write_text("def half(doc, results):\n    return {'half': 0.5}\n")
    (tasks / "scored.yaml").write_text("task: scored\nconversations: {file: mine.json, metric: 'my_scores:half'}\n")
    monkeypatch.syspath_prepend(tmp_path)
    manager = task_manager_for(["mine", "scored", "shapes_vqa"], tasks)
    with data_root_at(data):
        loaded = manager.load_task_or_group(["mine", "scored"])
    task, scored = loaded["mine"], loaded["scored"]
    document = task.dataset["test"][0]
    assert task.doc_to_text(document) == "What?"
    assert task.process_results(document, ["nothing"]) == {"accuracy": 1.0}
    assert scored.process_results(document, ["nothing"]) == {"half": 0.5}
    assert [metric["metric"] for metric in scored.config.metric_list] == ["half"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("[a]", "must be a mapping with file"),
        ("{metric: meteor}", "must be a mapping with file"),
        ("{file: a.json, mtric: meteor}", "must be a mapping with file"),
        ("{file: a.json, metric: best}", "metric 'best' is none of exact_match"),
        ("{file: a.json, metric: 'math:best'}", "metric 'math:best'"),
    ],
)
def test_a_task_of_ones_own_that_is_none(section, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"task: mine\nconversations: {section}\n")
    with pytest.raises(ValueError, match=message):
        conversation_files(tmp_path)["mine"].scorer("mine")
