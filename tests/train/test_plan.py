"""What `--dry-run` says, how `scripts/train_stage.sh` starts a stage, and on how many ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from dynamic_llava.train import plan, stage
from dynamic_llava.train.__main__ import main

from .test_stage import CONFIG, ROOT, config_of, overrides, shapes  # noqa: F401  a fixture

TINY = f"base_model={ROOT / 'assets' / 'tiny-llava'}"


def engine(name: str) -> str:
    return f"deepspeed={ROOT / 'configs' / 'deepspeed' / name}.json"


def test_a_dry_run_counts_what_would_learn(shapes, tmp_path, capsys):  # noqa: F811
    config = config_of(shapes, tmp_path / "run")
    assert main(["--config", CONFIG, "--dry-run", *overrides(shapes, tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    model = stage.build_model(config, tokenizer=None)
    for part in ("decoder", "predictors"):
        own = [
            p for n, p in model.named_parameters() if p.requires_grad and ("_predictor." in n) == (part != "decoder")
        ]
        assert f"{sum(p.numel() for p in own):,}" in printed
    assert "optimizer steps 2" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "sharding"),
    [
        ("llava15_7b", []),
        ("llava15_7b", [engine("zero3")]),
        ("llava15_13b", []),
        ("llava15_13b", [engine("zero2_offload")]),
        ("llava15_7b_lora", []),
        ("llava15_7b_qlora", [engine("zero2")]),
    ],
)
def test_what_is_for_gpus_is_planned_without_one(capsys, name, sharding):
    """bf16, quantized weights and every engine; a 7B's batch of 64 on 1 and on 8 GPUs."""
    config = str(ROOT / "configs" / "train" / f"{name}.yaml")
    for ranks in (1, 8):
        # Options stand before, between or behind the values.
        assert main(["--config", config, TINY, "--dry-run", *sharding, "--ranks", str(ranks)]) == 0
        printed = capsys.readouterr().out
        assert f"Memory, {ranks} rank(s)" in printed
        assert "global batch 64" in printed
        assert printed.startswith(f"python -m dynamic_llava.train --config {config} {TINY}")
    assert main(["--config", config, TINY, "--dry-run", *sharding, "--ranks", "3"]) == 2
    assert "global_batch_size=64 is no multiple of the" in capsys.readouterr().err
    assert main(["--config", config, TINY, "--dry-run", *sharding, "--ranks", "0"]) == 2
    assert "--ranks must be a whole number of at least 1, got 0" in capsys.readouterr().err


def planned(shapes, output, ranks=1, **values):  # noqa: F811
    return plan.plan(config_of(shapes, output, **values), samples=100, ranks=ranks)


def test_memory_by_hand(shapes, tmp_path):  # noqa: F811
    """AdamW's two numbers for each weight, float32 copies beside 16 bits, and what an engine shards or moves."""
    found = planned(shapes, tmp_path)
    trained = sum(group["parameters"] for group in found["groups"])
    everything = trained + found["frozen_parameters"]
    sizes = found["memory_bytes"]
    assert (sizes["weights"], sizes["gradients"], sizes["optimizer"]) == (4 * everything, 4 * trained, 8 * trained)
    assert not any(found["host_bytes"].values())

    def sharded(name: str) -> tuple[dict, dict]:
        file = ROOT / "configs" / "deepspeed" / f"{name}.json"
        found = planned(shapes, tmp_path, ranks=4, dtype="bfloat16", deepspeed=file)
        return found["memory_bytes"], found["host_bytes"]

    def sharded_sizes(weights: float) -> dict[str, float]:
        return {"weights": weights, "gradients": 2 * trained / 4, "optimizer": 12 * trained / 4}

    for name, weights, on_host in (
        ("zero2", 2 * everything, ()),
        ("zero3", 2 * everything / 4, ()),
        ("zero2_offload", 2 * everything, ("gradients", "optimizer")),
        ("zero3_offload", 2 * everything / 4, ("weights", "gradients", "optimizer")),
    ):
        device, host = sharded(name)
        for kind, size in sharded_sizes(weights).items():
            assert (device[kind], host[kind]) == ((0, size) if kind in on_host else (size, 0)), (name, kind)


def test_fsdp_shares_out_everything(shapes, tmp_path, monkeypatch):  # noqa: F811
    whole = planned(shapes, tmp_path)["memory_bytes"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sizes = planned(shapes, tmp_path, ranks=4)["memory_bytes"]
    assert all(sizes[kind] == whole[kind] / 4 for kind in ("weights", "gradients", "optimizer"))


def test_memory_of_quantized_weights(shapes, tmp_path):  # noqa: F811
    """Linear layers of tower, projector and decoder at half a byte; embeddings, head and norms stay at four."""
    stored = load_file(ROOT / "assets" / "tiny-llava" / "model.safetensors")
    linear = {key: value.numel() for key, value in stored.items() if key.endswith("weight") and value.ndim == 2}
    small = sum(size for key, size in linear.items() if "embed" not in key and "lm_head" not in key)
    assert 0.8 * sum(linear.values()) < small < sum(linear.values())
    found = planned(shapes, tmp_path, lora_r=4, quantize="4bit")
    trained = sum(group["parameters"] for group in found["groups"])
    rest = found["frozen_parameters"] - small
    assert found["memory_bytes"]["weights"] == small / 2 + 4 * trained + 4 * rest


def test_steps_of_an_epoch(shapes, tmp_path):  # noqa: F811
    config = config_of(shapes, tmp_path, max_steps=-1, num_train_epochs=2)
    assert plan.plan(config, samples=100)["steps"] == 50
    assert plan.plan(config, samples=100, ranks=2)["steps"] == 26
    assert plan.plan(config, samples=None)["steps"] is None


def test_a_batch_is_the_same_on_any_number_of_ranks(shapes, tmp_path, monkeypatch):  # noqa: F811
    values = {"per_device_train_batch_size": 2, "global_batch_size": 12}
    args = config_of(shapes, tmp_path, **values).training
    assert args.gradient_accumulation_steps == 6
    assert [args.accumulation_steps(ranks) for ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=4 contradicts global_batch_size=12.*takes 6"):
        config_of(shapes, tmp_path, **values, gradient_accumulation_steps=4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"=12 is no multiple of the 8 samples that 4 rank\(s\)"):
        config_of(shapes, tmp_path, **values)


def test_several_gpus_want_several_processes(shapes, tmp_path):  # noqa: F811
    config = config_of(shapes, tmp_path)
    config.training._n_gpu = 2
    with pytest.raises(ValueError, match="sees 2 GPUs"):
        stage.train(config)


def test_fsdp_and_deepspeed(shapes, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="exclude each other; pass deepspeed=null"):
        config_of(shapes, tmp_path, deepspeed=ROOT / "configs" / "deepspeed" / "zero2.json")


def shown(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """`scripts/train_stage.sh ... --dry-run`."""
    command = ["bash", "scripts/train_stage.sh", *words, "--dry-run"]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_script_starts_a_process_for_each_gpu(tmp_path):
    torchrun = f"{sys.executable} scripts/ranks.py torch.distributed.run --"
    own = "dynamic_llava.train --config configs/train/smoke_cpu.yaml"
    found = shown("configs/train/smoke_cpu.yaml", "max_steps=3", GPUS="8")
    assert found.stdout.startswith(f"{torchrun}standalone --nproc_per_node 8 -m {own} max_steps=3\n")
    assert "Memory, 8 rank(s)" in found.stdout
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "GPUS": "4"}
    found = shown("configs/train/smoke_cpu.yaml", **nodes)
    first = "--node_rank 1 --master_addr first --master_port 29500 --nproc_per_node 4"
    assert found.stdout.startswith(f"{torchrun}nnodes 2 {first} -m {own}\n")
    assert "Memory, 8 rank(s)" in found.stdout


def test_paths_count_from_where_the_user_stands(tmp_path):
    """Of a configuration, data and hosts; what the repository has is found behind them."""
    (tmp_path / "mine.yaml").write_text((ROOT / "configs/train/smoke_cpu.yaml").read_text())
    (tmp_path / "hosts").write_text("a slots=2\n")
    environment = {**os.environ, "PYTHON": sys.executable}

    def started(*words: str, **more: str) -> subprocess.CompletedProcess:
        command = ["bash", str(ROOT / "scripts/train_stage.sh"), *words, "--dry-run"]
        return subprocess.run(
            command, cwd=tmp_path, env={**environment, **more}, capture_output=True, text=True, check=False
        )

    found = started("mine.yaml", "seed=1", HOSTFILE="hosts")
    assert "--module dynamic_llava.train --config mine.yaml seed=1\n" in found.stdout, found.stderr
    found = started("smoke_cpu", GPUS="2", ACCELERATE="configs/accelerate/fsdp2.yaml")
    assert f"--config_file {ROOT}/configs/accelerate/fsdp2.yaml" in found.stdout, found.stderr
    assert "Memory, 2 rank(s)" in found.stdout
    found = started("none.yaml")
    assert found.returncode == 2
    assert "There is no configuration at none.yaml" in found.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "hosts"}


def test_slurm_finds_the_script_by_its_own_place(tmp_path):
    """Slurm runs a copy of the file that it was given."""
    copy = tmp_path / "spooled" / "slurm_script"
    copy.parent.mkdir()
    copy.write_text((ROOT / "scripts/slurm/train_stage.sbatch").read_text())
    stubs = {
        "scontrol": f'[ "$2" = job ] && echo "   Command={ROOT}/scripts/slurm/train_stage.sbatch shapes" || echo first',
        "srun": 'SLURM_NODEID=0 exec "$@"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "GPUS": "2"}
    environment |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "first", "SLURM_NNODES": "2"}
    command = ["bash", str(copy), "smoke_cpu", "--dry-run"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "--nnodes 2 --node_rank 0 --master_addr first" in found.stdout, found.stderr
    assert "Memory, 4 rank(s)" in found.stdout


def test_the_script_takes_a_hostfile(tmp_path):
    found = shown("configs/train/smoke_cpu.yaml", HOSTFILE="scripts/hostfile.example")
    deepspeed = "-m deepspeed.launcher.runner --hostfile scripts/hostfile.example --no_local_rank --module"
    assert found.stdout.startswith(f"{sys.executable} {deepspeed} dynamic_llava.train")
    assert "Memory, 16 rank(s)" in found.stdout
    found = shown(HOSTFILE=str(tmp_path / "none"))
    assert found.returncode == 2
    assert "none is not a file; see scripts/hostfile.example" in found.stderr


def test_the_script_takes_accelerates_files(tmp_path):
    launcher = f"{sys.executable} scripts/ranks.py accelerate.commands.launch --config_file configs/accelerate/"
    own = "dynamic_llava.train --config configs/train/smoke_cpu.yaml"
    weights = {}
    for name in ("ddp", "fsdp2"):
        found = shown("configs/train/smoke_cpu.yaml", ACCELERATE=f"configs/accelerate/{name}.yaml", GPUS="4")
        assert found.stdout.startswith(
            f"{launcher}{name}.yaml --num_processes 4 --num_machines 1 --main_process_port 0 -m {own}\n"
        )
        weights[name] = float(re.search(r"weights\s*│\s*([\d.]+)", found.stdout)[1])
    assert weights["fsdp2"] < weights["ddp"]
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "GPUS": "4"}
    found = shown("configs/train/smoke_cpu.yaml", ACCELERATE="configs/accelerate/ddp.yaml", **nodes)
    first = "--num_machines 2 --machine_rank 1 --main_process_ip first --main_process_port 29500"
    assert found.stdout.startswith(f"{launcher}ddp.yaml --num_processes 8 {first} -m {own}\n")


@pytest.mark.parametrize(
    ("file", "gpus", "message"),
    [("none.yaml", "2", "is not a file; see configs/accelerate"), ("configs/accelerate/ddp.yaml", "1", "set GPUS")],
)
def test_accelerates_launcher_where_it_cannot_start(file, gpus, message):
    found = shown("configs/train/smoke_cpu.yaml", ACCELERATE=file, GPUS=gpus)
    assert found.returncode == 2
    assert message in found.stderr
