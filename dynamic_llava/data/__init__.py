"""Conversations, datasets and batches: LLaVA's own data and the embedded shapes."""

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
