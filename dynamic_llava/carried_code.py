"""The code that a checkpoint carries, so that `trust_remote_code=True` loads it where this package is not installed.

What is carried is what `modeling_dynamic_llava` imports, module by module, as transformers finds it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .reading import read_json_object

PACKAGE = "dynamic_llava"
MODELING = "modeling_dynamic_llava"
_MODEL = f"{MODELING}.DynamicLlavaForConditionalGeneration"
# Which of our classes each Auto class takes.
AUTO_MAP = {
    "AutoConfig": "configuration_dynamic_llava.DynamicLlavaConfig",
    "AutoModel": f"{MODELING}.DynamicLlavaModel",
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
}


def installed_config(config: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The installed package's class of that name, after registering its models; `config` itself where there is none.

    Where `config` came with a checkpoint, transformers then takes the installed models too.
    """
    if config.__module__.partition(".")[0] != TRANSFORMERS_DYNAMIC_MODULE_NAME:
        return config
    try:
        importlib.import_module(f"{PACKAGE}.{MODELING}")
        return getattr(importlib.import_module(f"{PACKAGE}.{config.__module__.rpartition('.')[2]}"), config.__name__)
    except (ImportError, AttributeError):
        return config


def note_code(config: PretrainedConfig, folder: str | Path) -> None:
    """Let `config`, about to be saved in `folder`, name the code that lies there, and no other."""
    named = config.__dict__.pop("auto_map", None) or {}
    if config._auto_class is None:
        return
    # What a subclass has named stays; ours go by the class that they are, whatever wraps it.
    pairs = [*named.items(), *AUTO_MAP.items()]
    found = {auto: name for auto, name in pairs if (Path(folder) / f"{str(name).partition('.')[0]}.py").exists()}
    if found:
        config.auto_map = found


def add_code(folder: Path, model: type[PreTrainedModel]) -> None:
    """Put the code of `model` beside the `config.json` of a folder, which names it then."""
    custom_object_save(model, folder)
    path = folder / "config.json"
    values = {**read_json_object(path), "auto_map": AUTO_MAP}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


@contextmanager
def without_code(config: PretrainedConfig, model: PreTrainedModel | None = None) -> Iterator[None]:
    """The configuration, and the model, that are saved inside carry no code and name none."""
    config._auto_class = None  # type: ignore[misc]
    if model is not None:
        # transformers asks the class, which others may be saving meanwhile.
        model.is_remote_code = lambda: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        config.__dict__.pop("_auto_class", None)
        if model is not None:
            model.__dict__.pop("is_remote_code", None)
