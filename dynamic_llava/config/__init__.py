"""The one configuration system: every command describes its keys by dataclasses, and reads them here.

A command takes a YAML file (`--config`, by path or by the name of a preset) and on top of it `key=value`,
`--key value`, `--key=value`, `--key` and `--no-key` for switches, with `-` and `_` alike. Values are YAML 1.2, so that
words like `no` are words; `null` leaves a key at its default. What was resolved is saved as YAML, which `--config`
reads again.

PyYAML reads values and the dataclasses themselves are the schema, `TrainingArguments` among them: nothing else has to
be installed, and help and wrong words answer before torch is there. transformers' `HfArgumentParser`, made for the
same, hands a field's metadata on to argparse, which knows no ranges; it takes the word `no` for a switch, and a path
that begins with a dash for an option.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from ..files import write_yaml
from .fields import Key, is_inside, keys_of, option
from .help import help_text
from .words import HELP, Given, Reader, find_config

__all__ = [
    "Command",
    "Given",
    "command_line",
    "find_config",
    "is_inside",
    "keys_of",
    "option",
    "program",
    "save",
    "typed",
]

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        name: as behind `dynamic-llava`, such as `data check`; or a module, or a script, with their dots.
        about: what it does; the text above the keys in its help.
        groups: dataclasses whose fields are its keys.
        presets: folder below configs/ with presets for it.
        config_first: whether `--config` may be left out in front of the configuration.
        also: a line of help on keys that are not of `groups`.
    """

    name: str
    about: str
    groups: tuple[type, ...]
    presets: str | None = None
    config_first: bool = False
    also: str = ""

    @property
    def program(self) -> str:
        """How the user calls it."""
        if self.name.endswith(".py"):
            return f"python {self.name}"
        if "." in self.name:
            return f"python -m {self.name}"
        return program(self.name)

    def read(
        self,
        words: Sequence[str] | None,
        groups: Sequence[type] | None = None,
        others: Collection[str] = (),
    ) -> Given:
        """The plain values of a command line and of the file that it names; `--help` is answered and ends the process.

        Args:
            words: None takes those of the process.
            groups: dataclasses of all keys, where these are more than the help describes.
            others: see `Reader`.

        Raises:
            FileNotFoundError, ValueError: as `Reader.read`.
        """
        words = sys.argv[1:] if words is None else words
        self.answer_help(words)
        keys = keys_of(groups or self.groups)
        return Reader(keys, self.program, self.presets, self.config_first, others).read(words)

    def answer_help(self, words: Sequence[str]) -> None:
        """Print the help and end the process where it is asked for."""
        options = list(words)[: list(words).index("--")] if "--" in words else words
        if any(word in HELP for word in options):
            print(help_text(self))
            raise SystemExit(0)

    def parse(self, words: Sequence[str] | None) -> list[Any]:
        """An instance of each group; raises as `read` and `typed`."""
        return typed(self.groups, self.read(words))


def typed(groups: Sequence[type], given: Given, ranges: Mapping[str, str] | None = None) -> list[Any]:
    """Instances of dataclasses.

    Args:
        groups: the dataclasses, without a key in common.
        given: values by key; keys that no group has are left alone.
        ranges: of numbers, by key, where the fields do not say.

    Raises:
        ValueError: a key that is missing, of another type or out of range, or what a dataclass itself refuses.
    """
    keys = keys_of(groups, ranges)
    values = {}
    for name, key in keys.items():
        value = given.values.get(name)
        if value is not None:
            values[name] = key.checked(value, given.names.get(name, name))
    for name, key in keys.items():
        if name not in values and key.default is MISSING:
            raise ValueError(_missing(key, given))
    return [
        group(**{field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values})
        for group in groups
    ]


def save(folder: str | Path, *groups: Any, name: str = CONFIG_FILE) -> None:
    """Write the values of dataclasses as YAML into a folder that is there, for `--config`; what is unset stays out."""
    values = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
    values = {key: value for key, value in values.items() if value is not None and value != []}
    write_yaml(Path(folder) / name, values)


def program(name: str = "") -> str:
    """How the user calls the command `name`: by the console script where that has started this process."""
    script = os.path.basename(sys.argv[0]).startswith("dynamic-llava")
    return f"{'dynamic-llava' if script else 'python -m dynamic_llava'} {name}".rstrip()


def command_line() -> str:
    """The command in progress, as one types it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [os.path.basename(sys.argv[0])]
    return shlex.join([*start, *sys.argv[1:]])


def _missing(key: Key, given: Given) -> str:
    spelling = key.name if key.positional else f"{key.flag} VALUE or {key.name}=VALUE"
    if given.config is None:
        return f"{key.name} is missing; give {spelling}, or name a file with it as --config."
    return f"{key.name} is missing in {given.config}; add it there, or give {spelling}."
