"""Damaged checkpoints of every layout: refused in one line, or loaded as what is stored; see `harness`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import load_adapter, load_checkpoint, load_published
from dynamic_llava.checkpoints.__main__ import main
from dynamic_llava.checkpoints.chat_template import system_prompt_of, writes_space_behind_image
from dynamic_llava.checkpoints.load import load_processor

from .checkpoint_folders import (
    HUGGING_FACE,
    LAYOUTS,
    change_header,
    change_state,
    loaded_state,
    set_trap,
    stored_names,
    stored_state,
    weight_files,
    write_layouts,
)
from .harness import Case, run_cases
from .limits import watched
from .mutators import anything, at, damage_file, mutate_bytes, mutate_value, write_json

# What loading rewrites by itself.
REWRITTEN = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "auto_map"}
MISSING = object()


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> tuple[dict[str, Path], dict[str, dict[str, str]]]:
    folders = write_layouts(tmp_path_factory.mktemp("layouts"))
    return folders, {layout: stored_names(folders[layout]) for layout in LAYOUTS if layout != "lora"}


def test_checkpoints(layouts, tmp_path):
    folders, names = layouts

    def one(case: Case) -> None:
        layout = case.random.choice(LAYOUTS)
        folder = case.copy(folders[layout], "model")
        if layout == "lora":
            _name_the_base(folder)
        case.note(layout)
        must_refuse, changed = _damage(case, layout, folder)
        with watched(case.root):
            model = _use(case, layout, folder)
        if model is not None:
            _check(case, layout, folder, model, names.get(layout, {}), must_refuse, changed)

    run_cases("checkpoints", 60, one, tmp_path)


def _name_the_base(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(folder / "base")}))


def _damage(case: Case, layout: str, folder: Path) -> tuple[bool, tuple[tuple, Any] | None]:
    """Damage a folder; whether loading it must fail, and the path and value of an entry of config.json that changed."""
    rng = case.random
    kind = rng.choice(["json"] * 5 + ["state"] * 3 + ["header", "bytes", "bytes", "trap", "extra"])
    weights = weight_files(folder)
    if kind == "json":
        files = sorted(folder.rglob("*.json"))
        path = rng.choice([path for path in files if path.name != "tokenizer.json"] + [folder / "config.json"] * 3)
        value, place = mutate_value(rng, json.loads(path.read_text()))
        path.write_bytes(write_json(rng, value))
        now = _at(value, place)
        case.note(path.name, place, "is now", "nothing" if now is MISSING else now)
        return False, (place, now) if path == folder / "config.json" else None
    if kind == "state":
        what, key = change_state(rng, rng.choice(weights))
        case.note("weights:", what, key)
        return what != "cast", None
    if kind == "header" and weights[0].suffix == ".safetensors":
        path = rng.choice(weights)
        change_header(rng, path, mutate_value)
        case.note("header of", path.name)
    elif kind in ("bytes", "header"):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        case.note(damage_file(rng, rng.choice(files + weights * 2)))
    elif kind == "trap":
        case.note("trap:", set_trap(rng, folder, case.root.parent / "executed"))
    else:
        name = rng.choice(
            ["model.safetensors.index.json", "pytorch_model.bin", "model.safetensors", "adapter_config.json"]
        )
        if not (folder / name).exists():
            (folder / name).write_bytes(rng.choice([b"", mutate_bytes(rng, b"{}"), write_json(rng, anything(rng))]))
            case.note("extra", name)
    return False, None


def _use(case: Case, layout: str, folder: Path) -> torch.nn.Module | None:
    """Do one of the things that a user does; the model where one was loaded."""
    rng = case.random
    action = rng.choice(["load"] * 4 + ["inspect", "convert", "convert", "processor", "own", "config"])
    case.note(action)
    if action == "load":
        return case.call(load_checkpoint, folder)
    if action == "inspect":
        case.command(main, "inspect", folder, *rng.choice([(), ("--json",)]))
    elif action == "processor":
        processor = case.call(load_processor, folder)
        if processor is not None:
            case.call(_ask, processor)
    elif action == "convert":
        target = case.output / "made"
        words = ("convert", folder, target, "--to", rng.choice(["ours", "published", "llava-hf"]))
        status, _ = case.command(main, *(("merge", folder, target) if layout == "lora" else words))
        case.check(status == 0 or not list(case.output.iterdir()), "left over", list(case.output.iterdir()))
        if status == 0 and words[-1] != "llava-hf":
            return load_checkpoint(target)
    elif action == "own":
        own = {"lora": load_adapter}.get(layout, load_published)
        own = DynamicLlavaForConditionalGeneration.from_pretrained if layout in HUGGING_FACE else own
        return _as_stock(case, own, LlavaForConditionalGeneration.from_pretrained, folder)
    else:
        _as_stock(
            case, DynamicLlavaConfig.from_pretrained, LlavaForConditionalGeneration.config_class.from_pretrained, folder
        )
    return None


def _ask(processor: Any) -> None:
    """What is asked of a processor here; its own methods are transformers'."""
    system_prompt_of(processor)
    writes_space_behind_image(processor)


def _as_stock(case: Case, ours: Any, stock: Any, folder: Path) -> Any:
    """Ours, which may fail as stock transformers does."""
    try:
        return case.call(ours, folder)
    except Exception as error:
        try:
            stock(folder)
        except Exception as theirs:
            if type(theirs) is type(error):
                case.note("as stock:", type(error).__name__)
                return None
        raise


def _check(case, layout, folder, model, names, must_refuse, changed) -> None:
    """What was loaded is what is stored, or was spoken of."""
    state = loaded_state(model)
    wrong = [key for key, value in state.items() if not torch.isfinite(value).all()]
    case.check(not wrong, "not finite", wrong[:3])
    told = " ".join(case.warnings)
    case.check(not must_refuse or "new" in told or (layout == "lora" and "base" in told), "taken", *case.notes)
    stored = stored_state(folder) if layout != "lora" else {}
    case.check(stored is not None, "loaded what cannot be read")
    lost = [name for name in names if name not in stored]
    case.check(not lost or "new" in told, "lost", lost[:3])
    for name, value in stored.items():
        if name in names and names[name] in state:
            own = state[names[name]]
            same = own.shape == value.shape and torch.equal(own, value.to(own.dtype))
            case.check(same or names[name].split(".")[2] in told, "another weight", name)
    if changed is not None and layout in HUGGING_FACE:
        place, value = changed
        entry = model.config
        for key in place:
            entry = getattr(entry, str(key), MISSING) if not isinstance(entry, dict) else entry.get(key, MISSING)
        if place and place[-1] not in REWRITTEN and isinstance(value, (int, float, str)) and entry is not MISSING:
            case.check(entry == value, "another setting", place, value, entry)


def _at(value: Any, place: tuple) -> Any:
    try:
        return at(value, place)
    except (KeyError, IndexError, TypeError):
        return MISSING
