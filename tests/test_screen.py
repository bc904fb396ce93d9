"""What commands show: whole tables wherever they go, a line for each log, one bar, no noise of libraries."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from rich.table import Table

from dynamic_llava import screen
from dynamic_llava.data.shapes import build_shapes
from dynamic_llava.train.__main__ import main as train

from .train.test_stage import CONFIG, ROOT, overrides

LINE = re.compile(
    r"step +(\d+)/(\d+)  loss \d+\.\d+  image kept 0\.\d+  output kept [01]\.\d+  tau [01]\.\d+  "
    r"[\d,]+ tokens/s  \d+:\d\d left"
)
HELD_OUT = re.compile(r"step +(\d+)/(\d+)  held-out loss \d+\.\d+  perplexity [\d.e+]+")
BAR = re.compile(r"(?:^|[\r\n])(?:\x1b\[A)*([^\r\n:]*): +\d+%\|")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    return build_shapes(folder, seed=1, train_pictures=8, val_pictures=1, test_pictures=2)


def in_a_process(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m words` with nothing of the tests' own loaded, its output in pipes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """A finished run with held-out data, and what it said."""
    folder = tmp_path_factory.mktemp("run") / "run"
    values = {"max_steps": 12, "logging_steps": 4, "eval_file": shapes / "val_describe.json"}
    values |= {"eval_strategy": "steps", "eval_steps": 6, "warmup_steps": 0, "min_output_length": 20}
    words = [word for word in overrides(shapes, folder, **values) if not word.startswith("disable_tqdm")]
    return folder, in_a_process("dynamic_llava.train", "--config", CONFIG, *words)


def test_a_run_says_a_line_for_each_log_and_what_comes_next(run):
    folder, said = run
    lines = said.stdout.splitlines()
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [LINE.fullmatch(line) for line in lines]
    assert (
        [int(match[1]) for match in found if match] == [line["step"] for line in logs if "loss" in line] == [4, 8, 12]
    )
    held_out = [int(match[1]) for match in map(HELD_OUT.fullmatch, lines) if match]
    assert held_out == [line["step"] for line in logs if "eval_loss" in line] == [6, 12]
    saved, following = lines[-2:]
    assert str(folder) in saved
    for name in re.findall(r"\w+\.\w+", saved.partition(": ")[2]):
        assert (folder / name).is_file()
    assert following.startswith("Next: ")
    assert f"--model {folder}" in following
    assert len(lines) == 3 + 2 + 2, "nothing else"
    assert max(map(len, lines[:-2])) < 110


def test_a_run_warns_of_nothing(run):
    assert run[1].stderr == ""


@pytest.mark.parametrize(
    "values",
    [
        {"lora_r": 2, "save_strategy": "steps", "save_steps": 1},
        {"activation_checkpointing": "true", "bf16": "true", "dataloader_num_workers": 1, "train_projector": "true"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_runs_of_other_kinds_warn_of_nothing(shapes, tmp_path, values):
    words = overrides(shapes, tmp_path / "run", **values)
    said = in_a_process("dynamic_llava.train", "--config", CONFIG, *words)
    assert said.stderr == ""
    assert [bool(LINE.fullmatch(line)) for line in said.stdout.splitlines()] == [True, True, False, False]


def test_a_lora_folder_is_inspected_merged_and_evaluated_in_silence(shapes, tmp_path):
    folder, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    assert train(["--config", CONFIG, *overrides(shapes, folder, lora_r=2, max_steps=1)]) == 0
    for words in (["inspect", folder], ["merge", folder, merged]):
        assert in_a_process("dynamic_llava.checkpoints", *words).stderr == ""
    words = ["--model", folder, "--tasks", "shapes_vqa", "--limit", "1", "--data-root", str(shapes)]
    assert set(BAR.findall(in_a_process("dynamic_llava.eval", *words).stderr)) == {"Evaluating"}


def test_several_ranks_say_it_once(shapes, tmp_path):
    rows = json.loads((shapes / "train.json").read_text())
    rows[3]["image"] = "images/train/gone.png"
    (tmp_path / "broken.json").write_text(json.dumps(rows))
    values = {"train_file": tmp_path / "broken.json", "on_bad_sample": "skip", "per_device_train_batch_size": 2}
    words = overrides(shapes, tmp_path / "run", image_folder=shapes, save_steps=1, save_strategy="steps", **values)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dynamic_llava.train"]
    said = in_a_process(*command, "--config", CONFIG, *words)
    assert len(LINE.findall(said.stdout)) == 2
    assert said.stdout.count("Saved in ") == said.stdout.count("Next: ") == 1
    assert said.stdout.count("samples were skipped") == 1
    again = in_a_process(*command, "--config", CONFIG, *words)
    assert again.stdout.count("Going on from ") == 1
    for stderr in (said.stderr, again.stderr):
        assert stderr == ""


def test_an_interrupted_run_says_where_it_goes_on_and_goes_on(shapes, tmp_path, capsys):
    words = overrides(shapes, tmp_path / "run", max_steps=4, save_steps=2, save_strategy="steps")
    assert train(["--config", CONFIG, *words]) == 0
    first = capsys.readouterr().out
    for path in ("checkpoint-4", "model.safetensors"):
        target = tmp_path / "run" / path
        if target.is_dir():
            for file in target.iterdir():
                file.unlink()
            target.rmdir()
        else:
            target.unlink()
    assert train(["--config", CONFIG, *words]) == 0
    second = capsys.readouterr().out
    assert [match[1] for match in LINE.finditer(first)] == ["1", "2", "3", "4"]
    assert [match[1] for match in LINE.finditer(second)] == ["3", "4"]


@pytest.mark.parametrize("tasks", ["shapes_vqa", "shapes_vqa,shapes_describe"])
def test_an_evaluation_shows_one_bar(run, shapes, tmp_path, tasks):
    words = ["--model", str(run[0]), "--tasks", tasks, "--limit", "3", "--data-root", str(shapes)]
    said = in_a_process("dynamic_llava.eval", *words, "--output", str(tmp_path))
    assert set(BAR.findall(said.stderr)) == {"Evaluating"}
    assert len(re.split(r"[\r\n]+", said.stderr.strip())) <= 2, said.stderr
    assert said.stdout.splitlines()[-1] == f"Results: {tmp_path / 'results.json'}"


def test_a_report_has_one_bar_for_each_row(run, shapes, tmp_path):
    words = ["--run", str(run[0]), "--data-root", str(shapes), "--limit", "1", "--descriptions", "1"]
    said = in_a_process("dynamic_llava.eval.report", *words, "--output", str(tmp_path))
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert list(dict.fromkeys(BAR.findall(said.stderr))) == [row["label"] for row in rows]


def wide(columns: int) -> Table:
    table = Table(title="t" * 30)
    for number in range(columns):
        table.add_column(f"column {number}")
    table.add_row(*(f"a cell of some words {number}" for number in range(columns)))
    return table


@pytest.mark.parametrize("environment", [{}, {"COLUMNS": "60"}, {"TERM": "dumb"}, {"FORCE_COLOR": "1"}, {"LINES": "5"}])
def test_tables_in_a_pipe_are_whole(environment, capsys, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    screen.console().print(wide(12))
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    row = next(line for line in printed.splitlines() if "a cell of some words 0" in line)
    assert all(f"a cell of some words {number}" in row for number in range(12))
    assert printed.count("\n") == 6, "title, header, row and their borders"


def test_every_console_is_made_in_one_place():
    files = [path for path in (ROOT / "dynamic_llava").rglob("*.py") if path.name != "screen.py"]
    made = [path for path in files if re.search(r"\bConsole\(", path.read_text())]
    assert not made


def test_the_next_command_can_be_typed(monkeypatch):
    monkeypatch.setattr(screen.shutil, "which", lambda name: None)
    words = screen.command("eval", "--model", "a run").split()
    assert words[1:] == ["-m", "dynamic_llava", "eval", "--model", "'a", "run'"]
    assert os.path.samefile(words[0], sys.executable)
    monkeypatch.setattr(screen.shutil, "which", lambda name: f"/bin/{name}")
    assert screen.command("eval") == "dynamic-llava eval"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.9, "1:00:00"), (90061, "25:01:01")]
)
def test_clock(seconds, shown):
    assert screen.clock(seconds) == shown
