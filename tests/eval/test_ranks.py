"""Two processes share the documents and give what one gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynamic_llava.errors import ExitStatus
from dynamic_llava.eval.__main__ import main

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "eval.sh"


def rows(folder, name: str) -> list[dict]:
    """By document, without the clock's figures and the size of the batch."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    for row in found:
        for key in ("batch_size", "prefill_ms", "decode_ms"):
            row.pop(key, None)
    return sorted(found, key=lambda row: row["doc_id"])


@pytest.mark.parametrize("launcher", ["eval.sh", "ranks.py"])
def test_the_status_of_a_rank_is_that_of_the_launcher(launcher):
    environment = {**os.environ, "PYTHON": sys.executable, "GPUS": "2", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dynamic_llava.eval"]
    start = ["bash", SCRIPT] if launcher == "eval.sh" else [sys.executable, SCRIPT.parent / "ranks.py", *torchrun]
    done = subprocess.run([*start, "--batch-size=0"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == ExitStatus.BAD_INPUT, done.stderr
    assert "error: --batch-size must be a whole number" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_ranks_equal_one(run_folder, shapes_folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    # Seven documents: lmms-eval evens out the ranks with a repeated request, which must not count.
    arguments = ["--model", str(run_folder), "--tasks", "shapes_vqa", "--data-root", str(shapes_folder), "--limit", "7"]
    assert main([*arguments, "--output", str(one), "--batch-size", "1"]) == 0
    command = ["bash", str(SCRIPT), *arguments, "--output", str(two), "--batch-size", "3"]
    settings = {"PYTHON": sys.executable, "GPUS": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Results:") == 1
    metrics = [json.loads((folder / "results.json").read_text())["metrics"] for folder in (one, two)]
    assert metrics[0] == metrics[1]
    assert rows(one, "requests.jsonl") == rows(two, "requests.jsonl")
    answers = [[row["resps"] for row in rows(folder, "samples_shapes_vqa.jsonl")] for folder in (one, two)]
    assert len(answers[0]) == 7
    assert answers[0] == answers[1]
    assert sorted(path.name for path in two.glob("responses*")) == ["responses-0.jsonl", "responses-1.jsonl"]
