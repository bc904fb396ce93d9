"""The keys of a command, which are the fields of its dataclasses: types, ranges, words of help."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..files import parse_yaml
from ..values import is_finite

#: More than any count, size or limit that makes sense; still a number for every library below.
MOST = 2**31 - 1


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: of the field.
        kinds: types of its values, lists and None left out.
        default: `MISSING` where it must be given.
        help: one sentence.
        range: interval of its numbers, such as `[1, inf)`; a round bracket leaves the end out.
        choices: words that it takes; empty where it takes any.
        takes_one, takes_list: whether a single value, or a list, is what its type says.
        commas: whether a list may be written as `1,8`.
        positional: whether it may stand on the command line without its name.
    """

    name: str
    kinds: tuple[Any, ...]
    default: Any
    help: str
    range: str | None
    choices: tuple[str, ...] = ()
    takes_one: bool = True
    takes_list: bool = False
    commas: bool = False
    positional: bool = False

    @property
    def flag(self) -> str:
        """`batch_size` as `--batch-size`."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def is_switch(self) -> bool:
        """Whether it is true or false and nothing else."""
        return self.kinds == (bool,) and not self.takes_list

    def takes_number(self) -> bool:
        """Whether numbers are among its values."""
        return int in self.kinds or float in self.kinds

    def checked(self, value: Any, name: str) -> Any:
        """`value` in the type and the range of the key.

        Args:
            value: as YAML gives it.
            name: what messages call the key.

        Raises:
            ValueError: another type, out of range, or none of the choices.
        """
        if self.commas and isinstance(value, str):
            value = [word.strip() for word in value.split(",")]
            if not all(value):
                raise ValueError(f"{name} must be values such as a,b, got {shown(','.join(value))}.")
        if isinstance(value, (list, tuple)):
            if not self.takes_list:
                raise ValueError(f"{name} takes one value, got the list {shown(value)}.")
            if not value:
                raise ValueError(f"{name} takes one value or several, got an empty list.")
            return [self._one(item, name) for item in value]
        if isinstance(value, dict):
            if dict not in self.kinds and self.kinds:
                raise ValueError(f"{name} takes a word or a number, got the mapping {shown(value)}.")
            return value
        value = self._one(value, name)
        return value if self.takes_one else [value]

    def _one(self, value: Any, name: str) -> Any:
        if not self.kinds or (isinstance(value, bool) and bool in self.kinds):
            return value
        if self.takes_number():
            number = _number(value)
            if number is not None:
                return self._in_range(number, value, name)
        # Words of transformers are enumerations there.
        if isinstance(value, str) and any(kind not in (bool, int, float, dict) for kind in self.kinds):
            return self._text(value, name)
        raise ValueError(f"{name} must be {self._wanted()}, got {shown(value)}{_quoting(value, self.kinds)}.")

    def _in_range(self, number: float, value: Any, name: str) -> float:
        whole, interval = float not in self.kinds, self.range or "(-inf, inf)"
        if not is_finite(number) or (whole and number != int(number)) or not is_inside(number, interval):
            raise ValueError(f"{name} must be {self._wanted()}, got {shown(value)}.")
        if whole and interval.endswith("inf)") and abs(number) > MOST:
            raise ValueError(f"{name} must be a whole number of at most {MOST}, got {shown(value)}.")
        return int(number) if whole else float(number)

    def _text(self, value: str, name: str) -> str:
        if self.choices and value not in self.choices:
            raise ValueError(f"{name} must be one of {', '.join(self.choices)}, got {shown(value)}.")
        if value != str(self.default) and (not value.strip() or "\0" in value):
            raise ValueError(f"{name} must be text that is not empty, got {shown(value)}.")
        return value

    def _wanted(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = ["true or false"] if bool in self.kinds else []
        if self.takes_number():
            whole = "a number" if float in self.kinds else "a whole number"
            words.append(" ".join(filter(None, (whole, in_words(self.range)))))
        if any(kind not in (bool, int, float, dict) for kind in self.kinds):
            words.append("text")
        return " or ".join(words + ["a mapping"] * (dict in self.kinds))


def keys_of(groups: Iterable[type], ranges: Mapping[str, str] | None = None) -> dict[str, Key]:
    """The keys of dataclasses by name.

    Args:
        groups: a field's `metadata` may hold `help`, `range`, `choices`, `commas` and `positional`, see `Key`; without
            `help` the line of the docstring that begins with its name is taken.
        ranges: of fields of others, by name.
    """
    found = {}
    for group in groups:
        hints, lines = get_type_hints(group), _described(group)
        for field in (field for field in dataclasses.fields(group) if field.init):
            meta, members = field.metadata, _members(hints[field.name])
            lists = [member for member in members if get_origin(member) is list]
            kinds = [kind for member in members for kind in (get_args(member) if member in lists else (member,))]
            found[field.name] = Key(
                field.name,
                tuple(dict.fromkeys(get_origin(kind) or kind for kind in kinds if kind is not Any)),
                field.default if field.default_factory is MISSING else field.default_factory(),
                " ".join(str(meta.get("help") or lines.get(field.name, "")).split()),
                meta.get("range") or (ranges or {}).get(field.name),
                tuple(meta.get("choices") or _words(kinds)),
                len(members) > len(lists),
                bool(lists),
                meta.get("commas", False),
                meta.get("positional", False),
            )
    return found


def option(default: Any = MISSING, help: str = "", range: str | None = None, **more: Any) -> Any:
    """A field of a dataclass of keys; a list is copied for each instance, without `default` the key must be given.

    Args:
        default, help, range: see `Key`.
        more: `choices`, `commas`, `positional` of a `Key`, and whatever else its command reads.
    """
    metadata = {"help": help, "range": range, **more}
    if isinstance(default, (list, tuple)):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def is_inside(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as `(0, inf)`; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = low < value if interval[0] == "(" else low <= value
    return is_finite(value) and above and (value < high if interval[-1] == ")" else value <= high)


def in_words(interval: str | None) -> str:
    """An interval as messages say it."""
    if interval is None:
        return ""
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"in {interval}"
    return f"above {low}" if interval[0] == "(" else f"of at least {low}"


def shown(value: Any) -> str:
    """A value in a message: at most 60 characters."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _words(kinds: Iterable[Any]) -> Iterable[str]:
    """The words of an enumeration, which transformers has for some keys."""
    return (item.value for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) for item in kind)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, None left out."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(inner for member in get_args(hint) if member is not types.NoneType for inner in _members(member))
    return (hint,)


def _number(value: Any) -> float | None:
    """The number that a value is, also as text; None where it is none."""
    if isinstance(value, str):
        try:
            value = parse_yaml(value, "a number")
        except ValueError:
            return None
    # NaN is no number, and does not equal itself.
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value else None


def _quoting(value: Any, kinds: tuple[Any, ...]) -> str:
    is_word = isinstance(value, (bool, int, float)) and str in kinds
    return "; put text that looks like a number or a switch in quotes" if is_word else ""


def _described(group: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each field: `name: text`, or `one, two: text`, and indented lines."""
    text = f"{inspect.cleandoc(group.__doc__ or '')}\n"
    found = re.findall(r"^ {4}(\w+(?:, \w+)*): (.*\n(?:^ {8}.*\n)*)", text, re.MULTILINE)
    return {name: text.strip().rstrip(".").replace("`", "") for names, text in found for name in names.split(", ")}
