"""Every way in which a checkpoint is read, for tests of what all of them must say alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import load_adapter, load_checkpoint, load_published
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.checkpoints.inspect import inspect_checkpoint
from dynamic_llava.checkpoints.merge import merge_adapter

LAYOUTS = ("ours", "published")


def doors(layout: str, target: Path) -> dict[str, Callable[[Path], object]]:
    """What reads a folder of `layout` (`ours`, `published` or `lora`), by name; conversions write to `target`."""
    common = {
        "load_checkpoint": load_checkpoint,
        "inspect": inspect_checkpoint,
        "convert": lambda folder: convert(folder, target, "ours", say=lambda line: None, overwrite=True),
    }
    own = {
        "ours": {"from_pretrained": DynamicLlavaForConditionalGeneration.from_pretrained},
        "published": {"load_published": load_published},
        "lora": {"load_adapter": load_adapter, "merge": lambda folder: merge_adapter(folder, target, overwrite=True)},
    }
    return common | own[layout]


def answers(layout: str, folder: Path, target: Path) -> dict[str, str]:
    """What each door says of a folder: `loaded`, or the text of its ValueError or FileNotFoundError."""
    said = {}
    for name, door in doors(layout, target).items():
        try:
            door(folder)
            said[name] = "loaded"
        except (ValueError, FileNotFoundError) as error:
            said[name] = str(error)
    return said


def change_json(path: Path, *keys: str, value) -> None:
    """Set one value of a JSON file; `value` of `...` removes it."""
    whole = json.loads(path.read_text())
    place = whole
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        place.pop(keys[-1])
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(whole))
