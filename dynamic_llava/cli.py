"""What the command lines share: a parser whose errors are one line, and types of numbers; stdlib alone."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from .values import is_finite

#: More than any count, size or limit that makes sense; still a number for every library below.
MOST = 2**31 - 1
MOST_SEEDS = 2**32 - 1


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `ValueError` where the stock one prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): (?=must )", r"\1 ", message)
        raise ValueError(f"{message.rstrip('.')}. See {self.prog} --help.")


def whole(least: int = 1, most: int = MOST) -> Callable[[Any], int]:
    """A type of arguments: whole numbers from `least` to `most`, as text or as YAML gives them."""

    def parse(value: Any) -> int:
        number = _number(value, r"[-+]?[0-9]{1,30}", int)
        if number is None or number != int(number) or not least <= number <= most:
            bounds = f"at least {least}" if number is None or number < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number of {bounds}, got {_shown(value)}")
        return int(number)

    return parse


def real(least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> Callable[[Any], float]:
    """A type of arguments: finite numbers from `least` to `most`, and above `above`."""

    def parse(value: Any) -> float:
        number = _number(value, r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", float)
        if number is None or not (least <= number <= most and number > above):
            low, open_ = (least, "[") if least > above else (above, "(")
            raise argparse.ArgumentTypeError(
                f"must be a number in {open_}{low:g}, {most:g}{']' if most < math.inf else ')'}, got {_shown(value)}"
            )
        return float(number)

    return parse


#: Fractions that are kept.
rate = real(above=0, most=1)
seed = whole(0, MOST_SEEDS)


def listed(kind: Callable[[Any], Any]) -> Callable[[str], tuple]:
    """A type of arguments: several of `kind`, at least one, with commas between them."""

    def parse(text: str) -> tuple:
        words = [word.strip() for word in str(text).split(",")]
        if not all(words):
            raise argparse.ArgumentTypeError(f"must be values such as 1,8, got {_shown(text)}")
        return tuple(kind(word) for word in words)

    return parse


def text(value: Any) -> str:
    """A type of arguments: text that is not empty and can name a file."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise argparse.ArgumentTypeError(f"must be text that is not empty, got {_shown(value)}")
    return value


def _number(value: Any, pattern: str, kind: Callable[[str], float]) -> float | None:
    """`value` as a finite number, None where it is none; a bool is none."""
    if isinstance(value, str):
        value = kind(value) if re.fullmatch(pattern, value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if is_finite(value) else None


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
