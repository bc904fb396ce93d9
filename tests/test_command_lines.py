"""Every command answers bad input with one line and status 2, and asks for missing packages before anything else."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from pathlib import Path

import pytest

from dynamic_llava.errors import ExitStatus
from dynamic_llava.packages import EXTRAS, require_package

pytest.importorskip("lmms_eval")

NUMBERS = ["0", "-1", "nan", "inf", "-inf", "abc", "1e9999", "", "9" * 40, "1_0", "٣"]
# Command line up to the number; numbers that are right for it are left out below.
COUNTS = {
    "dynamic_llava.eval.__main__": ["--batch-size", "--limit", "--image-keep-rate", "--output-keep-rate"],
    "dynamic_llava.eval.report": ["--batch-size", "--limit", "--descriptions"],
    "tools.eval_overhead": ["--documents", "--batch-size", "--repeats"],
    "dynamic_llava.efficiency.__main__ flops": ["--output-length", "--dtype-bytes", "--image-keep-rate", "--layers"],
    "dynamic_llava.efficiency.__main__ measure": ["--batch-sizes", "--steps", "--case-seconds", "--output-keep-rate"],
    "dynamic_llava.efficiency.__main__ score": ["--output-tokens", "--repeats", "--hidden", "--vocab"],
    "dynamic_llava.efficiency.__main__ train": ["--batch", "--text-tokens", "--heads", "--image-size"],
    "dynamic_llava.data.shapes.__main__": ["--train-pictures", "--questions-per-picture"],
    "dynamic_llava.checkpoints.__main__ convert a b --to ours": ["--max-shard-gb"],
    "dynamic_llava.train.__main__ --config shapes": ["--ranks", "--gradient-report"],
}
SEEDS = {
    "dynamic_llava.eval.__main__": ["--seed"],
    "dynamic_llava.eval.report --run x": ["--seed"],
    "dynamic_llava.efficiency.__main__ measure": ["--seed", "--warmup", "--threads"],
    "dynamic_llava.efficiency.__main__ flops": ["--prompt", "--images"],
    "dynamic_llava.data.shapes.__main__": ["--seed"],
    "eval.benchmarks.generation --image-folder x --output y": ["--seed"],
    "dynamic_llava.eval.compare x": ["--tolerance"],
}
COMMANDS = sorted({words.split()[0] for words in (*COUNTS, *SEEDS)} | {"dynamic_llava.data.__main__"})
COMMANDS += ["dynamic_llava.__main__", "tools.tiny_base.__main__", "eval.benchmarks.prepare"]


def call(module: str, *arguments: str) -> int:
    return importlib.import_module(module).main(list(arguments))


def one_line(capsys) -> str:
    said = capsys.readouterr().err
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("command", [*COUNTS, *SEEDS])
def test_numbers_out_of_bounds(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = dict.fromkeys(COUNTS.get(command, ()), NUMBERS)
    flags |= {flag: [number for number in NUMBERS if number != "0"] for flag in SEEDS.get(command, ())}
    for flag, numbers in flags.items():
        for number in numbers:
            assert call(*command.split(), f"{flag}={number}") == ExitStatus.BAD_INPUT, (flag, number)
            said = one_line(capsys)
            assert flag in said, (flag, number, said)
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_and_missing_arguments(command, capsys):
    for arguments in (["--no-such-option"], ["--help=x"]):
        assert call(command, *arguments) == ExitStatus.BAD_INPUT
        assert "--help" in one_line(capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_no_error(command, capsys):
    with pytest.raises(SystemExit) as end:
        call(command, "--help")
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


PLACES = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\xff"),
    "not there": lambda path: None,
    "no YAML": lambda path: path.write_text("a: [1"),
    "a list": lambda path: path.write_text("- a"),
    "an LFS pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
}
READERS = [
    ("dynamic_llava.eval.__main__", "--model=x", "--config={}"),
    ("dynamic_llava.eval.compare", "{}"),
    ("dynamic_llava.train.__main__", "--config", "{}"),
    ("dynamic_llava.train.__main__", "--config", "{}", "--dry-run"),
    ("tools.tiny_base.__main__", "--config", "{}"),
    ("dynamic_llava.data.__main__", "check", "{}"),
    ("eval.benchmarks.generation", "--lvis={}", "--image-folder=.", "--output=out"),
]


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("arguments", READERS, ids=lambda words: "-".join(words)[14:])
def test_files_that_cannot_be_read(arguments, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place(tmp_path / "file")
    assert call(*(word.format("file") for word in arguments)) == ExitStatus.BAD_INPUT
    assert "file" in one_line(capsys)


WRITERS = [
    ("dynamic_llava.efficiency.__main__", "score", "--shape=tiny", "--output={}"),
    ("dynamic_llava.efficiency.__main__", "train", "--shape=tiny", "--output={}"),
    ("dynamic_llava.efficiency.__main__", "measure", "--shape=tiny", "--output={}"),
    ("eval.benchmarks.prepare", "--source=.", "--output={}"),
    ("dynamic_llava.eval.compare", "run", "--output={}"),
]


@pytest.mark.parametrize("arguments", WRITERS, ids=lambda words: "-".join(words[:2]))
@pytest.mark.parametrize("output", ["file", "file/below", "x" * 300, "/proc/none"])
def test_outputs_that_cannot_be_written(arguments, output, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    results = {"model": "m", "metrics": {"gqa": {"exact_match": 0.6}}, "settings": {}, "options": {}}
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    assert call(*(word.format(output) for word in arguments)) == ExitStatus.BAD_INPUT
    assert "name another one" in one_line(capsys)


SUITES = [
    "image_keep_rate: high",
    "image_keep_rate: .nan",
    "image_keep_rate: .inf",
    "image_keep_rate: true",
    "image_keep_rate: [0.2]",
    "batch_size: 0",
    "batch_size: 2.5",
    "batch_size: true",
    "batch_size: {a: 1}",
    "seed: -1",
    "limit: -3",
    "model: [a, b]",
    "model: 5",
    "model: ''",
    "tasks: [gqa, 5]",
    "tasks: {gqa: 1}",
    "resume: no",
    "resume: 1",
    "resume: [true]",
    "dtype: 16",
    "output: true",
    "5: x",
    "no_such_option: 1",
    "? [a]\n: b",
]


@pytest.mark.parametrize("text", SUITES)
def test_values_of_another_type_in_a_suite(text, tmp_path, capsys):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    assert call("dynamic_llava.eval.__main__", "--config", str(path), "--model=x") == ExitStatus.BAD_INPUT
    assert "suite.yaml" in one_line(capsys)


RESULTS = [
    None,
    [],
    5,
    {"model": None},
    {"metrics": []},
    {"metrics": {"gqa": [1]}},
    {"metrics": {"gqa": {"exact_match": "0.6"}}},
    {"metrics": {"gqa": {"exact_match": True}}},
    {"settings": None},
    {"options": [1]},
    {"options": {"limit": "all"}},
    {"efficiency": {"gqa": {"prefill_ms": "1"}}},
    {"efficiency": None},
]


@pytest.mark.parametrize("change", RESULTS, ids=repr)
def test_results_that_no_evaluation_writes(change, tmp_path, capsys):
    right = {"model": "m", "metrics": {"gqa": {"exact_match": 0.6}}, "settings": {}, "options": {}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**right, **change} if isinstance(change, dict) else change))
    assert call("dynamic_llava.eval.compare", str(tmp_path)) == ExitStatus.BAD_INPUT
    assert "results.json" in one_line(capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_figures_that_are_no_numbers_are_shown_as_such(value, tmp_path, capsys):
    metrics = {"gqa": {"exact_match": value}, "mme": {"mme_cognition_score": value}}
    content = {"model": "m", "metrics": metrics, "settings": {}, "options": {}}
    (tmp_path / "results.json").write_text("\ufeff" + json.dumps(content))
    assert call("dynamic_llava.eval.compare", str(tmp_path)) == ExitStatus.DONE
    assert (str(value) in capsys.readouterr().out) == (value is not None)


@pytest.mark.parametrize("name", EXTRAS)
def test_missing_packages_are_asked_for(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"A test needs the package .* missing; pip install '"):
        require_package(name, "A test")


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("lmms_eval", ["dynamic_llava.eval.__main__", "--model", ".", "--tasks", "gqa"]),
        ("lmms_eval", ["dynamic_llava.eval.report", "--run", "none"]),
        ("lmms_eval", ["tools.eval_overhead"]),
        ("peft", ["dynamic_llava.train.__main__", "--config", "{}", "lora_r=8"]),
        ("deepspeed", ["dynamic_llava.train.__main__", "--config", "{}", "deepspeed=none.json"]),
        ("bitsandbytes", ["dynamic_llava.train.__main__", "--config", "{}", "quantize=4bit", "lora_r=8"]),
        ("wandb", ["dynamic_llava.train.__main__", "--config", "{}", "report_to=wandb"]),
        ("tensorboard", ["dynamic_llava.train.__main__", "--config", "{}", "report_to=[wandb, tensorboard]"]),
        ("flash_attn", ["dynamic_llava.train.__main__", "--config", "{}", "attn_implementation=flash_attention_2"]),
    ],
)
def test_a_command_names_the_package_that_it_lacks(package, arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "tensorboard":
        monkeypatch.setitem(sys.modules, "wandb", None)
    config = str(Path(__file__).parent.parent / "configs/train/shapes.yaml")
    assert call(*(word.format(config) for word in arguments)) == ExitStatus.BAD_INPUT
    assert f"package {package}, which is missing; pip install '" in one_line(capsys)


@pytest.mark.parametrize("text", ["a: [", "- a", "task: [x]", "task: x", "task: x\nclass: !function nothing.Class"])
def test_task_files_that_are_none(text, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(text)
    arguments = ["--model=assets/tiny-llava", "--tasks=x", f"--tasks-dir={tmp_path}", f"--output={tmp_path}/out"]
    assert call("dynamic_llava.eval.__main__", *arguments) == ExitStatus.BAD_INPUT
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu:x", "meta"])
def test_devices_that_are_not_there(device, capsys):
    assert call("dynamic_llava.efficiency.__main__", "score", "--shape=tiny", f"--device={device}") == 2
    one_line(capsys)


@pytest.mark.parametrize("script", ["prepare_data.py", "build_generation_benchmarks.py"])
def test_scripts_end_as_the_commands_do(script, monkeypatch, capsys):
    path = Path(__file__).parent.parent / "eval" / script
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), "--source", "none"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == ExitStatus.BAD_INPUT
    one_line(capsys)
