"""Long descriptions of a scene in reading order.

The request fixes the wording, the picture fixes the content, so that a good model has little left to guess. Most of the
words are filler on purpose: a reader who kept only the position, size, colour and shape words would lose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .questions import NUMBERS, with_article
from .scene import COLUMNS, ROWS, Scene


@dataclass(frozen=True)
class _Style:
    request: str
    opening: str
    item: str
    closing: str


STYLES = (
    _Style(
        "Describe the picture in detail.",
        "The picture shows a pale surface on which there are {count} objects in all.",
        "In the {row} {column} part of the picture there is a {size} object, and this object is {colour} {shape}.",
        "Apart from these objects there is nothing else to be seen but some thin lines and a few dots.",
    ),
    _Style(
        "What can you see in this picture?",
        "As far as I can see, there are {count} objects in this picture.",
        "There is one in the {row} {column} part of it, which is of a {size} size "
        "and has the form of {colour} {shape}.",
        "All of the rest is just a pale surface with some thin lines and a few dots on it.",
    ),
    _Style(
        "Please give a full description of the image.",
        "This is an image with a pale background and with {count} objects that stand out from it.",
        "If we look at the {row} {column} part of the image, we find that there is a {size} {plain} {shape} in it.",
        "The background of the image has some thin lines and a few dots, and there is nothing else to add.",
    ),
)


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Returns a request and the description that answers it.

    Args:
        scene: the scene.
        rng: picks the wording.
    """
    style = STYLES[int(rng.integers(len(STYLES)))]
    sentences = [style.opening.format(count=NUMBERS[len(scene.objects)])]
    for item in scene.objects:
        sentences.append(
            style.item.format(
                row=ROWS[item.row],
                column=COLUMNS[item.column],
                size=item.size,
                colour=with_article(item.colour),
                plain=item.colour,
                shape=item.shape,
            )
        )
    return style.request, " ".join([*sentences, style.closing])
