"""Short questions about a scene, with one-word answers balanced within each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .scene import COLOURS, COLUMNS, ROWS, SHAPES, Scene, SceneObject

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
RELATIONS = {"left": ("x", -1), "right": ("x", 1), "up": ("y", -1), "down": ("y", 1)}

# Objects that differ by less than this along an axis are never asked to be compared on it.
RELATION_MARGIN = 16


@dataclass(frozen=True)
class Question:
    """A question about one picture, its kind and its answer."""

    kind: str
    text: str
    answer: str


def _pick(rng: np.random.Generator, options: list) -> object:
    return options[int(rng.integers(len(options)))]


def _shapes(scene: Scene) -> list[str]:
    return [o.shape for o in scene.objects]


def ask_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Asks for the colour of a shape that occurs once; None when every shape repeats."""
    shapes = _shapes(scene)
    unique = [o for o in scene.objects if shapes.count(o.shape) == 1]
    if not unique:
        return None
    item = _pick(rng, unique)
    return Question("colour", f"What colour is the {item.shape}?", item.colour)


def ask_shape(scene: Scene, rng: np.random.Generator) -> Question:
    """Asks for the shape of the object of a colour; colours are distinct within a picture."""
    item = _pick(rng, list(scene.objects))
    return Question("shape", f"What shape is the {item.colour} object?", item.shape)


def ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    """Asks how many objects, or objects of one shape, there are."""
    if rng.random() < 0.3:
        return Question("count", "How many objects are there?", NUMBERS[len(scene.objects)])
    present = sorted(set(_shapes(scene)))
    absent = sorted(set(SHAPES) - set(present))
    repeated = [s for s in present if _shapes(scene).count(s) > 1]
    draw = rng.random()
    if absent and draw < 0.25:
        shape = _pick(rng, absent)
    elif repeated and draw < 0.75:
        shape = _pick(rng, repeated)
    else:
        shape = _pick(rng, present)
    return Question("count", f"How many {PLURALS[shape]} are there?", NUMBERS[_shapes(scene).count(shape)])


def ask_existence(scene: Scene, rng: np.random.Generator) -> Question:
    """Asks whether an object is there; most "no" cases have the colour or the shape, but not together."""
    if rng.random() < 0.5:
        item = _pick(rng, list(scene.objects))
        return Question("existence", f"Is there {with_article(item.colour)} {item.shape}?", "yes")
    colours = [o.colour for o in scene.objects]
    absent_colours = [c for c in COLOURS if c not in colours]
    draw = rng.random()
    if draw < 0.6:
        item = _pick(rng, list(scene.objects))
        colour, shape = item.colour, _pick(rng, [s for s in SHAPES if s != item.shape])
    elif draw < 0.9:
        colour, shape = _pick(rng, absent_colours), _pick(rng, _shapes(scene))
    else:
        colour, shape = _pick(rng, absent_colours), _pick(rng, list(SHAPES))
    return Question("existence", f"Is there {with_article(colour)} {shape}?", "no")


def ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Asks which of two objects is further to a side; None when no pair is clearly apart along the drawn axis.

    The answer is a colour, not yes or no: whether "a is left of b" holds depends on both positions and on the word at
    once, and none of them alone says anything about the answer, so that a small decoder finds no way to begin.
    """
    relation = _pick(rng, list(RELATIONS))
    axis, sign = RELATIONS[relation]
    pairs = [
        (a, b)
        for a in scene.objects
        for b in scene.objects
        if a is not b and abs(getattr(a, axis) - getattr(b, axis)) >= RELATION_MARGIN
    ]
    if not pairs:
        return None
    a, b = _pick(rng, pairs)
    winner = max(a, b, key=lambda item: sign * getattr(item, axis))
    return Question("relation", f"Which is further {relation}, the {_label(a)} or the {_label(b)}?", winner.colour)


def ask_position(scene: Scene, rng: np.random.Generator) -> Question:
    """Asks for the row or the column of an object: a lesson on the way to relations, not one of `KINDS`."""
    item = _pick(rng, list(scene.objects))
    if rng.random() < 0.5:
        return Question("position", f"Is the {_label(item)} left, centre or right?", COLUMNS[item.column])
    return Question("position", f"Is the {_label(item)} upper, middle or lower?", ROWS[item.row])


def with_article(word: str) -> str:
    """Returns the word with "a" or "an" in front."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _label(item: SceneObject) -> str:
    return f"{item.colour} {item.shape}"


ASKERS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "existence": ask_existence,
    "relation": ask_relation,
}
KINDS = tuple(ASKERS)

# What the embedded data asks. Relations are part of the tiny base's lessons, but it answers them no better than chance
# (assets/tiny-llava/README.md), so that they would measure nothing.
EMBEDDED_KINDS = ("colour", "shape", "count", "existence")


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Returns one question of `kind`, or None when the scene does not allow it.

    Args:
        scene: the scene.
        kind: one of `KINDS`.
        rng: source of all randomness.
    """
    if kind not in ASKERS:
        raise ValueError(f"unknown question kind {kind!r}; choose one of {', '.join(KINDS)}")
    return ASKERS[kind](scene, rng)


def ask_many(scene: Scene, count: int, rng: np.random.Generator, kinds: Sequence[str] = KINDS) -> list[Question]:
    """Returns up to `count` different questions, the kinds in turn from a random start."""
    questions: dict[str, Question] = {}
    order = rng.permutation(len(kinds))
    for attempt in range(count * 4):
        if len(questions) == count:
            break
        question = ask(scene, kinds[order[attempt % len(kinds)]], rng)
        if question is not None:
            questions.setdefault(question.text, question)
    picked = list(questions.values())
    return [picked[i] for i in rng.permutation(len(picked))]
