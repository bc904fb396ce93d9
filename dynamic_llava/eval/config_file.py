"""Options of the command line from a YAML file."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from ..cli import text
from ..files import read_yaml_mapping

LISTS = ("tasks",)


def apply_config(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make the values of `path` the defaults of `parser`; a list of tasks becomes comma-separated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a YAML mapping, a name that is no option (the nearest is offered), or a value of another type.
    """
    if not path.exists():
        raise FileNotFoundError(f"--config {path} is missing; the repository's suites are in configs/eval.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    values = {}
    for name, value in read_yaml_mapping(path).items():
        option = name.replace("-", "_")
        if option not in actions:
            near = difflib.get_close_matches(option, actions, n=1)
            offer = f"did you mean {near[0]}?" if near else f"there are {', '.join(actions)}."
            raise ValueError(f"{path}: unknown option {name!r}; {offer}")
        values[option] = _checked(value, actions[option], f"{path}: {name}")
    parser.set_defaults(**values)


def _checked(value: object, action: argparse.Action, where: str) -> object:
    """`value` in the type of its option."""
    if value is None:
        return action.default
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}.")
        return value
    try:
        if isinstance(value, list) and action.dest in LISTS:
            return ",".join(text(word) for word in value)
        return (action.type or text)(value)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{where} {error}.") from error
