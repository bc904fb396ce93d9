"""Malformed configurations and command lines: refused in one line, or resolved to what they say; see `harness`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

from dynamic_llava import DynamicLlavaConfig, SparsityConfig
from dynamic_llava.data.shapes import build_shapes
from dynamic_llava.data.shapes.__main__ import main as draw_shapes
from dynamic_llava.efficiency.__main__ import main as efficiency
from dynamic_llava.train.__main__ import main as train
from dynamic_llava.train.config import known_keys, read_values, resolve
from tools.tiny_base.config import load_config as load_tiny_base

from ..tiny import tiny_config
from .harness import Case, run_cases
from .limits import watched
from .mutators import anything, at, damage_file, mutate_value, places, write_json, write_yaml

ROOT = Path(__file__).parents[2]
PRESETS = sorted(path for path in (ROOT / "configs/train").glob("*.yaml") if path.name != "tiny_base.yaml")
ENGINES = sorted((ROOT / "configs/deepspeed").glob("*.json"))
# Resolved from several keys, or into another form.
DERIVED = {"gradient_accumulation_steps", "deepspeed", "report_to", "use_cpu", "disable_tqdm", "output_dir", "debug"}
DERIVED |= {"shapes", "run_name", "dataloader_pin_memory", "lr_scheduler_kwargs", "warmup_steps", "local_rank"}
NUMBERS = ("0", "-1", "nan", "inf", "1e9", "", "x", "a\0b", "9" * 30, "0.5", " ", "é", "1,2", "True", "[1", "2")
FLAGS = {
    "flops": ("--prompt", "--images", "--output-length", "--image-keep-rate", "--output-keep-rate", "--dtype-bytes"),
    "measure": ("--batch-sizes", "--modes", "--repeats", "--device", "--dtype", "--attention", "--threads", "--seed"),
}
SHAPE_FLAGS = ("--shape", "--hidden", "--layers", "--heads", "--kv-heads", "--vocab", "--image-size", "--sparse-layer")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return build_shapes(tmp_path_factory.mktemp("shapes") / "d", train_pictures=4, val_pictures=1, test_pictures=1)


def test_configurations(shapes, tmp_path):
    targets: tuple[Callable[[Case], None], ...] = (
        lambda case: _resolve(case, shapes),
        lambda case: _resolve(case, shapes),
        lambda case: _dry_run(case, shapes),
        _sparsity,
        _model,
        _efficiency,
        _tiny_base,
        _draw,
    )

    def one(case: Case) -> None:
        case.random.choice(targets)(case)
        AcceleratorState._reset_state(reset_partial_state=True)

    run_cases("configurations", 200, one, tmp_path)


def _values(case: Case, shapes: Path) -> dict[str, Any]:
    """A preset on data that is there, with a few of its keys, or of all there are, changed."""
    rng = case.random
    values: Any = yaml.safe_load(rng.choice(PRESETS).read_text())
    values |= {"base_model": str(ROOT / "assets/tiny-llava"), "output_dir": str(case.output / "run")}
    values |= {"train_file": str(shapes / "train.json"), "image_folder": str(shapes)}
    for name in ("shapes", "report", "report_questions", "report_descriptions", "deepspeed", "quantize"):
        values.pop(name, None)
    values |= {"predictor_dim": 64, "predictor_num_heads": 4, "predictor_ffn_dim": 128, "bf16": False}
    if rng.random() < 0.3:
        engine: Any = json.loads(rng.choice(ENGINES).read_text())
        if rng.random() < 0.8:
            engine, place = mutate_value(rng, engine)
            case.note("engine", place)
        if rng.random() < 0.3:
            return {**values, "deepspeed": engine}
        path = case.root / "engine.json"
        path.write_bytes(write_json(rng, engine))
        if rng.random() < 0.2:
            case.note(damage_file(rng, path))
        values["deepspeed"] = str(path)
    for _ in range(rng.choice([0, 1, 1, 2])):
        if rng.random() < 0.5:
            values, place = mutate_value(rng, values)
            case.note(place)
        elif isinstance(values, dict):
            key = rng.choice(known_keys())
            values[key] = anything(rng)
            case.note(key, values[key])
    return values


def _file(case: Case, values: Any) -> Path:
    path = case.root / "train.yaml"
    path.write_bytes(write_yaml(case.random, values))
    if case.random.random() < 0.1:
        case.note(damage_file(case.random, path))
    return path


def _overrides(case: Case) -> list[str]:
    rng = case.random
    found = []
    for _ in range(rng.choice([0, 0, 1, 2])):
        key = rng.choice([*known_keys(), "nobody", "", "--seed", "seed ", "a=b"])
        value = rng.choice(
            [*NUMBERS, str(anything(rng)), "[0.1, 0.5]", "{a: 1}", "!!python/name:os.system", "null", "no"]
        )
        found.append(rng.choice([f"{key}={value}"] * 9 + [key]))
        case.note(found[-1])
    return found


def _resolve(case: Case, shapes: Path) -> None:
    """What is accepted has the values that were given."""
    path, overrides = _file(case, _values(case, shapes)), _overrides(case)
    with watched(case.root):
        given = case.call(read_values, ["--config", path, *overrides])
        config = None if given is None else case.call(resolve, given)
    if config is None:
        return
    groups = (config.model, config.sparsity, config.data, config.training)
    resolved = {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}
    for key, value in given.values.items():
        if key in resolved and key not in DERIVED and value is not None and not isinstance(value, list):
            case.check(_same(value, resolved[key]), "another setting", key, value, resolved[key])


def _same(given: Any, found: Any) -> bool:
    """Whether a value of a file, in whatever spelling, is the resolved one."""
    if isinstance(found, Enum):
        found = found.value
    if isinstance(found, bool):
        return str(given).lower() in (("true", "yes", "1", "y", "t") if found else ("false", "no", "0", "n", "f"))
    if isinstance(found, (int, float)):
        try:
            return not isinstance(given, bool) and float(given) == float(found)
        except (TypeError, ValueError, OverflowError):
            return False
    if isinstance(found, list):
        return len(found) == 1 and _same(given, found[0])
    if isinstance(found, dict):
        return given == found or json.loads(given) == found
    return str(given) == str(found)


def _dry_run(case: Case, shapes: Path) -> None:
    path, overrides = _file(case, _values(case, shapes)), _overrides(case)
    more = case.random.choice([(), (), ("--ranks", case.random.choice(NUMBERS)), ("--launcher", "")])
    with watched(case.root):
        case.command(train, "--config", path, "--dry-run", *more, *overrides)
    case.check(not list(case.output.iterdir()), "a dry run wrote", list(case.output.iterdir()))


def _sparsity(case: Case) -> None:
    values: Any = dataclasses.asdict(SparsityConfig())
    for _ in range(case.random.choice([1, 1, 2])):
        values, place = mutate_value(case.random, values)
        case.note(place, values)
    config = case.call(SparsityConfig.from_dict, values)
    for key, value in values.items() if config is not None else ():
        found = getattr(config, key)
        case.check(found == value and type(found) in (type(value), float), "another setting", key, value, found)


def _model(case: Case) -> None:
    """The configuration of a model; stock transformers' own checks need no twin."""
    values, place = mutate_value(case.random, json.loads(json.dumps(tiny_config().to_dict())))
    case.note(place, _at(values, place))
    config = case.call(DynamicLlavaConfig.from_dict, values)
    if config is None or not place:
        return
    entry, value = config, _at(values, place)
    for key in place:
        entry = entry.get(key) if isinstance(entry, dict) else getattr(entry, str(key), None)
    if isinstance(value, (int, float, str)) and place[-1] not in ("model_type", "dtype", "transformers_version"):
        case.check(
            entry is None or repr(entry) == repr(value) or entry == value, "another setting", place, value, entry
        )


def _at(value: Any, place: tuple) -> Any:
    return at(value, place) if place in places(value) else None


def _efficiency(case: Case) -> None:
    rng = case.random
    command = rng.choice(["flops", "flops", "flops", "measure"])
    words: list[Any] = [command]
    if rng.random() < 0.4:
        values, place = mutate_value(rng, json.loads(json.dumps(tiny_config().to_dict())))
        (case.root / "model").mkdir()
        path = case.root / "model" / "config.json"
        path.write_bytes(write_json(rng, values))
        case.note(place)
        if rng.random() < 0.1:
            case.note(damage_file(rng, path))
        words += ["--model", case.root / "model"]
    else:
        words += ["--shape", "tiny"]
    for _ in range(rng.choice([1, 2])):
        words.append(f"{rng.choice((*FLAGS[command], *SHAPE_FLAGS))}={rng.choice(NUMBERS)}")
    if command == "measure":
        # Whatever else is right, this is not: nothing is measured.
        words += ["--output-lengths", "0"]
    with watched(case.root):
        status, text = case.command(efficiency, *words, *(["--json"] if command == "flops" else []))
    case.check(command == "flops" or status != 0, "measured nothing")
    if status == 0:
        report = json.loads(text)
        numbers = [at(report, place) for place in places(report)]
        numbers = [value for value in numbers if isinstance(value, (int, float))]
        case.check(all(0 <= value < 1e300 for value in numbers), "no number", text)


def _tiny_base(case: Case) -> None:
    values, place = mutate_value(case.random, yaml.safe_load((ROOT / "tools/tiny_base/tiny_base.yaml").read_text()))
    case.note(place, _at(values, place))
    path = _file(case, values)
    with watched(case.root):
        case.call(load_tiny_base, path)


def _draw(case: Case) -> None:
    rng = case.random
    flags = ("--seed", "--train-pictures", "--val-pictures", "--test-pictures", "--questions-per-picture")
    words = [word for flag in flags for word in (flag, "1")]
    for _ in range(rng.choice([1, 2])):
        value = rng.choice([value for value in NUMBERS if value not in ("1e9",)])
        words += [rng.choice(flags), value]
    output = rng.choice([case.output / "d"] * 3 + ["", "a\0b", "/dev/null/x", "/proc/x"])
    with watched(case.root):
        case.command(draw_shapes, *words, "--output", output)
