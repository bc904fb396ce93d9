"""Options of the command line from a YAML file."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

import yaml


def apply_config(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make the values of `path` the defaults of `parser`; lists become comma-separated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a YAML mapping, or a name that is no option (the nearest is offered).
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path} is missing; the repository's suites are in configs/eval.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not option names with values.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    for name, value in values.items():
        option = str(name).replace("-", "_")
        if option not in actions:
            near = difflib.get_close_matches(option, actions, n=1)
            offer = f"did you mean {near[0]}?" if near else f"there are {', '.join(actions)}."
            raise ValueError(f"{path}: unknown option {name!r}; {offer}")
        values[name] = _checked(value, actions[option], f"{path}: {name}")
    parser.set_defaults(**{str(name).replace("-", "_"): value for name, value in values.items()})


def _checked(value: object, action: argparse.Action, where: str) -> object:
    """`value` in the type of its option."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}.")
        return value
    if isinstance(value, list):
        return ",".join(map(str, value))
    try:
        return value if value is None else (action.type or str)(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} must be {action.type.__name__}, got {value!r}.") from error
