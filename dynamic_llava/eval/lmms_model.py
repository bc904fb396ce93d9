"""The lmms-eval model: `python -m lmms_eval --model dynamic_llava --model_args pretrained=RUN`.

Facts of lmms-eval 0.7.3 that shape it: requests of all tasks arrive in one call; `until` is filled with a blank line
where a task sets none, which must not cut long answers; some tasks set no `max_new_tokens`; temperature 0 means greedy.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ..chat_template import IMAGE_TOKEN
from ..decisions import PREDICTOR
from .loading import LoadedModel, SparsitySettings, load_model

DEFAULT_MAX_NEW_TOKENS = 1024
PASSED_ON = ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty", "min_new_tokens")
PASSED_ON_SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class RequestRecord:
    """What one answer cost: token counts of the prompt (images expanded), its images and the answer."""

    task: str
    doc_id: int
    prompt_tokens: int
    image_tokens: int
    output_tokens: int


class DynamicLlava(lmms):
    """Dynamic-LLaVA, or a stock dense LLaVA as the baseline, behind lmms-eval's interface.

    Args:
        pretrained: folder, hub name, or a `LoadedModel` that the caller keeps.
        image_keep_rate, output_sparsity, image_selector, output_selector, output_keep_rate: see `SparsitySettings`.
        batch_size: prompts per `generate` call.
        max_batch_size: taken because lmms-eval passes it; the batch size is not searched.
        device, dtype: see `load_model`.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel,
        image_keep_rate: float | None = None,
        output_sparsity: bool | None = None,
        image_selector: str = PREDICTOR,
        output_selector: str = PREDICTOR,
        output_keep_rate: float | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        super().__init__()
        self.batch_size = _parse_batch_size(batch_size)
        self.settings = SparsitySettings(
            image_keep_rate, output_sparsity, image_selector, output_selector, output_keep_rate
        )
        self.loaded = pretrained if isinstance(pretrained, LoadedModel) else load_model(pretrained, dtype, device)
        self._call_kwargs = self.loaded.call_kwargs(self.settings)
        self.records: list[RequestRecord] = []

    @property
    def device(self) -> torch.device:
        """Device of the weights; lmms-eval reads it when several ranks run."""
        return self.loaded.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in the order given."""
        keys = [(r.args[4], r.args[5], json.dumps(r.args[1], sort_keys=True, default=str)) for r in requests]
        batches = plan_batches(keys, [len(r.args[0]) for r in requests], self.batch_size)
        results: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), desc="Answering", disable=self.rank != 0) as bar:
            for indices in batches:
                answers = self._answer([requests[i] for i in indices])
                results.update(zip(indices, answers, strict=True))
                bar.update(len(indices))
        return [results[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("dynamic_llava does not run multi-round lmms-eval tasks; use generate_until tasks.")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval 0.7.3 builds these requests wrongly for image tasks."""
        raise NotImplementedError(
            "dynamic_llava does not answer loglikelihood or multiple_choice tasks; use the task's generation form, "
            "or dynamic_llava.eval.perplexity to score answers."
        )

    def _answer(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """One `generate` call; all requests share task, split and generation arguments."""
        _, gen_kwargs, _, _, task, split = requests[0].args
        docs = [self.task_dict[task][split][r.args[3]] for r in requests]
        visuals = [list(r.args[2](doc) or []) for r, doc in zip(requests, docs, strict=True)]
        inputs = encode_prompts(self.loaded.processor, [r.args[0] for r in requests], visuals).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.loaded.model.dtype)
        with torch.inference_mode():
            sequences = self.loaded.model.generate(**inputs, **generation_arguments(gen_kwargs), **self._call_kwargs)
        answers = sequences[:, inputs["input_ids"].shape[1] :]
        tokenizer = self.loaded.processor.tokenizer
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        stops = stop_strings(gen_kwargs.get("until"))
        image_tokens = (inputs["input_ids"] == self.loaded.model.config.image_token_id).sum(dim=1).tolist()
        prompt_tokens = inputs["attention_mask"].sum(dim=1).tolist()
        output_tokens = (answers != tokenizer.pad_token_id).sum(dim=1).tolist()
        self.records += [
            RequestRecord(task, r.args[3], prompt, image, output)
            for r, prompt, image, output in zip(requests, prompt_tokens, image_tokens, output_tokens, strict=True)
        ]
        return [
            GenerationResult(cut_at_stops(text, stops), TokenCounts(input_tokens=prompt, output_tokens=output))
            for text, prompt, output in zip(texts, prompt_tokens, output_tokens, strict=True)
        ]


def plan_batches(keys: Sequence[Hashable], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of equal key, longest first, so that little is padded and lack of memory shows at once."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    batches = []
    for members in groups.values():
        members.sort(key=lambda i: (-lengths[i], i))
        batches += [members[start : start + batch_size] for start in range(0, len(members), batch_size)]
    return batches


def encode_prompts(processor: Any, contexts: Sequence[str], visuals: Sequence[Sequence[Image.Image]]) -> Any:
    """Chat prompts of one user turn each, padded on the left, as the processor's batch.

    Raises:
        ValueError: a context names another number of images than it has.
    """
    texts = []
    for context, images in zip(contexts, visuals, strict=True):
        message = [{"role": "user", "content": _user_content(context, len(images))}]
        texts.append(processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    flat = [image.convert("RGB") for images in visuals for image in images]
    bos = processor.tokenizer.bos_token
    return processor(
        images=flat or None,
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=not (bos and texts[0].startswith(bos)),
        return_tensors="pt",
    )


def _user_content(context: str, num_images: int) -> list[dict[str, str]]:
    """Images first, as LLaVA was trained, unless the text places several of them itself."""
    pieces = context.split(IMAGE_TOKEN)
    if len(pieces) - 1 not in (0, num_images):
        raise ValueError(f"The prompt {context!r} has {len(pieces) - 1} {IMAGE_TOKEN} for {num_images} images.")
    if len(pieces) <= 2:
        return [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": "".join(pieces).strip()}]
    content = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        content += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in content if part.get("text") != ""]


def generation_arguments(gen_kwargs: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's generation arguments as those of `generate`; greedy unless a temperature above 0 is asked for."""
    sample = bool(gen_kwargs.get("do_sample", True)) and float(gen_kwargs.get("temperature") or 0) > 0
    names = PASSED_ON + (PASSED_ON_SAMPLING if sample else ())
    passed = {name: gen_kwargs[name] for name in names if gen_kwargs.get(name) is not None}
    return {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **passed, "do_sample": sample}


def stop_strings(until: str | Sequence[str] | None) -> list[str]:
    """The strings that end an answer. Blank ones are dropped: lmms-eval fills in a blank line where a task has none."""
    stops = [until] if isinstance(until, str) else list(until or [])
    return [stop for stop in stops if stop.strip()]


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`, without outer white space."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()


def _parse_batch_size(batch_size: int | str) -> int:
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(f"batch_size must be a number of at least 1, got {batch_size!r}.")
    return int(batch_size)
