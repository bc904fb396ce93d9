"""Packages that only some commands need, and what installs them; stdlib alone."""

from __future__ import annotations

from importlib.util import find_spec

# Module -> extra of this project that brings it, or the package where none does.
EXTRAS = {
    "accelerate": "accelerate",
    "bitsandbytes": "dynamic-llava[quant]",
    "datasets": "dynamic-llava[eval]",
    "deepspeed": "dynamic-llava[train]",
    "fastapi": "dynamic-llava[serve]",
    "flash_attn": "dynamic-llava[flash]",
    "lmms_eval": "dynamic-llava[eval]",
    "matplotlib": "dynamic-llava[viz]",
    "nltk": "dynamic-llava[meteor]",
    "openai": "dynamic-llava[serve]",
    "peft": "dynamic-llava[train]",
    "pyarrow": "datasets",
    "pydantic": "dynamic-llava[serve]",
    "pycocoevalcap": "dynamic-llava[meteor]",
    "sentencepiece": "sentencepiece",
    "tenacity": "dynamic-llava[eval]",
    "tensorboard": "dynamic-llava[train]",
    "uvicorn": "dynamic-llava[serve]",
    "wandb": "wandb",
}


def is_installed(name: str) -> bool:
    """Whether the module `name` can be imported, without importing it."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        # A module that stands for one that is not there, as tests and stubs put into sys.modules.
        return False


def require_package(name: str, purpose: str) -> None:
    """Raise unless the module `name` is installed; to be called before anything that takes long.

    Args:
        name: module, one of `EXTRAS`.
        purpose: what needs it, such as "METEOR" or "quantize=4bit": the start of the message.

    Raises:
        ImportError: it is not there, with the command that installs it.
    """
    if not is_installed(name):
        raise ImportError(f"{purpose} needs the package {name}, which is missing; pip install '{EXTRAS[name]}'.")
