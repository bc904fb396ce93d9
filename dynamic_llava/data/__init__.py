"""Conversations, datasets and batches: LLaVA's own data and the embedded shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from ..checkpoints.chat_template import IMAGE_TOKEN
    from ..token_masks import IGNORE_INDEX
    from .collator import LlavaCollator
    from .conversation import Turn, parse_turns, render_conversation
    from .dataset import ConversationDataset, LlavaJsonDataset
    from .lengths import LengthGroupedSampler
    from .mixture import MixtureDataset
    from .opening import open_picture
    from .sources import open_dataset

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "ConversationDataset",
    "LengthGroupedSampler",
    "LlavaCollator",
    "LlavaJsonDataset",
    "MixtureDataset",
    "Turn",
    "open_dataset",
    "open_picture",
    "parse_turns",
    "render_conversation",
]

__getattr__ = lazy_names(
    __name__,
    {
        "IGNORE_INDEX": ".token_masks",
        "IMAGE_TOKEN": ".checkpoints.chat_template",
        "ConversationDataset": "dataset",
        "LengthGroupedSampler": "lengths",
        "LlavaCollator": "collator",
        "LlavaJsonDataset": "dataset",
        "MixtureDataset": "mixture",
        "Turn": "conversation",
        "open_dataset": "sources",
        "open_picture": "opening",
        "parse_turns": "conversation",
        "render_conversation": "conversation",
    },
)
