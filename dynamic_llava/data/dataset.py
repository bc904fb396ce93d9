"""LLaVA's conversations as a torch dataset: real LLaVA data and the embedded shapes alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from ..checkpoints.chat_template import IMAGE_TOKEN, system_prompt_of, writes_space_behind_image
from ..token_masks import IGNORE_INDEX
from .conversation import check_max_length, count_images, encode_conversation, parse_turns
from .lengths import ConversationLength, conversation_lengths
from .pictures import PictureReader
from .samples import has_picture, pictures_of, sample_id, told
from .tables import read_json


class ConversationDataset(Dataset):
    """Samples `{"id", "image": picture | [pictures] | absent, "conversations": [...]}`; pictures are opened one by one.

    An item is a dict of `input_ids` and `labels` (long `(N,)`, image tokens repeated, labels -100 outside the answers),
    `pixel_values` (float32 `(images, 3, H, W)`, or None for text only) and `id`; and, with output_turns="all",
    `output_mask` (bool `(N,)`, true on every answer).

    Args:
        samples: the samples; a picture is a path or a `StoredPicture`.
        source: where they come from, for messages.
        image_folder: folder that the image paths are relative to, or several: the first that has the file wins.
        processor: LLaVA processor with a fast tokenizer; it pads pictures or not, see `checkpoints.aspect_ratio`.
        max_length: longer conversations are cut at the end, never through a picture; pictures behind the cut go too.
        on_bad_sample: "error" raises at the first bad sample; "skip" leaves it out, see `skipped`.
        check_files: look for every image file at the start, so that a missing one does not end a long run.
        require_image: leave out text-only samples, as the paper's training stage does; every other sample is visited
            once per epoch.
        output_turns: which answers count as output tokens. "last", as the published code: the model finds the answer
            that a row ends in by itself. "all" adds `output_mask`. Labels teach all answers in both.

    Raises:
        FileNotFoundError: when (with "error") an image is missing.
        ValueError: on an unknown choice or (with "error") a malformed sample, naming sample, source and remedy.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        source: str | Path,
        image_folder: str | Path | Sequence[str | Path],
        processor: LlavaProcessor,
        *,
        max_length: int = 2048,
        on_bad_sample: Literal["error", "skip"] = "error",
        check_files: bool = True,
        require_image: bool = False,
        output_turns: Literal["last", "all"] = "last",
    ) -> None:
        if on_bad_sample not in ("error", "skip"):
            raise ValueError(f"on_bad_sample is {on_bad_sample!r}; choose 'error' or 'skip'")
        if output_turns not in ("last", "all"):
            raise ValueError(f"output_turns is {output_turns!r}; choose 'last' or 'all'")
        check_max_length(max_length)
        if not processor.tokenizer.is_fast:
            raise ValueError("the labels need character offsets: load the processor with a fast tokenizer")
        folders = [image_folder] if isinstance(image_folder, (str, Path)) else image_folder
        self.source = source
        self.processor = processor
        self.pictures = PictureReader(processor, [Path(folder) for folder in folders])
        self.max_length = max_length
        self.on_bad_sample = on_bad_sample
        self.output_turns = output_turns
        # How the processor writes a prompt, so that training sees the text that inference will be asked with.
        self.prompt = {
            "system": system_prompt_of(processor),
            "space_behind_image": writes_space_behind_image(processor),
        }
        self._skipped: list[tuple[str, str]] = []
        self.text_only_left_out = 0
        if require_image:
            with_image = [sample for sample in samples if not isinstance(sample, dict) or has_picture(sample)]
            self.text_only_left_out = len(samples) - len(with_image)
            samples = with_image
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
        raise ValueError(f"{self.source}: no usable sample is left, {len(self.skipped)} were skipped")

    @cached_property
    def counted(self) -> list[ConversationLength]:
        """Tokens of every sample before the cut, image tokens included; counted once, without opening a picture."""
        return conversation_lengths(
            (parse_turns(sample["conversations"]) for sample in self.samples),
            self.processor.tokenizer,
            self.pictures.tokens_per_picture() if any(map(pictures_of, self.samples)) else 0,
            **self.prompt,
        )

    @property
    def full_lengths(self) -> list[int]:
        """Tokens of every sample before the cut."""
        return [length.total for length in self.counted]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample; an upper bound where the cut falls into a picture."""
        return [min(length, self.max_length) for length in self.full_lengths]

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Samples left out so far, as (id, reason); those found by data-loader workers included."""
        found = []
        for position in self._bad.nonzero().flatten().tolist():
            try:
                self._load(position)
            except (ValueError, FileNotFoundError) as error:
                found.append((sample_id(self.samples[position], position), str(error)))
        return self._skipped + found

    def encode(self, position: int, tokens_per_picture: int) -> tuple[list[int], list[int]]:
        """Returns `input_ids` and `labels` of a sample whose pictures have so many tokens, without opening them."""
        sample = self.samples[position]
        counts = [tokens_per_picture] * len(pictures_of(sample))
        turns = parse_turns(sample["conversations"])
        return encode_conversation(turns, self.processor.tokenizer, counts, self.max_length, **self.prompt)

    def _valid_samples(self, samples: Sequence[Any], check_files: bool) -> list[dict[str, Any]]:
        """Returns the samples whose structure is sound; the pictures themselves are read later."""
        valid = []
        present: set[str] = set()
        for index, sample in enumerate(samples):
            try:
                self._check(sample, index, present if check_files else None)
            except (ValueError, FileNotFoundError) as error:
                if self.on_bad_sample == "error":
                    raise
                self._skipped.append((sample_id(sample, index), str(error)))
            else:
                valid.append(sample)
        if not valid:
            raise ValueError(f"{self.source}: no usable sample among {len(samples)}; {self._skipped[:1]}")
        return valid

    def _check(self, sample: Any, index: int, present: set[str] | None) -> None:
        """Raises where a sample is malformed or, unless `present` is None, where a file is not there."""
        where = f"{self.source}: sample {sample_id(sample, index)!r}"
        if not isinstance(sample, dict):
            raise ValueError(f"{where} is not an object; write {{'id', 'image', 'conversations'}}")
        try:
            turns = parse_turns(sample.get("conversations"))
            pictures = pictures_of(sample)
            if count_images(turns) != len(pictures):
                raise ValueError(
                    f"{count_images(turns)} {IMAGE_TOKEN} for {len(pictures)} pictures {list(map(str, pictures))}; "
                    f"write {IMAGE_TOKEN} once for each picture in the 'human' turns"
                )
            for picture in pictures if present is not None else ():
                # Many samples of a data set ask about the same picture; a look at the disk is slow.
                if isinstance(picture, str) and picture not in present:
                    self.pictures.find(picture)
                    present.add(picture)
        except (ValueError, FileNotFoundError) as error:
            raise told(where, error) from error

    def _load(self, position: int) -> dict[str, Any]:
        sample = self.samples[position]
        name = sample_id(sample, position)
        try:
            pixel_values = self.pictures.pixel_values([self.pictures.open(item) for item in pictures_of(sample)])
            tokens = 0 if pixel_values is None else self.pictures.tokens_of(pixel_values)
            input_ids, labels = self.encode(position, tokens)
        except (ValueError, FileNotFoundError) as error:
            raise told(f"{self.source}: sample {name!r}", error) from error
        if pixel_values is not None:
            kept = input_ids.count(self.processor.image_token_id) // tokens
            pixel_values = pixel_values[:kept] if kept else None
        item = {
            "input_ids": torch.tensor(input_ids),
            "labels": torch.tensor(labels),
            "pixel_values": pixel_values,
            "id": name,
        }
        if self.output_turns == "all":
            item["output_mask"] = item["labels"] != IGNORE_INDEX
        return item


class LlavaJsonDataset(ConversationDataset):
    """A LLaVA JSON file: a list of `{"id", "image": path | [paths] | absent, "conversations": [...]}`.

    Args:
        json_path: the JSON file.
        image_folder: as for `ConversationDataset`; None: the folder of the JSON file.
        processor: LLaVA processor with a fast tokenizer.
        options: those of `ConversationDataset`.

    Raises:
        FileNotFoundError: when the file or (with on_bad_sample="error") an image is missing.
        ValueError: on a malformed file or (with "error") sample, naming sample, file and remedy.
    """

    def __init__(
        self,
        json_path: str | Path,
        image_folder: str | Path | Sequence[str | Path] | None,
        processor: LlavaProcessor,
        **options: Any,
    ) -> None:
        path = Path(json_path)
        super().__init__(
            read_json(path), path, path.parent if image_folder is None else image_folder, processor, **options
        )
