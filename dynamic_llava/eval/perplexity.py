"""Perplexity of reference answers in one forward per batch, with the decisions of inference.

Corpus perplexity = exp(total negative log likelihood / total supervised tokens), so a long answer weighs more than a
short one. The forward with labels drops tokens as cached decoding does (`DynamicLlavaForConditionalGeneration`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..checkpoints.loaded import LoadedModel, SparsitySettings
from ..data.collator import LlavaCollator
from ..data.dataset import LlavaJsonDataset
from ..screen import progress
from ..token_masks import IGNORE_INDEX, image_token_mask


@dataclass(frozen=True)
class SampleScore:
    """Sums over one sample. `dense_tokens` are all its tokens, `sparse_tokens` those that the sparse layers keep."""

    nll: float
    scored_tokens: int
    image_tokens: int
    image_tokens_kept: int
    output_tokens: int
    output_tokens_kept: int
    dense_tokens: int
    sparse_tokens: int


@dataclass(frozen=True)
class AnswerScores:
    """Per-sample sums of a corpus and the figures that follow from them."""

    samples: tuple[SampleScore, ...]

    def total(self, name: str) -> float:
        """Sum of one field over the samples."""
        return sum(getattr(sample, name) for sample in self.samples)

    def mean(self, name: str) -> float:
        """Mean of one field over the samples."""
        return self.total(name) / len(self.samples)

    @property
    def perplexity(self) -> float:
        """exp(mean negative log likelihood per scored token)."""
        return math.exp(self.total("nll") / self.total("scored_tokens"))

    def kept_fraction(self, part: str) -> float:
        """Kept share of all `image` or `output` tokens; 1 where there are none."""
        total = self.total(f"{part}_tokens")
        return self.total(f"{part}_tokens_kept") / total if total else 1.0

    def summary(self) -> dict[str, float]:
        """Perplexity, kept fractions and counts by name."""
        return {
            "perplexity": self.perplexity,
            "scored_tokens": self.total("scored_tokens"),
            "image_kept_fraction": self.kept_fraction("image"),
            "image_tokens": self.mean("image_tokens"),
            "image_tokens_kept": self.mean("image_tokens_kept"),
            "output_kept_fraction": self.kept_fraction("output"),
            "output_tokens": self.mean("output_tokens"),
            "output_tokens_kept": self.mean("output_tokens_kept"),
        }


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood of each label under the logits of the position before it.

    Args:
        logits: `(B, N, V)`.
        labels: `(B, N)` long, -100 where not scored.

    Returns:
        `(B, N - 1)` float32, 0 where not scored.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view_as(targets)


@torch.inference_mode()
def score_answers(
    loaded: LoadedModel,
    json_path: str | Path,
    image_folder: str | Path,
    settings: SparsitySettings | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    max_length: int = 2048,
    seed: int = 0,
) -> AnswerScores:
    """Score the answers of a LLaVA JSON file.

    Args:
        loaded: dense or sparse model.
        json_path, image_folder: as for `LlavaJsonDataset`.
        settings: sparsity in force; None means the checkpoint's own.
        batch_size: samples per forward.
        limit: first samples only; None means all.
        max_length: longer samples are cut.
        seed: of the random selectors.
    """
    kwargs = loaded.call_kwargs(settings or SparsitySettings())
    dataset = LlavaJsonDataset(
        json_path,
        image_folder,
        loaded.processor,
        max_length=max_length,
        on_bad_sample="error",
        output_turns="all",
    )
    if limit is not None:
        dataset = Subset(dataset, range(min(limit, len(dataset))))
    collator = LlavaCollator(loaded.processor, padding_side="right")
    torch.manual_seed(seed)
    scores: list[SampleScore] = []
    with progress(len(dataset), "Scoring") as bar:
        for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collator):
            batch = {name: value.to(loaded.device) for name, value in batch.items()}
            if batch.get("pixel_values") is not None:
                batch["pixel_values"] = batch["pixel_values"].to(loaded.model.dtype)
            scores += _score_batch(loaded, batch, kwargs)
            bar.update(len(batch["input_ids"]))
    return AnswerScores(tuple(scores))


def judged_tokens(input_ids: Tensor, answers: Tensor, end_token: int) -> Tensor:
    """Output tokens of cached decoding that goes on from turn to turn.

    The end token of an earlier answer is fed together with the next question, and so is not judged.

    Args:
        input_ids: `(B, N)` long.
        answers: `(B, N)` bool, true on every answer with its end token.
        end_token: id of the end token.

    Returns:
        `(B, N)` bool.
    """
    later = answers.flip(-1).cumsum(dim=-1).flip(-1) - answers.long()
    return answers & ~((input_ids == end_token) & (later > 0))


def _score_batch(loaded: LoadedModel, batch: dict[str, Tensor], kwargs: dict) -> list[SampleScore]:
    answer = judged_tokens(batch["input_ids"], batch.pop("output_mask"), loaded.processor.tokenizer.eos_token_id)
    labels, present = batch["labels"], batch["attention_mask"].bool()
    # The head is asked from the token in front of the first answer of the batch on.
    start = max(int((labels != IGNORE_INDEX).any(dim=0).long().argmax()) - 1, 0)
    if loaded.is_dense:
        batch.pop("labels")
    else:
        kwargs = {**kwargs, "output_mask": answer}
    output = loaded.model(**batch, **kwargs, use_cache=False, logits_to_keep=labels.shape[1] - start)
    image = image_token_mask(batch["input_ids"], loaded.model.config.image_token_id) & present
    # No mask (a dense model, or a part that this call does not judge) means that everything is kept.
    masks = (getattr(output, name, None) for name in ("image_keep_mask", "output_keep_mask"))
    kept_image, kept_output = (present if mask is None else mask.bool() for mask in masks)
    columns = {
        "nll": token_nll(output.logits, labels[:, start:]),
        "scored_tokens": labels[:, 1:] != IGNORE_INDEX,
        "image_tokens": image,
        "image_tokens_kept": image & kept_image,
        "output_tokens": answer,
        "output_tokens_kept": answer & kept_output,
        "dense_tokens": present,
        "sparse_tokens": present & kept_image & kept_output,
    }
    sums = {name: column.sum(dim=1).tolist() for name, column in columns.items()}
    return [SampleScore(**{name: values[row] for name, values in sums.items()}) for row in range(len(labels))]
