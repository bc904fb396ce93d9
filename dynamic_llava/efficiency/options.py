"""The keys of `dynamic-llava efficiency`, and shapes of models by name; without torch, so that help answers at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..config import option

CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# 576 image tokens as in LLaVA-1.5, a tower small enough not to hide the decoder.
CLIP_SMALL = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
CLIP_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _shape(vision: dict[str, int], image_size: int, predictor_dim: int, **text: int) -> dict[str, dict[str, int]]:
    vision = {**vision, "image_size": image_size, "patch_size": 14}
    return {"text": text, "vision": vision, "sparsity": {"predictor_dim": predictor_dim}}


SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "7b": _shape(
        CLIP_LARGE,
        336,
        512,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
    ),
    "13b": _shape(
        CLIP_LARGE,
        336,
        512,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        vocab_size=32064,
    ),
    # 270 M parameters: the smallest at which a CPU's times follow the FLOPs and the bytes moved.
    "small": _shape(
        CLIP_SMALL,
        336,
        512,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=16,
        num_attention_heads=16,
        vocab_size=32064,
    ),
    "tiny": _shape(
        CLIP_TINY,
        56,
        16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=128,
    ),
}

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("prefill", "decode", "no_cache", "peak")
COUNTS, TOKENS, SEEDS, RATES = "[1, inf)", "[0, 131072]", "[0, 4294967296)", "(0, 1]"
# Beyond every model, and still counted at once.
WIDTHS, LAYERS = "[1, 1048576]", "[1, 10000]"


def _width(help: str, section: str, name: str, interval: str = WIDTHS) -> Any:
    return option(None, help, interval, sets=(section, name))


@dataclass(frozen=True)
class ShapeOptions:
    """Which model: a checkpoint's shape, or one by name with some of its numbers set otherwise."""

    model: str | None = option(None, "take the shape of this checkpoint folder; weights are not read")
    shape: str | None = option(None, f"{', '.join(SHAPES)} (7b for flops, else small)")
    hidden: int | None = _width("width of the decoder", "text", "hidden_size")
    intermediate: int | None = _width("width of the decoder's MLP", "text", "intermediate_size")
    layers: int | None = _width("decoder layers", "text", "num_hidden_layers", LAYERS)
    heads: int | None = _width("attention heads of the decoder", "text", "num_attention_heads")
    kv_heads: int | None = _width("key/value heads of the decoder", "text", "num_key_value_heads")
    vocab: int | None = _width("vocabulary of the decoder", "text", "vocab_size", "[2, 1048576]")
    image_size: int | None = _width("pixels of an image's side; the patch is 14", "vision", "image_size")
    sparse_layer: int | None = _width("dense decoder layers in front", "sparsity", "sparse_layer")
    predictor_dim: int | None = _width("width of the predictors", "sparsity", "predictor_dim")


#: Numbers of a shape by option: the part of the configuration, and the name there.
OVERRIDES = {item.name: item.metadata["sets"] for item in fields(ShapeOptions) if "sets" in item.metadata}


@dataclass(frozen=True)
class Delivery:
    """Where the report goes."""

    output: str | None = option(None, "folder for the report, and the options that made it")
    json: bool = option(False, "print JSON instead of a table")


@dataclass(frozen=True)
class FlopsOptions:
    """What is counted."""

    prompt: int = option(64, "text tokens of the prompt", TOKENS)
    images: int = option(1, "images of the prompt", TOKENS)
    output_length: int = option(1000, "tokens written", "[1, 131072]")
    dtype_bytes: int = option(2, "bytes of a KV number", "[1, 16]")
    image_keep_rate: float | None = option(None, "fraction of image tokens kept (the configuration's)", RATES)
    output_keep_rate: float | None = option(None, "fraction of output tokens kept (the configuration's)", RATES)


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured, and how often.

    A timing that has taken longer than `case_seconds` makes do with `timing.LEAST_PAIRS` pairs; `prefill`, which is one
    timing, than three times as long.
    """

    modes: list[str] = option(MODES, "what is measured", choices=MODES, commas=True)
    batch_sizes: list[int] = option((1, 8), "rows of a decode step", COUNTS, commas=True)
    full_batch_sizes: list[int] = option((1,), "rows of prefill, no_cache and peak", COUNTS, commas=True)
    prompt_lengths: list[int] = option(
        (64,), "text tokens beside the image; decode, no_cache and peak take the first", COUNTS, commas=True
    )
    output_lengths: list[int] = option((64, 512, 1000), "output positions of decode and peak", COUNTS, commas=True)
    no_cache_lengths: list[int] = option((256,), "lengths of generations without a cache", COUNTS, commas=True)
    image_keep_rate: float | None = option(None, "fraction of image tokens kept (the configuration's)", RATES)
    output_keep_rate: float | None = option(None, "fraction of output tokens kept (the configuration's)", RATES)
    repeats: int = option(9, "timed pairs of prefill and no_cache", COUNTS)
    steps: int = option(16, "timed pairs of decode steps at each length", COUNTS)
    warmup: int = option(2, "pairs before them that are not counted", "[0, inf)")
    case_seconds: int = option(10, "after these a timing makes do with 5 pairs (prefill: thrice these)", COUNTS)
    dtype: str = option("float32", "of weights and activations", choices=DTYPES)
    device: str = option("cpu", "cpu, cuda, cuda:1")
    attention: str = option("sdpa", "sdpa or eager")
    threads: int = option(0, "torch threads; 0 leaves torch's choice", "[0, inf)")
    seed: int = option(0, "of the weights and the tokens", SEEDS)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_lengths", sorted(set(self.output_lengths)))


@dataclass(frozen=True)
class StepOptions:
    """What a measured step holds: one image and a prompt per row, and an answer of `output_tokens`."""

    batch: int = option(1, "rows", COUNTS)
    text_tokens: int = option(64, "text tokens of the prompt", COUNTS)
    output_tokens: int = option(128, "tokens of the answer", COUNTS)
    repeats: int = option(5, "timed pairs", COUNTS)
    dtype: str = option("float32", "of weights and activations", choices=DTYPES)
    device: str = option("cpu", "cpu, cuda, cuda:1")
    attention: str = option("sdpa", "sdpa or eager")
    gradient_checkpointing: bool = option(False, "activations are computed again in the backward")
    seed: int = option(0, "of the weights and the tokens", SEEDS)


@dataclass(frozen=True)
class ScoreOptions:
    """What is scored: one image, a prompt of `text_tokens`, and an answer of `output_tokens`."""

    text_tokens: int = option(64, "text tokens of the prompt", COUNTS)
    output_tokens: int = option(200, "tokens of the answer", "[2, inf)")
    repeats: int = option(3, "timed pairs", COUNTS)
    dtype: str = option("float32", "of weights and activations", choices=DTYPES)
    device: str = option("cpu", "cpu, cuda, cuda:1")
    attention: str = option("sdpa", "sdpa or eager")
    seed: int = option(0, "of the weights and the tokens", SEEDS)
