"""Scores of answers, on plain text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def normalize_answer(text: str) -> str:
    """Lower case, white space collapsed, without a final full stop."""
    return " ".join(text.lower().split()).rstrip(".").strip()


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are equal after `normalize_answer`, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(reference))


def mentioned_objects(text: str, colours: Sequence[str], shapes: Sequence[str]) -> Counter[tuple[str, str]]:
    """How often each colour with a shape right behind it ("red square") is named in `text`."""
    pattern = rf"\b({'|'.join(map(re.escape, colours))})\s+({'|'.join(map(re.escape, shapes))})\b"
    return Counter(re.findall(pattern, text.lower()))


def multiset_f1(predicted: Counter, reference: Counter) -> float:
    """Harmonic mean of precision and recall over counted items; 1 where both are empty, 0 where one is."""
    if not predicted and not reference:
        return 1.0
    return 2 * (predicted & reference).total() / (predicted.total() + reference.total())
