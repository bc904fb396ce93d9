"""What the task files of this folder name by `!function`."""

from dynamic_llava.eval.conversations import ConversationTask

__all__ = ["ConversationTask"]
