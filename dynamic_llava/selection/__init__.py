"""Rivals of the learned predictors on the same decoder, one file each; importing registers them by name."""

from ..selection import random

__all__ = ["random"]
