"""The options of `python -m dynamic_llava.efficiency measure`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..cli import listed, seed, text, whole
from .option_flags import DTYPES, check_options, flag_of
from .shapes import add_rate_arguments, add_shape_arguments

DEFAULT_SHAPE = "small"
MODES = ("prefill", "decode", "no_cache", "peak")
LEAST = {"repeats": 1, "steps": 1, "warmup": 0, "case_seconds": 1, "threads": 0}


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured, and how often.

    Attributes:
        modes: of `MODES`.
        batch_sizes: rows in `decode`.
        full_batch_sizes: rows where whole prompts are computed: `prefill`, `no_cache`, `peak`.
        prompt_lengths: text tokens beside the image; `decode`, `no_cache` and `peak` take the first.
        output_lengths: positions at which `decode` and `peak` look, ascending.
        no_cache_lengths: lengths of generations without a cache.
        repeats: timed pairs of `prefill` and of `no_cache`.
        steps: timed pairs of decode steps at each output length.
        warmup: pairs in front of them that are not counted.
        case_seconds: a timing that has taken longer makes do with `timing.LEAST_PAIRS` pairs; three times as long for
            `prefill`, which is one timing.
        output: folder of `measure.json` and `measure.png`; None writes nothing.
    """

    modes: tuple[str, ...] = MODES
    batch_sizes: tuple[int, ...] = (1, 8)
    full_batch_sizes: tuple[int, ...] = (1,)
    prompt_lengths: tuple[int, ...] = (64,)
    output_lengths: tuple[int, ...] = (64, 512, 1000)
    no_cache_lengths: tuple[int, ...] = (256,)
    image_keep_rate: float | None = None
    output_keep_rate: float | None = None
    repeats: int = 9
    steps: int = 16
    warmup: int = 2
    case_seconds: int = 10
    dtype: str = "float32"
    device: str = "cpu"
    attention: str = "sdpa"
    threads: int = 0
    seed: int = 0
    output: Path | None = None

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"Unknown mode {mode!r}; use some of {','.join(MODES)}.")
        for name in ("batch_sizes", "full_batch_sizes", "prompt_lengths", "output_lengths", "no_cache_lengths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{flag_of(name)} must be numbers of at least 1, got {getattr(self, name)}.")
        check_options(self, LEAST)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> MeasureOptions:
        """What `add_arguments` has read."""
        values = {name: getattr(arguments, name) for name in cls.__dataclass_fields__}
        values["output_lengths"] = tuple(sorted(set(values["output_lengths"])))
        return cls(**values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `measure`."""
    add_shape_arguments(parser, DEFAULT_SHAPE)
    default = MeasureOptions()
    lists = (
        ("batch_sizes", "rows of a decode step"),
        ("full_batch_sizes", "rows of prefill, no_cache and peak"),
        ("prompt_lengths", "text tokens of the prompt, beside its image"),
        ("output_lengths", "output positions of decode and peak"),
        ("no_cache_lengths", "lengths of generations without a cache"),
    )
    for name, about in lists:
        value = getattr(default, name)
        shown = ",".join(map(str, value))
        parser.add_argument(
            flag_of(name), type=listed(whole()), default=value, metavar="N,N", help=f"{about} (default: {shown})"
        )
    parser.add_argument("--modes", type=listed(str), default=default.modes, help=f"of {','.join(MODES)} (default: all)")
    add_rate_arguments(parser)
    numbers = (
        ("repeats", "timed pairs of prefill and no_cache"),
        ("steps", "timed pairs of decode steps at each length"),
        ("warmup", "pairs before them that are not counted"),
        ("case_seconds", "after these a timing makes do with 5 pairs (prefill: thrice these)"),
        ("threads", "torch threads; 0 leaves torch's choice"),
        ("seed", "of the weights and the tokens"),
    )
    for name, about in numbers:
        value = getattr(default, name)
        kind = seed if name == "seed" else whole(LEAST[name])
        parser.add_argument(flag_of(name), type=kind, default=value, metavar="N", help=f"{about} (default: {value})")
    parser.add_argument("--dtype", default=default.dtype, help=f"one of {', '.join(DTYPES)} (default: {default.dtype})")
    parser.add_argument("--device", default=default.device, help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--attention", default=default.attention, help="sdpa or eager (default: sdpa)")
    parser.add_argument("--output", type=_folder, metavar="FOLDER", help="write measure.json and measure.png there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _folder(name: str) -> Path:
    return Path(text(name))
