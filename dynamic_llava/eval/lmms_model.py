"""The lmms-eval model: `python -m lmms_eval --model dynamic_llava --model_args pretrained=RUN`.

Facts of lmms-eval 0.7.3 that shape it: requests of all tasks arrive in one call; `until` is filled with a blank line
where a task sets none, which must not cut long answers; some tasks set no `max_new_tokens`; temperature 0 means greedy.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from transformers import StoppingCriteriaList

from ..checkpoints.loaded import LoadedModel, SparsitySettings, load_model
from ..data.opening import for_processor
from ..data.prompts import cut_at_stops, encode_prompts, generation_arguments, stop_strings
from ..rules import LEARNED
from ..screen import progress
from .answers import Answer
from .costs import RequestRecord, Stopwatch
from .multi_round import COUNTS, Conversation, hold_conversations, question_of_round
from .responses import ResponseStore, response_key


class DynamicLlava(lmms):
    """Dynamic-LLaVA, or a stock dense LLaVA as the baseline, behind lmms-eval's interface.

    Args:
        pretrained: folder, hub name, or a `LoadedModel` that the caller keeps.
        image_keep_rate, output_sparsity, image_selector, output_selector, output_keep_rate, image_selection,
        output_rate_control: see `SparsitySettings`.
        batch_size: prompts per `generate` call.
        max_batch_size: taken because lmms-eval passes it; the batch size is not searched.
        device, dtype, image_aspect_ratio: see `load_model`.
        store: where answers are kept as they come; those that it has are not generated again.
        seed: with a store, of the random selectors and of sampling, batch by batch: a batch is the same in a run that
            was cut off and in one that was not.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel,
        image_keep_rate: float | None = None,
        output_sparsity: bool | None = None,
        image_selector: str = LEARNED,
        output_selector: str = LEARNED,
        output_keep_rate: float | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        store: ResponseStore | None = None,
        seed: int = 0,
        image_aspect_ratio: str | None = None,
        image_selection: str | None = None,
        output_rate_control: str | None = None,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # lmms-eval gathers the results of all ranks through this attribute.
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            device = device or str(self.accelerator.device)
        self.batch_size = _parse_batch_size(batch_size)
        self.settings = SparsitySettings(
            image_keep_rate,
            output_sparsity,
            image_selector,
            output_selector,
            output_keep_rate,
            image_selection,
            output_rate_control,
        )
        given = isinstance(pretrained, LoadedModel)
        self.loaded = pretrained if given else load_model(pretrained, dtype, device, image_aspect_ratio)
        self._call_kwargs = self.loaded.call_kwargs(self.settings)
        self.records: list[RequestRecord] = []
        self.store = store
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}.")
        self.seed = seed

    @property
    def device(self) -> torch.device:
        """Device of the weights; lmms-eval reads it when several ranks run."""
        return self.loaded.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in the order given."""
        return self._answer_all(requests, self._answer)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Hold every conversation: each round is its next turn, answered on the cache of those before it."""
        return self._answer_all(requests, self._converse)

    def _answer_all(self, requests: Sequence[Instance], answer: Callable[[Sequence[Instance]], list[Answer]]) -> list:
        """The results of all requests; `answer` takes a batch with the same task, split and generation arguments."""
        keys = [(*r.args[-2:], json.dumps(r.args[1], sort_keys=True, default=str)) for r in requests]
        batches = plan_batches(keys, [len(r.args[0]) for r in requests], self.batch_size)
        stored_under = self._response_keys(requests) if self.store is not None else []
        answers: dict[int, Answer] = {}
        with progress(len(requests), "Answering", self.rank == 0) as bar:
            for indices in batches:
                batch = [requests[i] for i in indices]
                if self.store is None:
                    found = answer(batch)
                else:
                    found = self._stored_answers(batch, [stored_under[i] for i in indices], answer)
                answers.update(zip(indices, found, strict=True))
                self.records += [answer.record for answer in found]
                bar.update(len(indices))
        return [answers[i].result() for i in range(len(requests))]

    def gathered_records(self) -> list[RequestRecord]:
        """The records of all ranks, on the first one; requests that lmms-eval repeats to even out ranks count once."""
        if self.world_size == 1:
            return self.records
        parts = [None] * self.world_size if self.rank == 0 else None
        torch.distributed.gather_object(list({record.answered: record for record in self.records}.values()), parts)
        return [record for part in parts or [] for record in part]

    def _response_keys(self, requests: Sequence[Instance]) -> list[str]:
        """One key per request; a request that is repeated counts up."""
        seen: Counter[str] = Counter()
        keys = []
        same = (asdict(self.settings), self.seed, self.loaded.image_aspect_ratio)
        for prompt, gen_kwargs, *_, doc_id, task, split in (request.args for request in requests):
            key = response_key(task, split, doc_id, prompt, gen_kwargs, *same)
            keys.append(key if not seen[key] else f"{key}-{seen[key]}")
            seen[key] += 1
        return keys

    def _stored_answers(
        self, batch: Sequence[Instance], keys: Sequence[str], answer: Callable[[Sequence[Instance]], list[Answer]]
    ) -> list[Answer]:
        """The answers of one batch, from the store where it has all of them, else generated and stored."""
        known = self.store.get(keys)
        if known is not None:
            return [Answer.from_stored(row) for row in known]
        torch.manual_seed(int(keys[0][:15], 16) + self.seed)
        answers = answer(batch)
        self.store.add(keys, [one.stored() for one in answers])
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval 0.7.3 builds these requests wrongly for image tasks."""
        raise NotImplementedError(
            "dynamic_llava does not answer loglikelihood or multiple_choice tasks; use the task's generation form, "
            "or dynamic_llava.eval.perplexity to score answers."
        )

    def _opened(self, task: str, split: str, doc_id: int, doc_to_visual: Callable) -> tuple[Any, list[Image.Image]]:
        """A document and its pictures, as the processor takes them; `ValueError` names the document where that cannot
        be."""
        try:
            doc = self.task_dict[task][split][doc_id]
            return doc, for_processor(doc_to_visual(doc) or [], self.loaded.processor.image_processor)
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"The picture of document {doc_id} of {task} cannot be read ({error}); replace or remove it."
            ) from error

    def _answer(self, requests: Sequence[Instance]) -> list[Answer]:
        """One `generate` call; all requests share task, split and generation arguments."""
        _, gen_kwargs, _, _, task, split = requests[0].args
        visuals = [self._opened(task, split, r.args[3], r.args[2])[1] for r in requests]
        inputs = encode_prompts(self.loaded.processor, [r.args[0] for r in requests], visuals).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.loaded.model.dtype)
        arguments = {**generation_arguments(gen_kwargs), **self._call_kwargs}
        # Beams are not rows: what their cache keeps is not what the answers' rows keep.
        watched = not self.loaded.is_dense and arguments.get("num_beams", 1) == 1
        if watched:
            arguments["return_sparsity"] = True
        watch = Stopwatch(self.device)
        with torch.inference_mode():
            output = self.loaded.model.generate(
                **inputs, **arguments, return_dict_in_generate=True, stopping_criteria=StoppingCriteriaList([watch])
            )
        prefill_ms, decode_ms = watch.read()
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        tokenizer = self.loaded.processor.tokenizer
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        stops = stop_strings(gen_kwargs.get("until"))
        image_tokens = (inputs["input_ids"] == self.loaded.model.config.image_token_id).sum(dim=1)
        written = (answers != tokenizer.pad_token_id).sum(dim=1)
        kept_images, kept_output = image_tokens, written
        if watched:
            found = output.sparsity
            kept_images, kept_output = found.image_tokens_kept, written - found.output_tokens + found.output_tokens_kept
        columns = (inputs["attention_mask"].sum(dim=1), image_tokens, kept_images, written, kept_output)
        return [
            Answer(
                cut_at_stops(text, stops),
                RequestRecord(task, r.args[3], *counts, len(requests), prefill_ms, decode_ms),
            )
            for r, text, *counts in zip(requests, texts, *(column.tolist() for column in columns), strict=True)
        ]

    def _converse(self, requests: Sequence[Instance]) -> list[Answer]:
        """A batch of conversations; all requests share task, split and generation arguments."""
        *_, task, split = requests[0].args
        held = []
        for context, _, doc_to_visual, doc_to_text, doc_id, _, _ in (request.args for request in requests):
            doc, pictures = self._opened(task, split, doc_id, doc_to_visual)
            held.append(Conversation(context, pictures, partial(question_of_round, doc_to_text, doc)))
        hold_conversations(self.loaded, held, requests[0].args[1], self._call_kwargs)
        return [
            Answer(
                conversation.answers,
                RequestRecord(
                    task,
                    request.args[4],
                    *(getattr(conversation, name) for name in COUNTS),
                    len(requests),
                ),
            )
            for request, conversation in zip(requests, held, strict=True)
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


def _parse_batch_size(batch_size: int | str) -> int:
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(f"batch_size must be a number of at least 1, got {batch_size!r}.")
    return int(batch_size)
