from collections import Counter

import pytest

from dynamic_llava.eval.metrics import exact_match, mentioned_objects, multiset_f1, normalize_answer

COLOURS, SHAPES = ("red", "blue"), ("circle", "square")


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [("Red.", "red", 1.0), ("  two\n", "two", 1.0), ("red circle", "red", 0.0), ("", "red", 0.0)],
)
def test_exact_match(prediction, reference, expected):
    assert exact_match(prediction, reference) == expected


def test_normalize_answer_collapses_white_space():
    assert normalize_answer("  A  Red\tcircle. ") == "a red circle"


def test_mentioned_objects_counts_pairs():
    text = "A red circle, a Blue square and another red circle; a bluecircle, a red and blue thing."
    assert mentioned_objects(text, COLOURS, SHAPES) == {("red", "circle"): 2, ("blue", "square"): 1}


def test_multiset_f1_by_hand():
    reference = Counter({("red", "circle"): 2, ("blue", "square"): 1})
    # One of the two red circles found, nothing wrong: precision 1, recall 1/3, F1 1/2.
    assert multiset_f1(Counter({("red", "circle"): 1}), reference) == 0.5
    # Two of four named are right, two of three found: precision 1/2, recall 2/3, F1 4/7.
    named = Counter({("red", "circle"): 1, ("blue", "square"): 1, ("red", "square"): 2})
    assert multiset_f1(named, reference) == pytest.approx(4 / 7)
    assert multiset_f1(Counter(), reference) == 0.0
    assert multiset_f1(Counter(), Counter()) == 1.0
