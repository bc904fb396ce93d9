"""Checkpoints of LLaVA and Dynamic-LLaVA in every layout that people have."""

from .adapters import load_adapter, load_checkpoint, save_adapter
from .load import load_processor, load_published

__all__ = ["load_adapter", "load_checkpoint", "load_processor", "load_published", "save_adapter"]
