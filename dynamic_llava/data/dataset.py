"""LLaVA's conversation JSON as a torch dataset: real LLaVA data and the embedded shapes alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from ..chat_template import IMAGE_TOKEN, system_prompt_of
from .conversation import count_images, encode_conversation, parse_turns


class LlavaJsonDataset(Dataset):
    """Samples of a LLaVA JSON file: a list of `{"id", "image": path | [paths] | absent, "conversations": [...]}`.

    An item is a dict of `input_ids` and `labels` (long `(N,)`, image tokens repeated, labels -100 outside the answers),
    `pixel_values` (float32 `(images, 3, H, W)`, or None for text only) and `id`.

    Args:
        json_path: the JSON file.
        image_folder: folder that the image paths are relative to; None: the folder of the JSON file.
        processor: LLaVA processor with a fast tokenizer.
        max_length: longer conversations are cut at the end.
        on_bad_sample: "error" raises at the first bad sample; "skip" leaves it out, see `skipped`.
        image_aspect_ratio: "pad" pads pictures to a square with the mean colour as LLaVA-1.5 does; None leaves them to
            the image processor.
        check_files: look for every image file at the start, so that a missing one does not end a long run.
        require_image: leave out text-only samples, as the paper's training stage does.

    Raises:
        FileNotFoundError: when the JSON file, the image folder or (with "error") an image is missing.
        ValueError: on a malformed file or (with "error") sample, naming sample, file and remedy.
    """

    def __init__(
        self,
        json_path: str | Path,
        image_folder: str | Path | None,
        processor: LlavaProcessor,
        max_length: int = 2048,
        on_bad_sample: Literal["error", "skip"] = "error",
        image_aspect_ratio: Literal["pad"] | None = None,
        check_files: bool = True,
        require_image: bool = False,
    ) -> None:
        if on_bad_sample not in ("error", "skip"):
            raise ValueError(f"on_bad_sample is {on_bad_sample!r}; choose 'error' or 'skip'")
        if image_aspect_ratio not in ("pad", None):
            raise ValueError(f"image_aspect_ratio is {image_aspect_ratio!r}; choose 'pad' or None")
        if not processor.tokenizer.is_fast:
            raise ValueError("the labels need character offsets: load the processor with a fast tokenizer")
        self.json_path = Path(json_path)
        self.image_folder = self.json_path.parent if image_folder is None else Path(image_folder)
        self.processor = processor
        self.max_length = max_length
        self.on_bad_sample = on_bad_sample
        self.image_aspect_ratio = image_aspect_ratio
        self.system_prompt = system_prompt_of(processor)
        self._skipped: list[tuple[str, str]] = []
        samples = _read_samples(self.json_path)
        if require_image:
            samples = [sample for sample in samples if not isinstance(sample, dict) or sample.get("image")]
        self.samples = self._valid_samples(samples, check_files)
        # Shared, so that samples found bad in a data-loader worker are known in the process that reports them.
        self._bad = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the sample; with on_bad_sample="skip", the next good one in the place of a bad one."""
        for offset in range(len(self.samples)):
            position = (index + offset) % len(self.samples)
            if self._bad[position]:
                continue
            try:
                return self._load(position)
            except (ValueError, FileNotFoundError):
                if self.on_bad_sample == "error":
                    raise
                self._bad[position] = True
        raise ValueError(f"{self.json_path}: no usable sample is left, {len(self.skipped)} were skipped")

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Samples left out so far, as (id, reason); those found by data-loader workers included."""
        found = []
        for position in self._bad.nonzero().flatten().tolist():
            try:
                self._load(position)
            except (ValueError, FileNotFoundError) as error:
                found.append((_sample_id(self.samples[position], position), str(error)))
        return self._skipped + found

    def _valid_samples(self, samples: list[Any], check_files: bool) -> list[dict[str, Any]]:
        """Returns the samples whose structure is sound; the pictures themselves are read later."""
        valid = []
        for index, sample in enumerate(samples):
            try:
                self._check(sample, index, check_files)
            except (ValueError, FileNotFoundError) as error:
                if self.on_bad_sample == "error":
                    raise
                self._skipped.append((_sample_id(sample, index), str(error)))
            else:
                valid.append(sample)
        if not valid:
            raise ValueError(f"{self.json_path}: no usable sample among {len(samples)}; {self._skipped[:1]}")
        return valid

    def _check(self, sample: Any, index: int, check_files: bool) -> None:
        where = f"{self.json_path}: sample {_sample_id(sample, index)!r}"
        if not isinstance(sample, dict):
            raise ValueError(f"{where} is not an object; write {{'id', 'image', 'conversations'}}")
        try:
            turns = parse_turns(sample.get("conversations"))
            names = _image_names(sample)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if count_images(turns) != len(names):
            raise ValueError(
                f"{where} has {count_images(turns)} {IMAGE_TOKEN} for {len(names)} pictures {names}; "
                f"write {IMAGE_TOKEN} once for each picture in the 'human' turns"
            )
        for name in names if check_files else ():
            if not (self.image_folder / name).is_file():
                raise FileNotFoundError(f"{where}: {_missing(self.image_folder / name)}")

    def _load(self, position: int) -> dict[str, Any]:
        sample = self.samples[position]
        name = _sample_id(sample, position)
        try:
            images = [self._open(self.image_folder / path) for path in _image_names(sample)]
            pixel_values = self._pixel_values(images)
            counts = [] if pixel_values is None else [self.tokens_per_image(pixel_values)] * len(images)
            turns = parse_turns(sample["conversations"])
            input_ids, labels = encode_conversation(
                turns, self.processor.tokenizer, counts, self.max_length, self.system_prompt
            )
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{self.json_path}: sample {name!r}: {error}") from error
        return {
            "input_ids": torch.tensor(input_ids),
            "labels": torch.tensor(labels),
            "pixel_values": pixel_values,
            "id": name,
        }

    def tokens_per_image(self, pixel_values: torch.Tensor) -> int:
        """Returns how many tokens the model makes of one of these pictures `(..., H, W)`."""
        processor = self.processor
        if processor.patch_size is None:
            raise ValueError("the processor has no patch_size; set it to the vision tower's (14 for LLaVA-1.5)")
        height, width = pixel_values.shape[-2:]
        count = (height // processor.patch_size) * (width // processor.patch_size)
        count += processor.num_additional_image_tokens
        return count - (processor.vision_feature_select_strategy == "default")

    def _open(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except FileNotFoundError as error:
            raise FileNotFoundError(_missing(path)) from error
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            remedy = "replace the file, or set on_bad_sample='skip'"
            raise ValueError(f"picture {path} cannot be read ({error}); {remedy}") from error
        return self._pad_to_square(image) if self.image_aspect_ratio == "pad" else image

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        colour = tuple(int(value * 255) for value in self.processor.image_processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _pixel_values(self, images: list[Image.Image]) -> torch.Tensor | None:
        if not images:
            return None
        return self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]


def _read_samples(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}; give the path of a LLaVA conversation JSON")
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); is the download complete?") from error
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"{path} must hold a non-empty JSON list of samples, found {type(samples).__name__}")
    return samples


def _sample_id(sample: Any, index: int) -> str:
    """Returns the id of a sample, or its place in the file where it has none."""
    name = sample.get("id") if isinstance(sample, dict) else None
    return f"#{index}" if name is None else str(name)


def _image_names(sample: dict[str, Any]) -> list[str]:
    names = sample.get("image")
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"'image' is {names!r}; write a path, a list of paths, or leave it out for text only")
    return names


def _missing(path: Path) -> str:
    return f"no picture at {path}; check image_folder, fetch the file, or set on_bad_sample='skip'"
