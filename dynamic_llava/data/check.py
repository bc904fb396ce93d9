"""What training data holds and what is wrong with it, found before a GPU is rented."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np

from ..checkpoints import load_processor
from ..checkpoints.aspect_ratio import with_aspect_ratio
from ..sparsity_config import SparsityConfig
from .dataset import ConversationDataset
from .judged import count_judged, unseeing_predictors
from .mixture import MixtureDataset
from .pictures import StoredPicture
from .samples import pictures_of, sample_id
from .sources import open_parts

PERCENTILES = (50, 90, 95, 99)
# Looking for files waits for the disk, often one on the network.
THREADS = 8


@dataclass
class Problem:
    """A kind of finding: how often, and the first ones."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.examples) < 5:
            self.examples.append(text)


# What makes training stop, or with on_bad_sample=skip leave samples out; being cut short does not.
UNTRAINED = "predictor without data"
PROBLEMS = ("malformed", "missing pictures", "unreadable pictures", "no answer left", UNTRAINED)
FINDINGS = (*PROBLEMS, "truncated")


def check_data(base_model: str, data: Any, sparsity: SparsityConfig, seed: int, decode: bool = False) -> dict[str, Any]:
    """Looks at all samples and pictures of a training configuration.

    Args:
        base_model: whose tokenizer and pictures.
        data: has `train_file`, `image_folder`, `max_length`, `image_aspect_ratio`, `output_turns` and `require_image`.
        sparsity: which predictors would learn of it.
        seed: of the training, which chooses from weighted data.
        decode: decode every picture instead of looking at its header and end; slow.

    Returns:
        `sources` (path, weight, rows, what is in them), `samples_per_epoch`, `lengths` of an epoch in tokens before the
        cut (min, mean, percentiles, max, and their total after the cut), `max_length`, `tokens_per_picture`, `judged`
        (`JudgedCounts` of an epoch), `findings` (`{kind: {"count", "examples"}}` for `FINDINGS`), and `ok`: no finding
        of the kinds `PROBLEMS`.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `open_dataset`, for what concerns whole files.
    """
    processor = with_aspect_ratio(load_processor(base_model), data.image_aspect_ratio)
    parts = open_parts(
        data.train_file,
        data.image_folder,
        processor,
        max_length=data.max_length,
        on_bad_sample="skip",
        output_turns=data.output_turns,
        check_files=False,
        require_image=data.require_image,
    )
    findings = {kind: Problem() for kind in FINDINGS}
    sources, epoch = [], []
    tokens = parts[0][0].pictures.tokens_per_picture()
    mixture = MixtureDataset([part for part, _ in parts], [weight for _, weight in parts], seed)
    for (part, weight), positions in zip(parts, mixture.chosen, strict=True):
        for _, reason in part.skipped:
            findings["malformed"].add(reason)
        _check_pictures(part, findings, decode)
        _check_lengths(part, tokens, findings)
        epoch.append(np.asarray(part.full_lengths)[positions.numpy()])
        sources.append(
            {"path": str(part.source), "weight": weight, "samples_per_epoch": len(positions), **_counts(part)}
        )
    judged = count_judged(mixture, sparsity.min_output_length)
    for problem in unseeing_predictors(sparsity, data, judged.judged > 0, judged.image_rows > 0):
        findings[UNTRAINED].add(problem)
    return {
        "sources": sources,
        "samples_per_epoch": sum(map(len, epoch)),
        "lengths": _statistics(np.concatenate(epoch), data.max_length),
        "max_length": data.max_length,
        "tokens_per_picture": tokens,
        "judged": dataclasses.asdict(judged),
        "findings": {kind: dataclasses.asdict(problem) for kind, problem in findings.items()},
        "ok": not any(findings[kind].count for kind in PROBLEMS),
    }


def _counts(part: ConversationDataset) -> dict[str, int]:
    pictures = [pictures_of(sample) for sample in part.samples]
    numbers = Counter(min(len(own), 2) for own in pictures)
    return {
        "rows": len(part) + len(part.skipped) + part.text_only_left_out,
        "text_only": numbers[0],
        "one_picture": numbers[1],
        "several_pictures": numbers[2],
        "left_out_text_only": part.text_only_left_out,
        "malformed": len(part.skipped),
        "pictures": len({picture for own in pictures for picture in own}),
    }


def _check_pictures(part: ConversationDataset, findings: dict[str, Problem], decode: bool) -> None:
    first: dict[str | StoredPicture, str] = {}
    for position, sample in enumerate(part.samples):
        for picture in pictures_of(sample):
            first.setdefault(picture, sample_id(sample, position))
    with ThreadPool(THREADS) as pool:
        results = pool.imap(partial(_verify, part, decode), first, chunksize=64)
        for name, result in zip(first.values(), results, strict=True):
            if result is not None:
                kind, message = result
                findings[kind].add(f"{part.source}: sample {name!r}: {message}")


def _verify(part: ConversationDataset, decode: bool, picture: str | StoredPicture) -> tuple[str, str] | None:
    try:
        part.pictures.verify(picture, decode)
    except FileNotFoundError as error:
        return "missing pictures", str(error)
    except ValueError as error:
        return "unreadable pictures", str(error)
    return None


def _check_lengths(part: ConversationDataset, tokens: int, findings: dict[str, Problem]) -> None:
    for position, length in enumerate(part.full_lengths):
        if length <= part.max_length:
            continue
        where = f"{part.source}: sample {sample_id(part.samples[position], position)!r}"
        findings["truncated"].add(f"{where}: {length} tokens")
        try:
            part.encode(position, tokens)
        except ValueError as error:
            findings["no answer left"].add(f"{where}: {error}")


def _statistics(lengths: np.ndarray, max_length: int) -> dict[str, float]:
    percentiles = dict(zip(PERCENTILES, np.percentile(lengths, PERCENTILES).tolist(), strict=True))
    return {
        "min": int(lengths.min()),
        "mean": float(lengths.mean()),
        **{f"p{rank}": value for rank, value in percentiles.items()},
        "max": int(lengths.max()),
        "total": int(np.minimum(lengths, max_length).sum()),
    }
