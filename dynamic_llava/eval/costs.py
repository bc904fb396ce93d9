"""What answers cost: tokens, latencies, FLOPs and KV bytes of every request, and their summary by task."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from ..checkpoints.loaded import LoadedModel, SparsitySettings
from ..efficiency.flops import image_tokens_per_image, kv_cache_bytes, predictor_flops, prefill_flops
from ..rules import LEARNED


@dataclass(frozen=True)
class RequestRecord:
    """What one answer cost.

    Args:
        task, doc_id: of lmms-eval.
        prompt_tokens: of the prompt, image tokens included; of several rounds, of all.
        image_tokens, image_tokens_kept: in the prompt, and in the sparse layers.
        output_tokens, output_tokens_kept: written, and kept by the sparse layers; what is not judged counts as kept.
        batch_size: prompts of the `generate` call that it shared; latencies are the call's.
        prefill_ms: up to the first token, picture tower included; None where several rounds were held.
        decode_ms: of each further token of the call; None where there was none.
    """

    task: str
    doc_id: int
    prompt_tokens: int
    image_tokens: int
    image_tokens_kept: int
    output_tokens: int
    output_tokens_kept: int
    batch_size: int
    prefill_ms: float | None = None
    decode_ms: float | None = None

    @classmethod
    def fits(cls, values: Any) -> bool:
        """Whether `values`, of a file, are those of a record."""
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            return False
        numbers = [value for name, value in values.items() if name != "task" and not (value is None and "_ms" in name)]
        return isinstance(values["task"], str) and all(type(value) in (int, float) for value in numbers)

    @property
    def answered(self) -> tuple[str | int, ...]:
        """Everything but how long it took and in what company: the same for a request that is repeated."""
        counts = (self.image_tokens, self.image_tokens_kept, self.output_tokens, self.output_tokens_kept)
        return (self.task, self.doc_id, self.prompt_tokens, *counts)


class Stopwatch(StoppingCriteria):
    """Takes the time of a `generate` call, as one of its `stopping_criteria`; stops nothing.

    A GPU is waited for at the start, after the first token and at the end: nowhere else, so that steps overlap as they
    do unwatched.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps = 0
        self.started = self._now()
        self.first = self.started

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.steps += 1
        if self.steps == 1:
            self.first = self._now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def read(self) -> tuple[float, float | None]:
        """Milliseconds up to the first token, and of each further step (None without any); to be called once, behind
        the call."""
        ended = self._now()
        further = self.steps - 1
        decode = 1000 * (ended - self.first) / further if further > 0 else None
        return 1000 * (self.first - self.started), decode

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def summarize(records: Iterable[RequestRecord], loaded: LoadedModel, settings: SparsitySettings) -> dict[str, Any]:
    """Task -> means over its requests, medians of the latencies over its `generate` calls.

    FLOPs and bytes follow from the token counts; `..._dense` are those of the same requests without sparsity. The first
    call of a process, which is slower, does not move a median.
    """
    by_task: dict[str, list[RequestRecord]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    return {task: _summary(found, loaded, settings) for task, found in by_task.items()}


def _summary(records: Sequence[RequestRecord], loaded: LoadedModel, settings: SparsitySettings) -> dict[str, Any]:
    counts = ("image_tokens", "image_tokens_kept", "output_tokens", "output_tokens_kept")
    rate = loaded.image_keep_rate(settings)
    return {
        "requests": len(records),
        "batch_size": max(record.batch_size for record in records),
        **{name: _mean(getattr(record, name) for record in records) for name in counts},
        "prefill_ms": _median(record.prefill_ms for record in records),
        "decode_ms": _median(record.decode_ms for record in records),
        "prefill_flops": _mean(_prefill_flops(record, loaded, settings, rate) for record in records),
        "prefill_flops_dense": _mean(_prefill_flops(record, loaded, settings, None) for record in records),
        "kv_bytes": _mean(_kv_bytes(record, loaded, sparse=True) for record in records),
        "kv_bytes_dense": _mean(_kv_bytes(record, loaded, sparse=False) for record in records),
    }


def _prefill_flops(record: RequestRecord, loaded: LoadedModel, settings: SparsitySettings, rate: float | None) -> int:
    config = loaded.model.config
    images = record.image_tokens // image_tokens_per_image(config)
    flops = prefill_flops(config, record.prompt_tokens - record.image_tokens, rate, num_images=images)
    if rate is not None and rate < 1 and images and settings.image_selector != LEARNED:
        flops -= predictor_flops(config, image_tokens=record.image_tokens)
    return flops


def _kv_bytes(record: RequestRecord, loaded: LoadedModel, sparse: bool) -> int:
    # The last token written is never fed.
    held = record.prompt_tokens + max(record.output_tokens - 1, 0)
    dropped = record.image_tokens - record.image_tokens_kept + record.output_tokens - record.output_tokens_kept
    return kv_cache_bytes(loaded.model.config, held, held - dropped if sparse else held, loaded.model.dtype.itemsize)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
