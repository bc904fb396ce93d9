"""How `generate` works on the sparse decoder: its cache, decoding without one, right padding, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode
from transformers.utils import ModelOutput

from .cache import SparseCache, require_sparse_cache
from .functional import gather_kept
from .statistics import SparsityStatistics

CACHES = (None, "dynamic", "static", "offloaded")


class DynamicGenerationMixin:
    """Changes from `GenerationMixin`:
    - the cache is a `SparseCache`; without a cache, output columns are told from the prompt;
    - right-padded prompts are moved to the right first, so that every row goes on from its last token;
    - `return_sparsity=True` adds `sparsity` (`SparsityStatistics`) to the output.
    """

    def generate(self, inputs: Tensor | None = None, *args, return_sparsity: bool = False, **kwargs):
        """As `GenerationMixin.generate`, which see; also takes the per-call arguments of `forward`.

        Args:
            return_sparsity: return a `ModelOutput` whose `sparsity` says what was kept; needs the cache.
        """
        if inputs is None:
            _move_padding_left(kwargs)
        prompt = next(
            (x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None
        )
        if prompt is not None:
            # Without a cache every step sees the whole sequence; this tells what of it was generated.
            kwargs["prompt_length"] = prompt.shape[1]
        if not return_sparsity:
            return super().generate(inputs, *args, **kwargs)
        kwargs["return_dict_in_generate"] = True
        output: ModelOutput = super().generate(inputs, *args, **kwargs)
        if not isinstance(output.get("past_key_values"), SparseCache):
            raise ValueError("return_sparsity=True reads the SparseCache; leave out use_cache=False.")
        cache = output.past_key_values
        present = None
        if prompt is not None and len(cache.table.cursor) == len(output.sequences):
            # With embeddings as the prompt the sequences hold what was generated alone.
            start = prompt.shape[1] if kwargs.get("inputs_embeds") is None else 0
            config = kwargs.get("generation_config") or self.generation_config
            ended = ended_mask(output.sequences[:, start:], kwargs.get("eos_token_id", config.eos_token_id))
            fed = torch.ones(len(ended), prompt.shape[1], dtype=torch.bool, device=ended.device)
            present = torch.cat([fed, ~ended], dim=1)[:, : int(cache.get_seq_length())]
        output["sparsity"] = SparsityStatistics.of(cache, present)
        return output

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: `generate_batch`, `cache_implementation="paged"` and `transformers serve` all begin here."""
        raise ValueError(
            "Continuous batching (generate_batch, cache_implementation='paged') keeps a paged cache, which would store "
            "dropped tokens; call generate with a padded batch."
        )

    def _prepare_cache_for_generation(
        self,
        generation_config,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "Assisted decoding feeds several unverified tokens in one call, Dynamic-LLaVA judges them one by one; "
                "leave out assistant_model and prompt_lookup_num_tokens."
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            require_sparse_cache(cache)
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        elif generation_config.use_cache is not False:
            if generation_config.cache_implementation not in CACHES:
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} is not one that drops tokens; "
                    "leave it out to decode on a SparseCache, or pass 'static' for one of fixed size, 'offloaded' for "
                    "one in host memory."
                )
            fixed = generation_config.cache_implementation == "static"
            length = max(max_cache_length, generation_config.max_cache_len or 0) if fixed else None
            offload = generation_config.cache_implementation == "offloaded"
            model_kwargs["past_key_values"] = SparseCache(self.config, max_length=length, offload=offload)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ) -> tuple[Tensor, dict[str, Any]]:
        # transformers before 5.19 repeats picture by picture (5.17 pixels, 5.18 features): beams of a row with several
        # pictures would each see another choice of them.
        pixel_values, encoded = model_kwargs.get("pixel_values"), model_kwargs.get("mm_encoder_outputs") or {}
        if expand_size > 1 and input_ids is not None:
            model_kwargs |= {"pixel_values": None, "mm_encoder_outputs": None}
        expanded, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if expand_size > 1 and input_ids is not None:
            tokens = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
            if pixel_values is not None:
                model_kwargs["pixel_values"] = _repeat_by_row(pixel_values, tokens, expand_size)
            if "image" in encoded:
                features = encoded["image"].pooler_output
                encoded["image"].pooler_output = _repeat_by_row(features, tokens, expand_size)
                model_kwargs["mm_encoder_outputs"] = encoded
        return expanded, model_kwargs

    def create_masks_for_generate(
        self, attention_mask: Tensor | None, past_key_values: SparseCache, **_
    ) -> Tensor | None:
        """The 2D mask of a cache of fixed size, `(B, max_length)`: its shape does not change from step to step."""
        if attention_mask is None:
            return None
        past_key_values.check_room(attention_mask.shape[1])
        return torch.nn.functional.pad(attention_mask, (0, past_key_values.max_length - attention_mask.shape[1]))


def _repeat_by_row(pictures: Tensor | Sequence[Tensor], tokens: Sequence[int], times: int) -> Any:
    """The pictures of a batch, those of each row `times` times in a run; `tokens` are the image tokens of each row."""
    if not sum(tokens):
        # `forward` says that nothing asks for these pictures.
        return pictures
    ends = [len(pictures) * seen // sum(tokens) for seen in accumulate(tokens)]
    order = [n for start, end in pairwise([0, *ends]) for _ in range(times) for n in range(start, end)]
    if isinstance(pictures, Tensor):
        return pictures[torch.tensor(order, dtype=torch.long, device=pictures.device)]
    return [pictures[n] for n in order]


def ended_mask(generated: Tensor, end_tokens: int | list[int] | None) -> Tensor:
    """`(B, T)` bool, true from the end token of each row of `generated (B, T)` on."""
    if end_tokens is None:
        return torch.zeros_like(generated, dtype=torch.bool)
    ends = torch.as_tensor(end_tokens, device=generated.device).view(-1)
    return torch.isin(generated, ends).cumsum(dim=1) > 0


def _move_padding_left(kwargs: dict[str, Any]) -> None:
    """Turn right-padded `input_ids` of a first turn into left-padded ones, in place."""
    input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if input_ids is None or mask is None or mask.shape != input_ids.shape or kwargs.get("position_ids") is not None:
        return
    if bool(mask[:, -1].all()):
        return
    order = mask.bool().to(torch.uint8).sort(dim=-1, stable=True).indices
    kwargs["input_ids"], kwargs["attention_mask"] = gather_kept(input_ids, order), gather_kept(mask, order)
