"""Whether weights are those of a whole model: nothing missing but whole predictors, nothing unknown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor
from transformers.modeling_utils import set_zero3_state
from transformers.utils import logging

from .config_checks import config_errors
from .parameter_names import EMBEDDINGS, HEAD, from_hugging_face
from .sparsity_config import PREDICTOR_NAMES, SparsityConfig
from .weight_files import TensorInfo, is_buffer, list_weights, some

logger = logging.get_logger(__name__)

PREDICTORS = tuple(f"{name}." for name in PREDICTOR_NAMES)
# Where new predictors are noted in the place of a message.
_NOTED: ContextVar[list[str] | None] = ContextVar("noted", default=None)


def model_weights(name: str, cls: type, config) -> dict[str, Tensor]:
    """The weights of a model of `config`, on the meta device; those that are tied to others are left out.

    Raises:
        ValueError: the configuration of `name` describes no model.
    """
    quiet = torch.random.fork_rng(devices=[])
    # ZeRO-3 would shard the tower, which has no data here.
    with config_errors(f"{name}: config.json"), quiet, torch.device("meta"), set_zero3_state():
        weights = cls(config).state_dict()
    if config.tie_word_embeddings:
        weights.pop(HEAD, None)
    return weights


def check_weights(name: str, cls: type, config, folder: Path) -> None:
    """`ValueError` unless a folder in Hugging Face's layout holds the weights of a `cls` of `config`; reads headers."""
    _, stored = list_weights(folder)
    if stored and getattr(config, "quantization_config", None) is None:
        found = by_own_name(name, ((from_hugging_face(key), key) for key in stored))
        # The headless model names its weights as the oldest folders do.
        expected = {from_hugging_face(key): weight for key, weight in model_weights(name, cls, config).items()}
        check_tensors(name, expected, {own: stored[key][1] for own, key in found.items()})


def by_own_name(name: str, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The stored key of each of our names, buffers left out; `ValueError` where two keys are one weight."""
    found: dict[str, str] = {}
    for own, key in pairs:
        if is_buffer(key):
            continue
        if own in found:
            raise ValueError(f"{name} holds {own} twice, as {found[own]} and as {key}; copy or download it again.")
        found[own] = key
    return found


def check_tensors(name: str, expected: dict[str, Tensor], tensors: dict[str, TensorInfo]) -> list[str]:
    """`ValueError` unless `tensors` are `expected`, whole predictors aside; the weights of predictors that are missing.

    Args:
        name: what messages call the checkpoint.
        expected: see `model_weights`.
        tensors: what is stored, by our names.
    """
    wrong = misshapen(tensors, expected)
    if wrong:
        raise ValueError(
            f"{name}: weights of another shape than config.json says: {some(wrong)}. "
            "Check that config.json (and vision_tower) belong to these weights."
        )
    check_floating(name, tensors)
    # A head of its own may stand beside tied embeddings; transformers loads it then.
    unknown = tensors.keys() - expected.keys() - ({HEAD} if EMBEDDINGS in expected else set())
    return check_keys(name, expected, expected.keys() - tensors.keys(), unknown)


def misshapen(weights: Mapping[str, Tensor | TensorInfo], expected: Mapping[str, Tensor]) -> list[str]:
    """Those of `weights` whose shape is not `expected`, with both shapes."""
    return [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and tuple(value.shape) != tuple(weights[key].shape)
    ]


def check_floating(name: str | Path, weights: Mapping[str, Tensor | TensorInfo]) -> None:
    """`ValueError` that lists the weights of another type than floating point numbers."""
    others = [f"{key} {value.dtype}" for key, value in weights.items() if not value.dtype.is_floating_point]
    if others:
        raise ValueError(f"{name}: weights that are no floating point numbers: {some(others)}; save it as float.")


def check_keys(name: str, expected: Iterable[str], missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
    """Whole predictors alone may be missing; returns their weights.

    Args:
        name: what messages call the checkpoint.
        expected: all weights of the model.
        missing: those of them that are not there.
        unexpected: what is there beside them.

    Raises:
        ValueError: another weight, or only some weights of a predictor, are missing, or one is unknown; lists them.
    """
    missing = set(missing)
    new = {key for part in PREDICTORS if (keys := _of(part, expected)) <= missing for key in keys}
    lost, unknown = sorted(missing - new), sorted(unexpected)
    if lost or unknown:
        raise ValueError(
            f"{name} does not hold a whole Dynamic-LLaVA or LLaVA-1.5 checkpoint: "
            f"missing {some(lost)}; unknown {some(unknown)}. "
            "Check that the copy is whole and that its config.json belongs to it."
        )
    return sorted(new)


@contextmanager
def noting_new() -> Iterator[list[str]]:
    """New predictors are noted in the list in here, and not said: their weights come from elsewhere."""
    noted: list[str] = []
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def note_new(sparsity: SparsityConfig, name: str, new: list[str]) -> None:
    """Say which predictors are new and note them as untrained; inside `noting_new` note them there instead."""
    noted = _NOTED.get()
    if noted is not None:
        noted.extend(new)
    elif new:
        kinds = mark_untrained(sparsity, new)
        logger.warning(
            f"{name} holds no {' and '.join(kinds)}: new ones were initialised. "
            "Train them (python -m dynamic_llava.train) before dropping tokens."
        )


def mark_untrained(sparsity: SparsityConfig, new: list[str]) -> list[str]:
    """Note the predictors that the weights `new` belong to as untrained; returns their names."""
    kinds = sorted({part.rstrip(".") for part in PREDICTORS if _of(part, new)})
    sparsity.untrained = [kind for kind in PREDICTOR_NAMES if kind in kinds or kind in sparsity.untrained]
    return kinds


def _of(part: str, keys: Iterable[str]) -> set[str]:
    return {key for key in keys if part in key}
