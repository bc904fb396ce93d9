"""A checkpoint of any layout, open: where each weight is stored, by our name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config_checks import config_errors
from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..generation_file import read_generation_config
from ..loading import is_adapter
from ..model_kinds import is_published
from ..modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from ..weight_checks import by_own_name, check_tensors, model_weights, noting_new
from ..weight_files import TensorInfo
from .adapters import load_adapter
from .keys import own_name
from .load import OWN_TOWER, our_tensors, published_model_config
from .source import CheckpointSource, find_folder, open_source


@dataclass
class Checkpoint:
    """A checkpoint of any layout.

    Attributes:
        source: its files; of a LoRA folder, merged with its base, the weights in memory.
        config: its configuration.
        stored: where each weight is, by our name.
        new: weights of predictors that it lacks.
        layout: `published`, `hugging face` or `lora`.
    """

    source: CheckpointSource
    config: DynamicLlavaConfig
    stored: dict[str, tuple[CheckpointSource, str]]
    new: list[str]
    layout: str

    def info(self, own: str) -> TensorInfo:
        """Shape and dtype of a weight."""
        part, key = self.stored[own]
        return part.tensors[key]

    def read(self, own: str) -> Tensor:
        """A weight, read now; `ValueError` where it is NaN or infinite."""
        part, key = self.stored[own]
        return part.read(key)

    def close(self) -> None:
        """Let go of the files that have been read."""
        for part, _ in self.stored.values():
            part.close()


def open_checkpoint(
    name: str | Path, vision_tower: str | Path | None = None, base: str | Path | None = None
) -> Checkpoint:
    """Open a checkpoint of any layout and check that it is whole; a LoRA folder is merged with its base, in memory.

    Raises:
        ValueError, FileNotFoundError: as `load_checkpoint`.
    """
    if is_adapter(find_folder(name)):
        return _merged(name, vision_tower, base)
    source = open_source(name)
    read_generation_config(source.folder)
    published = is_published(source.config)
    if published:
        config = published_model_config(source, vision_tower)
        stored = our_tensors(source, vision_tower)
    elif vision_tower is not None:
        raise ValueError(OWN_TOWER.format(name=name, tower=vision_tower))
    else:
        with config_errors(str(source.folder)):
            config = DynamicLlavaConfig.from_dict(source.config)
        own = by_own_name(source.name, ((own_name(key), key) for key in source.tensors))
        stored = {name: (source, key) for name, key in own.items()}
    expected = model_weights(source.name, DynamicLlavaForConditionalGeneration, config)
    new = check_tensors(source.name, expected, {own: part.tensors[key] for own, (part, key) in stored.items()})
    return Checkpoint(source, config, stored, new, "published" if published else "hugging face")


def _merged(name: str | Path, vision_tower: str | Path | None, base: str | Path | None) -> Checkpoint:
    with noting_new() as new:
        model = load_adapter(name, base, merge=True, vision_tower=vision_tower)
    # A head that is tied to the embeddings is not among these, and new predictors are none of the checkpoint's.
    state = {key: value.detach() for key, value in model.named_parameters() if key not in set(new)}
    tensors = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in state.items()}
    folder = find_folder(name)
    where = dict.fromkeys(state, folder)
    source = CheckpointSource(str(name), folder, model.config.to_dict(), [folder], tensors, where, state)
    return Checkpoint(source, model.config, {key: (source, key) for key in state}, sorted(new), "lora")
