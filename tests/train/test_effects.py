"""Every key of a training configuration does something, or is refused with what to use instead."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import TrainingArguments

from dynamic_llava.config import is_inside, keys_of
from dynamic_llava.train import conditions, effects, preflight, stage
from dynamic_llava.train.arguments import RANGES, DataArguments, ModelArguments, StageArguments
from dynamic_llava.train.config import load_config

from .test_stage import config_of, shapes  # noqa: F401  a fixture

FIELDS = {field.name: field for group in effects.GROUPS for field in dataclasses.fields(group) if field.init}
OF_TRANSFORMERS = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]


def another(key: str):
    """A value that is not the key's own."""
    known = {"lr_scheduler_type": "linear", "report_to": "tensorboard", "attn_implementation": "eager"}
    known |= {"output_turns": "all", "image_selection": "threshold", "eval_strategy": "epoch", "optim_args": "a=1"}
    known |= {"metric_for_best_model": "loss", "gate_estimator": "exact", "masked_kernel": "blocked", "save_steps": 7}
    known |= {"keep_rate_schedule": "linear", "sparse_training": "pruned", "eval_steps": 3, "logging_steps": 3}
    known |= {"predictor_num_heads": 16, "budget_on": "argmax"}
    known |= {"image_gate_estimator": "exact", "output_gate_estimator": "exact"}
    known |= {"dataloader_multiprocessing_context": "spawn", "eval_file": "held_out.json", "predictor_dim": 32}
    known |= {"activation_checkpointing_kwargs": "{every_n_layers: 2}", "image_keep_rates": "[0.1, 0.2]"}
    known |= {"gradient_checkpointing_kwargs": "{every_n_layers: 2}", "output_keep_rates": "[0.1, 0.2]"}
    default = effects._DEFAULTS.get(key)
    if key in known:
        return known[key]
    if isinstance(default, bool):
        return str(not default).lower()
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2 + 0.15
    kind = str(FIELDS[key].type)
    return "true" if "bool" in kind else "1" if "int" in kind else "other"


def test_every_field_of_transformers_is_known():
    """A field that a new release adds fails here until somebody has seen what it does."""
    assert set(OF_TRANSFORMERS) - effects.WORKS - effects.REFUSED.keys() == set()
    assert not effects.WORKS & effects.REFUSED.keys()


def test_a_field_that_nobody_has_seen_is_refused(monkeypatch):
    monkeypatch.setattr(effects, "WORKS", effects.WORKS - {"weight_decay"})
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 is of a release"):
        effects.check_refused({"weight_decay": 0.1})


@pytest.mark.parametrize("key", sorted(effects.REFUSED))
def test_a_key_without_effect_is_refused_with_its_remedy(shapes, tmp_path, key):  # noqa: F811
    with pytest.raises(ValueError, match=f"{key}=.* has no effect here: .*Leave it out"):
        config_of(shapes, tmp_path, **{key: another(key)})
    # Said or not said, a default is the same.
    if isinstance(default := effects._DEFAULTS.get(key), (bool, int, float)):
        config_of(shapes, tmp_path, **{key: default})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim", "galore_adamw"),
        ("optim", "lomo"),
        ("train_sampling_strategy", "batch_rebalance"),
        ("debug", "underflow_overflow"),
    ],
)
def test_a_value_without_effect_is_refused(shapes, tmp_path, key, value):  # noqa: F811
    with pytest.raises(ValueError, match=f"{key}={value} is not supported"):
        config_of(shapes, tmp_path, **{key: value})


def test_a_token_is_not_printed(shapes, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="hub_token") as error:
        config_of(shapes, tmp_path, hub_token="hf_secret")
    assert "secret" not in str(error.value)


# What the switches of a condition are set to, so that it does not hold.
OFF = {
    "train_decoder": ["train_decoder=false"],
    "attn_implementation": ["attn_implementation=eager"],
    "image_predictor": ["image_predictor=false"],
    "output_predictor": ["output_predictor=false"],
    "output_predictor instruct_predictor image_predictor image_selection": ["output_predictor=false"],
    "image_predictor output_predictor instruct_predictor": ["image_predictor=false", "output_predictor=false"],
    "save_strategy": ["save_strategy=epoch"],
    "logging_strategy": ["logging_strategy=epoch", "logging_steps=500"],
    "eval_strategy eval_on_start": ["eval_file=a.json"],
    "eval_strategy": ["eval_file=a.json", "eval_on_start=true"],
    "deepspeed": ["deepspeed={}"],
    "optim": ["optim=adafactor"],
    "report": ["report=false"],
}
PLAIN = ["base_model: b", "train_file: t.json", "image_folder: i"]


@pytest.mark.parametrize(
    ("condition", "key"), [(c, key) for c in conditions.CONDITIONS for key in c.keys.split()], ids=lambda x: str(x)[:40]
)
def test_a_key_that_needs_another(tmp_path, condition, key):
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(PLAIN))
    switched = [word for word in OFF.get(condition.switches, []) if not word.startswith(f"{key}=")]
    if condition.switches == "deepspeed":
        (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
        switched = [f"deepspeed={tmp_path / 'zero.json'}"]
    with pytest.raises(ValueError, match=f"{key}=.* has no effect here: .* or leave out {key}"):
        load_config(file, [*switched, f"{key}={another(key)}"])


def test_what_the_command_line_switches_off_rests(tmp_path):
    """Keys of the file alone; the record of the run has them no more, and so can be started again."""
    file = tmp_path / "run.yaml"
    file.write_text("\n".join([*PLAIN, "lora_r: 4", "lora_alpha: 8", "learning_rate: 1e-3"]))
    config = load_config(file, ["lora_r=0", f"output_dir={tmp_path / 'run'}"])
    assert "lora_alpha" not in config.values
    config.save(tmp_path / "run")
    load_config(tmp_path / "run" / "train_config.yaml")
    with pytest.raises(ValueError, match="lora_alpha=8 has no effect here"):
        load_config(file, ["lora_r=0", "lora_alpha=8"])


NUMBERS = [
    field.name
    for group in (ModelArguments, DataArguments, StageArguments)
    for field in dataclasses.fields(group)
    if field.init and field.type in (int, float, "int", "float", "int | None", "float | None", int | None, float | None)
]


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_its_bounds(shapes, tmp_path, key):  # noqa: F811
    if key in effects.REFUSED:
        return
    interval = keys_of((ModelArguments, DataArguments, StageArguments), RANGES)[key].range
    for value in ("nan", ".nan", "inf", "-inf", ".inf", "-1e-5", -1, 0, "-0.5", 2, "1e400", "true", "[1, 2]"):
        try:
            inside = is_inside(float(value), interval) and (key != "max_steps" or float(value) != 0)
        except (TypeError, ValueError):
            inside = False
        if inside:
            continue
        with pytest.raises(ValueError, match=key):
            config_of(shapes, tmp_path, **{key: value})


def test_what_works_changes_the_run(shapes, tmp_path):  # noqa: F811
    """What acts far from here: in the embeddings, in the sampler, in the optimizer."""

    def losses(name: str, **values) -> list[float]:
        stage.train(config_of(shapes, tmp_path / name, warmup_steps=0, **values))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "lm_loss" in line]

    runs = [{}, {"neftune_noise_alpha": 5}, {"data_seed": 7}, {"adam_beta1": 0.1, "adam_epsilon": 1e-3}]
    found = [losses(str(number), **values) for number, values in enumerate(runs)]
    assert len(set(map(tuple, found))) == len(runs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": "grokadamw"}, "optim=grokadamw .* cannot be had"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type=warmup_stable_decay"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "{cycles: 2}"}, "cycles"),
        ({"report_to": "wandb"}, "report_to=wandb is not installed"),
        ({"fp16": "true"}, "fp16=true needs a GPU"),
    ],
)
def test_what_is_missing_is_said_before_a_model_is_loaded(shapes, tmp_path, monkeypatch, values, message):  # noqa: F811
    monkeypatch.setattr(stage, "build_model", None)
    with pytest.raises(ValueError, match=message):
        stage.train(config_of(shapes, tmp_path, **values))


@pytest.mark.parametrize("held", [False, True])
def test_a_lock_that_a_dead_build_left(tmp_path, monkeypatch, held):
    folder = tmp_path / "py311_cpu" / "cpu_adam"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(preflight, "PATIENCE", 0.5)
    if held:
        with (folder / "lock").open():
            preflight.check_build_locks()
        return
    with pytest.raises(ValueError, match=rf"rm {folder / 'lock'}"):
        preflight.check_build_locks()
    (folder / "lock").unlink()
    preflight.check_build_locks()


def test_words_of_yaml(tmp_path):
    """`no` and `on` are words, numbers are numbers, in the file and on the command line."""
    file = tmp_path / "run.yaml"
    file.write_text("\n".join([*PLAIN, "save_strategy: no", "learning_rate: 5e-6"]))
    config = load_config(file, ["eval_strategy=no", "logging_strategy=no"])
    assert config.values["learning_rate"] == 5e-6
    strategies = (config.training.save_strategy, config.training.eval_strategy, config.training.logging_strategy)
    assert strategies == ("no", "no", "no")


def test_the_configuration_of_this_command_is_no_file_beside_it(shapes, tmp_path, monkeypatch):  # noqa: F811
    """argparse's helper would read `NAME.args` beside the program."""
    (tmp_path / "train.args").write_text("--learning_rate 5")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train.py")])
    assert config_of(shapes, tmp_path).training.learning_rate != 5
