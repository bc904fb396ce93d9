"""Training configurations: YAML below the command line, typed, misspelt keys named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from dynamic_llava.compat import named_as_here
from dynamic_llava.train.config import load_config
from dynamic_llava.train.schedules import gumbel_tau

CONFIGS = Path(__file__).parents[2] / "configs" / "train"


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base_model: b\ntrain_file: t.json\nimage_folder: i\nlearning_rate: 5e-6\nimage_keep_rate: 0.3\n")
    return path


def test_types_and_overrides(config_file, tmp_path):
    config = load_config(config_file, ["image_keep_rate=0.4", "max_steps=3", "bf16=false", f"output_dir={tmp_path}/o"])
    assert config.training.learning_rate == 5e-6  # YAML reads it as a string
    assert config.sparsity.image_keep_rate == 0.4
    assert config.training.max_steps == 3
    config.save(config.training.output_dir)
    again = load_config(tmp_path / "o" / "train_config.yaml")
    assert again.sparsity == config.sparsity
    assert again.training.max_steps == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lerning_rate=1"], "'lerning_rate'.*Did you mean learning_rate"),
        (["learning_rate"], "write key=value"),
        (["learning_rate=fast"], "learning_rate"),
        (["image_keep_rate=2"], r"\(0, 1\], got 2"),
        (["gumbel_tau_end=0"], "gumbel_tau_end must be a number above 0"),
    ],
)
def test_bad_values(config_file, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file, overrides)


def test_missing_file_and_missing_key(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration at"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("learning_rate: 1.0\n")
    with pytest.raises(ValueError, match="base_model"):
        load_config(tmp_path / "empty.yaml")


@pytest.mark.parametrize(
    "name", ["shapes", "smoke_cpu", "llava15_7b", "llava15_13b", "llava15_7b_lora", "llava15_7b_qlora"]
)
def test_shipped_configurations_are_valid(name):
    overrides = ["bf16=false"]  # the machine that tests may have none
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    assert config.sparsity.image_keep_rate == 0.2
    assert config.sparsity.output_keep_rate == 0.5
    assert yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["seed"] >= 0


def test_paper_recipe():
    config = load_config(CONFIGS / "llava15_7b.yaml", ["bf16=false"])
    args = config.training
    assert (args.learning_rate, args.predictor_learning_rate, args.weight_decay) == (5e-6, 2e-4, 0.0)
    assert args.per_device_train_batch_size * args.accumulation_steps(8) * 8 == 64
    assert (config.data.max_length, config.sparsity.min_output_length) == (2048, 50)


def test_arguments_that_transformers_has_renamed():
    values = {"activation_checkpointing": True, "seed": 1}
    assert named_as_here(values, {"activation_checkpointing", "seed"}) == values
    assert named_as_here(values, {"gradient_checkpointing", "seed"}) == {"gradient_checkpointing": True, "seed": 1}


def test_gumbel_tau_decays_exponentially():
    assert gumbel_tau(0.0) == 1.0
    assert gumbel_tau(1.0) == pytest.approx(0.1)
    assert gumbel_tau(0.5) == pytest.approx(0.1**0.5)
    assert gumbel_tau(2.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "engine",
    [
        {"zero_optimization": []},
        {"zero_optimization": {"stage": "x"}},
        {"zero_optimization": {"stage": 7}},
        {"zero_optimization": {"stage": 3, "offload_param": 7}},
        {"bf16": 1},
    ],
)
def test_sections_of_a_deepspeed_file(config_file, tmp_path, engine):
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(engine))
    for given in (path, json.dumps(engine)):
        with pytest.raises(
            ValueError, match=r"where a section belongs|zero_optimization\.stage .* must be 0, 1, 2 or 3"
        ):
            load_config(config_file, [f"deepspeed={given}", "use_cpu=true"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_deepspeed_file_in_any_encoding(config_file, tmp_path, encoding):
    engine = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    (tmp_path / "engine.json").write_text(json.dumps(engine), encoding=encoding)
    config = load_config(config_file, [f"deepspeed={tmp_path / 'engine.json'}", "use_cpu=true"])
    assert config.training.deepspeed == engine
    assert config.training.hf_deepspeed_config.is_zero2()
    (tmp_path / "engine.json").write_text(json.dumps({**engine, "optimizer": {}}), encoding=encoding)
    with pytest.raises(ValueError, match=r"deepspeed=.*engine\.json sets optimizer, which"):
        load_config(config_file, [f"deepspeed={tmp_path / 'engine.json'}", "use_cpu=true"])


def test_a_deepspeed_file_that_is_none(config_file, tmp_path):
    path = tmp_path / "engine.json"
    for content in (b"\xff\xfe\x00", b"{", b"[1]", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="engine"):
            load_config(config_file, [f"deepspeed={path}"])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="no regular file"):
        load_config(config_file, [f"deepspeed={path}"])
    for key in ("torch_compile_mode", "base_model", "seed", "train_file"):
        with pytest.raises(ValueError, match=f"{key} takes a word or a number, got the mapping"):
            load_config(config_file, [f"{key}={{a: 1}}"])
    with pytest.raises(ValueError, match="lr_scheduler_kwargs must be an object"):
        load_config(config_file, ["lr_scheduler_kwargs=1000", "use_cpu=true"])
