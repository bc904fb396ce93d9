"""Conversations, datasets and batches: LLaVA's own data and the embedded shapes."""

from ..chat_template import IMAGE_TOKEN
from ..token_spans import IGNORE_INDEX
from .collator import LlavaCollator
from .conversation import Turn, parse_turns, render_conversation
from .dataset import LlavaJsonDataset

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "LlavaCollator",
    "LlavaJsonDataset",
    "Turn",
    "parse_turns",
    "render_conversation",
]
