"""`python -m dynamic_llava.checkpoints convert SRC DST --to {ours,published,llava-hf}`, streaming."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LlavaConfig

from ..carried_code import add_code
from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..generation_file import read_generation_config
from ..model_card import write_model_card
from ..modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from ..weight_checks import PREDICTORS
from ..weight_files import TensorInfo
from .aspect_ratio import aspect_ratio_of, trained_aspect_ratio
from .keys import to_hugging_face, to_published
from .load import load_processor
from .opened import Checkpoint, open_checkpoint
from .published_config import to_published_config
from .source import adapter_chain
from .tokenizer import copy_tokenizer, has_tokenizer, is_complete
from .write import atomic_folder, write_json, write_weights

LAYOUTS = ("ours", "published", "llava-hf")
# A vocabulary is widened to a multiple of this where the image token needs a row, as the hub's checkpoints are.
VOCABULARY_MULTIPLE = 64


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    vision_tower: str | Path | None = None,
    max_shard_bytes: int = 2 << 30,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    base: str | Path | None = None,
) -> None:
    """Write the checkpoint `source` to the folder `target` in another layout, with one shard in memory at a time.

    Args:
        source: folder or repository in any layout; a LoRA folder is merged first, in memory.
        target: new folder; nothing is there until all of it is.
        to: of `LAYOUTS`.
        vision_tower: see `load_published`.
        max_shard_bytes: size of a weight file.
        overwrite: replace `target`.
        say: gets a line for each thing the reader should know.
        base: see `load_adapter`.

    Raises:
        ValueError, FileNotFoundError: as `load_checkpoint`; also a layout that cannot hold the model.
        FileExistsError, OSError: see `write.atomic_folder`.
    """
    if to not in LAYOUTS:
        raise ValueError(f"Unknown layout {to!r}; use one of {', '.join(LAYOUTS)}.")
    checkpoint = open_checkpoint(source, vision_tower, base)
    config = checkpoint.config
    names = _target_names(checkpoint, to)
    tensors = {target: checkpoint.info(own) for own, target in names.items()}
    readers = {target: partial(checkpoint.read, own) for own, target in names.items()}
    if to == "llava-hf":
        _widen_vocabulary(config, tensors, readers)
    target = Path(target)
    needed = sum(info.nbytes for info in tensors.values())
    with atomic_folder(target, needed, overwrite) as folder:
        write_weights(folder, tensors, lambda key: readers[key](), max_shard_bytes, checkpoint.close)
        _write_tokenizer(checkpoint, folder, to, vision_tower, say)
        _write_config(checkpoint, folder, to)
    for line in _remarks(checkpoint, to):
        say(line)


def _target_names(checkpoint: Checkpoint, to: str) -> dict[str, str]:
    """Name in the layout `to` of each of our names that it holds."""
    layers = checkpoint.config.projector_layers
    if to == "published":
        return {own: to_published(own, layers) for own in checkpoint.stored}
    if to == "ours":
        return {own: to_hugging_face(own, "vision_tower.") for own in checkpoint.stored}
    if layers != 2:
        raise ValueError(
            f"Hugging Face's LLaVA has projectors of 2 layers, {checkpoint.source.name} has one of {layers}; "
            "convert to 'ours'."
        )
    dense = [own for own in checkpoint.stored if not _is_predictor(own)]
    return {own: to_hugging_face(own, "vision_tower.vision_model.") for own in dense}


def _is_predictor(own: str) -> bool:
    return any(name in own for name in PREDICTORS)


def _widen_vocabulary(
    config: DynamicLlavaConfig, tensors: dict[str, TensorInfo], readers: dict[str, Callable[[], Tensor]]
) -> None:
    """Give the image token a row of the embeddings, which Hugging Face's LLaVA looks up; new rows are the mean row."""
    size = config.text_config.vocab_size
    if config.image_token_index < size:
        return
    wider = -(-(config.image_token_index + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if key not in tensors:
            # Tied to the embeddings.
            continue
        info = tensors[key]
        tensors[key] = TensorInfo((wider, *info.shape[1:]), info.dtype)
        readers[key] = partial(_with_mean_rows, readers[key], wider)
    config.text_config.vocab_size = wider


def _with_mean_rows(read: Callable[[], Tensor], rows: int) -> Tensor:
    weight = read()
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def _write_tokenizer(
    checkpoint: Checkpoint, folder: Path, to: str, vision_tower: str | Path | None, say: Callable[[str], None]
) -> None:
    name = checkpoint.source.name
    found = next((part for part in adapter_chain(name) if has_tokenizer(part)), None)
    if found is None:
        say(f"{name} holds no tokenizer (tokenizer.json or tokenizer.model): none was written.")
    elif to == "published" or (
        checkpoint.layout == "hugging face" and is_complete(found) and trained_aspect_ratio(found) is None
    ):
        copy_tokenizer(found, folder)
    else:
        load_processor(name, vision_tower).save_pretrained(folder)


def _write_config(checkpoint: Checkpoint, folder: Path, to: str) -> None:
    """Last of all: a folder without it does not load."""
    config = checkpoint.config
    text = config.text_config
    found = (read_generation_config(part) for part in adapter_chain(checkpoint.source.name))
    generation = next((item for item in found if item is not None), None) or GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    generation.save_pretrained(folder)
    if to == "published":
        values = to_published_config(config)
        if checkpoint.layout != "published" and any(map(has_tokenizer, adapter_chain(checkpoint.source.name))):
            said = aspect_ratio_of(load_processor(checkpoint.source.name))
            values["image_aspect_ratio"] = said or values["image_aspect_ratio"]
        if values["mm_vision_tower"] == "vision_tower":
            (folder / "vision_tower").mkdir()
            config.vision_config.save_pretrained(folder / "vision_tower")
    elif to == "ours":
        values = {**config.to_dict(), "architectures": ["DynamicLlavaForConditionalGeneration"]}
        source = checkpoint.source
        write_model_card(folder, config, base=source.name, results_in=(source.folder,))
    else:
        dropped = ("sparsity", "published", "projector_layers", "model_type", "auto_map")
        kept = {key: value for key, value in config.to_dict().items() if key not in dropped}
        values = {**LlavaConfig(**kept).to_dict(), "architectures": ["LlavaForConditionalGeneration"]}
    write_json(folder / "config.json", values)
    if to == "ours":
        add_code(folder, DynamicLlavaForConditionalGeneration)


def _remarks(checkpoint: Checkpoint, to: str) -> list[str]:
    remarks = []
    left_out = sum(_is_predictor(own) for own in checkpoint.stored)
    if to == "llava-hf" and left_out:
        remarks.append(f"{left_out} weights of the predictors were left out: the result is the dense model.")
    elif to == "published" and checkpoint.config.sparsity.output_offsets:
        remarks.append(
            "The offsets of other output keep rates were left out, that of the checkpoint's own is in the weights: "
            "dynamic-llava checkpoints calibrate finds them again behind a conversion to ours."
        )
    elif checkpoint.new:
        remarks.append("The checkpoint has no predictors: loading the result makes new ones, which want training.")
    return remarks
