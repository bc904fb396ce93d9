"""Conversations, datasets and batches: LLaVA's own data and the embedded shapes."""

from .collator import LlavaCollator
from .conversation import CHAT_TEMPLATE, IGNORE_INDEX, IMAGE_TOKEN, Turn, parse_turns, render_conversation
from .dataset import LlavaJsonDataset

__all__ = [
    "CHAT_TEMPLATE",
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "LlavaCollator",
    "LlavaJsonDataset",
    "Turn",
    "parse_turns",
    "render_conversation",
]
