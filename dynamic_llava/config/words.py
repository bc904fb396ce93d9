"""What a command is told: a YAML file by name or path, and the words behind it, as plain values."""

from __future__ import annotations

import difflib
import re
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import PRESETS, parse_yaml, read_yaml_mapping, shipped
from .fields import Key

HELP = ("-h", "--help")


@dataclass
class Given:
    """Plain values by key.

    Attributes:
        values: as YAML gives them; None unsets a key.
        names: what messages call each: `--limit`, `limit`, or `FILE: limit`.
        texts: those of the command line, as they were written.
        config: the file, as it was named.
    """

    values: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    config: str | None = None


class Reader:
    """Reads the words of one command.

    Args:
        keys: what may be set.
        program: how the command is called, for messages.
        presets: folder below configs/ whose files can be named without it; None where there is none.
        config_first: whether the first word without a name is the configuration.
        others: further keys that are taken as they are.
    """

    def __init__(
        self,
        keys: Mapping[str, Key],
        program: str,
        presets: str | None = None,
        config_first: bool = False,
        others: Collection[str] = (),
    ) -> None:
        self.keys, self.program, self.presets, self.config_first = keys, program, presets, config_first
        self.known = {*keys, *others}
        self.positional = [key for key in keys.values() if key.positional]

    def read(self, words: Sequence[str]) -> Given:
        """The values of the file that the words name, with those of the words on top.

        Raises:
            FileNotFoundError: no such file, or preset.
            ValueError: an unknown key (the nearest are offered), a word or a file that cannot be read.
        """
        line = self._command_line(words)
        if line.config is None:
            return line
        path = find_config(line.config, self.presets)
        file = self.of_mapping(read_yaml_mapping(path, "configuration"), str(path))
        return Given({**file.values, **line.values}, {**file.names, **line.names}, line.texts, line.config)

    def of_mapping(self, values: Mapping[str, Any], where: str) -> Given:
        """The values of a mapping, each under the name of its key; raises as `read`."""
        found = Given(config=where)
        for name, value in values.items():
            key, negated = self._find(name, name, f" in {where}")
            found.names[key] = f"{where}: {name}"
            found.values[key] = self._negated(value, found.names[key]) if negated else value
        return found

    def _command_line(self, words: Sequence[str]) -> Given:
        found, unnamed, rest = Given(), [], deque(map(str, words))
        while rest:
            word = rest.popleft()
            if word == "--":
                unnamed += rest
                break
            named = word.startswith("--") or re.match(r"\s*[A-Za-z_][\w-]*\s*=", word)
            if not named:
                if re.match(r"-[A-Za-z]", word):
                    raise ValueError(f"Unknown option {word!r}. See {self.program} --help.")
                unnamed.append(word)
                continue
            name, equals, text = word.partition("=")
            name = name.strip() if equals else name
            if name.lstrip("-") == "config" and self.keys.get("config") is None:
                found.config = text if equals else self._next(name, rest)
                continue
            key, negated = self._find(name.removeprefix("--"), name)
            given = text if equals else self._without_equals(name, key, negated, rest)
            value = given if isinstance(given, list) else self._value(key, given, name)
            if negated:
                value, given = self._negated(value, name), str(not value).lower()
            self._note(found, key, value, name, given)
        self._place(found, unnamed)
        return found

    def _place(self, found: Given, words: list[str]) -> None:
        """Give the words without a name to the keys that may stand so."""
        rest = deque(words)
        if rest and self.config_first and found.config is None:
            found.config = rest.popleft()
        for key in self.positional:
            if rest and key.name not in found.values:
                several = [rest.popleft() for _ in range(len(rest) if key.takes_list else 1)]
                self._note(found, key.name, several if key.takes_list else several[0], key.name, " ".join(several))
        if rest:
            raise ValueError(f"Cannot read {rest[0]!r}; write key=value or --key value. See {self.program} --help.")

    @staticmethod
    def _note(found: Given, key: str, value: Any, name: str, text: Any) -> None:
        found.values[key], found.names[key] = value, name
        found.texts[key] = " ".join(text) if isinstance(text, list) else text

    def _without_equals(self, name: str, key: str, negated: bool, rest: deque[str]) -> str | list[str]:
        """The text of an option that stands in front of its value, or is a switch."""
        described = self.keys.get(key)
        if negated or (described is not None and described.is_switch):
            is_word = bool(rest) and rest[0].lower() in ("true", "false")
            return rest.popleft().lower() if is_word else "true"
        first = self._next(name, rest)
        if described is None or not described.takes_list or described.commas or self.positional or self.config_first:
            return first
        several = [first]
        while rest and not rest[0].startswith("--") and rest[0].partition("=")[0] not in self.keys:
            several.append(rest.popleft())
        return several if len(several) > 1 else first

    def _next(self, name: str, rest: deque[str]) -> str:
        if not rest or rest[0].startswith("--"):
            raise ValueError(f"{name} needs a value. See {self.program} --help.")
        return rest.popleft()

    def _value(self, key: str, text: str, name: str) -> Any:
        """A text of the command line as YAML; text where nothing else is taken, such as a folder named 007."""
        if not text.strip():
            raise ValueError(f"{name} is empty; give a value, or null to leave it unset.")
        described = self.keys.get(key)
        is_text = described is not None and str in described.kinds and not described.takes_number()
        try:
            value = parse_yaml(text, name)
        except ValueError:
            if not is_text or text.lstrip()[0] in "[{":
                raise
            return text
        if is_text and isinstance(value, (bool, int, float)) and type(value) not in described.kinds:
            return text
        return value

    def _negated(self, value: Any, name: str) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}.")
        return not value

    def _find(self, name: str, word: str, where: str = "") -> tuple[str, bool]:
        """The key that `name` means, and whether it says the opposite (`--no-KEY`)."""
        key = name.replace("-", "_")
        if key in self.known:
            return key, False
        positive = self.keys.get(key.removeprefix("no_"))
        if key.startswith("no_") and positive is not None and positive.is_switch:
            return positive.name, True
        near = difflib.get_close_matches(key, sorted(self.known), n=3, cutoff=0.5)
        offer = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"Unknown key {word!r}{where}.{offer} See {self.program} --help.")


def find_config(name: str, presets: str | None = None) -> Path:
    """The YAML file of a configuration: a path from here, a path in this repository, or a preset without its `.yaml`.

    Raises:
        FileNotFoundError: there is none; the nearest presets are offered.
    """
    if not name.strip() or "\0" in name:
        raise ValueError(f"--config must be the name or the path of a file, got {name!r}.")
    path = shipped(name)
    if path.is_file() or presets is None:
        return path
    there = {file.stem: file for file in sorted(shipped(f"{PRESETS}/{presets}").glob("*.yaml"))}
    if name in there:
        return there[name]
    if path.exists():
        return path
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.5) or there
    raise FileNotFoundError(
        f"There is no configuration at {name}; give a path, or the name of a preset, such as {', '.join(near)}."
    )
