"""Models to evaluate: a Dynamic-LLaVA run or a stock dense LLaVA, and how its sparsity is set for one evaluation."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, LlavaConfig, PreTrainedModel, ProcessorMixin

from .. import modeling_dynamic_llava, selection  # noqa: F401  register the model and the rules
from ..loading import is_adapter
from ..machine import checked_device
from ..model_kinds import is_published
from ..rules import LEARNED, find_image_rule, find_output_rule
from ..sparsity_config import IMAGE_SELECTIONS, OUTPUT_RATE_CONTROLS, check_keep_rate, check_word
from ..weight_files import check_finite
from .adapters import load_checkpoint
from .aspect_ratio import KEEP, PAD, SQUARE, aspect_ratio_of, check_aspect_ratio, with_aspect_ratio
from .load import load_processor
from .opened import open_checkpoint
from .source import find_folder, read_config_file

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SparsitySettings:
    """How tokens are dropped in one evaluation; None and "predictor" mean what the checkpoint says.

    Args:
        image_keep_rate: fraction of image tokens kept, in (0, 1].
        output_sparsity: whether output tokens are dropped at all.
        image_selector: `predictor`, or a registered rival such as `random`, at the same rate.
        output_selector: `predictor`, or a registered rival such as `random`, at the configured rate.
        output_keep_rate: fraction of output tokens kept; None leaves the decisions as they were learned.
        image_selection: how the predictor chooses, `topk`, `diverse` or `threshold`.
        output_rate_control: how the output rate is met, `offset` or `steered`.
    """

    image_keep_rate: float | None = None
    output_sparsity: bool | None = None
    image_selector: str = LEARNED
    output_selector: str = LEARNED
    output_keep_rate: float | None = None
    image_selection: str | None = None
    output_rate_control: str | None = None

    def __post_init__(self) -> None:
        for name in ("image_keep_rate", "output_keep_rate"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_keep_rate(name, _number(getattr(self, name))))
        object.__setattr__(self, "output_sparsity", _switch("output_sparsity", self.output_sparsity))
        for name, allowed in (("image_selection", IMAGE_SELECTIONS), ("output_rate_control", OUTPUT_RATE_CONTROLS)):
            if getattr(self, name) is not None:
                check_word(name, getattr(self, name), allowed)
        find_image_rule(self.image_selector, "topk")
        find_output_rule(self.output_selector)
        if self.output_sparsity is False:
            for name, idle in (("output_keep_rate", None), ("output_selector", LEARNED)):
                if getattr(self, name) != idle:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect with output_sparsity off; leave one of them out."
                    )

    def call_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `forward` and `generate`: only what differs from the checkpoint's own behaviour."""
        default = SparsitySettings()
        return {name: value for name, value in asdict(self).items() if value != getattr(default, name)}


def _number(value: Any) -> Any:
    """The number that a text of lmms-eval's `--model_args` holds; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _switch(name: str, value: Any) -> bool | None:
    """`value` as a bool or None, also from a text of lmms-eval's `--model_args`."""
    known = {"true": True, "false": False, "none": None}
    if isinstance(value, str) and value.lower() in known:
        return known[value.lower()]
    if value is None or isinstance(value, bool):
        return value
    raise ValueError(f"{name} must be True or False, got {value!r}.")


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its processor.

    A plain holder on purpose: `lmms.clean()` deletes module attributes of the lmms-eval model after every evaluation,
    and a report evaluates one model several times.
    """

    path: str
    model: PreTrainedModel
    processor: ProcessorMixin

    @property
    def is_dense(self) -> bool:
        """Whether this is a stock LLaVA, which drops nothing."""
        return self.model.config.model_type == "llava"

    @property
    def image_aspect_ratio(self) -> str:
        """How its pictures become square: `pad` or `square`."""
        return aspect_ratio_of(self.processor) or SQUARE

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    def call_kwargs(self, settings: SparsitySettings) -> dict[str, Any]:
        """`settings` as keyword arguments of this model; `ValueError` where a dense model is asked to drop tokens."""
        kwargs = settings.call_kwargs()
        if self.is_dense and kwargs:
            raise ValueError(
                f"{self.path} is a dense LLaVA and drops no tokens; leave out {', '.join(kwargs)} "
                "or evaluate a Dynamic-LLaVA checkpoint."
            )
        return kwargs

    def image_keep_rate(self, settings: SparsitySettings) -> float | None:
        """The image rate in force, None for a dense model."""
        if self.is_dense:
            return None
        sparsity = self.model.config.sparsity
        return settings.image_keep_rate or (sparsity.image_keep_rate if sparsity.image_predictor else 1.0)


def load_model(
    path: str | Path, dtype: str = "auto", device: str | None = None, image_aspect_ratio: str | None = None
) -> LoadedModel:
    """Load a Dynamic-LLaVA or stock LLaVA checkpoint with its processor, ready for inference.

    Args:
        path: folder, or name on the hub, also `repository@revision`.
        dtype: `auto` (as saved) or a torch floating point type such as `bfloat16`.
        device: torch device; None means the first GPU where there is one.
        image_aspect_ratio: see `evaluation_processor`.

    Raises:
        FileNotFoundError: no such folder or hub name, or a folder without a model.
        ValueError: another kind of model, or an unknown dtype, device or aspect ratio.
    """
    path = str(path)
    torch_dtype = parse_dtype(dtype)
    place = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if image_aspect_ratio is not None:
        check_aspect_ratio(image_aspect_ratio)
    folder = find_folder(path)
    if is_adapter(folder):
        model = load_checkpoint(path, dtype=torch_dtype)
    else:
        model = _load_whole(path, folder, torch_dtype)
    return LoadedModel(path, model.to(place).eval(), evaluation_processor(path, image_aspect_ratio))


def evaluation_processor(path: str | Path, image_aspect_ratio: str | None = None) -> ProcessorMixin:
    """The processor that a checkpoint is evaluated with.

    Args:
        path: as for `load_model`.
        image_aspect_ratio: of `IMAGE_ASPECT_RATIOS`; None takes what the checkpoint was trained with, and `pad`, as
            LLaVA-1.5 evaluates, where it does not say: stock LLaVA in Hugging Face's layout would cut the middle out.
    """
    processor = load_processor(path)
    if image_aspect_ratio is None:
        image_aspect_ratio = PAD if aspect_ratio_of(processor) is None else KEEP
    return with_aspect_ratio(processor, image_aspect_ratio)


def _load_whole(path: str, folder: Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """A dense LLaVA stays one; every Dynamic-LLaVA loads, whatever its layout."""
    config = read_config_file(folder, path)
    if is_published(config):
        if not config.get("sparse_config"):
            raise ValueError(
                f"{path} is a LLaVA without predictors in LLaVA's own layout; for a dense baseline convert it first: "
                "python -m dynamic_llava.checkpoints convert SRC DST --to llava-hf."
            )
        return load_checkpoint(path, dtype=None if dtype == "auto" else dtype)
    if config["model_type"] != LlavaConfig.model_type:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    # Stock LLaVA would make new what is missing, and read what is not finite.
    open_checkpoint(path).close()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    check_finite(path, model.named_parameters())
    return model


def parse_dtype(dtype: str) -> str | torch.dtype:
    """`auto`, or the torch type of that name; `ValueError` where it is none to compute in."""
    if dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    return getattr(torch, dtype)


def environment(loaded: LoadedModel) -> dict[str, str]:
    """Versions and hardware behind the numbers of `loaded`."""
    device = torch.cuda.get_device_name() if loaded.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {
        "device": device,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
