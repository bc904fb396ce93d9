"""Two processes on a CPU: DDP, ZeRO-2, ZeRO-3, offload and FSDP2 compute, score and keep the same, and go on.

Each engine trains once; the tests look at that run from several sides. Text-only rows are everywhere: a rank alone has
none but such in some batches of training and of the evaluation.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.checkpointing import newest_valid

from .test_stage import ROOT, overrides, shapes  # noqa: F401  a fixture

STEPS = 6
# Scores in the place of those computed, by step: the best model is neither the first nor the last.
SCORES = {2: 3.0, 4: 1.0, 6: 2.0}
BEST = 4


@pytest.fixture(scope="module")
def mixed(shapes, tmp_path_factory):  # noqa: F811
    """Data in which runs of rows have no image: some batches of a rank are text alone."""
    folder = tmp_path_factory.mktemp("mixed")
    samples = json.loads((shapes / "train.json").read_text())
    for number, sample in enumerate(samples):
        if number % 3:
            sample.pop("image")
            for turn in sample["conversations"]:
                turn["value"] = turn["value"].replace("<image>", "").strip()
    (folder / "train.json").write_text(json.dumps(samples))
    # One row for each rank at a time: the second has text alone, then the first.
    first, second = (next(s for s in samples if ("image" in s) == pictured) for pictured in (True, False))
    (folder / "val.json").write_text(json.dumps([first, second, second, first]))
    return folder


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# Engines of `configs/accelerate`, started by its own launcher.
ACCELERATED = ("ddp", "fsdp2")


def launcher_of(engine: str | None) -> list[str]:
    """What starts two processes, as `scripts/train_stage.sh` does."""
    if engine not in ACCELERATED:
        return TORCHRUN
    settings = f"configs/accelerate/{engine}.yaml"
    ours = ["--config_file", settings, "--num_processes", "2", "--main_process_port", "0"]
    return ["accelerate.commands.launch", *ours]


def command_of(mixed, shapes, output, engine=None, **values) -> list[str]:  # noqa: F811
    values = {
        "train_file": mixed / "train.json",
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "min_output_length": 20,
        "report_to": "none",
        **settings_of(engine),
        **values,
    }
    words = [word for word in overrides(shapes, output, **values) if not word.startswith("use_cpu")]
    module = ["tests.train.cpu_rank", "--config", "configs/train/shapes.yaml"]
    return [sys.executable, "-m", *launcher_of(engine), "-m", *module, *words]


# One thread for each rank.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "SCORES": json.dumps(SCORES)}


def settings_of(engine: str | None) -> dict:
    """Keys of a run with that engine: a DeepSpeed file by name, or none for DDP and FSDP2."""
    if engine is None or engine in ACCELERATED:
        return {}
    pytest.importorskip("deepspeed")
    return {"deepspeed": ROOT / "configs" / "deepspeed" / f"{engine}.json"}


def run(mixed, shapes, output, engine=None, **values):  # noqa: F811
    """Losses and gradient norms of a run, from its log."""
    done = subprocess.run(
        command_of(mixed, shapes, output, engine, **values),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (output / "metrics.jsonl").is_file(), done.stderr[-3000:]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "lm_loss" in line], done


def whole_run(mixed) -> dict:
    """Keys of a run that saves, scores and keeps its best."""
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    scored = {"eval_file": mixed / "val.json", "per_device_eval_batch_size": 1, "load_best_model_at_end": "true"}
    return {**every, **scored}


@pytest.fixture(scope="module")
def straight(mixed, shapes, tmp_path_factory):  # noqa: F811
    """The run of an engine without an interruption: its losses and gradient norms, and its folder."""
    done = {}

    def of(engine: str | None):
        if engine not in done:
            output = tmp_path_factory.mktemp(str(engine)) / "run"
            # Pictures too, where the forward pass of one rank alone would wait for the weights of the other.
            pictures = {"picture_steps": STEPS} if engine in ("zero3", "fsdp2") else {}
            found, process = run(mixed, shapes, output, engine, **whole_run(mixed), **pictures)
            assert (len(found), process.returncode) == (STEPS, 0), process.stderr[-3000:]
            assert (output / "pictures").is_dir() == bool(pictures)
            done[engine] = found, output
        return done[engine]

    return of


ENGINES = [None, "ddp", "zero2", "zero3", "zero3_offload", "fsdp2"]


def eval_losses(output) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_sharding_equals_ddp(straight, engine):
    (found, output), (expected, other) = straight(engine), straight(None)
    # DeepSpeed's own Adam for the host rounds otherwise.
    tolerance = 3e-6 if engine == "zero3_offload" else 1e-6
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance, abs=tolerance)
        assert norm == pytest.approx(expected_norm, rel=2e-5)
    assert len(eval_losses(output)) == len(SCORES)
    assert eval_losses(output) == pytest.approx(eval_losses(other), rel=1e-4)
    one, two = (load_file(folder / "model.safetensors") for folder in (output, other))
    assert one.keys() == two.keys()
    one, two = (DynamicLlavaForConditionalGeneration.from_pretrained(p).state_dict() for p in (output, other))
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], atol=1e-3, rtol=1e-2, msg=key)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_model_is_what_a_run_ends_with(straight, engine):
    _, output = straight(engine)
    ends = {step: load_file(output / f"checkpoint-{step}" / "model.safetensors") for step in (BEST, STEPS)}
    final = load_file(output / "model.safetensors")
    assert all(torch.equal(value, ends[BEST][key]) for key, value in final.items())
    assert not all(torch.equal(value, ends[STEPS][key]) for key, value in final.items())
    config = json.loads((output / "config.json").read_text())
    assert config["sparsity"]["untrained"] == []


def test_deepspeed_on_one_process_needs_no_launcher(shapes, tmp_path):  # noqa: F811
    pytest.importorskip("deepspeed")
    losses = {}
    for engine in (None, "zero2"):
        words = overrides(shapes, tmp_path / str(engine), report_to="none", max_steps=3, **settings_of(engine))
        arguments = ["--config", "configs/train/shapes.yaml", *words]
        if engine is None:
            assert main(arguments) == 0
        else:
            command = [sys.executable, "-m", "dynamic_llava.train", *arguments]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in (tmp_path / str(engine) / "metrics.jsonl").read_text().splitlines()]
        losses[engine] = [line["loss"] for line in lines if "lm_loss" in line]
    assert len(losses[None]) == 3
    assert losses["zero2"] == pytest.approx(losses[None], rel=1e-5)


LORA = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "max_steps": 4}


@pytest.fixture(scope="module")
def lora_ddp(mixed, shapes, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("lora") / "run"
    return run(mixed, shapes, output, **LORA)[0], output


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_adapters_and_predictors_are_sharded_alike(mixed, shapes, lora_ddp, tmp_path, engine):  # noqa: F811
    found, done = run(mixed, shapes, tmp_path / "run", engine, **LORA)
    assert len(found) == LORA["max_steps"], done.stderr[-3000:]
    for (loss, norm), (expected, expected_norm) in zip(found, lora_ddp[0], strict=True):
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert norm == pytest.approx(expected_norm, rel=2e-5)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "run", lora_ddp[1]))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], atol=1e-3, rtol=1e-2, msg=key)


@pytest.mark.parametrize("engine", [None, "zero2", "zero3", "fsdp2"])
def test_a_killed_run_goes_on_bit_for_bit(mixed, shapes, straight, tmp_path, engine):  # noqa: F811
    expected, other = straight(engine)
    # The second checkpoint appears: the kill comes while it is written.
    kill_when(
        tmp_path / "run" / "checkpoint-4", command_of(mixed, shapes, tmp_path / "run", engine, **whole_run(mixed))
    )
    assert newest_valid(tmp_path / "run") is not None
    found, done = run(mixed, shapes, tmp_path / "run", engine, **whole_run(mixed))
    assert done.returncode == 0, done.stderr[-3000:]
    assert found == expected
    assert eval_losses(tmp_path / "run") == eval_losses(other)
    one, two = (load_file(folder / "model.safetensors") for folder in (other, tmp_path / "run"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def kill_when(appears, command: list[str]) -> None:
    """Start a run and kill all of it when a file appears."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 200
    while process.poll() is None and not appears.exists():
        assert time.time() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
