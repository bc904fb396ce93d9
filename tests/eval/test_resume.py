"""Answers are kept as they come; a run that was cut off goes on with identical results."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamic_llava.errors import ExitStatus
from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.answers import Answer
from dynamic_llava.eval.costs import RequestRecord
from dynamic_llava.eval.lmms_model import DynamicLlava
from dynamic_llava.eval.responses import ResponseStore, checkpoint_fingerprint, response_key

BATCH = "3"
CLOCK = re.compile(r'"(prefill|decode)_ms": [^,}]+')


# The command with half a second of waiting before each batch.
SLOW = """
import sys, time
from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.answers import Answer
from dynamic_llava.eval.costs import RequestRecord
from dynamic_llava.eval.lmms_model import DynamicLlava
answer = DynamicLlava._answer
def slow(self, requests):
    time.sleep(0.5)
    return answer(self, requests)
DynamicLlava._answer = slow
sys.exit(main())
"""


@pytest.fixture
def evaluate(run_folder, shapes_folder):
    """The command on both shapes tasks, 8 and 4 requests in batches of 3; returns the exit status."""

    def run(output, *arguments: str) -> int:
        options = ["--data-root", str(shapes_folder), "--tasks", "shapes_vqa,shapes_describe", "--batch-size", BATCH]
        return main(["--model", str(run_folder), *options, "--output", str(output), *arguments])

    return run


def written(folder) -> dict[str, str]:
    """The files of an evaluation whose content must not depend on how it came about, but for the clock's figures."""
    names = ["results.json", "requests.jsonl", "samples_shapes_vqa.jsonl", "samples_shapes_describe.jsonl"]
    return {name: CLOCK.sub("", (folder / name).read_text()) for name in names}


@pytest.fixture
def stop_after(monkeypatch):
    """Let the model answer so many batches, then fail; returns the list of batch sizes answered."""
    answer = DynamicLlava._answer

    def arrange(batches: int | None) -> list[int]:
        answered: list[int] = []

        def counted(self, requests):
            if len(answered) == batches:
                raise KeyboardInterrupt
            answered.append(len(requests))
            return answer(self, requests)

        monkeypatch.setattr(DynamicLlava, "_answer", counted)
        return answered

    return arrange


@pytest.mark.parametrize(
    "options", [(), ("--image-selector", "random", "--output-selector", "random", "--seed", "3")], ids=["own", "random"]
)
def test_cut_off_and_resumed_is_the_same(evaluate, stop_after, tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert evaluate(whole, *options) == 0
    stop_after(2)
    assert evaluate(parts, *options) == ExitStatus.INTERRUPTED
    assert not (parts / "results.json").exists()
    answered = stop_after(None)
    assert evaluate(parts, *options, "--resume") == 0
    assert sum(answered) == 8 + 4 - (3 + 1)
    assert written(parts) == written(whole)
    answered = stop_after(0)
    assert evaluate(parts, *options, "--resume") == 0
    assert answered == []


def test_killed_and_resumed_is_the_same(run_folder, shapes_folder, evaluate, tmp_path):
    """SIGKILL as soon as some answers are on disk; at most the batch at work is answered again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert evaluate(whole) == 0
    # A model that is slowed down, so that the kill falls between two batches.
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    options = ["--data-root", str(shapes_folder), "--tasks", "shapes_vqa,shapes_describe", "--batch-size", BATCH]
    command = [sys.executable, str(script), "--model", str(run_folder), *options, "--output", str(parts)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **silent)
    responses, deadline = parts / "responses.jsonl", time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if responses.exists() and len(responses.read_bytes().splitlines()) > 3:
            break
        time.sleep(0.01)
    assert process.poll() is None, "ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(responses.read_bytes().splitlines()) - 1
    assert 3 <= kept < 12
    assert not (parts / "results.json").exists()
    subprocess.run(
        [*command[:1], "-m", "dynamic_llava.eval", *command[2:], "--resume"], check=True, capture_output=True
    )
    assert written(parts) == written(whole)
    keys = [json.loads(line)["key"] for line in responses.read_text().splitlines()[1:]]
    assert len(keys) - len(set(keys)) < int(BATCH), "answers that were there are not made again"


def test_other_settings_are_answered_anew(evaluate, stop_after, tmp_path, capsys):
    assert evaluate(tmp_path, "--image-keep-rate", "0.5") == 0
    answered = stop_after(None)
    assert evaluate(tmp_path, "--image-keep-rate", "1", "--resume") == 0
    assert sum(answered) == 12
    assert evaluate(tmp_path, "--image-keep-rate", "0.5", "--resume") == 0
    assert sum(answered) == 12
    assert "24 answers of an earlier run" in capsys.readouterr().err


def test_without_resume_it_starts_anew(evaluate, stop_after, tmp_path):
    assert evaluate(tmp_path) == 0
    answered = stop_after(None)
    assert evaluate(tmp_path) == 0
    assert sum(answered) == 12
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 1 + 12


def test_cut_off_last_line_is_dropped(evaluate, stop_after, tmp_path, capsys):
    assert evaluate(tmp_path) == 0
    before, file = written(tmp_path), tmp_path / "responses.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    answered = stop_after(None)
    assert evaluate(tmp_path, "--resume") == 0
    assert "last line was cut off" in capsys.readouterr().err
    assert answered == [2], "the last batch of the eight questions, whole"
    assert written(tmp_path) == before
    assert all(json.loads(line) for line in file.read_text().splitlines())


@pytest.mark.parametrize("left", [0, 1, 40, 200], ids=lambda size: f"{size} bytes")
def test_what_a_full_disk_has_left_is_resumed(evaluate, stop_after, tmp_path, left):
    """An empty file, or one cut in its first lines, counts as begun: later answers have their header."""
    assert evaluate(tmp_path) == 0
    before, file = written(tmp_path), tmp_path / "responses.jsonl"
    file.write_bytes(file.read_bytes()[:left])
    assert evaluate(tmp_path, "--resume") == 0
    answered = stop_after(0)
    assert evaluate(tmp_path, "--resume") == 0
    assert answered == []
    assert written(tmp_path) == before


def test_nothing_to_resume_is_said(run_folder, shapes_folder, evaluate, tmp_path, capsys):
    assert evaluate(tmp_path, "--resume") == 2
    assert "--resume: there is no responses.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row", [{"text": 5}, {"text": None}, {"record": None}, {"record": {}}, {"record": {"task": "a", "doc_id": "b"}}]
)
def test_answers_of_another_shape_are_refused(row, capsys):
    right = Answer("a", RequestRecord("t", 0, 1, 1, 1, 1, 1, 1)).stored()
    assert Answer.from_stored(json.loads(json.dumps(right))).text == "a"
    with pytest.raises(ValueError, match="start without --resume"):
        Answer.from_stored({**right, **row})


def test_broken_line_in_the_middle_is_named(evaluate, tmp_path, capsys):
    assert evaluate(tmp_path) == 0
    file = tmp_path / "responses.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines[4] = lines[4][:30] + "\n"
    file.write_text("".join(lines))
    assert evaluate(tmp_path, "--resume") == 2
    message = capsys.readouterr().err
    assert "responses.jsonl line 5 is broken" in message
    assert "--resume" in message


def test_changed_checkpoint_is_refused(run_folder, shapes_folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(run_folder, model)
    arguments = ["--model", str(model), "--tasks", "shapes_vqa", "--data-root", str(shapes_folder)]
    assert main(arguments) == 0
    assert main([*arguments, "--resume"]) == 0
    weights = load_file(model / "model.safetensors")
    save_file({name: weight + 0.01 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert main([*arguments, "--resume"]) == 2
    message = capsys.readouterr().err
    assert "responses.jsonl" in message
    assert "before it changed" in message
    assert main(arguments) == 0


def test_fingerprint_follows_weights_and_configuration(tmp_path):
    def write(value: float, rate: float = 0.2) -> str:
        save_file({"a": torch.full((64, 64), value)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"rate": rate}))
        return checkpoint_fingerprint(tmp_path)

    first = write(1.0)
    assert write(1.0) == first
    assert write(2.0) != first
    assert write(1.0, rate=0.3) != first
    (tmp_path / "notes.txt").write_text("not part of the model")
    assert write(1.0) == first


def test_keys_tell_requests_apart():
    base = ("vqa", "test", 3, "What?", {"max_new_tokens": 8}, {"image_keep_rate": None}, 0)
    others = [("gqa", *base[1:]), (*base[:2], 4, *base[3:]), (*base[:3], "Who?", *base[4:])]
    others += [(*base[:4], {"max_new_tokens": 9}, *base[5:]), (*base[:5], {"image_keep_rate": 0.5}, 0), (*base[:6], 1)]
    keys = {response_key(*parts) for parts in [base, *others]}
    assert len(keys) == 1 + len(others)
    assert response_key(*base) == response_key(*base)


def test_ranks_have_files_of_their_own(tmp_path):
    for rank in range(2):
        ResponseStore(tmp_path, "f", rank=rank, world_size=2).add([f"k{rank}"], [{"text": str(rank)}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["responses-0.jsonl", "responses-1.jsonl"]
    assert ResponseStore(tmp_path, "f", resume=True).get(["k0", "k1"]) == [{"text": "0"}, {"text": "1"}]
    assert ResponseStore(tmp_path, "f", resume=True).get(["k0", "k2"]) is None
    fresh = ResponseStore(tmp_path, "f")
    assert len(list(tmp_path.iterdir())) == 2, "nothing is lost before there is something new"
    fresh.add(["k2"], [{"text": "2"}])
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]
