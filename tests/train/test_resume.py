"""Runs that are killed, stopped or out of room: the same command goes on, bit for bit."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dynamic_llava.errors import ExitStatus
from dynamic_llava.train import stage, trainer
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.checkpointing import (
    MANIFEST,
    check_same_config,
    is_valid,
    newest_valid,
    rotate,
    run_lock,
    write_errors,
    write_manifest,
)

from .test_stage import ROOT, config_of, overrides, shapes  # noqa: F401  a fixture

CONFIG = str(ROOT / "configs" / "train" / "shapes.yaml")
STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "save_total_limit": 2}
# How many kills at random moments; more with DYNAMIC_LLAVA_KILLS, for a long run by hand.
KILLS = int(os.environ.get("DYNAMIC_LLAVA_KILLS", "3"))


def arguments(shapes, output, **values):  # noqa: F811
    return ["--config", CONFIG, *overrides(shapes, output, **{**STEPS, **values})]


def outcome(run: Path):
    """Weights, and what the log says of each step but for the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}
    timed |= {"tokens_per_second", "memory_gb"}
    steps = [{key: value for key, value in line.items() if key not in timed} for line in lines if "loss" in line]
    (weights,) = run.glob("*model.safetensors")
    return load_file(weights), steps


def assert_same_outcome(one: Path, two: Path):
    (weights, steps), (other, other_steps) = outcome(one), outcome(two)
    assert steps == other_steps
    assert all(torch.equal(value, other[key]) for key, value in weights.items())


def stop_in_step(step: int, monkeypatch) -> None:
    """Let the next run be interrupted when so many optimizer steps are done."""
    original = trainer.StageTrainer.training_step

    def fail(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "training_step", fail)


@pytest.fixture(scope="module")
def straight(shapes, tmp_path_factory):  # noqa: F811
    run = tmp_path_factory.mktemp("straight") / "run"
    assert main(arguments(shapes, run)) == 0
    return run


def test_only_the_newest_stay_and_each_is_whole(straight):
    assert sorted(path.name for path in straight.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert all(is_valid(path) for path in straight.glob("checkpoint-*"))


def test_a_run_that_stops_halfway_goes_on_bit_for_bit(shapes, straight, tmp_path, monkeypatch):  # noqa: F811
    run = tmp_path / "run"
    stop_in_step(3, monkeypatch)
    assert main(arguments(shapes, run)) == ExitStatus.INTERRUPTED
    monkeypatch.undo()
    assert newest_valid(run).name == "checkpoint-2"
    assert main(arguments(shapes, run)) == 0
    assert_same_outcome(run, straight)
    # Once more on a finished run: nothing is trained, nothing changes.
    assert main(arguments(shapes, run)) == 0
    assert_same_outcome(run, straight)


@pytest.mark.parametrize(("lora_r", "kills"), [(0, KILLS), (4, -(-KILLS // 3))], ids=["full", "lora"])
def test_kill_at_random_moments(shapes, tmp_path, lora_r, kills):  # noqa: F811
    """Also inside a save: half of the moments are just when a checkpoint folder appears. Each meets a run at work."""
    rng = random.Random(0)
    # Every kill waits for a new checkpoint and then for a second at most: so many steps outlast them all.
    values = {"max_steps": 6 * kills + 4, "save_steps": 2, "lora_r": lora_r}
    killed, straight = (arguments(shapes, tmp_path / name, **values) for name in ("killed", "straight"))
    train = [sys.executable, "-m", "dynamic_llava.train"]
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    for number in range(kills):
        process = subprocess.Popen([*train, *killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        before = set((tmp_path / "killed").glob("checkpoint-*"))
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            if set((tmp_path / "killed").glob("checkpoint-*")) - before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1) if number % 2 == 0 else rng.uniform(0, 1.0))
        assert process.poll() is None, f"run {number} ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    for run in (killed, straight):
        subprocess.run([*train, *run], check=True, capture_output=True, **options)
    assert_same_outcome(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.parametrize(("room", "file"), [(0.5, "model.safetensors"), (1.2, "optimizer.pt")])
def test_a_full_disk_leaves_the_last_checkpoint(shapes, straight, tmp_path, monkeypatch, capsys, room, file):  # noqa: F811
    """From the third step on no file can grow beyond `room` times the model's: the system refuses the write."""
    run, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    original = trainer.StageTrainer.training_step
    most = int(room * (straight / "model.safetensors").stat().st_size)
    assert (straight / "checkpoint-6" / file).stat().st_size > most

    def fill(self, *args, **kwargs):
        if self.state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "training_step", fill)
    try:
        assert main(arguments(shapes, run)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert "checkpoint-4 could not be saved" in capsys.readouterr().err
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert is_valid(run / "checkpoint-2")
    assert main(arguments(shapes, run)) == 0
    assert_same_outcome(run, straight)


def test_errors_that_are_not_of_writing_stay_as_they_are():
    with pytest.raises(RuntimeError, match="out of memory"), write_errors():
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_vanish_end_the_run_and_it_goes_on(shapes, straight, tmp_path, monkeypatch, capsys, workers):  # noqa: F811
    run, away = tmp_path / "run", shapes / "away"
    original = trainer.StageTrainer.training_step

    def unmount(self, *args, **kwargs):
        if self.state.global_step == 2 and not away.exists():
            (shapes / "images").rename(away)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "training_step", unmount)
    try:
        assert main(arguments(shapes, run, dataloader_num_workers=workers)) == 2
    finally:
        away.rename(shapes / "images")
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert "no picture at" in error
    assert "check image_folder" in error
    assert is_valid(newest_valid(run))
    assert main(arguments(shapes, run)) == 0
    assert_same_outcome(run, straight)


def test_a_loss_that_is_no_number_names_the_samples(shapes, tmp_path, monkeypatch, capsys):  # noqa: F811
    original = trainer.StageTrainer.current_tau

    def broken(self):
        if self.state.global_step == 2:
            self.model.lm_head.weight.data.fill_(float("nan"))
        return original(self)

    monkeypatch.setattr(trainer.StageTrainer, "current_tau", broken)
    assert main(arguments(shapes, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "The loss of step 3 is nan, on the samples " in error
    assert "unknown" not in error
    assert is_valid(tmp_path / "run" / "checkpoint-2")


def test_a_changed_configuration_is_refused_with_its_keys(shapes, straight, tmp_path, capsys):  # noqa: F811
    changed = arguments(shapes, straight, learning_rate="1e-3", logging_steps=1, save_total_limit=5)
    assert main(changed) == 2
    error = capsys.readouterr().err
    assert "another configuration (learning_rate: " in error
    assert "save_total_limit" not in error
    config = config_of(shapes, straight, **STEPS)
    check_same_config(straight / "checkpoint-6", config.fixed_values())
    assert main([*arguments(shapes, tmp_path / "new", max_steps=1), "restart=true"]) == 0


def test_numbers_that_earlier_versions_noted_as_words(tmp_path):
    folder = folder_of(tmp_path / "checkpoint-2")
    write_manifest(folder, {"learning_rate": "1e-3", "weight_decay": 0.0, "output_dir": "a", "optim": "adamw_torch"})
    noted = {"learning_rate": 0.001, "weight_decay": 0.0, "output_dir": "b", "optim": "adamw_torch"}
    check_same_config(folder, noted)
    for key, value in (("learning_rate", 0.002), ("optim", "sgd"), ("optim", 1)):
        with pytest.raises(ValueError, match=key):
            check_same_config(folder, {**noted, key: value})


def folder_of(path: Path, text: str = "x") -> Path:
    path.mkdir(parents=True)
    (path / "weights").write_text(text)
    return path


def test_another_number_of_ranks_is_refused(straight, tmp_path):
    """Each rank has its own random state; a missing one would make the rest of the run another in silence."""
    config = json.loads((straight / "checkpoint-6" / MANIFEST).read_text())["config"]
    assert config["ranks"] == 1
    with pytest.raises(ValueError, match="ranks: 1 -> 2"):
        check_same_config(straight / "checkpoint-6", {**config, "ranks": 2})


def test_what_is_valid(tmp_path):
    one = folder_of(tmp_path / "checkpoint-5")
    assert not is_valid(one)
    write_manifest(one, {})
    assert is_valid(one)
    (one / "weights").write_text("y")
    assert not is_valid(one)
    assert is_valid(one, hashes=False)
    two = folder_of(tmp_path / "checkpoint-10")
    write_manifest(two, {})
    assert newest_valid(tmp_path) == two
    (two / "weights").unlink()
    assert newest_valid(tmp_path) is None
    (two / MANIFEST).write_text("{")
    assert not is_valid(two)


def test_rotation_never_removes_the_only_valid_one(tmp_path):
    for number in (1, 2, 3):
        write_manifest(folder_of(tmp_path / f"checkpoint-{number}"), {})
    folder_of(tmp_path / "checkpoint-4")
    rotate(tmp_path, 1)
    assert newest_valid(tmp_path).name == "checkpoint-3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_two_runs_in_one_folder(shapes, tmp_path, capsys):  # noqa: F811
    with run_lock(tmp_path / "run"):
        assert main(arguments(shapes, tmp_path / "run")) == 2
    assert "Another run is writing to" in capsys.readouterr().err


def test_a_run_without_checkpoints_starts_anew(shapes, tmp_path):  # noqa: F811
    config = config_of(shapes, tmp_path / "run", max_steps=1)
    for _ in range(2):
        stage.train(config)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert sum("lm_loss" in line for line in lines) == 1
