"""The help of a command, from its dataclasses alone."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import MISSING
from typing import TYPE_CHECKING

from .fields import Key, in_words, keys_of

if TYPE_CHECKING:
    from . import Command

COLUMN, WIDEST = 28, 110


def help_text(command: Command) -> str:
    """The usage, what the command does, and its keys."""
    keys = keys_of(command.groups)
    first = ["[CONFIG]"] if command.config_first else []
    first += [_placed(key) for key in keys.values() if key.positional]
    usage = " ".join([f"usage: {command.program}", *first, "[--key VALUE | key=value ...]"])
    known = f" or the name of a preset (configs/{command.presets})" if command.presets else ""
    rows = [] if "config" in keys else [_row("--config FILE", f"YAML with keys and values: a path{known}")]
    rows += [_row(_spelt(key), _described(key)) for key in sorted(keys.values(), key=lambda key: not key.positional)]
    also = ["", command.also] if command.also else []
    return "\n".join([usage, "", (command.about or "").strip(), "", *rows, *also])


def list_text(program: str, about: str, names: dict[str, str]) -> str:
    """The usage of a command that has others below it, with a line for each."""
    rows = [_row(name, help) for name, help in names.items()]
    return "\n".join([f"usage: {program} COMMAND ...", "", about.strip(), "", *rows])


def _spelt(key: Key) -> str:
    if key.positional:
        return key.name
    if key.is_switch:
        return f"--no-{key.flag[2:]}" if key.default is True else key.flag
    kind = "N" if key.takes_number() else "TEXT"
    return f"{key.flag} {'|'.join(key.choices) if 0 < len('|'.join(key.choices)) < 12 else kind}"


def _placed(key: Key) -> str:
    name = f"{key.name} ..." if key.takes_list else key.name
    return name if key.default is MISSING else f"[{name}]"


def _described(key: Key) -> str:
    more = []
    if key.range:
        more.append(in_words(key.range).removeprefix("of "))
    if len("|".join(key.choices)) >= 12:
        more.append(f"one of {', '.join(key.choices)}")
    if key.default is MISSING:
        more.append("needed")
    elif key.default is not None and not key.is_switch:
        value = ",".join(map(str, key.default)) if isinstance(key.default, (list, tuple)) else key.default
        more += [f"default: {value}"] if value != "" else []
    return key.help.rstrip(".") + (f" ({'; '.join(more)})" if more else "")


def _row(left: str, text: str) -> str:
    width = max(50, min(shutil.get_terminal_size().columns, WIDEST))
    lines = textwrap.wrap(text, width - COLUMN, break_on_hyphens=False) or [""]
    head = f"  {left}"
    first = [f"{head:<{COLUMN}}{lines[0]}"] if len(head) < COLUMN - 1 else [head, f"{'':<{COLUMN}}{lines[0]}"]
    return "\n".join([*first, *(f"{'':<{COLUMN}}{line}" for line in lines[1:])])
