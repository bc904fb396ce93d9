"""The commands by name: the module that runs each, a line of help, and how one calls another without importing it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from .config import program
from .config.help import list_text
from .config.words import HELP


@dataclass(frozen=True)
class Entry:
    """A command.

    Args:
        module: has `run(words)`, which raises what is wrong, and `main(words)`, which returns the exit status.
        help: one line.
    """

    module: str
    help: str


COMMANDS = {
    "train": Entry("dynamic_llava.train.__main__", "the sparsification stage: train, save, report"),
    "eval": Entry("dynamic_llava.eval.__main__", "benchmarks and what an answer costs, through lmms-eval"),
    "compare": Entry("dynamic_llava.eval.compare", "evaluations side by side with the paper's figures"),
    "report": Entry("dynamic_llava.eval.report", "a run against its dense base and against random selection"),
    "checkpoints": Entry("dynamic_llava.checkpoints.__main__", "inspect, convert and merge checkpoints"),
    "data": Entry("dynamic_llava.data.__main__", "check training data, draw the embedded shapes"),
    "efficiency": Entry("dynamic_llava.efficiency.__main__", "FLOPs, time and memory of stock LLaVA and ours"),
    "serve": Entry("dynamic_llava.app.serve", "an OpenAI-compatible server on this machine"),
}


def load(name: str, table: Mapping[str, Entry] = COMMANDS) -> ModuleType:
    """The module of a command; floors below it call it by this, too."""
    return importlib.import_module(table[name].module)


def choose(name: str, about: str, helps: Mapping[str, str], words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command that `words` begin with, and the words behind it; `--help` is answered and ends the process.

    Args:
        name: of the command that these are below; empty for `dynamic-llava` itself.
        about: what its help says above the list.
        helps: a line of help for each.

    Raises:
        ValueError: none of them, the nearest are offered.
    """
    if words and words[0] in HELP:
        print(list_text(program(name), about, dict(helps)))
        raise SystemExit(0)
    if words and words[0] in helps:
        return words[0], words[1:]
    if not words:
        raise ValueError(f"{program(name)} takes a command: {', '.join(helps)}. See {program(name)} --help.")
    near = difflib.get_close_matches(words[0], helps, n=2, cutoff=0.5)
    offer = f"Did you mean {', '.join(near)}?" if near else f"There are {', '.join(helps)}."
    raise ValueError(f"Unknown command {words[0]!r}. {offer} See {program(name)} --help.")


def run_below(name: str, about: str, table: Mapping[str, Entry], words: Sequence[str]) -> int | None:
    """Run the command of `table` that `words` begin with; raises as `choose`, and as the command."""
    chosen, rest = choose(name, about, {key: entry.help for key, entry in table.items()}, words)
    return load(chosen, table).run(rest)
